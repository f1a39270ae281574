"""Give an operator a constant shape where the graph puts one together in every run.

    Reshape(x, [batch, 16 * h, d])  ->  Reshape(x, [0, 16 * h, d])     where x begins with batch
                                    ->  Reshape(x, [-1, 16 * h, d])    where that is the one unknown
    Expand(x, [batch, n, d])        ->  Expand(x, [1, n, d])           likewise; 1 keeps what x has
    ConstantOfShape([1, batch, d])  ->  ConstantOfShape([1, 2, d])     where the batch is 2

Exporters write a shape of which one size is not known as Shape, Gather, Unsqueeze and Concat, for
each of the Reshapes around a norm or an attention. Reshape copies a size by itself, and finds one
that is not known by itself, so those nodes go. Sizes follow from the graph's inputs and weights,
and not from what a file states of values in between. Exact, on every input that the model accepts:
one for which its own Reshape fails may now pass. Source: the definitions of these operators in the
ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.constants import find_constants
from onnxnorm.facts import Facts
from onnxnorm.layout import Dim, Dims
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import derived_sizes, factors, find_sizes, told

_SHAPE: Final = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1}  # the input that is the shape


@dataclass(frozen=True)
class FoldSizes(Pass):
    """Replace the shape that a Reshape, Expand or ConstantOfShape reads by a constant."""

    name: ClassVar = "fold-sizes"
    summary: ClassVar = "shapes that the graph puts together although the operator knows the rest"
    equation: ClassVar = "Reshape(x, [batch, n, d]) -> Reshape(x, [0, n, d])"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every Reshape, Expand and ConstantOfShape of the main graph with a computed shape.

        A body runs with shapes that may differ from turn to turn, so it keeps its own.
        """
        for node in facts.module.nodes():
            if not _reads_a_computed_shape(node, facts):
                continue
            # What the file states is asked first: that is known already, and often not enough.
            asked = node.inputs[_SHAPE[node.op]]
            if find_sizes(facts).entries(asked) is None:
                continue
            sizes = derived_sizes(facts)
            wanted = sizes.entries(asked)
            if wanted is None or wanted.ndim != 1:
                continue
            entries, before = tuple(wanted.tolist()), sizes.of(node.inputs[0])
            if node.op == "Reshape":
                allowzero = bool(node.attrs.get("allowzero", 0))
                found = _reshaped(entries, before, sizes.of(node.outputs[0]), allowzero)
            elif node.op == "Expand":
                found = _expanded(entries, before)
            elif all(isinstance(dim, int) for dim in entries):
                found = np.asarray(entries, np.int64)
            else:
                continue  # ConstantOfShape finds no size by itself
            if isinstance(found, str):
                yield Refusal(found, node.label, _advice(entries, before), node=node)
                continue
            # What is cut out to be run by itself has to fit together, from the first Shape on.
            origin = find_constants(facts).origin(asked)
            yield Plan(node, (node,), found, inside=origin, outputs=(node.outputs[0],))

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Let the operator read the constant."""
        shape = rw.constant("shape", plan.detail)
        rw.replace_like(plan.root, [*plan.root.inputs[: _SHAPE[plan.root.op]], shape])


def _reads_a_computed_shape(node: Node, facts: Facts) -> bool:
    return (
        node.op in _SHAPE
        and not node.domain
        and not node.parametric
        and node.scope is facts.module.main
        and len(node.inputs) == _SHAPE[node.op] + 1
        and facts.constant(node.inputs[_SHAPE[node.op]]) is None
    )


def _advice(wanted: Dims, before: Dims | None) -> str:
    """What the user could do: give sizes that the file names their numbers."""
    _, names = factors([*wanted, *(before or ())])
    named = [f"'{name}'" for name in dict.fromkeys(names) if told(name)]
    if not named:
        return ""
    return f"Where {' or '.join(named)} never varies, give the model's inputs the number."


def _reshaped(
    wanted: Dims, before: Dims | None, after: Dims | None, allowzero: bool
) -> NDArray[np.int64] | str:
    """The shape for a Reshape, or what stands in the way."""
    if before is not None and 0 not in wanted and -1 not in wanted:
        (number, names), (other, others) = factors(before), factors(wanted)
        if sorted(names) == sorted(others) and number != other:
            return "what it reads has another number of elements, so it fails in every run"
    if after is not None and len(after) != len(wanted):
        after = None  # what inference says of it cannot be
    shape: list[int] = []
    open_places: list[tuple[int, Dim]] = []  # sizes that are neither known nor copied
    copied: list[Dim] = []
    for at, dim in enumerate(wanted):
        if isinstance(dim, int):
            derived = after[at] if dim == -1 and after is not None else dim
            shape.append(derived if isinstance(derived, int) and derived > 0 else dim)
            if shape[-1] == -1:
                open_places.append((at, dim))
            elif dim == 0 and allowzero:
                return "a size is 0"
        elif not allowzero and before is not None and at < len(before) and before[at] == dim:
            shape.append(0)
            copied.append(dim)
        else:
            shape.append(-1)
            open_places.append((at, dim))
    if len(open_places) > 1:
        *first, last = (f"{at}{told(dim)}" for at, dim in open_places)
        return (
            f"sizes {', '.join(first)} and {last} of its shape are not known before the model"
            " runs, and a Reshape finds only one"
        )
    if open_places and open_places[0][1] != -1 and (copied or 0 in shape):
        at, dim = open_places[0]
        return (
            f"size {at}{told(dim)} of its shape is not known before the model runs, and a Reshape"
            f" finds none beside a size that may be 0"
        )
    return np.asarray(shape, np.int64)


def _expanded(wanted: Dims, before: Dims | None) -> NDArray[np.int64] | str:
    """The shape for an Expand, or what stands in the way."""
    if before is None:
        return "the rank of what is expanded is not known"
    first = len(before) - len(wanted)  # axes are aligned at the end
    shape: list[int] = []
    for at, dim in enumerate(wanted, first):
        if isinstance(dim, str) and (at < 0 or before[at] != dim):
            return f"size {at - first}{told(dim)} of its shape is not known before the model runs"
        shape.append(dim if isinstance(dim, int) else 1)
    return np.asarray(shape, np.int64)
