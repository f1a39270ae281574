"""Operators that only move entries: which of them undo each other.

    Transpose (Transpose (x)) = x        Reshape (Unsqueeze (x)) = x

What lies between them may be gone by a rewrite, and then they all are for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.layout import Dims
from onnxnorm.module import Node
from onnxnorm.rearrange import MOVES
from onnxnorm.transfer import Transfer

_LONGEST: Final = 6  # moves on one side; exporters write three
# Sizes for axes of unknown length: two sets of primes, so that none is met by chance.
_SIZES: Final = ((2, 3, 5, 7, 11, 13), (7, 5, 3, 11, 2, 17))
_LARGEST: Final = 1 << 22  # entries that are moved to see where they go


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
        if facts.pinned(after) is None and _is_identity(chain, transfer):
            return chain[0].inputs[0], after
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


def _is_identity(chain: Sequence[Node], transfer: Transfer) -> bool:
    """Whether a chain of moves puts every entry back; the map between them changes no shape."""
    shapes = [transfer.sizes.of(chain[0].inputs[0])]
    shapes += [transfer.sizes.of(node.outputs[0]) for node in chain]
    if any(s is None for s in shapes):
        return False
    known = [s for s in shapes if s is not None]
    if known[0] != known[-1]:
        return False
    names = dict.fromkeys(n for s in known for n in s if isinstance(n, str))
    if len(names) > len(_SIZES[0]):
        return False
    return all(_returns(chain, known, dict(zip(names, sizes, strict=False))) for sizes in _SIZES)


def _returns(chain: Sequence[Node], shapes: list[Dims], sizes: dict[str, int]) -> bool:
    concrete = [tuple(sizes.get(n, 0) if isinstance(n, str) else n for n in s) for s in shapes]
    count = int(np.prod(concrete[0]))
    if count > _LARGEST or any(int(np.prod(s)) != count for s in concrete):
        return False
    start: NDArray[np.int64] = np.arange(count).reshape(concrete[0])
    at = start
    for node, shape in zip(chain, concrete[1:], strict=True):
        if node.op == "Transpose":
            order = node.attrs.get("perm", list(range(at.ndim))[::-1])
            if node.parameter("perm") or len(order) != at.ndim:
                return False
            at = at.transpose([int(a) for a in order])
            if at.shape != shape:
                return False
        else:
            at = at.reshape(shape)
    return at.shape == start.shape and bool((at == start).all())
