"""Fold a constant affine map per channel into the linear operator that feeds it.

    s * (W x + b) + t  ->  (s * W) x + (s * b + t)

The map is a BatchNormalization with fixed statistics that stands behind something else than a
convolution, a batch normalization that was written out, or a chain of Mul, Add, Sub and Div with
constants, as LayerScale is. The operator is a Conv, ConvTranspose, Gemm or MatMul, with or without
a bias, and between the two may stand what only moves the features. Where a MatMul has no bias and
t is not zero, one Add behind it takes t. Exact over the reals. In floating point s and t are formed
in float64 and every constant is rounded once. Source: the definitions of these operators in the
ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.feeders import Change, Feeder, feeder, shared
from onnxnorm.layout import Layout, Part
from onnxnorm.module import Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.port import is_real
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import Sizes
from onnxnorm.transfer import Stop, Transfer

DEFAULT_EPSILON: Final = 1e-5  # BatchNormalization's schema default
_PARAMETERS: Final = ("gamma", "beta", "mean", "variance")


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Remove affine maps per channel behind linear operators.

    Attributes:
        max_copy_mb: A weight that others read too is copied; refuse copies larger than this.
    """

    max_copy_mb: int = 256

    name: ClassVar = "fold-affine"
    summary: ClassVar = "scales and shifts per channel into the linear operator that feeds them"
    equation: ClassVar = "s (W x + b) + t -> (s W) x + (s b + t)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every constant affine map per channel, but those that fold-batchnorm is for."""
        rows = [n for n in find_norms(facts) if _is_for(n, facts)]
        if not rows:
            return
        transfer = Transfer(facts, Sizes(facts))
        for norm in rows:
            affine = read(norm, transfer)
            if isinstance(affine, str):
                yield Refusal(affine, norm.node.label, node=norm.node)
            else:
                yield self._behind(norm, affine, transfer)

    def _behind(self, norm: Norm, affine: Affine, transfer: Transfer) -> Plan | Refusal:
        first = next(n for n in norm.nodes if norm.input in n.inputs)
        found = feeder(norm.input, affine.layout, affine.scale, affine.shift, first, transfer)
        if isinstance(found, Stop):
            at = norm.node.label if found.node is None else found.node.label
            return Refusal(found.why, at, node=norm.node)
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
        """Change the constants; what fed the map computes its result."""
        found: Feeder = plan.detail
        linear, result = found.linear, plan.root.outputs[0]
        last = found.way[0] if found.way else linear
        inputs: dict[tuple[Node, int], AnyValue] = {}
        for change in found.changes:
            role = "bias" if change.bias else "weight"
            name = f"{result.name}_{role}"
            made = rw.constant(role, change.array(), at=change.node, name=name)
            inputs[change.node, change.index] = made
        if found.rest is not None:
            rest, name, made_by_linear = (
                found.rest.array(),
                f"{result.name}_bias",
                linear.outputs[0],
            )
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
