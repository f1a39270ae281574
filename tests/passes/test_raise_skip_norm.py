"""Skip- and EmbedLayerNormalization taken apart: what is written, what stays, that both agree."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from onnxnorm.passes import raise_skip_norm
from onnxnorm.passes.raise_skip_norm import RaiseSkipNorm
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, run
from tests.mutants import computes_the_same, mutated

RULE: Final = RaiseSkipNorm()
VECTORS: Final = (
    "float[4] g = {1, 2, 0.5, 3}, float[4] b = {0.25, -0.5, 1, 0}, float[4] k = {2, -1, 0.5, 0.25}"
)
TABLES: Final = (
    "float[3,4] words = {1, 2, 3, 4, 5, 6, 7, 9, 2, 1, 1, 3},"
    " float[5,4] places = {0, 1, 0, 2, 4, 1, 1, 0, 2, 2, 5, 1, 0, 3, 1, 1, 7, 1, 0, 2},"
    " float[2,4] kinds = {1, 0, 0, 1, 3, 1, 2, 0}"
)


def skip(body: str, *, opset: int = 17, more: str = "", constants: str = VECTORS) -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    main (float[N,T,4] x, float[N,T,4] z) => (float[N,T,4] y{more}) <{constants}> {{ {body} }}
    """


def embed(body: str, *, opset: int = 17, more: str = "", constants: str = "") -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    main (int32[2,3] ids, int32[2,3] segments, int32[2,3] at) => (float[2,3,4] y{more})
    <{VECTORS}, {TABLES}{constants}> {{ {body} }}
    """


ONE_TWO: Final = ", int64[1] y_0 = {0}, int64[1] y_1 = {1}, int64[1] y_2 = {2}"
GOLDENS: Final = {
    "a sum and a norm": (
        skip("y = com.microsoft.SkipLayerNormalization <epsilon: float = 0.01> (x, z, g, b)"),
        skip(
            "[y_sum] y_sum = Add (x, z)"
            " y = LayerNormalization <axis: int = -1, epsilon: float = 0.01> (y_sum, g, b)",
        ),
    ),
    "a bias, no beta, the schema's epsilon, and a sum that goes on": (
        skip('n, "", "", s = com.microsoft.SkipLayerNormalization (x, z, g, "", k) y = Add (n, s)'),
        skip(
            "[n_biased] n_biased = Add (x, k) [n_sum] n_sum = Add (n_biased, z)"
            " n = LayerNormalization <axis: int = -1, epsilon: float = 1e-12> (n_sum, g)"
            " y = Add (n, n_sum)",
        ),
    ),
    "an RMS norm": (
        skip(
            "y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon: float = 0.01>"
            " (x, z, g, k)"
        ),
        skip(
            "[y_biased] y_biased = Add (x, k) [y_sum] y_sum = Add (y_biased, z)"
            " y = SimplifiedLayerNormalization <axis: int = -1, epsilon: float = 0.01> (y_sum, g)",
        ),
    ),
    "an embedding": (
        embed(
            'y, "" = com.microsoft.EmbedLayerNormalization <epsilon: float = 0.01>'
            " (ids, segments, words, places, kinds, g, b)"
        ),
        embed(
            "[y_words] y_words = Gather (words, ids) [y_shape] y_shape = Shape (ids)"
            " [y_length] y_length = Slice (y_shape, y_1, y_2)"
            " [y_places] y_places = Slice (places, y_0, y_length, y_0)"
            " [y_placed] y_placed = Add (y_words, y_places)"
            " [y_kinds] y_kinds = Gather (kinds, segments)"
            " [y_sum] y_sum = Add (y_placed, y_kinds)"
            " y = LayerNormalization <axis: int = -1, epsilon: float = 0.01> (y_sum, g, b)",
            constants=ONE_TWO,
        ),
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_what_is_written(name: str) -> None:
    before, after = GOLDENS[name]
    # onnxruntime's operators of ONNX's domain satisfy no checker; what it computes is what counts.
    assert_rewrites(before, after, RULE)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            skip(
                "y, m = com.microsoft.SkipLayerNormalization (x, z, g, b)",
                more=", float[N,T,1] m",
            ),
            "its output 'm' is read",
        ),
        (
            skip(
                'y, "", "", s = com.microsoft.SkipLayerNormalization (x, z, g, b)',
                more=", float[N,T,4] s",
            ),
            "the sum 's' is a graph output",
        ),
        (
            embed(
                "y, mask = com.microsoft.EmbedLayerNormalization"
                " (ids, segments, words, places, kinds, g, b)",
                more=", int32[2] mask",
            ),
            "its output 'mask' is read",
        ),
        (
            embed(
                "y = com.microsoft.EmbedLayerNormalization"
                " (ids, segments, words, places, kinds, g, b)",
                opset=9,
            ),
            "the positions cannot be cut",
        ),
    ],
)
def test_what_stays(model: str, reason: str) -> None:
    assert_refuses(model, RULE, reason)


def test_positions_may_be_given_and_kinds_absent() -> None:
    before = embed(
        'y, "" = com.microsoft.EmbedLayerNormalization (ids, "", words, places, "", g, b, "", at)'
    )
    done = run(before, RULE)
    ops = [node.op_type for node in done.stored.proto.graph.node]
    assert ops == ["Gather", "Gather", "Add", "LayerNormalization"]
    assert_parity(before, done.stored.complete())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([13, 17, 23]),
    st.integers(0, 2**31),
)
def test_both_agree(simple: bool, bias: bool, onwards: bool, opset: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = {n: rng.standard_normal(6).astype(np.float32) for n in ("g", "b", "k")}
    op = "SkipSimplifiedLayerNormalization" if simple else "SkipLayerNormalization"
    inputs = ["x", "z", "g", *([] if simple else ["b"]), *(["k"] if bias else [])]
    node = helper.make_node(
        op, inputs, ["n", "", "", "s"], domain="com.microsoft", epsilon=float(rng.uniform(0, 0.1))
    )
    last = helper.make_node("Add", ["n", "s" if onwards else "x"], ["y"])
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 6]) for n in ("x", "z", "y")
    ]
    tensors = [numpy_helper.from_array(v, n) for n, v in weights.items() if n in inputs]
    graph = helper.make_graph([node, last], "g", values[:2], values[2:], tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    done = run(model, RULE)
    assert len(done.applied) == 1
    assert_parity(model, done.stored.complete())


def test_a_residual_stream_shows_behind_it() -> None:
    """What it is for: the mean leaves a stream that the fused operators hid."""
    square = "{" + ", ".join(str((7 * i) % 11 / 8) for i in range(16)) + "}"
    model = parser.parse_model(
        skip(
            "a = MatMul (x, w) c = MatMul (z, w)"
            ' n, "", "", s = com.microsoft.SkipLayerNormalization (a, c, g, b) f = MatMul (n, w)'
            " o = com.microsoft.SkipLayerNormalization (f, s, g, b) y = MatMul (o, w)",
            constants=f"{VECTORS}, float[4,4] w = {square}",
        )
    )
    assert not run(model, StreamFoldMean()).applied
    done = run(model, RULE, StreamFoldMean())
    ops = {node.op_type for node in done.stored.proto.graph.node}
    assert not ops & {"LayerNormalization", "SkipLayerNormalization"}
    assert_parity(model, done.stored.complete())


MUTANTS: Final = {
    "no bias": ("if bias is not None:", "if False:"),
    "no skip": ("[value, given[1]]", "[value, given[0]]"),
    "another epsilon": ('node.attrs.get("epsilon", _EPSILON)', "1.0"),
    "positions from one on": ("[places, zero, length, zero]", "[places, one, length, zero]"),
    "no kinds": ("if segments is not None and kinds is not None:", "if False:"),
    "beta of the embedding": ("given[5:7]", "(given[5], None)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_of_the_arithmetic_shows(name: str) -> None:
    mutant = mutated(raise_skip_norm, *MUTANTS[name])["RaiseSkipNorm"]()
    assert not all(computes_the_same(before, mutant) for before, _ in GOLDENS.values())
