"""The library: every form of a model, an untouched caller, and rollback of what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import onnx
import pytest
from onnx import parser

import onnxnorm
from onnxnorm import storage
from onnxnorm.change import absorbed, stage
from onnxnorm.errors import (
    ModelError,
    OutputError,
    ParityError,
    RuntimeRejection,
    UsageError,
)
from onnxnorm.matcher import Match
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.pattern import const, maybe, op, var
from onnxnorm.port import slots
from onnxnorm.report import Report
from onnxnorm.rewrite import Pass, Refusal, RewritePass, Rewriter
from onnxnorm.session import open_session
from onnxnorm.storage import Stored, tensors
from onnxnorm.testing import assert_parity
from onnxnorm.wire import reference_of

PARAMETERS = """
 float[2,2,1,1] w = {2.0, -1.0, 0.5, 1.0}, float[2] gamma = {1.0, 3.0},
 float[2] beta = {2.0, 0.5}, float[2] mean = {1.0, 0.25}, float[2] variance = {0.5, 0.01}
"""


def chain(length: int) -> onnx.ModelProto:
    """`length` convolutions in a row, each with a BatchNormalization behind it: b0, b1, ..."""
    lines = []
    for i in range(length):
        source = f"r{i - 1}" if i else "x"
        lines.append(
            f"c{i} = Conv ({source}, w)"
            f" b{i} = BatchNormalization (c{i}, gamma, beta, mean, variance)"
            f" r{i} = Tanh (b{i})"
        )
    return parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
        f"main (float[N,2,3,3] x) => (float[N,2,3,3] r{length - 1}) <{PARAMETERS}>"
        f"{{ {' '.join(lines)} }}"
    )


def single(nodes: str) -> onnx.ModelProto:
    return parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        f"main (float[N,2,3,3] x) => (float[N,2,3,3] y) <{PARAMETERS}> {{ {nodes} }}"
    )


@pytest.fixture
def model() -> onnx.ModelProto:
    return chain(1)


@pytest.fixture
def path(model: onnx.ModelProto, tmp_path: Path) -> Path:
    place = tmp_path / "model.onnx"
    onnx.save(model, place)
    return place


def types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def outputs(path: Path) -> dict[str, Any]:
    x = np.linspace(-2, 2, 36, dtype=np.float32).reshape(2, 2, 3, 3)
    with open_session(path, optimize=False) as session:
        return session.run({"x": x})


def optimize(
    model: object,
    output: Path | None = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    **given: Any,
) -> onnxnorm.Result:
    return onnxnorm.optimize(model, output, passes=passes, provider="cpu", latency=False, **given)


# ** what is taken, and what is given back **


def test_a_path(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = optimize(path, out)
    assert result.files == (out,)
    assert types(onnx.load(out)) == types(result.model) == ["Conv", "Tanh"]
    assert result.report.to_json()["parity"]["passed"] is True
    assert result.report.to_json()["model"]["output"] == str(out)
    assert types(optimize(str(path)).model) == ["Conv", "Tanh"]


def test_a_model_proto_stays_as_it_was(model: onnx.ModelProto, tmp_path: Path) -> None:
    before = model.SerializeToString(deterministic=True)
    copy = onnx.ModelProto.FromString(before)
    result = optimize(model)
    assert types(result.model) == ["Conv", "Tanh"]
    result.model.graph.node[0].name = "mine"  # a new object each time: nobody else sees this
    assert result.model.graph.node[0].name != "mine"
    result.save(tmp_path / "out.onnx")
    assert model.SerializeToString(deterministic=True) == before
    assert model == copy
    assert result.report.to_json()["model"]["input"] is None


def test_large_weights_of_a_model_proto_are_not_touched_either() -> None:
    rng = np.random.default_rng(0)
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (float[N,2,4,4] x) => (float[N,512,4,4] y) {
          c = Conv (x, w) y = BatchNormalization (c, gamma, gamma, gamma, gamma) }"""
    )
    for name, shape in (("w", (512, 2, 1, 1)), ("gamma", (512,))):
        array = rng.uniform(0.5, 2, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    before = model.SerializeToString(deterministic=True)
    result = optimize(model)
    assert types(result.model) == ["Conv"]
    assert model.SerializeToString(deterministic=True) == before


def test_an_onnx_ir_model(model: onnx.ModelProto) -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    given = onnx_ir.from_proto(model)
    result = optimize(given)
    assert isinstance(result.model, onnx_ir.Model)
    assert [node.op_type for node in result.model.graph] == ["Conv", "Tanh"]
    assert types(result.proto) == ["Conv", "Tanh"]
    assert [node.op_type for node in given.graph] == ["Conv", "BatchNormalization", "Tanh"]
    assert result.report.to_json()["model"]["input"] is None


def test_an_onnx_ir_model_may_be_larger_than_a_message(
    model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    small = optimize(model).model.SerializeToString(deterministic=True)
    monkeypatch.setattr(storage, "INLINE_LIMIT", 1)  # as if all weights were large
    monkeypatch.setattr(storage, "PROTOBUF_LIMIT", 16)
    with pytest.raises(ModelError, match="larger than 2 GB"):
        _ = optimize(model).model
    result = optimize(onnx_ir.from_proto(model))
    assert any(map(reference_of, result.stored.proto.graph.initializer))
    made = onnx_ir.to_proto(result.model)
    wanted = onnx_ir.to_proto(onnx_ir.from_proto(onnx.ModelProto.FromString(small)))
    assert made.SerializeToString(deterministic=True) == wanted.SerializeToString(
        deterministic=True
    )


def test_an_onnx_ir_model_whose_weights_lie_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is one that only the tensors know."""
    onnx_ir = pytest.importorskip("onnx_ir")
    place = tmp_path / "far" / "model.onnx"
    place.parent.mkdir()
    onnx.save(chain(2), place, save_as_external_data=True, size_threshold=0)
    given = onnx_ir.load(place)
    monkeypatch.chdir(tmp_path)
    assert types(optimize(given).proto) == ["Conv", "Tanh", "Conv", "Tanh"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["far"], "no file of ours"


def test_weights_of_one_name_in_two_branches_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file, in attributes and in a function too: each tensor gets what its own place holds."""
    onnx_ir = pytest.importorskip("onnx_ir")
    model = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "here" : 1]>
        main (bool c, float[4] x) => (float[4] y)
        {
            z = If (c) <
                then_branch = one () => (float[4] p) <float[4] w = {1, 1, 1, 1}> { p = Add (x, w) },
                else_branch = two () => (float[4] q) <float[4] w = {2, 2, 2, 2}>
                {
                    k = Constant <value = float[4] {3, 3, 3, 3}> ()
                    v = Mul (w, k)
                    q = Add (x, v)
                }
            >
            y = here.shifted (z)
        }
        <domain: "here", opset_import: ["" : 17]>
        shifted (a) => (b) { d = Constant <value = float[4] {5, 5, 5, 5}> () b = Add (a, d) }
        """
    )

    def weights(given: onnx.ModelProto) -> list[list[float]]:
        return [onnx.numpy_helper.to_array(t).tolist() for t in tensors(given)]

    expected = weights(model)
    assert len({tuple(w) for w in expected}) == 4
    for tensor in tensors(model):  # only raw bytes go into a file
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0,
        convert_attribute=True,
    )  # fmt: skip
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert {t.data_location for t in tensors(bare)} == {onnx.TensorProto.EXTERNAL}
    given = onnx_ir.load(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)  # onnx_ir does not tell a function's tensors where the file is
    result = onnxnorm.optimize(given, passes="none", parity=False, latency=False)
    assert weights(result.proto) == expected


@dataclass
class Program:
    """What torch.onnx.export(dynamo=True) returns, as far as we use it."""

    model: Any
    exported_program: str


def test_an_exporters_program(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = Program(onnx_ir.from_proto(model), "exported")
    result = optimize(given, parity=False)
    assert not list(tmp_path.iterdir()), "nothing was written"
    made = result.model
    assert isinstance(made, Program)
    assert made.exported_program == "exported"
    assert [node.op_type for node in made.model.graph] == ["Conv", "Tanh"]
    assert [node.op_type for node in given.model.graph] == ["Conv", "BatchNormalization", "Tanh"]
    (written,) = result.save(tmp_path / "out.onnx")
    assert types(onnx.load(written)) == ["Conv", "Tanh"]


def test_an_onnx_ir_model_that_cannot_be_written() -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    tensor = onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(np.ones(3, np.float32)),
        dtype=onnx_ir.DataType.FLOAT,
        shape=onnx_ir.Shape([2]),
        name="w",
    )
    value = onnx_ir.Value(name="w", const_value=tensor)
    graph = onnx_ir.Graph([], [value], nodes=[], initializers=[value], name="g")
    with pytest.raises(ModelError):
        optimize(onnx_ir.Model(graph, ir_version=8))


@pytest.mark.parametrize("thing", [None, 3, b"model", ["model.onnx"], object()])
def test_what_is_no_model(thing: object) -> None:
    with pytest.raises(UsageError, match="is not a model"):
        optimize(thing)


def test_an_incomplete_proto() -> None:
    with pytest.raises(ModelError, match="no graph"):
        optimize(onnx.ModelProto())


def test_save_leaves_an_existing_file_alone_when_it_fails(path: Path, tmp_path: Path) -> None:
    result = optimize(path)
    with pytest.raises(OutputError):
        result.save(tmp_path / "missing" / "out.onnx")
    with pytest.raises(OutputError):
        result.save(tmp_path)


def test_inspect_and_compare_take_the_same_forms(model: onnx.ModelProto, path: Path) -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    for form in (model, path, Program(onnx_ir.from_proto(model), "")):
        report = onnxnorm.inspect(form)
        assert [n["action"] for n in report.to_json()["norms"]] == ["folded"]
    judged = onnxnorm.compare(path, model, provider="cpu", latency=False)
    assert judged.parity is not None
    assert judged.parity["passed"] is True


def test_a_model_that_cannot_be_run_is_a_report_and_not_an_error(path: Path) -> None:
    """Its outputs do not agree, which `compare` tells; only what nobody told yet is raised."""
    other = single("y = Relu (x)")
    other.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, [1]))
    report = onnxnorm.compare(path, other, provider="cpu", time_budget=1.0)
    assert report.parity is not None
    assert not report.parity["passed"]
    assert report.latency is None
    assert report.latency_skipped == "onnxruntime cannot run the second model"
    with pytest.raises(RuntimeRejection):
        onnxnorm.compare(path, other, provider="cpu", parity=False, time_budget=1.0)


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_a_share_that_is_none_would_always_hold(path: Path, share: float) -> None:
    with pytest.raises(UsageError, match="the share by which the ratio may grow"):
        onnxnorm.compare(path, path, max_regression=share)


def test_compare_reports_what_does_not_agree(model: onnx.ModelProto) -> None:
    other = onnx.ModelProto.FromString(model.SerializeToString())
    other.graph.node[1].attribute.append(onnx.helper.make_attribute("epsilon", 0.125))
    judged = onnxnorm.compare(model, other, provider="cpu", latency=False)
    assert judged.parity is not None
    assert judged.parity["passed"] is False


# ** arguments **


def test_only_and_skip(path: Path) -> None:
    model = chain(3)
    one = optimize(model, only=["fold-batchnorm:b1"])
    assert types(one.model).count("BatchNormalization") == 2
    others = optimize(model, skip=["b1"])
    assert types(others.model).count("BatchNormalization") == 1
    for option in ("only", "skip"):
        unknown: dict[str, Any] = {option: ["b7"]}
        with pytest.raises(UsageError, match="'b7', which is no site"):
            optimize(model, **unknown)


def test_a_dry_run_runs_and_writes_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxnorm.session.open_session", None)
    out = tmp_path / "out.onnx"
    result = optimize(path, out, dry_run=True)
    assert not out.exists()
    assert result.files == ()
    assert result.report.to_json()["dry_run"] is True
    assert types(result.model) == ["Conv", "Tanh"]


def test_in_place_needs_a_place(model: onnx.ModelProto, path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in memory"):
        optimize(model, in_place=True)
    with pytest.raises(UsageError, match="another output"):
        optimize(path, tmp_path / "out.onnx", in_place=True)
    with pytest.raises(UsageError, match="is the input"):
        optimize(path, path)
    assert optimize(path, in_place=True).files == (path,)
    assert types(onnx.load(path)) == ["Conv", "Tanh"]


def test_progress_and_every_change_are_told(path: Path) -> None:
    told: list[str] = []
    changed: list[tuple[str, int]] = []

    def after(name: str, stored: Stored) -> None:
        changed.append((name, len(stored.proto.graph.node)))

    optimize(path, progress=lambda what, share: told.append(what), after_pass=after)
    assert "passes" in told
    assert any(t.startswith("parity") for t in told)
    assert changed == [("fold-batchnorm", 2)]


def test_a_callers_interruption_leaves_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    for moment in ("passes", "parity: candidate", "writing"):

        def stop(what: str, share: float | None, moment: str = moment) -> None:
            if what == moment:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimize(path, tmp_path / "out.onnx", progress=stop)
        assert list(scratch.iterdir()) == []
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "scratch"]


# ** rollback **


@dataclass(frozen=True)
class FoldWrongly(RewritePass):
    """Fold a BatchNormalization, with mistakes at the sites named in `wrong`."""

    wrong: Collection[str] = ()
    epsilon: float = 1e-5
    sign: float = 1.0
    factor: float = 1.0

    name: ClassVar = "fold-wrongly"
    summary: ClassVar = "as fold-batchnorm, and wrong on demand"
    equation: ClassVar = FoldBatchnorm.equation
    pattern: ClassVar = FoldBatchnorm.pattern

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        wrong = m.root.outputs[0].name in self.wrong
        epsilon = self.epsilon if wrong else 1e-5
        scale = m.float64("gamma") / np.sqrt(m.float64("variance") + epsilon)
        shift = m.float64("beta") - m.float64("mean") * scale
        if wrong:
            scale, shift = scale * self.sign * self.factor, shift * self.factor
        conv = m.node("conv")
        found = slots(conv, m.facts)
        assert not isinstance(found, str)
        changes = absorbed(conv, found, scale, shift)
        assert not isinstance(changes, str)
        made = stage(changes[0], rw, {})
        rw.replace_like(conv, [conv.inputs[0], made[conv, 1], made[conv, 2]])


def rolled_back(report: Report) -> dict[str, dict[str, Any]]:
    rows = report.to_json()["sites"]
    assert len({row["site"] for row in rows}) == len(rows), "one row for each site"
    return {row["site"]: row for row in rows if row["action"] == "rolled_back"}


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"seed": -1}, "the seed is -1"),
        ({"threads": 0}, "the number of threads is 0"),
        ({"time_budget": 0.0}, "the time budget is 0"),
        ({"time_budget": float("inf")}, "the time budget is inf"),
        ({"time_budget": float("nan")}, "the time budget is nan"),
    ],
)
def test_what_nothing_can_be_measured_with(path: Path, given: dict[str, Any], what: str) -> None:
    for refused in (lambda: optimize(path, **given), lambda: onnxnorm.compare(path, path, **given)):
        with pytest.raises(UsageError, match=what):
            refused()


@pytest.mark.parametrize("mistake", [{"sign": -1.0}, {"epsilon": 1e-6}, {"factor": 1.001}])
def test_a_wrong_site_is_named_and_left_out(mistake: dict[str, float], tmp_path: Path) -> None:
    model, out = chain(3), tmp_path / "out.onnx"
    result = optimize(model, out, passes=[FoldWrongly(wrong=["b1"], **mistake)])
    data = result.report.to_json()
    (site,) = rolled_back(result.report).values()
    assert site["site"] == "fold-wrongly:b1"
    assert site["pass"] == "fold-wrongly"
    assert site["error"] > 1
    assert "the outputs no longer agree: output 'r2'" in site["reason"]
    assert "budget" in site["reason"]
    assert site["removed"] == site["added"] == []
    assert len(data["warnings"]) == 1
    assert "fold-wrongly:b1 was taken back" in data["warnings"][0]
    assert {r["site"] for r in data["sites"] if r["action"] == "applied"} == {
        "fold-wrongly:b0",
        "fold-wrongly:b2",
    }
    assert data["parity"]["passed"] is True
    assert data["nodes"]["after"] == 7
    (row,) = (n for n in data["norms"] if n["output"] == "b1")
    assert row["action"] == "refused"
    assert "no longer agree" in row["reason"]
    written = onnx.load(out)
    assert types(written) == ["Conv", "Tanh", "Conv", "BatchNormalization", "Tanh", "Conv", "Tanh"]
    assert_parity(model, written)


def test_several_wrong_sites_among_right_ones(tmp_path: Path) -> None:
    model, out = chain(6), tmp_path / "out.onnx"
    result = optimize(model, out, passes=[FoldWrongly(wrong=["b1", "b2", "b5"], sign=-1.0)])
    data = result.report.to_json()
    assert set(rolled_back(result.report)) == {f"fold-wrongly:b{i}" for i in (1, 2, 5)}
    assert len(data["warnings"]) == 3
    assert types(onnx.load(out)).count("BatchNormalization") == 3
    assert_parity(model, onnx.load(out))


def test_every_site_wrong_gives_back_the_input(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = optimize(path, out, passes=[FoldWrongly(wrong=["b0"], sign=-1.0)])
    assert set(rolled_back(result.report)) == {"fold-wrongly:b0"}
    assert out.read_bytes() == path.read_bytes()
    assert result.report.to_json()["nodes"] == {"before": 3, "after": 3}
    assert result.model == onnx.load(path)


def test_every_site_wrong_leaves_the_file_in_place(path: Path) -> None:
    before = path.read_bytes()
    result = optimize(path, in_place=True, passes=[FoldWrongly(wrong=["b0"], sign=-1.0)])
    assert path.read_bytes() == before
    assert result.files == ()
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx"]


@dataclass(frozen=True)
class Negate(RewritePass):
    """Conv(x, w) -> Conv(x, -w), which is wrong."""

    name: ClassVar = "negate"
    summary: ClassVar = "wrong"
    equation: ClassVar = "Conv(x, w) -> Conv(x, -w)"
    pattern: ClassVar = op("Conv", var("x"), const("weight"), maybe(const("bias")))

    def check(self, m: Match) -> Refusal | None:
        return Refusal("made by a pass", at="conv") if m.root.site else None

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        weight = rw.constant("negated", -m.array("weight"))
        rw.replace_like(m.root, [m.value("x"), weight])


def test_a_later_pass_had_built_on_the_wrong_one(tmp_path: Path) -> None:
    model, out = chain(2), tmp_path / "out.onnx"
    result = optimize(model, out, passes=[Negate(), "fold-batchnorm"], skip=["negate:c1"])
    data = result.report.to_json()
    assert set(rolled_back(result.report)) == {"negate:c0"}
    applied = {r["site"] for r in data["sites"] if r["action"] == "applied"}
    assert applied == {"fold-batchnorm:b0", "fold-batchnorm:b1"}
    assert types(onnx.load(out)) == ["Conv", "Tanh", "Conv", "Tanh"]
    assert_parity(model, onnx.load(out))


@dataclass(frozen=True)
class DropScale(RewritePass):
    """Mul(x, c) -> x, which is wrong unless c is 1."""

    name: ClassVar = "drop-scale"
    summary: ClassVar = "wrong"
    equation: ClassVar = "c x -> x"
    pattern: ClassVar = op(
        "Mul", op("Conv", var("x"), const("weight"), name="conv"), const("factor")
    )

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        rw.replace_like(m.node("conv"), m.node("conv").inputs)


def test_what_only_the_wrong_pass_made_possible_goes_with_it(tmp_path: Path) -> None:
    model = single(
        "c = Conv (x, w) k = Constant <value = float {3.0}> () s = Mul (c, k)"
        " y = BatchNormalization (s, gamma, beta, mean, variance)"
    )
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    alone = optimize(source, passes=["fold-batchnorm"])
    assert alone.report.to_json()["nodes"] == {"before": 4, "after": 4}
    result = optimize(source, out, passes=[DropScale(), "fold-batchnorm"])
    data = result.report.to_json()
    assert set(rolled_back(result.report)) == {"drop-scale:s"}
    assert not [r for r in data["sites"] if r["action"] == "applied"]
    assert out.read_bytes() == source.read_bytes()


@dataclass(frozen=True)
class ToUnknown(RewritePass):
    """Tanh(x) -> an operator that the runtime does not have."""

    name: ClassVar = "to-unknown"
    summary: ClassVar = "wrong"
    equation: ClassVar = "tanh(x) -> ?"
    pattern: ClassVar = op("Tanh", var("x"))

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        rw.replace("ThereIsNoSuchOperator", [m.value("x")], domain="com.microsoft")


def test_a_site_that_the_runtime_cannot_run_is_taken_back(tmp_path: Path) -> None:
    model, out = chain(2), tmp_path / "out.onnx"
    result = optimize(model, out, passes=["fold-batchnorm", ToUnknown()])
    assert set(rolled_back(result.report)) == {"to-unknown:r0", "to-unknown:r1"}
    assert types(onnx.load(out)) == ["Conv", "Tanh", "Conv", "Tanh"]


def test_values_that_stop_being_finite_are_taken_back(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    passes = [FoldWrongly(wrong=["b0"], factor=float("nan"))]
    result = optimize(chain(2), out, passes=passes)
    assert set(rolled_back(result.report)) == {"fold-wrongly:b0"}
    assert np.isfinite(outputs(out)["r1"]).all()


def test_without_parity_nothing_is_taken_back_and_a_warning_says_so() -> None:
    wrong = FoldWrongly(wrong=["b0"], sign=-1.0)
    result = optimize(chain(1), passes=[wrong], parity=False)
    data = result.report.to_json()
    assert types(result.model) == ["Conv", "Tanh"]
    assert data["parity"] is None
    assert data["warnings"] == ["The outputs were not compared with those of the original."]


def test_an_optimizer_that_wrote_earlier_keeps_its_file(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"mine")
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "elsewhere" : 1]>
        main (float[2] x) => (float[2] y) { y = elsewhere.Unknown (x) }"""
    )
    with pytest.raises(ParityError):
        optimize(model, out)
    assert out.read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


RMS: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[2,8] x) => (float[2,8] y)
<float two = {2.0}, float eps = {0.1}, float[1,8] g = {1,2,3,4,5,6,7,8}>
{
   p = Pow (x, two)
   v = ReduceMean <axes = [-1]> (p)
   s = Add (v, eps)
   r = Sqrt (s)
   d = Div (x, r)
   y = Mul (d, g)
}
"""


@pytest.mark.parametrize(
    ("target", "ops"),
    [
        ("onnx", ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]),
        ("ort-cpu", ["SimplifiedLayerNormalization"]),
        ("ort-cuda", ["SimplifiedLayerNormalization"]),
    ],
)
def test_the_target_decides_what_a_norm_is_written_with(target: Any, ops: list[str]) -> None:
    result = onnxnorm.optimize(parser.parse_model(RMS), target=target, latency=False)
    assert [node.op_type for node in result.model.graph.node] == ops
    assert result.report.options["target"] == target
    assert result.report.parity is not None
    assert result.report.parity["passed"]
    again = onnxnorm.optimize(result.model, target=target, latency=False)
    assert again.model == result.model, "optimizing an optimized model changes nothing"


def test_another_target_is_none(path: Path) -> None:
    wrong: Any = "cpu"
    for refused in (
        lambda: optimize(path, target=wrong),
        lambda: onnxnorm.inspect(path, target=wrong),
    ):
        with pytest.raises(UsageError, match="no target 'cpu'"):
            refused()


def test_a_pass_that_was_given_its_target_keeps_it() -> None:
    passes = "lower-norms{target=ort-cpu}"
    result = onnxnorm.optimize(parser.parse_model(RMS), passes=passes, parity=False, latency=False)
    assert [node.op_type for node in result.model.graph.node] == ["SimplifiedLayerNormalization"]


# ** logging, progress, threads **


def test_it_is_silent_and_its_log_can_be_asked_for(
    path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    optimize(path)
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.INFO, logger="onnxnorm"):
        optimize(path)
    assert "fold-batchnorm: applied at 1 place, refused at 0" in caplog.text
    assert "parity: passed" in caplog.text


def test_progress_is_told_in_order(path: Path) -> None:
    told: list[tuple[str, float | None]] = []
    optimize(path, progress=lambda what, share: told.append((what, share)))
    assert told[0] == ("passes", None)
    assert any(what.startswith("parity") for what, _ in told)
    assert all(share is None or 0 <= share <= 1 for _, share in told)


def test_two_threads_give_what_one_gives() -> None:
    models = [chain(1), chain(3), single("y = BatchNormalization (x, gamma, beta, mean, variance)")]
    alone = [optimize(m).proto.SerializeToString(deterministic=True) for m in models]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda m: optimize(m), models * 3))
    found = [r.proto.SerializeToString(deterministic=True) for r in together]
    assert found == alone * 3
    assert all(r.report.to_json()["parity"]["passed"] for r in together)
