"""The examples in docstrings and in the README run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

import onnxnorm
import onnxnorm.passes

ROOT: Final = Path(__file__).parents[1]


def modules_of(package: ModuleType) -> list[str]:
    """The package and all that is in it, but `__main__`, which would run."""
    found = pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")
    names = [info.name for info in found if not info.name.endswith(".__main__")]
    return [package.__name__, *names]


# onnxnorm.passes lies elsewhere than onnxnorm in a checkout, and inside it once installed.
MODULES: Final = sorted({*modules_of(onnxnorm), *modules_of(onnxnorm.passes)})
SNIPPETS: Final = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
)


def test_the_walk_reaches_engine_and_passes() -> None:
    assert {"onnxnorm", "onnxnorm.storage", "onnxnorm.passes.fold_batchnorm"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    # Run one by one, so that the failure says what was expected and what came.
    for example in doctest.DocTestFinder().find(module):
        doctest.DebugRunner().run(example)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_readme_examples(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/demo.onnx").write_bytes((ROOT / "models/demo.onnx").read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "demo.optimized.onnx").stat().st_size > 0


def test_the_readme_has_an_example() -> None:
    assert SNIPPETS
