"""Every recipe builds, is valid, runs, and gives the bytes that the manifest records."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models import RECIPES, serialise
from models.architectures import ARCHITECTURES, OPSETS, Architecture
from models.large import depth_for, write_large
from models.network import Network, uniform
from onnxnorm.errors import RuntimeRejection
from onnxnorm.session import open_session
from tools import bench_large, make_models

MODELS = Path(make_models.__file__).parent.parent / "models"
ROWS = make_models.read_manifest(MODELS)
COMMITTED_LIMIT = 2_000_000  # bytes, all committed models together


def batch_norms(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "BatchNormalization"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_bytes_that_the_manifest_records(name: str, tmp_path: Path) -> None:
    assert make_models.make_recipe(name, tmp_path) == ROWS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_runs_as_it_says(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    model = recipe.build()
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "model.onnx"
    path.write_bytes(serialise(model))
    if recipe.rejected is None:
        with open_session(path, provider="cpu") as session:
            assert [v.name for v in session.outputs] == [v.name for v in model.graph.output]
    else:
        with pytest.raises(RuntimeRejection):
            open_session(path, provider="cpu")


def test_a_recipe_does_not_hand_out_the_same_model_twice() -> None:
    first = RECIPES["conv2d"].build()
    first.graph.node.pop()
    assert len(RECIPES["conv2d"].build().graph.node) == len(first.graph.node) + 1


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("conv")])
def test_the_parameters_of_a_norm_are_not_trivial(name: str) -> None:
    graph = RECIPES[name].build().graph
    for tensor in graph.initializer:
        if tensor.name.startswith("bn") and not tensor.name.endswith(".stored"):
            values = numpy_helper.to_array(tensor).astype(np.float64)
            assert np.unique(values).size > 1


def test_the_demonstration_is_what_its_recipe_makes() -> None:
    assert (MODELS / "demo.onnx").read_bytes() == serialise(RECIPES["demo"].build())


def test_the_committed_models_are_small_and_all_have_a_recipe() -> None:
    files = sorted(MODELS.rglob("*.onnx"))
    committed = sorted(f"{name}.onnx" for name, recipe in RECIPES.items() if recipe.committed)
    assert [path.name for path in files] == committed
    assert sum(path.stat().st_size for path in files) <= COMMITTED_LIMIT


def test_the_demonstration_has_norms_that_can_go_and_two_that_must_stay() -> None:
    graph = onnx.load(MODELS / "demo.onnx").graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = [value for node in graph.node for value in node.input]
    readers += [value.name for value in graph.output]
    kept = []
    for norm in batch_norms(graph):
        producer = producers[norm.input[0]]
        if producer.op_type != "Conv" or readers.count(norm.input[0]) > 1:
            kept.append(norm.output[0])
    assert len(batch_norms(graph)) == 54
    assert kept == ["data_bn.out", "bottleneck.out"]


def test_a_lost_epsilon_shows_in_the_demonstration(tmp_path: Path) -> None:
    model = onnx.load(MODELS / "demo.onnx")
    pixels = 255 * uniform("pixels", (2, 3, 96, 96), 0.0, 1.0).astype(np.float32)
    outputs = []
    for epsilon in (1e-5, 1e-6):
        for norm in batch_norms(model.graph):
            next(a for a in norm.attribute if a.name == "epsilon").f = epsilon
        path = tmp_path / f"{epsilon}.onnx"
        path.write_bytes(serialise(model))
        with open_session(path, provider="cpu", optimize=False) as session:
            outputs.append(session.run({"pixels": pixels})["logits"])
    # far beyond what float32 loses by itself over 54 layers
    rounding = float(np.finfo(np.float32).eps) * 54 * np.abs(outputs[0]).max()
    assert np.abs(outputs[0] - outputs[1]).max() > 10 * rounding


def test_draws_are_the_same_everywhere_and_each_name_has_its_own() -> None:
    expected = [0.9880388159352315, 0.06078758655405936]
    np.testing.assert_array_equal(uniform("a", (2,), 0.0, 1.0), expected)
    assert uniform("b", (1,), 0.0, 1.0)[0] != uniform("a", (1,), 0.0, 1.0)[0]
    np.testing.assert_array_equal(uniform("a", (3,), 0.0, 1.0)[:2], expected)


def test_a_parameter_does_not_depend_on_those_before_it() -> None:
    alone, second = Network("n"), Network("n")
    second.parameter("other", (5,), 0.0, 1.0)
    alone.parameter("w", (4,), 0.0, 1.0)
    second.parameter("w", (4,), 0.0, 1.0)
    assert alone.initializers[0] == second.initializers[1]


# ** the manifest **


def test_the_manifest_has_every_recipe_and_every_export_and_nothing_else() -> None:
    exports = {
        f"{architecture.name}-{exporter}-op{opset}-{flavour}"
        for architecture in ARCHITECTURES
        for exporter, opset, flavour in architecture.variants()
    }
    assert set(ROWS) == set(RECIPES) | exports


def test_an_export_row_has_a_file_or_a_reason() -> None:
    for name, row in ROWS.items():
        if row["kind"] == "export":
            assert ("sha256" in row) != bool(row["failure"]), name
            if not row["failure"]:
                assert row["opset"] == row["opset_asked"], name
                assert len(row["sha256"]) == 64, name


@pytest.mark.parametrize("exporter", OPSETS)
@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES])
def test_each_architecture_comes_out_of_each_exporter(name: str, exporter: str) -> None:
    rows = [r for r in ROWS.values() if r["name"].startswith(f"{name}-{exporter}-")]
    assert any(not row["failure"] for row in rows)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.batch_norm])
def test_the_kept_flavour_has_more_batch_norms_than_the_folded_one(
    architecture: Architecture,
) -> None:
    for name, row in ROWS.items():
        if name.startswith(f"{architecture.name}-") and name.endswith("-kept"):
            folded = ROWS[name.removesuffix("kept") + "folded"]
            if not row["failure"] and not folded["failure"]:
                kept = row["norms"]["BatchNormalization"]
                assert kept > folded["norms"].get("BatchNormalization", 0), name


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    rows: dict[str, make_models.Row] = {"b": {"name": "b", "x": 1}, "a": {"name": "a", "x": None}}
    make_models.write_manifest(tmp_path, rows)
    assert make_models.read_manifest(tmp_path) == rows
    assert [row["name"] for row in json.loads((tmp_path / "manifest.json").read_text())] == [
        "a",
        "b",
    ]
    assert make_models.read_manifest(tmp_path / "elsewhere") == {}


# ** the command line **


def test_the_list_names_recipes_and_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_models.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {tuple(line.split()[:2]) for line in lines}
    assert ("recipe", "demo") in names
    assert ("export", "resnet50") in names
    assert len(lines) == len(RECIPES) + len(ARCHITECTURES)


def test_one_recipe_is_written_with_its_row(tmp_path: Path) -> None:
    assert make_models.main(["--only", "conv1d", "--out", str(tmp_path / "new")]) == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["conv1d.onnx", "manifest.json"]
    assert make_models.read_manifest(tmp_path / "new") == {"conv1d": ROWS["conv1d"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "conv9d", "--out", "."], "no model is called conv9d"),
        (["--only", "conv1d"], "--out DIR is needed"),
    ],
)
def test_a_wrong_command_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        make_models.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ** the large model **


def test_a_large_model_streams_its_weights_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    weights = write_large(path, size=3_000_000, width=256)
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path, load_external_data=False).graph
    end = 0
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        assert not tensor.raw_data
        assert place["location"] == weights.name
        assert offset % 4096 == 0
        assert offset >= end
        end = offset + length
    assert end == weights.stat().st_size
    layers = [t for t in graph.initializer if t.name.startswith("layers")]
    assert len(layers) == depth_for(3_000_000, 256) == 23
    assert len(batch_norms(graph)) == 4
    with open_session(path, provider="cpu") as session:
        x = uniform("x", (2, 64, 16, 16), -1.0, 1.0).astype(np.float16)
        (output,) = session.run({"x": x}).values()
    assert output.shape == (2, 256)
    assert np.isfinite(output).all()


def test_the_size_of_a_large_model_is_that_of_its_layers() -> None:
    assert depth_for(3_000_000_000, 4096) == 89
    assert depth_for(1, 4096) == 1


def test_a_kernel_copy_has_the_same_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(100_001))
    bench_large.copy_by_kernel(source, target)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs POSIX")
def test_a_childs_status_and_memory_are_its_own() -> None:
    status, peak = bench_large.run_and_watch(
        [sys.executable, "-c", "b = bytearray(300_000_000); raise SystemExit(3)"]
    )
    assert status == 3
    assert peak > 300_000_000


def test_the_interval_of_a_median_holds_it() -> None:
    draw = random.Random(0)
    assert bench_large.interval([1.25] * 10, draw) == (1.25, 1.25)
    low, high = bench_large.interval([1.0, 1.1, 1.2, 1.3, 9.0], draw)
    assert (low, high) == (1.0, 9.0)
    low, high = bench_large.interval([1 + i / 100 for i in range(101)], draw)
    assert 1.35 < low < 1.5 < high < 1.65


@pytest.mark.slow
def test_the_benchmark_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gigabytes", "0.01", "--width", "256", "--rounds", "2"]
    # A limit may be missed here: a small copy takes less time than to start a process.
    assert bench_large.main(["--dir", str(tmp_path), *options]) in (0, 1)
    *rounds, last = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(":")[0] for line in rounds] == ["round 1", "round 2"]
    assert last.startswith("peak ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
