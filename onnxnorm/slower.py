"""Nothing slower: a pass whose work makes the model slower is found, and left out by replay.

    blamed(p)  <=>  the whole is slower than the original, twice, and than itself without p, twice

"slower" is beyond the A/A band, and "twice" is two measurements with sessions of their own: one in
some hundred says so by chance. Passes are tried from the last to the first, because what a later
one costs (a Transpose, a change of form) rests on what the earlier ones made of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from onnxnorm.errors import OnnxNormError
from onnxnorm.pipeline import PassStatistics, Pipeline, Run
from onnxnorm.remark import Remark
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored
from onnxnorm.workbench import Workbench

LEAST_SECONDS: Final = 8.0  # of one measurement; what it gives is worth little after less
PAIRS: Final = 8


@dataclass(frozen=True)
class Blame:
    """A pass without which the model is faster.

    Attributes:
        name: The pass.
        pipeline: The passes without it.
        run: What they make of the model.
        kept: A remark for each site that it had changed.
        reason: What was measured, as a clause.
    """

    name: str
    pipeline: Pipeline
    run: Run
    kept: tuple[Remark, ...]
    reason: str


def blame(
    bench: Workbench,
    pipeline: Pipeline,
    source: Stored,
    run: Run,
    candidate: Path,
    latency: Mapping[str, Any],
) -> Blame | str:
    """The last pass that makes a slower model slower, or why none is to be left out.

    Args:
        bench: The original, and how it is run.
        pipeline: What made the run.
        source: What it started from: the original, or that in another opset.
        run: The run that is slower than the original.
        candidate: The file of its model.
        latency: The measurement of it against the original that says so.
    """
    whole = [latency, bench.time(bench.original(), candidate, seconds=bench.budget / 2, again=1)]
    if whole[1]["verdict"] != "slower":
        return "The model was measured slower once and not a second time, so it stays as it is."
    names = changing(run, pipeline)
    denied = tuple(r.site for r in run.remarks if r.outcome == "rolled_back")
    for index, name in enumerate(reversed(names)):
        if bench.progress is not None:
            bench.progress(f"without {name}", index / len(names))
        rest = without(pipeline, (name,))
        try:
            left = rest.run(source, deny=denied, check_sites=False)
            if not left.applied and source is bench.stored:
                figures: Sequence[Mapping[str, Any]] = whole  # what is left is the original
            else:
                with Staged(left.stored, None) as staged:
                    figures = _twice(bench, staged.model, candidate, len(names))
        except OnnxNormError:
            continue  # what cannot be made or run without this pass is no way out
        if all(found["verdict"] == "slower" for found in figures):
            told = " and ".join(map(_figure, figures))
            reason = f"with {name} the model took {told} times as long"
            kept = _kept(run, name, reason, figures[0]["ratio"])
            return Blame(name, rest, left, kept, reason)
    return (
        f"The model took {' and '.join(map(_figure, whole))} times as long as the original, and no"
        " pass alone is to blame for it."
    )


def changing(run: Run, pipeline: Pipeline) -> list[str]:
    """The passes that changed something, in their order, each once."""
    changed = {remark.rule for remark in run.applied}
    return list(dict.fromkeys(p.name for p in pipeline.passes if p.name in changed))


def without(pipeline: Pipeline, names: Collection[str]) -> Pipeline:
    """The same passes but for some, which tell nobody of what they do."""
    passes = [p for p in pipeline.passes if p.name not in names]
    return replace(pipeline, passes=passes, after_pass=None, before=None)


def with_kept(run: Run, blamed: Iterable[Blame], order: Sequence[str]) -> Run:
    """A run that also tells of the passes that were left out, where they would have stood."""
    blamed = tuple(blamed)
    if not blamed:
        return run
    known = {s.name: s for s in run.statistics}
    statistics = tuple(known.get(name, PassStatistics(name)) for name in dict.fromkeys(order))
    remarks = (*run.remarks, *(r for b in blamed for r in b.kept))
    return replace(run, remarks=remarks, statistics=statistics)


def _twice(bench: Workbench, one: Path, other: Path, passes: int) -> list[dict[str, Any]]:
    """Two measurements, the second one only where it can still matter."""
    seconds = max(bench.budget / 2 / passes, LEAST_SECONDS)
    figures: list[dict[str, Any]] = []
    for again in (0, 1):
        figures.append(bench.time(one, other, seconds=seconds, pairs=PAIRS, again=again))
        if figures[-1]["verdict"] != "slower":
            break
    return figures


def _figure(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def _kept(run: Run, name: str, reason: str, ratio: float) -> tuple[Remark, ...]:
    rows = {r.site: r for r in run.applied if r.rule == name}
    bare: dict[str, Any] = {"removed": (), "added": (), "edited": (), "region": None, "into": ""}
    return tuple(
        replace(r, outcome="kept", reason=reason, ratio=ratio, **bare) for r in rows.values()
    )
