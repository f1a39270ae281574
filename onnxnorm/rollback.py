"""Rollback by replay: whatever breaks agreement is found, left out, and the rest proven again.

Nothing is undone in place, because later sites may have built on the guilty one: the pipeline runs
again from the input with that site denied. The search has a bound: after `_PATIENCE` time budgets
every site that is not shown to agree is left out, the innocent among them too, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from onnxnorm.errors import ParityError, VerificationError
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.remark import Region, Remark
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored
from onnxnorm.verifier import checker_complaint
from onnxnorm.workbench import Workbench

if TYPE_CHECKING:
    from onnxnorm.agreement import Level, ParityResult


_Fault = TypeVar("_Fault")

_PATIENCE: Final = 4  # time budgets for the search of what breaks agreement
_COMPLAINTS: Final = 8  # sites that are left out one by one for what onnx.checker says
_MORE: Final = "--time-budget gives more"


@dataclass(frozen=True)
class Proof:
    """A run that agrees with the original.

    Attributes:
        run: What is left of the passes' work, with the sites that were taken back as remarks.
        candidate: The model, staged beside its destination.
        result: The parity check that it passed.
    """

    run: Run
    candidate: Staged
    result: ParityResult

    @property
    def taken_back(self) -> tuple[Remark, ...]:
        """The sites that were left out because the outputs did not agree with them."""
        return tuple(r for r in self.run.remarks if r.outcome == "rolled_back")


def prove(
    bench: Workbench,
    pipeline: Pipeline,
    source: Stored,
    run: Run,
    target: Path | None,
    keep: ExitStack,
    taken_back: Iterable[Remark] = (),
) -> Proof:
    """Check a run; leave out the sites that break agreement, one after another, by replay.

    What cannot be proven in the time there is, is left out as well: a part of a large model that
    its check did not come to, and, once the search has taken too long, all that is not shown to
    agree.

    Args:
        bench: The original and its truth.
        pipeline: What made the run.
        source: What it started from: the original, or that in another opset.
        run: The run to check.
        target: Where the model will go; None keeps it in a temporary folder.
        keep: Owns the staged model that agrees.
        taken_back: What an earlier proof has left out, and the run too.

    Raises:
        ParityError: The original cannot be run, or does not agree with itself.
    """
    quiet = replace(pipeline, after_pass=None)
    denied = {remark.site: remark for remark in taken_back}
    until = time.monotonic() + _PATIENCE * bench.budget
    while True:
        with ExitStack() as undecided:
            candidate = undecided.enter_context(Staged(run.stored, target))
            parts = _parts(run)
            result = bench.checker().check(candidate.model, tuple(parts))
            if result.passed:
                keep.push(undecided.pop_all())
                return Proof(_with_denied(run, denied), candidate, result)
        if not run.applied and source is not bench.stored:
            raise ParityError(
                f"in the other opset the outputs do not agree: {_worst(result)[0]}",
                "The conversion changes what the model computes; leave --opset out.",
            )
        if not run.applied:
            raise ParityError(
                f"the outputs do not agree although nothing was changed: {_worst(result)[0]}",
                "The model gives other outputs from run to run; use --no-parity to go on without.",
            )
        if result.unproven:
            late = time.monotonic() > until
            sites = run.applied if late else [r for p in result.unproven for r in parts[p]]
            reason = f"it could not be proven within the time budget or the memory; {_MORE}"
            denied.update((r.site, _taken_back(r, reason)) for r in sites)
        else:
            for suspects in _suspects(run, parts, result):
                guilty, failure = _bisect(bench, quiet, source, suspects, result, denied, until)
                said, error = _worst(failure)
                reason = f"with it the outputs no longer agree: {said}"
                if len(guilty) > 1:
                    reason = (
                        f"with it or another of {len(guilty)} sites the outputs no longer agree,"
                        f" and the time budget is used up; {_MORE}: {said}"
                    )
                denied.update((r.site, _taken_back(r, reason, error)) for r in guilty)
        run = quiet.run(source, deny=tuple(denied), check_sites=False)


def made_valid(
    pipeline: Pipeline, source: Stored, run: Run, complaint: str
) -> tuple[Run, tuple[Remark, ...]]:
    """A run in whose result onnx.checker finds nothing, as it found nothing in the input.

    A file may state a shape that is not so where no tool can see it, and a site can bring it to
    light. The first site with which the checker complains is left out, by replay, and the next.

    Args:
        pipeline: What made the run.
        source: What the run started from: the model as given, or that in another opset.
        run: The run.
        complaint: What the checker says of its result.

    Returns:
        What is left of the run, and the sites that were left out.

    Raises:
        VerificationError: The checker complains without any site, or with too many of them.
    """
    quiet, denied = replace(pipeline, after_pass=None), dict[str, Remark]()
    said: str | None = complaint
    while said is not None:
        if not run.applied or len(denied) == _COMPLAINTS:
            raise VerificationError(
                f"onnx.checker rejects the result: {said}",
                "Unless onnxruntime cannot run the model as it is, this is a defect; please"
                " report it.",
            )
        [guilty], why = _first(
            quiet, source, run.applied, said, denied, lambda part: checker_complaint(part.stored)
        )
        reason = f"with it onnx.checker rejects the model: {why}"
        denied[guilty.site] = _taken_back(guilty, reason)
        run = quiet.run(source, deny=tuple(denied), check_sites=False)
        said = checker_complaint(run.stored)
    return _with_denied(run, denied), tuple(denied.values())


def _suspects(
    run: Run, parts: Mapping[Region, Sequence[Remark]], failure: ParityResult
) -> list[Sequence[Remark]]:
    """Sites that hold the guilty ones: those of each part that fails, else all of them."""
    failed = {output.name.partition("[")[0] for output in failure.outputs if not output.passed}
    found = [sites for part, sites in parts.items() if failed & set(part.outputs)]
    return list(found) if found else [run.applied]


def _taken_back(remark: Remark, reason: str, error: float | None = None) -> Remark:
    return replace(
        remark,
        outcome="rolled_back",
        reason=reason,
        removed=(),
        added=(),
        region=None,
        error=error,
    )


def _with_denied(run: Run, denied: Mapping[str, Remark]) -> Run:
    """The run with what was taken back in place of "skipped", and what no longer came up added."""
    remarks = [denied.get(r.site, r) if r.outcome == "skipped" else r for r in run.remarks]
    known = {r.site for r in remarks}
    remarks += [r for site, r in denied.items() if site not in known]
    return replace(run, remarks=tuple(remarks))


def _bisect(
    bench: Workbench,
    pipeline: Pipeline,
    source: Stored,
    suspects: Sequence[Remark],
    failure: ParityResult,
    denied: Collection[str],
    until: float,
) -> tuple[Sequence[Remark], ParityResult]:
    """The first suspect, in the order of commits, with which the outputs stop agreeing.

    Sites that nobody suspects are left out of all that is tried.

    Once `until` has passed, all the sites that were not seen to agree in its place.

    All the suspects together fail, as `failure` says of the run; none of them is taken to agree,
    and where it does not, that comes out once all are denied. Those before the one that is found
    agree together; the check that fails with it comes along.
    """

    def failing(part: Run) -> ParityResult | None:
        with Staged(part.stored, None) as candidate:
            result = bench.checker().check(candidate.model, tuple(_parts(part)))
        return None if result.passed else result

    return _first(pipeline, source, suspects, failure, denied, failing, until)


def _first(
    pipeline: Pipeline,
    source: Stored,
    suspects: Sequence[Remark],
    failure: _Fault,
    denied: Collection[str],
    failing: Callable[[Run], _Fault | None],
    until: float = math.inf,
) -> tuple[Sequence[Remark], _Fault]:
    """The first suspect with which a run fails, and how; by halves, and by replay.

    `failing` says how a run fails; all suspects together do so by `failure`.
    """
    sites = [r.site for r in suspects]
    good, bad = 0, len(sites)
    while bad - good > 1:
        if time.monotonic() > until:
            return suspects[good:], failure
        middle = (good + bad) // 2
        part = pipeline.run(source, deny=tuple(denied), allow=sites[:middle], check_sites=False)
        found = failing(part)
        if found is None:
            good = middle
        else:
            bad, failure = middle, found
    return suspects[bad - 1 : bad], failure


def _parts(run: Run) -> dict[Region, list[Remark]]:
    """What was changed, part by part, with its sites; empty where a part cannot be told apart.

    Where one site changes what another one starts or ends with, both are one part: its ends are
    those that hold the same in the original and in the result.
    """
    parts: dict[Region, list[Remark]] = {}
    for remark in run.applied:
        if remark.region is None:
            return {}
        touched = [r for r in parts if _overlap(r, remark.region) or r == remark.region]
        sites = [site for region in touched for site in parts.pop(region)]
        joined = [remark.region, *touched]
        parts[_joined(joined) if touched else remark.region] = [*sites, remark]
    made = {name for node in run.stored.proto.graph.node for name in node.output}
    told = all(r.outputs and made.issuperset(r.outputs) for r in parts)
    return parts if told else {}


def _overlap(one: Region, other: Region) -> bool:
    pairs = ((one, other), (other, one))
    return any({*a.inputs, *a.outputs} & {*b.inside} for a, b in pairs)


def _joined(regions: Sequence[Region]) -> Region:
    inside = {name for region in regions for name in region.inside}
    inputs, outputs = (
        tuple(dict.fromkeys(n for r in regions for n in getattr(r, side) if n not in inside))
        for side in ("inputs", "outputs")
    )
    return Region(regions[0].site, inputs, outputs, tuple(sorted(inside)))


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
