"""Where Grokfast helps and where it hurts: modular multiplication, float and ternary.

    python examples/grokking.py            mod 59, three seeds: the table in guides/results.md
    python examples/grokking.py --paper    mod 97 and the published model, one seed, hours
    python examples/grokking.py --quick    two optimizers, few steps, a smoke test

A transformer sees half of the products ``x * y mod p`` and is asked for the rest.
Weakly regularised Adam first learns its half by heart and understands much later,
if ever; that plateau is what the filter shortens. Every optimizer is shown with its
weight decay, and every filter beside the same optimizer without it: coupled decay
(L2, into the gradient, after the filter) for Adam, decoupled decay for AdamW and
Muon. The paper's baselines had another decay than its filtered runs.

The data and the rates are those of the paper's code: embeddings of unit variance,
learned positions, GELU, no dropout, batches of 512, a warm-up of ten steps, the answer
read at the last of the four tokens ``x op y =``. So is the model of ``--paper``, whose
blocks add attention to the normed stream; the small one has the usual pre-norm block,
which adds it to the stream itself, and there Adam's plateau is longer.

References: Lee et al. (2024), arXiv:2405.20233; Power et al. (2022), arXiv:2201.02177.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from results import Table, save
from tqdm import tqdm

import bitnet_jax as bj

EVERY = 20  # steps between two looks at the validation set
REACHED = 95.0  # percent


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task and a model."""

    p: int
    width: int
    depth: int
    heads: int
    normed_residual: bool
    steps: int = 10_000

    def model(self) -> Transformer:
        """The float network."""
        return Transformer(self.p, self.width, self.depth, self.heads, self.normed_residual)


SMALL = Setting(59, 64, 1, 4, normed_residual=False)
PAPER = Setting(97, 128, 2, 4, normed_residual=True)
RATES = {"adam": 1e-3, "muon": 3e-3}
BATCH = 512
# Published steps to 95 % validation accuracy on x * y mod 97 (arXiv:2405.20233).
PUBLISHED = {"Adam": 39_890, "Adam + L2 + EMA": 910, "Adam + L2 + MA": 790}


class Block(nn.Module):
    """Causal attention and a multilayer perceptron, each after a norm."""

    heads: int
    normed_residual: bool

    @nn.compact
    def __call__(self, x):
        """(batch, tokens, width) to the same."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1]))
        y = nn.LayerNorm()(x)
        x = y if self.normed_residual else x
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, mask=mask)
        y = nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(y))


class Transformer(nn.Module):
    """Tokens (batch, 4) to the logits of the answer."""

    p: int
    width: int
    depth: int
    heads: int
    normed_residual: bool

    @nn.compact
    def __call__(self, tokens):
        """Logits (batch, p + 2), read at the last token."""
        init = nn.initializers.normal(1.0)
        x = nn.Embed(self.p + 2, self.width, embedding_init=init, name="embed")(tokens)
        x = x + nn.Embed(4, self.width, embedding_init=init, name="position")(jnp.arange(4))[None]
        for i in range(self.depth):
            x = Block(self.heads, self.normed_residual, name=f"block_{i}")(x)
        return nn.Dense(self.p + 2, use_bias=False, name="head")(nn.LayerNorm()(x[:, -1]))


@dataclasses.dataclass(frozen=True)
class Way:
    """One optimizer: its rule, its weight decay and its filter."""

    kind: str
    rule: str
    decay: float
    filter: str | None = None

    @property
    def name(self) -> str:
        """Optimizer and decay: one row of the table."""
        return f"{self.kind} ({self.decay:g})" if self.decay else self.kind


WAYS = (
    Way("Adam", "adam", 0.0),
    Way("Adam + L2", "adam", 0.005),
    Way("Adam + L2 + EMA", "adam", 0.005, "ema"),
    Way("Adam + L2", "adam", 0.01),
    Way("Adam + L2 + MA", "adam", 0.01, "ma"),
    Way("AdamW", "adamw", 1.0),
    Way("AdamW + EMA", "adamw", 1.0, "ema"),
    Way("Muon", "muon", 1.0),
    Way("Muon + EMA", "muon", 1.0, "ema"),
)


def optimizer(way: Way, kernels: Any) -> optax.GradientTransformation:
    """The filter, if any, before the optimizer; coupled decay between the two."""
    rate = RATES["muon" if way.rule == "muon" else "adam"]
    rate = optax.linear_schedule(0.0, rate, 10)
    adam = dict(b1=0.9, b2=0.98)
    filters = {
        None: [],
        "ema": [bj.optim.grokfast_ema(alpha=0.98, lamb=2.0)],
        "ma": [bj.optim.grokfast_ma(window_size=100, lamb=5.0)],
    }
    rules = {
        "adam": [optax.add_decayed_weights(way.decay), optax.adam(rate, **adam)],
        "adamw": [optax.adamw(rate, weight_decay=way.decay, **adam)],
        "muon": [
            bj.optim.mugrokfast(
                rate,
                lamb=0.0,
                weight_decay=way.decay,
                adam_learning_rate=RATES["adam"],
                select=kernels,
            )
        ],
    }
    return optax.chain(*filters[way.filter], *rules[way.rule])


def products(p: int, seed: int) -> tuple[jax.Array, ...]:
    """Tokens and answers of half of the products, and of the other half."""
    pairs = np.stack(np.meshgrid(np.arange(p), np.arange(1, p)), -1).reshape(-1, 2)
    x, y = np.random.default_rng(seed).permutation(pairs).T
    op, equals = np.full_like(x, p), np.full_like(x, p + 1)
    tokens, answers = np.stack([x, op, y, equals], 1), x * y % p
    half = len(x) // 2
    parts = (tokens[:half], answers[:half], tokens[half:], answers[half:])
    return tuple(jnp.asarray(part, jnp.int32) for part in parts)


@dataclasses.dataclass
class Result:
    """Accuracies in percent, every ``EVERY`` steps, and when validation reached 95."""

    train: np.ndarray
    validation: np.ndarray
    ternary: bool

    @property
    def steps(self) -> int | None:
        """Steps to 95 % validation accuracy; None: not in this run."""
        there = np.flatnonzero(self.validation >= REACHED)
        return int(there[0] + 1) * EVERY if len(there) else None


@functools.cache
def trainer(way: Way, setting: Setting, ternary: bool) -> tuple[Any, Any]:
    """What starts a run from a key, and what takes ``EVERY`` steps of it; compiled once."""
    model = setting.model()
    quantised = bj.linen.ternarize(model, select=bj.exclude("head"))
    tokens = jnp.zeros((1, 4), jnp.int32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    tx = optimizer(way, bj.linen.kernels(quantised, abstract, tokens))
    apply = (quantised if ternary else model).apply

    def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def score(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return 100.0 * jnp.mean(apply({"params": params}, x).argmax(-1) == y)

    def start(key: jax.Array) -> tuple[Any, Any]:
        params = model.init(key, tokens)["params"]
        return params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def some(carry, key, data):
        x, y, x_val, y_val = data

        def one(carry, key):
            params, state = carry
            batch = jax.random.permutation(key, len(y))[:BATCH]
            grads = jax.grad(loss_of)(params, x[batch], y[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(one, carry, jax.random.split(key, EVERY))
        return carry, score(carry[0], x, y), score(carry[0], x_val, y_val)

    return start, some


def learn(way: Way, setting: Setting, seed: int, ternary: bool, steps: int, bar: tqdm) -> Result:
    """One run; it ends a little after validation has reached 95 %."""
    start, some = trainer(way, setting, ternary)
    data = products(setting.p, seed)
    carry, curve, there = start(jax.random.key(seed)), [], 0
    for i in range(steps // EVERY):
        key = jax.random.fold_in(jax.random.key(seed + 1), i)
        carry, train, validation = some(carry, key, data)
        curve.append((float(train), float(validation)))
        there += curve[-1][1] >= REACHED
        bar.update(EVERY)
        if there >= 10:
            break
    train, validation = np.array(curve).T
    return Result(train, validation, ternary)


def summary(
    results: dict[str, list[Result]], ways: Any, steps: int, paper: bool
) -> tuple[Table, Table]:
    """Steps to 95 % validation: medians, a row for each optimizer; and every run."""

    def shown(taken: float) -> str:
        return f"{taken:,.0f}" if np.isfinite(taken) else f"> {steps:,}"

    medians, each = [], []
    for way in ways:
        row = [way.name]
        for ternary in (False, True):
            runs = [r for r in results[way.name] if r.ternary == ternary]
            taken = [r.steps or np.inf for r in runs]
            row.append(shown(float(np.median(taken))) if runs else "")
            if runs:
                best = f"{max(r.validation.max() for r in runs):.1f} %"
                kind = "ternary" if ternary else "float"
                each.append([way.name, kind, ", ".join(map(shown, taken)), best])
        medians.append([*row, f"{PUBLISHED.get(way.kind, ''):}"] if paper else row)
    header = ["optimizer (weight decay)", "float", "ternary", *["published"] * paper]
    return (
        Table("Steps to 95 %, median", header, medians),
        Table("Every run", ["optimizer (weight decay)", "kernels", "steps to 95 %", "best"], each),
    )


def draw(results: dict[str, list[Result]], ways: Any, title: str, path: pathlib.Path) -> None:
    """Train (dashed) and validation accuracy over steps, a panel for each optimizer."""
    columns = min(3, len(ways))
    rows = -(-len(ways) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    colors = {False: "#6b6b6b", True: "#2a9d6f"}
    for way, panel in zip(ways, panels, strict=False):
        for run in results[way.name]:
            x = EVERY * np.arange(1, 1 + len(run.train))
            panel.plot(x, run.train, color=colors[run.ternary], lw=0.8, ls=":", alpha=0.7)
            panel.plot(x, run.validation, color=colors[run.ternary], lw=1.3, alpha=0.9)
        panel.axhline(REACHED, color="#c8553d", lw=0.6)
        panel.set(title=way.name, xscale="log", ylim=(-3, 103))
    for panel in panels[len(ways) :]:
        panel.set_axis_off()
    panels[0].set(ylabel="accuracy, %", xlabel="step")
    for ternary, label in ((False, "float"), (True, "ternary")):
        panels[0].plot([], [], color=colors[ternary], label=label)
    panels[0].plot([], [], color="#000000", ls=":", lw=0.8, label="training half")
    panels[0].legend(fontsize="small", loc="upper left")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, list[Result]]:
    """Runs every optimizer and seed, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, help="how many seeds (default 3, with --paper 1)")
    parser.add_argument("--steps", type=int, help="at most so many (default 10,000)")
    parser.add_argument("--paper", action="store_true", help="mod 97, two layers, width 128")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="some optimizers of the table")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder")
    parser.add_argument("--json", help="where to record the tables")
    args = parser.parse_args(argv)
    setting = PAPER if args.paper else SMALL
    seeds = args.seeds or (1 if args.paper or args.quick else 3)
    steps = args.steps or (100 if args.quick else setting.steps)
    named = ["Adam + L2 (0.005)", "Adam + L2 + EMA (0.005)"] if args.quick else args.only
    ways = [way for way in WAYS if named is None or way.name in named]
    if not ways:
        parser.error(f"--only: choose from {', '.join(repr(way.name) for way in WAYS)}")
    args.out.mkdir(parents=True, exist_ok=True)

    results: dict[str, list[Result]] = {way.name: [] for way in ways}
    with tqdm(total=2 * steps * seeds * len(ways), unit="step", disable=None) as bar:
        for way in ways:
            for ternary in (False, True):
                for seed in range(seeds):
                    bar.set_description(f"{way.name}, {'ternary' if ternary else 'float'}")
                    run = learn(way, setting, seed, ternary, steps, bar)
                    results[way.name].append(run)
                    tqdm.write(f"{way.name}, ternary {ternary}, seed {seed}: {run.steps}")
    title = f"x * y mod {setting.p}, {setting.depth} layer(s), width {setting.width}"
    print(f"\n{title}, {seeds} seed(s), at most {steps:,} steps\n")
    tables = summary(results, ways, steps, args.paper)
    print(*tables, sep="\n\n")
    save(args.json, *tables)
    file = args.out / ("grokking-paper.png" if args.paper else "grokking.png")
    draw(results, ways, title, file)
    print(f"\nwrote {file}")
    return results


if __name__ == "__main__":
    main()
