"""Logical names of a decoder's axes, and partition specs from rules over them.

Every parameter axis has a name that says what it runs over, and a rule gives names a mesh
axis. Tensor parallelism cuts ``heads``, ``kv_heads``, ``mlp`` and ``vocabulary``; FSDP
cuts ``embed``.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._tree.select import Path
from bitnet_jax.sharding import partition_specs

NAMES = ("vocabulary", "embed", "heads", "kv_heads", "mlp", "layers")

MeshAxes = str | tuple[str, ...] | None

# In and out of every projection; norms are replicated.
_PROJECTIONS = {
    "query": ("embed", "heads"),
    "key": ("embed", "kv_heads"),
    "value": ("embed", "kv_heads"),
    "out": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "head": ("embed", "vocabulary"),
}


def axes_of(path: Path) -> tuple[str, ...]:
    """The names of a parameter's own axes; none where it is replicated."""
    if path[-1] == "embedding":
        return ("vocabulary", "embed")
    owner = next((part for part in reversed(path) if part in _PROJECTIONS), None)
    if owner is None or path[-1] not in ("kernel", "bias"):
        return ()
    return _PROJECTIONS[owner] if path[-1] == "kernel" else _PROJECTIONS[owner][1:]


def specs_of(
    params: PyTree, rules: Mapping[str, MeshAxes], mesh: Mesh | AbstractMesh | None
) -> PyTree:
    """The spec of every array of a decoder's parameters, packed kernels included."""
    for name in rules:
        _checks.require_one_of("partition_specs", "rules", name, NAMES)

    def spec(path: Path, leaf: jax.Array) -> PartitionSpec:
        names = axes_of(path)
        stacked = ("layers",) * (leaf.ndim - len(names)) if names else ()
        return PartitionSpec(*(rules.get(name) for name in (*stacked, *names)))

    return partition_specs(params, spec, mesh=mesh)
