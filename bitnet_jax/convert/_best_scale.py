"""The scale and the codes of least squared error, exactly, from one sort.

The error of a group of weights w with codes c, scale s and weights h >= 0 of the inputs is
``sum h (w - s c)**2``.

1. For a given s, weight i adds ``h (|w| - s)**2`` if it is kept and ``h w**2`` if it is not. So
   it is kept where ``|w| > s / 2``, whatever its h: the best codes keep the k largest \\|w\\|.
2. For given codes the error is a parabola in s: keeping the k largest lowers it by
   ``2 s a - s**2 m`` with ``a = sum h |w|`` and ``m = sum h`` over those. Its top is at
   ``s = a / m``, or at eps where that is larger, and there it is ``a**2 / m``.

So the best of the K candidates is the optimum over all 3**K codes and all scales >= eps. With
h = 1 it is the optimum for the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

AT_ONCE = 2**20  # candidates that are looked at together


Granularity = Literal["tensor", "channel"] | int


def group_size(granularity: Granularity, length: int) -> int:
    """How many weights of a contraction share a scale."""
    return granularity if isinstance(granularity, int) else length


def best_scales(
    w: np.ndarray, weight: np.ndarray, granularity: Granularity, eps: float
) -> np.ndarray:
    """The scales of least weighted squared error.

    Args:
      w: (K, N) float32.
      weight: (K,) float64, >= 0: what an error of each input costs. A group in which all are
        0 is taken as if all were 1.
      granularity: what shares a scale, as in a ``TernaryConfig``.
      eps: the smallest scale.

    Returns:
      (G, 1 or N) float32.
    """
    size = group_size(granularity, len(w))
    across = 1 if granularity == "tensor" else w.shape[1]
    scale = np.empty((len(w) // size, across), np.float32)
    for g, columns, keys, own in groups(w, weight, granularity):
        scale[g, columns] = _best(keys, own, eps)
    return scale


def groups(
    w: np.ndarray, weight: np.ndarray, granularity: Granularity
) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    """What shares scales, some outputs at a time: group, columns, :func:`_keys`, weights."""
    if granularity == "tensor":
        yield 0, slice(0, 1), _keys(w).reshape(-1, 1), _alive(weight)
        return
    size = group_size(granularity, len(w))
    for g in range(len(w) // size):
        part = slice(g * size, (g + 1) * size)
        for columns in blocks(w.shape[1], max(1, AT_ONCE // size)):
            yield g, columns, _keys(w[part, columns]), _alive(weight[part])


def unpacked(keys: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes, float32, and their weights, float64, of keys."""
    magnitude = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return magnitude, weight[keys.astype(np.uint32)]


def nearest(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes of the nearest of -s, 0 and s; (..., n) int8. Halfway between is 0."""
    half = scale * np.float32(0.5)
    return (w > half).view(np.int8) - (w < -half).view(np.int8)


def _alive(weight: np.ndarray) -> np.ndarray:
    return weight if weight.any() else np.ones_like(weight)


def blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, length, size))


def _keys(w: np.ndarray) -> np.ndarray:
    """Magnitude and row in one integer, (K, N) uint64: they sort as the magnitudes do."""
    keys = np.empty(w.shape, np.uint64)
    for rows in blocks(len(w), max(1, AT_ONCE // w.shape[1])):
        # Bits of floats >= 0 are in the order of the floats.
        keys[rows] = np.abs(w[rows]).view(np.uint32)
    keys <<= np.uint64(32)
    keys |= np.arange(len(w), dtype=np.uint64)[:, None]
    return keys


def _best(keys: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """The best scale of each column of keys (K, N), which are sorted in place; (N,) float64."""
    keys = np.ascontiguousarray(keys.T)
    keys.sort(axis=1)
    keys = keys[:, ::-1]
    across = np.arange(len(keys))
    scale, most = np.full(len(keys), eps), np.zeros(len(keys))
    a = m = np.zeros((len(keys), 1))
    for part in blocks(keys.shape[1], max(1, AT_ONCE // len(keys))):
        magnitude, h = unpacked(keys[:, part], weight)
        # Sums over the weights so far, the last of the part before first.
        a = np.cumsum(np.hstack([a[:, -1:], h * magnitude]), axis=1)
        m = np.cumsum(np.hstack([m[:, -1:], h]), axis=1)
        s = np.maximum(np.divide(a, m, out=np.zeros_like(a), where=m > 0), eps)
        lowered = s * (2 * a - s * m)
        top = lowered.argmax(axis=1)
        better = lowered[across, top] > most
        scale = np.where(better, s[across, top], scale)
        most = np.where(better, lowered[across, top], most)
    return scale
