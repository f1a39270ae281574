"""Whole models with the operator library: does it run, and does every way of running them agree?

    python tools/check_ops_models.py MODEL.onnx ...

Each model goes through `optimize(target="ort-cpu", ops=True)`, which judges parity against a
float64 truth without the library (the bodies) and with it (the kernels). Then the graph that
onnxruntime runs has to have every call as one node of our own, and none without the library; and
onnx's reference evaluator runs the result, whose distance from the original's there is printed in
ulp of the output's largest value.

One line a model and a line a check; exit status 0 where all hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

import onnxnorm
from onnxnorm.errors import OnnxNormError
from onnxnorm.feeds import make_feeds
from onnxnorm.ops import bodies, library
from onnxnorm.session import open_session


def ours_in(path: Path) -> Counter[str]:
    """How often each of our operators is a node of the main graph."""
    model = onnx.load(path, load_external_data=False)
    return Counter(n.op_type for n in model.graph.node if n.domain == bodies.DOMAIN)


def ran(path: Path, feeds: dict[str, Any], libraries: list[Path], folder: Path) -> Counter[str]:
    """How often each of our operators is a node of the graph that onnxruntime runs."""
    written = folder / "optimized.onnx"
    with open_session(path, libraries=libraries, optimized_model_path=written) as session:
        session.run(feeds)
    return ours_in(written)


def distance(first: Path, second: Path, feeds: dict[str, Any]) -> str:
    """How far two models are apart in onnx's reference evaluator; an error in its own words."""
    try:
        before, after = (ReferenceEvaluator(str(path)).run(None, feeds) for path in (first, second))
    except Exception as error:  # whatever it lacks
        return f"it cannot run this: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    worst = 0.0
    for a, b in zip(map(np.asarray, before), map(np.asarray, after), strict=True):
        if a.dtype.kind == "f" and a.size:
            unit = float(np.spacing(np.abs(a[np.isfinite(a)]).max(initial=1e-30)))
            worst = max(worst, float(np.nanmax(np.abs(a - b), initial=0)) / unit)
    return f"{worst:.1f} ulp of the largest value apart"


def check(model: Path, folder: Path, seconds: float) -> list[tuple[str, bool]]:
    """Every check of one model, as (what, whether it holds)."""
    target = folder / "with_ops.onnx"
    report = onnxnorm.optimize(
        model, target, target="ort-cpu", ops=True, latency=False, time_budget=seconds
    ).report
    parity, calls = report.parity, ours_in(target)
    rows = [(f"calls {dict(calls)}", bool(calls))]
    if parity is None or not calls:
        return [*rows, ("nothing was changed", False)]
    shares = [o["error"] / o["budget"] for o in parity["outputs"] if o["budget"]]
    used = max(shares, default=0.0)
    rows.append(
        (f"parity without the library and with it, at {used:.2f} of its budget", parity["passed"])
    )
    proto = onnx.load(model)
    feeds = dict(make_feeds(proto, count=1)[0].values)
    path = library.required()
    with_it, without = (ran(target, feeds, lib, folder) for lib in ([path], []))
    rows.append((f"with the library onnxruntime ran {dict(with_it)}", with_it == calls))
    rows.append((f"without it {dict(without) or 'none of them'}", not without))
    said = distance(model, target, feeds)
    rows.append((f"in the reference evaluator: {said}", True))
    return rows


def main() -> int:
    """Check every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for parity of each model  [60]"
    )
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            print(model.name)
            try:
                rows = check(model, Path(folder), given.seconds)
            except OnnxNormError as error:
                rows = [(str(error).replace("\n", " "), False)]
            for what, holds in rows:
                failed += not holds
                print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
