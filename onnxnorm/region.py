"""The part of a graph that computes one value from another, and who else reads inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node
from onnxnorm.moment_rules import Moments

_FEEDING: Final = 64  # nodes that make one shape


@dataclass(frozen=True)
class Escape:
    """A value inside a region that something outside needs.

    Attributes:
        value: The value.
        node: The node that computes it.
        reason: Who needs it, as a clause.
        reader: The node that reads it; None where it is an output.
    """

    value: AnyValue
    node: Node
    reason: str
    reader: Node | None = None


@dataclass(frozen=True)
class Region:
    """What computes `root`'s output from `input` and constants.

    Attributes:
        root: The last node.
        nodes: All nodes, the root among them; none that only makes constants or sizes.
        input: Where it starts: the base, or the one copy of it that the region reads.
        escape: The first inner value that is needed elsewhere; None where there is none.
    """

    root: Node
    nodes: tuple[Node, ...]
    input: AnyValue
    escape: Escape | None


def slice_back(
    moments: Moments, root: Node, base: AnyValue, *, partly: bool = False
) -> Region | None:
    """The region between a base and a node; None where it reads something else at run time.

    Args:
        moments: Knows copies and constants of the scope.
        root: The last node.
        base: Where to stop.
        partly: Let it read other values too, as a near miss does.
    """
    facts, statics = moments.facts, moments.statics
    inside: dict[Node, None] = {root: None}
    optional: dict[Node, None] = {}  # copies of the base, and what computes sizes
    pending: list[tuple[AnyValue, bool]] = [(v, False) for v in root.inputs]
    while pending:
        value, of_size = pending.pop()
        if not value.name or value is base:
            continue
        if statics.array(value) is not None or facts.constant(value) is not None:
            continue
        node = facts.producer(value)
        size = statics.dims(value) is not None or statics.size(value) is not None
        if node is None or node.scope is not moments.scope:
            if not (partly or of_size):
                return None
            continue
        if node in inside or node in optional or (of_size and not size):
            continue
        if size or moments.origin.get(value) is base:
            optional[node] = None
        elif partly and not moments.readings(value):
            continue
        else:
            inside[node] = None
        pending += ((v, size) for v in node.inputs)
    while optional:
        # A copy or a size that only this region needs is part of it.
        joining = [
            node
            for node in optional
            if all(
                facts.pinned(v) is None and all(u.node in inside for u in facts.uses(v))
                for v in node.outputs
            )
        ]
        if not joining:
            break
        for node in joining:
            inside[node] = None
            del optional[node]
    escape = _escape(facts, root, inside)
    while escape is not None and (feeding := _only_feeds(facts, escape.reader, inside)):
        inside.update(dict.fromkeys(feeding))
        escape = _escape(facts, root, inside)
    return Region(root, tuple(inside), _entry(moments, inside, base), escape)


def _only_feeds(facts: Facts, reader: Node | None, inside: dict[Node, None]) -> list[Node]:
    """The nodes from `reader` on, where all that they compute goes back into the region.

    Such nodes make a shape or a type of something inside, or nothing; no one else needs them.
    """
    found: dict[Node, None] = {}
    pending = [reader] if reader is not None else []
    while pending:
        node = pending.pop()
        if node in inside or node in found:
            continue
        found[node] = None
        if len(found) > _FEEDING or any(facts.pinned(v) is not None for v in node.outputs):
            return []
        # What nobody reads any more, as some exporters leave behind, is no obstacle either.
        pending += [use.node for value in node.outputs for use in facts.uses(value)]
    return list(found)


def _entry(moments: Moments, inside: dict[Node, None], base: AnyValue) -> AnyValue:
    """The base, or its copy where all that is read of it is that one copy."""
    read = {
        v: None
        for node in inside
        for v in node.inputs
        if moments.source(v) is base and moments.facts.producer(v) not in inside
    }
    return next(iter(read)) if len(read) == 1 else base


def _escape(facts: Facts, root: Node, inside: dict[Node, None]) -> Escape | None:
    for node in inside:
        if node is root:
            continue
        for value in node.outputs:
            if not value.name:
                continue
            if (pinned := facts.pinned(value)) is not None:
                reason = f"its result '{value.name}' is {pinned}"
                return Escape(value, node, f"inside it, at {node.op} '{node.label}', {reason}")
            for use in facts.uses(value):
                if use.node not in inside:
                    reason = (
                        f"inside it, the result '{value.name}' of {node.op} '{node.label}' is also"
                        f" read by node '{use.node.label}' ({use.node.op})"
                    )
                    return Escape(value, node, reason, use.node)
    return None
