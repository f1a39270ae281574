"""What can be proven of a mask and of the scores that it is added to, for every input.

    interval(v)   the least and the greatest number that v may hold; infinite ends may be met
    shown(m)      which keys every row of the boolean mask m lets through

Scores are what a product of tensors gives, and of those it is taken that they are numbers, no
larger than 2^100: what is infinite there has spoilt the model already. In float16, whose largest
number is 65504, a product may well overflow, so nothing is known of one. All else is interval
arithmetic, rounded as the type has it: the lowest number of a type plus a score is a number,
twice the lowest number is -infinity, and what may be NaN is unknown.

A row of a mask is all entries along its last axis, the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from onnx import TensorProto, numpy_helper

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node
from onnxnorm.sizes import find_sizes, is_size

Interval: TypeAlias = "tuple[float, float]"

EVERY: Final = "every"  # all keys
FIRST: Final = "first"  # the key at index 0
SOME: Final = "some"  # one that may differ from row to row

_PRODUCT: Final = 2.0**100  # what a product of tensors may come to
_LIMIT: Final = 1 << 24  # entries of a constant that are looked at
_DEPTH: Final = 64  # nodes between a product and the softmax, or between a Range and a mask
_PRODUCTS: Final = frozenset({"Conv", "Einsum", "Gemm", "MatMul"})
# What moves entries of its first input, and may repeat or leave out some.
_MOVES: Final = frozenset(
    {
        "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice",
        "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_SWAPPED: Final = {"GreaterOrEqual": "LessOrEqual", "Greater": "Less"}
_OPPOSITE: Final = {"GreaterOrEqual": "Less", "LessOrEqual": "Greater"} | {
    "Less": "GreaterOrEqual", "Greater": "LessOrEqual",
}  # fmt: skip
_INTEGERS: Final[dict[int, Interval]] = {
    TensorProto.BOOL: (0.0, 1.0),
    TensorProto.INT8: (-128.0, 127.0),
    TensorProto.UINT8: (0.0, 255.0),
    TensorProto.INT32: (-(2.0**31), 2.0**31),
    TensorProto.INT64: (-(2.0**63), 2.0**63),
}
# The largest finite number, and half a step beyond: what rounds to it is no infinity.
_FLOATS: Final[dict[int, float]] = {
    TensorProto.FLOAT16: 65504.0 + 16,
    TensorProto.BFLOAT16: (2 - 2.0**-7) * 2.0**127 + 2.0**119,
    TensorProto.FLOAT: (2 - 2.0**-23) * 2.0**127 + 2.0**103,
    TensorProto.DOUBLE: math.inf,  # arithmetic in float64 overflows by itself
}
_ANY: Final = (-math.inf, math.inf)


def find_masks(facts: Facts) -> Masks:
    """What is proven of a graph's masks; it holds as long as the facts do."""
    found: Masks | None = facts.kept.get("masks")
    if found is None:
        found = facts.kept["masks"] = Masks(facts)
    return found


@dataclass(frozen=True)
class _Span:
    """The integers that a value holds: all of them, and at most `first` at index 0 of its rows."""

    low: float
    high: float
    first: float


class Masks:
    """What is proven of the values of a graph that scores and masks are made of.

    Args:
        facts: What is true of the graph.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._intervals: dict[AnyValue, Interval | str] = {}
        self._shown: dict[AnyValue, frozenset[str]] = {}
        self._spans: dict[AnyValue, _Span] = {}

    # ** numbers **

    def interval(self, value: AnyValue, element: int = 0, depth: int = 0) -> Interval | str:
        """The ends of what a value may hold, or why nothing is known of it, as a clause.

        Args:
            value: The value.
            element: Its type, where what reads it says so and inference does not.
            depth: How many nodes are between it and what was asked for.
        """
        if value not in self._intervals:
            found = self._interval(value, element, depth)
            if depth > _DEPTH:
                return found  # it would be known from nearer
            self._intervals[value] = found
        return self._intervals[value]

    def _interval(self, value: AnyValue, element: int, depth: int) -> Interval | str:
        constant = self.facts.constant(value)
        if constant is not None:
            return _of_constant(constant)
        kind = self.facts.type(value)
        element = (0 if kind is None else kind.element) or element
        if element in _INTEGERS:
            return _INTEGERS[element]
        if element not in _FLOATS:
            return f"the type of '{value.name}' is not known"
        node = self.facts.producer(value)
        if node is None:
            return f"'{value.name}' is an input, which may hold anything"
        if node.domain or node.parametric or depth > _DEPTH:
            return f"nothing is known of what {node.op} {node.label} gives"
        if node.op in _PRODUCTS:
            if element == TensorProto.FLOAT16:
                return f"the product '{value.name}' may be infinite, which in float16 is near"
            return -_PRODUCT, _PRODUCT
        if node.op == "ConstantOfShape" and not math.isnan(_filling(node)):
            return _filling(node), _filling(node)
        given: list[Interval] = []
        for read in _numbers_of(node):
            known = self.interval(read, 0 if node.op == "Cast" else element, depth + 1)
            if isinstance(known, str):
                return known
            given.append(known)
        found = _RULES[node.op](given) if node.op in _RULES and given else None
        if found is None:
            return f"nothing is known of what {node.op} {node.label} gives"
        return _rounded(found, element)

    def finite(self, *values: AnyValue, element: int) -> str:
        """Why the sum of some values may be no number, as a clause; "" where it is one.

        Args:
            values: The values.
            element: Their type.
        """
        given: list[Interval] = []
        for value in values:
            ends = self.interval(value, element)
            if isinstance(ends, str):
                return ends
            if not _is_finite(ends):
                return f"'{value.name}' may be infinite"
            given.append(ends)
        total = _sum(given)
        if total is None or not _is_finite(_rounded(total, element)):
            return f"the sum of '{values[0].name}' and others may be infinite"
        return ""

    # ** rows **

    def shown(self, mask: AnyValue, depth: int = 0) -> frozenset[str]:
        """Which entries of each row of a boolean value are true in every run."""
        if mask not in self._shown:
            found = self._shows(mask, depth)
            if depth > _DEPTH:
                return found
            self._shown[mask] = found
        return self._shown[mask]

    def _shows(self, mask: AnyValue, depth: int) -> frozenset[str]:
        constant = self.facts.constant(mask)
        if constant is not None:
            return _shown_by(constant)
        node = self.facts.producer(mask)
        if node is None or node.domain or node.parametric or depth > _DEPTH:
            return frozenset()
        first = node.inputs[0] if node.inputs else mask
        if node.op == "ConstantOfShape":
            return _of(EVERY if _filling(node) else "")
        if node.op in ("And", "Or"):
            one, other = (self.shown(v, depth + 1) for v in node.inputs)
            if node.op == "Or":
                return one | other
            if EVERY in one or EVERY in other:
                return other if EVERY in one else one
            return one & other & {FIRST}
        if node.op == "Cast":
            return self._shown_by_cast(first, depth)
        if node.op == "Trilu":
            # With no number for k, and below, the first key is on the diagonal or left of it.
            left = len(node.inputs) < 2 or not node.inputs[1].name
            below = not node.attrs.get("upper", 1) and (left or self._span(node.inputs[1]).low >= 0)
            return _of(FIRST if below and EVERY in self.shown(first, depth + 1) else "")
        if node.op in _MOVES:
            kept = self.shown(first, depth + 1)
            stays = node.op in ("Expand", "Identity") or self._leads(node)
            return kept if stays else kept & {EVERY}
        compared = node
        op: str | None = node.op
        if op == "Not" and (maker := self.facts.producer(first)) is not None and not maker.domain:
            compared, op = maker, _OPPOSITE.get(maker.op)
        return _of("") if op is None else self._shown_by_comparing(op, compared)

    def _shown_by_cast(self, value: AnyValue, depth: int) -> frozenset[str]:
        """The entries that are not 0."""
        kind = self.facts.type(value)
        if kind is not None and kind.element == TensorProto.BOOL:
            return self.shown(value, depth + 1)
        constant, node = self.facts.constant(value), self.facts.producer(value)
        if constant is not None:
            return _shown_by(constant)
        if node is not None and not node.domain and not node.parametric:
            if node.op == "ConstantOfShape":
                return _of(EVERY if _filling(node) else "")
            if node.op in _MOVES or node.op == "Cast":
                kept = self._shown_by_cast(node.inputs[0], depth + 1) if depth < _DEPTH else _of("")
                return kept & {EVERY}
        return _of("")

    def _shown_by_comparing(self, op: str, node: Node) -> frozenset[str]:
        """Where one integer is below another; NaN is none, so the types are asked."""
        if op not in ("Less", "LessOrEqual", *_SWAPPED) or len(node.inputs) != 2:
            return frozenset()
        for value in node.inputs:
            kind = self.facts.type(value)
            if kind is None or kind.element not in (TensorProto.INT32, TensorProto.INT64):
                return frozenset()
        one, other = map(self._span, node.inputs)
        if op in _SWAPPED:
            op, one, other = _SWAPPED[op], other, one
        if _below(one.high, other.low, op):
            return frozenset({EVERY})
        return _of(FIRST if _below(one.first, other.low, op) else "")

    def _span(self, value: AnyValue, depth: int = 0) -> _Span:
        """The integers of a value; overflow aside, which no index meets."""
        if value not in self._spans:
            found = self._spanned(value, depth)
            if depth > _DEPTH:
                return found
            self._spans[value] = found
        return self._spans[value]

    def _spanned(self, value: AnyValue, depth: int) -> _Span:
        unknown = _Span(*_ANY, math.inf)
        constant = self.facts.constant(value)
        if constant is not None:
            return _span_of(constant) or unknown
        node = self.facts.producer(value)
        if node is None or node.domain or node.parametric or depth > _DEPTH:
            return unknown
        entries = find_sizes(self.facts).entries(value)
        if entries is not None:
            known = entries.reshape(-1).tolist()
            low = min((n if isinstance(n, int) else 0 if is_size(n) else -math.inf for n in known),
                      default=-math.inf)  # fmt: skip
            high = max((n if isinstance(n, int) else math.inf for n in known), default=math.inf)
            return _Span(low, high, high)
        given = [self._span(v, depth + 1) for v in node.inputs if v.name]
        if node.op == "Range":
            start, limit, step = given
            if step.low <= 0:
                return unknown
            return _Span(start.low, limit.high - 1, start.high)
        if node.op in ("Add", "Sub") and len(given) == 2:
            one, other = given
            if node.op == "Add":
                return _Span(one.low + other.low, one.high + other.high, one.first + other.first)
            return _Span(one.low - other.high, one.high - other.low, one.first - other.low)
        if node.op == "Cast":
            kind = self.facts.type(node.inputs[0])
            whole = kind is not None and kind.element in (TensorProto.INT32, TensorProto.INT64)
            return given[0] if whole else unknown
        if node.op in _MOVES:
            moved = given[0]
            stays = node.op in ("Expand", "Identity") or self._leads(node)
            return moved if stays else _Span(moved.low, moved.high, moved.high)
        return unknown

    def _leads(self, node: Node) -> bool:
        """Whether it is an Unsqueeze that leaves the last axis the last."""
        if node.op != "Unsqueeze":
            return False
        sizes = find_sizes(self.facts)
        axes, before = sizes.listed(node, 1, "axes"), sizes.of(node.inputs[0])
        if axes is None or before is None or not before:
            return False
        last = len(before) + len(axes) - 1
        return -1 not in axes and last not in axes


def rows_of(constant: Constant) -> bool:
    """Whether each row of what is added to scores has a number, of at most 2^100, beside -inf."""
    if math.prod(constant.shape) > _LIMIT or not constant.shape:
        return False
    array = constant.float64()
    numbers = abs(array) <= _PRODUCT
    return bool((numbers | (array == -math.inf)).all() and numbers.any(axis=-1).all())


def _below(one: float, other: float, op: str) -> bool:
    """Whether one end is below another; of an infinite one that says nothing."""
    return math.isfinite(one) and (one < other or (op == "LessOrEqual" and one == other))


def _of(what: str) -> frozenset[str]:
    return frozenset({what} - {""})


def _of_constant(constant: Constant) -> Interval | str:
    if math.prod(constant.shape) > _LIMIT or np.dtype(constant.dtype).kind in "SUOc":
        return f"'{constant.name}' is too large to be looked at"
    array = constant.float64().reshape(-1)
    if not array.size:
        return 0.0, 0.0
    low, high = float(array.min()), float(array.max())
    return (low, high) if low <= high else f"'{constant.name}' holds NaN"


def _shown_by(constant: Constant) -> frozenset[str]:
    if math.prod(constant.shape) > _LIMIT:
        return frozenset()
    array = constant.float64() != 0
    if array.all():
        return frozenset({EVERY})
    if not array.ndim:
        return frozenset()
    found = {FIRST: array[..., :1].all() and array.shape[-1], SOME: array.any(axis=-1).all()}
    return frozenset(name for name, holds in found.items() if holds)


def _span_of(constant: Constant) -> _Span | None:
    kind = np.dtype(constant.dtype).kind
    if kind not in "iu" or not 0 < math.prod(constant.shape) <= _LIMIT:
        return None
    array = np.asarray(constant.array())
    first = array[..., 0].max() if array.ndim else array
    return _Span(float(array.min()), float(array.max()), float(first))


def _filling(node: Node) -> float:
    """What ConstantOfShape fills its result with."""
    stated = next((a.t for a in node.proto.attribute if a.name == "value"), None)
    return 0.0 if stated is None else float(numpy_helper.to_array(stated).reshape(-1)[0])


def _numbers_of(node: Node) -> list[AnyValue]:
    """The inputs of a node whose numbers its result is made of."""
    if node.op == "Where":
        return list(node.inputs[1:])
    if node.op in _MOVES or node.op in ("Cast", "Trilu"):
        return list(node.inputs[:1])
    return [value for value in node.inputs if value.name]


# ** intervals **


def _is_finite(ends: Interval) -> bool:
    return -math.inf < ends[0] and ends[1] < math.inf


def _rounded(ends: Interval, element: int) -> Interval:
    """What a type holds of numbers: those beyond its largest are infinite."""
    (low, high), largest = ends, _FLOATS.get(element, 0.0)
    return low if -largest < low else -math.inf, high if high < largest else math.inf


def _hull(given: list[Interval]) -> Interval | None:
    return min(low for low, _ in given), max(high for _, high in given)


def _sum(given: list[Interval]) -> Interval | None:
    low, high = (sum(end) for end in zip(*given, strict=True))
    # -inf plus inf is NaN, also where both are only met in different entries.
    signs = {math.copysign(1, end) for ends in given for end in ends if math.isinf(end)}
    return (low, high) if len(signs) < 2 else None


def _negated(given: list[Interval]) -> Interval | None:
    ((low, high),) = given
    return -high, -low


def _difference(given: list[Interval]) -> Interval | None:
    (low, high) = given[1]
    return _sum([given[0], (-high, -low)])


def _product(given: list[Interval]) -> Interval | None:
    ends = [a * b for a in given[0] for b in given[1]]
    return (min(ends), max(ends)) if all(math.isfinite(e) for g in given for e in g) else None


def _quotient(given: list[Interval]) -> Interval | None:
    low, high = given[1]
    if low <= 0 <= high:
        return None
    return _product([given[0], (1 / high, 1 / low)])


def _tanh(given: list[Interval]) -> Interval | None:
    return -1.0, 1.0


def _greatest(given: list[Interval]) -> Interval | None:
    return max(low for low, _ in given), max(high for _, high in given)


def _least(given: list[Interval]) -> Interval | None:
    return min(low for low, _ in given), min(high for _, high in given)


_RULES: Final[dict[str, Callable[[list[Interval]], Interval | None]]] = {
    **dict.fromkeys((*_MOVES, "Cast", "Concat", "Where"), _hull),
    # Zeros take the place of a triangle.
    "Trilu": lambda given: _hull([*given, (0.0, 0.0)]),
    "Add": _sum,
    "Div": _quotient,
    "Max": _greatest,
    "Min": _least,
    "Mul": _product,
    "Neg": _negated,
    "Sub": _difference,
    "Sum": _sum,
    "Tanh": _tanh,
}
