"""One leaf of a tree as a file describes it: its static data as JSON, its arrays as tensors.

What is refused on the way in is refused on the way out, by the same functions:
a packed kernel in a file keeps the invariants in the docstring of
``PackedTernary`` or ``PackedInt8``, or there is no file.

A dtype that safetensors has no name for (int4, complex128, some float8) is
stored as its bytes, uint8 with one more axis.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from bitnet_jax import _checks, _packing
from bitnet_jax._int8 import Int8Config
from bitnet_jax._packed import PackedInt8, PackedTernary, Prepared, is_stored
from bitnet_jax._ternary import TernaryConfig
from bitnet_jax.io import _container
from bitnet_jax.io._container import Tensor, damaged

_RAW = ("complex128", "int4", "uint4", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz")
_DTYPES = {name: np.dtype(jnp.dtype(name)) for name in (*_container.TAGS, *_RAW)}
_STATIC = {"config", "contracting_axes", "kernel_ndim"}
_FIELDS = {
    "array": {"kind", "path", "dtype", "shape"},
    "packed": {"kind", "path", "dtype", "shape", "length"} | _STATIC,
    "int8": {"kind", "path", "dtype", "shape"} | _STATIC,
    "empty": {"kind", "path"},
}
_CONFIGS = {"packed": TernaryConfig, "int8": Int8Config}

Path = tuple[str | int, ...]


class Leaf(NamedTuple):
    """A leaf's description, as in the metadata, and its arrays by the ends of their names."""

    described: dict[str, Any]
    arrays: dict[str, np.ndarray]


def name_of(path: Sequence[str | int]) -> str:
    """The keys of a path joined by ``/``."""
    return "/".join(str(key) for key in path)


def describe(path: Path, value: Any) -> Leaf:
    """Describes one leaf, and refuses what a file cannot hold."""
    where = name_of(path)
    described: dict[str, Any] = {"path": list(path)}
    if isinstance(value, Mapping):
        return Leaf({**described, "kind": "empty"}, {})
    if isinstance(value, Prepared):
        _checks.stored_layout("save", where, value.implementation)
    if not is_stored(value):
        array = _numpy(where, value)
        about = {"kind": "array", "dtype": array.dtype.name, "shape": list(array.shape)}
        return Leaf({**described, **about}, {"": array})
    arrays = {
        ".codes": _numpy(f"{where}.codes", value.codes),
        ".scale": _numpy(f"{where}.scale", value.scale),
    }
    described |= {
        "kind": "packed" if isinstance(value, PackedTernary) else "int8",
        "dtype": np.dtype(value.dtype).name,
        "shape": list(value.shape) if value.ndim >= value.kernel_ndim else list(value.codes.shape),
        "contracting_axes": list(value.contracting_axes),
        "kernel_ndim": value.kernel_ndim,
        "config": dataclasses.asdict(value.config),
    }
    if isinstance(value, PackedTernary):
        described["length"] = value.length
    fault = _packed_fault(described) or _arrays_fault(described, arrays)
    if fault:
        raise ValueError(f"save: {where} {fault}. Make packed kernels with bj.pack.")
    return Leaf(described, arrays)


def _numpy(where: str, value: Any) -> np.ndarray:
    """An array as NumPy holds it: native byte order, C order, every process's part."""
    if isinstance(value, core.Tracer) or not isinstance(value, (np.ndarray, np.generic, jax.Array)):
        _refuse_leaf(where, value)
    if value.dtype.name not in _DTYPES:
        raise TypeError(
            f"save: {where} is {value.dtype} of shape {tuple(value.shape)}, a dtype that a file "
            "cannot hold. Cast it; of a random key save jax.random.key_data(key)."
        )
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise ValueError(
            f"save: {where} of shape {tuple(value.shape)} is spread over several processes. "
            "Gather the tree first (jax.experimental.multihost_utils.process_allgather)."
        )
    # Not ascontiguousarray, which gives a scalar an axis. safetensors reads memory as it lies.
    return np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")


def _refuse_leaf(where: str, value: Any) -> NoReturn:
    if isinstance(value, core.Tracer):
        what, remedy = "a tracer", "Call save outside jit, grad and vmap."
    elif isinstance(value, jax.ShapeDtypeStruct):
        what, remedy = "a ShapeDtypeStruct", "Save the arrays that it describes."
    elif isinstance(value, (list, tuple)):
        what, remedy = f"a {type(value).__name__}", "Make it a dict with int keys, {0: ...}."
    elif value is None:
        what, remedy = "None", "Leave it out, or put bj.partition's trees together (bj.combine)."
    else:
        what, remedy = f"a {type(value).__name__}", "Wrap a number in jnp.asarray."
    raise TypeError(f"save: {where} must be an array or a packed kernel, got {what}. {remedy}")


def _stored(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """How a file holds an array: the dtype's name in the header, and the shape."""
    if dtype in _container.TAGS:
        return _container.TAGS[dtype], shape
    return _container.TAGS["uint8"], (*shape, _DTYPES[dtype].itemsize)


def tensor(array: np.ndarray) -> Tensor:
    """An array as its bytes."""
    return Tensor(*_stored(array.dtype.name, array.shape), array.reshape(-1).view(np.uint8))


def descriptions(text: str) -> list[dict[str, Any]]:
    """What the metadata declares, each leaf checked on its own."""
    try:
        leaves = json.loads(text)
        canonical = _container.canonical_json(leaves)
    except (ValueError, RecursionError) as error:
        damaged(f"does not describe its leaves: {error}")
    if canonical != text or not isinstance(leaves, list):
        damaged("does not describe its leaves in canonical JSON")
    for leaf in leaves:
        kind = leaf.get("kind") if isinstance(leaf, dict) else None
        if kind not in list(_FIELDS) or set(leaf) != _FIELDS[kind]:
            damaged(f"has a leaf that it describes wrongly, {leaf!r}")
        path = leaf["path"]
        if not isinstance(path, list) or not path or any(type(k) not in (str, int) for k in path):
            damaged(f"has a leaf with the path {path!r}; it must be a list of str and int")
        if kind == "empty":
            continue
        where = name_of(path)
        if leaf["dtype"] not in list(_DTYPES) or not _container.is_ints(leaf["shape"]):
            damaged(f"declares {where!r} as {leaf['dtype']!r} of shape {leaf['shape']!r}")
        fault = _packed_fault(leaf) if kind in _CONFIGS else None
        if fault:
            damaged(f"declares a kernel wrongly: {where!r} {fault}")
    return leaves


def arrays(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The arrays of a leaf by the ends of their names, of the dtypes and shapes declared."""
    where, kind = name_of(described["path"]), described["kind"]
    if kind == "empty":
        return {}
    if kind == "array":
        return {"": _array(where, described["dtype"], described["shape"], tensors)}
    scale = tensors.get(f"{where}.scale")
    found = {
        ".codes": _array(
            f"{where}.codes", _codes_dtype(described), _codes_shape(described), tensors
        ),
        ".scale": _array(f"{where}.scale", "float32", scale.shape if scale else (), tensors),
    }
    fault = _arrays_fault(described, found)
    if fault:
        damaged(f"holds a kernel that is none: {where!r} {fault}")
    return found


def _array(name: str, dtype: str, shape: Any, tensors: dict[str, Tensor]) -> np.ndarray:
    if name not in tensors:
        damaged(f"lacks the tensor {name!r}")
    tensor, (tag, stored) = tensors[name], _stored(dtype, tuple(shape))
    if (tensor.tag, tensor.shape) != (tag, stored):
        damaged(
            f"declares {name!r} as {tag} of shape {stored}, and holds {tensor.tag} of shape "
            f"{tensor.shape}"
        )
    if dtype == "bool" and (tensor.data > 1).any():
        damaged(f"holds booleans that are neither 0 nor 1 in {name!r}")
    try:
        return tensor.data.view(_DTYPES[dtype]).reshape(shape)
    except (ValueError, OverflowError) as error:  # an axis of none beside one of too many
        damaged(f"declares {name!r} of shape {tuple(shape)}, which no array has ({error})")


def value(leaf: Leaf) -> Any:
    """The leaf itself; a 64-bit array stays with NumPy where JAX would cut it to 32."""
    described, arrays = leaf
    if described["kind"] == "empty":
        return {}
    if described["kind"] == "array":
        array = jnp.asarray(arrays[""])
        return array if array.dtype == arrays[""].dtype else arrays[""]
    static: dict[str, Any] = {
        "contracting_axes": tuple(described["contracting_axes"]),
        "kernel_ndim": described["kernel_ndim"],
        "config": _CONFIGS[described["kind"]](**described["config"]),
        "dtype": _DTYPES[described["dtype"]],
    }
    codes, scale = jnp.asarray(arrays[".codes"]), jnp.asarray(arrays[".scale"])
    if described["kind"] == "int8":
        return PackedInt8(codes, scale, **static)
    return PackedTernary(codes, scale, length=described["length"], **static)


def _packed_fault(described: dict[str, Any]) -> str | None:
    """What is wrong with a packed kernel's static data, if anything is."""
    shape, ndim = described["shape"], described["kernel_ndim"]
    if not _container.is_ints(shape, 1) or type(ndim) is not int or not 2 <= ndim <= len(shape):
        return f"has shape {shape!r} and a kernel_ndim of {ndim!r}"
    axes = described["contracting_axes"]
    if not _container.is_ints(axes, -ndim) or not axes or max(axes) >= 0 or axes != sorted({*axes}):
        return f"has contracting_axes {axes!r}; they are negative and ascending"
    length = described.get("length", shape[axes[-1]])
    if type(length) is not int or length != shape[axes[-1]]:
        return f"has a length of {length!r} and shape {shape!r}"
    if not jnp.issubdtype(_DTYPES.get(described["dtype"], np.dtype(object)), jnp.floating):
        return f"stands for a kernel of dtype {described['dtype']!r}, not floating point"
    kind = _CONFIGS[described["kind"]]
    config, fields = described["config"], {f.name for f in dataclasses.fields(kind)}
    if not isinstance(config, dict) or set(config) != fields:
        return f"has a config {config!r}; its fields are {sorted(fields)}"
    try:
        kind(**config)
    except (TypeError, ValueError) as error:
        return f"has no valid config: {str(error).rstrip('.')}"
    return None


def _codes_dtype(described: dict[str, Any]) -> str:
    return "uint8" if described["kind"] == "packed" else "int8"


def _codes_shape(described: dict[str, Any]) -> tuple[int, ...]:
    if described["kind"] == "int8":
        return tuple(described["shape"])
    return _packing.packed_shape(described["shape"], described["contracting_axes"][-1])


def _arrays_fault(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with a packed kernel's codes and scale, if anything is."""
    codes, scale, shape = arrays[".codes"], arrays[".scale"], described["shape"]
    dtype = _codes_dtype(described)
    if codes.dtype != dtype or codes.shape != _codes_shape(described):
        return (
            f"has codes that are {codes.dtype} of shape {codes.shape}; shape {tuple(shape)} "
            f"needs {dtype} of shape {_codes_shape(described)}"
        )
    batch = len(shape) - described["kernel_ndim"]
    fits = len(scale.shape) == len(shape) and scale.shape[:batch] == tuple(shape[:batch])
    if not fits or math.prod(scale.shape) == 0 or any(np.mod(shape, scale.shape)):
        return f"has a scale of shape {scale.shape}, which does not tile shape {tuple(shape)}"
    if scale.dtype != np.float32:
        return f"has a {scale.dtype} scale; it must be float32"
    if not (np.isfinite(scale) & (scale > 0)).all():
        return "has a scale that is not finite and > 0"
    if described["kind"] == "int8":
        wrong = (codes == -128).sum()
        return f"has {int(wrong)} codes of -128; they are -127 to 127" if wrong else None
    wrong = _packing.invalid(codes, described["contracting_axes"][-1], described["length"])
    if wrong.any():
        return f"has {int(wrong.sum())} bytes with a code of 3, or padding that is not zero"
    return None
