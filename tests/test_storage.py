"""Models on disk: what is read, what is written, and what is left when writing fails."""

from __future__ import annotations

import os
import shutil
import tracemalloc
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

from onnxnorm import staging, storage, verifier, wire
from onnxnorm.errors import ModelError
from onnxnorm.wire import INLINE_LIMIT, REFERENCE_KEY
from tests.generated import TYPES, bits, make_model, mutate
from tests.layouts import (
    EMPTY,
    LARGE,
    OTHER,
    RNG,
    SMALL,
    WEIGHTS,
    Place,
    arrays_of,
    assert_arrays,
    assert_runs,
    changed,
    copies,
    externalize,
    open_files,
    refusal,
    tree,
    write,
)

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
    staging.save(made, tmp_path / "m.onnx")
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
    files = staging.save(stored, tmp_path / "out" / "m.onnx")
    assert tree(tmp_path / "out") == tree(laid_out.parent)
    assert files[0] == tmp_path / "out" / "m.onnx"
    assert {p.resolve() for p in files} == {p for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_every_layout_becomes_one_file_when_the_model_changes(
    laid_out: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    files = staging.save(changed(storage.load(laid_out)), tmp_path / "out" / "new.onnx")
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
    staging.save(storage.load(laid_out), laid_out.with_name("copy.onnx"))
    after = tree(laid_out.parent)
    assert {k: v for k, v in after.items() if not k.startswith("copy.onnx")} == before
    assert_arrays(storage.load(laid_out.with_name("copy.onnx")), WEIGHTS)


def test_saving_an_unchanged_model_over_itself_changes_no_byte(laid_out: Path) -> None:
    before = tree(laid_out.parent)
    staging.save(storage.load(laid_out), laid_out)
    assert tree(laid_out.parent) == before


def test_a_changed_model_may_replace_itself(laid_out: Path) -> None:
    staging.save(changed(storage.load(laid_out)), laid_out)
    again = storage.load(laid_out)
    assert_arrays(again, WEIGHTS)
    assert again.proto.graph.doc_string == "changed"
    staging.save(changed(again), laid_out)
    assert_arrays(storage.load(laid_out), WEIGHTS)


def test_data_files_of_another_model_are_not_overwritten(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    model = externalize(copies({"w": LARGE}), one, {"w": Place("weights.bin")})
    write(model, one / "m.onnx")
    model = externalize(copies({"w": OTHER}), two, {"w": Place("weights.bin")})
    write(model, two / "m.onnx")
    staging.save(storage.load(one / "m.onnx"), two / "new.onnx")
    assert_arrays(storage.load(two / "m.onnx"), {"w": OTHER})
    assert_arrays(storage.load(two / "new.onnx"), {"w": LARGE})
    # The output that refers to that file may be replaced together with it.
    staging.save(storage.load(one / "m.onnx"), two / "m.onnx")
    assert_arrays(storage.load(two / "m.onnx"), {"w": LARGE})
    assert (two / "weights.bin").read_bytes() == LARGE.tobytes()


def test_a_way_through_a_folder_and_back_is_straightened(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    model = externalize(copies({"w": LARGE}), folder, {"w": Place("sub/../w.bin")})
    (tmp_path / "out").mkdir()
    staging.save(storage.load(write(model, folder / "m.onnx")), tmp_path / "out" / "m.onnx")
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
    staging.save(changed(stored), tmp_path / "out" / "m.onnx")
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


# All examples write the same file anew, so that one folder does for them.
ONE_FOLDER: Final = [HealthCheck.function_scoped_fixture]


@settings(max_examples=200, deadline=None, suppress_health_check=ONE_FOLDER)
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


@settings(max_examples=100, deadline=None, suppress_health_check=ONE_FOLDER)
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
            data = wire._header(number, len(data)) + data
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a" + wire._header(7, len(data)) + data)
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
        graph = wire._header(5, len(tensor)) + tensor
        data = b"\x08\x0a" + wire._header(7, len(graph)) + graph
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


# ** sizes and checks **


def test_total_bytes_counts_every_payload_once(tmp_path: Path) -> None:
    model = copies(WEIGHTS)
    assert storage.from_proto(model).total_bytes == model.ByteSize()
    externalize(model, tmp_path, {"large": Place("w.bin", gap=100), "small": Place("w.bin")})
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    assert stored.total_bytes == model.ByteSize() + LARGE.nbytes + SMALL.nbytes


def test_analyses_see_small_values_wherever_they_are(tmp_path: Path) -> None:
    shape = np.array([2, 3], np.int64)
    model = externalize(copies({"shape": shape, "w": LARGE}), tmp_path, {"shape": Place("s.bin")})
    small = storage.load(write(model, tmp_path / "m.onnx")).small()
    np.testing.assert_array_equal(numpy_helper.to_array(small.graph.initializer[0]), shape)
    assert not small.graph.initializer[1].HasField("raw_data")


def test_the_checker_sees_models_without_their_weights(tmp_path: Path) -> None:
    model = externalize(copies(WEIGHTS), tmp_path, {"other": Place("w.bin")})
    stored = storage.load(write(model, tmp_path / "m.onnx"))
    assert verifier.checker_complaint(stored) is None
    model.graph.node[0].op_type = "Idendity"
    complaint = verifier.checker_complaint(storage.load(write(model, tmp_path / "m.onnx")))
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
        assert verifier.checker_complaint(stored) is None
        assert tracemalloc.get_traced_memory()[1] < len(large.raw_data)
    finally:
        tracemalloc.stop()
    model.graph.output[-1].type.tensor_type.shape.dim[0].dim_value = 7
    complaint = verifier.checker_complaint(storage.load(write(model, tmp_path / "m.onnx")))
    assert complaint is not None
    assert "2000" in complaint
