"""A slice of a stack that is not cut out: what a scan over layers hands to a native product.

XLA copies each layer out of a stack before a custom call reads it. A native call takes the
stack and the index, and reads the slice where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from bitnet_jax import _checks, _mesh
from bitnet_jax._packed.static_data import register_export


@jax.tree_util.register_pytree_node_class
class SliceOf:
    """``stack[at]``, along the first axis.

    Attributes:
      stack: the array.
      at: an index that is in range.
    """

    def __init__(self, stack: Any, at: Any):
        self.stack, self.at = stack, at

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """Of the slice."""
        return self.stack.ndim - 1

    @property
    def dtype(self) -> np.dtype:
        """Of the slice."""
        return self.stack.dtype

    @property
    def size(self) -> int:
        """Elements of the slice."""
        return self.stack.size // self.stack.shape[0]

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        """Its two arrays."""
        return (self.stack, self.at), None

    @classmethod
    def tree_unflatten(cls, static: None, children: tuple[Any, Any]) -> SliceOf:
        """A slice of two arrays, or of what stands for them."""
        del static
        return cls(*children)


def cut(array: Any) -> Any:
    """A slice, copied out of its stack; anything else as it is."""
    if not isinstance(array, SliceOf):
        return array
    return jax.lax.dynamic_index_in_dim(array.stack, array.at, 0, keepdims=False)


register_export(SliceOf)


def all_cut(tree: Any) -> Any:
    """A tree, every slice in it copied out of its stack."""
    return jax.tree.map(cut, tree, is_leaf=lambda leaf: isinstance(leaf, SliceOf))


def stack_of(array: Any) -> Any:
    """The stack that a slice lies in; anything else as it is."""
    return array.stack if isinstance(array, SliceOf) else array


def one_slice(
    who: str,
    index: Any,
    lengths: Sequence[int],
    codes: Array,
    scale: Array,
    *,
    in_place: bool,
) -> tuple[Any, Array]:
    """Codes and scale of one slice along their leading axes.

    A static index is checked. A traced one counts from the end where it is negative, and is
    held within its axis, as that of a ``jax.Array`` is.

    Args:
      who: the kernel's kind, for errors.
      index: an integer, or a tuple of them, one a batch axis.
      lengths: of the batch axes, which lead.
      codes: of the stack.
      scale: of the stack.
      in_place: whether codes may stay in the stack, where the function is traced.

    Raises:
      TypeError: an index that is no integer.
      IndexError: more indices than batch axes, or one that is out of range.
    """
    indices = index if isinstance(index, tuple) else (index,)
    _require_index_for_each(who, indices, lengths)
    at: Any = 0
    for one, length in zip(indices, lengths, strict=False):
        at = at * length + _within(who, one, length)
    count, at = len(indices), jnp.asarray(at, jnp.int32)

    def cut_out(array: Array, at: Int32[Array, ""]) -> Array:
        return cut(SliceOf(_one_lead(array, count), at))

    def cut_on_mesh(array: Array) -> Array:
        spec = _mesh.spec_of(array)[count:]
        return _mesh.in_auto(cut_out, array, at, out=lambda _: PartitionSpec(*spec))

    scale = cut_on_mesh(scale)
    # Under a trace every operation gives a tracer. A native product has no mesh of its own.
    traced = isinstance(scale, core.Tracer) and not _mesh.is_sharded(codes)
    if in_place and traced and count == len(lengths):
        return SliceOf(_one_lead(codes, count), at), scale
    return cut_on_mesh(codes), scale


def _one_lead(array: Array, count: int) -> Array:
    """An array with its first axes made one."""
    return array if count == 1 else array.reshape(-1, *array.shape[count:])


def _within(who: str, index: Any, length: int) -> Any:
    """An index from 0 to below a length."""
    dtype, shape = getattr(index, "dtype", None), getattr(index, "shape", ())
    scalar = dtype is not None and shape == () and jnp.issubdtype(dtype, jnp.integer)
    if not scalar and not _checks.is_integer(index):
        raise TypeError(
            f"{who}: the index of a layer must be an integer, got {_checks.describe(index)}. For "
            "several layers, slice the arrays: jax.tree.map(lambda a: a[1:3], kernel)."
        )
    if isinstance(index, core.Tracer):
        at = jnp.asarray(index)
        at = at if at.dtype.itemsize >= 4 else at.astype(jnp.int32)
        return jnp.clip(jnp.where(at < 0, at + length, at), 0, length - 1).astype(jnp.int32)
    if not -length <= int(index) < length:
        raise IndexError(
            f"{who}: index {int(index)} is out of range for {length} layers along this batch axis."
        )
    return int(index) % length


def _require_index_for_each(who: str, indices: Sequence[Any], lengths: Sequence[int]) -> None:
    """Raises unless there are as many indices as batch axes, or fewer."""
    if not 0 < len(indices) <= len(lengths):
        raise IndexError(
            f"{who}: the index must be an integer for each of the batch axes {tuple(lengths)}, or "
            f"for the first of them, got {len(indices)}."
        )
