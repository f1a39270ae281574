"""Writing models: first beside the destination, then into place, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final

import onnx

from onnxnorm.errors import ModelError, OutputError, writing
from onnxnorm.storage import PROTOBUF_LIMIT, File, Memory, Stored, load, tensors
from onnxnorm.wire import INLINE_LIMIT, Piece, Range, length_of, splice

_ALIGNMENT: Final = 4096  # of large tensors in a data file, so that a page never holds two of them
_BLOCK: Final = 8 << 20  # bytes copied at a time where the kernel cannot


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
            with place.open("wb") as out:
                _copy(source, 0, source.size, out.fileno())

    def _write_external(self, stored: Stored) -> None:
        """Every payload of `INLINE_LIMIT` bytes or more into one data file beside the model."""
        proto = onnx.ModelProto()
        proto.CopyFrom(stored.proto)
        data = self.model.with_name(self.model.name + ".data")
        layout = _Layout()
        for tensor in tensors(proto):
            piece = _payload(stored, tensor)
            if piece is None:
                continue
            size = len(piece) if isinstance(piece, bytes) else piece.length
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.ClearField("raw_data")
            if size == 0:
                tensor.raw_data = b""  # there is no empty range in a file that might be empty
                continue
            at = layout.place(piece, size)
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
        if layout.runs:
            with data.open("wb") as out:
                for run in layout.runs:
                    os.lseek(out.fileno(), run.at, os.SEEK_SET)  # over a hole, where there is one
                    _emit(out.fileno(), run.piece, stored)
        self.model.write_bytes(skeleton)


@dataclass
class _Run:
    """Bytes that go to one place of a data file in one go."""

    piece: bytes | Range | _FileRange
    at: int


class _Layout:
    """Where payloads lie in a data file.

    Payloads that follow each other in their source, with nothing or a little between them, keep
    their distance and are copied at once: one large copy is up to twice as fast as many small ones.

    Attributes:
        runs: What to copy, in the order of the file.
    """

    def __init__(self) -> None:
        self.runs: list[_Run] = []
        self._end = 0

    def place(self, piece: bytes | Range | _FileRange, size: int) -> int:
        """Append a payload; returns its offset."""
        last = self.runs[-1].piece if self.runs else None
        if isinstance(piece, _FileRange) and isinstance(last, _FileRange):
            gap = piece.offset - (last.offset + last.length)
            if piece.file is last.file and 0 <= gap < _ALIGNMENT:
                last.length += gap + size
                self._end += gap + size
                return self._end - size
        at = -(-self._end // _ALIGNMENT) * _ALIGNMENT if size >= _ALIGNMENT else self._end
        if isinstance(piece, _FileRange):
            piece = _FileRange(piece.file, piece.offset, piece.length)  # it may grow
        self.runs.append(_Run(piece, at))
        self._end = at + size
        return at


@dataclass
class _FileRange:
    """A run of bytes of a file."""

    file: File
    offset: int
    length: int


def _payload(stored: Stored, tensor: onnx.TensorProto) -> bytes | Range | _FileRange | None:
    """A tensor's payload, where it is outside the skeleton or large; None where it stays."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        large = tensor.HasField("raw_data") and len(tensor.raw_data) >= INLINE_LIMIT
        return tensor.raw_data if large else None
    run = stored.range_of(tensor)
    if isinstance(run, tuple):
        return _FileRange(*run)
    source = stored.sources[run.source]
    return _FileRange(source, run.offset, run.length) if isinstance(source, File) else run


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
        with writing(target or self.path):
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
