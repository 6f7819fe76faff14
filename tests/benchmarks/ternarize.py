"""Models nobody edited: ternarised against float.

    python tests/benchmarks/ternarize.py

A training step (forward, backward, AdamW) of an attention block (d 512, sequence
256, batch 8, MLP 4x) and of a convolution (3x3, 64 to 64, 32x32, batch 32); the time
to trace and compile a step of a six-block transformer; and a packed convolution's
forward pass.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _bench import HEADER, in_turn, machine, parse, record, table, versus
from flax import linen as nn

import bitnet_jax as bj


class Block(nn.Module):
    heads: int = 8

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(nn.LayerNorm()(x))
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(num_heads=8)(nn.LayerNorm()(x))


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(64, (3, 3))(x)


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(6):
            x = Block(4)(x)
        return nn.Dense(10, name="head")(x)


def step_of(model: nn.Module):
    tx = optax.adamw(1e-3)

    def loss(params, x):
        return jnp.mean(jnp.square(model.apply({"params": params}, x) - 1.0))

    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)), tx


def runner(model: nn.Module, x: jax.Array):
    params = model.init(jax.random.key(1), x)["params"]
    step, tx = step_of(model)
    held = [(params, tx.init(params))]

    def run():
        held[0] = step(*held[0], x)
        return held[0]

    return run


def forms(model: nn.Module) -> dict[str, nn.Module]:
    return {
        "float": model,
        "ternarised": bj.linen.ternarize(model),
        "ternarised, bf16 backward": bj.linen.ternarize(model, backward_dtype=jnp.bfloat16),
    }


def steps(title: str, model: nn.Module, x: jax.Array, rounds: int) -> None:
    timings = in_turn({name: runner(form, x) for name, form in forms(model).items()}, rounds)
    goals = dict.fromkeys(timings, 1.0) | {"float": None}
    rows = [[name, *versus(t, goals[name])] for name, t in timings.items()]
    table(title, ("", *HEADER), rows)


def packed_convolution(x: jax.Array, rounds: int) -> None:
    model = bj.linen.ternarize(Conv())
    params = model.init(jax.random.key(1), x)["params"]
    packed, _ = bj.linen.pack(model, params, x)
    runs = {}
    for name, form, held in (
        ("float", Conv(), params),
        ("ternarised", model, params),
        ("packed", model, packed),
    ):
        apply = jax.jit(lambda p, x, form=form: form.apply({"params": p}, x))
        runs[name] = lambda apply=apply, held=held: apply(held, x)
    timings = in_turn(runs, rounds)
    rows = [[name, *versus(t, None)] for name, t in timings.items()]
    table("Convolution, forward", ("", *HEADER), rows)


def compile_seconds(model: nn.Module, x: jax.Array) -> tuple[float, float]:
    """Seconds to trace, and to lower and compile, one training step, from empty caches."""
    params = model.init(jax.random.key(1), x)["params"]
    step, tx = step_of(model)
    state = tx.init(params)
    jax.clear_caches()
    start = time.perf_counter()
    traced = step.trace(params, state, x)
    middle = time.perf_counter()
    traced.lower().compile()
    return middle - start, time.perf_counter() - middle


def compiling(rounds: int) -> None:
    x = jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)
    x = jnp.zeros(x.shape, x.dtype)
    models = {"float": Deep(), "ternarised": bj.linen.ternarize(Deep())}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            seconds = compile_seconds(model, x)
            if i:
                taken[name].append(seconds)
    median = {name: np.median(np.array(s), axis=0) for name, s in taken.items()}
    whole = {name: float(np.median(np.array(s).sum(axis=1))) for name, s in taken.items()}
    rows = []
    for name, (trace, build) in median.items():
        ratio = whole[name] / whole["float"]
        goal = "" if name == "float" else f"<= 1.30 {'ok' if ratio <= 1.3 else 'MISSED'}"
        rows.append([name, f"{trace:.2f}", f"{build:.2f}", f"{ratio:.2f}", goal])
    header = ("", "trace", "compile", "ratio", "goal")
    table("Seconds to trace and to compile a training step", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parse(parser)
    rounds = args.rounds
    machine()
    x = jax.random.normal(jax.random.key(0), (8, 256, 512))
    steps("Training step, attention (d 512, sequence 256, batch 8)", Attention(), x, rounds)
    steps("Training step, attention and MLP", Block(), x, rounds)
    x = jax.random.normal(jax.random.key(0), (32, 32, 32, 64))
    steps("Training step, convolution (3x3, 64 to 64, 32x32, batch 32)", Conv(), x, rounds)
    packed_convolution(x, rounds)
    compiling(max(3, rounds // 3))

    record(args)


if __name__ == "__main__":
    main()
