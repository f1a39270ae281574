"""Where the kernels of the operator library are faster than what onnxruntime has: one table.

Measured on 2026-11-25 with onnxruntime-gpu 1.31.1 (CPU provider), Python 3.11.7 and GCC 12.2, on a
shared 2-core x86-64 virtual machine with AVX-512 and 2 MB of second-level cache a core, in float32,
with one thread; ratios are those of medians, above 1 where ours is faster. The larger rows are in
docs/operators.md.

    softmax over an inner axis, by the columns behind it
        64x32x8 0.46   2x5x40x3 0.55   8x1024x16 1.06   1x4x8x8 1.5   4x2000x64 1.5   1x19x16x16 5.8
    softmax over the last axis
        rows of 64 to 8192 0.94 to 1.15   32x128000 1.25   1x16777216 1.34
    log softmax over the last axis
        16x512 0.93   16x4096 1.17   16x32000 1.30   32x128000 1.68   32x256000 1.58
    scale or mask in front of a softmax over the last axis
        a mask that hides half of the entries: 12x8x8 0.87   12x64x64 2.5   12x197x197 2.9
        scale alone, or a mask that hides nothing: 12x64x64 0.9, 1.2   12x197x197 0.86, 0.83
        the same beyond the cache: 12x512x512 1.5, 1.7
    layer norm over channels, against the operator between Transposes
        1x8x8x8 1.3   1x768x7x7 0.50   1x384x14x14 0.94   1x768x16x16 0.88   1x1024x16x16 1.0
        1x384x16x16 1.27   1x32x16x16 1.8   1x192x28x28 1.6   1x512x28x28 1.7
        1x96x56x56 2.4   1x64x128x128 4.9
        RMS: 1x384x16x16 1.13   1x32x16x16 1.6   1x96x56x56 2.0
    group norm, against InstanceNormalization between Reshapes
        1x32x8x8 1.13   2x64x16x16 with SiLU 1.3   1x64x128x128 with SiLU 2.7   1x320x64x64 2.8

A size that is not known counts as 1 where a small one loses, and as large where an image lies
behind the axis, so that two or more dims have to be small for a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

Dims: TypeAlias = "Sequence[int | str | None]"

COLUMNS: Final = 64  # behind the axis of a softmax
LONG_ROW: Final = 128_000  # of a softmax over the last axis
LONG_LOG_ROW: Final = 32_000  # of a log softmax
JOINED: Final = 12 * 512 * 512  # elements, from which on a scale or a mask in front is worth it
HIDDEN_ROW: Final = 64  # the same where a constant mask hides entries, by the row
CHANNELS: Final = ((384, 256), (512, 784))  # at most so many channels, at least so many columns
GROUPED: Final = 32 * 8 * 8  # elements of one item in a group norm


def softmax(dims: Dims, axis: int, *, log: bool) -> str | None:
    """Why a softmax or log softmax is not worth replacing; None where it is.

    Args:
        dims: Of its input.
        axis: Non-negative.
        log: Whether it is a log softmax.
    """
    behind = dims[axis + 1 :]
    if not behind:
        row, least = dims[axis], LONG_LOG_ROW if log else LONG_ROW
        if isinstance(row, int) and row >= least:
            return None
        return f"rows of {_said(row)} are not shown to be faster, only from {least} on"
    if _at_least(behind) >= COLUMNS or _is_image(behind):
        return None
    return f"fewer than {COLUMNS} columns behind the axis are not shown to be faster"


def masked_softmax(dims: Dims, axis: int, *, hides: bool) -> str | None:
    """Why a scale or a mask in front does not join a softmax; None where it does.

    Args:
        dims: Of the softmax's input.
        axis: Non-negative.
        hides: Whether the mask is a constant that hides a fourth of the entries or more.
    """
    row = dims[axis]
    if axis != len(dims) - 1:
        return "a scale or mask was measured over the last axis only"
    if hides and isinstance(row, int) and row >= HIDDEN_ROW:
        return None
    if _at_least(dims) >= JOINED:
        return None
    return f"a scale or mask is not shown to be faster with fewer than {JOINED} elements"


def channel_norm(dims: Dims, axis: int) -> str | None:
    """Why a norm over one axis is not worth replacing; None where it is."""
    channels, behind = dims[axis], dims[axis + 1 :]
    if not behind:
        return "over the last axis onnxruntime's operator is as fast"
    columns = _at_least(behind)
    if isinstance(channels, int) and any(channels <= c and columns >= n for c, n in CHANNELS):
        return None
    return (
        f"{_said(channels)} channels with {columns} columns or more behind them are not shown to be"
        " faster than the operator between Transposes"
    )


def group_norm(dims: Dims) -> str | None:
    """Why a group norm is not worth replacing; None where it is."""
    if len(dims) > 2 and (_at_least(dims[1:]) >= GROUPED or _is_image(dims[2:])):
        return None
    return f"a group norm of fewer than {GROUPED} elements is not shown to be faster"


def _at_least(dims: Dims) -> int:
    """How many elements there are at least, where unknown sizes are taken for 1."""
    return math.prod(d for d in dims if isinstance(d, int))


def _is_image(dims: Dims) -> bool:
    return sum(not isinstance(d, int) for d in dims) >= 2


def _said(dim: int | str | None) -> str:
    return str(dim) if isinstance(dim, int) else "unknown size"
