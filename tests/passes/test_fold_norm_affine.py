"""Affines of norms into their linear readers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxnorm.passes.fold_norm_affine import FoldNormAffine
from onnxnorm.passes.lower_norms import LowerNorms
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.pipeline import Run
from onnxnorm.testing import assert_parity, assert_rewrites, assert_sound, run
from tests.networks import Net, transformer

RULE = FoldNormAffine()
BEFORE = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,2] x) => (float[N,2] y)
<float[2] gamma = {2.0, 4.0}, float[2] beta = {0.5, 0.25}, float[2,2] v = {1.0, 0.0, 2.0, 4.0},
 float[2] c = {1.0, 2.0}>
{
   n = LayerNormalization <axis: int = -1, epsilon: float = 0.5> (x, gamma, beta)
   p = MatMul (n, v)
   y = Add (p, c)
}
"""
AFTER = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,2] x) => (float[N,2] y)
<float[2] y_bias = {2.0, 3.0}, float[2] n_scale = {1.0, 1.0},
 float[2,2] p_weight = {2.0, 0.0, 8.0, 16.0}>
{
   n = LayerNormalization <axis: int = -1, epsilon: float = 0.5> (x, n_scale)
   p = MatMul (n, p_weight)
   y = Add (p, y_bias)
}
"""


def folded(model: onnx.ModelProto | str, *rules: Any) -> Run:
    done = run(model, *(rules or (RULE,)))
    assert_sound(model, done, *(rules or (RULE,)))
    if done.applied:
        assert_parity(model, done.stored.complete())
    return done


def reasons(done: Run) -> list[str]:
    return [r.reason for r in done.remarks if r.outcome == "refused"]


@pytest.mark.parametrize(
    ("equation", "weight", "bias"),
    [
        ("bsd,dhe->bshe", (6, 2, 4), (2, 4)),
        ("dhe,bsd->bhse", (6, 2, 4), (2, 1, 4)),
        ("...d,ed->...e", (3, 6), (3,)),
        ("bsd,d->bs", (6,), ()),
        ("bsd,sde->bse", (5, 6, 3), (5, 3)),
    ],
)
@pytest.mark.parametrize("added", [True, False])
def test_gamma_and_beta_go_into_an_einsum(
    equation: str, weight: tuple[int, ...], bias: tuple[int, ...], added: bool
) -> None:
    net = Net()
    operands = [net.norm(net.input("x", ["n", 5, 6]), 6), net.matrix(*weight)]
    y = net.op("Einsum", *(operands[::-1] if equation[0] == "d" else operands), equation=equation)
    if added:
        y = net.op("Add", y, net.keep(net.random.normal(size=bias)))
    model = net.model(net.op("Relu", y))
    assert len(folded(model).applied) == 1
    never = FoldNormAffine(max_adds=0)
    if added:
        assert len(folded(model, never).applied) == 1
    else:
        # As behind a MatMul, beta has no place there.
        assert reasons(folded(model, never)) == [
            f"beta has no place: nothing that is added to '{y}' takes it"
        ]


def test_gamma_passes_an_einsum_that_does_not_sum_over_it() -> None:
    net = Net()
    normed = net.norm(net.input("x", ["n", 5, 6]), 6, bias=False)
    mixed = net.op("Einsum", net.matrix(5, 5), normed, equation="ts,bsd->btd")
    y = net.op("Einsum", mixed, net.matrix(6, 3), equation="btd,de->bte")
    assert len(folded(net.model(y)).applied) == 1


def test_gamma_does_not_pass_an_einsum_that_multiplies_by_what_is_computed() -> None:
    net = Net()
    normed = net.norm(net.input("x", ["n", 5, 6]), 6, bias=False)
    y = net.op("Einsum", normed, net.input("w", ["n", 6, 3]), equation="bsd,bde->bse")
    (reason,) = reasons(folded(net.model(y)))
    assert reason == f"Einsum '{y}' mixes channels that are scaled in different ways"


def test_gamma_goes_into_the_weight_and_beta_into_the_bias() -> None:
    done = assert_rewrites(BEFORE, AFTER, RULE)
    (remark,) = done.applied
    assert remark.region is not None
    assert (remark.region.inputs, remark.region.outputs) == (("x",), ("y",))


@pytest.mark.parametrize("opset", [17, 23])
def test_with_means_folded_first(opset: int) -> None:
    model = transformer(opset=opset)
    done = folded(model, StreamFoldMean(), RULE)
    assert sum(r.rule == "fold-norm-affine" for r in done.applied) == 5


def test_every_reader_has_to_be_linear() -> None:
    net = Net()
    normed = net.norm(net.input("x", ["n", 5, 8]), 8)
    done = folded(net.model(net.op("Add", net.op("Relu", normed), net.linear(normed, 8, 8))))
    assert not done.applied
    assert "Relu" in reasons(done)[0]


def test_beta_needs_a_bias() -> None:
    net = Net()
    normed = net.norm(net.input("x", ["n", 5, 8]), 8)
    model = net.model(net.linear(normed, 8, 4, bias=False))
    assert "beta has no place" in reasons(folded(model, FoldNormAffine(max_adds=0)))[0]


def test_the_head_of_a_language_model_gets_an_add() -> None:
    """Its result is an output of the graph, which keeps its name; two such layers are too many."""
    net = Net()
    normed = net.norm(net.input("x", ["n", 5, 8]), 8)
    heads = [net.linear(normed, 8, 4, bias=False) for _ in range(2)]
    one = net.model(heads[0])
    done = folded(one)
    nodes = done.stored.proto.graph.node
    assert [n.op_type for n in nodes] == ["LayerNormalization", "MatMul", "Add"]
    assert nodes[-1].output[0] == heads[0]
    two = net.model(*heads)
    assert "beta has no place" in reasons(folded(two))[0]
    assert len(folded(two, FoldNormAffine(max_adds=2)).applied) == 1


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_convolutions_take_gamma_also_where_they_pad(pads: list[int]) -> None:
    net = Net()
    normed = net.norm(net.input("x", ["n", 4, 4, 8]), 8, bias=not any(pads))
    image = net.op("Transpose", normed, perm=[0, 3, 1, 2])
    y = net.op("Conv", image, net.matrix(5, 8, 3, 3), net.vector(5), pads=pads)
    assert len(folded(net.model(y)).applied) == 1


def test_gemm_and_the_flattening_of_channels() -> None:
    net = Net()
    normed = net.norm(net.input("x", ["n", 3, 8]), 8)
    flat = net.op("Flatten", normed)
    y = net.op("Gemm", flat, net.matrix(5, 24), net.vector(5), transB=1, alpha=0.5)
    assert len(folded(net.model(y)).applied) == 1


def test_shared_weights_are_copied_or_refused_by_size() -> None:
    model = transformer(shared=True, layers=2)
    done = folded(model)
    assert len(done.applied) == 5
    never = folded(model, FoldNormAffine(max_copy_mb=0))
    assert any("has other readers" in r for r in reasons(never))


def test_weights_that_overflow() -> None:
    net = Net(dtype=np.float16)
    x = net.input("x", ["n", 8])
    normed = net.op("LayerNormalization", x, net.keep(np.full(8, 300.0)), axis=-1)
    done = run(net.model(net.op("MatMul", normed, net.keep(np.full((8, 2), 300.0)))), RULE)
    assert "is not finite in float16" in reasons(done)[0]


def _chain(net: Net, x: str) -> str:
    """A layer norm in primitives, with its bias in an Add behind it."""
    off = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    variance = net.op("ReduceMean", net.op("Mul", off, off), axes=[-1])
    root = net.op("Sqrt", net.op("Add", variance, net.scalar(0.01)))
    scaled = net.op("Mul", net.op("Div", off, root), net.vector(6, 1.0))
    return net.op("Add", scaled, net.vector(6, 0.3))


def test_a_norm_written_out_loses_the_add_of_its_bias() -> None:
    net = Net()
    model = net.model(net.linear(_chain(net, net.input("x", ["n", 5, 6])), 6, 3))
    done = folded(model)
    assert len(done.applied) == 1
    ops = [n.op_type for n in done.stored.proto.graph.node]
    assert ops.count("Add") == 2, "epsilon, and the bias of the layer"


def test_gamma_goes_alone_where_beta_has_no_place() -> None:
    net = Net()
    normed = _chain(net, net.input("x", ["n", 5, 6]))
    y = net.op("MatMul", normed, net.matrix(6, 3))
    model = net.model(net.op("Relu", y))
    never = FoldNormAffine(max_adds=0)
    done = folded(model, never)
    assert len(done.applied) == 1
    assert reasons(done) == [f"beta has no place: nothing that is added to '{y}' takes it"]
    assert not run(done.stored.complete(), never).applied
    # And with one Add behind the layer in the place of that behind the norm:
    done = folded(model)
    ops = [n.op_type for n in done.stored.proto.graph.node]
    assert ops[-3:] == ["MatMul", "Add", "Relu"]


def test_zeros_that_a_written_out_norm_ends_in_stay() -> None:
    # lower-norms writes them for the runtimes that fuse the whole chain: both settle.
    net = Net(opset=15)
    model = net.model(net.linear(_chain(net, net.input("x", ["n", 5, 6])), 6, 3))
    done = folded(model, RULE, LowerNorms())
    assert [r.rule for r in done.applied] == ["fold-norm-affine", "lower-norms"]


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_added_behind_a_norm_goes_with_its_bias(opset: int, bias: bool) -> None:
    net = Net(opset=opset)
    y = net.norm(net.input("x", ["n", 5, 8]), 8, bias=bias)
    y = net.op("Add", y, net.vector(8, 0.5))
    done = folded(net.model(net.linear(y, 8, 3)))
    (norm, *rest) = done.stored.proto.graph.node
    assert norm.op_type == "LayerNormalization"
    assert len(norm.input) == 2
    assert [n.op_type for n in rest] == ["MatMul", "Add"]
