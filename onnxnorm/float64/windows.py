"""Convolutions and pools in float64.

Convolutions are matrix products, `W @ patches(x)`, where the patches of a 1x1 kernel are x itself
and a depthwise kernel is a sum over its taps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from onnxnorm.float64.call import (
    Array,
    Call,
    NotImplementedHere,
    Value,
    implements,
)


@dataclass(frozen=True)
class _Window:
    """A sliding window over the spatial axes: kernel, stride, dilation, padding (begin, end)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    def output(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the number of window positions along each axis."""
        return tuple(
            (n + b + e - d * (k - 1) - 1) // s + 1
            for n, b, e, d, k, s in zip(
                spatial, self.begin, self.end, self.dilations, self.kernel, self.strides,
                strict=True,
            )
        )  # fmt: skip

    def taps(self, out: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Return each kernel position and the slices of the padded input that it reads."""
        found = []
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            slices = tuple(
                slice(t * d, t * d + (n - 1) * s + 1, s)
                for t, d, n, s in zip(tap, self.dilations, out, self.strides, strict=True)
            )
            found.append((tap, slices))
        return found


def _window(call: Call, spatial: Sequence[int], kernel: Sequence[int]) -> _Window:
    """Read strides, dilations and padding of a convolution or pooling node."""
    rank = len(kernel)
    strides = tuple(int(s) for s in call.attribute("strides") or (1,) * rank)
    dilations = tuple(int(d) for d in call.attribute("dilations") or (1,) * rank)
    auto = call.attribute("auto_pad", "NOTSET")
    if auto in {"SAME_UPPER", "SAME_LOWER"}:
        totals = [
            max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            for n, s, d, k in zip(spatial, strides, dilations, kernel, strict=True)
        ]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        begin, end = (less, more) if auto == "SAME_UPPER" else (more, less)
    elif auto == "VALID":
        begin = end = [0] * rank
    else:
        pads = [int(p) for p in call.attribute("pads") or (0,) * (2 * rank)]
        begin, end = pads[:rank], pads[rank:]
    return _Window(tuple(kernel), strides, dilations, tuple(begin), tuple(end))


def _padded(x: Array, window: _Window, value: float = 0.0) -> Array:
    """Pad the spatial axes of x; a negative pad crops, as onnxruntime does."""
    lead = x.ndim - len(window.kernel)
    pads = [(0, 0)] * lead + list(zip(window.begin, window.end, strict=True))
    if any(b < 0 or e < 0 for b, e in pads):
        crop = tuple(
            slice(max(-b, 0), n - max(-e, 0)) for (b, e), n in zip(pads, x.shape, strict=True)
        )
        x, pads = x[crop], [(max(b, 0), max(e, 0)) for b, e in pads]
    if not any(b or e for b, e in pads):
        return x
    return np.pad(x, pads, constant_values=value)


@implements("Conv")
def _conv(call: Call) -> list[Value]:
    return [convolve(call)]


def convolve(call: Call) -> Array:
    """y[n, o] = b[o] + sum over c, k of W[o, c, k] * x[n, c, stride * p + dilation * k - pad].

    Any rank, groups, strides, dilations and padding; x is (N, C, *spatial), W is
    (O, C / group, *kernel). The dtype is that of the operands (float64, or an integer type).
    """
    x, w, b = call.inputs[0], call.inputs[1], call.input(2)
    group = int(call.attribute("group", 1))
    if x.ndim == 2:
        raise NotImplementedHere("a convolution without spatial axes")
    window = _window(call, x.shape[2:], w.shape[2:])
    out = window.output(x.shape[2:])
    y = np.zeros((x.shape[0], w.shape[0], *out), dtype=np.result_type(x, w))
    if y.size:
        depthwise = group == x.shape[1] and w.shape[1] == 1
        for n in range(x.shape[0]):  # one sample at a time keeps the patches small
            (_convolve_depthwise if depthwise else _convolve_patches)(
                x[n], w, window, out, group, y[n]
            )
    if b is not None:
        y += b.reshape(-1, *(1,) * len(out))
    return y


def _convolve_depthwise(
    x: Array, w: Array, window: _Window, out: tuple[int, ...], group: int, y: Array
) -> None:
    x = _padded(x, window)
    filters = w.reshape(group, -1, *window.kernel)  # group, multiplier, *kernel
    target = y.reshape(group, -1, *out)
    for tap, slices in window.taps(out):
        tile = x[(slice(None), *slices)]
        for m in range(filters.shape[1]):
            at: Any = (slice(None), m, *tap)
            factor = filters[at].reshape(-1, *(1,) * len(out))
            target[:, m] += tile * factor


_PATCH_BYTES: Final = 1 << 26


def _convolve_patches(
    x: Array, w: Array, window: _Window, out: tuple[int, ...], group: int, y: Array
) -> None:
    """Multiply the filters with the patches of x, some rows of the output at a time."""
    channels, taps = x.shape[0], math.prod(window.kernel)
    x = _padded(x, window)
    filters = w.reshape(group, w.shape[0] // group, -1)
    row_bytes = 8 * channels * taps * math.prod(out[1:])
    rows = max(1, min(out[0], _PATCH_BYTES // max(row_bytes, 1)))
    every = window.taps(out)
    stride = window.strides[0]
    for start in range(0, out[0], rows):
        count = min(rows, out[0] - start)
        patches = np.empty((channels, taps, count, *out[1:]), dtype=x.dtype)
        for index, (_, (first, *rest)) in enumerate(every):
            begin = first.start + start * stride
            part = slice(begin, begin + (count - 1) * stride + 1, stride)
            patches[:, index] = x[(slice(None), part, *rest)]
        flat = patches.reshape(group, channels // group * taps, -1)
        product = np.matmul(filters, flat)
        y[:, start : start + count] = product.reshape(-1, count, *out[1:])


@implements("ConvTranspose")
def _conv_transpose(call: Call) -> list[Value]:
    x, w, b = call.inputs[0], call.inputs[1], call.input(2)
    group = int(call.attribute("group", 1))
    spatial, kernel, rank = x.shape[2:], w.shape[2:], x.ndim - 2
    strides = tuple(int(s) for s in call.attribute("strides") or (1,) * rank)
    dilations = tuple(int(d) for d in call.attribute("dilations") or (1,) * rank)
    extra = tuple(int(p) for p in call.attribute("output_padding") or (0,) * rank)
    full = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(spatial, strides, dilations, kernel, strict=True)
    ]
    auto, shape = call.attribute("auto_pad", "NOTSET"), call.attribute("output_shape")
    if shape is None and auto in {"SAME_UPPER", "SAME_LOWER"}:
        # where the stride leaves gaps, nothing reaches that far, and onnxruntime ends before
        shape = [
            min(n * s, f + e) for n, s, f, e in zip(spatial, strides, full, extra, strict=True)
        ]
    if shape is not None:
        shape = [int(d) for d in shape][-rank:]
        totals = [f + e - n for f, e, n in zip(full, extra, shape, strict=True)]
        halves = [t // 2 for t in totals]
        rest = [t - h for t, h in zip(totals, halves, strict=True)]
        # the standard gives the odd element to the end only for SAME_UPPER
        begin, end = (halves, rest) if auto == "SAME_UPPER" else (rest, halves)
    elif auto == "VALID":
        begin = end = [0] * rank
    else:
        pads = [int(p) for p in call.attribute("pads") or (0,) * (2 * rank)]
        begin, end = pads[:rank], pads[rank:]
    size = [f + e - p - q for f, e, p, q in zip(full, extra, begin, end, strict=True)]
    outputs = w.shape[1] * group
    room = [max(f, p + n) - min(p, 0) for f, p, n in zip(full, begin, size, strict=True)]
    canvas = np.zeros((x.shape[0], outputs, *room), dtype=np.result_type(x, w))
    window = _Window(tuple(kernel), strides, dilations, (0,) * rank, (0,) * rank)
    filters = w.reshape(group, w.shape[0] // group, w.shape[1], -1).transpose(3, 0, 2, 1)
    for n in range(x.shape[0] if x.size else 0):
        flat = x[n].reshape(group, x.shape[1] // group, -1)
        for index, (_, slices) in enumerate(window.taps(spatial)):
            spread = (filters[index] @ flat).reshape(outputs, *spatial)
            shifted = tuple(
                slice(s.start - min(p, 0), s.stop - min(p, 0), s.step)
                for s, p in zip(slices, begin, strict=True)
            )
            place: Any = (n, slice(None), *shifted)
            canvas[place] += spread
    crop = tuple(slice(max(p, 0), max(p, 0) + n) for p, n in zip(begin, size, strict=True))
    y = canvas[(slice(None), slice(None), *crop)]
    return [y if b is None else y + b.reshape(-1, *(1,) * rank)]


# --- pooling -----------------------------------------------------------------------------------


def _pool_window(call: Call, spatial: Sequence[int]) -> tuple[_Window, _Window]:
    """Return the declared window and the one extended at the end for ceil_mode."""
    window = _window(call, spatial, [int(k) for k in call.attribute("kernel_shape")])
    if not call.attribute("ceil_mode", 0):
        return window, window
    end = list(window.end)
    floor = window.output(spatial)
    for axis, (n, s) in enumerate(zip(spatial, window.strides, strict=True)):
        reach = window.dilations[axis] * (window.kernel[axis] - 1) + 1
        begin = window.begin[axis]
        ceil = -(-(n + begin + window.end[axis] - reach) // s) + 1
        if (ceil - 1) * s >= n + begin:  # a window that would start in the padding does not count
            ceil -= 1
        if ceil > floor[axis]:
            end[axis] = (ceil - 1) * s + reach - n - begin
    extended = _Window(window.kernel, window.strides, window.dilations, window.begin, tuple(end))
    return window, extended


@implements("MaxPool")
def _max_pool(call: Call) -> list[Value]:
    x = call.inputs[0]
    if call.wants(1) or x.dtype.kind != "f":
        raise NotImplementedHere("MaxPool with indices or integers")
    _, window = _pool_window(call, x.shape[2:])
    out = window.output(x.shape[2:])
    y = np.full((*x.shape[:2], *out), -np.inf)
    padded = _padded(x, window, -np.inf)
    for _, slices in window.taps(out):
        np.maximum(y, padded[(slice(None), slice(None), *slices)], out=y)
    return [y]


@implements("AveragePool")
def _average_pool(call: Call) -> list[Value]:
    x = call.inputs[0]
    declared, window = _pool_window(call, x.shape[2:])
    out = window.output(x.shape[2:])
    y = np.zeros((*x.shape[:2], *out))
    padded = _padded(x, window)
    # what ceil_mode adds beyond the declared padding never counts in the divisor
    inside = np.ones(x.shape[2:])
    if call.attribute("count_include_pad", 0):
        inside = _padded(inside[None, None], declared, 1.0)[0, 0]
        overhang = tuple(w - d for w, d in zip(window.end, declared.end, strict=True))
        counts = np.pad(inside, [(0, o) for o in overhang])
    else:
        counts = _padded(inside[None, None], window)[0, 0]
    divisor = np.zeros(out)
    for _, slices in window.taps(out):
        y += padded[(slice(None), slice(None), *slices)]
        divisor += counts[slices]
    return [y / divisor]


@implements("LpPool")
def _lp_pool(call: Call) -> list[Value]:
    x, (_, window) = call.inputs[0], _pool_window(call, call.inputs[0].shape[2:])
    p = int(call.attribute("p", 2))
    out = window.output(x.shape[2:])
    y = np.zeros((*x.shape[:2], *out))
    padded = _padded(np.abs(x) ** p, window)
    for _, slices in window.taps(out):
        y += padded[(slice(None), slice(None), *slices)]
    return [y ** (1.0 / p)]


@implements("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call) -> list[Value]:
    x = call.inputs[0]
    axes = tuple(range(2, x.ndim))
    reduce: Any = np.mean if call.op_type == "GlobalAveragePool" else np.max
    return [reduce(x, axis=axes, keepdims=True)]


@implements("GlobalLpPool")
def _global_lp_pool(call: Call) -> list[Value]:
    x, p = call.inputs[0], int(call.attribute("p", 2))
    axes = tuple(range(2, x.ndim))
    return [np.sum(np.abs(x) ** p, axis=axes, keepdims=True) ** (1.0 / p)]
