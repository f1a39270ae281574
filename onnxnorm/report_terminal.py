"""Reports and progress on a terminal."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from types import TracebackType
from typing import Final, final

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from onnxnorm.report_analysis import (
    MINUS,
    ablation_rows,
    memory_rows,
    operator_rows,
    point_name,
    told_against,
)
from onnxnorm.report_text import (
    LEGEND,
    NORM_TITLES,
    PARITY_TITLES,
    REASONS,
    Group,
    Json,
    because,
    budget_used,
    counted,
    disappoints,
    files_written,
    grouped,
    is_planned,
    judgements,
    latency_facts,
    latency_legend,
    latency_line,
    norm_counts,
    norm_outcome,
    norm_table,
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
    spell_change,
    spell_milliseconds,
    spell_share,
    spell_value,
    told_of_stream,
    verdict,
    warnings_of,
    why_taken_back,
    worst_first,
)

_OUTPUTS_SHOWN: Final = 5
_PLACES_SHOWN: Final = 3


class Output(Console):
    """Standard output, where a reader that went away is for the caller to see.

    rich would exit with 1, which is our code for outputs that do not agree.
    """

    def on_broken_pipe(self) -> None:
        """Let whoever called decide."""
        raise BrokenPipeError


class _Page:
    """Lines of text on a console: prose is wrapped, tables are aligned, nothing else is.

    On a terminal, tables fit its width: long names lose their middle, and where that would make
    two of them look alike they stand on lines of their own. In a pipe or a file no name is
    shortened, because what reads it may look for the name.
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
        for word in plain(text).split(" "):
            longer = line + ("" if fresh else " ") + word
            if not fresh and cell_len(longer) > self._width:
                self.line(line, style)
                longer = " " * hang + word
            line, fresh = longer, False
        self.line(line, style)

    def fits(self, titles: Sequence[str], rows: Sequence[Sequence[str]], *, flexible: int) -> bool:
        """Whether a table fits the width when its flexible column is as narrow as its title."""
        columns = list(zip(titles, *rows, strict=True))
        columns[flexible] = (titles[flexible],)
        needed = sum(max(cell_len(plain(cell)) for cell in column) for column in columns)
        return not self._narrow or 2 + needed + 2 * (len(titles) - 1) <= self._width

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
        cells = [[plain(cell) for cell in row] for row in rows]
        widths = [max(map(cell_len, column)) for column in zip(titles, *cells, strict=True)]
        right, apart = set(numeric), False
        if self._narrow:
            room = self._width - 2 - sum(widths) - 2 * (len(widths) - 1) + widths[flexible]
            whole = [row[flexible] for row in cells]
            names = _fitted(whole, min(widths[flexible], max(8, room)))
            apart = len(set(names)) < len(set(whole))
            for row, name in zip(cells, whole if apart else names, strict=True):
                row[flexible] = name
            widths[flexible] = max(map(cell_len, (titles[flexible], *names)))

        def show(row: Sequence[str], style: str) -> None:
            if apart and row[flexible]:
                self.line(f"  {row[flexible]}", style=style)
            parts = []
            for i, cell in enumerate(row):
                pad = " " * (widths[i] - cell_len(cell))
                if not (apart and i == flexible):
                    parts.append(pad + cell if i in right else cell + pad)
            self.line(("    " if apart else "  ") + "  ".join(parts), style=style)

        show(titles, "dim")
        for number, row in enumerate(cells):
            show(row, "red" if any(cell.endswith("FAILED") for cell in row) else "")
            if below is not None:
                below(number)

    def groups(self, groups: Sequence[Group], *, everything: bool) -> None:
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
            roles(report), (report["model"]["input"], report["model"]["output"]), strict=True
        ):
            page.prose(f"{path or 'given in memory'}", lead=f"  {role:<7}", hang=9)
    else:
        _print_passes(page, report, verbose=verbose, time_passes=time_passes)
        _print_reasons(page, report, verbose=verbose)
        _print_norms(page, report, verbose=verbose)
    _print_parity(page, report, verbose=verbose)
    _print_latency(page, report)
    _print_analysis(page, report, verbose=verbose)
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
    if places_by_pass(report):
        _print_passes(page, report, verbose=verbose, time_passes=False)
    norms = {norm["site"] for norm in report["norms"]}
    if verbose:
        _print_sites(page, report, norms)
    _print_streams(page, report, verbose=verbose)
    others = [s for s in report["sites"] if s["action"] == "refused" and s["site"] not in norms]
    if others:
        page.heading("Also refused")
        page.groups(grouped(others), everything=verbose)
    if verbose:
        _print_environment(page, report)
    _print_notes(page, report)


def _print_streams(page: _Page, report: Json, *, verbose: bool) -> None:
    """The residual streams: who writes and reads each, and what stands in the way."""
    streams = report["streams"]
    if not streams:
        return
    page.heading("Streams")
    small = [s for s in streams if len(s["norms"]) == 1 and not s["converts"]]
    shown = streams if verbose else [s for s in streams if s not in small]
    for stream in shown:
        told = told_of_stream(stream, everything=verbose)
        page.prose(told.head, lead="  ", hang=4)
        for line in told.about:
            page.prose(line, lead="    ", hang=6, style="dim")
        for line in told.stays:
            page.prose(line, lead="    ", hang=6)
    if len(shown) < len(streams):
        hidden = counted(len(streams) - len(shown), "more stream")
        page.prose(f"{hidden} of one norm that stays; --verbose lists them", lead="  ", hang=4)


def _mood(report: Json) -> str:
    if disappoints(report):
        return "bold red"
    return "bold" if report["parity"] is None else "bold green"


def _print_passes(page: _Page, report: Json, *, verbose: bool, time_passes: bool) -> None:
    page.heading("Passes")
    titles, rows, idle = pass_rows(report, time_passes=time_passes, everything=verbose)
    if rows:
        page.table(titles, rows, numeric=range(1, len(titles)))
    if idle:
        more = "more " if rows else ""
        noun = "pass" if idle == 1 else "passes"
        page.line(f"  {idle} {more}{noun} found nothing to do")
    if not report["passes"]:
        page.line("  none was run")


def _print_sites(page: _Page, report: Json, known: Collection[str | None]) -> None:
    """The sites that would change and are those of no norm."""
    sites = [s["site"] for s in report["sites"] if s["action"] == "applied"]
    others = [site for site in dict.fromkeys(sites) if site not in known]
    if others:
        page.heading("Other sites that would be changed")
        for site in others:
            page.prose(site, lead="  ", hang=4)


def _print_reasons(page: _Page, report: Json, *, verbose: bool) -> None:
    for title, groups_of in REASONS.items():
        groups = groups_of(report)
        if groups:
            page.heading(title)
            page.groups(groups, everything=verbose)
    taken_back = sites_taken_back(report)
    if taken_back:
        page.heading(f"Taken back{why_taken_back(report, ', ')}")
        for site, effect in taken_back:
            page.prose(f"{site}: {effect}", lead="  ", hang=4)


def _print_norms(page: _Page, report: Json, *, verbose: bool) -> None:
    page.heading("Normalizations")
    titles, rows = norm_counts(report)
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
        if cells[number][-1] != norm_outcome(norm):
            lines.append(f"into {norm['into']}")
        if norm["reason"]:
            at = f" (at {norm['at']})" if norm.get("at") else ""
            lines.append(f"{norm['reason']}{at}")
        if norm.get("advice") and norm["advice"] not in advised:
            advised.add(norm["advice"])
            lines.append(f"to change that: {norm['advice']}")
        if verbose:
            lines += norm.get("notes", ())
            lines += [f"input {norm['input']}", f"output {norm['output']}"]
            lines.append(f"{counted(len(norm['nodes']), 'node')}: {', '.join(norm['nodes'])}")
            lines.append(f"site {norm['site']}" if norm["site"] else "no site")
        if beside:
            lines.append(f"in onnxruntime: {beside[number]}")
        for each in lines:
            page.prose(each, lead="      ", hang=6, style="dim")

    beside: list[str] = []  # a column that has no room
    titles, cells = norm_table(report)
    if is_planned(report):
        titles[-1] = "would be"
    if not page.fits(titles, cells, flexible=3):  # the target's name is in the JSON
        for row, norm in zip(cells, norms, strict=True):
            if norm.get("into"):
                row[-1] = row[-1].partition(" into ")[0]
        if len(titles) > len(NORM_TITLES) and not page.fits(titles, cells, flexible=3):
            titles.pop(-2)
            beside = [row.pop(-2) for row in cells]
    page.table(titles, cells, flexible=3, below=details)


def _print_parity(page: _Page, report: Json, *, verbose: bool, where: str = "") -> None:
    parity = report["parity"]
    if parity is None:
        page.heading(f"Parity{where}")
        page.prose(f"not checked{because(report['parity_skipped'])}", lead="  ", hang=2)
        return
    said = "passed" if parity["passed"] else "FAILED"
    page.heading(f"Parity{where}: {said}", parity_facts(parity))
    # Without inputs nothing was run: there are no figures to tabulate.
    outputs = worst_first(parity) if parity["inputs"] else []
    shown = outputs if verbose else outputs[:_OUTPUTS_SHOWN]
    rows = [
        parity_cells(each["name"] if state == "off" else "", state, measures)
        for each in shown
        for state, measures in judgements(each)
    ]
    if rows:
        titles = list(PARITY_TITLES)
        titles[3] = roles(report)[0]
        page.table(titles, rows, numeric=range(2, len(titles)))
    rest = outputs[len(shown) :]
    if rest:
        used = budget_used(rest[0])
        page.line(f"  and {counted(len(rest), 'more output')}{_none_above(used)}")
    for each in shown:
        for state, measures in judgements(each):
            if measures.get("reason"):
                text = f"{each['name']}, optimizer {state}: {measures['reason']}"
                page.prose(text, lead="  ", hang=4)
    if rows:
        page.prose(LEGEND, lead="  ", hang=2, style="dim")
    if verbose:
        for number, each in enumerate(parity["inputs"], 1):
            page.prose(each, lead=f"  input {number}: ", hang=4)
    for each in parity["notes"]:
        page.prose(each, lead="  ", hang=2)


def _none_above(used: float | None) -> str:
    return "" if used is None else f", none above {spell_share(used)} of budget"


def _print_latency(page: _Page, report: Json, *, where: str = "") -> None:
    latency = report["latency"]
    if latency is None:
        page.heading(f"Latency{where}")
        page.prose(f"not measured{because(report['latency_skipped'])}", lead="  ", hang=2)
        return
    page.heading(f"Latency on {provider_name(latency['provider'])}", latency_facts(latency))
    rows = [
        [role, spell_milliseconds(latency[key]["p50"]), spell_milliseconds(latency[key]["p90"])]
        for role, key in zip(roles(report), ("original", "candidate"), strict=True)
    ]
    page.table(["", "p50", "p90"], rows, numeric=(1, 2))
    page.prose(latency_line(latency), lead="  ", hang=2)
    page.prose(latency_legend(report), lead="  ", hang=2, style="dim")
    for each in (*latency.get("notes", ()), *not_measured(report)):
        page.prose(each, lead="  ", hang=2)


def _print_analysis(page: _Page, report: Json, *, verbose: bool) -> None:
    analysis = report["analysis"] or {}
    ablation = analysis.get("ablation")
    if ablation is not None and ablation["passes"]:
        page.heading("What each pass bought")
        titles, rows = ablation_rows(ablation)
        rows = [[*row[:3], row[4]] for row in rows]  # the A/A band has no room
        page.table([*titles[:3], titles[4]], rows, numeric=(1, 2))
        for each in ablation["skipped"]:
            page.prose(f"{each['pass']}: not measured{because(each['reason'])}", lead="  ", hang=4)
    if verbose and analysis.get("profile") is not None:
        page.heading("Time by operator")
        titles, rows = operator_rows(analysis["profile"], roles(report))
        rows = [  # nor have the numbers of nodes; a terminal may have no minus sign
            [row[0], *(cell.replace(MINUS, "-") for cell in row[3:])] for row in rows
        ]
        page.table([titles[0], *titles[3:]], rows, numeric=(1, 2, 3))
    if verbose and analysis.get("memory") is not None:
        page.heading("Memory")
        cells = [
            [title, spell_bytes(first), spell_bytes(second)]
            for title, first, second in memory_rows(analysis["memory"])
        ]
        page.table(["", *roles(report)], cells, numeric=(1, 2))
    if analysis.get("sweep") is not None:
        page.heading("Latency against size")
        for point in analysis["sweep"]["points"]:
            found = point["latency"]
            said = point["reason"] if found is None else latency_line(found)
            page.prose(f"{point_name(point['sizes'])}: {said}", lead="  ", hang=4)
    for each in analysis.get("providers", ()):
        part = {**report, **each}
        where = f" on {provider_name(each['provider'])}"
        _print_parity(page, part, verbose=False, where=where)
        _print_latency(page, part, where=where)
    if analysis.get("against") is not None:
        page.heading("Against the earlier report")
        page.prose(told_against(analysis["against"]), lead="  ", hang=2)


def _print_size(page: _Page, report: Json) -> None:
    page.heading("Size")
    for name, change in _size_rows(report):
        page.prose(change, lead=f"  {name:<6}", hang=8)


def _size_rows(report: Json) -> list[tuple[str, str]]:
    nodes, model = report["nodes"], report["model"]
    rows = [
        ("nodes", nodes["before"], nodes["after"], "{:,}".format, ("fewer", "more")),
        ("file", model["bytes_before"], model["bytes_after"], spell_bytes, ("smaller", "larger")),
    ]
    lines = []
    for name, before, after, amount, words in rows:
        if before is not None and after is not None:
            lines.append((name, spell_change(before, after, amount, words)))
        elif before is not None:
            lines.append((name, amount(before)))
    return lines


def _print_environment(page: _Page, report: Json) -> None:
    for title, values in (("Options", report["options"]), ("Environment", report["environment"])):
        if values:
            page.heading(title)
            for key, value in values.items():
                page.prose(spell_value(value), lead=f"  {plain(key)}: ", hang=4)


def _print_notes(page: _Page, report: Json) -> None:
    warnings = warnings_of(report)
    if warnings:
        page.heading("Warnings")
        for each in warnings:
            page.prose(each, lead="  ", hang=2, style="yellow")
    if report["notes"]:
        page.heading("Notes")
        for each in report["notes"]:
            page.prose(each, lead="  ", hang=2)
    written = files_written(report)
    if written:
        page.line()
        for each in written:
            page.prose(each, hang=2)


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
            self._what, self._share = plain(what), share
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
