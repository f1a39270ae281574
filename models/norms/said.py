"""What is said of a case, and how a recogniser's rows are compared with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"
Formula: TypeAlias = "Callable[[Array], Array]"
Axes: TypeAlias = "tuple[int, ...] | None"


@dataclass(frozen=True)
class Expected:
    """One row that a perfect recogniser prints.

    Attributes:
        kind: The kind; for a near miss the one it resembles.
        input: Name of the value that is normalized, in the scope of the norm.
        output: Name of the result, in the same scope.
        axes: Non-negative where the rank is known.
        epsilon: Added to the variance, None where the kind has none.
        recognised: False for a near miss.
        refused: It is recognised, and nothing may be done with it: somebody else reads a value
            in the middle.
        optional: The row may be absent.
        not_input: A value that no recognised row may have as its input.
        other_kinds: Further right answers, as the four below.
        other_inputs: The same value by another name: behind an Identity, a Cast.
        other_outputs: As above.
        other_axes: As above.
        other_epsilons: As above.
        unchecked: Names of fields that a row may fill as it likes.
        formula: From the input's values to the output's, in float64. For a near miss: the norm
            that it resembles, from `not_input`.
    """

    kind: str
    input: str
    output: str
    axes: Axes
    epsilon: float | None
    recognised: bool = True
    refused: bool = False
    optional: bool = False
    not_input: str | None = None
    other_kinds: tuple[str, ...] = ()
    other_inputs: tuple[str, ...] = ()
    other_outputs: tuple[str, ...] = ()
    other_axes: tuple[Axes, ...] = ()
    other_epsilons: tuple[float | None, ...] = ()
    unchecked: tuple[str, ...] = ()
    formula: Formula | None = field(default=None, compare=False, repr=False)

    def admits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of `inspect --json` is this one, or an answer as good as it.

        Of a near miss only kind, input and the verdict are compared.
        """
        if "recognised" not in self.unchecked and bool(row["recognised"]) != self.recognised:
            return False
        if row["kind"] not in (self.kind, *self.other_kinds):
            return False
        if row["input"] not in (self.input, *self.other_inputs):
            return False
        if not row["recognised"]:
            return True
        axes = None if row["axes"] is None else tuple(row["axes"])
        return (
            row["output"] in (self.output, *self.other_outputs)
            and ("axes" in self.unchecked or axes in (self.axes, *self.other_axes))
            and (
                "epsilon" in self.unchecked
                or any(_close(row["epsilon"], e) for e in (self.epsilon, *self.other_epsilons))
            )
        )


@dataclass(frozen=True)
class Case:
    """A model and what is in it.

    Attributes:
        name: Unique in the catalogue: kind, spelling, type, opset, knowledge, scope, mutation.
        model: Of its own; accepted by onnx.checker but where `valid` says otherwise.
        expected: The rows; those of a near miss are either not recognised or parts.
        feeds: Inputs for onnx.reference.
        mutation: What was changed to make it a near miss; empty for a positive.
        reference: Whether onnx.reference computes this model as the standard says; it sees a
            Softmax below opset 13 as one of today, takes a BatchNormalization below 14 for one
            in training, and knows no GroupNormalization of opset 18.
        valid: Whether onnx.checker accepts it; GroupNormalization of opset 18 is deprecated in
            the very opset that brought it.
    """

    name: str
    model: onnx.ModelProto
    expected: tuple[Expected, ...]
    feeds: Mapping[str, NDArray[Any]]
    mutation: str = ""
    reference: bool = True
    valid: bool = True

    @property
    def kind(self) -> str:
        """The kind of the first row."""
        return self.expected[0].kind

    def noise(self, by_type: Mapping[str, float]) -> float:
        """The most that the types of its inputs lose; 1e-4 for a type that is not listed."""
        kinds = [i.type.tensor_type.elem_type for i in self.model.graph.input]
        names = [onnx.helper.tensor_dtype_to_np_dtype(kind).name for kind in kinds]
        return max(by_type.get(name, 1e-4) for name in names)


def judge(case: Case, rows: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare a recogniser's rows with the case: what it missed, and what it got wrong.

    A row is wrong when it is recognised and not expected, or when something was done with a norm
    that had to stay. Rows of the kind channel_affine are passed over unless expected: a gamma that
    stayed outside its norm is one. So are near misses that nobody expected.

    Args:
        case: With its expected rows.
        rows: Mappings with kind, input, output, axes, epsilon, recognised and perhaps action.
    """
    left = [dict(row) for row in rows]
    missed: list[str] = []
    wrong: list[str] = []
    for want in case.expected:
        found = next((row for row in left if want.admits(row)), None)
        if found is None:
            if not want.optional:
                missed.append(f"no row for {_say(vars(want))}")
            continue
        left.remove(found)
        if want.refused and found.get("action") in ("converted", "folded", "lowered"):
            wrong.append(f"{found['action']} although a value leaves it: {_say(found)}")
    wrong += [
        f"not expected: {_say(row)}"
        for row in left
        if row["recognised"] and row["kind"] != "channel_affine"
    ]
    return tuple(missed), tuple(wrong)


def _close(given: float | None, wanted: float | None) -> bool:
    if given is None or wanted is None:
        return given is wanted
    return math.isclose(given, wanted, rel_tol=1e-2, abs_tol=1e-15)  # half rounds an epsilon


def _say(row: Mapping[str, Any]) -> str:
    keys = ("kind", "input", "output", "axes", "epsilon", "recognised")
    return ", ".join(f"{k}={row[k]}" for k in keys)


@dataclass(frozen=True)
class Written:
    """What a writer leaves behind: the last value, its shape, and the rows."""

    output: str
    shape: tuple[int, ...]
    expected: tuple[Expected, ...]


def standardized(x: Array, axes: Axes, eps: float, centred: bool, factor: float = 1.0) -> Array:
    """Return d / sqrt(factor E[d^2] + eps), where d = x - E[x] or x."""
    d = x - x.mean(axes, keepdims=True) if centred else x
    return np.asarray(d / np.sqrt(factor * (d * d).mean(axes, keepdims=True) + eps))
