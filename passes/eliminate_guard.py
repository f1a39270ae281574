"""Take away what puts 0 where a softmax has NaN, or do it once for each query.

    Where(IsNaN(p), 0, p)         ->  p                  p = Softmax(z) has no NaN
    Where(IsNaN(p), 0, p) v       ->  any(c) * (p v)     z = s + Where(c, a, -inf)
                                      with z = s + Where(c, a, Where(any(c), -inf, 0))

torch's scaled_dot_product_attention with a mask is exported with such a guard, over all scores of
all heads. A softmax of numbers has a NaN only in a row of nothing but -inf, so the guard goes where
no row can be one (`onnxnorm.masks`): what is added is finite, as the lowest number of a type is, or
each row of the mask provably lets a key through, as a causal one does. Where an example may be
nothing but padding, a row of the mask that is empty lets all keys through, and what it gives is
multiplied by 0. All other rows are bit for bit what they were. any(c) is of the mask, not of the
scores, and v has fewer columns than most sequences have keys.

Exact over the reals for finite scores and values. Where a score is infinite or NaN, in float32 as
in the other types, the guard wrote 0 and the result is NaN; float16, in which a product may well
overflow, is refused for that.

Source: torch.nn.functional.scaled_dot_product_attention; the operator specification of ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.masks import find_masks, rows_of
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes

_FACTORS: Final = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)  # types of a factor
_AXES_AS_INPUT: Final = 18  # the opset from which on ReduceMax reads its axes
_ALONG: Final = frozenset({"Expand", "Identity"})  # what keeps the rows of a mask


class _Misfit(Exception):
    """Why a guard stays."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True, eq=False)
class _Guard:
    """What makes numbers of what is none.

    Attributes:
        value: The softmax.
        root: The Where.
        nodes: It, and what computes its condition.
        filling: What stands where NaN was.
    """

    value: AnyValue
    root: Node
    nodes: tuple[Node, ...]
    filling: AnyValue


@dataclass(frozen=True, eq=False)
class _Mask:
    """A Where that puts -inf in place of scores, or of what is added to them.

    Attributes:
        node: The Where.
        shows: Whether -inf stands where its condition is false.
    """

    node: Node
    shows: bool

    @property
    def condition(self) -> AnyValue:
        """What it reads first."""
        value: AnyValue = self.node.inputs[0]
        return value

    @property
    def kept(self) -> AnyValue:
        """What stands where it lets a key through."""
        value: AnyValue = self.node.inputs[1 if self.shows else 2]
        return value

    @property
    def lowest(self) -> AnyValue:
        """-inf."""
        value: AnyValue = self.node.inputs[2 if self.shows else 1]
        return value


@dataclass(frozen=True, eq=False)
class _Moved:
    """A guard that becomes a factor.

    Attributes:
        guard: The guard.
        mask: What puts -inf into the scores.
        reader: The Add that reads the mask; None where the mask makes the scores themselves.
        product: The product with v.
        rank: Of the mask's condition.
    """

    guard: _Guard
    mask: _Mask
    reader: Node | None
    product: Node
    rank: int


@dataclass(frozen=True)
class EliminateGuard(Pass):
    """Take away the Where and IsNaN behind a softmax, or multiply a row of its product by 0."""

    name: ClassVar = "eliminate-guard"
    summary: ClassVar = "zeros for rows that are masked throughout, from the mask or not at all"
    equation: ClassVar = "Where(IsNaN(p), 0, p) v -> any(mask) * (p v)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every Softmax over the last axis whose NaN is replaced."""
        for softmax in facts.module.nodes():
            if softmax.op != "Softmax" or softmax.domain:
                continue
            guard = find_guard(softmax, facts)
            if guard is None:
                continue
            probabilities = softmax.outputs[0]
            try:
                moved = _planned(softmax, guard, facts)
            except _Misfit as misfit:
                at = misfit.node or guard.root
                yield Refusal(str(misfit), at.label, node=softmax)
                continue
            if moved is None:
                yield Plan(
                    guard.root,
                    guard.nodes,
                    guard,
                    anchors=(probabilities,),
                    action="lowered",
                    into="Softmax",
                )
                continue
            made = facts.producer(softmax.inputs[0])
            assert made is not None, "a mask is in front of it"
            yield Plan(
                moved.product,
                (moved.product, *guard.nodes, made),
                moved,
                anchors=(probabilities,),
                inside=(softmax,),
                action="lowered",
                into="Softmax and one factor for each query",
            )

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Let what reads the guard read the softmax; or mask no row throughout, and multiply."""
        if isinstance(plan.detail, _Guard):
            rw.redirect(plan.root.outputs[0], plan.detail.value)
            return
        moved: _Moved = plan.detail
        mask, product = moved.mask, moved.product
        at = moved.reader or mask.node
        element = _element(moved.guard.filling, rw.facts)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        zero = rw.constant("zero", np.zeros((), dtype), at=at)
        shown: AnyValue = mask.condition
        if not mask.shows:
            shown = rw.add("Not", [shown], "shown", at=at)
        numbers = rw.add("Cast", [shown], "ones", attrs={"to": element}, at=at)
        if at.scope.opsets[""] < _AXES_AS_INPUT:
            attrs = {"axes": [moved.rank - 1], "keepdims": 1}
            factor = rw.add("ReduceMax", [numbers], "any", attrs=attrs, at=at)
        else:
            axes = rw.constant("axes", np.asarray([moved.rank - 1], np.int64), at=at)
            factor = rw.add("ReduceMax", [numbers, axes], "any", attrs={"keepdims": 1}, at=at)
        some = rw.add("Cast", [factor], "some", attrs={"to": onnx.TensorProto.BOOL}, at=at)
        lowest = rw.add("Where", [some, mask.lowest, zero], "lowest", at=at)
        if moved.reader is None:
            rw.rewire(mask.node, 2 if mask.shows else 1, lowest)
        else:
            branches = [mask.kept, lowest] if mask.shows else [lowest, mask.kept]
            added = rw.add("Where", [mask.condition, *branches], "mask", at=at)
            index = next(i for i, v in enumerate(at.inputs) if v is mask.node.outputs[0])
            rw.rewire(at, index, added)
        unmasked = rw.add("MatMul", [moved.guard.value, product.inputs[1]], "unmasked")
        rw.replace("Mul", [unmasked, factor])


def find_guard(softmax: Node, facts: Facts) -> _Guard | None:
    """What puts a constant where a softmax is NaN; None for nothing.

    Where(IsNaN(p), c, p), Where(Not(IsNaN(p)), p, c) and Where(Equal(p, p), p, c).
    """
    value = softmax.outputs[0]
    for use in facts.uses(value):
        root = use.node
        if root.op != "Where" or root.domain or use.index == 0:
            continue
        condition = facts.producer(root.inputs[0])
        nodes = [root]
        is_nan = True
        while condition is not None and condition.op == "Not" and not condition.domain:
            nodes.append(condition)
            condition, is_nan = facts.producer(condition.inputs[0]), not is_nan
        if condition is None or condition.domain or condition.inputs[0] is not value:
            continue
        if condition.op == "Equal" and condition.inputs[1] is value:
            is_nan = not is_nan
        elif condition.op != "IsNaN":
            continue
        if use.index == (2 if is_nan else 1) and root.inputs[3 - use.index] is not value:
            return _Guard(value, root, (*nodes, condition), root.inputs[3 - use.index])
    return None


def _planned(softmax: Node, guard: _Guard, facts: Facts) -> _Moved | None:
    """How a guard becomes a factor; None where it can go as it is.

    Raises:
        _Misfit: Neither is so.
    """
    if facts.pinned(guard.root.outputs[0]) is not None:
        raise _Misfit(f"'{guard.root.outputs[0].name}' is an output or read in a body")
    if softmax.scope is not guard.root.scope or softmax.parametric:
        raise _Misfit("the softmax and what makes zeros of its NaN are not of one graph")
    dims = find_sizes(facts).of(softmax.inputs[0])
    default = -1 if softmax.scope.opsets[""] >= 13 else 1
    axis = softmax.attrs.get("axis", default)
    if axis != -1 and (dims is None or axis != len(dims) - 1):
        raise _Misfit("the softmax is not over the last axis")
    filling = facts.constant(guard.filling)
    if filling is None or math.prod(filling.shape) != 1:
        raise _Misfit("what stands in place of NaN is no constant")
    if dims is None or len(filling.shape) > len(dims):
        raise _Misfit("the shape of the scores is not known")
    scores = softmax.inputs[0]
    element = _element(guard.filling, facts)
    if element == onnx.TensorProto.FLOAT16:
        raise _Misfit("scores of float16 may be infinite, and the rows of those become zeros too")
    reason = find_masks(facts).finite(scores, element=element)
    if not reason:
        return None
    made = facts.producer(scores)
    found: tuple[_Mask, Node | None] | None = None
    if made is not None and made.op == "Add" and not made.domain:
        for index, value in enumerate(made.inputs):
            other = made.inputs[1 - index]
            known = facts.constant(value)
            if known is not None and rows_of(known):
                _check_finite(facts, element, other)
                return None
            mask = _mask(value, facts)
            if mask is not None:
                _check_finite(facts, element, other, mask.kept)
                if _shows_a_key(mask, facts):
                    return None
                if mask.node.outputs[0] is value:
                    found = mask, made
                else:
                    raise _Misfit("what masks its scores is moved before it is added", made)
    elif (mask := _mask(scores, facts)) is not None and mask.node.outputs[0] is scores:
        _check_finite(facts, element, mask.kept)
        if _shows_a_key(mask, facts):
            return None
        found = mask, None
    if found is None:
        raise _Misfit(f"rows of its scores may be NaN: {reason}")
    return _moved(softmax, guard, *found, facts)


def _moved(softmax: Node, guard: _Guard, mask: _Mask, reader: Node | None, facts: Facts) -> _Moved:
    """What a guard becomes where rows of the mask may be empty.

    Raises:
        _Misfit: Others would see it, or it would not pay.
    """
    sizes = find_sizes(facts)
    probabilities, guarded, scores = softmax.outputs[0], guard.root.outputs[0], softmax.inputs[0]
    if _number(guard.filling, facts):
        raise _Misfit("rows may be masked throughout, and what stands in place of NaN is not 0")
    if _element(guard.filling, facts) not in _FACTORS:
        raise _Misfit("rows may be masked throughout, and only float32 and float64 were tried")
    uses = facts.uses(guarded)
    if len(uses) != 1 or uses[0].node.op != "MatMul" or uses[0].index or uses[0].node.domain:
        raise _Misfit(
            f"rows may be masked throughout, and '{guarded.name}' is not read by a MatMul"
        )
    product = uses[0].node
    scopes = {product.scope, (reader or mask.node).scope, softmax.scope}
    if len(scopes) > 1:
        raise _Misfit("rows may be masked throughout, and the mask and the product are elsewhere")
    between = [(node.outputs[0], guard.nodes) for node in guard.nodes[1:]]
    for value, allowed in ((scores, (softmax,)), (probabilities, guard.nodes), *between):
        if facts.pinned(value) is not None or any(
            use.node not in allowed for use in facts.uses(value)
        ):
            raise _Misfit(f"rows may be masked throughout, and '{value.name}' is needed by others")
    columns, keys = sizes.of(product.inputs[1]), sizes.of(scores)
    condition = sizes.of(mask.condition)
    if columns is None or len(columns) < 2 or keys is None or not condition:
        raise _Misfit("the shapes of its mask and of what it is multiplied with are not known")
    # Axes are aligned at the end; the mask has to be of fewer entries than the scores, by heads.
    spared = any(
        have != 1 and (axis == -2 or isinstance(have, int))
        for axis, have in zip(range(-2, -len(keys) - 1, -1), keys[-2::-1], strict=True)
        if len(condition) < -axis or condition[axis] == 1
    )
    if not spared:
        raise _Misfit("rows may be masked throughout, and the mask is as large as the scores")
    if isinstance(keys[-1], int) and isinstance(columns[-1], int) and 4 * keys[-1] < columns[-1]:
        raise _Misfit(f"{columns[-1]} features of a head are more than {keys[-1]} keys")
    return _Moved(guard, mask, reader, product, len(condition))


def _check_finite(facts: Facts, element: int, *values: AnyValue) -> None:
    """The sum of values of a type is a number.

    Raises:
        _Misfit: That is not known.
    """
    if reason := find_masks(facts).finite(*values, element=element):
        raise _Misfit(f"rows of its scores may be NaN: {reason}")


def _mask(value: AnyValue, facts: Facts) -> _Mask | None:
    """The Where with one -inf that makes a value, behind what keeps its rows."""
    node = facts.producer(value)
    while node is not None and node.op in _ALONG and not node.domain:
        node = facts.producer(node.inputs[0])
    if node is None or node.op != "Where" or node.domain:
        return None
    for index in (1, 2):
        lowest = facts.constant(node.inputs[index])
        if lowest is None or math.prod(lowest.shape) != 1:
            continue
        if lowest.float64().item() == -math.inf:
            return _Mask(node, index == 2)
    return None


def _shows_a_key(mask: _Mask, facts: Facts) -> bool:
    """Whether each row of a mask lets a key through, whatever the model is given."""
    return mask.shows and bool(find_masks(facts).shown(mask.condition))


def _number(value: AnyValue, facts: Facts) -> float:
    constant = facts.constant(value)
    assert constant is not None, "it was found to be one"
    return float(constant.float64().item())


def _element(value: AnyValue, facts: Facts) -> int:
    constant = facts.constant(value)
    assert constant is not None, "it was found to be one"
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(constant.dtype)))
