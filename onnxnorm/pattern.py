"""Patterns: immutable values that describe a piece of graph, inputs in schema order.

    op("Add", op("Mul", var("x"), const("scale")), const("shift"))
        prints as   Add(Mul(x, scale), shift)

A pattern holds structure only; what must be true beyond it is a pass's `check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

# Operators whose first two inputs may come in either order. From the operators' definitions,
# so that no author of a pass has to think of it.
COMMUTATIVE: Final = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd"})


@dataclass(frozen=True)
class Var:
    """Any value. The same name twice means the same value."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Const:
    """A value known before the model runs."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Maybe:
    """An optional input: absent, empty, or what `of` describes."""

    of: Var | Const

    def __str__(self) -> str:
        return f"{self.of}?"


@dataclass(frozen=True)
class OneOf:
    """The first of several alternatives that matches."""

    choices: tuple[Pattern, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.choices))


@dataclass(frozen=True)
class Op:
    """A call of one of `types`, with one output that matters.

    Attributes:
        types: Operator types.
        inputs: Patterns of the inputs, in schema order. Inputs beyond them must be absent.
        name: What the match calls the node.
        domain: The operator's domain; "" is ONNX's own.
    """

    types: tuple[str, ...]
    inputs: tuple[Pattern, ...]
    name: str
    domain: str = ""

    def __str__(self) -> str:
        types = "|".join(self.types)
        return f"{types}({', '.join(map(str, self.inputs))})"


Pattern: TypeAlias = Var | Const | Maybe | OneOf | Op


def var(name: str) -> Var:
    """Any value, bound to `name`."""
    return Var(name)


def const(name: str) -> Const:
    """A constant in any spelling, bound to `name`."""
    return Const(name)


def maybe(of: Var | Const) -> Maybe:
    """An optional input."""
    return Maybe(of)


def one_of(*choices: Pattern) -> OneOf:
    """The first alternative that matches."""
    return OneOf(choices)


def op(types: str | tuple[str, ...], *inputs: Pattern, name: str = "", domain: str = "") -> Op:
    """A call of the operator `types`, or of any of several.

    >>> print(op("Add", op("Mul", var("x"), const("scale")), const("shift")))
    Add(Mul(x, scale), shift)
    """
    types = (types,) if isinstance(types, str) else types
    return Op(types, inputs, name or types[0].lower(), domain)
