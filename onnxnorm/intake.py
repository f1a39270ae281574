"""Models in every form that callers have them in, without a file of ours, and back again.

    path                 -> read where it lies                     result: onnx.ModelProto
    onnx.ModelProto      -> taken as it is, not copied as a whole  result: onnx.ModelProto
    onnx_ir.Model        -> serialized, its tensors in memory      result: onnx_ir.Model
    torch's ONNXProgram  -> its onnx_ir.Model                      result: ONNXProgram

onnx_ir and torch are imported by whoever made the model, never by us before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from onnxnorm import storage
from onnxnorm.errors import ModelError, UsageError
from onnxnorm.storage import Stored

Model: TypeAlias = Any  # path, onnx.ModelProto, onnx_ir.Model, or torch's ONNXProgram


@contextmanager
def taken(model: Model) -> Iterator[Stored]:
    """A model in any of the forms we take; the caller's object stays as it is.

    Raises:
        ModelError: It cannot be read.
        UsageError: It is none of these forms.
    """
    if isinstance(model, str | Path):
        yield storage.load(model)
    elif isinstance(model, onnx.ModelProto):
        yield storage.from_proto(model)
    elif _is_ir(model):
        yield storage.from_proto(_serialized(model))
    elif _is_ir(getattr(model, "model", None)):  # torch's ONNXProgram
        yield storage.from_proto(_serialized(model.model))
    else:
        raise UsageError(
            f"an object of type {type(model).__name__} is not a model",
            "Pass a path, an onnx.ModelProto, an onnx_ir.Model or torch's ONNXProgram.",
        )


def given_back(stored: Stored, like: Model) -> Model:
    """A model in memory, of the kind that `like` is; an onnx.ModelProto for a path.

    Raises:
        ModelError: It is larger than 2 GB, which an onnx.ModelProto cannot be.
    """
    if _is_ir(like):
        return _deserialized(stored.filled())
    inner = getattr(like, "model", None)
    if not isinstance(like, str | Path | onnx.ModelProto) and _is_ir(inner):
        return type(like)(_deserialized(stored.filled()), like.exported_program)
    return stored.complete()


def _is_ir(model: object) -> bool:
    return type(model).__module__.partition(".")[0] == "onnx_ir" and hasattr(model, "graph")


def _serialized(model: Any) -> onnx.ModelProto:
    import onnx_ir  # here already, since the caller made the model with it

    try:
        proto: onnx.ModelProto = onnx_ir.serde.serialize_model(model)
        _fill(proto.graph, model.graph)
        for function in proto.functions:
            key = (function.domain, function.name, function.overload)
            _fill(function, model.functions[key])
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"the {type(model).__name__} cannot be written: {error}",
            "Save it to a file yourself and pass the path.",
        ) from error
    return proto


def _fill(proto: onnx.GraphProto | onnx.FunctionProto, scope: Any) -> None:
    """Put what lies in files into the serialized tensors of a graph or function.

    A reference to a file is relative to a folder that only the tensor of `scope` knows. It is found
    by its place and not by its name alone: both branches of an If may have a weight of one name.
    """
    if isinstance(proto, onnx.GraphProto):
        for tensor in proto.initializer:
            _inline(tensor, scope.initializers[tensor.name].const_value)
    for made, node in zip(proto.node, scope, strict=True):
        for attribute in made.attribute:
            if attribute.ref_attr_name:
                continue
            value = node.attributes[attribute.name].value
            if attribute.type == onnx.AttributeProto.TENSOR:
                _inline(attribute.t, value)
            elif attribute.type == onnx.AttributeProto.TENSORS:
                for tensor, held in zip(attribute.tensors, value, strict=True):
                    _inline(tensor, held)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _fill(attribute.g, value)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for body, graph in zip(attribute.graphs, value, strict=True):
                    _fill(body, graph)


def _inline(tensor: onnx.TensorProto, held: Any) -> None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    content = held.tobytes()
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    tensor.raw_data = content


def _deserialized(proto: onnx.ModelProto) -> Any:
    import onnx_ir

    return onnx_ir.serde.deserialize_model(proto)
