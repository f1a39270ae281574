"""Compile the operator library: one command a source file, and kernels.cc once an instruction set.

    python -m onnxnorm.ops.build            builds it for the package as it stands
    python -m onnxnorm.ops.build --cuda     and another that has kernels for NVIDIA GPUs too

setup.py loads this file by its path and calls `build` too, before the package can be imported; so
nothing but the standard library is imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
SOURCES: Final = HERE / "csrc"
BUILT: Final = HERE / "built"  # no package: Python would take the library for a module of it
_WINDOWS: Final = os.name == "nt"
_SUFFIX: Final = "dll" if _WINDOWS else "dylib" if sys.platform == "darwin" else "so"
LIBRARY: Final = f"libonnxnorm_ops.{_SUFFIX}"
_PROGRAM: Final = "program"
RECORD: Final = "build.json"  # what was built, or why nothing was


class Kind(Enum):
    """A library, by the kernels it has; the value names its file and its record."""

    CPU = ""
    CUDA = "cuda"  # and those for a GPU
    EMULATED = "emulated"  # those for a GPU alone, run by the CPU: for tests

    @property
    def library(self) -> str:
        """The library's file name."""
        return f"libonnxnorm_ops_{self.value}.{_SUFFIX}" if self.value else LIBRARY

    @property
    def record(self) -> str:
        """The file name of the record of its build."""
        return f"build.{self.value}.json" if self.value else RECORD


_COMMON: Final = ("layout.cc", "dispatch.cc", "softmax.cc", "norm.cc", "operators.cc", "library.cc")
_FLAGS: Final = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # A product followed by a sum is one rounding where the instruction set has it. Nothing else of
    # fast math: infinities, NaN and the order of sums stay as written.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# The best first. dispatch.cc asks the processor for what these flags let the compiler use.
_INSTRUCTION_SETS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "x86_64": {
        "avx512": (
            *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
            "-mprefer-vector-width=512",
            # A line that will be written is fetched for that; older processors do nothing then.
            "-mprfchw",
            # GCC 12 warns of its own header: _mm512_undefined_ps is meant to be so.
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
        ),
        "avx2": ("-mavx2", "-mfma", "-mf16c", "-mprfchw"),
        "baseline": (),
    },
    "aarch64": {"neon": ()},
}
# Machine code for these and for the newest that this nvcc knows; for those between and beyond, the
# driver makes it from the virtual one.
_ARCHITECTURES: Final = (80, 90)
_VIRTUAL: Final = 90
_CUDA_FLAGS: Final = ("-std=c++17", "-O3", "-x", "cu", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
SANITIZE: Final = (
    *("-O1", "-g1", "-fno-omit-frame-pointer"),
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)


@dataclass(frozen=True)
class Built:
    """What a build left.

    Attributes:
        library: The shared library; None where there is none.
        missing: One line for each thing that is missing, empty when all was built.
    """

    library: Path | None
    missing: tuple[str, ...]


def compiler() -> list[str] | None:
    """The C++ compiler: $CXX, else c++, g++ or clang++; None where there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def _is_clang(command: Sequence[str]) -> bool:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return "clang" in done.stdout


def _flags() -> tuple[str, ...]:
    # Code for Windows can always be moved, and compilers warn of the flag.
    return tuple(flag for flag in _FLAGS if not (_WINDOWS and flag == "-fPIC"))


def nvcc() -> Path | None:
    """The CUDA compiler: $NVCC, that of $CUDA_HOME or the PATH, or /usr/local/cuda's; or None."""
    home = os.environ.get("CUDA_HOME", "")
    places = (os.environ.get("NVCC", ""), f"{home}/bin/nvcc" if home else "", "nvcc")
    for place in (*places, "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(place) if place else None
        if found:
            return Path(found)
    return None


def architectures(compiler: Path) -> tuple[str, ...]:
    """What device code is made for: sm_80, sm_90 and the newest that this nvcc knows."""
    done = subprocess.run(
        [compiler, "--list-gpu-code"], capture_output=True, text=True, check=False
    )
    known = [int(number) for number in re.findall(r"^sm_(\d+)$", done.stdout, re.MULTILINE)]
    wanted = sorted({*(a for a in _ARCHITECTURES if a in known), *([max(known)] if known else [])})
    return tuple(f"sm_{number}" for number in wanted)


def _machine() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def build(folder: Path, kind: Kind = Kind.CPU) -> Built:
    """Build a library into `folder`, with a record of what was built beside it.

    An up-to-date library, there or in BUILT, is kept or copied. A failure is no exception:
    the record says what is missing, and an older library is taken away.

    Args:
        folder: Where to put it; made where it does not exist.
        kind: Which one. That with kernels for a GPU needs nvcc.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    library, record = folder / kind.library, folder / kind.record
    sets = _INSTRUCTION_SETS.get(_machine(), {"baseline": ()})
    command = compiler()
    if command is None:
        reason = "no C++ compiler was found (c++, g++ or clang++, or what CXX names)"
        return _leave(record, library, (reason,))
    if _WINDOWS and kind is not Kind.CPU:
        return _leave(record, library, ("the kernels for GPUs are built on Linux only",))
    if _WINDOWS and not _is_clang(command):
        # GCC keeps a stack aligned to 16 bytes there, and spills wider vectors as if to 64.
        sets = {"baseline": ()}
    if kind is Kind.CUDA and nvcc() is None:
        reason = "no nvcc was found (on the PATH, below CUDA_HOME, or what NVCC names)"
        return _leave(record, library, (reason,))
    flags = (*_flags(), "-O1" if kind is Kind.EMULATED else "-O3")
    if kind is Kind.EMULATED:
        sets = {"baseline": ()}  # its CPU kernels are not used
    digest = _digest(command, flags, sets, kind)
    for place in (folder, BUILT):
        kept = read_record(place / kind.record)
        if kept.get("digest") == digest and (place / kind.library).is_file():
            if place != folder:
                shutil.copy2(place / kind.library, library)
                shutil.copy2(place / kind.record, record)
            return Built(library, tuple(kept.get("missing", ())))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            missing = _compile(command, flags, sets, Path(scratch), kind=kind)
        except BuildError as error:
            return _leave(record, library, (str(error),))
        # Replaced as a whole: a process that has the old one mapped keeps it.
        fresh = folder / f".{kind.library}.{os.getpid()}"
        shutil.copy2(Path(scratch) / kind.library, fresh)
        fresh.replace(library)
    record.write_text(json.dumps({"digest": digest, "missing": missing}, indent=2), "utf-8")
    return Built(library, tuple(missing))


def build_program(
    source: Path, target: Path, *, only: Sequence[str] = (), kind: Kind = Kind.CPU
) -> None:
    """Build a program of a library's sources and one more, sanitized, with warnings as errors.

    For the fuzz test: its allocations end where the tensors end.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler")
    sets = _INSTRUCTION_SETS.get(_machine(), {"baseline": ()})
    sets = {name: flags for name, flags in sets.items() if not only or name in only}
    with tempfile.TemporaryDirectory() as scratch:
        flags = (*_flags(), *SANITIZE, "-Werror", f"-I{SOURCES}")
        missing = _compile(command, flags, sets, Path(scratch), program=source, kind=kind)
        shutil.copy2(Path(scratch) / _PROGRAM, target)
    if missing:
        raise BuildError("; ".join(missing))


class BuildError(Exception):
    """The compiler or the linker failed; the text is what it said first."""


def _compile(
    command: Sequence[str],
    flags: Sequence[str],
    sets: dict[str, tuple[str, ...]],
    scratch: Path,
    *,
    kind: Kind = Kind.CPU,
    program: Path | None = None,
) -> list[str]:
    """Compile and link in `scratch`; the instruction sets that this compiler does not know.

    With `program`, a sanitized executable that has this source in place of onnxruntime's entry.
    """
    sources = [SOURCES / name for name in _COMMON]
    defined: list[str] = []
    cuda = nvcc() if kind is Kind.CUDA else None
    if kind is Kind.EMULATED:
        sources += [SOURCES / "emulation.cc", SOURCES / "cuda.cu"]
        defined = ["-DONNXNORM_EMULATED"]
    elif cuda is not None:
        sources += [SOURCES / "cuda.cu"]
        names = ", ".join(f'"{name}"' for name in architectures(cuda))
        defined = [f"-DONNXNORM_CUDA={names}"]
    if program is not None:
        sources = [*(s for s in sources if s.name not in ("operators.cc", "library.cc")), program]

    def kernels(name: str) -> str | None:
        target = scratch / f"kernels_{name}.o"
        extra = [*sets[name], f"-DONNXNORM_ISA={name}"]
        return _run(
            [*command, *flags, *extra, "-c", str(SOURCES / "kernels.cc"), "-o", str(target)]
        )

    def common(source: Path, have: Sequence[str]) -> str | None:
        target = scratch / f"{source.stem}.o"
        if source.suffix == ".cu" and cuda is not None:
            return compile_device(cuda, target)
        extra = [*defined, *(f"-DONNXNORM_HAVE_{name}" for name in have)]
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        return _run([*command, *flags, *extra, *language, "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        failures = dict(zip(sets, pool.map(kernels, sets), strict=True))
        have = [name for name, failure in failures.items() if failure is None]
        if not have:
            raise BuildError(f"the compiler failed: {next(iter(failures.values()))}")
        for failure in pool.map(lambda source: common(source, have), sources):
            if failure is not None:
                raise BuildError(f"the compiler failed: {failure}")
    objects = [str(scratch / f"kernels_{name}.o") for name in have]
    objects += [str(scratch / f"{source.stem}.o") for source in sources]
    linker, link = [*command], ["-shared", "-o", str(scratch / kind.library)]
    if program is not None:
        link = ["-o", str(scratch / _PROGRAM), *SANITIZE, "-pthread"]
    elif _WINDOWS:
        # MinGW's runtime inside; what is exported says so itself. Clang links Microsoft's.
        link += [] if _is_clang(command) else ["-static"]
    elif sys.platform.startswith("linux"):
        # The C++ runtime inside: onnxruntime may bring another version into the same process.
        link += ["-Wl,-z,defs", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    if cuda is not None:
        # CUDA's runtime inside too. It opens the driver when it is first called, so the library
        # loads where there is none.
        linker = [str(cuda), "-ccbin", command[0], "-cudart=static"]
        link = [flag if flag in ("-shared", "-o") else _through_nvcc(flag) for flag in link]
    failure = _run([*linker, *objects, *link])
    if failure is not None:
        raise BuildError(f"the linker failed: {failure}")
    return [f"{name}: {failure}" for name, failure in failures.items() if failure is not None]


def _through_nvcc(flag: str) -> str:
    return f"-Xcompiler={flag.replace(',', chr(92) + ',')}" if flag.startswith("-") else flag


def compile_device(cuda: Path, target: Path) -> str | None:
    """Compile the kernels for a GPU into an object file; None, or what the compiler said."""
    code = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in architectures(cuda)]
    code.append(f"-gencode=arch=compute_{_VIRTUAL},code=compute_{_VIRTUAL}")
    host = compiler()
    ccbin = ["-ccbin", host[0]] if host else []
    return _run(
        [str(cuda), *ccbin, *_CUDA_FLAGS, *code, "-c", str(SOURCES / "cuda.cu"), "-o", str(target)]
    )


def _run(command: Sequence[str]) -> str | None:
    """None when it went well, else the first line that says error, or the last line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line]
    return (wrong or lines[-1:] or [f"exit status {done.returncode}"])[0]


def _digest(
    command: Sequence[str], flags: Sequence[str], sets: dict[str, tuple[str, ...]], kind: Kind
) -> str:
    def version(of: Sequence[str | Path]) -> str:
        return subprocess.run(
            [*of, "--version"], capture_output=True, text=True, check=False
        ).stdout

    facts: list[Any] = [list(command), version(command), flags, sets, kind.library]
    cuda = nvcc() if kind is Kind.CUDA else None
    if cuda is not None:
        facts += [version([cuda]), architectures(cuda), _CUDA_FLAGS, _VIRTUAL]
    found = hashlib.sha256(repr(facts).encode())
    for source in sorted(SOURCES.iterdir()):
        found.update(source.name.encode() + b"\0" + source.read_bytes())
    return found.hexdigest()


def device_digest() -> str:
    """A digest of the source of the kernels for GPUs, to know what a run of them is worth."""
    found = hashlib.sha256()
    for name in ("device.h", "device_kernels.h", "cuda.cu"):
        found.update((SOURCES / name).read_bytes())
    return found.hexdigest()


def read_record(record: Path = BUILT / RECORD) -> dict[str, Any]:
    """What the last build recorded; empty where there was none."""
    try:
        found = json.loads(record.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _leave(record: Path, library: Path, missing: tuple[str, ...]) -> Built:
    library.unlink(missing_ok=True)
    record.write_text(json.dumps({"missing": missing}, indent=2), "utf-8")
    return Built(None, missing)


NOT_BUILT: Final = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Build for this package and say what came of it.

    Exit status: 0 it was built; 1 it was not; with --cuda, 3 where there is no nvcc.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given not in ([], ["--cuda"]):
        sys.stderr.write("usage: python -m onnxnorm.ops.build [--cuda]\n")
        return 2
    code = 0
    for kind in (Kind.CPU, Kind.CUDA) if given else (Kind.CPU,):
        built = build(BUILT, kind)
        sys.stdout.write("".join(f"missing: {line}\n" for line in built.missing))
        sys.stdout.write(f"{built.library or f'{kind.library} was not built'}\n")
        if built.library is None:
            lacks = kind is Kind.CUDA and nvcc() is None
            code = max(code, NOT_BUILT if lacks else 1)
    return code


if __name__ == "__main__":
    sys.exit(main())
