"""The native CPU implementation: C++ behind XLA's FFI, from the quantiser to the epilogue.

Two custom calls. One makes int8 codes and gamma of each token; layers that share an
input share it, since XLA merges equal calls in a jit. The other multiplies them by a
prepared kernel and applies the epilogue. ``native/layout.h`` has the layout. The int32
sums are exact and the float arithmetic is that of ``_int8`` and ``_dot`` in the same
order, so the bits are theirs at every instruction set, thread count and batch. Threads
are XLA's own.

A stored kernel is laid out on the way, each time: :func:`prepare` does it once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8, Int32, UInt8

from bitnet_jax import _axes, _packing
from bitnet_jax._int8 import ActivationConfig
from bitnet_jax._matmul import native
from bitnet_jax._packed import (
    Packed,
    PackedInt8,
    Prepared,
    PreparedInt8,
    Stored,
    canonical_bytes,
    lay_out,
    split,
)

# Of native/layout.h: outputs of a panel, bytes and rows, panels side by side, padding of x.
_OUTPUTS, _ROW, _BLOCK, _BESIDE, _PADDING = 16, 64, 16, 4, 64
# What the custom calls take and give; other floats pass through float32.
_FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def cannot(packed: Packed) -> str | None:
    """Why this implementation cannot run a kernel; None if it can."""
    int8 = isinstance(packed, (PackedInt8, PreparedInt8))
    remedy = f"Use implementation={'reference' if int8 else 'xla'!r}."
    reason = native.load().reason
    if reason is not None:
        return f"implementation 'cpu' is not there: {reason}. {remedy}"
    if jax.default_backend() != "cpu":
        return (
            f"implementation 'cpu' runs on a CPU, and the default backend is "
            f"{jax.default_backend()!r}. {remedy}"
        )
    return None


def picked(packed: Packed, preparing: bool) -> bool:
    """Whether it is the fastest for a kernel.

    Not where the portable path is all there is: it is there for its bits. And not from
    a stored int8 kernel: XLA multiplies that sooner than it could be laid out, but for
    a table, which lies the other way round.
    """
    if native.load().paths() == ["portable"]:
        return False
    return preparing or not isinstance(packed, PackedInt8) or _is_table(packed)


def _is_table(packed: PackedInt8) -> bool:
    """An embedding, (outputs, contraction)."""
    return packed.contracting_axes == (-1,) and packed.kernel_ndim == 2


def prepare(packed: Stored) -> Prepared:
    """Lays codes out in panels of outputs."""
    reason = cannot(packed)
    if reason is not None:
        raise NotImplementedError(f"prepare: {reason}")
    batch, contraction, outputs = packed.axes.split(packed.shape)
    int8 = isinstance(packed, PackedInt8)
    # A table contracts over its last axis: it is read as it lies, and not transposed first.
    transposed = isinstance(packed, PackedInt8) and _is_table(packed)
    if transposed:
        stored = packed.codes
    else:
        stored = _axes.canonical(packed.codes, packed.axes) if int8 else canonical_bytes(packed)
    groups = packed.canonical_scale().shape[-2]
    depth, n = math.prod(contraction) // groups, math.prod(outputs)
    size = groups * math.prod(_panel_shape(int8, depth, n))
    shape = jax.ShapeDtypeStruct((*batch, size), jnp.uint8)
    call = jax.ffi.ffi_call(native.LAY_OUT, shape, vmap_method="broadcast_all")
    panels = call(
        stored,
        last=np.int64(contraction[-1]),
        depth=np.int64(depth),
        int8=int8,
        transposed=transposed,
    )
    return lay_out(packed, panels, "cpu")


def contract(
    x: Float[Array, "*b *m k"],
    packed: Packed,
    activations: ActivationConfig,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*b *m n"]:
    """The product, from float to float.

    Raises:
      NotImplementedError: no library.
    """
    reason = cannot(packed)
    if reason is not None:
        raise NotImplementedError(f"matmul: {reason}")
    prepared = packed if isinstance(packed, Prepared) else prepare(packed)
    batch, _, outputs = split(prepared)
    groups, n = prepared.scale.shape[-2], math.prod(outputs)
    rows, k = x.shape[len(batch) : -1], x.shape[-1]
    x = x.reshape(math.prod(batch), math.prod(rows), k)
    codes, gamma = _quantize(x, k // groups, activations)
    wide = jnp.dtype(dtype) if jnp.dtype(dtype) in _FLOATS else _FLOATS[0]
    spec = _Spec(n, k // groups, isinstance(prepared, PreparedInt8), activations.qmax, wide)
    y = _multiply(spec)(codes, gamma, *_slices(prepared))
    return y.astype(dtype).reshape(*batch, *rows, n)


def sums(x: Int8[Array, "*b *m k"], prepared: Prepared) -> Int32[Array, "g *b *m n"]:
    """The exact int32 sums of codes that :func:`contract` scales, one for each group."""
    batch, _, outputs = split(prepared)
    groups, n = prepared.scale.shape[-2], math.prod(outputs)
    rows, k = x.shape[len(batch) : -1], x.shape[-1]
    depth = k // groups
    x = x.reshape(math.prod(batch), math.prod(rows), k)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, _stride(k, depth) - k)])
    shape = (x.shape[0], groups, x.shape[1], n)
    y = jax.ffi.ffi_call(native.SUMS, jax.ShapeDtypeStruct(shape, jnp.int32))(
        x,
        _slices(prepared)[0],
        depth=np.int64(depth),
        int8=isinstance(prepared, PreparedInt8),
    )
    return jnp.moveaxis(y.reshape(*batch, groups, *rows, n), len(batch), 0)


def codes_of(prepared: Prepared) -> Int8[Array, "*b k n"]:
    """The canonical int8 codes of a prepared kernel; undoes :func:`prepare`."""
    k, n = math.prod(prepared.contraction), math.prod(prepared.outputs)
    rows = _by_rows(_panels_of(prepared))  # (*b, g, byte rows, panels, 64)
    if isinstance(prepared, PreparedInt8):
        codes = _in_order(rows).astype(jnp.int8) ^ jnp.int8(-128)
    else:
        whole = rows.shape[-3] // _BLOCK * _BLOCK
        parts = [rows[..., :whole, :, :], rows[..., whole:, :, :]]
        codes = jnp.concatenate([_in_order(_unpacked(part)) for part in parts], axis=-2)
        codes = codes.astype(jnp.int8) - jnp.int8(1)
    codes = codes[..., : k // prepared.scale.shape[-2], :n]
    return codes.reshape(*prepared.batch, k, n)


def rows_of(prepared: PreparedInt8, index: Int[Array, "..."]) -> Int8[Array, "... k"]:
    """Codes of some outputs: rows of an embedding, which contracts over its features."""
    _, panels, rows, _ = _panels_of(prepared).shape
    panel, output = index // _OUTPUTS, index % _OUTPUTS
    first = panel // _BESIDE * _BESIDE
    beside = jnp.minimum(_BESIDE, panels - first)
    # Of the four bytes of row 0, and of the others, counted in fours.
    start = (first * rows + panel - first) * _OUTPUTS + output
    row = jnp.arange(rows, dtype=index.dtype).reshape(*(1,) * index.ndim, rows)
    at = start[..., None] + (beside * _OUTPUTS)[..., None] * row
    codes = jnp.take(prepared.codes.reshape(-1, 4), at, axis=0).reshape(*index.shape, rows * 4)
    return codes[..., : math.prod(prepared.contraction)].astype(jnp.int8) ^ jnp.int8(-128)


def _panels_of(prepared: Prepared) -> UInt8[Array, "*b g p r 64"]:
    """The flat codes as panels: flat, since XLA slices a stack of them faster so."""
    int8, n = isinstance(prepared, PreparedInt8), math.prod(prepared.outputs)
    groups = prepared.scale.shape[-2]
    shape = _panel_shape(int8, math.prod(prepared.contraction) // groups, n)
    return prepared.codes.reshape(*prepared.batch, groups, *shape)


def _by_rows(panels: UInt8[Array, "*g p r 64"]) -> UInt8[Array, "*g r p 64"]:
    """Byte rows first: panels lie side by side in fours, the last ones in a smaller group."""
    *lead, count, rows, _ = panels.shape
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


def _unpacked(rows: UInt8[Array, "*g r p 64"]) -> UInt8[Array, "*g r4 p 64"]:
    """Blocks of byte rows, whole or one of any length, in the int8 layout."""
    *lead, count, panels, _ = rows.shape
    block = min(count, _BLOCK) or 1
    blocks = rows.reshape(*lead, count // block, block, panels, _ROW)
    return _packing.fields_of(blocks, axis=-3).reshape(*lead, 4 * count, panels, _ROW)


def _in_order(rows: UInt8[Array, "*g r p 64"]) -> UInt8[Array, "*g k n"]:
    """The int8 layout as (contraction, outputs)."""
    *lead, count, panels, _ = rows.shape
    codes = rows.reshape(*lead, count, panels, _OUTPUTS, 4)
    return jnp.moveaxis(codes, -1, -3).reshape(*lead, 4 * count, panels * _OUTPUTS)


def _panel_shape(int8: bool, depth: int, outputs: int) -> tuple[int, int, int]:
    return -(-outputs // _OUTPUTS), -(-depth // (4 if int8 else 16)), _ROW


def _slices(prepared: Prepared) -> tuple[UInt8[Array, "b bytes"], Float32[Array, "b g n"]]:
    """Panels and scale with one batch axis."""
    count, lead = math.prod(prepared.batch), len(prepared.batch)
    panels, scale = prepared.codes, prepared.scale
    return panels.reshape(count, *panels.shape[lead:]), scale.reshape(count, *scale.shape[lead:])


def _stride(k: int, depth: int) -> int:
    """Codes of a row and the zeros behind it: its last group is read in whole tiles."""
    return k + -depth % _PADDING


def _quantize(
    x: Float[Array, "..."], depth: int, activations: ActivationConfig
) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """Codes of each token, padded for groups of ``depth``, and gamma."""
    x = x if x.dtype in _FLOATS else x.astype(_FLOATS[0])
    *lead, k = x.shape
    results = (
        jax.ShapeDtypeStruct((*lead, _stride(k, depth)), jnp.int8),
        jax.ShapeDtypeStruct((*lead, 1), jnp.float32),
    )
    call = jax.ffi.ffi_call(native.QUANTIZE, results, vmap_method="broadcast_all")
    codes, gamma = call(x, qmax=np.float32(activations.qmax), eps=np.float32(activations.eps))
    return codes, gamma


class _Spec(NamedTuple):
    """What is static about a product: custom_vmap knows arrays only."""

    outputs: int
    depth: int
    int8: bool
    qmax: int
    dtype: np.dtype


@functools.cache
def _multiply(spec: _Spec) -> Callable[..., jax.Array]:
    """(codes (B, M, K), gamma (B, M, 1), panels (B, bytes), scale (B, G, 1 or N)) -> (B, M, N)."""

    @jax.custom_batching.custom_vmap
    def multiply(codes, gamma, panels, scale):
        y = jax.ShapeDtypeStruct((*codes.shape[:2], spec.outputs), spec.dtype)
        return jax.ffi.ffi_call(native.MULTIPLY, y)(
            codes,
            gamma,
            panels,
            scale,
            depth=np.int64(spec.depth),
            int8=spec.int8,
            qmax=np.float32(spec.qmax),
        )

    @multiply.def_vmap
    def one_call(size, mapped, *operands):
        """Mapped rows are more rows, mapped kernels are more slices: one call, and no loop."""

        def spread(operands, mapped):
            pairs = zip(operands, mapped, strict=True)
            return [a if m else jnp.broadcast_to(a, (size, *a.shape)) for a, m in pairs]

        slices, rows = operands[0].shape[mapped[0] :][:2]
        if any(mapped[2:]):
            stacked = (a.reshape(size * slices, *a.shape[2:]) for a in spread(operands, mapped))
            return multiply(*stacked).reshape(size, slices, rows, spec.outputs), True
        codes, gamma = (
            a.swapaxes(0, 1).reshape(slices, size * rows, a.shape[-1])
            for a in spread(operands[:2], mapped[:2])
        )
        y = multiply(codes, gamma, *operands[2:])
        return y.reshape(slices, size, rows, spec.outputs).swapaxes(0, 1), True

    return multiply
