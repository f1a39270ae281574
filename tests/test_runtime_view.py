"""What onnxruntime makes of each norm, with and without the passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import jsonschema
import onnx
import pytest
from onnx import parser

import onnxnorm
from onnxnorm.report import load_schema
from onnxnorm.runtime_view import RuntimeGraph
from onnxnorm.session import optimized_graph

HEAD: Final = (
    '<ir_version: 8, opset_import: ["" : 17]> main (float[N,4,6,6] x) => (float[?,?,?,?] y)'
)
CONSTANTS: Final = """
<float two = {2}, float e = {0.05}, float[6] g = {1, 2, 0.5, 3, 1, 2}, float[6] b = {0,1,0,1,0,1},
 float[4,1,1] gc = {1, 2, 0.5, 3}, float[4,1,1] bc = {0.25, -0.5, 1, 0},
 float[4,4,1,1] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4] s = {1, 2, 3, 4},
 float[4] t = {0.5, 0.25, 1, 2}>
"""
CHAIN: Final = (
    "m = ReduceMean <axes = [{axis}]> (x) d = Sub (x, m) p = Pow (d, two)"
    " v = ReduceMean <axes = [{axis}]> (p) a = Add (v, e) r = Sqrt (a) q = Div (d, r)"
    " n = Mul (q, {g}) y = Add (n, {b})"
)


def rows(body: str, **given: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = parser.parse_model(f"{HEAD} {CONSTANTS} {{ {body} }}")
    report = onnxnorm.inspect(model, runtime=True, provider="cpu", **given).to_json()
    jsonschema.validate(report, load_schema())
    return report["norms"], report


def test_a_chain_that_onnxruntime_fuses_anyway_is_not_counted_as_ours() -> None:
    (norm,), report = rows(CHAIN.format(axis=-1, g="g", b="b"))
    assert norm["action"] == "lowered"
    fused = ["LayerNormalization"]
    assert norm["runtime"] == {"original": fused, "optimized": fused, "same": True}
    assert "For 1 of 1 norm that would be changed, onnxruntime" in " ".join(report["notes"])


def test_a_chain_over_channels_is_ours() -> None:
    (norm,), report = rows(CHAIN.format(axis=1, g="gc", b="bc"))
    runtime = norm["runtime"]
    assert runtime["original"][0] == "ReduceMean"
    assert runtime["original"][-1] == "Add"
    assert len(runtime["original"]) > 5
    assert "LayerNormalization" in runtime["optimized"]
    assert not runtime["same"]
    assert "makes none by itself" in " ".join(report["notes"])


def test_a_batch_norm_that_onnxruntime_folds_by_itself() -> None:
    body = "c = Conv (x, w) y = BatchNormalization (c, s, t, t, s)"
    (norm,), _ = rows(body)
    assert norm["action"] == "folded"
    assert norm["runtime"]["same"] is True
    assert norm["runtime"]["original"] == norm["runtime"]["optimized"]
    assert "BatchNormalization" not in norm["runtime"]["original"]


def test_without_passes_both_are_the_original() -> None:
    (norm,), report = rows(CHAIN.format(axis=1, g="gc", b="bc"), passes="none")
    assert norm["runtime"]["same"] is True
    assert "nothing would be changed" in " ".join(report["notes"])


def test_it_is_not_there_unless_it_is_asked_for() -> None:
    model = parser.parse_model(f"{HEAD} {CONSTANTS} {{ {CHAIN.format(axis=-1, g='g', b='b')} }}")
    report = onnxnorm.inspect(model)
    assert "runtime" not in report.norms[0]
    assert "in onnxruntime" not in report.to_markdown()


def test_the_table_has_a_column_for_it() -> None:
    _, report = rows(CHAIN.format(axis=1, g="gc", b="bc"))
    text = onnxnorm.Report.from_json(report).to_markdown()
    assert "in onnxruntime" in text
    assert "nodes (ReduceMean to Add)" in text


@pytest.fixture
def graph(tmp_path: Path) -> RuntimeGraph:
    text = f"{HEAD} {CONSTANTS} {{ {CHAIN.format(axis=1, g='gc', b='bc')} }}"
    onnx.save(parser.parse_model(text), tmp_path / "m.onnx")
    return RuntimeGraph(optimized_graph(tmp_path / "m.onnx"))


def test_a_value_that_is_gone_is_said_to_be(graph: RuntimeGraph) -> None:
    assert graph.operators("x", "nothing") is None


def test_a_source_that_is_gone_leaves_the_last_operator(graph: RuntimeGraph) -> None:
    assert graph.operators("nothing", "y") == ["Add"]
    assert len(graph.operators("x", "y") or []) > 5
