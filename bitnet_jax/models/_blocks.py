"""One layer of a decoder, and the stack of them: one after the other, or scanned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from bitnet_jax._packed.slice_of import SliceOf
from bitnet_jax._packed.stacks import layer_of, sliced_by_scan
from bitnet_jax.models._attention import Attention, LayerCache
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._parts import Projection, RMSNorm, norm_if

Cache = dict[str, LayerCache]

STACKED = "layers"  # the key of a stacked cache

_GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """``down(norm(act(gate(x)) * up(x)))``."""

    def __init__(self, path: str, config: DecoderConfig, *, rngs: nnx.Rngs):
        def projection(name: str, n_in: int, n_out: int) -> Projection:
            return Projection(f"{path}/{name}", n_in, n_out, config.mlp_bias, config, rngs)

        self.gate = projection("gate", config.width, config.hidden)
        self.up = projection("up", config.width, config.hidden)
        self.down = projection("down", config.hidden, config.width)
        self.sub_norm = norm_if(config.sub_norms, config.hidden, config.norm_eps, rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "b l k"]) -> Float[Array, "b l k"]:
        """The perceptron's output."""
        y = _GATES[self.activation](self.gate(x)) * self.up(x)
        return self.down(y if self.sub_norm is None else self.sub_norm(y))


class Block(nnx.Module):
    """Attention and perceptron, each after a norm and beside a residual."""

    def __init__(self, path: str, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.attention = Attention(f"{path}/attention", config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.mlp = MLP(f"{path}/mlp", config, rngs=rngs)
        self.multiplier = config.residual_multiplier

    def __call__(
        self,
        x: Float[Array, "b l k"],
        turned: tuple[jax.Array, jax.Array],
        mask: Bool[Array, "b l t"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "b l k"], Any]:
        """The layer's output and its cache."""
        y, cache = self.attention(self.attention_norm(x), turned, mask, cache)
        x = x + self._scaled(y)
        return x + self._scaled(self.mlp(self.mlp_norm(x))), cache

    def _scaled(self, y: jax.Array) -> jax.Array:
        return y if self.multiplier == 1.0 else y * jnp.asarray(self.multiplier, y.dtype)


def make_layers(config: DecoderConfig, rngs: nnx.Rngs) -> Any:
    """All layers: a list, or one module whose parameters are stacked."""
    if not config.scan:
        blocks = [Block(f"layers/{i}", config, rngs=rngs) for i in range(config.depth)]
        return nnx.List(blocks)
    if config.overrides and any(path.startswith("layers/") for path, _ in config.overrides):
        raise ValueError(
            "Decoder: `scan` stacks layers that are all alike, and `overrides` of the config "
            f"names {config.overrides[0][0]!r}. Leave scan=False for this model."
        )
    make = nnx.vmap(lambda rngs: Block("layers/0", config, rngs=rngs), axis_size=config.depth)
    return make(rngs.split(config.depth))


def run_layers(
    layers: Any,
    config: DecoderConfig,
    x: Float[Array, "b l k"],
    turned: tuple[jax.Array, jax.Array],
    mask: Bool[Array, "b l t"],
    cache: Cache | None,
    each: Callable[[jax.Array], None] | None = None,
) -> tuple[Float[Array, "b l k"], Cache | None]:
    """x through all layers; ``each`` sees what enters every layer but the first."""
    if config.scan:
        return _scanned(layers, config, x, turned, mask, cache, each)
    new: Cache = {}
    for i, layer in enumerate(layers):
        if i and each is not None:
            each(x)
        name = f"layer_{i}"
        graph, state = nnx.split(layer)
        run = _remat(graph, config)
        x, layer_cache = run(state, x, turned, mask, None if cache is None else cache[name])
        new[name] = layer_cache
    return x, None if cache is None else new


def _remat(graph: Any, config: DecoderConfig) -> Callable[..., Any]:
    """One layer as a function of its state, computed again in the backward pass if asked for."""

    def run(state: Any, x, turned, mask, cache):
        return nnx.merge(graph, state)(x, turned, mask, cache)

    return jax.checkpoint(run) if config.remat else run


def _scanned(layers, config, x, turned, mask, cache, each):
    """Layers by an index into their stacks: what reads slices natively gets them uncut."""
    graph, state = nnx.split(layers)
    run = _remat(graph, config)
    stacked = cache is None or STACKED in cache
    stacks: Any = None
    if cache is not None and stacked:
        stacks = dict(cache[STACKED])
    elif cache is not None:  # tunix's own, one entry a layer
        parts = [cache[f"layer_{i}"] for i in range(config.depth)]
        stacks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    ends = None if stacks is None else stacks.pop("end_index")

    def step(carry, layer):
        x, stacks = carry
        at, sliced, end = layer
        own = layer_of(state, sliced, at)
        caches = None
        if stacks is not None:
            caches = {name: SliceOf(stack, at) for name, stack in stacks.items()}
            caches["end_index"] = end
        y, caches = run(own, x, turned, mask, caches)
        if caches is not None:
            end = caches.pop("end_index")
            stacks = {name: part.stack for name, part in caches.items()}
        return (y, stacks), (end, y if each is not None else None)

    places = jnp.arange(config.depth, dtype=jnp.int32)
    (x, stacks), (ends, outputs) = jax.lax.scan(
        step, (x, stacks), (places, sliced_by_scan(state), ends)
    )
    if each is not None and outputs is not None:
        for i in range(config.depth - 1):
            each(outputs[i])
    if stacks is None:
        return x, None
    new = {**stacks, "end_index": ends}
    if stacked:
        return x, {STACKED: new}
    return x, {f"layer_{i}": jax.tree.map(lambda a, i=i: a[i], new) for i in range(config.depth)}


def slots_of(cache: Cache) -> tuple[jax.Array, int]:
    """How full a cache is, for each row, and how many slots it has."""
    layer = cache[STACKED] if STACKED in cache else cache["layer_0"]
    end, k = layer["end_index"], layer["k"]
    return (end[0], k.shape[2]) if STACKED in cache else (end, k.shape[1])


def positions_and_mask(
    batch: int, length: int, start: jax.Array, slots: int, attention_mask: Any, positions: Any
) -> tuple[jax.Array, jax.Array]:
    """Where each token stands, and which slots it sees (batch, length, slots).

    A mask of rank 2 marks the slots that hold a token, padding on the left left out: positions
    count from the first of them. One of rank 3 says all by itself.
    """
    at = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    at = jnp.broadcast_to(at, (batch, length))
    mask = attention_mask
    if mask is not None and mask.ndim == 3:
        return at if positions is None else positions, mask.astype(bool)
    causal = jnp.arange(slots, dtype=jnp.int32)[None, None] <= at[:, :, None]
    if mask is None:
        return at if positions is None else positions, causal
    mask = mask.astype(bool)
    if positions is None:
        count = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - np.int32(1)
        positions = jnp.take_along_axis(jnp.maximum(count, 0), at, axis=1)
    return positions, causal & mask[:, None]
