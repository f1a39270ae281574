"""A linear operator seen through its port: where its weight has the output feature axis.

    y = W x + b        ->        s * y + t  =  (s * W) x + (s * b + t)        per output feature

A port knows which input is the weight, which of its axes (and groups) make the output features,
and where the bias goes. `slots` gives it constant by constant: a change of the output features is
one change of each slot, which `onnxnorm.change` checks and computes. `Inlet` is the other side, the
input features: what a constant vector added to the input adds to the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.einsum import Equation
from onnxnorm.facts import Constant, Facts
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.storage import Array

_BLOCK: Final = 4 << 20  # bytes of float64 that are in the making at a time
REAL: Final = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
_WEIGHT: Final = 1
_BIAS: Final = 2


def _quiet() -> np.errstate:
    # Numbers that are not finite are for the caller to see, who looks at every result.
    return np.errstate(over="ignore", invalid="ignore")


def row_blocks(weight: Array) -> Iterator[slice]:
    """Runs of rows small enough that their float64 copies do not count."""
    step = max(1, _BLOCK // max(1, weight[:1].size * 8))
    return (slice(at, at + step) for at in range(0, weight.shape[0], step))


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether an element type is one that linear operators and norms compute in."""
    return onnx.helper.np_dtype_to_tensor_dtype(dtype) in REAL


def rounded(array: NDArray[np.float64], dtype: np.dtype[Any]) -> Array:
    """Round to `dtype`, once; what overflows becomes infinite and is for the caller to see."""
    with _quiet():
        out: Array = array.astype(dtype)
    return out


def magnitude(array: Array) -> float:
    """The largest |a| of an array that is not empty; NaN where an entry is."""
    with _quiet():  # bfloat16 warns of a NaN
        return max(abs(float(array.min())), abs(float(array.max())))


# ** every linear operator, constant by constant **


@dataclass(frozen=True)
class Slot:
    """A constant input of an operator whose output is linear in it.

        y = gain * (what the slot makes of the other inputs) + ...

    Attributes:
        index: Which input of the node it is.
        constant: The constant.
        axis: The axis of the constant, from the right, that makes the output features; a constant
            without that axis, or of size 1 on it, is the same for every feature.
        output_axis: The axis of the output, from the right, that the features are.
        groups: Into how many groups the features are cut, in the constant's axis 0 (ConvTranspose).
        bias: Whether it is added, and not multiplied with another input.
        gain: The factor with which it enters the output (alpha and beta of Gemm).
    """

    index: int
    constant: Constant
    axis: int
    output_axis: int
    groups: int = 1
    bias: bool = False
    gain: float = 1.0

    def features(self) -> int:
        """How many output features the constant has entries for; 1 where it has none of its own."""
        if len(self.constant.shape) < -self.axis:
            return 1
        return self.constant.shape[self.axis] * self.groups

    def spread(self, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """One factor for each output feature, in a shape that broadcasts against the constant."""
        return spread_along(factors, self.constant.shape, self.axis, self.groups)


def spread_along(
    factors: NDArray[np.float64], shape: tuple[int, ...], axis: int, groups: int = 1
) -> NDArray[np.float64]:
    """One factor for each feature, in a shape that broadcasts against a weight.

    Args:
        factors: The factors.
        shape: Of the weight.
        axis: The weight's axis of the features, from the right, inside a group.
        groups: Into how many groups they are cut: row r of R belongs to group r // (R / groups).
    """
    inner = (1,) * (-axis - 1)
    if groups == 1:
        return factors.reshape(-1, *inner)
    rows = shape[0]
    group = np.arange(rows) // (rows // groups)
    return factors.reshape(groups, -1)[group].reshape(rows, -1, *inner)


def slots(node: Node, facts: Facts) -> tuple[Slot, ...] | str:
    """The weights and biases that make a node's output features; a clause where it has none.

    MatMul and Gemm with a constant on either side, Conv and ConvTranspose; a bias that is not
    constant is no slot: `Slot`s say only what is known of the model's constants.
    """
    if node.domain != "":
        return f"it is {node.op} of the domain {node.domain}"
    finder = _SLOTS.get(node.op)
    if finder is None:
        return "it is not linear"
    found = finder(node, facts)
    if isinstance(found, str):
        return found
    for slot in found:
        if not is_real(slot.constant.dtype):
            return f"its '{slot.constant.name}' is of type {slot.constant.dtype}"
    return found


def _given(node: Node, index: int, facts: Facts) -> Constant | None:
    if len(node.inputs) <= index or not node.inputs[index].name:
        return None
    return facts.constant(node.inputs[index])


def _matmul_slots(node: Node, facts: Facts) -> tuple[Slot, ...] | str:
    right, left = _given(node, 1, facts), _given(node, 0, facts)
    if right is not None and len(right.shape) >= 2:
        return (Slot(1, right, -1, -1),)
    if left is not None and len(left.shape) >= 2:
        return (Slot(0, left, -2, -2),)
    return "none of its operands is a constant matrix"


def _gemm_slots(node: Node, facts: Facts) -> tuple[Slot, ...] | str:
    if name := node.parameter("alpha", "beta", "transA", "transB"):
        return f"{name} is a parameter of the function"
    right, left, bias = (_given(node, i, facts) for i in (1, 0, 2))
    alpha, beta = (float(node.attrs.get(n, 1.0)) for n in ("alpha", "beta"))
    found: list[Slot] = []
    if right is not None and len(right.shape) == 2:
        found.append(Slot(1, right, -2 if node.attrs.get("transB", 0) else -1, -1, gain=alpha))
    elif left is not None and len(left.shape) == 2:
        found.append(Slot(0, left, -1 if node.attrs.get("transA", 0) else -2, -2, gain=alpha))
    else:
        return "none of its operands is a constant matrix"
    if bias is not None:
        axis = found[0].output_axis
        found.append(Slot(2, bias, axis, axis, bias=True, gain=beta))
    return tuple(found)


def _conv_slots(node: Node, facts: Facts) -> tuple[Slot, ...] | str:
    if node.parameter("group") is not None:
        return "group is a parameter of the function"
    weight, bias = _given(node, _WEIGHT, facts), _given(node, _BIAS, facts)
    if weight is None or len(weight.shape) < 3:
        return "its weight is not constant"
    # Conv: W is (M, C / group, *kernel). ConvTranspose: W is (C, M / group, *kernel).
    rank, transposed = len(weight.shape), node.op == "ConvTranspose"
    groups = int(node.attrs.get("group", 1)) if transposed else 1
    if groups < 1 or weight.shape[0] % groups:
        return f"its weight '{weight.name}' has {weight.shape[0]} inputs for {groups} groups"
    found = [Slot(_WEIGHT, weight, int(transposed) - rank, 1 - rank, groups=groups)]
    if bias is not None:
        found.append(Slot(_BIAS, bias, -1, 1 - rank, bias=True))
    return tuple(found)


_SLOTS: Final[dict[str, Callable[[Node, Facts], tuple[Slot, ...] | str]]] = {
    "MatMul": _matmul_slots,
    "Gemm": _gemm_slots,
    "Conv": _conv_slots,
    "ConvTranspose": _conv_slots,
}
LINEAR: Final = frozenset(_SLOTS)  # the linear operators with a weight
INLETS: Final = frozenset({"Conv", "Einsum", "Gemm", "MatMul"})  # those that can have an inlet
MIXING: Final = LINEAR | INLETS  # what mixes channels


# ** where a constant can be added **

_BIASED: Final = {"Conv": 1, "ConvTranspose": 1, "Gemm": 11}  # the opset from which it may lack one


@dataclass(frozen=True)
class Bias:
    """Where a constant can be added to the features that a linear operator makes.

        y = W x + gain * b

    Attributes:
        node: The node that adds it.
        index: Which of its inputs it is.
        constant: What is there; None where the input is empty.
        gain: The factor with which it is taken.
    """

    node: Node
    index: int
    constant: Constant | None
    gain: float = 1.0


def bias_of(node: Node, facts: Facts) -> Bias | str:
    """The bias of a linear operator, or a clause that says why it has none.

    That of what has no slot for it is the constant of an Add behind it that alone reads it.
    """
    if node.op not in ("MatMul", "Einsum"):
        if len(node.inputs) <= _BIAS or not node.inputs[_BIAS].name:
            gain = empty_bias(node)
            return gain if isinstance(gain, str) else Bias(node, _BIAS, None, gain)
        constant, gain = facts.constant(node.inputs[_BIAS]), _gain(node)
        if constant is None:
            return f"adds '{node.inputs[_BIAS].name}', which is computed"
        if not is_real(constant.dtype):
            return f"adds '{constant.name}' of type {constant.dtype}"
        return gain if isinstance(gain, str) else Bias(node, _BIAS, constant, gain)
    uses = facts.uses(node.outputs[0])
    if len(uses) != 1 or facts.pinned(node.outputs[0]) is not None:
        return "has no bias"
    after = uses[0].node
    if after.op != "Add" or after.domain != "" or after.scope is not node.scope:
        return "has no bias"
    index = 1 - uses[0].index
    constant = facts.constant(after.inputs[index])
    if constant is None or not is_real(constant.dtype):
        return "has no bias"
    return Bias(after, index, constant)


def empty_bias(node: Node) -> float | str:
    """The factor with which a node takes what fills its empty bias; a clause where none does."""
    if node.scope.opsets[""] < _BIASED.get(node.op, 1 << 30):
        return "has no bias"
    return _gain(node)


def filled_bias(node: Node, weight: Slot, vector: NDArray[np.float64]) -> NDArray[np.float64] | str:
    """What fills the empty bias of an operator so that it adds a vector; a clause where none does.

    Args:
        node: The operator.
        weight: Its weight.
        vector: One number for each output feature.
    """
    gain = empty_bias(node)
    if isinstance(gain, str):
        return gain
    if node.op == "Gemm":  # along its own axis; a convolution has a vector
        vector = vector.reshape(-1, *(1,) * (-weight.output_axis - 1))
    filled: NDArray[np.float64] = vector / gain
    return filled


def _gain(node: Node) -> float | str:
    if node.op != "Gemm":
        return 1.0
    if node.parameter("beta"):
        return "beta is a parameter of the function"
    gain = float(node.attrs.get("beta", 1.0))
    return "takes its bias times 0" if gain == 0.0 else gain


# ** the input features **


@dataclass(frozen=True)
class Inlet:
    """The input-feature side of a linear operator: f(x + v) = f(x) + v W for every constant v.

    Attributes:
        node: The operator.
        index: Which of its inputs x is.
        weight_index: Which the weight is.
        weight: The weight.
        axes: The axes of the input, from the right, that are contracted, each with the axis of the
            weight, from the left.
        outlets: The axes of the weight, from the left, that the result has, each with the axis of
            a bias, from the right; the others are summed over.
        rows: Axes of the result, from the right, that the input has and the weight does not.
    """

    node: Node
    index: int
    weight_index: int
    weight: Constant
    axes: dict[int, int]
    outlets: dict[int, int]
    rows: tuple[int, ...] = ()
    _gain: float = 1.0

    @classmethod
    def of(cls, node: Node, index: int, facts: Facts, *, padded: bool = False) -> Inlet | str:
        """The inlet of input `index`, or a clause that says why there is none.

        A convolution must not pad: what it pads with has no v added. `padded` allows it, for what
        multiplies the input. A grouped one mixes only part of the features and has no inlet.
        """
        at = 1 - index if node.op == "Einsum" else _WEIGHT
        if node.domain != "" or node.op not in INLETS or (index != 0 and node.op != "Einsum"):
            return "it is not linear in this input"
        weight = _given(node, at, facts) if at >= 0 else None
        if weight is None or not is_real(weight.dtype):
            return "its weight is not constant"
        shape = weight.shape
        if node.op == "Einsum":
            equation = Equation.of(node)
            found = None if equation is None else equation.contracted(index)
            if found is None:
                return "its equation has more in it than a product with a weight"
            return cls(node, index, at, weight, *found)
        if node.op == "MatMul":
            if len(shape) != 2:
                return f"its weight has {len(shape)} axes"
            return cls(node, index, at, weight, {-1: 0}, {1: -1}, (-2,))
        if node.op == "Gemm":
            names = ("alpha", "beta", "transA", "transB")
            if node.parameter(*names) or node.attrs.get("transA", 0) or len(shape) != 2:
                return "it does not contract the last axis"
            out = 0 if node.attrs.get("transB", 0) else 1
            gain = float(node.attrs.get("alpha", 1.0))
            return cls(node, index, at, weight, {-1: 1 - out}, {out: -1}, (-2,), gain)
        if (
            (pads(node) and not padded)
            or node.attrs.get("group", 1) != 1
            or node.parameter("pads", "group", "auto_pad")
        ):
            return "it pads with zeros or is grouped"
        return cls(node, index, at, weight, {1 - len(shape): 1}, {0: -1})

    def takes(self, layout: Layout) -> bool:
        """Whether features that lie in the input like this are all contracted."""
        shape = self.weight.shape
        return all(p.axis in self.axes and shape[self.axes[p.axis]] == p.extent
                   for p in layout.parts)  # fmt: skip

    def mixed(
        self, axis: int, matrix: NDArray[np.float64], weight: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """W' with f'(x) = f(x M), in float64, M along an axis of the input.

        Args:
            axis: The axis of the input, from the right; one of `axes`.
            matrix: M.
            weight: Another weight in place of its own.
        """
        array = self.weight.float64() if weight is None else weight
        moved = np.tensordot(matrix, array, axes=(1, self.axes[axis]))
        return np.moveaxis(moved, 0, self.axes[axis])

    def through(self, shift: NDArray[np.float64]) -> NDArray[np.float64]:
        """The product v W in float64, in a shape that broadcasts against a bias.

        Not by BLAS, whose threads add in an order that depends on how many there are, and spin
        for longer than a product with one vector takes.

        Args:
            shift: v, its axes from the right as those of the input; of size 1 on all that are not
                contracted.
        """
        weight = self.weight.array()
        factors = self.factors(shift)
        summed = tuple(a for a in range(weight.ndim) if a not in self.outlets)
        total = np.zeros([1 if a in summed else n for a, n in enumerate(weight.shape)])
        for rows in row_blocks(weight):
            block = weight[rows].astype(np.float64)
            part = block * (factors if factors.shape[0] == 1 else factors[rows])
            place = slice(None) if 0 in summed else rows
            total[place] += part.sum(axis=summed, keepdims=True)
        order = sorted(self.outlets, key=self.outlets.__getitem__)
        shape = [1] * max((-a for a in self.outlets.values()), default=0)
        for axis in order:
            shape[self.outlets[axis]] = weight.shape[axis]
        return np.asarray(total.transpose(*summed, *order).reshape(shape)) * self._gain

    def factors(self, scale: NDArray[np.float64]) -> NDArray[np.float64]:
        """The factors s of f(s x) = f'(x), W' = s W, in a shape that broadcasts against W.

        Args:
            scale: s, its axes as those of `through`.
        """
        places = {w: a for a, w in self.axes.items() if scale.ndim >= -a}
        order = sorted(places)
        kept = np.moveaxis(scale, [places[w] for w in order], range(-len(order), 0))
        shape = [1] * len(self.weight.shape)
        for axis in order:
            shape[axis] = scale.shape[places[axis]]
        return kept.reshape(shape)


def pads(node: Node) -> bool:
    """Whether a convolution or pooling reads zeros around its input, or may do so."""
    if node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID", ""):
        return True
    return any(node.attrs.get("pads") or ())
