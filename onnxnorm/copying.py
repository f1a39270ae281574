"""Bytes from file to file, and the hidden folder that they wait in.

Besides the standard library this imports only what does no more: a `HeadStart` copies while the
rest of the program is still being imported.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from onnxnorm.errors import OnnxNormError, OutputError, writing
from onnxnorm.wire import WireError, external_entries

DEAD_SHARE: Final = 16  # a data file keeps its layout while less than 1/16 of it would be unused
_BLOCK: Final = 8 << 20  # bytes copied at a time where the kernel cannot
# Bytes copied between two looks at whether to stop. The kernel is asked once for all: in steps of
# 64 MB it took up to twice the processor time, seen with ext4 on Linux 6.18.
_STEP: Final = 1 << 62 if hasattr(os, "copy_file_range") else 64 << 20
_WORTH: Final = 64 << 20  # bytes from which on a copy takes longer than a thread
_GRAPH_LIMIT: Final = 64 << 20  # bytes of a model file that has its weights elsewhere


class HiddenFolder:
    """A new folder beside `target`, or for temporary files, gone when nobody holds this object.

    Its removal is arranged before it exists, so that an interruption at any moment leaves none.

    Raises:
        OutputError: Nothing can be written at `target`.
    """

    def __init__(self, target: Path | None) -> None:
        mark = os.urandom(8).hex()
        if target is None:
            self.path = Path(tempfile.gettempdir(), f"onnxnorm-{mark}")
        else:
            self.path = target.parent / f".{target.name[:40]}.{mark}"
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        with writing(target or self.path):
            if target is not None:
                _check_place(target)
            self.path.mkdir(mode=0o700)


def _check_place(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists() and not target.is_file():  # a rename would replace the device itself
        raise OutputError(f"{target} is not a regular file", "Give the name of a file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder {target.parent} does not exist")


def data_path(model: Path) -> Path:
    """Where the weights of a model go that are not in its file."""
    return model.with_name(f"{model.name}.data")


class HeadStart:
    """A copy of a data file that a thread makes beside a destination, to be taken up there.

    Copying a large file takes longer than finding out what changes in it, and needs nothing but
    the kernel. `onnxnorm.staging.Staged` takes the copy up where it is of use; `close` removes it
    otherwise.

    Attributes:
        target: The model file that it was begun for.
        folder: The hidden folder that the copy is in.
        data: The copy.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self.target = target
        self.folder = HiddenFolder(target)
        self.data = data_path(self.folder.path / target.name)
        self._stop = threading.Event()
        self._error: OSError | None = None
        with source.open("rb") as reader:
            self._descriptor = os.dup(reader.fileno())
        self._release = weakref.finalize(self, os.close, self._descriptor)
        self._source = source
        self._out = self.data.open("wb")
        # A daemon: an interrupted program does not wait for it.
        self._thread = threading.Thread(target=self._copy, name="head start", daemon=True)
        self._thread.start()

    def is_of(self, descriptor: int) -> bool:
        """Whether it is a copy of this open file."""
        return os.path.sameopenfile(self._descriptor, descriptor)

    def finish(self) -> Path:
        """Wait for the copy; returns its path.

        Raises:
            OSError: It could not be made.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.data

    def abandon(self) -> None:
        """Stop, and remove what was copied; the folder stays."""
        self._stop.set()
        self._thread.join()
        self.data.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop, and remove the folder with all that is still in it.

        The kernel may go on for a while, into a file that has no name any more; the end of the
        process ends that too.
        """
        self._stop.set()
        if os.name != "posix":  # where an open file cannot be removed
            self._thread.join()
        self.folder.remove()

    def _copy(self) -> None:
        try:
            with self._out as out:
                at, end = 0, os.fstat(self._descriptor).st_size
                while at < end and not self._stop.is_set():
                    step = min(_STEP, end - at)
                    copy_range(self._descriptor, at, step, out.fileno(), self._source)
                    at += step
        except OSError as error:
            self._error = error


@contextmanager
def head_start(model: Path, target: Path) -> Iterator[HeadStart | None]:
    """Begin to copy the data file of a model, where it has a large one of which all is used.

    Where anything is wrong nothing is begun: whoever reads the model or writes the result says so.
    """
    try:
        source = _data_file(model)
        replaces = target.exists() and target.samefile(model)
        ahead = None if source is None or replaces else HeadStart(source, target)
    except (OSError, ValueError, RuntimeError, WireError, OnnxNormError):
        ahead = None
    try:
        yield ahead
    finally:
        if ahead is not None:
            ahead.close()


def _data_file(model: Path) -> Path | None:
    """The only data file of a model; None where there is none, several, or a small one."""
    if not model.is_file() or model.stat().st_size > _GRAPH_LIMIT:
        return None
    runs: dict[str, dict[int, int]] = {}
    for entries in external_entries(model.read_bytes()):
        length = int(entries.get("length", "0"))  # not everybody states it
        runs.setdefault(entries.get("location", ""), {})[int(entries.get("offset", "0"))] = length
    if len(runs) != 1:
        return None
    [(location, used)] = runs.items()
    source = (model.parent / location).resolve()
    if Path(location).is_absolute() or not source.is_relative_to(model.parent.resolve()):
        return None
    size = source.stat().st_size if source.is_file() else 0
    unused = size - sum(used.values())
    return source if size >= _WORTH and unused * DEAD_SHARE <= size else None


def copy_range(source: int, offset: int, length: int, out: int, path: Path) -> None:
    """Copy a run of bytes from file to file inside the kernel where it can.

    Args:
        source: Descriptor to read from.
        offset: Where the bytes are in it.
        length: How many.
        out: Descriptor to write to, at its position.
        path: What to call the source.
    """
    end = offset + length
    if hasattr(os, "copy_file_range"):
        try:
            while offset < end:
                done = os.copy_file_range(source, out, end - offset, offset)
                if done == 0:
                    break
                offset += done
        except OSError as error:
            # These say that this pair of file systems cannot do it, not that the copy failed.
            if error.errno not in (
                errno.EXDEV,
                errno.EINVAL,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
                errno.EBADF,
                errno.EPERM,
            ):
                raise
    if hasattr(os, "sendfile"):
        try:
            while offset < end:
                done = os.sendfile(out, source, offset, end - offset)
                if done == 0:
                    break
                offset += done
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK):
                raise
    os.lseek(source, offset, os.SEEK_SET)
    while offset < end:
        block = memoryview(os.read(source, min(_BLOCK, end - offset)))
        if not block:
            raise OSError(errno.EIO, f"{path} became shorter while it was read")
        offset += len(block)
        while block:
            block = block[os.write(out, block) :]
