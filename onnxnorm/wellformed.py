"""What every later step takes for granted of a model file, checked once, with the name at fault.

onnx.checker stops at the first fault without saying much of where, wants all weights in memory,
and rejects models that run. Here is only what would make our own reading of a model meaningless;
what the structure of the graph must be is the business of `onnxnorm.module`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from onnxnorm.errors import ModelError
from onnxnorm.storage import Stored, payload_size

STANDARD_DOMAINS: Final = ("", "ai.onnx")
_NEWEST_VERSION: Final = 2**31 - 1  # onnx and onnxruntime hold versions in 32 bits
_COMPLEX: Final = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
_AGAIN: Final = "Export the model again."


def check(stored: Stored) -> None:
    """Check the element types and sizes of tensors, attributes against schemas, opset versions.

    Raises:
        ModelError: One of them cannot be.
    """
    proto = stored.proto
    _Checker(stored, versions(proto.opset_import)).graph(proto.graph)
    for function in proto.functions:
        _Checker(stored, versions(function.opset_import)).nodes(function.node)


class _Checker:
    def __init__(self, stored: Stored, versions: Mapping[str, int]) -> None:
        self.stored = stored
        self.version = versions.get("", 0)

    def graph(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self.tensor(tensor, needs_data=True)
        for sparse in graph.sparse_initializer:
            self.sparse(sparse)
        self.nodes(graph.node)

    def nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            if any(isinstance(text, bytes) for text in (node.op_type, node.domain)):
                raise ModelError(
                    f"the operator of node '{_label(node)}' is not UTF-8 text: {node.op_type!r}",
                    _AGAIN,
                )
            if not node.op_type:
                raise ModelError(f"node '{_label(node)}' has no operator", _AGAIN)
            known = _attribute_types(node.op_type, self.version)
            seen = set()
            for attribute in node.attribute:
                if attribute.name in seen:
                    raise ModelError(
                        f"node '{_label(node)}' ({node.op_type}) has the attribute"
                        f" '{attribute.name}' twice",
                        _AGAIN,
                    )
                seen.add(attribute.name)
                if node.domain in STANDARD_DOMAINS and attribute.name in known:
                    self.attribute(node, attribute, known[attribute.name])
                self.content(attribute)

    def attribute(self, node: onnx.NodeProto, attribute: AttributeProto, wanted: int) -> None:
        if attribute.type != wanted:
            names = AttributeProto.AttributeType.Name
            raise ModelError(
                f"attribute '{attribute.name}' of node '{_label(node)}' ({node.op_type}) is of"
                f" type {names(attribute.type)}, not {names(wanted)}",
                _AGAIN,
            )

    def content(self, attribute: AttributeProto) -> None:
        for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])):
            self.tensor(tensor, needs_data=False)
        if attribute.HasField("sparse_tensor"):
            self.sparse(attribute.sparse_tensor)
        for sparse in attribute.sparse_tensors:
            self.sparse(sparse)
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            self.graph(graph)

    def tensor(self, tensor: TensorProto, *, needs_data: bool) -> None:
        if tensor.HasField("segment"):
            return
        if tensor.data_location == TensorProto.EXTERNAL:
            self.stored.check_size(tensor)
            return
        if tensor.HasField("raw_data"):
            have, want, unit = len(tensor.raw_data), payload_size(tensor), "bytes"
        else:
            have, want = _entries(tensor)
            unit = "values"
        if have != want and (have or needs_data):
            raise ModelError(
                f"tensor '{tensor.name}' of shape {list(tensor.dims)} needs {want} {unit},"
                f" its data have {have}",
                "Export the model again; its data do not match its shape and type.",
            )

    def sparse(self, sparse: onnx.SparseTensorProto) -> None:
        self.tensor(sparse.values, needs_data=True)
        self.tensor(sparse.indices, needs_data=True)
        count, dims = math.prod(sparse.values.dims), tuple(sparse.dims)
        shape = tuple(sparse.indices.dims)
        fault = None
        if sparse.indices.data_type != TensorProto.INT64:
            fault = "indices that are not int64"
        elif shape not in ((count,), (count, len(dims))) or any(d < 0 for d in dims):
            fault = f"indices of shape {list(shape)} for {count} values of shape {list(dims)}"
        else:
            indices = numpy_helper.to_array(sparse.indices)
            below = np.array(dims if len(shape) == 2 else [math.prod(dims)], dtype=object)
            if ((indices < 0) | (indices >= below)).any():
                fault = f"an index outside its shape {list(dims)}"
        if fault is not None:
            raise ModelError(f"sparse tensor '{sparse.values.name}' has {fault}", _AGAIN)


def _entries(tensor: TensorProto) -> tuple[int, int]:
    """Entries that a tensor has in its typed field, and how many it must have."""
    if tensor.data_type == TensorProto.STRING:
        if any(dim < 0 for dim in tensor.dims):
            payload_size(TensorProto(name=tensor.name, dims=tensor.dims, data_type=1))
        return len(tensor.string_data), math.prod(tensor.dims)
    bytes_ = payload_size(tensor)
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    count = math.prod(tensor.dims)
    want = 2 * count if tensor.data_type in _COMPLEX else min(count, bytes_)
    return len(getattr(tensor, field)), want  # types below eight bits lie packed in bytes


@functools.cache
def _attribute_types(op: str, version: int) -> Mapping[str, int]:
    """Types of the attributes of an operator of ONNX's own domain; empty where unknown."""
    if version > onnx.defs.onnx_opset_version() or not onnx.defs.has(op, version, ""):
        return {}
    schema = onnx.defs.get_schema(op, version, "")
    value = AttributeProto.AttributeType.Value
    return {name: value(str(a.type).rpartition(".")[2]) for name, a in schema.attributes.items()}


def versions(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Domain to imported version; ONNX's own domain is "" in both of its spellings.

    Raises:
        ModelError: A version cannot be.
    """
    found = {}
    for opset in imports:
        if not 0 <= opset.version <= _NEWEST_VERSION:
            raise ModelError(
                f"the model imports version {opset.version} of"
                f" '{opset.domain or 'ai.onnx'}', which cannot be",
                _AGAIN,
            )
        found["" if opset.domain in STANDARD_DOMAINS else opset.domain] = opset.version
    return found


def _label(node: onnx.NodeProto) -> str:
    return node.name or next((name for name in node.output if name), node.op_type)
