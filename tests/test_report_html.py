"""The HTML report: every number and every mark is one of the JSON, whatever the JSON holds."""

from __future__ import annotations

import copy
import html.parser
import itertools
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from onnxnorm import latency
from onnxnorm.report import Report
from onnxnorm.report_analysis import MINUS
from onnxnorm.report_html import operator_parts, parity_rows, render_html, tiles, waterfall_steps
from onnxnorm.report_markdown import render_markdown
from onnxnorm.report_text import roles
from onnxnorm.trials import estimate, student_quantile
from tests import browser
from tests.test_report import (
    ELSEWHERE,
    LATENCY,
    PARITY,
    REPORTS,
    full,
    minimal,
    norm,
    output,
    printed,
    site,
)

# ** material **

ORIGINAL, CHANGED = "original", "candidate"
HOSTILE: Final = "<script>alert('x')</script>&\"</title>]]>-->"
IMAGE: Final = "<img src=x onerror=alert(1)>"
LONG: Final = "/model/encoder/" + "layer.0/attention/output/" * 12 + "LayerNorm/Add_output_0"


def timing(scale: float) -> dict[str, Any]:
    quantiles = [scale * (40 + i / 50 + (i > 95) * (i - 95) ** 2) for i in range(101)]
    return {
        "p50": quantiles[50],
        "p90": quantiles[90],
        "min": quantiles[0],
        "mean": statistics.fmean(quantiles),
        "samples": 480,
        "runs": 960,
        "quantiles": quantiles,
    }


def timed(scale: float) -> dict[str, Any]:
    """A latency result whose ratio and interval are those of its trials."""
    trials = [
        latency.Turns(
            bool(i % 2),
            *(
                tuple(at * (1 + (i * 7 % 5) / 400 + turn / 900) for turn in range(3))
                for at in levels
            ),
        )
        for i in range(8)
        for levels in [(40.0, 40.0 * (1 + (i - 4) / 900), 40.0 * scale * (1 + (i * 3 % 7) / 700))]
    ]
    found = estimate([each.trial for each in trials])
    return {
        **LATENCY,
        "verdict": found.verdict,
        "ratio": found.ratio,
        "interval": list(found.interval),
        "band": list(found.band),
        "original": timing(1.0),
        "candidate": timing(scale),
        "trials": [vars(each) for each in trials],
    }


def left_out(name: str, ratio: float, verdict: str) -> dict[str, Any]:
    return {
        "pass": name,
        "ratio": ratio,
        "interval": [ratio - 0.01, ratio + 0.012],
        "band": [0.99, 1.01],
        "verdict": verdict,
        "pairs": 8,
    }


def operator(name: str, nodes: int, milliseconds: float) -> dict[str, Any]:
    return {"operator": name, "nodes": nodes, "milliseconds": milliseconds}


PROFILE: Final = {
    "provider": "cpu",
    "threads": 2,
    "runs": 31,
    "original": [
        operator("MatMul", 48, 21.5),
        operator("LayerNormalization", 25, 6.25),
        *(operator(f"Kind{i}", i + 1, 3.0 - i / 4) for i in range(8)),
    ],
    "candidate": [
        operator("MatMul", 48, 21.25),
        operator("SimplifiedLayerNormalization", 25, 3.5),
        *(operator(f"Kind{i}", i + 1, 3.0 - i / 4) for i in range(8)),
    ],
    "seconds": 4.5,
    "notes": [],
}
ANALYSIS: Final[Mapping[str, Any]] = {
    "version": 1,
    "profile": PROFILE,
    "memory": {
        "provider": "cpu",
        "threads": 2,
        "original": {"start": 46_000_000, "loaded": 246_000_000, "peak": 310_500_000},
        "candidate": {"start": 46_000_000, "loaded": 241_000_000, "peak": 290_250_000},
        "seconds": 3.0,
        "notes": [],
    },
    "ablation": {
        "passes": [
            left_out("fold-batchnorm", 0.93, "faster"),
            left_out("stream-fold-mean", 0.985, "no measurable difference"),
            left_out("lower-norms", 1.03, "slower"),
        ],
        "skipped": [{"pass": "fold-affine", "reason": "onnxruntime cannot load it"}],
        "seconds": 25.0,
    },
    "sweep": None,
    "providers": [],
    "against": None,
    "skipped": {},
}


def point(batch: int, length: int) -> dict[str, Any]:
    scale = batch * length / 512
    measured = timed(0.9)
    for role in (ORIGINAL, CHANGED):
        measured[role] = {"p50": measured[role]["p50"] * scale, "p90": 50.0 * scale}
    measured.pop("trials")
    return {"sizes": {"batch": batch, "seq": length}, "latency": measured, "reason": None}


COMPARED: Final[Mapping[str, Any]] = {
    **ANALYSIS,
    "ablation": None,
    "sweep": {
        "axes": [
            {"names": ["batch"], "sizes": [1, 8, 32]},
            {"names": ["seq"], "sizes": [128, 512]},
        ],
        "points": [
            *(point(batch, length) for batch in (1, 8) for length in (128, 512)),
            point(32, 128),
            {"sizes": {"batch": 32, "seq": 512}, "latency": None, "reason": "out of memory"},
        ],
        "seconds": 60.0,
    },
    "providers": [
        {
            "provider": "cuda",
            "parity": PARITY,
            "parity_skipped": None,
            "latency": {**timed(0.8), "provider": "cuda"},
            "latency_skipped": None,
            "profile": {**PROFILE, "provider": "cuda", "notes": ["Launch times."]},
        }
    ],
    "against": {
        "report": "base.json",
        "ratio": 0.8,
        "interval": [0.79, 0.81],
        "band": [0.99, 1.01],
        "change": 1.125,
        "change_interval": [1.1, 1.15],
        "max_regression": 0.05,
        "verdict": "regressed",
        "notes": [],
    },
}
WHOLE: Final = full(latency=timed(0.9), analysis=ANALYSIS)


def swin() -> Report:
    """2,000 norms with hostile and very long names, most of them refused."""
    rows = [
        norm(
            f"{HOSTILE}{i}" if i % 3 else f"{LONG}{i}",
            action="folded" if i % 7 == 0 else "refused",
            reason=None if i % 7 == 0 else f"{ELSEWHERE} {HOSTILE}" if i % 2 else ELSEWHERE,
            at=LONG,
        )
        for i in range(2000)
    ]
    name = f"{HOSTILE}\x1b[31m\u202e層/归一{LONG}"
    parity = {
        **PARITY,
        "outputs": [output(name, 3, 2), *(output(LONG + str(i), 5, 9) for i in range(40))],
    }
    passes = [{"name": LONG, "applied": 286, "refused": 1714, "seconds": 1.0}]
    analysis = copy.deepcopy(dict(ANALYSIS))
    for role in (ORIGINAL, CHANGED):
        analysis["profile"][role][0]["operator"] = name
    analysis["ablation"]["passes"][0]["pass"] = name
    return full(
        norms=rows,
        sites=[site(row) for row in rows],
        passes=passes,
        parity=parity,
        latency=timed(1.2),
        analysis=analysis,
        warnings=[name],
        notes=[name],
        model={**WHOLE.model, "input": f"{IMAGE}{'long_' * 40}.onnx", "producer": HOSTILE},
        environment={HOSTILE: name},
    )


def failed() -> Report:
    worst = output("logits", 900, 2, passed=False, reason="the error is too large")
    return full(
        parity={**PARITY, "passed": False, "outputs": [worst, output("z", 0, 0)]},
        latency=None,
        latency_skipped="the outputs do not agree",
        model={**WHOLE.model, "output": None, "bytes_after": None},
        nodes={"before": 9, "after": None},
    )


CASES: Final[Mapping[str, Report]] = {
    "whole": WHOLE,
    "compare": full(
        command="compare", norms=[], sites=[], passes=[], latency=timed(0.9), analysis=COMPARED
    ),
    "swin": swin(),
    "failed": failed(),
    "minimal": minimal(),
    "inspect": minimal(command="inspect", norms=[norm("y")]),
    "no norms": full(norms=[], sites=[], parity=None, parity_skipped="--no-parity was given"),
}


class Document(html.parser.HTMLParser):
    """The tables of a page by their captions, and whether its tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.tables: dict[str, list[list[str]]] = {}
        self._caption = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.links += [given[key] or "" for key in ("href", "src", "xlink:href") if key in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag not in {"meta"}:
            self.open.append(tag)
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag in {"th", "td"}:
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "caption":
            while self._caption in self.tables:
                self._caption += "'"
            self.tables[self._caption] = []

    def handle_data(self, data: str) -> None:
        self.text += data
        if "caption" in self.open:
            self._caption += data
        elif {"th", "td"} & {*self.open}:
            self.tables[self._caption][-1][-1] += data


# ** any report **


@given(REPORTS)
@settings(max_examples=10, deadline=None)
def test_every_report_has_a_page(data: dict[str, Any]) -> None:
    page = Document(render_html(Report.from_json(data).to_json()))
    assert page.text


@pytest.mark.parametrize("name", CASES)
def test_a_page_needs_nothing_but_itself_and_runs_nothing(name: str) -> None:
    text = render_html(CASES[name].to_json())
    page = Document(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"\w+://[\w./]+", re.sub("&[^;]*;", "", text))) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "url(http" not in text
    assert "@import" not in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_the_first_screen_says_what_was_done_whether_outputs_agree_and_what_it_gained() -> None:
    text = Document(render_html(WHOLE.to_json())).text
    head = text[: text.index("What was found and done")]
    assert "1 of 7" in head
    assert "agree" in head
    assert f"{WHOLE.latency['ratio']:.3f}" in head  # type: ignore[index]
    assert "faster on the CPU" in head
    unknown = Document(render_html(minimal().to_json())).text
    assert "not checked" in unknown
    assert "not measured" in unknown
    assert "disagree" in Document(render_html(failed().to_json())).text
    nothing = Document(render_html(full().to_json())).text
    assert "no difference" in nothing, "a ratio inside the noise is not written large"


def test_the_first_screen_shows_what_fails_on_a_further_provider() -> None:
    elsewhere = {**COMPARED["providers"][0], "parity": failed().parity}
    both = full(command="compare", analysis={**COMPARED, "providers": [elsewhere]})
    (outputs,) = (tile for tile in tiles(both.to_json()) if tile.label == "Outputs")
    assert (outputs.value, outputs.note, outputs.state) == (
        "✗ disagree",
        "1 of 2 outputs on CUDA",
        "bad",
    )


def test_a_latency_in_large_type_says_what_it_is_of() -> None:
    for command, whose in (("optimize", "the original's"), ("compare", "the first's")):
        report = full(command=command, latency=timed(0.9)).to_json()
        (latency,) = (tile for tile in tiles(report) if tile.label == "Latency")
        assert latency.note.startswith(f"of {whose} latency: faster on the CPU; 95 % interval ")
        page = Document(render_html(report)).text
        assert f"{' / '.join(reversed(roles(report)))}, below 1 is faster" in page
        assert f"The truth is the {roles(report)[0]} model computed in" in page


def test_a_unit_stays_on_the_line_of_its_number() -> None:
    (size,) = (tile for tile in tiles(WHOLE.to_json()) if tile.label == "File size")
    assert size.value == "97.8\N{NO-BREAK SPACE}MB → 97.6\N{NO-BREAK SPACE}MB"


def test_two_models_of_one_name_are_told_apart() -> None:
    model = {**WHOLE.model, "input": "old/model.onnx", "output": "new/model.onnx"}
    for text in (
        render_html(full(command="compare", model=model).to_json()),
        render_markdown(full(command="compare", model=model).to_json()),
    ):
        assert "old/model.onnx" in text
        assert "new/model.onnx" in text
    page = Document(render_html(full(command="compare").to_json()))
    assert page.tables["Models"] == [["first", "models/resnet50.onnx"], ["second", "out.onnx"]]


def test_a_report_that_measured_nothing_does_not_say_how() -> None:
    text = render_html(minimal(command="inspect", norms=[norm("y")]).to_json())
    assert "How it was measured" not in text
    assert "Options and environment" in text


def test_what_was_not_measured_says_why() -> None:
    analysis = {**ANALYSIS, "memory": None, "profile": None, "ablation": None}
    analysis["skipped"] = {"memory": "no /proc here", "ablation": "it was not asked for"}
    text = Document(render_html(full(analysis=analysis).to_json())).text
    assert "Not measured: no /proc here." in text
    assert "Not measured: it was not asked for." in text
    assert "Where the time goes" not in text


# ** the tables are the JSON **


def number(cell: str) -> float:
    found = re.match(rf"[+{MINUS}-]?[\d.,]+(?:e-?\d+)?", cell)
    assert found is not None, cell
    return float(found[0].replace(",", "").replace(MINUS, "-"))


def near(cell: str, value: float) -> bool:
    """Whether a cell shows a value, to the digits that it has."""
    return math.isclose(number(cell), value, rel_tol=6e-3, abs_tol=6e-4)


def test_every_number_of_the_tables_is_one_of_the_json() -> None:
    data = WHOLE.to_json()
    tables = Document(render_html(data)).tables
    measured, analysis = data["latency"], data["analysis"]
    _, *rows = tables["Time of one run"]
    for cells, role in zip(rows, (ORIGINAL, CHANGED), strict=True):
        for cell, key in zip(cells[1:], ("p50", "p90", "min", "mean"), strict=True):
            assert near(cell, measured[role][key])
    _, *rows = tables["Session pairs: a typical turn of each session"]
    for cells, trial in zip(rows, measured["trials"], strict=True):
        logs = [
            statistics.median(
                math.log(c / a) for c, a in zip(trial[CHANGED], trial[own], strict=True)
            )
            for own in ("first", "second")
        ]
        assert near(cells[5], math.exp(statistics.fmean(logs)))
        for cell, key in zip(cells[2:5], ("first", "second", CHANGED), strict=True):
            assert near(cell, statistics.median(trial[key]))
    _, *rows, last = tables["Time by operator"]
    profile = {
        role: {row["operator"]: row for row in analysis["profile"][role]}
        for role in (ORIGINAL, CHANGED)
    }
    assert {cells[0] for cells in rows} == {*profile[ORIGINAL], *profile[CHANGED]}
    for name, *cells in rows:
        sides = [profile[role].get(name) for role in (ORIGINAL, CHANGED)]
        for cell, side in zip(cells[:2], sides, strict=True):
            assert (cell == "-") if side is None else near(cell, side["nodes"])
        times = [0.0 if side is None else side["milliseconds"] for side in sides]
        for cell, side, time in zip(cells[2:4], sides, times, strict=True):
            assert (cell == "-") if side is None else near(cell, time)
        assert near(cells[4], times[1] - times[0])
    for cell, role in zip(last[3:5], (ORIGINAL, CHANGED), strict=True):
        assert near(cell, sum(row["milliseconds"] for row in profile[role].values()))
    _, *rows = tables["Ratio of latencies with and without each pass"]
    for cells, row in zip(rows, analysis["ablation"]["passes"], strict=True):
        assert cells[0] == row["pass"]
        assert near(cells[1], row["ratio"])
        assert near(cells[2], row["interval"][0])
    _, nodes, size, peak, loaded, process = tables["Both models"]
    assert [number(cell) for cell in nodes[1:3]] == [*data["nodes"].values()]
    assert near(size[1], data["model"]["bytes_before"] / 1e6)
    for column, role in ((1, ORIGINAL), (2, CHANGED)):
        memory = analysis["memory"][role]
        assert near(peak[column], (memory["peak"] - memory["start"]) / 1e6)
        assert near(loaded[column], (memory["loaded"] - memory["start"]) / 1e6)
        assert near(process[column], memory["peak"] / 1e6)
    assert len(tables["Every normalization"]) == 1 + len(data["norms"])
    assert len(tables["Parity of each output"]) == 1 + sum(
        1 + (each["optimized"] is not None) for each in data["parity"]["outputs"]
    )


def test_the_ratio_can_be_computed_again_from_what_the_report_keeps() -> None:
    data = WHOLE.to_json()["latency"]
    found = estimate([latency.Turns.from_json(each).trial for each in data["trials"]])
    assert found.ratio == pytest.approx(data["ratio"])
    assert found.interval == pytest.approx(tuple(data["interval"]))
    assert found.band == pytest.approx(tuple(data["band"]))
    assert found.verdict == data["verdict"]


def test_the_guide_defines_ratio_interval_and_band_as_they_are() -> None:
    """docs/report.md, section Latency, word for word."""
    data = WHOLE.to_json()["latency"]

    def logs(role: str) -> list[list[float]]:
        return [[math.log(turn) for turn in trial[role]] for trial in data["trials"]]

    def between(one: str, other: str) -> list[float]:
        return [
            statistics.median(x - y for x, y in zip(*pair, strict=True))
            for pair in zip(logs(one), logs(other), strict=True)
        ]

    d, d2, e = (
        between(*pair)
        for pair in (("candidate", "first"), ("candidate", "second"), ("first", "second"))
    )
    n = len(d)
    ordered = sorted(d + d2)
    fifth = 2 * n // 5
    kept = ordered[fifth : 2 * n - fifth]
    k = len(kept) / (2 * n)
    assert data["ratio"] == pytest.approx(math.exp(statistics.fmean(kept)))
    means = [
        statistics.fmean(min(max(x, kept[0]), kept[-1]) for x in pair)
        for pair in zip(d, d2, strict=True)
    ]
    degrees = math.floor(k * n)
    half = student_quantile(degrees - 1) * statistics.stdev(means) / (k * math.sqrt(n))
    ends = [data["ratio"] * math.exp(-half), data["ratio"] * math.exp(half)]
    assert data["interval"] == pytest.approx(ends)
    sizes = sorted(map(abs, e))
    squares = statistics.fmean(min(x, sizes[degrees - 1]) ** 2 for x in sizes)
    half = student_quantile(degrees) * math.sqrt(0.75 * squares) / (k * math.sqrt(n))
    assert data["band"] == pytest.approx([math.exp(-half), math.exp(half)])


# ** the marks of the plots are the JSON, too: from their place on the axes **


class Drawing:
    """One SVG of a page: its marks by id, and the axes that tell what a place means."""

    def __init__(self, page: str, name: str) -> None:
        found = re.search(rf'<svg(?:(?!</svg>).)*id="{name}-title".*?</svg>', page, re.DOTALL)
        assert found is not None, name
        text = found[0][found[0].rindex("<svg") :]
        self.name = name
        self.root = ElementTree.fromstring(text)
        self.marks = {each.attrib["id"]: each for each in self.root.iter() if "id" in each.attrib}

    def places(self, mark: str) -> list[tuple[float, float]]:
        """The points of a mark, or where its symbols are."""
        element = self.marks[f"{self.name}-{mark}"]
        used = [e for e in element.iter() if e.tag.endswith("}use")]
        if used:
            return [(float(e.attrib["x"]), float(e.attrib["y"])) for e in used]
        path = next(e for e in element.iter() if e.tag.endswith("}path"))
        numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", path.attrib["d"])]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def ticks(self, axis: str) -> list[tuple[float, float]]:
        """Place and value of each labelled tick, from the picture alone."""
        found = []
        for key, element in self.marks.items():
            if re.fullmatch(rf"{self.name}-{axis}tick_\d+", key):
                used = next(e for e in element.iter() if e.tag.endswith(("}use", "}path")))
                place = (
                    used.attrib.get(axis) or re.findall(r"[\d.]+", used.attrib["d"])[axis == "y"]
                )
                text = next((e.text for e in element.iter() if e.tag.endswith("}text")), None)
                if text:
                    found.append((float(place), number(text)))
        return found

    def values(self, mark: str, axis: str = "x") -> list[float]:
        """What the points of a mark mean on a linear axis."""
        (p0, v0), *_, (p1, v1) = self.ticks(axis)
        index = 0 if axis == "x" else 1
        return [v0 + (place[index] - p0) / (p1 - p0) * (v1 - v0) for place in self.places(mark)]


def test_the_plot_of_the_ratio() -> None:
    data = WHOLE.to_json()["latency"]
    drawing = Drawing(render_html(WHOLE.to_json()), "latency-ratio")
    assert drawing.values("ratio") == pytest.approx([data["ratio"]], abs=2e-4)
    assert sorted({round(x, 6) for x in drawing.values("interval")}) == pytest.approx(
        sorted(data["interval"]), abs=2e-4
    )
    band = drawing.values("band")
    assert (min(band), max(band)) == pytest.approx(tuple(data["band"]), abs=2e-4)
    for fresh, mark in ((False, "pairs-here"), (True, "pairs-fresh")):
        trials = [latency.Turns.from_json(each) for each in data["trials"]]
        ratios = [each.ratio for each in trials if each.fresh is fresh]
        assert drawing.values(mark) == pytest.approx(ratios, abs=2e-4)


def test_the_plot_of_the_times() -> None:
    data = WHOLE.to_json()["latency"]
    drawing = Drawing(render_html(WHOLE.to_json()), "latency-times")
    for role, mark in ((ORIGINAL, "times-original"), (CHANGED, "times-changed")):
        places = list(zip(drawing.values(mark), drawing.values(mark, "y"), strict=True))
        quantiles = data[role]["quantiles"]
        # Matplotlib leaves out points on a straight line: each that is there must be a quantile.
        for at, share in places:
            if 0.5 < share < 95:
                assert at == pytest.approx(quantiles[round(share)], rel=2e-3)
        assert len(places) > 3


def test_the_bars_of_the_operators() -> None:
    profile = WHOLE.to_json()["analysis"]["profile"]
    drawing = Drawing(render_html(WHOLE.to_json()), "profile")
    parts = operator_parts(profile)
    assert len(parts) == 8
    for side, role in enumerate((ORIGINAL, CHANGED)):
        times = {row["operator"]: row["milliseconds"] for row in profile[role]}
        left = 0.0
        for part in parts:
            bar = drawing.values(f"part-{side}-{part.kind}")
            wanted = times.pop(part.name, 0.0) if part.name != "all others" else sum(times.values())
            assert min(bar) == pytest.approx(left, abs=0.05)
            assert max(bar) - min(bar) == pytest.approx(wanted, abs=0.05)
            left += wanted
        assert left == pytest.approx(sum(row["milliseconds"] for row in profile[role]))


def test_the_waterfall_ends_at_the_ratio() -> None:
    data = WHOLE.to_json()
    rows, whole = data["analysis"]["ablation"]["passes"], data["latency"]["ratio"]
    drawing = Drawing(render_html(data), "ablation")
    at = 100.0
    for index, row in enumerate(rows, 1):
        without = whole / row["ratio"]
        bar = sorted({round(x, 3) for x in drawing.values(f"step-{index}")})
        ends = sorted((at, at - 100 * (without - whole)))
        assert [bar[0], bar[-1]] == pytest.approx(ends, abs=0.05)
        whiskers = drawing.values(f"interval-{index}")
        wanted = sorted(at - 100 * (whole / r - whole) for r in row["interval"])
        assert [min(whiskers), max(whiskers)] == pytest.approx(wanted, abs=0.05)
        at -= 100 * (without - whole)
    assert drawing.values("last")[0] == pytest.approx(100 * whole, abs=0.05)
    steps = waterfall_steps(whole, rows)
    assert steps[-1].end == pytest.approx(100 * whole)
    assert all(a.end == b.start for a, b in itertools.pairwise(steps))
    assert [step.state for step in steps] == ["good", "original", "bad", "original"]


def test_the_plot_of_parity_has_its_marks_in_order() -> None:
    """The axis is symmetric-logarithmic: ticks are exact, and between them order is kept."""
    data = WHOLE.to_json()
    drawing = Drawing(render_html(data), "parity")
    rows = parity_rows(data["parity"])
    assert rows
    by_name = {each["name"]: each for each in data["parity"]["outputs"]}
    marks = []
    for index, row in enumerate(rows[:16]):
        each = by_name[row.name.rpartition(" ")[0]]
        measures = each if row.name.endswith("off") else each["optimized"]
        assert row.error == pytest.approx(measures["error_ulp"])
        assert row.noise == pytest.approx(measures["baseline_error_ulp"])
        assert row.budget == pytest.approx(measures["budget"] * 2**20)
        marks.append((row.error, drawing.places(f"error-{index}")[0][0]))
        marks.append((row.noise, drawing.places(f"noise-{index}")[0][0]))
        marks.append((row.budget, max(x for x, _ in drawing.places(f"budget-{index}"))))
    marks += [(value, place) for place, value in drawing.ticks("x")]
    for (a, at), (b, bt) in zip(sorted(marks), sorted(marks)[1:], strict=False):
        assert at == pytest.approx(bt, abs=0.01) if math.isclose(a, b) else at < bt + 1e-6


def test_the_curves_of_a_sweep() -> None:
    data = CASES["compare"].to_json()
    drawing = Drawing(render_html(data), "sweep")
    (x0, v0), *_, (x1, v1) = drawing.ticks("x")
    measured = [p for p in data["analysis"]["sweep"]["points"] if p["latency"] is not None]
    # Against the batch, which has more sizes; a curve for each length.
    for index, length in enumerate((128, 512)):
        points = [p for p in measured if p["sizes"]["seq"] == length]
        for key, role in (("original", ORIGINAL), ("changed", CHANGED)):
            places = drawing.places(f"curve-{index}-{key}")
            sizes = [v0 * (v1 / v0) ** ((x - x0) / (x1 - x0)) for x, _ in places]
            assert sizes == pytest.approx([p["sizes"]["batch"] for p in points], rel=0.01)
            times = [p["latency"][role]["p50"] for p in points]
            heights = [math.log(times[0] / each) for each in times]
            drops = [y - places[0][1] for _, y in places]
            assert drops[-1] / drops[1] == pytest.approx(heights[-1] / heights[1], rel=0.01)


def test_one_point_is_no_curve() -> None:
    sweep = {"axes": [{"names": ["batch"], "sizes": [1]}], "points": [point(1, 128)], "seconds": 1}
    page = render_html(full(command="compare", analysis={**COMPARED, "sweep": sweep}).to_json())
    assert "Latency at each size" in page
    assert "sweep-curve" not in page
    assert 'id="sweep-title"' not in page


def test_a_curve_has_two_round_numbers_at_least() -> None:
    page = render_html(full(command="compare", analysis=COMPARED).to_json())
    plot = page[page.index('id="sweep-title"') :]
    assert all(f">{tick}<" in plot for tick in (10, 20, 50, 100, 200))


def test_a_failed_mark_is_explained() -> None:
    assert "the optimized model, where it failed" in render_html(failed().to_json())
    assert "where it failed" not in render_html(WHOLE.to_json())


def test_the_terminal_has_what_was_measured_too() -> None:
    brief, verbose = (printed(WHOLE, 120, verbose=verbose) for verbose in (False, True))
    assert "\nWhat each pass bought\n" in brief
    assert re.search(r"\n  fold-batchnorm +0\.930 +0\.920 to 0\.942  faster\n", brief)
    assert "\n  fold-affine: not measured (onnxruntime cannot load it)\n" in brief
    assert "Time by operator" not in brief
    assert re.search(r"\n  MatMul +21\.5 ms +21\.2 ms +", verbose)
    assert re.search(r"\n  memory of the session, at its peak +264 MB +244 MB\n", verbose)


def test_names_in_plots_are_shortened_and_never_mathematics() -> None:
    report = full(
        parity={**PARITY, "outputs": [output("$x^2$ <b>", 1, 2), output("層" * 60, 1, 2)]}
    )
    page = render_html(report.to_json())
    assert "$x^2$ &lt;b&gt; off" in page
    assert "…" in page


def test_the_markdown_has_what_was_measured_too() -> None:
    text = render_markdown(WHOLE.to_json())
    assert "SimplifiedLayerNormalization" in text
    assert "memory of the session" in text
    assert "stream-fold-mean" in text
    assert len(text) < 65_536
    compared = render_markdown(CASES["compare"].to_json())
    assert "Less is gained than before" in compared
    assert "batch = 8, seq = 512" in compared
    assert "out of memory" in compared
    assert len(render_markdown(CASES["swin"].to_json())) < 300_000


# ** in a browser **

WIDTHS: Final = (360, 768, 1280)
_BROWSER: Final = browser.executable()
in_a_browser = pytest.mark.skipif(_BROWSER is None, reason="no Chromium here")

# What lies over something else, sticks out, or is cut off; all but what scrolls by itself.
_FAULTS: Final = """(() => {
  const faults = [], width = document.documentElement.clientWidth;
  const shown = e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
  if (document.documentElement.scrollWidth > width) faults.push('the page scrolls sideways');
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg') && e.tagName !== 'svg' || !shown(e) || e.closest('.scroll') && !e.matches('.scroll')) continue;
    const b = e.getBoundingClientRect();
    if (b.right > width + 1 || b.left < -1) faults.push(`${e.tagName}.${e.className} sticks out: ${b.left} ${b.right}`);
  }
  const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')].filter(shown);
    texts.forEach((e, i) => {
      const b = e.getBoundingClientRect();
      if (b.left < frame.left - 2 || b.right > frame.right + 2 || b.bottom > frame.bottom + 2 || b.top < frame.top - 2)
        faults.push(`'${e.textContent}' leaves its figure`);
      for (const other of texts.slice(i + 1))
        if (over(b, other.getBoundingClientRect())) faults.push(`'${e.textContent}' over '${other.textContent}'`);
    });
  }
  for (const group of ['.blocks', '.tiles', 'main', 'header', 'body', 'nav', '.marks'])
    for (const parent of document.querySelectorAll(group)) {
      const boxes = [...parent.children].filter(shown).map(e => [e, e.getBoundingClientRect()]);
      boxes.forEach(([e, b], i) => { for (const [f, c] of boxes.slice(i + 1))
        if (over(b, c)) faults.push(`${e.tagName} ${e.className} over ${f.tagName} ${f.className}`); });
    }
  return faults;
})()"""

# The contrast of every text with what is behind it, WCAG 2.2: 4.5 at least, 3 for large text and
# for the marks of figures (https://www.w3.org/TR/WCAG22/#contrast-minimum).
_CONTRAST: Final = """(() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parse = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const under = e => {  // the bar that a figure's text stands on
    const b = e.getBoundingClientRect(), x = (b.left + b.right) / 2, y = (b.top + b.bottom) / 2;
    for (const p of [...e.closest('svg').querySelectorAll('path')].reverse()) {
      const f = getComputedStyle(p).fill, c = p.getBoundingClientRect();
      if (f !== 'none' && c.left <= x && x <= c.right && c.top <= y && y <= c.bottom && c.width > 12 && !p.closest('defs'))
        return parse(f);
    }
    return null; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, s = getComputedStyle(e);
    if (!walker.currentNode.textContent.trim() || ['TITLE', 'DESC', 'STYLE', 'title', 'desc'].includes(e.tagName)) continue;
    const svg = e.closest('svg'), back = svg && under(e) || behind(e);
    const large = parseFloat(s.fontSize) >= 24 || parseFloat(s.fontSize) >= 18.66 && s.fontWeight >= 700;
    const value = ratio(parse(svg ? s.fill : s.color), back);
    if (value < (large ? 3 : 4.5)) found.push(`${e.textContent.slice(0, 40)}: ${value.toFixed(2)}`);
  }
  const paper = behind(document.body), root = getComputedStyle(document.documentElement);
  for (const name of ['original', 'changed', 'good', 'bad', 'kind0', 'kind1', 'kind2', 'kind3', 'kind4', 'kind5', 'kind6', 'kind7']) {
    const probe = document.createElement('i'); probe.style.color = `var(--${name})`; document.body.append(probe);
    const value = ratio(parse(getComputedStyle(probe).color), paper); probe.remove();
    if (value < 3) found.push(`--${name}: ${value.toFixed(2)}`);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    assert _BROWSER is not None
    with browser.opened(_BROWSER) as opened:
        yield opened


@pytest.mark.browser
@in_a_browser
@pytest.mark.parametrize("name", CASES)
def test_a_page_in_a_browser(page: browser.Page, tmp_path: Path, name: str) -> None:
    file = tmp_path / "r.html"
    CASES[name].write(file)
    for width in WIDTHS:
        for dark in (False, True):
            page.show(file, width=width, dark=dark)
            assert page.complaints == []
            assert page.requests == [file.as_uri()]
            page.ask(
                "document.querySelectorAll('details').forEach(e => e.open = e.querySelectorAll('tr').length < 200)"
            )
            assert page.ask(_FAULTS) == []
            if width == WIDTHS[-1]:
                assert page.ask(_CONTRAST) == []
                ground = page.ask("getComputedStyle(document.body).backgroundColor")
                assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert page.ask("document.scripts.length") == 0


@pytest.mark.browser
@in_a_browser
def test_a_page_on_paper_is_dark_on_white_and_folds_nothing_away(
    page: browser.Page, tmp_path: Path
) -> None:
    WHOLE.write(tmp_path / "r.html")
    page.show(tmp_path / "r.html", width=1280, dark=True, paper=True)
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    heights = (
        "[...document.querySelectorAll('details > ul, details > .scroll')].map(e => e.offsetHeight)"
    )
    assert all(height > 0 for height in page.ask(heights))
    assert page.paper().startswith(b"%PDF-")


@pytest.mark.browser
@in_a_browser
@pytest.mark.parametrize(
    ("check", "rule"),
    [
        ("contrast", ":root { --muted: #b0b0b0 !important }"),
        ("contrast", ":root { --kind0: #fafafa !important }"),
        ("faults", ".scroll { overflow: visible !important; width: 700px; max-width: none }"),
        ("faults", "h2 { margin-top: -5rem }"),
        ("faults", "svg text { font-size: 30px !important }"),
    ],
)
def test_the_checks_of_a_page_find_what_is_wrong(
    page: browser.Page, tmp_path: Path, check: str, rule: str
) -> None:
    text = render_html(WHOLE.to_json()).replace("</style>", f"{rule}</style>", 1)
    (tmp_path / "r.html").write_text(text, "utf-8")
    page.show(tmp_path / "r.html", width=360)
    assert page.ask({"contrast": _CONTRAST, "faults": _FAULTS}[check])


@pytest.mark.browser
@in_a_browser
def test_names_in_a_report_run_nothing(page: browser.Page, tmp_path: Path) -> None:
    CASES["swin"].write(tmp_path / "r.html")
    page.show(tmp_path / "r.html", width=768)
    assert page.ask("document.querySelector('h1').textContent").startswith(IMAGE)
    assert page.ask("document.querySelectorAll('details tr').length") > 2000
    assert page.ask("document.title").startswith(IMAGE)
