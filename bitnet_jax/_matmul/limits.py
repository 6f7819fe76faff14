"""The limits of this machine: how fast it reads, and multiplies in registers.

A product of one row reads its kernel once and does little else; one of many rows
multiplies most of its time. ``doctor`` and the benchmarks time these next to it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt32

from bitnet_jax import _native

STREAMS = (1, 4)  # that :func:`read` takes


def read(array: jax.Array, streams: int = 1) -> UInt32[Array, ""]:
    """Reads an array on all threads, each in so many streams; returns what its words sum to."""
    _native.load()  # registers it
    call = jax.ffi.ffi_call(_native.READ, jax.ShapeDtypeStruct((), jnp.uint32))
    return call(array, streams=np.int64(streams))


def multiply(turns: int) -> Float32[Array, ""]:
    """Multiplies in registers alone, by the path that serves; returns how many operations."""
    _native.load()
    call = jax.ffi.ffi_call(_native.BUSY, jax.ShapeDtypeStruct((), jnp.float32))
    return call(turns=np.int64(turns))
