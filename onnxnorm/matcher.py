"""Matching: a pattern against a node, with a reason when it does not fit.

Matching is pure. What every rewrite needs is checked here once: an inner value must not be read
outside the match, nor be an output of its graph, and further outputs of a matched node must be
unused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.pattern import COMMUTATIVE, Const, Maybe, OneOf, Op, Pattern, Var
from onnxnorm.storage import Array


@dataclass(frozen=True)
class Mismatch:
    """Why a pattern does not fit.

    Attributes:
        node: The node at which it failed.
        reason: What was wanted and what was found, as a clause.
        depth: Nodes that had matched before; of several mismatches the deepest explains most.
        structural: Whether another kind of graph was found; False when the nodes are those
            wanted and a condition on them failed.
    """

    node: Node
    reason: str
    depth: int
    structural: bool = True


@dataclass(frozen=True)
class Match:
    """A pattern's bindings.

    Attributes:
        root: The node that the pattern's outermost operator matched.
        facts: The facts it was matched under.
        nodes: Matched nodes by name.
        values: Matched values by name; None for an absent optional one.
    """

    root: Node
    facts: Facts
    nodes: dict[str, Node] = field(default_factory=dict)
    values: dict[str, AnyValue | None] = field(default_factory=dict)

    def node(self, name: str) -> Node:
        """The node bound to `name`."""
        return self.nodes[name]

    def has(self, name: str) -> bool:
        """Whether an optional value is present."""
        return self.values.get(name) is not None

    def value(self, name: str) -> AnyValue:
        """The value bound to `name`."""
        value = self.values[name]
        if value is None:
            raise KeyError(name)
        return value

    def constant(self, name: str) -> Constant:
        """The constant bound to `name`."""
        constant = self.facts.constant(self.value(name))
        if constant is None:
            raise KeyError(name)
        return constant

    def array(self, name: str) -> Array:
        """The values of the constant bound to `name`, in their own type."""
        return self.constant(name).array()

    def float64(self, name: str, default: float | None = None) -> NDArray[np.float64]:
        """The values of the constant bound to `name` in double precision.

        An absent optional one gives `default` as a scalar.
        """
        if default is not None and not self.has(name):
            return np.asarray(default, dtype=np.float64)
        return self.constant(name).float64()

    def attr(self, node: str, name: str, default: Any) -> Any:
        """An attribute of the node bound to `node`."""
        return self.nodes[node].attrs.get(name, default)


def match(pattern: Op, root: Node, facts: Facts) -> Match | Mismatch:
    """Match `pattern` with its outermost operator at `root`."""
    found = Match(root, facts)
    failed = _Matcher(found).node(pattern, root)
    return failed or _escapes(found) or found


class _Matcher:
    def __init__(self, found: Match) -> None:
        self.found = found

    def node(self, pattern: Op, node: Node) -> Mismatch | None:
        depth = len(self.found.nodes)
        if node.op not in pattern.types or node.domain != pattern.domain:
            wanted = " or ".join(pattern.types)
            found = f"{node.domain}.{node.op}" if node.domain else node.op
            return Mismatch(node, f"it follows {found} '{node.label}', not {wanted}", depth)
        if pattern.name in self.found.nodes and self.found.nodes[pattern.name] is not node:
            return Mismatch(node, f"another node is '{pattern.name}' already", depth)
        self.found.nodes[pattern.name] = node
        nodes, values = dict(self.found.nodes), dict(self.found.values)
        failed = self.inputs(pattern, node, node.inputs)
        if failed and node.op in COMMUTATIVE and len(node.inputs) == 2:
            self.restore(nodes, values)
            swapped = self.inputs(pattern, node, node.inputs[::-1])
            if swapped is None or swapped.depth > failed.depth:
                failed = swapped
        return failed

    def inputs(self, pattern: Op, node: Node, values: list[AnyValue]) -> Mismatch | None:
        for wanted, value in zip_longest(pattern.inputs, values):
            present = value is not None and value.name != ""
            if wanted is None:
                if present:
                    return self.fail(node, f"it has a further input '{value.name}'")
            elif not present:
                if not isinstance(wanted, Maybe):
                    return self.fail(node, f"its input {wanted} is missing")
                self.found.values[wanted.of.name] = None
            elif failed := self.value(wanted, value, node):
                return failed
        return None

    def value(self, pattern: Pattern, value: AnyValue, reader: Node) -> Mismatch | None:
        if isinstance(pattern, Maybe):
            return self.value(pattern.of, value, reader)
        if isinstance(pattern, Var | Const):
            bound = self.found.values.setdefault(pattern.name, value)
            if bound is not value:
                return self.fail(reader, f"wanted one value as {pattern}, found two", soft=True)
            facts = self.found.facts
            if isinstance(pattern, Const) and facts.constant(value) is None:
                why = facts.why_not_constant(value)
                reason = f"{pattern.name} '{value.name}' is not constant: {why}"
                return self.fail(reader, reason, soft=True)
            return None
        if isinstance(pattern, Op):
            producer = self.found.facts.producer(value)
            if producer is None:
                wanted = " or ".join(pattern.types)
                found = f"it follows '{value.name}', which no node computes, not {wanted}"
                return self.fail(reader, found)
            failed = self.node(pattern, producer)
            if failed is None and producer.scope is not reader.scope:
                # Moved into a body, it would run as often as the body does.
                found = f"it follows {producer.op} '{producer.label}', which is outside the body"
                return self.fail(reader, f"{found} {reader.scope.path}", soft=True)
            return failed
        return self.alternatives(pattern, value, reader)

    def alternatives(self, pattern: OneOf, value: AnyValue, reader: Node) -> Mismatch | None:
        nodes, values = dict(self.found.nodes), dict(self.found.values)
        deepest: Mismatch | None = None
        for choice in pattern.choices:
            self.restore(nodes, values)
            failed = self.value(choice, value, reader)
            if failed is None:
                return None
            if deepest is None or failed.depth > deepest.depth:
                deepest = failed
        return deepest

    def restore(self, nodes: dict[str, Node], values: dict[str, AnyValue | None]) -> None:
        self.found.nodes.clear()
        self.found.nodes.update(nodes)
        self.found.values.clear()
        self.found.values.update(values)

    def fail(self, node: Node, reason: str, *, soft: bool = False) -> Mismatch:
        return Mismatch(node, reason, len(self.found.nodes), structural=not soft)


def _escapes(found: Match) -> Mismatch | None:
    """A matched value that something outside the match needs."""
    inside = list(found.nodes.values())  # a list: the first reason found must not vary
    facts = found.facts
    depth = len(inside)
    for node in inside:
        inner = node is not found.root
        for position, value in enumerate(node.outputs):
            if not value.name or (not inner and position == 0):
                continue
            if (pinned := facts.pinned(value)) is not None:
                return Mismatch(node, f"its result '{value.name}' is {pinned}", depth, False)
            for use in facts.uses(value):
                if use.node not in inside or position > 0:
                    reason = (
                        f"its result '{value.name}' is also read by node"
                        f" '{use.node.label}' ({use.node.op})"
                    )
                    return Mismatch(node, reason, depth, False)
    return None
