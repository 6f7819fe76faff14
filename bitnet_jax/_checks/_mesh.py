"""Meshes: names of their axes, where arrays lie on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec

from bitnet_jax._checks._values import describe


def mesh_axis_names(who: str, axes: Sequence[Any]) -> None:
    """Refuses what names no mesh axis."""
    if not axes or not all(isinstance(axis, str) and axis for axis in axes):
        raise TypeError(
            f"{who}: `axes` must be one or more names of mesh axes, got {axes!r}. Write for "
            f"example bj.{who}('data')."
        )


def mesh_has_axes(who: str, axes: Sequence[str], has: Sequence[str]) -> None:
    """Refuses names that the mesh does not have, or no mesh at all."""
    missing = [axis for axis in axes if axis not in has]
    if missing and not has:
        raise ValueError(
            f"{who}: gather_codes({', '.join(map(repr, axes))}) needs a mesh, and there is none "
            "around this call. Put it under jax.set_mesh(mesh)."
        )
    if missing:
        raise ValueError(
            f"{who}: gather_codes names the mesh axes {missing}, and the mesh has {list(has)}. "
            "Name axes of the mesh."
        )


def kernel_spec(who: str, spec: Any, ndim: int) -> None:
    """Refuses a spec that is none, or of more axes than the kernel has."""
    if spec is None:
        return
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"{who}: `kernel_spec` must be a jax.sharding.PartitionSpec, got {describe(spec)}. "
            "Write for example PartitionSpec('data', None)."
        )
    if len(spec) > ndim:
        raise ValueError(
            f"{who}: `kernel_spec` has {len(spec)} entries, and the kernel {ndim} axes: {spec}. "
            "Give it one entry for each axis."
        )


def logical_rules(who: str, names: Sequence[Any], known: bool) -> None:
    """Refuses logical axis names that nothing maps to a mesh."""
    if not known and any(names):
        raise ValueError(
            f"{who}: the logical axes {tuple(names)} of a kernel map to no mesh axes. Put the "
            "call under flax.linen.logical_axis_rules(rules)."
        )


def placement_known(who: str, known: bool) -> None:
    """Refuses to gather the codes of a kernel that lies nobody knows how."""
    if not known:
        raise ValueError(
            f"{who}: gather_codes does not know how this kernel lies on the mesh. Annotate it "
            "(nn.with_partitioning, nnx.with_partitioning), pass kernel_spec= to "
            "bj.ternary_dot, or make the mesh with Explicit axes."
        )


def placement_merges(who: str, by_type: bool, parts: Any) -> None:
    """Refuses to gather a kernel of which an inner axis of several is sharded, if asked to."""
    if not by_type:
        raise NotImplementedError(
            f"{who}: gather_codes cannot gather a kernel that lies as {parts[1:]} (contraction, "
            "outputs): of several axes that are contracted, or put out, only the first may be "
            "sharded. Shard that one, or leave the kernel out of gather_codes."
        )


def some_placement(who: str, some: bool) -> None:
    """Refuses a tree without a word about placement."""
    if not some:
        raise ValueError(
            f"{who}: `params` holds no partitioning metadata. Annotate kernels "
            "(flax.linen.with_partitioning, nnx.with_partitioning) and keep their boxes, or "
            "pass rules=[('pattern', PartitionSpec(...)), ...]."
        )


def placement_rules(who: str, rules: Any) -> list[tuple[str, PartitionSpec]]:
    """Rules as pairs of a pattern and a spec, or an error."""
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


def placement_spec(who: str, where: str, spec: Any) -> None:
    """Refuses a rule's answer that is no spec."""
    if spec is not None and not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"{who}: `rules` returned {describe(spec)} for {where}. Return a PartitionSpec, or "
            "None for a leaf that is whole on every device."
        )


def spec_rank(who: str, where: str, spec: PartitionSpec | None, shape: Sequence[int]) -> None:
    """Refuses a spec of more axes than its leaf."""
    if spec is not None and len(spec) > len(shape):
        raise ValueError(
            f"{who}: {where} has shape {tuple(shape)}, and its spec {len(spec)} entries: {spec}. "
            "Give it one entry for each axis of the float leaf."
        )


def mesh_has(who: str, where: str, used: Sequence[str], has: Sequence[str]) -> None:
    """Refuses a spec of axes that the mesh does not have, or that names one twice."""
    missing = sorted({axis for axis in used if axis not in has})
    if missing:
        raise ValueError(
            f"{who}: the spec of {where} names {missing}, and the mesh has the axes {list(has)}. "
            "Name axes of the mesh."
        )
    if len({*used}) < len(used):
        raise ValueError(
            f"{who}: the spec of {where} names a mesh axis twice: {list(used)}. Shard one axis "
            "of an array over one mesh axis."
        )


def spec_divides(
    who: str,
    where: str,
    shape: Sequence[int],
    entries: Sequence[Any],
    cuts: Sequence[int],
    steps: Sequence[int],
) -> None:
    """Refuses shards of unequal size, or that end inside a byte."""
    for axis, (length, entry, cut, step) in enumerate(
        zip(shape, entries, cuts, steps, strict=True)
    ):
        if cut > 1 and length % (cut * step):
            unit = f", each a multiple of {step} weights (one byte)" if step > 1 else ""
            raise ValueError(
                f"{who}: axis {axis} of {where} has length {length}, which {entry!r} would cut "
                f"into {cut} equal shards{unit}. Shard another axis, or over fewer devices."
            )
