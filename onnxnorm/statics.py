"""What is known of a value before the model runs, beyond what the file stores.

    Sqrt(Add(variance, epsilon))          an array: arithmetic on constants
    Sqrt(Cast(Gather(Shape(x), 2)))       a size: a product of powers of dims, which may be symbols

`Statics` is told of every node in order and holds the arrays of small constant subgraphs in
float64, and scalars that are products of dims; the dims themselves, and integers computed from
them, are those of `sizes.py`. The recognisers read it: exporters compute statistics of a batch
normalization, 1 + weight, or the number of elements of a mean in the graph.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm import float64
from onnxnorm.constants import most_elements
from onnxnorm.facts import AnyValue, Facts, call_of
from onnxnorm.layout import Dim, Dims
from onnxnorm.module import Node
from onnxnorm.sizes import factors, find_sizes

LIMIT: Final = 1 << 20  # elements; what is larger is a weight and no parameter of a norm
_ARITHMETIC: Final = frozenset(
    {
        "Abs", "Add", "Cast", "Clip", "Div", "Exp", "Expand", "Identity", "Log", "Max", "Mean",
        "Min", "Mul", "Neg", "Pow", "Range", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceProd",
        "ReduceSum", "ReduceSumSquare", "Reshape", "Sqrt", "Squeeze", "Sub", "Sum", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
_OF_TWO: Final = frozenset({"Div", "Mul", "Pow"})
_ON_SIZES: Final = _OF_TWO | {
    "Cast", "CastLike", "Identity", "Reciprocal", "Reshape", "Sqrt", "Squeeze", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A scalar that is `factor` times a product of dims.

    Attributes:
        factor: The known part.
        dims: Names of dims that are not known, with their powers in halves: a root counts one.
    """

    factor: float
    dims: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, dims: Iterable[Dim]) -> Size:
        """The product of some dims."""
        number, names = factors(dims)
        return cls(float(number), {name: 2 * count for name, count in Counter(names).items()})

    def __mul__(self, other: Size) -> Size:
        dims = Counter(self.dims)
        for dim, power in other.dims.items():
            dims[dim] += power
        return Size(self.factor * other.factor, {d: p for d, p in dims.items() if p})

    def power(self, halves: int) -> Size | None:
        """This size to the power of `halves` / 2; None where that is no whole half of a dim's."""
        if self.factor <= 0 or any(p * halves % 2 for p in self.dims.values()):
            return None
        return Size(self.factor ** (halves / 2), {d: p * halves // 2 for d, p in self.dims.items()})


class Statics:
    """What is known of the values of one scope. Tell it of every node, in order."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self.sizes = find_sizes(facts)
        self._arrays: dict[AnyValue, NDArray[np.float64] | None] = {}
        self._products: dict[AnyValue, Size] = {}

    # ** questions **

    def array(self, value: AnyValue) -> NDArray[np.float64] | None:
        """A value as a float64 array where it is constant and small; None where not."""
        if value in self._arrays:
            return self._arrays[value]
        constant = self._facts.constant(value) if value.name else None
        array = None
        if constant is not None and math.prod(constant.shape) <= LIMIT:
            array = constant.float64() if constant.dtype.kind not in "OSU" else None
        elif constant is None and value.name:
            entries = self.sizes.entries(value)
            if entries is not None and all(isinstance(n, int) for n in entries.reshape(-1)):
                array = entries.astype(np.float64)
        size = self._products.get(value)
        if array is None and size is not None and not size.dims:
            array = np.asarray(size.factor, dtype=np.float64)
        self._arrays[value] = array
        return array

    def scalar(self, value: AnyValue) -> float | None:
        """The one element of a constant; None for anything else."""
        array = self.array(value)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def integers(self, value: AnyValue) -> tuple[int, ...] | None:
        """A constant vector of integers, as axes and shapes are given."""
        array = self.array(value)
        if array is None or array.ndim > 1 or (array != np.rint(array)).any():
            return None
        return tuple(int(n) for n in array.reshape(-1))

    def dims(self, value: AnyValue) -> Dims | None:
        """The entries of a vector of integers: numbers, or the names of sizes."""
        entries = self.sizes.entries(value) if value.name else None
        return (
            tuple(entries.reshape(-1).tolist())
            if entries is not None and entries.ndim <= 1
            else None
        )

    def size(self, value: AnyValue) -> Size | None:
        """A scalar as a product of dims; None where a part of it is something else."""
        known = self._products.get(value)
        if known is None and (scalar := self.scalar(value)) is not None:
            known = Size(scalar)
        if known is None and value.name:
            entries = self.sizes.entries(value)
            if entries is not None and entries.size == 1:
                known = Size.of(entries.reshape(-1).tolist())
        return known

    def shape_of(self, value: AnyValue) -> Dims | None:
        """The dims of a value; None where its rank is not known."""
        return self.sizes.of(value)

    # ** one node **

    def visit(self, node: Node) -> None:
        """Learn what `node` computes."""
        if node.domain != "" or not node.outputs or not node.inputs:
            return
        out = node.outputs[0]
        if node.op in _ON_SIZES and self.sizes.entries(out) is None:
            made = self._product(node)
            if made is not None and made.dims:
                self._products[out] = made
                return
        if node.op in _ARITHMETIC:
            self._visit_arithmetic(node, out)

    def _product(self, node: Node) -> Size | None:
        """What a node makes of a scalar that is a product of dims."""
        given = [self.size(v) for v in node.inputs[: 2 if node.op in _OF_TWO else 1]]
        first, second = (*given, None)[:2]
        if first is None or (node.op in _OF_TWO and second is None):
            return None
        if node.op in ("Sqrt", "Reciprocal"):
            return first.power(1 if node.op == "Sqrt" else -2)
        if second is None:
            return first
        if node.op == "Mul":
            return first * second
        if node.op == "Div":
            inverse = second.power(-2)
            return None if inverse is None else first * inverse
        exponent = second.factor if not second.dims else None
        return first.power(int(2 * exponent)) if exponent in (2, 1, -1, 0.5, -0.5) else None

    def _visit_arithmetic(self, node: Node, out: AnyValue) -> None:
        """Compute a node on small constants now, in float64."""
        given = []
        for value in node.inputs:
            array = self.array(value) if value.name else None
            if value.name and array is None:
                return
            given.append(array)
        if node.parametric or self.array(out) is not None:
            return
        constants = [self._facts.constant(v) for v in node.inputs]
        if any(c is not None and c.dtype.kind in "iu" for c in constants[:1]) and node.op == "Div":
            return  # integers divide otherwise
        if most_elements(node, given) > LIMIT:
            return
        self._arrays[out] = evaluate(node, given)


def evaluate(node: Node, given: Iterable[Any]) -> NDArray[np.float64] | None:
    """The first output of a node on float64 arrays; None where it cannot be computed here."""
    operator = float64.OPERATORS.get((node.domain or "", node.op))
    if operator is None:
        return None
    integral = _INTEGER_INPUTS.get(node.op, ())
    inputs = tuple(
        a.astype(np.int64) if a is not None and i in integral else a for i, a in enumerate(given)
    )
    call = call_of(node, inputs)
    try:
        with np.errstate(all="ignore"):
            result = np.asarray(operator(call)[0])
    except Exception:  # what the table cannot do is not known
        return None
    if result.dtype.kind not in "fiub":
        return None
    return result.astype(np.float64)


_INTEGER_INPUTS: Final[dict[str, tuple[int, ...]]] = {
    "Expand": (1,), "Gather": (1,), "ReduceL2": (1,), "ReduceLogSumExp": (1,), "ReduceMax": (1,),
    "ReduceMean": (1,), "ReduceProd": (1,), "ReduceSum": (1,), "ReduceSumSquare": (1,),
    "Reshape": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "Slice": (1, 2, 3, 4),
}  # fmt: skip
