"""What the gradient filters share: leaves by path, their widths, values that may be schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bitnet_jax import _checks

ScalarOrSchedule = float | jax.Array | Callable[[jax.Array], Any]


def gradients(who: str, name: str, tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree of gradients, and its structure; refuses what has none."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in flat:
        _checks.has_gradient(who, name, _where(path), leaf)
    return [leaf for _, leaf in flat], treedef


def check_same(who: str, updates: Any, held: Any, lead: int = 0) -> None:
    """Refuses updates of other paths or shapes than a state's tree, less its leading axes."""
    got, wanted = _shapes(updates), _shapes(held)
    _checks.same_updates(who, got, [(path, shape[lead:]) for path, shape in wanted])


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
