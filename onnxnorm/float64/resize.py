"""Resize and Upsample in float64: a matrix for each axis."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from onnxnorm.float64.call import (
    Array,
    Call,
    NotImplementedHere,
    Value,
    floats,
    implements,
)


def _source_positions(
    mode: str, length: int, size: int, scale: float, call: Call
) -> NDArray[np.float64]:
    """Return the coordinate in the input of each output element along one axis."""
    out = np.arange(size, dtype=np.float64)
    if mode == "half_pixel":
        return (out + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        adjust = size / (scale * length)
        return length / 2 * (1 - adjust) + (out + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (out + 0.5) / scale - 0.5 if size > 1 else np.zeros_like(out)
    if mode == "align_corners":
        return out * (length - 1) / (size - 1) if size > 1 else np.zeros_like(out)
    if mode == "asymmetric":
        return out / scale
    if mode == "tf_half_pixel_for_nn":
        return (out + 0.5) / scale
    raise NotImplementedHere(f"Resize with {mode}")


def _taps_of(mode: str, x: NDArray[np.float64], call: Call, scale: float) -> tuple[Array, Array]:
    """Return integer neighbours (size, taps) and their weights for one axis."""
    antialias = bool(call.attribute("antialias", 0)) and scale < 1
    stretch = scale if antialias else 1.0
    support = 1.0 if mode == "linear" else 2.0
    count = 2 * math.ceil(support / stretch)
    first = np.floor(x) - count // 2 + 1
    index = first[:, None] + np.arange(count)
    distance = np.abs(index - x[:, None]) * stretch
    if mode == "linear":
        weight = np.maximum(1.0 - distance, 0.0)
    else:
        (a,) = floats(call, cubic_coeff_a=-0.75)
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    return index.astype(np.int64), weight


def _resize_matrix(call: Call, mode: str, length: int, size: int, scale: float) -> Array:
    """Return the (size, length) matrix that resamples one axis."""
    transform = call.attribute("coordinate_transformation_mode", "half_pixel")
    if call.op_type == "Upsample" or call.version < 11:
        transform = "asymmetric"
    x = _source_positions(transform, length, size, scale, call)
    index, weight = _taps_of(mode, x, call, scale)
    outside = (index < 0) | (index >= length)
    if call.attribute("exclude_outside", 0):
        weight = np.where(outside, 0.0, weight)
    weight = weight / weight.sum(axis=1, keepdims=True)
    matrix = np.zeros((size, length))
    rows = np.broadcast_to(np.arange(size)[:, None], index.shape)
    np.add.at(matrix, (rows, np.clip(index, 0, length - 1)), weight)
    return matrix


def _nearest(call: Call, length: int, size: int, scale: float) -> Array:
    transform = call.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = call.attribute("nearest_mode", "round_prefer_floor")
    if call.op_type == "Upsample" or call.version < 11:
        transform, rounding = "asymmetric", "floor"
    x = _source_positions(transform, length, size, scale, call)
    # positions are quotients of float32 scales; the standard's implementations compute them in
    # float32, so a tie is decided there
    x = x.astype(np.float32).astype(np.float64)
    if rounding == "round_prefer_floor":
        index = np.ceil(x - 0.5)
    elif rounding == "round_prefer_ceil":
        index = np.floor(x + 0.5)
    else:
        index = np.floor(x) if rounding == "floor" else np.ceil(x)
    return np.clip(index, 0, length - 1).astype(np.int64)


@implements("Resize", "Upsample")
def _resize(call: Call) -> list[Value]:
    x = call.inputs[0]
    mode = call.attribute("mode", "nearest")
    scales, sizes = _resize_geometry(call, x.shape)
    for axis, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        length = x.shape[axis]
        if size == length and scale == 1.0:
            continue
        if mode == "nearest":
            x = np.take(x, _nearest(call, length, size, scale), axis=axis)
        else:
            matrix = _resize_matrix(call, "cubic" if mode == "cubic" else "linear",
                                    length, size, scale)  # fmt: skip
            moved = np.tensordot(matrix, x, axes=(1, axis))
            x = np.moveaxis(moved, 0, axis)
    return [np.ascontiguousarray(x)]


def _resize_geometry(call: Call, shape: tuple[int, ...]) -> tuple[list[float], list[int]]:
    """Return scale and size for every axis."""
    if call.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise NotImplementedHere("Resize with tf_crop_and_resize")
    if call.op_type == "Upsample" or call.version < 11:
        given = call.attribute("scales") if call.version < 9 else call.inputs[1]
        scales, sizes = [float(s) for s in given], None
    else:
        raw, wanted = call.input(2), call.input(3)
        sizes = None if wanted is None or wanted.size == 0 else [int(s) for s in wanted]
        scales = [] if sizes is not None or raw is None else [float(s) for s in raw]
    axes = call.attribute("axes")
    axes = list(range(len(shape))) if axes is None else [int(a) % len(shape) for a in axes]
    if sizes is not None:
        policy = call.attribute("keep_aspect_ratio_policy", "stretch")
        scales = [size / shape[axis] for size, axis in zip(sizes, axes, strict=True)]
        if policy != "stretch":
            common = min(scales) if policy == "not_larger" else max(scales)
            scales = [common] * len(axes)
            sizes = [math.floor(common * shape[axis] + 0.5) for axis in axes]
    else:
        sizes = [math.floor(shape[a] * s) for s, a in zip(scales, axes, strict=True)]
    all_scales, all_sizes = [1.0] * len(shape), list(shape)
    for axis, scale, size in zip(axes, scales, sizes, strict=True):
        all_scales[axis], all_sizes[axis] = scale, size
    return all_scales, all_sizes
