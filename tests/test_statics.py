"""Statics: sizes that shapes give, and small constant arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Module
from onnxnorm.moment_rules import Moments
from onnxnorm.sizes import is_size
from onnxnorm.statics import LIMIT, Size, Statics

HEAD = """
<ir_version: 8, opset_import: ["" : {opset}]>
main (float[{dims}] x, int64[k] asked) => (float y)
<int64 i = {{2}}, int64[1] a = {{-1}}, int64[2] ij = {{1, 2}}, int64[1] one = {{1}},
 int64[1] three = {{3}}, float half = {{0.5}}, float two = {{2}}, float[2] v = {{4, 9}},
 float e = {{0.5}}, int64[4] back = {{0, 6, 4, -1}}, int64[3] groups = {{0, 2, -1}},
 int64 whole = {{7}}, int64[1] at = {{2}}, int64[1] zero = {{0}}, int64[1] minus = {{-1}}>
{{ {body} }}
"""


def statics(body: str, dims: str = "N,6,4,5", opset: int = 17) -> tuple[Statics, Facts]:
    text = HEAD.format(body=body, dims=dims, opset=opset)
    facts = Facts(Module(storage.from_proto(parser.parse_model(text))))
    scope = facts.module.main
    moments = Moments(facts, scope, Statics(facts))
    for node in scope.nodes:
        moments.visit(node)
    return moments.statics, facts


def value(facts: Facts, name: str) -> AnyValue:
    return facts.module.main.values[name]


@pytest.mark.parametrize(
    ("body", "factor", "dims"),
    [
        ("s = Shape (x) y = Gather (s, i)", 4.0, {}),
        ("s = Shape (x) g = Gather (s, i) y = Cast <to = 1> (g)", 4.0, {}),
        ("s = Shape (x) g = Gather (s, ij) y = ReduceProd (g)", 24.0, {}),
        ("y = Size (x)", 120.0, {"N": 2}),
        ("s = Shape (x) t = Slice (s, one, three) y = ReduceProd (t)", 24.0, {}),
        ("s = Shape <start = 2> (x) y = ReduceProd (s)", 20.0, {}),
        ("n = Size (x) c = Cast <to = 1> (n) y = Sqrt (c)", np.sqrt(120), {"N": 1}),
        ("n = Size (x) c = Cast <to = 1> (n) y = Reciprocal (c)", 1 / 120, {"N": -2}),
        ("n = Size (x) c = Cast <to = 1> (n) y = Pow (c, half)", np.sqrt(120), {"N": 1}),
        ("n = Size (x) c = Cast <to = 1> (n) y = Mul (c, c)", 14400.0, {"N": 4}),
        ("n = Size (x) c = Cast <to = 1> (n) y = Div (two, c)", 2 / 120, {"N": -2}),
    ],
)
def test_scalars_that_are_products_of_dims(body: str, factor: float, dims: Any) -> None:
    known, facts = statics(body)
    size = known.size(value(facts, "y"))
    assert size is not None
    assert size.factor == pytest.approx(factor)
    assert dict(size.dims) == dims


@pytest.mark.parametrize(
    "body",
    [
        "n = Size (x) c = Cast <to = 1> (n) y = Add (c, two)",
        "y = ReduceProd (asked)",
        "s = Shape (x) g = Gather (s, i) y = Cast <to = 1> (asked)",
    ],
)
def test_what_is_no_product_of_dims_is_not_known(body: str) -> None:
    known, facts = statics(body)
    assert known.size(value(facts, "y")) is None


def test_powers_of_sizes_are_whole_halves() -> None:
    size = Size(4.0, {"N": 2})
    assert size.power(1) == Size(2.0, {"N": 1})
    assert size.power(-2) == Size(0.25, {"N": -2})
    assert Size(2.0, {"N": 1}).power(1) is None  # the fourth root of N
    assert Size(-1.0).power(1) is None
    assert size * Size(3.0, {"N": -2, "M": 2}) == Size(12.0, {"M": 2})


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("a1 = Add (v, e) y = Sqrt (a1)", np.sqrt([4.5, 9.5])),
        ("u = Unsqueeze (v, a) y = Transpose <perm = [1, 0]> (u)", [[4.0, 9.0]]),
        ("y = Pow (v, half)", [2.0, 3.0]),
        ("n = Neg (v) y = Max (n, e)", [0.5, 0.5]),
        ("r = Reciprocal (v) y = Mul (r, two)", [0.5, 2 / 9]),
        ("y = ReduceMean <axes = [0]> (v)", [6.5]),
        ("y = Concat <axis = 0> (one, three)", [1.0, 3.0]),
    ],
)
def test_small_constants_are_computed_in_float64(body: str, wanted: Any) -> None:
    known, facts = statics(body)
    array = known.array(value(facts, "y"))
    assert array is not None
    assert array.dtype == np.float64
    np.testing.assert_allclose(array, wanted)


def test_integers_divide_as_integers() -> None:
    known, facts = statics("h = Div (whole, i) y = Cast <to = 1> (h)")
    assert known.scalar(value(facts, "h")) == 3


def test_a_weight_is_no_parameter() -> None:
    count = LIMIT + 1
    text = """<ir_version: 8, opset_import: ["" : 17]> main (float x) => (float[n] y)
    { y = ConstantOfShape <value = float[1] {2}> (s) }"""
    model = parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([count], np.int64), "s"))
    facts = Facts(Module(storage.from_proto(model)))
    assert Statics(facts).array(value(facts, "y")) is None


def test_questions_about_a_constant() -> None:
    known, facts = statics("y = Identity (e)")
    assert known.scalar(value(facts, "e")) == 0.5
    assert known.scalar(value(facts, "v")) is None
    assert known.integers(value(facts, "ij")) == (1, 2)
    assert known.integers(value(facts, "e")) is None
    assert known.array(value(facts, "x")) is None


def test_shapes_put_together() -> None:
    body = (
        "s = Shape (x) n = Gather (s, zero) h = Gather (s, a)"
        " y = Concat <axis = 0> (n, three, minus, h)"
    )
    known, facts = statics(body)
    assert known.dims(value(facts, "y")) == ("N", 3, -1, 5)


def test_an_entry_that_is_not_understood_is_no_size() -> None:
    body = "q = ReduceSum (asked, zero) y = Concat <axis = 0> (q, three)"
    known, facts = statics(body)
    first, second = known.dims(value(facts, "y")) or ()
    assert not is_size(first)
    assert second == 3


@pytest.mark.parametrize("of", ["r", "p", "q"])
def test_entries_of_a_shape_whose_rank_is_unknown(of: str) -> None:
    body = (
        "r = Reshape (x, asked) m = ReduceMean <axes = [2]> (r) d = Sub (r, m) p = Mul (d, two)"
        " k = ReduceMean <axes = [2], keepdims = 0> (p) h = Mul (k, half) u = Unsqueeze (h, at)"
        " q = Sub (p, u)"
        f" s = Shape ({of}) g = Gather (s, i) y = Cast <to = 1> (g)"
    )
    known, facts = statics(body)
    name = known.sizes.axis(value(facts, "r"), 2)
    assert known.size(value(facts, "y")) == Size(1.0, {str(name): 2})


def test_a_shape_of_what_has_the_same_shape() -> None:
    known, facts = statics("p = Mul (x, x) s = Shape (p) y = Gather (s, i)", dims="A,B,C,D")
    assert known.size(value(facts, "y")) == Size(1.0, {"C": 2})
