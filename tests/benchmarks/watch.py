"""What watching the codes costs a training step.

    python tests/benchmarks/watch.py

Batch 256, 1024-4096-1024, BitDense, AdamW, with and without ``watch_trits(every=50)``.
A round is 50 steps, so that one look is in every round.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from _bench import HEADER, in_turn, machine, parse, record, table, versus
from flax import linen as nn

import bitnet_jax as bj

EVERY = 50


def runner(tx: optax.GradientTransformation):
    net = nn.Sequential([bj.linen.BitDense(4096), nn.relu, bj.linen.BitDense(1024)])
    x = jax.random.normal(jax.random.key(0), (256, 1024))
    params = net.init(jax.random.key(2), x)["params"]

    def loss(params, x):
        return jnp.mean(jnp.square(net.apply({"params": params}, x) - 1.0))

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    held = [(params, tx.init(params))]

    def run():
        for _ in range(EVERY):
            held[0] = step(*held[0], x)
        return held[0]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parse(parser)
    machine()
    rounds = args.rounds
    adamw = optax.adamw(1e-3)
    watch = optax.chain(bj.optim.watch_trits(EVERY), adamw)
    timings = in_turn({"adamw": runner(adamw), "with watch_trits": runner(watch)}, rounds, 1)
    goals = {"adamw": None, "with watch_trits": 1.03}
    rows = [[name, *versus(t, goals[name])] for name, t in timings.items()]
    table(f"{EVERY} training steps", ("", *HEADER), rows)

    record(args)


if __name__ == "__main__":
    main()
