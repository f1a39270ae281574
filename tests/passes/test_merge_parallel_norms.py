"""BN(x) + alpha x is one batch normalization. Dyadic constants make goldens exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxnorm.passes import merge_parallel_norms
from onnxnorm.passes.merge_parallel_norms import MergeParallelNorms
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import computes_the_same, mutated

RULE = MergeParallelNorms()
NORM = (
    "float[2] g = {2.0, 3.0}, float[2] h = {0.5, 1.0}, float[2] m = {1.0, -2.0},"
    " float[2] v = {4.0, 9.0}"
)
BN = "n = BatchNormalization <epsilon: float = 0.0> (x, g, h, m, v)"
REP = f"{BN}\n k = Mul (x, a)\n y = Add (n, k)"


def graph(body: str, weights: str = f"{NORM}, float[1] a = {{0.5}}", outputs: str = "") -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,4] x) => (float[N,2,4] y{outputs})
    <{weights}>
    {{
       {body}
    }}
    """


@pytest.mark.parametrize(
    ("body", "gamma", "beta"),
    [  # gamma + alpha (2, 3), beta + alpha (1, -2)
        (REP, "{3.0, 4.5}", "{1.0, 0.0}"),
        (REP.replace("(n, k)", "(k, n)").replace("(x, a)", "(a, x)"), "{3.0, 4.5}", "{1.0, 0.0}"),
        (f"{BN}\n y = Add (x, n)", "{4.0, 6.0}", "{1.5, -1.0}"),
    ],
)
def test_a_multiple_of_the_input(body: str, gamma: str, beta: str) -> None:
    weights = NORM if "Mul" not in body else f"{NORM}, float[1] a = {{0.5}}"
    after = graph(
        "y = BatchNormalization <epsilon: float = 0.0> (x, y_weight, y_bias, m, v)",
        "float[2] m = {1.0, -2.0}, float[2] v = {4.0, 9.0},"
        f" float[2] y_bias = {beta}, float[2] y_weight = {gamma}",
    )
    assert_rewrites(graph(body, weights), after, RULE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (graph(REP, outputs=", float[N,2,4] n"), "'n' is a graph output"),
        (graph(f"{REP}".replace("y = Add", "z = Add") + "\n y = Mul (z, k)"), "has other readers"),
        (
            graph(REP, f"{NORM}, float[4] a = {{1.0, 2.0, 3.0, 4.0}}"),
            "the factor does not vary over the channels alone",
        ),
        (graph(REP, f"{NORM}, float[1] a = {{3e38}}"), "is not finite in float32"),
        (
            graph(f"g = Exp (h)\n {REP}", f"{NORM}, float[1] a = {{0.5}}".replace(
                "float[2] g = {2.0, 3.0}, ", "")),
            "its parameters are not four constants",
        ),
    ],
)  # fmt: skip
def test_what_stays(text: str, reason: str) -> None:
    assert_refuses(text, RULE, reason)


def test_a_multiple_of_another_value_is_none() -> None:
    assert not run(graph(REP.replace("Mul (x, a)", "Mul (r, a)\n").replace(
        BN, f"{BN}\n r = Relu (x)")), RULE).remarks  # fmt: skip


@st.composite
def sums(draw: st.DrawFn) -> ModelProto:
    """RepBN on any rank, in any type, alpha for all or for each channel."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16]))
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    channels, extra = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    shape = draw(st.sampled_from([(), (1,), (channels, *(1,) * extra)]))
    weights = {n: rng.uniform(0.5, 1.5, channels).astype(kind) for n in "gbmv"}
    weights["a"] = np.asarray(rng.uniform(-2, 2, shape)).astype(kind)
    nodes = [
        helper.make_node("BatchNormalization", ["x", *"gbmv"], ["n"], epsilon=1e-3),
        helper.make_node("Mul", ["a", "x"], ["k"]),
        helper.make_node("Add", ["n", "k"], ["y"]),
    ]
    dims: list[int | str | None] = ["n", channels, *(3,) * extra]
    made = helper.make_graph(
        nodes,
        "rep",
        [helper.make_tensor_value_info("x", dtype, dims)],
        [helper.make_tensor_value_info("y", dtype, dims)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(deadline=None, max_examples=15)
@given(sums())
def test_any_sum_agrees(model: ModelProto) -> None:
    done = run(model, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["BatchNormalization"]
    assert_sound(model, done, RULE)
    assert_parity(model, done.stored.complete())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gamma + alpha * np.sqrt(variance + epsilon)", "gamma + alpha"),
        ("gamma + alpha * np.sqrt(variance + epsilon)", "gamma + alpha * np.sqrt(variance)"),
        ("beta + alpha * mean", "beta - alpha * mean"),
        ("beta + alpha * mean", "beta + mean"),
    ],
)
def test_a_wrong_constant_would_be_seen(old: str, new: str) -> None:
    broken = mutated(merge_parallel_norms, old, new)["MergeParallelNorms"]()
    model = parser.parse_model(graph(REP.replace("float = 0.0", "float = 0.5")))
    assert computes_the_same(model, RULE)
    assert not computes_the_same(model, broken)
