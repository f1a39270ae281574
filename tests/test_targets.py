"""docs/targets.md says what the table of forms says."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Final

import pytest

from onnxnorm.lowering import ATTENTION, FORMS, OWN, RESIDUAL, TARGETS, Form
from onnxnorm.passes import PASSES

DOCS: Final = Path(__file__).parents[1] / "docs" / "targets.md"
ROWS: Final = (*FORMS, *RESIDUAL, ATTENTION, *OWN)


def row(form: Form) -> str:
    """A row of the table as docs/targets.md has it."""
    targets = "all" if form.targets == TARGETS else ", ".join(form.targets)
    since = ".".join(map(str, form.since))
    cells = (form.name, ", ".join(form.kinds), targets, since, form.measured or "not measured")
    return f"| {' | '.join(cells)} | {form.defects or 'none known'} |"


@pytest.mark.parametrize("form", ROWS, ids=lambda f: f"{f.name} {f.kinds[0]}")
def test_each_row_is_in_the_docs(form: Form) -> None:
    assert row(form) in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_docs_have_no_other_rows() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| form | kinds |"))
    table = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        table.append(line)
    assert sorted(table) == sorted(map(row, ROWS))


def test_every_form_is_written_by_a_pass_that_there_is() -> None:
    for form in ROWS:
        name = form.written_by.partition(" ")[0]
        assert name in PASSES
        if form not in FORMS:
            text = inspect.getsource(importlib.import_module(PASSES[name].partition(":")[0]))
            # A softmax's name is put together from its parts.
            parts = [
                p.replace("LogSoftmax", "").replace("Softmax", "") for p in form.name.split(", ")
            ]
            assert all(part in text for part in parts)


def test_whatever_was_not_measured_on_cuda_says_so() -> None:
    for form in ROWS:
        if form.targets == ("ort-cuda",):
            assert "on CUDA not measured" in form.measured
