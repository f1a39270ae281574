"""To inspect a model: what is in it, what would be done, and what is in the way.

Apart from `onnxnorm.api`, so that nothing is imported that only measures, proves or writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx

from onnxnorm.intake import Model, taken
from onnxnorm.lowering import NOT_MEASURED
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.registry import Target, aimed, select
from onnxnorm.report import Report
from onnxnorm.rewrite import Pass
from onnxnorm.rows import model_facts, norm_rows, site_rows
from onnxnorm.storage import Stored
from onnxnorm.stream_rows import Outline, outlines, stream_rows


def inspect(
    model: Model,
    *,
    passes: str | Iterable[str | Pass] | None = None,
    target: Target = "onnx",
    runtime_version: str | None = None,
    ops: bool = False,
    cuda_kernels: bool = False,
    runtime: bool = False,
    provider: str = "auto",
) -> Report:
    """List every normalization of a model, what would be done with it, and what is in the way.

    Nothing is written, and nothing is run but for `runtime`.

    Args:
        model: As for `optimize`.
        passes: As for `optimize`.
        target: As for `optimize`.
        runtime_version: As for `optimize`.
        ops: As for `optimize`.
        cuda_kernels: As for `optimize`.
        runtime: Let onnxruntime load the model as given and as it would be, and say for each norm
            which operators it really runs.
        provider: Where it would run them.

    Raises:
        ModelError: The model cannot be read or is broken.
        UsageError: `passes` names what does not exist, or `ops` or `runtime_version` is for another
            target.
        ProviderError: With `runtime`, the provider is not usable.
        RuntimeRejection: With `runtime`, onnxruntime cannot load a model.
    """
    chosen = aimed(
        select(passes), target, ops=ops, cuda_kernels=cuda_kernels, runtime=runtime_version
    )
    with ExitStack() as stack:
        stored = stack.enter_context(taken(model))
        found: list[Outline] = []
        run = Pipeline(chosen, before=lambda facts: found.extend(outlines(facts))).run(stored)
        rows, notes = norm_rows(run.norms, run.remarks), told_of_target(target)
        ran = None
        if runtime:
            rows, told, ran = _shown(stored, run, rows, provider, stack)
            notes.append(told)
        return Report(
            command="inspect",
            version=version("onnxnorm"),
            model=model_facts(stored, None, None),
            nodes={"before": run.nodes[0], "after": run.nodes[1]},
            norms=rows,
            streams=stream_rows(found, run.remarks),
            passes=[vars(s) for s in run.statistics],
            sites=site_rows(run.remarks),
            parity_skipped="inspect runs nothing",
            latency_skipped="inspect runs nothing",
            options={
                "passes": [p.name for p in chosen],
                "target": target,
                **({"provider": ran} if ran else {}),
            },
            environment=environment(ran is not None, None),
            notes=notes,
        )


def _shown(
    stored: Stored, run: Run, rows: list[dict[str, Any]], provider: str, stack: ExitStack
) -> tuple[list[dict[str, Any]], str, str]:
    """The rows of norms with what onnxruntime runs for them, a sentence on it, and where."""
    from onnxnorm.runtime_view import RuntimeGraph, runtime_note, runtime_rows
    from onnxnorm.session import optimized_graph, resolve_provider, runtime_version
    from onnxnorm.staging import Staged

    chosen = resolve_provider(provider)
    path = stored.path or stack.enter_context(Staged(stored, None)).model
    before = after = RuntimeGraph(optimized_graph(path, provider=chosen))
    if run.applied:
        made = stack.enter_context(Staged(run.stored, None)).model
        after = RuntimeGraph(optimized_graph(made, provider=chosen))
    rows = runtime_rows(rows, before, after)
    return rows, runtime_note(rows, runtime_version()), chosen


def told_of_target(target: Target) -> list[str]:
    """What a report on a model for a target has to say of what was measured for it."""
    if target != "ort-cuda":
        return []
    return [f"Forms for ort-cuda are chosen by rule: {NOT_MEASURED} (docs/targets.md)."]


def environment(measured: bool, threads: int | None) -> dict[str, Any]:
    """Versions, and, where something was run, the machine it ran on."""
    if not measured:
        return {
            "onnxnorm": version("onnxnorm"),
            "onnx": onnx.__version__,
            "numpy": np.__version__,
        }
    from onnxnorm.session import environment as measured_on

    return measured_on(threads)
