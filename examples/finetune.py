"""From a trained float network to a ternary one: fine-tuning, beside the two alternatives.

    python examples/finetune.py             one seed of both tasks, about five minutes
    python examples/finetune.py --seeds 3   the figures in guides/results.md
    python examples/finetune.py --sweep     the learning rates that these figures use, found
    python examples/finetune.py --quick     a few steps, a smoke test

A float network is trained first. It is then packed as it is; a ternary network of
the same shape is trained from scratch for as many steps; and the float network is
fine-tuned to a ternary one in half as many: the quantisation is phased in by
``bj.optim.strength_schedule``, and the float network's own answers, softened by a
temperature, are part of the loss. Each of the two is also left out, to see what it
is worth. Every ternary loss is that of the packed network, run from two bits.

The tasks: scikit-learn's digits and a multilayer perceptron; and a byte-level
language model, two layers of width 128, over ``pydoc_data.topics``, the text of
Python's own help, which every Python has. It changes with the version of Python, so
the table names its hash. The last tenth is held out.

References: Hinton et al., Distilling the knowledge in a neural network (2015);
Mekkouri et al., Fine-tuning LLMs to 1.58 bit (2024).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import digits as multilayer
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from models.decoder import Decoder
from results import Table, save
from tqdm import tqdm

import bitnet_jax as bj

EVERY = 20  # steps between two looks at the validation set
RAMP = 0.4  # of the steps of fine-tuning, over which the strength goes from 0 to 1
TEMPERATURE = 2.0
WEIGHT = 0.7  # of the teacher's answers in the loss; the labels have the rest
CONTEXT = 64


@dataclasses.dataclass(frozen=True)
class Way:
    """How a network comes to its weights."""

    name: str
    kind: str  # "float", "ternary" or "fine-tuned"
    color: str
    ramp: bool = False
    teacher: bool = False


FLOAT = Way("float32", "float", "#6b6b6b")
SCRATCH = Way("ternary from scratch", "ternary", "#3b6fb6")
TUNED = Way("fine-tuned", "fine-tuned", "#1d6f4e", ramp=True, teacher=True)
WAYS = (
    FLOAT,
    SCRATCH,
    Way("ternary from scratch, ramp", "ternary", "#8fb3e0", ramp=True),
    TUNED,
    Way("fine-tuned, no ramp", "fine-tuned", "#8bbf9f", teacher=True),
    Way("fine-tuned, no teacher", "fine-tuned", "#d9a441", ramp=True),
    Way("fine-tuned, neither", "fine-tuned", "#b58bbf"),
)
UNTRAINED = "packed without training"
# Peak learning rates, the best of GRID for each kind of training by --sweep.
RATES = {
    "digits": {"float": 8e-3, "ternary": 8e-3, "fine-tuned": 6e-3},
    "bytes": {"float": 6e-3, "ternary": 8e-3, "fine-tuned": 1e-2},
}
GRID = (2e-3, 4e-3, 6e-3, 8e-3, 1e-2)


@dataclasses.dataclass(frozen=True)
class Task:
    """A float model, which of its kernels become ternary, and what it learns.

    ``draw`` makes a batch from a key and the training data.
    """

    name: str
    model: nn.Module
    select: Callable[..., Any]
    steps: int
    draw: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]

    def steps_of(self, way: Way) -> int:
        """Fine-tuning takes half of the steps."""
        return self.steps // 2 if way.kind == "fine-tuned" else self.steps


@dataclasses.dataclass
class Result:
    """What one way gave: losses in nats, accuracies in percent, on the held-out part."""

    loss: float
    accuracy: float
    curve: np.ndarray


def batch_of_digits(key: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
    """64 images and their labels."""
    x, y = data
    rows = jax.random.randint(key, (64,), 0, len(x))
    return x[rows], y[rows]


def batch_of_text(key: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """32 windows of bytes and, for each byte, the next one."""
    starts = jax.random.randint(key, (32, 1), 0, len(text) - CONTEXT)
    windows = text[starts + jnp.arange(CONTEXT + 1)[None]]
    return windows[:, :-1], windows[:, 1:]


def manual() -> bytes:
    """Python's help topics, in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


DIGITS = Task(
    "digits", multilayer.Net((32, 32), ternary=False), bj.only("layer_*"), 1320, batch_of_digits
)
BYTES = Task(
    "bytes",
    Decoder(256, width=128, depth=2, length=CONTEXT, dtype=jnp.float32),
    bj.only("blocks"),
    600,
    batch_of_text,
)


def data_of(task: Task, seed: int) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Training data as ``draw`` wants them, and the whole held-out part."""
    if task.name == "digits":
        x, x_test, y, y_test = multilayer.digits(seed)
        return (x, y), (x_test, y_test)
    text = np.frombuffer(manual(), np.uint8).astype(np.int32)
    train, held_out = np.split(text, [len(text) * 9 // 10])
    rows = (len(held_out) - 1) // CONTEXT
    x, y = (held_out[i : i + rows * CONTEXT].reshape(rows, CONTEXT) for i in (0, 1))
    return jnp.asarray(train), (jnp.asarray(x), jnp.asarray(y))


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.partial(jax.jit, static_argnames=("apply",))
def scores(apply: Any, params: Any, held_out: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Loss in nats and accuracy in percent."""
    x, y = held_out
    logits = apply({"params": params}, x)
    return jnp.stack([cross_entropy(logits, y), 100.0 * jnp.mean(logits.argmax(-1) == y)])


@functools.cache
def networks(task: Task) -> dict[str, nn.Module]:
    """The float model, and the ternary one of the same parameters, by kind of training."""
    ternary = bj.linen.ternarize(task.model, select=task.select)
    return {"float": task.model, "ternary": ternary, "fine-tuned": ternary}


@functools.cache
def trainer(task: Task, way: Way) -> tuple[Any, Any]:
    """The optimizer of a rate, and ``EVERY`` steps with it; compiled once."""
    steps, student = task.steps_of(way), networks(task)[way.kind].apply
    strength = bj.optim.strength_schedule(max(1, round(RAMP * steps)))

    warm = max(1, steps // 20)
    up, down = optax.linear_schedule(0.0, 1.0, warm), optax.linear_schedule(1.0, 0.0, steps - warm)
    shape = optax.join_schedules([up, down], [warm])

    def optimizer(rate: jax.typing.ArrayLike) -> optax.GradientTransformation:
        return optax.adamw(lambda step: rate * shape(step), weight_decay=0.1)

    @functools.partial(jax.jit, donate_argnums=0)
    def some(carry: Any, key: jax.Array, first: jax.Array, rate: Any, teacher: Any, data: Any):
        def one(carry: Any, step: jax.Array):
            params, state = carry
            x, y = task.draw(jax.random.fold_in(key, step), data)

            def loss_fn(params: Any) -> jax.Array:
                with bj.phase_in(strength(step) if way.ramp else jnp.float32(1.0)):
                    logits = student({"params": params}, x)
                loss = cross_entropy(logits, y)
                if not way.teacher:
                    return loss
                answers = task.model.apply({"params": teacher}, x)
                away = bj.convert.logit_distillation(logits, answers, temperature=TEMPERATURE)
                return (1.0 - WEIGHT) * loss + WEIGHT * away

            updates, state = optimizer(rate).update(jax.grad(loss_fn)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, carry, first + jnp.arange(EVERY))[0]

    return optimizer, some


def train(
    task: Task, way: Way, rate: float, seed: int, start: Any, data: Any, bar: tqdm
) -> tuple[Any, np.ndarray]:
    """Trained parameters and the held-out loss every ``EVERY`` steps, at full strength."""
    train_data, held_out = data
    optimizer, some = trainer(task, way)
    teacher = start if way.teacher else None
    params = jax.tree.map(jnp.copy, start)  # the steps donate theirs
    carry, curve = (params, optimizer(rate).init(params)), []
    for first in range(0, task.steps_of(way), EVERY):
        carry = some(carry, jax.random.key(seed + 1), first, rate, teacher, train_data)
        curve.append(float(scores(networks(task)[way.kind].apply, carry[0], held_out)[0]))
        bar.update(EVERY)
        bar.set_postfix(loss=f"{curve[-1]:.3f}")
    return carry[0], np.array(curve)


def packed_result(task: Task, params: Any, held_out: Any, curve: Any) -> Result:
    """Scores of the network that is served, kernels at two bits."""
    ternary = networks(task)["ternary"]
    packed, _ = bj.linen.pack(ternary, params, held_out[0][:1])
    return Result(*map(float, scores(ternary.apply, packed, held_out)), curve)


def run(task: Task, rates: dict[str, float], seed: int, bar: tqdm, ways: Any) -> dict[str, Result]:
    """Some ways, the float one among the first, on one task and one seed."""
    data = data_of(task, seed)
    fresh = task.model.init(jax.random.key(seed), data[1][0][:1])["params"]
    results: dict[str, Result] = {}
    trained = None
    for way in ways:
        bar.set_description(f"{task.name}, {way.name}")
        start = trained if way.kind == "fine-tuned" else fresh
        params, curve = train(task, way, rates[way.kind], seed, start, data, bar)
        if way is FLOAT:
            trained = params
            float_scores = scores(task.model.apply, params, data[1])
            results[way.name] = Result(*map(float, float_scores), curve)
            results[UNTRAINED] = packed_result(task, params, data[1], curve[:0])
        else:
            results[way.name] = packed_result(task, params, data[1], curve)
    return results


def summary(results: dict[str, list[dict[str, Result]]], tasks: Any) -> Table:
    """A row for each way: steps, held-out loss and accuracy of each task."""

    def cell(values: list[float], digits: int) -> str:
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    steps = {way.name: [f"{task.steps_of(way):,}" for task in tasks] for way in WAYS}
    rows = []
    for name in results[tasks[0].name][0]:
        row = [name]
        for i, task in enumerate(tasks):
            runs = [run[name] for run in results[task.name]]
            row.append(steps[name][i] if name in steps else "")
            row.append(cell([r.loss for r in runs], 3))
            row.append(cell([r.accuracy for r in runs], 2))
        rows.append(row)
    heads = [h for t in tasks for h in (f"{t.name}: steps", "loss, nats", "accuracy, %")]
    return Table(f"{len(results[tasks[0].name])} seed(s)", ["", *heads], rows)


def draw(results: dict[str, list[dict[str, Result]]], tasks: Any, path: pathlib.Path) -> None:
    """Held-out loss over steps; fine-tuning goes on where the float network stopped."""
    figure = Figure(figsize=(5.4 * len(tasks) + 2.2, 4.2), layout="constrained")
    for task, panel in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        runs = results[task.name][0]
        for way in (way for way in WAYS if way.name in runs):
            curve = runs[way.name].curve
            x = EVERY * np.arange(1, 1 + len(curve))
            x += task.steps if way.kind == "fine-tuned" else 0
            point = "o" if len(curve) == 1 else ""
            panel.plot(x, curve, color=way.color, lw=1.3, marker=point, label=way.name)
        panel.axhline(runs[UNTRAINED].loss, color="#c8553d", ls="--", lw=1, label=UNTRAINED)
        low, high = min(r.loss for r in runs.values()), runs[UNTRAINED].loss
        panel.set(title=f"{task.name}: held-out loss", xlabel="step", ylabel="nats")
        panel.set(ylim=(0.9 * low, high + 0.1 * (high - low)))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def sweep(tasks: Any, bar: tqdm) -> Table:
    """Held-out loss of each kind of training at each rate of the grid; one seed."""
    rows = []
    for task in tasks:
        row = {}
        for rate in GRID:
            at_rate = dict.fromkeys(RATES[task.name], rate)
            row[rate] = run(task, at_rate, 0, bar, (FLOAT, SCRATCH))
            at_rate["float"] = RATES[task.name]["float"]  # the teacher is the best one
            row[rate] |= {TUNED.name: run(task, at_rate, 0, bar, (FLOAT, TUNED))[TUNED.name]}
        ways = (FLOAT, SCRATCH, TUNED)
        rows += [[task.name, w.name, *(f"{row[r][w.name].loss:.3f}" for r in GRID)] for w in ways]
    header = ["", "peak rate", *(f"{rate:g}" for rate in GRID)]
    return Table("Held-out loss, nats, by peak learning rate", header, rows)


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Result]]]:
    """Runs both tasks, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    parser.add_argument("--sweep", action="store_true", help="learning rates instead, one seed")
    parser.add_argument("--quick", action="store_true", help="a few steps, a smoke test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder")
    parser.add_argument("--json", help="where to record the tables")
    args = parser.parse_args(argv)
    tasks, ways = (DIGITS, BYTES), WAYS
    if args.quick:
        tasks = tuple(dataclasses.replace(task, steps=2 * EVERY) for task in tasks)
        ways = (FLOAT, TUNED)
    args.out.mkdir(parents=True, exist_ok=True)
    text = manual()
    print(f"text: {len(text):,} B, sha256 {hashlib.sha256(text).hexdigest()[:16]}")

    if args.sweep:
        runs = len(GRID) * (FLOAT, SCRATCH, FLOAT, TUNED)
        with tqdm(
            total=sum(t.steps_of(w) for t in tasks for w in runs), unit="step", disable=None
        ) as bar:
            table = sweep(tasks, bar)
        print(f"\n{table.title}\n\n{table}")
        return {}
    total = args.seeds * sum(task.steps_of(way) for task in tasks for way in ways)
    results: dict[str, list[dict[str, Result]]] = {}
    with tqdm(total=total, unit="step", disable=None) as bar:
        for task in tasks:
            seeds = range(args.seeds)
            runs = [run(task, RATES[task.name], seed, bar, ways) for seed in seeds]
            results[task.name] = runs
    table = summary(results, tasks)
    print(f"\n{table.title}\n\n{table}")
    save(args.json, table)
    draw(results, tasks, args.out / "finetune.png")
    print(f"\nwrote {args.out / 'finetune.png'}")
    return results


if __name__ == "__main__":
    main()
