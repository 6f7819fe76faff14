"""Schedules of the b1.58 recipe, and the ramp that phases quantisation in.

All are piecewise functions of the step, in float32. Lengths may be traced, so that
``optax.inject_hyperparams`` can change them during a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from bitnet_jax import _checks
from bitnet_jax.optim._hyperparameters import (
    NONNEGATIVE,
    SHARE,
    Scalar,
    concrete,
    has_no_value,
    require_integer,
    require_number,
)

Shape = Literal["linear", "cosine"]

Stage = Scalar | Sequence[Scalar]

_WARMUP = 375  # steps, of the published recipe


def two_stage_lr(
    steps: Scalar,
    first: Stage = (1.5e-3, 8e-4),
    second: Stage = (5e-4, 0.0),
    *,
    warmup_steps: Scalar | None = None,
    switch: Scalar = 0.5,
    shape: Shape = "linear",
) -> optax.Schedule:
    """The learning-rate schedule of b1.58: a high stage, then an abrupt drop to a low one.

    Ternary codes move only when a latent weight crosses its threshold, which
    takes a large step; late in training they should settle, which takes a small
    one. The defaults are those of the 2B model; the 700M one went from
    ``first=1.5e-3`` to ``second=1e-3``.

    Args:
      steps: how many steps the whole run has.
      first: (start, end) of the first stage, or one number for a constant rate.
      second: the same for the second stage.
      warmup_steps: the first steps of the first stage, in which the rate rises linearly
        from 0. By default 375, as published; in a run whose first stage is shorter
        than 1875 steps, a fifth of that stage.
      switch: where the second stage starts, as a share of ``steps``.
      shape: of the decay from start to end, ``"linear"`` or ``"cosine"``.

    Returns:
      A schedule, step to learning rate. After ``steps`` it holds the last value.

    Raises:
      ValueError: steps below 2, a switch outside (0, 1), a warm-up longer than the
        first stage, a stage that is not one or two numbers >= 0.

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
    if warmup_steps is None:
        warmup_steps = _default_warmup(middle)
    else:
        _require_warmup(who, warmup_steps, middle)
    _checks.require_one_of(who, "shape", shape, get_args(Shape))
    (top, low), (high, end) = _stage_ends(who, "first", first), _stage_ends(who, "second", second)
    warm, switched, last = _float32(warmup_steps), _float32(middle), _float32(steps)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = _float32(step)
        rising = top * (t / jnp.maximum(warm, 1.0))
        decaying = _decay(top, low, _share(t, warm, switched), shape)
        late = _decay(high, end, _share(t, switched, last), shape)
        return jnp.where(t < warm, rising, jnp.where(t < switched, decaying, late))

    return schedule


def two_stage_weight_decay(
    steps: Scalar,
    first: Scalar = 0.1,
    second: Scalar = 0.0,
    *,
    switch: Scalar = 0.5,
) -> optax.Schedule:
    """The weight-decay schedule of b1.58: on in the first stage, off in the second.

    Decay pulls latent weights towards 0, so their codes keep changing; without it they
    settle in the second stage. Pass it to ``optax.adamw(weight_decay=...)``.

    Args:
      steps: how many steps the whole run has.
      first: the decay of the first stage.
      second: the decay of the second stage.
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
    switched = _float32(_switch_step(who, steps, switch))
    require_number(who, "first", first, NONNEGATIVE, "b1.58 uses 0.1.")
    require_number(who, "second", second, NONNEGATIVE, "b1.58 uses 0.")
    before, after = _float32(first), _float32(second)
    return lambda step: jnp.where(_float32(step) < switched, before, after)


def strength_schedule(
    steps: Scalar, *, start: Scalar = 0, shape: Shape = "linear"
) -> optax.Schedule:
    """A ramp that phases quantisation in: from 0 (float) to exactly 1 (ternary).

    Use it in a loss: ``with bj.phase_in(strength(step)): ...`` applies to every layer
    inside. It helps fine-tuning from a float network; training from scratch does not
    need it.

    Args:
      steps: how many steps the ramp takes; about 1000 for a pretrained network.
      start: the last step at which it is 0.
      shape: ``"linear"``, or ``"cosine"``, which is flat at both ends.

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
    require_integer(who, "steps", steps, 1)
    require_integer(who, "start", start, 0)
    _checks.require_one_of(who, "shape", shape, get_args(Shape))
    begin, length = _float32(start), _float32(steps)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        share = jnp.clip((_float32(step) - begin) / length, 0.0, 1.0)
        if shape == "cosine":
            # In float32 0.5 - 0.5 * cos(pi) need not be 1, and strength must be exactly 1
            # at the end: only then the layers take the int8 path.
            bend = 0.5 - 0.5 * jnp.cos(jnp.float32(jnp.pi) * share)
            share = jnp.where(share < 1.0, jnp.minimum(bend, 1.0), 1.0)
        return share

    return schedule


def _float32(value: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _switch_step(who: str, steps: Scalar, switch: Scalar) -> Scalar:
    """The first step of the second stage; either stage has at least one step."""
    require_integer(who, "steps", steps, 2)
    require_number(who, "switch", switch, SHARE)
    total, share = concrete(steps), concrete(switch)
    if has_no_value(total) or has_no_value(share):
        middle = jnp.round(_float32(total) * _float32(share))
        return jnp.clip(middle, 1.0, _float32(total) - 1.0)
    return min(max(1, round(total * share)), total - 1)


def _default_warmup(middle: Scalar) -> Scalar:
    """The published warm-up; a fifth of the first stage where that is shorter."""
    return jnp.minimum(_WARMUP, jnp.floor(_float32(middle) / 5.0))


def _require_warmup(who: str, value: Scalar, middle: Scalar) -> None:
    """Raises unless the warm-up is an integer >= 0 that fits into the first stage."""
    require_integer(who, "warmup_steps", value, 0)
    steps, longest = concrete(value), concrete(middle)
    if not (has_no_value(steps) or has_no_value(longest)) and steps > longest:
        raise ValueError(
            f"{who}: `warmup_steps` must be at most {longest:g}, the length of the first stage, "
            f"got {steps!r}. Shorten it, raise `steps`, or leave it out."
        )


def _stage_ends(who: str, name: str, value: Stage) -> tuple[jax.Array, jax.Array]:
    """The learning rates at the start and the end of a stage, float32."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or isinstance(value, str):
        raise ValueError(
            f"{who}: `{name}` must be a learning rate, or a pair (start, end) of them, got "
            f"{value!r}."
        )
    for rate in pair:
        require_number(who, name, rate, NONNEGATIVE, "Pass a learning rate, or (start, end).")
    return _float32(pair[0]), _float32(pair[1])


def _share(t: jax.Array, begin: jax.Array, end: jax.Array) -> jax.Array:
    """How much of a stage has passed, 0 to 1; a stage without a step is at its start."""
    return jnp.clip((t - begin) / jnp.maximum(end - begin, 1.0), 0.0, 1.0)


def _decay(start: jax.Array, end: jax.Array, share: jax.Array, shape: Shape) -> jax.Array:
    """The value between start and end; exactly ``end`` at a share of 1."""
    left = 1.0 - share if shape == "linear" else 0.5 + 0.5 * jnp.cos(jnp.pi * share)
    return (start - end) * left + end
