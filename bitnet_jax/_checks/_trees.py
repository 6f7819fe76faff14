"""Whole trees: selectors, axes by path, what is packed and what is not."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_jax._checks._values import describe


def tree_not_empty(who: str, name: str, count: int) -> None:
    """Refuses a tree without a single array."""
    if count == 0:
        raise ValueError(
            f"{who}: `{name}` holds no arrays. Pass the tree that model.init returned under "
            "'params'."
        )


def selector_matched(who: str, what: str, paths: Sequence[str], near_to: Sequence[str]) -> None:
    """Reports a selector, or one pattern of it, that matched nothing."""
    near: list[str] = []
    for pattern in near_to:
        near += difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4)
        parts = {part: path for path in paths for part in path.split("/")}
        near += [parts[p] for p in difflib.get_close_matches(pattern, list(parts), n=3)]
    listed = list(dict.fromkeys(near)) or list(paths)
    shown = ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "")
    raise ValueError(f"{who}: {what} matches nothing. Near paths: {shown}.")


def selector(who: str, value: Any) -> None:
    """Refuses a selector that is neither a function nor None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{who}: `select` must be a function of path and leaf, got {describe(value)}. Build "
            "one with bj.only('name') or bj.exclude('name')."
        )


def selection_value(who: str, path: str, value: Any) -> None:
    """Reports a selector that returned something that is no decision."""
    raise TypeError(
        f"{who}: `select` returned {describe(value)} for {path}. Return True or a "
        "TernaryConfig or an Int8Config to quantise the leaf, False or None to leave it."
    )


def rank_two(who: str, path: str, shape: Sequence[int]) -> None:
    """Refuses a kernel whose axes the shape cannot tell."""
    raise ValueError(
        f"{who}: {path} has shape {tuple(shape)}; only a 2-D kernel (in, out) tells its axes "
        "by its shape. Pass axes= (a function of path and leaf that returns "
        "{'contracting_axes': ..., 'batch_axes': ...}), or leave it out with "
        f"select=bj.exclude({path!r})."
    )


def axis_keywords(who: str, path: str, value: Any) -> None:
    """Refuses an answer of an axis function that names no axes."""
    known = {"contracting_axes", "batch_axes"}
    if not isinstance(value, Mapping) or not set(value) <= known:
        raise TypeError(
            f"{who}: `axes` returned {describe(value)} for {path}. Return a dict with "
            "'contracting_axes' and, for stacked kernels, 'batch_axes'; or None for a 2-D kernel."
        )


def axes_function(who: str, value: Any) -> None:
    """Refuses axes that are neither a function nor None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{who}: `axes` must be a function of path and leaf, got {describe(value)}. Write for "
            "example axes=lambda path, leaf: {'contracting_axes': (0, 1)}."
        )


def already_packed(who: str, path: str) -> None:
    """Refuses to quantise a leaf that is packed already."""
    raise TypeError(
        f"{who}: {path} is packed already. Pass float params, or bj.unpack_params(packed) first."
    )


def nothing_packed(who: str) -> None:
    """Reports a tree without packed leaves where some were expected."""
    raise ValueError(
        f"{who}: the tree holds no packed kernel. Pass what bj.pack_params returned first."
    )


def not_finite(who: str, path: str, count: int) -> None:
    """Reports weights that are not finite; ``count`` was read from the values."""
    raise ValueError(
        f"{who}: {path} has {count} NaN or Inf weights. Find the step that made them "
        "(bj.gradient_flow(grads) names leaves with bad gradients) and restore a checkpoint "
        "from before it."
    )
