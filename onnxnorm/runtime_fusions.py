"""What onnxruntime fuses when it loads a model although it must not.

Its LayerNormFusion and SimplifiedLayerNormFusion look for these chains and do not check all that
makes them a norm. Seen with onnxruntime 1.31 and 1.32 on the CPU, outputs before against after:

    chain                                   layer norm             RMS norm
    exponent of Pow not 2                   wrong                  left alone
    ReduceMean with keepdims=0              wrong                  wrong
    epsilon as the first input of Add       epsilon is lost        right
    epsilon not one number                  wrong                  wrong
    Sub(mean, x) for Sub(x, mean)           the sign is lost       -
    a scale that expands the output         fails when it runs     fails when it runs

Both know `Div(d, root)` only: written as a product with `Reciprocal(root)` a chain is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node


@dataclass(frozen=True)
class Guard:
    """A division that has to be written otherwise.

    Attributes:
        node: The Div.
        reason: What onnxruntime would make of it, as a sentence for the user.
    """

    node: Node
    reason: str


def misfused(nodes: Iterable[Node], facts: Facts) -> Guard | None:
    """The division, of those among `nodes`, that onnxruntime would fuse wrongly; None for none."""
    for node in nodes:
        if node.op == "Div" and not node.domain and len(node.inputs) == 2:
            flaw = _flaw(node, facts)
            if flaw:
                reason = (
                    f"onnxruntime (1.31, 1.32) fuses this into one operator, wrongly: {flaw};"
                    " lower-norms writes it so that it is left alone"
                )
                return Guard(node, reason)
    return None


def _flaw(div: Node, facts: Facts) -> str:
    """What onnxruntime overlooks in the chain that ends in a division; "" for nothing."""
    divided, deviation = div.inputs
    root = _made(deviation, "Sqrt", facts)
    total = _made(root.inputs[0], "Add", facts) if root is not None else None
    scaled = _only_user(div.outputs[0], "Mul", facts)
    scale = _factor(scaled, div.outputs[0], facts) if scaled is not None else None
    if total is None or scaled is None or scale is None or len(scale.shape) != 1:
        return ""
    sides = [_made(v, "ReduceMean", facts) for v in total.inputs]
    place = next((i for i, side in enumerate(sides) if side is not None), None)
    if place is None:
        return ""
    variance, epsilon = sides[place], facts.constant(total.inputs[1 - place])
    assert variance is not None, "it is at that place"
    square = _made(variance.inputs[0], "Pow", facts)
    if square is None or epsilon is None or not _over_last(variance, facts):
        return ""
    exponent = facts.constant(square.inputs[1])
    if exponent is None or square.inputs[0] is not divided:
        return ""
    flaws = []
    known = facts.type(divided)
    if known is not None and known.shape and known.shape[-1] == 1 and scale.shape[0] > 1:
        flaws.append("the scale expands its input")
    if epsilon.float64().size != 1:
        flaws.append("epsilon is not one number")
    means = [variance]
    centred = _made(divided, "Sub", facts)
    mean = next((m for v in centred.inputs if (m := _made(v, "ReduceMean", facts)) is not None),
                None) if centred is not None else None  # fmt: skip
    shifted = _only_user(scaled.outputs[0], "Add", facts)
    shift = _factor(shifted, scaled.outputs[0], facts) if shifted is not None else None
    if centred is not None and mean is not None and shift is not None:
        if not _over_last(mean, facts) or len(shift.shape) != 1:
            return ""
        means.append(mean)
        if (exponent.float64() != 2).any():
            flaws.append(
                f"the exponent {float(exponent.float64().reshape(-1)[0]):g} is taken for 2"
            )
        if place == 1:
            flaws.append("epsilon is lost, being the first input of Add")
        if facts.producer(centred.inputs[0]) is mean:
            flaws.append("the mean minus the input is taken for the input minus its mean")
    elif (exponent.float64() != 2).any():
        return ""
    if any(not m.attrs.get("keepdims", 1) for m in means):
        flaws.append("a mean without keepdims is taken for one along the last axis")
    return ", ".join(flaws)


def _made(value: AnyValue, op: str, facts: Facts) -> Node | None:
    node = facts.producer(value)
    return node if node is not None and node.op == op and not node.domain else None


def _only_user(value: AnyValue, op: str, facts: Facts) -> Node | None:
    uses = facts.uses(value)
    if len(uses) != 1 or facts.pinned(value) is not None:
        return None
    node = uses[0].node
    return node if node.op == op and not node.domain else None


def _factor(node: Node, value: AnyValue, facts: Facts) -> Constant | None:
    others = [v for v in node.inputs if v is not value]
    return facts.constant(others[0]) if len(others) == 1 else None


def _over_last(mean: Node, facts: Facts) -> bool:
    """Whether a ReduceMean is over the last axis alone."""
    axes = mean.attrs.get("axes")
    if axes is None and len(mean.inputs) > 1:
        constant = facts.constant(mean.inputs[1])
        axes = None if constant is None else constant.array().reshape(-1).tolist()
    if axes is None or len(axes) != 1:
        return False
    known = facts.type(mean.inputs[0])
    rank = len(known.shape) if known is not None and known.shape is not None else None
    return axes[0] == -1 or (rank is not None and axes[0] == rank - 1)
