"""The operator library as a file: where it is, what is in it, and how a session gets it.

    onnxnorm.register_ops(session_options)

onnxruntime is not imported here: it loads the file itself when its session options are told to, and
`describe` asks the file through ctypes.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from onnxnorm.errors import ProviderError
from onnxnorm.ops import bodies, build

HINT: Final = (
    "Install a C++ compiler and run `python -m onnxnorm.ops.build`; or go without the library: "
    "models carry the bodies of their operators and run on standard ones."
)


@dataclass(frozen=True)
class Library:
    """The operator library of this installation.

    Attributes:
        path: The shared library; None where there is none that loads.
        operators: The operators it has kernels for.
        types: Their element types.
        instruction_set: The one in use on this processor; "" without a library.
        built: The instruction sets that were built, the best first.
        usable: Those that this processor has.
        missing: One line for each thing that is missing.
    """

    path: Path | None
    operators: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    instruction_set: str = ""
    built: tuple[str, ...] = ()
    usable: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def library_path() -> Path | None:
    """Where the library is; None where it was not built."""
    path = build.BUILT / build.LIBRARY
    return path if path.is_file() else None


def register_ops(session_options: Any) -> None:
    """Give an onnxruntime session our kernels: they replace the bodies that a model carries.

    Args:
        session_options: `onnxruntime.SessionOptions`.

    Raises:
        ProviderError: The library was not built or does not load; the second line says what to do.
    """
    library = describe()
    if library.path is None:
        raise ProviderError(f"no operator library: {'; '.join(library.missing)}", HINT)
    session_options.register_custom_ops_library(str(library.path))


def summary(library: Library) -> list[str]:
    """The library in a few lines for a reader."""
    lines = []
    if library.path is None:
        lines.append("operator library: none; models run on the bodies of their operators")
    else:
        lines.append(f"operator library: {library.path}")
        lines.append(f"instruction set: {library.instruction_set} ({_sets(library)})")
        lines.append(f"element types: {', '.join(library.types)}")
        lines.append("kernels (domain onnxnorm, version 1, CPU):")
        lines += [f"    {name:<28}{bodies.OPERATORS[name].equation}" for name in library.operators]
    lines += [f"missing: {line}" for line in library.missing]
    if library.path is None:
        lines.append(HINT)
    return lines


def _sets(library: Library) -> str:
    lacking = [name for name in library.built if name not in library.usable]
    text = f"built: {', '.join(library.built)}"
    return f"{text}; this processor lacks {', '.join(lacking)}" if lacking else text


@cache
def describe() -> Library:
    """What the library of this installation is and has. Never fails: what is missing is said."""
    path = library_path()
    recorded = tuple(map(str, build.read_record().get("missing", ())))
    if path is None:
        return Library(None, missing=recorded or ("the library was not built",))
    try:
        native = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, missing=(f"the library does not load: {error}",))
    native.onnxnorm_ops_describe.restype = ctypes.c_char_p
    found = json.loads(native.onnxnorm_ops_describe())
    return Library(
        path,
        operators=tuple(found["operators"]),
        types=tuple(found["types"]),
        instruction_set=found["instruction_set"],
        built=tuple(found["built"]),
        usable=tuple(found["usable"]),
        missing=recorded,
    )
