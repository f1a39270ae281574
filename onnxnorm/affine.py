"""An affine map that waits on a value: its two vectors, and what becomes of them on the way.

    y = s * x + t        s and t of size 1 on every axis along which they do not vary

Both are arrays whose axes count from the right, as broadcasting does, so that a scalar, one number
for each channel and one for each channel of each head are the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxnorm.layout import Dim, Dims
from onnxnorm.module import Value, Weight
from onnxnorm.norm_operators import batch_norm_affine
from onnxnorm.norms import Norm
from onnxnorm.transfer import Transfer

Vector = NDArray[np.float64]

LARGEST: Final = 1 << 20  # entries; what varies along more is no vector of channels


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift.

    Attributes:
        scale: In float64, as `slim` gives it.
        shift: The same.
    """

    scale: Vector
    shift: Vector

    @classmethod
    def of(cls, scale: ArrayLike = 1.0, shift: ArrayLike = 0.0) -> Affine:
        """The map with these vectors.

        >>> Affine.of([[2.0], [2.0]], [0.0, 1.0]).scale.shape
        ()
        """
        return cls(slim(scale), slim(shift))

    @property
    def scales(self) -> bool:
        """Whether it multiplies by anything but 1."""
        return bool((self.scale != 1.0).any())

    @property
    def shifts(self) -> bool:
        """Whether it adds anything but 0."""
        return bool((self.shift != 0.0).any())

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return not self.scales and not self.shifts

    @property
    def positive(self) -> bool:
        """Whether a larger x gives a larger y in every channel."""
        return bool((self.scale > 0.0).all())

    def same(self, other: Affine) -> bool:
        """Whether both are one map."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.shift, other.shift)

    def moved(self, move: Callable[[Vector, float], Vector]) -> Affine:
        """Both vectors moved; `move` is told which number changes nothing."""
        return Affine.of(move(self.scale, 1.0), move(self.shift, 0.0))


def slim(array: ArrayLike) -> Vector:
    """The smallest array that broadcasts as this one does."""
    slimmed = np.asarray(array, dtype=np.float64)
    for axis, size in enumerate(slimmed.shape):
        if size > 1:
            first = slimmed.take([0], axis)
            if bool((slimmed == first).all()):
                slimmed = first
    while slimmed.ndim and slimmed.shape[0] == 1:
        slimmed = slimmed[0]
    return slimmed


IDENTITY: Final = Affine.of()


def aligned(array: Vector, rank: int) -> Vector:
    """The array with so many axes at least."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def extent(array: Vector, axis: int) -> int:
    """The size of an axis, from the right; 1 where there is none."""
    return array.shape[axis] if array.ndim >= -axis else 1


def varies(array: Vector) -> tuple[int, ...]:
    """The axes, from the right, along which a slim array is not constant."""
    return tuple(a - array.ndim for a, n in enumerate(array.shape) if n != 1)


def carried(array: Vector, to: dict[int, int]) -> Vector:
    """A slim array with each axis along which it varies at another place, from the right.

    >>> carried(np.arange(3.0).reshape(3, 1, 1), {-3: -2}).shape
    (3, 1)
    """
    axes = sorted(varies(array), key=to.__getitem__)
    shape = [1] * max((-to[a] for a in axes), default=0)
    for axis in axes:
        shape[to[axis]] = array.shape[axis]
    moved = np.moveaxis(array, axes, range(-len(axes), 0)) if axes else array
    return moved.reshape(shape)


def reshaped(array: Vector, before: Dims, after: Dims) -> Vector | None:
    """What a Reshape makes of an array that broadcasts; None where sizes are not known for it.

    >>> reshaped(np.ones((12, 1)) * 2, ("n", 12, 64), ("n", 768)).shape
    ()
    >>> reshaped(np.arange(3.0).reshape(3, 1), ("n", 3, 2), ("n", 6))
    array([0., 0., 1., 1., 2., 2.])
    """
    array = slim(array)
    if array.size == 1:
        return array
    if array.ndim > len(before):
        return None
    full = aligned(array, len(before))
    wide, target = list(full.shape), [1] * len(after)
    for old, new in _runs(before, after):
        if all(full.shape[a] == 1 for a in old):
            continue
        sizes = [before[a] for a in old], [after[a] for a in new]
        known = [n for side in sizes for n in side if isinstance(n, int)]
        if len(known) < len(old) + len(new):
            return None
        wide[old.start : old.stop] = [int(n) for n in sizes[0]]
        target[new.start : new.stop] = [int(n) for n in sizes[1]]
    if math.prod(wide) > LARGEST or math.prod(wide) != math.prod(target):
        return None
    if any(have not in (1, size) for have, size in zip(full.shape, wide, strict=True)):
        return None
    return slim(np.broadcast_to(full, wide).reshape(target))


def _runs(before: Dims, after: Dims) -> list[tuple[range, range]]:
    """Neighbouring axes that hold the same entries before and after, as short as possible."""
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    i, j = len(before), len(after)
    runs = [(range(a, a + 1), range(a, a + 1)) for a in range(head)]
    while i > head and j > head:
        if before[i - 1] == after[j - 1]:
            i, j = i - 1, j - 1
            runs.append((range(i, i + 1), range(j, j + 1)))
            continue
        run = _run(before[head:i], after[head:j])
        if run is None:
            break
        runs.append((range(i - run[0], i), range(j - run[1], j)))
        i, j = i - run[0], j - run[1]
    if i > head or j > head:
        runs.append((range(head, i), range(head, j)))
    return runs


def _run(before: Sequence[Dim], after: Sequence[Dim]) -> tuple[int, int] | None:
    """How many of the last axes on each side have the same product; None where none is known."""
    i, j, left, right = 0, 0, 1, 1
    while i == 0 or left != right:
        shorter = left <= right
        at, dims = (i, before) if shorter else (j, after)
        if at == len(dims):
            return None
        size = dims[-1 - at]
        if not isinstance(size, int) or size < 1:
            return None
        if shorter:
            i, left = i + 1, left * size
        else:
            j, right = j + 1, right * size
    return i, j


def read(norm: Norm, transfer: Transfer) -> Affine | str:
    """The map that a row computes, or the reason why it is not known to be one."""
    if norm.node.scope.opsets[""] < 7:
        return "before opset 7 constants are not broadcast from the right"
    rank = transfer.rank(norm.input)
    if rank is None or transfer.rank(norm.output) != rank:
        return f"the rank of '{norm.input.name}' is not known, or is not that of the result"
    if norm.operator:
        found = batch_norm_affine(norm.node, transfer.facts)
        if isinstance(found, str):
            return found
        scale, shift = (vector.reshape(-1, *(1,) * (rank - 2)) for vector in found)
    else:
        parts = [1.0 if norm.gamma is None else norm.gamma, 0.0 if norm.beta is None else norm.beta]
        if any(isinstance(part, Value | Weight) for part in parts):
            return "its scale or shift is computed"
        scale, shift = (np.asarray(part, np.float64) for part in parts)
    if not np.isfinite(scale).all():
        return "gamma / sqrt(variance + epsilon) is not finite"
    if not np.isfinite(shift).all():
        return "beta - mean * gamma / sqrt(variance + epsilon) is not finite"
    for part in (scale, shift):
        for axis in varies(part):
            if rank < -axis or transfer.sizes.dim(norm.input, axis) != part.shape[axis]:
                return f"'{norm.input.name}' is not known to have {part.shape[axis]} channels"
    return Affine.of(scale, shift)
