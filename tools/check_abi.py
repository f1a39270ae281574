"""Check our declaration of onnxruntime's C interface against the official header, where it is.

    python tools/check_abi.py [--include DIR]

Looks for onnxruntime_c_api.h in the folder given, in $ONNXRUNTIME_INCLUDE, and where
Debian's package libonnxruntime-dev installs it. tools/check_abi.cc asserts every offset and
every signature at compile time. Exit status: 0 it agrees, 1 it does not, 3 there is no header or no
compiler, and so nothing was checked.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from onnxnorm.ops import build

HERE: Final = Path(__file__).resolve().parent
HEADER: Final = "onnxruntime_c_api.h"
USUAL: Final = (
    "/usr/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
    "/usr/local/include/onnxruntime",
)
NOT_CHECKED: Final = 3


def find(given: str | None) -> Path | None:
    """The folder that holds the official header; None where there is none."""
    places = [given] if given else [os.environ.get("ONNXRUNTIME_INCLUDE", ""), *USUAL]
    return next((Path(p) for p in places if p and Path(p, HEADER).is_file()), None)


def check(include: Path, *, sources: Path = build.SOURCES) -> str | None:
    """None where our header in `sources` agrees with the official one, else what differs.

    Raises:
        FileNotFoundError: There is no C++ compiler.
    """
    command = build.compiler()
    if command is None:
        raise FileNotFoundError("no C++ compiler")
    flags = ["-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", f"-isystem{include}"]
    done = subprocess.run(
        [*command, *flags, f"-I{sources}", str(HERE / "check_abi.cc")],
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = [line for line in done.stderr.splitlines() if "error" in line]
    return None if done.returncode == 0 else "\n".join(wrong) or done.stderr


def main() -> int:
    """Check, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--include", help=f"the folder that holds {HEADER}")
    include = find(parser.parse_args().include)
    if include is None:
        sys.stdout.write(f"not checked: no {HEADER}; Debian's libonnxruntime-dev has it\n")
        return NOT_CHECKED
    try:
        difference = check(include)
    except FileNotFoundError as error:
        sys.stdout.write(f"not checked: {error}\n")
        return NOT_CHECKED
    text = (include / HEADER).read_text("utf-8")
    found = re.search(r"#define ORT_API_VERSION (\d+)", text)
    version = found.group(1) if found else "?"
    entries = len(re.findall(r"^(?:API|OP|BASE)\(", (HERE / "check_abi.cc").read_text(), re.M))
    if difference is not None:
        sys.stdout.write(f"{difference}\nort_abi.h differs from the header of version {version}\n")
        return 1
    sys.stdout.write(f"ort_abi.h agrees with the header of version {version}: {entries} entries\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
