"""The integer product of training: codes of x times ternary codes, and the epilogue.

In plain JAX, or by the native library from the same codes: one custom call multiplies them
as they lie, without int32 sums in memory, and gives the same bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int8, Shaped

from bitnet_jax import _native
from bitnet_jax._native import by_platform
from bitnet_jax._ops.convolution import Convolution
from bitnet_jax._ops.product import Product, group_epilogue, joint_groups
from bitnet_jax._quantize import by_library
from bitnet_jax._quantize.arrays import PlaneCodes, PlaneScale
from bitnet_jax._quantize.config import KernelConfig, TernaryConfig, planes_of
from bitnet_jax._quantize.ternary import each_plane

Operator = Product | Convolution

Gamma = Float32[Array, "..."]

FOUR = 4  # weights that a layout has together, see _native/layout.h


def cuts_no_four(depth: int, part: int) -> bool:
    """Whether parts of a group of ``depth`` weights, as groups of x cut it, are whole fours."""
    return part == depth or part % FOUR == 0


def contract_codes(
    operator: Operator,
    codes: Int8[Array, "..."],
    gamma: Gamma,
    w_codes: PlaneCodes,
    scale: PlaneScale,
    qmax: int,
    planes: int = 1,
) -> Float32[Array, "..."]:
    """The integer sums of codes, and the epilogue, in plain JAX; planes are more groups."""
    groups = joint_groups(gamma, scale)
    if planes == 1:
        sums = operator.sums(codes, w_codes, groups)  # (groups, ...), int32, exact
        return group_epilogue(sums, gamma, scale, qmax)
    each = each_plane(w_codes, scale, planes)
    sums = jnp.concatenate([operator.sums(codes, plane, groups) for plane, _ in each])
    gamma, scale = gamma_over_planes(gamma, planes), merged_planes(scale, planes)
    return group_epilogue(sums, gamma, scale, qmax)


def over_planes(x: Shaped[Array, "*rows k"], planes: int) -> Shaped[Array, "*rows pk"]:
    """x or its codes for the contraction with planes that lie behind each other."""
    return x if planes == 1 else jnp.concatenate([x] * planes, axis=-1)


def gamma_over_planes(gamma: Gamma, planes: int) -> Gamma:
    """The gammas of :func:`over_planes`: one for a token stays one."""
    return gamma if gamma.shape[-1] == 1 else over_planes(gamma, planes)


def merged_planes(part: Shaped[Array, "..."], planes: int) -> Shaped[Array, "..."]:
    """Canonical codes or scale with their planes behind each other along the contraction."""
    if planes == 1:
        return part
    *batch, planes, k, n = part.shape
    return part.reshape(*batch, planes * k, n)


def planes_apart(part: Shaped[Array, "..."], planes: int) -> Shaped[Array, "..."]:
    """Undoes :func:`merged_planes`."""
    if planes == 1:
        return part
    *batch, k, n = part.shape
    return part.reshape(*batch, planes, k // planes, n)


def multiply_codes(
    operator: Operator,
    codes: Int8[Array, "..."],
    gamma: Gamma,
    w_codes: PlaneCodes,
    scale: PlaneScale,
    qmax: int,
    config: KernelConfig,
) -> Float32[Array, "..."]:
    """:func:`contract_codes`, by the native library where that is the faster one."""
    planes = planes_of(config)
    if not _is_native(operator, gamma, w_codes, scale, config):
        return contract_codes(operator, codes, gamma, w_codes, scale, qmax, planes)
    *batch, k, n = w_codes.shape
    batch = batch[:-1] if planes > 1 else batch
    rows = codes.shape[len(batch) : -1]
    # The operation knows (slices, rows, ...): batch axes and row axes are flattened.
    flat = (math.prod(batch), math.prod(rows))
    x, gamma = codes.reshape(*flat, k), gamma.reshape(*flat, gamma.shape[-1])
    w, scale = (a.reshape(flat[0], *a.shape[len(batch) :]) for a in (w_codes, scale))
    (y,) = by_platform.run(_operation(qmax, planes), x, gamma, w, scale)
    return y.reshape(*batch, *rows, n)


def _is_native(
    operator: Operator,
    gamma: Gamma,
    w_codes: PlaneCodes,
    scale: PlaneScale,
    config: KernelConfig,
) -> bool:
    if not (
        isinstance(operator, Product) and isinstance(config, TernaryConfig) and _native.preferred()
    ):
        return False
    depth = w_codes.shape[-2] // scale.shape[-2]
    part = w_codes.shape[-2] // joint_groups(gamma, scale)
    return cuts_no_four(depth, part)


@functools.cache
def _operation(qmax: int, planes: int) -> by_platform.Operation:
    """(x (B, M, K), gamma (B, M, A), w (B, K, N), scale (B, G, 1 or N)) -> (B, M, N).

    With planes w is (B, planes, K, N) and scale (B, planes, G, 1 or N).
    """

    def results(x: Any, gamma: Any, w: Any, scale: Any) -> tuple[jax.ShapeDtypeStruct]:
        del gamma, scale
        return (jax.ShapeDtypeStruct((*x.shape[:2], w.shape[-1]), jnp.float32),)

    def native(x: jax.Array, gamma: Gamma, w: jax.Array, scale: jax.Array) -> jax.Array:
        (made,) = results(x, gamma, w, scale)
        x, gamma = over_planes(x, planes), gamma_over_planes(gamma, planes)
        operands = (x, gamma, merged_planes(w, planes), merged_planes(scale, planes))
        return by_library.call(_native.MULTIPLY_CODES, made, *operands, qmax=np.float32(qmax))

    def plain(x: jax.Array, gamma: Gamma, w: jax.Array, scale: jax.Array) -> jax.Array:
        if len(x) > 1:
            return contract_codes(Product(), x, gamma, w, scale, qmax, planes)
        # XLA's fastest product has no batch axis.
        return contract_codes(Product(), x[0], gamma[0], w[0], scale[0], qmax, planes)[None]

    return by_platform.Operation(native, plain, results, rows=2)
