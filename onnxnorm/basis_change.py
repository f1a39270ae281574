"""What has to change for an RMS stream to be stored in another orthonormal basis.

    x -> x V,   V^T V = I:       W -> W V for writers,   W -> V^T W for readers

Every writer must be linear, every reader an RMS norm with one scale for all features or a linear
operator, and the features must lie in one piece on one axis. What is not like that is named.
Source: S. Ashkboos et al., "SliceGPT" (2024), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxnorm.consumers import Consumers, consumers
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.given import GivenNorm, given_norms
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.port import Inlet, rounded
from onnxnorm.rewrite import Rewriter
from onnxnorm.storage import Array
from onnxnorm.stream import Entry, Stream, Streams, called, find_streams
from onnxnorm.transfer import Demand, Link, Stop, described

Weights = dict[tuple[Node, int], AnyValue]


@dataclass(frozen=True)
class BasisChange:
    """All of it.

    Attributes:
        features: Width of the stream.
        writers: The constants of its writers, with the node that reads each.
        readers: The weights of its readers, with the layout of the features in their input.
        inside: The nodes whose results change.
        values: The values that hold the features, with where they are.
    """

    features: int
    writers: list[tuple[Node, Demand]]
    readers: list[tuple[Inlet, Layout]]
    inside: tuple[Node, ...]
    values: dict[AnyValue, Layout]

    @property
    def edited(self) -> list[Node]:
        """The nodes that get other weights."""
        return list(dict.fromkeys([n for n, _ in self.writers] + [i.node for i, _ in self.readers]))

    @property
    def outputs(self) -> tuple[AnyValue, ...]:
        """What means the same before and after."""
        results = dict.fromkeys(inlet.node.outputs[0] for inlet, _ in self.readers)
        return tuple(v for v in results if v not in self.values)

    def stage(self, rw: Rewriter, v: NDArray[np.float64], role: str) -> Weights:
        """The new constants: writers times V, readers with V transposed in front.

        A layer that reads a norm and writes the stream, as in x + RMS(x) W, gets V^T W V.
        """
        reading = {inlet.node: (inlet, layout) for inlet, layout in self.readers}
        made: dict[tuple[object, ...], AnyValue] = {}

        def constant(key: tuple[object, ...], name: str, array: Array, node: Node) -> AnyValue:
            if key not in made or node.scope.is_function:
                made[key] = rw.constant(role, array, at=node, name=f"{name}_{role}")
            return made[key]

        found: Weights = {}
        for node, demand in self.writers:
            assert demand.constant is not None, "a writer is a constant"
            source, axis = demand.constant.source, demand.basis.layout.parts[0].axis
            array = demand.constant.float64()
            moved = np.moveaxis(np.tensordot(array, v, axes=(axis, 0)), -1, axis)
            key: tuple[object, ...] = (source, axis, "writer")
            if node in reading and demand.index == reading[node][0].weight_index:
                inlet, layout = reading.pop(node)
                moved = inlet.mixed(layout.parts[0].axis, _blocks(layout, v), moved)
                key = (*key, inlet.axes[layout.parts[0].axis], layout)
            changed = rounded(moved, demand.constant.dtype)
            found[node, demand.index] = constant(key, demand.constant.name, changed, node)
        for inlet, layout in reading.values():
            at = layout.parts[0].axis
            place = (inlet.weight.source, inlet.axes[at], layout)
            changed = rounded(inlet.mixed(at, _blocks(layout, v)), inlet.weight.dtype)
            made_for = constant(place, inlet.weight.name, changed, inlet.node)
            found[inlet.node, inlet.weight_index] = made_for
        return found


def basis_changes(facts: Facts) -> Iterator[tuple[Stream, BasisChange | Stop]]:
    """Each stream that an RMS norm reads, with what has to change or who stands in the way."""
    if not any(True for _ in given_norms(facts)):
        return
    streams = find_streams(facts)
    for stream in streams.all():
        if any(norm.kind == "rms_norm" for norm in stream.norms):
            yield stream, Survey(streams, stream).found()


class Survey:
    """What has to change for one stream to be rotated, or who stands in the way."""

    def __init__(self, streams: Streams, stream: Stream) -> None:
        self.streams = streams
        self.stream = stream
        self.facts = streams.facts
        self.writers: list[tuple[Node, Demand]] = []
        self.readers: dict[tuple[Node, int], tuple[Inlet, Layout]] = {}
        self.inside: dict[Node, None] = {}
        self.values: dict[AnyValue, Layout] = {}
        self.normed = {node for norm in stream.norms for node in norm.nodes}

    def found(self) -> BasisChange | Stop:
        """All of it."""
        for norm in self.stream.norms:
            stop = self._norm(norm)
            if stop is not None:
                return stop
        for entry in self.stream.entries:
            stop = self._entry(entry)
            if stop is not None:
                return stop
        readers = list(self.readers.values())
        inside = tuple(self.inside)
        return BasisChange(self.stream.features, self.writers, readers, inside, self.values)

    def _norm(self, norm: GivenNorm) -> Stop | None:
        what = called(norm)
        if norm.kind == "layer_norm":
            return Stop(norm.node, f"{what} takes the mean out; stream-fold-mean has to come first")
        if not norm.recognised:
            return Stop(norm.node, f"of {what}: {norm.reason}")
        if norm.gamma is not None and not bool((norm.gamma == norm.gamma.flat[0]).all()):
            told = f"{what} has a scale for each feature; fold-norm-affine has to come first"
            return Stop(norm.node, told)
        if norm.beta is not None and bool(norm.beta.any()):
            return Stop(norm.node, f"{what} has a bias; fold-norm-affine has to come first")
        layout = self.streams.layout_of(norm)
        if layout is None or not _plain(layout):
            return Stop(norm.node, f"{what} normalizes more than one axis")
        readers = consumers(norm.output, layout, self.streams.transfer)
        if isinstance(readers, str):
            return Stop(norm.node, f"of the result of {what}: {readers}")
        self.inside.update(dict.fromkeys(norm.nodes))
        self.values.update(readers.values)
        return self._consumers(readers)

    def _consumers(self, readers: Consumers) -> Stop | None:
        for value, layout in readers.values:
            if not _plain(layout, outer=True):
                return Stop(None, f"'{value.name}' has its features in several pieces")
        for reader in readers.places:
            node = reader.inlet.node
            self.readers[node, reader.inlet.index] = (reader.inlet, reader.layout)
            self.inside[node] = None
        self.inside.update(dict.fromkeys(readers.between))
        return None

    def _entry(self, entry: Entry) -> Stop | None:
        layout = entry.basis.layout
        if entry.pinned:
            return Stop(None, entry.pinned)
        if entry.basis.scale is not None:
            return Stop(None, f"'{entry.value.name}' is scaled feature by feature behind")
        if not _plain(layout):
            return Stop(None, f"'{entry.value.name}' has its features in several pieces")
        if isinstance(entry.source, Stop):
            return entry.source
        node = entry.source.node
        self.inside[node] = None
        self.values[entry.value] = layout
        for demand in entry.source.demands:
            if demand.constant is None:
                continue
            moved = demand.basis.layout
            if not _plain(moved) or not moved.covers(demand.constant.shape):
                if not demand.constant.float64().any():
                    continue  # zero in every basis
                name = demand.constant.name
                return Stop(node, f"{described(node)} takes '{name}', the same for every feature")
            self.writers.append((node, demand))
        return self._readers(entry)

    def _readers(self, entry: Entry) -> Stop | None:
        for use in self.facts.uses(entry.value):
            if use.node in self.normed or use.node.op in ("Shape", "Size"):
                continue
            inlet = Inlet.of(use.node, use.index, self.facts, padded=True)
            if not isinstance(inlet, str) and inlet.takes(entry.basis.layout):
                self.readers[use.node, use.index] = (inlet, entry.basis.layout)
                self.inside[use.node] = None
                continue
            link = self.streams.transfer.forth(use.node, use.index, entry.basis)
            if not isinstance(link, Link) or link.bypass:
                told = f"{described(use.node)} reads this stream feature by feature"
                return Stop(use.node, told)
        return None


def _plain(layout: Layout, *, outer: bool = False) -> bool:
    """Whether the features lie in one piece on one axis."""
    if len(layout.parts) != 1 or layout.parts[0].inner != 1:
        return False
    return outer or layout.parts[0].outer == 1


def _blocks(layout: Layout, v: NDArray[np.float64]) -> NDArray[np.float64]:
    """V transposed, once for each run of features on the axis."""
    return np.kron(np.eye(layout.parts[0].outer), v.T).astype(np.float64)
