"""What the operators around a stream take on each target, and the prices that follow.

    saved      = t(LayerNormalization) - t(RMS norm)         what one converted norm saves
    add        = t(Add) / saved                              a beta that no bias takes
    centering  = t(ReduceMean, Sub) / saved                  a mean that goes at run time

Prices are in units of `saved` and have one decimal, since a time that depends on the cache has no
more. What was not measured on a target has the CPU's prices, and reports say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Times:
    """Milliseconds of the operators on 1024 x 768 float32.

    Attributes:
        layer_norm: LayerNormalization.
        rms_norm: RMSNormalization, or the chain that onnxruntime fuses into the same kernel.
        add: Add of a vector of 768.
        centering: ReduceMean and Sub.
        where: Runtime, machine and date.
    """

    layer_norm: float
    rms_norm: float
    add: float
    centering: float
    where: str

    @property
    def saved(self) -> float:
        """What one converted norm saves."""
        return self.layer_norm - self.rms_norm

    @property
    def prices(self) -> tuple[float, float]:
        """The prices of a centering and of an Add.

        >>> Times(0.54, 0.28, 0.20, 0.52, "a machine").prices
        (2.0, 0.8)
        """
        return round(self.centering / self.saved, 1), round(self.add / self.saved, 1)


_CPU: Final = Times(
    layer_norm=0.54,
    rms_norm=0.28,
    add=0.20,
    # ReduceMean and Sub read twice and write once, as a layer norm does. Measured on a busy machine
    # against a norm in the same run they were 1.0 (197 x 768, in the cache) to 2.6 times what a
    # norm saves there, and the Add 0.7 to 1.9.
    centering=0.52,
    where="onnxruntime 1.31, one thread of a 2 GHz AVX2 Xeon, November 2026",
)

# None: nothing was measured there.
MEASURED: Final[dict[str, Times | None]] = {"onnx": _CPU, "ort-cpu": _CPU, "ort-cuda": None}


def times(target: str) -> tuple[Times, bool]:
    """The times that count for a target, and whether they were measured on it."""
    found = MEASURED.get(target)
    return found or _CPU, found is not None
