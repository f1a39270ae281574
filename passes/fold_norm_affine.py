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
from numpy.typing import NDArray

from onnxnorm.affine import Affine, slim
from onnxnorm.change import oversized
from onnxnorm.facts import Facts
from onnxnorm.flow import Flow, stage_flow
from onnxnorm.flow_forth import flow_forth
from onnxnorm.given import GivenNorm, given_norms
from onnxnorm.module import Node
from onnxnorm.port import is_real
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Stop, Transfer


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Leave layer norms and RMS norms without an affine where all their readers are linear.

    Attributes:
        max_copy_mb: A weight that others read too is copied up to this size.
        max_adds: How many Adds of beta W may be put behind linear layers that have no bias, as the
            head of a language model has none, for each norm.
    """

    max_copy_mb: int = 32
    max_adds: int = 1

    name: ClassVar = "fold-norm-affine"
    summary: ClassVar = "gamma and beta of a norm into the linear operators that read it"
    equation: ClassVar = "(gamma n + beta) W + b -> n (diag(gamma) W) + (b + beta W)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every norm with an affine."""
        norms = [n for n in given_norms(facts) if _has_affine(n, facts)]
        if not norms:
            return
        transfer = Transfer(facts, find_sizes(facts))
        for norm in norms:
            found = self._found(norm, transfer)
            if isinstance(found, Refusal):
                yield found
                continue
            nodes = dict.fromkeys((*norm.nodes, *found.nodes, *_added(norm, facts)))
            results = tuple(found.results)
            yield Plan(norm.node, tuple(nodes), (norm, found), outputs=results, local=bool(results))

    def _found(self, norm: GivenNorm, transfer: Transfer) -> Flow | Refusal:
        at, facts = norm.node.label, transfer.facts
        if not norm.recognised:
            return Refusal(norm.reason, at, node=norm.node)
        scaled, added = _scaled(norm, facts), _added(norm, facts)
        if scaled is None:
            return Refusal("its scale and its bias are written out", at, node=norm.node)
        if unread := facts.unread(norm.output):
            return Refusal(unread, at, node=norm.node)
        gamma = np.ones(()) if norm.gamma is None else norm.gamma
        own = np.zeros(()) if norm.beta is None else norm.beta
        value, beta = norm.output, own
        if added and added[0] is not norm.node:
            value, beta = added[0].outputs[0], own + _bias(added[0], facts)
        found = flow_forth(value, Affine.of(gamma, beta), transfer)
        fits = isinstance(found, Flow) and len(found.additions) <= self.max_adds
        if not fits and added and bool((gamma != 1.0).any()):
            # gamma n + beta  =  gamma (n + beta / gamma), and only gamma goes
            own = own if added[0] is not norm.node else np.zeros(())
            alone = flow_forth(scaled.outputs[0], Affine.of(gamma, own), transfer)
            found = alone if isinstance(alone, Flow) else found
        if isinstance(found, Stop):
            return found.refusal(norm.node)
        if len(found.additions) > self.max_adds:
            place = found.additions[0].value.name
            reason = f"beta has no place: nothing that is added to '{place}' takes it"
            advice = f"fold-norm-affine{{max_adds={len(found.additions)}}} adds it there."
            return Refusal(reason, at, advice, norm.node)
        held = [a.change(p) for a in found.additions if (p := facts.producer(a.value))]
        for change in (*found.changes, *held):
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
        added = [node for node in _added(norm, rw.facts) if node not in flow.nodes]
        for node in added:  # its bias went further
            rw.redirect(node.outputs[0], scaled.outputs[0])
        if scaled.op == "Mul":
            at = next(i for i, v in enumerate(scaled.inputs) if rw.facts.constant(v) is not None)
            rw.rewire(scaled, at, ones)
        elif scaled is norm.node:
            domain = scaled.domain or ""
            rw.replace(scaled.op, [scaled.inputs[0], ones], attrs=dict(scaled.attrs), domain=domain)
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


def _added(norm: GivenNorm, facts: Facts) -> tuple[Node, ...]:
    """The Add of a bias behind a norm, inside it or what alone reads its result; empty for none."""
    if norm.node.op == "Add":
        return (norm.node,)
    uses = facts.uses(norm.output)
    if not facts.alone(norm.output) or len(uses) != 1 or norm.gamma is None:
        return ()
    node = uses[0].node
    if node.op != "Add" or node.domain or node.scope is not norm.node.scope:
        return ()
    constant = facts.constant(node.inputs[1 - uses[0].index])
    if constant is None or not is_real(constant.dtype):
        return ()
    shape = slim(constant.float64()).shape if len(constant.shape) <= norm.gamma.ndim else (0,)
    return (node,) if shape in ((), norm.gamma.shape) else ()


def _bias(added: Node, facts: Facts) -> NDArray[np.float64]:
    return next(c.float64() for v in added.inputs if (c := facts.constant(v)) is not None)


_OPERATORS: Final = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
)


def _dtype(scaled: Node, facts: Facts) -> np.dtype[Any]:
    """The type of the scale of a norm."""
    given = (facts.constant(v) for v in (*scaled.inputs[1:], scaled.inputs[0]) if v.name)
    return next(c.dtype for c in given if c is not None)


def _has_affine(norm: GivenNorm, facts: Facts) -> bool:
    if norm.kind not in ("layer_norm", "rms_norm") or norm.gamma is None:
        return False
    if bool((norm.gamma != 1.0).any()) or (norm.beta is not None and bool(norm.beta.any())):
        return True
    # An Add of zeros stays: lower-norms writes one, for the runtimes that fuse the whole chain.
    return any(_bias(added, facts).any() for added in _added(norm, facts))
