"""The cost table takes nothing that its own measurements show to be slower."""

from __future__ import annotations

import re
from typing import Final

import pytest

from onnxnorm.ops import costs

# shape, axis, measured ratio
SOFTMAX: Final = [
    ((64, 32, 8), 1, 0.46),
    ((2, 5, 40, 3), 2, 0.55),
    ((8, 1024, 16), 1, 1.06),
    ((1, 4, 8, 8), 1, 1.5),
    ((4, 2000, 64), 1, 1.5),
    ((1, 19, 16, 16), 1, 5.8),
    ((1, 21, 512, 512), 1, 34.0),
    ((16384, 64), 1, 1.06),
    ((4096, 256), 1, 0.94),
    ((1024, 1024), 1, 1.0),
    ((128, 8192), 1, 1.15),
    ((32, 128_000), 1, 1.25),
    ((1, 2**24), 1, 1.34),
]
LOG: Final = [((16, 512), 0.93), ((16, 4096), 1.17), ((16, 32_000), 1.3), ((32, 128_000), 1.68)]
CHANNEL: Final = [
    ((1, 8, 8, 8), 1.3),
    ((1, 768, 7, 7), 0.5),
    ((1, 384, 14, 14), 0.94),
    ((1, 768, 16, 16), 0.88),
    ((1, 1024, 16, 16), 1.0),
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
    ((12, 64, 64), False, 0.9),
    ((12, 64, 64), False, 1.2),
    ((12, 197, 197), False, 0.83),
    ((12, 512, 512), False, 1.5),
]
GROUP: Final = [
    ((1, 32, 8, 8), 1.13),
    ((2, 64, 16, 16), 1.3),
    ((1, 64, 128, 128), 2.7),
    ((1, 320, 64, 64), 2.8),
]
# Measured as faster and refused all the same: their neighbours, or another run of the same, lose.
MARGIN: Final = {
    (8, 1024, 16),  # 64x32x8 and 2x5x40x3 are half as fast
    (16384, 64),  # of rows of 64 to 8192, 0.94 to 1.15
    (128, 8192),
    (16, 4096),  # 16x512 is slower
    (12, 64, 64),  # 0.9 with a mask, 1.2 with a scale
    (1, 8, 8, 8),  # 1x768x7x7 is half as fast
}


def decides(reason: str | None, ratio: float, shape: tuple[int, ...]) -> bool:
    """Whether the table takes what is faster and nothing that is slower."""
    return ratio > 1 if reason is None else ratio <= 1 or shape in MARGIN


@pytest.mark.parametrize(("shape", "axis", "ratio"), SOFTMAX)
def test_softmax(shape: tuple[int, ...], axis: int, ratio: float) -> None:
    assert decides(costs.softmax(shape, axis, log=False), ratio, shape)


@pytest.mark.parametrize(("shape", "ratio"), LOG)
def test_log_softmax(shape: tuple[int, ...], ratio: float) -> None:
    assert decides(costs.softmax(shape, 1, log=True), ratio, shape)


@pytest.mark.parametrize(("shape", "hides", "ratio"), MASKED)
def test_masked_softmax(shape: tuple[int, ...], hides: bool, ratio: float) -> None:
    assert decides(costs.masked_softmax(shape, 2, hides=hides), ratio, () if hides else shape)


@pytest.mark.parametrize(("shape", "ratio"), CHANNEL)
def test_channel_norm(shape: tuple[int, ...], ratio: float) -> None:
    assert decides(costs.channel_norm(shape, 1), ratio, shape)


@pytest.mark.parametrize(("shape", "ratio"), GROUP)
def test_group_norm(shape: tuple[int, ...], ratio: float) -> None:
    assert decides(costs.group_norm(shape), ratio, shape)


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (1, 32, "L"), (64, 4096)])
def test_a_group_norm_that_was_not_measured_stays(shape: tuple[int | str, ...]) -> None:
    assert costs.group_norm(shape) is not None
    assert costs.group_norm(("N", 32, "H", "W")) is None


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
