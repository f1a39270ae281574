"""What other exporters write, and what people write by hand: each a graph as text.

    HEAD, the body of a case, and the rows that a perfect recogniser prints

`x` is normalized, `y` is the output, `z` and `w` are further inputs; the constants of `HEAD` are
there for every body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, parser

from models.norms.build import feed
from models.norms.said import Array, Axes, Case, Expected, Formula, standardized

GAIN: Final = np.asarray([1, 2, 0.5, 3, 1.5, 0.75, 0.875, 1.25])
SHIFT: Final = np.asarray([0.125, -0.25, 0.375, 0.5, 0.625, -0.75, 0.875, -1])
CHANNELS: Final = np.asarray([1, 2, 0.5, 3, 1.5, 0.75])
EPS: Final = 1 / 64


def _stored(values: Array) -> str:
    return f"{{{{{', '.join(map(str, values.tolist()))}}}}}"


HEAD: Final = f"""
<ir_version: 9, opset_import: ["" : {{opset}}]>
main ({{dtype}}[{{dims}}] x{{others}}) => ({{dtype}}[{{dims}}] y)
<float one = {{{{1}}}}, float two = {{{{2}}}}, float half = {{{{0.5}}}}, float minus = {{{{-1}}}},
 float mhalf = {{{{-0.5}}}}, float e = {{{{0.015625}}}}, float n = {{{{8}}}},
 float zero = {{{{0}}}}, float inv_n = {{{{0.125}}}}, float root_n = {{{{2.8284271}}}},
 float seven = {{{{7}}}}, float nine = {{{{9}}}}, float many = {{{{100}}}},
 float[4] ones = {{{{1, 1, 1, 1}}}},
 float[8] g = {_stored(GAIN)}, float[8] b = {_stored(SHIFT)},
 float[6,1,1] gc = {_stored(CHANNELS)}, float[6] gl = {_stored(CHANNELS)},
 float[8,1] column = {_stored(np.full(8, 0.125))},
 int64[1] last = {{{{-1}}}}, int64[1] i0 = {{{{0}}}}, int64[1] i1 = {{{{1}}}},
 int64[1] i2 = {{{{2}}}}, int64[1] i3 = {{{{3}}}}, int64[1] i4 = {{{{4}}}},
 int64[3] eight = {{{{1, 1, 8}}}}, int64[5] blocks = {{{{2, 3, 2, 4, 5}}}},
 int64[4] whole = {{{{2, 6, 4, 5}}}}, int64[5] last_blocks = {{{{2, 4, 5, 3, 2}}}},
 int64[4] last_whole = {{{{2, 4, 5, 6}}}}>
{{{{ {{body}} }}}}
"""

# Beginnings that many share.
MEAN: Final = "m = ReduceMean <axes = [-1]> (x) "
CENTRED: Final = MEAN + "d = Sub (x, m) "
VARIANCE: Final = CENTRED + "p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) "
ROOT: Final = VARIANCE + "a = Add (v, e) s = Sqrt (a) "
SQUARE: Final = "p = Mul (x, x) v = ReduceMean <axes = [-1]> (p) "
SCALED: Final = "k = Div (d, s) h = Mul (k, g) y = Add (h, b)"
EQUAL: Final = (
    "least = ReduceMin <axes = [-1]> (x) most = ReduceMax <axes = [-1]> (x)"
    " alike = Equal (least, most) "
)
SHIFTED: Final = "m = ReduceMax <axes = [-1]> (x) d = Sub (x, m) "
GROUPED: Final = (
    "r = Reshape (x, {blocks}) m = ReduceMean <axes = [{axes}]> (r) d = Sub (r, m) p = Mul (d, d)"
    " v = ReduceMean <axes = [{axes}]> (p) a = Add (v, e) s = Sqrt (a) k = Div (d, s)"
    " q = Reshape (k, {whole}) h = Mul (q, {factor}) y = Add (h, {factor})"
)


@dataclass(frozen=True)
class _Text:
    """A body and what is in it."""

    name: str
    body: str
    rows: tuple[Expected, ...]
    shape: tuple[int, ...] = (2, 3, 8)
    dims: str = ""
    opset: int = 17
    dtype: int = int(TensorProto.FLOAT)
    inputs: str = ""  # names of further inputs of the shape of x, "z,w"
    mutation: str = ""
    valid: bool = True
    reference: bool = True


# ** formulas **


def _layer(axes: Axes = (2,), eps: float = EPS, g: Any = 1.0, b: Any = 0.0) -> Formula:
    return lambda x: np.asarray(standardized(x, axes, eps, True) * g + b)


def _rms(axes: Axes = (2,), eps: float = EPS, g: Any = 1.0, b: Any = 0.0) -> Formula:
    return lambda x: np.asarray(standardized(x, axes, eps, False) * g + b)


def _l2(axes: Axes, length: Callable[[Array], Any], g: Any = 1.0) -> Formula:
    return lambda x: np.asarray(x / length((x * x).sum(axes, keepdims=True)) * g)


def _soft(axes: Axes = (2,), *, log: bool = False) -> Formula:
    def formula(x: Array) -> Array:
        shifted = x - x.max(axes, keepdims=True)
        total = np.exp(shifted).sum(axes, keepdims=True)
        return np.asarray(shifted - np.log(total) if log else np.exp(shifted) / total)

    return formula


def _group(groups: int, *, last: bool) -> Formula:
    def formula(x: Array) -> Array:
        moved = np.moveaxis(x, -1, 1) if last else x
        parts = moved.reshape(x.shape[0], groups, -1)
        y = standardized(parts, (2,), EPS, True).reshape(moved.shape)
        y = y * CHANNELS.reshape(-1, 1, 1) + CHANNELS.reshape(-1, 1, 1)
        return np.asarray(np.moveaxis(y, 1, -1) if last else y)

    return formula


# ** rows **


def _is(
    kind: str,
    formula: Formula,
    output: str = "y",
    axes: Axes = (2,),
    eps: float | None = EPS,
    source: str = "x",
    **more: Any,
) -> tuple[Expected, ...]:
    return (Expected(kind, source, output, axes, eps, formula=formula, **more),)


def _not(kind: str, formula: Formula, source: str = "x", **more: Any) -> tuple[Expected, ...]:
    row = Expected(kind, source, "y", None, None, recognised=False, not_input="x", formula=formula)
    return (replace(row, **more),)


def _part(kind: str, formula: Formula, source: str, output: str = "y") -> tuple[Expected, ...]:
    """The part of a near miss that is a norm in its own right."""
    return (Expected(kind, source, output, (2,), EPS, not_input="x", formula=formula),)


# ** layer norms **

_FULL: Final = _is("layer_norm", _layer(g=GAIN, b=SHIFT))
_BARE: Final = _is("layer_norm", _layer())


def _counted(count: str) -> str:
    """Sums over a number of elements that is computed."""
    return (
        f"q = ReduceSum (x, last) {count} m = Div (q, c) d = Sub (x, m) p = Mul (d, d)"
        " r = ReduceSum (p, last) v = Div (r, c) a = Add (v, e) s = Sqrt (a) y = Div (d, s)"
    )


def _layer_norms() -> Iterator[_Text]:
    yield _Text(
        "einsum",
        'k0 = Einsum <equation = "abc->ab"> (x) q = Mul (k0, inv_n) m = Unsqueeze (q, last)'
        ' d = Sub (x, m) r = Einsum <equation = "abc,abc->ab"> (d, d) v = Mul (r, inv_n)'
        " a = Add (v, e) t = Sqrt (a) s = Unsqueeze (t, last) " + SCALED,
        _FULL,
    )
    yield _Text(
        "einsum_of_any_rank",
        'k0 = Einsum <equation = "...c -> ..."> (x) q = Div (k0, n) m = Unsqueeze (q, last)'
        ' d = Sub (x, m) r = Einsum <equation = "...c, ...c -> ..."> (d, d) v = Div (r, n)'
        " a = Add (v, e) t = Sqrt (a) s = Unsqueeze (t, last) " + SCALED,
        _FULL,
    )
    yield _Text(
        "mean_by_matmul",
        "m = MatMul (x, column) d = Sub (x, m) p = Mul (d, d) v = MatMul (p, column)"
        " a = Add (v, e) s = Sqrt (a) " + SCALED,
        _FULL,
    )
    yield _Text(
        "sum_of_three",
        VARIANCE + "a = Sum (v, e) s = Sqrt (a) i = Reciprocal (s) xi = Mul (x, i)"
        " mi = Mul (m, i) c = Neg (mi) y = Sum (xi, c, b)",
        _is("layer_norm", _layer(b=SHIFT)),
    )
    yield _Text(
        "distributed",
        ROOT + "i = Reciprocal (s) xi = Mul (x, i) xg = Mul (xi, g) mi = Mul (m, i)"
        " mg = Mul (mi, g) h = Sub (xg, mg) y = Add (h, b)",
        _FULL,
    )
    yield _Text(
        "gamma_over_deviation", ROOT + "i = Div (g, s) h = Mul (d, i) y = Add (b, h)", _FULL
    )
    yield _Text(
        "gamma_on_the_way",
        ROOT + "c = Unsqueeze (g, i1) t = Transpose <perm = [1, 0]> (c) f = Cast <to = 1> (t)"
        " k = Div (d, s) h = Mul (k, f) y = Add (h, b)",
        _FULL,
    )
    yield _Text(
        "gamma_computed",
        ROOT + "w1 = Exp (g) k = Div (d, s) h = Mul (k, w1) y = Add (h, b)",
        _is("layer_norm", _layer(g=np.exp(GAIN), b=SHIFT)),
    )
    yield _Text(
        "one_plus_weight",
        ROOT + "w1 = Add (one, g) k = Div (d, s) h = Mul (k, w1) y = Add (h, b)",
        _is("layer_norm", _layer(g=1 + GAIN, b=SHIFT)),
    )
    yield _Text(
        "divided_by_gamma",
        ROOT + "k = Div (d, s) h = Div (k, g) y = Sub (h, b)",
        _is("layer_norm", _layer(g=1 / GAIN, b=-SHIFT)),
    )
    yield _Text(
        "beta_minus", ROOT + "k = Div (d, s) h = Mul (k, g) y = Sub (b, h)",
        _is("layer_norm", _layer(g=-GAIN, b=SHIFT)),
    )  # fmt: skip
    yield _Text(
        "flax",
        MEAN + "p = Mul (x, x) q = ReduceMean <axes = [-1]> (p) mm = Mul (m, m) u = Sub (q, mm)"
        " v = Max (zero, u) d = Sub (x, m) a = Add (v, e) s = Sqrt (a) i = Reciprocal (s)"
        " ig = Mul (i, g) h = Mul (d, ig) y = Add (h, b)",
        _FULL,
    )
    yield _Text(
        "epsilon_before_the_mean",
        CENTRED + "p = Mul (d, d) r = ReduceSum (p, last) a = Add (r, n) c = Mul (a, inv_n)"
        " s = Sqrt (c) y = Div (d, s)",
        _is("layer_norm", _layer(eps=1.0), eps=1.0),
    )
    yield _Text(
        "root_of_n",
        CENTRED + "p = Mul (d, d) r = ReduceSum (p, last) a = Add (r, one) s = Sqrt (a)"
        " k = Div (d, s) y = Mul (k, root_n)",
        _is("layer_norm", _layer(eps=0.125), eps=0.125),
    )
    yield _Text(
        "length_over_root_of_n",
        CENTRED + "r = ReduceL2 <axes = [-1]> (d) s = Div (r, root_n) y = Div (d, s)",
        _is("layer_norm", _layer(eps=0.0), eps=0.0),
    )
    yield _Text(
        "tiled",
        MEAN + "mt = Tile (m, eight) d = Sub (x, mt) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) t = Sqrt (a) s = Tile (t, eight) "
        + SCALED,
        _FULL,
    )
    yield _Text(
        "expanded",
        MEAN + "sh = Shape (x) mt = Expand (m, sh) d = Sub (x, mt) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) t = Sqrt (a) s = Expand (t, sh) "
        + SCALED,
        _FULL,
        dims="N,T,8",
    )
    for name, count in {
        "slice_of_shape": "sh = Shape (x) l = Slice (sh, i2, i3) k = Squeeze (l, i0)"
        " c = Cast <to = 1> (k)",
        "end_of_shape": "sh = Shape <start = -1> (x) c = Cast <to = 1> (sh)",
        "size_over_sizes": "sh = Shape (x) z0 = Size (x) l = Slice (sh, i0, i2)"
        " rows = ReduceProd <keepdims = 0> (l) k = Div (z0, rows) c = Cast <to = 1> (k)",
        "float_size_over_sizes": "sh = Shape (x) z0 = Size (x) zf = Cast <to = 1> (z0)"
        " l = Slice (sh, i0, i2) rows = ReduceProd <keepdims = 0> (l) rf = Cast <to = 1> (rows)"
        " c = Div (zf, rf)",
    }.items():
        yield _Text(f"count/{name}", _counted(count), _BARE, dims="N,T,D")
    yield _Text(
        "sum_of_one_element",
        "r = ReduceSum (x, last) m = Mul (r, one) d = Sub (x, m) p = Mul (d, d)"
        " q = ReduceSum (p, last) v = Mul (q, one) a = Add (v, e) s = Sqrt (a) y = Div (d, s)",
        _BARE,
        shape=(2, 3, 1),
    )
    yield _Text(
        "epsilon_cast",
        VARIANCE
        + "ed = Cast <to = 11> (e) ec = Cast <to = 1> (ed) a = Add (v, ec) s = Sqrt (a) "
        + SCALED,
        _FULL,
    )
    yield _Text(
        "statistics_in_double",
        "c = Cast <to = 11> (x) m = ReduceMean <axes = [-1]> (c) d = Sub (c, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) ed = Cast <to = 11> (e) a = Add (v, ed) s = Sqrt (a)"
        " k = Div (d, s) y = Cast <to = 10> (k)",
        _is("layer_norm", _layer(), other_inputs=("c",), other_outputs=("k",)),
        dtype=int(TensorProto.FLOAT16),
    )
    yield _Text(
        "mean_in_half",
        "c = Cast <to = 1> (x) mf = ReduceMean <axes = [-1]> (c) m = Cast <to = 10> (mf)"
        " d = Sub (x, m) df = Cast <to = 1> (d) p = Mul (df, df) v = ReduceMean <axes = [-1]> (p)"
        " a = Add (v, e) sf = Sqrt (a) s = Cast <to = 10> (sf) y = Div (d, s)",
        _is("layer_norm", _layer(), other_inputs=("c",)),
        dtype=int(TensorProto.FLOAT16),
    )
    yield _Text(
        "cast_like",
        "c = CastLike (x, e) m = ReduceMean <axes = [-1]> (c) d = Sub (c, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) k = Div (d, s)"
        " y = CastLike (k, x)",
        _is("layer_norm", _layer(), other_inputs=("c",), other_outputs=("k",)),
        dtype=int(TensorProto.FLOAT16),
    )
    yield _Text(
        "in_scan",
        "y = Scan <num_scan_inputs = 1, body = rows (float[3,8] u) => (float[3,8] o) {"
        " m = ReduceMean <axes = [-1]> (u) d = Sub (u, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) o = Div (d, s) }> (x)",
        _is("layer_norm", _layer((1,)), "o", (1,), source="u"),
    )
    yield _Text(
        "in_if_in_if",
        "t = ReduceMax <keepdims = 0> (x) c = Greater (t, minus)"
        " y = If <then_branch = outer () => (float[2,3,8] o1) {"
        " o1 = If <then_branch = inner () => (float[2,3,8] o2) { " + ROOT + " o2 = Div (d, s) },"
        " else_branch = other () => (float[2,3,8] o3) { o3 = Relu (x) }> (c) },"
        " else_branch = last_one () => (float[2,3,8] o4) { o4 = Identity (x) }> (c)",
        _is("layer_norm", _layer(), "o2"),
    )
    yield _Text(
        "zero_where_all_are_equal",  # jax2onnx
        CENTRED + EQUAL + "f = Sub (m, m) i = Equal (f, zero) c = And (alike, i)"
        " k0 = Where (c, zero, d) p = Mul (k0, k0) v = ReduceMean <axes = [-1]> (p)"
        " a = Add (v, e) s = Sqrt (a) k = Div (k0, s) h = Mul (k, g) y = Add (h, b)",
        _FULL,
    )
    yield _Text(
        "eps_in_front_of_two_means",
        "q1 = ReduceMean <axes = [-1]> (x) q2 = ReduceMean <axes = [-1]> (x) d1 = Sub (x, q1)"
        " d = Sub (x, q2) p = Mul (d1, d1) v = ReduceMean <axes = [-1]> (p) a = Add (e, v)"
        " s = Pow (a, mhalf) k = Mul (s, d) h = Mul (g, k) y = Add (b, h)",
        _FULL,
    )


def _layer_misses() -> Iterator[_Text]:
    near = _not("layer_norm", _layer(g=GAIN, b=SHIFT))
    core = _part("rms_norm", _rms(g=GAIN, b=SHIFT), "d")

    def miss(name: str, body: str, rows: tuple[Expected, ...] = near, **more: Any) -> _Text:
        return _Text(name, body, rows, mutation=name.replace("/", "_"), **more)

    yield miss(
        "weighted_variance",
        CENTRED + "p = Mul (d, d) pw = Mul (p, g) v = ReduceMean <axes = [-1]> (pw)"
        " a = Add (v, e) s = Sqrt (a) " + SCALED,
    )
    yield miss(
        "variance_weighted_at_run_time",
        CENTRED + "p = Mul (d, d) pw = Mul (p, z) v = ReduceMean <axes = [-1]> (pw)"
        " f = Abs (v) a = Add (f, e) s = Sqrt (a) " + SCALED,
        (replace(near[0], optional=True),),
        inputs="z",
    )
    masked = (
        "xm = Mul (x, z) sm = ReduceSum (xm, last) c0 = ReduceSum (z, last) c = Abs (c0)"
        " m = Div (sm, c) d = Sub (x, m) "
    )
    yield miss(
        "masked_mean",
        masked
        + "p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) "
        + SCALED,
        core,
        inputs="z",
    )
    yield miss(
        "masked_mean_and_variance",
        masked + "dm = Mul (d, z) p = Mul (dm, dm) r = ReduceSum (p, last) v = Div (r, c)"
        " a = Add (v, e) s = Sqrt (a) " + SCALED,
        (
            Expected(
                "rms_norm", "dm", "y", None, None, recognised=False, not_input="x",
                other_kinds=("layer_norm",), other_inputs=("d", "x"),
                formula=_layer(g=GAIN, b=SHIFT),
            ),
        ),
        inputs="z",
    )  # fmt: skip
    yield miss(
        "variance_held_below",
        CENTRED + "p = Mul (d, d) u = ReduceMean <axes = [-1]> (p) v = Clip (u, zero, half)"
        " a = Add (v, e) s = Sqrt (a) " + SCALED,
    )
    yield miss(
        "least_variance",
        CENTRED + "p = Mul (d, d) u = ReduceMean <axes = [-1]> (p) v = Min (u, half)"
        " a = Add (v, e) s = Sqrt (a) " + SCALED,
    )
    alike = (
        "k0 = Where (c, {chosen}, d) p = Mul (k0, k0) v = ReduceMean <axes = [-1]> (p)"
        " a = Add (v, e) s = Sqrt (a) k = Div (k0, s) h = Mul (k, g) y = Add (h, b)"
    )
    chosen = _part("rms_norm", _rms(g=GAIN, b=SHIFT), "k0")
    for name, condition, taken in (
        ("one_where_all_are_equal", EQUAL + "c = Identity (alike) ", "one"),
        ("zero_where_some_are_equal", EQUAL + "u = Equal (x, z) c = Or (alike, u) ", "zero"),
        (
            "zero_where_all_of_another_axis_are_equal",
            (
                "least = ReduceMin <axes = [1]> (x) most = ReduceMax <axes = [1]> (x)"
                " c = Equal (least, most) "
            ),
            "zero",
        ),
        (
            "zero_where_all_of_another_are_equal",
            (
                "least = ReduceMin <axes = [-1]> (z) most = ReduceMax <axes = [-1]> (z)"
                " c = Equal (least, most) "
            ),
            "zero",
        ),
        ("zero_where_the_least_is_zero", EQUAL + "c = Equal (least, zero) ", "zero"),
    ):
        yield miss(name, CENTRED + condition + alike.format(chosen=taken), chosen, inputs="z")
    yield miss("over_the_variance", VARIANCE + "s = Add (v, e) " + SCALED)
    yield miss("times_the_deviation", ROOT + "k = Mul (d, s) h = Mul (k, g) y = Add (h, b)")
    yield miss("deviation_plus_epsilon", VARIANCE + "r = Sqrt (v) s = Add (r, half) " + SCALED)
    yield miss(
        "absolute_deviation",
        CENTRED + "p = Abs (d) v = ReduceMean <axes = [-1]> (p) s = Add (v, e) " + SCALED,
    )
    yield miss(
        "n_plus_one",
        CENTRED + "p = Mul (d, d) r = ReduceSum (p, last) v = Div (r, nine) a = Add (v, e)"
        " s = Sqrt (a) " + SCALED,
    )
    yield miss(
        "mean_over_n_minus_one",
        "r = ReduceSum (x, last) m = Div (r, seven) d = Sub (x, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) " + SCALED,
        core,
    )
    yield miss(
        "computed_n_plus_one",
        MEAN + "sh = Shape <start = -1> (x) c = Cast <to = 1> (sh) d = Sub (x, m) p = Mul (d, d)"
        " r = ReduceSum (p, last) c1 = Add (c, one) v = Div (r, c1) a = Add (v, e) s = Sqrt (a)"
        " y = Div (d, s)",
        _not("layer_norm", _layer()),
        dims="N,T,D",
    )
    yield miss(
        "count_of_another_axis",
        MEAN + "sh = Shape (x) l = Slice (sh, i1, i2) c = Cast <to = 1> (l) d = Sub (x, m)"
        " p = Mul (d, d) r = ReduceSum (p, last) v = Div (r, c) a = Add (v, e) s = Sqrt (a)"
        " y = Div (d, s)",
        _not("layer_norm", _layer()),
        dims="N,T,D",
    )
    yield miss(
        "unbiased_over_an_unknown_count",
        MEAN + "sh = Shape <start = -1> (x) c = Cast <to = 1> (sh) d = Sub (x, m) p = Mul (d, d)"
        " r = ReduceSum (p, last) c1 = Sub (c, one) v = Div (r, c1) a = Add (v, e) s = Sqrt (a)"
        " y = Div (d, s)",
        _not("layer_norm", _layer()),
        dims="N,T,D",
    )
    yield miss(
        "epsilon_at_run_time",
        VARIANCE + "f = ReduceMax <keepdims = 0> (z) a = Add (v, f) s = Sqrt (a) " + SCALED,
        inputs="z",
    )
    yield miss(
        "gamma_in_the_deviation_at_run_time",
        ROOT + "i = Reciprocal (s) ig = Mul (i, z) xg = Mul (x, ig) mg = Mul (m, ig)"
        " bb = Sub (b, mg) y = Add (xg, bb)",
        _not("layer_norm", _layer(b=SHIFT)),
        inputs="z",
    )
    yield miss(
        "mean_of_a_part",
        "xs = Slice (x, i0, i4, last) m = ReduceMean <axes = [-1]> (xs) d = Sub (x, m)"
        " p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) " + SCALED,
        core,
    )
    yield miss(
        "mean_of_another",
        "m = ReduceMean <axes = [-1]> (z) d = Sub (x, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) " + SCALED,
        core,
        inputs="z",
    )
    yield miss(
        "about_the_maximum",
        "m = ReduceMax <axes = [-1]> (x) d = Sub (x, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) " + SCALED,
        core,
    )
    yield miss(
        "epsilon_for_each_row",
        VARIANCE + "ev = Unsqueeze (ones, i1) e3 = Slice (ev, i0, i3, i0) a = Add (v, e3)"
        " s = Sqrt (a) " + SCALED,
    )


# ** RMS and L2 norms **


def _other_rows() -> Iterator[_Text]:
    gain = _is("rms_norm", _rms(g=GAIN))
    yield _Text(
        "rms_norm/einsum",
        'q = Einsum <equation = "bij,bij->bi"> (x, x) v = Div (q, n) a = Add (v, e) t = Sqrt (a)'
        " s = Unsqueeze (t, last) k = Div (x, s) y = Mul (g, k)",
        gain,
    )
    yield _Text(
        "rms_norm/scaled_down",  # T5 scales its last norm by d^-1/2
        SQUARE + "a = Add (v, e) s = Sqrt (a) k = Div (x, s) h = Mul (k, g) y = Div (h, root_n)",
        _is("rms_norm", _rms(g=GAIN / np.sqrt(8)), other_outputs=()),
    )
    inverse = "a = Add (v, e) s = Sqrt (a) i = Reciprocal (s) "
    yield _Text(
        "rms_norm/gamma_first",
        "h = Mul (g, x) " + SQUARE + inverse + "y = Mul (h, i)",
        gain,
    )
    yield _Text(
        "rms_norm/one_plus_gamma_first",
        "w1 = Add (one, g) h = Mul (x, w1) " + SQUARE + "a = Add (v, e) s = Sqrt (a)"
        " y = Div (h, s)",
        _is("rms_norm", _rms(g=1 + GAIN)),
    )
    for name, element in (("half", 10), ("bfloat", 16)):
        back = f"<to = {element}>"
        inverse_back = (
            "c = Cast <to = 1> (x) p = Mul (c, c) v = ReduceMean <axes = [-1]> (p) a = Add (v, e)"
            f" s = Sqrt (a) i = Reciprocal (s) ib = Cast {back} (i) y = Mul (x, ib)"
        )
        mean_back = (
            "c = Cast <to = 1> (x) p = Mul (c, c) v = ReduceMean <axes = [-1]> (p)"
            f" vb = Cast {back} (v) eb = Cast {back} (e) a = Add (vb, eb) s = Sqrt (a)"
            " y = Div (x, s)"
        )
        square_forth = (
            "p = Mul (x, x) pc = Cast <to = 1> (p) v = ReduceMean <axes = [-1]> (pc)"
            " a = Add (v, e) s = Sqrt (a) c = Cast <to = 1> (x) k = Div (c, s)"
            f" y = Cast {back} (k)"
        )
        for turn, body in enumerate((inverse_back, mean_back, square_forth)):
            yield _Text(
                f"rms_norm/casts_{turn}_{name}",
                body,
                _is("rms_norm", _rms(), other_inputs=("c",), other_outputs=("k",)),
                dtype=element,
            )
    near = _not("rms_norm", _rms(g=GAIN))
    yield _Text(
        "rms_norm/gamma_first_and_squared",
        "h = Mul (x, g) p = Mul (h, x) v = ReduceMean <axes = [-1]> (p) "
        + inverse
        + "y = Mul (h, i)",
        (replace(near[0], optional=True),),
        mutation="gamma_first_and_squared",
    )
    yield _Text(
        "rms_norm/weighted_square",
        "p = Mul (x, x) pw = Mul (p, g) v = ReduceMean <axes = [-1]> (pw) a = Add (v, e)"
        " s = Sqrt (a) k = Div (x, s) y = Mul (k, g)",
        near,
        mutation="weighted_square",
    )
    yield _Text(
        "rms_norm/partial",
        "xs = Slice (x, i0, i4, last) p = Mul (xs, xs) v = ReduceMean <axes = [-1]> (p)"
        " a = Add (v, e) s = Sqrt (a) k = Div (x, s) y = Mul (k, g)",
        near,
        mutation="partial",
    )
    yield _Text(
        "rms_norm/one_plus",
        SQUARE + "r = Sqrt (v) s = Add (one, r) k = Div (x, s) y = Mul (k, g)",
        near,
        mutation="one_plus",
    )
    yield _Text(
        "rms_norm/gamma_in_the_deviation_at_run_time",
        SQUARE + "a = Add (v, e) s = Sqrt (a) i = Reciprocal (s) ig = Mul (i, z) y = Mul (x, ig)",
        _not("rms_norm", _rms()),
        inputs="z",
        mutation="gamma_in_the_deviation_at_run_time",
    )
    length = _is("l2_norm", _l2((2,), lambda q: np.maximum(np.sqrt(q), EPS)))
    yield _Text(
        "l2_norm/torch_by_hand",
        "c = Abs (x) p = Pow (c, two) q = ReduceSum (p, last) r = Pow (q, half) f = Clip (r, e)"
        " sh = Shape (x) s = Expand (f, sh) y = Div (x, s)",
        length,
        dims="N,T,8",
    )
    yield _Text(
        "l2_norm/scaled",
        "r = ReduceL2 <axes = [-1]> (x) s = Max (r, e) k = Div (x, s) h = Mul (k, root_n)"
        " y = Mul (h, g)",
        _is("l2_norm", _l2((2,), lambda q: np.maximum(np.sqrt(q), EPS), GAIN * np.sqrt(8))),
    )
    yield _Text(
        "l2_norm/over_channels",
        "p = Mul (x, x) q = ReduceSum (p, i1) a = Add (q, e) s = Sqrt (a) k = Div (x, s)"
        " y = Mul (k, gc)",
        _is(
            "l2_norm",
            _l2((1,), lambda q: np.sqrt(q + EPS), CHANNELS.reshape(-1, 1, 1)),
            axes=(1,),
        ),
        shape=(2, 6, 4, 5),
    )
    other = _not("l2_norm", _l2((2,), np.sqrt))
    for name, body in {
        "l1": "c = Abs (x) s = ReduceSum (c, last) y = Div (x, s)",
        "l1_reduction": "s = ReduceL1 <axes = [-1]> (x) y = Div (x, s)",
        "zeros_replaced": "r = ReduceL2 <axes = [-1]> (x) c = Less (r, two) s = Where (c, one, r)"
        " y = Div (x, s)",
        "held_between": "r = ReduceL2 <axes = [-1]> (x) s = Clip (r, e, two) y = Div (x, s)",
        "epsilon_twice": "r = ReduceL2 <axes = [-1]> (x) q = Add (r, half) s = Max (q, e)"
        " y = Div (x, s)",
    }.items():
        yield _Text(f"l2_norm/{name}", body, other, mutation=f"l2_{name}")


# ** group and instance norms **


def _grouped() -> Iterator[_Text]:
    four = {"shape": (2, 6, 4, 5)}
    channels_last = {"shape": (2, 4, 5, 6)}
    yield _Text(
        "group_norm/blocks",
        GROUPED.format(blocks="blocks", axes="2, 3, 4", whole="whole", factor="gc"),
        _is("group_norm", _group(3, last=False), axes=(1, 2, 3)),
        **four,  # type: ignore[arg-type]
    )
    yield _Text(
        "group_norm/channels_last",
        GROUPED.format(blocks="last_blocks", axes="1, 2, 4", whole="last_whole", factor="gl"),
        _is("group_norm", _group(3, last=True), axes=(1, 2, 3)),
        **channels_last,  # type: ignore[arg-type]
    )
    for name, blocks, axes, whole, factor, shape in (
        ("interleaved", "blocks", (1, 3, 4), "whole", "gc", (2, 6, 4, 5)),
        ("interleaved_last", "last_blocks", (1, 2, 3), "last_whole", "gl", (2, 4, 5, 6)),
    ):
        said = ", ".join(map(str, axes))
        yield _Text(
            f"group_norm/{name}",
            GROUPED.format(blocks=blocks, axes=said, whole=whole, factor=factor),
            _is("layer_norm", _layer(axes), "k", axes, source="r", not_input="x"),
            shape=shape,
            mutation=name,
        )
    for name, pool in (
        ("whole_window", "AveragePool <kernel_shape = [4, 5]>"),
        ("global_pool", "GlobalAveragePool"),
    ):
        yield _Text(
            f"instance_norm/{name}",
            f"m = {pool} (x) d = Sub (x, m) p = Mul (d, d) v = {pool} (p) a = Add (v, e)"
            " s = Sqrt (a) k = Div (d, s) h = Mul (k, gc) y = Add (h, gc)",
            _is(
                "instance_norm",
                _layer((2, 3), g=CHANNELS.reshape(-1, 1, 1), b=CHANNELS.reshape(-1, 1, 1)),
                axes=(2, 3),
            ),
            **four,  # type: ignore[arg-type]
        )
    near = _layer((2, 3))
    yield _Text(
        "instance_norm/part_of_a_window",
        "m = AveragePool <kernel_shape = [4, 4]> (x) q = ReduceMean <axes = [3]> (m)"
        " d = Sub (x, q) p = Mul (d, d) v = ReduceMean <axes = [2, 3]> (p) a = Add (v, e)"
        " s = Sqrt (a) y = Div (d, s)",
        (
            Expected(
                "rms_norm", "d", "y", (2, 3), EPS, not_input="x", formula=_rms((2, 3)),
                other_kinds=("filter_response_norm",),
            ),
        ),
        mutation="part_of_a_window",
        **four,  # type: ignore[arg-type]
    )  # fmt: skip
    row = Expected("instance_norm", "x", "k", (2, 3), EPS, formula=near)
    yield _Text(
        "instance_norm/modulated",
        "m = ReduceMean <axes = [2, 3]> (x) d = Sub (x, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [2, 3]> (p) a = Add (v, e) s = Sqrt (a) k = Div (d, s)"
        " t = GlobalAveragePool (z) h = Mul (k, t) y = Add (h, t)",
        (row,),
        inputs="z",
        **four,  # type: ignore[arg-type]
    )
    yield _Text(
        "group_norm/global_response",  # ConvNeXt V2: it multiplies by lengths, and is no norm here
        "r = ReduceL2 <axes = [2, 3]> (x) q = ReduceMean <axes = [1]> (r) a = Add (q, e)"
        " f = Div (r, a) k = Mul (x, f) h = Mul (k, gc) c = Add (h, gc) y = Add (x, c)",
        (
            Expected(
                "l2_norm", "x", "y", (2, 3), None, recognised=False, optional=True, not_input="x",
                formula=_l2((2, 3), np.sqrt),
            ),
        ),
        mutation="global_response",
        **four,  # type: ignore[arg-type]
    )  # fmt: skip


# ** softmax **


def _softmaxes() -> Iterator[_Text]:
    plain = _is("softmax", _soft(), eps=None)
    log = _is("log_softmax", _soft(log=True), eps=None)
    total = "c = Exp (d) t = ReduceSum (c, last) "
    yield _Text(
        "softmax/einsum",
        'c = Exp (x) q = Einsum <equation = "abc->ab"> (c) t = Unsqueeze (q, last) y = Div (c, t)',
        plain,
    )
    yield _Text("softmax/exp_of_log", "l = LogSoftmax <axis = -1> (x) y = Exp (l)", plain)
    yield _Text(
        "softmax/exp_of_difference",
        "l = ReduceLogSumExp <axes = [-1]> (x) q = Sub (x, l) y = Exp (q)",
        plain,
    )
    yield _Text(
        "softmax/exp_of_written_out", SHIFTED + total + "l = Log (t) q = Sub (d, l) y = Exp (q)",
        plain,
    )  # fmt: skip
    jax = (
        "sh = Shape (z) n0 = Slice (sh, i0, i1) to = Concat <axis = 0> (n0, i3, i1)"
        " k = ReduceMax <axes = [-1], keepdims = 0> (x) q = Reshape (k, to) m = Expand (q, to)"
        " d = Sub (x, m) c = Exp (d) u = ReduceSum <keepdims = 0> (c, last) f = Reshape (u, to)"
        " t = Expand (f, to) y = Div (c, t)"
    )
    yield _Text("softmax/jax_broadcast", jax, plain, dims="?,3,8", inputs="z")
    yield _Text(
        "softmax/temperature_and_mask",
        "q = Div (x, two) r = Add (q, z) m = ReduceMax <axes = [-1]> (r) d = Sub (r, m) "
        + total
        + "i = Reciprocal (t) y = Mul (i, c)",
        _is("softmax", _soft(), eps=None, source="r"),
        inputs="z",
    )
    yield _Text(
        "softmax/temperature_inside",
        SHIFTED + "q = Mul (d, half) c = Exp (q) t = ReduceSum (c, last) y = Div (c, t)",
        _is("softmax", _soft(), eps=None, source="q"),
    )
    yield _Text(
        "softmax/cast",
        "f = Cast <to = 1> (x) m = ReduceMax <axes = [-1]> (f) d = Sub (f, m) "
        + total
        + "q = Div (c, t) y = Cast <to = 10> (q)",
        _is("softmax", _soft(), "q", eps=None, other_inputs=("f",), other_outputs=("y",)),
        dtype=int(TensorProto.FLOAT16),
    )
    yield _Text(
        "log_softmax/put_together",
        SHIFTED + total + "l = Log (t) q = Add (m, l) y = Sub (x, q)",
        log,
    )
    near = _not("softmax", _soft())
    for name, body in {
        "plus_one": "c = Exp (x) q = ReduceSum (c, last) t = Add (one, q) y = Div (c, t)",
        "plus_one_stable": SHIFTED
        + total
        + "l = Neg (m) o = Exp (l) f = Add (t, o) y = Div (c, f)",
        "mean": "c = Exp (x) t = ReduceMean <axes = [-1]> (c) y = Div (c, t)",
        "held_above": "c = Exp (x) q = ReduceSum (c, last) t = Clip (q, many) y = Div (c, t)",
        "larger_of": "c = Exp (x) q = ReduceSum (c, last) t = Max (q, many) y = Div (c, t)",
        "squares": "c = Exp (x) p = Mul (c, c) t = ReduceSum (p, last) y = Div (c, t)",
        "weighted": "f = Exp (x) c = Mul (f, g) t = ReduceSum (c, last) y = Div (c, t)",
        "weighted_sum": "c = Exp (x) f = Mul (c, g) t = ReduceSum (f, last) y = Div (c, t)",
        "weighted_terms": "f = Exp (x) c = Mul (f, g) t = ReduceSum (f, last) y = Div (c, t)",
    }.items():
        yield _Text(f"softmax/{name}", body, near, mutation=f"softmax_{name}")
    yield _Text(
        "log_softmax/held_above",
        SHIFTED + "c = Exp (d) q = ReduceSum (c, last) t = Max (q, many) l = Log (t)"
        " y = Sub (d, l)",
        _not("log_softmax", _soft(log=True)),
        mutation="log_softmax_held_above",
    )
    yield _Text(
        "log_softmax/of_another_sum",
        SHIFTED + total + "l = Log (t) y = Sub (x, l)",
        _not("log_softmax", _soft(log=True)),
        mutation="log_softmax_of_another_sum",
    )
    yield _Text(
        "softmax/of_relu",
        "c = Relu (x) q = ReduceSum (c, last) t = Add (q, e) y = Div (c, t)",
        (replace(near[0], optional=True),),
        mutation="softmax_of_relu",
    )


def _case(text: _Text) -> Case:
    name = text.name if text.name.count("/") else f"layer_norm/{text.name}"
    name = f"{name}/text"
    kind = helper.tensor_dtype_to_string(text.dtype).split(".")[-1].lower()
    dims = text.dims or ",".join(map(str, text.shape))
    sizes = ",".join(map(str, text.shape)) if not text.dims else dims.replace("?", "M")
    given = [n for n in text.inputs.split(",") if n]
    others = "".join(f", {kind}[{sizes}] {n}" for n in given)
    model = parser.parse_model(
        HEAD.format(opset=text.opset, dtype=kind, dims=dims, others=others, body=text.body)
    )
    for node in model.graph.node:
        node.name = node.output[0]
    feeds: dict[str, NDArray[Any]] = {
        n: feed(f"{name}/{n}", text.shape, text.dtype) for n in ("x", *given)
    }
    return Case(name, model, text.rows, feeds, text.mutation, text.reference, text.valid)


def text_cases() -> Iterator[Case]:
    """Every case of this file."""
    for make in (_layer_norms, _layer_misses, _other_rows, _grouped, _softmaxes):
        for text in make():
            if make is _layer_norms or make is _layer_misses:
                text = replace(text, name=f"layer_norm/{text.name}")
            yield _case(text)
