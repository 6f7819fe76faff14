"""The methods for one slice of a kernel: its weights (K, N) to codes and scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitnet_jax._quantize.config import TernaryConfig, planes_of
from bitnet_jax.convert import _second_moment
from bitnet_jax.convert._best_scale import group_size
from bitnet_jax.convert._gptq import column_blocks, gptq_codes, planned
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._plane_grid import grid_of, largest_first
from bitnet_jax.convert._plane_scales import plane_scales
from bitnet_jax.convert._quantized import Quantized
from bitnet_jax.convert._refit import refitted

# Codes (P, K, N) and scales (P, G, 1 or N) of a slice, and notes.
Found = tuple[np.ndarray, np.ndarray, list[str]]


def by_slice(
    run: Callable[[np.ndarray, Statistics, int, TernaryConfig], Found],
    w: np.ndarray,
    statistics: Statistics,
    config: TernaryConfig,
) -> Quantized:
    """Runs a method on each slice of a kernel."""
    size, count = group_size(config.granularity, w.shape[1]), planes_of(config)
    across = 1 if config.granularity == "tensor" else w.shape[2]
    codes = np.empty((len(w), count, *w.shape[1:]), np.int8)
    scale = np.empty((len(w), count, w.shape[1] // size, across), np.float32)
    notes: list[str] = []
    for b in range(len(w)):
        *found, more = run(w[b], statistics, b, config)
        codes[b], scale[b] = largest_first(*found)
        notes += _second_moment.notes(statistics, b, w.shape[1]) + more
    joined = codes.reshape(len(w), -1, w.shape[2]), scale.reshape(len(w), -1, across)
    return Quantized(*joined, tuple(notes))


def weighted_slice(w: np.ndarray, statistics: Statistics, b: int, config: TernaryConfig) -> Found:
    """The least weighted squared error of one slice, one plane after another."""
    h = _second_moment.diagonal(statistics, b, len(w))
    codes, scale, rest = [], [], w
    for _ in range(planes_of(config)):
        own = plane_scales(rest, h, config.granularity, config.eps, 1)
        codes.append(_nearest_codes(rest, own))
        scale.append(own)
        if len(scale) < planes_of(config):
            rest = rest - codes[-1][0] * np.repeat(own[0], len(w) // own.shape[1], axis=0)
    return np.concatenate(codes), np.concatenate(scale), []


def planes_slice(w: np.ndarray, statistics: Statistics, b: int, config: TernaryConfig) -> Found:
    """Very small weighted squared error of one slice, all planes together."""
    h, unit = _second_moment.diagonal(statistics, b, len(w)), _unit(w)
    if unit != 1:
        w = w * np.float32(1 / unit)
    eps = float(config.eps) / unit
    scale = plane_scales(w, h, config.granularity, eps, planes_of(config))
    return _nearest_codes(w, scale), (scale * unit).astype(np.float32), []


def _nearest_codes(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The best codes (P, K, N) of weights (K, N) for scales (P, G, 1 or N)."""
    codes = np.empty((len(scale), *w.shape), np.int8)
    _code_nearest(w, np.ones(len(w), bool), codes, scale)
    return codes


def _code_nearest(w: np.ndarray, rows: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> None:
    """Writes the nearest codes of the rows that are marked."""
    size = len(w) // scale.shape[1]
    for g in range(scale.shape[1]):
        part = np.flatnonzero(rows[g * size : (g + 1) * size]) + g * size
        for columns in column_blocks(size, w.shape[1]) if len(part) else ():
            values = grid_of(scale[:, g, columns] if scale.shape[2] > 1 else scale[:, g])
            codes[:, part, columns] = values.codes(values.indices(w[part, columns]))


def _code_dead(
    w: np.ndarray, h: np.ndarray, codes: np.ndarray, scale: np.ndarray, eps: float
) -> None:
    """Codes the weights of inputs that were always 0; groups of them alone get scales too."""
    size = len(w) // scale.shape[1]
    for g in np.flatnonzero(~h.reshape(-1, size).any(axis=1)):
        part = slice(g * size, (g + 1) * size)
        scale[:, g : g + 1] = plane_scales(w[part], h[part], size, eps, len(scale))
    _code_nearest(w, h == 0, codes, scale)


def _unit(w: np.ndarray) -> float:
    """A power of two to divide weights by, so that squares neither overflow nor vanish."""
    exponent = int(np.frexp(max(w.max(), -w.min()))[1])
    return 1.0 if abs(exponent) < 30 else 2.0 ** (exponent - 1)


def gptq_slice(
    w: np.ndarray,
    statistics: Statistics,
    b: int,
    config: TernaryConfig,
    *,
    damping: float,
    act_order: bool,
    rounds: int,
    refit: bool,
) -> Found:
    """GPTQ of one slice."""
    if _second_moment.stands_in(statistics, b):
        return planes_slice(w, statistics, b, config)
    assert statistics.moments is not None  # require_operands has looked
    moment = statistics.moments[b]
    size = group_size(config.granularity, len(w))
    plan = planned(moment, size, damping=damping, act_order=act_order, rounds=rounds)
    unit = _unit(w)
    if unit != 1:
        w = w * np.float32(1 / unit)
    eps = float(config.eps) / unit
    many = planes_of(config)
    codes, scale = gptq_codes(w, moment.diagonal(), config.granularity, eps, many, plan)
    used = plan.damping
    del plan  # as large as the moment
    if refit:
        scale = refitted(w, codes, scale, moment, used, eps)
    _code_dead(w, moment.diagonal(), codes, scale, eps)
    raised = [f"slice {b}: damping was raised from {damping:g} to {used:g}"]
    return codes, (scale * unit).astype(np.float32), raised if used > damping else []
