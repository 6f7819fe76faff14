"""A small residual convolutional network in plain Flax linen."""

import jax.numpy as jnp
from flax import linen as nn


class ConvNet(nn.Module):
    """A stem, two stages of one residual block each, the second at half the size, a head."""

    width: int = 32
    classes: int = 10

    @nn.compact
    def __call__(self, images):
        """Logits (batch, classes) of images (batch, height, width, channels)."""
        x = nn.Conv(self.width, (3, 3), name="stem")(images)
        for stage, width in enumerate((self.width, 2 * self.width)):
            strides = 1 + stage
            y = nn.Conv(width, (3, 3), strides, name=f"conv_{stage}a")(nn.relu(nn.GroupNorm(4)(x)))
            y = nn.Conv(width, (3, 3), name=f"conv_{stage}b")(nn.relu(nn.GroupNorm(4)(y)))
            if stage:
                x = nn.Conv(width, (1, 1), strides, name=f"skip_{stage}")(x)
            x = x + y
        x = jnp.mean(nn.relu(nn.GroupNorm(4)(x)), axis=(1, 2))
        return nn.Dense(self.classes, name="head")(x)
