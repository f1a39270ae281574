"""The three things to do with a model: optimize it, inspect it, compare it with another.

What proves and measures is imported by the run that does it: without, a small model would be waited
for less long than the imports.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnx

from onnxnorm import staging
from onnxnorm.copying import HeadStart
from onnxnorm.errors import (
    ParityError,
    RuntimeRejection,
    UsageError,
    writing,
)
from onnxnorm.inspection import environment, told_of_target
from onnxnorm.inspection import inspect as inspect
from onnxnorm.intake import Model, given_back, taken
from onnxnorm.lowering import OLDEST_RUNTIME, Choices
from onnxnorm.lowering import version as parsed
from onnxnorm.module import Module
from onnxnorm.ops import bodies
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.registry import Target, aimed, select
from onnxnorm.regression import MAX_REGRESSION, comparable, judge
from onnxnorm.remark import Remark
from onnxnorm.report import Report
from onnxnorm.rewrite import Pass
from onnxnorm.rows import file_rows, model_facts, norm_rows, site_rows
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored
from onnxnorm.stream_rows import Outline, outlines, stream_rows
from onnxnorm.verifier import checker_complaint
from onnxnorm.workbench import Progress, Shapes, Workbench

if TYPE_CHECKING:
    from onnxnorm.analysis import Measured
    from onnxnorm.slower import Blame

_log: Final = logging.getLogger("onnxnorm")

TIME_BUDGET: Final = 60.0  # seconds for parity; latency takes half as many
_WITH_LIBRARY: Final = (
    "The model calls operators of onnxnorm: runs with optimizations on have the operator library,"
    " those with optimizations off its bodies in standard ONNX."
)
_WITHOUT_LIBRARY: Final = (
    "The model calls operators of onnxnorm, whose library was not there: all runs have their bodies"
    " in standard ONNX."
)
_CUDA_NOT_RUN: Final = "The models ran on the CPU, so the kernels for GPUs were not tried."
_UNCHANGED: Final = "the output is the input, byte for byte"


@dataclass(frozen=True)
class Result:
    """An optimized model and the report on it.

    Attributes:
        report: What was found and done, parity, latency.
        stored: The optimized model, its weights still on disk.
        files: The files that were written, the model first; empty without an output path.
        given: What was optimized.
    """

    report: Report
    stored: Stored = field(repr=False)
    files: tuple[Path, ...] = ()
    given: Model = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The whole optimized model in memory, of the kind that was given; built anew each time.

        An onnx.ModelProto for a path or an onnx.ModelProto, an onnx_ir.Model for an onnx_ir.Model,
        an ONNXProgram for an ONNXProgram.

        Raises:
            ModelError: It is larger than 2 GB; `save` writes it.
        """
        return given_back(self.stored, self.given)

    @property
    def proto(self) -> onnx.ModelProto:
        """The whole optimized model as a message, whatever kind was given."""
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
    runtime_version: str | None = None,
    opset: int | None = None,
    ops: bool = False,
    cuda_kernels: bool = False,
    provider: str = "auto",
    threads: int | None = None,
    inputs: str | Path | None = None,
    input_shapes: Shapes = None,
    seed: int = 0,
    only: Collection[str] = (),
    skip: Collection[str] = (),
    parity: bool = True,
    latency: bool = True,
    keep_slower: bool = False,
    tune: bool = False,
    choices: str | Path | Mapping[str, str] | None = None,
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
        runtime_version: The oldest onnxruntime that has to load a model for "ort-cpu" or
            "ort-cuda"; None is the oldest that this package runs with.
        opset: Convert the model to this opset before the passes; None leaves it as it is.
        ops: Whether a model for "ort-cpu" may call the operators of onnxnorm, with their bodies.
        cuda_kernels: Let a model for "ort-cuda" call them too, and run it with their kernels for
            GPUs, which have not run on one yet.
        provider: "cpu", "cuda" or "auto", for parity and latency.
        threads: Intra-op threads for latency; None is onnxruntime's own choice.
        inputs: The user's own inputs: an .npz file with an array for each, by its name.
        input_shapes: Shapes of some inputs, by name: {"x": (1, 3, 224, 224)}.
        seed: The same seed gives the same inputs.
        only: Restrict the passes to these sites.
        skip: Leave these sites as they are.
        parity: Check the outputs; without it nothing is proven.
        latency: Measure both models: latency, time by operator, and memory.
        keep_slower: Keep a pass that makes the model slower, measured twice; else it is left out.
        tune: Measure the forms that each norm can have, alone, and write it in the fastest.
        choices: The forms of norms, by their places, from a run with `tune`: its report, or the
            object under "choices" of its options.
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
    say = _heard(progress)
    chosen = aimed(
        select(passes), target, ops=ops, cuda_kernels=cuda_kernels, runtime=runtime_version
    )
    if only and set(only) <= set(skip):
        raise UsageError(
            f"the only sites, {', '.join(only)}, are all to be skipped",
            "Leave --skip or --only out.",
        )
    forms = _forms(choices, tune=tune, dry_run=dry_run)
    if tune or forms is not None:
        from onnxnorm import tuning

        chosen = tuning.with_choices(chosen, forms or ())
    with ExitStack() as stack:
        stored = stack.enter_context(taken(model))
        place = _target(stored, output, in_place=in_place)
        bench = Workbench(stack, stored, threads, inputs, input_shapes, seed, time_budget, say)
        if (parity or latency or tune) and not dry_run:
            bench.resolve(provider, cuda_kernels=cuda_kernels)
        say("passes", None)
        found: list[Outline] = []
        back: tuple[Remark, ...] = ()
        blamed: list[Blame] = []
        pipeline = Pipeline(chosen, tuple(only), tuple(skip), after_pass)
        pipeline.before = lambda facts: found.extend(outlines(facts))
        told = _Told(notes=told_of_target(target))
        source = _in_opset(stored, opset, target, runtime_version, told)
        if tune:
            say("forms", None)
            oldest = runtime_version or OLDEST_RUNTIME
            tuned = tuning.tune(bench, chosen, source, target, oldest)
            forms = tuned.choices
            told.notes += tuned.notes
            pipeline.passes = chosen = tuning.with_choices(chosen, forms)
        run = pipeline.run(source)
        if forms is not None and (lost := tuning.unmet(forms, run)):
            told.warnings.append(
                f"The choices name {', '.join(lost)}, where lower-norms has met no norm."
            )
        pipeline.before = None  # the search for what fails runs it again
        changed = bool(run.applied) or source is not stored
        complaint = checker_complaint(run.stored) if changed else None
        if complaint is not None and checker_complaint(stored) is None:
            from onnxnorm.rollback import made_valid

            run, back = made_valid(pipeline, source, run, complaint)
            changed = bool(run.applied) or source is not stored
        candidate: Staged | None = None
        if dry_run:
            told.parity_skipped = told.latency_skipped = "it was a dry run"
        elif not changed:
            _leave(bench, told, parity=parity)
        else:
            if not parity:
                told.parity_skipped = "--no-parity was given"
                told.warnings.append("The outputs were not compared with those of the original.")
            while True:
                if parity:
                    from onnxnorm.rollback import prove

                    proof = prove(bench, pipeline, source, run, place, stack, back)
                    run, candidate, back = proof.run, proof.candidate, proof.taken_back
                    told.parity = proof.result.to_json()
                else:
                    candidate = stack.enter_context(Staged(run.stored, place, ahead))
                changed = bool(run.applied) or source is not stored
                told.latency = None
                _time(bench, told, candidate, asked=latency, proven=parity, changed=changed)
                if keep_slower or told.latency is None or told.latency["verdict"] != "slower":
                    break
                from onnxnorm.slower import blame

                judged = blame(bench, pipeline, source, run, candidate.model, told.latency)
                if isinstance(judged, str):
                    told.warnings.append(judged)
                    break
                blamed.append(judged)
                pipeline, run, ahead = judged.pipeline, judged.run, None
            told.warnings += [f"{r.site} was taken back: {r.reason}." for r in back]
            told.warnings += [f"{b.name} was taken back: {b.reason}." for b in blamed]
            if told.latency is not None:
                from onnxnorm.analysis import analyse

                parts: dict[str, Measured] = {}
                if ablation:
                    from onnxnorm.ablation import ablate

                    names = () if ablation is True else tuple(ablation)
                    whole, file = told.latency, candidate.model
                    parts["ablation"] = lambda: ablate(
                        bench, pipeline, source, run, file, whole, names
                    )
                told.analysis = analyse(bench, candidate.model, parts)
                if not ablation:
                    told.analysis["skipped"]["ablation"] = "it was not asked for (--ablation all)"
            told.notes += _told_of_operators(bench, run.stored, cuda_kernels=cuda_kernels)
        if bench.provider == "cpu":
            from onnxnorm.denormals import told_of_denormals

            told.notes += told_of_denormals(run.stored)
        files: tuple[Path, ...] = ()
        if place is not None and not dry_run:
            say("writing", None)
            if changed and candidate is not None:
                files = candidate.commit()
            elif in_place:
                told.notes.append("Nothing was changed, so nothing was written.")
            else:
                files = staging.save(run.stored, place, ahead)
        if blamed:
            from onnxnorm.slower import with_kept

            run = with_kept(run, blamed, [p.name for p in chosen])
        _logged(run, told)
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
            environment=environment(bench.provider is not None, threads),
            options={
                "passes": [p.name for p in chosen],
                "target": target,
                "opset": opset,
                "ops": ops,
                "cuda_kernels": cuda_kernels,
                "keep_slower": keep_slower,
                "choices": None if forms is None else dict(forms),
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
        return Result(report, run.stored, files, model)


def compare(
    original: Model,
    candidate: Model,
    *,
    cuda_kernels: bool = False,
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
        cuda_kernels: As for `optimize`.
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
    from onnxnorm.analysis import analyse, empty, measured, provider_row

    names = [name.strip() for name in provider.split(",")]
    if len(set(names)) < len(names):
        raise UsageError(f"a provider is named twice: {provider}", "Name each once.")
    _check_compare(latency, against, max_regression, batch, sequence, sizes)
    earlier = None if against is None else _earlier(against)
    with ExitStack() as stack:
        first = stack.enter_context(taken(original))
        second = stack.enter_context(taken(candidate))
        bench = Workbench(stack, first, threads, inputs, input_shapes, seed, time_budget, progress)
        further = [replace(bench, provider=None) for _ in names[1:]]
        for runner, name in zip([bench, *further], names, strict=True):
            runner.resolve(name, cuda_kernels=cuda_kernels)
        if earlier is not None:
            comparable(earlier[1], {"provider": bench.provider}, report=earlier[0])
        axes = sweeps.resolve(first.proto, batch=batch, sequence=sequence, named=sizes)
        before, after = (sum(1 for _ in Module(s).nodes()) for s in (first, second))
        told = _Told(
            parity_skipped=None if parity else "--no-parity was given",
            latency_skipped=None if latency else "--no-latency was given",
        )
        path = bench.on_disk(second)
        for each in (second, first):
            told.notes = told.notes or _told_of_operators(bench, each, cuda_kernels=cuda_kernels)
        if "cpu" in {each.provider for each in (bench, *further)}:
            from onnxnorm.denormals import told_of_denormals

            told.notes += told_of_denormals(second)
        if parity:
            told.parity = bench.checker().check(path).to_json()
        if latency:
            told.latency, told.latency_skipped = measured(bench, path, told.parity)
        if told.latency is not None:
            parts: dict[str, Measured] = {}
            if axes:
                parts["sweep"] = lambda: sweeps.sweep(bench, path, axes)
            told.analysis = analyse(bench, path, parts)
        if further:
            told.analysis = told.analysis or empty()
            told.analysis["providers"] = [
                provider_row(each, path, parity=parity, latency=latency) for each in further
            ]
        if earlier is not None and told.latency is not None and told.analysis is not None:
            told.analysis["against"] = judge(
                earlier[1], told.latency, report=earlier[0], max_regression=max_regression
            )
        return Report(
            command="compare",
            version=version("onnxnorm"),
            model=model_facts(first, second.path, second),
            nodes={"before": before, "after": after},
            environment=environment(True, threads),
            options={"provider": bench.provider, "seed": seed, "time_budget": time_budget},
            **vars(told),
        )


def _told_of_operators(bench: Workbench, stored: Stored, *, cuda_kernels: bool) -> list[str]:
    """How our operators were run, if the model calls any."""
    functions = stored.proto.functions
    if bench.provider is None or all(each.domain != bodies.DOMAIN for each in functions):
        return []
    from onnxnorm.ops import library

    there = bool(bench.libraries) or (
        library.describe().path is not None and bench.provider == "cpu"
    )
    unrun = [_CUDA_NOT_RUN] if cuda_kernels and not bench.libraries else []
    return [_WITH_LIBRARY if there else _WITHOUT_LIBRARY, *unrun]


def _forms(
    choices: str | Path | Mapping[str, str] | None, *, tune: bool, dry_run: bool
) -> Choices | None:
    """The choices that were given; None where there are none."""
    if tune and dry_run:
        raise UsageError("--tune was given for a dry run, which measures nothing", "Leave one out.")
    if tune and choices is not None:
        raise UsageError("both --tune and --choices were given", "Measure, or replay, not both.")
    if choices is None or isinstance(choices, Mapping):
        return None if choices is None else tuple(choices.items())
    from onnxnorm import tuning

    return tuning.read_choices(choices)


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
    max_regression: float,
    batch: Sequence[int],
    sequence: Sequence[int],
    sizes: Mapping[str, Sequence[int]] | None,
) -> None:
    """Refuse a share that is none, and what needs a measurement where there is to be none."""
    if not 0 <= max_regression < math.inf:
        raise UsageError(
            f"the share by which the ratio may grow is {max_regression}",
            "Give --max-regression a number of 0 or more, 0.05 for 5 %.",
        )
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
    bench: Workbench,
    told: _Told,
    candidate: Staged,
    *,
    asked: bool,
    proven: bool,
    changed: bool,
) -> None:
    if not asked:
        told.latency_skipped = "--no-latency was given"
    elif not changed:
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
    with writing(target):
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


def _in_opset(
    stored: Stored, opset: int | None, target: Target, runtime: str | None, told: _Told
) -> Stored:
    """The model in the opset that was asked for; itself where it is in that, or none was."""
    if opset is None or any(
        o.version == opset for o in stored.proto.opset_import if o.domain in ("", "ai.onnx")
    ):
        return stored
    from onnxnorm.opset import convert

    converted = convert(stored, opset, target, parsed(runtime or OLDEST_RUNTIME))
    told.notes.append(converted.note)
    return converted.stored


def _heard(progress: Progress | None) -> Progress:
    """Progress that is also logged."""

    def say(what: str, share: float | None) -> None:
        _log.debug("%s%s", what, "" if share is None else f" ({share:.0%})")
        if progress is not None:
            progress(what, share)

    return say


def _logged(run: Run, told: _Told) -> None:
    """One line of the log for each pass, parity and latency."""
    for each in run.statistics:
        places = f"{each.applied} place{'' if each.applied == 1 else 's'}"
        _log.info("%s: applied at %s, refused at %d", each.name, places, each.refused)
    if told.parity is not None:
        _log.info("parity: %s", "passed" if told.parity["passed"] else "failed")
    if told.latency is not None:
        _log.info("latency: %s, ratio %.3f", told.latency["verdict"], told.latency["ratio"])
    for warning in told.warnings:
        _log.warning("%s", warning)
