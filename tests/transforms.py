"""What the tests of optimizers share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bitnet_jax as bj

SHAPES = {"a": {"kernel": (5, 3)}, "b": (7,)}


def tree(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: rng.normal(size=s).astype(dtype), SHAPES, is_leaf=is_shape)


TRANSFORMS = {
    "grokfast_ema": lambda **k: bj.optim.grokfast_ema(**{"lamb": 0.5} | k),
    "grokfast_ma": lambda **k: bj.optim.grokfast_ma(**{"window_size": 3, "lamb": 0.5} | k),
    "mugrokfast": lambda **k: bj.optim.mugrokfast(**{"learning_rate": 1e-2} | k),
    "b158_adamw": lambda **k: bj.optim.b158_adamw(100, warmup_steps=5, **k),
    "watch_trits": lambda **k: bj.optim.watch_trits(2, **k),
}
FILTERS = ("grokfast_ema", "grokfast_ma")


def follow(tx, steps=7, dtype=jnp.float32):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree())
    state, update = tx.init(params), jax.jit(tx.update, donate_argnums=1)
    for t in range(steps):
        grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(t + 1))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def equal(one, other):
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)
    return all(jax.tree.leaves(same))
