"""A small causal language model in plain Flax linen: scanned, rematerialised, in bfloat16."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """Causal attention and a multilayer perceptron, each after a norm and beside a residual."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, _):
        """(batch, tokens, width) to the same, and nothing else, as a scan wants it."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1]))
        y = nn.LayerNorm(dtype=self.dtype)(x)
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")
        x = x + attention(y, mask=mask)
        y = nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="up")(
            nn.LayerNorm(dtype=self.dtype)(x)
        )
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(nn.gelu(y)), None


class Decoder(nn.Module):
    """Tokens to the logits of the next one; the table is the head as well."""

    vocabulary: int
    width: int = 64
    depth: int = 3
    heads: int = 4
    length: int = 64
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens):
        """Logits (batch, tokens, vocabulary) of tokens (batch, tokens)."""
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = embed(tokens) + position[None, : tokens.shape[1]].astype(self.dtype)
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = blocks(self.heads, self.dtype, name="blocks")(x, None)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x)).astype(jnp.float32)
