"""Zeros behind a softmax for rows that are masked throughout."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxnorm import storage
from onnxnorm.passes import eliminate_guard
from onnxnorm.passes.eliminate_guard import EliminateGuard
from onnxnorm.session import open_session
from onnxnorm.staging import Staged
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run, text
from onnxnorm.truth import Evaluator
from tests.mutants import mutated

RULE: Final = EliminateGuard()
GUARD: Final = "n = IsNaN (p) g = Where (n, zero, p)"
MASKED: Final = f"""
    m = Where (c, zero, low)  s = MatMul (q, k)  z = Add (s, m)  p = Softmax <axis = -1> (z)
    {GUARD}  y = MatMul (g, v)
"""
INPUTS: Final = "float[N,2,L,3] q, float[N,2,3,K] k, float[N,2,K,3] v, bool[N,1,L,K] c"
LOWEST: Final = float(np.finfo(np.float32).min)


def model(
    body: str = MASKED,
    *,
    inputs: str = INPUTS,
    outs: str = "float[N,2,L,3] y",
    opset: int = 17,
    more: str = "",
    constants: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    """A graph; `zero` is 0 and `low` -infinity, which the text form cannot say."""
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> main ({inputs}) => ({outs}) {{ {body} }}'
    )
    arrays = {"zero": np.float32(0), "low": np.float32(-np.inf), **(constants or {})}
    read = {name for node in made.graph.node for name in node.input}
    for name, array in arrays.items():
        if name in read:
            made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return made


def edited(*changes: tuple[str, str], **options: Any) -> onnx.ModelProto:
    body = MASKED
    for old, new in changes:
        assert body.count(old) == 1, old
        body = body.replace(old, new)
    return model(body, **options)


WITHOUT: Final = MASKED.replace(GUARD, "").replace("(g, v)", "(p, v)")
FACTOR: Final = """
    s = MatMul (q, k)
    [z_ones] z_ones = Cast <to: int = 1> (c)
    [z_any] z_any = ReduceMax <axes: ints = [3], keepdims: int = 1> (z_ones)
    [z_some] z_some = Cast <to: int = 9> (z_any)
    [z_lowest] z_lowest = Where (z_some, low, z_zero)
    [z_mask] z_mask = Where (c, zero, z_lowest)
    z = Add (s, z_mask)  p = Softmax <axis = -1> (z)
    [y_unmasked] y_unmasked = MatMul (p, v)  y = Mul (y_unmasked, z_any)
"""
ZERO: Final = {"z_zero": np.float32(0)}


def test_a_mask_that_may_be_empty_gives_a_factor() -> None:
    done = assert_rewrites(model(), model(FACTOR, constants=ZERO), RULE)
    assert [(r.action, r.into) for r in done.applied] == [
        ("lowered", "Softmax and one factor for each query")
    ]


def test_the_axis_is_an_input_from_opset_18_on() -> None:
    wanted = FACTOR.replace("axes: ints = [3], ", "").replace("(z_ones)", "(z_ones, z_axes)")
    constants = {**ZERO, "z_axes": np.asarray([3])}
    assert_rewrites(model(opset=18), model(wanted, opset=18, constants=constants), RULE)


def test_what_is_masked_where_a_condition_holds() -> None:
    before = edited(("Where (c, zero, low)", "Where (c, low, zero)"), ("(s, m)", "(m, s)"))
    wanted = FACTOR.replace("[z_ones]", "[z_shown] z_shown = Not (c) [z_ones]")
    wanted = wanted.replace("<to: int = 1> (c)", "<to: int = 1> (z_shown)")
    wanted = wanted.replace("Where (c, zero, z_lowest)", "Where (c, z_lowest, zero)")
    wanted = wanted.replace("(s, z_mask)", "(z_mask, s)")
    assert_rewrites(before, model(wanted, constants=ZERO), RULE)


def test_scores_that_are_masked_themselves() -> None:
    before = edited(("m = Where (c, zero, low)", ""), ("Add (s, m)", "Where (c, s, low)"))
    wanted = FACTOR.replace("[z_mask] z_mask = Where (c, zero, z_lowest)", "").replace(
        "Add (s, z_mask)", "Where (c, s, z_lowest)"
    )
    assert_rewrites(before, model(wanted, constants=ZERO), RULE)


FORMS: Final = {
    "not": "n0 = IsNaN (p) n = Not (n0) g = Where (n, p, zero)",
    "equal": "n = Equal (p, p) g = Where (n, p, zero)",
    "not equal": "n0 = Equal (p, p) n = Not (n0) g = Where (n, zero, p)",
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms(form: str) -> None:
    before = edited((GUARD, FORMS[form]))
    assert_rewrites(before, model(FACTOR, constants=ZERO), RULE)


RANGE: Final = """
    qs = Shape (q)  l0 = Gather (qs, two)  i = Range (nil, l0, one)  i1 = Unsqueeze (i, ax)
    ks = Shape (k)  k0 = Gather (ks, three)  j = Range (nil, k0, one)
"""
INDICES: Final = {
    "two": np.int64(2), "three": np.int64(3), "nil": np.int64(0), "one": np.int64(1),
    "ax": np.asarray([1]), "minus": np.int64(-1),
}  # fmt: skip
SHORT: Final = INPUTS.replace(", bool[N,1,L,K] c", "")
EMPTY: Final = [[[[True, False, False], [False, True, False]]]]  # of two queries and three keys
# Nothing is masked throughout, whatever the model is given.
GOES: Final[dict[str, onnx.ModelProto]] = {
    "no mask": edited(("m = Where (c, zero, low)", ""), ("(s, m)", "(s, zero)"), inputs=SHORT),
    "the lowest number": edited(constants={"low": np.float32(LOWEST)}),
    "-10000": edited(constants={"low": np.float32(-1e4)}),
    "products with what is 0 or 1": edited(
        ("m = Where (c, zero, low)", "a = Cast <to = 1> (c) b = Sub (one, a) m = Mul (b, low)"),
        constants={"low": np.float32(LOWEST), "one": np.float32(1)},
    ),
    "two masks, clamped": edited(
        ("m = Where (c, zero, low)", "a = Where (c, zero, low) b = Add (a, a) m = Max (b, low)"),
        constants={"low": np.float32(LOWEST)},
    ),
    "behind tanh": edited(("z = Add (s, m)", "t = Tanh (s) u = Mul (t, fifty) z = Add (u, m)"),
                          constants={"low": np.float32(LOWEST), "fifty": np.float32(50)}),
    "a constant mask": edited(
        ("m = Where (c, zero, low)", ""), ("(s, m)", "(s, tri)"),
        inputs=SHORT.replace("L", "2").replace("K", "3"), outs="float[N,2,2,3] y",
        constants={"tri": np.triu(np.full((2, 3), -np.inf, np.float32), 1)},
    ),
    "a constant condition": edited(
        inputs=SHORT.replace("L", "2").replace("K", "3"), outs="float[N,2,2,3] y",
        constants={"c": np.asarray(EMPTY)},
    ),
    "causal": edited(("m = ", f"{RANGE} c = LessOrEqual (j, i1) m = "),
                     inputs=SHORT, constants=INDICES),
    "causal, the other way": edited(
        ("m = ", f"{RANGE} c1 = GreaterOrEqual (i1, j) t = Expand (yes, qs2) c = And (t, c1) m = "),
        inputs=SHORT, constants={**INDICES, "yes": np.asarray(True), "qs2": np.asarray([1, 1])},
    ),
    "causal, from below": edited(
        ("m = ", f"{RANGE} i2 = Add (i1, one) c = Less (j, i2) m = "),
        inputs=SHORT, constants=INDICES,
    ),
    "causal, by what is hidden": edited(
        ("m = ", f"{RANGE} c1 = Greater (j, i1) c = Not (c1) m = "),
        inputs=SHORT, constants=INDICES,
    ),
    "padding, or the first": edited(
        ("m = ", f"{RANGE} c1 = LessOrEqual (j, i1) c = Or (d, c1) m = "),
        inputs=SHORT + ", bool[N,1,1,K] d", constants=INDICES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOES)
def test_goes(name: str) -> None:
    before = GOES[name]
    done = run(before, RULE)
    assert [(r.action, r.into) for r in done.applied] == [("lowered", "Softmax")]
    wanted = [n for n in before.graph.node if n.op_type != "IsNaN" and "g" not in n.output]
    made = done.stored.proto.graph.node
    assert [(n.op_type, list(n.output)) for n in made] == [
        (n.op_type, list(n.output)) for n in wanted
    ]
    assert list(made[-1].input) == ["p", "v"]
    assert_sound(before, done, RULE)
    assert_parity(before, done.stored.complete())


EMPTIED: Final = "rows may be masked throughout, and"
REFUSALS: Final[dict[str, tuple[onnx.ModelProto, str]]] = {
    "a mask of the user": (
        edited(("m = Where (c, zero, low)", ""),
               inputs=SHORT + ", float[N,1,L,K] m"),
        "'m' is an input, which may hold anything",
    ),
    "numbers times -inf": (
        edited(("m = Where (c, zero, low)",
                "a = Cast <to = 1> (c) b = Sub (one, a) m = Mul (b, low)"),
               constants={"one": np.float32(1)}),
        "nothing is known of what Mul",
    ),
    "integers times the lowest number": (
        edited(("m = Where (c, zero, low)",
                "a = Cast <to = 1> (c) b = Sub (one, a) m = Mul (b, low)"),
               inputs=INPUTS.replace("bool", "int64"),
               constants={"one": np.float32(1), "low": np.float32(LOWEST)}),
        "nothing is known of what Add",
    ),
    "twice the lowest number": (
        edited(("m = Where (c, zero, low)", "a = Where (c, zero, low) m = Add (a, a)"),
               constants={"low": np.float32(LOWEST)}),
        "'z' may be infinite",
    ),
    "a constant mask with an empty row": (
        edited(("m = Where (c, zero, low)", ""), ("(s, m)", "(s, tri)"),
               inputs=SHORT.replace("L", "2").replace("K", "3"), outs="float[N,2,2,3] y",
               constants={"tri": np.triu(np.full((2, 3), -np.inf, np.float32), 0)}),
        "'z' may be infinite",
    ),
    "+inf in a mask": (
        edited(("m = Where (c, zero, low)", ""), ("(s, m)", "(s, odd)"), inputs=SHORT,
               constants={"odd": np.full((1, 1, 1, 1), np.inf, np.float32)}),
        "'z' may be infinite",
    ),
    "NaN in a mask": (
        edited(("m = Where (c, zero, low)", ""), ("(s, m)", "(s, odd)"), inputs=SHORT,
               constants={"odd": np.full((1, 1, 1, 1), np.nan, np.float32)}),
        "'odd' holds NaN",
    ),
    "two masks of -inf": (
        edited(("z = Add (s, m)", "u = Add (s, m) z = Add (u, m)")),
        "'u' may be infinite",
    ),
    "a mask that is moved": (
        edited(("z = Add (s, m)", "e = Expand (m, whole) z = Add (s, e)"),
               constants={"whole": np.asarray([1, 1, 1, 1])}),
        "what masks its scores is moved before it is added",
    ),
    "a mask for each head": (
        edited(inputs=INPUTS.replace("bool[N,1", "bool[N,2")),
        f"{EMPTIED} the mask is as large as the scores",
    ),
    "ones for what is masked": (
        edited((GUARD, GUARD.replace("zero", "one")), constants={"one": np.float32(1)}),
        f"{EMPTIED} what stands in place of NaN is not 0",
    ),
    "a guard that is an output": (
        edited(outs="float[N,2,L,3] y, float[N,2,L,K] g"),
        "'g' is an output or read in a body",
    ),
    "a guard that others read": (
        edited(("y = MatMul", "e = Relu (g) y = MatMul"),
               outs="float[N,2,L,3] y, float[N,2,L,K] e"),
        f"{EMPTIED} 'g' is not read by a MatMul",
    ),
    "a softmax that others read": (
        edited(("y = MatMul", "e = Relu (p) y = MatMul"),
               outs="float[N,2,L,3] y, float[N,2,L,K] e"),
        f"{EMPTIED} 'p' is needed by others",
    ),
    "scores that are an output": (
        edited(outs="float[N,2,L,3] y, float[N,2,L,K] z"),
        f"{EMPTIED} 'z' is needed by others",
    ),
    "where it is NaN is read": (
        edited(outs="float[N,2,L,3] y, bool[N,2,L,K] n"),
        f"{EMPTIED} 'n' is needed by others",
    ),
    "keys on the left": (
        edited(("MatMul (g, v)", "MatMul (w, g)"),
               inputs=INPUTS + ", float[N,2,3,L] w", outs="float[N,2,3,K] y"),
        f"{EMPTIED} 'g' is not read by a MatMul",
    ),
    "one value for each key": (
        edited(inputs=INPUTS.replace("float[N,2,K,3] v", "float[K] v"), outs="float[N,2,L] y"),
        "the shapes of its mask and of what it is multiplied with are not known",
    ),
    "few keys": (
        edited(inputs=INPUTS.replace("K,3] v", "K,13] v").replace("K", "3"),
               outs="float[N,2,L,13] y"),
        "13 features of a head are more than 3 keys",
    ),
    "another axis": (
        edited(("<axis = -1>", "<axis = 2>")),
        "the softmax is not over the last axis",
    ),
    "numbers of the model": (
        edited((GUARD, GUARD.replace("zero", "other")), inputs=INPUTS + ", float other"),
        "what stands in place of NaN is no constant",
    ),
    "a causal mask of the last keys": (
        edited(("m = ", f"{RANGE} c = GreaterOrEqual (j, i1) m = "),
               ("MatMul (g, v)", "MatMul (w, g)"),
               inputs=SHORT + ", float[N,2,3,L] w", outs="float[N,2,3,K] y", constants=INDICES),
        EMPTIED,
    ),
    "a causal mask without the diagonal": (
        edited(("m = ", f"{RANGE} c = Less (j, i1) m = "),
               ("MatMul (g, v)", "MatMul (w, g)"),
               inputs=SHORT + ", float[N,2,3,L] w", outs="float[N,2,3,K] y", constants=INDICES),
        EMPTIED,
    ),
    "a causal mask and padding": (
        edited(("m = ", f"{RANGE} c1 = LessOrEqual (j, i1) c = And (d, c1) m = "),
               ("MatMul (g, v)", "MatMul (w, g)"),
               inputs=SHORT + ", bool[N,1,1,K] d, float[N,2,3,L] w", outs="float[N,2,3,K] y",
               constants=INDICES),
        EMPTIED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str) -> None:
    before, reason = REFUSALS[name]
    assert_refuses(before, RULE, reason)


HALF: Final = {"zero": np.float16(0), "low": np.float16(-65504)}


def test_float16_stays() -> None:
    """A score below -16 beside the lowest number is -infinity there."""
    before = edited(inputs=INPUTS.replace("float", "float16"), outs="float16[N,2,L,3] y",
                    constants=HALF)  # fmt: skip
    assert_refuses(before, RULE, "scores of float16 may be infinite")


def test_scores_that_were_float16_stay() -> None:
    before = edited(
        ("s = MatMul (q, k)", "r = MatMul (q, k) s = Cast <to = 1> (r)"),
        inputs=INPUTS.replace("float[N,2,L,3] q, float", "float16[N,2,L,3] q, float16"),
    )
    assert_refuses(before, RULE, "the product 'r' may be infinite, which in float16 is near")


@pytest.mark.parametrize("filling", [math.nan, 0.5])
def test_other_numbers_where_none_is_needed(filling: float) -> None:
    """What never is chosen does not matter."""
    constants = {"low": np.float32(LOWEST), "zero": np.float32(0), "other": np.float32(filling)}
    before = edited((GUARD, GUARD.replace("zero", "other")), constants=constants)
    assert run(before, RULE).applied


def outputs(stored: storage.Stored, feeds: dict[str, Any]) -> Any:
    with Staged(stored, None) as staged, open_session(staged.model) as session:
        (found,) = session.run(feeds).values()
    return found


def assert_same(before: onnx.ModelProto, after: storage.Stored, feeds: dict[str, Any]) -> None:
    """Agreement as parity has it, on one input, and 0 where all keys are masked."""
    first = storage.from_proto(before)
    (truth,) = Evaluator(first).run(feeds).values()
    errors = [np.max(np.abs(outputs(each, feeds) - truth)) for each in (first, after)]
    assert errors[1] <= 2 * errors[0] + 4 * np.spacing(np.float32(np.max(np.abs(truth))))


@st.composite
def masked(draw: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A graph and inputs with rows that are masked throughout, some keys, and none."""
    batch, heads, length, keys, size = (draw(st.integers(1, 4)) for _ in range(5))
    heads, keys = heads + 1, keys + 1
    whole = (draw(st.sampled_from([1, batch])), 1, draw(st.sampled_from([1, length])), keys)
    rank = draw(st.integers(1, 4))
    shape = whole[-rank:]
    shows, direct = draw(st.booleans()), draw(st.booleans())
    form = draw(st.sampled_from(["", *FORMS]))
    branches = ("{}, low", "low, {}")[not shows]
    changes = [] if not form else [(GUARD, FORMS[form])]
    if direct:
        changes += [("m = Where (c, zero, low)", ""),
                    ("Add (s, m)", f"Where (c, {branches.format('s')})")]  # fmt: skip
    else:
        changes += [("Where (c, zero, low)", f"Where (c, {branches.format('zero')})")]
    named = draw(st.booleans())
    n, length_, k = ("N", "L", "K") if named else (batch, length, keys)
    dims = [str(d) if d == 1 else s for d, s in zip(shape, (n, 1, length_, k)[-rank:], strict=True)]
    inputs = (
        f"float[{n},{heads},{length_},{size}] q, float[{n},{heads},{size},{k}] k,"
        f" float[{n},{heads},{k},{size}] v, bool[{','.join(map(str, dims))}] c"
    )
    outs = f"float[{n},{heads},{length_},{size}] y"
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    feeds = {
        "q": rng.normal(size=(batch, heads, length, size)),
        "k": rng.normal(size=(batch, heads, size, keys)),
        "v": rng.normal(size=(batch, heads, keys, size)),
    }
    shown = rng.random(shape) < 0.6
    shown.reshape(-1, keys)[0] = False
    made = edited(*changes, inputs=inputs, outs=outs, opset=draw(st.sampled_from([11, 13, 17, 21])))
    for node in made.graph.node:
        node.name = f"node_{node.output[0]}"  # onnxruntime loads no two nodes of one name
    return made, {n: a.astype(np.float32) for n, a in feeds.items()} | {"c": shown == shows}


@settings(deadline=None, max_examples=25)
@given(masked())
def test_rows_that_are_masked_throughout(case: tuple[onnx.ModelProto, dict[str, Any]]) -> None:
    before, feeds = case
    done = run(before, RULE)
    assert len(done.applied) == 1, text(done.stored)
    assert "IsNaN" not in {n.op_type for n in done.stored.proto.graph.node}
    assert_sound(before, done, RULE)
    assert_same(before, done.stored, feeds)


MUTANTS: Final = {
    "the mask stays": ("rw.rewire(at, index, added)", "rw.rewire(at, index, at.inputs[index])"),
    "no factor": ('"Mul", [unmasked, factor]', '"Identity", [unmasked]'),
    "full rows": ("[some, mask.lowest, zero]", "[some, zero, mask.lowest]"),
    "the other way": ("if not mask.shows:", "if mask.shows:"),
    "the other branch": ("[mask.kept, lowest] if mask.shows", "[lowest, mask.kept] if mask.shows"),
    "of all queries": ('"axes": [moved.rank - 1]', '"axes": [moved.rank - 2]'),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name: str) -> None:
    before = model()
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {n: rng.normal(size=(2, 2, 3, 3)).astype(np.float32) for n in "qkv"}
    feeds["c"] = np.tril(np.ones((2, 1, 3, 3), bool))
    feeds["c"][0, 0, 1] = False
    assert_same(before, run(before, RULE).stored, feeds)
    old, new = MUTANTS[name]
    rule = mutated(eliminate_guard, old, new)["EliminateGuard"]
    with pytest.raises(AssertionError):
        assert_same(before, run(before, rule()).stored, feeds)
