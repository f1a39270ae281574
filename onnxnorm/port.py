"""A linear operator seen through its port: where its weight has the output feature axis.

    y = W x + b        ->        s * y + t  =  (s * W) x + (s * b + t)        per output feature

A port knows which input is the weight, which of its axes (and groups) make the output features,
and where the bias goes. It owns every check on the weight: that it is known, that its dtype can
hold the result, and that a copy of a shared one is not too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.storage import Array


@dataclass(frozen=True)
class Layout:
    """How an operator's weight lies.

    Attributes:
        output_axis: The weight axis of the output features, counted inside a group where
            `split_groups`.
        split_groups: Axis 0 is (group, features) merged, as in ConvTranspose: output feature
            `g * features + j` has its weights at [g, :, j].
    """

    output_axis: int
    split_groups: bool = False


# The operators that have a port; weight is input 1 and bias input 2 of each.
# Conv: W is (M, C / group, *kernel). ConvTranspose: W is (C, M / group, *kernel).
LAYOUTS: Final = {"Conv": Layout(0), "ConvTranspose": Layout(1, split_groups=True)}
_BLOCK: Final = 4 << 20  # bytes of float64 that are in the making at a time
_REAL: Final = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
_finfo: Final[Callable[[Any], Any]] = ml_dtypes.finfo  # it has no types of its own
_WEIGHT: Final = 1
_BIAS: Final = 2


@dataclass(frozen=True)
class Port:
    """The port of one node.

    Attributes:
        node: The linear operator.
        weight: Its weight.
        bias: Its bias; None where it has none.
        features: Number of output features.
    """

    node: Node
    weight: Constant
    bias: Constant | None
    features: int
    _layout: Layout
    _groups: int
    _facts: Facts

    @classmethod
    def of(cls, node: Node, facts: Facts) -> Port | str:
        """The port of a linear operator, or the reason why it has none that can be changed."""
        layout = LAYOUTS.get(node.op)
        if layout is None or node.domain != "":
            return f"{node.op} is not a linear operator with a known weight layout"
        weight = facts.constant(node.inputs[_WEIGHT])
        if weight is None:
            value = node.inputs[_WEIGHT]
            return f"weight '{value.name}' is not constant: {facts.why_not_constant(value)}"
        bias = None
        given = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
        if given is not None and given.name:
            bias = facts.constant(given)
            if bias is None:
                return f"bias '{given.name}' is not constant: {facts.why_not_constant(given)}"
        if node.parameter("group") is not None:
            return f"group of '{node.label}' is a parameter of the function"
        groups = int(node.attrs.get("group", 1))
        for constant in (weight, bias):
            if constant is not None and not is_real(constant.dtype):
                return f"'{constant.name}' is of type {constant.dtype}"
        if len(weight.shape) < 2 or groups < 1:
            return f"weight '{weight.name}' of shape {list(weight.shape)} is not one of {node.op}"
        features = weight.shape[layout.output_axis] * (groups if layout.split_groups else 1)
        if layout.split_groups and weight.shape[0] % groups:
            return f"weight '{weight.name}' has {weight.shape[0]} inputs for {groups} groups"
        if bias is not None and bias.shape != (features,):
            return f"bias '{bias.name}' has shape {list(bias.shape)} for {features} features"
        return cls(node, weight, bias, features, layout, groups, facts)

    @property
    def shares_weight(self) -> bool:
        """Whether others read this weight too, so that changing it means a copy."""
        return self._facts.readers(self.weight) > 1

    def scaled(self, scale: NDArray[np.float64]) -> Array:
        """S * W in float64, rounded once to the weight's type; `scale` has one entry a feature."""
        weight = self.weight.array()
        out = np.empty_like(weight)
        for rows in self._blocks(weight):
            out[rows] = rounded(self._product(weight, scale, rows), weight.dtype)
        return out

    def misfit(self, scale: NDArray[np.float64]) -> str | None:
        """What the weight's type cannot hold of s * W, as a clause; None where it holds it.

        Every entry must be finite. The largest must be zero or a normal number: entries below the
        normal ones keep their distance to the largest, and lose digits only where all are so small.
        """
        weight = self.weight.array()
        largest = 0.0
        for rows in self._blocks(weight):
            product = self._product(weight, scale, rows)
            if not np.isfinite(rounded(product, weight.dtype).astype(np.float64)).all():
                return f"is not finite in {weight.dtype}"
            largest = max(largest, float(np.abs(product).max(initial=0.0)))
        if 0.0 < largest < float(_finfo(weight.dtype).smallest_normal):
            return f"is too small for {weight.dtype}, {largest:.1e} at most"
        return None

    def _product(
        self, weight: Array, scale: NDArray[np.float64], rows: slice
    ) -> NDArray[np.float64]:
        with _quiet():
            product: NDArray[np.float64] = weight[rows].astype(np.float64) * self._rows(scale, rows)
        return product

    def _blocks(self, weight: Array) -> Iterator[slice]:
        """Runs of rows small enough that their float64 copies do not count."""
        per_row = max(1, weight[:1].size * 8)
        step = max(1, _BLOCK // per_row)
        return (slice(at, at + step) for at in range(0, weight.shape[0], step))

    def _rows(self, scale: NDArray[np.float64], rows: slice) -> NDArray[np.float64]:
        """The factor of each weight entry in these rows, in a shape that broadcasts."""
        inner = (1,) * (len(self.weight.shape) - 2)
        if not self._layout.split_groups:
            return scale[rows].reshape(-1, 1, *inner)
        # Row c of (C, M / g, *kernel) belongs to group c // (C / g); feature (group, j) is there
        # at [c, j].
        group = np.arange(self.weight.shape[0])[rows] // (self.weight.shape[0] // self._groups)
        return scale.reshape(self._groups, -1)[group].reshape(len(group), -1, *inner)

    def shifted(self, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> Array:
        """S * b + t in float64, rounded once to the weight's type."""
        bias = self.bias.float64() if self.bias is not None else np.zeros(self.features)
        with _quiet():
            moved = bias * scale + shift
        return rounded(moved, self.weight.dtype)

    def inputs(self, weight: AnyValue, bias: AnyValue) -> list[AnyValue]:
        """The node's inputs with another weight and bias."""
        return [self.node.inputs[0], weight, bias]


def _quiet() -> np.errstate:
    # Numbers that are not finite are for the caller to see, who looks at every result.
    return np.errstate(over="ignore", invalid="ignore")


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether an element type is one that linear operators and norms compute in."""
    return onnx.helper.np_dtype_to_tensor_dtype(dtype) in _REAL


def rounded(array: NDArray[np.float64], dtype: np.dtype[Any]) -> Array:
    """Round to `dtype`, once; what overflows becomes infinite and is for the caller to see."""
    with _quiet():
        out: Array = array.astype(dtype)
    return out
