"""What Transposes and Reshapes in a row do to the elements of a tensor.

    value axis  =  a run of factors of the axes it began with

Every axis of the first value is one factor. A Transpose permutes axes, a Reshape cuts their factors
where it has to and runs them together anew; an axis of size 1 has no factors. Two values hold the
same elements in the same places where their axes are the same runs. Sizes may be names: a factor is
cut only where both parts are known numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from onnxnorm.facts import AnyValue
from onnxnorm.layout import Dim, Dims
from onnxnorm.module import Node
from onnxnorm.sizes import Sizes, factors
from onnxnorm.strided import reshapes

MOVES: Final = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(eq=False)
class _Factor:
    size: Dim
    parts: list[_Factor] = field(default_factory=list)

    def leaves(self) -> Iterator[_Factor]:
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


_Axes: TypeAlias = "list[list[_Factor]]"


def permutation(source: AnyValue, nodes: Sequence[Node], sizes: Sizes) -> tuple[int, ...] | None:
    """The one Transpose that moves, each on the result of the one before, come to.

    Moves are nodes of `MOVES`, and those that `onnxnorm.strided.reshapes` finds to be a Reshape.

    Args:
        source: What the first of them reads.
        nodes: In the order in which they run.
        sizes: Of the graph's values.

    Returns:
        The axis of `source` that each axis of the result is; None where it is no permutation of
        whole axes, or that is not known.
    """
    before = sizes.of(source)
    if before is None or 0 in before:
        return None
    first: _Axes = [[] if size == 1 else [_Factor(size)] for size in before]
    axes: _Axes | None = [list(run) for run in first]
    for node in nodes:
        dims = sizes.of(node.outputs[0])
        if dims is None or axes is None:
            return None
        if node.op == "Gather" and not reshapes(node, sizes):
            return None
        if node.op == "Transpose":
            axes = _transposed(node, axes)
        elif node.op != "Identity":
            axes = _regrouped(axes, dims)
    if axes is None or len(axes) != len(first):
        return None
    left = dict(enumerate(map(_leaves, first)))
    order: list[int] = []
    for run in axes:
        same = next((at for at, leaves in left.items() if leaves == _leaves(run)), None)
        if same is None:
            return None
        del left[same]  # axes of size 1 are alike: the first stands for the first
        order.append(same)
    return tuple(order)


def _leaves(run: Sequence[_Factor]) -> list[_Factor]:
    return [leaf for factor in run for leaf in factor.leaves()]


def _transposed(node: Node, axes: _Axes) -> _Axes | None:
    order = node.attrs.get("perm", range(len(axes))[::-1])
    if node.parameter("perm") is not None or sorted(order) != list(range(len(axes))):
        return None
    return [axes[axis] for axis in order]


def _regrouped(axes: _Axes, dims: Dims) -> _Axes | None:
    """The same factors in the same order, as runs that make these sizes."""
    left = [leaf for run in axes for leaf in _leaves(run)]
    made: _Axes = []
    for dim in dims:
        run: list[_Factor] = []
        number, names = factors([dim])
        wanted = list(names)
        while number != 1 or wanted:
            if not left:
                return None
            factor = left.pop(0)
            size, named = factors([factor.size])
            if all(wanted.count(n) >= named.count(n) for n in named) and number % size == 0:
                number //= size
                for name in named:
                    wanted.remove(name)
            elif not named and not wanted and size % number == 0:
                factor.parts = [_Factor(number), _Factor(size // number)]
                factor, rest = factor.parts
                left.insert(0, rest)
                number = 1
            else:
                return None
            run.append(factor)
        made.append(run)
    return made if not left else None
