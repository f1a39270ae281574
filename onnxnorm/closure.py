"""The best set of changes when some changes need others: a maximum-weight closure.

    max  sum of weight(x) for x in S      such that  x in S and x needs y  =>  y in S

Changing one part of a graph is free, costs or gains something, and may be right only together with
changes of other parts. The best choice is a minimum cut (J.-C. Picard, "Maximal closure of a graph
and applications to combinatorial problems", Management Science 22, 1976): the source supplies what
is gained, the sink takes what is paid, and every need is an edge that cannot be cut. Of several
best sets the smallest is given, so nothing is changed for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from typing import Final, TypeVar

_UNBOUNDED: Final = 1 << 60

Item = TypeVar("Item", bound=Hashable)


def best_closure(weights: Mapping[Item, int], needs: Mapping[Item, Iterable[Item]]) -> set[Item]:
    """The smallest set of the greatest total weight that contains all its members need.

    >>> sorted(best_closure({"a": 3, "b": 1, "c": -2}, {"a": ["c"], "b": ["c"]}))
    ['a', 'b', 'c']
    >>> best_closure({"a": 2, "c": -2}, {"a": ["c"]})
    set()

    Args:
        weights: What each item gains, or costs where negative; items not named have weight 0.
        needs: What each item needs.
    """
    cut = _Cut()
    number: dict[Item, int] = {}

    def node(item: Item) -> int:
        if item not in number:
            number[item] = cut.node()
        return number[item]

    hopeless = _hopeless(weights, needs)
    for item, weight in weights.items():
        if item in hopeless:
            continue
        if weight > 0:
            cut.edge(_SOURCE, node(item), weight)
        elif weight < 0:
            cut.edge(node(item), _SINK, -weight)
    for item, needed in needs.items():
        if item not in hopeless:
            for other in needed:
                cut.edge(node(item), node(other), _UNBOUNDED)
    reached = cut.source_side()
    return {item for item, at in number.items() if reached[at] >= 0}


def _hopeless(weights: Mapping[Item, int], needs: Mapping[Item, Iterable[Item]]) -> set[Item]:
    """Items that need, directly or not, one that costs as much as all others gain together.

    A set with such a one weighs 0 at most, which the empty set does too. Left in, the items of one
    long stream that cannot change would each send a flow of their own through all of it: on 2,000
    layers that took minutes.
    """
    gained = sum(weight for weight in weights.values() if weight > 0)
    users: dict[Item, list[Item]] = {}
    for item, needed in needs.items():
        for other in needed:
            users.setdefault(other, []).append(item)
    waiting = [item for item, weight in weights.items() if weight < 0 and -weight >= gained]
    found = set(waiting)
    while waiting:
        for user in users.get(waiting.pop(), ()):
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


_SOURCE: Final = 0
_SINK: Final = 1


class _Cut:
    """Maximum flow by E. A. Dinic (1970): shortest augmenting paths, level by level."""

    def __init__(self) -> None:
        self.edges: list[list[int]] = [[], []]  # node -> edge numbers
        self.head: list[int] = []
        self.room: list[int] = []

    def node(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def edge(self, tail: int, head: int, room: int) -> None:
        for start, end, capacity in ((tail, head, room), (head, tail, 0)):
            self.edges[start].append(len(self.head))
            self.head.append(end)
            self.room.append(capacity)

    def source_side(self) -> list[int]:
        """The level of each node that the source still reaches after a maximum flow, else -1."""
        while True:
            level = self._levels()
            if level[_SINK] < 0:
                return level
            self._block(level)

    def _levels(self) -> list[int]:
        level = [-1] * len(self.edges)
        level[_SOURCE] = 0
        queue = deque([_SOURCE])
        while queue:
            at = queue.popleft()
            for number in self.edges[at]:
                to = self.head[number]
                if self.room[number] > 0 and level[to] < 0:
                    level[to] = level[at] + 1
                    queue.append(to)
        return level

    def _block(self, level: list[int]) -> None:
        following = [0] * len(self.edges)
        path: list[int] = []
        at = _SOURCE
        while True:
            if at == _SINK:
                flow = min(self.room[number] for number in path)
                for number in path:
                    self.room[number] -= flow
                    self.room[number ^ 1] += flow
                full = next(i for i, number in enumerate(path) if self.room[number] == 0)
                at = self.head[path[full] ^ 1]
                del path[full:]
                continue
            outgoing = self.edges[at]
            while following[at] < len(outgoing):
                number = outgoing[following[at]]
                to = self.head[number]
                if self.room[number] > 0 and level[to] == level[at] + 1:
                    path.append(number)
                    at = to
                    break
                following[at] += 1
            else:
                if at == _SOURCE:
                    return
                level[at] = -1
                at = self.head[path.pop() ^ 1]
