"""Softmax and log-softmax without their operators: every spelling, and what is none."""

from __future__ import annotations

from typing import Final

import pytest
from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import Norm, find_norms
from onnxnorm.reference import confirm

HEAD: Final = """
<ir_version: 8, opset_import: ["" : {opset}]>
main ({dtype}[{dims}] x, float[{other}] z) => ({dtype}[?,?,?] y)
<float one = {{1}}, float minus = {{-1}}, float e = {{0.5}}, int64[1] last = {{-1}},
 int64[1] zero = {{0}}, int64[1] first = {{1}}, int64[1] three = {{3}},
 int64[3] back = {{0, 0, 1}}, float low = {{-3e38}}, float some = {{-2}}>
{{ {body} }}
"""
MAX: Final = "m = ReduceMax <axes = [-1]> (x) "
SHIFTED: Final = MAX + "d = Sub (x, m) "
STABLE: Final = SHIFTED + "e1 = Exp (d) t = ReduceSum (e1, last) "
PLAIN: Final = "e1 = Exp (x) t = ReduceSum (e1, last) "


def norms(
    body: str, *, opset: int = 13, dims: str = "2,3,4", dtype: str = "float"
) -> tuple[list[Norm], Facts]:
    other = dims.replace("?", "M")
    text = HEAD.format(body=body, opset=opset, dims=dims, dtype=dtype, other=other)
    facts = Facts(Module(storage.from_proto(parser.parse_model(text))))
    return find_norms(facts), facts


SOFTMAX: Final = {
    "plain": PLAIN + "y = Div (e1, t)",
    "stable": STABLE + "y = Div (e1, t)",
    "a reciprocal": STABLE + "i = Reciprocal (t) y = Mul (e1, i)",
    "one over": STABLE + "i = Div (one, t) y = Mul (i, e1)",
    "a power": STABLE + "i = Pow (t, minus) y = Mul (e1, i)",
    "a copy": "c = Identity (x) m = ReduceMax <axes = [2]> (c) d = Sub (x, m) e1 = Exp (d)"
    " o = Dropout (e1) t = ReduceSum (e1, last) y = Div (o, t)",
    "without keepdims": "k = ReduceMax <axes = [-1], keepdims = 0> (x) m = Unsqueeze (k, last)"
    " d = Sub (x, m) e1 = Exp (d) u = ReduceSum <keepdims = 0> (e1, last) t = Reshape (u, back)"
    " y = Div (e1, t)",
    "JAX": MAX + "k = Max (m, low) d = Sub (x, k) e1 = Exp (d) t = ReduceSum (e1, last)"
    " y = Div (e1, t)",
    "a maximum of one": MAX + "k = Max (m) d = Sub (x, k) e1 = Exp (d) t = ReduceSum (e1, last)"
    " y = Div (e1, t)",
}
LOG: Final = {
    "a log of it": STABLE + "q = Div (e1, t) y = Log (q)",
    "the operator's log": "q = Softmax <axis = -1> (x) y = Log (q)",
    "minus logsumexp": "l = ReduceLogSumExp <axes = [-1]> (x) y = Sub (x, l)",
    "stable": STABLE + "l = Log (t) y = Sub (d, l)",
    "plain": PLAIN + "l = Log (t) y = Sub (x, l)",
    "a log of a sum": SHIFTED + "e1 = Exp (d) l = ReduceLogSum <axes = [-1]> (e1) y = Sub (d, l)",
    "logsumexp put together": STABLE + "k = Log (t) l = Add (k, m) y = Sub (x, l)",
}


@pytest.mark.parametrize(
    ("kind", "body"),
    [("softmax", b) for b in SOFTMAX.values()] + [("log_softmax", b) for b in LOG.values()],
)
def test_every_spelling_is_one_row(kind: str, body: str) -> None:
    (norm,), facts = norms(body)
    assert (norm.kind, norm.axes, norm.recognised) == (kind, (2,), True)
    assert (norm.input.name, norm.output.name, norm.obstacle) == ("x", "y", "")
    assert norm.epsilon is None
    if not any(n.op == "Softmax" for n in norm.nodes):
        assert confirm(norm, facts) is None


@pytest.mark.parametrize("dims", ["N,T,D", "?,?,?"])
def test_sizes_need_not_be_known(dims: str) -> None:
    for body in (SOFTMAX["without keepdims"], LOG["stable"]):
        (norm,), _ = norms(body, dims=dims)
        assert (norm.axes, norm.recognised) == ((2,), True)


# The target's batch is that of another tensor, as JAX takes it from the graph's input.
BROADCAST: Final = (
    "s = Shape (z) b = Slice (s, zero, first) r = Concat <axis = 0> (b, three, first)"
    " k = ReduceMax <axes = [-1], keepdims = 0> (x) q = Reshape (k, r) m = Expand (q, r)"
    " d = Sub (x, m) e1 = Exp (d) u = ReduceSum <keepdims = 0> (e1, last) v = Reshape (u, {target})"
    " t = Expand (v, {target}) y = Div (e1, t)"
)


@pytest.mark.parametrize("dims", ["N,3,4", "?,3,D"])
def test_a_sum_may_be_broadcast_to_a_shape_that_the_graph_computes(dims: str) -> None:
    (norm,), facts = norms(BROADCAST.format(target="r"), dims=dims)
    assert (norm.kind, norm.input.name, norm.recognised) == ("softmax", "x", True)
    assert confirm(norm, facts) is None


def test_a_sum_that_is_broadcast_along_another_axis_is_a_near_miss() -> None:
    body = BROADCAST.format(target="w").replace(
        "q = R", "w = Concat <axis = 0> (b, first, three) q = R"
    )
    found, _ = norms(body, dims="N,3,3")
    assert [(n.kind, n.recognised) for n in found] == [("softmax", False)]
    assert (
        found[0].reason
        == "the sum is given the shape [N, 1, 3], which need not be that of its input"
    )


def test_whether_it_is_stable_is_known() -> None:
    assert norms(SOFTMAX["stable"])[0][0].stable
    assert not norms(SOFTMAX["plain"])[0][0].stable


def test_a_maximum_over_other_axes_is_no_part_of_it() -> None:
    body = "m = ReduceMax <axes = [1]> (x) d = Sub (x, m) e1 = Exp (d)"
    (norm,), facts = norms(body + " t = ReduceSum (e1, last) y = Div (e1, t)")
    assert (norm.kind, norm.input.name, norm.axes, norm.stable) == ("softmax", "d", (2,), False)
    assert confirm(norm, facts) is None


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (STABLE + "u = Add (t, e) y = Div (e1, u)", "softmax", "something is added"),
        (
            SHIFTED + "e1 = Exp (d) t = ReduceSum <keepdims = 0> (e1, last) y = Div (e1, t)",
            "softmax",
            "lost its axis",
        ),
        (
            SHIFTED
            + "e1 = Exp (d) u = ReduceSum <keepdims = 0> (e1, last) t = Unsqueeze (u, first)"
            " y = Div (e1, t)",
            "softmax",
            "comes back in another place",
        ),
        (
            STABLE + "i = Reciprocal (t) u = Squeeze (i, last) y = Mul (e1, u)",
            "softmax",
            "lost its axis",
        ),
        (
            SHIFTED + "e1 = Exp (d) f = Exp (z) t = ReduceSum (f, last) y = Div (e1, t)",
            "softmax",
            "exponentials of 'z', another value",
        ),
        (
            SHIFTED + "f = Exp (x) t = ReduceSum (f, last) l = Log (t) y = Sub (d, l)",
            "log_softmax",
            "not of the sum of exponentials",
        ),
    ],
)
def test_a_near_miss_has_its_reason(body: str, kind: str, reason: str) -> None:
    found, _ = norms(body, dims="4,4,4")
    assert [(n.kind, n.recognised) for n in found] == [(kind, False)]
    assert reason in found[0].reason


@pytest.mark.parametrize(
    "body",
    [
        MAX + "k = Max (m, some) d = Sub (x, k) e1 = Exp (x) t = ReduceSum (e1, last)"
        " y = Div (d, t)",
        PLAIN + "f = Exp (e1) y = Div (f, t)",
        "e1 = Exp (x) t = ReduceMean <axes = [-1]> (e1) y = Div (e1, t)",
        PLAIN + "y = Div (t, e1)",
        "y = Exp (x)",
    ],
)
def test_what_is_no_softmax_of_x(body: str) -> None:
    assert not any(n.recognised and n.input.name == "x" for n in norms(body)[0])


def test_a_sigmoid_as_a_softmax_of_two_is_left_alone() -> None:
    body = "n = Neg (x) e1 = Exp (n) p = Add (e1, one) y = Div (one, p)"
    assert norms(body)[0] == []


def test_scale_and_mask_in_front_are_noted() -> None:
    body = "s = MatMul (x, x) k = Mul (s, e) a = Add (k, z) y = Softmax <axis = -1> (a)"
    (norm,), _ = norms(body, dims="2,4,4")
    assert norm.notes == ("the mask 'z' is added in front", "a scale of 0.5 stands in front")


def test_a_sum_that_is_an_output_stands_in_the_way() -> None:
    body = STABLE + "y = Div (e1, t)"
    text = HEAD.format(body=body, opset=13, dims="2,3,4", dtype="float", other="2,3,4")
    text = text.replace("(float[?,?,?] y)", "(float[?,?,?] y, float[?,?,?] t)")
    facts = Facts(Module(storage.from_proto(parser.parse_model(text))))
    (norm,) = find_norms(facts)
    assert norm.recognised
    assert "'t' is" in norm.obstacle
