"""Who takes a value linearly: the operators into whose weights a factor per feature can go.

    f(diag(g) x) = f'(x),   f' with the weight diag(g) W

A value is followed through operators that act on every feature alike; each way must end in a linear
operator that contracts the features.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxnorm.facts import AnyValue
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.port import Inlet
from onnxnorm.transfer import Basis, Link, Transfer, described


@dataclass(frozen=True)
class Consumer:
    """One linear operator at the end of the way.

    Attributes:
        inlet: Its weight, seen from the input features.
        layout: Where the features are in its input.
    """

    inlet: Inlet
    layout: Layout


@dataclass(frozen=True)
class Consumers:
    """All of them.

    Attributes:
        places: The linear operators.
        between: The nodes on the way, whose results change.
        values: The values that change, with the layout of their features.
    """

    places: tuple[Consumer, ...]
    between: tuple[Node, ...]
    values: tuple[tuple[AnyValue, Layout], ...]


def consumers(value: AnyValue, layout: Layout, transfer: Transfer) -> Consumers | str:
    """The linear operators that alone read a value; else who reads it in another way."""
    facts = transfer.facts
    pending: dict[AnyValue, Layout] = {value: layout}
    waiting: dict[Node, Link] = {}
    places, between, frontier = list[Consumer](), dict[Node, None](), [value]
    while frontier:
        at = frontier.pop()
        if (why := facts.pinned(at)) is not None:
            return f"'{at.name}' is {why}"
        for use in facts.uses(at):
            node = use.node
            if node.domain == "" and node.op in ("Shape", "Size"):
                continue
            inlet = Inlet.of(node, use.index, facts, padded=True)
            if not isinstance(inlet, str) and inlet.takes(pending[at]):
                places.append(Consumer(inlet, pending[at]))
                continue
            link = transfer.forth(node, use.index, Basis(pending[at]))
            if not isinstance(link, Link) or link.bypass:
                return f"{described(node)} reads it and is not linear in the features"
            if any(d.constant is not None for d in link.demands):
                return f"{described(node)} joins it with constants"
            waiting[node] = link
            if any(v not in pending for v, _ in link.values):
                continue
            known = node in between  # it reads the value, or another on the way, twice
            between[node] = None
            for output, basis in link.outputs:
                if pending.setdefault(output, basis.layout) != basis.layout:
                    return f"{described(node)} reads it in two ways"
                if not known:
                    frontier.append(output)
    for node in waiting:
        if node not in between:
            return f"{described(node)} joins it with other values"
    return Consumers(tuple(places), tuple(between), tuple(pending.items()))
