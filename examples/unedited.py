"""Models that nobody edited, made ternary, trained, resumed, packed, shipped and compared.

    python examples/unedited.py              one seed, about two minutes
    python examples/unedited.py --seeds 5    the figures in guides/results.md
    python examples/unedited.py --quick      a few epochs, for a smoke test

``examples/models`` holds a vision transformer (linen and NNX), a convolutional
network and a scanned decoder in plain Flax: nothing of bitnet_jax is in them. The
images are scikit-learn's digits (8x8), the text is the Zen of Python. Float and
ternary runs share every setting; quantisation is phased in over the first fifth
of the ternary run by a traced strength, and the run is interrupted in the middle
of that, saved by Orbax, restored and continued.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import functools
import importlib
import io
import pathlib
import tempfile
from typing import Any

import digits as multilayer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from models.convnet import ConvNet
from models.decoder import Decoder
from models.vit import ViT
from models.vit_nnx import ViT as NnxViT
from results import Table, save
from tqdm import tqdm

import bitnet_jax as bj

BATCH = 64
RAMP = 0.2  # of the steps, over which the strength goes from 0 to 1
INT8 = bj.Int8Config()
NAMES = ("ViT", "ConvNet", "Decoder", "ViT (NNX)")


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn: batches, and how good an answer is."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    learning_rate: float


@dataclasses.dataclass
class Result:
    """What one seed of one model gave. Scores are accuracies in percent."""

    scores: dict[str, float]
    curves: dict[str, np.ndarray]
    differing: int
    logits: int
    report: Any
    resumed: tuple[int, int] | None = None
    comparison: Any = None
    coverage: Any = None
    sensitivity: Any = None
    flips: np.ndarray | None = None


def digits(seed: int) -> Task:
    """The digits of digits.py, in its split, as images."""
    x, x_test, y, y_test = multilayer.digits(seed)
    return Task((x.reshape(-1, 8, 8, 1), y), (x_test.reshape(-1, 8, 8, 1), y_test), 2e-3)


def zen(length: int) -> tuple[Task, int]:
    """The Zen of Python as windows of characters and their next ones, and how many characters."""
    with contextlib.redirect_stdout(io.StringIO()):
        text = codecs.decode(importlib.import_module("this").s, "rot13")
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text])
    windows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)
    data = (jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:]))
    return Task(data, tuple(part[::29] for part in data), 3e-3), len(letters)


def first_and_last_at_eight_bits(path: tuple[str, ...], leaf: Any) -> Any:
    """A selector: int8 for what meets pixels, letters and classes, ternary for the rest."""
    del leaf
    if path[-1] == "embedding" or (path[-1] == "kernel" and path[0] in ("patches", "stem", "head")):
        return INT8
    return path[-1] == "kernel"


def loss_of(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# A loop of steps, not a scan over them: XLA's convolutions on CPU are slow inside a scan.
@functools.partial(jax.jit, static_argnames=("steps",), donate_argnums=0)
def step(state: TrainState, batch: jax.Array, data: Any, steps: int):
    """One step; returns the loss too."""
    x, y = data
    ramp = optax.linear_schedule(0.0, 1.0, max(1, int(RAMP * steps)))

    def loss_fn(params):
        with bj.phase_in(jnp.float32(ramp(state.step))):  # the one line; float models ignore it
            return loss_of(state.apply_fn({"params": params}, x[batch]), y[batch])

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def orders(seed: int, size: int, epochs: int) -> jax.Array:
    """The batches of every epoch: (epochs, steps, BATCH) indices."""
    keys = jax.random.split(jax.random.key(seed), epochs)
    order = jnp.stack([jax.random.permutation(key, size) for key in keys])
    return order[:, : size // BATCH * BATCH].reshape(epochs, -1, BATCH)


def optimizer(task: Task, steps: int, kernels: Any = None) -> optax.GradientTransformation:
    """AdamW with cosine decay; with ``kernels``, one that watches the codes of the ternary ones."""
    schedule = optax.cosine_decay_schedule(task.learning_rate, steps)
    tx = optax.adamw(schedule, weight_decay=1e-2)
    if kernels is None:
        return tx
    watch = bj.optim.watch_trits(every=20, select=kernels.ternary)
    return optax.chain(watch, tx)


def fresh(model: Any, task: Task, seed: int, tx: optax.GradientTransformation) -> TrainState:
    """A train state at step 0."""
    params = model.init(jax.random.key(seed), task.train[0][:1])["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train(state: TrainState, task: Task, plan: jax.Array, bar: tqdm, part: slice = slice(None)):
    """Trains part of a plan; the state, the loss of every step, and the flips of every epoch."""
    steps, losses, flips = plan.shape[0] * plan.shape[1], [], []
    for epoch in plan[part]:
        for batch in epoch:
            state, loss = step(state, batch, task.train, steps)
            losses.append(loss)
        with contextlib.suppress(ValueError):  # the float run watches nothing
            read = bj.optim.read_trits(state.opt_state)
            flips.append(np.mean([v for k, v in read.items() if k.endswith("flip_rate")] or [0.0]))
        bar.update()
    return state, np.array(losses), np.array(flips)


def resumed_losses(model: Any, task: Task, seed: int, plan: jax.Array, tx: Any, bar: tqdm):
    """Trains to the middle of the ramp, saves, restores into a new state, and goes on."""
    stop = max(1, round(RAMP * plan.shape[0] / 2))
    state, before, _ = train(fresh(model, task, seed, tx), task, plan, bar, slice(stop))
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        path = pathlib.Path(folder).resolve() / "state"
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        other = fresh(model, task, seed + 1, tx)  # of the same shape, other values
        # From host memory, as a fresh state: bound to a device, it would be compiled for again.
        state = jax.device_get(checkpointer.restore(path, other))
    _, after, _ = train(state, task, plan, bar, slice(stop, None))
    return np.concatenate([before, after])


def accuracy(apply: Any, params: Any, task: Task) -> float:
    """Percent of right answers on the test set."""
    return float(multilayer.accuracy(apply, params, *task.test))


def run(
    model: Any, task: Task, seed: int, epochs: int, out: pathlib.Path, bar: tqdm, whole: bool
) -> Result:
    """Float and ternary training of one model, the packed file, and what became of the answers."""
    x, _ = task.test
    plan = orders(seed, task.train[0].shape[0], epochs)
    steps = plan.shape[0] * plan.shape[1]
    # The model is not edited.
    ternary = bj.linen.ternarize(model, select=first_and_last_at_eight_bits)
    plain = optimizer(task, steps)
    kernels = bj.linen.kernels(ternary, fresh(ternary, task, seed, plain).params, x)
    watching = optimizer(task, steps, kernels)

    curves, states = {}, {}
    states["float"], curves["float"], _ = train(fresh(model, task, seed, plain), task, plan, bar)
    state = fresh(ternary, task, seed, watching)
    states["ternary"], curves["ternary"], flips = train(state, task, plan, bar)
    params = {kind: state.params for kind, state in states.items()}
    resumed = None
    if whole:
        again = resumed_losses(ternary, task, seed, plan, watching, bar)
        resumed = (int((again != curves["ternary"]).sum()), len(again))

    packed, report = bj.linen.pack(ternary, params["ternary"], x)
    file = out / f"unedited-{type(model).__name__}.bitnet.safetensors"
    bj.io.save(file, packed)
    loaded = bj.io.load(file)
    apply = {"float": jax.jit(model.apply), "ternary": jax.jit(ternary.apply)}
    trained = apply["ternary"]({"params": params["ternary"]}, x)
    served = apply["ternary"]({"params": loaded}, x)
    untrained, _ = bj.linen.pack(ternary, params["float"], x)
    result = Result(
        scores={
            "float32": accuracy(apply["float"], params["float"], task),
            "ternary": accuracy(apply["ternary"], params["ternary"], task),
            "loaded": accuracy(apply["ternary"], loaded, task),
            "untrained": accuracy(apply["ternary"], untrained, task),
        },
        curves=curves,
        differing=int((trained != served).sum()),
        logits=trained.size,
        report=report,
        resumed=resumed,
        flips=flips,
    )
    if whole:
        some = tuple(part[:256] for part in task.train)

        def loss(params: Any) -> jax.Array:
            return loss_of(ternary.apply({"params": params}, some[0]), some[1])

        result.coverage = bj.linen.explain(ternary, x)
        result.sensitivity = bj.analysis.sensitivity(loss, params["float"], select=kernels)
        result.comparison = bj.analysis.compare(ternary, params["float"], untrained, [task.test])
    return result


def run_nnx(task: Task, seed: int, epochs: int, bar: tqdm) -> Result:
    """The same transformer in NNX: ternarised in place, trained by nnx.Optimizer, packed."""
    plan, (x, y), (x_test, y_test) = orders(seed, len(task.train[0]), epochs), task.train, task.test
    steps = plan.shape[0] * plan.shape[1]
    ramp = optax.linear_schedule(0.0, 1.0, max(1, int(RAMP * steps)))

    @nnx.jit
    def one(model, nnx_optimizer, batch, strength):
        def loss_fn(model):
            with bj.phase_in(strength):
                return loss_of(model(x[batch]), y[batch])

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        nnx_optimizer.update(model, grads)
        return loss

    @nnx.jit
    def logits_of(model):
        return model(x_test)

    scores, curves, models, coverage = {}, {}, {}, None
    for kind in ("float32", "ternary"):
        model = models[kind] = NnxViT(rngs=nnx.Rngs(seed))
        if kind == "ternary":
            coverage = bj.nnx.ternarize(model, select=first_and_last_at_eight_bits)
        nnx_optimizer = nnx.Optimizer(model, optimizer(task, steps), wrt=bj.nnx.trainable)
        losses = []
        for i, batch in enumerate(plan.reshape(steps, -1)):
            losses.append(one(model, nnx_optimizer, batch, jnp.float32(ramp(i))))
            if (i + 1) % plan.shape[1] == 0:
                bar.update()
        curves["float" if kind == "float32" else kind] = np.array(losses)
        scores[kind] = 100.0 * float(jnp.mean(logits_of(model).argmax(-1) == y_test))
    trained = logits_of(models["ternary"])
    packed, report = bj.nnx.pack(models["ternary"])
    served = logits_of(packed)
    scores["loaded"] = 100.0 * float(jnp.mean(served.argmax(-1) == y_test))
    differing = int((trained != served).sum())
    return Result(scores, curves, differing, trained.size, report, coverage=coverage)


def summary(results: dict[str, list[Result]]) -> Table:
    """One table: a column for each model."""

    def points(name: str, kind: str) -> str:
        values = np.array([r.scores.get(kind, np.nan) for r in results[name]])
        if np.isnan(values).any():
            return ""
        spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
        return f"{values.mean():.2f} %{spread}"

    labels = {
        "float32": "accuracy, float32",
        "ternary": "accuracy, ternary",
        "loaded": "the same, loaded from the file",
        "untrained": "float32 packed without training",
    }
    rows = [[label, *(points(name, kind) for name in results)] for kind, label in labels.items()]
    for label, cell in {
        "logits that differ, training forward against loaded": lambda runs: (
            f"{sum(r.differing for r in runs):,} of {sum(r.logits for r in runs):,}"
        ),
        "losses that differ, resumed by Orbax in mid-ramp": lambda runs: (
            f"{runs[0].resumed[0]} of {runs[0].resumed[1]}" if runs[0].resumed else ""
        ),
        "whole model, float32 to packed": lambda runs: (
            f"{runs[0].report.model_bytes_before:,} / {runs[0].report.model_bytes_after:,} B "
            f"({runs[0].report.model_ratio:.2f}x)"
        ),
    }.items():
        rows.append([label, *(cell(runs) for runs in results.values())])
    return Table("Models that nobody edited", ["", *results], rows)


def draw(results: dict[str, list[Result]], path: pathlib.Path) -> None:
    """Losses with the ramp, codes that flip, scores, and sensitivity: a row for each model."""
    figure = Figure(figsize=(15, 3.3 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 4, squeeze=False, width_ratios=(2, 1.4, 1.2, 2))
    colors = {"float": "#8a8a8a", "ternary": "#2a9d6f", "loaded": "#1d6f4e", "untrained": "#c8553d"}
    for (name, runs), (losses, flips, bars, hurts) in zip(results.items(), axes, strict=True):
        for kind, curve in runs[0].curves.items():
            width = max(1, len(curve) // 100)
            smooth = np.convolve(curve, np.ones(width) / width, mode="valid")
            losses.plot(np.arange(len(smooth)), smooth, color=colors[kind], label=kind, lw=1.2)
        ramp = int(RAMP * len(runs[0].curves["ternary"]))
        losses.axvspan(0, ramp, color="#2a9d6f", alpha=0.12, lw=0, label="ramp")
        if runs[0].resumed:
            losses.axvline(ramp / 2, color="#c8553d", ls="--", lw=1, label="saved, restored")
        losses.set(title=f"{name}: training loss", xlabel="step", yscale="log")
        losses.legend(fontsize="small", loc="upper right")

        if runs[0].flips is not None:
            flips.plot(np.arange(1, 1 + len(runs[0].flips)), 100 * runs[0].flips, color="#3b6fb6")
            flips.set(title="codes that flip in 20 steps, %", xlabel="epoch", ylim=(0, None))
        else:
            flips.set_axis_off()

        kinds = [
            kind for kind in ("float32", "ternary", "loaded", "untrained") if kind in runs[0].scores
        ]
        names = {"untrained": "packed without\ntraining", "loaded": "packed"}
        values = np.array([[r.scores[kind] for kind in kinds] for r in runs])
        error = values.std(0, ddof=1) if len(runs) > 1 else None
        shade = [colors.get(kind, colors["float"]) for kind in kinds]
        labels = [names.get(kind, kind) for kind in kinds]
        drawn = bars.barh(labels, values.mean(0), xerr=error, color=shade)
        bars.bar_label(drawn, fmt=" %.1f", padding=6)
        bars.set(title="test accuracy, %", xlim=(0, 125))
        bars.invert_yaxis()

        if runs[0].sensitivity is not None:
            layers = runs[0].sensitivity.rows[:10][::-1]
            short = [row.path.removesuffix("/kernel") for row in layers]
            hurts.barh(short, [row.change for row in layers], color="#6b6b6b")
            hurts.set(title="change of loss, one kernel packed")
        else:
            hurts.set_axis_off()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, list[Result]]:
    """Runs every model and seed, prints the tables, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default 1)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs (default 40)")
    parser.add_argument("--quick", action="store_true", help="few epochs, a smoke test")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder")
    parser.add_argument("--json", help="where to record the tables")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, help="some models")
    args = parser.parse_args(argv)
    epochs = 3 if args.quick else args.epochs
    args.out.mkdir(parents=True, exist_ok=True)

    results: dict[str, list[Result]] = {name: [] for name in NAMES if name in args.only}
    seeds = {name: args.seeds if name in ("ViT", "ConvNet") else 1 for name in results}
    runs = sum(2 * n + (name != "ViT (NNX)") for name, n in seeds.items())
    with tqdm(total=epochs * runs, unit="epoch", disable=None) as bar:
        for name, seed in [(name, i) for name, count in seeds.items() for i in range(count)]:
            bar.set_description(name)
            if name == "ViT (NNX)":
                results[name].append(run_nnx(digits(seed), seed, epochs, bar))
                continue
            task, letters = zen(48) if name == "Decoder" else (digits(seed), 0)
            kinds = {"ViT": ViT, "ConvNet": ConvNet}
            model = Decoder(letters, length=48) if letters else kinds[name]()
            result = run(model, task, seed, epochs, args.out, bar, whole=seed == 0)
            results[name].append(result)

    if "ViT" in results:
        vit = results["ViT"][0]
        print(f"\nThe transformer, ternarised:\n\n{vit.coverage}")
        print(f"\nPacking one kernel alone in the float transformer:\n\n{vit.sensitivity}")
        print(f"\nThe float transformer, packed without training:\n\n{vit.comparison}")
    print(f"\n{args.seeds} seed(s), {epochs} epochs, {jax.devices()[0].platform}\n")
    table = summary(results)
    print(table)
    save(args.json, table)
    draw(results, args.out / "unedited.png")
    print(f"\nwrote {args.out / 'unedited.png'}")
    return results


if __name__ == "__main__":
    main()
