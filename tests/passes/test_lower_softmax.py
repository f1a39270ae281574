"""Softmax as a call of our operator: what is written, what stays, and that both agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxnorm.ops import costs
from onnxnorm.ops.accuracy import softmax, softmax_tolerance
from onnxnorm.passes import lower_softmax
from onnxnorm.passes.lower_softmax import LowerSoftmax
from onnxnorm.session import open_session
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated
from tests.ops.calls import Array, assert_close, needs_library

pytestmark = needs_library
RULE: Final = LowerSoftmax("ort-cpu", True)
IMAGE: Final = "1,3,8,8"
LONG: Final = "1,128000"
HIDING: Final = f"float[4,64] mask = {{{', '.join(['0'] * 128 + ['-10000'] * 128)}}}"
NARROW: Final = f"float[4,32] mask = {{{', '.join(['0'] * 64 + ['-10000'] * 64)}}}"
ROWS: Final = "2,4,64"
BEYOND: Final = "12,512,512"  # the cache; too much for a float64 truth in a test


def graph(body: str, dims: str, constants: str = "", *, ours: bool = False, **given: Any) -> str:
    dtype, opset = given.get("dtype", "float"), given.get("opset", 17)
    imports = f'"" : {opset}' + (', "onnxnorm" : 1' if ours else "")
    listed = f"<{constants}>" if constants else ""
    inputs = given.get("inputs", "")
    return f"""
    <ir_version: {given.get("ir", 8)}, opset_import: [{imports}]>
    main ({dtype}[{dims}] x{inputs}) => ({dtype}[{dims}] y) {listed} {{ {body} }}
    """


MASKED: Final = "y = onnxnorm.TwoPassMaskedSoftmax <axis: int = 2> (x, y_scale, mask)"
DECOMPOSED: Final = (
    "m = ReduceMax <axes: ints = [1]> (x) d = Sub (x, m) e = Exp (d) t = ReduceSum (e, c)"
    " y = Div (e, t)"
)

# before, its constants, dims, what is written, its constants
GOLDENS: Final[dict[str, tuple[str, str, str, str, str]]] = {
    "over channels": (
        "y = Softmax <axis: int = 1> (x)",
        "",
        IMAGE,
        "y = onnxnorm.TwoPassSoftmax <axis: int = 1> (x)",
        "",
    ),
    "a negative axis": (
        "y = Softmax <axis: int = -3> (x)",
        "",
        IMAGE,
        "y = onnxnorm.TwoPassSoftmax <axis: int = 1> (x)",
        "",
    ),
    "a log softmax over channels of unknown height and width": (
        "y = LogSoftmax <axis: int = 1> (x)",
        "",
        "N,3,H,W",
        "y = onnxnorm.TwoPassLogSoftmax <axis: int = 1> (x)",
        "",
    ),
    "written out": (
        DECOMPOSED,
        "int64[1] c = {1}",
        IMAGE,
        "y = onnxnorm.TwoPassSoftmax <axis: int = 1> (x)",
        "",
    ),
    "a long row": (
        "y = Softmax (x)",
        "",
        LONG,
        "y = onnxnorm.TwoPassSoftmax <axis: int = 1> (x)",
        "",
    ),
    "a long row of a log softmax": (
        "y = LogSoftmax (x)",
        "",
        "1,32000",
        "y = onnxnorm.TwoPassLogSoftmax <axis: int = 1> (x)",
        "",
    ),
    "scale and mask": (
        "a = Mul (x, s) b = Add (a, mask) y = Softmax (b)",
        f"float s = {{0.25}}, {HIDING}",
        ROWS,
        MASKED,
        f"{HIDING}, float y_scale = {{0.25}}",
    ),
    "scale by division, the mask first": (
        "a = Div (x, s) b = Add (mask, a) y = LogSoftmax (b)",
        f"float[1] s = {{8}}, {HIDING}",
        ROWS,
        MASKED.replace("Softmax", "LogSoftmax"),
        f"{HIDING}, float y_scale = {{0.125}}",
    ),
    "a mask alone": (
        "b = Add (mask, x) y = Softmax (b)",
        HIDING,
        ROWS,
        MASKED,
        f"{HIDING}, float y_scale = {{1}}",
    ),
    "a mask that hides half of short rows": (
        "b = Add (mask, x) y = Softmax (b)",
        NARROW,
        "2,4,32",
        MASKED,
        f"{NARROW}, float y_scale = {{1}}",
    ),
    "a scale alone, beyond the cache": (
        "a = Mul (s, x) y = Softmax (a)",
        "float s = {0.25}",
        BEYOND,
        MASKED.replace("mask", "y_mask"),
        "float[1] y_mask = {0}, float y_scale = {0.25}",
    ),
    "a scale that others read stays": (
        "a = Mul (x, s) b = Add (a, mask) c = Softmax (b) y = Mul (c, a)",
        f"float s = {{0.25}}, {HIDING}",
        ROWS,
        (
            "a = Mul (x, s) [c] c = onnxnorm.TwoPassMaskedSoftmax <axis: int = 2>"
            " (a, c_scale, mask) y = Mul (c, a)"
        ),
        f"float c_scale = {{1}}, {HIDING}, float s = {{0.25}}",
    ),
}


def unnamed(text: str) -> str:
    return text.replace("[c] ", "")


def holds(name: str) -> bool:
    body, constants, dims, after, after_constants = GOLDENS[name]
    try:
        done = assert_rewrites(
            graph(body, dims, constants),
            graph(unnamed(after), dims, after_constants, ours=True),
            RULE,
        )
    except AssertionError:
        return False
    assert [f.name for f in done.stored.proto.functions] == [done.applied[0].into]
    return True


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    body, constants, dims, after, after_constants = GOLDENS[name]
    done = assert_rewrites(
        graph(body, dims, constants),
        graph(unnamed(after), dims, after_constants, ours=True),
        RULE,
        parity=dims != BEYOND,
    )
    assert [f.name for f in done.stored.proto.functions] == [done.applied[0].into]
    assert done.applied[0].action == "lowered"


@pytest.mark.parametrize("target", ["onnx", "ort-cuda"])
def test_nothing_at_all_unless_it_is_asked_for(target: str) -> None:
    before = graph("y = Softmax <axis: int = 1> (x)", IMAGE)
    for rule in (LowerSoftmax(), LowerSoftmax("ort-cpu"), LowerSoftmax(target, True)):
        assert not assert_refuses(before, rule).remarks


SOFT: Final = "y = Softmax <axis: int = 1> (x)"
JOIN: Final = "b = Add (x, mask) y = Softmax (b)"

REFUSALS: Final[dict[str, tuple[str, str]]] = {
    "a single value": (graph(SOFT, "1,1,8,8"), "it is over a single value"),
    "short rows": (graph("y = Softmax (x)", "4,1024"), "rows of 1024 are not shown to be faster"),
    "rows of unknown size": (graph("y = Softmax (x)", "4,N"), "rows of unknown size"),
    "a short log softmax": (graph("y = LogSoftmax (x)", "4,1024"), "only from 32000 on"),
    "few columns": (graph(SOFT, "8,64,32"), "fewer than 64 columns"),
    "one unknown dim behind": (graph(SOFT, "8,64,N"), "fewer than 64 columns"),
    "several axes at once": (
        graph("y = Softmax <axis: int = 1> (x)", IMAGE, opset=11),
        "it is not over one axis",
    ),
    "another type": (graph(SOFT, IMAGE, dtype="float16"), "measured in float32 only"),
    "a mask that hides nothing": (
        graph(JOIN, "2,4,32", "float[32] mask = {" + ", ".join(["0"] * 32) + "}"),
        "a mask before rows of 32 is not shown to be faster, only from 64 on",
    ),
    "a mask that is computed": (
        graph(JOIN, "2,4,32", inputs=", float[4,32] mask"),
        "a mask before rows of 32 is not shown to be faster, only from 64 on",
    ),
    "a mask over short rows": (
        graph(JOIN, "2,4", "float[4] mask = {0, 0, -10000, -10000}"),
        "a mask before rows of 4 is not shown to be faster, only from 16 on",
    ),
    "a scale over short rows": (
        graph("a = Mul (s, x) y = Softmax (a)", "8,64,64", "float s = {0.25}"),
        "a scale before rows of 64 is not shown to be faster, only from 128 on",
    ),
    "a scale over few elements": (
        graph("a = Mul (s, x) y = Softmax (a)", "2,128", "float s = {0.25}"),
        "a scale is not shown to be faster with fewer than 6144 elements",
    ),
    "a mask in front of an inner axis": (
        graph("b = Add (x, x) y = Softmax <axis: int = 1> (b)", "8,64,32"),
        "measured over the last axis only",
    ),
    "an old opset": (graph(SOFT, IMAGE, opset=13), "needs opset 14, and the model has 13"),
    "an old IR version": (graph(SOFT, IMAGE, ir=7), "came with IR version 8"),
    "another version of our domain": (
        graph(SOFT, IMAGE).replace('"" : 17', '"" : 17, "onnxnorm" : 2'),
        "imports version 2 of our domain",
    ),
    "in a function": (
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        main (float[1,3,8,8] x) => (float[1,3,8,8] y) { y = local.F (x) }
        <domain: "local", opset_import: ["" : 17]>
        F (x) => (y) { y = Softmax <axis: int = 1> (x) }""",
        "in a model-local function",
    ),
    "another function of that name": (
        """<ir_version: 8, opset_import: ["" : 17, "onnxnorm" : 1]>
        main (float[1,3,8,8] x) => (float[1,3,8,8] y) { y = Softmax <axis: int = 1> (x) }
        <domain: "onnxnorm", opset_import: ["" : 17]>
        TwoPassSoftmax <axis> (X) => (Y) { Y = Identity (X) }""",
        "another function onnxnorm.TwoPassSoftmax",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    before, reason = REFUSALS[name]
    assert_refuses(before, RULE, reason)


def test_a_mask_at_run_time_joins_too() -> None:
    before = graph(JOIN, "2,4,64", inputs=", float[4,64] mask")
    done = run(before, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["TwoPassMaskedSoftmax"]
    assert_sound(before, done, RULE)
    assert_parity(before, done.stored.complete())


def test_a_mask_before_an_inner_axis_stays_before_it() -> None:
    before = graph("b = Add (x, m) y = Softmax <axis: int = 1> (b)", IMAGE, "float[8] m = {1}")
    before = before.replace("{1}", "{1, 2, 3, 4, 5, 6, 7, 8}")
    done = run(before, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Add", "TwoPassSoftmax"]
    assert_sound(before, done, RULE)


# ** any shape, axis, scale and mask **


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    rank = draw(st.integers(1, 4))
    dims = draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    axis = draw(st.integers(-rank, rank - 1))
    dims[axis] = max(dims[axis], 2)  # over a single value it is refused
    nodes, constants, value = [], [], "x"
    if draw(st.booleans()):
        scale = draw(st.sampled_from([0.125, 3.0, -0.5, 1e-3]))
        array = np.full(draw(st.sampled_from([(), (1,)])), scale, np.float32)
        constants.append(numpy_helper.from_array(array, "s"))
        sides = [value, "s"]
        op = draw(st.sampled_from(["Mul", "Div"]))
        if op == "Mul" and draw(st.booleans()):
            sides.reverse()
        nodes.append(helper.make_node(op, sides, ["scaled"]))
        value = "scaled"
    shape = list(dims)
    op = draw(st.sampled_from(["Softmax", "LogSoftmax"]))
    # A log softmax with one entry left is 0 exactly, and parity has no scale to judge 1e-7 by.
    hidden = [-1e9, -np.inf] if op == "Softmax" else [-7, -30]
    if draw(st.booleans()):
        kept = draw(st.integers(0, rank))
        mask_dims = [d if draw(st.booleans()) else 1 for d in dims[kept:]]
        if kept == 0 and draw(st.booleans()):
            mask_dims = [2, *mask_dims]
            shape = [2, *shape]
            axis = axis + 1 if axis >= 0 else axis
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        array = rng.choice(np.array([0, -1, *hidden]), mask_dims, p=[0.5, 0.3, 0.1, 0.1])
        constants.append(numpy_helper.from_array(array.astype(np.float32), "mask"))
        sides = [value, "mask"] if draw(st.booleans()) else ["mask", value]
        nodes.append(helper.make_node("Add", sides, ["masked"]))
        value = "masked"
    nodes.append(helper.make_node(op, [value], ["y"], axis=axis))
    model = helper.make_graph(
        nodes,
        "any",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    opset = draw(st.sampled_from([14, 17, 18, 21]))
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@given(models(), st.integers(0, 99))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_softmax_agrees_with_the_library_without_it_and_in_the_reference_evaluator(
    tmp_path: Path, model: onnx.ModelProto, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # everything pays
        patch.setattr(costs, "softmax", lambda *_, **__: None)
        patch.setattr(costs, "masked_softmax", lambda *_, **__: None)
        done = run(model, RULE)
        assert len(done.applied) == 1
        assert_sound(model, done, RULE)
        assert_parity(model, done.stored.complete())
    made = done.stored.complete()
    assert [n.domain for n in made.graph.node] == ["onnxnorm"]
    onnx.checker.check_model(made, full_check=True)
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(seed).standard_normal(dims).astype(np.float32)
    with np.errstate(all="ignore"):
        (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
        (evaluated,) = ReferenceEvaluator(made).run(None, {"x": x})
    results = [np.asarray(wanted), np.asarray(evaluated)]
    for each, libraries in ((model, ()), (made, ()), (made, None)):
        path = tmp_path / "model.onnx"
        onnx.save(each, path)
        with open_session(path, libraries=libraries) as session:
            results.append(session.run({"x": x})["y"])
    values, formed = before_the_softmax(model, x)
    last = model.graph.node[-1]
    how: dict[str, Any] = {"log": last.op_type == "LogSoftmax"}
    truth = softmax(values, last.attribute[0].i, **how)
    tolerance = softmax_tolerance(values, last.attribute[0].i, np.float32, formed=formed, **how)
    # The reference evaluator takes the logarithm of a softmax that may have underflowed.
    lost = truth < (np.log(np.finfo(np.float32).tiny) if how["log"] else -np.inf)
    results[:2] = [np.where(lost, truth, each).astype(np.float32) for each in results[:2]]
    for result in results:
        assert_close(result, truth, tolerance)


def before_the_softmax(model: onnx.ModelProto, x: Array) -> tuple[Array, Array]:
    """What the last node gets, in float64, and what went into it.

    That is 1.5 (|s x| + |mask|): the product, the sum and the inverse of a divisor take a rounding
    each, and the tolerance counts two.
    """
    known = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    known["x"] = x.astype(np.float64)
    formed = np.zeros(())
    for node in model.graph.node[:-1]:
        a, b = (known[name] for name in node.input)
        if node.op_type == "Add":
            known[node.output[0]] = a + b
            formed = 1.5 * (np.abs(a) + np.abs(b))
        else:
            known[node.output[0]] = a * b if node.op_type == "Mul" else a / b
            formed = 1.5 * np.abs(known[node.output[0]])
    return known[model.graph.node[-1].input[0]], formed


# ** mutants: each must be caught by a golden or a refusal above **

MUTANTS: Final[dict[str, tuple[str, str, str]]] = {
    "axis": ('{"axis": axis}', '{"axis": -1}', "over channels"),
    "kind": (
        '"Log" if norm.kind == "log_softmax"',
        '"Log" if norm.kind == "softmax"',
        "a long row",
    ),
    "inverse": ("scale = 1 / number if", "scale = number if", "scale by division, the mask first"),
    "scale": ("np.asarray(front.scale,", "np.asarray(1,", "scale and mask"),
    "mask": ("np.zeros(1, np", "np.ones(1, np", "a scale alone, beyond the cache"),
    "readers": (
        "return made if only_read_by(value, readers, facts) else None",
        "return made",
        "a scale that others read stays",
    ),
    "sides of Mul": ("(1, 0) if made.op", "(1,) if made.op", "a scale alone, beyond the cache"),
    "hidden share": (">= _MUCH", "> 1", "a mask that hides half of short rows"),
    "which side is scaled": ("max(found", "min(found", "scale by division, the mask first"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, golden = MUTANTS[name]
    mutant = mutated(lower_softmax, old, new)["LowerSoftmax"]("ort-cpu", True)
    monkeypatch.setattr(f"{__name__}.RULE", mutant)
    assert not holds(golden)
