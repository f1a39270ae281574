"""The three things to do with a model: optimize it, inspect it, compare it with another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import onnx

from onnxnorm import staging, storage, verifier
from onnxnorm.ablation import ablate
from onnxnorm.analysis import Measured, analyse, empty, provider_row
from onnxnorm.copying import HeadStart
from onnxnorm.errors import (
    ModelError,
    ParityError,
    RuntimeRejection,
    UsageError,
    VerificationError,
)
from onnxnorm.module import Module
from onnxnorm.ops import bodies, library
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.registry import select
from onnxnorm.regression import MAX_REGRESSION, judge
from onnxnorm.report import Report
from onnxnorm.rewrite import Pass
from onnxnorm.rollback import prove
from onnxnorm.rows import file_rows, model_facts, norm_rows, site_rows
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored
from onnxnorm.stream_rows import Outline, outlines, stream_rows
from onnxnorm.workbench import Progress, Shapes, Workbench

Target: TypeAlias = Literal["onnx", "ort-cpu", "ort-cuda"]
Model: TypeAlias = Any  # path, ModelProto, onnx_ir.Model, or what torch.onnx.export returns

TIME_BUDGET: Final = 60.0  # seconds for parity; latency takes half as many
_WITH_LIBRARY: Final = (
    "The model calls operators of onnxnorm: runs with optimizations on have the operator library,"
    " those with optimizations off its bodies in standard ONNX."
)
_WITHOUT_LIBRARY: Final = (
    "The model calls operators of onnxnorm, whose library was not there: all runs have their bodies"
    " in standard ONNX."
)
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
        return staging.save(self.stored, path)


def optimize(
    model: Model,
    output: str | Path | None = None,
    *,
    passes: str | Iterable[str | Pass] | None = None,
    target: Target = "onnx",
    ops: bool = False,
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
    ablation: bool | Collection[str] = False,
    ahead: HeadStart | None = None,
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
        target: What the model is for: "onnx" is any runtime and writes standard operators,
            "ort-cpu" and "ort-cuda" are onnxruntime and may write its own.
        ops: Whether a model for "ort-cpu" may call the operators of onnxnorm, with their bodies.
        provider: "cpu", "cuda" or "auto", for parity and latency.
        threads: Intra-op threads for latency; None is onnxruntime's own choice.
        inputs: The user's own inputs, an .npz file.
        input_shapes: Shapes of some inputs.
        seed: The same seed gives the same inputs.
        only: Restrict the passes to these sites.
        skip: Leave these sites as they are.
        parity: Check the outputs; without it nothing is proven.
        latency: Measure both models: latency, time by operator, and memory.
        dry_run: Plan and apply in memory, check and write nothing.
        in_place: Let `output` be the input itself.
        time_budget: Seconds that parity may take; latency takes half as many.
        ablation: Measure what each pass bought, by leaving it out once; or only these passes. It
            takes as long as latency again, and at least 8 s for each pass.
        ahead: A copy of the model's data file, begun for `output`; taken up where it fits.
        progress: Called as progress(what, fraction done or None).
        after_pass: Called with a pass's name and the model after it changed something.

    Raises:
        ModelError: The model cannot be read or is broken.
        UsageError: The arguments do not fit each other or the model.
        OutputError: The result cannot be written.
        ProviderError: The provider is not usable.
        ParityError: The outputs do not agree, or onnxruntime cannot run the model.
    """
    say = progress or _silent
    chosen = _aimed(select(passes), target, ops=ops)
    with ExitStack() as stack:
        stored = stack.enter_context(_taken(model))
        place = _target(stored, output, in_place=in_place)
        bench = Workbench(stack, stored, threads, inputs, input_shapes, seed, time_budget, progress)
        if (parity or latency) and not dry_run:
            bench.resolve(provider)
        say("passes", None)
        found: list[Outline] = []
        pipeline = Pipeline(chosen, tuple(only), tuple(skip), after_pass)
        pipeline.before = lambda facts: found.extend(outlines(facts))
        run = pipeline.run(stored)
        pipeline.before = None  # the search for what fails runs it again
        _check_valid(stored, run)
        told = _Told()
        candidate: Staged | None = None
        if dry_run:
            told.parity_skipped = told.latency_skipped = "it was a dry run"
        elif not run.applied:
            _leave(bench, told, parity=parity)
        else:
            if parity:
                proof = prove(bench, pipeline, run, place, stack)
                run, candidate = proof.run, proof.candidate
                told.parity = proof.result.to_json()
                told.warnings += [f"{r.site} was taken back: {r.reason}." for r in proof.taken_back]
            else:
                candidate = stack.enter_context(Staged(run.stored, place, ahead))
                told.parity_skipped = "--no-parity was given"
                told.warnings.append("The outputs were not compared with those of the original.")
            _time(bench, told, run, candidate, asked=latency, proven=parity)
            if told.latency is not None:
                parts: dict[str, Measured] = {}
                if ablation:
                    names = () if ablation is True else tuple(ablation)
                    whole, file = told.latency, candidate.model
                    parts["ablation"] = lambda: ablate(bench, pipeline, run, file, whole, names)
                told.analysis = analyse(bench, candidate.model, parts)
                if not ablation:
                    told.analysis["skipped"]["ablation"] = "it was not asked for (--ablation all)"
            told.notes += _told_of_operators(bench, run.stored)
        files: tuple[Path, ...] = ()
        if place is not None and not dry_run:
            say("writing", None)
            if run.applied and candidate is not None:
                files = candidate.commit()
            elif in_place:
                told.notes.append("Nothing was changed, so nothing was written.")
            else:
                files = staging.save(run.stored, place, ahead)
        streams = stream_rows(found, run.remarks)
        report = Report(
            command="optimize",
            version=version("onnxnorm"),
            model=model_facts(stored, place, run.stored),
            nodes={"before": run.nodes[0], "after": run.nodes[1]},
            norms=norm_rows(run.norms, run.remarks),
            streams=streams,
            passes=[vars(s) for s in run.statistics],
            sites=site_rows(run.remarks),
            environment=_environment(bench.provider is not None, threads),
            options={
                "passes": [p.name for p in chosen],
                "target": target,
                "ops": ops,
                "provider": bench.provider or provider,
                "seed": seed,
                "only": list(only),
                "skip": list(skip),
                "input_shapes": {k: list(v) for k, v in (input_shapes or {}).items()},
                "time_budget": time_budget,
            },
            files=file_rows(files),
            dry_run=dry_run,
            **vars(told),
        )
        return Result(report, run.stored, files)


def inspect(
    model: Model,
    *,
    passes: str | Iterable[str | Pass] | None = None,
    target: Target = "onnx",
    ops: bool = False,
) -> Report:
    """List every normalization of a model, what would be done with it, and what is in the way.

    Nothing is run and nothing is written.

    Raises:
        ModelError: The model cannot be read or is broken.
        UsageError: `passes` names what does not exist, or `ops` is for another target.
    """
    chosen = _aimed(select(passes), target, ops=ops)
    with _taken(model) as stored:
        found: list[Outline] = []
        run = Pipeline(chosen, before=lambda facts: found.extend(outlines(facts))).run(stored)
        return Report(
            command="inspect",
            version=version("onnxnorm"),
            model=model_facts(stored, None, None),
            nodes={"before": run.nodes[0], "after": run.nodes[1]},
            norms=norm_rows(run.norms, run.remarks),
            streams=stream_rows(found, run.remarks),
            passes=[vars(s) for s in run.statistics],
            sites=site_rows(run.remarks),
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
    batch: Sequence[int] = (),
    sequence: Sequence[int] = (),
    sizes: Mapping[str, Sequence[int]] | None = None,
    against: str | Path | Report | None = None,
    max_regression: float = MAX_REGRESSION,
    progress: Progress | None = None,
) -> Report:
    """Judge the outputs and the latency of any two models, as `optimize` judges its own.

    Outputs that do not agree, and a gain that is gone, are in the report and raise nothing.

    Args:
        original: The model to trust, in any form that `optimize` takes.
        candidate: The model that is judged.
        provider: As for `optimize`, or several with commas between, "cpu,cuda": all are measured,
            and one that is not usable is an error.
        threads: As for `optimize`.
        inputs: As for `optimize`.
        input_shapes: As for `optimize`.
        seed: As for `optimize`.
        parity: As for `optimize`.
        latency: As for `optimize`.
        time_budget: As for `optimize`; each further provider takes as long again, and each size of
            a sweep 10 s or more.
        batch: Measure latency at these sizes of the batch axis too.
        sequence: Measure it at these sizes of the axes that are called like a sequence.
        sizes: Measure it at these sizes of other symbolic axes, by name.
        against: An earlier report, whose ratio of latencies this one is held against.
        max_regression: The share by which the ratio may have grown since.
        progress: As for `optimize`.

    Raises:
        ModelError: A model cannot be read or is broken.
        UsageError: The arguments do not fit each other, the models or the earlier report.
        ProviderError: A provider is not usable.
        ParityError: onnxruntime cannot run the original.
    """
    from onnxnorm import sweep as sweeps

    names = [name.strip() for name in provider.split(",")]
    _check_compare(latency, against, batch, sequence, sizes)
    earlier = None if against is None else _earlier(against)
    with ExitStack() as stack:
        first = stack.enter_context(_taken(original))
        second = stack.enter_context(_taken(candidate))
        bench = Workbench(stack, first, threads, inputs, input_shapes, seed, time_budget, progress)
        further = [replace(bench, provider=None) for _ in names[1:]]
        for each, name in zip([bench, *further], names, strict=True):
            each.resolve(name)
        axes = sweeps.resolve(first.proto, batch=batch, sequence=sequence, named=sizes)
        before, after = (sum(1 for _ in Module(s).nodes()) for s in (first, second))
        told = _Told(
            parity_skipped=None if parity else "--no-parity was given",
            latency_skipped=None if latency else "--no-latency was given",
        )
        path = bench.on_disk(second)
        told.notes += _told_of_operators(bench, second) or _told_of_operators(bench, first)
        if parity:
            told.parity = bench.checker().check(path).to_json()
        if latency:
            told.latency = bench.measure(path)
            parts: dict[str, Measured] = {}
            if axes:
                parts["sweep"] = lambda: sweeps.sweep(bench, path, axes)
            told.analysis = analyse(bench, path, parts)
        if further:
            told.analysis = told.analysis or empty()
            told.analysis["providers"] = [
                provider_row(each, path, parity=parity, latency=latency) for each in further
            ]
        if earlier is not None:
            assert told.analysis is not None
            told.analysis["against"] = judge(
                earlier[1], told.latency or {}, report=earlier[0], max_regression=max_regression
            )
        return Report(
            command="compare",
            version=version("onnxnorm"),
            model=model_facts(first, second.path, second),
            nodes={"before": before, "after": after},
            environment=_environment(True, threads),
            options={"provider": bench.provider, "seed": seed, "time_budget": time_budget},
            **vars(told),
        )


def _aimed(passes: list[Pass], target: Target, *, ops: bool) -> list[Pass]:
    """Passes that depend on the target, told of it; what the user gave them stays."""
    if ops and target != "ort-cpu":
        raise UsageError(
            f"--ops was given for the target {target}",
            "Add --target ort-cpu: the operators of onnxnorm have kernels for onnxruntime's CPU.",
        )
    aimed = []
    for each in passes:
        given: dict[str, Any] = {}
        if getattr(each, "target", None) == "onnx":
            given["target"] = target
        if ops and hasattr(each, "ops"):
            given["ops"] = True
        aimed.append(replace(each, **given) if given else each)  # type: ignore[type-var]
    return aimed


def _told_of_operators(bench: Workbench, stored: Stored) -> list[str]:
    """How our operators were run, if the model calls any."""
    functions = stored.proto.functions
    if bench.provider is None or all(each.domain != bodies.DOMAIN for each in functions):
        return []
    there = library.describe().path is not None and bench.provider == "cpu"
    return [_WITH_LIBRARY if there else _WITHOUT_LIBRARY]


# ** proving and measuring **


@dataclass
class _Told:
    """What a report says of the proof and the measurement."""

    parity: dict[str, Any] | None = None
    parity_skipped: str | None = None
    latency: dict[str, Any] | None = None
    latency_skipped: str | None = None
    analysis: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _leave(bench: Workbench, told: _Told, *, parity: bool) -> None:
    """Nothing was changed: show that onnxruntime runs the model, and measure nothing."""
    told.latency_skipped = "nothing was changed"
    if not parity:
        told.parity_skipped = "--no-parity was given"
        return
    bench.feed()
    unknown = dict.fromkeys(("error", "baseline_error", "budget", "reason"))
    told.parity = {
        "passed": True,
        "truth": f"not needed: {_UNCHANGED}",
        "inputs": [],
        "outputs": [
            {"name": output.name, "passed": True, **unknown}
            for output in bench.stored.proto.graph.output
        ],
        "notes": ["Nothing was changed. onnxruntime loads and runs the model."],
        "seconds": None,
    }


def _check_compare(
    latency: bool,
    against: str | Path | Report | None,
    batch: Sequence[int],
    sequence: Sequence[int],
    sizes: Mapping[str, Sequence[int]] | None,
) -> None:
    """Refuse what needs a measurement where there is to be none."""
    if latency:
        return
    for asked, what in (
        (against is not None, "an earlier report was given to hold the latency against"),
        (bool(batch or sequence or sizes), "sizes were given to measure latency at"),
    ):
        if asked:
            raise UsageError(f"{what}, and no latency is measured", "Leave out --no-latency.")


def _earlier(against: str | Path | Report) -> tuple[str, dict[str, Any]]:
    """The name of an earlier report, and its latency."""
    name = "the earlier report" if isinstance(against, Report) else str(against)
    report = against if isinstance(against, Report) else Report.read(against)
    if report.latency is None:
        raise UsageError(
            f"{name} has no latency to hold this one against",
            "Give a report of a run that measured latency.",
        )
    return name, dict(report.latency)


def _time(
    bench: Workbench, told: _Told, run: Run, candidate: Staged, *, asked: bool, proven: bool
) -> None:
    if not asked:
        told.latency_skipped = "--no-latency was given"
    elif not run.applied:
        told.latency_skipped = "nothing was changed"
    else:
        try:
            told.latency = bench.measure(candidate.model)
        except (ParityError, RuntimeRejection) as error:
            if proven:
                raise
            # Without parity a model that onnxruntime cannot run is still optimized.
            told.latency_skipped = "onnxruntime cannot run the model"
            told.warnings.append(f"Latency was not measured: {error.what}.")


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
            f"an object of type {type(model).__name__} is not a model",
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
    staging.check_target(target)
    return target


def _check_valid(before: Stored, run: Run) -> None:
    """onnx.checker must not find in the output what it did not find in the input."""
    complaint = verifier.checker_complaint(run.stored) if run.applied else None
    if complaint is not None and verifier.checker_complaint(before) is None:
        raise VerificationError(
            f"onnx.checker rejects the result: {complaint}",
            "This is a defect of one of the passes; please report it with the model.",
        )


def _environment(measured: bool, threads: int | None) -> dict[str, Any]:
    """Versions, and, where something was run, the machine it ran on."""
    if not measured:
        return {name: version(name) for name in ("onnxnorm", "onnx", "numpy")}
    from onnxnorm.session import environment

    return environment(threads)


def _silent(what: str, share: float | None) -> None:
    pass
