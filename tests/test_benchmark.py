"""The benchmark's own arithmetic and bookkeeping; nothing here is measured against anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import onnx
import pytest

from models import RECIPES
from tools import benchmark, measured
from tools.benchmark import ORIGINAL, Cell

TIMED: Final[dict[str, Any]] = {
    "ratio": 0.8,
    "interval": [0.75, 0.85],
    "band": [0.98, 1.02],
    "verdict": "faster",
    "reason": "",
    "p50": 4.0,
}


def cell(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "seconds": 1.5,
        "peak_mb": 90.0,
        "nodes": 7,
        "runs": 5,
        "megabytes": 1.25,
        "agrees": True,
        "error_ratio": 0.5,
        "latency": {"1": TIMED, "2": {**TIMED, "ratio": 0.2, "verdict": "faster"}},
    }
    return vars(Cell(**{**fields, **changes}))


def results(**cells: dict[str, Any]) -> dict[str, Any]:
    first = cell(seconds=None, peak_mb=None, latency={"1": {"p50": 5.0}, "2": {"p50": 3.0}})
    return {
        "net": {
            "model": "net",
            "date": "2026-01-02",
            "versions": {"onnx": "1.0"},
            "cells": {ORIGINAL: first, **cells},
        }
    }


def test_a_process_is_measured_by_itself() -> None:
    block = "x = bytearray(200 << 20); x[::4096] = b'1' * len(x[::4096])"
    small, large = (
        benchmark.run_tool([sys.executable, "-I", "-S", "-c", code], "", 60.0)
        for code in ("pass", block)
    )
    assert small[2] is large[2] is None
    # This process, which has numpy and onnx loaded, is not counted to either.
    assert small[1] < 60.0
    assert 200.0 < large[1] - small[1] < 240.0


@pytest.mark.parametrize(
    ("code", "limit", "why"),
    [
        ("import sys; sys.exit(3)", 60.0, "the process ended with 3"),
        ("import os; os.abort()", 60.0, "the process ended with -6"),
        ("import time; time.sleep(60)", 0.2, "no end in 0.2 s"),
        ("""print('{"end": "m", "error": "boom"}')""", 60.0, "boom"),
        ("""print('{"end": "m", "error": null}')""", 60.0, None),
        ("import sys; sys.exit(sys.stdin.read() != 'given')", 60.0, None),
    ],
)
def test_how_a_tool_ends_is_a_result(code: str, limit: float, why: str | None) -> None:
    command = [sys.executable, "-I", "-S", "-c", code]
    assert benchmark.run_tool(command, "given", limit)[2] == why


def test_what_is_printed_comes_along() -> None:
    found = measured.run([sys.executable, "-I", "-S", "-c", "print('said')"], 60.0)
    assert (found["status"], found["stdout"]) == (0, "said\n")


def test_models_are_recipes_and_files_each_with_a_name_of_its_own(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "mine", tmp_path / "scratch"
    (folder / "deep").mkdir(parents=True)
    scratch.mkdir()
    for name in ("conv2d", "deep/net"):
        (folder / f"{name}.onnx").write_bytes(b"")
    found = benchmark.models_of([folder], ["conv2d", "net"], scratch)
    assert {"conv2d", "mine--conv2d", "deep--net"} <= set(found)
    assert found["mine--conv2d"] == folder / "conv2d.onnx"
    assert onnx.load(found["conv2d"]).graph.name == "conv2d"
    everything = benchmark.models_of([], [], scratch)
    assert set(everything) == {n for n, recipe in RECIPES.items() if recipe.rejected is None}


def test_what_is_there_is_kept_and_what_is_missing_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def made(model: Path, tools: list[str], *_: Any) -> dict[str, Any]:
        asked.append(list(tools))
        return {name: cell(nodes=len(asked)) for name in (ORIGINAL, *tools)}

    monkeypatch.setattr(benchmark, "benchmark", made)
    command = ["--models", "conv2d", "--out", str(tmp_path), "--tool"]
    assert benchmark.main([*command, "onnxnorm"]) == 0
    assert benchmark.main([*command, "onnxnorm"]) == 0
    assert benchmark.main([*command, "onnxnorm", "--tool", "onnxnorm --ops"]) == 0
    assert asked == [["onnxnorm"], ["onnxnorm --ops"]]
    cells = json.loads((tmp_path / "conv2d.json").read_text(encoding="utf-8"))["cells"]
    assert {name: each["nodes"] for name, each in cells.items()} == {
        ORIGINAL: 1,
        "onnxnorm": 1,
        "onnxnorm --ops": 2,
    }


def test_what_the_runtime_makes_of_a_model_is_counted(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> main (float[N,2] x) => (float[N,2] y)
    { a = Identity (x) b = Relu (a) c = Transpose <perm = [1, 0]> (b)
      y = Transpose <perm = [1, 0]> (c) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    benchmark.count_runs(tmp_path / "m.onnx", tmp_path / "m.runs")
    assert (tmp_path / "m.runs").read_text(encoding="utf-8") == "1"
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    benchmark.count_runs(tmp_path / "broken.onnx", tmp_path / "broken.runs")
    assert not (tmp_path / "broken.runs").exists()


def test_results_of_an_earlier_version_are_shown(tmp_path: Path) -> None:
    found = results(onnxnorm=cell())["net"]
    for each in found["cells"].values():
        del each["runs"]
    (tmp_path / "net.json").write_text(json.dumps(found), encoding="utf-8")
    page = tmp_path / "page.md"
    assert benchmark.main(["--out", str(tmp_path), "--table", str(page)]) == 0
    assert "| net | onnxnorm | 7 | - | 1.2 |" in page.read_text(encoding="utf-8")


def test_the_page_says_what_the_cells_say(tmp_path: Path) -> None:
    text = json.dumps(
        results(
            onnxnorm=cell(),
            onnxsim=cell(agrees=False, error_ratio=9.0),
            onnxslim=cell(error="boom", nodes=None, megabytes=None, agrees=None, latency={}),
        )["net"]
    )
    (tmp_path / "net.json").write_text(text, encoding="utf-8")
    page = tmp_path / "page.md"
    assert benchmark.main(["--out", str(tmp_path), "--table", str(page), "--note", "Noted."]) == 0
    lines = page.read_text(encoding="utf-8").splitlines()
    assert "Noted." in lines
    assert "| net | original | 7 | 5 | 1.2 | 5 ms | 3 ms |  |  |  |" in lines
    ours = (
        "| net | onnxnorm | 7 | 5 | 1.2 | 0.800 [0.750, 0.850] faster | 0.200 [0.750, 0.850] faster"
    )
    assert f"{ours} | 0.50 | 1.5 | 90 |" in lines
    assert any("| onnxsim |" in line and "| 9.00 differs |" in line for line in lines)
    assert any("no result: boom" in line for line in lines)
    assert "| onnxnorm | 1 | 0 | 0 | 1, 0 of 1 | 0.800 | 1, 0 of 1 | 0.200 | 1.5 | 90 |" in lines
    assert "| onnxslim | 1 | 1 | 0 | 0, 0 of 0 | - | 0, 0 of 0 | - | - | - |" in lines
    assert (tmp_path / "page.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_geometric_mean_is_over_models() -> None:
    both = {
        **results(onnxnorm=cell()),
        "other": results(onnxnorm=cell(latency={"1": {**TIMED, "ratio": 0.2}}))["net"],
    }
    row = next(row for row in benchmark.summary(both) if row[0] == "onnxnorm")
    assert row[4:6] == ["2, 0 of 2", "0.400"]  # sqrt(0.8 * 0.2)
