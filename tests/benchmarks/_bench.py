"""How every benchmark here measures: candidates in turn, in one process, medians.

The machine drifts, so candidates run A B A B ..., each call is waited for, the
first rounds are thrown away, and what is quoted is the median of the ratios of
a round, with their quartiles.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import results

printed: list[results.Table] = []


class Timing(NamedTuple):
    """Milliseconds of a candidate and its ratio to the first candidate."""

    median: float
    ratio: float
    low: float
    high: float


def in_turn(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 15,
    warmup: int = 2,
    each: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Times each candidate once a round; ratios are taken within a round.

    ``each`` is the part of a candidate's run that counts, by default all of it: one of
    so many layers, where candidates have different numbers of them.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i >= warmup:
                taken = 1e3 * (time.perf_counter() - start)
                times[name].append(taken * (1.0 if each is None else each[name]))
    base = np.array(next(iter(times.values())))
    result = {}
    for name, taken in times.items():
        low, ratio, high = np.percentile(np.array(taken) / base, (25, 50, 75))
        result[name] = Timing(float(np.median(taken)), float(ratio), float(low), float(high))
    return result


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one table, and keeps it for :func:`record`."""
    printed.append(results.Table(title, header, rows))
    print(f"\n{title}\n\n{printed[-1]}")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, ``--json`` among them."""
    parser.add_argument("--json", help="where to record the tables: examples/results/NAME.json")
    return parser.parse_args()


def record(args: argparse.Namespace) -> None:
    """Keeps what was printed, where ``--json`` says so."""
    results.save(args.json, *printed)


def versus(timing: Timing, goal: float | None) -> list[str]:
    """Cells of one timing: milliseconds, ratio, quartiles, goal and whether it is reached."""
    reached = goal is None or timing.ratio <= goal
    verdict = "" if goal is None else f"<= {goal:.2f} {'ok' if reached else 'MISSED'}"
    spread = f"{timing.low:.2f}-{timing.high:.2f}"
    return [f"{timing.median:.2f}", f"{timing.ratio:.2f}", spread, verdict]


HEADER = ("ms", "ratio", "quartiles", "goal")


def machine() -> None:
    """Prints what the figures were taken on."""
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__} on {device.platform} ({device.device_kind}), "
        f"{os.cpu_count()} cores, Python {platform.python_version()}"
    )
