"""The streams of a model as rows of a report, and what happened to the norms that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.given import GivenNorm, given_norms
from onnxnorm.module import Node
from onnxnorm.remark import Remark
from onnxnorm.stream import Stream, Streams, called
from onnxnorm.transfer import Link, described


def _by_anchor(remarks: Sequence[Remark]) -> dict[str, Remark]:
    """The remarks of sites that cover several places, by each of them."""
    found: dict[str, Remark] = {}
    for remark in remarks:
        if remark.action != "folded":
            found[remark.site.partition(":")[2]] = remark
        for anchor in remark.anchors:
            found[anchor] = remark
    return found


def stream_rows(facts: Facts, remarks: Sequence[Remark]) -> list[dict[str, Any]]:
    """One row for each stream of a model as given."""
    streams = Streams(facts, list(given_norms(facts)))
    covered = _by_anchor(remarks)
    told = {r.site.partition(":")[2]: r for r in remarks if r.outcome in ("refused", "rolled_back")}
    return [_row(stream, covered, told) for stream in streams.all()]


def _row(
    stream: Stream, covered: Mapping[str, Remark], told: Mapping[str, Remark]
) -> dict[str, Any]:
    converts, blocked, sites = [], [], dict[str, Remark]()
    for norm in stream.norms:
        place = f"{norm.node.scope.path}{norm.output.name}"
        remark = covered.get(place)
        if remark is not None and remark.outcome == "applied":
            converts.append(norm.output.name)
            sites[remark.site] = remark
            continue
        remark = remark or told.get(place)
        blocked.append(
            {
                "norm": norm.output.name,
                "reason": remark.reason if remark is not None else _untouched(norm),
                "at": remark.at if remark is not None else None,
                "advice": (remark.advice or None) if remark is not None else None,
            }
        )
    return {
        "features": stream.features,
        "writers": [_label(w) for w in stream.writers],
        "readers": _readers(stream),
        "norms": [n.output.name for n in stream.norms],
        "converts": converts,
        "sites": list(sites),
        "price": [r.note for r in sites.values() if r.note],
        "blocked": blocked,
    }


def _untouched(norm: GivenNorm) -> str:
    if norm.kind == "rms_norm":
        return "it is an RMS norm and takes no mean out"
    return norm.reason or "no pass that ran changes it"


def _label(writer: Node | AnyValue) -> str:
    return described(writer) if isinstance(writer, Node) else f"'{writer.name}'"


def _readers(stream: Stream) -> list[str]:
    """The norms, and the other nodes and outputs to which the stream goes."""
    found = {called(n): None for n in stream.norms}
    for entry in stream.entries:
        for reader in entry.readers:
            if isinstance(reader, Link) or reader.node is None:
                continue
            if reader.node.op not in ("Shape", "Size"):
                found[described(reader.node)] = None
        if entry.pinned:
            found[f"the output '{entry.value.name}'"] = None
    return list(found)
