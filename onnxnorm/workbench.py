"""Where one original is run: its file, the inputs it accepts, its truth, its latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from onnxnorm.errors import UsageError
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored

if TYPE_CHECKING:
    from onnxnorm.parity import ParityChecker

Progress: TypeAlias = Callable[[str, "float | None"], None]
Shapes: TypeAlias = "Mapping[str, tuple[int, ...]] | None"


@dataclass
class Workbench:
    """What parity and latency of one original share.

    Attributes:
        stack: Owns whatever is opened here.
        stored: The original.
        threads: Intra-op threads for latency; None is onnxruntime's own choice.
        inputs: The user's own inputs.
        shapes: Shapes of some inputs.
        seed: Of random inputs and the order of measurements.
        budget: Seconds for parity; latency takes half as many.
        progress: Called with what is going on.
        provider: Where models run; None until `resolve`.
        libraries: Custom operators for runs with optimizations on, if not those of a session.
    """

    stack: ExitStack
    stored: Stored
    threads: int | None
    inputs: str | Path | None
    shapes: Shapes
    seed: int
    budget: float
    progress: Progress | None
    provider: str | None = None
    libraries: tuple[Path, ...] = ()
    _checker: ParityChecker | None = None
    _original: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what no measurement can be made with.

        Raises:
            UsageError: The seed is negative, there are no threads, or no time.
        """
        for name, value, fits in (
            ("seed", self.seed, self.seed >= 0),
            ("number of threads", self.threads, self.threads is None or self.threads >= 1),
            ("time budget", self.budget, 0 < self.budget < math.inf),
        ):
            if not fits:
                least = "0 or more" if name == "seed" else "a number of more than 0"
                raise UsageError(f"the {name} is {value}", f"Give {least}.")

    def resolve(self, wanted: str, *, cuda_kernels: bool = False) -> None:
        """Decide where models run: "cpu", "cuda" or "auto"; there with our kernels for GPUs.

        Raises:
            ProviderError: It is not usable.
        """
        from onnxnorm.ops.library import required
        from onnxnorm.session import resolve_provider  # brings onnxruntime, which takes time

        self.provider = resolve_provider(wanted)
        if cuda_kernels and self.provider == "cuda":
            self.libraries = (required(cuda_kernels=True),)

    def on_disk(self, stored: Stored) -> Path:
        """A file that holds this model; a temporary one where it came from memory."""
        if stored.path is not None:
            return stored.path
        return self.stack.enter_context(Staged(stored, None)).model

    def original(self) -> Path:
        """The file of the original, written once where it came from memory."""
        if self._original is None:
            self._original = self.on_disk(self.stored)
        return self._original

    def checker(self) -> ParityChecker:
        """The parity checker, with the truth and the baseline computed once."""
        from onnxnorm.parity import ParityChecker

        if self._checker is None:
            self._checker = self.stack.enter_context(
                ParityChecker(
                    self.original(),
                    shapes=self.shapes,
                    seed=self.seed,
                    inputs=None if self.inputs is None else Path(self.inputs),
                    provider=self.provider or "cpu",
                    libraries=self.libraries,
                    budget_seconds=self.budget,
                    progress=self.progress,
                )
            )
        return self._checker

    def feed(self) -> Mapping[str, Any]:
        """One set of inputs that the original accepts."""
        values: Mapping[str, Any] = self.checker().feeds[0].values
        return values

    def measure(self, candidate: Path) -> dict[str, Any]:
        """The latency of the original and a candidate, as JSON."""
        return self.time(self.original(), candidate, seconds=self.budget / 2)

    def time(
        self,
        original: Path,
        candidate: Path,
        *,
        seconds: float,
        values: Mapping[str, Any] | None = None,
        pairs: int = 12,
        again: int = 0,
    ) -> dict[str, Any]:
        """The latency of any two models on the same inputs, as JSON.

        The `again`th time the order of what is measured is another.
        """
        from onnxnorm.latency import measure

        return measure(
            original,
            candidate,
            self.feed() if values is None else values,
            provider=self.provider or "cpu",
            threads=self.threads,
            libraries=self.libraries,
            pairs=pairs,
            seed=self.seed + again,
            budget_seconds=seconds,
            progress=self.progress,
        ).to_json()
