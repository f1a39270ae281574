"""What becomes of the constants of a site: c -> scale * c + shift, formed in float64, rounded once.

Every check on a changed constant is here: that its type can hold the result, and how much a copy
of one that others read too takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.port import Slot, filled_bias, magnitude, rounded, row_blocks
from onnxnorm.rewrite import Refusal, Rewriter
from onnxnorm.storage import Array

Vector = NDArray[np.float64]
Inputs: TypeAlias = "dict[tuple[Node, int], AnyValue]"

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
        """The new constant, larger than the old one where the map varies and that does not."""
        if self.constant is None:
            assert self.shift is not None, "an empty input is filled with a shift"
            return rounded(self.shift, self.dtype)
        return changed(self.constant.array(), self.scale, self.shift, self.dtype)

    def misfit(self) -> str | None:
        """What the type cannot hold of the result, as a clause; None where it holds it.

        Every entry must be finite. The largest of a weight must be zero or a normal number: where
        all are smaller they lose digits.
        """
        role = "bias" if self.bias or self.constant is None else "weight"
        old = np.zeros((), self.dtype) if self.constant is None else self.constant.array()
        if self._surely_fits(old, role):
            return None
        most = 0.0
        for _, result in results(old, self.scale, self.shift):
            if not np.isfinite(rounded(result, self.dtype).astype(np.float64)).all():
                return f"the folded {role} is not finite in {self.dtype}"
            most = max(most, float(np.abs(result).max(initial=0.0)))
        if role == "weight" and 0.0 < most < float(_finfo(self.dtype).smallest_normal):
            return f"the folded weight is too small for {self.dtype}, {most:.1e} at most"
        return None

    def _surely_fits(self, old: Array, role: str) -> bool:
        """Whether the extremes of both factors say that it fits, so that no product has to."""
        if not old.size or not self.scale.size:
            return False
        info, factors = _finfo(self.dtype), np.abs(self.scale)
        most = magnitude(old)
        shift = 0.0 if self.shift is None else float(np.abs(self.shift).max(initial=0.0))
        # Half of the range leaves room for the rounding; a NaN is in no range.
        if not float(factors.max()) * most + shift <= float(info.max) / 2:
            return False
        if role == "bias":
            return True
        return self.shift is None and float(factors.min()) * most >= 2 * float(info.smallest_normal)

    @property
    def nbytes(self) -> int:
        """Bytes of the new constant."""
        old = () if self.constant is None else self.constant.shape
        shift = () if self.shift is None else self.shift.shape
        shape = np.broadcast_shapes(old, self.scale.shape, shift)
        return int(np.prod(shape)) * np.dtype(self.dtype).itemsize

    @property
    def key(self) -> tuple[object, ...] | None:
        """What makes two changes give the same constant; None where there was none before."""
        if self.constant is None:
            return None
        shift = None if self.shift is None else (self.shift.tobytes(), self.shift.shape)
        scale = (self.scale.tobytes(), self.scale.shape)
        return (self.constant.source, self.node.scope, str(self.dtype), scale, shift)


def absorbed(
    node: Node, found: tuple[Slot, ...], scale: Vector, shift: Vector | None
) -> tuple[list[Change], bool] | str:
    """What becomes of a linear operator f so that it computes scale * f(x) + shift.

    Args:
        node: The operator.
        found: Its constants, as `port.slots` gives them.
        scale: One factor for each feature.
        shift: One addend for each feature; None for none.

    Returns:
        The changes, and whether the shift has a place among them; a MatMul has none. Otherwise a
        clause that says why not.
    """
    first, width = found[0], scale.size
    changes = [Change(node, first.index, first.constant, first.constant.dtype, first.spread(scale))]
    biases = [slot for slot in found if slot.bias]
    if not biases and len(node.inputs) > 2 and node.inputs[2].name:
        return f"adds '{node.inputs[2].name}', which is computed"
    for slot in biases:
        name, shape = slot.constant.name, slot.constant.shape
        alike = slot.features() == 1 and int(np.prod(shape)) == 1
        if slot.features() != width and not alike:
            return f"takes '{name}' of shape {list(shape)}, which is not one per feature"
        if shift is not None and slot.gain == 0.0:
            return "takes its bias times 0"
        added = None if shift is None else slot.spread(shift) / slot.gain
        factors, dtype = slot.spread(scale), slot.constant.dtype
        changes.append(Change(node, slot.index, slot.constant, dtype, factors, added, bias=True))
    placed = shift is None or bool(biases)
    if shift is not None and not placed and node.op != "MatMul":
        filled = filled_bias(node, first, shift)
        if isinstance(filled, str):
            return filled
        dtype = first.constant.dtype
        changes.append(Change(node, 2, None, dtype, np.ones(()), filled, bias=True))
        placed = True
    return [c for c in changes if c.shift is not None or bool((c.scale != 1.0).any())], placed


def copied(changes: Iterable[Change], facts: Facts) -> tuple[int, Change | None]:
    """By how many bytes a model grows, and a change of the largest constant that does it.

    It grows where others read a constant too, and where a constant varies then and did not before.
    """
    read: dict[AnyValue, list[Change]] = {}
    for change in changes:
        if change.constant is not None:
            read.setdefault(change.constant.source, []).append(change)
    total, most = 0, 0
    largest: Change | None = None
    for found in read.values():
        constant = found[0].constant
        assert constant is not None, "only those are in the table"
        kinds = {c.key: c for c in found}
        stays = facts.readers(constant) > len({(c.node, c.index) for c in found})
        size = sum(c.nbytes for c in kinds.values()) - (0 if stays else constant.nbytes)
        total += size
        if size > most:
            most, largest = size, found[0]
    return total, largest


def oversized(
    changes: Iterable[Change], facts: Facts, most_mb: float, rule: str, root: Node
) -> Refusal | None:
    """The refusal of copies of shared constants that take more than a pass allows, if they do.

    Args:
        changes: All changes of a site.
        facts: What is true of the graph.
        most_mb: The option `max_copy_mb` of the pass.
        rule: The name of the pass.
        root: The root of the place.
    """
    size, largest = copied(changes, facts)
    if size <= most_mb * 1_000_000 or largest is None:
        return None
    assert largest.constant is not None, "only those are copied"
    reason = f"'{largest.constant.name}' has other readers and a copy takes {size / 1e6:.0f} MB"
    return Refusal(reason, largest.node.label, f"Raise {rule}{{max_copy_mb=...}}.", root)


def stage(changes: Iterable[Change], rw: Rewriter, names: dict[Node, str]) -> Inputs:
    """Stage the new constants; what each changed input reads from now on.

    Args:
        changes: The changes.
        rw: Where to.
        names: What the constants of a node are named after, where not after its result.
    """
    made: dict[tuple[object, ...], AnyValue] = {}
    inputs: Inputs = {}
    for change in changes:
        key = None if change.node.scope.is_function else change.key
        if key is None or key not in made:
            role = "bias" if change.bias or change.constant is None else "weight"
            name = f"{names.get(change.node, change.node.outputs[0].name)}_{role}"
            value = rw.constant(role, change.array(), at=change.node, name=name)
            if key is None:
                inputs[change.node, change.index] = value
                continue
            made[key] = value
        inputs[change.node, change.index] = made[key]
    return inputs


def results(old: Array, scale: Vector, shift: Vector | None) -> Iterator[tuple[Any, Vector]]:
    """What scale * old + shift is in float64, in runs of rows whose copies are small."""
    shape = _shape(old, scale, shift)
    if shape != old.shape or not shape:
        yield ..., _applied(old.astype(np.float64), scale, shift)
        return
    scale = scale.reshape((1,) * (old.ndim - scale.ndim) + scale.shape)
    if shift is not None:
        shift = shift.reshape((1,) * (old.ndim - shift.ndim) + shift.shape)
    for rows in row_blocks(old):
        factors = scale if scale.shape[0] == 1 else scale[rows]
        added = shift if shift is None or shift.shape[0] == 1 else shift[rows]
        yield rows, _applied(old[rows].astype(np.float64), factors, added)


def changed(old: Array, scale: Vector, shift: Vector | None, dtype: np.dtype[Any]) -> Array:
    """What scale * old + shift is: formed in float64, rounded once."""
    out = np.empty(_shape(old, scale, shift), dtype)
    for rows, result in results(old, scale, shift):
        out[rows] = rounded(result, dtype)
    return out


def _applied(array: Vector, scale: Vector, shift: Vector | None) -> Vector:
    with np.errstate(over="ignore", invalid="ignore"):  # misfits look at every result
        moved: Vector = array * scale
        return moved if shift is None else moved + shift


def _shape(old: Array, scale: Vector, shift: Vector | None) -> tuple[int, ...]:
    return np.broadcast_shapes(old.shape, scale.shape, () if shift is None else shift.shape)
