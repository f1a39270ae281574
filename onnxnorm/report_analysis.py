"""What a report's `analysis` says, as rows of text: for every form that has tables.

All are functions of the JSON object alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from onnxnorm.report_text import (
    Json,
    plain,
    spell_milliseconds,
    spell_ratio,
    spell_verdict,
)

Rows: TypeAlias = tuple[list[str], list[list[str]]]  # titles, and cells under them
MINUS: Final = "\N{MINUS SIGN}"
NONE: Final = "-"
_ROLES: Final = ("original", "candidate")


def operators(profile: Json) -> list[str]:
    """Return all operator types of a profile, the longest in either model first."""
    longest: dict[str, float] = {}
    for row in (*profile["original"], *profile["candidate"]):
        name = row["operator"]
        longest[name] = max(longest.get(name, 0.0), row["milliseconds"])
    return sorted(longest, key=lambda name: (-longest[name], name))


def operator_rows(profile: Json, names: tuple[str, str]) -> Rows:
    """Return the time of each operator type in both models, and the sums as the last row."""
    tables = [{row["operator"]: row for row in profile[role]} for role in _ROLES]
    rows = []
    for operator in operators(profile):
        here = [table.get(operator) for table in tables]
        counts = [NONE if row is None else f"{row['nodes']:,}" for row in here]
        times = [0.0 if row is None else row["milliseconds"] for row in here]
        cells = _times(times)
        for index, row in enumerate(here):
            cells[index] = NONE if row is None else cells[index]
        rows.append([operator, *counts, *cells])
    totals = [f"{sum(row['nodes'] for row in profile[role]):,}" for role in _ROLES]
    sums = [sum(row["milliseconds"] for row in profile[role]) for role in _ROLES]
    rows.append(["together", *totals, *_times(sums)])
    titles = ["operator", *(f"nodes {x}" for x in names), *(f"time {x}" for x in names)]
    return [*titles, "difference"], rows


def _times(pair: Sequence[float]) -> list[str]:
    """Return two times and their difference."""
    change = pair[1] - pair[0]
    sign = "+" if change > 0 else MINUS
    difference = "0" if abs(change) < 5e-4 else f"{sign}{spell_milliseconds(abs(change))}"
    return [*map(spell_milliseconds, pair), difference]


def memory_rows(memory: Json) -> list[tuple[str, int, int]]:
    """Return what both models take, in bytes: the session at its peak, loading, the process."""
    first, second = memory["original"], memory["candidate"]
    return [
        (title, first[end] - start * first["start"], second[end] - start * second["start"])
        for title, end, start in (
            ("memory of the session, at its peak", "peak", 1),
            ("of that, while it loads", "loaded", 1),
            ("memory of its process, at its peak", "peak", 0),
        )
    ]


def ablation_rows(ablation: Json) -> Rows:
    """Return what each pass that was left out does to latency."""
    rows = [
        [
            row["pass"],
            spell_ratio(row["ratio"]),
            _range(row["interval"]),
            _range(row["band"]),
            spell_verdict(row),
        ]
        for row in ablation["passes"]
    ]
    return ["pass", "with / without", "interval", "A/A band", "with it the model is"], rows


def sweep_rows(sweep: Json, names: tuple[str, str]) -> Rows:
    """Return latency at each size, or why there is none."""
    rows = []
    for point in sweep["points"]:
        latency = point["latency"]
        if latency is None:
            cells = [*[NONE] * 4, point["reason"] or NONE]
        else:
            times = [spell_milliseconds(latency[role]["p50"]) for role in _ROLES]
            ratio = spell_ratio(latency["ratio"])
            cells = [*times, ratio, _range(latency["interval"]), spell_verdict(latency)]
        rows.append([point_name(point["sizes"]), *cells])
    return ["size", *(f"p50 {name}" for name in names), "ratio", "interval", "verdict"], rows


def point_name(sizes: Mapping[str, int]) -> str:
    """Return the sizes of one point of a sweep in words.

    >>> point_name({"batch": 8, "seq": 1024})
    'batch = 8, seq = 1,024'
    """
    return ", ".join(f"{plain(name)} = {size:,}" for name, size in sizes.items())


def told_against(against: Json) -> str:
    """Return what came of holding a latency against an earlier one."""
    said = {
        "regressed": "Less is gained than before",
        "holds": "The gain of the earlier report holds",
        "cannot tell": "The gain of the earlier report may be gone, and this run cannot tell",
    }[against["verdict"]]
    low, high = (spell_ratio(end) for end in against["change_interval"])
    return (
        f"{said}: the ratio is {spell_ratio(against['change'])} times the one in "
        f"{plain(against['report'])} ({spell_ratio(against['ratio'])}), between {low} and {high}; "
        f"up to {spell_ratio(1 + against['max_regression'])} is allowed."
        + "".join(f" {plain(each)}" for each in against["notes"])
    )


def _range(ends: Sequence[float]) -> str:
    return f"{spell_ratio(ends[0])} to {spell_ratio(ends[1])}"
