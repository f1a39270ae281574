"""Writing models: first beside the destination, then into place, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

import onnx

from onnxnorm.copying import DEAD_SHARE, HeadStart, HiddenFolder, copy_range, data_path
from onnxnorm.errors import ModelError, OutputError, writing
from onnxnorm.storage import PROTOBUF_LIMIT, File, Memory, Stored, load, tensors
from onnxnorm.wire import INLINE_LIMIT, Piece, Range, length_of, splice

_ALIGNMENT: Final = 4096  # of large tensors in a data file, so that a page never holds two of them
_ZEROS: Final = bytes(1 << 20)


class Staged:
    """A model written to a hidden folder beside its destination, not yet in place.

    Use it as a context manager: `commit()` moves the files to their places by renaming them, and
    leaving the context removes whatever was not moved. Until `commit` nothing at the destination
    has changed.

    Args:
        stored: The model to write.
        target: Where it will go; None for a temporary folder.
        ahead: A copy of the model's data file, begun for this target. It is used where it fits,
            and gone afterwards in any case.

    Attributes:
        model: The staged .onnx file, with its data files beside it; it can be run.
    """

    def __init__(self, stored: Stored, target: Path | None, ahead: HeadStart | None = None) -> None:
        self._target = target
        if ahead is not None and not (ahead.target == target and _is_of(ahead, stored)):
            ahead.close()
            ahead = None
        self._ahead = ahead
        self._hidden = HiddenFolder(target) if ahead is None else ahead.folder
        self._folder = self._hidden.path
        try:
            self.model = self._folder / (target.name if target else "model.onnx")
            with writing(target or self.model):
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
        if self._ahead is not None:
            self._ahead.close()
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
        with writing(self._target):
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
        if whole and (not stored.files or self._can_keep_locations(stored)):
            self._copy_whole(stored)
            return
        skeleton = stored.proto.SerializeToString()
        pieces = list(splice(skeleton))
        if stored.files or length_of(pieces) > PROTOBUF_LIMIT:
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
        if any(".." in Path(p).parts for p in stored.files):
            return False  # the folder that such a way goes through may be missing there
        taken = [p for p in stored.files if (self._target.parent / p).exists()]
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
        files: list[tuple[File | Memory, Path]] = [(stored.sources[0], self.model)]
        for location, file in stored.files.items():
            files.append((file, self._folder / location))
        for source, place in files:
            assert isinstance(source, File)
            place.parent.mkdir(parents=True, exist_ok=True)
            if self._ahead is not None and self._ahead.is_of(source.descriptor):
                self._ahead.finish().replace(place)
                continue
            with place.open("wb") as out:
                _copy(source, 0, source.size, out.fileno())

    def _write_external(self, stored: Stored) -> None:
        """Every payload of `INLINE_LIMIT` bytes or more into one data file beside the model."""
        proto = onnx.ModelProto()
        proto.CopyFrom(stored.proto)
        data = data_path(self.model)
        outside: list[tuple[onnx.TensorProto, _Payload, int]] = []
        for tensor in tensors(proto):
            piece = _payload(stored, tensor)
            if piece is None:
                continue
            size = _length(piece)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.ClearField("raw_data")
            if size == 0:
                tensor.raw_data = b""  # there is no empty range in a file that might be empty
            else:
                outside.append((tensor, piece, size))
        layout = _lay_out([piece for _, piece, _ in outside], list(stored.files.values()))
        for (tensor, _, size), at in zip(outside, layout.places, strict=True):
            for key, value in (("location", data.name), ("offset", at), ("length", size)):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
            tensor.data_location = onnx.TensorProto.EXTERNAL
        skeleton = proto.SerializeToString()
        if len(skeleton) > PROTOBUF_LIMIT:
            raise OutputError(
                "the graph alone, without its weights, is larger than 2 GB",
                "Such a model cannot be one ONNX file; split it.",
            )
        if outside:
            self._write_data(data, layout, stored)
        self.model.write_bytes(skeleton)

    def _write_data(self, data: Path, layout: _Layout, stored: Stored) -> None:
        runs = [*layout.kept, *layout.added]
        begun = False
        if self._ahead is not None:
            begun = bool(layout.kept) and self._ahead.finish() == data
            if not begun:
                self._ahead.abandon()
        with data.open("r+b" if begun else "wb") as out:
            if begun:  # the kept runs are there; what is between them goes, as if never copied
                for start, end in layout.gaps:
                    os.lseek(out.fileno(), start, os.SEEK_SET)
                    for at in range(start, end, len(_ZEROS)):
                        _emit(out.fileno(), _ZEROS[: end - at], stored)
                out.truncate(layout.kept[-1].end)
                runs = layout.added
            for run in runs:
                os.lseek(out.fileno(), run.at, os.SEEK_SET)  # over a hole, where there is one
                _emit(out.fileno(), run.piece, stored)


@dataclass
class _Run:
    """Bytes that go to one place of a data file in one go."""

    piece: _Payload
    at: int

    @property
    def end(self) -> int:
        """Where it ends in the data file."""
        return self.at + _length(self.piece)


@dataclass
class _Layout:
    """Where payloads lie in a data file.

    Payloads that follow each other in their source, with nothing or a little between them, keep
    their distance and are copied at once: one large copy is up to twice as fast as many small ones.

    Attributes:
        places: The offset of each payload.
        kept: Runs of the input's data file that stay where they are, in order.
        added: The other runs.
        gaps: What is left free before and between the kept runs, as (start, end).
    """

    places: list[int]
    kept: list[_Run] = field(default_factory=list)
    added: list[_Run] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)


def _lay_out(pieces: Sequence[_Payload], files: Sequence[File]) -> _Layout:
    kept = _in_place(pieces, files[0]) if len(files) == 1 else None
    return kept or _one_after_another(pieces)


def _in_place(pieces: Sequence[_Payload], base: File) -> _Layout | None:
    """What is kept of a data file stays at its offset; None where too much would be unused.

    New payloads go where others were left out, else behind. So a copy can be begun before anybody
    knows what will change, and file systems that share blocks between files can share these.
    """
    layout = _Layout([])
    ours = [p for p in pieces if isinstance(p, _FileRange) and p.file is base]
    for offset, length in sorted((p.offset, p.length) for p in ours):
        last = layout.kept[-1] if layout.kept else None
        if last is not None and offset - last.end < _ALIGNMENT:
            longer = max(last.end, offset + length) - last.at
            last.piece = _FileRange(base, last.at, longer)
        else:
            layout.kept.append(_Run(_FileRange(base, offset, length), offset))
    if not layout.kept:
        return None
    starts = [0, *(run.end for run in layout.kept)]
    layout.gaps = [(a, run.at) for a, run in zip(starts, layout.kept, strict=False) if a < run.at]
    free, end = list(layout.gaps), layout.kept[-1].end
    places: dict[int, int] = {}
    # The largest first: a small one in the place that a large one left would send that to the end.
    for index in sorted(range(len(pieces)), key=lambda i: -_length(pieces[i])):
        piece, size = pieces[index], _length(pieces[index])
        if isinstance(piece, _FileRange) and piece.file is base:
            places[index] = piece.offset
            continue
        for number, (start, stop) in enumerate(free):
            at = _aligned(start, size)
            if at + size <= stop:
                free[number] = (at + size, stop)
                break
        else:
            at = _aligned(end, size)
            end = at + size
        places[index] = at
        layout.added.append(_Run(piece, at))
    layout.added.sort(key=lambda run: run.at)
    layout.places += [places[index] for index in range(len(pieces))]
    unused = sum(stop - start for start, stop in free)
    return layout if unused * DEAD_SHARE <= end else None


def _one_after_another(pieces: Sequence[_Payload]) -> _Layout:
    layout, end = _Layout([]), 0
    for piece in pieces:
        last = layout.added[-1].piece if layout.added else None
        if isinstance(piece, _FileRange) and isinstance(last, _FileRange):
            gap = piece.offset - (last.offset + last.length)
            if piece.file is last.file and 0 <= gap < _ALIGNMENT:
                last.length += gap + piece.length
                layout.places.append(end + gap)
                end += gap + piece.length
                continue
        size = _length(piece)
        at = _aligned(end, size)
        if isinstance(piece, _FileRange):
            piece = _FileRange(piece.file, piece.offset, piece.length)  # it may grow
        layout.places.append(at)
        layout.added.append(_Run(piece, at))
        end = at + size
    return layout


def _aligned(at: int, size: int) -> int:
    """The first offset from `at` on where a payload of this size may begin."""
    return -(-at // _ALIGNMENT) * _ALIGNMENT if size >= _ALIGNMENT else at


@dataclass
class _FileRange:
    """A run of bytes of a file."""

    file: File
    offset: int
    length: int


_Payload: TypeAlias = "bytes | Range | _FileRange"


def _length(piece: _Payload) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.length


def _payload(stored: Stored, tensor: onnx.TensorProto) -> _Payload | None:
    """A tensor's payload, where it is outside the skeleton or large; None where it stays."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        large = tensor.HasField("raw_data") and len(tensor.raw_data) >= INLINE_LIMIT
        return tensor.raw_data if large else None
    run = stored.range_of(tensor)
    if isinstance(run, tuple):
        return _FileRange(*run)
    source = stored.sources[run.source]
    return _FileRange(source, run.offset, run.length) if isinstance(source, File) else run


def _is_of(ahead: HeadStart, stored: Stored) -> bool:
    files = list(stored.files.values())
    return len(files) == 1 and ahead.is_of(files[0].descriptor)


def _same_folder(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _emit(out: int, piece: Piece | _FileRange, stored: Stored) -> None:
    if isinstance(piece, bytes):
        view = memoryview(piece)
        while view:
            view = view[os.write(out, view) :]
        return
    if isinstance(piece, _FileRange):
        _copy(piece.file, piece.offset, piece.length, out)
        return
    source = stored.sources[piece.source]
    if isinstance(source, File):
        _copy(source, piece.offset, piece.length, out)
    else:
        _emit(out, bytes(source.view(piece.offset, piece.length)), stored)


def _copy(source: File, offset: int, length: int, out: int) -> None:
    copy_range(source.descriptor, offset, length, out, source.path)


def save(stored: Stored, path: str | Path, ahead: HeadStart | None = None) -> tuple[Path, ...]:
    """Write a model atomically; returns the files written, the model first.

    The weights stay in the model file below 2 GB and go to `<name>.data` beside it above, or
    where the input kept them in a data file.

    Raises:
        OutputError: It could not be written; nothing at `path` has changed.
    """
    with Staged(stored, Path(path), ahead) as staged:
        return staged.commit()


def check_target(target: Path) -> None:
    """Find out whether something can be written at `target`, before any work is done for it.

    Raises:
        OutputError: It is a folder, or its folder is missing or not writable.
    """
    HiddenFolder(target).remove()
