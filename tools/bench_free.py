"""What a norm with fixed statistics costs, and that it costs nothing once it is folded.

    python tools/bench_free.py [--only NAME] [--exporter torchscript|dynamo] [--pairs N]
        [--seconds S]

For each network of models/fixed.py, by paired ratios of latency under all of onnxruntime's
optimizations, each with its interval and the band of the original against itself:

    folded / original        below 1: what folding brings
    plain / original         the network without the norm, which is as far as it can go
    folded / plain           1 within the band: the norm is free

The networks are small, so a run is mostly the cost of calling operators; what counts is the ratio.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

import numpy as np  # noqa: E402
import onnx  # noqa: E402

from models import skeletons  # noqa: E402
from models.architectures import Exporter  # noqa: E402
from models.fixed import EXPORTERS, SYSTEMS, file_name  # noqa: E402
from onnxnorm import staging, storage  # noqa: E402
from onnxnorm.latency import measure  # noqa: E402
from onnxnorm.pipeline import Pipeline  # noqa: E402
from onnxnorm.registry import select  # noqa: E402
from onnxnorm.storage import Stored  # noqa: E402
from onnxnorm.testing import operators  # noqa: E402


def folded(model: onnx.ModelProto) -> Stored:
    """The model after all passes that run by default."""
    return Pipeline(select(None)).run(storage.from_proto(model)).stored


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=[s.name for s in SYSTEMS])
    parser.add_argument("--exporter", action="append", choices=EXPORTERS)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each ratio, roughly")
    options = parser.parse_args(arguments)
    print("| network | exporter | nodes | no more operators | folded/original | plain/original"
          " | folded/plain |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for system in SYSTEMS:
        if options.only and system.name not in options.only:
            continue
        chosen: Sequence[Exporter] = options.exporter or EXPORTERS
        for exporter in chosen:
            print(row(system.name, exporter, options.pairs, options.seconds), flush=True)
    return 0


def row(system: str, exporter: Exporter, pairs: int, seconds: float) -> str:
    """One network out of one exporter."""
    given = skeletons.load(file_name(system, exporter))
    plain = skeletons.load(file_name(system, exporter, plain=True))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("original", "folded", "plain")}
        done, bare = folded(given), folded(plain)
        for name, stored in (
            ("original", storage.from_proto(given)),
            ("folded", done),
            ("plain", bare),
        ):
            staging.save(stored, paths[name])
        feeds = _feeds(given)
        cells = []
        for one, other in (("original", "folded"), ("original", "plain"), ("plain", "folded")):
            found = measure(
                paths[one], paths[other], feeds, pairs=pairs, threads=1, budget_seconds=seconds
            )
            low, high = found.interval
            cells.append(f"{found.ratio:.3f} ({low:.3f} to {high:.3f})")
    same = "yes" if operators(done) <= operators(bare) else "no"
    nodes = f"{len(given.graph.node)} -> {len(done.proto.graph.node)}"
    return f"| {system} | {exporter} | {nodes} | {same} | {' | '.join(cells)} |"


def _feeds(model: onnx.ModelProto) -> dict[str, Any]:
    """Noise in [0, 1), tokens below fifty, and two for what the graph leaves open."""
    feeds = {}
    rng = np.random.default_rng(0)
    for value in model.graph.input:
        tensor = value.type.tensor_type
        open_ = 12 if value.name in ("nodes", "laplacian", "edges") else 2
        shape = [d.dim_value or open_ for d in tensor.shape.dim]
        whole = tensor.elem_type == onnx.TensorProto.INT64
        feeds[value.name] = (
            rng.integers(0, 50, shape) if whole else rng.random(shape, dtype=np.float32)
        )
    return feeds


if __name__ == "__main__":
    raise SystemExit(main())
