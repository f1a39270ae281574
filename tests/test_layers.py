"""Who may import whom."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
ENGINE: Final = sorted((ROOT / "onnxnorm").rglob("*.py"))
PASSES: Final = sorted((ROOT / "passes").rglob("*.py"))

# The only modules of the engine that may import these.
GATEKEEPERS: Final = {
    "onnx_graphsurgeon": {"module", "matcher", "rewrite"},
    "onnxruntime": {"session"},
    "onnxnorm.passes": {"registry"},
    "click": {"cli"},
    "rich": {"cli", "report_terminal"},
    "jinja2": {"report_html"},
    "matplotlib": {"figures"},
}

# What a pass must not reach for: it is arithmetic on a graph, and neither runs nor prints anything.
NOT_FOR_PASSES: Final = (
    "click",
    "onnx_graphsurgeon",
    "onnxruntime",
    "rich",
    "onnxnorm.api",
    "onnxnorm.cli",
    "onnxnorm.feeds",
    "onnxnorm.latency",
    "onnxnorm.parity",
    "onnxnorm.pipeline",
    "onnxnorm.registry",
    "onnxnorm.report",
    "onnxnorm.session",
    "onnxnorm.truth",
)


def imports(source: str) -> Iterator[str]:
    """Every module that the source imports, at any depth, also by import_module and __import__."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what they import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and node.args:
                name = node.args[0]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield name.value


def reaches(module: str, forbidden: str) -> bool:
    return module == forbidden or module.startswith(f"{forbidden}.")


def faults_of_engine(name: str, source: str) -> list[str]:
    return [
        f"{name} imports {module}"
        for module in imports(source)
        for library, allowed in GATEKEEPERS.items()
        if reaches(module, library) and name not in allowed
    ]


def faults_of_pass(name: str, source: str) -> list[str]:
    return [
        f"{name} imports {module}"
        for module in imports(source)
        for forbidden in NOT_FOR_PASSES
        if reaches(module, forbidden)
    ]


def module_name(path: Path, folder: str) -> str:
    return ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: module_name(path, "onnxnorm"))
def test_engine_modules_keep_to_their_layer(path: Path) -> None:
    assert faults_of_engine(module_name(path, "onnxnorm"), path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", PASSES, ids=lambda path: module_name(path, "passes"))
def test_passes_only_rewrite(path: Path) -> None:
    assert faults_of_pass(module_name(path, "passes"), path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import onnxruntime",
        "import onnxruntime as ort",
        "import numpy, onnxruntime.capi",
        "from onnxruntime import InferenceSession",
        "def f():\n    from onnxruntime.capi import x",
        "from importlib import import_module\nimport_module('onnxruntime')",
        "import importlib\nimportlib.import_module('onnxruntime.capi')",
        "__import__('onnxruntime')",
        "from onnxnorm import passes",
        "import onnxnorm.passes.fold_batchnorm",
        "from onnxnorm.passes import PASSES",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    assert faults_of_engine("facts", source)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime_extensions", "onnxnorm.passes_of_time"])
def test_a_name_that_only_begins_alike_is_no_fault(module: str) -> None:
    assert faults_of_engine("facts", f"import {module}") == []


@pytest.mark.parametrize(
    "source", ["from onnxnorm import session", "from onnxnorm.parity import ParityChecker"]
)
def test_a_pass_that_runs_models_is_seen(source: str) -> None:
    assert faults_of_pass("fold_batchnorm", source)


def test_the_gatekeepers_exist() -> None:
    names = {module_name(path, "onnxnorm") for path in ENGINE}
    assert set().union(*GATEKEEPERS.values()) <= names
    own = {name.removeprefix("onnxnorm.") for name in NOT_FOR_PASSES if "." in name}
    assert own <= names


def rooms() -> dict[str, int]:
    """Of each module, how far down the table of rooms in docs/design.md it stands."""
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = re.search(r"\| room \| modules \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    assert table is not None
    found: dict[str, int] = {}
    for floor, row in enumerate(table[1].splitlines()):
        for name in re.findall(r"`(\w+)`", row):
            assert name not in found, f"{name} has two rooms"
            found[name] = floor
    return found


def faults_of_room(name: str, source: str, floors: dict[str, int]) -> list[str]:
    """What a module imports from a room below its own."""
    own = [each.split(".")[1] for each in imports(source) if each.startswith("onnxnorm.")]
    floor = floors[name.partition(".")[0]]
    return [f"{name} imports {each}" for each in own if floors.get(each, -1) > floor]


def test_every_module_has_a_room_and_knows_none_below() -> None:
    floors = rooms()
    names = {module_name(path, "onnxnorm"): path for path in ENGINE}
    assert {name.partition(".")[0] for name in names} == set(floors)
    for name, path in names.items():
        assert faults_of_room(name, path.read_text("utf-8"), floors) == []


@pytest.mark.parametrize(
    "source",
    ["from onnxnorm.parity import Budget", "def f():\n    from onnxnorm import latency, errors"],
)
def test_a_door_to_a_room_below_is_seen(source: str) -> None:
    assert faults_of_room("facts", source, rooms())
    assert not faults_of_room("cli", source, rooms())
