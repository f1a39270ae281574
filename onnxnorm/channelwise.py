"""Constant affine maps per channel that are written with Mul, Add, Sub and Div.

    y = s * x + t,   s and t constant vectors along one axis

With a scale and a shift it is a batch normalization whose statistics were written out. With one of
them it is a channel affine, and a row only where it follows or feeds a linear operator or a norm,
for there it can be folded; the bias behind a linear operator is that operator's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue
from onnxnorm.module import Node
from onnxnorm.moment_rules import Moments
from onnxnorm.norm_operators import Axes, norm_operator
from onnxnorm.port import MIXING

Vector = NDArray[np.float64]

_LAYOUT: Final = frozenset(
    {"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
# What else an affine map can flow through on its way to a linear operator.
_PASSED: Final = _LAYOUT | {
    "Abs", "AveragePool", "DepthToSpace", "Gather", "GlobalAveragePool", "GlobalMaxPool",
    "LeakyRelu", "MaxPool", "Neg", "PRelu", "Pad", "ReduceMax", "ReduceMean", "Relu", "Resize",
    "Slice", "SpaceToDepth", "Split", "Upsample",
}  # fmt: skip
_JOINS: Final = frozenset({"Add", "Concat", "Max", "Min", "Mul", "Sub", "Sum", "Where"})
_PLACES: Final = frozenset(
    {"Add", "AveragePool", "Concat", "GlobalAveragePool", "MaxPool", "Relu"}
)  # behind which batch normalizations stand, besides linear operators
_BENDS: Final = frozenset({"Abs", "Max", "Min", "Relu"})
# What an activation in pieces is written with, besides those.
_STRAIGHT: Final = frozenset({"Add", "Div", "Mul", "Neg", "Sub"})
_PLAIN: Final = frozenset({"Einsum", "MatMul"})  # linear operators without a place for a bias
_QUANTIZED: Final = frozenset({"ConvInteger", "MatMulInteger"})
_HOPS: Final = 4  # layout operators between an affine and its linear neighbour
_PIECES: Final = 8  # operators of one branch of an activation


@dataclass(frozen=True)
class Affine:
    """One chain y = s * x + t.

    Attributes:
        kind: `batch_norm` or `channel_affine`.
        base: x.
        nodes: The chain, in order; the last computes y.
        scale: s, right-aligned to x; None for 1.
        shift: t; None for 0.
        axes: All axes but that of the channels; None where the rank is not known.
        epsilon: What was added to the variance where the graph still says so.
    """

    kind: str
    base: AnyValue
    nodes: tuple[Node, ...]
    scale: Vector | None
    shift: Vector | None
    axes: Axes
    epsilon: float | None


@dataclass(frozen=True)
class _Chain:
    base: AnyValue
    nodes: tuple[Node, ...]
    scale: Vector
    shift: Vector
    axis: int | None  # from the right, as in the constants
    constants: tuple[AnyValue, ...]


class Channelwise:
    """Finds the affine maps of one scope.

    Args:
        moments: Knows constants and copies.
        claimed: Nodes that belong to a norm already.
    """

    def __init__(self, moments: Moments, claimed: frozenset[Node]) -> None:
        self._moments = moments
        self._facts = moments.facts
        self._claimed = claimed
        self._chains: dict[AnyValue, _Chain] = {}

    def affines(self, order: Sequence[Node]) -> Iterator[Affine]:
        """Every longest chain, in graph order."""
        for node in order:
            if node not in self._claimed and node.domain == "":
                chain = self._chain(node)
                if chain is not None:
                    self._chains[node.outputs[0]] = chain
        for value, chain in list(self._chains.items()):
            if not any(n in self._chains_into(value) for n in chain.nodes[-1:]):
                affine = self._affine(chain)
                if affine is not None:
                    yield affine

    def _chains_into(self, value: AnyValue) -> set[Node]:
        """The last node of this chain, if the next node goes on with it."""
        uses = self._facts.uses(value)
        if len(uses) != 1 or self._facts.pinned(value) is not None:
            return set()
        after = self._chains.get(uses[0].node.outputs[0]) if uses[0].node.outputs else None
        own = self._chains[value].nodes[-1]
        return {own} if after is not None and own in after.nodes else set()

    def _chain(self, node: Node) -> _Chain | None:
        if node.op not in ("Add", "Div", "Mul", "Sub") or len(node.inputs) != 2:
            return None
        if node.scope.opsets.get("", 7) < 7 or not node.outputs[0].name:
            return None
        left, right = node.inputs
        statics = self._moments.statics
        constant = statics.array(right)
        value, other, swapped = left, right, False
        if constant is None:
            constant, value, other, swapped = statics.array(left), right, left, True
            if constant is None or node.op == "Div":
                return None
        elif statics.array(left) is not None:
            return None
        axis = _axis(constant)
        if axis is None and constant.size > 1:
            return None
        if self._moments.rank(value) is not None and not self._moments.fits(constant, value):
            return None
        before = self._chains.get(value)
        alone = len(self._facts.uses(value)) == 1 and self._facts.pinned(value) is None
        if before is None or not alone or (None not in (axis, before.axis) and axis != before.axis):
            before = _Chain(value, (), np.ones(()), np.zeros(()), None, ())
        scale, shift = before.scale, before.shift
        with np.errstate(all="ignore"):
            if node.op == "Mul":
                scale, shift = scale * constant, shift * constant
            elif node.op == "Div":
                scale, shift = scale / constant, shift / constant
            elif node.op == "Add":
                shift = shift + constant
            elif swapped:
                scale, shift = -scale, constant - shift
            else:
                shift = shift - constant
        return _Chain(
            before.base,
            (*before.nodes, node),
            scale,
            shift,
            axis if before.axis is None else before.axis,
            (*before.constants, other),
        )

    def _affine(self, chain: _Chain) -> Affine | None:
        chain = self._without_bias(chain)
        if not chain.nodes or chain.axis is None:
            return None
        scales = chain.scale.size > 1
        shifts = chain.shift.size > 1 and bool(chain.shift.any())
        if not np.isfinite(chain.scale).all() or not np.isfinite(chain.shift).all():
            return None
        whole = scales and shifts and not self._follows(chain.base, norm=True)
        if whole and {n.op for n in chain.nodes} == {"Mul", "Add"} and self._epsilon(chain) is None:
            # Nothing but its place says that these are folded statistics.
            source = self._moments.source(chain.base)
            made, scope = self._facts.producer(source), chain.nodes[0].scope
            told = not scope.is_function if made is None else made.op in _PLACES
            whole = told or self._follows(chain.base, products=False)
        if not whole:
            if self._is_slope(chain):
                return None
            near = self._follows(chain.base) or self._feeds(chain.nodes[-1].outputs[0])
            if not near:
                return None
        rank = self._moments.rank(chain.base)
        axes = None
        if rank is not None:
            channel = rank + chain.axis
            axes = tuple(a for a in range(rank) if a != channel)
        return Affine(
            "batch_norm" if whole else "channel_affine",
            chain.base,
            chain.nodes,
            chain.scale if scales or float(chain.scale.reshape(-1)[0]) != 1 else None,
            chain.shift if chain.shift.any() else None,
            axes,
            self._epsilon(chain) if whole else None,
        )

    def _without_bias(self, chain: _Chain) -> _Chain:
        """The chain behind the Adds that are the bias of a linear operator."""
        if not self._lacks_bias(chain.base):
            return chain
        bias = 0
        while bias < len(chain.nodes) and chain.nodes[bias].op == "Add":
            bias += 1
        if bias == 0:
            return chain
        rest = chain.nodes[bias:]
        if not rest:
            return _Chain(chain.base, (), chain.scale, chain.shift, None, ())
        start = chain.nodes[bias - 1].outputs[0]
        self._chains.pop(start, None)
        again: _Chain | None = None
        kept = dict(self._chains)
        for node in rest:
            again = self._chain(node)
            if again is None:
                break
            self._chains[node.outputs[0]] = again
        self._chains = kept
        return again if again is not None else chain

    def _lacks_bias(self, value: AnyValue) -> bool:
        """Whether an Add behind a value is the bias of what makes it.

        Of a linear operator it is; also behind the Reshape of one that has no place for a bias, and
        behind the scale of one on quantized numbers.
        """
        made = self._facts.producer(value)
        if made is None or made.domain:
            return False
        if made.op in MIXING:
            return True
        if made.op == "Mul":
            casts = [self._facts.producer(v) for v in made.inputs]
            whole = [self._facts.producer(c.inputs[0]) for c in casts if c and c.op == "Cast"]
            return any(m is not None and not m.domain and m.op in _QUANTIZED for m in whole)
        for _ in range(_HOPS):
            if made is None or made.domain or made.op not in _LAYOUT - {"Transpose"}:
                break
            made = self._facts.producer(made.inputs[0])
        return made is not None and not made.domain and made.op in _PLAIN

    def _epsilon(self, chain: _Chain) -> float | None:
        """What is added to a constant vector under a root, where the graph computes that."""
        pending, seen = list(chain.constants), set()
        rooted = False
        while pending:
            value = pending.pop()
            node = self._facts.producer(value)
            if node is None or node in seen:
                continue
            seen.add(node)
            rooted = rooted or node.op in ("Pow", "Sqrt")
            if node.op == "Add" and rooted:
                arrays = [self._moments.statics.array(v) for v in node.inputs]
                sizes = [a.size if a is not None else 0 for a in arrays]
                if 1 in sizes and max(sizes) > 1:
                    epsilon = arrays[sizes.index(1)]
                    if epsilon is not None:
                        return float(f"{float(epsilon.reshape(-1)[0]):.7g}")
            pending += node.inputs
        return None

    def _follows(self, value: AnyValue, *, norm: bool = False, products: bool = True) -> bool:
        """Whether a linear operator or a norm computes a value, up to what a map flows through.

        With `norm`, whether a norm does, up to layout. Without `products`, not through those of
        computed values, as a gate or a GELU written out is one.
        """
        pending = [(value, 0)]
        while pending:
            at, hops = pending.pop()
            node = self._facts.producer(at)
            if node is None or hops == _HOPS:
                continue
            if node in self._claimed or norm_operator(node, None) is not None:
                return True
            if node.domain:
                continue
            if node.op in MIXING:
                if not norm:
                    return True
            elif node.op in (_LAYOUT if norm else _PASSED):
                pending += [(v, hops + 1) for v in node.inputs[:1]]
            elif node.op in _JOINS and not norm and (products or node.op not in ("Div", "Mul")):
                dynamic = [v for v in node.inputs if self._facts.constant(v) is None]
                # With a constant it is an affine map itself, but for the bias of a MatMul.
                if len(dynamic) == len(node.inputs) or node.op in ("Add", "Concat", "Max", "Min"):
                    pending += [(v, hops + 1) for v in dynamic]
        return False

    def _is_slope(self, chain: _Chain) -> bool:
        """Whether a scale is the slope of an activation in pieces, which no map flows through.

        PReLU is written so where a runtime lacks it: Relu(x) - a Relu(-x), Max(x, 0) + a Min(x, 0),
        Relu(x) + a (x - Abs(x)) / 2. All branches are made of one x, and it bends.
        """
        after = self._facts.uses(chain.nodes[-1].outputs[0])
        if chain.shift.any() or len(after) != 1 or after[0].node.op not in ("Add", "Sub", "Sum"):
            return False
        scaled, bends = self._pieces(chain.base)
        inputs = after[0].node.inputs
        others = [self._pieces(v) for at, v in enumerate(inputs) if at != after[0].index]
        if after[0].node.domain or not others or not scaled:
            return False
        return all(of == scaled for of, _ in others) and (bends or any(b for _, b in others))

    def _pieces(self, value: AnyValue) -> tuple[frozenset[AnyValue], bool]:
        """What a value is in pieces a linear function of, without constants, and whether it bends.

        Empty where that is more than an activation is made of.
        """
        leaves, seen, bends = set[AnyValue](), set[Node](), False
        pending = [value]
        while pending:
            at = self._moments.source(pending.pop())
            node = self._facts.producer(at)
            if self._facts.constant(at) is not None:
                continue
            inside = node is not None and not node.domain and node.op in _BENDS | _STRAIGHT
            if node is None or not inside:
                leaves.add(at)
            elif node not in seen:
                seen.add(node)
                bends = bends or node.op in _BENDS
                pending += node.inputs
            if len(seen) > _PIECES:
                return frozenset(), False
        return frozenset(leaves), bends

    def _feeds(self, value: AnyValue) -> bool:
        """Whether a linear operator or a norm reads a value, up to layout."""
        pending = [(value, 0)]
        while pending:
            at, hops = pending.pop()
            for use in self._facts.uses(at):
                if use.node.domain:
                    continue
                if use.node.op in MIXING or use.node in self._claimed:
                    return True
                if norm_operator(use.node, None) is not None and use.index == 0:
                    return True
                if use.node.op in _PASSED | _JOINS and hops < _HOPS:
                    pending += [(v, hops + 1) for v in use.node.outputs if v.name]
        return False


def _axis(constant: Vector) -> int | None:
    """The one axis along which a constant varies, counted from the right; None for none."""
    along = [a - constant.ndim for a, n in enumerate(constant.shape) if n > 1]
    return along[0] if len(along) == 1 else None
