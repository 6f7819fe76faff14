"""Scales of several ternary planes, by turns with their codes, from one sort of each group.

The error of a group of weights w with codes c_p, scales s_p and weights h >= 0 of the inputs is
``sum h (w - sum_p s_p c_p)**2`` [1]. For given scales the best codes are the nearest values of
``_plane_grid``, which cut the sorted \\|w\\| into one run for each value. For given codes the
best scales solve ``C^T h C s = C^T h w``, both sides sums over these runs of h and of h \\|w\\|.
So a turn costs a search for each value in prefix sums, however long the group is, and many turns
from several starts are cheap. No turn raises the error: the best is kept, and a group is done when
a turn lowers its error no more.

Where turns end depends on where they begin. Beginnings are the best single plane with the best
one for the rest, and so on, and a few multiples of the best single scale.

References:
  [1] PTQTP, arXiv:2509.16989; its ridge is here the rule of ``_plane_grid.solved`` for planes that
      are alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitnet_jax.convert import _best_scale
from bitnet_jax.convert._best_scale import Granularity, best_scales, group_size
from bitnet_jax.convert._plane_grid import grid_of, lowered, solved

# The largest scale over the best single one, and each scale over the one before.
_STARTS = ((1.0, 0.6), (1.3, 0.6), (1.3, 0.35), (1.6, 0.6))
_FIRST_TURNS = 3  # of each beginning
_TURNS = 50  # of the best
_ENOUGH = 1e-12  # of what is lowered


def plane_scales(
    w: np.ndarray, weight: np.ndarray, granularity: Granularity, eps: float, planes: int
) -> np.ndarray:
    """The scales of least weighted squared error of one plane, and very small of several.

    Args:
      w: (K, N) float32.
      weight: (K,) float64, >= 0: what an error of each input costs. A group in which all are
        0 is taken as if all were 1.
      granularity: what shares its scales, as in a ``TernaryConfig``.
      eps: the smallest scale.
      planes: P.

    Returns:
      (P, G, 1 or N) float32, the largest first.
    """
    if planes == 1:
        return best_scales(w, weight, granularity, eps)[None]
    size = group_size(granularity, len(w))
    across = 1 if granularity == "tensor" else w.shape[1]
    scale = np.empty((planes, len(w) // size, across), np.float32)
    for g, columns, keys, own in _best_scale.groups(w, weight, granularity):
        scale[:, g, columns] = _best_of_group(keys, own, eps, planes)
    return scale


class _Sorted(NamedTuple):
    """Groups of n outputs, sorted, with sums of what is at most as large."""

    keys: np.ndarray  # (n m,) uint64: output and magnitude in one integer, ascending
    weight: np.ndarray  # (n, m + 1) float64
    along: np.ndarray  # (n, m + 1) float64, of h |w|


def _best_of_group(keys: np.ndarray, weight: np.ndarray, eps: float, planes: int) -> np.ndarray:
    """Scales (P, n) of keys (m, n), which are sorted in place."""
    magnitude, h = _points(keys, weight)
    found = _prefix_sums(magnitude, h)
    single = _single(found, eps)
    starts = [_plane_by_plane(magnitude, h, single, eps, planes)]
    for factor, ratio in _STARTS:
        steps = factor * ratio ** np.arange(planes)
        starts.append(np.maximum(single * steps[:, None], eps))
    scale, most = _turns(found, starts[0], eps, _FIRST_TURNS)
    for start in starts[1:]:
        other, lower = _turns(found, start, eps, _FIRST_TURNS)
        scale = np.where(lower > most, other, scale)
        most = np.maximum(lower, most)
    return _turns(found, scale, eps, _TURNS)[0]


def _points(keys: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes (n, m) float32, ascending, and their weights.

    Of a group with more weights than are worked on at once, neighbours in this order become one
    of their mean and of the sum of their weights.
    """
    keys = np.ascontiguousarray(keys.T)
    keys.sort(axis=1)
    run = -(-keys.size // _best_scale.AT_ONCE)
    parts = []
    for part in _best_scale.blocks(keys.shape[1], run * max(1, _best_scale.AT_ONCE // (8 * run))):
        magnitude, h = _best_scale.unpacked(keys[:, part], weight)
        if run > 1:
            first = np.arange(0, magnitude.shape[1], run)
            total = np.add.reduceat(h, first, axis=1)
            mean = np.add.reduceat(h * magnitude, first, axis=1)
            np.divide(mean, total, out=mean, where=total > 0)
            magnitude, h = np.where(total > 0, mean, magnitude[:, first]).astype(np.float32), total
        parts.append((magnitude, h))
    magnitude, h = (np.hstack(of) for of in zip(*parts, strict=True))
    return magnitude, h


def _prefix_sums(magnitude: np.ndarray, h: np.ndarray) -> _Sorted:
    keys = np.arange(len(magnitude), dtype=np.uint64)[:, None] << np.uint64(32)
    keys = keys | magnitude.view(np.uint32)
    sums = np.zeros((2, len(h), h.shape[1] + 1))
    np.cumsum(h, axis=1, out=sums[0, :, 1:])
    np.cumsum(h * magnitude, axis=1, out=sums[1, :, 1:])
    return _Sorted(keys.reshape(-1), *sums)


def _single(found: _Sorted, eps: float) -> np.ndarray:
    """The best scale of one plane, (n,) float64: see ``_best_scale``."""
    a, m = (sums[:, -1:] - sums[:, :-1] for sums in (found.along, found.weight))
    s = np.maximum(np.divide(a, m, out=np.zeros_like(a), where=m > 0), eps)
    top = (s * (2 * a - s * m)).argmax(axis=1)
    return s[np.arange(len(s)), top]


def _plane_by_plane(
    magnitude: np.ndarray, h: np.ndarray, single: np.ndarray, eps: float, planes: int
) -> np.ndarray:
    """The best single scale, then the best for the rest, and so on: (P, n) float64."""
    scale = [single]
    for _ in range(planes - 1):
        own = scale[-1].astype(np.float32)[:, None]
        magnitude = np.abs(magnitude - own * (magnitude > own * np.float32(0.5)))
        order = np.argsort(magnitude, axis=1, kind="stable")
        magnitude, h = (np.take_along_axis(each, order, axis=1) for each in (magnitude, h))
        scale.append(_single(_prefix_sums(magnitude, h), eps))
    return np.stack(scale)


def _turns(
    found: _Sorted, scale: np.ndarray, eps: float, turns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scales (P, n) after so many turns, and how much they lower the error of each output."""
    best, most = scale.copy(), np.full(scale.shape[1], -np.inf)
    going = np.arange(scale.shape[1])
    for _ in range(turns):
        scale = np.sort(scale, axis=0)[::-1]
        square, along = _equations(found, going, scale)
        less, more = lowered(square, along, scale)
        better = less - more - most[going] > _ENOUGH * less
        going, scale, along = going[better], scale[:, better], along[:, better]
        square = square[..., better]
        if not going.size:
            break
        best[:, going], most[going] = scale, (less - more)[better]
        rest = along - (square * scale).sum(axis=1)
        scale = np.maximum(np.abs(scale + solved(square, rest)), eps)
    return best, most


def _equations(
    found: _Sorted, columns: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``C^T h C`` (P, P, n) and ``C^T h w`` (P, n) of the nearest codes for scales (P, n)."""
    values = grid_of(scale.astype(np.float32))
    high = columns.astype(np.uint64) << np.uint64(32)
    wanted = (high | values.half.view(np.uint32)).T  # (n, L - 1): ascending as a whole
    last = np.searchsorted(found.keys, wanted.reshape(-1), side="right").reshape(wanted.shape)
    last -= columns[:, None] * (found.weight.shape[1] - 1)
    ends = np.hstack([np.zeros_like(last[:, :1]), last, np.full_like(last[:, :1], -1)])
    weight, along = (np.diff(sums[columns[:, None], ends]).T for sums in found[1:])
    codes = values.code
    square = np.empty((len(scale), *scale.shape))
    for p, q in np.ndindex(square.shape[:2]):
        square[p, q] = (codes[p] * codes[q] * weight).sum(axis=0)
    return square, (codes * along).sum(axis=1)
