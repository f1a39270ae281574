"""How far runs are from the truth, over all inputs together.

|run - truth|, as maximum and root mean square
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from onnxnorm.float64 import Array, is_float_dtype

Outputs: TypeAlias = list[dict[str, Any]]  # leaves, per feed

_finfo: Final[Callable[[Any], Any]] = ml_dtypes.finfo


def ulp(scale: float, dtype: np.dtype[Any]) -> float:
    """Return 2^floor(log2 s) * epsilon(dtype), and the smallest subnormal at and near 0.

    Args:
        scale: A magnitude, at least 0. Beyond the dtype's largest it counts as the largest.
        dtype: A floating-point dtype, those of ml_dtypes included.
    """
    info: Any = np.finfo(dtype) if dtype.kind == "f" else _finfo(dtype)
    scale = min(scale, float(info.max))
    smallest = float(info.smallest_subnormal)
    if not scale > 0.0:
        return smallest
    return max(math.ldexp(float(info.eps), math.frexp(scale)[1] - 1), smallest)


def in_float64(value: Any) -> Array:
    """Return an array in float64; a signalling NaN, as unwritten memory holds, is one like any."""
    with np.errstate(invalid="ignore"):
        return np.asarray(value).astype(np.float64)


@dataclass
class Distance:
    """Distance from the truth, accumulated over inputs."""

    largest: float = 0.0
    squares: float = 0.0
    count: int = 0
    scale: float = 0.0
    dot: float = 0.0
    norm_run: float = 0.0
    norm_truth: float = 0.0
    rows: int = 0
    rows_agree: int = 0

    @property
    def rms(self) -> float:
        """Root mean square distance."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between runs and truth."""
        norm = math.sqrt(self.norm_run) * math.sqrt(self.norm_truth)
        if norm == 0.0:
            return 1.0 if self.norm_run == self.norm_truth else 0.0
        return max(-1.0, min(1.0, self.dot / norm))

    @property
    def argmax_agreement(self) -> float | None:
        """Share of rows whose largest element is where the truth's is; None without rows."""
        return self.rows_agree / self.rows if self.rows else None

    def add(self, truth: Array, run: Array) -> None:
        """Take in one run; elements where either is not finite are left to the caller."""
        t = np.asarray(truth, dtype=np.float64)
        r = in_float64(run)
        finite = np.isfinite(t) & np.isfinite(r)
        if not finite.all():
            t, r = np.where(finite, t, 0.0), np.where(finite, r, 0.0)
        if t.size == 0:
            return
        distance = np.abs(r - t)
        self.largest = max(self.largest, float(distance.max()))
        self.squares += float(np.sum(distance * distance))
        self.count += int(finite.sum())
        self.scale = max(self.scale, float(np.abs(t).max()))
        self.dot += float(np.sum(t * r))
        self.norm_run += float(np.sum(r * r))
        self.norm_truth += float(np.sum(t * t))
        if t.ndim in {2, 3} and t.shape[-1] > 1:  # (batch, [position,] classes)
            self.rows += t.size // t.shape[-1]
            self.rows_agree += int(np.sum(t.argmax(-1) == r.argmax(-1)))


@dataclass(frozen=True)
class Allowance:
    """The original's error at one level, the largest of all the runs that count for it."""

    largest: float
    rms: float

    def widest(self, other: Allowance) -> Allowance:
        """Return the larger of two, in each measure."""
        return Allowance(max(self.largest, other.largest), max(self.rms, other.rms))

    def widened(self, error: Distance) -> Allowance:
        """Return the larger of this and what one more run came to."""
        return Allowance(max(self.largest, error.largest), max(self.rms, error.rms))


def leaves(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of all outputs: sequences and maps element by element."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                # the floats of a map are float32, which Python hands over as its own
                add(f"{name}[{key}]", np.float32(item) if isinstance(item, float) else item)
        elif isinstance(value, list):
            found[f"{name}.length"] = np.array(len(value), dtype=np.int64)
            for index, item in enumerate(value):
                add(f"{name}[{index}]", item)
        else:
            found[name] = None if value is None else np.asarray(value)

    for name, value in outputs.items():
        add(name, value)
    return found


def sampled(outputs: Outputs) -> dict[str, Any]:
    """Return every output with one value of it; what is absent in all runs is None.

    A sequence may be longer on a later input, and its elements are outputs like any other.
    """
    found: dict[str, Any] = {}
    for leaves in outputs:
        for name, value in leaves.items():
            if found.get(name) is None:
                found[name] = value
    return found


def is_text(value: Array) -> bool:
    """Tell whether an array holds strings."""
    return value.dtype.kind in "OSU"


def is_real(value: Any) -> bool:
    """Tell whether a value is an array of floating-point numbers."""
    return isinstance(value, np.ndarray) and is_float_dtype(value.dtype)


def identical(a: Any, b: Any) -> bool:
    """Tell whether two values are equal bit for bit, NaN equal to NaN."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if is_real(a):
        return bool(np.array_equal(in_float64(a), in_float64(b), equal_nan=True))
    return bool(np.array_equal(a, b))


def misplaced(truth: Array, baselines: Sequence[Array], run: Array) -> int:
    """Count the elements that are NaN or infinite where the original's are not, or the reverse.

    The original may have run more than once, each run overflowing elsewhere; one that did what the
    candidate does is enough. A finite element where the original overflowed and the truth did not
    is no fault: it is measured like any other.
    """
    r = in_float64(run)
    wrong = ~(np.isfinite(truth) & np.isfinite(r))
    wrong &= ~(~np.isfinite(truth) & ((np.isnan(truth) & np.isnan(r)) | (truth == r)))
    for baseline in baselines:
        b = in_float64(baseline)
        odd = ~np.isfinite(b) | ~np.isfinite(r)
        wrong &= odd & ~((np.isnan(b) & np.isnan(r)) | (b == r))
    return int(np.sum(wrong))


def immeasurable(truth: Any, run: Any) -> int:
    """Count the elements that are finite in a run and not in the truth."""
    if truth is None or run is None or truth.shape != run.shape:
        return 0
    return int(np.sum(~np.isfinite(truth) & np.isfinite(in_float64(run))))


def distance_of(name: str, truths: Outputs, runs: Outputs) -> Distance:
    """Accumulate the distance of an output from the truth over all runs."""
    total = Distance()
    for truth, run in zip(truths, runs, strict=True):
        exact, value = truth.get(name), run.get(name)
        if exact is None or value is None or exact.shape != value.shape:
            continue
        if is_text(value) or is_text(exact):
            continue
        total.add(exact, value)
    return total
