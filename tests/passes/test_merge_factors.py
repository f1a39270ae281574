"""x n g + b + x is x (n g + 1) + b. Dyadic constants make goldens exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxnorm.passes import merge_factors
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.merge_factors import MergeFactors
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import computes_the_same, mutated

RULE = MergeFactors()
CONSTANTS = "float[2] g = {2.0, 4.0}, float[2] b = {0.5, 1.0}, float one = {1.0}"
GRN = """
       a = Mul (x, n)
       c = Mul (g, a)
       d = Mul (c, one)
       e = Add (b, d)
       y = Add (x, e)
"""


def graph(
    body: str, constants: str = CONSTANTS, factor: str = "float[N,1,1,2] n", outputs: str = ""
) -> str:
    weights = f"<{constants}>" if constants else ""
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,3,4,2] x, {factor}) => (float[N,3,4,2] y{outputs})
    {weights} {{ {body} }}
    """


def test_global_response_normalization() -> None:
    after = graph(
        """
       [y_scaled] y_scaled = Mul (n, y_scale)
       [y_factor] y_factor = Add (y_scaled, y_scale_1)
       [y_product] y_product = Mul (x, y_factor)
       y = Add (y_product, y_shift)
        """,
        "float[2] y_scale = {2.0, 4.0}, float y_scale_1 = {1.0}, float[2] y_shift = {0.5, 1.0}",
    )
    done = assert_rewrites(graph(GRN), after, RULE)
    (remark,) = done.applied
    assert remark.site == "merge-factors:y"


@pytest.mark.parametrize(
    ("body", "operators", "constant"),
    [
        ("a = Mul (n, x)\n y = Mul (a, g)", ["Mul", "Mul"], [2.0, 4.0]),
        ("a = Mul (x, n)\n y = Add (a, x)", ["Add", "Mul"], 1.0),
        ("a = Mul (x, n)\n y = Sub (a, x)", ["Add", "Mul"], -1.0),
    ],
)
def test_two_operators_of_which_one_becomes_small(
    body: str, operators: list[str], constant: object
) -> None:
    before = graph(body, "float[2] g = {2.0, 4.0}" if "g)" in body else "")
    after = run(before, RULE).stored.complete()
    assert [n.op_type for n in after.graph.node] == operators
    (made,) = (numpy_helper.to_array(t) for t in after.graph.initializer)
    np.testing.assert_array_equal(made, np.asarray(constant, np.float32))
    assert_parity(before, after)


@pytest.mark.parametrize(
    "text",
    [
        graph(GRN, outputs=", float[N,3,4,2] a"),  # a keeps its name
        graph(GRN.replace("y = Add", "z = Add") + "\n y = Div (z, a)"),  # a has another reader
        graph("r = Relu (x)\n a = Mul (x, n)\n y = Add (r, a)", ""),  # of two tensors
        graph(GRN, factor="float[N,3,4,2] n"),  # as large as x
        graph(GRN, factor="float[N,H,W,2] n"),  # it may be
        graph(GRN, factor="float[N,3,1,1] n").replace("float[2] g = {2.0, 4.0}", (
            "float[4,2] g = {1.0,2.0,3.0,4.0,1.0,2.0,3.0,4.0}")),  # n g is as large as x
        graph("a = Mul (x, n)\n y = Mul (a, x)", ""),  # a square
        graph("a = Mul (x, n)\n y = Add (a, b)"),  # two operators either way
        graph("a = Add (x, b)\n c = Mul (a, n)\n y = Mul (c, g)"),  # a shift that is computed
        graph("a = Mul (x, g)\n y = Mul (a, g)"),  # nothing is computed: fold-affine has it
        graph("a = Mul (x, n)\n y = Add (a, n)", ""),  # a computed shift
    ],
)  # fmt: skip
def test_what_stays(text: str) -> None:
    assert not run(text, RULE).applied


def test_the_nodes_of_a_norm_stay() -> None:
    """(x - mean) * r with a gamma for the channels, over the positions: an instance norm."""
    body = """
       m = ReduceMean <axes = [1, 2]> (x)
       d = Sub (x, m)
       q = Mul (d, d)
       v = ReduceMean <axes = [1, 2]> (q)
       w = Add (v, eps)
       s = Sqrt (w)
       r = Reciprocal (s)
       k = Mul (d, r)
       y = Mul (k, g)
    """
    text = graph(body, "float[2] g = {2.0, 4.0}, float eps = {0.001}", "float[1] unused")
    assert not run(text, RULE).applied


def test_a_product_that_overflows_is_refused() -> None:
    huge = CONSTANTS.replace("{2.0, 4.0}", "{3e38, 4.0}").replace("{1.0}", "{2.0}")
    assert_refuses(graph(GRN, huge), RULE, "of its constants is not finite in float32")


def test_the_shift_goes_on_into_the_operator_behind() -> None:
    body = GRN.replace("y = Add", "z = Add") + "\n y = MatMul (z, k)"
    text = graph(body, CONSTANTS + ", float[2,2] k = {1.0, 2.0, 3.0, 5.0}")
    text = text.replace("y = MatMul (z, k)", "p = MatMul (z, k)\n y = Add (p, b)")
    done = run(text, RULE, FoldAffine())
    kinds = [n.op_type for n in done.stored.proto.graph.node]
    assert kinds.count("Add") == 2, "1 + n g, and the bias of the MatMul"
    assert_parity(text, done.stored.complete())


@st.composite
def sums(draw: st.DrawFn) -> ModelProto:
    """Any tree of Mul, Add and Sub over x, with factors of any shape that broadcasts."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([TensorProto.FLOAT, TensorProto.DOUBLE]))
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    full = (2, 3, 4)
    shapes = st.sampled_from([(), (4,), (3, 1), (2, 1, 4), (2, 1, 1), (1, 1, 4), full])
    inputs = [helper.make_tensor_value_info("x", dtype, full)]
    nodes, weights, names = [], [], ["x"]
    for at in range(draw(st.integers(2, 6))):
        op = draw(st.sampled_from(["Mul", "Mul", "Add", "Sub"]))
        what = draw(st.sampled_from(["constant", "computed", "x"]))
        if what == "x":
            other = "x" if op != "Mul" else names[0]
        else:
            other, shape = f"o{at}", draw(shapes)
            if what == "constant":
                weights.append(
                    numpy_helper.from_array(rng.uniform(-2, 2, shape).astype(kind), other)
                )
            else:
                inputs.append(helper.make_tensor_value_info(other, dtype, shape))
        pair = [names[-1], other]
        nodes.append(helper.make_node(op, pair if draw(st.booleans()) else pair[::-1], [f"v{at}"]))
        names.append(f"v{at}")
    nodes.append(helper.make_node("Relu", [names[-1]], ["y"]))
    out = helper.make_tensor_value_info("y", dtype, full)
    made = helper.make_graph(nodes, "sums", inputs, [out], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(deadline=None, max_examples=25)
@given(sums())
def test_any_sum_agrees(model: ModelProto) -> None:
    done = run(model, RULE)
    assert len(done.stored.proto.graph.node) <= len(model.graph.node)
    if done.applied:
        assert_sound(model, done, RULE)
    assert_parity(model, done.stored.complete())
    assert not run(done.stored.complete(), RULE).applied, "once is enough"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.shift + sign * other.shift", "self.shift + other.shift"),
        ("np.zeros(())) + sign * scale", "np.zeros(())) + scale"),
        ("self.shift * scale", "self.shift"),
        ("if self.shift.any():\n            return None", "if False:\n            return None"),
        ("self.base is not None and self.base is not value", "False"),
    ],
)
def test_a_wrong_sign_or_term_is_noticed(old: str, new: str) -> None:
    body = """
       a = Add (x, b)
       c = Mul (a, g)
       d = Mul (x, n)
       e = Mul (d, g)
       f = Sub (e, c)
       h = Mul (f, g)
       y = Add (h, x)
    """
    shifted = "a = Add (x, b)\n c = Mul (a, n)\n y = Mul (c, g)"
    other = "r = Relu (x)\n a = Mul (x, n)\n c = Mul (a, g)\n d = Mul (c, g)\n y = Add (d, r)"
    wrong = mutated(merge_factors, old, new)["MergeFactors"]()
    constants = "float[2] g = {2.0, 4.0}, float[2] b = {0.5, 1.0}"
    texts = [graph(text, constants) for text in (body, shifted, other)]
    assert all(computes_the_same(text, RULE) for text in texts)
    crashes = (AssertionError, ValueError)
    assert not all(computes_the_same(text, wrong, crashes=crashes) for text in texts)
