"""Bring the factors of a tensor together before they meet it.

    x n g + b + x  ->  x (n g + 1) + b        n has size 1 on an axis of x, g and b are constants

A factor n that is computed for each channel or each token is smaller than x, and so is n g + 1:
where there were four passes over x, one or two are left, and an addition of constants behind it is
one that other passes fold into the operator behind. This is global response normalization, whose n
is |x| / mean |x| over the channels, the gates of a layer scale, and a gate beside a skip path.

Exact over the reals. In floating point n g + 1 is rounded where n g x + x was, relative to the same
number. Nodes of a norm stay: a mean that is subtracted first is what makes a norm accurate. Source:
ConvNeXt V2 (arXiv:2301.00808), and the definition of broadcasting in the ONNX specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.float64 import is_float_type
from onnxnorm.layout import Dim
from onnxnorm.module import Node
from onnxnorm.norms import find_norms
from onnxnorm.port import is_real, rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import Sizes, find_sizes

Array: TypeAlias = NDArray[np.float64]
Factors: TypeAlias = tuple[AnyValue, ...]  # computed; their product, in the order of the graph

_OPERATORS: Final = frozenset({"Add", "Mul", "Sub"})


@dataclass(frozen=True)
class MergeFactors(Pass):
    """Multiply the small factors of a tensor with each other, and then the tensor."""

    name: ClassVar = "merge-factors"
    summary: ClassVar = "the factors of a tensor, which are smaller than it, into one"
    equation: ClassVar = "x n g + b + x -> x (n g + 1) + b"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every largest sum of products of one tensor that fewer operators can compute."""
        affine: dict[Node, AnyValue] = {}
        kept: set[Node] = set()
        for norm in find_norms(facts):
            if norm.kind in ("batch_norm", "channel_affine"):
                affine.update(dict.fromkeys(norm.nodes, norm.output))
            else:
                kept.update(norm.nodes)
        done: set[Node] = set()
        for scope in facts.module.scopes:
            for node in reversed(facts.in_order(scope)):
                if node in done:
                    continue
                found = _read(node, facts, kept)
                if found is None:
                    continue
                done.update(found.nodes)
                if why := found.misfit():
                    yield Refusal(why, node.label, node=node)
                    continue
                anchors = dict.fromkeys(affine[n] for n in found.nodes if n in affine)
                anchors.pop(node.outputs[0], None)
                yield Plan(node, found.nodes, found, anchors=tuple(anchors))

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """The factor, one Mul, and at most one Add."""
        found: _Merged = plan.detail
        scales = sorted(found.sum.scales.items(), key=lambda pair: not pair[0])  # constants last
        terms = [_term(rw, found, factors, scale) for factors, scale in scales]
        factor = terms[0]
        for term in terms[1:]:
            factor = rw.add("Add", [factor, term], "factor")
        shift = found.constant(found.sum.shift)
        if not shift.any():
            rw.replace("Mul", [found.base, factor])
            return
        product = rw.add("Mul", [found.base, factor], "product")
        rw.replace("Add", [product, rw.constant("shift", shift)])


def _term(rw: Rewriter, found: _Merged, factors: Factors, scale: Array) -> AnyValue:
    """One constant times its computed factors."""
    constant = found.constant(scale)
    if not factors:
        return rw.constant("scale", constant)
    term = factors[0]
    for each in factors[1:]:
        term = rw.add("Mul", [term, each], "factors")
    if (constant == 1).all():
        return term
    return rw.add("Mul", [term, rw.constant("scale", constant)], "scaled")


@dataclass(frozen=True, eq=False)
class _Sum:
    """x (the sum of scale * factors) + shift, scale and shift constant."""

    scales: Mapping[Factors, Array]
    shift: Array = field(default_factory=lambda: np.zeros(()))

    def plus(self, other: _Sum, sign: float) -> _Sum:
        scales = dict(self.scales)
        for factors, scale in other.scales.items():
            scales[factors] = scales.get(factors, np.zeros(())) + sign * scale
        return _Sum(scales, self.shift + sign * other.shift)

    def times(self, other: _Sum) -> _Sum | None:
        """The product with what does not hold x, where the shift stays constant."""
        if other.scales.keys() == {()}:
            scale = other.scales[()]
            return _Sum({f: s * scale for f, s in self.scales.items()}, self.shift * scale)
        if self.shift.any():
            return None
        return _Sum(
            {(*f, *g): s * o for f, s in self.scales.items() for g, o in other.scales.items()}
        )

    def operators(self) -> int:
        """How many compute it, that on x included."""
        found = len(self.scales) + bool(self.shift.any())
        for factors, scale in self.scales.items():
            found += max(len(factors) - 1, 0) + bool(factors and (scale != 1).any())
        return found


@dataclass(frozen=True, eq=False)
class _Merged:
    base: AnyValue
    sum: _Sum
    nodes: tuple[Node, ...]
    dtype: np.dtype[Any]

    def constant(self, array: Array) -> NDArray[Any]:
        return rounded(array, self.dtype)

    def misfit(self) -> str | None:
        """Why its constants cannot be stored."""
        with np.errstate(over="ignore"):
            arrays = [self.constant(a) for a in (*self.sum.scales.values(), self.sum.shift)]
        if all(np.isfinite(a.astype(np.float64)).all() for a in arrays):
            return None
        return f"the product or sum of its constants is not finite in {self.dtype}"


class _Reader:
    """Reads a tree of Add, Sub and Mul over one tensor.

    Args:
        dims: The sizes of the tensor.
        facts: What is true of the graph.
        kept: Nodes that stay.
    """

    def __init__(self, dims: tuple[Dim, ...], facts: Facts, kept: set[Node]) -> None:
        self._dims = dims
        self._facts = facts
        self._sizes: Sizes = find_sizes(facts)
        self._kept = kept
        self.base: AnyValue | None = None
        self.nodes: list[Node] = []
        # The axes, from the right, on which every factor has size 1.
        self.free = {axis for axis in range(-len(dims), 0) if dims[axis] != 1}

    def node(self, node: Node) -> _Sum | None:
        """What a node computes; None where it is not of the form."""
        self.nodes.append(node)
        left, right = node.inputs
        small = [self._small(v) for v in node.inputs]
        if node.op == "Mul":
            if (small[0] is None) == (small[1] is None):
                return None
            known, other = (small[0], right) if small[1] is None else (small[1], left)
            whole = self._large(other)
            assert known is not None, "one of the two is"
            return None if whole is None else whole.times(known)
        sides = [self._shift(v) or self._large(v) for v in node.inputs]
        if sides[0] is None or sides[1] is None:
            return None
        return sides[0].plus(sides[1], -1.0 if node.op == "Sub" else 1.0)

    def _large(self, value: AnyValue) -> _Sum | None:
        """A value that has the sizes of the tensor."""
        if self._sizes.of(value) != self._dims:
            return None
        made = self._facts.producer(value)
        free = made is not None and _is_step(made) and made not in self._kept
        if made is not None and free and self._facts.alone(value):
            return self.node(made)
        if self.base is not None and self.base is not value:
            return None
        self.base = value
        return _Sum({(): np.ones(())})

    def _shift(self, value: AnyValue) -> _Sum | None:
        """A constant that is added, and does not make the tensor larger."""
        constant = self._facts.constant(value)
        if constant is None or not is_real(constant.dtype) or not self._fits(constant.shape):
            return None
        return _Sum({}, constant.float64())

    def _small(self, value: AnyValue) -> _Sum | None:
        """A factor that leaves an axis of the tensor free."""
        constant = self._facts.constant(value)
        dims = self._sizes.of(value) if constant is None else constant.shape
        if dims is None or not self._fits(dims):
            return None
        free = {a for a in self.free if len(dims) < -a or dims[a] == 1}
        if not free:
            return None
        if constant is not None and not is_real(constant.dtype):
            return None
        self.free = free
        if constant is not None:
            return _Sum({(): constant.float64()})
        return _Sum({(value,): np.ones(())})

    def _fits(self, dims: tuple[Dim, ...]) -> bool:
        """Whether a value of these sizes broadcasts over the tensor without making it larger."""
        if len(dims) > len(self._dims):
            return False
        return all(d in (1, self._dims[a - len(dims)]) for a, d in enumerate(dims))


def _is_step(node: Node) -> bool:
    return node.op in _OPERATORS and not node.domain and len(node.inputs) == 2


def _read(node: Node, facts: Facts, kept: set[Node]) -> _Merged | None:
    """What a node computes, where that takes fewer operators on the tensor, and no more in all."""
    if not _is_step(node) or node in kept or node.scope.opsets.get("", 0) < 7:
        return None
    known = facts.type(node.outputs[0])
    dims = find_sizes(facts).of(node.outputs[0])
    if known is None or not is_float_type(known.element) or not dims:
        return None
    reader = _Reader(dims, facts, kept)
    found = reader.node(node)
    if found is None or reader.base is None or not any(found.scales):
        return None
    large = 1 + bool(found.shift.any())
    if len(reader.nodes) <= large or len(reader.nodes) < found.operators():
        return None
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(known.element))
    return _Merged(reader.base, found, tuple(reader.nodes), dtype)
