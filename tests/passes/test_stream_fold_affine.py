"""Fold the scales on residual streams into what writes and reads them; dyadic goldens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxnorm import change, constant_edits, gauge, gauge_shift
from onnxnorm.passes import stream_fold_affine
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.stream_fold_affine import StreamFoldAffine
from onnxnorm.pipeline import Run
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.affine_networks import (
    Style,
    channel_norm,
    graph_transformer,
    post_norm_resnet,
    post_norm_transformer,
    pre_activation_resnet,
)
from tests.mutants import computes_the_same, mutated
from tests.networks import Net
from tests.texts import graph

RULE = StreamFoldAffine()
STYLES = ("between transposes", "sum", "unified", "written out", "scale")


A = "float[2,2] u = {1.0, 2.0, 3.0, 4.0}"
B = "float[2,2] v = {2.0, 1.0, 1.0, 3.0}"
C = "float[2,2] w = {1.0, -1.0, 2.0, 1.0}"
AFFINE = "float[2] s = {2.0, -4.0}, float[2] t = {1.0, 2.0}"


def remaining(done: Run, *kinds: str) -> int:
    """How many nodes of these kinds are left."""
    return sum(n.op_type in kinds for n in done.stored.proto.graph.node)


# ** goldens **


def test_a_post_norm_vanishes() -> None:
    # h' = s (h + h v + b) + t: what reads h' is multiplied by s, and b takes t / s.
    before = graph(
        "h = MatMul (x, u)\n c = MatMul (h, v)\n f = Add (c, b)\n r = Add (h, f)\n k = Mul (r, s)\n"
        " n = Add (k, t)\n d = MatMul (n, w)\n y = Add (d, n2)\n",
        f"{A}, {B}, {C}, {AFFINE}, float[2] b = {{1.0, 1.0}}, float[2] n2 = {{3.0, 5.0}}",
    )
    after = graph(
        "h = MatMul (x, u)\n c = MatMul (h, v)\n f = Add (c, b_rescaled)\n r = Add (h, f)\n"
        " d = MatMul (r, w_rescaled)\n y = Add (d, n2)\n",
        f"{A}, float[2] b_rescaled = {{1.5, 0.5}}, float[2] n2 = {{3.0, 5.0}}, {B},"
        " float[2,2] w_rescaled = {2.0, -2.0, -8.0, -4.0}",
    )
    done = assert_rewrites(before, after, RULE)
    (site,) = done.applied
    assert (site.site, site.action, site.region) == ("stream-fold-affine:k", "folded", None)


def test_scales_multiply_along_the_stream() -> None:
    # n1 = s h1, n2 = s (n1 + n1 v): v is read in units of s, and written in them too.
    before = graph(
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n n = Mul (r, s)\n"
        " g = MatMul (n, v)\n q = Add (g, n)\n m = Mul (q, s)\n y = MatMul (m, w)\n",
        f"{A}, {B}, {C}, float[2] s = {{2.0, 4.0}}",
    )
    after = graph(
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n g = MatMul (r, v_rescaled)\n"
        " q = Add (g, r)\n y = MatMul (q, w_rescaled)\n",
        # diag(2, 4) v diag(1/2, 1/4), and diag(4, 16) w
        f"{A}, {B}, float[2,2] v_rescaled = {{2.0, 0.5, 2.0, 3.0}},"
        " float[2,2] w_rescaled = {4.0, -4.0, 32.0, 16.0}",
    )
    assert_rewrites(before, after, RULE)


def test_transposes_around_a_norm_go_with_it() -> None:
    before = graph(
        "h = MatMul (x, u)\n c = MatMul (h, v)\n f = Add (c, b)\n r = Add (h, f)\n"
        " p = Transpose <perm = [0, 2, 1]> (r)\n"
        " k = BatchNormalization <epsilon = 0.0> (p, s, t, m, e)\n"
        " n = Transpose <perm = [0, 2, 1]> (k)\n y = MatMul (n, w)\n",
        f"{A}, {B}, {C}, float[2] b = {{1.0, 1.0}}, float[2] s = {{4.0, 2.0}},"
        " float[2] t = {3.0, 2.0}, float[2] m = {1.0, 0.0}, float[2] e = {4.0, 1.0}",
        x="N,3,2",
        y="N,3,2",
    )
    after = graph(  # 2 r + 1 and 2 r + 2
        "h = MatMul (x, u)\n c = MatMul (h, v)\n f = Add (c, b_rescaled)\n r = Add (h, f)\n"
        " y = MatMul (r, w_rescaled)\n",
        f"float[2] b_rescaled = {{1.5, 2.0}}, {A}, {B},"
        " float[2,2] w_rescaled = {2.0, -2.0, 4.0, 2.0}",
        x="N,3,2",
        y="N,3,2",
    )
    assert_rewrites(before, after, RULE)


def test_relu_is_crossed_by_scales_above_zero() -> None:
    one = "float[2,2,1,1]"
    before = graph(
        "h = Conv (x, u)\n f = Conv (h, v, b)\n r = Add (f, h)\n"
        " k = BatchNormalization <epsilon = 0.0> (r, s, t, m, e)\n n = Relu (k)\n"
        " g = Conv (n, v)\n q = Add (n, g)\n y = Conv (q, w)\n",
        f"{one} u = {{1.0, 2.0, 3.0, 4.0}}, {one} v = {{2.0, 1.0, 1.0, 3.0}},"
        f" {one} w = {{1.0, -1.0, 2.0, 1.0}}, float[2] b = {{1.0, 1.0}},"
        " float[2] s = {2.0, 4.0}, float[2] t = {1.0, -2.0}, float[2] m = {0.0, 0.0},"
        " float[2] e = {1.0, 1.0}",
        x="N,2,3,3",
        y="N,2,3,3",
    )
    after = graph(
        "h = Conv (x, u)\n f = Conv (h, v, b_rescaled)\n r = Add (f, h)\n n = Relu (r)\n"
        " g = Conv (n, v_rescaled)\n q = Add (n, g)\n y = Conv (q, w_rescaled)\n",
        f"float[2] b_rescaled = {{1.5, 0.5}}, {one} u = {{1.0, 2.0, 3.0, 4.0}},"
        f" {one} v = {{2.0, 1.0, 1.0, 3.0}}, {one} v_rescaled = {{2.0, 2.0, 0.5, 3.0}},"
        f" {one} w_rescaled = {{2.0, -4.0, 4.0, 4.0}}",
        x="N,2,3,3",
        y="N,2,3,3",
    )
    assert_rewrites(before, after, RULE)


UNIT = "float[2] m = {0.0, 0.0}, float[2] e = {1.0, 1.0}"


def test_an_operator_whose_shift_has_no_bias_stays() -> None:
    # The first norm has no bias in front of it, and an Add is no less than it is; the second has.
    before = graph(
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n"
        " k = BatchNormalization <epsilon = 0.0> (r, s, t, m, e)\n d = MatMul (k, v)\n"
        " g = Add (d, b)\n q = Add (k, g)\n"
        " n = BatchNormalization <epsilon = 0.0> (q, s, t, m, e)\n y = MatMul (n, w)\n",
        f"{A}, {B}, {C}, float[2] b = {{1.0, 1.0}}, float[2] s = {{2.0, 4.0}},"
        f" float[2] t = {{1.0, 2.0}}, {UNIT}",
    )
    after = graph(
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n"
        " k = BatchNormalization <epsilon = 0.0> (r, s, t, m, e)\n d = MatMul (k, v)\n"
        " g = Add (d, b_rescaled)\n q = Add (k, g)\n y = MatMul (q, w_rescaled)\n",
        f"{A}, {B}, float[2] b_rescaled = {{1.5, 1.5}}, float[2] s = {{2.0, 4.0}},"
        f" float[2] t = {{1.0, 2.0}}, float[2,2] w_rescaled = {{2.0, -2.0, 8.0, 4.0}}, {UNIT}",
    )
    done = assert_rewrites(before, after, RULE)
    refused = {r.site: (r.at, r.reason) for r in done.remarks if r.outcome == "refused"}
    assert refused == {
        "stream-fold-affine:k": (
            "f",
            "the linear layer 'f' has no bias, and an Add in place of it would save nothing",
        )
    }


def test_a_shift_without_a_bias_stays_as_an_add_where_nodes_go() -> None:
    # Written out, the first norm loses its Mul: the Add stays, in the new units.
    before = graph(
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n"
        " p = Mul (r, s)\n k = Add (p, t)\n d = MatMul (k, v)\n"
        " g = Add (d, b)\n q = Add (k, g)\n"
        " n = BatchNormalization <epsilon = 0.0> (q, s, t, m, e)\n y = MatMul (n, w)\n",
        f"{A}, {B}, {C}, float[2] b = {{1.0, 1.0}}, float[2] s = {{2.0, 4.0}},"
        f" float[2] t = {{1.0, 2.0}}, {UNIT}",
    )
    after = graph(
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n k = Add (r, t_rescaled)\n"
        " d = MatMul (k, v_rescaled)\n g = Add (d, b_rescaled)\n q = Add (k, g)\n"
        " y = MatMul (q, w_rescaled)\n",
        # b / 2 + t / 4 and b / 4 + t / 16
        f"float[2] b_rescaled = {{0.75, 0.375}}, float[2] t_rescaled = {{0.5, 0.5}}, {A}, {B},"
        " float[2,2] v_rescaled = {2.0, 0.5, 2.0, 3.0},"
        " float[2,2] w_rescaled = {4.0, -4.0, 32.0, 16.0}",
    )
    assert_rewrites(before, after, RULE)


def test_a_shift_without_a_bias_stays_as_an_add_where_transposes_go() -> None:
    turn = "Transpose <perm = [0, 2, 1]>"
    before = graph(
        f"h = MatMul (x, u)\n c = MatMul (h, v)\n r = Add (h, c)\n p = {turn} (r)\n"
        f" k = BatchNormalization <epsilon = 0.0> (p, s, t, m, e)\n n = {turn} (k)\n"
        " y = MatMul (n, w)\n",
        f"{A}, {B}, {C}, float[2] s = {{2.0, 4.0}}, float[2] t = {{1.0, 2.0}}, {UNIT}",
        x="N,3,2",
        y="N,3,2",
    )
    after = graph(
        "h = MatMul (x, u)\n c = MatMul (h, v)\n r = Add (h, c)\n n = Add (r, n_shift)\n"
        " y = MatMul (n, w_rescaled)\n",
        f"float[2] n_shift = {{0.5, 0.5}}, {A}, {B},"
        " float[2,2] w_rescaled = {2.0, -2.0, 8.0, 4.0}",
        x="N,3,2",
        y="N,3,2",
    )
    assert_rewrites(before, after, RULE)


def test_a_norm_that_stays_takes_the_shift_of_what_is_behind_it() -> None:
    model = _followed()
    done = run(model, RULE)
    counts = Counter(n.op_type for n in model.graph.node)
    counts["BatchNormalization"] -= 1
    assert Counter(n.op_type for n in done.stored.proto.graph.node) == counts
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, RULE)


def test_a_shift_that_the_next_sum_takes_back() -> None:
    # relu(2 h + 2) = 2 relu(h + 1): h gets 1 from its bias, and the branch gives it back.
    one = "float[2,2,1,1]"
    before = graph(
        "h = Conv (x, u, b)\n k = BatchNormalization <epsilon = 0.0> (h, s, t, m, e)\n"
        " n = Relu (k)\n f = Conv (n, v, c)\n r = Add (h, f)\n y = Conv (r, w)\n",
        f"{one} u = {{1.0, 2.0, 3.0, 4.0}}, {one} v = {{2.0, 1.0, 1.0, 3.0}},"
        f" {one} w = {{1.0, -1.0, 2.0, 1.0}}, float[2] b = {{1.0, 1.0}}, float[2] c = {{3.0, 5.0}},"
        f" float[2] s = {{2.0, 4.0}}, float[2] t = {{2.0, -2.0}}, {UNIT}",
        x="N,2,3,3",
        y="N,2,3,3",
    )
    after = graph(
        "h = Conv (x, u, b_rescaled)\n n = Relu (h)\n f = Conv (n, v_rescaled, c_rescaled)\n"
        " r = Add (h, f)\n y = Conv (r, w)\n",
        f"float[2] b_rescaled = {{2.0, 0.5}}, float[2] c_rescaled = {{2.0, 5.5}},"
        f" {one} u = {{1.0, 2.0, 3.0, 4.0}}, {one} v_rescaled = {{4.0, 4.0, 2.0, 12.0}},"
        f" {one} w = {{1.0, -1.0, 2.0, 1.0}}",
        x="N,2,3,3",
        y="N,2,3,3",
    )
    done = assert_rewrites(before, after, RULE)
    assert [site.site for site in done.applied] == ["stream-fold-affine:k"]


def test_one_norm_stays_between_two_fixed_ends() -> None:
    # x is an input and read as it is; the last norm takes up the units of the first.
    before = graph(
        "f = MatMul (x, v)\n r = Add (x, f)\n n = Mul (r, s)\n g = MatMul (n, v)\n"
        " q = Add (n, g)\n m = Mul (q, s)\n y = Sigmoid (m)\n",
        f"{B}, float[2] s = {{2.0, 4.0}}",
    )
    after = graph(
        "f = MatMul (x, v)\n r = Add (x, f)\n g = MatMul (r, v_rescaled)\n q = Add (r, g)\n"
        " m = Mul (q, s_rescaled)\n y = Sigmoid (m)\n",
        f"float[2] s_rescaled = {{4.0, 16.0}}, {B}, float[2,2] v_rescaled = {{2.0, 0.5, 2.0, 3.0}}",
    )
    done = assert_rewrites(before, after, RULE)
    (refused,) = [r for r in done.remarks if r.outcome == "refused"]
    assert refused.reason == (
        "the stream is fixed at both ends: 'x' comes from outside, and Sigmoid 'y' reads 'm' and"
        " is not linear"
    )


def test_the_product_begins_anew_beyond_its_bound() -> None:
    before = graph(
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n n = Mul (r, s)\n"
        " g = MatMul (n, v)\n q = Add (g, n)\n m = Mul (q, s)\n y = MatMul (m, w)\n",
        f"{A}, {B}, {C}, float[2] s = {{8.0, 8.0}}",
    )
    assert remaining(run(before, StreamFoldAffine(bound=2)), "Mul") == 1
    assert remaining(run(before, StreamFoldAffine(bound=3)), "Mul") == 0
    again = run(before, StreamFoldAffine(bound=2)).stored.complete()
    assert not run(again, StreamFoldAffine(bound=2)).applied
    assert_refuses(before, StreamFoldAffine(bound=1))


# ** networks **


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("stem", ["linear", "embedding"])
def test_a_post_norm_transformer_loses_every_norm(style: Style, stem: Any) -> None:
    model = post_norm_transformer(style=style, stem=stem, layers=2)
    bare = Counter(n.op_type for n in post_norm_transformer(style="none", stem=stem).graph.node)
    done = run(model, RULE)
    assert Counter(n.op_type for n in done.stored.proto.graph.node) == bare
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, RULE)


def test_a_graph_transformer_loses_every_norm() -> None:
    # Nodes and edges have a stream each; the scores between them are clipped.
    model = graph_transformer()
    done = run(model, RULE)
    assert remaining(done, "BatchNormalization") == 0
    assert len(done.applied) == 2
    assert_parity(model, done.stored.complete())


@pytest.mark.parametrize("relu", [True, False])
def test_a_residual_network_with_norms_behind_the_addition(relu: bool) -> None:
    model = post_norm_resnet(relu=relu, signed=not relu, pool=True, bottleneck=True)
    done = run(model, RULE)
    assert remaining(done, "BatchNormalization") == 0
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, RULE)


def test_scales_of_a_residual_path() -> None:
    # x' = r * x + f(x), as in MetaFormer: the scale stands on the skip path alone.
    net = Net()
    x = net.linear(net.input("x", ["batch", 5, 6]), 6, 8)
    for _ in range(3):
        branch = net.mlp(net.norm(x, 8), 8)  # layer norms fix the stream
        x = net.op("Add", net.op("Mul", x, net.vector(8, 1.0)), branch)
    model = net.model(net.linear(x, 8, 3))
    done = run(model, RULE)
    assert remaining(done, "Mul") == 2  # the last has linear readers only behind it
    assert_parity(model, done.stored.complete())


def test_a_layer_norm_writes_a_stream_with_its_scale_and_bias() -> None:
    net = Net()
    x = net.norm(net.linear(net.input("x", ["batch", 5, 6]), 6, 8), 8)
    x = channel_norm(net, net.op("Add", x, net.mlp(x, 8)), 8)
    x = channel_norm(net, net.op("Add", x, net.mlp(x, 8)), 8)
    model = net.model(net.op("Softmax", x, axis=-1))  # fixed there, and free at the layer norm
    done = run(model, RULE)
    assert remaining(done, "BatchNormalization") == 0
    assert_parity(model, done.stored.complete())


def test_the_scalar_of_a_gelu_stays_where_the_runtime_fuses_it() -> None:
    net = Net()
    x = net.linear(net.input("x", ["batch", 5, 6]), 6, 8)
    inner = net.op("Erf", net.op("Div", x, net.scalar(2.0**0.5)))
    gelu = net.op("Mul", net.op("Mul", x, net.op("Add", inner, net.scalar(1.0))), net.scalar(0.5))
    y = net.op("Add", gelu, net.op("Mul", net.linear(gelu, 8, 8), net.vector(8, 1.0)))
    model = net.model(net.linear(y, 8, 3))
    done = run(model, RULE)
    halves = [t for t in done.stored.complete().graph.initializer if not t.dims]
    assert 0.5 in [float(onnx.numpy_helper.to_array(t)) for t in halves]


# ** what stands in the way: seeds of wrong folds, each by its name **

CONSTANTS = f"{A}, {B}, {C}, {AFFINE}, float[2] b = {{1.0, 1.0}}"
STREAM = (
    "h = MatMul (x, u)\n c = MatMul (h, v)\n f = Add (c, b)\n r = Add (h, f)\n"
    " k = Mul (r, s)\n n = Add (k, t)\n"
)
AGAIN = " d = MatMul (n, w)\n y = Add (n, d)\n"


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        # a gamma of 0 in the gauge
        (f"{STREAM}{AGAIN}", CONSTANTS.replace("2.0, -4.0", "2.0, 0.0"), "has the scale 0"),
        # the stream as an output of the graph, read as it is at the other end
        (
            STREAM.replace("h = MatMul (x, u)", "h = Sigmoid (x)") + AGAIN,
            CONSTANTS,
            "the stream is fixed at both ends: Sigmoid 'h' writes this stream and is not linear",
        ),
        # one that Relu reads, with scales below 0
        (
            STREAM.replace("h = MatMul (x, u)", "a = MatMul (x, u)\n h = Relu (a)")
            + " z = Relu (n)\n d = MatMul (z, w)\n y = MatMul (d, w)\n",
            CONSTANTS,
            "Mul 'k' has scales below 0, and Relu",
        ),
        # a router that reads the raw stream
        (
            STREAM.replace("h = MatMul (x, u)", "h = Sigmoid (x)")
            + " a = Softmax <axis = -1> (n)\n y = Mul (a, n)\n",
            CONSTANTS,
            "reads 'n' and is not linear",
        ),
        # weights of the run, as a hypernetwork makes them
        (
            STREAM.replace("h = MatMul (x, u)", "h = MatMul (x, x)") + " y = MatMul (n, x)\n",
            CONSTANTS,
            "the stream is fixed at both ends",
        ),
        # one scale on both sides of an Add
        (
            (
                "h = MatMul (x, u)\n k = Mul (h, s)\n r = Add (h, k)\n d = MatMul (r, w)\n"
                " y = MatMul (k, w)\n y2 = Add (d, y)\n"
            ),
            CONSTANTS,
            "is added to its result again",
        ),
        # quantization between the stream and the linear operator
        (
            STREAM.replace("h = MatMul (x, u)", "h = Sigmoid (x)")
            + " q = QuantizeLinear (n, one)\n a = DequantizeLinear (q, one)\n y = MatMul (a, w)\n",
            f"{CONSTANTS}, float one = {{0.5}}",
            "QuantizeLinear 'q' reads 'n' and is not linear",
        ),
        # a rotary embedding: cosines and sines with nothing linear around them
        (
            (
                "k = Mul (x, s)\n a = Sigmoid (x)\n c = Mul (a, t)\n r = Add (k, c)\n"
                " m = Mul (r, b)\n y = Sigmoid (m)\n"
            ),
            CONSTANTS,
            "no linear operator writes or reads",
        ),
    ],
)
def test_refusals(body: str, constants: str, reason: str) -> None:
    shape = "2,2" if "(x, x)" in body else "N,2"
    assert_refuses(graph(body, constants, x=shape, y=shape), RULE, reason)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"low": 2.0**-5}, "too, and it would be stored 20.2 times as large"),
        ({"signed": True}, "has scales below 0, and Relu"),
        ({"act": "Sigmoid"}, "the stream is fixed at both ends: Sigmoid"),
    ],
)
def test_norms_of_pre_activations_that_stay(options: Any, reason: str) -> None:
    model = pre_activation_resnet(**options)
    done = run(model, RULE)
    reasons = [r.reason for r in done.remarks if r.outcome == "refused"]
    assert any(reason in r for r in reasons), reasons
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, RULE)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        # another norm that is read beside the first
        (
            (
                "q = BatchNormalization <epsilon = 0.5> (h, s, t, m, e)\n g = Relu (q)\n"
                " z = Add (r, g)\n"
            ),
            "reads 'h' too",
        ),
        # what is not linear
        ("g = Sigmoid (h)\n z = Add (r, g)\n", "reads 'h' too"),
        # a sum with nothing that could take it back
        ("g = Add (h, h)\n z = Add (r, g)\n", "reads 'h' too, and adds it twice"),
        # a maximum over other channels
        ("g = GlobalMaxPool (h)\n i = Sigmoid (g)\n z = Add (r, i)\n", "reads 'h' too"),
    ],
)
def test_others_that_would_see_the_shift(rest: str, reason: str) -> None:
    one = "float[2,2,1,1]"
    before = graph(
        "h = Conv (x, u, b)\n k = BatchNormalization <epsilon = 0.0> (h, s, t, m, e)\n"
        f" n = Relu (k)\n f = Conv (n, v, b)\n r = Add (h, f)\n {rest} y = Conv (z, v)\n",
        f"{one} u = {{1.0, 2.0, 3.0, 4.0}}, {one} v = {{2.0, 1.0, 1.0, 3.0}},"
        " float[2] b = {1.0, 1.0}, float[2] s = {2.0, 4.0}, float[2] t = {2.0, -2.0},"
        f" {UNIT}",
        x="N,2,3,3",
        y="N,2,3,3",
    )
    assert_refuses(before, RULE, reason)


def test_negative_scales_do_not_cross_relu() -> None:
    model = post_norm_resnet(signed=True, seed=3)
    done = run(model, RULE)
    reasons = [r.reason for r in done.remarks if r.outcome == "refused"]
    assert reasons
    assert all("has scales below 0, and Relu" in r for r in reasons)
    assert_parity(model, done.stored.complete())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<epsilon = 0.0>", "<epsilon = 0.0, training_mode = 1>"),
        ("(p, s, t, m, e)", "(p, s, t, z, e)"),
    ],
)
def test_statistics_of_the_batch(old: str, new: str) -> None:
    body = (
        "h = MatMul (x, u)\n f = MatMul (h, v)\n r = Add (h, f)\n"
        " p = Transpose <perm = [0, 2, 1]> (r)\n z = ReduceMean <axes = [0, 2], keepdims = 0> (p)\n"
        " k = BatchNormalization <epsilon = 0.0> (p, s, t, m, e)\n"
        " n = Transpose <perm = [0, 2, 1]> (k)\n y = MatMul (n, w)\n"
    ).replace(old, new)
    given = f"{A}, {B}, {C}, {AFFINE}, float[2] m = {{0.0, 0.0}}, float[2] e = {{1.0, 1.0}}"
    done = run(graph(body, given, x="N,3,2", y="N,3,2"), RULE)
    assert not done.applied


def test_shared_weights_are_copied_within_a_budget() -> None:
    # ALBERT with affine norms: every block has the same weights, and would need its own.
    net = Net()
    x = net.linear(net.input("x", ["batch", 5, 6]), 6, 8)
    weight, bias = net.matrix(8, 8), net.vector(8)
    for _ in range(3):
        branch = net.op("Add", net.op("MatMul", x, weight), bias)
        x = channel_norm(net, net.op("Add", x, branch), 8, style="written out")
    model = net.model(net.linear(x, 8, 3))
    done = run(model, RULE)
    assert remaining(done, "Mul") == 0
    assert_parity(model, done.stored.complete())
    assert_refuses(model, StreamFoldAffine(max_growth_mb=0), "are shared, and copies would take")


def test_a_stream_that_a_body_reads_stays() -> None:
    before = graph(
        "h = Sigmoid (x)\n c = MatMul (h, v)\n r = Add (h, c)\n n = Mul (r, s)\n"
        " y = If (q) <then_branch = g1 () => (float[N,2] z) { z = Identity (n) },"
        " else_branch = g2 () => (float[N,2] z) { z = Neg (n) }>\n",
        f"{B}, {AFFINE}, bool q = {{1}}",
    )
    assert_refuses(before, RULE, "reads 'n' inside a body")


def test_weights_that_would_leave_their_range() -> None:
    half = post_norm_transformer(layers=1, style="scale", dtype=np.float16, low=4000.0)
    assert_refuses(half, RULE, "beyond 2^6")
    net = Net(dtype=np.float16)
    x = net.linear(net.input("x", ["batch", 5, 6]), 6, 4)
    r = net.op("Add", x, net.linear(x, 4, 4))
    n = net.op("Mul", r, net.keep(np.full(4, 32.0) + np.arange(4)))
    big = net.keep(np.full((4, 3), 30000.0))
    model = net.model(net.op("Sigmoid", net.op("MatMul", n, big)))
    assert_refuses(model, RULE, "that is not finite in float16")


def _stream(net: Net) -> tuple[str, str]:
    """A residual stream with a norm on it: before the norm, and behind it."""
    h = net.linear(net.input("x", ["batch", 6, 6]), 6, 8)
    r = net.op("Add", h, net.linear(h, 8, 8))
    return r, channel_norm(net, r, 8, style="written out")


def _mixer(net: Net, x: str) -> str:
    """Tokens are mixed by a weight on the left and by one behind a Transpose."""
    x = net.op("Add", x, net.op("MatMul", net.matrix(6, 6), x))
    turned = net.op("Relu", net.linear(net.op("Transpose", x, perm=[0, 2, 1]), 6, 6))
    return net.op("Add", x, net.linear(net.op("Transpose", turned, perm=[0, 2, 1]), 8, 8))


def _tied(net: Net, x: str) -> str:
    """One weight both writes the stream and reads it."""
    weight = net.matrix(8, 8)
    x = channel_norm(net, net.op("Add", x, net.op("MatMul", x, weight)), 8, style="written out")
    return net.op("MatMul", x, net.op("Transpose", weight, perm=[1, 0]))


def _grouped(net: Net, x: str) -> str:
    """Convolutions in two groups, one of them transposed, read the stream and write it."""
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1]), net.ints(0, 8, 2, 3))
    y = net.op("Conv", x, net.matrix(8, 4, 3, 3), net.vector(8), pads=[1] * 4, group=2)
    x = channel_norm(net, net.op("Add", x, y), 8, style="operator", tokens=False)
    y = net.op("ConvTranspose", x, net.matrix(8, 4, 3, 3), net.vector(8), pads=[1] * 4, group=2)
    x = channel_norm(net, net.op("Add", y, x), 8, style="operator", tokens=False)
    return net.op("Transpose", net.op("Reshape", x, net.ints(0, 8, 6)), perm=[0, 2, 1])


def _padded(net: Net, x: str) -> str:
    """A border of ones around the tokens."""
    return net.op("Pad", x, net.ints(0, 1, 0, 0, 1, 0), net.scalar(1.0))


def _merged(net: Net, x: str) -> str:
    """Two tokens side by side, as Swin merges four."""
    ends = [net.op("Slice", x, net.ints(a), net.ints(9), net.ints(1), net.ints(2)) for a in (0, 1)]
    return net.op("MatMul", net.op("Concat", *ends, axis=2), net.matrix(16, 8))


def _joined(net: Net, x: str) -> str:
    """A long skip joined along the features, as U-ViT has it."""
    return net.linear(net.op("Concat", x, net.op("Relu", x), axis=2), 16, 8)


@pytest.mark.parametrize("rest", [_mixer, _tied, _grouped, _padded, _merged, _joined])
def test_streams_that_are_read_in_other_ways(rest: Any) -> None:
    net = Net(seed=5)
    _, x = _stream(net)
    model = net.model(net.linear(rest(net, x), 8, 3))
    done = run(model, RULE)
    assert remaining(done, "Mul", "BatchNormalization") == 0
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, RULE)


def test_what_reads_the_stream_raw_keeps_its_units() -> None:
    net = Net(seed=5)
    r, x = _stream(net)
    model = net.model(net.linear(x, 8, 3), net.op("Sigmoid", r), net.op("Sigmoid", x))
    assert_refuses(model, RULE, "the stream is fixed at both ends: Sigmoid")


# ** properties **


@settings(max_examples=20, deadline=None)
@given(
    layers=st.integers(1, 3),
    style=st.sampled_from(STYLES),
    stem=st.sampled_from(["linear", "gelu", "embedding"]),
    bias=st.booleans(),
    signed=st.booleans(),
    hidden=st.booleans(),
    whole=st.booleans(),
    low=st.sampled_from([0.5, 2.0**-9, 30.0]),
    bound=st.sampled_from([40, 3]),
    seed=st.integers(0, 99),
)
def test_transformers_agree(bound: int, **options: Any) -> None:
    model = post_norm_transformer(**options)
    rule = StreamFoldAffine(bound=bound)
    done = run(model, rule)
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, rule)


@settings(max_examples=20, deadline=None)
@given(
    blocks=st.integers(1, 3),
    relu=st.booleans(),
    style=st.sampled_from(["operator", "written out"]),
    signed=st.booleans(),
    pool=st.booleans(),
    bottleneck=st.booleans(),
    low=st.sampled_from([0.5, 2.0**-9, 30.0]),
    bound=st.sampled_from([40, 3]),
    seed=st.integers(0, 99),
)
def test_residual_networks_agree(bound: int, **options: Any) -> None:
    model = post_norm_resnet(**options)
    rules = (FoldAffine(), StreamFoldAffine(bound=bound))
    done = run(model, *rules)
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, *rules)


@settings(max_examples=20, deadline=None)
@given(
    blocks=st.integers(1, 3),
    act=st.sampled_from(["Relu", "LeakyRelu"]),
    style=st.sampled_from(["operator", "written out"]),
    signed=st.booleans(),
    pool=st.booleans(),
    kind=st.sampled_from(["Add", "Sub", "Sum"]),
    low=st.sampled_from([1.0, 0.5, 2.0**-9]),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
def test_networks_of_pre_activations_agree(**options: Any) -> None:
    model = pre_activation_resnet(**options)
    rules = (FoldAffine(), RULE)
    done = run(model, *rules)
    if options["style"] == "operator" and options["low"] == 1.0 and not options["signed"]:
        assert remaining(done, "BatchNormalization") == 0
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, *rules)


@settings(max_examples=10, deadline=None)
@given(
    dtype=st.sampled_from([np.float16, np.float64, ml_dtypes.bfloat16]),
    style=st.sampled_from(STYLES),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_types_agree(dtype: Any, style: Style, bias: bool, seed: int) -> None:
    model = post_norm_transformer(dtype=dtype, style=style, bias=bias, seed=seed)
    done = run(model, RULE)
    lost = {r.reason for r in done.remarks if r.reason and "too small for float16" in r.reason}
    assert bool(lost) == (remaining(done, "BatchNormalization", "Mul") > 2)  # 2 are of attention
    kinds = {t.data_type for t in done.stored.complete().graph.initializer} - {7}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}
    assert_sound(model, done, RULE)
    if dtype is not ml_dtypes.bfloat16:  # onnxruntime has no MatMul in it on the CPU
        assert_parity(model, done.stored.complete())


# ** mutants **

MUTANTS = {
    "readers in the wrong units": (
        stream_fold_affine, "factors = layout.spread(self.gauge.factor(value), 0).reshape(-1)",
        "factors = layout.spread(1.0 / self.gauge.factor(value), 0).reshape(-1)"),
    "writers in the wrong units": (
        stream_fold_affine, "writer.spread(1.0 / self.gauge.factor(writer.value))",
        "writer.spread(self.gauge.factor(writer.value))"),
    "a shift in the units of the model": (
        stream_fold_affine, "None if step.shift is None else step.shift / factor)",
        "step.shift)"),
    "a kept norm with the old mean": (
        stream_fold_affine, "(3, 1.0 / before)", "(3, 1.0 / after)"),
    "a kept norm with the old bias": (
        stream_fold_affine, "(2, 1.0 / after)", "(2, 1.0 / before)"),
    "a kept scale the wrong way round": (
        stream_fold_affine, 'after / before if step.node.op == "Div" else before / after',
        'before / after if step.node.op == "Div" else after / before'),
    "a shift that others read too": (
        gauge_shift, "                return Stop(node, told)", "                continue"),
    "a shift that is not taken back": (
        gauge_shift, "demands if d.index != own[0]), -shift)",
        "demands if d.index != own[0]), 0.0 * shift)"),
    "a difference that takes it back": (
        gauge_shift, 'shift = -shift if node.op == "Sub" and own[0] == 1 else shift',
        "shift = shift"),
    "the bias of a norm that stays": (
        gauge_shift, "self.edits.shift, step.node, 2, bias, shift",
        "self.edits.shift, step.node, 2, bias, 0.5 * shift"),
    "the shift of a sum that stays": (
        stream_fold_affine, "else step.shift / after", "else step.shift"),
    "the shift that moves leave": (
        stream_fold_affine, "shift = rounded(layout.spread(self._adds.pop(last), 0)",
        "shift = rounded(layout.spread(0.5 * self._adds.pop(last), 0)"),
    "the ratio upside down": (
        gauge, "wanted = step.scale * one.factors[source]",
        "wanted = one.factors[source] / step.scale"),
    "a sign that Relu sees": (
        gauge, "            if not bool((sign == reference).all()):", "            if False:"),
    "fixed ends that disagree": (
        gauge, "if not bool((np.abs(factors[at] / factors[fixed[0]] - 1.0) <= _SAME).all()):",
        "if False:"),
    "a cycle that disagrees": (
        gauge, "            if bool((np.abs(by - 1.0) <= _SAME).all()):", "            if True:"),
    "the shift before the scale": (
        change, "moved if shift is None else moved + shift",
        "moved if shift is None else moved - shift"),
}  # fmt: skip


def agrees(names: dict[str, Any]) -> bool:
    """Whether a changed pass is right on networks that need everything in it."""
    options: list[dict[str, Any]] = [
        {"style": "between transposes", "hidden": True, "stem": "gelu", "whole": True},
        {"style": "written out", "hidden": True, "stem": "gelu", "bias": False},
    ]
    models = [post_norm_transformer(**o) for o in options]
    models.append(post_norm_resnet(signed=True, seed=3))
    models.append(pre_activation_resnet(kind="Sub", pool=True))
    models += [_looped(), _followed(), post_norm_transformer(style="unified", bias=False)]
    # The product of three leaves its bound, and that of the last one counts from the other end.
    models.append(post_norm_transformer(style="sum", stem="gelu", whole=True, low=2.0**-19))
    rule = names["StreamFoldAffine"](bound=40)
    return all(computes_the_same(model, rule) for model in models)


def _looped() -> onnx.ModelProto:
    """A scale on one way of two, and a Div; both ends fixed, and values that others read too."""
    net = Net()
    x = net.op("Sigmoid", net.linear(net.input("x", ["batch", 5, 6]), 6, 8))
    branch = net.linear(x, 8, 8)
    r = net.op("Add", x, branch)
    y = net.op("Mul", r, net.vector(8, 1.0))
    y = net.op("Add", net.op("Add", y, net.vector(8)), net.linear(branch, 8, 8))
    twice = net.op("Mul", y, net.vector(8, 2.0))
    y = net.op("Add", net.op("Add", y, twice), net.linear(twice, 8, 8))
    y = net.op("Div", y, net.vector(8, 3.0))
    y = net.op("Add", y, net.linear(y, 8, 8))
    return net.model(net.op("Sigmoid", net.op("Div", y, net.vector(8, 2.0))), net.op("Tanh", r))


def _followed() -> onnx.ModelProto:
    """Two norms in a row between fixed ends."""
    net = Net()
    x = net.op("Sigmoid", net.linear(net.input("x", ["batch", 6, 5]), 5, 5))
    x = net.op("Add", x, net.op("MatMul", net.matrix(6, 6), x))
    for _ in range(2):
        x = channel_norm(net, x, 6, style="operator", tokens=False)
    return net.model(net.op("Sigmoid", x))


def test_what_the_mutants_are_held_against_agrees() -> None:
    assert agrees(vars(stream_fold_affine))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old, new = MUTANTS[name]
    names = mutated(source, old, new)
    if source in (gauge, gauge_shift):
        piece = "Gauge" if source is gauge else "Shifts"
        monkeypatch.setattr(stream_fold_affine, piece, names[piece])
    elif source is change:
        for piece in ("changed", "results"):
            monkeypatch.setattr(constant_edits, piece, names[piece])
    assert not agrees(names if source is stream_fold_affine else vars(stream_fold_affine))
