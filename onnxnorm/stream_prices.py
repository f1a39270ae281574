"""What the operators around a stream take on each target, and the prices that follow.

    saved      = t(LayerNormalization) - t(RMS norm)         what one converted norm saves
    add        = t(Add) / saved                              a beta that no bias takes
    centering  = t(ReduceMean, Sub) / saved                  a mean that goes at run time

Prices are in units of `saved` and have one decimal, since a time that depends on the cache has no
more. What was not measured on a target has the CPU's prices, and reports say so.

Of a small tensor every operator costs what it takes to call it, and an Add more than a norm saves:

    elements            512     2,048   4,096   8,192   18,816  37,632  75,648  262,144
    add / saved         3.7     2.5     1.5     1.1     1.1     0.8     0.6     0.9
    centering / saved   6.0     3.5     2.1     1.5     1.4     1.0     0.8     1.2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Times:
    """Milliseconds of the operators on one float32 tensor.

    Attributes:
        layer_norm: LayerNormalization.
        rms_norm: RMSNormalization, or the chain that onnxruntime fuses into the same kernel.
        add: Add of a vector.
        centering: ReduceMean and Sub.
        where: The tensor, runtime, machine and date.
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
    where="1024 x 768, onnxruntime 1.31, one thread of a 2 GHz AVX2 Xeon, November 2026",
)
_CPU_SMALL: Final = Times(
    layer_norm=0.00280,
    rms_norm=0.00188,
    add=0.00137,
    centering=0.00192,
    where="64 x 64, onnxruntime 1.31, one thread of an AVX-512 Xeon, November 2026",
)
SMALL: Final = 24_000  # elements; from about there on an Add costs less than a norm saves

# None: nothing was measured there.
MEASURED: Final[dict[str, Times | None]] = {"onnx": _CPU, "ort-cpu": _CPU, "ort-cuda": None}


def times(target: str, elements: int | None = None) -> tuple[Times, bool]:
    """The times that count for a target, and whether they were measured on it.

    Args:
        target: `onnx`, `ort-cpu` or `ort-cuda`.
        elements: Those of the tensor; None where they are not known, which counts as many.
    """
    found = MEASURED.get(target)
    if elements is not None and elements < SMALL:
        return _CPU_SMALL, found is not None
    return found or _CPU, found is not None
