"""Inspecting: what it must not import, which would take longer than all it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
from onnx import parser

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[2, 4] x) => (float[2, 4] y) <float[4] g = {1, 2, 3, 4}> {
   y = LayerNormalization (x, g)
}
"""
MEASURING = [
    "jinja2", "matplotlib", "onnx.reference", "onnxruntime", "onnxnorm.api", "onnxnorm.latency",
    "onnxnorm.ops.build", "onnxnorm.parity", "onnxnorm.session", "onnxnorm.staging",
    "onnxnorm.truth", "onnxnorm.tuning", "rich",
]  # fmt: skip


def test_nothing_is_imported_that_measures_proves_or_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(MODEL), path)
    program = (
        f"import sys, onnxnorm; found = onnxnorm.inspect({str(path)!r}).to_json()['norms'];"
        f"print(len(found), [m for m in {MEASURING} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 []\n"
