"""Which onnxruntime loads and computes which form of the table in onnxnorm/lowering.py, on the CPU.

    python tools/check_forms.py                                 the installed onnxruntime
    python tools/check_forms.py --onnxruntime 1.16.3 1.32.0     these, each in a folder of its own

Each operator runs with optimizations off on random inputs, in float32 and float16, and is held
against numpy in float64; "wrong" is a result that is off by more than its type explains. An older
onnxruntime is installed beside this environment with `pip install --target`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

_SIZE: Final = 8
_EPSILON: Final = 1e-5
_OPSETS: Final = range(19, 27)
_TOLERANCE: Final = {"float": 1e-5, "float16": 2e-2}  # some ten roundings at values up to four


def forms() -> dict[str, Any]:
    """Models by name: the operators, and an Add for each opset."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    found: dict[str, Any] = {}

    def keep(
        name: str, op: str, given: str, opset: int, *, skip: Any = None, dtype: int = 1
    ) -> None:
        full = [2, 3, _SIZE]
        contrib = op.startswith("Skip")
        values = {"g": 2.0, "b": 0.5, "z": 0.25}
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        inputs = given.split()
        shapes = {"x": full, "s": skip or full}
        outputs = ["y", "", "", "sum"] if contrib else ["y"]
        attrs: dict[str, Any] = {} if op == "Add" else {"epsilon": _EPSILON}
        node = helper.make_node(
            op, inputs, outputs, domain="com.microsoft" if contrib else "", **attrs
        )
        model = helper.make_model(
            helper.make_graph(
                [node],
                name,
                [
                    helper.make_tensor_value_info(k, dtype, s)
                    for k, s in shapes.items()
                    if k in inputs
                ],
                [helper.make_tensor_value_info(o, dtype, full) for o in outputs if o],
                [
                    numpy_helper.from_array(np.full(_SIZE, v, kind), k)
                    for k, v in values.items()
                    if k in inputs
                ],
            ),
            opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
            ir_version=8 if opset < 21 else 10 if opset < 25 else 11 if opset < 26 else 12,
        )
        found[name] = model

    for dtype, suffix in ((TensorProto.FLOAT, ""), (TensorProto.FLOAT16, " float16")):
        for opset in (13, 17):
            keep(f"LayerNormalization, opset {opset}{suffix}", "LayerNormalization", "x g b", opset,
                 dtype=dtype)  # fmt: skip
        simple = "SimplifiedLayerNormalization"
        keep(f"{simple}{suffix}", simple, "x g", 13, dtype=dtype)
        keep(f"RMSNormalization{suffix}", "RMSNormalization", "x g", 23, dtype=dtype)
        for skip, said in (
            (None, ""),
            ([1, 3, _SIZE], ", skip (1,S,d)"),
            ([3, _SIZE], ", skip (S,d)"),
        ):
            for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
                shift = "" if "Simplified" in op else " b"
                for bias in ("", " z"):
                    name = f"{op}{', bias' if bias else ''}{said}{suffix}"
                    keep(name, op, f"x s g{shift}{bias}", 17, skip=skip, dtype=dtype)
    for opset in _OPSETS:
        keep(f"opset {opset}", "Add", "x x", opset)
    return found


def judge(path: Path) -> str:
    """What the onnxruntime of this process makes of one model: "right", "wrong" or why not."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    random = np.random.default_rng(0)
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
        feeds = {}
        for given in session.get_inputs():
            kind = np.float16 if "float16" in given.type else np.float32
            feeds[given.name] = random.normal(size=given.shape).astype(kind)
        outputs = session.run(None, feeds)
    except Exception as error:  # onnxruntime raises several types
        text = str(error).replace("\n", " ")
        if "NOT_IMPLEMENTED" in text:
            return "no kernel"
        return "not loaded" if "Load model" in text else "refused"
    name = path.stem
    x = feeds["x"].astype(np.float64)
    wanted = [x + x]
    if not name.startswith("opset"):
        total = x + feeds.get("s", np.zeros(1)).astype(np.float64) + (0.25 if "bias" in name else 0)
        layer = "LayerNormalization" in name and "Simplified" not in name
        centred = total - total.mean(-1, keepdims=True) if layer else total
        y = 2 * centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + _EPSILON)
        wanted = [y + 0.5 if layer else y, total]
    limit = _TOLERANCE["float16" if name.endswith("float16") else "float"]
    far = max(
        float(np.abs(o.astype(np.float64) - w).max()) for o, w in zip(outputs, wanted, strict=False)
    )
    return "right" if far <= limit else "wrong"


def worker(folder: Path) -> None:
    """Judge every model of a folder, and print what was found as JSON."""
    import onnxruntime

    found = {p.stem: judge(p) for p in sorted(folder.glob("*.onnx"))}
    print(json.dumps({"version": onnxruntime.__version__, "found": found}))


def main() -> int:
    """Print one line for each form, one column for each onnxruntime."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--onnxruntime", nargs="*", default=[], metavar="VERSION")
    parser.add_argument("--cache", type=Path, help="where installed versions are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "models"
        folder.mkdir()
        for label, model in forms().items():
            (folder / f"{label}.onnx").write_bytes(model.SerializeToString())
        columns = []
        for version in args.onnxruntime or [""]:
            environment = dict(os.environ)
            if version:
                place = (args.cache or Path(name)) / version
                if not place.exists():
                    # The first numpy that an onnxruntime before 1.19 does not run with is 2.0.
                    old = tuple(map(int, version.split(".")[:2])) < (1, 19)
                    numpy = "numpy<2" if old else "numpy"
                    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place)]
                    subprocess.run([*install, f"onnxruntime=={version}", numpy], check=True)
                environment["PYTHONPATH"] = str(place)
            said = subprocess.run(
                [sys.executable, __file__, "--worker", str(folder)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            columns.append(json.loads(said.stdout))
    print("| form | " + " | ".join(c["version"] for c in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for label in columns[0]["found"]:
        print(f"| {label} | " + " | ".join(c["found"][label] for c in columns) + " |")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        sys.exit(main())
