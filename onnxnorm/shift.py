"""Where a constant added to a value can go: into biases that are there already.

    (n + beta) W + b  =  n W + (b + beta W)          n + beta + (z + b)  =  n + (z + (b + beta))
    softmax(Q (K + 1 t^T)^T)  =  softmax(Q K^T)

The shift of a norm is followed through operators that leave it what it is (`Reshape`, `Transpose`,
`Slice`, a mean over tokens ...) to every reader. All of them have to take it: linear operators with
a bias, additions of something that has one, and keys of attention, where what is the same for every
key is the same for every entry of a row and softmax does not see it. Only vectors are changed, no
weight is copied. Exact over the reals; beta W is formed in float64 and rounded once, with the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxnorm.einsum import Equation
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.layout import Layout, Part
from onnxnorm.module import Node
from onnxnorm.port import Inlet, bias_of, is_real
from onnxnorm.transfer import Basis, Link, Transfer, described

# Operators that give every feature the shift it had: they move, or average with weights of sum 1.
_KEEPS = frozenset(
    {
        "Identity", "Cast", "CastLike", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
        "Transpose", "Slice", "Gather", "Split", "ReduceMean", "GlobalAveragePool", "Expand",
        "Tile", "Concat", "GatherND",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Sink:
    """A bias that takes the shift.

    Attributes:
        node: The node whose input it is.
        index: Which input.
        bias: The bias as it is; None where the slot is empty.
        inlet: The weight it goes through; None where it is added as it is.
        layout: Where the shifted features are in front of the weight, or in the bias.
        gain: The factor with which the operator takes its bias.
        factor: What the shift was multiplied by on the way.
    """

    node: Node
    index: int
    bias: Constant | None
    inlet: Inlet | None
    layout: Layout
    gain: float = 1.0
    factor: float = 1.0

    def shift(self, beta: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the bias has to grow by, in float64."""
        spread = self.layout.spread(beta, 0) * self.factor
        grown = spread if self.inlet is None else self.inlet.through(spread)
        return grown / self.gain


@dataclass(frozen=True)
class Sinks:
    """All that takes the shift of one value.

    Attributes:
        places: The biases.
        between: The nodes whose results lose the shift, from the value to the biases.
        unseen: Results of what does not see the shift.
    """

    places: tuple[Sink, ...] = ()
    between: tuple[Node, ...] = ()
    unseen: tuple[AnyValue, ...] = ()


def sinks(value: AnyValue, layout: Layout, transfer: Transfer) -> Sinks | str:
    """The biases that take a shift of `value` on the features in `layout`; else who cannot."""
    facts = transfer.facts
    pending: dict[AnyValue, tuple[Layout, float]] = {value: (layout, 1.0)}
    frontier, waiting, found = [value], dict[Node, set[int]](), list[Sink]()
    between: dict[Node, None] = {}
    unseen: dict[AnyValue, None] = {}
    while frontier:
        at = frontier.pop()
        here, factor = pending[at]
        if (why := facts.pinned(at)) is not None:
            return f"'{at.name}' is {why}"
        for use in facts.uses(at):
            node = use.node
            if node.op in ("Shape", "Size") and node.domain == "":
                continue
            if node.op == "Concat" and node.domain == "":
                waiting.setdefault(node, set()).add(use.index)
                if len(waiting[node]) < len(node.inputs):
                    continue
            sink = _sink(node, use.index, here, transfer)
            if isinstance(sink, Sink):
                found.append(replace(sink, factor=factor))
                if node is not sink.node:
                    between[node] = None
                continue
            blind = keys(node, use.index, here, transfer)
            if blind is not None:
                between.update(dict.fromkeys(blind))
                unseen.update(dict.fromkeys(n.outputs[0] for n in blind if n.op in UNSEEN))
                continue
            by = _scalar(node, use.index, facts)
            if by is not None:
                between[node] = None
                output = node.outputs[0]
                pending[output] = (here, factor * by)
                frontier.append(output)
                continue
            if node.domain != "" or not (node.op in _KEEPS or _pads_nothing(node, transfer)):
                return sink
            link = transfer.forth(node, use.index, Basis(here))
            if not isinstance(link, Link) or link.bypass:
                return f"{described(node)} reads the result"
            if any(d.constant is not None for d in link.demands):
                return f"{described(node)} joins the result with constants"
            between[node] = None
            for output, basis in link.outputs:
                if pending.setdefault(output, (basis.layout, factor)) != (basis.layout, factor):
                    return f"{described(node)} reads the result in two ways"
                frontier.append(output)
    for node, seen in waiting.items():
        if len(seen) < len(node.inputs):
            return f"{described(node)} joins the result with other values"
    return Sinks(tuple(found), tuple(between), tuple(unseen))


def _scalar(node: Node, index: int, facts: Facts) -> float | None:
    """The constant number that a node multiplies its input by, as LayerNorm Scaling has it."""
    if node.domain != "" or node.op not in ("Mul", "Div") or (node.op == "Div" and index != 0):
        return None
    constant = facts.constant(node.inputs[1 - index])
    if constant is None or not is_real(constant.dtype):
        return None
    if any(n != 1 for n in constant.shape):
        return None
    number = float(constant.float64().reshape(-1)[0])
    if node.op == "Div":
        return None if number == 0.0 else 1.0 / number
    return number


_SOFTMAX = frozenset({"Softmax", "LogSoftmax"})
UNSEEN = _SOFTMAX | {"Attention"}


def keys(node: Node, index: int, layout: Layout, transfer: Transfer) -> list[Node] | None:
    """The nodes from a linear layer without a bias to the softmax that does not see its shift.

    The layer makes keys, one in each row: K + 1 t^T. The shift is the same along the axis of the
    rows wherever that goes. When Q K^T has it last, it is the same along every row of scores, and
    stays so when anything is added and when a row is multiplied by one number.
    """
    facts = transfer.facts
    inlet = Inlet.of(node, index, facts)
    if isinstance(inlet, str) or node.op not in ("MatMul", "Einsum") or not inlet.takes(layout):
        return None
    tried = (_keys(node, axis, transfer) for axis in inlet.rows)
    return next((nodes for nodes in tried if nodes is not None), None)


def _keys(node: Node, rows: int, transfer: Transfer) -> list[Node] | None:
    """The same, for keys along one axis of the layer's result."""
    facts = transfer.facts
    nodes: dict[Node, None] = {node: None}
    # A value, and the axis of the keys in it; None for scores, where it is the last.
    frontier: list[tuple[AnyValue, int | None]] = [(node.outputs[0], rows)]
    while frontier:
        value, axis = frontier.pop()
        if facts.pinned(value) is not None or len(nodes) > _FAR:
            return None
        for use in facts.uses(value):
            reader = use.node
            if reader.domain != "":
                return None
            if reader.op in ("Shape", "Size"):
                continue
            following = (
                _along_rows(reader, use.index, transfer)
                if axis is None
                else _along_keys(reader, use.index, axis, transfer)
            )
            if following is None:
                return None
            nodes[reader] = None
            frontier += following
    return list(nodes) if any(n.op in UNSEEN for n in nodes) else None


_FAR = 40  # nodes; attention is shorter
_CARRIES = frozenset(
    {
        "Identity", "Cast", "CastLike", "Dropout", "Reshape", "Squeeze", "Unsqueeze", "Transpose",
        "Slice", "Gather",
    }
)  # fmt: skip


def _along_keys(
    node: Node, index: int, axis: int, transfer: Transfer
) -> list[tuple[AnyValue, int | None]] | None:
    """What a reader makes of shifted keys: the same, or shifted scores; None for neither."""
    sizes, output = transfer.sizes, node.outputs[0]
    if node.op == "MatMul":
        return [(output, None)] if index == 1 and axis == -1 else None
    if node.op == "Einsum":
        equation = Equation.of(node)
        carried = None if equation is None else equation.carried([axis], index)
        if carried is None:
            return None
        scores = len(node.inputs) > 1 and carried[1] == [-1]
        return [(output, None if scores else carried[1][0])]
    if node.op == "Attention":
        # The keys are its second input. Earlier keys have no shift; tanh of the scores sees it; and
        # further outputs are the keys and the scores.
        earlier = len(node.inputs) > 4 and any(v.name for v in node.inputs[4:])
        told = any(v.name for v in node.outputs[1:])
        capped = node.parameter("softcap") is not None or node.attrs.get("softcap", 0.0) != 0.0
        return [] if index == 1 and axis == -2 and not (earlier or told or capped) else None
    if node.op == "Mul" or (node.op == "Div" and index == 0):
        return [(output, axis)] if sizes.dim(node.inputs[1 - index], axis) == 1 else None
    if node.op == "Expand" and index == 0:
        size = sizes.dim(node.inputs[0], axis)
        return [(output, axis)] if size is not None and sizes.dim(output, axis) == size else None
    if node.op not in _CARRIES or index != 0:
        return None
    size = sizes.dim(node.inputs[0], axis)
    # An unknown size can be followed where the axis stays whole, and not further.
    moved = transfer.moved(node, Layout((Part(axis, size if isinstance(size, int) else -1),)))
    if isinstance(moved, str) or len(moved.parts) != 1 or not moved.parts[0].whole:
        return None
    return [(output, moved.parts[0].axis)]


def _along_rows(
    node: Node, index: int, transfer: Transfer
) -> list[tuple[AnyValue, int | None]] | None:
    """What a reader makes of rows that are shifted: such rows, or nothing; None for neither."""
    if node.op in _SOFTMAX:
        rank = transfer.rank(node.inputs[0])
        old = node.scope.opsets[""] < 13
        axis = int(node.attrs.get("axis", 1 if old else -1)) if not node.parameter("axis") else 0
        last = axis == -1 or (rank is not None and axis == rank - 1)
        return [] if last else None
    if node.op == "Add" or node.op in ("Identity", "Cast", "Dropout"):
        return [(node.outputs[0], None)]
    if node.op in ("Mul", "Div", "Sub") and (index == 0 or node.op == "Mul"):
        same = node.op == "Sub" or transfer.sizes.dim(node.inputs[1 - index], -1) == 1
        return [(node.outputs[0], None)] if same else None
    return None


def _pads_nothing(node: Node, transfer: Transfer) -> bool:
    """Whether a node is a Pad by zero on every side, as exporters write for windows that fit."""
    pads = transfer.numbers(node, 1, "pads") if node.op == "Pad" else None
    return pads is not None and not any(pads)


def _sink(node: Node, index: int, layout: Layout, transfer: Transfer) -> Sink | str:
    facts = transfer.facts
    if node.domain == "" and node.op == "Add" and len(node.inputs) == 2:
        return _beside(node, index, layout, facts)
    inlet = Inlet.of(node, index, facts)
    if isinstance(inlet, str):
        return f"{described(node)} reads the result, and {inlet}"
    if not inlet.takes(layout):
        return f"{described(node)} reads the result along another axis"
    if 0 in inlet.weight.shape:
        return f"{described(node)} has no features"
    place = bias_of(node, facts)
    if isinstance(place, str):
        return f"{described(node)} {place}"
    return Sink(place.node, place.index, place.constant, inlet, layout, place.gain)


def _beside(node: Node, index: int, layout: Layout, facts: Facts) -> Sink | str:
    """The bias of what is added to the value."""
    other = node.inputs[1 - index]
    told = f"{described(node)} adds the result to something without a bias of its own"
    constant = facts.constant(other)
    if constant is not None:
        return Sink(node, 1 - index, constant, None, layout) if _adds(constant, layout) else told
    producer = _sole(other, facts)
    while producer is not None and producer.op in ("Identity", "Dropout"):
        producer = _sole(producer.inputs[0], facts)
    if producer is None:
        return told
    if producer.op == "Add":
        for at in (0, 1):
            constant = facts.constant(producer.inputs[at])
            if constant is not None and _adds(constant, layout):
                return Sink(producer, at, constant, None, layout)
        return told
    if producer.op in ("Gemm", "Conv", "ConvTranspose"):
        place = bias_of(producer, facts)
        rank = None if producer.op == "Gemm" else len(_shape(producer, facts))
        if isinstance(place, str) or not layout.only_axis(-1 if rank is None else 1 - rank):
            return told
        flat = layout if rank is None else layout.shifted(rank - 2)
        return Sink(place.node, place.index, place.constant, None, flat, place.gain)
    return told


def _sole(value: AnyValue, facts: Facts) -> Node | None:
    """The node that computes a value which one place alone reads."""
    if not facts.alone(value):
        return None
    producer = facts.producer(value)
    return None if producer is None or producer.domain != "" else producer


def _shape(node: Node, facts: Facts) -> tuple[int, ...]:
    weight = facts.constant(node.inputs[1])
    return () if weight is None else weight.shape


def _adds(constant: Constant, layout: Layout) -> bool:
    """Whether a constant that is added can take the shift without changing what it is added to."""
    return is_real(constant.dtype) and (
        layout.covers(constant.shape) or layout.misses(constant.shape)
    )
