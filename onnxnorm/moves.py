"""What operators of one tensor do to an affine map of it: one row of a table for each.

    f(s x + t) = s' f(x) + t'        s' and t' are s and t moved as the entries of x are

A row says how the vectors move, in both directions; whether only an increasing map passes, as
through a maximum; and why a shift does not pass, where it does not. Every row follows from the
operator's definition in the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxnorm.affine import Affine, Vector, aligned, extent, reshaped, varies
from onnxnorm.facts import AnyValue, Constant
from onnxnorm.module import Node
from onnxnorm.port import is_real, pads
from onnxnorm.transfer import Transfer


class Halt(Exception):
    """A node that a map does not pass; the message is a clause that tells of the node.

    Attributes:
        shift: Whether the same map without its shift may pass.
    """

    def __init__(self, why: str, *, shift: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.shift = shift


@dataclass(frozen=True)
class Way:
    """A direction through a node.

    Attributes:
        forth: From its input to an output; else from the output to the input.
        output: Which output.
        neutral: The number that changes nothing: 1 in a scale, 0 in a shift.
    """

    forth: bool
    output: int = 0
    neutral: float = 0.0


_Mover: TypeAlias = "Callable[[Transfer, Node, Vector, Way], Vector]"
_Reason: TypeAlias = "Callable[[Transfer, Node], str]"


def _anything(t: Transfer, node: Node) -> str:
    return ""


@dataclass(frozen=True)
class Move:
    """One row.

    Attributes:
        through: Where the entries of a vector go; raises `Halt` where they cannot be followed.
        positive: Whether every factor must be positive.
        shift: Why a shift does not pass; "" where it does.
        sign: The factor of a shift.
    """

    through: _Mover
    positive: bool = False
    shift: _Reason = _anything
    sign: float = 1.0


def moved(t: Transfer, node: Node, affine: Affine, *, forth: bool, output: int = 0) -> Affine:
    """The map on the other side of a node of the table.

    Raises:
        Halt: It does not pass.
    """
    row = MOVES[node.op]
    if node.parametric:
        raise Halt("has a parameter of the function")
    if row.positive and not affine.positive:
        raise Halt("passes only factors that are positive")
    if affine.shifts and (why := row.shift(t, node)):
        raise Halt(why, shift=True)
    try:
        found = affine.moved(lambda v, one: row.through(t, node, v, Way(forth, output, one)))
    except (IndexError, TypeError, ValueError):  # inputs or attributes that its schema forbids
        raise Halt("is not as its operator is defined") from None
    return found if row.sign == 1.0 else Affine.of(found.scale, row.sign * found.shift)


# ** where entries go **


def _same(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    return v


def _cast(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    """The map is computed on the other side of the cast: it must not be in a narrower type."""
    given, made = (t.facts.type(x) for x in (node.inputs[0], node.outputs[0]))
    if given is None or made is None or not {given.element, made.element} <= _WIDTH.keys():
        raise Halt("converts from or to a type that is not real or not known")
    ends = (given, made) if way.forth else (made, given)
    now, then = (_WIDTH[k.element] for k in ends)
    if any(b < a for a, b in zip(now, then, strict=True)):
        raise Halt("leaves a narrower type to compute it in")
    return v


# digits, and bits of the exponent
_WIDTH: Final[dict[int, tuple[int, int]]] = {
    TensorProto.FLOAT: (24, 8),
    TensorProto.FLOAT16: (11, 5),
    TensorProto.BFLOAT16: (8, 8),
    TensorProto.DOUBLE: (53, 11),
}


def _transpose(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    if v.size == 1:
        return v
    rank = _rank(t, node.inputs[0])
    perm = [int(a) for a in node.attrs.get("perm", range(rank)[::-1])]
    return aligned(v, rank).transpose(perm if way.forth else np.argsort(perm))


def _reshape(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    if v.size == 1:
        return v
    before, after = t.sizes.of(node.inputs[0]), t.sizes.of(node.outputs[0])
    if before is None or after is None:
        raise Halt("has an unknown shape")
    found = reshaped(v, before, after) if way.forth else reshaped(v, after, before)
    if found is None:
        raise Halt("mixes the channels with another axis")
    return found


def _window(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    """Pools: over all axes but the first two."""
    return _outside(t, node, v, range(2, _rank(t, node.inputs[0]))) if v.size > 1 else v


def _outside(t: Transfer, node: Node, v: Vector, axes: Sequence[int] | None) -> Vector:
    """The vector where it is constant along these axes of the input."""
    if v.size == 1:
        return v
    given = None if axes is None else t.from_right(node.inputs[0], axes)
    if given is None:
        raise Halt("acts along axes that are not known")
    if set(given) & set(varies(v)):
        raise Halt("acts along the channels")
    return v


def _reduce(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    if v.size == 1:
        return v
    rank, axes = _rank(t, node.inputs[0]), t.numbers(node, 1, "axes")
    if axes is None:
        raise Halt("reduces axes that are not known")
    reduced = tuple(sorted(a % rank for a in axes))
    if node.attrs.get("keepdims", 1):
        return _outside(t, node, v, reduced)
    if not way.forth:
        kept = [a for a in range(rank) if a not in reduced]
        return np.expand_dims(aligned(v, len(kept)), reduced)
    _outside(t, node, v, reduced)
    return np.squeeze(aligned(v, rank), reduced)


def _resize(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    extrapolates = node.text("coordinate_transformation_mode") == "tf_crop_and_resize"
    if extrapolates and float(node.attrs.get("extrapolation_value", 0.0)) != 0.0:
        raise Halt("fills in a value of its own")
    for axis in varies(v):
        sizes = [t.sizes.dim(x, axis) for x in (node.inputs[0], node.outputs[0])]
        if sizes != [v.shape[axis]] * 2:
            raise Halt("resizes the channels")
    return v


def _slice(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    alone = way.forth or len(t.facts.uses(node.inputs[0])) == 1
    if v.size == 1 and alone:
        return v
    starts, ends = t.numbers(node, 1, "starts"), t.numbers(node, 2, "ends")
    given, steps = t.cut_axes(node), t.numbers(node, 4)
    if given is None:
        raise Halt("cuts a part out of axes that are not known")
    for at, axis in enumerate(given):
        if axis not in varies(v) and alone:
            continue
        size = t.sizes.dim(node.inputs[0], axis)
        if starts is None or ends is None or not isinstance(size, int):
            raise Halt("cuts a part out of the channels that is not known")
        if steps is None and len(node.inputs) > 4 and node.inputs[4].name:
            raise Halt("cuts the channels by steps that are not known")
        step = 1 if steps is None else steps[at]
        chosen = np.arange(size)[starts[at] : ends[at] : step]
        v = aligned(v, -axis)
        if not way.forth and v.shape[axis] == 1:
            v = np.repeat(v, len(chosen), axis)
        v = _picked(v, axis, size, chosen, way)
    return v


def _picked(
    v: Vector, axis: int, size: int, indices: NDArray[np.signedinteger], way: Way
) -> Vector:
    """The entries of some channels; or those, and neutral ones for all others."""
    if way.forth:
        return v.take(indices, axis)
    if len(set(indices.tolist())) < len(indices):
        raise Halt("repeats channels")
    shape = list(v.shape)
    shape[axis] = size
    wide = np.full(shape, way.neutral)
    place: list[Any] = [slice(None)] * v.ndim
    place[axis] = indices
    wide[tuple(place)] = v
    return wide


def _gather(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    # Where others read the data too, only what is picked may change.
    alone = way.forth or len(t.facts.uses(node.inputs[0])) == 1
    if v.size == 1 and alone:
        return v
    rank, picked = _rank(t, node.inputs[0]), _rank(t, node.inputs[1])
    axis = int(node.attrs.get("axis", 0)) % rank
    made = rank + picked - 1
    full = aligned(v, rank if way.forth else made)
    along = (axis,) if way.forth else tuple(range(axis, axis + picked))
    if alone and all(full.shape[a] == 1 for a in along):
        without = np.squeeze(full, along)
        return np.expand_dims(without, tuple(range(axis, axis + picked)) if way.forth else axis)
    indices = t.facts.constant(node.inputs[1])
    size = t.sizes.dim(node.inputs[0], axis - rank)
    if indices is None or picked > 1 or not isinstance(size, int) or (way.forth and not picked):
        raise Halt("picks single channels")
    if picked == 0:
        full = np.expand_dims(full, axis)
    chosen = np.asarray(indices.array()).reshape(-1) % size
    if not way.forth and full.shape[axis] == 1:
        full = np.repeat(full, len(chosen), axis)
    return _picked(full, axis - full.ndim, size, chosen, way)


def _split(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    if way.forth and v.size == 1:
        return v
    given = t.from_right(node.inputs[0], [int(node.attrs.get("axis", 0))])
    if given is None:
        raise Halt("splits an axis that is not known")
    if way.forth and extent(v, given[0]) == 1:
        return v
    sizes = [t.sizes.dim(x, given[0]) for x in node.outputs]
    total = t.sizes.dim(node.inputs[0], given[0])
    known = [n for n in sizes if isinstance(n, int)]
    if len(known) < len(sizes) or not isinstance(total, int) or sum(known) != total:
        raise Halt("splits the channels in an unknown way")
    start = sum(known[: way.output])
    indices = np.arange(start, start + known[way.output])
    if way.forth:
        return v.take(indices, given[0])
    # The other outputs stay what they are.
    wide = aligned(v, -given[0])
    shape = [*wide.shape]
    shape[given[0]] = len(indices)
    return _picked(np.broadcast_to(wide, shape), given[0], total, indices, way)


def _pad(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    if v.size == 1:
        return v
    padded = t.padded_axes(node)
    if isinstance(padded, str):
        raise Halt(padded)
    return _outside(t, node, v, padded)


def _repeat(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    for axis in varies(v):
        if t.sizes.dim(node.inputs[0], axis) != v.shape[axis]:
            raise Halt("repeats one value for every channel")
        if t.sizes.dim(node.outputs[0], axis) != v.shape[axis]:
            raise Halt("repeats the channels")
    return v


def _blocks(t: Transfer, node: Node, v: Vector, way: Way) -> Vector:
    """DepthToSpace, and SpaceToDepth, which is its inverse in the mode DCR."""
    if v.size == 1:
        return v
    full = aligned(v, 4)
    if varies(v) != (-3,) or v.ndim > 3:
        raise Halt("moves pixels, and not whole channels")
    block = int(node.attrs["blocksize"]) ** 2
    first = node.op == "SpaceToDepth" or node.text("mode", "DCR") == "DCR"
    channels = full.reshape(-1)
    if way.forth == (node.op == "SpaceToDepth"):  # each channel becomes a block of channels
        spread = np.tile(channels, block) if first else np.repeat(channels, block)
        return spread.reshape(-1, 1, 1)
    cut = channels.reshape(block, -1) if first else channels.reshape(-1, block).T
    if not (cut == cut[0]).all():
        raise Halt("puts channels with different factors into one")
    return np.asarray(cut[0]).reshape(-1, 1, 1)


def _rank(t: Transfer, value: AnyValue) -> int:
    rank = t.rank(value)
    if rank is None:
        raise Halt("has an unknown shape")
    return rank


# ** why a shift does not pass **


def _clips(t: Transfer, node: Node) -> str:
    return "bends at zero, which a shift would move"


def _sums(t: Transfer, node: Node) -> str:
    return "adds up a shift as often as it adds"


def _counts_padding(t: Transfer, node: Node) -> str:
    if pads(node) and node.attrs.get("count_include_pad", 0):
        return "averages with zeros that it pads"
    return "averages windows that stick out" if node.attrs.get("ceil_mode", 0) else ""


def _extrapolates(t: Transfer, node: Node) -> str:
    crops = node.text("coordinate_transformation_mode") == "tf_crop_and_resize"
    return "fills in a value of its own" if crops else ""


def _drops(t: Transfer, node: Node) -> str:
    mode = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    constant = None if mode is None else t.facts.constant(mode)
    trains = mode is not None and (constant is None or bool(np.any(constant.array())))
    old = node.scope.opsets[""] < 7 and not node.attrs.get("is_test", 0)
    return "drops entries at random" if trains or old else ""


def padding(t: Transfer, node: Node) -> Constant | float | None:
    """What a Pad fills in; None where it repeats its input.

    Raises:
        Halt: It is not known.
    """
    if node.parameter("mode", "value"):
        raise Halt("has a parameter of the function")
    if node.text("mode", "constant") != "constant":
        return None
    if len(node.inputs) > 2 and node.inputs[2].name:
        constant = t.facts.constant(node.inputs[2])
        if constant is None or not is_real(constant.dtype) or math.prod(constant.shape) != 1:
            raise Halt("pads with a value that is not constant")
        return constant
    return float(node.attrs.get("value", 0.0))


MOVES: Final[dict[str, Move]] = {
    "Identity": Move(_same),
    "Neg": Move(_same, sign=-1.0),
    "Cast": Move(_cast),
    "CastLike": Move(_cast),
    "Dropout": Move(_same, shift=_drops),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), Move(_reshape)),
    "Transpose": Move(_transpose),
    "Slice": Move(_slice),
    "Gather": Move(_gather),
    "Split": Move(_split),
    "Pad": Move(_pad),
    "Expand": Move(_repeat),
    "Tile": Move(_repeat),
    **dict.fromkeys(("Resize", "Upsample"), Move(_resize, shift=_extrapolates)),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), Move(_blocks)),
    "AveragePool": Move(_window, shift=_counts_padding),
    "GlobalAveragePool": Move(_window),
    **dict.fromkeys(("GlobalMaxPool", "MaxPool"), Move(_window, positive=True)),
    "ReduceMean": Move(_reduce),
    "ReduceSum": Move(_reduce, shift=_sums),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), Move(_reduce, positive=True)),
    **dict.fromkeys(("LeakyRelu", "PRelu", "Relu"), Move(_same, positive=True, shift=_clips)),
    "Abs": Move(_same, positive=True, shift=_clips),
}
