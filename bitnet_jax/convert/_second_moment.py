"""The second moment of a kernel's inputs, checked, with what stands in where there is none."""

from __future__ import annotations

from typing import Literal

import numpy as np

from bitnet_jax import _checks
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.config import TernaryConfig
from bitnet_jax.convert._input_statistics import Statistics

Needs = Literal["nothing", "diagonal", "matrix"]
_ROUNDING = 1e-3  # of sqrt(h_ii h_jj): far above the rounding of any sum, far below a mistake


def require_operands(
    who: str, w: np.ndarray, statistics: Statistics, config: TernaryConfig, needs: Needs
) -> None:
    """Raises unless a canonical kernel, its statistics and its config are right for a method."""
    _checks.require_instance(who, "config", config, TernaryConfig, "Use bj.B158 or your own.")
    require_kernel(who, w)
    kernel_axes.require_whole_groups(who, "granularity", config.granularity, w.shape[1:2])
    require_statistics(who, w, statistics, needs)


def require_kernel(who: str, w: np.ndarray) -> None:
    """Raises unless it is a finite float32 kernel (B, K, N) with elements."""
    _checks.require_instance(who, "w", w, np.ndarray, "Pass np.asarray(w).")
    if w.dtype != np.float32 or w.ndim != 3 or w.size == 0:
        raise ValueError(
            f"{who}: `w` must be a float32 kernel (B, K, N) with elements, got "
            f"{_checks.describe(w)}. Bring its axes into this order and cast it."
        )
    if not np.isfinite(w).all():
        count = int(w.size - np.isfinite(w).sum())
        raise ValueError(
            f"{who}: `w` must be finite, got {count} NaN or infinite weights of {w.size}. "
            "Look for where the training went wrong."
        )


def require_statistics(who: str, w: np.ndarray, statistics: Statistics, needs: Needs) -> None:
    """Raises unless the statistics are sums over the inputs of this kernel."""
    slices, length, _ = w.shape
    tokens, moments = np.asarray(statistics.tokens), statistics.moments
    if tokens.shape != (slices,) or tokens.dtype.kind not in "iu" or (tokens < 0).any():
        raise ValueError(
            f"{who}: `tokens` must be ({slices},) integers >= 0, one for each slice, got "
            f"{_checks.describe(tokens)}: {tokens.tolist()}."
        )
    if moments is None:
        if needs != "nothing":
            raise ValueError(
                f"{who}: `moments` must be the {needs} of the inputs' second moment, got None. "
                "Collect it from batches, or choose a method that needs nothing ('survivors')."
            )
        return
    diagonal, matrix = (slices, length), (slices, length, length)
    if moments.shape != matrix and (needs == "matrix" or moments.shape != diagonal):
        wanted = f"{matrix}" if needs == "matrix" else f"{diagonal} or {matrix}"
        raise ValueError(
            f"{who}: `moments` must have shape {wanted}, got {moments.shape} for a kernel of "
            f"shape {w.shape}. Collect the {'matrix' if needs == 'matrix' else 'statistics'} of "
            "this kernel's inputs."
        )
    for b in range(slices):
        _require_moment(who, b, int(tokens[b]), moments[b])


def _require_moment(who: str, b: int, tokens: int, moment: np.ndarray) -> None:
    """Raises unless sums over the tokens of one slice can be such."""
    if not np.isfinite(moment).all():
        raise ValueError(
            f"{who}: `moments` of slice {b} must be finite, got NaN or infinity. An input of the "
            "kernel was not finite, or a sum overflowed: look at the batches."
        )
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    if (diagonal < 0).any():
        i = int(diagonal.argmin())
        raise ValueError(
            f"{who}: `moments` of slice {b} must be >= 0 on the diagonal, got {diagonal[i]:.3g} "
            f"for input {i}. They are sums of squares: take them before anything is subtracted."
        )
    if tokens == 0 and diagonal.any():
        raise ValueError(
            f"{who}: `moments` of slice {b} must be 0 where `tokens` is 0, got up to "
            f"{diagonal.max():.3g}. Count the tokens that were summed."
        )
    if moment.ndim == 2:
        _require_gram(who, b, moment, np.sqrt(diagonal))


def _require_gram(who: str, b: int, moment: np.ndarray, norm: np.ndarray) -> None:
    """Raises unless a matrix can hold the inner products of vectors of these norms."""
    rows = max(1, 2**21 // len(moment))  # so many at a time: the matrix may be large
    for first in range(0, len(moment), rows):
        part = slice(first, first + rows)
        most = norm[part, None] * norm
        if (np.abs(moment[part] - moment[:, part].T) > _ROUNDING * most).any():
            raise ValueError(
                f"{who}: `moments` of slice {b} must be symmetric, as sums of x_i x_j are. Sum "
                "x^T x over the tokens."
            )
        if (np.abs(moment[part]) > (1 + _ROUNDING) * most).any():
            raise ValueError(
                f"{who}: `moments` of slice {b} must have |h_ij| <= sqrt(h_ii h_jj), as sums of "
                "x_i x_j have. Sum x^T x over the tokens."
            )


def diagonal(statistics: Statistics, b: int, length: int) -> np.ndarray:
    """The mean of x_i**2 up to a factor, (K,) float64; ones where nothing is known."""
    moments = statistics.moments
    if moments is None or stands_in(statistics, b):
        return np.ones(length)
    found = moments[b] if moments.ndim == 2 else moments[b].diagonal()
    return found.astype(np.float64) / found.max()


def value(statistics: Statistics, b: int, length: int) -> np.ndarray:
    """The second moment of one slice, a matrix or a diagonal; ones where nothing is known."""
    moments = statistics.moments
    if moments is None or moments.ndim == 2 or stands_in(statistics, b):
        return diagonal(statistics, b, length)
    return moments[b]


def stands_in(statistics: Statistics, b: int) -> bool:
    """Whether a slice has seen nothing but zeros, or nothing: the identity stands in."""
    return statistics.moments is not None and not statistics.moments[b].any()


def notes(statistics: Statistics, b: int, length: int) -> list[str]:
    """What is unusual about the inputs of one slice."""
    moments, tokens = statistics.moments, int(statistics.tokens[b])
    if moments is None:
        return []
    if stands_in(statistics, b):
        seen = f"{tokens} tokens, all inputs 0" if tokens else "no tokens"
        return [f"slice {b}: {seen}; all inputs weigh the same"]
    found = []
    dead = length - int(np.count_nonzero(diagonal(statistics, b, length)))
    if dead:
        found.append(
            f"slice {b}: {dead} of {length} inputs were always 0; their codes are the nearest"
        )
    if moments.ndim == 3 and tokens < length - dead:
        found.append(
            f"slice {b}: {tokens} tokens for {length - dead} inputs; damping decides the rest"
        )
    return found
