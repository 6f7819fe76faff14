"""Stacked parameters under a scan: kernels that are read where they lie go by their index.

All else goes as what the scan slices. So it must for gradients: that of a float leaf by an
index is as large as its stack at every step, and a step would keep a copy of its codes.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Int32, PyTree

from bitnet_jax._packed.kernel import is_packed, is_read_in_place


def sliced_by_scan(stacks: PyTree) -> PyTree:
    """What a scan is to slice of a tree of stacks: None where a kernel goes by its index."""
    return jax.tree.map(
        lambda leaf: None if is_read_in_place(leaf) else leaf, stacks, is_leaf=is_packed
    )


def layer_of(stacks: PyTree, sliced: PyTree, at: Int32[Array, ""]) -> Any:
    """One layer of a tree of stacks, from its index and what the scan sliced."""
    return jax.tree.map(
        lambda leaf, part: leaf[at] if is_read_in_place(leaf) else part,
        stacks,
        sliced,
        is_leaf=is_packed,
    )
