"""Writing models: into place as a whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from onnx import helper, numpy_helper

from onnxnorm import staging, storage
from onnxnorm.errors import ModelError, OutputError
from onnxnorm.staging import Staged
from tests.layouts import (
    LARGE,
    OTHER,
    SMALL,
    WEIGHTS,
    Place,
    assert_arrays,
    assert_runs,
    changed,
    copies,
    externalize,
    refusal,
    tree,
    write,
)

# ** writing **


def test_above_the_limit_the_weights_go_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = storage.load(write(copies(WEIGHTS), tmp_path / "m.onnx"))
    monkeypatch.setattr(storage, "PROTOBUF_LIMIT", 9000)
    monkeypatch.setattr(staging, "PROTOBUF_LIMIT", 9000)
    with pytest.raises(ModelError, match="larger than 2 GB"):
        stored.complete()
    (tmp_path / "out").mkdir()
    files = staging.save(changed(stored), tmp_path / "out" / "big.onnx")
    assert [p.name for p in files] == ["big.onnx", "big.onnx.data"]
    monkeypatch.undo()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    again = storage.load(moved / "big.onnx")
    assert_arrays(again, WEIGHTS)
    outside = {t.name for t in again.proto.graph.initializer if t.data_location}
    assert outside == {"large", "other"}
    assert_runs(moved / "big.onnx", WEIGHTS)
    monkeypatch.setattr(staging, "PROTOBUF_LIMIT", 100)
    with pytest.raises(OutputError, match="the graph alone"):
        staging.save(changed(stored), tmp_path / "never.onnx")
    assert not list(tmp_path.glob("*never*"))


def test_weights_of_a_model_in_memory_may_go_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copies({"w": LARGE})
    constant = numpy_helper.from_array(OTHER)
    model.graph.node.append(helper.make_node("Constant", [], ["y_c"], value=constant))
    model.graph.output.append(helper.make_tensor_value_info("y_c", 1, OTHER.shape))
    stored = storage.from_proto(model)
    monkeypatch.setattr(staging, "PROTOBUF_LIMIT", 3000)
    staging.save(stored, tmp_path / "m.onnx")
    size = LARGE.nbytes + OTHER.nbytes
    assert size <= (tmp_path / "m.onnx.data").stat().st_size < size + 4096
    assert_runs(tmp_path / "m.onnx", {"w": LARGE, "c": OTHER})


def test_a_model_file_may_be_a_link(tmp_path: Path) -> None:
    real = write(copies(WEIGHTS), tmp_path / "real" / "m.onnx")
    link = tmp_path / "link.onnx"
    link.symlink_to(real)
    stored = storage.load(link)
    assert_arrays(stored, WEIGHTS)
    before = real.read_bytes()
    staging.save(changed(stored), link)
    assert not link.is_symlink()
    assert real.read_bytes() == before
    assert storage.load(link).proto.graph.doc_string == "changed"


def test_external_data_are_looked_for_beside_the_link(tmp_path: Path) -> None:
    model = externalize(copies({"w": LARGE}), tmp_path / "real", {"w": Place("w.bin")})
    real = write(model, tmp_path / "real" / "m.onnx")
    (tmp_path / "link.onnx").symlink_to(real)
    with pytest.raises(ModelError, match=r"w\.bin of tensor 'w' does not exist"):
        storage.load(tmp_path / "link.onnx")


def test_file_modes_stay_those_of_what_is_replaced(tmp_path: Path) -> None:
    model = externalize(copies({"w": LARGE}), tmp_path, {"w": Place("m.onnx.data")})
    path = write(model, tmp_path / "m.onnx")
    path.chmod(0o640)
    (tmp_path / "m.onnx.data").chmod(0o600)
    staging.save(changed(storage.load(path)), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "m.onnx.data").stat().st_mode) == 0o600


def test_inputs_may_be_read_only_and_outputs_are_not(tmp_path: Path) -> None:
    path = write(copies({"w": LARGE}), tmp_path / "m.onnx")
    path.chmod(0o444)
    plain = write(copies({"w": LARGE}), tmp_path / "plain.onnx")
    before = path.stat()
    staging.save(storage.load(path), tmp_path / "out.onnx")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert (tmp_path / "out.onnx").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("target", "says"),
    [("missing/m.onnx", "the folder"), (".", "it is a folder"), ("x" * 300, "too long")],
)
def test_targets_that_cannot_be_are_refused_before_any_work(
    tmp_path: Path, target: str, says: str
) -> None:
    stored = storage.from_proto(copies({"w": SMALL}))
    for attempt in (staging.check_target, lambda path: staging.save(stored, path)):
        with pytest.raises(OutputError, match=says):
            attempt(tmp_path / target)
    assert tree(tmp_path) == {}


def test_a_folder_that_one_may_not_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EACCES))
    with pytest.raises(OutputError) as caught:
        staging.check_target(tmp_path / "m.onnx")
    assert caught.value.what == f"{tmp_path / 'm.onnx'} cannot be written: Permission denied"
    assert caught.value.hint == "Write to a folder that you may write to."


def test_a_target_that_can_be_leaves_nothing_behind(tmp_path: Path) -> None:
    staging.check_target(tmp_path / ("層" * 60 + ".onnx"))
    assert tree(tmp_path) == {}


def test_a_staged_model_can_be_run_and_goes_away(tmp_path: Path) -> None:
    with Staged(storage.from_proto(copies(WEIGHTS)), tmp_path / "m.onnx") as staged:
        assert_runs(staged.model, WEIGHTS)
        assert staged.model.is_relative_to(tmp_path)
    assert tree(tmp_path) == {}
    with Staged(storage.from_proto(copies(WEIGHTS)), None) as staged:
        assert_runs(staged.model, WEIGHTS)
        with pytest.raises(ValueError, match="no place to go"):
            staged.commit()
    assert not staged.model.parent.exists()


# ** writing that fails **


class Failing:
    """The n-th call of a function raises."""

    def __init__(self, of: Callable[..., Any], number: int, error: BaseException) -> None:
        self.of, self.left, self.error = of, number, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return self.of(*args, **kwargs)

    def __get__(self, instance: Any, _: Any) -> Any:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def failures(owner: Any, name: str, error: BaseException) -> Iterator[Failing]:
    """Failures of the first call, the second, and so on, until a run needs no more calls."""
    original = getattr(owner, name)
    for number in range(100):
        failing = Failing(original, number, error)
        setattr(owner, name, failing)
        try:
            yield failing
        finally:
            setattr(owner, name, original)
        if failing.left >= 0:
            assert number > 0, f"{name} is never called"
            return


NO_SPACE: Final = OSError(errno.ENOSPC, "No space left on device")
BROKEN: Final = OSError(errno.EIO, "Input/output error")
FAILURES: Final = [
    (name, owner, error, change, existing)
    for name, owner, error, changes, before in (
        ("copy_file_range", os, NO_SPACE, (True, False), (True, False)),
        ("replace", Path, BROKEN, (True, False), (True, False)),
        ("replace", Path, KeyboardInterrupt(), (True, False), (True, False)),
        ("open", Path, OSError(errno.EMFILE, "Too many open files"), (True, False), (True, False)),
        ("mkdir", Path, NO_SPACE, (False,), (True, False)),  # only copies have subfolders
        ("copymode", shutil, BROKEN, (True, False), (True,)),
    )
    for change in changes
    for existing in before
]


@pytest.mark.parametrize(("name", "owner", "error", "change", "existing"), FAILURES)
def test_an_output_stays_whole_wherever_writing_fails(
    tmp_path: Path, name: str, owner: Any, error: BaseException, change: bool, existing: bool
) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    places = {"large": Place("m.onnx.data"), "other": Place("sub/deep/other.bin")}
    path = write(externalize(copies(WEIGHTS), source, places), source / "m.onnx")
    folder.mkdir()
    if existing:
        old = dict.fromkeys(places, SMALL)
        write(externalize(copies(old), folder, places), folder / "m.onnx")
    before = tree(tmp_path)
    stored = changed(storage.load(path)) if change else storage.load(path)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    for failing in failures(owner, name, error):
        failed = refusal(lambda: staging.save(stored, folder / "m.onnx"), kind)
        assert (failed is not None) == (failing.left < 0)
        assert failed is None or tree(tmp_path) == before
    assert_arrays(storage.load(folder / "m.onnx"), WEIGHTS)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_an_output_stays_whole_when_a_model_in_memory_cannot_be_written(tmp_path: Path) -> None:
    target = write(copies({"old": SMALL}), tmp_path / "m.onnx")
    before = tree(tmp_path)
    model = copies(WEIGHTS)
    for failing in failures(os, "write", NO_SPACE):
        failed = refusal(lambda: staging.save(storage.from_proto(model), target), OutputError)
        assert (failed is not None) == (failing.left < 0)
        assert failed is None or tree(tmp_path) == before
    assert tree(tmp_path) == {"m.onnx": model.SerializeToString()}


def test_outputs_are_replaced_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    target = write(copies({"old": SMALL}), tmp_path / "m.onnx")
    before = tree(tmp_path)
    stored = storage.from_proto(copies(WEIGHTS))
    for failing in failures(Path, "replace", BROKEN):
        failed = refusal(lambda: staging.save(stored, target), OutputError)
        assert (failed is not None) == (failing.left < 0)
        assert failed is None or tree(tmp_path) == before
    assert_arrays(storage.load(target), WEIGHTS)
    assert list(tree(tmp_path)) == ["m.onnx"]


def test_a_full_disk_leaves_the_old_output(tmp_path: Path) -> None:
    write(copies(WEIGHTS), tmp_path / "in.onnx")
    write(copies({"old": SMALL}), tmp_path / "out.onnx")
    before = tree(tmp_path)
    script = """
        import resource
        from onnxnorm import staging, storage
        from onnxnorm.errors import OutputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            staging.save(storage.load("in.onnx"), "out.onnx")
        except OutputError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "out.onnx cannot be written: File too large",
        "Raise the limit on file sizes or write to another disk.",
    ]
    assert done.stderr == ""
    assert tree(tmp_path) == before


# ** copies by the kernel, and without it **


def refuse(number: int) -> Callable[..., int]:
    def function(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    return function


def piecemeal(of: Callable[..., int], count: int) -> Callable[..., int]:
    """A kernel copy that does a little at a time, as it may, and then no more.

    Its argument number `count` says how much to copy.
    """
    calls = iter(range(3))

    def copy(*given: int) -> int:
        if next(calls, None) is None:
            raise OSError(errno.EINVAL, "Invalid argument")
        return of(*given[:count], min(100, given[count]), *given[count + 1 :])

    return copy


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    "how", ["sendfile", "write", "short writes", "piecemeal", "nothing", "neither exists"]
)
def test_copies_do_without_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, code: int
) -> None:
    path = write(copies(WEIGHTS), tmp_path / "m.onnx")
    stored = changed(storage.load(path))
    wanted = stored.complete().SerializeToString()
    if how == "piecemeal":
        monkeypatch.setattr(os, "copy_file_range", piecemeal(os.copy_file_range, 2))
        monkeypatch.setattr(os, "sendfile", piecemeal(os.sendfile, 3))
    elif how == "nothing":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
        monkeypatch.setattr(os, "sendfile", lambda *_: 0)
    elif how == "neither exists":
        monkeypatch.delattr(os, "copy_file_range")
        monkeypatch.delattr(os, "sendfile")
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse(code))
        if how != "sendfile":
            monkeypatch.setattr(os, "sendfile", refuse(errno.EINVAL))
        if how == "short writes":
            original = os.write
            monkeypatch.setattr(os, "write", lambda out, data: original(out, data[:300]))
    monkeypatch.setattr(staging, "_BLOCK", 1000)
    staging.save(stored, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == wanted


@pytest.mark.parametrize("name", ["copy_file_range", "sendfile"])
def test_a_copy_that_fails_is_not_tried_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stored = storage.load(write(copies(WEIGHTS), tmp_path / "m.onnx"))
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    monkeypatch.setattr(os, name, refuse(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left on device"):
        staging.save(stored, tmp_path / "out.onnx")


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_shrinks_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    path = write(copies(WEIGHTS), tmp_path / "m.onnx")
    stored = storage.load(path)
    os.truncate(path, 100)
    if not kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
        monkeypatch.setattr(os, "sendfile", refuse(errno.EINVAL))
    with pytest.raises(OutputError, match="became shorter while it was read"):
        staging.save(stored, tmp_path / "out.onnx")
    assert list(tree(tmp_path)) == ["m.onnx"]


def test_an_input_may_be_deleted_once_it_is_loaded(tmp_path: Path) -> None:
    path = write(copies(WEIGHTS), tmp_path / "m.onnx")
    data = path.read_bytes()
    stored = storage.load(path)
    path.unlink()
    staging.save(stored, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == data
