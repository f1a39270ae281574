"""Models on disk, without their weights in memory.

A model file is read as a *skeleton*: the protobuf message with every tensor payload of
`INLINE_LIMIT` bytes or more replaced by a reference (source, offset, length). A payload is
memory-mapped when somebody asks for its values, and copied by the kernel when the model is
written, so the weights of a tensor that no pass touches never enter this process.

The reference is itself valid ONNX: a tensor whose `data_location` is EXTERNAL and whose
`external_data` holds one entry under `REFERENCE_KEY`. Shape inference runs on a skeleton as it is.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import secrets
import shutil
import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from google.protobuf import unknown_fields
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxnorm.errors import ModelError, OutputError

INLINE_LIMIT: Final = 1024  # bytes; smaller tensors (shapes, axes, epsilons) stay in the skeleton
PROTOBUF_LIMIT: Final = 2**31 - 1  # no protobuf parser reads a larger message
REFERENCE_KEY: Final = "onnxnorm:source"
_ALIGNMENT: Final = 4096  # of large tensors in a data file, so that a page never holds two of them

Array: TypeAlias = NDArray[Any]
_Piece: TypeAlias = "bytes | _Range"

# Which fields of which message can hold a tensor payload, by field number in onnx.proto.
_CHILDREN: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {},
}
_RAW_DATA: Final = 9
_EXTERNAL_DATA: Final = 13
_DATA_LOCATION: Final = 14
_STATED: Final = "stated"  # in a reference: the tensor says itself that its data are inside
_DEPTH_LIMIT: Final = 100  # of messages inside messages; protobuf's own
_BLOCK: Final = 8 << 20  # bytes copied at a time where the kernel cannot
_MAPPINGS: Final = 128  # of one file at a time; each one takes a file descriptor


@dataclass(frozen=True)
class _Range:
    """A run of bytes in one of the sources."""

    source: int
    offset: int
    length: int


class _File:
    """A file that payloads are read from: kept open, so that it may be replaced meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self.descriptor).st_size
        self._mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._shared: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def view(self, offset: int, length: int) -> memoryview:
        if length == 0:
            return memoryview(b"")
        if len(self._mapped) < _MAPPINGS:
            # One mapping a view: its pages leave this process when the last array on it does.
            before = offset % mmap.ALLOCATIONGRANULARITY
            mapped = self._map(self._mapped, offset - before, before + length)
            return memoryview(mapped)[before:]
        whole = next((m for m in self._shared if len(m) >= offset + length), None)
        if whole is None:
            whole = self._map(self._shared, 0, self.size)
        return memoryview(whole)[offset : offset + length]

    def _map(self, known: weakref.WeakSet[mmap.mmap], offset: int, length: int) -> mmap.mmap:
        mapped = mmap.mmap(self.descriptor, length, access=mmap.ACCESS_READ, offset=offset)
        known.add(mapped)
        return mapped

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self.descriptor)


class _Spill(_File):
    """Where new payloads wait for the model to be written: a file that nobody else sees."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile(prefix="onnxnorm-") as file:
            self.descriptor = os.dup(file.fileno())
        self.path = Path("the file of new weights")
        self.size = 0
        self._mapped = weakref.WeakSet()
        self._shared = weakref.WeakSet()

    def append(self, array: Array) -> int:
        """Write an array's bytes; returns their offset."""
        offset = self.size
        view = np.ascontiguousarray(array).view(np.uint8).data.cast("B")
        os.lseek(self.descriptor, offset, os.SEEK_SET)
        while view:
            done = os.write(self.descriptor, view)
            view = view[done:]
            self.size += done
        return offset


class _Memory:
    """The payload of one tensor of a model that was handed over in memory."""

    def __init__(self, tensor: onnx.TensorProto) -> None:
        self.tensor = tensor  # protobuf hands out a copy of the bytes: ask for it only when needed

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(self.tensor.raw_data)[offset : offset + length]


@dataclass(frozen=True)
class Stored:
    """A model as read: its skeleton, and where its payloads are.

    Attributes:
        proto: The skeleton. Treat it as read-only.
        path: The file it came from; None for a model handed over in memory.
    """

    proto: onnx.ModelProto
    path: Path | None = None
    _sources: list[_File | _Memory] = field(default_factory=list, repr=False)
    _files: dict[str, _File] = field(default_factory=dict, repr=False)  # external data by location
    _as_read: bytes | None = field(default=None, repr=False)

    def array(self, tensor: onnx.TensorProto) -> Array:
        """Values of a tensor of this model, memory-mapped and read-only where they are large.

        bfloat16, float8, float4, int4 and int2 come as the types of ml_dtypes.

        Raises:
            ModelError: The tensor's data are missing or of the wrong size.
        """
        payload = self._payload(tensor)
        if payload is None:
            if tensor.HasField("raw_data") and len(tensor.raw_data) != payload_size(tensor):
                raise _wrong_size(tensor, len(tensor.raw_data))
            try:
                return numpy_helper.to_array(tensor)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise ModelError(
                    f"tensor '{tensor.name}' cannot be read: {error}",
                    "Export the model again; its data do not match its shape and type.",
                ) from error
        if len(payload) != payload_size(tensor):
            raise _wrong_size(tensor, len(payload))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if _bits(tensor.data_type) < 8:
            packed = onnx.TensorProto(
                data_type=tensor.data_type, dims=tensor.dims, raw_data=bytes(payload)
            )
            return numpy_helper.to_array(packed)
        flat: Array = np.frombuffer(payload, dtype=dtype)
        return flat.reshape(tuple(tensor.dims))

    def check_size(self, tensor: onnx.TensorProto) -> None:
        """Check that the data of a tensor outside the skeleton are as long as its shape says.

        Raises:
            ModelError: They are not.
        """
        run = self._range(tensor)
        if not isinstance(run, tuple) and run.length != payload_size(tensor):
            raise _wrong_size(tensor, run.length)

    def _payload(self, tensor: onnx.TensorProto) -> memoryview | None:
        """The bytes behind a tensor that lives outside the skeleton; None for one inside it."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return None
        run = self._range(tensor)
        if isinstance(run, tuple):
            file, offset, length = run
            return file.view(offset, length)
        return self._sources[run.source].view(run.offset, run.length)

    def _range(self, tensor: onnx.TensorProto) -> _Range | tuple[_File, int, int]:
        reference = _reference(tensor)
        if reference is not None:
            return reference
        location, offset, _ = _external(tensor)
        return self._files[location], offset, payload_size(tensor)

    def keep(self, name: str, array: Array) -> onnx.TensorProto:
        """A tensor with these values, held outside memory where they are large.

        Memory so follows the largest changed tensor and not their sum.
        """
        data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        if (
            array.nbytes < INLINE_LIMIT
            or data_type == onnx.TensorProto.STRING
            or _bits(data_type) < 8
        ):
            return numpy_helper.from_array(np.asarray(array, order="C"), name)
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=data_type)
        source = next((i for i, s in enumerate(self._sources) if isinstance(s, _Spill)), None)
        if source is None:
            source = len(self._sources)
            self._sources.append(_Spill())
        spill = self._sources[source]
        assert isinstance(spill, _Spill)
        with _writing(Path(tempfile.gettempdir())):
            offset = spill.append(array)
        _refer(tensor, _Range(source, offset, array.nbytes))
        return tensor

    def with_proto(self, proto: onnx.ModelProto) -> Stored:
        """Another skeleton over the same payloads: what a transformation gives."""
        return Stored(proto, self.path, self._sources, self._files, self._as_read)

    def branch(self) -> Stored:
        """The same model; what it keeps from now on is gone when it and its models are."""
        return replace(self, _sources=list(self._sources))

    @property
    def unchanged(self) -> bool:
        """Whether the skeleton is, byte for byte, the one that was read."""
        return self._as_read is not None and self.proto.SerializeToString() == self._as_read

    @property
    def external_locations(self) -> tuple[str, ...]:
        """The data files that the model as read refers to, relative to its folder."""
        return tuple(self._files)

    def small(self) -> onnx.ModelProto:
        """A copy for analyses: external payloads below `INLINE_LIMIT` are brought inside.

        Shape inference needs the values of small tensors (a Reshape's shape) wherever they are.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        for tensor in tensors(copy):
            if (
                tensor.data_location == onnx.TensorProto.EXTERNAL
                and _reference(tensor) is None
                and payload_size(tensor) < INLINE_LIMIT
            ):
                payload = self._payload(tensor)
                del tensor.external_data[:]
                tensor.ClearField("data_location")
                tensor.raw_data = bytes(payload or b"")
        return copy

    def complete(self) -> onnx.ModelProto:
        """The whole model in memory, payloads included; external data stay external.

        Raises:
            ModelError: It is larger than a protobuf message can be.
        """
        pieces = list(_splice(self.proto.SerializeToString()))
        if sum(len(p) if isinstance(p, bytes) else p.length for p in pieces) > PROTOBUF_LIMIT:
            raise ModelError(
                "the model is larger than 2 GB and cannot be one protobuf message",
                "Save it to a file instead; its weights then go into a data file beside it.",
            )
        whole = b"".join(
            p if isinstance(p, bytes) else self._sources[p.source].view(p.offset, p.length)
            for p in pieces
        )
        return onnx.ModelProto.FromString(whole)


# ** reading **


def load(path: str | Path) -> Stored:
    """Read a model file as a skeleton over memory-mapped payloads.

    Raises:
        ModelError: The file is missing, is no ONNX model, is truncated, or refers to external
            data that are missing, too short, or outside the model's folder.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder", "Name the .onnx file inside it.")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a regular file", "Save the model to a file first.")
        file = _File(path)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", "Check the path.") from None
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", "Check the file's permissions."
        ) from error
    if file.size == 0:
        raise ModelError(f"{path} is empty", "Export or download the model again.")
    skeleton = _parse(file, path)
    stored = Stored(skeleton, path, [file], {}, skeleton.SerializeToString())
    _open_all(stored, path.parent)
    return stored


def from_proto(model: onnx.ModelProto) -> Stored:
    """Take a model from memory; `model` is neither changed nor copied as a whole.

    Tensors with external data are looked for relative to the working directory, as onnx does.

    Raises:
        ModelError: As `load` does.
    """
    if not model.HasField("graph"):
        raise ModelError("the model has no graph", "Pass a complete onnx.ModelProto.")
    sources: list[_File | _Memory] = []
    skeleton = onnx.ModelProto()
    _copy_without(skeleton, model, "graph")
    skeleton.graph.SetInParent()
    _copy_without(skeleton.graph, model.graph, "initializer")
    for tensor in model.graph.initializer:
        light = skeleton.graph.initializer.add()
        size = len(tensor.raw_data) if tensor.HasField("raw_data") else 0
        if size < INLINE_LIMIT or tensor.data_location == onnx.TensorProto.EXTERNAL:
            light.CopyFrom(tensor)
        else:
            _copy_without(light, tensor, "raw_data")
            _refer(light, _Range(len(sources), 0, size), stated=tensor.HasField("data_location"))
            sources.append(_Memory(tensor))
    _check_references(skeleton, len(sources))
    stored = Stored(skeleton, None, sources, {}, None)
    _open_all(stored, Path())
    return stored


def _open_all(stored: Stored, folder: Path) -> None:
    """Find every external data file, and keep it open."""
    for tensor in tensors(stored.proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and _reference(tensor) is None:
            _open_external(stored, tensor, folder)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of a model: initializers and attributes, in all graphs and functions."""
    for holder in _holders(model):
        if isinstance(holder, onnx.GraphProto):
            yield from holder.initializer
        else:
            if holder.HasField("t"):
                yield holder.t
            yield from holder.tensors


def _sparse(model: onnx.ModelProto) -> Iterator[onnx.SparseTensorProto]:
    for holder in _holders(model):
        if isinstance(holder, onnx.GraphProto):
            yield from holder.sparse_initializer
        else:
            if holder.HasField("sparse_tensor"):
                yield holder.sparse_tensor
            yield from holder.sparse_tensors


def _holders(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.AttributeProto]:
    """Every message of a model that can hold tensors."""
    graphs = [model.graph]
    for info in model.training_info:
        graphs += [info.initialization, info.algorithm]
    nodes: list[Iterable[onnx.NodeProto]] = [f.node for f in model.functions]
    attributes: list[Iterable[onnx.AttributeProto]] = [f.attribute_proto for f in model.functions]
    while graphs or nodes or attributes:
        if graphs:
            graph = graphs.pop()
            yield graph
            nodes.append(graph.node)
        elif nodes:
            attributes += [node.attribute for node in nodes.pop() if node.attribute]
        else:
            for attribute in attributes.pop():
                yield attribute
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs += attribute.graphs


def payload_size(tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor of this shape and type has: ceil(prod(dims) * bits / 8)."""
    count = math.prod(tensor.dims)
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(
            f"tensor '{tensor.name}' has a negative dimension: {list(tensor.dims)}",
            "Export the model again; a stored tensor has a shape of whole numbers.",
        )
    if tensor.data_type == onnx.TensorProto.STRING:
        raise ModelError(
            f"tensor '{tensor.name}' of strings has raw or external data",
            "Export the model again; strings are stored one by one.",
        )
    try:
        return (count * _bits(tensor.data_type) + 7) // 8
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"tensor '{tensor.name}' has the unknown element type {tensor.data_type}",
            "Export the model again, or update onnx: the type may be newer than the installed one.",
        ) from error


def _bits(data_type: int) -> int:
    name = onnx.TensorProto.DataType.Name(data_type)
    if name.endswith("INT4") or name == "FLOAT4E2M1":
        return 4
    if name in ("FLOAT6E2M3", "FLOAT6E3M2"):
        return 6
    if name.endswith("INT2"):
        return 2
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def _parse(file: _File, path: Path) -> onnx.ModelProto:
    view = file.view(0, file.size)
    stripped: list[_Range] = []
    try:
        skeleton = onnx.ModelProto.FromString(_strip(view, "model", 0, stripped))
    except (DecodeError, _WireError) as error:
        # A model starts with its ir_version (field 1, a varint): a file that does is broken,
        # any other is something else.
        broken = bytes(view[:1]) == b"\x08" and file.size > 16
        what = f"{path} is a truncated or damaged ONNX model" if broken else None
        raise ModelError(
            f"{what or f'{path} is not an ONNX model'}: {error}",
            "Export or download it again." if broken else "Give a file that holds an ONNX model.",
        ) from error
    if not skeleton.HasField("graph") or not (skeleton.ir_version or skeleton.opset_import):
        raise ModelError(
            f"{path} is not an ONNX model: it holds no graph",
            "Give a file that holds an ONNX model.",
        )
    _check_references(skeleton, len(stripped))
    return skeleton


def _check_references(skeleton: onnx.ModelProto, expected: int) -> None:
    """Refuse a model that brings references of its own, or data that we cannot keep apart."""
    found = 0
    for tensor in tensors(skeleton):
        references = sum(entry.key == REFERENCE_KEY for entry in tensor.external_data)
        found += references
        if references and (references > 1 or tensor.HasField("raw_data")):
            raise ModelError(
                f"tensor '{tensor.name}' has its data twice", "Export the model again."
            )
    if found != expected:
        raise ModelError(
            f"the model uses '{REFERENCE_KEY}', which is reserved, in its external data",
            "Save it with the tool that made it; this is not a complete model.",
        )
    for sparse in _sparse(skeleton):
        for part in (sparse.values, sparse.indices):
            if part.data_location == onnx.TensorProto.EXTERNAL:
                raise ModelError(
                    f"sparse tensor '{sparse.values.name}' has external data",
                    "Save the model with its sparse tensors inside.",
                )
    heading = (skeleton.producer_name, skeleton.producer_version, skeleton.domain)
    if any(isinstance(text, bytes) for text in (*heading, *_domains(skeleton))):
        raise ModelError(
            "the model's producer or an opset's domain is not UTF-8 text",
            "Export the model again.",
        )


def _domains(model: onnx.ModelProto) -> Iterator[str | bytes]:
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        yield from (opset.domain for opset in imports)


def _open_external(stored: Stored, tensor: onnx.TensorProto, folder: Path) -> None:
    """Check one tensor's external data and keep its file open."""
    location, offset, length = _external(tensor)
    if not location or "\0" in location:
        raise ModelError(
            f"tensor '{tensor.name}' has external data without a location",
            "Export the model again.",
        )
    if location not in stored._files:
        try:
            inside = folder.resolve()
            target = (folder / location).resolve()
        except (OSError, RuntimeError):  # a circle of links
            inside, target = folder, Path("/")
        if Path(location).is_absolute() or not target.is_relative_to(inside):
            raise ModelError(
                f"tensor '{tensor.name}' keeps its data outside the model's folder: {location}",
                "Copy the data file into the model's folder and refer to it by its name.",
            )
        try:
            found = target.is_file()
            if found:
                stored._files[location] = _File(target)
        except OSError as error:
            raise ModelError(
                f"external data file {folder / location} cannot be read: {error.strerror}",
                "Check the file's permissions.",
            ) from error
        if not found:
            raise ModelError(
                f"external data file {folder / location} of tensor '{tensor.name}' does not exist",
                "Put the data file back beside the model, under this name.",
            )
    expected = payload_size(tensor)
    if length is not None and length != expected:
        raise _wrong_size(tensor, length)
    have = stored._files[location].size
    if offset < 0 or offset + expected > have:
        raise ModelError(
            f"external data file {folder / location} is too short for tensor '{tensor.name}':"
            f" it needs bytes {offset} to {offset + expected}, the file has {have}",
            "Copy the data file again; it is truncated or belongs to another model.",
        )


def _wrong_size(tensor: onnx.TensorProto, have: int) -> ModelError:
    return ModelError(
        f"tensor '{tensor.name}' of shape {list(tensor.dims)} needs {payload_size(tensor)} bytes,"
        f" its data have {have}",
        "Export the model again; its data do not match its shape and type.",
    )


def _external(tensor: onnx.TensorProto) -> tuple[str, int, int | None]:
    """Location, offset and length of an external tensor, as the file states them."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        length = int(entries["length"]) if "length" in entries else None
        return str(entries.get("location", "")), int(entries.get("offset", "0") or 0), length
    except ValueError as error:
        raise ModelError(
            f"tensor '{tensor.name}' has external data with a malformed offset or length",
            "Export the model again.",
        ) from error


def _reference(tensor: onnx.TensorProto) -> _Range | None:
    """The reference that stands for a tensor's payload, where it has one."""
    for entry in tensor.external_data:
        if entry.key == REFERENCE_KEY:
            source, offset, length = map(int, entry.value.split(":")[:3])
            return _Range(source, offset, length)
    return None


def _refer(tensor: onnx.TensorProto, run: _Range, *, stated: bool = False) -> None:
    entry = tensor.external_data.add()
    entry.key, entry.value = REFERENCE_KEY, f"{run.source}:{run.offset}:{run.length}"
    if stated:
        entry.value += f":{_STATED}"
    tensor.data_location = onnx.TensorProto.EXTERNAL


def _copy_without(target: Any, message: Any, name: str) -> None:
    """Copy every field of a message but one, without reading that one."""
    for descriptor, value in message.ListFields():
        if descriptor.name != name:
            _assign(target, descriptor.name, value)
    unknowns: Any = unknown_fields.UnknownFieldSet(message)
    for unknown in unknowns:
        number, wire, data = unknown.field_number, unknown.wire_type, unknown.data
        if wire == 0:
            coded = _encode_varint(data)
        elif wire == 2:
            coded = _encode_varint(len(data)) + data
        elif wire in (1, 5):
            coded = data.to_bytes(8 if wire == 1 else 4, "little")
        else:
            raise ModelError(
                f"the model has an unknown field {number} of an obsolete kind",
                "Export the model again.",
            )
        target.MergeFromString(_encode_varint(number << 3 | wire) + coded)


def _assign(message: Any, name: str, value: Any) -> None:
    """Copy one field's value into the same field of another message."""
    target = getattr(message, name)
    if hasattr(target, "MergeFrom"):
        target.MergeFrom(value)
    elif hasattr(target, "CopyFrom"):  # pragma: no cover - messages have MergeFrom too
        target.CopyFrom(value)
    else:
        setattr(message, name, value)


# ** the wire format: where the payloads are **


class _WireError(Exception):
    """The bytes do not follow the protobuf encoding."""


def _varint(data: Any, at: int) -> tuple[int, int]:
    result = shift = 0
    try:
        while True:
            byte = data[at]
            at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result, at
            shift += 7
            if shift > 63:
                raise _WireError("a number is too long")
    except IndexError:
        raise _WireError("it ends inside a number") from None


def _records(data: Any, end: int, at: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Fields of a message as (number, start of the record, start of the value, end)."""
    while at < end:
        start = at
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 2:
            length, value = _varint(data, at)
            at = value + length
        elif wire == 0:
            value = at
            _, at = _varint(data, at)
        elif wire in (1, 5):
            value = at
            at += 8 if wire == 1 else 4
        else:
            raise _WireError(f"unknown wire type {wire}")
        if at > end:
            raise _WireError(f"a field says it ends at byte {at}, the data end at byte {end}")
        yield tag >> 3 if wire == 2 else -(tag >> 3), start, value, at


def _encode_varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _header(number: int, length: int) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(length)


def _strip(view: memoryview, kind: str, base: int, stripped: list[_Range], depth: int = 0) -> bytes:
    """The message at `view` without large payloads; `base` is its offset in the file.

    What is left out is added to `stripped`.
    """
    if depth > _DEPTH_LIMIT:
        raise _WireError(f"it nests more than {_DEPTH_LIMIT} levels deep")
    children = _CHILDREN[kind]
    out: list[bytes | memoryview] = []
    payload: _Range | None = None
    raw: list[int] = []
    external = stated = False
    for number, start, value, end in _records(view, len(view)):
        if kind == "tensor":
            if number == _RAW_DATA:
                # Of several the last one counts, as for every field that occurs once.
                large = end - value >= INLINE_LIMIT
                payload = _Range(0, base + value, end - value) if large else None
                raw.append(len(out))
            elif number == -_DATA_LOCATION:
                stated = True
                external = external or _varint(view, value)[0] != 0
            external = external or number == _EXTERNAL_DATA
        elif number in children and end - value >= INLINE_LIMIT:
            inner = _strip(view[value:end], children[number], base + value, stripped, depth + 1)
            out += [_header(number, len(inner)), inner]
            continue
        out.append(view[start:end])
    if payload is not None:
        if external:
            raise _WireError("a tensor has its data both inside and outside the file")
        for at in raw:
            out[at] = b""
        reference = onnx.TensorProto()
        _refer(reference, payload, stated=stated)
        out.append(reference.SerializeToString())
        stripped.append(payload)
    return b"".join(out)


def _splice(skeleton: bytes) -> Iterator[_Piece]:
    """The file that a skeleton stands for: bytes of ours, and runs of bytes of the sources."""
    marks: list[int] = []
    key = REFERENCE_KEY.encode()
    at = skeleton.find(key)
    while at >= 0:
        marks.append(at)
        at = skeleton.find(key, at + 1)

    def marked(start: int, end: int) -> bool:
        i = bisect_left(marks, start)
        return i < len(marks) and marks[i] < end

    def tensor(start: int, end: int) -> list[_Piece]:
        light = onnx.TensorProto.FromString(skeleton[start:end])
        reference = _reference(light)
        if reference is None:  # the key occurs in a name or a doc string
            return [skeleton[start:end]]
        stated = any(e.value.endswith(_STATED) for e in light.external_data)
        before: list[bytes] = []
        after: list[bytes] = []
        target = before
        for number, record, _, stop in _records(skeleton, end, start):
            if abs(number) > _RAW_DATA:
                target = after  # and so for unknown fields, which come last whatever their number
            if abs(number) not in (_EXTERNAL_DATA, _DATA_LOCATION):
                target.append(skeleton[record:stop])
            elif number == -_DATA_LOCATION and stated:
                target.append(_encode_varint(_DATA_LOCATION << 3) + b"\0")
        head = b"".join(before) + _header(_RAW_DATA, reference.length)
        return [head, reference, b"".join(after)]

    def message(start: int, end: int, kind: str) -> list[_Piece]:
        if not marked(start, end):
            return [skeleton[start:end]]
        if kind == "tensor":
            return tensor(start, end)
        out: list[_Piece] = []
        for number, record, value, stop in _records(skeleton, end, start):
            child = _CHILDREN[kind].get(number)
            if child is None or not marked(value, stop):
                out.append(skeleton[record:stop])
                continue
            inner = message(value, stop, child)
            out += [_header(number, _length(inner)), *inner]
        return out

    pending: list[bytes] = []
    for piece in message(0, len(skeleton), "model"):
        if isinstance(piece, bytes):
            pending.append(piece)
        else:
            yield b"".join(pending)
            pending.clear()
            yield piece
    yield b"".join(pending)


def _length(pieces: Iterable[_Piece]) -> int:
    return sum(len(p) if isinstance(p, bytes) else p.length for p in pieces)


# ** writing **


class Staged:
    """A model written to a hidden folder beside its destination, not yet in place.

    Use it as a context manager: `commit()` moves the files to their places by renaming them, and
    leaving the context removes whatever was not moved. Until `commit` nothing at the destination
    has changed.

    Attributes:
        model: The staged .onnx file, with its data files beside it; it can be run.
    """

    def __init__(self, stored: Stored, target: Path | None) -> None:
        self._target = target
        self._hidden = _HiddenFolder(target)
        self._folder = self._hidden.path
        try:
            self.model = self._folder / (target.name if target else "model.onnx")
            with _writing(target or self.model):
                self._write(stored)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Staged:  # noqa: PYI034  (Self needs Python 3.11)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the staging folder and all that is still in it."""
        self._hidden.remove()

    def commit(self) -> tuple[Path, ...]:
        """Move the model and its data files into place; returns the paths written.

        Every existing file that is replaced is linked aside first and put back when a later
        move fails, so an existing output stays whole.

        Raises:
            OutputError: A file could not be moved; the destination is as it was.
        """
        if self._target is None:
            raise ValueError("a model staged without a target has no place to go")
        folder = self._target.parent
        staged = sorted(
            (p for p in self._folder.rglob("*") if p.is_file()), key=lambda p: p == self.model
        )  # the model last: whoever sees the new model finds its data
        undo: list[Callable[[], object]] = []
        written = []
        with _writing(self._target):
            backups = Path(tempfile.mkdtemp(dir=self._folder))
            try:
                for number, source in enumerate(staged):
                    place = folder / source.relative_to(self._folder)
                    for missing in reversed([p for p in place.parents if not p.exists()]):
                        missing.mkdir()
                        undo.append(missing.rmdir)
                    if os.path.lexists(place) and not place.is_dir():
                        backup = backups / str(number)
                        if place.exists():
                            shutil.copymode(place, source)
                        try:
                            os.link(place, backup, follow_symlinks=False)
                        except (OSError, NotImplementedError):  # not every file system has links
                            place.replace(backup)
                        undo.append(partial(backup.replace, place))
                        source.replace(place)
                    else:
                        source.replace(place)
                        undo.append(place.unlink)
                    written.append(place)
            except BaseException:
                for step in reversed(undo):
                    with suppress(OSError):
                        step()
                raise
        return tuple(reversed(written))

    def _write(self, stored: Stored) -> None:
        whole = stored.unchanged and stored.path is not None
        if whole and (not stored._files or self._can_keep_locations(stored)):
            self._copy_whole(stored)
            return
        skeleton = stored.proto.SerializeToString()
        pieces = list(_splice(skeleton))
        if stored._files or _length(pieces) > PROTOBUF_LIMIT:
            self._write_external(stored)
        else:
            with self.model.open("wb") as out:
                for piece in pieces:
                    _emit(out.fileno(), piece, stored)

    def _can_keep_locations(self, stored: Stored) -> bool:
        """Whether the data files may go under their own names into the target's folder.

        Not when a file of that name is there already, unless the output that is being replaced
        is the one that refers to it: another model may live on it.
        """
        if self._target is None:
            return True
        if any(".." in Path(p).parts for p in stored._files):
            return False  # the folder that such a way goes through may be missing there
        taken = [p for p in stored._files if (self._target.parent / p).exists()]
        if not taken:
            return True
        if stored.path is not None and _same_folder(self._target.parent, stored.path.parent):
            return self._target.exists() and self._target.samefile(stored.path)
        try:
            return set(taken) <= set(load(self._target).external_locations)
        except ModelError:
            return False

    def _copy_whole(self, stored: Stored) -> None:
        assert stored.path is not None
        files: list[tuple[_File | _Memory, Path]] = [(stored._sources[0], self.model)]
        for location, file in stored._files.items():
            files.append((file, self._folder / location))
        for source, place in files:
            assert isinstance(source, _File)
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as out:
                _copy(source, 0, source.size, out.fileno())

    def _write_external(self, stored: Stored) -> None:
        """Every payload of `INLINE_LIMIT` bytes or more into one data file beside the model."""
        proto = onnx.ModelProto()
        proto.CopyFrom(stored.proto)
        data = self.model.with_name(self.model.name + ".data")
        at = 0
        with data.open("wb") as out:
            for tensor in tensors(proto):
                if not (external := tensor.data_location == onnx.TensorProto.EXTERNAL) and not (
                    tensor.HasField("raw_data") and len(tensor.raw_data) >= INLINE_LIMIT
                ):
                    continue
                run = stored._range(tensor) if external else None
                if run is None:
                    size = len(tensor.raw_data)
                else:
                    size = run[2] if isinstance(run, tuple) else run.length
                if size == 0:
                    # There is no empty range in a file that might be empty.
                    del tensor.external_data[:]
                    tensor.ClearField("data_location")
                    tensor.raw_data = b""
                    continue
                aligned = -(-at // _ALIGNMENT) * _ALIGNMENT if size >= _ALIGNMENT else at
                if aligned > at:
                    os.lseek(out.fileno(), aligned, os.SEEK_SET)  # a hole, not zeros
                    at = aligned
                if isinstance(run, tuple):
                    _copy(*run, out.fileno())
                elif run is not None:
                    _emit(out.fileno(), run, stored)
                else:
                    _emit(out.fileno(), tensor.raw_data, stored)
                    tensor.ClearField("raw_data")
                del tensor.external_data[:]
                for key, value in (("location", data.name), ("offset", at), ("length", size)):
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, str(value)
                tensor.data_location = onnx.TensorProto.EXTERNAL
                at += size
            out.truncate(at)
        skeleton = proto.SerializeToString()
        if len(skeleton) > PROTOBUF_LIMIT:
            raise OutputError(
                "the graph alone, without its weights, is larger than 2 GB",
                "Such a model cannot be one ONNX file; split it.",
            )
        self.model.write_bytes(skeleton)
        if at == 0:
            data.unlink()


class _writing:  # noqa: N801 - reads as a clause: with _writing(path)
    """Turn operating system errors into `OutputError`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise write_error(self.target, error) from error


def write_error(target: Path, error: OSError) -> OutputError:
    """The two lines for an operating system error met while writing `target`."""
    hints = {
        errno.ENOSPC: "Free some space or write to another disk.",
        errno.EDQUOT: "Free some space or write to another disk.",
        errno.EFBIG: "Raise the limit on file sizes or write to another disk.",
        errno.EACCES: "Write to a folder that you may write to.",
        errno.EPERM: "Write to a folder that you may write to.",
        errno.EROFS: "Write to a folder that you may write to.",
        errno.ENOENT: "Create the folder first.",
        errno.ENOTDIR: "Create the folder first.",
        errno.EISDIR: "Give a file name, not a folder.",
        errno.ENAMETOOLONG: "Give a shorter name.",
    }
    hint = hints.get(error.errno or 0, "Write to another place.")
    return OutputError(f"{target} cannot be written: {error.strerror or error}", hint)


class _HiddenFolder:
    """A new folder beside `target`, or for temporary files, gone when nobody holds this object.

    Its removal is arranged before it exists, so that an interruption at any moment leaves none.
    """

    def __init__(self, target: Path | None) -> None:
        mark = secrets.token_hex(8)
        if target is None:
            self.path = Path(tempfile.gettempdir(), f"onnxnorm-{mark}")
        else:
            self.path = target.parent / f".{target.name[:40]}.{mark}"
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        with _writing(target or self.path):
            if target is not None:
                _check_place(target)
            self.path.mkdir(mode=0o700)


def _check_place(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if target.exists() and not target.is_file():  # a rename would replace the device itself
        raise OutputError(f"{target} is not a regular file", "Give the name of a file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder {target.parent} does not exist")


def _same_folder(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _emit(out: int, piece: _Piece, stored: Stored) -> None:
    if isinstance(piece, bytes):
        view = memoryview(piece)
        while view:
            view = view[os.write(out, view) :]
        return
    source = stored._sources[piece.source]
    if isinstance(source, _File):
        _copy(source, piece.offset, piece.length, out)
    else:
        _emit(out, bytes(source.view(piece.offset, piece.length)), stored)


def _copy(source: _File, offset: int, length: int, out: int) -> None:
    """Copy a run of bytes from file to file inside the kernel where it can."""
    end = offset + length
    if hasattr(os, "copy_file_range"):
        try:
            while offset < end:
                done = os.copy_file_range(source.descriptor, out, end - offset, offset)
                if done == 0:
                    break
                offset += done
        except OSError as error:
            # These say that this pair of file systems cannot do it, not that the copy failed.
            if error.errno not in (
                errno.EXDEV,
                errno.EINVAL,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
                errno.EBADF,
                errno.EPERM,
            ):
                raise
    if hasattr(os, "sendfile"):
        try:
            while offset < end:
                done = os.sendfile(out, source.descriptor, offset, end - offset)
                if done == 0:
                    break
                offset += done
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK):
                raise
    os.lseek(source.descriptor, offset, os.SEEK_SET)
    while offset < end:
        block = memoryview(os.read(source.descriptor, min(_BLOCK, end - offset)))
        if not block:
            raise OSError(errno.EIO, f"{source.path} became shorter while it was read")
        offset += len(block)
        while block:
            block = block[os.write(out, block) :]


def save(stored: Stored, path: str | Path) -> tuple[Path, ...]:
    """Write a model atomically; returns the files written, the model first.

    The weights stay in the model file below 2 GB and go to `<name>.data` beside it above, or
    where the input kept them in a data file.

    Raises:
        OutputError: It could not be written; nothing at `path` has changed.
    """
    with Staged(stored, Path(path)) as staged:
        return staged.commit()


def check_target(target: Path) -> None:
    """Find out whether something can be written at `target`, before any work is done for it.

    Raises:
        OutputError: It is a folder, or its folder is missing or not writable.
    """
    _HiddenFolder(target).remove()


def total_bytes(stored: Stored) -> int:
    """Bytes of a model with all its payloads, wherever they are."""
    pieces = _length(_splice(stored.proto.SerializeToString()))
    outside = (
        payload_size(t)
        for t in tensors(stored.proto)
        if t.data_location == onnx.TensorProto.EXTERNAL and _reference(t) is None
    )
    return pieces + sum(outside)


def checker_complaint(stored: Stored) -> str | None:
    """What onnx.checker, with shape inference, has against a model; None if nothing.

    The payloads stay where they are: a weight of the main graph, be it an initializer or a
    Constant node, is shown to the checker as an input of its type.
    Source: onnx.checker.check_model(full_check=True).
    """
    copy = stored.small()
    inputs = {i.name for i in copy.graph.input}
    light = []
    for tensor in copy.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            light.append(tensor)
        elif tensor.name not in inputs:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            copy.graph.input.append(info)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(light)
    nodes = [(node, _large_constant(node)) for node in copy.graph.node]
    for node, value in nodes:
        if value is not None:
            info = onnx.helper.make_tensor_value_info(node.output[0], value.data_type, value.dims)
            copy.graph.input.append(info)
    del copy.graph.node[:]
    copy.graph.node.extend(node for node, value in nodes if value is None)
    for tensor in tensors(copy):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            size = payload_size(tensor)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(size)
    try:
        onnx.checker.check_model(copy, full_check=True)
    except Exception as error:
        return " ".join(str(error).split())
    return None


def _large_constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node whose payload is elsewhere."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if len(node.output) != 1 or len(node.attribute) != 1 or not node.attribute[0].HasField("t"):
        return None
    tensor = node.attribute[0].t
    return tensor if tensor.data_location == onnx.TensorProto.EXTERNAL else None
