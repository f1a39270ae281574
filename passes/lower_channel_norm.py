"""Write layer and RMS norms over an inner axis as calls of our operators, without transposing.

    Transpose LayerNormalization Transpose  ->  onnxnorm.ChannelLayerNormalization(x, g, b)
    ReduceMean Sub Pow ... over channels    ->  the same

Exact over the reals; the kernel has its own order of additions. Where it pays is the table of
`onnxnorm.ops.costs`. The model gets the operator's body, so it runs without the library too. Only
with --target ort-cpu --ops.

Source: docs/operators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.kernels import KernelPass, factor, not_float32, only_read_by
from onnxnorm.module import Node
from onnxnorm.norms import Norm
from onnxnorm.ops import costs
from onnxnorm.rewrite import Plan, Rewriter
from onnxnorm.site import Site

_BETWEEN = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class _Place:
    """Where a norm over one axis of x stands; `between`: as an operator between Transposes."""

    x: AnyValue
    axis: int
    shape: tuple[int | str | None, ...]
    root: Node
    nodes: tuple[Node, ...]
    between: bool = False


@dataclass(frozen=True)
class LowerChannelNorm(KernelPass):
    """Write norms over an inner axis as an operator of ours."""

    name: ClassVar = "lower-channel-norm"
    summary: ClassVar = "layer and RMS norms over channels become calls of our kernel (--ops)"
    equation: ClassVar = "Transpose(LN(Transpose(x), g, b)) -> ChannelLayerNormalization(x, g, b)"

    def decide(self, norm: Norm, site: Site, facts: Facts) -> Plan | str | None:
        if norm.kind not in ("layer_norm", "rms_norm"):
            return None
        place = _between(norm, site, facts) if norm.operator else _written_out(norm, site)
        if place is None or place.axis == len(place.shape) - 1:
            return None  # onnxruntime has a fast operator for it
        if wrong := not_float32(site):
            return wrong
        centered = norm.kind == "layer_norm"
        if not centered and norm.beta is not None:
            return "our RMS norm adds nothing to its result"
        channels = place.shape[place.axis]
        slow = costs.channel_norm(place.shape, place.axis)
        if slow is not None or not isinstance(channels, int):
            return slow or "the number of channels is not known"
        inputs = []
        for role, value, default in (("scale", norm.gamma, 1.0), ("bias", norm.beta, 0.0)):
            known = factor(value, facts)
            if known is NotImplemented:
                return "its factors are computed at run time"
            wide = _along(known, default, channels, place)
            if wide is None:
                return "its factors vary along other axes too"
            inputs.append((role, wide))
        if not centered:
            inputs.pop()
        into = "ChannelLayerNormalization" if centered else "ChannelRMSNormalization"
        detail = (place, inputs, float(norm.epsilon or 0.0))
        anchors = (norm.output,) if place.root is not norm.node else ()
        return Plan(place.root, place.nodes, detail, anchors, action="lowered", into=into)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        place, factors, epsilon = plan.detail
        inputs = [place.x, *(rw.constant(role, values) for role, values in factors)]
        rw.call(plan.into, inputs, {"axes": [place.axis], "epsilon": epsilon})


def _written_out(norm: Norm, site: Site) -> _Place | None:
    if site.shape is None or norm.axes is None or len(norm.axes) != 1:
        return None
    axis = norm.axes[0] % len(site.shape)
    return _Place(norm.input, axis, site.shape, norm.node, norm.nodes)


def _between(norm: Norm, site: Site, facts: Facts) -> _Place | None:
    """An operator over the last axis, between a Transpose and its inverse."""
    node, last = norm.node, norm.axes
    if node.op not in _BETWEEN or site.shape is None or last != (len(site.shape) - 1,):
        return None
    if any(v.name for v in node.outputs[1:]) or node.attrs.get("stash_type", 1) != 1:
        return None
    before, uses = facts.producer(norm.input), facts.uses(norm.output)
    if before is None or before.op != "Transpose" or before.scope is not node.scope or not uses:
        return None
    after = uses[0].node
    if before.domain or after.domain:
        return None
    there, back = before.attrs.get("perm"), after.attrs.get("perm")
    if after.op != "Transpose" or after.scope is not node.scope or there is None or back is None:
        return None
    if not only_read_by(norm.output, (after,), facts):
        return None
    if [there[a] for a in back] != list(range(len(there))):
        return None
    shape = tuple(site.shape[a] for a in back)
    return _Place(before.inputs[0], there[-1], shape, after, (before, node, after), True)


def _along(known: Any, default: float, channels: int, place: _Place) -> Any:
    """A factor as [C, 1, ...] in float32; None where it varies along other axes."""
    behind = len(place.shape) - place.axis - 1
    if known is None:
        known = np.full(channels, default)
    elif place.between:
        if known.ndim > 1 or known.size not in (1, channels):
            return None
        known = np.broadcast_to(known.reshape(-1), (channels,))  # along the operator's last axis
    else:
        rank = len(place.shape)
        full = known.reshape((1,) * (rank - known.ndim) + known.shape)
        if any(size > 1 for a, size in enumerate(full.shape) if a != place.axis):
            return None
        known = np.broadcast_to(full.reshape(-1), (channels,))
    return known.reshape(channels, *(1,) * behind).astype(np.float32)
