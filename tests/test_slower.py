"""Nothing slower: passes whose work makes the model slower are left out; by a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import onnx
import pytest

from onnxnorm import analysis, api, workbench
from onnxnorm.analysis import empty
from onnxnorm.report import Report
from tests.test_analysis import THEN, TWO, saved

GIVEN: Final[dict[str, Any]] = {"provider": "cpu", "time_budget": 4.0, "target": "onnx"}


class Clock:
    """Latency by the operators of a model, and a record of what was asked.

    Attributes:
        costs: What each operator costs, 1 where it is not named.
        doubt: Which measurement of a pair, counted by `again`, tells that nothing is slower.
        asked: The operators of both models, and `again`.
    """

    def __init__(self, costs: dict[str, float], doubt: int | None = None) -> None:
        self.costs = costs
        self.doubt = doubt
        self.asked: list[tuple[list[str], list[str], int]] = []

    def __call__(
        self, _: workbench.Workbench, one: Path, other: Path, *, again: int = 0, **__: Any
    ) -> dict[str, Any]:
        first, second = ([n.op_type for n in onnx.load(p).graph.node] for p in (one, other))
        self.asked.append((first, second, again))
        ratio = self.cost(second) / self.cost(first)
        if again == self.doubt:
            ratio = min(ratio, 1.0)
        verdict = "slower" if ratio > 1.01 else "faster" if ratio < 0.99 else "no difference"
        told = {"ratio": ratio, "interval": [ratio, ratio], "verdict": verdict}
        return {**THEN, **told}

    def cost(self, operators: list[str]) -> float:
        return sum(self.costs.get(each, 1.0) for each in operators)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], None]:
    """Put a clock in place of the measurement."""

    def put(clock: Clock) -> None:
        monkeypatch.setattr(workbench.Workbench, "time", lambda *a, **k: clock(*a, **k))
        monkeypatch.setattr(analysis, "analyse", lambda *_: empty())

    return put


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def actions(report: Report, name: str) -> set[str]:
    return {site["action"] for site in report.sites if site["pass"] == name}


def test_the_pass_that_makes_it_slower_is_left_out_and_told(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    clock = Clock({"LayerNormalization": 40.0})
    timed(clock)
    report = api.optimize(saved(tmp_path, TWO), tmp_path / "out.onnx", **GIVEN).report
    made = operators(tmp_path / "out.onnx")
    assert "LayerNormalization" not in made
    assert "BatchNormalization" not in made  # what the other passes did stays
    assert actions(report, "lower-norms") == {"kept"}
    (row,) = (norm for norm in report.norms if norm["kind"] == "layer_norm")
    assert row["action"] == "kept"
    # 9 nodes; without the norm's pass 8, with it a Conv and the operator: 41.
    twice = "5.125 [5.125, 5.125] and 5.125 [5.125, 5.125]"
    assert row["reason"] == f"with lower-norms the model took {twice} times as long"
    assert any("lower-norms was taken back: with" in text for text in report.warnings)
    assert {s["name"]: s["applied"] for s in report.passes}["lower-norms"] == 0
    assert report.latency is not None
    assert report.latency["verdict"] == "faster"
    assert report.parity is not None
    assert report.parity["passed"]
    assert report.nodes["after"] == len(made)
    Report.from_json(report.to_json())


def test_the_whole_is_measured_twice_and_so_is_each_pass(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    clock = Clock({"LayerNormalization": 40.0})
    timed(clock)
    api.optimize(saved(tmp_path, TWO), tmp_path / "out.onnx", parity=False, **GIVEN)
    whole = ["Conv", "LayerNormalization"]
    slow = [(first, again) for first, second, again in clock.asked if second == whole]
    assert slow.count((operators(tmp_path / "model.onnx"), 0)) == 1
    assert slow.count((operators(tmp_path / "model.onnx"), 1)) == 1
    assert slow.count((operators(tmp_path / "out.onnx"), 0)) == 1
    assert slow.count((operators(tmp_path / "out.onnx"), 1)) == 1


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_slower_once_stays_and_so_does_what_is_asked_for(
    tmp_path: Path, timed: Callable[[Clock], None], *, keep: bool
) -> None:
    clock = Clock({"LayerNormalization": 40.0}, doubt=None if keep else 1)
    timed(clock)
    path = saved(tmp_path, TWO)
    report = api.optimize(
        path, tmp_path / "out.onnx", parity=False, keep_slower=keep, **GIVEN
    ).report
    assert operators(tmp_path / "out.onnx") == ["Conv", "LayerNormalization"]
    assert report.latency is not None
    assert report.latency["verdict"] == "slower"
    assert len(clock.asked) == (1 if keep else 2)
    assert any("not a second time" in text for text in report.warnings) is not keep


def test_without_its_only_pass_the_model_is_the_original(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    clock = Clock({"LayerNormalization": 40.0})
    timed(clock)
    path = saved(tmp_path, TWO)
    report = api.optimize(path, tmp_path / "out.onnx", passes="lower-norms", **GIVEN).report
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()
    assert len(clock.asked) == 2  # the original is no third model
    assert report.latency is None
    assert report.latency_skipped == "nothing was changed"
    assert actions(report, "lower-norms") == {"kept"}


def test_several_passes_are_taken_back_one_after_another(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    # A folded norm leaves no operator to put a price on, so one that is there is given a rebate.
    clock = Clock({"BatchNormalization": -3.0, "LayerNormalization": 40.0})
    timed(clock)
    path, names = saved(tmp_path, TWO), ["fold-batchnorm", "lower-norms"]
    report = api.optimize(
        path, tmp_path / "out.onnx", passes=",".join(names), parity=False, **GIVEN
    ).report
    assert "BatchNormalization" in operators(tmp_path / "out.onnx")
    assert "LayerNormalization" not in operators(tmp_path / "out.onnx")
    taken = [text.split()[0] for text in report.warnings if "was taken back" in text]
    assert taken == names[::-1]
    assert {actions(report, name) == {"kept"} for name in names} == {True}


def test_a_model_that_no_pass_alone_makes_slower_stays_and_is_told(
    tmp_path: Path, timed: Callable[[Clock], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock({})
    source = operators(path := saved(tmp_path, TWO))
    # Slower than the original, and no different from what is left without any one pass.
    monkeypatch.setattr(clock, "cost", lambda ops: 1.0 if ops == source else 2.0)
    timed(clock)
    report = api.optimize(path, tmp_path / "out.onnx", parity=False, **GIVEN).report
    assert operators(tmp_path / "out.onnx") == ["Conv", "LayerNormalization"]
    assert any("no pass alone is to blame" in text for text in report.warnings)
