"""What the gradient filters share: leaves by path, their widths, values that may be schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from bitnet_jax._checks import describe

ScalarOrSchedule = float | jax.Array | Callable[[jax.Array], Any]


def gradients(who: str, name: str, tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree of gradients, and its structure; refuses what has none."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in flat:
        _require_differentiable(who, name, _where(path), leaf)
    return [leaf for _, leaf in flat], treedef


def check_same(who: str, updates: Any, held: Any, lead: int = 0) -> None:
    """Refuses updates of other paths or shapes than a state's tree, less its leading axes."""
    got, wanted = _shapes(updates), _shapes(held)
    _require_same_updates(who, got, [(path, shape[lead:]) for path, shape in wanted])


def _shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(_where(path), jnp.shape(leaf)) for path, leaf in flat]


def _where(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "the array"


def width(leaf: Any) -> Any:
    """The dtype that a filter computes a leaf in: its own, and float32 at least.

    A bfloat16 average with alpha 0.98 stands still as soon as a step would change
    it by less than one part in 256.
    """
    dtype = jnp.result_type(leaf)
    return jnp.promote_types(dtype, jnp.float32)


def at(value: ScalarOrSchedule, count: jax.Array) -> Any:
    """A hyperparameter at a step: float32."""
    value = value(count) if callable(value) else value
    return jnp.asarray(value, jnp.float32)


def amplify(update: Any, average: Any, lamb: jax.Array, on: Any) -> Any:
    """``g + lamb * average`` where the filter is on, else g; in the dtype of g."""
    g = jnp.asarray(update)
    dtype = average.dtype
    raised = (g.astype(dtype) + lamb.astype(dtype) * average).astype(g.dtype)
    return raised if on is True else jnp.where(on, raised, g)


def require_step_count(who: str, name: str, value: Any) -> None:
    """Refuses a number of steps that is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: `{name}` must be an integer >= 1, got {value!r}.")


def require_params(who: str, params: Any) -> None:
    """Refuses an update without params."""
    if params is None:
        raise ValueError(
            f"{who}: `params` is missing. Call tx.update(grads, state, params), as weight decay "
            "needs it too."
        )


def require_hyperparameter(
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


def require_start_step(who: str, name: str, value: Any) -> None:
    """Refuses a first step that is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    whole = whole or (dtype is not None and jnp.issubdtype(dtype, jnp.integer))
    if not whole or (not isinstance(value, core.Tracer) and value < 0):
        raise ValueError(f"{who}: `{name}` must be an integer >= 0, got {value!r}.")


def require_flag(who: str, name: str, value: Any) -> None:
    """Refuses anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: `{name}` must be True or False, got {describe(value)}.")


def require_float_dtype(who: str, name: str, value: Any) -> None:
    """Refuses a dtype that holds no fractions."""
    if value is not None and not jnp.issubdtype(jnp.dtype(value), jnp.inexact):
        raise ValueError(
            f"{who}: `{name}` must be a floating-point dtype, got {jnp.dtype(value).name}. Pass "
            "jnp.float32 or jnp.bfloat16, or None."
        )


def _require_differentiable(who: str, name: str, path: str, value: Any) -> None:
    """Refuses a leaf of a kind that has no gradient."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        raise TypeError(
            f"{who}: {path} in `{name}` is {describe(value)}, which has no gradient. Give the "
            "optimizer the trainable part alone (`trainable, frozen = bj.partition(params)`), or "
            "mask the leaf (optax.masked)."
        )


def _require_same_updates(
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
