"""A float kernel whose rotation quantises to given codes and scales.

``R latent`` is one, up to rounding: rotated again, its mean misses the scale by a few units in
the last place. So the latent of each scale is multiplied by a factor near 1, and some factors
beside the best one are tried until the scale comes out. In float32 that mostly succeeds; where
it does not, the nearest is kept. Zeros are 0 and other weights far above the threshold, so that
no rounding changes a code.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from bitnet_jax._quantize.arrays import CanonicalScale
from bitnet_jax._quantize.config import TernaryConfig
from bitnet_jax._quantize.rotation import rotated_kernel
from bitnet_jax._quantize.ternary import quantize_canonical

_TRIED = 32


class _State(NamedTuple):
    """Of a search, one number for each scale.

    Attributes:
      factor: of the next try.
      best: the factor with the least error so far.
      error: its error.
      tried: how many factors were.
    """

    factor: CanonicalScale
    best: CanonicalScale
    error: CanonicalScale
    tried: Int32[Array, ""]


@functools.partial(jax.jit, static_argnames=("config", "block", "dtype"))
def unrotated_latent(
    latent: Float32[Array, "*b k n"],
    scale: CanonicalScale,
    config: TernaryConfig,
    block: int,
    dtype: np.dtype,
) -> Float[Array, "*b k n"]:
    """A kernel of ``dtype`` whose rotation has the codes of a latent one, and these scales."""
    unit = np.float32(max(jnp.finfo(dtype).eps / 8, 2.0**-24))
    depth = latent.shape[-2] // scale.shape[-2]

    def kernel(factor: CanonicalScale) -> Float[Array, "*b k n"]:
        scaled = latent * jnp.repeat(factor, depth, axis=-2)
        return rotated_kernel(scaled, block).astype(dtype)

    def look(state: _State) -> _State:
        at = state.tried
        found = quantize_canonical(rotated_kernel(kernel(state.factor), block), config)[1]
        error = jnp.abs(found - scale)
        better = error < state.error
        best = jnp.where(better, state.factor, state.best)
        # First to where the scale should be, then a step further to each side by turns.
        ratio = jnp.where(jnp.isfinite(scale / found), scale / found, jnp.float32(1))
        side = jnp.where(at % 2 == 0, jnp.float32(1), jnp.float32(-1))
        step = 1 + side * ((at + 1) // 2).astype(jnp.float32) * unit
        moved = jnp.where(at == 0, state.factor * ratio, best * step)
        hit = jnp.minimum(error, state.error) == 0
        least = jnp.minimum(error, state.error)
        return _State(jnp.where(hit, best, moved), best, least, at + 1)

    def goes_on(state: _State) -> Bool[Array, ""]:
        return jnp.any(state.error > 0) & (state.tried < _TRIED)

    ones = jnp.ones_like(scale)
    start = _State(ones, ones, jnp.full_like(scale, jnp.inf), jnp.zeros((), jnp.int32))
    return kernel(jax.lax.while_loop(goes_on, look, start).best)
