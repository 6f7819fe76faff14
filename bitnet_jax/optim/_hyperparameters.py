"""Checks of hyperparameters, shared by all transforms and schedules.

``optax.inject_hyperparams`` turns every number into a scalar array, and ``jit`` turns
that into a tracer. So a number may be a Python number or a scalar array here; a tracer
and a schedule pass, because they have no value yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core

from bitnet_jax._checks import describe

Scalar = int | float | jax.Array | np.ndarray | np.number

ScalarOrSchedule = Scalar | optax.Schedule


class Rule(NamedTuple):
    """What a number must be: in words for the error, and as a function."""

    text: str
    holds: Callable[[float], bool]


NONNEGATIVE = Rule("a finite number >= 0", lambda v: 0 <= v < float("inf"))

POSITIVE = Rule("a finite number > 0", lambda v: 0 < v < float("inf"))

DECAY = Rule("a number in [0, 1)", lambda v: 0 <= v < 1)

SHARE = Rule("a number between 0 and 1, a share of the steps", lambda v: 0 < v < 1)


def has_no_value(value: object) -> bool:
    """Whether a hyperparameter is a traced scalar."""
    return isinstance(value, core.Tracer) and value.shape == ()


def concrete(value: object) -> Any:
    """The Python number in a scalar array; anything else as it is."""
    if isinstance(value, core.Tracer) or not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return value
    return value.item() if value.shape == () else value


def require_number(who: str, name: str, value: object, rule: Rule, remedy: str = "") -> None:
    """Raises unless a number keeps a rule; a traced scalar passes."""
    number = concrete(value)
    if has_no_value(number):
        return
    known = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not known or not rule.holds(number):
        text = f"{who}: `{name}` must be {rule.text}, got {number!r}. {remedy}"
        raise ValueError(text.rstrip())


def require_number_or_schedule(
    who: str, name: str, value: object, rule: Rule, remedy: str = ""
) -> None:
    """:func:`require_number`; a schedule of the step passes too."""
    if not callable(value):
        either = rule._replace(text=f"{rule.text}, or a schedule of the step")
        require_number(who, name, value, either, remedy)


def require_integer(who: str, name: str, value: object, low: int) -> None:
    """Raises unless a value is an integer, ``low`` or more; a traced integer passes."""
    number = concrete(value)
    if has_no_value(number) and jnp.issubdtype(jnp.result_type(number), jnp.integer):
        return
    if not isinstance(number, int) or isinstance(number, bool) or number < low:
        raise ValueError(f"{who}: `{name}` must be an integer >= {low}, got {number!r}.")


def require_flag(who: str, name: str, value: object) -> None:
    """Raises unless a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: `{name}` must be True or False, got {describe(value)}.")


def float_dtype(who: str, name: str, value: object) -> np.dtype | None:
    """A floating-point dtype, or None; raises on another.

    ``optax.inject_hyperparams`` takes ``jnp.bfloat16``, which can be called, for a schedule
    and passes what it returns: a scalar of that dtype.
    """
    given: Any = value.dtype if isinstance(value, jax.Array) else value
    if given is not None and not jnp.issubdtype(jnp.dtype(given), jnp.inexact):
        raise ValueError(
            f"{who}: `{name}` must be a floating-point dtype, got {jnp.dtype(given).name}. Pass "
            "jnp.float32 or jnp.bfloat16, or None."
        )
    return None if given is None else jnp.dtype(given)


def value_at(value: ScalarOrSchedule, step: jax.Array) -> jax.Array:
    """A hyperparameter at a step, float32."""
    return jnp.asarray(value(step) if callable(value) else value, jnp.float32)
