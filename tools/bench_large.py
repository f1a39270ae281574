"""Measure memory and time of `onnxnorm optimize` on a large model against copying its files.

    python tools/bench_large.py --dir DIR [--gigabytes 3] [--rounds 10] [--seed N] [--json OUT]

Writes a float16 model with external data into DIR, then in each round, in an order that is drawn
by chance, (a) copies its files through the kernel and (b) runs `onnxnorm optimize --no-parity
--no-latency` in a process of its own. Both start on a disk with nothing to write, without a file in
their way, and with memory at hand for what they write; both are timed until they return and again
until the bytes are on disk. What counts is the ratio of the two within a round: the median over all
rounds and its bootstrap interval, because a shared machine drifts from round to round. The
processor time is printed as well: where others keep every core busy, the time that is gained by
copying beside other work is lost again. The limits are: peak resident memory below 700 MB plus four
times the largest changed tensor, and 1.5 times the copy.

The process runs with its bytecode compiled, as an installed package does.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `models` is a folder of the checkout, not an installed package

from models.large import write_large  # noqa: E402

MEMORY_FLOOR = 700_000_000
CHANGED_FACTOR = 4
TIME_FACTOR = 1.5
RESAMPLES = 10_000
PAGE = 4096


def copy_by_kernel(source: Path, target: Path) -> None:
    """Copy one file without its bytes passing through this process."""
    if not hasattr(os, "copy_file_range"):
        shutil.copyfile(source, target)
        return
    with source.open("rb") as reader, target.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        while left:
            left -= os.copy_file_range(reader.fileno(), writer.fileno(), left)


def run_and_watch(
    command: list[str], environment: Mapping[str, str] = os.environ
) -> tuple[int, int]:
    """Run a command to its end; return its exit status and its peak resident memory in bytes.

    The memory is what the kernel accounted to that one child, mapped files included.
    """
    pid = os.posix_spawnp(command[0], command, environment)
    _, status, usage = os.wait4(pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit


def touch(size: int) -> None:
    """Use this much memory once: what is freed is then at hand for the next who asks.

    A virtual machine may have given its free memory back to the host, and gets it again page by
    page, on the time of whoever writes to it first: a copy took up to four times as long after a
    pause as right after another, all of it processor time in the kernel.
    """
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, PAGE):
            memory[at] = 1


def processor_seconds() -> float:
    """Return what this process and its children that ended have used, in the kernel and outside."""
    return time.process_time() + sum(os.times()[2:4])


def timed(action: Callable[[], None], size: int) -> tuple[float, float, float]:
    """Return the seconds until an action that writes `size` bytes returned, until they are on disk.

    The third is the processor time of this process and its children, in the kernel and outside.
    """
    os.sync()
    subprocess.run([sys.executable, __file__, "--touch", str(size)], check=True)
    used = processor_seconds()
    start = time.perf_counter()
    action()
    returned = time.perf_counter() - start
    used = processor_seconds() - used
    os.sync()
    return returned, time.perf_counter() - start, used


def interval(values: Sequence[float], draw: random.Random) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    return medians[RESAMPLES * 25 // 1000], medians[RESAMPLES * 975 // 1000 - 1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--dir", type=Path, help="a folder with room for 3 copies")
    wanted.add_argument("--touch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--width", type=int, default=4096, help="of each MatMul layer")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the order and the bootstrap")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    if args.touch is not None:
        touch(args.touch)
        return 0
    draw = random.Random(args.seed)
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

    copies: list[tuple[float, float, float]] = []
    runs: list[tuple[float, float, float]] = []
    peaks: list[int] = []
    out = folder / "out"
    command = [sys.executable, "-m", "onnxnorm", "optimize", str(model), str(out / model.name)]
    command += ["--no-parity", "--no-latency", "--quiet"]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def copy() -> None:
        for source in (model, data):
            copy_by_kernel(source, out / source.name)

    def optimize() -> None:
        status, peak = run_and_watch(command, environment)
        if status != 0:
            raise SystemExit(f"{' '.join(command)} ended with {status}")
        peaks.append(peak)

    out.mkdir(exist_ok=True)
    optimize()  # once for nothing: it compiles the bytecode
    peaks.clear()
    for turn in range(args.rounds):
        order = [(copy, copies), (optimize, runs)]
        draw.shuffle(order)
        for action, times in order:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            times.append(timed(action, total))
        (copied, run) = copies[-1], runs[-1]
        print(
            f"round {turn + 1}: copy {copied[0]:.2f} s ({copied[1]:.2f} s to disk, processor "
            f"{copied[2]:.2f} s), optimize {run[0]:.2f} s ({run[1]:.2f} s, {run[2]:.2f} s), peak "
            f"{peaks[-1] / 1e6:.0f} MB, ratio {run[0] / copied[0]:.2f} "
            f"({run[1] / copied[1]:.2f}, {run[2] / copied[2]:.2f}), "
            f"{'copy' if order[0][0] is copy else 'optimize'} first",
            flush=True,
        )
    shutil.rmtree(out)
    shutil.rmtree(folder / "bytecode")
    pairs = [
        [run[k] / copied[k] for run, copied in zip(runs, copies, strict=True)] for k in range(3)
    ]
    ratios = [statistics.median(each) for each in pairs]
    spans = [interval(each, draw) for each in pairs]
    result = {
        "bytes": total,
        "largest_changed_bytes": changed,
        "peak_bytes": max(peaks),
        "peak_limit_bytes": limit,
        "copy_seconds": copies,
        "optimize_seconds": runs,
        "ratio_returned": ratios[0],
        "ratio_returned_interval": spans[0],
        "ratio_on_disk": ratios[1],
        "ratio_on_disk_interval": spans[1],
        "ratio_processor": ratios[2],
        "ratio_processor_interval": spans[2],
        "ratio_limit": TIME_FACTOR,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    said = [f"{r:.2f} [{a:.2f}, {b:.2f}]" for r, (a, b) in zip(ratios, spans, strict=True)]
    print(
        f"peak {max(peaks) / 1e6:.0f} MB of {limit / 1e6:.0f} MB; time over copy "
        f"{said[0]} returned, {said[1]} on disk, {said[2]} processor time, "
        f"limit {TIME_FACTOR}"
    )
    return int(max(peaks) > limit or ratios[0] > TIME_FACTOR)


if __name__ == "__main__":
    sys.exit(main())
