"""Partition specs of a parameter tree: packed kernels take the specs of their float kernels.

Nothing is moved here. The specs are for JAX's own tools: ``jax.device_put``,
``in_shardings``, ``bj.io.load(sharding=)``, Orbax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from bitnet_jax import _checks, _mesh
from bitnet_jax._checks import describe
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import Stored, is_stored
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.stored import PackedTernary, with_planes
from bitnet_jax._tree.leaves import Leaf, flatten, placement, rebox
from bitnet_jax._tree.select import Path, match

Rules = Sequence[tuple[str, PartitionSpec]]

SpecOf = Callable[[Path, Any], PartitionSpec | None]


def partition_specs(
    params: PyTree,
    rules: Rules | SpecOf | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> PyTree:
    """The ``PartitionSpec`` of every array in a tree, also of those inside packed kernels.

    A packed kernel takes the spec of its float kernel. Its codes are sharded like the
    kernel, four rows to a byte. Its scale is sharded along the axes that it has, and
    replicated along the others. Leaves without a spec are replicated.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``, packed or not.
      rules: None: Flax's partitioning metadata (``nn.with_partitioning``, logical names
        under ``nn.logical_axis_rules``, nnx ``out_sharding``). Or pairs of a pattern, as
        for :func:`exclude`, and the spec of the float leaf; the first match counts. Or a
        function of path and leaf that returns a spec or None.
      mesh: the mesh that the specs are checked against; by default that of
        ``jax.set_mesh``, if there is one.

    Returns:
      A tree with the structure of ``params``, boxes and packed nodes included, and a spec
      in the place of every array.

    Raises:
      ValueError: an empty tree; no metadata, or a pattern that matches nothing; a spec
        with more axes than its leaf, with axes that the mesh lacks, or that does not
        divide the leaf. A contraction is divided at multiples of four weights, one byte.
      TypeError: a prepared kernel, or rules of another type.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}}
      >>> packed, _ = bj.pack_params(params, bj.PHASE4)
      >>> specs = bj.sharding.partition_specs(packed, [("up/kernel", P(None, "model"))])
      >>> specs["up"]["kernel"].codes, specs["up"]["kernel"].scale
      (P(None, 'model'), P(None, 'model'))
    """
    who = "partition_specs"
    leaves, treedef = flatten(who, "params", params)
    mesh = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
    mesh = None if mesh.empty else mesh
    given = _given(who, leaves, rules)
    done = []
    for leaf, spec in zip(leaves, given, strict=True):
        if isinstance(leaf.value, Prepared):
            _checks.raise_prepared(who, leaf.where, leaf.value.implementation)
        done.append(rebox(leaf.boxed, _of_leaf(who, leaf, spec, mesh)))
    return jax.tree.unflatten(treedef, done)


def _given(
    who: str, leaves: Sequence[Leaf], rules: Rules | SpecOf | None
) -> list[PartitionSpec | None]:
    """The spec of each float leaf, from metadata or rules."""
    if rules is None:
        specs = [placement(leaf.boxed) for leaf in leaves]
        _require_some_sharding(who, any(spec is not None for spec in specs))
    elif callable(rules):
        specs = [rules(leaf.path, leaf.value) for leaf in leaves]
    else:
        pairs = _rule_pairs(who, rules)
        paths = ["/".join(leaf.path) for leaf in leaves]
        for pattern, _ in pairs:
            if not any(match(pattern, leaf.path) for leaf in leaves):
                what = f"the pattern {pattern!r}"
                _checks.raise_selector_matches_nothing(who, what, paths, [pattern])
        specs = [next((spec for p, spec in pairs if match(p, leaf.path)), None) for leaf in leaves]
    for leaf, spec in zip(leaves, specs, strict=True):
        _require_spec(who, leaf.where, spec)
    return specs


def _of_leaf(
    who: str, leaf: Leaf, spec: PartitionSpec | None, mesh: Mesh | AbstractMesh | None
) -> PartitionSpec | Stored:
    """The spec of an array; for a packed kernel, the kernel with specs as its arrays."""
    value = leaf.value
    shape = tuple(value.shape)
    _require_spec_rank(who, leaf.where, spec, shape)
    entries = _mesh.padded(spec or (), len(shape))
    # Shards of codes must begin at a whole byte: at a multiple of four weights.
    steps = [1] * len(shape)
    if isinstance(value, PackedTernary):
        steps[value.contracting_axes[-1]] = trits.PER_BYTE
    cuts = [1] * len(shape)
    if mesh is not None:
        used = [axis for entry in entries for axis in _mesh.names(entry)]
        _mesh.require_axes_of_mesh(who, f"the spec of {leaf.where}", used, mesh.axis_names)
        _require_distinct_axes(who, leaf.where, used)
        cuts = [math.prod(mesh.shape[a] for a in _mesh.names(e)) for e in entries]
        _require_equal_shards(who, leaf.where, shape, entries, cuts, steps)
    if not is_stored(value):
        return PartitionSpec(*entries)
    return _of_packed(value, entries, cuts, known=mesh is not None)


def _of_packed(packed: Stored, entries: _mesh.Spec, cuts: Sequence[int], *, known: bool) -> Stored:
    """A packed kernel with specs in the place of its codes and scale; planes are whole.

    A scale's axis is as long as the kernel's (one scale per output), has one entry per
    group, or is 1. Groups are sharded only where the mesh is known to divide them.
    """
    at, planes = packed.plane_axis, packed.planes
    shape, cuts = with_planes(packed.shape, at, planes), with_planes(cuts, at, 1)
    entries = with_planes(entries, at, None)
    scale = [
        entry if have == length or (known and have > 1 and have % cut == 0) else None
        for entry, have, length, cut in zip(entries, packed.scale.shape, shape, cuts, strict=True)
    ]
    leaves = PartitionSpec(*entries), PartitionSpec(*scale)
    return jax.tree.unflatten(jax.tree.structure(packed), leaves)


def _require_some_sharding(who: str, some: bool) -> None:
    """Raises if no leaf has partitioning metadata."""
    if not some:
        raise ValueError(
            f"{who}: `params` holds no partitioning metadata. Annotate kernels "
            "(flax.linen.with_partitioning, nnx.with_partitioning) and keep their boxes, or "
            "pass rules=[('pattern', PartitionSpec(...)), ...]."
        )


def _rule_pairs(who: str, rules: object) -> list[tuple[str, PartitionSpec]]:
    """Rules as pairs of a pattern and a spec; raises if they are not."""
    pairs = list(rules) if isinstance(rules, (list, tuple)) else []
    good = (
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], PartitionSpec)
        for pair in pairs
    )
    if not pairs or not all(good):
        raise TypeError(
            f"{who}: `rules` must be pairs of a pattern and a PartitionSpec, a function of path "
            f"and leaf, or None, got {describe(rules)}. Write for example "
            "[('mlp/*/kernel', PartitionSpec(None, 'model'))]."
        )
    return pairs


def _require_spec(who: str, where: str, spec: object) -> None:
    """Raises unless a rule returned a spec or None."""
    if spec is not None and not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"{who}: `rules` returned {describe(spec)} for {where}. Return a PartitionSpec, or "
            "None for a leaf that is replicated."
        )


def _require_spec_rank(
    who: str, where: str, spec: PartitionSpec | None, shape: Sequence[int]
) -> None:
    """Raises if a spec has more entries than its leaf has axes."""
    if spec is not None and len(spec) > len(shape):
        raise ValueError(
            f"{who}: {where} has shape {tuple(shape)}, and its spec {len(spec)} entries: {spec}. "
            "Give it one entry for each axis of the float leaf."
        )


def _require_distinct_axes(who: str, where: str, used: Sequence[str]) -> None:
    """Raises if a spec names a mesh axis twice."""
    if len({*used}) < len(used):
        raise ValueError(
            f"{who}: the spec of {where} names a mesh axis twice: {list(used)}. Shard one axis "
            "of an array over one mesh axis."
        )


def _require_equal_shards(
    who: str,
    where: str,
    shape: Sequence[int],
    entries: Sequence[Any],
    cuts: Sequence[int],
    steps: Sequence[int],
) -> None:
    """Raises unless shards have equal sizes and begin at whole bytes."""
    for axis, (length, entry, cut, step) in enumerate(
        zip(shape, entries, cuts, steps, strict=True)
    ):
        if cut > 1 and length % (cut * step):
            unit = f", each a multiple of {step} weights (one byte)" if step > 1 else ""
            raise ValueError(
                f"{who}: axis {axis} of {where} has length {length}, which {entry!r} would cut "
                f"into {cut} equal shards{unit}. Shard another axis, or over fewer devices."
            )
