"""Attention with grouped heads, and the cache of keys and values.

A cache is a plain tree, the one that tunix's samplers make and read::

    {"layer_0": {"k": (batch, slots, kv_heads, head_dim), "v": the same, "end_index": (batch,)},
     "layer_1": ...}

New keys and values go to the slots from ``end_index[0]`` on, so all rows of a batch are
equally full; prompts of different lengths are padded on the left and masked. An int8
cache has ``k_scale`` and ``v_scale`` beside, one float32 for each token and head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from bitnet_jax._matmul.attend import attend as attend_natively
from bitnet_jax._matmul.attend import plain as attend_plain
from bitnet_jax._packed.slice_of import SliceOf, cut
from bitnet_jax._quantize.int8 import quantize_activations
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._parts import Projection, norm_if
from bitnet_jax.models._rope import rotate

LayerCache = dict[str, Any]  # arrays, or slices of stacks

_STEP = np.float32(1 / 127)


def empty_layer(
    config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike
) -> LayerCache:
    """The cache of one layer, with nothing in it."""
    shape = (batch, slots, config.kv_heads, config.head_dim)
    cache = {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
    if jnp.dtype(dtype) == jnp.int8:
        cache |= {f"{n}_scale": jnp.zeros((*shape[:-1], 1), jnp.float32) for n in ("k", "v")}
    return cache | {"end_index": jnp.zeros((batch,), jnp.int32)}


def _written(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """The cache with new keys and values behind the old ones."""
    start = cache["end_index"][0]
    new = dict(cache)
    for name, value in (("k", k), ("v", v)):
        parts = {name: value.astype(cache[name].dtype)}
        if f"{name}_scale" in cache:
            codes, gamma = quantize_activations(value)
            parts = {name: codes, f"{name}_scale": gamma * _STEP}
        for key, part in parts.items():
            new[key] = _put(cache[key], part, start)
    new["end_index"] = cache["end_index"] + jnp.int32(k.shape[1])
    return new


def _put(old: Any, part: jax.Array, start: jax.Array) -> Any:
    """An array, or a slice of a stack, with a part of it replaced from a slot on."""
    if not isinstance(old, SliceOf):
        return jax.lax.dynamic_update_slice_in_dim(old, part, start, axis=1)
    zero = jnp.zeros((), start.dtype)
    places = (old.at.astype(start.dtype), zero, start, zero, zero)
    return SliceOf(jax.lax.dynamic_update_slice(old.stack, part[None], places), old.at)


def attend(
    q: Float[Array, "b l h d"],
    keys: LayerCache,
    mask: Bool[Array, "b l t"],
    *,
    cached: bool,
) -> Float[Array, "b l h d"]:
    """``softmax(q k^T / sqrt(d)) v`` for every group of query heads; scores in float32."""
    k, v = keys["k"], keys["v"]
    if cached and "k_scale" not in keys:
        return attend_natively(q, k, v, mask)
    scales = keys.get("k_scale"), keys.get("v_scale")
    return attend_plain(q, cut(k), cut(v), mask, *map(cut, scales))


class Attention(nnx.Module):
    """Causal attention with grouped heads and rotated positions."""

    def __init__(self, path: str, config: DecoderConfig, *, rngs: nnx.Rngs):
        bias, dim = config.attention_bias, config.head_dim
        wide, narrow = config.heads * dim, config.kv_heads * dim

        def projection(name: str, n_in: int, n_out: int) -> Projection:
            return Projection(f"{path}/{name}", n_in, n_out, bias, config, rngs)

        self.query = projection("query", config.width, wide)
        self.key = projection("key", config.width, narrow)
        self.value = projection("value", config.width, narrow)
        self.out = projection("out", wide, config.width)
        self.query_norm = norm_if(config.query_key_norm, dim, config.norm_eps, rngs)
        self.key_norm = norm_if(config.query_key_norm, dim, config.norm_eps, rngs)
        self.sub_norm = norm_if(config.sub_norms, wide, config.norm_eps, rngs)
        self.head_dim = dim

    def __call__(
        self,
        x: Float[Array, "b l k"],
        turned: tuple[jax.Array, jax.Array],
        mask: Bool[Array, "b l t"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "b l k"], Any]:
        """What the tokens gather, and the cache with their keys and values."""
        q, k, v = (self._heads(p, x) for p in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, *turned), rotate(k, *turned)
        cache = cache if cache is None else _written(cache, k, v)
        keys = {"k": k, "v": v} if cache is None else cache
        y = attend(q, keys, mask, cached=cache is not None)
        y = y.reshape(*x.shape[:2], -1)
        return self.out(y if self.sub_norm is None else self.sub_norm(y)), cache

    def _heads(self, project: Projection, x: jax.Array) -> jax.Array:
        return project(x).reshape(*x.shape[:2], -1, self.head_dim)
