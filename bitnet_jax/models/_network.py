"""The network of a decoder: tokens in, logits out.

One class for the published families: BitNet b1.58, Llama, Qwen3, MiniCPM. What they
differ in is a flag of :class:`DecoderConfig`::

    x = embedding[tokens]
    x = x + out(sub_norm(attention(rotate(query(n)), rotate(key(n)), value(n))))   n = norm(x)
    x = x + down(sub_norm(act(gate(m)) * up(m)))                                   m = norm(x)
    logits = head(norm(x))

Left out: mixture of experts, sliding windows, encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import core
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Float32, Int, PyTree

from bitnet_jax import _checks
from bitnet_jax.models import _blocks
from bitnet_jax.models._attention import empty_layer
from bitnet_jax.models._axes import MeshAxes, specs_of
from bitnet_jax.models._cache import require_cache_dtype
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._parts import RMSNorm, embedding, linear
from bitnet_jax.models._rope import rotation


class Network(nnx.Module):
    """A decoder without what only a checkpoint has; :class:`Decoder` is the public class."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        who = "Decoder"
        remedy = "Use bj.models.DecoderConfig(vocabulary=...)."
        _checks.require_instance(who, "config", config, DecoderConfig, remedy)
        self.config = config
        self.embed = embedding(config, rngs)
        self.layers = _blocks.make_layers(config, rngs)
        self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        kernel, activations = config.kernel("head"), config.head_activations
        sizes = config.width, config.vocabulary
        head = None if config.tied else linear(*sizes, False, kernel, activations, config, rngs)
        self.head = head

    @property
    def num_embed(self) -> int:
        """How many tokens there are; tunix's name for it."""
        return self.config.vocabulary

    def __call__(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        cache: _blocks.Cache | None = None,
        attention_mask: Array | None = None,
    ) -> tuple[Float32[Array, "b l v"], Any]:
        """The logits of every next token.

        Args:
          tokens: integers.
          positions: of the tokens; None counts from the cache's end, or from the first
            token that a mask of rank 2 marks.
          cache: keys and values of earlier tokens, from :meth:`init_cache`; None: none.
          attention_mask: None; (batch, slots), true where a slot holds a token and not
            padding, with ``slots`` the cache's (without a cache, the tokens); or
            (batch, length, slots), true where a token may look.

        Returns:
          Logits, float32, and the cache with these tokens in it (None without one).

        Raises:
          TypeError: tokens or positions that are no integers; a mask of floats.
          ValueError: shapes that do not fit; more tokens than the cache has free slots. Under
            ``jax.jit``, where how full it is is not known, their logits are NaN.
        """
        x, cache = self.hidden(tokens, positions, cache, attention_mask)
        return self.logits(x), cache

    def hidden(
        self,
        tokens: Int[Array, "b l"],
        positions: Int[Array, "b l"] | None = None,
        cache: _blocks.Cache | None = None,
        attention_mask: Array | None = None,
        *,
        states: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b l k"], Any]:
        """What the head reads: the last layer's output after the norm.

        Args:
          tokens: as for the call itself.
          positions: as there.
          cache: as there.
          attention_mask: as there.
          states: a list that gets the embedding, every layer's output but the last, and the
            result: ``depth + 1`` arrays, in the order of transformers' ``hidden_states``.

        Returns:
          (batch, length, width) in the config's dtype, and the cache.

        Raises:
          TypeError: as the call itself.
          ValueError: as the call itself.
        """
        config = self.config
        tokens = jnp.asarray(tokens)
        start, slots = jnp.zeros((1,), jnp.int32), tokens.shape[-1]
        if cache is not None:
            _require_cache(cache, config)
            start, slots = _blocks.slots_of(cache)
        _require_fitting(tokens, slots, attention_mask)
        batch, length = tokens.shape
        _require_positions(tokens, positions)
        if cache is not None:
            _require_room(batch, length, start, slots)
        at, mask = _blocks.positions_and_mask(
            batch, length, start, slots, attention_mask, positions
        )
        x = self.embed(tokens)
        if config.embedding_multiplier != 1.0:
            x = x * jnp.asarray(config.embedding_multiplier, x.dtype)
        turned = rotation(config.rope, config.head_dim, at, config.dtype)
        each = None
        if states is not None:
            states.append(x)
            each = states.append
        x, cache = _blocks.run_layers(self.layers, config, x, turned, mask, cache, each)
        x = self.norm(x)
        if cache is not None:  # past the last slot, where jit lets nothing be refused
            x = jnp.where(start[0] + length > slots, jnp.asarray(jnp.nan, x.dtype), x)
        if states is not None:
            states.append(x)
        return x, cache

    def logits(self, x: Float[Array, "*b k"]) -> Float32[Array, "*b v"]:
        """The head.

        Args:
          x: what :meth:`hidden` returned, or some rows of it.

        Returns:
          Logits, float32.
        """
        if self.config.logit_multiplier != 1.0:
            x = x * jnp.asarray(self.config.logit_multiplier, x.dtype)
        y = self.embed.attend(x) if self.head is None else self.head(x)
        return y.astype(jnp.float32)

    def init_cache(
        self, batch_size: int, cache_size: int, dtype: jax.typing.DTypeLike | None = None
    ) -> _blocks.Cache:
        """An empty cache of keys and values.

        Args:
          batch_size: rows.
          cache_size: tokens that each row has room for.
          dtype: float32, bfloat16, or int8 with one scale for each token and head;
            None: the config's.

        Returns:
          A plain tree, for ``cache``; see the module's head.

        Raises:
          ValueError: a number below 1; a dtype that holds no keys.

        Example:
          >>> import bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> model.init_cache(1, 16)["layer_0"]["k"].shape
          (1, 16, 4, 8)
        """
        config, who = self.config, "init_cache"
        _checks.require_count(who, "batch_size", batch_size)
        _checks.require_count(who, "cache_size", cache_size)
        kind = config.dtype if dtype is None else require_cache_dtype(who, "dtype", dtype)
        layers = [empty_layer(config, batch_size, cache_size, kind) for _ in range(config.depth)]
        if config.scan:
            return {_blocks.STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
        return {f"layer_{i}": layer for i, layer in enumerate(layers)}

    def partition_specs(
        self, rules: Mapping[str, MeshAxes], *, mesh: Mesh | AbstractMesh | None = None
    ) -> PyTree:
        """The ``PartitionSpec`` of every parameter, by the logical names of its axes.

        Args:
          rules: mesh axes by name: ``"vocabulary"``, ``"embed"``, ``"heads"``, ``"kv_heads"``,
            ``"mlp"``, ``"layers"`` (of stacked layers). Names without a rule are not divided.
          mesh: the mesh that the specs are checked against; by default that of
            ``jax.set_mesh``, if there is one.

        Returns:
          A tree like ``nnx.state(model, nnx.Param)`` with a spec for every array.

        Raises:
          ValueError: an unknown name; a spec that does not divide its parameter.

        Example:
          >>> import bitnet_jax as bj
          >>> from flax import nnx
          >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
          >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
          >>> specs = model.partition_specs({"mlp": "model"})
          >>> specs["layers"][0]["mlp"]["up"]["linear"]["kernel"].get_value()
          P(None, 'model')
        """
        return specs_of(nnx.state(self, nnx.Param), rules, mesh)


def _require_fitting(tokens: jax.Array, slots: int, mask: jax.Array | None) -> None:
    """Refuses tokens or a mask that do not meet the cache."""
    who = "Decoder"
    if tokens.ndim != 2:
        raise ValueError(
            f"{who}: `tokens` must be (batch, length), got shape {tuple(tokens.shape)}. Pass "
            "tokens[None] for a single row."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{who}: `tokens` must be integers, got {_checks.describe(tokens)}.")
    batch, length = tokens.shape
    if length > slots:
        raise ValueError(
            f"{who}: `cache` has {slots} slots, and {length} tokens came. Make it with "
            f"init_cache(batch_size, cache_size), cache_size >= {length}."
        )
    fits = ((batch, slots), (batch, length, slots))
    if mask is not None and tuple(mask.shape) not in fits:
        raise ValueError(
            f"{who}: `attention_mask` must have shape {fits[0]} or {fits[1]} (batch, length, "
            f"slots), got {tuple(mask.shape)}."
        )
    if mask is not None and jnp.issubdtype(mask.dtype, jnp.inexact):
        raise TypeError(
            f"{who}: `attention_mask` must be of truth values or integers, got "
            f"{_checks.describe(mask)}. Pass mask > 0 for ones and zeros, and mask == 0 for zeros "
            "and -inf, which are added to scores."
        )


def _require_cache(cache: object, config: DecoderConfig) -> None:
    """Refuses a cache of another decoder, or of none."""
    forms = ({_blocks.STACKED}, {f"layer_{i}" for i in range(config.depth)})
    found = {*cache} if isinstance(cache, Mapping) else None
    if found not in (forms if config.scan else forms[1:]):
        raise ValueError(
            f"Decoder: `cache` must be what init_cache of this decoder makes, one of "
            f"{config.depth} layers{'' if config.scan else ', which are not stacked'}, got "
            f"{type(cache).__name__} of {sorted(map(str, found or ()))}."
        )


def _require_positions(tokens: jax.Array, positions: jax.Array | None) -> None:
    """Refuses positions that are not one integer for each token."""
    if positions is None:
        return
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(
            f"Decoder: `positions` must be integers, got {_checks.describe(positions)}."
        )
    batch, length = tokens.shape
    if tuple(positions.shape) not in ((batch, length), (1, length)):
        raise ValueError(
            f"Decoder: `positions` must have shape {(batch, length)}, as tokens, or "
            f"{(1, length)} for all rows, got {tuple(positions.shape)}."
        )


def _require_room(batch: int, length: int, start: jax.Array, slots: int) -> None:
    """Refuses tokens for which a cache has no rows, or no free slots, where that is known."""
    if len(start) != batch:
        raise ValueError(
            f"Decoder: `cache` has {len(start)} rows, and `tokens` {batch}. Make it with "
            f"init_cache({batch}, cache_size)."
        )
    if isinstance(start, core.Tracer):
        return
    full = int(start[0])
    if full + length > slots:
        raise ValueError(
            f"Decoder: `cache` has {slots} slots, {full} of them taken, and {length} tokens came. "
            f"Make it with init_cache(batch_size, cache_size), cache_size >= {full + length}."
        )
