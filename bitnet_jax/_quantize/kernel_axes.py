"""Which axes of a kernel are contracted, which carry slices, which are outputs.

All maths in this package runs on one canonical form, ``(*batch, K, N)``: the
contraction flattened on axis -2, the outputs flattened on axis -1, one slice
for each batch index. A Flax ``Dense`` kernel ``(in, out)`` is in that form
already, and nothing is moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from bitnet_jax import _checks
from bitnet_jax._quantize.arrays import AnyArray, Scale

AxesLike = int | np.integer | Sequence[int | np.integer]

T = TypeVar("T")


class KernelAxes(NamedTuple):
    """The axes of one kernel, non-negative and ascending."""

    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that brings a kernel to (batch, contraction, outputs)."""
        return self.batch + self.contracting + self.outputs

    def split(self, shape: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
        """Sorts one value per axis, lengths or shardings, into batch, contracting, output axes."""
        b, c, o = (
            tuple(shape[a] for a in axes) for axes in (self.batch, self.contracting, self.outputs)
        )
        return b, c, o


def with_planes(axes: KernelAxes) -> KernelAxes:
    """The axes of codes that have an axis of planes right before the first contracting one.

    Planes are the last of the batch axes: a canonical kernel of planes is (*batch, planes, K, N).
    """
    at = axes.contracting[0]
    contracting, batch, outputs = (
        tuple(axis + (axis >= at) for axis in part)
        for part in (axes.contracting, axes.batch, axes.outputs)
    )
    return KernelAxes(contracting, (*batch, at), outputs)


def resolve(
    who: str,
    w: AnyArray | jax.ShapeDtypeStruct,
    contracting_axes: AxesLike | None,
    batch_axes: AxesLike,
) -> KernelAxes:
    """Names every axis of ``w``; a 2-D kernel (in, out) needs no help."""
    batch = _checks.normalize_axes(who, "batch_axes", batch_axes, w.ndim)
    rest = [axis for axis in range(w.ndim) if axis not in batch]  # contracted, or outputs
    if contracting_axes is None:
        # (in, out) beside the batch axes: the first of the two meets x.
        _require_known_axes(who, w.shape, len(batch))
        contracting = (rest[0],)
    else:
        contracting = _checks.normalize_axes(who, "contracting_axes", contracting_axes, w.ndim)
    _require_disjoint_axes(who, contracting, batch)
    outputs = tuple(axis for axis in rest if axis not in contracting)
    return KernelAxes(contracting, batch, outputs)


def to_canonical(w: Shaped[AnyArray, "..."], axes: KernelAxes) -> Shaped[AnyArray, "*b k n"]:
    """Brings a kernel to ``(*batch, K, N)``."""
    batch, contraction, outputs = axes.split(w.shape)
    # Batch first, then what meets x, then outputs; each of the last two flattened in C order.
    return w.transpose(axes.order).reshape(*batch, math.prod(contraction), math.prod(outputs))


def from_canonical(
    c: Shaped[AnyArray, "*b k n"],
    axes: KernelAxes,
    contraction: Sequence[int],
    outputs: Sequence[int],
) -> Shaped[AnyArray, "..."]:
    """Undoes :func:`to_canonical`, for an array with these lengths of the two parts."""
    # First the flattened axes apart, in the order of `order`; then each back to its place.
    lead = c.shape[:-2]
    inverse = sorted(range(len(axes.order)), key=axes.order.__getitem__)
    return c.reshape(*lead, *contraction, *outputs).transpose(inverse)


def group_grid(contraction: Sequence[int], group: int) -> tuple[int, ...] | None:
    """How many groups of ``group`` adjacent weights lie along each contracting axis.

    None where groups do not tile the contraction: a group is a run along the last
    axis, or whole last axes times a run along the one before.
    """
    # From the last axis backwards: `left` is how much of a group is still to be covered.
    grid, left = [], group
    for length in reversed(contraction):
        if length and left % length == 0:  # this axis lies inside one group
            grid.append(1)
            left //= length
        elif length % left == 0:  # groups start and end along this axis
            grid.append(length // left)
            left = 1
        else:
            return None
    return tuple(reversed(grid)) if left == 1 else None


def broadcast_scale(scale: Scale, shape: tuple[int, ...]) -> Scale:
    """Repeats each group's scale over the codes it belongs to; ones broadcast."""
    for axis, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have not in (1, want):  # groups along this axis, want // have codes each
            scale = jnp.repeat(scale, want // have, axis=axis)
    return scale


def require_whole_groups(who: str, name: str, group: object, contraction: tuple[int, ...]) -> None:
    """Raises where a group size does not tile the contraction; no int: no groups."""
    if isinstance(group, int) and group_grid(contraction, group) is None:
        raise ValueError(
            f"{who}: `{name}`={group} does not divide the contraction {contraction}. Pass a "
            "group size that divides its last axis, or a multiple of that axis that divides the "
            "whole."
        )


def _require_disjoint_axes(who: str, contracting: Sequence[int], batch: Sequence[int]) -> None:
    """Raises where an axis is both contracted and a batch axis, or none is contracted."""
    both = sorted(set(contracting) & set(batch))
    if both:
        raise ValueError(
            f"{who}: axes {both} are in `contracting_axes` and in `batch_axes`. "
            "An axis is contracted or carries slices, not both."
        )
    if not contracting:
        raise ValueError(f"{who}: `contracting_axes` is empty. Name the axes that x meets.")


def _require_known_axes(who: str, shape: Sequence[int], batch_count: int) -> None:
    """Raises unless the kernel is 2-D beside its batch axes, so that its axes are known."""
    if len(shape) - batch_count != 2:
        raise ValueError(
            f"{who}: a kernel of shape {tuple(shape)} does not tell which axes are "
            "contracted (it may be a convolution, an attention or a stacked kernel). "
            "Pass contracting_axes=, and batch_axes= for stacked layers or experts."
        )
