"""Operators that only move entries: which of them undo each other.

    Transpose (Transpose (x)) = x        Reshape (Unsqueeze (x)) = x

What lies between them may be gone by a rewrite, and then they all are for nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node
from onnxnorm.rearrange import MOVES, permutation
from onnxnorm.transfer import Transfer

_LONGEST: Final = 6  # moves on one side; exporters write three


def undone(
    source: AnyValue, result: AnyValue, transfer: Transfer, readers: Collection[Node] = ()
) -> tuple[AnyValue, AnyValue] | None:
    """X and z of x -> moves -> source, result -> moves -> z, such that z = x if result = source.

    The longest such pair; everything between x and z must have one reader, but `source`, which all
    of `readers` may read. None where there is none, or where too little is known of the sizes.
    """
    facts = transfer.facts
    behind = _behind(result, facts)
    before = _before(source, readers, facts)
    pairs = [(i, j) for i in range(1, len(before) + 1) for j in range(1, len(behind) + 1)]
    for i, j in sorted(pairs, key=sum, reverse=True):
        chain = [*before[:i][::-1], *behind[:j]]
        after = chain[-1].outputs[0]
        first = chain[0].inputs[0]
        # The map between them changes no shape.
        order = None if facts.pinned(after) else permutation(first, chain, transfer.sizes)
        if order is not None and order == tuple(range(len(order))):
            return first, after
    return None


def _before(value: AnyValue, readers: Collection[Node], facts: Facts) -> list[Node]:
    """The moves that make a value, the last first."""
    found: list[Node] = []
    alone = facts.alone(value)
    if not alone and facts.pinned(value) is None:
        alone = all(use.node in readers for use in facts.uses(value))
    while len(found) < _LONGEST:
        node = facts.producer(value)
        if node is None or not _moves(node) or not (alone or facts.alone(value)):
            break
        alone = False
        found.append(node)
        value = node.inputs[0]
    return found


def _behind(value: AnyValue, facts: Facts) -> list[Node]:
    """The moves that a value goes through, the first first."""
    found: list[Node] = []
    while len(found) < _LONGEST and facts.alone(value):
        (use,) = facts.uses(value)
        if not _moves(use.node) or use.index != 0 or use.node.scope is not value.scope:
            break
        found.append(use.node)
        value = use.node.outputs[0]
    return found


def _moves(node: Node) -> bool:
    return node.domain == "" and node.op in MOVES
