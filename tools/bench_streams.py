"""What an RMS norm in place of a layer norm saves, in onnxruntime's own profile.

    python tools/bench_streams.py [--only gpt2-768] [--target onnx] [--depth 3]
        [--rounds 9] [--runs 12]

For GPT-2-like and ViT-like models (models/streams.py) at width 768 and 1024, before and after the
default passes, under ORT_ENABLE_ALL and one thread: milliseconds of a run that the profile gives to

    all         the norm operators, with the residual Adds that onnxruntime fused into them, and
                with the Adds of a beta that no bias took
    unfused     of these the norms into which onnxruntime had fused no Add before
    and sums    all, and the residual Adds in front of them that were not fused

In every round both models get a new session in random order, and their runs take turns. A round
gives one ratio after / before, of the medians of its runs; printed is the median of the rounds with
the interval of its order statistics (95 % or the widest that so few rounds allow).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402

import onnxnorm  # noqa: E402
from models import streams  # noqa: E402

MODELS: Final = {
    f"{name}-{width}": (build, width)
    for width in (768, 1024)
    for name, build in (("gpt2", streams.gpt2), ("vit", streams.vit))
}
_NORMS: Final = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
_WARM: Final = 2  # runs of a session that are not counted


@dataclass(frozen=True)
class Norm:
    """One norm as onnxruntime runs it.

    Attributes:
        op: Its operator.
        nodes: Names of the operator, and of the Add of a constant behind it.
        sums: Names of the Add in front of it, if there is one.
    """

    op: str
    nodes: tuple[str, ...]
    sums: tuple[str, ...]


def norms_of(optimized: Path) -> list[Norm]:
    """The norms of the graph that a session has saved, in order."""
    graph = onnx.load(optimized, load_external_data=False).graph
    constants = {t.name for t in graph.initializer}
    sums = {n.output[0]: n.name for n in graph.node if n.op_type == "Add"}
    behind = {
        value: node.name
        for node in graph.node
        if node.op_type == "Add" and set(node.input) & constants
        for value in node.input
    }
    found = []
    for node in graph.node:
        if node.op_type in _NORMS:
            added = [behind[o] for o in node.output if o in behind]
            before = [sums[node.input[0]]] if node.input[0] in sums else []
            found.append(Norm(node.op_type, (node.name, *added), tuple(before)))
    return found


def session(path: Path, folder: Path) -> tuple[ort.InferenceSession, list[Norm]]:
    """A session that profiles, and the norms that it runs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / f"{path.stem}-profile")
    options.optimized_model_filepath = str(folder / f"{path.stem}-optimized.onnx")
    made = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return made, norms_of(folder / f"{path.stem}-optimized.onnx")


@dataclass(frozen=True)
class Took:
    """Milliseconds of every norm in one round, and of the sum in front of it."""

    norms: list[float]
    sums: list[float]

    def total(self, which: Sequence[int], *, sums: bool = False) -> float:
        """Of some of the norms together."""
        return sum(self.norms[at] + (self.sums[at] if sums else 0.0) for at in which)


def took(profile: Path, norms: Sequence[Norm]) -> Took:
    """What the profile gives to every norm: medians over the runs behind the first ones."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for event in json.loads(profile.read_text()):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            found[event["name"].removesuffix("_kernel_time")].append(event["dur"])

    def of(names: Sequence[str]) -> float:
        return sum(statistics.median(found[name][_WARM:]) for name in names) / 1000

    return Took([of(n.nodes) for n in norms], [of(n.sums) for n in norms])


def measured(
    paths: dict[str, Path], feeds: dict[str, Any], folder: Path, rounds: int, runs: int
) -> tuple[dict[str, list[Took]], dict[str, list[Norm]]]:
    """For each model its times in every round, and the norms that are run."""
    times: dict[str, list[Took]] = {name: [] for name in paths}
    seen: dict[str, list[Norm]] = {}
    shuffled = random.Random(0)
    for _ in range(rounds):
        order = list(paths)
        shuffled.shuffle(order)
        held = {name: session(paths[name], folder) for name in order}
        for _ in range(_WARM + runs):
            for name in order:
                held[name][0].run(None, feeds)
        for name, (made, norms) in held.items():
            seen[name] = norms
            profile = Path(made.end_profiling())
            times[name].append(took(profile, norms))
            profile.unlink()
    return times, seen


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median with its interval of order statistics at 95 %, for any distribution.

    >>> interval([0.5, 0.7, 0.6, 0.9, 0.8, 0.4, 0.3])
    (0.6, 0.3, 0.9)
    """
    ordered, count = sorted(ratios), len(ratios)
    # With k values beyond each end it misses with 2 P(X <= k), X of count fair coins.
    tails = [2 * sum(math.comb(count, i) for i in range(k + 1)) / 2**count for k in range(count)]
    out = max((k for k, tail in enumerate(tails) if tail <= 0.05), default=0)
    return statistics.median(ratios), ordered[out], ordered[count - 1 - out]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MODELS)
    parser.add_argument("--target", action="append", choices=("onnx", "ort-cpu"))
    parser.add_argument("--depth", type=int, default=3, help="blocks, of two norms each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args(arguments)
    targets = options.target or ("onnx", "ort-cpu")
    print("| model | target | before | after | ms before | ms after | all: after/before |"
          " unfused: after/before | and sums: after/before |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.only or MODELS:
        build, width = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            for line in lines(build(width, options.depth), name, targets, Path(folder), options):
                print(line, flush=True)
    return 0


def lines(
    model: onnx.ModelProto, name: str, targets: Sequence[Any], folder: Path, options: Any
) -> list[str]:
    """The rows of one model; all its targets are measured in the same rounds."""
    paths = {"original": folder / "original.onnx"}
    onnx.save(model, paths["original"])
    for target in targets:
        paths[target] = folder / f"{target}.onnx"
        onnxnorm.optimize(model, paths[target], target=target, parity=False, latency=False)
    times, seen = measured(paths, _feeds(model), folder, options.rounds, options.runs)
    first = seen["original"]
    whole = range(len(first))
    alone = [at for at in whole if not first[at].op.startswith("Skip")]
    found = []
    for target in targets:
        if len(seen[target]) != len(first):
            raise SystemExit(f"{name}: {len(first)} norms became {len(seen[target])}")
        cells = [name, target, _told(first), _told(seen[target])]
        both = (times["original"], times[target])
        cells += [f"{statistics.median(t.total(whole) for t in each):.2f}" for each in both]
        for which, sums in ((whole, False), (alone, False), (whole, True)):
            ratios = [
                after.total(which, sums=sums) / before.total(which, sums=sums)
                for before, after in zip(times["original"], times[target], strict=True)
            ]
            middle, low, high = interval(ratios)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        found.append(f"| {' | '.join(cells)} |")
    return found


def _told(norms: Sequence[Norm]) -> str:
    counted = Counter(f"{n.op}{' and Add' if len(n.nodes) > 1 else ''}" for n in norms)
    return ", ".join(f"{number} {op}" for op, number in sorted(counted.items()))


def _feeds(model: onnx.ModelProto) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or 1 for d in tensor.shape.dim]
        whole = tensor.elem_type == onnx.TensorProto.INT64
        feeds[value.name] = (
            rng.integers(0, streams.VOCABULARY, shape)
            if whole
            else rng.random(shape, dtype=np.float32)
        )
    return feeds


if __name__ == "__main__":
    raise SystemExit(main())
