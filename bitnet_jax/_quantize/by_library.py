"""Quantisers by the native library: one custom call each, and the bits of plain JAX.

They serve where a program is lowered for one CPU, or for each device of a ``shard_map``. On
accelerators and where XLA places operations over a mesh, the plain form runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int8

from bitnet_jax import _mesh, _native
from bitnet_jax._native import by_platform
from bitnet_jax._quantize.arrays import (
    Activations,
    CanonicalCodes,
    CanonicalKernel,
    CanonicalScale,
)
from bitnet_jax._quantize.config import ActivationConfig, KernelConfig, TernaryConfig, rule_of
from bitnet_jax._quantize.pinned import widened
from bitnet_jax._quantize.rotation import factor_of

FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))  # others pass through float32

Codes = tuple[Int8[Array, "..."], Float32[Array, "..."]]


def call(target: str, results: Any, *operands: jax.Array, **attributes: Any) -> Any:
    """A custom call. Its results vary over the mesh axes of a ``shard_map`` that operands do."""
    y = jax.ffi.ffi_call(target, results)(*operands, **attributes)
    return _mesh.varying_alike(y, operands)[0]


def quantizes(config: KernelConfig) -> bool:
    """Whether the library has a quantiser and is the faster one here."""
    return isinstance(config, TernaryConfig) and rule_of(config).native and _native.preferred()


def kernel_codes(
    w: CanonicalKernel, config: TernaryConfig, plain: Callable[..., Codes]
) -> tuple[CanonicalCodes, CanonicalScale]:
    """Codes and scale of a canonical kernel, as ``plain`` gives them."""
    *batch, k, n = w.shape
    operation = _kernel_quantizer(config, plain)
    codes, scale = by_platform.run(operation, w.reshape(math.prod(batch), k, n))
    return codes.reshape(w.shape), scale.reshape(*batch, *scale.shape[1:])


@functools.cache
def _kernel_quantizer(config: TernaryConfig, plain: Callable[..., Codes]) -> by_platform.Operation:
    """w (B, K, N) -> codes (B, K, N), scale (B, G, 1 or N)."""

    def results(w: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        slices, k, n = w.shape
        groups = k // config.granularity if isinstance(config.granularity, int) else 1
        scales = 1 if config.granularity == "tensor" else n
        return (
            jax.ShapeDtypeStruct(w.shape, jnp.int8),
            jax.ShapeDtypeStruct((slices, groups, scales), jnp.float32),
        )

    def native(w: CanonicalKernel) -> Codes:
        return call(
            _native.QUANTIZE_KERNEL,
            results(w),
            w if w.dtype in FLOATS else widened(w),
            threshold=np.float32(config.threshold),
            eps=np.float32(config.eps),
            survivors=rule_of(config).of_kept,
        )

    return by_platform.Operation(native, functools.partial(plain, config=config), results)


def token_codes(
    x: Activations, config: ActivationConfig, length: int | None = None, block: int = 1
) -> Codes:
    """Codes of each token, with zeros behind them up to ``length``, and its gammas.

    Blocks of a token are rotated first. Not an operation: a part of native forms.
    """
    *lead, k = x.shape
    results = (
        jax.ShapeDtypeStruct((*lead, length or k), jnp.int8),
        jax.ShapeDtypeStruct((*lead, k // (config.group or k)), jnp.float32),
    )
    static = {"qmax": np.float32(config.qmax), "eps": np.float32(config.eps)}
    static |= {"block": np.int64(block), "factor": factor_of(block)}
    return call(_native.QUANTIZE, results, x if x.dtype in FLOATS else widened(x), **static)


def activation_codes(
    x: Activations, config: ActivationConfig, plain: Callable[..., Codes], block: int
) -> Codes:
    """Codes and gammas of each token, rotated by blocks, as ``plain`` gives them."""
    *lead, k = x.shape
    # One slice: tokens are rows, whatever axes they lie on.
    rows = x.reshape(1, math.prod(lead), k)
    codes, gamma = by_platform.run(_token_quantizer(config, plain, block), rows)
    return codes.reshape(x.shape), gamma.reshape(*lead, gamma.shape[-1])


@functools.cache
def _token_quantizer(
    config: ActivationConfig, plain: Callable[..., Codes], block: int
) -> by_platform.Operation:
    """x (B, M, K) -> codes (B, M, K), gamma (B, M, groups)."""

    def results(x: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        *lead, k = x.shape
        groups = k // (config.group or k)
        return (
            jax.ShapeDtypeStruct(x.shape, jnp.int8),
            jax.ShapeDtypeStruct((*lead, groups), jnp.float32),
        )

    return by_platform.Operation(
        functools.partial(token_codes, config=config, block=block),
        functools.partial(plain, config=config, shared=(-1,), block=block),
        results,
        rows=1,
    )
