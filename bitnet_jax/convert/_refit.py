"""Scales of a kernel for codes that are fixed: least squares against the second moment.

The error of an output, ``(w - C s)^T H (w - C s)`` with a column of C for each of its groups, is
least where ``C^T H C s = C^T H w``. Solved as a change d of the scales from the residual r:
``(C^T H C + damping C^T C) d = C^T (H + damping) r``. Groups are taken 32 at a time:
beyond these, one run's after another's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitnet_jax.convert._gptq import column_blocks, mean_square

_RUN = 32  # groups that are solved together: the work grows with its square


class _Equations(NamedTuple):
    """Least squares of n outputs in g scales each."""

    square: np.ndarray  # (n, g, g) C^T H C
    along: np.ndarray  # (n, g) C^T H r
    filled: np.ndarray  # (n, g) C^T C, which is diagonal
    drift: np.ndarray  # (n, g) C^T r


def refitted(
    w: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    moment: np.ndarray,
    damping: float,
    eps: float,
) -> np.ndarray:
    """Scales (G, 1 or N) float32, each output's new ones where they lower its error.

    Where a new scale would be below eps, an output keeps its old ones. Never a larger error
    by ``moment`` alone, damping left out, but for float32's rounding.
    """
    h = np.empty(moment.shape, np.float32)
    np.divide(moment, mean_square(moment), out=h, casting="same_kind")
    if scale.shape[1] < w.shape[1]:
        parts = []
        for columns in column_blocks(*w.shape):
            c = codes[:, columns].astype(np.float32)
            parts.append(_equations(h, c, w[:, columns] - c * scale, slice(0, 1), len(w)))
        fields = zip(*parts, strict=True)
        total = _Equations(*(np.concatenate(of).sum(axis=0, keepdims=True) for of in fields))
        return scale + _steps(total, scale, damping, eps)
    scale = scale.copy()
    for columns in column_blocks(*w.shape):
        _refit(h, w[:, columns], codes[:, columns], scale[:, columns], damping, eps)
    return scale


def _refit(
    h: np.ndarray, w: np.ndarray, codes: np.ndarray, scale: np.ndarray, damping: float, eps: float
) -> None:
    """Refits scales (G, n) in place, a run of groups after another."""
    size = len(w) // len(scale)
    c = codes.astype(np.float32)
    r = w - c * np.repeat(scale, size, axis=0)
    for first in range(0, len(scale), _RUN):
        run = slice(first, min(first + _RUN, len(scale)))
        step = _steps(_equations(h, c, r, run, size), scale[run], damping, eps)
        scale[run] += step
        rows = slice(run.start * size, run.stop * size)
        r[rows] -= c[rows] * np.repeat(step, size, axis=0)


def _equations(h: np.ndarray, c: np.ndarray, r: np.ndarray, run: slice, size: int) -> _Equations:
    """The equations of a run of groups, from codes and residuals (K, n)."""
    rows = slice(run.start * size, run.stop * size)
    groups, width = run.stop - run.start, c.shape[1]

    def by_group(v: np.ndarray) -> np.ndarray:
        return v.reshape(-1, size, width).sum(axis=1, dtype=np.float64)

    square = np.empty((groups, groups, width))
    for g in range(groups):
        own = slice(rows.start + g * size, rows.start + (g + 1) * size)
        onward = slice(own.start, rows.stop)
        met = h[onward, own] @ c[own]
        met *= c[onward]
        square[g, g:] = square[g:, g] = by_group(met)
    along = by_group(c[rows] * (h[rows] @ r))
    filled, drift = by_group(np.abs(c[rows])), by_group(c[rows] * r[rows])
    return _Equations(square.transpose(2, 0, 1), along.T, filled.T, drift.T)


def _steps(found: _Equations, scale: np.ndarray, damping: float, eps: float) -> np.ndarray:
    """Changes (g, n) float32 of scales (g, n); 0 for the outputs that they would not serve."""
    square, along, filled, drift = found
    ridge = damping * filled + (filled == 0)  # a group without codes gets no change
    system = square + ridge[:, :, None] * np.eye(filled.shape[1])
    step = np.linalg.solve(system, (along + damping * drift)[..., None])[..., 0]
    new = (scale.T + step).astype(np.float32)
    step = new.astype(np.float64) - scale.T
    lowered = 2 * (step * along).sum(axis=1) - np.einsum("ng,ngh,nh->n", step, square, step)
    serves = (lowered > 0) & (new >= eps).all(axis=1)
    return np.where(serves[:, None], new - scale.T, 0).T
