"""Merge a batch normalization with a multiple of what it reads.

    BN(x) + alpha x  ->  BN'(x)        gamma' = gamma + alpha sqrt(variance + eps)
                                       beta'  = beta + alpha mean

so that (s + alpha) x + t stands there once, for other passes to fold; s = gamma / sqrt(variance +
eps), t = beta - s mean. This is RepBN, what PRepBN is at inference; alpha is a number or one for
each channel, and 1 for x itself. The shift takes no part in alpha: where the result is folded, its
bias keeps alpha b, which is easily forgotten. Exact over the reals; gamma' and beta' are formed in
float64 and rounded once. Source: SLAB (arXiv:2405.11582) and the definition of BatchNormalization
in the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node
from onnxnorm.norm_operators import DEFAULT_EPSILON, unfixed_reason
from onnxnorm.port import is_real, rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter


@dataclass(frozen=True)
class MergeParallelNorms(Pass):
    """Write BN(x) + alpha x as one BatchNormalization."""

    name: ClassVar = "merge-parallel-norms"
    summary: ClassVar = "BatchNormalization and a multiple of its input into one"
    equation: ClassVar = "BN(x) + alpha x -> BN'(x)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every sum of a batch normalization with a multiple of its input."""
        for node in facts.module.nodes():
            if node.op == "Add" and not node.domain and len(node.inputs) == 2:
                found = _sum(node, facts)
                if isinstance(found, Refusal):
                    yield found
                elif found is not None:
                    nodes = (node, found.norm, *found.scaling)
                    anchors = (found.norm.outputs[0],)
                    yield Plan(node, nodes, found, anchors=anchors)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """The same operator with another gamma and beta."""
        found: _Sum = plan.detail
        gamma, beta = rw.constant("weight", found.gamma), rw.constant("bias", found.beta)
        norm = found.norm
        rw.replace_like(norm, [norm.inputs[0], gamma, beta, *norm.inputs[3:5]])


@dataclass(frozen=True, eq=False)
class _Sum:
    norm: Node
    scaling: tuple[Node, ...]
    gamma: NDArray[Any]
    beta: NDArray[Any]


def _sum(node: Node, facts: Facts) -> _Sum | Refusal | None:
    for value, other in (node.inputs, node.inputs[::-1]):
        norm = facts.producer(value)
        if norm is None or norm.op != "BatchNormalization" or norm.domain:
            continue
        scaled = _scaled(other, norm, facts)
        if scaled is None or norm.scope is not node.scope:
            continue
        reason = _why_not(norm, value, scaled, facts)
        if reason is not None:
            return Refusal(reason, norm.label, node=node)
        return _merged(norm, node, scaled, facts)
    return None


@dataclass(frozen=True, eq=False)
class _Scaled:
    factor: NDArray[np.float64]  # as it is broadcast
    nodes: tuple[Node, ...]


def _scaled(value: AnyValue, norm: Node, facts: Facts) -> _Scaled | None:
    """A value as a constant times the input of the norm."""
    if value is norm.inputs[0]:
        return _Scaled(np.ones(()), ())
    made = facts.producer(value)
    if made is None or made.op != "Mul" or made.domain or made.scope is not norm.scope:
        return None
    for base, factor in (made.inputs, made.inputs[::-1]):
        constant = facts.constant(factor)
        if base is norm.inputs[0] and constant is not None and is_real(constant.dtype):
            return _Scaled(constant.float64(), (made,))
    return None


def _why_not(norm: Node, value: AnyValue, scaled: _Scaled, facts: Facts) -> str | None:
    if reason := unfixed_reason(norm):
        return reason
    for each in (value, *(n.outputs[0] for n in scaled.nodes)):
        if (pinned := facts.pinned(each)) is not None:
            return f"'{each.name}' is {pinned}"
        if len(facts.uses(each)) != 1:
            return f"'{each.name}' has other readers"
    return None


def _merged(norm: Node, node: Node, scaled: _Scaled, facts: Facts) -> _Sum | Refusal:
    def no(reason: str) -> Refusal:
        return Refusal(reason, norm.label, node=node)

    constants = [facts.constant(v) for v in norm.inputs[1:5]]
    known = [c for c in constants if c is not None and is_real(c.dtype) and len(c.shape) == 1]
    if len(known) != 4 or len({c.shape for c in known}) != 1:
        return no("its parameters are not four constants, one number for each channel")
    (channels,) = known[0].shape
    ranked = facts.type(norm.inputs[0])
    if ranked is None or ranked.shape is None or len(ranked.shape) < 2:
        return no(f"the rank of '{norm.inputs[0].name}' is not known")
    rank = len(ranked.shape)
    factor = scaled.factor
    full = (1,) * (rank - factor.ndim) + factor.shape
    if factor.ndim > rank or any(n != 1 for a, n in enumerate(full) if a != 1):
        return no("the factor does not vary over the channels alone")
    if factor.size not in (1, channels):
        return no(f"the factor is not one for each of {channels} channels")
    alpha = factor.reshape(-1)
    gamma, beta, mean, variance = (c.float64() for c in known)
    epsilon = float(norm.attrs.get("epsilon", DEFAULT_EPSILON))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
        new = (
            rounded(gamma + alpha * np.sqrt(variance + epsilon), known[0].dtype),
            rounded(beta + alpha * mean, known[1].dtype),
        )
    if not all(np.isfinite(a.astype(np.float64)).all() for a in new):
        return no(f"gamma or beta of the sum is not finite in {known[0].dtype}")
    return _Sum(norm, scaled.nodes, new[0], new[1])
