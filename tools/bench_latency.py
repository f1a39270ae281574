"""Look at the latency measurement itself: one comparison, its calibration, its power.

python tools/bench_latency.py A.onnx B.onnx --budget 20        one comparison
python tools/bench_latency.py A.onnx B.onnx --calibrate 5      and A against A, five times
python tools/bench_latency.py --simulate                       false claims and power
python tools/bench_latency.py A.onnx --record out.json         trials of A against itself
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxnorm import latency
from onnxnorm.errors import OnnxNormError
from onnxnorm.session import Session, open_session
from onnxnorm.trials import Trial, estimate


@dataclass(frozen=True)
class Noise:
    """A model of what disturbs timing, sizes as standard deviations of the logarithm.

    Attributes:
        session: What a session keeps for life.
        process: What the sessions of one trial share when they live in one process.
        turn: What the runs of one turn share.
        drift: A random walk of the machine from turn to turn.
        run: Scatter of a run.
        spikes: Share of runs that are disturbed, by a Pareto factor.
        stalls: Share of turns, and of sessions, that are: what a busy machine does.
    """

    session: float = 0.02
    process: float = 0.01
    turn: float = 0.01
    drift: float = 0.01
    run: float = 0.02
    spikes: float = 0.05
    stalls: float = 0.0


def simulate(
    seed: int,
    *,
    ratio: float = 1.0,
    noise: Noise | None = None,
    pairs: int = 12,
    turns: int = 3,
    samples: int = 12,
) -> list[Trial]:
    """Trials as the measurement records them, of a candidate that takes `ratio` times as long."""
    noise = noise or Noise()
    rng = random.Random(seed)

    def disturbance(share: float) -> float:
        return rng.paretovariate(1.5) if rng.random() < share else 1.0

    trials = []
    walk = 0.0
    for index in range(pairs):
        shared = rng.gauss(0, noise.process)
        roles = ("first", "second", "candidate")
        bias = {
            role: rng.gauss(0, noise.session) + shared + math.log(disturbance(noise.stalls))
            for role in roles
        }
        bias["candidate"] += math.log(ratio)
        times: dict[str, list[tuple[float, ...]]] = {role: [] for role in roles}
        for _ in range(turns):
            for role in rng.sample(roles, 3):
                walk += rng.gauss(0, noise.drift)
                level = walk + bias[role] + rng.gauss(0, noise.turn)
                level += math.log(disturbance(noise.stalls))
                times[role].append(
                    tuple(
                        math.exp(level + rng.gauss(0, noise.run)) * disturbance(noise.spikes)
                        for _ in range(samples)
                    )
                )
        trials.append(Trial(index % 2 == 1, *(tuple(times[role]) for role in roles)))
    return trials


def false_claims(recorded: Sequence[Trial], seed: int, pairs: int) -> bool:
    """Whether the estimator claims a difference in A/A trials with their roles and order redrawn.

    All three sessions of such a trial are of one model, so which of them plays the candidate is
    free: one recording gives many experiments without a difference.
    """
    rng = random.Random(seed)
    chosen = []
    for trial in rng.sample(list(recorded), pairs):
        roles = [trial.first, trial.second, trial.candidate]
        rng.shuffle(roles)
        chosen.append(Trial(trial.fresh, *roles))
    return estimate(chosen).verdict != "no measurable difference"


def random_feeds(session: Session, seed: int = 0) -> dict[str, Any]:
    """Standard normal (or zero, for what is no float) arrays; unknown axes are 1."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for value in session.inputs:
        shape = [axis if isinstance(axis, int) else 1 for axis in value.shape]
        dtype = value.dtype or np.dtype(np.float32)
        floating = dtype.kind == "f" or "float" in dtype.name
        values = rng.standard_normal(shape) if floating else np.zeros(shape)
        feeds[value.name] = values.astype(dtype)
    return feeds


def trial_from_json(data: dict[str, Any]) -> Trial:
    """The trial that `asdict` and json wrote."""
    roles = ("first", "second", "candidate")
    return Trial(
        bool(data["fresh"]), *(tuple(tuple(turn) for turn in data[role]) for role in roles)
    )


def _simulations() -> Iterator[str]:
    count = 400
    ratios = (1.0, 0.98, 0.95, 0.90, 1.10)
    kinds = {f"session bias {bias:.0%}": Noise(session=bias) for bias in (0.01, 0.02, 0.03)}
    kinds["bias 2%, busy"] = Noise(stalls=0.2)
    yield f"claims in {count} simulated comparisons, by true ratio"
    yield " " * 26 + "".join(f"{ratio:8.2f}" for ratio in ratios)
    for pairs in (12, 8):
        for name, noise in kinds.items():
            row = []
            for ratio in ratios:
                found = (
                    estimate(simulate(seed, ratio=ratio, noise=noise, pairs=pairs))
                    for seed in range(count)
                )
                claims = sum(each.verdict != "no measurable difference" for each in found)
                row.append(f"{claims / count:8.1%}")
            yield f"  {pairs:2} pairs, {name:<14}" + "".join(row)


def _print_result(result: latency.LatencyResult) -> None:
    print(result.summary)
    for name, timing in (("original", result.original), ("candidate", result.candidate)):
        print(
            f"  {name:<10} p50 {timing.p50:.4g} ms, p90 {timing.p90:.4g}, min {timing.min:.4g}, "
            f"mean {timing.mean:.4g} ({timing.runs} runs)"
        )
    print(f"  {result.seconds:.1f} s of {result.budget_seconds:g} s")
    for note in result.notes:
        print(f"  {note}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, and print what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path, nargs="?")
    parser.add_argument("candidate", type=Path, nargs="?")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calibrate", type=int, default=0, metavar="N", help="A against A, N times"
    )
    parser.add_argument("--record", type=Path, help="write the trials of A against A to this file")
    parser.add_argument("--keep", type=int, default=9, help="samples of a turn that it keeps")
    parser.add_argument("--simulate", action="store_true")
    given = parser.parse_args(arguments)
    if given.simulate:
        for line in _simulations():
            print(line, flush=True)
        return 0
    if given.original is None:
        parser.error("give a model, or --simulate")
    candidate = given.candidate or given.original
    try:
        with open_session(given.original, provider=given.provider) as session:
            feeds = random_feeds(session, given.seed)
        options = {
            "provider": given.provider,
            "threads": given.threads,
            "pairs": given.pairs,
            "budget_seconds": given.budget,
        }
        if given.record is not None:
            recording = latency.record(
                given.original, given.original, feeds, seed=given.seed, **options
            )
            kept = [_rounded(asdict(trial), given.keep) for trial in recording.trials]
            given.record.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
            return 0
        _print_result(latency.measure(given.original, candidate, feeds, seed=given.seed, **options))
        for repeat in range(given.calibrate):
            print(f"A against A, {repeat + 1} of {given.calibrate}:")
            _print_result(
                latency.measure(
                    given.original, given.original, feeds, seed=given.seed + repeat, **options
                )
            )
    except OnnxNormError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _rounded(value: Any, keep: int) -> Any:
    """Times to five digits and the first `keep` of each turn: a recording is small."""
    if isinstance(value, dict):
        return {key: _rounded(each, keep) for key, each in value.items()}
    if isinstance(value, list | tuple):
        numbers = all(isinstance(each, float) for each in value)
        return [_rounded(each, keep) for each in (value[:keep] if numbers else value)]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
