"""The normalization kernels against a float64 truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.calls import (
    FLOAT32,
    INSTRUCTION_SETS,
    TYPES,
    Array,
    assert_expected,
    instruction_set,
    model_of,
    needs_library,
    run,
)

pytestmark = needs_library
EPSILON = 1e-5


@st.composite
def calls(draw: Any) -> tuple[Array, list[int], Array, Array]:
    rank = draw(st.integers(1, 4))
    sizes = st.one_of(st.integers(0, 5), st.integers(1, 40), st.sampled_from([65, 300]))
    shape = [draw(sizes) for _ in range(rank)]
    while np.prod(shape) > 60_000:
        shape[int(np.argmax(shape))] //= 4
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
    axes = [axis - rank if draw(st.booleans()) else axis for axis in axes]
    dtype = draw(st.sampled_from(TYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.standard_normal(shape) * draw(st.sampled_from([0.1, 1.0, 50.0]))
    values += draw(st.sampled_from([0.0, 3.0]))

    def affine() -> Array:
        kept = draw(st.integers(0, rank))
        sizes = [s if draw(st.booleans()) else 1 for s in shape[rank - kept :]]
        result: Array = rng.standard_normal(sizes).astype(dtype)
        return result

    return values.astype(dtype), axes, affine(), affine()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
def test_any_axes_type_scale_and_bias(isa: str, centered: bool, tmp_path: Path) -> None:
    @given(calls(), st.sampled_from([1, 2]))
    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(call: tuple[Array, list[int], Array, Array], threads: int) -> None:
        values, axes, scale, bias = call
        inputs: list[Array] = [values, scale, bias] if centered else [values, scale]
        name = f"Channel{'Layer' if centered else 'RMS'}Normalization"
        found = run(
            model_of(name, inputs, axes=axes, epsilon=EPSILON), inputs, tmp_path, threads=threads
        )
        assert_expected(found, name, inputs, {"axes": axes, "epsilon": EPSILON})

    with instruction_set(isa):
        check()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 64, 33, 31), [1]),  # columns in scratch memory
        ((2, 3000, 70), [1]),  # columns that do not fit it
        ((300, 768), [1]),  # rows
        ((2, 3, 70_001), [2]),  # long rows
        ((3, 5, 4, 90), [0, 2]),  # axes that are no neighbours, columns
        ((3, 5, 4, 90), [1, 3]),  # and rows
        ((4, 1, 6), [1]),
    ],
)
def test_the_ways_through_memory(
    isa: str, dtype: Any, shape: tuple[int, ...], axes: list[int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    values: Array = (rng.standard_normal(shape) + 1).astype(dtype)
    wide = [s if i in axes else 1 for i, s in enumerate(shape)]
    scale: Array = rng.standard_normal(wide).astype(dtype)
    bias: Array = rng.standard_normal(wide).astype(dtype)
    inputs: list[Array] = [values, scale, bias]
    with instruction_set(isa):
        model = model_of("ChannelLayerNormalization", inputs, axes=axes, epsilon=EPSILON)
        found = run(model, inputs, tmp_path, threads=2)
    attributes = {"axes": axes, "epsilon": EPSILON}
    assert_expected(found, "ChannelLayerNormalization", inputs, attributes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_large_common_mean_costs_no_more_than_its_own_rounding(
    axis: int, dtype: Any, tmp_path: Path
) -> None:
    values = np.random.default_rng(6).standard_normal((4, 48, 64)) + 10_000
    values = values.astype(dtype)
    inputs: list[Array] = [values, np.ones(1, dtype), np.zeros(1, dtype)]
    model = model_of("ChannelLayerNormalization", inputs, axes=[axis], epsilon=EPSILON)
    found = run(model, inputs, tmp_path)
    attributes = {"axes": [axis], "epsilon": EPSILON}
    assert_expected(found, "ChannelLayerNormalization", inputs, attributes)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("channels", [5, 8, 9, 500])
def test_channels_far_from_those_of_the_guess_cost_no_digits(
    isa: str, channels: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(9)
    values = rng.standard_normal((2, channels, 150))
    values[0, 0] += 3e4  # one channel, or all that the kernel guesses a mean from
    values[1, np.arange(8) * channels // 8] += 3e4
    values[:, :, ::7] = 1.1  # and columns that have no deviation
    inputs: list[Array] = [
        values.astype(np.float32),
        rng.standard_normal((channels, 1)).astype(np.float32),
        rng.standard_normal((channels, 1)).astype(np.float32),
    ]
    attributes: dict[str, Any] = {"axes": [1], "epsilon": EPSILON}
    with instruction_set(isa):
        found = run(model_of("ChannelLayerNormalization", inputs, **attributes), inputs, tmp_path)
    assert_expected(found, "ChannelLayerNormalization", inputs, attributes)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
def test_special_values_stay_in_their_column(isa: str, centered: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(10).standard_normal((1, 20, 150)).astype(np.float32)
    inputs: list[Array] = [values, np.ones(1, np.float32)]
    if centered:
        inputs.append(np.zeros(1, np.float32))
    for column, row, value in ((3, 0, np.nan), (70, 19, np.inf), (149, 8, -np.inf)):
        values[0, row, column] = value
    name = f"Channel{'Layer' if centered else 'RMS'}Normalization"
    attributes: dict[str, Any] = {"axes": [1], "epsilon": EPSILON}
    with instruction_set(isa):
        found = run(model_of(name, inputs, **attributes), inputs, tmp_path)
    with np.errstate(invalid="ignore"):
        assert_expected(found, name, inputs, attributes)
    special = found[0][:, [3, 70, 149]]
    # One over an infinite root is 0, but a mean that is infinite leaves nothing.
    finite = np.count_nonzero(special == 0, axis=0).tolist()
    assert finite == ([0, 0, 0] if centered else [0, 19, 19])


def test_squares_that_overflow_leave_zeros(tmp_path: Path) -> None:
    values = np.full((1, 20, 70), 1e20, np.float32)
    inputs: list[Array] = [values, np.ones(1, np.float32)]
    model = model_of("ChannelRMSNormalization", inputs, axes=[1], epsilon=EPSILON)
    np.testing.assert_array_equal(run(model, inputs, tmp_path), 0)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 8), 4), ((2, 6, 5), 3), ((1, 12, 9, 7), 12), ((3, 8, 4, 4, 3), 1), ((0, 4, 3), 2)],
)
def test_group_norm(
    isa: str, dtype: Any, silu: bool, shape: tuple[int, ...], groups: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    values = (rng.standard_normal(shape) * 2 + 1).astype(dtype)
    scale, bias = (rng.standard_normal(shape[1]).astype(dtype) for _ in range(2))
    inputs: list[Array] = [values, scale, bias]
    name = f"GroupNormalization{'Silu' if silu else ''}"
    with instruction_set(isa):
        model = model_of(name, inputs, num_groups=groups, epsilon=EPSILON)
        found = run(model, inputs, tmp_path, threads=2)
    assert_expected(found, name, inputs, {"num_groups": groups, "epsilon": EPSILON})


def test_silu_of_large_values_does_not_overflow(tmp_path: Path) -> None:
    values = np.array([[[-1.0, 1.0]]], np.float32)
    inputs = [values, np.array([1000.0], np.float32), np.zeros(1, np.float32)]
    found = run(model_of("GroupNormalizationSilu", inputs, num_groups=1), inputs, tmp_path)
    assert_expected(found, "GroupNormalizationSilu", inputs, {"num_groups": 1})


def test_nan_stays_in_its_row(tmp_path: Path) -> None:
    values = np.random.default_rng(8).standard_normal((3, 40)).astype(np.float32)
    values[1, 7] = np.nan
    for axis, turned in ((1, values), (0, np.ascontiguousarray(values.T))):
        inputs = [turned, np.ones(1, np.float32)]
        found = run(model_of("ChannelRMSNormalization", inputs, axes=[axis]), inputs, tmp_path)
        bad = np.isnan(found) if axis == 1 else np.isnan(found).T
        np.testing.assert_array_equal(bad.all(1), [False, True, False])
        assert not bad[[0, 2]].any()


@pytest.mark.parametrize(
    ("name", "shapes", "attributes", "message"),
    [
        ("ChannelRMSNormalization", [(2, 3), (4,)], {"axes": [1]}, "scale of shape .4. does not"),
        ("ChannelRMSNormalization", [(2, 3), (1, 2, 3)], {"axes": [1]}, "scale of shape"),
        ("ChannelRMSNormalization", [(2, 3), (3,)], {"axes": [2]}, "axis 2 is outside"),
        ("ChannelRMSNormalization", [(2, 3), (3,)], {"axes": [1, -1]}, "axis -1 is named twice"),
        ("GroupNormalization", [(2, 3), (3,), (3,)], {"num_groups": 2}, "no 2 equal groups"),
        ("GroupNormalization", [(2, 3), (3,), (3,)], {"num_groups": 0}, "num_groups is 0"),
        ("GroupNormalization", [(2, 4), (3,), (4,)], {"num_groups": 2}, "scale has the shape"),
        ("ChannelRMSNormalization", [(2, 3), (3,)], {"axes": [1], "stash_type": 11}, "stash_type"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    name: str,
    shapes: list[tuple[int, ...]],
    attributes: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    inputs = [np.ones(shape, FLOAT32) for shape in shapes]
    with pytest.raises(Exception, match=message):
        run(model_of(name, inputs, **attributes), inputs, tmp_path)
