"""The rows of a report, from what the passes remarked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from onnxnorm.module import Node
from onnxnorm.norms import Norm
from onnxnorm.remark import Remark
from onnxnorm.rewrite import place_of
from onnxnorm.storage import Stored

# Of several remarks on one place, the one that decided most about it is the row's.
_RANK: Final = {"applied": 0, "rolled_back": 1, "refused": 2, "kept": 3, "skipped": 4, "missed": 5}


def norm_rows(norms: Sequence[Norm], remarks: Sequence[Remark]) -> list[dict[str, Any]]:
    """One row for each normalization, with what the passes did about it."""
    by_anchor: dict[str, Remark] = {}
    for remark in remarks:
        for anchor in (remark.site.partition(":")[2], *remark.anchors):
            known = by_anchor.get(anchor)
            if known is None or _says_more(remark, known):
                by_anchor[anchor] = remark
    rows = []
    for norm in norms:
        done = by_anchor.get(place_of(norm.output))
        action, reason = _action(norm, done)
        at = done.at if done is not None else norm.obstacle_at or norm.at
        rows.append(
            {
                "kind": norm.kind,
                "input": norm.input.name,
                "output": norm.output.name,
                "axes": None if norm.axes is None else list(norm.axes),
                "epsilon": norm.meant,
                "nodes": [node.label for node in norm.nodes],
                "recognised": norm.recognised,
                "action": action,
                "into": (done.into or None) if done is not None else None,
                "reason": reason,
                "at": at.label if isinstance(at, Node) else at,
                "advice": (done.advice or None) if done is not None else None,
                "site": done.site if done is not None else None,
                "notes": list(norm.notes),
                "warning": norm.warning or None,
            }
        )
    return rows


def _says_more(remark: Remark, known: Remark) -> bool:
    """Whether a remark is what to tell of a place; what is lowered may be converted after that."""
    if remark.outcome == known.outcome == "applied":
        return known.action == "lowered"
    return _rank(remark) < _rank(known)


def _rank(remark: Remark) -> int:
    return _RANK["rolled_back" if remark.ratio is not None else remark.outcome]


def _action(norm: Norm, remark: Remark | None) -> tuple[str, str | None]:
    if not norm.recognised:
        return ("none", norm.reason)
    if remark is None and norm.obstacle:
        return ("refused", norm.obstacle)
    if remark is None and norm.operator:
        return ("kept", "it is one operator already")
    if remark is None:
        return ("none", "no pass that ran is for it")
    if remark.outcome == "applied":
        return (remark.action, None)
    if remark.outcome in ("skipped", "kept"):
        return ("kept", remark.reason)
    if remark.outcome == "missed":
        return ("none", remark.reason)
    return ("refused", remark.reason)


def site_rows(remarks: Sequence[Remark]) -> list[dict[str, Any]]:
    """One row for each decision of a pass."""
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


def model_facts(stored: Stored, output: Path | None, after: Stored | None) -> dict[str, Any]:
    """What the model is: paths, sizes, opsets, producer."""
    proto = stored.proto
    producer = " ".join(filter(None, (proto.producer_name, proto.producer_version)))
    return {
        "input": None if stored.path is None else str(stored.path),
        "output": None if output is None else str(output),
        "bytes_before": stored.total_bytes,
        "bytes_after": None if after is None else after.total_bytes,
        "opset": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
        "ir_version": proto.ir_version,
        "producer": producer or None,
    }


def file_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each file that was written, the model first."""
    return [
        {
            "path": str(path),
            "role": "model" if position == 0 else "weights",
            "bytes": path.stat().st_size,
        }
        for position, path in enumerate(files)
    ]
