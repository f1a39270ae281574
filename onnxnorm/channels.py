"""Channels that are coupled: which channels of which values can only be removed together.

    y = relu(x), x + z, x * z, pool(x)        channel c of y with channel c of x and of z
    y = x W + b                               of x and of y by themselves: columns and rows of W
    y = concat(x, z)                          the first channels of y with x, the rest with z

Every channel of every value that is reached has a label; what is coupled has one and the same. A
label that a node reads in another way, or that the graph gives out, is blocked, with that node as
the reason. For every channel it is also found whether it is one constant at all positions, from
weights that are all zero on. A channel may go when, wherever a linear operator reads its label, it
is constant, so that the bias takes what it adds, or the weight for it is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxnorm.affine_maps import Map, read_map
from onnxnorm.facts import AnyValue, Constant
from onnxnorm.gauge_region import Intake, intake
from onnxnorm.layout import Layout, Part
from onnxnorm.module import Node
from onnxnorm.port import LINEAR, REAL, is_real, pads, slots
from onnxnorm.statics import evaluate
from onnxnorm.transfer import Basis, Link, Stop, Transfer, described

Labels: TypeAlias = NDArray[np.int64]
Vector: TypeAlias = NDArray[np.float64]

# Operators that treat every entry by itself, with broadcasting.
_ELEMENTWISE: Final = frozenset(
    {"Abs", "Add", "Cast", "Celu", "Clip", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu",
     "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mish",
     "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
     "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where"}
)  # fmt: skip
_POOLS: Final = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
_PER_CHANNEL: Final = {"BatchNormalization": 4, "InstanceNormalization": 2}  # parameters, from 1 on
_MOVES: Final = frozenset(
    {"Expand", "Flatten", "Gather", "Pad", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Slice",
     "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)  # fmt: skip
_TARGETS: Final = {"Expand": 1, "Reshape": 1, "Resize": 3}  # inputs that name shapes


@dataclass(frozen=True, eq=False)
class Track:
    """The channels of one value.

    Attributes:
        axis: Their axis, from the right.
        labels: One label for each.
    """

    axis: int
    labels: Labels

    @property
    def layout(self) -> Layout:
        """The axis as a layout."""
        return Layout((Part(self.axis, self.labels.size),))


@dataclass(frozen=True, eq=False)
class Cut:
    """A constant that has an axis of channels.

    Attributes:
        constant: The constant.
        axis: The axis, from the right.
        labels: Its channels.
    """

    constant: Constant
    axis: int
    labels: Labels


@dataclass(frozen=True, eq=False)
class Target:
    """A constant list of numbers, some of which count channels.

    Attributes:
        numbers: The list.
        counts: By place, the channels that a number counts, and how many entries each has.
    """

    numbers: tuple[int, ...]
    counts: dict[int, tuple[Labels, int]]

    def kept(self, gone: NDArray[np.bool_]) -> list[int]:
        """The list when the channels of some labels are gone."""
        found = list(self.numbers)
        for at, (labels, factor) in self.counts.items():
            if gone[labels].any():
                found[at] = int((~gone[labels]).sum()) * factor
        return found


@dataclass(eq=False)
class Coupling:
    """All channels that hang together, and what has to change when some of them go.

    Attributes:
        tracks: The values.
        nodes: The nodes that make or read them.
        readers: The weights that contract channels, with the value they read.
        cuts: The constants with an axis of channels, by node and input.
        targets: The constant shapes, sizes and bounds, by node and input.
        depthwise: Convolutions whose number of groups is that of these channels.
    """

    tracks: dict[AnyValue, Track] = field(default_factory=dict)
    nodes: dict[Node, None] = field(default_factory=dict)
    readers: list[tuple[AnyValue, Intake]] = field(default_factory=list)
    cuts: dict[tuple[Node, int, int], Cut] = field(default_factory=dict)
    targets: dict[tuple[Node, int], Target] = field(default_factory=dict)
    depthwise: dict[Node, Labels] = field(default_factory=dict)
    _ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    _blocks: list[tuple[Labels, Stop]] = field(default_factory=list)
    _count: int = 0

    def fresh(self, size: int) -> Labels:
        """New labels."""
        self._count += size
        return np.arange(self._count - size, self._count)

    def tie(self, one: Labels, other: Labels) -> None:
        """Couple channels one by one."""
        self._ties.append((one, other))

    def block(self, labels: Labels, stop: Stop) -> None:
        """Say that channels have to stay."""
        self._blocks.append((labels, stop))

    def merged(self) -> Labels:
        """For every label the least one that it is coupled with."""
        least = np.arange(self._count)
        while True:
            before = least.copy()
            for one, other in self._ties:
                both = np.minimum(least[one], least[other])
                for side in (one, other):
                    np.minimum.at(least, least[side], both)
                    np.minimum.at(least, side, both)
            least = least[least]
            if bool((least == before).all()):
                return least

    def blocked(self, merged: Labels) -> dict[int, Stop]:
        """The merged labels that have to stay, each with the first reason."""
        found: dict[int, Stop] = {}
        for labels, stop in self._blocks:
            for label in np.unique(merged[labels]):
                found.setdefault(int(label), stop)
        return found


def find_coupling(value: AnyValue, axis: int, transfer: Transfer) -> Coupling | None:
    """Everything that hangs together with the channels of one value; None for unknown sizes."""
    return _Explorer(transfer).explore(value, axis)


class _Explorer:
    """Finds one coupling."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.facts = transfer.facts
        self.sizes = transfer.sizes
        self.found = Coupling()
        self.frontier: list[AnyValue] = []

    def explore(self, value: AnyValue, axis: int) -> Coupling | None:
        if self.reach(value, axis) is None:
            return None
        while self.frontier:
            at = self.frontier.pop()
            track = self.found.tracks[at]
            node = self.facts.producer(at)
            if (why := self.facts.pinned(at)) is not None:
                self.found.block(track.labels, Stop(node, f"'{at.name}' is {why}"))
            if node is None:
                self.found.block(track.labels, Stop(None, f"'{at.name}' comes from outside"))
            else:
                self._visit(node, -1, at, track)
            for use in self.facts.uses(at):
                if use.node.scope is not at.scope:
                    told = f"{described(use.node)} reads '{at.name}' inside a body"
                    self.found.block(track.labels, Stop(use.node, told))
                else:
                    self._visit(use.node, use.index, at, track)
        return self.found

    def reach(self, value: AnyValue, axis: int, labels: Labels | None = None) -> Labels | None:
        """Take in a value; None where the number of its channels is not known."""
        known = self.found.tracks.get(value)
        size = self.sizes.dim(value, axis)
        if known is None:
            if (
                not isinstance(size, int)
                or size < 1
                or (labels is not None and labels.size != size)
            ):
                return None
            known = Track(axis, self.found.fresh(size) if labels is None else labels)
            self.found.tracks[value] = known
            self.frontier.append(value)
        elif known.axis != axis or (labels is not None and labels.size != known.labels.size):
            told = f"'{value.name}' has channels on two axes"
            stop = Stop(self.facts.producer(value), told)
            self.found.block(known.labels, stop)
            if labels is not None:
                self.found.block(labels, stop)
            return known.labels if known.axis == axis else None
        elif labels is not None:
            self.found.tie(labels, known.labels)
        return known.labels

    def _visit(self, node: Node, index: int, value: AnyValue, track: Track) -> None:
        """Couple what one node makes of a value (index -1: of its result)."""
        self.found.nodes[node] = None
        if node.domain == "" and not node.parametric:
            rule = _RULES.get(node.op)
            try:
                said = (
                    "treats all channels together"
                    if rule is None
                    else rule(self, node, index, track)
                )
            except (IndexError, TypeError, ValueError, KeyError):  # not as its schema says
                said = "is not as its operator is defined"
        else:
            said = "is not known here"
        if said:
            what = described(node)
            verb = f"makes '{value.name}', and it" if index < 0 else f"reads '{value.name}', and it"
            self.found.block(track.labels, Stop(node, f"{what} {verb} {said}"))

    # ** what the rules use **

    def couple(self, node: Node, value: AnyValue, axis: int, labels: Labels) -> str:
        """Couple a value, constant or not, on the same channels; or on one channel for all."""
        constant = self.facts.constant(value)
        if constant is not None:
            shape = constant.shape
            if len(shape) < -axis or shape[axis] == 1:
                return ""
            if shape[axis] != labels.size:
                return f"takes '{value.name}' with another number of channels"
            for index, given in enumerate(node.inputs):
                if given is value:
                    self.found.cuts[node, index, axis] = Cut(constant, axis, labels)
            return ""
        size = self.sizes.dim(value, axis)
        if size == 1 and labels.size != 1:
            return ""
        told = f"takes '{value.name}' with an unknown number of channels"
        return "" if self.reach(value, axis, labels) is not None else told

    def output(self, node: Node, axis: int) -> Labels | None:
        """The labels of a node's first output."""
        return self.reach(node.outputs[0], axis)


def _elementwise(e: _Explorer, node: Node, index: int, track: Track) -> str:
    if any(v.name for v in node.outputs[1:]):
        return "has a second result"
    labels = e.output(node, track.axis)
    if labels is None:
        return "has a result of unknown size"
    if labels.size != track.labels.size:
        return "repeats one value for all channels"
    for given in node.inputs:
        if given.name and (told := e.couple(node, given, track.axis, labels)):
            return told
    return ""


def _spatial(e: _Explorer, node: Node, axis: int) -> bool:
    """Whether an axis is the one of channels, behind the batch."""
    rank = e.transfer.rank(node.outputs[0])
    return rank is not None and axis == 1 - rank


def _per_channel(e: _Explorer, node: Node, index: int, track: Track) -> str:
    """Norms with parameters for each channel, and pools."""
    if any(v.name for v in node.outputs[1:]) or index > 0:
        return "has a second result"
    if not _spatial(e, node, track.axis):
        return "works along the channels"
    if node.attrs.get("training_mode", 0):
        return "takes its statistics from the batch"
    labels = e.output(node, track.axis)
    if labels is None or e.reach(node.inputs[0], track.axis, labels) is None:
        return "has a result of unknown size"
    for at in range(1, _PER_CHANNEL.get(node.op, 0) + 1):
        constant = e.facts.constant(node.inputs[at])
        if constant is None or constant.shape != (labels.size,):
            return "has parameters that are computed"
        e.found.cuts[node, at, -1] = Cut(constant, -1, labels)
    return ""


def _moves(e: _Explorer, node: Node, index: int, track: Track) -> str:
    if index > 0:
        return "takes it as a size"
    source, result = node.inputs[0], node.outputs[0]
    known = track if index == 0 else e.found.tracks.get(source)
    if known is None:  # from the result back
        link = e.transfer.back(node, result, Basis(track.layout))
        if not isinstance(link, Link):
            return "moves channels and other axes together"
        layout = link.demands[0].basis.layout
        if len(layout.parts) != 1 or not layout.whole:
            return "moves channels and other axes together"
        if e.facts.constant(source) is not None:
            return e.couple(node, source, layout.parts[0].axis, track.labels)
        labels = e.reach(source, layout.parts[0].axis, track.labels)
        if labels is None:
            return "has an input of unknown size"
        known = e.found.tracks[source]
    moved = e.transfer.moved(node, known.layout)
    if isinstance(moved, str) or len(moved.parts) != 1:
        return "moves channels and other axes together"
    part = moved.parts[0]
    labels = np.tile(np.repeat(known.labels, part.inner), part.outer)
    if part.extent != labels.size or e.reach(result, part.axis, labels) is None:
        return "has a result of unknown size"
    return _retarget(e, node, part, known.labels)


def _retarget(e: _Explorer, node: Node, part: Part, labels: Labels) -> str:
    """Note the shape that names the number of channels."""
    at = _TARGETS.get(node.op, 0)
    if not at or len(node.inputs) <= at or not node.inputs[at].name:
        return ""
    if node.op == "Reshape" and node.attrs.get("allowzero", 0):
        return "has a shape that allows 0"
    if node.op == "Resize" and "axes" in node.attrs:
        return "has sizes for some axes"
    entries = e.sizes.entries(node.inputs[at])
    if entries is None or entries.ndim != 1:
        return "has a shape that is computed"
    if entries.size < -part.axis:  # the channels have no place in it: they are broadcast
        return "" if node.op == "Expand" else "has a shape that does not name the channels"
    stated = entries[part.axis]
    if (node.op == "Reshape" and stated in (0, -1)) or (node.op == "Expand" and stated == 1):
        return ""
    dims = e.sizes.integers(node.inputs[at])
    if dims is None or e.facts.constant(node.inputs[at]) is None:
        return "has a shape that is computed"
    count = (labels, part.inner * part.outer)
    e.found.targets[node, at] = Target(tuple(dims), {len(dims) + part.axis: count})
    return ""


def _along(e: _Explorer, node: Node, axis: int) -> bool | None:
    """Whether a Split or Slice cuts along the channels; None where that is not known."""
    if node.op == "Split":
        known = e.transfer.from_right(node.inputs[0], [int(node.attrs.get("axis", 0))])
    else:
        known = e.transfer.cut_axes(node)
    return None if known is None else axis in known


def _split(e: _Explorer, node: Node, index: int, track: Track) -> str:
    """Pieces of the channels, or all channels of pieces."""
    along = _along(e, node, track.axis)
    if index > 0 or along is None:
        return "splits along axes that are not known"
    labels = e.reach(node.inputs[0], track.axis)
    if labels is None:
        return "has an input of unknown size"
    start, counts, sizes = 0, {}, list[int]()
    for at, result in enumerate(node.outputs):
        part = labels
        if along:
            size = e.sizes.dim(result, track.axis)
            if not isinstance(size, int) or start + size > labels.size:
                return "has a result of unknown size"
            part, start = labels[start : start + size], start + size
            counts[at] = (part, 1)
            sizes.append(size)
        if e.reach(result, track.axis, part) is None:
            return "has a result of unknown size"
    if along:
        given = len(node.inputs) > 1 and e.facts.constant(node.inputs[1]) is not None
        if not given or start != labels.size:
            return "splits the channels without saying into which sizes"
        e.found.targets[node, 1] = Target(tuple(sizes), counts)
    return ""


def _slice(e: _Explorer, node: Node, index: int, track: Track) -> str:
    """A piece of the channels, or all channels of a piece."""
    along = _along(e, node, track.axis)
    if along is None or not along or index > 0:
        return _moves(e, node, index, track)
    told = "takes channels by bounds that are not constant or that skip some"
    if len(node.inputs) < 3 or any(e.facts.constant(v) is None for v in node.inputs[1:3]):
        return told
    bounds = [e.sizes.integers(v) for v in node.inputs[1:3]]
    steps = e.transfer.numbers(node, 4, "steps")
    if steps is None and len(node.inputs) > 4 and node.inputs[4].name:
        return told
    if bounds[0] is None or bounds[1] is None or len(bounds[0]) != 1 or steps not in (None, [1]):
        return told
    labels = e.reach(node.inputs[0], track.axis)
    if labels is None:
        return "has an input of unknown size"
    start, end, _ = slice(bounds[0][0], bounds[1][0]).indices(labels.size)
    if e.reach(node.outputs[0], track.axis, labels[start:end]) is None:
        return "has a result of unknown size"
    e.found.targets[node, 1] = Target((start,), {0: (labels[:start], 1)})
    e.found.targets[node, 2] = Target((end,), {0: (labels[:end], 1)})
    return ""


def _concat(e: _Explorer, node: Node, index: int, track: Track) -> str:
    rank = e.transfer.rank(node.outputs[0])
    if rank is None:
        return "has a result of unknown size"
    along = int(node.attrs["axis"])
    along = along if along < 0 else along - rank
    labels = e.output(node, track.axis)
    if labels is None:
        return "has a result of unknown size"
    start = 0
    for at, given in enumerate(node.inputs):
        part = labels
        if along == track.axis:
            size = e.sizes.dim(given, along)
            if not isinstance(size, int):
                return f"joins '{given.name}' with an unknown number of channels"
            part = labels[start : start + size]
            start += size
        constant = e.facts.constant(given)
        if constant is None:
            if e.reach(given, track.axis, part) is None:
                return f"joins '{given.name}' with an unknown number of channels"
        elif constant.shape[track.axis] != part.size:
            return f"joins '{given.name}' with another number of channels"
        else:
            e.found.cuts[node, at, track.axis] = Cut(constant, track.axis, part)
    return ""


def _shape(e: _Explorer, node: Node, index: int, track: Track) -> str:
    """A Shape is no matter as long as nobody asks it for the number of channels."""
    rank = e.transfer.rank(node.inputs[0])
    told = "tells others the number of channels"
    if rank is None or node.op == "Size" or "start" in node.attrs or "end" in node.attrs:
        return told
    place = rank + track.axis
    for use in e.facts.uses(node.outputs[0]):
        picked: list[int] | None = None
        if use.node.op == "Gather" and use.index == 0 and use.node.domain == "":
            picked = e.sizes.integers(use.node.inputs[1])
        elif use.node.op == "Slice" and use.index == 0 and use.node.domain == "":
            starts = e.transfer.numbers(use.node, 1, "starts")
            ends = e.transfer.numbers(use.node, 2, "ends")
            steps = e.transfer.numbers(use.node, 4, "steps") or [1]
            if starts and ends and steps == [1]:
                picked = list(range(rank))[starts[0] : ends[0]]
        if picked is None or place in [p % rank for p in picked]:
            return told
    return told if e.facts.pinned(node.outputs[0]) is not None else ""


def _linear(e: _Explorer, node: Node, index: int, track: Track) -> str:
    convolves = node.op in ("Conv", "ConvTranspose")
    if convolves and int(node.attrs.get("group", 1)) != 1:
        return _grouped(e, node, index, track)
    if index < 0:
        return _written(e, node, track)
    found = intake(node, index, track.layout, e.transfer)
    if found is not None and found.groups == 1:
        if not any(i.node is node and i.index == found.index for _, i in e.found.readers):
            e.found.readers.append((node.inputs[index], found))
        return ""
    if node.op == "Gemm" and index == 2 and track.axis == -1:
        labels = e.output(node, -1)
        if labels is None:
            return "has a result of unknown size"
        e.found.tie(labels, track.labels)
        return ""
    if node.op != "MatMul":
        return "reads it in another way than along its features"
    # A @ x: every column of x is treated alike, and every row of A.
    if (index, track.axis) not in ((0, -2), (1, -1)) or not _ranks(e, node):
        return "contracts or batches the channels with what is computed"
    labels = e.output(node, track.axis)
    if labels is None:
        return "has a result of unknown size"
    e.found.tie(labels, track.labels)
    return ""


def _ranks(e: _Explorer, node: Node) -> bool:
    return all((e.transfer.rank(v) or 0) >= 2 for v in node.inputs[:2])


def _written(e: _Explorer, node: Node, track: Track) -> str:
    """The constants that make the channels of a result."""
    found = slots(node, e.facts)
    if isinstance(found, str) or found[0].output_axis != track.axis:
        if node.op != "MatMul" or track.axis not in (-1, -2) or not _ranks(e, node):
            return "makes the channels of what is computed"
        source = node.inputs[1 if track.axis == -1 else 0]
        told = f"takes '{source.name}' of unknown size"
        return "" if e.reach(source, track.axis, track.labels) is not None else told
    if len(found) == 1 and len(node.inputs) > 2 and node.inputs[2].name:
        if node.op != "Gemm":
            return "has a bias that is computed"
        if told := e.couple(node, node.inputs[2], track.axis, track.labels):
            return told
    for slot in found:
        if slot.features() == track.labels.size:
            e.found.cuts[node, slot.index, slot.axis] = Cut(slot.constant, slot.axis, track.labels)
        elif not slot.bias or slot.features() != 1:
            return f"has a '{slot.constant.name}' with another number of channels"
    return ""


def _grouped(e: _Explorer, node: Node, index: int, track: Track) -> str:
    """Depthwise convolutions treat every channel by itself; others mix those of a group."""
    groups, weight = int(node.attrs["group"]), e.facts.constant(node.inputs[1])
    told = "is grouped, and every group must keep the same number of channels"
    if node.op != "Conv" or weight is None or index > 0 or not _spatial(e, node, track.axis):
        return told
    if weight.shape[0] != groups or weight.shape[1] != 1 or track.labels.size != groups:
        return told
    labels = e.output(node, track.axis)
    if labels is None or e.reach(node.inputs[0], track.axis, labels) is None:
        return "has a result of unknown size"
    e.found.cuts[node, 1, -len(weight.shape)] = Cut(weight, -len(weight.shape), labels)
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = e.facts.constant(node.inputs[2])
        if bias is None or bias.shape != (groups,):
            return "has a bias that is computed"
        e.found.cuts[node, 2, -1] = Cut(bias, -1, labels)
    e.found.depthwise[node] = labels
    return ""


_Rule: TypeAlias = "Callable[[_Explorer, Node, int, Track], str]"
_RULES: Final[dict[str, _Rule]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys((*_POOLS, *_PER_CHANNEL), _per_channel),
    **dict.fromkeys(_MOVES, _moves),
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(("Shape", "Size"), _shape),
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
}


# ** what is constant **


def zero_rows(constant: Constant, axis: int, threshold: float = 0.0) -> NDArray[np.bool_]:
    """Which entries of an axis (from the right) of a weight are all zero.

    With a threshold, whose sum of absolute values is at most that part of the largest one.
    """
    weight = np.moveaxis(constant.array(), axis, 0)
    if threshold <= 0.0:
        if not weight.size:
            return np.ones(weight.shape[:1], np.bool_)
        first: Vector = weight[..., 0]
        while first.ndim > 1:
            first = first[..., 0]
        found = np.asarray(first == 0)  # one entry of each, before any is read whole
        for at in np.flatnonzero(found):
            found[at] = not np.any(weight[at])
        return found
    sums = row_sums(constant, axis)
    return np.asarray(sums <= threshold * sums.max(initial=0.0))


def row_sums(constant: Constant, axis: int) -> Vector:
    """The sums of absolute values along all axes but one, from the right."""
    weight = np.moveaxis(constant.array(), axis, 0)
    return np.asarray([float(np.abs(row.astype(np.float64)).sum()) for row in weight])


class Kept:
    """The value that every channel has at all positions; NaN where it has none.

    Args:
        found: The coupling.
        transfer: The rules on this graph.
        order: The place of every node in the order of computation.
        threshold: Weights up to this part of the largest count as zero.

    Attributes:
        values: One number for each channel of each value.
    """

    def __init__(
        self, found: Coupling, transfer: Transfer, order: dict[Node, int], threshold: float = 0.0
    ) -> None:
        self.found = found
        self.transfer = transfer
        self.facts = transfer.facts
        self.threshold = threshold
        self.values: dict[AnyValue, Vector] = {}
        for node in sorted(found.nodes, key=order.__getitem__):
            for result in node.outputs:
                track = found.tracks.get(result)
                if track is not None:
                    try:
                        made = self._made(node, result, track)
                    except (IndexError, KeyError, TypeError, ValueError):
                        made = None  # inputs or attributes that its schema forbids: it is blocked
                    size = track.labels.size
                    whole = made is not None and made.size == size  # not where it is blocked
                    self.values[result] = made if made is not None and whole else _open(size)

    def of(self, value: AnyValue) -> Vector:
        """The constants of a value's channels."""
        known = self.values.get(value)
        return _open(self.found.tracks[value].labels.size) if known is None else known

    def _made(self, node: Node, result: AnyValue, track: Track) -> Vector | None:
        if node.op in _ELEMENTWISE:
            return self._elementwise(node, track)
        if node.op == "BatchNormalization":
            step = read_map(node, track.layout, self.transfer)
            return self._mapped(step) if isinstance(step, Map) else None
        if node.op == "InstanceNormalization":
            if any(self.facts.constant(node.inputs[i]) is None for i in (1, 2)):
                return None  # it is blocked
            gamma, beta = (self._array(node, i) for i in (1, 2))
            flat = np.isfinite(self.of(node.inputs[0])) | (gamma == 0.0)
            return np.where(flat, beta, np.nan)
        if node.op in _POOLS:
            known = self.of(node.inputs[0])
            return np.where(known == 0.0, 0.0, np.nan) if self._averages_padding(node) else known
        if node.op == "Split" or (node.op == "Slice" and (node, 1) in self.found.targets):
            return self._piece(node, result)
        if node.op in _MOVES:
            return self._moved(node)
        if node.op == "Concat":
            return self._joined(node, track)
        if node in self.found.depthwise:
            return self._depthwise(node)
        if node.op in LINEAR:
            return self._written(node, track)
        return None

    def _array(self, node: Node, index: int) -> Vector:
        constant = self.facts.constant(node.inputs[index])
        assert constant is not None, "it was asked for before"
        return constant.float64()

    def _operand(self, value: AnyValue, track: Track) -> Vector:
        """One number for each channel of an input; NaN for those that vary."""
        size = track.labels.size
        if value in self.found.tracks:
            return self.of(value)
        constant = self.facts.constant(value)
        unknown = np.full(size, np.nan)
        if constant is None or not is_real(constant.dtype):
            return unknown
        array = constant.float64()
        if array.size == 1:
            return np.full(size, array.reshape(-1)[0])
        if array.ndim < -track.axis or array.shape[track.axis] != size:
            return unknown
        rows = np.moveaxis(array, track.axis, 0).reshape(size, -1)
        same = (rows == rows[:, :1]).all(axis=1)
        return np.where(same, rows[:, 0], np.nan)

    def _elementwise(self, node: Node, track: Track) -> Vector | None:
        given = [self._operand(v, track) if v.name else None for v in node.inputs]
        if node.op == "Dropout" and len(node.inputs) > 2 and node.inputs[2].name:
            return None  # it may be in training
        if node.op in ("Cast", "Dropout", "Identity"):
            return given[0] if node.attrs.get("to", REAL[0]) in REAL else None
        known = [a for a in given if a is not None]
        if node.op == "Where":
            return np.where(known[-1] == known[-2], known[-1], np.nan)
        if node.op == "Clip":
            given = [a if a is None or i == 0 else a[:1] for i, a in enumerate(given)]
        result = evaluate(node, given)
        if result is None or result.shape != known[0].shape:
            return None
        open_ = np.isnan(np.stack([np.broadcast_to(a, result.shape) for a in known])).any(axis=0)
        result = np.where(open_ | ~np.isfinite(result), np.nan, result)
        if node.op == "Mul":
            zero = (known[0] == 0.0) | (known[-1] == 0.0)
            result = np.where(zero, 0.0, result)
        return result

    def _mapped(self, step: Map) -> Vector:
        assert step.scale is not None, "a BatchNormalization has one"
        shift = np.zeros(step.scale.size) if step.shift is None else step.shift
        with np.errstate(invalid="ignore"):
            moved = step.scale * self.of(step.source) + shift
        small = self.threshold * np.abs(step.scale).max(initial=0.0)
        return np.where(np.abs(step.scale) <= small, shift, moved)

    def _averages_padding(self, node: Node) -> bool:
        """Whether an average takes the zeros of its padding with it, or may do so."""
        if node.op != "AveragePool":
            return False
        return pads(node) and bool(node.attrs.get("count_include_pad", 0))

    def _moved(self, node: Node) -> Vector | None:
        source = self.found.tracks.get(node.inputs[0])
        if source is None:
            return None
        moved = self.transfer.moved(node, source.layout)
        if isinstance(moved, str):
            return None
        known = self.of(node.inputs[0])
        if node.op in ("Pad", "ReduceSum"):  # a sum, or a border of zeros
            known = np.where(known == 0.0, 0.0, np.nan)
        part = moved.parts[0]
        return np.tile(np.repeat(known, part.inner), part.outer)

    def _piece(self, node: Node, result: AnyValue) -> Vector | None:
        known, size = self.of(node.inputs[0]), self.found.tracks[result].labels.size
        if (node, 1) not in self.found.targets:
            return known  # all channels of a piece
        numbers = self.found.targets[node, 1].numbers
        at = next(i for i, v in enumerate(node.outputs) if v is result)
        start = numbers[0] if node.op == "Slice" else sum(numbers[:at])
        return known[start : start + size]

    def _joined(self, node: Node, track: Track) -> Vector | None:
        parts = []
        for at, given in enumerate(node.inputs):
            cut = self.found.cuts.get((node, at, track.axis))
            known = track if cut is None else Track(track.axis, cut.labels)
            if given not in self.found.tracks and cut is None:
                return None
            parts.append(self._operand(given, known))
        if sum(p.size for p in parts) == track.labels.size:
            return np.concatenate(parts)
        stacked = np.stack(parts)
        return np.where((stacked == stacked[:1]).all(axis=0), stacked[0], np.nan)

    def _depthwise(self, node: Node) -> Vector:
        weight = self.facts.constant(node.inputs[1])
        assert weight is not None, "it was asked for before"
        groups = weight.shape[0]
        bias = np.zeros(groups)
        if len(node.inputs) > 2 and node.inputs[2].name:
            bias = self._array(node, 2)
        dead = zero_rows(weight, -len(weight.shape), self.threshold)
        known = self.of(node.inputs[0])
        if pads(node):
            known = np.where(known == 0.0, 0.0, np.nan)
        passed = known * weight.float64().reshape(groups, -1).sum(axis=1) + bias
        return np.where(dead, bias, passed)

    def _written(self, node: Node, track: Track) -> Vector | None:
        found = slots(node, self.facts)
        if isinstance(found, str) or found[0].output_axis != track.axis:
            if node.op == "MatMul" and track.axis == -1 and node.inputs[1] in self.found.tracks:
                return np.where(self.of(node.inputs[1]) == 0.0, 0.0, np.nan)
            return None
        dead = zero_rows(found[0].constant, found[0].axis, self.threshold)
        bias = np.zeros(dead.size)
        if len(node.inputs) > 2 and node.inputs[2].name:
            if len(found) == 1:
                return None
            array = found[1].constant.float64()
            if array.size not in (1, dead.size):
                return None
            bias = np.broadcast_to(array.reshape(-1), bias.shape) * found[1].gain
        return np.where(dead, bias, np.nan)


def _open(size: int) -> Vector:
    """Channels that vary."""
    return np.full(size, np.nan)
