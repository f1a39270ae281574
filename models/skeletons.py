"""Graphs as exporters wrote them, in ONNX's text form, their weights replaced by ranges.

    low <= |w| < high, a share of them negative, drawn from streams that the weight's name seeds

What a test of an export needs is its nodes, one by one; of a weight it needs the shape, and values
like those it was exported with: a variance that is positive, a factor that is nowhere near zero. So
the graph of a network becomes a text that can be read and compared, and a model again anywhere,
without the framework that wrote it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser, printer

from models.network import uniform

FOLDER: Final = Path(__file__).parent / "exports"
_KEPT: Final = 8  # elements; a smaller float tensor is a scalar or an axis of three colours
_FLOATS: Final = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def strip(model: onnx.ModelProto) -> str:
    """A model as text: a line for each large weight, then the graph.

    Names of nodes, metadata and doc strings go, and shapes that are stated of inner values;
    integers and small tensors stay as they are.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    lines = []
    kept = []
    for tensor in model.graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        if kind not in _FLOATS or math.prod(tensor.dims) <= _KEPT:
            kept.append(tensor)
            continue
        values = numpy_helper.to_array(tensor).astype(np.float64)
        shape = "x".join(map(str, tensor.dims))
        size, negative = np.abs(values), float((values < 0).mean())
        lines.append(
            f"{kind} {shape} {size.min():.3g} {size.max():.3g} {negative:.2g} {tensor.name}"
        )
    del model.graph.initializer[:]
    for tensor in kept:
        values = numpy_helper.to_array(tensor)
        typed = helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values.flatten())
        model.graph.initializer.append(typed)
    del model.graph.value_info[:], model.metadata_props[:], model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
        node.ClearField("name")
    for info in [*model.graph.input, *model.graph.output]:
        del info.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]
    return "\n".join([*lines, printer.to_text(model)]) + "\n"


def restore(text: str) -> onnx.ModelProto:
    """The model that a text stands for, the same each time."""
    head, _, body = text.partition("<")
    model = parser.parse_model(f"<{body}")
    for line in head.splitlines():
        kind, sizes, low, high, negative, name = line.split(" ", 5)
        dtype = helper.tensor_dtype_to_np_dtype(_FLOATS[kind])
        shape = [int(n) for n in sizes.split("x")]
        values = uniform(name, shape, float(low), float(high))
        values *= np.where(uniform(f"{name}/sign", shape, 0.0, 1.0) < float(negative), -1.0, 1.0)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))
    return model


def load(name: str) -> onnx.ModelProto:
    """One of the graphs in `models/exports/`.

    Raises:
        FileNotFoundError: There is none of that name.
    """
    return restore((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))
