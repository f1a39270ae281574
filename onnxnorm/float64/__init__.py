"""ONNX operators in float64 numpy: fast where models spend their time, exact where it matters.

    y = f(x), every floating-point array in float64, integers as they are

`OPERATORS` maps (domain, operator) to a function of a `Call`; the modules here fill it. What is not
in the table is evaluated by onnx.reference or by onnxruntime; `onnxnorm.truth` chooses. Nothing
here rounds to a narrower type.
"""

from __future__ import annotations

from onnxnorm.float64 import (
    contrib,
    elementwise,
    movement,
    norms,
    products,
    quantized,
    recurrent,
    reductions,
    resize,
    signals,
    windows,
)
from onnxnorm.float64.call import (
    CONTRIB,
    OPERATORS,
    Array,
    Call,
    NotImplementedHere,
    Operator,
    Value,
    is_float_dtype,
    is_float_type,
    widen,
)
from onnxnorm.float64.elementwise import erf

__all__ = [
    "CONTRIB",
    "OPERATORS",
    "Array",
    "Call",
    "NotImplementedHere",
    "Operator",
    "Value",
    "contrib",
    "elementwise",
    "erf",
    "is_float_dtype",
    "is_float_type",
    "movement",
    "norms",
    "products",
    "quantized",
    "recurrent",
    "reductions",
    "resize",
    "signals",
    "widen",
    "windows",
]
