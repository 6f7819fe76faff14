"""Int8 codes: of activations, one scale per token, and of kernels, one per output channel.

A token ``x`` becomes codes in [-qmax, qmax] and its ``gamma``::

    gamma = max(max|x|, eps),   code = round(x * (qmax / gamma))

A kernel that two bits would hurt too much, a head or an embedding, keeps eight::

    s = max(max|W|, eps) / 127,   code = round(W * (127 / max(max|W|, eps)))

with the maximum over the contraction, for each output channel. A maximum does
not depend on its order, so both are the same bits everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from bitnet_jax import _checks, _mesh
from bitnet_jax._quantize import kernel_axes


def _require_bits(who: str, value: Any) -> None:
    """Refuses an activation width that int8 codes cannot hold."""
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 8:
        raise ValueError(f"{who}: `bits` must be an integer from 2 to 8, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    """How activations are quantised, one scale per token.

    Args:
      bits: 2 to 8; codes lie in [-qmax, qmax] with qmax = 2**(bits-1) - 1.
      eps: the smallest gamma, in units of the activations.

    Raises:
      ValueError: bits or eps out of range.

    Example:
      >>> import bitnet_jax as bj
      >>> bj.ActivationConfig(bits=4).qmax
      7
    """

    bits: int = 8
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_bits("ActivationConfig", self.bits)
        _checks.require_epsilon("ActivationConfig", self.eps, self.qmax)

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1


@dataclasses.dataclass(frozen=True)
class Int8Config:
    """How a kernel is quantised to int8, one scale per output channel.

    For heads and embeddings, which would otherwise dominate a small model's
    bytes or its error. An embedding (vocabulary, features) has one scale per row.

    Args:
      eps: the smallest max \\|w\\| of a channel, in units of the weights.

    Raises:
      ValueError: eps out of range.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> bj.pack(jax.random.normal(jax.random.key(0), (64, 16)), bj.Int8Config())
      PackedInt8(shape=(64, 16), scale=(1, 16), 1088 bytes)
    """

    eps: float = 1e-8
    granularity: ClassVar[str] = "channel"

    def __post_init__(self) -> None:
        _checks.require_epsilon("Int8Config", self.eps, _LARGEST_CODE)


INT8 = ActivationConfig()

_LARGEST_CODE = 127


def check_activations(who: str, activations: Any) -> None:
    """Refuses what is neither a config of activations nor None (weight-only)."""
    kinds = (ActivationConfig, type(None))
    _checks.require_instance(who, "activations", activations, kinds, "Use ActivationConfig().")


def _largest(x: Float32[Array, "..."], axes: tuple[int, ...]) -> Float32[Array, "..."]:
    """max|x| over some axes, kept; Inf where one of them is NaN.

    XLA's maximum on CPUs drops NaN where its input has 4096 elements or more.
    """
    magnitudes = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    return jnp.max(magnitudes, axis=axes, keepdims=True, initial=0.0)


def quantize_channels(
    w: Float[Array, "*b k n"], config: Int8Config
) -> tuple[Int8[Array, "*b k n"], Float32[Array, "*b 1 n"]]:
    """Codes in [-127, 127] of a canonical kernel and the step of each output channel."""
    wide = w.astype(jnp.float32)
    floor = jnp.maximum(_largest(wide, (-2,)), np.float32(config.eps))
    codes = jnp.round(wide * (np.float32(_LARGEST_CODE) / floor)).astype(jnp.int8)
    # The runtime 0 keeps this constant from being folded with the epilogue's.
    return codes, floor * (np.float32(1 / _LARGEST_CODE) + floor * 0.0)


def quantize_activations(
    x: Float[Array, "..."], config: ActivationConfig = INT8, *, axes: kernel_axes.AxesLike = -1
) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """Int8 codes of each token, and its scale gamma.

    ``gamma = max(max|x|, eps)``, ``codes = round(x * (qmax / gamma))``, half to
    even; x is approximately ``codes * gamma / qmax``.

    Args:
      x: (..., features), floating point.
      config: bits and eps.
      axes: the axes that share one gamma: the last for tokens, every axis but
        the first for a convolution's examples.

    Returns:
      Codes, int8, of x's shape, and gamma, float32, with length 1 on ``axes``.
      A token with NaN or Inf has a gamma that is not finite.

    Raises:
      TypeError: ``x`` is not floating point.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> codes, gamma = bj.quantize_activations(jnp.array([[0.5, -1.0, 0.25]]))
      >>> codes.tolist(), gamma.tolist()
      ([[64, -127, 32]], [[1.0]])

    References:
      Ma et al., arXiv:2402.17764, section 2, without the clip, which a code
      scaled by its own maximum never reaches.
    """
    return quantize_activations_as("quantize_activations", x, config, axes)


def quantize_activations_as(
    who: str, x: Float[Array, "..."], config: ActivationConfig, axes: kernel_axes.AxesLike = -1
) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """:func:`quantize_activations` on behalf of another function, which its errors name."""
    _checks.require_instance(who, "config", config, ActivationConfig, "Use bj.ActivationConfig().")
    _checks.require_float_array(who, "x", x)
    shared = _checks.normalize_axes(who, "axes", axes, x.ndim)
    run = functools.partial(_token_codes, config=config, shared=shared)
    return _mesh.in_auto_like(run, jax.lax.stop_gradient(x))


# Traced once for all layers of a shape.
@functools.partial(jax.jit, static_argnames=("config", "shared"))
def _token_codes(x: jax.Array, config: ActivationConfig, shared: tuple[int, ...]):
    gamma = gamma_of(x, config, shared)
    return codes_at(x, gamma, config), gamma


def gamma_of(
    x: Float[Array, "..."], config: ActivationConfig, shared: tuple[int, ...]
) -> Float32[Array, "..."]:
    """``max(max|x|, eps)`` over some axes, kept."""
    return jnp.maximum(_largest(x.astype(jnp.float32), shared), np.float32(config.eps))


def codes_at(
    x: Float[Array, "..."], gamma: Float32[Array, "..."], config: ActivationConfig
) -> Int8[Array, "..."]:
    """``round(x * (qmax / gamma))``."""
    return jnp.round(x.astype(jnp.float32) * (np.float32(config.qmax) / gamma)).astype(jnp.int8)


def dequantize_activations(
    codes: Int8[Array, "..."], gamma: Float32[Array, "..."], config: ActivationConfig
) -> Float32[Array, "..."]:
    """Codes times their step ``gamma * float32(1 / qmax)``."""
    return codes.astype(jnp.float32) * (gamma * np.float32(1 / config.qmax))
