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
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxnorm import copying, staging, storage
from onnxnorm.copying import HeadStart
from onnxnorm.errors import ModelError, OutputError
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored
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


# ** where weights lie in a data file **


PAGE: Final = 4096


def pages(value: int, count: int = 1) -> NDArray[Any]:
    return np.full((count, PAGE // 4), value, np.float32)


# In one file, one after the other: pages 0, 1 to 40, 41 and 42, 43 to 82, and 83.
GIVEN: Final = {"a": pages(1), "b": pages(2, 40), "c": pages(3, 2), "d": pages(4, 40)} | {
    "e": pages(5)
}


def edited(stored: Stored, keep: str, new: dict[str, NDArray[Any]]) -> Stored:
    """The model as a pass leaves it: without some of its weights, others behind them."""
    kept = [t for t in stored.proto.graph.initializer if t.name in keep]
    added = [stored.keep(name, array) for name, array in new.items()]
    proto = copies(new | {t.name: GIVEN[t.name] for t in kept})
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, *added])
    return stored.with_proto(proto)


def offsets(path: Path) -> dict[str, int]:
    tensors = storage.load(path).proto.graph.initializer
    return {t.name: int(e.value) for t in tensors for e in t.external_data if e.key == "offset"}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("keep", "new", "places", "size"),
    [
        # what replaces a weight goes where that one was
        ("abde", {"n": pages(9, 2)}, {"a": 0, "b": 1, "d": 43, "e": 83, "n": 41}, 84),
        ("bd", {"n": pages(9), "m": pages(8, 2)}, {"b": 1, "d": 43, "n": 0, "m": 41}, 83),
        # two share the place of one, and the rest of a place is empty
        ("abd", {"n": pages(9)[:, :300], "m": pages(8)}, {"a": 0, "m": 41, "n": 42}, 83),
        # the large one goes where it fits, and the small one that came first does not take that
        ("abde", {"n": pages(9), "m": pages(8, 2)}, {"d": 43, "m": 41, "n": 84}, 85),
        ("abd", {"n": pages(9)}, {"a": 0, "b": 1, "d": 43, "n": 41}, 83),
        ("bcde", {}, {"b": 1, "c": 41, "d": 43, "e": 83}, 84),
        # what fits nowhere goes behind, and what is left out there leaves nothing
        ("abcd", {"n": pages(9, 3)}, {"a": 0, "d": 43, "n": 83}, 86),
        ("abcd", {}, {"a": 0, "b": 1, "c": 41, "d": 43}, 83),
        # too much would be empty
        ("ad", {"n": pages(9)}, {"a": 0, "d": 1, "n": 41}, 42),
        ("", {"n": pages(9)}, {"n": 0}, 1),
    ],
)
def test_weights_that_stay_keep_their_place(
    tmp_path: Path,
    keep: str,
    new: dict[str, NDArray[Any]],
    places: dict[str, int],
    size: int,
    begun: bool,
) -> None:
    model = externalize(copies(GIVEN), tmp_path, dict.fromkeys(GIVEN, Place("weights")))
    stored = edited(storage.load(write(model, tmp_path / "m.onnx")), keep, new)
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    ahead = HeadStart(tmp_path / "weights", target) if begun else None
    files = staging.save(stored, target, ahead)
    assert files == (target, target.with_name("m.onnx.data"))
    assert sorted(tree(target.parent)) == ["m.onnx", "m.onnx.data"]
    found = offsets(target)
    assert {name: found[name] for name in places} == {n: p * PAGE for n, p in places.items()}
    wanted = np.zeros(size * PAGE, np.uint8)
    for tensor in stored.proto.graph.initializer:
        array = (GIVEN | new)[tensor.name]
        at = found[tensor.name]
        wanted[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    assert files[1].read_bytes() == wanted.tobytes()
    assert_runs(target, {t.name: (GIVEN | new)[t.name] for t in stored.proto.graph.initializer})


def test_weights_that_share_their_data_still_do(tmp_path: Path) -> None:
    given = {"a": pages(1, 20), "b": pages(1, 20), "c": pages(1)}
    model = externalize(copies(given), tmp_path, {"a": Place("weights")})
    for tensor in model.graph.initializer[1:]:  # the same, and a part of it
        entries = [("location", "weights"), ("offset", "0"), ("length", str(len(tensor.raw_data)))]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in entries:
            tensor.external_data.add(key=key, value=value)
    stored = changed(storage.load(write(model, tmp_path / "m.onnx")))
    files = staging.save(stored, tmp_path / "out.onnx")
    assert offsets(files[0]) == {"a": 0, "b": 0, "c": 0}
    assert files[1].read_bytes() == (tmp_path / "weights").read_bytes()
    assert_runs(files[0], given)


@pytest.mark.parametrize("place", ["weights", "m.onnx.data", "sub/weights"])
def test_a_model_that_did_not_change_takes_up_a_copy(tmp_path: Path, place: str) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    model = externalize(copies({"w": LARGE}), source, {"w": Place(place, gap=50)})
    stored = storage.load(write(model, source / "m.onnx"))
    folder.mkdir()
    staging.save(stored, folder / "m.onnx", HeadStart(source / place, folder / "m.onnx"))
    assert tree(folder) == tree(source)


@pytest.mark.parametrize("case", ["another file", "another target", "two files", "inside"])
def test_a_copy_of_something_else_is_left_alone(tmp_path: Path, case: str) -> None:
    places = {"large": Place("w"), "other": Place("v" if case == "two files" else "w")}
    if case == "inside":
        places.clear()
    path = write(externalize(copies(WEIGHTS), tmp_path, places), tmp_path / "m.onnx")
    stored = changed(storage.load(path))
    (tmp_path / "x").write_bytes(bytes(LARGE.nbytes + OTHER.nbytes))
    staging.save(stored, tmp_path / "plain.onnx")
    before = tree(tmp_path)
    target = tmp_path / "out.onnx"
    data = tmp_path / ("x" if case in ("another file", "inside") else "w")
    ahead = HeadStart(data, target.with_name("n.onnx") if case == "another target" else target)
    staging.save(stored, target, ahead)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.replace("out", "plain") for name in after - before.keys()} <= before.keys()
    assert_arrays(storage.load(target), WEIGHTS)
    assert after.get("out.onnx.data") == before.get("plain.onnx.data")


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


@pytest.mark.parametrize("change", [True, False])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("name", "owner", "error"),
    [
        ("copy_file_range", os, NO_SPACE),
        ("replace", Path, BROKEN),
        ("replace", Path, KeyboardInterrupt()),
    ],
)
def test_an_output_stays_whole_wherever_a_copy_begun_before_fails(
    tmp_path: Path, name: str, owner: Any, error: BaseException, change: bool, existing: bool
) -> None:
    source, folder = tmp_path / "in", tmp_path / "out"
    model = externalize(copies(GIVEN), source, dict.fromkeys(GIVEN, Place("weights")))
    stored = storage.load(write(model, source / "m.onnx"))
    stored = edited(stored, "abde", {"n": pages(9, 2)}) if change else stored
    folder.mkdir()
    if existing:
        write(
            externalize(copies({"w": SMALL}), folder, {"w": Place("m.onnx.data")}),
            folder / "m.onnx",
        )
    before = tree(tmp_path)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError
    for failing in failures(owner, name, error):
        ahead = HeadStart(source / "weights", folder / "m.onnx")
        failed = refusal(partial(staging.save, stored, folder / "m.onnx", ahead), kind)
        assert (failed is not None) == (failing.left < 0)
        assert failed is None or tree(tmp_path) == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


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
        from onnxnorm import copying, staging, storage
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
    monkeypatch.setattr(copying, "_BLOCK", 1000)
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
