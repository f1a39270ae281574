"""Softmax, log softmax and L2 normalization in every spelling, and their near misses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from models.norms.choices import (
    Plan,
)
from models.norms.moments import Writer, for_knowledge
from models.norms.said import Array, Expected, Formula, Written
from models.sheet import Sheet

SOFTMAX_FORMS: Final = ("operator", "exp", "stable", "stable_all")
LOG_SOFTMAX_FORMS: Final = (
    "operator",
    "log_of_operator",
    "log_of_exp",
    "log_of_stable",
    "log_sum_exp",
    "minus_log_sum",
    "stable",
)
SOFTMAX_MISSES: Final = (
    "sum_axis",
    "max_axis",
    "keepdims0",
    "other_denominator",
    "sum_epsilon",
    "exp_twice",
)
LOG_SOFTMAX_MISSES: Final = ("unshifted_sum", "other_denominator", "sum_axis")


def _exps(x: Array, axis: int) -> Array:
    return np.asarray(np.exp(x - x.max(axis, keepdims=True)))


def softmax(axis: int, log: bool) -> Formula:
    """Return exp(x) / sum exp(x), or its logarithm, as a formula."""

    def formula(x: Array) -> Array:
        e = _exps(x, axis)
        y = e / e.sum(axis, keepdims=True)
        return np.asarray(np.log(y)) if log else y

    return formula


def write_softmax(
    s: Sheet,
    x: str,
    log: bool,
    form: str,
    plan: Plan,
    others: Mapping[str, str] | None = None,
) -> Written:
    """Write softmax or log softmax over the layout's one axis, or a near miss."""
    w = Writer(s, plan)
    w.inputs.append(x)
    (axis,) = plan.layout.axes
    rank, miss = w.rank, plan.mutation
    kind = "log_softmax" if log else "softmax"
    axes = plan.layout.axes
    other = (axis + 1) % rank if axis + 1 < rank else axis - 1
    z = (others or {}).get("z", "")
    v = w.spot("input", x)
    ends: list[str] = []
    shifts: list[str] = []
    parts: list[Expected] = []

    def divide(e: str, total: str) -> str:
        if w.sp.divide == "div":
            return s.do("Div", e, total)
        return w.commute("Mul", e, w.inverse_of(total))

    def total(e: str, over: tuple[int, ...] = axes) -> str:
        return w.reduce("ReduceSum", e, over, miss == "keepdims0")

    def shifted(over: tuple[int, ...] = axes) -> str:
        return s.do("Sub", v, w.reduce("ReduceMax", w.spot("mean", v), over))

    if form in ("operator", "log_of_operator"):
        written = w.written_axes(axes)[0] if s.opset >= 11 else axis
        given = {"axis": written}
        if s.opset >= 13 and axis == rank - 1 and plan.spelling.flip:
            given = {}
        op = "LogSoftmax" if log and form == "operator" else "Softmax"
        y = s.do(op, v, **given)
        if form == "log_of_operator":
            y = s.do("Log", w.spot("core", y))
        if s.opset < 13:
            axes = tuple(range(axis, rank))
    elif form == "exp":
        e = s.do("Exp", v)
        below = total(e, (other,)) if miss == "sum_axis" else total(e)
        if miss == "other_denominator":
            below = total(s.do("Exp", z))
        if miss == "sum_epsilon":
            below = s.do("Add", below, s.const(0.5, stem="eps"))
        y = divide(e, below)
    elif form in ("stable", "stable_all") and not log:
        # a maximum over all axes is constant along each row as well
        over = tuple(range(rank)) if form == "stable_all" else axes
        d = shifted((other,) if miss == "max_axis" else over)
        shifts.append(d)
        e = s.do("Exp", d)
        if form == "stable_all":
            w.inputs.append(d)
        if miss in ("max_axis", "sum_axis"):
            found = (other,) if miss == "sum_axis" else axes
            parts.append(Expected("softmax", d, "", found, None, formula=softmax(found[0], False)))
        if miss == "exp_twice":
            parts.append(Expected("softmax", e, "", axes, None, formula=softmax(axis, False)))
            e = s.do("Exp", e)
        if miss == "other_denominator":
            below = total(s.do("Exp", s.do("Sub", z, w.reduce("ReduceMax", z, axes))))
        else:
            below = total(e, (other,) if miss == "sum_axis" else axes)
        if miss == "sum_epsilon":
            below = s.do("Add", below, s.const(0.5, stem="eps"))
        y = divide(w.spot("centred", e), below)
    elif form == "log_of_exp":
        e = s.do("Exp", v)
        y = s.do("Log", divide(e, total(e)))
    elif form == "log_of_stable":
        e = s.do("Exp", shifted())
        y = s.do("Log", divide(e, total(e)))
    elif form == "log_sum_exp":
        source = z if miss == "other_denominator" else v
        over = (other,) if miss == "sum_axis" else axes
        if miss == "sum_axis":  # over the other axis it is one
            parts.append(Expected("log_softmax", x, "", over, None, formula=softmax(other, True)))
        y = s.do("Sub", v, w.reduce("ReduceLogSumExp", source, over))
    elif form == "minus_log_sum":
        y = s.do("Sub", v, s.do("Log", total(s.do("Exp", v))))
    else:
        d = shifted()
        shifts.append(d)
        over = (other,) if miss == "sum_axis" else axes
        source = v if miss == "unshifted_sum" else z if miss == "other_denominator" else d
        if miss == "sum_axis":
            parts.append(Expected("log_softmax", d, "", over, None, formula=softmax(other, True)))
        y = s.do("Sub", d, s.do("Log", total(s.do("Exp", source), over)))
    ends.append(y)
    y = w.spot("output", y)

    flattened = tuple(axes)

    def flat(values: Array) -> Array:
        rows = values.reshape(math.prod(values.shape[:axis]), -1)
        return softmax(1, log)(rows).reshape(values.shape)

    whole_row = s.opset < 13 and form in ("operator", "log_of_operator")
    row = Expected(
        kind,
        x,
        y,
        flattened,
        None,
        other_inputs=tuple(dict.fromkeys(i for i in w.inputs if i != x)),
        other_outputs=tuple(o for o in ends if o != y),
        formula=flat if whole_row else softmax(axis, log),
    )
    if not miss:
        rows: tuple[Expected, ...] = (row,)
    else:
        certain = any(not p.optional for p in parts)
        same = any(p.input == x for p in parts)
        near = dataclasses.replace(
            row,
            recognised=False,
            not_input=None if same else x,
            optional=certain,
            other_inputs=(*row.other_inputs, *shifts),
        )
        rows = (near, *(dataclasses.replace(p, output=y, other_outputs=(*ends,)) for p in parts))
    return Written(y, plan.layout.shape, tuple(for_knowledge(r, plan, [], w) for r in rows))


L2_FORMS: Final = ("operator", "clip", "max", "expand", "add", "rsqrt_add", "rsqrt_max", "sqrt_max")
L2_MISSES: Final = ("no_root", "l1", "min", "keepdims0", "other_numerator", "pow4")


def write_l2(
    s: Sheet,
    x: str,
    form: str,
    norm: str,
    plan: Plan,
    others: Mapping[str, str] | None = None,
) -> Written:
    """Write an L2 normalization, or a near miss.

    Args:
        s: The scope.
        x: Its input.
        form: One of `L2_FORMS`; where epsilon goes.
        norm: `l2`, `sum_square` or `sum`; how the sum of squares is computed.
        plan: Layout, setting and the choices that matter here.
        others: The input `z` that some near misses read.
    """
    w = Writer(s, plan)
    w.inputs.append(x)
    axes, eps, miss = plan.layout.axes, plan.setting.epsilon, plan.mutation
    v = w.spot("input", x)
    numerator = (others or {})["z"] if miss == "other_numerator" else v

    def squares() -> str:
        if miss == "l1":
            return w.reduce("ReduceL1", v, axes)
        if miss == "pow4":
            return w.reduce("ReduceSum", w.power(v, 4.0), axes)
        if norm == "sum_square":
            return w.reduce("ReduceSumSquare", v, axes, miss == "keepdims0")
        return w.reduce("ReduceSum", w.squared(v), axes, miss == "keepdims0")

    def length() -> str:
        if norm == "l2" and miss not in ("l1", "pow4", "no_root", "keepdims0"):
            return w.reduce("ReduceL2", v, axes)
        return squares() if miss in ("no_root", "l1") else w.root(squares())

    def least(value: str) -> str:
        if miss == "min":
            return s.do("Min", value, s.const(np.full(w.sp.eps_shape[:1], eps), stem="eps"))
        return w.commute("Max", value, s.const(np.full(w.sp.eps_shape[:1], eps), stem="eps"))

    def over(top: str, below: str) -> str:
        if w.sp.divide == "div":
            return s.do("Div", top, below)
        return w.commute("Mul", top, w.inverse_of(below))

    rule: Callable[[Array], Array]
    if form == "operator":
        y = s.do("LpNormalization", v, axis=w.written_axes(axes)[0], p=2)
        rule = np.sqrt
    elif form in ("clip", "expand"):
        below = s.clip(length(), eps)
        if form == "expand":
            below = s.do("Expand", below, s.do("Shape", v))
        y = over(numerator, below)
        rule = lambda q: np.maximum(np.sqrt(q), eps)  # noqa: E731
    elif form == "max":
        y = over(numerator, least(length()))
        rule = lambda q: np.maximum(np.sqrt(q), eps)  # noqa: E731
    elif form == "add":
        y = over(numerator, w.with_epsilon(length()))
        rule = lambda q: np.sqrt(q) + eps  # noqa: E731
    elif form == "rsqrt_add":
        e = w.with_epsilon(squares())
        y = s.do("Div", numerator, w.root(e)) if w.sp.divide == "div" else ""
        y = y or w.commute("Mul", numerator, w.inverse(e))
        rule = lambda q: np.sqrt(q + eps)  # noqa: E731
    elif form == "rsqrt_max":
        y = w.commute("Mul", numerator, w.inverse(least(squares())))
        rule = lambda q: np.sqrt(np.maximum(q, eps))  # noqa: E731
    else:
        y = over(numerator, w.root(least(squares())))
        rule = lambda q: np.sqrt(np.maximum(q, eps))  # noqa: E731
    end = w.spot("output", y)

    def formula(values: Array) -> Array:
        return np.asarray(values / rule((values * values).sum(axes, keepdims=True)))

    row = Expected(
        "l2_norm",
        x,
        end,
        axes,
        None if form == "operator" else eps,
        other_inputs=tuple(dict.fromkeys(i for i in w.inputs if i != x)),
        other_outputs=() if end == y else (y,),
        formula=formula,
    )
    rows: tuple[Expected, ...] = (row,)
    if miss:
        # l1 resembles it, or nothing that we list
        quiet = miss in ("l1", "no_root", "pow4", "min")
        near = dataclasses.replace(row, recognised=False, not_input=x, optional=quiet)
        rows = (dataclasses.replace(near, other_kinds=("rms_norm",)),)
    return Written(end, plan.layout.shape, tuple(for_knowledge(r, plan, [], w) for r in rows))
