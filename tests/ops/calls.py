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

from onnxnorm.ops import accuracy, bodies, library
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
    other: Path | None = None,
) -> Array:
    """The output, by the library's kernels, without them, or by those of another library."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    libraries = [LIBRARY] if kernel and LIBRARY is not None else []
    libraries = libraries if other is None else [other]
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


def assert_close(found: Array, truth: Array, tolerance: Array) -> None:
    """NaN and infinity where the truth has them, all else within the tolerance."""
    assert (wrong := accuracy.excess(found, truth, tolerance)) is None, wrong


def assert_expected(
    found: Array, name: str, inputs: Sequence[Array], attributes: dict[str, Any], **how: Any
) -> None:
    """What the operator `name` has to give, within the derived tolerance."""
    assert_close(found, *accuracy.expected(name, inputs, attributes, **how))
