"""Indices that count up: a Gather that takes every element, in order, is a Reshape.

    index[i, j, ...] = offset + i stride_0 + j stride_1 + ...

Exporters write a view with strides as a Gather on the flattened value, with indices that the graph
computes from a Range for every axis. Where the strides are those of a dense tensor of that shape
and all elements are read, the elements stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxnorm.facts import AnyValue
from onnxnorm.module import Node
from onnxnorm.sizes import Sizes, factors, product

_DEEP = 16  # nodes between a Range and the Gather
_LARGEST = 1 << 20  # entries of a constant


@dataclass(frozen=True)
class _Grid:
    offset: int
    strides: tuple[int, ...]  # one for each axis, 0 where the entries are the same


def reshapes(node: Node, sizes: Sizes) -> bool:
    """Whether a node is a Gather whose indices count from 0 to the end of what it picks from."""
    if node.op != "Gather" or node.domain or node.parametric or len(node.inputs) != 2:
        return False
    data, shape = sizes.of(node.inputs[0]), sizes.of(node.inputs[1])
    grid = _grid(node.inputs[1], sizes, 0) if data and shape is not None else None
    if grid is None or not data or shape is None or grid.offset != 0:
        return False
    step = 1
    for at in reversed(range(len(shape))):
        size = shape[at]
        if size == 1:
            continue
        if grid.strides[at] != step:
            return False
        if not isinstance(size, int):
            if any(n != 1 for n in shape[:at]):
                return False
            break
        step *= size
    axis = int(node.attrs.get("axis", 0))
    return product(*factors(shape)) == data[axis]


def _grid(value: AnyValue, sizes: Sizes, depth: int) -> _Grid | None:
    constant, dims = sizes.facts.constant(value), sizes.of(value)
    if constant is not None:
        array = constant.array() if int(np.prod(constant.shape)) <= _LARGEST else np.zeros(0)
        return _fitted(array.astype(np.int64)) if array.dtype.kind in "iu" and array.size else None
    node = sizes.facts.producer(value)
    if node is None or node.domain or node.parametric or dims is None or depth > _DEEP:
        return None
    if node.op == "Range":
        start, step = (sizes.integers(node.inputs[at]) for at in (0, 2))
        return _Grid(start[0], (step[0],)) if start and step else None
    given = [_grid(v, sizes, depth + 1) for v in node.inputs[: 2 if node.op in _BOTH else 1]]
    if any(g is None for g in given):
        return None
    known = [g for g in given if g is not None]
    if node.op in ("Identity", "Cast"):
        return known[0]
    if node.op == "Unsqueeze":
        axes = sizes.listed(node, 1, "axes")
        if axes is None:
            return None
        new = {a % len(dims) for a in axes}
        old = iter(known[0].strides)
        return _Grid(known[0].offset, tuple(0 if a in new else next(old) for a in range(len(dims))))
    if node.op == "Add":
        padded = [(0,) * (len(dims) - len(g.strides)) + g.strides for g in known]
        # What is repeated along an axis has the stride 0 there.
        sums = tuple(sum(strides) for strides in zip(*padded, strict=True))
        return _Grid(sum(g.offset for g in known), sums)
    if node.op == "Mul":
        for one, other in (known, known[::-1]):
            if not any(one.strides):
                strides = (0,) * (len(dims) - len(other.strides)) + other.strides
                return _Grid(
                    one.offset * other.offset, tuple(one.offset * stride for stride in strides)
                )
    return None


_BOTH = ("Add", "Mul")


def _fitted(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> _Grid | None:
    """A constant as a grid; None where it is none."""
    offset = int(array.flat[0])
    strides = tuple(
        int(array[(0,) * axis + (1,) + (0,) * (array.ndim - axis - 1)]) - offset if size > 1 else 0
        for axis, size in enumerate(array.shape)
    )
    steps = np.indices(array.shape)
    made = offset + sum((s * at for s, at in zip(strides, steps, strict=True)), np.zeros((), int))
    return (
        _Grid(offset, strides)
        if np.array_equal(array, np.broadcast_to(made, array.shape))
        else None
    )
