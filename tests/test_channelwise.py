"""Affine maps per channel: which are batch normalizations, which are rows at all."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
from numpy.testing import assert_allclose
from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import Norm, find_norms

HEAD: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,3,4,4] x, float[?,?,?,?] u) => (float[?,?,?,?] y)
<float[3,3,1,1] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}, float[3,1,1] g = {{1, 2, 4}},
 float[3,1,1] b = {{0.5, -1, 0.25}}, float[3,1,1] m = {{0.5, 1, 2}}, float[3,1,1] v = {{3, 8, 15}},
 float[4,4] square = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}},
 int8[4,4] whole = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}},
 int64[1] at = {{0}}, float one = {{1}}, float[4] last = {{1, 2, 3, 4}}, float half = {{0.5}}>
{{ {body} }}
"""
CONV: Final = "c = Conv (x, w) "
GAMMA, BETA = np.array([1.0, 2.0, 4.0]), np.array([0.5, -1.0, 0.25])
MEAN, VARIANCE = np.array([0.5, 1.0, 2.0]), np.array([3.0, 8.0, 15.0])


def norms(body: str) -> list[Norm]:
    text = HEAD.format(body=body)
    return find_norms(Facts(Module(storage.from_proto(parser.parse_model(text)))))


def flat(factor: Any) -> Any:
    return np.asarray(factor).reshape(-1)


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (v, one) s = Sqrt (a) d = Sub (c, m) q = Div (d, s) k = Mul (q, g) y = Add (k, b)",
        (
            "a = Add (v, one) s = Sqrt (a) i = Reciprocal (s) d = Sub (c, m) q = Mul (d, i)"
            " k = Mul (g, q) y = Add (b, k)"
        ),
        (
            "a = Add (v, one) s = Sqrt (a) i = Div (g, s) o = Mul (m, i) t = Sub (b, o)"
            " k = Mul (c, i) y = Add (k, t)"
        ),
    ],
)
def test_statistics_written_out_are_a_batch_norm(body: str) -> None:
    (norm,) = norms(CONV + body)
    assert (norm.kind, norm.axes, norm.meant) == ("batch_norm", (0, 2, 3), 1.0)
    assert (norm.input.name, norm.output.name, norm.recognised) == ("c", "y", True)
    scale = GAMMA / np.sqrt(VARIANCE + 1)
    assert_allclose(flat(norm.gamma), scale)
    assert_allclose(flat(norm.beta), BETA - MEAN * scale)


def test_a_scale_and_a_shift_behind_a_convolution_are_one() -> None:
    (norm,) = norms(CONV + "k = Mul (c, g) y = Add (k, b)")
    assert (norm.kind, norm.epsilon) == ("batch_norm", None)
    assert [n.op for n in norm.nodes] == ["Mul", "Add"]


def test_one_of_them_is_a_channel_affine() -> None:
    (norm,) = norms(CONV + "y = Mul (c, g)")
    assert (norm.kind, norm.axes, norm.beta) == ("channel_affine", (0, 2, 3), None)
    assert_allclose(flat(norm.gamma), GAMMA)
    (norm,) = norms("k = Sub (x, m) y = Conv (k, w)")
    assert (norm.kind, norm.gamma) == ("channel_affine", None)
    assert_allclose(flat(norm.beta), -MEAN)


def test_signs_and_divisions() -> None:
    (norm,) = norms(CONV + "k = Div (c, g) y = Sub (b, k)")
    assert_allclose(flat(norm.gamma), -1 / GAMMA)
    assert_allclose(flat(norm.beta), BETA)


def test_the_bias_of_a_linear_operator_is_its_own() -> None:
    assert norms(CONV + "y = Add (c, b)") == []
    (norm,) = norms(CONV + "k = Add (c, b) y = Mul (k, g)")
    assert (norm.kind, norm.input.name, norm.beta) == ("channel_affine", "k", None)


@pytest.mark.parametrize(
    "made",
    [
        "o = MatMul (x, square) r = Shape (o) c = Reshape (o, r) ",
        "o = MatMul (x, square) q = Unsqueeze (o, at) c = Squeeze (q, at) ",
        (
            "q, s, z = DynamicQuantizeLinear (x) o = MatMulInteger (q, whole, z)"
            " k = Cast <to = 1> (o) c = Mul (k, s) "
        ),
    ],
)
def test_so_is_the_bias_behind_a_reshape_or_the_scale_of_quantized_numbers(made: str) -> None:
    assert norms(made + "d = Add (c, last) y = MatMul (d, square)") == []
    (norm,) = norms(made + "d = Mul (c, last) y = MatMul (d, square)")
    assert (norm.kind, norm.output.name) == ("channel_affine", "d")


@pytest.mark.parametrize(
    "made",
    [
        "o = Conv (x, w) r = Shape (o) c = Reshape (o, r) ",  # its bias has a place in the Conv
        "o = MatMul (x, square) q = Relu (o) c = Identity (q) ",
        "o = MatMul (x, square) q = Relu (x) c = Mul (o, q) ",
    ],
)
def test_a_shift_further_away_is_no_bias(made: str) -> None:
    (norm,) = norms(made + "y = Add (c, last)")
    assert (norm.kind, norm.output.name) == ("channel_affine", "y")


def test_far_from_anything_linear_it_is_no_row() -> None:
    assert norms("y = Mul (x, g)") == []
    assert norms("k = Relu (x) y = Mul (k, g)") == []
    assert norms(CONV + "y = Mul (c, half)") == []


def test_behind_a_norm_it_is_a_channel_affine() -> None:
    norm, affine = norms("q = LpNormalization <axis = 1> (x) k = Mul (q, g) y = Add (k, b)")
    assert norm.kind == "l2_norm"
    assert (affine.kind, affine.input.name) == ("channel_affine", "q")


def test_behind_a_product_of_values_it_is_a_channel_affine() -> None:
    gelu = "e1 = Erf (c) e2 = Add (e1, half) e3 = Mul (c, e2) "
    found = norms(CONV + gelu + "q = Exp (x) z = Mul (e3, q) k = Mul (z, g) y = Add (k, b)")
    assert [n.kind for n in found] == ["channel_affine"]


def test_a_reader_in_between_ends_the_chain() -> None:
    found = norms(CONV + "k = Mul (c, g) r = Relu (k) t = Add (k, b) y = Add (r, t)")
    assert [(n.kind, n.output.name) for n in found] == [("channel_affine", "k")]


def test_factors_along_another_axis_are_not_part_of_it() -> None:
    (norm,) = norms(CONV + "k = Mul (c, g) y = Mul (k, last)")
    assert (norm.output.name, norm.axes) == ("k", (0, 2, 3))


def test_layout_operators_in_between_do_not_matter() -> None:
    (norm,) = norms(CONV + "t = Transpose <perm = [0, 2, 3, 1]> (c) o = Identity (t)"
                    " f = Transpose <perm = [0, 3, 1, 2]> (o) y = Mul (f, g)")  # fmt: skip
    assert norm.kind == "channel_affine"


def test_without_a_rank_there_are_no_axes() -> None:
    text = HEAD.format(body="r = Reshape (x, s) c = Op (r) d = MatMul (c, last2) y = Mul (d, last)")
    text = text.replace("float half", "float[4,4] last2 = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1},"
                        " int64[1] s = {-1}, float half")  # fmt: skip
    (norm,) = find_norms(Facts(Module(storage.from_proto(parser.parse_model(text)))))
    assert (norm.kind, norm.axes) == ("channel_affine", None)


@pytest.mark.parametrize(
    "body",
    [
        "p = Relu (c) n = Neg (c) q = Relu (n) s = Mul (q, g) y = Sub (p, s)",
        "p = Relu (c) a = Abs (c) n = Sub (c, a) s = Mul (n, g) h = Mul (s, half) y = Add (p, h)",
        "o = Sub (one, one) p = Max (c, o) n = Min (c, o) s = Mul (g, n) y = Add (s, p)",
    ],
)
def test_the_slope_of_an_activation_is_no_row(body: str) -> None:
    """PReLU with a slope per channel, as TensorFlow's converters write it."""
    assert not norms(CONV + body)


@pytest.mark.parametrize(
    "body",
    [
        "p = Relu (c) s = Mul (p, g) e = Conv (u, w) y = Add (s, e)",  # of two tensors
        "n = Neg (c) s = Mul (n, g) y = Sub (c, s)",  # it does not bend
        "p = Relu (c) s = Mul (p, g) t = Add (s, b) y = Add (t, c)",  # a shift as well
    ],
    ids=["two", "straight", "shift"],
)
def test_what_is_no_slope_is_a_row(body: str) -> None:
    assert len(norms(CONV + body)) == 1
