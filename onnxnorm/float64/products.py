"""Matrix products in float64."""

from __future__ import annotations

import numpy as np

from onnxnorm.float64.call import (
    Call,
    Value,
    floats,
    implements,
)


@implements("MatMul")
def _matmul(call: Call) -> list[Value]:
    a, b = call.inputs
    if b.ndim == 2 and a.ndim > 2:  # one large product instead of many small ones
        flat = a.reshape(-1, a.shape[-1]) @ b if a.size else np.zeros((0, b.shape[1]), a.dtype)
        return [flat.reshape(*a.shape[:-1], b.shape[1])]
    return [np.asarray(np.matmul(a, b))]


@implements("Gemm")
def gemm(call: Call) -> list[Value]:
    """Return alpha A' B' + beta C."""
    a, b, c = call.inputs[0], call.inputs[1], call.input(2)
    alpha, beta = floats(call, alpha=1.0, beta=1.0)
    a = a.T if call.attribute("transA", 0) else a
    b = b.T if call.attribute("transB", 0) else b
    out = a @ b
    if alpha != 1.0:
        out = (alpha * out).astype(out.dtype)
    if c is not None:
        out = out + (c if beta == 1.0 else (beta * c).astype(out.dtype))
    return [out]


@implements("Einsum")
def _einsum(call: Call) -> list[Value]:
    return [np.asarray(np.einsum(call.attribute("equation"), *call.inputs, optimize=True))]
