"""Whether a gain in latency that an earlier report measured is still there.

    change = ratio now / ratio then,   noise = hypot(h_now, h_then)

h is, on the log scale, the larger half-width of a measurement's interval and of its A/A band: what
it cannot tell from chance. A regression is claimed only where log(change) - noise lies beyond
log(1 + share), so that a noisy machine fails nobody; where only the middle lies beyond it, the
answer is that this machine cannot tell. Both ratios are of models that ran side by side, so they
may come from different machines of one kind; absolute times may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from onnxnorm.errors import UsageError

MAX_REGRESSION: Final = 0.05


def comparable(earlier: object, later: object, *, report: str) -> None:
    """Refuse two latency results that cannot be held against each other.

    Args:
        earlier: `latency` of the earlier report.
        later: That of now; its provider is enough.
        report: The file of the earlier report.

    Raises:
        UsageError: The two cannot be compared.
    """
    reason = None
    if not isinstance(earlier, Mapping):
        reason = "the earlier report has no latency"
    elif not isinstance(later, Mapping):
        reason = "latency was not measured"
    elif earlier["provider"] != later["provider"]:
        reason = f"it was measured on {earlier['provider']}, and now on {later['provider']}"
    if reason is not None:
        raise UsageError(
            f"the latency cannot be held against {report}: {reason}",
            "Give a report with a latency on the same provider, and measure latency.",
        )


def judge(
    earlier: Mapping[str, Any],
    later: Mapping[str, Any],
    *,
    report: str,
    max_regression: float = MAX_REGRESSION,
) -> dict[str, Any]:
    """Hold a latency result against an earlier one.

    >>> then = {"ratio": 0.8, "interval": [0.79, 0.81], "band": [0.99, 1.01], "provider": "cpu"}
    >>> now = {**then, "ratio": 0.95, "interval": [0.94, 0.96]}
    >>> judge(then, now, report="r.json")["verdict"]
    'regressed'

    Args:
        earlier: `latency` of the earlier report.
        later: `latency` of now.
        report: The file of the earlier report.
        max_regression: The share by which the ratio may have grown: 0.05 allows 0.80 -> 0.84.

    Returns:
        The row that `report.schema.json` describes as `against`.

    Raises:
        UsageError: The two cannot be compared.
    """
    comparable(earlier, later, report=report)
    change = math.log(later["ratio"] / earlier["ratio"])
    noise = math.hypot(_noise(earlier), _noise(later))
    limit = math.log1p(max_regression)
    if change - noise > limit:
        verdict = "regressed"
    elif change > limit:
        verdict = "cannot tell"
    else:
        verdict = "holds"
    notes = []
    if earlier.get("threads") != later.get("threads"):
        notes.append(
            f"The earlier measurement had {_threads(earlier)}, this one {_threads(later)}."
        )
    return {
        "report": report,
        "ratio": earlier["ratio"],
        "interval": list(earlier["interval"]),
        "band": list(earlier["band"]),
        "change": math.exp(change),
        "change_interval": [math.exp(change - noise), math.exp(change + noise)],
        "max_regression": max_regression,
        "verdict": verdict,
        "notes": notes,
    }


def _noise(latency: Mapping[str, Any]) -> float:
    """The larger half-width of interval and A/A band, as a logarithm."""
    middle = math.log(latency["ratio"])
    low, high = (math.log(end) for end in latency["interval"])
    return max(high - middle, middle - low, *(abs(math.log(end)) for end in latency["band"]))


def _threads(latency: Mapping[str, Any]) -> str:
    threads = latency.get("threads")
    if threads is None:
        return "the runtime's own choice of threads"
    return "1 thread" if threads == 1 else f"{threads} threads"
