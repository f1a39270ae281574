"""Fold what is constant in a modulation into the convolutions that modulate.

    BN(x) * (1 + G(h)) + B(h)  ->  x * G'(h) + B'(h)
        G' = s (1 + G):   W' = s W_G,            b' = s (b_G + 1)
        B' = B + t (1 + G):  W' = W_B + t W_G,   b' = b_B + t (b_G + 1)       BN(x) = s x + t

In a SPADE layer a norm without factors is scaled and shifted by two convolutions G and B of a map
h. The 1 is a part of the bias of G; a batch normalization, which no convolution in front of it can
take where a residual branch reads the same x, goes into both, however they pad, since they read the
same h in the same way. Exact over the reals; in float64 and rounded once. Source: SPADE
(arXiv:1903.07291) and the definitions of these operators in the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.passes.fold_affine import Affine, read
from onnxnorm.port import Port, rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Transfer

_SAME: Final = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@dataclass(frozen=True)
class FoldModulation(Pass):
    """Remove the batch normalization and the 1 of a modulation."""

    name: ClassVar = "fold-modulation"
    summary: ClassVar = "BatchNormalization and the 1 of a modulation into its convolutions"
    equation: ClassVar = "BN(x) (1 + G(h)) + B(h) -> x G'(h) + B'(h)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every constant that is added to a convolution's factors, and every modulated norm."""
        for node in facts.module.nodes():
            if node.op == "Add" and not node.domain and len(node.inputs) == 2:
                found = _offset(node, facts)
                if found is not None:
                    conv = found.port.node
                    yield Plan(node, (node, conv), found, into=conv.op)
        transfer = Transfer(facts, find_sizes(facts))
        for norm in find_norms(facts):
            if norm.kind not in ("batch_norm", "channel_affine") or not norm.recognised:
                continue
            modulation = _modulated(norm, facts)
            if modulation is None:
                continue
            affine = read(norm, transfer)
            if isinstance(affine, str):
                yield Refusal(affine, norm.node.label, node=norm.node)
                continue
            change = _change(norm, modulation, affine, facts)
            if isinstance(change, Refusal):
                yield change
            else:
                nodes = (*norm.nodes, change.factor.node, change.term.node)
                inside = (modulation.product, modulation.sum)
                outputs = (modulation.sum.outputs[0],)
                yield Plan(norm.node, nodes, change, inside=inside, outputs=outputs, into="Conv")

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Give the convolutions their new constants."""
        found: _Offset | _Change = plan.detail
        if isinstance(found, _Offset):
            conv = found.port.node
            rw.replace_like(conv, [*conv.inputs[:2], rw.constant("bias", found.bias)])
            return
        for port, weight, bias in (
            (found.factor, found.factor_weight, found.factor_bias),
            (found.term, found.term_weight, found.term_bias),
        ):
            name = port.node.outputs[0].name
            new = rw.constant("weight", weight, at=port.node, name=f"{name}_weight")
            rw.rewire(port.node, 1, new)
            made = rw.constant("bias", bias, at=port.node, name=f"{name}_bias")
            rw.rewire(port.node, 2, made)
        rw.redirect(found.norm.output, found.norm.input)


# ** the 1 **


@dataclass(frozen=True, eq=False)
class _Offset:
    port: Port
    bias: NDArray[Any]


def _offset(node: Node, facts: Facts) -> _Offset | None:
    """An Add of a constant to a convolution's result, which a Mul reads as its factor."""
    for value, other in (node.inputs, node.inputs[::-1]):
        conv, constant = facts.producer(value), facts.constant(other)
        if conv is None or conv.op != "Conv" or conv.domain or constant is None:
            continue
        if conv.scope is not node.scope or facts.pinned(value) is not None:
            return None
        if len(facts.uses(value)) != 1:
            return None
        if not any(u.node.op == "Mul" for u in facts.uses(node.outputs[0])):
            return None
        port = Port.of(conv, facts)
        if isinstance(port, str) or constant.dtype != port.weight.dtype:
            return None
        shift = _per_channel(constant, port.features, len(port.weight.shape))
        if shift is None:
            return None
        bias = port.shifted(np.ones(port.features), shift)
        return _Offset(port, bias) if np.isfinite(bias.astype(np.float64)).all() else None
    return None


def _per_channel(constant: Constant, features: int, rank: int) -> NDArray[np.float64] | None:
    """One number for each channel of a tensor of this rank; None where it varies elsewhere."""
    shape = constant.shape
    if len(shape) > rank:
        return None
    full = (1,) * (rank - len(shape)) + tuple(shape)
    if any(n != 1 for a, n in enumerate(full) if a != 1) or full[1] not in (1, features):
        return None
    return np.broadcast_to(constant.float64().reshape(-1), (features,))


# ** the norm **


@dataclass(frozen=True, eq=False)
class _Modulation:
    factor: Node
    term: Node
    product: Node
    sum: Node


@dataclass(frozen=True, eq=False)
class _Change:
    norm: Norm
    factor: Port
    factor_weight: NDArray[Any]
    factor_bias: NDArray[Any]
    term: Port
    term_weight: NDArray[Any]
    term_bias: NDArray[Any]


def _modulated(norm: Norm, facts: Facts) -> _Modulation | None:
    """The two convolutions that scale and shift the result of a norm."""
    product = _only_reader(norm.output, "Mul", facts)
    if product is None:
        return None
    factor = _convolution(_other(product, norm.output), facts)
    total = _only_reader(product.outputs[0], "Add", facts)
    if factor is None or total is None:
        return None
    term = _convolution(_other(total, product.outputs[0]), facts)
    if term is None or any(n.scope is not norm.node.scope for n in (factor, term)):
        return None
    return _Modulation(factor, term, product, total)


def _only_reader(value: AnyValue, op: str, facts: Facts) -> Node | None:
    uses = facts.uses(value)
    if len(uses) != 1 or facts.pinned(value) is not None:
        return None
    node = uses[0].node
    return node if node.op == op and not node.domain and len(node.inputs) == 2 else None


def _other(node: Node, value: AnyValue) -> AnyValue:
    first, second = node.inputs
    other: AnyValue = second if first is value else first
    return other


def _convolution(value: AnyValue, facts: Facts) -> Node | None:
    made = facts.producer(value)
    return made if made is not None and made.op == "Conv" and not made.domain else None


def _change(norm: Norm, found: _Modulation, affine: Affine, facts: Facts) -> _Change | Refusal:
    def no(reason: str, at: Node) -> Refusal:
        return Refusal(reason, at.label, node=norm.node)

    ports = []
    for node in (found.factor, found.term):
        port = Port.of(node, facts)
        if isinstance(port, str):
            return no(port, node)
        result = node.outputs[0]
        if len(facts.uses(result)) != 1 or facts.pinned(result) is not None:
            return no(f"'{result.name}' has other readers", node)
        if port.features != affine.scale.size:
            return no(f"'{node.label}' has {port.features} features", node)
        ports.append(port)
    factor, term = ports
    rank = len(factor.weight.shape)
    if affine.layout.axes != (1 - rank,):
        return no("the norm is not over the channels of the convolutions", norm.node)
    same = found.factor.inputs[0] is found.term.inputs[0] and factor.weight.shape == (
        term.weight.shape
    )
    if not same or any(found.factor.attrs.get(a) != found.term.attrs.get(a) for a in _SAME):
        reason = f"'{found.factor.label}' and '{found.term.label}' do not read the same in one way"
        return no(reason, found.term)
    dtypes = {p.weight.dtype for p in ports}
    if len(dtypes) != 1:
        return no("the convolutions have weights of two types", found.term)
    (dtype,) = dtypes
    scale, shift = (v.reshape(-1, *(1,) * (rank - 1)) for v in (affine.scale, affine.shift))
    weights = [p.weight.float64() for p in ports]
    biases = [np.zeros(p.features) if p.bias is None else p.bias.float64() for p in ports]
    made = (
        rounded(scale * weights[0], dtype),
        rounded(affine.scale * biases[0], dtype),
        rounded(weights[1] + shift * weights[0], dtype),
        rounded(biases[1] + affine.shift * biases[0], dtype),
    )
    if not all(np.isfinite(a.astype(np.float64)).all() for a in made):
        return no(f"a folded weight is not finite in {dtype}", found.factor)
    return _Change(norm, factor, made[0], made[1], term, made[2], made[3])
