"""The recipes that ``training_options.py`` compares: each changes one thing of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import _bench  # noqa: F401  # adds the folder of the next
import jax
import jax.numpy as jnp
import language_model as example
import optax

import bitnet_jax as bj

FLOAT = "float, two rates"
TERNARY = "ternary, two rates"
RAMPED = "ternary, two rates, phased in over 150 steps"

# What a layer computes, from x, its kernel and the strength of quantisation.
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to train.

    Args:
      kind: "float" or "ternary".
      kernels: peak learning rate of the kernels.
      rest: peak learning rate of the embedding and the norms.
      schedule: from a peak and a number of steps; by default the example's.
      changes: fields of the decoder's config.
      layer: fields of every ternary layer.
      strength: of quantisation by the step; None: always 1.
      start: the share of the steps that are float, and the method of ``bj.convert.calibrate``
        that makes latents of the float kernels then.
      product: what a layer computes instead of its own product.
      decay: AdamW's weight decay, from the number of steps.
      b2: AdamW's decay of the second moment.
      last: what is done to the kernels' updates after AdamW.
      average: decay of a running mean of the parameters, which is then what is evaluated.
      muon: whether Muon trains the kernels; its updates have an rms of 0.2 times the rate.
    """

    kind: str
    kernels: float
    rest: float
    schedule: Callable[[float, int], optax.Schedule] = example.schedule
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    strength: optax.Schedule | None = None
    start: tuple[float, str] | None = None
    product: Product | None = None
    decay: Callable[[int], optax.ScalarOrSchedule] = lambda _: 1e-4
    b2: float = 0.95
    last: optax.GradientTransformation | None = None
    average: float = 0.0
    muon: bool = False

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Of the whole model."""
        kernels, rest = (self.schedule(rate, steps) for rate in (self.kernels, self.rest))
        if not self.muon:
            decay: Any = self.decay(steps)
            both = {
                "kernel": optax.adamw(kernels, b2=self.b2, weight_decay=decay),
                "rest": optax.adamw(rest, b2=self.b2, weight_decay=decay),
            }
            if self.last is not None:
                both["kernel"] = optax.chain(both["kernel"], self.last)
            return optax.multi_transform(both, example.kernel_or_rest)
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


# Schedules.


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


def two_stage(rate: float, steps: int) -> optax.Schedule:
    """The stages of the 2B model, in units of where its first one starts."""
    stages = (rate, rate * 8 / 15), (rate / 3, 0.0)
    return bj.optim.two_stage_lr(steps, *stages, warmup_steps=min(100, steps // 4))


def decay_at_first(steps: int) -> optax.Schedule:
    """0.1 in the first half of the steps, 0 in the second."""
    return bj.optim.two_stage_weight_decay(steps)


# Products, and what is done to updates.


def float_kernel(x: jax.Array, w: jax.Array, strength: jax.Array) -> jax.Array:
    """Int8 inputs alone."""
    del strength
    return bj.fake_quantize_activations(x) @ w


def dead_zone_bias(share: float) -> Product:
    """Tequila, arXiv:2509.23809: weights whose code is 0 add ``share`` of them to a bias."""

    def product(x: jax.Array, w: jax.Array, strength: jax.Array) -> jax.Array:
        del strength
        dead = bj.quantize(w, bj.B158).codes == 0
        return bj.ternary_dot(x, w, bj.B158) + share * jnp.sum(jnp.where(dead, w, 0.0), axis=0)

    return product


def three_of_four(x: jax.Array, w: jax.Array, strength: jax.Array) -> jax.Array:
    """Sherry, arXiv:2601.07892: the least of four weights is 0, the others are +-s of a channel.

    A float product is added, ``1 - strength`` of it.
    """
    blocks = w.reshape(-1, 4, w.shape[1])
    least = jnp.argmin(jnp.abs(blocks), axis=1, keepdims=True)
    kept = jnp.where(jnp.arange(4)[:, None] == least, 0.0, blocks).reshape(w.shape)
    scale = jnp.sum(jnp.abs(kept), axis=0) * (4.0 / (3.0 * len(w)))
    through = w + jax.lax.stop_gradient(jnp.sign(kept) * scale - w)
    codes = bj.fake_quantize_activations(x)
    return codes @ through + (1.0 - strength) * (codes @ w)


def rounded_latents(stochastic: bool) -> optax.GradientTransformation:
    """Rounds what an update makes of the parameters to bfloat16: to nearest, or stochastically."""

    def update(updates: Any, done: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        leaves, treedef = jax.tree.flatten(updates)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), done), len(leaves))

        def rounded(u: jax.Array, p: jax.Array, key: jax.Array) -> jax.Array:
            bits = jax.lax.bitcast_convert_type(p + u, jnp.uint32)
            noise = jax.random.bits(key, u.shape, jnp.uint32) >> 16
            added = noise if stochastic else 0x7FFF + ((bits >> 16) & 1)
            kept = (bits + added) & jnp.uint32(0xFFFF0000)
            return jax.lax.bitcast_convert_type(kept, jnp.float32) - p

        new = map(rounded, leaves, jax.tree.leaves(params), keys)
        return jax.tree.unflatten(treedef, list(new)), done + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def grouped(size: int, down: int) -> dict[str, Any]:
    """A scale for so many weights; ``down`` for the kernel of 344 inputs, 8 times 43."""
    kernel, last = (bj.TernaryConfig(granularity=n) for n in (size, down))
    return {"weights": kernel, "overrides": tuple((f"layers/{i}/mlp/down", last) for i in range(2))}


def base(**changes: Any) -> Option:
    """``TERNARY`` with something changed."""
    return dataclasses.replace(Option("ternary", 5e-3, 1.5e-2), **changes)


RAMP = bj.optim.strength_schedule(150)
HALF = bj.optim.strength_schedule(300)
BF16 = {"backward_dtype": jnp.bfloat16}
CHANNEL = {"weights": bj.TernaryConfig(granularity="channel")}

OPTIONS = {
    "float, one rate": Option("float", 4e-3, 4e-3),
    "float, one rate, lower": Option("float", 2e-3, 2e-3),
    "float, one rate, higher": Option("float", 8e-3, 8e-3),
    FLOAT: Option("float", 3e-3, 6e-3),
    "float, two rates, linear": Option("float", 3e-3, 1.5e-2, linear(50)),
    "float, two rates, decay 0.1, off in the second half": Option(
        "float", 3e-3, 6e-3, decay=decay_at_first
    ),
    "ternary, one rate": Option("ternary", 6e-3, 6e-3),
    "ternary, one rate, lower": Option("ternary", 4e-3, 4e-3),
    "ternary, one rate, higher": Option("ternary", 1e-2, 1e-2),
    "ternary, one rate, higher, linear": Option("ternary", 1e-2, 1e-2, linear(100)),
    "ternary, one rate, higher, stable for 80 %": Option("ternary", 1e-2, 1e-2, stable(0.2)),
    "ternary, one rate, higher, stable for 50 %": Option("ternary", 1e-2, 1e-2, stable(0.5)),
    TERNARY: base(),
    RAMPED: base(strength=RAMP),
    "ternary, two rates, the rest's higher": base(rest=3e-2),
    "ternary, two rates, linear": base(schedule=linear(50)),
    "ternary, two rates, kernels' higher": base(kernels=8e-3, rest=3e-3),
    "ternary, two rates, groups of 64": base(changes=grouped(64, 43)),
    "ternary, Muon": Option("ternary", 1e-2, 4e-3, muon=True),
    "ternary kernels, float inputs": Option("ternary", 6e-3, 6e-3, changes={"activations": None}),
    "float kernels, int8 inputs": Option("ternary", 6e-3, 6e-3, product=float_kernel),
    # Of these, each changes one thing of TERNARY.
    "scales per channel": base(changes=CHANNEL),
    "scales in groups of 128, 172 for down": base(changes=grouped(128, 172)),
    "dead-zone bias, 0.001": base(product=dead_zone_bias(1e-3)),
    "dead-zone bias, 0.03": base(product=dead_zone_bias(3e-2)),
    "3:4 sparse, float part to step 300": base(product=three_of_four, strength=HALF),
    "150 float steps, then calibrated by gptq": base(start=(0.25, "gptq")),
    "decay 0.1, off in the second half": base(decay=decay_at_first),
    "decay 0.1, off in the second half, kernels' higher": base(kernels=7e-3, decay=decay_at_first),
    "decay 0.1, off in the second half, phased in": base(decay=decay_at_first, strength=RAMP),
    "two-stage rates, decay 0.1 in the first": base(schedule=two_stage, decay=decay_at_first),
    "b2 of 0.99": base(b2=0.99),
    "backward products in bfloat16": base(layer=BF16),
    "latents in bfloat16, rounded to nearest": base(last=rounded_latents(stochastic=False)),
    "latents in bfloat16, rounded stochastically": base(last=rounded_latents(stochastic=True)),
    "mean of latents, 0.98": base(average=0.98),
}
FINALISTS = (  # the others: one seed
    "float, one rate",
    FLOAT,
    "ternary, one rate",
    TERNARY,
    RAMPED,
    "decay 0.1, off in the second half",
    "decay 0.1, off in the second half, phased in",
    "backward products in bfloat16",
)
