"""Every case of the catalogue of spellings, and cases by chance, against the rows of `inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.spellings import Case, cases, draw_case, judge
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


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_case_by_chance_has_the_rows_that_it_expects(data: st.DataObject) -> None:
    case = draw_case(data.draw)
    assert not complaints(case), onnx.printer.to_text(case.model)
