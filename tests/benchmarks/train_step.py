"""A training step (forward, backward, AdamW) against plain ``nn.Dense``.

    python tests/benchmarks/train_step.py

Batch 256, 1024-4096-1024, float32. The third row does the backward products in
bfloat16. Saved residuals are the bytes that the backward pass holds on to.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _bench import HEADER, in_turn, machine, parse, record, table, versus
from flax import linen as nn

import bitnet_jax as bj


class Net(nn.Module):
    layer: Any

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.layer(features=4096)(x))
        return self.layer(features=1024)(x)


def layers() -> dict[str, Any]:
    def half(features):
        return bj.linen.BitDense(features=features, backward_dtype=jnp.bfloat16)

    return {"nn.Dense": nn.Dense, "BitDense": bj.linen.BitDense, "BitDense, bf16 backward": half}


def setup(layer: Any):
    net = Net(layer)
    x = jax.random.normal(jax.random.key(0), (256, 1024))
    target = jax.random.normal(jax.random.key(1), (256, 1024))
    params = net.init(jax.random.key(2), x)["params"]

    def loss(params):
        return jnp.mean(jnp.square(net.apply({"params": params}, x) - target))

    return params, loss


def residual_bytes(params: Any, loss: Any) -> int:
    _, vjp = jax.vjp(jax.jit(loss), params)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))


def runner(params: Any, loss: Any):
    tx = optax.adamw(1e-3)

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    held = [(params, tx.init(params))]

    def run():
        held[0] = step(*held[0])
        return held[0]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    args = parse(parser)
    rounds = args.rounds
    machine()
    saved, runs = {}, {}
    for name, layer in layers().items():
        params, loss = setup(layer)
        saved[name] = residual_bytes(params, loss)
        runs[name] = runner(params, loss)
    timings = in_turn(runs, rounds)
    goals = dict(zip(runs, (None, 0.92, 0.82), strict=True))
    rows = [[name, *versus(t, goals[name])] for name, t in timings.items()]
    table("Training step, batch 256, 1024-4096-1024", ("layer", *HEADER), rows)
    base = saved["nn.Dense"]
    rows = [
        [name, f"{n / 2**20:.1f} MiB", f"{n / base:.2f}", "" if n == base else "<= 0.60"]
        for name, n in saved.items()
    ]
    table("Saved residuals", ("layer", "bytes", "ratio", "goal"), rows)

    record(args)


if __name__ == "__main__":
    main()
