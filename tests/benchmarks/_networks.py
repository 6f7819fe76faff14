"""Float networks to convert, and which config each of their kernels gets.

The networks of ``examples/unedited.py`` on digits and of ``examples/language_model.py`` on bytes,
trained in float as there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _bench  # noqa: F401  its folder of examples is on the path after it
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import bitnet_jax as bj
from bitnet_jax._quantize.kernel_axes import group_grid

import language_model  # isort: skip
import unedited  # isort: skip

BATCHES = 4
Data = tuple[jax.Array, jax.Array]  # inputs and labels
Apply = Callable[[Any, jax.Array], jax.Array]  # (params, inputs) -> logits
losses_of = optax.softmax_cross_entropy_with_integer_labels


class Trained(NamedTuple):
    """A float network after training.

    Attributes:
      params: its parameters.
      batches: what it is calibrated with.
      test: held-out data.
    """

    params: Any
    batches: list[Data]
    test: Data

    @property
    def seen(self) -> Data:
        """All of the batches in one."""
        return tuple(map(jnp.concatenate, zip(*self.batches, strict=True)))  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Something to convert.

    Attributes:
      name: in the tables.
      apply: the float function.
      trained: (seed, share of the training) -> the network after it.
      ends: whether the first and the last layer are int8 where the others are ternary.
    """

    name: str
    apply: Apply
    trained: Callable[[int, float], Trained]
    ends: bool = False

    @functools.cached_property
    def scores(self) -> Callable[[Any, Data], tuple[float, float]]:
        """(params, data) -> loss in nats and accuracy in percent, of the float function."""
        return scores_of(self.apply)


def scores_of(apply: Apply) -> Callable[[Any, Data], tuple[float, float]]:
    """(params, data) -> mean loss in nats, and accuracy in percent; compiled once."""

    @jax.jit
    def run(params: Any, data: Data) -> tuple[jax.Array, jax.Array]:
        logits = apply(params, data[0])
        right = logits.argmax(-1) == data[1]
        return losses_of(logits, data[1]).mean(), 100 * right.mean()

    return lambda params, data: tuple(map(float, run(params, data)))  # pyright: ignore[reportReturnType]


def images(model: Any) -> Network:
    """A network of ``unedited.py`` on the digits."""

    def trained(seed: int, share: float) -> Trained:
        task = unedited.digits(seed)
        plan = unedited.orders(seed, len(task.train[0]), math.ceil(40 * share))
        tx = unedited.optimizer(task, plan.shape[0] * plan.shape[1])
        state = unedited.fresh(model, task, seed, tx)
        state, *_ = unedited.train(state, task, plan, tqdm(disable=True))
        size = 128
        starts = range(0, BATCHES * size, size)
        batches = [tuple(part[i : i + size] for part in task.train) for i in starts]
        return Trained(state.params, batches, task.test)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x)

    return Network(type(model).__name__, apply, trained, ends=True)


def decoder() -> Network:
    """The decoder of ``language_model.py`` on bytes."""
    graph, _ = nnx.split(language_model.decoder("float"))

    def data(ids: np.ndarray, count: int, seed: int) -> Data:
        rows = language_model.windows(ids, count, np.random.default_rng(seed))
        return rows[:, :-1], rows[:, 1:]

    def trained(seed: int, share: float) -> Trained:
        steps = math.ceil(600 * share)
        model, (ids, held_out) = language_model.decoder("float", seed), language_model.text()
        rates = language_model.RATES["float"]
        tx = language_model.optimizer_of(*(language_model.schedule(r, steps) for r in rates))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            batch = language_model.windows(ids, language_model.BATCH, rng)
            language_model.train_step(model, optimizer, batch)
        batches = [data(ids, 8, 100 + i) for i in range(BATCHES)]
        return Trained(nnx.state(model, nnx.Param), batches, data(held_out, 128, 1))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)[0]

    return Network("Decoder", apply, trained)


def labelled(apply: Apply) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The same function with labels that it does not use, for losses that do."""
    return lambda params, x, y: apply(params, x)


# Configs of each kernel.

Rule = Callable[[tuple[int, ...]], Any]  # the lengths of a contraction -> a config


def whole(scale: Any, **more: Any) -> Rule:
    """One config for every kernel."""
    return lambda _: bj.TernaryConfig(granularity=scale, **more)


def groups(most: int, **more: Any) -> Rule:
    """Groups of the largest size up to ``most`` that tiles a contraction."""

    def rule(lengths: tuple[int, ...]) -> bj.TernaryConfig:
        size = next(n for n in range(most, 0, -1) if group_grid(lengths, n))
        return bj.TernaryConfig(granularity=size, **more)

    return rule


def contractions(apply: Apply, net: Trained) -> dict[tuple[str, ...], tuple[int, ...]]:
    """By path of each kernel, the lengths that its product sums over."""
    uses = bj.ternarize(apply).kernels(net.params, net.batches[0][0]).uses
    return {
        path: tuple(use.shape[axis] for axis in use.axes["contracting_axes"])
        for path, use in uses.items()
    }


def configs(lengths: Mapping[tuple[str, ...], tuple[int, ...]], rule: Rule) -> Any:
    """A selector of all kernels, each with its config."""
    return lambda path, leaf: rule(lengths[path]) if path in lengths else None
