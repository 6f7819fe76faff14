"""Train a ternary network on real digits, pack it, save it, load it, run it from the bits.

    python examples/digits.py              one seed, two sizes, about a minute
    python examples/digits.py --seeds 5    the figures in the README
    python examples/digits.py --quick      a few epochs, for a smoke test

The data are scikit-learn's 1,797 handwritten digits (8x8 pixels). Each network
is trained twice with the same recipe, in float32 and ternary; the float one is
also packed without training, which is what post-training quantisation gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from results import Table, save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import bitnet_jax as bj

BATCH = 64
LEARNING_RATE = 3e-3
NETS = {"64-32-32-10": (32, 32), "64-256-256-10": (256, 256)}


class Net(nn.Module):
    """A multilayer perceptron with RMSNorm before each layer, float or ternary."""

    hidden: tuple[int, ...]
    ternary: bool

    @nn.compact
    def __call__(self, x):
        """Logits (batch, 10) of pixels (batch, 64)."""
        sizes = (*self.hidden, 10)
        for i, size in enumerate(sizes):
            if self.ternary:
                x = bj.linen.BitDense(size, norm=True, name=f"layer_{i}")(x)
            else:
                x = nn.Dense(size, name=f"layer_{i}")(nn.RMSNorm(use_scale=False, epsilon=1e-5)(x))
            if i + 1 < len(sizes):
                x = nn.relu(x)
        return x


@dataclasses.dataclass
class Result:
    """What one seed of one network gave. Accuracies in percent."""

    float32: float
    ternary: float
    packed: float
    untrained: float
    curves: dict[str, np.ndarray]
    differing: int
    logits: int
    report: Any
    file_bytes: int
    milliseconds: dict[int, tuple[float, float]]


def digits(seed: int) -> tuple[jax.Array, ...]:
    """Train pixels, test pixels, train labels, test labels; 80/20, stratified."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16.0).astype(np.float32)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=seed)
    return tuple(jnp.asarray(part) for part in parts)


def accuracy(apply_fn: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Percent of examples whose largest logit is the label's."""
    return 100.0 * jnp.mean(apply_fn({"params": params}, x).argmax(-1) == y)


@functools.partial(jax.jit, donate_argnums=0)
def epoch(state: TrainState, key: jax.Array, data: tuple[jax.Array, ...]):
    """One pass over the training set in a new order; returns the test accuracy too."""
    x, x_test, y, y_test = data
    order = jax.random.permutation(key, x.shape[0])
    batches = order[: x.shape[0] // BATCH * BATCH].reshape(-1, BATCH)

    def step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, x[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params)), None

    state, _ = jax.lax.scan(step, state, batches)
    return state, accuracy(state.apply_fn, state.params, x_test, y_test)


def train(net: Net, data: tuple[jax.Array, ...], seed: int, epochs: int, bar: tqdm):
    """Trained parameters, and the test accuracy after every epoch."""
    init_key, order_key = jax.random.split(jax.random.key(seed))
    steps = epochs * (data[0].shape[0] // BATCH)
    state = TrainState.create(
        apply_fn=net.apply,
        params=net.init(init_key, data[0][:1])["params"],
        tx=optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps)),
    )
    curve = []
    for key in jax.random.split(order_key, epochs):
        state, score = epoch(state, key, data)
        curve.append(float(score))
        bar.update()
        bar.set_postfix(accuracy=f"{curve[-1]:.1f}%")
    return state.params, np.array(curve)


def milliseconds(runs: dict[str, Any], rounds: int) -> list[float]:
    """Median time of each candidate, taken in turn after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return [float(np.median(taken)) for taken in times.values()]


def run(name: str, seed: int, epochs: int, rounds: int, out: pathlib.Path, bar: tqdm) -> Result:
    """Trains one network in float32 and ternary, ships the ternary one, measures both."""
    data = digits(seed)
    x_test, y_test = data[1], data[3]
    nets = {kind: Net(NETS[name], kind == "ternary") for kind in ("float32", "ternary")}
    params, curves = {}, {}
    for kind, net in nets.items():
        bar.set_description(f"{name} {kind}")
        params[kind], curves[kind] = train(net, data, seed, epochs, bar)

    # Ship: two bits, a file, back, and the layout the kernel likes best.
    packed, report = bj.pack_params(params["ternary"])
    file = out / f"digits-{name}.bitnet.safetensors"
    bj.io.save(file, packed)
    fast = bj.prepare(bj.io.load(file))
    untrained, _ = bj.pack_params(params["float32"])

    apply = {kind: jax.jit(net.apply) for kind, net in nets.items()}
    trained_logits = apply["ternary"]({"params": params["ternary"]}, x_test)
    loaded_logits = apply["ternary"]({"params": fast}, x_test)
    speed = {}
    for batch in (1, 256):
        x = x_test[:batch]
        dense, two_bit = milliseconds(
            {
                "dense": lambda x=x: apply["float32"]({"params": params["float32"]}, x),
                "packed": lambda x=x: apply["ternary"]({"params": fast}, x),
            },
            rounds,
        )
        speed[batch] = (dense, two_bit)

    def score(kind: str, params: Any) -> float:
        return float(accuracy(apply[kind], params, x_test, y_test))

    return Result(
        float32=score("float32", params["float32"]),
        ternary=score("ternary", params["ternary"]),
        packed=score("ternary", fast),
        untrained=score("ternary", untrained),
        curves=curves,
        differing=int((trained_logits.view(jnp.uint32) != loaded_logits.view(jnp.uint32)).sum()),
        logits=trained_logits.size,
        report=report,
        file_bytes=file.stat().st_size,
        milliseconds=speed,
    )


def summary(results: dict[str, list[Result]]) -> tuple[Table, Table]:
    """What it learns and what it weighs; codes and times. A column for each network."""

    def points(field: str) -> Any:
        def cell(runs: list[Result]) -> str:
            values = np.array([getattr(r, field) for r in runs])
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            return f"{values.mean():.2f} %{spread}"

        return cell

    def differing(runs: list[Result]) -> str:
        return f"{sum(r.differing for r in runs):,} of {sum(r.logits for r in runs):,}"

    def model_bytes(runs: list[Result]) -> str:
        report = runs[0].report
        before, after = report.model_bytes_before, report.model_bytes_after
        return f"{before:,} to {after:,} B ({report.model_ratio:.2f}x)"

    def shares(runs: list[Result]) -> str:
        counts = np.array([[x.minus, x.zero, x.plus] for x in runs[0].report.rows]).sum(0)
        return " / ".join(f"{share:.1f}" for share in 100 * counts / counts.sum()) + " %"

    def times(batch: int) -> Any:
        def cell(runs: list[Result]) -> str:
            dense, packed = np.median([r.milliseconds[batch] for r in runs], axis=0)
            return f"{dense:.3f} / {packed:.3f} ms ({packed / dense:.2f})"

        return cell

    def table(title: str, cells: dict[str, Any]) -> Table:
        rows = [[label, *map(cell, results.values())] for label, cell in cells.items()]
        return Table(title, ["", *results], rows)

    learned = {
        "accuracy, float32": points("float32"),
        "accuracy, ternary": points("ternary"),
        "the same, loaded from the file and run from two bits": points("packed"),
        "float32 packed without training": points("untrained"),
        "logits that differ in any bit, training forward against loaded": differing,
        "whole model, float32 to packed": model_bytes,
        "the file, header included": lambda runs: f"{runs[0].file_bytes:,} B",
    }
    rest = {
        "codes -1 / 0 / +1": shares,
        "batch of 1, dense / packed": times(1),
        "batch of 256, dense / packed": times(256),
    }
    seeds = len(next(iter(results.values())))
    return table(f"{seeds} seed(s)", learned), table("Codes and times", rest)


def draw(results: dict[str, list[Result]], path: pathlib.Path) -> None:
    """Accuracy while training, what packing keeps, and bytes, a row for each network."""
    figure = Figure(figsize=(12, 3.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 3, squeeze=False, width_ratios=(2, 1.4, 1.4))
    colors = dict(float32="#8a8a8a", ternary="#2a9d6f", packed="#1d6f4e", untrained="#c8553d")
    for (name, runs), (curves, bars, sizes) in zip(results.items(), axes, strict=True):
        for kind in ("float32", "ternary"):
            stack = np.stack([r.curves[kind] for r in runs])
            epochs = np.arange(1, stack.shape[1] + 1)
            curves.plot(epochs, stack.mean(0), color=colors[kind], label=kind)
            curves.fill_between(epochs, stack.min(0), stack.max(0), color=colors[kind], alpha=0.2)
        low = min(80.0, *(c[2:].min(initial=80.0) for r in runs for c in r.curves.values())) - 2
        curves.set(title=f"{name}: test accuracy", xlabel="epoch", ylabel="%", ylim=(low, 100.5))
        curves.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves.legend(loc="lower right")

        fields = ("float32", "ternary", "packed", "untrained")
        names = ("float32", "ternary", "ternary,\nloaded", "packed without\ntraining")
        means = [np.mean([getattr(r, field) for r in runs]) for field in fields]
        drawn = bars.barh(names, means, color=[colors[f] for f in fields])
        bars.bar_label(drawn, fmt=" %.1f", padding=2)
        bars.set(title="test accuracy, %", xlim=(0, 118))
        bars.invert_yaxis()

        report = runs[0].report
        counts = (report.model_bytes_before, report.model_bytes_after, runs[0].file_bytes)
        values = [count / 1e3 for count in counts]
        drawn = sizes.barh(
            ("float32", "packed", "file"), values, color=("#8a8a8a", "#1d6f4e", "#9fd3bd")
        )
        sizes.bar_label(drawn, fmt=" %.1f", padding=2)
        sizes.set(title=f"whole model, kB ({report.model_ratio:.1f}x)", xlim=(0, 1.3 * values[0]))
        sizes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, list[Result]]:
    """Runs every network and seed, prints the table, writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs (default 60)")
    parser.add_argument("--quick", action="store_true", help="3 epochs, a smoke test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder")
    parser.add_argument("--json", help="where to record the tables")
    args = parser.parse_args(argv)
    epochs, rounds = (3, 5) if args.quick else (args.epochs, 100)
    args.out.mkdir(parents=True, exist_ok=True)

    results: dict[str, list[Result]] = {name: [] for name in NETS}
    with tqdm(total=2 * epochs * args.seeds * len(NETS), unit="epoch", disable=None) as bar:
        for name in NETS:
            for seed in range(args.seeds):
                results[name].append(run(name, seed, epochs, rounds, args.out, bar))

    print(f"\n{args.seeds} seed(s), {epochs} epochs, {jax.devices()[0].platform}\n")
    tables = summary(results)
    print(*tables, sep="\n\n")
    save(args.json, *tables)
    for name, runs in results.items():
        print(f"\n{name}, packed:\n{runs[0].report}")
        runs[0].report.plot(args.out / f"digits-{name}-weights.png")
    draw(results, args.out / "digits.png")
    print(f"\nwrote {args.out / 'digits.png'} and a picture of the weights for each network")
    return results


if __name__ == "__main__":
    main()
