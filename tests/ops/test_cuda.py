"""The kernels for GPUs, from the source that nvcc compiles, over an emulation of its threads.

Both orders of the threads of a block are run: a barrier that is missing shows in one of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnxnorm
from onnxnorm.errors import ProviderError, UsageError
from onnxnorm.ops import bodies, build, library
from onnxnorm.ops.accuracy import limit, softmax
from onnxnorm.session import open_session
from tests.ops import test_norm as norms
from tests.ops import test_softmax as softmaxes
from tests.ops.calls import FLOAT32, TYPES, Array, assert_expected, model_of, run
from tests.ops.test_build import fuzz, needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation is built on Linux"),
]


@pytest.fixture(scope="session")
def emulated() -> Path:
    """A library that has the kernels for GPUs alone, run by the CPU."""
    built = build.build(build.BUILT, build.Kind.EMULATED)
    assert built.library is not None, built.missing
    return built.library


@pytest.fixture(params=["forward", "reverse"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ONNXNORM_EMULATED_ORDER", request.param)
    return str(request.param)


# shape, axis: each way through the kernels, with tails that fill no warp and no block
SOFTMAX: Final = [
    ((3, 5), 1),  # a row in a warp's registers
    ((2, 3, 129), 2),
    ((7, 1000), -1),
    ((5, 1500), 1),  # a row by a block
    ((2, 70_001), 1),  # split over blocks
    ((2, 21, 50), 1),  # columns, in registers
    ((1, 64, 33), 1),
    ((2, 65, 40), 1),  # and read twice
    ((300, 3), 0),
    ((2, 3, 1, 4), 2),  # an axis of one entry
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SOFTMAX, ids=str)
def test_softmax(
    shape: tuple[int, ...], axis: int, dtype: Any, order: str, emulated: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(shape) * 4).astype(dtype)
    mask = rng.choice([0.0, -1.5, -np.inf], [shape[-1]], p=[0.6, 0.2, 0.2]).astype(dtype)
    mask[:1] = 0
    masked = [values, np.full([1], 0.5, dtype), mask]
    for name, inputs in (("LogSoftmax", [values]), ("MaskedSoftmax", masked)):
        model = model_of(f"TwoPass{name}", inputs, axis=axis)
        found = run(model, inputs, tmp_path, other=emulated)
        assert_expected(found, f"TwoPass{name}", inputs, {"axis": axis})


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [7, 1100, 65_539])
def test_special_values_are_those_of_the_definition(
    n: int, dtype: Any, emulated: Path, tmp_path: Path
) -> None:
    rows = softmaxes.special_rows(n, np.float32)
    with np.errstate(over="ignore"):
        most = limit(dtype)
        rows = np.where(np.isfinite(rows), np.clip(rows, -most, most), rows).astype(dtype)
    if n > 2000:
        rows = rows[[0, 2, 3, 4]]
    for log in (False, True):
        for values, axis in ((rows, 1), (np.ascontiguousarray(rows.T), 0)):
            name = f"TwoPass{'Log' if log else ''}Softmax"
            model = model_of(name, [values], axis=axis)
            found = run(model, [values], tmp_path, other=emulated)
            assert_expected(found, name, [values], {"axis": axis})
            truth = softmax(values, axis, log=log)
            assert np.isnan(truth).any()


# shape, axes
NORMS: Final = [
    ((3, 8), [1]),  # a warp for a row
    ((5, 768), [1]),  # a block, in registers
    ((2, 5000), [1]),  # and read three times
    ((2, 96, 50), [1]),  # columns in registers
    ((1, 300, 40), [1]),  # and read three times
    ((3, 5, 4, 9), [0, 2]),  # axes that are no neighbours
    ((3, 5, 4, 9), [1, 3]),
    ((4, 1, 6), [1]),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "axes"), NORMS, ids=str)
def test_channel_norms(
    shape: tuple[int, ...], axes: list[int], dtype: Any, order: str, emulated: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    values = (rng.standard_normal(shape) * 3 + 100).astype(dtype)
    wide = [s if i in axes else 1 for i, s in enumerate(shape)]
    factors = [rng.standard_normal(wide).astype(dtype) for _ in "gb"]
    for kind, count in (("Layer", 3), ("RMS", 2)):
        name, inputs = f"Channel{kind}Normalization", [values, *factors][:count]
        found = run(model_of(name, inputs, axes=axes), inputs, tmp_path, other=emulated)
        assert_expected(found, name, inputs, {"axes": axes})


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 8), 4), ((1, 12, 9, 7), 12), ((2, 6, 40, 40), 2), ((0, 4, 3), 2)]
)
def test_group_norm(
    dtype: Any, shape: tuple[int, ...], groups: int, emulated: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    inputs = [(rng.standard_normal(shape) * 2 + 1).astype(dtype)]
    inputs += [rng.standard_normal(shape[1]).astype(dtype) for _ in "gb"]
    for name in ("GroupNormalization", "GroupNormalizationSilu"):
        model = model_of(name, inputs, num_groups=groups)
        found = run(model, inputs, tmp_path, other=emulated)
        assert_expected(found, name, inputs, {"num_groups": groups})


def test_nan_and_infinity_stay_in_their_row(emulated: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(8).standard_normal((4, 40)).astype(np.float32)
    values[1, 7], values[2, 3] = np.nan, np.inf
    for axis, turned in ((1, values), (0, np.ascontiguousarray(values.T))):
        inputs = [turned, np.ones(1, np.float32)]
        model = model_of("ChannelRMSNormalization", inputs, axes=[axis])
        found = run(model, inputs, tmp_path, other=emulated)
        found = found if axis == 1 else found.T
        assert np.isnan(found[1]).all()
        assert np.isnan(found[2]).sum() == 1
        assert np.isfinite(found[[0, 3]]).all()


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_type_scale_mask_and_bias(
    data: st.DataObject, emulated: Path, tmp_path: Path
) -> None:
    attributes: dict[str, Any]
    if data.draw(st.booleans()):
        values, axis, mask, factor = data.draw(softmaxes.calls())
        inputs, rank = [values], values.ndim
        log = "Log" if data.draw(st.booleans()) else ""
        name = f"TwoPass{log}Softmax"
        if mask is not None:
            name = f"TwoPassMasked{log}Softmax"
            inputs += [np.full([1], factor, values.dtype), mask]
            rank = max(rank, mask.ndim)
        attributes = {"axis": axis % values.ndim - rank}
    else:
        values, axes, scale, bias = data.draw(norms.calls())
        layer = data.draw(st.booleans())
        name = f"Channel{'Layer' if layer else 'RMS'}Normalization"
        inputs, attributes = [values, scale, bias][: 3 if layer else 2], {"axes": axes}
    found = run(model_of(name, inputs, **attributes), inputs, tmp_path, other=emulated)
    assert_expected(found, name, inputs, attributes)


def test_the_result_does_not_depend_on_the_order_of_threads(
    emulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(1).standard_normal((2, 70_001)).astype(np.float32)
    found = []
    for name in ("forward", "reverse"):
        monkeypatch.setenv("ONNXNORM_EMULATED_ORDER", name)
        model = model_of("TwoPassSoftmax", [values])
        found.append(run(model, [values], tmp_path, other=emulated).tobytes())
    assert found[0] == found[1]


def test_what_cannot_be_computed_is_refused(emulated: Path, tmp_path: Path) -> None:
    inputs = [np.zeros((2, 3), np.float32), np.ones(2, np.float32), np.zeros(3, np.float32)]
    with pytest.raises(Exception, match="has to be one number"):
        run(model_of("TwoPassMaskedSoftmax", inputs), inputs, tmp_path, other=emulated)
    # Every second dimension is normalized, so none of them merge.
    many = np.zeros((2,) * 26, np.int8).astype(np.float32)
    model = model_of(
        "ChannelRMSNormalization", [many, many[:1].ravel()[:1]], axes=[*range(0, 26, 2)]
    )
    with pytest.raises(Exception, match="more than 12 dimensions"):
        run(model, [many, many.ravel()[:1]], tmp_path, other=emulated)


# ** the emulation itself, and the library that nvcc makes **

MISSING: Final = {
    "after a warp's part is written": "  barrier();\n  mine = of_warp[0];",
    "before a warp's memory is used again": "  barrier();  // before the memory is used again\n",
    "after a thread's part is written": "  barrier();\n  const int column",
    "before a column's memory is used again": "  barrier();\n  return joined;",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_barrier_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mutant(tmp_path, monkeypatch, MISSING[name], MISSING[name].replace("barrier();", ""))
    wrong = 0
    for way in ("forward", "reverse"):
        monkeypatch.setenv("ONNXNORM_EMULATED_ORDER", way)
        for shape, axis in (((9, 1500), 1), ((5, 65, 64), 1)):
            values = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 9
            model = model_of("TwoPassSoftmax", [values], axis=axis)
            found = run(model, [values], tmp_path, other=made)
            try:
                assert_expected(found, "TwoPassSoftmax", [values], {"axis": axis})
            except AssertionError:
                wrong += 1
    assert wrong


@pytest.mark.slow
def test_threads_that_leave_others_waiting_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = "      const At at = locate(this->items, n == 0 ? 0 : column);"
    made = mutant(tmp_path, monkeypatch, guard, f"      if (n == 0) return;\n{guard}")
    values = np.zeros((2, 65, 33), np.float32)
    with pytest.raises(Exception, match="wait for others that never come"):
        run(model_of("TwoPassSoftmax", [values], axis=1), [values], tmp_path, other=made)


def mutant(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> Path:
    """The emulated library with one piece of its kernels' text replaced."""
    shutil.copytree(build.SOURCES, folder / "csrc")
    source = folder / "csrc/device_kernels.h"
    text = source.read_text("utf-8")
    assert text.count(old) == 1, old
    source.write_text(text.replace(old, new), "utf-8")
    monkeypatch.setattr(build, "SOURCES", folder / "csrc")
    built = build.build(folder / "built", build.Kind.EMULATED)
    assert built.library is not None, built.missing
    return built.library


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "reverse"])
def test_the_sanitizers_find_nothing(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXNORM_EMULATED_ORDER", way)
    fuzz(tmp_path, ["baseline"], 300, kind=build.Kind.EMULATED)


needs_cuda_library = pytest.mark.skipif(
    library.describe_cuda().path is None, reason="the library with CUDA kernels was not built"
)


@needs_cuda_library
def test_the_cuda_library_loads_without_a_gpu_and_has_the_cpu_kernels(tmp_path: Path) -> None:
    there = library.describe_cuda()
    assert there.path is not None
    assert set(there.operators) == set(bodies.OPERATORS)
    assert {"sm_80", "sm_90"} <= set(there.architectures)
    values = np.random.default_rng(0).standard_normal((2, 5, 70)).astype(np.float32)
    model = model_of("TwoPassSoftmax", [values], axis=1)
    found = run(model, [values], tmp_path, other=there.path)
    assert_expected(found, "TwoPassSoftmax", [values], {"axis": 1})
    with open_session(
        tmp_path / "model.onnx", libraries=[there.path], optimized_model_path=tmp_path / "o.onnx"
    ) as session:
        assert session.placement == {"CPUExecutionProvider": 1}


@needs_cuda_library
def test_the_cuda_library_needs_no_other_and_exports_as_little() -> None:
    path = str(library.describe_cuda().path)
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("no binutils")
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", dynamic.stdout))
    assert needed <= {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64"}
    listed = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines() if " T " in line}
    assert names == {"RegisterCustomOps", "onnxnorm_ops_describe", "onnxnorm_ops_select"}


def test_without_nvcc_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc", lambda: None)
    built = build.build(tmp_path, build.Kind.CUDA)
    assert built.library is None
    assert "no nvcc was found" in built.missing[0]
    monkeypatch.setattr(build, "BUILT", tmp_path)
    monkeypatch.setattr(build, "build", lambda _, kind: build.Built(None, (f"no {kind.name}",)))
    assert build.main(["--cuda"]) == build.NOT_BUILT
    assert build.main(["--nothing"]) == 2


def test_it_is_said_that_no_gpu_has_run_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = library.Library(Path("library.so"), architectures=("sm_80", "sm_90"))
    monkeypatch.setattr(library, "describe_cuda", lambda: there)
    monkeypatch.setattr(library, "EVIDENCE", tmp_path / "evidence.json")
    line = library.summary(library.describe())[-1]
    assert line.startswith(
        "CUDA kernels: library.so (sm_80, sm_90); never run on a GPU; off unless"
    )
    for sources, said in (
        (build.device_digest(), "H100 on 2026-01-02; off"),
        ("x", "changed since"),
    ):
        library.EVIDENCE.write_text(
            f'{{"device": "H100", "date": "2026-01-02", "sources": "{sources}"}}', "utf-8"
        )
        assert said in library.summary(library.describe())[-1]
    monkeypatch.setattr(library, "describe_cuda", lambda: library.Library(None, missing=("why",)))
    assert library.summary(library.describe())[-1] == "CUDA kernels: not built (why)"
    with pytest.raises(ProviderError, match="no operator library with CUDA kernels: why"):
        library.required(cuda_kernels=True)


def test_they_are_used_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.zeros((1, 3, 16, 16), np.float32)
    model = standard(values)
    wrong: tuple[dict[str, Any], ...] = (
        {"target": "ort-cuda", "ops": True},
        {"cuda_kernels": True},
        {"target": "ort-cpu", "ops": True, "cuda_kernels": True},
    )
    for given_options in wrong:
        with pytest.raises(UsageError, match=r"--ops was given|--cuda-kernels was given"):
            onnxnorm.inspect(model, **given_options)
    asked: dict[str, Any] = {"target": "ort-cuda", "ops": True, "cuda_kernels": True}
    monkeypatch.setattr(library, "describe_cuda", lambda: library.Library(None, missing=("why",)))
    (row,) = onnxnorm.inspect(model, **asked).to_json()["norms"]
    assert row["action"] == "refused"
    assert "the operator library is not there: why" in row["reason"]
    there = library.Library(Path("library.so"), operators=tuple(bodies.OPERATORS))
    monkeypatch.setattr(library, "describe_cuda", lambda: there)
    done = onnxnorm.optimize(model, latency=False, **asked, provider="cpu")
    assert [node.op_type for node in done.model.graph.node] == ["TwoPassSoftmax"]
    assert any("kernels for GPUs were not tried" in note for note in done.report.notes)


def standard(values: Array) -> Any:
    """A model of one Softmax over the channels."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Softmax", ["X0"], ["Y"], axis=1)],
        "one",
        [helper.make_tensor_value_info("X0", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, values.shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_half_precision_of_the_emulation_is_that_of_numpy(emulated: Path, tmp_path: Path) -> None:
    """Every float16 goes in and comes out; so does what lies between two of them."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(np.float16).reshape(1, -1, 1)
    values = np.where(np.isfinite(values), values, np.float16(1))
    ones = [np.ones(1, np.float16), np.zeros(1, np.float16)]
    model = model_of("TwoPassMaskedLogSoftmax", [values, *ones], axis=2)  # 0 for a single value
    found = run(model, [values, *ones], tmp_path, other=emulated)
    np.testing.assert_array_equal(found, np.zeros_like(values))
    # y = x / sqrt(0 + epsilon) for a single value is x scaled; RMS norm of it is its sign
    model = model_of("ChannelRMSNormalization", [values, ones[0]], axes=[2], epsilon=1.0)
    found = run(model, [values, ones[0]], tmp_path, other=emulated)
    assert_expected(
        found, "ChannelRMSNormalization", [values, ones[0]], {"axes": [2], "epsilon": 1.0}
    )


def test_the_describe_of_the_emulated_library(emulated: Path) -> None:
    native = ctypes.CDLL(os.fspath(emulated))
    native.onnxnorm_ops_describe.restype = ctypes.c_char_p
    assert b'"architectures": []' in native.onnxnorm_ops_describe()
    assert FLOAT32 in TYPES
