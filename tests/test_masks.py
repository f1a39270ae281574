"""What is proven of masks, against what they are."""

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
from onnxnorm.facts import Facts
from onnxnorm.masks import EVERY, FIRST, SOME, find_masks, rows_of
from onnxnorm.module import Module
from onnxnorm.truth import Evaluator

ONES: Final = "a = ConstantOfShape <value = int64[1] {1}> (both) b = Cast <to = 9> (a)"
LARGEST: Final = float(np.finfo(np.float32).max)
CONSTANTS: Final[dict[str, Any]] = {
    "nil": np.int64(0), "one": np.int64(1), "two": np.int64(2), "less": np.int64(-2),
    "front": np.asarray([0]), "back": np.asarray([1]), "last": np.asarray([-1]),
    "yes": np.asarray(True), "no": np.asarray(False), "some": np.asarray([[True], [False]]),
    "rows": np.asarray([[2, 0], [1, 5]]), "whole": np.asarray([1, 2, 1, 1]),
    "lowest": np.float32(-LARGEST), "infinite": np.float32(-np.inf), "half": np.float32(0.5),
    "zero": np.float32(0), "nan": np.float32(np.nan),
    "numbers": np.asarray([3.0, -2.0], np.float32),
}  # fmt: skip


def graph(body: str, wanted: str) -> storage.Stored:
    """A graph of sizes L and K, with a boolean input and a product of tensors."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> main (float[L,2] q, float[2,K] k, bool[L,K] pad,'
        f" float[L,K] user) => ({wanted}) {{ s = MatMul (q, k) n = Shape <end = 1> (q)"
        " rows_ = Squeeze (n) m = Shape <start = 1> (k) keys_ = Squeeze (m)"
        " i0 = Range (nil, rows_, one) i = Unsqueeze (i0, back) j = Range (nil, keys_, one)"
        f" both = Concat <axis = 0> (n, m) {body} }}"
    )
    made = onnx.parser.parse_model(text)
    for name, array in CONSTANTS.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return storage.from_proto(made)


def proven(body: str, kind: str, name: str = "o") -> Any:
    stored = graph(body, f"{kind} o")
    facts = Facts(Module(stored))
    value = facts.module.main.values[name]
    found = find_masks(facts)
    return found.shown(value) if kind.startswith("bool") else found.interval(value)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("o = LessOrEqual (j, i)", {FIRST}),
        ("o = Less (j, i)", set()),
        ("i1 = Add (i, one) o = Less (j, i1)", {FIRST}),
        ("o = GreaterOrEqual (j, i)", set()),
        ("o = GreaterOrEqual (i, nil)", {EVERY}),
        ("o = Greater (i, nil)", set()),
        ("a = Greater (j, i) o = Not (a)", {FIRST}),
        ("a = LessOrEqual (j, i) o = Not (a)", set()),
        ("a = LessOrEqual (j, i) o = And (a, pad)", set()),
        ("a = LessOrEqual (j, i) o = Or (a, pad)", {FIRST}),
        ("a = LessOrEqual (j, i) b = GreaterOrEqual (i, nil) o = And (a, b)", {FIRST}),
        ("i1 = Sub (i, two) o = LessOrEqual (j, i1)", set()),
        ("j1 = Sub (j, two) o = LessOrEqual (j1, i)", {FIRST}),
        ("j1 = Add (j, keys_) o = LessOrEqual (j1, i)", set()),
        ("j1 = Range (one, keys_, one) o = LessOrEqual (j1, i)", set()),
        ("j1 = Range (keys_, nil, less) o = LessOrEqual (j1, i)", set()),
        ("j1 = Unsqueeze (j, back) i1 = Unsqueeze (i0, front) o = LessOrEqual (j1, i1)", set()),
        ("a = LessOrEqual (j, i) o = Transpose (a)", set()),
        ("a = LessOrEqual (j, i) o = Unsqueeze (a, last)", set()),
        ("a = LessOrEqual (j, i) o = Unsqueeze (a, front)", {FIRST}),
        ("o = Expand (yes, both)", {EVERY}),
        ("o = Expand (no, both)", set()),
        ("a = Cast <to = 9> (half) o = Expand (a, both)", {EVERY}),
        ("a = ConstantOfShape <value = int64[1] {1}> (both) o = Cast <to = 9> (a)", {EVERY}),
        ("a = ConstantOfShape <value = int64[1] {0}> (both) o = Cast <to = 9> (a)", set()),
        (f"{ONES} o = Trilu <upper = 0> (b)", {FIRST}),
        (f"{ONES} o = Trilu <upper = 1> (b)", set()),
        (f"{ONES} o = Trilu <upper = 0> (b, less)", set()),
        ("o = Identity (some)", set()),
        ("a = Transpose (some) o = Identity (a)", {FIRST, SOME}),
        ("a = Transpose (some) b = Flatten <axis = 0> (a) o = Or (b, pad)", {FIRST, SOME}),
    ],
)  # fmt: skip
def test_rows(body: str, shown: set[str]) -> None:
    assert proven(body, "bool[A,B]") == shown


@pytest.mark.parametrize(
    ("body", "ends"),
    [
        ("o = Identity (s)", (-(2.0**100), 2.0**100)),
        ("o = Mul (s, numbers)", (-3 * 2.0**100, 3 * 2.0**100)),
        ("o = Div (s, half)", (-(2.0**101), 2.0**101)),
        ("o = Where (pad, zero, lowest)", (-LARGEST, 0)),
        ("o = Where (pad, zero, infinite)", (-math.inf, 0)),
        ("m0 = Where (pad, zero, lowest) o = Add (s, m0)", (-LARGEST - 2.0**100, 2.0**100)),
        ("m0 = Where (pad, zero, lowest) o = Add (m0, m0)", (-math.inf, 0)),
        ("m0 = Where (pad, zero, lowest) a = Add (m0, m0) o = Max (a, lowest)", (-LARGEST, 0)),
        ("m0 = Where (pad, zero, infinite) o = Neg (m0)", (0, math.inf)),
        ("a = Cast <to = 1> (pad) b = Sub (half, a) o = Mul (b, lowest)",
         (-LARGEST / 2, LARGEST / 2)),
        ("a = Tanh (s) o = Sub (a, half)", (-1.5, 0.5)),
        ("a = Tanh (s) o = Min (a, zero)", (-1, 0)),
        ("a = Tanh (s) o = Trilu (a)", (-1, 1)),
        ("a = Cast <to = 10> (numbers) b = Cast <to = 1> (a) o = Add (b, b)", (-4, 6)),
        ("a = Where (pad, zero, lowest) b = Cast <to = 10> (a) o = Cast <to = 1> (b)",
         (-math.inf, 0)),
    ],
)  # fmt: skip
def test_intervals(body: str, ends: tuple[float, float]) -> None:
    assert proven(body, "float[A,B]") == ends


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("o = Identity (user)", "'user' is an input, which may hold anything"),
        ("o = Mul (nan, s)", "'nan' holds NaN"),
        ("a = Where (pad, zero, infinite) o = Mul (a, zero)", "nothing is known of what Mul"),
        ("a = Where (pad, zero, infinite) o = Sub (a, a)", "nothing is known of what Sub"),
        ("o = Div (s, s)", "nothing is known of what Div"),
        ("o = Log (s)", "nothing is known of what Log"),
        ("a = Cast <to = 10> (q) b = Cast <to = 10> (k) c = MatMul (a, b) o = Cast <to = 1> (c)",
         "the product 'c' may be infinite"),
    ],
)  # fmt: skip
def test_what_is_not_known(body: str, reason: str) -> None:
    assert reason in proven(body, "float[A,B]")


def test_rows_of_constants() -> None:
    def of(array: Any) -> bool:
        made = graph("o = Identity (tri)", "float[A,B] o")
        tensor = numpy_helper.from_array(np.asarray(array, np.float32), "tri")
        made.proto.graph.initializer.append(tensor)
        facts = Facts(Module(made))
        constant = facts.constant(facts.module.main.values["o"])
        assert constant is not None
        return rows_of(constant)

    assert of([[0, -np.inf], [0, 0]])
    assert not of([[0, -np.inf], [-np.inf, -np.inf]])
    assert not of([[0, np.inf], [0, 0]])
    assert not of([[0, np.nan], [0, 0]])
    assert not of([[-LARGEST, -np.inf], [0, 0]])  # beside another mask it may overflow
    assert not of(0)


@st.composite
def booleans(draw: Any, depth: int = 3) -> tuple[list[str], str]:
    """Nodes that make a boolean of (queries, keys) or fewer axes, and its name."""
    lines: list[str] = []

    def fresh(line: str) -> str:
        lines.append(f"b{len(lines)} = {line}")
        return f"b{len(lines) - 1}"

    def index(depth: int) -> str:
        if not depth or draw(st.booleans()):
            return str(draw(st.sampled_from(["i", "j", "one", "nil", "less", "rows_", "keys_"])))
        op = draw(st.sampled_from(["Add", "Sub"]))
        return fresh(f"{op} ({index(depth - 1)}, {index(depth - 1)})")

    def boolean(depth: int) -> str:
        which = draw(st.integers(0, 5 if depth else 2))
        if which == 0:
            return str(draw(st.sampled_from(["pad", "yes", "no"])))
        if which < 3:
            op = draw(st.sampled_from(["Less", "LessOrEqual", "Greater", "GreaterOrEqual"]))
            return fresh(f"{op} ({index(2)}, {index(2)})")
        if which == 3:
            return fresh(f"Not ({boolean(depth - 1)})")
        op = draw(st.sampled_from(["And", "Or"]))
        return fresh(f"{op} ({boolean(depth - 1)}, {boolean(depth - 1)})")

    name = boolean(depth)
    return lines, fresh(f"Or ({name}, {name})")


@settings(deadline=None, max_examples=60)
@given(booleans(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_what_is_shown_is_so(
    made: tuple[list[str], str], length: int, keys: int, seed: int
) -> None:
    lines, name = made
    stored = graph(" ".join(lines) + f" o = Expand ({name}, both)", "bool[A,B] o")
    facts = Facts(Module(stored))
    shown = find_masks(facts).shown(facts.module.main.values["o"])
    rng = np.random.default_rng(seed)
    feeds = {
        "q": rng.normal(size=(length, 2)).astype(np.float32),
        "k": rng.normal(size=(2, keys)).astype(np.float32),
        "pad": rng.random((length, keys)) < 0.5,
        "user": np.zeros((length, keys), np.float32),
    }
    (found,) = Evaluator(stored).run(feeds).values()
    if EVERY in shown:
        assert found.all()
    if FIRST in shown:
        assert found[:, 0].all()
    if SOME in shown:
        assert found.any(axis=1).all()
