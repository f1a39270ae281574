"""How operators treat the features of a stream: one rule for each operator.

    f(C x) = C f(x)        C = I - 1 1^T / d over the features       "f is transparent to C"

A rule says, for the layout of the features in a node's output, which inputs have to be changed by C
so that the output is, and in which layout each has its features then; inputs that are constant are
changed when the model is optimized. What no rule covers is not transparent, and the rule's words
say why. Every rule follows from the operator's definition in the ONNX specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxnorm.einsum import Equation
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.layout import Layout, reshaped
from onnxnorm.module import Node
from onnxnorm.port import LINEAR, REAL, slots
from onnxnorm.rewrite import Refusal
from onnxnorm.sizes import Sizes


@dataclass(frozen=True)
class Basis:
    """What a value is to be multiplied with: C diag(scale), over the features in `layout`.

    Attributes:
        layout: Where the features are.
        scale: One factor for each feature, as the bytes of float64 numbers; None for none. It
            comes from a constant factor that follows and is folded into what writes the value.
    """

    layout: Layout
    scale: bytes | None = None

    def factors(self) -> NDArray[np.float64] | None:
        """The scale as numbers."""
        return None if self.scale is None else np.frombuffer(self.scale, dtype=np.float64)

    def scaled(self, by: NDArray[np.float64]) -> Basis:
        """The basis with another factor for each feature."""
        own = self.factors()
        return Basis(self.layout, np.ascontiguousarray(by if own is None else own * by).tobytes())

    def of(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """C diag(scale) applied to an array whose axes count from the right as the layout's do."""
        factors = self.factors()
        if factors is not None:
            array = array * self.layout.spread(factors, array.ndim)
        return self.layout.centered(array)


@dataclass(frozen=True)
class Demand:
    """One input of a node that has to be changed.

    Attributes:
        index: Which input.
        basis: How, in this input's own layout.
        constant: The constant it is; None for a value of the run.
        bias: Whether it is a bias, an input that is added.
    """

    index: int
    basis: Basis
    constant: Constant | None = None
    bias: bool = False


@dataclass(frozen=True)
class Link:
    """A node whose output changes by C exactly when these inputs do.

    Attributes:
        node: The node.
        demands: The inputs.
        outputs: The outputs that change, each with its basis.
        bypass: The node multiplies by the scale that `demands` ask for, and has to go.
    """

    node: Node
    demands: tuple[Demand, ...]
    outputs: tuple[tuple[AnyValue, Basis], ...]
    bypass: bool = False

    @property
    def values(self) -> list[tuple[AnyValue, Basis]]:
        """The inputs of the run that have to change."""
        found = {self.node.inputs[d.index]: d.basis for d in self.demands if d.constant is None}
        return list(found.items())


@dataclass(frozen=True)
class Stop:
    """A node that the change does not pass; `why` is a clause that tells of the node."""

    node: Node | None
    why: str

    def refusal(self, root: Node) -> Refusal:
        """It as what a pass says of a place."""
        return Refusal(self.why, (self.node or root).label, node=root)


class Blind(Stop):
    """A reader to whom the mean makes no difference."""


Back: TypeAlias = "tuple[Demand, ...] | str"


class Transfer:
    """The rules, on one graph.

    Args:
        facts: What is true of the graph.
        sizes: Sizes of its values.
    """

    def __init__(self, facts: Facts, sizes: Sizes) -> None:
        self.facts = facts
        self.sizes = sizes

    def back(self, node: Node, output: AnyValue, basis: Basis) -> Link | Stop:
        """What has to change for `output` to change by `basis`."""
        rule = _BACK.get(node.op) if node.domain == "" else None
        if rule is None:
            told = f"{described(node)} writes this stream and is not linear"
            return quantized(node) or Stop(node, told)
        if node.parametric:
            return Stop(node, f"{described(node)} has a parameter of the function")
        try:
            found = rule(self, node, output, basis)
        except (IndexError, TypeError, ValueError):  # inputs or attributes that its schema forbids
            found = "is not as its operator is defined"
        if isinstance(found, str):
            return Stop(node, f"{described(node)} {found}")
        demands = []
        for demand in found:
            value = node.inputs[demand.index]
            constant = demand.constant or self.facts.constant(value)
            if constant is not None:
                shape = constant.shape
                layout = demand.basis.layout
                if not (layout.covers(shape) or layout.misses(shape)):
                    return Stop(
                        node,
                        f"{described(node)} takes '{value.name}' of shape {list(shape)}, which does"
                        f" not fit {layout.features} features",
                    )
            demands.append(Demand(demand.index, demand.basis, constant, demand.bias))
        outputs = [(output, basis)]
        if node.op == "Split":
            outputs = [(v, basis) for v in node.outputs if v.name]
        bypass = any(d.basis.scale != basis.scale for d in demands if d.constant is None)
        return Link(node, tuple(demands), tuple(outputs), bypass)

    def forth(self, node: Node, index: int, basis: Basis) -> Link | Stop:
        """What changes when input `index` changes by `basis`."""
        for output, layout in self._outputs(node, index, basis.layout):
            # A scale is folded where the features are multiplied by it, and not behind that.
            for scale in dict.fromkeys((basis.scale, None)):
                link = self.back(node, output, Basis(layout, scale))
                if isinstance(link, Link) and any(
                    d.index == index and d.basis == basis for d in link.demands
                ):
                    return link
        return self._reader(node, index, basis)

    def _outputs(self, node: Node, index: int, layout: Layout) -> list[tuple[AnyValue, Layout]]:
        """The outputs in which the features of an input could be, and where."""
        if node.domain != "" or not node.outputs or not node.outputs[0].name:
            return []
        output = node.outputs[0]
        if node.op in _STRUCTURAL:
            if index != 0:
                return []
            moved = self.moved(node, layout)
            return [] if isinstance(moved, str) else [(output, moved)]
        if node.op == "Einsum":
            equation = Equation.of(node)
            carried = None if equation is None else equation.carried(layout.axes, index)
            to = dict(zip(layout.axes, carried[1], strict=True)) if carried is not None else None
            return [] if to is None else [(output, layout.moved(to))]
        if node.op in _BACK and node.op not in LINEAR:
            return [(output, layout)]
        if node.op == "Gemm" and index == 2:
            return [(output, layout)]
        if node.op == "MatMul":
            return [(output, layout)]
        return []

    def moved(self, node: Node, layout: Layout) -> Layout | str:
        """Where a structural operator takes the features of its first input."""
        if node.parametric:
            return "has a parameter of the function"
        try:
            return _STRUCTURAL[node.op](self, node, layout, True)
        except (IndexError, TypeError, ValueError):  # inputs or attributes that its schema forbids
            return "is not as its operator is defined"

    def _reader(self, node: Node, index: int, basis: Basis) -> Stop:
        if node.domain == "" and index == 0 and self._ignores_mean(node, basis):
            return Blind(node, f"{described(node)} does not see the mean")
        what = described(node)
        if node.op in _QUANTIZED:
            return Stop(node, f"{what} rounds this stream with its mean{_FIRST}")
        if node.op in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"):
            return Stop(node, f"{what} reads this stream without a norm in front of it")
        if node.op in ("Mul", "Div"):
            return Stop(node, f"{what} multiplies this stream feature by feature")
        if node.op == "Concat":
            return Stop(node, f"{what} joins this stream with others along the features")
        rule = _BACK.get(node.op) if node.domain == "" else None
        if rule is not None and node.op in _STRUCTURAL:
            moved = self.moved(node, basis.layout)
            said = moved if isinstance(moved, str) else "reads this stream in another way"
            return Stop(node, f"{what} {said}")
        return Stop(node, f"{what} reads this stream and sees its mean")

    def _ignores_mean(self, node: Node, basis: Basis) -> bool:
        """Whether a node over exactly the features gives the same for x and for x + c."""
        if node.op in ("Shape", "Size"):
            return True
        if node.op not in ("Softmax", "LogSoftmax", "ArgMax", "ArgMin") or basis.scale is not None:
            return False
        if node.parameter("axis") is not None:
            return False
        if node.op in ("Softmax", "LogSoftmax") and node.scope.opsets[""] < 13:
            return False
        dims = self.sizes.of(node.inputs[0])
        default = -1 if node.op in ("Softmax", "LogSoftmax") else 0
        axis = int(node.attrs.get("axis", default))
        if axis >= 0:
            if dims is None:
                return False
            axis -= len(dims)
        return basis.layout.whole and basis.layout.only_axis(axis)

    # ** what the rules ask **

    def covers(self, value: AnyValue, layout: Layout) -> bool:
        """Whether a value is known to have its own entry for every feature."""
        return all(self.sizes.dim(value, p.axis) == p.extent for p in layout.parts)

    def misses(self, value: AnyValue, layout: Layout) -> bool:
        """Whether a value is known to be the same for every feature."""
        return all(self.sizes.dim(value, p.axis) == 1 for p in layout.parts)

    def rank(self, value: AnyValue) -> int | None:
        """The number of axes of a value, None where it is unknown."""
        dims = self.sizes.of(value)
        return None if dims is None else len(dims)

    def numbers(self, node: Node, index: int, name: str = "") -> list[int] | None:
        """A list of integers that is an input, or in older opsets the attribute `name`."""
        return self.sizes.listed(node, index, name)

    def from_right(self, value: AnyValue, axes: Sequence[int]) -> list[int] | None:
        """Axes counted from the right."""
        if all(a < 0 for a in axes):
            return list(axes)
        rank = self.rank(value)
        return None if rank is None else [a if a < 0 else a - rank for a in axes]

    def cut_axes(self, node: Node) -> list[int] | None:
        """The axes, from the right, that a Slice has bounds for; None where they are not known."""
        axes = self.numbers(node, 3, "axes")
        if axes is None and "axes" not in node.attrs:
            if len(node.inputs) > 3 and node.inputs[3].name:
                return None
            starts = self.numbers(node, 1, "starts")
            axes = None if starts is None else list(range(len(starts)))
        return None if axes is None else self.from_right(node.inputs[0], axes)

    def padded_axes(self, node: Node) -> list[int] | str:
        """The axes, from the right, that a Pad makes longer or shorter; a clause where unknown."""
        pads, axes = self.numbers(node, 1, "pads"), None
        if len(node.inputs) > 3 and node.inputs[3].name:
            axes = self.numbers(node, 3)
            if axes is None:
                return "pads axes that are not known"
        rank = self.rank(node.inputs[0])
        if pads is None or rank is None:
            return "pads by an amount that is not constant"
        axes = list(range(rank)) if axes is None else axes
        ends = zip(axes, pads, pads[len(axes) :], strict=False)
        padded = [axis for axis, before, behind in ends if before or behind]
        return [axis if axis < 0 else axis - rank for axis in padded]


# ** rules of operators that move features or leave them where they are **

_Move: TypeAlias = "Callable[[Transfer, Node, Layout, bool], Layout | str]"


def _same(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    return layout


def _cast(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    if node.op == "Cast" and node.attrs.get("to") not in REAL:
        return "makes integers of this stream"
    return layout


def _dropout(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    if len(node.inputs) > 2 and node.inputs[2].name:
        mode = t.facts.constant(node.inputs[2])
        if mode is None or bool(np.any(mode.array())):
            return "drops features at random"
    return layout


def _reshape(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    before, after = t.sizes.of(node.inputs[0]), t.sizes.of(node.outputs[0])
    if before is None or after is None:
        return "has an unknown shape"
    moved = reshaped(layout, before, after) if forth else reshaped(layout, after, before)
    return moved or "mixes the features with another axis of unknown size"


def _transpose(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    rank = t.rank(node.inputs[0])
    perm = node.attrs.get("perm", None if rank is None else list(range(rank))[::-1])
    if perm is None or node.parameter("perm"):
        return "has an unknown order of axes"
    n = len(perm)
    to = {int(source) - n: at - n for at, source in enumerate(perm)}
    if not forth:
        to = {new: old for old, new in to.items()}
    return layout.moved(to)


def _other_axes(
    t: Transfer, node: Node, layout: Layout, axes: Sequence[int] | None, does: str
) -> Layout | str:
    given = None if axes is None else t.from_right(node.inputs[0], axes)
    if given is None:
        return f"{does} axes that are not known"
    return f"{does} the features" if set(given) & set(layout.axes) else layout


def _slice(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    return _other_axes(t, node, layout, t.cut_axes(node), "cuts a part out of")


def _gather(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    data, picked = t.rank(node.inputs[0]), t.rank(node.inputs[1])
    if data is None or picked is None or node.parameter("axis"):
        return "has an unknown shape"
    axis = int(node.attrs.get("axis", 0)) % data if data else 0
    to = {}
    for at in range(data):
        if at != axis:
            new = at if at < axis else at + picked - 1
            to[at - data] = new - (data + picked - 1)
    if not forth:
        to = {new: old for old, new in to.items()}
    if any(a not in to for a in layout.axes):
        return "picks single features"
    return layout.moved(to)


def _split(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    moved = _other_axes(t, node, layout, [int(node.attrs.get("axis", 0))], "splits")
    if moved == "splits the features":
        return "cuts the features into parts: the mean of all is not the mean of each"
    return moved


def _pad(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    padded = t.padded_axes(node)
    if isinstance(padded, str):
        return padded
    if node.text("mode", "constant") == "constant":
        value = node.attrs.get("value", 0.0)
        if len(node.inputs) > 2 and node.inputs[2].name:
            constant = t.facts.constant(node.inputs[2])
            value = None if constant is None else float(constant.float64().reshape(-1)[0])
        if padded and value != 0.0:
            return "pads with a value that is not zero"
    return _other_axes(t, node, layout, padded, "pads")


def _reduce(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    rank = t.rank(node.inputs[0])
    axes = t.numbers(node, 1, "axes")
    if axes is None or rank is None:
        return "reduces axes that are not known"
    reduced = {a % rank - rank for a in axes}
    if node.attrs.get("keepdims", 1):
        return "reduces the features" if reduced & set(layout.axes) else layout
    kept = [a for a in range(-rank, 0) if a not in reduced]
    to = {old: new - len(kept) for new, old in enumerate(kept)}
    if not forth:
        to = {new: old for old, new in to.items()}
    if any(a not in to for a in layout.axes):
        return "reduces the features"
    return layout.moved(to)


def _pool(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    rank = t.rank(node.inputs[0])
    if rank is None or not layout.only_axis(1 - rank):
        return "pools over the features"
    return layout


def _along(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    return _other_axes(t, node, layout, t.numbers(node, 1), "sums along")


def _repeat(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    # The features have their full size in the output; from the left a missing axis may come.
    value = node.inputs[0] if node.op == "Expand" else node.outputs[0]
    if node.op == "Expand":
        constant = t.facts.constant(value)
        if constant is not None or t.covers(value, layout):
            return layout
        return "repeats one value for every feature"
    repeats, rank = t.sizes.entries(node.inputs[1]), t.rank(node.inputs[0])
    if repeats is None or rank is None:
        return "repeats axes that are not known"
    repeated = [a for a, n in enumerate(repeats.reshape(-1).tolist()) if n != 1]
    return _other_axes(t, node, layout, repeated, "repeats")


def _resize(t: Transfer, node: Node, layout: Layout, forth: bool) -> Layout | str:
    extrapolated = node.text("coordinate_transformation_mode") == "tf_crop_and_resize"
    if extrapolated or not (t.covers(node.inputs[0], layout) and t.covers(node.outputs[0], layout)):
        return "resizes the features"
    return layout


_STRUCTURAL: Final[dict[str, _Move]] = {
    "Identity": _same,
    "Neg": _same,
    "Cast": _cast,
    "CastLike": _cast,
    "Dropout": _dropout,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Gather": _gather,
    "Split": _split,
    "Pad": _pad,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "GlobalAveragePool": _pool,
    "AveragePool": _pool,
    "CumSum": _along,
    "Expand": _repeat,
    "Tile": _repeat,
    "Resize": _resize,
}


def _structural(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    if node.op == "Dropout" and output is not node.outputs[0]:
        return "computes a mask"
    moved = _STRUCTURAL[node.op](t, node, basis.layout, False)
    return moved if isinstance(moved, str) else (Demand(0, Basis(moved, basis.scale)),)


# ** rules of operators with several inputs **


def _sum(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    return _all_inputs(t, node, basis, range(len(node.inputs)))


def _all_inputs(t: Transfer, node: Node, basis: Basis, indices: Sequence[int]) -> Back:
    demands = []
    for index in indices:
        value = node.inputs[index]
        constant = t.facts.constant(value)
        if constant is None and not t.covers(value, basis.layout):
            if t.misses(value, basis.layout):
                return f"adds '{value.name}', which is computed and the same for every feature"
            return f"has an input '{value.name}' of unknown shape"
        demands.append(Demand(index, basis, bias=True))
    return tuple(demands)


def _where(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    if not t.misses(node.inputs[0], basis.layout):
        return "chooses feature by feature"
    return _all_inputs(t, node, basis, (1, 2))


def _concat(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    axes = t.from_right(output, [int(node.attrs.get("axis", 0))])
    if axes is None or axes[0] in basis.layout.axes:
        return "joins values along the features"
    return _all_inputs(t, node, basis, range(len(node.inputs)))


def _scatter(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    if node.text("reduction", "none") not in ("none", "add"):
        return "scatters with a product, a maximum or a minimum"
    rank, index = t.rank(node.inputs[0]), t.sizes.of(node.inputs[1])
    deep = index[-1] if index else None
    if rank is None or not isinstance(deep, int) or any(a + rank < deep for a in basis.layout.axes):
        return "scatters along the features"
    return _all_inputs(t, node, basis, (0, 2))


def _gather_nd(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    rank, index = t.rank(node.inputs[0]), t.sizes.of(node.inputs[1])
    deep = index[-1] if index else None
    batch = int(node.attrs.get("batch_dims", 0))
    if rank is None or not isinstance(deep, int):
        return "gathers along axes that are not known"
    if any(a + rank < deep + batch for a in basis.layout.axes):
        return "gathers along the features"
    return (Demand(0, basis),)


def _scaled(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    """Mul and Div: by a value that is the same for every feature, or by a constant."""
    sides = ((0, 1),) if node.op == "Div" else ((0, 1), (1, 0))
    for of, by in sides:
        factor = node.inputs[by]
        constant = t.facts.constant(factor)
        shape = None if constant is None else constant.shape
        same = basis.layout.misses(shape) if shape is not None else t.misses(factor, basis.layout)
        if same and t.covers(node.inputs[of], basis.layout):
            return (Demand(of, basis),)
    for of, by in sides:
        constant = t.facts.constant(node.inputs[by])
        if constant is None or not t.covers(node.inputs[of], basis.layout):
            continue
        factors = per_feature(constant, basis.layout)
        if factors is None:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = 1.0 / factors if node.op == "Div" else factors
        if not np.isfinite(factors).all():
            return "divides by zero"
        if bool((factors == factors[0]).all()):
            return (Demand(of, basis),)
        return (Demand(of, basis.scaled(factors)),)
    return "multiplies feature by feature by what is computed"


def per_feature(constant: Constant, layout: Layout) -> NDArray[np.float64] | None:
    """A constant as one number for each feature; None where it varies along other axes too."""
    if not layout.covers(constant.shape) or not layout.whole:
        return None
    if int(np.prod(constant.shape)) != layout.features:
        return None
    order = sorted(range(len(layout.parts)), key=lambda i: layout.parts[i].axis)
    kept = constant.float64().reshape([layout.parts[i].size for i in order])
    return np.asarray(kept.transpose(np.argsort(order)).reshape(-1))


def _linear(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    """What a weight writes; or, for MatMul and Gemm, a mixing of other axes than the features."""
    found = slots(node, t.facts)
    layout = basis.layout
    if not isinstance(found, str) and layout.only_axis(found[0].output_axis):
        demands = []
        for slot in found:
            moved = layout.shifted(slot.axis - slot.output_axis).grouped(slot.groups)
            if moved is None:
                return "writes each feature from its own group, which has no weight for the mean"
            demands.append(Demand(slot.index, Basis(moved, basis.scale), slot.constant, slot.bias))
        if node.op in ("Conv", "ConvTranspose"):
            groups = int(node.attrs.get("group", 1))
            if any(p.outer % groups for p in layout.parts) and groups > 1:
                return "writes each feature from its own group, which has no weight for the mean"
            if len(node.inputs) > 2 and node.inputs[2].name and len(found) == 1:
                return "has a bias that is computed"
        if node.op == "Gemm" and len(node.inputs) > 2 and node.inputs[2].name and len(found) == 1:
            if not t.covers(node.inputs[2], layout):
                return f"adds '{node.inputs[2].name}', which is computed and of unknown shape"
            demands.append(Demand(2, basis, bias=True))
        return tuple(demands)
    if node.op == "MatMul":
        for of, axis in ((1, -1), (0, -2)):
            other = node.inputs[1 - of]
            rank = t.rank(node.inputs[of])
            if layout.only_axis(axis) and rank is not None and rank >= 2 and t.rank(other):
                # A mixes rows: every column, and so every feature, is treated alike.
                return (Demand(of, basis),)
    dequantized = _dequantized(t, node)
    if isinstance(found, str) and dequantized is not None:
        return f"writes this stream with a weight from {described(dequantized)}{_FIRST}"
    if isinstance(found, str):
        return f"writes this stream, and {found}"
    return "writes this stream and is linear along another axis than the features"


def _einsum(t: Transfer, node: Node, output: AnyValue, basis: Basis) -> Back:
    """Linear in the one operand that has the features, which treats every other axis alike."""
    equation = Equation.of(node)
    if equation is None:
        return "has an equation that takes a diagonal or is not known"
    carried = equation.carried(basis.layout.axes)
    if carried is None:
        return "writes each feature from several operands"
    index, axes = carried
    moved = basis.layout.moved(dict(zip(basis.layout.axes, axes, strict=True)))
    return (Demand(index, Basis(moved, basis.scale)),)


def _dequantized(t: Transfer, node: Node) -> Node | None:
    """The node that makes an operand of a linear layer of quantized constants, if one does."""
    for value in node.inputs:
        producer = t.facts.producer(value)
        while producer is not None and producer.op in ("Transpose", "Reshape", "Cast"):
            producer = t.facts.producer(producer.inputs[0])
        if producer is None or producer.op != "DequantizeLinear":
            continue
        if t.facts.constant(producer.inputs[0]) is not None:
            return producer
    return None


def quantized(node: Node) -> Stop | None:
    """A writer that computes in quantized numbers, in words; None for any other."""
    if node.op not in _QUANTIZED:
        return None
    return Stop(node, f"{described(node)} writes this stream in quantized numbers{_FIRST}")


_FIRST: Final = " (optimize the model before it is quantized)"
# Of the standard's domain and of onnxruntime's.
_QUANTIZED: Final = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearAdd",
        "QLinearConcat",
        "QLinearConv",
        "QLinearMatMul",
        "QLinearMul",
        "QuantizeLinear",
    }
)
_Rule: TypeAlias = "Callable[[Transfer, Node, AnyValue, Basis], Back]"
_BACK: Final[dict[str, _Rule]] = {
    **dict.fromkeys(_STRUCTURAL, _structural),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean"), _sum),
    **dict.fromkeys(("Mul", "Div"), _scaled),
    **dict.fromkeys(LINEAR, _linear),
    "Einsum": _einsum,
    "Where": _where,
    "Concat": _concat,
    "ScatterND": _scatter,
    "GatherND": _gather_nd,
}


def described(node: Node) -> str:
    """A node in words: "the depthwise convolution '/stages.0/0/conv_dw'"."""
    kind = _WORDS.get(node.op, node.op)
    if node.op == "Conv" and node.parameter("group") is None:
        groups = int(node.attrs.get("group", 1))
        # Whether it is depthwise shows in the weight, which has one input channel for each group.
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        shape = None if weight is None else weight.shape
        if groups > 1:
            depthwise = shape is None or len(shape) < 2 or shape[1] == 1
            kind = "the depthwise convolution" if depthwise else "the grouped convolution"
    return f"{kind} '{node.label}'"


_WORDS: Final = {
    "Conv": "the convolution",
    "ConvTranspose": "the transposed convolution",
    "MatMul": "the linear layer",
    "Gemm": "the linear layer",
    "LayerNormalization": "the layer norm",
}
