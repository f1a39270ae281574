"""Measure memory and time of `onnxnorm optimize` on a large model against copying its files.

    python tools/bench_large.py --dir DIR [--gigabytes 3] [--rounds 5] [--json RESULT.json]

Writes a float16 model with external data into DIR, then in each round, in an order that alternates,
(a) copies its files through the kernel and (b) runs `onnxnorm optimize --no-parity --no-latency`
in a process of its own. Both are timed until they return and again until the bytes are on disk.
The limits are: peak resident memory below 700 MB plus four times the largest changed tensor, and
1.5 times the copy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

from models.large import write_large  # noqa: E402

MEMORY_FLOOR = 700_000_000
CHANGED_FACTOR = 4
TIME_FACTOR = 1.5


def copy_by_kernel(source: Path, target: Path) -> None:
    """Copy one file without its bytes passing through this process."""
    if not hasattr(os, "copy_file_range"):
        shutil.copyfile(source, target)
        return
    with source.open("rb") as reader, target.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        while left:
            left -= os.copy_file_range(reader.fileno(), writer.fileno(), left)


def run_and_watch(command: list[str]) -> tuple[int, int]:
    """Run a command to its end; return its exit status and its peak resident memory in bytes.

    The memory is what the kernel accounted to that one child, mapped files included.
    """
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds until an action returned, and until its bytes were on disk."""
    os.sync()
    start = time.perf_counter()
    action()
    returned = time.perf_counter() - start
    os.sync()
    return returned, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="a folder with room for 3 copies")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--width", type=int, default=4096, help="of each MatMul layer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    folder: Path = args.dir
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "large.onnx"
    data = model.with_name(model.name + ".data")
    # In a process of its own: a child's peak starts at that of the process it was forked from.
    writer = multiprocessing.get_context("spawn").Process(
        target=write_large, args=(model, round(args.gigabytes * 1e9), args.width)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
        return writer.exitcode
    total = model.stat().st_size + data.stat().st_size
    # the widest convolution in front: patch.weight, [width, 64, 2, 2] in float16
    changed = args.width * 64 * 2 * 2 * 2
    limit = MEMORY_FLOOR + CHANGED_FACTOR * changed
    print(f"{total / 1e9:.2f} GB, largest changed tensor {changed / 1e6:.1f} MB", flush=True)

    copies: list[tuple[float, float]] = []
    runs: list[tuple[float, float]] = []
    peaks: list[int] = []
    out = folder / "out"
    command = [sys.executable, "-m", "onnxnorm", "optimize", str(model), str(out / model.name)]
    command += ["--no-parity", "--no-latency", "--quiet"]

    def copy() -> None:
        for source in (model, data):
            copy_by_kernel(source, out / source.name)

    def optimize() -> None:
        status, peak = run_and_watch(command)
        if status != 0:
            raise SystemExit(f"{' '.join(command)} ended with {status}")
        peaks.append(peak)

    out.mkdir(exist_ok=True)
    copy()  # once for nothing: the page cache is as full afterwards as before every later turn
    for turn in range(args.rounds):
        order = [(copy, copies), (optimize, runs)]
        for action, times in order if turn % 2 == 0 else reversed(order):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            times.append(timed(action))
        print(
            f"round {turn + 1}: copy {copies[-1][0]:.2f} s ({copies[-1][1]:.2f} s to disk), "
            f"optimize {runs[-1][0]:.2f} s ({runs[-1][1]:.2f} s), peak {peaks[-1] / 1e6:.0f} MB",
            flush=True,
        )
    shutil.rmtree(out)
    # pairs of one round, because a shared disk drifts from round to round
    pairs = list(zip(runs, copies, strict=True))
    ratios = [statistics.median(run[k] / copied[k] for run, copied in pairs) for k in (0, 1)]
    result = {
        "bytes": total,
        "largest_changed_bytes": changed,
        "peak_bytes": max(peaks),
        "peak_limit_bytes": limit,
        "copy_seconds": copies,
        "optimize_seconds": runs,
        "ratio_returned": ratios[0],
        "ratio_on_disk": ratios[1],
        "ratio_limit": TIME_FACTOR,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"peak {max(peaks) / 1e6:.0f} MB of {limit / 1e6:.0f} MB; time over copy "
        f"{ratios[0]:.2f} returned, {ratios[1]:.2f} on disk, limit {TIME_FACTOR}"
    )
    return int(max(peaks) > limit or ratios[0] > TIME_FACTOR)


if __name__ == "__main__":
    sys.exit(main())
