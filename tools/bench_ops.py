"""How much faster our kernels are than onnxruntime's own operators.

    python tools/bench_ops.py                          the whole table, one thread and two
    python tools/bench_ops.py --only axis=1 --pairs 8  some rows
    python tools/bench_ops.py --list                   the rows

Each row compares two models of the same function, both under ORT_ENABLE_ALL: one of onnxruntime's
operators, one of ours. Sessions differ from each other by themselves, so the unit is a pair of
fresh sessions, whose runs alternate; the ratio is the geometric mean over pairs of (median of
theirs) / (median of ours), above 1 where ours is faster, with a 95 % interval from a bootstrap over
pairs. Where a row is called `in place`, both are ours: how much it gains that an output takes its
input's memory. The last rows hold ours against a read of the input and a streaming copy of it
(`share`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxnorm.ops import bodies, build, library
from onnxnorm.session import environment, open_session

Array = NDArray[Any]
OPSET: Final = 21


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is computed, on what.
        wanted: The ratio that is aimed at; one for each number of threads, or one for all.
        ours: Nodes of ours from "X" to "Y".
        theirs: Nodes of onnxruntime's.
        shape: Of X.
        constants: Further inputs of both, as initializers.
        kept: A value inside that is an output of theirs; they too are run by our library then.
    """

    name: str
    wanted: tuple[float, ...]
    shape: tuple[int, ...]
    ours: list[onnx.NodeProto]
    theirs: list[onnx.NodeProto]
    constants: dict[str, Array]
    kept: str | None = None


def softmax(shape: tuple[int, ...], axis: int, *wanted: float, log: bool = False) -> Row:
    """Softmax or LogSoftmax alone."""
    kind = "LogSoftmax" if log else "Softmax"
    ours = [bodies.node(f"TwoPass{kind}", ["X"], "Y", axis=axis)]
    theirs = [helper.make_node(kind, ["X"], ["Y"], axis=axis)]
    return Row(f"{kind} axis={axis} {spell(shape)}", wanted, shape, ours, theirs, {})


def masked(shape: tuple[int, ...], *wanted: float, hides: bool = True) -> Row:
    """Softmax(scale * X + mask) with a mask over the last two axes: causal, or of zeros."""
    mask = np.triu(np.full(shape[-2:], np.finfo(np.float32).min, np.float32), 1)
    mask = mask if hides else np.zeros_like(mask)
    constants = {"scale": np.array(0.125, np.float32), "mask": mask}
    ours = [bodies.node("TwoPassMaskedSoftmax", ["X", "scale", "mask"], "Y", axis=-1)]
    theirs = [
        helper.make_node("Mul", ["X", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["Y"], axis=-1),
    ]
    name = f"Softmax(scale*X+{'mask' if hides else '0'}) {spell(shape)}"
    return Row(name, wanted, shape, ours, theirs, constants)


def channel(shape: tuple[int, ...], wanted: float, *, transposed: bool) -> Row:
    """Layer norm over the channels of NCHW, against primitives or between two Transposes."""
    channels = shape[1]
    rng = np.random.default_rng(1)
    scale, bias = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
    wide = {"scale": scale.reshape(-1, 1, 1), "bias": bias.reshape(-1, 1, 1)}
    ours = [
        bodies.node(
            "ChannelLayerNormalization", ["X", "scale", "bias"], "Y", axes=[1], epsilon=1e-6
        )
    ]
    if transposed:
        wide |= {"flat_scale": scale, "flat_bias": bias}
        theirs = [
            helper.make_node("Transpose", ["X"], ["last"], perm=[0, 2, 3, 1]),
            helper.make_node(
                "LayerNormalization", ["last", "flat_scale", "flat_bias"], ["n"], epsilon=1e-6
            ),
            helper.make_node("Transpose", ["n"], ["Y"], perm=[0, 3, 1, 2]),
        ]
    else:
        wide |= {
            "axes": np.array([1]),
            "two": np.array(2, np.float32),
            "eps": np.array(1e-6, np.float32),
        }
        theirs = [
            helper.make_node("ReduceMean", ["X", "axes"], ["mean"]),
            helper.make_node("Sub", ["X", "mean"], ["centered"]),
            helper.make_node("Pow", ["centered", "two"], ["squared"]),
            helper.make_node("ReduceMean", ["squared", "axes"], ["variance"]),
            helper.make_node("Add", ["variance", "eps"], ["guarded"]),
            helper.make_node("Sqrt", ["guarded"], ["deviation"]),
            helper.make_node("Div", ["centered", "deviation"], ["normalized"]),
            helper.make_node("Mul", ["normalized", "scale"], ["scaled"]),
            helper.make_node("Add", ["scaled", "bias"], ["Y"]),
        ]
    against = "Transpose-LayerNormalization-Transpose" if transposed else "primitives"
    name = f"layer norm over channels {spell(shape)} / {against}"
    return Row(name, (wanted,), shape, ours, theirs, wide)


def group(shape: tuple[int, ...], groups: int, wanted: float) -> Row:
    """Group norm against the standard operator as onnxruntime runs it."""
    rng = np.random.default_rng(2)
    constants = {k: rng.standard_normal(shape[1]).astype(np.float32) for k in ("scale", "bias")}
    inputs = ["X", "scale", "bias"]
    ours = [bodies.node("GroupNormalization", inputs, "Y", num_groups=groups)]
    theirs = [helper.make_node("GroupNormalization", inputs, ["Y"], num_groups=groups)]
    name = f"GroupNormalization({groups} groups) {spell(shape)}"
    return Row(name, (wanted,), shape, ours, theirs, constants)


def copied(row: Row) -> Row:
    """A copy in the place of ours: what moving the data leaves to gain."""
    copy = [helper.make_node("Abs", ["X"], ["Y"])]
    return replace(row, name=f"no more than a copy (Abs) in place of: {row.name}", ours=copy)


def in_place(row: Row) -> Row:
    """Our operator between an Add and a Relu, against the same nodes where the sum has to stay."""
    (call,) = row.ours
    between = onnx.NodeProto()
    between.CopyFrom(call)
    between.input[0], between.output[0] = "sum", "result"
    nodes = [
        helper.make_node("Add", ["X", "X"], ["sum"]),
        between,
        helper.make_node("Relu", ["result"], ["Y"]),
    ]
    what = row.name.split(" /")[0]
    name = f"Add, {what}, Relu: in place"
    return Row(name, (1,), row.shape, nodes, nodes, row.constants, kept="sum")


def spell(shape: Sequence[int]) -> str:
    """1x21x512x512."""
    return "x".join(map(str, shape))


def table() -> list[Row]:
    """The rows, with the ratios that are aimed at."""
    image, small = (1, 64, 128, 128), (1, 96, 56, 56)
    return [
        softmax((1, 21, 512, 512), 1, 20),
        softmax((8, 19, 128, 256), 1, 10),
        softmax((1, 2**24), -1, 1.2, 1.8),
        softmax((4, 2**22), -1, 1.1),
        softmax((32, 128_000), -1, 1.1, log=True),
        softmax((32, 256_000), -1, 1.1, log=True),
        softmax((32, 128_000), -1, 0.95),
        softmax((32, 256_000), -1, 0.95),
        masked((12, 512, 512), 1.3),
        masked((32, 2048, 2048), 1.3),
        masked((12, 197, 197), 1.3),
        masked((12, 64, 64), 1, hides=False),
        masked((12, 197, 197), 1, hides=False),
        *(softmax((2**20 // n, n), -1, 0.95) for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192)),
        channel(image, 8, transposed=False),
        channel(image, 4, transposed=True),
        channel(small, 8, transposed=False),
        channel(small, 4, transposed=True),
        copied(channel(small, 8, transposed=False)),
        group((1, 320, 64, 64), 8, 3),
        group((1, 320, 64, 64), 32, 3),
        in_place(channel(image, 1, transposed=False)),
        in_place(channel(small, 1, transposed=False)),
        in_place(group((1, 320, 64, 64), 32, 1)),
        in_place(softmax((1, 21, 512, 512), 1, 1)),
        in_place(softmax((32, 128_000), -1, 1)),
    ]


def model(
    row: Row, nodes: list[onnx.NodeProto], outputs: Sequence[str] = ("Y",)
) -> onnx.ModelProto:
    """The nodes as a model."""
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, row.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, row.shape) for name in outputs],
        [numpy_helper.from_array(v, k) for k, v in row.constants.items() if k in used],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return bodies.add_functions(made)


@dataclass(frozen=True)
class Outcome:
    """What one row came to: milliseconds are medians over all pairs."""

    name: str
    threads: int
    ratio: float
    low: float
    high: float
    ours_ms: float
    theirs_ms: float
    wanted: float


def alternate(first: Callable[[], object], second: Callable[[], object], seconds: float) -> Any:
    """Medians of two calls that take turns, three turns at least."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (first, second):
        call()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for which in order:
            call = (first, second)[which]
            start = time.perf_counter()
            call()
            times[which].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def interval(logs: Sequence[float]) -> tuple[float, float]:
    """95 % of the geometric means of resampled pairs."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(logs, k=len(logs))) for _ in range(2000))
    return math.exp(means[49]), math.exp(means[1949])


def measure(row: Row, threads: int, pairs: int, seconds: float, folder: Path) -> Outcome:
    """The ratio of a row over some session pairs."""
    path = library.describe().path
    assert path is not None
    files = folder / "ours.onnx", folder / "theirs.onnx"
    onnx.save(model(row, row.ours), files[0])
    kept = [row.kept] if row.kept else []
    onnx.save(model(row, row.theirs, ["Y", *kept]), files[1])
    feeds = {"X": np.random.default_rng(0).standard_normal(row.shape, np.float32)}
    medians = []
    for _ in range(pairs):
        with (
            open_session(files[0], threads=threads, libraries=[path]) as ours,
            open_session(files[1], threads=threads, libraries=[path] * len(kept)) as theirs,
        ):
            calls = ours.bind(feeds).raw, theirs.bind(feeds).raw
            medians.append(alternate(*calls, seconds))
    logs = [math.log(theirs / ours) for ours, theirs in medians]
    wanted = row.wanted[min(threads, len(row.wanted)) - 1]
    return Outcome(
        row.name,
        threads,
        math.exp(statistics.fmean(logs)),
        *interval(logs),
        statistics.median(m[0] for m in medians) * 1e3,
        statistics.median(m[1] for m in medians) * 1e3,
        wanted,
    )


PROBE: Final = r"""
#include <immintrin.h>
#include <cstddef>
extern "C" float sweep(const float* x, float* y, std::size_t n) {
  __m256 sums[4] = {};
  for (std::size_t i = 0; i + 32 <= n; i += 32)
    for (int u = 0; u < 4; ++u) sums[u] = _mm256_add_ps(sums[u], _mm256_loadu_ps(x + i + 8 * u));
  for (std::size_t i = 0; i + 32 <= n; i += 32)
    for (int u = 0; u < 4; ++u) _mm256_stream_ps(y + i + 8 * u, _mm256_loadu_ps(x + i + 8 * u));
  _mm_sfence();
  float out = 0;
  for (const auto& s : sums) for (int k = 0; k < 8; ++k) out += s[k];
  return out;
}
"""


def share(shape: tuple[int, ...], pairs: int, seconds: float, folder: Path) -> Outcome | None:
    """(a read and a streaming copy of the data) / (our softmax of it), on one thread.

    None where there is no compiler for AVX2 code.
    """
    compiler, path = build.compiler(), library.describe().path
    if compiler is None or path is None or "avx2" not in library.describe().usable:
        return None
    (folder / "probe.cc").write_text(PROBE, "utf-8")
    command = [*compiler, "-O2", "-mavx2", "-shared", "-fPIC", "-o", str(folder / "probe.so")]
    subprocess.run([*command, str(folder / "probe.cc")], check=True)
    sweep = ctypes.CDLL(str(folder / "probe.so")).sweep
    sweep.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    sweep.restype = ctypes.c_float
    row = softmax(shape, -1, 0.55)
    onnx.save(model(row, row.ours), folder / "ours.onnx")
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    room = np.zeros(x.size + 16, np.float32)
    y = room[(-room.ctypes.data % 64) // 4 :][: x.size]
    medians = []
    for _ in range(pairs):
        with open_session(folder / "ours.onnx", threads=1, libraries=[path]) as ours:
            medians.append(
                alternate(
                    ours.bind({"X": x}).raw,
                    lambda: sweep(x.ctypes.data, y.ctypes.data, x.size),
                    seconds,
                )
            )
    logs = [math.log(probe / ours) for ours, probe in medians]
    return Outcome(
        f"share of a read and a streaming copy, {spell(shape)}",
        1,
        math.exp(statistics.fmean(logs)),
        *interval(logs),
        statistics.median(m[0] for m in medians) * 1e3,
        statistics.median(m[1] for m in medians) * 1e3,
        0.55,
    )


def line(outcome: Outcome) -> str:
    """A row of the Markdown table."""
    return (
        f"| {outcome.name} | {outcome.threads} | {outcome.theirs_ms:.3g} | {outcome.ours_ms:.3g} "
        f"| {outcome.ratio:.2f} [{outcome.low:.2f}, {outcome.high:.2f}] | {outcome.wanted} |"
    )


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression for the rows")
    parser.add_argument("--pairs", type=int, default=8, help="session pairs a row  [8]")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each pair  [0.5]")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the outcomes here too")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    given = parser.parse_args()
    rows = [row for row in table() if re.search(given.only, row.name)]
    if given.list:
        sys.stdout.write("".join(f"{row.name}\n" for row in rows))
        return 0
    if library.describe().path is None:
        sys.stdout.write("\n".join(library.summary(library.describe())) + "\n")
        return 1
    found = environment()
    sys.stdout.write(
        f"{found['cpu']}, {found['cores']} cores, {library.describe().instruction_set}; "
        f"onnxruntime {found['onnxruntime']}; {time.strftime('%Y-%m-%d')}; "
        f"{given.pairs} session pairs a row\n\n"
        "| work | threads | onnxruntime ms | ours ms | ratio [95 %] | aim |\n"
        "|---|---|---|---|---|---|\n"
    )
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in given.threads:
            for row in rows:
                outcomes.append(measure(row, threads, given.pairs, given.seconds, Path(folder)))
                sys.stdout.write(line(outcomes[-1]) + "\n")
                sys.stdout.flush()
        for shape in ((1, 2**24), (4, 2**22)):
            if 1 in given.threads and re.search(given.only, "share"):
                outcome = share(shape, given.pairs, given.seconds, Path(folder))
                if outcome is not None:
                    outcomes.append(outcome)
                    sys.stdout.write(line(outcome) + "\n")
    if given.json:
        rows_json = [asdict(outcome) for outcome in outcomes]
        given.json.write_text(
            json.dumps({"environment": found, "rows": rows_json}, indent=2) + "\n", "utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
