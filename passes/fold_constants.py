"""Compute once what a graph computes of constants in every run.

    f(W, c)  ->  the tensor that it is

Weight standardization, scaled weight standardization, weight norm, sigma-Reparam, a weight
compander, row-normalized weights, the shape of what has a known shape: arithmetic that an exporter
left in the graph although none of it depends on an input. It is done in float64 and rounded once to
the type of the result, integers exactly; sizes of axes are taken from the graph's inputs and
weights, and not from what a file states of values in between. Random operators, operators with
bodies, what a quantizer wrote and calls of other domains stay, and so does what would let the file
grow. onnxruntime does the same whenever it loads a model, so this gains nothing in latency; it
makes the file and the time to load it smaller, and shows the weights to the passes behind it.
Exact over the reals. Source: the definitions of the operators in the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from onnxnorm.constants import Computed, Constants, Unknown, find_constants
from onnxnorm.facts import Facts
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter

_SLACK: Final = 64 << 10  # bytes that any file may grow by: shapes, scalars, small tables


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace what is computed of constants by its value.

    Attributes:
        max_growth: How many times its bytes a file may have after this pass; 64 kB more are free.
        max_mb: The largest tensor that is stored in the place of its nodes.
    """

    max_growth: float = 1.05
    max_mb: int = 256

    name: ClassVar = "fold-constants"
    summary: ClassVar = "arithmetic on weights and known shapes, done once"
    equation: ClassVar = "f(constants) -> a constant"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every value that is computed of constants and read by what is not."""
        found = find_constants(facts)
        for node, reason in found.refused():
            kept = node.op == "DequantizeLinear"
            yield Refusal(reason, node.label, node=node, kept=kept)
        room = self._room(facts)
        for value in found.results():
            root = facts.producer(value)
            assert root is not None, "a node computes it"
            pinned = facts.pinned(value)
            if pinned is not None:
                yield Refusal(f"'{value.name}' is {pinned}", root.label, node=root)
                continue
            try:
                computed = found.computed(value)
            except Unknown as reason:
                yield Refusal(str(reason), reason.node.label, node=root)
                continue
            if computed.nbytes > self.max_mb * 1_000_000:
                yield self._large(f"it takes {computed.nbytes / 1e6:.0f} MB", "max_mb", computed)
                continue
            growth = computed.nbytes - computed.freed
            if growth > max(room, 0):
                grown = f"the file would grow by {growth / 1e6:.1f} MB"
                yield self._large(grown, "max_growth", computed)
                continue
            room -= growth
            readers = [use.node for use in facts.uses(value)]
            yield Plan(
                root,
                computed.nodes,
                (found, computed),
                inside=tuple(dict.fromkeys((*readers, *found.origin(value)))),
                outputs=tuple(dict.fromkeys(v for n in readers for v in n.outputs if v.name)),
                into="constant",
            )

    def _room(self, facts: Facts) -> float:
        """Bytes that the file may still grow by: one budget for all rounds, whoever spent of it."""
        before = facts.module.bytes_read
        weights = (w for scope in facts.module.scopes for w in scope.weights)
        now = sum(c.nbytes for w in weights if (c := facts.constant(w)) is not None)
        return max(self.max_growth * before, before + _SLACK) - now

    def _large(self, reason: str, option: str, computed: Computed) -> Refusal:
        root = computed.value.inputs[0]
        return Refusal(reason, root.label, f"Raise fold-constants{{{option}=...}}.", root)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Let all readers read the tensor."""
        found: Constants
        found, computed = plan.detail
        array = found.array(computed.value)
        rw.redirect(computed.value, rw.constant("value", array))
