"""Where the leaves of a tree go on a mesh: packed kernels lie as the kernels they stand for.

Nothing is sharded here. The specs are for JAX's own tools: ``jax.device_put``,
``in_shardings``, ``bj.io.load(sharding=)``, Orbax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from bitnet_jax import _boxes, _checks, _packing, _placement, _select
from bitnet_jax._packed import PackedTernary, Prepared, Stored, is_stored

Rules = Sequence[tuple[str, PartitionSpec]]
SpecOf = Callable[[_select.Path, Any], "PartitionSpec | None"]


def partition_specs(params: Any, rules: Rules | SpecOf | None = None, *, mesh: Any = None) -> Any:
    """The ``PartitionSpec`` of every array in a tree, those inside packed kernels included.

    A packed kernel inherits the spec of the float kernel that it stands for: its codes
    lie as the kernel does, four rows to a byte, and so does a scale along every axis
    that it has; along the others it is whole. Leaves that nothing is said of are whole
    on every device.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``, packed or not.
      rules: None: the kernels' Flax metadata (``nn.with_partitioning``, logical names
        under ``nn.logical_axis_rules``, nnx ``out_sharding``). Else pairs of a pattern,
        as of :func:`exclude`, and the spec of the float leaf, the first that matches;
        or a function of path and leaf that returns a spec or None.
      mesh: what the specs are to be used with, to be checked against it; by default the
        mesh around the call (``jax.set_mesh``), if there is one.

    Returns:
      A tree of the structure of ``params``, boxes and packed nodes included, with a spec
      in the place of every array.

    Raises:
      ValueError: an empty tree; no metadata in it, or a pattern that matches nothing; a
        spec of more axes than its leaf, of axes that the mesh has not, or that does not
        divide it: a contraction is cut at multiples of four weights, one byte.
      TypeError: a prepared kernel, or rules that are none.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"up": {"kernel": jax.random.normal(jax.random.key(0), (64, 16))}}
      >>> packed, _ = bj.pack_params(params, bj.PHASE4)
      >>> specs = bj.partition_specs(packed, [("up/kernel", P(None, "model"))])
      >>> specs["up"]["kernel"].codes, specs["up"]["kernel"].scale
      (P(None, 'model'), P(None, 'model'))
    """
    who = "partition_specs"
    leaves, treedef = _boxes.flatten(who, "params", params)
    mesh = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
    mesh = None if mesh.empty else mesh
    given = _given(who, leaves, rules)
    done = []
    for leaf, spec in zip(leaves, given, strict=True):
        if isinstance(leaf.value, Prepared):
            _checks.stored_layout(who, leaf.where, leaf.value.implementation)
        done.append(_boxes.closed(leaf.boxed, _of_leaf(who, leaf, spec, mesh)))
    return jax.tree.unflatten(treedef, done)


def _given(
    who: str, leaves: Sequence[_boxes.Leaf], rules: Rules | SpecOf | None
) -> list[PartitionSpec | None]:
    """The spec of each float leaf, by metadata or by rules."""
    if rules is None:
        specs = [_boxes.placement(leaf.boxed) for leaf in leaves]
        _checks.some_placement(who, any(spec is not None for spec in specs))
    elif callable(rules):
        specs = [rules(leaf.path, leaf.value) for leaf in leaves]
    else:
        pairs = _checks.placement_rules(who, rules)
        paths = ["/".join(leaf.path) for leaf in leaves]
        for pattern, _ in pairs:
            if not any(_select.match(pattern, leaf.path) for leaf in leaves):
                what = f"the pattern {pattern!r}"
                _checks.selector_matched(who, what, paths, [pattern])
        specs = [
            next((spec for p, spec in pairs if _select.match(p, leaf.path)), None)
            for leaf in leaves
        ]
    for leaf, spec in zip(leaves, specs, strict=True):
        _checks.placement_spec(who, leaf.where, spec)
    return specs


def _of_leaf(who: str, leaf: _boxes.Leaf, spec: PartitionSpec | None, mesh: Any) -> Any:
    """The spec of one leaf: an array's own, or a packed kernel's two."""
    value = leaf.value
    shape = tuple(value.shape)
    _checks.spec_rank(who, leaf.where, spec, shape)
    entries = _placement.padded(spec or (), len(shape))
    steps = [1] * len(shape)
    if isinstance(value, PackedTernary):
        steps[value.contracting_axes[-1]] = _packing.PER_BYTE
    cuts = [1] * len(shape)
    if mesh is not None:
        used = [axis for entry in entries for axis in _placement.names(entry)]
        _checks.mesh_has(who, leaf.where, used, mesh.axis_names)
        cuts = [math.prod(mesh.shape[a] for a in _placement.names(e)) for e in entries]
        _checks.spec_divides(who, leaf.where, shape, entries, cuts, steps)
    if not is_stored(value):
        return PartitionSpec(*entries)
    return _of_packed(value, entries, cuts, known=mesh is not None)


def _of_packed(
    packed: Stored, entries: _placement.Spec, cuts: Sequence[int], *, known: bool
) -> Stored:
    """Specs in the place of codes and scale; groups are cut where that is known to be even."""
    scale = [
        entry if have == length or (known and have > 1 and have % cut == 0) else None
        for entry, have, length, cut in zip(
            entries, packed.scale.shape, packed.shape, cuts, strict=True
        )
    ]
    leaves = PartitionSpec(*entries), PartitionSpec(*scale)
    return jax.tree.unflatten(jax.tree.structure(packed), leaves)
