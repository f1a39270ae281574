"""Edits of constants: what they give, what they cost, and what their type cannot hold."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxnorm import storage
from onnxnorm.constant_edits import ConstantEdits, Edit
from onnxnorm.facts import Constant, Facts
from onnxnorm.module import Module
from tests.networks import Net


def constant(array: Any, dtype: Any = np.float32) -> tuple[Facts, Constant]:
    """An initializer that two nodes read."""
    net = Net(dtype=dtype)
    x = net.input("x", [4, 4])
    name = net.keep(np.asarray(array, np.float64), name="w")
    facts = Facts(
        Module(storage.from_proto(net.model(net.op("Add", net.op("Mul", x, name), name))))
    )
    found = facts.constant(next(n for n in facts.module.nodes()).inputs[1])
    assert found is not None
    return facts, found


def test_factors_multiply_and_the_shift_is_for_the_result() -> None:
    facts, w = constant([[1.0, 2.0], [3.0, 4.0]])
    node = next(facts.module.nodes())
    edits = ConstantEdits()
    edits.scale(node, 1, w, np.array([2.0, 4.0]))
    edits.scale(node, 1, w, np.array([[1.0], [0.5]]))
    ((_, _, edit),) = edits
    assert edit.array().tolist() == [[2.0, 8.0], [3.0, 8.0]]
    edits.shift(node, 1, w, np.array([1.0, 0.0]))
    assert edit.array().tolist() == [[3.0, 8.0], [4.0, 8.0]]
    assert edit.array().dtype == np.float32


def test_a_constant_grows_where_the_factors_vary_and_it_does_not() -> None:
    _, w = constant(3.0)
    edit = Edit(w, w.dtype, scale=np.array([1.0, 2.0]))
    assert edit.array().tolist() == [3.0, 6.0]
    assert Edit(w, w.dtype, scale=np.ones(2)).nothing


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_each_entry_is_rounded_once(dtype: Any) -> None:
    values = np.random.default_rng(0).normal(size=(40, 7))
    _, w = constant(values, dtype)
    scale = np.random.default_rng(1).normal(size=7)
    made = Edit(w, w.dtype, scale=scale).array()
    assert made.dtype == np.dtype(dtype)
    assert np.array_equal(made, (w.float64() * scale).astype(dtype))


def test_what_a_type_cannot_hold() -> None:
    _, w = constant([[1.0, 30000.0], [1.0, 1.0]], np.float16)
    assert Edit(w, w.dtype, scale=np.array([4.0, 1.0])).misfit() is None
    assert "not finite in float16" in (Edit(w, w.dtype, scale=np.array([1.0, 4.0])).misfit() or "")
    tiny = Edit(w, w.dtype, scale=np.array([2.0**-20, 1.0]))
    assert tiny.misfit() == "a 'w' that is too small for float16"
    rows = Edit(w, w.dtype, scale=np.array([[1.0], [2.0**-20]]))
    assert rows.misfit() == "a 'w' that is too small for float16"
    assert Edit(w, w.dtype, scale=np.array([[2.0**-20], [1.0]])).misfit() is None  # 0.03
    empty = Edit(None, np.dtype(np.float16), shift=np.array([70000.0]))
    assert empty.misfit() == "a bias that is not finite in float16"


def test_growth_counts_copies_that_others_read_too() -> None:
    facts, w = constant(np.ones((4, 4)))
    mul, add = facts.module.nodes()
    edits = ConstantEdits()
    edits.scale(mul, 1, w, np.full(4, 2.0))
    growth, most = edits.growth(facts)
    assert (growth, most) == (64, w)
    edits.scale(add, 1, w, np.full(4, 2.0))  # the same change: one constant in place of another
    assert edits.growth(facts)[0] == 0
    edits.scale(add, 1, w, np.full(4, 2.0))  # another one: two in place of one
    assert edits.growth(facts)[0] == 64
