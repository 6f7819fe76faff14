"""One array of a leaf: in memory, in a file, and which of its bytes are refused.

What is refused on the way in is refused on the way out, by the same functions.

A dtype that safetensors has no name for (int4, complex128, some float8) is
stored as its bytes, uint8 with one more axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax._packed import trits
from bitnet_jax.io import _safetensors

_RAW = ("complex128", "int4", "uint4", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz")

DTYPES = {name: np.dtype(jnp.dtype(name)) for name in (*_safetensors.TAGS, *_RAW)}

Path = tuple[str | int, ...]

_DENSE = ".trits"  # the end of the name of codes at five trits a byte

_FAULTS = {
    "bits": "{} bytes with a code of 3, or padding that is not zero",
    "trits": "{} bytes that are no five codes, or padding that is not zero",
    "scale": "a scale that is not finite and > 0",
    "int8": "{} codes of -128; they are -127 to 127",
    "bool": "{} booleans that are neither 0 nor 1",
}


def name_of(path: Sequence[str | int]) -> str:
    """The keys of a path joined by ``/``."""
    return "/".join(str(key) for key in path)


class Part(NamedTuple):
    """One array of a leaf: what it is in memory, what it is in a file, and what its bytes may be.

    Attributes:
      owner: the name of the leaf.
      end: what follows that in the name of the tensor.
      dtype: of the array.
      shape: of the array.
      rule: which bytes are refused; a key of ``_FAULTS`` or nothing.
      axis: of packed codes, the packed one.
      length: how many codes lie along it.
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
        """Whether a file holds it at five trits a byte."""
        return self.end == _DENSE

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """How a file holds it: the dtype's name in the header, and the shape."""
        if self.dense:
            return _safetensors.TAGS["uint8"], (trits.dense_length(self.nbytes),)
        if self.dtype in _safetensors.TAGS:
            return _safetensors.TAGS[self.dtype], self.shape
        return _safetensors.TAGS["uint8"], (*self.shape, DTYPES[self.dtype].itemsize)

    def view(self, raw: np.ndarray) -> np.ndarray:
        """The array whose bytes in memory are these."""
        return raw.view(DTYPES[self.dtype]).reshape(self.shape)

    def count_wrong(self, raw: np.ndarray, start: int) -> int:
        """How many of some bytes, the first of index ``start``, no save would write."""
        if self.rule in ("bits", "trits"):
            return trits.count_invalid(raw, start, self.shape, self.axis, self.length)
        if self.rule == "scale":
            scale = raw.view(np.float32)
            return 0 if scale.min() > 0 and scale.max() < np.inf else 1  # a NaN is neither
        if self.rule == "int8":
            return int(np.count_nonzero(raw == 0x80))
        return int(np.count_nonzero(raw > 1)) if self.rule == "bool" else 0

    def fault(self, count: int) -> str:
        """What is wrong with it, where :meth:`count_wrong` counted."""
        return f"has {_FAULTS[self.rule].format(count)}"

    def count_all(self, array: Any) -> int:
        """:meth:`count_wrong` of a whole array, looking at a chunk at a time."""
        if not self.rule:
            return 0
        raw = host_bytes(array)
        return sum(self.count_wrong(raw[c], c.start) for c in _safetensors.chunks_of(raw.size))


def parts_of(described: dict[str, Any], scale: tuple[int, ...]) -> list[Part]:
    """The arrays of a leaf, as it is described and with a scale of this shape."""
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
    codes = trits.packed_shape(shape, axis)
    return [Part(where, end, "uint8", codes, rule, axis, described["length"]), scales]


def host_bytes(value: Any) -> np.ndarray:
    """The bytes of an array in native byte order and C order; the array keeps no copy of them."""
    if isinstance(value, jax.Array):
        value = _fetch(value)
    # safetensors reads memory as it lies.
    array = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
    return array.reshape(-1).view(np.uint8)


def _fetch(value: jax.Array) -> np.ndarray:
    """An array as NumPy holds it; JAX on a CPU lends its memory."""
    with jax.ensure_compile_time_eval():
        whole = np.empty(value.shape, value.dtype) if len(value.sharding.device_set) > 1 else None
        for shard in value.addressable_shards:
            if shard.replica_id:
                continue
            data = shard.data
            # An array keeps what was fetched of it from another memory: a copy goes with its own.
            if shard.device.platform != "cpu" or data.dtype.name in ("int4", "uint4"):
                data = jnp.copy(data)
            if whole is None:
                return np.asarray(data)
            whole[shard.index] = np.asarray(data)
    assert whole is not None
    return whole
