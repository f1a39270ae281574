"""What a report says, in words and figures: the sentences that every form of it shares.

All are functions of the JSON object alone, and give plain text without markup.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

Json: TypeAlias = Mapping[str, Any]
_PLACES_SHOWN: Final = 3


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
ACTIONS: Final[Mapping[str, str]] = {
    "folded": "folded",
    "converted": "converted",
    "lowered": "lowered",
    "kept": "kept as it was",
    "refused": "refused",
    "none": "no pass applies",
}
CHANGING: Final = ("folded", "converted", "lowered")
_PROVIDERS: Final[Mapping[str, str]] = {
    "cpu": "the CPU",
    "cuda": "CUDA",
}


def verdict(report: Json) -> str:
    """Return the report in one sentence: what changed; do the outputs agree; is it faster.

    Args:
        report: The object that `Report.to_json` returns.
    """
    clauses = []
    if report["command"] != "compare":
        clauses.append(_changes(report))
    if report["command"] != "inspect":
        clauses += [_agreement(report), _speed(report), *_elsewhere(report)]
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."


def _changes(report: Json) -> str:
    norms, sites = report["norms"], report["sites"]
    planned = is_planned(report)
    would = "would be " if planned else ""
    found = [row for row in norms if row["recognised"]]
    totals = Counter(row["kind"] for row in found)
    refused = Counter(row["kind"] for row in found if row["action"] == "refused")
    changed = Counter((row["kind"], row["action"]) for row in found if row["action"] in CHANGING)
    parts = []
    for (kind, action), number in changed.most_common():
        part = f"{number:,} of {counted(totals[kind], _kind(kind))} {would}{action}"
        targets = [
            row.get("into") for row in found if (row["kind"], row["action"]) == (kind, action)
        ]
        named = sorted({_target(into) for into in targets if into})
        if named and None not in targets:
            part += f" into {listed(named)}"
        if refused[kind]:
            part += f" and {refused.pop(kind):,} refused"
        parts.append(part)
    places = places_by_pass(report)
    number = sum(refused.values())
    if not parts and not places and not report["passes"] and not planned:
        parts.append(f"no pass was run; {counted(len(found), 'normalization')} found")
    elif not parts and not found:
        missed = len(norms) - len(found)
        near = f" ({counted(missed, 'near miss')})" if missed else ""
        parts.append(f"no normalization {'recognised' if near else 'found'}{near}")
    elif not parts and not places:
        tail = f": {number:,} refused" if number else ""
        parts.append(f"nothing to change in {counted(len(found), 'normalization')}{tail}")
    elif not parts and len(found) == 1:
        tail = " (refused)" if number else ""
        not_changed = "would not be" if planned else "was not"
        parts.append(f"the one normalization {not_changed} changed{tail}")
    elif not parts:
        tail = f" ({number:,} refused)" if number else ""
        parts.append(f"none of {len(found):,} normalizations {would}changed{tail}")
    if places and not changed:
        by = _by_passes(places)
        parts.append(f"{counted(sum(places.values()), 'place')} {would}changed by {by}")
    taken_back = sum(site["action"] == "rolled_back" for site in sites)
    if taken_back:
        parts.append(f"{counted(taken_back, 'change')} taken back{why_taken_back(report, ' ')}")
    return ", ".join(parts)


def why_taken_back(report: Json, lead: str) -> str:
    """Return why changes were taken back, behind `lead`; "" where they differ in that."""
    errors = [site["error"] for site in report["sites"] if site["action"] == "rolled_back"]
    return "" if None in errors else f"{lead}because the outputs disagreed"


def places_by_pass(report: Json) -> dict[str, int]:
    """Return how many places each pass changed, or would change, the most first."""
    applied = Counter(site["pass"] for site in report["sites"] if site["action"] == "applied")
    return dict(applied.most_common())


def _by_passes(places: Mapping[str, int]) -> str:
    """Return the passes that change places, the first few by name.

    >>> _by_passes({"fold-constants": 31, "fold-sizes": 8})
    'fold-constants (31) and fold-sizes (8)'
    """
    if len(places) == 1:
        return next(iter(places))
    rows = list(places.items())
    few = rows if len(rows) <= _PLACES_SHOWN + 1 else rows[:_PLACES_SHOWN]
    words = [f"{name} ({number:,})" for name, number in few]
    rest = rows[len(few) :]
    if rest:
        words.append(f"{len(rest)} more passes ({sum(number for _, number in rest):,})")
    return listed(words)


def _elsewhere(report: Json) -> list[str]:
    """Return what came of further providers, and of an earlier report, a clause each."""
    analysis = report["analysis"] or {}
    clauses = []
    for each in analysis.get("providers", ()):
        part = {**report, **each}
        clauses.append(f"on {provider_name(each['provider'])} {_agreement(part)}")
        if each["latency"] is not None:
            clauses.append(_speed(part))
    against = analysis.get("against")
    if against is not None:
        said = {
            "regressed": "LESS IS GAINED than in {}",
            "holds": "the gain of {} holds",
            "cannot tell": "whether the gain of {} holds, this run cannot tell",
        }[against["verdict"]]
        clauses.append(said.format(plain(against["report"])))
    return clauses


def disappoints(report: Json) -> bool:
    """Return whether outputs do not agree, on any provider, or a gain is gone."""
    analysis = report["analysis"] or {}
    checks = [report["parity"], *(each["parity"] for each in analysis.get("providers", ()))]
    against = analysis.get("against")
    return any(check is not None and not check["passed"] for check in checks) or (
        against is not None and against["verdict"] == "regressed"
    )


def _agreement(report: Json) -> str:
    parity = report["parity"]
    if parity is None:
        return f"outputs not checked{because(report['parity_skipped'])}"
    both = report["command"] == "compare"
    who, whom = (
        ("the second model's outputs", "the first's") if both else ("outputs", "the original")
    )
    rows = worst_first(parity)
    if not rows:
        return "there are no outputs to check"
    if parity["passed"] and not parity["inputs"]:
        return "the output is the input, byte for byte"
    if parity["passed"]:
        used = budget_used(rows[0])
        worst = "" if used is None else f" (at worst {spell_share(used)} of the allowed error)"
        return f"{who} agree with {whom} within the derived tolerance{worst}"
    judged = [measures for _, measures in judgements(rows[0])]
    failed = next((measures for measures in judged if not measures["passed"]), rows[0])
    used = _used(failed)
    detail = plain(rows[0]["name"])
    if failed.get("reason"):
        detail += f": {plain(failed['reason'])}"
    elif used is not None and used > 1:
        detail += f" has {spell_share(used)} times the error it may have"
    else:
        detail += " could not be compared"
    text = f"{who} DO NOT AGREE with {whom} ({detail})"
    return text if both or report["model"]["output"] else f"{text}; no model was written"


def _speed(report: Json) -> str:
    latency = report["latency"]
    if latency is None:
        return f"latency not measured{because(report['latency_skipped'])}"
    where = provider_name(latency["provider"])
    whose = "the first's" if report["command"] == "compare" else "the original's"
    figures = f"({spell_ratio(latency['ratio'])} times {whose} latency, {spell_interval(latency)})"
    if latency["verdict"] in {"faster", "slower"}:
        return f"{latency['verdict']} on {where} {figures}"
    if is_undecided(latency):
        return f"latency on {where} undecided {figures}"
    return f"no measurable difference in latency on {where} {figures}"


def is_planned(report: Json) -> bool:
    """Return whether the report says what would be done, and nothing was done."""
    return bool(report["dry_run"]) or report["command"] == "inspect"


@dataclass(frozen=True)
class Group:
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
        return some_of(names, limit)


def grouped(rows: Iterable[Json]) -> list[Group]:
    """Return rows with equal reasons as one, the most frequent first."""
    places: dict[tuple[str, str | None], list[tuple[str, str | None]]] = {}
    for row in rows:
        key = (row["reason"] or "no reason was given", row.get("advice") or None)
        places.setdefault(key, []).append(_place(row))
    groups = [Group(reason, advice, tuple(names)) for (reason, advice), names in places.items()]
    return sorted(groups, key=lambda group: -len(group.places))


def _place(row: Json) -> tuple[str, str | None]:
    """Return where a row is, and what stands in the way there."""
    if "output" in row:
        return row["output"], row.get("at")
    return _anchor(row) or row["site"], row.get("at")


def _anchor(row: Json) -> str:
    """Return the place of a row's site, whichever pass named it."""
    anchor: str = row["site"].partition(":")[2]
    return anchor


def _refused(report: Json) -> list[Group]:
    missed = {(n["site"], n["reason"]) for n in report["norms"] if not n["recognised"]}
    sites = [
        site
        for site in report["sites"]
        if site["action"] == "refused" and (site["site"], site["reason"]) not in missed
    ]
    told = {site["site"] for site in report["sites"] if site["action"] != "applied"}
    norms = [n for n in report["norms"] if n["action"] == "refused" and n["recognised"]]
    return grouped([*sites, *(norm for norm in norms if norm["site"] not in told)])


def _skipped(report: Json) -> list[Group]:
    return grouped(site for site in report["sites"] if site["action"] == "skipped")


def _near_misses(report: Json) -> list[Group]:
    norms = [norm for norm in report["norms"] if not norm["recognised"]]
    # What one pass is not for, another may have decided on: then its row says it.
    told = {_anchor(norm) for norm in report["norms"] if norm["site"] is not None}
    sites = [site for site in report["sites"] if site["action"] == "missed"]
    return grouped([*norms, *(site for site in sites if _anchor(site) not in told)])


def _left_alone(report: Json) -> list[Group]:
    skipped = {site["site"] for site in report["sites"] if site["action"] == "skipped"}
    norms = [n for n in report["norms"] if n["recognised"] and n["action"] in {"none", "kept"}]
    return grouped(n for n in norms if n["reason"] and n["site"] not in skipped)


REASONS: Final[Mapping[str, Callable[[Json], list[Group]]]] = {
    "Refused": _refused,
    "Left as they were": _left_alone,
    "Near misses, not recognised": _near_misses,
    "Skipped": _skipped,
}


def warnings_of(report: Json) -> list[str]:
    """Return what a reader should act on; also what onnxruntime makes of norms, where wrong."""
    misfused = [n for n in report["norms"] if n.get("warning")]
    groups = grouped({**norm, "reason": norm["warning"], "advice": None} for norm in misfused)
    return [
        *report["warnings"],
        *(f"At {group.listed(_PLACES_SHOWN)}: {group.reason}." for group in groups),
    ]


@dataclass(frozen=True)
class StreamTold:
    """What is said of a residual stream.

    Attributes:
        head: Its width, and how many of its norms would convert.
        about: Who writes and reads it, and at what price it changes.
        stays: The norms that stay, by their reason.
    """

    head: str
    about: tuple[str, ...]
    stays: tuple[str, ...]


def told_of_stream(stream: Json, *, everything: bool) -> StreamTold:
    """Return what is said of a stream; of many writers and readers the first, unless asked."""
    of = f"{len(stream['converts'])} of {counted(len(stream['norms']), 'norm')} would convert"
    about = []
    for title in ("writers", "readers"):
        names = stream[title]
        listed = names if everything else names[:_NAMES_SHOWN]
        more = len(names) - len(listed)
        tail = f" and {more} more" if more else ""
        about.append(f"{counted(len(names), title[:-1])}: {', '.join(listed)}{tail}")
    reasons = Counter(each["reason"] for each in stream["blocked"])
    stays = [f"{n} {'stays' if n == 1 else 'stay'}: {reason}" for reason, n in reasons.items()]
    head = f"{counted(stream['features'], 'feature')}: {of}"
    return StreamTold(head, (*about, *stream["price"]), tuple(stays))


_NAMES_SHOWN: Final = 4


def sites_taken_back(report: Json) -> list[tuple[str, str]]:
    """Return each site that was rolled back, and what it did to the outputs."""
    found = []
    for site in report["sites"]:
        if site["action"] == "rolled_back":
            error, reason = site["error"], site["reason"]
            parts = [
                "" if error is None else f"{spell_share(error)} times the allowed error",
                reason,
            ]
            found.append((str(site["site"]), "; ".join(filter(None, parts)) or "outputs disagreed"))
    return found


def norm_counts(report: Json) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table kind x action, empty where there are no norms."""
    norms = report["norms"]
    found = Counter(row["kind"] for row in norms if row["recognised"])
    missed = Counter(row["kind"] for row in norms if not row["recognised"])
    done = Counter((row["kind"], row["action"]) for row in norms if row["recognised"])
    actions = [action for action in ACTIONS if any(action == each for _, each in done)]
    titles = ["kind", "found", *(ACTIONS[action] for action in actions)]
    titles += ["near miss"] if missed else []
    rows = []
    for kind in sorted(found | missed, key=lambda kind: (-found[kind], kind)):
        numbers = [found[kind], *(done[kind, action] for action in actions)]
        numbers += [missed[kind]] if missed else []
        rows.append([kind, *map("{:,}".format, numbers)])
    return (titles, rows) if rows else ([], [])


def pass_rows(
    report: Json, *, time_passes: bool, everything: bool
) -> tuple[list[str], list[list[str]], int]:
    """Return titles and rows of the table of passes, and how many idle ones were left out."""
    would = "would " if is_planned(report) else ""
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
        row = [each["name"], *map("{:,}".format, numbers)]
        rows.append(row + ([spell_seconds(each["seconds"])] if time_passes else []))
    return titles, rows, idle


def norm_outcome(norm: Json) -> str:
    """Return what was done with a norm, in a few words."""
    if not norm["recognised"]:
        return "near miss"
    text = ACTIONS.get(norm["action"], norm["action"])
    into = norm.get("into") if norm["action"] in CHANGING else None
    return f"{text} into {plain(into)}" if into else text


def norm_cells(norm: Json) -> list[str]:
    """Return one row of the table of norms, under `NORM_TITLES`."""
    axes, epsilon = norm["axes"], norm["epsilon"]
    return [
        norm["kind"],
        "-" if axes is None else ",".join(map(str, axes)) or "none",
        "-" if epsilon is None else f"{epsilon:.4g}",
        norm["output"],
        norm_outcome(norm),
    ]


def norm_table(report: Json) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table of norms; what onnxruntime runs stands before the end."""
    titles = list(NORM_TITLES)
    rows = [norm_cells(norm) for norm in report["norms"]]
    if any(norm.get("runtime") for norm in report["norms"]):
        titles.insert(-1, "in onnxruntime")
        for row, norm in zip(rows, report["norms"], strict=True):
            row.insert(-1, _runtime_cell(norm.get("runtime")))
    return titles, rows


def _runtime_cell(runtime: Json | None) -> str:
    if runtime is None:
        return "-"
    before, after = (_operators(runtime[key]) for key in ("original", "optimized"))
    return before if runtime["same"] else f"{before} -> {after}"


def _operators(found: Sequence[str] | None) -> str:
    if not found:
        return "gone"
    return found[0] if len(found) == 1 else f"{len(found)} nodes ({found[0]} to {found[-1]})"


NORM_TITLES: Final = ("kind", "axes", "epsilon", "output value", "action")
LEGEND: Final = (
    "opt.: whether onnxruntime's own optimizations were on. Errors are distances from the truth, "
    "maximum / RMS, in ulp of the output's scale. Budget: the share of the allowed error that is "
    "used, at most 1."
)
PARITY_TITLES: Final = ("output", "opt.", "error", "original", "cosine", "argmax", "budget")


def judgements(output: Json) -> list[tuple[str, Json]]:
    """Return the comparisons of one output, each under the state of the runtime's optimizer.

    An output's own `passed` and `reason` speak of both comparisons; here each has its own.
    """
    optimized = output.get("optimized")
    if optimized is None:
        return [("off", output)]
    both, on = output.get("reason") or "", optimized.get("reason") or ""
    within = output["error"] is not None and (_used(output) or 0.0) <= 1
    told = not on or (both != on and both.endswith(on))
    only_on = within and told and not optimized["passed"]
    own = {"passed": True, "reason": None} if only_on else {}
    return [("off", {**output, **own}), ("on", optimized)]


def budget_used(output: Json) -> float | None:
    """Return max(error / budget, error_rms / budget_rms) over an output's comparisons.

    1 is the limit. None where no comparison has both numbers.
    """
    shares = (_used(measures) for _, measures in judgements(output))
    return max((share for share in shares if share is not None), default=None)


def _used(measures: Json) -> float | None:
    shares = []
    for error, budget in (("error", "budget"), ("error_rms", "budget_rms")):
        top, bottom = measures.get(error), measures.get(budget)
        if top is None or bottom is None:
            continue
        if not bottom and top and measures["passed"]:
            continue  # integers that differ at ties: they agree, and have no budget
        shares.append(top / bottom if bottom else math.inf if top else 0.0)
    return max(shares, default=None)


def worst_first(parity: Json) -> list[Json]:
    """Return the outputs of a parity result, those closest to or beyond their budget first."""

    def badness(output: Json) -> tuple[bool, float]:
        used = budget_used(output)
        return output["passed"], -(0.0 if used is None else used)

    return sorted(parity["outputs"], key=badness)


def parity_cells(name: str, optimizer: str, measures: Json) -> list[str]:
    """Return one row of the parity table, under `PARITY_TITLES`."""
    used = _used(measures)
    share = "-" if used is None else spell_share(used)
    agreement, cosine = measures.get("argmax_agreement"), measures.get("cosine")
    return [
        name,
        optimizer,
        error_cell(measures, ""),
        error_cell(measures, "baseline_"),
        "-" if cosine is None else f"{min(1.0, max(-1.0, cosine)):.7f}",
        "-" if agreement is None else spell_percent(agreement),
        share if measures["passed"] else f"{share} FAILED",
    ]


def error_cell(measures: Json, whose: Literal["", "baseline_"]) -> str:
    """Return `maximum / RMS` in ulp of the output's scale, or `maximum abs` where it has no ulp.

    An output that could not be compared has no error: `-`.
    """
    error, rms = measures[f"{whose}error"], measures.get(f"{whose}error_rms")
    if error is None:
        return "-"
    in_ulp = measures.get(f"{whose}error_ulp")
    if in_ulp is None:
        return f"{spell_number(error)} abs"
    if not error:
        return "0 / 0"
    return f"{spell_number(in_ulp)} / {'-' if rms is None else spell_number(rms * in_ulp / error)}"


def parity_facts(parity: Json) -> list[str]:
    """Return what the parity result rests on: truth, inputs, time."""
    facts = [f"truth: {plain(parity['truth'])}"]
    if parity["inputs"]:
        runs = len(parity["inputs"])
        samples = parity.get("samples", runs)
        facts.append(
            counted(samples, "sample") + ("" if samples == runs else f" in {counted(runs, 'run')}")
        )
    if parity["seconds"] is not None:
        facts.append(f"took {spell_seconds(parity['seconds'])}")
    return facts


def latency_facts(latency: Json) -> list[str]:
    """Return how the latency was measured: threads, session pairs, time."""
    threads = latency["threads"]
    facts = [
        "default threads" if threads is None else counted(threads, "thread"),
        counted(latency["pairs"], "session pair"),
    ]
    if latency.get("seconds") is not None:
        facts.append(f"took {spell_seconds(latency['seconds'])}")
    return facts


def not_measured(report: Json) -> list[str]:
    """Return a sentence for each provider that the figures do not speak of."""
    latency, lack = report["latency"], report["environment"].get("cuda")
    others = latency.get("not_measured", ["cuda"] if latency["provider"] == "cpu" else ["cpu"])
    rows = (report.get("analysis") or {}).get("providers", ())
    measured = {each["provider"] for each in rows if each["latency"] is not None}
    return [
        f"On {provider_name(name)}: not measured"
        f"{because(lack if name == 'cuda' and isinstance(lack, str) else None)}."
        for name in others
        if name not in measured
    ]


def roles(report: Json) -> tuple[str, str]:
    """Return what the two models of a report are to each other."""
    return ("first", "second") if report["command"] == "compare" else ("original", "optimized")


def model_names(report: Json) -> list[str]:
    """Return the names of the files that a report is about: two where it compares them.

    Two files of one name are told apart by their paths.
    """
    model = report["model"]
    both = report["command"] == "compare" and model["output"] is not None
    paths = [model["input"] or "model", *([model["output"]] if both else [])]
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def files_written(report: Json) -> list[str]:
    """Return a line for each file that was written."""
    lines = []
    for each in report["files"]:
        size = "" if each.get("bytes") is None else f", {spell_bytes(each['bytes'])}"
        lines.append(f"Wrote {plain(each['path'])} ({each['role']}{size})")
    if report["command"] == "optimize" and report["model"]["output"] is None:
        lines.append(
            "No model was written." if not report["dry_run"] else "Dry run: no model was written."
        )
    return lines


def _target(into: str) -> str:
    """Return what norms became, as a sentence about several of them has it."""
    if into == "constant":
        return "constants"
    return counted(2, _KINDS[into]).removeprefix("2 ") if into in _KINDS else into


def _kind(kind: str) -> str:
    return _KINDS.get(kind, kind.replace("_", " "))


def provider_name(name: str) -> str:
    """Return an execution provider as it is called in a sentence."""
    return _PROVIDERS.get(name, name)


def because(reason: str | None) -> str:
    """Return a reason in parentheses, to be put behind a statement."""
    return f" ({plain(reason)})" if reason else ""


# ** numbers and words **


def counted(number: int, noun: str) -> str:
    """Return the number with its noun in the right form.

    >>> counted(1, "node"), counted(0, "softmax"), counted(2, "near miss"), counted(3, "entry")
    ('1 node', '0 softmaxes', '2 near misses', '3 entries')
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{number:,} {noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}s"


def listed(words: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def some_of(places: Sequence[str], limit: int) -> str:
    """Return the first places, and how many more there are."""
    if len(places) <= limit + 1:
        return ", ".join(places)
    return f"{', '.join(places[:limit])} and {len(places) - limit:,} more"


def spell_number(value: float | None) -> str:
    """Return a number in three significant digits."""
    if value is None:
        return "not finite"
    if value == 0 or 0.01 <= abs(value) < 999.5:
        return f"{value:.3g}"
    if not math.isfinite(value):
        return "over 1e300"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def spell_share(used: float) -> str:
    """Return a share of the budget, never rounded onto the other side of 1."""
    if used >= 999.5:
        return spell_number(used)
    text = f"{used:.2f}"
    if text == "1.00" and used > 1:
        return "over 1.00"
    return text


def spell_ratio(value: float) -> str:
    """Return a ratio of latencies in three digits or more.

    >>> spell_ratio(0.9934), spell_ratio(0.02381), spell_ratio(12.34)
    ('0.993', '0.0238', '12.3')
    """
    return f"{value:.3f}" if 0.1 <= value < 10 else f"{value:.3g}"


def spell_interval(latency: Json) -> str:
    """Return the confidence interval of a latency ratio."""
    low, high = latency["interval"]
    confidence = 100 * latency.get("confidence", 0.95)
    return f"{confidence:.4g} % interval {spell_ratio(low)} to {spell_ratio(high)}"


def spell_percent(share: float) -> str:
    """Return a share in percent, 100 only where it is all of them."""
    text = f"{100 * share:.4g}"
    return f"{text} %" if text != "100" or share == 1 else "99.99 %"


def _scaled(value: float) -> str:
    """Return three digits, or all of the whole part where that has some more."""
    if value >= 1e7:
        return spell_number(value)
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def spell_bytes(number: int) -> str:
    """Return a size in decimal units.

    >>> spell_bytes(1), spell_bytes(97_812_345), spell_bytes(999_999)
    ('1 byte', '97.8 MB', '1.00 MB')
    """
    if number < 1000:
        return counted(number, "byte")
    power = next((i for i in (1, 2, 3) if number < 999.5 * 1000**i), 4)
    return f"{_scaled(number / 1000**power)} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def spell_milliseconds(value: float) -> str:
    """Return a duration in milliseconds."""
    if value < 0.01:
        return f"{value:.2g} ms"
    return f"{value:.3f} ms" if value < 1 else f"{_scaled(value)} ms"


def spell_seconds(value: float | None) -> str:
    """Return a duration in seconds."""
    if value is None:
        return "-"
    return "< 0.01 s" if 0 < value < 0.005 else f"{_scaled(value)} s"


def spell_change(
    before: int, after: int, amount: Callable[[int], str], words: tuple[str, str]
) -> str:
    """Return `before -> after (difference fewer)`."""
    if before == after:
        return f"{amount(before)}, unchanged"
    difference = f"{amount(abs(after - before))} {words[0] if after < before else words[1]}"
    return f"{amount(before)} -> {amount(after)} ({difference})"


def plain(text: str) -> str:
    """Return text on one line, with what a terminal would obey or not show spelled out.

    Names come out of a file that anybody may have made, so they can hold escape sequences.
    """
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def is_undecided(latency: Json) -> bool:
    """Whether interval and A/A band both speak of a difference, and it is not claimed all the same.

    That is so where there are too few session pairs, or where half of them do not show it alone.
    """
    if latency["verdict"] in {"faster", "slower"}:
        return False
    (low, high), (least, greatest) = latency["interval"], latency["band"]
    return not low <= 1 <= high and not least <= latency["ratio"] <= greatest


def spell_verdict(latency: Json) -> str:
    """Return the verdict on a latency, or that there is none."""
    return "undecided" if is_undecided(latency) else str(latency["verdict"])


def latency_legend(report: Json) -> str:
    """Return what ratio and A/A band are, for where no plot shows it."""
    first, second = roles(report)
    return (
        f"Ratio: {second} over {first}, run side by side; below 1 is faster. A/A band: what the "
        f"{first} model differs from itself by."
    )


def latency_line(latency: Json) -> str:
    """Return verdict, ratio, interval and A/A band in one line."""
    low, high = latency["band"]
    band = f"A/A band {spell_ratio(low)} to {spell_ratio(high)}"
    ratio = f"ratio {spell_ratio(latency['ratio'])}"
    return f"{spell_verdict(latency)}: {ratio}, {spell_interval(latency)}, {band}"


def spell_value(value: object) -> str:
    """Return a JSON value as a person would write it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
