"""What brings ternary training nearer to float: the losses of single changes to one recipe.

    python tests/benchmarks/training_options.py --seeds 3            all of them: hours on two cores
    python tests/benchmarks/training_options.py --only "float, one"  by the beginning of a name
    python tests/benchmarks/training_options.py --quick              a few steps, a smoke test

The decoder, the text and the batches of ``examples/language_model.py``, 600 steps. A loss is the
mean over all of the held-out text, in nats a byte. A gap is the median over seeds of the difference
to ``FLOAT``, the best float decoder, of the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _bench import machine, parse, record, table
from flax import nnx
from tqdm import tqdm

import bitnet_jax as bj

import language_model as example  # isort: skip  # _bench adds its folder

ROWS = 13  # windows of the held-out text at a time
FLOAT = "float, two rates"
TERNARY = "ternary, two rates"
RAMPED = "ternary, two rates, phased in over 150 steps"


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to train.

    Args:
      kind: "float" or "ternary".
      kernels: peak learning rate of the kernels.
      rest: peak learning rate of the embedding and the norms.
      schedule: from a peak and a number of steps; by default the example's.
      changes: fields of the decoder's config.
      ramp: steps over which quantisation is phased in.
      product: what a layer computes instead of its own product, from x and its kernel.
      muon: whether Muon trains the kernels; its updates have an rms of 0.2 times the rate.
    """

    kind: str
    kernels: float
    rest: float
    schedule: Callable[[float, int], optax.Schedule] = example.schedule
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ramp: int = 0
    product: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    muon: bool = False

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Of the whole model."""
        kernels, rest = (self.schedule(rate, steps) for rate in (self.kernels, self.rest))
        if not self.muon:
            return example.optimizer_of(kernels, rest)
        # Leaves without dimension numbers are AdamW's.
        dims = optax.contrib.MuonDimensionNumbers()
        return optax.contrib.muon(
            kernels,
            weight_decay=1e-4,
            adam_b2=0.95,
            adam_weight_decay=1e-4,
            adam_learning_rate=rest,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda part: dims if part == "kernel" else None, example.kernel_or_rest(params)
            ),
        )


def linear(warmup: int) -> Callable[[float, int], optax.Schedule]:
    """Up in so many steps, and down to 0 in a line."""

    def schedule(rate: float, steps: int) -> optax.Schedule:
        up = optax.linear_schedule(rate / warmup, rate, warmup - 1)
        return optax.join_schedules(
            [up, optax.linear_schedule(rate, 0.0, steps - warmup)], [warmup]
        )

    return schedule


def stable(share: float, warmup: int = 100) -> Callable[[float, int], optax.Schedule]:
    """Up, constant, and down to 0 in a line over the last ``share`` of the steps."""

    def schedule(rate: float, steps: int) -> optax.Schedule:
        fall = round(share * steps)
        parts = [
            optax.linear_schedule(rate / warmup, rate, warmup - 1),
            optax.linear_schedule(rate, 0.0, fall),
        ]
        return optax.join_schedules(parts, [max(warmup, steps - fall)])

    return schedule


def float_kernel(x: jax.Array, w: jax.Array) -> jax.Array:
    """Int8 inputs alone."""
    return bj.fake_quantize_activations(x) @ w


def grouped(size: int, down: int) -> dict[str, Any]:
    """A scale for so many weights; ``down`` for the kernel of 344 inputs, 8 times 43."""
    kernel, last = (bj.TernaryConfig(granularity=n) for n in (size, down))
    return {"weights": kernel, "overrides": tuple((f"layers/{i}/mlp/down", last) for i in range(2))}


OPTIONS = {
    "float, one rate": Option("float", 4e-3, 4e-3),
    "float, one rate, lower": Option("float", 2e-3, 2e-3),
    "float, one rate, higher": Option("float", 8e-3, 8e-3),
    FLOAT: Option("float", 3e-3, 6e-3),
    "float, two rates, linear": Option("float", 3e-3, 1.5e-2, linear(50)),
    "ternary, one rate": Option("ternary", 6e-3, 6e-3),
    "ternary, one rate, lower": Option("ternary", 4e-3, 4e-3),
    "ternary, one rate, higher": Option("ternary", 1e-2, 1e-2),
    "ternary, one rate, higher, linear": Option("ternary", 1e-2, 1e-2, linear(100)),
    "ternary, one rate, higher, stable for 80 %": Option("ternary", 1e-2, 1e-2, stable(0.2)),
    "ternary, one rate, higher, stable for 50 %": Option("ternary", 1e-2, 1e-2, stable(0.5)),
    TERNARY: Option("ternary", 5e-3, 1.5e-2),
    RAMPED: Option("ternary", 5e-3, 1.5e-2, ramp=150),
    "ternary, two rates, the rest's higher": Option("ternary", 5e-3, 3e-2),
    "ternary, two rates, linear": Option("ternary", 5e-3, 1.5e-2, linear(50)),
    "ternary, two rates, kernels' higher": Option("ternary", 8e-3, 3e-3),
    "ternary, two rates, groups of 64": Option("ternary", 5e-3, 1.5e-2, changes=grouped(64, 43)),
    "ternary, Muon": Option("ternary", 1e-2, 4e-3, muon=True),
    "ternary kernels, float inputs": Option("ternary", 6e-3, 6e-3, changes={"activations": None}),
    "float kernels, int8 inputs": Option("ternary", 6e-3, 6e-3, product=float_kernel),
}
FINALISTS = ("float, one rate", FLOAT, "ternary, one rate", TERNARY, RAMPED)  # the others: one seed


def model_of(option: Option, seed: int) -> bj.models.Decoder:
    """The decoder before its first step."""
    model = example.decoder(option.kind, seed, **option.changes)
    if option.product is None:
        return model
    for layer in model.layers:
        projections = [getattr(layer.attention, n) for n in ("query", "key", "value", "out")]
        projections += [getattr(layer.mlp, n) for n in ("gate", "up", "down")]
        for projection in projections:
            projection.linear = Changed(projection.linear.kernel, option.product)
    return model


class Changed(nnx.Module):
    """A linear layer that computes something else with its kernel."""

    def __init__(self, kernel: nnx.Param, product: Callable[[jax.Array, jax.Array], jax.Array]):
        self.kernel, self.product = kernel, product

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., outputs)."""
        return self.product(x, self.kernel.get_value())


def held_out() -> jax.Array:
    """The text that is not trained on, (chunks, ROWS, CONTEXT + 1)."""
    _, ids = example.text()
    starts = example.CONTEXT * np.arange((len(ids) - 1) // example.CONTEXT // ROWS * ROWS)
    windows = ids[starts[:, None] + np.arange(example.CONTEXT + 1)]
    return jnp.asarray(windows.reshape(-1, ROWS, windows.shape[1]))


@nnx.jit
def phased_step(
    model: bj.models.Decoder, optimizer: nnx.Optimizer, batch: jax.Array, strength: jax.Array
) -> None:
    """The example's step, at a strength of quantisation."""
    with bj.phase_in(strength):
        gradients = nnx.grad(example.loss_of)(model, batch)
    optimizer.update(model, gradients)


def loss_after(option: Option, seed: int, steps: int, bar: tqdm) -> float:
    """Trains, and returns the held-out loss in nats a byte."""
    model, (ids, _) = model_of(option, seed), example.text()
    optimizer = nnx.Optimizer(model, option.optimizer(steps), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        batch = example.windows(ids, example.BATCH, rng)
        if option.ramp:
            strength = bj.optim.strength_schedule(option.ramp)(step)
            phased_step(model, optimizer, batch, strength)
        else:
            example.train_step(model, optimizer, batch)
        bar.update()
    return float(np.mean([example.evaluate(model, chunk) for chunk in held_out()]))


def rows(losses: Mapping[str, list[float]]) -> list[list[str]]:
    """Name, rates, losses by seed, their median, and the median gap to ``FLOAT``."""
    table = []
    for name, taken in losses.items():
        option = OPTIONS[name]
        gaps = [ours - best for ours, best in zip(taken, losses.get(FLOAT, []), strict=False)]
        gap = f"{statistics.median(gaps):+.3f}" if gaps and name != FLOAT else ""
        cells = [f"{loss:.3f}" for loss in taken]
        median = f"{statistics.median(taken):.3f}"
        table.append(
            [name, f"{option.kernels:g}", f"{option.rest:g}", " ".join(cells), median, gap]
        )
    return table


HEADER = ("", "rate of kernels", "of the rest", "loss, by seed", "median", "gap")
TITLE = "Held-out loss of the byte language model, nats"


def main() -> None:
    """Trains every option, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="of those that came near the best")
    parser.add_argument("--only", nargs="+", default=[""], help="options that start so")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="two steps of two options")
    args = parse(parser)
    names = [n for n in OPTIONS if n.startswith(tuple(args.only))]
    if not names:
        parser.error(f"--only: no option starts with {args.only}; there are {list(OPTIONS)}")
    if args.quick:
        args.steps, args.seeds, names = 2, 1, [FLOAT, TERNARY]
    machine()
    seeds = {name: range(args.seeds if name in FINALISTS else 1) for name in names}
    losses: dict[str, list[float]] = {}
    with tqdm(total=args.steps * sum(map(len, seeds.values())), mininterval=1.0) as bar:
        for name in names:
            bar.set_description(name)
            losses[name] = [loss_after(OPTIONS[name], s, args.steps, bar) for s in seeds[name]]
    table(TITLE, HEADER, rows(losses))
    record(args)


if __name__ == "__main__":
    main()
