"""Merge a convolution with another of the same input, or with a map of the input per channel.

    (V * x + b) + (W * x + c)  ->  (V + W) * x + (b + c)       kernels padded to the larger one
    (V * x + b) + (s x + t)    ->  (V + diag(s)) * x + (b + t)   s x + t a kernel of size 1

as networks have them that are trained in parallel branches: RepVGG, MobileOne, FastViT, RepViT,
once their BatchNormalizations are folded. s x + t is a BatchNormalization of the input, written out
or not, or the input itself; V * x may have such a map behind it too. The smaller kernel must lie
inside the larger one where both read the same pixels, so that the sum has no more taps than the
larger, and strides, dilations and groups are equal. Exact over the reals: what lies outside the
image is 0 for both. In floating point V + W is formed in float64 and rounded once. Source: X. Ding
et al., "RepVGG: Making VGG-style ConvNets Great Again" (2021), and the definition of Conv in the
ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from onnxnorm.affine_maps import Vector, map_chain
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.port import bias_of, is_real, rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.storage import Array
from onnxnorm.transfer import Transfer

_LONGEST: Final = 6  # maps behind a convolution


@dataclass(frozen=True)
class MergeParallelConvolutions(Pass):
    """Write the sum of two convolutions of one input as one."""

    name: ClassVar = "merge-parallel-convolutions"
    summary: ClassVar = "convolutions of one input, and maps of it per channel, into one"
    equation: ClassVar = "(V * x + b) + (W * x + c) -> (V + W) * x + (b + c)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every sum or difference of two branches of one input, one of them a convolution."""
        nodes = [n for n in facts.module.nodes() if n.op in ("Add", "Sub") and not n.domain]
        sums = [(node, _convolutions(node, facts)) for node in nodes]
        if not any(any(found) for _, found in sums):
            return
        transfer = Transfer(facts, find_sizes(facts))
        for node, convolutions in sums:
            found = _merged(node, convolutions, transfer)
            if isinstance(found, Refusal):
                yield found
            elif found is not None:
                gone = [n for n in found.nodes if n is not found.like]
                anchors = tuple(n.outputs[0] for n in gone)
                yield Plan(node, (node, *found.nodes), found, anchors=anchors, into="Conv")

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """The convolution with the larger kernel, with another weight and bias."""
        found: _Sum = plan.detail
        given: list[AnyValue | None] = [found.like.inputs[0], rw.constant("weight", found.weight)]
        if found.bias is not None:
            given.append(rw.constant("bias", found.bias))
        rw.replace_like(found.like, given)


@dataclass(frozen=True, eq=False)
class _Sum:
    """One convolution in place of two branches.

    Attributes:
        like: The convolution with the larger kernel.
        nodes: The nodes of both branches.
        weight: The new weight.
        bias: The new bias; None where neither has one.
    """

    like: Node
    nodes: tuple[Node, ...]
    weight: Array
    bias: Array | None


@dataclass(frozen=True, eq=False)
class _Branch:
    """A convolution with constants that the sum alone reads, with the map behind it.

    Attributes:
        node: The convolution.
        nodes: It, and the nodes of the map.
        scale: What its result is multiplied by, one factor for each channel.
        weight: Its weight.
        bias: What the branch adds, in float64.
        pads: What it pads, at the start of each axis and then at the end of each.
    """

    node: Node
    nodes: tuple[Node, ...]
    scale: Vector
    weight: Constant
    bias: Vector
    pads: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight.shape[2:]

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.node.attrs.get("strides", [1] * len(self.kernel)))

    @property
    def dilations(self) -> tuple[int, ...]:
        """0 along an axis of size 1, where they do not matter."""
        given = self.node.attrs.get("dilations", [1] * len(self.kernel))
        return tuple(d if n > 1 else 0 for d, n in zip(given, self.kernel, strict=True))

    @property
    def groups(self) -> int:
        return int(self.node.attrs.get("group", 1))

    def scaled(self) -> Vector:
        """The weight with the map, in float64."""
        inner = (1,) * (len(self.weight.shape) - 1)
        return self.weight.float64() * self.scale.reshape(-1, *inner)


def _convolutions(node: Node, facts: Facts) -> tuple[Node | None, ...]:
    """The convolution that each operand of a sum may be a map of."""
    if len(node.inputs) != 2 or node.scope.opsets[""] < 7:
        return (None, None)
    return tuple(_convolution(v, facts) for v in node.inputs)


def _convolution(value: AnyValue, facts: Facts) -> Node | None:
    for _ in range(_LONGEST):
        node = facts.producer(value)
        if node is None or node.domain != "":
            return None
        if node.op == "Conv":
            return node
        known = [facts.constant(v) is not None for v in node.inputs]
        if node.op not in ("Add", "Sub", "Mul", "Div") or known.count(False) != 1:
            return None
        value = node.inputs[known.index(False)]
    return None


def _merged(
    node: Node, convolutions: tuple[Node | None, ...], transfer: Transfer
) -> _Sum | Refusal | None:
    signs = (1.0, -1.0 if node.op == "Sub" else 1.0)
    one, other = convolutions
    if one is not None and other is not None and one.inputs[0] is other.inputs[0]:
        found = _both((one, other), signs, node, transfer)
        return Refusal(found, one.label, node=node) if isinstance(found, str) else found
    for at, conv in enumerate(convolutions):
        if conv is None:
            continue
        found = _with_map(conv, at, signs, node, transfer)
        if found is not None:
            return Refusal(found, conv.label, node=node) if isinstance(found, str) else found
    return None


def _branch(
    conv: Node, value: AnyValue, sign: float, reader: Node, transfer: Transfer
) -> _Branch | str | None:
    """A convolution and what is done with its result; None where that is no map per channel."""
    facts, label, output = transfer.facts, conv.label, conv.outputs[0]
    weight = facts.constant(conv.inputs[1])
    if weight is None or not is_real(weight.dtype) or len(weight.shape) < 3:
        return f"the weight of '{label}' is not constant"
    if conv.parametric or conv.scope is not reader.scope:
        return f"'{label}' is of another body, or has a parameter of the function"
    if (why := facts.pinned(output)) is not None:
        return f"'{output.name}' is {why}"
    if len(facts.uses(output)) != 1:
        return f"'{output.name}' has other readers"
    layout = Layout.whole_axes([1 - len(weight.shape)], [weight.shape[0]])
    mapped = map_chain(value, reader, layout, transfer).get(output)
    if mapped is None:
        return None
    if facts.readers(weight) > 1:
        return f"'{weight.name}' has other readers"
    place = bias_of(conv, facts)
    if isinstance(place, str):
        return f"'{label}' {place}"
    automatic = conv.text("auto_pad", "NOTSET")
    if automatic not in ("NOTSET", "", "VALID"):
        return f"'{label}' pads by {automatic}"
    none = (0,) * (2 * len(weight.shape) - 4)
    pads = none if automatic == "VALID" else conv.attrs.get("pads", none)
    bias = np.zeros(weight.shape[0]) if place.constant is None else place.constant.float64()
    if bias.shape != weight.shape[:1]:
        return f"'{label}' has a bias that does not fit"
    scale, shift, nodes = mapped
    nodes, total = (conv, *nodes), sign * (scale * bias + shift)
    return _Branch(conv, nodes, sign * scale, weight, total, tuple(pads))


def _both(
    convolutions: tuple[Node, Node], signs: tuple[float, float], reader: Node, transfer: Transfer
) -> _Sum | str | None:
    branches = []
    for conv, value, sign in zip(convolutions, reader.inputs, signs, strict=True):
        branch = _branch(conv, value, sign, reader, transfer)
        if not isinstance(branch, _Branch):
            return branch
        branches.append(branch)
    large, small = sorted(branches, key=lambda b: int(np.prod(b.kernel)), reverse=True)
    told = f"'{convolutions[0].label}' and '{convolutions[1].label}' have"
    if large.strides != small.strides or large.groups != small.groups:
        return f"{told} other strides or groups"
    if large.weight.dtype != small.weight.dtype:
        return f"{told} other types"
    if large.weight.shape[:2] != small.weight.shape[:2]:
        return f"{told} weights of other shapes"
    start = _offset(large, small.kernel, small.dilations, small.pads)
    if start is None:
        return f"{told} kernels of which none lies inside the other"
    weight = large.scaled()
    inner = tuple(slice(o, o + n) for o, n in zip(start, small.kernel, strict=True))
    weight[(slice(None), slice(None), *inner)] += small.scaled()
    return _rounded(large, (*large.nodes, *small.nodes), weight, large.bias + small.bias)


def _offset(
    large: _Branch, kernel: tuple[int, ...], dilations: tuple[int, ...], pads: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Where a small kernel lies in the large one; None where they read other pixels.

    Tap j of either reads position p * stride - pad + j * dilation, and both make as many.
    """
    space, found = len(large.kernel), []
    for at, (size, inner) in enumerate(zip(large.kernel, kernel, strict=True)):
        step = large.dilations[at]
        before, behind = (large.pads[i] - pads[i] for i in (at, space + at))
        if inner > 1 and step != dilations[at]:
            return None
        start = before // step if step else 0
        reach = step * (size - inner)
        if start * step != before or before + behind != reach or not 0 <= start <= size - inner:
            return None
        found.append(start)
    return tuple(found)


def _with_map(
    conv: Node, at: int, signs: tuple[float, float], reader: Node, transfer: Transfer
) -> _Sum | str | None:
    weight, rank = transfer.facts.constant(conv.inputs[1]), transfer.rank(conv.outputs[0])
    if weight is None or rank is None or len(weight.shape) != rank or rank < 3 or conv.parametric:
        return None
    outputs, channels = weight.shape[0], weight.shape[1] * int(conv.attrs.get("group", 1))
    layout = Layout.whole_axes([1 - rank], [channels])
    found = map_chain(reader.inputs[1 - at], reader, layout, transfer).get(conv.inputs[0])
    if found is None:
        return None
    branch = _branch(conv, reader.inputs[at], signs[at], reader, transfer)
    if not isinstance(branch, _Branch):
        return branch
    scale, shift, nodes = found
    if channels != outputs:
        return f"'{conv.label}' makes {outputs} channels of {channels}"
    space = rank - 2
    start = _offset(branch, (1,) * space, (0,) * space, (0,) * (2 * space))
    if start is None or any(n != 1 for n in branch.strides):
        return f"'{conv.label}' makes another image, or reads none of the pixels that it makes"
    new, rows = branch.scaled(), np.arange(outputs)
    place: tuple[Any, ...] = (rows, rows % weight.shape[1], *start)
    new[place] += signs[1 - at] * scale
    return _rounded(branch, (*branch.nodes, *nodes), new, branch.bias + signs[1 - at] * shift)


def _rounded(like: _Branch, nodes: tuple[Node, ...], weight: Vector, bias: Vector) -> _Sum | str:
    dtype: np.dtype[Any] = like.weight.dtype
    arrays = rounded(weight, dtype), rounded(bias, dtype)
    if not all(np.isfinite(a.astype(np.float64)).all() for a in arrays):
        return f"the sum is not finite in {dtype}"
    given = any(len(n.inputs) > 2 and n.inputs[2].name for n in nodes if n.op == "Conv")
    return _Sum(like.node, nodes, arrays[0], arrays[1] if given or bias.any() else None)
