"""The block formats of GGUF, each read by a few lines of NumPy.

A row of weights is cut into blocks; a block holds its codes and a float16 scale d::

    Q8_0   32   d, then 32 int8                           value d * q
    Q4_1   32   d, a float16 m, then 16 bytes             value d * q + m; q is the low half of
                                                          byte i for element i, the high half
                                                          for element 16 + i
    TQ2_0 256   64 bytes, then d                          byte 32 h + m, bits 2 l: element
                                                          128 h + 32 l + m
    TQ1_0 256   48 and 4 bytes, then d                    five (four) trits to a byte
    Q2_0   64   d, then 16 bytes                          byte j, bits 2 i: element 4 j + i
          128   d, then 32 bytes                          the same

A ternary code is stored as code + 1. The value 3, bytes that no five trits make, and
scales that are negative or not finite are refused. A scale of 0 stands for zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bitnet_jax.io._safetensors import FormatError

_Read = Callable[[np.ndarray], np.ndarray]


class Block(NamedTuple):
    """How a block of weights is stored.

    Attributes:
      name: llama.cpp's.
      length: weights.
      nbytes: of the block.
      floats: (blocks, nbytes) -> values, (blocks, length).
      ternary: (blocks, nbytes) -> codes (blocks, length), int8, and scales (blocks,), float32.
    """

    name: str
    length: int
    nbytes: int
    floats: _Read
    ternary: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at a byte of every block, as float32."""
    raw = np.ascontiguousarray(blocks[:, at : at + 2])
    return raw.view("<f2")[:, 0].astype(np.float32)


def _scales(blocks: np.ndarray, at: int) -> np.ndarray:
    scale = _half(blocks, at)
    bad = int(np.count_nonzero(~(np.isfinite(scale) & (scale >= 0))))
    if bad:
        raise FormatError(f"has {bad} scales that are negative, NaN or Inf")
    return scale


def _float32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4")


def _float16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2")


def _bfloat16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(ml_dtypes.bfloat16)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)[:, None]


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles.astype(np.float32) * _half(blocks, 0)[:, None] + _half(blocks, 2)[:, None]


def _fields(raw: np.ndarray) -> np.ndarray:
    """The four two-bit fields of bytes, on a new last axis."""
    return raw[..., None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)


def _codes(fields: np.ndarray) -> np.ndarray:
    threes = int(np.count_nonzero(fields == 3))
    if threes:
        raise FormatError(f"holds the code 3 in {threes} places")
    return fields.astype(np.int8) - np.int8(1)


def _tq2_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fields = _fields(blocks[:, :64].reshape(-1, 2, 32))  # (block, h, m, l)
    codes = _codes(fields.transpose(0, 1, 3, 2).reshape(-1, 256))
    return codes, _scales(blocks, 64)


def _tq1_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Element (n, m) of each part is trit n of byte m.
    parts = ((slice(0, 32), 5), (slice(32, 48), 5), (slice(48, 52), 4))
    codes = [_trits(blocks[:, where], n).reshape(len(blocks), -1) for where, n in parts]
    return np.concatenate(codes, axis=1), _scales(blocks, 52)


def _trits(raw: np.ndarray, count: int) -> np.ndarray:
    """Codes (block, trit, byte) of bytes that hold ``ceil(256 v / 243)``, v in base three."""
    value = (raw.astype(np.uint16) * 243) >> 8
    wrong = (value * 256 + 242) // 243 != raw
    if count == 4:  # the fifth trit is not used
        wrong |= value % 3 != 0
    bad = int(np.count_nonzero(wrong))
    if bad:
        raise FormatError(f"has {bad} bytes that no five trits make")
    powers = np.array([81, 27, 9, 3, 1][:count], np.uint16)[:, None]
    return (value[:, None] // powers % 3).astype(np.int8) - np.int8(1)


def _q2_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fields = _fields(blocks[:, 2:])
    return _codes(fields.reshape(len(blocks), -1)), _scales(blocks, 0)


def _ternary(name: str, length: int, nbytes: int, read: Callable[..., tuple]) -> Block:
    def floats(blocks: np.ndarray) -> np.ndarray:
        codes, scale = read(blocks)
        return codes.astype(np.float32) * scale[:, None]

    return Block(name, length, nbytes, floats, read)


# By llama.cpp's number; of several layouts the later one comes first.
TYPES: dict[int, tuple[Block, ...]] = {
    0: (Block("F32", 1, 4, _float32),),
    1: (Block("F16", 1, 2, _float16),),
    3: (Block("Q4_1", 32, 20, _q4_1),),
    8: (Block("Q8_0", 32, 34, _q8_0),),
    30: (Block("BF16", 1, 2, _bfloat16),),
    34: (_ternary("TQ1_0", 256, 54, _tq1_0),),
    35: (_ternary("TQ2_0", 256, 66, _tq2_0),),
    42: (_ternary("Q2_0", 64, 18, _q2_0), _ternary("Q2_0", 128, 34, _q2_0)),
}
