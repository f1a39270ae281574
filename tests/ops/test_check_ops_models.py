"""tools/check_ops_models.py: it says what it saw, and fails where a model has no call."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import parser, save

from tests.ops.calls import needs_library
from tools import check_ops_models

pytestmark = needs_library
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[1,3,%d,16] x) => (float[1,3,%d,16] y) { y = Softmax <axis: int = 1> (x) }
"""


def checked(rows: int, folder: Path) -> list[tuple[str, bool]]:
    model = folder / "model.onnx"
    save(parser.parse_model(TEXT % (rows, rows)), model)
    return check_ops_models.check(model, folder, 10.0)


def test_every_way_of_running_a_model_agrees(tmp_path: Path) -> None:
    rows = checked(16, tmp_path)
    assert all(holds for _, holds in rows), rows
    said = " ".join(what for what, _ in rows)
    assert "with the library onnxruntime ran {'TwoPassSoftmax': 1}" in said
    assert "without it none of them" in said
    assert "0.0 ulp of the largest value apart" in said


def test_a_model_without_calls_fails(tmp_path: Path) -> None:
    assert ("nothing was changed", False) in checked(2, tmp_path)


def test_a_library_that_is_not_used_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = check_ops_models.ran
    monkeypatch.setattr(
        check_ops_models, "ran", lambda path, feeds, _, folder: ran(path, feeds, [], folder)
    )
    assert [what for what, holds in checked(16, tmp_path) if not holds] == [
        "with the library onnxruntime ran {}"
    ]
