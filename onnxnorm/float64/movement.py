"""Operators that move, choose, repeat and cast elements."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from onnxnorm.float64.call import (
    Array,
    Call,
    NotImplementedHere,
    Value,
    implements,
    is_float_dtype,
    is_float_type,
    widen,
)


@implements("Identity", "Dropout")
def _identity(call: Call) -> list[Value]:
    x = call.inputs[0]
    if call.op_type == "Dropout":
        training = call.input(2)
        ratio = call.input(1)
        active = training is not None and bool(training)
        if call.version < 7:
            active = call.attribute("is_test", 0) == 0
        if active and (ratio is None or float(ratio) != 0.0):
            raise NotImplementedHere("dropout in training mode")
        return [x, np.ones(x.shape, dtype=np.bool_)]
    return [x]


@implements("Transpose")
def _transpose(call: Call) -> list[Value]:
    return [np.transpose(call.inputs[0], call.attribute("perm"))]


@implements("Flatten")
def _flatten(call: Call) -> list[Value]:
    x = call.inputs[0]
    axis = int(call.attribute("axis", 1))
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))]


@implements("Reshape")
def _reshape(call: Call) -> list[Value]:
    x = call.inputs[0]
    wanted = call.attribute("shape") if call.version < 5 else call.inputs[1].tolist()
    dims = [int(d) for d in wanted]
    if not call.attribute("allowzero", 0):
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    if -1 in dims:
        known = math.prod(d for d in dims if d != -1)
        dims[dims.index(-1)] = x.size // known if known else 0
    return [x.reshape(dims)]


@implements("Concat")
def _concat(call: Call) -> list[Value]:
    return [np.concatenate(call.inputs, axis=int(call.attribute("axis", 1)))]


@implements("Gather")
def _gather(call: Call) -> list[Value]:
    x, indices = call.inputs
    axis = int(call.attribute("axis", 0))
    size = x.shape[axis]
    if indices.size and (indices.min() < -size or indices.max() >= size):
        raise IndexError(f"a Gather index is outside [-{size}, {size - 1}]")
    return [np.take(x, indices, axis=axis, mode="wrap")]


@implements("GatherElements")
def _gather_elements(call: Call) -> list[Value]:
    x, indices = call.inputs
    axis = int(call.attribute("axis", 0)) % max(x.ndim, 1)
    grid = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    grid[axis] = indices
    return [x[tuple(grid)]]


@implements("Shape")
def _shape(call: Call) -> list[Value]:
    shape = call.inputs[0].shape
    start, end = int(call.attribute("start", 0)), call.attribute("end")
    return [np.array(shape[start : None if end is None else int(end)], dtype=np.int64)]


@implements("Size")
def _size(call: Call) -> list[Value]:
    return [np.array(call.inputs[0].size, dtype=np.int64)]


@implements("Expand")
def _expand(call: Call) -> list[Value]:
    x, shape = call.inputs
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(d) for d in shape)))]


@implements("Tile")
def _tile(call: Call) -> list[Value]:
    x, repeats = call.inputs[:2]
    return [np.tile(x, [int(n) for n in repeats])]


@implements("Slice")
def _slice(call: Call) -> list[Value]:
    x = call.inputs[0]
    if call.version < 10:
        starts, ends = call.attribute("starts"), call.attribute("ends")
        axes, steps = call.attribute("axes"), None
    else:
        starts, ends, axes, steps = (call.input(i) for i in range(1, 5))
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = _clamped(int(start), int(end), int(step), x.shape[int(axis)])
    return [x[tuple(index)]]


def _clamped(start: int, end: int, step: int, size: int) -> slice:
    """Return the Python slice of ONNX bounds, where an end before 0 means through element 0."""
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    if step > 0:
        return slice(min(max(start, 0), size), min(max(end, 0), size), step)
    start, end = min(max(start, 0), size - 1), min(max(end, -1), size - 1)
    return slice(start, None if end < 0 else end, step)


@implements("Unsqueeze", "Squeeze")
def _squeeze(call: Call) -> list[Value]:
    x = call.inputs[0]
    axes = call.attribute("axes") if call.input(1) is None else call.inputs[1].reshape(-1).tolist()
    if call.op_type == "Squeeze":  # onnxruntime takes an empty list of axes for an absent one
        return [np.squeeze(x, tuple(int(a) for a in axes) if axes else None)]
    return [np.expand_dims(x, tuple(int(a) for a in axes))]


@implements("EyeLike")
def _eye_like(call: Call) -> list[Value]:
    x = call.inputs[0]
    to = call.attribute("dtype")
    dtype = x.dtype if to is None else wide_dtype(int(to))
    rows, columns = x.shape
    return [np.eye(rows, columns, int(call.attribute("k", 0)), dtype=dtype)]


@implements("OneHot")
def _one_hot(call: Call) -> list[Value]:
    indices, depth, values = call.inputs
    depth = int(np.asarray(depth).reshape(-1)[0])
    indices = indices.astype(np.int64)
    indices = np.where(indices < 0, indices + depth, indices)
    hot = indices[..., None] == np.arange(depth)
    axis = int(call.attribute("axis", -1))
    return [np.moveaxis(np.where(hot, values[1], values[0]), -1, axis)]


@implements("Range")
def _range(call: Call) -> list[Value]:
    start, limit, delta = (np.asarray(v).reshape(-1)[0] for v in call.inputs)
    count = max(math.ceil((float(limit) - float(start)) / float(delta)), 0)
    return [(start + delta * np.arange(count)).astype(call.inputs[0].dtype)]


@implements("ConstantOfShape")
def _constant_of_shape(call: Call) -> list[Value]:
    value = call.attribute("value")
    value = np.zeros(1) if value is None else widen(np.asarray(value))
    return [np.full(tuple(int(d) for d in call.inputs[0]), value.reshape(-1)[0], value.dtype)]


def wide_dtype(elem_type: int) -> np.dtype[Any]:
    """Return the numpy dtype of an element type; float64 for every floating-point one."""
    if is_float_type(elem_type):
        return np.dtype(np.float64)
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))


def _strings(x: Array) -> Array:
    out = np.empty(x.shape, dtype=object)
    for index, item in np.ndenumerate(x):
        text = repr(float(item)) if x.dtype.kind == "f" else str(item)
        out[index] = text.removesuffix(".0")
    return out


def cast(x: Array, elem_type: int) -> Array:
    """Cast(x) with every floating-point target widened to float64; integers truncate."""
    if elem_type == onnx.TensorProto.STRING:
        return _strings(x) if x.dtype.kind not in "OSU" else x
    target = wide_dtype(elem_type)
    if x.dtype.kind in "OSU":
        texts = [t.decode() if isinstance(t, bytes) else str(t) for t in x.reshape(-1)]
        numbers = np.array([float(t) for t in texts])
        return np.asarray(numbers.reshape(x.shape).astype(target))
    if target.kind == "f" and is_float_dtype(x.dtype):
        return np.asarray(x.astype(np.float64))
    if x.dtype.kind == "f" and target.kind in "iu":
        with np.errstate(invalid="ignore"):
            return np.asarray(np.trunc(x).astype(np.int64).astype(target))
    return np.asarray(x.astype(target))


@implements("Cast")
def _cast(call: Call) -> list[Value]:
    return [cast(call.inputs[0], int(call.attribute("to")))]


@implements("CastLike")
def _cast_like(call: Call) -> list[Value]:
    x, like = call.inputs
    if like.dtype.kind in "OSU":
        return [cast(x, onnx.TensorProto.STRING)]
    return [cast(x, int(onnx.helper.np_dtype_to_tensor_dtype(like.dtype)))]


@implements("Trilu")
def _trilu(call: Call) -> list[Value]:
    x, k = call.inputs[0], call.input(1)
    cut = np.triu if call.attribute("upper", 1) else np.tril
    return [cut(x, 0 if k is None else int(np.asarray(k).reshape(-1)[0]))]
