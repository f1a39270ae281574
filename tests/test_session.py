"""Run models in onnxruntime: values of every kind, rejections in one line, honest providers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from onnxnorm import session
from onnxnorm.errors import ModelError, ProviderError, RuntimeRejection, UsageError
from onnxnorm.session import Session, ValueInfo, open_session

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
NEW = '<ir_version: 10, opset_import: ["" : 21]>'
RELU = "main (float[N,3] x) => (float[N,3] y) { y = Relu (x) }"
MATMUL = "main (float[N,K] a, float[K,M] b) => (float[N,M] y) { [product] y = MatMul (a, b) }"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str, head: str = HEAD, name: str = "model.onnx") -> Path:
        path = tmp_path / name
        onnx.save(onnx.parser.parse_model(f"{head} {text}"), path)
        return path

    return to_file


def same(found: Any, wanted: NDArray[Any]) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


# -- values ------------------------------------------------------------------------------------


def test_outputs_come_by_name_in_the_models_order(write: Write) -> None:
    path = write("main (float[N,2] x) => (float[N,2] b, float[N,2] a) { a = Neg (x) b = Abs (x) }")
    with open_session(path) as opened:
        assert opened.inputs == (ValueInfo("x", "tensor(float)", ("N", 2)),)
        assert opened.provider == "cpu"
        outputs = opened.run({"x": np.array([[1, -2]], np.float32)})
    assert list(outputs) == ["b", "a"]
    same(outputs["b"], np.array([[1, 2]], np.float32))
    same(outputs["a"], np.array([[-1, 2]], np.float32))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (1, 3)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
        ("float8e5m2", ml_dtypes.float8_e5m2),
        ("double", np.float64),
        ("int8", np.int8),
        ("uint64", np.uint64),
        ("bool", np.bool_),
    ],
)
def test_every_element_type_goes_in_and_comes_out(
    write: Write, name: str, dtype: Any, shape: tuple[int, ...]
) -> None:
    path = write(f"main ({name}[N,3] x) => ({name}[N,3] y) {{ y = Identity (x) }}", NEW)
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    with open_session(path) as opened:
        assert opened.inputs[0].dtype == np.dtype(dtype)
        same(opened.run({"x": x})["y"], x)
        opened.bind({"x": x})()


@pytest.mark.parametrize(
    ("name", "dtype", "number"),
    [
        ("int4", ml_dtypes.int4, onnx.TensorProto.INT4),
        ("uint4", ml_dtypes.uint4, onnx.TensorProto.UINT4),
    ],
)
def test_packed_types_go_in_and_come_out(write: Write, name: str, dtype: Any, number: int) -> None:
    path = write(
        f"main ({name}[N,5] x, float s) => (float[N,5] y, {name}[N,5] z)"
        f"{{ y = DequantizeLinear (x, s) z = QuantizeLinear <output_dtype = {number}> (y, s) }}",
        NEW,
    )
    x = (np.arange(15).reshape(3, 5) - (8 if name == "int4" else 0)).astype(dtype)
    with open_session(path) as opened:
        outputs = opened.run({"x": x, "s": 1.0})
    same(outputs["y"], x.astype(np.float32))
    same(outputs["z"], x)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_packing_is_undone_by_unpacking(bits: int, count: int) -> None:
    codes = (np.arange(count) % (1 << bits)).astype(np.uint8)
    packed = session._pack(codes, bits)
    assert packed.size == -(-count * bits // 8)
    same(session._unpack(packed, bits, count), codes)


def test_the_first_element_is_in_the_low_bits() -> None:
    same(session._pack(np.array([1, 2, 3], np.uint8), 4), np.array([0x21, 0x03], np.uint8))


def test_an_array_in_another_order_is_the_same_array(write: Write) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    with open_session(write(RELU)) as opened:
        same(opened.run({"x": np.asfortranarray(x)})["y"], x)
        same(opened.run({"x": x[::-2]})["y"], np.ascontiguousarray(x[::-2]))
        same(opened.run({"x": x.astype(">f4")})["y"], x)


def test_a_python_number_takes_the_inputs_type(write: Write) -> None:
    with open_session(write("main (float x) => (float y) { y = Neg (x) }")) as opened:
        same(opened.run({"x": 2})["y"], np.array(-2, np.float32))


def test_strings(write: Write) -> None:
    path = write("main (string[N] x) => (string[N] y) { y = Identity (x) }")
    with open_session(path) as opened:
        assert opened.run({"x": np.array(["a", "é"])})["y"].tolist() == ["a", "é"]
        assert opened.run({"x": np.array(["a", "é"], object)})["y"].tolist() == ["a", "é"]
        opened.bind({"x": np.array(["a"])})()


def test_sequences_maps_and_optionals(write: Write) -> None:
    ones = np.ones((2, 3), np.float32)
    path = write("main (seq(float[N,3]) x) => (seq(float[N,3]) y) { y = Identity (x) }")
    with open_session(path) as opened:
        found = opened.run({"x": [ones, ones[:1]]})["y"]
        assert [part.shape for part in found] == [(2, 3), (1, 3)]
        opened.bind({"x": [ones]})()
    path = write(
        "main (optional(float[N,3]) x) => (bool y, optional(float[N,3]) z)"
        "{ y = OptionalHasElement (x) z = Identity (x) }"
    )
    with open_session(path) as opened:
        assert opened.run({"x": None})["z"] is None
        assert not opened.run({})["y"]
        same(opened.run({"x": ones})["z"], ones)
    path = write(
        "main (float[N,2] x) => (seq(map(int64, float)) y)"
        "{ y = ai.onnx.ml.ZipMap <classlabels_int64s = [3, 4]> (x) }",
        '<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>',
    )
    with open_session(path) as opened:
        assert opened.outputs[0].dtype is None
        assert opened.run({"x": np.array([[0.5, 2]], np.float32)})["y"] == [{3: 0.5, 4: 2.0}]


MIXED = (
    "main (bfloat16[N] x, {input}[N] t) => (seq(float[N]) s, bfloat16[N] y, {input}[N] u)"
    "{{ f = Cast <to = 1> (x) s = SequenceConstruct (f, f) y = Identity (x) u = Identity (t) }}"
)


def test_a_bfloat16_output_beside_a_sequence(write: Write) -> None:
    x = np.array([1.5, 2], ml_dtypes.bfloat16)
    with open_session(write(MIXED.format(input="float"))) as opened:
        outputs = opened.run({"x": x, "t": np.zeros(2, np.float32)})
        opened.bind({"x": x, "t": np.zeros(2, np.float32)})()
    same(outputs["y"], x)
    same(outputs["s"][1], x.astype(np.float32))


def test_a_bfloat16_output_beside_a_string_input_is_refused_in_words(write: Write) -> None:
    with open_session(write(MIXED.format(input="string"))) as opened:
        x = np.array([1.5], ml_dtypes.bfloat16)
        with pytest.raises(RuntimeRejection, match="cannot pass both"):
            opened.run({"x": x, "t": np.array(["a"])})


def test_an_initializer_that_is_an_input_may_be_fed(tmp_path: Path) -> None:
    text = f"{HEAD} main (float[2] x) => (float[2] y) <float[2] w = {{1, 2}}> {{ y = Add (x, w) }}"
    model = onnx.parser.parse_model(text)
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [2]))
    onnx.save(model, tmp_path / "model.onnx")
    x = np.zeros(2, np.float32)
    with open_session(tmp_path / "model.onnx") as opened:
        assert [value.name for value in opened.inputs] == ["x"]
        same(opened.run({"x": x})["y"], np.array([1, 2], np.float32))
        same(opened.run({"x": x, "w": x})["y"], x)
        opened.bind({"x": x, "w": x})()


def test_external_data_is_found_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = onnx.numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")
    model = onnx.parser.parse_model(
        f"{HEAD} main (float[3] x) => (float[3] y) {{ y = Add (x, w) }}"
    )
    model.graph.initializer.append(weight)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    monkeypatch.chdir("/")
    with open_session(tmp_path / "m.onnx") as opened:
        same(opened.run({"x": np.zeros(3, np.float32)})["y"], np.arange(3, dtype=np.float32))


# -- options -----------------------------------------------------------------------------------

TWICE = "main (float[3] x) => (float[3] y) { a = Identity (x) y = Relu (a) }"


@pytest.mark.parametrize(("optimize", "left"), [(True, ["Relu"]), (False, ["Identity", "Relu"])])
def test_optimizations_are_all_or_none(
    write: Write, tmp_path: Path, optimize: bool, left: list[str]
) -> None:
    really = tmp_path / "really.onnx"
    with open_session(write(TWICE), optimize=optimize, optimized_model_path=really) as opened:
        # onnxruntime tells where nodes are since 1.24.
        told = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
        assert opened.placement == ({"CPUExecutionProvider": len(left)} if told else {})
    assert [node.op_type for node in onnx.load(really).graph.node] == left


def test_a_graph_without_nodes_has_nothing_to_place(write: Write) -> None:
    with open_session(write("main (float[2] x) => (float[2] x) { }")) as opened:
        assert opened.placement == {}
        x = np.ones(2, np.float32)
        same(opened.run({"x": x})["x"], x)


def test_a_seed_fixes_random_operators(write: Write) -> None:
    path = write("main () => (float[8] y) { y = RandomNormal <shape = [8]> () }")
    drawn = []
    for seed in (1, 1, 2):
        with open_session(path, seed=seed) as opened:
            drawn.append(opened.run({})["y"].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_bound_run_survives_outputs_of_changing_shape(write: Write) -> None:
    path = write(
        "main () => (int64[1, M] y) { r = RandomNormal <shape = [64]> () p = Relu (r)"
        " y = NonZero (p) }"
    )
    with open_session(path) as opened:
        sizes = {opened.run({})["y"].shape[1] for _ in range(20)}
        assert len(sizes) > 1
        bound = opened.bind({})
        for _ in range(20):
            bound()


def test_options_are_passed_on(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = onnxruntime.InferenceSession

    def spy(path: str, options: Any, **rest: Any) -> Any:
        seen.append((options.intra_op_num_threads, options, rest))
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    open_session(write(RELU), threads=1)
    open_session(write(RELU), optimize=False, deterministic=False)
    assert [threads for threads, _, _ in seen] == [1, 0]
    levels = onnxruntime.GraphOptimizationLevel
    wanted = [levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL]
    assert [options.graph_optimization_level for _, options, _ in seen] == wanted
    assert [options.use_deterministic_compute for _, options, _ in seen] == [True, False]
    for _, options, rest in seen:
        assert options.log_severity_level == 4
        assert rest == {"providers": ["CPUExecutionProvider"], "enable_fallback": 0}


def test_options_that_do_not_exist(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        open_session(write(RELU), threads=0)
    with pytest.raises(UsageError, match="no provider 'tpu'"):
        open_session(write(RELU), provider="tpu")
    with pytest.raises(ModelError, match="no such file"):
        open_session(tmp_path / "absent.onnx")


# -- rejections --------------------------------------------------------------------------------


def rejection(call: Callable[[], object]) -> RuntimeRejection:
    with pytest.raises(RuntimeRejection) as caught:
        call()
    error = caught.value
    assert "ONNXRuntimeError" not in error.what
    assert "onnxruntime_src" not in error.what
    assert "\n" not in error.what
    assert error.hint.endswith(".")
    return error


@pytest.mark.parametrize(
    ("text", "head", "reason", "hint"),
    [
        (
            "main (float x) => (float y) { y = Nope (x) }",
            HEAD,
            "No Op registered for Nope",
            "opset",
        ),
        (
            "main (float x) => (float y) { y = my.Nope (x) }",
            '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>',
            "my:Nope(-1) is not a registered function/op",
            "library",
        ),
        (
            "main (int4[2] x) => (int4[2] y) { y = Identity (x) }",
            NEW,
            "Could not find an implementation for Identity",
            "no kernel",
        ),
        (RELU, '<ir_version: 99, opset_import: ["" : 17]>', "IR version: 99", "Update onnxruntime"),
        (RELU, '<ir_version: 8, opset_import: ["" : 99]>', "Opset 99", "Update onnxruntime"),
        (RELU.replace("Relu (x)", "Relu (z)"), HEAD, "input 'z' is not a graph input", "checker"),
        (
            "main (float[2] x) => (float[2] y) { a = Neg (y) y = Add (a, x) }",
            HEAD,
            "the graph is not acyclic",
            "checker",
        ),
    ],
)
def test_what_cannot_be_loaded(
    write: Write, text: str, head: str, reason: str, hint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(text, head)
    error = rejection(lambda: open_session(path))
    assert error.what.startswith(f"{path}: onnxruntime cannot load it: ")
    assert reason in error.what
    assert hint in error.hint
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a protobuf")
    assert "Protobuf parsing failed" in rejection(lambda: open_session(path)).what


def test_a_library_that_is_none(write: Write, tmp_path: Path) -> None:
    library = tmp_path / "ops.so"
    library.write_bytes(b"no library")
    error = rejection(lambda: open_session(write(RELU), libraries=[library]))
    assert "ops.so" in error.what
    assert "operator library" in error.hint


@pytest.mark.parametrize(
    ("feeds", "what", "hint"),
    [
        ({"a": (2, 3), "b": (2, 3)}, "MatMul node 'product': ", "other inputs"),
        ({"a": (2, 3)}, "no value for input 'b' (tensor(float))", "[K, M]"),
        ({"a": (2, 3), "b": (3, 2), "c": (1,)}, "the model has no input 'c'", "a, b"),
        ({"a": (2,), "b": (2, 3)}, "Invalid rank for input: a Got: 1 Expected: 2", "shape"),
    ],
)
def test_feeds_that_do_not_fit(
    write: Write,
    feeds: dict[str, tuple[int, ...]],
    what: str,
    hint: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in feeds.items()}
    with open_session(write(MATMUL)) as opened:
        for call in (lambda: opened.run(arrays), lambda: opened.bind(arrays)()):
            error = rejection(call)
            assert what in error.what
            assert hint in error.hint
    assert capfd.readouterr() == ("", "")


def test_feeds_of_another_type(write: Write) -> None:
    with open_session(write(RELU)) as opened:
        feeds = {"x": np.ones((1, 3))}
        assert "tensor(double)" in rejection(lambda: opened.run(feeds)).what
        assert "float64" in rejection(lambda: opened.bind(feeds)).what
    path = write("main (bfloat16[3] x) => (bfloat16[3] y) { y = Identity (x) }")
    with open_session(path) as opened:
        error = rejection(lambda: opened.run({"x": np.ones(3, np.float32)}))
        assert "bfloat16" in error.what
        assert "ml_dtypes.bfloat16" in error.hint


def test_a_closed_session_says_so(write: Write) -> None:
    with open_session(write(RELU)) as opened:
        pass
    assert "is closed" in rejection(lambda: opened.run({})).what


BROKEN_RESHAPE = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape "
    "node. Name:'r1' Status Message: /onnxruntime_src/core/reshape_helper.h:91 "
    "onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, "
    "std::function<void(int)>) const [with T = float] size was false. {2,4} to {3,3}\n"
)
NO_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: "
    "/src/bfc_arena.cc:359 void* onnxruntime::BFCArena::Allocate(size_t) Failed to "
    "allocate memory for requested buffer of size 1024"
)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /a/b failed:Fatal error: it broke",
            "Fatal error: it broke",
        ),
        (BROKEN_RESHAPE, "Reshape node 'r1': size was false. {2,4} to {3,3}"),
        (NO_MEMORY, "Failed to allocate memory for requested buffer of size 1024"),
        ("add.cc:12 Compute (a) is wrong", "Compute (a) is wrong"),
        ("", ""),
    ],
)
def test_the_reason_is_what_a_reader_needs(message: str, reason: str) -> None:
    assert session._reason(message) == reason


def test_an_error_without_words_has_its_kind(tmp_path: Path) -> None:
    wanted = pytest.raises(RuntimeRejection, match="cannot run it: ZeroDivisionError")
    with wanted, session.rejections(tmp_path, "run"):
        raise ZeroDivisionError


def test_running_out_of_memory_is_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), session.rejections(tmp_path, "run"):
        raise MemoryError


# -- silence -----------------------------------------------------------------------------------

RECORD = (
    "\\x1b[0;93m2026-01-01 00:00:00.000000000 [W:onnxruntime:Default, device_discovery.cc:1 f] "
    "GPU device discovery failed: no card\\x1b[m"
)


@pytest.mark.parametrize("first", [True, False])
def test_importing_onnxruntime_says_nothing_and_hides_nothing(tmp_path: Path, first: bool) -> None:
    (tmp_path / "onnxruntime.py").write_text(
        textwrap.dedent(
            f"""
            import os, sys, warnings
            __version__ = "0"
            os.write(2, "{RECORD}\\n".encode())
            os.write(2, b"[E:onnxruntime:, x.cc:1 f] without colour\\n")
            os.write(2, b"of another library\\n")
            print("of Python", file=sys.stderr)
            warnings.warn("of an author")
            """
        )
    )
    program = "from onnxnorm import session; print(session._onnxruntime().__version__)"
    if not first:
        program = f"import onnxruntime; {program}"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "0\n"
    for kept in ("of another library\n", "of Python\n", "UserWarning: of an author"):
        assert kept in found.stderr
    assert ("onnxruntime:" in found.stderr) is not first
    assert ("\x1b" in found.stderr) is not first


def test_an_import_that_fails_is_a_provider_error(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libpython is odd')")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from onnxnorm import errors, session\n"
        "try: session.resolve_provider('auto')\n"
        "except errors.ProviderError as error: print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    what, hint = found.stdout.splitlines()
    assert what == "onnxruntime cannot be imported: libpython is odd"
    assert "pip install" in hint


@pytest.mark.parametrize("decided", [None, "0"])
def test_telemetry_is_off_unless_the_user_decided(tmp_path: Path, decided: str | None) -> None:
    (tmp_path / "onnxruntime.py").write_text(
        "import os; __version__ = os.environ['ORT_DISABLE_TELEMETRY']"
    )
    program = (
        f"import os, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from onnxnorm import session\n"
        "print(session.runtime_version(), os.environ.get('ORT_DISABLE_TELEMETRY'))"
    )
    inherited = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    given = {} if decided is None else {"ORT_DISABLE_TELEMETRY": decided}
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, **given},
    )
    assert found.stdout.split() == (["1", "None"] if decided is None else [decided, decided])


def test_onnxruntime_leaves_no_file(write: Write, tmp_path: Path) -> None:
    path = write(RELU)
    folders = {name: tmp_path / name for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME")}
    for folder in folders.values():
        folder.mkdir()
    inherited = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"from onnxnorm import session; session.open_session({str(path)!r})",
        ],
        check=True,
        env={**inherited, **{name: str(folder) for name, folder in folders.items()}},
    )
    assert [list(folder.iterdir()) for folder in folders.values()] == [[], [], []]


def test_the_process_wide_logger_is_silent_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    fake = SimpleNamespace(set_default_logger_severity=levels.append)
    monkeypatch.setattr(session, "_onnxruntime", lambda: fake)
    with session._quiet():
        inner = threading.Thread(target=_enter_and_leave)
        inner.start()
        inner.join()
        assert levels == [4, 4]
    assert levels == [4, 4, 2]


def _enter_and_leave() -> None:
    with session._quiet():
        pass


def test_models_that_load_print_nothing(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    # An unused initializer and a stale shape: onnxruntime warns of both.
    path = write("main (float[2] x) => (float[3] y) <float[1] unused = {1}> { y = Relu (x) }")
    with open_session(path) as opened:
        opened.run({"x": np.ones(2, np.float32)})
    assert capfd.readouterr() == ("", "")


# -- providers ---------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A machine as described, and the calls of onnxruntime.preload_dlls."""

    def describe(
        providers: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider"),
        driver: session._Driver | None = None,
        libraries: tuple[str, ...] = (),
        cuda: str = "13.0",
    ) -> list[str]:
        calls: list[str] = []

        def preload() -> None:
            calls.append("preload")
            print("Failed to load something")

        fake = SimpleNamespace(
            __version__="1.99",
            package_name="onnxruntime-gpu" if cuda else "onnxruntime",
            cuda_version=cuda,
            get_available_providers=lambda: list(providers),
            preload_dlls=preload,
            set_default_logger_severity=lambda level: None,
        )
        monkeypatch.setattr(session, "_onnxruntime", lambda: fake)
        present = session._Driver(13000, ("H1",), None, 1 << 30)
        monkeypatch.setattr(session, "_driver", lambda: driver or present)
        monkeypatch.setattr(session, "_missing_libraries", lambda major: libraries)
        return calls

    return describe


def test_cuda_is_used_where_all_is_there(
    machine: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    calls = machine()
    assert session.resolve_provider("auto") == "cuda"
    assert session.resolve_provider("cuda") == "cuda"
    assert session.resolve_provider("cpu") == "cpu"
    assert calls == ["preload", "preload"]
    assert session.device_memory() == 1 << 30
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("lack", "named", "hint"),
    [
        (
            {"providers": ("CPUExecutionProvider",), "cuda": ""},
            ["wheel onnxruntime 1.99"],
            "onnxruntime-gpu",
        ),
        (
            {"driver": session._Driver(0, (), "the NVIDIA driver (libcuda.so.1)")},
            ["CUDA 13.0 and cuDNN 9", "missing here: the NVIDIA driver (libcuda.so.1)"],
            "Install an NVIDIA driver that supports CUDA 13",
        ),
        (
            {"driver": session._Driver(12080, ("old",), None)},
            ["a driver for CUDA 13 (this one supports 12.8)"],
            "Update the NVIDIA driver",
        ),
        (
            {"driver": session._Driver(13000, (), "a CUDA device (the driver sees none)")},
            ["a CUDA device (the driver sees none)"],
            "Install an NVIDIA driver",
        ),
        (
            {"libraries": ("libcudart (libcudart.so.13)", "cuDNN (libcudnn.so.9)")},
            ["libcudart (libcudart.so.13), cuDNN (libcudnn.so.9)"],
            "Pip install 'onnxnorm[cuda]'",
        ),
        (
            {
                "driver": session._Driver(0, (), "the NVIDIA driver (libcuda.so.1)"),
                "libraries": ("cuDNN (libcudnn.so.9)",),
            },
            ["the NVIDIA driver (libcuda.so.1), cuDNN (libcudnn.so.9)"],
            "pip install 'onnxnorm[cuda]'",
        ),
    ],
)
def test_what_cuda_lacks_is_named(
    machine: Callable[..., list[str]], lack: dict[str, Any], named: list[str], hint: str
) -> None:
    calls = machine(**lack)
    assert session.resolve_provider("auto") == "cpu"
    with pytest.raises(ProviderError) as caught:
        session.resolve_provider("cuda")
    for text in named:
        assert text in caught.value.what
    assert hint in caught.value.hint
    assert "cpu provider" in caught.value.hint
    assert calls == []


def test_the_libraries_asked_for_are_those_of_the_wheels_cuda() -> None:
    assert set(session._cuda_libraries(13)) == {
        "libcudart.so.13",
        "libcublasLt.so.13",
        "libcublas.so.13",
        "libcurand.so.10",
        "libcufft.so.12",
        "libcudnn.so.9",
    }


def test_libraries_are_looked_for_in_pip_packages_and_in_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcublas.so.13").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert folder in session._nvidia_folders()
    loadable = {str(folder / "libcublas.so.13"), "libcudart.so.13"}
    monkeypatch.setattr(session, "_load_library", lambda name: name if name in loadable else None)
    missing = session._missing_libraries.__wrapped__(13)
    assert not any("libcublas.so" in each or "libcudart" in each for each in missing)
    assert "cuDNN (libcudnn.so.9)" in missing


def test_a_library_that_is_absent_loads_as_none() -> None:
    assert session._load_library("libnothing-of-this-name.so.0") is None


class FakeDriver:
    """libcuda as ctypes shows it."""

    def __init__(self, status: int = 0, devices: int = 1) -> None:
        self.status = status
        self.devices = devices

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:  # noqa: N802
        text.value = f"Device {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:  # noqa: N802
        memory._obj.value = 1 << 33
        return 0


@pytest.mark.parametrize(
    ("library", "missing", "devices"),
    [
        (None, "the NVIDIA driver (", ()),
        (FakeDriver(status=100), "a CUDA device (the driver's cuInit returns 100)", ()),
        (FakeDriver(devices=0), "a CUDA device (the driver sees none)", ()),
        (FakeDriver(devices=2), None, ("Device 0", "Device 1")),
    ],
)
def test_the_driver_is_asked_itself(
    monkeypatch: pytest.MonkeyPatch, library: Any, missing: str | None, devices: tuple[str, ...]
) -> None:
    monkeypatch.setattr(session, "_load_library", lambda name: library)
    driver = session._driver.__wrapped__()
    assert driver.devices == devices
    if missing is None:
        assert driver.missing is None
        assert driver.version == 13010
        assert driver.memory == 1 << 33
    else:
        assert driver.missing is not None
        assert missing in driver.missing


class FakeValue:
    """An OrtValue: what it holds and where."""

    def __init__(self, array: NDArray[Any], device: str) -> None:
        self.array = array
        self.device = device

    @classmethod
    def ortvalue_from_numpy(cls, array: NDArray[Any], device: str, index: int) -> FakeValue:
        assert index == 0
        return cls(array, device)

    @classmethod
    def ortvalue_from_numpy_with_onnx_type(cls, array: NDArray[Any], number: int) -> FakeValue:
        return cls(array, f"cpu as type {number}")


class FakeBinding:
    """An io binding that notes what is asked of it."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log

    def bind_ortvalue_input(self, name: str, value: FakeValue) -> None:
        self.log.append(("input", name, value.device))

    def bind_output(self, name: str, device: str) -> None:
        self.log.append(("output", name, device))

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.log.append((name,))


class FakeNative:
    """An InferenceSession on CUDA, or on what it pretends."""

    def __init__(self, active: str = "CUDAExecutionProvider", cuda_nodes: int = 1) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.active = active
        self.cuda_nodes = cuda_nodes

    def get_inputs(self) -> list[Any]:
        return [
            SimpleNamespace(name="x", type="tensor(float)", shape=[2]),
            SimpleNamespace(name="b", type="tensor(bfloat16)", shape=[2]),
        ]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="y", type="tensor(bfloat16)", shape=[None])]

    def get_overridable_initializers(self) -> list[Any]:
        return []

    def get_providers(self) -> list[str]:
        return [self.active, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda count=count: range(count))
            for name, count in (
                ("CPUExecutionProvider", 1),
                ("CUDAExecutionProvider", self.cuda_nodes),
            )
        ]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self.log)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        self.log.append(("run",))


def test_a_cuda_run_has_its_inputs_on_the_device_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(session, "_onnxruntime", lambda: SimpleNamespace(OrtValue=FakeValue))
    native = FakeNative()
    opened = Session(native, path=tmp_path, provider="cuda", threads=None)
    feeds = {"x": np.ones(2, np.float32), "b": np.ones(2, ml_dtypes.bfloat16)}
    bound = opened.bind(feeds)
    assert native.log == [
        ("input", "x", "cuda"),
        ("input", "b", "cpu as type 16"),  # binding copies it to the device, once
        ("output", "y", "cuda"),
        ("synchronize_inputs",),
    ]
    native.log.clear()
    bound()
    bound()
    assert native.log == [("run",), ("synchronize_outputs",)] * 2


def test_outputs_that_change_shape_are_bound_anew_for_every_later_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Changing(FakeNative):
        def run_with_iobinding(self, binding: FakeBinding) -> None:
            fits = self.log[-1] != ("run",)
            self.log.append(("run",))
            if not fits:
                raise ValueError("wrong shape of the pre-allocated output OrtValue")

    monkeypatch.setattr(session, "_onnxruntime", lambda: SimpleNamespace(OrtValue=FakeValue))
    native = Changing()
    opened = Session(native, path=tmp_path, provider="cpu", threads=None)
    bound = opened.bind({"x": np.ones(2, np.float32), "b": np.ones(2, ml_dtypes.bfloat16)})
    for _ in range(4):
        bound()
    anew = [("clear_binding_outputs",), ("output", "y", "cpu"), ("run",)]
    assert native.log[-11:] == [("run",), ("run",), *anew, *anew, *anew]


def test_a_cpu_run_needs_no_synchronization(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(session, "_onnxruntime", lambda: SimpleNamespace(OrtValue=FakeValue))
    native = FakeNative()
    opened = Session(native, path=tmp_path, provider="cpu", threads=None)
    opened.bind({"x": np.ones(2, np.float32), "b": np.ones(2, ml_dtypes.bfloat16)})()
    assert ("input", "x", "cpu") in native.log
    assert native.log[-1] == ("run",)


@pytest.mark.parametrize(
    ("native", "what"),
    [
        (FakeNative(active="CPUExecutionProvider"), "runs .* on CPUExecutionProvider, not on CUDA"),
        (FakeNative(cuda_nodes=0), "placed none of the nodes of .* on CUDAExecutionProvider"),
    ],
)
def test_a_session_that_is_not_on_cuda_is_an_error(
    write: Write, monkeypatch: pytest.MonkeyPatch, native: FakeNative, what: str
) -> None:
    path = write(RELU)
    asked: list[Any] = []

    def open_native(path: str, options: Any, **rest: Any) -> FakeNative:
        asked.append(rest["providers"])
        return native

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_native)
    monkeypatch.setattr(session, "_cuda_lack", lambda: None)
    with pytest.raises(ProviderError, match=what):
        open_session(path, provider="cuda")
    assert asked == [["CUDAExecutionProvider", "CPUExecutionProvider"]]


def test_a_session_on_cuda_is_labelled_so(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: FakeNative())
    monkeypatch.setattr(session, "_cuda_lack", lambda: None)
    assert open_session(write(RELU), provider="auto").provider == "cuda"


@pytest.mark.gpu
def test_cuda_runs(write: Write) -> None:
    x = np.array([[1, -2, 3]], np.float32)
    with open_session(write(RELU), provider="cuda") as opened:
        same(opened.run({"x": x})["y"], np.maximum(x, 0))
        opened.bind({"x": x})()


# -- the machine -------------------------------------------------------------------------------


def test_the_environment_is_json_and_names_what_counts() -> None:
    found = session.environment(threads=3)
    assert json.loads(json.dumps(found)) == found
    assert found["onnxruntime"] == onnxruntime.__version__ == session.runtime_version()
    assert found["onnx"] == onnx.__version__
    assert found["threads"] == 3
    assert found["cores"] == session.usable_cores() >= 1
    assert found["cpu"]
    assert found["providers"][0] == "cpu"
    assert ("cuda" in found["providers"]) == (found["cuda"] is None)


def test_a_machine_without_cuda_says_why(machine: Callable[..., list[str]]) -> None:
    machine(libraries=("cuDNN (libcudnn.so.9)",))
    found = session.environment()
    assert found["providers"] == ["cpu"]
    assert "cuDNN (libcudnn.so.9)" in found["cuda"]
    assert found["gpu"] == "H1"


def test_versions_of_what_is_not_installed_are_none() -> None:
    assert session._version("no-such-distribution-here") is None
