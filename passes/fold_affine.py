"""Fold a constant affine map per channel into its linear neighbours.

    s * (W x + b) + t  ->  (s * W) x + (s * b + t)        into what feeds it
    (s * x + t) W + b  ->  x (diag(s) W) + (b + t W)      else into all that reads it

The map is a BatchNormalization with fixed statistics that stands behind something else than a
convolution, a batch normalization that was written out, or a chain of Mul, Add, Sub and Div with
constants, as LayerScale is. The operator is a Conv, ConvTranspose, Gemm or MatMul, with or without
a bias, and between the two may stand what only moves the features. Where a MatMul has no bias and
t is not zero, one Add behind it takes t. Readers must be MatMul, Gemm or Conv of one group, with a
place for t: a Conv that pads takes none, since it pads with zeros in the place of t. Exact over the
reals. In floating point s and t are formed in float64 and every constant is rounded once. Source:
the definitions of these operators in the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.consumers import consumers
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.feeders import MOVES, Change, Feeder, feeder, shared
from onnxnorm.layout import Layout, Part
from onnxnorm.module import Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.port import is_real
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.shift import Sinks, sinks
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Stop, Transfer, described

DEFAULT_EPSILON: Final = 1e-5  # BatchNormalization's schema default
_PARAMETERS: Final = ("gamma", "beta", "mean", "variance")


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Remove affine maps per channel beside linear operators.

    Attributes:
        max_copy_mb: A weight that others read too is copied; refuse copies larger than this.
    """

    max_copy_mb: int = 256

    name: ClassVar = "fold-affine"
    summary: ClassVar = "scales and shifts per channel into the linear operators beside them"
    equation: ClassVar = "s (W x + b) + t -> (s W) x + (s b + t)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every constant affine map per channel, but those that fold-batchnorm is for."""
        rows = [n for n in find_norms(facts) if _is_for(n, facts)]
        if not rows:
            return
        transfer = Transfer(facts, find_sizes(facts))
        for norm in rows:
            affine = read(norm, transfer)
            if isinstance(affine, str):
                yield Refusal(affine, norm.node.label, node=norm.node)
            else:
                yield self._decided(norm, affine, transfer)

    def _decided(self, norm: Norm, affine: Affine, transfer: Transfer) -> Plan | Refusal:
        behind = self._behind(norm, affine, transfer)
        if isinstance(behind, Plan):
            return behind
        before = self._before(norm, affine, transfer)
        if isinstance(before, Plan):
            return before
        return replace(behind, reason=f"{behind.reason}; nor into what reads it: {before}")

    def _before(self, norm: Norm, affine: Affine, transfer: Transfer) -> Plan | str:
        """The fold into the readers, or what stands in its way."""
        facts = transfer.facts
        readers = consumers(norm.output, affine.layout, transfer)
        if isinstance(readers, str):
            return readers
        if not readers.places:
            return "nothing reads it"
        places = Sinks()
        if affine.shift.any():
            told = sinks(norm.output, affine.layout, transfer)
            if isinstance(told, str):
                return f"the shift has no place, {told}"
            places = told
        between = dict.fromkeys((*readers.between, *places.between))
        adds = {s.node for s in places.places}
        linear = {c.inlet.node for c in readers.places}
        for node in between:
            if node.op not in MOVES and node not in linear | adds:
                return f"{described(node)} stands between"
        changes: list[Change] = []
        for reader in readers.places:
            inlet, factors = reader.inlet, reader.factors(affine.scale)
            if bool((factors != 1.0).any()):
                shape = [1] * len(inlet.weight.shape)
                shape[inlet.weight_axis] = -1
                scale, dtype = factors.reshape(shape), inlet.weight.dtype
                changes.append(Change(inlet.node, 1, inlet.weight, dtype, scale))
        for sink in places.places:
            if sink.inlet is None:
                return f"{described(sink.node)} joins it with other values"
            dtype, moved = sink.inlet.weight.dtype, sink.shift(affine.shift)
            if sink.bias is not None:
                dtype = sink.bias.dtype
            changes.append(
                Change(sink.node, sink.index, sink.bias, dtype, np.ones(1), moved, bias=True)
            )
        for change in changes:
            if (refusal := self._refused(change, norm, facts)) is not None:
                return f"{refusal.reason} in '{refusal.at}'"
        results = [s.node.outputs[0] for s in places.places] or [n.outputs[0] for n in linear]
        return Plan(
            norm.node,
            tuple(dict.fromkeys((*norm.nodes, *linear, *adds))),
            Readers(norm, tuple(changes)),
            inside=tuple(n for n in between if n not in linear | adds),
            outputs=tuple(dict.fromkeys(results)),
            into=readers.places[0].inlet.node.op,
        )

    def _behind(self, norm: Norm, affine: Affine, transfer: Transfer) -> Plan | Refusal:
        first = next(n for n in norm.nodes if norm.input in n.inputs)
        found = feeder(norm.input, affine.layout, affine.scale, affine.shift, first, transfer)
        if isinstance(found, Stop):
            return found.refusal(norm.node)
        linear = found.linear
        if found.rest is not None and not norm.operator and len(norm.nodes) == 1:
            reason = f"'{linear.label}' has no bias, and an Add behind it would save nothing"
            return Refusal(reason, linear.label, node=norm.node)
        for change in (*found.changes, *((found.rest,) if found.rest is not None else ())):
            if (refusal := self._refused(change, norm, transfer.facts)) is not None:
                return refusal
        nodes = dict.fromkeys((linear, *found.way[::-1], *norm.nodes))
        return Plan(norm.node, tuple(nodes), found, into=linear.op)

    def _refused(self, change: Change, norm: Norm, facts: Facts) -> Refusal | None:
        at, constant = change.node.label, change.constant
        size = 0 if constant is None else constant.nbytes
        if size > self.max_copy_mb * 1_000_000 and constant is not None and shared(change, facts):
            reason = f"'{constant.name}' has other readers and a copy takes {size / 1e6:.0f} MB"
            return Refusal(reason, at, "Raise fold-affine{max_copy_mb=...}.", norm.node)
        misfit = change.misfit()
        return None if misfit is None else Refusal(misfit, at, node=norm.node)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Change the constants; what fed the map computes its result, or what read it reads x."""
        found: Feeder | Readers = plan.detail
        if isinstance(found, Readers):
            for change in found.changes:
                role = "bias" if change.bias else "weight"
                name = f"{change.node.outputs[0].name}_{role}"
                made = rw.constant(role, change.array(), at=change.node, name=name)
                rw.rewire(change.node, change.index, made)
            rw.redirect(found.norm.output, found.norm.input)
            return
        linear, result = found.linear, plan.root.outputs[0]
        last = found.way[0] if found.way else linear
        inputs: dict[tuple[Node, int], AnyValue] = {}
        for change in found.changes:
            role = "bias" if change.bias else "weight"
            name = f"{result.name}_{role}"
            made = rw.constant(role, change.array(), at=change.node, name=name)
            inputs[change.node, change.index] = made
        if found.rest is not None:
            rest, name = found.rest.array(), f"{result.name}_bias"
            made_by_linear = linear.outputs[0]
            if last is linear:
                bias = rw.constant("bias", rest, name=name)
                _rewire(rw, inputs)
                rw.replace("Add", [made_by_linear, bias])
                return
            bias = rw.constant("bias", rest, behind=made_by_linear, name=name)
            reader = found.way[-1]
            index = reader.inputs.index(made_by_linear)
            shifted = rw.add("Add", [made_by_linear, bias], "shifted", behind=made_by_linear)
            inputs[reader, index] = shifted
        _rewire(rw, {key: v for key, v in inputs.items() if key[0] is not last})
        own = {index: v for (node, index), v in inputs.items() if node is last}
        count = max(len(last.inputs), *(index + 1 for index in own), 0)
        given = [*last.inputs, *(None,) * (count - len(last.inputs))]
        rw.replace_like(last, [own.get(index, v) for index, v in enumerate(given)])


def _rewire(rw: Rewriter, inputs: dict[tuple[Node, int], AnyValue]) -> None:
    for (node, index), value in inputs.items():
        rw.rewire(node, index, value)


@dataclass(frozen=True, eq=False)
class Readers:
    """All that reads the result of a row, and what becomes of its constants."""

    norm: Norm
    changes: tuple[Change, ...]


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift.

    Attributes:
        layout: Where the channels are in x.
        scale: One factor for each channel.
        shift: One addend for each channel.
    """

    layout: Layout
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]


def read(norm: Norm, transfer: Transfer) -> Affine | str:
    """The map that a row computes, or the reason why it is not known to be one per channel."""
    if norm.node.scope.opsets[""] < 7:
        return "before opset 7 constants are not broadcast from the right"
    rank = transfer.rank(norm.input)
    if rank is None or transfer.rank(norm.output) != rank:
        return f"the rank of '{norm.input.name}' is not known, or is not that of the result"
    if norm.operator:
        read = _operator(norm.node, transfer.facts)
        if isinstance(read, str):
            return read
        scale, shift = read
        axis = 1 - rank
    else:
        parts = [np.asarray(a) for a in (norm.gamma, norm.beta) if isinstance(a, np.ndarray)]
        axes = {a - p.ndim for p in parts for a, n in enumerate(p.shape) if n > 1}
        if len(axes) != 1:
            return "it varies along several axes"
        (axis,) = axes
        count = max(p.shape[axis] for p in parts if p.ndim >= -axis)
        scale, shift = _vector(norm.gamma, 1.0, count), _vector(norm.beta, 0.0, count)
    if rank < -axis or transfer.sizes.dim(norm.input, axis) != scale.size:
        return f"'{norm.input.name}' is not known to have {scale.size} channels"
    if not np.isfinite(scale).all():
        return "gamma / sqrt(variance + epsilon) is not finite"
    if not np.isfinite(shift).all():
        return "beta - mean * gamma / sqrt(variance + epsilon) is not finite"
    return Affine(Layout((Part(axis, scale.size),)), scale, shift)


def _vector(given: object, default: float, count: int) -> NDArray[np.float64]:
    array = given if isinstance(given, np.ndarray) else np.asarray(default)
    return np.broadcast_to(np.asarray(array, np.float64).reshape(-1), (count,))


def _operator(node: Node, facts: Facts) -> tuple[NDArray[np.float64], NDArray[np.float64]] | str:
    """(s, t) of a BatchNormalization."""
    if name := node.parameter("epsilon", "spatial"):
        return f"{name} is a parameter of the function"
    if node.scope.opsets[""] < 9 and node.attrs.get("spatial", 1) == 0:
        return "spatial is 0: it has statistics for every position"
    found: list[NDArray[np.float64]] = []
    for name, value in zip(_PARAMETERS, node.inputs[1:], strict=False):
        constant = facts.constant(value)
        if constant is None:
            return f"{name} '{value.name}' is not constant: {facts.why_not_constant(value)}"
        if not is_real(constant.dtype):
            return f"{name} is of type {constant.dtype}"
        found.append(constant.float64())
    shapes = {a.shape for a in found}
    if len(found) != len(_PARAMETERS) or len(shapes) != 1 or found[0].ndim != 1:
        return "its parameters are not four vectors of one size"
    gamma, beta, mean, variance = found
    epsilon = float(node.attrs.get("epsilon", DEFAULT_EPSILON))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # read() sees the outcome
        scale = gamma / np.sqrt(variance + epsilon)
        return scale, beta - mean * scale


def _is_for(norm: Norm, facts: Facts) -> bool:
    if norm.kind not in ("batch_norm", "channel_affine") or not norm.recognised:
        return False
    if not norm.operator:
        return True
    made = facts.producer(norm.input)
    # Behind a convolution it is fold-batchnorm's, with its reasons where it refuses.
    return made is None or made.op not in ("Conv", "ConvTranspose") or made.domain != ""
