"""What each pass bought: the model is made again without it, and timed against the whole.

    bought(p) = ratio * (1 / r(p) - 1),    r(p) = latency with all passes / latency without p

in shares of the original's latency; `ratio` is that of the whole, and 1 - ratio - sum bought(p) is
what the passes do only together (one may take over what another left) or what nobody can tell from
noise. Leaving one out measures a pass beside the others, which adding one after another would not:
the second of two that do the same would get nothing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onnxnorm.errors import OnnxNormError
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.slower import LEAST_SECONDS, PAIRS, changing, without
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored
from onnxnorm.workbench import Workbench


def ablate(
    bench: Workbench,
    pipeline: Pipeline,
    source: Stored,
    run: Run,
    candidate: Path,
    whole: Mapping[str, Any],
    wanted: Collection[str] = (),
) -> dict[str, Any]:
    """Leave out each pass that changed something, once, and time what is left.

    Args:
        bench: The original, and how it is run.
        pipeline: What made the run.
        source: What it started from: the original, or that in another opset.
        run: The run whose passes are judged.
        candidate: The file of its model.
        whole: The latency of that model against the original, as JSON.
        wanted: Restrict it to these passes; empty means all that changed something.

    Returns:
        `passes`, `skipped` and `seconds`, as `report.schema.json` describes them.
    """
    began = time.perf_counter()
    names = changing(run, pipeline)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    if len(names) == 1 and source is bench.stored:
        # Without the only pass there is the original, and that comparison is there already.
        return {
            "passes": [_row(names[0], whole)],
            "skipped": [],
            "seconds": time.perf_counter() - began,
        }
    taken_back = tuple(r.site for r in run.remarks if r.outcome == "rolled_back")
    asked = [name for name in names if not wanted or name in wanted]
    for index, name in enumerate(asked):
        if bench.progress is not None:
            bench.progress(f"without {name}", index / len(asked))
        try:
            rest = without(pipeline, (name,))
            left = rest.run(source, deny=taken_back, check_sites=False)
            with Staged(left.stored, None) as staged:
                seconds = max(bench.budget / 2 / len(asked), LEAST_SECONDS)
                latency = bench.time(staged.model, candidate, seconds=seconds, pairs=PAIRS)
        except OnnxNormError as error:
            skipped.append({"pass": name, "reason": error.what})
        else:
            rows.append(_row(name, latency))
    skipped += [{"pass": n, "reason": "it was not asked for"} for n in names if n not in asked]
    return {"passes": rows, "skipped": skipped, "seconds": time.perf_counter() - began}


def _row(name: str, latency: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("ratio", "interval", "band", "verdict", "pairs")
    return {"pass": name, **{key: latency[key] for key in keys}}
