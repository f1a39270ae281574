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
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.norm_operators import DEFAULT_EPSILON, unfixed_reason
from onnxnorm.norms import Norm, find_norms
from onnxnorm.port import is_real, rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter

Vector: TypeAlias = NDArray[np.float64]

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
                    yield Plan(node, (node, found.conv), found, into="Conv")
        for norm in find_norms(facts):
            if norm.kind not in ("batch_norm", "channel_affine") or not norm.recognised:
                continue
            modulation = _modulated(norm, facts)
            if modulation is None:
                continue
            change = _change(norm, modulation, facts)
            if isinstance(change, Refusal):
                yield change
            else:
                nodes = (*norm.nodes, change.factor, change.term)
                inside = (modulation.product, modulation.sum)
                outputs = (modulation.sum.outputs[0],)
                yield Plan(norm.node, nodes, change, inside=inside, outputs=outputs, into="Conv")

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Give the convolutions their new constants."""
        found: _Offset | _Change = plan.detail
        if isinstance(found, _Offset):
            made = rw.constant("bias", found.bias)
            rw.replace_like(found.conv, [*found.conv.inputs[:2], made])
            return
        for conv, weight, bias in (
            (found.factor, found.factor_weight, found.factor_bias),
            (found.term, found.term_weight, found.term_bias),
        ):
            name = conv.outputs[0].name
            made = rw.constant("weight", weight, at=conv, name=f"{name}_weight")
            rw.rewire(conv, 1, made)
            made = rw.constant("bias", bias, at=conv, name=f"{name}_bias")
            rw.rewire(conv, 2, made)
        rw.redirect(found.norm.output, found.norm.input)


# ** a convolution **


@dataclass(frozen=True, eq=False)
class _Constants:
    weight: Constant
    bias: NDArray[np.float64]

    @property
    def features(self) -> int:
        return self.weight.shape[0]


def _constants(conv: Node, facts: Facts) -> _Constants | str:
    """The weight and bias of a Conv, or why they cannot be changed."""
    weight = facts.constant(conv.inputs[1])
    if weight is None:
        name = conv.inputs[1].name
        return f"weight '{name}' is not constant: {facts.why_not_constant(conv.inputs[1])}"
    if not is_real(weight.dtype) or len(weight.shape) < 3:
        return f"weight '{weight.name}' is no weight of a Conv that can be changed"
    if len(conv.inputs) < 3 or not conv.inputs[2].name:
        return _Constants(weight, np.zeros(weight.shape[0]))
    bias = facts.constant(conv.inputs[2])
    if bias is None:
        name = conv.inputs[2].name
        return f"bias '{name}' is not constant: {facts.why_not_constant(conv.inputs[2])}"
    if bias.shape != weight.shape[:1] or not is_real(bias.dtype):
        return f"bias '{bias.name}' of shape {list(bias.shape)} is not one of this Conv"
    return _Constants(weight, bias.float64())


# ** the 1 **


@dataclass(frozen=True, eq=False)
class _Offset:
    conv: Node
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
        known = _constants(conv, facts)
        if isinstance(known, str) or constant.dtype != known.weight.dtype:
            return None
        shift = _per_channel(constant, known.features, len(known.weight.shape))
        if shift is None:
            return None
        bias = rounded(known.bias + shift, known.weight.dtype)
        return _Offset(conv, bias) if np.isfinite(bias.astype(np.float64)).all() else None
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
    factor: Node
    factor_weight: NDArray[Any]
    factor_bias: NDArray[Any]
    term: Node
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
    if not facts.alone(value):
        return None
    node = facts.uses(value)[0].node
    return node if node.op == op and not node.domain and len(node.inputs) == 2 else None


def _other(node: Node, value: AnyValue) -> AnyValue:
    first, second = node.inputs
    other: AnyValue = second if first is value else first
    return other


def _convolution(value: AnyValue, facts: Facts) -> Node | None:
    made = facts.producer(value)
    return made if made is not None and made.op == "Conv" and not made.domain else None


def _map(norm: Norm, facts: Facts, features: int, rank: int) -> tuple[Vector, Vector] | str:
    """(s, t) of a norm that is s x + t for each channel."""
    if not norm.operator:
        parts = []
        for given, neutral in ((norm.gamma, 1.0), (norm.beta, 0.0)):
            array = np.asarray(neutral) if given is None else given
            if not isinstance(array, np.ndarray) or array.ndim > rank:
                return "its factors are not constant"
            full = array.reshape((1,) * (rank - array.ndim) + array.shape)
            if any(n != 1 for a, n in enumerate(full.shape) if a != 1) or full.size not in (
                1,
                features,
            ):
                return "it does not vary over the channels alone"
            parts.append(np.broadcast_to(full.astype(np.float64).reshape(-1), (features,)))
        return parts[0], parts[1]
    node = norm.node
    if reason := unfixed_reason(node):
        return reason
    found = [facts.constant(v) for v in node.inputs[1:5]]
    known = [c.float64() for c in found if c is not None and c.shape == (features,)]
    if len(known) != 4:
        return f"its parameters are not four constants of {features} channels"
    gamma, beta, mean, variance = known
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # the caller looks
        scale = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", DEFAULT_EPSILON)))
        return scale, beta - mean * scale


def _change(norm: Norm, found: _Modulation, facts: Facts) -> _Change | Refusal:
    def no(reason: str, at: Node) -> Refusal:
        return Refusal(reason, at.label, node=norm.node)

    known: list[_Constants] = []
    for node in (found.factor, found.term):
        constants = _constants(node, facts)
        if isinstance(constants, str):
            return no(constants, node)
        result = node.outputs[0]
        if not facts.alone(result):
            return no(f"'{result.name}' has other readers", node)
        known.append(constants)
    factor, term = known
    same = found.factor.inputs[0] is found.term.inputs[0]
    same = same and factor.weight.shape == term.weight.shape
    if not same or any(found.factor.attrs.get(a) != found.term.attrs.get(a) for a in _SAME):
        reason = f"'{found.factor.label}' and '{found.term.label}' do not read the same in one way"
        return no(reason, found.term)
    if factor.weight.dtype != term.weight.dtype:
        return no("the convolutions have weights of two types", found.term)
    dtype, rank = factor.weight.dtype, len(factor.weight.shape)
    ranked = facts.type(norm.input)
    if ranked is None or ranked.shape is None or len(ranked.shape) != rank:
        return no(f"the rank of '{norm.input.name}' is not that of the convolutions", norm.node)
    read = _map(norm, facts, factor.features, rank)
    if isinstance(read, str):
        return no(read, norm.node)
    scale, shift = read
    wide = (-1, *(1,) * (rank - 1))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
        weights = [c.weight.float64() for c in known]
        made = (
            rounded(scale.reshape(wide) * weights[0], dtype),
            rounded(scale * factor.bias, dtype),
            rounded(weights[1] + shift.reshape(wide) * weights[0], dtype),
            rounded(term.bias + shift * factor.bias, dtype),
        )
    if not all(np.isfinite(a.astype(np.float64)).all() for a in made):
        return no(f"a folded weight is not finite in {dtype}", found.factor)
    return _Change(norm, found.factor, made[0], made[1], found.term, made[2], made[3])
