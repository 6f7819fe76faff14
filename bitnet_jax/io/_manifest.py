"""One leaf of a tree in a file: its static data as JSON, its arrays as tensors.

``save`` and ``load`` use the same checks: a packed kernel in a file keeps the invariants
in the docstring of ``PackedTernary`` or ``PackedInt8``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import _checks
from bitnet_jax._packed import intact
from bitnet_jax._packed.kernel import Stored, is_stored
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._quantize.config import YOUNGER, Int8Config, TernaryConfig, stated_fields
from bitnet_jax._quantize.rotation import has_blocks
from bitnet_jax.io import _safetensors
from bitnet_jax.io._safetensors import Entry, raise_damaged
from bitnet_jax.io._tensors import (
    DTYPES,
    AnyArray,
    Part,
    Path,
    name_of,
    parts_of,
    require_array,
    stored_shape,
)

_STATIC = {"config", "contracting_axes", "kernel_ndim"}

_FIELDS = {
    "array": {"kind", "path", "dtype", "shape"},
    "packed": {"kind", "path", "dtype", "shape", "length"} | _STATIC,
    "int8": {"kind", "path", "dtype", "shape"} | _STATIC,
    "empty": {"kind", "path"},
}

_CONFIGS = {"packed": TernaryConfig, "int8": Int8Config}

MAX_DEPTH = 100  # keys of a path; JAX flattens trees by recursion


class Leaf(NamedTuple):
    """A leaf's description, as in the metadata, and the forms of its arrays."""

    described: dict[str, Any]
    parts: list[Part]

    @property
    def path(self) -> tuple[str | int, ...]:
        """The keys of the leaf."""
        return tuple(self.described["path"])


def describe(path: Path, value: Any, *, dense: bool) -> tuple[Leaf, list[AnyArray]]:
    """A leaf's description and its arrays; raises if a file cannot store it."""
    where = name_of(path)
    described: dict[str, Any] = {"path": list(path)}
    if isinstance(value, Mapping):
        return Leaf({**described, "kind": "empty"}, []), []
    if isinstance(value, Prepared):
        _checks.raise_prepared("save", where, value.implementation)
    if not is_stored(value):
        _require_savable(where, value)
        shape = list(value.shape)
        described |= {"kind": "array", "dtype": value.dtype.name, "shape": shape}
        return Leaf(described, parts_of(described, ())), [value]
    codes, scale = value.codes, value.scale
    _require_savable(f"{where}.codes", codes)
    _require_savable(f"{where}.scale", scale)
    described |= static_of(value)
    if isinstance(value, PackedTernary) and dense:
        described["stored"] = "trits"
    fault = packed_fault(described) or form_fault(described, codes, scale)
    if fault:
        raise ValueError(f"save: {where} {fault}. Make packed kernels with bj.pack.")
    return Leaf(described, parts_of(described, scale.shape)), [codes, scale]


def static_of(packed: Stored) -> dict[str, Any]:
    """The static data of a packed kernel, valid or not."""
    axes = list(packed.contracting_axes)
    sound = axes and packed.ndim >= -axes[-1]
    static = {
        "kind": "packed" if isinstance(packed, PackedTernary) else "int8",
        "dtype": np.dtype(packed.dtype).name,
        "shape": list(packed.shape if sound else packed.codes.shape),
        "contracting_axes": axes,
        "kernel_ndim": packed.kernel_ndim,
        "config": stated_fields(packed.config),
    }
    return static | ({"length": packed.length} if isinstance(packed, PackedTernary) else {})


def _require_savable(where: str, value: Any) -> None:
    """Raises unless a value is an array that fits a file and that this process can read."""
    require_array("save", where, value)
    if not _safetensors.is_shape(list(value.shape)):
        raise ValueError(
            f"save: {where} has shape {tuple(value.shape)}, and a file stores at most "
            f"{_safetensors.MAX_RANK} axes and 2**48 elements. Reshape it."
        )
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ValueError(
            f"save: {where} of shape {value.shape} was deleted, or donated to a jitted function. "
            "Save what that function returned."
        )
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise ValueError(
            f"save: {where} of shape {tuple(value.shape)} is spread over several processes. "
            "Gather the tree first (jax.experimental.multihost_utils.process_allgather)."
        )


def descriptions(text: str) -> list[dict[str, Any]]:
    """The descriptions in the metadata; raises if one of them is invalid."""
    try:
        leaves = _safetensors.parse_json(text)
        canonical = _safetensors.canonical_json(leaves)
    except (ValueError, RecursionError) as error:
        raise_damaged(f"does not describe its leaves: {error}")
    if canonical != text or not isinstance(leaves, list):
        raise_damaged("does not describe its leaves in canonical JSON")
    for leaf in leaves:
        kind = leaf.get("kind") if isinstance(leaf, dict) else None
        if kind not in list(_FIELDS) or set(leaf) - _optional(leaf) != _FIELDS[kind]:
            raise_damaged(f"has an invalid description of a leaf, {leaf!r}")
        path = leaf["path"]
        if (
            not isinstance(path, list)
            or not 0 < len(path) <= MAX_DEPTH
            or not all(map(is_key, path))
        ):
            raise_damaged(
                f"has a leaf with the path {path!r}; it must be a list of printable str and int, "
                f"at most {MAX_DEPTH}"
            )
        if kind == "empty":
            continue
        where = name_of(path)
        if leaf["dtype"] not in list(DTYPES) or not _safetensors.is_shape(leaf["shape"]):
            raise_damaged(f"declares {where!r} as {leaf['dtype']!r} of shape {leaf['shape']!r}")
        fault = packed_fault(leaf) if kind in _CONFIGS else None
        if fault:
            raise_damaged(f"has an invalid description of a kernel: {where!r} {fault}")
    return leaves


def _optional(leaf: dict[str, Any]) -> set[str]:
    """The key that only kernels at five trits a byte have."""
    is_dense = leaf.get("kind") == "packed" and leaf.get("stored") == "trits"
    return {"stored"} if is_dense else set()


def is_key(key: object) -> bool:
    """Whether a key can be stored: an int of 64 bits or a printable string."""
    # JSON can write a control character in two ways, and UTF-8 has no surrogates.
    if type(key) is int:
        return abs(key) <= _safetensors.MAX_INT
    return type(key) is str and key.isprintable()


def found(described: dict[str, Any], tensors: Mapping[str, Entry]) -> Leaf:
    """A leaf of a file; raises unless its tensors have the declared dtypes and shapes."""
    where = name_of(described["path"])
    scale = tensors.get(f"{where}.scale")
    leaf = Leaf(described, parts_of(described, scale.shape if scale else ()))
    for part in leaf.parts:
        if part.name not in tensors:
            raise_damaged(f"lacks the tensor {part.name!r}")
        tensor = tensors[part.name]
        if tensor[:2] != part.stored:
            tag, shape = part.stored
            raise_damaged(
                f"declares {part.name!r} as {tag} of shape {shape}, and has {tensor.tag} of "
                f"shape {tensor.shape}"
            )
        if part.rule == "scale":
            fault = scale_fault(described, part.dtype, part.shape)
            if fault:
                raise_damaged(f"contains an invalid packed kernel: {where!r} {fault}")
    return leaf


def value(described: dict[str, Any], arrays: Sequence[Any]) -> Any:
    """The leaf itself, made of arrays, abstract arrays or shardings."""
    if described["kind"] == "empty":
        return {}
    if described["kind"] == "array":
        return arrays[0]
    static: dict[str, Any] = {
        "contracting_axes": tuple(described["contracting_axes"]),
        "kernel_ndim": described["kernel_ndim"],
        "config": _CONFIGS[described["kind"]](**described["config"]),
        "dtype": DTYPES[described["dtype"]],
    }
    if described["kind"] == "int8":
        return PackedInt8(*arrays, **static)
    return PackedTernary(*arrays, length=described["length"], **static)


def packed_fault(described: dict[str, Any]) -> str | None:
    """What is wrong with a packed kernel's static data; None if nothing."""
    shape, ndim = described["shape"], described["kernel_ndim"]
    if not _safetensors.is_shape(shape, 1) or type(ndim) is not int or not 2 <= ndim <= len(shape):
        return f"has shape {shape!r} and a kernel_ndim of {ndim!r}"
    axes = described["contracting_axes"]
    if (
        not _safetensors.is_ints(axes, -ndim)
        or not axes
        or max(axes) >= 0
        or axes != sorted({*axes})
    ):
        return f"has contracting_axes {axes!r}; they are negative and ascending"
    length = described.get("length", shape[axes[-1]])
    if type(length) is not int or length != shape[axes[-1]]:
        return f"has a length of {length!r} and shape {shape!r}"
    if not jnp.issubdtype(DTYPES.get(described["dtype"], np.dtype(object)), jnp.floating):
        return f"stands for a kernel of dtype {described['dtype']!r}, not floating point"
    kind = _CONFIGS[described["kind"]]
    config, fields = described["config"], {f.name for f in dataclasses.fields(kind)}
    known = fields - YOUNGER.keys()
    if not isinstance(config, dict) or not known <= set(config) <= fields:
        return f"has a config {config!r}; its fields are {sorted(known)}"
    try:
        made = kind(**config)
    except (TypeError, ValueError, OverflowError) as error:
        return f"has no valid config: {str(error).rstrip('.')}"
    if stated_fields(made).keys() != config.keys():
        return f"has a config {config!r}, which states a default"
    if not has_blocks(made, [shape[a] for a in axes]):
        return f"has a rotation, and {length} weights along an axis have no blocks to rotate"
    return None


def is_younger(described: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some config states a field that earlier versions do not know."""
    return any(YOUNGER.keys() & one.get("config", {}).keys() for one in described)


def form_fault(
    described: dict[str, Any],
    codes: AnyArray | jax.ShapeDtypeStruct,
    scale: AnyArray | jax.ShapeDtypeStruct,
) -> str | None:
    """What is wrong with the dtypes or the shapes of codes and scale; None if nothing."""
    # Of the described kernel, not of the arrays; codes are two bits in memory, dense or not.
    dtype, shape = parts_of(described, ())[0][2:4]
    fault = intact.codes_fault(codes, dtype, shape, described["shape"])
    return fault or scale_fault(described, scale.dtype.name, scale.shape)


def scale_fault(described: dict[str, Any], dtype: str, scale: tuple[int, ...]) -> str | None:
    """What is wrong with the dtype or the shape of a packed kernel's scale; None if nothing."""
    batch = len(described["shape"]) - described["kernel_ndim"]
    planes, at = described["config"].get("planes", 1), described["contracting_axes"][0] - 1
    fault = intact.scale_fault(dtype, scale, stored_shape(described), batch)
    if fault or planes == 1 or scale[at] == planes:
        return fault
    return intact.planes_fault(scale, planes)
