"""Every error a user can meet, one function for each rule.

An error says who refused, which argument, the rule, what arrived, and the
remedy. ``ValueError`` is for a value or a shape, ``TypeError`` for a kind.
All checks look at static data (types, shapes, dtypes) unless their name says
``values``, so they cost nothing under ``jit``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
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


def epsilon(who: str, value: Any) -> None:
    """Refuses an eps that float32 cannot hold as a normal number."""
    positive(who, "eps", value)
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if not smallest <= value <= largest:
        raise ValueError(
            f"{who}: `eps` must be a normal float32, {smallest:.2e} to {largest:.2e}, got "
            f"{value!r}."
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
        raise TypeError(f"{who}: `{name}` must be a {wanted}, got {_describe(value)}. {remedy}")


def float_array(who: str, name: str, value: Any) -> None:
    """Refuses integer, boolean and complex arrays, and what is no array."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "shape", None) is None:
        raise TypeError(
            f"{who}: `{name}` must be a floating-point array, got {_describe(value)}. "
            "Pass a jax.Array or a numpy.ndarray."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{who}: `{name}` must be floating point (float32, bfloat16, float16), got "
            f"{_describe(value)}. Cast it, or leave it out of the selection."
        )


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


def static_strength(who: str, value: float) -> None:
    """Refuses a Python strength outside [0, 1]; a traced one cannot be looked at."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{who}: `strength` must be from 0 to 1, got {value!r}.")


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


def not_trainable(who: str) -> None:
    """Raised when a packed kernel is given to ``jax.grad`` or to an optimizer."""
    raise TypeError(
        f"{who}: `params` holds packed kernels (PackedTernary), and two-bit codes have no "
        "gradient. To train the float leaves around them, split the tree: `trainable, frozen "
        "= bj.partition(params)`, differentiate `lambda t: loss(bj.combine(t, frozen))` and "
        "give the optimizer `trainable` alone (nnx: wrt=bj.nnx.trainable). To train the "
        "kernels themselves, train float params and pack them afterwards, or start from "
        "bj.unpack_params(params)."
    )


def not_finite(who: str, path: str, count: int) -> None:
    """Reports weights that are not finite; ``count`` was read from the values."""
    raise ValueError(
        f"{who}: {path} has {count} NaN or Inf weights. Find the step that made them "
        "(bj.gradient_flow(grads) names leaves with bad gradients) and restore a checkpoint "
        "from before it."
    )


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
    """Reports a selector that cannot be called."""
    raise TypeError(
        f"{who}: `select` must be a function of path and leaf, got {_describe(value)}. Build one "
        "with bj.only('name') or bj.exclude('name')."
    )


def selection_value(who: str, path: str, value: Any) -> None:
    """Reports a selector that returned something that is no decision."""
    raise TypeError(
        f"{who}: `select` returned {_describe(value)} for {path}. Return True or a "
        "TernaryConfig to quantise the leaf, False or None to leave it."
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
            f"{who}: `axes` returned {_describe(value)} for {path}. Return a dict with "
            "'contracting_axes' and, for stacked kernels, 'batch_axes'; or None for a 2-D kernel."
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


def stored_layout(who: str, path: str, implementation: str) -> None:
    """Refuses a prepared leaf where the stored layout is needed."""
    raise TypeError(
        f"{who}: {path} is prepared for implementation {implementation!r}, a layout that only "
        "that kernel reads. Pass the stored tree that bj.pack_params or bj.io.load returned."
    )


def layer_config(who: str, path: str, trained: Any, packed: Any) -> None:
    """Refuses a packed kernel quantised by another rule than its layer trains with."""
    if trained != packed:
        raise ValueError(
            f"{who}: the kernel at {path} was packed with {packed}, and the layer trains with "
            f"{trained}: its outputs would not be the ones trained. Pack with the layer's own "
            "config, or set weights= to the packed one."
        )


def layer_shape(who: str, path: str, wanted: Sequence[int], packed: Sequence[int]) -> None:
    """Refuses a packed kernel of another shape than its layer's."""
    if tuple(wanted) != tuple(packed):
        raise ValueError(
            f"{who}: the packed kernel at {path} stands for shape {tuple(packed)}, and the layer "
            f"needs {tuple(wanted)}. Check that the params belong to this model."
        )


def unsupported_field(who: str, name: str, value: Any, default: Any) -> None:
    """Refuses a Dense field that a ternary contraction has no use for."""
    if value is not default:
        raise ValueError(
            f"{who}: `{name}` cannot be used, got {value!r}: the contraction is int8 x int8 -> "
            f"int32 by this library. Leave it out, or use the float layer."
        )


def _describe(value: Any) -> str:
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and shape is not None:
        return f"{dtype} of shape {tuple(shape)}"
    return f"{type(value).__name__} {value!r}"
