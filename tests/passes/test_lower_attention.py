"""Self-attention as one operator. Dyadic constants make goldens exact."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxnorm import storage
from onnxnorm.passes import lower_attention
from onnxnorm.passes.eliminate_guard import EliminateGuard
from onnxnorm.passes.lower_attention import LowerAttention
from onnxnorm.session import open_session
from onnxnorm.staging import Staged
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from onnxnorm.truth import Evaluator
from tests.mutants import computes_the_same, mutated

CPU: Final = LowerAttention("ort-cpu")
WEIGHTS: Final = (
    "float[4,4] wq = {1, 0, 2, -1, 0.5, 1, 0, 1, -1, 2, 1, 0, 0, 1, -1, 0.5},"
    " float[4,4] wk = {0, 1, 1, 2, -1, 0.5, 2, 0, 1, 0, -1, 1, 2, 1, 0, 1},"
    " float[4,4] wv = {2, 1, 0, 0, 1, -1, 1, 0.5, 0, 2, 1, -1, 1, 0, 0, 2},"
    " float[4] bq = {1, 0.5, 0, -1}, float[4] bk = {0, 1, -1, 2}, float[4] bv = {2, 0, 1, 0.5},"
    " float c = {0.5}, int64[4] heads = {0, 0, 2, 2}, int64[3] joined = {0, 0, 4}"
)
NODES: Final = """
    q0 = MatMul (x, wq)  q1 = Add (q0, bq)  q2 = Reshape (q1, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (x, wk)  k1 = Add (k0, bk)  k2 = Reshape (k1, heads)
    k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v0 = MatMul (x, wv)  v1 = Add (v0, bv)  v2 = Reshape (v1, heads)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
    s0 = MatMul (q, k)  s = Mul (s0, c)  p = Softmax <axis = -1> (s)
    m = MatMul (p, v)  t = Transpose <perm = [0, 2, 1, 3]> (m)  y = Reshape (t, joined)
"""
JOINED: Final = (
    "float[4,12] y_weights = {1, 0, 2, -1, 0, 1, 1, 2, 2, 1, 0, 0,"
    " 0.5, 1, 0, 1, -1, 0.5, 2, 0, 1, -1, 1, 0.5,"
    " -1, 2, 1, 0, 1, 0, -1, 1, 0, 2, 1, -1,"
    " 0, 1, -1, 0.5, 2, 1, 0, 1, 1, 0, 0, 2},"
)
BIASES: Final = "float[12] y_biases = {1, 0.5, 0, -1, 0, 1, -1, 2, 2, 0, 1, 0.5}"
OPERATOR: Final = "com.microsoft.Attention <num_heads: int = 2, scale: float = 0.5>"


def graph(
    body: str, weights: str = WEIGHTS, *, more: str = "", outs: str = "", ms: str = ""
) -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : 17{ms}]>
    main (float[N,L,4] x{more}) => (float[N,L,4] y{outs}) <{weights}> {{ {body} }}
    """


def after(biases: str = BIASES, operator: str = OPERATOR) -> str:
    body = f"y = {operator} (x, y_weights, y_biases)"
    return graph(body, f"{JOINED}{biases}", ms=', "com.microsoft" : 1')


def edited(*changes: tuple[str, str], more: str = "", outs: str = "") -> str:
    body, weights = NODES, WEIGHTS
    for old, new in changes:
        assert (body + weights).count(old) == 1, old
        body, weights = body.replace(old, new), weights.replace(old, new)
    return graph(body, weights, more=more, outs=outs)


def test_the_whole() -> None:
    done = assert_rewrites(graph(NODES), after(), CPU)
    assert [(r.action, r.into) for r in done.applied] == [("lowered", "Attention")]


def test_without_a_scale_and_biases() -> None:
    plain = "float[12] y_biases = {0, 0, 0, 0, 0, 1, -1, 2, 0, 0, 0, 0}"
    before = edited(
        ("s = Mul (s0, c)", ""), ("Softmax <axis = -1> (s)", "Softmax <axis = 3> (s0)"),
        ("q1 = Add (q0, bq)", ""), ("Reshape (q1", "Reshape (q0"), (", float c = {0.5}", ""),
        ("v1 = Add (v0, bv)", ""), ("Reshape (v1", "Reshape (v0"),
        (" float[4] bq = {1, 0.5, 0, -1},", ""), (", float[4] bv = {2, 0, 1, 0.5}", ""),
    )  # fmt: skip
    assert_rewrites(before, after(plain, OPERATOR.replace("0.5", "1.0")), CPU)


def test_a_scale_by_division() -> None:
    divided = edited(("Mul (s0, c)", "Div (s0, c)"))
    assert_rewrites(divided, after(operator=OPERATOR.replace("0.5", "2.0")), CPU)


# One product for all three, as timm has it: (batch, sequence, 3, heads, size), then cut.
PACKED_WEIGHTS: Final = (
    f"{JOINED.replace('y_weights', 'w')} {BIASES.replace('y_biases', 'b')}, float c = {{0.5}},"
    " int64[5] heads = {0, 0, 3, 2, 2}, int64[3] joined = {0, 0, 4}"
)
INDICES: Final = {
    "Gather": ", int64 i0 = {0}, int64 i1 = {1}, int64 i2 = {2}",
    "Split": ", int64[1] zero = {0}",
    "Slice": ", int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}",
}
PACKED: Final = """
    a0 = MatMul (x, w)  a1 = Add (a0, b)  a2 = Reshape (a1, heads)
    a = Transpose <perm = [2, 0, 3, 1, 4]> (a2)
    CUT
    k = Transpose <perm = [0, 1, 3, 2]> (r)
    s0 = MatMul (q, k)  s = Mul (s0, c)  p = Softmax <axis = -1> (s)
    m = MatMul (p, v)  t = Transpose <perm = [0, 2, 1, 3]> (m)  y = Reshape (t, joined)
"""
CUTS: Final = {
    "Gather": "q = Gather (a, i0)  r = Gather <axis = 0> (a, i1)  v = Gather (a, i2)",
    "Split": (
        "q0, r0, v0 = Split <axis = 0> (a)"
        "  q = Squeeze (q0, zero)  r = Squeeze (r0, zero)  v = Squeeze (v0, zero)"
    ),
    "Slice": (
        "q0 = Slice (a, zero, one, zero, one)  r0 = Slice (a, one, two, zero)"
        "  v0 = Slice (a, two, three, zero)"
        "  q = Squeeze (q0, zero)  r = Squeeze (r0, zero)  v = Squeeze (v0, zero)"
    ),
}


def packed(*changes: tuple[str, str], by: str = "Gather", cut: str = "", outs: str = "") -> str:
    body, weights = PACKED.replace("CUT", cut or CUTS[by]), PACKED_WEIGHTS + INDICES[by]
    for old, new in changes:
        assert (body + weights).count(old) == 1, old
        body, weights = body.replace(old, new), weights.replace(old, new)
    return graph(body, weights, outs=outs)


@pytest.mark.parametrize("by", CUTS)
def test_a_packed_product_gives_its_weights_as_they_are(by: str) -> None:
    weights = f"{JOINED}{BIASES}".replace("y_weights", "w").replace("y_biases", "b")
    wanted = graph(f"y = {OPERATOR} (x, w, b)", weights, ms=', "com.microsoft" : 1')
    done = assert_rewrites(packed(by=by), wanted, CPU)
    assert [(r.action, r.into) for r in done.applied] == [("lowered", "Attention")]


def test_a_packed_product_without_a_bias_gets_zeros() -> None:
    before = packed(
        ("a1 = Add (a0, b)", ""), ("Reshape (a1", "Reshape (a0"),
        (f" {BIASES.replace('y_biases', 'b')},", ""),
    )  # fmt: skip
    wanted = graph(
        f"y = {OPERATOR} (x, w, y_biases)",
        f"{JOINED.replace('y_weights', 'w')} float[12] y_biases = {{{', '.join('0' * 12)}}}",
        ms=', "com.microsoft" : 1',
    )
    assert_rewrites(before, wanted, CPU)


ADDED: Final = "com.microsoft.Attention <num_heads: int = 2, scale: float = 0.5>"


@pytest.mark.parametrize("shape", ["1,1,L,L", "N,1,L,L", "1,2,L,L", "N,2,L,L"])
@pytest.mark.parametrize("order", ["s1, mask", "mask, s1"])
def test_a_mask_is_read_by_the_operator(shape: str, order: str) -> None:
    mask = f", float[{shape}] mask"
    before = edited(("s = Mul (s0, c)", f"s1 = Mul (s0, c) s = Add ({order})"), more=mask)
    body = f"y = {ADDED} (x, y_weights, y_biases, , , mask)"
    wanted = graph(body, f"{JOINED}{BIASES}", more=mask, ms=', "com.microsoft" : 1')
    assert_rewrites(before, wanted, CPU)


def test_a_constant_bias_of_each_head_gets_the_axis_of_examples() -> None:
    numbers = ", ".join(str(at / 4) for at in range(18))
    before = edited(
        ("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, rel)"),
        ("float c = {0.5}", f"float c = {{0.5}}, float[2,3,3] rel = {{{numbers}}}"),
    ).replace("L", "3")
    body = f"y = {ADDED} (x, y_weights, y_biases, , , y_added)"
    weights = f"{JOINED}{BIASES}, float[1,2,3,3] y_added = {{{numbers}}}"
    wanted = graph(body, weights, ms=', "com.microsoft" : 1').replace("L", "3")
    assert_rewrites(before, wanted, CPU)


@pytest.mark.parametrize("low", [-np.inf, float(np.finfo(np.float32).min), -1e4])
def test_masked_rows_are_what_the_nodes_make_of_them(low: float) -> None:
    """Some keys of one query, all of another: by definition in float64, and as the nodes run."""
    mask = ", float[2,1,5,5] mask"
    text = edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, mask)"), more=mask)
    text = text.replace("float[N,L,4]", "float[2,5,4]")
    before = storage.from_proto(onnx.parser.parse_model(text))
    after = run(text, CPU).stored
    assert [n.op_type for n in after.proto.graph.node] == ["Attention"]
    rng = np.random.default_rng(0)
    added = np.zeros((2, 1, 5, 5), np.float32)
    added[:, :, 3, 1:] = added[:, :, 2] = low
    feeds = {"x": rng.normal(size=(2, 5, 4)).astype(np.float32), "mask": added}
    (truth,) = Evaluator(before).run(feeds).values()
    errors = []
    for stored in (before, after):
        with Staged(stored, None) as staged, open_session(staged.model) as session:
            (found,) = session.run(feeds).values()
        np.testing.assert_array_equal(np.isnan(found), np.isnan(truth))
        errors.append(np.nanmax(np.abs(found - truth)))
    room = 4 * np.spacing(np.float32(np.nanmax(np.abs(truth))))  # as parity has it
    assert errors[1] <= 2 * errors[0] + room


SCALED: Final = (
    ("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, mask)"),
    ("m = MatMul (p, v)", "m0 = MatMul (p, v) m = Mul (m0, f)"),
)
FACTOR: Final = ", float[N,1,L,L] mask, float[N,1,L,1] f"


@pytest.mark.parametrize("order", ["m0, f", "f, m0"])
@pytest.mark.parametrize("opset", [12, 17])
def test_a_factor_for_each_query_is_multiplied_with_the_result(order: str, opset: int) -> None:
    before = (
        edited(*SCALED, more=FACTOR).replace("m0, f", order).replace('"" : 17', f'"" : {opset}')
    )
    axes = "(f, y_axes)" if opset == 17 else "<axes: ints = [1]> (f)"
    weights = JOINED + (" int64[1] y_axes = {1}, " if opset == 17 else "") + BIASES
    body = f"""
        [y_attention] y_attention = {ADDED} (x, y_weights, y_biases, , , mask)
        [y_factor] y_factor = Squeeze {axes}  y = Mul (y_attention, y_factor)
    """
    wanted = graph(body, weights, more=FACTOR, ms=', "com.microsoft" : 1')
    assert_rewrites(before, wanted.replace('"" : 17', f'"" : {opset}'), CPU)


@pytest.mark.parametrize("shape", ["N,1,1,1", "1,1,L,1", "1,1,1,1"])
def test_a_factor_for_examples_or_queries(shape: str) -> None:
    more = FACTOR.replace("float[N,1,L,1] f", f"float[{shape}] f")
    before = edited(*SCALED, more=more)
    done = run(before, CPU)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Attention", "Squeeze", "Mul"]
    assert_parity(before, done.stored.complete())


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 9))
def test_rows_that_are_masked_throughout(batch: int, length: int, causal: bool, seed: int) -> None:
    """What torch's exporter writes, through both passes: zeros in those rows, and the numbers."""
    rows = "L" if causal else "1"
    text = edited(
        ("s = Mul (s0, c)", "s1 = Mul (s0, c) a0 = Where (c0, zero, low) s = Add (s1, a)"),
        ("m = MatMul (p, v)", "n = IsNaN (p) g = Where (n, zero, p) m = MatMul (g, v)"),
        ("float c = {0.5}", "float c = {0.5}, float zero = {0}, int64[4] all = {1, 1, 1, 1}"),
        more=f", bool[N,1,{rows},L] mask",
    )
    whole = "c0 = Identity (mask)" if causal else "q9 = Shape (x) i9 = Gather (q9, ones)"
    text = text.replace("a0 = Where (c0, zero, low)", f"{whole} EXPANDED a = Where (c0, zero, low)")
    spread = "e9 = Concat <axis = 0> (ones, i9, ones) c0 = Expand (mask, e9)"
    text = text.replace("EXPANDED", "" if causal else spread)
    text = text.replace("int64[4] all = {1, 1, 1, 1}", "int64[1] ones = {1}")
    before = onnx.parser.parse_model(text)
    before.graph.initializer.append(numpy_helper.from_array(np.asarray(-np.inf, np.float32), "low"))
    for node in before.graph.node:
        node.name = f"node_{node.output[0]}"  # onnxruntime loads no two nodes of one name
    done = run(before, EliminateGuard(), CPU)
    assert "Attention" in [n.op_type for n in done.stored.proto.graph.node]
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, 1, length if causal else 1, length)) < 0.5
    mask[0] = False
    feeds = {"x": rng.normal(size=(batch, length, 4)).astype(np.float32), "mask": mask}
    first = storage.from_proto(before)
    (truth,) = Evaluator(first).run(feeds).values()
    errors = []
    for stored in (first, done.stored):
        with Staged(stored, None) as staged, open_session(staged.model) as session:
            (found,) = session.run(feeds).values()
        errors.append(np.max(np.abs(found - truth)))
    assert not truth[0].any()
    assert errors[1] <= 2 * errors[0] + 4 * np.spacing(np.float32(np.max(np.abs(truth))))


@pytest.mark.parametrize("target", ["onnx", "ort-cuda"])
def test_other_targets_stay(target: str) -> None:
    assert not run(graph(NODES), LowerAttention(target)).remarks


MASK: Final = ", float[L,L] mask"
REFUSALS: Final[dict[str, tuple[str, str]]] = {
    "a mask": (
        edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, mask)"), more=MASK),
        "what is added to its scores may not be there for each pair of tokens",
    ),
    "a mask of keys alone": (
        edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, mask)"),
               more=", float[N,1,1,L] mask"),
        "what is added to its scores may not be there for each pair of tokens",
    ),
    "a mask of some examples": (
        edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, mask)"),
               more=", float[M,1,L,L] mask"),
        "what is added to its scores may not be there for each pair of tokens",
    ),
    "a mask made of the scores": (
        edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s2 = Relu (s1) s = Add (s1, s2)")),
        "'s1' is needed by others too",
    ),
    "the scores twice": (
        edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, s1)")),
        "'s1' is needed by others too",
    ),
    "two masks": (
        edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s2 = Add (s1, mask) s = Add (s2, mask)"),
               more=", float[N,1,L,L] mask"),
        "neither operand of what adds to its scores is a product times a number",
    ),
    "rows of -inf become zeros": (
        edited(("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, mask)"),
               ("m = MatMul (p, v)", "n = IsNaN (p) z = Where (n, zero, p) m = MatMul (z, v)"),
               ("float c = {0.5}", "float c = {0.5}, float zero = {0}"),
               more=", float[N,1,L,L] mask"),
        "rows of -inf alone become 0 behind it, and NaN in the operator",
    ),
    "a mask in front of the scale": (
        edited(("s = Mul (s0, c)", "s1 = Add (s0, mask) s = Mul (s1, c)"), more=MASK),
        "its scores come from Add",
    ),
    "a scale of each head": (
        edited(("float c = {0.5}", "float[2,1,1] c = {0.5, 2}")),
        "its scores are not multiplied by one number",
    ),
    "the scale is divided": (
        edited(("Mul (s0, c)", "Div (c, s0)")),
        "its scores are not multiplied by one number",
    ),
    "a scale of 0 means the default": (
        edited(("float c = {0.5}", "float c = {0}")),
        "its scores are multiplied by 0",
    ),
    "another axis": (
        edited(("Softmax <axis = -1>", "Softmax <axis = 2>")),
        "it is not over the keys",
    ),
    "cross-attention": (
        edited(("MatMul (x, wk)", "MatMul (z, wk)"), more=", float[N,L,4] z"),
        "queries, keys and values are made of different tensors",
    ),
    "the projection is read elsewhere": (
        edited(("s = Mul", "e = Relu (q1) s = Mul"), outs=", float[N,L,4] e"),
        "'q1' is needed by others too",
    ),
    "a score is an output": (
        edited(outs=", float[N,2,L,L] p"),
        "'p' is needed by others too",
    ),
    "a weight of two layers": (
        edited(("s = Mul", "e = MatMul (x, wv) s = Mul"), outs=", float[N,L,4] e"),
        "'wv' is read by others, so it would be stored twice",
    ),
    "keys in the order of queries": (
        edited(("[0, 2, 3, 1]", "[0, 2, 1, 3]"), ("MatMul (q, k)", "MatMul (k, k3)"),
               ("s = Mul", "k3 = Transpose <perm = [0, 1, 3, 2]> (q) s = Mul")),
        "an operand of its products is not a projection that is brought into heads",
    ),
    "tokens go into heads": (
        edited(("heads = {0, 0, 2, 2}", "heads = {0, -1, 4, 1}"),
               ("joined = {0, 0, 4}", "joined = {0, -1, 2}")),
        "its result is not known to have the heads side by side",
    ),
    "the heads stay apart": (
        edited(("[0, 2, 1, 3]> (m)", "[0, 2, 3, 1]> (m)")),
        "its heads are not put side by side again",
    ),
    "a nonlinearity behind it": (
        edited(("y = Reshape (t, joined)", "u = Relu (t) y = Reshape (u, joined)")),
        "the Transpose behind it is not read by one Reshape",
    ),
    "a projection through an activation": (
        edited(("v2 = Reshape (v1, heads)", "v3 = Relu (v1) v2 = Reshape (v3, heads)")),
        "a projection is no MatMul with a constant",
    ),
    "packed in another order": (
        packed(cut="q = Gather (a, i1)  r = Gather (a, i0)  v = Gather (a, i2)"),
        "queries, keys and values lie in another order",
    ),
    "one packed piece for two": (
        packed(cut="q = Gather (a, i0)  r = Gather (a, i0)  v = Gather (a, i2)"),
        "queries, keys and values lie in another order",
    ),
    "packed behind each other in the heads": (
        packed(("heads = {0, 0, 3, 2, 2}", "heads = {0, 0, 2, 3, 2}"),
               ("[2, 0, 3, 1, 4]", "[3, 0, 2, 1, 4]")),
        "what is cut in queries, keys and values has its axes in another order",
    ),
    "heads and tokens change places": (
        packed(("[2, 0, 3, 1, 4]", "[2, 0, 1, 3, 4]")),
        "what is cut in queries, keys and values has its axes in another order",
    ),
    "packed keys through an activation": (
        packed(("[0, 1, 3, 2]> (r)", "[0, 1, 3, 2]> (r1)"),
               ("v = Gather (a, i2)", "v = Gather (a, i2) r1 = Relu (r)")),
        "an operand of its products is not one of three that lie behind each other",
    ),
    "keys that are not turned": (
        packed(("[0, 1, 3, 2]> (r)", "[0, 1, 2, 3]> (r)")),
        "the axes of its keys are in another order",
    ),
    "packed values of another tensor": (
        packed(("v = Gather (a, i2)", "a4 = Neg (a) v = Gather (a4, i2)")),
        "queries, keys and values are made of different tensors",
    ),
    "a piece that others read": (
        packed(("v = Gather (a, i2)", "v = Gather (a, i2) e = Relu (r)"),
               outs=", float[N,2,L,2] e"),
        "'r' is needed by others too",
    ),
    "what is cut is read by others": (
        packed(("v = Gather (a, i2)", "v = Gather (a, i2) e = Relu (a)"),
               outs=", float[3,N,2,L,2] e"),
        "'a' is needed by others too",
    ),
    "a norm of the queries": (
        packed(("q = Gather (a, i0)", "q4 = Gather (a, i0) q = Softplus (q4)")),
        "an operand of its products is not a projection that is brought into heads",
    ),
    "a factor for each head": (
        edited(*SCALED, more=FACTOR.replace("float[N,1,L,1] f", "float[N,2,L,1] f")),
        "what its result is multiplied by is not known to be the same for all heads",
    ),
    "a factor for each feature": (
        edited(*SCALED, more=FACTOR.replace("float[N,1,L,1] f", "float[N,1,L,2] f")),
        "what its result is multiplied by is not known to be the same for all heads",
    ),
    "one number for all": (
        edited(*SCALED, more=FACTOR.replace("float[N,1,L,1] f", "float f")),
        "what its result is multiplied by is not known to be the same for all heads",
    ),
    "a factor of other queries": (
        edited(*SCALED, more=FACTOR.replace("float[N,1,L,1] f", "float[N,1,M,1] f")),
        "what its result is multiplied by is not known to be one for each query",
    ),
    "a factor that is the product": (
        edited(*SCALED, more=FACTOR).replace("Mul (m0, f)", "Mul (m0, m0)"),
        "what it is multiplied with is not read by one Transpose",
    ),
    "a bias that is no constant": (
        edited(("Add (k0, bk)", "Add (k0, z)"), more=", float[4] z"),
        "a projection has no constant bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str) -> None:
    text, reason = REFUSALS[name]
    assert_refuses(text, CPU, reason)


def test_an_older_runtime_keeps_the_nodes() -> None:
    assert_refuses(graph(NODES), LowerAttention("ort-cpu", "1.22"), "needs onnxruntime 1.23")


def test_a_softmax_of_an_older_opset_is_over_more_than_the_keys() -> None:
    text = graph(NODES).replace('"" : 17', '"" : 12').replace("Softmax <axis = -1>", "Softmax")
    assert_refuses(text, CPU, "it is not over the keys")


def test_another_type_keeps_the_nodes() -> None:
    wide = graph(NODES).replace("float", "double")
    assert_refuses(wide, CPU, "the operator's kernel is for float32, and this is float64")


def network(
    batch: Any,
    length: Any,
    width: int,
    heads: int,
    size: int,
    *,
    scale: float,
    biases: str,
    op: str,
) -> onnx.ModelProto:
    """Attention of random weights; `biases` names the projections that have one."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(np.asarray(scale, np.float32), "c"),
        numpy_helper.from_array(np.asarray([0, 0, heads, size]), "heads"),
        numpy_helper.from_array(np.asarray([0, 0, heads * size]), "joined"),
    ]
    nodes = []
    for name in "qkv":
        weight = rng.normal(0, width**-0.5, (width, heads * size)).astype(np.float32)
        bias = rng.normal(size=heads * size).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{name}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}0"]))
        if name in biases:
            weights.append(numpy_helper.from_array(bias, f"b{name}"))
            nodes.append(helper.make_node("Add", [f"b{name}", f"{name}0"], [f"{name}1"]))
        made = f"{name}{int(name in biases)}"
        nodes.append(helper.make_node("Reshape", [made, "heads"], [f"{name}2"]))
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes.append(helper.make_node("Transpose", [f"{name}2"], [name], perm=perm))
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["s0"]),
        helper.make_node(op, ["s0", "c"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=3),
        helper.make_node("MatMul", ["p", "v"], ["m"]),
        helper.make_node("Transpose", ["m"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "joined"], ["y"]),
    ]
    made_graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, length, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, length, heads * size])],
        weights,
    )
    return helper.make_model(made_graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def packed_network(
    batch: Any, length: Any, width: int, heads: int, size: int, *, cut: str, bias: bool
) -> onnx.ModelProto:
    """The same in one product."""
    rng = np.random.default_rng(1)
    wide = 3 * heads * size
    arrays: dict[str, Any] = {
        "w": rng.normal(0, width**-0.5, (width, wide)).astype(np.float32),
        "c": np.asarray(0.3, np.float32),
        "heads": np.asarray([0, 0, 3, heads, size]),
        "joined": np.asarray([0, 0, heads * size]),
        **{f"i{at}": np.asarray(at) for at in range(3)},
        **{name: np.asarray([at]) for at, name in enumerate(("zero", "one", "two", "three"))},
    }
    if bias:
        arrays["b"] = rng.normal(size=wide).astype(np.float32)
    text = PACKED.replace("CUT", CUTS[cut])
    if not bias:
        text = text.replace("a1 = Add (a0, b)", "").replace("Reshape (a1", "Reshape (a0")
    shape = f"float[{batch},{length},{width}] x"
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> main ({shape})'
        f" => (float[{batch},{length},{heads * size}] y) {{ {text} }}"
    )
    read = {name for node in model.graph.node for name in node.input}
    used = {name: array for name, array in arrays.items() if name in read}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in used.items())
    return model


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([1, 3, "n"]),
    st.sampled_from([1, 5, "length"]),
    st.sampled_from([4, 6, 10]),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from(sorted(CUTS)),
    st.booleans(),
)
def test_any_packed_sizes_keep_the_outputs(
    batch: Any, length: Any, width: int, heads: int, size: int, cut: str, bias: bool
) -> None:
    model = packed_network(batch, length, width, heads, size, cut=cut, bias=bias)
    done = run(model, CPU)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Attention"]
    assert_sound(model, done, CPU)
    assert_parity(model, done.stored.complete())


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([1, 3, "n"]),
    st.sampled_from([1, 5, "length"]),
    st.sampled_from([4, 6, 10]),
    st.integers(1, 4),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0.125, 0.7, 3.0, -1.0]),
    st.sampled_from(["", "q", "kv", "qkv"]),
    st.sampled_from(["Mul", "Div"]),
)
def test_any_sizes_keep_the_outputs(
    batch: Any, length: Any, width: int, heads: int, size: int, scale: float, biases: str, op: str
) -> None:
    model = network(batch, length, width, heads, size, scale=scale, biases=biases, op=op)
    done = run(model, CPU)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Attention"]
    assert_sound(model, done, CPU)
    assert_parity(model, done.stored.complete())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("np.concatenate(weights, axis=1)", "np.concatenate(weights[::-1], axis=1)"),
        ("np.concatenate(biases)", "np.concatenate(biases[::-1])"),
        ('"scale": found.scale', '"scale": 1.0'),
        ('if made.op == "Mul" else 1 / factor if factor else 0.0', ""),
        ('"num_heads": found.parts[0].heads', '"num_heads": 1'),
    ],
)
def test_wrong_arithmetic_would_be_seen(old: str, new: str) -> None:
    model = network(2, 5, 6, 2, 3, scale=0.3, biases="qkv", op="Div")
    rule = mutated(lower_attention, old, new)["LowerAttention"]("ort-cpu")
    assert computes_the_same(model, CPU)
    assert not computes_the_same(model, rule)


def test_a_mask_that_is_lost_would_be_seen() -> None:
    changes = (
        ("s = Mul (s0, c)", "s1 = Mul (s0, c) s = Add (s1, rel)"),
        ("float c = {0.5}", "float c = {0.5}, float[1,1,2,2] rel = {0, 1, -2, 0.5}"),
    )
    model = onnx.parser.parse_model(edited(*changes).replace("N,L", "3,2"))
    rule = mutated(lower_attention, "None, None, added]", "None, None, None]")["LowerAttention"]
    assert computes_the_same(model, CPU)
    assert not computes_the_same(model, rule("ort-cpu"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[at for at, *_ in pieces] != [0, 1, 2]", "False"),
        ("_UNPACKED: Final = (2, 0, 3, 1, 4)", "_UNPACKED: Final = (2, 0, 1, 3, 4)"),
    ],
)
def test_a_wrong_order_of_packed_parts_would_be_seen(old: str, new: str) -> None:
    rule = mutated(lower_attention, old, new)["LowerAttention"]("ort-cpu")
    model = packed_network(2, 2, 6, 2, 3, cut="Gather", bias=True)
    for node in model.graph.node:
        if old.startswith("[at") and node.op_type == "Gather" and "i2" not in node.input:
            node.input[1] = "i1" if node.input[1] == "i0" else "i0"
        elif not old.startswith("[at") and node.output[0] == "a":
            node.attribute[0].ints[:] = [2, 0, 1, 3, 4]
    assert computes_the_same(model, CPU)
    assert not computes_the_same(model, rule)
