"""The report: one JSON object that keeps to its schema, and true, plain text made from it."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from onnxnorm.agreement import Level, OutputParity, ParityResult
from onnxnorm.analysis import empty
from onnxnorm.errors import OnnxNormError, OutputError, UsageError
from onnxnorm.latency import LatencyResult, Timing
from onnxnorm.report import Report, load_schema, report_form
from onnxnorm.report_html import render_html
from onnxnorm.report_markdown import render_markdown
from onnxnorm.report_terminal import Progress, render_inspect, render_terminal
from onnxnorm.report_text import REASONS, disappoints, parity_cells, verdict

SCHEMA = load_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


# ** material **


def norm(output: str, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "batch_norm",
        "input": output.replace("bn", "conv"),
        "output": output,
        "axes": [0, 2, 3],
        "epsilon": 1e-5,
        "nodes": [f"{output}/BatchNormalization"],
        "recognised": True,
        "action": "folded",
        "into": "Conv",
        "reason": None,
        "at": None,
        "advice": None,
        "site": f"fold-batchnorm-into-conv:{output}",
    }
    return {**row, **changes}


def site(row: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    applied = row["action"] == "folded"
    decision = {
        "site": row["site"],
        "pass": "fold-batchnorm-into-conv",
        "action": "applied" if applied else "refused",
        "reason": row["reason"],
        "at": row["at"],
        "advice": row["advice"],
        "removed": row["nodes"] if applied else [],
        "added": [f"{row['output']}/Conv"] if applied else [],
        "error": None,
    }
    return {**decision, **changes}


def measures(error: float, baseline: float, **changes: Any) -> dict[str, Any]:
    """Return one comparison whose ulp is 2**-20 and whose RMS is an eighth of its maximum."""
    ulp = 2.0**-20
    numbers = {
        "error": error * ulp,
        "baseline_error": baseline * ulp,
        "budget": (2 * baseline + 4) * ulp,
        "error_rms": error * ulp / 8,
        "baseline_error_rms": baseline * ulp / 8,
        "budget_rms": (baseline / 4 + 4) * ulp,
        "error_ulp": error,
        "baseline_error_ulp": baseline,
        "cosine": 0.99999997,
        "argmax_agreement": 1.0,
        "passed": error <= 2 * baseline + 4,
        "reason": None,
    }
    return {**numbers, **changes}


def output(name: str, error: float, baseline: float, **changes: Any) -> dict[str, Any]:
    row = {"name": name, "dtype": "float32", **measures(error, baseline)}
    return {**row, "optimized": measures(error, baseline, argmax_agreement=0.99999), **changes}


def failed_when_optimized(name: str, reason: str) -> dict[str, Any]:
    optimized = measures(1, 1, passed=False, reason=reason)
    return output(
        name, 1, 1, passed=False, reason=f"with optimizations: {reason}", optimized=optimized
    )


ELSEWHERE = "the convolution's result is used elsewhere, so it must keep the value that it has"
NORMS = [
    norm("/stem/bn1"),
    *(
        norm(
            f"/stages/{i}/bn",
            action="refused",
            into=None,
            reason=ELSEWHERE,
            at=f"/stages/{i}/Add",
            advice="leave the convolution's result out of the graph's outputs",
        )
        for i in range(5)
    ),
    norm("/head/bn", action="refused", into=None, reason="training_mode is set"),
    norm("/head/ln", kind="layer_norm", axes=[2], action="kept", into=None, site=None),
    norm(
        "/head/Mul",
        kind="rms_norm",
        axes=[2],
        recognised=False,
        action="none",
        into=None,
        reason="the exponent is 4, not 2",
        at="/head/Pow",
        site=None,
    ),
]
BACK = site(
    norm("/x", action="refused", reason="its result differs"),
    site="scale-wrongly:/x",
    action="rolled_back",
    error=12300.0,
    **{"pass": "scale-wrongly"},
)
PARITY: dict[str, Any] = {
    "passed": True,
    "truth": "the original in float64 under onnx.reference",
    "inputs": ["normal, scale 1"] * 8,
    "outputs": [output(f"aux{i}", i, i) for i in range(6)] + [output("logits", 3.25, 1)],
    "notes": ["float16 inputs were drawn in float32 and rounded."],
    "seconds": 12.34,
}
LATENCY: dict[str, Any] = {
    "verdict": "no measurable difference",
    "ratio": 0.9934,
    "interval": [0.97, 1.0204],
    "band": [0.968, 1.031],
    "original": {"p50": 41.234, "p90": 43.1},
    "candidate": {"p50": 40.8, "p90": 42.9},
    "pairs": 8,
    "threads": 2,
    "provider": "cpu",
}
MODEL = {
    "input": "models/resnet50.onnx",
    "output": "out.onnx",
    "bytes_before": 97_812_345,
    "bytes_after": 97_612_345,
    "opset": {"ai.onnx": 17},
    "ir_version": 8,
    "producer": "pytorch 2.9.0",
}


def full(**changes: Any) -> Report:
    given: dict[str, Any] = {
        "command": "optimize",
        "version": "0.1.0",
        "model": MODEL,
        "nodes": {"before": 1175, "after": 1174},
        "norms": NORMS,
        "passes": [
            {"name": "fold-batchnorm-into-conv", "applied": 1, "refused": 6, "seconds": 0.412},
            {"name": "scale-wrongly", "applied": 0, "refused": 0, "seconds": 0.001},
            {"name": "rest", "applied": 0, "refused": 0, "seconds": 0.001},
        ],
        "sites": [*(site(row) for row in NORMS if row["site"]), BACK],
        "parity": PARITY,
        "latency": LATENCY,
        "environment": {"onnxruntime": "1.31.1", "cuda": "no NVIDIA driver", "cores": 2},
        "options": {"target": "onnx"},
        "files": [
            {"path": "out.onnx", "role": "model", "bytes": 97_612_345},
            {"path": "r.md", "role": "report"},
        ],
        "notes": ["2 initializers are also inputs and were left as they are."],
        "warnings": ["onnxruntime fuses the original wrongly; the unfused run is the baseline."],
    }
    return Report(**{**given, **changes})


def minimal(**changes: Any) -> Report:
    given: dict[str, Any] = {
        "command": "optimize",
        "version": "0.1.0",
        "model": {**MODEL, "input": None, "bytes_before": None, "bytes_after": None},
        "nodes": {"before": 0, "after": 0},
        "parity_skipped": "--no-parity",
        "latency_skipped": "--no-latency",
    }
    return Report(**{**given, **changes})


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Return the lines that a terminal would show, without the blank ones."""
        lines, row = [""], 0
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part == "\x1b[2K":
                lines[row] = ""
            elif re.fullmatch(r"\x1b\[\d*A", part):
                row -= int(part[2:-1] or 1)
            elif part != "\r" and not part.startswith("\x1b"):
                lines[row] += part
        return [line for line in lines if line.strip()]


def console(width: int, *, terminal: bool = True) -> Console:
    file = Terminal() if terminal else io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, color_system=None)


def printed(
    report: Report, width: int = 80, *, terminal: bool = True, inspect: bool = False, **options: Any
) -> str:
    page = console(width, terminal=terminal)
    (render_inspect if inspect else render_terminal)(report.to_json(), page, **options)
    file = page.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


# ** the object and its schema **


NAMES = st.text(max_size=8) | st.sampled_from(
    ["a|b", "x`y``z", "[red]x[/red]", "\x1b[31m", "层/归一"]
)


def values(rule: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for what a rule of our schema allows."""
    if "$ref" in rule:
        return values(SCHEMA["$defs"][rule["$ref"].rpartition("/")[2]])
    if "anyOf" in rule:
        return st.one_of([values(each) for each in rule["anyOf"]])
    if "const" in rule:
        return st.just(rule["const"])
    if "enum" in rule:
        return st.sampled_from(rule["enum"])
    kinds = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    return st.one_of([_of_kind(kind, rule) for kind in kinds])


def _of_kind(kind: str, rule: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    if kind == "object":
        known = {key: values(each) for key, each in rule.get("properties", {}).items()}
        required = set(rule.get("required", ()))
        if not known:
            others = rule["additionalProperties"]
            items = NAMES | st.integers() if others is True else values(others)
            return st.dictionaries(NAMES, items, max_size=2)
        return st.fixed_dictionaries(
            {key: each for key, each in known.items() if key in required},
            optional={key: each for key, each in known.items() if key not in required},
        )
    if kind == "array":
        low, high = rule.get("minItems", 0), rule.get("maxItems", 3)
        return st.lists(values(rule["items"]), min_size=low, max_size=high)
    if kind == "number" and not {"minimum", "exclusiveMinimum"} & set(rule):
        return st.sampled_from([0.0, 1e-5, 1e-12, -0.25, 1.0])
    if kind == "number":
        return st.floats(
            rule.get("minimum", rule.get("exclusiveMinimum")),
            rule.get("maximum", rule.get("exclusiveMaximum", 1e12)),
            exclude_min="exclusiveMinimum" in rule,
            exclude_max="exclusiveMaximum" in rule,
            allow_nan=False,
            allow_infinity=False,
        )
    return {
        "integer": st.integers(rule.get("minimum", -9), 2**53 if "minimum" in rule else 9),
        "string": NAMES,
        "boolean": st.booleans(),
        "null": st.none(),
    }[kind]


REPORTS = values(SCHEMA)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    for key in range(len(value)) if isinstance(value, list) else keys:
        item = value[key]
        yield from places(item, (*path, key))


def test_the_schema_is_a_schema_and_describes_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def undescribed(rule: Any, at: str) -> Iterator[str]:
        for key, each in rule.get("properties", {}).items():
            target = each
            if "$ref" in each:
                target = SCHEMA["$defs"][each["$ref"].rpartition("/")[2]]
            if not target.get("description"):
                yield f"{at}.{key}"
        if rule.get("properties") and rule.get("additionalProperties") is not False:
            yield f"{at} lets unknown keys pass"

    assert not list(undescribed(SCHEMA, "report"))
    for name, rule in SCHEMA["$defs"].items():
        assert rule["description"]
        assert not list(undescribed(rule, name))


def test_the_keys_that_scripts_rely_on_are_required() -> None:
    keys = SCHEMA["$defs"]
    assert {"version", "norms", "parity", "latency", "nodes"} <= set(SCHEMA["required"])
    assert {
        *("kind", "input", "output", "axes", "epsilon"),
        *("nodes", "recognised", "action", "reason", "site"),
    } <= set(keys["norm"]["required"])
    assert {"passed", "outputs"} <= set(keys["parity"]["required"])
    assert {"name", "error", "baseline_error", "budget"} <= set(keys["output"]["required"])
    assert {"ratio", "interval"} <= set(keys["latency"]["required"])
    assert {"before", "after"} <= set(SCHEMA["properties"]["nodes"]["required"])


def test_the_guide_names_every_key_and_word() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    norm_keys = SCHEMA["$defs"]["norm"]["properties"]
    words = [*SCHEMA["properties"], *norm_keys["kind"]["enum"], *norm_keys["action"]["enum"]]
    assert not [word for word in words if f"`{word}`" not in guide]


@pytest.mark.parametrize("report", [full(), minimal(), full(command="compare"), full(parity=None)])
def test_reports_keep_to_the_schema(report: Report) -> None:
    VALIDATOR.validate(report.to_json())
    assert list(report.to_json()) == list(SCHEMA["properties"])


@given(REPORTS)
@settings(max_examples=60, deadline=None)
def test_json_round_trip(data: dict[str, Any]) -> None:
    VALIDATOR.validate(data)
    report = Report.from_json(data)
    assert report.to_json() == data
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_from_json_refuses_what_the_schema_refuses(data: st.DataObject) -> None:
    original = full(
        sites=[BACK], norms=NORMS[:1], parity={**PARITY, "outputs": [output("y", 1, 1)]}
    )
    changed = original.to_json()
    *way, key = data.draw(st.sampled_from([path for path in places(changed) if path]))
    parent: Any = changed
    for each in way:
        parent = parent[each]
    spoilt: Any = data.draw(st.sampled_from(["drop", None, True, -1, 0, 1.5, "x", [], [1.0], {}]))
    if spoilt == "drop":
        del parent[key]
    else:
        parent[key] = spoilt
    if VALIDATOR.is_valid(changed):
        assert Report.from_json(changed).to_json() == changed
    elif not {"streams", "analysis"} <= set(changed):  # a report of a version that had none
        added: dict[str, Any] = {"streams": [], "analysis": None}
        assert Report.from_json(changed).to_json() == {**added, **changed}
    else:
        with pytest.raises(UsageError, match="report") as caught:
            Report.from_json(changed)
        assert caught.value.hint


def test_measured_latency_keeps_to_the_schema() -> None:
    timing = Timing(p50=1.0, p90=1.5, min=0.5, mean=1.0, samples=20, runs=40)
    result = LatencyResult(
        **{**LATENCY, "original": timing, "candidate": timing},
        summary="no measurable difference",
        confidence=0.95,
        fresh_pairs=4,
        runtime="1.31.1",
        seconds=12.0,
        budget_seconds=60.0,
        not_measured=("cuda",),
        notes=(),
    )
    VALIDATOR.validate(full(latency=result.to_json()).to_json())


@pytest.mark.parametrize("optimized", [True, False])
def test_measured_parity_keeps_to_the_schema(optimized: bool) -> None:
    numbers = measures(1, 1, cosine=math.nan)
    level = Level(**{key: number for key, number in numbers.items() if key != "passed"})
    row = OutputParity("y", "float32", level, level if optimized else None)
    result = ParityResult(
        passed=True,
        outputs=(row,),
        truth="float64",
        notes=("n",),
        inputs=("i",),
        samples=1,
        seconds=1.0,
    )
    VALIDATOR.validate(full(parity=result.to_json()).to_json())


def test_from_json_names_the_place() -> None:
    data = full().to_json()
    data["norms"][3]["kind"] = "lawyer_norm"
    with pytest.raises(UsageError, match=re.escape("report.norms[3].kind is 'lawyer_norm'")):
        Report.from_json(data)


def test_from_json_lets_unknown_keys_pass_and_other_versions_not() -> None:
    data = full().to_json()
    assert Report.from_json({**data, "newer": 1}) == full()
    with pytest.raises(UsageError, match="schema version 2"):
        Report.from_json({**data, "schema": 2})
    others: list[Any] = [[], "report", {}, {"version": "0.1.0"}]
    for other in others:
        with pytest.raises(UsageError, match="not an onnxnorm report"):
            Report.from_json(other)


def test_values_become_plain_json() -> None:
    row = norm("y", axes=(np.int64(1),), epsilon=np.float32(0.5))
    report = minimal(
        model={**MODEL, "input": Path("a") / "b\udcff.onnx"},
        norms=(row,),
        environment={"nan": float("nan"), "inf": np.float64("inf"), "array": np.arange(2)},
    )
    data = report.to_json()
    assert data["norms"][0]["axes"] == [1]
    assert data["norms"][0]["epsilon"] == 0.5
    assert data["environment"] == {"nan": None, "inf": None, "array": [0, 1]}
    assert data["model"]["input"] == str(Path("a") / "b\\udcff.onnx")
    json.dumps(data, allow_nan=False).encode()
    with pytest.raises(TypeError, match="cannot hold a bytes"):
        minimal(environment={"raw": b"x"})


def test_a_report_cannot_be_changed_from_outside() -> None:
    norms = [norm("y")]
    report = minimal(norms=norms)
    norms[0]["kind"] = "softmax"
    report.to_json()["norms"][0]["kind"] = "softmax"
    assert report.to_json()["norms"][0]["kind"] == "batch_norm"


# ** writing **


def test_writes_the_form_that_the_suffix_names(tmp_path: Path) -> None:
    report = full()
    report.write(tmp_path / "r.JSON")
    report.write(str(tmp_path / "r.md"))
    report.write(tmp_path / "r.html")
    assert Report.from_json(json.loads((tmp_path / "r.JSON").read_bytes())) == report
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == render_markdown(report.to_json())
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == render_html(report.to_json())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.JSON", "r.html", "r.md"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("r.pdf", ".pdf"),
        ("r.txt", ".txt"),
        ("r", "no suffix"),
    ],
)
def test_other_suffixes_are_refused(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(UsageError, match=re.escape(what)) as caught:
        full().write(tmp_path / name)
    assert ".md" in caught.value.hint
    assert ".json" in caught.value.hint
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError):
        report_form(name)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: folder / "none" / "r.json", "Create the folder first"),
        (lambda folder: folder / "folder.json", "Give a file name, not a folder"),
        (lambda folder: folder / "file" / "r.json", "Create the folder first"),
    ],
)
def test_places_that_cannot_be_written(
    tmp_path: Path, make: Callable[[Path], Path], what: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=what) as caught:
        full().write(make(tmp_path))
    assert len(str(caught.value).splitlines()) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.ENOSPC, "space"), (errno.EACCES, "may write"), (errno.EROFS, "may write")],
)
@pytest.mark.parametrize("existing", [None, "as it was"])
def test_a_failed_write_leaves_all_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    hint: str,
    existing: str | None,
) -> None:
    target = tmp_path / "r.json"
    if existing is not None:
        target.write_text(existing)

    def fail(_: int) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=os.strerror(code)) as caught:
        full().write(target)
    assert hint in caught.value.hint
    assert [path.read_text() for path in tmp_path.iterdir()] == [existing] * (existing is not None)


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        full().write(tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes and links are POSIX's")
def test_links_and_modes_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    full().write(link)
    assert link.is_symlink()
    assert json.loads(target.read_text())["schema"] == 1
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    fresh, plain = tmp_path / "fresh.json", tmp_path / "plain"
    full().write(fresh)
    plain.write_text("")
    assert fresh.stat().st_mode == plain.stat().st_mode


# ** the verdict **


def folded(count: int, refused: int = 0, kind: str = "batch_norm") -> list[dict[str, Any]]:
    rows = [norm(f"/{kind}{i}", kind=kind) for i in range(count)]
    return rows + [norm(f"/no{i}", kind=kind, action="refused", reason="r") for i in range(refused)]


def changed_by(**passes: int) -> list[dict[str, Any]]:
    return [
        site(norm(f"/{name}{i}"), **{"pass": name}) for name, n in passes.items() for i in range(n)
    ]


MISS = norm("m", recognised=False, action="none", reason="r")
NOT_TOLD = "; outputs not checked (--no-parity); latency not measured (--no-latency)."


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"norms": folded(53)}, "53 of 53 batch normalizations folded into Conv"),
        (
            {"norms": [norm("w", kind="weight_standardization", into="constant")]},
            "1 of 1 weight standardization folded into constants",
        ),
        (
            {"norms": [norm("l", kind="layer_norm", action="converted", into="rms_norm")]},
            "1 of 1 layer normalization converted into RMS normalizations",
        ),
        ({"norms": folded(1)}, "1 of 1 batch normalization folded into Conv"),
        ({"norms": folded(2, 1)}, "2 of 3 batch normalizations folded into Conv and 1 refused"),
        (
            {"norms": folded(2, kind="softmax"), "dry_run": True},
            "2 of 2 softmaxes would be folded into Conv",
        ),
        (
            {
                "norms": [
                    norm("a", into="ConvTranspose"),
                    norm("b", into="Conv"),
                    norm("c", into=None),
                ]
            },
            "3 of 3 batch normalizations folded",
        ),
        (
            {"norms": [norm("a", into="ConvTranspose"), norm("b", into="Conv")]},
            "2 of 2 batch normalizations folded into Conv and ConvTranspose",
        ),
        (
            {"norms": [*folded(2), norm("l", kind="rms_norm", action="converted", into=None)]},
            "2 of 2 batch normalizations folded into Conv, 1 of 1 RMS normalization converted",
        ),
        (
            {"passes": [PASS := {"name": "p", "applied": 0, "refused": 0, "seconds": None}]},
            "No normalization found",
        ),
        (
            {"passes": [PASS], "norms": [*folded(0, 2), norm("k", action="kept")]},
            "Nothing to change in 3 normalizations: 2 refused",
        ),
        (
            {"passes": [PASS], "norms": [norm("k", action="kept")]},
            "Nothing to change in 1 normalization",
        ),
        ({"norms": [norm("k", action="kept")]}, "No pass was run; 1 normalization found"),
        (
            {"passes": [PASS], "sites": [site(norm("y"))]},
            "No normalization found, 1 place changed by fold-batchnorm-into-conv",
        ),
        (
            {"passes": [PASS], "sites": [site(norm("y")), BACK, BACK]},
            (
                "No normalization found, 1 place changed by fold-batchnorm-into-conv, 2 changes "
                "taken back because the outputs disagreed"
            ),
        ),
        (
            {"sites": changed_by(a=2, b=31), "dry_run": True},
            "No normalization found, 33 places would be changed by b (31) and a (2)",
        ),
        (
            {"sites": changed_by(a=1, b=2, c=3, d=4, e=5), "norms": [MISS, MISS]},
            (
                "No normalization recognised (2 near misses), 15 places changed by e (5), d (4), "
                "c (3) and 2 more passes (3)"
            ),
        ),
        (
            {"sites": changed_by(a=1), "norms": [*folded(0, 2), norm("k", action="kept")]},
            "None of 3 normalizations changed (2 refused), 1 place changed by a",
        ),
        (
            {"sites": changed_by(a=1), "norms": [norm("k", action="kept")], "dry_run": True},
            "The one normalization would not be changed, 1 place would be changed by a",
        ),
        (
            {"passes": [PASS], "norms": [MISS]},
            "No normalization recognised (1 near miss)",
        ),
    ],
)
def test_verdict_says_what_changed(changes: dict[str, Any], text: str) -> None:
    assert verdict(minimal(**changes).to_json()) == text + NOT_TOLD


NO_FIGURES = {"error": None, "error_rms": None, "passed": False}
LOGITS_FAIL = "outputs DO NOT AGREE with the original (logits has 5.00 times the error it may have)"
FAILED = {**PARITY, "passed": False, "outputs": [output("a", 1, 1), output("logits", 30, 1)]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {},
            (
                "outputs agree with the original within the derived tolerance (at worst 0.54 of "
                "the allowed error)"
            ),
        ),
        ({"parity": {**PARITY, "outputs": []}}, "there are no outputs to check"),
        ({"parity": None}, "outputs not checked"),
        (
            {"parity": FAILED},
            LOGITS_FAIL,
        ),
        (
            {"parity": FAILED, "model": {**MODEL, "output": None}},
            f"{LOGITS_FAIL}; no model was written",
        ),
        (
            {
                "parity": {
                    **FAILED,
                    "outputs": [failed_when_optimized("y", "NaN moved")],
                }
            },
            "outputs DO NOT AGREE with the original (y: NaN moved)",
        ),
        (
            {"parity": {**FAILED, "outputs": [{**output("y", 1, 1), **NO_FIGURES}]}},
            "outputs DO NOT AGREE with the original (y could not be compared)",
        ),
    ],
)
def test_verdict_says_whether_the_outputs_agree(changes: dict[str, Any], text: str) -> None:
    assert f"; {text}; no measurable" in verdict(full(**changes).to_json())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {},
            "; no measurable difference in latency on the CPU (0.993 times the original's ",
        ),
        (
            {"ratio": 1.455, "interval": [1.34, 1.58]},
            "; latency on the CPU undecided (1.455 times the original's latency, 95 % interval ",
        ),
        (
            {"ratio": 1.02, "interval": [1.01, 1.03]},  # inside the A/A band
            "; no measurable difference in latency on the CPU (1.020 times the original's ",
        ),
        (
            {"verdict": "faster", "provider": "cuda"},
            "; faster on CUDA (0.993 times the original's latency, ",
        ),
        (
            {"verdict": "slower", "confidence": 0.9},
            "; slower on the CPU (0.993 times the original's latency, 90 % interv",
        ),
    ],
)
def test_verdict_says_whether_it_is_faster(changes: dict[str, Any], text: str) -> None:
    assert text in verdict(full(latency={**LATENCY, **changes}).to_json())


def test_verdict_of_compare_and_inspect() -> None:
    assert verdict(full(command="compare").to_json()) == (
        "The second model's outputs agree with the first's within the derived tolerance (at worst "
        "0.54 of the allowed error); no measurable difference in latency on the CPU (0.993 times "
        "the first's latency, 95 % interval 0.970 to 1.020)."
    )
    assert verdict(minimal(command="inspect", norms=folded(2)).to_json()) == (
        "2 of 2 batch normalizations would be folded into Conv."
    )


@pytest.mark.parametrize(
    ("error", "passed", "text"),
    [(6.0, True, "worst 1.00 of the allowed"), (6.001, False, "over 1.00 times")],
)
def test_rounding_does_not_cross_the_limit(error: float, passed: bool, text: str) -> None:
    row = output("y", error, 1)
    assert row["passed"] == passed
    assert text in verdict(full(parity={**PARITY, "passed": passed, "outputs": [row]}).to_json())


def test_integers_that_differ_at_ties_have_no_share_of_a_budget() -> None:
    tied = measures(1, 0, budget=0.0, budget_rms=0.0, passed=True, cosine=None)
    row = {**output("ids", 1, 0), **tied, "optimized": tied}
    report = full(parity={**PARITY, "outputs": [row]}).to_json()
    assert "outputs agree with the original within the derived tolerance;" in verdict(report)
    assert parity_cells("ids", "off", row)[-1] == "-"


def test_what_could_not_be_compared_has_no_figures() -> None:
    absent = {**measures(1, 1, passed=False), "error": None, "baseline_error": None}
    assert parity_cells("y", "off", absent)[2:4] == ["-", "-"]


def test_a_near_miss_that_a_pass_refused_is_told_once() -> None:
    row = norm("y", recognised=False, action="refused", into=None, reason="training_mode is set")
    report = minimal(norms=[row], sites=[site(row)], passes=[PASS]).to_json()
    assert REASONS["Refused"](report) == []
    assert [group.reason for group in REASONS["Near misses, not recognised"](report)] == [
        "training_mode is set"
    ]


def test_what_another_pass_refused_is_no_near_miss() -> None:
    row = norm("y", action="refused", into=None, reason="nothing linear", site="fold-affine:y")
    elsewhere = site(row, site="fold-batchnorm:y", action="missed", reason="it follows Div")
    report = minimal(norms=[row], sites=[elsewhere, site(row)], passes=[PASS]).to_json()
    assert REASONS["Near misses, not recognised"](report) == []
    assert [group.reason for group in REASONS["Refused"](report)] == ["nothing linear"]
    report["norms"] = []
    assert [g.reason for g in REASONS["Near misses, not recognised"](report)] == ["it follows Div"]


# ** terminal **


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_text(width: int) -> None:
    assert printed(full(), width) == TERMINAL[width]


def test_what_was_not_done_is_said() -> None:
    assert printed(minimal(nodes={"before": 1, "after": 1})) == NOTHING_DONE
    text = printed(minimal(dry_run=True, model={**MODEL, "output": None}))
    assert text.endswith("\nDry run: no model was written.\n")
    text = printed(full(parity=FAILED, model={**MODEL, "output": None}, files=[]))
    assert text.endswith("\nNo model was written.\n")


def test_compare_names_both_models() -> None:
    text = printed(full(command="compare"))
    assert "\n  first  models/resnet50.onnx\n  second out.onnx\n" in text
    assert "\n  first   41.2 ms  43.1 ms\n  second  40.8 ms  42.9 ms\n" in text
    assert "Normalizations" not in text


def test_verbose_and_time_passes_show_more() -> None:
    brief, verbose = printed(full(), 200), printed(full(), 200, verbose=True)
    for text in ("/stages/4/bn (/stages/4/Add)", "aux0", "input 8: normal", "target: onnx"):
        assert text not in brief
        assert text in verbose
    assert "0.41 s" not in brief
    assert "fold-batchnorm-into-conv        1        6           0    0.41 s\n" in printed(
        full(), time_passes=True
    )


INTEGERS_DIFFER = {
    "error": 3.0,
    "passed": False,
    "reason": "3 integers differ",
    "cosine": None,
    "argmax_agreement": None,
}


def test_failed_outputs_come_first_with_their_reasons() -> None:
    outputs = [
        *(output(f"fine{i}", 5, 1) for i in range(9)),
        failed_when_optimized("y", "a NaN moved"),
        {**output("ids", 0, 0, error_ulp=None, optimized=None), **INTEGERS_DIFFER},
        {**output("z", 0, 0, optimized=None), "error": None, "passed": False},
    ]
    text = printed(full(parity={**PARITY, "passed": False, "outputs": outputs}))
    assert "\nParity: FAILED (" in text
    rows = [line.split() for line in text.splitlines() if line.endswith("FAILED")]
    assert [row[0] for row in rows] == ["ids", "on", "z"]
    assert rows[0][2:] == ["3", "abs", "0", "/", "0", "-", "-", "7.9e5", "FAILED"]
    assert rows[2][2:4] == ["-", "0"]
    assert "\n  y, optimizer on: a NaN moved\n" in text
    assert "\n  ids, optimizer off: 3 integers differ\n" in text
    assert "\n  and 7 more outputs, none above 0.83 of budget\n" in text


@pytest.mark.parametrize("verbose", [False, True])
def test_inspect(verbose: bool) -> None:
    report = full(
        command="inspect", norms=NORMS[:3] + NORMS[-2:], parity=None, latency=None, files=[]
    )
    report = Report(**{**vars(report), "sites": report.sites[:3], "notes": [], "warnings": []})
    assert printed(report, inspect=True, verbose=verbose) == INSPECT[verbose]


def test_inspect_names_the_passes_and_sites_of_what_is_no_norm() -> None:
    found = [site(norm("/a/Reshape"), **{"pass": "fold-sizes"}, site="fold-sizes:/a/Reshape")]
    passes = [{"name": "fold-sizes", "applied": 1, "refused": 0, "seconds": None}]
    report = minimal(command="inspect", sites=found, passes=passes)
    text = "No normalization found, 1 place would be changed by fold-sizes.\n"
    assert printed(report, inspect=True).startswith(f"{text}\nPasses\n")
    assert "fold-sizes:/a/Reshape" not in printed(report, inspect=True)
    verbose = printed(report, inspect=True, verbose=True)
    assert "\nOther sites that would be changed\n  fold-sizes:/a/Reshape\n" in verbose


@pytest.mark.parametrize(
    ("parity", "against", "red", "told"),
    [
        (True, None, False, "; on CUDA outputs agree with the original"),
        (False, None, True, "; on CUDA outputs DO NOT AGREE with the original ("),
        (True, "holds", False, "; the gain of base.json holds."),
        (True, "regressed", True, "; LESS IS GAINED than in base.json."),
        (
            True,
            "cannot tell",
            False,
            "; whether the gain of base.json holds, this run cannot tell.",
        ),
    ],
)
def test_what_fails_elsewhere_is_in_the_verdict(
    parity: bool, against: str | None, red: bool, told: str
) -> None:
    """A model that fails on one provider, or has lost its gain, has not passed."""
    elsewhere = {
        "provider": "cuda",
        "parity": PARITY if parity else FAILED,
        "parity_skipped": None,
        "latency": None,
        "latency_skipped": "--no-latency",
        "profile": None,
    }
    earlier = {"report": "base.json", "verdict": against} if against else None
    report = full().to_json()
    report["analysis"] = {"providers": [elsewhere], "against": earlier}
    assert told in verdict(report)
    assert disappoints(report) == red
    if against is None:
        said = "passed" if parity else "FAILED"
        whole = full(analysis={**empty(), "providers": [elsewhere]})
        assert f"Parity on CUDA {said}, " in render_markdown(whole.to_json())
        assert f"\nParity on CUDA: {said} (" in printed(whole)
    assert not disappoints(full().to_json())
    assert disappoints(full(parity=FAILED).to_json())


def test_what_onnxruntime_gets_wrong_is_a_warning_in_every_form() -> None:
    wrong = "onnxruntime fuses this into one operator, wrongly: the exponent 4 is taken for 2"
    rows = [norm(f"y{i}", recognised=False, action="none", warning=wrong) for i in range(6)]
    report = minimal(command="inspect", norms=rows, warnings=["mind the gap"])
    told = f"At y0, y1, y2 and 3 more: {wrong}."
    text = printed(report, inspect=True, terminal=False).replace("\n  ", " ")
    assert f"Warnings mind the gap {told}" in text
    assert f"**Warning:** {told}" in render_markdown(report.to_json())
    assert told in printed(minimal(norms=rows)).replace("\n  ", " ")
    assert told in render_html(report.to_json())


def test_inspect_verbose_says_what_else_was_seen() -> None:
    report = minimal(command="inspect", norms=[norm("y", notes=["a SiLU follows"])])
    assert "a SiLU follows" not in printed(report, inspect=True)
    assert "\n      a SiLU follows\n" in printed(report, inspect=True, verbose=True)


def test_inspect_of_nothing() -> None:
    assert printed(minimal(command="inspect"), inspect=True) == "No normalization found.\n"


def test_long_names_are_shortened_on_a_terminal_and_whole_in_a_pipe() -> None:
    start, end = "/network/backbone/stages", "attention/normalization/Output_0"
    norms = [norm(f"{start}.{i}/block/{end}") for i in range(2)]
    report = minimal(command="inspect", norms=[*norms, norm("y")])
    assert printed(report, inspect=True).splitlines()[2:8] == [  # shortened they would be the same
        "  output value",
        "    kind        axes   epsilon  would be",
        f"  {start}.0/block/{end}",
        "    batch_norm  0,2,3  1e-05    folded into Conv",
        f"  {start}.1/block/{end}",
        "    batch_norm  0,2,3  1e-05    folded into Conv",
    ]
    report = minimal(command="inspect", norms=norms)
    rows = printed(report, inspect=True).splitlines()[3:]
    assert rows == [
        f"  batch_norm  0,2,3  1e-05    ...{i}/block/attention/normali...  folded into Conv"
        for i in range(2)
    ]
    piped = printed(report, inspect=True, terminal=False)
    assert all(row["output"] in piped for row in norms)


def test_wide_numbers_and_names_fit_a_terminal_of_80_columns() -> None:
    outputs = [
        output(f"/encoder/layer.{i}/last_hidden_state", 12_345.0 + i, 23.0 + i, cosine=-0.5)
        for i in range(4)
    ]
    rows = [
        norm(f"/model/decoder/{i}/norm/Mul_1_output_0", kind=kind, action="lowered", into=into)
        for i, kind in enumerate(["filter_response_norm", "weight_standardization"])
        for into in ["SkipSimplifiedLayerNormalization", "Conv"]
    ]
    report = full(norms=rows, sites=[], parity={**PARITY, "outputs": outputs, "passed": False})
    text = printed(report, verbose=True)
    assert max(map(cell_len, text.splitlines())) < 80
    assert text.count("FAILED") == 9
    assert "1.2e4 / 1.5e3" in text
    assert "      into SkipSimplifiedLayerNormalization\n" in text


def test_names_cannot_command_the_terminal() -> None:
    evil = "a\x1b[2Jb\u202ec\nd [red]e[/red] :smile:"
    text = printed(full(norms=[norm(evil, reason=evil)], sites=[], warnings=[evil]), verbose=True)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "  a\\x1b[2Jb\\u202ec d [red]e[/red] :smile:\n" in text


def test_a_narrow_encoding_is_respected() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    page = Console(file=file, width=80)
    render_inspect(minimal(command="inspect", norms=[norm("层/bn")]).to_json(), page)
    file.seek(0)
    assert "\\u5c42/bn" in file.read()


def test_colour_says_nothing_that_words_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    texts = {}
    for colour in (True, False):
        file = Terminal()
        environ = {"TERM": "xterm-256color", **({} if colour else {"NO_COLOR": "1"})}
        page = Console(file=file, width=80, force_terminal=True, _environ=environ)
        render_terminal(full(parity=FAILED).to_json(), page)
        texts[colour] = file.getvalue()
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", texts[True])
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", texts[False])
    bare = [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in texts.values()]
    assert bare[0] == bare[1]
    assert "DO NOT AGREE" in bare[0]


def has_parity(data: Any) -> bool:
    """Whether a parity table is anywhere in a report: its figures may be absurdly wide here."""
    if isinstance(data, dict):
        return data.get("parity") is not None or any(map(has_parity, data.values()))
    return isinstance(data, list) and any(map(has_parity, data))


@given(REPORTS, st.sampled_from([80, 100]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_report_can_be_rendered(data: dict[str, Any], width: int, verbose: bool) -> None:
    report = Report.from_json(data)
    for inspect in (False, True):
        text = printed(report, width, inspect=inspect, verbose=verbose)
        for line in text.splitlines():
            assert line == line.rstrip()
            assert all(char.isprintable() for char in line)
            longest = max(map(cell_len, line.split()), default=0)
            assert cell_len(line) <= width or longest > 20 or has_parity(data)


# ** markdown **


def test_markdown_text() -> None:
    report = full(
        norms=[NORMS[0], NORMS[1], NORMS[2]],
        sites=[*map(site, NORMS[:3])],
        parity={**PARITY, "outputs": PARITY["outputs"][-1:]},
    )
    assert render_markdown(report.to_json()) == MARKDOWN


def test_markdown_of_little() -> None:
    assert render_markdown(minimal().to_json()) == (
        "### onnxnorm optimize: `model`\n\n"
        "No pass was run; 0 normalizations found; outputs not checked (--no-parity); latency not "
        "measured (--no-latency).\n\n"
        "|  | original | optimized |\n| --- | --: | --: |\n| nodes | 0 | 0 |\n"
    )


def test_markdown_lists_have_an_end() -> None:
    text = render_markdown(minimal(norms=[norm(f"y{i}") for i in range(5000)]).to_json())
    assert "Normalizations (5000)" in text
    assert "and 4,900 more, in the JSON report" in text
    assert len(text) < 65_536


def test_markdown_fits_a_comment_with_long_names_too() -> None:
    long = "/model/decoder/" + "generator/block/" * 25
    rows = [norm(f"{long}{i}", action="refused", reason=f"no reason {i % 90}") for i in range(400)]
    text = render_markdown(minimal(norms=rows, sites=[*map(site, rows)]).to_json())
    assert 10_000 < len(text) <= 65_536
    assert "Normalizations (400)" in text
    assert "more, in the JSON report" in text
    assert text.count("<details>") == text.count("</details>")


def test_markdown_escapes_names_and_prose() -> None:
    rows = [norm("a|b`c", reason=None), norm("no <b>x</b>", action="refused", reason="@me *x* <i>")]
    rows.append(norm("c\\|d", into="x|y"))
    text = render_markdown(minimal(norms=rows, warnings=["see #12 | `y`"]).to_json())
    assert "| `` a\\|b`c `` | folded into Conv |" in text
    assert "| <code>c&#92;&#124;d</code> | folded into x\\|y |" in text
    assert "| `no <b>x</b>` | refused |" in text
    assert "- 1 x @<!-- -->me \\*x\\* &lt;i&gt;, at `no <b>x</b>`" in text
    assert "**Warning:** see #<!-- -->12 \\| \\`y\\`" in text


@given(REPORTS)
@settings(max_examples=80, deadline=None)
def test_markdown_tables_are_regular(data: dict[str, Any]) -> None:
    text = render_markdown(data)
    assert text.count("<details>") == text.count("</details>")
    width = None
    for line in text.splitlines():
        pipes = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert pipes is None or width is None or pipes == width
        width = pipes


# ** progress **


def bar(file: io.StringIO, **options: Any) -> Progress:
    page = Console(
        file=file, width=70, force_terminal=True, color_system=None, _environ={"TERM": "xterm"}
    )
    return Progress(console=page, **options)


def wait_for(progress: Progress) -> None:
    timer = progress._timer  # its end is the moment to look, and no clock tells it
    assert timer is not None
    timer.join()


def redraw(progress: Progress) -> None:
    assert progress._bar is not None
    progress._bar.refresh()


def test_progress_shows_what_is_done_and_leaves_no_trace() -> None:
    file = Terminal()
    with bar(file, delay=0) as progress:
        wait_for(progress)
        progress("parity: [float64] truth", 0.4)
        redraw(progress)
        assert "parity: [float64] truth" in file.getvalue()
        for share in (None, 0.0, 1.0, 7.0, -1.0):
            progress("latency", share)
            redraw(progress)
    assert not file.screen()
    assert file.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h"))


def test_progress_says_nothing_about_short_work() -> None:
    file = Terminal()
    with bar(file, delay=3600) as progress:
        progress("parity", 0.5)
        timer = progress._timer
    assert timer is not None
    timer.join()
    assert not file.getvalue()


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_silent_when_quiet_and_without_terminal(quiet: bool) -> None:
    file = Terminal() if quiet else io.StringIO()
    before = threading.active_count()
    with bar(file, delay=0, quiet=quiet) as progress:
        progress("parity", 0.5)
        assert threading.active_count() == before
    assert not file.getvalue()


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(delay=0) as progress:
        progress("parity", 0.5)
    assert capsys.readouterr() == ("", "")
    assert progress._console.stderr


def test_progress_ends_with_an_error_and_takes_late_calls() -> None:
    file = Terminal()
    progress = bar(file, delay=0)

    def fail() -> None:
        with progress:
            wait_for(progress)
            raise OnnxNormError("what", "hint")

    with pytest.raises(OnnxNormError, match="what"):
        fail()
    progress("too late", 0.5)
    assert not file.screen()
    assert "too late" not in file.getvalue()


def test_progress_takes_calls_from_many_threads() -> None:
    file = Terminal()
    with bar(file, delay=0) as progress:
        wait_for(progress)
        steps = [step / 50 for step in range(50)]
        workers = [
            threading.Thread(target=lambda: deque(map(progress, "x" * 50, steps), maxlen=0))
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not file.screen()


# ** what the fixed report looks like **


TERMINAL = {
    80: """\
1 of 7 batch normalizations folded into Conv and 6 refused, 1 change taken back
because the outputs disagreed; outputs agree with the original within the
derived tolerance (at worst 0.54 of the allowed error); no measurable
difference in latency on the CPU (0.993 times the original's latency, 95 %
interval 0.970 to 1.020).

Passes
  pass                      applied  refused  taken back
  fold-batchnorm-into-conv        1        6           0
  scale-wrongly                   0        0           1
  1 more pass found nothing to do

Refused
   5 x the convolution's result is used elsewhere, so it must keep the value
       that it has
       at /stages/0/bn (/stages/0/Add), /stages/1/bn (/stages/1/Add),
       /stages/2/bn (/stages/2/Add) and 2 more
       to change that: leave the convolution's result out of the graph's
       outputs
   1 x training_mode is set
       at /head/bn

Near misses, not recognised
   1 x the exponent is 4, not 2
       at /head/Mul (/head/Pow)

Taken back, because the outputs disagreed
  scale-wrongly:/x: 1.2e4 times the allowed error; its result differs

Normalizations
  kind        found  folded  kept as it was  refused  near miss
  batch_norm      7       1               0        6          0
  layer_norm      1       0               1        0          0
  rms_norm        0       0               0        0          1

Parity: passed (truth: the original in float64 under onnx.reference; 8 samples;
  took 12.3 s)
  output  opt.         error   original     cosine   argmax  budget
  logits  off   3.25 / 0.406  1 / 0.125  1.0000000    100 %    0.54
          on    3.25 / 0.406  1 / 0.125  1.0000000  99.99 %    0.54
  aux5    off      5 / 0.625  5 / 0.625  1.0000000    100 %    0.36
          on       5 / 0.625  5 / 0.625  1.0000000  99.99 %    0.36
  aux4    off        4 / 0.5    4 / 0.5  1.0000000    100 %    0.33
          on         4 / 0.5    4 / 0.5  1.0000000  99.99 %    0.33
  aux3    off      3 / 0.375  3 / 0.375  1.0000000    100 %    0.30
          on       3 / 0.375  3 / 0.375  1.0000000  99.99 %    0.30
  aux2    off       2 / 0.25   2 / 0.25  1.0000000    100 %    0.25
          on        2 / 0.25   2 / 0.25  1.0000000  99.99 %    0.25
  and 2 more outputs, none above 0.17 of budget
  opt.: whether onnxruntime's own optimizations were on. Errors are distances
  from the truth, maximum / RMS, in ulp of the output's scale. Budget: the
  share of the allowed error that is used, at most 1.
  float16 inputs were drawn in float32 and rounded.

Latency on the CPU (2 threads; 8 session pairs)
                 p50      p90
  original   41.2 ms  43.1 ms
  optimized  40.8 ms  42.9 ms
  no measurable difference: ratio 0.993, 95 % interval 0.970 to 1.020, A/A band
  0.968 to 1.031
  Ratio: optimized over original, run side by side; below 1 is faster. A/A
  band: what the original model differs from itself by.
  On CUDA: not measured (no NVIDIA driver).

Size
  nodes 1,175 -> 1,174 (1 fewer)
  file  97.8 MB -> 97.6 MB (200 kB smaller)

Warnings
  onnxruntime fuses the original wrongly; the unfused run is the baseline.

Notes
  2 initializers are also inputs and were left as they are.

Wrote out.onnx (model, 97.6 MB)
Wrote r.md (report)
""",
    120: """\
1 of 7 batch normalizations folded into Conv and 6 refused, 1 change taken back because the \
outputs disagreed; outputs
agree with the original within the derived tolerance (at worst 0.54 of the allowed error); no \
measurable difference in
latency on the CPU (0.993 times the original's latency, 95 % interval 0.970 to 1.020).

Passes
  pass                      applied  refused  taken back
  fold-batchnorm-into-conv        1        6           0
  scale-wrongly                   0        0           1
  1 more pass found nothing to do

Refused
   5 x the convolution's result is used elsewhere, so it must keep the value that it has
       at /stages/0/bn (/stages/0/Add), /stages/1/bn (/stages/1/Add), /stages/2/bn \
(/stages/2/Add) and 2 more
       to change that: leave the convolution's result out of the graph's outputs
   1 x training_mode is set
       at /head/bn

Near misses, not recognised
   1 x the exponent is 4, not 2
       at /head/Mul (/head/Pow)

Taken back, because the outputs disagreed
  scale-wrongly:/x: 1.2e4 times the allowed error; its result differs

Normalizations
  kind        found  folded  kept as it was  refused  near miss
  batch_norm      7       1               0        6          0
  layer_norm      1       0               1        0          0
  rms_norm        0       0               0        0          1

Parity: passed (truth: the original in float64 under onnx.reference; 8 samples; took 12.3 s)
  output  opt.         error   original     cosine   argmax  budget
  logits  off   3.25 / 0.406  1 / 0.125  1.0000000    100 %    0.54
          on    3.25 / 0.406  1 / 0.125  1.0000000  99.99 %    0.54
  aux5    off      5 / 0.625  5 / 0.625  1.0000000    100 %    0.36
          on       5 / 0.625  5 / 0.625  1.0000000  99.99 %    0.36
  aux4    off        4 / 0.5    4 / 0.5  1.0000000    100 %    0.33
          on         4 / 0.5    4 / 0.5  1.0000000  99.99 %    0.33
  aux3    off      3 / 0.375  3 / 0.375  1.0000000    100 %    0.30
          on       3 / 0.375  3 / 0.375  1.0000000  99.99 %    0.30
  aux2    off       2 / 0.25   2 / 0.25  1.0000000    100 %    0.25
          on        2 / 0.25   2 / 0.25  1.0000000  99.99 %    0.25
  and 2 more outputs, none above 0.17 of budget
  opt.: whether onnxruntime's own optimizations were on. Errors are distances from the truth, \
maximum / RMS, in ulp of
  the output's scale. Budget: the share of the allowed error that is used, at most 1.
  float16 inputs were drawn in float32 and rounded.

Latency on the CPU (2 threads; 8 session pairs)
                 p50      p90
  original   41.2 ms  43.1 ms
  optimized  40.8 ms  42.9 ms
  no measurable difference: ratio 0.993, 95 % interval 0.970 to 1.020, A/A band 0.968 to 1.031
  Ratio: optimized over original, run side by side; below 1 is faster. A/A band: what the original \
model differs from
  itself by.
  On CUDA: not measured (no NVIDIA driver).

Size
  nodes 1,175 -> 1,174 (1 fewer)
  file  97.8 MB -> 97.6 MB (200 kB smaller)

Warnings
  onnxruntime fuses the original wrongly; the unfused run is the baseline.

Notes
  2 initializers are also inputs and were left as they are.

Wrote out.onnx (model, 97.6 MB)
Wrote r.md (report)
""",
}
INSPECT = {
    False: """\
1 of 3 batch normalizations would be folded into Conv and 2 refused.

  kind        axes   epsilon  output value  would be
  batch_norm  0,2,3  1e-05    /stem/bn1     folded into Conv
  batch_norm  0,2,3  1e-05    /stages/0/bn  refused
      the convolution's result is used elsewhere, so it must keep the value
      that it has (at /stages/0/Add)
      to change that: leave the convolution's result out of the graph's outputs
  batch_norm  0,2,3  1e-05    /stages/1/bn  refused
      the convolution's result is used elsewhere, so it must keep the value
      that it has (at /stages/1/Add)
  layer_norm  2      1e-05    /head/ln      kept as it was
  rms_norm    2      1e-05    /head/Mul     near miss
      the exponent is 4, not 2 (at /head/Pow)

Passes
  pass                      would apply  refused
  fold-batchnorm-into-conv            1        6
  2 more passes found nothing to do
""",
    True: """\
1 of 3 batch normalizations would be folded into Conv and 2 refused.

  kind        axes   epsilon  output value  would be
  batch_norm  0,2,3  1e-05    /stem/bn1     folded into Conv
      input /stem/conv1
      output /stem/bn1
      1 node: /stem/bn1/BatchNormalization
      site fold-batchnorm-into-conv:/stem/bn1
  batch_norm  0,2,3  1e-05    /stages/0/bn  refused
      the convolution's result is used elsewhere, so it must keep the value
      that it has (at /stages/0/Add)
      to change that: leave the convolution's result out of the graph's outputs
      input /stages/0/conv
      output /stages/0/bn
      1 node: /stages/0/bn/BatchNormalization
      site fold-batchnorm-into-conv:/stages/0/bn
  batch_norm  0,2,3  1e-05    /stages/1/bn  refused
      the convolution's result is used elsewhere, so it must keep the value
      that it has (at /stages/1/Add)
      input /stages/1/conv
      output /stages/1/bn
      1 node: /stages/1/bn/BatchNormalization
      site fold-batchnorm-into-conv:/stages/1/bn
  layer_norm  2      1e-05    /head/ln      kept as it was
      input /head/ln
      output /head/ln
      1 node: /head/ln/BatchNormalization
      no site
  rms_norm    2      1e-05    /head/Mul     near miss
      the exponent is 4, not 2 (at /head/Pow)
      input /head/Mul
      output /head/Mul
      1 node: /head/Mul/BatchNormalization
      no site

Passes
  pass                      would apply  refused
  fold-batchnorm-into-conv            1        6
  scale-wrongly                       0        0
  rest                                0        0

Options
  target: onnx

Environment
  onnxruntime: 1.31.1
  cuda: no NVIDIA driver
  cores: 2
""",
}
NOTHING_DONE = """\
No pass was run; 0 normalizations found; outputs not checked (--no-parity);
latency not measured (--no-latency).

Passes
  none was run

Normalizations
  none was found

Parity
  not checked (--no-parity)

Latency
  not measured (--no-latency)

Size
  nodes 1, unchanged
"""
MARKDOWN = """\
### onnxnorm optimize: `resnet50.onnx`

1 of 3 batch normalizations folded into Conv and 2 refused; outputs agree with the original \
within the derived tolerance (at worst 0.54 of the allowed error); no measurable difference in \
latency on the CPU (0.993 times the original's latency, 95 % interval 0.970 to 1.020).

**Warning:** onnxruntime fuses the original wrongly; the unfused run is the baseline.

|  | original | optimized |
| --- | --: | --: |
| nodes | 1,175 | 1,174 |
| file size | 97.8 MB | 97.6 MB |
| error at `logits`, max / RMS, ulp of its scale | 1 / 0.125 | 3.25 / 0.406 |
| latency p50 on the CPU | 41.2 ms | 40.8 ms |
| latency p90 on the CPU | 43.1 ms | 42.9 ms |

<details><summary>Refused (2)</summary>

- 2 x the convolution's result is used elsewhere, so it must keep the value that it has, at \
`/stages/0/bn` (`/stages/0/Add`), `/stages/1/bn` (`/stages/1/Add`). To change that: leave the \
convolution's result out of the graph's outputs

</details>

<details><summary>Normalizations (3)</summary>

| kind | found | folded | refused |
| --- | --: | --: | --: |
| `batch_norm` | 3 | 1 | 2 |

| kind | axes | epsilon | output value | action |
| --- | --- | --- | --- | --- |
| `batch_norm` | 0,2,3 | 1e-05 | `/stem/bn1` | folded into Conv |
| `batch_norm` | 0,2,3 | 1e-05 | `/stages/0/bn` | refused |
| `batch_norm` | 0,2,3 | 1e-05 | `/stages/1/bn` | refused |

</details>

<details><summary>Passes (3)</summary>

| pass | applied | refused | time |
| --- | --: | --: | --: |
| `fold-batchnorm-into-conv` | 1 | 6 | 0.41 s |
| `scale-wrongly` | 0 | 0 | < 0.01 s |
| `rest` | 0 | 0 | < 0.01 s |

</details>

<details><summary>Parity passed, 1 output</summary>

truth: the original in float64 under onnx.reference; 8 samples; took 12.3 s.

| output | opt. | error | original | cosine | argmax | budget |
| --- | --- | --: | --: | --: | --: | --: |
| `logits` | off | 3.25 / 0.406 | 1 / 0.125 | 1.0000000 | 100 % | 0.54 |
| `logits` | on | 3.25 / 0.406 | 1 / 0.125 | 1.0000000 | 99.99 % | 0.54 |

opt.: whether onnxruntime's own optimizations were on. Errors are distances from the truth, \
maximum / RMS, in ulp of the output's scale. Budget: the share of the allowed error that is used, \
at most 1.

- float16 inputs were drawn in float32 and rounded.

</details>

<details><summary>Latency on the CPU</summary>

- no measurable difference: ratio 0.993, 95 % interval 0.970 to 1.020, A/A band 0.968 to 1.031
- Ratio: optimized over original, run side by side; below 1 is faster. A/A band: what the original \
model differs from itself by.
- 2 threads; 8 session pairs
- On CUDA: not measured (no NVIDIA driver).

</details>

<details><summary>Options and environment</summary>

|  |  |
| --- | --- |
| `target` | `onnx` |
| `onnxruntime` | `1.31.1` |
| `cuda` | `no NVIDIA driver` |
| `cores` | `2` |

</details>

- 2 initializers are also inputs and were left as they are.
"""
