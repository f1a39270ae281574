"""Streams of d - 1 features: the outputs stay, with the corrections of epsilon and scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxnorm.passes import stream_compress
from onnxnorm.passes.fold_norm_affine import FoldNormAffine
from onnxnorm.passes.stream_compress import StreamCompress, complement
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.pipeline import Run
from onnxnorm.testing import assert_parity, assert_sound, run
from tests.networks import Net, transformer

FIRST = (StreamFoldMean(), FoldNormAffine())


def compressed(model: onnx.ModelProto, rule: StreamCompress | None = None) -> Run:
    rules = (*FIRST, rule or StreamCompress())
    done = run(model, *rules)
    assert_sound(model, done, *rules)
    assert_parity(model, done.stored.complete())
    return done


def sites(done: Run) -> int:
    return sum(r.rule == "stream-compress" for r in done.applied)


def reasons(done: Run) -> list[str]:
    return [r.reason for r in done.remarks if r.rule == "stream-compress" and r.reason]


@pytest.mark.parametrize(
    "options",
    [{}, {"opset": 23}, {"stem": "embedding"}, {"parallel": True}, {"layer_scale": True}],
    ids=str,
)
def test_the_stream_loses_one_feature_and_the_outputs_stay(options: Any) -> None:
    done = compressed(transformer(**options))
    assert sites(done) == 1
    shapes = [tuple(t.dims) for t in done.stored.complete().graph.initializer]
    assert any(15 in s for s in shapes)
    assert all(s in ((16, 16),) or 16 not in s for s in shapes if len(s) > 1 and 15 not in s)


def test_a_target_shape_that_names_the_width_is_changed() -> None:
    net = Net()
    image = net.input("image", ["n", 3, 8, 8])
    y = net.op("Conv", image, net.matrix(16, 3, 4, 4), net.vector(16, 0.3), strides=[4, 4])
    x = net.op("Transpose", net.op("Reshape", y, net.ints(0, 16, -1)), perm=[0, 2, 1])
    x = net.op("Add", x, net.mlp(net.norm(x, 16), 16))
    done = compressed(net.model(net.linear(net.norm(x, 16), 16, 3)))
    assert sites(done) == 1
    targets = [
        numpy_helper.to_array(t).tolist()
        for t in done.stored.complete().graph.initializer
        if t.data_type == onnx.TensorProto.INT64 and list(t.dims) == [3]
    ]
    assert [0, 15, -1] in targets


def test_a_bad_width_is_refused_and_the_right_one_told() -> None:
    done = run(transformer(size=16), *FIRST, StreamCompress(multiple=8))
    assert not sites(done)
    assert "not a multiple of 8; a model of width 17 would have one" in reasons(done)[0]


def test_a_stream_with_a_mean_is_refused() -> None:
    net = Net(opset=23)
    x = net.linear(net.input("x", ["n", 5]), 5, 8)
    normed = net.op("RMSNormalization", x, net.keep(np.ones(8)), axis=-1)
    done = run(net.model(net.linear(normed, 8, 3)), StreamCompress())
    assert "has a mean" in reasons(done)[0]


def test_a_stream_is_compressed_once() -> None:
    done = compressed(transformer())
    again = run(done.stored.complete(), *FIRST, StreamCompress())
    assert not again.applied


def test_the_basis_spans_what_has_no_mean() -> None:
    for size in (2, 3, 16):
        v = complement(size)
        assert v.shape == (size, size - 1)
        assert np.allclose(v.T @ v, np.eye(size - 1))
        assert np.allclose(v @ v.T, np.eye(size) - 1.0 / size)


@pytest.mark.parametrize("lost", ["epsilon", "scale"])
def test_without_a_correction_the_outputs_differ(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stream_compress._parameters

    def mutant(norm: Any, change: Any, rw: Any) -> Any:
        for (node, index), value in original(norm, change, rw):
            if lost == "scale" and node.op == "Mul":
                value = rw.constant("wrong", np.full(15, norm.gamma.flat[0], np.float32), at=node)
            if lost == "epsilon" and node.op == "Add":
                value = rw.constant("wrong", np.asarray(norm.epsilon, np.float32), at=node)
            yield (node, index), value

    model = transformer(layers=1)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.5
    monkeypatch.setattr(stream_compress, "_parameters", mutant)
    done = run(model, *FIRST, StreamCompress())
    assert sites(done) == 1
    with pytest.raises(AssertionError):
        assert_parity(model, done.stored.complete())
