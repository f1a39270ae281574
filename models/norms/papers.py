"""The layers of the papers: EvoNorm, filter response norm, IBN, weight standardization."""

from __future__ import annotations

import dataclasses

import numpy as np

from models.norms.channels import (
    write_batch,
    write_instance,
)
from models.norms.choices import (
    Layout,
    Plan,
    legal,
)
from models.norms.moments import Writer, write_moments
from models.norms.said import Array, Expected, Written, standardized
from models.sheet import Sheet


def write_evo_s0(s: Sheet, x: str, plan: Plan) -> Written:
    """EvoNorm-S0: x * sigmoid(v x) / sqrt(var over groups + eps) * gamma + beta.

    The variance is a group norm's; the numerator is not centred, so it is none.
    """
    n, c, h, wd = plan.layout.shape
    groups, eps = 3, plan.setting.epsilon
    v, g, b = (
        s.draw(k, (c, 1, 1), low, high)
        for k, low, high in (("v", 0.5, 1.5), ("gamma", 0.5, 1.5), ("beta", -0.4, 0.4))
    )
    w = Writer(s, plan)
    blocks = s.reshape(x, [n, groups, c // groups, h, wd])
    d = s.do("Sub", blocks, s.reduce("ReduceMean", blocks, [2, 3, 4]))
    var = s.reduce("ReduceMean", s.do("Mul", d, d), [2, 3, 4])
    std = s.do("Sqrt", w.with_epsilon(var))
    if s.opset >= 8:
        std = s.do("Expand", std, s.ints([n, groups, c // groups, h, wd], "shape"))
    else:
        std = s.do("Mul", std, s.const(np.ones((n, groups, c // groups, h, wd))))
    std = s.reshape(std, [n, c, h, wd])
    gate = s.do("Sigmoid", w.commute("Mul", x, s.const(v, stem="v")))
    quotient = s.do("Div", w.commute("Mul", x, gate), std)
    scaled = w.commute("Mul", quotient, s.const(g, stem="gamma"))
    y = w.commute("Add", scaled, s.const(b, stem="beta"))

    def formula(values: Array) -> Array:
        rows = values.reshape(n, groups, -1)
        below = np.sqrt(rows.var(2, keepdims=True) + eps)
        below = np.broadcast_to(below, rows.shape).reshape(values.shape)
        return np.asarray(values / (1.0 + np.exp(-v * values)) / below * g + b)

    row = Expected(
        "evo_norm",
        x,
        y,
        (1, 2, 3),
        eps,
        other_outputs=(scaled, quotient),
        # of the groups, seen from outside or in the reshaped value
        unchecked=("axes",),
        # Reshapes to fixed sizes: where x's own are not known, nothing says that the one is the
        # other's inverse.
        # And below opset 8 a product with ones stands for Expand, which no exporter writes.
        optional=plan.setting.said != "static" or s.opset < 8,
        formula=formula,
    )
    return Written(y, plan.layout.shape, (row,))


def write_evo_b0(s: Sheet, x: str, plan: Plan) -> Written:
    """EvoNorm-B0 in inference: x / max(running std, v x + sqrt(var over H, W + eps)), scaled."""
    c = plan.layout.shape[1]
    eps = plan.setting.epsilon
    v, g, b, running = (
        s.draw(k, (c, 1, 1), low, high)
        for k, low, high in (
            ("v", 0.5, 1.5),
            ("gamma", 0.5, 1.5),
            ("beta", -0.4, 0.4),
            ("running_std", 0.5, 1.5),
        )
    )
    w = Writer(s, plan)
    d = s.do("Sub", x, s.reduce("ReduceMean", x, [2, 3]))
    std = s.do("Sqrt", w.with_epsilon(s.reduce("ReduceMean", w.squared(d), [2, 3])))
    right = w.commute("Add", w.commute("Mul", x, s.const(v, stem="v")), std)
    below = w.commute("Max", s.const(running, stem="running_std"), right)
    quotient = s.do("Div", x, below)
    scaled = w.commute("Mul", quotient, s.const(g, stem="gamma"))
    y = w.commute("Add", scaled, s.const(b, stem="beta"))

    def formula(values: Array) -> Array:
        instance = np.sqrt(values.var((2, 3), keepdims=True) + eps)
        return np.asarray(values / np.maximum(running, v * values + instance) * g + b)

    row = Expected(
        "evo_norm",
        x,
        y,
        (2, 3),
        eps,
        other_outputs=(scaled, quotient),
        unchecked=("axes",),  # the running statistics were taken over (0, 2, 3)
        formula=formula,
    )
    return Written(y, plan.layout.shape, (row,))


def write_frn(s: Sheet, x: str, plan: Plan) -> Written:
    """Filter response norm: x / sqrt(E[x^2] + eps) * gamma + beta, then max(., tau)."""
    c = plan.layout.shape[1]
    changed = dataclasses.replace(plan, kind="rms_norm", gamma=(c, 1, 1), beta=(c, 1, 1))
    inside = write_moments(s, x, legal(changed))
    tau = s.draw("tau", (c, 1, 1), -0.5, 0.5)
    y = s.do("Max", inside.output, s.const(tau, stem="tau"))
    row = inside.expected[0]
    bare = row.formula

    def formula(values: Array) -> Array:
        assert bare is not None
        return np.maximum(bare(values), tau)

    row = dataclasses.replace(
        row,
        kind="filter_response_norm",
        output=y,
        # The threshold is a ReLU with an offset: part of the layer in the paper, an activation
        # behind an RMS norm for a recogniser of moments.
        other_outputs=(row.output, *row.other_outputs),
        other_kinds=("rms_norm",),
        formula=formula,
    )
    return Written(y, plan.layout.shape, (row,))


def write_ibn(s: Sheet, x: str, plan: Plan) -> Written:
    """IBN: instance norm on the first half of the channels, batch norm on the rest, Concat."""
    n, c, h, wd = plan.layout.shape
    half = c // 2
    left, right = s.split(x, 1, [half, c - half])
    layout = Layout((n, half, h, wd), (2, 3), ())
    first = write_instance(s, left, dataclasses.replace(plan, layout=layout))
    second = write_batch(s, right, "operator", (n, c - half, h, wd), plan)
    y = s.do("Concat", first.output, second.output, axis=1)
    return Written(y, plan.layout.shape, (*first.expected, *second.expected))


def write_weight_standardization(s: Sheet, x: str, plan: Plan, outside: bool) -> Written:
    """Conv with a standardized weight, whose arithmetic on constants was left in the graph."""
    n, c, h, wd = plan.layout.shape
    eps, targets = plan.setting.epsilon, c
    values = s.draw("weight", (targets, c, 3, 3), -1.0, 1.0)
    weight = s.const(values, stem="weight")
    w = Writer(s, plan)
    axes = [1, 2, 3]
    d = s.do("Sub", weight, s.reduce("ReduceMean", weight, axes))
    var = s.reduce("ReduceMean", s.do("Mul", d, d), axes)
    std = w.with_epsilon(s.do("Sqrt", var)) if outside else s.do("Sqrt", w.with_epsilon(var))
    ready = s.do("Div", d, std)
    y = s.do("Conv", x, ready, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def formula(given: Array) -> Array:
        over = (1, 2, 3)
        if outside:
            centred = given - given.mean(over, keepdims=True)
            return np.asarray(centred / (given.std(over, keepdims=True) + eps))
        return standardized(given, over, eps, True)

    row = Expected(
        "weight_standardization",
        weight,
        ready,
        (1, 2, 3),
        eps,
        other_inputs=(f"{weight}.stored",),
        # On constants an epsilon outside the root is as good as one inside: all is evaluated.
        other_kinds=("l2_norm",) if outside else ("layer_norm",),
        unchecked=("epsilon", "recognised") if outside else (),
        formula=formula,
    )
    return Written(y, (n, targets, h, wd), (row,))
