"""The cost table decides as the measurements that it names do."""

from __future__ import annotations

import re
from typing import Final

import pytest

from onnxnorm.ops import costs

# shape, axis, measured ratio
SOFTMAX: Final = [
    ((64, 32, 8), 1, 0.46),
    ((2, 5, 40, 3), 2, 0.55),
    ((1, 4, 8, 8), 1, 1.5),
    ((4, 2000, 64), 1, 1.5),
    ((1, 19, 16, 16), 1, 5.8),
    ((1, 21, 512, 512), 1, 34.0),
    ((4096, 256), 1, 0.94),
    ((1024, 1024), 1, 1.0),
    ((32, 128_000), 1, 1.25),
    ((1, 2**24), 1, 1.34),
]
CHANNEL: Final = [
    ((1, 768, 7, 7), 0.5),
    ((1, 384, 14, 14), 0.94),
    ((1, 768, 16, 16), 0.88),
    ((1, 1024, 16, 16), 0.9),
    ((1, 384, 16, 16), 1.27),
    ((1, 32, 16, 16), 1.8),
    ((1, 192, 28, 28), 1.6),
    ((1, 512, 28, 28), 1.7),
    ((1, 96, 56, 56), 2.4),
    ((1, 64, 128, 128), 4.9),
]
MASKED: Final = [
    ((12, 8, 8), True, 0.87),
    ((12, 64, 64), True, 2.5),
    ((12, 197, 197), True, 2.9),
    ((12, 197, 197), False, 0.83),
    ((12, 64, 64), False, 0.9),
    ((12, 512, 512), False, 1.5),
]


@pytest.mark.parametrize(("shape", "axis", "ratio"), SOFTMAX)
def test_softmax(shape: tuple[int, ...], axis: int, ratio: float) -> None:
    assert (costs.softmax(shape, axis, log=False) is None) == (ratio > 1)


@pytest.mark.parametrize(("row", "ratio"), [(512, 0.93), (32_000, 1.3), (128_000, 1.68)])
def test_log_softmax(row: int, ratio: float) -> None:
    assert (costs.softmax((32, row), 1, log=True) is None) == (ratio > 1)


@pytest.mark.parametrize(("shape", "hides", "ratio"), MASKED)
def test_masked_softmax(shape: tuple[int, ...], hides: bool, ratio: float) -> None:
    assert (costs.masked_softmax(shape, 2, hides=hides) is None) == (ratio > 1)


@pytest.mark.parametrize(("shape", "ratio"), CHANNEL)
def test_channel_norm(shape: tuple[int, ...], ratio: float) -> None:
    assert (costs.channel_norm(shape, 1) is None) == (ratio > 1)


@pytest.mark.parametrize(
    ("shape", "wins"),
    [
        ((1, 32, 8, 8), True),
        ((1, 320, 64, 64), True),
        (("N", 32, "H", "W"), True),
        ((1, 8, 8, 8), False),
        ((1, 32, "L"), False),
        ((64, 4096), False),
    ],
)
def test_group_norm(shape: tuple[int | str, ...], wins: bool) -> None:
    assert (costs.group_norm(shape) is None) == wins


def test_unknown_sizes_count_as_one_unless_an_image_lies_behind() -> None:
    assert costs.softmax(("N", 3, "H", "W"), 1, log=False) is None
    assert costs.softmax(("N", 3, None), 1, log=False) is not None
    assert costs.softmax((3, "V"), 1, log=False) is not None
    assert costs.masked_softmax(("B", 12, "T", "T"), 3, hides=False) is not None
    assert costs.channel_norm((1, 64, "H", "W"), 1) is not None
    assert costs.channel_norm((1, "C", 56, 56), 1) is not None


def test_the_table_says_when_and_with_what_it_was_measured() -> None:
    said = costs.__doc__ or ""
    assert re.search(r"Measured on \d{4}-\d\d-\d\d with onnxruntime", said)
