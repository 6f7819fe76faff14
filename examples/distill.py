"""A float network as the teacher of the ternary one that it becomes: what each part is worth.

    python examples/distill.py             one seed of both tasks
    python examples/distill.py --seeds 3   the figures in guides/results.md
    python examples/distill.py --quick     a few steps, a smoke test

The byte decoder of ``language_model.py`` (NNX) and the network of ``digits.py`` (linen) are
trained in float. The ternary network starts from those weights and takes half of the steps: with
labels alone, and by ``bj.convert.finetune_recipe``, whose losses compare answers, hidden states
and relations of attention with the float network's. ``bj.convert.capture`` hands the states out;
neither model is edited. Beside them, a ternary network from scratch in all steps. A second table
is of the digits' network without norms, and what ``ternarize(norm=True)`` puts before its layers
is worth. Every ternary figure is that of the packed network.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import digits as multilayer
import finetune
import jax
import jax.numpy as jnp
import language_model
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from results import Table, save
from tqdm import tqdm

import bitnet_jax as bj

EVERY = 20  # steps in one compiled program
HEADS = 4  # of the relations


@dataclasses.dataclass(frozen=True)
class Way:
    """How a network comes to its weights.

    Attributes:
      name: in the table.
      kind: "float" or "ternary".
      tuned: whether it starts from the float network and takes half of the steps.
      recipe: keywords of ``finetune_recipe``.
      gptq: whether it starts from the kernels that ``calibrate`` chose.
    """

    name: str
    kind: str = "ternary"
    tuned: bool = True
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    gptq: bool = False


LABELS = {"logits": 0.0, "ramp_steps": 0}
FLOAT = Way("float32", "float", tuned=False, recipe=LABELS)
CONTROL = Way("labels alone", recipe=LABELS)
RECIPE = Way("the recipe: phased in, the teacher's answers")
STATES = {"hidden": 1.0, "relations": 1.0, "heads": HEADS}
WAYS = (
    FLOAT,
    CONTROL,
    RECIPE,
    Way("labels alone, phased in", recipe={"logits": 0.0}),
    Way("the recipe, from `gptq`", gptq=True),
    Way("labels alone, from `gptq`", recipe=LABELS, gptq=True),
    Way("ternary from scratch", tuned=False, recipe=LABELS),
    Way("the recipe, and hidden states", recipe={"hidden": 1.0}),
    Way("the recipe, hidden states and relations", recipe=STATES),
)
UNTRAINED = "packed without training"
CALIBRATED = "`gptq` without training"


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is trained.

    Attributes:
      name: in the table.
      steps: of the float network.
      rates: the peak learning rate by kind, and for "tuned".
      hidden: the pattern of its hidden states.
      relations: the paths of queries, keys and values in a late layer; none without attention.
      init: (seed) -> parameters.
      run: (kind, patterns) -> a function (params, x) -> (logits, captured values).
      data: (seed) -> what ``draw`` draws from, and (inputs, labels) that are held out.
      draw: (key, data) -> a batch and its labels.
      packed: (params) -> packed parameters.
      calibrated: (params, batches) -> packed parameters whose codes ``gptq`` chose.
    """

    name: str
    steps: int
    rates: dict[str, float]
    hidden: str
    relations: tuple[str, ...]
    init: Callable[[int], Any]
    run: Callable[[str, Sequence[str]], Callable[[Any, jax.Array], Any]]
    data: Callable[[int], tuple[Any, tuple[jax.Array, jax.Array]]]
    draw: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]
    packed: Callable[[Any], Any]
    calibrated: Callable[[Any, Sequence[jax.Array]], Any]


def digits(steps: int) -> Task:
    """The smaller network of ``digits.py``, a linen model."""
    nets = {kind: multilayer.Net((32, 32), kind == "ternary") for kind in ("float", "ternary")}

    def init(seed: int) -> Any:
        return nets["float"].init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]

    def run(kind: str, patterns: Sequence[str]) -> Any:
        apply = nets[kind].apply
        run = bj.convert.capture(apply, *patterns) if patterns else lambda *a: (apply(*a), {})
        return lambda params, x: run({"params": params}, x)

    def data(seed: int) -> Any:
        x, x_test, y, y_test = multilayer.digits(seed)
        return (x, y), (x_test, y_test)

    return Task(
        name="digits",
        steps=steps,
        rates={"float": 8e-3, "ternary": 8e-3, "tuned": 6e-3},  # of finetune.py's sweep
        hidden="layer_[01]",
        relations=(),
        init=init,
        run=run,
        data=data,
        draw=finetune.batch_of_digits,
        packed=lambda params: bj.pack_params(params)[0],
        calibrated=lambda params, x: bj.convert.calibrate(nets["ternary"], params, x)[0],
    )


def manual(steps: int) -> Task:
    """The decoder of ``language_model.py`` over Python's manual, an NNX model."""
    graphs = {k: nnx.split(language_model.decoder(k))[0] for k in ("float", "ternary")}

    def init(seed: int) -> Any:
        config = language_model.decoder("float").config
        return nnx.state(bj.models.Decoder(config, rngs=nnx.Rngs(seed)))

    def run(kind: str, patterns: Sequence[str]) -> Any:
        def call(model: Any, x: jax.Array) -> jax.Array:
            return model(x)[0]

        run = bj.convert.capture(call, *patterns) if patterns else lambda *a: (call(*a), {})
        return lambda params, x: run(nnx.merge(graphs[kind], params), x)

    def data(seed: int) -> Any:
        del seed
        train, held_out = language_model.text()
        rows = language_model.windows(held_out, 128, np.random.default_rng(1))
        return jnp.asarray(train), (rows[:, :-1], rows[:, 1:])

    def draw(key: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        context, batch = language_model.CONTEXT, language_model.BATCH
        starts = jax.random.randint(key, (batch, 1), 0, len(text) - context)
        rows = text[starts + jnp.arange(context + 1)[None]]
        return rows[:, :-1], rows[:, 1:]

    def packed(params: Any) -> Any:
        return nnx.state(bj.nnx.pack(nnx.merge(graphs["ternary"], params))[0])

    def calibrated(params: Any, batches: Sequence[jax.Array]) -> Any:
        model = nnx.merge(graphs["float"], params)
        bj.nnx.ternarize(model, bj.only("layers"))
        return nnx.state(bj.convert.calibrate(model, None, batches)[0])

    return Task(
        name="bytes",
        steps=steps,
        rates={"float": 4e-3, "ternary": 6e-3, "tuned": 6e-3},  # the best of one for all leaves
        hidden="layers/?",
        relations=tuple(f"layers/1/attention/{name}" for name in ("query", "key", "value")),
        init=init,
        run=run,
        data=data,
        draw=draw,
        packed=packed,
        calibrated=calibrated,
    )


class Plain(nn.Module):
    """The network of ``digits.py`` as most float networks are: no norm before its layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (batch, 10) of pixels (batch, 64)."""
        for i, size in enumerate((32, 32)):
            x = nn.relu(nn.Dense(size, name=f"layer_{i}")(x))
        return nn.Dense(10, name="layer_2")(x)


def without_norms(steps: int, norm: bool) -> Task:
    """The digits again, and what ``ternarize(norm=True)`` puts before the layers is worth."""
    ternary = bj.linen.ternarize(Plain(), norm=norm)
    task = digits(steps)
    x = jnp.zeros((1, 64))

    def init(seed: int) -> Any:
        return Plain().init(jax.random.key(seed), x)["params"]

    def run(kind: str, patterns: Sequence[str]) -> Any:
        assert not patterns
        apply = Plain().apply if kind == "float" else ternary.apply
        return lambda params, x: (apply({"params": params}, x), {})

    return dataclasses.replace(
        task,
        name=f"norm={norm}",
        init=init,
        run=run,
        packed=lambda params: bj.linen.pack(ternary, params, x)[0],
        calibrated=lambda params, x: bj.convert.calibrate(ternary, params, x)[0],
    )


@functools.cache
def trainer(task: Task, way: Way) -> tuple[Any, Any]:
    """The optimizer of a way, and ``EVERY`` steps with it; compiled once."""
    steps = task.steps // 2 if way.tuned else task.steps
    rate = task.rates["tuned" if way.tuned else way.kind]
    recipe = bj.convert.finetune_recipe(steps, rate, **way.recipe)
    tx = recipe.optimizer()
    shown = [*[task.hidden] * bool(recipe.hidden), *task.relations * bool(recipe.relations)]
    student, float_run = task.run(way.kind, shown), task.run("float", shown)

    def loss_fn(params: Any, teacher: Any, step: jax.Array, x: jax.Array, y: jax.Array):
        with bj.phase_in(recipe.strength(step)):
            logits, states = student(params, x)
        if teacher is None:  # labels alone: the teacher's answers have no weight
            return recipe.loss(logits, logits, y).total
        answers, wanted = float_run(teacher, x)
        found = {p: tuple(jax.tree.leaves(v[p])[0] for v in (states, wanted)) for p in states}
        relations = [found.pop(path) for path in task.relations if path in found]
        hidden = list(found.values())
        return recipe.loss(logits, answers, y, hidden=hidden, relations=relations).total

    @functools.partial(jax.jit, donate_argnums=0)
    def some(carry: Any, key: jax.Array, first: jax.Array, teacher: Any, data: Any):
        def one(carry: Any, step: jax.Array):
            params, state = carry
            x, y = task.draw(jax.random.fold_in(key, step), data)
            loss, gradients = jax.value_and_grad(loss_fn)(params, teacher, step, x, y)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(one, carry, first + jnp.arange(EVERY))

    return tx, some


def train(task: Task, way: Way, seed: int, start: Any, data: Any, bar: tqdm) -> Any:
    """Trained parameters."""
    tx, some = trainer(task, way)
    teacher = start if way.tuned and way.recipe.get("logits") != 0.0 else None
    params = jax.tree.map(jnp.copy, start)  # the steps donate theirs
    if way.gptq:
        params = bj.unpack_params(calibrated(task, params, data))
    carry = params, tx.init(params)
    bar.set_description(f"{task.name}, {way.name}")
    for first in range(0, task.steps // 2 if way.tuned else task.steps, EVERY):
        carry, losses = some(carry, jax.random.key(seed + 1), first, teacher, data)
        bar.update(EVERY)
        bar.set_postfix(loss=f"{float(losses.mean()):.3f}")
    return carry[0]


def calibrated(task: Task, params: Any, data: Any) -> Any:
    """Packed kernels, chosen by four batches of the training data."""
    keys = jax.random.split(jax.random.key(7), 4)
    return task.calibrated(params, [task.draw(key, data)[0] for key in keys])


def scores(task: Task, kind: str, params: Any, held_out: tuple[jax.Array, jax.Array]) -> Any:
    """Loss in nats, and how many of the answers are right, in percent."""
    x, y = held_out
    logits, _ = jax.jit(task.run(kind, ()))(params, x)
    return float(finetune.cross_entropy(logits, y)), float(100 * (logits.argmax(-1) == y).mean())


# By way: (loss, accuracy) of each seed.
Scores = dict[str, list[tuple[float, float]]]


def run(task: Task, seed: int, ways: Sequence[Way], results: Scores, bar: tqdm) -> None:
    """One seed of some ways, the float one first; adds their scores to the results."""
    data, held_out = task.data(seed)
    fresh = trained = task.init(seed)
    for way in ways:
        params = train(task, way, seed, trained if way.tuned else fresh, data, bar)
        if way is FLOAT:
            trained = params
            rows = {UNTRAINED: task.packed(params), CALIBRATED: calibrated(task, params, data)}
            results.setdefault(way.name, []).append(scores(task, "float", params, held_out))
        else:
            rows = {way.name: task.packed(params)}
        for name, packed in rows.items():
            results.setdefault(name, []).append(scores(task, "ternary", packed, held_out))


def summary(what: str, results: dict[Task, Scores]) -> Table:
    """A row for each way: steps, held-out loss and accuracy of each task."""

    def cell(values: Sequence[float], digits: int) -> str:
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    by_name = {way.name: way for way in WAYS}
    rows = []
    for name in dict.fromkeys(name for found in results.values() for name in found):
        way, row = by_name.get(name), [name]
        for task, found in results.items():
            steps = way and (f"+ {task.steps // 2:,}" if way.tuned else f"{task.steps:,}")
            losses, accuracies = zip(*found[name], strict=True) if name in found else ((), ())
            row += [steps or "", cell(losses, 3), cell(accuracies, 2)] if losses else [""] * 3
        rows.append(row)
    heads = [h for t in results for h in (f"{t.name}: steps", "loss, nats", "accuracy, %")]
    seeds = max(len(values) for found in results.values() for values in found.values())
    return Table(f"{what}, {seeds} seed(s)", ["", *heads], rows)


@functools.cache
def tables() -> dict[str, dict[Task, tuple[Way, ...]]]:
    """What is run for each table: tasks, and the ways of each."""
    alone = tuple(way for way in WAYS if way.recipe != STATES)
    norms = (FLOAT, CONTROL, RECIPE)
    return {
        "Ways": {digits(1320): alone, manual(600): WAYS},
        "Norms": {without_norms(1320, norm): norms for norm in (False, True)},
    }


def quick(plan: dict[Task, tuple[Way, ...]]) -> dict[Task, tuple[Way, ...]]:
    """The last way of each task that is tuned, and a few steps."""
    few = {dataclasses.replace(task, steps=2 * EVERY): ways for task, ways in plan.items()}
    return {t: (FLOAT, [w for w in ways if w.tuned][-1]) for t, ways in few.items()}


def main(argv: list[str] | None = None) -> dict[Task, Scores]:
    """Runs all tasks and prints both tables, which are recorded after each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    parser.add_argument("--quick", action="store_true", help="a few steps, a smoke test")
    parser.add_argument("--json", help="where to record the tables")
    args = parser.parse_args(argv)
    plans = {what: quick(plan) if args.quick else plan for what, plan in tables().items()}
    text = finetune.manual()
    print(f"text: {len(text):,} B, sha256 {hashlib.sha256(text).hexdigest()[:16]}")

    results = {what: {task: {} for task in plan} for what, plan in plans.items()}
    pairs = [pair for plan in plans.values() for pair in plan.items()]
    parts = sum(t.steps // 2 if w.tuned else t.steps for t, ways in pairs for w in ways)
    with tqdm(total=parts * args.seeds, unit="step", disable=None) as bar:
        for seed in range(args.seeds):
            for what, plan in plans.items():
                for task, ways in plan.items():
                    run(task, seed, ways, results[what][task], bar)
            shown = [summary(what, found) for what, found in results.items()]
            save(args.json, *shown)
    print(*(f"\n{table.title}\n\n{table}" for table in shown), sep="\n")
    return {task: scores for found in results.values() for task, scores in found.items()}


if __name__ == "__main__":
    main()
