"""What no choice reaches: operators, two norms in one model, training, integers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from onnx import TensorProto

from models.network import uniform
from models.norms.build import (
    assemble,
)
from models.norms.choices import (
    DOUBLE,
    FLOAT,
    HALF,
    LAYOUTS,
    Plan,
    Setting,
    Spelling,
    legal,
)
from models.norms.moments import write_moments
from models.norms.papers import (
    write_evo_b0,
    write_evo_s0,
    write_frn,
    write_ibn,
    write_weight_standardization,
)
from models.norms.rows import (
    softmax,
)
from models.norms.said import Array, Case, Expected, Written, standardized
from models.sheet import Sheet


def _by_hand(
    name: str,
    write: Callable[[Sheet, str], Written],
    shape: tuple[int, ...] = (2, 3, 8),
    setting: Setting | None = None,
    **more: Any,
) -> Case:
    return assemble(name, setting or Setting(), shape, write, **more)


def _layer_operator(name: str, opset: int, outputs: int, affine: str, dtype: int) -> Case:
    def write(s: Sheet, x: str) -> Written:
        g, b = s.draw("gamma", (8,), 0.5, 1.5), s.draw("beta", (8,), -0.4, 0.4)
        names = [s.const(g, stem="gamma")]
        names += [s.const(b, stem="beta")] if affine == "both" else []
        outs = ["y", "mean", "inv_std"][:outputs]
        s.op("LayerNormalization", x, *names, out=outs, axis=-1, epsilon=1e-3)

        def formula(v: Array) -> Array:
            core = standardized(v, (2,), 1e-3, True)
            return np.asarray(core * g + (b if affine == "both" else 0.0))

        return Written(
            "y", (2, 3, 8), (Expected("layer_norm", x, "y", (2,), 1e-3, formula=formula),)
        )

    return _by_hand(name, write, setting=Setting(opset=opset, dtype=dtype))


def _rms_operator(name: str, dtype: int) -> Case:
    def write(s: Sheet, x: str) -> Written:
        g = s.draw("gamma", (8,), 0.5, 1.5)
        y = s.do("RMSNormalization", x, s.const(g, stem="gamma"), axis=-1, epsilon=1e-3)

        def formula(v: Array) -> Array:
            return standardized(v, (2,), 1e-3, False) * g

        return Written(y, (2, 3, 8), (Expected("rms_norm", x, y, (2,), 1e-3, formula=formula),))

    return _by_hand(name, write, setting=Setting(opset=23, dtype=dtype))


def _two_affines(name: str, runtime: bool) -> Case:
    """One core, two gammas and betas: x_hat is read twice, and neither affine is the norm's own."""
    plan = legal(Plan("layer_norm", LAYOUTS["last"], Spelling(), Setting()))

    def write(s: Sheet, x: str) -> Written:
        inside = write_moments(s, x, plan)
        core = inside.output
        ends = []
        for k in ("a", "b"):
            gamma = "gamma" if runtime and k == "b" else s.const(s.draw(f"g{k}", (8,), 0.5, 1.5))
            scaled = s.do("Mul", core, gamma)
            ends.append(s.do("Add", scaled, s.const(s.draw(f"b{k}", (8,), -0.4, 0.4))))
        return Written(s.do("Mul", *ends), (2, 3, 8), inside.expected)

    return _by_hand(name, write, others={"gamma": (8,)} if runtime else None)


def _core_is_output(name: str) -> Case:
    """x_hat is a graph output as well: the norm ends there, or keeps its affine and has to stay."""
    plan = legal(Plan("layer_norm", LAYOUTS["last"], Spelling(), Setting()))

    def write(s: Sheet, x: str) -> Written:
        inside = write_moments(s, x, plan)
        s.output(inside.output, [2, 3, 8])
        scaled = s.do("Mul", inside.output, s.const(s.draw("gamma", (8,), 0.5, 1.5)))
        y = s.do("Add", scaled, s.const(s.draw("beta", (8,), -0.4, 0.4)))
        row = inside.expected[0]
        row = dataclasses.replace(row, other_outputs=(*row.other_outputs, scaled, y))
        return Written(y, (2, 3, 8), (row,))

    return _by_hand(name, write)


def _mean_is_read(name: str) -> Case:
    """Somebody else computes with the mean."""
    plan = legal(Plan("layer_norm", LAYOUTS["last"], Spelling(), Setting(), (8,), (8,)))

    def write(s: Sheet, x: str) -> Written:
        inside = write_moments(s, x, plan)
        mean = next(n.output[0] for n in s.nodes if n.op_type == "ReduceMean")
        s.output(s.do("Relu", mean), [2, 3, 1])
        rows = (dataclasses.replace(inside.expected[0], refused=True),)
        return Written(inside.output, (2, 3, 8), rows)

    return _by_hand(name, write)


def _stacked(name: str, second: str) -> Case:
    """One norm straight behind another."""
    plan = Plan("layer_norm", LAYOUTS["last"], Spelling(), Setting(), (8,), (8,))

    def write(s: Sheet, x: str) -> Written:
        first = write_moments(s, x, legal(plan))
        changed = dataclasses.replace(
            plan, kind=second, gamma=None, beta=None, spelling=Spelling(square="mul")
        )
        then = write_moments(s, first.output, legal(changed))
        return Written(then.output, (2, 3, 8), (*first.expected, *then.expected))

    return _by_hand(name, write)


def _shared_statistics(name: str) -> Case:
    """Two layer norms of one value that share mean and root; Div and affine are their own."""

    def write(s: Sheet, x: str) -> Written:
        d = s.do("Sub", x, s.reduce("ReduceMean", x, [-1]))
        var = s.reduce("ReduceMean", s.do("Pow", d, s.const(2.0)), [-1])
        std = s.do("Sqrt", s.do("Add", var, s.const(1e-5)))
        rows, ends = [], []
        for k in ("a", "b"):
            core = s.do("Div", d, std)
            g, b = s.draw(f"g{k}", (8,), 0.5, 1.5), s.draw(f"b{k}", (8,), -0.4, 0.4)
            y = s.do("Add", s.do("Mul", core, s.const(g)), s.const(b))
            ends.append(y)
            rows.append(
                Expected(
                    "layer_norm",
                    x,
                    y,
                    (2,),
                    1e-5,
                    formula=lambda v, g=g, b=b: standardized(v, (2,), 1e-5, True) * g + b,  # type: ignore[misc]
                )
            )
        return Written(s.do("Mul", *ends), (2, 3, 8), tuple(rows))

    return _by_hand(name, write)


def _adaptive(name: str) -> Case:
    """Adaptive layer norm: y = norm(x) * (1 + scale) + shift, both of them computed."""
    plan = legal(Plan("layer_norm", LAYOUTS["last"], Spelling(), Setting()))

    def write(s: Sheet, x: str) -> Written:
        inside = write_moments(s, x, plan)
        gain = s.do("Add", "gamma", s.const(1.0, stem="one"))
        y = s.do("Add", s.do("Mul", inside.output, gain), "shift")
        return Written(y, (2, 3, 8), inside.expected)

    return _by_hand(name, write, others={"gamma": (2, 1, 8), "shift": (2, 1, 8)})


def _attention(name: str, opset: int) -> Case:
    """Softmax of q k^T * scale + mask, as attention has it."""

    def write(s: Sheet, x: str) -> Written:
        k = s.do("Transpose", x, perm=[0, 2, 1])
        scores = s.do("MatMul", x, k)
        scaled = s.do("Mul", scores, s.const(8**-0.5, stem="scale"))
        masked = s.do("Add", scaled, s.const(np.triu(np.full((3, 3), -1e4), 1), stem="mask"))
        y = s.do("Softmax", masked, axis=2 if opset < 13 else -1)
        out = s.do("MatMul", y, x)
        row = Expected(
            "softmax",
            masked,
            y,
            (2,),
            None,
            other_inputs=(scaled, scores),
            formula=softmax(2, False),
        )
        return Written(out, (2, 3, 8), (row,))

    return _by_hand(name, write, setting=Setting(opset=opset))


def _int_input(name: str, opset: int) -> Case:
    """A layer norm's nodes over integers: the mean and the variance are truncated."""
    net = Sheet(name, opset)
    net.input("x", [3, 8], TensorProto.INT32)
    m = net.reduce("ReduceMean", "x", [1])
    d = net.do("Sub", "x", m)
    v = net.reduce("ReduceMean", net.do("Mul", d, d), [1])
    e = net.do("Add", net.cast(v, FLOAT), net.const(0.05, stem="eps"))
    top = net.cast(d, FLOAT)
    y = net.do("Div", top, net.do("Sqrt", e))
    net.output(y, [3, 8])
    row = Expected(
        "layer_norm",
        "x",
        y,
        (1,),
        0.05,
        recognised=False,
        not_input="x",
        other_inputs=(top, d),
        formula=lambda v: standardized(v, (1,), 0.05, True),
    )
    feeds = {"x": np.floor(uniform(f"{name}/x", (3, 8), -4.0, 5.0)).astype(np.int32)}
    return Case(name, net.model(), (row,), feeds, "int_input")


def _cast_int_input(name: str) -> Case:
    """Integers that are made float first: from there on it is a layer norm."""
    net = Sheet(name)
    net.input("tokens", [2, 3, 8], TensorProto.INT32)
    x = net.cast("tokens", FLOAT)
    plan = legal(Plan("layer_norm", LAYOUTS["last"], Spelling(), Setting(), (8,), (8,)))
    made = write_moments(net, x, plan)
    net.output(made.output, [2, 3, 8])
    feeds = {"tokens": np.floor(uniform(f"{name}/x", (2, 3, 8), -4.0, 5.0)).astype(np.int32)}
    return Case(name, net.model(), made.expected, feeds)


def _batch_training(name: str, opset: int) -> Case:
    """BatchNormalization that takes its statistics from the batch."""

    def write(s: Sheet, x: str) -> Written:
        names = [
            s.const(s.draw(k, (6,), low, high), stem=k)
            for k, low, high in (
                ("gamma", 0.5, 1.5),
                ("beta", -0.4, 0.4),
                ("running_mean", -0.4, 0.4),
                ("running_var", 0.5, 1.5),
            )
        ]
        outputs = ["y", "mean", "var"] + ([] if opset >= 14 else ["saved_mean", "saved_var"])
        given: dict[str, Any] = {"training_mode": 1} if opset >= 14 else {}
        s.op("BatchNormalization", x, *names, out=outputs, epsilon=0.05, **given)
        row = Expected("batch_norm", x, "y", (0, 2, 3), 0.05, recognised=False, not_input=x)
        g, b, m, v = (
            s.draw(k, (6, 1, 1), low, high)
            for k, low, high in (
                ("gamma", 0.5, 1.5),
                ("beta", -0.4, 0.4),
                ("running_mean", -0.4, 0.4),
                ("running_var", 0.5, 1.5),
            )
        )
        row = dataclasses.replace(
            row, formula=lambda a: np.asarray((a - m) / np.sqrt(v + 0.05) * g + b)
        )
        return Written("y", (2, 6, 4, 5), (row,))

    return _by_hand(
        name,
        write,
        (2, 6, 4, 5),
        Setting(opset=opset),
        mutation="training",
        reference=opset >= 14,  # the evaluator knows no training below
    )


def _batch_statistics(name: str, opset: int) -> Case:
    """A batch norm in training mode, taken apart: statistics over (0, 2, 3) of the batch itself."""

    def write(s: Sheet, x: str) -> Written:
        d = s.do("Sub", x, s.reduce("ReduceMean", x, [0, 2, 3]))
        var = s.reduce("ReduceMean", s.do("Mul", d, d), [0, 2, 3])
        core = s.do("Div", d, s.do("Sqrt", s.do("Add", var, s.const(0.05, stem="eps"))))
        g, b = s.draw("gamma", (6, 1, 1), 0.5, 1.5), s.draw("beta", (6, 1, 1), -0.4, 0.4)
        y = s.do("Add", s.do("Mul", core, s.const(g)), s.const(b))
        # Over the reals it is a layer norm over (0, 2, 3). We list a norm that mixes the samples
        # of a batch as a near miss, as the operator is with training_mode.
        row = Expected(
            "batch_norm",
            x,
            y,
            (0, 2, 3),
            0.05,
            recognised=False,
            not_input=x,
            other_kinds=("layer_norm",),
            formula=lambda v: np.asarray(standardized(v, (2, 3), 0.05, True) * g + b),
        )
        return Written(y, (2, 6, 4, 5), (row,))

    return _by_hand(name, write, (2, 6, 4, 5), Setting(opset=opset), mutation="batch_statistics")


def _two_way_sigmoid(name: str, form: str) -> Case:
    """sigmoid(x) = softmax(x, 0)[0]: as exp(x) / (exp(x) + 1) it is no softmax of x."""

    def write(s: Sheet, x: str) -> Written:
        if form == "exp":
            e = s.do("Exp", x)
            y = s.do("Div", e, s.do("Add", e, s.const(1.0, stem="one")))
            near = Expected(
                "softmax", x, y, (2,), None, recognised=False, optional=True, not_input=x
            )
            near = dataclasses.replace(near, formula=softmax(2, False))
            return Written(y, (2, 3, 8), (near,))
        wide = s.unsqueeze(x, [3])
        zero = s.do("Sub", wide, wide)
        pair = s.do("Concat", wide, zero, axis=3)
        both = s.do("Softmax", pair, axis=3)
        y = s.do("Gather", both, s.ints(0, "first"), axis=3)
        near = Expected("softmax", x, y, (2,), None, recognised=False, optional=True, not_input=x)
        near = dataclasses.replace(near, formula=softmax(2, False))
        # the operator is a softmax of the pair, and is left alone
        row = Expected("softmax", pair, both, (3,), None, optional=True)
        return Written(y, (2, 3, 8), (near, row))

    return _by_hand(name, write, mutation="two_way_sigmoid")


def _lp_operator_near(name: str) -> Case:
    def write(s: Sheet, x: str) -> Written:
        y = s.do("LpNormalization", x, axis=-1, p=1)
        row = Expected(
            "l2_norm",
            x,
            y,
            (2,),
            None,
            recognised=False,
            optional=True,
            not_input=x,
            formula=lambda v: np.asarray(v / np.sqrt((v * v).sum(2, keepdims=True))),
        )
        return Written(y, (2, 3, 8), (row,))

    return _by_hand(name, write, mutation="l1")


def _rms_through_l2(name: str, epsilon: bool) -> Case:
    """As x / (||x|| / sqrt(n)), which has no epsilon, or x * sqrt(n) / max(||x||, eps)."""

    def write(s: Sheet, x: str) -> Written:
        norm = s.reduce("ReduceL2", x, [-1])
        g = s.draw("gamma", (8,), 0.5, 1.5)
        eps = None
        if epsilon:
            eps = 1e-3
            scaled = s.do("Mul", x, s.const(math.sqrt(8.0), stem="root_n"))
            core = s.do("Div", scaled, s.clip(norm, eps))
        else:
            core = s.do("Div", x, s.do("Div", norm, s.const(math.sqrt(8.0), stem="root_n")))
        y = s.do("Mul", core, s.const(g, stem="gamma"))

        def formula(v: Array) -> Array:
            return np.asarray(v / np.sqrt((v * v).mean(2, keepdims=True)) * g)

        row = Expected(
            "l2_norm" if epsilon else "rms_norm",
            x,
            y,
            (2,),
            eps if epsilon else 0.0,
            # With max() it is an L2 norm with a gain; without an epsilon it is both.
            other_kinds=() if epsilon else ("l2_norm",),
            other_outputs=(core,),
            other_epsilons=(None, eps, 0.0),
            unchecked=("epsilon",),
            formula=formula,
        )
        if epsilon:
            row = dataclasses.replace(row, other_inputs=(scaled,))
        return Written(y, (2, 3, 8), (row,))

    return _by_hand(name, write)


def paper_case(name: str, which: str, plan: Plan) -> Case:
    """Return a layer of the papers: evo_s0, evo_b0, frn, ibn, ws or ws_outside."""
    plan = legal(plan)
    writers: dict[str, Callable[[Sheet, str, Plan], Written]] = {
        "evo_s0": write_evo_s0,
        "evo_b0": write_evo_b0,
        "frn": write_frn,
        "ibn": write_ibn,
        "ws": lambda s, x, p: write_weight_standardization(s, x, p, outside=False),
        "ws_outside": lambda s, x, p: write_weight_standardization(s, x, p, outside=True),
    }
    where = plan.setting
    if which in ("evo_b0", "frn") and where.opset < 8:  # Max broadcasts from 8 on
        where = dataclasses.replace(where, opset=9)
    if which.startswith("evo") and where.knowledge == "unknown":
        where = dataclasses.replace(where, knowledge="static")
    plan = dataclasses.replace(plan, setting=where)
    return assemble(
        name,
        where,
        plan.layout.shape,
        lambda s, x: writers[which](s, x, plan),
        fixed=range(1, 4),
        constants=plan.spelling.constants,
        reference=which != "ibn" or where.opset >= 14,
    )


def _no_epsilon(name: str, kind: str) -> Case:
    """No epsilon at all: an exporter drops one that is too small to matter; a zero row is NaN."""

    def write(s: Sheet, x: str) -> Written:
        d = s.do("Sub", x, s.reduce("ReduceMean", x, [-1])) if kind == "layer_norm" else x
        core = s.do("Div", d, s.do("Sqrt", s.reduce("ReduceMean", s.do("Mul", d, d), [-1])))
        g = s.draw("gamma", (8,), 0.5, 1.5)
        y = s.do("Mul", core, s.const(g, stem="gamma"))
        row = Expected(
            kind,
            x,
            y,
            (2,),
            0.0,
            other_epsilons=(None,),
            formula=lambda v: standardized(v, (2,), 0.0, kind == "layer_norm") * g,
        )
        return Written(y, (2, 3, 8), (row,))

    return _by_hand(name, write)


def hand_written() -> Iterator[Case]:
    """Yield what no choice reaches."""
    for kind in ("layer_norm", "rms_norm"):
        yield _no_epsilon(f"{kind}/no_epsilon", kind)
    for opset, dtype in ((17, FLOAT), (18, HALF), (21, DOUBLE), (23, FLOAT)):
        for outputs in (1, 2, 3):
            affine = "both" if outputs != 2 else "gamma"
            yield _layer_operator(
                f"layer_norm/operator-{outputs}-{affine}/op{opset}", opset, outputs, affine, dtype
            )
    for dtype in (FLOAT, HALF):
        yield _rms_operator(f"rms_norm/operator/{dtype}", dtype)
    yield _rms_through_l2("rms_norm/l2_over_root_n", epsilon=False)
    yield _rms_through_l2("l2_norm/times_root_n", epsilon=True)
    yield _two_affines("layer_norm/two_affines", runtime=False)
    yield _two_affines("layer_norm/two_affines_one_computed", runtime=True)
    yield _core_is_output("layer_norm/core_is_output")
    yield _mean_is_read("layer_norm/mean_is_read")
    yield _stacked("layer_norm/before_layer_norm", "layer_norm")
    yield _stacked("layer_norm/before_rms_norm", "rms_norm")
    yield _shared_statistics("layer_norm/shared_statistics")
    yield _adaptive("layer_norm/adaptive")
    yield _attention("softmax/attention/op11", 11)
    yield _attention("softmax/attention/op17", 17)
    yield _cast_int_input("layer_norm/cast_integers")
    for opset in (11, 13, 18):
        yield _int_input(f"layer_norm/int_input/op{opset}", opset)
        yield _batch_statistics(f"batch_norm/batch_statistics/op{opset}", opset)
    for opset in (7, 9, 14, 15):
        yield _batch_training(f"batch_norm/training/op{opset}", opset)
    yield _two_way_sigmoid("softmax/two_way_sigmoid_exp", "exp")
    yield _two_way_sigmoid("softmax/two_way_sigmoid_operator", "operator")
    yield _lp_operator_near("l2_norm/p1")
