"""Run one optimizer over model files; the half of tools/recall.py that lives in its environment.

    python tools/recall_worker.py TOOL IN_DIR OUT_DIR < names

Reads names from stdin, optimizes IN_DIR/NAME.onnx to OUT_DIR/NAME.onnx with the tool's defaults,
and says so on stdout, a JSON object a line: {"begin": NAME}, then {"end": NAME, "error": null or
text}. What the tool itself prints goes nowhere. `--versions` prints the packages instead.

Needs onnx and the tools only, nothing of this project.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "onnxsim", "onnxslim")


def by_onnxruntime(source: Path, target: Path) -> None:
    """Let onnxruntime write the graph that it runs on the CPU at ORT_ENABLE_EXTENDED.

    Where there are feeds it is run as well: not every graph that it runs can it write. No outputs
    are written down where the run fails.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = os.fspath(target)
    session = onnxruntime.InferenceSession(
        os.fspath(source), options, providers=["CPUExecutionProvider"]
    )
    given = source.with_suffix(".feeds")
    if given.exists():
        feeds = pickle.loads(given.read_bytes())
        if all(np.issubdtype(array.dtype, np.number) for array in feeds.values()):
            try:
                outputs = session.run(None, feeds)
            except Exception:  # it loads what it cannot run: no outputs
                outputs = []
            target.with_suffix(".outputs").write_bytes(pickle.dumps(outputs))


def by_transformers(source: Path, target: Path) -> None:
    """Use onnxruntime.transformers' optimizer as its documentation does, for model type bert."""
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(os.fspath(source), model_type="bert").save_model_to_file(
        os.fspath(target)
    )


def by_onnxscript(source: Path, target: Path) -> None:
    """Use onnxscript's optimize and rewrite, then its fusions for onnxruntime."""
    import onnx
    import onnx_ir
    import onnxscript.optimizer
    import onnxscript.rewriter
    from onnxscript.rewriter import ort_fusions

    model = onnx_ir.serde.deserialize_model(onnx.load(source))
    onnxscript.optimizer.optimize(model)
    model = onnxscript.rewriter.rewrite(model)
    model, _ = ort_fusions.optimize_for_ort(model)
    onnx.save(onnx_ir.serde.serialize_model(model), target)


def by_onnxsim(source: Path, target: Path) -> None:
    """Use onnxsim.simplify."""
    import onnx
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(model, target)


def by_onnxslim(source: Path, target: Path) -> None:
    """Use onnxslim.slim."""
    import onnx
    import onnxslim

    model = onnxslim.slim(onnx.load(source))
    if model is None:
        raise RuntimeError("onnxslim returned nothing")
    onnx.save(model, target)


TOOLS: Final[dict[str, Callable[[Path, Path], None]]] = {
    "onnxruntime": by_onnxruntime,
    "transformers": by_transformers,
    "onnxscript": by_onnxscript,
    "onnxsim": by_onnxsim,
    "onnxslim": by_onnxslim,
}


def versions() -> dict[str, str]:
    """Return the installed packages that matter, by name."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed}


def main() -> int:
    """Optimize what stdin names."""
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps(versions()))
        return 0
    tool, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    said = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")

    def say(**what: Any) -> None:
        said.write(json.dumps(what) + "\n")

    names = sys.stdin.read().split()
    for name in names:
        say(begin=name)
        error: str | None = None
        try:
            TOOLS[tool](source / f"{name}.onnx", target / f"{name}.onnx")
        except Exception as caught:  # whatever a tool does is a result
            error = f"{type(caught).__name__}: {caught}"[:300]
        say(end=name, error=error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
