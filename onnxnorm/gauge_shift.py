"""Where the shift of a map on a stream goes: into the bias of what makes the values in front of it.

    y' = x' + t      x' = u + (v W + b)      ->      y' = x'      b' = b + t

What is read is shifted nowhere then, so it is no matter whether a reader pads. Where a residual sum
reads x' too, as in a network of pre-activations, the branch that is added there takes t back:

    y' = x' + t      z' = x' + (r V + c)     ->      y' = x'      b' = b + t,  c' = c - t

The stream between is then stored with an offset, and its rounding errors grow as it does. So this
is done only where it grows to twice its size at most, in the root mean square over the features of
what the statistics of the norm tell of it. All vectors here are in the units in which values are
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import numpy as np

from onnxnorm.affine_maps import Map, Vector
from onnxnorm.constant_edits import ConstantEdits
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.gauge_region import Region, Writer
from onnxnorm.module import Node
from onnxnorm.norm_operators import DEFAULT_EPSILON
from onnxnorm.port import filled_bias
from onnxnorm.transfer import Demand, Stop, described

# What a shift goes through unchanged, feature by feature.
_MOVES: Final = frozenset(
    {"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_CARRIES: Final = _MOVES | {"GlobalMaxPool", "MaxPool"}  # max (x + t) = max (x) + t, also padded
_TABLES: Final = frozenset({"Expand", "Gather"})  # each entry of the result is one of the table
_SUMS: Final = frozenset({"Add", "Sub", "Sum"})
_GROWTH: Final = 2.0  # what parity allows the error of a run to grow by

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
            found = self._placed(step.source, shift, (*step.nodes, step.node), self._large(step))
        if isinstance(found, Stop):
            assert shift is not None, "a scale alone goes"
            self.adds[step], self.stops[step] = shift, found
            return
        for place in found:
            place()
        self.gone.append(step)

    def _large(self, step: Map) -> str | None:
        """Why the stream in front of a map is not stored with its shift; None where it may be."""
        if step.nodes or step.node.op != "BatchNormalization":
            return "no statistics tell its size"
        mean, variance = (self.facts.constant(v) for v in step.node.inputs[3:5])
        assert mean is not None, "its affine is known"
        assert variance is not None, "its affine is known"
        assert step.scale is not None, "it has one"
        assert step.shift is not None, "it has one"
        center, spread = mean.float64(), variance.float64()
        spread = spread + float(step.node.attrs.get("epsilon", DEFAULT_EPSILON))
        after = (center + step.shift / step.scale) ** 2 + spread
        growth = float(np.sqrt((after / (center**2 + spread)).mean()))
        return None if growth <= _GROWTH else f"it would be stored {growth:.3g} times as large"

    def _placed(
        self, value: AnyValue, shift: Vector, readers: tuple[Node, ...], large: str | None = ""
    ) -> Placing | Stop:
        """How to shift a value for its readers alone; what stands in the way.

        Args:
            value: The value.
            shift: The shift.
            readers: Those who are to see it.
            large: Why others, who would take the shift back, may not read it; None where they may.
        """
        placing: Placing = []
        while True:
            if value in self.region.torn:
                return Stop(self.facts.producer(value), f"'{value.name}' has two layouts")
            others = self._balanced(value, shift, readers, large)
            if isinstance(others, Stop):
                return others
            placing += others
            node = self.facts.producer(value)
            if node is None:
                return Stop(None, f"'{value.name}' comes from outside")
            step = self._maps.get(node)
            if step is None or step not in self.gone:
                break
            value, readers, large = step.source, (*step.nodes, step.node), ""
        if step is None:
            found = self._made(value, node, shift, large)
        elif step in self.adds:
            found = [partial(self._add, step, shift)]
        else:
            found = self._beside(step, shift)
        return found if isinstance(found, Stop) else [*placing, *found]

    def _made(
        self, value: AnyValue, node: Node, shift: Vector, large: str | None
    ) -> Placing | Stop:
        """How what makes a value shifts it."""
        link = self.region.links.get(value)
        if link is None:
            return self._into(value, node, shift)
        if node.op in _SUMS:
            return self._summed(node, link.demands, shift)
        first = link.demands[0]
        if node.op in _TABLES and first.constant is not None:
            return [self._onto(node, first, shift)]
        if node.op in _MOVES:
            return self._placed(node.inputs[0], shift, (node,), large)
        return Stop(node, f"{described(node)} takes no shift")

    def _balanced(
        self, value: AnyValue, shift: Vector, readers: tuple[Node, ...], large: str | None
    ) -> Placing | Stop:
        """How all other readers of a value that is shifted take the shift back."""
        if (why := self.facts.pinned(value)) is not None:
            return Stop(self.facts.producer(value), f"'{value.name}' is {why}")
        placing: Placing = []
        uses = [u.node for u in self.facts.uses(value) if u.node.op not in ("Shape", "Size")]
        for node in uses:
            if node in readers and (len(readers) > 1 or uses.count(node) == 1):
                continue
            told = f"{described(node)} reads '{value.name}' too"
            if large == "" or not self._passes(node):
                return Stop(node, told)
            found = large or self._back(node, value, shift)
            if isinstance(found, str):
                return Stop(node, f"{told}, and {found}")
            placing += found
        return placing

    def _passes(self, node: Node) -> bool:
        """Whether a reader passes the stream on, with any shift of it."""
        if node.domain != "" or node in self._maps:
            return False
        if node.op in _SUMS:
            return node.outputs[0] in self.region.links
        result = node.outputs[0]
        known = result in self.region.values and result not in self.region.fixed
        return known and node.op in _CARRIES

    def _back(self, node: Node, value: AnyValue, shift: Vector) -> Placing | str:
        """How a reader of the stream, or what reads its result, takes a shift back."""
        result = node.outputs[0]
        if result in self.region.torn:
            return f"'{result.name}' has two layouts"
        if node.op in _CARRIES:
            found = self._balanced(result, shift, (), None)
        else:
            demands = self.region.links[result].demands
            own = [d.index for d in demands if node.inputs[d.index] is value]
            if len(own) != 1:
                return "adds it twice"
            shift = -shift if node.op == "Sub" and own[0] == 1 else shift
            found = self._summed(node, tuple(d for d in demands if d.index != own[0]), -shift)
        return found.why if isinstance(found, Stop) else found

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
        filled = filled_bias(node, own[0].slot, vector)
        if isinstance(filled, str):
            return Stop(node, f"{described(node)} {filled}")
        return [partial(self.edits.shift, node, 2, None, filled, own[0].constant.dtype)]
