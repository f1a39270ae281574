"""Models on disk: what is read, what is written, and what is left when writing fails."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxnorm import storage
from onnxnorm.errors import ModelError, OutputError
from onnxnorm.session import open_session
from onnxnorm.storage import INLINE_LIMIT, REFERENCE_KEY, Staged, Stored
from tests.generated import TYPES, bits, make_model, mutate

RNG: Final = np.random.default_rng(0)
LARGE: Final = RNG.standard_normal((40, 50)).astype(np.float32)
OTHER: Final = RNG.standard_normal((40, 31)).astype(np.float32)
SMALL: Final = np.array([1, 2, 3], np.float32)
EMPTY: Final = np.zeros((0, 4), np.float32)


def copies(arrays: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    """A model that returns its weights: `y_w = Identity(w)`."""
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    outputs = [
        helper.make_tensor_value_info(f"y_{t.name}", t.data_type, list(t.dims)) for t in tensors
    ]
    nodes = [helper.make_node("Identity", [t.name], [f"y_{t.name}"]) for t in tensors]
    graph = helper.make_graph(nodes, "copies", [], outputs, tensors)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


@dataclass(frozen=True)
class Place:
    """Where one tensor's data go."""

    location: str
    gap: int = 0
    length: bool = True
    offset: bool = True


def externalize(model: onnx.ModelProto, folder: Path, places: dict[str, Place]) -> onnx.ModelProto:
    """Move the data of some initializers into files under `folder`."""
    for tensor in model.graph.initializer:
        place = places.get(tensor.name)
        if place is None:
            continue
        file = folder / place.location
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(before + b"\xee" * place.gap + tensor.raw_data)
        entries = {"location": place.location}
        if place.offset:
            entries["offset"] = str(len(before) + place.gap)
        if place.length:
            entries["length"] = str(len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    return model


def write(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def changed(stored: Stored) -> Stored:
    """The same model with a doc string more."""
    proto = onnx.ModelProto()
    proto.CopyFrom(stored.proto)
    proto.graph.doc_string = "changed"
    return stored.with_proto(proto)


def arrays_of(stored: Stored) -> dict[str, NDArray[Any]]:
    return {t.name: stored.array(t) for t in stored.proto.graph.initializer}


def assert_arrays(stored: Stored, wanted: dict[str, NDArray[Any]]) -> None:
    found = arrays_of(stored)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def assert_runs(path: Path, wanted: dict[str, NDArray[Any]]) -> None:
    with open_session(path) as session:
        outputs = session.run({})
    for name, array in wanted.items():
        np.testing.assert_array_equal(outputs[f"y_{name}"], array, strict=True)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder under `folder`, hidden ones too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refusal(attempt: Callable[[], object], kind: type[BaseException]) -> BaseException | None:
    """What a call raised; None where it went well."""
    try:
        attempt()
    except kind as error:
        return error
    return None


# ** values **


@pytest.mark.parametrize("data_type", TYPES, ids=TensorProto.DataType.Name)
def test_arrays_of_every_type_wherever_they_are(tmp_path: Path, data_type: int) -> None:
    if data_type == TensorProto.STRING:
        tensor = TensorProto(name="w", data_type=data_type, dims=[2])
        tensor.string_data.extend([b"a", "ü".encode()])
    else:
        count = 2 * INLINE_LIMIT * 8 // bits(data_type) + 1
        raw = RNG.integers(0, 2, (count * bits(data_type) + 7) // 8, np.uint8).tobytes()
        tensor = TensorProto(name="w", data_type=data_type, dims=[1, count], raw_data=raw)
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.append(tensor)
    wanted = {"w": numpy_helper.to_array(tensor)}
    assert_arrays(storage.from_proto(model), wanted)
    inside = storage.load(write(model, tmp_path / "inside.onnx"))
    assert_arrays(inside, wanted)
    if data_type != TensorProto.STRING:
        assert not inside.proto.graph.initializer[0].HasField("raw_data")
        externalize(model, tmp_path, {"w": Place("w.bin", gap=3)})
        assert_arrays(storage.load(write(model, tmp_path / "outside.onnx")), wanted)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.int8, np.int64, np.float64, np.uint32, np.complex64, np.float16, bool]
)
def test_arrays_in_typed_fields(tmp_path: Path, dtype: type) -> None:
    values: NDArray[Any] = RNG.integers(0, 2, 600).astype(dtype)
    data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.append(helper.make_tensor("w", data_type, [600], values))
    assert_arrays(storage.load(write(model, tmp_path / "m.onnx")), {"w": values})


@pytest.mark.parametrize("places", [{}, {"w": Place("w.bin")}], ids=["inside", "outside"])
def test_large_arrays_are_mapped_and_read_only(tmp_path: Path, places: dict[str, Place]) -> None:
    model = externalize(copies({"w": LARGE}), tmp_path, places)
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    array = stored.array(stored.proto.graph.initializer[0])
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert len(stored.proto.SerializeToString()) < INLINE_LIMIT


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no list of open files")
def test_many_arrays_at_a_time_do_not_use_up_the_files(tmp_path: Path) -> None:
    many = {f"w{i}": np.full(300, i, np.float32) for i in range(400)}
    stored = storage.load(write(copies(many), tmp_path / "m.onnx"))
    before = open_files()
    found = arrays_of(stored)
    assert open_files() - before < 200
    for name, array in many.items():
        np.testing.assert_array_equal(found[name], array)
    del found
    assert open_files() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dims": [40, 51]}, "of shape [40, 51] needs 8160 bytes, its data have 8000"),
        ({"dims": [-1]}, "has a negative dimension"),
        ({"data_type": 0}, "has the unknown element type 0"),
        ({"data_type": TensorProto.STRING}, "of strings has raw or external data"),
    ],
)
@pytest.mark.parametrize("values", [LARGE, SMALL], ids=["large", "small"])
def test_data_that_do_not_fit_are_refused(
    values: NDArray[Any], change: dict[str, Any], says: str
) -> None:
    tensor = numpy_helper.from_array(values, "w")
    for name, value in change.items():
        tensor.ClearField("dims" if name == "dims" else "data_type")
        tensor.MergeFrom(TensorProto(**{name: value}))
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.append(tensor)
    stored = storage.from_proto(model)
    with pytest.raises(ModelError) as caught:
        stored.array(stored.proto.graph.initializer[0])
    assert values is SMALL or says in caught.value.what
    assert "'w'" in caught.value.what


def test_too_few_elements_are_refused() -> None:
    model = onnx.ModelProto(ir_version=10)
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[3], float_data=[1])
    with pytest.raises(ModelError, match="tensor 'w' cannot be read"):
        arrays_of(storage.from_proto(model))


@pytest.mark.parametrize(
    "array",
    [
        LARGE,
        LARGE.T,
        LARGE[::2, ::3],
        SMALL,
        EMPTY,
        np.float64(3.5).reshape(()),
        LARGE.astype(ml_dtypes.bfloat16),
        LARGE.astype(ml_dtypes.float8_e4m3fn),
        np.ones(3000, ml_dtypes.int4),
        np.ones(3000, bool),
        np.array(["x"] * 500, object),
    ],
    ids=lambda a: f"{a.dtype}{list(a.shape)}",
)
def test_kept_arrays_come_back_from_memory_and_from_the_file(
    tmp_path: Path, array: NDArray[Any]
) -> None:
    stored = storage.from_proto(onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g")))
    first, second = stored.keep("before", OTHER), stored.keep("w", array)
    third = stored.keep("after", OTHER)
    proto = onnx.ModelProto()
    proto.CopyFrom(stored.proto)
    proto.graph.initializer.extend([first, second, third])
    wanted = {"before": OTHER, "w": np.asarray(array, order="C"), "after": OTHER}
    if array.dtype == object:
        assert stored.array(second).tolist() == array.tolist()
        wanted.pop("w")
        del proto.graph.initializer[1]
    made = stored.with_proto(proto)
    assert_arrays(made, wanted)
    storage.save(made, tmp_path / "m.onnx")
    assert_arrays(storage.load(tmp_path / "m.onnx"), wanted)
    assert_arrays(storage.from_proto(made.complete()), wanted)


# ** external data **


LAYOUTS: Final[dict[str, dict[str, Place]]] = {
    "one file": {n: Place("all.bin") for n in ("large", "other", "small")},
    "files": {"large": Place("large.bin"), "other": Place("other.bin"), "small": Place("s.bin")},
    "folders": {"large": Place("a/b/w.bin"), "other": Place("a/w.bin"), "small": Place("w.bin")},
    "gaps": {n: Place("all.bin", gap=g) for n, g in (("large", 7), ("other", 4096), ("small", 1))},
    "no length": {"large": Place("all.bin", length=False), "other": Place("all.bin", length=False)},
    "no offset": {"large": Place("large.bin", offset=False)},
    "dotted": {"large": Place("./large.bin"), "other": Place("./a/other.bin")},
    "empty": {"large": Place("all.bin"), "empty": Place("all.bin")},
    "only empty": {"empty": Place("none.bin")},
    "small only": {"small": Place("all.bin")},
}
WEIGHTS: Final = {"large": LARGE, "other": OTHER, "small": SMALL, "empty": EMPTY}


@pytest.fixture(params=LAYOUTS)
def laid_out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    places = LAYOUTS[request.param]
    return write(externalize(copies(WEIGHTS), folder, places), folder / "m.onnx")


def test_every_layout_is_read_and_copied_as_it_is(laid_out: Path, tmp_path: Path) -> None:
    stored = storage.load(laid_out)
    assert_arrays(stored, WEIGHTS)
    (tmp_path / "out").mkdir()
    files = storage.save(stored, tmp_path / "out" / "m.onnx")
    assert tree(tmp_path / "out") == tree(laid_out.parent)
    assert files[0] == tmp_path / "out" / "m.onnx"
    assert {p.resolve() for p in files} == {p for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_every_layout_becomes_one_file_when_the_model_changes(
    laid_out: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    files = storage.save(changed(storage.load(laid_out)), tmp_path / "out" / "new.onnx")
    assert {p.name for p in files} <= {"new.onnx", "new.onnx.data"}
    assert {p.name for p in files} == {p.name for p in (tmp_path / "out").iterdir()}
    moved = tmp_path / "moved"
    (tmp_path / "out").rename(moved)
    shutil.rmtree(laid_out.parent)
    again = storage.load(moved / "new.onnx")
    assert_arrays(again, WEIGHTS)
    assert again.proto.graph.doc_string == "changed"
    assert_runs(moved / "new.onnx", WEIGHTS)


def test_a_copy_in_the_same_folder_has_data_of_its_own(laid_out: Path) -> None:
    before = tree(laid_out.parent)
    storage.save(storage.load(laid_out), laid_out.with_name("copy.onnx"))
    after = tree(laid_out.parent)
    assert {k: v for k, v in after.items() if not k.startswith("copy.onnx")} == before
    assert_arrays(storage.load(laid_out.with_name("copy.onnx")), WEIGHTS)


def test_saving_an_unchanged_model_over_itself_changes_no_byte(laid_out: Path) -> None:
    before = tree(laid_out.parent)
    storage.save(storage.load(laid_out), laid_out)
    assert tree(laid_out.parent) == before


def test_a_changed_model_may_replace_itself(laid_out: Path) -> None:
    storage.save(changed(storage.load(laid_out)), laid_out)
    again = storage.load(laid_out)
    assert_arrays(again, WEIGHTS)
    assert again.proto.graph.doc_string == "changed"
    storage.save(changed(again), laid_out)
    assert_arrays(storage.load(laid_out), WEIGHTS)


def test_data_files_of_another_model_are_not_overwritten(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    model = externalize(copies({"w": LARGE}), one, {"w": Place("weights.bin")})
    write(model, one / "m.onnx")
    model = externalize(copies({"w": OTHER}), two, {"w": Place("weights.bin")})
    write(model, two / "m.onnx")
    storage.save(storage.load(one / "m.onnx"), two / "new.onnx")
    assert_arrays(storage.load(two / "m.onnx"), {"w": OTHER})
    assert_arrays(storage.load(two / "new.onnx"), {"w": LARGE})
    # The output that refers to that file may be replaced together with it.
    storage.save(storage.load(one / "m.onnx"), two / "m.onnx")
    assert_arrays(storage.load(two / "m.onnx"), {"w": LARGE})
    assert (two / "weights.bin").read_bytes() == LARGE.tobytes()


def test_a_way_through_a_folder_and_back_is_straightened(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    model = externalize(copies({"w": LARGE}), folder, {"w": Place("sub/../w.bin")})
    (tmp_path / "out").mkdir()
    storage.save(storage.load(write(model, folder / "m.onnx")), tmp_path / "out" / "m.onnx")
    assert_runs(tmp_path / "out" / "m.onnx", {"w": LARGE})


def test_attributes_bodies_and_functions_may_have_external_data(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17, "d" : 1]>'
        " main (bool c) => (float[N] y) { y = If (c) <"
        " then_branch = t () => (float[N] a) { a = Constant <value = float[1] {1}> () },"
        " else_branch = e () => (float[N] a) { a = d.f () }> }"
        ' <opset_import: ["" : 17], domain: "d"> f () => (b)'
        " { b = Constant <value = float[1] {1}> () }"
    )
    body = model.graph.node[0].attribute[0].g.node[0]
    for number, node in enumerate((body, model.functions[0].node[0])):
        tensor = node.attribute[0].t
        tensor.CopyFrom(
            TensorProto(name=f"t{number}", data_type=1, dims=[2], data_location="EXTERNAL")
        )
        for key, value in (("location", "w.bin"), ("offset", str(8 * number))):
            tensor.external_data.add(key=key, value=value)
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    found = {t.name: stored.array(t).tolist() for t in storage.tensors(stored.proto)}
    assert found == {"t0": [0, 1], "t1": [2, 3]}
    (tmp_path / "out").mkdir()
    storage.save(changed(stored), tmp_path / "out" / "m.onnx")
    stored = storage.load(tmp_path / "out" / "m.onnx")
    assert {t.name: stored.array(t).tolist() for t in storage.tensors(stored.proto)} == found


BREAKS: Final[dict[str, tuple[dict[str, str], str]]] = {
    "missing": ({"location": "gone.bin"}, "gone.bin of tensor 'w' does not exist"),
    "short": ({"offset": "4"}, "is too short for tensor 'w': it needs bytes 4 to 8004"),
    "negative": ({"offset": "-8"}, "is too short for tensor 'w'"),
    "no number": ({"offset": "here"}, "malformed offset or length"),
    "wrong length": ({"length": "7996"}, "needs 8000 bytes, its data have 7996"),
    "no location": ({"location": ""}, "external data without a location"),
    "a zero byte": ({"location": "a\0b"}, "external data without a location"),
    "above": ({"location": "../w.bin"}, "outside the model's folder: ../w.bin"),
    "absolute": ({"location": "/etc/passwd"}, "outside the model's folder: /etc/passwd"),
    "link out": ({"location": "out.bin"}, "outside the model's folder: out.bin"),
    "link in a circle": ({"location": "circle.bin"}, "circle.bin"),
    "folder": ({"location": "sub"}, "does not exist"),
    "through a file": ({"location": "w.bin/x"}, "x of tensor 'w' does not exist"),
    "long name": ({"location": "x" * 300}, "cannot be read"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_external_data_are_refused(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(LARGE.tobytes())
    (folder / "out.bin").symlink_to(tmp_path / "w.bin")
    (folder / "circle.bin").symlink_to("circle.bin")
    (folder / "sub").mkdir()
    model = externalize(copies({"w": LARGE}), folder, {"w": Place("w.bin")})
    entries, says = BREAKS[case]
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    with pytest.raises(ModelError) as caught:
        storage.load(write(model, folder / "m.onnx"))
    assert says in caught.value.what
    assert caught.value.hint


def test_data_files_may_be_links_inside_the_folder(tmp_path: Path) -> None:
    model = externalize(copies({"w": LARGE}), tmp_path, {"w": Place("real.bin")})
    (tmp_path / "link.bin").symlink_to("real.bin")
    model.graph.initializer[0].external_data[0].value = "link.bin"
    assert_arrays(storage.load(write(model, tmp_path / "m.onnx")), {"w": LARGE})


def test_sparse_tensors_cannot_have_external_data(tmp_path: Path) -> None:
    model = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g"))
    model.graph.sparse_initializer.add().values.data_location = TensorProto.EXTERNAL
    with pytest.raises(ModelError, match="sparse tensor '' has external data"):
        storage.load(write(model, tmp_path / "m.onnx"))


# ** what is no model **


def test_every_prefix_of_a_model_is_a_model_or_refused(tmp_path: Path) -> None:
    data = make_model(3, 1, 10).SerializeToString()
    path = tmp_path / "m.onnx"
    loaded = 0
    for end in range(0, len(data), max(1, len(data) // 800)):
        path.write_bytes(data[:end])
        error = refusal(lambda: storage.load(path), ModelError)
        if error is None:
            wanted = onnx.ModelProto.FromString(data[:end])
            assert storage.load(path).complete() == wanted
            loaded += 1
        else:
            assert str(path) in str(error)
    assert loaded < 50


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32 - 1))
def test_a_damaged_file_is_a_model_or_refused(tmp_path: Path, seed: int) -> None:
    data = mutate(make_model(seed % 30, 1, 10).SerializeToString(), seed)
    (tmp_path / "m.onnx").write_bytes(data)
    try:
        stored = storage.load(tmp_path / "m.onnx")
    except ModelError:
        return
    wanted = onnx.ModelProto.FromString(data)
    assert stored.complete().SerializeToString() == wanted.SerializeToString()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError):
        storage.load(tmp_path / "m.onnx")


def test_a_varint_that_never_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08" + b"\xff" * 30)
    with pytest.raises(ModelError, match="truncated or damaged ONNX model: a number is too long"):
        storage.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("levels", [30, 5000])
def test_messages_that_nest_too_deeply_are_refused(tmp_path: Path, levels: int) -> None:
    data = onnx.GraphProto(doc_string="x" * 2 * INLINE_LIMIT).SerializeToString()
    for _ in range(levels):
        for number in (6, 5, 1):  # the graph of an attribute of a node of a graph
            data = storage._header(number, len(data)) + data
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a" + storage._header(7, len(data)) + data)
    if levels == 30:
        assert storage.load(tmp_path / "m.onnx").complete().graph.node
    else:
        with pytest.raises(ModelError, match="nests more than"):
            storage.load(tmp_path / "m.onnx")


def test_unknown_fields_of_a_tensor_keep_their_order(tmp_path: Path) -> None:
    model = copies({"w": LARGE})
    # A later version of the format may give a field another wire type.
    for field in (b"\x82\xef\x0e\x01a", b"\x20\x31", b"\x4d1234"):
        model.graph.initializer[0].MergeFromString(field)
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    assert stored.complete().SerializeToString() == model.SerializeToString()


def test_of_data_that_occur_twice_the_last_count(tmp_path: Path) -> None:
    first, second = numpy_helper.from_array(LARGE, "w"), numpy_helper.from_array(LARGE + 1)
    short = TensorProto(raw_data=b"1234")
    for parts, wanted in (
        ((first, TensorProto(raw_data=second.raw_data)), second.raw_data),
        ((short, first), first.raw_data),
        ((first, short), short.raw_data),
    ):
        tensor = b"".join(part.SerializeToString() for part in parts)
        graph = storage._header(5, len(tensor)) + tensor
        data = b"\x08\x0a" + storage._header(7, len(graph)) + graph
        (tmp_path / "m.onnx").write_bytes(data)
        stored = storage.load(tmp_path / "m.onnx")
        assert stored.complete() == onnx.ModelProto.FromString(data)
        assert stored.complete().graph.initializer[0].raw_data == wanted


@pytest.mark.parametrize("value", ["0:0:2000", "9:9:9", "nonsense", ""])
@pytest.mark.parametrize("size", [10, 3000])
def test_references_are_ours_alone(tmp_path: Path, value: str, size: int) -> None:
    model = copies({"w": LARGE})
    model.graph.initializer[0].doc_string = "x" * size
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key=REFERENCE_KEY, value=value)
    with pytest.raises(ModelError, match="which is reserved"):
        storage.load(write(model, tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="which is reserved"):
        storage.from_proto(model)


def test_data_inside_and_outside_are_refused(tmp_path: Path) -> None:
    model = copies({"w": LARGE})
    model.graph.initializer[0].external_data.add(key="location", value="w.bin")
    with pytest.raises(ModelError, match="both inside and outside"):
        storage.load(write(model, tmp_path / "m.onnx"))


def test_what_is_no_file_or_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("This is no model.")
    (tmp_path / "nothing.onnx").write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    os.mkfifo(tmp_path / "pipe.onnx")
    for name, says in (
        ("gone.onnx", "does not exist"),
        (".", "is a folder"),
        ("pipe.onnx", "is not a regular file"),
        ("empty.onnx", "is empty"),
        ("text.onnx", "is not an ONNX model"),
        ("nothing.onnx", "is not an ONNX model: it holds no graph"),
        ("text.onnx/m.onnx", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ):
        with pytest.raises(ModelError) as caught:
            storage.load(tmp_path / name)
        assert says in caught.value.what, name
    with pytest.raises(ModelError, match="the model has no graph"):
        storage.from_proto(onnx.ModelProto(ir_version=8))


def test_a_header_that_is_no_text_is_refused(tmp_path: Path) -> None:
    model = copies({"w": SMALL})
    model.producer_name = "producer!"
    data = model.SerializeToString().replace(b"producer!", b"producer\xff")
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError, match="is not UTF-8 text"):
        storage.load(tmp_path / "m.onnx")


# ** writing **


def test_above_the_limit_the_weights_go_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = storage.load(write(copies(WEIGHTS), tmp_path / "m.onnx"))
    monkeypatch.setattr(storage, "PROTOBUF_LIMIT", 9000)
    with pytest.raises(ModelError, match="larger than 2 GB"):
        stored.complete()
    (tmp_path / "out").mkdir()
    files = storage.save(changed(stored), tmp_path / "out" / "big.onnx")
    assert [p.name for p in files] == ["big.onnx", "big.onnx.data"]
    monkeypatch.undo()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    again = storage.load(moved / "big.onnx")
    assert_arrays(again, WEIGHTS)
    outside = {t.name for t in again.proto.graph.initializer if t.data_location}
    assert outside == {"large", "other"}
    assert_runs(moved / "big.onnx", WEIGHTS)
    monkeypatch.setattr(storage, "PROTOBUF_LIMIT", 100)
    with pytest.raises(OutputError, match="the graph alone"):
        storage.save(changed(stored), tmp_path / "never.onnx")
    assert not list(tmp_path.glob("*never*"))


def test_weights_of_a_model_in_memory_may_go_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copies({"w": LARGE})
    constant = numpy_helper.from_array(OTHER)
    model.graph.node.append(helper.make_node("Constant", [], ["y_c"], value=constant))
    model.graph.output.append(helper.make_tensor_value_info("y_c", 1, OTHER.shape))
    stored = storage.from_proto(model)
    monkeypatch.setattr(storage, "PROTOBUF_LIMIT", 3000)
    storage.save(stored, tmp_path / "m.onnx")
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
    storage.save(changed(stored), link)
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
    storage.save(changed(storage.load(path)), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "m.onnx.data").stat().st_mode) == 0o600


def test_inputs_may_be_read_only_and_outputs_are_not(tmp_path: Path) -> None:
    path = write(copies({"w": LARGE}), tmp_path / "m.onnx")
    path.chmod(0o444)
    plain = write(copies({"w": LARGE}), tmp_path / "plain.onnx")
    before = path.stat()
    storage.save(storage.load(path), tmp_path / "out.onnx")
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
    for attempt in (storage.check_target, lambda path: storage.save(stored, path)):
        with pytest.raises(OutputError, match=says):
            attempt(tmp_path / target)
    assert tree(tmp_path) == {}


def test_a_folder_that_one_may_not_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EACCES))
    with pytest.raises(OutputError) as caught:
        storage.check_target(tmp_path / "m.onnx")
    assert caught.value.what == f"{tmp_path / 'm.onnx'} cannot be written: Permission denied"
    assert caught.value.hint == "Write to a folder that you may write to."


def test_a_target_that_can_be_leaves_nothing_behind(tmp_path: Path) -> None:
    storage.check_target(tmp_path / ("層" * 60 + ".onnx"))
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
        failed = refusal(lambda: storage.save(stored, folder / "m.onnx"), kind)
        assert (failed is not None) == (failing.left < 0)
        assert failed is None or tree(tmp_path) == before
    assert_arrays(storage.load(folder / "m.onnx"), WEIGHTS)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_an_output_stays_whole_when_a_model_in_memory_cannot_be_written(tmp_path: Path) -> None:
    target = write(copies({"old": SMALL}), tmp_path / "m.onnx")
    before = tree(tmp_path)
    model = copies(WEIGHTS)
    for failing in failures(os, "write", NO_SPACE):
        failed = refusal(lambda: storage.save(storage.from_proto(model), target), OutputError)
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
        failed = refusal(lambda: storage.save(stored, target), OutputError)
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
        from onnxnorm import storage
        from onnxnorm.errors import OutputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            storage.save(storage.load("in.onnx"), "out.onnx")
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
    monkeypatch.setattr(storage, "_BLOCK", 1000)
    storage.save(stored, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == wanted


@pytest.mark.parametrize("name", ["copy_file_range", "sendfile"])
def test_a_copy_that_fails_is_not_tried_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stored = storage.load(write(copies(WEIGHTS), tmp_path / "m.onnx"))
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    monkeypatch.setattr(os, name, refuse(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left on device"):
        storage.save(stored, tmp_path / "out.onnx")


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
        storage.save(stored, tmp_path / "out.onnx")
    assert list(tree(tmp_path)) == ["m.onnx"]


def test_an_input_may_be_deleted_once_it_is_loaded(tmp_path: Path) -> None:
    path = write(copies(WEIGHTS), tmp_path / "m.onnx")
    data = path.read_bytes()
    stored = storage.load(path)
    path.unlink()
    storage.save(stored, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == data


# ** sizes and checks **


def test_total_bytes_counts_every_payload_once(tmp_path: Path) -> None:
    model = copies(WEIGHTS)
    assert storage.total_bytes(storage.from_proto(model)) == model.ByteSize()
    externalize(model, tmp_path, {"large": Place("w.bin", gap=100), "small": Place("w.bin")})
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    assert storage.total_bytes(stored) == model.ByteSize() + LARGE.nbytes + SMALL.nbytes


def test_analyses_see_small_values_wherever_they_are(tmp_path: Path) -> None:
    shape = np.array([2, 3], np.int64)
    model = externalize(copies({"shape": shape, "w": LARGE}), tmp_path, {"shape": Place("s.bin")})
    small = storage.load(write(model, tmp_path / "m.onnx")).small()
    np.testing.assert_array_equal(numpy_helper.to_array(small.graph.initializer[0]), shape)
    assert not small.graph.initializer[1].HasField("raw_data")


def test_the_checker_sees_models_without_their_weights(tmp_path: Path) -> None:
    model = externalize(copies(WEIGHTS), tmp_path, {"other": Place("w.bin")})
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    assert storage.checker_complaint(stored) is None
    model.graph.node[0].op_type = "Idendity"
    complaint = storage.checker_complaint(storage.load(write(model, tmp_path / "m.onnx")))
    assert complaint is not None
    assert "Idendity" in complaint


def test_the_checker_sees_no_weights_of_constants(tmp_path: Path) -> None:
    model = copies({"w": SMALL})
    large = numpy_helper.from_array(np.ones((2000, 1000), np.float32))
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=large))
    model.graph.node.append(helper.make_node("Neg", ["c"], ["y_c"]))
    model.graph.output.append(helper.make_tensor_value_info("y_c", 1, [2000, 1000]))
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    tracemalloc.start()
    try:
        assert storage.checker_complaint(stored) is None
        assert tracemalloc.get_traced_memory()[1] < len(large.raw_data)
    finally:
        tracemalloc.stop()
    model.graph.output[-1].type.tensor_type.shape.dim[0].dim_value = 7
    complaint = storage.checker_complaint(storage.load(write(model, tmp_path / "m.onnx")))
    assert complaint is not None
    assert "2000" in complaint
