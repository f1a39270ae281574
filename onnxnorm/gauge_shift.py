"""Where the shift of a map on a stream goes: into the bias of what makes the values in front of it.

    y' = x' + t      x' = u + (v W + b)      ->      y' = x'      b' = b + t

What is read is shifted nowhere then, so it is no matter whether a reader pads. A value that others
read too is not shifted. All vectors here are in the units in which values are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from onnxnorm.affine_maps import Map, Vector
from onnxnorm.constant_edits import ConstantEdits
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.gauge_region import Region, Writer
from onnxnorm.module import Node
from onnxnorm.transfer import Demand, Stop, described

# What a shift goes through unchanged, feature by feature.
_MOVES: Final = frozenset(
    {"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_TABLES: Final = frozenset({"Expand", "Gather"})  # each entry of the result is one of the table
_SUMS: Final = frozenset({"Add", "Sub", "Sum"})
_BIASED: Final = {"Conv": 1, "ConvTranspose": 1, "Gemm": 11}  # the opset from which it may lack one

Placing: TypeAlias = "list[Callable[[], None]]"  # what to do for a shift that has a place


class Shifts:
    """What becomes of the shifts of the maps of one region.

    Args:
        region: The region.
        facts: What is true of the graph.
        edits: The constants of the site.

    Attributes:
        gone: The maps that nothing is left of.
        adds: The maps that still add something, with what.
        stops: What keeps it there.
    """

    def __init__(self, region: Region, facts: Facts, edits: ConstantEdits) -> None:
        self.region = region
        self.facts = facts
        self.edits = edits
        self.gone: list[Map] = []
        self.adds: dict[Map, Vector] = {}
        self.stops: dict[Map, Stop] = {}
        self._maps = {node: s for s in region.maps for node in (s.node, *s.nodes)}
        self._writers: dict[AnyValue, list[Writer]] = {}
        for writer in region.writers:
            self._writers.setdefault(writer.value, []).append(writer)

    def settle(self, step: Map, shift: Vector | None) -> None:
        """Place the shift that is left of a map whose scale goes; in the order of computation."""
        found: Placing | Stop = []
        if (why := self.facts.pinned(step.result)) is not None:
            found = Stop(step.node, f"'{step.result.name}' is {why}")
        elif shift is not None:
            found = self._placed(step.source, shift, (*step.nodes, step.node))
        if isinstance(found, Stop):
            assert shift is not None, "a scale alone goes"
            self.adds[step], self.stops[step] = shift, found
            return
        for place in found:
            place()
        self.gone.append(step)

    def _placed(self, value: AnyValue, shift: Vector, readers: tuple[Node, ...]) -> Placing | Stop:
        """How to shift a value for its readers; what stands in the way."""
        while True:
            node = self.facts.producer(value)
            if (stop := self._unshared(value, readers)) is not None:
                return stop
            if node is None:
                return Stop(None, f"'{value.name}' comes from outside")
            step = self._maps.get(node)
            if step is None:
                break
            if step in self.adds:
                return [partial(self._add, step, shift)]
            if step not in self.gone:
                return self._beside(step, shift)
            value, readers = step.source, (*step.nodes, step.node)
        link = self.region.links.get(value)
        if link is None:
            return self._into(value, node, shift)
        if node.op in _SUMS:
            return self._summed(node, link.demands, shift)
        first = link.demands[0]
        if node.op in _TABLES and first.constant is not None:
            return [self._onto(node, first, shift)]
        if node.op in _MOVES:
            return self._placed(node.inputs[0], shift, (node,))
        return Stop(node, f"{described(node)} takes no shift")

    def _unshared(self, value: AnyValue, readers: tuple[Node, ...]) -> Stop | None:
        """Who else sees a value."""
        if (why := self.facts.pinned(value)) is not None:
            return Stop(self.facts.producer(value), f"'{value.name}' is {why}")
        uses = [u.node for u in self.facts.uses(value) if u.node.op not in ("Shape", "Size")]
        for at, node in enumerate(uses):
            if node not in readers or (len(readers) == 1 and at > 0):
                return Stop(node, f"{described(node)} reads '{value.name}' too")
        return None

    def _add(self, step: Map, shift: Vector) -> None:
        self.adds[step] = self.adds[step] + shift

    def _onto(self, node: Node, demand: Demand, shift: Vector) -> Callable[[], None]:
        constant = demand.constant
        assert constant is not None, "it is a constant"
        spread = demand.basis.layout.spread(shift, len(constant.shape))
        return partial(self.edits.shift, node, demand.index, constant, spread)

    def _summed(self, node: Node, demands: tuple[Demand, ...], shift: Vector) -> Placing | Stop:
        """One operand of a sum takes it: a constant, else one that nobody else reads."""
        alone = self.facts.alone

        def near(demand: Demand) -> int:
            return 0 if demand.constant is not None else 1 + (not alone(node.inputs[demand.index]))

        first: Stop | None = None
        for demand in sorted(demands, key=near):
            signed = -shift if node.op == "Sub" and demand.index == 1 else shift
            if demand.constant is not None:
                return [self._onto(node, demand, signed)]
            found = self._placed(node.inputs[demand.index], signed, (node,))
            if not isinstance(found, Stop):
                return found
            first = first or found
        return first or Stop(node, f"{described(node)} takes no shift")

    def _beside(self, step: Map, shift: Vector) -> Placing | Stop:
        """The bias of a map that stays."""
        operator = not step.nodes and step.node.op == "BatchNormalization"
        bias = self.facts.constant(step.node.inputs[2]) if operator else None
        if bias is None:
            return Stop(step.node, f"{described(step.node)} stays and has no bias")
        return [partial(self.edits.shift, step.node, 2, bias, shift)]

    def _into(self, value: AnyValue, node: Node, shift: Vector) -> Placing | Stop:
        """The bias of the linear operator that makes a value."""
        own = [w for w in self._writers.get(value, ()) if w.slot is not None]
        if not own or own[0].slot is None:
            return Stop(node, f"{described(node)} makes '{value.name}' and takes no shift")
        vector = own[0].layout.spread(shift, 0).reshape(-1)
        for writer in own:
            slot = writer.slot
            if slot is not None and slot.bias:
                if slot.gain == 0.0:
                    return Stop(node, f"{described(node)} takes its bias times 0")
                spread = slot.spread(vector) / slot.gain
                return [partial(self.edits.shift, node, slot.index, slot.constant, spread)]
        if node.scope.opsets[""] < _BIASED.get(node.op, 1 << 30):
            return Stop(node, f"{described(node)} has no bias")
        if node.op == "Gemm":
            gain = float(node.attrs.get("beta", 1.0))
            if gain == 0.0:
                return Stop(node, f"{described(node)} takes its bias times 0")
            vector = vector.reshape(-1, *(1,) * (-own[0].slot.output_axis - 1)) / gain
        return [partial(self.edits.shift, node, 2, None, vector, own[0].constant.dtype)]
