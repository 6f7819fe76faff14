"""Optimizers: hyperparameters that may be schedules, and the trees that a state was made for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import core

from bitnet_jax._checks._values import describe


def hyperparameter(
    who: str, name: str, value: Any, remedy: str, *, below: float | None = None
) -> None:
    """Refuses a number below 0, or not below ``below``.

    A schedule or a traced scalar passes: it has no value yet.
    """
    if callable(value):
        return
    rule = "a finite number >= 0" if below is None else f"a number in [0, {below:g})"
    scalar_array = getattr(value, "shape", None) == () and hasattr(value, "dtype")
    if isinstance(value, core.Tracer) and scalar_array:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    top = float("inf") if below is None else below
    if not (number or scalar_array) or not 0.0 <= float(value) < top:
        raise ValueError(
            f"{who}: `{name}` must be {rule}, or a schedule of the step, got "
            f"{value if scalar_array else repr(value)}. {remedy}"
        )


def start_step(who: str, name: str, value: Any) -> None:
    """Refuses a first step that is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    whole = whole or (dtype is not None and jnp.issubdtype(dtype, jnp.integer))
    if not whole or (not isinstance(value, core.Tracer) and value < 0):
        raise ValueError(f"{who}: `{name}` must be an integer >= 0, got {value!r}.")


def stages(who: str, steps: Any, switch: Any) -> None:
    """Refuses a run that has no two stages."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise ValueError(f"{who}: `steps` must be an integer >= 2, got {steps!r}.")
    if isinstance(switch, bool) or not isinstance(switch, (int, float)) or not 0 < switch < 1:
        raise ValueError(
            f"{who}: `switch` must be between 0 and 1, a share of the steps, got {switch!r}."
        )


def stage(who: str, name: str, value: Any) -> tuple[float, float]:
    """Start and end of a stage; refuses what is neither a number nor a pair of them, >= 0."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in pair]
    if len(pair) != 2 or not all(numbers) or not all(0.0 <= v < math.inf for v in pair):
        raise ValueError(
            f"{who}: `{name}` must be a learning rate >= 0, or a pair (start, end) of them, got "
            f"{value!r}."
        )
    return float(pair[0]), float(pair[1])


def steps_within(who: str, name: str, value: Any, most: int) -> None:
    """Refuses a number of steps that the first stage has no room for."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(
            f"{who}: `{name}` must be an integer from 0 to {most}, the length of the first stage, "
            f"got {value!r}. Shorten it, or raise `steps`."
        )


def window(who: str, value: Any) -> None:
    """Refuses a length of a window that is none, or that is only known at run time."""
    if isinstance(value, core.Tracer) or hasattr(value, "dtype"):
        raise TypeError(
            f"{who}: `window_size` decides shapes and must be a Python int, got "
            f"{describe(value)}. With optax.inject_hyperparams, name it in "
            "static_args=('window_size',)."
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: `window_size` must be an integer >= 1, got {value!r}.")


def flag(who: str, name: str, value: Any) -> None:
    """Refuses anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: `{name}` must be True or False, got {describe(value)}.")


def float_dtype(who: str, name: str, value: Any) -> None:
    """Refuses a dtype that holds no fractions."""
    if value is not None and not jnp.issubdtype(jnp.dtype(value), jnp.inexact):
        raise ValueError(
            f"{who}: `{name}` must be a floating-point dtype, got {jnp.dtype(value).name}. Pass "
            "jnp.float32 or jnp.bfloat16, or None."
        )


def has_gradient(who: str, name: str, path: str, value: Any) -> None:
    """Refuses a leaf of a kind that has no gradient."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        raise TypeError(
            f"{who}: {path} in `{name}` is {describe(value)}, which has no gradient. Give the "
            "optimizer the trainable part alone (`trainable, frozen = bj.partition(params)`), or "
            "mask the leaf (optax.masked)."
        )


def same_updates(
    who: str, got: Sequence[tuple[str, Any]], wanted: Sequence[tuple[str, Any]]
) -> None:
    """Refuses updates of another tree than the state was made for: paths and shapes."""
    new, old = dict(got), dict(wanted)
    strangers = [path for path in new if path not in old]
    missing = [path for path in old if path not in new]
    parts = []
    if strangers:
        parts.append(f"has {_few(strangers)}, unknown to the state")
    if missing:
        parts.append(f"lacks {_few(missing)}, which the state holds")
    for path in new:
        if path in old and tuple(new[path]) != tuple(old[path]):
            parts.append(f"has {path} of shape {tuple(new[path])}, in the state {tuple(old[path])}")
            break
    if parts:
        raise ValueError(
            f"{who}: `updates` {', and '.join(parts)}. Pass gradients of the params that "
            "tx.init was given, or call tx.init again."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def rate_given(who: str, learning_rate: Any, phase: Any) -> None:
    """Refuses an optimizer without a learning rate."""
    if learning_rate is None and phase is None:
        raise ValueError(
            f"{who}: `learning_rate` is missing, and there is no `phase` to take it from. Pass "
            "learning_rate=1e-3, or a phase such as 'pretrain'."
        )


def tau_missing(who: str) -> None:
    """Reports logits for which there is no bound."""
    raise ValueError(
        f"{who}: `max_logits` was given to update, and there is no bound. Pass qk_tau=30.0 (or a "
        "phase), or leave max_logits out."
    )


def max_logits_given(who: str, value: Any) -> None:
    """Refuses an update that says nothing about the logits."""
    if value is None:
        raise ValueError(
            f"{who}: `max_logits` is missing. Call tx.update(grads, state, params, max_logits="
            "{'path/of/attention': bj.optim.attention_max_logits(q, k)})."
        )


def attention(who: str, where: str, names: Sequence[str], found: Sequence[bool]) -> None:
    """Refuses a path of ``max_logits`` at which there is no attention."""
    missing = [name for name, there in zip(names, found, strict=True) if not there]
    if missing:
        raise ValueError(
            f"{who}: `max_logits` names {where or 'the whole tree'}, and `params` has no "
            f"{' and no '.join(missing)} kernel there. Name the attention's own path, or its "
            f"projections by names=, which is {tuple(names)}."
        )


def heads_divide(who: str, what: str, parts: int, whole: int) -> None:
    """Refuses heads that do not divide what they are the heads of."""
    if parts < 1 or whole % parts:
        raise ValueError(
            f"{who}: {what}: {parts} does not divide {whole}. `max_logits` must be (heads,) of the "
            "query, and (layers, heads) where layers are stacked."
        )
