"""How much memory a session needs: the peak of a fresh process that loads a model and runs it.

    needed = peak - start

`start` is what the process held just before it opened the session, with Python, onnxruntime and the
inputs; `peak` the most it held until the run was over, both resident. A process that has run other
things keeps what they freed, so each model gets one of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from onnxnorm.errors import OnnxNormError, RuntimeRejection
from onnxnorm.latency import bootstrap, load_feeds, save_feeds, search_path
from onnxnorm.session import open_session, resolve_provider

_ON_THE_HOST: Final = "This is memory of the host; that of the CUDA device is not in it."
_STATUS: Final = Path("/proc/self/status")
_FORGET_PEAK: Final = "5"  # proc(5), clear_refs: reset the peak resident set size


@dataclass(frozen=True)
class Peak:
    """Resident memory of the process of one model, in bytes.

    Attributes:
        start: Before the session was opened.
        loaded: The most until it was open.
        peak: The most until its run was over.
    """

    start: int
    loaded: int
    peak: int


@dataclass(frozen=True)
class Memory:
    """The memory that two models need.

    Attributes:
        provider: "cpu" or "cuda".
        threads: Intra-op threads asked for; None: left to onnxruntime.
        original: The original's.
        candidate: The candidate's.
        seconds: Time the measurement took.
        notes: What a reader should know, a sentence each.
    """

    provider: str
    threads: int | None
    original: Peak
    candidate: Peak
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as values that json.dumps takes."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def lack() -> str | None:
    """Why the memory of a process cannot be measured here; None where it can."""
    if not sys.executable:
        return "this Python cannot start another"
    if resident() is None:
        return "this system does not tell the peak memory of a process (Linux does, in /proc)"
    return None


def measure(
    original: Path,
    candidate: Path,
    feeds: Mapping[str, Any],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    libraries: Sequence[Path] = (),
    timeout: float = 120.0,
) -> Memory:
    """Load and run each model once in a process of its own; `lack` says where that is impossible.

    Args:
        original: Path of the original.
        candidate: Path of the other model.
        feeds: What both are run on, as for `Session.run`.
        provider: "cpu", "cuda" or "auto".
        threads: Intra-op threads; None for onnxruntime's own choice.
        libraries: Of custom operators; empty is that of this package, where it is.
        timeout: Seconds that one process may take.

    Raises:
        ProviderError: The provider is not usable.
        RuntimeRejection: onnxruntime cannot load or run one of the models, the process of one
            ended unexpectedly, or took too long.
    """
    began = time.perf_counter()
    chosen = resolve_provider(provider)
    with tempfile.TemporaryDirectory(prefix="onnxnorm-") as folder:
        stored = save_feeds(feeds, Path(folder))
        found = [
            _apart(path, stored, chosen, threads, libraries, timeout)
            for path in (original, candidate)
        ]
    return Memory(
        provider=chosen,
        threads=threads,
        original=found[0],
        candidate=found[1],
        seconds=time.perf_counter() - began,
        notes=(_ON_THE_HOST,) if chosen == "cuda" else (),
    )


def _apart(
    path: Path,
    stored: Path,
    provider: str,
    threads: int | None,
    libraries: Sequence[Path],
    timeout: float,
) -> Peak:
    head = {
        "sys_path": search_path(),
        "path": os.fspath(path.resolve()),
        "provider": provider,
        "threads": threads,
        "feeds": os.fspath(stored),
        "libraries": [os.fspath(p.resolve()) for p in libraries],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", bootstrap("onnxnorm.memory")],
            input=json.dumps(head).encode() + b"\n",
            capture_output=True,
            check=False,
            timeout=timeout,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeRejection(
            f"{path}: its memory was not measured in {timeout:g} s", "Give a larger time budget."
        ) from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        words = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise RuntimeRejection(
            f"{path}: the process that measured its memory ended with status {done.returncode}"
            + (f": {words[-1].strip()}" if words else ""),
            "It may need more memory than there is.",
        )
    said = json.loads(lines[-1])
    if "what" in said:
        raise RuntimeRejection(said["what"], said["hint"])
    return Peak(**said)


def serve(head: Mapping[str, Any]) -> None:
    """The other end of `_apart`: load and run one model, and print what that took."""
    try:
        resolve_provider(head["provider"])  # imports onnxruntime, which is no part of the model
        feeds = load_feeds(Path(head["feeds"]))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)
        start = resident("VmRSS")
        with open_session(
            Path(head["path"]),
            provider=head["provider"],
            threads=head["threads"],
            deterministic=False,
            libraries=[Path(p) for p in head["libraries"]] or None,
        ) as session:
            loaded = resident()
            session.bind(feeds)()
        print(json.dumps({"start": start, "loaded": loaded, "peak": resident()}), flush=True)
    except OnnxNormError as error:
        print(json.dumps({"what": error.what, "hint": error.hint}), flush=True)


def resident(line: str = "VmHWM") -> int | None:
    """Resident memory of this process in bytes: VmHWM is the most so far, VmRSS that of now.

    Not getrusage: its maximum begins with that of the process that started this one.
    """
    with contextlib.suppress(OSError, ValueError):
        for each in _STATUS.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = each.partition(":")
            if key == line:
                return int(value.split()[0]) * 1024
    return None
