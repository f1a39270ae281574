"""Fold gamma and beta of a norm into the linear operators that read it.

    (gamma * n(x) + beta) W + b  =  n(x) (diag(gamma) W) + (b + beta W)

Exact over the reals. In floating point the weight and the bias are formed in float64 and rounded
once. What is left is a norm with a scale of ones and no bias, which rotations and compressions of
a stream need; by itself it saves nothing on runtimes whose norm kernels take a scale, so it has to
be asked for. Sources: S. Ashkboos et al., "SliceGPT" (2024), section 3.2; the algebra is that of
LayerNormalization and MatMul in the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from onnxnorm.affine import Affine
from onnxnorm.change import oversized
from onnxnorm.facts import Facts
from onnxnorm.flow import Flow, stage_flow
from onnxnorm.flow_forth import flow_forth
from onnxnorm.given import GivenNorm, given_norms
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Stop, Transfer


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Leave layer norms and RMS norms without an affine where all their readers are linear.

    Attributes:
        max_copy_mb: A weight that others read too is copied up to this size.
    """

    max_copy_mb: int = 32

    name: ClassVar = "fold-norm-affine"
    summary: ClassVar = "gamma and beta of a norm into the linear operators that read it"
    equation: ClassVar = "(gamma n + beta) W + b -> n (diag(gamma) W) + (b + beta W)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every norm with an affine."""
        norms = [n for n in given_norms(facts) if _has_affine(n)]
        if not norms:
            return
        transfer = Transfer(facts, find_sizes(facts))
        for norm in norms:
            found = self._found(norm, transfer)
            if isinstance(found, Refusal):
                yield found
                continue
            nodes = dict.fromkeys((*norm.nodes, *found.nodes))
            results = tuple(found.results)
            yield Plan(norm.node, tuple(nodes), (norm, found), outputs=results, local=bool(results))

    def _found(self, norm: GivenNorm, transfer: Transfer) -> Flow | Refusal:
        at, facts = norm.node.label, transfer.facts
        if not norm.recognised:
            return Refusal(norm.reason, at, node=norm.node)
        if _scaled(norm, facts) is None:
            return Refusal("its scale and its bias are written out", at, node=norm.node)
        if not facts.uses(norm.output):
            return Refusal("nothing reads it", at, node=norm.node)
        gamma = np.ones(()) if norm.gamma is None else norm.gamma
        beta = np.zeros(()) if norm.beta is None else norm.beta
        found = flow_forth(norm.output, Affine.of(gamma, beta), transfer)
        if isinstance(found, Stop):
            return found.refusal(norm.node)
        scaled = _scaled(norm, facts)
        if found.additions and scaled is not norm.node and bool((gamma != 1.0).any()):
            # gamma n + beta  =  gamma (n + beta / gamma), and only gamma goes
            assert scaled is not None, "checked before"
            alone = flow_forth(scaled.outputs[0], Affine.of(gamma), transfer)
            found = alone if isinstance(alone, Flow) else found
        if found.additions:
            place = found.additions[0].value.name
            reason = f"beta has no place: nothing that is added to '{place}' takes it"
            return Refusal(reason, at, node=norm.node)
        for change in found.changes:
            if misfit := change.misfit():
                return Refusal(misfit, change.node.label, node=norm.node)
        return oversized(found.changes, facts, self.max_copy_mb, self.name, norm.node) or found

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Scale the weights, move beta into the biases, leave the norm with ones."""
        norm, flow = plan.detail
        stage_flow(flow, rw)
        scaled = _scaled(norm, rw.facts)
        assert scaled is not None, "checked before"
        ones = rw.constant("scale", np.ones(norm.gamma.shape, _dtype(scaled, rw.facts)))
        if scaled is not norm.node and norm.node not in flow.nodes:
            # The Add of the bias behind it goes.
            rw.redirect(norm.node.outputs[0], scaled.outputs[0])
        if scaled.op == "Mul":
            at = next(i for i, v in enumerate(scaled.inputs) if rw.facts.constant(v) is not None)
            rw.rewire(scaled, at, ones)
        elif scaled is norm.node:
            rw.replace(
                scaled.op, [scaled.inputs[0], ones], attrs=dict(scaled.attrs), domain=scaled.domain
            )
        else:
            rw.rewire(scaled, 1, ones)


def _scaled(norm: GivenNorm, facts: Facts) -> Node | None:
    """The node of a norm that takes its scale, alone; None where it is written in another way."""
    root = norm.node
    if root.op == "Add":
        inner = [facts.producer(v) for v in root.inputs if facts.constant(v) is None]
        if len(inner) != 1 or inner[0] is None or not facts.alone(inner[0].outputs[0]):
            return None
        root = inner[0]
        if root not in norm.nodes or len(root.inputs) > 2:
            return None
    if root.op == "Mul":
        return root if any(facts.constant(v) is not None for v in root.inputs) else None
    return root if root.op in _OPERATORS and len(root.inputs) > 1 else None


_OPERATORS: Final = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
)


def _dtype(scaled: Node, facts: Facts) -> np.dtype[Any]:
    """The type of the scale of a norm."""
    given = (facts.constant(v) for v in (*scaled.inputs[1:], scaled.inputs[0]) if v.name)
    return next(c.dtype for c in given if c is not None)


def _has_affine(norm: GivenNorm) -> bool:
    if norm.kind not in ("layer_norm", "rms_norm"):
        return False
    scaled = norm.gamma is not None and bool((norm.gamma != 1.0).any())
    return (scaled or (norm.beta is not None and bool(norm.beta.any()))) and norm.gamma is not None
