#!/usr/bin/env python3
"""What zeros in the place of NaN behind a softmax cost, and what is left of it.

    python tools/bench_guards.py [--layers 4] [--threads 1] [--rounds 20]

Layers of attention of 12 heads of 64 as torch's exporter writes scaled_dot_product_attention with a
causal mask and padding, with random numbers. `goes` has the lowest number where the mask has
-infinity, and no guard after eliminate-guard; `factor` keeps -infinity and has one factor for each
query. Ratios to the exported graph are medians of interleaved runs with their quartiles, all with
onnxruntime's optimizations.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from onnxnorm import staging, storage
from onnxnorm.passes.eliminate_guard import EliminateGuard
from onnxnorm.pipeline import Pipeline

HEADS, SIZE = 12, 64
SHAPES = ((1, 16), (1, 32), (1, 64), (1, 128), (8, 128), (1, 512), (1, 1024))
LAYER = """
    r{i} = Reshape (y{i}, heads)  q{i} = Transpose <perm = [0, 2, 1, 3]> (r{i})
    k{i} = Transpose <perm = [0, 2, 3, 1]> (r{i})  s{i} = MatMul (q{i}, k{i})
    c{i} = Mul (s{i}, scale)  m{i} = Where (mask, zero, low)  a{i} = Add (c{i}, m{i})
    p{i} = Softmax <axis = -1> (a{i})  n{i} = IsNaN (p{i})  g{i} = Where (n{i}, zero, p{i})
    o{i} = MatMul (g{i}, q{i})  t{i} = Transpose <perm = [0, 2, 1, 3]> (o{i})
    y{j} = Reshape (t{i}, joined)
"""


def network(batch: int, tokens: int, layers: int, low: float) -> onnx.ModelProto:
    """Layers of attention without projections."""
    width = HEADS * SIZE
    nodes = "".join(LAYER.format(i=i, j=i + 1) for i in range(layers))
    shape = f"float[{batch},{tokens},{width}]"
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        f" main ({shape} y0, bool[{batch},1,1,{tokens}] pad) => ({shape} y{layers})"
        f" {{ mask = And (causal, pad) {nodes} }}"
    )
    arrays = {
        "causal": np.tril(np.ones((1, 1, tokens, tokens), bool)),
        "heads": np.asarray([0, 0, HEADS, SIZE]),
        "joined": np.asarray([0, 0, width]),
        "scale": np.asarray(0.125, np.float32),
        "zero": np.asarray(0, np.float32),
        "low": np.asarray(low, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    return model


def measure(batch: int, tokens: int, args: argparse.Namespace, folder: Path) -> None:
    """Print the ratios of one shape."""
    exported = network(batch, tokens, args.layers, -np.inf)
    finite = network(batch, tokens, args.layers, float(np.finfo(np.float32).min))
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    sessions = {}
    for name, model in (("exported", exported), ("goes", finite), ("factor", exported)):
        stored = storage.from_proto(model)
        if name != "exported":
            stored = Pipeline([EliminateGuard()]).run(stored).stored
        path = folder / f"{name}.onnx"
        staging.save(stored, path)
        sessions[name] = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    pad = np.ones((batch, 1, 1, tokens), bool)
    pad[0, ..., :3] = False
    y0 = rng.normal(size=(batch, tokens, HEADS * SIZE)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(args.rounds + 1):
        for name in rng.permutation(list(sessions)):
            start = time.perf_counter()
            sessions[name].run(None, {"y0": y0, "pad": pad})
            if turn:  # the first run allocates
                times[name].append(time.perf_counter() - start)
    whole = np.asarray(times["exported"])
    told = [f"{batch} x {tokens:4}: exported {np.median(whole) * 1e3:8.2f} ms"]
    for name in ("goes", "factor"):
        low, middle, high = np.quantile(np.asarray(times[name]) / whole, [0.25, 0.5, 0.75])
        told.append(f"{name} {middle:.3f} ({low:.3f} to {high:.3f})")
    print(", ".join(told), flush=True)


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(f"onnxruntime {ort.__version__}, {args.threads} threads, {args.layers} layers")
    with tempfile.TemporaryDirectory() as folder:
        for batch, tokens in SHAPES:
            measure(batch, tokens, args, Path(folder))


if __name__ == "__main__":
    main()
