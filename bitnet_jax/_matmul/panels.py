"""The layout of the native product in plain JAX: codes to panels and back.

``_native/layout.h`` draws it. The native library lays kernels out much faster; these
run where a program is lowered for another platform than a CPU, and give back codes
for gradients and rows of embeddings.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8, UInt8

from bitnet_jax._packed import trits
from bitnet_jax._packed.prepared import Prepared, PreparedInt8
from bitnet_jax._packed.slice_of import cut

# Outputs of a panel, bytes and rows, panels side by side.
_OUTPUTS, _ROW, _BLOCK, _BESIDE = 16, 64, 16, 4

_INT8_ZERO = 128  # a code is stored as code + 128


class Layout(NamedTuple):
    """What the panels of one kernel hold.

    Attributes:
      outputs: of the kernel.
      depth: the contraction of a group.
      groups: each is laid out on its own.
      int8: eight bits a weight, not two.
    """

    outputs: int
    depth: int
    groups: int
    int8: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a group: panels, byte rows, bytes of a row."""
        rows = -(-self.depth // (4 if self.int8 else 16))
        return -(-self.outputs // _OUTPUTS), rows, _ROW

    @property
    def nbytes(self) -> int:
        """Of the kernel, padding included."""
        return self.groups * math.prod(self.shape)


def layout_of(prepared: Prepared) -> Layout:
    """The layout of a prepared kernel, from its static data and its scale's shape."""
    groups = prepared.scale.shape[-2]
    depth = prepared.planes * math.prod(prepared.contraction) // groups
    return Layout(math.prod(prepared.outputs), depth, groups, isinstance(prepared, PreparedInt8))


def lay_out(codes: Int8[Array, "*b k n"], layout: Layout) -> UInt8[Array, "*b bytes"]:
    """Panels of canonical codes, flat: XLA slices a stack of them faster so."""
    *batch, _, n = codes.shape
    panels, rows, _ = layout.shape
    deep = rows * (4 if layout.int8 else 16)
    codes = codes.reshape(*batch, layout.groups, layout.depth, n)
    fields = (codes ^ jnp.int8(-_INT8_ZERO) if layout.int8 else codes + jnp.int8(1)).astype(
        jnp.uint8
    )
    # Padding counts for nothing, see _native/layout.h.
    short = [(0, 0)] * (len(batch) + 1) + [(0, deep - layout.depth), (0, panels * _OUTPUTS - n)]
    fields = jnp.pad(fields, short, constant_values=_INT8_ZERO if layout.int8 else 0)
    laid = _from_order(fields)
    if not layout.int8:
        # Blocks of 16 byte rows are packed together; a last, shorter one on its own.
        whole = rows // _BLOCK * _BLOCK * 4
        parts = [laid[..., :whole, :, :], laid[..., whole:, :, :]]
        laid = jnp.concatenate([_packed(part) for part in parts], axis=-3)
    return _side_by_side(laid).reshape(*batch, layout.nbytes)


def codes_of(panels: UInt8[Array, "*b bytes"], layout: Layout) -> Int8[Array, "*b k n"]:
    """The canonical int8 codes; undoes :func:`lay_out`."""
    *batch, _ = panels.shape
    rows = _by_rows(panels.reshape(*batch, layout.groups, *layout.shape))
    if layout.int8:
        codes = _in_order(rows).astype(jnp.int8) ^ jnp.int8(-_INT8_ZERO)
    else:
        whole = rows.shape[-3] // _BLOCK * _BLOCK
        parts = [rows[..., :whole, :, :], rows[..., whole:, :, :]]
        codes = jnp.concatenate([_in_order(_unpacked(part)) for part in parts], axis=-2)
        codes = codes.astype(jnp.int8) - jnp.int8(1)
    # Without the padding of each group, and of the last panel.
    codes = codes[..., : layout.depth, : layout.outputs]
    return codes.reshape(*batch, layout.groups * layout.depth, layout.outputs)


def rows_of(prepared: PreparedInt8, index: Int[Array, "..."]) -> Int8[Array, "... k"]:
    """Codes of some outputs: rows of an embedding, which contracts over its features."""
    panels, rows, _ = layout_of(prepared).shape
    # A row of the table is one output: its bytes lie in one panel, 4 of each of its rows.
    panel, output = index // _OUTPUTS, index % _OUTPUTS
    first = panel // _BESIDE * _BESIDE
    beside = jnp.minimum(_BESIDE, panels - first)
    # Of the four bytes of row 0, and of the others, counted in fours.
    start = (first * rows + panel - first) * _OUTPUTS + output
    row = jnp.arange(rows, dtype=index.dtype).reshape(*(1,) * index.ndim, rows)
    at = start[..., None] + (beside * _OUTPUTS)[..., None] * row
    table = cut(prepared.codes).reshape(-1, 4)
    codes = jnp.take(table, at, axis=0).reshape(*index.shape, rows * 4)
    return codes[..., : math.prod(prepared.contraction)].astype(jnp.int8) ^ jnp.int8(-_INT8_ZERO)


def _by_rows(panels: UInt8[Array, "*g p r 64"]) -> UInt8[Array, "*g r p 64"]:
    """Byte rows first: panels lie side by side in fours, the last ones in a smaller group."""
    *lead, count, rows, _ = panels.shape
    # (..., panels / beside, byte rows, beside, 64) -> (..., byte rows, panels, 64).
    whole = count // _BESIDE * _BESIDE
    groups = (panels[..., :whole, :, :], _BESIDE), (panels[..., whole:, :, :], count - whole)
    parts = [
        jnp.moveaxis(
            part.reshape(*lead, part.shape[len(lead)] // beside, rows, beside, _ROW), -4, -3
        ).reshape(*lead, rows, part.shape[len(lead)], _ROW)
        for part, beside in groups
        if part.shape[len(lead)]
    ]
    return jnp.concatenate(parts, axis=-2)


def _side_by_side(laid: UInt8[Array, "*g r p 64"]) -> UInt8[Array, "*g bytes"]:
    """Undoes :func:`_by_rows`."""
    *lead, rows, count, _ = laid.shape
    whole = count // _BESIDE * _BESIDE
    fours = laid[..., :whole, :].reshape(*lead, rows, whole // _BESIDE, _BESIDE, _ROW)
    fours = jnp.moveaxis(fours, -3, -4)  # fours of panels first, then their byte rows
    parts = [part.reshape(*lead, -1) for part in (fours, laid[..., whole:, :]) if part.size]
    return jnp.concatenate(parts, axis=-1)


def _unpacked(rows: UInt8[Array, "*g r p 64"]) -> UInt8[Array, "*g r4 p 64"]:
    """Blocks of byte rows, whole or one of any length, in the int8 layout."""
    *lead, count, panels, _ = rows.shape
    # (..., blocks, 16, panels, 64) -> (..., blocks, 4, 16, panels, 64): fields before rows.
    block = min(count, _BLOCK) or 1
    blocks = rows.reshape(*lead, count // block, block, panels, _ROW)
    return trits.fields_of(blocks, axis=-3).reshape(*lead, 4 * count, panels, _ROW)


def _packed(rows: UInt8[Array, "*g r4 p 64"]) -> UInt8[Array, "*g r p 64"]:
    """Undoes :func:`_unpacked`."""
    *lead, count, panels, _ = rows.shape
    block = min(count // 4, _BLOCK) or 1
    fields = rows.reshape(*lead, count // 4 // block, 4, block, panels, _ROW)
    each = (jax.lax.index_in_dim(fields, j, -4, keepdims=False) << (2 * j) for j in range(4))
    return functools.reduce(operator.or_, each).reshape(*lead, count // 4, panels, _ROW)


def _in_order(rows: UInt8[Array, "*g r p 64"]) -> UInt8[Array, "*g k n"]:
    """The int8 layout as (contraction, outputs)."""
    *lead, count, panels, _ = rows.shape
    # 64 bytes are 16 outputs of 4 adjacent weights: those 4 go beside their row.
    codes = rows.reshape(*lead, count, panels, _OUTPUTS, 4)
    return jnp.moveaxis(codes, -1, -3).reshape(*lead, 4 * count, panels * _OUTPUTS)


def _from_order(codes: UInt8[Array, "*g k n"]) -> UInt8[Array, "*g r p 64"]:
    """Undoes :func:`_in_order`."""
    *lead, k, n = codes.shape
    rows = codes.reshape(*lead, k // 4, 4, n // _OUTPUTS, _OUTPUTS)
    return jnp.moveaxis(rows, -3, -1).reshape(*lead, k // 4, n // _OUTPUTS, _ROW)
