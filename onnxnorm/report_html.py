"""Reports as one HTML page: no network, no JavaScript, light and dark, on paper and on a telephone.

The page is a list of sections, each a list of blocks (a table, a plot, a list, something folded);
`templates/report.html` says how a block looks, and this module what is in it. Every figure and
every number comes from the JSON object, through the words of `report_text`.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jinja2
from markupsafe import Markup

from onnxnorm import figures
from onnxnorm.latency import Turns
from onnxnorm.report_analysis import (
    MINUS,
    NONE,
    ablation_rows,
    memory_rows,
    operator_rows,
    operators,
    point_name,
    sweep_rows,
    told_against,
)
from onnxnorm.report_text import (
    CHANGING,
    LEGEND,
    NORM_TITLES,
    PARITY_TITLES,
    REASONS,
    Json,
    budget_used,
    counted,
    files_written,
    is_planned,
    is_undecided,
    judgements,
    latency_facts,
    latency_line,
    model_names,
    norm_cells,
    norm_counts,
    not_measured,
    parity_cells,
    parity_facts,
    pass_rows,
    places_by_pass,
    plain,
    provider_name,
    roles,
    sites_taken_back,
    spell_bytes,
    spell_interval,
    spell_milliseconds,
    spell_number,
    spell_ratio,
    spell_share,
    spell_value,
    told_of_stream,
    verdict,
    warnings_of,
    worst_first,
)

_PLACES: Final = 6  # of one reason, before "and so many more"; the table of all norms has each
_OPEN: Final = 20  # rows of the parity table, before it is folded
_ROWS: Final = 5000  # of one table
_PLOTTED: Final = 16  # rows of the parity plot; the table has all
_CURVES: Final = 6  # of the sweep's plot
_TIMES: Final = "\N{MULTIPLICATION SIGN}"
_LEAST, _MOST = 1e-12, 1e12  # what lies outside is in the tables


@dataclass(frozen=True)
class Table:
    """A table; `right` is the first column of numbers, `kinds` the colours that rows have."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: int = 99
    kinds: Sequence[int | None] = ()
    what: str = "table"

    @property
    def more(self) -> int:
        """How many rows are left to the JSON report."""
        return max(len(self.rows) - _ROWS, 0)

    @property
    def shown(self) -> Sequence[tuple[Sequence[str], int | None]]:
        """The rows that the page has, each with its colour."""
        kinds = itertools.chain(self.kinds, itertools.repeat(None))
        return list(zip(self.rows[:_ROWS], kinds, strict=False))


@dataclass(frozen=True)
class Plot:
    """A figure, what it shows, and what its marks mean, as (class, text)."""

    svg: Markup
    caption: str
    marks: Sequence[tuple[str, str]] = ()
    what: str = "plot"


@dataclass(frozen=True)
class Listing:
    """A list; each item has a text, and lines under it."""

    items: Sequence[tuple[str, Sequence[str]]]
    what: str = "listing"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    loud: bool = False
    what: str = "words"


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    title: str
    blocks: Sequence[Any]
    opened: bool = False
    what: str = "fold"


@dataclass(frozen=True)
class Section:
    """A part of the page: an id, a title, and blocks."""

    key: str
    title: str
    blocks: Sequence[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """One fact of the first screen; `state` is good, bad or plain."""

    label: str
    value: str
    note: str
    state: str = "plain"


def render_html(report: Json) -> str:
    """Return a report as a page that is complete in itself.

    Args:
        report: The object that `Report.to_json` returns.
    """
    name = " and ".join(map(plain, model_names(report)))
    page = _environment().get_template("report.html")
    return page.render(
        title=f"{name}: onnxnorm {report['command']}",
        name=name,
        about=_about(report),
        verdict=verdict(report),
        tiles=tiles(report),
        alarms=_alarms(report),
        sections=[section for section in sections(report) if section.blocks],
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("onnxnorm", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _about(report: Json) -> str:
    model = report["model"]
    parts = [f"onnxnorm {report['version']} {report['command']}"]
    if model["producer"]:
        parts.append(f"made by {plain(model['producer'])}")
    parts += [f"opset {model['opset']['ai.onnx']}"] if "ai.onnx" in model["opset"] else []
    return " · ".join(parts)


# ** the first screen **


def tiles(report: Json) -> list[Tile]:
    """Return the facts of the first screen: what was done, do outputs agree, what was gained."""
    found = []
    if report["command"] != "compare":
        found.append(_done(report))
    if report["command"] != "inspect":
        found += [_outputs(report), _gain(report)]
    nodes, model = report["nodes"], report["model"]
    found.append(Tile("Nodes", *_before_after(nodes["before"], nodes["after"], "{:,}".format)))
    if model["bytes_before"] is not None:
        sizes = _before_after(model["bytes_before"], model["bytes_after"], _unbroken)
        found.append(Tile("File size", *sizes))
    return found


def _done(report: Json) -> Tile:
    rows = [row for row in report["norms"] if row["recognised"]]
    changed = sum(row["action"] in CHANGING for row in rows)
    would = "would be changed" if is_planned(report) else "changed"
    refused = sum(row["action"] == "refused" for row in rows)
    back = sum(site["action"] == "rolled_back" for site in report["sites"])
    notes = [f"{refused:,} refused"] if refused else []
    notes += [f"{counted(back, 'change')} taken back"] if back else []
    near = len(report["norms"]) - len(rows)
    notes += [counted(near, "near miss")] if near else []
    places = sum(places_by_pass(report).values())
    if places and not changed:
        notes.append(f"{counted(places, 'other place')} {would}")
    value = f"{changed:,} of {len(rows):,}" if rows else "none found"
    what = would if rows else ""
    return Tile("Normalizations", value, "; ".join(filter(None, [what, *notes])))


def _outputs(report: Json) -> Tile:
    parity = report["parity"]
    if parity is None:
        return Tile("Outputs", "not checked", plain(report["parity_skipped"] or ""))
    where = ""
    for each in (report["analysis"] or {}).get("providers", ()):
        elsewhere = each["parity"]
        if parity["passed"] and elsewhere is not None and not elsewhere["passed"]:
            parity, where = elsewhere, f" on {provider_name(each['provider'])}"
    outputs = worst_first(parity)
    if not parity["passed"]:
        failed = sum(not each["passed"] for each in outputs)
        number = f"{failed:,} of {counted(len(outputs), 'output')}{where}"
        return Tile("Outputs", "✗ disagree", number, "bad")
    if not parity["inputs"]:
        return Tile("Outputs", "✓ the same", "byte for byte the same model", "good")
    used = budget_used(outputs[0]) if outputs else None
    note = "" if used is None else f"at worst {spell_share(used)} of the allowed error"
    return Tile("Outputs", "✓ agree", note, "good")


def _gain(report: Json) -> Tile:
    latency = report["latency"]
    if latency is None:
        return Tile("Latency", "not measured", plain(report["latency_skipped"] or ""))
    states = {"faster": "good", "slower": "bad"}
    where = provider_name(latency["provider"])
    value, state = f"{_TIMES} {spell_ratio(latency['ratio'])}", states.get(latency["verdict"])
    if state is None:  # a figure in large type would be read as one that means something
        told = f"{where}: {value}, {spell_interval(latency)}"
        if is_undecided(latency):
            return Tile("Latency", "undecided", f"too little was measured on {told}")
        return Tile("Latency", "no difference", f"that could be measured on {told}")
    whose = "the first's" if report["command"] == "compare" else "the original's"
    told = f"of {whose} latency: {latency['verdict']} on {where}; {spell_interval(latency)}"
    return Tile("Latency", value, told, state)


def _unbroken(size: int) -> str:
    """A size whose unit stays on its line."""
    return spell_bytes(size).replace(" ", "\N{NO-BREAK SPACE}")


def _before_after(first: int, second: int | None, amount: Callable[[int], str]) -> tuple[str, str]:
    if second is None:
        return amount(first), ""
    if first == second:
        return amount(first), "unchanged"
    share = f"{100 * (second - first) / first:+.1f} %" if first else ""
    if share.endswith("0.0 %") and len(share) == len("+0.0 %"):
        share = f"less than 0.1 % {'more' if second > first else 'less'}"
    return f"{amount(first)} → {amount(second)}", share.replace("-", MINUS)


def _alarms(report: Json) -> list[tuple[str, str]]:
    """Return what a reader should act on, each with its state."""
    found = [("bad", plain(each)) for each in warnings_of(report)]
    against = (report["analysis"] or {}).get("against")
    if against is not None:
        state = {"regressed": "bad", "holds": "good"}.get(against["verdict"], "plain")
        found.append((state, told_against(against)))
    return found


# ** the sections **


def sections(report: Json) -> list[Section]:
    """Return all parts of the page; those that have nothing to say are empty."""
    names = roles(report)
    analysis = report["analysis"] or {}
    found = [
        Section("done", "What was found and done", _found_and_done(report)),
        Section("parity", "Do the outputs agree?", _agreement(report, report["parity"], "parity")),
        Section("latency", "Is it faster?", _speed(report, report["latency"], names, "latency")),
        Section("profile", "Where the time goes", _profile(analysis, names)),
        Section("ablation", "What each pass bought", _bought(report, analysis)),
        Section("sweep", "Latency against size", _sizes_of_inputs(analysis, names)),
    ]
    for each in analysis.get("providers", ()):
        where = provider_name(each["provider"])
        key = f"on-{each['provider']}"
        blocks = [
            *_agreement({**report, **each}, each["parity"], f"{key}-parity"),
            *_speed({**report, **each}, each["latency"], names, f"{key}-latency"),
            *_profile({"profile": each["profile"]}, names, f"{key}-profile"),
        ]
        found.append(Section(key, f"On {where}", blocks))
    found.append(Section("size", "Size and memory", _size(report, analysis, names)))
    measured = report["parity"] is not None or report["latency"] is not None
    title = "How it was measured" if measured else "Options and environment"
    found.append(Section("setting", title, _setting(report)))
    return found


def _found_and_done(report: Json) -> list[Any]:
    if report["command"] == "compare":
        return []
    blocks: list[Any] = []
    counts, rows = norm_counts(report)
    if rows:
        blocks.append(Table("Normalizations by kind", counts, rows, right=1))
    else:
        blocks.append(Words("There is no normalization in this model."))
    titles, rows, idle = pass_rows(report, time_passes=False, everything=False)
    if rows:
        blocks.append(Table("Passes that found something", titles, rows, right=1))
    if idle or rows:
        titles, rows, _ = pass_rows(report, time_passes=True, everything=True)
        every = Table("Passes, in order", titles, rows, right=1)
        blocks.append(Fold(f"Every pass, with its time ({len(rows)})", [every]))
    back = sites_taken_back(report)
    if back:
        items = [(plain(site), [plain(effect)]) for site, effect in back]
        blocks.append(Fold(f"Taken back ({len(back)})", [Listing(items)], opened=True))
    for title, groups_of in REASONS.items():
        groups = groups_of(report)
        items = []
        for group in groups:
            lines = [f"at {plain(group.listed(_PLACES))}"]
            lines += [f"To change that: {plain(group.advice)}"] if group.advice else []
            items.append((f"{len(group.places):,} {_TIMES} {plain(group.reason)}", lines))
        if items:
            number = sum(len(group.places) for group in groups)
            opened = title == "Refused" and len(items) <= 8
            blocks.append(Fold(f"{title} ({number:,})", [Listing(items)], opened=opened))
    if report["norms"]:
        heads = [*NORM_TITLES[:-1], "would be"] if is_planned(report) else list(NORM_TITLES)
        cells = [
            [*map(plain, norm_cells(norm)), plain(norm["reason"] or "")] for norm in report["norms"]
        ]
        table = Table("Every normalization", [*heads, "reason"], cells)
        blocks.append(Fold(f"Every normalization ({len(cells):,})", [table]))
    streams = report["streams"]
    if streams:
        told = [told_of_stream(stream, everything=False) for stream in streams]
        items = [(plain(t.head), [plain(x) for x in (*t.about, *t.stays)]) for t in told]
        blocks.append(Fold(f"Residual streams ({len(streams)})", [Listing(items)]))
    return blocks


def _agreement(report: Json, parity: Json | None, key: str) -> list[Any]:
    if report["command"] == "inspect":
        return []
    if parity is None:
        return [Words(f"Not checked: {plain(report['parity_skipped'] or 'no reason was given')}.")]
    if not parity["inputs"] or not parity["outputs"]:
        return [Words(plain(each)) for each in parity["notes"]]
    who = roles(report)
    blocks: list[Any] = [
        Words(
            f"The truth is the {who[0]} model computed in {plain(parity['truth'])}. The {who[0]} "
            "model is off from it by its own rounding, the noise floor; the "
            f"{who[1]} model may be off by twice that, and 4 ulp (units in the last place)."
        )
    ]
    outputs = worst_first(parity)
    rows = parity_rows(parity)
    shown = rows[:_PLOTTED]
    if rows and _plottable(*(x for row in shown for x in (row.noise, row.error, row.budget))):
        svg = figures.parity(
            shown,
            title="Error of each output against the noise floor",
            description="; ".join(
                f"{plain(row.name)}: error {spell_number(row.error)}, noise "
                f"{spell_number(row.noise)}, allowed {spell_number(row.budget)} ulp"
                for row in shown
            ),
            name=key,
        )
        more = f" The table has all {len(rows)}." if len(rows) > len(shown) else ""
        caption = (
            "Largest error of each output, with onnxruntime's own optimizations off and on. "
            f"Worst first.{more}"
        )
        marks = [
            ("changed dot", f"the {who[1]} model"),
            ("original tick", f"the {who[0]} model: the noise floor"),
            ("band", "what is allowed"),
        ]
        if not all(row.passed for row in shown):
            marks.insert(1, ("bad", f"the {who[1]} model, where it failed"))
        blocks.append(Plot(Markup(svg), caption, marks))
    heads = list(PARITY_TITLES)
    heads[3] = who[0]
    cells = [
        [*map(plain, parity_cells(each["name"], state, measures))]
        for each in outputs
        for state, measures in judgements(each)
    ]
    table = Table("Parity of each output", heads, cells, right=2)
    failures = [
        (f"{plain(each['name'])}, optimizer {state}", [plain(measures["reason"])])
        for each in outputs
        for state, measures in judgements(each)
        if measures.get("reason")
    ]
    if failures:
        blocks.append(Listing(failures))
    blocks += [table] if len(cells) <= _OPEN else [Fold(f"All {len(cells):,} rows", [table])]
    blocks.append(Words(LEGEND))
    return [*blocks, *_facts([*parity_facts(parity), *parity["notes"]])]


def parity_rows(parity: Json) -> list[figures.Row]:
    """Return the rows of the parity plot: every comparison that has a size in ulp, worst first."""
    rows = []
    for each in worst_first(parity):
        for state, measures in judgements(each):
            numbers = [measures[key] for key in ("error", "baseline_error", "budget")]
            if None in numbers or measures.get("error_ulp") is None:
                continue
            ulp = _ulp(measures)
            if ulp:
                error, noise, budget = (number / ulp for number in numbers)
                name = f"{figures.short(each['name'], 16)} {state}"
                rows.append(figures.Row(name, noise, error, budget, measures["passed"]))
    return rows


def _ulp(measures: Json) -> float:
    """The ulp of an output's scale: what its errors were divided by, or 1/4 of a bare budget."""
    for key in ("error", "baseline_error"):
        if measures[key] and measures.get(f"{key}_ulp"):
            return float(measures[key] / measures[f"{key}_ulp"])
    return float(measures["budget"] / 4)


def _speed(report: Json, latency: Json | None, names: tuple[str, str], key: str) -> list[Any]:
    if report["command"] == "inspect":
        return []
    if latency is None:
        return [
            Words(f"Not measured: {plain(report['latency_skipped'] or 'no reason was given')}.")
        ]
    blocks: list[Any] = [Words(_capital(latency_line(latency)) + ".", loud=True)]
    trials = _trials(latency)
    spans = (*latency["interval"], *latency["band"], *(each.ratio for each in trials))
    if trials and _plottable(latency["ratio"], *spans):
        pairs = [figures.Pair(each.ratio, each.fresh) for each in trials]
        svg = figures.ratio(
            pairs,
            latency["ratio"],
            tuple(latency["interval"]),
            tuple(latency["band"]),
            names,
            title="Ratio of latencies",
            description=latency_line(latency),
            name=f"{key}-ratio",
        )
        caption = (
            f"The {names[1]} model's latency over the {names[0]}'s, run side by side. In the "
            "shaded band lies what two sessions of one and the same model differ by (A/A): "
            "inside it nothing can be told."
        )
        marks = [
            ("ink square", f"ratio with its {100 * latency.get('confidence', 0.95):g} % interval"),
            ("changed dot", "one session pair"),
            ("band", "A/A band"),
        ]
        blocks.append(Plot(Markup(svg), caption, marks))
    shapes = [latency[role].get("quantiles", ()) for role in ("original", "candidate")]
    if all(len(shape) > 1 and _plottable(*shape) for shape in shapes):
        svg = figures.times(
            shapes[0],
            shapes[1],
            names,
            title="Distribution of the time of one run",
            description="; ".join(
                f"{name}: median {spell_milliseconds(latency[role]['p50'])}, 90th percentile "
                f"{spell_milliseconds(latency[role]['p90'])}"
                for name, role in zip(names, ("original", "candidate"), strict=True)
            ),
            name=f"{key}-times",
        )
        caption = "Share of the runs that took at most so long; further left is faster."
        blocks.append(Plot(Markup(svg), caption))
    keys = [
        k
        for k in ("p50", "p90", "min", "mean")
        if all(k in latency[role] for role in ("original", "candidate"))
    ]
    rows = [
        [title, *(spell_milliseconds(latency[role][k]) for k in keys)]
        for title, role in zip(names, ("original", "candidate"), strict=True)
    ]
    blocks.append(Table("Time of one run", ["model", *keys], rows, right=1))
    if trials:
        cells = [
            [
                str(number),
                "fresh" if each.fresh else "same",
                *(
                    spell_milliseconds(statistics.median(turns))
                    for turns in (each.first, each.second, each.candidate)
                ),
                spell_ratio(each.ratio),
            ]
            for number, each in enumerate(trials, 1)
        ]
        heads = ["pair", "process", f"{names[0]} a", f"{names[0]} b", names[1], "ratio"]
        table = Table("Session pairs: a typical turn of each session", heads, cells, right=2)
        blocks.append(Fold(f"The {len(cells)} session pairs", [table]))
    facts = [*latency_facts(latency), *latency.get("notes", ()), *not_measured(report)]
    return [*blocks, *_facts(facts)]


def _trials(latency: Json) -> list[Turns]:
    """Return the session pairs that can be read: all three sessions have the same turns."""
    trials = [Turns.from_json(each) for each in latency.get("trials", ())]
    return [t for t in trials if 0 < len(t.first) == len(t.second) == len(t.candidate)]


def _profile(analysis: Json, names: tuple[str, str], key: str = "profile") -> list[Any]:
    profile = analysis.get("profile")
    if profile is None:
        return _why_not(analysis, "profile")
    parts = operator_parts(profile)
    blocks: list[Any] = []
    if parts and _plottable(*(x for part in parts for x in (part.first, part.second))):
        svg = figures.stacked(
            parts,
            names,
            title="Time of one run by operator",
            description="; ".join(
                f"{plain(part.name)}: {part.first:.3g} ms before, {part.second:.3g} ms after"
                for part in parts
            ),
            name=key,
        )
        caption = (
            "The nodes that onnxruntime really runs, in the median of "
            f"{counted(profile['runs'], 'run')}. Profiling slows a run down: the parts are what "
            "counts here, and not the sum."
        )
        blocks.append(Plot(Markup(svg), caption))
    kinds = {part.name: part.kind for part in parts}
    last = max(kinds.values(), default=0)
    heads, rows = operator_rows(profile, names)
    colours = [kinds.get(name, last) for name in operators(profile)]
    table = Table("Time by operator", heads, _plain(rows), right=1, kinds=colours)
    return [*blocks, table, *_facts(profile["notes"])]


def operator_parts(profile: Json) -> list[figures.Part]:
    """Return the parts of the stacked bar: the longest operators, and all others together."""
    names = operators(profile)
    times = [
        {row["operator"]: row["milliseconds"] for row in profile[role]}
        for role in ("original", "candidate")
    ]
    shown = names if len(names) <= figures.KINDS else names[: figures.KINDS - 1]
    parts = [
        figures.Part(name, times[0].get(name, 0.0), times[1].get(name, 0.0), kind)
        for kind, name in enumerate(shown)
    ]
    rest = names[len(shown) :]
    if rest:
        sums = [sum(table.get(name, 0.0) for name in rest) for table in times]
        parts.append(figures.Part("all others", sums[0], sums[1], figures.KINDS - 1))
    return parts


def _bought(report: Json, analysis: Json) -> list[Any]:
    ablation, latency = analysis.get("ablation"), report["latency"]
    if ablation is None or latency is None:
        return _why_not(analysis, "ablation")
    rows = ablation["passes"]
    blocks: list[Any] = []
    steps = waterfall_steps(latency["ratio"], rows)
    end = 100 * latency["ratio"]
    if rows and _plottable(end, *(x for s in steps for x in (s.end, *(s.interval or ())))):
        svg = figures.waterfall(
            steps,
            ("optimized", end),
            title="What each pass bought",
            description="; ".join(
                f"{plain(step.name)}: {step.end - step.start:+.2f} %" for step in steps
            ),
            name="ablation",
        )
        caption = (
            "Each pass was left out once, and the model without it measured against the one with "
            "all. To the left is faster; the line is the interval of each step. What remains is "
            "what passes do only together, or noise."
        )
        marks = [("good", "faster"), ("bad", "slower"), ("original", "no measurable difference")]
        blocks.append(Plot(Markup(svg), caption, marks))
    if rows:
        heads, cells = ablation_rows(ablation)
        caption = "Ratio of latencies with and without each pass"
        blocks.append(Table(caption, heads, _plain(cells), right=1))
    if ablation["skipped"]:
        lines = [f"{each['pass']}: {each['reason']}" for each in ablation["skipped"]]
        blocks += [Words("Not measured:"), *_facts(lines)]
    return blocks


def waterfall_steps(ratio: float, rows: Sequence[Json]) -> list[figures.Step]:
    """Return the steps from 100 % to 100 ratio %: what each pass bought, and what remains.

    Without pass p the model takes ratio / r(p) of the original's latency: the pass bought
    ratio / r(p) - ratio.
    """
    at, steps = 100.0, []
    for row in rows:
        bought = [100 * ratio * (1 / max(r, _LEAST) - 1) for r in (row["ratio"], *row["interval"])]
        state = {"faster": "good", "slower": "bad"}.get(row["verdict"], "original")
        interval = (at - bought[1], at - bought[2])
        steps.append(figures.Step(row["pass"], at, at - bought[0], interval, state))
        at -= bought[0]
    rest = 100 * ratio - at
    if len(rows) > 1 or abs(rest) > 1e-6:
        steps.append(figures.Step("together, or noise", at, 100 * ratio))
    return steps


def _sizes_of_inputs(analysis: Json, names: tuple[str, str]) -> list[Any]:
    sweep = analysis.get("sweep")
    if sweep is None:
        return []
    blocks: list[Any] = []
    axis, found = sweep_curves(sweep)
    found = [curve for curve in found if len(curve.sizes) > 1]  # a point is no curve
    sizes = (x for c in found for values in (c.sizes, c.original, c.changed) for x in values)
    if found and all(x > 0 and _plottable(x) for x in sizes):
        svg = figures.curves(
            found[:_CURVES],
            axis,
            names,
            title="Latency against size",
            description="; ".join(
                f"{point_name(p['sizes'])}: {latency_line(p['latency'])}"
                for p in sweep["points"]
                if p["latency"] is not None
            ),
            name="sweep",
        )
        more = len(found) - _CURVES
        tail = f" The table has {counted(more, 'curve')} more." if more > 0 else ""
        blocks.append(Plot(Markup(svg), f"Median time of one run at each size.{tail}"))
    heads, rows = sweep_rows(sweep, names)
    return [*blocks, Table("Latency at each size", heads, _plain(rows), right=1)]


def sweep_curves(sweep: Json) -> tuple[str, list[figures.Curve]]:
    """Return the axis that a sweep is plotted against, and a curve for each of the other sizes.

    The axis is the one with the most sizes, the last of those that have equally many.
    """
    axes = sweep["axes"]
    if not axes:
        return "", []
    chosen = max(range(len(axes)), key=lambda i: (len(axes[i]["sizes"]), i))
    key = axes[chosen]["names"][0]
    grouped: dict[str, list[tuple[int, float, float]]] = {}
    for point in sweep["points"]:
        if point["latency"] is None or key not in point["sizes"]:
            continue
        others = {
            axis["names"][0]: point["sizes"].get(axis["names"][0], 0)
            for index, axis in enumerate(axes)
            if index != chosen
        }
        row = (
            point["sizes"][key],
            point["latency"]["original"]["p50"],
            point["latency"]["candidate"]["p50"],
        )
        grouped.setdefault(point_name(others), []).append(row)
    found = []
    for name, rows in grouped.items():
        sizes, first, second = zip(*sorted(rows), strict=True)
        found.append(figures.Curve(name, sizes, first, second))
    return ", ".join(plain(name) for name in axes[chosen]["names"]), found


def _size(report: Json, analysis: Json, names: tuple[str, str]) -> list[Any]:
    nodes, model, memory = report["nodes"], report["model"], analysis.get("memory")
    rows = []

    def add(name: str, first: int | None, second: int | None, amount: Callable[[int], str]) -> None:
        if first is not None:
            _, note = _before_after(first, second, amount)
            rows.append([name, amount(first), NONE if second is None else amount(second), note])

    add("nodes", nodes["before"], nodes["after"], "{:,}".format)
    add("file size", model["bytes_before"], model["bytes_after"], spell_bytes)
    blocks: list[Any] = []
    if memory is not None:
        for title, first, second in memory_rows(memory):
            add(title, first, second, spell_bytes)
    blocks.append(Table("Both models", ["", *names, "change"], rows, right=1))
    if memory is not None:
        blocks.append(
            Words(
                "Memory is what a fresh process held resident while it loaded the model and ran it "
                "once; that of the session is without Python, onnxruntime and the inputs."
            )
        )
        blocks += _facts(memory["notes"])
    else:
        blocks += _why_not(analysis, "memory")
    return blocks


def _why_not(analysis: Json, part: str) -> list[Any]:
    """Return why a part was not measured, where that is known."""
    reason = analysis.get("skipped", {}).get(part)
    return [Words(f"Not measured: {plain(reason)}.")] if reason else []


def _setting(report: Json) -> list[Any]:
    blocks: list[Any] = []
    model, names = report["model"], roles(report)
    paths = [(names[0], model["input"] or "given in memory")]
    if report["command"] == "compare":
        paths.append((names[1], model["output"] or "given in memory"))
    blocks.append(Table("Models", ["", ""], [[role, plain(path)] for role, path in paths]))
    blocks += _facts([*report["notes"], *files_written(report)])
    for title, values in (("Environment", report["environment"]), ("Options", report["options"])):
        if values:
            rows = [[plain(key), plain(_setting_value(value))] for key, value in values.items()]
            blocks.append(Table(title, ["", ""], rows))
    return blocks


def _plain(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[plain(cell) for cell in row] for row in rows]


def _plottable(*numbers: float) -> bool:
    """Whether a plot can show these: finite, and of a size that is not a fault of the clock."""
    return all(not x or _LEAST <= abs(x) <= _MOST for x in numbers)


def _facts(lines: Sequence[str]) -> list[Any]:
    """Return a plain list, or nothing where there is nothing to list."""
    return [Listing([(plain(each), ()) for each in lines])] if lines else []


def _setting_value(value: Any) -> str:
    if value in (None, [], {}):
        return NONE
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(spell_value, value))
    return spell_value(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
