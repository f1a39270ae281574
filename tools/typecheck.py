"""Check the types of the whole checkout with mypy --strict.

passes/ is imported as onnxnorm.passes, a mapping that mypy cannot follow. So it runs in
.typecheck/, a tree of links in which every module stands where it is imported from:

    .typecheck/onnxnorm/passes -> passes/      .typecheck/onnxnorm/* -> onnxnorm/*
    .typecheck/{models,tests,tools} -> the same

Arguments are passed on to mypy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
TREE: Final = ROOT / ".typecheck"
OTHERS: Final = ("models", "tests", "tools")


def link(tree: Path) -> None:
    """Make the tree anew, so that no module that is gone stays in it."""
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "onnxnorm"
    package.mkdir(parents=True)
    for entry in (ROOT / "onnxnorm").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "passes").symlink_to(ROOT / "passes")
    for name in OTHERS:
        (tree / name).symlink_to(ROOT / name)


def main() -> int:
    """Run mypy; its exit status."""
    link(TREE)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--exclude", "tools/typings/"]
    command += ["--namespace-packages", "--explicit-package-bases", *sys.argv[1:]]
    return subprocess.run([*command, "onnxnorm", *OTHERS], cwd=TREE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
