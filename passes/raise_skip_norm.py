"""Take onnxruntime's fused residual norms and embedding norms apart into what they compute.

    SkipLayerNormalization(x, skip, g, b, bias)
        ->  s = x + bias + skip,  LayerNormalization(s, g, b)
    SkipSimplifiedLayerNormalization(x, skip, g, bias)  ->  s,  RMSNormalization(s, g)
    EmbedLayerNormalization(ids, segments, words, places, kinds, g, b)
        ->  s = words[ids] + places[position] + kinds[segments],  LayerNormalization(s, g, b)

Exact over the reals; s is rounded to the type of the model where the fused kernel may hold it in
float32. A file that onnxruntime's optimizer wrote hides its residual stream in these operators:
what `stream-fold-mean` has to find is the sum. To be asked for, because on CUDA the fused operators
are faster. Below opset 23 an RMS norm is written as onnxruntime's SimplifiedLayerNormalization, and
below 17 LayerNormalization is onnxruntime's operator of that name.

Source: the schemas of com.microsoft in onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter

_DOMAIN: Final = "com.microsoft"
_EPSILON: Final = 1e-12  # the schemas' default
# operator -> which output holds the sum, and which others nobody may read
_TAKEN: Final[dict[str, tuple[int, tuple[int, ...]]]] = {
    "SkipLayerNormalization": (3, (1, 2)),
    "SkipSimplifiedLayerNormalization": (3, (1, 2)),
    "EmbedLayerNormalization": (2, (1,)),
}


@dataclass(frozen=True)
class RaiseSkipNorm(Pass):
    """Write Skip- and EmbedLayerNormalization as sums and norms."""

    name: ClassVar = "raise-skip-norm"
    summary: ClassVar = "onnxruntime's Skip- and EmbedLayerNormalization become sums and norms"
    equation: ClassVar = "SkipLayerNormalization(x, s, g, b) -> LayerNormalization(x + s, g, b)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        for node in facts.module.nodes():
            if node.domain == _DOMAIN and node.op in _TAKEN and node.outputs:
                reason = _obstacle(node, facts)
                into = f"Add and {_norm_of(node)}"
                if reason:
                    yield Refusal(reason, node.label, node=node)
                else:
                    yield Plan(node, (node,), None, action="converted", into=into)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        node = plan.root
        given = [v if v.name else None for v in node.inputs]
        given += [None] * (9 - len(given))
        embeds = node.op == "EmbedLayerNormalization"
        total = _embedded(given, rw) if embeds else _skipped(node, given, rw)
        simple = node.op.startswith("SkipSimplified")
        scale, shift = given[5:7] if embeds else (given[2], None if simple else given[3])
        place = _TAKEN[node.op][0]
        if len(node.outputs) > place and node.outputs[place].name:
            rw.redirect(node.outputs[place], total)
        attrs = {"axis": -1, "epsilon": float(node.attrs.get("epsilon", _EPSILON))}
        rw.replace(_norm_of(node), [total, scale, shift], attrs=attrs)


def _norm_of(node: Node) -> str:
    if not node.op.startswith("SkipSimplified"):
        return "LayerNormalization"
    modern = node.scope.opsets[""] >= 23
    return "RMSNormalization" if modern else "SimplifiedLayerNormalization"


def _obstacle(node: Node, facts: Facts) -> str:
    """Why a node has to stay; "" where nothing says so."""
    if name := node.parameter("epsilon", "mask_index_type"):
        return f"{name} is a parameter of the function"
    place, others = _TAKEN[node.op]
    for index, value in enumerate(node.outputs):
        if not value.name or index == 0:
            continue
        pinned = facts.pinned(value)
        if index in others and (pinned or facts.uses(value)):
            return f"its output '{value.name}' is read, which the norm by itself does not have"
        if index == place and pinned:
            return f"the sum '{value.name}' is {pinned}"
    if node.op == "EmbedLayerNormalization":
        known = facts.type(node.inputs[0])
        if known is None or known.shape is None or len(known.shape) != 2:
            return f"the rank of '{node.inputs[0].name}' is not known to be 2"
        if node.scope.opsets[""] < 10 and not _has(node, 8):
            return "below opset 10 the positions cannot be cut to the length of the input"
    return ""


def _has(node: Node, index: int) -> bool:
    return len(node.inputs) > index and bool(node.inputs[index].name)


def _skipped(node: Node, given: list[AnyValue | None], rw: Rewriter) -> AnyValue:
    """The sum x + bias + skip."""
    bias = given[3] if node.op.startswith("SkipSimplified") else given[4]
    value = given[0]
    if bias is not None:
        value = rw.add("Add", [value, bias], "biased")
    return rw.add("Add", [value, given[1]], "sum")


def _embedded(given: list[AnyValue | None], rw: Rewriter) -> AnyValue:
    """The embeddings of words, places and kinds together."""
    ids, segments, words, places, kinds = given[:5]
    positions = given[8]
    total = rw.add("Gather", [words, ids], "words")
    if positions is not None:
        placed = rw.add("Gather", [places, positions], "places")
    else:
        # The first rows of the table, as many as the input has columns.
        numbers = [rw.constant(n, np.asarray([i], np.int64)) for n, i in (("0", 0), ("1", 1))]
        zero, one = numbers
        two = rw.constant("2", np.asarray([2], np.int64))
        length = rw.add("Slice", [rw.add("Shape", [ids], "shape"), one, two], "length")
        placed = rw.add("Slice", [places, zero, length, zero], "places")
    total = rw.add("Add", [total, placed], "placed")
    if segments is not None and kinds is not None:
        total = rw.add("Add", [total, rw.add("Gather", [kinds, segments], "kinds")], "sum")
    return total
