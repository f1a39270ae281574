"""Remove Transposes and Reshapes that take a value to another layout and back.

    Transpose(Reshape(Reshape(Transpose(x))))  ->  x                where each undoes another
                                               ->  Transpose(x)     where that is what they come to,
                                                                    the one that is there, if one is

Norms of channels are written for images, so around one on tokens exporters put a Transpose and a
Reshape on both sides. Where the norm went into its neighbours these are left, with nothing between.
That they undo each other is proven on the factors of the axes, with the sizes that follow from the
graph's inputs and weights; what a file states of values in between does not count. A Gather whose
indices count up, as exporters write a view with strides, is a Reshape, and an Identity in between
is nothing at all. Exact. Source: the
definitions of these operators in the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node
from onnxnorm.rearrange import MOVES, permutation
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import Sizes, derived_sizes, find_sizes
from onnxnorm.strided import reshapes

_LONGEST: Final = 16  # nodes in a row
_END: Final = 2**31 - 1  # beyond every size: exporters write it for "to the end"


@dataclass(frozen=True)
class FoldLayout(Pass):
    """Remove moves in a row that undo each other, and Slices that cut out what was joined."""

    name: ClassVar = "fold-layout"
    summary: ClassVar = "Transposes and Reshapes that undo each other"
    equation: ClassVar = "Transpose(Reshape(Reshape(Transpose(x)))) -> x"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every value that moves in a row bring back to what they began with."""
        for node in facts.module.nodes():
            if node.op == "Slice":
                yield from _cut(node, facts)
            if node.op == "Identity":
                yield from _same(node, facts)
            if not _moves(node, facts):
                continue
            found = _shorter(node, facts, find_sizes(facts))
            if found is not None:  # what the file states may be stale
                found = _shorter(node, facts, derived_sizes(facts))
            if found is None or found.order:
                found = _known(node, found, facts) or found
            if found is None:
                continue
            # Also what makes the source, so that no other plan of this round takes it away.
            made = facts.producer(found.source)
            claimed = found.run if made is None else tuple(dict.fromkeys((*found.run, made)))
            if not found.order:
                yield _gone(found, node, claimed, facts)
            else:
                yield Plan(node, claimed, found)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Let all that reads the last value read the first, or one Transpose of it."""
        found: _Run = plan.detail
        if found.order:
            rw.replace("Transpose", [found.source], attrs={"perm": list(found.order)})
        else:
            rw.redirect(plan.root.outputs[0], found.source)


@dataclass(frozen=True, eq=False)
class _Run:
    """Moves in a row that come to a permutation.

    Attributes:
        source: What the first reads.
        run: The moves.
        order: The permutation; empty for none.
    """

    source: AnyValue
    run: tuple[Node, ...]
    order: tuple[int, ...]


def _gone(found: _Run, node: Node, claimed: tuple[Node, ...], facts: Facts) -> Plan:
    """The site where all that reads a value reads another in its place."""
    readers = dict.fromkeys(u.node for u in facts.uses(node.outputs[0]))
    results = dict.fromkeys(v for n in readers for v in n.outputs if v.name)
    return Plan(node, claimed, found, inside=tuple(readers), outputs=tuple(results), into="nothing")


def _same(node: Node, facts: Facts) -> Iterator[Plan]:
    """An Identity, which hides from others what makes a value, and who reads it."""
    if node.domain or node.parametric or len(node.inputs) != 1:
        return
    source, result = node.inputs[0], node.outputs[0]
    if source.scope is not node.scope or facts.constant(result) is not None:
        return
    if not facts.uses(result) or facts.pinned(result) is not None:
        return
    made = facts.producer(source)
    claimed = (node,) if made is None else (node, made)
    yield _gone(_Run(source, (node,), ()), node, claimed, facts)


def _cut(node: Node, facts: Facts) -> Iterator[Plan]:
    """A Slice that cuts out exactly what a Concat joined, as class attention does."""
    joined = facts.producer(node.inputs[0]) if node.inputs and not node.domain else None
    if joined is None or joined.op != "Concat" or joined.domain or joined.scope is not node.scope:
        return
    read = facts.uses(node.outputs[0])
    if node.parametric or joined.parametric or not read or facts.pinned(node.outputs[0]):
        return
    found = [_piece(node, joined, s) for s in (find_sizes(facts), derived_sizes(facts))]
    if found[0] is None or found[0] is not found[1] or found[0].scope is not node.scope:
        return
    made = facts.producer(found[0])
    claimed = tuple(n for n in (node, joined, made) if n is not None)
    yield _gone(_Run(found[0], (node,), ()), node, claimed, facts)


def _piece(node: Node, joined: Node, sizes: Sizes) -> AnyValue | None:
    """The input of a Concat that a Slice along the same axis cuts out, whole."""
    starts, ends = sizes.listed(node, 1, "starts"), sizes.listed(node, 2, "ends")
    axes, steps = sizes.listed(node, 3, "axes"), sizes.listed(node, 4, "steps")
    dims = sizes.of(node.inputs[0])
    if dims is None or axes is None or starts is None or ends is None:
        return None
    if len(axes) != 1 or (len(node.inputs) > 4 and node.inputs[4].name and steps != [1]):
        return None
    axis = axes[0] % len(dims)
    if axis != int(joined.attrs.get("axis", 0)) % len(dims):
        return None
    at = 0
    parts: list[AnyValue] = list(joined.inputs)
    for value in parts:
        size = sizes.dim(value, axis - len(dims))
        last = value is parts[-1] and parts.count(value) == 1
        if at == starts[0] and at >= 0:
            known = isinstance(size, int) and ends[0] == at + size
            if known or (last and ends[0] >= _END):
                return value
        if not isinstance(size, int):
            return None
        at += size
    return None


def _known(node: Node, found: _Run | None, facts: Facts) -> _Run | None:
    """The result of an earlier Transpose that is the same one of the same value."""
    if facts.pinned(node.outputs[0]) is not None:
        return None
    if found is None:
        if node.op != "Transpose" or "perm" not in node.attrs:
            return None
        found = _Run(node.inputs[0], (node,), tuple(node.attrs["perm"]))
    for use in facts.uses(found.source):
        other = use.node
        if other.op != "Transpose" or other.domain or other.scope is not node.scope:
            continue
        same = tuple(other.attrs.get("perm", ())) == found.order and other not in found.run
        if same and facts.positions[other] < facts.positions[node]:
            return _Run(other.outputs[0], found.run, ())
    return None


def _moves(node: Node, facts: Facts) -> bool:
    return (
        (node.op in MOVES or reshapes(node, find_sizes(facts)))
        and node.op != "Identity"
        and not node.domain
        and bool(node.outputs and node.inputs)
        and not node.parametric
        and bool(facts.uses(node.outputs[0]) or facts.pinned(node.outputs[0]))
        and facts.constant(node.outputs[0]) is None
    )


def _shorter(node: Node, facts: Facts, sizes: Sizes) -> _Run | None:
    """The longest run of moves that ends here and comes to no move, or to one."""
    run = [node]
    undone: _Run | None = None
    merged: _Run | None = None
    private = True  # whether the moves before the last are read by nobody else
    while True:
        source = run[0].inputs[0]
        if source.scope is not node.scope:
            break
        order = permutation(source, run, sizes)
        if order is not None and order == tuple(range(len(order))):
            undone = _Run(source, tuple(run), ())
        elif order is not None and len(run) > 1 and private:
            merged = _Run(source, tuple(run), order)
        before = facts.producer(source)
        if before is None or len(run) == _LONGEST or not _moves(before, facts):
            break
        private = private and len(facts.uses(source)) == 1 and facts.pinned(source) is None
        run.insert(0, before)
    pinned = facts.pinned(node.outputs[0]) is not None
    return merged if undone is None or pinned else undone
