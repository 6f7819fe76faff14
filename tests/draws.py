"""Arrays and parameters drawn by NumPy: where their values do not matter, nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0):
    """Standard normal float32 values."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def drawn(shapes, seed=1):
    """Arrays like a tree of shapes: kernels as lecun_normal scales them, scales near one."""
    rng = np.random.default_rng(seed)

    def draw(path, like):
        values = rng.normal(size=like.shape)
        if like.ndim > 1:
            values *= np.prod(like.shape[:-1]) ** -0.5
        elif "scale" in jax.tree_util.keystr(path):
            values = 1 + 0.1 * values
        return jnp.asarray(values.astype(like.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def params_of(layer, *args, seed=1, **how):
    """What ``layer.init`` returns as ``params``: its tree, shapes and dtypes, other values."""
    init = functools.partial(layer.init, **how)
    return drawn(jax.eval_shape(init, jax.random.key(seed), *args)["params"], seed)
