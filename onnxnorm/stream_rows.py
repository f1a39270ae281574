"""The streams of a model as rows of a report, and what happened to the norms that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.given import GivenNorm
from onnxnorm.module import Node
from onnxnorm.remark import Remark
from onnxnorm.rewrite import place_of
from onnxnorm.stream import Stream, called, find_streams
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


@dataclass(frozen=True)
class Outline:
    """What a row says of a stream before any pass ran, since a pass changes what it names.

    Attributes:
        features: The size of the feature axis.
        writers: What writes the stream.
        readers: The norms, and the other nodes and outputs to which it goes.
        norms: Of each norm that reads it its anchor, its output, and why no pass would change it.
    """

    features: int
    writers: list[str]
    readers: list[str]
    norms: list[tuple[str, str, str]]


def outlines(facts: Facts) -> list[Outline]:
    """The streams of a model as given."""
    return [
        Outline(
            stream.features,
            [_label(w) for w in stream.writers],
            _readers(stream),
            [(place_of(n.output), n.output.name, _untouched(n)) for n in stream.norms],
        )
        for stream in find_streams(facts).all()
    ]


def stream_rows(found: Sequence[Outline], remarks: Sequence[Remark]) -> list[dict[str, Any]]:
    """One row for each stream: what it is, and what the passes did to its norms."""
    covered = _by_anchor(remarks)
    told = {r.site.partition(":")[2]: r for r in remarks if r.outcome in ("refused", "rolled_back")}
    return [_row(stream, covered, told) for stream in found]


def _row(
    stream: Outline, covered: Mapping[str, Remark], told: Mapping[str, Remark]
) -> dict[str, Any]:
    converts, blocked, sites = [], [], dict[str, Remark]()
    for place, name, untouched in stream.norms:
        remark = covered.get(place)
        if remark is not None and remark.outcome == "applied":
            converts.append(name)
            sites[remark.site] = remark
            continue
        remark = remark or told.get(place)
        blocked.append(
            {
                "norm": name,
                "reason": remark.reason if remark is not None else untouched,
                "at": remark.at if remark is not None else None,
                "advice": (remark.advice or None) if remark is not None else None,
            }
        )
    return {
        "features": stream.features,
        "writers": stream.writers,
        "readers": stream.readers,
        "norms": [name for _, name, _ in stream.norms],
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
