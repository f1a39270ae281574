"""The comparison with other tools judges results and not words, and survives what a tool does."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from models.spellings import Case, cases
from tools import bench_inspect, recall, recall_worker

CASES = {case.name: case for case in cases(by_chance=0)}
PLAIN = CASES["layer_norm/torch_script/float32-op13-symbolic"]
NEAR = CASES["layer_norm/near/pow4/op13"]

TOOL = """
import json, sys
for name in sys.stdin.read().split():
    print(json.dumps({"begin": name}), flush=True)
    if name == "dies":
        sys.exit(3)
    if name == "hangs":
        import time
        time.sleep(60)
    print(json.dumps({"end": name, "error": "refused" if name == "fails" else None}), flush=True)
"""


def test_a_tool_that_dies_or_hangs_is_begun_again_behind_that_model() -> None:
    names = ["one", "dies", "two", "hangs", "fails", "three"]
    found = dict(recall.attempts([sys.executable, "-c", TOOL], names, seconds=6.0))
    assert found == {
        "one": None,
        "dies": "the process ended with 3",
        "two": None,
        "hangs": "no answer within 6 s",
        "fails": "refused",
        "three": None,
    }


def test_a_tool_that_does_not_start_fails_every_model() -> None:
    found = dict(recall.attempts([sys.executable, "-c", "raise SystemExit(4)"], ["a", "b"], 3.0))
    assert found == dict.fromkeys("ab", "the process ended with 4")


def fused(case: Case) -> onnx.ModelProto:
    """The case's model with one operator instead of all nodes, if it were a layer norm."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    del model.graph.node[:]
    names = [t.name for t in model.graph.initializer]
    gamma = next(n for n in names if n.startswith("gamma"))
    beta = next(n for n in names if n.startswith("beta"))
    output = model.graph.output[0].name
    node = helper.make_node("LayerNormalization", ["x", gamma, beta], [output], epsilon=1e-5)
    model.graph.node.append(node)
    model.opset_import[0].version = 17
    return model


def test_raised_is_an_operator_and_nothing_left_of_the_chain() -> None:
    assert not recall.is_raised(PLAIN.model, PLAIN)
    assert recall.is_raised(fused(PLAIN), PLAIN)
    partly = fused(PLAIN)
    partly.graph.node.insert(0, helper.make_node("ReduceMean", ["x"], ["m"]))
    assert not recall.is_raised(partly, PLAIN)
    assert recall.is_positive(PLAIN)
    assert not recall.is_positive(NEAR)
    assert not recall.is_positive(CASES["layer_norm/operator-1-both/op17"])


def test_a_fused_near_miss_is_wrong_and_a_fused_norm_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = recall.prepare(tmp_path / "cases", {"good": PLAIN, "near": NEAR})
    assert all(far is not None and far < 1e-4 for far in bench.baselines.values())
    # a tool that makes a layer norm of everything
    for name, case in bench.cases.items():
        onnx.save(fused(case), tmp_path / f"{name}.onnx")
    script = tmp_path / "eager.py"
    script.write_text(
        "import json, shutil, sys\n"
        "for name in sys.stdin.read().split():\n"
        "    print(json.dumps({'begin': name}))\n"
        f"    shutil.copy({str(tmp_path)!r} + f'/{{name}}.onnx', sys.argv[3])\n"
        "    print(json.dumps({'end': name, 'error': None}))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(recall, "WORKER", script)
    outcomes = recall.others(bench, "eager", Path(sys.executable))
    assert outcomes["good"].agrees is True
    assert outcomes["near"].agrees is False
    assert recall.summarise(bench, outcomes) == recall.Sums(1, 0, 1, 0)
    table = recall.tables(bench, {"onnxsim": outcomes}, {"onnxsim": "1.0"})
    assert "| onnxsim | 1.0 | 1 | 0 | 1 | 0 |" in table
    assert recall._PENDING in table


def test_ours_is_judged_by_its_rows(tmp_path: Path) -> None:
    operator = CASES["layer_norm/operator-1-both/op17"]
    bench = recall.prepare(tmp_path / "cases", {"operator": operator})
    outcome = recall.ours(bench)["operator"]
    assert (outcome.error, outcome.raised, outcome.agrees) == (None, True, True)


def test_the_distance_sees_shapes_and_what_is_not_finite() -> None:
    one = np.array([1.0, -2.0])
    assert recall.distance([one], [one]) == 0.0
    assert recall.distance([one + 0.02], [one]) == pytest.approx(0.01)
    assert recall.distance([one[None]], [one]) == np.inf
    assert recall.distance([], [one]) == np.inf
    assert recall.distance([np.array([1.0, np.nan])], [one]) == np.inf
    assert recall.distance([np.array([1.0, np.inf])], [np.array([1.0, np.inf])]) == 0.0


def test_every_tool_but_ours_has_a_worker() -> None:
    assert set(recall.TOOLS) == {recall.OURS, *recall_worker.TOOLS}
    assert recall_worker.versions()["onnx"] == onnx.__version__


def test_the_stack_is_as_large_as_asked_and_valid() -> None:
    model, norms = bench_inspect.stack(600)
    onnx.checker.check_model(model, full_check=True)
    assert 600 <= len(model.graph.node) < 700
    assert norms == sum(n.op_type == "Erf" for n in model.graph.node) * 3
