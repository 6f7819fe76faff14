"""The values that codes and scales of one plane or of several can make.

With planes p = 1, 2, ... a weight is ``v = sum_p s_p c_p``, c_p in {-1, 0, +1}: 3**P values,
which lie evenly about 0. For given scales the best code of a weight is the nearest value, whatever
the weight of its input: a squared error of one weight has no part in that of another.

A value is told by its index in rising order of \\|v\\|, with the sign of v. With one plane this
index is the code.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

from bitnet_jax.convert._best_scale import nearest

_ALIKE = 1e-6  # a plane of which this part of its square is its own says nothing of its scale


class Grid(NamedTuple):
    """The values >= 0 of the planes of n outputs, in rising order.

    Attributes:
      scale: (P, n) float32.
      value: (L, n) float32, L = (3**P + 1) / 2; the first is 0.
      half: (L - 1, n) float32, halfway from each value to the next.
      code: (P, L, n) int8, of each value.
    """

    scale: np.ndarray
    value: np.ndarray
    half: np.ndarray
    code: np.ndarray

    def indices(self, w: np.ndarray) -> np.ndarray:
        """Signed indices (..., n) int8 of the values nearest to w; halfway is the smaller."""
        if len(self.scale) == 1:
            return nearest(w, self.scale[0])
        size = np.abs(w)
        found = np.zeros(w.shape, np.int8)
        for half in self.half:
            found += (size > half).view(np.int8)
        return np.negative(found, out=found, where=w < 0)

    def row(self, index: np.ndarray) -> np.ndarray:
        """Values (n,) float32 of the indices of one row."""
        if len(self.scale) == 1:
            return self.scale[0] * index
        size = np.abs(index).astype(np.intp)
        width = self.value.shape[1]
        if width > 1:
            size *= width
            size += np.arange(width)
        return np.copysign(self.value.take(size), index)

    def codes(self, index: np.ndarray) -> np.ndarray:
        """Codes (P, k, n) int8 of indices (k, n)."""
        if len(self.scale) == 1:
            return index[None]
        size, sign = np.abs(index).astype(np.intp), np.sign(index)
        return np.stack([np.take_along_axis(code, size, axis=0) * sign for code in self.code])


def grid_of(scale: np.ndarray) -> Grid:
    """The grid of scales (P, n) > 0."""
    code = np.repeat(_codes(len(scale))[:, :, None], scale.shape[1], axis=2)
    value = combined(code, scale[:, None])
    code = np.where(value < 0, -code, code)
    order = np.argsort(np.abs(value), axis=0, kind="stable")
    value = np.take_along_axis(np.abs(value), order, axis=0)
    code = np.take_along_axis(code, order[None], axis=1)
    step = value * np.float32(0.5)
    return Grid(scale, value, step[1:] + step[:-1], code)


def combined(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes (P, ...) times scales (P, ...), summed over the planes in order."""
    total = scale[0] * codes[0]
    for own, code in zip(scale[1:], codes[1:], strict=True):
        total = total + own * code
    return total


def largest_first(codes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (P, K, n) and scales (P, G, 1 or n) with the planes of each group by falling scale."""
    if (scale[:-1] >= scale[1:]).all():
        return codes, scale
    order = np.argsort(-scale, axis=0, kind="stable")
    grouped = codes.reshape(*scale.shape[:2], -1, codes.shape[2])
    grouped = np.take_along_axis(grouped, order[:, :, None], axis=0)
    return grouped.reshape(codes.shape), np.take_along_axis(scale, order, axis=0)


def solved(square: np.ndarray, along: np.ndarray) -> np.ndarray:
    """The d (P, ...) of least error ``d^T square d - 2 d along``, by elimination.

    A plane whose codes are nearly a sum of those before it, or all 0, gets 0: the limit of a
    ridge that vanishes, and no other plane moves for it.

    Args:
      square: (P, P, ...) float64, symmetric in its first two axes, no eigenvalue below 0.
      along: (P, ...) float64.
    """
    left, d = square.copy(), along.copy()
    planes = range(len(along))
    pivots = []
    for p in planes:
        pivots.append(np.where(left[p, p] > _ALIKE * square[p, p], left[p, p], np.inf))
        for q in planes[p + 1 :]:
            factor = left[q, p] / pivots[p]
            left[q] -= factor * left[p]
            d[q] -= factor * d[p]
    for p in reversed(planes):
        for q in planes[p + 1 :]:
            d[p] -= left[p, q] * d[q]
        d[p] /= pivots[p]
    return d


def lowered(square: np.ndarray, along: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``2 d along`` and ``d^T square d``, summed over the planes: each (...) float64."""
    products = d[:, None] * d[None]
    return 2 * (along * d).sum(axis=0), (square * products).sum(axis=(0, 1))


@functools.cache
def _codes(planes: int) -> np.ndarray:
    """Codes (P, L) int8: none, and those whose first code other than 0 is +1."""
    every = itertools.product((0, 1, -1), repeat=planes)
    return np.array([c for c in every if next(filter(None, c), 1) == 1], np.int8).T
