"""Checks that several rooms share, one function for each rule.

``require_*`` returns or raises; ``raise_*`` always raises. An error says who
raises, which argument, the rule, what arrived, and the remedy. ``ValueError`` is
for a value or a shape, ``TypeError`` for a kind. Checks look at static data
(types, shapes, dtypes), so they cost nothing under ``jit``.

``who`` is the public function that the user called. A public function checks its
arguments where they come in, or has a function check them and return a value that
cannot be wrong (``kernel_spec``). Code behind that takes no ``who`` and raises nothing.
A check that only one public function uses is private in its module and names it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import NoReturn, SupportsIndex, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


def require_one_of(who: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises unless a value is one of a short list."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{who}: `{name}` must be one of {listed}, got {value!r}.{hint}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, of Python or NumPy, and not a truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def require_count(who: str, name: str, value: object) -> None:
    """Raises unless a value is an integer >= 1."""
    if not (is_integer(value) and value >= 1):
        raise ValueError(f"{who}: `{name}` must be an integer >= 1, got {value!r}.")


def require_positive(who: str, name: str, value: object) -> None:
    """Raises unless a value is a finite number above zero."""
    finite = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    if isinstance(value, bool) or not finite:
        raise ValueError(f"{who}: `{name}` must be a finite number > 0, got {value!r}.")


def require_epsilon(who: str, value: float | int, most: int = 1) -> None:
    """Raises unless float32 holds ``eps`` as a normal number and ``most / eps`` as a finite one."""
    require_positive(who, "eps", value)
    limits = np.finfo(np.float32)
    smallest, largest = max(float(limits.tiny), most / float(limits.max)), float(limits.max)
    if not smallest <= value <= largest or not np.isfinite(most / np.float32(value)):
        raise ValueError(
            f"{who}: `eps` must be a normal float32 with a finite {most} / eps, {smallest:.2e} "
            f"to {largest:.2e}, got {value!r}."
        )


def require_instance(
    who: str, name: str, value: object, kind: type | tuple[type, ...], remedy: str
) -> None:
    """Raises unless an argument is an instance of ``kind``."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise TypeError(f"{who}: `{name}` must be a {wanted}, got {describe(value)}. {remedy}")


def is_flax_module(value: object) -> bool:
    """Whether a value is a module of linen or NNX; by name, for NNX is slow to import."""
    bases = type(value).__mro__
    return any(b.__name__ == "Module" and b.__module__.startswith("flax.") for b in bases)


def require_float_array(who: str, name: str, value: object) -> None:
    """Raises unless a value is an array of a floating-point dtype."""
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


def require_static_strength(who: str, value: float) -> None:
    """Raises unless a Python number is from 0 to 1. Values of traced arrays cannot be read."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{who}: `strength` must be from 0 to 1, got {value!r}.")


def describe(value: object) -> str:
    """A value in an error: dtype and shape of an array, else type and value."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and shape is not None:
        return f"{dtype} of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 160 else f'{text[:157]}...'}"


def require_leaves(who: str, name: str, count: int) -> None:
    """Raises if a tree has no leaves."""
    if count == 0:
        raise ValueError(
            f"{who}: `{name}` holds no arrays. Pass the tree that model.init returned under "
            "'params'."
        )


def require_no_report(who: str, name: str, tree: object) -> None:
    """Raises for what packing and converting return: a tree and a report, not taken apart."""
    if type(tree) is tuple and len(tree) == 2 and _is_report(tree[1]):
        kind = type(tree[1]).__name__
        raise TypeError(
            f"{who}: `{name}` is a tree and a {kind}. Take apart what the call returned, "
            "tree, report = ..., and pass the tree."
        )


def _is_report(value: object) -> bool:
    return hasattr(value, "rows") and hasattr(value, "to_dict")


def raise_selector_matches_nothing(
    who: str, what: str, paths: Sequence[str], near_to: Sequence[str], remedy: str = ""
) -> NoReturn:
    """Reports a selector, or one pattern of it, that matched nothing."""
    near: list[str] = []
    for pattern in near_to:
        near += difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4)
        parts = {part: path for path in paths for part in path.split("/")}
        near += [parts[p] for p in difflib.get_close_matches(pattern, list(parts), n=3)]
    listed = list(dict.fromkeys(near)) or list(paths)
    shown = ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "")
    end = "" if shown.endswith("...") else "."
    raise ValueError(f"{who}: {what} matches nothing. Near paths: {shown}{end}{remedy}")


def require_selector(who: str, value: object) -> None:
    """Raises unless a selector is a function or None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{who}: `select` must be a function of path and leaf, got {describe(value)}. Build "
            "one with bj.only('name') or bj.exclude('name')."
        )


def raise_already_packed(who: str, path: str) -> NoReturn:
    """Reports a leaf that is packed already."""
    raise TypeError(
        f"{who}: {path} is packed already. Pass float params, or bj.unpack_params(packed) first."
    )


def raise_nothing_packed(who: str) -> NoReturn:
    """Reports a tree without packed leaves where some were expected."""
    raise ValueError(
        f"{who}: the tree holds no packed kernel. Pass what bj.pack_params returned first."
    )


def raise_not_finite(who: str, path: str, count: int) -> NoReturn:
    """Reports weights that are not finite; ``count`` was read from the values."""
    raise ValueError(
        f"{who}: {path} has {count} NaN or Inf weights. Find the step that made them "
        "(bj.analysis.gradient_flow(grads) names leaves with bad gradients) and restore a "
        "checkpoint from before it."
    )


def require_unset(who: str, name: str, value: object, default: object) -> None:
    """Raises if a field of a float layer is set that the int8 product replaces."""
    if value is not default:
        raise ValueError(
            f"{who}: `{name}` cannot be used, got {value!r}: the contraction is int8 x int8 -> "
            f"int32 by this library. Leave it out, or use the float layer."
        )


def raise_no_ternary_layer(who: str, name: str) -> NoReturn:
    """Reports a model without a single ternary layer."""
    raise ValueError(
        f"{who}: {name} uses no kernel as ternary. Pass bj.linen.ternarize(model) (nnx: call "
        "bj.nnx.ternarize(model) first), or write it with BitDense and its kin."
    )


def require_param_shape(who: str, path: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises unless a parameter has the shape that the model makes."""
    if tuple(got) != tuple(wanted):
        raise ValueError(
            f"{who}: {path} has shape {tuple(got)}, and the model makes it {tuple(wanted)} (a "
            "scan's length is its first axis). Pass the params of this model."
        )


def raise_used_two_ways(who: str, path: str, how: str) -> NoReturn:
    """Reports a kernel that a model uses in two ways: no packed form serves both."""
    raise ValueError(
        f"{who}: the kernel at {path} is used {how}. Give each use a kernel of its own, or leave "
        "it in float (select=)."
    )


def require_kernel(who: str, w: object, name: str = "w") -> None:
    """Raises unless a value is a floating-point array of rank 2 or more with elements."""
    require_float_array(who, name, w)
    shape = tuple(getattr(w, "shape", ()))
    if len(shape) < 2:
        raise ValueError(
            f"{who}: `{name}` needs at least 2 axes, got shape {shape}. Pass a kernel (in, out)."
        )
    if 0 in shape:
        raise ValueError(
            f"{who}: `{name}` has no elements, got shape {shape}. Every axis of a kernel needs at "
            "least one."
        )


def normalize_axes(
    who: str, name: str, axes: SupportsIndex | Iterable[SupportsIndex], ndim: int
) -> tuple[int, ...]:
    """Axes as non-negative and ascending; raises for axes out of range and for repeats."""
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


def require_contraction(
    who: str, x_shape: Sequence[int], wanted: Sequence[int], batch: Sequence[int]
) -> None:
    """Raises unless x ends with the kernel's contraction and starts with its batch axes."""
    tail = tuple(x_shape[len(x_shape) - len(wanted) :])
    head = tuple(x_shape[: len(batch)])
    if len(x_shape) < len(wanted) + len(batch) or tail != tuple(wanted) or head != tuple(batch):
        lead = f" and start with the kernel's batch axes {tuple(batch)}" if batch else ""
        raise ValueError(
            f"{who}: `x` must end with the kernel's contraction {tuple(wanted)}{lead}, got "
            f"shape {tuple(x_shape)}. Check the layer's input features, or transpose x."
        )


def require_embedding_lookup(who: str, index: object, shape: Sequence[int]) -> None:
    """Raises unless a table has two axes and the index is of integers."""
    if len(shape) != 2:
        raise ValueError(
            f"{who}: only an embedding (vocabulary, features) has rows, got shape {tuple(shape)}."
        )
    require_values(who, "`index`", index)
    if not jnp.issubdtype(getattr(index, "dtype", type(index)), jnp.integer):
        raise TypeError(f"{who}: `index` must be of integers, got {describe(index)}.")


def require_values(who: str, path: str, value: object) -> None:
    """Raises for a ``jax.ShapeDtypeStruct`` where values are read."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{who}: {path} is a jax.ShapeDtypeStruct, which has a shape and no values. Pass "
            "arrays. For the shapes of a packed tree, jax.eval_shape(lambda p: "
            "bj.pack_params(p)[0], params)."
        )


def raise_prepared(who: str, path: str, implementation: str) -> NoReturn:
    """Reports a prepared kernel where a stored one is needed."""
    raise TypeError(
        f"{who}: {path} is prepared for implementation {implementation!r}, a layout that only "
        "that kernel reads. Pass the stored tree that bj.pack_params or bj.io.load returned."
    )
