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
from jax.extend import core
from jax.interpreters import batching, mlir

from bitnet_jax._quantize.arrays import DTypeLike


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An operation on arrays (B, ...) that gives one (B, ...), slice by slice.

    Attributes:
      native: for CPUs.
      plain: in plain JAX, for everything else; None: the operation was asked for by name,
        and runs on a CPU or raises.
      shape: the result's, from the operands'; as many axes as the first operand has.
      dtype: the result's.
      mapped: in plain JAX, where ``jax.vmap`` maps other operands than the first; None: mapped
        slices are more slices.
      merges_rows: whether axis 1 of the first operand and of the result are rows that do not
        know of each other.
    """

    native: Callable[..., jax.Array]
    plain: Callable[..., jax.Array] | None
    shape: Callable[..., tuple[int, ...]]
    dtype: DTypeLike
    merges_rows: bool
    mapped: Callable[..., jax.Array] | None = None


# Traced once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=0)
def run(operation: Operation, *operands: jax.Array) -> jax.Array:
    """The result of an operation; JAX may map it, shard it and lower it for any platform."""
    # JAX looks into the parameters of a primitive for what only lowers where devices are known.
    native = jax.make_jaxpr(operation.native)(*operands)
    return _primitive.bind(*operands, operation=operation, native=native)


def _eager(*operands: jax.Array, operation: Operation, native: core.ClosedJaxpr) -> jax.Array:
    del native
    # Under jax.disable_jit() alone: there is nothing to run but a compiled program.
    with jax.disable_jit(False):
        return run(operation, *operands)


def _result(first: Any, *rest: Any, operation: Operation, native: core.ClosedJaxpr) -> Any:
    del native
    shape = operation.shape(first, *rest)
    # Of the first operand stays where it is: its mesh, and the axes over which it varies.
    return first.update(shape=shape, dtype=jnp.dtype(operation.dtype), weak_type=False)


def _lower(
    context: Any, *values: Any, operation: Operation, native: core.ClosedJaxpr
) -> Sequence[Any]:
    module = context.module_context
    platforms = tuple(context.platforms or module.platforms)
    if operation.plain is None:
        _require_cpu(platforms)
    elif platforms != ("cpu",) or module.lowering_parameters.for_export:
        return mlir.lower_fun(operation.plain, multiple_results=False)(context, *values)
    form = core.jaxpr_as_fun(native)
    return mlir.lower_fun(form, multiple_results=True)(context, *values)


def _batched(
    operands: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    operation: Operation,
    native: core.ClosedJaxpr,
) -> tuple[jax.Array, int]:
    """Mapped rows are more rows, and mapped slices are more slices: one operation."""
    del native
    others = any(axis is not None for axis in axes[1:])
    if operation.mapped is not None and (others or not operation.merges_rows):
        return jax.vmap(operation.mapped, tuple(axes))(*operands), 0
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)
    first, *rest = (
        a if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(operands, axes, strict=True)
    )
    if operation.merges_rows and not others:
        # (size, B, M, K) -> (B, size * M, K), and back.
        slices, rows = first.shape[1:3]
        merged = first.swapaxes(0, 1).reshape(slices, size * rows, *first.shape[3:])
        y = run(operation, merged, *rest)
        return y.reshape(slices, size, rows, *y.shape[2:]), 1
    # (size, B, ...) -> (size * B, ...), of whatever is not mapped as well.
    every = (
        jnp.broadcast_to(a, (size, *a.shape)) if axis is None else a
        for a, axis in zip((first, *rest), axes, strict=True)
    )
    y = run(operation, *(a.reshape(math.prod(a.shape[:2]), *a.shape[2:]) for a in every))
    return y.reshape(size, y.shape[0] // size, *y.shape[1:]), 0


def _require_cpu(platforms: Sequence[str]) -> None:
    """Raises unless a program is lowered for a CPU alone."""
    if tuple(platforms) != ("cpu",):
        raise NotImplementedError(
            "matmul: implementation 'cpu' runs on a CPU, and this program is lowered for "
            f"{', '.join(platforms)}. Use implementation=None, which runs on every platform."
        )


_primitive = core.Primitive("bitnet_native")
_primitive.def_impl(_eager)
_primitive.def_abstract_eval(_result)
batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, _lower)
