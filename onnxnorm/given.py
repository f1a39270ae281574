"""The norms that streams can read: layer norms and RMS norms whose numbers are all known.

    gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta       gamma * x / sqrt(E[x^2] + eps) + beta

What `onnxnorm.norms` lists, in one form whether an operator or many nodes compute it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node, Value
from onnxnorm.norms import Norm, find_norms
from onnxnorm.port import is_real


@dataclass(frozen=True, eq=False)
class GivenNorm:
    """One layer norm or RMS norm.

    Attributes:
        kind: "layer_norm", "rms_norm" and so on, as in `onnxnorm.norms`.
        node: Its root.
        nodes: All its nodes.
        input: What is normalized.
        output: The result.
        axes: The axes that the statistics are taken over; non-negative where the rank is known.
        epsilon: Added to the variance.
        gamma: The scale, aligned with the input from the right; None for none.
        beta: The shift, in the same way.
        label: The node that it was in the model that was given.
        converted: Whether it was a layer norm there, and is an RMS norm of what has no mean now.
        recognised: Whether all of this is known; if not, `reason` says what is not.
        reason: A clause.
    """

    kind: str
    node: Node
    nodes: tuple[Node, ...]
    input: AnyValue
    output: Value
    axes: tuple[int, ...] | None
    epsilon: float
    gamma: NDArray[np.float64] | None
    beta: NDArray[np.float64] | None
    label: str
    converted: bool
    recognised: bool
    reason: str = ""


def given_norms(facts: Facts) -> Iterator[GivenNorm]:
    """Every layer norm and RMS norm of a model."""
    for norm in find_norms(facts):
        if norm.kind not in ("layer_norm", "rms_norm") or norm.node.domain:
            continue  # a contributed operator that adds and normalizes is no norm of one value
        output = norm.node.outputs[0]
        reason = norm.reason or norm.obstacle
        factors: list[NDArray[np.float64] | None] = []
        for factor, name in ((norm.gamma, "scale"), (norm.beta, "bias")):
            made = _constant(factor, name, facts)
            if isinstance(made, str):
                reason = reason or made
            factors.append(None if isinstance(made, str) else made)
        further = norm.node.outputs[1:]  # some exporters name them all, and nobody reads them
        if norm.operator and any(v.name and (v.outputs or facts.pinned(v)) for v in further):
            reason = reason or "its mean or inverse deviation is read too"
        if norm.epsilon is None:
            reason = reason or "its epsilon is a parameter of the function"
        kind, nodes, given = norm.kind, norm.nodes, norm.input
        centred = centred_here(norm)
        if centred is not None:
            kind, nodes, given = "rms_norm", *centred
            reason = norm.reason
        yield GivenNorm(
            kind=kind,
            node=norm.node,
            nodes=nodes,
            input=given,
            output=output,
            axes=norm.axes,
            epsilon=_epsilon(norm),
            gamma=factors[0],
            beta=factors[1],
            label=_label(norm.node, facts),
            converted=kind == "rms_norm" and any(n.site.startswith(_CONVERTS) for n in nodes),
            recognised=not reason,
            reason=reason,
        )


def per_feature(array: NDArray[np.float64] | None, features: int) -> NDArray[np.float64]:
    """A factor of a norm with one entry for each feature; ones where there is none."""
    flat = np.ones(1) if array is None else array.reshape(-1)
    return np.broadcast_to(flat, (features,)) if flat.size == 1 else flat


def centred_here(norm: Norm) -> tuple[tuple[Node, ...], AnyValue] | None:
    """The RMS norm behind a centering that streams have put in: together they read as a layer norm.

    Its nodes and its input; None where no such centering is.
    """
    for node in norm.nodes:
        if node.op == "Sub" and node.made_by.startswith(_CONVERTS):
            mean = node.inputs[1].inputs[0] if node.inputs[1].inputs else None
            if mean is not None and mean.op == "ReduceMean":
                rest = tuple(n for n in norm.nodes if n is not node and n is not mean)
                return rest, node.outputs[0]
    return None


def _label(node: Node, facts: Facts) -> str:
    """The name of a norm: of the Add behind it, where that was split off in this run."""
    uses = facts.uses(node.outputs[0])
    behind = uses[0].node if len(uses) == 1 else node
    return behind.label if behind.op == "Add" and behind.site == node.site != "" else node.label


_CONVERTS: Final = "stream-fold-mean:"


def _epsilon(norm: Norm) -> float:
    epsilon = norm.epsilon or 0.0
    return float(np.float32(epsilon)) if norm.operator else epsilon  # attributes are float32


def _constant(
    factor: NDArray[np.float64] | AnyValue | None, name: str, facts: Facts
) -> NDArray[np.float64] | str | None:
    """A factor in float64; None for none; why it is not known, as a clause."""
    if factor is None or isinstance(factor, np.ndarray):
        return factor
    constant = facts.constant(factor)
    if constant is None:
        return f"its {name} '{factor.name}' is not constant: {facts.why_not_constant(factor)}"
    if not is_real(constant.dtype):
        return f"its {name} is of type {constant.dtype}"
    return constant.float64()
