"""How much faster one model is than another, where that can be told at all.

    ratio = exp(tmean d),   d_i = median_r log(c_ir / a_ir),   d'_i = median_r log(c_ir / b_ir)

Trial i opens three sessions: two of the original (a, b) and one of the candidate (c), and times
them in turns r; a_ir is the median time of a run in one turn. What makes two sessions of one and
the same model differ (where its weights, arenas and threads came to lie) stays for the life of a
session, so more runs do not average it out: the trial is the unit of resampling, and the spread
over trials is the uncertainty (Kalibera and Jones, "Rigorous benchmarking in reasonable time",
ISMM 2013; Mytkowicz et al., "Producing wrong data without doing anything obviously wrong", ASPLOS
2009). tmean is the mean of all d and d' without the fifth at either end, for a machine with other
work stalls a whole trial now and then. e_i = median_r log(a_ir / b_ir) inside the same trial is
the A/A comparison: it costs one session more, and tells what "no difference" looks like here, now.

Half of the trials run each of their sessions in a process of its own. Both models run as a user
runs them: all optimizations on, the same options.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np

from onnxnorm import storage
from onnxnorm.errors import OnnxNormError, RuntimeRejection, UsageError
from onnxnorm.session import (
    device_memory,
    open_session,
    rejections,
    resolve_provider,
    runtime_version,
)
from onnxnorm.trials import (
    CONFIDENCE,
    Estimate,
    Trial,
    Verdict,
    between,
    estimate,
)

Progress = Callable[[str, float | None], None]

FEWEST_PAIRS: Final = 8  # as long as the budget allows one run of each session
QUANTILES: Final = 101  # of the times of one model, from the least to the greatest


@dataclass(frozen=True)
class Recording:
    """All that was timed, before it is judged.

    Attributes:
        trials: The recorded times.
        runs: Timed runs of each of the three roles, over all trials.
        provider: "cpu" or "cuda".
        threads: Intra-op threads asked for; None: left to onnxruntime.
        seconds: Time the measurement took.
        budget_seconds: Time it was given.
        notes: What a reader should know, a sentence each.
    """

    trials: tuple[Trial, ...]
    runs: int
    provider: str
    threads: int | None
    seconds: float
    budget_seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """Time of one run of one model, over all its sessions, in milliseconds.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        min: Least.
        mean: Arithmetic mean.
        samples: Number of measurements; each is the mean of one run or of several in a row.
        runs: Number of timed runs.
        quantiles: The distribution of the samples: QUANTILES values, evenly spaced from the least
            to the greatest sample; empty where they were not kept.
    """

    p50: float
    p90: float
    min: float
    mean: float
    samples: int
    runs: int
    quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Turns:
    """What one session pair says: the median milliseconds of a run, for each turn.

    Attributes:
        fresh: Each session had a process of its own.
        first: The original.
        second: Another session of the original.
        candidate: The candidate.
    """

    fresh: bool
    first: tuple[float, ...]
    second: tuple[float, ...]
    candidate: tuple[float, ...]

    @property
    def trial(self) -> Trial:
        """The trial with one sample in each turn; `estimate` gives for it what it gave before."""
        levels = (self.first, self.second, self.candidate)
        return Trial(self.fresh, *(tuple((level,) for level in each) for each in levels))

    @property
    def ratio(self) -> float:
        """Candidate over original: exp((d + d') / 2)."""
        trial = self.trial
        pair = (between(trial.candidate, trial.first), between(trial.candidate, trial.second))
        return math.exp(statistics.fmean(pair))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Turns:
        """The session pair as a report holds it."""
        return cls(data["fresh"], *(tuple(data[role]) for role in _ROLES))


@dataclass(frozen=True)
class LatencyResult:
    """A measured comparison of two models.

    Attributes:
        verdict: "faster", "slower" or "no measurable difference".
        summary: The verdict as a sentence, with its figures.
        ratio: Candidate over original; below 1 is faster.
        interval: Confidence interval of `ratio`.
        confidence: Coverage of `interval` and `band`.
        band: A/A band: where `ratio` falls when the original is compared with itself.
        original: Times of the original.
        candidate: Times of the candidate.
        pairs: Comparisons of whole sessions that `ratio` rests on.
        fresh_pairs: How many of them ran in fresh processes.
        threads: Intra-op threads asked for; None: left to onnxruntime.
        provider: "cpu" or "cuda".
        runtime: onnxruntime's version.
        seconds: Time the measurement took.
        budget_seconds: Time it was given.
        not_measured: Providers that these figures do not speak of.
        notes: What a reader should know, a sentence each.
        trials: What `ratio`, `interval` and `band` were computed from; empty where not kept.
    """

    verdict: Verdict
    summary: str
    ratio: float
    interval: tuple[float, float]
    confidence: float
    band: tuple[float, float]
    original: Timing
    candidate: Timing
    pairs: int
    fresh_pairs: int
    threads: int | None
    provider: str
    runtime: str
    seconds: float
    budget_seconds: float
    not_measured: tuple[str, ...]
    notes: tuple[str, ...]
    trials: tuple[Turns, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as values that json.dumps takes; `from_json` is the inverse."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyResult:
        """The result that `to_json` wrote."""
        values = dict(data)
        for name in ("interval", "band", "not_measured", "notes"):
            values[name] = tuple(values[name])
        for name in ("original", "candidate"):
            quantiles = tuple(values[name].get("quantiles", ()))
            values[name] = Timing(**{**values[name], "quantiles": quantiles})
        values["trials"] = tuple(Turns.from_json(each) for each in values.get("trials", ()))
        return cls(**values)


# -- the measurement ----------------------------------------------------------------------------

_ROLES: Final = ("first", "second", "candidate")
_ORDERS: Final = tuple(itertools.permutations(_ROLES))

_MOST_TURNS: Final = 6  # what they would average out is not what differs: see the module's text
_LEAST_SAMPLES: Final = 3  # the least whose median drops an outlier
_MOST_SAMPLES: Final = 30
_SAMPLE_SECONDS: Final = 2e-4  # a sample this long is not a measurement of the clock
_BLOCK_SECONDS: Final = 0.03  # the timed part of a turn, where there is time for it
_WARM_SECONDS: Final = 0.05  # the warm-up of a session takes at most so long, or one run
_WAKE_SECONDS: Final = 0.01  # untimed runs at the start of a turn: clock and caches come back
_START_SECONDS: Final = 2.0  # three fresh Pythons with onnxruntime: a first guess
_SETTLE_LIMIT: Final = 0.25


def measure(
    original: str | Path,
    candidate: str | Path,
    feeds: Mapping[str, Any],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    pairs: int = 12,
    seed: int = 0,
    budget_seconds: float = 60.0,
    libraries: Sequence[Path] = (),
    progress: Progress | None = None,
) -> LatencyResult:
    """Time two models against each other: ratio = candidate / original, with its A/A band.

    Where the time does not suffice, there are fewer timed runs, then fewer turns, then fewer
    pairs down to eight; fewer than eight only where one run of each session takes too long, and
    then a note says so.

    Args:
        original: Path of the original model.
        candidate: Path of the model that is compared with it; it takes the same feeds.
        feeds: What both models are run on, as for `Session.run`.
        provider: "cpu", "cuda" or "auto".
        threads: Intra-op threads; None for onnxruntime's own choice.
        pairs: Session pairs wanted; each is one trial.
        seed: Decides the order of sessions.
        budget_seconds: Time it may take, roughly.
        libraries: Shared libraries of custom operators; empty is that of this package, where it is.
        progress: Called as progress(text, fraction done).

    Raises:
        ProviderError: The provider is not usable.
        RuntimeRejection: onnxruntime cannot load or run one of the models, or a process of ours
            ended unexpectedly.
        UsageError: `pairs` or `budget_seconds` makes no sense.
    """
    return result_of(
        record(
            original,
            candidate,
            feeds,
            provider=provider,
            threads=threads,
            pairs=pairs,
            seed=seed,
            budget_seconds=budget_seconds,
            libraries=libraries,
            progress=progress,
        )
    )


def record(
    original: str | Path,
    candidate: str | Path,
    feeds: Mapping[str, Any],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    pairs: int = 12,
    seed: int = 0,
    budget_seconds: float = 60.0,
    libraries: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Recording:
    """Time two models as `measure` does, and return the times without judging them."""
    if pairs < 2:
        raise UsageError(f"{pairs} session pairs are too few", "Use 8 pairs or more.")
    if not budget_seconds > 0:
        raise UsageError(f"a time budget of {budget_seconds} s", "Give it some seconds.")
    began = time.perf_counter()
    spec = _Spec(
        paths={
            "first": Path(original).resolve(),
            "second": Path(original).resolve(),
            "candidate": Path(candidate).resolve(),
        },
        provider=resolve_provider(provider),
        threads=threads,
        libraries=tuple(Path(p).resolve() for p in libraries),
    )
    clock = _Clock(began, budget_seconds, progress)
    notes: list[str] = []
    clock.report("latency: warm-up", 0.0)
    pace = _calibrate(spec, feeds, budget_seconds)
    pace.together = _fits_together(spec, notes)
    wanted = _affordable(pairs, pace, clock, notes)
    schedule = _schedule(wanted, random.Random(seed))
    if not sys.executable:
        schedule = [(False, order) for _, order in schedule]
        notes.append("This Python cannot start another: no pair ran in a fresh process.")
    trials: list[Trial] = []
    runs = 0
    with tempfile.TemporaryDirectory(prefix="onnxnorm-") as folder:
        stored = save_feeds(feeds, Path(folder)) if any(f for f, _ in schedule) else None
        for index, (fresh, order) in enumerate(schedule):
            if clock.spent(index, notes):
                break
            clock.report(f"latency: pair {index + 1} of {wanted}", index / wanted)
            plan = pace.plan([kind for kind, _ in schedule[index:]], clock.left())
            trials.append(_trial(spec, feeds, stored if fresh else None, order, plan, pace))
            runs += plan.turns * plan.samples * plan.loop
    clock.report("latency: done", 1.0)
    return Recording(
        trials=tuple(trials),
        runs=runs,
        provider=spec.provider,
        threads=spec.threads,
        seconds=clock.elapsed(),
        budget_seconds=budget_seconds,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Spec:
    """What the sessions of a measurement have in common, and the model of each role."""

    paths: Mapping[str, Path]
    provider: str
    threads: int | None
    libraries: tuple[Path, ...]


@dataclass(frozen=True)
class _Plan:
    """How one trial is timed: turns of each session, samples in a turn, runs in a sample."""

    turns: int
    samples: int
    loop: int
    wake_seconds: float


@dataclass
class _Pace:
    """What things cost here, in seconds; corrected by each trial.

    Attributes:
        open: Opening and closing the three sessions of a trial, by whether it is a fresh one.
        run: One run of the slower model.
        fastest_run: One run of the faster model.
        settle: Waiting until the process is quiet after a turn.
        stretch: How much longer turns take than these figures say.
        together: Three sessions at once have room in memory.
    """

    open: dict[bool, float]
    run: float
    fastest_run: float
    settle: float
    stretch: float = 1.0
    together: bool = True

    @property
    def wake(self) -> float:
        return min(_WAKE_SECONDS, 5 * self.run)

    def turns_seconds(self, plan: _Plan) -> float:
        """How long the turns of a trial take by these figures."""
        timed = plan.samples * plan.loop * self.run
        wake = max(plan.wake_seconds, self.run)
        return 3 * plan.turns * (self.settle + wake + timed) * self.stretch

    def plan(self, kinds: Sequence[bool], seconds: float) -> _Plan:
        """The best plan for trials of these kinds that takes `seconds` in all, or the least."""
        spare = (seconds - sum(self.open[kind] for kind in kinds)) / len(kinds)
        loop = max(1, math.ceil(_SAMPLE_SECONDS / self.fastest_run))
        sample = loop * self.run
        most = max(_MOST_SAMPLES, math.ceil(_BLOCK_SECONDS / sample))
        # Timing that takes less than opening the sessions does not get cut: it saves nothing.
        turns = _LEAST_SAMPLES if self.together else 1
        least = _Plan(turns, _LEAST_SAMPLES, loop, self.wake)
        spare = max(spare, min(self.turns_seconds(least), min(self.open.values())))
        samples = 0
        for turns in range(_MOST_TURNS if self.together else 1, 0, -1):
            bare = self.turns_seconds(_Plan(turns, 0, loop, self.wake))
            samples = int((spare - bare) / (3 * turns * sample * self.stretch))
            if samples >= _LEAST_SAMPLES:
                return _Plan(turns, min(samples, most), loop, self.wake)
        return _Plan(1, max(1, samples), loop, self.wake)

    def learn(self, fresh: bool, plan: _Plan, opening: float, turning: float) -> None:
        """Take over what a trial really took; half of it, for a busy moment passes."""
        self.open[fresh] = math.sqrt(self.open[fresh] * opening)
        self.stretch *= math.sqrt(max(turning, 1e-9) / self.turns_seconds(plan))


@dataclass
class _Clock:
    """The time budget, and the way to report."""

    began: float
    budget: float
    progress: Progress | None

    def report(self, text: str, fraction: float) -> None:
        if self.progress is not None:
            self.progress(text, fraction)

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def left(self) -> float:
        return self.budget - self.elapsed()

    def spent(self, done: int, notes: list[str]) -> bool:
        """Whether to stop before the next trial. It looks at the time, never at the results."""
        over = self.left() < 0 and done >= FEWEST_PAIRS
        if (over or self.elapsed() > 2 * self.budget) and done >= 2:
            notes.append(f"The time budget of {self.budget:g} s ended after {done} session pairs.")
            return True
        return False


def _calibrate(spec: _Spec, feeds: Mapping[str, Any], budget: float) -> _Pace:
    """Open and run either model once more than needed, to know what things cost here."""
    opened, runs, settled = [], [], []
    for role in ("first", "candidate"):
        with contextlib.closing(_Here(spec, role, feeds, min(1.0, budget / 50))) as seat:
            opened.append(seat.opened)
            runs.append(statistics.median(seat.turn(_Plan(1, 3, 1, 0.0))) / 1e3)
            settled.append(seat.settled)
    run = max(runs)
    opening = 3 * (max(opened) + max(_WARM_SECONDS, run) + max(settled))
    return _Pace(
        open={False: opening, True: opening + _START_SECONDS},
        run=run,
        fastest_run=max(min(runs), 1e-7),
        settle=max(settled),
    )


def _affordable(pairs: int, pace: _Pace, clock: _Clock, notes: list[str]) -> int:
    """As many pairs as asked for, fewer where the budget is short, eight where one can."""
    least = pace.turns_seconds(pace.plan([True], 0.0))
    each = least + (pace.open[True] + pace.open[False]) / 2
    fit = int(clock.left() / each)
    if fit >= pairs:
        return pairs
    if fit >= FEWEST_PAIRS:
        return fit
    if fit * 2 >= FEWEST_PAIRS:  # up to twice the budget before eight pairs are given up
        return min(pairs, FEWEST_PAIRS)
    count = min(pairs, max(fit, 2))
    if count < FEWEST_PAIRS:
        notes.append(
            f"Three sessions take {each:.2g} s to open and run once: {count} session pairs fit "
            f"into {clock.budget:g} s, fewer than the usual {FEWEST_PAIRS}."
        )
    return count


def _schedule(pairs: int, rng: random.Random) -> list[tuple[bool, tuple[str, ...]]]:
    """Kind of process and order of sessions for each trial.

    The kinds alternate, so that both have had their share whenever the time ends; each kind goes
    through all six orders before it repeats one, so that no role is the first more often.
    """
    orders: dict[bool, Iterator[tuple[str, ...]]] = {}
    for fresh in (False, True):
        rounds = [rng.sample(_ORDERS, len(_ORDERS)) for _ in range(pairs // len(_ORDERS) + 1)]
        orders[fresh] = itertools.chain.from_iterable(rounds)
    return [
        (fresh, next(orders[fresh]))
        for fresh in itertools.islice(itertools.cycle((False, True)), pairs)
    ]


def _trial(
    spec: _Spec,
    feeds: Mapping[str, Any],
    stored: Path | None,
    order: Sequence[str],
    plan: _Plan,
    pace: _Pace,
) -> Trial:
    """Open the three sessions in `order`, let them take turns, and close them."""
    clock = time.perf_counter
    began, turning = clock(), 0.0
    times: dict[str, list[tuple[float, ...]]] = {role: [] for role in _ROLES}
    groups = [order] if pace.together else [[role] for role in order]
    for group in groups:
        with contextlib.ExitStack() as stack:
            seats: dict[str, _Seat] = {}
            for role in group:
                seats[role] = _sit(spec, role, feeds, stored)
                stack.callback(seats[role].close)
            for seat in seats.values():
                seat.wait()
            start = clock()
            for turn in range(plan.turns):
                # Forth and back: a drift over a turn does not favour a place in the order.
                for role in group if turn % 2 == 0 else reversed(group):
                    times[role].append(seats[role].turn(plan))
            turning += clock() - start
    pace.learn(stored is not None, plan, clock() - began - turning, turning)
    return Trial(stored is not None, *(tuple(times[role]) for role in _ROLES))


def _sit(spec: _Spec, role: str, feeds: Mapping[str, Any], stored: Path | None) -> _Seat:
    return _Here(spec, role, feeds) if stored is None else _Apart(spec, role, stored)


class _Seat(Protocol):
    """One session that is timed when it is its turn, and is quiet when it is not."""

    def wait(self) -> None:
        """Return when the session is open, warm and quiet."""

    def turn(self, plan: _Plan) -> tuple[float, ...]:
        """Time the session: milliseconds per run of each sample."""

    def close(self) -> None:
        """Free it."""


class _Here:
    """A session in this process."""

    def __init__(
        self,
        spec: _Spec,
        role: str,
        feeds: Mapping[str, Any],
        warm_seconds: float | None = None,
    ) -> None:
        began = time.perf_counter()
        self._path = spec.paths[role]
        self._session = open_session(
            self._path,
            provider=spec.provider,
            threads=spec.threads,
            deterministic=False,
            libraries=spec.libraries or None,
        )
        bound = self._session.bind(feeds)
        bound()  # the first run also tells whether the model runs at all
        self.opened = time.perf_counter() - began
        self._call: Callable[[], object] | None = bound.raw
        with rejections(self._path, "run"):
            _warm(bound.raw, _WARM_SECONDS if warm_seconds is None else warm_seconds)
        self.settled = _settle()

    def wait(self) -> None:
        pass

    def turn(self, plan: _Plan) -> tuple[float, ...]:
        assert self._call is not None
        with rejections(self._path, "run"):
            times = time_runs(self._call, plan.samples, plan.loop, plan.wake_seconds)
        self.settled = _settle()
        return times

    def close(self) -> None:
        self._call = None
        self._session.close()


def time_runs(
    call: Callable[[], object], samples: int, loop: int, wake_seconds: float
) -> tuple[float, ...]:
    """Milliseconds per call, `samples` times the mean of `loop` calls, after untimed ones."""
    clock = time.perf_counter
    end = clock() + wake_seconds
    call()
    while clock() < end:
        call()
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(samples):
            start = clock()
            for _ in range(loop):
                call()
            times.append((clock() - start) * 1e3 / loop)
    finally:
        if collecting:
            gc.enable()
    return tuple(times)


def _warm(call: Callable[[], object], seconds: float) -> None:
    """Run until it gets no faster: until a batch is no faster than the best before, twice."""
    clock = time.perf_counter
    began = clock()
    best, size, stable = math.inf, 1, 0
    while stable < 2 and clock() - began < seconds:
        start = clock()
        for _ in range(size):
            call()
        each = (clock() - start) / size
        stable = stable + 1 if each >= best else 0
        best = min(best, each)
        size = max(1, min(1000, int(seconds / 20 / max(each, 1e-7))))


def _settle() -> float:
    """Wait until this process is quiet, and return how long that took, in seconds.

    The threads of a session keep spinning after its run, for 45 to 85 ms here; on their cores
    the next session would be slower at first (0.30 ms for 0.22 ms with two cores).
    """
    began = time.perf_counter()
    while time.perf_counter() - began < _SETTLE_LIMIT:
        wall, work = time.perf_counter(), time.process_time()
        time.sleep(0.004)
        if time.process_time() - work < 0.2 * (time.perf_counter() - wall):
            break
    return time.perf_counter() - began


# -- sessions in processes of their own ---------------------------------------------------------

# The current folder is taken off the path before anything is imported: a json.py or an onnx.py
# may lie in it.
_BOOTSTRAP: Final = (
    "import sys; sys.path = [p for p in sys.path if p]; import json; "
    "head = json.loads(sys.stdin.buffer.readline()); sys.path = head['sys_path']; "
    "from {module} import serve; serve(head)"
)


def bootstrap(module: str) -> str:
    """Python code that reads a JSON line from standard input, and gives it to `module.serve`."""
    return _BOOTSTRAP.replace("{module}", module)


def search_path() -> list[str]:
    """`sys.path` for another process, which may start in another folder."""
    return [p or str(Path.cwd()) for p in sys.path]


class _Apart:
    """A session in a process of its own, which ends when its standard input does."""

    def __init__(self, spec: _Spec, role: str, stored: Path) -> None:
        self._path = spec.paths[role]
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-c", bootstrap("onnxnorm.latency")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._last_words,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        try:
            # It opens its session while the others open theirs.
            self._tell(
                {
                    "sys_path": search_path(),
                    "paths": {role: os.fspath(self._path)},
                    "role": role,
                    "provider": spec.provider,
                    "threads": spec.threads,
                    "libraries": [os.fspath(p) for p in spec.libraries],
                    "feeds": os.fspath(stored),
                }
            )
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        self._hear()

    def turn(self, plan: _Plan) -> tuple[float, ...]:
        self._tell(asdict(plan))
        return tuple(self._hear()["times"])

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._last_words):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then _hear says what became of it
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.kill()
            status = self._process.wait()
            self._last_words.seek(0)
            said = self._last_words.read().decode(errors="replace").split("\n")
            words = [line.strip() for line in said if line.strip()]
            raise RuntimeRejection(
                f"{self._path}: the process that timed it ended with status {status}"
                + (f": {words[-1]}" if words else ""),
                "Try without latency; it may need more memory than there is.",
            )
        found: dict[str, Any] = json.loads(answer)
        if "what" in found:
            raise RuntimeRejection(found["what"], found["hint"])
        return found


def serve(head: Mapping[str, Any]) -> None:
    """The other end of `_Apart`: hold one session, and time it for each line that comes in."""
    # Ctrl-C reaches the whole process group; ending is up to the parent, which closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)

    def reply(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")

    try:
        spec = _Spec(
            paths={role: Path(p) for role, p in head["paths"].items()},
            provider=head["provider"],
            threads=head["threads"],
            libraries=tuple(Path(p) for p in head["libraries"]),
        )
        feeds = load_feeds(Path(head["feeds"]))
        seat = _Here(spec, head["role"], feeds)
        reply({"ready": True})
        for line in iter(sys.stdin.buffer.readline, b""):
            reply({"times": seat.turn(_Plan(**json.loads(line)))})
    except OnnxNormError as error:
        with contextlib.suppress(BrokenPipeError):
            reply({"what": error.what, "hint": error.hint})
    except BrokenPipeError:
        pass


def save_feeds(feeds: Mapping[str, Any], folder: Path) -> Path:
    """Write feeds as plain arrays, with a table of what they were; numpy lacks bfloat16 & co."""
    arrays: dict[str, Any] = {}
    table: list[dict[str, Any]] = []
    for name, value in feeds.items():
        parts = value if isinstance(value, list | tuple) else [] if value is None else [value]
        keys, dtypes = [], []
        for part in parts:
            array = np.asarray(part)
            dtypes.append(array.dtype.name)
            if array.dtype.kind == "O":
                array = array.astype(str)
            elif array.dtype.isbuiltin == 2:  # a type that numpy only knows from elsewhere
                carrier = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
                array = carrier.reshape(array.shape)
            keys.append(f"a{len(arrays)}")
            arrays[keys[-1]] = array
        form = "list" if isinstance(value, list | tuple) else "none" if value is None else "array"
        table.append({"name": name, "form": form, "keys": keys, "dtypes": dtypes})
    np.savez(folder / "feeds.npz", **arrays)
    (folder / "feeds.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def load_feeds(folder: Path) -> dict[str, Any]:
    """The feeds that `save_feeds` wrote."""
    feeds: dict[str, Any] = {}
    table = json.loads((folder / "feeds.json").read_text(encoding="utf-8"))
    with np.load(folder / "feeds.npz", allow_pickle=False) as arrays:
        for row in table:
            parts: list[Any] = []
            for key, dtype in zip(row["keys"], row["dtypes"], strict=True):
                array = arrays[key]
                if dtype == "object":
                    array = array.astype(object)
                elif array.dtype.name != dtype and array.dtype.kind == "u":
                    array = array.view(getattr(ml_dtypes, dtype))
                parts.append(array)
            empty = {"list": parts, "none": None}
            feeds[row["name"]] = parts[0] if row["form"] == "array" else empty[row["form"]]
    return feeds


# -- memory ---------------------------------------------------------------------------------------


def _fits_together(spec: _Spec, notes: list[str]) -> bool:
    """Whether three sessions may be in memory at once: weights twice over, in half of what is free.

    onnxruntime holds weights prepacked beside the originals while it loads.
    """
    need = 2 * sum(model_bytes(path) for path in spec.paths.values())
    free = device_memory() if spec.provider == "cuda" else available_memory()
    if free is None or need <= free / 2:
        return True
    notes.append(
        "The models are too large for three sessions in memory at once: sessions were opened one "
        "after the other, so that slow drifts of the machine widen the band."
    )
    return False


def model_bytes(path: Path) -> int:
    """Size of a model on disk with its external data, in bytes."""
    stored = storage.load(path)
    files = {path, *(path.parent / location for location in stored.external_locations)}
    return sum(file.stat().st_size for file in files)


def available_memory() -> int | None:
    """Bytes that new processes can have: the system's, or less where a container sets a limit."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        table = dict(line.split(":") for line in lines)
        found.append(int(table["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        found.append(limit - used)
    return min(found, default=None)


# -- the result -----------------------------------------------------------------------------------


def result_of(recording: Recording) -> LatencyResult:
    """Judge a recording: `estimate` on its trials, and the times of either model.

    Raises:
        UsageError: The recording has fewer than two trials.
    """
    trials = recording.trials
    found = estimate(trials)
    originals = [x for t in trials for turn in (*t.first, *t.second) for x in turn]
    candidates = [x for t in trials for turn in t.candidate for x in turn]
    fresh = sum(t.fresh for t in trials)
    return LatencyResult(
        verdict=found.verdict,
        summary=_summary(found, len(trials), fresh),
        ratio=found.ratio,
        interval=found.interval,
        confidence=CONFIDENCE,
        band=found.band,
        original=_timing(originals, 2 * recording.runs),
        candidate=_timing(candidates, recording.runs),
        pairs=len(trials),
        fresh_pairs=fresh,
        threads=recording.threads,
        provider=recording.provider,
        runtime=runtime_version(),
        seconds=recording.seconds,
        budget_seconds=recording.budget_seconds,
        not_measured=("cuda",) if recording.provider == "cpu" else ("cpu",),
        notes=(*recording.notes, *_undecided(found)),
        trials=tuple(_turns(trial) for trial in trials),
    )


def _undecided(found: Estimate) -> tuple[str, ...]:
    """Why a ratio beyond band and interval is no verdict; nothing where it is one, or inside."""
    low, high = found.interval
    least, greatest = found.band
    if found.verdict != "no measurable difference" or low <= 1 <= high:
        return ()
    if least <= found.ratio <= greatest:
        return ()
    return (f"Nothing is claimed: {found.reason}. A larger --time-budget measures more.",)


def _turns(trial: Trial) -> Turns:
    return Turns(
        trial.fresh,
        *(
            tuple(_short(statistics.median(turn)) for turn in turns)
            for turns in (trial.first, trial.second, trial.candidate)
        ),
    )


def _short(value: float) -> float:
    """Six significant digits: a millionth, where a clock is good for less."""
    return float(f"{value:.6g}")


def _timing(milliseconds: Sequence[float], runs: int) -> Timing:
    p50, p90 = np.quantile(milliseconds, (0.5, 0.9))
    shape = np.quantile(milliseconds, np.linspace(0, 1, QUANTILES))
    return Timing(
        p50=float(p50),
        p90=float(p90),
        min=min(milliseconds),
        mean=statistics.fmean(milliseconds),
        samples=len(milliseconds),
        runs=runs,
        quantiles=tuple(_short(float(each)) for each in shape),
    )


def _summary(found: Estimate, pairs: int, fresh: int) -> str:
    low, high = found.interval
    return (
        f"{found.verdict}: {found.ratio:.3f} times the original's latency "
        f"({low:.3f} to {high:.3f}; A/A band {found.band[0]:.3f} to {found.band[1]:.3f}; {pairs} "
        f"session pairs, {fresh} in fresh processes): {found.reason}"
    )
