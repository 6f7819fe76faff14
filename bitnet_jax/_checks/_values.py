"""Arguments on their own: numbers, names, kinds, arrays."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def one_of(who: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuses a value outside a short list of names."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{who}: `{name}` must be one of {listed}, got {value!r}.{hint}")


def positive(who: str, name: str, value: Any) -> None:
    """Refuses anything but a finite number above zero."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{who}: `{name}` must be a finite number > 0, got {value!r}.")


def epsilon(who: str, value: Any, most: int = 1) -> None:
    """Refuses an eps that float32 cannot hold as a normal number, or ``most`` over it."""
    positive(who, "eps", value)
    limits = np.finfo(np.float32)
    smallest, largest = max(float(limits.tiny), most / float(limits.max)), float(limits.max)
    if not smallest <= value <= largest or not np.isfinite(most / np.float32(value)):
        raise ValueError(
            f"{who}: `eps` must be a normal float32 with a finite {most} / eps, {smallest:.2e} "
            f"to {largest:.2e}, got {value!r}."
        )


def granularity(who: str, value: Any) -> None:
    """Refuses a granularity that is not a name or a group size."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{who}: `granularity` as a group size must be >= 1, got {value}.")
        return
    if not isinstance(value, str) or value not in ("tensor", "channel"):
        raise ValueError(
            f"{who}: `granularity` must be 'tensor', 'channel' or a group size (int), "
            f"got {value!r}."
        )


def bits(who: str, value: Any) -> None:
    """Refuses an activation width that int8 codes cannot hold."""
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= 8:
        raise ValueError(f"{who}: `bits` must be an integer from 2 to 8, got {value!r}.")


def instance(who: str, name: str, value: Any, kind: type | tuple[type, ...], remedy: str) -> None:
    """Refuses an argument of another type."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise TypeError(f"{who}: `{name}` must be a {wanted}, got {describe(value)}. {remedy}")


def float_array(who: str, name: str, value: Any) -> None:
    """Refuses integer, boolean and complex arrays, and what is no array."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "shape", None) is None:
        raise TypeError(
            f"{who}: `{name}` must be a floating-point array, got {describe(value)}. "
            "Pass a jax.Array or a numpy.ndarray."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{who}: `{name}` must be floating point (float32, bfloat16, float16), got "
            f"{describe(value)}. Cast it, or leave it out of the selection."
        )


def scalar(who: str, name: str, value: Any) -> None:
    """Refuses what is neither a number nor an array of one."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok and (getattr(value, "shape", None) != () or not hasattr(value, "dtype")):
        raise ValueError(
            f"{who}: `{name}` must be a number or a scalar array, got {describe(value)}. Pass "
            "one value, for example schedule(step)."
        )


def interval(who: str, name: str, value: Any) -> None:
    """Refuses a number of steps that is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: `{name}` must be an integer >= 1, got {value!r}.")


def static_strength(who: str, value: float) -> None:
    """Refuses a Python strength outside [0, 1]; a traced one cannot be looked at."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{who}: `strength` must be from 0 to 1, got {value!r}.")


def describe(value: Any) -> str:
    """What arrived, for an error: dtype and shape of an array, else type and value."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and shape is not None:
        return f"{dtype} of shape {tuple(shape)}"
    return f"{type(value).__name__} {value!r}"
