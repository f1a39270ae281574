"""Whatever is wrong: exit code 2 (or 1), two lines, no traceback, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper, parser

from onnxnorm import cli, registry
from onnxnorm.wire import INLINE_LIMIT

HEAD: Final = '<ir_version: 8, opset_import: ["" : 17]>'
SMALL: Final = f"""{HEAD}
main (float[N,2,3,3] x) => (float[N,2,3,3] y)
<float[2,2,1,1] w = {{2.0, -1.0, 0.5, 1.0}}, float[2] gamma = {{1.0, 3.0}},
 float[2] beta = {{2.0, 0.5}}, float[2] mean = {{1.0, 0.25}}, float[2] variance = {{0.5, 0.01}}>
{{
   [conv] c = Conv (x, w)
   [norm] y = BatchNormalization (c, gamma, beta, mean, variance)
}}
"""
CHANNELS: Final = 40
BLIND: Final = ("--no-parity", "--no-latency")
CPU: Final = ("--provider", "cpu", "--no-latency")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Bench:
    """Folders of their own for what goes in, what comes out, and temporary files."""

    root: Path
    capture: pytest.CaptureFixture[str]

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    @property
    def out(self) -> Path:
        return self.root / "out" / "out.onnx"

    def listing(self) -> list[str]:
        """Every path under this bench."""
        return sorted(str(p.relative_to(self.root)) for p in self.root.rglob("*"))

    def write(self, model: onnx.ModelProto, name: str = "model.onnx") -> Path:
        path = self.models / name
        path.write_bytes(model.SerializeToString())
        return path

    def command(self, *arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = self.capture.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, out, err)

    def fails(self, *arguments: str | Path, code: int = 2, left: tuple[str, ...] = ()) -> str:
        """Run a command that must fail cleanly; returns its two lines."""
        before = self.listing()
        done = self.command(*arguments)
        assert done.code == code, done
        check_lines(done.out, done.err)
        assert sorted({*before, *left}) == self.listing()
        return done.err

    def refuses(self, model: Path, *words: str) -> None:
        """Assert that every command refuses a model, with these words in its first line."""
        for arguments in (
            ("optimize", model, self.out, *CPU),
            ("optimize", model, self.out, *BLIND),
            ("optimize", model, "--dry-run"),
            ("inspect", model, "--json"),
            ("compare", model, model, *CPU),
        ):
            first, _ = self.fails(*arguments).splitlines()
            for word in words:
                assert word in first

    def passes_through(self, model: Path) -> None:
        """Assert that a model is legal, and comes out as it went in."""
        done = self.command("optimize", model, self.out, *CPU)
        assert (done.code, done.err) == (0, ""), done
        assert self.out.read_bytes() == model.read_bytes()
        assert self.command("inspect", model).code == 0
        assert list(self.scratch.iterdir()) == []


def check_lines(out: str, err: str) -> None:
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert all(len(line) > 10 for line in lines)
    assert "Traceback" not in err
    assert "defect" not in err


@pytest.fixture
def place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    for name in ("models", "out", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path / "models")
    yield Bench(tmp_path, capfd)
    assert list((tmp_path / "scratch").iterdir()) == []


def small() -> onnx.ModelProto:
    return parser.parse_model(SMALL)


def large() -> onnx.ModelProto:
    """The same with weights that are not kept in the graph when it is read."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(
        f"{HEAD} main (float[N,{CHANNELS},3,3] x) => (float[N,{CHANNELS},3,3] y)"
        "{ c = Conv (x, w) y = BatchNormalization (c, gamma, gamma, gamma, gamma) }"
    )
    for name, shape in (("w", (CHANNELS, CHANNELS, 1, 1)), ("gamma", (CHANNELS,))):
        array = rng.uniform(0.5, 2, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    assert len(model.graph.initializer[0].raw_data) >= INLINE_LIMIT
    return model


def external(tensor: TensorProto, location: str, **fields: object) -> bytes:
    """Move a tensor's data out; returns them."""
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **fields}.items():
        tensor.external_data.add(key=key, value=str(value))
    return data


# ** no model at all **


def test_a_path_that_does_not_exist(place: Bench) -> None:
    place.refuses(place.models / "missing.onnx", "missing.onnx does not exist")
    place.refuses(place.models / "no" / "model.onnx", "does not exist")


def test_a_path_through_a_file(place: Bench) -> None:
    place.refuses(place.write(small()) / "model.onnx", "model.onnx")


def test_a_folder(place: Bench) -> None:
    place.refuses(place.models, "is a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe(place: Bench) -> None:
    path = place.models / "pipe.onnx"
    os.mkfifo(path)
    place.refuses(path, "is not a regular file")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device(place: Bench) -> None:
    place.refuses(Path("/dev/zero"), "is not a regular file")


def test_a_link_to_itself(place: Bench) -> None:
    path = place.models / "model.onnx"
    path.symlink_to(path)
    place.refuses(path, "model.onnx")


def test_a_name_that_is_too_long(place: Bench) -> None:
    place.refuses(place.models / ("x" * 5000), "too long")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"Once upon a time there was a model.\n" * 40, "is not an ONNX model"),
        (b"PK\x03\x04" + bytes(200), "is not an ONNX model"),
        (bytes(range(256)) * 9, "is not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is not an ONNX model"),
        (bytes(2000), "is not an ONNX model"),
        (b"\x08", "is not an ONNX model"),
        (b"\x08\x08", "is not an ONNX model"),
        (b"\xff" * 100, "is not an ONNX model"),
        (b"\x3a" + b"\x80" * 11 + b"\x01", "is not an ONNX model"),
    ],
)
def test_a_file_that_is_no_model(place: Bench, content: bytes, word: str) -> None:
    path = place.models / "model.onnx"
    path.write_bytes(content)
    place.refuses(path, word)


def test_another_message(place: Bench) -> None:
    path = place.models / "tensor.pb"
    tensor = numpy_helper.from_array(np.arange(3000, dtype=np.float32), "t")
    path.write_bytes(tensor.SerializeToString())
    place.refuses(path, "ONNX model")
    path.write_bytes(small().graph.SerializeToString())
    place.refuses(path, "ONNX model")


@pytest.mark.parametrize("make", [small, large])
def test_a_truncated_model(place: Bench, make: Callable[[], onnx.ModelProto]) -> None:
    data = make().SerializeToString()
    path = place.models / "model.onnx"
    for length in {*range(1, len(data), 1 + len(data) // 150), len(data) - 1}:
        path.write_bytes(data[:length])
        place.fails("optimize", path, place.out, *BLIND)
    path.write_bytes(data[: len(data) // 2])
    place.refuses(path, "model.onnx")


def test_a_graph_that_is_missing(place: Bench) -> None:
    model = small()
    model.ClearField("graph")
    place.refuses(place.write(model), "no graph")


# ** external data **


@pytest.fixture
def data(place: Bench) -> tuple[onnx.ModelProto, bytes]:
    """A model whose weight lies in `w.bin` beside it."""
    model = large()
    return model, external(model.graph.initializer[0], "w.bin")


Split = tuple[onnx.ModelProto, bytes]


def set_entry(model: onnx.ModelProto, key: str, value: str) -> None:
    entries = model.graph.initializer[0].external_data
    for entry in entries:
        if entry.key == key:
            entry.value = value
            return
    entries.add(key=key, value=value)


def test_external_data_are_legal(place: Bench, data: Split) -> None:
    model, payload = data
    (place.models / "w.bin").write_bytes(payload)
    path = place.write(model)
    done = place.command("optimize", path, place.out, *CPU)
    assert (done.code, done.err) == (0, "")
    onnx.checker.check_model(str(place.out), full_check=True)
    alias = place.root / "alias"
    alias.symlink_to(place.models)  # a link on the way to the model leads nowhere else
    assert place.command("inspect", alias / "model.onnx").code == 0


def test_missing_external_data(place: Bench, data: Split) -> None:
    place.refuses(place.write(data[0]), "w.bin", "does not exist")
    (place.models / "w.bin").mkdir()
    place.refuses(place.write(data[0]), "w.bin")


@pytest.mark.parametrize("missing", [1, 100, None])
def test_short_external_data(place: Bench, data: Split, missing: int | None) -> None:
    model, payload = data
    (place.models / "w.bin").write_bytes(payload[: -missing if missing else 0])
    place.refuses(place.write(model), "too short", "'w'")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("offset", "1", "too short"),
        ("offset", "-1", "'w'"),
        ("offset", "9" * 40, "'w'"),
        ("offset", "here", "malformed"),
        ("length", "3", "'w'"),
        ("length", "-1", "'w'"),
        ("length", "9" * 40, "'w'"),
        ("length", "all", "malformed"),
        ("location", "", "'w'"),
        ("location", "a\0b", "'w'"),
        ("location", ".", "'w'"),
        ("location", "x" * 5000, "too long"),
        ("location", "w.bin/w.bin", "'w'"),
    ],
)
def test_wrong_external_data(place: Bench, data: Split, key: str, value: str, word: str) -> None:
    model, payload = data
    (place.models / "w.bin").write_bytes(payload)
    set_entry(model, key, value)
    place.refuses(place.write(model), word)


def test_external_data_without_a_location(place: Bench, data: Split) -> None:
    model, _ = data
    del model.graph.initializer[0].external_data[:]
    place.refuses(place.write(model), "without a location")


def test_external_data_that_are_a_pipe(place: Bench, data: Split) -> None:
    os.mkfifo(place.models / "w.bin")
    place.refuses(place.write(data[0]), "w.bin")


@pytest.mark.parametrize("way", ["parent", "absolute", "round", "link", "folder", "circle"])
def test_external_data_outside_the_folder(place: Bench, data: Split, way: str) -> None:
    model, payload = data
    elsewhere = place.root / "elsewhere"
    elsewhere.mkdir()
    secret = elsewhere / "w.bin"
    secret.write_bytes(payload)
    if way == "link":
        (place.models / "w.bin").symlink_to(secret)
    if way == "folder":
        (place.models / "sub").symlink_to(elsewhere)
    if way == "circle":
        (place.models / "w.bin").symlink_to(place.models / "w.bin")
    location = {
        "parent": "../elsewhere/w.bin",
        "absolute": str(secret),
        "round": "./../models/../elsewhere/w.bin",
        "link": "w.bin",
        "folder": "sub/w.bin",
        "circle": "w.bin",
    }[way]
    set_entry(model, "location", location)
    place.refuses(place.write(model), "outside the model's folder")


def test_external_data_beside_the_file_that_a_link_leads_to(place: Bench, data: Split) -> None:
    # a download cache: names are links into a folder of contents
    model, payload = data
    blobs = place.root / "blobs"
    blobs.mkdir()
    place.write(model).rename(blobs / "0a")
    (blobs / "1b").write_bytes(payload)
    link = place.models / "model.onnx"
    link.symlink_to(blobs / "0a")
    (place.models / "w.bin").symlink_to(blobs / "1b")
    done = place.command("optimize", link, place.out, *CPU)
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in blobs.iterdir()) == ["0a", "1b"]
    (place.models / "w.bin").unlink()
    (place.models / "w.bin").symlink_to(place.root / "w.bin")
    (place.root / "w.bin").write_bytes(payload)
    place.refuses(link, "outside the model's folder")


def test_external_data_of_a_tensor_in_an_attribute(place: Bench) -> None:
    model = parser.parse_model(
        f"{HEAD} main (float[2] x) => (float[2] y)"
        "{ c = Constant <value = float[2] {1.0, 2.0}> () y = Add (x, c) }"
    )
    external(model.graph.node[0].attribute[0].t, "../w.bin")
    (place.root / "w.bin").write_bytes(bytes(8))
    place.refuses(place.write(model), "outside the model's folder")


# ** graphs that are none **

CYCLES: Final = {
    "two nodes": "main (float[2] x) => (float[2] y) { y = Add (x, z) z = Relu (y) }",
    "one node": "main (float[2] x) => (float[2] y) { y = Add (x, y) }",
    "through a body": (
        "main (bool c, float[2] x) => (float[2] y) {"
        " y = If (c) <then_branch = t () => (float[2] a) { a = Relu (z) },"
        " else_branch = e () => (float[2] b) { b = Relu (x) }> z = Relu (y) }"
    ),
    "a body reads its own result": (
        "main (bool c, float[2] x) => (float[2] y) {"
        " y = If (c) <then_branch = t () => (float[2] a) { a = Relu (y) },"
        " else_branch = e () => (float[2] b) { b = Relu (x) }> }"
    ),
    "in a body": (
        "main (bool c, float[2] x) => (float[2] y) {"
        " y = If (c) <then_branch = t () => (float[2] a) { a = Add (x, b) b = Relu (a) },"
        " else_branch = e () => (float[2] b) { b = Relu (x) }> }"
    ),
    "beside the outputs": (
        "main (float[2] x) => (float[2] y) { y = Relu (x) p = Add (x, q) q = Relu (p) }"
    ),
}


@pytest.mark.parametrize("which", CYCLES)
def test_a_cycle(place: Bench, which: str) -> None:
    place.refuses(place.write(parser.parse_model(HEAD + CYCLES[which])), "cycle")


def test_a_cycle_in_a_function(place: Bench) -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'
        "main (float[2] x) => (float[2] y) { y = local.f (x) }"
        '<domain: "local", opset_import: ["" : 17]> f (x) => (y) { y = Add (x, y) }'
    )
    place.refuses(place.write(model), "cycle")


def edit(change: Callable[[onnx.GraphProto], object]) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        model = small()
        change(model.graph)
        return model

    return make


def twice(field: str) -> Callable[[onnx.GraphProto], object]:
    return lambda graph: getattr(graph, field).append(getattr(graph, field)[0])


def shaped(dims: list[int], **fields: Any) -> Callable[[onnx.GraphProto], object]:
    def change(graph: onnx.GraphProto) -> None:
        tensor = graph.initializer[0]
        tensor.CopyFrom(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims))
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)

    return change


def sparse(indices: list[Any], dims: list[int]) -> Callable[[onnx.GraphProto], object]:
    def change(graph: onnx.GraphProto) -> None:
        weight = graph.sparse_initializer.add(dims=dims)
        weight.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), "sparse"))
        weight.indices.CopyFrom(numpy_helper.from_array(np.array(indices), "indices"))

    return change


def node(graph: onnx.GraphProto, name: str, value: object) -> None:
    graph.node[0].attribute.append(onnx.helper.make_attribute(name, value))


BROKEN: Final[dict[str, tuple[Callable[[onnx.GraphProto], object], str]]] = {
    "two values of one name": (lambda g: g.node[0].output.__setitem__(0, "y"), "'y'"),
    "a value named as the input": (lambda g: g.node[0].output.__setitem__(0, "x"), "'x'"),
    "a value named as a weight": (lambda g: g.node[0].output.__setitem__(0, "w"), "'w'"),
    "a node twice": (twice("node"), "'c'"),
    "an initializer twice": (twice("initializer"), "'w'"),
    "an input twice": (twice("input"), "'x'"),
    "a dangling input": (lambda g: g.node[0].input.__setitem__(0, "nobody"), "'nobody'"),
    "a dangling weight": (lambda g: g.initializer.pop(0), "'w'"),
    "a dangling output": (lambda g: g.output.add(name="nobody"), "'nobody'"),
    "an output without a name": (lambda g: g.output.add(), "''"),
    "an output read before a node makes it": (lambda g: g.node.pop(), "'y'"),
    "a domain that is not imported": (
        lambda g: setattr(g.node[0], "domain", "elsewhere"),
        "'elsewhere', which the model does not import",
    ),
    "a negative dimension": (shaped([2, -2, 1, 1], float_data=[1.0] * 4), "negative dimension"),
    "a weight with too few values": (shaped([2, 2, 1, 1], float_data=[1.0] * 3), "'w'"),
    "a weight with too many values": (shaped([2, 2, 1, 1], float_data=[1.0] * 5), "'w'"),
    "a weight with too few bytes": (shaped([2, 2, 1, 1], raw_data=bytes(15)), "'w'"),
    "a weight with too many bytes": (shaped([2, 2, 1, 1], raw_data=bytes(17)), "'w'"),
    "a weight with far too many bytes": (shaped([2, 2, 1, 1], raw_data=bytes(5000)), "'w'"),
    "a large weight with too few bytes": (shaped([2, 9999, 1, 1], raw_data=bytes(5000)), "'w'"),
    "a weight without values": (shaped([2, 2, 1, 1]), "'w'"),
    "a weight of an absurd size": (shaped([2**40, 2**40, 1, 1], raw_data=bytes(16)), "'w'"),
    "values in the wrong field": (shaped([2, 2, 1, 1], int64_data=[1, 2, 3, 4]), "'w'"),
    "an unknown element type": (
        lambda g: setattr(g.initializer[0], "data_type", 99),
        "unknown element type",
    ),
    "no element type": (
        lambda g: setattr(g.initializer[0], "data_type", 0),
        "unknown element type",
    ),
    "an attribute of another kind": (lambda g: node(g, "group", [1, 2]), "'group'"),
    "an attribute of bytes": (
        lambda g: g.node[1].attribute.append(onnx.helper.make_attribute("epsilon", b"\xff")),
        "'epsilon'",
    ),
    "an attribute twice": (
        lambda g: g.node[1].attribute.extend([onnx.helper.make_attribute("epsilon", 1.0)] * 2),
        "'epsilon' twice",
    ),
    "a sparse weight outside its shape": (sparse([0, 4], [2, 2]), "outside its shape"),
    "a sparse weight before its shape": (sparse([-1, 0], [2, 2]), "outside its shape"),
    "a sparse weight with too many indices": (sparse([0, 1, 2], [2, 2]), "for 2 values"),
    "a sparse weight of a negative shape": (sparse([0, 1], [2, -2]), "for 2 values"),
    "a sparse weight with wrong indices": (sparse([0.0, 1.0], [2, 2]), "not int64"),
    "a node without an output": (lambda g: g.node[1].output.pop(), "y"),
    "a node without an operator": (lambda g: g.node[1].ClearField("op_type"), "norm"),
}


@pytest.mark.parametrize("which", BROKEN)
def test_a_broken_graph(place: Bench, which: str) -> None:
    change, word = BROKEN[which]
    place.refuses(place.write(edit(change)()), word)


@pytest.mark.parametrize("version", [-3, 2**31, 2**40])
def test_an_opset_version_that_cannot_be(place: Bench, version: int) -> None:
    model = small()
    model.opset_import[0].version = version
    place.refuses(place.write(model), str(version))


def test_missing_opset_imports(place: Bench) -> None:
    model = small()
    del model.opset_import[:]
    place.refuses(place.write(model), "'ai.onnx', which the model does not import")


def test_a_name_that_is_not_text(place: Bench) -> None:
    data = small().SerializeToString().replace(b"gamma", b"gam\xff\xfe")
    path = place.models / "model.onnx"
    path.write_bytes(data)
    before = place.listing()
    done = place.command("optimize", path, place.out, *BLIND)
    if done.code == 0:  # nothing says that a name must be UTF-8 but the name itself
        onnx.load_model_from_string(place.out.read_bytes())
    else:
        assert done.code == 2
        check_lines(done.out, done.err)
        assert place.listing() == before


def test_many_faults_at_once(place: Bench) -> None:
    model = small()
    model.graph.node[0].input[0] = "nobody"
    model.graph.initializer[0].data_type = 99
    model.graph.initializer.append(model.graph.initializer[1])
    place.fails("optimize", place.write(model), place.out, *CPU)


# ** models that onnxruntime cannot run **

UNKNOWN: Final = {
    "unchanged": "main (float[2] x) => (float[2] y) { y = elsewhere.Unknown (x) }",
    "changed": SMALL.partition("\n")[2].replace(
        "[norm] y =", "z = elsewhere.Unknown (x) [norm] y ="
    ),
}
UNRUNNABLE: Final = {
    **{f"unknown operator, {k}": ('["" : 17, "elsewhere" : 1]', v) for k, v in UNKNOWN.items()},
    "no such operator": ('["" : 17]', "main (float[2] x) => (float[2] y) { y = Nope (x) }"),
    "future opset": ('["" : 9999]', "main (float[2] x) => (float[2] y) { y = Relu (x) }"),
    "wrong shapes": (
        '["" : 17]',
        "main (float[2,3] x) => (float[2,5] y) { y = MatMul (x, x) }",
    ),
}


@pytest.mark.parametrize("which", UNRUNNABLE)
def test_a_model_that_onnxruntime_cannot_run(place: Bench, which: str) -> None:
    opsets, body = UNRUNNABLE[which]
    path = place.write(parser.parse_model(f"<ir_version: 8, opset_import: {opsets}> {body}"))
    lines = place.fails("optimize", path, place.out, *CPU, code=1)
    assert "onnxruntime cannot" in lines
    assert "--no-parity" in lines
    place.fails("compare", path, path, *CPU, code=1)
    for options in (["--no-parity"], ["--no-parity", "--no-latency"]):
        done = place.command("optimize", path, place.out, "--provider", "cpu", *options)
        assert (done.code, done.err) == (0, ""), done
        assert "outputs not checked" in " ".join(done.out.split())
        changed = which == "unknown operator, changed"
        assert ("were not compared" in " ".join(done.out.split())) is changed
        assert place.out.exists()
        place.out.unlink()
    assert place.command("inspect", path).code == 0


def test_a_file_that_onnxruntime_cannot_run_is_kept(place: Bench) -> None:
    opsets, body = UNRUNNABLE["unknown operator, changed"]
    path = place.write(parser.parse_model(f"<ir_version: 8, opset_import: {opsets}> {body}"))
    place.out.write_bytes(b"mine")
    place.fails("optimize", path, place.out, *CPU, code=1)
    assert place.out.read_bytes() == b"mine"
    before = path.read_bytes()
    place.fails("optimize", path, "--in-place", *CPU, code=1)
    assert path.read_bytes() == before


def test_an_output_without_a_type(place: Bench) -> None:
    model = small()
    model.graph.output[0].ClearField("type")
    path = place.write(model)
    done = place.command("optimize", path, place.out, *CPU)
    assert done.code in (0, 1), "the operator says what its type is; the runtime may not look"
    if done.code == 1:
        check_lines(done.out, done.err)
    assert place.out.exists() is (done.code == 0)


def test_an_input_without_a_type(place: Bench) -> None:
    model = small()
    model.graph.input[0].ClearField("type")
    lines = place.command("optimize", place.write(model), place.out, *CPU)
    assert lines.code in (1, 2)
    check_lines(lines.out, lines.err)
    assert not place.out.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(place: Bench, value: float) -> None:
    model = small()
    for name in ("w", "gamma", "variance"):
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        (tensor,) = (t for t in changed.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        path = place.write(changed)
        done = place.command("optimize", path, place.out, *CPU)
        assert (done.code, done.err) == (0, ""), done
        folds = name == "variance" and value == np.inf  # 1 / sqrt(inf) is zero
        assert (place.out.read_bytes() != path.read_bytes()) is folds


def test_parameters_of_a_type_that_is_none(place: Bench) -> None:
    model = small()
    for tensor in list(model.graph.initializer)[1:]:
        array = numpy_helper.to_array(tensor).astype(np.complex64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    path = place.write(model)
    place.fails("optimize", path, place.out, *CPU, code=1)
    assert place.command("optimize", path, place.out, *BLIND).code == 0
    assert place.out.read_bytes() == path.read_bytes()


def test_an_attribute_that_the_operator_does_not_have(place: Bench) -> None:
    path = place.write(edit(lambda g: node(g, "colour", 3))())
    place.fails("optimize", path, place.out, *CPU, code=1)
    done = place.command("optimize", path, place.out, *BLIND)
    assert (done.code, done.err) in ((0, ""), (2, done.err))
    assert "defect" not in done.err


# ** what is legal **

LEGAL: Final = {
    "no nodes": "main (float[2] x) => (float[2] x) { }",
    "an output that is an initializer": (
        "main (float[2] x) => (float[2] y, float[2] w) <float[2] w = {1.0, 2.0}> { y = Relu (x) }"
    ),
    "only an initializer": "main () => (float[2] w) <float[2] w = {1.0, 2.0}> { }",
    "no inputs": "main () => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Relu (w) }",
    "an output twice": "main (float[2] x) => (float[2] y, float[2] y) { y = Relu (x) }",
    "an unused input": "main (float[2] x, float[3] z) => (float[2] y) { y = Relu (x) }",
    "scalars": "main (float x) => (float y) <float w = {2.0}> { y = Mul (x, w) }",
    "an empty batch": "main (float[0,3] x) => (float[0,3] y) { y = Relu (x) }",
    "an empty weight": (
        "main (float[N,0] x) => (float[N,2] y) <float[0,2] w = {}> { y = MatMul (x, w) }"
    ),
    "an empty vector": (
        "main (float[2] x) => (float[2] y) <float[0] w = {}> { y = Concat <axis = 0> (x, w) }"
    ),
    "nodes in no order": "main (float[2] x) => (float[2] y) { y = Relu (z) z = Relu (x) }",
    "an empty optional input": (
        "main (float[2] x) => (float[2] y) <float w = {1.0}> { y = Clip (x, , w) }"
    ),
}


@pytest.mark.parametrize("which", LEGAL)
def test_what_is_legal_passes_through(place: Bench, which: str) -> None:
    model = parser.parse_model(HEAD + LEGAL[which])
    if which == "an output twice" or which == "nodes in no order":
        path = place.write(model)
        done = place.command("optimize", path, place.out, *BLIND)
        assert done.code == 0
        assert place.out.read_bytes() == path.read_bytes()
        return
    place.passes_through(place.write(model))


def test_nodes_in_no_order_are_optimized_and_compared(place: Bench) -> None:
    model = parser.parse_model(
        f"{HEAD} main (float[1,2,3,3] x) => (float[1,2,3,3] y)" + SMALL.partition("y)")[2]
    )
    nodes = list(reversed(model.graph.node))
    assert len(nodes) > 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = place.write(model)
    done = place.command("optimize", path, place.out, *CPU)
    assert (done.code, done.err) == (0, ""), done
    assert len(onnx.load(place.out).graph.node) == 1


def test_a_convolution_of_nothing(place: Bench) -> None:
    model = parser.parse_model(
        f"{HEAD} main (float[0,2,3,3] x) => (float[0,2,3,3] y)" + SMALL.partition("y)")[2]
    )
    path = place.write(model)
    done = place.command("optimize", path, place.out, *CPU)
    assert (done.code, done.err) == (0, ""), done
    assert len(onnx.load(place.out).graph.node) == 1


def test_a_very_long_chain_of_constants(place: Bench) -> None:
    model = small()
    name = "gamma"
    for i in range(3000):
        step = onnx.helper.make_node("Identity" if i % 2 else "Squeeze", [name], [f"g{i}"])
        model.graph.node.insert(i, step)
        name = f"g{i}"
    model.graph.node[-1].input[1] = name
    done = place.command("optimize", place.write(model), place.out, *BLIND)
    assert (done.code, done.err) == (0, ""), done.err[-400:]


def test_bodies_inside_bodies(place: Bench) -> None:
    inner = "{ b = Relu (x) }"
    for depth in range(25):
        inner = (
            f"{{ b = If (c) <then_branch = t{depth} () => (float[2] b) {inner},"
            f" else_branch = e{depth} () => (float[2] b) {{ b = Relu (x) }}> }}"
        )
    text = f"{HEAD} main (bool c, float[2] x) => (float[2] b) {inner}".replace(
        "b = Relu", "b = Abs"
    )
    path = place.write(parser.parse_model(text))
    done = place.command("optimize", path, place.out, *BLIND)
    assert done.code in (0, 2)
    if done.code:
        check_lines(done.out, done.err)


# ** where it should go **


@pytest.fixture
def good(place: Bench) -> Path:
    return place.write(small())


@pytest.mark.parametrize("options", [CPU, BLIND])
def test_an_output_that_cannot_be(place: Bench, good: Path, options: tuple[str, ...]) -> None:
    taken = place.root / "out" / "file"
    taken.write_bytes(b"mine")
    for target, word in (
        (place.root / "missing" / "out.onnx", "does not exist"),
        (place.root / "out", "folder"),
        (place.root, "folder"),
        (taken / "out.onnx", "does not exist"),
        (place.root / "out" / ("x" * 300), "too long"),
        (Path("/proc/out.onnx"), "/proc/out.onnx"),
    ):
        assert word in place.fails("optimize", good, target, *options)
    assert taken.read_bytes() == b"mine"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null")
def test_an_output_that_is_a_device(place: Bench, good: Path) -> None:
    link = place.root / "out" / "null"
    link.symlink_to("/dev/null")
    os.mkfifo(place.root / "out" / "pipe")
    for target in (link, place.root / "out" / "pipe"):
        assert "not a regular file" in place.fails("optimize", good, target, *BLIND)
    assert link.is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(place: Bench, good: Path) -> None:
    (place.root / "out").chmod(0o500)
    try:
        assert "ermission" in place.fails("optimize", good, place.out, *CPU)
    finally:
        (place.root / "out").chmod(0o700)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_the_system_guards(
    place: Bench, good: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = Path.mkdir

    def guarded(path: Path, *rest: Any, **fields: Any) -> None:
        if path.parent == place.out.parent:
            raise OSError(number, os.strerror(number), str(path))
        real(path, *rest, **fields)

    monkeypatch.setattr(Path, "mkdir", guarded)  # not os.mkdir, which 3.10 looked up at import
    lines = place.fails("optimize", good, place.out, *CPU)
    assert os.strerror(number) in lines
    assert "Write to a folder that you may write to." in lines


@pytest.mark.parametrize("make", [small, large])
@pytest.mark.parametrize("options", [CPU, BLIND, (*BLIND, "--passes", "none")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full(
    place: Bench,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], onnx.ModelProto],
    options: tuple[str, ...],
    number: int,
) -> None:
    path = place.write(make())
    place.out.write_bytes(b"mine")
    registry.catalogue()  # imports compile to disk, which is full from here on

    def full(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    for call in ("write", "copy_file_range", "sendfile", "pwrite"):
        monkeypatch.setattr(os, call, full, raising=False)
    lines = place.fails("optimize", path, place.out, *options)
    assert os.strerror(number) in lines
    assert place.out.read_bytes() == b"mine"


@pytest.mark.parametrize("options", [CPU, BLIND])
def test_a_file_size_limit(place: Bench, options: tuple[str, ...]) -> None:
    path = place.write(large())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    before = place.listing()
    done = subprocess.run(
        [sys.executable, "-B", "-m", "onnxnorm", "optimize", path, place.out, *options],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 2
    check_lines(done.stdout, done.stderr)
    assert place.listing() == before


def test_a_move_that_fails(place: Bench, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.out.write_bytes(b"mine")

    def fail(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, fail)
        monkeypatch.setattr(Path, name, fail)  # in 3.10 it looked os.rename up at import
    place.fails("optimize", good, place.out, *BLIND)
    assert place.out.read_bytes() == b"mine"


def test_no_place_for_temporary_files(
    place: Bench, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place.write(large(), "large.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place.root / "nowhere"))
        done = place.command("optimize", good, place.out, *BLIND)
        assert (done.code, done.err) == (0, "")
        place.out.unlink()
        assert "nowhere" in place.fails("optimize", path, place.out, *BLIND)


# ** options that do not fit the model, or anything **


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--input-shape", "nobody:1,2"], "'nobody', which is no input"),
        (["--input-shape", "x:1,2"], "2 axes"),
        (["--input-shape", "x:1,7,3,3"], "declares"),
        (["--input-shape", "x:1,2,3,3.5"], "is not name:"),
        (["--inputs", "missing.npz"], "no such file"),
        (["--inputs", "text.npz"], "is no .npz file"),
        (["--inputs", "array.npy"], "is no .npz file"),
        (["--inputs", "."], "is no .npz file"),
        (["--inputs", "cut.npz"], "is no .npz file"),
        (["--inputs", "wrong.npz"], "'z', which is no input"),
        (["--inputs", "empty.npz"], "no array for input 'x'"),
        (["--inputs", "shape.npz"], "has shape [2]"),
        (["--inputs", "type.npz"], "has dtype"),
        (["--inputs", "pickle.npz"], "is no .npz file"),
        (["--passes", "nope"], "there is no pass 'nope'"),
        (["--only", "nope"], "'nope', which is no site"),
        (["--skip", "fold-batchnorm:nope"], "which is no site"),
        (["--report", "r.pdf"], "the suffix .pdf"),
        (["--ablation", "nope"], "'nope', which is no pass"),
        (["--report", "r"], "no suffix"),
        (["--report", "missing/r.json"], "does not exist"),
        (["--report", "model.onnx/r.json"], "does not exist"),
        (["--report", "folder.json"], "folder"),
        (["--report", "/proc/r.json"], "/proc/r.json"),
    ],
)
def test_wrong_options(place: Bench, good: Path, options: list[str], word: str) -> None:
    x = np.ones((1, 2, 3, 3), np.float32)
    (place.models / "text.npz").write_text("no archive")
    (place.models / "folder.json").mkdir()
    np.save(place.models / "array.npy", x)
    np.savez(place.models / "wrong.npz", x=x, z=x)
    np.savez(place.models / "empty.npz")
    np.savez(place.models / "shape.npz", x=np.ones(2, np.float32))
    np.savez(place.models / "type.npz", x=np.full(x.shape, "a"))
    np.savez(place.models / "pickle.npz", x=np.array([{}], dtype=object))
    archive = (place.models / "wrong.npz").read_bytes()
    (place.models / "cut.npz").write_bytes(archive[: len(archive) // 2])
    assert word in place.fails("optimize", good, place.out, *CPU, *options)


def test_damage_inside_the_users_inputs(place: Bench, good: Path) -> None:
    file = place.models / "in.npz"
    np.savez_compressed(file, x=np.random.default_rng(0).random((4, 2, 3, 3), np.float32))
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        done = place.command("optimize", good, place.out, *CPU, "--inputs", file)
        assert done.code in (0, 2)
        if done.code == 2:
            check_lines(done.out, done.err)
            assert not place.out.exists()
        else:
            place.out.unlink()


def test_a_report_over_the_model(place: Bench, good: Path) -> None:
    model = good.rename(good.with_suffix(".json"))
    assert "would replace the model" in place.fails("inspect", model, "--report", model)
    out = place.out.with_suffix(".json")
    place.fails("optimize", model, out, "--report", out, *BLIND)


def test_a_report_on_a_disk_that_fills_up(
    place: Bench, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    place.fails("inspect", good, "--report", place.root / "out" / "r.json")
    place.fails(
        "optimize",
        good,
        place.out,
        "--report",
        place.root / "out" / "r.json",
        *BLIND,
        left=("out/out.onnx",),
    )
    onnx.checker.check_model(place.out, full_check=True)  # the model itself is complete


def has_cuda() -> bool:
    from onnxnorm.errors import ProviderError
    from onnxnorm.session import resolve_provider

    try:
        return resolve_provider("cuda") == "cuda"
    except ProviderError:
        return False


@pytest.mark.skipif(has_cuda(), reason="CUDA works here")
def test_a_provider_that_is_not_there(place: Bench, good: Path) -> None:
    for options in ([], ["--no-latency"], ["--no-parity"]):
        lines = place.fails("optimize", good, place.out, "--provider", "cuda", *options)
        assert "cuda" in lines.splitlines()[0].lower()
    lines = place.fails("compare", good, good, "--provider", "cuda")
    assert "cuda" in lines.splitlines()[0].lower()


# ** interruption **


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "where",
    [
        "onnxnorm.parity.ParityChecker.check",
        "onnxnorm.latency.measure",
        "onnxnorm.staging.Staged.commit",
        "onnxnorm.staging.Staged._write",
        "onnxnorm.pipeline.Pipeline.run",
    ],
)
def test_an_interruption(place: Bench, good: Path, number: int, where: str) -> None:
    script = f"""
import signal, sys, time
from unittest import mock
from onnxnorm import cli, registry

# A shell that runs the tests in the background lets them ignore Ctrl-C, which is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

def stop(*_, **__):
    print("here", flush=True)
    time.sleep(60)

with mock.patch("{where}", stop):
    cli.main(sys.argv[1:])
"""
    before = place.listing()
    options = ["--provider", "cpu", "--no-parity" if "latency" in where else "--no-latency"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "optimize", good, place.out, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    check_lines(out, err)
    assert err.startswith("error: interrupted")
    assert place.listing() == before


def test_an_interruption_while_it_really_runs(place: Bench) -> None:
    source = Path(__file__).parent.parent / "models" / "demo.onnx"
    path = Path(shutil.copy(source, place.models))
    before = place.listing()
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxnorm", "optimize", path, place.out, "--provider", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(place.out.parent.iterdir()):
        time.sleep(0.01)
    out = err = ""
    for _ in range(6):  # Python drops one that arrives while an object is being finalized
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=10)
            break
    assert process.returncode == 130
    check_lines(out, err)
    assert place.listing() == before


# ** anything at all **


def run(arguments: list[str]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as ended:
            return Outcome(int(ended.code or 0), out.getvalue(), err.getvalue())


def survives(data: bytes) -> None:
    """Assert that a model of these bytes is optimized, or refused cleanly."""
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "model.onnx", Path(folder) / "out.onnx"
        path.write_bytes(data)
        done = run(["optimize", str(path), str(target), *BLIND])
        assert done.code in (0, 2)
        if done.code == 0:
            assert done.err == ""
            assert target.exists()
            onnx.ModelProto.FromString(target.read_bytes())
        else:
            check_lines(done.out, done.err)
            assert [p.name for p in Path(folder).iterdir()] == ["model.onnx"]


SEEDS: Final = tuple(make().SerializeToString() for make in (small, large)) + tuple(
    parser.parse_model(HEAD + text).SerializeToString() for text in (*LEGAL.values(),)
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "drop", "insert", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SEEDS), EDITS)
def test_changed_bytes(seed: bytes, edits: list[tuple[str, float, float, bytes]]) -> None:
    data = bytearray(seed)
    for what, first, second, some in edits:
        at, other = int(first * len(data)), int(second * len(data))
        if not data:
            break
        if what == "set":
            data[at] = some[0]
        elif what == "flip":
            data[at] ^= 1 << (some[0] & 7)
        elif what == "drop":
            del data[at : at + some[0]]
        elif what == "insert":
            data[at:at] = some
        else:
            data[at : at + len(some)] = data[other : other + len(some)]
    survives(bytes(data))


NAMES = st.sampled_from(["x", "c", "y", "w", "gamma", "variance", "", "nobody"])
OPERATORS = st.sampled_from(
    ["Conv", "BatchNormalization", "ConvTranspose", "Constant", "Identity", "If", "Nope", ""]
)
VALUES = st.sampled_from([0, -1, 2**62, 1.5, float("nan"), "s", b"\xff", [1, 2], [0.5], ["a"]])
ATTRIBUTES = st.sampled_from(
    ["epsilon", "group", "training_mode", "pads", "strides", "auto_pad", "value", "to", "spatial"]
)
DIMS = st.lists(st.sampled_from([0, -1, 1, 2, 3, 2**40]), max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_graphs(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([small, large]))()
    graph = model.graph
    for _ in range(data.draw(st.integers(1, 3))):
        at = graph.node[data.draw(st.integers(0, 1))]
        tensor = data.draw(st.sampled_from(list(graph.initializer)))
        change = data.draw(st.integers(0, 11))
        if change == 0 and at.input:
            at.input[data.draw(st.integers(0, len(at.input) - 1))] = data.draw(NAMES)
        elif change == 1 and at.output:
            at.output[0] = data.draw(NAMES)
        elif change == 2:
            at.output.append(data.draw(NAMES))
        elif change == 3:
            at.input.append(data.draw(NAMES))
        elif change == 4 and at.input:
            at.input.pop()
        elif change == 5:
            at.op_type = data.draw(OPERATORS)
        elif change == 6:
            value = data.draw(VALUES)
            at.attribute.append(onnx.helper.make_attribute(data.draw(ATTRIBUTES), value))
        elif change == 7:
            tensor.dims[:] = data.draw(DIMS)
        elif change == 8:
            tensor.data_type = data.draw(st.integers(0, 30))
        elif change == 9:
            tensor.raw_data = data.draw(st.binary(max_size=20)) * data.draw(st.integers(0, 400))
        elif change == 10:
            model.ir_version = data.draw(st.sampled_from([-1, 0, 1, 3, 4, 99]))
        else:
            graph.output.add(name=data.draw(NAMES))
    survives(model.SerializeToString())
