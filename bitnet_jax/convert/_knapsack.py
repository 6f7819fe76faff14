"""The multiple-choice knapsack: one option for each item, the least cost that a size allows.

Kernels are added one by one. Of all sums of sizes and costs so far only those are kept that no
other undercuts in both, so the last list holds every trade-off there is, and the choice is exact.
Where more than ``MOST`` sums survive, sizes are counted in units of ``limit / MOST``, rounded up:
then no choice of size ``limit - n * unit`` costs less, n the number of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST = 2**17

# The sizes and the costs of one item's options.
Item = tuple[Sequence[int], Sequence[float]]


class _Sums(NamedTuple):
    """Sums that no other undercuts, sizes rising and costs falling.

    Attributes:
      sizes: of the options that were chosen.
      costs: theirs.
      parents: the number of each sum's part without the last item.
      options: the last item's option in it.
    """

    sizes: np.ndarray
    costs: np.ndarray
    parents: np.ndarray
    options: np.ndarray


def cheapest(items: Sequence[Item], limit: int) -> list[int] | None:
    """The number of the option of each item; None where even the smallest are too large."""
    if sum(min(sizes) for sizes, _ in items) > limit:
        return None
    found = _chosen(items, limit, 1)
    return found if found is not None else _chosen(items, limit, -(-limit // MOST))


def _chosen(items: Sequence[Item], limit: int, unit: int) -> list[int] | None:
    """The choice in units; None where exact sums are too many, or units too coarse."""
    counts = [np.asarray([-(-size // unit) for size in sizes], np.int64) for sizes, _ in items]
    least = [int(count.min()) for count in counts]
    room = limit // unit - sum(least)
    if room < 0:
        return None
    sums = _Sums(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, int), np.zeros(1, int))
    steps = []
    for count, low, (_, costs) in zip(counts, least, items, strict=True):
        sums = _undercut(sums, count - low, np.asarray(costs, np.float64), room)
        if unit == 1 and len(sums.sizes) > MOST:
            return None
        steps.append(sums)
    choice, at = [], len(sums.costs) - 1  # costs fall: the last is the least
    for step in reversed(steps):
        choice.append(int(step.options[at]))
        at = int(step.parents[at])
    return choice[::-1]


def _undercut(sums: _Sums, sizes: np.ndarray, costs: np.ndarray, room: int) -> _Sums:
    """The sums with one more item, those that fit and that no other undercuts."""
    every = (sums.sizes[:, None] + sizes).reshape(-1)
    total = (sums.costs[:, None] + costs).reshape(-1)
    order = np.lexsort((total, every))
    order = order[every[order] <= room]
    before = np.concatenate([[np.inf], np.minimum.accumulate(total[order])[:-1]])
    order = order[total[order] < before]
    return _Sums(every[order], total[order], order // len(sizes), order % len(sizes))
