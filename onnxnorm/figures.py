"""Plots as SVG that is part of a page: in its font, in its colours in light and dark.

Matplotlib draws; what a page needs and a file does not is put right afterwards: colours become CSS
variables, text takes the font of the page, ids get the name of the figure in front, and a title and
a description are there for those who cannot see it. Every function takes plain numbers.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What stands for a CSS variable while matplotlib draws.
_COLOURS: Final[Mapping[str, str]] = {
    name: f"#fe{index:02x}fd"
    for index, name in enumerate(
        ("ink", "muted", "line", "paper", "original", "changed", "band", "good", "bad")
    )
} | {f"kind{index}": f"#fd{index:02x}fe" for index in range(8)}
KINDS: Final = 8  # of colours for parts of a whole
_INK, _MUTED, _LINE, _PAPER = (_COLOURS[name] for name in ("ink", "muted", "line", "paper"))
_ORIGINAL, _CHANGED, _BAND = (_COLOURS[name] for name in ("original", "changed", "band"))
_WIDTH: Final = 380.0  # units; a page shows them as about as many pixels, on a telephone fewer
_FONT: Final = 12.0
_NAME: Final = 22  # characters of a name that a figure shows
_SETTINGS: Final[Mapping[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxnorm",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; wider than what pages use
    "font.size": _FONT,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.unicode_minus": True,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": _FONT,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": _FONT,
}
_SVG: Final = "http://www.w3.org/2000/svg"
_LINK: Final = "http://www.w3.org/1999/xlink"
_drawing: Final = threading.Lock()  # matplotlib's settings hold for the process


@dataclass(frozen=True)
class Row:
    """One output under one state of the runtime's optimizer; errors in ulp of its scale.

    Attributes:
        name: Of the output.
        noise: The original's own error.
        error: The changed model's.
        budget: What `error` may be.
        passed: Whether the output passed.
    """

    name: str
    noise: float
    error: float
    budget: float
    passed: bool


def parity(rows: Sequence[Row], *, title: str, description: str, name: str) -> str:
    """Plot errors against the noise floor: a bar from noise to budget, a mark for the error."""

    def paint(axes: Axes) -> None:
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
        for y, row in enumerate(rows):
            bar = axes.barh(y, row.budget, height=0.62, color=_BAND, zorder=1)
            bar[0].set_gid(f"budget-{y}")
            (noise,) = axes.plot([row.noise] * 2, [y - 0.31, y + 0.31], color=_ORIGINAL, lw=2.5)
            noise.set_gid(f"noise-{y}")
            colour = _CHANGED if row.passed else _COLOURS["bad"]
            mark = "o" if row.passed else "X"
            (error,) = axes.plot([row.error], [y], mark, color=colour, ms=7, mec=_PAPER, mew=1)
            error.set_gid(f"error-{y}")
        axes.set_yticks(range(len(rows)), [short(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        largest = max(max(row.budget, row.error, row.noise) for row in rows)
        axes.set_xlim(-0.2, largest * 1.6 + 1)  # room for a mark at 0
        axes.set_xticks(_decades(largest * 1.6 + 1))
        axes.xaxis.set_major_formatter(_plain_number)
        axes.minorticks_off()
        axes.set_xlabel("error in ulp of the output's scale")
        axes.grid(visible=True, axis="x")

    return _draw(paint, 60 + 24 * len(rows), title, description, name)


def times(
    original: Sequence[float],
    changed: Sequence[float],
    roles: tuple[str, str],
    *,
    title: str,
    description: str,
    name: str,
) -> str:
    """Plot the distributions of run times, from their quantiles evenly spaced in rank."""

    def paint(axes: Axes) -> None:
        for values, colour, style, role in (
            (original, _ORIGINAL, "--", roles[0]),
            (changed, _CHANGED, "-", roles[1]),
        ):
            shares = [100 * i / (len(values) - 1) for i in range(len(values))]
            (line,) = axes.plot(values, shares, style, color=colour, lw=2, label=role)
            line.set_gid(f"times-{'original' if colour == _ORIGINAL else 'changed'}")
        low = min(original[0], changed[0])
        high = max(_usual_end(values) for values in (original, changed))
        margin = (high - low) * 0.04 or low * 0.05
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(0, 102)
        axes.set_yticks([0, 50, 90, 100], ["0 %", "50 %", "90 %", "100 %"])
        axes.set_xlabel("milliseconds for one run")
        axes.grid(visible=True, axis="both")
        _few_ticks(axes)
        axes.legend(loc="lower right")

    return _draw(paint, 200, title, description, name)


@dataclass(frozen=True)
class Pair:
    """The ratio of one session pair, and whether its sessions had processes of their own."""

    ratio: float
    fresh: bool


def ratio(
    pairs: Sequence[Pair],
    middle: float,
    interval: tuple[float, float],
    band: tuple[float, float],
    roles: tuple[str, str],
    *,
    title: str,
    description: str,
    name: str,
) -> str:
    """Plot a ratio with its interval over the A/A band, and the session pairs behind it."""

    def paint(axes: Axes) -> None:
        axes.axvspan(*band, color=_BAND, zorder=0).set_gid("band")
        axes.axvline(1, color=_MUTED, lw=1, zorder=1)
        for fresh, mark, y, fill in ((False, "o", 2.0, _CHANGED), (True, "D", 3.0, "none")):
            chosen = [pair.ratio for pair in pairs if pair.fresh is fresh]
            if chosen:
                (dots,) = axes.plot(
                    chosen, _stacked(chosen, y), mark, mfc=fill, mec=_CHANGED, ms=5, zorder=3
                )
                dots.set_gid(f"pairs-{'fresh' if fresh else 'here'}")
        (line,) = axes.plot(interval, [1, 1], "|-", color=_INK, lw=2, ms=10, mew=2, zorder=3)
        line.set_gid("interval")
        axes.plot([middle], [1], "s", color=_INK, ms=7, zorder=4)[0].set_gid("ratio")
        labels = {1.0: "ratio"}
        labels |= {2.0: "same process"} if any(not pair.fresh for pair in pairs) else {}
        labels |= {3.0: "fresh processes"} if any(pair.fresh for pair in pairs) else {}
        axes.set_yticks(list(labels), list(labels.values()))
        axes.set_ylim(max(labels) + 0.7, 0.3)
        shown = [*interval, *band, 1.0, *(pair.ratio for pair in pairs)]
        margin = (max(shown) - min(shown)) * 0.06 or 0.02
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
        axes.set_xlabel(f"{roles[1]} / {roles[0]}, below 1 is faster")
        axes.grid(visible=True, axis="x")
        _few_ticks(axes)

    return _draw(paint, 150, title, description, name)


@dataclass(frozen=True)
class Part:
    """One part of two wholes, and the colour it has."""

    name: str
    first: float
    second: float
    kind: int


def stacked(
    parts: Sequence[Part], roles: tuple[str, str], *, title: str, description: str, name: str
) -> str:
    """Plot what two runs consist of, as two bars of one scale."""
    whole = max(sum(part.first for part in parts), sum(part.second for part in parts))

    def paint(axes: Axes) -> None:
        for y in (0, 1):
            left = 0.0
            for part in parts:
                width = (part.first, part.second)[y]
                bar = axes.barh(
                    y,
                    width,
                    left=left,
                    height=0.7,
                    color=_COLOURS[f"kind{part.kind}"],
                    edgecolor=_PAPER,
                    linewidth=1,
                )
                bar[0].set_gid(f"part-{y}-{part.kind}")
                # A letter takes six of some three hundred units.
                if whole and width / whole > (8 * len(short(part.name)) + 8) / _WIDTH:
                    axes.text(
                        left + width / 2,
                        y,
                        short(part.name),
                        color=_PAPER,
                        ha="center",
                        va="center",
                    )
                left += width
        axes.set_yticks([0, 1], [*roles])
        axes.set_ylim(1.5, -0.5)
        axes.set_xlim(0, whole * 1.02 or 1)
        axes.set_xlabel("milliseconds for one run, with profiling on")
        axes.grid(visible=True, axis="x")
        _few_ticks(axes)

    return _draw(paint, 118, title, description, name)


@dataclass(frozen=True)
class Step:
    """One step of a waterfall: from where to where, the interval of its end, and what it is.

    `state` is "good", "bad", or "original" for what nobody can tell from noise.
    """

    name: str
    start: float
    end: float
    interval: tuple[float, float] | None = None
    state: str = "original"


def waterfall(
    steps: Sequence[Step], last: tuple[str, float], *, title: str, description: str, name: str
) -> str:
    """Plot how steps lead from 100 % to `last`, in percent of the original's latency."""

    def paint(axes: Axes) -> None:
        axes.plot([100, 100], [-0.4, 0.4], color=_ORIGINAL, lw=4)[0].set_gid("first")
        for y, step in enumerate(steps, 1):
            axes.plot([step.start] * 2, [y - 1, y], color=_LINE, lw=1)
            colour = _COLOURS[step.state]
            left, width = min(step.start, step.end), abs(step.end - step.start)
            axes.barh(y, width, left=left, height=0.6, color=colour)[0].set_gid(f"step-{y}")
            if step.interval is not None:
                (line,) = axes.plot(step.interval, [y, y], "|-", color=_INK, lw=1.2, ms=8)
                line.set_gid(f"interval-{y}")
        end = len(steps) + 1
        axes.plot([last[1]] * 2, [end - 1, end], color=_LINE, lw=1)
        axes.plot([last[1]] * 2, [end - 0.4, end + 0.4], color=_CHANGED, lw=4)[0].set_gid("last")
        axes.set_yticks(
            range(end + 1), ["original", *(short(step.name) for step in steps), last[0]]
        )
        axes.set_ylim(end + 0.6, -0.6)
        shown = [100.0, last[1], *(step.end for step in steps)]
        shown += [x for step in steps for x in step.interval or ()]
        margin = (max(shown) - min(shown)) * 0.08 or 1.0
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
        axes.set_xlabel("% of the original's latency")
        axes.grid(visible=True, axis="x")
        _few_ticks(axes)

    return _draw(paint, 72 + 26 * (len(steps) + 2), title, description, name)


@dataclass(frozen=True)
class Curve:
    """Latency at several sizes, of one combination of the other sizes."""

    name: str
    sizes: tuple[int, ...]
    original: tuple[float, ...]
    changed: tuple[float, ...]


def curves(
    found: Sequence[Curve],
    axis: str,
    roles: tuple[str, str],
    *,
    title: str,
    description: str,
    name: str,
) -> str:
    """Plot latency against size, both logarithmic; each curve has a mark of its own."""
    times = [time for curve in found for time in (*curve.original, *curve.changed)]

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for index, (curve, mark) in enumerate(zip(found, "osD^vP*Xp<>h", strict=False)):
            tail = f", {curve.name}" if curve.name else ""
            for values, colour, style, role, key in (
                (curve.original, _ORIGINAL, "--", roles[0], "original"),
                (curve.changed, _CHANGED, "-", roles[1], "changed"),
            ):
                (line,) = axes.plot(
                    curve.sizes,
                    values,
                    style,
                    marker=mark,
                    ms=5,
                    color=colour,
                    lw=1.6,
                    label=short(f"{role}{tail}", 34),
                )
                line.set_gid(f"curve-{index}-{key}")
        sizes = sorted({size for curve in found for size in curve.sizes})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        ticks = _steps(min(times), max(times))
        axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(short(axis, 40))
        axes.set_ylabel("milliseconds for one run")
        axes.grid(visible=True, axis="both")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24))

    return _draw(paint, 230 + 36 * min(len(found), 12), title, description, name)


# ** from matplotlib to the page **


@functools.cache
def _matplotlib() -> Any:
    """Import matplotlib without its words on caches that it had to make."""
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        import matplotlib
        import matplotlib.backends.backend_svg
        import matplotlib.figure
    finally:
        log.setLevel(before)
    return matplotlib


def _draw(
    paint: Callable[[Axes], None], height: float, title: str, description: str, name: str
) -> str:
    matplotlib = _matplotlib()
    with _drawing, matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name may hold letters that its font has not; the page's fonts may have them.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure: Figure = matplotlib.figure.Figure((_WIDTH / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        written = io.BytesIO()
        figure.savefig(
            written, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return _for_a_page(written.getvalue(), title, description, name)


_FILES_FONT: Final = re.compile(r"font(-family)?:([^;]*?)'?DejaVu Sans'?[^;]*")
_SIZE: Final = re.compile(r"([\d.]+)px")


def _for_a_page(drawn: bytes, title: str, description: str, name: str) -> str:
    """Turn an SVG file into an element of a page that other figures are on, too."""
    root = ElementTree.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    variables = {sentinel: f"var(--{key})" for key, sentinel in _COLOURS.items()}
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        for key, value in list(element.attrib.items()):
            if key in {"href", f"{{{_LINK}}}href"} and value.startswith("#"):
                del element.attrib[key]
                element.set("href", f"#{name}-{value[1:]}")
                continue
            new = value.replace("url(#", f"url(#{name}-")
            new = re.sub(r"#f[ed][0-9a-f]{4}", lambda m: variables.get(m[0], m[0]), new)
            if key == "style" and "font" in new:
                new = _FILES_FONT.sub(_of_the_page, new)
            element.set(key, new)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for index, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(index, element)
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _of_the_page(found: re.Match[str]) -> str:
    size = _SIZE.search(found[0])
    return f"font-size: {size[1]}px" if size is not None else "font-family: inherit"


def short(name: str, limit: int = _NAME) -> str:
    """The name, or its start and its end."""
    line = "".join(c if c.isprintable() else "�" for c in name)
    if len(line) <= limit:
        return line
    head = (limit - 1) // 2
    return f"{line[:head]}…{line[head + 1 - limit :]}"


def _decades(largest: float) -> list[float]:
    """0 and the powers of ten up to `largest`, at most eight."""
    powers = range(int(math.log10(largest)) + 1 if largest >= 1 else 1)
    step = max(1, math.ceil(len(powers) / 7))
    return [0, *(10.0**power for power in powers[::step])]


def _steps(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at most seven; the ends where there are fewer than two.

    >>> _steps(0.063, 0.32), _steps(2.3, 4.1), _steps(0.5, 20000)
    ([0.1, 0.2], [2.3, 4.1], [1.0, 10.0, 100.0, 1000.0, 10000.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [
            float(f"{factor}e{power}")
            for power in powers
            for factor in factors
            if low <= float(f"{factor}e{power}") <= high
        ]
        if len(ticks) <= 7:
            break
    if len(ticks) > 7:
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
    return ticks if len(ticks) > 1 else sorted({low, high})


def _plain_number(value: float, _: object) -> str:
    return f"{value:g}" if abs(value) < 1e5 else f"1e{round(math.log10(value))}"


def _few_ticks(axes: Axes) -> None:
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")


def _usual_end(quantiles: Sequence[float]) -> float:
    """Where the tail begins in which runs met whatever else the machine did."""
    last = len(quantiles) - 1
    nine_tenths = quantiles[round(0.9 * last)]
    return min(quantiles[round(0.98 * last)], 2 * nine_tenths - quantiles[0])


def _stacked(values: Sequence[float], middle: float) -> list[float]:
    """Heights around `middle` in turn, so that marks of equal values do not hide each other."""
    offsets = (0.0, -0.2, 0.2)
    return [middle + offsets[index % 3] for index in range(len(values))]
