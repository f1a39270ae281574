"""The examples of docs/pipelines.md run where their packages are installed.

To run them all, make an environment for each of `torch onnxscript`, `optimum-onnx[onnxruntime]` and
`olive-ai`, install this package and pytest into it, and run this file there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import onnx
import pytest
from onnx import parser

DOCS: Final = Path(__file__).parents[1] / "docs" / "pipelines.md"
BLOCK: Final = re.compile(r"^```python ([\w.]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES: Final = BLOCK.findall(DOCS.read_text(encoding="utf-8"))


def test_every_pipeline_has_an_example() -> None:
    assert [needs for needs, _ in EXAMPLES] == ["torch", "torch", "optimum.exporters.onnx", "olive"]


@pytest.mark.parametrize(("needs", "code"), EXAMPLES, ids=[needs for needs, _ in EXAMPLES])
def test_it_runs(needs: str, code: str, tmp_path: Path) -> None:
    for package in dict.fromkeys((needs.partition(".")[0], needs)):
        pytest.importorskip(package, exc_type=ImportError)
    if needs == "olive":
        onnx.save(layer_norm(), tmp_path / "model.onnx")
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    given = {tmp_path / "model.onnx"} if needs == "olive" else set()
    written = [onnx.load(p) for p in sorted(set(tmp_path.rglob("*.onnx")) - given)]
    assert written
    for model in written:
        named = [e.value for n in model.graph.node for e in n.metadata_props]
        assert any(value.startswith(("lower-", "fold-", "stream-")) for value in named)


def layer_norm() -> onnx.ModelProto:
    """A layer norm in primitives."""
    return parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        main (float[N,3,4] x) => (float[N,3,4] y)
        <float[4] g = {1, 2, 3, 4}, float[4] b = {1, 0, 0, 1}, float e = {0.001}>
        {
            m = ReduceMean <axes = [-1]> (x)
            d = Sub (x, m)
            p = Mul (d, d)
            v = ReduceMean <axes = [-1]> (p)
            a = Add (v, e)
            s = Sqrt (a)
            q = Div (d, s)
            w = Mul (q, g)
            y = Add (w, b)
        }
        """
    )
