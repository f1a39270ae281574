"""The script for a machine with a GPU, over the emulated kernels: it finds what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxnorm.ops import accuracy, bodies, build, library
from onnxnorm.session import open_session, resolve_provider
from tests.ops.test_build import needs_compiler
from tools import gpu_check

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is built on Linux"),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifteenth call, and one rival."""
    calls, rivals = gpu_check.calls, gpu_check.rivals

    def some(*, small: bool) -> Iterator[gpu_check.Call]:
        return islice(calls(small=small), 0, None, 15)

    monkeypatch.setattr(gpu_check, "calls", some)
    monkeypatch.setattr(gpu_check, "rivals", lambda *, small: islice(rivals(small=small), 1))


@pytest.mark.usefixtures("few")
def test_a_dry_run_leaves_evidence(tmp_path: Path) -> None:
    target = tmp_path / "evidence.json"
    arguments = ["--dry-run", "--seconds", "0.5", "--evidence", str(target)]
    assert gpu_check.main(arguments) == 0
    found = json.loads(target.read_text("utf-8"))
    assert found["dry_run"] is True
    assert found["sources"] == build.device_digest()
    assert found["failed"] == {"build": 0, "parity": 0}
    called = len(list(gpu_check.calls(small=True)))
    assert len(found["checks"]["parity"]) == called >= 10, "some calls were not checked"
    assert len(found["latency"]) == 1
    assert found["latency"][0]["ratio"] > 0
    assert not library.EVIDENCE.exists(), "a dry run is no evidence of a run on a GPU"


def test_every_operator_is_called_in_every_type() -> None:
    called = {(call.name, str(call.inputs[0].dtype)) for call in gpu_check.calls(small=True)}
    assert called == {(name, dtype) for name in bodies.OPERATORS for dtype in gpu_check.TYPES}
    timed = {call.name for call, _ in gpu_check.rivals(small=True)}
    assert timed == {"TwoPassSoftmax", "ChannelLayerNormalization", "GroupNormalization"}


@pytest.mark.usefixtures("few")
def test_a_wrong_result_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*given: Any, **how: Any) -> Any:
        truth, tolerance = expected(*given, **how)
        return truth + 1, tolerance

    expected = accuracy.expected
    monkeypatch.setattr(accuracy, "expected", shifted)
    target = tmp_path / "evidence.json"
    arguments = ["--dry-run", "--seconds", "0.5", "--evidence", str(target)]
    assert gpu_check.main(arguments) == 1
    found = json.loads(target.read_text("utf-8"))
    assert found["failed"]["parity"] == len(found["checks"]["parity"]) > 0


def test_a_body_in_the_kernels_place_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = next(iter(gpu_check.calls(small=True)))
    built = gpu_check.kernels_of(dry=True)
    assert built.library is not None
    assert gpu_check.check_call(call, "cpu", built.library, tmp_path).holds
    monkeypatch.setattr(
        gpu_check,
        "open_session",
        lambda *given, **how: open_session(*given, **(how | {"libraries": []})),
    )
    row = gpu_check.check_call(call, "cpu", built.library, tmp_path)
    assert not row.holds
    assert row.seen.startswith("the body ran")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if resolve_provider("auto") == "cuda":
        pytest.skip("there is a GPU")
    assert gpu_check.main([]) == 2
    assert "the cuda provider is not usable" in capsys.readouterr().err


def test_the_rivals_compute_the_same(tmp_path: Path) -> None:
    built = gpu_check.kernels_of(dry=True)
    assert built.library is not None
    compared = set()
    for call, nodes in gpu_check.rivals(small=True):
        if call.inputs[0].size > 200_000:
            continue
        results = []
        for model in (gpu_check.ours(call), gpu_check.model_of(nodes, call)):
            path = tmp_path / "model.onnx"
            path.write_bytes(model.SerializeToString())
            with open_session(path, libraries=[built.library]) as session:
                feeds = {f"X{i}": array for i, array in enumerate(call.inputs)}
                results.append(session.run(feeds)["Y"])
        truth, tolerance = accuracy.expected(
            call.name, call.inputs, call.attributes, corrected=False, run=call.inputs[0].size
        )
        for result in results:
            assert accuracy.excess(np.asarray(result), truth, tolerance) is None
        compared.add(call.name)
    assert compared == {call.name for call, _ in gpu_check.rivals(small=True)}
