"""The squares of a kernel's outputs over the tokens that it saw, from their second moment."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.linalg import blas

from bitnet_jax.convert import _second_moment
from bitnet_jax.convert._input_statistics import Statistics

_AT_ONCE = 2**20  # weights that are worked on together: 8 MiB, and a few copies
_LARGE = 2**33  # products from which on float32 takes them; their sums stay float64


def output_square(h: np.ndarray, w: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> float:
    """``tr(R^T H R)`` of the rest R, a kernel less its codes times scales.

    Args:
      h: the second moment of the inputs, (K, K), or its diagonal, (K,).
      w: (K, N) float32.
      codes: (P K, N) int8, plane by plane.
      scale: (P G, 1 or N) float32.
    """
    length, width = w.shape
    if h.ndim == 1:
        parts = (h @ np.square(r).sum(axis=1) for r in _rests(w, codes, scale, np.float64))
        return float(sum(parts))
    # R R^T first: it is symmetric, so half of its products will do.
    large = length * length * width > _LARGE
    dtype = np.float32 if large else np.float64
    (syrk,) = blas.get_blas_funcs(("syrk",), dtype=dtype)
    gram = np.zeros((length, length), dtype, order="F")
    for rest in _rests(w, codes, scale, dtype):
        gram = syrk(1.0, rest.T, beta=1.0, c=gram, trans=1, lower=1, overwrite_c=1)
    total = 0.0
    for j in range(length):
        column = h[j, j:] * gram[j:, j]
        total += 2 * column.sum() - column[0]
    return float(max(total, 0.0))


def whole_squares(w: np.ndarray, statistics: Statistics) -> np.ndarray:
    """``tr(W^T H W)`` of each slice of a kernel (B, K, N): the squares of its own outputs."""
    nothing = np.zeros(w.shape[1:], np.int8), np.zeros((1, 1), np.float32)
    moments = (_second_moment.value(statistics, b, w.shape[1]) for b in range(len(w)))
    return np.array([output_square(h, own, *nothing) for h, own in zip(moments, w, strict=True)])


def _rests(
    w: np.ndarray, codes: np.ndarray, scale: np.ndarray, dtype: type
) -> Iterator[np.ndarray]:
    """A kernel less its codes times scales, some outputs at a time."""
    width = max(1, _AT_ONCE // len(w))
    size = len(codes) // len(scale)
    for first in range(0, w.shape[1], width):
        part = slice(first, first + width)
        own = (scale if scale.shape[1] == 1 else scale[:, part]).astype(dtype)
        made = codes[:, part] * np.repeat(own, size, axis=0)
        rest = w[:, part].astype(dtype)
        for plane in made.reshape(-1, *rest.shape):
            rest -= plane
        yield rest
