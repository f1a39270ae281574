"""Write softmax and log softmax as calls of our operators, where their kernels are faster.

    Softmax(Add(Mul(x, s), mask))  ->  onnxnorm.TwoPassMaskedSoftmax(x, s, mask)
    Softmax over channels          ->  onnxnorm.TwoPassSoftmax

The same function over the reals: a scale by division becomes one by the inverse, and the kernels
have their own order of additions. Where it pays is the table of `onnxnorm.ops.costs`. The model
gets the operator's body, so it runs without the library too. Only with --target ort-cpu --ops.

Source: Dukhan and Ablavatski, The Two-Pass Softmax Algorithm (2020); docs/operators.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.kernels import KernelPass, not_float32, only_read_by
from onnxnorm.module import Node
from onnxnorm.norms import Norm
from onnxnorm.ops import costs
from onnxnorm.rewrite import Plan, Rewriter
from onnxnorm.site import Site

_LOW = -1e4  # what exporters hide entries with is this or lower
_MUCH = 0.25  # the share of hidden entries from which a mask is known to slow onnxruntime down


@dataclass(frozen=True)
class _Front:
    """What stands in front of a softmax: softmax(scale * x + mask)."""

    x: AnyValue
    scale: float = 1.0
    mask: AnyValue | None = None
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True)
class LowerSoftmax(KernelPass):
    """Write softmax as an operator of ours."""

    name: ClassVar = "lower-softmax"
    summary: ClassVar = "softmax, with scale and mask, becomes a call of our kernel (--ops)"
    equation: ClassVar = "softmax(s * x + mask) -> TwoPassMaskedSoftmax(x, s, mask)"

    def decide(self, norm: Norm, site: Site, facts: Facts) -> Plan | str | None:
        if norm.kind not in ("softmax", "log_softmax"):
            return None
        if site.shape is None or norm.axes is None or len(norm.axes) != 1:
            return "it is not over one axis of a tensor of known rank"
        if wrong := not_float32(site):
            return wrong
        axis = norm.axes[0] % len(site.shape)
        if site.shape[axis] == 1:  # 0 or 1 exactly, which no other order of operations may lose
            return "it is over a single value"
        log = "Log" if norm.kind == "log_softmax" else ""
        front = _front(norm, facts)
        reason = "there is no scale or mask in front"
        if front.nodes:
            masked, hides = front.mask is not None, _hides(front.mask, facts)
            slow = costs.masked_softmax(site.shape, axis, masked=masked, hides=hides)
            reason = slow or ""
            if not reason:
                nodes = (*norm.nodes, *front.nodes)
                into = f"TwoPassMasked{log}Softmax"
                return Plan(norm.node, nodes, (front, axis), action="lowered", into=into)
        slow = costs.softmax(site.shape, axis, log=bool(log))
        if slow is not None:
            return f"{slow}; {reason}"
        detail = (_Front(norm.input), axis)
        return Plan(norm.node, norm.nodes, detail, action="lowered", into=f"TwoPass{log}Softmax")

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        front, axis = plan.detail
        inputs = [front.x]
        if front.nodes:
            inputs.append(rw.constant("scale", np.asarray(front.scale, np.float32)))
            hidden = front.mask
            if hidden is None:
                # Not a scalar: the library cannot tell that from a mask of unknown rank.
                hidden = rw.constant("mask", np.zeros(1, np.float32))
            inputs.append(hidden)
        rw.call(plan.into, inputs, {"axis": axis})


def _front(norm: Norm, facts: Facts) -> _Front:
    """The scale and the mask that only this softmax reads."""
    add = _made(norm.input, norm.nodes, facts)
    if add is None or add.op != "Add":
        return _scaled(norm.input, norm.nodes, facts)
    sides = [(add.inputs[i], add.inputs[1 - i]) for i in (0, 1)]
    found = [(_scaled(x, (add,), facts), mask) for x, mask in sides]
    # The scores are what is scaled, else what is no constant.
    front, mask = max(found, key=lambda f: (bool(f[0].nodes), facts.constant(f[0].x) is None))
    return _Front(front.x, front.scale, mask, (add, *front.nodes))


def _scaled(value: AnyValue, readers: tuple[Node, ...], facts: Facts) -> _Front:
    """The x and s of a value, if it is s * x or x / (1/s) and only these nodes read it."""
    made = _made(value, readers, facts)
    if made is not None and made.op in ("Mul", "Div"):
        for place in (1, 0) if made.op == "Mul" else (1,):
            known = facts.constant(made.inputs[place])
            if known is not None and known.shape in ((), (1,)):
                number = float(known.float64().reshape(()))
                scale = 1 / number if made.op == "Div" and number else number
                if math.isfinite(scale) and scale:
                    return _Front(made.inputs[1 - place], scale, None, (made,))
    return _Front(value)


def _made(value: AnyValue, readers: tuple[Node, ...], facts: Facts) -> Node | None:
    made = facts.producer(value)
    if made is None or made.domain or made.scope is not readers[0].scope:
        return None
    return made if only_read_by(value, readers, facts) else None


def _hides(mask: AnyValue | None, facts: Facts) -> bool:
    """Whether a mask is a constant that hides much."""
    known = facts.constant(mask) if mask is not None else None
    return known is not None and bool(np.mean(known.float64() <= _LOW) >= _MUCH)
