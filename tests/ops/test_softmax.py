"""The softmax kernels: onnxruntime's special values, and accuracy against a float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxnorm.ops.accuracy import softmax, softmax_tolerance
from onnxnorm.session import open_session
from tests.ops.calls import (
    FLOAT32,
    FLOAT64,
    INSTRUCTION_SETS,
    LIBRARY,
    NUMBER,
    TYPES,
    Array,
    assert_close,
    assert_expected,
    instruction_set,
    model_of,
    needs_library,
    run,
)

pytestmark = needs_library

# In cache, by pairs in columns, and in rows split over threads; with tails that fill no vector.
LENGTHS = (7, 70, 2**13 + 3, 2**18 + 5)

finfo: Callable[[Any], Any] = ml_dtypes.finfo  # it has no types of its own


def standard(name: str, values: Array, axis: int, folder: Path) -> Array:
    """The operator of onnxruntime itself."""
    number = NUMBER[values.dtype]
    graph = helper.make_graph(
        [helper.make_node(name, ["X0"], ["Y"], axis=axis)],
        "standard",
        [helper.make_tensor_value_info("X0", number, values.shape)],
        [helper.make_tensor_value_info("Y", number, values.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return run(model, [values], folder, kernel=False)


def special_rows(n: int, dtype: Any) -> Array:
    """Rows of what a softmax has to get right by definition and not by arithmetic."""
    least = np.finfo(dtype).min
    rows = np.random.default_rng(n).standard_normal((16, n)).astype(dtype)
    rows[0, 2] = -np.inf
    rows[1] = -np.inf
    rows[2, 3] = np.inf
    rows[3, 4] = np.nan
    rows[4] = least
    rows[5, ::2] = least
    rows[6] = least
    rows[6, -1] = -np.inf
    rows[7] = -1e9
    rows[8, 1] = np.inf
    rows[8, 2] = -np.inf
    rows[9] = np.inf
    rows[10] = np.nan
    rows[11] += 1e6
    rows[12] -= 1e6
    rows[13] = np.finfo(dtype).max
    rows[14] = np.finfo(dtype).tiny / 4  # below the normal numbers
    rows[15] = -np.inf
    rows[15, -1] = 3
    return rows


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_special_values_are_those_of_onnxruntime(
    name: str, isa: str, dtype: Any, tmp_path: Path
) -> None:
    for n in LENGTHS:
        rows = special_rows(n, dtype)
        if n >= 2**18:
            rows = rows[[0, 2, 3, 4, 5, 7, 11, 12]]  # a row is split where there are few
        many = np.concatenate([rows, rows])  # enough not to be split, where rows are long
        for values, axis in ((rows, -1), (np.ascontiguousarray(rows.T), 0), (many, -1)):
            wanted = standard(name, values, axis, tmp_path).astype(np.float64)
            with instruction_set(isa):
                model = model_of(f"TwoPass{name}", [values], axis=axis)
                found = run(model, [values], tmp_path, threads=2)
            truth = softmax(values, axis, log=name == "LogSoftmax")
            if name == "LogSoftmax" and dtype == FLOAT64:
                # onnxruntime 1.31 in float64 keeps a NaN or +infinity to its own element; its
                # float32 spreads it over the row, as the definition does.
                spreads = (np.isnan(values) | np.isposinf(values)).any(axis, keepdims=True)
                wanted = np.where(spreads, truth, wanted)
            np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
            np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))
            # onnxruntime's error grows with the row, so numbers are held against the truth.
            tolerance = softmax_tolerance(
                values.astype(np.float64), axis, dtype, log=name == "LogSoftmax"
            )
            assert_close(
                np.where(np.isnan(wanted), np.nan, found).astype(dtype),
                np.where(np.isnan(wanted), np.nan, truth),
                tolerance,
            )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0, 0), (4, 1), (1, 1, 1)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sizes_of_zero_and_one(shape: tuple[int, ...], axis: int, tmp_path: Path) -> None:
    values = np.ones(shape, np.float32)
    found = run(model_of("TwoPassSoftmax", [values], axis=axis), [values], tmp_path)
    assert_expected(found, "TwoPassSoftmax", [values], {"axis": axis})


def test_a_row_beyond_every_private_cache(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((16, 2**20 + 9)).astype(np.float32)
    values[3, 5] = np.nan
    found = run(model_of("TwoPassSoftmax", [values], axis=-1), [values], tmp_path, threads=2)
    assert_expected(found, "TwoPassSoftmax", [values], {"axis": -1})


@st.composite
def calls(draw: Any) -> tuple[Array, int, Array | None, float]:
    """Values, an axis, and now and then a mask that broadcasts with them."""
    rank = draw(st.integers(1, 4))
    sizes = st.one_of(st.integers(0, 5), st.integers(1, 40), st.sampled_from([65, 300]))
    shape = [draw(sizes) for _ in range(rank)]
    while np.prod(shape) > 60_000:
        shape[int(np.argmax(shape))] //= 4
    axis = draw(st.integers(-rank, rank - 1))
    dtype = draw(st.sampled_from(TYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.1, 1.0, 20.0]))
    mask = None
    factor = 1.0
    values_shape = list(shape)
    if draw(st.booleans()):
        kept = draw(st.integers(0, rank))
        mask_shape = [s if draw(st.booleans()) else 1 for s in shape[rank - kept :]]
        if draw(st.booleans()):  # the mask may also widen the values
            values_shape = [s if draw(st.booleans()) else 1 for s in shape]
        mask = rng.standard_normal(mask_shape).astype(dtype)
        blocked = draw(st.sampled_from(["none", "1e9", "lowest", "infinite", "all infinite"]))
        if blocked != "none":  # what exporters write where a token must not be seen
            least = {"1e9": -1e9, "lowest": finfo(dtype).min}.get(blocked, -np.inf)
            hidden = rng.random(mask_shape) < (2.0 if blocked == "all infinite" else 0.4)
            with np.errstate(over="ignore"):  # -1e9 is infinite in float16
                mask = np.where(hidden, np.asarray(least).astype(dtype), mask)
        factor = draw(st.sampled_from([1.0, 0.125, -2.0]))
    values = (rng.standard_normal(values_shape) * spread).astype(dtype)
    return values, axis, mask, factor


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_any_shape_axis_type_and_mask(isa: str, log: bool, tmp_path: Path) -> None:
    @given(calls(), st.sampled_from([1, 2]))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(call: tuple[Array, int, Array | None, float], threads: int) -> None:
        values, axis, mask, factor = call
        name = "LogSoftmax" if log else "Softmax"
        inputs, rank = [values], values.ndim
        if mask is not None:
            name = f"Masked{name}"
            inputs += [np.full([1], factor, values.dtype), mask]
            rank = max(rank, mask.ndim)
        axis = axis % values.ndim - rank
        model = model_of(f"TwoPass{name}", inputs, axis=axis)
        found = run(model, inputs, tmp_path, threads=threads)
        assert_expected(found, f"TwoPass{name}", inputs, {"axis": axis})

    with instruction_set(isa):
        check()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((16, 2**17 + 3), 1),  # by pairs, in float64 and the small types
        ((3, 2**18 + 11), 1),  # split
        ((20_000, 37), 0),  # columns by pairs
        ((3, 90, 261), 1),  # columns in scratch memory
        ((30_000, 5), 1),
    ],
)
def test_large_rows_are_accurate(
    isa: str, dtype: Any, shape: tuple[int, int], axis: int, tmp_path: Path
) -> None:
    values = (np.random.default_rng(1).standard_normal(shape) * 4).astype(dtype)
    for log in (False, True):
        model = model_of(f"TwoPass{'Log' if log else ''}Softmax", [values], axis=axis)
        with instruction_set(isa):
            found = run(model, [values], tmp_path, threads=2)
        assert_expected(found, f"TwoPass{'Log' if log else ''}Softmax", [values], {"axis": axis})


def test_a_rising_row_moves_the_shared_exponent(tmp_path: Path) -> None:
    values = np.linspace(-3000, 3000, 2**18 + 1, dtype=np.float32)[None]
    shuffled = np.random.default_rng(9).permuted(np.repeat(values, 16, 0), axis=1)
    for row in (values, values[:, ::-1].copy(), np.roll(values, 777), shuffled):
        found = run(model_of("TwoPassSoftmax", [row], axis=-1), [row], tmp_path)
        assert_expected(found, "TwoPassSoftmax", [row], {"axis": -1})


def test_the_result_depends_neither_on_threads_nor_on_the_run(tmp_path: Path) -> None:
    values = np.random.default_rng(3).standard_normal((2, 2**18 + 77)).astype(np.float32)
    model = model_of("TwoPassSoftmax", [values], axis=-1)
    first = run(model, [values], tmp_path, threads=1)
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(run(model, [values], tmp_path, threads=threads), first)


@pytest.mark.parametrize("scale", [np.zeros((2,)), np.zeros((1, 1))], ids=["two", "rank 2"])
def test_a_scale_that_is_no_number_is_refused(scale: Array, tmp_path: Path) -> None:
    inputs = [np.zeros((2, 3), np.float32), scale.astype(np.float32), np.zeros(3, np.float32)]
    with pytest.raises(Exception, match="scale has the shape"):
        run(model_of("TwoPassMaskedSoftmax", inputs), inputs, tmp_path)


def test_shapes_that_do_not_broadcast_are_refused(tmp_path: Path) -> None:
    inputs = [np.zeros((2, 3), np.float32), np.ones(1, np.float32), np.zeros(4, np.float32)]
    model = model_of("TwoPassMaskedSoftmax", inputs, shapes=[["a", "b"], [1], ["c"]])
    with pytest.raises(Exception, match=r"\[2, 3\] and \[4\] do not broadcast"):
        run(model, inputs, tmp_path)


def test_an_axis_outside_the_rank_is_refused(tmp_path: Path) -> None:
    values = np.zeros((2, 3), np.float32)
    with pytest.raises(Exception, match="axis 2 is outside a tensor of rank 2"):
        run(model_of("TwoPassSoftmax", [values], axis=2), [values], tmp_path)


def test_shapes_stay_known_behind_the_operator(tmp_path: Path) -> None:
    values = np.zeros((2, 1, 3), np.float32)
    inputs = [values, np.ones(1, np.float32), np.zeros((4, 3), np.float32)]
    model = model_of("TwoPassMaskedSoftmax", inputs, shapes=[["n", 1, 3], [1], ["m", 3]])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert LIBRARY is not None
    with open_session(path, libraries=[LIBRARY]) as session:
        assert session.outputs[0].shape == ("n", "m", 3)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
