"""Trits to two-bit bytes and back. The storage layout, bit by bit.

Four codes that are adjacent along one axis share a byte, the first in the
lowest bits, each stored as code + 1::

    row of codes   c0  c1  c2  c3 | c4 ...         c in {-1, 0, +1}
    byte           (c3+1)(c2+1)(c1+1)(c0+1)        two bits each
    bit             7  6  5  4  3  2  1  0

An axis of length n becomes ceil(n / 4); the last byte is filled up with code 0.
The value 3 never occurs. So 0x55 is four zeros, 0xAA is four times +1, 0x00 is
four times -1, and 81 of the 256 bytes are valid.

Adjacency along the contraction is what lets a packed kernel be sharded like the
float one: any cut at a multiple of four rows is a cut between bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int8, Int32, UInt8

from bitnet_jax._quantize.arrays import AnyArray

PER_BYTE = 4

ZEROS = np.uint8(0x55)

_LOW_BITS = np.uint64(0x5555555555555555)


def packed_length(length: int) -> int:
    """Bytes for so many codes."""
    return -(-length // PER_BYTE)


def packed_shape(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The shape of packed codes, for codes of a shape that are packed along ``axis``."""
    packed = list(shape)
    packed[axis] = packed_length(packed[axis])
    return tuple(packed)


def pack_trits(codes: Int8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """Packs codes along ``axis``, which shrinks to ``ceil(n / 4)``."""
    axis %= codes.ndim
    length = codes.shape[axis]
    short = -length % PER_BYTE
    # Padding is code 0, and code + 1 fits two bits.
    padded = jnp.pad(codes, [(0, short if a == axis else 0) for a in range(codes.ndim)])
    fields = (padded + jnp.int8(1)).astype(jnp.uint8)
    shape = codes.shape
    # (..., n, ...) -> (..., n / 4, 4, ...): the four neighbours that share a byte.
    fields = fields.reshape(*shape[:axis], packed_length(length), PER_BYTE, *shape[axis + 1 :])
    parts = [jax.lax.index_in_dim(fields, i, axis + 1, keepdims=False) for i in range(PER_BYTE)]
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def fields_of(packed: UInt8[AnyArray, "..."], axis: int) -> UInt8[Array, "..."]:
    """The four two-bit fields of each byte, on a new axis before ``axis``."""
    axis %= packed.ndim
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    # (..., bytes, ...) >> (0, 2, 4, 6) -> (..., 4, bytes, ...): field 0 of each byte first.
    shifts = shifts.reshape(*(1,) * axis, -1, *(1,) * (packed.ndim - axis))
    return (jnp.expand_dims(packed, axis) >> shifts) & np.uint8(3)


def unpack_runs(packed: UInt8[Array, "*b r n"], length: int) -> Int8[Array, "*b k n"]:
    """Unpacks runs of ``length`` codes along the second to last axis, each with its own bytes."""
    *batch, rows, n = packed.shape
    count = rows // packed_length(length)
    runs = packed.reshape(*batch, count, packed_length(length), n)
    return unpack_trits(runs, -2, length).reshape(*batch, count * length, n)


def unpack_trits(packed: UInt8[Array, "..."], axis: int, length: int) -> Int8[Array, "..."]:
    """Unpacks along ``axis`` to ``length`` codes; undoes :func:`pack_trits`."""
    axis %= packed.ndim
    # The fields of a byte behind it, (..., bytes, 4, ...), so that they merge in order.
    fields = jnp.moveaxis(fields_of(packed, axis), axis, axis + 1)
    shape = packed.shape
    codes = fields.astype(jnp.int8) - jnp.int8(1)
    codes = codes.reshape(*shape[:axis], shape[axis] * PER_BYTE, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(codes, 0, length, axis=axis)


def dense_length(count: int) -> int:
    """Bytes for so many packed bytes at five trits a byte, as a dense file has them (io/_trits)."""
    return 4 * -(-count // 5)


def count_invalid(
    part: UInt8[np.ndarray, " n"],
    start: int,
    shape: Sequence[int],
    axis: int,
    length: int,
    threes: bool | None = None,
) -> int:
    """How many bytes :func:`invalid` marks; finds that there are none without a large temporary.

    ``threes`` says whether some field is 3, where the caller knows it.
    """
    if threes is None:
        threes = _has_three(part)
    if not threes:
        pad = _padding(length)
        if not pad or all(
            ((row & pad) == (ZEROS & pad)).all() for row in _last(part, start, shape, axis)
        ):
            return 0
    return int(np.count_nonzero(invalid(part, start, shape, axis, length)))


def _has_three(part: UInt8[np.ndarray, " n"]) -> bool:
    """Whether some field is 3."""
    # A 3 is two bits set side by side. Eight bytes at once: the low bit of each field
    # survives (w >> 1) & w only there.
    words = part[: part.size & ~7].view(np.uint64)
    pairs = words >> np.uint64(1)
    pairs &= words
    rest = part[words.nbytes :]
    found = np.bitwise_or.reduce(pairs) & _LOW_BITS
    return bool(found) or bool((rest & (rest >> 1) & ZEROS).any())


def invalid(
    part: UInt8[np.ndarray, " n"], start: int, shape: Sequence[int], axis: int, length: int
) -> Bool[np.ndarray, " n"]:
    """Marks bytes that :func:`pack_trits` cannot have written: a 3, or padding that is not 0.

    Args:
      part: contiguous bytes out of packed codes in C order, all of them or some.
      start: the index of the first of them.
      shape: of the packed codes.
      axis: the packed axis.
      length: how many codes lie along it.

    Returns:
      A mark for each byte.
    """
    wrong = (part & (part >> 1) & ZEROS) != 0  # some field is 3
    pad = _padding(length)
    marks = _last(wrong, start, shape, axis)
    for mark, row in zip(marks, _last(part, start, shape, axis), strict=True):
        mark |= (row & pad) != (ZEROS & pad)
    return wrong


def _padding(length: int) -> np.uint8:
    """The bits of a last byte that hold no code."""
    used = length % PER_BYTE
    return np.uint8(0xFF << 2 * used & 0xFF) if used else np.uint8(0)


def _last(part: np.ndarray, start: int, shape: Sequence[int], axis: int) -> list[np.ndarray]:
    """Views of those of ``part`` that come last along the packed axis."""
    inner = math.prod(shape[axis:][1:])
    before = (shape[axis] - 1) * inner  # in each period, what is last comes after these
    period = before + inner
    if not period:
        return []
    first = min(-start % period, part.size)  # of the first whole period in this part
    end = first + (part.size - first) // period * period
    whole = part[first:end].reshape(-1, period)[:, before:]
    return [part[:first][max(0, before - start % period) :], whole, part[end:][before:]]


def differ(a: UInt8[Array, "... n"], b: UInt8[Array, "... n"]) -> Float32[Array, ""]:
    """How many fields of two packed arrays differ; bits are counted, as in :func:`count`."""
    x = a ^ b
    # A field differs where either of its bits does: both folded into the low one.
    bits = jax.lax.population_count((x | (x >> 1)) & np.uint8(0x55))
    return bits.astype(jnp.float32).sum()


def count(packed: UInt8[Array, "... n"]) -> tuple[Int32[Array, " n"], Int32[Array, " n"]]:
    """How many fields hold 0 and how many +1, for each index of the last axis.

    Padding counts as 0. Bits are counted, not codes: XLA reduces integers
    slowly, and float32 columns are exact below 2**24.
    """
    rows = packed.reshape(-1, packed.shape[-1])

    def ones(mask: int) -> Int32[Array, " n"]:
        bits = jax.lax.population_count(rows & np.uint8(mask))
        return bits.astype(jnp.float32).sum(axis=0).astype(jnp.int32)

    # Code 0 is field 01, the low bit; +1 is 10, the high bit; -1 is 00.
    return ones(0x55), ones(0xAA)
