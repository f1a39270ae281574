"""What a parity check says: for each output, level and model, in numbers and in a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from onnxnorm.remark import Region


@dataclass(frozen=True)
class Level:
    """One output at one optimization level; errors are in the output's own unit.

    Attributes:
        error: Largest distance of the candidate from the truth.
        baseline_error: The same of the original.
        budget: What `error` may be.
        error_rms: Root mean square distance of the candidate, and so on.
        baseline_error_rms: The same of the original.
        budget_rms: What `error_rms` may be.
        error_ulp: `error` in ulp of the output's dtype at the largest magnitude of the truth.
        baseline_error_ulp: The same of the original.
        cosine: Cosine of the angle between candidate and truth; None for other than floats.
        argmax_agreement: Share of rows whose largest element is where the truth's is; None for
            an output that does not look like logits.
        reason: Why it failed; None when it passed.
    """

    error: float
    baseline_error: float
    budget: float
    error_rms: float
    baseline_error_rms: float
    budget_rms: float
    error_ulp: float
    baseline_error_ulp: float
    cosine: float | None
    argmax_agreement: float | None
    reason: str | None

    @property
    def passed(self) -> bool:
        """Whether the output agrees at this level."""
        return self.reason is None

    def to_json(self) -> dict[str, Any]:
        """Return the numbers; what is not finite becomes null."""
        names = (
            "error",
            "baseline_error",
            "budget",
            "error_rms",
            "baseline_error_rms",
            "budget_rms",
            "error_ulp",
            "baseline_error_ulp",
            "cosine",
            "argmax_agreement",
        )
        values = {name: _finite(getattr(self, name)) for name in names}
        return {**values, "passed": self.passed, "reason": self.reason}


@dataclass(frozen=True)
class OutputParity:
    """One output of the models.

    Attributes:
        name: Its name; elements of a sequence as name[0], of a map as name[key].
        dtype: The original's numpy dtype.
        unoptimized: With the runtime's optimizations off.
        optimized: With all of them on; None when the original cannot be loaded so.
    """

    name: str
    dtype: str
    unoptimized: Level
    optimized: Level | None

    @property
    def passed(self) -> bool:
        """Whether the output agrees at both levels."""
        return self.unoptimized.passed and (self.optimized is None or self.optimized.passed)

    @property
    def reason(self) -> str | None:
        """Why it failed, at the first level that did."""
        if not self.unoptimized.passed:
            return self.unoptimized.reason
        if self.optimized is not None and not self.optimized.passed:
            return f"with the runtime's optimizations on: {self.optimized.reason}"
        return None

    def within(self, place: str) -> OutputParity:
        """Return the same with a reason that says where it failed."""

        def placed(level: Level) -> Level:
            reason = None if level.reason is None else f"in {place}: {level.reason}"
            return replace(level, reason=reason)

        optimized = None if self.optimized is None else placed(self.optimized)
        return replace(self, unoptimized=placed(self.unoptimized), optimized=optimized)

    def to_json(self) -> dict[str, Any]:
        """Return the report's form: the unoptimized numbers flat, the others under `optimized`."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            **self.unoptimized.to_json(),
            "passed": self.passed,
            "reason": self.reason,
            "optimized": None if self.optimized is None else self.optimized.to_json(),
        }


@dataclass(frozen=True)
class ParityResult:
    """Whether a candidate agrees with the original, and by what numbers.

    Attributes:
        passed: Every output passed, and nothing is unproven.
        outputs: One entry per output of the original.
        truth: Which precision the truth has, and of what part of the model.
        notes: What the reader should know: fall-backs, mis-fusions, randomness.
        inputs: One line per run.
        samples: Samples over all runs; a run with a batch axis has several.
        seconds: Time that this check took, the truth included when it was computed for it.
        unproven: Regions that could not be checked in the time or memory there is.
    """

    passed: bool
    outputs: tuple[OutputParity, ...]
    truth: str
    notes: tuple[str, ...]
    inputs: tuple[str, ...]
    samples: int
    seconds: float
    unproven: tuple[Region, ...] = ()

    @property
    def failure(self) -> str | None:
        """One line about the first output that failed; None when all passed."""
        for output in self.outputs:
            if not output.passed:
                return f"output '{output.name}': {output.reason}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the report's `parity` object."""
        return {
            "passed": self.passed,
            "truth": self.truth,
            "notes": list(self.notes),
            "inputs": list(self.inputs),
            "samples": self.samples,
            "seconds": self.seconds,
            "outputs": [output.to_json() for output in self.outputs],
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def failed(reason: str) -> Level:
    """Return a level at which there is nothing to measure, with the reason."""
    nan = math.nan
    return Level(nan, nan, nan, nan, nan, nan, nan, nan, None, None, reason)
