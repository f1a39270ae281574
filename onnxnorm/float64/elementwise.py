"""Operators of one element each, in float64."""

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
    floats,
    implements,
)


def _integer_divide(a: Array, b: Array) -> Array:
    """Divide integers as C does, truncating toward zero; 0 where the divisor is 0."""
    if a.dtype.kind == "u":
        return np.asarray(a // b)
    quotient = np.floor_divide(a, b)
    inexact = np.not_equal(quotient * b, a)
    return np.asarray(quotient + (inexact & ((a < 0) != (b < 0))).astype(a.dtype))


def _divide(a: Array, b: Array) -> Array:
    return np.asarray(np.divide(a, b) if a.dtype.kind == "f" else _integer_divide(a, b))


def _power(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f" and b.size == 1:
        exponent = float(b.reshape(-1)[0])
        shape = np.broadcast_shapes(a.shape, b.shape)
        if exponent == 2.0:
            return np.asarray(a * a).reshape(shape)
        if exponent == 3.0:
            return np.asarray(a * a * a).reshape(shape)
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        return np.asarray(np.power(a.astype(np.float64), b).astype(a.dtype))
    return np.asarray(np.power(a, b.astype(np.float64)).astype(a.dtype))


def erf(x: Array) -> Array:
    """Return 2/sqrt(pi) * integral of exp(-t^2) from 0 to x, elementwise, to 2e-16.

    Taylor expansion about the nearest of a table of points a = k/32: the derivatives of erf are
    exp(-a^2) times Hermite polynomials, so ten terms leave less than half an ulp for |x - a| at
    most 1/64. The table's values come from math.erf.
    """
    flat = np.ascontiguousarray(x, dtype=np.float64).reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, _ERF_CHUNK):
        part = flat[start : start + _ERF_CHUNK]
        magnitude = np.minimum(np.abs(part), _ERF_LIMIT)  # erf is 1 to the last bit beyond
        nan = np.isnan(magnitude)
        index = np.rint(np.where(nan, 0.0, magnitude) * _ERF_STEPS).astype(np.intp)
        delta = magnitude - index / _ERF_STEPS
        total = _ERF_TABLE[-1].take(index)
        for coefficients in _ERF_TABLE[-2::-1]:
            total *= delta
            total += coefficients.take(index)
        out[start : start + _ERF_CHUNK] = np.copysign(total, part)
    return out.reshape(np.shape(x))


_ERF_CHUNK: Final = 1 << 15
_ERF_STEPS: Final = 32
_ERF_LIMIT: Final = 6.0


def _erf_table(terms: int = 11) -> Array:
    points = np.arange(int(_ERF_LIMIT * _ERF_STEPS) + 1) / _ERF_STEPS
    table = [np.array([math.erf(a) for a in points])]
    slope = 2.0 / math.sqrt(math.pi) * np.exp(-points * points)
    # d^n erf = slope * (-1)^(n-1) * H_(n-1), with H_(k+1) = 2 a H_k - 2 k H_(k-1)
    hermite, previous = np.ones_like(points), np.zeros_like(points)
    for n in range(1, terms):
        table.append(slope * (-1.0) ** (n - 1) * hermite / math.factorial(n))
        hermite, previous = 2 * points * hermite - 2 * (n - 1) * previous, hermite
    return np.stack(table)


_ERF_TABLE: Final = _erf_table()


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), without overflow."""
    tail = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, tail) / (1.0 + tail))


def gelu(x: Array) -> Array:
    """Return x Phi(x), Phi the distribution function of the normal distribution."""
    return np.asarray(0.5 * x * (1.0 + erf(x * math.sqrt(0.5))))


def fast_gelu(x: Array) -> Array:
    """Return the approximation of `gelu` by tanh."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
    return np.asarray(0.5 * x * (1.0 + np.tanh(inner)))


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)), without overflow."""
    return np.asarray(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))


def _reciprocal(x: Array) -> Array:
    return np.asarray(1.0 / x)


_UNARY: Final[dict[str, Callable[[Array], Array]]] = {
    "Abs": np.abs,
    "Acos": np.arccos,
    "Acosh": np.arccosh,
    "Asin": np.arcsin,
    "Asinh": np.arcsinh,
    "Atan": np.arctan,
    "Atanh": np.arctanh,
    "Ceil": np.ceil,
    "Cos": np.cos,
    "Cosh": np.cosh,
    "Erf": erf,
    "Exp": np.exp,
    "Floor": np.floor,
    "HardSwish": lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "IsNaN": np.isnan,
    "Log": np.log,
    "Mish": lambda x: x * np.tanh(softplus(x)),
    "Neg": np.negative,
    "Not": np.logical_not,
    "Reciprocal": _reciprocal,
    "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Round": np.rint,
    "Sigmoid": sigmoid,
    "Sign": np.sign,
    "Sin": np.sin,
    "Sinh": np.sinh,
    "Softplus": softplus,
    "Softsign": lambda x: x / (1.0 + np.abs(x)),
    "Sqrt": np.sqrt,
    "Tan": np.tan,
    "Tanh": np.tanh,
}

_BINARY: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "Add": np.add,
    "And": np.logical_and,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "Div": _divide,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Mul": np.multiply,
    "Or": np.logical_or,
    "Pow": _power,
    "PRelu": lambda x, slope: np.where(x < 0, x * slope, x),
    "Sub": np.subtract,
    "Xor": np.logical_xor,
}


def _old_broadcast(call: Call, a: Array, b: Array) -> Array:
    """Reshape b for the `axis` attribute that broadcasting had before opset 7."""
    axis = call.attribute("axis")
    if call.version < 7 and axis is not None and b.ndim < a.ndim:
        axis = int(axis) % a.ndim
        return np.asarray(b.reshape(b.shape + (1,) * (a.ndim - axis - b.ndim)))
    return b


def _unary(call: Call) -> list[Value]:
    return [_UNARY[call.op_type](call.inputs[0])]


def _binary(call: Call) -> list[Value]:
    a, b = call.inputs
    return [_BINARY[call.op_type](a, _old_broadcast(call, a, b))]


for _name in _UNARY:
    OPERATORS["", _name] = _unary
for _name in _BINARY:
    OPERATORS["", _name] = _binary


@implements("Sum", "Mean", "Max", "Min")
def _variadic(call: Call) -> list[Value]:
    combine: Any = {"Max": np.maximum, "Min": np.minimum}.get(call.op_type, np.add)
    total = call.inputs[0]
    for value in call.inputs[1:]:
        total = combine(total, value)
    return [total / len(call.inputs) if call.op_type == "Mean" else total]


@implements("Clip")
def _clip(call: Call) -> list[Value]:
    x = call.inputs[0]
    low, high = call.input(1), call.input(2)
    if call.version < 11:
        low, high = call.attribute("min"), call.attribute("max")
    if low is not None:
        x = np.maximum(x, np.asarray(low, dtype=x.dtype))
    if high is not None:
        x = np.minimum(x, np.asarray(high, dtype=x.dtype))
    return [x]


@implements("HardSigmoid")
def _hard_sigmoid(call: Call) -> list[Value]:
    alpha, beta = floats(call, alpha=0.2, beta=0.5)
    return [np.clip(call.inputs[0] * alpha + beta, 0.0, 1.0)]


@implements("LeakyRelu")
def _leaky_relu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = floats(call, alpha=0.01)
    return [np.where(x < 0, x * alpha, x)]


@implements("Elu")
def _elu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = floats(call, alpha=1.0)
    return [np.where(x < 0, alpha * np.expm1(np.minimum(x, 0.0)), x)]


@implements("Celu")
def _celu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = floats(call, alpha=1.0)
    return [np.maximum(x, 0.0) + np.minimum(alpha * np.expm1(np.minimum(x, 0.0) / alpha), 0.0)]


@implements("Selu")
def _selu(call: Call) -> list[Value]:
    x = call.inputs[0]
    alpha, gamma = floats(call, alpha=1.6732632423543772, gamma=1.0507009873554805)
    return [gamma * np.where(x <= 0, alpha * np.expm1(np.minimum(x, 0.0)), x)]


@implements("ThresholdedRelu")
def _thresholded_relu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = floats(call, alpha=1.0)
    return [np.where(x > alpha, x, 0.0)]


@implements("Shrink")
def _shrink(call: Call) -> list[Value]:
    x = call.inputs[0]
    bias, lambd = floats(call, bias=0.0, lambd=0.5)
    below, above = x < -lambd, x > lambd
    return [np.where(below, x + bias, np.where(above, x - bias, 0)).astype(x.dtype)]


@implements("Swish")
def _swish(call: Call) -> list[Value]:
    (alpha,) = floats(call, alpha=1.0)
    return [call.inputs[0] * sigmoid(alpha * call.inputs[0])]


@implements("Gelu")
def _gelu_node(call: Call) -> list[Value]:
    tanh = call.attribute("approximate", "none") == "tanh"
    return [(fast_gelu if tanh else gelu)(call.inputs[0])]


@implements("Mod")
def _mod(call: Call) -> list[Value]:
    a, b = call.inputs
    return [np.fmod(a, b) if call.attribute("fmod", 0) else np.mod(a, b)]


@implements("IsInf")
def _is_inf(call: Call) -> list[Value]:
    x = call.inputs[0]
    negative = call.attribute("detect_negative", 1) != 0
    positive = call.attribute("detect_positive", 1) != 0
    return [(np.isposinf(x) & positive) | (np.isneginf(x) & negative)]


@implements("Where")
def _where(call: Call) -> list[Value]:
    return [np.where(*call.inputs)]


@implements("BitShift")
def _bit_shift(call: Call) -> list[Value]:
    a, b = call.inputs
    left = call.attribute("direction") == "LEFT"
    bits = a.dtype.itemsize * 8
    shifted = (np.left_shift if left else np.right_shift)(a, np.minimum(b, bits - 1))
    if a.dtype.kind == "i" and not left:  # the sign moves in, and is all that is left in the end
        return [shifted]
    return [np.where(b >= bits, a.dtype.type(0), shifted)]
