"""The values of a residual stream that can only be stored in other units together.

    x = a * x'      x is what the model means, x' what it stores, a one factor for each feature

    y = s * x + t    a_y and a_x by themselves, as the constants take up both
    y = u + v        a_y = a_u = a_v
    y = x W + b      a_y is free:    W' = W / a_y,   b' = b / a_y
    y = f(x W)       a_x is free:    W' = a_x W
    y = relu(x)      a_y = a_x > 0
    any other        a_x = 1

A region is all values whose factors depend on each other by these rules, with what makes and reads
them. `onnxnorm.gauge` chooses the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from onnxnorm.affine_maps import Map, Vector, find_sums, read_map, scaled_features
from onnxnorm.facts import AnyValue, Constant, Use
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.norms import find_norms
from onnxnorm.port import LINEAR, REAL, Slot, is_real, slots, spread_along
from onnxnorm.transfer import Basis, Demand, Link, Stop, Transfer, described

# f(a x) = a f(x) for a > 0, feature by feature.
_HOMOGENEOUS: Final = frozenset({"Abs", "LeakyRelu", "Max", "Min", "Relu"})
_POOLS: Final = frozenset({"GlobalMaxPool", "MaxPool"})
_NORMS: Final = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
)
_AFFINE: Final = ("batch_norm", "channel_affine")
_SUMS: Final = frozenset({"Add", "Sub", "Sum"})


@dataclass(frozen=True, eq=False)
class Intake:
    """A weight by which a linear operator contracts the features of its input.

    Attributes:
        node: The operator.
        index: Which of its inputs the weight is.
        constant: The weight.
        axis: The weight's axis of the input features, from the right, inside a group.
        groups: Into how many groups they are cut; the weight's axis 0 is then (group, output).
    """

    node: Node
    index: int
    constant: Constant
    axis: int
    groups: int = 1

    @property
    def features(self) -> int:
        """How many input features there are."""
        return self.constant.shape[self.axis] * self.groups

    def spread(self, factors: Vector) -> Vector:
        """One factor for each input feature, in a shape that broadcasts against the weight."""
        return spread_along(factors, self.constant.shape, self.axis, self.groups)


def intake(node: Node, index: int, layout: Layout, transfer: Transfer) -> Intake | None:
    """The weight through which a node reads the features of its input `index`, if it is linear."""
    if node.domain != "" or node.op not in LINEAR:
        return None
    if len(node.inputs) < 2 or index > 1 or (index == 1 and node.op != "MatMul"):
        return None
    if node.parametric:
        return None
    constant = transfer.facts.constant(node.inputs[1 - index])
    if constant is None or not is_real(constant.dtype) or len(constant.shape) < 2:
        return None
    rank, groups = len(constant.shape), 1
    if node.op == "MatMul":
        axis, own = (-2, -1) if index == 0 else (-1, -2)
    elif node.op == "Gemm":
        if node.attrs.get("transA", 0) or rank != 2:
            return None
        axis, own = (-1 if node.attrs.get("transB", 0) else -2), -1
    else:
        groups = int(node.attrs.get("group", 1)) if node.op == "Conv" else 1
        axis, own = (1 - rank if node.op == "Conv" else -rank), 1 - rank
        if rank < 3 or groups < 1 or constant.shape[0] % groups:
            return None
    if not layout.only_axis(own):
        return None
    found = Intake(node, 1 - index, constant, axis, groups)
    return found if found.features == layout.spread(np.ones(layout.features), 0).size else None


@dataclass(frozen=True, eq=False)
class Writer:
    """A constant that puts features into a stream.

    Attributes:
        value: The value it makes, or is a part of.
        node: The node that reads it.
        index: Which input of the node it is.
        constant: The constant.
        slot: How it lies, where it is the weight or the bias of a linear operator.
        layout: Where the features are in the constant otherwise.
    """

    value: AnyValue
    node: Node
    index: int
    constant: Constant
    slot: Slot | None
    layout: Layout

    def spread(self, factors: Vector) -> Vector:
        """One factor for each feature, in a shape that broadcasts against the constant."""
        if self.slot is not None:
            return self.slot.spread(self.layout.spread(factors, 0).reshape(-1))
        return self.layout.spread(factors, len(self.constant.shape))


@dataclass(eq=False)
class Region:
    """All values whose factors depend on each other, with what makes and reads them.

    Attributes:
        features: Number of features.
        values: The values, with where the features are.
        maps: The affine maps between them, in the order of computation.
        ties: Pairs of values that have the same factor.
        fixed: Values whose factor is 1, with the node that asks for it.
        positive: Values whose factor is positive, with the node that asks for it.
        writers: The constants that make them.
        intakes: The weights that read them.
        links: How the node that makes a value treats its inputs.
        joins: Whether two of the values are added: whether it is a residual stream.
        torn: Values that have their features in two places.
    """

    features: int
    values: dict[AnyValue, Layout] = field(default_factory=dict)
    maps: list[Map] = field(default_factory=list)
    ties: list[tuple[AnyValue, AnyValue]] = field(default_factory=list)
    fixed: dict[AnyValue, Stop] = field(default_factory=dict)
    positive: dict[AnyValue, Node] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)
    intakes: list[tuple[AnyValue, Intake]] = field(default_factory=list)
    links: dict[AnyValue, Link] = field(default_factory=dict)
    joins: bool = False
    torn: set[AnyValue] = field(default_factory=set)


def find_regions(transfer: Transfer) -> Iterator[Region]:
    """The residual streams that have a constant scale for each feature on them.

    What belongs to a norm that takes its statistics at run time is left to that norm.
    """
    norms = [n for n in find_norms(transfer.facts) if n.recognised and n.kind not in _AFFINE]
    owned = {node for norm in norms for node in norm.nodes}
    sums = {n: s for n, s in find_sums(transfer).items() if not owned.intersection(s.nodes)}
    seen = set(owned)
    order = {n: i for i, n in enumerate(transfer.facts.module.nodes())}
    for node in order:
        if node in seen or node.domain != "" or not node.outputs:
            continue
        layout = scaled_features(node, transfer) if node.inputs else None
        found = None if layout is None else sums.get(node) or read_map(node, layout, transfer)
        if not isinstance(found, Map) or found.scale is None or found.scale.size == 1:
            continue
        region = _Explorer(transfer, Region(found.layout.features), owned, sums).explore(found)
        region.maps.sort(key=lambda m: order[m.node])
        seen.update(n for m in region.maps for n in (m.node, *m.nodes))
        if region.joins:
            yield region


class _Explorer:
    """Finds one region."""

    def __init__(
        self, transfer: Transfer, region: Region, owned: set[Node], sums: dict[Node, Map]
    ) -> None:
        self.transfer = transfer
        self.facts = transfer.facts
        self.region = region
        self.owned = owned
        self.sums = sums
        self.frontier: list[AnyValue] = []
        self.mapped: set[Node] = set()

    def explore(self, first: Map) -> Region:
        self._reach(first.source, first.layout, None)
        self._reach(first.result, first.layout, None)
        while self.frontier:
            value = self.frontier.pop()
            layout = self.region.values[value]
            stop = self._sound(value, layout, None)
            if stop is not None:
                self.region.fixed.setdefault(value, stop)
            if (why := self.facts.pinned(value)) is not None:
                stop = Stop(self.facts.producer(value), f"'{value.name}' is {why}")
                self.region.fixed[value] = stop
            for use in self.facts.uses(value):
                stop = self._sound(value, layout, use)
                if stop is not None:
                    self.region.fixed.setdefault(value, stop)
        return self.region

    def _sound(self, value: AnyValue, layout: Layout, use: Use | None) -> Stop | None:
        """Take in what makes a value, or a reader; what forbids to change it."""
        try:
            if use is None:
                return self._made(value, layout)
            return self._read(value, layout, use.node, use.index)
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
            # Inputs or attributes that its schema forbids.
            node = self.facts.producer(value) if use is None else use.node
            told = "" if node is None else f"{described(node)} is not as its operator is defined"
            return Stop(node, told)

    def _reach(self, value: AnyValue, layout: Layout, tied: AnyValue | None) -> None:
        known = self.region.values.get(value)
        if known is None:
            self.region.values[value] = layout
            self.frontier.append(value)
        elif known != layout:
            told = f"'{value.name}' has its features in two places"
            self.region.fixed.setdefault(value, Stop(self.facts.producer(value), told))
            self.region.torn.add(value)
        if tied is not None:
            self.region.ties.append((tied, value))

    def _made(self, value: AnyValue, layout: Layout) -> Stop | None:
        """Take in what makes a value; what forbids to change it."""
        node = self.facts.producer(value)
        if node is None:
            return Stop(None, f"'{value.name}' comes from outside")
        known = self.facts.type(value)
        if known is not None and known.element and known.element not in REAL:
            return Stop(node, f"'{value.name}' does not hold real numbers")
        if node.domain != "" or node.parametric:
            return Stop(node, f"{described(node)} makes it and is not linear")
        if self._map(node, layout):
            return None
        if node.op in _HOMOGENEOUS | _POOLS:
            return self._homogeneous(node, value, layout)
        if node.op in _NORMS:
            return self._normalized(node, value, layout)
        if (taken := self._linear(node, value, layout)) is not None:
            return None if taken == "" else Stop(node, f"{described(node)} {taken}")
        link = self.transfer.back(node, value, Basis(layout))
        if not isinstance(link, Link) or link.bypass:
            return link if isinstance(link, Stop) else Stop(node, f"{described(node)} makes it")
        if node.op in _SUMS and sum(d.constant is None for d in link.demands) > 1:
            self.region.joins = True
        self.region.links[value] = link
        for demand in link.demands:
            if demand.constant is None:
                self._reach(node.inputs[demand.index], demand.basis.layout, value)
            elif (stop := self._constant(node, value, demand)) is not None:
                return stop
        for output, basis in link.outputs:
            if output is not value:
                self._reach(output, basis.layout, value)
        return None

    def _constant(self, node: Node, value: AnyValue, demand: Demand) -> Stop | None:
        constant = demand.constant
        assert constant is not None, "it is a constant"
        if not is_real(constant.dtype):
            return Stop(node, f"'{constant.name}' is of type {constant.dtype}")
        layout = demand.basis.layout
        if not layout.covers(constant.shape) and node.op not in (*_SUMS, "Where"):
            return Stop(node, f"{described(node)} repeats '{constant.name}' for every feature")
        entry = Writer(value, node, demand.index, constant, None, layout)
        self.region.writers.append(entry)
        return None

    def _known(self, node: Node, layout: Layout) -> Map | str | None:
        """What a node is as an affine map, by itself or as a part of a sum of two."""
        if node in self.owned:
            return None
        whole = self.sums.get(node)
        if whole is not None:
            return whole if whole.layout == layout else "is part of a sum over other features"
        return read_map(node, layout, self.transfer)

    def _map(self, node: Node, layout: Layout) -> bool:
        """Take in a node as an affine map, if it is one."""
        if node in self.mapped:
            return True
        found = self._known(node, layout)
        if not isinstance(found, Map) or self.facts.constant(found.source) is not None:
            return False
        self.mapped.update((node, found.node, *found.nodes))
        self.region.maps.append(found)
        tied = found.result if found.scale is None else None
        self._reach(found.source, layout, tied)
        self._reach(found.result, layout, None)
        return True

    def _homogeneous(self, node: Node, value: AnyValue, layout: Layout) -> Stop | None:
        if node.op in _POOLS:
            rank = self.transfer.rank(value)
            if rank is None or not layout.only_axis(1 - rank) or value is not node.outputs[0]:
                return Stop(node, f"{described(node)} pools over the features")
            if any(v.name for v in node.outputs[1:]):
                return Stop(node, f"{described(node)} computes positions")
        if len(node.inputs) == 1 or node.op in _POOLS:
            self.region.positive.setdefault(value, node)
            self._reach(node.inputs[0], layout, value)
            return None
        for given in node.inputs:
            if self.facts.constant(given) is not None or not self.transfer.covers(given, layout):
                return Stop(node, f"{described(node)} compares it with what has other features")
        self.region.positive.setdefault(value, node)
        for given in node.inputs:
            self._reach(given, layout, value)
        return None

    def _normalized(self, node: Node, value: AnyValue, layout: Layout) -> Stop | None:
        """Take in a norm over the last axis, whose scale and bias make its features."""
        told = Stop(node, f"{described(node)} makes it and has no constant scale for each feature")
        constants = [(i, self.facts.constant(v)) for i, v in enumerate(node.inputs) if i and v.name]
        if value is not node.outputs[0] or not constants or not layout.whole:
            return told
        if not layout.only_axis(-1):
            return told
        for index, constant in constants:
            if constant is None or not is_real(constant.dtype) or not layout.covers(constant.shape):
                return told
            self.region.writers.append(Writer(value, node, index, constant, None, layout))
        return None

    def _linear(self, node: Node, value: AnyValue, layout: Layout) -> str | None:
        """Take in a linear operator whose output features these are.

        Returns:
            "" where it is one, a clause where it is one that cannot be scaled, None for none.
        """
        found = slots(node, self.facts)
        if isinstance(found, str) or not layout.only_axis(found[0].output_axis):
            return None
        size = layout.spread(np.ones(layout.features), 0).size
        first = found[0]
        rows = first.constant.shape[0]
        if first.features() != size or (first.groups > 1 and rows % first.groups):
            return f"has a weight '{first.constant.name}' that does not fit its output"
        if len(found) == 1 and len(node.inputs) > 2 and node.inputs[2].name:
            return None if node.op == "Gemm" else "has a bias that is computed"
        if any(slot.features() not in (1, size) for slot in found):
            return "has a bias that does not fit its output"
        for slot in found:
            entry = Writer(value, node, slot.index, slot.constant, slot, layout)
            self.region.writers.append(entry)
        return ""

    def _read(self, value: AnyValue, layout: Layout, node: Node, index: int) -> Stop | None:
        """Take in what a reader makes of a value; what forbids to change it."""
        if node.domain == "" and node.op in ("Shape", "Size"):
            return None
        if node.scope is not value.scope:
            return Stop(node, f"{described(node)} reads '{value.name}' inside a body")
        if node.domain == "":
            found = intake(node, index, layout, self.transfer)
            if found is not None:
                self.region.intakes.append((value, found))
                return None
            known = self._known(node, layout)
            if isinstance(known, Map) and known.source is value:
                self._map(node, layout)
                return None
            if isinstance(known, str):
                return Stop(node, f"{described(node)} {known}")
            homogeneous = node.op in _HOMOGENEOUS or (node.op in _POOLS and index == 0)
            if homogeneous and node.outputs[0].name:
                self._reach(node.outputs[0], layout, value)
                return None
            link = self.transfer.forth(node, index, Basis(layout))
            if isinstance(link, Link) and not link.bypass:
                for output, basis in link.outputs:
                    self._reach(output, basis.layout, value)
                return None
        return Stop(node, f"{described(node)} reads '{value.name}' and is not linear")
