"""Scales of a kernel for codes that are fixed: least squares against the second moment.

The error of an output, ``(w - C s)^T H (w - C s)`` with a column of C for each of its groups in
each plane, is least where ``C^T H C s = C^T H w``. Solved as a change d of the scales from the
residual r: ``(C^T H C + damping C^T C) d = C^T (H + damping) r``. Groups are taken 32 at a time,
over all planes: beyond these, one run's after another's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bitnet_jax.convert._gptq import column_blocks, mean_square
from bitnet_jax.convert._plane_grid import combined

_RUN = 32  # scales of an output that are solved together: the work grows with its square
_RIDGE = 1e-6  # of the square of each plane but the first: their codes may be alike


class _Equations(NamedTuple):
    """Least squares of n outputs in u = P g scales each, plane by plane."""

    square: np.ndarray  # (n, u, u) C^T H C
    along: np.ndarray  # (n, u) C^T H r
    filled: np.ndarray  # (n, u, u) C^T C
    drift: np.ndarray  # (n, u) C^T r


def refitted(
    w: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    moment: np.ndarray,
    damping: float,
    eps: float,
) -> np.ndarray:
    """Scales (P, G, 1 or N) float32, each output's new ones where they lower its error.

    Where a new scale would be below eps, an output keeps its old ones. Never a larger error
    by ``moment`` alone, damping left out, but for float32's rounding.

    Args:
      w: (K, N) float32.
      codes: (P, K, N) int8.
      scale: (P, G, 1 or N) float32.
      moment: (K, K) float64, the second moment of the inputs.
      damping: times the mean of its diagonal, what is added to it.
      eps: the smallest scale.
    """
    h = np.empty(moment.shape, np.float32)
    np.divide(moment, mean_square(moment), out=h, casting="same_kind")
    if scale.shape[2] < w.shape[1]:
        parts = []
        for columns in column_blocks(*w.shape):
            c = codes[:, :, columns].astype(np.float32)
            r = w[:, columns] - combined(c, scale)
            parts.append(_equations(h, c, r, slice(0, 1), len(w)))
        fields = zip(*parts, strict=True)
        total = _Equations(*(np.concatenate(of).sum(axis=0, keepdims=True) for of in fields))
        return scale + _steps(total, scale, damping, eps)
    scale = scale.copy()
    for columns in column_blocks(*w.shape):
        _refit(h, w[:, columns], codes[:, :, columns], scale[:, :, columns], damping, eps)
    return scale


def _refit(
    h: np.ndarray, w: np.ndarray, codes: np.ndarray, scale: np.ndarray, damping: float, eps: float
) -> None:
    """Refits scales (P, G, n) in place, a run of groups after another."""
    planes, groups, _ = scale.shape
    size = len(w) // groups
    c = codes.astype(np.float32)
    r = w - combined(c, np.repeat(scale, size, axis=1))
    length = max(1, _RUN // planes)
    for first in range(0, groups, length):
        run = slice(first, min(first + length, groups))
        step = _steps(_equations(h, c, r, run, size), scale[:, run], damping, eps)
        scale[:, run] += step
        rows = slice(run.start * size, run.stop * size)
        r[rows] -= combined(c[:, rows], np.repeat(step, size, axis=1))


def _equations(h: np.ndarray, c: np.ndarray, r: np.ndarray, run: slice, size: int) -> _Equations:
    """The equations of a run of groups, from codes (P, K, n) and residuals (K, n)."""
    rows = slice(run.start * size, run.stop * size)
    planes, groups, width = len(c), run.stop - run.start, c.shape[2]

    def by_group(v: np.ndarray) -> np.ndarray:
        return v.reshape(-1, size, width).sum(axis=1, dtype=np.float64)

    square = np.empty((planes, groups, planes, groups, width))
    for p, g in np.ndindex(planes, groups):
        own = slice(rows.start + g * size, rows.start + (g + 1) * size)
        onward = slice(own.start, rows.stop)
        met = h[onward, own] @ c[p, own]
        for q in range(planes):
            square[p, g, q, g:] = square[q, g:, p, g] = by_group(met * c[q, onward])
    pull = h[rows] @ r
    along = np.stack([by_group(plane * pull) for plane in c[:, rows]])
    drift = np.stack([by_group(plane * r[rows]) for plane in c[:, rows]])
    filled = np.zeros_like(square)
    for p, q in np.ndindex(planes, planes):
        filled[p, range(groups), q, range(groups)] = by_group(c[p, rows] * c[q, rows])
    unknowns = planes * groups
    square, filled = (
        each.reshape(unknowns, unknowns, width).transpose(2, 0, 1) for each in (square, filled)
    )
    along, drift = (each.reshape(unknowns, width).T for each in (along, drift))
    return _Equations(square, along, filled, drift)


def _steps(found: _Equations, scale: np.ndarray, damping: float, eps: float) -> np.ndarray:
    """Changes (P, g, n) float32 of scales; 0 for the outputs that they would not serve."""
    square, along, filled, drift = found
    old = scale.reshape(along.shape[1], -1).T
    diagonal = np.arange(along.shape[1])
    system = square + damping * filled
    own = system[:, diagonal, diagonal]
    own += filled[:, diagonal, diagonal] == 0  # a group without codes gets no change
    own[:, scale.shape[1] :] *= 1 + _RIDGE
    system[:, diagonal, diagonal] = own
    step = np.linalg.solve(system, (along + damping * drift)[..., None])[..., 0]
    new = (old + step).astype(np.float32)
    step = new.astype(np.float64) - old
    lowered = 2 * (step * along).sum(axis=1) - np.einsum("ng,ngh,nh->n", step, square, step)
    serves = (lowered > 0) & (new >= eps).all(axis=1)
    return np.where(serves[:, None], new - old, 0).T.reshape(scale.shape)
