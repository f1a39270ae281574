"""Where the kernels of the operator library are faster than what onnxruntime has: one table.

Measured on 2026-11-25 with onnxruntime-gpu 1.31.1 (CPU provider), Python 3.11.7 and GCC 12.2, on a
shared 2-core x86-64 virtual machine with AVX-512 and 2 MB of second-level cache a core, in float32,
with one thread; ratios are those of medians, above 1 where ours is faster. The larger rows are in
docs/operators.md.

    softmax over an inner axis, by the columns behind it
        64x32x8 0.81   2x5x40x3 4.5   8x1024x16 1.20   1x4x8x8 2.0   4x2000x64 1.5   1x19x16x16 9.7
    softmax over the last axis
        rows of 64 to 8192 0.94 to 1.15   32x128000 1.25   1x16777216 1.34
    log softmax over the last axis
        16x512 0.93   16x4096 1.17   16x32000 1.30   32x128000 1.68   32x256000 1.58
    scale or mask in front of a softmax over the last axis
        a mask that hides half of the entries: 12x8x8 1.35   12x16x16 2.7   12x32x32 4.1
        12x64x64 6.0   12x197x197 6.2
        a mask that hides nothing: 12x8x8 0.57   12x32x32 0.87   12x50x50 1.09   12x64x64 1.27
        12x50x77 1.45   12x96x96 1.43   12x197x197 2.1   12x384x384 2.3   12x1x512 1.42
        1x1x128 1.09
        scale alone: 12x8x8 0.50   12x32x32 0.80   12x64x64 1.00   12x96x96 1.16   12x128x128 1.16
        12x197x197 1.53   4x256x256 1.33   12x384x384 1.8   12x1x512 1.20   1x1x128 0.98
    layer norm over channels, against the operator between Transposes
        1x8x8x8 1.32   1x16x5x5 1.08   1x8x7x7 1.35   1x384x4x8 1.49   1x1024x4x8 1.99
        1x384x7x7 1.73   1x768x7x7 2.1   8x768x7x7 2.6   1x1024x7x7 2.3   1x1536x7x7 2.2
        1x1536x14x14 2.2   1x2048x7x7 2.1   1x4096x7x7 2.1   1x640x8x8 2.6   1x384x14x14 2.9
        1x768x14x14 2.3   1x1024x14x14 2.3   1x192x28x28 2.8   1x96x56x56 3.5   1x64x128x128 7.8
    RMS norm over channels, likewise
        1x8x8x8 1.31   1x16x5x5 1.1   1x8x7x7 1.18   1x384x4x8 1.3   1x1024x4x8 1.68
        1x384x7x7 1.41   1x768x7x7 1.69   8x768x7x7 2.2   1x1024x7x7 1.86   1x1536x7x7 1.79
        1x1536x14x14 1.88   1x2048x7x7 1.72   1x4096x7x7 1.89   1x640x8x8 2   1x384x14x14 2.3
        1x768x14x14 1.88   1x1024x14x14 1.95   1x192x28x28 2.1   1x96x56x56 3.2   1x64x128x128 7
    group norm, against InstanceNormalization between Reshapes
        1x32x8x8 1.13   2x64x16x16 with SiLU 1.3   1x64x128x128 with SiLU 2.7   1x320x64x64 2.8

A size that is not known counts as 1 where a small one loses, and as large where an image lies
behind the axis, so that two or more dims have to be small for a loss; where the model has flattened
them, shape inference writes a product, `H*W`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

Dims: TypeAlias = "Sequence[int | str | None]"

COLUMNS: Final = 64  # behind the axis of a softmax
LONG_ROW: Final = 128_000  # of a softmax over the last axis
LONG_LOG_ROW: Final = 32_000  # of a log softmax
HIDDEN_ROW: Final = 16  # under a constant mask that hides entries
MASKED_ROW: Final = 64  # under any mask
SCALED_ROW: Final = 128  # behind a scale alone
SCALED: Final = 12 * 512  # and so many elements
JOINED: Final = 12 * 512 * 512  # elements, from which on the length of a row need not be known
CHANNELS: Final = 4096  # of a norm, at most
CHANNEL_COLUMNS: Final = 49  # behind them, at least
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


def masked_softmax(dims: Dims, axis: int, *, masked: bool, hides: bool) -> str | None:
    """Why a scale or a mask in front does not join a softmax; None where it does.

    Args:
        dims: Of the softmax's input.
        axis: Non-negative.
        masked: Whether there is a mask, and not a scale alone.
        hides: Whether the mask is a constant that hides a fourth of the entries or more.
    """
    row = dims[axis]
    if axis != len(dims) - 1:
        return "a scale or mask was measured over the last axis only"
    if _at_least(dims) >= JOINED:
        return None
    least = HIDDEN_ROW if hides else MASKED_ROW if masked else SCALED_ROW
    what = "a mask" if masked else "a scale"
    if not isinstance(row, int) or row < least:
        return f"{what} before rows of {_said(row)} is not shown to be faster, only from {least} on"
    if not masked and _at_least(dims) < SCALED:
        return f"a scale is not shown to be faster with fewer than {SCALED} elements"
    return None


def channel_norm(dims: Dims, axis: int) -> str | None:
    """Why a norm over one axis is not worth replacing; None where it is."""
    channels, behind = dims[axis], dims[axis + 1 :]
    if not behind:
        return "over the last axis onnxruntime's operator is as fast"
    columns = _at_least(behind)
    if isinstance(channels, int) and channels <= CHANNELS and columns >= CHANNEL_COLUMNS:
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
    """Whether two sizes or more are not known; one that is called a product, `H*W`, is two."""
    unknown = [d or "" for d in dims if not isinstance(d, int)]
    return len(unknown) + sum("*" in name for name in unknown) >= 2


def _said(dim: int | str | None) -> str:
    return str(dim) if isinstance(dim, int) else "unknown size"
