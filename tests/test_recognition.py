"""Every case of the catalogue of spellings, and cases by chance, against the rows of `inspect`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.spellings import Case, cases, judge, random_case
from onnxnorm import inspect, storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import find_norms
from onnxnorm.rows import norm_rows

CASES = list(cases())


def rows(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """The rows of `inspect` before any pass has had a look."""
    return norm_rows(find_norms(Facts(Module(storage.from_proto(model)))), ())


ROWS = {case.name: rows(case.model) for case in CASES}


def complaints(case: Case) -> list[str]:
    """What is missed and what is wrong."""
    missed, wrong = judge(case, ROWS.get(case.name) or rows(case.model))
    return [*missed, *wrong]


def said(wrong: Iterable[tuple[str, list[str]]]) -> str:
    return "\n".join(f"{name}: {what}" for name, what in wrong if what)


@pytest.mark.parametrize(
    "family", sorted({case.name.split("/")[0] for case in CASES if case.name.count("/")})
)
def test_every_case_has_the_rows_that_it_expects(family: str) -> None:
    mine = [case for case in CASES if case.name.split("/")[0] == family]
    assert not said((case.name, complaints(case)) for case in mine)


def test_there_are_many_cases_of_either_sort() -> None:
    assert sum(not case.mutation for case in CASES) > 500
    assert sum(bool(case.mutation) for case in CASES) > 150


def test_no_near_miss_is_recognised() -> None:
    seen = 0
    for case in CASES:
        inputs = {e.not_input for e in case.expected} - {None}
        for row in ROWS[case.name] if case.mutation else ():
            assert not (row["recognised"] and row["input"] in inputs), (case.name, row)
            if not row["recognised"]:
                seen += 1
                assert row["reason"], case.name
                assert row["at"], case.name
                assert row["action"] == "none"
    assert seen > 100


def test_a_norm_is_listed_once() -> None:
    for case in CASES:
        found = ROWS[case.name]
        outputs = [row["output"] for row in found]
        assert len(set(outputs)) == len(outputs), (case.name, outputs)
        nodes = [n for row in found if row["recognised"] for n in row["nodes"]]
        shared = {n for n in nodes if nodes.count(n) > 1}
        noted = any("shares" in n for row in found for n in row["notes"])
        assert not shared or noted or any(row["reason"] for row in found), (case.name, shared)


@pytest.mark.parametrize("case", CASES[::101], ids=lambda case: case.name)
def test_inspect_prints_these_rows(case: Case) -> None:
    printed = inspect(case.model).to_json()["norms"]
    assert judge(case, printed) == ((), ())
    plain = ROWS[case.name]
    keys = ("kind", "input", "output", "axes", "epsilon", "nodes", "recognised")
    assert [[r[k] for k in keys] for r in printed] == [[r[k] for k in keys] for r in plain]


def with_rank(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Choices that leave the rank of the input known."""

    def choose(name: str, options: Sequence[Any]) -> Any:
        return draw(st.sampled_from([o for o in options if o not in ("unknown", "function")]), name)

    return choose


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_case_by_chance_has_the_rows_that_it_expects(data: st.DataObject) -> None:
    case = random_case("drawn", with_rank(data.draw))
    assert not complaints(case), onnx.printer.to_text(case.model)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_without_a_rank_a_near_miss_is_no_norm_either(data: st.DataObject) -> None:
    def choose(name: str, options: Sequence[Any]) -> Any:
        last = name in ("knowledge", "near miss")  # nothing is known, and it is a near miss
        return options[-1] if last else data.draw(st.sampled_from(list(options)), name)

    case = random_case("drawn", choose)
    inputs = {e.not_input for e in case.expected} - {None}
    wrong = [r for r in rows(case.model) if r["recognised"] and r["input"] in inputs]
    assert not wrong, onnx.printer.to_text(case.model)


def test_what_needs_a_rank_says_so() -> None:
    found = {
        row["reason"]
        for case in CASES
        for row in ROWS[case.name]
        if not row["recognised"] and "rank unknown" in row["reason"]
    }
    assert any("which a factor of shape" in reason for reason in found), found
