"""Drop the bias of a convolution that an instance norm reads.

    IN(Conv(x, W, b))  ->  IN(Conv(x, W))

An instance norm subtracts the mean of each channel, and a bias is the same everywhere in its
channel, so it has no effect. Exact over the reals; in floating point the norm has one rounding less
in front of it, and a bias that is large beside what varies no longer costs digits. Source: the
definitions of these operators in the ONNX operator specification; NoiSER trains such networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from onnxnorm.facts import Facts
from onnxnorm.norms import Norm, find_norms
from onnxnorm.port import LAYOUTS
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter


@dataclass(frozen=True)
class DropDeadBias(Pass):
    """Remove the biases that norms ignore."""

    name: ClassVar = "drop-dead-bias"
    summary: ClassVar = "biases that an instance norm behind them takes out again"
    equation: ClassVar = "IN(Conv(x, W, b)) -> IN(Conv(x, W))"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every convolution with a bias in front of an instance norm."""
        for norm in find_norms(facts):
            made = facts.producer(norm.input)
            if norm.kind != "instance_norm" or not norm.recognised or norm.groups or made is None:
                continue
            if made.op not in LAYOUTS or made.domain or len(made.inputs) < 3:
                continue
            if not made.inputs[2].name or made.scope is not norm.node.scope:
                continue
            reason = _why_not(norm, facts)
            if reason is not None:
                yield Refusal(reason, made.label, node=made)
            else:
                result = (norm.output,)
                yield Plan(made, (made,), None, inside=norm.nodes, outputs=result, into=made.op)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """The same convolution without its bias."""
        rw.replace_like(plan.root, plan.root.inputs[:2])


def _why_not(norm: Norm, facts: Facts) -> str | None:
    value = norm.input
    if norm.axes is None or 0 in norm.axes or 1 in norm.axes:
        return f"the statistics of '{norm.output.name}' are not over the places of a channel"
    if (pinned := facts.pinned(value)) is not None:
        return f"'{value.name}' is {pinned}"
    others = [u.node for u in facts.uses(value) if u.node not in norm.nodes]
    if others:
        return f"'{value.name}' is also read by node '{others[0].label}' ({others[0].op})"
    return None
