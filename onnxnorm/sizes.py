"""Sizes of axes, with names for those that are unknown, also behind shapes computed in the graph.

Shape inference gives up at a Reshape whose target is put together from `Shape`, `Gather`, `Concat`
and arithmetic, as exporters write it. The features of a stream have a known size; what has to be
known to follow them is which of the other axes stays the same. So one walk over the graph keeps,
for every value, its sizes, and for small integer tensors also their entries: numbers, or the names
of unknown sizes. A size that is a product is spelled as one, `2*batch`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts, Type
from onnxnorm.layout import Dim, Dims
from onnxnorm.module import Node

Entries: TypeAlias = NDArray[np.object_]  # of int, or str for an unknown size

_SMALL: Final = 64  # entries; shapes and lists of pads are not longer
_TELLING: Final = frozenset({"Reshape", "Split"})  # whose rules say more than the first result
_SAME: Final = "same"
_KEPT: Final = "kept"
_FRESH: Final = "?"  # begins the names of sizes that nobody named
_INVENTED: Final = (_FRESH, "unk__")  # the latter begins those of onnx's own inference
_UNSURE: Final = "?!"  # and of integers that may be negative, as a -1 in the target of a Reshape


def find_sizes(facts: Facts) -> Sizes:
    """The sizes of a graph's values, which hold as long as the facts do and are derived once."""
    found: Sizes | None = facts.kept.get("sizes")
    if found is None:
        found = facts.kept["sizes"] = Sizes(facts)
    return found


def derived_sizes(facts: Facts) -> Sizes:
    """The sizes that follow from inputs and weights alone, whatever a file states of the rest.

    A tool that made an input dynamic may have left the shapes of the fixed size behind; what is
    computed before the model runs must not believe them.
    """
    return find_sizes(facts.unstated)


class Sizes:
    """The sizes of a graph's values.

    Args:
        facts: What is true of the graph; its inferred types are refined here.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._dims: dict[AnyValue, Dims | None] = {}
        self._entries: dict[AnyValue, Entries] = {}
        # Of values whose rank is not known: a value, and whether they have its shape, or the same
        # with some axes at 1, or without these axes.
        self._kin: dict[AnyValue, tuple[AnyValue, str | tuple[int, ...]]] = {}
        self._axes: dict[tuple[AnyValue, int], Dim] = {}
        self._computed: dict[tuple[Dim, ...], Dim] = {}
        self._same: dict[str, str] = {}  # a name -> another name of the same size
        self._renames: dict[str, Dim] = {}  # what that makes of a size
        self._cut: dict[str, Dim] = {}  # the smaller of a number and a size -> that size
        self._numbers = itertools.count()
        for scope in facts.module.scopes:
            for node in facts.in_order(scope):
                self._visit(node)

    def of(self, value: AnyValue) -> Dims | None:
        """The sizes of a value, unknown ones by a name of their own; None for an unknown rank."""
        dims = self._dims[value] if value in self._dims else self.settle(value, None)
        if self._same and dims is not None:
            return tuple(self._renamed(d) for d in dims)
        return dims

    def axis(self, value: AnyValue, axis: int) -> Dim:
        """The size of one axis, also of a value whose rank is not known: there it has a name."""
        dims = self.of(value)
        if dims is not None:
            return dims[axis]
        kin, how = self._kin.get(value, (value, _SAME))
        place = (kin if how == _SAME else value, axis)
        if place not in self._axes:
            self._axes[place] = self._fresh()
        return self._axes[place]

    def dim(self, value: AnyValue, axis: int) -> Dim | None:
        """The size of one axis, from the right; 1 where the value has no such axis."""
        dims = self.of(value)
        if dims is None:
            return None
        return dims[axis] if len(dims) >= -axis else 1

    def entries(self, value: AnyValue) -> Entries | None:
        """What a small integer tensor holds, as far as it is known; None where it is not one."""
        known = self._entries.get(value)
        if known is not None:
            if self._same:
                renamed = _objects([self._renamed(d) for d in known.reshape(-1).tolist()])
                return renamed.reshape(known.shape)
            return known
        constant = self.facts.constant(value)
        if constant is None or math.prod(constant.shape) > _SMALL:
            return None
        if np.dtype(constant.dtype).kind not in "iub":
            return None
        found = self._entries[value] = constant.integers
        return found

    def integers(self, value: AnyValue) -> list[int] | None:
        """The entries of an integer tensor where all are known numbers."""
        found = self.entries(value)
        if found is None:
            return None
        flat = found.reshape(-1).tolist()
        return flat if all(isinstance(n, int) for n in flat) else None

    # ** the walk **

    def _fresh(self) -> str:
        return f"{_FRESH}{next(self._numbers)}"

    def _renamed(self, dim: Dim) -> Dim:
        """A size by the first of the names that it is known by."""
        if isinstance(dim, int) or not self._same:
            return dim
        if dim not in self._renames:
            number, names = factors([dim])
            self._renames[dim] = product(number, [self._first(name) for name in names])
        return self._renames[dim]

    def _first(self, name: str) -> str:
        while name in self._same:
            name = self._same[name]
        return name

    def equate(self, before: Dims, after: Dims) -> None:
        """Learn from a Reshape that ran that both shapes have as many elements."""
        number, names = factors(self._renamed(d) for d in before)
        other, others = factors(self._renamed(d) for d in after)
        left = list((Counter(names) - Counter(others)).elements())
        right = list((Counter(others) - Counter(names)).elements())
        if number == other and len(left) == len(right) == 1:
            kept, given_up = sorted((left[0], right[0]), key=lambda n: n.startswith(_INVENTED))
            self._same[given_up] = kept
            self._renames.clear()

    def _visit(self, node: Node) -> None:
        out = node.outputs[0] if node.outputs else None
        if out is None or not out.name:
            return
        constant = self.facts.constant(out)
        if constant is not None:
            self._dims[out] = constant.shape
            return
        dims: Dims | None = None
        stated = self.facts.type(out)
        if node.inputs and node.domain == "" and not node.parametric:
            try:
                rule = _ENTRIES.get(node.op)
                found = rule(self, node) if rule is not None else None
                if found is not None and found.size <= _SMALL:
                    self._entries[out] = found
                if stated is None or not stated.is_static or node.op in _TELLING:
                    dims = self._derived(node, out)
            except (IndexError, ValueError, TypeError, ZeroDivisionError, OverflowError):
                dims = None  # a graph that shape inference would reject; nothing is known
        self._dims[out] = self._merged(stated, dims)

    def _derived(self, node: Node, out: AnyValue) -> Dims | None:
        """What an operator makes of the sizes of its inputs."""
        deriving = _DIMS.get(node.op)
        dims = deriving(self, node) if deriving is not None else None
        if dims is None and deriving in (_same, _elementwise, _reduce, _unsqueeze):
            kin = self._followed(node, deriving)
            if kin is not None:
                self._kin[out] = kin
        return dims

    def _followed(
        self, node: Node, deriving: _Dims
    ) -> tuple[AnyValue, str | tuple[int, ...]] | None:
        """Where the rank is not known: what the result has the shape of, up to reduced axes."""
        base, how = self._kin.get(node.inputs[0], (node.inputs[0], _SAME))
        if deriving is _reduce:
            axes = self.listed(node, 1, "axes")
            if how != _SAME or not axes:
                return None
            return base, _KEPT if node.attrs.get("keepdims", 1) else tuple(sorted(axes))
        if deriving is _unsqueeze:
            axes = self.listed(node, 1, "axes")
            return (base, _KEPT) if axes and how == tuple(sorted(axes)) else None
        large = [v for v in node.inputs if self.of(v) not in ((), (1,))]
        kin = {self._kin.get(v, (v, _SAME)) for v in large}
        hows = {how for _, how in kin}
        if len({base for base, _ in kin}) != 1 or not (len(hows) == 1 or hows == {_SAME, _KEPT}):
            return None
        return next(iter(kin))[0], _SAME if _SAME in hows else hows.pop()

    def settle(self, value: AnyValue, derived: Dims | None) -> Dims | None:
        """Hold the sizes of a value: what shape inference says, and what is derived beyond it."""
        constant = self.facts.constant(value)
        if constant is None:
            self._dims[value] = self._merged(self.facts.type(value), derived)
        else:
            self._dims[value] = constant.shape
        return self._dims[value]

    def _merged(self, known: Type | None, derived: Dims | None) -> Dims | None:
        stated = None if known is None else known.shape
        if stated is None:
            return derived
        if derived is not None and len(derived) != len(stated):
            derived = None
        merged: list[Dim] = []
        for at, dim in enumerate(stated):
            other = derived[at] if derived is not None else None
            if isinstance(dim, str) and dim.startswith(_FRESH):
                dim = None  # no name: exporters write it for anything that they do not know
            if isinstance(dim, int):
                merged.append(dim)
            elif isinstance(other, int):
                merged.append(other)
            elif dim is None or dim.startswith("unk__"):
                merged.append(other or dim or self._fresh())
            else:
                # A name that follows from the inputs also says which other sizes are the same.
                merged.append(dim if other is None or _FRESH in other else other)
        return tuple(merged)

    def given(self, node: Node, index: int) -> Dims | None:
        """The sizes of an input; None where it is absent."""
        if len(node.inputs) <= index or not node.inputs[index].name:
            return None
        return self.of(node.inputs[index])

    def listed(self, node: Node, index: int, name: str) -> list[int] | None:
        """A list of integers that is an input, or an attribute in older opsets."""
        if name in node.attrs and node.parameter(name) is None:
            stated = node.attrs[name]
            return [int(n) for n in (stated if isinstance(stated, list) else [stated])]
        if len(node.inputs) <= index or not node.inputs[index].name:
            return None
        return self.integers(node.inputs[index])

    def broadcast(self, given: Sequence[Dims | None]) -> Dims | None:
        """The sizes of an elementwise result."""
        if any(g is None for g in given):
            return None
        known = [g for g in given if g is not None]
        dims: list[Dim] = []
        for axis in range(-max(map(len, known), default=0), 0):
            here = {g[axis] for g in known if len(g) >= -axis} - {1}
            # What fits to a size and is no larger is that size, or 1.
            here -= {d for d in here if isinstance(d, str) and self._cut.get(d) in here}
            sizes = [d for d in here if isinstance(d, int)]
            if sizes or len(here) <= 1:
                dims.append(sizes[0] if sizes else next(iter(here), 1))
            else:
                dims.append(self._fresh())
        return tuple(dims)

    def rest(self, before: Dims, others: Sequence[Dim]) -> Dim:
        """The size that makes both products equal."""
        total, names = factors(before)
        taken, others_named = factors(others)
        for name in others_named:
            if name not in names:
                return self._fresh()
            names.remove(name)
        if not taken or total % taken:
            return self._fresh()
        return product(total // taken, names)

    def some(self, count: int) -> Dims:
        """Sizes of which nothing is known."""
        return tuple(self._fresh() for _ in range(count))

    def cut(self, number: int, size: str) -> str:
        """The smaller of a positive number and a size."""
        name = self._fresh()
        if number > 0:
            self._cut[name] = size
        return name

    def unsure(self) -> str:
        """An integer of which nothing is known, not even that it is a size."""
        return f"{_UNSURE}{next(self._numbers)}"

    def computed(self, op: str, *given: Dim) -> Dim:
        """The result of an operator on integers: the same name for the same operands."""
        place = (op, *given)
        if place not in self._computed:
            sure = op != "Sub" and all(map(is_size, given))
            self._computed[place] = self._fresh() if sure else self.unsure()
        return self._computed[place]


def is_size(dim: Dim) -> bool:
    """Whether a number or a name is known to stand for a size, which is never negative."""
    return dim >= 0 if isinstance(dim, int) else _UNSURE not in dim


def told(dim: Dim) -> str:
    """How a sentence names a size: as the file does, in brackets; "" where no one named it."""
    # Names of our own and of onnx's inference are in nobody's file; sizes may be products of some.
    named = isinstance(dim, str) and not any(mark in dim for mark in _INVENTED)
    return f" ('{dim}')" if named else ""


def factors(dims: Iterable[Dim]) -> tuple[int, list[str]]:
    """A product of sizes as a number and the names in it."""
    number, names = 1, list[str]()
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        elif _PRODUCT.fullmatch(dim):
            for factor in dim.split("*"):
                if factor.isdigit():
                    number *= int(factor)
                else:
                    names.append(factor)
        else:
            names.append(dim)
    return number, names


def product(number: int, names: Sequence[str]) -> Dim:
    """The size that is a number times named sizes, always spelled in the same way."""
    if not names or number == 0:
        return number
    parts = [*([str(number)] if number != 1 else []), *sorted(names)]
    return "*".join(parts)


_PRODUCT: Final = re.compile(r"[\w?!]+(\*[\w?!]+)+")


# ** sizes of results **

_Dims: TypeAlias = "Callable[[Sizes, Node], Dims | None]"


def _same(s: Sizes, node: Node) -> Dims | None:
    return s.given(node, 0)


def _elementwise(s: Sizes, node: Node) -> Dims | None:
    return s.broadcast([s.given(node, i) for i in range(len(node.inputs))])


def _matmul(s: Sizes, node: Node) -> Dims | None:
    left, right = s.given(node, 0), s.given(node, 1)
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    batch = s.broadcast([left[:-2], right[:-2]])
    return None if batch is None else (*batch, left[-2], right[-1])


def _gemm(s: Sizes, node: Node) -> Dims | None:
    left, right = s.given(node, 0), s.given(node, 1)
    if left is None or right is None:
        return None
    return left[1 if node.attrs.get("transA", 0) else 0], right[
        0 if node.attrs.get("transB", 0) else 1
    ]


def _conv(s: Sizes, node: Node) -> Dims | None:
    data, weight = s.given(node, 0), s.given(node, 1)
    if weight is None:
        return None
    if data is None or len(data) != len(weight):
        return (s.some(1)[0], weight[0], *s.some(len(weight) - 2))
    return (data[0], weight[0], *_windows(s, node, data[2:], weight[2:]))


def _windows(s: Sizes, node: Node, dims: Dims, kernel: Sequence[Dim]) -> Dims:
    """How many windows fit into each axis: floor((n + pads - dilation (k - 1) - 1) / stride) + 1.

    An unknown size that stays is the same, and windows of one kind on one size make one size.
    """
    padding, count = node.text("auto_pad") or "NOTSET", len(dims)
    if len(kernel) != count or node.attrs.get("ceil_mode", 0):
        return s.some(count)
    strides = node.attrs.get("strides") or [1] * count
    dilations = node.attrs.get("dilations") or [1] * count
    pads = node.attrs.get("pads") if padding == "NOTSET" else None
    pads = pads or [0] * 2 * count
    found: list[Dim] = []
    for at, (dim, size) in enumerate(zip(dims, kernel, strict=True)):
        stride, less = int(strides[at]), 0  # what the axis is shorter by at stride 1
        if not padding.startswith("SAME"):
            if not isinstance(size, int):
                found += s.some(1)
                continue
            less = int(dilations[at]) * (size - 1) - int(pads[at]) - int(pads[at + count])
        if less == 0 and stride == 1:
            found.append(dim)
        elif not isinstance(dim, int):
            found.append(s.computed(f"Window {less}", dim, stride))
        else:
            found += [(dim - less - 1) // stride + 1] if dim > less else s.some(1)
    return tuple(found)


def _conv_transpose(s: Sizes, node: Node) -> Dims | None:
    data, weight = s.given(node, 0), s.given(node, 1)
    if data is None or weight is None or len(data) != len(weight):
        return None
    if not isinstance(weight[1], int):
        return None
    channels, count = weight[1] * int(node.attrs.get("group", 1)), len(data) - 2
    if node.text("auto_pad") not in ("", "NOTSET") or "output_shape" in node.attrs:
        return (data[0], channels, *s.some(count))
    strides = node.attrs.get("strides") or [1] * count
    dilations = node.attrs.get("dilations") or [1] * count
    pads = node.attrs.get("pads") or [0] * 2 * count
    added = node.attrs.get("output_padding") or [0] * count
    found: list[Dim] = []
    for at, (dim, size) in enumerate(zip(data[2:], weight[2:], strict=True)):
        if not isinstance(size, int):
            found += s.some(1)
            continue
        more = dilations[at] * (size - 1) + 1 + added[at] - pads[at] - pads[at + count]
        more -= strides[at]
        found.append(_plus(s, _times(s, dim, strides[at]), more))
    return (data[0], channels, *found)


def _transpose(s: Sizes, node: Node) -> Dims | None:
    dims = s.given(node, 0)
    if dims is None:
        return None
    perm = node.attrs.get("perm", list(range(len(dims)))[::-1])
    return tuple(dims[i] for i in perm)


def _reshape(s: Sizes, node: Node) -> Dims | None:
    before = s.given(node, 0)
    wanted = s.entries(node.inputs[1]) if len(node.inputs) > 1 else None
    if wanted is None:
        length = s.given(node, 1)
        return s.some(length[0]) if length and isinstance(length[0], int) else None
    dims: list[Dim | None] = []
    for at, dim in enumerate(wanted.reshape(-1).tolist()):
        if dim == 0 and not node.attrs.get("allowzero", 0):
            dims.append(before[at] if before is not None else s.some(1)[0])
        elif dim == -1:
            dims.append(None)
        else:
            dims.append(dim if is_size(dim) else s.some(1)[0])
    if dims.count(None) == 1:
        known = [d for d in dims if d is not None]
        dims[dims.index(None)] = s.rest(before, known) if before is not None else s.some(1)[0]
    after = tuple(d for d in dims if d is not None)
    # What is in a body or a function may not run.
    if before is not None and node.scope is s.facts.module.main:
        s.equate(before, after)
    return after


def _flatten(s: Sizes, node: Node) -> Dims | None:
    dims = s.given(node, 0)
    if dims is None:
        return None
    axis = int(node.attrs.get("axis", 1))
    axis += len(dims) if axis < 0 else 0
    return tuple(product(*factors(side)) for side in (dims[:axis], dims[axis:]))


def _squeeze(s: Sizes, node: Node) -> Dims | None:
    dims, axes = s.given(node, 0), s.listed(node, 1, "axes")
    if dims is None:
        return None
    if axes is None:
        return None if any(isinstance(d, str) for d in dims) else tuple(d for d in dims if d != 1)
    gone = {a % len(dims) for a in axes}
    return tuple(d for at, d in enumerate(dims) if at not in gone)


def _unsqueeze(s: Sizes, node: Node) -> Dims | None:
    dims, axes = s.given(node, 0), s.listed(node, 1, "axes")
    if dims is None or axes is None:
        return None
    rank = len(dims) + len(axes)
    new = {a % rank for a in axes}
    old = iter(dims)
    return tuple(1 if at in new else next(old) for at in range(rank))


def _gather(s: Sizes, node: Node) -> Dims | None:
    data, index = s.given(node, 0), s.given(node, 1)
    if data is None or index is None:
        return None
    axis = int(node.attrs.get("axis", 0)) % len(data)
    return (*data[:axis], *index, *data[axis + 1 :])


def _slice(s: Sizes, node: Node) -> Dims | None:
    dims = s.given(node, 0)
    if dims is None:
        return None
    starts, ends = s.listed(node, 1, "starts"), s.listed(node, 2, "ends")
    axes, steps = s.listed(node, 3, "axes"), s.listed(node, 4, "steps")
    length = s.given(node, 1)
    if axes is None:
        if len(node.inputs) > 3 and node.inputs[3].name:
            return s.some(len(dims))
        count = len(starts) if starts is not None else length[0] if length else None
        axes = list(range(count)) if isinstance(count, int) else list(range(len(dims)))
    found = list(dims)
    for at, axis in enumerate(axes):
        size = dims[axis]
        start = None if starts is None else starts[at]
        end = None if ends is None else ends[at]
        step = 1 if steps is None else steps[at]
        if start == 0 and end is not None and end >= 2**31 - 1 and step == 1:
            continue
        if isinstance(size, int) and start is not None and end is not None:
            found[axis] = len(range(size)[slice(start, end, step)])
        elif isinstance(size, int) and start == 0 and step == 1 and (last := _end(s, node, at)):
            found[axis] = s.cut(size, last)
        else:
            found[axis] = s.some(1)[0]
    return tuple(found)


def _end(s: Sizes, node: Node, at: int) -> str:
    """The size at which a Slice ends; "" where it is a number or may be negative."""
    known = s.entries(node.inputs[2]) if len(node.inputs) > 2 else None
    last = None if known is None else known.reshape(-1).tolist()[at]
    return last if isinstance(last, str) and is_size(last) else ""


def _gather_nd(s: Sizes, node: Node) -> Dims | None:
    data, index = s.given(node, 0), s.given(node, 1)
    batch = int(node.attrs.get("batch_dims", 0))
    if data is None or not index or not isinstance(index[-1], int):
        return None
    return (*index[:-1], *data[batch + index[-1] :])


def _concat(s: Sizes, node: Node) -> Dims | None:
    given = [s.given(node, i) for i in range(len(node.inputs))]
    known = [g for g in given if g is not None]
    if not known:
        return None
    rank = len(known[0])
    axis = int(node.attrs.get("axis", 0)) % rank
    found = list(known[0])
    for at in range(rank):
        sizes = [g[at] for g in known]
        numbers = [d for d in sizes if isinstance(d, int)]
        if at != axis:
            found[at] = numbers[0] if numbers else sizes[0]
        else:
            found[at] = functools.reduce(functools.partial(_plus, s), sizes)
            if len(known) < len(given):
                found[at] = s.some(1)[0]
    return tuple(found)


def _split(s: Sizes, node: Node) -> Dims | None:
    dims, sizes = s.given(node, 0), s.listed(node, 1, "split")
    if dims is None:
        return None
    axis = int(node.attrs.get("axis", 0)) % len(dims)
    size = dims[axis]
    for at, value in enumerate(node.outputs):
        here: Dim = s.some(1)[0]
        if sizes is not None:
            here = sizes[at]
        elif isinstance(size, int) and size % len(node.outputs) == 0:
            here = size // len(node.outputs)
        found = (*dims[:axis], here, *dims[axis + 1 :])
        if at == 0:
            first = found
        else:
            s.settle(value, found)
    return first


def _expand(s: Sizes, node: Node) -> Dims | None:
    dims, wanted = s.given(node, 0), s.entries(node.inputs[1])
    if wanted is not None:
        return s.broadcast([dims, tuple(wanted.reshape(-1).tolist())])
    length = s.given(node, 1)
    if dims is None or not length or not isinstance(length[0], int):
        return None
    padded = (*(1,) * (length[0] - len(dims)), *dims)
    # An axis of size 1 may become anything; any other stays.
    return tuple(s.some(1)[0] if d == 1 else d for d in padded)


def _tile(s: Sizes, node: Node) -> Dims | None:
    dims = s.given(node, 0)
    wanted = s.entries(node.inputs[1])
    if dims is None:
        return None
    if wanted is None:
        return s.some(len(dims))
    repeats = wanted.reshape(-1).tolist()
    return tuple(_times(s, d, n) for d, n in zip(dims, repeats, strict=True))


def _reduce(s: Sizes, node: Node) -> Dims | None:
    dims, axes = s.given(node, 0), s.listed(node, 1, "axes")
    if dims is None:
        return None
    if axes is None:
        if len(node.inputs) > 1 and node.inputs[1].name:
            return None
        axes = list(range(len(dims)))
    gone = {a % len(dims) for a in axes}
    if node.attrs.get("keepdims", 1):
        return tuple(1 if at in gone else d for at, d in enumerate(dims))
    return tuple(d for at, d in enumerate(dims) if at not in gone)


def _pad(s: Sizes, node: Node) -> Dims | None:
    dims, pads = s.given(node, 0), s.listed(node, 1, "pads")
    if dims is None:
        return None
    if len(node.inputs) > 3 and node.inputs[3].name:
        return s.some(len(dims))
    if pads is None:
        return s.some(len(dims))
    sums = [pads[at] + pads[at + len(dims)] for at in range(len(dims))]
    return tuple(_plus(s, d, n) for d, n in zip(dims, sums, strict=True))


def _global_pool(s: Sizes, node: Node) -> Dims | None:
    dims = s.given(node, 0)
    return None if dims is None else (*dims[:2], *(1,) * (len(dims) - 2))


def _pool(s: Sizes, node: Node) -> Dims | None:
    dims = s.given(node, 0)
    kernel = node.attrs.get("kernel_shape")
    if dims is None or kernel is None:
        return None
    return (*dims[:2], *_windows(s, node, dims[2:], kernel))


def _shape_of(s: Sizes, node: Node) -> Dims | None:
    dims = s.given(node, 0)
    if dims is None:
        return None
    return (len(range(len(dims))[node.attrs.get("start", 0) : node.attrs.get("end")]),)


def _attention(s: Sizes, node: Node) -> Dims | None:
    query, value = s.given(node, 0), s.given(node, 2)
    if query is None or value is None or len(query) != len(value):
        return None
    if len(query) == 4:
        return (*query[:3], value[3])
    own, theirs = (int(node.attrs[n]) for n in ("q_num_heads", "kv_num_heads") if n in node.attrs)
    last = value[2] if own == theirs else s.some(1)[0]
    if isinstance(value[2], int):
        last = value[2] // theirs * own
    return (*query[:2], last)


def _range(s: Sizes, node: Node) -> Dims | None:
    start, limit, step = (s.entries(node.inputs[at]) for at in range(3))
    if start is None or limit is None or step is None:
        return None
    first, last, by = (n.reshape(-1)[0] for n in (start, limit, step))
    if isinstance(first, int) and isinstance(last, int) and isinstance(by, int):
        return (len(range(first, last, by)),)
    return (last,) if (first, by) == (0, 1) and is_size(last) else None


_DIMS: Final[dict[str, _Dims]] = {
    **dict.fromkeys(
        (
            "Identity", "Cast", "CastLike", "Dropout", "Neg", "Gelu", "Erf", "Relu", "Sigmoid",
            "Tanh", "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "Sqrt",
            "SimplifiedLayerNormalization", "BatchNormalization", "InstanceNormalization", "Abs",
            "GroupNormalization", "LeakyRelu", "Clip", "Exp", "Log", "Reciprocal", "HardSwish",
            "HardSigmoid", "Elu", "Selu", "Softplus", "Mish", "Swish", "Not", "ScatterND",
            "ScatterElements", "CumSum", "Trilu", "LpNormalization", "Floor", "Ceil", "Round",
            "Celu", "Cos", "IsNaN", "LRN", "MeanVarianceNormalization", "RotaryEmbedding", "Sign",
            "Sin", "Softsign",
            "ThresholdedRelu",
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            "Add", "Sub", "Mul", "Div", "Sum", "Mean", "Where", "Pow", "Mod", "Max", "Min",
            "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "PRelu",
        ),
        _elementwise,
    ),
    **dict.fromkeys(
        (
            "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
            "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
        ),
        _reduce,
    ),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "GatherElements": lambda s, node: s.given(node, 1),
    "GatherND": _gather_nd,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "Shape": _shape_of,
    "Range": _range,
    "Attention": _attention,
}  # fmt: skip


# ** entries of small integer tensors **

_Entries: TypeAlias = "Callable[[Sizes, Node], Entries | None]"


def _objects(values: Sequence[Any]) -> Entries:
    out = np.empty(len(values), dtype=object)
    out[:] = list(values)
    return out


def _scalar(value: Dim) -> Entries:
    out = np.empty((), dtype=object)
    out[()] = value
    return out


def _entries_of_shape(s: Sizes, node: Node) -> Entries | None:
    dims = s.given(node, 0)
    if dims is None:
        return None
    return _objects(dims[node.attrs.get("start", 0) : node.attrs.get("end")])


def _count(s: Sizes, node: Node) -> Entries | None:
    dims = s.given(node, 0)
    return None if dims is None else _scalar(product(*factors(dims)))


def _multiplied(s: Sizes, node: Node) -> Entries | None:
    """The product of a vector."""
    data, axes = s.entries(node.inputs[0]), s.listed(node, 1, "axes")
    if data is None or data.ndim != 1 or (axes is None and len(node.inputs) > 1):
        return None
    total = _scalar(product(*factors(data.tolist())))
    return total.reshape(1) if node.attrs.get("keepdims", 1) else total


def _moved(s: Sizes, node: Node) -> Entries | None:
    """Operators that move entries, on arrays of objects as numpy moves them."""
    data = s.entries(node.inputs[0])
    if data is None:
        return None
    if node.op in ("Identity", "Cast"):
        integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        return data if node.op == "Identity" or node.attrs.get("to") in integers else None
    if node.op == "Transpose":
        return data.transpose(node.attrs.get("perm"))
    if node.op == "Reshape":
        wanted = s.integers(node.inputs[1])
        return None if wanted is None else data.reshape(wanted)
    axes = s.listed(node, 1, "axes")
    if node.op == "Squeeze":
        return np.squeeze(data, None if axes is None else tuple(axes))
    return None if axes is None else np.expand_dims(data, tuple(axes))


def _picked(s: Sizes, node: Node) -> Entries | None:
    data, index = s.entries(node.inputs[0]), s.entries(node.inputs[1])
    if index is None or any(isinstance(i, str) for i in index.reshape(-1)):
        return None
    if data is None:
        made = s.facts.producer(node.inputs[0])
        if made is None or made.op != "Shape" or made.domain or made.attrs:
            return None
        picked = _objects([s.axis(made.inputs[0], int(i)) for i in index.reshape(-1).tolist()])
        return picked.reshape(index.shape)
    found: Any = np.take(data, index.astype(np.int64), axis=int(node.attrs.get("axis", 0)))
    return found if isinstance(found, np.ndarray) else _scalar(found)


def _sliced(s: Sizes, node: Node) -> Entries | None:
    data = s.entries(node.inputs[0])
    starts, ends = s.listed(node, 1, "starts"), s.listed(node, 2, "ends")
    axes, steps = s.listed(node, 3, "axes"), s.listed(node, 4, "steps")
    if data is None or starts is None or ends is None:
        return None
    if axes is None and len(node.inputs) > 3 and node.inputs[3].name:
        return None
    picked: list[slice] = [slice(None)] * data.ndim
    for at, axis in enumerate(axes if axes is not None else range(len(starts))):
        step = 1 if steps is None else steps[at]
        # Far beyond the beginning means "to the very first", which Python writes as None.
        end = None if step < 0 and ends[at] < -data.shape[axis] else ends[at]
        picked[axis] = slice(starts[at], end, step)
    return data[tuple(picked)]


def _joined(s: Sizes, node: Node) -> Entries | None:
    parts = []
    for index, value in enumerate(node.inputs):
        part = s.entries(value)
        if part is None:
            length = s.given(node, index)
            if not length or len(length) != 1 or not isinstance(length[0], int):
                return None
            if length[0] > _SMALL:
                return None
            part = _objects([s.unsure() for _ in range(length[0])])
        parts.append(part)
    return np.concatenate(parts, axis=int(node.attrs.get("axis", 0)))


def _filled(s: Sizes, node: Node) -> Entries | None:
    wanted = s.integers(node.inputs[0])
    if wanted is None or math.prod(wanted) > _SMALL or "value" not in node.attrs:
        return None
    value = onnx.numpy_helper.to_array(next(a.t for a in node.proto.attribute if a.name == "value"))
    return np.full(tuple(wanted), int(value.reshape(-1)[0]), dtype=object)


def _computed(s: Sizes, node: Node) -> Entries | None:
    known = s.facts.type(node.outputs[0])
    if known is not None and known.element == onnx.TensorProto.FLOAT:
        return None
    given = [s.entries(v) for v in node.inputs]
    if any(g is None for g in given):
        return None
    arrays = np.broadcast_arrays(*[g for g in given if g is not None])
    out = np.empty(arrays[0].shape, dtype=object)
    for at in np.ndindex(out.shape):
        out[at] = _OPERATIONS[node.op](s, *(a[at] for a in arrays))
    return out


def _times(s: Sizes, a: Dim, b: Dim) -> Dim:
    return product(*factors([a, b]))


def _plus(s: Sizes, a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if 0 in (a, b):
        return b if a == 0 else a
    first, second = sorted((a, b), key=str)
    return s.computed("Add", first, second)


def _minus(s: Sizes, a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return a if b == 0 else 0 if a == b else s.computed("Sub", a, b)


def _over(s: Sizes, a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if a * b >= 0 else -1)
    number, names = factors([a])
    divisor, gone = factors([b])
    if divisor > 0 and number % divisor == 0 and not Counter(gone) - Counter(names):
        return product(number // divisor, list((Counter(names) - Counter(gone)).elements()))
    return s.computed("Div", a, b)


def _modulo(s: Sizes, a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    return 0 if b == 1 else s.computed("Mod", a, b)


def _equal(s: Sizes, a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    if a == b:
        return 1
    # A size is never negative, and -1 is what shapes are compared with.
    apart = (a == -1 and is_size(b)) or (b == -1 and is_size(a))
    return 0 if apart else s.computed("Equal", a, b)


def _chosen(s: Sizes, condition: Dim, a: Dim, b: Dim) -> Dim:
    if isinstance(condition, int):
        return a if condition else b
    return a if a == b else s.unsure()


_OPERATIONS: Final[dict[str, Callable[..., Dim]]] = {
    "Mul": _times,
    "Add": _plus,
    "Sub": _minus,
    "Div": _over,
    "Mod": _modulo,
    "Equal": _equal,
    "Where": _chosen,
}
_ENTRIES: Final[dict[str, _Entries]] = {
    "Shape": _entries_of_shape,
    "Size": _count,
    "ReduceProd": _multiplied,
    **dict.fromkeys(("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"), _moved),
    "Gather": _picked,
    "Slice": _sliced,
    "Concat": _joined,
    "ConstantOfShape": _filled,
    **dict.fromkeys(_OPERATIONS, _computed),
}
