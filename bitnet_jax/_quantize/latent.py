"""A float kernel that quantises to given codes and a given scale: the inverse of a quantiser.

``codes * scale`` is not one: the mean of ternary weights is their scale times the share of
nonzero ones. Many kernels are; this one has magnitudes as equal as they can be::

    absmean     nonzero weights at s * N / n    N weights share s, n of them are not 0
    survivors   nonzero weights at s
    absmedian   weights at the median at s
    int8        code * s, and the largest at the maximum that gives s

Sums, products and narrow dtypes round, so the floats beside these are tried with the
quantiser's own operations (``latent_mean`` has the search for a mean).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from bitnet_jax._quantize import kernel_axes, statistics
from bitnet_jax._quantize.arrays import CanonicalCodes, CanonicalScale, Codes, DTypeLike, Scale
from bitnet_jax._quantize.config import (
    LARGEST_INT8,
    Int8Config,
    KernelConfig,
    TernaryConfig,
    rule_of,
)
from bitnet_jax._quantize.latent_group import Group, Steps
from bitnet_jax._quantize.latent_mean import magnitudes_of_mean
from bitnet_jax._quantize.latent_rotated import unrotated_latent
from bitnet_jax._quantize.rotation import block_of
from bitnet_jax._quantize.scale_rules import Statistic
from bitnet_jax._quantize.ternary import dequantize, rotated_back

_SEARCHED = ("float32", "bfloat16", "float16")


def latent_kernel(
    codes: Codes,
    scale: Scale,
    config: KernelConfig,
    axes: kernel_axes.KernelAxes,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """A kernel of ``dtype`` whose codes and scale are these, where one exists."""
    _, contraction, outputs = axes.split(codes.shape)
    flat, grid = kernel_axes.to_canonical(codes, axes), kernel_axes.to_canonical(scale, axes)
    if not _is_grid_of(config, grid.shape, flat.shape):
        axis = None if config.rotation is None else axes.contracting[-1] - codes.ndim
        return rotated_back(dequantize(codes, scale), axis).astype(dtype)
    # Other floats hold float32, or hold too little for a scale.
    own = jnp.dtype(dtype) if jnp.dtype(dtype).name in _SEARCHED else jnp.dtype(jnp.float32)
    block = block_of(config, contraction)
    if isinstance(config, TernaryConfig) and block > 1:
        w = _clear(flat, grid, config)
        w = unrotated_latent(w, grid, config, block, own).astype(dtype)
    else:
        w = _latent(flat, grid, config, own).astype(dtype)
    return kernel_axes.from_canonical(w, axes, contraction, outputs)


def _is_grid_of(config: KernelConfig, scale: tuple[int, ...], codes: tuple[int, ...]) -> bool:
    """Whether scales of this shape are those that a config makes for codes of that one."""
    (k, n), (groups, across) = codes[-2:], scale[-2:]
    per = k // config.granularity if isinstance(config.granularity, int) else 1
    return (groups, across) == (per, 1 if config.granularity == "tensor" else n)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _latent(
    codes: CanonicalCodes, scale: CanonicalScale, config: KernelConfig, dtype: np.dtype
) -> Float[Array, "*b k n"]:
    groups = scale.shape[-2]
    shape = (*codes.shape[:-2], groups, codes.shape[-2] // groups, codes.shape[-1])
    group = Group(codes.reshape(shape), scale[..., None, :], config, dtype)
    if isinstance(config, Int8Config):
        w = _int8(group)
    else:
        steps = _magnitudes(rule_of(config).statistic)(group)
        w = jnp.where(group.codes < 0, -group.floats(steps), group.floats(steps))
    # A scale that is not finite has no inverse; it stays visible.
    w = jnp.where(jnp.isfinite(group.scale), w, group.scale.astype(dtype))
    return w.reshape(codes.shape)


@functools.partial(jax.jit, static_argnames="config")
def _clear(
    codes: CanonicalCodes, scale: CanonicalScale, config: TernaryConfig
) -> Float32[Array, "*b k n"]:
    """A float32 kernel of these scales, up to rounding, with no weight near a threshold."""
    if rule_of(config).statistic is not statistics.mean:
        return _latent(codes, scale, config, jnp.dtype(jnp.float32))
    groups = scale.shape[-2]
    parts = codes.reshape(*codes.shape[:-2], groups, -1, codes.shape[-1])
    if not rule_of(config).of_kept:  # N weights share s, n of them are not 0
        over = (-2, -1) if scale.shape[-1] == 1 else (-2,)
        nonzero = jnp.abs(parts).astype(jnp.float32).sum(over, keepdims=True)[..., 0, :]
        size = codes.size // scale.size * 1.0
        scale = scale * (size / jnp.maximum(nonzero, 1))
    return (parts.astype(jnp.float32) * scale[..., None, :]).reshape(codes.shape)


def _magnitudes(statistic: Statistic) -> Callable[[Group], Steps]:
    """Magnitudes whose statistic is the scale of their group."""
    inverses: dict[Statistic, Callable[[Group], Steps]] = {
        statistics.mean: magnitudes_of_mean,
        statistics.median: _median,
    }
    if statistic not in inverses:
        raise NotImplementedError(
            f"unpack: magnitudes of a given {statistic.__name__} are not known. A statistic of "
            "SCALE_RULES needs an entry here."
        )
    return inverses[statistic]


# Medians ------------------------------------------------------------------------------------


def _median(group: Group) -> Int32[Array, "*b g k n"]:
    """Magnitudes whose median is the scale."""
    config, scale = group.config, group.scale
    assert isinstance(config, TernaryConfig)
    nonzero = group.codes != 0
    zeros = group.size - group.number(nonzero)
    # Weights of code 0 are the smallest: these two are the middle ones in order.
    first, second = (group.size - 1) // 2, group.size // 2
    place = jnp.where(nonzero, zeros + group.rank(nonzero), group.rank(~nonzero))
    low = group.lowest_kept(scale)
    under, over = _halves(group, low, first < zeros, second < zeros)
    steps = jnp.where(place <= first, under, over)
    # What does not decide the median: code 0 at 0, others well above the threshold.
    clear = group.steps(scale * np.float32(2 * config.threshold))
    free = second < zeros
    steps = jnp.where(nonzero & free, jnp.maximum(clear, low), steps)
    steps = jnp.where(~nonzero & (place < first), 0, steps)
    small = scale <= np.float32(config.eps)
    plain = jnp.where(nonzero, jnp.maximum(group.steps(scale), low), 0)
    return jnp.where(small, plain, steps)


def _halves(
    group: Group, low: Steps, first_zero: Bool[Array, "..."], second_zero: Bool[Array, "..."]
) -> tuple[Steps, Steps]:
    """Two magnitudes with the scale as their mean, each on its side of the threshold."""
    scale = group.scale

    def other(under: Steps) -> Steps:
        return group.steps(scale + (scale - group.wide(under)))

    def fits(under: Steps, over: Steps) -> Bool[Array, "*b g 1 m"]:
        mean = (group.wide(under) + group.wide(over)) * np.float32(0.5)
        sides = ((under < low) == first_zero) & ((over < low) == second_zero)
        return (mean == scale) & sides & (under <= over)

    # Where only the first has code 0, it takes what the second, the nearest to 2 s, lacks.
    above = group.steps(scale + scale)
    rest = group.steps(scale + (scale - group.wide(above)))
    under = jnp.where(first_zero & ~second_zero, rest, group.steps(scale))
    over = jnp.where(first_zero & ~second_zero, above, other(under))

    def open_(state: tuple[Steps, Steps, Steps]) -> Bool[Array, ""]:
        under, over, tried = state
        return jnp.any(~fits(under, over) & (tried < 2**13) & (under > 0))

    def step(state: tuple[Steps, Steps, Steps]) -> tuple[Steps, Steps, Steps]:
        under, over, tried = state
        go = ~fits(under, over) & (under > 0)
        under = jnp.where(go, under - 1, under)
        return under, jnp.where(go, other(under), over), tried + 1

    start, none = (under, over, jnp.zeros_like(under)), group.steps(scale)
    under, over, _ = lax.while_loop(open_, step, start)
    good = fits(under, over)
    return jnp.where(good, under, none), jnp.where(good, over, none)


# Int8 ---------------------------------------------------------------------------------------


def _int8(group: Group) -> Float[Array, "*b g k n"]:
    """Code times step, with the largest code at a maximum that gives the step."""
    scale, eps = group.scale, np.float32(group.config.eps)
    near = group.steps(scale * np.float32(LARGEST_INT8))
    top = near
    for offset in (2, -1, -2, 1, 0):  # the last that fits is taken, the nearest first
        largest = jnp.maximum(group.wide(near + offset), eps)
        fits = largest * np.float32(1 / LARGEST_INT8) == scale
        top = jnp.where(fits, near + offset, top)
    values = (group.codes.astype(jnp.float32) * scale).astype(group.dtype)
    edge = jnp.where(group.codes < 0, -group.floats(top), group.floats(top))
    return jnp.where(jnp.abs(group.codes) == LARGEST_INT8, edge, values)
