"""The best closure, against trying every set."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxnorm.closure import _Cut, best_closure

ITEMS = list(range(7))
GRAPHS = st.tuples(
    st.dictionaries(st.sampled_from(ITEMS), st.integers(-5, 5)),
    st.dictionaries(st.sampled_from(ITEMS), st.lists(st.sampled_from(ITEMS), max_size=3)),
)


def _closed(chosen: set[int], needs: dict[int, list[int]]) -> bool:
    return all(set(needs.get(item, ())) <= chosen for item in chosen)


@settings(max_examples=300, deadline=None)
@given(GRAPHS)
def test_no_other_set_weighs_more(graph: tuple[dict[int, int], dict[int, list[int]]]) -> None:
    weights, needs = graph
    chosen = best_closure(weights, needs)
    assert _closed(chosen, needs)
    total = sum(weights.get(item, 0) for item in chosen)
    for bits in product((False, True), repeat=len(ITEMS)):
        other = {item for item, bit in zip(ITEMS, bits, strict=True) if bit}
        if _closed(other, needs):
            weight = sum(weights.get(item, 0) for item in other)
            assert weight <= total
            assert weight < total or chosen <= other, "of the best sets it is the smallest"


def test_a_chain_as_long_as_a_graph() -> None:
    count = 20_000
    weights = {0: 3, count - 1: -2}
    needs = {i: [i + 1] for i in range(count - 1)}
    assert len(best_closure(weights, needs)) == count
    assert not best_closure({**weights, count - 1: -3}, needs)


def test_what_cannot_pay_for_itself_costs_no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    # layers of one stream: all need each other, and the first needs what may not change
    count = 3_000
    weights = {("gain", i): 5 for i in range(count)} | {("part", 0): -5 * count}
    needs = {("gain", i): [("part", i)] for i in range(count)}
    needs |= {("part", i): [("part", abs(i - 1))] for i in range(count)}
    edges = 0

    def counted(cut: _Cut, *_: int) -> None:
        nonlocal edges
        edges += 1

    monkeypatch.setattr(_Cut, "edge", counted)
    assert best_closure(weights, needs) == set()
    assert edges == 0
