"""Int8 codes: of activations, one scale per token or group, and of kernels, one per output.

A token ``x`` becomes codes in [-qmax, qmax] and its ``gamma``::

    gamma = max(max|x|, eps),   code = round(x * (qmax / gamma))

and so does each run of ``group`` features of a token, where the config has groups.

A kernel that two bits would hurt too much, a head or an embedding, keeps eight::

    s = max(max|W|, eps) / 127,   code = round(W * (127 / max(max|W|, eps)))

with the maximum over the contraction, for each output channel. A maximum does
not depend on its order, so both are the same bits everywhere.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from bitnet_jax import _checks, _mesh, _native
from bitnet_jax._quantize import by_library, kernel_axes
from bitnet_jax._quantize.arrays import Activations, AnyArray, CanonicalCodes, CanonicalKernel
from bitnet_jax._quantize.config import INT8, LARGEST_INT8, ActivationConfig, Int8Config
from bitnet_jax._quantize.pinned import pinned, widened
from bitnet_jax._quantize.rotation import rotated
from bitnet_jax._quantize.rounded import quotient


def quantize_activations(
    x: Activations, config: ActivationConfig = INT8, *, axes: kernel_axes.AxesLike = -1
) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """Int8 codes of each token, and its scale gamma, or one for each of its groups.

    ``gamma = max(max|x|, eps)``, ``codes = round(x * (qmax / gamma))``, half to
    even; x is approximately ``codes * gamma / qmax``.

    Args:
      x: (..., features), floating point.
      config: bits, eps and group.
      axes: the axes that share one gamma: the last for tokens, every axis but
        the first for a convolution's examples. With groups, the last.

    Returns:
      Codes, int8, of x's shape, and gamma, float32, with length 1 on ``axes``, or
      features / group on the last. A token, or group, with NaN or Inf has a gamma
      that is not finite.

    Raises:
      TypeError: ``x`` is not floating point.
      ValueError: groups that do not divide the features, or along other axes.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> codes, gamma = bj.quantize_activations(jnp.array([[0.5, -1.0, 0.25]]))
      >>> codes.tolist(), gamma.tolist()
      ([[64, -127, 32]], [[1.0]])

    References:
      Ma et al., arXiv:2402.17764, section 2, without the clip, which a code
      scaled by its own maximum never reaches.
    """
    shared = token_axes("quantize_activations", x, config, axes)
    run = functools.partial(activation_codes, config=config, shared=shared)
    return _mesh.in_auto_like(run, jax.lax.stop_gradient(x))


def token_axes(
    who: str, x: Activations, config: ActivationConfig, axes: kernel_axes.AxesLike
) -> tuple[int, ...]:
    """The axes that share one gamma; raises unless x can be quantised so."""
    _checks.require_instance(who, "config", config, ActivationConfig, "Use bj.ActivationConfig().")
    _checks.require_float_array(who, "x", x)
    _checks.require_values(who, "`x`", x)
    shared = _checks.normalize_axes(who, "axes", axes, x.ndim)
    if config.group is not None:
        _require_last_axis(who, config.group, shared, x.ndim)
        kernel_axes.require_whole_groups(who, "config.group", config.group, x.shape[-1:])
    return shared


def check_activations(who: str, activations: object) -> None:
    """Raises unless it is a config of activations or None (weight-only)."""
    kinds = (ActivationConfig, type(None))
    _checks.require_instance(who, "activations", activations, kinds, "Use ActivationConfig().")


def require_activation_groups(
    who: str, activations: ActivationConfig | None, contraction: tuple[int, ...]
) -> None:
    """Raises where groups of activations do not tile a contraction."""
    if activations is not None:
        group = activations.group
        kernel_axes.require_whole_groups(who, "activations.group", group, contraction)


def require_no_activation_groups(who: str, activations: ActivationConfig | None) -> None:
    """Raises where a convolution is to have groups of activations."""
    if activations is not None and activations.group is not None:
        raise ValueError(
            f"{who}: `activations.group`={activations.group}, and a convolution has one scale per "
            "example: its windows would mix the groups. Leave this kernel out (select=), or pass "
            "an ActivationConfig without a group."
        )


def activation_codes(
    x: Activations, config: ActivationConfig, shared: tuple[int, ...], block: int = 1
) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """Codes of x, and gamma over the ``shared`` axes, kept; or (..., groups) of the last.

    Blocks of more than 1 along the last axis are rotated first.
    """
    if x.size and shared in ((-1,), (x.ndim - 1,)) and _native.preferred():
        return by_library.activation_codes(x, config, plain_activation_codes, block)
    return plain_activation_codes(x, config, shared, block)


# Traced once for all layers of a shape.
@functools.partial(jax.jit, static_argnames=("config", "shared", "block"))
def plain_activation_codes(
    x: Activations, config: ActivationConfig, shared: tuple[int, ...], block: int = 1
) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """:func:`activation_codes` in plain JAX."""
    x = rotated(x, block)
    # Gamma from float32, whatever x is: bfloat16 values are widened before the maximum.
    gamma = gamma_of(x, config, shared)
    return codes_at(x, gamma, config), gamma


def gamma_of(
    x: Activations, config: ActivationConfig, shared: tuple[int, ...]
) -> Float32[Array, "..."]:
    """``max(max|x|, eps)`` over some axes, kept, or over each group of the last."""
    if config.group is None:
        largest = _largest(widened(x), shared)
    else:
        groups = x.reshape(*x.shape[:-1], x.shape[-1] // config.group, config.group)
        largest = _largest(widened(groups), (-1,))[..., 0]
    return jnp.maximum(largest, np.float32(config.eps))


def codes_at(
    x: Activations, gamma: Float32[Array, "..."], config: ActivationConfig
) -> Int8[Array, "..."]:
    """``round(x * (qmax / gamma))``."""
    # One quotient for the token, then products: x / gamma * qmax would round otherwise.
    step = kernel_axes.broadcast_scale(quotient(config.qmax, gamma), x.shape)
    return jnp.round(widened(x) * step).astype(jnp.int8)


def dequantize_activations(
    codes: Int8[Array, "..."], gamma: Float32[Array, "..."], config: ActivationConfig
) -> Float32[Array, "..."]:
    """Codes times their step ``gamma * float32(1 / qmax)``."""
    # A reciprocal made here, in float32: XLA replaces divisions by constants in some programs.
    step = kernel_axes.broadcast_scale(gamma, codes.shape) * np.float32(1 / config.qmax)
    return pinned(codes.astype(jnp.float32) * pinned(step))


def quantize_channels(
    w: CanonicalKernel, config: Int8Config
) -> tuple[CanonicalCodes, Float32[Array, "*b 1 n"]]:
    """Codes in [-127, 127] of a canonical kernel and the step of each output channel."""
    wide = widened(w)
    # The maximum runs over the contraction: one scale for each output, (*b, 1, n).
    floor = jnp.maximum(_largest(wide, (-2,)), np.float32(config.eps))
    codes = jnp.round(wide * quotient(LARGEST_INT8, floor)).astype(jnp.int8)
    # Pinned, or this constant would be put together with the epilogue's.
    return codes, pinned(floor * np.float32(1 / LARGEST_INT8))


def _require_last_axis(who: str, group: int, shared: tuple[int, ...], ndim: int) -> None:
    """Raises where groups are asked for along other axes than the last."""
    if shared != (ndim - 1,):
        raise ValueError(
            f"{who}: `axes`={shared} share one gamma, and `config.group`={group} cuts the last "
            "axis. Pass axes=-1, or an ActivationConfig without a group."
        )


def _largest(x: Float[AnyArray, "..."], axes: tuple[int, ...]) -> Float32[Array, "..."]:
    """max|x| over some axes, kept; Inf where one of them is NaN.

    XLA's maximum on CPUs drops NaN where its input has 4096 elements or more.
    """
    # Inf in place of NaN survives the maximum, and a gamma of Inf makes the output NaN.
    magnitudes = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    return jnp.max(magnitudes, axis=axes, keepdims=True, initial=0.0)
