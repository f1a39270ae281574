"""Write a softmax between two products, with the projections around it, as one operator.

    q, k, v = x W_i + b_i, each in heads;  y = softmax(c q k^T) v, the heads side by side
        ->  y = Attention(x, [W_q W_k W_v], [b_q b_k b_v]),  scale = c

onnxruntime's operator computes the three projections in one go and keeps heads where they are, so
three Reshapes, four Transposes and two additions go. The same function over the reals, with the
same products; only for the target `ort-cpu`, where it was measured (`onnxnorm.lowering.ATTENTION`),
and in float32, which is what its kernel takes there. Scores with a mask or a bias keep their nodes,
and so does cross-attention: the operator projects one x.

Source: A. Vaswani et al., Attention Is All You Need, 2017; contributed operators of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.layout import Dims
from onnxnorm.lowering import OLDEST_RUNTIME, attention, version
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import Sizes, derived_sizes, find_sizes

DOMAIN: Final = "com.microsoft"
_TO_HEADS: Final = (0, 2, 1, 3)  # (batch, sequence, heads, size) and back
_TO_KEYS: Final = (0, 2, 3, 1)


class _Misfit(Exception):
    """Why a softmax between two products is not what the operator computes."""


@dataclass(frozen=True, eq=False)
class _Projection:
    """x W + b, brought into heads.

    Attributes:
        source: x, of (batch, sequence, features).
        weight: W, of (features, heads * size).
        bias: b, of (heads * size,); None for none.
        heads: How many heads.
        size: Features of one head.
        nodes: All nodes, the first one last.
    """

    source: AnyValue
    weight: Constant
    bias: Constant | None
    heads: int
    size: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class _Attention:
    """One place.

    Attributes:
        parts: What makes queries, keys and values.
        scale: What the scores are multiplied by.
        nodes: All nodes, the last one first.
    """

    parts: tuple[_Projection, _Projection, _Projection]
    scale: float
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Write self-attention without a mask as one operator of onnxruntime.

    Attributes:
        target: `onnx`, `ort-cpu` or `ort-cuda`; given by --target.
        runtime: The onnxruntime that the model is for; given by --runtime-version.
    """

    target: str = "onnx"
    runtime: str = OLDEST_RUNTIME

    name: ClassVar = "lower-attention"
    summary: ClassVar = "self-attention around a softmax becomes one operator (--target ort-cpu)"
    equation: ClassVar = "softmax(c (x W_q) (x W_k)^T) (x W_v) -> Attention(x, [W_q W_k W_v])"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every Softmax whose result is multiplied with values."""
        if self.target != "ort-cpu":
            return
        for softmax in facts.module.nodes():
            if softmax.op != "Softmax" or softmax.domain:
                continue
            if not _is_between_products(softmax, facts):
                continue
            form = attention(self.target, version(self.runtime))
            if isinstance(form, str):
                yield Refusal(form, softmax.label, node=softmax, kept=True)
                continue
            try:
                _found(softmax, facts, find_sizes(facts))
                # What a file states may be stale.
                found = _found(softmax, facts, derived_sizes(facts))
            except _Misfit as reason:
                yield Refusal(str(reason), softmax.label, node=softmax, kept=True)
                continue
            yield Plan(
                found.nodes[0],
                found.nodes,
                found,
                anchors=(softmax.outputs[0],),
                action="lowered",
                into=form.name,
            )

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Join the weights and write the operator."""
        found: _Attention = plan.detail
        root, first = plan.root, found.parts[0]
        weights = [np.asarray(part.weight.array()) for part in found.parts]
        biases = [
            np.zeros(w.shape[1], w.dtype) if part.bias is None else np.asarray(part.bias.array())
            for part, w in zip(found.parts, weights, strict=True)
        ]
        inputs = [
            first.source,
            rw.constant("weights", np.concatenate(weights, axis=1)),
            rw.constant("biases", np.concatenate(biases)),
        ]
        attrs = {"num_heads": first.heads, "scale": found.scale}
        rw.merge(
            "Attention", inputs, [root.outputs[0]], [], at=root, name=root.name, domain=DOMAIN,
            attrs=attrs,
        )  # fmt: skip


def _is_between_products(softmax: Node, facts: Facts) -> bool:
    """Whether a softmax over the last of four axes is multiplied with something at run time."""
    uses = facts.uses(softmax.outputs[0])
    dims = find_sizes(facts).of(softmax.inputs[0])
    return (
        len(uses) == 1
        and uses[0].node.op == "MatMul"
        and uses[0].index == 0
        and facts.constant(uses[0].node.inputs[1]) is None
        and dims is not None
        and len(dims) == 4
        and softmax.scope is uses[0].node.scope
    )


def _found(softmax: Node, facts: Facts, sizes: Sizes) -> _Attention:
    """The attention around a softmax.

    Raises:
        _Misfit: It is another one than the operator computes.
    """
    if softmax.scope is not facts.module.main:
        raise _Misfit("it is in a body or a function")
    default = -1 if softmax.scope.opsets[""] >= 13 else 1  # and all behind it, then
    if softmax.attrs.get("axis", default) not in (-1, 3) or softmax.parametric:
        raise _Misfit("it is not over the keys")
    mixed = facts.uses(softmax.outputs[0])[0].node
    spread = _only_reader(mixed, facts, "Transpose", "what it is multiplied with")
    if tuple(spread.attrs.get("perm", ())) != _TO_HEADS:
        raise _Misfit("its heads are not put side by side again")
    joined = _only_reader(spread, facts, "Reshape", "the Transpose behind it")
    scores, scale, between = _scores(softmax, facts)
    queries = _projection(scores.inputs[0], _TO_HEADS, facts, sizes)
    keys = _projection(scores.inputs[1], _TO_KEYS, facts, sizes)
    values = _projection(mixed.inputs[1], _TO_HEADS, facts, sizes)
    parts = (queries, keys, values)
    if any(part.source is not queries.source for part in parts):
        raise _Misfit("queries, keys and values are made of different tensors")
    if len({(p.heads, p.size, p.weight.shape) for p in parts}) > 1:
        raise _Misfit("queries, keys and values differ in heads or sizes")
    given = sizes.of(queries.source)
    if given is None or sizes.of(joined.outputs[0]) != (*given[:2], queries.heads * queries.size):
        raise _Misfit("its result is not known to have the heads side by side")
    inner = (spread, mixed, softmax, *between, scores, *(n for p in parts for n in p.nodes))
    for node in inner:
        if facts.pinned(node.outputs[0]) is not None or len(facts.uses(node.outputs[0])) != 1:
            raise _Misfit(f"'{node.outputs[0].name}' is needed by others too")
    return _Attention(parts, scale, (joined, *inner))


def _only_reader(node: Node, facts: Facts, op: str, what: str) -> Node:
    """The one reader of a node, which has to be this operator."""
    uses = facts.uses(node.outputs[0])
    if len(uses) != 1 or uses[0].node.op != op or uses[0].node.domain or uses[0].index:
        raise _Misfit(f"{what} is not read by one {op}")
    return uses[0].node


def _scores(softmax: Node, facts: Facts) -> tuple[Node, float, tuple[Node, ...]]:
    """The product of queries and keys, what it is multiplied by, and the node that does so."""
    made = _maker(softmax.inputs[0], facts, "its scores")
    if made.op == "MatMul":
        return made, 1.0, ()
    if made.op not in ("Mul", "Div"):
        raise _Misfit(f"its scores come from {made.op}, as a mask or a bias is added")
    for value, other in (tuple(made.inputs), tuple(reversed(made.inputs))):
        known = facts.constant(other)
        if known is None or known.shape not in ((), (1,)):
            continue
        if made.op == "Div" and value is made.inputs[1]:
            continue
        factor = float(known.float64().reshape(-1)[0])
        scale = factor if made.op == "Mul" else 1 / factor if factor else 0.0
        if not np.isfinite(np.float32(scale)) or not np.float32(scale):
            raise _Misfit(f"its scores are multiplied by {scale:g}")
        product = _maker(value, facts, "its scores")
        if product.op != "MatMul":
            raise _Misfit(f"its scores come from {product.op}, as a mask or a bias is added")
        return product, scale, (made,)
    raise _Misfit("its scores are not multiplied by one number")


def _projection(value: AnyValue, order: tuple[int, ...], facts: Facts, sizes: Sizes) -> _Projection:
    """What makes queries, keys or values, back to x."""
    turned = _maker(value, facts, "an operand of its products")
    split = _maker(turned.inputs[0], facts, "an operand of its products")
    if turned.op != "Transpose" or split.op != "Reshape":
        raise _Misfit("an operand of its products is not a projection that is brought into heads")
    if tuple(turned.attrs.get("perm", ())) != order:
        raise _Misfit("the axes of an operand are in another order")
    nodes = [turned, split]
    made = _maker(split.inputs[0], facts, "a projection")
    bias: Constant | None = None
    if made.op == "Add":
        nodes.append(made)
        operands = {facts.constant(v) is not None: v for v in made.inputs}
        if len(operands) != 2:
            raise _Misfit("a projection has no constant bias")
        bias = facts.constant(operands[True])
        made = _maker(operands[False], facts, "a projection")
    weight = facts.constant(made.inputs[1]) if made.op == "MatMul" else None
    if weight is None:
        raise _Misfit("a projection is no MatMul with a constant")
    nodes.append(made)
    source = made.inputs[0]
    given, heads = sizes.of(source), sizes.of(split.outputs[0])
    _check_sizes(given, heads, weight, bias)
    assert heads is not None
    assert isinstance(heads[2], int)
    assert isinstance(heads[3], int)
    for constant in (weight, bias):
        if constant is not None and facts.readers(constant) > 1:
            raise _Misfit(f"'{constant.name}' is read by others, so it would be stored twice")
    return _Projection(source, weight, bias, heads[2], heads[3], tuple(nodes))


def _check_sizes(
    given: Dims | None, heads: Dims | None, weight: Constant, bias: Constant | None
) -> None:
    if given is None or len(given) != 3 or heads is None or len(heads) != 4:
        raise _Misfit("the rank of what is projected is not known to be 3")
    if heads[:2] != given[:2] or not all(isinstance(d, int) and d > 0 for d in heads[2:]):
        raise _Misfit("the sizes of the heads are not known, or are not of one token each")
    width = weight.shape[-1]
    if len(weight.shape) != 2 or (bias is not None and bias.shape != (width,)):
        raise _Misfit("a weight is no matrix, or a bias no vector of its width")
    if heads[2] * heads[3] != width:  # type: ignore[operator]
        raise _Misfit("the heads are not all that is projected")
    if weight.dtype != np.float32:
        raise _Misfit(f"the operator's kernel is for float32, and this is {weight.dtype}")


def _maker(value: AnyValue, facts: Facts, what: str) -> Node:
    """The standard operator of the main graph that computes a value."""
    node = facts.producer(value)
    if node is None or node.domain or node.scope is not facts.module.main or node.parametric:
        raise _Misfit(f"{what} is not computed by a standard operator of the main graph")
    return node
