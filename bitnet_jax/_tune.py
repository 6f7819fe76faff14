"""``python -m bitnet_jax doctor --tune``: whether other constants of the native product gain here.

Each instruction set was tuned on one processor; the sources of ``_native`` say where each
constant comes from. Three of them may be changed while the library runs, and none of them changes
a result: up to how many rows codes unpack in registers (``direct rows``), how many rows share one
unpacking (``slab``), and how much is unpacked at a time (``step rows``). Here products are timed
with every candidate in turn. What would be faster is printed, and nothing stays changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import _display, _native
from bitnet_jax._doctor import make_kernel, native_serves, seconds_of
from bitnet_jax._matmul import matmul, prepare
from bitnet_jax._packed.prepared import Prepared

_WHOLE = 1 << 40  # a step as long as the kernel, or as what is unpacked at most

# A median gain below this share is taken for noise.
_NOISE = 0.03

_HEADER = ("constant", "value", "rows of x", "ms here", "better here", "gain")


class Trial(NamedTuple):
    """What is tried for a constant, and the rows of x at which it decides something."""

    candidates: tuple[int, ...]
    rows: tuple[int, ...]


class Load(NamedTuple):
    """Sizes of the measurement."""

    side: int = 4096  # inputs and outputs of each kernel
    kernels: int = 6  # that a product goes through: 25 MB, more than most caches hold
    rounds: int = 7
    trials: Mapping[str, Trial] = {
        "direct rows": Trial((1, 2, 4, 8, 16, 32, 64), (2, 4, 8, 16, 32, 64)),
        "slab": Trial((32, 64, 128, 256, 512), (512,)),
        "step rows": Trial((16, 32, 64, _WHOLE), (64, 128)),
    }


class Advice(NamedTuple):
    """The best value of a constant, and the share of time that it saves over the one it has.

    Attributes:
      value: the one it has, or another that gains in three quarters of the rounds.
      low: the gain of the lower quartile of the rounds.
      gain: of the median.
      high: of the upper quartile.
    """

    value: int
    low: float
    gain: float
    high: float


def tune(load: Load | None = None) -> int:
    """Prints a table for each instruction set of this processor; returns the exit code."""
    if not native_serves():
        print("Nothing to tune: the native product is not in use here; see doctor.")
        return 1
    load = load or Load()
    stored = make_kernel(load.side)
    leaves = [prepare(stored, "cpu") for _ in range(load.kernels)]
    print(f"{load.kernels} ternary kernels of {load.side}x{load.side}, candidates in turn\n")
    for path in _native.load().paths():
        if path == "portable":  # it is there for its bits
            continue
        print(
            f"{path}\n\n{_display.table(_HEADER, list(_lines(path, leaves, load)))}\n", flush=True
        )
    print("Nothing was changed. Report a gain that comes back when you run this again.")
    return 0


def _lines(path: str, leaves: list[Prepared], load: Load) -> Iterator[Sequence[str]]:
    """A line for each constant of a path."""
    for constant, now in _native.load().tuning(path).items():
        trial = load.trials[constant]
        times = measure(path, constant, trial, leaves, load.rounds)
        value, low, gain, high = advise(times, now)
        own = 1e3 * np.median(times[now], axis=0).sum() / len(leaves)
        share = f"{100 * gain:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
        better = ("as it is", "") if value == now else (_shown(value), share)
        rows = ", ".join(map(str, trial.rows))
        yield constant, _shown(now), rows, f"{own:.2f}", *better


def _shown(value: int) -> str:
    return "whole" if value >= _WHOLE else str(value)


def measure(
    path: str, constant: str, trial: Trial, leaves: list[Prepared], rounds: int
) -> dict[int, np.ndarray]:
    """Seconds with each value that the path takes, its own first, as (rounds, rows of x)."""
    library = _native.load()
    now = library.tuning(path)[constant]
    programs = [_program(leaves, rows) for rows in trial.rows]
    try:
        library.choose(path)
        every = dict.fromkeys((now, *trial.candidates))
        values = [value for value in every if library.tune(path, constant, value)]
        times: dict[int, list[list[float]]] = {value: [] for value in values}
        for _ in range(1 + rounds):  # the first compiles
            for value in values:
                library.tune(path, constant, value)
                times[value].append([seconds_of(run) for run in programs])
    finally:
        library.tune(path, constant, now)
        library.choose(None)
    return {value: np.array(taken[1:]) for value, taken in times.items()}


def _program(leaves: list[Prepared], rows: int) -> Callable[[], Any]:
    """A product of so many rows with all kernels, one after the other."""

    @jax.jit
    def run(x: jax.Array, leaves: list[Prepared]) -> jax.Array:
        for leaf in leaves:
            x = matmul(x, leaf)
        return x

    x = np.random.default_rng(rows).standard_normal((rows, leaves[0].shape[0]), np.float32)
    return functools.partial(run, jnp.asarray(x), leaves)


def advise(times: Mapping[int, np.ndarray], now: int) -> Advice:
    """The fastest value; the one it has where no other is faster beyond noise.

    A round is compared with itself, since speed drifts, and all rows of x count alike.
    """
    ratios = {v: np.exp(np.log(taken / times[now]).mean(axis=1)) for v, taken in times.items()}
    best = min(ratios, key=lambda value: float(np.median(ratios[value])))
    low, middle, high = 1 - np.percentile(ratios[best], (75, 50, 25))
    if best == now or middle < _NOISE or low <= 0:
        return Advice(now, 0.0, 0.0, 0.0)
    return Advice(best, low, middle, high)
