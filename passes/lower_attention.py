"""Write a softmax between two products, with the projections around it, as one operator.

    q, k, v = x W_i + b_i, each in heads;  y = softmax(c q k^T + m) v, the heads side by side
        ->  y = Attention(x, [W_q W_k W_v], [b_q b_k b_v], , , m),  scale = c

onnxruntime's operator computes the three projections in one go and keeps heads where they are, so
three Reshapes, four Transposes and two additions go. Where the graph has them in one product
already, whose result is brought to (3, batch, heads, sequence, size) and cut there, its weight is
the operator's as it is. The same function over the reals, with the
same products; only for the target `ort-cpu`, where it was measured (`onnxnorm.lowering.ATTENTION`),
and in float32, which is what its kernel takes there. The operator adds m as the nodes do, and a row
of -inf alone gives NaN in both; but m must have a number for each query and key, of one or all
heads and examples. What makes zeros of such rows in the scores keeps its nodes, and so does
cross-attention: the operator projects one x. A factor for each query, to which `eliminate-guard`
brings those zeros, is multiplied with y.

Source: A. Vaswani et al., Attention Is All You Need, 2017; contributed operators of onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.layout import Dims
from onnxnorm.lowering import OLDEST_RUNTIME, attention, version
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import Sizes, derived_sizes, find_sizes

DOMAIN: Final = "com.microsoft"
_TO_HEADS: Final = (0, 2, 1, 3)  # (batch, sequence, heads, size) and back
_TO_KEYS: Final = (0, 2, 3, 1)
_UNPACKED: Final = (2, 0, 3, 1, 4)  # (batch, sequence, 3, heads, size) to what is cut in three
_FLIPPED: Final = (0, 1, 3, 2)
_RANK: Final = 4  # of scores
_AXES_AS_INPUT: Final = 13  # the opset from which on Squeeze reads its axes
_OPERAND: Final = "an operand of its products"


class _Misfit(Exception):
    """Why a softmax between two products is not what the operator computes."""


@dataclass(frozen=True, eq=False)
class _Product:
    """x W + b.

    Attributes:
        source: x, of (batch, sequence, features).
        matrix: W, of (features, width).
        weight: It as a constant.
        vector: b, of (width,); None for none.
        bias: It as a constant.
        nodes: All nodes, the first one last.
    """

    source: AnyValue
    matrix: AnyValue
    weight: Constant
    vector: AnyValue | None
    bias: Constant | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class _Projection:
    """A product, brought into heads.

    Attributes:
        product: The product, of heads * size features; three times as many where it is queries,
            keys and values at once.
        heads: How many heads.
        size: Features of one head.
        nodes: All nodes, the first one last.
    """

    product: _Product
    heads: int
    size: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class _Attention:
    """One place.

    Attributes:
        parts: What makes queries, keys and values; one for all three where they are packed.
        scale: What the scores are multiplied by.
        added: What is added to them then; None for nothing.
        factor: What the product with values is multiplied by, of (batch or 1, 1, sequence or 1, 1);
            None for nothing.
        nodes: All nodes, the last one first.
    """

    parts: tuple[_Projection, ...]
    scale: float
    added: AnyValue | None
    factor: AnyValue | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Write self-attention as one operator of onnxruntime.

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
            if _is_guarded(softmax, facts):
                reason = "rows of -inf alone become 0 behind it, and NaN in the operator"
                yield Refusal(reason, softmax.label, node=softmax, kept=True)
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
            except _Misfit as misfit:
                yield Refusal(str(misfit), softmax.label, node=softmax, kept=True)
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
        root, products = plan.root, [part.product for part in found.parts]
        matrix, vector = products[0].matrix, products[0].vector
        if len(products) > 1:
            weights = [np.asarray(p.weight.array()) for p in products]
            matrix = rw.constant("weights", np.concatenate(weights, axis=1))
        if len(products) > 1 or vector is None:
            biases = [
                np.zeros(p.weight.shape[1], p.weight.dtype)
                if p.bias is None
                else np.asarray(p.bias.array())
                for p in products
            ]
            vector = rw.constant("biases", np.concatenate(biases))
        added = found.added
        constant = None if added is None else rw.facts.constant(added)
        if constant is not None and len(constant.shape) < _RANK:
            array = np.asarray(constant.array())
            added = rw.constant("added", array.reshape((1,) * (_RANK - array.ndim) + array.shape))
        inputs = [products[0].source, matrix, vector, None, None, added]
        attrs = {"num_heads": found.parts[0].heads, "scale": found.scale}
        made, name = root.outputs[0], root.name
        if found.factor is not None:  # the root's name is that of the Mul
            made = rw.fresh("attention", at=root)
            name = made.name
        rw.merge("Attention", inputs, [made], [], at=root, name=name, domain=DOMAIN, attrs=attrs)
        if found.factor is None:
            return
        if root.scope.opsets[""] < _AXES_AS_INPUT:
            factor = rw.add("Squeeze", [found.factor], "factor", attrs={"axes": [1]})
        else:
            axes = rw.constant("axes", np.asarray([1], np.int64))
            factor = rw.add("Squeeze", [found.factor, axes], "factor")
        rw.replace("Mul", [made, factor])


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


def _is_guarded(softmax: Node, facts: Facts) -> bool:
    """Whether numbers take the place of what is none in the result of a softmax."""
    read = {(use.node.op, use.index) for use in facts.uses(softmax.outputs[0])}
    return read == {("IsNaN", 0), ("Where", 2)}


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
    scaled, factor = _factor(mixed, facts)
    spread = _only_reader(scaled, facts, "Transpose", "what it is multiplied with")
    if tuple(spread.attrs.get("perm", ())) != _TO_HEADS:
        raise _Misfit("its heads are not put side by side again")
    joined = _only_reader(spread, facts, "Reshape", "the Transpose behind it")
    scores, scale, added, between = _scores(softmax, facts)
    parts = _parts((*scores.inputs, mixed.inputs[1]), facts, sizes)
    first = parts[0]
    given = sizes.of(first.product.source)
    if given is None or sizes.of(joined.outputs[0]) != (*given[:2], first.heads * first.size):
        raise _Misfit("its result is not known to have the heads side by side")
    if added is not None:
        _check_added(added, given, first.heads, facts, sizes)
    if factor is not None:
        _check_factor(factor, given, sizes)
    inner = (spread, scaled, mixed, softmax, *between, scores, *(n for p in parts for n in p.nodes))
    nodes = (joined, *dict.fromkeys(inner))
    for value in (v for node in nodes[1:] for v in node.outputs if v.name):
        read = value is added or any(use.node not in nodes for use in facts.uses(value))
        if read or facts.pinned(value) is not None:
            raise _Misfit(f"'{value.name}' is needed by others too")
    return _Attention(parts, scale, added, factor, nodes)


def _factor(mixed: Node, facts: Facts) -> tuple[Node, AnyValue | None]:
    """The Mul that alone reads a product with values, and by what; the product itself and None."""
    uses = facts.uses(mixed.outputs[0])
    if len(uses) != 1 or uses[0].node.op != "Mul" or uses[0].node.domain:
        return mixed, None
    factor: AnyValue = uses[0].node.inputs[1 - uses[0].index]
    return uses[0].node, factor


def _check_factor(factor: AnyValue, given: Dims, sizes: Sizes) -> None:
    """A factor for each query of an example can be multiplied with all heads side by side."""
    batch, length, _ = given
    dims = sizes.of(factor)
    if dims is None or len(dims) != _RANK or dims[1] != 1 or dims[3] != 1:
        raise _Misfit("what its result is multiplied by is not known to be the same for all heads")
    if dims[0] not in (1, batch) or dims[2] not in (1, length):
        raise _Misfit("what its result is multiplied by is not known to be one for each query")


def _check_added(added: AnyValue, given: Dims, heads: int, facts: Facts, sizes: Sizes) -> None:
    """What the operator asks of what is added to the scores."""
    batch, length, _ = given
    constant, kind, dims = facts.constant(added), facts.type(added), sizes.of(added)
    if constant is not None and len(constant.shape) < _RANK:
        if facts.readers(constant) > 1:
            raise _Misfit(f"'{constant.name}' is read by others, so it would be stored twice")
        dims = (*(1,) * (_RANK - len(constant.shape)), *constant.shape)
    known = dims is not None and len(dims) == _RANK and dims[2:] == (length, length)
    if dims is None or not known or dims[0] not in (1, batch) or dims[1] not in (1, heads):
        raise _Misfit("what is added to its scores may not be there for each pair of tokens")
    is_float = constant is not None and constant.dtype == np.float32
    if not is_float and (kind is None or kind.element != onnx.TensorProto.FLOAT):
        raise _Misfit(f"the type of '{added.name}' is not known to be float32")


def _parts(operands: tuple[AnyValue, ...], facts: Facts, sizes: Sizes) -> tuple[_Projection, ...]:
    """What makes queries, keys and values: three products of one tensor, or one."""
    if _maker(operands[0], facts, _OPERAND).op in ("Gather", "Squeeze"):
        return (_packed(operands, facts, sizes),)
    queries, keys, values = operands
    parts = (
        _projection(queries, _TO_HEADS, facts, sizes),
        _projection(keys, _TO_KEYS, facts, sizes),
        _projection(values, _TO_HEADS, facts, sizes),
    )
    if any(part.product.source is not parts[0].product.source for part in parts):
        raise _Misfit("queries, keys and values are made of different tensors")
    if len({(p.heads, p.size, p.product.weight.shape) for p in parts}) > 1:
        raise _Misfit("queries, keys and values differ in heads or sizes")
    for constant in (c for p in parts for c in (p.product.weight, p.product.bias)):
        if constant is not None and facts.readers(constant) > 1:
            raise _Misfit(f"'{constant.name}' is read by others, so it would be stored twice")
    return parts


def _only_reader(node: Node, facts: Facts, op: str, what: str) -> Node:
    """The one reader of a node, which has to be this operator."""
    uses = facts.uses(node.outputs[0])
    if len(uses) != 1 or uses[0].node.op != op or uses[0].node.domain or uses[0].index:
        raise _Misfit(f"{what} is not read by one {op}")
    return uses[0].node


def _scores(softmax: Node, facts: Facts) -> tuple[Node, float, AnyValue | None, tuple[Node, ...]]:
    """The product of queries and keys, what it is multiplied by, what is added, and who does so."""
    made = _maker(softmax.inputs[0], facts, "its scores")
    if made.op != "Add":
        product, scale, between = _scaled(made, facts)
        return product, scale, None, between
    for value, added in (tuple(made.inputs), tuple(reversed(made.inputs))):
        maker = facts.producer(value)
        if maker is None or maker.op not in ("MatMul", "Mul", "Div") or maker.domain:
            continue
        with suppress(_Misfit):  # it may be the other operand
            product, scale, between = _scaled(_maker(value, facts, "its scores"), facts)
            return product, scale, added, (made, *between)
    raise _Misfit("neither operand of what adds to its scores is a product times a number")


def _scaled(made: Node, facts: Facts) -> tuple[Node, float, tuple[Node, ...]]:
    """A product of queries and keys, what it is multiplied by, and the node that does so."""
    if made.op == "MatMul":
        return made, 1.0, ()
    if made.op not in ("Mul", "Div"):
        raise _Misfit(f"its scores come from {made.op}")
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
            raise _Misfit(f"its scores come from {product.op}")
        return product, scale, (made,)
    raise _Misfit("its scores are not multiplied by one number")


def _projection(value: AnyValue, order: tuple[int, ...], facts: Facts, sizes: Sizes) -> _Projection:
    """What makes queries, keys or values, back to x."""
    turned = _maker(value, facts, _OPERAND)
    split = _maker(turned.inputs[0], facts, _OPERAND)
    if turned.op != "Transpose" or split.op != "Reshape":
        raise _Misfit("an operand of its products is not a projection that is brought into heads")
    if tuple(turned.attrs.get("perm", ())) != order:
        raise _Misfit("the axes of an operand are in another order")
    product = _product(split.inputs[0], facts)
    heads, size = _heads(product, sizes, split, ())
    return _Projection(product, heads, size, (turned, split, *product.nodes))


def _packed(operands: tuple[AnyValue, ...], facts: Facts, sizes: Sizes) -> _Projection:
    """What makes queries, keys and values in one product, which is cut in three afterwards."""
    flipped = _maker(operands[1], facts, _OPERAND)
    if flipped.op != "Transpose" or tuple(flipped.attrs.get("perm", ())) != _FLIPPED:
        raise _Misfit("the axes of its keys are in another order")
    pieces = [
        _piece(value, facts, sizes) for value in (operands[0], flipped.inputs[0], operands[2])
    ]
    whole = pieces[0][1]
    if any(value is not whole for _, value, _ in pieces):
        raise _Misfit("queries, keys and values are made of different tensors")
    if [at for at, *_ in pieces] != [0, 1, 2]:
        raise _Misfit("queries, keys and values lie in another order")
    turned = _maker(whole, facts, _OPERAND)
    split = _maker(turned.inputs[0], facts, _OPERAND) if turned.op == "Transpose" else turned
    if split.op != "Reshape" or tuple(turned.attrs.get("perm", ())) != _UNPACKED:
        raise _Misfit("what is cut in queries, keys and values has its axes in another order")
    product = _product(split.inputs[0], facts)
    heads, size = _heads(product, sizes, split, (3,))
    cut = [node for *_, nodes in pieces for node in nodes]
    return _Projection(product, heads, size, (flipped, *cut, turned, split, *product.nodes))


def _piece(value: AnyValue, facts: Facts, sizes: Sizes) -> tuple[int, AnyValue, tuple[Node, ...]]:
    """Which entry of the first axis of which value this is, and the nodes that take it."""
    node = _maker(value, facts, _OPERAND)
    if node.op == "Gather" and not node.attrs.get("axis", 0):
        index = facts.constant(node.inputs[1])
        if index is not None and index.shape == ():
            return int(index.integers.item()), node.inputs[0], (node,)
    elif node.op == "Squeeze" and sizes.listed(node, 1, "axes") == [0]:
        cut = _maker(node.inputs[0], facts, _OPERAND)
        if cut.op == "Split" and not cut.attrs.get("axis", 0):
            if all((sizes.of(v) or ("",))[0] == 1 for v in cut.outputs):
                return cut.outputs.index(node.inputs[0]), cut.inputs[0], (node, cut)
        elif cut.op == "Slice" and (start := _taken(cut, sizes)) is not None:
            return start, cut.inputs[0], (node, cut)
    raise _Misfit("an operand of its products is not one of three that lie behind each other")


def _taken(node: Node, sizes: Sizes) -> int | None:
    """The entry of the first axis that a Slice takes; None where it takes something else."""
    starts, ends = sizes.listed(node, 1, "starts"), sizes.listed(node, 2, "ends")
    axes, steps = sizes.listed(node, 3, "axes"), sizes.listed(node, 4, "steps")
    stepped = len(node.inputs) > 4 and bool(node.inputs[4].name) and steps != [1]
    if starts is None or len(starts) != 1 or starts[0] < 0 or axes != [0] or stepped:
        return None
    return starts[0] if ends == [starts[0] + 1] else None


def _product(value: AnyValue, facts: Facts) -> _Product:
    """The product with a constant that makes a value, and the bias behind it."""
    made = _maker(value, facts, "a projection")
    nodes: list[Node] = []
    vector: AnyValue | None = None
    if made.op == "Add":
        nodes.append(made)
        operands = {facts.constant(v) is not None: v for v in made.inputs}
        if len(operands) != 2:
            raise _Misfit("a projection has no constant bias")
        vector = operands[True]
        made = _maker(operands[False], facts, "a projection")
    weight = facts.constant(made.inputs[1]) if made.op == "MatMul" else None
    if weight is None:
        raise _Misfit("a projection is no MatMul with a constant")
    nodes.append(made)
    bias = None if vector is None else facts.constant(vector)
    width = weight.shape[-1]
    if len(weight.shape) != 2 or (bias is not None and bias.shape != (width,)):
        raise _Misfit("a weight is no matrix, or a bias no vector of its width")
    if weight.dtype != np.float32:
        raise _Misfit(f"the operator's kernel is for float32, and this is {weight.dtype}")
    return _Product(made.inputs[0], made.inputs[1], weight, vector, bias, tuple(nodes))


def _heads(product: _Product, sizes: Sizes, split: Node, times: Dims) -> tuple[int, int]:
    """How many heads a Reshape makes of a product, of `times` each, and their size."""
    given, made = sizes.of(product.source), sizes.of(split.outputs[0])
    if given is None or len(given) != 3 or made is None or len(made) != 4 + len(times):
        raise _Misfit("the rank of what is projected is not known to be 3")
    heads, size = made[-2:]
    if made[:-2] != (*given[:2], *times) or not isinstance(heads, int) or not isinstance(size, int):
        raise _Misfit("the sizes of the heads are not known, or are not of one token each")
    if heads <= 0 or math.prod((heads, size, *times)) != product.weight.shape[1]:
        raise _Misfit("the heads are not all that is projected")
    return heads, size


def _maker(value: AnyValue, facts: Facts, what: str) -> Node:
    """The standard operator of the main graph that computes a value."""
    node = facts.producer(value)
    if node is None or node.domain or node.scope is not facts.module.main or node.parametric:
        raise _Misfit(f"{what} is not computed by a standard operator of the main graph")
    return node
