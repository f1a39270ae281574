"""Weights that slow a processor down are told of, and stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import onnxnorm
from onnxnorm import denormals, storage
from onnxnorm.denormals import count_denormals, told_of_denormals

SMALLEST = np.finfo(np.float32).tiny  # of the normal numbers


def model(weights: NDArray[Any]) -> onnx.ModelProto:
    """A model that multiplies by these weights."""
    sizes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", None]) for n in "xy"]
    sizes[0].type.tensor_type.shape.dim[1].dim_value = len(weights)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes, "main", sizes[:1], sizes[1:], [numpy_helper.from_array(weights, "w")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_is_denormal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denormals, "_BLOCK", 3)
    below = np.nextafter(SMALLEST, np.float32(0))
    given = [0, -0.0, SMALLEST, -SMALLEST, below, -below, 1e-45, 1, np.inf, np.nan]
    weights = np.array(given, np.float32)
    assert count_denormals(storage.from_proto(model(weights.reshape(2, 5)))) == (3, 10)


def test_other_types_do_not_count() -> None:
    """float16 is widened where a processor computes with it, and then is no longer denormal."""
    weights = np.full((4, 4), 6e-8, np.float16)
    assert count_denormals(storage.from_proto(model(weights))) == (0, 0)


@pytest.mark.parametrize(("count", "told"), [(0, False), (1, False), (2, True), (2000, True)])
def test_a_few_are_not_told_of(count: int, told: bool) -> None:
    weights = np.ones(2000, np.float32)
    weights[:count] = 1e-40
    notes = told_of_denormals(storage.from_proto(model(weights.reshape(40, 50))))
    assert [n.startswith(f"{count:,} of 2,000 weights are denormal") for n in notes] == [
        True
    ] * told


def test_reports_say_so_and_the_weights_stay(tmp_path: Path) -> None:
    weights = np.full((4, 4), 1e-40, np.float32)
    path = tmp_path / "m.onnx"
    onnx.save(model(weights), path)
    done = onnxnorm.optimize(path, tmp_path / "o.onnx", latency=False, provider="cpu")
    assert any("set_denormal_as_zero" in note for note in done.report.notes)
    assert (tmp_path / "o.onnx").read_bytes() == path.read_bytes()
    compared = onnxnorm.compare(path, path, latency=False, provider="cpu")
    assert any("set_denormal_as_zero" in note for note in compared.notes)
    assert not any("denormal" in note for note in onnxnorm.inspect(path).notes)  # reads no weights
