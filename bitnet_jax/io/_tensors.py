"""One array of a leaf: its form in memory and in a file, and which bytes are invalid.

``save``, ``load``, ``describe`` and ``check`` use the same checks.

A dtype that safetensors has no name for (int4, complex128, some float8) is
stored as its bytes, uint8 with one more axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from bitnet_jax._packed import intact, trits
from bitnet_jax._packed.adapted import is_adapted
from bitnet_jax._packed.stored import with_planes
from bitnet_jax.io import _safetensors

_RAW = ("complex128", "int4", "uint4", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz")

DTYPES = {name: np.dtype(jnp.dtype(name)) for name in (*_safetensors.TAGS, *_RAW)}

Path = tuple[str | int, ...]

AnyArray = jax.Array | np.ndarray | np.generic

_DENSE = ".trits"  # the name of a tensor ends so where it has five trits a byte

_FAULTS = {
    "bits": intact.BITS,
    "trits": "{} bytes that are not five codes, or padding that is not zero",
    "scale": "a scale that is not finite and > 0",
    "int8": intact.INT8,
    "bool": "{} booleans that are neither 0 nor 1",
}


def name_of(path: Sequence[str | int]) -> str:
    """The keys of a path joined by ``/``."""
    return "/".join(str(key) for key in path)


class Part(NamedTuple):
    """One array of a leaf: its dtype and shape, its tensor in a file, and its valid bytes.

    Attributes:
      owner: the name of the leaf.
      end: the rest of the tensor's name, ``".codes"`` for example.
      dtype: of the array in memory.
      shape: of the array in memory.
      rule: which bytes are invalid; a key of ``_FAULTS``, or "" for none.
      axis: the packed axis, for packed codes.
      length: how many codes there are along that axis.
    """

    owner: str
    end: str
    dtype: str
    shape: tuple[int, ...]
    rule: str = ""
    axis: int = 0
    length: int = 0

    @property
    def name(self) -> str:
        """The name of the tensor in a file."""
        return self.owner + self.end

    @property
    def dense(self) -> bool:
        """Whether the file stores it at five trits a byte."""
        return self.end == _DENSE

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """Its form in a file: the dtype's name in the header, and the shape."""
        if self.dense:
            return _safetensors.TAGS["uint8"], (trits.dense_length(self.nbytes),)
        if self.dtype in _safetensors.TAGS:
            return _safetensors.TAGS[self.dtype], self.shape
        return _safetensors.TAGS["uint8"], (*self.shape, DTYPES[self.dtype].itemsize)

    def view(self, raw: np.ndarray) -> np.ndarray:
        """Bytes as the array."""
        return raw.view(DTYPES[self.dtype]).reshape(self.shape)

    def count_wrong(self, raw: np.ndarray, start: int, threes: bool | None = None) -> int:
        """How many bytes of a chunk, which begins at byte ``start``, are invalid.

        ``threes`` says whether a two-bit field of them is 3, where that is known already.
        """
        if self.rule in ("bits", "trits"):
            return trits.count_invalid(raw, start, self.shape, self.axis, self.length, threes)
        if self.rule == "scale":
            scale = raw.view(np.float32)
            return 0 if scale.min() > 0 and scale.max() < np.inf else 1  # NaN fails both
        if self.rule == "int8":
            return int(np.count_nonzero(raw == 0x80))
        return int(np.count_nonzero(raw > 1)) if self.rule == "bool" else 0

    def fault(self, count: int) -> str:
        """The error text for ``count`` invalid bytes."""
        return f"has {_FAULTS[self.rule].format(count)}"

    def count_all(self, array: AnyArray) -> int:
        """:meth:`count_wrong` of a whole array, a chunk at a time."""
        if not self.rule:
            return 0
        raw = host_bytes(array)
        return sum(self.count_wrong(raw[c], c.start) for c in _safetensors.chunks_of(raw.size))


def parts_of(described: dict[str, Any], scale: tuple[int, ...]) -> list[Part]:
    """The arrays of a described leaf, with a scale of the given shape."""
    where, kind = name_of(described["path"]), described["kind"]
    if kind == "empty":
        return []
    dtype, shape = described["dtype"], tuple(described["shape"])
    if kind == "array":
        return [Part(where, "", dtype, shape, "bool" if dtype == "bool" else "")]
    scales = Part(where, ".scale", "float32", scale, "scale")
    if kind == "int8":
        return [Part(where, ".codes", "int8", shape, "int8"), scales]
    end, rule = (_DENSE, "trits") if "stored" in described else (".codes", "bits")
    axis = described["contracting_axes"][-1]
    codes = trits.packed_shape(stored_shape(described), axis)
    return [Part(where, end, "uint8", codes, rule, axis, described["length"]), scales]


def stored_shape(described: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a described kernel's codes: its own, with an axis of planes where it has any."""
    planes = described["config"].get("planes", 1)
    at = described["contracting_axes"][0] - 1 if planes > 1 else None
    return with_planes(described["shape"], at, planes)


def raise_not_an_array(who: str, where: str, value: object) -> NoReturn:
    """Raises on a leaf that is not an array; names its kind and the remedy."""
    if isinstance(value, core.Tracer):
        what, remedy = "a tracer", f"Call {who} outside jit, grad and vmap."
    elif isinstance(value, jax.ShapeDtypeStruct):
        what, remedy = "a ShapeDtypeStruct", "Pass the arrays that it describes."
    elif isinstance(value, (list, tuple)):
        what, remedy = f"a {type(value).__name__}", "Make it a dict with int keys, {0: ...}."
    elif is_adapted(value):
        what = "a kernel with an adapter"
        remedy = "Save the tree that bj.lora.attach was given, and the adapters' kernels beside it."
    elif value is None:
        what, remedy = "None", "Leave it out, or put bj.partition's trees together (bj.combine)."
    elif hasattr(value, "to_dict"):
        what, remedy = f"a {type(value).__name__}", "Save what its to_dict() returns."
    else:
        what, remedy = f"a {type(value).__name__}", "Wrap a number in jnp.asarray."
    raise TypeError(f"{who}: {where} must be an array or a packed kernel, got {what}. {remedy}")


def require_array(who: str, where: str, value: object, *, abstract: bool = False) -> None:
    """Raises unless a value is an array whose bytes can be stored.

    Args:
      who: the function that the error names.
      where: the path of the leaf.
      value: a leaf, or the codes or the scale of one.
      abstract: whether a ``jax.ShapeDtypeStruct`` passes too.
    """
    kinds = (np.ndarray, np.generic, jax.Array, *((jax.ShapeDtypeStruct,) if abstract else ()))
    if isinstance(value, core.Tracer) or not isinstance(value, kinds):
        raise_not_an_array(who, where, value)
    if value.dtype.name not in DTYPES:
        raise TypeError(
            f"{who}: {where} is {value.dtype} of shape {tuple(value.shape)}, a dtype that a "
            "file cannot hold. Cast it; of a random key pass jax.random.key_data(key)."
        )


def host_bytes(value: AnyArray) -> np.ndarray:
    """The bytes of an array on the host, in native byte order and C order."""
    if isinstance(value, jax.Array):
        value = _fetch(value)
    # Files store arrays in C order.
    array = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
    return array.reshape(-1).view(np.uint8)


def _fetch(value: jax.Array) -> np.ndarray:
    """An array as a NumPy array; on a CPU it shares JAX's memory."""
    with jax.ensure_compile_time_eval():
        whole = np.empty(value.shape, value.dtype) if len(value.sharding.device_set) > 1 else None
        for shard in value.addressable_shards:
            if shard.replica_id:
                continue
            data = shard.data
            # A jax.Array caches its host copy for as long as it lives. Fetching from a
            # temporary copy frees that memory again. On a CPU only int4 is fetched by a copy.
            if shard.device.platform != "cpu" or data.dtype.name in ("int4", "uint4"):
                data = jnp.copy(data)
            if whole is None:
                return np.asarray(data)
            whole[shard.index] = np.asarray(data)
    assert whole is not None
    return whole
