"""Sums, extremes, softmaxes, orders: operators along axes, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from onnxnorm.float64.call import (
    OPERATORS,
    Array,
    Call,
    Value,
    implements,
)


def _log_sum_exp(x: Array, axes: tuple[int, ...]) -> Array:
    if x.size == 0:
        return np.asarray(np.log(np.sum(np.exp(x), axis=axes, keepdims=True)))
    peak = np.max(x, axis=axes, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    return np.asarray(np.log(np.sum(np.exp(x - peak), axis=axes, keepdims=True)) + peak)


def _extreme(x: Array, axes: tuple[int, ...], largest: bool) -> Array:
    if x.dtype.kind == "b":
        return np.asarray((np.any if largest else np.all)(x, axis=axes, keepdims=True))
    if x.dtype.kind == "f":
        empty: Any = -np.inf if largest else np.inf
    else:
        limits = np.iinfo(x.dtype)
        empty = limits.min if largest else limits.max
    reduce: Any = np.max if largest else np.min
    return np.asarray(reduce(x, axis=axes, keepdims=True, initial=empty))


_REDUCE: Final[dict[str, Callable[[Array, tuple[int, ...]], Array]]] = {
    "ReduceSum": lambda x, a: np.sum(x, axis=a, keepdims=True, dtype=x.dtype),
    "ReduceMean": lambda x, a: np.mean(x, axis=a, keepdims=True),
    "ReduceMax": lambda x, a: _extreme(x, a, largest=True),
    "ReduceMin": lambda x, a: _extreme(x, a, largest=False),
    "ReduceProd": lambda x, a: np.prod(x, axis=a, keepdims=True, dtype=x.dtype),
    "ReduceL1": lambda x, a: np.sum(np.abs(x), axis=a, keepdims=True, dtype=x.dtype),
    "ReduceL2": lambda x, a: np.sqrt(np.sum(x * x, axis=a, keepdims=True, dtype=x.dtype)),
    "ReduceSumSquare": lambda x, a: np.sum(x * x, axis=a, keepdims=True, dtype=x.dtype),
    "ReduceLogSum": lambda x, a: np.log(np.sum(x, axis=a, keepdims=True)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduce(call: Call) -> list[Value]:
    x = call.inputs[0]
    axes = call.attribute("axes") if call.input(1) is None else call.inputs[1].reshape(-1).tolist()
    if axes is None or len(axes) == 0:
        # over no axes, what is not a reduction is done all the same: a square, a logarithm
        axes = () if call.attribute("noop_with_empty_axes", 0) else range(x.ndim)
    axes = tuple(sorted(int(a) % max(x.ndim, 1) for a in axes)) if x.ndim else ()
    out = _REDUCE[call.op_type](x, axes).astype(x.dtype, copy=False)
    return [out if call.attribute("keepdims", 1) else np.squeeze(out, axes)]


for _name in _REDUCE:
    OPERATORS["", _name] = _reduce


def _softmax_along(x: Array, axis: int) -> Array:
    if x.shape[axis] == 0:
        return x
    e = x - np.max(x, axis=axis, keepdims=True)
    np.exp(e, out=e)
    e /= np.sum(e, axis=axis, keepdims=True)
    return np.asarray(e)


def _log_softmax_along(x: Array, axis: int) -> Array:
    if x.shape[axis] == 0:
        return x
    x = x - np.max(x, axis=axis, keepdims=True)
    return np.asarray(x - np.log(np.sum(np.exp(x), axis=axis, keepdims=True)))


def _hardmax_along(x: Array, axis: int) -> Array:
    best = np.expand_dims(np.argmax(x, axis=axis), axis)
    out = np.zeros_like(x)
    np.put_along_axis(out, best, 1, axis=axis)
    return out


@implements("Softmax", "LogSoftmax", "Hardmax")
def _softmax(call: Call) -> list[Value]:
    x = call.inputs[0]
    along = {
        "Softmax": _softmax_along,
        "LogSoftmax": _log_softmax_along,
        "Hardmax": _hardmax_along,
    }[call.op_type]
    if call.version >= 13:
        return [along(x, int(call.attribute("axis", -1)))]
    axis = int(call.attribute("axis", 1))
    axis = axis + x.ndim if axis < 0 else axis
    flat = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return [along(flat, 1).reshape(x.shape)]


@implements("ArgMax", "ArgMin")
def _arg_extreme(call: Call) -> list[Value]:
    x = call.inputs[0]
    axis = int(call.attribute("axis", 0)) % x.ndim
    find = np.argmax if call.op_type == "ArgMax" else np.argmin
    if call.attribute("select_last_index", 0):
        out = x.shape[axis] - 1 - find(np.flip(x, axis), axis=axis)
    else:
        out = find(x, axis=axis)
    if call.attribute("keepdims", 1):
        out = np.expand_dims(out, axis)
    return [np.asarray(out, dtype=np.int64)]


@implements("TopK")
def _top_k(call: Call) -> list[Value]:
    x = call.inputs[0]
    k = int(call.attribute("k") if call.version < 10 else call.inputs[1].reshape(-1)[0])
    axis = int(call.attribute("axis", -1))
    if call.attribute("largest", 1):
        # a stable descending sort keeps the lower index first among equals, as the standard asks
        order = np.flip(x.shape[axis] - 1 - np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis, kind="stable")
    index = np.take(order, np.arange(k), axis=axis)
    return [np.take_along_axis(x, index, axis), index.astype(np.int64)]


@implements("CumSum")
def _cum_sum(call: Call) -> list[Value]:
    x, axis = call.inputs[0], int(np.asarray(call.inputs[1]).reshape(-1)[0])
    reverse, exclusive = call.attribute("reverse", 0), call.attribute("exclusive", 0)
    x = np.flip(x, axis) if reverse else x
    out = np.cumsum(x, axis=axis, dtype=x.dtype)
    if exclusive and x.shape[axis]:  # shifted by one: out - x would make NaN of an infinity
        out = np.roll(out, 1, axis)
        np.moveaxis(out, axis, 0)[0] = 0
    return [np.flip(out, axis) if reverse else out]
