"""What the tests of linen layers share."""

import jax.numpy as jnp
import numpy as np
from draws import params_of
from flax import linen as nn

import bitnet_jax as bj
from bitnet_jax.linen import BitDense

K, N = 24, 10


def inputs(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def ready(fields, x):
    """A layer with a bias that is not zero, its float, packed and prepared params."""
    layer = BitDense(N, **fields)
    params = params_of(layer, x)
    packed, _ = bj.pack_params(params, layer.weights)
    return layer, params, packed, bj.prepare(packed)


class Net(nn.Module):
    """ReLU, a residual and biases between ternary layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(BitDense(16)(x))
        x = x + BitDense(16, norm=True)(x)
        return BitDense(4)(nn.relu(x))
