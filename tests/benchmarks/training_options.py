"""What brings ternary training nearer to float: the losses of single changes to one recipe.

    python tests/benchmarks/training_options.py --seeds 3            all of them: hours on two cores
    python tests/benchmarks/training_options.py --only "float, one"  by name, or its beginning
    python tests/benchmarks/training_options.py --quick              a few steps, a smoke test

With ``--json FILE`` each loss goes there as it is known, and those that are there already, for
this version of jax, are not trained for again.

The decoder, the text and the batches of ``examples/language_model.py``, 600 steps. A loss is the
mean over all of the held-out text, in nats a byte. A gap is the median over seeds of the difference
to ``FLOAT``, the best float decoder, of the same seed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _bench import machine, parse, results, table
from flax import nnx
from tqdm import tqdm
from training_recipes import FINALISTS, FLOAT, OPTIONS, TERNARY, Option, Product

import bitnet_jax as bj

import language_model as example  # isort: skip  # _bench adds its folder

STEPS = 600
ROWS = 13  # windows of the held-out text at a time


class Strength(nnx.Variable):
    """The strength of quantisation, of a layer that is not the library's."""


class Changed(nnx.Module):
    """A linear layer that computes something else with its kernel."""

    def __init__(self, kernel: nnx.Param, product: Product):
        self.kernel, self.product = kernel, product
        self.strength = Strength(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., outputs)."""
        return self.product(x, self.kernel.get_value(), self.strength.get_value())


def projections(model: bj.models.Decoder) -> list[Any]:
    """What holds a linear layer each."""
    parts = []
    for layer in model.layers:
        parts += [getattr(layer.attention, n) for n in ("query", "key", "value", "out")]
        parts += [getattr(layer.mlp, n) for n in ("gate", "up", "down")]
    return parts


def model_of(option: Option, seed: int) -> bj.models.Decoder:
    """The decoder before its first step."""
    model = example.decoder(option.kind, seed, **option.changes)
    for part in projections(model):
        for name, value in option.layer.items():
            setattr(part.linear, name, value)
        if option.product is not None:
            part.linear = Changed(part.linear.kernel, option.product)
    return model


def calibrate(model: bj.models.Decoder, method: str, batches: list[jax.Array]) -> None:
    """Puts latents into ``model`` whose codes and scales ``method`` makes of its kernels."""
    packed, _ = bj.convert.calibrate(model, None, [b[:, :-1] for b in batches], method=method)
    for part, made in zip(projections(model), projections(packed), strict=True):
        part.linear.kernel.set_value(bj.unpack(made.linear.kernel.get_value()))


def held_out() -> jax.Array:
    """The text that is not trained on, (chunks, ROWS, CONTEXT + 1)."""
    _, ids = example.text()
    starts = example.CONTEXT * np.arange((len(ids) - 1) // example.CONTEXT // ROWS * ROWS)
    windows = ids[starts[:, None] + np.arange(example.CONTEXT + 1)]
    return jnp.asarray(windows.reshape(-1, ROWS, windows.shape[1]))


def set_strength(model: bj.models.Decoder, strength: jax.Array) -> None:
    """For layers that are not the library's."""
    for part in projections(model):
        if isinstance(part.linear, Changed):
            part.linear.strength.set_value(strength)


@nnx.jit
def phased_step(
    model: bj.models.Decoder, optimizer: nnx.Optimizer, batch: jax.Array, strength: jax.Array
) -> None:
    """The example's step, at a strength of quantisation."""
    set_strength(model, strength)
    with bj.phase_in(strength):
        gradients = nnx.grad(example.loss_of)(model, batch)
    optimizer.update(model, gradients)


@nnx.jit(donate_argnums=0)
def average(mean: nnx.State, model: bj.models.Decoder, decay: float) -> nnx.State:
    """The running mean of a model's parameters."""
    return jax.tree.map(
        lambda m, p: decay * m + (1.0 - decay) * p, mean, nnx.state(model, nnx.Param)
    )


def loss_after(option: Option, seed: int, steps: int, bar: tqdm) -> float:
    """Trains, and returns the held-out loss in nats a byte."""
    model, (ids, _) = model_of(option, seed), example.text()
    optimizer = nnx.Optimizer(model, option.optimizer(steps), wrt=nnx.Param)
    mean = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)) if option.average else None
    share, method = option.start or (0.0, "")
    rng = np.random.default_rng(seed)
    for step in range(steps):
        batch = example.windows(ids, example.BATCH, rng)
        if method and step == round(share * steps):
            calibrate(model, method, [example.windows(ids, 64, rng)])
        if step < share * steps:
            phased_step(model, optimizer, batch, jnp.zeros(()))
        elif option.strength is not None:
            phased_step(model, optimizer, batch, option.strength(step))
        else:
            example.train_step(model, optimizer, batch)
        if mean is not None:
            mean = average(mean, model, option.average)
        bar.update()
    set_strength(model, jnp.ones(()))
    if mean is not None:
        nnx.update(model, mean)
    return float(np.mean([example.evaluate(model, chunk) for chunk in held_out()]))


def rows(losses: Mapping[str, list[float]]) -> list[list[str]]:
    """Name, rates, losses by seed, their median, and the median gap to ``FLOAT``.

    Losses have the digits that are shown, so that those of a record count as those just taken.
    """
    table = []
    for name in (n for n in OPTIONS if losses.get(n)):
        option, taken = OPTIONS[name], [float(f"{loss:.3f}") for loss in losses[name]]
        gaps = [ours - best for ours, best in zip(taken, losses.get(FLOAT, []), strict=False)]
        gap = f"{statistics.median(gaps):+.3f}" if gaps and name != FLOAT else ""
        cells = " ".join(f"{loss:.3f}" for loss in taken)
        median = f"{statistics.median(taken):.3f}"
        table.append([name, f"{option.kernels:g}", f"{option.rest:g}", cells, median, gap])
    return table


HEADER = ("", "rate of kernels", "of the rest", "loss, by seed", "median", "gap")
TITLE = "Held-out loss of the byte language model, nats"


def recorded(path: str | None) -> dict[str, list[float]]:
    """The losses that a record has for this version of jax."""
    if path is None or not pathlib.Path(path).exists():
        return {}
    runs = json.loads(pathlib.Path(path).read_text())
    rows = [
        row for run in runs if run["jax"] == jax.__version__ for row in run["tables"][0]["rows"]
    ]
    return {row[0]: [float(loss) for loss in row[3].split()] for row in rows}


def is_meant(name: str, only: str) -> bool:
    """Whether ``only`` is a name or its beginning; a whole name means one option alone."""
    return name == only if only in OPTIONS else name.startswith(only)


def main() -> None:
    """Trains every option, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="of those that came near the best")
    parser.add_argument("--only", nargs="+", default=[""], help="options that start so")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="two steps of two options")
    args = parse(parser)
    names = [n for n in OPTIONS if any(is_meant(n, only) for only in args.only)]
    if not names:
        parser.error(f"--only: no option starts with {args.only}; there are {list(OPTIONS)}")
    if args.quick:
        args.steps, args.seeds, names = 2, 1, [FLOAT, TERNARY]
    if args.json and args.steps != STEPS:
        parser.error(f"--json: a record is of {STEPS} steps, not of {args.steps}; leave it out")
    machine()
    losses = recorded(args.json)
    wanted = [
        (name, seed)
        for name in names
        for seed in range(args.seeds if name in FINALISTS else 1)
        if seed >= len(losses.get(name, []))
    ]
    with tqdm(total=args.steps * len(wanted), mininterval=1.0) as bar:
        for name, seed in wanted:
            bar.set_description(name)
            loss = loss_after(OPTIONS[name], seed, args.steps, bar)
            losses = recorded(args.json) or losses  # another run may have added to it
            losses[name] = [*losses.get(name, []), loss]
            results.save(args.json, results.Table(TITLE, HEADER, rows(losses)))
    table(TITLE, HEADER, rows(losses))
    results.save(args.json, results.Table(TITLE, HEADER, rows(losses)))


if __name__ == "__main__":
    main()
