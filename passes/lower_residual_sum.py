"""Write the residual Add in front of a layer norm so that onnxruntime's CPU keeps the two apart.

    LayerNormalization(Add(a, b))  ->  LayerNormalization(Sum(a, b))

When it loads a model onnxruntime fuses an Add that a layer norm alone reads with it, into
SkipLayerNormalization, and on the CPU that operator takes several times as long as the two (see
docs/targets.md). A Sum of two is the same additions by the same loop, and no part of that pattern.
For `ort-cpu` alone; the same numbers, bit for bit. An Add of what is looked up in a table stays,
since with it onnxruntime makes EmbedLayerNormalization.

Source: onnxruntime's SkipLayerNormFusion and EmbedLayerNormFusion, and the definition of Sum in the
ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import onnx

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes

_RANK: Final = 3  # of the operands that onnxruntime fuses
_SINCE: Final = 8  # the opset from which on Sum broadcasts, as Add does


@dataclass(frozen=True)
class LowerResidualSum(Pass):
    """Write the Add in front of a layer norm as a Sum.

    Attributes:
        target: `onnx`, `ort-cpu` or `ort-cuda`; given by --target.
    """

    target: str = "onnx"

    name: ClassVar = "lower-residual-sum"
    summary: ClassVar = "a residual Add is kept apart from its layer norm (--target ort-cpu)"
    equation: ClassVar = "LayerNormalization(Add(a, b)) -> LayerNormalization(Sum(a, b))"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every Add of float32 that a layer norm and nobody else reads."""
        if self.target != "ort-cpu":
            return
        for norm in facts.module.nodes():
            if norm.op != "LayerNormalization" or norm.domain or not norm.inputs:
                continue
            add = facts.producer(norm.inputs[0])
            if add is None or add.op != "Add" or add.domain or len(add.inputs) != 2:
                continue
            if not _is_fused(add, facts) or add.scope.opsets.get("", 0) < _SINCE:
                continue
            if any(_is_looked_up(value, facts) for value in add.inputs):
                reason = "onnxruntime makes EmbedLayerNormalization of it and what looks up a table"
                yield Refusal(reason, add.label, node=add, kept=True)
                continue
            yield Plan(add, (add,), None, action="lowered", into="Sum")

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """The same operands."""
        rw.replace("Sum", list(plan.root.inputs))


def _is_fused(add: Node, facts: Facts) -> bool:
    """Whether onnxruntime would fuse an Add with the norm behind it, as far as is known here."""
    known = facts.type(add.outputs[0])
    if known is None or known.element != onnx.TensorProto.FLOAT:
        return False
    dims = find_sizes(facts).of(add.outputs[0])
    return facts.alone(add.outputs[0]) and (dims is None or len(dims) == _RANK)


def _is_looked_up(value: AnyValue, facts: Facts) -> bool:
    """Whether a value is a row of a table, or the sum of two, of words and of positions."""
    made = facts.producer(value)
    if made is None or made.domain:
        return False
    if made.op == "Add":
        return any(_is_row(facts.producer(each), facts) for each in made.inputs)
    return _is_row(made, facts)


def _is_row(node: Node | None, facts: Facts) -> bool:
    if node is None or node.op != "Gather" or node.domain:
        return False
    return facts.constant(node.inputs[0]) is not None
