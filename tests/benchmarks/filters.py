"""What gradient filters cost beside the optimizer they stand in front of.

    python tests/benchmarks/filters.py

A jitted, donated update of an 8M-parameter tree (ten blocks of width 256), against
``optax.adamw`` alone. The floors count words of memory: AdamW reads and writes 7 a
parameter, the average adds 2, a window with one running sum 4.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from _bench import HEADER, in_turn, machine, parse, record, table, versus

import bitnet_jax as bj


def tree() -> dict:
    block = {name: (256, 256) for name in ("query", "key", "value", "out")}
    block |= {"up": (256, 1024), "down": (1024, 256), "bias": (1024,)}
    return {
        f"block_{i}": {name: jnp.full(shape, 0.01) for name, shape in block.items()}
        for i in range(10)
    }


def runner(tx: optax.GradientTransformation):
    grads = jax.tree.map(lambda x: 2 * x, tree())

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    held = [(tree(), tx.init(tree()))]

    def run():
        held[0] = step(*held[0], grads)
        return held[0]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    args = parse(parser)
    rounds = args.rounds
    machine()
    adamw = optax.adamw(1e-3)
    ema, ma = bj.optim.grokfast_ema, bj.optim.grokfast_ma
    cases = {
        "adamw": (None, "", None),
        "grokfast_ema, adamw": (ema(), "1.29", 1.4),
        "grokfast_ma(10), adamw": (ma(10), "1.57", None),
        "grokfast_ma(100), adamw": (ma(100), "1.57", 1.8),
        "grokfast_ma(100), bfloat16 window, adamw": (ma(100, buffer_dtype=jnp.bfloat16), "", 1.7),
    }
    runs = {k: runner(optax.chain(f, adamw) if f else adamw) for k, (f, *_) in cases.items()}
    timings = in_turn(runs, rounds, 5)
    rows = [[k, *versus(t, cases[k][2]), cases[k][1]] for k, t in timings.items()]
    table("one update", ("", *HEADER, "floor"), rows)
    ten, hundred = (timings[f"grokfast_ma({w}), adamw"].median for w in (10, 100))
    print(f"\ngrokfast_ma(100) takes {hundred / ten:.2f} of grokfast_ma(10) (goal: 0.90 to 1.10)")

    record(args)


if __name__ == "__main__":
    main()
