"""A softmax of which only the order is read: what goes, what stays, and that both agree."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser

import onnxnorm
from onnxnorm.errors import OnnxNormError
from onnxnorm.ops.accuracy import softmax, softmax_tolerance
from onnxnorm.passes import eliminate_softmax
from onnxnorm.passes.eliminate_softmax import EliminateSoftmax
from onnxnorm.session import open_session
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated

RULE: Final = EliminateSoftmax()


def graph(body: str, dims: str = "2,5,3", out: str = "int64[2,1,3] y", **given: str) -> str:
    dtype, opset = given.get("dtype", "float"), given.get("opset", "17")
    constants = f"<{given['constants']}>" if "constants" in given else ""
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    main ({dtype}[{dims}] x) => ({out}) {constants} {{ {body} }}
    """


ARG: Final = "y = ArgMax <axis: int = 1> "
DECOMPOSED: Final = (
    "m = ReduceMax <axes: ints = [1]> (x) d = Sub (x, m) e = Exp (d)"
    " s = ReduceSum (e, one) p = Div (e, s) "
)
K: Final = {"constants": "int64[1] k = {2}", "out": "int64[2,2,3] y"}

# before, what is left
GOLDENS: Final = {
    "ArgMax": (graph(f"p = Softmax <axis: int = 1> (x) {ARG}(p)"), graph(f"{ARG}(x)")),
    "of a log softmax": (
        graph(f"p = LogSoftmax <axis: int = -2> (x) {ARG}(p)"),
        graph(f"{ARG}(x)"),
    ),
    "written out": (
        graph(f"{DECOMPOSED} {ARG}(p)", constants="int64[1] one = {1}"),
        graph(f"{ARG}(x)"),
    ),
    "over all axes from the first on": (
        graph(f"p = Softmax <axis: int = 1> (x) {ARG}(p)", opset="11"),
        graph(f"{ARG}(x)", opset="11"),
    ),
    "of any batch": (
        graph(f"p = Softmax <axis: int = 1> (x) {ARG}(p)", "N,5,W", "int64[N,1,W] y"),
        graph(f"{ARG}(x)", "N,5,W", "int64[N,1,W] y"),
    ),
    "the indices of TopK": (
        graph("p = Softmax <axis: int = 1> (x) v, y = TopK <axis: int = 1> (p, k)", **K),
        graph("v, y = TopK <axis: int = 1> (x, k)", **K),
    ),
    "both": (
        graph(
            "p = Softmax <axis: int = 1> (x) v, y = TopK <axis: int = 1> (p, k)"
            " z = ArgMax <axis: int = 1, select_last_index: int = 1> (p)",
            **(K | {"out": "int64[2,2,3] y, int64[2,1,3] z"}),
        ),
        graph(
            "v, y = TopK <axis: int = 1> (x, k)"
            " z = ArgMax <axis: int = 1, select_last_index: int = 1> (x)",
            **(K | {"out": "int64[2,2,3] y, int64[2,1,3] z"}),
        ),
    ),
    "behind a Transpose and a Cast": (
        graph(
            "p = Softmax <axis: int = 1> (x) t = Transpose <perm: ints = [0, 2, 1]> (p)"
            " c = Cast <to: int = 1> (t) y = ArgMax <axis: int = -1> (c)",
            dtype="float16",
            out="int64[2,3,1] y",
        ),
        graph(
            "t = Transpose <perm: ints = [0, 2, 1]> (x) c = Cast <to: int = 1> (t)"
            " y = ArgMax <axis: int = -1> (c)",
            dtype="float16",
            out="int64[2,3,1] y",
        ),
    ),
    "behind a Transpose that turns all": (
        graph(
            "p = Softmax <axis: int = 0> (x) t = Transpose (p) i = Identity (t)"
            " y = ArgMax <axis: int = 2> (i)",
            out="int64[3,5,1] y",
        ),
        graph(
            "t = Transpose (x) i = Identity (t) y = ArgMax <axis: int = 2> (i)",
            out="int64[3,5,1] y",
        ),
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    before, after = GOLDENS[name]
    assert_rewrites(before, after, RULE)


REFUSALS: Final[dict[str, tuple[str, str]]] = {
    "another axis": (
        graph("p = Softmax <axis: int = 2> (x) y = ArgMax <axis: int = 1> (p)"),
        "is along axis 1, and the softmax is not",
    ),
    "the axis by default": (
        graph("p = Softmax <axis: int = 1> (x) y = ArgMax (p)", out="int64[1,5,3] y"),
        "is along axis 0, and the softmax is not",
    ),
    "another axis behind a Transpose": (
        graph(
            "p = Softmax <axis: int = 1> (x) t = Transpose <perm: ints = [0, 2, 1]> (p)"
            " y = ArgMax <axis: int = 1> (t)",
            out="int64[2,1,5] y",
        ),
        "is along axis 1, and the softmax is not",
    ),
    "the softmax is an output": (
        graph(
            f"p = Softmax <axis: int = 1> (x) {ARG}(p)",
            out="int64[2,1,3] y, float[2,5,3] p",
        ),
        "'p' is a graph output",
    ),
    "the values of TopK": (
        graph(
            "p = Softmax <axis: int = 1> (x) v, y = TopK <axis: int = 1> (p, k)",
            **(K | {"out": "int64[2,2,3] y, float[2,2,3] v"}),
        ),
        "the values of TopK",
    ),
    "the smallest": (
        graph(
            "p = Softmax <axis: int = 1> (x) v, y = TopK <axis: int = 1, largest: int = 0> (p, k)",
            **K,
        ),
        "is not for the largest ones in order",
    ),
    "in no order": (
        graph(
            "p = Softmax <axis: int = 1> (x) v, y = TopK <axis: int = 1, sorted: int = 0> (p, k)",
            **K,
        ),
        "is not for the largest ones in order",
    ),
    "somebody else": (
        graph(
            f"p = Softmax <axis: int = 1> (x) {ARG}(p) z = Neg (p)",
            out="int64[2,1,3] y, float[2,5,3] z",
        ),
        "Neg z reads it too",
    ),
    "a narrower type": (
        graph(
            f"p = Softmax <axis: int = 1> (x) c = Cast <to: int = 10> (p) {ARG}(c)"
            " z = ArgMax <axis: int = 1> (p)",
            out="int64[2,1,3] y, int64[2,1,3] z",
        ),
        "Cast c reads it too",
    ),
}


IN_A_FUNCTION: Final = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
main (float[2,5,3] x) => (int64[2,1,3] y) { y = local.f <ax: int = 1> (x) }
<domain: "local", opset_import: ["" : 17]>
f <ax>(x) => (y) { p = Softmax <axis: int = 1> (x) y = ArgMax <axis: int = @ax> (p) }
"""
REFUSALS["the axis is a parameter"] = (IN_A_FUNCTION, "is a parameter of the function")


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    before, reason = REFUSALS[name]
    assert_refuses(before, RULE, reason)


@pytest.mark.parametrize(
    "body",
    [
        "y = Softmax <axis: int = 1> (x)",
        "y = Relu (x)",
        "p = Softmax <axis: int = 1> (x) y = Neg (p)",
    ],
)
def test_what_is_none_of_its_business(body: str) -> None:
    assert not assert_refuses(graph(body, out="float[2,5,3] y"), RULE).remarks


@st.composite
def models(draw: st.DrawFn) -> str:
    rank = draw(st.integers(1, 4))
    dims = draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    axis = draw(st.integers(0, rank - 1))
    perm = draw(st.permutations(range(rank)))
    kind = draw(st.sampled_from(["Softmax", "LogSoftmax"]))
    dtype = draw(st.sampled_from(["float", "float16", "double"]))
    sign = draw(st.sampled_from([0, rank]))
    moved = [dims[a] for a in perm]
    at = list(perm).index(axis)
    moved[at] = 1
    return graph(
        f"p = {kind} <axis: int = {axis - sign}> (x) t = Transpose <perm: ints = {list(perm)}> (p)"
        f" y = ArgMax <axis: int = {at - sign}> (t)",
        ",".join(map(str, dims)),
        f"int64[{','.join(map(str, moved))}] y",
        dtype=dtype,
    )


@given(before=models())
@settings(max_examples=25, deadline=None)
def test_any_shape_axis_and_type_agrees(before: str) -> None:
    done = run(before, RULE)
    assert len(done.applied) == 1
    assert_sound(before, done, RULE)
    assert_parity(before, done.stored.complete())


@given(seed=st.integers(0, 99), spread=st.sampled_from([1.0, 30.0, 1e4]))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_indices_differ_only_where_softmax_rounds_to_a_tie(
    tmp_path: Path, seed: int, spread: float
) -> None:
    before = graph(
        "p = Softmax <axis: int = 1> (x) v, y = TopK <axis: int = 1> (p, k)",
        "4,40",
        "int64[4,3] y",
        constants="int64[1] k = {3}",
    )
    x = (np.random.default_rng(seed).standard_normal((4, 40)) * spread).astype(np.float32)
    x[1, ::3] = -np.inf
    x[2, 7] = x[2, 9] = x[2].max() + 1  # a tie of x stays one
    found = []
    for model in (parser.parse_model(before), run(before, RULE).stored.complete()):
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        with open_session(path) as session:
            found.append(session.run({"x": x})["y"])
    wide = x.astype(np.float64)
    p, off = softmax(wide, 1), softmax_tolerance(wide, 1, np.float32, run=40)
    old, new = (np.take_along_axis(p, indices, 1) for indices in found)
    room = sum(np.take_along_axis(off, indices, 1) for indices in found)
    assert (np.abs(old - new) <= room).all()
    np.testing.assert_array_equal(found[1][2, :2], [7, 9])
    ordered = np.take_along_axis(x, found[1], 1)
    np.testing.assert_array_equal(ordered, -np.sort(-x, axis=1)[:, :3])


def test_it_is_on_by_default_and_the_report_says_what_became_of_the_softmax() -> None:
    done = onnxnorm.optimize(parser.parse_model(GOLDENS["ArgMax"][0]), latency=False)
    assert [node.op_type for node in done.model.graph.node] == ["ArgMax"]
    report = done.report.to_json()
    assert report["parity"]["passed"]
    (row,) = report["norms"]
    assert (row["kind"], row["action"], row["into"]) == ("softmax", "folded", "ArgMax")


MUTANTS: Final[dict[str, tuple[str, str, str]]] = {
    "axis": ("axis not in axes or", "False or", "another axis"),
    "default of ArgMax": ('0 if node.op == "ArgMax" else -1', "1", "the axis by default"),
    "where the axis goes": (
        "tuple(list(perm).index(axis) for axis in axes)",
        "tuple(perm[axis] + 0 * axis for axis in axes)",
        "",
    ),
    "output": ("wrong = wrong or f\"'{value.name}' is {why}\"", "pass", "the softmax is an output"),
    "values": ("if values.name and (", "if False and (", "the values of TopK"),
    "largest": ('not node.attrs.get("largest", 1) or', "", "the smallest"),
    "sorted": ('or not node.attrs.get("sorted", 1)', "", "in no order"),
    "others": (
        'wrong = wrong or f"{node.op} {node.label} reads it too"',
        "pass",
        "somebody else",
    ),
    "narrow": ("return axes if held else None", "return axes", "a narrower type"),
}


@pytest.mark.parametrize("name", [name for name in MUTANTS if MUTANTS[name][2]])
def test_mutants_are_caught(name: str) -> None:
    old, new, refusal = MUTANTS[name]
    mutant = mutated(eliminate_softmax, old, new)["EliminateSoftmax"]()
    with pytest.raises((AssertionError, OnnxNormError)):
        assert_refuses(REFUSALS[refusal][0], mutant, REFUSALS[refusal][1])


def test_an_axis_that_is_not_followed_is_caught() -> None:
    old, new, _ = MUTANTS["where the axis goes"]
    mutant = mutated(eliminate_softmax, old, new)["EliminateSoftmax"]()
    before = graph(
        "p = Softmax <axis: int = 0> (x) t = Transpose <perm: ints = [1, 2, 0]> (p)"
        " y = ArgMax <axis: int = 2> (t)",
        out="int64[5,3,1] y",
    )
    assert len(run(before, RULE).applied) == 1
    assert not run(before, mutant).applied
