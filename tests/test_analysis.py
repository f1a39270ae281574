"""Time by operator, memory, sweeps, what each pass bought, and gains that must stay."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxnorm import api, feeds, memory, profile, regression, storage, sweep, workbench
from onnxnorm.errors import OnnxNormError, ProviderError, RuntimeRejection, UsageError
from onnxnorm.latency import save_feeds
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.profile import NodeTime, by_operator
from onnxnorm.report import Report
from onnxnorm.report_analysis import told_against
from onnxnorm.session import Session
from onnxnorm.storage import Stored
from tests.test_report import LATENCY

LOOP: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[n,64] x) => (float[n,64] y)
<int64 trips = {3}, bool go = {1}>
{
   y = Loop (trips, go, x) <body = body (int64 i, bool c, float[n,64] s) => (bool d, float[n,64] t)
     { d = Identity (c)  u = Exp (s)  t = Tanh (u) }>
}
"""
TOKENS: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[batch,seq_len,4] x, float[batch,past_len,4] k) => (float[batch,seq_len,4] y)
{
   y = Tanh (x)
}
"""
# BatchNormalization that folds, and a layer norm written out that is lowered.
TWO: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[n,2,8,8] x) => (float[n,2,8,8] y)
<float[2,2,1,1] w = {2.0, -1.0, 0.5, 1.0}, float[2] gamma = {1.0, 3.0},
 float[2] beta = {2.0, 0.5}, float[2] mean = {1.0, 0.25}, float[2] variance = {0.5, 0.01},
 float eps = {1e-5}, float two = {2.0}>
{
   c = Conv (x, w)
   b = BatchNormalization (c, gamma, beta, mean, variance)
   m = ReduceMean <axes = [-1]> (b)
   d = Sub (b, m)
   p = Pow (d, two)
   v = ReduceMean <axes = [-1]> (p)
   a = Add (v, eps)
   s = Sqrt (a)
   y = Div (d, s)
}
"""
THEN: Final[dict[str, Any]] = {
    **LATENCY,
    "ratio": 0.8,
    "interval": [0.79, 0.81],
    "band": [0.99, 1.01],
}


def saved(folder: Path, text: str, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(parser.parse_model(text), path)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path, float, Any]]:
    """Latency without measuring: half of it with the candidate; what was asked for is kept."""
    asked: list[tuple[Path, Path, float, Any]] = []

    def time(
        _: workbench.Workbench,
        original: Path,
        candidate: Path,
        *,
        seconds: float,
        values: Any = None,
        pairs: int = 12,
    ) -> dict[str, Any]:
        assert original.is_file()
        assert candidate.is_file()
        shapes = {name: value.shape for name, value in (values or {}).items()}
        asked.append((original, candidate, seconds, shapes))
        return {**THEN, "ratio": 0.5, "interval": [0.49, 0.51], "pairs": pairs}

    monkeypatch.setattr(workbench.Workbench, "time", time)
    return asked


# ** time by operator **


def test_the_time_of_a_body_counts_once(tmp_path: Path) -> None:
    path = saved(tmp_path, LOOP)
    values = {"x": np.ones((4096, 64), np.float32) * 1e-3}
    found = profile.profile(path, path, values, threads=1, budget_seconds=0.4)
    nodes = {row.operator: row.nodes for row in found.original}
    assert nodes["Exp"] == nodes["Tanh"] == 3
    assert nodes["Loop"] == 1
    times = {row.operator: row.milliseconds for row in found.original}
    # The loop itself only copies; with its body it would be more than both together.
    assert times["Loop"] < times["Exp"] + times["Tanh"]
    assert found.runs >= 1
    assert found.original[0].operator in {"Exp", "Tanh"}


def test_a_profile_is_read_run_by_run(tmp_path: Path) -> None:
    def node(op: str, start: int, duration: int, name: str = "n") -> dict[str, Any]:
        event = {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration}
        return {**event, "args": {"op_name": op}}

    events = [
        {"cat": "Session", "name": "model_run", "ts": 10, "dur": 90},
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 90},
        node("Conv", 5, 2),  # before any run
        node("If", 20, 50),
        node("Conv", 20, 30),
        node("Loop", 50, 20),
        node("Relu", 55, 10),
        node("Conv", 75, 5),
        node("Conv", 210, 7),
        {"cat": "Node", "name": "n_fence_before", "ts": 80, "dur": 9, "args": {"op_name": "Conv"}},
    ]
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(events[::-1]))
    first, second = profile.read(file)
    assert first == [
        NodeTime("If", 0),
        NodeTime("Conv", 30),
        NodeTime("Loop", 10),
        NodeTime("Relu", 10),
        NodeTime("Conv", 5),
    ]
    assert second == [NodeTime("Conv", 7)]
    rows = {row.operator: row for row in by_operator([first, second, first])}
    assert (rows["Conv"].nodes, rows["Conv"].milliseconds) == (2, 0.035)


def test_a_profile_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, TOKENS)
    monkeypatch.chdir(tmp_path)
    values = feeds.make_feeds(onnx.load(path))[0].values
    profile.profile(path, path, values, threads=1, budget_seconds=0.1)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


# ** memory **


@pytest.mark.skipif(memory.lack() is not None, reason="this system does not tell")
def test_a_model_of_64_mb_takes_that_much_more(tmp_path: Path) -> None:
    small, large = (saved(tmp_path, TOKENS, name) for name in ("small.onnx", "large.onnx"))
    model = onnx.load(large)
    weights = np.ones((4096, 4096), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    model.graph.node.add(op_type="MatMul", input=["q", "w"], output=["z"])
    model.graph.input.append(onnx.helper.make_tensor_value_info("q", 1, [1, 4096]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, [1, 4096]))
    onnx.save(model, large)
    tiny = {"x": np.ones((1, 2, 4), np.float32), "k": np.ones((1, 2, 4), np.float32)}
    assert memory.measure(small, small, tiny, threads=1).to_json()["notes"] == []
    found = [
        memory._apart(path, save_feeds(values, tmp_path), "cpu", 1, (), 60.0)
        for path, values in ((small, tiny), (large, {**tiny, "q": np.ones((1, 4096), np.float32)}))
    ]
    assert all(each.start <= each.loaded <= each.peak for each in found)
    few, many = (each.peak - each.start for each in found)
    assert many - few > 0.9 * weights.nbytes


@pytest.mark.skipif(memory.lack() is not None, reason="this system does not tell")
def test_a_model_that_does_not_run_says_so_in_the_same_words(tmp_path: Path) -> None:
    path = saved(tmp_path, TOKENS)
    with pytest.raises(RuntimeRejection, match="no input 'z'"):
        memory.measure(path, path, {"z": np.ones(1, np.float32)})
    with pytest.raises(RuntimeRejection, match=r"in 0\.01 s"):
        memory.measure(path, path, {}, timeout=0.01)


# ** what each pass bought **


def test_each_pass_that_changed_something_is_left_out_once(
    tmp_path: Path, quick: list[tuple[Path, Path, float, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, ...]] = []
    run = Pipeline.run

    def watched(self: Pipeline, stored: Stored, **given: Any) -> Run:
        made.append(tuple(p.name for p in self.passes))
        return run(self, stored, **given)

    monkeypatch.setattr(Pipeline, "run", watched)
    path = saved(tmp_path, TWO)
    given: dict[str, Any] = {"provider": "cpu", "parity": False, "time_budget": 4.0}
    report = api.optimize(path, tmp_path / "out.onnx", ablation=True, **given).report
    assert report.analysis is not None
    rows = report.analysis["ablation"]["passes"]
    changed = [each["name"] for each in report.passes if each["applied"]]
    assert len(changed) >= 2
    assert [row["pass"] for row in rows] == changed
    assert {row["ratio"] for row in rows} == {0.5}
    everything, *rest = made
    assert rest == [tuple(n for n in everything if n != name) for name in changed]
    # The whole against the original, then the whole against each model without one pass.
    assert len(quick) == 1 + len(changed)
    assert {candidate for _, candidate, *_ in quick[1:]} == {quick[0][1]}
    only = api.optimize(path, tmp_path / "out.onnx", ablation=changed[:1], **given).report
    assert only.analysis is not None
    assert [row["pass"] for row in only.analysis["ablation"]["passes"]] == changed[:1]
    assert [row["pass"] for row in only.analysis["ablation"]["skipped"]] == changed[1:]


def test_what_a_pass_bought_is_measured_in_the_opset_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a model in the old opset, a pass would be credited with the conversion."""
    opsets: list[int] = []

    def time(_: workbench.Workbench, original: Path, *__: Any, **___: Any) -> dict[str, Any]:
        opsets.append(onnx.load(original).opset_import[0].version)
        return {**THEN, "ratio": 0.5, "interval": [0.49, 0.51], "pairs": 8}

    monkeypatch.setattr(workbench.Workbench, "time", time)
    path = saved(tmp_path, TWO)
    before = onnx.load(path).opset_import[0].version
    given: dict[str, Any] = {"provider": "cpu", "parity": False, "passes": "fold-batchnorm"}
    api.optimize(path, tmp_path / "out.onnx", ablation=True, opset=before + 1, **given)
    assert opsets == [before, before + 1]


@pytest.mark.usefixtures("quick")
def test_the_only_pass_is_measured_already_and_none_is_left_out_unasked(tmp_path: Path) -> None:
    path = saved(tmp_path, TWO)
    given: dict[str, Any] = {"provider": "cpu", "parity": False, "time_budget": 4.0}
    given["passes"] = "fold-batchnorm"
    report = api.optimize(path, tmp_path / "out.onnx", ablation=True, **given).report
    assert report.analysis is not None
    (row,) = report.analysis["ablation"]["passes"]
    assert (row["pass"], row["ratio"], row["pairs"]) == ("fold-batchnorm", 0.5, 12)
    plain = api.optimize(path, tmp_path / "out.onnx", **given).report
    assert plain.analysis is not None
    assert plain.analysis["ablation"] is None
    assert "not asked for" in plain.analysis["skipped"]["ablation"]
    assert plain.analysis["profile"] is not None
    unmeasured = api.optimize(path, tmp_path / "out.onnx", latency=False, **given).report
    assert unmeasured.analysis is None


@pytest.mark.usefixtures("quick")
def test_a_part_that_fails_is_missing_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Session) -> Path:
        raise RuntimeRejection("no profile here", "Do without.")

    monkeypatch.setattr(Session, "end_profiling", refuse)
    path = saved(tmp_path, TOKENS)
    report = api.compare(path, path, provider="cpu", parity=False, time_budget=4.0)
    assert report.analysis is not None
    assert report.analysis["profile"] is None
    assert report.analysis["skipped"]["profile"] == "no profile here"
    assert report.latency is not None


# ** sizes **


def test_which_axes_are_the_batch_and_the_sequence() -> None:
    proto = parser.parse_model(TOKENS)
    assert feeds.symbols(proto) == ("batch", "seq_len", "past_len")
    found = sweep.resolve(proto, batch=(1, 8), sequence=(16,), named={"past_len": (3, 4)})
    assert found == [(("batch",), (1, 8)), (("seq_len",), (16,)), (("past_len",), (3, 4))]
    bare = parser.parse_model(TOKENS.replace("seq_len", "m"))
    assert feeds.sequence_axes(bare) == ("m",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"named": {"nope": (1,)}}, "'nope', which is no symbolic axis"),
        ({"named": {"batch": (1,)}, "batch": (2,)}, "'batch' is given sizes twice"),
        ({"batch": tuple(range(1, 66))}, "65 points"),
    ],
)
def test_sizes_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        sweep.resolve(parser.parse_model(TOKENS), **given)


def test_a_model_of_fixed_size_has_no_batch_and_no_sequence() -> None:
    fixed = TOKENS.replace("batch", "2").replace("seq_len", "3").replace("past_len", "4")
    for batch, sequence in (((1,), ()), ((), (1,))):
        with pytest.raises(UsageError) as caught:
            sweep.resolve(parser.parse_model(fixed), batch=batch, sequence=sequence)
        assert "none; export it with dynamic axes" in caught.value.hint


def test_every_combination_of_sizes_is_measured_at_these_sizes(
    tmp_path: Path, quick: list[tuple[Path, Path, float, Any]]
) -> None:
    path = saved(tmp_path, TOKENS)
    report = api.compare(
        path,
        path,
        provider="cpu",
        parity=False,
        batch=(1, 3),
        sequence=(5, 7),
        input_shapes={"x": (2, 9, 4)},
        time_budget=4.0,
    )
    assert report.analysis is not None
    points = report.analysis["sweep"]["points"]
    assert [p["sizes"] for p in points] == [
        {"batch": b, "seq_len": s} for b in (1, 3) for s in (5, 7)
    ]
    assert [shapes["x"] for *_, shapes in quick[1:]] == [(b, s, 4) for b in (1, 3) for s in (5, 7)]
    assert all(p["latency"]["ratio"] == 0.5 for p in points)


@pytest.mark.usefixtures("quick")
def test_a_size_that_the_model_does_not_take_is_a_row_with_its_reason(tmp_path: Path) -> None:
    text = TOKENS.replace("y = Tanh (x)", "y = Add (x, c)").replace(
        "{\n   y", "<float[1,2,4] c = {1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0}>\n{\n   y"
    )
    path = saved(tmp_path, text)
    with ExitStack() as stack:
        bench = workbench.Workbench(
            stack, storage.load(path), 1, None, None, 0, 4.0, None, provider="cpu"
        )
        found = sweep.sweep(bench, path, [(("seq_len",), (2, 5))])
    fits, other = found["points"]
    assert (fits["latency"] is None, fits["reason"]) == (False, None)
    assert other["latency"] is None
    assert "onnxruntime cannot run it" in other["reason"]


# ** providers **


@pytest.mark.usefixtures("quick")
def test_several_providers_go_into_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, TOKENS)
    with pytest.raises(OnnxNormError) as caught:
        api.compare(path, path, provider="cpu,gpu")
    assert "'gpu'" in caught.value.what
    # A machine with one provider shows the form: the CPU, which is what "auto" finds there.
    monkeypatch.setattr("onnxnorm.session._cuda_lack", lambda: ("no cuda here", "Use the cpu."))
    report = api.compare(path, path, provider="cpu,auto", time_budget=4.0)
    assert report.analysis is not None
    (row,) = report.analysis["providers"]
    assert row["provider"] == "cpu"
    assert row["parity"]["passed"] is True
    assert row["latency"]["ratio"] == 0.5
    assert row["profile"]["original"][0]["operator"] == "Tanh"


def test_a_provider_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxnorm.session._cuda_lack", lambda: ("no cuda here", "Use the cpu."))
    path = saved(tmp_path, TOKENS)
    with pytest.raises(ProviderError, match="no cuda here"):
        api.compare(path, path, provider="cpu,cuda")


# ** a gain that must stay **


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [
        (0.80, 0.01, "holds"),
        (0.70, 0.01, "holds"),
        (0.83, 0.001, "holds"),  # within the 5 %
        (0.85, 0.10, "cannot tell"),
        (0.95, 0.01, "regressed"),
        (0.95, 0.30, "cannot tell"),
    ],
)
def test_noise_fails_nobody(ratio: float, spread: float, verdict: str) -> None:
    now = {**THEN, "ratio": ratio, "interval": [ratio / (1 + spread), ratio * (1 + spread)]}
    found = regression.judge(THEN, now, report="r.json")
    assert found["verdict"] == verdict
    low, high = found["change_interval"]
    assert low < found["change"] < high
    assert found["change"] == pytest.approx(ratio / 0.8)
    # An A/A band as wide as the interval says the same, however narrow the interval is.
    band = [1 / (1 + spread), 1 + spread]
    noisy = {**THEN, "ratio": ratio, "interval": [ratio, ratio], "band": band}
    assert regression.judge(THEN, noisy, report="r.json")["verdict"] == verdict


def test_what_cannot_be_held_against_each_other() -> None:
    with pytest.raises(UsageError, match="measured on cuda, and now on cpu"):
        regression.judge({**THEN, "provider": "cuda"}, THEN, report="r.json")
    found = regression.judge({**THEN, "threads": 1}, THEN, report="r.json")
    assert found["notes"] == ["The earlier measurement had 1 thread, this one 2 threads."]


def test_another_provider_is_refused_before_anything_is_measured(
    tmp_path: Path, quick: list[tuple[Path, Path, float, Any]]
) -> None:
    path = saved(tmp_path, TOKENS)
    report = api.compare(path, path, provider="cpu", parity=False)
    quick.clear()
    assert report.latency is not None
    on_cuda = replace(report, latency={**report.latency, "provider": "cuda"})
    with pytest.raises(UsageError, match="measured on cuda, and now on cpu"):
        api.compare(path, path, provider="cpu", parity=False, against=on_cuda)
    assert quick == []


def test_notes_on_what_is_held_against_an_earlier_report_are_told() -> None:
    found = regression.judge({**THEN, "threads": 1}, THEN, report="r.json")
    assert told_against(found).endswith("had 1 thread, this one 2 threads.")


@pytest.mark.usefixtures("quick")
def test_a_report_to_compare_with_must_have_a_latency(tmp_path: Path) -> None:
    path = saved(tmp_path, TOKENS)
    report = api.compare(path, path, provider="cpu", parity=False, latency=False)
    report.write(tmp_path / "r.json")
    with pytest.raises(UsageError, match="no latency to hold"):
        api.compare(path, path, provider="cpu", parity=False, against=tmp_path / "r.json")
    with pytest.raises(UsageError, match="no latency is measured"):
        api.compare(path, path, provider="cpu", latency=False, against=report)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        Report.read(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="cannot read report"):
        Report.read(tmp_path / "missing.json")
