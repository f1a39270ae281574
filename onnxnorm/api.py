"""The three things to do with a model: optimize it, inspect it, compare it with another."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import onnx

from onnxnorm import storage
from onnxnorm.errors import (
    ModelError,
    ParityError,
    RuntimeRejection,
    UsageError,
    VerificationError,
)
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import Norm, find_norms
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.registry import select
from onnxnorm.remark import Region, Remark
from onnxnorm.report import Report
from onnxnorm.rewrite import Pass
from onnxnorm.storage import Staged, Stored

if TYPE_CHECKING:
    from onnxnorm.parity import Level, ParityChecker, ParityResult

Progress: TypeAlias = Callable[[str, "float | None"], None]
Model: TypeAlias = Any  # path, ModelProto, onnx_ir.Model, or what torch.onnx.export returns
Shapes: TypeAlias = "Mapping[str, tuple[int, ...]] | None"

TIME_BUDGET: Final = 60.0  # seconds for parity, and as many for latency
_UNCHANGED: Final = "the output is the input, byte for byte"


@dataclass(frozen=True)
class Result:
    """An optimized model and the report on it.

    Attributes:
        report: What was found and done, parity, latency.
        stored: The optimized model, its weights still on disk.
        files: The files that were written, the model first; empty without an output path.
    """

    report: Report
    stored: Stored = field(repr=False)
    files: tuple[Path, ...] = ()

    @property
    def model(self) -> onnx.ModelProto:
        """The whole optimized model in memory; each access builds it anew."""
        return self.stored.complete()

    def save(self, path: str | Path) -> tuple[Path, ...]:
        """Write the optimized model atomically; returns the files written, the model first.

        Raises:
            OutputError: It could not be written; nothing at `path` has changed.
        """
        return storage.save(self.stored, path)


def optimize(
    model: Model,
    output: str | Path | None = None,
    *,
    passes: str | Iterable[str | Pass] | None = None,
    provider: str = "auto",
    threads: int | None = None,
    inputs: str | Path | None = None,
    input_shapes: Shapes = None,
    seed: int = 0,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    parity: bool = True,
    latency: bool = True,
    dry_run: bool = False,
    in_place: bool = False,
    time_budget: float = TIME_BUDGET,
    progress: Progress | None = None,
    after_pass: Callable[[str, Stored], None] | None = None,
) -> Result:
    """Rewrite a model's normalizations, and write it only if its outputs agree.

        |optimized - truth| <= 2 |original - truth| + 4 ulp        truth = the original in float64

    A site after which this does not hold is found by bisection, left out, and reported.

    Args:
        model: A path, an onnx.ModelProto, an onnx_ir.Model, or what
            `torch.onnx.export(..., dynamo=True)` returns.
        output: Where to write; None keeps the result in memory.
        passes: Pass names as in `onnxnorm.registry`, or passes; None is the default list.
        provider: "cpu", "cuda" or "auto", for parity and latency.
        threads: Intra-op threads for latency; None is onnxruntime's own choice.
        inputs: The user's own inputs, an .npz file.
        input_shapes: Shapes of some inputs.
        seed: The same seed gives the same inputs.
        only: Restrict the passes to these sites.
        skip: Leave these sites as they are.
        parity: Check the outputs; without it nothing is proven.
        latency: Measure both models.
        dry_run: Plan and apply in memory, check and write nothing.
        in_place: Let `output` be the input itself.
        time_budget: Seconds that parity may take, and as many for latency.
        progress: Called as progress(what, fraction done or None).
        after_pass: Called with a pass's name and the model after it changed something.

    Raises:
        ModelError: The model cannot be read or is broken.
        UsageError: The arguments do not fit each other or the model.
        OutputError: The result cannot be written.
        ProviderError: The provider is not usable.
        ParityError: The outputs do not agree, or onnxruntime cannot run the model.
    """
    report_progress = progress or _silent
    chosen = select(passes)
    with ExitStack() as stack:
        stored = stack.enter_context(_taken(model))
        target = _target(stored, output, in_place=in_place)
        session = _Measuring(
            stack, stored, provider, threads, inputs, input_shapes, seed, time_budget, progress
        )
        if (parity or latency) and not dry_run:
            session.provider = _provider(provider)
        pipeline = Pipeline(chosen, tuple(only), tuple(skip), after_pass)
        report_progress("passes", None)
        module = Module(stored)
        rows = list(find_norms(Facts(module)))
        run = pipeline.run(stored)
        _check_valid(stored, run.stored, run.applied)
        notes: list[str] = []
        warnings: list[str] = []
        found: dict[str, Any] = {
            "parity": None,
            "parity_skipped": None,
            "latency": None,
            "latency_skipped": None,
        }
        files: tuple[Path, ...] = ()
        if dry_run:
            found["parity_skipped"] = found["latency_skipped"] = "it was a dry run"
        elif not run.applied:
            _leave(session, found, parity=parity, warnings=warnings)
        else:
            staging = ExitStack()
            stack.push(staging)
            if parity:
                run, candidate, found["parity"] = _prove(
                    session, pipeline, run, target, staging, warnings
                )
            else:
                candidate = staging.enter_context(Staged(run.stored, target))
                found["parity_skipped"] = "--no-parity was given"
                warnings.append("The outputs were not compared with those of the original.")
            _time(session, found, run, candidate, warnings, asked=latency, proven=parity)
        if target is not None and not dry_run:
            report_progress("writing", None)
            if in_place and not run.applied:
                notes.append("Nothing was changed, so nothing was written.")
            elif run.applied:
                files = candidate.commit()
            else:
                files = storage.save(run.stored, target)
        environment = _environment(session.provider is not None, threads)
        report = Report(
            command="optimize",
            version=version("onnxnorm"),
            model=_model_facts(stored, target, run.stored),
            nodes={"before": run.nodes[0], "after": run.nodes[1]},
            norms=_norm_rows(rows, run.remarks),
            passes=[vars(s) for s in run.statistics],
            sites=_site_rows(run.remarks),
            environment=environment,
            options={
                "passes": [p.name for p in chosen],
                "provider": session.provider or provider,
                "seed": seed,
                "only": list(only),
                "skip": list(skip),
                "input_shapes": {k: list(v) for k, v in (input_shapes or {}).items()},
                "time_budget": time_budget,
            },
            files=_file_rows(files),
            notes=notes,
            warnings=warnings,
            dry_run=dry_run,
            **found,
        )
        return Result(report, run.stored, files)


def inspect(
    model: Model,
    *,
    passes: str | Iterable[str | Pass] | None = None,
) -> Report:
    """List every normalization of a model, what would be done with it, and what is in the way.

    Nothing is run and nothing is written.

    Raises:
        ModelError: The model cannot be read or is broken.
        UsageError: `passes` names what does not exist.
    """
    chosen = select(passes)
    with _taken(model) as stored:
        rows = list(find_norms(Facts(Module(stored))))
        run = Pipeline(chosen).run(stored)
        return Report(
            command="inspect",
            version=version("onnxnorm"),
            model=_model_facts(stored, None, None),
            nodes={"before": run.nodes[0], "after": run.nodes[1]},
            norms=_norm_rows(rows, run.remarks),
            passes=[vars(s) for s in run.statistics],
            sites=_site_rows(run.remarks),
            parity_skipped="inspect runs nothing",
            latency_skipped="inspect runs nothing",
            options={"passes": [p.name for p in chosen]},
            environment=_environment(False, None),
        )


def compare(
    original: Model,
    candidate: Model,
    *,
    provider: str = "auto",
    threads: int | None = None,
    inputs: str | Path | None = None,
    input_shapes: Shapes = None,
    seed: int = 0,
    parity: bool = True,
    latency: bool = True,
    time_budget: float = TIME_BUDGET,
    progress: Progress | None = None,
) -> Report:
    """Judge the outputs and the latency of any two models, as `optimize` judges its own.

    Arguments and errors are those of `optimize`; outputs that do not agree are in the report and
    raise nothing.
    """
    with ExitStack() as stack:
        first = stack.enter_context(_taken(original))
        second = stack.enter_context(_taken(candidate))
        session = _Measuring(
            stack, first, provider, threads, inputs, input_shapes, seed, time_budget, progress
        )
        session.provider = _provider(provider)
        before, after = (sum(1 for _ in Module(s).nodes()) for s in (first, second))
        found: dict[str, Any] = {
            "parity": None,
            "parity_skipped": None if parity else "--no-parity was given",
            "latency": None,
            "latency_skipped": None if latency else "--no-latency was given",
        }
        path = session.on_disk(second)
        if parity:
            found["parity"] = session.checker().check(path, ()).to_json()
        if latency:
            found["latency"] = session.measure(path)
        return Report(
            command="compare",
            version=version("onnxnorm"),
            model=_model_facts(first, second.path, second),
            nodes={"before": before, "after": after},
            environment=_environment(True, threads),
            options={"provider": session.provider, "seed": seed, "time_budget": time_budget},
            **found,
        )


# ** proving and measuring **


@dataclass
class _Measuring:
    """What parity and latency of one original share: its file, its inputs, its truth."""

    stack: ExitStack
    stored: Stored
    wanted: str
    threads: int | None
    inputs: str | Path | None
    shapes: Shapes
    seed: int
    budget: float
    progress: Progress | None
    provider: str | None = None
    _checker: ParityChecker | None = None

    def on_disk(self, stored: Stored) -> Path:
        """A file that holds this model; a temporary one where it came from memory."""
        if stored.path is not None:
            return stored.path
        return self.stack.enter_context(Staged(stored, None)).model

    def checker(self) -> ParityChecker:
        """The parity checker, with the truth and the baseline computed once."""
        from onnxnorm.parity import ParityChecker  # brings onnxruntime, which inspect never needs

        if self._checker is None:
            self._checker = self.stack.enter_context(
                ParityChecker(
                    self.on_disk(self.stored),
                    shapes=self.shapes,
                    seed=self.seed,
                    inputs=None if self.inputs is None else Path(self.inputs),
                    provider=self.provider or "cpu",
                    budget_seconds=self.budget,
                    progress=self.progress,
                )
            )
        return self._checker

    def feed(self) -> Mapping[str, Any]:
        """One set of inputs that the original accepts."""
        values: Mapping[str, Any] = self.checker().feeds[0].values
        return values

    def measure(self, candidate: Path) -> dict[str, Any]:
        """The latency of the original and a candidate, as JSON."""
        from onnxnorm.latency import measure

        return measure(
            self.on_disk(self.stored),
            candidate,
            self.feed(),
            provider=self.provider or "cpu",
            threads=self.threads,
            seed=self.seed,
            budget_seconds=self.budget,
            progress=self.progress,
        ).to_json()


def _prove(
    session: _Measuring,
    pipeline: Pipeline,
    run: Run,
    target: Path | None,
    staging: ExitStack,
    warnings: list[str],
) -> tuple[Run, Staged, dict[str, Any]]:
    """Check a run; leave out the sites that break agreement, one after another, by replay."""
    checker = session.checker()
    quiet = replace(pipeline, after_pass=None)
    denied: dict[str, Remark] = {}

    def stage(of: Run) -> Staged:
        return Staged(of.stored, target)

    while True:
        with ExitStack() as undecided:
            candidate = undecided.enter_context(stage(run))
            result = checker.check(candidate.model, _regions(run))
            if result.passed:
                staging.push(undecided.pop_all())
                break
        if not run.applied:
            raise ParityError(
                f"the outputs do not agree although nothing was changed: {_worst(result)[0]}",
                "The model gives other outputs from run to run; use --no-parity to go on without.",
            )
        guilty, failure = _bisect(session, quiet, run, result, denied)
        reason, error = _worst(failure)
        denied[guilty.site] = replace(
            guilty,
            outcome="rolled_back",
            reason=f"with it the outputs no longer agree: {reason}",
            removed=(),
            added=(),
            region=None,
            error=error,
        )
        warnings.append(f"{guilty.site} was taken back: {reason}.")
        run = quiet.run(session.stored, deny=tuple(denied), check_sites=False)
    remarks = tuple(denied.get(r.site, r) if r.outcome == "skipped" else r for r in run.remarks)
    missing = [r for site, r in denied.items() if all(x.site != site for x in remarks)]
    return replace(run, remarks=(*remarks, *missing)), candidate, result.to_json()


def _bisect(
    session: _Measuring,
    pipeline: Pipeline,
    run: Run,
    failure: ParityResult,
    denied: Collection[str],
) -> tuple[Remark, ParityResult]:
    """The first site, in the order of commits, with which the outputs stop agreeing.

    All the sites of `run` together fail, as `failure` says, and none of them changes nothing.
    Those before the one that is found agree together; the check that fails with it comes along.
    """
    sites = [r.site for r in run.applied]
    good, bad = 0, len(sites)
    while bad - good > 1:
        middle = (good + bad) // 2
        part = pipeline.run(
            session.stored, deny=tuple(denied), allow=sites[:middle], check_sites=False
        )
        with Staged(part.stored, None) as candidate:
            result = session.checker().check(candidate.model, _regions(part))
        if result.passed:
            good = middle
        else:
            bad, failure = middle, result
    return run.applied[bad - 1], failure


def _regions(run: Run) -> tuple[Region, ...]:
    """What was changed, part by part; nothing where a part cannot be told apart."""
    regions = [r.region for r in run.applied]
    return () if None in regions else tuple(r for r in regions if r is not None)


def _worst(result: ParityResult) -> tuple[str, float | None]:
    """The failed output that is furthest off, in words, and its error over its budget."""
    failed = [
        (_excess(level), f"output '{output.name}': {output.reason}")
        for output in result.outputs
        for level in (output.unoptimized, output.optimized)
        if level is not None and not level.passed
    ]
    if not failed:
        return "; ".join(result.notes) or "the check failed", None
    excess, said = max(failed)
    return said, excess or None


def _excess(level: Level) -> float:
    """max(error / budget, error_rms / budget_rms); 0 where there are no such numbers."""
    pairs = ((level.error, level.budget), (level.error_rms, level.budget_rms))
    shares = [error / budget for error, budget in pairs if budget > 0]
    return max((share for share in shares if math.isfinite(share)), default=0.0)


def _leave(
    session: _Measuring, found: dict[str, Any], *, parity: bool, warnings: list[str]
) -> None:
    """Nothing was changed: show that onnxruntime runs the model, and measure nothing."""
    found["latency_skipped"] = "nothing was changed"
    if not parity:
        found["parity_skipped"] = "--no-parity was given"
        return
    session.feed()
    found["parity"] = {
        "passed": True,
        "truth": f"not needed: {_UNCHANGED}",
        "inputs": [],
        "outputs": [
            {
                "name": output.name,
                "error": None,
                "baseline_error": None,
                "budget": None,
                "passed": True,
                "reason": None,
            }
            for output in session.stored.proto.graph.output
        ],
        "notes": ["Nothing was changed. onnxruntime loads and runs the model."],
        "seconds": None,
    }


def _time(
    session: _Measuring,
    found: dict[str, Any],
    run: Run,
    candidate: Staged,
    warnings: list[str],
    *,
    asked: bool,
    proven: bool,
) -> None:
    if not asked:
        found["latency_skipped"] = "--no-latency was given"
    elif not run.applied:
        found["latency_skipped"] = "nothing was changed"
    else:
        try:
            found["latency"] = session.measure(candidate.model)
        except (ParityError, RuntimeRejection) as error:
            if proven:
                raise
            # Without parity a model that onnxruntime cannot run is still optimized.
            found["latency_skipped"] = "onnxruntime cannot run the model"
            warnings.append(f"Latency was not measured: {error.what}.")


def _provider(wanted: str) -> str:
    from onnxnorm.session import resolve_provider

    return resolve_provider(wanted)


# ** taking a model **


@contextmanager
def _taken(model: Model) -> Iterator[Stored]:
    """A model in any of the forms we take."""
    if isinstance(model, str | Path):
        yield storage.load(model)
    elif isinstance(model, onnx.ModelProto):
        yield storage.from_proto(model)
    elif callable(getattr(model, "save", None)):  # torch's ONNXProgram writes itself
        with _saved(lambda path: model.save(str(path)), model) as stored:
            yield stored
    elif type(model).__module__.partition(".")[0] == "onnx_ir":
        import onnx_ir  # here already, since the caller made the model with it

        with _saved(lambda path: onnx_ir.save(model, path), model) as stored:
            yield stored
    else:
        raise UsageError(
            f"a {type(model).__name__} is not a model",
            "Pass a path, an onnx.ModelProto, an onnx_ir.Model or torch's ONNXProgram.",
        )


@contextmanager
def _saved(write: Callable[[Path], object], model: Model) -> Iterator[Stored]:
    folder = Path(tempfile.mkdtemp(prefix="onnxnorm-"))
    try:
        path = folder / "model.onnx"
        try:
            write(path)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"the {type(model).__name__} cannot be written: {error}",
                "Save it to a file yourself and pass the path.",
            ) from error
        # The file goes when the result is made; the descriptors that we hold keep its bytes.
        yield replace(storage.load(path))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _target(stored: Stored, output: str | Path | None, *, in_place: bool) -> Path | None:
    """Where to write, checked before any work is done."""
    if output is None:
        if not in_place:
            return None
        if stored.path is None:
            raise UsageError(
                "--in-place was given for a model in memory, which has no file",
                "Name an output, or pass the path of the model.",
            )
        output = stored.path
    target = Path(output)
    same = stored.path is not None and target.exists() and target.samefile(stored.path)
    if same and not in_place:
        raise UsageError(
            f"{target} is the input", "Write to another file, or give --in-place to replace it."
        )
    if in_place and not same:
        raise UsageError(
            f"--in-place was given with another output, {target}",
            "Leave the output out, or --in-place.",
        )
    storage.check_target(target)
    return target


def _check_valid(before: Stored, after: Stored, applied: Sequence[Remark]) -> None:
    """onnx.checker must not find in the output what it did not find in the input."""
    if not applied:
        return
    complaint = storage.checker_complaint(after)
    if complaint is not None and storage.checker_complaint(before) is None:
        raise VerificationError(
            f"onnx.checker rejects the result: {complaint}",
            "This is a defect of one of the passes; please report it with the model.",
        )


# ** rows of the report **


def _norm_rows(norms: Sequence[Norm], remarks: Sequence[Remark]) -> list[dict[str, Any]]:
    by_anchor: dict[str, Remark] = {}
    for remark in remarks:
        anchor = remark.site.partition(":")[2]
        known = by_anchor.get(anchor)
        if known is None or known.outcome in ("missed", "skipped"):
            by_anchor[anchor] = remark
    rows = []
    for norm in norms:
        scope = norm.node.scope.path
        done = by_anchor.get(f"{scope}{norm.output}")
        action, reason = _action(norm, done)
        rows.append(
            {
                "kind": norm.kind,
                "input": norm.input,
                "output": norm.output,
                "axes": None if norm.axes is None else list(norm.axes),
                "epsilon": norm.epsilon,
                "nodes": [norm.node.label],
                "recognised": norm.recognised,
                "action": action,
                "into": done.added[-1].partition(" ")[0]
                if done is not None and done.added
                else None,
                "reason": reason,
                "at": done.at if done is not None else None,
                "advice": (done.advice or None) if done is not None else None,
                "site": done.site if done is not None else None,
            }
        )
    return rows


def _action(norm: Norm, remark: Remark | None) -> tuple[str, str | None]:
    if remark is None:
        said = norm.reason or f"no pass that ran rewrites a {norm.kind}"
        return ("none", said)
    if remark.outcome == "applied":
        return ("folded", None)
    if remark.outcome == "skipped":
        return ("kept", remark.reason)
    if remark.outcome == "missed":
        return ("none", remark.reason)
    return ("refused", remark.reason)


def _site_rows(remarks: Sequence[Remark]) -> list[dict[str, Any]]:
    return [
        {
            "site": r.site,
            "pass": r.rule,
            "action": r.outcome,
            "reason": r.reason or None,
            "at": r.at or None,
            "advice": r.advice or None,
            "removed": list(r.removed),
            "added": list(r.added),
            "error": r.error,
        }
        for r in remarks
    ]


def _model_facts(stored: Stored, output: Path | None, after: Stored | None) -> dict[str, Any]:
    proto = stored.proto
    producer = " ".join(filter(None, (proto.producer_name, proto.producer_version)))
    return {
        "input": None if stored.path is None else str(stored.path),
        "output": None if output is None else str(output),
        "bytes_before": storage.total_bytes(stored),
        "bytes_after": None if after is None else storage.total_bytes(after),
        "opset": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
        "ir_version": proto.ir_version,
        "producer": producer or None,
    }


def _file_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [
        {
            "path": str(path),
            "role": "model" if position == 0 else "weights",
            "bytes": path.stat().st_size,
        }
        for position, path in enumerate(files)
    ]


def _environment(measured: bool, threads: int | None) -> dict[str, Any]:
    """Versions, and, where something was run, the machine it ran on."""
    if not measured:
        return {name: version(name) for name in ("onnxnorm", "onnx", "numpy")}
    from onnxnorm.session import environment

    return environment(threads)


def _silent(what: str, share: float | None) -> None:
    pass
