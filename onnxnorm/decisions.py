"""Integer outputs and the floating-point values they were decided on.

An ArgMax, a TopK index, a comparison, a rounding: each turns real values into integers, and where
two real values are closer than the error budget the integer may be either. `trace` finds the
operator that decided an integer output, through operators that only move values; `Decision.ties`
says which elements of another run are as good as the truth's. What cannot be traced has no ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.float64 import Array, is_float_type
from onnxnorm.truth import Evaluator

_MOVES: Final = frozenset(
    {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Gather",
     "Expand"}
)  # fmt: skip
# What chooses places: the distance between two of them says nothing.
_CHOOSES: Final = frozenset({"ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "TopK", "Unique"})
_COMPARES: Final = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"})
_ROUNDS: Final[dict[str, Any]] = {"Round": np.rint, "Floor": np.floor, "Ceil": np.ceil}


@dataclass(frozen=True)
class Decision:
    """The operator that decided an integer output.

    Attributes:
        node: ArgMax, ArgMin, TopK, a comparison, NonZero, or a rounding (Cast, QuantizeLinear).
        reals: Names of the floating-point values it decided on.
        moves: Operators between it and the output, nearest to it first.
        rounding: What a Cast's input was rounded by before, "" for the Cast's own truncation.
        inner: What decided the input of a NonZero.
        integers: Name of the decision's own output.
    """

    node: onnx.NodeProto
    reals: tuple[str, ...]
    moves: tuple[onnx.NodeProto, ...]
    rounding: str = ""
    inner: Decision | None = None
    integers: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Values of the truth that `ties` reads."""
        names = [*self.reals, self.integers]
        names += [name for node in self.moves for name in node.input[1:] if name]
        if self.node.op_type == "QuantizeLinear":
            names += [name for name in self.node.input[1:] if name]
        if self.inner is not None:
            names += [self.node.input[0], *self.inner.needs]
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def budgeted(self) -> tuple[str, ...]:
        """Floating-point values whose error budget decides what a tie is."""
        return self.reals + (self.inner.budgeted if self.inner is not None else ())

    def ties(
        self,
        truth: Array,
        run: Array,
        values: Mapping[str, Any],
        budgets: Mapping[str, float],
        evaluator: Evaluator,
    ) -> bool:
        """Tell whether every element where a run differs from the truth is a tie.

        Args:
            truth: The output in the truth.
            run: The output of the run; another shape is a tie only below a NonZero.
            values: The truth's values by name, at least `needs`.
            budgets: How far a run may be from the truth, by name of a floating-point value.
            evaluator: Re-evaluates the moves.
        """
        if self.node.op_type == "NonZero":
            return self._same_set(truth, run, values, budgets, evaluator)
        if truth.shape != run.shape:
            return False
        size = int(np.size(values[self.integers]))
        place = np.arange(size).reshape(np.shape(values[self.integers]))
        for node in self.moves:
            rest = [values[name] if name else None for name in node.input[1:]]
            place = np.asarray(evaluator.apply(node, [place, *rest])[0])
        different = np.asarray(truth != run).reshape(-1)
        where = np.broadcast_to(place, truth.shape).reshape(-1)[different]
        chosen = run.reshape(-1)[different]
        return bool(np.all(self._tied(where, chosen, values, budgets)))

    def _same_set(
        self,
        truth: Array,
        run: Array,
        values: Mapping[str, Any],
        budgets: Mapping[str, float],
        evaluator: Evaluator,
    ) -> bool:
        if self.moves or self.inner is None or truth.shape[0] != run.shape[0]:
            return False
        mask = np.asarray(values[self.node.input[0]])
        other = np.zeros(mask.shape, dtype=np.bool_)
        sizes: tuple[int, ...] = mask.shape
        if any(np.any((r < 0) | (r >= n)) for r, n in zip(run, sizes, strict=True)):
            return False
        other[tuple(run)] = True
        mask = mask.astype(np.bool_)
        return self.inner.ties(mask, other, values, budgets, evaluator)

    def _tied(
        self,
        where: NDArray[np.int64],
        chosen: Array,
        values: Mapping[str, Any],
        budgets: Mapping[str, float],
    ) -> Array:
        """Return, for each differing element, whether the truth lets it be `chosen`."""
        kind = self.node.op_type
        room = 2.0 * sum(budgets.get(name, 0.0) for name in self.reals)
        reals = [np.asarray(values[name]) for name in self.reals]
        if kind in {"ArgMax", "ArgMin", "TopK"}:
            return self._tied_index(
                where, chosen, reals[0], np.asarray(values[self.integers]), room
            )
        if kind in _COMPARES:
            left, right = np.broadcast_arrays(
                np.asarray(values[self.node.input[0]], dtype=np.float64),
                np.asarray(values[self.node.input[1]], dtype=np.float64),
            )
            gap = np.abs(left - right).reshape(-1)[where]
            return np.asarray(gap <= room)
        low, high = (self._rounded(reals[0] + step, values) for step in (-room, room))
        return np.asarray((low.reshape(-1)[where] <= chosen) & (chosen <= high.reshape(-1)[where]))

    def _tied_index(
        self, where: NDArray[np.int64], chosen: Array, x: Array, index: Array, room: float
    ) -> Array:
        default = -1 if self.node.op_type == "TopK" else 0
        axis = next((int(a.i) for a in self.node.attribute if a.name == "axis"), default)
        rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
        if self.node.op_type == "TopK":
            owner = np.arange(index.size).reshape(index.shape)
            moved = np.moveaxis(owner, axis, -1)
            row_of = np.empty(index.size, dtype=np.int64)
            row_of[moved.reshape(-1)] = np.arange(index.size) // index.shape[axis]
            row = row_of[where]
        else:
            row = where
        best = rows[row, index.reshape(-1)[where]]
        valid = (chosen >= 0) & (chosen < rows.shape[1])
        other = rows[row, np.where(valid, chosen, 0).astype(np.int64)]
        return np.asarray(valid & (np.abs(best - other) <= room))

    def _rounded(self, x: Array, values: Mapping[str, Any]) -> Array:
        if self.node.op_type == "QuantizeLinear":
            scale = np.asarray(values[self.node.input[1]], dtype=np.float64)
            if scale.size != 1:
                axis = next((int(a.i) for a in self.node.attribute if a.name == "axis"), 1)
                shape = [1] * x.ndim
                shape[axis] = scale.size
                scale = scale.reshape(shape)
            integers = np.asarray(values[self.integers]).astype(np.float64)
            # relative to the truth's integer, so that no zero point or saturation is repeated here
            exact = np.asarray(values[self.reals[0]], dtype=np.float64)
            return np.asarray(integers + np.rint(x / scale) - np.rint(exact / scale))
        if self.rounding:
            return np.asarray(_ROUNDS[self.rounding](x))
        return np.asarray(np.trunc(x))


def trace(
    model: onnx.ModelProto, output: str, types: Mapping[str, tuple[int, Any]]
) -> Decision | None:
    """Return what decided an integer or boolean value of the main graph, None where unknown.

    Args:
        model: The model.
        output: Name of the value.
        types: Element type and shape by name, from shape inference.
    """
    producers = {name: node for node in model.graph.node for name in node.output if name}

    def real(name: str) -> bool:
        return is_float_type(types.get(name, (0, None))[0])

    def find(name: str, moves: Sequence[onnx.NodeProto]) -> Decision | None:
        node = producers.get(name)
        if node is None or node.domain not in {"", "ai.onnx"}:
            return None
        kind, source = node.op_type, node.input[0] if node.input else ""
        near = tuple(reversed(moves))
        if kind in {"ArgMax", "ArgMin"} and real(source):
            return Decision(node, (source,), near, integers=name)
        if kind == "TopK" and len(node.output) > 1 and name == node.output[1] and real(source):
            return Decision(node, (source,), near, integers=name)
        if kind in _COMPARES and (real(source) or real(node.input[1])):
            reals = tuple(n for n in node.input if real(n))
            return Decision(node, (*reals, *(n for n in node.input if n not in reals)), near,
                            integers=name)  # fmt: skip
        if kind == "QuantizeLinear":
            return Decision(node, (source,), near, integers=name)
        if kind == "NonZero":
            inner = find(source, ())
            return Decision(node, (), near, inner=inner, integers=name) if inner else None
        if kind == "Cast" and real(source):
            before = producers.get(source)
            if before is not None and before.op_type in _ROUNDS and real(before.input[0]):
                return Decision(node, (before.input[0],), near, before.op_type, integers=name)
            return Decision(node, (source,), near, integers=name)
        if kind == "Cast" or kind in _MOVES:
            return find(source, [*moves, node])
        return None

    return find(output, ())


def holds_places(model: onnx.ModelProto, output: str, types: Mapping[str, tuple[int, Any]]) -> bool:
    """Tell whether a value of the main graph holds places, or integers that were made of some.

    Args:
        model: The model.
        output: Name of the value.
        types: Element type and shape by name, from shape inference.
    """
    producers = {name: node for node in model.graph.node for name in node.output if name}
    pending, seen = [output], set[str]()
    while pending:
        name = pending.pop()
        node = producers.get(name)
        if name in seen or node is None or is_float_type(types.get(name, (0, None))[0]):
            continue
        seen.add(name)
        if node.op_type in _CHOOSES:
            return True
        pending += node.input
    return False
