"""Sums of convolutions of one input are one convolution. Dyadic constants make goldens exact."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxnorm.passes import merge_parallel_convolutions
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.passes.merge_parallel_convolutions import MergeParallelConvolutions
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.affine_networks import channel_norm
from tests.mutants import computes_the_same, mutated
from tests.networks import Net

RULE = MergeParallelConvolutions()
WIDE = "float[2,2,3] v = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0}"
POINT = "float[2,2,1] w = {0.5, 1.5, 2.5, 3.5}"
ONE, OTHER = "float[2] b = {1.0, 2.0}", "float[2] c = {0.5, 0.25}"
BIAS = f"{ONE}, {OTHER}"
NORM = (
    "float[2] g = {2.0, 3.0}, float[2] h = {0.5, 1.0}, float[2] m = {1.0, -2.0},"
    " float[2] e = {4.0, 9.0}"
)
PAD = "Conv <pads = [1, 1]>"


def graph(body: str, weights: str, outputs: str = "") -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,4] x) => (float[N,2,4] y{outputs})
    <{weights}>
    {{
       {body}
    }}
    """


def merged(weight: str, bias: str = "") -> str:
    given = f", float[2] y_bias = {bias}" if bias else ""
    inputs = "x, y_weight, y_bias" if bias else "x, y_weight"
    return graph(f"y = {PAD} ({inputs})", f"float[2,2,3] y_weight = {weight}{given}")


@pytest.mark.parametrize(
    ("body", "weights", "after"),
    [
        (  # the point lies on the middle tap
            f"f = {PAD} (x, v, b)\n k = Conv (x, w, c)\n y = Add (f, k)",
            f"{WIDE}, {POINT}, {BIAS}",
            merged(
                "{1.0, 2.5, 3.0, 4.0, 6.5, 6.0, 7.0, 10.5, 9.0, 10.0, 14.5, 12.0}", "{1.5, 2.25}"
            ),
        ),
        (  # and is subtracted from; only one has a bias
            f"f = {PAD} (x, v)\n k = Conv (x, w, c)\n y = Sub (k, f)",
            f"{WIDE}, {POINT}, {OTHER}",
            merged(
                "{-1.0, -1.5, -3.0, -4.0, -3.5, -6.0, -7.0, -5.5, -9.0, -10.0, -7.5, -12.0}",
                "{0.5, 0.25}",
            ),
        ),
        (  # the input itself
            f"f = {PAD} (x, v)\n y = Add (x, f)",
            WIDE,
            merged("{1.0, 3.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 12.0}"),
        ),
        (  # x - 0.5 and x + 3, and zero that is added to the convolution
            (
                f"n = BatchNormalization <epsilon = 0.0> (x, g, h, m, e)\n f = {PAD} (x, v)\n"
                " z = Add (f, o)\n y = Add (n, z)"
            ),
            f"{WIDE}, {NORM}, float o = {{0.0}}",
            merged(
                "{1.0, 3.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 12.0}", "{-0.5, 3.0}"
            ),
        ),
        (  # twice what a convolution makes
            f"f = {PAD} (x, v, b)\n d = Mul (f, o)\n y = Sub (d, x)",
            f"{WIDE}, {ONE}, float o = {{2.0}}",
            merged(
                "{2.0, 3.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 21.0, 24.0}", "{2.0, 4.0}"
            ),
        ),
    ],
)
def test_two_branches(body: str, weights: str, after: str) -> None:
    assert_rewrites(graph(body, weights), after, RULE)


BOTH = f"f = {PAD} (x, v, b)\n k = Conv (x, w, c)\n y = Add (f, k)"
GIVEN = f"{WIDE}, {POINT}, {BIAS}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (graph(BOTH, GIVEN, ", float[N,2,4] k"), "'k' is a graph output"),
        (graph(BOTH.replace("y =", "z =") + "\n y = Add (z, k)", GIVEN), "'k' has other readers"),
        (
            graph(f"f = {PAD} (x, v)\n k = {PAD} (x, v)\n y = Add (f, k)", WIDE),
            "'v' has other readers",
        ),
        (  # it reads the pixels before those that it makes
            graph("f = Conv <pads = [3, -1]> (x, v)\n y = Add (x, f)", WIDE),
            "makes another image",
        ),
        (
            graph(BOTH.replace("pads = [1, 1]", "pads = [1, 1], auto_pad = 'SAME_UPPER'"), GIVEN),
            "pads by SAME_UPPER",
        ),
        (  # one more pixel on the left, one less on the right
            graph(BOTH.replace("pads = [1, 1]", "pads = [3, -1]"), GIVEN),
            "none lies inside the other",
        ),
        (
            graph(
                f"f = {PAD} (x, v, b)\n k = Conv <group = 2> (x, w, c)\n y = Add (f, k)",
                f"{WIDE}, {BIAS}, float[2,1,1] w = {{1.0, 2.0}}",
            ),
            "other strides or groups",
        ),
    ],
)
def test_refusals(text: str, reason: str) -> None:
    assert_refuses(text.replace("'SAME_UPPER'", '"SAME_UPPER"'), RULE, reason)


def test_what_broadcasts_is_another_image() -> None:
    net = Net()
    x = net.input("x", ["batch", 4, 3, 3])
    whole = net.op("Conv", x, net.matrix(4, 4, 3, 3))  # one pixel
    same = net.op("Conv", x, net.matrix(4, 4, 1, 1))
    assert_refuses(net.model(net.op("Add", whole, same)), RULE, "none lies inside the other")


@pytest.mark.parametrize("operator", ["Mul", "Add"])
@pytest.mark.parametrize("identity", [False, True])
def test_a_number_of_more_axes_than_the_image_is_no_map(operator: str, identity: bool) -> None:
    # The Mul or Add makes (1, batch, 4, 3, 3) of (batch, 4, 3, 3), which a convolution cannot.
    net = Net()
    x = net.input("x", ["batch", 4, 3, 3])
    branch = x if identity else net.op("Conv", x, net.matrix(4, 4, 1, 1))
    mapped = net.op(operator, branch, net.keep(np.full((1, 1, 1, 1, 1), 2.0)))
    model = net.model(net.op("Add", net.op("Conv", x, net.matrix(4, 4, 1, 1)), mapped))
    assert not run(model, RULE).applied


def rep_block(
    *,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    stride: int = 1,
    dilation: int = 1,
    identity: bool = True,
    style: Any = "operator",
    subtract: bool = False,
    dtype: Any = np.float32,
    seed: int = 0,
) -> onnx.ModelProto:
    """Norm(conv k(x)) + norm(conv 1(x)) + norm(x), and a second block without norms."""
    net, size = Net(dtype=dtype, seed=seed), 4

    def conv(x: str, shape: tuple[int, int], bias: bool) -> str:
        pads = [dilation * (n // 2) for n in shape] * 2
        attrs: dict[str, Any] = {"pads": pads, "strides": [stride] * 2, "group": groups}
        inputs = [x, net.matrix(size, size // groups, *shape), *([net.vector(size)] * bias)]
        return net.op("Conv", *inputs, dilations=[dilation] * 2, **attrs)

    def norm(x: str) -> str:
        return channel_norm(net, x, size, style=style, tokens=False)

    x = net.input("x", ["batch", size, 9, 7])
    for block in range(2):
        parts = [conv(x, kernel, bias=block == 0), conv(x, (1, 1), bias=block == 1)]
        if identity and stride == 1:
            parts.append(x)
        if block == 0:
            parts = [norm(p) for p in parts]
        total = parts[0]
        for at, part in enumerate(parts[1:]):
            kind = "Sub" if subtract and at == 0 else "Add"
            total = net.op(kind, *((total, part) if block else (part, total)))
        x = net.op("Relu", total)
    return net.model(net.op("GlobalAveragePool", x))


@settings(max_examples=20, deadline=None)
@given(
    kernel=st.sampled_from([(3, 3), (1, 3), (5, 1), (1, 1)]),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    identity=st.booleans(),
    style=st.sampled_from(["operator", "written out", "scale"]),
    subtract=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
def test_blocks_become_one_convolution(**options: Any) -> None:
    model = rep_block(**options)
    rules = (FoldBatchnorm(), RULE)
    done = run(model, *rules)
    counts = Counter(n.op_type for n in done.stored.proto.graph.node)
    assert counts == {"Conv": 2, "Relu": 2, "GlobalAveragePool": 1}
    assert_parity(model, done.stored.complete())
    assert_sound(model, done, *rules)


def test_bfloat16() -> None:
    done = run(rep_block(dtype=ml_dtypes.bfloat16), FoldBatchnorm(), RULE)
    kinds = {t.data_type for t in done.stored.complete().graph.initializer}
    assert kinds == {onnx.TensorProto.BFLOAT16}
    assert sum(n.op_type == "Conv" for n in done.stored.proto.graph.node) == 2


MUTANTS = {
    "the sign of a difference": ("-1.0 if node.op == \"Sub\" else 1.0", "1.0"),
    "the place of the small kernel": (
        "slice(o, o + n) for o, n in zip(start", "slice(0, n) for o, n in zip(start"),
    "the diagonal of a group": ("rows % weight.shape[1], *start", "rows * 0, *start"),
    "the scale of a map": ("+= signs[1 - at] * scale", "+= signs[1 - at]"),
    "the shift of a map": ("+ signs[1 - at] * shift)", "+ signs[1 - at] * scale)"),
    "the bias behind a scale": ("sign * (scale * bias + shift)", "sign * (bias + shift)"),
    "the scale behind a convolution": (
        "self.weight.float64() * self.scale.reshape(-1, *inner)",
        "self.weight.float64().copy()",
    ),
    "one bias": ("large.bias + small.bias", "large.bias"),
}  # fmt: skip


def agrees(rule: Any) -> bool:
    options: list[dict[str, Any]] = [{"subtract": True}, {"groups": 2, "style": "written out"}]
    return all(computes_the_same(rep_block(**o), rule) for o in options)


def test_what_the_mutants_are_held_against_agrees() -> None:
    assert agrees(RULE)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    names = mutated(merge_parallel_convolutions, *MUTANTS[name])
    assert not agrees(names["MergeParallelConvolutions"]())
