"""Compile the operator library: one command a source file, and kernels.cc once an instruction set.

    python -m onnxnorm.ops.build        builds it for the package as it stands

setup.py loads this file by its path and calls `build` too, before the package can be imported; so
nothing but the standard library is imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
SOURCES: Final = HERE / "csrc"
BUILT: Final = HERE / "built"  # no package: Python would take the library for a module of it
LIBRARY: Final = f"libonnxnorm_ops.{'dylib' if sys.platform == 'darwin' else 'so'}"
_PROGRAM: Final = "program"
RECORD: Final = "build.json"  # what was built, or why nothing was

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
            # GCC 12 warns of its own header: _mm512_undefined_ps is meant to be so.
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
        ),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "baseline": (),
    },
    "aarch64": {"neon": ()},
}
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


def _machine() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def build(folder: Path) -> Built:
    """Build the library into `folder`, with a record of what was built beside it.

    An up-to-date library, there or in BUILT, is kept or copied. A failure is no exception:
    the record says what is missing, and an older library is taken away.

    Args:
        folder: Where to put it; made where it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    library, record = folder / LIBRARY, folder / RECORD
    sets = _INSTRUCTION_SETS.get(_machine(), {"baseline": ()})
    command = compiler()
    if os.name == "nt" or command is None:
        reason = (
            "there is no build for Windows yet"
            if os.name == "nt"
            else "no C++ compiler was found (c++, g++ or clang++, or what CXX names)"
        )
        return _leave(record, library, (reason,))
    flags = (*_FLAGS, "-O3")
    digest = _digest(command, flags, sets)
    for place in (folder, BUILT):
        kept = read_record(place / RECORD)
        if kept.get("digest") == digest and (place / LIBRARY).is_file():
            if place != folder:
                shutil.copy2(place / LIBRARY, library)
                shutil.copy2(place / RECORD, record)
            return Built(library, tuple(kept.get("missing", ())))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            missing = _compile(command, flags, sets, Path(scratch))
        except BuildError as error:
            return _leave(record, library, (str(error),))
        # Replaced as a whole: a process that has the old one mapped keeps it.
        fresh = folder / f".{LIBRARY}.{os.getpid()}"
        shutil.copy2(Path(scratch) / LIBRARY, fresh)
        fresh.replace(library)
    record.write_text(json.dumps({"digest": digest, "missing": missing}, indent=2), "utf-8")
    return Built(library, tuple(missing))


def build_program(source: Path, target: Path, *, only: Sequence[str] = ()) -> None:
    """Build a program of the library's sources and one more, sanitized, with warnings as errors.

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
        flags = (*_FLAGS, *SANITIZE, "-Werror", f"-I{SOURCES}")
        missing = _compile(command, flags, sets, Path(scratch), program=source)
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
    program: Path | None = None,
) -> list[str]:
    """Compile and link in `scratch`; the instruction sets that this compiler does not know.

    With `program`, a sanitized executable that has this source in place of onnxruntime's entry.
    """
    sources = [SOURCES / name for name in _COMMON]
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
        extra = [f"-DONNXNORM_HAVE_{name}" for name in have]
        return _run([*command, *flags, *extra, "-c", str(source), "-o", str(target)])

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
    if program is not None:
        link = ["-o", str(scratch / _PROGRAM), *SANITIZE, "-pthread"]
    else:
        link = ["-shared", "-o", str(scratch / LIBRARY)]
        if sys.platform.startswith("linux"):
            # The C++ runtime inside: onnxruntime may bring another version into the same process.
            link += ["-Wl,-z,defs", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    failure = _run([*command, *objects, *link])
    if failure is not None:
        raise BuildError(f"the linker failed: {failure}")
    return [f"{name}: {failure}" for name, failure in failures.items() if failure is not None]


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


def _digest(command: Sequence[str], flags: Sequence[str], sets: dict[str, tuple[str, ...]]) -> str:
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=False
    ).stdout
    found = hashlib.sha256(repr((list(command), version, flags, sets, LIBRARY)).encode())
    for source in sorted(SOURCES.iterdir()):
        found.update(source.name.encode() + b"\0" + source.read_bytes())
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


def main() -> int:
    """Build for this package and say what came of it."""
    built = build(BUILT)
    sys.stdout.write("".join(f"missing: {line}\n" for line in built.missing))
    sys.stdout.write(f"{built.library or 'nothing was built'}\n")
    return 0 if built.library else 1


if __name__ == "__main__":
    sys.exit(main())
