"""The small vision transformer once more, in plain Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Attention and a multilayer perceptron, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        """(batch, tokens, width) to the same."""
        x = x + self.attention(self.norms[0](x))
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class ViT(nnx.Module):
    """Patches, blocks, mean over the tokens, a head."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, *, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, width, (2, 2), strides=2, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 16, width)))
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        """Logits (batch, 10) of images (batch, 8, 8, 1)."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
