"""Factors of norms, and the leaves that they change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bitnet_jax._transform.norms import Norm
from bitnet_jax._transform.probe import Wanted
from bitnet_jax._tree.leaves import Leaf
from bitnet_jax._tree.select import Path

WHO = "smooth"


class Fold(NamedTuple):
    """A norm that can be divided, and what is known of the inputs behind it.

    Attributes:
      norm: its vectors and its kernels.
      peaks: (K,) float64, or (L, K) of stacked ones, the largest ``|x_j|``.
      factors: as the peaks.
    """

    norm: Norm
    peaks: np.ndarray
    factors: np.ndarray


def fold_of(
    norm: Norm,
    peaks: Mapping[Path, np.ndarray],
    wanted: Mapping[Path, Wanted],
    leaves: Mapping[Path, Leaf],
    alpha: float,
) -> Fold:
    """The factors of one norm."""
    inputs, rows, stack = [], [], norm.stacked
    for path, axis in norm.kernels:
        contracting = wanted[path].axes.contracting
        lengths = [wanted[path].shape[a] for a in contracting]
        lead = wanted[path].shape[:1] if norm.stacked else (1,)
        each = peaks[path].reshape(*lead, -1, *lengths)
        inputs.append(_largest(each, stack, 2 + contracting.index(axis)))
        rows.append(_largest(np.abs(np.asarray(leaves[path].value, np.float64)), stack, axis))
    x, w = np.max(inputs, axis=0), np.max(rows, axis=0)
    alive = (x > 0) & (w > 0)
    factors = np.ones(x.shape)
    factors[alive] = x[alive] ** alpha / w[alive] ** (1 - alpha)
    return Fold(norm, x, factors)


def _largest(values: np.ndarray, stacked: bool, axis: int) -> np.ndarray:
    """The largest along every axis but one, and the first of stacked ones."""
    kept = (0, axis) if stacked else (axis,)
    return values.max(axis=tuple(a for a in range(values.ndim) if a not in kept))


def divided(folds: Iterable[Fold], leaves: Mapping[Path, Leaf]) -> dict[Path, Any]:
    """The leaves that are not what they were."""
    changed = {}
    for norm, _, factors in folds:
        for path in norm.vectors:
            shape = leaves[path].value.shape
            changed[path] = _cast(leaves[path], 1 / factors.reshape(shape))
        for path, axis in norm.kernels:
            kept = (0, axis) if norm.stacked else (axis,)
            along = tuple(a for a in range(leaves[path].value.ndim) if a not in kept)
            changed[path] = _cast(leaves[path], np.expand_dims(factors, along))
    return changed


def _cast(leaf: Leaf, factors: np.ndarray) -> Any:
    """A leaf times factors, in its dtype and where it lay."""
    value = leaf.value
    wide = np.asarray(value, np.float64)
    with np.errstate(over="ignore", under="ignore"):
        made = (wide * factors).astype(value.dtype)
    lost = ~np.isfinite(made.astype(np.float32)) | ((made == 0) & (wide != 0))
    if lost.any():
        raise ValueError(
            f"{WHO}: {int(lost.sum())} numbers of {leaf.where} would be too large or too small for "
            f"{value.dtype}. Cast the parameters to float32 first."
        )
    return jax.device_put(made, value.sharding) if isinstance(value, jax.Array) else made


def spread(peaks: np.ndarray) -> float:
    """How many times the median the largest of those that are not 0 is; of a stack, at most."""
    alive = [row[row > 0] for row in np.atleast_2d(peaks)]
    return max(float(row.max() / np.median(row)) for row in alive if row.size)
