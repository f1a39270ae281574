"""Who makes a value linearly: the constants into which an affine map of its features can go.

    s * (W x + b) + t  =  (s * W) x + (s * b + t)

A value is followed back through additions of constants and through operators that only move its
features, to the linear operator that makes them. On the way everything has this one reader. The
shift goes into the first constant that is added; where there is none it is left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.port import is_real, rounded, row_blocks, slots
from onnxnorm.storage import Array
from onnxnorm.transfer import Basis, Link, Stop, Transfer, described

Vector = NDArray[np.float64]

MOVES: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_BIASED: Final = {"Conv": 1, "ConvTranspose": 1, "Gemm": 11}  # the opset from which it may lack one
_finfo: Final[Callable[[Any], Any]] = ml_dtypes.finfo  # it has no types of its own


@dataclass(frozen=True, eq=False)
class Change:
    """One constant c that becomes scale * c + shift.

    Attributes:
        node: The node that reads it.
        index: Which input it is.
        constant: The constant; None where the input is empty, as a missing bias is.
        dtype: The type of the result.
        scale: In a shape that broadcasts against the constant.
        shift: The same; None for 0.
        bias: Whether it is added, and not multiplied with another input.
    """

    node: Node
    index: int
    constant: Constant | None
    dtype: np.dtype[Any]
    scale: Vector
    shift: Vector | None = None
    bias: bool = False

    def array(self) -> Array:
        """The new constant: formed in float64, rounded once."""
        if self.constant is None:
            assert self.shift is not None, "an empty input is filled with a shift"
            return rounded(self.shift, self.dtype)
        if self.bias:
            return rounded(self._moved(self.constant.float64(), self.scale), self.dtype)
        weight = self.constant.array()
        out = np.empty_like(weight)
        for rows, product in self._products(weight):
            out[rows] = rounded(product, self.dtype)
        return out

    def misfit(self) -> str | None:
        """What the type cannot hold of the result, as a clause; None where it holds it.

        Every entry must be finite. The largest of a weight must be zero or a normal number: where
        all are smaller they lose digits.
        """
        if self.constant is None or self.bias:
            if not np.isfinite(self.array().astype(np.float64)).all():
                return f"the folded bias is not finite in {self.dtype}"
            return None
        largest = 0.0
        for _, product in self._products(self.constant.array()):
            if not np.isfinite(rounded(product, self.dtype).astype(np.float64)).all():
                return f"the folded weight is not finite in {self.dtype}"
            largest = max(largest, float(np.abs(product).max(initial=0.0)))
        if 0.0 < largest < float(_finfo(self.dtype).smallest_normal):
            return f"the folded weight is too small for {self.dtype}, {largest:.1e} at most"
        return None

    def _moved(self, array: Vector, scale: Vector) -> Vector:
        with np.errstate(over="ignore", invalid="ignore"):  # misfit() looks at every result
            moved: Vector = array * scale
            return moved if self.shift is None else moved + self.shift

    def _products(self, weight: Array) -> Iterator[tuple[slice, Vector]]:
        """Runs of rows, small enough that their float64 copies do not count, each with s * w."""
        scale = self.scale.reshape((1,) * (weight.ndim - self.scale.ndim) + self.scale.shape)
        for rows in row_blocks(weight):
            factors = scale if scale.shape[0] == 1 else scale[rows]
            yield rows, self._moved(weight[rows].astype(np.float64), factors)


@dataclass(frozen=True, eq=False)
class Feeder:
    """A linear operator and the way from it to a value.

    Attributes:
        linear: The linear operator.
        way: The nodes behind it, the producer of the value first.
        changes: What becomes of their constants.
        rest: The shift that none of them takes, as the constant of an Add behind the linear
            operator; None where one does.
    """

    linear: Node
    way: tuple[Node, ...]
    changes: tuple[Change, ...]
    rest: Change | None


def feeder(
    value: AnyValue, layout: Layout, scale: Vector, shift: Vector, reader: Node, transfer: Transfer
) -> Feeder | Stop:
    """How the linear operator behind `value` would make scale * value + shift instead.

    Args:
        value: What is scaled and shifted.
        layout: Where its features are.
        scale: One factor for each feature.
        shift: One addend for each feature.
        reader: The node that reads it; what feeds it has to be of the same scope.
        transfer: The rules on this graph.
    """
    return _Walk(layout, scale, shift if shift.any() else None, reader, transfer).back(value)


class _Walk:
    def __init__(
        self, layout: Layout, scale: Vector, shift: Vector | None, reader: Node, transfer: Transfer
    ) -> None:
        self.layout = layout
        self.scale = scale
        self.shift = shift
        self.reader = reader
        self.transfer = transfer
        self.facts = transfer.facts
        self.way: list[Node] = []
        self.changes: list[Change] = []

    def back(self, value: AnyValue) -> Feeder | Stop:
        while True:
            if (taken := self._read_elsewhere(value)) is not None:
                return taken
            node = self.facts.producer(value)
            if node is None:
                return Stop(None, f"no linear operator makes '{value.name}': {self._origin(value)}")
            if node.scope is not self.reader.scope:
                return Stop(node, f"{described(node)} is outside the body that scales its result")
            if node.domain == "" and node.op in MOVES:
                link = self.transfer.back(node, value, Basis(self.layout))
                if not isinstance(link, Link):
                    return Stop(node, f"the features cannot be followed back: {link.why}")
                self.layout = link.demands[0].basis.layout
                self.way.append(node)
                value = node.inputs[0]
            elif node.domain == "" and node.op in ("Add", "Sub") and len(node.inputs) == 2:
                before = self._through_sum(node)
                if isinstance(before, Stop):
                    return before
                self.way.append(node)
                value = before
            else:
                return self._into(node)

    def _origin(self, value: AnyValue) -> str:
        if self.facts.constant(value) is not None:
            return "it is a constant"
        return self.facts.why_not_constant(value)

    def _read_elsewhere(self, value: AnyValue) -> Stop | None:
        if (why := self.facts.pinned(value)) is not None:
            return Stop(self.facts.producer(value), f"'{value.name}' is {why}")
        others = [u.node for u in self.facts.uses(value)]
        others.remove(self.way[-1] if self.way else self.reader)
        if self.way:  # the value stays, with other contents, and shapes do not see them
            others = [n for n in others if n.domain != "" or n.op not in ("Shape", "Size")]
        if others:
            node = others[0]
            return Stop(node, f"'{value.name}' is also read by node '{node.label}' ({node.op})")
        return None

    def _through_sum(self, node: Node) -> AnyValue | Stop:
        """The other operand of a constant that is added, which takes the shift."""
        known = [self.facts.constant(v) for v in node.inputs]
        indices = [i for i, constant in enumerate(known) if constant is not None]
        if len(indices) != 1 or node.scope.opsets[""] < 7:
            return Stop(node, f"{described(node)} joins two values")
        (index,) = indices
        constant = known[index]
        other: AnyValue = node.inputs[1 - index]
        assert constant is not None, "it is the one that is"
        layout, shape = self.layout, constant.shape
        same = layout.misses(shape)
        if not is_real(constant.dtype):
            return Stop(node, f"'{constant.name}' is of type {constant.dtype}")
        if not self.transfer.covers(other, layout):
            return Stop(node, f"{described(node)} adds to '{other.name}', which has other features")
        if not (same or layout.covers(shape)) or (same and int(np.prod(shape)) != 1):
            told = f"takes '{constant.name}' of shape {list(shape)}, which is not one per feature"
            return Stop(node, f"{described(node)} {told}")
        sign = -1.0 if node.op == "Sub" and index == 1 else 1.0
        shift = None if self.shift is None else sign * layout.spread(self.shift, 0)
        self._change(node, index, constant, constant.dtype, layout.spread(self.scale, 0), shift)
        self.shift = None
        return other

    def _into(self, node: Node) -> Feeder | Stop:
        """The end of the way."""
        found = slots(node, self.facts)
        if isinstance(found, str):
            return Stop(node, f"{described(node)} makes it, and {found}")
        first, layout = found[0], self.layout
        if not layout.only_axis(first.output_axis):
            told = "is linear along another axis than the one that is scaled"
            return Stop(node, f"{described(node)} {told}")
        scale = layout.spread(self.scale, 0).reshape(-1)
        rows = first.constant.shape[0]
        if first.features() != scale.size or (first.groups > 1 and rows % first.groups):
            told = f"has a weight '{first.constant.name}' of shape {list(first.constant.shape)}"
            return Stop(node, f"{described(node)} {told}, which does not fit")
        biases = [slot for slot in found if slot.bias]
        if not biases and len(node.inputs) > 2 and node.inputs[2].name:
            return Stop(node, f"{described(node)} adds '{node.inputs[2].name}', which is computed")
        dtype = first.constant.dtype
        self._change(node, first.index, first.constant, dtype, first.spread(scale), bias=False)
        vector = None if self.shift is None else layout.spread(self.shift, 0).reshape(-1)
        for slot in biases:
            name, shape = slot.constant.name, slot.constant.shape
            if slot.features() not in (1, scale.size) or (
                slot.features() == 1 and int(np.prod(shape)) != 1
            ):
                told = f"takes '{name}' of shape {list(shape)}, which is not one per feature"
                return Stop(node, f"{described(node)} {told}")
            if vector is not None and slot.gain == 0.0:
                return Stop(node, f"{described(node)} takes its bias times 0")
            moved = None if vector is None else slot.spread(vector) / slot.gain
            self._change(node, slot.index, slot.constant, dtype, slot.spread(scale), moved)
            self.shift = None
        if self.shift is not None and node.op in _BIASED:
            if node.scope.opsets[""] < _BIASED[node.op]:
                return Stop(node, f"{described(node)} has no bias")
            gain = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
            if node.op == "Gemm" and (node.parameter("beta") or gain == 0.0):
                return Stop(node, f"{described(node)} takes its bias times 0")
            assert vector is not None, "there is a shift"
            moved = vector / gain
            if node.op == "Gemm":  # along its own axis; a convolution has a vector
                moved = moved.reshape(-1, *(1,) * (-first.output_axis - 1))
            self._change(node, 2, None, dtype, np.ones(1), moved)
            self.shift = None
        rest = None
        if self.shift is not None:
            rest = Change(
                node, -1, None, dtype, np.ones(1), layout.spread(self.shift, 0), bias=True
            )
        return Feeder(node, tuple(self.way), tuple(self.changes), rest)

    def _change(
        self,
        node: Node,
        index: int,
        constant: Constant | None,
        dtype: np.dtype[Any],
        scale: Vector,
        shift: Vector | None = None,
        *,
        bias: bool = True,
    ) -> None:
        if shift is not None or bool((scale != 1.0).any()):
            self.changes.append(Change(node, index, constant, dtype, scale, shift, bias))


def shared(change: Change, facts: Facts) -> bool:
    """Whether others read the constant too, so that changing it means a copy."""
    return change.constant is not None and facts.readers(change.constant) > 1
