"""The catalogue of spellings says of each model what a formula in float64 says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from models import serialise, spellings
from models.spellings import FAMILIES, Case, Expected, cases, draw_case, judge, random_case

T = TypeVar("T")
CASES = list(cases())

# Relative to the output's largest value: what the type itself and an unstable form may lose.
NOISE = {"float16": 2e-2, "bfloat16": 2.5e-1, "float64": 1e-6, "float32": 1e-4}


class Recorder(ReferenceEvaluator):
    """Keeps every value of every scope, those of the last trip in a Loop."""

    values: ClassVar[dict[str, Any]] = {}

    def run(self, output_names: Any, feed_inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        more["intermediate"] = True
        found: Any = super().run(None, feed_inputs, *rest, **more)
        Recorder.values.update({k: v for k, v in found.items() if k})
        return [found[name] for name in output_names or self.output_names]


def by_reference(case: Case) -> dict[str, NDArray[Any]]:
    Recorder.values = {}
    with np.errstate(all="ignore"):
        Recorder(case.model).run(None, dict(case.feeds))
    return dict(Recorder.values)


def in_main_graph(case: Case) -> bool:
    names = {n for e in case.expected for n in (e.input, e.output)}
    known = {i.name for i in case.model.graph.input}
    return names <= known | {o for n in case.model.graph.node for o in n.output}


def by_runtime(case: Case) -> dict[str, NDArray[Any]]:
    """For what onnx.reference does not know, where all rows are of the main graph."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    known = {o.name for o in (*model.graph.output, *model.graph.input)}
    for name in {n for e in case.expected for n in (e.input, e.output)} - known:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(case.feeds)), strict=True))


def distance(case: Case, row: Expected, values: dict[str, NDArray[Any]]) -> float:
    """How far the model's output is from the row's formula, in units of its largest value."""
    assert row.formula is not None
    x, y = (np.asarray(values[n]).astype(np.float64) for n in (row.input, row.output))
    with np.errstate(all="ignore"):
        wanted = row.formula(x)
    if wanted.shape != y.shape:
        return np.inf
    far = np.abs(wanted - y).max() / max(np.abs(wanted).max(), 1e-30)
    return np.inf if np.isnan(far) else float(far)


def check(case: Case, values: dict[str, NDArray[Any]]) -> None:
    stored = {t.name: numpy_helper.to_array(t) for t in case.model.graph.initializer}
    values = {**stored, **case.feeds, **values}
    for row in case.expected:
        if row.formula is None:
            assert row.optional
        elif row.recognised:
            assert distance(case, row, values) < case.noise(NOISE), row
        elif case.noise(NOISE) == NOISE["float32"] or case.noise(NOISE) == NOISE["float64"]:
            assert distance(case, row, values) > 10 * case.noise(NOISE), row


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_computes_what_it_says(case: Case) -> None:
    if case.valid:
        onnx.checker.check_model(case.model, full_check=True)
    if case.reference:
        check(case, by_reference(case))
    elif case.mutation != "training" and in_main_graph(case):  # that provider does not train
        check(case, by_runtime(case))


def test_the_catalogue_is_the_same_each_time() -> None:
    assert [c.name for c in CASES] == [c.name for c in cases()]
    for one, two in zip(CASES, cases(), strict=True):
        assert serialise(one.model) == serialise(two.model)
        assert one.expected == two.expected
        for name, values in one.feeds.items():
            np.testing.assert_array_equal(values, two.feeds[name])


def test_names_are_unique_and_every_kind_is_there() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
    kinds = {e.kind for c in CASES for e in c.expected if e.recognised}
    assert kinds == {
        "layer_norm",
        "rms_norm",
        "batch_norm",
        "channel_affine",
        "group_norm",
        "instance_norm",
        "l2_norm",
        "softmax",
        "log_softmax",
        "evo_norm",
        "filter_response_norm",
        "weight_standardization",
    }
    misses = {c.mutation for c in CASES}
    assert misses >= {*spellings.LAYER_MISSES, *spellings.RMS_MISSES, *spellings.SOFTMAX_MISSES}


def test_every_option_of_a_spelling_is_alone_in_some_case() -> None:
    for choice, options in spellings.OPTIONS.items():
        for option in options:
            assert any(f"/{choice}={option}/" in c.name for c in CASES), (choice, option)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_case_by_chance_computes_what_it_says(family: str, data: st.DataObject) -> None:
    def choose(name: str, options: Sequence[T]) -> T:
        return data.draw(st.sampled_from(list(options)), label=name)

    case = random_case("drawn", choose, family)
    if case.valid:
        onnx.checker.check_model(case.model, full_check=True)
    if case.reference:
        check(case, by_reference(case))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_case_can_be_drawn(data: st.DataObject) -> None:
    assert draw_case(data.draw).expected


def test_a_near_miss_in_half_precision_is_one_in_single() -> None:
    for number, case in ((int(c.name.split("/")[1]), c) for c in CASES if "by_chance" in c.name):
        if not case.mutation or case.noise(NOISE) < 1e-3:
            continue
        seeded = spellings._Seeded(case.name)

        def choose(name: str, options: Sequence[T], seeded: Any = seeded) -> T:
            chosen: T = seeded(name, options)
            return options[0] if name == "dtype" else chosen

        twin = random_case(case.name, choose, FAMILIES[number % len(FAMILIES)])
        assert twin.mutation == case.mutation
        assert twin.noise(NOISE) == NOISE["float32"]
        check(twin, by_reference(twin))


def rows_of(case: Case) -> list[dict[str, Any]]:
    """What a perfect recogniser prints."""
    return [dataclasses.asdict(dataclasses.replace(e, formula=None)) for e in case.expected]


@pytest.mark.parametrize("case", CASES[::7], ids=lambda case: case.name)
def test_the_expected_rows_are_judged_right(case: Case) -> None:
    assert judge(case, rows_of(case)) == ((), ())


def positive() -> Case:
    return next(c for c in CASES if not c.mutation and not c.expected[0].other_kinds)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "softmax"},
        {"axes": (0,)},
        {"axes": None},
        {"epsilon": 0.7},
        {"epsilon": None},
        {"input": "nobody"},
        {"output": "nobody"},
    ],
)
def test_another_row_is_missed_and_wrong(change: dict[str, Any]) -> None:
    case = positive()
    missed, wrong = judge(case, [{**rows_of(case)[0], **change}])
    assert (len(missed), len(wrong)) == (1, 1)


def test_a_row_that_is_not_recognised_is_missed_only() -> None:
    case = positive()
    missed, wrong = judge(case, [{**rows_of(case)[0], "recognised": False}])
    assert (len(missed), len(wrong)) == (1, 0)
    assert judge(case, []) == (missed, ())


def test_a_near_miss_that_is_recognised_is_wrong() -> None:
    for case in (c for c in CASES if c.mutation and not c.expected[0].recognised):
        (first, *_) = case.expected
        if first.not_input is None:
            continue
        row = {**rows_of(case)[0], "recognised": True}
        assert judge(case, [row])[1], case.name


def test_what_has_to_stay_must_stay() -> None:
    case = next(c for c in CASES if c.name.startswith("layer_norm/mean_is_output"))
    (row,) = rows_of(case)
    assert judge(case, [{**row, "action": "refused"}]) == ((), ())
    assert judge(case, [{**row, "action": "converted"}])[1]


def test_an_affine_that_stayed_outside_is_passed_over() -> None:
    case = positive()
    row = rows_of(case)[0]
    assert judge(case, [row, {**row, "kind": "channel_affine"}]) == ((), ())
