"""Check our declaration of onnxruntime's C interface against the official header, where it is.

    python tools/check_abi.py [--include DIR] [--fetch]

Looks for onnxruntime_c_api.h in the folder given, in $ONNXRUNTIME_INCLUDE, and where Debian's
package libonnxruntime-dev installs it. With --fetch, where apt is, that package is taken from
Debian 13 on the mirror that apt uses already, and unpacked into a temporary folder.
tools/check_abi.cc asserts every offset and every signature at compile time.

Exit status: 0 it agrees, 1 it does not, 3 there is no header or no compiler: nothing was checked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
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


def fetch(folder: Path) -> Path | None:
    """The header out of Debian's package, below `folder`; None where apt cannot get it."""
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not all(map(shutil.which, ("apt-get", "dpkg"))) or not keys.is_file():
        return None
    targets = ["apt-get", "indextargets", "--format", "$(SITE)"]
    sites = subprocess.run(targets, capture_output=True, text=True, check=False).stdout.split()
    mirror = next((site for site in sites if site.rstrip("/").endswith("/debian")), None)
    if mirror is None:
        return None
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    source = folder / "sources.list"
    source.write_text(f"deb [signed-by={keys}] {mirror} trixie main\n", "utf-8")
    settings = {
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Acquire::Retries": 0,
        "Acquire::http::Timeout": 20,
        "APT::Sandbox::User": "root",  # the folder is ours alone
    }
    apt = ["apt-get", *(f"-o{key}={value}" for key, value in settings.items())]
    for command in ([*apt, "update"], [*apt, "download", "libonnxruntime-dev"]):
        if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
            return None
    for package in folder.glob("libonnxruntime-dev_*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    return next((path.parent for path in (folder / "unpacked").rglob(HEADER)), None)


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
    parser.add_argument("--fetch", action="store_true", help="get the header with apt")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        include = find(given.include)
        if include is None and given.fetch:
            include = fetch(Path(folder))
        if include is None:
            tried = ", and apt could not fetch it" if given.fetch else ""
            sys.stdout.write(f"ABI not checked: there is no {HEADER}{tried}\n")
            return NOT_CHECKED
        return report(include)


def report(include: Path) -> int:
    """Check against the header in `include`; the exit status."""
    try:
        difference = check(include)
    except FileNotFoundError as error:
        sys.stdout.write(f"ABI not checked: {error}\n")
        return NOT_CHECKED
    found = re.search(r"#define ORT_API_VERSION (\d+)", (include / HEADER).read_text("utf-8"))
    version = found.group(1) if found else "?"
    asserted = (HERE / "check_abi.cc").read_text("utf-8")
    entries = len(re.findall(r"^(?:API|OP|BASE)\(", asserted, re.MULTILINE))
    if difference is not None:
        sys.stdout.write(f"{difference}\nort_abi.h differs from the header of version {version}\n")
        return 1
    sys.stdout.write(f"ort_abi.h agrees with the header of version {version}: {entries} entries\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
