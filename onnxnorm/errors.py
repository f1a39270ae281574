"""What can go wrong, as two lines: what happened, and what to do about it.

Every failure a user can cause or cure is an `OnnxNormError`; the command line prints its two lines
and exits with `exit_code`. Anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class OnnxNormError(Exception):
    """A failure with a cause and a cure.

    Args:
        what: One line that says what happened, naming the file, node or value.
        hint: One line that says what to do about it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what, hint)
        self.what = " ".join(what.split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}"


class ModelError(OnnxNormError):
    """The model cannot be read, is not valid, or holds what we cannot keep."""


class UsageError(OnnxNormError):
    """An option, a pass name, a site or a combination of them is wrong."""


class OutputError(OnnxNormError):
    """The result cannot be written: no folder, no permission, no space."""


class ProviderError(OnnxNormError):
    """The execution provider that was asked for is not really available."""


class RuntimeRejection(OnnxNormError):
    """onnxruntime cannot load or run a model."""


class ParityError(OnnxNormError):
    """The outputs do not agree, or agreement could not be checked. Nothing was written."""

    exit_code: ClassVar[int] = 1


class VerificationError(OnnxNormError):
    """A pass broke an invariant of the graph: a defect of the pass, never of the model.

    The message names the pass, the site and the value.
    """


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn operating system errors into the two lines about `target`."""
    try:
        yield
    except OSError as error:
        raise write_error(target, error) from error


def write_error(target: Path, error: OSError) -> OutputError:
    """The two lines for an operating system error met while writing `target`."""
    hints = {
        errno.ENOSPC: "Free some space or write to another disk.",
        errno.EDQUOT: "Free some space or write to another disk.",
        errno.EFBIG: "Raise the limit on file sizes or write to another disk.",
        errno.EACCES: "Write to a folder that you may write to.",
        errno.EPERM: "Write to a folder that you may write to.",
        errno.EROFS: "Write to a folder that you may write to.",
        errno.ENOENT: "Create the folder first.",
        errno.ENOTDIR: "Create the folder first.",
        errno.EISDIR: "Give a file name, not a folder.",
        errno.ENAMETOOLONG: "Give a shorter name.",
    }
    hint = hints.get(error.errno or 0, "Write to another place.")
    return OutputError(f"{target} cannot be written: {error.strerror or error}", hint)
