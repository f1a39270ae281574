"""Measure `onnxnorm inspect` on graphs of growing size: is it linear in the nodes, and how fast.

    python tools/bench_inspect.py [--nodes 1000 4000 16000 64000] [--rounds 5] [--json R.json]
        [MODEL.onnx ...]

The graphs are stacks of transformer blocks as exporters write them, with weights of a few numbers:
layer norms and RMS norms taken apart in a dozen spellings that take turns, softmax as an operator
and in five nodes, linear layers, residual sums. Each is timed as a command of its own, import
included, and as a call in this process; printed are medians, by the clock and in time of the
processor, which counts where other work shares the machine. Files of your own can be timed too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import onnx

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

import onnxnorm  # noqa: E402
from models.norms.choices import Layout, Plan, Setting, Spelling, legal  # noqa: E402
from models.norms.moments import write_moments  # noqa: E402
from models.norms.rows import write_softmax  # noqa: E402
from models.sheet import Sheet  # noqa: E402

WIDTH: Final = 8
SHAPE: Final = (1, 4, WIDTH)
SPELLINGS: Final = (
    ("layer_norm", Spelling()),
    ("layer_norm", Spelling(square="mul", divide="reciprocal", constants="node")),
    ("rms_norm", Spelling(divide="one_over")),
    ("layer_norm", Spelling(variance="moments_relu", divide="reciprocal", form="gamma_inv")),
    ("layer_norm", Spelling(square="subs", subs=2, divide="pow", form="tf")),
    ("rms_norm", Spelling(square="sum_square", keepdims="unsqueeze")),
    ("layer_norm", Spelling(mean="sum_shape", means=2, between="identity", at="core")),
    ("layer_norm", Spelling(variance="unbiased_factor", eps_left=True)),
    ("rms_norm", Spelling(square="mul", divide="reciprocal", form="gamma_inv")),
    ("layer_norm", Spelling(divide="one_over", form="inv", negated="neg")),
    ("layer_norm", Spelling(mean="sum_mul", variance="x_times_d", root="pow")),
    ("rms_norm", Spelling(divide="pow", gamma_style="plus_one")),
)


def norm(net: Sheet, x: str, turn: int) -> str:
    """Append the norm whose turn it is."""
    kind, spelling = SPELLINGS[turn % len(SPELLINGS)]
    net.constants = spelling.constants
    beta = (WIDTH,) if kind == "layer_norm" else None
    setting = Setting(net.opset)
    plan = Plan(kind, Layout(SHAPE, (2,), ()), spelling, setting, (WIDTH,), beta)
    y = write_moments(net, x, legal(plan)).output
    net.constants = "initializer"
    return y


def linear(net: Sheet, x: str) -> str:
    """Append x @ W + b."""
    weight = net.const(net.draw("weight", (WIDTH, WIDTH), -0.3, 0.3), stem="weight")
    bias = net.const(net.draw("bias", (WIDTH,), -0.3, 0.3), stem="bias")
    return net.do("Add", net.do("MatMul", x, weight), bias)


def block(net: Sheet, x: str, number: int) -> str:
    """Append x + attention(norm(x)), then x + mlp(norm(x))."""
    y = norm(net, x, 2 * number)
    query, key, value = (linear(net, y) for _ in range(3))
    scores = net.do("MatMul", query, net.do("Transpose", key, perm=[0, 2, 1]))
    scores = net.do("Mul", scores, net.const(WIDTH**-0.5, stem="scale"))
    form = ("operator", "stable", "operator", "exp")[number % 4]
    rows = Plan("softmax", Layout((1, 4, 4), (2,), ()), Spelling(), Setting(net.opset))
    weights = write_softmax(net, scores, False, form, rows).output
    x = net.do("Add", x, linear(net, net.do("MatMul", weights, value)))
    y = linear(net, norm(net, x, 2 * number + 1))
    erf = net.do("Erf", net.do("Div", y, net.const(2.0**0.5, stem="root")))
    gate = net.do("Mul", y, net.do("Add", erf, net.const(1.0, stem="one")))
    gelu = net.do("Mul", gate, net.const(0.5, stem="half"))
    return net.do("Add", x, linear(net, gelu))


def stack(nodes: int) -> tuple[onnx.ModelProto, int]:
    """Return a model of at least so many nodes, and how many norms are in it."""
    net = Sheet(f"stack{nodes}", 17)
    x = net.input("x", list(SHAPE))
    blocks = 0
    while len(net.nodes) < nodes:
        x = block(net, x, blocks)
        blocks += 1
    net.output(x, list(SHAPE))
    return net.model(), 3 * blocks


def processor() -> float:
    """Return the seconds of the processor that this process and its children took."""
    used = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def median(action: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Return the median seconds of an action, by the clock and of the processor."""
    times = []
    for _ in range(rounds):
        start, used = time.perf_counter(), processor()
        action()
        times.append((time.perf_counter() - start, processor() - used))
    clock, used = map(statistics.median, zip(*times, strict=True))
    return clock, used


def measure(path: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Time one model."""
    command = [sys.executable, "-m", "onnxnorm", "inspect", str(path), "--json"]

    def whole() -> str:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
        return done.stdout

    report = json.loads(whole())
    clock, used = median(whole, rounds)
    return {
        "model": path.name,
        "nodes": report["nodes"]["before"],
        "rows": sum(row["recognised"] for row in report["norms"]),
        "bytes": path.stat().st_size,
        "process_seconds": clock,
        "process_cpu_seconds": used,
        "call_cpu_seconds": median(lambda: onnxnorm.inspect(path), rounds)[1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", type=Path, nargs="*", help="models in place of the stacks")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 4000, 16000, 64000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    results = []
    print("| model | nodes | norms | listed | command, s | its CPU, s | call, CPU us a node |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for given in args.models or args.nodes:
            norms: int | str = "?"
            if isinstance(given, int):
                model, norms = stack(given)
                path = Path(folder) / f"stack{given}.onnx"
                path.write_bytes(model.SerializeToString())
            else:
                path = given.resolve()
            found = measure(path, Path(folder), args.rounds)
            results.append({**found, "norms": norms})
            each = found["call_cpu_seconds"] / found["nodes"] * 1e6
            print(
                f"| {found['model']} | {found['nodes']} | {norms} | {found['rows']} "
                f"| {found['process_seconds']:.2f} | {found['process_cpu_seconds']:.2f} "
                f"| {each:.1f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
