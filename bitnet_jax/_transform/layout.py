"""Operations that only move a kernel: what each makes of a view, and of the value behind it.

A rule gives one :class:`Step` for each result of its equation, or None where the operation
computes something: then the kernel is float from there on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from bitnet_jax._layers.stated import STATED
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import Packed, is_packed
from bitnet_jax._transform.jaxprs import Eqn
from bitnet_jax._transform.probe import Probed
from bitnet_jax._transform.view import View

# A kernel as it is stored: a float array, a packed kernel, or one with an adapter.
Value = jax.Array | Packed | Adapted

# The same, or a float array whose inputs are counted.
Carried = Value | Probed

Change = Callable[[Any, list[Any]], Any]


# The operands of an equation to the first index of its window along each axis.
Starts = Callable[[list[Any]], Sequence[ArrayLike]]


class Step(NamedTuple):
    """What becomes of a kernel in one equation.

    Attributes:
      view: how the result is seen.
      change: (value, operands) -> the value behind the result; None: the same.
    """

    view: View
    change: Change | None = None


def follow(eqn: Eqn, at: int, view: View) -> list[Step] | None:
    """The results of an equation whose operand ``at`` is a kernel; None: it computes."""
    name = eqn.primitive.name
    if name in _ELEMENTWISE or name in _PLACING:
        return _identity(eqn, at, view)
    rule = _RULES.get(name)
    return rule(eqn, view) if rule is not None and at == 0 else None


# Identities whatever the layout: they act on the value as it is stored.
_ELEMENTWISE = frozenset({"stop_gradient", "name", "copy", "copy_p", "pvary", "pcast"})

# Identities that name axes: they act on the value where it has those axes, else they are hints
# that the kernel's codes, which are what travels, have no use for.
_PLACING = frozenset(
    {"sharding_constraint", "reshard", "mesh_cast", "layout_constraint", "device_put"}
)


def _identity(eqn: Eqn, at: int, view: View) -> list[Step] | None:
    if len(eqn.invars) != 1 or at:
        return None
    if eqn.primitive.name in _PLACING and not view.is_plain:
        return [Step(view)]

    def change(value: Carried, operands: list[Any]) -> Any:
        if isinstance(value, Probed):
            return value._replace(kernel=change(value.kernel, operands))
        if not isinstance(value, jax.Array):
            return value
        params = eqn.primitive.get_bind_params(eqn.params)
        done = eqn.primitive.bind(value, **params)
        return done[0] if eqn.primitive.multiple_results else done

    return [Step(view, change)]


def _stated(eqn: Eqn, view: View) -> list[Step] | None:
    return [Step(view._replace(stated=eqn.params["config"]))]


def _convert(eqn: Eqn, view: View) -> list[Step] | None:
    dtype = eqn.params["new_dtype"]
    return [Step(view.cast(dtype))] if jnp.issubdtype(dtype, jnp.floating) else None


def _transpose(eqn: Eqn, view: View) -> list[Step] | None:
    return [Step(view.transpose(eqn.params["permutation"]))]


def _squeeze(eqn: Eqn, view: View) -> list[Step] | None:
    return [Step(view.squeeze(eqn.params["dimensions"]))]


def _reshape(eqn: Eqn, view: View) -> list[Step] | None:
    if eqn.params["dimensions"] is not None:
        view = view.transpose(eqn.params["dimensions"])
    seen = view.reshape(eqn.params["new_sizes"])
    return None if seen is None else [Step(seen)]


def _broadcast(eqn: Eqn, view: View) -> list[Step] | None:
    axes = tuple(int(a) for a in eqn.params["broadcast_dimensions"])
    return [Step(view.broadcast(eqn.params["shape"], axes))]


def _slice(eqn: Eqn, view: View) -> list[Step] | None:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    if any(n != 1 for n in eqn.params["strides"] or ()):
        return None
    sizes = [b - a for a, b in zip(starts, limits, strict=True)]
    return _window(view, sizes, lambda _: starts)


def _dynamic_slice(eqn: Eqn, view: View) -> list[Step] | None:
    # An index that is still negative here is clamped, not counted from the end.
    return _window(
        view, eqn.params["slice_sizes"], lambda operands: [jnp.maximum(i, 0) for i in operands[1:]]
    )


def _window(
    view: View, sizes: Sequence[int], starts: Callable[[list[Any]], Any]
) -> list[Step] | None:
    """A window of a kernel: single slices are taken off its axes, or parts of them."""
    changes: list[Change] = []
    for at, (size, full) in enumerate(zip(sizes, view.shape, strict=True)):
        if size == full:
            continue
        before = view
        seen = before.take(at) if size == 1 else before.narrow(at, size)
        if seen is None:
            return None
        view = seen
        own = before.whole(at)
        assert own is not None  # or there was no view to see
        changes.append(_cut(before.position(own), at, size, starts))
    return [Step(view, _composed(changes))]


def _cut(position: int, at: int, size: int, starts: Starts) -> Change:
    def change(value: Carried, operands: list[Any]) -> Any:
        start = starts(operands)[at]
        return taken(value, position, start) if size == 1 else part(value, position, start, size)

    return change


def _composed(changes: list[Change]) -> Change | None:
    if not changes:
        return None

    def change(value: Carried, operands: list[Any]) -> Any:
        for one in changes:
            value = one(value, operands)
        return value

    return change


def _split(eqn: Eqn, view: View) -> list[Step] | None:
    axis, start, steps = eqn.params["axis"], 0, []
    for size in map(int, eqn.params["sizes"]):
        sizes = [size if a == axis else n for a, n in enumerate(view.shape)]
        starts = [start if a == axis else 0 for a in range(view.ndim)]
        one = _window(view, sizes, lambda _, starts=starts: starts)
        if one is None:
            return None
        steps += one
        start += size
    return steps


def _unstack(eqn: Eqn, view: View) -> list[Step] | None:
    axis, steps = eqn.params["axis"], []
    for i in range(view.shape[axis]):
        sizes = [1 if a == axis else n for a, n in enumerate(view.shape)]
        starts = [i if a == axis else 0 for a in range(view.ndim)]
        one = _window(view, sizes, lambda _, starts=starts: starts)
        if one is None:
            return None
        steps.append(one[0]._replace(view=one[0].view.squeeze((axis,))))
    return steps


_RULES: dict[str, Callable[[Eqn, View], list[Step] | None]] = {
    STATED: _stated,
    "convert_element_type": _convert,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
}


def taken(value: Carried, position: int, index: ArrayLike) -> Any:
    """One slice of a kernel along one of its axes: of the array, or of all that is packed."""
    if position == 0 and is_stack(value):
        return value[index if isinstance(index, int) else jnp.minimum(index, value.shape[0] - 1)]
    if isinstance(index, int):
        return jax.tree.map(lambda a: lax.index_in_dim(a, index, position, keepdims=False), value)
    one = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
    return jax.tree.map(lambda a: one(a, index, position), value)


def part(value: Carried, position: int, start: ArrayLike, size: int) -> Any:
    """A run of slices of a kernel along one of its axes."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, position), value)


def leading(value: Carried, position: int) -> Any:
    """A kernel with one of its axes first, as ``scan`` and ``vmap`` slice it."""
    if position == 0:  # outside of a trace, moving an axis to where it is copies the array
        return value
    return jax.tree.map(lambda a: jnp.moveaxis(a, position, 0), value)


def is_stack(value: object) -> TypeGuard[Packed | Adapted]:
    """Whether a kernel is packed and has batch axes, which lead."""
    base = value.base if isinstance(value, Adapted) else value
    return is_packed(base) and len(base.axes.batch) > 0


def is_float(value: object) -> TypeGuard[jax.Array]:
    """Whether a value is an array, and not a packed or a probed kernel."""
    return not (is_packed(value) or isinstance(value, Adapted | Probed))
