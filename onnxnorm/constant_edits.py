"""Changes of the constants of one site: c becomes scale * c + shift.

What is asked of one input of a node several times adds up: factors multiply, and a shift is for the
result. Every constant is read once, changed in float64 in blocks, and rounded once to its own type.
The same constant with the same change is stored once, however many nodes share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxnorm.change import changed, results
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.port import rounded
from onnxnorm.rewrite import Rewriter, outermost
from onnxnorm.storage import Array

Vector = NDArray[np.float64]
_finfo: Final[Callable[[Any], Any]] = ml_dtypes.finfo  # it has no types of its own


@dataclass(eq=False)
class Edit:
    """What becomes of one constant.

    Attributes:
        constant: The constant; None where the input is empty, as a missing bias is.
        dtype: The type of the result.
        scale: In a shape that broadcasts against the constant; None for 1.
        shift: The same; None for 0.
    """

    constant: Constant | None
    dtype: np.dtype[Any]
    scale: Vector | None = None
    shift: Vector | None = None

    @property
    def nothing(self) -> bool:
        """Whether the constant stays what it is."""
        return self.shift is None and (self.scale is None or bool((self.scale == 1.0).all()))

    def key(self, node: Node, index: int) -> tuple[object, ...]:
        """Equal for two edits with one and the same result."""
        if self.constant is None:
            return (node, index)
        parts = [None if a is None else (a.shape, a.tobytes()) for a in (self.scale, self.shift)]
        return (self.constant.source, *parts)

    @property
    def _factors(self) -> Vector:
        return np.ones(()) if self.scale is None else self.scale

    def array(self) -> Array:
        """The result: formed in float64, rounded once."""
        if self.constant is None:
            assert self.shift is not None, "an empty input is filled with a shift"
            return rounded(self.shift, self.dtype)
        return changed(self.constant.array(), self._factors, self.shift, self.dtype)

    def misfit(self) -> str | None:
        """What the type cannot hold of the result, as a clause; None where it holds it.

        Every entry must be finite. Of what is only scaled, the largest entry for each factor must
        be zero or a normal number: where all are smaller they lose digits.
        """
        if self.constant is None:
            fits = bool(np.isfinite(self.array().astype(np.float64)).all())
            return None if fits else f"a bias that is not finite in {self.dtype}"
        name, before = self.constant.name, self.constant.array()
        smallest = float(_finfo(self.dtype).smallest_normal)
        largest: Vector | None = None
        for _, block in results(before, self._factors, self.shift):
            if not np.isfinite(rounded(block, self.dtype).astype(np.float64)).all():
                return f"a '{name}' that is not finite in {self.dtype}"
            if self.scale is None or self.shift is not None or block.ndim == 0:
                continue
            padded = (1,) * (block.ndim - self.scale.ndim) + self.scale.shape
            others = tuple(at for at, n in enumerate(padded) if n == 1)
            found = np.abs(block).max(axis=others, initial=0.0, keepdims=True)
            if padded[0] == 1 and largest is not None:  # every block has all the factors
                found = np.maximum(largest, found)
            largest = found
            if padded[0] != 1 and _lost(largest, smallest):
                break
        if largest is not None and _lost(largest, smallest):
            return f"a '{name}' that is too small for {self.dtype}"
        return None


class ConstantEdits:
    """What happens to the constants of one site."""

    def __init__(self) -> None:
        self._edits: dict[tuple[Node, int], Edit] = {}

    def scale(self, node: Node, index: int, constant: Constant, by: Vector) -> None:
        """Multiply a constant."""
        edit = self._edits.setdefault((node, index), Edit(constant, constant.dtype))
        edit.scale = by if edit.scale is None else edit.scale * by

    def shift(
        self,
        node: Node,
        index: int,
        constant: Constant | None,
        by: Vector,
        dtype: np.dtype[Any] | None = None,
    ) -> None:
        """Add to what becomes of a constant; to an empty input, as to zero."""
        if constant is not None:
            dtype = constant.dtype
        assert dtype is not None, "what fills an empty input has a type"
        edit = self._edits.setdefault((node, index), Edit(constant, dtype))
        edit.shift = by if edit.shift is None else edit.shift + by

    def __iter__(self) -> Iterator[tuple[Node, int, Edit]]:
        """The edits that change something."""
        for (node, index), edit in self._edits.items():
            if not edit.nothing:
                yield node, index, edit

    def growth(self, facts: Facts) -> tuple[int, Constant | None]:
        """By how many bytes the weights grow, and the constant that adds most to it."""
        made: dict[tuple[object, ...], Constant] = {}
        read: dict[AnyValue, int] = {}
        for node, index, edit in self:
            if edit.constant is not None:
                made[edit.key(node, index)] = edit.constant
                read[edit.constant.source] = read.get(edit.constant.source, 0) + 1
        added: dict[AnyValue, int] = {}
        known: dict[AnyValue, Constant] = {}
        for constant in made.values():
            source = constant.source
            if source not in known:
                known[source] = constant
                gone = facts.readers(constant) <= read[source]
                added[source] = -constant.nbytes if gone else 0
            added[source] += constant.nbytes
        most = max(added, key=lambda s: added[s], default=None)
        return sum(added.values()), None if most is None else known[most]

    def stage(self, rw: Rewriter, role: str) -> None:
        """Stage all of it."""
        made: dict[tuple[object, ...], AnyValue] = {}
        for node, index, edit in self:
            key = edit.key(node, index)
            if key not in made or node.scope.is_function:
                of = edit.constant.name if edit.constant is not None else node.outputs[0].name
                place = outermost(node)
                made[key] = rw.constant(role, edit.array(), at=place, name=f"{of}_{role}")
            rw.rewire(node, index, made[key])


def _lost(largest: Vector, smallest: float) -> bool:
    return bool(((largest > 0.0) & (largest < smallest)).any())
