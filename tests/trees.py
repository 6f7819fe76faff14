"""What the tests of trees share."""

import flax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def array(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tree():
    return {
        "body": {"dense": {"kernel": array(16, 8), "bias": array(8, seed=1)}},
        "embed": {"embedding": array(10, 16, seed=2)},
        "head": {"kernel": array(8, 4, seed=3)},
    }


CONTAINERS = {
    "dict": lambda packed: packed,
    "FrozenDict": flax.core.freeze,
    "list": lambda packed: [packed, (packed["head"],)],
    "Partitioned": lambda packed: {
        "kernel": nn.Partitioned(packed["head"]["kernel"], names=("in", "out")),
        "bias": nn.Partitioned(packed["body"]["dense"]["bias"], names=("out",)),
    },
}
