"""Nodes in an order in which they can be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError
from typing import TypeVar

T = TypeVar("T")


def in_order(nodes: Iterable[T], needs: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """Each node behind all that it needs, and for the rest in the order in which they come.

    The specification asks for that order, but onnxruntime sorts by itself, and converters to
    float16 leave their Casts at the end.

    >>> list(in_order("cab", {"c": "ab", "a": "", "b": "a"}.get))
    ['a', 'b', 'c']

    Raises:
        CycleError: Nodes need each other.
    """
    done: set[T] = set()
    begun: set[T] = set()
    for first in nodes:
        pending = [first]  # not by recursion: a chain can be as long as the graph
        while pending:
            node = pending[-1]
            if node in done:
                pending.pop()
                continue
            missing = [n for n in needs(node) if n not in done]
            if not missing:
                pending.pop()
                done.add(node)
                yield node
            elif node in begun:
                raise CycleError("nodes need each other", [node])
            else:
                begun.add(node)
                pending += missing
