"""Ternary weights: pure maths, no gradients, no layout.

A kernel ``W`` becomes codes in {-1, 0, +1} and a float32 scale ``s``::

    s    = max(mean|W|, eps)                          (absmean)
    r    = W * (1 / s)
    code = 0 where |r| <= threshold, else sign(r)

With threshold 0.5 this is ``clip(round(W / s), -1, 1)``, the b1.58 quantiser
[1, eq. 1-3].

One last bit of a scale changes every output of a layer, and ``jnp.mean`` gives
another last bit in eager mode, under jit, under vmap and on shards. So the sum
is pinned: a halving tree over adjacent pairs, odd ends padded with zeros, first
down the contraction, then across the outputs, times ``float32(1 / n)``.

Weights enter that sum times 2**-32. A power of two changes no bit of a float,
and the sum of n weights near the largest float32 stays finite.

References:
  [1] Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764.
  [2] Li et al., Ternary Weight Networks, arXiv:1605.04711.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from bitnet_jax import _checks, _mesh
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.int8 import Int8Config, quantize_channels

_SHIFT = np.float32(2.0**-32)

_UNSHIFT = np.float32(2.0**32)

_LARGEST = np.float32(np.finfo(np.float32).max * 2.0**-32)

_HUGE = np.float32(2.0**100)


def _require_granularity(who: str, value: Any) -> None:
    """Refuses a granularity that is not a name or a group size."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{who}: `granularity` as a group size must be >= 1, got {value}.")
        return
    if not isinstance(value, str) or value not in ("tensor", "channel"):
        raise ValueError(
            f"{who}: `granularity` must be 'tensor', 'channel' or a group size (int), "
            f"got {value!r}."
        )


@dataclasses.dataclass(frozen=True)
class TernaryConfig:
    """How a kernel is quantised to {-1, 0, +1} times a scale.

    Args:
      scale: the statistic behind the scale. ``"absmean"``: mean of \\|w\\|.
        ``"absmedian"``: median of \\|w\\|. ``"survivors"``: the threshold is set
        by mean \\|w\\|, and the scale is the mean over the weights above it.
      threshold: a weight is 0 up to this many times the statistic (the mean,
        or the median for ``"absmedian"``).
      granularity: what shares one scale. ``"tensor"``: the kernel.
        ``"channel"``: each output channel. An int: each run of so many weights
        along the contraction, in each output channel.
      eps: the smallest statistic, in units of the weights.

    Raises:
      ValueError: a name, threshold, group size or eps out of range.

    Example:
      >>> import bitnet_jax as bj
      >>> bj.TernaryConfig(granularity="channel")
      TernaryConfig(scale='absmean', threshold=0.5, granularity='channel', eps=1e-05)
      >>> bj.TernaryConfig(scale="absmaen")
      Traceback (most recent call last):
        ...
      ValueError: TernaryConfig: `scale` must be one of 'absmean', 'absmedian', 'survivors', \
got 'absmaen'. Did you mean 'absmean'?
    """

    scale: Literal["absmean", "absmedian", "survivors"] = "absmean"
    threshold: float = 0.5
    granularity: Literal["tensor", "channel"] | int = "tensor"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _checks.require_one_of(
            "TernaryConfig", "scale", self.scale, ("absmean", "absmedian", "survivors")
        )
        _checks.require_positive("TernaryConfig", "threshold", self.threshold)
        _require_granularity("TernaryConfig", self.granularity)
        _checks.require_epsilon("TernaryConfig", self.eps)


B158 = TernaryConfig()

PHASE4 = TernaryConfig(threshold=0.1, granularity="channel", eps=1e-8)

TWN = TernaryConfig(scale="survivors", threshold=0.7, granularity="channel")

KernelConfig = TernaryConfig | Int8Config


class Ternary(NamedTuple):
    """A kernel as codes and scale, both of the kernel's rank.

    Attributes:
      codes: int8 in {-1, 0, +1}, the kernel's shape.
      scale: float32; each axis has length 1 (shared), the kernel's length, or
        the number of groups along it.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> t = bj.quantize(jnp.array([[0.9, -0.1], [-0.8, 0.2]]))
      >>> t.codes.tolist(), t.scale.shape
      ([[1, 0], [-1, 0]], (1, 1))
      >>> t.dequantize().tolist()
      [[0.5, 0.0], [-0.5, 0.0]]
    """

    codes: Int8[Array, "..."]
    scale: Float32[Array, "..."]

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """Codes times scale, computed in float32 and cast once to ``dtype``."""

        def run(codes: jax.Array, scale: jax.Array) -> jax.Array:
            return (codes.astype(jnp.float32) * broadcast_scale(scale, codes.shape)).astype(dtype)

        return _mesh.in_auto_like(run, self.codes, self.scale)


def quantize(
    w: Float[Array, "..."],
    config: TernaryConfig = B158,
    *,
    contracting_axes: kernel_axes.AxesLike | None = None,
    batch_axes: kernel_axes.AxesLike = (),
) -> Ternary:
    """Codes in {-1, 0, +1} and the float32 scale of a kernel.

    ``r = w * (1 / s)``; a code is 0 where ``|r| <= config.threshold``, else
    ``sign(r)``. The statistic ``s`` is computed in float32 by an order-fixed
    sum, so the same kernel gives the same bits under jit, vmap and on shards.

    Args:
      w: float32, bfloat16 or float16 kernel. 2-D: (in, out).
      config: the quantiser.
      contracting_axes: the axes that meet x; needed for other ranks than 2.
      batch_axes: axes that carry slices (stacked layers, experts), each slice
        with its own scale.

    Returns:
      A ``Ternary`` of the kernel's rank.

    Raises:
      TypeError: ``w`` is not floating point.
      ValueError: rank below 2, no elements, unknown axes, or a group that does
        not divide the contraction.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> t = bj.quantize(w, bj.PHASE4)
      >>> t.codes.dtype.name, t.scale.shape
      ('int8', (1, 16))

    References:
      Ma et al., arXiv:2402.17764, eq. 1-3; Li et al., arXiv:1605.04711, eq. 5-6.
    """
    _checks.require_instance(
        "quantize", "config", config, TernaryConfig, "Use bj.B158 or your own."
    )
    return quantize_as("quantize", w, config, contracting_axes, batch_axes)


def quantize_as(
    who: str,
    w: Float[Array, "..."],
    config: KernelConfig,
    contracting_axes: kernel_axes.AxesLike | None,
    batch_axes: kernel_axes.AxesLike,
) -> Ternary:
    """:func:`quantize`, by any config, for a function that its errors name."""
    axes = axes_to_quantize(who, w, config, contracting_axes, batch_axes)
    _, contraction, outputs = axes.split(w.shape)
    grid = scale_grid(who, contraction, config)

    def run(w: jax.Array) -> Ternary:
        codes, scale = quantize_canonical(kernel_axes.to_canonical(w, axes), config)
        one_each = outputs if scale.shape[-1] > 1 else (1,) * len(outputs)
        codes = kernel_axes.from_canonical(codes, axes, contraction, outputs)
        return Ternary(codes, kernel_axes.from_canonical(scale, axes, grid, one_each))

    return _mesh.in_auto_like(run, jax.lax.stop_gradient(w))


def check_config(who: str, config: Any) -> None:
    """Refuses what says nothing about how to quantise a kernel."""
    kinds = (TernaryConfig, Int8Config)
    _checks.require_instance(who, "config", config, kinds, "Use bj.B158 or your own.")


def axes_to_quantize(
    who: str,
    w: Any,
    config: KernelConfig,
    contracting_axes: kernel_axes.AxesLike | None,
    batch_axes: kernel_axes.AxesLike,
) -> kernel_axes.KernelAxes:
    """The axes of a kernel to quantise; what its config and shape refuse is refused here."""
    check_config(who, config)
    _checks.require_kernel(who, w)
    axes = kernel_axes.resolve(who, w, contracting_axes, batch_axes)
    scale_grid(who, axes.split(w.shape)[1], config)
    return axes


def axes_to_contract(
    who: str,
    w: Any,
    config: KernelConfig,
    contracting_axes: kernel_axes.AxesLike | None,
    batch_axes: kernel_axes.AxesLike,
) -> kernel_axes.KernelAxes:
    """:func:`axes_to_quantize` of a kernel whose codes are to be summed in int32."""
    axes = axes_to_quantize(who, w, config, contracting_axes, batch_axes)
    if isinstance(config, Int8Config):
        _require_int32_sums(who, math.prod(axes.split(w.shape)[1]))
    return axes


def scale_grid(who: str, contraction: tuple[int, ...], config: KernelConfig) -> tuple[int, ...]:
    """The lengths of a scale along the contracting axes."""
    if isinstance(config.granularity, int):
        return kernel_axes.group_grid(who, contraction, config.granularity)
    return (1,) * len(contraction)


@functools.partial(jax.jit, static_argnums=1)  # traced once for all layers of a shape
def quantize_canonical(
    w: Float[Array, "*b k n"], config: KernelConfig
) -> tuple[Int8[Array, "*b k n"], Float32[Array, "*b g m"]]:
    """Codes and scale of a canonical kernel; g groups, m = 1 or n scales across."""
    if isinstance(config, Int8Config):
        return quantize_channels(w, config)
    wide, r, floor = _ratio(w, config)
    across = config.granularity == "tensor"
    keep = ~(jnp.abs(r) <= np.float32(config.threshold))
    codes = jnp.where(keep, jnp.where(r < 0, jnp.int8(-1), jnp.int8(1)), jnp.int8(0))
    if config.scale == "survivors":
        mean = _mean_of_kept(jnp.abs(wide) * _SHIFT, keep, across)
        floor = jnp.maximum(mean * _UNSHIFT, config.eps)
    return codes.reshape(w.shape), floor[..., 0, :]


def ratio_canonical(w: Float[Array, "*b k n"], config: TernaryConfig) -> Float32[Array, "*b k n"]:
    """``r``, a canonical kernel over its statistic: what the threshold is compared with."""
    return _ratio(w, config)[1].reshape(w.shape)


def _ratio(w: Float[Array, "*b k n"], config: TernaryConfig):
    """A kernel in its groups (*b, G, K/G, N), the same over its statistic, and the statistic."""
    group = config.granularity if isinstance(config.granularity, int) else w.shape[-2]
    wide = w.astype(jnp.float32)
    wide = wide.reshape(*w.shape[:-2], w.shape[-2] // group, group, w.shape[-1])
    across = config.granularity == "tensor"
    statistic = _median if config.scale == "absmedian" else _mean
    floor = jnp.maximum(statistic(jnp.abs(wide) * _SHIFT, across) * _UNSHIFT, config.eps)
    # 1 / floor underflows for the largest floats, unless both factors are shifted.
    shift = jnp.where(floor > _HUGE, _SHIFT, 1.0)
    return wide, (wide * shift) * (1.0 / (floor * shift)), floor


def broadcast_scale(scale: Float32[Array, "..."], shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Repeats each group's scale over the codes it belongs to; ones broadcast."""
    for axis, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have not in (1, want):
            scale = jnp.repeat(scale, want // have, axis=axis)
    return scale


def rms(x: Float32[Array, "... k"], eps: float) -> Float32[Array, "... 1"]:
    """``sqrt(mean(x**2) + eps)`` of each token, the same bits in every context.

    The runtime 1 keeps a product from being contracted with the add that
    follows, and the root from becoming an approximate rsqrt in ``1 / rms``; jit
    would do both and eager mode does not.
    """
    one = 1.0 + jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0) * 0.0
    total = _pair_sum((x * x) * one, axis=-1)
    return jnp.sqrt((total * np.float32(1 / x.shape[-1])) * one + np.float32(eps)) * one


def _pair_sum(v: Float32[Array, "..."], axis: int) -> Float32[Array, "..."]:
    """Sums one axis (kept, length 1) by halving over adjacent pairs.

    Two levels of the tree at a time, which halves the memory that the first one
    writes; where an end is short of four, zeros fill it up and change no sum.
    """
    axis %= v.ndim
    while v.shape[axis] > 1:
        v = jnp.pad(v, [(0, -v.shape[axis] % 4 if a == axis else 0) for a in range(v.ndim)])
        fours = v.reshape(*v.shape[:axis], v.shape[axis] // 4, 4, *v.shape[axis + 1 :])
        a, b, c, d = (jax.lax.index_in_dim(fours, i, axis + 1, keepdims=False) for i in range(4))
        v = (a + b) + (c + d)
    return v


def _total(v: Float32[Array, "*b g k n"], across: bool) -> Float32[Array, "*b g 1 m"]:
    v = _pair_sum(v, axis=-2)
    return _pair_sum(v, axis=-1) if across else v


def _mean(magnitude: Float32[Array, "*b g k n"], across: bool) -> Float32[Array, "*b g 1 m"]:
    n = magnitude.shape[-2] * (magnitude.shape[-1] if across else 1)
    return _capped(_total(magnitude, across) * np.float32(1 / n))


def _capped(mean: jax.Array) -> jax.Array:
    """Keeps rounding from carrying a mean past the largest float; Inf stays Inf."""
    return jnp.where(jnp.isinf(mean), mean, jnp.minimum(mean, _LARGEST))


def _mean_of_kept(magnitude, keep, across: bool) -> Float32[Array, "*b g 1 m"]:
    count = keep.sum(axis=(-2, -1) if across else -2, keepdims=True, dtype=jnp.int32)
    total = _total(jnp.where(keep, magnitude, 0.0), across)
    return _capped(total / jnp.maximum(count, 1).astype(jnp.float32))


def _median(magnitude: Float32[Array, "*b g k n"], across: bool) -> Float32[Array, "*b g 1 m"]:
    if across:
        lead = magnitude.shape[:-2]
        magnitude = magnitude.reshape(*lead, math.prod(magnitude.shape[-2:]), 1)
    n = magnitude.shape[-2]
    ordered = jnp.sort(magnitude, axis=-2)
    low, high = (jax.lax.slice_in_dim(ordered, i, i + 1, axis=-2) for i in ((n - 1) // 2, n // 2))
    # NaN sorts last and would hide behind the median: the largest brings it back.
    return (low + high) * 0.5 + jax.lax.slice_in_dim(ordered, n - 1, n, axis=-2) * 0.0


def _require_int32_sums(who: str, length: int) -> None:
    """Refuses an int8 kernel whose integer sums could leave int32."""
    most = (2**31 - 1) // (127 * 127)
    if length > most:
        raise ValueError(
            f"{who}: an int8 kernel may contract over {most} weights, got {length}; more could "
            "overflow the int32 sums. Use a TernaryConfig, or leave this kernel in float."
        )
