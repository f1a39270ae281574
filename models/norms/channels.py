"""Batch, group and instance norm, as operators and taken apart."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np

from models.norms.choices import (
    Layout,
    Plan,
    legal,
)
from models.norms.moments import Writer, write_moments
from models.norms.said import Array, Expected, Written, standardized
from models.sheet import Sheet

BATCH_FORMS: Final = ("operator", "arithmetic", "div", "mul_add", "tf", "tf_folded", "sub_mul")


def write_batch(s: Sheet, x: str, form: str, shape: tuple[int, ...], plan: Plan) -> Written:
    """Write a batch norm in inference, in the operator or taken apart.

    Args:
        s: The scope.
        x: Its input.
        form: One of `BATCH_FORMS`.
        shape: Of x, channels last where it begins with `tf`, else second.
        plan: Epsilon and the choices that matter here.
    """
    # what it computes on constants has another rank than x
    plan = dataclasses.replace(plan, spelling=dataclasses.replace(plan.spelling, between="none"))
    w = Writer(s, plan)
    eps = plan.setting.epsilon
    rank = len(shape)
    axis = rank - 1 if form.startswith("tf") else 1
    channels = shape[axis]
    g = s.draw("gamma", (channels,), 0.5, 1.5)
    b = s.draw("beta", (channels,), -0.4, 0.4)
    m = s.draw("running_mean", (channels,), -0.4, 0.4)
    v = s.draw("running_var", (channels,), 0.2, 1.8)
    wide = (channels,) if axis == rank - 1 else (channels,) + (1,) * (rank - 2)

    def const(values: Array, stem: str) -> str:
        return s.const(values.reshape(wide), stem=stem)

    axes = tuple(a for a in range(rank) if a != axis)
    std = np.sqrt(v + eps)
    certain = True
    if form == "operator":
        names = [s.const(values, stem=n) for n, values in zip("gbmv", (g, b, m, v), strict=True)]
        y = s.do("BatchNormalization", x, *names, epsilon=eps)
    elif form == "arithmetic":
        root = w.root(w.with_epsilon(const(v, "running_var")))
        d = s.do("Sub", x, const(m, "running_mean"))
        if w.sp.divide == "div":
            y = s.do("Div", d, root)
        else:
            y = w.commute("Mul", d, w.inverse_of(root))
        y = w.commute("Mul", y, const(g, "gamma"))
        y = w.commute("Add", y, const(b, "beta"))
    elif form == "div":
        y = s.do("Div", s.do("Sub", x, const(m, "running_mean")), const(std, "std"))
        y = w.commute("Add", w.commute("Mul", y, const(g, "gamma")), const(b, "beta"))
        certain = False
    elif form == "sub_mul":
        d = s.do("Sub", x, const(m, "running_mean"))
        y = w.commute("Add", w.commute("Mul", d, const(g / std, "scale")), const(b, "beta"))
        certain = False
    elif form in ("mul_add", "tf_folded"):
        y = w.commute("Mul", x, const(g / std, "scale"))
        y = w.commute("Add", y, const(b - m * g / std, "shift"))
        certain = False
    else:
        inv = w.inverse(w.with_epsilon(const(v, "running_var")))
        scale = w.commute("Mul", inv, const(g, "gamma"))
        shift = s.do("Sub", const(b, "beta"), w.commute("Mul", const(m, "running_mean"), scale))
        y = w.commute("Add", w.commute("Mul", x, scale), shift)

    def formula(values: Array) -> Array:
        gg, bb, mm, dd = (a.reshape(wide) for a in (g, b, m, std))
        return np.asarray((values - mm) / dd * gg + bb)

    row = Expected("batch_norm", x, y, axes, eps, formula=formula)
    if form != "operator":
        # Behind arithmetic on constants it is y = s x + t: the epsilon is only there where the
        # model adds it to a constant, and "batch_norm" and "channel_affine" are both right.
        row = dataclasses.replace(
            row,
            kind="batch_norm" if certain else "channel_affine",
            axes=axes if certain else None,
            epsilon=eps if certain else None,
            other_kinds=("channel_affine", "batch_norm"),
            unchecked=("axes", "epsilon"),
        )
    return Written(y, shape, (for_rank(row, plan, form == "operator"),))


def for_rank(row: Expected, plan: Plan, operator: bool) -> Expected:
    """Widen a row whose axes follow from the rank; without one, what is no operator needs it."""
    if plan.setting.said != "unknown" or not row.recognised:
        return row
    loose = () if operator else ("recognised",)
    return dataclasses.replace(
        row, other_axes=(*row.other_axes, None), unchecked=(*row.unchecked, *loose)
    )


GROUP_FORMS: Final = ("instance", "rows", "blocks", "blocks_affine", "operator18", "operator21")


def write_group(s: Sheet, x: str, form: str, groups: int, plan: Plan, silu: bool) -> Written:
    """Write a group norm of [N, C, H, W].

    Args:
        s: The scope.
        x: Its input.
        form: `instance` is InstanceNormalization between Reshapes; `rows` reduces over
            [N, G, -1]; `blocks` over [N, G, C/G, H, W]; `blocks_affine` scales there as well.
        groups: Must divide C.
        plan: Its layout's shape, epsilon and moments; `shuffled` and `uneven` are near misses.
        silu: Whether y * sigmoid(y) follows.
    """
    w = Writer(s, plan)
    n, c, *spatial = plan.layout.shape
    eps, miss = plan.setting.epsilon, plan.mutation
    g = s.draw("gamma", (c,), 0.5, 1.5)
    b = s.draw("beta", (c,), -0.4, 0.4)
    ones = (1,) * len(spatial)
    parts: list[Expected] = []
    core_row: Expected | None = None
    inner: tuple[int, ...] = ()

    def affine(value: str, shape: tuple[int, ...]) -> str:
        value = w.commute("Mul", value, s.const(g.reshape(shape), stem="gamma"))
        return w.commute("Add", value, s.const(b.reshape(shape), stem="beta"))

    if form.startswith("operator"):
        per = groups if form == "operator18" else c
        if per == groups:
            g, b = (np.repeat(a[:groups], c // groups) for a in (g, b))
        names = [s.const(a[:: c // per] if per != c else a) for a in (g, b)]
        y = s.do("GroupNormalization", x, *names, num_groups=groups, epsilon=eps)
    else:
        cut = 4 if miss == "uneven" else groups
        if form == "instance":
            grouped = s.reshape(x, [0, cut, -1])
            scale = s.const(np.ones(cut), stem="ones")
            zero = s.const(np.zeros(cut), stem="zeros")
            y = s.do("InstanceNormalization", grouped, scale, zero, epsilon=eps)
            parts.append(
                Expected(
                    "instance_norm",
                    grouped,
                    y,
                    (2,),
                    eps,
                    other_kinds=("layer_norm",),
                    other_axes=(None,) if plan.setting.said == "unknown" else (),
                    formula=lambda v: standardized(v, (2,), eps, True),
                )
            )
        else:
            inner = (n, cut, n * c * math.prod(spatial) // (n * cut))
            if form != "rows":
                inner = (n, groups, c // groups, *spatial)
            shape = [0, cut, -1] if form == "rows" else list(inner)
            if form != "rows" and plan.setting.knowledge != "static":
                shape = [0, groups, c // groups, *spatial]
            grouped = s.reshape(x, shape)
            layout = Layout(inner, tuple(range(2, len(inner))), ())
            core = dataclasses.replace(
                plan, kind="layer_norm", layout=layout, gamma=None, beta=None, mutation=""
            )
            inside = write_moments(s, grouped, legal(core))
            y = inside.output
            core_row = inside.expected[0]
            parts.append(dataclasses.replace(core_row, kind="layer_norm"))
            if form == "blocks_affine":
                y = affine(y, (1, groups, c // groups, *ones))
        if miss == "shuffled":
            y = s.do("Transpose", y, perm=[0, 2, 1])
        if plan.spelling.flip and plan.setting.opset >= 9:
            y = s.do("Reshape", y, s.do("Shape", x))
        else:
            target = [n if plan.setting.knowledge == "static" else 0, c, *spatial]
            y = s.reshape(y, target)
        if form != "blocks_affine":
            y = affine(y, (c, *ones))
    out = y
    if silu:
        out = w.commute("Mul", y, s.do("Sigmoid", y))

    def formula(values: Array) -> Array:
        rows = values.reshape(values.shape[0], groups, -1)
        if core_row is None or core_row.formula is None or miss:
            core = standardized(rows, (2,), eps, True)
        else:
            core = core_row.formula(values.reshape(inner))
        return np.asarray(core.reshape(values.shape) * g.reshape(c, *ones) + b.reshape(c, *ones))

    axes = tuple(range(1, 2 + len(spatial)))
    row = Expected("group_norm", x, y, axes, eps, formula=formula)
    if core_row is not None:
        row = dataclasses.replace(
            row, epsilon=core_row.epsilon, other_epsilons=core_row.other_epsilons
        )
    if miss:
        row = dataclasses.replace(row, recognised=False, not_input=x, optional=True)
    operator = form.startswith("operator")
    if plan.setting.said == "unknown" and not operator and not miss:
        # where x is not known to have the shape that the last Reshape gives, the inner norm is all
        row = dataclasses.replace(row, optional=True)
        parts = [dataclasses.replace(p, optional=True) for p in parts]
    elif not miss:
        parts = []
    row = for_rank(row, plan, operator)
    return Written(out, plan.layout.shape, (row, *parts))


def write_instance(s: Sheet, x: str, plan: Plan) -> Written:
    """Write the operator InstanceNormalization."""
    shape, eps = plan.layout.shape, plan.setting.epsilon
    c = shape[1]
    g, b = s.draw("gamma", (c,), 0.5, 1.5), s.draw("beta", (c,), -0.4, 0.4)
    y = s.do(
        "InstanceNormalization",
        x,
        s.const(g, stem="gamma"),
        s.const(b, stem="beta"),
        epsilon=eps,
    )
    wide = (c,) + (1,) * (len(shape) - 2)
    axes = tuple(range(2, len(shape)))

    def formula(values: Array) -> Array:
        core = standardized(values, axes, eps, True)
        return np.asarray(core * g.reshape(wide) + b.reshape(wide))

    row = Expected("instance_norm", x, y, axes, eps, formula=formula)
    return Written(y, shape, (for_rank(row, plan, operator=True),))
