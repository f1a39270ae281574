"""Means of streams: what is converted is equal, and what is refused has its true reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnxnorm import layout as layout_module
from onnxnorm import port as port_module
from onnxnorm import shift as shift_module
from onnxnorm import staging, storage, stream_prices
from onnxnorm import stream as stream_module
from onnxnorm import transfer as transfer_module
from onnxnorm.passes.fold_layout import FoldLayout
from onnxnorm.passes.lower_norms import LowerNorms
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.pipeline import Run
from onnxnorm.port import REAL
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated
from tests.networks import Net, einsum_attention, encoder_decoder, transformer

RULE = StreamFoldMean()

BEFORE = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,2] x) => (float[N,2] y)
<float[2,2] w = {4.0, 2.0, -1.0, 1.0}, float[2] b = {3.0, 1.0}, float[2] gamma = {2.0, 4.0},
 float[2] beta = {0.5, 0.25}, float[2,2] v = {1.0, 0.0, 2.0, 4.0}, float[2] c = {1.0, 2.0}>
{
   m = MatMul (x, w)
   s = Add (m, b)
   n = LayerNormalization <axis: int = -1, epsilon: float = 0.5> (s, gamma, beta)
   p = MatMul (n, v)
   y = Add (p, c)
}
"""
# Row means of w are 3 and 0, the mean of b is 2, and beta v = (0.5 + 0.5, 1).
AFTER = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,2] x) => (float[N,2] y)
<float[2] b_centered = {1.0, -1.0}, float[2] c_shifted = {2.0, 3.0}, float n_epsilon = {0.5},
 float[2] n_scale = {2.0, 4.0}, float n_two = {2.0}, float[2,2] v = {1.0, 0.0, 2.0, 4.0},
 float[2,2] w_centered = {1.0, -1.0, -1.0, 1.0}>
{
   m = MatMul (x, w_centered)
   s = Add (m, b_centered)
   [n_square] n_square = Pow (s, n_two)
   [n_mean_square] n_mean_square = ReduceMean <axes: ints = [-1], keepdims: int = 1> (n_square)
   [n_variance] n_variance = Add (n_mean_square, n_epsilon)
   [n_root] n_root = Sqrt (n_variance)
   [n_normalized] n_normalized = Div (s, n_root)
   n = Mul (n_normalized, n_scale)
   p = MatMul (n, v)
   y = Add (p, c_shifted)
}
"""


def folded(model: onnx.ModelProto | str, rule: StreamFoldMean = RULE, **given: Any) -> Run:
    """The run of the pass, proven: valid, a fixed point, equal."""
    done = run(model, rule)
    assert_sound(model, done, rule)
    if done.applied:
        assert_parity(model, done.stored.complete(), **given)
    return done


def converted(done: Run) -> int:
    return sum(1 + len(r.anchors) for r in done.applied)


def layer_norms(model: onnx.ModelProto) -> int:
    return sum(n.op_type == "LayerNormalization" for n in model.graph.node)


def centerings(done: Run) -> int:
    return sum(a.startswith("Sub ") for r in done.applied for a in r.added)


def reasons(done: Run) -> set[str]:
    return {r.reason for r in done.remarks if r.outcome == "refused"}


def named(text: set[str], *parts: str) -> bool:
    return any(all(p in t for p in parts) for t in text)


# ** the rewrite itself **


def test_the_biases_of_two_norms_that_are_added_do_not_take_each_other() -> None:
    net = Net()
    stream = net.linear(net.input("x", ["batch", 3, 8]), 8, 8)
    normed = []
    for _ in range(2):  # written out, so that each ends in the Add of a bias
        off = net.op("Sub", stream, net.op("ReduceMean", stream, axes=[-1]))
        variance = net.op("ReduceMean", net.op("Mul", off, off), axes=[-1])
        root = net.op("Sqrt", net.op("Add", variance, net.scalar(0.01)))
        scaled = net.op("Mul", net.op("Div", off, root), net.vector(8, 1.0))
        normed.append(net.op("Add", scaled, net.vector(8, 0.3)))
    assert converted(folded(net.model(net.op("Add", *normed)))) == 2


def test_weight_and_bias_are_centered_and_beta_goes_into_the_next_bias() -> None:
    done = assert_rewrites(BEFORE, AFTER, RULE)
    (remark,) = done.applied
    assert remark.site == "stream-fold-mean:n"
    assert remark.region is not None
    assert (remark.region.inputs, remark.region.outputs) == (("x",), ("y",))
    assert sorted(remark.edited) == ["Add s", "Add y", "MatMul m"]


def test_statistics_that_have_names_and_no_reader_are_no_obstacle() -> None:
    # as spox writes every LayerNormalization
    told = BEFORE.replace("n = LayerNormalization", "n, u, v_1 = LayerNormalization")
    assert told != BEFORE
    assert_rewrites(told, AFTER, RULE)
    read = told.replace("p = MatMul (n, v)", "told = Neg (u)\n p = MatMul (n, v)")
    done = folded(read)
    assert not done.applied
    assert named(reasons(done), "its mean or inverse deviation is read too")


def test_opset_23_has_an_operator_of_its_own() -> None:
    newer = BEFORE.replace('"" : 17', '"" : 23').replace("ir_version: 8", "ir_version: 10")
    after = re.sub(
        r"   \[n_square.*?n = Mul.*?\n",
        "   n = RMSNormalization <axis: int = -1, epsilon: float = 0.5> (s, n_scale)\n",
        AFTER.replace('"" : 17', '"" : 23').replace("ir_version: 8", "ir_version: 10"),
        flags=re.DOTALL,
    )
    after = after.replace(" float n_epsilon = {0.5},\n", "\n").replace(" float n_two = {2.0},", "")
    assert_rewrites(newer, after, RULE)


def test_the_axes_are_an_input_from_opset_18() -> None:
    done = folded(BEFORE.replace('"" : 17', '"" : 18'))
    (mean,) = (n for n in done.stored.proto.graph.node if n.op_type == "ReduceMean")
    assert len(mean.input) == 2


def test_without_a_bias_behind_it_beta_is_added() -> None:
    before = BEFORE.replace("y = Add (p, c)", "y = Relu (p)")
    done = folded(before)
    assert [n.op_type for n in done.stored.proto.graph.node][-3:] == ["Add", "MatMul", "Relu"]
    dear = run(before, StreamFoldMean(add=1.0))
    assert not dear.applied
    assert named(reasons(dear), "its bias would need an Add", "has no bias")


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["", ", b", ", one", ", row", ", computed"])
def test_every_form_of_gemm_writes_and_reads(trans_a: int, trans_b: int, bias: str) -> None:
    net = Net(seed=trans_a * 2 + trans_b)
    x = net.input("x", [6, 5] if not trans_a else [5, 6])
    weight = net.matrix(4, 5) if trans_b else net.matrix(5, 4)
    extra = {
        "": [],
        ", b": [net.vector(4, 0.4)],
        ", one": [net.keep(np.asarray([0.7]))],
        ", row": [net.keep(np.linspace(0, 1, 6).reshape(6, 1))],
        ", computed": [net.linear(net.input("z", [6, 3]), 3, 4)],
    }[bias]
    attrs: dict[str, Any] = {"alpha": 0.5, "beta": 1.5, "transA": trans_a, "transB": trans_b}
    y = net.op("Gemm", x, weight, *extra, **attrs)
    n = net.norm(y, 4)
    reader = net.matrix(3, 4) if trans_b else net.matrix(4, 3)
    out = net.op("Gemm", n, reader, net.vector(3, 0.2), alpha=2.0, beta=0.5, transB=trans_b)
    done = folded(net.model(out))
    assert converted(done) == 1
    assert not centerings(done)
    assert not any(a.startswith("Add Gemm") for r in done.applied for a in r.added)


def test_convolutions_write_channels_and_tokens() -> None:
    for kind, shape in (("Conv", (8, 3, 2, 2)), ("ConvTranspose", (3, 8, 2, 2))):
        net = Net()
        image = net.op(kind, net.input("x", ["n", 3, 4, 4]), net.matrix(*shape), net.vector(8, 0.5))
        last = net.op("Transpose", image, perm=[0, 2, 3, 1])
        done = folded(net.model(net.linear(net.norm(last, 8), 8, 4)))
        assert converted(done) == 1, kind


@pytest.mark.parametrize(
    ("kind", "shape"), [("Conv", (8, 3, 2, 2)), ("ConvTranspose", (6, 4, 2, 2))]
)
def test_grouped_convolutions_write_what_lies_in_one_group(kind: str, shape: Any) -> None:
    for parts, expected in ((2, 1), (4, 1), (1, 0)):
        net = Net()
        image = net.input("x", ["n", 6, 4, 4])
        y = net.op(kind, image, net.matrix(*shape), net.vector(8, 0.5), group=2)
        last = net.op("Transpose", y, perm=[0, 2, 3, 1])
        cut = net.op("Reshape", last, net.ints(0, 0, 0, parts, 8 // parts))
        done = folded(net.model(net.linear(net.norm(cut, 8 // parts), 8 // parts, 4)))
        assert converted(done) == expected
        assert expected or named(reasons(done), "its own group")


def test_a_norm_inside_each_head() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 12)
    heads = net.op("Reshape", x, net.ints(0, 0, 3, 4))
    normed = net.norm(net.op("Transpose", heads, perm=[0, 2, 1, 3]), 4)
    done = folded(net.model(net.op("Relu", normed)))
    assert converted(done) == 1
    assert not centerings(done)


def test_a_norm_over_two_axes() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 12)
    wide = net.op("Reshape", x, net.ints(0, 0, 3, 4))
    scale, bias = net.keep(np.arange(12.0).reshape(3, 4) - 3), net.keep(np.ones((3, 4)))
    normed = net.op("LayerNormalization", wide, scale, bias, axis=-2)
    done = folded(net.model(net.op("Relu", normed)))
    assert converted(done) == 1


def test_layer_scale_goes_into_the_writer() -> None:
    model = transformer(layer_scale=True)
    done = folded(model)
    assert converted(done) == layer_norms(model)
    left = [n for n in done.stored.proto.graph.node if n.op_type == "Mul"]
    assert len(left) == 2 + 5, "two scores and five gammas"


def test_constant_rows_and_width_one() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 3]), 3, 1)
    folded(net.model(net.linear(net.norm(x, 1), 1, 2)))


# ** whole networks **


@pytest.mark.parametrize("stem", ["linear", "embedding", "patches", "gelu", "input"])
def test_pre_ln_converts_whatever_starts_the_stream(stem: Any) -> None:
    model = transformer(stem=stem)
    done = folded(model)
    assert converted(done) == layer_norms(model) == 5
    assert len(done.applied) == 1, "a stream is one site"
    assert done.applied[0].region is None, "which goes through the whole model"
    assert centerings(done) == (1 if stem in ("gelu", "input") else 0)


@pytest.mark.parametrize(
    "options",
    [{"parallel": True}, {"depth_scale": True}, {"layer_scale": True}, {"affine": False}],
    ids=str,
)
def test_variants_of_pre_ln(options: Any) -> None:
    model = transformer(**options)
    assert converted(folded(model)) == layer_norms(model)


def test_post_ln_stays_and_the_linear_reader_is_named() -> None:
    model = transformer(placement="post")
    done = folded(model)
    assert not done.applied
    assert all("reads this stream without a norm in front of it" in r for r in reasons(done))
    assert len([r for r in done.remarks if r.outcome == "refused"]) == 4


def test_post_ln_without_affines_has_no_mean_to_begin_with() -> None:
    model = transformer(placement="post", affine=False)
    done = folded(model)
    assert converted(done) == layer_norms(model) - 1
    assert not centerings(done)


def test_mix_ln_converts_where_pre_ln_begins() -> None:
    model = transformer(placement="mix", layers=4)
    done = folded(model)
    assert converted(done) == 5
    assert centerings(done) == 1


def test_peri_ln_loses_the_means_of_its_output_norms() -> None:
    model = transformer(placement="peri", layers=3)
    done = folded(model)
    assert converted(done) == 6
    assert not centerings(done)
    assert named(reasons(done), "with a scale for each feature", "costs 2 times")


def test_peri_ln_without_affines_loses_all() -> None:
    model = transformer(placement="peri", layers=2, affine=False)
    assert converted(folded(model)) == layer_norms(model)


def test_encoder_and_decoder_are_two_streams() -> None:
    model = encoder_decoder()
    done = folded(model)
    assert converted(done) == layer_norms(model)
    assert len(done.applied) == 2
    assert centerings(done) == 1


def test_hidden_states_that_are_returned_stay() -> None:
    model = transformer(hidden=True, layers=3)
    done = folded(model)
    assert converted(done) == 5, "behind the output one centering pays"
    assert centerings(done) == 1
    assert named(reasons(done), "on this stream, is a graph output")


# ** traps **


def test_trap_a_stream_that_is_a_graph_output_is_left_alone() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 8]), 8, 16)
    done = folded(net.model(net.linear(net.norm(x, 16), 16, 4), x))
    assert not done.applied
    assert named(reasons(done), f"'{x}'", "is a graph output")
    (remark,) = done.remarks
    assert "leave it out of the export" in remark.advice


def test_trap_swin_merges_four_tokens() -> None:
    for spelled in ("slices", "reshape"):
        net = Net()
        x = net.linear(net.input("x", ["n", 4, 4, 6]), 6, 8)
        x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
        x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
        if spelled == "slices":
            rows = [
                net.op("Slice", x, net.ints(i), net.ints(99), net.ints(1), net.ints(2))
                for i in (0, 1)
            ]
            parts = [
                net.op("Slice", r, net.ints(j), net.ints(99), net.ints(2), net.ints(2))
                for j in (0, 1)
                for r in rows
            ]
            merged = net.op("Concat", *parts, axis=-1)
        else:
            split = net.op("Reshape", x, net.ints(0, 2, 2, 2, 2, 8))
            turned = net.op("Transpose", split, perm=[0, 1, 3, 4, 2, 5])
            merged = net.op("Reshape", turned, net.ints(0, 2, 2, 32))
        normed = net.norm(merged, 32)
        y = net.linear(normed, 32, 16, bias=False)
        y = net.op("Add", y, net.mlp(net.norm(y, 16), 16))
        done = folded(net.model(net.norm(y, 16)))
        assert converted(done) == 2, "the stage behind the merge"
        found = reasons(done)
        blocked = [r for r in found if "together" in r or "along the features" in r]
        assert len(blocked) == len(found), found
        assert named(found, merged if spelled == "slices" else normed), found


def test_trap_u_vit_joins_a_skip_along_the_features() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    skip = x
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    joined = net.op("Concat", x, skip, axis=-1)
    x = net.linear(joined, 16, 8)
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    done = folded(net.model(net.linear(net.norm(x, 8), 8, 3)))
    assert converted(done) == 2, "what comes behind the skip is a stream of its own"
    assert named(reasons(done), joined, "joins this stream with others along the features")


def test_trap_a_router_reads_the_raw_stream() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    router = net.op("MatMul", x, net.matrix(8, 1))
    gate = net.op("Tanh", router)
    x = net.op("Add", x, net.op("Mul", net.mlp(net.norm(x, 8), 8), gate))
    done = folded(net.model(net.norm(x, 8)))
    assert not done.applied
    assert named(reasons(done), f"the linear layer '{router}'", "without a norm in front")


def test_trap_convnext_reads_the_stream_by_a_depthwise_convolution() -> None:
    net = Net()

    def normed(x: str) -> str:
        last = net.op("Transpose", x, perm=[0, 2, 3, 1])
        return net.norm(last, 8)

    x = net.op("Conv", net.input("x", ["n", 3, 8, 8]), net.matrix(8, 3, 2, 2), net.vector(8, 0.5))
    x = net.op("Transpose", normed(x), perm=[0, 3, 1, 2])
    for _ in range(2):
        deep = net.op("Conv", x, net.matrix(8, 1, 3, 3), net.vector(8), group=8, pads=[1] * 4)
        branch = net.mlp(normed(deep), 8)
        x = net.op("Add", x, net.op("Transpose", branch, perm=[0, 3, 1, 2]))
    done = folded(net.model(net.linear(normed(x), 8, 3)))
    assert converted(done) == 1, "the stem"
    assert named(reasons(done), "the depthwise convolution", "from its own group")


def test_trap_a_mixer_writes_over_tokens() -> None:
    def mixer(blocks: int) -> onnx.ModelProto:
        net = Net()
        x = net.linear(net.input("x", ["n", 4, 6]), 6, 8)
        for _ in range(blocks):
            turned = net.op("Transpose", net.norm(x, 8), perm=[0, 2, 1])
            mixed = net.op("Transpose", net.mlp(turned, 4), perm=[0, 2, 1])
            x = net.op("Add", x, mixed)
            x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
        return net.model(net.linear(net.norm(x, 8), 8, 3))

    done = folded(mixer(2), StreamFoldMean(centering=1.0))
    assert converted(done) == 5
    assert centerings(done) == 2, "one for each token mixer"
    dear = folded(mixer(2), StreamFoldMean(centering=9.0))
    assert not dear.applied
    assert named(reasons(dear), "costs 9 times what a converted norm saves")


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cuda"])
def test_prices_are_those_of_the_target_unless_they_are_given(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer(layers=1, stem="gelu")  # 3 norms, 1 centering
    dear = replace(stream_prices.times("onnx")[0], centering=26.0)
    monkeypatch.setitem(stream_prices.MEASURED, target, dear)
    refused = run(model, StreamFoldMean(target=target))
    assert not refused.applied
    assert named(reasons(refused), "costs 100 times what a converted norm saves")
    for other in {"onnx", "ort-cpu"} - {target}:
        assert converted(run(model, StreamFoldMean(target=other))) == 3
    assert converted(run(model, StreamFoldMean(target=target, centering=2.0))) == 3


@pytest.mark.parametrize(
    ("rows", "price"), [(2999, "1.5"), (3000, None), ("rows", None)], ids=["small", "large", "any"]
)
def test_an_add_on_a_small_tensor_costs_more_than_a_norm_saves(
    rows: int | str, price: str | None
) -> None:
    net = Net()
    x = net.linear(net.input("x", [rows, 6]), 6, 8)  # 8 features: 24,000 elements in 3,000 rows
    done = run(net.model(net.op("Relu", net.norm(x, 8))), StreamFoldMean())
    if price is None:
        assert done.applied[0].note.endswith("1 bias added behind its norm at the price of 0.8")
    else:
        assert not done.applied
        assert named(reasons(done), "its bias would need an Add", f"that costs {price} times")


def test_the_note_names_the_prices_and_says_where_nothing_was_measured() -> None:
    def note(rule: StreamFoldMean) -> str:
        (remark,) = run(transformer(layers=1, stem="gelu"), rule).applied
        return remark.note

    unmeasured = "nothing was measured for ort-cuda: these are the CPU's prices"
    assert note(StreamFoldMean()).endswith("at the price of 2")
    assert note(StreamFoldMean(target="ort-cuda")).endswith(f"at the price of 2; {unmeasured}")
    assert note(StreamFoldMean(target="ort-cuda", centering=1.5)).endswith("at the price of 1.5")


@pytest.mark.parametrize(
    ("equation", "given", "weight", "back"),
    [
        ("bsi,id->bsd", (4, 6), (6, 8), None),
        ("...i,id->...d", (4, 6), (6, 8), None),
        ("id,bsi->bsd", (4, 6), (6, 8), None),
        ("bsi,di->bsd", (4, 6), (8, 6), None),
        ("bsi,ihe->bshe", (4, 6), (6, 2, 4), (0, 0, 8)),
        ("bshi,hid->bsd", (4, 2, 3), (2, 3, 8), None),
        ("bsi,id", (4, 6), (6, 8), "sorted"),  # the result is bds: in the order of the alphabet
    ],
)
def test_an_einsum_writes_a_stream(
    equation: str, given: tuple[int, ...], weight: tuple[int, ...], back: Any
) -> None:
    net = Net()
    x = net.input("x", ["n", *given])
    operands = [x, net.matrix(*weight)]
    x = net.op("Einsum", *(operands[::-1] if equation[0] == "i" else operands), equation=equation)
    if back == "sorted":
        x = net.op("Transpose", x, perm=[0, 2, 1])
    elif back is not None:
        x = net.op("Reshape", x, net.ints(*back))
    x = net.op("Add", x, net.vector(8, 0.4))
    # And one that mixes the tokens, which treats every feature alike.
    x = net.op("Einsum", x, net.matrix(4, 4), equation="bsd,st->btd")
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    done = folded(net.model(net.linear(net.norm(x, 8), 8, 3)))
    assert (converted(done), centerings(done)) == (2, 0)


@pytest.mark.parametrize(
    ("equation", "shape"), [("bsi,sid->bsd", (4, 6, 8)), ("bsd,sd->bsd", (4, 8))]
)
def test_an_einsum_whose_operands_share_an_axis(equation: str, shape: tuple[int, ...]) -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 4, 6]), 6, 8 if shape[-2] == 4 else 6)
    x = net.op("Einsum", x, net.matrix(*shape), equation=equation)
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    model = net.model(net.linear(net.norm(x, 8), 8, 3))
    if equation == "bsi,sid->bsd":  # other weights for every token: linear all the same
        assert (converted(folded(model)), centerings(folded(model))) == (2, 0)
        return
    refused = run(model, StreamFoldMean(centering=50.0))
    assert named(reasons(refused), "Einsum", "writes each feature from several operands")


@pytest.mark.parametrize("form", ["flax", "swapped", "ellipsis", "flat"])
@pytest.mark.parametrize("key_bias", [True, False])
def test_attention_in_einsums_reads_and_writes_a_stream(form: str, key_bias: bool) -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    for _ in range(2):
        x = net.op("Add", x, einsum_attention(net, net.norm(x, 8), 8, form, key_bias=key_bias))
    model = net.model(net.linear(net.norm(x, 8), 8, 3))
    done = folded(model)
    assert (converted(done), centerings(done)) == (3, 0)
    added = [a for r in done.applied for a in r.added]
    assert not any(re.fullmatch(r"Add layernormalization_\d+", a) for a in added), "vectors only"


def test_an_einsum_with_no_bias_behind_it_takes_no_beta() -> None:
    net = Net()
    normed = net.norm(net.linear(net.input("x", ["n", 5, 6]), 6, 8), 8)
    y = net.op("Einsum", normed, net.matrix(8, 2, 4), equation="bsd,dhe->bshe")
    model = net.model(net.op("Relu", y))
    assert any(a == f"Add {normed}" for a in folded(model).applied[0].added)
    refused = run(model, StreamFoldMean(add=1.0))
    said = f"its bias would need an Add, since Einsum '{y}' has no bias; that costs 1 times"
    assert all(r.startswith(said) for r in reasons(refused))


@pytest.mark.parametrize(
    ("equation", "shape", "why"),
    [
        ("bsd,de->be", (8, 3), "its equation has more in it than a product with a weight"),
        ("bsd,sd->bsd", (5, 8), "its equation has more in it than a product with a weight"),
        ("bsd,s->bd", (5,), "reads the result along another axis"),
    ],
)
def test_an_einsum_that_takes_no_shift(equation: str, shape: tuple[int, ...], why: str) -> None:
    net = Net()
    normed = net.norm(net.linear(net.input("x", ["n", 5, 6]), 6, 8), 8)
    y = net.op("Einsum", normed, net.matrix(*shape), equation=equation)
    y = net.op("Add", y, net.vector(3 if "e" in equation else 8))
    model = net.model(y)
    done = folded(model)
    assert any(a == f"Add {normed}" for a in done.applied[0].added)
    assert named(reasons(run(model, StreamFoldMean(add=1.0))), "Einsum '", why)


def _dequantized(net: Net, *shape: int) -> str:
    """A weight in int8 with one scale for each column."""
    levels = net.keep(net.random.integers(-90, 120, size=shape).astype(np.int8), "levels")
    scales = net.keep(0.004 + 0.004 * net.random.random(size=shape[-1]), "scales")
    zeros = net.keep(np.zeros(shape[-1], np.int8), "zeros")
    return net.op("DequantizeLinear", levels, scales, zeros, axis=1)


def _weight_only(net: Net, x: str) -> str:
    return net.op("MatMul", x, _dequantized(net, 6, 8))


def _transposed_weight(net: Net, x: str) -> str:
    return net.op("Gemm", x, net.op("Transpose", _dequantized(net, 8, 6), perm=[1, 0]))


def _dynamic(net: Net, x: str) -> str:
    quantized, scale, zero = net.many("DynamicQuantizeLinear", x, outputs=3)
    levels = net.keep(net.random.integers(-90, 120, size=(6, 8)).astype(np.int8), "levels")
    product = net.op("MatMulInteger", quantized, levels, zero)
    wide = net.op("Cast", product, to=onnx.TensorProto.FLOAT)
    return net.op("Mul", wide, net.op("Mul", scale, net.scalar(0.005)))


def _static(net: Net, x: str) -> str:
    levels = net.keep(net.random.integers(-90, 120, size=(6, 8)).astype(np.int8), "levels")
    zero = net.keep(np.asarray(0, np.int8))
    scales = [net.scalar(v) for v in (0.05, 0.005, 0.05)]
    x = net.op("QuantizeLinear", x, scales[0], zero)
    y = net.op("QLinearMatMul", x, scales[0], zero, levels, scales[1], zero, scales[2], zero)
    return net.op("DequantizeLinear", y, scales[2], zero)


@pytest.mark.parametrize(
    ("write", "by"),
    [
        (_weight_only, "DequantizeLinear"),
        (_transposed_weight, "writes this stream with a weight from DequantizeLinear"),
        (_dynamic, "MatMulInteger"),
        (_static, "DequantizeLinear"),
    ],
)
def test_trap_a_quantized_writer_says_that_the_order_is_wrong(
    write: Callable[[Net, str], str], by: str
) -> None:
    net = Net()
    x = write(net, net.input("x", ["n", 6]))
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    model = net.model(net.linear(net.norm(x, 8), 8, 3))
    refused = run(model, StreamFoldMean(centering=50.0))
    assert not refused.applied
    assert named(reasons(refused), by, "(optimize the model before it is quantized)")
    assert converted(folded(model, StreamFoldMean(centering=1.0))) == 2


def test_trap_a_stream_that_is_rounded_says_that_the_order_is_wrong() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 6]), 6, 8)
    scale, zero = net.scalar(0.05), net.keep(np.asarray(0, np.int8))
    rounded = net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero), scale, zero)
    y = net.op("Add", net.linear(net.norm(x, 8), 8, 3), net.linear(rounded, 8, 3))
    refused = run(net.model(y), RULE)
    assert not refused.applied
    said = "rounds this stream with its mean (optimize the model before it is quantized)"
    assert named(reasons(refused), "QuantizeLinear", said)


def test_trap_a_split_along_the_features() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 6]), 6, 8)
    left, right = net.many("Split", x, outputs=2, axis=-1)
    gated = net.op("Mul", left, net.op("Sigmoid", right))
    y = net.op("Add", net.linear(net.norm(x, 8), 8, 3), net.linear(gated, 4, 3))
    refused = run(net.model(y), RULE)
    assert not refused.applied
    said = "cuts the features into parts: the mean of all is not the mean of each"
    assert named(reasons(refused), "Split", said)


def test_trap_a_tied_table_is_centered_or_cloned_by_its_price() -> None:
    model = transformer(stem="embedding", tied=True)
    small = folded(model)
    assert (converted(small), centerings(small)) == (5, 0), "11 rows are copied"
    net = Net()
    ids = net.input("ids", ["n", 6], onnx.TensorProto.INT64)
    table = net.keep(net.random.normal(size=(4000, 16)) + 0.4, name="table")
    x = net.op("Gather", table, ids)
    for _ in range(2):
        x = net.op("Add", x, net.mlp(net.norm(x, 16), 16))
    logits = net.op("MatMul", net.norm(x, 16), net.op("Transpose", table, perm=[1, 0]))
    large = net.model(logits)
    cheap = folded(large)
    assert (converted(cheap), centerings(cheap)) == (3, 0)
    dear = folded(large, StreamFoldMean(copy_mb=100.0))
    assert (converted(dear), centerings(dear)) == (3, 1)
    never = folded(large, StreamFoldMean(max_copy_mb=0))
    assert (converted(never), centerings(never)) == (3, 1)
    assert any(t.name == "table" for t in never.stored.proto.graph.initializer)
    refused = run(large, StreamFoldMean(max_copy_mb=0, centering=50.0))
    assert named(reasons(refused), "'table' is read by others too")


def test_trap_albert_shares_its_weights_and_not_its_norms() -> None:
    model = transformer(shared=True, layers=3)
    done = folded(model)
    assert converted(done) == layer_norms(model) == 7
    before = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    after = sum(numpy_helper.to_array(t).nbytes for t in done.stored.complete().graph.initializer)
    assert after < before + 7 * 16 * 4 + 1000, "no matrix is stored twice"


def test_trap_whispers_stem_is_centered_once() -> None:
    model = transformer(stem="gelu", layers=3)
    done = folded(model)
    assert (converted(done), centerings(done)) == (7, 1)


def test_trap_an_rms_stream_is_never_touched() -> None:
    net = Net(opset=23)
    ids = net.input("ids", ["n", 6], onnx.TensorProto.INT64)
    x = net.op("Gather", net.keep(net.random.normal(size=(9, 8)) + 0.4, name="table"), ids)
    for _ in range(2):
        normed = net.op("RMSNormalization", x, net.vector(8, 1.0), axis=-1)
        x = net.op("Add", x, net.mlp(normed, 8))
    model = net.model(net.op("RMSNormalization", x, net.vector(8, 1.0), axis=-1))
    done = run(model, RULE)
    assert not done.applied
    assert not done.remarks


def test_trap_one_rms_norm_on_a_stream_blocks_it() -> None:
    net = Net(opset=23)
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    done = folded(net.model(net.op("RMSNormalization", x, net.vector(8, 1.0), axis=-1)))
    assert not done.applied
    assert named(reasons(done), "the RMS norm", "sees its mean")


def test_trap_the_mean_of_a_norm_is_an_output() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 6]), 6, 8)
    net.nodes.append(
        onnx.helper.make_node("LayerNormalization", [x, net.vector(8, 1.0)], ["y", "m", "d"])
    )
    done = folded(net.model("y", "m"))
    assert not done.applied
    assert named(reasons(done), "mean")


def test_trap_padding_with_ones_and_masking_with_infinity() -> None:
    for value, expected in ((0.0, 1), (1.0, 0)):
        net = Net()
        x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
        padded = net.op("Pad", x, net.ints(0, 1, 0, 0, 1, 0), net.scalar(value))
        done = folded(net.model(net.linear(net.norm(padded, 8), 8, 3)))
        assert converted(done) == expected
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    mask = net.input("mask", ["n", 5, 1], onnx.TensorProto.BOOL)
    masked = net.op("Where", mask, x, net.keep(np.full((1,), -np.inf)))
    done = run(net.model(net.linear(net.norm(masked, 8), 8, 3)), RULE)
    assert not done.applied
    assert named(reasons(done), "is not finite in float32")


def test_trap_a_mask_by_feature() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    gate = net.input("gate", ["n", 1, 8])
    done = folded(net.model(net.norm(net.op("Mul", x, gate), 8)))
    assert not done.applied
    assert named(reasons(done), "multiplies feature by feature")


def test_trap_weights_that_callers_may_override() -> None:
    model = parser.parse_model(BEFORE)
    info = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2, 2])
    model.graph.input.append(info)
    assert named(reasons(assert_refuses(model, RULE)), "'w' is a graph input")


def test_tokens_may_be_selected_masked_padded_and_pooled() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 6, 7]), 7, 8)
    x = net.op("Mul", x, net.input("gate", ["n", 6, 1]))
    first, second = net.many("Split", x, net.ints(2, 4), outputs=2, axis=1)
    x = net.op("Concat", second, first, axis=1)
    x = net.op("Where", net.input("mask", ["n", 6, 1], onnx.TensorProto.BOOL), x, net.scalar(0.0))
    x = net.op("Slice", x, net.ints(1), net.ints(6), net.ints(1))
    x = net.op("MatMul", net.input("mix", ["n", 3, 5]), x)
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    x = net.op("Cast", net.op("Cast", x, to=onnx.TensorProto.DOUBLE), to=onnx.TensorProto.FLOAT)
    pooled = net.op("ReduceMean", x, axes=[1], keepdims=0)
    done = folded(net.model(net.linear(net.norm(pooled, 8), 8, 3)))
    assert converted(done) == 2
    assert not centerings(done)


def test_beta_passes_a_roll_and_a_pool_but_no_padding() -> None:
    net = Net()
    x = net.linear(net.input("x", ["n", 6, 7]), 7, 8)
    normed = net.norm(x, 8)
    left = net.op("Slice", normed, net.ints(0), net.ints(2), net.ints(1))
    right = net.op("Slice", normed, net.ints(2), net.ints(6), net.ints(1))
    rolled = net.op("Concat", right, left, axis=1)
    y = net.linear(net.op("Reshape", rolled, net.ints(-1, 3, 8)), 8, 4)
    done = folded(net.model(y))
    assert converted(done) == 1
    assert not any(a.startswith("Add") and "variance" not in a for a in done.applied[0].added)
    net = Net()
    normed = net.norm(net.linear(net.input("x", ["n", 6, 7]), 7, 8), 8)
    padded = net.op("Pad", normed, net.ints(0, 1, 0, 0, 0, 0))
    done = folded(net.model(net.linear(padded, 8, 4)))
    assert any(a == f"Add {normed}" for a in done.applied[0].added)


def test_beta_goes_beside_the_residual_it_is_added_to() -> None:
    net = Net()
    normed = net.norm(net.linear(net.input("x", ["n", 6, 7]), 7, 8), 8)
    y = net.op("Relu", net.op("Add", normed, net.mlp(normed, 8)))
    done = folded(net.model(y))
    assert converted(done) == 1
    assert not any(a == f"Add {normed}" for a in done.applied[0].added)


def test_a_softmax_does_not_see_what_all_keys_share() -> None:
    net = Net()
    normed = net.norm(net.linear(net.input("x", ["n", 6, 7]), 7, 8), 8)
    mask = net.input("mask", ["n", 1, 6, 6])
    y = net.attention(normed, 8, key_bias=False, mask=mask)
    done = folded(net.model(y))
    assert not any(a == f"Add {normed}" for a in done.applied[0].added)
    assert done.applied[0].region is None, "attention by itself does not know its sizes"


@pytest.mark.parametrize("capped", [False, True])
def test_attention_as_one_operator_has_a_softmax_inside(capped: bool) -> None:
    net = Net(opset=23)
    normed = net.norm(net.linear(net.input("x", ["n", 6, 7]), 7, 8), 8)
    q, v = net.linear(normed, 8, 8), net.linear(normed, 8, 8)
    attrs: dict[str, Any] = {"softcap": 2.0} if capped else {}
    k = net.op("MatMul", normed, net.matrix(8, 8))
    y = net.op("Attention", q, k, v, q_num_heads=2, kv_num_heads=2, **attrs)
    done = folded(net.model(y))
    assert any(a == f"Add {normed}" for a in done.applied[0].added) == capped


@pytest.mark.parametrize("way", ["axis", "output", "values", "where"])
def test_what_all_keys_share_is_seen_elsewhere(way: str) -> None:
    net = Net()
    normed = net.norm(net.linear(net.input("x", ["n", 6, 7]), 7, 8), 8)
    key = net.op("MatMul", normed, net.matrix(8, 8))
    query = net.linear(normed, 8, 8)
    turned = net.op("Transpose", key, perm=[0, 2, 1])
    scores = net.op("MatMul", query, turned)
    if way == "where":
        mask = net.input("mask", ["n", 6, 6], onnx.TensorProto.BOOL)
        scores = net.op("Where", mask, scores, net.scalar(-3.0))
    weights = net.op("Softmax", scores, axis=1 if way == "axis" else -1)
    values = key if way == "values" else net.linear(normed, 8, 8)
    outputs = [net.op("MatMul", weights, values)]
    if way == "output":
        outputs.append(key)
    done = folded(net.model(*outputs))
    assert any(a == f"Add {normed}" for a in done.applied[0].added)


@pytest.mark.parametrize("opset", [17, 23])
def test_a_reason_is_that_of_the_model_as_it_was_given(opset: int) -> None:
    """What an earlier round made of the other norms is neither in the way nor in the words."""
    net = Net(opset=opset)
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    x = net.op("Add", x, net.mlp(net.norm(x, 8), 8))
    seen = net.op("Relu", net.norm(x, 8))
    done = run(net.model(seen, net.linear(net.norm(x, 8), 8, 3)), StreamFoldMean(add=1.0))
    assert converted(done) == 2
    (reason,) = reasons(done)
    assert reason.startswith(f"its bias would need an Add, since Relu '{seen}' reads the result")
    net = Net(opset=opset)
    first = net.norm(net.linear(net.input("x", ["n", 5, 6]), 6, 8), 8)
    done = run(net.model(net.linear(net.norm(first, 8), 8, 3)), RULE)
    assert converted(done) == 1
    (reason,) = reasons(done)
    assert reason.startswith(f"the layer norm '{first}' writes this stream with a scale for each")


def class_attention(net: Net, raw: bool) -> onnx.ModelProto:
    """LN(x) of the class token joined with the rest of x, as XCiT has it; `raw` reads both."""
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    first = [net.ints(v) for v in (0, 1, 1, 1)]
    rest = [net.ints(v) for v in (1, 2**63 - 1, 1, 1)]
    for _ in range(2):
        normed = net.norm(net.op("Slice", x, *first), 8)
        joined = net.op("Concat", normed, net.op("Slice", x, *rest), axis=1)
        token = joined if raw else net.op("Slice", joined, *first)
        made = net.mlp(token, 8)
        if not raw:
            made = net.op("Concat", made, net.op("Slice", joined, *rest), axis=1)
        x = net.op("Add", joined, made)
    return net.model(net.linear(net.norm(x, 8), 8, 3))


def test_class_attention_reads_the_normed_piece_of_a_concat() -> None:
    rules = (FoldLayout(), StreamFoldMean())
    model = class_attention(Net(), raw=False)
    refused = run(model, *rules)
    assert not any(r.rule == RULE.name for r in refused.applied)
    assert named(reasons(refused), "writes this stream with a scale for each feature, and the")
    assert all("taking its mean out at run time costs 2 times" in r for r in reasons(refused))
    cheap = (FoldLayout(), StreamFoldMean(centering=0.5, add=0.0))
    done = run(model, *cheap)
    assert_sound(model, done, *cheap)
    assert_parity(model, done.stored.complete())
    assert centerings(done) == 2
    assert sum(1 + len(r.anchors) for r in done.applied if r.rule == RULE.name) == 3


def test_class_attention_that_reads_all_tokens_blocks() -> None:
    refused = run(class_attention(Net(), raw=True), FoldLayout(), RULE)
    assert named(reasons(refused), "the linear layer", "reads this stream without a norm in front")


@pytest.mark.parametrize("way", ["split", "gather", "slice"])
def test_a_norm_over_a_part_of_a_projection_names_what_it_is_cut_out_of(way: str) -> None:
    """A norm over q of a projection of q and v: the weight is one, and v is read as it is."""
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 16)
    both = net.op("Transpose", net.op("Reshape", x, net.ints(0, 0, 2, 8)), perm=[2, 0, 1, 3])
    if way == "split":
        parts = net.many("Split", both, net.ints(1, 1), outputs=2, axis=0)
        q, v = (net.op("Squeeze", part, net.ints(0)) for part in parts)
    elif way == "gather":
        q, v = (net.op("Gather", both, net.keep(np.asarray(at)), axis=0) for at in (0, 1))
    else:
        ends = [[net.ints(n) for n in (at, at + 1, 0)] for at in (0, 1)]
        q, v = (net.op("Squeeze", net.op("Slice", both, *e), net.ints(0)) for e in ends)
    raw = net.op("MatMul", v, net.matrix(8, 3))
    model = net.model(net.op("Add", net.linear(net.norm(q, 8), 8, 3), raw))
    refused = run(model, RULE)
    assert not refused.applied
    (reason,) = reasons(refused)
    assert reason == (
        f"the linear layer '{raw}' reads this stream without a norm in front of it; what both read"
        f" is cut out of '{both}'"
    )


# ** numbers **


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("opset", [17, 23])
def test_other_types(dtype: Any, opset: int) -> None:
    model = transformer(dtype=dtype, opset=opset, stem="gelu")
    assert converted(folded(model)) == 5


def test_float16_never_squares_in_its_own_type() -> None:
    done = run(transformer(dtype=np.float16), RULE)
    inferred = onnx.shape_inference.infer_shapes(done.stored.complete())
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    squares = [n.output[0] for n in done.stored.proto.graph.node if n.op_type == "Pow"]
    assert squares
    assert {types[s] for s in squares} == {onnx.TensorProto.FLOAT}


def test_weights_that_float16_cannot_hold_centered() -> None:
    net = Net(dtype=np.float16)
    heavy = np.full((4, 2), 60000.0)
    heavy[:, 1] = -60000.0
    heavy[0] = 60000.0
    heavy = np.concatenate([heavy, np.full((4, 6), -60000.0)], axis=1)
    x = net.op("MatMul", net.input("x", ["n", 4]), net.keep(heavy, name="heavy"))
    done = run(net.model(net.norm(x, 8)), RULE)
    assert not done.applied
    assert named(reasons(done), "'heavy'", "is not finite in float16")


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_large_common_mean_comes_out_closer_to_the_truth(opset: int, dtype: Any) -> None:
    """The mean is 10^3 times the deviation; what a layer norm subtracts, it has rounded before."""
    net = Net(opset=opset, seed=3, dtype=dtype)
    ids = net.input("ids", ["n", 8], onnx.TensorProto.INT64)
    table = net.random.normal(size=(50, 32)) + 1000.0
    x = net.op("Gather", net.keep(table), ids)
    for _ in range(2):
        x = net.op("Add", x, net.mlp(net.norm(x, 32), 32))
    model = net.model(net.linear(net.norm(x, 32), 32, 8))
    done = run(model, RULE)
    assert converted(done) == 3
    feed = {"ids": np.random.default_rng(0).integers(0, 50, size=(4, 8))}
    outputs: Any = ReferenceEvaluator(_in_float64(model)).run(None, feed)
    truth = outputs[0]
    errors = []
    for proto in (model, done.stored.complete()):
        # Of the halves onnxruntime on the CPU computes one in float32, and the other not at all.
        result = _runtime(proto, feed) if dtype is np.float32 else _reference(proto, feed)
        errors.append(float(np.abs(result.astype(np.float64) - truth).max()))
    assert errors[1] < errors[0] / 10, errors
    if dtype is not ml_dtypes.bfloat16:
        assert_parity(model, done.stored.complete())


def _runtime(model: onnx.ModelProto, feed: dict[str, Any]) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)[0]


def _reference(model: onnx.ModelProto, feed: dict[str, Any]) -> Any:
    outputs: Any = ReferenceEvaluator(model).run(None, feed)
    return outputs[0]


def _in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type in REAL:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float64), tensor.name))
    for value in [*copy.graph.input, *copy.graph.output]:
        if value.type.tensor_type.elem_type in REAL:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name == "stash_type":
                attribute.i = onnx.TensorProto.DOUBLE
    return copy


def test_external_weights_are_read_where_they_are(tmp_path: Path) -> None:
    model = transformer(size=32)
    path = tmp_path / "model.onnx"
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    from onnxnorm.pipeline import Pipeline

    done = Pipeline([RULE]).run(storage.load(path))
    assert converted(done) == 5
    staging.save(done.stored, tmp_path / "out.onnx")
    assert_parity(model, onnx.load(tmp_path / "out.onnx"))


def test_a_branch_in_a_body_reads_the_stream_from_outside() -> None:
    text = BEFORE.replace(
        "   n = LayerNormalization <axis: int = -1, epsilon: float = 0.5> (s, gamma, beta)\n",
        """   n = If (flag) <
      then_branch = yes () => (float[N,2] a)
      { a = LayerNormalization <axis: int = -1, epsilon: float = 0.5> (s, gamma, beta) },
      else_branch = no () => (float[N,2] e)
      { t = LayerNormalization <axis: int = -1, epsilon: float = 0.25> (s, gamma)
        e = Neg (t) }
   >
""",
    ).replace("main (float[N,2] x)", "main (float[N,2] x, bool flag)")
    done = folded(text)
    assert converted(done) == 2
    (remark,) = done.applied
    assert remark.site == "stream-fold-mean:n/then_branch/a"
    assert remark.anchors == ("n/else_branch/t",)


def test_a_function_is_a_scope_of_its_own() -> None:
    text = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
main (float[N,2] x) => (float[N,2] y)
{
   y = local.block (x)
}
<domain: "local", opset_import: ["" : 17]>
block (x) => (y)
{
   w = Constant <value: tensor = float[2,2] {4.0, 2.0, -1.0, 1.0}> ()
   g = Constant <value: tensor = float[2] {2.0, 4.0}> ()
   m = MatMul (x, w)
   y = LayerNormalization <axis: int = -1, epsilon: float = 0.5> (m, g)
}
"""
    done = folded(text)
    assert converted(done) <= 1
    if not done.applied:
        assert reasons(done), "a norm that stays has a reason"


# ** properties **


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 3),
    size=st.sampled_from([8, 12]),
    placement=st.sampled_from(["pre", "post", "mix", "peri"]),
    stem=st.sampled_from(["embedding", "patches", "linear", "gelu", "input"]),
    flags=st.tuples(*[st.booleans()] * 6),
    opset=st.sampled_from([17, 18, 20, 23]),
    seed=st.integers(0, 3),
)
def test_whatever_is_converted_is_equal_and_whatever_is_refused_says_why(
    layers: int,
    size: int,
    placement: Any,
    stem: Any,
    flags: tuple[bool, ...],
    opset: int,
    seed: int,
) -> None:
    parallel, layer_scale, depth_scale, hidden, uniform, affine = flags
    model = transformer(
        layers=layers,
        size=size,
        placement=placement,
        stem=stem,
        parallel=parallel,
        layer_scale=layer_scale,
        depth_scale=depth_scale,
        hidden=hidden,
        uniform=uniform,
        affine=affine,
        opset=opset,
        seed=seed,
    )
    done = folded(model)
    refused = [r for r in done.remarks if r.outcome == "refused"]
    assert converted(done) + len(refused) == layer_norms(model)
    assert all(r.reason and r.at for r in refused)
    if (placement == "pre" or (parallel and placement != "post")) and not hidden and layers > 1:
        assert not refused


# ** mutants: each wrong formula must be caught by one of the networks **

MUTANTS: dict[str, tuple[Any, str, str, str]] = {
    "the mean of another factor": (
        layout_module,
        "Layout",
        "factors.append(part.size)",
        "factors.insert(0, part.size)",
    ),
    "no centering": (
        layout_module,
        "Layout",
        "np.asarray(factored - mean)",
        "np.asarray(factored)",
    ),
    "half the mean": (
        layout_module,
        "Layout",
        "np.asarray(factored - mean)",
        "np.asarray(factored - mean / 2)",
    ),
    "a transposed weight is not": (
        port_module,
        "_gemm_slots",
        '-2 if node.attrs.get("transB", 0) else -1',
        "-1",
    ),
    "beta goes through no weight": (
        shift_module,
        "Sink",
        "spread if self.inlet is None else self.inlet.through(spread)",
        "spread.reshape(-1)[:1] * 0",
    ),
    "Gemm's beta is forgotten": (shift_module, "Sink", "grown / self.gain", "grown"),
}


def _networks() -> list[onnx.ModelProto]:
    net = Net()
    x = net.op("Gemm", net.input("x", [5, 6]), net.matrix(8, 6), net.vector(8, 0.5), transB=1)
    normed = net.norm(x, 8)
    gemm = net.op("Gemm", normed, net.matrix(8, 8), net.vector(8, 0.2), beta=0.5)
    return [net.model(gemm), transformer(layers=1)]


def _agree() -> bool:
    try:
        for model in _networks():
            done = run(model, RULE)
            assert done.applied
            assert_parity(model, done.stored.complete())
    except (AssertionError, ValueError):
        return False
    return True


def test_the_unchanged_arithmetic_agrees() -> None:
    assert _agree()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, member, old, new = MUTANTS[name]
    changed = mutated(module, old, new)
    if member == "Layout":
        for method in ("centered", "_factors", "spread"):
            monkeypatch.setattr(module.Layout, method, getattr(changed["Layout"], method))
    elif member == "Sink":
        monkeypatch.setattr(module.Sink, "shift", changed["Sink"].shift)
    else:
        monkeypatch.setitem(module._SLOTS, "Gemm", changed[member])
    assert not _agree()


def test_a_lost_condition_is_caught() -> None:
    """Without its blockers a stream would be changed under a raw reader."""
    net = Net()
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    y = net.op("Add", net.norm(x, 8), net.linear(x, 8, 8))
    model = net.model(net.op("Relu", y))
    assert not run(model, RULE).applied
    original = stream_module.Entry.blockers
    try:
        stream_module.Entry.blockers = property(lambda self: [])  # type: ignore[method-assign,assignment]
        done = run(model, RULE)
    finally:
        stream_module.Entry.blockers = original  # type: ignore[method-assign]
    assert done.applied
    with pytest.raises(AssertionError):
        assert_parity(model, done.stored.complete())
    assert transfer_module.described(next(iter(_nodes(model)))).startswith("the linear layer")


def _nodes(model: onnx.ModelProto) -> list[Any]:
    from onnxnorm.module import Module

    return [n for n in Module(storage.from_proto(model)).nodes() if n.op == "MatMul"]


@pytest.mark.parametrize("opset", [13, 17, 18, 23])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("price", [0.0, 0.1])
def test_a_centering_with_one_reader_is_not_lowered_again(
    opset: int, dtype: Any, price: float
) -> None:
    net = Net(opset=opset, dtype=dtype)
    x = net.input("x", ["n", 5, 8])
    if opset < 17:
        mean = net.op("ReduceMean", x, axes=[-1])
        off = net.op("Sub", x, mean)
        square = net.op("ReduceMean", net.op("Mul", off, off), axes=[-1])
        root = net.op("Sqrt", net.op("Add", square, net.scalar(0.01)))
        normed = net.op("Mul", net.op("Div", off, root), net.vector(8, 1.0))
    else:
        normed = net.norm(x, 8)
    model = net.model(net.linear(normed, 8, 4))
    passes = (StreamFoldMean(centering=price), LowerNorms())
    done = run(model, *passes)
    assert (converted(done), centerings(done)) == (1, 1)
    assert not any(r.action == "lowered" for r in done.applied)
    assert_sound(model, done, *passes)
