"""Attention over a cache of keys and values: native on CPUs, in plain JAX elsewhere.

``softmax(q k^T / sqrt(d)) v`` for every group of query heads. XLA copies the keys and
transposes the values of the whole cache before it multiplies them; the native form reads
both where they lie, and only slots that somebody sees. Scores and sums are float32; the
two forms agree to their last bits, not in them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from bitnet_jax import _native
from bitnet_jax._native import by_platform
from bitnet_jax._packed.slice_of import SliceOf, cut

_HIDDEN = np.float32(-1e30)  # a score that softmax gives no weight

_NATIVE = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def attend(
    q: Float[Array, "b l h d"],
    k: Float[Array, "b t g d"] | SliceOf,
    v: Float[Array, "b t g d"] | SliceOf,
    mask: Bool[Array, "b l t"],
) -> Float[Array, "b l h d"]:
    """What each query gathers from the slots that its row of the mask shows, in q's dtype."""
    if k.dtype not in _NATIVE or _native.load().reason is not None:
        return plain(q, cut(k), cut(v), mask)
    whole = SliceOf(k[None], jnp.int32(0)) if not isinstance(k, SliceOf) else k
    values = v.stack if isinstance(v, SliceOf) else v[None]
    return _attend(q, whole.stack, values, mask, whole.at)


@jax.custom_jvp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, at: jax.Array) -> jax.Array:
    wide = q.astype(jnp.float32)
    return by_platform.run(_OPERATION, wide, k, v, mask, at)[0].astype(q.dtype)


@_attend.defjvp
def _attend_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(_plain_at, primals, tangents)


def _plain_at(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, at: jax.Array
) -> jax.Array:
    return plain(q, cut(SliceOf(k, at)), cut(SliceOf(v, at)), mask)


def plain(
    q: Float[Array, "b l h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g d"],
    mask: Bool[Array, "b l t"],
    k_scale: Float32[Array, "b t g 1"] | None = None,
    v_scale: Float32[Array, "b t g 1"] | None = None,
) -> Float[Array, "b l h d"]:
    """The same in plain JAX, also for int8 keys and values, with a scale for each."""
    batch, length, heads, dim = q.shape
    wide = jnp.float32
    groups = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    kind = q.dtype if k.dtype.itemsize <= q.dtype.itemsize else k.dtype
    # (batch, kv head, query of the group, l, t)
    scores = jnp.einsum(
        "blkgd,btkd->bkglt", groups.astype(kind), k.astype(kind), preferred_element_type=wide
    )
    scores = scores * np.float32(dim**-0.5) * _per_key(k_scale)
    scores = jnp.where(mask[:, None, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1) * _per_key(v_scale)
    y = jnp.einsum("bkglt,btkd->blkgd", weights.astype(kind), v.astype(kind))
    return y.reshape(batch, length, heads, dim).astype(q.dtype)


def _per_key(scale: Float32[Array, "b t g 1"] | None) -> Float32[Array, "b g 1 1 t"]:
    """The scale of each key as (batch, kv head, 1, 1, t); 1 where there is none."""
    if scale is None:
        return jnp.ones((1, 1, 1, 1, 1), jnp.float32)
    return jnp.moveaxis(scale, 1, -1)[:, :, None]


def _by_library(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, at: jax.Array
) -> jax.Array:
    call = jax.ffi.ffi_call(_native.ATTEND, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    return call(q, k, v, mask, at)


_OPERATION = by_platform.Operation(
    native=_by_library,
    plain=_plain_at,
    results=lambda q, *_: (jax.ShapeDtypeStruct(q.shape, jnp.float32),),
    mapped=_plain_at,
    partitioned=True,
)
