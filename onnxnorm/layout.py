"""Where the features of a stream lie in a tensor, and where they go when its shape changes.

    flat index of a dim = (outer, feature, inner)        a part is the middle factor

A feature axis of 768 that is split into 12 heads of 64 lies on two axes, one part on each; the
features inside one head lie on the last axis only, or, before the split, on the inner factor of an
axis. Axes count from the right, -1 being the last, because broadcasting does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Dim: TypeAlias = int | str  # a size, or the name of an unknown one
Dims: TypeAlias = tuple[Dim, ...]


@dataclass(frozen=True)
class Part:
    """Some of the features, as one factor of one axis.

    Attributes:
        axis: The axis, from the right.
        size: How many there are on this axis.
        outer: Size of the factor of the axis left of them.
        inner: Size of the factor right of them.
    """

    axis: int
    size: int
    outer: int = 1
    inner: int = 1

    @property
    def extent(self) -> int:
        """The size of the whole axis."""
        return self.outer * self.size * self.inner

    @property
    def whole(self) -> bool:
        """Whether the axis holds nothing else."""
        return self.outer == self.inner == 1


@dataclass(frozen=True)
class Layout:
    """The features of a tensor: parts from the most to the least significant.

    Attributes:
        parts: The parts; their sizes multiply to the number of features.
    """

    parts: tuple[Part, ...]

    @classmethod
    def whole_axes(cls, axes: Sequence[int], sizes: Sequence[int]) -> Layout:
        """All of these axes, given from the right and in order."""
        return cls(tuple(Part(a, n) for a, n in zip(axes, sizes, strict=True)))

    @property
    def features(self) -> int:
        """The number of features."""
        return math.prod(p.size for p in self.parts)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes on which features lie, in order."""
        return tuple(sorted({p.axis for p in self.parts}))

    @property
    def whole(self) -> bool:
        """Whether those axes hold nothing but features."""
        return all(p.whole for p in self.parts)

    def only_axis(self, axis: int) -> bool:
        """Whether all features lie on one axis, this one."""
        return self.axes == (axis,)

    def moved(self, to: dict[int, int]) -> Layout:
        """The layout when each axis goes to another place."""
        return Layout(tuple(Part(to[p.axis], p.size, p.outer, p.inner) for p in self.parts))

    def shifted(self, by: int) -> Layout:
        """The layout when every axis of features moves by so many places to the right."""
        return self.moved({p.axis: p.axis + by for p in self.parts})

    def grouped(self, groups: int) -> Layout | None:
        """The layout inside one of `groups` equal groups of the axis; None where it is cut."""
        if groups == 1:
            return self
        if len(self.parts) != 1 or self.parts[0].outer % groups:
            return None
        (p,) = self.parts
        return Layout((Part(p.axis, p.size, p.outer // groups, p.inner),))

    # ** arithmetic **

    def centered(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """The array minus its mean over the features; where it has none of the axes, zeros.

        An axis of size 1 stands for one that is repeated.
        """
        if not self.covers(array.shape):
            with np.errstate(invalid="ignore"):
                return array - array  # zero, but for what is not finite
        shape, over = self._factors(array.shape)
        factored = array.reshape(shape)
        mean = factored.mean(axis=over, keepdims=True)
        return np.asarray(factored - mean).reshape(array.shape)

    def covers(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape has its own value for every feature."""
        return all(len(shape) >= -p.axis and shape[p.axis] == p.extent for p in self.parts)

    def misses(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape has one value for all features."""
        return all(len(shape) < -p.axis or shape[p.axis] == 1 for p in self.parts)

    def spread(self, vector: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
        """A vector over the features as an array that broadcasts against the tensor."""
        shape = [1] * max(rank, *(-a for a in self.axes))
        for part in self.parts:
            shape[part.axis] = part.extent
        factors, over = self._factors(shape)
        sizes = [factors[at] if at in over else 1 for at in range(len(factors))]
        order = np.argsort([over[i] for i in range(len(over))])
        by_part = vector.reshape([p.size for p in self.parts]).transpose(order)
        return np.broadcast_to(by_part.reshape(sizes), factors).reshape(shape)

    def _factors(self, shape: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """The shape with every axis of features cut into its factors; where each part is then."""
        factors: list[int] = []
        place: dict[Part, int] = {}
        for axis, size in enumerate(shape):
            here = [p for p in self.parts if p.axis == axis - len(shape)]
            here.sort(key=lambda p: p.inner, reverse=True)
            rest = size
            for part in here:
                factors.append(rest // (part.size * part.inner))
                place[part] = len(factors)
                factors.append(part.size)
                rest = part.inner
            factors.append(rest)
        return factors, tuple(place[p] for p in self.parts)


def reshaped(layout: Layout, before: Dims, after: Dims) -> Layout | None:
    """Where the features are after a Reshape; None where they cannot be followed.

    >>> reshaped(Layout((Part(-1, 768),)), ("n", 197, 768), ("n", 197, 12, 64)).parts
    (Part(axis=-2, size=12, outer=1, inner=1), Part(axis=-1, size=64, outer=1, inner=1))
    >>> reshaped(Layout((Part(-1, 64),)), ("n", 197, 12, 64), ("n", 197, 768)).parts
    (Part(axis=-1, size=64, outer=12, inner=1),)
    """
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    moved: list[Part] = []
    middle: list[Part] = []
    for part in layout.parts:
        at = part.axis + len(before)
        if part.axis >= -tail:
            moved.append(part)
        elif at < head:
            moved.append(Part(at - len(after), part.size, part.outer, part.inner))
        else:
            middle.append(part)
    if not middle:
        return Layout(tuple(moved))
    if moved:
        return None
    return _regrouped(middle, before[head : len(before) - tail], after[head:], tail)


def _regrouped(parts: list[Part], before: Dims, after: Dims, tail: int) -> Layout | None:
    """Follow parts through a group of axes that becomes another group of the same total size.

    Positions count from the right inside the group; what lies left of the features may be unknown.
    """
    strides = _strides(before)
    runs: list[tuple[int, int]] = []  # (stride, size), most significant first
    for part in parts:
        at = part.axis + tail + len(before)
        if not 0 <= at < len(before) or strides[at] is None or before[at] != part.extent:
            return None
        stride = (strides[at] or 0) * part.inner
        if runs and runs[-1][0] == stride * part.size:
            runs[-1] = (stride, runs[-1][1] * part.size)
        elif runs and runs[-1][0] < stride * part.size:
            return None  # in another order than they lie
        else:
            runs.append((stride, part.size))
    inside = after[: len(after) - tail]
    places = _strides(inside)
    found: list[Part] = []
    for stride, size in runs:
        covered = 1
        for at, dim in enumerate(inside):
            start = places[at]
            if start is None or not isinstance(dim, int):
                continue
            low, high = max(start, stride), min(start * dim, stride * size)
            if low >= high:
                continue
            if low % start or high % low or (start * dim) % high:
                return None
            found.append(Part(at - len(after), high // low, start * dim // high, low // start))
            covered *= high // low
        if covered != size:
            return None
    return Layout(tuple(found)) if found else None


def _strides(dims: Dims) -> list[int | None]:
    """The distance between neighbours on each axis; None left of the first unknown size."""
    strides: list[int | None] = []
    step: int | None = 1
    for dim in reversed(dims):
        strides.append(step)
        step = step * dim if step is not None and isinstance(dim, int) else None
    return strides[::-1]
