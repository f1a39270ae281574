"""The operator library as a file: where it is, what is in it, and how a session gets it.

    onnxnorm.register_ops(session_options)

A second file has kernels for NVIDIA GPUs too. It is built and registered only where it is asked for
(`cuda_kernels`), as long as `gpu_evidence.json` has no run of them on a GPU.

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
CUDA_HINT: Final = "Install CUDA's compiler nvcc and run `python -m onnxnorm.ops.build --cuda`."
EVIDENCE: Final = build.HERE / "gpu_evidence.json"  # written by tools/gpu_check.py


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
        architectures: The GPU architectures that it has kernels for: `sm_80`; empty for the CPU's.
    """

    path: Path | None
    operators: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    instruction_set: str = ""
    built: tuple[str, ...] = ()
    usable: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


def register_ops(session_options: Any, *, cuda_kernels: bool = False) -> None:
    """Give an onnxruntime session our kernels: they replace the bodies that a model carries.

    Args:
        session_options: `onnxruntime.SessionOptions`.
        cuda_kernels: Register those for the CUDA provider too.

    Raises:
        ProviderError: The library was not built or does not load; the second line says what to do.
    """
    session_options.register_custom_ops_library(str(required(cuda_kernels=cuda_kernels)))


def required(*, cuda_kernels: bool = False) -> Path:
    """The library's file.

    Raises:
        ProviderError: The library was not built or does not load; the second line says what to do.
    """
    library = describe_cuda() if cuda_kernels else describe()
    if library.path is None:
        what = "operator library with CUDA kernels" if cuda_kernels else "operator library"
        raise ProviderError(
            f"no {what}: {'; '.join(library.missing)}", CUDA_HINT if cuda_kernels else HINT
        )
    return library.path


def gpu_evidence() -> str:
    """Where the kernels for GPUs are known to have run, in words."""
    try:
        found = json.loads(EVIDENCE.read_text("utf-8"))
        said = f"ran on {found['device']} on {found['date']}"
        same = found["sources"] == build.device_digest()
    except (OSError, ValueError, KeyError, TypeError):
        return "never run on a GPU"
    return said if same else f"{said}, and changed since"


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
    return lines + _cuda_summary(describe_cuda())


def _cuda_summary(library: Library) -> list[str]:
    if library.path is None:
        return [f"CUDA kernels: not built ({'; '.join(library.missing)})"]
    code = ", ".join(library.architectures)
    state = f"{gpu_evidence()}; off unless --cuda-kernels asks for them"
    return [f"CUDA kernels: {library.path} ({code}); {state}"]


def _sets(library: Library) -> str:
    lacking = [name for name in library.built if name not in library.usable]
    text = f"built: {', '.join(library.built)}"
    return f"{text}; this processor lacks {', '.join(lacking)}" if lacking else text


@cache
def describe() -> Library:
    """What the library of this installation is and has. Never fails: what is missing is said."""
    return _describe(build.Kind.CPU, "the library was not built")


@cache
def describe_cuda() -> Library:
    """The same of the library that has kernels for GPUs too."""
    return _describe(build.Kind.CUDA, "`python -m onnxnorm.ops.build --cuda` builds it")


def _describe(kind: build.Kind, otherwise: str) -> Library:
    path = build.BUILT / kind.library
    recorded = tuple(map(str, build.read_record(build.BUILT / kind.record).get("missing", ())))
    if not path.is_file():
        return Library(None, missing=recorded or (otherwise,))
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
        architectures=tuple(found.get("architectures", ())),
    )
