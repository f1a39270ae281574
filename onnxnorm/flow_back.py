"""An affine map against the edges: into the constants of what makes a value.

    s * (W x + b) + t  =  (s * W) x + (s * b + t)

A sum gives s to each of its operands and t to one of them; a product gives s to one; a Concat gives
each operand its part. On the way every value has readers that want the same of it, or do not see
it. The walk takes the last value in graph order first, so that all of its readers are known then.
Source: the definitions of these operators in the ONNX operator specification.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np

from onnxnorm.affine import Affine, Vector, carried, extent, slim, varies
from onnxnorm.change import absorbed
from onnxnorm.einsum import Equation
from onnxnorm.facts import AnyValue
from onnxnorm.flow import Addition, Flow, concatenated, dtype_of, fits, pad
from onnxnorm.flow_forth import unseen
from onnxnorm.module import Node
from onnxnorm.moves import MOVES, Halt, moved
from onnxnorm.norm_operators import norm_operator
from onnxnorm.port import slots
from onnxnorm.transfer import Stop, Transfer, described

_TRIES: Final = 16  # ways to give a shift to one operand of each sum, and a factor of each product
_NEAR: Final = 6  # nodes between a sum and the constants that its operands are made of
_PRODUCTS: Final = ("Div", "MatMul", "Mul")

# What the inputs of a node have to become, by their index.
Demands: TypeAlias = "dict[int, Affine]"


def flow_back(value: AnyValue, affine: Affine, reader: Node, transfer: Transfer) -> Flow | Stop:
    """How what makes `value` would make affine(value) instead.

    Args:
        value: What is mapped.
        affine: The map.
        reader: The node that maps it now; what feeds it has to be of the same scope.
        transfer: The rules on this graph.

    Returns:
        The cheapest way that was found, or where the first one ended.
    """
    best: Flow | None = None
    first: Stop | None = None
    choices: list[int] = []
    for _ in range(_TRIES):
        walk = _Walk(value, affine, reader, transfer, choices)
        found = walk.run()
        if isinstance(found, Flow):
            if best is None or len(found.additions) < len(best.additions):
                best = found
            if not found.additions:
                break
        else:
            first = first or found
            if not walk.retry:
                break
        following = walk.following()
        if following is None:
            break
        choices = following
    return best if best is not None else first or Stop(None, "nothing takes it")


class _Walk:
    """One walk. `choices` says which alternative to take at each node that has several."""

    def __init__(
        self,
        value: AnyValue,
        affine: Affine,
        reader: Node,
        transfer: Transfer,
        choices: Sequence[int],
    ) -> None:
        self.transfer = transfer
        self.facts = transfer.facts
        self.reader = reader
        self.flow = Flow()
        self.retry = True
        self.products = False  # whether a factor could have gone elsewhere
        self.choices = list(choices)
        self.counts: list[int] = []
        self._order = self.facts.positions
        self._pending: dict[AnyValue, Affine] = {value: affine}
        self._asked: dict[AnyValue, set[tuple[Node, int]]] = {
            value: {(reader, i) for i, v in enumerate(reader.inputs) if v is value}
        }
        self._heap: list[tuple[int, int, AnyValue]] = []
        self._push(value)

    def following(self) -> list[int] | None:
        """The choices after these, the last one first; None where there are none left."""
        taken = [c if i < len(self.choices) else 0 for i, c in enumerate(self._taken())]
        for at in reversed(range(len(taken))):
            if taken[at] + 1 < self.counts[at]:
                return [*taken[:at], taken[at] + 1]
        return None

    def _taken(self) -> list[int]:
        return [*self.choices, *[0] * (len(self.counts) - len(self.choices))][: len(self.counts)]

    def run(self) -> Flow | Stop:
        while self._heap:
            _, _, value = heapq.heappop(self._heap)
            stop = self._visit(value)
            if stop is not None:
                return stop
        return self.flow

    def _push(self, value: AnyValue) -> None:
        node = self.facts.producer(value)
        at = -self._order[node] if node is not None else 1
        heapq.heappush(self._heap, (at, len(self._pending), value))

    def _visit(self, value: AnyValue) -> Stop | None:
        affine = self._pending[value]
        node = self.facts.producer(value)
        if (stop := self._read_elsewhere(value, affine)) is not None:
            return self._stopped(stop.node, stop.why, affine)
        if node is None:
            told = f"no linear operator makes '{value.name}': {self._origin(value)}"
            return self._stopped(None, told, affine)
        if node.scope is not self.reader.scope:
            told = f"{described(node)} is outside the body that maps its result"
            return self._stopped(node, told, affine)
        try:
            demands = self._chosen(_options(self, node, node.outputs.index(value), affine))
            self.flow.between[node] = None
            for index, wanted in demands.items():
                if not wanted.identity:
                    self._demand(node, index, wanted)
        except Halt as halt:
            return self._stopped(node, f"{described(node)} {halt.why}", affine, shift=halt.shift)
        return None

    def _stopped(self, node: Node | None, why: str, affine: Affine, *, shift: bool = False) -> Stop:
        """The end; another choice helps where what stands in the way was chosen."""
        self.retry = self.products or shift or not affine.scales
        return Stop(node, why)

    def distance(self, value: AnyValue) -> int:
        """How far a value is from a constant that takes a shift, as a guess."""
        for hops in range(_NEAR):
            node = self.facts.producer(value)
            if self.facts.constant(value) is not None:
                return hops
            if node is None or node.domain != "" or not node.inputs:
                break
            if node.op in ("Conv", "ConvTranspose", "Gemm") or node.op == "BatchNormalization":
                return hops
            if node.op == "Add":
                known = [self.facts.constant(v) is not None for v in node.inputs]
                return hops + (0 if any(known) else _NEAR)
            if node.op == "MatMul":
                return hops + _NEAR  # it costs an Add
            if node.op not in MOVES:
                break
            value = node.inputs[0]
        return 3 * _NEAR

    def _chosen(self, options: Sequence[Option]) -> Demands:
        """One of the alternatives, staged."""
        usable, halt = [], None
        for option in options:
            made = _checked(option, self)
            if isinstance(made, Flow):
                usable.append((option, made))
            else:
                halt = halt or made
        if not usable:
            raise halt or Halt("takes no map")
        at = 0
        option = usable[0][0]
        if len(usable) > 1:
            at = self.choices[len(self.counts)] if len(self.counts) < len(self.choices) else 0
            self.counts.append(len(usable))
            self.products = self.products or option.node.op in _PRODUCTS
        option, made = usable[at]
        self.flow.changes += made.changes
        self.flow.additions += made.additions
        self.flow.ends.update(made.ends)
        return option.demands

    def _demand(self, node: Node, index: int, wanted: Affine) -> None:
        value = node.inputs[index]
        known = self._pending.get(value)
        if known is None:
            self._pending[value] = wanted
            self._asked[value] = set()
            self._push(value)
        elif not known.same(wanted):
            raise Halt(f"needs another factor or shift of '{value.name}' than others")
        self._asked[value].add((node, index))

    def _read_elsewhere(self, value: AnyValue, affine: Affine) -> Stop | None:
        if (why := self.facts.pinned(value)) is not None:
            return Stop(self.facts.producer(value), f"'{value.name}' is {why}")
        for use in self.facts.uses(value):
            if (use.node, use.index) in self._asked[value]:
                continue
            if use.node.scope is self.reader.scope and unseen(use, affine, self.transfer):
                continue
            told = f"'{value.name}' is also read by node '{use.node.label}' ({use.node.op})"
            return Stop(use.node, told)
        return None

    def _origin(self, value: AnyValue) -> str:
        if self.facts.constant(value) is not None:
            return "it is a constant"
        return self.facts.why_not_constant(value)


@dataclass
class Option:
    """One way to map the result of a node.

    Attributes:
        node: The node.
        demands: What its inputs have to become.
        stage: Stages what else changes; raises `Halt`.
    """

    node: Node
    demands: Demands
    stage: Callable[[Flow], None] | None = None

    def check(self, walk: _Walk) -> Flow:
        """What changes at the node itself; constant inputs take their demands."""
        made, transfer = Flow(), walk.transfer
        for index, wanted in list(self.demands.items()):
            value = self.node.inputs[index]
            if wanted.identity:
                continue
            if transfer.facts.constant(value) is not None:
                scale, shift = wanted.scale, wanted.shift
                made.change(self.node, index, transfer, scale, shift)
                made.ends[self.node] = None
                self.demands = {i: a for i, a in self.demands.items() if i != index}
            elif not fits(value, wanted, transfer):
                lone = not wanted.scales and wanted.shifts
                told = f"reads '{value.name}', which is not known to have those channels"
                raise Halt(told, shift=lone)
        if self.stage is not None:
            self.stage(made)
        return made


def _checked(option: Option, walk: _Walk) -> Flow | Halt:
    try:
        return option.check(walk)
    except Halt as halt:
        return halt


def _options(walk: _Walk, node: Node, output: int, affine: Affine) -> list[Option]:
    """The ways to map an output of a node.

    Raises:
        Halt: There is none.
    """
    if node.domain == "" and node.op in MOVES:
        if node.op in ("Dropout", "MaxPool") and output > 0:
            raise Halt("computes it as a further output")
        wanted = moved(walk.transfer, node, affine, forth=False, output=output)
        if node.op == "Pad":
            return [Option(node, {0: wanted}, lambda f: pad(f, node, affine, walk.transfer))]
        return [Option(node, {0: wanted})]
    rule = _RULES.get(node.op) if node.domain == "" else None
    if rule is None:
        raise Halt("makes it, and it is not linear")
    if node.op in _SUMS and node.scope.opsets[""] < 7:
        raise Halt("broadcasts by attributes, as before opset 7")
    if node.parametric:
        raise Halt("makes it and has a parameter of the function")
    try:
        return rule(walk, node, affine)
    except (IndexError, KeyError, TypeError, ValueError):  # what its schema forbids
        raise Halt("is not as its operator is defined") from None


# ** operators of several tensors **


def _add(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    """Both operands take s, one of them t: a constant, else what has the shortest way to a bias."""
    signs = (1.0, -1.0) if node.op == "Sub" else (1.0,) * len(node.inputs)
    if not affine.shifts:
        return [Option(node, dict.fromkeys(range(len(signs)), affine))]
    options = []
    for index in sorted(range(len(signs)), key=lambda i: walk.distance(node.inputs[i])):
        demands = dict.fromkeys(range(len(signs)), Affine.of(affine.scale))
        demands[index] = Affine.of(affine.scale, signs[index] * affine.shift)
        options.append(Option(node, demands))
    return options


def _all(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    return [Option(node, dict.fromkeys(range(len(node.inputs)), affine))]


def _extreme(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    if not affine.positive:
        raise Halt("passes only factors that are positive")
    return _all(walk, node, affine)


def _where(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    return [Option(node, {1: affine, 2: affine})]


def _product(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    """One operand takes s; of c x, a constant c leaves t to x, as t / c."""
    constants = [walk.facts.constant(v) for v in node.inputs]
    options: list[Option] = []
    for index, constant in enumerate(constants):
        if node.op == "Div" and index == 1 and constant is None:
            continue
        if constant is None:
            other = constants[1 - index]
            shift = affine.shift
            if affine.shifts:
                if other is None:
                    continue
                factor = slim(other.float64())
                if node.op == "Div":
                    factor = 1.0 / factor if (factor != 0.0).all() else np.zeros(())
                if not (factor != 0.0).all() or not np.isfinite(factor).all():
                    continue
                shift = affine.shift / factor
            options.append(Option(node, {index: Affine.of(affine.scale, shift)}))
        elif not affine.shifts:
            scale = affine.scale
            if node.op == "Div" and index == 1:
                if not (scale != 0.0).all():
                    continue
                scale = 1.0 / scale
            options.insert(0, Option(node, {index: Affine.of(scale)}))
    if not options:
        raise Halt("multiplies, and takes no shift", shift=True)
    return options


def _concat(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    if affine.scale.size == affine.shift.size == 1:
        return _all(walk, node, affine)
    axis, starts = concatenated(node, walk.transfer)

    def part(v: Vector, start: int, stop: int) -> Vector:
        return v if extent(v, axis) == 1 else v.take(np.arange(start, stop), axis)

    demands = {
        index: Affine.of(part(affine.scale, *ends), part(affine.shift, *ends))
        for index, ends in enumerate(pairwise(starts))
    }
    return [Option(node, demands)]


# ** operators with constants that take the map **


def _linear(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    """The weight takes s, the bias s and t; what only repeats s can take it to the input too."""
    found = slots(node, walk.facts)
    if isinstance(found, str):
        if node.op == "MatMul" and found.startswith("none of"):
            return _matmul(walk, node, affine)
        raise Halt(f"makes it, and {found}")
    first = found[0]
    axes = set(varies(affine.scale))
    if axes - {first.output_axis}:
        if node.op == "MatMul" and first.output_axis not in axes:
            return _matmul(walk, node, affine)
        raise Halt("is linear along another axis than the one that is scaled")
    rows, width = first.constant.shape[0], first.features()
    if affine.scale.size not in (1, width) or (first.groups > 1 and rows % first.groups):
        told = f"has a weight '{first.constant.name}' of shape {list(first.constant.shape)}"
        raise Halt(f"{told}, which does not fit")
    scale = np.broadcast_to(affine.scale.reshape(-1), (width,))
    shift: Vector | None = None
    if affine.shifts and node.op != "MatMul":
        if set(varies(affine.shift)) - {first.output_axis}:
            raise Halt("has no place for a shift along other axes", shift=True)
        if affine.shift.size not in (1, width):
            raise Halt("has another number of features than the shift", shift=True)
        shift = np.broadcast_to(affine.shift.reshape(-1), (width,))

    def into(flow: Flow) -> None:
        made = absorbed(node, found, scale, shift)
        if isinstance(made, str):
            raise Halt(made, shift=shift is not None)
        flow.end(node, *made[0])
        if affine.shifts and shift is None:
            _behind(walk, node, affine.shift, flow)

    return [Option(node, {}, into)]


def _behind(walk: _Walk, node: Node, shift: Vector, flow: Flow) -> None:
    """An Add behind a node."""
    value, dtype = node.outputs[0], dtype_of(node.outputs[0], walk.facts)
    if dtype is None:
        raise Halt("makes a value of unknown type", shift=True)
    if not fits(value, Affine.of(1.0, shift), walk.transfer):
        raise Halt("makes a value of unknown shape", shift=True)
    flow.additions.append(Addition(value, shift, dtype))


def _matmul(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    """A product of two matrices: the left one takes what scales rows, the right one columns."""
    if affine.shifts:
        raise Halt("multiplies two values, and takes no shift", shift=True)
    axes, options = set(varies(affine.scale)), []
    for index, contracted in ((0, -1), (1, -2)):
        rank = walk.transfer.rank(node.inputs[index])
        if contracted not in axes and (rank is None or rank >= 2):
            options.append(Option(node, {index: affine}))
    if not options:
        raise Halt("multiplies two matrices, which both have a part of the factors")
    return options


def _einsum(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    """The one operand that has the channels takes s; of a factor for all of them a constant."""
    equation = Equation.of(node)
    if equation is None:
        raise Halt("has an equation that takes a diagonal or is not known")
    known = [walk.facts.constant(v) is not None for v in node.inputs]
    if affine.shifts and not any(known):
        raise Halt("multiplies two values, and takes no shift", shift=True)
    axes = varies(affine.scale)
    places = equation.carried(axes)
    if places is None and axes:
        raise Halt("makes each channel from several operands")
    index, to = (
        places if axes and places is not None else (known.index(True) if any(known) else 0, [])
    )
    wanted = Affine.of(carried(affine.scale, dict(zip(axes, to, strict=True))))

    def behind(flow: Flow) -> None:
        if affine.shifts:
            _behind(walk, node, affine.shift, flow)

    return [Option(node, {index: wanted}, behind)]


def _norm(walk: _Walk, node: Node, affine: Affine) -> list[Option]:
    """The scale and bias of a norm, or of a BatchNormalization with fixed statistics."""
    rank = walk.transfer.rank(node.inputs[0])
    told = norm_operator(node, rank)
    if told is None or told.reason or told.scale is None or rank is None:
        raise Halt("makes it, and its scale is not known")
    if any(v.name for v in node.outputs[1:]):
        raise Halt("makes it, and its further outputs are read")
    gamma = walk.facts.constant(node.inputs[told.scale])
    if gamma is None or len(gamma.shape) != 1:
        raise Halt(f"makes it, and its scale '{node.inputs[told.scale].name}' is no constant")
    trailing = node.op in ("LayerNormalization", "RMSNormalization")
    axis = -1 if trailing else 1 - rank
    if set(varies(affine.scale)) - {axis} or set(varies(affine.shift)) - {axis}:
        raise Halt("scales along another axis")
    count = gamma.shape[0]
    if walk.transfer.sizes.dim(node.outputs[0], axis) != count:
        raise Halt("has one factor for several channels")
    scale, shift = (
        v if v.size == 1 else np.broadcast_to(v.reshape(-1), (count,))
        for v in (affine.scale, affine.shift)
    )

    def into(flow: Flow) -> None:
        flow.end(node)
        flow.change(node, told.scale or 0, walk.transfer, scale, bias=False)
        if told.bias is None:
            if affine.shifts:
                raise Halt("has no bias", shift=True)
            return
        given = len(node.inputs) > told.bias and node.inputs[told.bias].name
        if given:
            flow.change(node, told.bias, walk.transfer, scale, shift)
        elif affine.shifts:
            filled = np.broadcast_to(shift, (count,))
            flow.change(node, told.bias, walk.transfer, shift=filled, dtype=gamma.dtype)

    return [Option(node, {}, into)]


_SUMS: Final = frozenset({"Add", "Sub", "Sum", "Mul", "Div", "Max", "Min", "Mean"})
_RULES: Final[dict[str, Callable[[_Walk, Node, Affine], list[Option]]]] = {
    **dict.fromkeys(("Add", "Sub", "Sum"), _add),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("Max", "Min"), _extreme),
    "Mean": _all,
    "Where": _where,
    "Concat": _concat,
    "Einsum": _einsum,
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _linear),
    **dict.fromkeys(
        (
            "BatchNormalization", "GroupNormalization", "InstanceNormalization",
            "LayerNormalization", "RMSNormalization",
        ),
        _norm,
    ),
}  # fmt: skip
