"""Merge a static low-rank adapter into the weight that it adapts.

    x W + c (x A) B  ->  x (W + c A B)

LoRA leaves its two thin matrices in the graph, where they cost two more products and an Add for
each adapted layer. To be asked for: somebody may want to exchange the adapter later. The sum is
formed in float64 and rounded once. Exact over the reals; in floating point the small product is no
longer rounded by itself, and it takes part in the rounding of W. Source: LoRA (arXiv:2106.09685).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.port import is_real, rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter


@dataclass(frozen=True)
class MergeAdapters(Pass):
    """Add the product of an adapter to the weight beside it.

    Attributes:
        max_copy_mb: A weight that others read too is copied; refuse copies larger than this.
    """

    max_copy_mb: int = 256

    name: ClassVar = "merge-adapters"
    summary: ClassVar = "static low-rank adapters into the weights they adapt"
    equation: ClassVar = "x W + c (x A) B -> x (W + c A B)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every sum of a MatMul with a chain of MatMuls of the same value."""
        for node in facts.module.nodes():
            if node.op != "Add" or node.domain or len(node.inputs) != 2:
                continue
            for base, side in (node.inputs, node.inputs[::-1]):
                found = _adapter(node, base, side, facts)
                if found is None:
                    continue
                refusal = self._refused(found, node, facts)
                linear = found.linear
                nodes = (node, linear, *found.nodes)
                yield refusal or Plan(node, nodes, found, outputs=_behind(node, facts),
                                      inside=_readers(node, facts), into="MatMul")  # fmt: skip
                break

    def _refused(self, found: _Adapter, node: Node, facts: Facts) -> Refusal | None:
        weight = found.weight
        if (pinned := facts.pinned(node.outputs[0])) is not None:
            return Refusal(f"'{node.outputs[0].name}' is {pinned}", node.label, node=node)
        if facts.readers(weight) > 1 and weight.nbytes > self.max_copy_mb * 1_000_000:
            size = f"{weight.nbytes / 1e6:.0f} MB"
            reason = f"'{weight.name}' has other readers and a copy takes {size}"
            return Refusal(reason, node.label, "Raise merge-adapters{max_copy_mb=...}.", node)
        if not np.isfinite(found.merged().astype(np.float64)).all():
            reason = f"the merged weight is not finite in {weight.dtype}"
            return Refusal(reason, found.linear.label, node=node)
        return None

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Another weight, and the sum is gone."""
        found: _Adapter = plan.detail
        linear = found.linear
        name = f"{linear.outputs[0].name}_weight"
        rw.rewire(linear, 1, rw.constant("weight", found.merged(), at=linear, name=name))
        rw.redirect(plan.root.outputs[0], found.base)


@dataclass(frozen=True, eq=False)
class _Adapter:
    base: AnyValue
    linear: Node
    weight: Constant
    nodes: tuple[Node, ...]
    scale: float
    factors: tuple[Constant, ...]  # in the order in which x is multiplied by them

    def merged(self) -> NDArray[Any]:
        product = self.factors[0].float64()
        for factor in self.factors[1:]:
            product = product @ factor.float64()
        with np.errstate(over="ignore", invalid="ignore"):  # the plan looks
            return rounded(self.weight.float64() + self.scale * product, self.weight.dtype)


def _readers(node: Node, facts: Facts) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(u.node for u in facts.uses(node.outputs[0])))


def _behind(node: Node, facts: Facts) -> tuple[AnyValue, ...]:
    outputs = (v for n in _readers(node, facts) for v in n.outputs if v.name)
    return tuple(dict.fromkeys(outputs))


def _adapter(node: Node, base: AnyValue, side: AnyValue, facts: Facts) -> _Adapter | None:
    linear = facts.producer(base)
    if linear is not None and linear.op == "Add" and not linear.domain:
        # Its bias stays behind it.
        bias = [v for v in linear.inputs if facts.constant(v) is not None]
        rest = [v for v in linear.inputs if facts.constant(v) is None]
        if len(bias) != 1 or len(rest) != 1 or not facts.alone(base):
            return None
        linear, base_product = facts.producer(rest[0]), rest[0]
    else:
        base_product = base
    if linear is None or linear.op != "MatMul" or linear.domain or linear.scope is not node.scope:
        return None
    weight = _matrix(linear, facts)
    if weight is None or not facts.alone(base_product):
        return None
    scale, factors, nodes = 1.0, list[Constant](), list[Node]()
    at = side
    while at is not linear.inputs[0]:
        made = facts.producer(at)
        if made is None or made.domain or made.scope is not node.scope:
            return None
        if not facts.alone(at):
            return None
        nodes.append(made)
        if made.op in ("Mul", "Div") and (step := _scalar(made, facts)) is not None:
            at, factor = step
            scale *= factor
        elif made.op == "MatMul" and (factor_matrix := _matrix(made, facts)) is not None:
            factors.insert(0, factor_matrix)
            at = made.inputs[0]
        elif made.op == "Identity":
            at = made.inputs[0]
        else:
            return None
    shapes = [f.shape for f in factors]
    fits = len(shapes) > 1 and (shapes[0][0], shapes[-1][1]) == weight.shape
    fits = fits and all(a[1] == b[0] for a, b in itertools.pairwise(shapes))
    if not fits or len({c.dtype for c in (weight, *factors)}) != 1:
        return None
    return _Adapter(base, linear, weight, tuple(nodes), scale, tuple(factors))


def _matrix(node: Node, facts: Facts) -> Constant | None:
    constant = facts.constant(node.inputs[1])
    known = constant is not None and len(constant.shape) == 2 and is_real(constant.dtype)
    return constant if known else None


def _scalar(node: Node, facts: Facts) -> tuple[AnyValue, float] | None:
    """What a Mul or Div multiplies, and by which number."""
    pairs = [(node.inputs[0], node.inputs[1])]
    if node.op == "Mul":
        pairs.append((node.inputs[1], node.inputs[0]))
    for value, other in pairs:
        constant = facts.constant(other)
        if constant is not None and constant.shape in ((), (1,)) and is_real(constant.dtype):
            number = float(constant.float64().reshape(-1)[0])
            if node.op == "Div" and not number:
                return None
            return value, number if node.op == "Mul" else 1.0 / number
    return None
