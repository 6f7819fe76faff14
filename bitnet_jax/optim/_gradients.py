"""The leaves of a tree of gradients, and the operation that both Grokfast filters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bitnet_jax._checks import describe

Leaf = jax.Array | np.ndarray | np.generic | float | jax.ShapeDtypeStruct


def gradient_leaves(who: str, name: str, tree: PyTree) -> tuple[list[Leaf], Any]:
    """The leaves of a tree of gradients, and its structure; raises if one has no gradient."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in flat:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"{who}: {_path_name(path)} in `{name}` is {describe(leaf)}, which has no "
                "gradient. Give the optimizer the trainable part alone (`trainable, frozen = "
                "bj.partition(params)`), or mask the leaf (optax.masked)."
            )
    return [leaf for _, leaf in flat], treedef


def require_params(who: str, params: PyTree) -> None:
    """Raises where ``update`` was called without params."""
    if params is None:
        raise ValueError(
            f"{who}: `params` is missing. Call tx.update(grads, state, params), as weight decay "
            "needs it too."
        )


def require_same_leaves(who: str, updates: PyTree, held: PyTree) -> None:
    """Raises unless updates have the paths and shapes of a tree in the optimizer's state."""
    new, old = _shapes(updates), _shapes(held)
    parts = []
    if unknown := [path for path in new if path not in old]:
        parts.append(f"has {_few(unknown)}, unknown to the state")
    if missing := [path for path in old if path not in new]:
        parts.append(f"lacks {_few(missing)}, which the state holds")
    changed = next((path for path in new if path in old and new[path] != old[path]), None)
    if changed is not None:
        parts.append(f"has {changed} of shape {new[changed]}, in the state {old[changed]}")
    if parts:
        raise ValueError(
            f"{who}: `updates` {', and '.join(parts)}. Pass gradients of the params that "
            "tx.init was given, or call tx.init again."
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path_name(path): jnp.shape(leaf) for path, leaf in flat}


def _path_name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "the array"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def wide_dtype(leaf: Leaf) -> np.dtype:
    """The dtype in which averages of a leaf are computed: its own, at least float32.

    A bfloat16 average with alpha 0.98 stands still as soon as a step would change
    it by less than one part in 256.
    """
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def amplify(update: Leaf, average: jax.Array, lamb: jax.Array, on: bool | jax.Array) -> jax.Array:
    """``g + lamb * average`` where the filter is on, else g; in the dtype of g."""
    g = jnp.asarray(update)  # pyright: ignore[reportArgumentType] - an array here, not its shape
    wide = average.dtype
    raised = (g.astype(wide) + lamb.astype(wide) * average).astype(g.dtype)
    return raised if on is True else jnp.where(on, raised, g)
