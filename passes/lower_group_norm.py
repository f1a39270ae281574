"""Write group norms, with a SiLU behind them, as calls of our operators.

    Reshape InstanceNormalization Reshape Mul Add  ->  onnxnorm.GroupNormalization(x, g, b)
    the same, Sigmoid, Mul                         ->  onnxnorm.GroupNormalizationSilu(x, g, b)

Exact over the reals; the kernel has its own order of additions. Where it pays is the table of
`onnxnorm.ops.costs`. The model gets the operator's body, so it runs without the library too. Only
with --target ort-cpu --ops.

Source: docs/operators.md; GroupNormalization of ONNX opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxnorm.facts import Facts
from onnxnorm.kernels import KernelPass, factor, not_float32, only_read_by
from onnxnorm.module import Node
from onnxnorm.norms import Norm
from onnxnorm.ops import costs
from onnxnorm.rewrite import Plan, Rewriter
from onnxnorm.site import Site


@dataclass(frozen=True)
class LowerGroupNorm(KernelPass):
    """Write group norms as an operator of ours."""

    name: ClassVar = "lower-group-norm"
    summary: ClassVar = "group norms, with a SiLU behind, become calls of our kernel (--ops)"
    equation: ClassVar = "z * sigmoid(z), z = GN(x) * g + b -> GroupNormalizationSilu(x, g, b)"

    def decide(self, norm: Norm, site: Site, facts: Facts) -> Plan | str | None:
        if norm.kind != "group_norm":
            return None
        if site.shape is None or site.channels is None or not norm.groups:
            return "the number of channels is not known"
        if norm.channel != 1:
            return "its channels are the last axis"
        if wrong := not_float32(site):
            return wrong
        if norm.node.attrs.get("stash_type", 1) != 1:
            return "it is not computed in float32"
        slow = costs.group_norm(site.shape)
        if slow is not None:
            return slow
        factors = []
        for role, value, default in (("scale", norm.gamma, 1.0), ("bias", norm.beta, 0.0)):
            known = factor(value, facts)
            if known is NotImplemented:
                return "its factors are computed at run time"
            flat = _per_channel(known, default, site, norm)
            if flat is None:
                return "its factors vary along other axes too"
            factors.append((role, flat))
        gate = _silu(norm, facts)
        root = gate[-1] if gate else norm.node
        into = "GroupNormalizationSilu" if gate else "GroupNormalization"
        detail = (norm, factors)
        anchors = (norm.output,) if gate else ()
        return Plan(root, (*norm.nodes, *gate), detail, anchors, action="lowered", into=into)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        norm, factors = plan.detail
        inputs = [norm.input, *(rw.constant(role, values) for role, values in factors)]
        attrs = {"num_groups": norm.groups, "epsilon": float(norm.epsilon or 0.0)}
        rw.call(plan.into, inputs, attrs)


def _per_channel(known: Any, default: float, site: Site, norm: Norm) -> Any:
    """A factor as [C] in float32; None where it varies along other axes."""
    channels, rank = site.channels or 0, len(site.shape or ())
    if known is None:
        known = np.full(channels, default)
    elif norm.operator:
        # Before opset 21 there is one for each group.
        if known.size not in (channels, norm.groups) or channels % norm.groups:
            return None
        known = np.repeat(known, channels // known.size)
    else:
        known = known.reshape((1,) * (rank - known.ndim) + known.shape)
        if any(size > 1 for axis, size in enumerate(known.shape) if axis != 1):
            return None
        known = np.broadcast_to(known.reshape(-1), (channels,))
    return np.ascontiguousarray(known, dtype=np.float32)


def _silu(norm: Norm, facts: Facts) -> tuple[Node, ...]:
    """The nodes of x * sigmoid(x) behind a norm, the last one computing it; () where it is not."""
    nodes = tuple(dict.fromkeys(use.node for use in facts.uses(norm.output)))
    if any(n.domain or n.scope is not norm.node.scope for n in nodes):
        return ()
    if sorted(n.op for n in nodes) != ["Mul", "Sigmoid"]:
        return ()
    sigmoid, mul = sorted(nodes, key=lambda n: n.op != "Sigmoid")
    gated = sigmoid.outputs[0]
    pair = {norm.output, gated} == set(mul.inputs)
    if not pair or not only_read_by(norm.output, nodes, facts):
        return ()
    return (sigmoid, mul) if only_read_by(gated, (mul,), facts) else ()
