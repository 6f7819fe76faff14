"""Runs operations on Auto and on Explicit mesh axes, with the same bits.

With **Auto** axes JAX's partitioner places every operation, from how the arguments are
placed. With **Explicit** axes every array's type has a sharding, and every operation
must derive its result's. The halving tree behind a scale cannot: it would halve below
the number of devices. So :func:`in_auto` makes the axes Auto for one whole operation,
and gives its results shardings that follow from its operands'. The bits are the same:
codes are elementwise, the tree is order-fixed, sums are int32.

Public functions and layers call :func:`in_auto`, once for each operation; the functions
that they run inside it take arrays as they are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Integer, PyTree, Shaped

Entry = str | tuple[str, ...] | None

Spec = tuple[Entry, ...]

AnyMesh = Mesh | AbstractMesh


def require_axes_of_mesh(who: str, what: str, axes: Sequence[str], has: Sequence[str]) -> None:
    """Raises unless a mesh has the axes that ``what`` names."""
    missing = sorted({axis for axis in axes if axis not in has})
    if missing:
        raise ValueError(
            f"{who}: {what} names the mesh axes {missing}, and the mesh has {list(has)}. Name axes "
            "of the mesh."
        )


def names(entry: Entry) -> tuple[str, ...]:
    """The mesh axes that one axis of an array is sharded over."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def entry_of(axes: Sequence[str]) -> Entry:
    """The entry of a spec that names these mesh axes."""
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def padded(spec: PartitionSpec | Spec, ndim: int) -> Spec:
    """A spec with an entry for every axis."""
    return (*spec, *(None,) * (ndim - len(spec)))


def spec_of(array: jax.typing.ArrayLike) -> Spec:
    """The sharding in an array's type, an entry an axis; None where the type has none."""
    kind = jax.typeof(array)
    sharding = getattr(kind, "sharding", None)
    return padded(() if sharding is None else sharding.spec, len(kind.shape))


def is_typed(array: jax.typing.ArrayLike) -> bool:
    """Whether an array's type has its sharding: the mesh around it has Explicit axes."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    return sharding is not None and AxisType.Explicit in sharding.mesh.axis_types


def is_sharded(array: object) -> bool:
    """Whether each device has a part of an array, by its type or its placement."""
    if isinstance(array, core.Tracer):
        return any(names(entry) for entry in spec_of(array))
    return isinstance(array, jax.Array) and not array.sharding.is_fully_replicated


def explicit_mesh(operands: PyTree) -> AbstractMesh | None:
    """The mesh of the first operand whose type is sharded; None where none is."""
    for leaf in jax.tree.leaves(operands):
        # Skips non-arrays; the caller's type check reports them.
        if isinstance(leaf, jax.Array) and any(names(entry) for entry in spec_of(leaf)):
            return jax.typeof(leaf).sharding.mesh
    return None


def fit(entries: Sequence[Entry], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """A spec for a shape, of those entries that divide it and whose mesh axes are still free."""
    taken: set[str] = set()
    fitted: list[Entry] = []
    for entry, length in zip(entries, shape, strict=True):
        axes = tuple(a for a in names(entry) if a not in taken)
        if length % math.prod(mesh.shape[a] for a in axes):
            axes = ()
        taken |= {*axes}
        fitted.append(entry_of(axes))
    return PartitionSpec(*fitted)


def in_auto(
    run: Callable[..., Any], *operands: PyTree, out: Callable[[AbstractMesh], PyTree]
) -> Any:
    """``run(*operands)``, with Explicit mesh axes made Auto inside where operands are sharded.

    Args:
      run: what to run; its operands are arrays and trees of arrays.
      *operands: of ``run``.
      out: mesh -> the specs of the results, asked only where they are needed.

    Returns:
      What ``run`` returns.
    """
    mesh = explicit_mesh(operands)
    if mesh is None:
        return run(*operands)
    with _within(mesh):
        run = jax.sharding.auto_axes(run, axes=_explicit_axes(mesh), out_sharding=out(mesh))
        return run(*operands)


def in_auto_like(run: Callable[..., Any], *operands: PyTree, more: int | None = None) -> Any:
    """:func:`in_auto` for results that are sharded as the first operand is.

    A result of its rank has its axes, shorter or not (a scale, a gamma, bytes of four
    codes); one with an axis ``more`` (from the end: that of planes) is whole along it; any
    other (a count) is whole everywhere.
    """
    first = jax.tree.leaves(operands)[0]

    def out(mesh: AbstractMesh) -> PyTree:
        spec = spec_of(first)
        known: dict[int, Spec] = {len(spec): spec}
        if more is not None:
            at = len(spec) + 1 + more
            known[len(spec) + 1] = (*spec[:at], None, *spec[at:])
        return jax.tree.map(
            lambda a: fit(known.get(a.ndim) or (None,) * a.ndim, a.shape, mesh),
            _results(run, operands, mesh),
        )

    return in_auto(run, *operands, out=out)


def in_auto_rows(run: Callable[..., Any], *operands: PyTree, outputs: Spec) -> Any:
    """:func:`in_auto` for a product: its result has the first operand's rows, then ``outputs``."""

    def out(mesh: AbstractMesh) -> PartitionSpec:
        y = _results(run, operands, mesh)
        return fit((*spec_of(operands[0])[: y.ndim - len(outputs)], *outputs), y.shape, mesh)

    return in_auto(run, *operands, out=out)


def varying_alike(*operands: PyTree) -> Any:
    """The operands, each varying over every mesh axis of a ``shard_map`` that one of them does.

    JAX does so for the operands of its own operations. A ``custom_vjp`` must, too: its
    gradients have the types of its operands. The transpose of this cast is the sum over
    the devices.
    """
    axes = frozenset[str]().union(*map(varying, jax.tree.leaves(operands)))

    def cast(array: jax.typing.ArrayLike) -> Any:
        missing = axes - varying(array)
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(cast, operands) if axes else operands


def struct_varying_like(
    shape: Sequence[int], dtype: jax.typing.DTypeLike, like: Shaped[Array, "..."]
) -> jax.ShapeDtypeStruct:
    """The type of an array that varies over the mesh axes that another does."""
    if not varying(like):
        return jax.ShapeDtypeStruct(shape, dtype)
    kind = jax.typeof(like)
    place = NamedSharding(kind.sharding.mesh, PartitionSpec())
    manual = kind.manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place, manual_axis_type=manual)


def varying(array: jax.typing.ArrayLike) -> frozenset[str]:
    """The mesh axes of a ``shard_map`` over which an array has other values."""
    return jax.typeof(array).manual_axis_type.varying


def rows_of(table: Shaped[Array, "..."], index: Integer[Array, "..."]) -> Shaped[Array, "..."]:
    """``jnp.take(table, index, axis=0)``; on Explicit axes sharded as index and features are."""

    def run(index: Integer[Array, "..."], table: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return jnp.take(table, index, axis=0)

    return in_auto_rows(run, index, table, outputs=spec_of(table)[1:])


def _results(run: Callable[..., Any], operands: Sequence[PyTree], mesh: AbstractMesh) -> PyTree:
    """The shapes of what ``run`` returns, from operands whose types have no sharding."""
    plain = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tuple(operands))
    # As the operation will run: a gather's mesh has Auto axes, and so must the one around.
    with jax.sharding.use_abstract_mesh(made_auto(mesh)):
        return jax.eval_shape(run, *plain)


def _within(mesh: AbstractMesh) -> contextlib.AbstractContextManager[object]:
    """A context with a mesh: the caller's own, where there is one."""
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


@functools.cache
def made_auto(mesh: AbstractMesh) -> AbstractMesh:
    """A mesh with its Explicit axes made Auto."""
    return mesh.update_axis_types(dict.fromkeys(_explicit_axes(mesh), AxisType.Auto))


def _explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)
