"""Where the dims of a reduced value lie, and groups of channels.

Unsqueeze(ReduceMean(x, keepdims=0))                     is the mean of x again
Reshape(f(Reshape(x, [N, G, ...])), shape of x)          is f over G groups of channels of x
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from onnxnorm.facts import AnyValue
from onnxnorm.layout import Dim
from onnxnorm.module import Node
from onnxnorm.moments import (
    UNKNOWN_RANK,
    Algebra,
    Coefficient,
    Form,
    Miss,
    Monomial,
    Reading,
    Statistic,
)


class Layouts(Algebra):
    """The rules of the operators that move dims."""

    def visit_layout(self, node: Node) -> Iterator[Reading]:
        """Squeeze, Unsqueeze and Reshape of what is reduced; Reshape back from groups."""
        for reading in self.readings(node.inputs[0]):
            if isinstance(reading, Miss):
                if reading.stage in ("reduced", "rooted"):
                    yield reading
            elif reading.statistic is not None:
                if (
                    not reading.full
                    and not reading.closed
                    and (made := self._moved(reading, node)) is not None
                ):
                    yield made
                if node.op == "Reshape" and (made := self._ungrouped(reading, node)) is not None:
                    yield made

    def _given_axes(self, node: Node) -> tuple[int, ...] | None:
        if node.parameter("axes"):
            return None
        if "axes" in node.attrs:
            return tuple(node.attrs["axes"])
        if len(node.inputs) > 1:
            return self.statics.integers(node.inputs[1])
        return None

    def _moved(self, form: Form, node: Node) -> Form | None:
        if any(c.size > 1 for c in form.terms.values()):
            return None
        rank = self.rank(form.base)
        statistic = form.statistic
        assert statistic is not None
        if node.op in ("Squeeze", "Unsqueeze"):
            axes = self._given_axes(node)
            if rank is None:
                again = form.layout == (*statistic.axes, UNKNOWN_RANK)
                return replace(form, layout=None) if again and axes == statistic.axes else None
            if axes is None:
                return None
            layout = self.spread(form, rank)
            if node.op == "Squeeze":
                drop = {a % len(layout) for a in axes}
                if any(layout[a] != -1 for a in drop):
                    return None
                made = tuple(a for i, a in enumerate(layout) if i not in drop)
            else:
                total = len(layout) + len(axes)
                places = {a % total for a in axes}
                rest = iter(layout)
                made = tuple(-1 if i in places else next(rest) for i in range(total))
            return replace(form, layout=self.tidy(made, form.base, statistic))
        if node.op in ("Expand", "Tile"):
            return form if form.layout is None and self._spans(node, form) else None
        if rank is None:
            return None
        base, after = self.statics.shape_of(form.base), self.statics.shape_of(node.outputs[0])
        assert base is not None, "its rank is known"
        if after is None:
            return None
        layout = self.spread(form, rank)
        kept = [(axis, base[axis]) for axis in layout if axis != -1]
        made_list: list[int] = []
        unlike = 0
        for dim in after:
            if dim == 1:
                made_list.append(-1)
                continue
            if not kept:
                return None
            axis, size = kept.pop(0)
            # There are as many elements as before: of one dim alone no more need be known.
            unlike += dim != size
            if unlike > 1 or (dim != size and isinstance(dim, int)):
                return None
            made_list.append(axis)
        if kept:
            return None
        return replace(form, layout=self.tidy(tuple(made_list), form.base, statistic))

    def _spans(self, node: Node, form: Form) -> bool:
        """Whether Expand gives the shape of the base, or leaves a dim of it at 1."""
        if node.op == "Expand" and self.has_shape_of(node.inputs[1], form.base):
            return True
        shape = self.statics.shape_of(form.base)
        wanted = self._expanded_to(node)
        if shape is None or wanted is None or len(wanted) != len(shape):
            return False
        return all(
            w == s or w == 1 or not (isinstance(w, int) and isinstance(s, int))
            for w, s in zip(wanted, shape, strict=True)
        )

    def _expanded_to(self, node: Node) -> tuple[Dim, ...] | None:
        wanted = self.statics.dims(node.inputs[1]) if node.op == "Expand" else None
        return wanted or self.statics.shape_of(node.outputs[0])

    def _ungrouped(self, form: Form, node: Node) -> Form | None:
        """Reshape back: what was over groups of channels, over the tensor before the groups.

        Reshape(f(Reshape(x, [N, G, ...])), shape of x)   is f over G groups of channels of x
        """
        if form.layout is not None:
            return None
        for before in self.grouped_from(form.base):
            if self.restores(node, before):
                return self._over_groups(form, before, node)
        return None

    def _over_groups(self, form: Form, before: AnyValue, node: Node) -> Form | None:
        if not form.full and not self._is_expanded(node.inputs[0], form.base):
            return None
        statistic = self.group_statistic(form.base, before, form.statistic)
        if statistic is None:
            return None
        terms: dict[Monomial, Coefficient] = {}
        for powers, coefficient in form.terms.items():
            made = self._per_channel(coefficient, form.base, before, statistic)
            if made is None:
                return None
            terms[powers] = made
        return replace(form, base=before, statistic=statistic, terms=terms)

    def _per_channel(
        self, coefficient: Coefficient, grouped: AnyValue, before: AnyValue, statistic: Statistic
    ) -> Coefficient | None:
        """A factor of [N, G, C / G, ...] as one of [N, C, ...]; of [N, ..., G, C / G] as of [C]."""
        if coefficient.size == 1:
            return coefficient
        inner, outer = self.statics.shape_of(grouped), self.statics.shape_of(before)
        if inner is None or outer is None or coefficient.ndim > len(inner):
            return None
        full = (1,) * (len(inner) - coefficient.ndim) + coefficient.shape
        last = statistic.channel > 1
        pair = [d for d in (inner[-2:] if last else inner[1:3]) if isinstance(d, int)]
        others = full[:-2] if last else (full[0], *full[3:])
        aligned = last or inner[3:] == outer[2:]
        if len(pair) < 2 or not aligned or any(size != 1 for size in others):
            return None
        channels = np.broadcast_to(coefficient.reshape(full[-2:] if last else full[1:3]), pair)
        return channels.reshape(-1) if last else channels.reshape(-1, *(1,) * (len(outer) - 2))

    def _is_expanded(self, value: AnyValue, base: AnyValue) -> bool:
        """Whether a reduced value has been given the shape of its base."""
        made = self.facts.producer(value)
        shape = self.statics.shape_of(base)
        given = self.statics.shape_of(value)
        if made is not None and made.op == "Expand":
            given = self._expanded_to(made)
        if given is None or shape is None or len(given) != len(shape):
            return False
        return all(
            g == s or (s != 1 and g != 1 and not (isinstance(g, int) and isinstance(s, int)))
            for g, s in zip(given, shape, strict=True)
        )

    def grouped_from(self, value: AnyValue) -> Iterator[AnyValue]:
        """The tensors that Reshapes made a value of, the nearest first."""
        made = self.facts.producer(value)
        while made is not None and made.op == "Reshape" and made.scope is self.scope:
            value = self.source(made.inputs[0])
            yield value
            made = self.facts.producer(value)

    def restores(self, node: Node, before: AnyValue) -> bool:
        """Whether a Reshape gives back the shape of `before`."""
        shape = self.statics.shape_of(before)
        if shape is not None and self.statics.shape_of(node.outputs[0]) == shape:
            return True
        after = self.facts.type(node.outputs[0])
        if len(node.inputs) > 1:
            wanted = self.statics.dims(node.inputs[1])
            if wanted is not None and wanted == shape:
                return True
            if self.has_shape_of(node.inputs[1], before):
                return True
            if wanted is not None and shape is not None and len(wanted) == len(shape):
                unknown = [i for i, w in enumerate(wanted) if w != shape[i] and w != 0]
                if len(unknown) <= 1 and all(wanted[i] == -1 for i in unknown):
                    return True
        if after is None or after.shape is None or None in after.shape:
            return False
        return after.shape == shape

    def group_statistic(
        self, grouped: AnyValue, before: AnyValue, statistic: Statistic | None
    ) -> Statistic | None:
        """Statistics over [N, G, ...] as statistics over groups of the channels of [N, C, ...].

        TensorFlow has the channels last: [N, ..., G, C / G] for [N, ..., C].
        """
        inner, outer = self.statics.shape_of(grouped), self.statics.shape_of(before)
        if inner is None or outer is None or len(inner) < 3 or len(outer) < 2:
            return None
        if statistic is None or statistic.groups or inner[0] != outer[0]:
            return None
        rank, axes = len(inner), tuple(range(1, len(outer)))
        if statistic.axes == tuple(range(2, rank)):
            groups, channels = inner[1], outer[1]
            if isinstance(groups, int) and isinstance(channels, int) and channels % groups == 0:
                return Statistic(axes, groups)
        elif statistic.axes == (*range(1, rank - 2), rank - 1) and len(outer) > 2:
            groups, size, channels = inner[-2], inner[-1], outer[-1]
            if isinstance(groups, int) and isinstance(size, int) and groups * size == channels:
                return Statistic(axes, groups, len(outer) - 1)
        return None
