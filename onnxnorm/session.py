"""Run a model in onnxruntime, and say truthfully on what it ran.

    outputs = open_session(path, provider="cpu").run(feeds)

The only module that imports onnxruntime, and it does so on first use. Three things stand between
a caller and the bare `InferenceSession`:

* A provider that was asked for is active or an error says what is missing. onnxruntime itself
  falls back to the CPU with a log line when a CUDA library is absent.
* Nothing of onnxruntime's reaches the terminal: its log, the prints of its fall-backs, and the
  device discovery warning that it writes while it is being imported. Nor does its telemetry run.
* numpy has no bfloat16, float8 or 4-bit types. `ml_dtypes` arrays go in and come out.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.errors import ModelError, ProviderError, RuntimeRejection, UsageError
from onnxnorm.ops.library import describe

PROVIDERS: Final = ("cpu", "cuda", "auto")

_ORT_PROVIDER: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_FATAL: Final = 4  # onnxruntime's highest log severity: only what ends the process
_WARNING: Final = 2  # onnxruntime's default log severity

# Element types that onnxruntime's Python binding cannot turn into numpy or back, by the name in a
# type string. The 4- and 2-bit types are packed, first element in the low bits (onnx.proto).
_EXTENDED: Final[Mapping[str, tuple[Any, int, int]]] = {
    name: (dtype, number, bits)
    for name, attribute, onnx_name, bits in (
        ("bfloat16", "bfloat16", "BFLOAT16", 16),
        ("float8e4m3fn", "float8_e4m3fn", "FLOAT8E4M3FN", 8),
        ("float8e4m3fnuz", "float8_e4m3fnuz", "FLOAT8E4M3FNUZ", 8),
        ("float8e5m2", "float8_e5m2", "FLOAT8E5M2", 8),
        ("float8e5m2fnuz", "float8_e5m2fnuz", "FLOAT8E5M2FNUZ", 8),
        ("float8e8m0", "float8_e8m0fnu", "FLOAT8E8M0", 8),
        ("float4e2m1", "float4_e2m1fn", "FLOAT4E2M1", 4),
        ("int4", "int4", "INT4", 4),
        ("uint4", "uint4", "UINT4", 4),
        ("int2", "int2", "INT2", 2),
        ("uint2", "uint2", "UINT2", 2),
    )
    if (dtype := getattr(ml_dtypes, attribute, None)) is not None
    and (number := getattr(onnx.TensorProto, onnx_name, None)) is not None
}

_NATIVE: Final[Mapping[str, Any]] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "string": np.object_,
}


@dataclass(frozen=True)
class ValueInfo:
    """An input or output as onnxruntime sees it.

    Attributes:
        name: The value's name.
        type: onnxruntime's spelling of the type: `tensor(float)`, `seq(tensor(int64))`.
        shape: One entry per axis: a number, the name of an axis, or None where nothing is known.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def element(self) -> str:
        """The element type of a dense tensor (`float`, `bfloat16`), "" of anything else."""
        found = re.fullmatch(r"tensor\((\w+)\)", self.type)
        return found.group(1) if found else ""

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The numpy (or ml_dtypes) type of a tensor's elements; object for strings."""
        kind: np.dtype[Any] | None = None
        if self.element in _EXTENDED:
            kind = np.dtype(_EXTENDED[self.element][0])
        elif self.element in _NATIVE:
            kind = np.dtype(_NATIVE[self.element])
        return kind


class Session:
    """One onnxruntime session. `open_session` makes it; a `with` block or `close` frees it.

    Attributes:
        inputs: What `run` must be fed, in the model's order, without initializers.
        outputs: What `run` returns, in the model's order.
        provider: "cpu" or "cuda": the one that is active, not only asked for.
        threads: Intra-op threads asked for; None leaves the number to onnxruntime.
        placement: How many nodes of the optimized graph each provider runs, by onnxruntime's name
            of the provider; empty where this onnxruntime cannot tell.
    """

    def __init__(self, native: Any, *, path: Path, provider: str, threads: int | None) -> None:
        self._native = native
        self._path = path
        self.provider = provider
        self.threads = threads
        self.inputs = _value_infos(native.get_inputs())
        self.outputs = _value_infos(native.get_outputs())
        self._overridable = _value_infos(native.get_overridable_initializers())
        self.placement = _placement(native)

    def __enter__(self) -> Session:  # noqa: PYI034  (Self needs Python 3.11)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the session and its memory. A closed session cannot run."""
        self._native = None

    def end_profiling(self) -> Path:
        """Stop the profile that `open_session(profile=...)` began; returns the file it is in."""
        native = self._live()
        with rejections(self._path, "run"):
            return Path(native.end_profiling())

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run the model once: outputs = model(feeds).

        Args:
            feeds: An array for each input, of the input's own type (ml_dtypes for what numpy
                lacks, object or str arrays for strings); a list of arrays for a sequence, None
                or nothing for an absent optional.

        Returns:
            Every output by name: arrays (a bfloat16 output as ml_dtypes), lists for sequences,
            dictionaries for maps, None for an absent optional.

        Raises:
            RuntimeRejection: onnxruntime refuses the feeds, or fails while it runs.
        """
        native = self._live()
        prepared = self._prepare(feeds)
        extended = [value.name for value in self.outputs if value.element in _EXTENDED]
        plain = [value.name for value in self.outputs if value.element not in _EXTENDED]
        found: dict[str, Any] = {}
        with rejections(self._path, "run"):
            if extended:
                found.update(self._run_extended(native, extended, prepared))
            # A second run, and only for a model that mixes the two kinds: onnxruntime returns
            # sequences and strings as Python values by one way, bfloat16 tensors by the other.
            missing = [name for name in plain if name not in found]
            if missing:
                found.update(zip(missing, native.run(missing, prepared), strict=True))
        return {value.name: found[value.name] for value in self.outputs}

    def bind(self, feeds: Mapping[str, Any]) -> BoundRun:
        """A callable that runs the model once on inputs already where the provider wants them.

        On CUDA the inputs are copied to the device here and the outputs stay there, so that a
        call times the model and not the bus. Outputs are allocated by the first call and reused.
        The result keeps what it needs of the session alive, also after `close`.

        Raises:
            RuntimeRejection: onnxruntime refuses the feeds.
        """
        native = self._live()
        prepared = self._prepare(feeds)
        values = [*self.inputs, *self.outputs]
        # onnxruntime binds strings not at all, and sequences so that the second run crashes.
        bindable = all(value.dtype is not None and value.element != "string" for value in values)
        if not bindable:
            names = [value.name for value in self.outputs]
            if any(value.element in _EXTENDED for value in self.outputs):
                return BoundRun(lambda: self.run(feeds), self._path)
            return BoundRun(lambda: native.run(names, prepared), self._path)
        infos = {value.name: value for value in (*self.inputs, *self._overridable)}
        device = "cuda" if self.provider == "cuda" else "cpu"
        with rejections(self._path, "run"):
            binding = native.io_binding()
            for name, value in prepared.items():
                binding.bind_ortvalue_input(name, _on_device(value, infos[name], device))
            for output in self.outputs:
                binding.bind_output(output.name, device)
            binding.synchronize_inputs()
        return BoundRun(_BoundCall(native, binding, self.outputs, device), self._path)

    def _live(self) -> Any:
        if self._native is None:
            raise RuntimeRejection(
                f"{self._path}: the session is closed",
                "Open a new session with open_session.",
            )
        return self._native

    def _prepare(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        infos = {value.name: value for value in (*self.inputs, *self._overridable)}
        for name in feeds:
            if name not in infos:
                raise RuntimeRejection(
                    f"{self._path}: the model has no input {name!r}",
                    f"Its inputs are: {', '.join(infos) or 'none'}.",
                )
        for value in self.inputs:
            if value.name not in feeds and not value.type.startswith("optional"):
                raise RuntimeRejection(
                    f"{self._path}: no value for input {value.name!r} ({value.type})",
                    f"Give an array of shape {_spell_shape(value.shape)}.",
                )
        with rejections(self._path, "run"):
            return {name: _to_native(infos[name], value) for name, value in feeds.items()}

    def _run_extended(self, native: Any, names: list[str], feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs as OrtValues, so that types which numpy lacks can be read; tensors only."""
        infos = {value.name: value for value in self.outputs}
        tensors = [n for n, value in infos.items() if value.dtype is not None]
        tensors = [n for n in tensors if infos[n].element != "string"]
        ort = _onnxruntime()
        if all(
            isinstance(v, np.ndarray | ort.OrtValue) and not _is_text(v) for v in feeds.values()
        ):
            wanted = tensors
            inputs = {
                name: value if isinstance(value, ort.OrtValue) else _host_value(value)
                for name, value in feeds.items()
            }
            results = native.run_with_ort_values(wanted, inputs)
            return {n: _to_numpy(r, infos[n]) for n, r in zip(wanted, results, strict=True)}
        raise RuntimeRejection(
            f"{self._path}: output {names[0]!r} is {infos[names[0]].type}, and an input is no "
            "numeric tensor: onnxruntime's Python interface cannot pass both",
            "Cast that output to float inside the model.",
        )


class BoundRun:
    """One run of a model with everything bound; made by `Session.bind`.

    Calling it runs the model once and returns nothing, when all outputs are computed.
    """

    def __init__(self, call: Callable[[], object], path: Path) -> None:
        self._call = call
        self._path = path

    def __call__(self) -> None:
        """Run once.

        Raises:
            RuntimeRejection: onnxruntime fails while it runs.
        """
        with rejections(self._path, "run"):
            self._call()

    @property
    def raw(self) -> Callable[[], object]:
        """The same without turning failures into our errors: for the inside of a timed loop."""
        return self._call


# What onnxruntime says of a bound output whose shape is another than in the run before: since
# 1.24, and before that.
_OTHER_SHAPE: Final = ("pre-allocated output", "OrtValue shape verification failed")


class _BoundCall:
    """Runs an io binding, and binds its outputs anew where their shapes differ by run."""

    def __init__(
        self, native: Any, binding: Any, outputs: Sequence[ValueInfo], device: str
    ) -> None:
        self._native = native
        self._binding = binding
        self._outputs = outputs
        self._device = device
        self._rebind = False

    def __call__(self) -> None:
        if self._rebind:
            self._bind_outputs()
        try:
            self._native.run_with_iobinding(self._binding)
        except Exception as error:
            # A reused output of another shape: only models with random operators do this.
            if self._rebind or not any(said in str(error) for said in _OTHER_SHAPE):
                raise
            self._rebind = True
            self._bind_outputs()
            self._native.run_with_iobinding(self._binding)
        if self._device != "cpu":
            self._binding.synchronize_outputs()

    def _bind_outputs(self) -> None:
        self._binding.clear_binding_outputs()
        for output in self._outputs:
            self._binding.bind_output(output.name, self._device)


def open_session(
    path: str | Path,
    *,
    provider: str = "cpu",
    optimize: bool = True,
    threads: int | None = None,
    deterministic: bool = True,
    seed: int | None = None,
    libraries: Sequence[Path] | None = None,
    optimized_model_path: Path | None = None,
    profile: Path | None = None,
) -> Session:
    """Load the model at `path` into onnxruntime.

    Args:
        path: An .onnx file; its external data lies beside it.
        provider: "cpu", "cuda" or "auto" (cuda where it is usable, else cpu).
        optimize: ORT_ENABLE_ALL when true, ORT_DISABLE_ALL when false.
        threads: Intra-op threads; None for onnxruntime's own choice.
        deterministic: Ask for kernels that give the same bits in each run, where there are any.
        seed: Seed of random operators that carry none themselves. It holds for the process.
        libraries: Shared libraries of custom operators to register; None is the operator library
            of this package, where it is there, on the CPU and with optimizations on. Without them
            the bodies of its operators are run, so that both ways are tried.
        optimized_model_path: Where onnxruntime writes the graph that it really runs.
        profile: Where onnxruntime writes the time of each node, until `Session.end_profiling`;
            it appends the time of day and `.json`.

    Raises:
        ModelError: There is no such file.
        ProviderError: The provider is not usable, or not active after all.
        RuntimeRejection: onnxruntime cannot load the model.
        UsageError: `provider` or `threads` is not one that exists.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file", "Give the path of an .onnx file.")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}", "Use one thread or more.")
    chosen = resolve_provider(provider)
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.use_deterministic_compute = deterministic
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized_model_path is not None:
        options.optimized_model_filepath = os.fspath(optimized_model_path)
        # A model beyond 2 GB could not be written otherwise.
        name = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(name, f"{optimized_model_path.name}.data")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if seed is not None:
        ort.set_seed(seed)
    names = [_ORT_PROVIDER[chosen]]
    if chosen != "cpu":
        names.append(_ORT_PROVIDER["cpu"])
    if libraries is None:
        own = describe().path if optimize and chosen == "cpu" else None
        libraries = [own] if own is not None else []
    place = _utf8(path)
    with _quiet(), rejections(path, "load"):
        for library in libraries:
            options.register_custom_ops_library(_utf8(library))
        # Without the switch onnxruntime prints and retries on the CPU.
        native = ort.InferenceSession(place, options, providers=names, enable_fallback=0)
    active = list(native.get_providers())
    if not active or active[0] != names[0]:
        raise ProviderError(
            f"onnxruntime runs {path} on {active[0] if active else 'nothing'}, not on {names[0]}",
            "Update the driver and CUDA libraries, or use the cpu provider.",
        )
    session = Session(native, path=path, provider=chosen, threads=threads)
    if session.placement and not session.placement.get(names[0], 0):
        raise ProviderError(
            f"onnxruntime placed none of the nodes of {path} on {names[0]}",
            "Use the cpu provider: a figure for this model would not be one of the device.",
        )
    return session


def _utf8(path: Path) -> str:
    """Return a path as onnxruntime takes it: UTF-8, whatever Python reads file names by.

    In the locale C, or where a name is in another encoding, Python keeps the bytes that it cannot
    read as surrogates, and onnxruntime's constructor says that its arguments are of wrong types.
    """
    if os.name == "nt":
        return os.fspath(path)
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: onnxruntime opens files with names in UTF-8 only, and this is none",
            "Rename the file, or the folder it is in.",
        ) from error


def optimized_graph(path: str | Path, *, provider: str = "cpu") -> onnx.ModelProto:
    """The graph that onnxruntime runs for a model with all of its optimizations; no weights.

    Raises:
        ProviderError: The provider is not usable.
        RuntimeRejection: onnxruntime cannot load the model.
    """
    with tempfile.TemporaryDirectory(prefix="onnxnorm-") as folder:
        place = Path(folder) / "runs.onnx"
        open_session(path, provider=provider, optimized_model_path=place).close()
        with rejections(Path(path), "load"):
            return onnx.load(place, load_external_data=False)


def resolve_provider(name: str) -> str:
    """Provider asked for -> provider used: "auto" | "cpu" | "cuda" -> "cpu" | "cuda".

    >>> resolve_provider("cpu")
    'cpu'

    Raises:
        ProviderError: "cuda" was asked for and is not usable; the first line names all that is
            missing (onnxruntime's wheel, driver, device, CUDA libraries, cuDNN), with versions.
        UsageError: The name is none of the three.
    """
    if name not in PROVIDERS:
        raise UsageError(f"no provider {name!r}", f"Use one of: {', '.join(PROVIDERS)}.")
    if name == "cpu":
        return "cpu"
    lack = _cuda_lack()
    if lack is None:
        return "cuda"
    if name == "auto":
        return "cpu"
    raise ProviderError(*lack)


def environment(threads: int | None = None) -> dict[str, Any]:
    """What a measurement depends on, as JSON-ready values.

    Keys: `onnxnorm`, `onnx`, `onnxruntime`, `onnxruntime_package`, `numpy`, `python` (versions),
    `platform`, `cpu`, `cores` (that this process may use), `cpu_quota` (cores' worth of time that
    a container grants, or None), `threads` (asked for, or None for onnxruntime's choice),
    `instruction_sets`, `providers` (that are usable), `cuda` (why it is not, or None), `gpu`
    (its name, or None).
    """
    lack = _cuda_lack()
    ort = _onnxruntime()
    driver = _driver()
    return {
        "onnxnorm": _version("onnxnorm"),
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "onnxruntime_package": _wheel()[0],
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "cpu_quota": _cpu_quota(),
        "threads": threads,
        "instruction_sets": _instruction_sets(),
        "providers": ["cpu"] if lack else ["cpu", "cuda"],
        "cuda": lack[0] if lack else None,
        "gpu": driver.devices[0] if driver.devices else None,
    }


def runtime_version() -> str:
    """Return onnxruntime's version."""
    return str(_onnxruntime().__version__)


def device_memory() -> int | None:
    """Total memory of the first CUDA device in bytes; None where there is none."""
    driver = _driver()
    return driver.memory if driver.devices else None


def usable_cores() -> int:
    """Cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- onnxruntime, without its noise ------------------------------------------------------------


_importing: Final = threading.Lock()


def _onnxruntime() -> Any:
    """The module onnxruntime; threads wait for the one that imports it first."""
    with _importing:
        return _imported()


@functools.cache
def _imported() -> Any:
    """Import onnxruntime without its C++ log of that moment and without its telemetry."""
    try:
        with contextlib.ExitStack() as stack:
            if "onnxruntime" not in sys.modules:
                stack.enter_context(_without_log_lines())
                stack.enter_context(_without_telemetry())
            import onnxruntime
    except (ImportError, OSError) as error:
        raise ProviderError(
            f"onnxruntime cannot be imported: {error}",
            "Install it: pip install onnxruntime.",
        ) from error
    return onnxruntime


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Opt out of onnxruntime's telemetry, unless the user has decided for themselves.

    From 1.29 on its wheels send facts on every model and session to their maker and leave files
    in the home and temporary folders. The variable is read once, while the library loads.
    """
    name = "ORT_DISABLE_TELEMETRY"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


# A record of onnxruntime's own log: [W:onnxruntime:Default, file.cc:1 Function] text, in colour
# or not. Device discovery writes one while the library loads, before any severity can be set.
_LOG_LINE: Final = re.compile(rb"\[[VIWEF]:onnxruntime:[^\n]*")
_COLOUR: Final = re.compile(rb"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Hold back file descriptor 2, and afterwards pass on all but onnxruntime's log records."""
    flush = sys.stderr.flush if sys.stderr is not None else lambda: None
    flush()
    try:
        saved = os.dup(2)
    except OSError:  # closed: there is no terminal to protect
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            kept = _without_records(held.read())
            if kept:
                os.write(2, kept)


def _without_records(text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not _LOG_LINE.search(line)]
    if len(kept) == len(lines):
        return text
    # A record in colour resets it at the start of the next line.
    return b"".join(line for line in kept if _COLOUR.sub(b"", line).strip() or line == b"\n")


_quiet_lock: Final = threading.Lock()
_quiet_depth = 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's process-wide logger, and give it its default severity back.

    Session loggers have their own severity; libraries, schemas and threads log here. Permanent
    silence would also take the log of sessions that the caller's program opens by itself.
    """
    global _quiet_depth
    ort = _onnxruntime()
    with _quiet_lock:
        _quiet_depth += 1
        ort.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                ort.set_default_logger_severity(_WARNING)


@contextlib.contextmanager
def rejections(path: Path, stage: str) -> Iterator[None]:
    """Turn what onnxruntime raises into RuntimeRejection; it derives from Exception alone.

    Args:
        path: The model, for the message.
        stage: "load" or "run".
    """
    try:
        yield
    except (RuntimeRejection, MemoryError):
        raise
    except Exception as error:
        reason = _reason(str(error)) or type(error).__name__
        raise RuntimeRejection(
            f"{path}: onnxruntime cannot {stage} it: {reason}", _hint(str(error), stage)
        ) from error


_STATUS: Final = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ?")
_LOAD: Final = re.compile(r"^(Load model from .*? failed: ?)+")
_NODE: Final = re.compile(
    r"(?:Error in execution: )?Non-zero status code returned while running (\S+) node\. "
    r"Name:'([^']*)' Status Message: "
)
_EXCEPTION: Final = re.compile(r"Exception during (initialization|loading): ?")
_PLACE: Final = re.compile(r"(?:/\S+/|\b)[\w.]+\.(?:cc|cpp|cu|cuh|h|hpp):\d+ ")


def _reason(message: str) -> str:
    """The first line of what onnxruntime said, without status codes, paths and signatures."""
    text = _LOAD.sub("", _STATUS.sub("", message).strip())
    text = _EXCEPTION.sub("", text)
    node = _NODE.search(text)
    if node is not None:
        kind, name = node.groups()
        text = f"{kind} node{f' {name!r}' if name else ''}: {text[node.end() :]}"
    place = _PLACE.search(text)
    if place is not None:
        text = text[: place.start()] + _after_signature(text[place.end() :])
    text = _STATUS.sub("", text)
    # "Got invalid dimensions for input: x for the following indices" goes on below.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(("indices", ":")):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else ""


def _after_signature(text: str) -> str:
    """What follows a C++ function signature, or the function's name, at the start of `text`."""
    start = text.find("(")
    if start < 0 or not re.match(r"[\w:<>~&*, {}\[\]=]*$", text[:start]):
        return text
    if "::" not in text[:start]:
        return text
    depth = 0
    for at, letter in enumerate(text[start:], start):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            rest = re.sub(r"^\s*(const)?\s*(\[with [^\]]*\])?\s*", "", text[at + 1 :])
            return rest or text
    return text


def _hint(message: str, stage: str) -> str:
    for symptom, advice in (
        (
            "NOT_IMPLEMENTED",
            "This onnxruntime has no kernel for that operator and type.",
        ),
        (
            "not a registered function/op",
            "Give the custom operator's library, or remove the node.",
        ),
        (
            "No Op registered",
            "The operator does not exist at the opset that the model imports.",
        ),
        (
            "INVALID_PROTOBUF",
            "The file is damaged or is no ONNX model: export it again.",
        ),
        (
            "Unsupported model IR version",
            "Update onnxruntime, export with an older onnx, or save it with a lower ir_version.",
        ),
        ("is under development", "Update onnxruntime, or export at an older opset."),
        ("external", "Keep the model's external data beside it, complete."),
        ("Failed to allocate memory", "Free memory, or use smaller inputs."),
        ("bad allocation", "Free memory, or use smaller inputs."),
        ("invalid dimensions for input", "Feed the shape that the model declares."),
        ("Invalid rank for input", "Feed the shape that the model declares."),
        ("Unexpected input data type", "Feed the type that the model declares."),
        ("Failed to load library", "Check the operator library and what it links to."),
    ):
        if symptom in message:
            return advice
    if stage == "load":
        return "Check it with onnx.checker.check_model, or try a newer onnxruntime."
    return "Try other inputs or shapes: the model loads, but these values make it fail."


# -- values ------------------------------------------------------------------------------------


def _value_infos(arguments: Sequence[Any]) -> tuple[ValueInfo, ...]:
    return tuple(ValueInfo(a.name, a.type, tuple(a.shape or ())) for a in arguments)


def _spell_shape(shape: Sequence[int | str | None]) -> str:
    return "[" + ", ".join("?" if axis is None else str(axis) for axis in shape) + "]"


def _is_text(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "OSUT"


def _to_native(info: ValueInfo, value: Any) -> Any:
    """A feed as onnxruntime takes it: a contiguous array, an OrtValue, or the Python value."""
    if isinstance(value, int | float) and not isinstance(value, np.generic):
        array = np.asarray(value, info.dtype)
    elif isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
    else:
        return value
    if info.element in _EXTENDED:
        return _extended_value(array, info)
    if _is_text(array):
        return array.astype(object) if array.dtype.kind != "O" else array
    # onnxruntime reads the bytes of another byte order as they are.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(array).reshape(array.shape)


def _extended_value(array: NDArray[Any], info: ValueInfo) -> Any:
    dtype, number, bits = _EXTENDED[info.element]
    if array.dtype != np.dtype(dtype):
        raise RuntimeRejection(
            f"input {info.name!r} is {info.type}, the array is {array.dtype}",
            f"Convert it: array.astype(ml_dtypes.{np.dtype(dtype).name}).",
        )
    carrier = np.dtype(np.uint16) if bits == 16 else np.dtype(np.uint8)
    flat = np.ascontiguousarray(array).reshape(-1).view(carrier)
    if bits < 8:
        # onnxruntime takes the shape from the array and the bytes from its start, so the packed
        # bytes sit in a buffer of one byte per element.
        buffer = np.zeros(max(flat.size, 1), np.uint8)
        packed = _pack(flat, bits)
        buffer[: packed.size] = packed
        flat = buffer[: flat.size]
    return _onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(
        flat.reshape(array.shape), number
    )


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    padded = np.zeros(math.ceil(codes.size / per_byte) * per_byte, np.uint8)
    padded[: codes.size] = codes & ((1 << bits) - 1)
    packed = np.zeros(padded.size // per_byte, np.uint8)
    for slot in range(per_byte):
        packed |= padded[slot::per_byte] << np.uint8(slot * bits)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    codes = np.zeros(packed.size * per_byte, np.uint8)
    for slot in range(per_byte):
        codes[slot::per_byte] = (packed >> np.uint8(slot * bits)) & np.uint8((1 << bits) - 1)
    return codes[:count]


def _host_value(array: NDArray[Any]) -> Any:
    return _onnxruntime().OrtValue.ortvalue_from_numpy(array)


def _on_device(value: Any, info: ValueInfo, device: str) -> Any:
    """An OrtValue on the device. bind_ortvalue_input copies what is elsewhere, once, when bound."""
    ort = _onnxruntime()
    if isinstance(value, ort.OrtValue):
        return value
    if info.dtype is not None and value.dtype != info.dtype:
        raise RuntimeRejection(
            f"input {info.name!r} is {info.type}, the array is {value.dtype}",
            "Feed the type that the model declares.",
        )
    return ort.OrtValue.ortvalue_from_numpy(value, device, 0)


def _to_numpy(value: Any, info: ValueInfo) -> NDArray[Any]:
    array: NDArray[Any]
    if info.element not in _EXTENDED:
        array = value.numpy()
        return array
    dtype, _, bits = _EXTENDED[info.element]
    shape = tuple(value.shape())
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    raw = np.empty(value.tensor_size_in_bytes(), np.uint8)
    ctypes.memmove(raw.ctypes.data, value.data_ptr(), raw.size)
    if bits < 8:
        raw = _unpack(raw, bits, count)
    array = raw.view(dtype).reshape(shape)
    return array


def _placement(native: Any) -> dict[str, int]:
    """Nodes per provider, from onnxruntime's own record; empty before onnxruntime had one."""
    nodes: dict[str, int] = {}
    if not hasattr(native, "get_provider_graph_assignment_info"):
        return nodes
    for subgraph in native.get_provider_graph_assignment_info():
        nodes[subgraph.ep_name] = nodes.get(subgraph.ep_name, 0) + len(subgraph.get_nodes())
    return nodes


# -- CUDA: what is there and what is not -------------------------------------------------------


@dataclass(frozen=True)
class _Driver:
    """The NVIDIA driver: the CUDA version it supports (13000 is 13.0), its devices, or why not.

    `memory` is what the first device has, in bytes.
    """

    version: int
    devices: tuple[str, ...]
    missing: str | None
    memory: int = 0


def _cuda_lack() -> tuple[str, str] | None:
    """What keeps CUDA from being used, as an error's two lines; None when it is usable."""
    package, version, cuda = _wheel()
    ort = _onnxruntime()
    if _ORT_PROVIDER["cuda"] not in ort.get_available_providers():
        return (
            f"the cuda provider is not usable: the installed wheel {package} {version} has no CUDA",
            "Replace it by onnxruntime-gpu: pip install 'onnxnorm[cuda]'; or use the cpu provider.",
        )
    major = int(cuda.split(".")[0]) if cuda[:1].isdigit() else 12
    driver = _driver()
    missing: list[str] = []
    advice: list[str] = []
    if driver.missing is not None:
        missing.append(driver.missing)
        advice.append(f"install an NVIDIA driver that supports CUDA {major}")
    elif driver.version // 1000 < major:
        found = f"{driver.version // 1000}.{driver.version % 1000 // 10}"
        missing.append(f"a driver for CUDA {major} (this one supports {found})")
        advice.append(f"update the NVIDIA driver to one that supports CUDA {major}")
    libraries = _missing_libraries(major)
    if libraries:
        missing.extend(libraries)
        advice.append("pip install 'onnxnorm[cuda]' for the CUDA libraries and cuDNN")
    if not missing:
        _preload(ort)
        return None
    built = f"CUDA {cuda} and cuDNN 9" if cuda else "CUDA"
    first, *others = advice
    what = f"the cuda provider is not usable: {package} {version} is built for {built}, "
    return (
        what + f"and missing here: {', '.join(missing)}",
        "; ".join([first[0].upper() + first[1:], *others, "or use the cpu provider."]),
    )


def _wheel() -> tuple[str, str, str]:
    """The installed onnxruntime: package name, version, the CUDA version it is built for or ""."""
    ort = _onnxruntime()
    return (
        str(getattr(ort, "package_name", "") or "onnxruntime"),
        str(ort.__version__),
        str(getattr(ort, "cuda_version", "") or ""),
    )


@functools.cache
def _driver() -> _Driver:
    """Ask the driver library itself; cuInit makes no context and takes no device memory."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    cuda = _load_library(name)
    if cuda is None:
        return _Driver(0, (), f"the NVIDIA driver ({name})")
    status = cuda.cuInit(0)
    if status != 0:
        return _Driver(0, (), f"a CUDA device (the driver's cuInit returns {status})")
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
        return _Driver(version.value, (), "a CUDA device (the driver sees none)")
    names = []
    for index in range(count.value):
        device = ctypes.c_int(0)
        text = ctypes.create_string_buffer(256)
        if cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
            cuda.cuDeviceGetName(text, len(text), device)
        names.append(text.value.decode(errors="replace"))
    memory = ctypes.c_size_t(0)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), ctypes.c_int(0))
    return _Driver(version.value, tuple(names), None, memory.value)


def _cuda_libraries(major: int) -> dict[str, str]:
    """What the CUDA provider links to or opens, library file -> the name people know it by."""
    if sys.platform == "win32":
        return {
            f"cudart64_{major}.dll": "libcudart",
            f"cublasLt64_{major}.dll": "cuBLASLt",
            f"cublas64_{major}.dll": "cuBLAS",
            f"cufft64_{major - 1}.dll": "cuFFT",
            "cudnn64_9.dll": "cuDNN",
        }
    return {
        f"libcudart.so.{major}": "libcudart",
        f"libcublasLt.so.{major}": "cuBLASLt",
        f"libcublas.so.{major}": "cuBLAS",
        "libcurand.so.10": "cuRAND",
        f"libcufft.so.{major - 1}": "cuFFT",
        "libcudnn.so.9": "cuDNN",
    }


@functools.cache
def _missing_libraries(major: int) -> tuple[str, ...]:
    """Libraries that neither the NVIDIA pip packages nor the system can give, in words."""
    missing = []
    for library, known_as in _cuda_libraries(major).items():
        places = [os.fspath(p / library) for p in _nvidia_folders() if (p / library).is_file()]
        # Loaded by full path, a library also satisfies the provider's own search by its name.
        if not any(_load_library(name) is not None for name in (*places, library)):
            missing.append(f"{known_as} ({library})")
    return tuple(missing)


def _nvidia_folders() -> list[Path]:
    """Folders of shared libraries in the nvidia-* pip packages of this environment."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec is not None else []
    folders = []
    for root in roots:
        for pattern in ("*/lib", "*/bin", "*/bin/*"):
            folders.extend(sorted(p for p in Path(root).glob(pattern) if p.is_dir()))
    return folders


def _load_library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _preload(ort: Any) -> None:
    """Let onnxruntime load its own list of libraries too; it prints what it does not find."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), _quiet():
            ort.preload_dlls()


# -- the machine -------------------------------------------------------------------------------

_INTERESTING: Final = (
    *(
        "sse4_2",
        "avx",
        "f16c",
        "fma",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
    ),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo(*keys: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys and value.strip():
                return value.strip()
    return None


def _cpu_name() -> str:
    name = _cpuinfo("model name", "Hardware", "cpu model")
    if name is None and sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(
                asked, capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
    return name or platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    flags = set((_cpuinfo("flags", "Features") or "").split())
    return [name for name in _INTERESTING if name in flags]


def _cpu_quota() -> float | None:
    """Cores' worth of time per period that the cgroup allows (cpu.max), or None for no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(quota) / float(period)
    return None
