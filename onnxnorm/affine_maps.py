"""Nodes that compute an affine map of the features with constants.

y = s * x + t        s and t one number for each feature, or one for all
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.norm_operators import batch_norm_affine
from onnxnorm.port import is_real
from onnxnorm.transfer import Transfer, per_feature

Vector = NDArray[np.float64]

_LONGEST: Final = 6  # maps between a value and a sum of two of its maps


@dataclass(frozen=True, eq=False)
class Map:
    """One node that computes y = scale * x + shift with constants.

    Attributes:
        node: The node.
        source: x.
        result: y.
        layout: Where the features are in both.
        scale: One factor for each feature; None for 1.
        shift: One addend for each feature; None for 0.
        nodes: All nodes that compute it, where it is more than one.
    """

    node: Node
    source: AnyValue
    result: AnyValue
    layout: Layout
    scale: Vector | None
    shift: Vector | None
    nodes: tuple[Node, ...] = ()

    @property
    def uniform(self) -> bool:
        """Whether it has one scale for all features."""
        return self.scale is None or bool((self.scale == self.scale[0]).all())


def read_map(node: Node, layout: Layout, transfer: Transfer) -> Map | str | None:
    """A node as an affine map of the features; None where it is none.

    A BatchNormalization, a Mul or Div by constants, an Add or Sub of constants: one number for each
    feature, or one for all. A clause where it is one whose numbers cannot be used.
    """
    if node.domain != "" or not node.outputs or not node.outputs[0].name or not layout.whole:
        return None
    if not node.inputs:
        return None
    result, facts = node.outputs[0], transfer.facts
    if node.op == "BatchNormalization":
        rank = transfer.rank(node.inputs[0])
        if rank is None or not layout.only_axis(1 - rank):
            return None
        read = batch_norm_affine(node, facts)
        if isinstance(read, str):
            return f"is no fixed map: {read}"
        scale, shift = read
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            return "has statistics that give no finite scale and shift"
        if scale.size != layout.features:
            return "has parameters for another number of features"
        return Map(node, node.inputs[0], result, layout, scale, _some(shift))
    if node.op not in ("Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
        return None
    if node.scope.opsets[""] < 7:
        return None
    for of, by in ((0, 1),) if node.op in ("Div", "Sub") else ((0, 1), (1, 0)):
        constant = facts.constant(node.inputs[by])
        if constant is None or not is_real(constant.dtype):
            continue
        if not transfer.covers(node.inputs[of], layout):
            continue
        if len(constant.shape) > (transfer.rank(node.inputs[of]) or 0):
            continue  # its result has another shape, so what reads it is given another
        numbers = _numbers(constant, layout)
        if numbers is None:
            continue
        if node.op == "Div":
            with np.errstate(divide="ignore", invalid="ignore"):
                numbers = 1.0 / numbers
        if not np.isfinite(numbers).all():
            return f"has numbers in '{constant.name}' that are not finite"
        scales = node.op in ("Mul", "Div")
        shift = -numbers if node.op == "Sub" else numbers
        given = (numbers, None) if scales else (None, shift)
        return Map(node, node.inputs[of], result, layout, *given)
    return None


def find_sums(transfer: Transfer) -> dict[Node, Map]:
    """Sums of two maps of one value, as RepBN has them, by every node that belongs to one.

    (s x + t) + (u x + v)  =  (s + u) x + (t + v)
    """
    found: dict[Node, Map] = {}
    for node in transfer.facts.module.nodes():
        if node.op not in ("Add", "Sub") or node.domain != "" or len(node.inputs) != 2:
            continue
        if node in found or node.scope.opsets[""] < 7 or not node.outputs[0].name:
            continue
        step = _sum(node, transfer)
        if step is not None:
            found.update(dict.fromkeys(step.nodes, step))
    return found


def _sum(node: Node, transfer: Transfer) -> Map | None:
    layouts = [
        scaled_features(n, transfer) for v in node.inputs for n in _private(v, node, transfer)
    ]
    layout = next((found for found in layouts if found is not None), None)
    if layout is None or not transfer.covers(node.outputs[0], layout):
        return None
    left, right = (map_chain(v, node, layout, transfer) for v in node.inputs)
    for base, (scale, shift, nodes) in left.items():
        if base not in right or not transfer.covers(base, layout):
            continue
        other, added, more = right[base]
        if not nodes and not more:
            return None  # x + x
        sign = -1.0 if node.op == "Sub" else 1.0
        total = (scale + sign * other, _some(shift + sign * added))
        return Map(node, base, node.outputs[0], layout, *total, (*nodes, *more, node))
    return None


def _private(value: AnyValue, reader: Node, transfer: Transfer) -> Iterator[Node]:
    """What computes a value for one reader alone, and what computes its first input for that."""
    facts = transfer.facts
    for _ in range(_LONGEST):
        node = facts.producer(value)
        uses = facts.uses(value)
        if node is None or facts.pinned(value) is not None or [u.node for u in uses] != [reader]:
            return
        yield node
        known = [facts.constant(v) is not None for v in node.inputs]
        if all(known):
            return
        value, reader = node.inputs[known.index(False)], node


def scaled_features(node: Node, transfer: Transfer) -> Layout | None:
    """The features that a node scales one by one."""
    rank = transfer.rank(node.outputs[0])
    if rank is None or node.domain != "":
        return None
    if node.op == "BatchNormalization":
        axes = [1 - rank] if rank > 1 else []
    elif node.op in ("Mul", "Div") and len(node.inputs) == 2:
        known = [transfer.facts.constant(v) for v in node.inputs]
        if (known[0] is None) == (known[1] is None):
            return None
        shape = next(c for c in known if c is not None).shape
        axes = [at - len(shape) for at, n in enumerate(shape) if n > 1]
    else:
        return None
    sizes = [transfer.sizes.dim(node.outputs[0], a) for a in axes]
    if not axes or not all(isinstance(n, int) and n > 0 for n in sizes):
        return None
    return Layout.whole_axes(axes, [n for n in sizes if isinstance(n, int)])


Chain: TypeAlias = "dict[AnyValue, tuple[Vector, Vector, tuple[Node, ...]]]"


def map_chain(value: AnyValue, reader: Node, layout: Layout, transfer: Transfer) -> Chain:
    """A value as a map of itself and of each value that it is computed from by maps alone.

    Each is scale * v + shift, with the nodes that compute it, which nobody else reads.
    """
    scale, shift = np.ones(layout.features), np.zeros(layout.features)
    nodes: tuple[Node, ...] = ()
    found: Chain = {value: (scale, shift, nodes)}
    for node in _private(value, reader, transfer):
        step = read_map(node, layout, transfer)
        if not isinstance(step, Map):
            break
        if step.shift is not None:
            shift = shift + scale * step.shift
        if step.scale is not None:
            scale = scale * step.scale
        nodes = (node, *nodes)
        found[step.source] = (scale, shift, nodes)
    return found


def _some(vector: Vector) -> Vector | None:
    return vector if vector.any() else None


def _numbers(constant: Constant, layout: Layout) -> Vector | None:
    """A constant as one number for each feature; None where it varies along other axes too."""
    size = int(np.prod(constant.shape))
    if size == 1:
        return np.full(layout.features, float(constant.float64().reshape(-1)[0]))
    return per_feature(constant, layout)
