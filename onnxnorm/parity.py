"""Do two models agree? As closely as the original agrees with itself in float64.

    error(run) = |run - truth|            truth: the original in float64
    accept     :  error(candidate) <= 2 error(original) + 4 ulp(max |truth|)

as maximum and as root mean square over all inputs together, per output, with the runtime's
optimizations off; and again with all of them on, where error(original) is the larger of its errors
with them on and off. Nothing in it is chosen: the original's own error in its own precision is the
measure, and a correct rewrite rounds about as often as the original did.

One run shows one draw of that error. A model that amplifies its roundings (a MobileNetV3 on noise)
draws now 16 ulp and now 87, so before a candidate is called wrong, the original is run again with
every weight and input one ulp away, and the largest of its errors counts. Models that round to
integers inside, and float64 models, whose error is no larger than the truth's own, are always given
these runs.

NaN and infinity stay where they were. Integers, booleans and strings agree, except at ties that
the truth shows to be ties (`onnxnorm.decisions`).
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

import numpy as np
import onnx

from onnxnorm import staging, storage, variants
from onnxnorm.agreement import Level, OutputParity, ParityResult, failed
from onnxnorm.decisions import Decision, holds_places, trace
from onnxnorm.distance import (
    Allowance,
    Outputs,
    distance_of,
    identical,
    immeasurable,
    in_float64,
    is_real,
    is_text,
    leaves,
    misplaced,
    sampled,
    ulp,
)
from onnxnorm.errors import OnnxNormError, ParityError, RuntimeRejection
from onnxnorm.feeds import Feed, candidates, smaller
from onnxnorm.float64 import Array, widen
from onnxnorm.remark import Region
from onnxnorm.session import Session, open_session
from onnxnorm.truth import Cost, Evaluator, OutOfTime, Unevaluable, estimate, infer_shapes

Progress: TypeAlias = Callable[[str, float | None], None]

DEFAULT_BUDGET_SECONDS: Final = 60.0
_TRUTH_SHARE: Final = 0.5  # of the time budget; the rest is for the runs in onnxruntime
_RUN_SHARE: Final = 0.15  # for the original's first runs: four more like them follow
_ESTIMATE_SLACK: Final = 2.0
# Time budgets after which no further region is begun, and after which one is given up.
_LAST_REGION: Final = 2.0
_GIVE_UP: Final = 3.0
_RESPONSE_NOTE: Final = (
    "budgets include the original's own response to a one-ulp change of its weights and inputs"
)
_FORCED: Final = 8  # bodies that no input leads to and that are entered all the same
_RESPONSES: Final = 3  # runs of the original one ulp away, where roundings flip
_QUANTIZES: Final = frozenset(
    {
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "QLinearAdd",
        "QLinearMul",
        "ConvInteger",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "QAttention",
        "QGemm",
    }
)


def _shortfall(taken: Sequence[Feed], planned: int, lack: str) -> list[str]:
    """What to say where fewer samples were tried than planned; nothing where all were."""
    used = sum(feed.samples for feed in taken)
    return [f"{used} of {planned} samples fit into the {lack}"] if used < planned else []


# --- one model and what its runs are measured against ------------------------------------------


@dataclass
class _Reference:
    """The truth of one model, its own runs, and what they allow a candidate."""

    feeds: list[Feed]
    truths: Outputs
    runs: dict[bool, Outputs]
    allowances: dict[bool, dict[str, Allowance]]
    scales: dict[str, float]
    precision: str
    notes: list[str]
    draws: list[dict[str, Array]]
    names: tuple[str, ...]
    decisions: dict[str, Decision] = field(default_factory=dict)
    decided: list[dict[str, Any]] = field(default_factory=list)
    places: frozenset[str] = frozenset()  # integer outputs that hold places, or come of some
    real_budgets: dict[str, float] = field(default_factory=dict)
    misfused: frozenset[str] = frozenset()
    forced: list[tuple[variants.Body, _Reference]] = field(default_factory=list)
    evaluator: Evaluator | None = None
    respond: Callable[[], None] | None = None  # measures more of the original's own errors

    def close(self) -> None:
        """Free what the truth holds."""
        if self.evaluator is not None:
            self.evaluator.close()
        for _, other in self.forced:
            other.close()

    def budget(self, name: str, optimized: bool, dtype: np.dtype[Any]) -> tuple[float, float]:
        """Return the budgets of an output: maximum and root mean square."""
        allowed = self.allowances[False][name]
        if optimized and name not in self.misfused and True in self.runs:
            # Either run of the original is one draw of what rounding does to this model. With its
            # optimizations on the original may be lucky, and a candidate that rounds elsewhere is
            # no worse for not sharing the luck.
            allowed = allowed.widest(self.allowances[True][name])
        room = 4.0 * ulp(self.scales[name], dtype)
        return 2.0 * allowed.largest + room, 2.0 * allowed.rms + room


_Types: TypeAlias = "Mapping[str, tuple[int, tuple[int | None, ...] | None]]"


class ParityChecker:
    """Checks candidates against one original, whose truth and own errors are computed once.

    Use it as a context manager, or call `close`: it holds the truth and may hold temporary files.
    """

    def __init__(
        self,
        original: Path,
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        seed: int = 0,
        inputs: Path | None = None,
        count: int = 8,
        provider: str = "cpu",
        libraries: Sequence[Path] = (),
        budget_seconds: float = DEFAULT_BUDGET_SECONDS,
        memory_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Prepare to check; nothing runs before it is needed.

        Args:
            original: The model, its external data beside it.
            shapes: Concrete shapes of some inputs.
            seed: Seeds inputs and random operators.
            inputs: The user's own inputs, an .npz file.
            count: Samples.
            provider: Where candidates and original run.
            libraries: Custom operators for runs with optimizations on; empty is what a session
                takes by itself.
            budget_seconds: Time that one check may take, preparation included. Fewer samples are
                taken rather than more time, and a model that is too large is checked by regions,
                as many as there is time for.
            memory_bytes: Memory the truth may use; half of what is free by default.
            progress: Called with what is going on and the share done.
        """
        self._path = Path(original)
        self._shapes = dict(shapes or {})
        self._seed = seed
        self._inputs = inputs
        self._count = count
        self._provider = provider
        self._libraries = tuple(libraries)
        self._seconds = budget_seconds
        self._until = math.inf  # when the float64 truth of a region is given up
        self._memory = free_memory() // 2 if memory_bytes is None else memory_bytes
        self._progress = progress
        self._stored: storage.Stored | None = None
        self._reference: _Reference | None = None
        self._regions: dict[Region, _Reference] = {}
        self._own: _Reference | None = None
        self._accepted: tuple[Feed, ...] | None = None
        self._too_large: str | None = None

    def __enter__(self) -> ParityChecker:  # noqa: PYI034  (Self needs Python 3.11)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget the truth and free what it holds."""
        for reference in (self._reference, *self._regions.values()):
            if reference is not None:
                reference.close()
        self._reference = self._own = None
        self._regions.clear()

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """Inputs that the original accepts, one per run; they also serve a latency measurement.

        Raises:
            ParityError: onnxruntime cannot run the model.
        """
        if self._reference is not None and not self._reference.draws:
            return tuple(self._reference.feeds)
        if self._accepted is None:
            _, runs, _ = self._first_runs(self._original())
            self._accepted = tuple(feed for feed, _ in runs)
        return self._accepted

    def check(self, candidate: Path, regions: Sequence[Region] = ()) -> ParityResult:
        """Compare a candidate with the original.

        Args:
            candidate: The other model.
            regions: What was changed, for a model that is too large to be checked whole. Those that
                there is no time for are named in the result; where one has no outputs of its own,
                the whole is measured against the original's own run.

        Raises:
            ParityError: The original cannot be run, or no part of it could be checked.
        """
        start = time.monotonic()
        parts = list(dict.fromkeys(regions))
        if not all(region.outputs for region in parts):
            parts = []  # what one of them changed shows in the whole only
        reference = self._whole(start, have_regions=bool(parts))
        if reference is None and not parts:
            reference = self._by_itself()
        if reference is not None:
            return self._judged(reference, Path(candidate), start)
        return self._by_regions(Path(candidate), parts, start)

    def _judged(
        self, reference: _Reference, candidate: Path, start: float, note: str = ""
    ) -> ParityResult:
        """The whole candidate against a reference of the whole original."""
        self._tell("parity: candidate", None)
        outputs, notes = self._judge_twice(reference, candidate)
        notes = [*([note] if note else []), *reference.notes, *notes]
        return _result(outputs, reference.precision, notes, reference.feeds, start)

    # --- preparation ---------------------------------------------------------------------------

    def _tell(self, what: str, share: float | None) -> None:
        if self._progress is not None:
            self._progress(what, share)

    def _original(self) -> storage.Stored:
        if self._stored is None:
            self._stored = storage.load(self._path)
        return self._stored

    def _whole(self, start: float, *, have_regions: bool) -> _Reference | None:
        """Return the reference of the whole model, None where it has to be checked by regions."""
        if self._reference is not None or self._too_large is not None:
            return self._reference
        stored = self._original()
        deadline = start + self._seconds * _TRUTH_SHARE
        try:
            self._reference = self._prepare(stored, self._path, deadline, must_fit=have_regions)
        except _TooLarge as error:
            self._too_large = str(error)
        return self._reference

    def _first_runs(
        self, stored: storage.Stored, path: Path | None = None
    ) -> tuple[list[str], list[tuple[Feed, dict[str, Any]]], int]:
        """Find inputs that the model accepts, and run it on them with optimizations off.

        Returns:
            Notes, the inputs with the outputs, and how many samples there would have been.
        """
        path = self._path if path is None else path
        whole = path == self._path
        best: list[tuple[Feed, dict[str, Any]]] = []
        notes: list[str] = []
        refusal: OnnxNormError | None = None
        short = False
        feeds: list[Feed] = []
        begun = time.monotonic()
        until = begun + self._seconds * _RUN_SHARE
        with self._opened(path) as session:
            choices = candidates(
                stored.proto,
                shapes=self._shapes if whole else None,
                seed=self._seed,
                count=self._count,
                arrays=self._inputs if whole else None,
            )
            for number, feeds in enumerate(choices):
                runs: list[tuple[Feed, dict[str, Any]]] = []
                for position, feed in enumerate(feeds):
                    self._tell("parity: original", position / len(feeds))
                    if runs and time.monotonic() > until:
                        short = True
                        break
                    try:
                        runs.append((feed, leaves(session.run(feed.values))))
                    except RuntimeRejection as error:
                        refusal = refusal or error
                        if not runs and position:
                            break
                if sum(f.samples for f, _ in runs) > sum(f.samples for f, _ in best):
                    best = runs
                    notes = (
                        [f"the model rejected other inputs; it ran on: {feeds[0].description}"]
                        if number
                        else []
                    )
                late = time.monotonic() > begun + self._seconds * _TRUTH_SHARE
                if len(runs) == len(feeds) or short or late:
                    break
        if not best:
            what = refusal.what if refusal is not None else "it has no inputs that could be tried"
            what = what if whole else what.replace(f"{path}: ", "a part of the model by itself: ")
            raise ParityError(
                f"parity could not be checked: {what}",
                "Give inputs it accepts with --inputs or --input-shape, or use --no-parity to "
                "go on without this check.",
            )
        asked = feeds if short else [f for f, _ in best]
        return notes, best, sum(feed.samples for feed in asked)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[Session]:
        try:
            session = open_session(path, provider=self._provider, optimize=False)
        except RuntimeRejection as error:
            raise ParityError(
                f"parity could not be checked: {error.what}",
                f"{error.hint} Or use --no-parity to go on without this check.",
            ) from error
        with session:
            yield session

    def _prepare(
        self, stored: storage.Stored, path: Path, deadline: float, *, must_fit: bool
    ) -> _Reference:
        """Compute truth, runs and allowances of a model."""
        notes: list[str] = []
        plan = self._affordable(stored, deadline, must_fit=must_fit)
        found, first, asked = self._first_runs(stored, path)
        notes += found
        taken = plan([feed for feed, _ in first])
        draws, drawn = self._draws(stored, path, taken)
        notes += drawn
        with contextlib.ExitStack() as stack:
            if draws:
                stored = variants.frozen(stored, draws[0])
                path = stack.enter_context(staging.Staged(stored, None)).model
                taken = [
                    Feed({**feed.values, **draw}, feed.description, feed.samples)
                    for feed, draw in zip(taken, draws, strict=True)
                ]
            known = {} if draws else {id(feed): outputs for feed, outputs in first}
            reference = self._measure(
                stored, path, taken, asked, known, deadline, notes, draws, must_fit=must_fit
            )
            self._force(reference, stored)
            return reference

    def _affordable(
        self, stored: storage.Stored, deadline: float, *, must_fit: bool
    ) -> Callable[[list[Feed]], list[Feed]]:
        """Return what chooses the feeds that fit into the time and memory that are left."""

        def shapes_of(feed: Feed) -> dict[str, tuple[int, ...]]:
            return {n: v.shape for n, v in feed.values.items() if isinstance(v, np.ndarray)}

        def cost_of(feed: Feed) -> Cost:
            return estimate(stored, shapes_of(feed))

        first = next(
            candidates(
                stored.proto, shapes=self._shapes, seed=self._seed, count=self._count,
                arrays=self._inputs,
            )
        ) if stored is self._stored else []  # fmt: skip
        if first:
            least = cost_of(smaller(first[0]))
            if least.peak_bytes > self._memory:
                raise _TooLarge(
                    f"a float64 copy needs {least.peak_bytes / 2**30:.1f} GiB of memory"
                )
            if must_fit and least.seconds() > self._seconds * _TRUTH_SHARE:
                raise _TooLarge(f"a float64 run takes about {least.seconds():.0f} s")

        def choose(feeds: list[Feed]) -> list[Feed]:
            taken: list[Feed] = []
            # an estimate only rules out what is far beyond; the clock decides what is near
            room = _ESTIMATE_SLACK * max(deadline - time.monotonic(), 0.0)
            for feed in feeds:
                cost = cost_of(feed)
                small = smaller(feed)
                while feed.samples > 1 and (
                    cost.peak_bytes > self._memory or cost.seconds() > room
                ):
                    if feed is small:
                        break
                    feed = small
                    cost = cost_of(feed)
                if taken and cost.seconds() > room:
                    break
                room -= cost.seconds()
                taken.append(feed)
            return taken

        return choose

    def _draws(
        self, stored: storage.Stored, path: Path, feeds: Sequence[Feed]
    ) -> tuple[list[dict[str, Array]], list[str]]:
        """Draw every random value once per feed, for all models alike."""
        notes = []
        hidden = variants.hidden_random_nodes(stored)
        if hidden:
            notes.append(
                f"{_operators(hidden)} in nested graphs or functions: drawn anew in each run"
            )
        nodes = variants.random_nodes(stored)
        if not nodes:
            return [], notes
        wanted = [name for node in nodes for name in (node.output, *node.inputs)]
        graph = stored.proto.graph
        given = {value.name for value in graph.input} | {t.name for t in graph.initializer}
        weights = {tensor.name: tensor for tensor in graph.initializer}
        exposed = variants.exposing(stored, [name for name in wanted if name not in given])
        draws = []
        with staging.Staged(exposed, None) as staged, self._opened(staged.model) as session:
            for index, feed in enumerate(feeds):
                values = {**feed.values, **session.run(feed.values)}
                values |= {n: stored.array(weights[n]) for n in wanted if n in weights}
                draws.append(
                    {
                        variants.frozen_feed_name(node): node.draw(
                            np.asarray(values[node.output]),
                            [np.asarray(values[name]) for name in node.inputs],
                            (self._seed, index),
                        )
                        for node in nodes
                    }
                )
        notes.append(f"{_operators(len(nodes))}: given the same values on both sides")
        return draws, notes

    def _measure(
        self,
        stored: storage.Stored,
        path: Path,
        feeds: list[Feed],
        planned: int,
        known: Mapping[int, dict[str, Any]],
        deadline: float,
        notes: list[str],
        draws: list[dict[str, Array]],
        *,
        must_fit: bool,
    ) -> _Reference:
        shapes = {n: v.shape for n, v in feeds[0].values.items() if isinstance(v, np.ndarray)}
        types = infer_shapes(stored, shapes)
        names = tuple(output.name for output in stored.proto.graph.output)
        decisions = {
            name: found for name in names if (found := trace(stored.proto, name, types)) is not None
        }
        places = frozenset(name for name in names if holds_places(stored.proto, name, types))
        needs = [n for d in decisions.values() for n in d.needs]
        reals = tuple(dict.fromkeys(n for d in decisions.values() for n in d.budgeted))
        evaluator = Evaluator(stored, memory_bytes=self._memory)
        truths: Outputs = []
        decided: list[dict[str, Any]] = []
        kept = tuple(dict.fromkeys(needs))
        taken: list[Feed] = []
        origins: list[int] = []
        refused: Unevaluable | None = None
        begun = time.monotonic()
        lack = ""
        for position, whole in enumerate(feeds):
            self._tell("parity: float64 truth", position / len(feeds))
            feed = whole
            if taken:
                each = (time.monotonic() - begun) / sum(f.samples for f in taken)
                room = int((deadline - time.monotonic()) / max(each, 1e-9))
                feed = smaller(whole, max(room, 1))
                if room < feed.samples:
                    lack = "time budget"
                    break
            limit = deadline if must_fit or taken else self._until
            try:
                values = evaluator.run(feed.values, keep=kept, deadline=limit)
            except (OutOfTime, MemoryError) as error:
                lack = "time budget" if isinstance(error, OutOfTime) else "memory"
                if not taken:
                    evaluator.close()
                    raise _TooLarge(
                        "a float64 run does not end within the time budget"
                        if lack == "time budget"
                        else "a float64 run does not fit into memory"
                    ) from None
                break
            except Unevaluable as error:
                # A size that the definitions do not allow and the runtime takes all the same,
                # such as a pooling window larger than what it slides over: try the others.
                refused = error
                planned -= feed.samples
                continue
            taken.append(feed)
            origins.append(position)
            truths.append(leaves({name: values[name] for name in names}))
            decided.append({name: values[name] for name in kept})
        if refused is not None:
            if not taken:
                evaluator.close()
                raise ParityError(
                    f"parity could not be checked: {refused.what}",
                    "Use --no-parity to go on without this check.",
                ) from refused
            left_out = len(feeds) - len(taken)
            notes.append(f"{left_out} of {len(feeds)} inputs have no float64 truth: {refused.what}")
        draws = [draws[old] for old in origins] if draws else draws
        feeds = taken
        notes += _shortfall(taken, planned, lack or "time budget")
        reference = _Reference(
            feeds, truths, {}, {}, {}, evaluator.precision, notes, draws, names, decisions, decided,
            places=places, evaluator=evaluator,
        )  # fmt: skip
        self._allow(reference, stored, path, known, reals)
        return reference

    def _allow(
        self,
        reference: _Reference,
        stored: storage.Stored,
        path: Path,
        known: Mapping[int, dict[str, Any]],
        reals: Sequence[str],
    ) -> None:
        """Run the original at both levels and work out what it allows a candidate."""
        feeds, notes = reference.feeds, reference.notes
        exposed = [n for n in reals if n not in reference.names and n not in feeds[0].values]
        responds, took = _quantizes(stored.proto), 0.0
        for optimize in (False, True):
            self._tell(f"parity: original, optimizations {'on' if optimize else 'off'}", None)
            start = time.monotonic()
            try:
                if not optimize and all(id(feed) in known for feed in feeds):
                    runs = [known[id(feed)] for feed in feeds]
                else:
                    runs = self._run(path, feeds, optimize=optimize)
            except RuntimeRejection as error:
                if not optimize:
                    raise ParityError(
                        f"parity could not be checked: {error.what}",
                        f"{error.hint} Or use --no-parity to go on without this check.",
                    ) from error
                notes.append(f"with its optimizations on, the runtime fails on the original: "
                             f"{error.what}")  # fmt: skip
                continue
            reference.runs[optimize] = runs
            allowances = {}
            for name in sampled(runs):
                distance = distance_of(name, reference.truths, runs)
                reference.scales.setdefault(name, distance.scale)
                allowances[name] = Allowance(distance.largest, distance.rms)
            took = max(time.monotonic() - start, took)
            hidden = variants.hidden_random_nodes(stored)
            if not optimize and (hidden or took < self._seconds * _RUN_SHARE / 4):
                self._note_randomness(reference, path, allowances)
            responds = responds or any(v is not None and v.dtype == np.float64
                                       for v in sampled(runs).values())  # fmt: skip
            if responds:
                self._respond(reference, stored, optimize, allowances, took)
            reference.allowances[optimize] = allowances
        if responds:
            notes.append(_RESPONSE_NOTE)
        else:
            if True in reference.runs:
                self._find_misfusions(reference)

            def respond() -> None:
                for optimize, allowances in reference.allowances.items():
                    values = sampled(reference.runs[optimize])
                    floats = {n: a for n, a in allowances.items() if is_real(values[n])}
                    self._respond(reference, stored, optimize, floats, took)
                    allowances.update(floats)

            reference.respond = respond
        if reals:
            self._budget_reals(reference, stored, path, exposed, reals)

    def _force(self, reference: _Reference, stored: storage.Stored) -> None:
        """Measure what stands in bodies that no input leads to, by entering them all the same."""
        assert reference.evaluator is not None
        entered = set(reference.evaluator.entered)
        missed: list[str] = []
        until = time.monotonic() + self._seconds * _TRUTH_SHARE
        for body in variants.bodies(stored):  # those within others behind them
            if (body.node, body.name) in entered:
                continue
            copy = variants.forced(stored, body)
            if copy is not None and len(reference.forced) < _FORCED and time.monotonic() < until:
                feeds, draws = list(reference.feeds), reference.draws
                samples = sum(feed.samples for feed in feeds)
                try:
                    with staging.Staged(copy, None) as staged:
                        inner = self._measure(
                            copy, staged.model, feeds, samples, {}, until, [], draws, must_fit=True
                        )
                except (ParityError, RuntimeRejection, _TooLarge):
                    pass  # what follows may not bear what it computes
                else:
                    reference.forced.append((body, inner))
                    entered |= inner.evaluator.entered if inner.evaluator is not None else set()
                    continue
            missed.append(str(body))
        met = [str(body) for body, _ in reference.forced]
        if met:
            it = "it" if len(met) == 1 else "each"
            reference.notes.append(
                f"no input leads to {_and_more(met)}: both models were made to enter {it}"
            )
        if missed:
            computes = "it computes" if len(missed) == 1 else "they compute"
            reference.notes.append(
                f"no input leads to {_and_more(missed)}: what {computes} was not compared"
            )

    def _judge_forced(
        self, reference: _Reference, candidate: Path, outputs: list[OutputParity]
    ) -> tuple[list[OutputParity], list[str]]:
        """Judge what no input leads to; an output that fails there takes the place of its own."""
        judged = {output.name: output for output in outputs}
        notes: list[str] = []
        for body, inner in reference.forced:
            copy = variants.forced(storage.load(candidate), body)
            if copy is None:
                notes.append(f"the changed model lacks {body}: what it computes was not compared")
                continue
            with staging.Staged(copy, None) as staged:
                found, remarks = self._judge_twice(inner, staged.model)
            notes += [f"in {body}: {note}" for note in (*inner.notes, *remarks)]
            for output in found:
                known = judged.setdefault(output.name, output)
                if known.passed and not output.passed:
                    judged[output.name] = output.within(str(body))
        return list(judged.values()), notes

    def _note_randomness(
        self,
        reference: _Reference,
        path: Path,
        allowances: dict[str, Allowance],
    ) -> None:
        # in one session, because a new one starts its random numbers anew
        first, *again = self._run(path, reference.feeds[:1] * 2, optimize=False)
        differing = [name for name in first if not identical(first[name], again[0].get(name))]
        if not differing:
            return
        reference.notes.append(
            f"two runs of the original differ by themselves in: {', '.join(differing)}"
        )
        for name in differing:
            if name in again[0]:
                error = distance_of(name, reference.truths[:1], again)
                allowances[name] = allowances[name].widened(error)

    def _respond(
        self,
        reference: _Reference,
        stored: storage.Stored,
        optimize: bool,
        allowances: dict[str, Allowance],
        took: float,
    ) -> None:
        """Widen the allowances by what a one-ulp change does to the original."""
        room = int(self._seconds * _RUN_SHARE / max(took, 1e-3))
        for number in range(max(1, min(_RESPONSES, room))):
            seed = self._seed + number
            rng = np.random.default_rng([seed, 1])
            moved = [
                Feed(
                    {
                        name: variants.nudge(value, rng) if isinstance(value, np.ndarray) else value
                        for name, value in feed.values.items()
                    },
                    feed.description,
                    feed.samples,
                )
                for feed in reference.feeds
            ]
            with staging.Staged(variants.nudged(stored, seed), None) as staged:
                runs = self._run(staged.model, moved, optimize=optimize)
            for name in allowances:
                error = distance_of(name, reference.truths, runs)
                allowances[name] = allowances[name].widened(error)

    def _find_misfusions(self, reference: _Reference) -> None:
        """Name the outputs where the runtime's fusions lose more than half of the digits."""
        found = []
        values = sampled(reference.runs[False])
        for name, fused in reference.allowances[True].items():
            value: Any = values.get(name)
            if not is_real(value):
                continue
            scale = reference.scales[name]
            unit = ulp(scale, value.dtype)
            unfused = max(reference.allowances[False][name].largest, unit)
            # where no digit was right to begin with, being off by as much again is not a fault
            beyond = fused.largest > 2.0 * unfused + 4.0 * unit
            if beyond and scale > 0 and fused.largest > math.sqrt(unfused / scale) * scale:
                found.append(name)
                reference.notes.append(
                    f"the runtime's optimizations cost the original over half of its digits in "
                    f"'{name}': it is off by {fused.largest:.2g} with them and by {unfused:.2g} "
                    "without; the run without is the baseline"
                )
        reference.misfused = frozenset(found)

    def _budget_reals(
        self,
        reference: _Reference,
        stored: storage.Stored,
        path: Path,
        exposed: Sequence[str],
        reals: Sequence[str],
    ) -> None:
        """Work out the budgets of the values that integer outputs were decided on."""
        with contextlib.ExitStack() as stack:
            if exposed:
                copy = staging.Staged(variants.exposing(stored, exposed), None)
                path = stack.enter_context(copy).model
            runs = self._run(path, reference.feeds, optimize=False)
        for name in reals:
            if name not in runs[0] or not is_real(runs[0][name]):
                continue
            error = distance_of(name, [{name: d[name]} for d in reference.decided], runs)
            room = 4.0 * ulp(error.scale, runs[0][name].dtype)
            reference.real_budgets[name] = 2.0 * error.largest + room

    def _run(self, path: Path, feeds: Sequence[Feed], *, optimize: bool) -> Outputs:
        """Run a model on every feed; values it has no input for are left out."""
        outputs = []
        own = self._libraries if optimize and self._libraries else None
        with open_session(
            path, provider=self._provider, optimize=optimize, libraries=own
        ) as session:
            wanted = {value.name for value in session.inputs}
            for feed in feeds:
                values = {n: v for n, v in feed.values.items() if n in wanted}
                outputs.append(leaves(session.run(values)))
        return outputs

    # --- judgement -----------------------------------------------------------------------------

    def _judge_twice(
        self, reference: _Reference, candidate: Path
    ) -> tuple[list[OutputParity], list[str]]:
        """Judge, and once more where the budget rests on too few of the original's errors."""
        outputs, notes = self._judge(reference, candidate)
        samples = sampled(reference.runs[False])
        beyond = any(
            level.error > level.budget or level.error_rms > level.budget_rms
            for output in outputs
            if is_real(samples[output.name])
            for level in (output.unoptimized, output.optimized)
            if level is not None
        )
        if beyond and reference.respond is not None:
            reference.respond()
            reference.respond = None
            reference.notes.append(_RESPONSE_NOTE)
            outputs, notes = self._judge(reference, candidate)
        notes += _unread(reference, storage.load(candidate))
        if reference.forced and all(output.passed for output in outputs):
            outputs, further = self._judge_forced(reference, candidate, outputs)
            notes = [*notes, *further]
        return outputs, [*notes, *_blind(reference)]

    def _judge(
        self, reference: _Reference, candidate: Path
    ) -> tuple[list[OutputParity], list[str]]:
        notes: list[str] = []
        expected = sampled(reference.runs[False])
        with contextlib.ExitStack() as stack:
            if reference.draws:
                copy = variants.frozen(storage.load(candidate), reference.draws[0])
                left = len(variants.random_nodes(copy))
                if left:
                    notes.append(f"{_operators(left)} of the changed model without counterpart")
                candidate = stack.enter_context(staging.Staged(copy, None)).model
            levels: dict[bool, dict[str, Level]] = {}
            for optimize in (False, True):
                try:
                    runs = self._run(candidate, reference.feeds, optimize=optimize)
                except RuntimeRejection as error:
                    if optimize and True not in reference.runs:
                        continue
                    reason = f"the changed model cannot be run: {error.what}"
                    levels[optimize] = dict.fromkeys(expected, failed(reason))
                    continue
                levels[optimize] = {
                    name: self._level(reference, name, runs, optimize, notes) for name in expected
                }
                further = [f"'{name}'" for name in sampled(runs) if name not in expected]
                if further:
                    notes.append(f"outputs of the changed model alone: {', '.join(further)}")
        outputs = [
            OutputParity(
                name,
                "none" if value is None else str(value.dtype),
                levels[False][name],
                levels.get(True, {}).get(name),
            )
            for name, value in expected.items()
        ]
        return outputs, list(dict.fromkeys(notes))

    def _level(
        self, reference: _Reference, name: str, runs: Outputs, optimize: bool, notes: list[str]
    ) -> Level:
        own = optimize and name not in reference.misfused and True in reference.runs
        baseline = reference.runs[own]
        reason = self._mismatch(reference, name, runs, baseline, optimize)
        if reason is not None:
            return failed(reason)
        sample: Any = sampled(baseline).get(name)
        if not is_real(sample):
            return self._exact_level(reference, name, runs, baseline, notes)
        error = distance_of(name, reference.truths, runs)
        unmeasured = sum(
            immeasurable(truth.get(name), run.get(name))
            for truth, run in zip(reference.truths, runs, strict=True)
        )
        if unmeasured:
            are = "element was" if unmeasured == 1 else "elements were"
            notes.append(
                f"{unmeasured} {are} not compared in '{name}': finite in both models, and NaN or "
                "infinite in the truth"
            )
        allowed = reference.allowances[own][name]
        budget, budget_rms = reference.budget(name, optimize, sample.dtype)
        unit = ulp(reference.scales[name], sample.dtype)
        if error.largest > budget:
            reason = f"error {error.largest:.3g} exceeds the budget {budget:.3g}"
        elif error.rms > budget_rms:
            reason = f"rms error {error.rms:.3g} exceeds the budget {budget_rms:.3g}"
        if reason is not None and optimize and name in reference.misfused:
            same = distance_of(name, reference.runs[True], runs)
            if same.largest <= budget and same.rms <= budget_rms:
                reason = None
                notes.append(f"the runtime's optimizations change both models alike in '{name}'")
        return Level(
            error.largest,
            allowed.largest,
            budget,
            error.rms,
            allowed.rms,
            budget_rms,
            error.largest / unit,
            allowed.largest / unit,
            error.cosine,
            error.argmax_agreement,
            reason,
        )

    def _mismatch(
        self,
        reference: _Reference,
        name: str,
        runs: Outputs,
        baseline: Outputs,
        optimize: bool,
    ) -> str | None:
        """Return what is wrong with an output apart from its numbers."""
        every = [reference.runs[level] for level in reference.runs if optimize or not level]
        for index, (truth, run, other) in enumerate(
            zip(reference.truths, runs, baseline, strict=True)
        ):
            if name not in other:
                if name in run:
                    return "the changed model has it on inputs where the original has not"
                continue
            if name not in run:
                return "the changed model has no such output"
            mine, theirs = run[name], other[name]
            if mine is None or theirs is None:
                if mine is not theirs:
                    return "it is absent in one of the models"
                continue
            text = is_text(mine) and is_text(theirs)
            if not text and mine.dtype != theirs.dtype:
                return f"its dtype is {mine.dtype}, the original's {theirs.dtype}"
            if mine.shape != theirs.shape and name not in reference.decisions:
                return f"its shape is {list(mine.shape)}, the original's {list(theirs.shape)}"
            if is_real(mine):
                exact = truth.get(name)
                exact = in_float64(theirs) if exact is None else exact
                if exact.shape != mine.shape:
                    return f"its shape is {list(mine.shape)}, the truth's {list(exact.shape)}"
                own = [np.asarray(leaves[index].get(name, mine)) for leaves in every]
                odd = misplaced(exact, [v for v in own if v.shape == mine.shape], mine)
                if odd:
                    are = "element is" if odd == 1 else "elements are"
                    return f"{odd} {are} NaN or infinite in one of the models only"
        return None

    def _exact_level(
        self,
        reference: _Reference,
        name: str,
        runs: Outputs,
        baseline: Outputs,
        notes: list[str],
    ) -> Level:
        """Judge integers, booleans and strings: equal, or tied in the truth."""
        decision = reference.decisions.get(name)
        worst, squares, count, differing = 0.0, 0.0, 0, 0
        tied = True
        allowed = reference.allowances[False].get(name, Allowance(0.0, 0.0))
        for index, (run, other) in enumerate(zip(runs, baseline, strict=True)):
            mine: Any = run.get(name)
            theirs: Any = other.get(name)
            if mine is None or identical(mine, theirs):
                count += 0 if mine is None else mine.size
                continue
            truth = reference.truths[index].get(name)
            if mine.shape == theirs.shape:
                unequal = np.asarray(mine != theirs)
                count += mine.size
                differing += int(unequal.sum())
                if mine.dtype.kind in "iu":
                    gap = np.abs(mine.astype(np.float64) - theirs.astype(np.float64))
                    worst = max(worst, float(gap.max()))
                    squares += float(np.sum(gap * gap))
                else:
                    worst, squares = 1.0, squares + float(unequal.sum())
            else:
                worst, differing = math.inf, differing + 1
            tied = tied and self._tied(reference, decision, index, truth, mine)
        rms = math.sqrt(squares / count) if count else 0.0
        sample = sampled(runs)[name]
        integers = sample is not None and sample.dtype.kind in "iu"
        # between places, as an ArgMax gives them, there is no distance that could be an error
        quantized = (
            integers
            and name not in reference.places
            and allowed.largest > 0.0
            and worst <= 2.0 * allowed.largest
            and rms <= 2.0 * allowed.rms
        )
        reason = None
        if differing and not tied and not quantized:
            differ = "element differs" if differing == 1 else "elements differ"
            reason = f"{differing} {differ} where the truth shows no tie"
        elif differing:
            what = "where the truth is tied" if tied else "as the original's own do when nudged"
            notes.append(f"elements of '{name}' differ {what}")
        return Level(worst, 0.0, 0.0, rms, 0.0, 0.0, worst, 0.0, None, None, reason)

    def _tied(
        self,
        reference: _Reference,
        decision: Decision | None,
        index: int,
        truth: Any,
        run: Array,
    ) -> bool:
        if decision is None or truth is None or reference.evaluator is None:
            return False
        return decision.ties(
            truth, run, reference.decided[index], reference.real_budgets, reference.evaluator
        )

    def _by_itself(self) -> _Reference:
        """Measure against the original's own run, where no float64 truth can be had.

        Its error is what a one-ulp change of its weights and inputs does to it, or the runtime's
        optimizations, whichever is more.
        """
        if self._own is None:
            stored = self._original()
            notes, first, asked = self._first_runs(stored)
            feeds, runs = [feed for feed, _ in first], [outputs for _, outputs in first]
            notes += _shortfall(feeds, asked, "time budget")
            truths: Outputs = [{n: widen(v) for n, v in outputs.items()} for outputs in runs]
            precision = f"the original's own run in its own precision ({self._too_large})"
            names = tuple(output.name for output in stored.proto.graph.output)
            own = _Reference(feeds, truths, {False: runs}, {}, {}, precision, notes, [], names)
            start = time.monotonic()
            with contextlib.suppress(RuntimeRejection):
                own.runs[True] = self._run(self._path, feeds, optimize=True)
            took = time.monotonic() - start
            allowances = {}
            for name in sampled(runs):
                distance = distance_of(name, truths, own.runs.get(True, runs))
                own.scales[name] = distance.scale
                allowances[name] = Allowance(distance.largest, distance.rms)
            self._respond(own, stored, False, allowances, took)
            own.allowances = {False: allowances, True: allowances}
            self._own = own
        return self._own

    # --- by regions ----------------------------------------------------------------------------

    def _with_measured(
        self, stored: storage.Stored, feed: Feed, types: _Types, regions: Sequence[Region]
    ) -> _Types:
        """Types, and what inference leaves open of them as one run of the model has it."""
        wanted = {name for region in regions for name in region.inputs}
        names = sorted(n for n in wanted if types.get(n, (0, None))[1] is None)
        if not names:
            return types
        with staging.Staged(variants.exposing(stored, names), None) as staged:
            try:
                with self._opened(staged.model) as session:
                    values = session.run(feed.values)
            except RuntimeRejection:  # a model whose inputs have to be searched for
                return types
        arrays = {n: values[n] for n in names if isinstance(values.get(n), np.ndarray)}
        element = onnx.helper.np_dtype_to_tensor_dtype
        return {**types, **{n: (element(a.dtype), a.shape) for n, a in arrays.items()}}

    def _by_regions(self, candidate: Path, regions: Sequence[Region], start: float) -> ParityResult:
        """Check the parts of a model around what changed."""
        stored = self._original()
        other = storage.load(candidate)
        first = next(
            candidates(
                stored.proto,
                shapes=self._shapes,
                seed=self._seed,
                count=self._count,
                arrays=self._inputs,
            )
        )
        feed = smaller(first[0])
        shapes = {n: v.shape for n, v in feed.values.items() if isinstance(v, np.ndarray)}
        types = self._with_measured(stored, feed, infer_shapes(stored, shapes), regions)
        outputs: list[OutputParity] = []
        notes: dict[str, list[str]] = {}  # each with the sites that it is said of
        feeds: list[Feed] = []
        unproven: list[Region] = []
        precision = "float64"
        for number, region in enumerate(regions):
            self._tell("parity: regions", number / len(regions))
            spent = time.monotonic() - start
            if number and spent > _LAST_REGION * self._seconds:
                unproven += regions[number:]
                break
            share = max(self._seconds - spent, 1.0) / (len(regions) - number)
            reference = self._regions.get(region)
            if reference is None:
                part = variants.extracted(stored, region.inputs, region.outputs, types)
                try:
                    with self._allotted(share, start + _GIVE_UP * self._seconds):
                        reference = self._part(part)
                except _TooLarge as error:
                    unproven.append(region)
                    notes.setdefault(str(error), []).append(region.site)
                    continue
                except ParityError:  # sizes that belong together are lost where it was cut
                    note = f"the part around {region.site} does not run by itself"
                    return self._judged(self._by_itself(), candidate, start, note)
                self._regions[region] = reference
            changed = variants.extracted(other, region.inputs, region.outputs, types)
            with staging.Staged(changed, None) as staged:
                found, remarks = self._judge_twice(reference, staged.model)
            outputs += found
            for note in dict.fromkeys((*reference.notes, *remarks)):
                notes.setdefault(note, []).append(region.site)
            feeds += reference.feeds[: 1 if number else None]
            if reference.precision != "float64":
                precision = reference.precision
        count = len(regions)
        truth = (
            f"{precision}, of the {count} {'region' if count == 1 else 'regions'} that changed "
            f"({self._too_large})"
        )
        told = [_said_of(sites, note) for note, sites in notes.items()]
        result = _result(outputs, truth, told, feeds, start)
        return replace(result, passed=result.passed and not unproven, unproven=tuple(unproven))

    def _part(self, part: storage.Stored) -> _Reference:
        """The reference of a part of the model."""
        with staging.Staged(part, None) as staged:
            deadline = time.monotonic() + self._seconds * _TRUTH_SHARE
            return self._prepare(part, staged.model, deadline, must_fit=False)

    @contextlib.contextmanager
    def _allotted(self, seconds: float, until: float) -> Iterator[None]:
        """Let what is prepared have a share of the time budget, and end at a time at the latest."""
        given = self._seconds, self._until
        self._seconds, self._until = min(seconds, self._seconds), until
        try:
            yield
        finally:
            self._seconds, self._until = given


def _said_of(sites: Sequence[str], note: str) -> str:
    """A note with the sites that it is said of, the first by name."""
    return f"{_and_more(sites)}: {note}"


def _and_more(names: Sequence[str]) -> str:
    """The first of some names, and how many there are beside it."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


class _TooLarge(Exception):
    """The whole model does not fit into the time or memory for the float64 truth."""


def _result(
    outputs: Sequence[OutputParity],
    truth: str,
    notes: Sequence[str],
    feeds: Sequence[Feed],
    start: float,
) -> ParityResult:
    return ParityResult(
        all(output.passed for output in outputs),
        tuple(outputs),
        truth,
        tuple(dict.fromkeys(notes)),
        tuple(feed.description for feed in feeds),
        sum(feed.samples for feed in feeds),
        time.monotonic() - start,
    )


def _operators(number: int) -> str:
    return "1 random operator" if number == 1 else f"{number} random operators"


def _blind(reference: _Reference) -> list[str]:
    """Name the outputs that these inputs cannot tell from wrong ones, though they agree."""
    empty, odd, zero, lost, vague = [], [], [], [], []
    for name, value in sampled(reference.runs[False]).items():
        truths = [truth.get(name) for truth in reference.truths]
        if all(truth is None for truth in truths):
            continue
        if not any(np.size(truth) for truth in truths if truth is not None):
            empty.append(f"'{name}'")
        elif is_real(value):
            zeros = [{} if t is None else {name: np.zeros(t.shape)} for t in truths]
            of_zeros = distance_of(name, reference.truths, zeros)
            budget, budget_rms = reference.budget(name, False, value.dtype)
            if not of_zeros.count:
                odd.append(f"'{name}'")
            elif reference.scales[name] == 0.0:
                zero.append(f"'{name}'")
            elif of_zeros.largest <= budget and of_zeros.rms <= budget_rms:
                lost.append(f"'{name}'")
            else:
                own, scale = reference.allowances[False][name].largest, reference.scales[name]
                if own > math.sqrt(ulp(scale, value.dtype) / scale) * scale:
                    vague.append(f"'{name}' (off by {own:.2g}, values up to {scale:.2g})")
    notes = []
    if empty:
        notes.append(f"there is nothing to compare in {', '.join(empty)}: no input gave an element")
    if odd:
        notes.append(
            f"{', '.join(odd)}: NaN or infinite on all inputs, which shows little; try your own "
            "inputs"
        )
    if zero:
        notes.append(f"{', '.join(zero)}: 0 on all inputs, which shows little; try your own inputs")
    if lost:
        notes.append(
            f"the original is so far off by itself in {', '.join(lost)} that zeros would agree as "
            "well: agreement there shows nothing; try your own inputs"
        )
    if vague:
        notes.append(
            f"the original loses over half of its digits by itself in {', '.join(vague)}: what "
            "becomes of those does not show"
        )
    return notes


def _unread(reference: _Reference, candidate: storage.Stored) -> list[str]:
    """Name the tables that a candidate changed and that the inputs have read a part of."""
    if reference.evaluator is None:
        return []
    kept = {tensor.name: tensor for tensor in candidate.proto.graph.initializer}
    found = []
    for name, read in reference.evaluator.rows.items():
        if read.all():
            continue
        table = reference.evaluator.weight(name)
        if name in kept and np.array_equal(table, candidate.array(kept[name])):
            continue
        found.append(f"{int(read.sum())} of the {read.size} rows of '{name}'")
    if not found:
        return []
    return [f"of changed tables the inputs read {', '.join(found)}: no others were compared"]


def _quantizes(model: onnx.ModelProto) -> bool:
    return any(node.op_type in _QUANTIZES for node in variants.all_nodes(model))


def free_memory() -> int:
    """Return the bytes of memory that are available, 8 GiB where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 8 << 30
