"""A small vision transformer in plain Flax linen."""

import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a norm and beside a residual."""

    heads: int

    @nn.compact
    def __call__(self, x):
        """(batch, tokens, width) to the same."""
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(2 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class ViT(nn.Module):
    """Patches, blocks, mean over the tokens, a head."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    patch: int = 2
    classes: int = 10

    @nn.compact
    def __call__(self, images):
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for i in range(self.depth):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.classes, name="head")(jnp.mean(nn.LayerNorm()(x), axis=1))
