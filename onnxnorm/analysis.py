"""What a report says beyond parity and latency: where the time goes, and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from onnxnorm.errors import OnnxNormError, RuntimeRejection
from onnxnorm.workbench import Workbench

VERSION: Final = 1  # of the part `analysis` of the report
_PROFILE_SHARE: Final = 0.1  # of the time budget, and never more than some seconds
_PROFILE_SECONDS: Final = 6.0

Measured = Callable[[], dict[str, Any]]


def empty() -> dict[str, Any]:
    """The part `analysis` of a report, with nothing in it."""
    return {
        "version": VERSION,
        "profile": None,
        "memory": None,
        "ablation": None,
        "sweep": None,
        "providers": [],
        "against": None,
        "skipped": {},
    }


def analyse(bench: Workbench, candidate: Path, parts: Mapping[str, Measured]) -> dict[str, Any]:
    """Profile both models, take their memory, and whatever else is asked for.

    What onnxruntime refuses here is a part that is missing with its reason: parity and latency are
    there already, and the report is not lost.

    Args:
        bench: The original, and how it is run.
        candidate: The file of the other model.
        parts: What else to measure, by its key.
    """
    from onnxnorm import memory

    found = empty()
    provider = bench.provider or "cpu"

    def weighed() -> dict[str, Any]:
        return memory.measure(
            bench.original(),
            candidate,
            bench.feed(),
            provider=provider,
            threads=bench.threads,
            libraries=bench.libraries,
            timeout=max(bench.budget, 60.0),
        ).to_json()

    wanted: dict[str, Measured] = {"profile": lambda: _profiled(bench, candidate)}
    lack = memory.lack()
    if lack is None:
        wanted["memory"] = weighed
    else:
        found["skipped"]["memory"] = lack
    for key, part in {**wanted, **parts}.items():
        if bench.progress is not None:
            bench.progress(key, None)
        try:
            found[key] = part()
        except OnnxNormError as error:
            found["skipped"][key] = error.what
    return found


def provider_row(
    bench: Workbench, candidate: Path, *, parity: bool, latency: bool
) -> dict[str, Any]:
    """Parity, latency and profile on one more provider: what `bench` was resolved to.

    Raises:
        ParityError: onnxruntime cannot run the original there.
        RuntimeRejection: Parity does not say so already, and onnxruntime cannot run a model there.
    """
    checked = bench.checker().check(candidate).to_json() if parity else None
    time, why_not = (
        measured(bench, candidate, checked) if latency else (None, "--no-latency was given")
    )
    return {
        "provider": bench.provider,
        "parity": checked,
        "parity_skipped": None if parity else "--no-parity was given",
        "latency": time,
        "latency_skipped": why_not,
        "profile": None if time is None else _profiled(bench, candidate),
    }


def measured(
    bench: Workbench, candidate: Path, parity: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, str | None]:
    """The latency of a model that is judged, or why there is none.

    One that cannot be run has failed parity already, and that is what is to be told of it.

    Raises:
        RuntimeRejection: It cannot be run, and parity does not say so.
    """
    try:
        return bench.measure(candidate), None
    except RuntimeRejection:
        if parity is None or parity["passed"]:
            raise
        return None, "onnxruntime cannot run the second model"


def _profiled(bench: Workbench, candidate: Path) -> dict[str, Any]:
    from onnxnorm.profile import profile

    return profile(
        bench.original(),
        candidate,
        bench.feed(),
        provider=bench.provider or "cpu",
        threads=bench.threads,
        libraries=bench.libraries,
        budget_seconds=min(bench.budget * _PROFILE_SHARE, _PROFILE_SECONDS),
    ).to_json()
