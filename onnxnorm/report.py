"""What was found, done and measured: one JSON object, and every other form made from it.

`Report.to_json` gives the object that `report.schema.json` describes. The terminal text and the
markdown are functions of that object alone, so a stored report can be rendered again, and no form
can say what another does not know.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import math
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeAlias, final

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from onnxnorm.errors import OnnxNormError, OutputError, UsageError

SCHEMA_VERSION: Final = 1
Json: TypeAlias = Mapping[str, Any]

# A pull request comment holds 65,536 characters; lists beyond this length go by their start.
_MARKDOWN_ROWS: Final = 100
_OUTPUTS_SHOWN: Final = 5
_PLACES_SHOWN: Final = 3
_ACTION_WIDTH: Final = 26

_KINDS: Final[Mapping[str, str]] = {
    "layer_norm": "layer normalization",
    "rms_norm": "RMS normalization",
    "batch_norm": "batch normalization",
    "group_norm": "group normalization",
    "instance_norm": "instance normalization",
    "l2_norm": "L2 normalization",
    "softmax": "softmax",
    "log_softmax": "log-softmax",
    "channel_affine": "channel affine",
    "evo_norm": "EvoNorm",
    "filter_response_norm": "filter response normalization",
    "weight_standardization": "weight standardization",
}
_ACTIONS: Final[Mapping[str, str]] = {
    "folded": "folded",
    "converted": "converted",
    "lowered": "lowered",
    "kept": "kept as it was",
    "refused": "refused",
    "none": "nothing to do",
}
_CHANGING: Final = ("folded", "converted", "lowered")
_PROVIDERS: Final[Mapping[str, str]] = {
    "cpu": "the CPU",
    "cuda": "CUDA",
}


# ** the object **


@functools.cache
def _schema_text() -> str:
    folder = importlib.resources.files("onnxnorm")
    return folder.joinpath("report.schema.json").read_text(encoding="utf-8")


def load_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the report object.

    >>> load_schema()["properties"]["schema"]["const"]
    1
    """
    schema: dict[str, Any] = json.loads(_schema_text())
    return schema


@dataclass(frozen=True, kw_only=True)
class Report:
    """report = (what was found, what was done, what it changed), as plain JSON values.

    The fields are the keys of the report object, and `report.schema.json` describes each. Whatever
    is given is brought to plain JSON values at once: numpy scalars to numbers, paths to strings,
    tuples to lists, and numbers that are not finite to None, because JSON has none.

    Args:
        command: What was asked for.
        version: Version of onnxnorm.
        model: Paths, sizes, opset, ir_version and producer.
        nodes: Number of nodes before and after.
        norms: One row for each normalization.
        passes: One row for each pass that was run.
        sites: One row for each decision.
        parity: The parity result, or None and `parity_skipped` with the reason.
        parity_skipped: Why there is no parity result.
        latency: The latency result, or None and `latency_skipped` with the reason.
        latency_skipped: Why there is no latency result.
        environment: Versions, processor, threads, providers.
        options: Settings that decide the result.
        files: Files that were written.
        notes: Sentences a reader should know.
        warnings: Sentences a reader should act on.
        dry_run: Whether nothing was to be written.

    Raises:
        TypeError: A value has no JSON form.
    """

    command: Literal["optimize", "inspect", "compare"]
    version: str
    model: Json
    nodes: Json
    norms: Sequence[Json] = ()
    passes: Sequence[Json] = ()
    sites: Sequence[Json] = ()
    parity: Json | None = None
    parity_skipped: str | None = None
    latency: Json | None = None
    latency_skipped: str | None = None
    environment: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)
    files: Sequence[Json] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    dry_run: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _plain_data(getattr(self, each.name)))

    def to_json(self) -> dict[str, Any]:
        """Return the report object: plain values of our own, in the order of the schema."""
        values = {each.name: _plain_data(getattr(self, each.name)) for each in fields(self)}
        values["schema"] = SCHEMA_VERSION
        return {key: values[key] for key in load_schema()["properties"]}

    @classmethod
    def from_json(cls, data: object) -> Report:
        """Return r such that r.to_json() equals data, less the keys this version does not know.

        Args:
            data: What `json.loads` made of a report.

        Raises:
            UsageError: It is no report, of another schema version, or not of the form that the
                schema describes; the message names the first place that differs.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise UsageError(
                "this JSON is not an onnxnorm report: it has no key 'schema'",
                "Give a file that 'onnxnorm ... --report FILE.json' wrote.",
            )
        if isinstance(data["schema"], bool) or data["schema"] != SCHEMA_VERSION:
            raise UsageError(
                f"the report has schema version {data['schema']!r}; this onnxnorm reads "
                f"version {SCHEMA_VERSION}",
                "Use the onnxnorm that wrote it, or make the report again.",
            )
        schema = load_schema()
        fault = _fault(data, schema, schema, "report")
        if fault is not None:
            raise UsageError(
                f"this is not an onnxnorm report as the schema describes it: {fault}",
                "Make the report again with 'onnxnorm ... --report FILE.json'.",
            )
        return cls(**{each.name: data[each.name] for each in fields(cls)})

    def to_markdown(self) -> str:
        """Return the report as markdown that can be pasted into a pull request."""
        return render_markdown(self.to_json())

    def write(self, path: str | Path) -> None:
        """Write the report in the form that the suffix of `path` names, all of it or nothing.

        Args:
            path: A file ending in .json or .md; an existing one is replaced.

        Raises:
            UsageError: The suffix names no form we write.
            OutputError: The folder is missing or not writable, or the disk is full. Nothing is
                left behind, and an existing file is as it was.
        """
        form = report_form(path)
        if form == "json":
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        else:
            text = self.to_markdown()
        _write_atomically(Path(path), text)


def report_form(path: str | Path) -> Literal["json", "md"]:
    """Return the form that the suffix of a report's path names, before any work is done for it.

    >>> report_form("out/report.JSON")
    'json'

    Raises:
        UsageError: The suffix is missing, unknown, or names a form that does not exist yet.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        return "json"
    if suffix == ".md":
        return "md"
    if suffix in {".html", ".htm"}:
        raise UsageError(
            f"cannot write {path}: HTML reports come in a later version",
            "Name the report .md to read it, or .json to keep every number.",
        )
    what = f"the suffix {suffix}" if suffix else "no suffix"
    raise UsageError(
        f"cannot tell the form of report {path}: it has {what}", "Name the report .json or .md."
    )


def _plain_data(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return _plain_data(value.item())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return _plain_data(os.fspath(value))
    if isinstance(value, str):
        # A file name that is not UTF-8 holds surrogates, which no UTF-8 file can.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain_data(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain_data(item) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}: {value!r}")


_TYPES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: (
        not isinstance(v, bool)
        and (isinstance(v, int) or (isinstance(v, float) and v.is_integer()))
    ),
}


def _fault(value: Any, rule: Json, schema: Json, at: str) -> str | None:
    """Return the first thing in `value` that `rule` forbids, or None.

    It knows the keywords that our schema uses, except that it lets unknown keys pass: a later
    version may have added some.
    """
    if "$ref" in rule:
        return _fault(value, schema["$defs"][rule["$ref"].rpartition("/")[2]], schema, at)
    if "anyOf" in rule:
        faults = [_fault(value, each, schema, at) for each in rule["anyOf"]]
        return None if None in faults else faults[0]
    if "const" in rule and value != rule["const"]:
        return f"{at} is {value!r}, not {rule['const']!r}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{at} is {value!r}, not one of {', '.join(rule['enum'])}"
    if "type" in rule:
        wanted = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
        if not any(_TYPES[each](value) for each in wanted):
            return f"{at} is of type {type(value).__name__}, not {' or '.join(wanted)}"
    if _TYPES["number"](value):
        return _number_fault(value, rule, at)
    if isinstance(value, list):
        low, high = rule.get("minItems", 0), rule.get("maxItems", math.inf)
        if not low <= len(value) <= high:
            return f"{at} has {_count(len(value), 'entry')}"
        parts = [(f"{at}[{i}]", item, rule.get("items", {})) for i, item in enumerate(value)]
    elif isinstance(value, Mapping):
        missing = [key for key in rule.get("required", ()) if key not in value]
        if missing:
            return f"{at} has no key {missing[0]!r}"
        known = rule.get("properties", {})
        others = rule.get("additionalProperties", {})
        others = others if isinstance(others, Mapping) else {}
        parts = [(f"{at}.{key}", item, known.get(key, others)) for key, item in value.items()]
    else:
        return None
    found = (_fault(item, each, schema, place) for place, item, each in parts)
    return next((fault for fault in found if fault is not None), None)


def _number_fault(value: float, rule: Json, at: str) -> str | None:
    if not math.isfinite(value):
        return f"{at} is {value}, not a finite number"
    allowed = rule.get("minimum", -math.inf) <= value <= rule.get("maximum", math.inf) and rule.get(
        "exclusiveMinimum", -math.inf
    ) < value < rule.get("exclusiveMaximum", math.inf)
    return None if allowed else f"{at} is {value}, which is out of range"


def _write_atomically(path: Path, text: str) -> None:
    # A link stays a link: what it points to is replaced.
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".onnxnorm-{secrets.token_hex(8)}.tmp")
    try:
        try:
            with scratch.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, scratch)
            scratch.replace(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _output_error(path, target, error) from error


def _output_error(path: Path, target: Path, error: OSError) -> OnnxNormError:
    reason = error.strerror or str(error)
    if not target.parent.is_dir():
        reason, hint = (f"there is no folder {target.parent}", "Make the folder, or name another.")
    elif target.is_dir():
        reason, hint = "it is a folder", "Name a file in it."
    elif isinstance(error, PermissionError):
        hint = f"Make {target.parent} writable, or name another folder."
    else:
        hint = "Free some space, or name a file on another disk."
    return OutputError(f"cannot write report {path}: {reason}", hint)


# ** what every form says, as plain text **


def verdict(report: Json) -> str:
    """Return the report in one sentence: what changed; do the outputs agree; is it faster.

    Args:
        report: The object that `Report.to_json` returns.
    """
    clauses = []
    if report["command"] != "compare":
        clauses.append(_changes(report))
    if report["command"] != "inspect":
        clauses += [_agreement(report), _speed(report)]
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."


def _changes(report: Json) -> str:
    norms, sites = report["norms"], report["sites"]
    planned = _planned(report)
    would = "would be " if planned else ""
    found = [row for row in norms if row["recognised"]]
    totals = Counter(row["kind"] for row in found)
    refused = Counter(row["kind"] for row in found if row["action"] == "refused")
    changed = Counter((row["kind"], row["action"]) for row in found if row["action"] in _CHANGING)
    parts = []
    for (kind, action), number in changed.most_common():
        part = f"{number} of {_count(totals[kind], _kind(kind))} {would}{action}"
        targets = {
            row.get("into") for row in found if (row["kind"], row["action"]) == (kind, action)
        }
        if None not in targets:
            part += f" into {_list(sorted(targets))}"
        if refused[kind]:
            part += f" and {refused.pop(kind)} refused"
        parts.append(part)
    applied = sum(site["action"] == "applied" for site in sites)
    if not parts and applied:
        parts.append(f"{_count(applied, 'site')} {would}changed")
    elif not parts and not report["passes"] and not planned:
        parts.append(f"no pass was run; {_count(len(found), 'normalization')} found")
    elif not parts and not found:
        parts.append("no normalization found")
    elif not parts:
        number = sum(refused.values())
        tail = f": {number} refused" if number else ""
        parts.append(f"nothing to change in {_count(len(found), 'normalization')}{tail}")
    taken_back = sum(site["action"] == "rolled_back" for site in sites)
    if taken_back:
        parts.append(f"{_count(taken_back, 'change')} taken back because the outputs disagreed")
    return ", ".join(parts)


def _agreement(report: Json) -> str:
    parity = report["parity"]
    if parity is None:
        return f"outputs not checked{_because(report['parity_skipped'])}"
    both = report["command"] == "compare"
    who, whom = (
        ("the second model's outputs", "the first's") if both else ("outputs", "the original")
    )
    rows = _worst_first(parity)
    if not rows:
        return "there are no outputs to check"
    if parity["passed"]:
        used = _budget_used(rows[0])
        worst = "" if used is None else f" (worst {_share(used)} of budget)"
        return f"{who} agree with {whom} within the derived tolerance{worst}"
    judged = [measures for _, measures in _judgements(rows[0])]
    failed = next((measures for measures in judged if not measures["passed"]), rows[0])
    used = _used(failed)
    detail = _plain(rows[0]["name"])
    if failed.get("reason"):
        detail += f": {_plain(failed['reason'])}"
    elif used is not None:
        detail += f" has {_share(used)} times the error it may have"
    text = f"{who} DO NOT AGREE with {whom} ({detail})"
    return text if both or report["model"]["output"] else f"{text}; no model was written"


def _speed(report: Json) -> str:
    latency = report["latency"]
    if latency is None:
        return f"latency not measured{_because(report['latency_skipped'])}"
    where = _provider(latency["provider"])
    figures = f"(ratio {_ratio(latency['ratio'])}, {_interval(latency)})"
    if latency["verdict"] in {"faster", "slower"}:
        return f"{latency['verdict']} on {where} {figures}"
    return f"no measurable difference in latency on {where} {figures}"


def _planned(report: Json) -> bool:
    return bool(report["dry_run"]) or report["command"] == "inspect"


@dataclass(frozen=True)
class _Group:
    """One reason, and every place it was given for."""

    reason: str
    advice: str | None
    places: tuple[tuple[str, str | None], ...]

    def listed(self, limit: int, spelled: Callable[[str], str] = str) -> str:
        """Return the first places, each with what stands in its way, and how many follow."""
        names = [
            f"{spelled(where)} ({spelled(at)})" if at and at != where else spelled(where)
            for where, at in self.places
        ]
        return _some(names, limit)


def _grouped(rows: Iterable[Json]) -> list[_Group]:
    """Return rows with equal reasons as one, the most frequent first."""
    places: dict[tuple[str, str | None], list[tuple[str, str | None]]] = {}
    for row in rows:
        key = (row["reason"] or "no reason was given", row.get("advice") or None)
        places.setdefault(key, []).append(_place(row))
    groups = [_Group(reason, advice, tuple(names)) for (reason, advice), names in places.items()]
    return sorted(groups, key=lambda group: -len(group.places))


def _place(row: Json) -> tuple[str, str | None]:
    """Return where a row is, and what stands in the way there."""
    if "output" in row:
        return row["output"], row.get("at")
    return row["site"].partition(":")[2] or row["site"], row.get("at")


def _refused(report: Json) -> list[_Group]:
    sites = [site for site in report["sites"] if site["action"] == "refused"]
    told = {site["site"] for site in report["sites"] if site["action"] != "applied"}
    norms = [n for n in report["norms"] if n["action"] == "refused" and n["recognised"]]
    return _grouped([*sites, *(norm for norm in norms if norm["site"] not in told)])


def _skipped(report: Json) -> list[_Group]:
    return _grouped(site for site in report["sites"] if site["action"] == "skipped")


def _near_misses(report: Json) -> list[_Group]:
    norms = [norm for norm in report["norms"] if not norm["recognised"]]
    told = {norm["site"] for norm in report["norms"]}
    sites = [site for site in report["sites"] if site["action"] == "missed"]
    return _grouped([*norms, *(site for site in sites if site["site"] not in told)])


def _left_alone(report: Json) -> list[_Group]:
    skipped = {site["site"] for site in report["sites"] if site["action"] == "skipped"}
    norms = [n for n in report["norms"] if n["recognised"] and n["action"] in {"none", "kept"}]
    return _grouped(n for n in norms if n["reason"] and n["site"] not in skipped)


_REASONS: Final[Mapping[str, Callable[[Json], list[_Group]]]] = {
    "Refused": _refused,
    "Left as they were": _left_alone,
    "Near misses, not recognised": _near_misses,
    "Skipped": _skipped,
}


def _taken_back(report: Json) -> list[tuple[str, str]]:
    """Return each site that was rolled back, and what it did to the outputs."""
    found = []
    for site in report["sites"]:
        if site["action"] == "rolled_back":
            error, reason = site["error"], site["reason"]
            parts = ["" if error is None else f"{_share(error)} times the allowed error", reason]
            found.append((str(site["site"]), "; ".join(filter(None, parts)) or "outputs disagreed"))
    return found


def _norm_counts(report: Json) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table kind x action, empty where there are no norms."""
    norms = report["norms"]
    found = Counter(row["kind"] for row in norms if row["recognised"])
    missed = Counter(row["kind"] for row in norms if not row["recognised"])
    done = Counter((row["kind"], row["action"]) for row in norms if row["recognised"])
    actions = [action for action in _ACTIONS if any(action == each for _, each in done)]
    titles = ["kind", "found", *(_ACTIONS[action] for action in actions)]
    titles += ["near miss"] if missed else []
    rows = []
    for kind in sorted(found | missed, key=lambda kind: (-found[kind], kind)):
        row = [kind, str(found[kind]), *(str(done[kind, action]) for action in actions)]
        rows.append(row + ([str(missed[kind])] if missed else []))
    return (titles, rows) if rows else ([], [])


def _pass_rows(
    report: Json, *, time_passes: bool, everything: bool
) -> tuple[list[str], list[list[str]], int]:
    """Return titles and rows of the table of passes, and how many idle ones were left out."""
    would = "would " if _planned(report) else ""
    titles = ["pass", "would apply" if would else "applied", "refused"]
    extra = [
        (action, title)
        for action, title in (("rolled_back", "taken back"), ("skipped", "skipped"))
        if any(site["action"] == action for site in report["sites"])
    ]
    titles += [title for _, title in extra] + (["time"] if time_passes else [])
    counts = Counter((site["pass"], site["action"]) for site in report["sites"])
    rows, idle = [], 0
    for each in report["passes"]:
        numbers = [each["applied"], each["refused"]]
        numbers += [counts[each["name"], action] for action, _ in extra]
        if not any(numbers) and not everything and not time_passes:
            idle += 1
            continue
        row = [each["name"], *map(str, numbers)]
        rows.append(row + ([_seconds(each["seconds"])] if time_passes else []))
    return titles, rows, idle


def _what(norm: Json) -> str:
    """Return what was done with a norm, in a few words."""
    if not norm["recognised"]:
        return "near miss"
    text = _ACTIONS.get(norm["action"], norm["action"])
    into = norm.get("into") if norm["action"] in _CHANGING else None
    return f"{text} into {_plain(into)}" if into else text


def _norm_cells(norm: Json) -> list[str]:
    axes, epsilon = norm["axes"], norm["epsilon"]
    return [
        norm["kind"],
        "-" if axes is None else ",".join(map(str, axes)) or "none",
        "-" if epsilon is None else f"{epsilon:.6g}",
        norm["output"],
        _what(norm),
    ]


_NORM_TITLES: Final = ("kind", "axes", "epsilon", "output value", "action")
_LEGEND: Final = (
    "opt.: whether onnxruntime's own optimizations were on. Errors are distances from the truth, "
    "maximum / RMS, in ulp of the output's scale. Budget: the share of the allowed error that is "
    "used, at most 1."
)
_PARITY_TITLES: Final = ("output", "opt.", "error", "original", "cosine", "argmax", "budget")


def _judgements(output: Json) -> list[tuple[str, Json]]:
    """Return the comparisons of one output, each under the state of the runtime's optimizer.

    An output's own `passed` and `reason` speak of both comparisons; here each has its own.
    """
    optimized = output.get("optimized")
    if optimized is None:
        return [("off", output)]
    both, on = output.get("reason") or "", optimized.get("reason") or ""
    only_on = not optimized["passed"] and (not on or (both != on and both.endswith(on)))
    own = {"passed": True, "reason": None} if only_on else {}
    return [("off", {**output, **own}), ("on", optimized)]


def _budget_used(output: Json) -> float | None:
    """Return max(error / budget, error_rms / budget_rms) over an output's comparisons.

    1 is the limit. None where no comparison has both numbers.
    """
    shares = (_used(measures) for _, measures in _judgements(output))
    return max((share for share in shares if share is not None), default=None)


def _used(measures: Json) -> float | None:
    shares = []
    for error, budget in (("error", "budget"), ("error_rms", "budget_rms")):
        top, bottom = measures.get(error), measures.get(budget)
        if top is None or bottom is None:
            continue
        shares.append(top / bottom if bottom else math.inf if top else 0.0)
    return max(shares, default=None)


def _worst_first(parity: Json) -> list[Json]:
    def badness(output: Json) -> tuple[bool, float]:
        used = _budget_used(output)
        return output["passed"], -(0.0 if used is None else used)

    return sorted(parity["outputs"], key=badness)


def _parity_cells(name: str, optimizer: str, measures: Json) -> list[str]:
    used = _used(measures)
    share = "-" if used is None else _share(used)
    agreement, cosine = measures.get("argmax_agreement"), measures.get("cosine")
    return [
        name,
        optimizer,
        _error_cell(measures, ""),
        _error_cell(measures, "baseline_"),
        "-" if cosine is None else f"{min(1.0, max(-1.0, cosine)):.7f}",
        "-" if agreement is None else _percent(agreement),
        share if measures["passed"] else f"{share} FAILED",
    ]


def _error_cell(measures: Json, whose: Literal["", "baseline_"]) -> str:
    """Return `maximum / RMS` in ulp of the output's scale, or `maximum abs` where it has no ulp."""
    error, rms = measures[f"{whose}error"], measures.get(f"{whose}error_rms")
    if error is None:
        return "not finite"
    in_ulp = measures.get(f"{whose}error_ulp")
    if in_ulp is None:
        return f"{_number(error)} abs"
    if not error:
        return "0 / 0"
    return f"{_number(in_ulp)} / {'-' if rms is None else _number(rms * in_ulp / error)}"


def _parity_facts(parity: Json) -> list[str]:
    facts = [f"truth: {_plain(parity['truth'])}", _count(len(parity["inputs"]), "input")]
    if parity["seconds"] is not None:
        facts.append(f"took {_seconds(parity['seconds'])}")
    return facts


def _latency_facts(latency: Json) -> list[str]:
    threads = latency["threads"]
    facts = [
        "default threads" if threads is None else _count(threads, "thread"),
        _count(latency["pairs"], "session pair"),
    ]
    if latency.get("seconds") is not None:
        facts.append(f"took {_seconds(latency['seconds'])}")
    return facts


def _not_measured(report: Json) -> list[str]:
    """Return a sentence for each provider that the figures do not speak of."""
    latency, lack = report["latency"], report["environment"].get("cuda")
    others = latency.get("not_measured", ["cuda"] if latency["provider"] == "cpu" else ["cpu"])
    return [
        f"On {_provider(name)}: not measured"
        f"{_because(lack if name == 'cuda' and isinstance(lack, str) else None)}."
        for name in others
    ]


def _roles(report: Json) -> tuple[str, str]:
    return ("first", "second") if report["command"] == "compare" else ("original", "optimized")


def _written(report: Json) -> list[str]:
    lines = []
    for each in report["files"]:
        size = "" if each.get("bytes") is None else f", {_bytes(each['bytes'])}"
        lines.append(f"Wrote {_plain(each['path'])} ({each['role']}{size})")
    if report["command"] == "optimize" and report["model"]["output"] is None:
        lines.append(
            "No model was written." if not report["dry_run"] else "Dry run: no model was written."
        )
    return lines


def _kind(kind: str) -> str:
    return _KINDS.get(kind, kind.replace("_", " "))


def _provider(name: str) -> str:
    return _PROVIDERS.get(name, name)


def _because(reason: str | None) -> str:
    return f" ({_plain(reason)})" if reason else ""


# ** numbers and words **


def _count(number: int, noun: str) -> str:
    """Return the number with its noun in the right form.

    >>> _count(1, "node"), _count(0, "softmax"), _count(2, "near miss"), _count(3, "entry")
    ('1 node', '0 softmaxes', '2 near misses', '3 entries')
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}s"


def _list(words: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _some(places: Sequence[str], limit: int) -> str:
    """Return the first places, and how many more there are."""
    if len(places) <= limit + 1:
        return ", ".join(places)
    return f"{', '.join(places[:limit])} and {len(places) - limit:,} more"


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    if value == 0 or 0.01 <= abs(value) < 999.5:
        return f"{value:.3g}"
    if not math.isfinite(value):
        return "over 1e300"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _share(used: float) -> str:
    """Return a share of the budget, never rounded onto the other side of 1."""
    if used >= 999.5:
        return _number(used)
    text = f"{used:.2f}"
    if text == "1.00" and used > 1:
        return "over 1.00"
    return text


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


def _interval(latency: Json) -> str:
    low, high = latency["interval"]
    confidence = 100 * latency.get("confidence", 0.95)
    return f"{confidence:.4g} % interval {_ratio(low)} to {_ratio(high)}"


def _percent(share: float) -> str:
    """Return a share in percent, 100 only where it is all of them."""
    text = f"{100 * share:.4g}"
    return f"{text} %" if text != "100" or share == 1 else "99.99 %"


def _scaled(value: float) -> str:
    """Return three digits, or all of the whole part where that has some more."""
    if value >= 1e7:
        return _number(value)
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _bytes(number: int) -> str:
    """Return a size in decimal units.

    >>> _bytes(1), _bytes(97_812_345), _bytes(999_999)
    ('1 byte', '97.8 MB', '1.00 MB')
    """
    if number < 1000:
        return _count(number, "byte")
    power = next((i for i in (1, 2, 3) if number < 999.5 * 1000**i), 4)
    return f"{_scaled(number / 1000**power)} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _milliseconds(value: float) -> str:
    return f"{value:.3f} ms" if value < 1 else f"{_scaled(value)} ms"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.01 s" if 0 < value < 0.005 else f"{_scaled(value)} s"


def _change(before: int, after: int, amount: Callable[[int], str], words: tuple[str, str]) -> str:
    """Return `before -> after (difference fewer)`."""
    if before == after:
        return f"{amount(before)}, unchanged"
    difference = f"{amount(abs(after - before))} {words[0] if after < before else words[1]}"
    return f"{amount(before)} -> {amount(after)} ({difference})"


def _plain(text: str) -> str:
    """Return text on one line, with what a terminal would obey or not show spelled out.

    Names come out of a file that anybody may have made, so they can hold escape sequences.
    """
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


# ** terminal **


class _Page:
    """Lines of text on a console: prose is wrapped, tables are aligned, nothing else is.

    On a terminal, tables fit its width and long names lose their middle. In a pipe or a file no
    name is shortened, because what reads it may look for the name.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        # One column stays free: some terminals wrap a line that fills them.
        self._width = max(40, console.width - 1)
        self._narrow = console.is_terminal

    def line(self, text: str = "", style: str = "") -> None:
        encoding = self._console.encoding
        text = text.rstrip().encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(
            Text(text, style=style),
            no_wrap=True,
            overflow="ignore",
            crop=False,
            soft_wrap=True,
            highlight=False,
        )

    def heading(self, title: str, facts: Sequence[str] = ()) -> None:
        self.line()
        if facts:
            self.prose(f"{title} ({'; '.join(facts)})", hang=2, style="bold")
        else:
            self.line(title, style="bold")

    def prose(self, text: str, *, lead: str = "", hang: int = 0, style: str = "") -> None:
        """Print text behind a lead, wrapped between words, further lines indented by `hang`.

        A name that is wider than the page stays whole, so that it can be copied.
        """
        line, fresh = lead, True
        for word in _plain(text).split(" "):
            longer = line + ("" if fresh else " ") + word
            if not fresh and cell_len(longer) > self._width:
                self.line(line, style)
                longer = " " * hang + word
            line, fresh = longer, False
        self.line(line, style)

    def table(
        self,
        titles: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        numeric: Iterable[int] = (),
        flexible: int = 0,
        below: Callable[[int], None] | None = None,
    ) -> None:
        """Print rows under titles; the flexible column gives way where there is no room.

        Args:
            titles: One for each column.
            rows: Cells, as many as titles.
            numeric: Columns that are aligned to the right.
            flexible: The column whose cells may be shortened in the middle.
            below: Called with each row's number after the row was printed.
        """
        cells = [[_plain(cell) for cell in row] for row in rows]
        widths = [max(map(cell_len, column)) for column in zip(titles, *cells, strict=True)]
        if self._narrow:
            room = self._width - 2 - sum(widths) - 2 * (len(widths) - 1) + widths[flexible]
            widths[flexible] = min(widths[flexible], max(8, room))
            names = _fitted([row[flexible] for row in cells], widths[flexible])
            for row, name in zip(cells, names, strict=True):
                row[flexible] = name
            widths[flexible] = max(map(cell_len, (titles[flexible], *names)))
        right = set(numeric)

        def aligned(row: Sequence[str]) -> str:
            parts = []
            for i, cell in enumerate(row):
                pad = " " * (widths[i] - cell_len(cell))
                parts.append(pad + cell if i in right else cell + pad)
            return "  " + "  ".join(parts)

        self.line(aligned(titles), style="dim")
        for number, row in enumerate(cells):
            bad = any(cell.endswith("FAILED") for cell in row)
            self.line(aligned(row), style="red" if bad else "")
            if below is not None:
                below(number)

    def groups(self, groups: Sequence[_Group], *, everything: bool) -> None:
        for group in groups:
            lead = f"{len(group.places):>4} x "
            self.prose(group.reason, lead=lead, hang=7)
            places = group.listed(len(group.places) if everything else _PLACES_SHOWN)
            self.prose(f"at {places}", lead=" " * 7, hang=7, style="dim")
            if group.advice:
                self.prose(f"to change that: {group.advice}", lead=" " * 7, hang=7)


_SEPARATORS: Final = "/.:_"


def _fitted(names: Sequence[str], width: int) -> list[str]:
    """Return names no wider than `width`; what they have in common goes first.

    >>> _fitted(["/net/layer1/bn/Mul_output_0", "/net/layer2/bn/Mul_output_0"], 18)
    ['...layer1/bn/Mu...', '...layer2/bn/Mu...']
    """
    given = sorted({name for name in names if name})
    if max(map(cell_len, given), default=0) <= width:
        return list(names)
    head = _common_start(given)
    head = head[: max(head.rfind(mark) for mark in _SEPARATORS) + 1] if len(given) > 1 else ""
    tail = (
        _common_start(sorted(name[len(head) :][::-1] for name in given)) if len(given) > 1 else ""
    )
    fitted = []
    for name in names:
        cut = f"...{name[len(head) :]}" if name and len(head) > 3 else name
        too_long = cell_len(cut) - width
        if 0 < too_long <= len(tail) - 3:
            cut = f"{cut[: -too_long - 3]}..."
        fitted.append(_shortened(cut, width))
    return fitted


def _common_start(ordered: Sequence[str]) -> str:
    """Return the longest start that all of some sorted, distinct names share."""
    pairs = zip(ordered[0], ordered[-1], strict=False)
    return ordered[0][: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]


def _shortened(name: str, width: int) -> str:
    """Return a name that fits, its middle replaced: ends tell names apart.

    >>> _shortened("/backbone/layer1/conv1/Conv_output_0", 20)
    '/back...onv_output_0'
    """
    if cell_len(name) <= width:
        return name
    head, tail = "", ""
    for char in name:
        if cell_len(head + char) > (width - 3) // 3:
            break
        head += char
    for char in reversed(name):
        if cell_len(head + char + tail) > width - 3:
            break
        tail = char + tail
    return f"{head}...{tail}"


def render_terminal(
    report: Json, console: Console, *, verbose: bool = False, time_passes: bool = False
) -> None:
    """Print a report of `optimize` or `compare`: verdict, what was done, what that changed.

    Args:
        report: The object that `Report.to_json` returns.
        console: Where to print; its width, colours and encoding are respected.
        verbose: Show every norm, place and output instead of the first or worst few.
        time_passes: Show the time each pass took.
    """
    page = _Page(console)
    page.prose(verdict(report), style=_mood(report))
    if report["command"] == "compare":
        page.line()
        for role, path in zip(
            _roles(report), (report["model"]["input"], report["model"]["output"]), strict=True
        ):
            page.prose(f"{path or 'given in memory'}", lead=f"  {role:<7}", hang=9)
    else:
        _print_passes(page, report, verbose=verbose, time_passes=time_passes)
        _print_reasons(page, report, verbose=verbose)
        _print_norms(page, report, verbose=verbose)
    _print_parity(page, report, verbose=verbose)
    _print_latency(page, report)
    _print_size(page, report)
    if verbose:
        _print_environment(page, report)
    _print_notes(page, report)


def render_inspect(report: Json, console: Console, *, verbose: bool = False) -> None:
    """Print a report of `inspect`: every norm, what would be done and what stands in the way.

    Args:
        report: The object that `Report.to_json` returns.
        console: Where to print; its width, colours and encoding are respected.
        verbose: Show input, nodes and site of each norm too.
    """
    page = _Page(console)
    page.prose(verdict(report), style="bold")
    if report["norms"]:
        page.line()
        _print_norm_rows(page, report, verbose=verbose)
    norms = {norm["site"] for norm in report["norms"]}
    others = [s for s in report["sites"] if s["action"] == "refused" and s["site"] not in norms]
    if others:
        page.heading("Also refused")
        page.groups(_grouped(others), everything=verbose)
    if verbose:
        _print_environment(page, report)
    _print_notes(page, report)


def _mood(report: Json) -> str:
    parity = report["parity"]
    if parity is not None:
        return "bold green" if parity["passed"] else "bold red"
    return "bold"


def _print_passes(page: _Page, report: Json, *, verbose: bool, time_passes: bool) -> None:
    page.heading("Passes")
    titles, rows, idle = _pass_rows(report, time_passes=time_passes, everything=verbose)
    if rows:
        page.table(titles, rows, numeric=range(1, len(titles)))
    if idle:
        more = "more " if rows else ""
        noun = "pass" if idle == 1 else "passes"
        page.line(f"  {idle} {more}{noun} found nothing to do")
    if not report["passes"]:
        page.line("  none was run")


def _print_reasons(page: _Page, report: Json, *, verbose: bool) -> None:
    for title, groups_of in _REASONS.items():
        groups = groups_of(report)
        if groups:
            page.heading(title)
            page.groups(groups, everything=verbose)
    taken_back = _taken_back(report)
    if taken_back:
        page.heading("Taken back, because the outputs disagreed")
        for site, effect in taken_back:
            page.prose(f"{site}: {effect}", lead="  ", hang=4)


def _print_norms(page: _Page, report: Json, *, verbose: bool) -> None:
    page.heading("Normalizations")
    titles, rows = _norm_counts(report)
    if not rows:
        page.line("  none was found")
        return
    page.table(titles, rows, numeric=range(1, len(titles)))
    if verbose:
        page.line()
        _print_norm_rows(page, report, verbose=True)


def _print_norm_rows(page: _Page, report: Json, *, verbose: bool) -> None:
    norms = report["norms"]
    advised: set[str] = set()

    def details(number: int) -> None:
        norm = norms[number]
        lines = []
        if cells[number][-1] != _what(norm):
            lines.append(f"into {norm['into']}")
        if norm["reason"]:
            at = f" (at {norm['at']})" if norm.get("at") else ""
            lines.append(f"{norm['reason']}{at}")
        if norm.get("advice") and norm["advice"] not in advised:
            advised.add(norm["advice"])
            lines.append(f"to change that: {norm['advice']}")
        if verbose:
            lines += [f"input {norm['input']}", f"output {norm['output']}"]
            lines.append(f"{_count(len(norm['nodes']), 'node')}: {', '.join(norm['nodes'])}")
            lines.append(f"site {norm['site']}" if norm["site"] else "no site")
        for each in lines:
            page.prose(each, lead="      ", hang=6, style="dim")

    titles = list(_NORM_TITLES)
    if _planned(report):
        titles[-1] = "would be"
    cells = [_norm_cells(norm) for norm in norms]
    for row, norm in zip(cells, norms, strict=True):
        if cell_len(row[-1]) > _ACTION_WIDTH:
            row[-1] = _ACTIONS[norm["action"]]
    page.table(titles, cells, flexible=3, below=details)


def _print_parity(page: _Page, report: Json, *, verbose: bool) -> None:
    parity = report["parity"]
    if parity is None:
        page.heading("Parity")
        page.prose(f"not checked{_because(report['parity_skipped'])}", lead="  ", hang=2)
        return
    page.heading(f"Parity: {'passed' if parity['passed'] else 'FAILED'}", _parity_facts(parity))
    outputs = _worst_first(parity)
    shown = outputs if verbose else outputs[:_OUTPUTS_SHOWN]
    rows = [
        _parity_cells(each["name"] if state == "off" else "", state, measures)
        for each in shown
        for state, measures in _judgements(each)
    ]
    if rows:
        titles = list(_PARITY_TITLES)
        titles[3] = _roles(report)[0]
        page.table(titles, rows, numeric=range(2, len(titles)))
    rest = outputs[len(shown) :]
    if rest:
        used = _budget_used(rest[0])
        page.line(f"  and {_count(len(rest), 'more output')}{_none_above(used)}")
    for each in shown:
        for state, measures in _judgements(each):
            if measures.get("reason"):
                text = f"{each['name']}, optimizer {state}: {measures['reason']}"
                page.prose(text, lead="  ", hang=4)
    if rows:
        page.prose(_LEGEND, lead="  ", hang=2, style="dim")
    if verbose:
        for number, each in enumerate(parity["inputs"], 1):
            page.prose(each, lead=f"  input {number}: ", hang=4)
    for each in parity["notes"]:
        page.prose(each, lead="  ", hang=2)


def _none_above(used: float | None) -> str:
    return "" if used is None else f", none above {_share(used)} of budget"


def _print_latency(page: _Page, report: Json) -> None:
    latency = report["latency"]
    if latency is None:
        page.heading("Latency")
        page.prose(f"not measured{_because(report['latency_skipped'])}", lead="  ", hang=2)
        return
    page.heading(f"Latency on {_provider(latency['provider'])}", _latency_facts(latency))
    rows = [
        [role, _milliseconds(latency[key]["p50"]), _milliseconds(latency[key]["p90"])]
        for role, key in zip(_roles(report), ("original", "candidate"), strict=True)
    ]
    page.table(["", "p50", "p90"], rows, numeric=(1, 2))
    page.prose(_latency_line(latency), lead="  ", hang=2)
    for each in (*latency.get("notes", ()), *_not_measured(report)):
        page.prose(each, lead="  ", hang=2)


def _latency_line(latency: Json) -> str:
    low, high = latency["band"]
    return (
        f"{latency['verdict']}: ratio {_ratio(latency['ratio'])}, {_interval(latency)}, "
        f"A/A band {_ratio(low)} to {_ratio(high)}"
    )


def _print_size(page: _Page, report: Json) -> None:
    page.heading("Size")
    for name, change in _size_rows(report):
        page.prose(change, lead=f"  {name:<6}", hang=8)


def _size_rows(report: Json) -> list[tuple[str, str]]:
    nodes, model = report["nodes"], report["model"]
    rows = [
        ("nodes", nodes["before"], nodes["after"], "{:,}".format, ("fewer", "more")),
        ("file", model["bytes_before"], model["bytes_after"], _bytes, ("smaller", "larger")),
    ]
    lines = []
    for name, before, after, amount, words in rows:
        if before is not None and after is not None:
            lines.append((name, _change(before, after, amount, words)))
        elif before is not None:
            lines.append((name, amount(before)))
    return lines


def _print_environment(page: _Page, report: Json) -> None:
    for title, values in (("Options", report["options"]), ("Environment", report["environment"])):
        if values:
            page.heading(title)
            for key, value in values.items():
                page.prose(_value(value), lead=f"  {_plain(key)}: ", hang=4)


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _print_notes(page: _Page, report: Json) -> None:
    if report["warnings"]:
        page.heading("Warnings")
        for each in report["warnings"]:
            page.prose(each, lead="  ", hang=2, style="yellow")
    if report["notes"]:
        page.heading("Notes")
        for each in report["notes"]:
            page.prose(each, lead="  ", hang=2)
    written = _written(report)
    if written:
        page.line()
        for each in written:
            page.prose(each, hang=2)


# ** markdown **


def render_markdown(report: Json) -> str:
    """Return a report as GitHub-flavoured markdown: verdict, a small table, folded lists.

    Args:
        report: The object that `Report.to_json` returns.
    """
    name = Path(report["model"]["input"] or "model").name
    blocks = [f"### onnxnorm {report['command']}: {_code(name)}", _prose(verdict(report))]
    blocks += [f"**Warning:** {_prose(each)}" for each in report["warnings"]]
    blocks += [_summary_table(report)]
    for title, items in _markdown_lists(report):
        blocks.append(_details(title, _bullets(items)))
    counts, rows = _norm_counts(report)
    if rows:
        listed = [_norm_cells(norm) for norm in report["norms"]]
        titles = [*_NORM_TITLES[:-1], "would be"] if _planned(report) else _NORM_TITLES
        inside = [
            _table([counts, *([_code(row[0]), *row[1:]] for row in rows)], right=1),
            _long_table([titles, *([_code(r[0]), *r[1:3], _code(r[3]), r[4]] for r in listed)]),
        ]
        blocks.append(_details(f"Normalizations ({len(listed)})", "\n\n".join(inside)))
    titles, rows, _ = _pass_rows(report, time_passes=True, everything=True)
    if rows:
        table = _table([titles, *([_code(row[0]), *row[1:]] for row in rows)], right=1)
        blocks.append(_details(f"Passes ({len(rows)})", table))
    blocks += _markdown_parity(report)
    blocks += _markdown_latency(report)
    setting = {**report["options"], **report["environment"]}
    if setting:
        rows = [[_code(key), _code(_value(value))] for key, value in setting.items()]
        blocks.append(_details("Options and environment", _long_table([["", ""], *rows])))
    if report["notes"]:
        blocks.append("\n".join(f"- {_prose(each)}" for each in report["notes"]))
    return "\n\n".join(blocks) + "\n"


def _summary_table(report: Json) -> str:
    before, after = _roles(report)
    nodes, model, latency = report["nodes"], report["model"], report["latency"]
    rows = [["", before, after]]

    def add(name: str, first: Any, second: Any, amount: Callable[[Any], str]) -> None:
        if first is not None:
            rows.append([name, amount(first), "-" if second is None else amount(second)])

    add("nodes", nodes["before"], nodes["after"], "{:,}".format)
    add("file size", model["bytes_before"], model["bytes_after"], _bytes)
    if report["parity"] is not None and report["parity"]["outputs"]:
        worst = _worst_first(report["parity"])[0]
        title = f"error at {_code(worst['name'])}, max / RMS, ulp of its scale"
        rows.append([title, _error_cell(worst, "baseline_"), _error_cell(worst, "")])
    if latency is not None:
        first, second = latency["original"], latency["candidate"]
        where = _provider(latency["provider"])
        for key in ("p50", "p90"):
            add(f"latency {key} on {where}", first[key], second[key], _milliseconds)
    if len(rows[0]) == 3 and all(row[2] == "-" for row in rows[1:]):
        rows = [row[:2] for row in rows]
    return _table(rows, right=1)


def _markdown_lists(report: Json) -> list[tuple[str, list[str]]]:
    lists = []
    for title, groups_of in _REASONS.items():
        groups = groups_of(report)
        number = sum(len(group.places) for group in groups)
        lists.append((f"{title} ({number})", [_markdown_group(group) for group in groups]))
    back = [f"{_code(site)}: {_prose(effect)}" for site, effect in _taken_back(report)]
    lists.append((f"Taken back ({len(back)})", back))
    return [(title, items) for title, items in lists if items]


def _markdown_group(group: _Group) -> str:
    places = group.listed(_MARKDOWN_ROWS // 5, _code)
    advice = f". To change that: {_prose(group.advice)}" if group.advice else ""
    return f"{len(group.places)} x {_prose(group.reason)}, at {places}{advice}"


def _markdown_parity(report: Json) -> list[str]:
    parity = report["parity"]
    if parity is None or not parity["outputs"]:
        return []
    outputs = _worst_first(parity)
    titles = list(_PARITY_TITLES)
    titles[3] = _roles(report)[0]
    rows = []
    for each in outputs:
        for state, measures in _judgements(each):
            cells = _parity_cells(each["name"], state, measures)
            rows.append([_code(cells[0]), *cells[1:]])
    lines = [
        _prose(f"{'; '.join(_parity_facts(parity))}."),
        _long_table([titles, *rows], right=2),
        _LEGEND,
        _bullets(
            [
                f"{_code(each['name'])}, optimizer {state}: {_prose(measures['reason'])}"
                for each in outputs
                for state, measures in _judgements(each)
                if measures.get("reason")
            ]
            + [_prose(each) for each in parity["notes"]]
        ),
    ]
    title = f"Parity {'passed' if parity['passed'] else 'FAILED'}, {_count(len(outputs), 'output')}"
    return [_details(title, "\n\n".join(filter(None, lines)))]


def _markdown_latency(report: Json) -> list[str]:
    latency = report["latency"]
    if latency is None:
        return []
    items = [
        _latency_line(latency),
        "; ".join(_latency_facts(latency)),
        *latency.get("notes", ()),
        *_not_measured(report),
    ]
    title = f"Latency on {_provider(latency['provider'])}"
    return [_details(title, _bullets([_prose(each) for each in items]))]


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _bullets(items: Sequence[str]) -> str:
    lines = [f"- {each}" for each in items[:_MARKDOWN_ROWS]]
    if len(items) > _MARKDOWN_ROWS:
        lines.append(f"- and {len(items) - _MARKDOWN_ROWS:,} more, in the JSON report")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], *, right: int | None = None) -> str:
    """Return a table with the titles in row 0; columns from `right` on are aligned to the right."""
    marks = ["---" if right is None or i < right else "--:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:]))


def _long_table(rows: Sequence[Sequence[str]], *, right: int | None = None) -> str:
    table = _table(rows[: _MARKDOWN_ROWS + 1], right=right)
    more = len(rows) - 1 - _MARKDOWN_ROWS
    return f"{table}\n\nand {more:,} more, in the JSON report" if more > 0 else table


def _code(name: str) -> str:
    r"""Return a name as a code span that is also safe inside a table.

    >>> print(_code("a|b"), _code("x`y"))
    `a\|b` `` x`y ``
    """
    text = _plain(name).replace("|", "\\|")
    if not text:
        return "(no name)"
    if "`" not in text:
        return f"`{text}`"
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence} {text} {fence}"


def _prose(text: str) -> str:
    r"""Return text that markdown shows as it is: no markup, no HTML, no mention of a person.

    >>> print(_prose("x_1 < *y* | @z"))
    x\_1 &lt; \*y\* \| @<!-- -->z
    """
    text = _plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = "".join(f"\\{char}" if char in "\\`*_[]|~" else char for char in text)
    return text.replace("@", "@<!-- -->").replace("#", "#<!-- -->")


# ** progress **


class _Elapsed(ProgressColumn):
    """Whole seconds since the work began, which is before the bar was shown."""

    def __init__(self, elapsed: Callable[[], float]) -> None:
        super().__init__()
        self._elapsed = elapsed

    def render(self, task: Task) -> Text:
        return Text(f"{self._elapsed():.0f} s")


@final
class Progress:
    """A bar on stderr for work that takes longer than two seconds, gone without trace afterwards.

    An instance is the progress callback of the library: `progress(what, share)`, where share is
    between 0 and 1, or None while it is not known. It says nothing when quiet, and nothing when
    the console is no terminal, so logs stay clean.

        with Progress(quiet=quiet) as progress:
            onnxnorm.optimize(model, progress=progress)

    Args:
        quiet: Never show anything.
        console: Where to show it; stderr if None.
        delay: Seconds that pass before the bar is shown.
    """

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, delay: float = 2.0
    ) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._silent = quiet or not _can_redraw(self._console)
        self._delay = delay
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._what, self._share = "working", None  # type: tuple[str, float | None]
        self._began = 0.0

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if not self._silent:
            self._timer = threading.Timer(self._delay, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            timer, bar = self._timer, self._bar
            self._timer = self._bar = None
        if timer is not None:
            timer.cancel()
        if bar is not None:
            bar.stop()

    def __call__(self, what: str, share: float | None) -> None:
        """Take note of what is being done and how much of it is; may be called by any thread."""
        with self._lock:
            self._what, self._share = _plain(what), share
            self._update()

    def _show(self) -> None:
        with self._lock:
            if self._timer is None:
                return
            self._bar = Bar(
                TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                BarColumn(bar_width=24),
                _Elapsed(lambda: time.monotonic() - self._began),
                console=self._console,
                transient=True,
                # What goes to stdout is the result, and stays out of rich's hands.
                redirect_stdout=False,
                expand=True,
            )
            self._task = self._bar.add_task(self._what, total=None)
            self._update()
            self._bar.start()

    def _update(self) -> None:
        if self._bar is None or self._task is None:
            return
        share = self._share
        self._bar.update(
            self._task,
            description=self._what,
            total=None if share is None else 1.0,
            completed=0.0 if share is None else min(1.0, max(0.0, share)),
        )


def _can_redraw(console: Console) -> bool:
    # rich calls a pipe a terminal when FORCE_COLOR is set; a bar in a log is noise all the same.
    isatty = getattr(console.file, "isatty", None)
    return bool(isatty and isatty()) and console.is_terminal and not console.is_dumb_terminal
