"""The leaves of a parameter tree with their paths, out of their boxes.

linen's ``AxisMetadata`` and ``nnx.Variable`` are boxes: they carry metadata
(sharding names, a variable's type) beside one value. The tree functions open a
box, change the value and close it again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax.core import meta
from jax.sharding import PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._packed.kernel import is_packed


class Leaf(NamedTuple):
    """A leaf of a tree: its names, as it stood there, and out of its box."""

    path: tuple[str, ...]
    boxed: Any
    value: Any

    @property
    def where(self) -> str:
        """The names joined by ``/``."""
        return "/".join(self.path)


def flatten(
    who: str,
    name: str,
    tree: PyTree,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[list[Leaf], Any]:
    """The leaves of a tree, packed kernels whole, and its structure; raises for an empty tree."""

    def whole(leaf: object) -> bool:
        return is_packed(leaf) or is_box(leaf) or (is_leaf is not None and is_leaf(leaf))

    _checks.require_no_report(who, name, tree)
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole)
    _checks.require_leaves(who, name, len(flat))
    return [Leaf(_names(path), leaf, unbox(leaf)) for path, leaf in flat], treedef


def _names(path: KeyPath) -> tuple[str, ...]:
    """A path as names: dict keys, attributes and indices alike."""
    keys = ("key", "name", "idx")
    return tuple(
        next((str(getattr(part, k)) for k in keys if hasattr(part, k)), str(part)) for part in path
    )


def is_box(leaf: object) -> bool:
    """Whether a leaf is a box around a value."""
    return isinstance(leaf, meta.AxisMetadata) or _is_variable(leaf)


def unbox(leaf: PyTree) -> Any:
    """The value in a box; any other leaf as it is. No sharding constraint is applied."""
    if _is_variable(leaf):
        return leaf.get_value()
    if isinstance(leaf, meta.Partitioned):
        return leaf.unbox(apply_constraint=False)
    return leaf.unbox() if isinstance(leaf, meta.AxisMetadata) else leaf


def rebox(box: PyTree, value: PyTree) -> Any:
    """``value`` in a box like ``box``; where there was none, the value itself."""
    if _is_variable(box):
        return box.replace(value)
    return box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value


def placement(box: PyTree) -> PartitionSpec | None:
    """How Flax's metadata says the value of a box lies on a mesh; None where it says nothing.

    Logical names go through the rules of the box, or of ``nn.logical_axis_rules``.
    """
    if _is_variable(box):
        metadata = box.get_metadata()
        if not any(metadata.get(name) for name in ("out_sharding", "sharding_names", "sharding")):
            return None
        return sys.modules["flax.nnx"].get_partition_spec({"": box})[""].get_value()
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(box, linen.LogicallyPartitioned):
        rules = box.rules or linen.get_logical_axis_rules()
        _require_logical_rules("placement", box.names, bool(rules))
        return linen.logical_to_mesh_axes(box.names, rules)
    return box.get_partition_spec() if isinstance(box, meta.Partitioned) else None


def _is_variable(leaf: object) -> bool:
    nnx = sys.modules.get("flax.nnx")  # whoever holds a Variable has imported it
    return nnx is not None and isinstance(leaf, nnx.Variable)


def _require_logical_rules(who: str, names: Sequence[object], known: bool) -> None:
    """Raises if logical axis names are used and no rules map them to a mesh."""
    if not known and any(names):
        raise ValueError(
            f"{who}: the logical axes {tuple(names)} of a kernel map to no mesh axes. Put the "
            "call under flax.linen.logical_axis_rules(rules)."
        )
