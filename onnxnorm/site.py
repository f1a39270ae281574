"""A norm in its surroundings: what decides how it can be written."""

from __future__ import annotations

from dataclasses import dataclass

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.forms import NARROW
from onnxnorm.layout import Dims
from onnxnorm.norms import Norm


@dataclass(frozen=True)
class Site:
    """A norm, and what decides how it can be written.

    Attributes:
        norm: The norm.
        target: One of `TARGETS`; in a function always "onnx", for onnxruntime (1.31) dies on its
            own operators there when it inlines the function.
        opset: Of ONNX's own domain in its scope.
        shape: Dims of its input; None where the rank is unknown.
        given: Element type of the input; 0 where unknown.
        wanted: Element type of the output; 0 where unknown.
        centred: Whether its input is a difference with some mean, so that the chain of an RMS norm
            behind it would look like that of a layer norm to onnxruntime.
        scaled: Whether a constant vector that is no part of it multiplies its output, which
            onnxruntime would take into a chain all the same.
    """

    norm: Norm
    target: str
    opset: int
    shape: Dims | None
    given: int
    wanted: int
    centred: bool
    scaled: bool

    @classmethod
    def of(cls, norm: Norm, facts: Facts, target: str) -> Site:
        """A norm in its surroundings."""
        before, after = facts.type(norm.input), facts.type(norm.output)
        given = before.element if before is not None else 0
        return cls(
            norm,
            "onnx" if norm.node.scope.outermost.is_function else target,
            norm.node.scope.opsets[""],
            norm.dims,
            given,
            after.element if after is not None and after.element else given,
            _is_centred(norm.input, facts),
            norm.gamma is None and _is_scaled(norm.output, facts),
        )

    @property
    def rank(self) -> int | None:
        """How many dims the input has."""
        return None if self.shape is None else len(self.shape)

    @property
    def trailing(self) -> bool:
        """Whether the axes are the last ones."""
        axes, rank = self.norm.axes or (), self.rank
        if rank is None:
            return tuple(axes) == tuple(range(-len(axes), 0)) and bool(axes)
        # Where only sizes know the rank, the norm has its axes from the right.
        placed = tuple(a % rank for a in axes)
        return placed == tuple(range(rank - len(axes), rank)) and bool(axes)

    @property
    def features(self) -> tuple[int, ...] | None:
        """The sizes of the normalized axes; None where one is not known."""
        # Not from the factors: those broadcast over an axis of size 1, where an operator fails.
        dims = [self.shape[a] for a in self.norm.axes or ()] if self.shape is not None else [None]
        known = [d for d in dims if isinstance(d, int)]
        return tuple(known) if len(known) == len(dims) else None

    @property
    def channels(self) -> int | None:
        """The size of axis 1."""
        dim = self.shape[1] if self.shape is not None and len(self.shape) > 1 else None
        return dim if isinstance(dim, int) else None

    @property
    def wide(self) -> int:
        """The element type to compute in: the wider one of input and output.

        Operators have their statistics in float32 whatever the type is.
        """
        return self.wanted if self.given in NARROW else self.given


def _is_centred(value: AnyValue, facts: Facts) -> bool:
    made = facts.producer(value)
    if made is None or made.op != "Sub":
        return False
    sides = [facts.producer(v) for v in made.inputs]
    return any(side is not None and side.op == "ReduceMean" for side in sides)


def _is_scaled(value: AnyValue, facts: Facts) -> bool:
    for use in facts.uses(value):
        if use.node.op == "Mul" and not use.node.domain:
            factor = facts.constant(use.node.inputs[1 - use.index])
            if factor is not None and len(factor.shape) == 1:
                return True
    return False
