"""Streams of d - 1 features: the outputs stay, with the corrections of epsilon and scale."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxnorm.passes import stream_compress
from onnxnorm.passes.fold_norm_affine import FoldNormAffine
from onnxnorm.passes.stream_compress import StreamCompress, complement
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.passes.stream_rotate import StreamRotate
from onnxnorm.pipeline import Run
from onnxnorm.rewrite import Pass
from onnxnorm.testing import assert_parity, assert_sound, run
from tests.networks import Net, einsum_attention, transformer

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


@pytest.mark.parametrize("form", ["flax", "swapped", "ellipsis"])
def test_einsums_take_the_narrower_stream(form: str) -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    x = net.op("Add", x, einsum_attention(net, net.norm(x, 8), 8, form))
    bare = net.norm(x, 8, bias=False)
    x = net.op("Add", x, net.op("Einsum", bare, net.matrix(8, 8), equation="bsd,de->bse"))
    done = compressed(net.model(net.linear(net.norm(x, 8), 8, 3)))
    assert sites(done) == 1
    shapes = [tuple(t.dims) for t in done.stored.complete().graph.initializer]
    assert {(7, 2, 4), (2, 4, 7), (7, 7)} <= set(shapes)


Token: TypeAlias = Literal["plain", "named", "where", "measured"]


def vision(token: Token, *, flat: bool, head: bool, opset: int, layers: int = 1) -> Net:
    """A vision transformer without its end; shapes are computed as exporters compute them.

    Args:
        token: How the target of the class token's Expand is made: [batch, 1, 1]; [batch, 1, d]; by
            a Where that takes ones for what is -1; or of the shape of the stream.
        flat: Whether the patches are flattened with a target made of their own shape.
        head: Whether attention splits heads with a target made of the norm's shape.
        opset: The opset.
        layers: Number of blocks.
    """
    net, d = Net(opset), 16
    image = net.input("image", ["batch", 3, 8, 8])
    y = net.op("Conv", image, net.matrix(d, 3, 4, 4), net.vector(d, 0.3), strides=[4, 4])
    target = net.ints(0, d, -1)
    if flat:
        kept = net.op("Slice", net.op("Shape", y), net.ints(0), net.ints(2), net.ints(0))
        target = net.op("Concat", kept, net.ints(-1), axis=0)
    x = net.op("Transpose", net.op("Reshape", y, target), perm=[0, 2, 1])
    batch = net.op("Gather", net.op("Shape", x if token == "measured" else image), net.ints(0))
    if token == "plain":
        target = net.op("Concat", batch, net.ints(1, 1), axis=0)
    elif token == "named":
        target = net.op("Concat", batch, net.ints(1, d), axis=0)
    elif token == "measured":
        width = net.op("Gather", net.op("Shape", x), net.ints(2))
        target = net.op("Concat", batch, net.ints(1), width, axis=0)
    else:
        asked = net.op("Concat", batch, net.ints(-1, -1), axis=0)
        filled = net.op("Equal", asked, net.ints(-1, -1, -1))
        target = net.op("Where", filled, net.ints(1, 1, 1), asked)
    first = net.op("Expand", net.keep(net.random.normal(size=(1, 1, d)) + 0.3), target)
    x = net.op("Concat", first, x, axis=1)
    x = net.op("Add", x, net.keep(net.random.normal(size=(1, 5, d)) + 0.2))
    for _ in range(layers):
        normed = net.norm(x, d)
        if head:
            value = net.linear(normed, d, d)
            size = net.op("Gather", net.op("Shape", normed), net.ints(2))
            each = net.op("Div", size, net.ints(4))
            split = net.op("Concat", net.ints(0, 0, 4), each, axis=0)
            heads = net.op("Softmax", net.op("Reshape", value, split), axis=-1)
            merged = net.op("Reshape", heads, net.op("Concat", net.ints(0, 0), size, axis=0))
            x = net.op("Add", x, net.linear(merged, d, d))
        else:
            x = net.op("Add", x, net.mlp(normed, d))
    net.op("Identity", net.linear(net.norm(x, d), d, 3), name="y")
    return net


@settings(max_examples=16, deadline=None)
@given(
    st.sampled_from(["plain", "named", "where", "measured"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([17, 23]),
)
def test_computed_shapes_keep_their_meaning(
    token: Token, flat: bool, head: bool, opset: int
) -> None:
    done = compressed(vision(token, flat=flat, head=head, opset=opset).model("y"))
    assert sites(done) == 1
    sizes = [tuple(t.dims) for t in done.stored.complete().graph.initializer]
    assert (1, 1, 15) in sizes, "the class token is stored with one feature less"


def test_where_a_shape_is_computed_the_width_is_taken_off_there() -> None:
    model = vision("named", flat=True, head=False, opset=17).model("y")
    done = compressed(model).stored.complete()
    made = {o: n for n in done.graph.node for o in n.output}
    consts = {t.name: numpy_helper.to_array(t).tolist() for t in done.graph.initializer}
    (expand,) = (n for n in done.graph.node if n.op_type == "Expand")
    target = made[expand.input[1]]
    assert (target.op_type, consts[target.input[1]]) == ("Sub", [0, 0, 1])
    (reshape,) = (n for n in done.graph.node if n.op_type == "Reshape")
    target = made[reshape.input[1]]
    assert (target.op_type, consts[target.input[1]]) == ("Sub", [0, 1, 0])
    (measured,) = (
        n for n in done.graph.node if n.op_type == "Add" and made.get(n.input[0]) is not None
        and made[n.input[0]].op_type == "Shape"
    )  # fmt: skip
    assert consts[measured.input[1]] == [0, 1, 0, 0], "Shape still says 16 channels"


def test_what_counts_elements_or_computes_the_width_is_refused() -> None:
    net = vision("plain", flat=False, head=False, opset=17)
    normed = next(n.output[0] for n in net.nodes if n.op_type == "LayerNormalization")
    count = net.op("Cast", net.op("Size", normed), to=onnx.TensorProto.FLOAT)
    done = run(net.model(net.op("Div", "y", count)), *FIRST, StreamCompress())
    assert not sites(done)
    assert any("computes with the width of" in r for r in reasons(done))
    net = Net()
    image = net.input("image", ["n", 16, 8, 8])
    y = net.op("Conv", image, net.matrix(16, 16, 1, 1), net.vector(16, 0.3))
    width = net.input("width", [1], onnx.TensorProto.INT64)
    target = net.op("Concat", net.ints(0), width, net.ints(64), axis=0)
    x = net.op("Transpose", net.op("Reshape", y, target), perm=[0, 2, 1])
    x = net.op("Add", x, net.keep(net.random.normal(size=(1, 64, 16))))
    done = run(net.model(net.linear(net.norm(x, 16), 16, 3)), *FIRST, StreamCompress())
    assert not sites(done)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rule", [StreamCompress(), StreamRotate()], ids=lambda r: r.name)
def test_a_layer_that_reads_a_norm_and_writes_its_stream_changes_on_both_sides(
    rule: Pass, transposed: bool
) -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 6]), 6, 8)
    normed = net.norm(x, 8)
    if transposed:
        y = net.op("Gemm", normed, net.matrix(8, 8), net.vector(8), transB=1, alpha=0.5)
    else:
        y = net.linear(normed, 8, 8)
    x = net.op("Add", x, y)
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    model = net.model(net.linear(net.norm(x, 8), 8, 3))
    done = run(model, *FIRST, rule)
    assert sum(r.rule == rule.name for r in done.applied) == 1
    assert_parity(model, done.stored.complete())


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
    assert not reasons(done), "what it has just done it does not look at again"
    again = run(done.stored.complete(), *FIRST, StreamCompress())
    assert not again.applied
    assert reasons(again) == ["it is compressed already"]


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
