"""The operators' truth in float64, and how far from it a result in a smaller type may be.

    |result - truth| <= tolerance        element by element

The tolerances follow from the roundings that happen, to first order in u, the unit roundoff of the
type that is computed in. What they share:

* A sum of h terms, added one after the other, is off by at most lambda sqrt(h) u times the sum of
  the magnitudes, with probability 1 - 2 exp(-lambda^2 / 2) (Higham and Mary, A New Approach to
  Probabilistic Rounding Error Analysis, 2019). With lambda = 7 that fails once in 2e10 sums. Our
  kernels add at most 1024 terms so, and go on in float64 or keep what is lost; others add all n.
* exp is off by 5 u relatively: 1.6 u its polynomial, 2 u Horner's scheme, 0.4 u the reduction, and
  4 u on a GPU (2 ulp by NVIDIA's table).
* The truth is computed in float64, and held against a float64 result it is off by as much itself.
* A result is stored with one rounding of its type, and below the smallest normal number it is 0 or
  on the grid of float16's subnormals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LAMBDA: Final = 7.0
_RUN: Final = 1024  # terms that a kernel of ours adds in one go
_EXP: Final = 5.0
_FIRST: Final = 0.1  # an error of an exponent that the first order no longer describes
_LOWEST: Final = -745.0  # e^d is 0 below, in float64 too

_FLOAT16: Final = np.dtype(np.float16)
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
_FLOAT32: Final = np.dtype(np.float32)
_FLOAT64: Final = np.dtype(np.float64)
# Unit roundoff and the largest absolute error of a result that is no normal number.
_ROUNDOFF: Final = {
    _FLOAT16: 2.0**-11,
    _BFLOAT16: 2.0**-8,
    _FLOAT32: 2.0**-24,
    _FLOAT64: 2.0**-53,
}
_SMALLEST: Final = {
    _FLOAT16: 2.0**-24,
    _BFLOAT16: 2.0**-125,
    _FLOAT32: 2.0**-125,
    _FLOAT64: 2.0**-1021,
}


def softmax(values: Array, axis: int, *, log: bool = False) -> Array:
    """exp(v) / sum(exp(v)) along `axis`, or its logarithm, in float64."""
    values = values.astype(np.float64)
    if values.size == 0:
        return values
    with np.errstate(all="ignore"):
        shifted = values - values.max(axis, keepdims=True)
        powers = np.exp(shifted)
        total = powers.sum(axis, keepdims=True)
        result: Array = shifted - np.log(total) if log else powers / total
    return result


def softmax_tolerance(
    values: Array,
    axis: int,
    dtype: Any,
    *,
    log: bool = False,
    formed: Array | float = 0.0,
    computed_in: Any = None,
    run: int = _RUN,
) -> Array:
    """How far a softmax of `values` may be from the truth, element by element.

    With d = v - max and p = softmax(v), the exponent of a term is off by u (|d| + 2 formed), so
    e^d by u (|d| + 2 formed + 5) relatively, and the sum by the mean of that under p and its own
    additions. The quotient takes three roundings more. A logarithm is off absolutely by what the
    sum is off relatively, by the exponent's error, and by roundings of log(sum) and of itself; a
    kernel that does not subtract the maximum forms max + log(sum) by three roundings in float64.

    Where a value is so large that its roundings move an exponent by a tenth or more, as where a
    mask of -1e9 covers a whole row, any share is possible, and a logarithm is off by the largest of
    them.

    Args:
        values: scale * x + mask, in float64.
        axis: Of the softmax.
        dtype: Of the result.
        log: Whether it is a log softmax.
        formed: |scale * x| + |mask| where the values were formed by two roundings.
        computed_in: The type that is computed in; None is float32, or float64 for float64.
        run: Terms that are added one after the other, at most.
    """
    result_type, inside = np.dtype(dtype), _inside(dtype, computed_in)
    u = _ROUNDOFF[inside]
    if values.size == 0:
        return np.zeros(values.shape)
    with np.errstate(all="ignore"):
        d = values - values.max(axis, keepdims=True)
        p = softmax(values, axis)
        off = np.abs(d) + 2 * np.broadcast_to(formed, values.shape)
        lost = u * np.where(d + 2 * u * off > _LOWEST, off, 0).max(axis, keepdims=True) > _FIRST
        of_sum = np.where(p > 0, p * off, 0).sum(axis, keepdims=True)
        of_sum = np.where(lost, np.where(np.isfinite(off), off, 0).max(axis, keepdims=True), of_sum)
        of_sum = of_sum + _EXP + _LAMBDA * math.sqrt(min(run, values.shape[axis]))
        if log:
            truth = softmax(values, axis, log=True)
            whole = np.abs(values - truth)
            whole = np.where(np.isfinite(whole), whole, 0).max(axis, keepdims=True)
            tolerance = u * (off + of_sum + np.log(values.shape[axis]) + 2 * np.abs(truth))
            tolerance = tolerance + 3 * _ROUNDOFF[_FLOAT64] * whole
        else:
            truth = p
            tolerance = u * np.where(p > 0, p * (off + _EXP + of_sum + 3), 0)
            tolerance = np.where(lost, 1.0, tolerance)
    return _stored(tolerance, truth, result_type, inside)


def normalize(values: Array, axes: Sequence[int], epsilon: float, *, centered: bool) -> Array:
    """(x - mean) / sqrt(variance + epsilon) over `axes` in float64; RMS norm: the mean is 0."""
    values = values.astype(np.float64)
    if not values.size:
        return values
    for _ in range(2 if centered else 0):  # once more, for what the mean itself was off by
        values = values - values.mean(tuple(axes), keepdims=True)
    variance = (values * values).mean(tuple(axes), keepdims=True)
    result: Array = values / np.sqrt(variance + epsilon)
    return result


def silu(values: Array) -> Array:
    """The activation z / (1 + e^-z)."""
    with np.errstate(over="ignore"):
        result: Array = values / (1 + np.exp(-values))
    return result


def norm_tolerance(
    values: Array,
    axes: Sequence[int],
    epsilon: float,
    scale: Array,
    bias: Array | float,
    dtype: Any,
    *,
    centered: bool = True,
    activated: bool = False,
    corrected: bool = True,
    computed_in: Any = None,
    run: int = _RUN,
) -> Array:
    """How far (x - mean) / sqrt(variance + epsilon) * scale + bias may be from the truth.

    Let s = sqrt(variance + epsilon), z the normalized value and L = 7 sqrt(h). The center c that is
    subtracted first is off by e = u (L + 1) mean|x|. What it is off by is subtracted next, known to
    u (L + 2) (s + e); without that correction e itself stays. Both subtractions, and the product
    with 1 / s, with scale and bias, take a rounding each, and 1 / s is off by half of what the
    variance is, (L + 3) / 2, and by three roundings. Together, in units of u,

        |scale| (|z| (L / 2 + 9) + (L + 2) (1 + e / s)) + |result|    [+ |scale| e / (u s)]

    A SiLU behind it multiplies that by its steepest slope, 1.1, and adds 8 roundings of its own.

    Args:
        values: x, as stored.
        axes: Those that are normalized.
        epsilon: As the kernel gets it.
        scale: Broadcasts to x.
        bias: Broadcasts to x.
        dtype: Of the result.
        centered: Layer norm; else RMS norm.
        activated: Whether SiLU follows.
        corrected: Whether what the center is off by is subtracted too, as our kernels do.
        computed_in: The type that is computed in; None is float32, or float64 for float64.
        run: Terms that are added one after the other, at most.
    """
    result_type, inside = np.dtype(dtype), _inside(dtype, computed_in)
    u = _ROUNDOFF[inside]
    x = values.astype(np.float64)
    if not x.size:
        return np.zeros(x.shape)
    over = tuple(axes)
    z = normalize(x, axes, epsilon, centered=centered)
    center = x.mean(over, keepdims=True) if centered else np.zeros(())
    s = np.sqrt(((x - center) ** 2).mean(over, keepdims=True) + epsilon)
    terms = math.prod(x.shape[axis] for axis in over)
    most = _LAMBDA * math.sqrt(min(run, terms))
    factor = np.abs(scale.astype(np.float64))
    truth = z * scale.astype(np.float64) + bias
    units = factor * np.abs(z) * (most / 2 + 9) + np.abs(truth)
    if centered:
        e = u * (most + 1) * np.abs(x).mean(over, keepdims=True)
        units = units + factor * (most + 2) * (1 + e / s)
        if not corrected:
            units = units + factor * e / (u * s)
    tolerance = u * units
    if activated:
        truth = silu(truth)
        tolerance = 1.1 * tolerance + 8 * u * np.abs(truth)
    return _stored(tolerance, truth, result_type, inside)


def expected(
    name: str, inputs: Sequence[Array], attributes: Mapping[str, Any], **how: Any
) -> tuple[Array, Array]:
    """What the operator `name` has to give for these inputs, and the tolerance.

    Args:
        name: One of `onnxnorm.ops.bodies.OPERATORS`.
        inputs: As the operator takes them.
        attributes: Those of the node; epsilon is 1e-5 where it is not given.
        how: Further arguments of the tolerance: `computed_in`, `run`, `corrected`.
    """
    x, dtype = inputs[0].astype(np.float64), inputs[0].dtype
    wide = [array.astype(np.float64) for array in inputs]
    if name.startswith("TwoPass"):
        formed: Array | float = 0.0
        if "Masked" in name:
            with np.errstate(over="ignore", invalid="ignore"):
                formed = np.abs(x * wide[1].reshape(())) + np.abs(wide[2])
                x = x * wide[1].reshape(()) + wide[2]
        axis, log = attributes.get("axis", -1), "Log" in name
        how.pop("corrected", None)
        tolerance = softmax_tolerance(x, axis, dtype, log=log, formed=formed, **how)
        return softmax(x, axis, log=log), tolerance
    epsilon = float(np.float32(attributes.get("epsilon", 1e-5)))
    if name.startswith("Group"):
        return _expected_of_groups(x, wide, attributes["num_groups"], epsilon, name, dtype, how)
    centered, axes = "Layer" in name, [axis % x.ndim for axis in attributes["axes"]]
    bias = wide[2] if centered else np.zeros(())
    truth = normalize(x, axes, epsilon, centered=centered) * wide[1] + bias
    if not centered:
        how.pop("corrected", None)
    tolerance = norm_tolerance(x, axes, epsilon, wide[1], bias, dtype, centered=centered, **how)
    return truth, tolerance


def _expected_of_groups(
    x: Array,
    wide: Sequence[Array],
    groups: int,
    epsilon: float,
    name: str,
    dtype: np.dtype[Any],
    how: dict[str, Any],
) -> tuple[Array, Array]:
    each = x.shape[1] // groups
    rest = math.prod(x.shape[2:])
    grouped = x.reshape(x.shape[0], groups, each, rest)
    scale, bias = (factor.reshape(groups, each, 1) for factor in wide[1:])
    truth = normalize(grouped, [2, 3], epsilon, centered=True) * scale + bias
    activated = name.endswith("Silu")
    tolerance = norm_tolerance(
        grouped, [2, 3], epsilon, scale, bias, dtype, activated=activated, **how
    )
    truth = silu(truth) if activated else truth
    return truth.reshape(x.shape), tolerance.reshape(x.shape)


def excess(found: Array, truth: Array, tolerance: Array) -> str | None:
    """What is wrong with a result; None where it has what the truth has within the tolerance.

    NaN and infinities have to stand where the truth has them. Beyond what the type can hold, an
    infinity of the truth's sign is right as well.
    """
    if found.shape != truth.shape:
        return f"the shape is {found.shape} and not {truth.shape}"
    wide = found.astype(np.float64)
    if (np.isnan(wide) != np.isnan(truth)).any():
        return "NaN stand elsewhere"
    most = limit(found.dtype)
    with np.errstate(invalid="ignore"):
        beyond = np.isinf(wide) & (np.abs(truth) + tolerance >= most)
        same = (wide == truth) | np.isnan(truth) | (beyond & (np.sign(wide) == np.sign(truth)))
        off = np.abs(wide - truth) - tolerance
    off = np.where(same, 0, off)
    worst = float(off.max(initial=0))
    return f"off by {worst} more than allowed" if not worst <= 0 else None


def limit(dtype: Any) -> float:
    """The largest finite number of a type."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def _inside(dtype: Any, computed_in: Any) -> np.dtype[Any]:
    if computed_in is not None:
        return np.dtype(computed_in)  # type: ignore[no-any-return]
    return _FLOAT64 if np.dtype(dtype) == _FLOAT64 else _FLOAT32


def _stored(tolerance: Array, truth: Array, dtype: np.dtype[Any], inside: np.dtype[Any]) -> Array:
    """A tolerance with the rounding to the type of the result, and the truth's own error."""
    if inside == _FLOAT64:
        tolerance = 2 * tolerance
    last = 0.0 if dtype == inside else _ROUNDOFF[dtype]
    with np.errstate(invalid="ignore"):
        result: Array = tolerance * (1 + last) + last * np.abs(truth)
    return result + _SMALLEST[dtype]
