"""One kernel and what meets it: axes, shapes, implementations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax._checks._values import describe, float_array, one_of


def kernel(who: str, w: Any, name: str = "w") -> None:
    """Refuses what cannot be a kernel: not floating point, rank below 2, no elements."""
    float_array(who, name, w)
    if w.ndim < 2:
        raise ValueError(
            f"{who}: `{name}` needs at least 2 axes, got shape {tuple(w.shape)}. "
            "Pass a kernel (in, out)."
        )
    if w.size == 0:
        raise ValueError(
            f"{who}: `{name}` has no elements, got shape {tuple(w.shape)}. Every axis of a "
            "kernel needs at least one."
        )


def axes_in_range(who: str, name: str, axes: Any, ndim: int) -> tuple[int, ...]:
    """Normalises axes to non-negative and ascending; refuses strangers and repeats."""
    given = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    for axis in given:
        if not isinstance(axis, (int, np.integer)) or not -ndim <= axis < ndim:
            raise ValueError(
                f"{who}: `{name}` must name axes of a rank-{ndim} array "
                f"({-ndim} to {ndim - 1}), got {axes!r}."
            )
    normal = tuple(sorted(int(axis) % ndim for axis in given))
    if len(set(normal)) != len(normal):
        raise ValueError(f"{who}: `{name}` names an axis twice: {axes!r}.")
    return normal


def axes_disjoint(who: str, contracting: Sequence[int], batch: Sequence[int]) -> None:
    """Refuses an axis that is both contracted and a batch axis."""
    both = sorted(set(contracting) & set(batch))
    if both:
        raise ValueError(
            f"{who}: axes {both} are in `contracting_axes` and in `batch_axes`. "
            "An axis is contracted or carries slices, not both."
        )
    if not contracting:
        raise ValueError(f"{who}: `contracting_axes` is empty. Name the axes that x meets.")


def axes_known(who: str, w: Any, batch_count: int) -> None:
    """Refuses to guess which axes of a kernel of rank 3 or more are contracted."""
    if w.ndim - batch_count != 2:
        raise ValueError(
            f"{who}: a kernel of shape {tuple(w.shape)} does not tell which axes are "
            "contracted (it may be a convolution, an attention or a stacked kernel). "
            "Pass contracting_axes=, and batch_axes= for stacked layers or experts."
        )


def batch_leads(who: str, batch: Sequence[int]) -> None:
    """Refuses to pack a kernel whose stacked axes are not its first."""
    if tuple(batch) != tuple(range(len(batch))):
        raise ValueError(
            f"{who}: `batch_axes` must be the leading axes of a kernel to pack, got "
            f"{tuple(batch)}. Move them to the front (jnp.moveaxis), as nn.scan with "
            "variable_axes={'params': 0} stores them."
        )


def group_divides(who: str, group: int, contraction: Sequence[int]) -> None:
    """Reports a group size that does not tile the contraction."""
    raise ValueError(
        f"{who}: `granularity`={group} does not divide the contraction "
        f"{tuple(contraction)}. Pass a group size that divides its last axis, or a multiple "
        "of that axis that divides the whole."
    )


def contraction(who: str, x_shape: Sequence[int], wanted: Sequence[int], batch: Sequence[int]):
    """Refuses activations whose axes do not meet the kernel's."""
    tail = tuple(x_shape[len(x_shape) - len(wanted) :])
    head = tuple(x_shape[: len(batch)])
    if len(x_shape) < len(wanted) + len(batch) or tail != tuple(wanted) or head != tuple(batch):
        lead = f" and start with the kernel's batch axes {tuple(batch)}" if batch else ""
        raise ValueError(
            f"{who}: `x` must end with the kernel's contraction {tuple(wanted)}{lead}, got "
            f"shape {tuple(x_shape)}. Check the layer's input features, or transpose x."
        )


def embedding(who: str, index: Any, shape: Sequence[int]) -> None:
    """Refuses a look-up by anything but integers, or in what is no table of rows."""
    if len(shape) != 2:
        raise ValueError(
            f"{who}: only an embedding (vocabulary, features) has rows, got shape {tuple(shape)}."
        )
    if not jnp.issubdtype(getattr(index, "dtype", type(index)), jnp.integer):
        raise TypeError(f"{who}: `index` must be of integers, got {describe(index)}.")


def int32_holds(who: str, length: int) -> None:
    """Refuses an int8 kernel whose integer sums could leave int32."""
    most = (2**31 - 1) // (127 * 127)
    if length > most:
        raise ValueError(
            f"{who}: an int8 kernel may contract over {most} weights, got {length}; more could "
            "overflow the int32 sums. Use a TernaryConfig, or leave this kernel in float."
        )


def implementation_known(who: str, name: Any, table: Iterable[str]) -> None:
    """Refuses an implementation that no one has written."""
    one_of(who, "implementation", name, (None, *table))


def implementation_agrees(who: str, asked: str | None, prepared: str) -> None:
    """Refuses to run a prepared kernel by another implementation than its own."""
    if asked is not None and asked != prepared:
        raise ValueError(
            f"{who}: this kernel was prepared for implementation {prepared!r}, and "
            f"{asked!r} was asked for. Keep the stored tree and prepare() it for {asked!r}."
        )


def whole_kernel(who: str, where: str, implementation: str | None) -> None:
    """Refuses to lay out, by name, a kernel that lies in shards."""
    if implementation is not None:
        raise NotImplementedError(
            f"{who}: {where} lies in shards, and a layout has no axis to be sharded along. Call "
            f"{who} inside jax.shard_map, on each shard, or leave the kernel stored "
            "(implementation=None): bj.matmul runs each shard from there."
        )


def stored_layout(who: str, path: str, implementation: str) -> None:
    """Refuses a prepared leaf where the stored layout is needed."""
    raise TypeError(
        f"{who}: {path} is prepared for implementation {implementation!r}, a layout that only "
        "that kernel reads. Pass the stored tree that bj.pack_params or bj.io.load returned."
    )
