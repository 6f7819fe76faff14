"""What the tests of `ternary_dot` share."""

import functools

import jax
import ml_dtypes
import numpy as np

import bitnet_jax as bj

INT8 = bj.ActivationConfig()
GROUPS = bj.TernaryConfig(granularity=4)
CONFIGS = {"b158": bj.B158, "phase4": bj.PHASE4, "twn": bj.TWN, "groups": GROUPS}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
AXES = ("contracting_axes", "batch_axes")
ternary_dot = jax.jit(
    bj.ternary_dot,
    static_argnums=2,
    static_argnames=(*AXES, "activations", "strength", "dtype", "backward_dtype"),
)


def gaussian(shape, seed=0, dtype=np.float32, sigma=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * sigma).astype(dtype)


def vjp(x, w, g, *args, **kwargs):
    """Output and gradients of ternary_dot, in one program."""

    return _vjp(args, tuple(kwargs.items()))(x, w, g)


@functools.cache
def _vjp(args, kwargs):
    def run(x, w, g):
        y, pull = jax.vjp(lambda x, w: bj.ternary_dot(x, w, *args, **dict(kwargs)), x, w)
        return y, *pull(g.astype(y.dtype))

    return jax.jit(run)
