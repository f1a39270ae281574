r"""The algebra of moments: what the nodes behind a reduction compute, whatever their spelling.

    x      the tensor that is normalized
    m      E[x] over the reduced axes             q    E[x^2] over the same axes
    r      a root base: q - m^2 + eps (the variance) or q + eps (the mean square), or their
           relatives with a maximum or a sum in place of "+ eps under the root"
    n      how many elements the reduction runs over

A `Form` is a polynomial in x, m and q, times half-integer powers of r and n, with constant
coefficients that broadcast against x. Every node has one transfer rule: Add adds, Mul multiplies,
ReduceMean turns x into m and x^2 into q, Sqrt of q - m^2 + eps is the root. So

    (x - m) * r^-1/2 * g + b  is a layer norm,   x * r^-1/2 * g + b  an RMS norm or an L2 norm

in whatever order it was computed. What has no rule is not known, and what breaks a rule where a
norm was in the making becomes a `Miss` with its reason.

A value may be read in several ways: d = x - E[x] is x - m over x, and also the start of something
new over d. Each reading names its base, and the recogniser (`norms.py`) takes the outermost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.float64 import is_float_type
from onnxnorm.layout import Dim
from onnxnorm.module import Node, Scope
from onnxnorm.statics import Size, Statics

Coefficient: TypeAlias = NDArray[np.float64]
# powers: of x, m and q; of r and n in halves
Monomial: TypeAlias = tuple[int, int, int, int, int]
Terms: TypeAlias = Mapping[Monomial, Coefficient]

ONE: Final[Monomial] = (0, 0, 0, 0, 0)
X: Final[Monomial] = (1, 0, 0, 0, 0)
M: Final[Monomial] = (0, 1, 0, 0, 0)
_Q: Final[Monomial] = (0, 0, 1, 0, 0)
ROOT: Final[Monomial] = (0, 0, 0, 1, 0)
CENTRED: Final = "layer_norm"
PLAIN: Final = "rms_norm"
STEPS: Final = 4  # operators between a base and the reduction of something made of it
READINGS: Final = 6  # of one value
# Exporters round 1/n and the square root of n to float32; a wrong n is off by 1/n, and a tensor
# over which a norm is taken has fewer than 10^5 elements for which that matters.
_CLOSE: Final = 2e-6
# Constants of a narrow type are rounded to it.
_CLOSE_IN: Final[dict[int, float]] = {
    onnx.TensorProto.FLOAT16: 2.0**-10,
    onnx.TensorProto.BFLOAT16: 2.0**-7,
}


@dataclass(frozen=True)
class Statistic:
    """What the moments are taken over.

    Attributes:
        axes: Axes of the base; non-negative where its rank is known.
        groups: Number of groups that the channels are cut into first; 0 for no groups.
        channel: For groups, the axis of the channels.
    """

    axes: tuple[int, ...]
    groups: int = 0
    channel: int = 1


@dataclass(frozen=True)
class Root:
    """The base r of a square root.

    Attributes:
        kind: What r is, with s = n q: `variance`, factor * (q - m^2) + eps; `square`,
            factor * q + eps; `maximum`, max(sqrt(s), eps)^2; `sum`, (sqrt(s) + eps)^2;
            `clamped`, max(s, eps).
        factor: As it is in the graph: 1 for a mean, n for a sum, n / (n - 1) without bias.
        halves: Power of an n in the factor, in halves; that n is the one of the statistic.
        epsilon: The constant, as it is in the graph.
    """

    kind: str
    factor: float
    halves: int
    epsilon: float


@dataclass(frozen=True)
class Form:
    """What a value is, in terms of a base.

    Attributes:
        base: The tensor that is called x.
        statistic: What moments are over; None as long as there are none.
        root: The r of its terms.
        terms: Powers -> coefficient.
        layout: For each dim, the axis of the base that lies there, or -1 for a dim of size 1;
            None where all lie as in the base, the reduced ones with size 1.
        even: It stands in for its absolute value.
        steps: Operators since the base, while there are no moments.
        closed: A scale and a shift have been applied, so what follows is not part of the norm.
    """

    base: AnyValue
    statistic: Statistic | None
    root: Root | None
    terms: Terms
    layout: tuple[int, ...] | None = None
    even: bool = False
    steps: int = 0
    closed: bool = False

    @property
    def full(self) -> bool:
        """Whether it varies along the reduced axes: x is in it."""
        return any(p[0] for p in self.terms)

    @property
    def kind(self) -> str:
        """The norm that it looks like so far."""
        centred = any(p[1] for p in self.terms) or (
            self.root is not None and self.root.kind == "variance"
        )
        if centred or self.root is None:
            return CENTRED if centred else PLAIN
        plain = self.root.kind == "square" and not is_sum(self.root)
        return PLAIN if plain else "l2_norm"


@dataclass(frozen=True)
class Miss:
    """Where something that looked like a norm stopped being one.

    Attributes:
        kind: The norm it resembles.
        base: The tensor that would be normalized.
        statistic: What moments were over; None before there were any.
        reason: The first condition that failed.
        node: Where.
        stage: `open` before a reduction, `reduced`, `rooted` once a deviation is divided by,
            `norm` once it has divided something.
        closed: As of a form.
    """

    kind: str
    base: AnyValue
    statistic: Statistic | None
    reason: str
    node: Node
    stage: str = "open"
    closed: bool = False


Reading: TypeAlias = "Form | Miss"


@dataclass(frozen=True)
class Normal:
    """A form that is a norm of its base.

    Attributes:
        kind: `layer_norm`, `rms_norm` or `l2_norm`.
        base: The tensor that is normalized.
        statistic: What the moments are over.
        epsilon: As the kind has it: added to the variance, or by `rule`.
        rule: How epsilon comes in: `inside` the root, `outside` of it, as a `maximum` of the
            norm, or `clamped`, as a maximum of the squared norm.
        gamma: Factor of the normalized value; None for 1.
        beta: What is added; None for 0.
    """

    kind: str
    base: AnyValue
    statistic: Statistic
    epsilon: float
    rule: str = "inside"
    gamma: Coefficient | None = None
    beta: Coefficient | None = None


_MISALIGNED: Final = (-2,)
UNKNOWN_RANK: Final = 1 << 30


@dataclass
class Algebra:
    """Arithmetic on forms, over the values of one scope.

    Attributes:
        facts: What is true of the graph.
        scope: The scope.
        statics: What is constant in it.
        origin: A copy -> the value it is a copy of: through Identity, inference Dropout, Casts
            between floating-point types, and Reshape or Transpose that change nothing.
        known: A value -> what is known of it, but for the trivial reading over itself.
    """

    facts: Facts
    scope: Scope
    statics: Statics
    origin: dict[AnyValue, AnyValue] = field(default_factory=dict)
    known: dict[AnyValue, tuple[Reading, ...]] = field(default_factory=dict)

    # ** questions **

    def source(self, value: AnyValue) -> AnyValue:
        """What a value is a copy of; itself where it is no copy."""
        return self.origin.get(value, value)

    def readings(self, value: AnyValue) -> tuple[Reading, ...]:
        """What is known of a value, the nearest base last; not the trivial reading over itself."""
        return self.known.get(value, ())

    def own(self, value: AnyValue) -> Form:
        """The trivial reading: x itself."""
        return Form(self.source(value), None, None, {X: scalar_of(1.0)})

    def over(self, value: AnyValue) -> tuple[Reading, ...]:
        """All readings of an operand, the one over itself last."""
        return (*self.readings(value), self.own(value))

    def has_moments(self, value: AnyValue) -> bool:
        """Whether a value is made of moments of some base."""
        return any(r.statistic is not None for r in self.readings(value))

    def rank(self, value: AnyValue) -> int | None:
        """How many dims a value has, where that is known."""
        shape = self.statics.shape_of(value)
        return None if shape is None else len(shape)

    def axes(self, value: AnyValue, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Axes in order, non-negative where the rank is known; None where they mean nothing."""
        rank = self.rank(value)
        if given is None:
            return None if rank is None else tuple(range(rank))
        if rank is not None:
            if any(not -rank <= a < rank for a in given):
                return None
            given = tuple(sorted({a % rank for a in given}))
        elif len({a < 0 for a in given}) > 1:
            return None
        return tuple(sorted(given)) if given else None

    def elements(self, form: Form | Miss | Normal) -> int | None:
        """The n of a statistic, where it is known before the model runs."""
        shape = self.statics.shape_of(form.base)
        if shape is None or form.statistic is None:
            return None
        total = 1
        for axis in form.statistic.axes:
            dim = shape[axis] if axis < len(shape) else None
            if not isinstance(dim, int):
                return None
            total *= dim
        groups = form.statistic.groups
        if groups:
            return total // groups if total % groups == 0 else None
        return total

    def fits(self, coefficient: Coefficient, base: AnyValue) -> bool:
        """Whether a constant broadcasts against the base without expanding it."""
        shape = self.statics.shape_of(base)
        if shape is None:
            return coefficient.ndim <= 1 or coefficient.size == 1
        return coefficient.ndim <= len(shape) and all(
            size == 1 or not isinstance(dim, int) or dim == size
            for size, dim in zip(coefficient.shape[::-1], shape[::-1], strict=False)
        )

    # ** which norm a form is **

    def normal(self, form: Form) -> Normal | str | None:
        """The norm that a form is; a reason where it nearly is one; None where it is none."""
        root, statistic = form.root, form.statistic
        if root is None or statistic is None or form.layout is not None or form.even:
            return None
        terms = dict(form.terms)
        beta = terms.pop(ONE, None)
        beta = None if beta is None else np.asarray(beta)
        divided = [p for p in terms if p[3] < 0 and p[0] == 1]
        if any(p[0] > 1 for p in terms):
            return None
        if not divided:
            if root.kind == "variance" and {p[3] for p in terms if p[0]} == {1}:
                return "it is multiplied by the deviation, where a norm divides by it"
            return None
        if any(p[3] != -1 for p in divided):
            return "it is divided by the variance itself and not by its root"
        main = (1, 0, 0, -1, divided[0][4])
        if main not in terms:
            return None
        gamma = terms.pop(main)
        mean = terms.pop((0, 1, 0, -1, main[4]), None)
        if terms:
            return None
        if root.kind == "variance":
            if mean is None:
                return "what is divided is not centred: x - mean(x) would be a layer norm"
            if not same(gamma, -mean):
                return "what is divided is not x - mean(x)"
        elif mean is not None:
            return "it is divided by a mean square that is not about the mean"
        made = self._scaled(form, root, gamma, main[4])
        if isinstance(made, str):
            return made
        kind, epsilon, rule, gamma = made
        gamma = np.asarray(gamma)
        return Normal(
            kind,
            form.base,
            statistic,
            epsilon,
            rule,
            # Arithmetic on arrays without dims makes numbers of them.
            None
            if gamma.size == 1 and abs(float(gamma.reshape(-1)[0]) - 1) < _CLOSE
            else np.asarray(gamma),
            None if beta is None or not beta.any() else np.asarray(beta),
        )

    def _scaled(
        self, form: Form, root: Root, gamma: Coefficient, halves: int
    ) -> tuple[str, float, str, Coefficient] | str:
        """(kind, epsilon, rule, gamma) of gamma * n^(halves/2) * x * r^-1/2."""
        n = self.elements(form)
        kind = CENTRED if root.kind == "variance" else PLAIN
        scaled = gamma if not halves else None if n is None else gamma * n ** (halves / 2)
        if root.kind in ("maximum", "sum", "clamped"):
            rule = {"maximum": "maximum", "sum": "outside", "clamped": "clamped"}[root.kind]
            if scaled is None:
                return "the norm is scaled by the number of elements, which is not known"
            return "l2_norm", root.epsilon, rule, scaled
        if scaled is not None and (ratio := self._is_mean(form, root, root.halves)):
            return kind, root.epsilon / ratio, "inside", scaled / math.sqrt(ratio)
        if halves and (n is not None or not root.epsilon):
            # n^(h/2) r^-1/2 = (n^-h r)^-1/2
            epsilon = root.epsilon * n ** (-halves) if n is not None else 0.0
            if ratio := self._is_mean(form, root, root.halves - 2 * halves):
                return kind, epsilon / ratio, "inside", gamma / math.sqrt(ratio)
        if scaled is not None and is_sum(root):
            return "l2_norm", root.epsilon, "inside", scaled
        if n is None or halves:
            return f"the mean divides by a number that is not known to be {_size(form)}"
        total = root.factor * n ** (root.halves / 2)
        return f"the mean divides by {_number(n / total)}, and there are {n} elements"

    def _is_mean(self, form: Form, root: Root, halves: int) -> float | None:
        """Whether factor * n^(halves/2) is 1: that; n / (n - 1) for a variance without bias."""
        n = self.elements(form)
        close = self._tolerance(form)
        if halves == 0 and abs(root.factor - 1) < _CLOSE:
            return 1.0
        if n is None:
            return None
        total = root.factor * n ** (halves / 2)
        unbiased = n / (n - 1) if root.kind == "variance" and n > 1 else math.inf
        # Of the two the nearer one: in a narrow type both may be near.
        if abs(total - 1) < close and abs(total - 1) <= abs(total - unbiased):
            return 1.0
        return unbiased if abs(total - unbiased) < close * unbiased < math.inf else None

    def _tolerance(self, form: Form) -> float:
        """How far the constants of the graph may be from what they stand for, relatively."""
        known = self.facts.type(form.base)
        return _CLOSE_IN.get(known.element, _CLOSE) if known is not None else _CLOSE

    def has_shape_of(self, value: AnyValue, base: AnyValue) -> bool:
        """Whether a value is what a Shape node makes of a base, or of a copy of it."""
        made = self.facts.producer(value)
        return (
            made is not None
            and made.op == "Shape"
            and not made.attrs
            and self.source(made.inputs[0]) is base
        )

    # ** arithmetic **

    def _unfit(self, form: Form, factor: Coefficient, node: Node) -> Miss | None:
        """What a constant does to a norm that it does not broadcast into."""
        if form.statistic is None or not any(p[3] < 0 for p in form.terms):
            return None
        if self.rank(form.base) is None:
            reason = f"rank unknown at '{form.base.name}', which a factor of shape {{}} needs"
        elif self._reordered(factor, form.base):
            reason = (
                f"a factor of shape {{}} has its axes in another order than '{form.base.name}',"
                " of which the statistics are"
            )
        else:
            reason = f"a factor of shape {{}} would expand '{form.base.name}'"
        stage = "norm" if form.full else "rooted"
        reason = reason.format(list(factor.shape))
        return Miss(form.kind, form.base, form.statistic, reason, node, stage)

    def _reordered(self, factor: Coefficient, base: AnyValue) -> bool:
        """Whether a constant would fit a base if its axes stood in another order."""
        shape = self.statics.shape_of(base)
        left = [dim for dim in shape or () if isinstance(dim, int)]
        sizes = [size for size in factor.shape if size > 1]
        alike = shape is not None and factor.ndim == len(shape)
        return alike and all(sizes.count(size) <= left.count(size) for size in sizes)

    def times(self, form: Form, factor: Coefficient, node: Node) -> Reading | None:
        """A form times a constant; a vector times what has no moments yet is never averaged."""
        if form.closed or form.even:
            return None
        early = form.statistic is None and factor.size > 1
        if early and (form.terms.keys() != {X} or not self.fits(factor, form.base)):
            return None
        if factor.size == 1 and form.statistic is not None:
            settled = self._count(form, float(factor.reshape(-1)[0]))
            if settled:
                return replace(form, terms=times_n(form.terms, settled))
        if not self.fits(factor, form.base):
            return self._unfit(form, factor, node)
        if form.layout is not None and factor.size > 1:
            return None
        factor = factor.reshape(()) if factor.size == 1 else factor
        return replace(form, terms={p: c * factor for p, c in form.terms.items()})

    def _count(self, form: Form, factor: float) -> int:
        """The power of n, in halves, that a number is; 0 for none of them."""
        n = self.elements(form)
        if n is None or n < 2 or factor <= 0:
            return 0
        # Near misses divide by n + 1 or n - 1; where the type cannot tell these apart, be exact.
        close = min(self._tolerance(form), 0.25 / n)
        for halves in (-2, -1, 1, 2):
            if abs(factor * n ** (-halves / 2) - 1) < close:
                return halves
        return 0

    def times_size(self, form: Form, size: Size) -> Form | None:
        """A form times a product of dims that are not known."""
        if form.statistic is None or form.statistic.groups or form.closed:
            return None
        shape = self.statics.shape_of(form.base)
        axes = form.statistic.axes
        if shape is not None and axes[-1] >= len(shape):
            return None
        halves = _halves(size, [self.statics.sizes.axis(form.base, a) for a in axes])
        if halves is None:
            return None
        return replace(form, terms=times_n(form.terms, halves))

    def plus(self, form: Form, shift: Coefficient) -> Form | None:
        """A form plus a constant."""
        if form.closed or form.even or not self.fits(shift, form.base):
            return None
        if (form.statistic is None or form.layout is not None) and shift.size > 1:
            return None
        shift = shift.reshape(()) if shift.size == 1 else shift
        terms = dict(form.terms)
        terms[ONE] = terms[ONE] + shift if ONE in terms else shift
        normalized = any(p[0] == 1 and p[3] == -1 for p in terms)
        return replace(form, terms=terms, closed=normalized)

    def sum_of(self, one: Form, other: Form, sign: float, node: Node) -> Reading | None:
        """The sum of two forms over one base, or the difference."""
        joined = self._joined(one, other, node)
        if not isinstance(joined, Form):
            return joined
        terms = dict(one.terms)
        for powers, coefficient in other.terms.items():
            known = terms.get(powers)
            made = sign * coefficient if known is None else known + sign * coefficient
            if made.any():
                terms[powers] = made
            else:
                terms.pop(powers, None)
        normalized = any(p[0] == 1 and p[3] == -1 for p in terms)
        return tied(replace(joined, terms=terms, closed=normalized and ONE in terms))

    def product_of(self, one: Form, other: Form, node: Node) -> Reading | None:
        """The product of two forms over one base."""
        if one.even != other.even or (one.even and one.terms.keys() != other.terms.keys()):
            return None
        joined = self._joined(one, other, node)
        if not isinstance(joined, Form):
            return joined
        terms: dict[Monomial, Coefficient] = {}
        for p, a in one.terms.items():
            for q, b in other.terms.items():
                powers = tuple(i + j for i, j in zip(p, q, strict=True))
                if powers[0] > 2:
                    return None
                made = a * b
                for spelled, coefficient in self._spelled(powers, made, joined.root):
                    known = terms.get(spelled)
                    terms[spelled] = coefficient if known is None else known + coefficient
        terms = {p: c for p, c in terms.items() if c.any()}
        return tied(replace(joined, terms=terms, even=False))

    def _spelled(
        self, powers: tuple[int, ...], coefficient: Coefficient, root: Root | None
    ) -> Iterator[tuple[Monomial, Coefficient]]:
        """A term; one with a whole root base is written as the polynomial that the base is."""
        x, m, q, r, n = powers
        if r != 2 or root is None or root.kind not in ("variance", "square"):
            yield (x, m, q, r, n), coefficient
            return
        yield (x, m, q + 1, 0, n + root.halves), coefficient * root.factor
        if root.kind == "variance":
            yield (x, m + 2, q, 0, n + root.halves), -coefficient * root.factor
        if root.epsilon:
            yield (x, m, q, 0, n), coefficient * root.epsilon

    def _joined(self, one: Form, other: Form, node: Node) -> Form | Miss | None:
        """What two forms over one base have in common; the terms are for the caller."""
        if one.closed or other.closed:
            return None
        statistic = one.statistic or other.statistic
        if other.statistic not in (None, statistic):
            return self._other_axes(one, other, node)
        root = one.root or other.root
        if other.root not in (None, root):
            return None
        layout = self._aligned(one, other)
        if layout is _MISALIGNED:
            kind = min(one.kind, other.kind, key=(CENTRED, "l2_norm", PLAIN).index)
            reason = "a reduction without keepdims broadcasts along another axis than it was over"
            return Miss(kind, one.base, statistic, reason, node, _stage(one, other))
        steps = max(one.steps, other.steps)
        return Form(one.base, statistic, root, one.terms, layout, one.even, steps)

    def _other_axes(self, one: Form, other: Form, node: Node) -> Miss | None:
        assert one.statistic is not None
        assert other.statistic is not None
        if one.statistic.groups or other.statistic.groups:
            return None
        reason = (
            f"one statistic is over axes {list(one.statistic.axes)},"
            f" the other over axes {list(other.statistic.axes)}"
        )
        return Miss(one.kind, one.base, other.statistic, reason, node, _stage(one, other))

    def _aligned(self, one: Form, other: Form) -> tuple[int, ...] | None:
        """The layout of two operands together; `_MISALIGNED` where axes do not lie alike."""
        if one.layout is None and other.layout is None:
            return None
        rank = self.rank(one.base)
        if rank is None:
            return _MISALIGNED
        first, second = (self.spread(f, rank) for f in (one, other))
        length = max(len(first), len(second))
        first = (-1,) * (length - len(first)) + first
        second = (-1,) * (length - len(second)) + second
        made = []
        for a, b in zip(first, second, strict=True):
            if -1 not in (a, b) and a != b:
                return _MISALIGNED
            made.append(max(a, b))
        return self.tidy(tuple(made), one.base, one.statistic or other.statistic)

    def spread(self, form: Form, rank: int) -> tuple[int, ...]:
        """A layout in full, with -1 where the dim has size 1."""
        layout = tuple(range(rank)) if form.layout is None else form.layout
        reduced = form.statistic.axes if form.statistic is not None and not form.full else ()
        sizes = self.statics.shape_of(form.base) or ()
        return tuple(-1 if a < 0 or a in reduced or sizes[a] == 1 else a for a in layout)

    def tidy(
        self, layout: tuple[int, ...], base: AnyValue, statistic: Statistic | None
    ) -> tuple[int, ...] | None:
        """None for a layout that is that of the base."""
        rank = self.rank(base)
        if rank != len(layout):
            return layout
        shape = self.statics.shape_of(base)
        assert shape is not None, "its rank is known"
        reduced = statistic.axes if statistic is not None else ()
        for place, axis in enumerate(layout):
            if axis not in (place, -1):
                return layout
            if axis == -1 and place not in reduced and shape[place] != 1:
                return layout
        return None

    def square_of(self, form: Form, node: Node) -> Reading | None:
        """The square of a form."""
        return self.product_of(form, form, node)

    def inverse_of(self, form: Form, node: Node) -> Reading | None:
        """1 / form."""
        if form.full or form.even:
            return None
        terms = form.terms
        if len(terms) == 1:
            ((powers, coefficient),) = terms.items()
            if powers[1:3] == (0, 0):
                if not coefficient.all():
                    return None
                inverse = (0, 0, 0, -powers[3], -powers[4])
                return replace(form, terms={inverse: 1 / coefficient})
        if form.root is None:
            made = self._root(form, node)
            if isinstance(made, Form):
                ((powers, coefficient),) = made.terms.items()
                return replace(made, terms={(0, 0, 0, -2, 0): 1 / coefficient**2})
            return made
        return self._outside(form, node)

    def _outside(self, form: Form, node: Node) -> Reading | None:
        """1 / (c * root + epsilon): an L2 norm has it, the other norms do not."""
        root, terms = form.root, dict(form.terms)
        epsilon = terms.pop(ONE, None)
        if root is None or epsilon is None or len(terms) != 1 or epsilon.size > 1:
            return None
        ((powers, coefficient),) = terms.items()
        if powers[:4] != ROOT[:4]:
            return None
        plain = powers == ROOT and coefficient.size == 1 and float(coefficient) == 1.0
        # Below 0 the sum may change its sign, and the root of its square does not.
        if plain and is_sum(root) and root.epsilon == 0 and float(epsilon) >= 0:
            made = Root("sum", 1.0, 0, float(epsilon))
            return replace(form, root=made, terms={(0, 0, 0, -1, 0): scalar_of(1.0)})
        reason = "epsilon is added to the deviation, outside the root, and not to the variance"
        makers = [self.facts.producer(v) for v in node.inputs]
        adds = [n for n in makers if n is not None and n.op == "Add"]
        return Miss(form.kind, form.base, form.statistic, reason, (*adds, node)[0], "rooted")

    def root_of(self, form: Form, node: Node) -> Reading | None:
        """The square root of a form."""
        if form.full or form.even:
            return None
        if len(form.terms) == 1:
            ((powers, coefficient),) = form.terms.items()
            if powers[1:3] == (0, 0) and powers[3] % 2 == 0 and powers[4] % 2 == 0:
                if (coefficient < 0).any():
                    return None
                halved = (0, 0, 0, powers[3] // 2, powers[4] // 2)
                return replace(form, terms={halved: np.sqrt(coefficient)})
        return self._root(form, node)

    def _root(self, form: Form, node: Node) -> Reading | None:
        """The root of factor * (q - m^2) + eps, or of factor * q + eps."""
        if form.statistic is None or form.root is not None:
            return None
        terms = dict(form.terms)
        n = self.elements(form)
        added = [p for p in terms if p[:4] == ONE[:4]]
        if n is None and any(p != ONE for p in added):
            return None
        epsilon = sum((terms.pop(p) * (n or 1) ** (p[4] / 2) for p in added), scalar_of(0.0))
        squares = [p for p in terms if p[:3] == (0, 0, 1)]
        if len(squares) != 1:
            return None
        halves = squares[0][4]
        factor = terms.pop(squares[0])
        mean = terms.pop((0, 2, 0, 0, halves), None)
        if terms or factor.size > 1 or float(factor) <= 0:
            return self.unsquared(form, node, "rooted")
        if epsilon.size > 1:
            reason = "epsilon is not one number"
            return Miss(form.kind, form.base, form.statistic, reason, node, "rooted")
        if mean is not None and not same(factor, -mean):
            reason = "the mean square is about something else than the mean"
            return Miss(CENTRED, form.base, form.statistic, reason, node, "rooted")
        if float(epsilon) < 0:
            reason = f"epsilon is {float(epsilon):.3g}, which is negative"
            return Miss(form.kind, form.base, form.statistic, reason, node, "rooted")
        kind = "variance" if mean is not None else "square"
        root = Root(kind, float(factor), halves, float(epsilon))
        return replace(form, root=root, terms={ROOT: scalar_of(1.0)})

    def unsquared(self, form: Form, node: Node, stage: str) -> Miss | None:
        """E[x^2] - E[x], where the square of the mean was forgotten; None for anything else."""
        powers = {p[:3] for p in form.terms} - {ONE[:3]}
        if form.root is not None or powers != {M[:3], _Q[:3]}:
            return None
        reason = "the mean is subtracted from the mean square, where its square should be"
        return Miss(CENTRED, form.base, form.statistic, reason, node, stage)

    def mean_of(
        self, form: Form, node: Node, axes: tuple[int, ...], keepdims: bool, value: AnyValue
    ) -> Reading | None:
        """E[form] over axes of the value."""
        if form.closed or form.layout is not None:
            return None
        kind = form.kind
        if form.even:
            reason = "absolute values are averaged, where a variance averages squares"
            kind = "l2_norm" if kind == PLAIN and node.op in ("ReduceL1", "ReduceSum") else kind
            return Miss(kind, form.base, Statistic(axes), reason, node, "rooted")
        if form.statistic is None and any(c.size > 1 for c in form.terms.values()):
            return None  # what is scaled has moments of its own
        known = self.facts.type(form.base)
        if known is not None and known.element and not is_float_type(known.element):
            reason = "its input is of an integer type, in which a mean is rounded"
            return Miss(kind, form.base, Statistic(axes), reason, node, "reduced")
        statistic = Statistic(axes)
        if form.statistic is not None and form.statistic != statistic:
            return self._reduced_again(form, node, axes, keepdims)
        if any(not self._constant_along(c, axes, form.base) for c in form.terms.values()):
            return None
        terms: dict[Monomial, Coefficient] = {}
        for (x, m, q, r, n), coefficient in form.terms.items():
            if x > 2:
                return None
            powers = (0, m + (x == 1), q + (x == 2), r, n)
            made = terms[powers] + coefficient if powers in terms else coefficient
            if made.any():
                terms[powers] = made
            else:
                terms.pop(powers, None)
        made_form = replace(form, statistic=statistic, terms=terms, even=False)
        return made_form if keepdims else self._dropped(made_form)

    def _reduced_again(
        self, form: Form, node: Node, axes: tuple[int, ...], keepdims: bool
    ) -> Reading | None:
        """A mean of means over further axes; anything else over other axes is a miss."""
        assert form.statistic is not None
        first = form.statistic.axes
        linear = all(
            p in (M, _Q, ONE) and c.size == 1  # without an n, which would become another one
            for p, c in form.terms.items()
        )
        apart = not set(first) & set(axes) and (first[0] < 0) == (axes[0] < 0)
        if linear and apart and not form.statistic.groups:
            made = replace(form, statistic=Statistic(tuple(sorted({*first, *axes}))))
            return made if keepdims else self._dropped(made)
        if not form.full or form.root is not None or form.statistic.groups:
            return None
        reason = f"its mean is over axes {list(first)}, its mean square over axes {list(axes)}"
        return Miss(form.kind, form.base, Statistic(axes), reason, node, "reduced")

    def _dropped(self, form: Form) -> Form | None:
        """A reduced form whose reduced dims are gone."""
        rank = self.rank(form.base)
        assert form.statistic is not None
        if rank is None:
            # Known to come back only where Unsqueeze puts the very same axes in again.
            return replace(form, layout=(*form.statistic.axes, UNKNOWN_RANK))
        layout = tuple(a for a in range(rank) if a not in form.statistic.axes)
        return replace(form, layout=self.tidy(layout, form.base, form.statistic))

    def _constant_along(
        self, coefficient: Coefficient, axes: tuple[int, ...], base: AnyValue
    ) -> bool:
        if coefficient.size == 1:
            return True
        rank = self.rank(base)
        for axis in axes:
            if axis >= 0:
                if rank is None:
                    return False
                axis -= rank
            if -axis <= coefficient.ndim and coefficient.shape[axis] > 1:
                return False
        return True

    def is_positive(self, form: Form) -> bool:
        """Whether a form is a variance, a mean square, or a root of one."""
        if form.root is not None:
            return set(form.terms) == {ROOT} and bool((form.terms[ROOT] > 0).all())
        terms = dict(form.terms)
        epsilon = terms.pop(ONE, scalar_of(0.0))
        squares = [p for p in terms if p[:3] == (0, 0, 1)]
        if len(squares) != 1 or (epsilon < 0).any():
            return False
        factor = terms.pop(squares[0])
        mean = terms.pop((0, 2, 0, 0, squares[0][4]), None)
        centred = mean is None or same(factor, -mean)
        return not terms and bool((factor > 0).all()) and centred


def tied(form: Form) -> Form:
    """A form that forgets a root none of its terms has."""
    if form.root is not None and not any(p[3] for p in form.terms):
        return replace(form, root=None)
    return form


def scalar_of(value: float) -> Coefficient:
    """A coefficient that is one number."""
    return np.asarray(value, dtype=np.float64)


def is_one(coefficient: Coefficient) -> bool:
    """Whether a coefficient is the number 1."""
    return coefficient.size == 1 and float(coefficient) == 1.0


def is_sum(root: Root) -> bool:
    """Whether a root base is a plain sum of squares."""
    return root.kind == "square" and root.halves == 2 and root.factor == 1.0


def same(one: Coefficient, other: Coefficient) -> bool:
    """Equal but for how the graph rounds its constants."""
    try:
        return bool(np.allclose(one, other, rtol=1e-6, atol=0.0))
    except ValueError:
        return False


def times_n(terms: Terms, halves: int) -> dict[Monomial, Coefficient]:
    """Every term times n^(halves / 2)."""
    return {(x, m, q, r, n + halves): c for (x, m, q, r, n), c in terms.items()}


def _halves(size: Size, dims: Sequence[Dim]) -> int | None:
    """The power, in halves, to which a size is the product of these dims."""
    whole = Size.of(dims)
    if size.dims.keys() != whole.dims.keys() or not whole.dims:
        return None
    powers = {2 * size.dims[name] / count for name, count in whole.dims.items()}
    if len(powers) != 1 or (power := powers.pop()) != int(power):
        return None
    if abs(size.factor - whole.factor ** (power / 2)) > _CLOSE * size.factor:
        return None
    return int(power)


def _stage(one: Form, other: Form) -> str:
    divided = any(p[3] < 0 for f in (one, other) for p in f.terms)
    if divided:
        return "norm"
    return "rooted" if one.root or other.root else "open"


def _size(form: Form) -> str:
    assert form.statistic is not None
    return f"the number of elements of axes {list(form.statistic.axes)}"


def _number(value: float) -> str:
    return f"{value:.6g}"
