"""Models of other codebases, ternarised: how much of each, how it trains, what packing changes.

    pip install "transformers==4.53.*" "diffusers==0.33.*" equinox dm-haiku torch
    python tests/benchmarks/third_party.py

Tiny configurations of the published classes, 20 steps of Adam. The share is that of the model's
multiplications; the outputs are those of the trained parameters against the packed ones, both
compiled; the compile ratio is one training step's against the float model's, from empty caches.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _bench import machine, parse, record, table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from third_party import CASES, Case

import bitnet_jax as bj


def step_of(fn: Callable[..., jax.Array]) -> tuple[Any, optax.GradientTransformation]:
    tx = optax.adam(1e-3)

    @jax.jit
    def step(params: Any, state: Any, inputs: Any, target: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.square(fn(params, *inputs).astype(jnp.float32) - target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, tx


def compiled(fn: Callable[..., jax.Array], case: Case, target: jax.Array) -> tuple[Any, Any, float]:
    """A compiled step, its first state, and the seconds that tracing and compiling took."""
    step, tx = step_of(fn)
    state = tx.init(case.params)
    jax.clear_caches()
    start = time.perf_counter()
    done = step.lower(case.params, state, case.inputs, target).compile()
    return done, state, time.perf_counter() - start


def run(case: Case) -> list[str]:
    """The cells of one model."""
    ternary = bj.ternarize(case.fn)
    share = sum(ternary.explain(case.params, *case.inputs).share.values())
    target = jax.random.normal(
        jax.random.key(0), jax.eval_shape(case.fn, case.params, *case.inputs).shape
    )
    seconds = compiled(case.fn, case, target)[-1]
    step, state, ours = compiled(ternary, case, target)
    params, losses = case.params, []
    for _ in range(20):
        params, state, loss = step(params, state, case.inputs, target)
        losses.append(float(loss))
    packed, _ = ternary.pack(params, *case.inputs)
    apply = jax.jit(ternary)
    y, served = (np.asarray(apply(p, *case.inputs)) for p in (params, packed))
    differ = int((y != served).sum())
    largest = np.abs(y - served).max() / np.abs(y).max()
    return [
        f"{100 * share:.0f} %",
        f"{losses[0]:.3f}",
        f"{losses[-1]:.3f}",
        f"{differ:,} of {y.size:,}",
        f"{largest:.1e}" if differ else "0",
        f"{ours / seconds:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="by default all")
    args = parse(parser)
    machine()
    rows = []
    for name in args.names or CASES:
        package, make = CASES[name]
        rows.append([package, name, *run(make())])
        print(rows[-1], flush=True)
    header = (
        "package",
        "model",
        "ternary",
        "first loss",
        "after 20",
        "packed outputs that differ",
        "by, of the largest",
        "compile",
    )
    table("Models of other codebases", header, rows)
    record(args)


if __name__ == "__main__":
    main()
