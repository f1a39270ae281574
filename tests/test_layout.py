"""Where features are, against numpy's own reshaping."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxnorm.layout import Layout, Part, reshaped

SHAPES = st.sampled_from(
    [(2, 3, 12), (2, 3, 3, 4), (6, 12), (2, 3, 2, 6), (72,), (2, 36), (3, 2, 3, 4), (2, 3, 12, 1)]
)


def _labels(layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """For each element of a tensor, which feature it is of."""
    features = np.arange(layout.features, dtype=np.float64)
    return np.broadcast_to(layout.spread(features, len(shape)), shape)


@settings(max_examples=200, deadline=None)
@given(SHAPES, SHAPES, st.data())
def test_a_reshape_takes_every_feature_along(
    before: tuple[int, ...], after: tuple[int, ...], data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-len(before), -1))
    layout = Layout((Part(axis, before[axis]),))
    moved = reshaped(layout, before, after)
    if moved is None:
        return
    labels = _labels(layout, before)
    assert np.array_equal(labels.reshape(after), _labels(moved, after))
    back = reshaped(moved, after, before)
    if back is not None:
        assert np.array_equal(_labels(back, before), labels)


@pytest.mark.parametrize(
    ("before", "after", "axis", "parts"),
    [
        (("n", "t", 768), ("n", "t", 12, 64), -1, (Part(-2, 12), Part(-1, 64))),
        (("n", "t", 12, 64), ("n", "t", 768), -1, (Part(-1, 64, outer=12),)),
        (("n", 96, "h", "w"), ("n", 96, "hw"), -3, (Part(-2, 96),)),
        (("n", 96, 7, 7), ("n", 4704), -3, (Part(-1, 96, inner=49),)),
        (("n", "h", "w", 96), ("k", 49, 96), -1, (Part(-1, 96),)),
        (("n", "t", 96), ("n", "u", 192), -1, (Part(-1, 96, outer=2),)),
    ],
)
def test_sizes_left_of_the_features_may_be_unknown(
    before: tuple[int | str, ...],
    after: tuple[int | str, ...],
    axis: int,
    parts: tuple[Part, ...],
) -> None:
    layout = Layout((Part(axis, before[axis]),))  # type: ignore[arg-type]
    moved = reshaped(layout, before, after)
    assert moved is not None
    assert moved.parts == parts


@pytest.mark.parametrize(
    ("before", "after", "axis"),
    [
        (("n", 96, "h", "w"), ("n", "c"), -3),
        ((2, 6, 4), (2, 4, 6), -1),
        (("n", "t", 10), ("n", "u", 4), -1),
    ],
)
def test_what_cannot_be_followed(
    before: tuple[int | str, ...], after: tuple[int | str, ...], axis: int
) -> None:
    assert reshaped(Layout((Part(axis, before[axis]),)), before, after) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout((Part(-1, 6),)), (4, 6)),
        (Layout((Part(-2, 4),)), (4, 6)),
        (Layout((Part(-1, 3, outer=2),)), (4, 6)),
        (Layout((Part(-1, 2, inner=3),)), (4, 6)),
        (Layout((Part(-2, 4), Part(-1, 6))), (4, 6)),
        (Layout((Part(-3, 2), Part(-1, 6))), (2, 4, 6)),
    ],
)
def test_centering_takes_the_mean_of_each_group(layout: Layout, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape) + 2.0
    centered = layout.centered(array)
    labels = _labels(layout, shape).astype(int)
    removed = array - centered
    groups: dict[float, list[int]] = {}
    for value, label in zip(removed.round(9).ravel(), labels.ravel(), strict=True):
        groups.setdefault(value, []).append(label)
    assert len(groups) == math.prod(shape) // layout.features
    assert all(sorted(found) == list(range(layout.features)) for found in groups.values())
    assert np.allclose(layout.centered(centered), centered, atol=1e-15)


def test_a_constant_without_the_axis_has_nothing_but_a_mean() -> None:
    layout = Layout((Part(-1, 6),))
    assert not layout.centered(np.ones((4, 1))).any()
    assert not layout.centered(np.asarray(3.0)).any()
    assert np.isnan(layout.centered(np.asarray(-np.inf)))
    assert layout.misses((4, 1))
    assert not layout.covers((4, 1))


def test_groups_of_a_transposed_convolution() -> None:
    layout = Layout((Part(-1, 4, outer=6),))
    grouped = layout.grouped(3)
    assert grouped is not None
    assert grouped.parts == (Part(-1, 4, outer=2),)
    assert layout.grouped(4) is None
    assert Layout((Part(-1, 4),)).grouped(2) is None
