"""What is known of a value before the model runs, beyond what the file stores.

    Sqrt(Add(variance, epsilon))          an array: arithmetic on constants
    Gather(Shape(x), 2)                   a size: a product of dims, which may be symbols

`Statics` is told of every node in order and holds the arrays of small constant subgraphs in
float64, the entries of shapes, and scalars that are products of dims. The recognisers read it:
exporters compute statistics of a batch normalization, 1 + weight, or the number of elements of a
mean in the graph.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxnorm import float64
from onnxnorm.constants import most_elements
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node

Dim: TypeAlias = "int | str | tuple[AnyValue, int]"  # known, named, or that of a value's axis

LIMIT: Final = 1 << 20  # elements; what is larger is a weight and no parameter of a norm
_ARITHMETIC: Final = frozenset(
    {
        "Abs", "Add", "Cast", "Clip", "Div", "Exp", "Expand", "Identity", "Log", "Max", "Mean",
        "Min", "Mul", "Neg", "Pow", "Range", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceProd",
        "ReduceSum", "ReduceSumSquare", "Reshape", "Sqrt", "Squeeze", "Sub", "Sum", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
_MOVES_ONE: Final = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Size:
    """A scalar that is `factor` times a product of dims.

    Attributes:
        factor: The known part.
        dims: Dims that are not known, with their powers in halves: a root counts one.
    """

    factor: float
    dims: Mapping[Dim, int] = field(default_factory=dict)

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
        self._arrays: dict[AnyValue, NDArray[np.float64] | None] = {}
        self._dims: dict[AnyValue, tuple[Dim, ...]] = {}
        self._sizes: dict[AnyValue, Size] = {}
        self._shapes: dict[AnyValue, tuple[Dim, ...]] = {}
        self._open: dict[AnyValue, AnyValue] = {}  # a Shape -> what it is of, its rank unknown

    # ** questions **

    def array(self, value: AnyValue) -> NDArray[np.float64] | None:
        """A value as a float64 array where it is constant and small; None where not."""
        if value in self._arrays:
            return self._arrays[value]
        constant = self._facts.constant(value) if value.name else None
        array = None
        if constant is not None and math.prod(constant.shape) <= LIMIT:
            array = constant.float64() if constant.dtype.kind not in "OSU" else None
        dims = self._dims.get(value)
        if array is None and dims is not None and all(isinstance(d, int) for d in dims):
            array = np.asarray(dims, dtype=np.float64)
        size = self._sizes.get(value)
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

    def dims(self, value: AnyValue) -> tuple[Dim, ...] | None:
        """The entries of a vector of integers, each known, or the dim of a value."""
        known = self._dims.get(value)
        if known is None:
            known = self.integers(value)
        return known

    def size(self, value: AnyValue) -> Size | None:
        """A scalar as a product of dims; None where a part of it is something else."""
        known = self._sizes.get(value)
        if known is None and (scalar := self.scalar(value)) is not None:
            known = Size(scalar)
        return known

    def shape_of(self, value: AnyValue) -> tuple[Dim, ...] | None:
        """The dims of a value; None where its rank is not known."""
        if value in self._shapes:
            return self._shapes[value]
        known = self._facts.type(value)
        if known is None or known.shape is None:
            return None
        return tuple((value, a) if dim is None else dim for a, dim in enumerate(known.shape))

    # ** one node **

    def visit(self, node: Node, alike: Callable[[AnyValue], AnyValue]) -> None:
        """Learn what `node` computes. `alike` gives, for a value, one known to have its shape."""
        if node.domain != "" or not node.outputs or not node.inputs:
            return
        out = node.outputs[0]
        first = node.inputs[0]
        if node.op == "Shape":
            dims = self.shape_of(alike(first))
            if dims is None and not node.attrs:
                self._open[out] = alike(first)
            elif dims is not None:
                self._dims[out] = dims[node.attrs.get("start", 0) : node.attrs.get("end")]
        elif node.op == "Size":
            dims = self.shape_of(alike(first))
            if dims is not None:
                self._sizes[out] = _product(dims)
        elif first in self._open:
            self._visit_open(node, out, self._open[first])
        elif node.op == "Concat":
            self._visit_concat(node, out)
        elif first in self._dims:
            self._visit_dims(node, out, self._dims[first])
        elif first in self._sizes or (len(node.inputs) > 1 and node.inputs[1] in self._sizes):
            self._visit_sizes(node, out)
        elif node.op == "Where" and len(node.inputs) == 3 and node.inputs[2] in self._dims:
            # Exporters replace an entry of -1 in a shape to expand to; without one nothing changes.
            dims = self._dims[node.inputs[2]]
            if -1 not in dims:
                self._dims[out] = dims
        if node.op == "Reshape" and len(node.inputs) > 1:
            self._visit_reshape(node, out, alike(first))
        if node.op in _ARITHMETIC and out not in self._dims and out not in self._sizes:
            self._visit_arithmetic(node, out)

    def _visit_dims(self, node: Node, out: AnyValue, dims: tuple[Dim, ...]) -> None:
        rest = [self.integers(v) if v.name else () for v in node.inputs[1:]]
        if node.op == "Gather":
            if rest[0] is not None and all(-len(dims) <= i < len(dims) for i in rest[0]):
                chosen = tuple(dims[i] for i in rest[0])
                scalar = self.array(node.inputs[1])
                if scalar is not None and scalar.ndim == 0:
                    self._sizes[out] = _product(chosen)
                self._dims[out] = chosen
        elif node.op == "Slice" and len(rest) >= 2:
            starts, ends = rest[0], rest[1]
            steps = rest[3] if len(rest) > 3 and rest[3] else (1,)
            if starts and ends and steps and len(starts) == 1:
                self._dims[out] = dims[slice(starts[0], ends[0], steps[0])]
        elif node.op == "Slice" and "starts" in node.attrs:
            (start, *_), (end, *_) = node.attrs["starts"], node.attrs["ends"]
            self._dims[out] = dims[start:end]
        elif node.op == "ReduceProd":
            self._sizes[out] = _product(dims)
        elif node.op in _MOVES_ONE:
            self._dims[out] = dims
            if len(dims) == 1:
                self._sizes[out] = _product(dims)
        elif node.op == "Size":
            self._sizes[out] = Size(float(len(dims)))
        elif len(dims) == 1:
            self._sizes[node.inputs[0]] = _product(dims)
            self._visit_sizes(node, out)

    def _visit_open(self, node: Node, out: AnyValue, of: AnyValue) -> None:
        """Entries of the shape of a value whose rank is not known."""
        if node.op == "Gather" and (places := self.integers(node.inputs[1])) is not None:
            self._dims[out] = tuple((of, i) for i in places)
            scalar = self.array(node.inputs[1])
            if scalar is not None and scalar.ndim == 0:
                self._sizes[out] = _product(self._dims[out])

    def _visit_reshape(self, node: Node, out: AnyValue, before: AnyValue) -> None:
        """The dims that a Reshape gives, beyond what shape inference makes of them."""
        wanted = self.dims(node.inputs[1])
        given = self.shape_of(before)
        if wanted is not None and given is not None:
            dims = reshaped(given, wanted, out, zero=bool(node.attrs.get("allowzero", 0)))
            if dims is not None:
                self._shapes[out] = dims

    def _visit_concat(self, node: Node, out: AnyValue) -> None:
        """A shape put together; an entry that is not understood is a dim of its own."""
        parts: list[Dim] = []
        for value in node.inputs:
            dims = self.dims(value)
            if dims is None:
                known = self._facts.type(value)
                if known is None or known.shape != (1,):
                    return
                dims = ((value, 0),)
            parts += dims
        self._dims[out] = tuple(parts)

    def _visit_sizes(self, node: Node, out: AnyValue) -> None:
        first = self.size(node.inputs[0])
        if first is None:
            return
        if node.op in ("Cast", "Identity", "Squeeze", "Reshape", "Unsqueeze", "CastLike"):
            self._sizes[out] = first
            moved = node.op in ("Unsqueeze", "Reshape")
            if moved and len(first.dims) == 1 and first.factor == 1:
                ((dim, power),) = first.dims.items()
                if power == 2:
                    self._dims[out] = (dim,)
            return
        made: Size | None = None
        if node.op in ("Sqrt", "Reciprocal"):
            made = first.power(1 if node.op == "Sqrt" else -2)
        elif len(node.inputs) == 2 and (second := self.size(node.inputs[1])) is not None:
            if node.op == "Mul":
                made = first * second
            elif node.op == "Div":
                inverse = second.power(-2)
                made = None if inverse is None else first * inverse
            elif node.op == "Pow" and not second.dims and second.factor in (2, 1, -1, 0.5, -0.5):
                made = first.power(int(2 * second.factor))
        if made is not None:
            self._sizes[out] = made

    def _visit_arithmetic(self, node: Node, out: AnyValue) -> None:
        """Compute a node on small constants now, in float64."""
        given = []
        for value in node.inputs:
            array = self.array(value) if value.name else None
            if value.name and array is None:
                return
            given.append(array)
        if any(a.ref_attr_name for a in node.proto.attribute) or self.array(out) is not None:
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
    call = float64.Call(
        node.op,
        node.domain or "",
        node.scope.opsets.get(node.domain or "", 1),
        inputs,
        node.attrs,
        tuple(bool(v.name) for v in node.outputs),
    )
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


def reshaped(
    given: tuple[Dim, ...], wanted: tuple[Dim, ...], out: AnyValue, *, zero: bool = False
) -> tuple[Dim, ...] | None:
    """The dims of `out`, a Reshape of something with dims `given` to `wanted`.

    Args:
        given: The dims before.
        wanted: The shape that is asked for: 0 keeps a dim, -1 stands for what is left.
        out: The result, for a dim of its own where what is left is not known.
        zero: 0 means a dim of size 0.
    """
    if 0 in wanted and (zero or any(w == 0 and i >= len(given) for i, w in enumerate(wanted))):
        return None
    dims = [given[i] if w == 0 else w for i, w in enumerate(wanted)]
    if -1 in dims:
        at = dims.index(-1)
        rest = _product(d for i, d in enumerate(dims) if i != at).power(-2)
        if rest is None:
            return None
        left = _product(given) * rest
        dims[at] = (out, at)
        if not left.dims and left.factor == int(left.factor):
            dims[at] = int(left.factor)
        elif len(left.dims) == 1 and left.factor == 1:
            ((dim, power),) = left.dims.items()
            dims[at] = dim if power == 2 else dims[at]
    return tuple(dims)


def _product(dims: Iterable[Dim]) -> Size:
    size = Size(1.0)
    for dim in dims:
        size *= Size(float(dim)) if isinstance(dim, int) else Size(1.0, {dim: 2})
    return size
