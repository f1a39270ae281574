"""The editor of streams: a change of basis of what writes them, staged as one site.

    w -> C diag(s) w        b -> C (diag(s) b + shift)

Every constant is read once, changed in float64 in blocks, and rounded once to its own type. The
same constant with the same change is stored once, however many nodes share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant
from onnxnorm.module import Node
from onnxnorm.port import magnitude, rounded
from onnxnorm.rewrite import Rewriter, outermost
from onnxnorm.storage import Array
from onnxnorm.transfer import Basis

_finfo: Final[Callable[[Any], Any]] = ml_dtypes.finfo  # it has no types of its own
_BLOCK: Final = 8 << 20  # bytes of float64 that are in the making at a time


@dataclass
class _Edit:
    constant: Constant | None
    basis: Basis | None = None
    shift: NDArray[np.float64] | None = None
    dtype: np.dtype[Any] | None = None


class Edits:
    """What happens to the constants of one site."""

    def __init__(self) -> None:
        self._edits: dict[tuple[Node, int], _Edit] = {}

    @property
    def nodes(self) -> list[Node]:
        """The nodes that will read another constant."""
        return [node for node, _ in self._edits]

    def change(self, node: Node, index: int, constant: Constant, basis: Basis) -> None:
        """Multiply a constant of a writer."""
        self._at(node, index, constant).basis = basis

    def shift(
        self,
        node: Node,
        index: int,
        constant: Constant | None,
        by: NDArray[np.float64],
        dtype: np.dtype[Any],
    ) -> None:
        """Add to a bias; to a slot that is empty, as to zero."""
        edit = self._at(node, index, constant)
        edit.shift = by if edit.shift is None else edit.shift + by
        edit.dtype = dtype

    def _at(self, node: Node, index: int, constant: Constant | None) -> _Edit:
        return self._edits.setdefault((node, index), _Edit(constant))

    def stage(self, rw: Rewriter) -> None:
        """Stage all of it."""
        shared: dict[tuple[AnyValue, Basis], AnyValue] = {}
        for (node, index), edit in self._edits.items():
            constant, basis = edit.constant, edit.basis
            key = None
            if constant is not None and basis is not None and edit.shift is None:
                key = (constant.source, basis)
                if key in shared and not node.scope.is_function:
                    rw.rewire(node, index, shared[key])
                    continue
            array = _result(edit)
            role = "centered" if edit.shift is None else "shifted"
            name = f"{constant.name if constant is not None else node.outputs[0].name}_{role}"
            made = rw.constant(role, array, at=outermost(node), name=name)
            if key is not None:
                shared[key] = made
            rw.rewire(node, index, made)


def misfit(constant: Constant, basis: Basis) -> str | None:
    """What the type of a constant cannot hold of C diag(s) w, as a clause; None where it can."""
    array = constant.array()
    whole = basis.scale is None and array.size and basis.layout.covers(array.shape)
    # The mean is no larger than the largest entry, so half of the range is enough.
    if whole and magnitude(array) <= float(_finfo(array.dtype).max) / 2:
        return None
    for block in _blocks(array.shape, basis):
        before = np.asarray(array[block], dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            after = rounded(basis.of(before), constant.dtype).astype(np.float64)
        if not np.isfinite(after).all():
            return f"is not finite in {constant.dtype} when its mean is taken out"
    return None


def _result(edit: _Edit) -> Array:
    constant, basis, shift = edit.constant, edit.basis, edit.shift
    if constant is None:
        assert shift is not None, "an empty slot is filled with a shift"
        assert edit.dtype is not None, "which has a type"
        moved = shift if basis is None else basis.of(shift)
        return rounded(moved, edit.dtype)
    array = constant.array()
    if shift is not None:
        grown = constant.float64() + shift
        return rounded(grown if basis is None else basis.of(grown), constant.dtype)
    assert basis is not None, "an edit changes something"
    if not basis.layout.covers(array.shape):
        return rounded(basis.of(constant.float64()), constant.dtype)
    out = np.empty_like(array)
    for block in _blocks(array.shape, basis):
        out[block] = rounded(basis.of(np.asarray(array[block], np.float64)), constant.dtype)
    return out


def _blocks(shape: tuple[int, ...], basis: Basis) -> Iterator[tuple[slice, ...]]:
    """Parts of an array that have all features, small enough not to count."""
    free = [a for a in range(len(shape)) if a - len(shape) not in basis.layout.axes]
    if not free or not basis.layout.covers(shape):
        yield ()
        return
    axis = max(free, key=lambda a: shape[a])
    each = max(1, int(np.prod(shape)) // max(1, shape[axis]) * 8)
    step = max(1, _BLOCK // each)
    for at in range(0, shape[axis], step):
        yield (*(slice(None),) * axis, slice(at, at + step))
