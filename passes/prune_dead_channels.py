"""Remove channels that are constant, from what makes them and from what reads them.

    y = W f(V x + b) + c,   V_k = 0     ->     V, b without row k,   W without column k,
                                               c + W_k f(b_k)

A channel is dead where it has one value at all positions and for every input: the scale of its
BatchNormalization, or of its LayerScale, is 0, or its filter is. Its value goes through what treats
channels one by one (activations, pooling, depthwise convolutions, Add, Mul, Concat) to the linear
operators that read it, and there into their bias; a channel that all its readers multiply with 0
goes likewise. Channels that are added, multiplied or joined are coupled and go together or not at
all. A convolution that pads reads 0 at its border, so there only channels that are 0 can go. Where
all channels of one side of a residual Add are constant, the whole branch goes. Exact over the
reals. In floating point the value of a channel is formed in float64 and each bias is rounded once;
infinities that a weight of 0 would turn into NaN are gone.

Widths stay as aligned as they were: the number of channels keeps its greatest common divisor with
`multiple`, since blocked convolutions and matrix products lose more by an odd width than they gain
by a narrow one. With a threshold, channels that vary little count as dead; that is an
approximation, its bound is in the note of the site, and no parity can be expected of it.

Source: J. Frankle, D. J. Schwab, A. S. Morcos, "Training BatchNorm and Only BatchNorm" (2021), for
how many there are; Z. Liu et al., "Learning Efficient Convolutional Networks through Network
Slimming" (2017), for removing them by the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.affine_maps import Vector
from onnxnorm.channels import (
    Coupling,
    Kept,
    Track,
    find_coupling,
    row_sums,
    zero_rows,
)
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.gauge_region import Intake, intake
from onnxnorm.layout import Layout, Part
from onnxnorm.module import Node, Value
from onnxnorm.port import LINEAR, bias_of, is_real, pads, rounded, slots
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.storage import Array
from onnxnorm.transfer import Stop, Transfer, described

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class PruneDeadChannels(Pass):
    """Remove channels that are constant or that nobody reads.

    Attributes:
        multiple: The number of channels keeps its greatest common divisor with this.
        threshold: A filter whose sum of absolute values is at most this part of the largest one
            counts as zero; above 0 the outputs change.
    """

    multiple: int = 16
    threshold: float = 0.0

    name: ClassVar = "prune-dead-channels"
    summary: ClassVar = "channels that are constant, out of what makes and reads them"
    equation: ClassVar = "W f(V x + b) + c -> W' f(V' x + b') + (c + W_k f(b_k)),   V_k = 0"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """One plan for each set of channels that hang together; a reason where none can go."""
        transfer = Transfer(facts, find_sizes(facts))
        order = {n: i for i, n in enumerate(facts.module.nodes())}
        seen: set[AnyValue] = set()
        for node, value, axis in self._seeds(list(order), transfer):
            if value in seen:
                continue
            found = find_coupling(value, axis, transfer)
            if found is None:
                continue
            seen.update(found.tracks)
            kept = Kept(found, transfer, order, self.threshold)
            branches = list(_branches(found, kept, transfer))
            yield from branches
            pruning = Pruning(found, kept, facts, self, order)
            if pruning.gone.any():
                yield pruning.plan()
            elif not branches and np.isfinite(kept.of(value)).any():
                yield pruning.refusal(node, value)

    def _seeds(self, nodes: list[Node], transfer: Transfer) -> Iterator[tuple[Node, AnyValue, int]]:
        """The places where a channel is dead by its weights, with the axis of the channels."""
        facts = transfer.facts
        for node in nodes:
            if node.domain != "" or not node.outputs or not node.outputs[0].name:
                continue
            if node.op in LINEAR:
                found = slots(node, facts)
                if not isinstance(found, str):
                    first = found[0]
                    rows = first.constant.shape[first.axis] if first.constant.shape else 0
                    dead = rows > 1 and zero_rows(first.constant, first.axis, self.threshold).any()
                    if dead and first.groups == 1:
                        yield node, node.outputs[0], first.output_axis
                weight = _contracts(node, transfer)
                if weight is None or weight[1].features == 1:
                    continue
                if zero_rows(weight[1].constant, weight[1].axis).any():
                    yield node, node.inputs[0], weight[0]
            elif node.op in ("BatchNormalization", "Mul"):
                axis = _scaled_with_zero(node, transfer)
                if axis is not None:
                    yield node, node.outputs[0], axis

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Copy what carries the channels, narrower, and let the readers take the copies."""
        if isinstance(plan.detail, Branch):
            plan.detail.stage(rw)
        else:
            pruning: Pruning = plan.detail
            pruning.stage(rw)


def _contracts(node: Node, transfer: Transfer) -> tuple[int, Intake] | None:
    """The weight by which a node reads its first input, with the axis that it contracts."""
    rank = transfer.rank(node.inputs[0]) if len(node.inputs) > 1 else None
    if rank is None:
        return None
    axis = 1 - rank if node.op in ("Conv", "ConvTranspose") else -1
    size = transfer.sizes.dim(node.inputs[0], axis)
    if not isinstance(size, int) or size < 1 or rank < 2:
        return None
    found = intake(node, 0, Layout((Part(axis, size),)), transfer)
    return None if found is None or found.groups > 1 else (axis, found)


def _scaled_with_zero(node: Node, transfer: Transfer) -> int | None:
    """The axis of channels of a scale that has a 0."""
    index = 1 if node.op == "BatchNormalization" else None
    rank = transfer.rank(node.outputs[0])
    for at in (0, 1) if index is None else (index,):
        constant = transfer.facts.constant(node.inputs[at]) if len(node.inputs) > at else None
        if rank is None or constant is None or not is_real(constant.dtype):
            continue
        axes = [a - len(constant.shape) for a, n in enumerate(constant.shape) if n > 1]
        if len(axes) == 1 and bool((constant.array() == 0).any()):
            return 1 - rank if node.op == "BatchNormalization" else axes[0]
    return None


# ** whole branches **


@dataclass(frozen=True, eq=False)
class Branch:
    """An Add one side of which is constant in all channels.

    Attributes:
        node: The Add.
        index: Which input is constant.
        sums: What it is, in a shape that broadcasts; None for 0.
    """

    node: Node
    index: int
    sums: Array | None

    def stage(self, rw: Rewriter) -> None:
        """Read a constant, or nothing, in place of the branch."""
        other = self.node.inputs[1 - self.index]
        if self.sums is not None:
            made = rw.constant("constant", self.sums, at=self.node)
            rw.rewire(self.node, self.index, made)
        elif rw.facts.pinned(self.node.outputs[0]) is None:
            rw.redirect(self.node.outputs[0], other)
        else:
            rw.replace("Identity", [other], at=self.node)


def _branches(found: Coupling, kept: Kept, transfer: Transfer) -> Iterator[Plan]:
    """The Adds that only add constants."""
    for node in found.nodes:
        if node.op != "Add" or len(node.inputs) != 2:
            continue
        known = [v in found.tracks and bool(np.isfinite(kept.of(v)).all()) for v in node.inputs]
        if known[0] == known[1]:
            continue
        index = 0 if known[0] else 1
        value, other = node.inputs[index], node.inputs[1 - index]
        shapes = [transfer.sizes.of(v) for v in (other, node.outputs[0])]
        element = transfer.facts.type(value)
        if transfer.facts.constant(other) is not None or shapes[0] != shapes[1] or not shapes[0]:
            continue
        if element is None or not element.element:
            continue
        numbers, track = kept.of(value), found.tracks[value]
        sums = None
        if numbers.any():
            dtype = onnx.helper.tensor_dtype_to_np_dtype(element.element)
            sums = rounded(track.layout.spread(numbers, 0), dtype)
        count = track.labels.size
        note = f"all {count} channels of '{value.name}' are constant, and its branch goes"
        detail = Branch(node, index, sums)
        yield Plan(node, (node,), detail, local=False, into="Identity", note=note)


# ** single channels **


class Pruning:
    """What becomes of one coupling.

    Args:
        found: The coupling.
        kept: The constants of its channels.
        facts: What is true of the graph.
        options: The pass.
        order: The place of every node in the order of computation.

    Attributes:
        gone: For every label, whether its channels go.
        reasons: Why others stay, by label.
    """

    def __init__(
        self,
        found: Coupling,
        kept: Kept,
        facts: Facts,
        options: PruneDeadChannels,
        order: dict[Node, int],
    ) -> None:
        self.found = found
        self.kept = kept
        self.facts = facts
        self.options = options
        self.order = order
        self.labels = found.merged()
        self.reasons = found.blocked(self.labels)
        self.shifts: dict[tuple[Node, int], tuple[Constant | None, Vector, np.dtype[Any]]] = {}
        for value, weight in found.readers:
            self._read(value, weight)
        self.gone = np.ones(self.labels.size, np.bool_)
        self.gone[list(self.reasons)] = False
        self.gone = self.gone[self.labels]  # a label goes as the one it is coupled with
        self._align()
        self._shift()

    def _read(self, value: AnyValue, weight: Intake) -> None:
        """Keep the channels of which a reader would miss something."""
        node, track = weight.node, self.found.tracks[value]
        known = self.kept.of(value)
        unread = zero_rows(weight.constant, weight.axis)
        gone = unread | (known == 0.0)
        whole = np.isfinite(known) & ~gone
        told = ""
        if whole.any():
            told = self._misses(node, weight)
        for at in np.flatnonzero(~gone):
            label = int(self.labels[track.labels[at]])
            if not np.isfinite(known[at]):
                why = f"{described(node)} reads channel {at} of '{value.name}', which varies"
                self.reasons.setdefault(label, Stop(node, why))
            elif told:
                why = f"channel {at} of '{value.name}' is {known[at]:.4g}, and {described(node)}"
                self.reasons.setdefault(label, Stop(node, f"{why} {told}"))

    def _misses(self, node: Node, weight: Intake) -> str:
        """Why a constant in front of a node is no constant behind it; "" where it is."""
        if node.op in ("Conv", "ConvTranspose") and pads(node):
            return "pads with 0"
        if node.op == "ConvTranspose":
            return "adds up a different number of positions at the border"
        if weight.index != 1 or isinstance(bias_of(node, self.facts), str):
            return "has no bias that could take it"
        return ""

    def _align(self) -> None:
        """Let every value keep a channel, and its width its alignment."""
        wanted = {}
        for value, track in self.found.tracks.items():
            node = self.facts.producer(value)
            size = track.labels.size
            linear = node is not None and node.op in LINEAR
            wanted[value] = math.gcd(size, max(1, self.options.multiple)) if linear else 1
        changed = True
        while changed:
            changed = False
            for value, unit in wanted.items():
                mask = self.gone[self.found.tracks[value].labels]
                left = int((~mask).sum())
                missing = max(-left % unit, unit if left == 0 else 0)
                if missing == 0 or not mask.any():
                    continue
                labels = self.found.tracks[value].labels[np.flatnonzero(mask)[-missing:]]
                self.gone[np.isin(self.labels, self.labels[labels])] = False
                changed = True

    def _shift(self) -> None:
        """What the biases of the readers take over."""
        for value, weight in self.found.readers:
            mask, known = self.mask(self.found.tracks[value]), self.kept.of(value)
            added = np.where(mask & np.isfinite(known), known, 0.0)
            if not added.any():
                continue
            moved = np.moveaxis(weight.constant.float64(), weight.axis, 0)
            passed = np.tensordot(added, moved, axes=1)
            if weight.node.op == "Conv":
                passed = passed.reshape(passed.shape[0], -1).sum(axis=1)
            elif weight.node.op == "Gemm":
                passed = passed * float(weight.node.attrs.get("alpha", 1.0))
            place = bias_of(weight.node, self.facts)
            if isinstance(place, str) or not passed.any():
                continue
            constant = place.constant
            dtype = weight.constant.dtype if constant is None else constant.dtype
            self.shifts[place.node, place.index] = (constant, passed / place.gain, dtype)

    def mask(self, track: Track) -> Mask:
        """Which channels of a value go."""
        found: Mask = self.gone[track.labels]
        return found

    def misfit(self) -> Stop | None:
        """The first bias whose type cannot hold what it takes over."""
        for (node, _), (constant, shift, dtype) in self.shifts.items():
            before = 0.0 if constant is None else constant.float64()
            if not np.isfinite(rounded(np.asarray(before + shift), dtype).astype(np.float64)).all():
                return Stop(node, f"the bias of {described(node)} would not be finite in {dtype}")
        return None

    def plan(self) -> Plan | Refusal:
        """The site."""
        changed = [v for v, t in self.found.tracks.items() if self.mask(t).any()]
        makers = [self.facts.producer(v) for v in changed]
        made = sorted((n for n in makers if n is not None), key=self.order.__getitem__)
        stop = self.misfit()
        if stop is not None:
            return stop.refusal(made[0])
        readers = [w.node for v, w in self.found.readers if self.mask(self.found.tracks[v]).any()]
        biases = [node for node, _ in self.shifts]
        nodes = [n for n in self.found.nodes if any(v in changed for v in n.inputs)]
        return Plan(
            made[0],
            tuple(dict.fromkeys((*made, *readers, *biases, *nodes))),
            self,
            outputs=tuple(dict.fromkeys(n.outputs[0] for n in readers)),
            local=False,
            note=self._note(changed),
        )

    def _note(self, changed: list[AnyValue]) -> str:
        count = len({int(self.labels[i]) for i in np.flatnonzero(self.gone)})
        told = f"{count} channel{'s' if count > 1 else ''} of {len(changed)} values go"
        if self.options.threshold <= 0.0:
            return told
        worst = 0.0
        for value in changed:
            node = self.facts.producer(value)
            found = slots(node, self.facts) if node is not None else ""
            if not isinstance(found, str):
                sums = row_sums(found[0].constant, found[0].axis)
                mask = self.mask(self.found.tracks[value])
                if sums.size == mask.size:
                    worst = max(worst, float(sums[mask].max(initial=0.0)))
        return f"{told}; each varies by at most {worst:.3g} times the largest input of its operator"

    def refusal(self, node: Node, value: AnyValue) -> Refusal:
        """Why no channel goes."""
        track = self.found.tracks[value]
        known = np.isfinite(self.kept.of(value))
        labels = track.labels[known] if known.any() else track.labels
        for label in self.labels[labels]:
            if int(label) in self.reasons:
                return self.reasons[int(label)].refusal(node)
        unit = math.gcd(track.labels.size, max(1, self.options.multiple))
        told = f"the dead channels of '{value.name}' keep its width a multiple of {unit}"
        advice = "Lower prune-dead-channels{multiple=...} to remove them."
        return Refusal(told, node.label, advice, node=node, kept=True)

    def stage(self, rw: Rewriter) -> None:
        """Stage all of it."""
        constants = self._constants()
        new: dict[AnyValue, AnyValue] = {}
        changed = {v for v, t in self.found.tracks.items() if self.mask(t).any()}
        nodes = dict.fromkeys((*self.found.nodes, *(n for n, _ in self.shifts)))
        for node in sorted(nodes, key=self.order.__getitem__):
            given: dict[int, AnyValue] = {}
            for index, value in enumerate(node.inputs):
                if value in new:
                    given[index] = new[value]
            for (owner, index), (name, array) in constants.items():
                if owner is node:
                    given[index] = rw.constant("pruned", array, at=node, name=f"{name}_pruned")
            if not changed.intersection(node.outputs):
                for index, value in given.items():
                    rw.rewire(node, index, value)
                continue
            count = max(len(node.inputs), *(i + 1 for i in given), 0)
            empty = Value("", node.scope)
            inputs = [
                given.get(i, node.inputs[i] if i < len(node.inputs) else empty)
                for i in range(count)
            ]
            made = rw.copy(node, inputs, "pruned", attrs=self._attributes(node))
            new.update(zip(node.outputs, made, strict=True))

    def _attributes(self, node: Node) -> dict[str, Any]:
        labels = self.found.depthwise.get(node)
        return {} if labels is None else {"group": int((~self.gone[labels]).sum())}

    def _constants(self) -> dict[tuple[Node, int], tuple[str, Array]]:
        """The new constants, with the names of the old ones."""
        cuts: dict[tuple[Node, int], list[tuple[Constant | None, int, Mask]]] = {}
        for (node, index, axis), cut in self.found.cuts.items():
            cuts.setdefault((node, index), []).append((cut.constant, axis, self.gone[cut.labels]))
        for value, weight in self.found.readers:
            mask = self.mask(self.found.tracks[value])
            place = (weight.node, weight.index)
            cuts.setdefault(place, []).append((weight.constant, weight.axis, mask))
        made: dict[tuple[Node, int], tuple[str, Array]] = {}
        for key in dict.fromkeys((*cuts, *self.shifts)):
            parts = [part for part in cuts.get(key, ()) if part[2].any()]
            shift = self.shifts.get(key)
            if not parts and shift is None:
                continue
            constant = parts[0][0] if parts else None
            if shift is not None:
                constant = shift[0]
                before = np.zeros(()) if constant is None else constant.float64()
                array = rounded(np.asarray(before + shift[1]), shift[2])
            else:
                assert constant is not None, "a cut is of a constant"
                array = constant.array()
            track = self.found.tracks.get(key[0].outputs[0])
            if shift is not None and not cuts.get(key) and track is not None:
                parts = [(constant, -1, self.mask(track))]  # a bias that is new, or was one number
            for _, axis, mask in parts:
                array = np.compress(~mask, array, axis=axis)
            name = constant.name if constant is not None else key[0].outputs[0].name
            made[key] = (name, np.ascontiguousarray(array))
        for (node, index), target in self.found.targets.items():
            track = self.found.tracks.get(node.inputs[0])
            if track is None or not self.mask(track).any():
                continue
            source, numbers = node.inputs[index], target.kept(self.gone)
            constant = self.facts.constant(source)
            assert constant is not None, "it has been read"
            if numbers != constant.array().reshape(-1).tolist():
                made[node, index] = (source.name, np.asarray(numbers, constant.dtype))
        return made
