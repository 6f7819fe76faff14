"""Arrays that are proportional to a vector of factors, one for each place along an axis.

Multiply a vector among the parameters by factors f, and an array that a norm scales with it is
multiplied by f along one axis. Operations that treat every place of that axis alike keep this
up; here is what each of them makes of the axis. Any other operation ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from bitnet_jax._transform.jaxprs import Eqn, shape_of

# Sums and choices of several arrays, each of which must have the factors.
JOINING = frozenset({"add", "sub", "add_any", "concatenate", "select_n"})


def axis_of_vector(shape: Sequence[int]) -> int | None:
    """The axis of a leaf that is a vector, (K,) or broadcast to more axes; None: it is none."""
    longer = [a for a, n in enumerate(shape) if n != 1]
    return longer[0] if len(longer) == 1 and shape[longer[0]] > 0 else None


def follow(eqn: Eqn, at: int, axis: int) -> list[int] | None:
    """The axis of the factors in each result, if operand ``at`` has them along ``axis``.

    None: the results do not have them. Of an operation in ``JOINING``, all arrays must have them.
    """
    name, found = eqn.primitive.name, None
    if name in _COMPUTING:
        found = _COMPUTING[name](eqn, at, axis)
    elif name in _MOVING and at == 0:
        found = _MOVING[name](eqn, axis)
    return None if found is None else [found] * len(eqn.outvars)


def met_axis(eqn: Eqn, at: int, axis: int) -> int | None:
    """The axis of the other operand of a product that is contracted with ``axis`` of one."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        ours, theirs = numbers[0] if at == 0 else numbers[0][::-1]
        return dict(zip(map(int, ours), map(int, theirs), strict=True)).get(axis)
    whole = eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1
    return numbers.rhs_spec[1] if at == 0 and whole and axis == numbers.lhs_spec[1] else None


def _same(eqn: Eqn, at: int, axis: int) -> int | None:
    """Elementwise, where the shorter operand has axes of length 1."""
    shape, made = (shape_of(v) for v in (eqn.invars[at], eqn.outvars[0]))
    return axis if len(shape) == len(made) and shape[axis] == made[axis] else None


def _convert(eqn: Eqn, axis: int) -> int | None:
    return axis if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None


def _divide(eqn: Eqn, at: int, axis: int) -> int | None:
    return _same(eqn, at, axis) if at == 0 else None


def _select(eqn: Eqn, at: int, axis: int) -> int | None:
    return _same(eqn, at, axis) if at > 0 else None


def _concatenate(eqn: Eqn, at: int, axis: int) -> int | None:
    del at
    return axis if eqn.params["dimension"] != axis else None


def _transpose(eqn: Eqn, axis: int) -> int | None:
    return tuple(eqn.params["permutation"]).index(axis)


def _squeeze(eqn: Eqn, axis: int) -> int | None:
    return axis - sum(a < axis for a in eqn.params["dimensions"])


def _broadcast(eqn: Eqn, axis: int) -> int | None:
    return int(eqn.params["broadcast_dimensions"][axis])


def _reshape(eqn: Eqn, axis: int) -> int | None:
    """Where the axis is, as long and with as many elements a step; None: it is split or merged."""
    if eqn.params["dimensions"] is not None:
        return None
    old, new = (shape_of(v) for v in (eqn.invars[0], eqn.outvars[0]))
    step, length = math.prod(old[axis + 1 :]), old[axis]
    places = (a for a, n in enumerate(new) if n == length and math.prod(new[a + 1 :]) == step)
    return next(places, None)


def _slice(eqn: Eqn, axis: int) -> int | None:
    strides = eqn.params["strides"]
    whole = _same(eqn, 0, axis) == axis and (strides is None or strides[axis] == 1)
    return axis if whole else None


def _dynamic_slice(eqn: Eqn, axis: int) -> int | None:
    return _same(eqn, 0, axis)


def _split(eqn: Eqn, axis: int) -> int | None:
    return axis if eqn.params["axis"] != axis else None


def _unstack(eqn: Eqn, axis: int) -> int | None:
    along = eqn.params["axis"]
    return None if along == axis else axis - (along < axis)


def _reverse(eqn: Eqn, axis: int) -> int | None:
    return axis if axis not in eqn.params["dimensions"] else None


def _reduce_sum(eqn: Eqn, axis: int) -> int | None:
    summed = eqn.params["axes"]
    return None if axis in summed else axis - sum(a < axis for a in summed)


def _gather(eqn: Eqn, axis: int) -> int | None:
    """Windows that have the whole of the axis."""
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    fill = eqn.params["fill_value"]  # of rows that are not there: NaN by default
    if axis in gone or eqn.params["slice_sizes"][axis] != shape[axis] or fill not in (None, 0):
        return None
    return numbers.offset_dims[[a for a in range(len(shape)) if a not in gone].index(axis)]


def _dot(eqn: Eqn, at: int, axis: int) -> int | None:
    """Along an axis that is not contracted."""
    contract, batch = eqn.params["dimension_numbers"]
    if axis in contract[at]:
        return None
    if axis in batch[at]:
        return list(batch[at]).index(axis)
    free = [
        [a for a in range(len(shape_of(v))) if a not in contract[i] and a not in batch[i]]
        for i, v in enumerate(eqn.invars)
    ]
    return len(batch[0]) + at * len(free[0]) + free[at].index(axis)


def _kept(eqn: Eqn, axis: int) -> int | None:
    return axis if len(eqn.invars) == 1 else None


# What gives its one operand back, rounded or placed elsewhere, or its negative.
_KEEPING = (
    *("neg", "stop_gradient", "name", "copy", "copy_p", "pvary", "pcast", "reduce_precision"),
    *("sharding_constraint", "reshard", "mesh_cast", "layout_constraint", "device_put"),
)

# What moves its first operand.
_MOVING: dict[str, Callable[[Eqn, int], int | None]] = {
    **dict.fromkeys(_KEEPING, _kept),
    "convert_element_type": _convert,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _reverse,
    "reduce_sum": _reduce_sum,
    "gather": _gather,
}

# What computes with several, of which one has the factors, or of ``JOINING`` all.
_COMPUTING: dict[str, Callable[[Eqn, int, int], int | None]] = {
    **dict.fromkeys(("add", "sub", "add_any", "mul"), _same),
    "div": _divide,
    "select_n": _select,
    "concatenate": _concatenate,
    "dot_general": _dot,
}
