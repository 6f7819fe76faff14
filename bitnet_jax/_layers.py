"""The forward pass of a layer, from a float kernel or a packed one.

Both Flax front ends call this; they differ only in where a parameter lives.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax import _checks
from bitnet_jax._matmul import matmul
from bitnet_jax._packed import is_packed
from bitnet_jax._ste import Strength, rms_normalize, ternary_dot
from bitnet_jax._ternary import ActivationConfig, TernaryConfig


class LayerConfig(NamedTuple):
    """What a ternary layer has beyond the float layer it stands for."""

    weights: TernaryConfig
    activations: ActivationConfig | None
    norm: bool
    backward_dtype: Any


def dense(
    who: str,
    where: str,
    config: LayerConfig,
    x: jax.Array,
    kernel: Any,
    bias: jax.Array | None,
    *,
    strength: Strength,
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """x times a kernel (in, out), plus bias; the same bits from float and packed kernels."""
    operands = [x, kernel] if bias is None else [x, kernel, bias]
    dtype = dtype or functools.reduce(jnp.promote_types, (a.dtype for a in operands))
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
        x = x.astype(dtype)
    if config.norm:
        x = rms_normalize(x)
    if is_packed(kernel):
        _checks.layer_config(who, where, config.weights, kernel.config)
        y = matmul(x, kernel, activations=config.activations, dtype=dtype, precision=precision)
    else:
        y = ternary_dot(
            x,
            kernel,
            config.weights,
            config.activations,
            strength=strength,
            dtype=dtype,
            backward_dtype=config.backward_dtype,
            precision=precision,
        )
    if bias is None:
        return y
    return y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
