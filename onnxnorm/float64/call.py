"""What an operator in float64 is given and gives, and the table that finds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def implements(*names: str, domain: str = "") -> Callable[[Operator], Operator]:
    """Enter a function in the table for some operators of a domain."""

    def register(operator: Operator) -> Operator:
        for name in names:
            OPERATORS[domain, name] = operator
        return operator

    return register


def floats(call: Call, **defaults: float) -> tuple[float, ...]:
    """Return float attributes as the float32 values that the file can hold."""
    return tuple(
        float(np.float32(call.attribute(name, default))) for name, default in defaults.items()
    )
