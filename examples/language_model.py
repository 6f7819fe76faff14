"""Train a ternary language model on bytes, pack it, and let it write from the bits.

    python examples/language_model.py            600 steps, a few minutes
    python examples/language_model.py --quick    a few steps, for a smoke test

The text is Python's own manual, which comes with every Python (``pydoc_data.topics``;
its length differs between versions). Two decoders of one shape are trained with one
recipe: BitNet b1.58's, with ternary kernels and int8 activations, and its float twin.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

import bitnet_jax as bj

CONTEXT = 128
BATCH = 16
# Peak learning rates of the kernels, and of the embedding and norms: each is near its own best.
RATES = {"float": (3e-3, 6e-3), "ternary": (5e-3, 1.5e-2)}
PROMPT = "The with statement "


def decoder(kind: str, seed: int = 0, **changes: Any) -> bj.models.Decoder:
    """A small decoder, ternary or float, that is otherwise the same; changes of its config."""
    config = bj.models.DecoderConfig(
        vocabulary=256, width=128, hidden=344, depth=2, heads=4, context=1024
    )
    if kind == "float":
        config = dataclasses.replace(config, weights=None, activations=None)
    return bj.models.Decoder(dataclasses.replace(config, **changes), rngs=nnx.Rngs(seed))


def text() -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on, and the last tenth, to measure on."""
    raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    ids = np.frombuffer(raw, np.uint8).astype(np.int32)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def windows(ids: np.ndarray, count: int, rng: np.random.Generator) -> jax.Array:
    """So many windows (count, CONTEXT + 1) from anywhere in the text."""
    starts = rng.integers(0, len(ids) - CONTEXT - 1, count)
    return jnp.asarray(ids[starts[:, None] + np.arange(CONTEXT + 1)])


def loss_of(model: bj.models.Decoder, batch: jax.Array) -> jax.Array:
    """Nats a byte."""
    logits, _ = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Up to ``rate`` in a sixth of the steps, and down to 0 by a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, min(100, steps // 4 + 1), steps)


def kernel_or_rest(params: Any) -> Any:
    """The label of each parameter for ``optax.multi_transform``: "kernel" or "rest"."""
    name = jax.tree_util.keystr
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" if "kernel" in name(path) else "rest", params
    )


def optimizer_of(kernel: optax.ScalarOrSchedule, rest: optax.ScalarOrSchedule) -> Any:
    """AdamW with a learning rate for kernels, and one for the embedding and the norms."""
    kernels, others = (optax.adamw(rate, b2=0.95) for rate in (kernel, rest))
    return optax.multi_transform({"kernel": kernels, "rest": others}, kernel_or_rest)


@nnx.jit
def train_step(model: bj.models.Decoder, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    """One update; returns the loss before it."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, gradients)
    return loss


evaluate = nnx.jit(loss_of)


def sample(model: bj.models.Decoder, tokens: int) -> str:
    """What the model writes after the prompt: bytes in, bytes out, no tokenizer needed."""
    ids = model.generate(list(PROMPT.encode()), max_new_tokens=tokens, temperature=0.7, top_p=0.9)
    return bytes(ids).decode(errors="replace")


def train(kind: str, steps: int) -> tuple[bj.models.Decoder, list[float]]:
    """A trained decoder, and the loss of every step; samples are printed on the way."""
    model, (ids, _) = decoder(kind), text()
    tx = optimizer_of(*(schedule(rate, steps) for rate in RATES[kind]))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng, losses = np.random.default_rng(0), []
    bar = tqdm(range(steps), desc=kind, mininterval=1.0)
    for step in bar:
        losses.append(train_step(model, optimizer, windows(ids, BATCH, rng)))
        if step % 20 == 19:
            bar.set_postfix(loss=f"{float(losses[-1]):.3f}")
        if step in (steps // 4, steps // 2):
            tqdm.write(f"  step {step}: {PROMPT}{sample(model, 60)!r}")
    return model, [float(loss) for loss in losses]


def measure(model: bj.models.Decoder) -> tuple[float, int]:
    """Nats a byte on text that was not trained on, and bytes of parameters."""
    _, ids = text()
    loss = float(evaluate(model, windows(ids, 64, np.random.default_rng(1))))
    return loss, sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def speeds(models: dict[str, bj.models.Decoder], tokens: int) -> dict[str, float]:
    """Tokens a second of each, taken in turn after a warm-up: medians of three."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(4):
        for name, model in models.items():
            begin = time.perf_counter()
            model.generate(list(PROMPT.encode()), max_new_tokens=tokens)
            if turn:
                taken[name].append(tokens / (time.perf_counter() - begin))
    return {name: float(np.median(rates)) for name, rates in taken.items()}


def plot(curves: dict[str, list[float]], file: pathlib.Path) -> None:
    """The loss of training, smoothed over 20 steps, or a quarter of fewer."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, losses in curves.items():
        width = min(20, max(1, len(losses) // 4))
        axes.plot(np.convolve(losses, np.ones(width) / width, "valid"), label=kind)
    axes.set(xlabel="step", ylabel="nats a byte", title="Training on Python's manual")
    axes.legend()
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, int, float]]:
    """Trains both, packs the ternary one, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    options = parser.parse_args(arguments)
    steps, tokens = (8, 8) if options.quick else (options.steps, 200)
    options.out.mkdir(parents=True, exist_ok=True)
    models: dict[str, Any] = {}
    curves = {}
    for kind in RATES:
        models[kind], curves[kind] = train(kind, steps)
    packed, _ = bj.nnx.pack(models["ternary"])
    models["packed"] = packed.prepare()
    rates = speeds(models, tokens)
    results = {name: (*measure(model), rates[name]) for name, model in models.items()}
    print(f"\nfrom the bits: {PROMPT}{sample(models['packed'], tokens)}\n")
    rows = [
        (name, f"{loss:.3f}", f"{nbytes:,}", f"{speed:.0f}")
        for name, (loss, nbytes, speed) in results.items()
    ]
    print(
        tabulate(
            rows,
            ("decoder", "loss", "bytes", "tokens/s"),
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        )
    )
    plot(curves, options.out / "language_model.png")
    print(f"\nThe curves of training are in {options.out / 'language_model.png'}.")
    return results


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


if __name__ == "__main__":
    main()
