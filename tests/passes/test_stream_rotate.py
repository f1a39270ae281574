"""Rotations of RMS streams: the outputs stay, and what cannot be rotated is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxnorm.errors import UsageError
from onnxnorm.passes.fold_norm_affine import FoldNormAffine
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.passes.stream_rotate import StreamRotate, orthogonal
from onnxnorm.pipeline import Run
from onnxnorm.testing import assert_parity, assert_sound, run
from tests.networks import Net, einsum_attention, transformer

ALL = (StreamFoldMean(), FoldNormAffine(), StreamRotate())


def rotated(model: onnx.ModelProto, *rules: Any) -> Run:
    rules = rules or ALL
    done = run(model, *rules)
    assert_sound(model, done, *rules)
    assert_parity(model, done.stored.complete())
    return done


def sites(done: Run) -> int:
    return sum(r.rule == "stream-rotate" for r in done.applied)


def reasons(done: Run) -> list[str]:
    return [r.reason for r in done.remarks if r.rule == "stream-rotate" and r.reason]


def llama(**options: Any) -> onnx.ModelProto:
    """A small model whose norms are RMS norms."""
    net = Net(opset=23)
    ids = net.input("ids", ["n", 6], onnx.TensorProto.INT64)
    x = net.op("Gather", net.keep(net.random.normal(size=(9, 12)) + 0.4, name="table"), ids)
    for _ in range(2):
        normed = net.op("RMSNormalization", x, net.vector(12, 1.0), axis=-1)
        x = net.op("Add", x, net.attention(normed, 12))
        normed = net.op("RMSNormalization", x, net.vector(12, 1.0), axis=-1)
        x = net.op("Add", x, net.mlp(normed, 12))
    outputs = [net.op("Identity", x)] if options.get("hidden") else []
    last = net.op("RMSNormalization", x, net.vector(12, 1.0), axis=-1)
    return net.model(net.linear(last, 12, 5, bias=False), *outputs)


@pytest.mark.parametrize("matrix", ["hadamard", "identity"])
def test_an_rms_stream_is_rotated(matrix: str) -> None:
    done = rotated(llama(), FoldNormAffine(), StreamRotate(matrix=matrix))
    assert sites(done) == 1
    (table,) = (t for t in done.stored.complete().graph.initializer if "table" in t.name)
    before = next(t for t in llama().graph.initializer if t.name == "table")
    same = np.allclose(numpy_helper.to_array(table), numpy_helper.to_array(before))
    assert same == (matrix == "identity")


@pytest.mark.parametrize("options", [{}, {"stem": "patches"}, {"parallel": True}, {"opset": 23}])
def test_layer_norm_streams_after_their_means_are_folded(options: Any) -> None:
    assert sites(rotated(transformer(**options))) == 1


def test_every_pass_says_what_has_to_come_first() -> None:
    assert "fold-norm-affine has to come first" in reasons(rotated(llama(), StreamRotate()))[0]
    net = Net(opset=23)
    x = net.linear(net.input("x", ["n", 5]), 5, 8)
    one = net.op("RMSNormalization", x, net.keep(np.ones(8)), axis=-1)
    both = net.op("Add", net.linear(one, 8, 3), net.linear(net.norm(x, 8), 8, 3))
    assert "stream-fold-mean has to come first" in reasons(run(net.model(both), StreamRotate()))[0]


def test_hidden_states_that_are_returned_are_named() -> None:
    done = run(llama(hidden=True), FoldNormAffine(), StreamRotate())
    assert not sites(done)
    assert "is a graph output" in reasons(done)[0]


@pytest.mark.parametrize("form", ["flax", "swapped", "ellipsis"])
def test_einsums_that_read_and_write_are_rotated(form: str) -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    for _ in range(2):
        x = net.op("Add", x, einsum_attention(net, net.norm(x, 8), 8, form))
    # One product that reads a norm and writes the stream.
    bare = net.norm(x, 8, bias=False)
    x = net.op("Add", x, net.op("Einsum", bare, net.matrix(8, 8), equation="bsd,de->bse"))
    model = net.model(net.linear(net.norm(x, 8), 8, 3))
    done = rotated(model)
    assert sites(done) == 1
    changed = {t.name for t in done.stored.complete().graph.initializer if "rotated" in t.name}
    assert len(changed) == 2 + 2 * 5 + 1 + 1  # weight and bias of the stem; q k v o and o's bias


def test_a_stream_is_rotated_once() -> None:
    done = run(llama(), FoldNormAffine(), StreamRotate())
    again = run(done.stored.complete(), FoldNormAffine(), StreamRotate())
    assert not again.applied
    assert "it is rotated already" in reasons(again)


def test_a_matrix_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    np.save(path, orthogonal("hadamard", 12, 7))
    assert sites(rotated(llama(), FoldNormAffine(), StreamRotate(matrix=str(path)))) == 1
    np.save(path, np.ones((12, 12)))
    with pytest.raises(UsageError, match="is not orthogonal"):
        run(llama(), FoldNormAffine(), StreamRotate(matrix=str(path)))
    with pytest.raises(UsageError, match="cannot be read"):
        run(llama(), FoldNormAffine(), StreamRotate(matrix=str(tmp_path / "none.npy")))


@pytest.mark.parametrize("size", [1, 3, 8, 12, 96])
def test_matrices_are_orthogonal_and_repeatable(size: int) -> None:
    p = orthogonal("hadamard", size, 3)
    assert np.allclose(p @ p.T, np.eye(size))
    assert np.array_equal(p, orthogonal("hadamard", size, 3))
    if size > 3:
        assert not np.allclose(p, orthogonal("hadamard", size, 4))


def test_a_transposed_rotation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant P for its transpose must fail parity."""
    from onnxnorm.port import Inlet

    original = Inlet.mixed
    monkeypatch.setattr(Inlet, "mixed", lambda self, at, matrix: original(self, at, matrix.T))
    done = run(llama(), FoldNormAffine(), StreamRotate())
    assert sites(done) == 1
    with pytest.raises(AssertionError):
        assert_parity(llama(), done.stored.complete())
