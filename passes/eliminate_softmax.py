"""Take away a softmax of which only the order is read.

    ArgMax(Softmax(x))        ->  ArgMax(x)
    indices of TopK(Softmax(x))  ->  indices of TopK(x)        the same of LogSoftmax

Exact over the reals: along its own axis a softmax is strictly increasing in x, so it keeps the
order and every tie. Along another axis it is not, as each position has its own sum.

In floating point softmax may round distinct values to one, or to 0; then the original takes the
first of what has become a tie, and the result the larger x, as the truth does. A row with NaN or
+infinity has a softmax of nothing but NaN, whose index means nothing; without the softmax the index
is what the operator makes of x itself. Parity judges both on the inputs that it is given.

Source: the operator specification of ONNX (Softmax, ArgMax, TopK).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from onnx import TensorProto

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter

_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE)
# What each of them holds exactly, itself aside.
_HELD = {TensorProto.FLOAT: _FLOATS[:2], TensorProto.DOUBLE: _FLOATS[:3]}


@dataclass(frozen=True)
class _Readers:
    """What reads a softmax, and reads its order alone."""

    last: tuple[Node, ...]  # ArgMax and TopK
    between: tuple[Node, ...]


@dataclass(frozen=True)
class EliminateSoftmax(Pass):
    """Take away softmax and log softmax in front of ArgMax and of TopK's indices."""

    name: ClassVar = "eliminate-softmax"
    summary: ClassVar = "a softmax goes where ArgMax or the indices of TopK alone read it"
    equation: ClassVar = "ArgMax(Softmax(x)) -> ArgMax(x)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every softmax with an ArgMax or a TopK behind it."""
        for norm in find_norms(facts):
            if norm.kind not in ("softmax", "log_softmax") or not norm.recognised:
                continue
            found = _readers(norm, facts)
            if isinstance(found, str):
                yield Refusal(found, norm.node.label, node=norm.node)
            elif found is not None:
                yield Plan(
                    norm.node,
                    norm.nodes,
                    norm,
                    inside=(*found.between, *found.last),
                    outputs=tuple(v for node in found.last for v in node.outputs if v.name),
                    into=" and ".join(sorted({node.op for node in found.last})),
                )

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Let the readers read what the softmax reads."""
        rw.redirect(plan.detail.output, plan.detail.input)


def _readers(norm: Norm, facts: Facts) -> _Readers | str | None:
    """The readers of a softmax; what stands in the way; None where no order is read at all."""
    last, between, wrong = dict[Node, None](), dict[Node, None](), ""
    # With each value, where the axes of the softmax have gone.
    frontier: list[tuple[AnyValue, tuple[int, ...] | None]] = [(norm.output, norm.axes)]
    while frontier:
        value, axes = frontier.pop()
        if (why := facts.pinned(value)) is not None:
            wrong = wrong or f"'{value.name}' is {why}"
        for use in facts.uses(value):
            node = use.node
            if node.domain == "" and node.op in ("ArgMax", "TopK") and use.index == 0:
                last[node] = None
                wrong = wrong or _not_by_order(node, axes, norm, facts)
                continue
            moved = _moved(node, axes, facts)
            if moved is None:
                wrong = wrong or f"{node.op} {node.label} reads it too"
                continue
            between[node] = None
            frontier.append((node.outputs[0], moved))
    if not last:
        return None
    return wrong or _types(norm, facts) or _Readers(tuple(last), tuple(between))


def _not_by_order(node: Node, axes: tuple[int, ...] | None, norm: Norm, facts: Facts) -> str:
    """Why an ArgMax or a TopK reads more than the order along that axis; "" where it does not."""
    at = f"{node.op} {node.label}"
    if name := node.parameter("axis", "largest", "sorted"):
        return f"{name} of {at} is a parameter of the function"
    axis = node.attrs.get("axis", 0 if node.op == "ArgMax" else -1)
    if norm.dims is not None:
        axis %= len(norm.dims)
    if axes is None or axis not in axes or (norm.dims is None and axis >= 0):
        return f"{at} is along axis {axis}, and the softmax is not"
    if node.op == "TopK":
        values = node.outputs[0]
        if values.name and (facts.uses(values) or facts.pinned(values) is not None):
            return f"the values of {at} are needed"
        if not node.attrs.get("largest", 1) or not node.attrs.get("sorted", 1):
            return f"{at} is not for the largest ones in order"
    return ""


def _moved(node: Node, axes: tuple[int, ...] | None, facts: Facts) -> tuple[int, ...] | None:
    """Where the axes are behind a node that keeps all orders along them; None for any other."""
    if node.domain or axes is None or node.parameter("perm", "to"):
        return None
    if node.op == "Identity":
        return axes
    if node.op == "Transpose" and all(axis >= 0 for axis in axes):
        kind = facts.type(node.inputs[0])
        perm = node.attrs.get("perm")
        if perm is None and kind is not None and kind.shape is not None:
            perm = list(reversed(range(len(kind.shape))))
        return None if perm is None else tuple(list(perm).index(axis) for axis in axes)
    if node.op == "Cast":
        kind = facts.type(node.inputs[0])
        to = node.attrs.get("to", 0)
        held = kind is not None and (kind.element == to or kind.element in _HELD.get(to, ()))
        return axes if held else None
    return None


def _types(norm: Norm, facts: Facts) -> str:
    if norm.operator:
        return ""
    before, after = facts.type(norm.input), facts.type(norm.output)
    if before is None or after is None or before.element != after.element or not before.element:
        return "what it reads and what it gives are not known to be of one type"
    return ""
