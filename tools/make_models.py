"""Write the models that the tests and benchmarks use, each with a row in a manifest.

    python tools/make_models.py --list
    python tools/make_models.py --out DIR                                   the torch-free recipes
    python tools/make_models.py --kind exports --out DIR                    every real architecture
    python tools/make_models.py --only resnet50 --opset 17 --exporter torchscript --out DIR
    python tools/make_models.py --update                                    models/ in the checkout

Exports need the extra `onnxnorm[models]`. What an exporter refuses becomes a row with its reason,
not a failure of the run; what is already in DIR with the recorded bytes is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

import onnx  # noqa: E402

from models import RECIPES, serialise  # noqa: E402
from models.architectures import ARCHITECTURES, OPSETS  # noqa: E402

MANIFEST = "manifest.json"
FUSED_ATTENTION_OPSET = 14  # the first at which the torchscript exporter writes it
_PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxscript", "numpy")
Row = dict[str, Any]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(path: Path) -> Row:
    """Return what a manifest row says of a file: bytes, sha256, opset, nodes, norms.

    `norms` counts the normalization operators of the main graph by type.
    """
    model = onnx.load(path, load_external_data=False)
    types = Counter(node.op_type for node in model.graph.node)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "opset": opset,
        "nodes": sum(types.values()),
        "norms": {k: n for k, n in sorted(types.items()) if "Norm" in k or "Softmax" in k},
    }


def read_manifest(folder: Path) -> dict[str, Row]:
    """Return the rows of a folder's manifest by name; none where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return {row["name"]: row for row in rows}


def write_manifest(folder: Path, rows: dict[str, Row]) -> None:
    """Write a manifest by a rename: a list, one row a line, sorted by name."""
    lines = [json.dumps(rows[name]) for name in sorted(rows)]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    staged = folder / (MANIFEST + ".part")
    staged.write_text(text, encoding="utf-8")
    staged.replace(folder / MANIFEST)


def make_recipe(name: str, folder: Path) -> Row:
    """Build a torch-free recipe into a folder and return its manifest row."""
    path = folder / f"{name}.onnx"
    path.write_bytes(serialise(RECIPES[name].build()))
    return {"name": name, "kind": "recipe", "title": RECIPES[name].title, **describe(path)}


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Silence both streams at the file descriptor: exporters print whole graphs from C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with Path(os.devnull).open("wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(kept, start=1):
            os.dup2(saved, number)
            os.close(saved)


def _first_line(error: BaseException) -> str:
    """Return an exporter's reason as one line; torch hides it behind a banner and a cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _still_true(row: Row, path: Path) -> bool:
    """Return whether a recorded failure or file needs no new attempt."""
    return bool(row["failure"]) or (path.exists() and sha256(path) == row["sha256"])


def make_exports(wanted: Sequence[str], args: argparse.Namespace, folder: Path) -> None:
    """Export architectures one after the other, writing the manifest after each file."""
    with _muted():
        from models import exported

    versions = {name: metadata.version(name) for name in _PACKAGES}
    for architecture in ARCHITECTURES:
        variants = [
            (exporter, opset, flavour)
            for exporter, opset, flavour in architecture.variants()
            if args.exporter in (None, exporter)
            and args.opset in (None, opset)
            and args.flavour in (None, flavour)
        ]
        examples: dict[bool, exported.Example] = {}
        for exporter, opset, flavour in variants if architecture.name in wanted else ():
            name = f"{architecture.name}-{exporter}-op{opset}-{flavour}"
            rows = read_manifest(folder)
            path = folder / f"{name}.onnx"
            known = rows.get(name)
            if known and not args.force and _still_true(known, path):
                continue
            row: Row = {
                "name": name,
                "kind": "export",
                "title": architecture.title,
                "exporter": exporter,
                "flavour": flavour,
                "opset_asked": opset,
                "versions": versions,
                "failure": None,
            }
            start = time.monotonic()
            try:
                with _muted():
                    fused = opset >= FUSED_ATTENTION_OPSET
                    if fused not in examples:
                        examples[fused] = exported.build(architecture.name, fused)
                    exported.export(examples[fused], path, exporter, opset, flavour)
                made = describe(path)
                if made["opset"] == opset:
                    onnx.checker.check_model(path, full_check=True)
                    row.update(made)
                else:  # the converter gave up and left the opset as it was
                    path.unlink()
                    row["failure"] = f"asked for opset {opset}, the exporter left {made['opset']}"
            except onnx.checker.ValidationError as error:
                path.unlink()
                row["failure"] = f"the exporter wrote an invalid model: {_first_line(error)}"
            except Exception as error:  # any reason of an exporter is data of this table
                path.unlink(missing_ok=True)
                row["failure"] = _first_line(error)
            row["seconds"] = round(time.monotonic() - start, 1)
            write_manifest(folder, {**read_manifest(folder), name: row})
            outcome = row["failure"] or f"{row['bytes'] / 1e6:.0f} MB {row['norms']}"
            print(f"{name:45s} {row['seconds']:6.1f} s  {outcome}", flush=True)


def update(exports: Path | None = None) -> None:
    """Refresh the committed models and models/manifest.json in the checkout.

    Args:
        exports: A folder of exports whose rows replace those that are recorded; they stay as they
            are where it is None.
    """
    folder = ROOT / "models"
    source = read_manifest(exports or folder)
    rows = {name: row for name, row in source.items() if row["kind"] == "export"}
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in RECIPES.items():
            rows[name] = make_recipe(name, Path(scratch))
            if recipe.committed:
                shutil.copyfile(Path(scratch, f"{name}.onnx"), folder / f"{name}.onnx")
    write_manifest(folder, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="print what can be made and exit")
    parser.add_argument("--update", action="store_true", help="refresh models/ in the checkout")
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="--update: rows of these exports"
    )
    parser.add_argument("--kind", choices=("recipes", "exports", "all"), default="recipes")
    parser.add_argument("--only", action="append", metavar="NAME", help="may be given repeatedly")
    parser.add_argument("--opset", type=int, help="exports: this opset only")
    parser.add_argument("--exporter", choices=tuple(OPSETS), help="exports: this exporter only")
    parser.add_argument("--flavour", choices=("kept", "folded"), help="BatchNormalization kept?")
    parser.add_argument("--force", action="store_true", help="make again what is already there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write")
    args = parser.parse_args(argv)
    titles = {
        **{n: r.title for n, r in RECIPES.items()},
        **{a.name: a.title for a in ARCHITECTURES},
    }
    if args.list:
        for name, title in titles.items():
            print(f"{'recipe' if name in RECIPES else 'export':7s} {name:32s} {title}")
        return 0
    if args.update:
        update(args.record)
        return 0
    if args.out is None:
        parser.error("--out DIR is needed to write models")
    if unknown := set(args.only or ()) - set(titles):
        parser.error(f"no model is called {', '.join(sorted(unknown))}; see --list")
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    recipes = args.only or (RECIPES if args.kind != "exports" else ())
    exports = args.only or ([a.name for a in ARCHITECTURES] if args.kind != "recipes" else ())
    for name in RECIPES:
        if name in recipes:
            row = make_recipe(name, folder)
            write_manifest(folder, {**read_manifest(folder), name: row})
            print(f"{name:45s} {row['bytes'] / 1e3:9.1f} kB")
    if any(a.name in exports for a in ARCHITECTURES):
        make_exports(exports, args, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
