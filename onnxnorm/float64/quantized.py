"""Quantization: integers as they are, and what they stand for in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx

from onnxnorm.float64.call import (
    CONTRIB,
    OPERATORS,
    Array,
    Call,
    NotImplementedHere,
    Value,
    floats,
    implements,
    is_float_dtype,
    is_float_type,
)
from onnxnorm.float64.elementwise import sigmoid
from onnxnorm.float64.windows import convolve

_finfo: Final[Callable[[Any], Any]] = ml_dtypes.finfo


def _along(parameter: Array, x: Array, axis: int, block: int) -> Array:
    """Bring a per-tensor, per-axis or blocked quantization parameter to the shape of x."""
    if parameter.size == 1:
        return np.asarray(parameter.reshape(()))
    if block:
        repeated = np.repeat(parameter, block, axis=axis)
        return np.asarray(np.take(repeated, np.arange(x.shape[axis]), axis=axis))
    shape = [1] * x.ndim
    shape[axis] = parameter.size
    return np.asarray(parameter.reshape(shape))


def _integer_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    name = np.dtype(dtype).name
    if name in {"int4", "int2"}:
        bits = int(name[3:])
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if name in {"uint4", "uint2"}:
        return 0, (1 << int(name[4:])) - 1
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def quantize(x: Array, scale: Array, zero: Array, dtype: np.dtype[Any]) -> Array:
    """saturate(round_half_even(x / scale) + zero), the parameters broadcast to x."""
    low, high = _integer_range(dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        rounded = np.rint(x / scale) + zero.astype(np.float64)
    rounded = np.where(np.isnan(rounded), 0.0, rounded)
    return np.asarray(np.clip(rounded, low, high).astype(np.int64).astype(dtype))


def round_to_float(x: Array, dtype: np.dtype[Any], saturate: int) -> Array:
    """Round to a float of 8 or 4 bits, half to even; beyond its largest to that, if `saturate`.

    Source: the operator Cast of ONNX, to which QuantizeLinear refers. The types of 4 bits always
    saturate. The zero point of a float is 0.
    """
    if saturate or "float4" in np.dtype(dtype).name:
        largest = float(_finfo(dtype).max)
        x = np.clip(x, -largest, largest)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(x.astype(dtype))


def dequantize(x: Array, scale: Array, zero: Array | None) -> Array:
    """(x - zero) * scale in float64, the parameters broadcast to x."""
    value = x.astype(np.float64)
    if zero is not None:
        value = value - zero.astype(np.float64)
    return np.asarray(value * scale)


@implements("QuantizeLinear")
def _quantize_linear(call: Call) -> list[Value]:
    x, scale, zero = call.inputs[0], call.inputs[1], call.input(2)
    wanted = int(call.attribute("output_dtype", 0))
    if zero is not None:
        dtype = zero.dtype
    elif wanted:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(wanted))
    else:
        dtype = np.dtype(np.uint8)
    if wanted and is_float_type(wanted):
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(wanted))
    axis, block = int(call.attribute("axis", 1)), int(call.attribute("block_size", 0))
    scale = _along(scale, x, axis, block)
    if is_float_dtype(dtype):
        if dtype == np.float64:  # the widened zero point does not say which type it had
            raise NotImplementedHere("quantization to a float type that is not known")
        return [round_to_float(x.astype(np.float64) / scale, dtype, call.attribute("saturate", 1))]
    zero = np.zeros((), dtype) if zero is None else _along(zero, x, axis, block)
    return [quantize(x.astype(np.float64), scale, zero, dtype)]


@implements("DequantizeLinear")
def _dequantize_linear(call: Call) -> list[Value]:
    x, scale, zero = call.inputs[0], call.inputs[1], call.input(2)
    axis, block = int(call.attribute("axis", 1)), int(call.attribute("block_size", 0))
    zero = None if zero is None else _along(zero, x, axis, block)
    return [dequantize(x, _along(scale, x, axis, block), zero)]


for _name in ("QuantizeLinear", "DequantizeLinear"):
    OPERATORS[CONTRIB, _name] = OPERATORS["", _name]


def _dynamic_parameters(x: Array) -> tuple[Array, Array]:
    """Return the uint8 scale and zero point of the range of x, which always includes 0."""
    low = min(0.0, float(np.min(x, initial=0.0)))
    high = max(0.0, float(np.max(x, initial=0.0)))
    scale = (high - low) / 255.0 if high != low else 1.0
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.array(scale), np.array(zero, dtype=np.uint8)


@implements("DynamicQuantizeLinear")
def _dynamic_quantize(call: Call) -> list[Value]:
    scale, zero = _dynamic_parameters(call.inputs[0])
    return [quantize(call.inputs[0], scale, zero, np.dtype(np.uint8)), scale, zero]


def _integer_product(a: Array, a_zero: Array | None, b: Array, b_zero: Array | None) -> Array:
    """(a - a_zero) @ (b - b_zero), exact: products of bytes stay far below 2^53."""
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    if a_zero is not None:  # one per row of a, when there are many
        a = a - (a_zero if a_zero.ndim != 1 or a_zero.size == 1 else a_zero[:, None])
    if b_zero is not None:  # one per column of b
        b = b - b_zero
    return np.asarray(a @ b)


@implements("MatMulInteger")
def _matmul_integer(call: Call) -> list[Value]:
    a, b = call.inputs[:2]
    return [_integer_product(a, call.input(2), b, call.input(3)).astype(np.int32)]


def replaced(call: Call, inputs: Sequence[Value], op_type: str = "Conv") -> Call:
    """Return a call of another operator with the attributes of this one."""
    return Call(op_type, "", call.version, tuple(inputs), call.attributes, (True,))


@implements("ConvInteger")
def _conv_integer(call: Call) -> list[Value]:
    x, w = (v.astype(np.float64) for v in call.inputs[:2])
    if call.input(2) is not None:
        x = x - float(call.inputs[2].reshape(-1)[0])
    if call.input(3) is not None:
        w = w - call.inputs[3].astype(np.float64).reshape(-1, *(1,) * (w.ndim - 1))
    return [convolve(replaced(call, (x, w))).astype(np.int32)]


@implements("QLinearMatMul")
def _qlinear_matmul(call: Call) -> list[Value]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = call.inputs
    product = _integer_product(a, a_zero, b, b_zero)
    a_scale = a_scale[:, None] if a_scale.ndim == 1 and a_scale.size > 1 else a_scale
    return [quantize(product * (a_scale * b_scale), y_scale, y_zero, y_zero.dtype)]


@implements("QLinearConv")
def _qlinear_conv(call: Call) -> list[Value]:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = call.inputs[:8]
    bias = call.input(8)
    per_output = (-1, *(1,) * (w.ndim - 1))
    x = x.astype(np.float64) - float(x_zero.reshape(-1)[0])
    w = w.astype(np.float64) - w_zero.astype(np.float64).reshape(per_output)
    product = convolve(replaced(call, (x, w, bias)))
    factor = (x_scale * w_scale).reshape(-1, *(1,) * (w.ndim - 2))
    return [quantize(product * factor, y_scale, y_zero, y_zero.dtype)]


@implements("QLinearAdd", "QLinearMul", domain=CONTRIB)
def _qlinear_binary(call: Call) -> list[Value]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale = call.inputs[:7]
    y_zero = call.input(7)
    y_zero = np.zeros((), a.dtype) if y_zero is None else y_zero
    combine = np.add if call.op_type == "QLinearAdd" else np.multiply
    total = combine(dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero))
    return [quantize(total, y_scale, y_zero, a.dtype)]


@implements("QLinearSigmoid", "QLinearLeakyRelu", domain=CONTRIB)
def _qlinear_unary(call: Call) -> list[Value]:
    x, x_scale, x_zero, y_scale = call.inputs[:4]
    y_zero = call.input(4)
    y_zero = np.zeros((), x.dtype) if y_zero is None else y_zero
    real = dequantize(x, x_scale, x_zero)
    (alpha,) = floats(call, alpha=0.01)
    y = (
        sigmoid(real)
        if call.op_type == "QLinearSigmoid"
        else np.where(real < 0, alpha * real, real)
    )
    return [quantize(y, y_scale, y_zero, x.dtype)]


@implements("QLinearGlobalAveragePool", domain=CONTRIB)
def _qlinear_pool(call: Call) -> list[Value]:
    x, x_scale, x_zero, y_scale, y_zero = call.inputs[:5]
    last = bool(call.attribute("channels_last", 0))
    axes = tuple(range(1, x.ndim - 1)) if last else tuple(range(2, x.ndim))
    mean = np.mean(dequantize(x, x_scale, x_zero), axis=axes, keepdims=True)
    return [quantize(mean, y_scale, y_zero, x.dtype)]


@implements("MatMulIntegerToFloat", "DynamicQuantizeMatMul", domain=CONTRIB)
def _quantized_matmul(call: Call) -> list[Value]:
    if call.op_type == "DynamicQuantizeMatMul":
        x, b, b_scale = call.inputs[:3]
        b_zero, bias = call.input(3), call.input(4)
        a_scale, a_zero = _dynamic_parameters(x)
        a = quantize(x, a_scale, a_zero, np.dtype(np.uint8))
    else:
        a, b, a_scale, b_scale = call.inputs[:4]
        a_zero, b_zero, bias = call.input(4), call.input(5), call.input(6)
    y = _integer_product(a, a_zero, b, b_zero) * (a_scale * b_scale)
    return [y if bias is None else y + bias]


@implements("MatMulNBits", domain=CONTRIB)
def _matmul_nbits(call: Call) -> list[Value]:
    a, packed, scales = call.inputs[:3]
    zero, group, bias = call.input(3), call.input(4), call.input(5)
    k, n = int(call.attribute("K")), int(call.attribute("N"))
    bits, block = int(call.attribute("bits", 4)), int(call.attribute("block_size"))
    if group is not None or bits not in {2, 4, 8}:
        raise NotImplementedHere("MatMulNBits with a group index or odd bits")
    blocks = -(-k // block)

    def unpack(data: Array, count: int) -> Array:
        per = 8 // bits
        shifts = np.arange(per, dtype=np.uint8) * bits
        parts = (data[..., None] >> shifts) & ((1 << bits) - 1)
        return np.asarray(parts.reshape(*data.shape[:-1], -1)[..., :count])

    values = unpack(packed.reshape(n, -1), blocks * block).astype(np.float64)
    values = values.reshape(n, blocks, block)
    if zero is None:
        offset: Array = np.full((n, blocks), float(1 << (bits - 1)))
    elif zero.dtype == np.uint8:
        offset = unpack(zero.reshape(n, -1), blocks).astype(np.float64)
    else:
        offset = zero.reshape(n, blocks)
    weights = (values - offset[..., None]) * scales.reshape(n, blocks, 1)
    y = a @ weights.reshape(n, -1)[:, :k].T
    return [y if bias is None else y + bias]
