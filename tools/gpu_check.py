"""Check onnxnorm on a machine with an NVIDIA GPU: what cannot be run anywhere else.

    python tools/gpu_check.py [MODEL.onnx ...]     everything, in one command
    python tools/gpu_check.py --dry-run            the same without a GPU, to test this script

1. CUDA is really active: the driver, the libraries and the wheel, and nodes of the model on it.
2. `optimize` with the CUDA provider: parity on the device, latency with inputs on the device, and
   `compare` of the result with itself claims nothing.
3. The CUDA kernels of our operators, built first where nvcc is: each operator in each type over
   shapes that take every way through the kernels, and special values, against the float64 truth
   within the derived tolerance; and onnxruntime ran them, not the bodies.
4. Their latency against onnxruntime's own operators: paired sessions, with an interval.
5. The same parity runs below compute-sanitizer (memcheck, racecheck, initcheck, synccheck).

It prints one line a check, and writes all of it as JSON to --evidence; that is the package's own
`gpu_evidence.json` where every check of the kernels held, so that `onnxnorm ops` can say so.

Exit status: 0 all hold, 1 one does not, 2 there is no usable GPU. A dry run has the CPU provider
and the emulated kernels, whose times mean nothing, on fewer and smaller calls; it leaves out 1, 2
and 5. The tests that need a GPU are `pytest -m gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

import onnxnorm
from onnxnorm.errors import OnnxNormError, ProviderError
from onnxnorm.latency import measure
from onnxnorm.ops import accuracy, bodies, build, library
from onnxnorm.session import environment, open_session, resolve_provider

Array = NDArray[Any]
DEMO: Final = Path(__file__).parent.parent / "models" / "demo.onnx"
TYPES: Final = {
    "float32": (np.dtype(np.float32), TensorProto.FLOAT),
    "float16": (np.dtype(np.float16), TensorProto.FLOAT16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), TensorProto.BFLOAT16),
    "float64": (np.dtype(np.float64), TensorProto.DOUBLE),
}
SANITIZERS: Final = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_SECONDS: Final = 900


@dataclass(frozen=True)
class Row:
    """One check: what, whether it holds, and what was seen."""

    what: str
    holds: bool
    seen: str = ""


@dataclass(frozen=True)
class Call:
    """One call of an operator of ours."""

    name: str
    inputs: list[Array]
    attributes: dict[str, Any]

    @property
    def text(self) -> str:
        """The call in a line."""
        shape = "x".join(map(str, self.inputs[0].shape))
        return f"{self.name} {self.inputs[0].dtype} {shape} {self.attributes}"


# -- what is computed
# ---------------------------------------------------------------------------------


def calls(*, small: bool) -> Iterator[Call]:
    """Every operator in every type over every way through the kernels; few where `small`."""
    rows: list[tuple[tuple[int, ...], int]] = [
        ((3, 5), 1),
        ((7, 1000), 1),
        ((5, 1500), 1),
        ((2, 70_001), 1),
        ((2, 21, 50), 1),
        ((2, 65, 40), 1),
    ]
    norms: list[tuple[tuple[int, ...], list[int]]] = [
        ((3, 8), [1]),
        ((5, 768), [1]),
        ((2, 5000), [1]),
        ((2, 96, 50), [1]),
        ((1, 300, 40), [1]),
        ((3, 5, 4, 9), [0, 2]),
    ]
    groups = [((2, 8), 4), ((1, 12, 9, 7), 12), ((2, 6, 40, 40), 2)]
    if not small:
        rows += [((40_000, 64), 1), ((2, 4_000_000), 1), ((1, 21, 512, 512), 1), ((8, 4096), 1)]
        norms += [((4096, 1024), [1]), ((1, 64, 128, 128), [1]), ((2, 3, 400, 400), [2, 3])]
        groups += [((1, 320, 64, 64), 32)]
    rng = np.random.default_rng(0)
    for dtype, _ in TYPES.values():
        for shape, axis in rows:
            values = (rng.standard_normal(shape) * 4).astype(dtype)
            mask = rng.choice([0.0, -2.0, -np.inf], shape[-1:], p=[0.6, 0.2, 0.2]).astype(dtype)
            mask[:1] = 0
            masked = [values, np.full([1], 0.5, dtype), mask]
            for log in ("", "Log"):
                yield Call(f"TwoPass{log}Softmax", [values], {"axis": axis})
                yield Call(f"TwoPassMasked{log}Softmax", masked, {"axis": axis})
        for shape, axes in norms:
            values = (rng.standard_normal(shape) * 3 + 50).astype(dtype)
            wide = [s if i in axes else 1 for i, s in enumerate(shape)]
            scale, bias = (rng.standard_normal(wide).astype(dtype) for _ in range(2))
            yield Call("ChannelLayerNormalization", [values, scale, bias], {"axes": axes})
            yield Call("ChannelRMSNormalization", [values, scale], {"axes": axes})
        for shape, number in groups:
            values = (rng.standard_normal(shape) * 2 + 1).astype(dtype)
            factors = [rng.standard_normal(shape[1]).astype(dtype) for _ in range(2)]
            for silu in ("", "Silu"):
                yield Call(f"GroupNormalization{silu}", [values, *factors], {"num_groups": number})
        yield from special(dtype)


def special(dtype: np.dtype[Any]) -> Iterator[Call]:
    """Rows of infinities, NaN and extremes."""
    most = accuracy.limit(dtype)
    for n in (9, 1100, 65_600):
        rows = np.random.default_rng(n).standard_normal((8, n))
        rows[0, 2] = -np.inf
        rows[1] = -np.inf
        rows[2, 3] = np.inf
        rows[3, 4] = np.nan
        rows[4] = -most
        rows[5, ::2] = -most
        rows[6] = most
        rows[7, 1:] = -np.inf
        values = rows.astype(dtype)
        for log in ("", "Log"):
            yield Call(f"TwoPass{log}Softmax", [values], {"axis": 1})
            yield Call(f"TwoPass{log}Softmax", [np.ascontiguousarray(values.T)], {"axis": 0})


def model_of(nodes: list[onnx.NodeProto], call: Call) -> onnx.ModelProto:
    """A model of some nodes from X0, X1, ... to Y."""
    number = next(n for dtype, n in TYPES.values() if dtype == call.inputs[0].dtype)
    graph = helper.make_graph(
        nodes,
        "check",
        [
            helper.make_tensor_value_info(f"X{i}", number, a.shape)
            for i, a in enumerate(call.inputs)
        ],
        [helper.make_empty_tensor_value_info("Y")],
    )
    graph.output[0].type.tensor_type.elem_type = number
    opsets = [helper.make_opsetid("", 21)]
    return bodies.add_functions(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def ours(call: Call) -> onnx.ModelProto:
    """The model that calls our operator."""
    names = [f"X{i}" for i in range(len(call.inputs))]
    number = next(n for dtype, n in TYPES.values() if dtype == call.inputs[0].dtype)
    return model_of(
        [bodies.node(call.name, names, "Y", element_type=number, **call.attributes)], call
    )


# -- the checks
# ---------------------------------------------------------------------------------------


def check_call(call: Call, provider: str, kernels: Path, folder: Path) -> Row:
    """One call's result against the truth, and whether the kernel ran."""
    path, written = folder / "call.onnx", folder / "optimized.onnx"
    onnx.save(ours(call), path)
    with open_session(
        path, provider=provider, libraries=[kernels], optimized_model_path=written
    ) as session:
        feeds = {f"X{i}": array for i, array in enumerate(call.inputs)}
        (found,) = session.run(feeds).values()
        placed = session.placement
    ran = [node.op_type for node in onnx.load(written).graph.node]
    if call.name not in ran:
        return Row(call.text, False, f"the body ran: {ran}")
    if provider == "cuda" and not placed.get("CUDAExecutionProvider", 0):
        return Row(call.text, False, f"it ran elsewhere: {placed}")
    wrong = accuracy.excess(found, *accuracy.expected(call.name, call.inputs, call.attributes))
    return Row(call.text, wrong is None, wrong or "")


def check_calls(provider: str, kernels: Path, folder: Path, *, small: bool) -> list[Row]:
    """Every call, and whatever goes wrong as a row."""

    def checked(call: Call) -> Row:
        try:
            return check_call(call, provider, kernels, folder)
        except OnnxNormError as error:
            return Row(call.text, False, str(error).replace("\n", " "))

    return [checked(call) for call in calls(small=small)]


def rivals(*, small: bool) -> Iterator[tuple[Call, list[onnx.NodeProto]]]:
    """Calls of ours, and onnxruntime's own nodes for the same."""
    rng = np.random.default_rng(0)
    dtypes: list[np.dtype[Any]] = [np.dtype(np.float32), np.dtype(np.float16)]
    shrink = 16 if small else 1
    for dtype in dtypes[:1] if small else dtypes:
        for shape, axis in (
            ((1, 21, 512 // shrink, 512), 1),
            ((8, 19, 128 // shrink, 256), 1),
            ((1, 2**24 // shrink**2), 1),
            ((32, 128_000 // shrink), 1),
            ((16_384 // shrink, 1024), 1),
        ):
            values = rng.standard_normal(shape).astype(dtype)
            node = helper.make_node("Softmax", ["X0"], ["Y"], axis=axis)
            yield Call("TwoPassSoftmax", [values], {"axis": axis}), [node]
        for shape in ((1, 64, 128 // shrink, 128), (8, 96, 56 // shrink, 56)):
            values = rng.standard_normal(shape).astype(dtype)
            flat = [rng.standard_normal(shape[1]).astype(dtype) for _ in range(2)]
            wide = [factor.reshape(-1, 1, 1) for factor in flat]
            call = Call("ChannelLayerNormalization", [values, *wide], {"axes": [1]})
            yield (
                call,
                [
                    helper.make_node("Transpose", ["X0"], ["last"], perm=[0, 2, 3, 1]),
                    helper.make_node("Flatten", ["X1"], ["scale_2d"], axis=0),
                    helper.make_node("Flatten", ["X2"], ["bias_2d"], axis=0),
                    helper.make_node("Squeeze", ["scale_2d"], ["scale"]),
                    helper.make_node("Squeeze", ["bias_2d"], ["bias"]),
                    helper.make_node("LayerNormalization", ["last", "scale", "bias"], ["n"]),
                    helper.make_node("Transpose", ["n"], ["Y"], perm=[0, 3, 1, 2]),
                ],
            )
        values = rng.standard_normal((1, 320, 64 // shrink, 64)).astype(dtype)
        factors = [rng.standard_normal(320).astype(dtype) for _ in range(2)]
        inputs = ["X0", "X1", "X2"]
        node = helper.make_node("GroupNormalization", inputs, ["Y"], num_groups=32)
        yield Call("GroupNormalization", [values, *factors], {"num_groups": 32}), [node]


def time_calls(
    provider: str, kernels: Path, folder: Path, seconds: float, *, small: bool
) -> list[dict[str, Any]]:
    """The latency of each call against onnxruntime's own nodes: ours / theirs."""
    found = []
    for call, theirs in rivals(small=small):
        first, second = folder / "theirs.onnx", folder / "ours.onnx"
        onnx.save(model_of(theirs, call), first)
        onnx.save(ours(call), second)
        feeds = {f"X{i}": array for i, array in enumerate(call.inputs)}
        try:
            result = measure(
                first,
                second,
                feeds,
                provider=provider,
                libraries=[kernels],
                budget_seconds=seconds,
            ).to_json()
        except OnnxNormError as error:
            found.append({"work": call.text, "error": str(error)})
            continue
        kept = ("ratio", "interval", "verdict", "original_ms", "candidate_ms")
        found.append({"work": call.text} | {k: result[k] for k in kept if k in result})
    return found


def sanitize(tool: str, folder: Path) -> Row:
    """This script's parity runs below one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return Row(f"compute-sanitizer {tool}", False, "there is no compute-sanitizer")
    log = folder / f"{tool}.txt"
    command = [program, "--tool", tool, "--error-exitcode", "9", "--log-file", str(log)]
    # Only our own kernels: those of onnxruntime and cuDNN are not judged here.
    command += ["--kernel-regex", "kns=onnxnorm", sys.executable, __file__, "--only-parity"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Row(f"compute-sanitizer {tool}", False, f"no end after {SANITIZER_SECONDS} s")
    said = log.read_text("utf-8", "replace") if log.is_file() else done.stderr
    return Row(f"compute-sanitizer {tool}", done.returncode == 0, said.strip()[-400:])


def check_model(model: Path, folder: Path, seconds: float) -> list[Row]:
    """`optimize` and `compare` of one model on the device."""
    with open_session(model, provider="cuda") as session:
        placed = session.placement
    found = [Row(f"nodes by provider: {placed}", any("cuda" in p.lower() for p in placed))]
    target = folder / model.name
    report = onnxnorm.optimize(model, target, provider="cuda", time_budget=seconds).report
    parity, latency = report.parity, report.latency
    passed = parity is not None and parity["passed"]
    found.append(Row("parity on the device", passed, json.dumps(parity)[:300]))
    if latency is not None:
        said = f"latency: {latency['verdict']}, ratio {latency['ratio']:.3f} {latency['interval']}"
        found.append(Row(said, latency["provider"] == "cuda"))
    again = onnxnorm.compare(target, target, provider="cuda", time_budget=seconds)
    verdict = "not measured" if again.latency is None else again.latency["verdict"]
    found.append(Row(f"a model against itself: {verdict}", verdict == "no measurable difference"))
    return found


def device() -> str:
    """The GPU by name and driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def kernels_of(*, dry: bool) -> build.Built:
    """The library whose kernels are checked, built where it is not there or out of date."""
    return build.build(build.BUILT, build.Kind.EMULATED if dry else build.Kind.CUDA)


def told(rows: list[Row]) -> int:
    """Print rows; how many do not hold."""
    for row in rows:
        seen = f": {row.seen}" if row.seen else ""
        print(f"{'ok  ' if row.holds else 'FAIL'} {row.what}{seen}", flush=True)
    return sum(not row.holds for row in rows)


def evidence(
    given: argparse.Namespace, stage: Callable[[str, list[Row]], None], folder: Path
) -> dict[str, Any]:
    """Check the kernels, and everything that is known about the run."""
    provider = "cpu" if given.dry_run else "cuda"
    built = kernels_of(dry=given.dry_run)
    stage("build", [Row("the CUDA kernels", built.library is not None, "; ".join(built.missing))])
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": "none: emulated" if given.dry_run else device(),
        "dry_run": given.dry_run,
        "sources": build.device_digest(),
        "environment": environment(),
    }
    if built.library is None:
        return found
    stage("parity", check_calls(provider, built.library, folder, small=given.dry_run))
    if not given.dry_run:
        stage("sanitizer", [sanitize(tool, folder) for tool in SANITIZERS])
    found["latency"] = time_calls(
        provider, built.library, folder, given.seconds, small=given.dry_run
    )
    for row in found["latency"]:
        print(json.dumps(row), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, default=[DEMO])
    parser.add_argument("--seconds", type=float, default=30.0, help="for each model and latency")
    parser.add_argument("--evidence", type=Path, help="where to write the JSON")
    parser.add_argument("--dry-run", action="store_true", help="emulated kernels, on the CPU")
    parser.add_argument("--only-parity", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.dry_run:
        try:
            resolve_provider("cuda")
        except ProviderError as error:
            print(error, file=sys.stderr)
            return 2
    checks: dict[str, list[Row]] = {}
    failed: dict[str, int] = {}

    def stage(name: str, rows: list[Row]) -> None:
        checks.setdefault(name, []).extend(rows)
        failed[name] = failed.get(name, 0) + told(rows)

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if given.only_parity:  # below compute-sanitizer
            library_path = kernels_of(dry=given.dry_run).library
            if library_path is None:
                return 1
            provider = "cpu" if given.dry_run else "cuda"
            return 1 if told(check_calls(provider, library_path, folder, small=True)) else 0
        found = evidence(given, stage, folder)
        for model in [] if given.dry_run else given.models:
            try:
                rows = check_model(model, folder, given.seconds)
            except OnnxNormError as error:
                rows = [Row(str(error).replace("\n", " "), False)]
            stage("models", rows)
    found["checks"] = {name: [asdict(row) for row in rows] for name, rows in checks.items()}
    found["failed"] = failed
    kernels_hold = not any(failed.get(name) for name in ("build", "parity", "sanitizer"))
    target = given.evidence
    if target is None and kernels_hold and not given.dry_run:
        target = library.EVIDENCE
    if target is not None:
        target.write_text(json.dumps(found, indent=2, default=str) + os.linesep, "utf-8")
        print(f"evidence: {target}")
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
