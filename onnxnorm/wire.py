"""The wire format of models: taking large payloads out of a file, and putting them back.

`strip` turns a file into a skeleton, the protobuf message in which every tensor payload of
`INLINE_LIMIT` bytes or more is a reference (source, offset, length). `splice` is its inverse. The
reference is itself valid ONNX: a tensor whose `data_location` is EXTERNAL and whose `external_data`
holds one entry under `REFERENCE_KEY`. Source: the protobuf encoding, and onnx.proto.

onnx is imported when a message of it is made, which `external_entries` does not do: it serves
before there was time to import anything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    import onnx

REFERENCE_KEY: Final = "onnxnorm:source"
INLINE_LIMIT: Final = 1024  # bytes; smaller tensors (shapes, axes, epsilons) stay in the skeleton
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
Piece: TypeAlias = "bytes | Range"


@dataclass(frozen=True)
class Range:
    """A run of bytes in one of the sources."""

    source: int
    offset: int
    length: int


def reference_of(tensor: onnx.TensorProto) -> Range | None:
    """The reference that stands for a tensor's payload, where it has one."""
    for entry in tensor.external_data:
        if entry.key == REFERENCE_KEY:
            source, offset, length = map(int, entry.value.split(":")[:3])
            return Range(source, offset, length)
    return None


def refer(tensor: onnx.TensorProto, run: Range, *, stated: bool = False) -> None:
    """Make a tensor stand for a payload; `stated` if the original says where its data are."""
    import onnx

    entry = tensor.external_data.add()
    entry.key, entry.value = REFERENCE_KEY, f"{run.source}:{run.offset}:{run.length}"
    if stated:
        entry.value += f":{_STATED}"
    tensor.data_location = onnx.TensorProto.EXTERNAL


class WireError(Exception):
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
                raise WireError("a number is too long")
    except IndexError:
        raise WireError("it ends inside a number") from None


def records(data: Any, end: int, at: int = 0) -> Iterator[tuple[int, int, int, int]]:
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
            raise WireError(f"unknown wire type {wire}")
        if at > end:
            raise WireError(f"a field says it ends at byte {at}, the data end at byte {end}")
        yield tag >> 3 if wire == 2 else -(tag >> 3), start, value, at


def encode_varint(number: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _header(number: int, length: int) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(length)


def strip(view: memoryview, kind: str, base: int, stripped: list[Range], depth: int = 0) -> bytes:
    """The message at `view` without large payloads; `base` is its offset in the file.

    What is left out is added to `stripped`.
    """
    import onnx

    if depth > _DEPTH_LIMIT:
        raise WireError(f"it nests more than {_DEPTH_LIMIT} levels deep")
    children = _CHILDREN[kind]
    out: list[bytes | memoryview] = []
    payload: Range | None = None
    raw: list[int] = []
    external = stated = False
    for number, start, value, end in records(view, len(view)):
        if kind == "tensor":
            if number == _RAW_DATA:
                # Of several the last one counts, as for every field that occurs once.
                large = end - value >= INLINE_LIMIT
                payload = Range(0, base + value, end - value) if large else None
                raw.append(len(out))
            elif number == -_DATA_LOCATION:
                stated = True
                external = external or _varint(view, value)[0] != 0
            external = external or number == _EXTERNAL_DATA
        elif number in children and end - value >= INLINE_LIMIT:
            inner = strip(view[value:end], children[number], base + value, stripped, depth + 1)
            out += [_header(number, len(inner)), inner]
            continue
        out.append(view[start:end])
    if payload is not None:
        if external:
            raise WireError("a tensor has its data both inside and outside the file")
        for at in raw:
            out[at] = b""
        reference = onnx.TensorProto()
        refer(reference, payload, stated=stated)
        out.append(reference.SerializeToString())
        stripped.append(payload)
    return b"".join(out)


def splice(skeleton: bytes) -> Iterator[Piece]:
    """The file that a skeleton stands for: bytes of ours, and runs of bytes of the sources."""
    import onnx

    marks: list[int] = []
    key = REFERENCE_KEY.encode()
    at = skeleton.find(key)
    while at >= 0:
        marks.append(at)
        at = skeleton.find(key, at + 1)

    def marked(start: int, end: int) -> bool:
        i = bisect_left(marks, start)
        return i < len(marks) and marks[i] < end

    def tensor(start: int, end: int) -> list[Piece]:
        light = onnx.TensorProto.FromString(skeleton[start:end])
        reference = reference_of(light)
        if reference is None:  # the key occurs in a name or a doc string
            return [skeleton[start:end]]
        stated = any(e.value.endswith(_STATED) for e in light.external_data)
        before: list[bytes] = []
        after: list[bytes] = []
        target = before
        for number, record, _, stop in records(skeleton, end, start):
            if abs(number) > _RAW_DATA:
                target = after  # and so for unknown fields, which come last whatever their number
            if abs(number) not in (_EXTERNAL_DATA, _DATA_LOCATION):
                target.append(skeleton[record:stop])
            elif number == -_DATA_LOCATION and stated:
                target.append(encode_varint(_DATA_LOCATION << 3) + b"\0")
        head = b"".join(before) + _header(_RAW_DATA, reference.length)
        return [head, reference, b"".join(after)]

    def message(start: int, end: int, kind: str) -> list[Piece]:
        if not marked(start, end):
            return [skeleton[start:end]]
        if kind == "tensor":
            return tensor(start, end)
        out: list[Piece] = []
        for number, record, value, stop in records(skeleton, end, start):
            child = _CHILDREN[kind].get(number)
            if child is None or not marked(value, stop):
                out.append(skeleton[record:stop])
                continue
            inner = message(value, stop, child)
            out += [_header(number, length_of(inner)), *inner]
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


def external_entries(model: bytes) -> Iterator[dict[str, str]]:
    """What a model file says of each tensor that it keeps elsewhere: location, offset, length.

    Raises:
        WireError: It does not follow the protobuf encoding.
        ValueError: An entry is not text.
    """
    pending = [("model", memoryview(model))]
    while pending:
        kind, view = pending.pop()
        entries: dict[str, str] = {}
        for number, _, value, end in records(view, len(view)):
            child = _CHILDREN[kind].get(number)
            if child is not None:
                pending.append((child, view[value:end]))
            elif kind == "tensor" and number == _EXTERNAL_DATA:
                pair = {n: bytes(view[v:e]) for n, _, v, e in records(view, end, value)}
                entries[pair.get(1, b"").decode()] = pair.get(2, b"").decode()
        if entries:
            yield entries


def length_of(pieces: Iterable[Piece]) -> int:
    """Bytes of a file in pieces."""
    return sum(len(p) if isinstance(p, bytes) else p.length for p in pieces)
