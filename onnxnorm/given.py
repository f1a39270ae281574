"""The normalizations of a model as streams need them: with values, nodes and numbers.

The one place where `onnxnorm.norms` is translated; what it lists by name is looked up here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node, Value
from onnxnorm.norms import find_norms
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
    recognised: bool
    reason: str = ""


def given_norms(facts: Facts) -> Iterator[GivenNorm]:
    """Every layer norm and RMS norm that is an operator, and every RMS norm that we wrote."""
    yield from _operators(facts)
    for node in facts.module.nodes():
        if node.domain == "" and node.op == "Div" and len(node.inputs) == 2:
            found = _own_chain(node, facts)
            if found is not None:
                yield found


def _own_chain(root: Node, facts: Facts) -> GivenNorm | None:
    """X / sqrt(mean(x^2) + epsilon), as `onnxnorm.forms` writes it."""
    x, at = root.inputs
    nodes = [root]
    for op in ("Sqrt", "Add", "ReduceMean", "Pow"):
        node = facts.producer(at)
        if node is None or node.domain != "" or node.op != op or not node.inputs:
            return None
        if op in ("Add", "Pow") and len(node.inputs) != 2:
            return None
        nodes.append(node)
        at = node.inputs[0]
    exponent, small = facts.constant(nodes[4].inputs[1]), facts.constant(nodes[2].inputs[1])
    if at is not x or exponent is None or small is None or small.shape or exponent.shape:
        return None
    mean = nodes[3]
    if mean.parameter("axes", "keepdims") is not None:
        return None
    axes = mean.attrs.get("axes")
    if axes is None and len(mean.inputs) > 1:
        listed = facts.constant(mean.inputs[1])
        axes = None if listed is None else [int(n) for n in listed.array().reshape(-1)]
    if axes is None or not mean.attrs.get("keepdims", 1) or float(exponent.float64()) != 2.0:
        return None
    gamma = None
    for op in ("Cast", "Mul"):  # back to a narrow type, and the scale
        uses = facts.uses(root.outputs[0])
        if len(uses) != 1 or uses[0].node.op != op or facts.pinned(root.outputs[0]) is not None:
            continue
        if op == "Mul":
            scale = facts.constant(uses[0].node.inputs[1 - uses[0].index])
            if scale is None or not is_real(scale.dtype) or len(scale.shape) > len(axes):
                break
            gamma = scale.float64()
        root = uses[0].node
        nodes.append(root)
    return GivenNorm(
        kind="rms_norm",
        node=root,
        nodes=tuple(nodes),
        input=x,
        output=root.outputs[0],
        axes=tuple(axes),
        epsilon=float(small.float64()),
        gamma=gamma,
        beta=None,
        recognised=True,
    )


def _operators(facts: Facts) -> Iterator[GivenNorm]:
    for norm in find_norms(facts):
        node = norm.node
        if norm.kind not in ("layer_norm", "rms_norm") or not node.outputs[0].name:
            continue
        if node.domain != "":
            continue  # a contributed operator that adds and normalizes is no norm of one value
        reason = "" if norm.recognised else norm.reason
        arrays: list[NDArray[np.float64] | None] = []
        for index, name in ((1, "scale"), (2, "bias")):
            if len(node.inputs) <= index or not node.inputs[index].name:
                arrays.append(None)
                continue
            constant = facts.constant(node.inputs[index])
            if constant is None:
                why = facts.why_not_constant(node.inputs[index])
                reason = reason or f"its {name} '{node.inputs[index].name}' is not constant: {why}"
                arrays.append(None)
            elif not is_real(constant.dtype):
                reason = reason or f"its {name} is of type {constant.dtype}"
                arrays.append(None)
            else:
                arrays.append(constant.float64())
        if any(v.name for v in node.outputs[1:]):
            reason = reason or "its mean or inverse deviation is read too"
        if norm.epsilon is None:
            reason = reason or "its epsilon is a parameter of the function"
        yield GivenNorm(
            kind=norm.kind,
            node=node,
            nodes=(node,),
            input=node.inputs[0],
            output=node.outputs[0],
            axes=norm.axes,
            epsilon=float(np.float32(norm.epsilon or 0.0)),  # attributes are float32
            gamma=arrays[0],
            beta=arrays[1],
            recognised=not reason,
            reason=reason,
        )
