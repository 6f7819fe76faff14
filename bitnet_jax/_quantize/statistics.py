"""Means, medians and root mean squares whose bits no context changes.

``jnp.mean`` gives another last bit in eager mode, under jit, under vmap and on
shards, and one last bit of a scale changes every output of a layer. So a sum is
pinned here: a halving tree over adjacent pairs, odd ends padded with zeros,
first down the contraction, then across the outputs, times ``float32(1 / n)``.

Magnitudes enter a sum times 2**-32 (:data:`SHIFT`). A power of two changes no
bit of a float, and the sum of n weights near the largest float32 stays finite.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from bitnet_jax._quantize.pinned import pinned
from bitnet_jax._quantize.rounded import quotient, root

SHIFT = np.float32(2.0**-32)  # a power of two: exact for weights above 2**-94

UNSHIFT = np.float32(2.0**32)

_LARGEST = np.float32(np.finfo(np.float32).max * 2.0**-32)


def mean(magnitude: Float32[Array, "*b g k n"], across: bool) -> Float32[Array, "*b g 1 m"]:
    """The mean of each group; ``across`` all outputs, or of each output on its own."""
    n = magnitude.shape[-2] * (magnitude.shape[-1] if across else 1)
    # Times a reciprocal that is rounded here, once: compilers treat a division each their way.
    return _capped(total(magnitude, across) * np.float32(1 / n))


def mean_of_kept(
    magnitude: Float32[Array, "*b g k n"], keep: Bool[Array, "*b g k n"], across: bool
) -> Float32[Array, "*b g 1 m"]:
    """:func:`mean` over the marked weights; 0 where none is marked."""
    # Integers add up exactly in any order; only the floats need the tree.
    count = keep.sum(axis=(-2, -1) if across else -2, keepdims=True, dtype=jnp.int32)
    # Zeros in the place of what is not kept: the tree has one shape, whatever is kept.
    summed = total(jnp.where(keep, magnitude, 0.0), across)
    return _capped(quotient(summed, jnp.maximum(count, 1).astype(jnp.float32)))


def median(magnitude: Float32[Array, "*b g k n"], across: bool) -> Float32[Array, "*b g 1 m"]:
    """The median of each group, of an even count the mean of the middle two."""
    if across:
        # A group over all outputs is one long column.
        lead = magnitude.shape[:-2]
        magnitude = magnitude.reshape(*lead, math.prod(magnitude.shape[-2:]), 1)
    n = magnitude.shape[-2]
    # Behind a barrier: XLA would sort a kernel that it knows while it compiles, in minutes.
    ordered = jnp.sort(jax.lax.optimization_barrier(magnitude), axis=-2)
    low, high = (jax.lax.slice_in_dim(ordered, i, i + 1, axis=-2) for i in ((n - 1) // 2, n // 2))
    # NaN sorts last and would hide behind the median: the largest brings it back.
    return (low + high) * 0.5 + jax.lax.slice_in_dim(ordered, n - 1, n, axis=-2) * 0.0


def rms(x: Float32[Array, "... k"], eps: float) -> Float32[Array, "... 1"]:
    """``sqrt(mean(x**2) + eps)`` of each token, the same bits in every context."""
    # Pinned, or jit would contract each product with the add that follows.
    total = _pair_sum(pinned(x * x), axis=-1)
    return root(pinned(total * np.float32(1 / x.shape[-1])) + np.float32(eps))


def _pair_sum(v: Float32[Array, "..."], axis: int) -> Float32[Array, "..."]:
    """Sums one axis (kept, length 1) by halving over adjacent pairs.

    Two levels of the tree at a time, which halves the memory that the first one
    writes; where an end is short of four, zeros fill it up and change no sum.
    """
    axis %= v.ndim
    while v.shape[axis] > 1:
        v = jnp.pad(v, [(0, -v.shape[axis] % 4 if a == axis else 0) for a in range(v.ndim)])
        # (..., length, ...) -> (..., length / 4, 4, ...): four neighbours on an axis of their own.
        fours = v.reshape(*v.shape[:axis], v.shape[axis] // 4, 4, *v.shape[axis + 1 :])
        a, b, c, d = (jax.lax.index_in_dim(fours, i, axis + 1, keepdims=False) for i in range(4))
        v = (a + b) + (c + d)  # the parentheses are the tree: another order has other bits
    return v


def total(v: Float32[Array, "*b g k n"], across: bool) -> Float32[Array, "*b g 1 m"]:
    """The sum of each group in an order that is fixed; ``across`` all outputs, or of each."""
    # Down the contraction first: a shard of outputs sums what the whole kernel sums.
    v = _pair_sum(v, axis=-2)
    return _pair_sum(v, axis=-1) if across else v


def _capped(mean: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Keeps rounding from carrying a mean past the largest float; Inf stays Inf."""
    return jnp.where(jnp.isinf(mean), mean, jnp.minimum(mean, _LARGEST))
