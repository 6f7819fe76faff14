"""LoRA over packed kernels: train small float adapters, keep the two-bit base frozen.

>>> import jax, jax.numpy as jnp, bitnet_jax as bj
>>> layer = bj.linen.BitDense(16)
>>> x = jax.random.normal(jax.random.key(0), (8, 64))
>>> params = layer.init(jax.random.key(1), x)["params"]
>>> packed, _ = bj.pack_params(params)
>>> adapters = bj.lora.init(packed, 4, key=jax.random.key(2))
>>> def loss(adapters):
...     y = layer.apply({"params": bj.lora.attach(packed, adapters)}, x)
...     return jnp.square(y - 1.0).mean()
>>> grads = jax.grad(loss)(adapters)  # with respect to the adapters alone
>>> jax.tree.map(jnp.shape, grads.kernels)
{'kernel': {'a': (64, 4), 'b': (4, 16)}}
"""

from bitnet_jax.lora._adapters import Adapters, attach, init
from bitnet_jax.lora._merge import MergedKernel, MergeReport, merge

__all__ = ["Adapters", "MergeReport", "MergedKernel", "attach", "init", "merge"]
