"""Where the time of a run goes: milliseconds for each operator type, from onnxruntime's profile.

    milliseconds(op) = median over runs of the sum over op's nodes of duration - what runs inside

onnxruntime writes one event for each node of each run, in whole microseconds. A node with bodies
(If, Loop, Scan) holds the nodes of its bodies; their time is theirs, so that nothing counts twice.
What the runtime fused is listed under the name of what it became. Profiling costs time itself: the
sums say what a run consists of, and latency.py how long it takes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from onnxnorm.session import open_session, resolve_provider

_MOST_RUNS: Final = 30
# onnxruntime keeps a million events and drops the rest; a fifth of that leaves room.
_MOST_EVENTS: Final = 200_000
_LAUNCHES: Final = (
    "On CUDA these are the times in which the host gave the work to the device, and not those in "
    "which the device did it."
)


@dataclass(frozen=True)
class OperatorTime:
    """What the nodes of one operator type take together in one run.

    Attributes:
        operator: The type, as onnxruntime runs it.
        nodes: How many nodes of it a run executes; one in a loop counts each time.
        milliseconds: Their time together, the median over runs.
    """

    operator: str
    nodes: int
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """The time of each operator type, of two models.

    Attributes:
        provider: "cpu" or "cuda".
        threads: Intra-op threads asked for; None: left to onnxruntime.
        runs: Profiled runs of the model of which there are fewer.
        original: The original's, the longest first.
        candidate: The candidate's, likewise.
        seconds: Time the measurement took.
        notes: What a reader should know, a sentence each.
    """

    provider: str
    threads: int | None
    runs: int
    original: tuple[OperatorTime, ...]
    candidate: tuple[OperatorTime, ...]
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The profile as values that json.dumps takes."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def profile(
    original: Path,
    candidate: Path,
    feeds: Mapping[str, Any],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    libraries: Sequence[Path] = (),
    budget_seconds: float = 6.0,
) -> Profile:
    """Profile both models, with all of onnxruntime's optimizations.

    Args:
        original: Path of the original.
        candidate: Path of the other model.
        feeds: What both are run on, as for `Session.run`.
        provider: "cpu", "cuda" or "auto".
        threads: Intra-op threads; None for onnxruntime's own choice.
        libraries: Of custom operators; empty is that of this package, where it is.
        budget_seconds: Time the runs may take, roughly; each model is run twice at least.

    Raises:
        ProviderError: The provider is not usable.
        RuntimeRejection: onnxruntime cannot load or run one of the models.
    """
    began = time.perf_counter()
    chosen = resolve_provider(provider)
    found = [
        _runs(path, feeds, chosen, threads, libraries, budget_seconds / 2)
        for path in (original, candidate)
    ]
    return Profile(
        provider=chosen,
        threads=threads,
        runs=min(len(runs) for runs in found),
        original=by_operator(found[0]),
        candidate=by_operator(found[1]),
        seconds=time.perf_counter() - began,
        notes=(_LAUNCHES,) if chosen == "cuda" else (),
    )


@dataclass(frozen=True)
class NodeTime:
    """One node in one run: its operator type, and its own microseconds."""

    operator: str
    microseconds: float


def by_operator(runs: Sequence[Sequence[NodeTime]]) -> tuple[OperatorTime, ...]:
    """Sum the nodes of each run by operator type, and take the median over runs.

    >>> runs = [[NodeTime("Conv", 30), NodeTime("Relu", 5), NodeTime("Conv", 10)]] * 3
    >>> [(each.operator, each.nodes, each.milliseconds) for each in by_operator(runs)]
    [('Conv', 2, 0.04), ('Relu', 1, 0.005)]
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(runs))
    nodes: dict[str, int] = {}
    for index, run in enumerate(runs):
        for each in run:
            sums[each.operator][index] += each.microseconds
        for operator, number in Counter(each.operator for each in run).items():
            nodes[operator] = max(nodes.get(operator, 0), number)
    rows = [
        OperatorTime(operator, nodes[operator], statistics.median(values) / 1e3)
        for operator, values in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.milliseconds, row.operator)))


def read(path: Path) -> list[list[NodeTime]]:
    """The runs in a file that onnxruntime's profiler wrote, in order."""
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("name") == "model_run"
    )
    nodes = [
        event
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    # Of events that begin together the longer one is outside.
    nodes.sort(key=lambda event: (event["ts"], -event["dur"]))
    runs: list[list[_Span]] = [[] for _ in spans]
    at = 0
    holders: list[_Span] = []  # the nodes with bodies that are running, the innermost last
    for event in nodes:
        span = _Span(event["args"]["op_name"], event["ts"], event["ts"] + event["dur"])
        while at < len(spans) and span.start > spans[at][1]:
            at += 1
        if at == len(spans):
            break
        if span.start < spans[at][0]:
            continue
        while holders and holders[-1].end < span.end:
            holders.pop()
        if holders:
            holders[-1].inside += span.end - span.start
        if span.operator in _WITH_BODIES:
            holders.append(span)
        runs[at].append(span)
    return [[NodeTime(each.operator, each.own) for each in run] for run in runs]


_WITH_BODIES: Final = frozenset({"If", "Loop", "Scan"})


@dataclass
class _Span:
    """A node that ran, in microseconds since the profile began; `inside` is the part of others."""

    operator: str
    start: int
    end: int
    inside: int = 0

    @property
    def own(self) -> int:
        return max(self.end - self.start - self.inside, 0)


def _runs(
    path: Path,
    feeds: Mapping[str, Any],
    provider: str,
    threads: int | None,
    libraries: Sequence[Path],
    seconds: float,
) -> list[list[NodeTime]]:
    """Profiled runs of one model, without the first one."""
    with tempfile.TemporaryDirectory(prefix="onnxnorm-") as folder:
        with open_session(
            path,
            provider=provider,
            threads=threads,
            deterministic=False,
            libraries=libraries or None,
            profile=Path(folder) / "profile",
        ) as session:
            bound = session.bind(feeds)
            bound()
            began = time.perf_counter()
            bound()
            each = max(time.perf_counter() - began, 1e-6)
            nodes = max(sum(session.placement.values()), 1)
            # Loops run a node many times, which the number of nodes does not say: half the time.
            number = min(_MOST_RUNS, int(seconds / each), _MOST_EVENTS // nodes)
            end = began + seconds
            for _ in range(number):
                if time.perf_counter() > end:
                    break
                bound()
            written = session.end_profiling()
        return read(written)[1:]
