"""The rows of a report, from what the passes remarked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxnorm import storage
from onnxnorm.norms import Norm
from onnxnorm.remark import Remark
from onnxnorm.storage import Stored


def norm_rows(norms: Sequence[Norm], remarks: Sequence[Remark]) -> list[dict[str, Any]]:
    """One row for each normalization, with what the passes did about it."""
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
        "bytes_before": storage.total_bytes(stored),
        "bytes_after": None if after is None else storage.total_bytes(after),
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
