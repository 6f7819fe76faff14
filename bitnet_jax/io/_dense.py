"""Five trits to a byte: the dense form of two-bit codes in a file, 1.6 bits a weight.

Five bytes of two-bit codes (``trits``) hold 20 trits. As 3**5 = 243 <= 256, four bytes can
hold them too. A tensor is stored in blocks: four stored planes of m bytes encode five
planes of m bytes of codes, one after the other. m is 2**14, and less in the last block,
whose fifth plane is padded with the byte of four zeros::

    stored   | S0        | S1        | S2        | S3        |             4 m bytes
    codes    | P0        | P1        | P2        | P3        | P4        | 5 m bytes

    S_i = value(P_i) + 81 * field_i(P4)                    0 .. 242
    value(byte) = field_0 + 3 field_1 + 9 field_2 + 27 field_3     0 .. 80
    field_i(byte) = (byte >> 2 i) & 3, a code + 1

So P0 to P3 take one table look-up a byte and P4 a few comparisons, on whole planes that
fit the cache. A chunk of a file is a number of whole blocks, so it can be decoded on its
own. The encoding is unique: a byte above 242 and padding that is not zero are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from bitnet_jax._packed.trits import ZEROS, dense_length

_LARGEST = 242

_BLOCK = 1 << 16  # stored bytes


def _tables() -> tuple[bytes, bytes]:
    """Tables from a byte of two-bit codes to its value, and from a stored byte to P's byte."""
    values, packed = bytearray(256), bytearray([ZEROS] * 256)
    for stored, (d, c, b, a) in enumerate(itertools.product(range(3), repeat=4)):
        byte = a | b << 2 | c << 4 | d << 6
        values[byte] = stored
        for fifth in range(3):
            packed[stored + 81 * fifth] = byte
    return bytes(values), bytes(packed)


_VALUES, _PACKED = _tables()


def _look_up(table: bytes, at: np.ndarray) -> np.ndarray:
    # bytes.translate is several times as fast as NumPy indexing, which widens its indices.
    return np.frombuffer(bytearray(at.data).translate(table), np.uint8)


def packed_slice(stored: slice, size: int) -> slice:
    """The slice of ``size`` bytes of two-bit codes that a stored chunk encodes."""
    return slice(stored.start // 4 * 5, min(stored.stop // 4 * 5, size))


def encode(packed: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, " m"]:
    """The stored bytes of valid two-bit codes, which begin at a block."""
    stored = np.empty(dense_length(packed.size), np.uint8)
    for block, codes in _blocks(stored, packed):
        size = block.size // 4
        planes = np.full(5 * size, ZEROS)
        planes[: codes.size] = codes
        block[:] = _look_up(_VALUES, planes[: 4 * size])
        fifth = planes[4 * size :]
        for i, plane in enumerate(block.reshape(4, size)):
            plane += (fifth >> np.uint8(2 * i) & np.uint8(3)) * np.uint8(81)
    return stored


def decode(stored: UInt8[np.ndarray, " m"], out: UInt8[np.ndarray, " n"]) -> int:
    """Writes the two-bit codes of stored bytes, which begin at a block, into ``out``.

    Returns:
      How many stored bytes are invalid: :func:`encode` never writes them.
    """
    wrong = 0
    for block, codes in _blocks(stored, out):
        size = block.size // 4
        planes = codes if codes.size == 5 * size else np.empty(5 * size, np.uint8)
        planes[: 4 * size] = _look_up(_PACKED, block)
        # field_i(P4) is 0, 1 or 2: how often 81 is in the stored byte.
        fields = (block >= 81).view(np.uint8)
        fields += (block >= 162).view(np.uint8)
        one, two, three, four = fields.reshape(4, size)
        planes[4 * size :] = one | two << np.uint8(2) | three << np.uint8(4) | four << np.uint8(6)
        if planes is not codes:
            codes[:] = planes[: codes.size]
            wrong += int(np.count_nonzero(planes[codes.size :] != ZEROS))
        if block.max() > _LARGEST:
            wrong += int(np.count_nonzero(block > _LARGEST))
    return wrong


def _blocks(stored: np.ndarray, packed: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of the stored bytes and of the two-bit codes of each block."""
    for at in range(0, stored.size, _BLOCK):
        yield stored[at : at + _BLOCK], packed[at // 4 * 5 : (at + _BLOCK) // 4 * 5]
