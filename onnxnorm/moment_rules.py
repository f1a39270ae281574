"""One transfer rule for each operator: how it makes a reading of its inputs' readings.

Operators that have no rule here make something unknown, and that is how a norm ends: what is read
in terms of a base up to there, and of nothing behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from onnxnorm.facts import AnyValue
from onnxnorm.float64 import is_float_type
from onnxnorm.layout import Dims
from onnxnorm.module import Node
from onnxnorm.moment_layouts import Layouts
from onnxnorm.moments import (
    CENTRED,
    ONE,
    PLAIN,
    READINGS,
    ROOT,
    STEPS,
    Form,
    M,
    Miss,
    Reading,
    Root,
    Statistic,
    X,
    is_one,
    is_sum,
    scalar_of,
    times_n,
)


def _is_root_alone(form: Form) -> bool:
    """Whether a form is the root of its base and nothing else."""
    return set(form.terms) == {ROOT} and is_one(form.terms[ROOT])


def _is_inverse_root(form: Form) -> bool:
    """Whether a form is a number over the root of its base."""
    return form.root is not None and [p[:4] for p in form.terms] == [(0, 0, 0, -1)]


class Moments(Layouts):
    """The readings of every value of one scope. `visit` every node, in order."""

    def visit(self, node: Node) -> None:
        """Find the readings of what `node` computes."""
        if node.domain != "" or not node.outputs or not node.inputs or not node.outputs[0].name:
            return
        self.statics.visit(node)
        out = node.outputs[0]
        if self._copies(node):
            first = node.inputs[0]
            if self.statics.array(first) is not None:
                return
            self.origin[out] = self.source(first)
            if first in self.known:
                self.known[out] = self.known[first]
            return
        rule = _RULES.get(node.op)
        ruled = rule is not None or node.op in _ELEMENTWISE
        if not ruled or node.scope.opsets.get("", 7) < 7:  # broadcasting was another then
            return
        found: list[Reading] = []
        for reading in rule(self, node) if rule is not None else ():
            if isinstance(reading, Form) and reading.statistic is None:
                if reading.steps > STEPS:
                    continue
                reading = replace(reading, steps=reading.steps + 1)
            found.append(reading)
        found = [*self._spoilt(node, found), *found]
        # What has no moments yet is given up first: arithmetic on a statistic makes many of those.
        early = [i for i, r in enumerate(found) if isinstance(r, Form) and r.statistic is None]
        spared = set(early[: max(0, len(found) - READINGS)])
        found = [reading for i, reading in enumerate(found) if i not in spared]
        if found:
            self.known[out] = tuple(found[-READINGS:])

    def _copies(self, node: Node) -> bool:
        """Whether a node's output is its first input, but for rounding to another float type."""
        given = node.inputs[0]
        if node.op == "Identity":
            return True
        if node.op == "Dropout":
            return self._is_inference(node)
        if node.op in ("Cast", "CastLike"):
            return self._casts_floats(node)
        if node.op == "Transpose":
            perm = node.attrs.get("perm")
            return perm is not None and not node.parameter("perm") and perm == sorted(perm)
        if node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
            return self._keeps_shape(node, given)
        return False

    def _is_inference(self, node: Node) -> bool:
        if any(v.name and (v.outputs or self.facts.pinned(v)) for v in node.outputs[1:]):
            return False
        if node.scope.opsets[""] < 7:
            return bool(node.attrs.get("is_test", 0)) and not node.parameter("is_test")
        if len(node.inputs) > 2 and node.inputs[2].name:
            return self.statics.scalar(node.inputs[2]) == 0
        return True

    def _casts_floats(self, node: Node) -> bool:
        given = self.facts.type(node.inputs[0])
        if given is None or not given.element:
            if not self.has_moments(node.inputs[0]):
                return False
        elif not is_float_type(given.element):
            return False
        if node.op == "CastLike":
            like = self.facts.type(node.inputs[1])
            return like is not None and is_float_type(like.element)
        return node.parameter("to") is None and is_float_type(int(node.attrs.get("to", 0)))

    def _keeps_shape(self, node: Node, given: AnyValue) -> bool:
        """Whether an operator that moves dims leaves all where they are."""
        shape = self.statics.shape_of(given)
        if shape is not None and shape == self.statics.shape_of(node.outputs[0]):
            return True
        if node.op not in ("Reshape", "Expand") or len(node.inputs) < 2:
            return False
        return self.has_shape_of(node.inputs[1], self.source(given))

    def _visit_instance_norm(self, node: Node) -> Iterator[Reading]:
        """The operator, in moments: what follows it may be its affine, or undo groups."""
        rank = self.rank(node.inputs[0])
        if rank is None or rank < 3 or len(node.inputs) != 3 or node.parameter("epsilon"):
            return
        gamma, beta = (self.statics.array(v) for v in node.inputs[1:])
        if gamma is None or beta is None or gamma.ndim != 1 or beta.shape != gamma.shape:
            return
        spread = (-1,) + (1,) * (rank - 2)
        gamma = scalar_of(1.0) if (gamma == 1).all() else gamma.reshape(spread)
        terms = {(1, 0, 0, -1, 0): gamma, (0, 1, 0, -1, 0): -gamma}
        if shifted := bool(beta.any()):
            terms[ONE] = beta.reshape(spread)
        epsilon = float(node.attrs.get("epsilon", 1e-5))
        root = Root("variance", 1.0, 0, epsilon)
        statistic = Statistic(tuple(range(2, rank)))
        base = self.source(node.inputs[0])
        yield Form(base, statistic, root, terms, closed=shifted)

    def _visit_rms_norm(self, node: Node) -> Iterator[Reading]:
        """The operator on something centred: it is the rest of a layer norm of what was centred."""
        value = node.inputs[0]
        if node.parameter("axis", "epsilon") or len(node.inputs) < 2:
            return
        axis, rank = int(node.attrs.get("axis", -1)), self.rank(value)
        if rank is None and axis != -1:
            return
        axes = (-1,) if rank is None else tuple(range(axis % rank, rank))
        gamma = self.statics.array(node.inputs[1])
        epsilon = scalar_of(float(node.attrs.get("epsilon", 1e-5)))
        for reading in self.readings(value):
            if not isinstance(reading, Form) or reading.statistic is None or gamma is None:
                continue
            square = self.square_of(reading, node)
            made: Reading | None = square
            if isinstance(square, Form):
                made = self.mean_of(square, node, axes, True, value)
            if isinstance(made, Form):
                made = self.plus(made, epsilon)
            if isinstance(made, Form):
                made = self.root_of(made, node)
            if isinstance(made, Form):
                made = self.inverse_of(made, node)
            if isinstance(made, Form):
                made = self.product_of(reading, made, node)
            if isinstance(made, Form):
                made = self.times(made, gamma, node)
            if isinstance(made, Form):
                yield made

    def _spoilt(self, node: Node, found: list[Reading]) -> Iterator[Miss]:
        """A variance, or squares to be averaged, of which a node makes what no norm has."""
        known = {reading.base for reading in found}
        for index, value in enumerate(node.inputs):
            for reading in self.readings(value):
                if not isinstance(reading, Form) or reading.base in known or reading.closed:
                    continue
                if reading.full:
                    reason = self._weighting(reading, node, index)
                elif self.is_positive(reading) or _is_inverse_root(reading):
                    reason = self._change(reading, node, index)
                else:
                    continue
                if reason:
                    stage = "open" if reading.full else "reduced" if not reading.root else "rooted"
                    if reading.full and node.op in _REDUCTIONS:
                        stage = "reduced"
                    known.add(reading.base)
                    kind, base, statistic = reading.kind, reading.base, reading.statistic
                    yield Miss(kind, base, statistic, reason, node, stage)

    def _weighting(self, form: Form, node: Node, index: int) -> str:
        """Why squares are no longer those that a variance averages."""
        if form.root is not None or max(p[0] for p in form.terms) < 2:
            return ""
        if node.op in _REDUCTIONS and any(c.size > 1 for c in form.terms.values()):
            return "its squares are weighted along the axes of the mean"
        if node.op != "Mul":
            return ""
        other = node.inputs[1 - index]
        if any(r.base is form.base for r in self.over(other)):
            return ""
        return f"its squares are weighted by '{other.name}'"

    def _change(self, form: Form, node: Node, index: int) -> str:
        """What a node does to a variance, or to its root, that no norm does."""
        noun = "variance" if form.kind == CENTRED else "mean square"
        noun = noun if form.root is None else "deviation"
        if node.op in ("Add", "Sub", "Mul", "Div") and len(node.inputs) == 2:
            other = node.inputs[1 - index]
            dividend = node.op == "Div" and index == 1 and form.root is None
            if dividend or self.statics.array(other) is not None:
                return ""
            if any(r.base is form.base for r in self.over(other)):
                return ""
            if node.op in ("Add", "Sub"):
                why = self.facts.why_not_constant(other)
                return f"what is added to the {noun}, '{other.name}', is not constant: {why}"
            if form.root is not None:
                if _is_inverse_root(form) == (node.op == "Div" and index == 1):
                    return ""  # it multiplies, as in a global response norm
                return f"the {noun} itself is scaled by '{other.name}' at run time"
            assert form.statistic is not None, "it is reduced"
            axes = list(form.statistic.axes)
            return (
                f"the {noun} is scaled by '{other.name}', which is not known to be"
                f" the number of elements of axes {axes}"
            )
        if node.op in _ELEMENTWISE or node.op in ("Clip", "Max"):
            return "" if _is_inverse_root(form) else f"{node.op} changes the {noun}"
        return ""

    def _visit_sum(self, node: Node) -> Iterator[Reading]:
        sign = -1.0 if node.op == "Sub" else 1.0
        if len(node.inputs) != 2:
            yield from self._visit_sum_of_many(node)
            return
        left, right = node.inputs
        if (shift := self.statics.array(right)) is not None:
            yield from self._with_constant(left, node, lambda f: self.plus(f, sign * shift))
        elif (shift := self.statics.array(left)) is not None:

            def shifted(form: Form) -> Reading | None:
                turned = form if sign > 0 else self.times(form, scalar_of(-1.0), node)
                return self.plus(turned, shift) if isinstance(turned, Form) else turned

            yield from self._with_constant(right, node, shifted)
        else:
            yield from self._pairs(node, lambda a, b: self.sum_of(a, b, sign, node))

    def _visit_sum_of_many(self, node: Node) -> Iterator[Reading]:
        """Sum of any number of values: as the Adds that it stands for."""
        total: tuple[Reading, ...] = self.over(node.inputs[0])
        for value in node.inputs[1:]:
            shift = self.statics.array(value)
            made: list[Reading] = []
            for one in total:
                if not isinstance(one, Form):
                    continue
                sums: list[Reading | None]
                if shift is not None:
                    sums = [self.plus(one, shift)]
                else:
                    others = [o for o in self.over(value) if isinstance(o, Form)]
                    sums = [self.sum_of(one, o, 1.0, node) for o in others if o.base is one.base]
                made += [s for s in sums if s is not None]
            total = tuple(made[-READINGS:])
        yield from total

    def _visit_product(self, node: Node) -> Iterator[Reading]:
        left, right = node.inputs
        for value, other in ((left, right), (right, left)):
            if (factor := self.statics.array(other)) is not None:
                yield from self._with_constant(value, node, lambda f: self.times(f, factor, node))
                return
            if (size := self.statics.size(other)) is not None:
                yield from self._with_constant(value, node, lambda f: self.times_size(f, size))
                return
        yield from self._pairs(node, lambda a, b: self.product_of(a, b, node))

    def _visit_quotient(self, node: Node) -> Iterator[Reading]:
        left, right = node.inputs
        if (divisor := self.statics.array(right)) is not None:
            if divisor.all():
                with np.errstate(over="ignore"):
                    inverse = 1 / divisor
                yield from self._with_constant(left, node, lambda f: self.times(f, inverse, node))
        elif (size := self.statics.size(right)) is not None:
            inverse_size = size.power(-2)
            if inverse_size is not None:
                yield from self._with_constant(
                    left, node, lambda f: self.times_size(f, inverse_size)
                )
        elif (dividend := self.statics.array(left)) is not None:

            def quotient(form: Form) -> Reading | None:
                inverse = self.inverse_of(form, node)
                return self.times(inverse, dividend, node) if isinstance(inverse, Form) else inverse

            yield from self._with_constant(right, node, quotient, root=True)
        else:

            def divided(one: Form, other: Form) -> Reading | None:
                inverse = self.inverse_of(other, node)
                if not isinstance(inverse, Form):
                    return replace(inverse, stage="norm") if inverse is not None else None
                return self.product_of(one, inverse, node)

            yield from self._pairs(node, divided)

    def _visit_where(self, node: Node) -> Iterator[Reading]:
        """Where(c, 0, v) is v if v is 0 wherever c holds, as x - E[x] is where all x are equal."""
        condition, chosen, value = node.inputs
        zero = self.statics.array(chosen)
        if zero is None or zero.ndim or zero.any():
            return
        for reading in self.readings(value):
            if isinstance(reading, Form) and self._vanishes(reading, condition):
                yield reading

    def _vanishes(self, form: Form, condition: AnyValue) -> bool:
        """Whether a form is c (x - m), and a condition holds only where min x = max x."""
        statistic = form.statistic
        if statistic is None or statistic.groups or form.layout is not None or form.root:
            return False
        if form.terms.keys() != {X, M} or not np.array_equal(form.terms[X], -form.terms[M]):
            return False
        pending, seen = [condition], set[Node]()
        while pending:
            made = self.facts.producer(pending.pop())
            if made is None or made.domain or made.scope is not self.scope or made in seen:
                continue
            seen.add(made)
            if made.op == "And":
                pending += made.inputs
            elif made.op == "Equal":
                ends = [self.facts.producer(v) for v in made.inputs]
                if {e.op for e in ends if e is not None} == {"ReduceMin", "ReduceMax"} and all(
                    e is not None
                    and not e.domain
                    and self.source(e.inputs[0]) is form.base
                    and self.reduced_axes(e) == statistic.axes
                    and self.keeps_dims(e)
                    for e in ends
                ):
                    return True
        return False

    def _visit_neg(self, node: Node) -> Iterator[Reading]:
        minus = scalar_of(-1.0)
        yield from self._with_constant(node.inputs[0], node, lambda f: self.times(f, minus, node))

    def _visit_reciprocal(self, node: Node) -> Iterator[Reading]:
        yield from self._each(node, lambda f: self.inverse_of(f, node), root=True)

    def _visit_sqrt(self, node: Node) -> Iterator[Reading]:
        yield from self._each(node, lambda f: self.root_of(f, node), root=True)

    def _visit_cast(self, node: Node) -> Iterator[Reading]:
        """A Cast that is no copy, as from integers: a miss stays one."""
        for reading in self.readings(node.inputs[0]):
            if isinstance(reading, Miss):
                yield reading

    def _visit_abs(self, node: Node) -> Iterator[Reading]:
        for reading in self.over(node.inputs[0]):
            if isinstance(reading, Form) and reading.full and reading.root is None:
                yield replace(reading, even=True)

    def _visit_pow(self, node: Node) -> Iterator[Reading]:
        exponent = self.statics.scalar(node.inputs[1]) if len(node.inputs) == 2 else None
        if exponent is None:
            return

        def raised(form: Form) -> Reading | None:
            if exponent == 1:
                return form
            if exponent == 2:
                return self.square_of(form, node)
            if exponent == -1:
                return self.inverse_of(form, node)
            if exponent in (0.5, -0.5):
                made = self.root_of(form, node)
                if isinstance(made, Form) and exponent < 0:
                    return self.inverse_of(made, node)
                return made
            if exponent == -2:
                square = self.square_of(form, node)
                return self.inverse_of(square, node) if isinstance(square, Form) else square
            if form.full and form.root is None and (form.statistic or exponent in (3, 4)):
                reason = f"the exponent is {exponent:g}, where a variance has 2"
                return Miss(form.kind, form.base, form.statistic, reason, node)
            if form.root is None and form.statistic is not None and self.is_positive(form):
                reason = f"the exponent is {exponent:g}, where a deviation has 0.5 or -0.5"
                return Miss(form.kind, form.base, form.statistic, reason, node, "rooted")
            return None

        yield from self._each(node, raised, root=exponent in (0.5, -0.5, -1))

    def _visit_maximum(self, node: Node) -> Iterator[Reading]:
        bound = self._lower_bound(node)
        if bound is None:
            return
        value, least = bound

        def clamped(form: Form) -> Reading | None:
            if form.full or form.even or form.statistic is None:
                return None
            if least <= 0:
                # A variance, a mean square and their roots are not negative.
                return form if self.is_positive(form) else self.unsquared(form, node, "reduced")
            root = form.root
            if root is None:
                if set(form.terms) == {(0, 0, 1, 0, 2)} and is_one(form.terms[0, 0, 1, 0, 2]):
                    made = Root("clamped", 1.0, 0, least)
                    return replace(form, root=made, terms={(0, 0, 0, 2, 0): scalar_of(1.0)})
            elif is_sum(root) and root.epsilon == 0 and _is_root_alone(form):
                made = Root("maximum", 1.0, 0, least)
                return replace(form, root=made, terms={ROOT: scalar_of(1.0)})
            reason = f"it is held above {least:g}, where a norm adds epsilon to the variance"
            stage = "reduced" if root is None else "rooted"
            return Miss(form.kind, form.base, form.statistic, reason, node, stage)

        for reading in self.over(value):
            if isinstance(reading, Miss):
                if reading.stage in ("reduced", "rooted"):
                    yield reading
            elif (result := clamped(reading)) is not None:
                yield result

    def _visit_reduce(self, node: Node) -> Iterator[Reading]:
        given = self.reduced_axes(node)
        if given is None:
            return
        squares = node.op in ("ReduceSumSquare", "ReduceL2")
        for reading in self.over(node.inputs[0]):
            axes = self.axes(reading.base, given) or given
            if isinstance(reading, Miss):
                if reading.stage in ("open", "reduced"):
                    rooted = "rooted" if node.op == "ReduceL2" else "reduced"
                    yield replace(reading, stage=rooted, statistic=Statistic(axes))
                continue
            form: Reading | None = replace(reading, even=False) if squares else reading
            if node.op == "ReduceL1" and reading.full and reading.root is None:
                form = replace(reading, even=True)
            if squares and isinstance(form, Form):
                form = self.square_of(form, node)
            if isinstance(form, Form):
                form = self._averaged(form, node, given)
            if isinstance(form, Form) and node.op == "ReduceL2":
                form = self.root_of(form, node)
            if form is not None:
                yield form

    def _averaged(self, form: Form, node: Node, given: tuple[int, ...]) -> Reading | None:
        """The mean or the sum of a form, as a node takes it."""
        value = node.inputs[0]
        axes = self.axes(form.base, given) or given
        made = self.mean_of(form, node, axes, self.keeps_dims(node), value)
        if not isinstance(made, Form) or node.op in _MEANS:
            return made
        if form.full:
            one = self.elements(made) == 1  # the sum of one element is its mean
            return made if one else replace(made, terms=times_n(made.terms, 2))
        if made.statistic != form.statistic or not self._is_reduced(value, given):
            return None  # a sum of means, or of sums
        return made

    def _visit_einsum(self, node: Node) -> Iterator[Reading]:
        """A sum over axes, "abc->ab", or of products, "abc,abc->ab"."""
        given = self.reduced_axes(node)
        if given is None:
            return
        if len(node.inputs) == 1:
            yield from self._visit_reduce(node)
            return
        for reading in self._pairs(node, lambda a, b: self.product_of(a, b, node)):
            made = self._averaged(reading, node, given) if isinstance(reading, Form) else None
            if made is not None:
                yield made

    def _visit_matmul(self, node: Node) -> Iterator[Reading]:
        """A product with a constant column c 1: the sum over the last axis, times a number."""
        column = self.facts.constant(node.inputs[1])
        if column is None or len(column.shape) != 2 or column.shape[1] != 1 or column.shape[0] < 2:
            return
        values = column.float64()
        if (values != values[0, 0]).any():
            return
        for reading in self.over(node.inputs[0]):
            if isinstance(reading, Form) and reading.full:
                made = self._averaged(reading, node, (-1,))
                if isinstance(made, Form):
                    made = self.times(made, values[0], node)
                if made is not None:
                    yield made

    def _is_reduced(self, value: AnyValue, axes: tuple[int, ...]) -> bool:
        """Whether a value is known to have size 1 along some axes."""
        shape = self.statics.shape_of(value)
        return shape is not None and all(shape[axis] == 1 for axis in axes)

    def _with_constant(
        self, value: AnyValue, node: Node, made: Any, *, root: bool = False
    ) -> Iterator[Reading]:
        for reading in self.over(value):
            if isinstance(reading, Miss):
                if not reading.closed:
                    added = node.op in ("Add", "Sub") and reading.stage == "norm"
                    stage = "rooted" if root and reading.stage == "reduced" else reading.stage
                    divided = node.op in ("Mul", "Div") and reading.stage == "rooted" and not root
                    mean = divided and reading.kind == "l2_norm"  # a sum over the number of terms
                    kind = PLAIN if mean else reading.kind
                    yield replace(reading, kind=kind, closed=added, stage=stage)
            elif (result := made(reading)) is not None:
                yield result

    def _pairs(self, node: Node, made: Any) -> Iterator[Reading]:
        """Every two readings over one base; what is known to miss stays so."""
        left, right = node.inputs
        first, second = self.over(left), self.over(right)
        for one in first:
            for other in second:
                if isinstance(one, Form) and isinstance(other, Form):
                    if one.base is other.base:
                        if (result := made(one, other)) is not None:
                            yield result
                    elif (mixed := self._mixed(one, other, node)) is not None:
                        yield mixed
        for misses, others in ((first, second), (second, first)):
            for miss in misses:
                if isinstance(miss, Miss) and not miss.closed:
                    yield from self._missed(miss, others, node, others is first)

    def _missed(
        self, miss: Miss, others: tuple[Reading, ...], node: Node, divisor: bool
    ) -> Iterator[Reading]:
        """A miss that meets another value: it is a near miss of a norm where it divides it."""
        related = any(
            other.base is miss.base or other.base in self._bases(miss) for other in others
        )
        if not related:
            if miss.stage == "reduced" and not (node.op == "Div" and divisor):
                yield miss  # a number, a mask, an epsilon that is computed
            return
        if miss.stage == "norm" and node.op in ("Add", "Sub", "Mul"):
            yield miss
        elif miss.stage == "rooted" and (node.op == "Mul" or (node.op == "Div" and divisor)):
            yield replace(miss, stage="norm")
        elif miss.stage in ("open", "reduced") and node.op in ("Add", "Sub", "Mul"):
            minus = node.op == "Sub" and miss.stage == "reduced"
            yield replace(miss, kind=CENTRED) if minus else miss

    def _bases(self, miss: Miss) -> set[AnyValue]:
        """The base of a miss, and what the base was made of."""
        made = self.facts.producer(miss.base)
        return {self.source(v) for v in made.inputs} if made is not None else set()

    def _mixed(self, one: Form, other: Form, node: Node) -> Miss | None:
        """A centred value over the deviation of another value."""
        if node.op not in ("Mul", "Div"):
            return None
        for value, deviation in ((one, other), (other, one)):
            if node.op == "Div" and deviation is one:
                continue
            if deviation.root is None or deviation.full:
                continue
            if deviation.root.kind == "square" and self.has_moments(deviation.base):
                continue  # another reading of it says more
            divisor: Reading | None = deviation
            if node.op == "Div":
                divisor = self.inverse_of(deviation, node)
            if not isinstance(divisor, Form) or [p[3] for p in divisor.terms] != [-1]:
                continue
            made = self.facts.producer(deviation.base)
            kin = (
                made is not None
                and made.op == "Sub"
                and any(self.source(v) is value.base for v in made.inputs)
            )
            if kin and value.statistic is None and deviation.root.kind == "square":
                kind = CENTRED
            elif value.terms.keys() == {X} and made is not None and self._is_part(made, value.base):
                kind = deviation.kind
                reason = f"the deviation is that of '{deviation.base.name}', a part of it"
                return Miss(kind, value.base, deviation.statistic, reason, node, "norm")
            elif value.terms.keys() == {X} and self._are_alike(value.base, deviation.base):
                kind = deviation.kind
                reason = f"what is divided is '{value.base.name}', another value"
                return Miss(kind, deviation.base, deviation.statistic, reason, node, "norm")
            elif value.statistic is not None and value.root is None and value.full:
                kind = value.kind
            else:
                continue
            base = value.base
            reason = f"the deviation is that of '{deviation.base.name}', another value"
            if deviation.root.kind == "variance":
                base = deviation.base
                reason = f"what is divided comes from '{value.base.name}', another value"
            return Miss(kind, base, deviation.statistic, reason, node, "norm")
        return None

    def _is_part(self, made: Node, value: AnyValue) -> bool:
        """Whether a node takes a part of a value."""
        parts = ("Gather", "Slice", "Split")
        return made.op in parts and not made.domain and self.source(made.inputs[0]) is value

    def _are_alike(self, one: AnyValue, other: AnyValue) -> bool:
        """Whether two tensors have the same shape, as far as is known."""
        first, second = self.facts.type(one), self.facts.type(other)
        if first is None or second is None or first.shape is None or second.shape is None:
            return True
        return len(first.shape) == len(second.shape) and all(
            a == b or not (isinstance(a, int) and isinstance(b, int))
            for a, b in zip(first.shape, second.shape, strict=True)
        )

    def _each(self, node: Node, made: Any, *, root: bool = False) -> Iterator[Reading]:
        for reading in self.over(node.inputs[0]):
            if isinstance(reading, Miss):
                if reading.stage == "reduced" and root:
                    yield replace(reading, stage="rooted")
                elif reading.stage in ("rooted", "open"):
                    yield reading
            elif (result := made(reading)) is not None:
                yield result

    def _lower_bound(self, node: Node) -> tuple[AnyValue, float] | None:
        """(value, least) where a node is max(value, least)."""
        first = node.inputs[0]
        if node.op == "Relu":
            return first, 0.0
        if node.op == "Max":
            if len(node.inputs) != 2:
                return None
            for value, other in (node.inputs, node.inputs[::-1]):
                if (least := self.statics.scalar(other)) is not None:
                    return value, least
            return None
        given: list[float | None] = []
        for index, name in ((1, "min"), (2, "max")):
            if len(node.inputs) > index and node.inputs[index].name:
                bound = self.statics.scalar(node.inputs[index])
                if bound is None:
                    return None
                given.append(bound)
            else:
                if node.parameter(name):
                    return None
                given.append(node.attrs.get(name))
        least, most = given
        # 65504, the largest float16, is how some exporters write "no upper bound".
        if least is None or (most is not None and most < 65504):
            return None
        return first, float(least)

    def reduced_axes(self, node: Node) -> tuple[int, ...] | None:
        """The axes that a reduction is over; None where they are not known."""
        value = node.inputs[0]
        if self.rank(value) is None:
            value = self._alike(value)
        if node.op in ("AveragePool", "GlobalAveragePool"):
            shape = self.statics.shape_of(value)
            if shape is None or len(shape) < 3:
                return None
            whole = node.op == "GlobalAveragePool" or _is_whole(node, shape)
            return tuple(range(2, len(shape))) if whole else None
        if node.op == "Einsum":
            summed = _summed_axes(node)
            return None if summed is None else self.axes(value, summed)
        if node.parameter("axes", "keepdims", "noop_with_empty_axes"):
            return None
        given = node.attrs.get("axes")
        if len(node.inputs) > 1 and node.inputs[1].name:
            given = self.statics.integers(node.inputs[1])
            if given is None:
                return None
        if not given:
            if node.attrs.get("noop_with_empty_axes", 0):
                return None
            given = None
        return self.axes(value, None if given is None else tuple(given))

    def keeps_dims(self, node: Node) -> bool:
        """Whether a reduction leaves its axes at size 1."""
        if node.op == "Einsum" or node.parameter("keepdims"):
            return False
        return bool(node.attrs.get("keepdims", 1))

    def _alike(self, value: AnyValue) -> AnyValue:
        """The tensor that a value was made of element by element, and whose shape it has."""
        for reading in self.readings(value):
            if isinstance(reading, Form) and reading.full and reading.layout is None:
                return reading.base
        return self.source(value)


def _is_whole(node: Node, shape: Dims) -> bool:
    """Whether an AveragePool has one window, which is all there is."""
    if node.parameter("kernel_shape", "pads", "auto_pad"):
        return False
    plain = node.text("auto_pad") in ("", "NOTSET", "VALID")
    padded = any(node.attrs.get("pads", ()))
    return plain and not padded and tuple(node.attrs.get("kernel_shape", ())) == shape[2:]


def _summed_axes(node: Node) -> tuple[int, ...] | None:
    """The axes that an Einsum on one tensor, or on two of one shape, sums over; None for others."""
    left, arrow, right = node.text("equation").replace(" ", "").partition("->")
    term, *others = left.split(",")
    if not arrow or len(others) > 1 or any(o != term for o in others):
        return None
    before, dots, after = term.partition("...")
    letters = before + after
    kept = [c for c in letters if c in right]
    whole = right.replace("...", "") == "".join(kept) and ("..." in right) == bool(dots)
    if not whole or len(set(letters)) < len(letters) or len(kept) == len(letters):
        return None
    if dots and right.partition("...")[0] != "".join(c for c in before if c in right):
        return None
    axes = [i for i, c in enumerate(before) if c not in right]
    from_right = bool(dots)
    axes += [
        i - len(after) if from_right else i + len(before)
        for i, c in enumerate(after)
        if c not in right
    ]
    return tuple(axes)


_MEANS: Final = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_REDUCTIONS: Final = _MEANS | {"ReduceSum", "ReduceSumSquare", "ReduceL2"}
# Operators without a rule: of a variance they make what no norm has.
_ELEMENTWISE: Final = frozenset(
    {
        "Ceil", "Elu", "Erf", "Exp", "Floor", "LeakyRelu", "Log", "Min", "Round", "Selu",
        "Sigmoid", "Softplus", "Softsign", "Tanh", "Where",
    }
)  # fmt: skip
_RULES: Final[Mapping[str, Any]] = {
    "Abs": Moments._visit_abs,
    "Add": Moments._visit_sum,
    "AveragePool": Moments._visit_reduce,
    "Cast": Moments._visit_cast,
    "Clip": Moments._visit_maximum,
    "Div": Moments._visit_quotient,
    "Einsum": Moments._visit_einsum,
    "Expand": Moments.visit_layout,
    "GlobalAveragePool": Moments._visit_reduce,
    "InstanceNormalization": Moments._visit_instance_norm,
    "MatMul": Moments._visit_matmul,
    "Max": Moments._visit_maximum,
    "Mul": Moments._visit_product,
    "Neg": Moments._visit_neg,
    "Pow": Moments._visit_pow,
    "Reciprocal": Moments._visit_reciprocal,
    "RMSNormalization": Moments._visit_rms_norm,
    "ReduceL1": Moments._visit_reduce,
    "ReduceL2": Moments._visit_reduce,
    "ReduceMean": Moments._visit_reduce,
    "ReduceSum": Moments._visit_reduce,
    "ReduceSumSquare": Moments._visit_reduce,
    "Relu": Moments._visit_maximum,
    "Reshape": Moments.visit_layout,
    "SimplifiedLayerNormalization": Moments._visit_rms_norm,
    "Sqrt": Moments._visit_sqrt,
    "Squeeze": Moments.visit_layout,
    "Sub": Moments._visit_sum,
    "Sum": Moments._visit_sum,
    "Tile": Moments.visit_layout,
    "Unsqueeze": Moments.visit_layout,
    "Where": Moments._visit_where,
}
