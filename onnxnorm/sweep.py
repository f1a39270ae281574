"""Latency against the size of the inputs: symbolic axes at several sizes, each measured.

`--batch` is the axis that comes first in every input, `--seq` every axis that is called like a
sequence, and `--sweep name=...` any symbolic axis by its name.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx

from onnxnorm import feeds
from onnxnorm.errors import OnnxNormError, UsageError
from onnxnorm.session import Session, open_session
from onnxnorm.workbench import Workbench

MOST_POINTS: Final = 64
_LEAST_SECONDS: Final = 10.0  # of one point; eight session pairs of a small model take so long
_PAIRS: Final = 8

Axes = Mapping[str, Sequence[int]]


def resolve(
    proto: onnx.ModelProto,
    *,
    batch: Sequence[int] = (),
    sequence: Sequence[int] = (),
    named: Axes | None = None,
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The symbols that vary together, with their sizes: what `batch` and `sequence` mean here.

    Args:
        proto: The model.
        batch: Sizes of the batch.
        sequence: Sizes of the sequence.
        named: Sizes of other symbolic axes, by name.

    Raises:
        UsageError: The model has no such axis, an axis is given twice, or there are more than
            MOST_POINTS points.
    """
    known = feeds.symbols(proto)
    listing = f"Its symbolic axes are: {', '.join(known) or 'none; export it with dynamic axes'}."
    found: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    if batch:
        first = feeds.batch_axis(proto)
        if first is None:
            raise UsageError("--batch was given, and the model has no symbolic batch axis", listing)
        found.append(((first,), tuple(batch)))
    if sequence:
        long = feeds.sequence_axes(proto)
        if not long:
            raise UsageError(
                "--seq was given, and no symbolic axis of the model is called like a sequence",
                f"{listing} Name one with --sweep.",
            )
        found.append((long, tuple(sequence)))
    for name, sizes in (named or {}).items():
        if name not in known:
            raise UsageError(f"--sweep names '{name}', which is no symbolic axis", listing)
        found.append(((name,), tuple(sizes)))
    names = [name for group, _ in found for name in group]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"the axis '{twice}' is given sizes twice", "Give each axis once.")
    points = 1
    for _, sizes in found:
        points *= len(sizes)
    if points > MOST_POINTS:
        raise UsageError(
            f"the sizes make {points} points to measure", f"Give at most {MOST_POINTS}."
        )
    return found


def sweep(
    bench: Workbench,
    candidate: Path,
    axes: Sequence[tuple[tuple[str, ...], tuple[int, ...]]],
) -> dict[str, Any]:
    """Measure both models at every combination of sizes.

    A size that one of the models does not take is a row with its reason.

    Args:
        bench: The original, and how it is run.
        candidate: The file of the other model.
        axes: What `resolve` returned.

    Returns:
        `axes`, `points` and `seconds`, as `report.schema.json` describes them.
    """
    began = time.perf_counter()
    points = list(itertools.product(*(sizes for _, sizes in axes)))
    seconds = max(bench.budget / 2 / max(len(points), 1), _LEAST_SECONDS)
    rows: list[dict[str, Any]] = []
    for index, point in enumerate(points):
        sizes = {name: size for (group, _), size in zip(axes, point, strict=True) for name in group}
        if bench.progress is not None:
            spelled = ", ".join(f"{name}={size}" for name, size in sizes.items())
            bench.progress(f"at {spelled}", index / len(points))
        row: dict[str, Any] = {"sizes": sizes, "latency": None, "reason": None}
        try:
            row["latency"] = bench.time(
                bench.original(),
                candidate,
                values=_accepted(bench, sizes),
                seconds=seconds,
                pairs=_PAIRS,
            )
        except OnnxNormError as error:
            row["reason"] = error.what
        rows.append(row)
    return {
        "axes": [{"names": list(group), "sizes": list(sizes)} for group, sizes in axes],
        "points": rows,
        "seconds": time.perf_counter() - began,
    }


def _accepted(bench: Workbench, sizes: Mapping[str, int]) -> Mapping[str, Any]:
    """Inputs of these sizes that the original accepts."""
    refusal: OnnxNormError | None = None
    with open_session(bench.original(), provider=bench.provider or "cpu") as session:
        choices = feeds.candidates(
            bench.stored.proto, shapes=bench.shapes, seed=bench.seed, count=1, sizes=sizes
        )
        for choice in choices:
            refused = _refusal(session, choice[0].values)
            if refused is None:
                return choice[0].values
            refusal = refusal or refused
    raise refusal or UsageError("no inputs of these sizes could be made", "Give other sizes.")


def _refusal(session: Session, values: Mapping[str, Any]) -> OnnxNormError | None:
    """Why the model does not run on these inputs; None where it does."""
    try:
        session.run(values)
    except OnnxNormError as error:
        return error
    return None
