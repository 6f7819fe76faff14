"""Operations with a native form on CPUs: which form runs is decided when a program is lowered.

``jax.default_backend()`` says where this process computes, and not what a program is
lowered for: it may be traced on a CPU and exported for a TPU. So an operation is one
primitive, and its lowering rule takes the native form for a CPU and plain JAX for any
other platform. An exported program is plain JAX on every platform: whoever loads it may
not have the native library.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation on arrays (B, ...) that gives some (B, ...), slice by slice.

    Attributes:
      native: for CPUs. It returns a tuple, or an array where there is one result.
      plain: in plain JAX, for everything else; None: the operation was asked for by name,
        and runs on a CPU or raises.
      results: shape and dtype of each result, from the operands; as many axes as the first
        operand has.
      rows: how many of the first operands have, like each result, rows on axis 1 that do not
        know of each other.
      mapped: in plain JAX, where ``jax.vmap`` maps what has no rows; None: mapped slices are
        more slices.
      partitioned: whether XLA knows how to cut the native form over devices. If not, plain JAX
        runs wherever there are several, but in a ``shard_map`` over all of them.
    """

    native: Callable[..., Any]
    plain: Callable[..., Any] | None
    results: Callable[..., tuple[jax.ShapeDtypeStruct, ...]]
    rows: int = 0
    mapped: Callable[..., Any] | None = None
    partitioned: bool = False


# Traced once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=0)
def run(operation: Operation, *operands: Any) -> tuple[jax.Array, ...]:
    """The results of an operation; JAX may map it, shard it and lower it for any platform."""
    return _bound(operation, *operands)


@functools.partial(jax.jit, static_argnums=0)
def _run_again(operation: Operation, *operands: Any) -> tuple[jax.Array, ...]:
    """:func:`run`, from inside of it, where JAX takes a second call for one without end."""
    return _bound(operation, *operands)


def _bound(operation: Operation, *operands: Any) -> tuple[jax.Array, ...]:
    # JAX looks into the parameters of a primitive for what only lowers where devices are known.
    native = jax.make_jaxpr(operation.native)(*operands)
    return tuple(_primitive.bind(*operands, operation=operation, native=native))


def _eager(*operands: Any, operation: Operation, native: core.ClosedJaxpr) -> tuple[jax.Array, ...]:
    """Under jax.disable_jit(), and where jax.debug_nans() looks into a program that gave a NaN."""
    del native
    # There is nothing to run but a compiled program, and no need to look into it again.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        results = _run_again(operation, *operands)
    for result in results:
        _refuse_invalid(result)
    return results


def _refuse_invalid(result: jax.Array) -> None:
    """Raises as JAX does after each operation under jax.debug_nans() and jax.debug_infs()."""
    flags: Any = jax.config  # its flags are made at run time
    for refused, kind, is_one in (
        (flags.jax_debug_nans, "nan", np.isnan),
        (flags.jax_debug_infs, "inf", np.isinf),
    ):
        if refused and any(is_one(np.asarray(s.data)).any() for s in result.addressable_shards):
            raise FloatingPointError(f"invalid value ({kind}) encountered in {_primitive.name}")


def _results(first: Any, *rest: Any, operation: Operation, native: core.ClosedJaxpr) -> list[Any]:
    del native
    # Of the first operand stays where it is: its mesh, and the axes over which it varies.
    return [
        first.update(shape=result.shape, dtype=result.dtype, weak_type=False)
        for result in operation.results(first, *rest)
    ]


def _lower(
    context: Any, *values: Any, operation: Operation, native: core.ClosedJaxpr
) -> Sequence[Any]:
    module = context.module_context
    platforms = tuple(context.platforms or module.platforms)
    if operation.plain is None:
        _require_cpu(platforms)
    elif (
        platforms != ("cpu",)
        or module.lowering_parameters.for_export
        or not (operation.partitioned or _on_one_device(module.axis_context))
    ):
        return mlir.lower_fun(_as_tuple(operation.plain), multiple_results=True)(context, *values)
    form = core.jaxpr_as_fun(native)
    return mlir.lower_fun(form, multiple_results=True)(context, *values)


def _on_one_device(axes: Any) -> bool:
    """Whether a program is for one device, or each of its devices has a program of its own."""
    if hasattr(axes, "num_devices"):
        return axes.num_devices == 1
    mesh = getattr(axes, "mesh", None)
    return mesh is not None and axes.manual_axes == frozenset(mesh.axis_names)


def _as_tuple(function: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    def results(*operands: Any) -> tuple[jax.Array, ...]:
        found = function(*operands)
        return found if isinstance(found, tuple) else (found,)

    return results


def _batched(
    operands: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    operation: Operation,
    native: core.ClosedJaxpr,
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    """Mapped rows are more rows, and mapped slices are more slices: one operation."""
    del native
    rows = operation.rows
    merges = rows > 0 and all(axis is None for axis in axes[rows:])
    if operation.mapped is not None and not merges:
        results = jax.vmap(_as_tuple(operation.mapped), tuple(axes))(*operands)
        return results, (0,) * len(results)
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
    count = rows if merges else len(operands)
    leading = [_leading(a, axis, size) for a, axis in zip(operands[:count], axes, strict=False)]
    if merges:
        # (size, B, M, ...) -> (B, size * M, ...), and back.
        shape = leading[0].shape[:3]
        results = run(operation, *map(_merged_rows, leading), *operands[count:])
        split = [y.reshape(shape[1], size, shape[2], *y.shape[2:]) for y in results]
        return split, (1,) * len(split)
    # (size, B, ...) -> (size * B, ...), and back.
    results = run(operation, *(a.reshape(math.prod(a.shape[:2]), *a.shape[2:]) for a in leading))
    split = [y.reshape(*leading[0].shape[:2], *y.shape[1:]) for y in results]
    return split, (0,) * len(split)


def _leading(a: jax.Array, axis: int | None, size: int) -> jax.Array:
    """An operand with the mapped axis first."""
    return jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)


def _merged_rows(a: jax.Array) -> jax.Array:
    size, slices, rows = a.shape[:3]
    return a.swapaxes(0, 1).reshape(slices, size * rows, *a.shape[3:])


def _differentiated(
    primals: Sequence[jax.Array],
    tangents: Sequence[jax.Array],
    *,
    operation: Operation,
    native: core.ClosedJaxpr,
) -> tuple[Sequence[jax.Array], Sequence[jax.Array]]:
    """As plain JAX is differentiated."""
    del native
    if operation.plain is None:
        raise NotImplementedError("matmul: implementation 'cpu' has no gradient of its own.")
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(_as_tuple(operation.plain), tuple(primals), tuple(tangents))


def _require_cpu(platforms: Sequence[str]) -> None:
    """Raises unless a program is lowered for a CPU alone."""
    if tuple(platforms) != ("cpu",):
        raise NotImplementedError(
            "matmul: implementation 'cpu' runs on a CPU, and this program is lowered for "
            f"{', '.join(platforms)}. Use implementation=None, which runs on every platform."
        )


_primitive = core.Primitive("bitnet_native")
_primitive.multiple_results = True
_primitive.def_impl(_eager)
_primitive.def_abstract_eval(_results)
batching.primitive_batchers[_primitive] = _batched
ad.primitive_jvps[_primitive] = _differentiated
mlir.register_lowering(_primitive, _lower)
