"""Orders in which nodes can be computed."""

from __future__ import annotations

from graphlib import CycleError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxnorm.order import in_order


@given(st.permutations(range(12)), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11))))
def test_each_node_comes_behind_what_it_needs_once(
    nodes: list[int], edges: list[tuple[int, int]]
) -> None:
    needs = {n: [min(e) for e in edges if max(e) == n and min(e) < n] for n in nodes}
    found = list(in_order(nodes, needs.__getitem__))
    assert sorted(found) == sorted(nodes)
    assert all(found.index(n) < found.index(node) for node in nodes for n in needs[node])
    assert list(in_order(found, needs.__getitem__)) == found  # what has an order keeps it


def test_a_cycle_is_an_error_and_a_long_chain_none() -> None:
    with pytest.raises(CycleError):
        list(in_order("abc", {"a": "b", "b": "c", "c": "a"}.__getitem__))
    chain = list(in_order(range(5000), lambda n: [n + 1] if n < 4999 else []))
    assert chain == list(range(5000))[::-1]
