"""Write the graphs that both torch exporters make of the networks with fixed statistics.

    python tools/make_exports.py [--out DIR] [--only NAME]...      models/exports/ in the checkout

Each becomes a text (models/skeletons.py), with its plain twin beside it: the same network without
the part that needs no statistics. Needs the extra `onnxnorm[models]`; the manifest says of which
versions the committed ones are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

import onnx  # noqa: E402

from models import skeletons  # noqa: E402
from models.architectures import Exporter  # noqa: E402
from models.fixed import EXPORTERS, OPSET, SYSTEMS, file_name  # noqa: E402


def exported(system: str, exporter: Exporter, *, plain: bool) -> onnx.ModelProto:
    """What an exporter writes of a network, with its own defaults."""
    from models.exported import export
    from models.fixed_statistics import build

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(build(system, plain=plain), path, exporter, OPSET[exporter], "folded")
        return onnx.load(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=skeletons.FOLDER)
    parser.add_argument("--only", action="append", choices=[s.name for s in SYSTEMS])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for system in SYSTEMS:
        if options.only and system.name not in options.only:
            continue
        for exporter in EXPORTERS:
            for plain in (False, True):
                model = exported(system.name, exporter, plain=plain)
                path = options.out / f"{file_name(system.name, exporter, plain=plain)}.txt"
                path.write_text(skeletons.strip(model), encoding="utf-8")
                print(f"{path.name}: {len(model.graph.node)} nodes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
