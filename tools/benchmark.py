"""Ours beside the other optimizers, model by model: size, latency, error, and what the tool costs.

    python tools/benchmark.py --setup DIR                                  the others' environment
    python tools/benchmark.py --env DIR --out RESULTS [FOLDER ...] [--models a,b] [--tool NAME]
    python tools/benchmark.py --out RESULTS --table [PAGE.md] [--note TEXT]    table and plot

For each model each tool optimizes it with its defaults, in a process of its own with a time limit:
its wall time, its peak memory, and a crash is a result too. Then each result is judged against the
original in float64 truth (`onnxnorm.parity`), and all of them are timed under ORT_ENABLE_ALL, in
one process a trial in which every model takes turns with two sessions of the original, in an order
that changes; `onnxnorm.trials.estimate` makes ratio, interval and A/A band of it, as
`onnxnorm compare` does for two. With one thread and with two.

What is done is kept in RESULTS, a JSON file a model, and not done again: an interrupted run goes on
with the next model, and a tool that was not there before is added to each, timed beside the
original anew. Models are the recipes of `models` that onnxruntime can load, and the .onnx files
below each FOLDER; --models takes those whose name contains one of the texts. Expect one minute for
a small model with --seconds 12 and three with the default; most of it is latency.

Tools: onnxsim, onnxslim, onnxscript and onnxruntime.transformers in the environment of
tools/recall.py; ours with --target ort-cpu, and with --ops as well. Ours runs without parity and
latency here, as the others do no such thing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `tools` is a folder of the checkout, not an installed package

import numpy as np  # noqa: E402
import onnx  # noqa: E402

from models import RECIPES, serialise  # noqa: E402
from onnxnorm.errors import OnnxNormError  # noqa: E402
from onnxnorm.trials import Trial, estimate  # noqa: E402
from tools.recall import WORKER, all_nodes, attempts, interpreter, setup  # noqa: E402

MEASURED: Final = ROOT / "tools" / "measured.py"
ORIGINAL: Final = "original"
OURS: Final = {"onnxnorm": (), "onnxnorm --ops": ("--ops",)}
OTHERS: Final = ("onnxsim", "onnxslim", "transformers", "onnxscript")
TOOLS: Final = (*OURS, *OTHERS)
LABELS: Final = {"transformers": "onnxruntime.transformers"}
THREADS: Final = (1, 2)
TRIALS: Final = 8
TURNS: Final = 4
TOOL_SECONDS: Final = 600.0
INPUTS: Final = ROOT / "tools" / "corpus" / "inputs.json"


@dataclass
class Cell:
    """What one tool made of one model.

    Attributes:
        error: Why there is no result; None where there is one.
        seconds: Wall time of the tool.
        peak_mb: Peak memory of its process.
        nodes: Nodes of the result, those of bodies and functions included.
        runs: Nodes that onnxruntime makes of it on the CPU; unlike a time, without noise.
        megabytes: Size of the result with its data files.
        agrees: Whether its outputs are within the budget; None where that could not be told.
        error_ratio: Its error over the original's own, the worst output; None likewise.
        why: Why it does not agree, or could not be told.
        latency: For each number of threads: ratio, interval, band, verdict and milliseconds.
    """

    error: str | None = None
    seconds: float | None = None
    peak_mb: float | None = None
    nodes: int | None = None
    runs: int | None = None
    megabytes: float | None = None
    agrees: bool | None = None
    error_ratio: float | None = None
    why: str = ""
    latency: dict[str, dict[str, Any]] = field(default_factory=dict)


# ** running the tools **


def run_tool(command: Sequence[str], given: str, seconds: float) -> tuple[float, float, str | None]:
    """Run a tool in a process of its own: wall seconds, peak megabytes, and why it failed."""
    launched = [sys.executable, "-I", "-S", str(MEASURED), f"{seconds}", *command]
    done = subprocess.run(launched, input=given, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    why = None
    if found["status"] is None:
        why = f"no end in {seconds:g} s"
    elif found["status"]:
        why = f"the process ended with {found['status']}"
    for line in found["stdout"].splitlines():
        if line.startswith("{"):
            why = json.loads(line).get("error") or why
    return found["seconds"], found["peak_mb"], why


def optimize(tool: str, source: Path, folder: Path, python: Path, seconds: float) -> Cell:
    """Let one tool optimize one model, into a folder of its own under the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if tool in OURS:
        flags = ("--target", "ort-cpu", "--no-parity", "--no-latency", "--quiet", *OURS[tool])
        command = [sys.executable, "-m", "onnxnorm", "optimize", str(source), str(target), *flags]
        wall, peak, why = run_tool(command, "", seconds)
    else:
        command = [str(python), str(WORKER), tool, str(source.parent), str(folder)]
        wall, peak, why = run_tool(command, source.stem, seconds)
    if why is None and not target.is_file():
        why = "it wrote nothing"
    cell = Cell(error=why, seconds=wall, peak_mb=peak)
    if why is None:
        measure_file(cell, target)
    return cell


def measure_file(cell: Cell, path: Path) -> None:
    """Count the nodes of a model file and its bytes."""
    model = onnx.load(path, load_external_data=False)
    cell.nodes = sum(1 for _ in all_nodes(model))
    places = {
        e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"
    }
    files = [path, *(path.parent / place for place in places)]
    cell.megabytes = sum(f.stat().st_size for f in files if f.is_file()) / 1e6


# ** judging and timing, in processes of their own **


def inputs_of(model: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The shapes, and where all inputs are described the values, that a corpus model wants."""
    table: dict[str, Any] = json.loads(INPUTS.read_text(encoding="utf-8"))
    wanted = table.get("/".join(model.parts[-2:]), {})
    shapes = {name: tuple(row["shape"]) for name, row in wanted.items() if "shape" in row}
    graph = onnx.load(model, load_external_data=False).graph
    weights = {t.name for t in graph.initializer}
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {}
    for info in graph.input:
        row = wanted.get(info.name)
        if info.name in weights:
            continue
        if row is None or "shape" not in row or "range" not in row:
            return shapes, {}
        kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        low, high = row["range"]
        drawn = rng.uniform(low, high, row["shape"])
        values[info.name] = (
            np.floor(drawn).astype(kind) if kind.kind in "iu" else drawn.astype(kind)
        )
    return shapes, values


def judge_worker(original: Path, folder: Path) -> int:
    """Judge results against the original; names of tools on stdin, JSON lines on stdout."""
    from onnxnorm.parity import ParityChecker

    said = os.fdopen(os.dup(1), "w", buffering=1)
    shapes, values = inputs_of(original)
    archive = folder / "inputs.npz"
    if values:
        np.savez(archive, **values)
    with ParityChecker(
        original, shapes=shapes or None, inputs=archive if values else None, budget_seconds=120.0
    ) as checker:
        for name in sys.stdin.read().split("\n"):
            said.write(json.dumps({"begin": name}) + "\n")
            error = None
            try:
                path = original if name == ORIGINAL else folder / directory(name) / original.name
                count_runs(path, folder / f"{directory(name)}.runs")
                if name == ORIGINAL:
                    feeds = checker.feeds[0].values
                    (folder / "feeds.pickle").write_bytes(pickle.dumps(dict(feeds)))
                else:
                    place = folder / directory(name)
                    result = checker.check(place / original.name).to_json()
                    (place / "parity.json").write_text(json.dumps(result), encoding="utf-8")
            except OnnxNormError as caught:
                error = str(caught)[:300]
            said.write(json.dumps({"end": name, "error": error}) + "\n")
    return 0


def count_runs(model: Path, told: Path) -> None:
    """Write down how many nodes onnxruntime makes of a model; not every graph can it write."""
    from onnxnorm.session import optimized_graph

    with contextlib.suppress(OnnxNormError):
        runs = sum(1 for _ in all_nodes(optimized_graph(model)))
        told.write_text(str(runs), encoding="utf-8")


def directory(tool: str) -> str:
    """The folder of a tool's results."""
    return tool.replace(" ", "")


def judge(original: Path, folder: Path, cells: Mapping[str, Cell]) -> bool:
    """Compare every result with the original in float64; whether there is anything to time."""
    names = [ORIGINAL, *(t for t, c in cells.items() if c.error is None and t != ORIGINAL)]
    command = [sys.executable, __file__, "--worker", "judge", str(original), str(folder)]
    usable = True
    for name, error in attempts(command, names, 600.0):
        runs = folder / f"{directory(name)}.runs"
        cells[name].runs = int(runs.read_text(encoding="utf-8")) if runs.is_file() else None
        if name == ORIGINAL:
            usable = error is None
            cells[ORIGINAL].why = error or ""
            continue
        cell = cells[name]
        if error is not None:
            cell.agrees, cell.why = (False, error) if usable else (None, error)
            continue
        found = json.loads((folder / directory(name) / "parity.json").read_text(encoding="utf-8"))
        cell.agrees = found["passed"]
        ratios = [
            o["error"] / o["baseline_error"]
            for o in found["outputs"]
            if o["error"] is not None and o["baseline_error"]
        ]
        cell.error_ratio = max(ratios, default=None)
        reasons = [o["reason"] for o in found["outputs"] if o["reason"]]
        cell.why = reasons[0] if reasons else ""
    return usable and (folder / "feeds.pickle").is_file()


def latency_worker(spec: Mapping[str, Any]) -> int:
    """Time every model of a spec in turns: one trial, printed as JSON."""
    from onnxnorm.session import open_session

    feeds = pickle.loads(Path(spec["feeds"]).read_bytes())
    rng = random.Random(spec["seed"])
    roles = list(spec["paths"])
    rng.shuffle(roles)
    runs = {}
    lost = {}
    for role in list(roles):
        try:
            session = open_session(
                spec["paths"][role], threads=spec["threads"], deterministic=False
            )
            runs[role] = session.bind(feeds).raw
            runs[role]()
        except OnnxNormError as error:  # noqa: PERF203  (each may fail by itself)
            lost[role] = error.what
            roles.remove(role)
    clock = time.perf_counter
    for role in roles:
        runs[role]()
    began = clock()
    runs[roles[0]]()
    each = max(clock() - began, 1e-6)
    slot = spec["seconds"] / (len(roles) * spec["turns"])
    loop = max(1, int(2e-4 / each))
    samples = max(3, min(30, int(slot / (each * loop))))
    times: dict[str, list[list[float]]] = {role: [] for role in roles}
    for turn in range(spec["turns"]):
        for role in roles if turn % 2 == 0 else reversed(roles):
            run, taken = runs[role], []
            run()  # wakes its caches, untimed
            for _ in range(samples):
                start = clock()
                for _ in range(loop):
                    run()
                taken.append((clock() - start) / loop * 1e3)
            times[role].append(taken)
    print(json.dumps({"times": times, "lost": lost}))
    return 0


def time_all(original: Path, folder: Path, cells: dict[str, Cell], seconds: float) -> None:
    """Time all results beside two sessions of the original, trial by trial."""
    names = [
        t for t, c in cells.items() if t != ORIGINAL and c.error is None and c.agrees is not None
    ]
    paths = {"first": str(original), "second": str(original)}
    paths |= {name: str(folder / directory(name) / original.name) for name in names}
    lost: dict[str, str] = {}
    for threads in THREADS:
        recorded: list[dict[str, list[list[float]]]] = []
        for trial in range(TRIALS):
            spec = {
                "paths": {role: path for role, path in paths.items() if role not in lost},
                "feeds": str(folder / "feeds.pickle"),
                "threads": threads,
                "turns": TURNS,
                "seconds": seconds / TRIALS,
                "seed": 100 * threads + trial,
            }
            done = subprocess.run(
                [sys.executable, __file__, "--worker", "latency", json.dumps(spec)],
                capture_output=True,
                text=True,
                timeout=600 + 10 * seconds,
                check=False,
            )
            if done.returncode:
                break
            said = json.loads(done.stdout)
            lost |= said["lost"]
            recorded.append(said["times"])
        if len(recorded) < 2 or {"first", "second"} & set(lost):
            cells[ORIGINAL].why = "the models could not be timed together"
            return
        firsts = [t for r in recorded for turn in (*r["first"], *r["second"]) for t in turn]
        cells[ORIGINAL].latency[str(threads)] = {"p50": statistics.median(firsts)}
        for name in names:
            if name in lost:
                cells[name].why = cells[name].why or lost[name]
                continue
            trials = [
                Trial(True, _turns(r["first"]), _turns(r["second"]), _turns(r[name]))
                for r in recorded
            ]
            found = estimate(trials)
            own = [t for r in recorded for turn in r[name] for t in turn]
            told = {**asdict(found), "p50": statistics.median(own)}
            cells[name].latency[str(threads)] = told


def _turns(turns: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(turn) for turn in turns)


# ** a run **


def benchmark(model: Path, tools: Sequence[str], python: Path, seconds: float, limit: float) -> Any:
    """All cells of one model, as JSON values."""
    with tempfile.TemporaryDirectory(prefix="onnxnorm-benchmark-") as name:
        folder = Path(name)
        cells: dict[str, Cell] = {ORIGINAL: Cell()}
        measure_file(cells[ORIGINAL], model)
        order = list(tools)
        random.Random(model.name).shuffle(order)  # nobody is always the one that warms the disk
        for tool in order:
            cells[tool] = optimize(tool, model, folder / directory(tool), python, limit)
        usable = judge(model, folder, cells)
        if usable:
            time_all(model, folder, cells, seconds)
    return {name: asdict(cells[name]) for name in (ORIGINAL, *tools)}


def models_of(folders: Sequence[Path], wanted: Sequence[str], scratch: Path) -> dict[str, Path]:
    """The recipes, written to `scratch`, and the files below some folders, by unique names."""

    def asked(name: str) -> bool:
        return not wanted or any(text in name for text in wanted)

    found: dict[str, Path] = {}
    for name, recipe in RECIPES.items():
        if recipe.rejected is None and asked(name):
            found[name] = scratch / f"{name}.onnx"
            found[name].write_bytes(serialise(recipe.build()))
    for folder in folders:
        for path in sorted(folder.rglob("*.onnx")):
            name = str(path.relative_to(folder).with_suffix("")).replace("/", "--")
            if name in found:
                name = f"{folder.name}--{name}"
            if asked(name):
                found[name] = path.resolve()
    return found


def versions(python: Path | None) -> dict[str, str]:
    """The versions of everything that took part, and the machine."""
    from onnxnorm.session import environment

    there = environment()
    told = {key: str(there[key]) for key in ("onnxnorm", "onnxruntime", "onnx", "cpu", "cores")}
    if python is not None:
        said = subprocess.run(
            [str(python), str(WORKER), "--versions"], check=True, capture_output=True, text=True
        )
        told |= {f"{k} (others)": v for k, v in json.loads(said.stdout).items()}
    return told


def run_all(
    models: Mapping[str, Path],
    tools: Sequence[str],
    python: Path,
    used: Mapping[str, str],
    out: Path,
    seconds: float,
    limit: float,
) -> None:
    """Benchmark every model with every tool that its file in `out` does not have yet."""
    for number, (name, path) in enumerate(models.items()):
        target = out / f"{name}.json"
        known = json.loads(target.read_text(encoding="utf-8"))["cells"] if target.exists() else {}
        missing = [tool for tool in tools if tool not in known]
        if not missing:
            continue
        began = time.perf_counter()
        cells = benchmark(path, missing, python, seconds, limit)
        found = {
            "model": name,
            "date": datetime.date.today().isoformat(),
            "versions": used,
            "cells": {**cells, **known},
        }
        scratch = target.with_suffix(".part")
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        scratch.replace(target)
        took = time.perf_counter() - began
        print(f"{number + 1}/{len(models)} {name}: {took:.0f} s", file=sys.stderr, flush=True)


# ** what is told of it **


def load(folder: Path) -> dict[str, Any]:
    """The results of every model."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def rows_of(results: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Model, tool and cell of every result."""
    for model, found in results.items():
        for tool, cell in found["cells"].items():
            yield model, tool, cell


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """One row for each tool: over all models."""
    table = [
        [
            "tool",
            "models",
            "crashed",
            "outputs differ",
            *(
                title
                for t in THREADS
                for title in (f"faster, slower ({t} thr.)", f"geometric mean ({t} thr.)")
            ),
            "median seconds",
            "median peak MB",
        ]
    ]
    for tool in TOOLS:
        cells = [c for _, t, c in rows_of(results) if t == tool]
        if not cells:
            continue
        fine = [c for c in cells if c["error"] is None]
        row = [
            LABELS.get(tool, tool),
            str(len(cells)),
            str(len(cells) - len(fine)),
            str(sum(c["agrees"] is False for c in fine)),
        ]
        for threads in THREADS:
            told = [c["latency"][str(threads)] for c in fine if str(threads) in c["latency"]]
            kinds = [t["verdict"] for t in told]
            row.append(f"{kinds.count('faster')}, {kinds.count('slower')} of {len(kinds)}")
            logs = [math.log(t["ratio"]) for t in told]
            row.append(f"{math.exp(statistics.fmean(logs)):.3f}" if logs else "-")
        row.append(f"{statistics.median(c['seconds'] for c in fine):.1f}" if fine else "-")
        row.append(f"{statistics.median(c['peak_mb'] for c in fine):.0f}" if fine else "-")
        table.append(row)
    return table


def cells_of(model: str, tool: str, cell: Mapping[str, Any]) -> list[str]:
    """One row of the large table."""
    label = LABELS.get(tool, tool)
    if cell["error"] is not None:
        return [model, label, f"no result: {cell['error'][:60]}", *[""] * 7]
    told = []
    for threads in THREADS:
        found = cell["latency"].get(str(threads))
        if found is None:
            told.append("-")
        elif "ratio" not in found:
            told.append(f"{found['p50']:.3g} ms")
        else:
            low, high = found["interval"]
            mark = {"faster": " faster", "slower": " slower"}.get(found["verdict"], "")
            told.append(f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]{mark}")
    error = "" if tool == ORIGINAL else _error(cell)
    cost = [
        "" if cell[key] is None else f"{cell[key]:{form}}"
        for key, form in (("seconds", ".1f"), ("peak_mb", ".0f"))
    ]
    size = f"{cell['megabytes']:.1f}"
    runs = cell.get("runs")  # results of an earlier version of this tool have none
    shown = "-" if runs is None else str(runs)
    return [model, label, str(cell["nodes"]), shown, size, *told, error, *cost]


def _error(cell: Mapping[str, Any]) -> str:
    if cell["agrees"] is None:
        return "not told"
    known = cell["error_ratio"]
    number = "-" if known is None else f"{known:.2f}"
    return number if cell["agrees"] else f"{number} differs"


def markdown(results: Mapping[str, Any], plot: str, note: str = "") -> str:
    """The page: what was run, the summary, the plot, every model."""
    first = next(iter(results.values()))
    told = "\n".join(f"| {key} | {value} |" for key, value in first["versions"].items())
    titles = ["model", "tool", "nodes", "run", "MB", *(f"ratio, {t} thr." for t in THREADS)]
    titles += ["error", "seconds", "peak MB"]
    lines = [cells_of(*row) for row in rows_of(results)]
    said = f"\n{textwrap.fill(note, 100, break_on_hyphens=False)}\n" if note else ""
    return f"""# Benchmark

Made by `tools/benchmark.py` {_when(results)}, whose docstring says what is measured and how.
"ratio" is the latency under ORT_ENABLE_ALL over that of the original under the same, with its 95 %
interval; "faster" and "slower" are said only beyond the A/A band. "error" is the distance from the
original in float64, as a multiple of the original's own; "differs" is beyond the budget of
[report.md](report.md). "nodes" are those of the file, "run" those that onnxruntime makes
of them on the CPU. "seconds" and "peak MB" are those of the tool's process.
{said}
| | |
|---|---|
{told}

## All models together

{_table(summary(results))}

![latency ratio of every model and tool]({plot})

## Every model

{_table([titles, *lines])}
"""


def _when(results: Mapping[str, Any]) -> str:
    dates = sorted({found["date"] for found in results.values()})
    return f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"

    head, *rest = rows
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rest)])


def draw(results: Mapping[str, Any], path: Path, threads: int = 1) -> None:
    """Plot the ratios: a row for each model, a dot with its interval for each tool."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "onnxnorm"  # the same results give the same bytes
    from matplotlib import pyplot

    models = list(results)
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.42 * len(models)), layout="constrained")
    for number, tool in enumerate(TOOLS):
        xs, ys, spans = [], [], []
        for place, model in enumerate(models):
            cell = results[model]["cells"].get(tool)
            found = cell["latency"].get(str(threads)) if cell else None
            if found is not None:
                xs.append(found["ratio"])
                ys.append(place + (number - len(TOOLS) / 2) * 0.11)
                low, high = found["interval"]
                spans.append((max(0.0, found["ratio"] - low), max(0.0, high - found["ratio"])))
        if xs:
            axes.errorbar(
                xs,
                ys,
                xerr=np.asarray(spans).T,
                fmt="o",
                markersize=4,
                linewidth=1,
                label=LABELS.get(tool, tool),
            )
    axes.axvline(1.0, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel(f"latency over that of the original, {threads} thread (below 1 is faster)")
    ticks = [0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0]
    low, high = axes.get_xlim()
    shown = [t for t in ticks if low <= t <= high]
    axes.set_xticks(shown, [f"{t:g}" for t in shown])
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def render(folder: Path, page: Path, note: str) -> None:
    """Write the page and the plot beside it."""
    results = load(folder)
    plot = page.with_suffix(".svg")
    draw(results, plot)
    page.write_text(markdown(results, plot.name, note), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--setup", type=Path, metavar="DIR", help="make the environment and end")
    parser.add_argument("--env", type=Path, metavar="DIR", help="the environment of the others")
    parser.add_argument("--out", type=Path, metavar="RESULTS", help="where results are kept")
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", help="of .onnx files")
    parser.add_argument("--models", default="", help="only those whose name contains one of these")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; repeatable")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="latency, for each thread count"
    )
    parser.add_argument("--tool-seconds", type=float, default=TOOL_SECONDS, help="limit of a tool")
    parser.add_argument(
        "--table",
        type=Path,
        nargs="?",
        const=ROOT / "docs" / "benchmark.md",
        metavar="PAGE.md",
        help="write table and plot and end",
    )
    parser.add_argument("--note", default="", help="a sentence for the page of --table")
    args = parser.parse_args(argv)
    if args.setup:
        return setup(args.setup)
    if args.out is None:
        parser.error("--out RESULTS is needed")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        render(args.out, args.table, args.note)
        return 0
    tools = args.tool or list(TOOLS)
    if args.env is None and set(tools) & set(OTHERS):
        parser.error("--env DIR: where the other tools are; `--setup DIR` makes it")
    python = interpreter(args.env) if args.env else Path(sys.executable)
    used = versions(python if args.env else None)
    with tempfile.TemporaryDirectory(prefix="onnxnorm-benchmark-") as scratch:
        models = models_of(args.folders, [t for t in args.models.split(",") if t], Path(scratch))
        run_all(models, tools, python, used, args.out, args.seconds, args.tool_seconds)
    return 0


def work(what: str, *given: str) -> int:
    """Do a part of a run in this process."""
    if what == "judge":
        return judge_worker(Path(given[0]), Path(given[1]))
    return latency_worker(json.loads(given[0]))


if __name__ == "__main__":
    sys.exit(work(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
