"""Models on disk, without their weights in memory.

A model file is read as a *skeleton*: the protobuf message with every tensor payload of
`INLINE_LIMIT` bytes or more replaced by a reference (source, offset, length). A payload is
memory-mapped when somebody asks for its values, and copied by the kernel when the model is
written, so the weights of a tensor that no pass touches never enter this process.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from google.protobuf import unknown_fields
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxnorm.errors import ModelError, writing
from onnxnorm.wire import (
    INLINE_LIMIT,
    REFERENCE_KEY,
    Range,
    WireError,
    encode_varint,
    length_of,
    refer,
    reference_of,
    splice,
    strip,
)

PROTOBUF_LIMIT: Final = 2**31 - 1  # no protobuf parser reads a larger message

Array: TypeAlias = NDArray[Any]
_Holder: TypeAlias = onnx.GraphProto | onnx.AttributeProto

_MAPPINGS: Final = 128  # of one file at a time; each one takes a file descriptor


class File:
    """A file that payloads are read from: kept open, so that it may be replaced meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self.descriptor).st_size
        self._mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._shared: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def view(self, offset: int, length: int) -> memoryview:
        """Map a run of bytes."""
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


class _Spill(File):
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


class Memory:
    """The payload of one tensor of a model that was handed over in memory."""

    def __init__(self, tensor: onnx.TensorProto) -> None:
        self.tensor = tensor  # protobuf hands out a copy of the bytes: ask for it only when needed

    def view(self, offset: int, length: int) -> memoryview:
        """A run of bytes of the payload."""
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
    sources: list[File | Memory] = field(default_factory=list, repr=False)
    files: dict[str, File] = field(default_factory=dict, repr=False)  # external data by location
    as_read: bytes | None = field(default=None, repr=False)

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
        run = self.range_of(tensor)
        if not isinstance(run, tuple) and run.length != payload_size(tensor):
            raise _wrong_size(tensor, run.length)

    def _payload(self, tensor: onnx.TensorProto) -> memoryview | None:
        """The bytes behind a tensor that lives outside the skeleton; None for one inside it."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return None
        run = self.range_of(tensor)
        if isinstance(run, tuple):
            file, offset, length = run
            return file.view(offset, length)
        return self.sources[run.source].view(run.offset, run.length)

    def range_of(self, tensor: onnx.TensorProto) -> Range | tuple[File, int, int]:
        """Where an external payload is: in one of the sources, or in a data file."""
        reference = reference_of(tensor)
        if reference is not None:
            return reference
        location, offset, _ = _external(tensor)
        return self.files[location], offset, payload_size(tensor)

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
        source = next((i for i, s in enumerate(self.sources) if isinstance(s, _Spill)), None)
        if source is None:
            source = len(self.sources)
            self.sources.append(_Spill())
        spill = self.sources[source]
        assert isinstance(spill, _Spill)
        with writing(Path(tempfile.gettempdir())):
            offset = spill.append(array)
        refer(tensor, Range(source, offset, array.nbytes))
        return tensor

    def with_proto(self, proto: onnx.ModelProto) -> Stored:
        """Another skeleton over the same payloads: what a transformation gives."""
        return Stored(proto, self.path, self.sources, self.files, self.as_read)

    def branch(self) -> Stored:
        """The same model; what it keeps from now on is gone when it and its models are."""
        return replace(self, sources=list(self.sources))

    @property
    def unchanged(self) -> bool:
        """Whether the skeleton is, byte for byte, the one that was read."""
        return self.as_read is not None and self.proto.SerializeToString() == self.as_read

    @property
    def external_locations(self) -> tuple[str, ...]:
        """The data files that the model as read refers to, relative to its folder."""
        return tuple(self.files)

    def small(self) -> onnx.ModelProto:
        """A copy for analyses: external payloads below `INLINE_LIMIT` are brought inside.

        Shape inference needs the values of small tensors (a Reshape's shape) wherever they are.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        self.bring_inside(copy)
        return copy

    def bring_inside(self, model: onnx.ModelProto) -> None:
        """Let a skeleton over these payloads hold those that are external and small."""
        for tensor in tensors(model) if self.files else ():
            if (
                tensor.data_location == onnx.TensorProto.EXTERNAL
                and reference_of(tensor) is None
                and payload_size(tensor) < INLINE_LIMIT
            ):
                payload = self._payload(tensor)
                del tensor.external_data[:]
                tensor.ClearField("data_location")
                tensor.raw_data = bytes(payload or b"")

    @functools.cached_property
    def total_bytes(self) -> int:
        """Bytes of the model with all its payloads, wherever they are."""
        pieces = length_of(splice(self.proto.SerializeToString()))
        outside = (
            payload_size(t)
            for t in (tensors(self.proto) if self.files else ())
            if t.data_location == onnx.TensorProto.EXTERNAL and reference_of(t) is None
        )
        return pieces + sum(outside)

    def complete(self) -> onnx.ModelProto:
        """The whole model in memory, payloads included; external data stay external.

        Raises:
            ModelError: It is larger than a protobuf message can be.
        """
        pieces = list(splice(self.proto.SerializeToString()))
        if sum(len(p) if isinstance(p, bytes) else p.length for p in pieces) > PROTOBUF_LIMIT:
            raise ModelError(
                "the model is larger than 2 GB and cannot be one protobuf message",
                "Save it to a file instead; its weights then go into a data file beside it.",
            )
        whole = b"".join(
            p if isinstance(p, bytes) else self.sources[p.source].view(p.offset, p.length)
            for p in pieces
        )
        return onnx.ModelProto.FromString(whole)

    def filled(self) -> onnx.ModelProto:
        """The whole model as an object that may be larger than one protobuf message can be."""
        with suppress(ModelError):
            return self.complete()
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        for tensor in tensors(model):
            reference = reference_of(tensor)
            if reference is not None:
                del tensor.external_data[:]
                tensor.ClearField("data_location")
                view = self.sources[reference.source].view(reference.offset, reference.length)
                tensor.raw_data = bytes(view)
        return model


# ** reading **

_PERMISSIONS: Final = "Check the file's permissions."


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
        file = File(path)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", "Check the path.") from None
    except OSError as error:
        hint = "Check the path." if error.errno == errno.ENAMETOOLONG else _PERMISSIONS
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint) from error
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
    sources: list[File | Memory] = []
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
            refer(light, Range(len(sources), 0, size), stated=tensor.HasField("data_location"))
            sources.append(Memory(tensor))
    _check_references(skeleton, len(sources))
    stored = Stored(skeleton, None, sources, {}, None)
    _open_all(stored, Path())
    return stored


def _open_all(stored: Stored, folder: Path) -> None:
    """Find every external data file, and keep it open."""
    for tensor in tensors(stored.proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and reference_of(tensor) is None:
            _open_external(stored, tensor, folder)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of a model: initializers and attributes, in all graphs and functions."""
    for holder in _holders(model):
        yield from _dense(holder)


def _dense(holder: _Holder) -> Iterable[onnx.TensorProto]:
    if isinstance(holder, onnx.GraphProto):
        return holder.initializer
    return [holder.t, *holder.tensors] if holder.HasField("t") else holder.tensors


def _sparse(holder: _Holder) -> Iterable[onnx.SparseTensorProto]:
    if isinstance(holder, onnx.GraphProto):
        return holder.sparse_initializer
    single = holder.HasField("sparse_tensor")
    return [holder.sparse_tensor, *holder.sparse_tensors] if single else holder.sparse_tensors


def _holders(model: onnx.ModelProto) -> Iterator[_Holder]:
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
    if min(tensor.dims, default=0) < 0:
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


@functools.cache
def _bits(data_type: int) -> int:
    name = onnx.TensorProto.DataType.Name(data_type)
    if name.endswith("INT4") or name == "FLOAT4E2M1":
        return 4
    if name in ("FLOAT6E2M3", "FLOAT6E3M2"):
        return 6
    if name.endswith("INT2"):
        return 2
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def _parse(file: File, path: Path) -> onnx.ModelProto:
    view = file.view(0, file.size)
    stripped: list[Range] = []
    try:
        skeleton = onnx.ModelProto.FromString(strip(view, "model", 0, stripped))
    except (DecodeError, WireError) as error:
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
    holders = list(_holders(skeleton))
    for tensor in itertools.chain.from_iterable(map(_dense, holders)):
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
    for sparse in itertools.chain.from_iterable(map(_sparse, holders)):
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
    if location not in stored.files:
        homes = [folder]
        if stored.path is not None and stored.path.is_symlink():
            # As in the cache of a download, where model and data are links to files that stand
            # beside each other: onnxruntime looks there too.
            homes.append(stored.path.resolve().parent)
        try:
            inside = [home.resolve() for home in homes]
            target = _resolved(folder / location)
        except (OSError, RuntimeError):  # a circle of links
            inside, target = homes, Path("/")
        if Path(location).is_absolute() or not any(map(target.is_relative_to, inside)):
            raise ModelError(
                f"tensor '{tensor.name}' keeps its data outside the model's folder: {location}",
                "Copy the data file into the model's folder and refer to it by its name.",
            )
        try:
            found = target.is_file()
            if found:
                stored.files[location] = File(target)
        except OSError as error:
            raise ModelError(
                f"external data file {folder / location} cannot be read: {error.strerror}",
                _PERMISSIONS,
            ) from error
        if not found:
            raise ModelError(
                f"external data file {folder / location} of tensor '{tensor.name}' does not exist",
                "Put the data file back beside the model, under this name.",
            )
    expected = payload_size(tensor)
    if length is not None and length != expected:
        raise _wrong_size(tensor, length)
    have = stored.files[location].size
    if offset < 0 or offset + expected > have:
        raise ModelError(
            f"external data file {folder / location} is too short for tensor '{tensor.name}':"
            f" it needs bytes {offset} to {offset + expected}, the file has {have}",
            "Copy the data file again; it is truncated or belongs to another model.",
        )


def _resolved(path: Path) -> Path:
    """Where a path leads, be there a file or not; an error where links lead round in a circle."""
    try:
        return path.resolve(strict=True)
    except OSError as error:
        if error.errno == errno.ELOOP:  # without `strict` Python 3.13 returns the link itself
            raise
    return path.resolve()


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


def _copy_without(target: Any, message: Any, name: str) -> None:
    """Copy every field of a message but one, without reading that one."""
    for descriptor, value in message.ListFields():
        if descriptor.name != name:
            _assign(target, descriptor.name, value)
    unknowns: Any = unknown_fields.UnknownFieldSet(message)
    for unknown in unknowns:
        number, wire, data = unknown.field_number, unknown.wire_type, unknown.data
        if wire == 0:
            coded = encode_varint(data)
        elif wire == 2:
            coded = encode_varint(len(data)) + data
        elif wire in (1, 5):
            coded = data.to_bytes(8 if wire == 1 else 4, "little")
        else:
            raise ModelError(
                f"the model has an unknown field {number} of an obsolete kind",
                "Export the model again.",
            )
        target.MergeFromString(encode_varint(number << 3 | wire) + coded)


def _assign(message: Any, name: str, value: Any) -> None:
    """Copy one field's value into the same field of another message."""
    target = getattr(message, name)
    if hasattr(target, "MergeFrom"):
        target.MergeFrom(value)
    else:
        setattr(message, name, value)
