"""Reports as markdown that pastes into a pull request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from onnxnorm.report_analysis import (
    ablation_rows,
    memory_rows,
    operator_rows,
    sweep_rows,
    told_against,
)
from onnxnorm.report_text import (
    LEGEND,
    PARITY_TITLES,
    REASONS,
    Group,
    Json,
    counted,
    error_cell,
    is_planned,
    judgements,
    latency_facts,
    latency_legend,
    latency_line,
    model_names,
    norm_counts,
    norm_table,
    not_measured,
    parity_cells,
    parity_facts,
    pass_rows,
    plain,
    provider_name,
    roles,
    sites_taken_back,
    spell_bytes,
    spell_milliseconds,
    spell_value,
    told_of_stream,
    verdict,
    warnings_of,
    worst_first,
)

_COMMENT: Final = 65_536  # characters that a comment on a pull request holds
_ROWS: Final = (100, 50, 20, 5)  # of a list or table; the first with which all of it fits is taken


def render_markdown(report: Json) -> str:
    """Return a report as GitHub-flavoured markdown: verdict, a small table, folded lists.

    It fits a comment on a pull request: long lists and tables go by their start.

    Args:
        report: The object that `Report.to_json` returns.
    """
    texts = (_rendered(report, rows) for rows in _ROWS)
    return next((text for text in texts if len(text) <= _COMMENT), _rendered(report, _ROWS[-1]))


def _rendered(report: Json, limit: int) -> str:
    """The same with at most so many rows in each list and table."""
    names = " and ".join(map(_code, model_names(report)))
    blocks = [f"### onnxnorm {report['command']}: {names}", _prose(verdict(report))]
    blocks += [f"**Warning:** {_prose(each)}" for each in warnings_of(report)]
    analysis = report["analysis"] or {}
    if analysis.get("against") is not None:
        blocks.append(f"**{_prose(told_against(analysis['against']))}**")
    blocks += [_summary_table(report)]
    for title, items in _markdown_lists(report, limit):
        blocks.append(_details(title, _bullets(items, limit)))
    counts, rows = norm_counts(report)
    if rows:
        titles, listed = norm_table(report)
        if is_planned(report):
            titles[-1] = "would be"
        inside = [
            _table([counts, *([_code(row[0]), *row[1:]] for row in rows)], right=1),
            _long_table(
                [
                    titles,
                    *([_code(r[0]), *r[1:3], _code(r[3]), *map(_prose, r[4:])] for r in listed),
                ],
                limit,
            ),
        ]
        blocks.append(_details(f"Normalizations ({len(listed)})", "\n\n".join(inside)))
    if report["streams"] and report["command"] == "inspect":
        streams = [told_of_stream(stream, everything=False) for stream in report["streams"]]
        items = [
            "\n".join(
                [_prose(told.head), *(f"  - {_prose(x)}" for x in (*told.about, *told.stays))]
            )
            for told in streams
        ]
        blocks.append(_details(f"Streams ({len(streams)})", _bullets(items, limit)))
    titles, rows, _ = pass_rows(report, time_passes=True, everything=True)
    if rows:
        table = _table([titles, *([_code(row[0]), *row[1:]] for row in rows)], right=1)
        blocks.append(_details(f"Passes ({len(rows)})", table))
    blocks += _markdown_parity(report, limit)
    blocks += _markdown_latency(report, limit)
    blocks += _markdown_analysis(report, analysis, limit)
    setting = {**report["options"], **report["environment"]}
    if setting:
        rows = [[_code(key), _code(spell_value(value))] for key, value in setting.items()]
        blocks.append(_details("Options and environment", _long_table([["", ""], *rows], limit)))
    if report["notes"]:
        blocks.append("\n".join(f"- {_prose(each)}" for each in report["notes"]))
    return "\n\n".join(blocks) + "\n"


def _summary_table(report: Json) -> str:
    before, after = roles(report)
    nodes, model, latency = report["nodes"], report["model"], report["latency"]
    rows = [["", before, after]]

    def add(name: str, first: Any, second: Any, amount: Callable[[Any], str]) -> None:
        if first is not None:
            rows.append([name, amount(first), "-" if second is None else amount(second)])

    add("nodes", nodes["before"], nodes["after"], "{:,}".format)
    add("file size", model["bytes_before"], model["bytes_after"], spell_bytes)
    parity = report["parity"]
    if parity is not None and parity["inputs"] and parity["outputs"]:
        worst = worst_first(parity)[0]
        title = f"error at {_code(worst['name'])}, max / RMS, ulp of its scale"
        rows.append([title, error_cell(worst, "baseline_"), error_cell(worst, "")])
    if latency is not None:
        first, second = latency["original"], latency["candidate"]
        where = provider_name(latency["provider"])
        for key in ("p50", "p90"):
            add(f"latency {key} on {where}", first[key], second[key], spell_milliseconds)
    memory = (report["analysis"] or {}).get("memory")
    if memory is not None:
        add(*memory_rows(memory)[0], spell_bytes)
    if len(rows[0]) == 3 and all(row[2] == "-" for row in rows[1:]):
        rows = [row[:2] for row in rows]
    return _table(rows, right=1)


def _markdown_lists(report: Json, limit: int) -> list[tuple[str, list[str]]]:
    lists = []
    for title, groups_of in REASONS.items():
        groups = groups_of(report)
        number = sum(len(group.places) for group in groups)
        lists.append(
            (f"{title} ({number})", [_markdown_group(group, limit // 5) for group in groups])
        )
    back = [f"{_code(site)}: {_prose(effect)}" for site, effect in sites_taken_back(report)]
    lists.append((f"Taken back ({len(back)})", back))
    return [(title, items) for title, items in lists if items]


def _markdown_group(group: Group, limit: int) -> str:
    places = group.listed(limit, _code)
    advice = f". To change that: {_prose(group.advice)}" if group.advice else ""
    return f"{len(group.places)} x {_prose(group.reason)}, at {places}{advice}"


def _markdown_parity(report: Json, limit: int, where: str = "") -> list[str]:
    parity = report["parity"]
    if parity is None or not parity["outputs"]:
        return []
    outputs = worst_first(parity)
    titles = list(PARITY_TITLES)
    titles[3] = roles(report)[0]
    rows = []
    for each in outputs if parity["inputs"] else ():  # without them nothing was run
        for state, measures in judgements(each):
            cells = parity_cells(each["name"], state, measures)
            rows.append([_code(cells[0]), *cells[1:]])
    lines = [
        _prose(f"{'; '.join(parity_facts(parity))}."),
        *([_long_table([titles, *rows], limit, right=2), LEGEND] if rows else []),
        _bullets(
            [
                f"{_code(each['name'])}, optimizer {state}: {_prose(measures['reason'])}"
                for each in outputs
                for state, measures in judgements(each)
                if measures.get("reason")
            ]
            + [_prose(each) for each in parity["notes"]],
            limit,
        ),
    ]
    said = "passed" if parity["passed"] else "FAILED"
    title = f"Parity{where} {said}, {counted(len(outputs), 'output')}"
    return [_details(title, "\n\n".join(filter(None, lines)))]


def _markdown_latency(report: Json, limit: int) -> list[str]:
    latency = report["latency"]
    if latency is None:
        return []
    items = [
        latency_line(latency),
        latency_legend(report),
        "; ".join(latency_facts(latency)),
        *latency.get("notes", ()),
        *not_measured(report),
    ]
    title = f"Latency on {provider_name(latency['provider'])}"
    return [_details(title, _bullets([_prose(each) for each in items], limit))]


def _markdown_analysis(report: Json, analysis: Json, limit: int) -> list[str]:
    names = roles(report)
    profile, ablation, sweep = (analysis.get(key) for key in ("profile", "ablation", "sweep"))
    tables = []
    if profile is not None:
        tables.append(("Time by operator", operator_rows(profile, names)))
    if ablation is not None and ablation["passes"]:
        tables.append(("What each pass bought", ablation_rows(ablation)))
    if sweep is not None:
        tables.append(("Latency against size", sweep_rows(sweep, names)))
    blocks = []
    for title, (heads, rows) in tables:
        cells = [[_code(row[0]), *map(_prose, row[1:])] for row in rows]
        blocks.append(_details(title, _long_table([heads, *cells], limit, right=1)))
    for each in analysis.get("providers", ()):
        part = {**report, **each}
        where = f" on {provider_name(each['provider'])}"
        blocks += [*_markdown_parity(part, limit, where), *_markdown_latency(part, limit)]
    return blocks


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _bullets(items: Sequence[str], limit: int) -> str:
    lines = [f"- {each}" for each in items[:limit]]
    if len(items) > limit:
        lines.append(f"- and {len(items) - limit:,} more, in the JSON report")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]], *, right: int | None = None) -> str:
    """Return a table with the titles in row 0; columns from `right` on are aligned to the right."""
    marks = ["---" if right is None or i < right else "--:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], marks, *rows[1:]))


def _long_table(rows: Sequence[Sequence[str]], limit: int, *, right: int | None = None) -> str:
    table = _table(rows[: limit + 1], right=right)
    more = len(rows) - 1 - limit
    return f"{table}\n\nand {more:,} more, in the JSON report" if more > 0 else table


def _code(name: str) -> str:
    r"""Return a name as a code span that is also safe inside a table.

    >>> print(_code("a|b"), _code("x`y"))
    `a\|b` `` x`y ``
    """
    text = plain(name)
    if not text:
        return "(no name)"
    if "\\|" in text:
        # Renderers differ on which of the two characters the first one escapes.
        return f"<code>{''.join(c if c.isalnum() else f'&#{ord(c)};' for c in text)}</code>"
    text = text.replace("|", "\\|")
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
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = "".join(f"\\{char}" if char in "\\`*_[]|~" else char for char in text)
    return text.replace("@", "@<!-- -->").replace("#", "#<!-- -->")
