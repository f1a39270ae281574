"""Check onnxnorm on a machine with an NVIDIA GPU: what cannot be run anywhere else.

    python tools/gpu_check.py [MODEL.onnx ...]

1. CUDA is really active: the driver, the libraries and the wheel, and nodes of the model on it.
2. `optimize` with the CUDA provider: parity on the device, latency with inputs on the device.
3. `compare` of the result with itself claims nothing.

It prints one line a check and the figures, and exits with 0 when all hold, 1 when one does not, and
2 where there is no usable GPU. The tests that need a GPU are `pytest -m gpu`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import onnxnorm
from onnxnorm.errors import OnnxNormError, ProviderError
from onnxnorm.session import environment, open_session, resolve_provider

DEMO = Path(__file__).parent.parent / "models" / "demo.onnx"


def check(model: Path, folder: Path, seconds: float) -> list[tuple[str, bool]]:
    """Every check of one model, as (what, whether it holds)."""
    with open_session(model, provider="cuda") as session:
        placed = session.placement
    found = [(f"nodes by provider: {placed}", any("cuda" in p.lower() for p in placed))]
    target = folder / model.name
    report = onnxnorm.optimize(model, target, provider="cuda", time_budget=seconds).report
    parity, latency = report.parity, report.latency
    passed = parity is not None and parity["passed"]
    found.append((f"parity on the device: {json.dumps(parity)[:300]}", passed))
    if latency is not None:
        said = f"latency: {latency['verdict']}, ratio {latency['ratio']:.3f} {latency['interval']}"
        found.append((said, latency["provider"] == "cuda"))
    again = onnxnorm.compare(target, target, provider="cuda", time_budget=seconds)
    verdict = "not measured" if again.latency is None else again.latency["verdict"]
    found.append((f"a model against itself: {verdict}", verdict == "no measurable difference"))
    return found


def main() -> int:
    """Run every check on every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, default=[DEMO])
    parser.add_argument("--seconds", type=float, default=60.0, help="for parity of each model")
    options = parser.parse_args()
    try:
        resolve_provider("cuda")
    except ProviderError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(environment(), indent=2, default=str))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            try:
                rows = check(model, Path(folder), options.seconds)
            except OnnxNormError as error:
                rows = [(str(error).replace("\n", " "), False)]
            for what, holds in rows:
                failed += not holds
                print(f"{'ok  ' if holds else 'FAIL'} {model.name}: {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
