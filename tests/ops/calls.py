"""Models with one operator of ours, how they are run, and the truth in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxnorm.ops import bodies, library
from onnxnorm.session import open_session

LIBRARY: Final = library.describe().path
INSTRUCTION_SETS: Final = library.describe().usable
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the operator library was not built")

BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
FLOAT16: Final = np.dtype(np.float16)
FLOAT32: Final = np.dtype(np.float32)
FLOAT64: Final = np.dtype(np.float64)
TYPES: Final = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)
NUMBER: Final = {
    FLOAT32: TensorProto.FLOAT,
    FLOAT16: TensorProto.FLOAT16,
    BFLOAT16: TensorProto.BFLOAT16,
    FLOAT64: TensorProto.DOUBLE,
}
Array = NDArray[Any]


def model_of(
    name: str,
    inputs: Sequence[Array],
    *,
    opset: int = 18,
    shapes: Sequence[Sequence[int | str]] | None = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node Y = name(X0, X1, ...), with its body."""
    number = NUMBER[inputs[0].dtype]
    names = [f"X{i}" for i in range(len(inputs))]
    declared = shapes or [list(array.shape) for array in inputs]
    graph = helper.make_graph(
        [bodies.node(name, names, "Y", element_type=number, **attributes)],
        "one",
        [helper.make_tensor_value_info(n, number, s) for n, s in zip(names, declared, strict=True)],
        [helper.make_empty_tensor_value_info("Y")],
    )
    graph.output[0].type.tensor_type.elem_type = number
    opsets = [helper.make_opsetid("", opset)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=bodies.IR_VERSION)
    return bodies.add_functions(made)


def run(
    model: onnx.ModelProto,
    inputs: Sequence[Array],
    folder: Path,
    *,
    kernel: bool = True,
    threads: int = 1,
) -> Array:
    path = folder / "model.onnx"
    onnx.save(model, path)
    libraries = [LIBRARY] if kernel and LIBRARY is not None else []
    with open_session(path, threads=threads, libraries=libraries) as session:
        feeds = {value.name: array for value, array in zip(session.inputs, inputs, strict=True)}
        (output,) = session.run(feeds).values()
    found: Array = output
    return found


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The kernels of one instruction set, in this whole process."""
    native = ctypes.CDLL(str(LIBRARY))
    native.onnxnorm_ops_select.argtypes = [ctypes.c_char_p]
    assert native.onnxnorm_ops_select(name.encode())
    try:
        yield
    finally:
        native.onnxnorm_ops_select(library.describe().instruction_set.encode())


# -- the truth ---------------------------------------------------------------------------------


def softmax(values: Array, axis: int, *, log: bool = False) -> Array:
    """Softmax or its logarithm in float64."""
    values = values.astype(np.float64)
    if values.size == 0:
        return values
    with np.errstate(all="ignore"):
        shifted = values - values.max(axis, keepdims=True)
        powers = np.exp(shifted)
        total = powers.sum(axis, keepdims=True)
        result: Array = shifted - np.log(total) if log else powers / total
    return result


def normalize(values: Array, axes: Sequence[int], epsilon: float, *, centered: bool) -> Array:
    """(x - mean) / sqrt(variance + epsilon) in float64."""
    values = values.astype(np.float64)
    if centered and values.size:
        values = values - values.mean(tuple(axes), keepdims=True)
    if not values.size:
        return values
    variance = (values * values).mean(tuple(axes), keepdims=True)
    result: Array = values / np.sqrt(variance + epsilon)
    return result


# -- tolerances: derived from the roundings that happen ----------------------------------------

# Of the type that is computed in, and of the type that is stored.
INSIDE: Final = {FLOAT32: 2.0**-24, FLOAT16: 2.0**-24, BFLOAT16: 2.0**-24, FLOAT64: 2.0**-53}
STORED: Final = {FLOAT32: 0.0, FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8, FLOAT64: 0.0}
# Below the smallest normal number results are 0, or on float16's grid of subnormals.
SMALLEST: Final = {FLOAT32: 2.0**-125, FLOAT16: 2.0**-24, BFLOAT16: 2.0**-125, FLOAT64: 2.0**-1021}


def softmax_tolerance(values: Array, truth: Array, dtype: Any, *, log: bool) -> Array:
    """How far a softmax computed in `dtype` may be from the truth, element by element.

    Each value x is rounded when it is formed and when the maximum is subtracted, which moves the
    exponent by |x| and |x - max| roundings; the polynomial, the sum and the quotient add some.
    """
    finite = np.abs(values[np.isfinite(values)])
    spread = min(2 * float(finite.max(initial=0)), 1500.0)
    roundings = 24 + 4 * spread if dtype == FLOAT64 else 16 + 4 * spread
    inside = INSIDE[np.dtype(dtype)] * roundings
    stored = STORED[np.dtype(dtype)]
    with np.errstate(invalid="ignore"):
        relative = (
            inside * (1 + np.abs(truth)) + stored * np.abs(truth)
            if log
            else (inside + stored) * np.abs(truth)
        )
    result: Array = relative + SMALLEST[np.dtype(dtype)]
    return result


def assert_close(found: Array, truth: Array, tolerance: Array | float) -> None:
    """NaN and infinity where the truth has them, all else within the tolerance."""
    assert found.shape == truth.shape
    found = found.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(truth))
    infinite = np.isinf(truth)
    np.testing.assert_array_equal(found[infinite], truth[infinite])
    finite = np.isfinite(truth)
    excess = np.abs(np.where(finite, found, 0) - np.where(finite, truth, 0))
    excess -= np.where(finite, tolerance, 0)
    assert excess.max(initial=0) <= 0, f"off by {excess.max()} more than allowed"
