"""What was found, done and measured: one JSON object, and every other form made from it.

`Report.to_json` gives the object that `report.schema.json` describes. The terminal text and the
markdown are functions of that object alone, so a stored report can be rendered again, and no form
can say what another does not know.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from onnxnorm.errors import UsageError, writing

Json: TypeAlias = Mapping[str, Any]

SCHEMA_VERSION: Final = 1


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
        streams: One row for each residual stream.
        passes: One row for each pass that was run.
        sites: One row for each decision.
        parity: The parity result, or None and `parity_skipped` with the reason.
        parity_skipped: Why there is no parity result.
        latency: The latency result, or None and `latency_skipped` with the reason.
        latency_skipped: Why there is no latency result.
        analysis: Time by operator, memory, what each pass bought, and the like; None where nothing
            of it was measured.
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
    streams: Sequence[Json] = ()
    passes: Sequence[Json] = ()
    sites: Sequence[Json] = ()
    parity: Json | None = None
    parity_skipped: str | None = None
    latency: Json | None = None
    latency_skipped: str | None = None
    analysis: Json | None = None
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
        data = {"streams": [], "analysis": None, **data}  # earlier versions had none
        schema = load_schema()
        fault = _fault(data, schema, schema, "report")
        if fault is not None:
            raise UsageError(
                f"this is not an onnxnorm report as the schema describes it: {fault}",
                "Make the report again with 'onnxnorm ... --report FILE.json'.",
            )
        return cls(**{each.name: data[each.name] for each in fields(cls)})

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Return the report in a JSON file.

        Raises:
            UsageError: There is no such file, or it holds no report that this version reads.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read report {path}: {error.strerror or error}",
                "Give a file that 'onnxnorm ... --report FILE.json' wrote.",
            ) from error
        except ValueError as error:  # neither UTF-8 nor JSON
            raise UsageError(
                f"{path} is not JSON: {error}",
                "Give a file that 'onnxnorm ... --report FILE.json' wrote.",
            ) from error
        return cls.from_json(data)

    def to_markdown(self) -> str:
        """Return the report as markdown that can be pasted into a pull request."""
        from onnxnorm.report_markdown import render_markdown

        return render_markdown(self.to_json())

    def to_html(self) -> str:
        """Return the report as one HTML page that needs nothing but itself."""
        from onnxnorm.report_html import render_html  # brings matplotlib, which takes time

        return render_html(self.to_json())

    def write(self, path: str | Path) -> None:
        """Write the report in the form that the suffix of `path` names, all of it or nothing.

        Args:
            path: A file ending in .html, .md or .json; an existing one is replaced.

        Raises:
            UsageError: The suffix names no form we write.
            OutputError: The folder is missing or not writable, or the disk is full. Nothing is
                left behind, and an existing file is as it was.
        """
        form = report_form(path)
        if form == "json":
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        else:
            text = self.to_html() if form == "html" else self.to_markdown()
        _write_atomically(Path(path), text)


def report_form(path: str | Path) -> Literal["json", "md", "html"]:
    """Return the form that the suffix of a report's path names, before any work is done for it.

    >>> report_form("out/report.JSON")
    'json'

    Raises:
        UsageError: The suffix is missing or unknown.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        return "json"
    if suffix == ".md":
        return "md"
    if suffix in {".html", ".htm"}:
        return "html"
    what = f"the suffix {suffix}" if suffix else "no suffix"
    raise UsageError(
        f"cannot tell the form of report {path}: it has {what}",
        "Name the report .html or .md to read it, or .json to keep every number.",
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
            return f"{at} has {len(value)} {'entry' if len(value) == 1 else 'entries'}"
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
    scratch = target.with_name(f".onnxnorm-{os.urandom(8).hex()}.tmp")
    with writing(path):
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
