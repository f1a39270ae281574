"""Tell faster from slower from neither: the statistics on recorded times, the measurement on fakes.

No test looks at the clock: times are simulated, or were recorded once from a model against itself.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxnorm import latency
from onnxnorm.errors import ProviderError, RuntimeRejection, UsageError
from onnxnorm.latency import LatencyResult, Timing, measure
from onnxnorm.session import open_session
from onnxnorm.trials import Estimate, Trial, estimate, student_quantile
from tools.bench_latency import Noise, false_claims, simulate, trial_from_json

NONE = "no measurable difference"
RECORDED = sorted((Path(__file__).parent / "data").glob("latency_aa_*.json"))

NOISES = {
    "bias 1 %": Noise(session=0.01),
    "bias 2 %": Noise(session=0.02),
    "bias 3 %": Noise(session=0.03),
    "spikes in a quarter of the runs": Noise(spikes=0.25),
    "drift": Noise(drift=0.05),
    "turns that differ more than sessions": Noise(session=0.002, turn=0.08),
    "a busy machine": Noise(stalls=0.2),
    "silence": Noise(0, 0, 0, 0, 1e-6, 0),
}


# -- the statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [8, 12])
@pytest.mark.parametrize("name", NOISES)
def test_a_model_against_its_own_copy_is_not_different(name: str, pairs: int) -> None:
    found = [estimate(simulate(seed, noise=NOISES[name], pairs=pairs)) for seed in range(40)]
    assert sum(each.verdict == NONE for each in found) >= 38


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_sessions_of_one_model_are_not_different(path: Path) -> None:
    recorded = [trial_from_json(each) for each in json.loads(path.read_text())]
    assert len(recorded) >= 20
    assert estimate(recorded).verdict == NONE
    for pairs in (8, 12):
        assert sum(not false_claims(recorded, seed, pairs) for seed in range(40)) >= 38


def test_there_are_recordings() -> None:
    assert len(RECORDED) >= 2


@pytest.mark.parametrize("pairs", [8, 12])
@pytest.mark.parametrize(("ratio", "verdict"), [(0.9, "faster"), (1.1, "slower")])
def test_ten_percent_are_found(ratio: float, verdict: str, pairs: int) -> None:
    found = [estimate(simulate(seed, ratio=ratio, pairs=pairs)) for seed in range(40)]
    assert sum(each.verdict == verdict for each in found) >= 38


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_half_the_time_is_found_in_recorded_noise(path: Path) -> None:
    recorded = [trial_from_json(each) for each in json.loads(path.read_text())]
    halved = [
        Trial(
            t.fresh,
            t.first,
            t.second,
            tuple(tuple(0.5 * x for x in turn) for turn in t.candidate),
        )
        for t in recorded
    ]
    assert estimate(halved).verdict == "faster"


@pytest.mark.parametrize("name", ["bias 1 %", "bias 3 %", "drift"])
def test_the_interval_covers_the_truth_as_often_as_it_says(name: str) -> None:
    covered = 0
    for seed in range(100):
        low, high = estimate(simulate(seed, ratio=0.93, noise=NOISES[name])).interval
        covered += low <= 0.93 <= high
    # 100 draws with probability 0.95 fall below 88 once in 500 times.
    assert covered >= 88


def trial(fresh: bool, first: float = 1.0, second: float = 1.0, candidate: float = 1.0) -> Trial:
    return Trial(fresh, ((first,),), ((second,),), ((candidate,),))


def test_the_ratio_is_the_geometric_mean_over_pairs() -> None:
    found = estimate([trial(False, 1, 4, 2), trial(True, 2, 8, 8)])
    assert found.ratio == pytest.approx(2 ** ((1 - 1 + 2 + 0) / 4))


def test_interval_and_band_are_the_formulas() -> None:
    steps = np.array([0.01, -0.02, 0.04, -0.01])
    trials = [
        trial(bool(k % 2), math.exp(e), math.exp(-e), 1.5 * math.exp(3 * e))
        for k, e in enumerate(steps)
    ]
    found = estimate(trials)
    # d = log 1.5 + 2e and d' = log 1.5 + 4e; a fifth of the eight is one at either end.
    pairs = math.log(1.5) + np.stack([2 * steps, 4 * steps], axis=1)
    ordered = np.sort(pairs.ravel())
    mean = ordered[1:-1].mean()
    spread = np.clip(pairs, ordered[1], ordered[-2]).mean(axis=1).std(ddof=1)
    half = 4.302652729749464 * spread / (0.75 * 2)  # three of four trials' worth: 2 degrees
    null = np.sqrt(0.75 * np.mean(np.array([0.02, 0.04, 0.04, 0.02]) ** 2))  # 0.08 winsorized
    band = 3.182446305284263 * null / (0.75 * 2)
    assert found.ratio == pytest.approx(np.exp(mean))
    assert found.interval == pytest.approx((np.exp(mean - half), np.exp(mean + half)))
    assert found.band == pytest.approx((np.exp(-band), np.exp(band)))


def test_a_trial_that_stalls_moves_nothing() -> None:
    calm = simulate(3, ratio=0.8)
    for role in ("first", "second", "candidate"):
        stalled: Any = tuple(tuple(100 * x for x in turn) for turn in getattr(calm[4], role))
        changed: dict[str, Any] = {role: stalled}
        found = estimate([*calm[:4], replace(calm[4], **changed), *calm[5:]])
        assert found.verdict == "faster"
        assert found.ratio == pytest.approx(0.8, rel=0.03)


def test_a_turn_counts_by_its_median_and_a_trial_by_its_middle_turn() -> None:
    base = ((1.0, 1.0, 90.0), (2.0, 2.0, 2.0), (7.0, 1.0, 7.0))
    candidate = ((2.0, 0.1, 2.0), (4.0, 4.0, 99.0), (70.0, 70.0, 1.0))
    trials = [Trial(k % 2 == 0, base, base, candidate) for k in range(4)]
    assert estimate(trials).ratio == pytest.approx(2)


@given(
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
    drift=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
)
def test_units_drift_and_the_originals_order_do_not_matter(
    scale: float, seed: int, drift: list[float]
) -> None:
    trials = simulate(seed, pairs=4, samples=3, ratio=1.2)

    def scaled(turns: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(x * scale * f for x in t) for t, f in zip(turns, drift, strict=True))

    moved = [Trial(t.fresh, scaled(t.second), scaled(t.first), scaled(t.candidate)) for t in trials]
    wanted, found = estimate(trials), estimate(moved)
    assert found.verdict == wanted.verdict
    assert found.ratio == pytest.approx(wanted.ratio)
    assert found.band == pytest.approx(wanted.band)
    assert found.interval == pytest.approx(wanted.interval)


def verdict_of(trials: list[Trial]) -> tuple[str, str]:
    found: Estimate = estimate(trials)
    return found.verdict, found.reason


def test_what_only_fresh_processes_show_is_no_claim() -> None:
    trials = [trial(k >= 4, 1, 1.001, 1.2 if k >= 4 else 1.0) for k in range(12)]
    verdict, reason = verdict_of(trials)
    assert verdict == NONE
    assert "do not reproduce" in reason


def test_halves_that_point_in_opposite_ways_are_no_claim() -> None:
    trials = [trial(k >= 4, 1, 1.001, 1.2 if k >= 4 else 0.97) for k in range(12)]
    found = estimate(trials)
    assert found.interval[0] > 1
    assert found.verdict == NONE


def test_inside_the_band_is_no_claim() -> None:
    trials = [trial(k % 2 == 1, 1, 1.3 if k % 4 < 2 else 0.77, 1.05) for k in range(12)]
    verdict, reason = verdict_of(trials)
    assert verdict == NONE
    assert "inside the A/A band" in reason


def test_an_interval_that_holds_one_is_no_claim() -> None:
    trials = [trial(k % 2 == 1, 1, 1, 2.0 if k < 5 else 1.0) for k in range(12)]
    found = estimate(trials)
    assert found.ratio > found.band[1]
    assert found.verdict == NONE
    assert "holds 1" in found.reason


def test_three_pairs_are_too_few() -> None:
    verdict, reason = verdict_of([trial(k == 1, 1, 1, 0.5) for k in range(3)])
    assert verdict == NONE
    assert "too few" in reason
    assert verdict_of([trial(k % 2 == 1, 1, 1, 0.5) for k in range(4)])[0] == "faster"


def test_a_difference_that_is_not_claimed_says_why() -> None:
    few = [trial(k == 1, 1, 1, 0.5) for k in range(3)]
    (said,) = latency._undecided(estimate(few))
    assert said.startswith("Nothing is claimed: 3 session pairs are too few for a claim.")
    for trials in ([trial(k % 2 == 1, 1, 1, 0.5) for k in range(4)],
                   [trial(k % 2 == 1, 1, 1, 1.0) for k in range(3)]):  # fmt: skip
        assert latency._undecided(estimate(trials)) == ()


def test_pairs_of_one_kind_are_halved_alternately() -> None:
    alternating = [trial(False, 1, 1.001, 1.2 if k % 2 else 1.0) for k in range(12)]
    assert estimate(alternating).verdict == NONE
    assert estimate([trial(False, 1, 1.001, 1.2) for _ in range(12)]).verdict == "slower"


@pytest.mark.parametrize("trials", [[], [trial(False)], [trial(False), Trial(True, (), (), ())]])
def test_too_little_is_an_error(trials: list[Trial]) -> None:
    with pytest.raises((UsageError, statistics.StatisticsError)):
        estimate(trials)


@pytest.mark.parametrize(
    ("degrees", "confidence", "quantile"),
    [
        (1, 0.95, 12.706204736),
        (2, 0.95, 4.302652730),
        (3, 0.95, 3.182446305),
        (8, 0.95, 2.306004135),
        (11, 0.95, 2.200985160),
        (12, 0.99, 3.054539589),
        (200, 0.95, 1.971896224),
    ],
)
def test_students_quantiles(degrees: int, confidence: float, quantile: float) -> None:
    assert student_quantile(degrees, confidence) == pytest.approx(quantile, rel=1e-9)


# -- planning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [8, 12, 15])
def test_the_schedule_is_balanced(pairs: int) -> None:
    schedule = latency._schedule(pairs, random.Random(3))
    assert [fresh for fresh, _ in schedule] == [k % 2 == 1 for k in range(pairs)]
    for kind in (False, True):
        orders = Counter(order for fresh, order in schedule if fresh is kind)
        assert max(orders.values()) <= -(-pairs // 12)
        assert all(set(order) == set(latency._ROLES) for order in orders)
    assert schedule == latency._schedule(pairs, random.Random(3))
    assert schedule != latency._schedule(pairs, random.Random(4))


def pace(run: float, opening: float = 0.1, together: bool = True) -> latency._Pace:
    return latency._Pace(
        {False: opening, True: opening + 1}, run, run, settle=0.01, together=together
    )


@pytest.mark.parametrize("run", [5e-6, 1e-3, 0.1])
def test_a_plan_keeps_its_budget(run: float) -> None:
    here = pace(run)
    kinds = [False, True] * 4
    for seconds in (15.0, 30.0, 60.0, 600.0):
        plan = here.plan(kinds, seconds)
        used = sum(here.open[kind] + here.turns_seconds(plan) for kind in kinds)
        assert used <= seconds or (plan.turns, plan.samples) == (1, 1)
        assert plan.samples <= max(30, 0.03 / (plan.loop * run) + 1)


def test_less_time_means_fewer_samples_and_then_fewer_turns() -> None:
    plans = [pace(0.02).plan([False] * 8, seconds) for seconds in (90, 30, 12, 8, 1)]
    work = [(plan.turns, plan.samples) for plan in plans]
    assert work == sorted(work, reverse=True)
    assert work[0][0] == 6
    assert work[-1] == (1, 1)
    assert all(samples >= 3 for _, samples in work[:-1])


def test_short_runs_are_timed_several_at_once() -> None:
    assert pace(5e-6).plan([False], 60).loop == 40
    assert pace(1.0).plan([False], 60).loop == 1


def test_sessions_one_after_the_other_have_one_turn() -> None:
    assert pace(1e-3, together=False).plan([False], 600).turns == 1


def test_a_trial_that_took_longer_makes_the_next_one_shorter() -> None:
    here = pace(0.02)
    before = here.plan([True] * 8, 60)
    here.learn(True, before, opening=4.4, turning=9 * here.turns_seconds(before))
    after = here.plan([True] * 8, 60)
    assert here.open == pytest.approx({False: 0.1, True: 2.2})
    assert here.stretch == pytest.approx(3)
    assert after.turns * after.samples < before.turns * before.samples


class StoppedClock(latency._Clock):
    """A budget of which a given part is spent."""

    def __init__(self, budget: float, spent: float = 0.0) -> None:
        super().__init__(0.0, budget, None)
        self.now = spent

    def elapsed(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("opening", "count", "said"),
    [(0.1, 12, False), (3.5, 9, False), (9.0, 8, False), (20.0, 2, True), (600.0, 2, True)],
)
def test_pairs_are_given_up_last_and_said_to_be(opening: float, count: int, said: bool) -> None:
    notes: list[str] = []
    assert latency._affordable(12, pace(0.05, opening), StoppedClock(55), notes) == count
    assert bool(notes) is said
    assert all("fewer than the usual 8" in note for note in notes)


@pytest.mark.parametrize(
    ("spent", "done", "stops"),
    [(59, 11, False), (61, 8, True), (61, 7, False), (121, 7, True), (121, 1, False)],
)
def test_when_the_time_is_over(spent: float, done: int, stops: bool) -> None:
    notes: list[str] = []
    assert StoppedClock(60, spent).spent(done, notes) is stops
    assert bool(notes) is stops


# -- timing ------------------------------------------------------------------------------------


class FakeTime:
    """A clock that moves when something runs or sleeps."""

    def __init__(self, busy: float = 0.0) -> None:
        self.now = 0.0
        self.busy_until = busy

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.busy_until)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def running(self, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def test_a_sample_is_the_mean_of_its_runs_in_milliseconds(fake_time: FakeTime) -> None:
    run = fake_time.running(9.0, 0.001, 0.003, 0.002)
    assert latency.time_runs(run, samples=2, loop=2, wake_seconds=0) == pytest.approx((2, 2))


def test_a_turn_begins_with_untimed_runs(fake_time: FakeTime) -> None:
    run = fake_time.running(0.008, 0.004, 0.001)
    times = latency.time_runs(run, samples=1, loop=1, wake_seconds=0.01)
    assert times == pytest.approx((1,))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(
    fake_time: FakeTime, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    calls: list[str] = []
    fake = SimpleNamespace(
        isenabled=lambda: enabled,
        disable=lambda: calls.append("off"),
        enable=lambda: calls.append("on"),
    )
    monkeypatch.setattr(latency, "gc", fake)

    def fails() -> None:
        calls.append("run")
        if "off" in calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latency.time_runs(fails, 1, 1, 0.0)
    assert calls == ["run", "off", "run"] + ["on"] * enabled


def test_a_warm_up_lasts_until_runs_get_no_faster(fake_time: FakeTime) -> None:
    latency._warm(fake_time.running(0.9, 0.5, 0.3, 0.2, 0.1), 20.0)
    assert 2.0 < fake_time.now < 10.0
    fake_time.now = 0.0
    latency._warm(fake_time.running(30.0), 20.0)
    assert fake_time.now == 30.0


def test_the_next_turn_waits_until_threads_stop_spinning(fake_time: FakeTime) -> None:
    fake_time.busy_until = 0.05
    assert 0.05 <= latency._settle() < 0.06
    fake_time.busy_until = 99.0
    assert latency._settle() == pytest.approx(0.25, abs=0.01)


# -- the measurement, with sessions that only pretend ------------------------------------------


class Stage:
    """Sessions that return simulated times, and what was done with them."""

    def __init__(self, candidate: float = 1.0, fail: BaseException | None = None) -> None:
        self.rng = random.Random(5)
        self.candidate = candidate
        self.fail = fail
        self.open = 0
        self.most_open = 0
        self.log: list[tuple[str, str, bool]] = []
        self.stored: set[Path] = set()

    def seat(self, spec: Any, role: str, fresh: bool) -> Any:
        stage = self
        factor = self.rng.lognormvariate(0, 0.01) * (self.candidate if role == "candidate" else 1)
        stage.open += 1
        stage.most_open = max(stage.most_open, stage.open)
        stage.log.append(("open", role, fresh))

        class Seat:
            opened = settled = 1e-4

            def wait(self) -> None:
                stage.log.append(("wait", role, fresh))

            def turn(self, plan: latency._Plan) -> tuple[float, ...]:
                stage.log.append(("turn", role, fresh))
                if stage.fail is not None and fresh:
                    raise stage.fail
                scatter = stage.rng.lognormvariate
                return tuple(factor * scatter(0, 0.01) for _ in range(plan.samples))

            def close(self) -> None:
                stage.open -= 1

        return Seat()


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Stage]:
    def build(**how: Any) -> Stage:
        stage = Stage(**how)

        def here(spec: Any, role: str, feeds: Any, warm_seconds: float | None = None) -> Any:
            return stage.seat(spec, role, False)

        def apart(spec: Any, role: str, stored: Path) -> Any:
            stage.stored.add(stored)
            assert (stored / "feeds.npz").is_file()
            return stage.seat(spec, role, True)

        monkeypatch.setattr(latency, "_Here", here)
        monkeypatch.setattr(latency, "_Apart", apart)
        monkeypatch.setattr(latency, "model_bytes", lambda path: 1000)
        return stage

    return build


X = {"x": np.ones(3, np.float32)}


def test_a_measurement_interleaves_three_sessions_in_each_trial(
    staged: Callable[..., Stage],
) -> None:
    stage = staged(candidate=0.8)
    heard: list[tuple[str, float | None]] = []
    result = measure(
        "a.onnx", "b.onnx", X, pairs=8, progress=lambda text, part: heard.append((text, part))
    )
    assert result.verdict == "faster"
    assert result.ratio == pytest.approx(0.8, rel=0.03)
    assert result.summary.startswith(f"faster: {result.ratio:.3f} times the original's latency")
    assert (result.pairs, result.fresh_pairs) == (8, 4)
    assert (result.provider, result.threads, result.not_measured) == ("cpu", None, ("cuda",))
    assert result.original.samples == 2 * result.candidate.samples
    assert result.original.runs == 2 * result.candidate.runs
    assert result.notes == ()
    assert stage.open == 0
    assert stage.most_open == 3
    openings = [role for what, role, _ in stage.log if what == "open"][2:]  # after calibration
    assert [len(set(openings[k : k + 3])) for k in range(0, 24, 3)] == [3] * 8
    assert heard[0] == ("latency: warm-up", 0.0)
    assert heard[-1] == ("latency: done", 1.0)
    fractions = [part for _, part in heard if part is not None]
    assert fractions == sorted(fractions)
    assert not any(path.exists() for path in stage.stored)


def test_every_session_of_a_trial_is_ready_before_any_is_timed(
    staged: Callable[..., Stage],
) -> None:
    stage = staged()
    measure("a.onnx", "b.onnx", X, pairs=2, budget_seconds=5)
    trial_log = [what for what, _, fresh in stage.log if fresh]
    assert trial_log[:7] == ["open"] * 3 + ["wait"] * 3 + ["turn"]


def test_turns_go_forth_and_back(staged: Callable[..., Stage]) -> None:
    stage = staged()
    here = pace(1e-4)
    spec = latency._Spec({}, "cpu", None, ())
    order = ("second", "candidate", "first")
    found = latency._trial(spec, X, None, order, latency._Plan(3, 5, 1, 0.0), here)
    turns = [role for what, role, _ in stage.log if what == "turn"]
    assert turns == [*order, *reversed(order), *order]
    assert [len(found.first), len(found.second), len(found.candidate)] == [3, 3, 3]
    assert len(found.first[0]) == 5


def test_the_same_model_is_not_different(staged: Callable[..., Stage]) -> None:
    staged()
    result = measure("a.onnx", "a.onnx", X, pairs=8)
    assert result.verdict == NONE
    assert result.summary.startswith(NONE)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeRejection("it broke", "Sorry.")])
def test_nothing_is_left_behind_when_it_ends_early(
    staged: Callable[..., Stage], failure: BaseException
) -> None:
    stage = staged(fail=failure)
    with pytest.raises(type(failure)):
        measure("a.onnx", "b.onnx", X, pairs=8)
    assert stage.open == 0
    assert stage.stored
    assert not any(path.exists() for path in stage.stored)


def test_large_models_are_opened_one_after_the_other(
    staged: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged(candidate=0.5)
    monkeypatch.setattr(latency, "available_memory", lambda: 11999)  # 2 x 3 x 1000 is over half
    result = measure("a.onnx", "b.onnx", X, pairs=8)
    assert stage.most_open == 1
    assert result.verdict == "faster"
    assert any("one after the other" in note for note in result.notes)


def test_models_that_fit_and_memory_that_is_unknown(
    staged: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    staged()
    spec = latency._Spec({role: Path("a") for role in latency._ROLES}, "cpu", None, ())
    for free in (12000, None):
        monkeypatch.setattr(latency, "available_memory", lambda free=free: free)
        assert latency._fits_together(spec, [])
    monkeypatch.setattr(latency, "device_memory", lambda: 100)
    on_device = latency._Spec(spec.paths, "cuda", None, ())
    assert not latency._fits_together(on_device, [])


def test_a_python_that_cannot_start_another_stays_in_process(
    staged: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    staged()
    monkeypatch.setattr(sys, "executable", "")
    result = measure("a.onnx", "b.onnx", X, pairs=8)
    assert result.fresh_pairs == 0
    assert any("no pair ran in a fresh process" in note for note in result.notes)


def test_a_measurement_that_makes_no_sense(staged: Callable[..., Stage]) -> None:
    with pytest.raises(UsageError, match="too few"):
        measure("a.onnx", "b.onnx", X, pairs=1)
    for budget in (0, -1, math.nan):
        with pytest.raises(UsageError, match="budget"):
            measure("a.onnx", "b.onnx", X, budget_seconds=budget)


def test_cuda_that_is_not_usable_measures_nothing(
    staged: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged()

    def lack(name: str) -> str:
        raise ProviderError(f"no {name}", "Install it.")

    monkeypatch.setattr(latency, "resolve_provider", lack)
    with pytest.raises(ProviderError):
        measure("a.onnx", "b.onnx", X, provider="cuda")
    assert stage.log == []


# -- the measurement, for real -----------------------------------------------------------------


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> main (float[3] x) => (float[3] y) {y = Relu(x)}'
    )
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No process of ours and no temporary folder outlives the test."""
    folder = tmp_path_factory.mktemp("temporary")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
        assert list(folder.iterdir()) == []
        assert psutil.Process().children() == []
    finally:
        tempfile.tempdir = before


@pytest.mark.usefixtures("nothing_left")
def test_two_real_pairs_from_any_folder_without_a_sound(
    relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("json", "onnx", "numpy", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')")
    monkeypatch.chdir(tmp_path)
    result = measure("relu.onnx", relu, X, pairs=2, threads=1, budget_seconds=1)
    assert (result.pairs, result.fresh_pairs, result.threads) == (2, 1, 1)
    assert result.verdict == NONE
    assert 0 < result.original.min <= result.original.p50 <= result.original.p90
    assert LatencyResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("nothing_left")
def test_a_fresh_process_survives_ctrl_c_and_ends_with_its_input(
    relu: Path, tmp_path: Path
) -> None:
    spec = latency._Spec({"first": relu}, "cpu", 1, ())
    seat = latency._Apart(spec, "first", latency.save_feeds(X, tmp_path))
    seat.wait()
    seat._process.send_signal(signal.SIGINT)
    assert len(seat.turn(latency._Plan(1, 4, 2, 0.0))) == 4
    seat.close()
    assert seat._process.returncode in {0, -signal.SIGKILL}


@pytest.mark.usefixtures("nothing_left")
def test_a_model_that_fails_in_a_fresh_process_fails_here_in_the_same_words(
    relu: Path, tmp_path: Path
) -> None:
    spec = latency._Spec({"first": relu}, "cpu", 1, ())
    stored = latency.save_feeds({"other": X["x"]}, tmp_path)
    seat = latency._Apart(spec, "first", stored)
    with pytest.raises(RuntimeRejection, match=r"relu\.onnx: the model has no input 'other'"):
        seat.wait()
    seat.close()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("sys.exit('no memory')", "status 1: no memory$"),
        ("sys.exit(3)", "status 3$"),
        ("os.close(1); sys.stdin.readline(); sys.stdin.readline()", "status -9$"),
    ],
)
def test_a_process_that_ends_unexpectedly_is_reported(
    relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, said: str
) -> None:
    monkeypatch.setattr(latency, "_BOOTSTRAP", f"import os, sys; {end}")
    seat = latency._Apart(latency._Spec({"first": relu}, "cpu", 1, ()), "first", tmp_path)
    with pytest.raises(RuntimeRejection) as caught:
        seat.wait()
    seat.close()
    assert re.search(rf"relu\.onnx: the process .* ended with {said}", caught.value.what)


@pytest.mark.usefixtures("nothing_left")
def test_an_interrupt_while_processes_run_leaves_none(
    relu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = "import sys\nfor line in sys.stdin: print('{\"times\": [1.0]}', flush=True)"
    monkeypatch.setattr(latency, "_BOOTSTRAP", echo)
    seen: list[int] = []

    def interrupted(self: Any, plan: latency._Plan) -> tuple[float, ...]:
        seen.append(len(psutil.Process().children()))
        raise KeyboardInterrupt

    monkeypatch.setattr(latency._Apart, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(relu, relu, X, pairs=4, budget_seconds=1)
    assert seen == [3]


def test_sessions_are_opened_as_a_user_opens_them(
    relu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def spy(path: Path, **options: Any) -> Any:
        asked.append((path, dict(options)))
        return open_session(path, **{**options, "provider": "cpu", "libraries": ()})

    monkeypatch.setattr(latency, "open_session", spy)
    libraries = (Path("ops.so"),)
    latency._Here(latency._Spec({"first": relu}, "cuda", 1, libraries), "first", X).close()
    wanted = {"provider": "cuda", "threads": 1, "deterministic": False, "libraries": libraries}
    assert asked == [(relu, wanted)]


def test_a_model_that_fails_while_it_is_timed_is_rejected(relu: Path) -> None:
    seat = latency._Here(latency._Spec({"first": relu}, "cpu", 1, ()), "first", X)

    def breaks() -> None:
        raise ValueError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : out of luck")

    seat._call = breaks
    with pytest.raises(RuntimeRejection, match="cannot run it: out of luck"):
        seat.turn(latency._Plan(1, 1, 1, 0.0))
    seat.close()


FEEDS: Mapping[str, Any] = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "reversed": np.arange(6, dtype=np.int64)[::-1],
    "bfloat16": np.arange(4).astype(ml_dtypes.bfloat16),
    "float8": np.arange(4).reshape(2, 2).astype(ml_dtypes.float8_e4m3fn),
    "int4": np.arange(-4, 4).astype(ml_dtypes.int4),
    "bool": np.array([True, False]),
    "scalar": np.array(2, ml_dtypes.bfloat16),
    "number": 3,
    "empty": np.empty((0, 3), ml_dtypes.bfloat16),
    "unsigned": np.array([7], np.uint8),
    "text": np.array(["a", "é"], object),
    "sequence": [np.ones(2, np.float32), np.ones((1, 2), ml_dtypes.bfloat16)],
    "absent": None,
}


@pytest.mark.parametrize("name", FEEDS)
def test_feeds_reach_another_process_as_they_are(tmp_path: Path, name: str) -> None:
    found = latency.load_feeds(latency.save_feeds({name: FEEDS[name], "last": 1}, tmp_path))
    assert list(found) == [name, "last"]
    wanted = FEEDS[name]
    if wanted is None:
        assert found[name] is None
        return
    assert isinstance(found[name], list) is isinstance(wanted, list)
    some, others = (each if isinstance(each, list) else [each] for each in (found[name], wanted))
    for one, other in zip(some, others, strict=True):
        expected = np.asarray(other)
        assert one.dtype == expected.dtype
        assert one.shape == expected.shape
        assert one.tolist() == expected.tolist()


# -- memory ------------------------------------------------------------------------------------


def test_the_size_of_a_model_is_that_of_all_its_files(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "main (float[500] x) => (float[500] y) { y = Add (x, w) }"
    )
    weight = onnx.numpy_helper.from_array(np.zeros(500, np.float32), "w")
    model.graph.initializer.append(weight)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    sizes = [each.stat().st_size for each in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert latency.model_bytes(path) == sum(sizes) > 2000


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:    7 kB\n"}, 7168),
        ({"meminfo": "MemAvailable: 7 kB", "max": "max", "current": "1"}, 7168),
        ({"meminfo": "MemAvailable: 7 kB", "max": "5000", "current": "1000"}, 4000),
        ({"meminfo": "MemTotal: 9 kB"}, None),
    ],
)
def test_available_memory_is_the_least_that_holds(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], found: int | None
) -> None:
    known = {
        "/proc/meminfo": files.get("meminfo"),
        "/sys/fs/cgroup/memory.max": files.get("max"),
        "/sys/fs/cgroup/memory.current": files.get("current"),
    }

    def read_text(path: Path) -> str:
        text = known.get(os.fspath(path))
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(
        latency, "Path", lambda path: SimpleNamespace(read_text=lambda: read_text(Path(path)))
    )
    assert latency.available_memory() == found


# -- the result --------------------------------------------------------------------------------


def test_a_result_is_json_and_back() -> None:
    times = Timing(p50=1.0, p90=2.0, min=0.5, mean=1.2, samples=30, runs=60)
    result = LatencyResult(
        verdict="faster",
        summary="faster: much",
        ratio=0.5,
        interval=(0.4, 0.6),
        confidence=0.95,
        band=(0.9, 1.1),
        original=times,
        candidate=times,
        pairs=8,
        fresh_pairs=4,
        threads=None,
        provider="cpu",
        runtime="1.31.1",
        seconds=3.0,
        budget_seconds=60.0,
        not_measured=("cuda",),
        notes=("a note",),
    )
    data = result.to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["interval"] == [0.4, 0.6]
    assert data["original"]["p50"] == 1.0
    assert LatencyResult.from_json(data) == result


def test_quantiles_are_of_all_samples() -> None:
    found = latency._timing([float(k) for k in range(1, 102)], runs=7)
    assert (found.p50, found.p90, found.min, found.mean) == (51, 91, 1, 51)
    assert (found.samples, found.runs) == (101, 7)
