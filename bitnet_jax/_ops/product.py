"""The integer product and the one epilogue, shared by training and serving.

The sums are int32 and exact, whatever the order, the batch and the device. The
epilogue is the only place where they become floating point, so a network gives
the same bits from float params and from packed ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32, PyTree, Shaped

from bitnet_jax import _mesh
from bitnet_jax._quantize.arrays import (
    Activations,
    AnyArray,
    CanonicalCodes,
    CanonicalKernel,
    CanonicalScale,
    DTypeLike,
)
from bitnet_jax._quantize.pinned import pinned

# An int8 product of a single row runs off XLA's fast path on CPU; four rows do not.
_FEWEST_ROWS = 4


def merge_rows(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes ``product(x, *weights)`` of 2-D x fast under vmap over x.

    vmap over examples would turn each single row into a padded product of its
    own. This rule stacks the mapped rows into one product instead. Where the
    weights are mapped too, plain batching applies.
    """

    @jax.custom_batching.custom_vmap
    def merged(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return product(x, *weights)

    @merged.def_vmap
    def rule(
        size: int, mapped: Sequence[bool], x: jax.Array, *weights: jax.Array
    ) -> tuple[jax.Array, bool]:
        x_mapped, *weights_mapped = mapped
        # Each example has weights of its own: a batched product, as vmap would make it.
        if any(jax.tree.leaves(weights_mapped)):
            in_axes = (0 if x_mapped else None, *_in_axes(weights_mapped))
            return jax.vmap(product, in_axes=in_axes, axis_size=size)(x, *weights), True
        # (size, rows, ...) -> (size * rows, ...): one product of all rows, and back.
        rows = x.shape[1]
        y = merged(x.reshape(size * rows, *x.shape[2:]), *weights)
        return y.reshape(size, rows, *y.shape[1:]), True

    return merged


def _in_axes(mapped: PyTree) -> PyTree:
    return jax.tree.map(lambda m: 0 if m else None, mapped)


@merge_rows
def _rows_dot(x: Int8[Array, "m k"], w: Int8[Array, "k n"]) -> Int32[Array, "m n"]:
    return rows_padded(lambda rows: int32_dot(rows, w), x)


def rows_padded(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Runs a product of rows with a lone row padded to a few."""
    if x.shape[0] != 1:
        return product(x)
    # Rows of zeros; integers, so the first row's sums are what they would be alone.
    short = [(0, _FEWEST_ROWS - 1)] + [(0, 0)] * (x.ndim - 1)
    return product(jnp.pad(x, short))[:1]


def int32_dot(x: Int8[Array, "m k"], w: Int8[Array, "k n"]) -> Int32[Array, "m n"]:
    """The plain 2-D product of int8 codes, summed in int32."""
    return _int32_dot_general(x, w, (((1,), (0,)), ((), ())))


def _int32_dot_general(
    x: Int8[Array, "..."], w: Int8[Array, "..."], dimensions: lax.DotDimensionNumbers
) -> Int32[Array, "..."]:
    """An integer product that is kept apart from what makes its operands, but on CPUs.

    On GPUs XLA fuses the two into one kernel. For a few rows that kernel gave twice the
    sums (jax 0.11.2, an H200, 3 rows by 64 by 48), and it was no faster.
    """
    x, w = lax.platform_dependent(x, w, cpu=_as_they_are, default=_apart)
    return lax.dot_general(x, w, dimensions, preferred_element_type=jnp.int32)


def _as_they_are(*operands: jax.Array) -> tuple[jax.Array, ...]:
    return operands


def _apart(*operands: jax.Array) -> tuple[jax.Array, ...]:
    return lax.optimization_barrier(operands)


def int_dot(x: Int8[Array, "*rows k"], w: CanonicalCodes) -> Int32[Array, "*rows n"]:
    """Exact int32 sums of int8 codes over the contraction, slice by slice."""
    batch = w.ndim - 2
    if batch:
        # Batch axes lead in both; x's last axis meets w's second to last.
        lead = tuple(range(batch))
        dims = (((x.ndim - 1,), (batch,)), (lead, lead))
        return _int32_dot_general(x, w, dims)
    # One slice: every row axis is one, for the fast path of 2-D products.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _rows_dot(rows, w).reshape(*x.shape[:-1], w.shape[-1])


def group_sums(
    x: Int8[Array, "*rows k"], w: CanonicalCodes, groups: int
) -> Int32[Array, "g *rows n"]:
    """Int32 sums of each group of adjacent weights along the contraction."""
    if groups == 1:
        return int_dot(x, w)[None]
    batch, size = w.ndim - 2, w.shape[-2] // groups
    # Groups become one more batch axis: x (*rows, K) -> (G, *rows, K/G), first, and w
    # (*b, K, N) -> (*b, G, K/G, N) -> (G, *b, K/G, N); int_dot pairs the leading axes.
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, size), -2, 0)
    w = jnp.moveaxis(w.reshape(*w.shape[:-2], groups, size, w.shape[-1]), batch, 0)
    return int_dot(x, w)


def epilogue(
    sums: Int32[Array, "*rows n"],
    gamma: Float32[Array, "..."],
    scale: Float32[Array, "*b 1 m"],
    qmax: int,
) -> Float32[Array, "*rows n"]:
    """``(sums * gamma) * (scale * R)`` with ``R = float32(1 / qmax)``, both products pinned.

    The reciprocal of qmax is a constant: XLA would turn a division into one in
    some programs and not in others. The first pin keeps constants from being put
    together where gamma or the scale is known at compile time; the second keeps the
    add of a bias or a residual from being contracted into the last product. A token
    with NaN or Inf has an infinite gamma, and NaN in its output.
    """
    scale = align_scale(scale, sums.ndim)  # (*b, 1, m) -> (*b, 1, ..., 1, m) beside the rows
    # Times 1, or times NaN where it is not finite: 0 * Inf would be lost among the products.
    gamma, scale = gamma * (1.0 + gamma * 0.0), scale * (1.0 + scale * 0.0)
    # This association is the promise: float32 products do not commute past a rounding.
    return pinned(pinned(sums.astype(jnp.float32) * gamma) * (scale * np.float32(1 / qmax)))


def group_epilogue(
    sums: Int32[Array, "s *rows n"],
    gamma: Float32[Array, "..."],
    scale: CanonicalScale,
    qmax: int,
) -> Float32[Array, "*rows n"]:
    """The epilogue of each group, added in ascending order.

    Gamma is (..., 1) or (..., groups of x), and the scale has groups of its own: both
    divide the groups of the sums.
    """
    groups = sums.shape[0]
    if groups == 1:
        return epilogue(sums[0], gamma, scale, qmax)

    def add(
        total: Float32[Array, "..."], group: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[Float32[Array, "..."], None]:
        sums, gamma, scale = group
        return total + epilogue(sums, gamma[..., None], scale[..., None, :], qmax), None

    # A scan adds in this order whatever the fusion: floats do not add associatively.
    start = jnp.zeros(sums.shape[1:], jnp.float32)
    start, sums, gamma, scale = _mesh.varying_alike(start, sums, gamma, scale)
    gamma, scale = (_of_each(groups, a, axis) for a, axis in ((gamma, -1), (scale, -2)))
    return lax.scan(add, start, (sums, gamma, scale))[0]


def joint_groups(gamma: Float32[Array, "..."], scale: CanonicalScale) -> int:
    """The fewest groups of a contraction that cut neither a group of x nor one of the kernel."""
    return math.lcm(gamma.shape[-1], scale.shape[-2])


def _of_each(groups: int, values: Float32[Array, "..."], axis: int) -> Float32[Array, "..."]:
    """The value of each of so many groups, groups first, from those of larger ones on ``axis``."""
    return jnp.moveaxis(jnp.repeat(values, groups // values.shape[axis], axis), axis, 0)


class Product(NamedTuple):
    """The operator of a dense layer: x (*rows, K) times a canonical kernel (*b, K, N).

    An operator is what a layer does with codes and with floats, once each: its
    integer sums, its float form, and that form's two transposes. The rows start
    with the kernel's batch axes.
    """

    # A token is one row: the last axis of x.
    @property
    def token_axes(self) -> tuple[int, ...]:
        """The axes of x that share one gamma."""
        return (-1,)

    def sums(
        self, x: Int8[Array, "*rows k"], w: CanonicalCodes, groups: int
    ) -> Int32[Array, "g *rows n"]:
        """Exact int32 sums of codes, one for each group along the contraction."""
        return group_sums(x, w, groups)

    def apply(
        self, x: Activations, w: CanonicalKernel, precision: lax.PrecisionLike = None
    ) -> Float[Array, "..."]:
        """The product of floats."""
        lead = tuple(range(w.ndim - 2))
        # x's last axis meets w's second to last; leading axes are slices of both.
        dims = (((x.ndim - 1,), (len(lead),)), (lead, lead))
        return lax.dot_general(x, w, dims, precision=precision)

    def to_input(
        self,
        g: Float[AnyArray, "*rows n"],
        w: Shaped[AnyArray, "*b k n"],
        x_shape: tuple[int, ...],
        dtype: DTypeLike,
    ) -> Float32[Array, "*rows k"]:
        """``g w^T``, with operands in ``dtype``, summed in float32."""
        del x_shape
        lead = tuple(range(w.ndim - 2))
        # g's outputs meet w's last axis, which transposes w without moving it.
        dims = (((g.ndim - 1,), (len(lead) + 1,)), (lead, lead))
        return _float32_dot(g, w, dims, dtype)

    def to_kernel(
        self,
        x: Shaped[AnyArray, "*rows k"],
        g: Float[AnyArray, "*rows n"],
        w_shape: tuple[int, ...],
        dtype: DTypeLike,
    ) -> Float32[Array, "*b k n"]:
        """``x^T g`` over every row axis."""
        batch = len(w_shape) - 2
        # Slices stay apart, all other rows are summed over.
        lead, rows = tuple(range(batch)), tuple(range(batch, g.ndim - 1))
        return _float32_dot(x, g, ((rows, rows), (lead, lead)), dtype)


def _float32_dot(
    a: Shaped[AnyArray, "..."],
    b: Shaped[AnyArray, "..."],
    dims: lax.DotDimensionNumbers,
    dtype: DTypeLike,
) -> Float32[Array, "..."]:
    # Operands may be bfloat16, or int8 codes; the sum is float32 in every case.
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def align_scale(scale: Float32[Array, "*b g m"], ndim: int) -> Float32[Array, "..."]:
    """Inserts row axes between a scale's batch axes and its outputs, for one group."""
    batch = scale.shape[:-2]
    return scale.reshape(*batch, *(1,) * (ndim - len(batch) - 1), scale.shape[-1])
