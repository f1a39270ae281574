"""What recorded times of sessions say: a ratio, its interval, and a verdict beyond the A/A band.

    ratio = exp(tmean d),   d_i = median_r log(c_ir / a_ir),   d'_i = median_r log(c_ir / b_ir)

`onnxnorm.latency` says how the times come about, and why the trial is the unit of resampling.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from onnxnorm.errors import UsageError

Verdict = Literal["faster", "slower", "no measurable difference"]

CONFIDENCE: Final = 0.95
FEWEST_FOR_A_CLAIM: Final = 4  # two in each half, so that each half has a spread


@dataclass(frozen=True)
class Trial:
    """The recorded times of three sessions that took turns: the unit of resampling.

    Attributes:
        fresh: Each session had a process of its own.
        first: The original: for each turn, the milliseconds per run of each sample.
        second: Another session of the original, likewise.
        candidate: The candidate, likewise. All three have the same number of turns.
    """

    fresh: bool
    first: tuple[tuple[float, ...], ...]
    second: tuple[tuple[float, ...], ...]
    candidate: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Estimate:
    """What recorded times say.

    Attributes:
        ratio: Candidate over original; below 1 is faster.
        interval: Confidence interval of `ratio`, at CONFIDENCE.
        band: Where `ratio` falls, at CONFIDENCE, when nothing differs: the A/A band.
        verdict: "faster" and "slower" only beyond the band and reproduced.
        reason: Why the verdict is what it is, as a clause.
    """

    ratio: float
    interval: tuple[float, float]
    band: tuple[float, float]
    verdict: Verdict
    reason: str


def estimate(trials: Sequence[Trial]) -> Estimate:
    """Judge recorded times: ratio = exp(tmean d), beyond chance or not.

        interval = exp(tmean d -+ t s_d / (k sqrt n)),   band = exp(-+ t' s_0 / (k sqrt n))

    With n trials and d, d', e as the module says. tmean leaves out a fifth of the 2 n values at
    either end and keeps the share k. s_d is the standard deviation over trials of (d_i + d'_i) / 2
    after winsorizing the values at the same places; t is the quantile of Student's distribution
    with k n - 1 degrees of freedom (Tukey and McLaughlin 1963; Yuen 1974: the t interval of a
    trimmed mean; here over trials, because d_i and d'_i share a session). Under "no difference"
    the three sessions of a trial are exchangeable: d, d' and e have one symmetric distribution,
    however skewed the times are, and (d + d') / 2 has 3/4 of the variance of e. So s_0^2 =
    3/4 mean(e_i^2), winsorized alike, with k n degrees of freedom for t'.

    The median over turns is unmoved by drift that is slower than a turn and by disturbances in
    fewer than half of the turns, the trimmed mean by those that last for a whole trial.

    "faster" or "slower" needs all of: the interval excludes 1, the ratio lies beyond the band,
    and the median of either half of the trials (same process, fresh processes) does too.

    >>> turns = ((2.0, 2.1), (2.0, 2.2))
    >>> halves = ((1.0, 1.1), (1.0, 1.0))
    >>> trials = [Trial(fresh, turns, turns, halves) for fresh in (False, True) * 4]
    >>> found = estimate(trials)
    >>> found.verdict, round(found.ratio, 2)
    ('faster', 0.49)

    Args:
        trials: Recorded times; two or more.

    Raises:
        UsageError: Fewer than two trials, or a trial without times.
    """
    if len(trials) < 2:
        raise UsageError("an estimate needs two trials or more", "Give a larger time budget.")
    differences = [(between(t.candidate, t.first), between(t.candidate, t.second)) for t in trials]
    count = len(trials)
    ordered = sorted(d for pair in differences for d in pair)
    cut = len(ordered) // 5
    middle = statistics.fmean(ordered[cut : len(ordered) - cut])
    least, greatest = ordered[cut], ordered[-cut - 1]
    share = 1 - cut / count
    degrees = math.floor(share * count)
    spread = statistics.stdev(
        statistics.fmean(min(max(d, least), greatest) for d in pair) for pair in differences
    )
    half_interval = student_quantile(degrees - 1) * spread / (share * math.sqrt(count))
    sizes = sorted(abs(between(t.first, t.second)) for t in trials)
    null = math.sqrt(0.75 * statistics.fmean(min(e, sizes[degrees - 1]) ** 2 for e in sizes))
    half_band = student_quantile(degrees) * null / (share * math.sqrt(count))
    verdict, reason = _judge(trials, differences, middle, half_interval, half_band)
    return Estimate(
        ratio=math.exp(middle),
        interval=(math.exp(middle - half_interval), math.exp(middle + half_interval)),
        band=(math.exp(-half_band), math.exp(half_band)),
        verdict=verdict,
        reason=reason,
    )


def _judge(
    trials: Sequence[Trial],
    differences: Sequence[tuple[float, float]],
    middle: float,
    half_interval: float,
    half_band: float,
) -> tuple[Verdict, str]:
    none: Verdict = "no measurable difference"
    if len(trials) < FEWEST_FOR_A_CLAIM:
        return none, f"{len(trials)} session pairs are too few for a claim"
    if abs(middle) <= half_band:
        return none, "the ratio lies inside the A/A band"
    if abs(middle) <= half_interval:
        return none, "the interval holds 1"
    for half in _halves(trials, differences):
        alone = statistics.median(half)
        if abs(alone) <= half_band or (alone > 0) != (middle > 0):
            return none, "half of the session pairs alone do not reproduce it"
    return (
        "faster" if middle < 0 else "slower",
        "beyond the A/A band, and either half of the session pairs alone shows it",
    )


def _halves(
    trials: Sequence[Trial], differences: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """In-process and fresh-process pairs, or alternate trials where either kind is too few."""
    kinds = [t.fresh for t in trials]
    if min(kinds.count(True), kinds.count(False)) < 2:
        kinds = [bool(k % 2) for k in range(len(trials))]
    first, second = (
        [d for kind, pair in zip(kinds, differences, strict=True) if kind is wanted for d in pair]
        for wanted in (False, True)
    )
    return first, second


def between(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Median over turns of log(one / other)."""
    return statistics.median(_level(a) - _level(b) for a, b in zip(one, other, strict=True))


def _level(samples: Sequence[float]) -> float:
    if not samples or min(samples) <= 0:
        raise UsageError("a turn has no times", "Give a larger time budget.")
    return math.log(statistics.median(samples))


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence for Student's T with `degrees` degrees of freedom.

    By bisection on the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3
    and 26.7.4).

    >>> round(student_quantile(7), 3)
    2.365
    """
    low, high = 0.0, 1.0
    while _student_coverage(high, degrees) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _student_coverage(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return high


def _student_coverage(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
