"""Puts a norm into a model: inputs, scope, neighbours, outputs, feeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from models.network import uniform
from models.norms.channels import (
    write_batch,
    write_group,
)
from models.norms.choices import (
    BFLOAT,
    FLOAT,
    HALF,
    Plan,
    Setting,
    fixed_axes,
    known_shape,
    legal,
)
from models.norms.moments import write_moments
from models.norms.rows import (
    write_l2,
    write_softmax,
)
from models.norms.said import Case, Written
from models.sheet import Sheet, place


def linear(s: Sheet, x: str, stem: str, shape: Sequence[int], conv: bool) -> str:
    """Append a MatMul over the last axis, or a Conv of one by one."""
    n = shape[1] if conv else shape[-1]
    edge = math.sqrt(1.0 / n)  # so that exp() of what comes out stays within float16
    weight = s.draw(stem, (n, n), -edge, edge)
    if conv:
        weight = weight.reshape(n, n, 1, 1)
        return s.do("Conv", x, s.const(weight, stem=stem), kernel_shape=[1, 1])
    return s.do("MatMul", x, s.const(weight, stem=stem))


def feed(name: str, shape: Sequence[int], dtype: int = FLOAT) -> NDArray[Any]:
    """Return values whose rows differ in scale and in mean, none of them trivial."""
    scale = np.ldexp(1.0, -(np.arange(shape[0]) % 3)).reshape((-1,) + (1,) * (len(shape) - 1))
    values = uniform(name, shape, -2.0, 2.0) * scale + 0.4
    return values.astype(helper.tensor_dtype_to_np_dtype(dtype))


def assemble(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    write: Callable[[Sheet, str], Written],
    *,
    fixed: Iterable[int] = (),
    constants: str = "initializer",
    others: Mapping[str, tuple[int, ...]] | None = None,
    mutation: str = "",
    reference: bool = True,
    valid: bool = True,
    conv: bool | None = None,
) -> Case:
    """Put a writer's nodes into a model.

    Args:
        name: Of the case; its parameters and feeds are drawn under it.
        setting: Types, opset, scope, neighbours, what is said of shapes.
        shape: Of the input x.
        write: Writes the norm.
        fixed: The axes whose extents are said where the shape is symbolic.
        constants: One of `models.sheet.CONSTANTS`.
        others: Further inputs and their shapes.
        mutation: What was changed, if anything.
        reference: See `Case`.
        valid: See `Case`.
        conv: Whether the neighbours are convolutions and not products over the last axis; None
            for where a convolution is usual.
    """
    net = Sheet(name, setting.opset, setting.dtype, constants)
    known = known_shape(shape, fixed, setting.knowledge)
    feeds: dict[str, NDArray[Any]] = {"x": feed(f"{name}/x", shape, setting.dtype)}
    if known is None:  # onnx.checker wants a rank of every graph input, so it is lost behind one
        net.input("flat", ["n"])
        net.input("extents", ["rank"], TensorProto.INT64)
        net.op("Reshape", "flat", "extents", out="x")
        feeds = {"flat": feeds["x"].reshape(-1), "extents": np.asarray(shape, np.int64)}
    else:
        net.input("x", known)
    for other, extents in (others or {}).items():
        net.input(other, known if known and extents == shape else extents)
    made: list[Written] = []
    if conv is None:
        conv = len(shape) == 4 and setting.knowledge != "unknown" and setting.dtype == FLOAT

    def inner(s: Sheet, x: str) -> str:
        if setting.neighbours:
            x = linear(s, x, "before", shape, conv)
        made.append(write(s, x))
        y = made[-1].output
        if setting.neighbours:
            y = linear(s, y, "after", made[-1].shape, conv)
        return y

    out = place(net, setting.scope, "x", known, inner)
    end = made[-1].shape
    said = known if end == shape else known_shape(end, (), setting.knowledge)
    if said is not None and end != shape and setting.knowledge != "static":
        said = [None] * len(end)
    if said is None:
        out, said = net.op("Reshape", out, net.ints([-1], "flat_shape"), out="flat_out"), ["m"]
    net.output(out, said)
    for other, extents in (others or {}).items():
        feeds[other] = feed(f"{name}/{other}", extents, setting.dtype)
    return Case(name, net.model(), made[-1].expected, feeds, mutation, reference, valid)


def moment_case(name: str, plan: Plan) -> Case:
    """Return the case of a plan, made legal."""
    plan = legal(plan)
    others: dict[str, tuple[int, ...]] = {}
    if plan.mutation in ("other_mean", "other_numerator"):
        others["z"] = plan.layout.shape
        plan = dataclasses.replace(plan, setting=dataclasses.replace(plan.setting, scope="main"))
    if plan.runtime_gamma:
        others["gamma"] = plan.gamma or (plan.layout.shape[-1],)
    return assemble(
        name,
        plan.setting,
        plan.layout.shape,
        lambda s, x: write_moments(s, x, plan, {k: k for k in others}),
        fixed=fixed_axes(plan.layout, plan.gamma, plan.beta),
        constants=plan.spelling.constants,
        others=others,
        mutation="" if plan.mutation == "mean_output" else plan.mutation,
    )


ROW_LAYOUTS: Final = ("last", "matrix", "channel", "channel3")


def softmax_case(name: str, log: bool, form: str, plan: Plan) -> Case:
    """Return a softmax or log softmax, or a near miss of one."""
    plan = legal(plan)
    where, layout = plan.setting, plan.layout
    others = {"z": layout.shape} if plan.mutation == "other_denominator" else {}
    if others:
        plan = dataclasses.replace(plan, setting=dataclasses.replace(where, scope="main"))
    if where.opset < 13 and form in ("operator", "log_of_operator") and where.knowledge != "static":
        # the rank decides over which axes it is
        plan = dataclasses.replace(
            plan, setting=dataclasses.replace(plan.setting, knowledge="static")
        )
    flattens = where.opset < 13 and form in ("operator", "log_of_operator")
    return assemble(
        name,
        plan.setting,
        layout.shape,
        lambda s, x: write_softmax(s, x, log, form, plan, {k: k for k in others}),
        fixed=layout.axes,
        constants=plan.spelling.constants,
        others=others,
        mutation=plan.mutation,
        reference=not flattens or layout.axes[0] == len(layout.shape) - 1,
    )


def l2_case(name: str, form: str, norm: str, plan: Plan) -> Case:
    """Return an L2 normalization, or a near miss of one."""
    plan = legal(plan)
    where = plan.setting
    others = {"z": plan.layout.shape} if plan.mutation == "other_numerator" else {}
    if others:
        where = dataclasses.replace(where, scope="main")
    if form == "operator" and where.dtype == BFLOAT and where.opset < 22:
        where = dataclasses.replace(where, dtype=HALF)
    if form in ("max", "rsqrt_max", "sqrt_max", "expand") and where.opset < 8:
        where = dataclasses.replace(where, opset=9)
    if form == "clip" and where.dtype != FLOAT and where.opset < 12:
        where = dataclasses.replace(where, opset=max(where.opset, 13))
    plan = dataclasses.replace(plan, setting=where)
    return assemble(
        name,
        where,
        plan.layout.shape,
        lambda s, x: write_l2(s, x, form, norm, plan, {k: k for k in others}),
        fixed=plan.layout.axes,
        constants=plan.spelling.constants,
        others=others,
        mutation=plan.mutation,
    )


def batch_case(name: str, form: str, shape: tuple[int, ...], plan: Plan) -> Case:
    """Return a batch norm; taken apart it stands behind something linear."""
    plan = legal(plan)
    where = plan.setting
    if form != "operator":
        where = dataclasses.replace(where, neighbours=True)
    if where.knowledge == "open":
        where = dataclasses.replace(where, knowledge="symbolic")
    if where.dtype == BFLOAT and where.opset < 22:  # Conv has it from then on
        where = dataclasses.replace(where, dtype=HALF)
    axis = len(shape) - 1 if form.startswith("tf") else 1
    plan = dataclasses.replace(plan, setting=where)
    return assemble(
        name,
        where,
        shape,
        lambda s, x: write_batch(s, x, form, shape, plan),
        fixed=(axis, len(shape) - 1),
        constants=plan.spelling.constants,
        reference=form != "operator" or where.opset >= 14,
        # the channels of what is linear are those of the norm
        conv=len(shape) == 4 and not form.startswith("tf"),
    )


def group_case(name: str, form: str, plan: Plan, silu: bool = False) -> Case:
    """Return a group norm, or a near miss of one."""
    plan = legal(plan)
    where = plan.setting
    if form == "operator18":
        where = dataclasses.replace(where, opset=18)
    if form == "operator21":
        where = dataclasses.replace(where, opset=max(21, where.opset))
    if form.startswith("operator"):  # onnx.reference expands it where it knows the shape
        where = dataclasses.replace(where, scope="main")
        if where.knowledge == "unknown" or where.dtype == BFLOAT:
            where = dataclasses.replace(where, knowledge="open", dtype=FLOAT)
    if form == "instance" and where.dtype == BFLOAT and where.opset < 22:
        where = dataclasses.replace(where, dtype=HALF)
    if where.knowledge == "open" and not form.startswith("operator"):
        where = dataclasses.replace(where, knowledge="symbolic")
    if where.knowledge == "unknown" and form == "blocks":
        where = dataclasses.replace(where, knowledge="symbolic")
    if form in ("rows", "blocks", "blocks_affine") and where.knowledge == "unknown":
        where = dataclasses.replace(where, knowledge="symbolic")
    plan = dataclasses.replace(plan, setting=where, kind="layer_norm")
    groups = 3
    return assemble(
        name,
        where,
        plan.layout.shape,
        lambda s, x: write_group(s, x, form, groups, plan, silu),
        fixed=range(1, len(plan.layout.shape)),
        constants=plan.spelling.constants,
        mutation=plan.mutation,
        reference=form != "operator18",
        valid=form != "operator18",
    )
