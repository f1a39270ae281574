"""Modules with one piece of their text changed, for tests that have to catch the change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from onnxnorm.errors import OnnxNormError
from onnxnorm.rewrite import Pass
from onnxnorm.testing import assert_parity, run


def mutated(source: Any, old: str, new: str) -> dict[str, Any]:
    """A module's names with one piece of its text replaced."""
    text = Path(source.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    names: dict[str, Any] = {"__name__": source.__name__, "__file__": source.__file__}
    exec(compile(text.replace(old, new), source.__file__, "exec"), names)
    return names


def computes_the_same(
    model: str | onnx.ModelProto, *rules: Pass, crashes: tuple[type[Exception], ...] = ()
) -> bool:
    """Whether passes leave the outputs as they were; `crashes` are differences too."""
    differences: tuple[type[Exception], ...] = (AssertionError, OnnxNormError, *crashes)
    try:
        assert_parity(model, run(model, *rules).stored.complete())
    except differences:
        return False
    return True
