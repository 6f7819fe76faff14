"""Schedules of the b1.58 recipe, and the ramp that phases quantisation in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bitnet_jax import _checks
from bitnet_jax.optim._gradients import (
    require_hyperparameter,
    require_start_step,
    require_step_count,
)

SHAPES = ("linear", "cosine")


def two_stage_lr(
    steps: int,
    first: float | Sequence[float] = (1.5e-3, 8e-4),
    second: float | Sequence[float] = (5e-4, 0.0),
    *,
    warmup_steps: int = 375,
    switch: float = 0.5,
    shape: str = "linear",
) -> optax.Schedule:
    """The learning rate of b1.58: a high stage, then, from one step to the next, a low one.

    Ternary codes move only when a latent weight crosses its threshold, which
    takes a large step; late in training they should settle, which takes a small
    one. The defaults are those of the 2B model; the 700M one went from
    ``first=1.5e-3`` to ``second=1e-3``.

    Args:
      steps: of the whole run.
      first: (start, end) of the first stage, or one number to hold.
      second: the same of the second.
      warmup_steps: from 0 to the start of the first stage, linearly; a part of it.
      switch: where the second stage starts, as a share of ``steps``.
      shape: of the way from start to end, ``"linear"`` or ``"cosine"``.

    Returns:
      A schedule, step to learning rate. After ``steps`` it holds the last value.

    Raises:
      ValueError: steps below 2, a switch outside (0, 1), a warm-up longer than the
        first stage, a stage that is no number or pair of numbers >= 0.

    Example:
      >>> import bitnet_jax as bj
      >>> lr = bj.optim.two_stage_lr(1000, warmup_steps=100)
      >>> [round(float(lr(step)), 6) for step in (0, 50, 100, 499, 500, 1000)]
      [0.0, 0.00075, 0.0015, 0.000802, 0.0005, 0.0]

    References:
      Ma et al., The Era of 1-bit LLMs: training tips, code and FAQ (2024); Ma et
      al., BitNet b1.58 2B4T technical report (2025), section 3.1.
    """
    who = "two_stage_lr"
    middle = _switch_step(who, steps, switch)
    _require_warmup_fits(who, "warmup_steps", warmup_steps, middle)
    _checks.require_one_of(who, "shape", shape, SHAPES)
    stages = []
    for name, stage in (("first", first), ("second", second)):
        stages.append(_stage_ends(who, name, stage))
    (top, low), (high, end) = stages
    parts = [
        optax.linear_schedule(0.0, top, warmup_steps)
        if warmup_steps
        else optax.constant_schedule(0.0),
        _between(top, low, middle - warmup_steps, shape),
        _between(high, end, steps - middle, shape),
    ]
    return optax.join_schedules(parts, [warmup_steps, middle])


def two_stage_weight_decay(
    steps: int, first: float = 0.1, second: float = 0.0, *, switch: float = 0.5
) -> optax.Schedule:
    """The weight decay of b1.58: on, and from the second stage on off.

    Decay pulls latent weights to 0, where codes are undecided; the second stage
    lets them settle. ``optax.adamw(weight_decay=...)`` takes it as it is.

    Args:
      steps: of the whole run.
      first: the decay of the first stage.
      second: that of the second.
      switch: where the second stage starts, as a share of ``steps``.

    Returns:
      A schedule, step to weight decay.

    Raises:
      ValueError: steps below 2, a switch outside (0, 1), a negative decay.

    Example:
      >>> import bitnet_jax as bj
      >>> decay = bj.optim.two_stage_weight_decay(1000)
      >>> [round(float(decay(step)), 3) for step in (0, 499, 500, 1000)]
      [0.1, 0.1, 0.0, 0.0]

    References:
      As :func:`two_stage_lr`.
    """
    who = "two_stage_weight_decay"
    middle = _switch_step(who, steps, switch)
    require_hyperparameter(who, "first", first, "b1.58 uses 0.1.")
    require_hyperparameter(who, "second", second, "b1.58 uses 0.")
    held = [optax.constant_schedule(first), optax.constant_schedule(second)]
    return optax.join_schedules(held, [middle])


def strength_schedule(steps: int, *, start: int = 0, shape: str = "linear") -> optax.Schedule:
    """The ramp that phases quantisation in: 0 (float) to exactly 1 (ternary).

    In a loss, for every layer in it: ``with bj.phase_in(strength(step)): ...``.
    Fine-tuning from a float network wants it; training from scratch does not.

    Args:
      steps: from 0 to 1; about 1000 for a pretrained network.
      start: the step at which it leaves 0.
      shape: ``"linear"``, or ``"cosine"``, gentle at both ends.

    Returns:
      A schedule, step to a float32 scalar.

    Raises:
      ValueError: steps below 1, a negative start, an unknown shape.

    Example:
      >>> import bitnet_jax as bj
      >>> strength = bj.optim.strength_schedule(100, start=10)
      >>> [float(strength(step)) for step in (0, 10, 60, 110, 1000)]
      [0.0, 0.0, 0.5, 1.0, 1.0]

    References:
      Mekkouri et al., Fine-tuning LLMs to 1.58 bit: extreme quantization made
      easy (Hugging Face, 2024), warm-up quantisation.
    """
    who = "strength_schedule"
    require_step_count(who, "steps", steps)
    require_start_step(who, "start", start)
    _checks.require_one_of(who, "shape", shape, SHAPES)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        way = (jnp.asarray(count, jnp.float32) - jnp.float32(start)) / jnp.float32(steps)
        way = jnp.clip(way, 0.0, 1.0)
        if shape == "cosine":
            # cos(pi) rounds; the end of a ramp has to be 1 to the bit.
            bend = 0.5 - 0.5 * jnp.cos(jnp.float32(jnp.pi) * way)
            way = jnp.where(way < 1.0, jnp.minimum(bend, 1.0), 1.0)
        return way

    return schedule


def _switch_step(who: str, steps: int, switch: float) -> int:
    _require_two_stages(who, steps, switch)
    return min(max(1, round(steps * switch)), steps - 1)


def _between(start: float, end: float, steps: int, shape: str) -> optax.Schedule:
    """From one value to another; flat where there is no way to go."""
    if start == end or steps < 1:
        return optax.constant_schedule(start)
    if shape == "linear" or start == 0.0:
        return optax.linear_schedule(start, end, steps)
    return optax.cosine_decay_schedule(start, steps, alpha=end / start)


def _require_two_stages(who: str, steps: Any, switch: Any) -> None:
    """Refuses a run that has no two stages."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise ValueError(f"{who}: `steps` must be an integer >= 2, got {steps!r}.")
    if isinstance(switch, bool) or not isinstance(switch, (int, float)) or not 0 < switch < 1:
        raise ValueError(
            f"{who}: `switch` must be between 0 and 1, a share of the steps, got {switch!r}."
        )


def _stage_ends(who: str, name: str, value: Any) -> tuple[float, float]:
    """Start and end of a stage; refuses what is neither a number nor a pair of them, >= 0."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in pair]
    if len(pair) != 2 or not all(numbers) or not all(0.0 <= v < math.inf for v in pair):
        raise ValueError(
            f"{who}: `{name}` must be a learning rate >= 0, or a pair (start, end) of them, got "
            f"{value!r}."
        )
    return float(pair[0]), float(pair[1])


def _require_warmup_fits(who: str, name: str, value: Any, most: int) -> None:
    """Refuses a number of steps that the first stage has no room for."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(
            f"{who}: `{name}` must be an integer from 0 to {most}, the length of the first stage, "
            f"got {value!r}. Shorten it, or raise `steps`."
        )
