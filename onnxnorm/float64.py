"""ONNX operators in float64 numpy: fast where models spend their time, exact where it matters.

    y = f(x), every floating-point array in float64, integers as they are

`OPERATORS` maps (domain, operator) to a function of a `Call`. What is not in the table is
evaluated by onnx.reference or by onnxruntime; `onnxnorm.truth` chooses. Convolutions are matrix
products: `W @ patches(x)`, where the patches of a 1x1 kernel are x itself and a depthwise kernel
is a sum over its taps. Nothing here rounds to a narrower type.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Value: TypeAlias = Any  # an array, a list of values (sequence), a dict (map) or None (absent)

_WIDE_FLOATS: Final = frozenset(
    np.dtype(getattr(ml_dtypes, name))
    for name in dir(ml_dtypes)
    if name.startswith(("bfloat", "float"))
)

_FLOAT_TYPES: Final = frozenset(
    number
    for name, number in onnx.TensorProto.DataType.items()
    if name.startswith(("FLOAT", "BFLOAT", "DOUBLE"))
)


class NotImplementedHere(Exception):
    """This operator, or this use of it, has no float64 implementation in the table."""


@dataclass(frozen=True)
class Call:
    """One node with its inputs as values.

    Attributes:
        op_type: Operator name.
        domain: Operator domain, "" for the standard one.
        version: Opset version of the domain in the scope of the node.
        inputs: Values in schema order; None where an optional input is absent.
        attributes: Python values of the attributes that the node carries.
        outputs: Which outputs are wanted, in schema order.
    """

    op_type: str
    domain: str
    version: int
    inputs: tuple[Value, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[bool, ...]

    def input(self, index: int) -> Any:
        """Return input `index`, or None when it is absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return attribute `name`, or the default."""
        return self.attributes.get(name, default)

    def wants(self, index: int) -> bool:
        """Tell whether output `index` is used."""
        return index < len(self.outputs) and self.outputs[index]


Operator: TypeAlias = Callable[[Call], list[Value]]
OPERATORS: Final[dict[tuple[str, str], Operator]] = {}
CONTRIB: Final = "com.microsoft"


def is_float_dtype(dtype: np.dtype[Any]) -> bool:
    """Tell whether a numpy dtype is a floating-point one, the narrow ml_dtypes included."""
    return dtype.kind == "f" or dtype in _WIDE_FLOATS


def is_float_type(elem_type: int) -> bool:
    """Tell whether a TensorProto element type is a floating-point one."""
    return elem_type in _FLOAT_TYPES


def widen(value: Value) -> Value:
    """Return floating-point arrays as float64, exactly, and anything else as it is."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64) if is_float_dtype(value.dtype) else value
    if isinstance(value, np.generic):
        return widen(np.asarray(value))
    if isinstance(value, list):
        return [widen(item) for item in value]
    if isinstance(value, dict):
        return {key: widen(item) for key, item in value.items()}
    return value


def _implements(*names: str, domain: str = "") -> Callable[[Operator], Operator]:
    def register(operator: Operator) -> Operator:
        for name in names:
            OPERATORS[domain, name] = operator
        return operator

    return register


# --- elementwise -------------------------------------------------------------------------------


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


def _sigmoid(x: Array) -> Array:
    tail = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, tail) / (1.0 + tail))


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1.0 + erf(x * math.sqrt(0.5))))


def _fast_gelu(x: Array) -> Array:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
    return np.asarray(0.5 * x * (1.0 + np.tanh(inner)))


def _softplus(x: Array) -> Array:
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
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "Neg": np.negative,
    "Not": np.logical_not,
    "Reciprocal": _reciprocal,
    "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Round": np.rint,
    "Sigmoid": _sigmoid,
    "Sign": np.sign,
    "Sin": np.sin,
    "Sinh": np.sinh,
    "Softplus": _softplus,
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


@_implements("Sum", "Mean", "Max", "Min")
def _variadic(call: Call) -> list[Value]:
    combine: Any = {"Max": np.maximum, "Min": np.minimum}.get(call.op_type, np.add)
    total = call.inputs[0]
    for value in call.inputs[1:]:
        total = combine(total, value)
    return [total / len(call.inputs) if call.op_type == "Mean" else total]


@_implements("Clip")
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


@_implements("HardSigmoid")
def _hard_sigmoid(call: Call) -> list[Value]:
    alpha, beta = _floats(call, alpha=0.2, beta=0.5)
    return [np.clip(call.inputs[0] * alpha + beta, 0.0, 1.0)]


@_implements("LeakyRelu")
def _leaky_relu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = _floats(call, alpha=0.01)
    return [np.where(x < 0, x * alpha, x)]


@_implements("Elu")
def _elu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = _floats(call, alpha=1.0)
    return [np.where(x < 0, alpha * np.expm1(np.minimum(x, 0.0)), x)]


@_implements("Celu")
def _celu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = _floats(call, alpha=1.0)
    return [np.maximum(x, 0.0) + np.minimum(alpha * np.expm1(np.minimum(x, 0.0) / alpha), 0.0)]


@_implements("Selu")
def _selu(call: Call) -> list[Value]:
    x = call.inputs[0]
    alpha, gamma = _floats(call, alpha=1.6732632423543772, gamma=1.0507009873554805)
    return [gamma * np.where(x <= 0, alpha * np.expm1(np.minimum(x, 0.0)), x)]


@_implements("ThresholdedRelu")
def _thresholded_relu(call: Call) -> list[Value]:
    x = call.inputs[0]
    (alpha,) = _floats(call, alpha=1.0)
    return [np.where(x > alpha, x, 0.0)]


@_implements("Shrink")
def _shrink(call: Call) -> list[Value]:
    x = call.inputs[0]
    bias, lambd = _floats(call, bias=0.0, lambd=0.5)
    below, above = x < -lambd, x > lambd
    return [np.where(below, x + bias, np.where(above, x - bias, 0)).astype(x.dtype)]


@_implements("Swish")
def _swish(call: Call) -> list[Value]:
    (alpha,) = _floats(call, alpha=1.0)
    return [call.inputs[0] * _sigmoid(alpha * call.inputs[0])]


@_implements("Gelu")
def _gelu_node(call: Call) -> list[Value]:
    tanh = call.attribute("approximate", "none") == "tanh"
    return [(_fast_gelu if tanh else _gelu)(call.inputs[0])]


@_implements("Mod")
def _mod(call: Call) -> list[Value]:
    a, b = call.inputs
    return [np.fmod(a, b) if call.attribute("fmod", 0) else np.mod(a, b)]


@_implements("IsInf")
def _is_inf(call: Call) -> list[Value]:
    x = call.inputs[0]
    negative = call.attribute("detect_negative", 1) != 0
    positive = call.attribute("detect_positive", 1) != 0
    return [(np.isposinf(x) & positive) | (np.isneginf(x) & negative)]


@_implements("Where")
def _where(call: Call) -> list[Value]:
    return [np.where(*call.inputs)]


@_implements("BitShift")
def _bit_shift(call: Call) -> list[Value]:
    a, b = call.inputs
    left = call.attribute("direction") == "LEFT"
    bits = a.dtype.itemsize * 8
    shifted = (np.left_shift if left else np.right_shift)(a, np.minimum(b, bits - 1))
    if a.dtype.kind == "i" and not left:  # the sign moves in, and is all that is left in the end
        return [shifted]
    return [np.where(b >= bits, a.dtype.type(0), shifted)]


def _floats(call: Call, **defaults: float) -> tuple[float, ...]:
    """Return float attributes as the float32 values that the file can hold."""
    return tuple(
        float(np.float32(call.attribute(name, default))) for name, default in defaults.items()
    )


# --- shapes and movement -----------------------------------------------------------------------


@_implements("Identity", "Dropout")
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


@_implements("Transpose")
def _transpose(call: Call) -> list[Value]:
    return [np.transpose(call.inputs[0], call.attribute("perm"))]


@_implements("Flatten")
def _flatten(call: Call) -> list[Value]:
    x = call.inputs[0]
    axis = int(call.attribute("axis", 1))
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))]


@_implements("Reshape")
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


@_implements("Concat")
def _concat(call: Call) -> list[Value]:
    return [np.concatenate(call.inputs, axis=int(call.attribute("axis", 1)))]


@_implements("Gather")
def _gather(call: Call) -> list[Value]:
    x, indices = call.inputs
    axis = int(call.attribute("axis", 0))
    size = x.shape[axis]
    if indices.size and (indices.min() < -size or indices.max() >= size):
        raise IndexError(f"a Gather index is outside [-{size}, {size - 1}]")
    return [np.take(x, indices, axis=axis, mode="wrap")]


@_implements("GatherElements")
def _gather_elements(call: Call) -> list[Value]:
    x, indices = call.inputs
    axis = int(call.attribute("axis", 0)) % max(x.ndim, 1)
    grid = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    grid[axis] = indices
    return [x[tuple(grid)]]


@_implements("Shape")
def _shape(call: Call) -> list[Value]:
    shape = call.inputs[0].shape
    start, end = int(call.attribute("start", 0)), call.attribute("end")
    return [np.array(shape[start : None if end is None else int(end)], dtype=np.int64)]


@_implements("Size")
def _size(call: Call) -> list[Value]:
    return [np.array(call.inputs[0].size, dtype=np.int64)]


@_implements("Expand")
def _expand(call: Call) -> list[Value]:
    x, shape = call.inputs
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(d) for d in shape)))]


@_implements("Tile")
def _tile(call: Call) -> list[Value]:
    x, repeats = call.inputs[:2]
    return [np.tile(x, [int(n) for n in repeats])]


@_implements("Slice")
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


@_implements("Unsqueeze", "Squeeze")
def _squeeze(call: Call) -> list[Value]:
    x = call.inputs[0]
    axes = call.attribute("axes") if call.input(1) is None else call.inputs[1].reshape(-1).tolist()
    if call.op_type == "Squeeze":  # onnxruntime takes an empty list of axes for an absent one
        return [np.squeeze(x, tuple(int(a) for a in axes) if axes else None)]
    return [np.expand_dims(x, tuple(int(a) for a in axes))]


@_implements("EyeLike")
def _eye_like(call: Call) -> list[Value]:
    x = call.inputs[0]
    to = call.attribute("dtype")
    dtype = x.dtype if to is None else _wide_dtype(int(to))
    rows, columns = x.shape
    return [np.eye(rows, columns, int(call.attribute("k", 0)), dtype=dtype)]


@_implements("OneHot")
def _one_hot(call: Call) -> list[Value]:
    indices, depth, values = call.inputs
    depth = int(np.asarray(depth).reshape(-1)[0])
    indices = indices.astype(np.int64)
    indices = np.where(indices < 0, indices + depth, indices)
    hot = indices[..., None] == np.arange(depth)
    axis = int(call.attribute("axis", -1))
    return [np.moveaxis(np.where(hot, values[1], values[0]), -1, axis)]


@_implements("Range")
def _range(call: Call) -> list[Value]:
    start, limit, delta = (np.asarray(v).reshape(-1)[0] for v in call.inputs)
    count = max(math.ceil((float(limit) - float(start)) / float(delta)), 0)
    return [(start + delta * np.arange(count)).astype(call.inputs[0].dtype)]


@_implements("ConstantOfShape")
def _constant_of_shape(call: Call) -> list[Value]:
    value = call.attribute("value")
    value = np.zeros(1) if value is None else widen(np.asarray(value))
    return [np.full(tuple(int(d) for d in call.inputs[0]), value.reshape(-1)[0], value.dtype)]


def _wide_dtype(elem_type: int) -> np.dtype[Any]:
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
    target = _wide_dtype(elem_type)
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


@_implements("Cast")
def _cast(call: Call) -> list[Value]:
    return [cast(call.inputs[0], int(call.attribute("to")))]


@_implements("CastLike")
def _cast_like(call: Call) -> list[Value]:
    x, like = call.inputs
    if like.dtype.kind in "OSU":
        return [cast(x, onnx.TensorProto.STRING)]
    return [cast(x, int(onnx.helper.np_dtype_to_tensor_dtype(like.dtype)))]


@_implements("Trilu")
def _trilu(call: Call) -> list[Value]:
    x, k = call.inputs[0], call.input(1)
    cut = np.triu if call.attribute("upper", 1) else np.tril
    return [cut(x, 0 if k is None else int(np.asarray(k).reshape(-1)[0]))]


# --- reductions --------------------------------------------------------------------------------


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


@_implements("Softmax", "LogSoftmax", "Hardmax")
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


@_implements("ArgMax", "ArgMin")
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


@_implements("TopK")
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


@_implements("CumSum")
def _cum_sum(call: Call) -> list[Value]:
    x, axis = call.inputs[0], int(np.asarray(call.inputs[1]).reshape(-1)[0])
    reverse, exclusive = call.attribute("reverse", 0), call.attribute("exclusive", 0)
    x = np.flip(x, axis) if reverse else x
    out = np.cumsum(x, axis=axis, dtype=x.dtype)
    if exclusive and x.shape[axis]:  # shifted by one: out - x would make NaN of an infinity
        out = np.roll(out, 1, axis)
        np.moveaxis(out, axis, 0)[0] = 0
    return [np.flip(out, axis) if reverse else out]


# --- products ----------------------------------------------------------------------------------


@_implements("MatMul")
def _matmul(call: Call) -> list[Value]:
    a, b = call.inputs
    if b.ndim == 2 and a.ndim > 2:  # one large product instead of many small ones
        flat = a.reshape(-1, a.shape[-1]) @ b if a.size else np.zeros((0, b.shape[1]), a.dtype)
        return [flat.reshape(*a.shape[:-1], b.shape[1])]
    return [np.asarray(np.matmul(a, b))]


@_implements("Gemm")
def _gemm(call: Call) -> list[Value]:
    a, b, c = call.inputs[0], call.inputs[1], call.input(2)
    alpha, beta = _floats(call, alpha=1.0, beta=1.0)
    a = a.T if call.attribute("transA", 0) else a
    b = b.T if call.attribute("transB", 0) else b
    out = a @ b
    if alpha != 1.0:
        out = (alpha * out).astype(out.dtype)
    if c is not None:
        out = out + (c if beta == 1.0 else (beta * c).astype(out.dtype))
    return [out]


@_implements("Einsum")
def _einsum(call: Call) -> list[Value]:
    return [np.asarray(np.einsum(call.attribute("equation"), *call.inputs, optimize=True))]


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


@_implements("Conv")
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


@_implements("ConvTranspose")
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


@_implements("MaxPool")
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


@_implements("AveragePool")
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


@_implements("LpPool")
def _lp_pool(call: Call) -> list[Value]:
    x, (_, window) = call.inputs[0], _pool_window(call, call.inputs[0].shape[2:])
    p = int(call.attribute("p", 2))
    out = window.output(x.shape[2:])
    y = np.zeros((*x.shape[:2], *out))
    padded = _padded(np.abs(x) ** p, window)
    for _, slices in window.taps(out):
        y += padded[(slice(None), slice(None), *slices)]
    return [y ** (1.0 / p)]


@_implements("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call) -> list[Value]:
    x = call.inputs[0]
    axes = tuple(range(2, x.ndim))
    reduce: Any = np.mean if call.op_type == "GlobalAveragePool" else np.max
    return [reduce(x, axis=axes, keepdims=True)]


@_implements("GlobalLpPool")
def _global_lp_pool(call: Call) -> list[Value]:
    x, p = call.inputs[0], int(call.attribute("p", 2))
    axes = tuple(range(2, x.ndim))
    return [np.sum(np.abs(x) ** p, axis=axes, keepdims=True) ** (1.0 / p)]


# --- normalizations ----------------------------------------------------------------------------


def _channels(value: Array, rank: int) -> Array:
    return np.asarray(value.reshape(-1, *(1,) * (rank - 2)) if rank > 1 else value)


@_implements("BatchNormalization")
def _batch_norm(call: Call) -> list[Value]:
    x, gamma, beta, mean, variance = call.inputs
    (epsilon, momentum) = _floats(call, epsilon=1e-5, momentum=0.9)
    extra: list[Value] = []
    training = call.attribute("training_mode", 0)
    if call.version < 7:
        training = call.attribute("is_test", 0) == 0
    elif call.version < 14:
        training = call.wants(1) or call.wants(2)
    if training:
        if call.version < 14:
            raise NotImplementedHere("BatchNormalization that trains before opset 14")
        axes = (0, *range(2, x.ndim))
        now, spread = np.mean(x, axis=axes), np.var(x, axis=axes)
        extra = [mean * momentum + now * (1 - momentum)]
        extra.append(variance * momentum + spread * (1 - momentum))
        mean, variance = now, spread
    if call.version < 9 and call.attribute("spatial", 1) == 0:
        scale = gamma / np.sqrt(variance + epsilon)
        return [(x - mean) * scale + beta]
    scale = gamma / np.sqrt(variance + epsilon)
    rank = x.ndim
    return [(x - _channels(mean, rank)) * _channels(scale, rank) + _channels(beta, rank), *extra]


@_implements("InstanceNormalization")
def _instance_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs
    (epsilon,) = _floats(call, epsilon=1e-5)
    y = _standardize(x, tuple(range(2, x.ndim)), epsilon)
    return [y * _channels(gamma, x.ndim) + _channels(beta, x.ndim)]


def _standardize(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - np.mean(x, axis=axes, keepdims=True)
    variance = np.mean(centred * centred, axis=axes, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + epsilon))


@_implements("LayerNormalization")
def _layer_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs[0], call.input(1), call.input(2)
    (epsilon,) = _floats(call, epsilon=1e-5)
    axis = int(call.attribute("axis", -1)) % x.ndim
    axes = tuple(range(axis, x.ndim))
    mean = np.mean(x, axis=axes, keepdims=True)
    centred = x - mean
    inverse = 1.0 / np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True) + epsilon)
    y = centred * inverse
    y = y if gamma is None else y * gamma
    y = y if beta is None else y + beta
    return [y, mean, inverse]


@_implements("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(call: Call) -> list[Value]:
    x, gamma = call.inputs[0], call.input(1)
    (epsilon,) = _floats(call, epsilon=1e-5)
    axis = int(call.attribute("axis", -1)) % x.ndim
    axes = tuple(range(axis, x.ndim))
    inverse = 1.0 / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + epsilon)
    y = x * inverse
    return [y if gamma is None else y * gamma, inverse]


OPERATORS[CONTRIB, "SimplifiedLayerNormalization"] = _rms_norm


@_implements("GroupNormalization")
def _group_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs
    (epsilon,) = _floats(call, epsilon=1e-5)
    groups = int(call.attribute("num_groups"))
    grouped = x.reshape(x.shape[0], groups, -1)
    y = _standardize(grouped, (2,), epsilon)
    if call.version < 21:  # one factor per group until opset 20
        y = y * gamma.reshape(1, -1, 1) + beta.reshape(1, -1, 1)
        return [y.reshape(x.shape)]
    return [y.reshape(x.shape) * _channels(gamma, x.ndim) + _channels(beta, x.ndim)]


@_implements("LpNormalization")
def _lp_norm(call: Call) -> list[Value]:
    x, axis, p = call.inputs[0], int(call.attribute("axis", -1)), int(call.attribute("p", 2))
    size = np.abs(x) if p == 1 else x * x
    size = np.sum(size, axis=axis, keepdims=True)
    size = size if p == 1 else np.sqrt(size)
    return [np.where(size == 0, 0.0, x / np.where(size == 0, 1.0, size))]


@_implements("MeanVarianceNormalization")
def _mean_variance_norm(call: Call) -> list[Value]:
    x = call.inputs[0]
    axes = tuple(int(a) for a in call.attribute("axes") or (0, 2, 3))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    spread = np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True))
    return [centred / (spread + 1e-9)]


@_implements("LRN")
def _lrn(call: Call) -> list[Value]:
    x = call.inputs[0]
    alpha, beta, bias = _floats(call, alpha=1e-4, beta=0.75, bias=1.0)
    size = int(call.attribute("size"))
    before, after = (size - 1) // 2, size // 2
    squares = np.pad(x * x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
    total = np.zeros_like(x)
    for offset in range(size):
        total += squares[:, offset : offset + x.shape[1]]
    return [x / (bias + alpha / size * total) ** beta]


# --- resize ------------------------------------------------------------------------------------


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
        (a,) = _floats(call, cubic_coeff_a=-0.75)
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


@_implements("Resize", "Upsample")
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


# a0 - a1 cos(t) + a2 cos(2 t); Hamming's are the standard's 25/46 and 21/46
_WINDOWS: Final = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25.0 / 46.0, 21.0 / 46.0, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@_implements("HannWindow", "HammingWindow", "BlackmanWindow")
def _cosine_window(call: Call) -> list[Value]:
    size = int(call.inputs[0])
    a0, a1, a2 = _WINDOWS[call.op_type]
    period = size if call.attribute("periodic", 1) else size - 1
    t = 2.0 * math.pi * np.arange(size) / period
    window = a0 - a1 * np.cos(t) + a2 * np.cos(2.0 * t)
    return [cast(window, int(call.attribute("output_datatype", 1)))]


@_implements("STFT")
def _stft(call: Call) -> list[Value]:
    """Fourier transform of windowed frames; (batch, length, 1 or 2) to (batch, frames, bins, 2)."""
    signal, step, window, length = (call.input(i) for i in range(4))
    size = int(np.size(window)) if length is None else int(length)
    hop = int(step)
    x = signal[..., 0] + 1j * signal[..., 1] if signal.shape[-1] == 2 else signal.reshape(
        signal.shape[:2])  # fmt: skip
    frames = np.lib.stride_tricks.sliding_window_view(x, size, axis=-1)[:, ::hop]
    frames = frames if window is None else frames * window
    bins = np.fft.fft(frames, axis=-1)
    if call.attribute("onesided", 1):
        bins = bins[..., : size // 2 + 1]
    return [np.stack([bins.real, bins.imag], axis=-1)]


# --- recurrent ---------------------------------------------------------------------------------


def _activation(name: str, alpha: float | None, beta: float | None) -> Callable[[Array], Array]:
    table: dict[str, Callable[[Array], Array]] = {
        "sigmoid": _sigmoid,
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0.0),
        "softsign": lambda x: x / (1.0 + np.abs(x)),
        "softplus": _softplus,
        "affine": lambda x: (1.0 if alpha is None else alpha) * x + (beta or 0.0),
        "leakyrelu": lambda x: np.where(x < 0, (0.01 if alpha is None else alpha) * x, x),
        "hardsigmoid": lambda x: np.clip(
            (0.2 if alpha is None else alpha) * x + (0.5 if beta is None else beta), 0.0, 1.0
        ),
        "elu": lambda x: np.where(
            x < 0, (1.0 if alpha is None else alpha) * np.expm1(np.minimum(x, 0.0)), x
        ),
        "scaledtanh": lambda x: (
            (1.0 if alpha is None else alpha) * np.tanh((1.0 if beta is None else beta) * x)
        ),
        "thresholdedrelu": lambda x: np.where(x > (1.0 if alpha is None else alpha), x, 0.0),
    }
    if name.lower() not in table:
        raise NotImplementedHere(f"activation {name}")
    return table[name.lower()]


_GATES: Final = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS: Final = {
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "RNN": ["Tanh"],
}
# activations that take an alpha, and those that take a beta, in the order the lists are read
_WITH_ALPHA: Final = {"affine", "leakyrelu", "hardsigmoid", "elu", "scaledtanh", "thresholdedrelu"}
_WITH_BETA: Final = {"affine", "hardsigmoid", "scaledtanh"}


@_implements("LSTM", "GRU", "RNN")
def _recurrent(call: Call) -> list[Value]:
    """Run a recurrent layer; X is (seq, batch, in), Y is (seq, directions, batch, hidden)."""
    kind = call.op_type
    x, w, r = call.inputs[:3]
    batch_first = int(call.attribute("layout", 0)) == 1
    x = np.swapaxes(x, 0, 1) if batch_first else x
    steps, batch, _ = x.shape
    hidden = int(call.attribute("hidden_size", r.shape[-1]))
    direction = call.attribute("direction", "forward")
    directions = w.shape[0]
    gates = _GATES[kind]
    bias = call.input(3)
    bias = np.zeros((directions, 2 * gates * hidden)) if bias is None else bias
    lengths = call.input(4)
    lengths = np.full(batch, steps) if lengths is None else lengths
    states = []
    for index in (5, 6):
        state = call.input(index)
        if state is None:
            state = np.zeros((directions, batch, hidden))
        elif batch_first:
            state = np.swapaxes(state, 0, 1)
        states.append(state)
    peephole = call.input(7)
    peephole = np.zeros((directions, 3 * hidden)) if peephole is None else peephole
    names = [str(a) for a in call.attribute("activations") or _ACTIVATIONS[kind] * directions]
    alphas = iter(call.attribute("activation_alpha") or ())
    betas = iter(call.attribute("activation_beta") or ())
    functions = [
        _activation(
            name,
            float(v) if name.lower() in _WITH_ALPHA and (v := next(alphas, None)) is not None
            else None,
            float(v) if name.lower() in _WITH_BETA and (v := next(betas, None)) is not None
            else None,
        )
        for name in names
    ]  # fmt: skip
    per = len(functions) // directions
    clip = call.attribute("clip")
    limit = math.inf if clip is None else float(clip)
    y = np.zeros((steps, directions, batch, hidden))
    last_h, last_c = np.empty((directions, batch, hidden)), np.empty((directions, batch, hidden))
    for d in range(directions):
        backward = direction == "reverse" or d == 1
        h, c = states[0][d].copy(), states[1][d].copy()
        act = functions[d * per : (d + 1) * per]
        wb, rb = np.split(bias[d], 2)
        for step in range(steps):
            # each sequence runs over its own length, so a reversed one starts at its own end
            active = step < lengths
            time = np.where(active, lengths - 1 - step if backward else step, 0).astype(np.int64)
            entry = x[time, np.arange(batch)]
            if kind == "LSTM":
                new_h, new_c = _lstm_step(call, entry, h, c, w[d], r[d], wb + rb, peephole[d], act,
                                          limit)  # fmt: skip
                c = np.where(active[:, None], new_c, c)
            elif kind == "GRU":
                new_h = _gru_step(call, entry, h, w[d], r[d], wb, rb, act, limit)
            else:
                z = entry @ w[d].T + h @ r[d].T + wb + rb
                new_h = act[0](np.clip(z, -limit, limit))
            h = np.where(active[:, None], new_h, h)
            rows = np.nonzero(active)[0]
            y[time[rows], d, rows] = h[rows]
        last_h[d], last_c[d] = h, c
    if batch_first:
        y = np.transpose(y, (2, 0, 1, 3))
        last_h, last_c = np.swapaxes(last_h, 0, 1), np.swapaxes(last_c, 0, 1)
    return [y, last_h, last_c] if kind == "LSTM" else [y, last_h]


def _lstm_step(
    call: Call,
    entry: Array,
    h: Array,
    c: Array,
    w: Array,
    r: Array,
    bias: Array,
    peephole: Array,
    act: list[Callable[[Array], Array]],
    limit: float,
) -> tuple[Array, Array]:
    z = entry @ w.T + h @ r.T + bias
    zi, zo, zf, zc = np.split(z, 4, axis=-1)
    pi, po, pf = np.split(peephole, 3)
    i = act[0](np.clip(zi + pi * c, -limit, limit))
    f = 1.0 - i if call.attribute("input_forget", 0) else act[0](
        np.clip(zf + pf * c, -limit, limit))  # fmt: skip
    new_c = f * c + i * act[1](np.clip(zc, -limit, limit))
    o = act[0](np.clip(zo + po * new_c, -limit, limit))
    return o * act[2](np.clip(new_c, -limit, limit)), new_c


def _gru_step(
    call: Call,
    entry: Array,
    h: Array,
    w: Array,
    r: Array,
    wb: Array,
    rb: Array,
    act: list[Callable[[Array], Array]],
    limit: float,
) -> Array:
    wz, wr, wh = np.split(entry @ w.T + wb, 3, axis=-1)
    rz, rr, rh = np.split(r, 3, axis=0)
    bz, br, bh = np.split(rb, 3)
    z = act[0](np.clip(wz + h @ rz.T + bz, -limit, limit))
    reset = act[0](np.clip(wr + h @ rr.T + br, -limit, limit))
    if call.attribute("linear_before_reset", 0):
        candidate = wh + reset * (h @ rh.T + bh)
    else:
        candidate = wh + (reset * h) @ rh.T + bh
    return np.asarray((1.0 - z) * act[1](np.clip(candidate, -limit, limit)) + z * h)


# --- quantization ------------------------------------------------------------------------------


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


def dequantize(x: Array, scale: Array, zero: Array | None) -> Array:
    """(x - zero) * scale in float64, the parameters broadcast to x."""
    value = x.astype(np.float64)
    if zero is not None:
        value = value - zero.astype(np.float64)
    return np.asarray(value * scale)


@_implements("QuantizeLinear")
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
    if is_float_dtype(dtype):  # a narrow float: its values, saturated as the default asks
        raise NotImplementedHere("quantization to a float type")
    zero = np.zeros((), dtype) if zero is None else _along(zero, x, axis, block)
    return [quantize(x.astype(np.float64), scale, zero, dtype)]


@_implements("DequantizeLinear")
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


@_implements("DynamicQuantizeLinear")
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


@_implements("MatMulInteger")
def _matmul_integer(call: Call) -> list[Value]:
    a, b = call.inputs[:2]
    return [_integer_product(a, call.input(2), b, call.input(3)).astype(np.int32)]


def _replaced(call: Call, inputs: Sequence[Value], op_type: str = "Conv") -> Call:
    return Call(op_type, "", call.version, tuple(inputs), call.attributes, (True,))


@_implements("ConvInteger")
def _conv_integer(call: Call) -> list[Value]:
    x, w = (v.astype(np.float64) for v in call.inputs[:2])
    if call.input(2) is not None:
        x = x - float(call.inputs[2].reshape(-1)[0])
    if call.input(3) is not None:
        w = w - call.inputs[3].astype(np.float64).reshape(-1, *(1,) * (w.ndim - 1))
    return [convolve(_replaced(call, (x, w))).astype(np.int32)]


@_implements("QLinearMatMul")
def _qlinear_matmul(call: Call) -> list[Value]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = call.inputs
    product = _integer_product(a, a_zero, b, b_zero)
    a_scale = a_scale[:, None] if a_scale.ndim == 1 and a_scale.size > 1 else a_scale
    return [quantize(product * (a_scale * b_scale), y_scale, y_zero, y_zero.dtype)]


@_implements("QLinearConv")
def _qlinear_conv(call: Call) -> list[Value]:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = call.inputs[:8]
    bias = call.input(8)
    per_output = (-1, *(1,) * (w.ndim - 1))
    x = x.astype(np.float64) - float(x_zero.reshape(-1)[0])
    w = w.astype(np.float64) - w_zero.astype(np.float64).reshape(per_output)
    product = convolve(_replaced(call, (x, w, bias)))
    factor = (x_scale * w_scale).reshape(-1, *(1,) * (w.ndim - 2))
    return [quantize(product * factor, y_scale, y_zero, y_zero.dtype)]


@_implements("QLinearAdd", "QLinearMul", domain=CONTRIB)
def _qlinear_binary(call: Call) -> list[Value]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale = call.inputs[:7]
    y_zero = call.input(7)
    y_zero = np.zeros((), a.dtype) if y_zero is None else y_zero
    combine = np.add if call.op_type == "QLinearAdd" else np.multiply
    total = combine(dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero))
    return [quantize(total, y_scale, y_zero, a.dtype)]


@_implements("QLinearSigmoid", "QLinearLeakyRelu", domain=CONTRIB)
def _qlinear_unary(call: Call) -> list[Value]:
    x, x_scale, x_zero, y_scale = call.inputs[:4]
    y_zero = call.input(4)
    y_zero = np.zeros((), x.dtype) if y_zero is None else y_zero
    real = dequantize(x, x_scale, x_zero)
    (alpha,) = _floats(call, alpha=0.01)
    y = (
        _sigmoid(real)
        if call.op_type == "QLinearSigmoid"
        else np.where(real < 0, alpha * real, real)
    )
    return [quantize(y, y_scale, y_zero, x.dtype)]


@_implements("QLinearGlobalAveragePool", domain=CONTRIB)
def _qlinear_pool(call: Call) -> list[Value]:
    x, x_scale, x_zero, y_scale, y_zero = call.inputs[:5]
    last = bool(call.attribute("channels_last", 0))
    axes = tuple(range(1, x.ndim - 1)) if last else tuple(range(2, x.ndim))
    mean = np.mean(dequantize(x, x_scale, x_zero), axis=axes, keepdims=True)
    return [quantize(mean, y_scale, y_zero, x.dtype)]


@_implements("MatMulIntegerToFloat", "DynamicQuantizeMatMul", domain=CONTRIB)
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


@_implements("MatMulNBits", domain=CONTRIB)
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


# --- onnxruntime's contrib operators -----------------------------------------------------------


@_implements("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasSplitGelu", domain=CONTRIB)
def _contrib_gelu(call: Call) -> list[Value]:
    x = call.inputs[0]
    x = x if call.input(1) is None else x + call.inputs[1]
    if call.op_type == "FastGelu":
        return [_fast_gelu(x)]
    if call.op_type == "QuickGelu":
        (alpha,) = _floats(call, alpha=1.702)
        return [x * _sigmoid(alpha * x)]
    if call.op_type == "BiasSplitGelu":
        left, right = np.split(x, 2, axis=-1)
        return [left * _gelu(right)]
    return [_gelu(x)]


@_implements("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=CONTRIB)
def _skip_norm(call: Call) -> list[Value]:
    x, skip, gamma = call.inputs[:3]
    simplified = call.op_type == "SkipSimplifiedLayerNormalization"
    beta, bias = (None, call.input(3)) if simplified else (call.input(3), call.input(4))
    (epsilon,) = _floats(call, epsilon=1e-12)
    total = x + skip
    total = total if bias is None else total + bias
    mean = np.mean(total, axis=-1, keepdims=True)
    centred = total if simplified else total - mean
    inverse = 1.0 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    y = centred * inverse * gamma
    return [y if beta is None else y + beta, mean, inverse, total]


@_implements("Attention", domain=CONTRIB)
def _contrib_attention(call: Call) -> list[Value]:
    """softmax(scale q k^T) v in heads, with q, k and v from one product; without a mask."""
    x, weight = call.inputs[:2]
    bias = call.input(2)
    special = ("unidirectional", "do_rotary", "past_present_share_buffer", "qkv_hidden_sizes")
    if any(v is not None for v in call.inputs[3:]) or any(map(call.attribute, special)):
        raise NotImplementedHere("Attention with a mask or a past")
    if call.wants(1):
        raise NotImplementedHere("Attention that gives its keys and values")
    heads = call.attribute("num_heads")
    made = x @ weight if bias is None else x @ weight + bias
    batch, length, width = made.shape
    size = width // 3 // heads
    q, k, v = made.reshape(batch, length, 3, heads, size).transpose(2, 0, 3, 1, 4)
    (scale,) = _floats(call, scale=0.0)
    scores = q @ k.swapaxes(-1, -2) * (scale or size**-0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
    return [mixed.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)]


@_implements("EmbedLayerNormalization", domain=CONTRIB)
def _embed_norm(call: Call) -> list[Value]:
    ids, words, places = call.inputs[0].astype(np.int64), call.inputs[2], call.inputs[3]
    segments, kinds, mask, positions = (call.input(i) for i in (1, 4, 7, 8))
    at = np.arange(ids.shape[1]) if positions is None else positions.astype(np.int64)
    total = words[ids] + places[at]
    if segments is not None and kinds is not None:
        total = total + kinds[segments.astype(np.int64)]
    (epsilon,) = _floats(call, epsilon=1e-12)
    centred = total - np.mean(total, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    used = np.zeros(ids.shape) if mask is None else mask == 1
    counts = used.sum(axis=-1).astype(np.int32)
    return [centred / deviation * call.inputs[5] + call.inputs[6], counts, total]


@_implements("FusedMatMul", domain=CONTRIB)
def _fused_matmul(call: Call) -> list[Value]:
    a, b = call.inputs
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise NotImplementedHere("FusedMatMul with transposed batches")
    a = np.swapaxes(a, -1, -2) if call.attribute("transA", 0) and a.ndim > 1 else a
    b = np.swapaxes(b, -1, -2) if call.attribute("transB", 0) and b.ndim > 1 else b
    (alpha,) = _floats(call, alpha=1.0)
    return [np.asarray(alpha * np.matmul(a, b))]


def _fused_activation(call: Call, y: Array) -> Array:
    name = call.attribute("activation", "")
    parameters = [float(p) for p in call.attribute("activation_params") or ()]
    if name in {"", "Identity"}:
        return y
    if name == "Clip":
        low, high = parameters
        return np.asarray(np.clip(y, low, high))
    alpha = float(call.attribute("activation_alpha", parameters[0] if parameters else math.nan))
    beta = float(call.attribute("activation_beta", parameters[1] if parameters[1:] else math.nan))
    given = (None if math.isnan(alpha) else alpha, None if math.isnan(beta) else beta)
    return _activation(name, *given)(y)


@_implements("FusedConv", "FusedGemm", domain=CONTRIB)
def _fused(call: Call) -> list[Value]:
    if call.op_type == "FusedGemm":
        return [_fused_activation(call, _gemm(_replaced(call, call.inputs, "Gemm"))[0])]
    y = convolve(_replaced(call, call.inputs[:3]))
    return [_fused_activation(call, y if call.input(3) is None else y + call.inputs[3])]


@_implements("GroupNorm", "SkipGroupNorm", domain=CONTRIB)
def _contrib_group_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs[:3]
    if call.op_type == "SkipGroupNorm":
        skip, bias = call.inputs[3], call.input(4)
        x = x + (skip if skip.ndim == x.ndim else skip[:, None, None, :])
        x = x if bias is None else x + bias
    total = x
    last = bool(call.attribute("channels_last", 1))
    x = np.moveaxis(x, -1, 1) if last else x
    (epsilon,) = _floats(call, epsilon=1e-5)
    groups = int(call.attribute("groups"))
    y = _standardize(x.reshape(x.shape[0], groups, -1), (2,), epsilon).reshape(x.shape)
    y = y * _channels(gamma, x.ndim) + _channels(beta, x.ndim)
    if int(call.attribute("activation", 0)) == 1:
        y = y * _sigmoid(y)
    return [np.moveaxis(y, 1, -1) if last else y, total]
