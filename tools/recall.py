"""How many normalizations each tool recognises, how many near misses it breaks, how often it dies.

    python tools/recall.py --setup DIR
    python tools/recall.py --env DIR [--tool NAME]... [--models DIR] [--json R.json] [--md R.md]

The models are those of `models.spellings`, and the .onnx files under --models. Each tool optimizes
each model, in processes of its own that may hang or crash, and then the result is run: a
normalization counts as raised when one fused operator stands in place of its nodes and the outputs
still agree with the original in float64; a near miss counts as wrong when they no longer do, or
when the result no longer runs. For ours, the rows of `onnxnorm.inspect` are judged.

The other tools live in an environment of their own, which --setup makes:

    python -m venv DIR
    DIR/bin/pip install onnx onnxruntime-gpu onnxscript onnxsim onnxslim sympy coloredlogs torch

Where there is no GPU wheel it is onnxruntime; all run on the CPU. onnxruntime.transformers imports
sympy, coloredlogs and torch.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import venv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

from models.spellings import Case, cases, judge  # noqa: E402
from onnxnorm import storage, truth  # noqa: E402
from onnxnorm.errors import OnnxNormError  # noqa: E402
from onnxnorm.session import open_session  # noqa: E402

WORKER: Final = ROOT / "tools" / "recall_worker.py"
OURS: Final = "onnxnorm"
TOOLS: Final = (OURS, "onnxruntime", "transformers", "onnxscript", "onnxsim", "onnxslim")
REQUIREMENTS: Final = ("onnx", "onnxscript", "onnxsim", "onnxslim", "sympy", "coloredlogs", "torch")
SECONDS_PER_MODEL: Final = 120.0

# What one fused operator looks like, for each kind. EvoNorm and filter response norm have none.
_LAYER: Final = ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization")
_RMS: Final = (
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "layer_norm": (*_LAYER, "InstanceNormalization", "MeanVarianceNormalization"),
    "rms_norm": (*_RMS, "LpNormalization"),
    "l2_norm": ("LpNormalization", *_RMS),
    "softmax": ("Softmax",),
    "log_softmax": ("LogSoftmax",),
    "instance_norm": (*_LAYER, "InstanceNormalization", "GroupNormalization", "GroupNorm"),
    "group_norm": ("GroupNormalization", "GroupNorm", "SkipGroupNorm"),
    "batch_norm": ("BatchNormalization",),
    "channel_affine": ("BatchNormalization",),
    "evo_norm": (),
    "filter_response_norm": (),
    "weight_standardization": (),
}
# One of these left over means that a part of the chain is still there.
LEFT_OVER: Final = frozenset(
    {
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL2",
        "ReduceMax",
        "ReduceLogSumExp",
        "GlobalAveragePool",
        "Sqrt",
        "Exp",
        "Log",
    }
)
AFFINE: Final = frozenset({"Sub", "Div", "Mul", "Add", "Sqrt", "Reciprocal", "Pow"})
ANY_NORM: Final = frozenset(op for ops in FUSED.values() for op in ops)

# Beyond the original's own error, relative to the output's largest value: one rounding of the
# type in each of some ten nodes. A near miss that was fused is off by a hundred times as much.
NOISE: Final = {"float16": 2e-2, "bfloat16": 2.5e-1}


@dataclass
class Outcome:
    """What became of one model in one tool.

    Attributes:
        error: Why the tool gave no model; None where it did.
        raised: Whether a fused operator stands in place of the nodes.
        agrees: Whether the outputs are those of the original; None where nobody could run it.
        note: What was seen.
    """

    error: str | None = None
    raised: bool = False
    agrees: bool | None = None
    note: str = ""


@dataclass
class Bench:
    """The models on disk and what is known of them."""

    folder: Path
    cases: dict[str, Case]
    truths: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    baselines: dict[str, float | None] = field(default_factory=dict)


# ** running things in processes of their own **


def attempts(
    command: Sequence[str], names: Sequence[str], seconds: float
) -> Iterator[tuple[str, str | None]]:
    """Yield each name and its error; a process that dies or hangs is begun anew behind the name."""
    left = list(names)
    while left:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            process.stdin.write("\n".join(left))
            process.stdin.close()
        begun: str | None = None
        why = ""
        while True:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                why = f"no answer within {seconds:g} s"
                process.kill()
                break
            if line is None:
                break
            said = json.loads(line)
            if "begin" in said:
                begun = said["begin"]
            else:
                left.remove(said["end"])
                begun = None
                yield said["end"], said["error"]
        status = process.wait()
        reader.join()
        process.stdout.close()
        if not left:
            return
        if begun is None:  # it ended before it began: no name can be blamed
            for name in left:
                yield name, why or f"the process ended with {status}"
            return
        left.remove(begun)
        yield begun, why or f"the process ended with {status}"


def _read(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def run_worker() -> int:
    """Run models in onnxruntime, or inspect them; names on stdin, as tools/recall_worker.py."""
    what, source, target = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    said = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for name in sys.stdin.read().split():
        said.write(json.dumps({"begin": name}) + "\n")
        error = None
        try:
            {"run": _run_one, "inspect": _inspect_one, "parity": _parity_one}[what](
                name, source, target
            )
        except OnnxNormError as caught:
            error = str(caught)[:300]
        except Exception as caught:  # a crash is a result
            error = f"{type(caught).__name__}: {caught}"[:300]
        said.write(json.dumps({"end": name, "error": error}) + "\n")
    return 0


def _run_one(name: str, source: Path, target: Path) -> None:
    feeds = pickle.loads((source.parent / "models" / f"{name}.feeds").read_bytes())
    with open_session(source / f"{name}.onnx", optimize=False) as session:
        found = session.run(feeds)
    (target / f"{name}.outputs").write_bytes(pickle.dumps(list(found.values())))


def _inspect_one(name: str, source: Path, target: Path) -> None:
    import onnxnorm

    report: Any = onnxnorm.inspect(source / f"{name}.onnx").to_json()
    (target / f"{name}.json").write_text(json.dumps(report["norms"]), encoding="utf-8")


def _parity_one(name: str, source: Path, target: Path) -> None:
    """Compare an optimized model file with its original, as `onnxnorm compare` does."""
    from onnxnorm.parity import ParityChecker

    with ParityChecker(source.parent / "models" / f"{name}.onnx", count=2) as checker:
        result = checker.check(source / f"{name}.onnx")
    (target / f"{name}.parity").write_text("agrees" if result.passed else "differs")


def worker(what: str, source: Path, target: Path) -> list[str]:
    """Return the command of this file's own worker."""
    return [sys.executable, __file__, "--worker", what, str(source), str(target)]


# ** judging **


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of the graph, of its bodies and of the functions."""
    frontier = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    while frontier:
        node = frontier.pop()
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                frontier += attribute.g.node
            for graph in attribute.graphs:
                frontier += graph.node


def is_raised(model: onnx.ModelProto, case: Case) -> bool:
    """Whether fused operators stand in place of all norms of a case.

    A batch norm that was folded into its neighbour has gone, and so has arithmetic on constant
    weights: both count.
    """
    ops = Counter(node.op_type for node in all_nodes(model))
    rows = [e for e in case.expected if e.recognised and not e.optional]
    kinds = {k for e in rows for k in (e.kind, *e.other_kinds)}
    if kinds <= {"weight_standardization", "layer_norm", "l2_norm"} and any(
        e.kind == "weight_standardization" for e in rows
    ):
        return not any(ops[op] for op in LEFT_OVER)
    if kinds & {"batch_norm", "channel_affine"} and len(rows) == 1:
        return ops["BatchNormalization"] > 0 or not any(ops[op] for op in AFFINE)
    fused = {op for kind in kinds for op in FUSED[kind]}
    return sum(ops[op] for op in fused) >= len(rows) and not any(ops[op] for op in LEFT_OVER)


def distance(outputs: Sequence[Any], wanted: Sequence[NDArray[Any]]) -> float:
    """Return the largest difference, relative to each output's largest value.

    It is infinite where a shape differs, or where something is not finite on one side only.
    """
    if len(outputs) != len(wanted):
        return np.inf
    worst = 0.0
    for given, true in zip(outputs, wanted, strict=True):
        values = np.asarray(given).astype(np.float64)
        if values.shape != true.shape or not np.array_equal(np.isfinite(values), np.isfinite(true)):
            return np.inf
        known = np.isfinite(true)
        scale = np.abs(true[known]).max(initial=1e-30)
        worst = max(worst, float(np.abs(values[known] - true[known]).max(initial=0.0) / scale))
    return worst


def prepare(folder: Path, chosen: Mapping[str, Case]) -> Bench:
    """Write the models, compute their outputs in float64 and what onnxruntime makes of them."""
    bench = Bench(folder, dict(chosen))
    source = folder / "models"
    source.mkdir(parents=True)
    for name, case in bench.cases.items():
        (source / f"{name}.onnx").write_bytes(case.model.SerializeToString())
        (source / f"{name}.feeds").write_bytes(pickle.dumps(dict(case.feeds)))
        with truth.Evaluator(storage.from_proto(case.model)) as evaluator:
            try:
                found = evaluator.run(dict(case.feeds))
            except OnnxNormError:
                continue  # nobody trains here
        bench.truths[name] = [np.asarray(v, np.float64) for v in found.values()]
    for name, error, distance_ in run_all(bench, source, folder / "original"):
        bench.baselines[name] = None if error else distance_
    return bench


def run_all(bench: Bench, source: Path, target: Path) -> Iterator[tuple[str, str | None, float]]:
    """Run every model in a folder without optimizations; yield its error or its distance.

    Where the tool itself ran the model, its own outputs stand.
    """
    target.mkdir()
    names = [n for n in bench.cases if (source / f"{n}.onnx").exists()]
    for name in [n for n in names if (source / f"{n}.outputs").exists()]:
        names.remove(name)
        outputs = pickle.loads((source / f"{name}.outputs").read_bytes())
        known = name in bench.truths
        far = distance(outputs, bench.truths[name]) if known else np.inf
        yield name, None if known else "no truth", far
    for name, error in attempts(worker("run", source, target), names, SECONDS_PER_MODEL):
        if error or name not in bench.truths:
            yield name, error or "no truth", np.inf
            continue
        outputs = pickle.loads((target / f"{name}.outputs").read_bytes())
        yield name, None, distance(outputs, bench.truths[name])


def others(bench: Bench, tool: str, python: Path) -> dict[str, Outcome]:
    """Run another tool over all cases and judge what it wrote."""
    source, target = bench.folder / "models", bench.folder / tool
    target.mkdir()
    command = [str(python), str(WORKER), tool, str(source), str(target)]
    outcomes: dict[str, Outcome] = {}
    for name, error in attempts(command, list(bench.cases), SECONDS_PER_MODEL):
        outcomes[name] = Outcome(error=error)
        if error is None:
            model = onnx.load(target / f"{name}.onnx")
            outcomes[name].raised = is_raised(model, bench.cases[name])
        else:
            (target / f"{name}.onnx").unlink(missing_ok=True)
    for name, error, far in run_all(bench, target, bench.folder / f"{tool}.outputs"):
        outcome, base = outcomes[name], bench.baselines.get(name)
        if base is None:  # onnxruntime cannot run the original: most of bfloat16
            known = evaluated(bench, name, target / f"{name}.onnx")
            outcome.agrees = None if known is None else known <= bench.cases[name].noise(NOISE)
            outcome.note = "in float64, as onnxruntime cannot run the original"
        elif error:
            outcome.agrees, outcome.note = False, f"no longer runs: {error}"
        else:
            outcome.agrees = far <= 4 * base + bench.cases[name].noise(NOISE)
            changed = f"changed by {far:.2g}" if np.isfinite(far) else "of another shape, or none"
            outcome.note = "" if outcome.agrees else f"outputs {changed}"
    return outcomes


def evaluated(bench: Bench, name: str, path: Path) -> float | None:
    """Return the distance of a model's own outputs in float64; None where it has none."""
    if name not in bench.truths:
        return None
    with truth.Evaluator(storage.from_proto(onnx.load(path))) as evaluator:
        try:
            found = evaluator.run(dict(bench.cases[name].feeds))
        except Exception:  # whatever a tool wrote is no reason to end
            return None
    return distance(list(found.values()), bench.truths[name])


def ours(bench: Bench) -> dict[str, Outcome]:
    """Judge the rows of `onnxnorm.inspect`."""
    source, target = bench.folder / "models", bench.folder / OURS
    target.mkdir()
    outcomes: dict[str, Outcome] = {}
    for name, error in attempts(worker("inspect", source, target), list(bench.cases), 120.0):
        outcomes[name] = Outcome(error=error)
        if error is None:
            rows = json.loads((target / f"{name}.json").read_text(encoding="utf-8"))
            missed, wrong = judge(bench.cases[name], rows)
            outcomes[name].raised = not missed
            outcomes[name].agrees = not wrong
            outcomes[name].note = "; ".join((*missed, *wrong))
    return outcomes


# ** the tables **


@dataclass(frozen=True)
class Sums:
    """One row of the table."""

    raised: int
    changed: int
    wrong: int
    crashed: int


def is_positive(case: Case) -> bool:
    """Whether all of a case is to be raised, and from nodes rather than an operator."""
    rows = [e for e in case.expected if not e.optional]
    wanted = not case.mutation and all(e.recognised and not e.refused for e in rows)
    return wanted and not is_raised(case.model, case)


def summarise(bench: Bench, outcomes: Mapping[str, Outcome]) -> Sums:
    """Count over all cases."""
    positives = [n for n, c in bench.cases.items() if is_positive(c)]
    misses = [n for n, c in bench.cases.items() if c.mutation]
    return Sums(
        raised=sum(raised(outcomes[n]) for n in positives),
        changed=sum(outcomes[n].agrees is False for n in bench.cases if n not in set(misses)),
        wrong=sum(outcomes[n].agrees is False for n in misses),
        crashed=sum(crashed(bench, n, outcomes[n]) for n in bench.cases),
    )


def raised(outcome: Outcome) -> bool:
    """Whether a norm was raised and the model still computes the same."""
    return outcome.error is None and outcome.raised and outcome.agrees is True


def crashed(bench: Bench, name: str, outcome: Outcome) -> bool:
    """Whether a tool gave nothing for a model that onnxruntime can run as it is."""
    return outcome.error is not None and bench.baselines.get(name) is not None


LABELS: Final = {
    OURS: "onnxnorm (`inspect`)",
    "onnxruntime": "onnxruntime, ORT_ENABLE_EXTENDED",
    "transformers": "onnxruntime.transformers, bert",
    "onnxscript": "onnxscript, optimize + optimize_for_ort",
    "onnxsim": "onnxsim",
    "onnxslim": "onnxslim",
}
_PENDING: Final = "to be measured"


def version_of(tool: str, versions: Mapping[str, str]) -> str:
    """Return the version of a tool's package."""
    if tool == OURS:
        import onnxnorm

        return onnxnorm.__version__
    if tool in ("onnxruntime", "transformers"):
        return versions.get("onnxruntime-gpu") or versions.get("onnxruntime", "?")
    return versions.get(tool, "?")


def tables(
    bench: Bench, results: Mapping[str, Mapping[str, Outcome]], versions: Mapping[str, str]
) -> str:
    """Return the tables as Markdown."""
    positives = {n: c for n, c in bench.cases.items() if is_positive(c)}
    misses = {n: c for n, c in bench.cases.items() if c.mutation}
    head = f"| tool | version | raised, of {len(positives)} | positives changed "
    head += f"| near misses wrong, of {len(misses)} | crashed, of {len(bench.cases)} |"
    lines = [head, "|---|---|---|---|---|---|"]
    for tool in TOOLS:
        head = f"| {LABELS[tool]} | {version_of(tool, versions)} |"
        if tool not in results:
            lines.append(f"{head} {_PENDING} | | {_PENDING} | |")
            continue
        sums = summarise(bench, results[tool])
        lines.append(f"{head} {sums.raised} | {sums.changed} | {sums.wrong} | {sums.crashed} |")
    short = [t if t != "transformers" else "ort.transformers" for t in TOOLS]
    lines += ["", "Raised, by kind:", "", f"| kind | models | {' | '.join(short)} |"]
    lines.append("|---" * (len(TOOLS) + 2) + "|")
    for kind, total in sorted(Counter(c.kind for c in positives.values()).items()):
        cells = [
            str(sum(raised(results[t][n]) for n, c in positives.items() if c.kind == kind))
            if t in results
            else ""
            for t in TOOLS
        ]
        lines.append(f"| {kind} | {total} | {' | '.join(cells)} |")
    lines += [
        "",
        "Near misses that came out wrong:",
        "",
        f"| near miss | models | {' | '.join(short)} |",
    ]
    lines.append("|---" * (len(TOOLS) + 2) + "|")
    for miss, total in sorted(Counter(c.mutation for c in misses.values()).items()):
        counts = [
            sum(results[t][n].agrees is False for n, c in misses.items() if c.mutation == miss)
            if t in results
            else None
            for t in TOOLS
        ]
        if any(counts):
            cells = ["" if k is None else str(k) for k in counts]
            lines.append(f"| {miss} | {total} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ** model files **


def of_files(folder: Path, files: Sequence[Path], tools: Sequence[str], python: Path) -> str:
    """Return a table of how many norm operators each tool leaves in each model file."""
    source = folder / "models"
    source.mkdir(parents=True)
    names = {f"{i:03d}-{path.stem}": path for i, path in enumerate(files)}
    for name, path in names.items():
        onnx.save(onnx.load(path), source / f"{name}.onnx")
    columns: dict[str, dict[str, str]] = {}
    for tool in tools:
        target = folder / tool
        target.mkdir()
        command = [str(python), str(WORKER), tool, str(source), str(target)]
        if tool == OURS:
            command = worker("inspect", source, target)
        column = columns.setdefault(tool, {})
        for name, error in attempts(command, list(names), 5 * SECONDS_PER_MODEL):
            if error:
                column[name] = "crashed"
            elif tool == OURS:
                rows = json.loads((target / f"{name}.json").read_text(encoding="utf-8"))
                column[name] = str(sum(r["recognised"] for r in rows))
            else:
                ops = Counter(n.op_type for n in all_nodes(onnx.load(target / f"{name}.onnx")))
                column[name] = str(sum(ops[op] for op in ANY_NORM))
        done = [n for n in names if tool != OURS and column[n] != "crashed"]
        for name, error in attempts(worker("parity", target, target), done, 5 * SECONDS_PER_MODEL):
            parity = target / f"{name}.parity"
            said = "not compared" if error else parity.read_text(encoding="utf-8")
            column[name] += "" if said == "agrees" else f" ({said})"
    lines = [f"| model | norm operators in the file | {' | '.join(tools)} |"]
    lines.append("|---" * (len(tools) + 2) + "|")
    for name, path in names.items():
        ops = Counter(n.op_type for n in all_nodes(onnx.load(source / f"{name}.onnx")))
        before = sum(ops[op] for op in ANY_NORM)
        cells = " | ".join(columns[t][name] for t in tools)
        lines.append(f"| {path.name} | {before} | {cells} |")
    return "\n".join(lines) + "\n"


# ** the command **


def setup(folder: Path) -> int:
    """Make the environment that the other tools live in."""
    venv.create(folder, with_pip=True)
    gpu = sys.platform in ("linux", "win32")
    runtime = "onnxruntime-gpu" if gpu else "onnxruntime"
    command = [str(interpreter(folder)), "-m", "pip", "install", runtime, *REQUIREMENTS]
    return subprocess.run(command, check=False).returncode


def interpreter(folder: Path) -> Path:
    """Return the Python of an environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--setup", type=Path, metavar="DIR", help="make the environment and end")
    parser.add_argument("--env", type=Path, metavar="DIR", help="the environment of the others")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; repeatable")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--models", type=Path, metavar="DIR", help="model files besides")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    parser.add_argument("--md", type=Path, help="write the tables here")
    args = parser.parse_args(argv)
    if args.setup:
        return setup(args.setup)
    tools = args.tool or list(TOOLS)
    if args.env is None and tools != [OURS]:
        parser.error("--env DIR: where the other tools are; `--setup DIR` makes it")
    python = interpreter(args.env) if args.env else Path(sys.executable)
    said = subprocess.run(
        [str(python), str(WORKER), "--versions"], check=True, capture_output=True, text=True
    )
    versions: dict[str, str] = json.loads(said.stdout)
    chosen = {f"case{i:04d}": case for i, case in enumerate(cases()) if args.only in case.name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = prepare(folder / "cases", chosen)
        results: dict[str, dict[str, Outcome]] = {}
        for tool in tools:
            results[tool] = ours(bench) if tool == OURS else others(bench, tool, python)
            print(f"{tool}: {summarise(bench, results[tool])}", file=sys.stderr, flush=True)
        text = f"{datetime.date.today().isoformat()}\n\n{tables(bench, results, versions)}"
        if args.models:
            files = sorted(args.models.rglob("*.onnx"))
            text += "\n" + of_files(folder / "files", files, tools, python)
    if args.json:
        outcomes = {
            tool: {bench.cases[n].name: vars(o) for n, o in found.items()}
            for tool, found in results.items()
        }
        given = {"versions": versions, "outcomes": outcomes}
        args.json.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
    if args.md:
        args.md.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_worker() if sys.argv[1:2] == ["--worker"] else main())
