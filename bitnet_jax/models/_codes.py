"""Two-bit codes of Hugging Face's layout into this library's, and back.

There, a kernel of ``out`` rows is ``(out / 4, in)`` bytes: byte ``[r, c]`` holds the codes
of rows ``r``, ``r + out/4``, ``r + 2 out/4`` and ``r + 3 out/4`` of column c, the first in
the lowest bits. Here it is ``(in / 4, out)`` bytes: byte ``[r, c]`` holds the codes of
inputs ``4 r`` to ``4 r + 3`` of output c. Both store code + 1, and never a 3.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from bitnet_jax._packed.trits import PER_BYTE, ZEROS

_FIELD = np.uint8(3)


def count_threes(packed: UInt8[np.ndarray, "..."]) -> int:
    """How many bytes hold the value 3 in one of their fields."""
    return int(np.count_nonzero(packed & (packed >> np.uint8(1)) & ZEROS))


def from_huggingface(packed: UInt8[np.ndarray, "q k"]) -> UInt8[np.ndarray, "r n"]:
    """Stored bytes (out / 4, in) as (in / 4, out)."""
    quarter, n_in = packed.shape
    short = -n_in % PER_BYTE
    turned = np.ascontiguousarray(packed.T)  # (in, out / 4)
    if short:  # inputs that fill up the last byte have code 0, the field 1, in all rows
        turned = np.concatenate([turned, np.full((short, quarter), ZEROS)])
    by_byte = turned.reshape(-1, PER_BYTE, quarter)
    result = np.zeros((len(by_byte), PER_BYTE * quarter), np.uint8)
    for row in range(PER_BYTE):  # the quarter of the outputs, from bits 2 row
        columns = slice(row * quarter, (row + 1) * quarter)
        for i in range(PER_BYTE):  # the input within its byte, to bits 2 i
            field = (by_byte[:, i] >> np.uint8(2 * row)) & _FIELD
            result[:, columns] |= field << np.uint8(2 * i)
    return result


def to_huggingface(packed: UInt8[np.ndarray, "r n"], n_in: int) -> UInt8[np.ndarray, "q k"]:
    """Bytes (in / 4, out) as stored (out / 4, in); undoes :func:`from_huggingface`."""
    quarter = packed.shape[1] // PER_BYTE
    turned = np.zeros((len(packed), PER_BYTE, quarter), np.uint8)
    for row in range(PER_BYTE):
        columns = packed[:, row * quarter : (row + 1) * quarter]
        for i in range(PER_BYTE):
            field = (columns >> np.uint8(2 * i)) & _FIELD
            turned[:, i] |= field << np.uint8(2 * row)
    return np.ascontiguousarray(turned.reshape(-1, quarter)[:n_in].T)


def pack_rows(codes: np.ndarray) -> UInt8[np.ndarray, "r n"]:
    """Codes (out, in), int8, as bytes (in / 4, out)."""
    fields = (codes.T + np.int8(1)).astype(np.uint8)
    short = -len(fields) % PER_BYTE
    if short:
        fields = np.concatenate([fields, np.ones((short, fields.shape[1]), np.uint8)])
    by_byte = fields.reshape(-1, PER_BYTE, fields.shape[1])
    result = by_byte[:, 0].copy()
    for i in range(1, PER_BYTE):
        result |= by_byte[:, i] << np.uint8(2 * i)
    return result
