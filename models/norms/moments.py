"""Layer norm and RMS norm in every spelling, and their near misses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from models.norms.choices import (
    FLOAT,
    Layout,
    Plan,
)
from models.norms.said import Array, Expected, Written, standardized
from models.sheet import Sheet, size


class Writer:
    """Writes one moment norm into a sheet and remembers what its values are called."""

    def __init__(self, s: Sheet, plan: Plan) -> None:
        self.s, self.p, self.sp = s, plan, plan.spelling
        self.shape, self.axes = plan.layout.shape, plan.layout.axes
        self.rank = len(self.shape)
        self.n = size(self.shape, self.axes)
        self.inputs: list[str] = []  # all names of the value that is normalized

    def spot(self, name: str, value: str) -> str:
        """Append the no-op of the spelling if this is its place."""
        how = self.sp.between if self.sp.at == name else "none"
        same = self.s.noop(value, how, self.rank, self.s.dtype)
        if value in self.inputs:
            self.inputs.append(same)
        return same

    def commute(self, op: str, a: str, b: str) -> str:
        """Append an operator whose operands may be exchanged."""
        return self.s.do(op, *((b, a) if self.sp.flip else (a, b)))

    def written_axes(self, axes: Sequence[int]) -> list[int]:
        """The axes as the spelling writes them."""
        return [a - self.rank if self.sp.negative_axes else a for a in axes]

    def reduce(self, op: str, x: str, axes: Sequence[int], squeeze: bool = False) -> str:
        """Reduce; `squeeze` leaves the axes out, which is what the near misses forget."""
        written = self.written_axes(axes)
        if squeeze:
            return self.s.reduce(op, x, written, 0)
        if self.sp.keepdims == "unsqueeze":
            # onnx.reference inserts several negative axes one after the other below opset 13
            back = written if self.s.opset >= 13 else list(axes)
            return self.s.unsqueeze(self.s.reduce(op, x, written, 0), back)
        if self.sp.keepdims == "reshape" and len(axes) == 1 and axes[0] == self.rank - 1:
            shape = [0] * (self.rank - 1) + [1]
            return self.s.reshape(self.s.reduce(op, x, written, 0), shape)
        keep = None if self.sp.keepdims == "default" else 1
        return self.s.reduce(op, x, written, keep, self.sp.keepdims == "explicit")

    def count(self, x: str, axes: Sequence[int]) -> str:
        """N as dynamic shapes have it: Shape, Gather, product, Cast."""
        s = self.s
        shape = s.do("Shape", x)
        if len(axes) == 1:
            n = s.do("Gather", shape, s.ints(self.written_axes(axes)[0]), axis=0)
        else:
            picked = s.do("Gather", shape, s.ints(self.written_axes(axes)), axis=0)
            n = s.reduce("ReduceProd", picked, [0], 0)
        return s.cast(n, s.dtype)

    def mean(self, x: str, axes: Sequence[int] | None = None, **wrong: Any) -> str:
        """E[x]; `extra` is added to n, `squeeze` forgets keepdims."""
        over = self.axes if axes is None else axes
        squeeze, extra = wrong.get("squeeze", False), wrong.get("extra", 0)
        how = self.sp.mean
        if extra and how in ("mean", "pool", "sum_shape"):
            how = "sum_div"
        if how == "pool" and (squeeze or tuple(over) != self.axes):
            how = "mean"
        if how == "pool":
            return self.s.do("GlobalAveragePool", x)
        if how == "mean":
            return self.reduce("ReduceMean", x, over, squeeze)
        total = self.reduce("ReduceSum", x, over, squeeze)
        n = size(self.shape, over) + extra
        if how == "sum_mul":
            return self.commute("Mul", total, self.s.const(1.0 / n, stem="over_n"))
        count = self.count(x, over) if how == "sum_shape" else self.s.const(float(n), stem="n")
        return self.s.do("Div", total, count)

    def power(self, x: str, exponent: float) -> str:
        """Append Pow."""
        s = self.s
        if self.sp.square == "pow_int" and exponent == int(exponent) and s.opset >= 12:
            return s.do("Pow", x, s.ints(int(exponent), "exponent"))
        values = [exponent] if self.sp.square == "pow_one" else exponent
        return s.do("Pow", x, s.const(values, stem="exponent"))

    def squared(self, x: str, again: str | None = None) -> str:
        """x^2; `again` is another value equal to x."""
        x = self.spot("square", x)
        if self.sp.square == "mul":
            return self.s.do("Mul", x, x)
        if self.sp.square == "subs" and again is not None:
            return self.s.do("Mul", x, again)
        return self.power(x, 2.0)

    def second(self, x: str, again: str | None = None, **wrong: Any) -> str:
        """E[x^2] over the axes."""
        s, axes = self.s, wrong.get("axes", self.axes)
        plain = not wrong and self.sp.variance == "centred"
        if plain and self.sp.square == "sum_square":
            total = self.reduce("ReduceSumSquare", self.spot("square", x), axes)
            return s.do("Div", total, s.const(float(self.n), stem="n"))
        if plain and self.sp.square == "l2":
            norm = self.reduce("ReduceL2", self.spot("square", x), axes)
            return s.do("Div", s.do("Mul", norm, norm), s.const(float(self.n), stem="n"))
        power = wrong.get("power", 2)
        if power == "abs":
            squares = s.do("Abs", x)
        elif power == 2:
            squares = self.squared(x, again)
        else:
            squares = self.power(x, float(power))
        return self.mean(squares, axes, **{k: v for k, v in wrong.items() if k != "axes"})

    def variance(self, x: str, d: str, again: str, m: str) -> str:
        """The second moment about the mean, from x, d = x - m and the mean."""
        s, how = self.s, self.sp.variance
        if how.startswith("moments"):
            raw = s.do("Sub", self.second(x), self.squared(m))
            if how == "moments_max":
                return self.commute("Max", raw, s.const(0.0, stem="zero"))
            return s.do("Relu", raw) if how == "moments_relu" else raw
        if how == "x_times_d":
            return self.mean(self.commute("Mul", x, d))
        if how == "unbiased_sum":
            total = self.reduce("ReduceSum", self.squared(d, again), self.axes)
            return s.do("Div", total, s.const(float(self.n - 1), stem="n"))
        if how == "unbiased_torch":  # as torch.var: the count is in the graph
            var = self.second(d, again)
            n = self.count(x, self.axes) if self.sp.mean == "sum_shape" else ""
            n = n or s.const(float(self.n), stem="n")
            less = s.do("Sub", n, s.const(1.0, stem="one"))
            return s.do("Div", self.commute("Mul", var, n), less)
        if how == "unbiased_factor":
            factor = s.const(self.n / (self.n - 1), stem="factor")
            return self.commute("Mul", self.second(d, again), factor)
        return self.second(d, again)

    def root(self, x: str) -> str:
        """Append the square root."""
        return self.s.do("Sqrt", x) if self.sp.root == "sqrt" else self.power(x, 0.5)

    def with_epsilon(self, v: str, op: str = "Add") -> str:
        """Append the addition of epsilon."""
        shape = self.sp.eps_shape if len(self.sp.eps_shape) <= self.rank else (1,)
        eps = self.s.const(np.full(shape, self.p.setting.epsilon), stem="eps")
        left = self.sp.eps_left and op == "Add"
        return self.s.do(op, *((eps, v) if left else (v, eps)))

    def inverse(self, e: str) -> str:
        """1 / sqrt(e), for every `divide` but div."""
        s = self.s
        if self.sp.divide == "pow":
            r = self.power(e, -0.5)
        elif self.sp.divide == "one_over":
            r = s.do("Div", s.const(1.0, stem="one"), self.root(e))
        else:
            r = s.do("Reciprocal", self.root(e))
        return self.spot("inv", r)

    def inverse_of(self, x: str) -> str:
        """1 / x."""
        s = self.s
        if self.sp.divide == "one_over":
            return s.do("Div", s.const(1.0, stem="one"), x)
        return self.power(x, -1.0) if self.sp.divide == "pow" else s.do("Reciprocal", x)

    def parameter(self, which: str) -> tuple[str, Array] | None:
        """Gamma or beta in the sheet's type, and its values."""
        shape = self.p.gamma if which == "gamma" else self.p.beta
        if shape is None:
            return None
        s = self.s
        low, high = (0.5, 1.5) if which == "gamma" else (-0.4, 0.4)
        values = s.draw(which, shape, low, high)
        outer = self.p.setting.dtype
        stored = outer if self.sp.casts == "weight_cast" else s.dtype
        plus_one = which == "gamma" and self.sp.gamma_style == "plus_one"
        name = s.const(values - 1.0 if plus_one else values, stored, which)
        if stored != s.dtype:
            name = s.cast(name, s.dtype)
        if plus_one:
            name = self.commute("Add", name, s.const(1.0, stem="one"))
        return name, values


# Mutations of x -> (x - mean) / sqrt(var + eps) * gamma + beta, and of the same without a mean.
LAYER_MISSES: Final = (
    "pow4",
    "pow3",
    "abs",
    "other_variance_mean",
    "variance_axes",
    "mean_axes",
    "part_mean",
    "part_variance",
    "keepdims0",
    "keepdims0_mean",
    "keepdims0_variance",
    "eps_outside",
    "eps_subtracted",
    "not_centred",
    "gamma_expands",
    "gamma_expands_rank",
    "gamma_expands_last",
    "other_mean",
    "other_numerator",
    "mean_n_plus_1",
    "variance_n_plus_1",
    "std_twice",
    "std_twice_chain",
    "other_root",
    "eps_twice",
    "mean_not_squared",
    "moments_plus",
    "shift_sign",
    "two_roots",
    "clamped",
)
RMS_MISSES: Final = (
    "pow4",
    "pow3",
    "abs",
    "keepdims0",
    "eps_outside",
    "eps_subtracted",
    "centred_numerator",
    "gamma_expands",
    "gamma_expands_rank",
    "gamma_expands_last",
    "other_numerator",
    "variance_n_plus_1",
    "std_twice",
    "std_twice_chain",
    "other_root",
    "eps_twice",
)


def write_moments(s: Sheet, x: str, plan: Plan, others: Mapping[str, str] | None = None) -> Written:
    """Write a layer norm, an RMS norm or a near miss of one.

    Args:
        s: The scope.
        x: Its input.
        plan: A legal plan.
        others: Names of further inputs that some plans read: `z` shaped like x, `gamma`.
    """
    w = Writer(s, plan)
    sp, eps, miss, layout = plan.spelling, plan.setting.epsilon, plan.mutation, plan.layout
    centred = plan.kind != "rms_norm"
    outer = s.dtype
    inputs = w.inputs
    inputs.append(x)
    v = x
    if sp.casts != "none":
        v = s.cast(x, FLOAT)
        s.dtype = FLOAT
        inputs.append(v)
    v = w.spot("input", v)
    z = (others or {}).get("z", "")
    parts: list[Expected] = []

    # the first moment
    m = ""
    d = again = difference = v
    if centred or miss == "centred_numerator":
        read = w.spot("mean", v)
        over: tuple[int, ...] | None = None
        if miss == "mean_axes":
            over = (0,) if 0 not in layout.axes else (1,)
        if miss == "part_mean":
            over = layout.axes[-1:]
        if miss == "other_mean" and s.dtype != outer:
            z = s.cast(z, s.dtype)
        source = z if miss == "other_mean" else read
        wrong: dict[str, Any] = {}
        if miss in ("keepdims0", "keepdims0_mean"):
            wrong["squeeze"] = True
        if miss == "mean_n_plus_1":
            wrong["extra"] = 1
        m = w.spot("statistic", w.mean(source, over, **wrong))
        if miss == "mean_output":
            s.output(m, [None] * w.rank)
        other_m = w.mean(v, over, **wrong) if sp.means == 2 else m
        operands = (m, v) if sp.negated == "sub" else (v, m)
        difference = s.do("Sub", *operands)
        d = w.spot("centred", difference)
        again = d
        if sp.subs == 2 or sp.means == 2:
            again = s.do("Sub", *((other_m, v) if sp.negated == "sub" else (v, other_m)))

    # the second
    numerator = d
    if miss in ("pow4", "pow3", "abs"):
        var = w.second(d, power={"pow4": 4, "pow3": 3, "abs": "abs"}[miss])
    elif miss == "other_variance_mean":
        var = w.second(s.do("Sub", v, w.mean(v, tuple(range(w.rank)))))
    elif miss == "variance_axes":
        over = (0,) if 0 not in layout.axes else (1,)
        var = w.second(d, axes=over)
        part = _part("rms_norm", d, over, eps, difference)
        # a stored 1/n is that of an axis whose size is not said
        parts.append(dataclasses.replace(part, optional=plan.setting.said != "static"))
    elif miss == "part_variance":
        var = w.second(d, axes=layout.axes[:1])
        parts.append(_part("rms_norm", d, layout.axes[:1], eps, difference))
    elif miss in ("keepdims0", "keepdims0_variance"):
        var = w.second(d, squeeze=True)
    elif miss == "variance_n_plus_1":
        var = w.second(d, extra=1)
    elif miss == "other_numerator":
        var = w.variance(v, d, again, m)
        z = s.cast(z, s.dtype) if s.dtype != outer else z
        numerator = s.do("Sub", z, w.mean(z)) if centred else z
    elif miss == "centred_numerator":
        var = w.second(v)
    elif miss == "mean_not_squared":
        var = s.do("Relu", s.do("Sub", w.second(v), m))
    elif miss == "moments_plus":
        var = s.do("Add", w.second(v), w.squared(m))
    elif miss == "clamped":  # above zero, where rounding is no excuse
        var = w.commute("Max", w.variance(v, d, again, m), s.const(0.8, stem="least"))
    else:
        var = w.variance(v, d, again, m) if centred else w.second(d)
    if miss in ("mean_axes", "part_mean", "other_mean", "mean_n_plus_1", "keepdims0_mean"):
        parts.append(_part("rms_norm", d, layout.axes, eps, again, difference))
    if miss == "not_centred":
        numerator = v
    var = w.spot("statistic", var) if not centred else var

    # the quotient
    if miss == "eps_outside":
        core = s.do("Div", numerator, w.with_epsilon(w.root(var)))
        # it is an L2 norm of what was divided, with its own epsilon
        parts.append(
            dataclasses.replace(
                _part("l2_norm", numerator, layout.axes, eps, *(() if centred else inputs)),
                optional=True,
                unchecked=("epsilon",),
                formula=None
                if sp.variance.startswith("unbiased")
                else _part("l2_norm", numerator, layout.axes, eps).formula,
            )
        )
    elif miss == "eps_twice":
        core = s.do("Div", numerator, w.with_epsilon(w.root(w.with_epsilon(var))))
    elif miss == "other_root":
        core = w.commute("Mul", numerator, w.power(w.with_epsilon(var), -0.25))
    elif miss == "std_twice":
        core = s.do("Div", numerator, w.with_epsilon(var))
    elif miss == "std_twice_chain":
        std = w.root(w.with_epsilon(var))
        first = s.do("Div", numerator, std)
        core = s.do("Div", first, std)
        # The first quotient is the norm; its root is read again, so that it has to stay.
        parts.append(
            Expected(
                plan.kind,
                x,
                first,
                layout.axes,
                eps,
                refused=True,
                optional=True,
                other_inputs=tuple(inputs),
                # without bias it is the norm with another epsilon and a gain
                other_epsilons=(eps * (w.n - 1) / w.n,)
                if sp.variance.startswith("unbiased")
                else (),
            )
        )
    else:
        e = w.with_epsilon(var, "Sub" if miss == "eps_subtracted" else "Add")
        return _finish(w, x, v, m, numerator, e, outer, inputs, parts, others or {})
    return _finish(w, x, v, m, core, None, outer, inputs, parts, others or {})


def _part(kind: str, given: str, axes: tuple[int, ...], eps: float, *same: str) -> Expected:
    """A norm inside a near miss; its output is filled in when it is known."""

    def formula(v: Array) -> Array:
        if kind == "rms_norm":
            return standardized(v, axes, eps, centred=False)
        return np.asarray(v / (np.sqrt((v * v).mean(axes, keepdims=True)) + eps))

    return Expected(kind, given, "", axes, eps, other_inputs=tuple(same), formula=formula)


def _finish(
    w: Writer,
    x: str,
    v: str,
    m: str,
    numerator: str,
    e: str | None,
    outer: int,
    inputs: list[str],
    parts: list[Expected],
    others: Mapping[str, str],
) -> Written:
    """Divide by the root of `e` (or take the numerator as the quotient), scale and shift."""
    s, sp, plan = w.s, w.sp, w.p
    layout, eps, miss = plan.layout, plan.setting.epsilon, plan.mutation
    centred = plan.kind != "rms_norm"
    form = sp.form if e is not None else "plain"
    gamma: tuple[str, Array] | None
    ends: list[str] = []
    core = ""
    affine_later = True

    def back(value: str) -> str:
        """To the type outside, where the model has it in front of the weight."""
        if sp.casts in ("before_weight", "twice", "inv_back"):
            if s.dtype != outer:
                value = s.cast(value, outer)
            s.dtype = outer
        return value

    sign = 1.0
    if form in ("gamma_inv", "tf", "inv"):
        r = w.inverse(e or "")
        gamma = w.parameter("gamma") if form != "inv" else None
        if gamma is not None:
            r = w.commute("Mul", r, gamma[0])
        if form == "gamma_inv":
            y = w.commute("Mul", numerator, r)
            sign = -1.0 if sp.negated == "sub" else 1.0
            beta = w.parameter("beta")
            y = w.commute("Add", y, beta[0]) if beta else y
        elif form == "inv" and plan.gamma is not None:
            # x*inv - m*inv, then the affine
            y = s.do("Sub", w.commute("Mul", v, r), w.commute("Mul", m, r))
            y = back(y)
            gamma = w.parameter("gamma")
            y = w.commute("Mul", y, gamma[0]) if gamma else y
            beta = w.parameter("beta")
            y = w.commute("Add", y, beta[0]) if beta else y
        else:
            beta = w.parameter("beta")
            again = r
            if miss == "two_roots":
                again = w.inverse(s.do("Add", e or "", s.const(0.5, stem="more")))
                again = w.commute("Mul", again, gamma[0]) if gamma else again
            shift = w.commute("Mul", m, again)
            scaled = w.commute("Mul", v, r)
            if miss == "shift_sign":
                y = w.commute("Add", scaled, w.commute("Add", beta[0], shift) if beta else shift)
            elif beta:
                y = w.commute("Add", scaled, s.do("Sub", beta[0], shift))
            else:
                y = s.do("Sub", scaled, shift)
        core = y
        affine_later = False
    elif e is None:
        y = core = numerator
    elif sp.casts == "inv_back" and s.dtype != outer:
        r = s.cast(w.inverse(e), outer)
        s.dtype = outer
        y = core = w.commute("Mul", x, r)
    else:
        if sp.casts == "twice" and s.dtype != outer:
            numerator = s.cast(x, s.dtype)
            inputs.append(numerator)
        if sp.divide == "div":
            y = s.do("Div", numerator, w.root(e))
        else:
            y = w.commute("Mul", numerator, w.inverse(e))
        core = y
    if e is not None and sp.negated == "sub":
        sign = -1.0
    core_names = [core]
    if affine_later:
        y = w.spot("core", y)
        core_names.append(y)
        y = back(y)
        core_names.append(y)
        gamma = None if plan.runtime_gamma else w.parameter("gamma")
        if plan.runtime_gamma and "gamma" in others:
            y = w.commute("Mul", y, others["gamma"])
        elif gamma is not None:
            name, values = gamma
            if miss in ("gamma_expands", "gamma_expands_rank"):
                values = _expanding(values, layout, miss)
                name = s.const(values, stem="gamma_wide")
            y = w.commute("Mul", y, name)
            gamma = (name, values)
        beta = w.parameter("beta")
        if beta is not None:
            y = w.commute("Add", y, beta[0])
    if gamma is None and beta is None and not plan.runtime_gamma and sp.negated != "neg":
        ends += core_names  # copies of the core, behind which nothing comes
    ends.append(y)
    if sp.negated == "neg" and e is not None:
        y = s.do("Neg", y)
        ends.append(y)
    if s.dtype != outer:
        y = s.cast(y, outer)
        s.dtype = outer
        ends.append(y)
    end = w.spot("output", y)
    ends.append(end)

    g: Any = 1.0 if gamma is None or plan.runtime_gamma else gamma[1]
    b: Any = 0.0 if beta is None else beta[1]
    axes, n = layout.axes, w.n
    factor = n / (n - 1) if sp.variance.startswith("unbiased") else 1.0
    flip = -1.0 if sp.negated == "neg" and e is not None else 1.0

    def whole(values: Array) -> Array:
        core = sign * standardized(values, axes, eps, centred, factor)
        return np.asarray(flip * (core * g + b))

    def only_core(values: Array) -> Array:
        return sign * standardized(values, axes, eps, centred, factor)

    same = tuple(dict.fromkeys(i for i in inputs[1:] if i and i != x))
    row = Expected(
        plan.kind,
        x,
        end,
        axes,
        eps / factor,
        other_inputs=same,
        other_outputs=tuple(dict.fromkeys(o for o in ends if o != end)),
        other_epsilons=() if factor == 1.0 else (eps,),
        formula=whole,
    )
    bare = dataclasses.replace(
        row,
        output=core_names[-1],
        other_outputs=tuple(dict.fromkeys(core_names[:-1])),
        formula=only_core,
    )
    row = _kinds(row, plan)
    shape = layout.shape
    rows: tuple[Expected, ...]
    if miss.startswith("gamma_expands"):
        shape = np.broadcast_shapes(shape, np.shape(g))
        bare = _kinds(bare, plan)
        if miss == "gamma_expands_last":  # of one number the mean is all there is
            bare = dataclasses.replace(
                bare,
                other_kinds=(*bare.other_kinds, "l2_norm"),
                other_inputs=(*bare.other_inputs, numerator),
            )
        if miss == "gamma_expands_last" and plan.setting.knowledge == "open":
            # Only where the normalized axis turns out to have size 1 does gamma expand it.
            bare = dataclasses.replace(bare, other_outputs=(*bare.other_outputs, *ends))
        rows = (dataclasses.replace(bare, formula=only_core),)
    elif plan.runtime_gamma:
        rows = (_kinds(bare, plan),)
    elif miss == "mean_output":
        rows = (dataclasses.replace(row, refused=True),)
    elif miss:
        # what a near miss resembles depends on where one looks: all of it, or what follows the mean
        near = dataclasses.replace(
            row,
            recognised=False,
            not_input=x,
            other_kinds=(*row.other_kinds, "layer_norm", "rms_norm"),
            other_inputs=(*row.other_inputs, numerator),
        )
        found = [_filled(p, core_names, ends) for p in parts]
        found = [_scaled(p, g, b) for p in found]
        certain = miss == "variance_axes" or any(not p.optional for p in found)
        # where a part is a norm in its own right, its row may be the only one
        near = dataclasses.replace(near, optional=certain)
        rows = (near, *found)
        if miss == "eps_subtracted":
            # over the reals it is the norm with a negative epsilon
            rows += (dataclasses.replace(row, epsilon=-eps, optional=True),)
        if miss == "variance_n_plus_1":
            # over the reals it is the norm with another epsilon and a gain, as n - 1 is
            scale = n / (n + 1)
            rows += (
                dataclasses.replace(row, epsilon=eps / scale, optional=True, other_epsilons=(eps,)),
            )
        first = rows[0]
        rows = (
            first,
            *found,
            *(dataclasses.replace(r, formula=None) for r in rows[len(found) + 1 :]),
        )
        if any(x in (r.input, *r.other_inputs) for r in rows[1:]):
            first = dataclasses.replace(first, not_input=None)
        rows = (first, *rows[1:])
    else:
        rows = (row,)
    return Written(end, shape, tuple(for_knowledge(r, plan, core_names, w) for r in rows))


def _expanding(values: Array, layout: Layout, miss: str) -> Array:
    """A gamma that is larger than what it scales: along the first or last axis, or by a rank."""
    if miss == "gamma_expands_last":
        return values
    if miss == "gamma_expands_rank":
        ranks = (1,) * (len(layout.shape) - values.ndim)
        wide = values.reshape((1, *ranks, *values.shape))
        return np.concatenate([wide, 2.0 * wide])
    wide = values.reshape((1,) * (len(layout.shape) - values.ndim) + values.shape)
    return np.concatenate([wide, 2.0 * wide, 3.0 * wide])


def _filled(part: Expected, core_names: list[str], ends: list[str]) -> Expected:
    """Let a part reach to the end; how much of gamma and beta it takes is open."""
    if part.output:
        return part
    return dataclasses.replace(part, output=ends[-1], other_outputs=(*core_names, *ends))


def _scaled(part: Expected, g: Any, b: Any) -> Expected:
    """Put gamma and beta into a part's formula where its output is behind them."""
    bare = part.formula
    if bare is None or not part.other_outputs:
        return part
    return dataclasses.replace(part, formula=lambda v: np.asarray(bare(v) * g + b))


def _kinds(row: Expected, plan: Plan) -> Expected:
    """Axes and the shape of gamma decide between layer, instance and group norm."""
    shape, axes = plan.layout.shape, plan.layout.axes
    rank = len(shape)
    if row.kind == "layer_norm" and rank > 2 and axes == tuple(range(2, rank)):
        if _per_channel(plan, rank) and not plan.mutation:
            # gamma belongs to channels that were not normalized: that is no layer norm
            return dataclasses.replace(row, kind="instance_norm", other_kinds=("layer_norm",))
        # bare over all spatial axes it is both
        return dataclasses.replace(row, other_kinds=("instance_norm",) if rank > 3 else ())
    if row.kind == "layer_norm" and rank > 2 and axes == tuple(range(1, rank)):
        return dataclasses.replace(row, other_kinds=("group_norm",))  # of one group
    spatial = rank > 2 and axes == tuple(range(2, rank))
    if row.kind == "rms_norm" and spatial and (rank > 3 or _per_channel(plan, rank)):
        return dataclasses.replace(row, other_kinds=("filter_response_norm",))
    if row.kind == "rms_norm" and all(shape[a] == 1 for a in axes):
        return dataclasses.replace(row, other_kinds=("l2_norm",))  # of one number
    return row


def _per_channel(plan: Plan, rank: int) -> bool:
    """Whether gamma or beta vary along axis 1."""
    return any(
        p is not None and len(p) >= rank - 1 and p[1 - rank] > 1 for p in (plan.gamma, plan.beta)
    )


def for_knowledge(row: Expected, plan: Plan, core_names: list[str], w: Writer) -> Expected:
    """Widen a row where the shape is not known enough to be sure."""
    knowledge, sp = plan.setting.said, plan.spelling
    if knowledge in ("static", "symbolic") or not row.recognised:
        return row
    # A gamma over an axis of unknown extent could expand what it scales: then the norm ends at it,
    # or there is none, where gamma or beta came before the quotient.
    row = dataclasses.replace(
        row, other_outputs=tuple(dict.fromkeys((*row.other_outputs, *core_names)))
    )
    parameters = plan.gamma is not None or plan.beta is not None
    refusable = sp.form in ("gamma_inv", "tf") and parameters
    refusable |= sp.form == "inv" and plan.gamma is None and plan.beta is not None
    if knowledge == "unknown" and row.axes is not None:
        negative = tuple(a - w.rank for a in row.axes)
        if sp.negative_axes:
            row = dataclasses.replace(row, axes=negative, other_axes=(row.axes, None))
        else:
            row = dataclasses.replace(row, other_axes=(negative, None))
        # An epsilon of rank 3 could expand as well; an axis from the left says a rank is needed.
        refusable |= not sp.negative_axes or len(sp.eps_shape) > 1
    if refusable:
        row = dataclasses.replace(row, unchecked=(*row.unchecked, "recognised"))
    return row
