"""A copy that is begun before anything else: when, and that it never stays behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest

from onnxnorm import cli, copying
from onnxnorm.copying import HeadStart, head_start
from onnxnorm.errors import OutputError
from tests.layouts import EMPTY, LARGE, OTHER, SMALL, Place, copies, externalize, tree, write

HEAVY: Final = [
    "numpy",
    "onnx",
    "onnx_graphsurgeon",
    "onnxruntime",
    "rich",
    "onnxnorm.api",
    "onnxnorm.staging",
]


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_WORTH", 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with one data file, and an empty folder `out` beside its own."""
    (tmp_path / "out").mkdir()
    folder = tmp_path / "in"
    given = {"w": LARGE, "v": OTHER, "inside": SMALL, "empty": EMPTY}
    places = {"w": Place("w.bin"), "v": Place("w.bin", gap=10)}
    return write(externalize(copies(given), folder, places), folder / "m.onnx")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "m.onnx"


def test_nothing_that_takes_long_is_imported_before() -> None:
    program = f"import sys, onnxnorm.cli; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_the_only_data_file_is_copied(model: Path, target: Path) -> None:
    with head_start(model, target) as ahead:
        assert ahead is not None
        assert ahead.finish() == ahead.data == ahead.folder.path / "m.onnx.data"
        assert ahead.data.read_bytes() == (model.parent / "w.bin").read_bytes()
        assert ahead.folder.path.parent == target.parent
        assert target.parent.joinpath(ahead.data).stat().st_mode == model.stat().st_mode
    assert tree(target.parent) == {}


def spread(model: onnx.ModelProto, folder: Path) -> None:
    externalize(model, folder, {"inside": Place("other.bin")})


def outside(model: onnx.ModelProto, folder: Path) -> None:
    (folder / "w.bin").rename(folder.parent / "w.bin")
    locate(model, "../w.bin")


def absolute(model: onnx.ModelProto, folder: Path) -> None:
    locate(model, str(folder / "w.bin"))


def linked_outside(_: onnx.ModelProto, folder: Path) -> None:
    (folder / "w.bin").rename(folder.parent / "w.bin")
    (folder / "w.bin").symlink_to(folder.parent / "w.bin")


def missing(_: onnx.ModelProto, folder: Path) -> None:
    (folder / "w.bin").unlink()


def a_pipe(_: onnx.ModelProto, folder: Path) -> None:
    (folder / "w.bin").unlink()
    os.mkfifo(folder / "w.bin")


def mostly_unused(_: onnx.ModelProto, folder: Path) -> None:
    with (folder / "w.bin").open("ab") as file:
        file.write(bytes(LARGE.nbytes))


def no_number(model: onnx.ModelProto, _: Path) -> None:
    model.graph.initializer[0].external_data[1].value = "many"


def no_length(model: onnx.ModelProto, _: Path) -> None:
    del model.graph.initializer[0].external_data[2]


def no_name(model: onnx.ModelProto, _: Path) -> None:
    locate(model, "")


def nothing_outside(model: onnx.ModelProto, _: Path) -> None:
    model.CopyFrom(copies({"w": LARGE}))


def locate(model: onnx.ModelProto, location: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


@pytest.mark.parametrize(
    "change",
    [
        spread,
        outside,
        absolute,
        linked_outside,
        missing,
        a_pipe,
        mostly_unused,
        no_number,
        no_length,
        no_name,
        nothing_outside,
    ],
)
def test_where_one_file_is_not_all_nothing_is_begun(
    model: Path, target: Path, change: Callable[[onnx.ModelProto, Path], None]
) -> None:
    proto = onnx.load(model, load_external_data=False)
    change(proto, model.parent)
    write(proto, model)
    with head_start(model, target) as ahead:
        assert ahead is None
    assert tree(target.parent) == {}


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x3a\x80", b"Once upon a time"])
def test_of_no_model_nothing_is_begun(model: Path, target: Path, data: bytes) -> None:
    model.write_bytes(data)
    with head_start(model, target) as ahead:
        assert ahead is None
    model.unlink()
    for path in (model, model.parent, target):
        with head_start(path, target) as ahead:
            assert ahead is None
    assert tree(target.parent) == {}


def test_a_small_file_is_not_worth_it(
    model: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_WORTH", 1 << 20)
    with head_start(model, target) as ahead:
        assert ahead is None


def test_a_target_that_cannot_be_is_for_others_to_refuse(model: Path, target: Path) -> None:
    before = tree(model.parent)
    for place in (model, target.parent, target.parent / "missing" / "m.onnx"):
        with head_start(model, place) as ahead:
            assert ahead is None
    with pytest.raises(OutputError, match="it is a folder"):
        HeadStart(model.parent / "w.bin", target.parent)
    assert tree(model.parent) == before
    assert tree(target.parent) == {}


def test_what_goes_wrong_is_told_by_who_waits(
    model: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with head_start(model, target) as ahead:
        assert ahead is not None
        with pytest.raises(OSError, match="No space left"):
            ahead.finish()
    with head_start(model, target) as ahead:
        pass
    assert tree(target.parent) == {}


def test_it_stops_when_it_is_of_no_use(
    model: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = threading.Event()
    original = copying.copy_range

    def slowly(*given: Any) -> None:
        original(*given)
        copied.set()
        time.sleep(0.001)

    monkeypatch.setattr(copying, "copy_range", slowly)
    monkeypatch.setattr(copying, "_STEP", 1)  # thousands of them
    with head_start(model, target) as ahead:
        assert ahead is not None
        assert copied.wait(60)
        ahead.abandon()
        assert tree(target.parent) == {ahead.folder.path.name: None}
    assert tree(target.parent) == {}
    with pytest.raises(RuntimeError, match="another"), head_start(model, target):
        raise RuntimeError("another")
    assert tree(target.parent) == {}


def test_an_interruption_leaves_nothing(model: Path, target: Path) -> None:
    program = """
import sys, time
from onnxnorm import cli, copying

def slowly(*_):
    print("here", flush=True)
    time.sleep(0.1)

copying._WORTH = copying._STEP = 1
copying.copy_range = slowly
cli.main(sys.argv[1:])
"""
    options = ["--no-parity", "--no-latency", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "optimize", model, target, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    err = ""
    for _ in range(6):  # Python drops one that arrives while an object is being finalized
        process.send_signal(signal.SIGTERM)
        try:
            _, err = process.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            pass
    assert process.returncode == 130
    assert err.startswith("error: interrupted")
    assert tree(target.parent) == {}


@pytest.mark.parametrize("passes", ["fold-batchnorm", "none"])
def test_the_command_writes_the_same_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    rng = np.random.default_rng(0)
    vector, matrix = np.ones(16, np.float32), rng.standard_normal((64, 64)).astype(np.float32)
    weights = {"w": rng.standard_normal((16, 16, 3, 3)).astype(np.float32), "gamma": vector}
    weights |= {"m": np.tile(matrix, (8, 1))}
    program = """
        <ir_version: 8, opset_import: ["" : 17]>
        main (float[N,16,8,8] x, float[N,512] z) => (float[N,16,6,6] y, float[N,64] q)
        { c = Conv (x, w) y = BatchNormalization (c, gamma, gamma, gamma, gamma) q = MatMul (z, m) }
    """
    proto = onnx.parser.parse_model(program)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    source = tmp_path / "in" / "m.onnx"
    write(externalize(proto, source.parent, dict.fromkeys(weights, Place("weights"))), source)
    taken: list[HeadStart] = []
    finish = HeadStart.finish

    def noted(ahead: HeadStart) -> Path:
        taken.append(ahead)
        return finish(ahead)

    monkeypatch.setattr(HeadStart, "finish", noted)
    options = ["--no-parity", "--no-latency", "--quiet", "--passes", passes]
    for name, worth in (("with", 1), ("without", 1 << 30)):
        monkeypatch.setattr(copying, "_WORTH", worth)
        (tmp_path / name).mkdir()
        with pytest.raises(SystemExit) as ended:
            cli.main(["optimize", str(source), str(tmp_path / name / "o.onnx"), *options])
        assert ended.value.code == 0
        assert len(taken) == 1
    assert tree(tmp_path / "with") == tree(tmp_path / "without")
    changed = (tmp_path / "with" / "o.onnx").read_bytes() != source.read_bytes()
    assert changed == (passes != "none")
