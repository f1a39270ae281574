"""Changes of one constant: when the extremes of its factors say that the result fits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxnorm import storage
from onnxnorm.change import Change
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from tests.networks import Net

NUMBERS = st.sampled_from(
    [0.0, 1.0, -3.0, 2.0**-15, 2.0**-8, 250.0, -65504.0, 3e38, 1e-40, np.inf, np.nan]
)


def change(array: Any, scale: Any, shift: Any, *, dtype: Any, bias: bool) -> Change:
    net = Net(dtype=dtype)
    with np.errstate(all="ignore"):
        name = net.keep(np.asarray(array, np.float64), name="w")
    model = net.model(net.op("Mul", net.input("x", [4]), name))
    facts = Facts(Module(storage.from_proto(model)))
    node = next(facts.module.nodes())
    constant = facts.constant(node.inputs[1])
    assert constant is not None
    added = None if shift is None else np.asarray(shift)
    return Change(node, 1, constant, constant.dtype, np.asarray(scale), added, bias)


@given(
    st.lists(NUMBERS, min_size=2, max_size=2),
    st.lists(NUMBERS, min_size=2, max_size=2),
    st.none() | st.lists(NUMBERS, min_size=2, max_size=2),
    st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16, np.float64]),
    st.booleans(),
)
def test_what_surely_fits_fits(
    array: list[float], scale: list[float], shift: list[float] | None, dtype: Any, bias: bool
) -> None:
    made = change(array, scale, shift, dtype=dtype, bias=bias)
    quick = made.misfit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Change, "_surely_fits", lambda *_: False)
        assert made.misfit() == quick


def test_products_are_formed_only_where_the_extremes_leave_it_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def results(*_: Any) -> Any:
        raise AssertionError("a product was formed")

    monkeypatch.setattr("onnxnorm.change.results", results)
    assert change([1, -2], [3, 4], None, dtype=np.float16, bias=False).misfit() is None
    assert change([1, -2], [3, 4], [5, 6], dtype=np.float16, bias=True).misfit() is None
    for array, scale, shift in (
        ([1, 200], [3, 400], None),  # beyond the range
        ([1, np.nan], [1, 1], None),
        ([1, 2], [2.0**-20, 1], None),  # perhaps all too small
        ([1, 2], [1, 1], [-1, -2]),  # perhaps nothing is left
    ):
        with pytest.raises(AssertionError, match="a product"):
            change(array, scale, shift, dtype=np.float16, bias=False).misfit()
