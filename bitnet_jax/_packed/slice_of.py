"""A slice of a stack that is not cut out: what a scan over layers hands to a native product.

XLA copies each layer out of a stack before a custom call reads it. A native call takes the
stack and the index, and reads the slice where it lies.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32


@jax.tree_util.register_pytree_node_class
class SliceOf:
    """``stack[at]``, along the first axis.

    Attributes:
      stack: the array.
      at: an index that is in range.
    """

    def __init__(self, stack: Array, at: Int32[Array, ""]):
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
