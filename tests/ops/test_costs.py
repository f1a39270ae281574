"""The cost table takes nothing that its own measurements show to be slower."""

from __future__ import annotations

import re
from typing import Final

import pytest

from onnxnorm.ops import costs

# shape, axis, measured ratio
SOFTMAX: Final = [
    ((64, 32, 8), 1, 0.81),
    ((2, 5, 40, 3), 2, 4.5),
    ((8, 1024, 16), 1, 1.2),
    ((1, 4, 8, 8), 1, 2.0),
    ((4, 2000, 64), 1, 1.5),
    ((1, 19, 16, 16), 1, 9.7),
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
    ((1, 8, 8, 8), 1.32, 1.31),
    ((1, 16, 5, 5), 1.08, 1.1),
    ((1, 8, 7, 7), 1.35, 1.18),
    ((1, 384, 4, 8), 1.49, 1.3),
    ((1, 1024, 4, 8), 1.99, 1.68),
    ((1, 384, 7, 7), 1.73, 1.41),
    ((1, 768, 7, 7), 2.1, 1.69),
    ((8, 768, 7, 7), 2.6, 2.2),
    ((1, 1024, 7, 7), 2.3, 1.86),
    ((1, 1536, 7, 7), 2.2, 1.79),
    ((1, 1536, 14, 14), 2.2, 1.88),
    ((1, 2048, 7, 7), 2.1, 1.72),
    ((1, 4096, 7, 7), 2.1, 1.89),
    ((1, 640, 8, 8), 2.6, 2),
    ((1, 384, 14, 14), 2.9, 2.3),
    ((1, 768, 14, 14), 2.3, 1.88),
    ((1, 1024, 14, 14), 2.3, 1.95),
    ((1, 192, 28, 28), 2.8, 2.1),
    ((1, 96, 56, 56), 3.5, 3.2),
    ((1, 64, 128, 128), 7.8, 7),
]
# shape, measured ratio with a scale alone, with a mask that hides nothing, with one that hides half
MASKED: Final = [
    ((12, 8, 8), 0.5, 0.57, 1.35),
    ((12, 16, 16), 0.8, 0.85, 2.7),
    ((12, 32, 32), 0.8, 0.87, 4.1),
    ((12, 50, 50), 0.97, 1.09, 3.4),
    ((12, 64, 64), 1.0, 1.27, 6.0),
    ((12, 50, 77), 1.4, 1.45, 4.8),
    ((12, 96, 96), 1.16, 1.43, 6.2),
    ((12, 128, 128), 1.16, 1.76, 6.7),
    ((12, 197, 197), 1.53, 2.1, 6.2),
    ((4, 256, 256), 1.33, 1.94, 7.2),
    ((12, 384, 384), 1.8, 2.3, 6.0),
    ((12, 1, 512), 1.2, 1.42, 6.3),
    ((1, 1, 128), 0.98, 1.09, 1.27),
]
GROUP: Final = [
    ((1, 32, 8, 8), 1.13),
    ((2, 64, 16, 16), 1.3),
    ((1, 64, 128, 128), 2.7),
    ((1, 320, 64, 64), 2.8),
]
# Measured as faster and refused all the same: their neighbours, or another run of the same, lose.
MARGIN: Final = {
    ("softmax", (2, 5, 40, 3)),  # 64x32x8 is slower
    ("softmax", (8, 1024, 16)),
    ("softmax", (16384, 64)),  # of rows of 64 to 8192, 0.94 to 1.15
    ("softmax", (128, 8192)),
    ("log", (16, 4096)),  # 16x512 is slower
    ("hide", (12, 8, 8)),  # 0.57 under a mask that hides nothing
    ("mask", (12, 50, 50)),  # 0.97 with a scale
    ("scale", (12, 50, 77)),  # 1.0 at 12x64x64
    ("scale", (12, 96, 96)),
    *((kind, (1, 16, 5, 5)) for kind in ("layer", "rms")),  # 1.1, and what is smaller still
    *((kind, (1, 384, 4, 8)) for kind in ("layer", "rms")),
    *((kind, (1, 1024, 4, 8)) for kind in ("layer", "rms")),
}


def decides(reason: str | None, ratio: float, kind: str, shape: tuple[int, ...]) -> bool:
    """Whether the table takes what is faster and nothing that is slower."""
    return (reason is None) == (ratio > 1 and (kind, shape) not in MARGIN)


@pytest.mark.parametrize(("shape", "axis", "ratio"), SOFTMAX)
def test_softmax(shape: tuple[int, ...], axis: int, ratio: float) -> None:
    assert decides(costs.softmax(shape, axis, log=False), ratio, "softmax", shape)


@pytest.mark.parametrize(("shape", "ratio"), LOG)
def test_log_softmax(shape: tuple[int, ...], ratio: float) -> None:
    assert decides(costs.softmax(shape, 1, log=True), ratio, "log", shape)


@pytest.mark.parametrize(("shape", "scaled", "masked", "hidden"), MASKED)
def test_masked_softmax(
    shape: tuple[int, ...], scaled: float, masked: float, hidden: float
) -> None:
    for ratio, kind in ((scaled, "scale"), (masked, "mask"), (hidden, "hide")):
        hides = kind == "hide"
        reason = costs.masked_softmax(shape, 2, masked=kind != "scale", hides=hides)
        assert decides(reason, ratio, kind, shape), kind


@pytest.mark.parametrize(("shape", "layer", "rms"), CHANNEL)
def test_channel_norm(shape: tuple[int, ...], layer: float, rms: float) -> None:
    for ratio, kind in ((layer, "layer"), (rms, "rms")):
        assert decides(costs.channel_norm(shape, 1), ratio, kind, shape), kind


@pytest.mark.parametrize(("shape", "ratio"), GROUP)
def test_group_norm(shape: tuple[int, ...], ratio: float) -> None:
    assert decides(costs.group_norm(shape), ratio, "group", shape)


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (1, 32, "L"), (64, 4096)])
def test_a_group_norm_that_was_not_measured_stays(shape: tuple[int | str, ...]) -> None:
    assert costs.group_norm(shape) is not None
    assert costs.group_norm(("N", 32, "H", "W")) is None


def test_unknown_sizes_count_as_one_unless_an_image_lies_behind() -> None:
    assert costs.softmax(("N", 3, "H", "W"), 1, log=False) is None
    assert costs.softmax(("N", 16, 4, "floor(H/8)*floor(W/8)"), 1, log=False) is None
    assert costs.softmax(("N", 3, None), 1, log=False) is not None
    assert costs.softmax(("N", 3, "L"), 1, log=False) is not None
    assert costs.softmax((3, "V"), 1, log=False) is not None
    assert costs.masked_softmax(("B", 12, "T", "T"), 3, masked=True, hides=True) is not None
    assert costs.channel_norm((1, 64, "H", "W"), 1) is not None
    assert costs.channel_norm((1, "C", 56, 56), 1) is not None


def test_the_table_says_when_and_with_what_it_was_measured() -> None:
    said = costs.__doc__ or ""
    assert re.search(r"Measured on \d{4}-\d\d-\d\d with onnxruntime", said)
