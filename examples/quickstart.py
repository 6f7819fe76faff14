"""Train a small ternary network on real digits, pack it, save it, load it, run it: ten seconds.

python examples/quickstart.py
"""

import os

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import bitnet_jax as bj

pixels, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)
train, test = jnp.split(jax.random.permutation(jax.random.key(1), len(x)), [1400])

layers = [bj.linen.BitDense(128, norm=True), nn.relu, bj.linen.BitDense(10, norm=True)]
net = nn.Sequential(layers)
params = net.init(jax.random.key(0), x[:1])["params"]
tx = optax.adamw(3e-3)


def loss(params):
    logits = net.apply({"params": params}, x[train])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[train]).mean()


@jax.jit
def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None


(params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=150)

packed, report = bj.pack_params(params)
bj.io.save("digits.bitnet.safetensors", packed)
loaded = bj.prepare(bj.io.load("digits.bitnet.safetensors"))
logits, served = (net.apply({"params": p}, x[test]) for p in (params, loaded))

print(report)
print(f"accuracy, trained: {jnp.mean(logits.argmax(-1) == y[test]):.2%}")
print(f"accuracy, loaded:  {jnp.mean(served.argmax(-1) == y[test]):.2%}")
print(f"logits that differ in any bit: {int((logits != served).sum())} of {logits.size:,}")
print(f"the file: {os.path.getsize('digits.bitnet.safetensors'):,} bytes")
