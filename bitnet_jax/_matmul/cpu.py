"""The native CPU implementation: C++ behind XLA's FFI, from the quantiser to the epilogue.

Two custom calls. One makes int8 codes and gamma of each token; layers that share an
input share it, since XLA merges equal calls in a jit. The other multiplies them by a
prepared kernel and applies the epilogue. ``native/layout.h`` has the layout. The int32
sums are exact and the float arithmetic is that of ``int8`` and ``product`` in the same
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

from bitnet_jax._matmul import native, shards
from bitnet_jax._ops.product import group_epilogue
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import (
    Packed,
    PackedInt8,
    Prepared,
    PreparedInt8,
    Stored,
    canonical_bytes,
    lay_out,
    split,
)
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import Activations, CanonicalScale, DTypeLike
from bitnet_jax._quantize.config import ActivationConfig
from bitnet_jax._quantize.int8 import codes_at, gamma_of
from bitnet_jax._quantize.pinned import widened

# Of native/layout.h: outputs of a panel, bytes and rows, panels side by side, padding of x.
_OUTPUTS, _ROW, _BLOCK, _BESIDE, _PADDING = 16, 64, 16, 4, 64

# What the custom calls take and give; other floats pass through float32.
_FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


def unsupported_reason(packed: Packed) -> str | None:
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


def preferred(packed: Packed, preparing: bool) -> bool:
    """Whether it is the fastest for a kernel.

    Not where the portable path is all there is: it is there for its bits. And not from
    a stored int8 kernel: XLA multiplies that sooner than it could be laid out, but for
    a table, whose codes are (outputs, contraction).
    """
    if native.load().paths() == ["portable"]:
        return False
    return preparing or not isinstance(packed, PackedInt8) or _is_table(packed)


def _is_table(packed: PackedInt8) -> bool:
    """An embedding, (outputs, contraction)."""
    return packed.contracting_axes == (-1,) and packed.kernel_ndim == 2


def prepare(packed: Stored) -> Prepared:
    """Lays codes out in panels of outputs."""
    spec = _spec_of(packed, None, _FLOATS[0])
    return lay_out(packed, _lay_out(spec, _stored_codes(packed)), "cpu")


def _stored_codes(packed: Stored) -> UInt8[Array, "*b r n"] | Int8[Array, "*b k n"]:
    """Canonical bytes or int8 codes; a table stays (outputs, contraction)."""
    if not isinstance(packed, PackedInt8):
        return canonical_bytes(packed)
    if _is_table(packed):
        return packed.codes
    return kernel_axes.to_canonical(packed.codes, packed.axes)


def _lay_out(
    spec: _Spec, stored: UInt8[Array, "*b r n"] | Int8[Array, "*b k n"]
) -> UInt8[Array, "*b bytes"]:
    """Panels of outputs, flat."""
    n = stored.shape[-2] if spec.table else stored.shape[-1]
    # A group is laid out on its own, whole panels of it; then flat, as XLA slices fastest.
    size = spec.groups * math.prod(_panel_shape(spec.int8, spec.depth, n))
    shape = jax.ShapeDtypeStruct((*stored.shape[:-2], size), jnp.uint8)
    return jax.ffi.ffi_call(native.LAY_OUT, shape, vmap_method="broadcast_all")(
        stored,
        last=np.int64(spec.last),
        depth=np.int64(spec.depth),
        int8=spec.int8,
        transposed=spec.table,
    )


def contract(
    x: Activations, packed: Packed, activations: ActivationConfig, dtype: DTypeLike
) -> Float[Array, "..."]:
    """The product, from float to float."""
    batch, _, outputs = split(packed)
    rows, k = x.shape[len(batch) : -1], x.shape[-1]
    # The custom calls know (slices, rows, K): batch axes and row axes are flattened.
    x = x.reshape(math.prod(batch), math.prod(rows), k)
    # The calls write float32 or bfloat16; another dtype is cast from float32.
    wide = jnp.dtype(dtype) if jnp.dtype(dtype) in _FLOATS else _FLOATS[0]
    if isinstance(packed, Prepared):
        codes, scale = packed.codes, packed.scale
    else:
        codes, scale = _stored_codes(packed), packed.canonical_scale()
    one_batch = (a.reshape(len(x), *a.shape[len(batch) :]) for a in (codes, scale))
    y = _product(_spec_of(packed, activations, wide))(x, *one_batch)
    return y.astype(dtype).reshape(*batch, *rows, math.prod(outputs))


def sums(x: Int8[Array, "*rows k"], prepared: Prepared) -> Int32[Array, "g *rows n"]:
    """The exact int32 sums of codes that :func:`contract` scales, one for each group."""
    lead, n = len(prepared.batch), math.prod(prepared.outputs)
    rows, count = x.shape[lead:-1], math.prod(prepared.batch)
    panels = prepared.codes.reshape(count, *prepared.codes.shape[lead:])
    x = x.reshape(count, math.prod(rows), x.shape[-1])
    y = _sums(_spec_of(prepared, None, _FLOATS[0]), x, panels, n)
    return y.reshape(y.shape[0], *prepared.batch, *rows, n)


class _Spec(NamedTuple):
    """What is static about a product; JAX transforms functions of arrays only.

    ``outputs`` and ``depth``, the contraction of a group, are the whole kernel's;
    ``last`` is the length of its last contracting axis, along which bytes lie.
    """

    outputs: int
    depth: int
    groups: int
    last: int
    int8: bool
    prepared: bool
    table: bool
    activations: ActivationConfig | None
    dtype: np.dtype


def _spec_of(packed: Packed, activations: ActivationConfig | None, dtype: np.dtype) -> _Spec:
    _, contraction, outputs = split(packed)
    prepared = isinstance(packed, Prepared)
    scale = packed.scale.shape
    # The scale's lengths along the contraction say how many groups there are.
    groups = scale[-2] if prepared else math.prod(packed.axes.split(scale)[1])
    return _Spec(
        outputs=math.prod(outputs),
        depth=math.prod(contraction) // groups,
        groups=groups,
        last=contraction[-1],
        int8=isinstance(packed, (PackedInt8, PreparedInt8)),
        prepared=prepared,
        table=isinstance(packed, PackedInt8) and _is_table(packed),
        activations=activations,
        dtype=dtype,
    )


@functools.cache
def _product(spec: _Spec) -> Callable[..., jax.Array]:
    """(x (B, M, K), panels or stored codes (B, ...), scale (B, G, 1 or N)) -> (B, M, N)."""
    assert spec.activations is not None
    activations = spec.activations

    def panels_of(spec: _Spec, codes: jax.Array) -> jax.Array:
        return codes if spec.prepared else _lay_out(spec, codes)

    def whole(x: Activations, codes: jax.Array, scale: CanonicalScale) -> jax.Array:
        # This device's outputs: of a stored kernel, its shard has them.
        n = spec.outputs if spec.prepared else codes.shape[1 if spec.table else 2]
        x_codes, gamma = _quantize(x, spec.depth, activations)
        panels = panels_of(spec, codes)
        y = jax.ShapeDtypeStruct((*x.shape[:2], n), spec.dtype)
        return jax.ffi.ffi_call(native.MULTIPLY, y)(
            x_codes,
            gamma,
            panels,
            scale,
            depth=np.int64(spec.depth),
            int8=spec.int8,
            qmax=np.float32(activations.qmax),
        )

    def summed(
        x: Activations, codes: jax.Array, scale: CanonicalScale, axes: tuple[str, ...]
    ) -> jax.Array:
        n, k = (codes.shape[a] for a in ((1, 2) if spec.table else (2, 1)))
        k *= cut  # weights of this shard, not bytes
        gamma = gamma_of(x, activations, (-1,))
        if x.shape[-1] == k:  # x is sharded too: a token's maximum is over all shards
            gamma = jax.lax.pmax(gamma, axes)
        else:  # x is whole: this shard's part of it
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * k, k, axis=-1)
        part = spec._replace(depth=k, last=k)
        y = _sums(part, codes_at(x, gamma, activations), panels_of(part, codes), n)
        # Integers are summed over the devices, and scaled once, after: as on one device.
        return group_epilogue(jax.lax.psum(y, axes), gamma, scale, activations.qmax).astype(
            spec.dtype
        )

    # The contraction may be cut between bytes, where one axis is contracted, in one group.
    cut = 1 if spec.int8 else trits.PER_BYTE
    plain = not spec.prepared and spec.groups == 1 and spec.last == spec.depth
    body = shards.Body(
        whole,
        summed,
        codes="p" if spec.prepared else "nk" if spec.table else "kn",
        step=1 if plain and spec.depth % cut == 0 else 0,
    )
    return shards.partitioned(body)


def _sums(
    spec: _Spec, x: Int8[Array, "b m k"], panels: UInt8[Array, "b bytes"], n: int
) -> Int32[Array, "g b m n"]:
    k = x.shape[-1]
    # Codes of 0 behind each row: the kernel reads whole tiles of 64.
    x = jnp.pad(x, [(0, 0), (0, 0), (0, _stride(k, spec.depth) - k)])
    shape = (x.shape[0], spec.groups, x.shape[1], n)
    call = jax.ffi.ffi_call(native.SUMS, jax.ShapeDtypeStruct(shape, jnp.int32))
    y = call(x, panels, depth=np.int64(spec.depth), int8=spec.int8)
    return jnp.moveaxis(y, 1, 0)  # (B, G, M, N) -> (G, B, M, N), as the epilogue has it


def codes_of(prepared: Prepared) -> Int8[Array, "*b k n"]:
    """The canonical int8 codes of a prepared kernel; undoes :func:`prepare`."""
    k, n = math.prod(prepared.contraction), math.prod(prepared.outputs)
    rows = _by_rows(_panels_of(prepared))  # (*b, g, byte rows, panels, 64)
    if isinstance(prepared, PreparedInt8):
        codes = _in_order(rows).astype(jnp.int8) ^ jnp.int8(-128)  # stored as code + 128
    else:
        # Blocks of 16 byte rows are unpacked together; a last, shorter one on its own.
        whole = rows.shape[-3] // _BLOCK * _BLOCK
        parts = [rows[..., :whole, :, :], rows[..., whole:, :, :]]
        codes = jnp.concatenate([_in_order(_unpacked(part)) for part in parts], axis=-2)
        codes = codes.astype(jnp.int8) - jnp.int8(1)
    # Without the padding of each group, and of the last panel.
    codes = codes[..., : k // prepared.scale.shape[-2], :n]
    return codes.reshape(*prepared.batch, k, n)


def rows_of(prepared: PreparedInt8, index: Int[Array, "..."]) -> Int8[Array, "... k"]:
    """Codes of some outputs: rows of an embedding, which contracts over its features."""
    _, panels, rows, _ = _panels_of(prepared).shape
    # A row of the table is one output: its bytes lie in one panel, 4 of each of its rows.
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


def _unpacked(rows: UInt8[Array, "*g r p 64"]) -> UInt8[Array, "*g r4 p 64"]:
    """Blocks of byte rows, whole or one of any length, in the int8 layout."""
    *lead, count, panels, _ = rows.shape
    # (..., blocks, 16, panels, 64) -> (..., blocks, 4, 16, panels, 64): fields before rows.
    block = min(count, _BLOCK) or 1
    blocks = rows.reshape(*lead, count // block, block, panels, _ROW)
    return trits.fields_of(blocks, axis=-3).reshape(*lead, 4 * count, panels, _ROW)


def _in_order(rows: UInt8[Array, "*g r p 64"]) -> UInt8[Array, "*g k n"]:
    """The int8 layout as (contraction, outputs)."""
    *lead, count, panels, _ = rows.shape
    # 64 bytes are 16 outputs of 4 adjacent weights: those 4 go beside their row.
    codes = rows.reshape(*lead, count, panels, _OUTPUTS, 4)
    return jnp.moveaxis(codes, -1, -3).reshape(*lead, 4 * count, panels * _OUTPUTS)


def _panel_shape(int8: bool, depth: int, outputs: int) -> tuple[int, int, int]:
    return -(-outputs // _OUTPUTS), -(-depth // (4 if int8 else 16)), _ROW


def _stride(k: int, depth: int) -> int:
    """Codes of a row and the zeros behind it: its last group is read in whole tiles."""
    return k + -depth % _PADDING


def _quantize(
    x: Activations, depth: int, activations: ActivationConfig
) -> tuple[Int8[Array, "..."], Float32[Array, "..."]]:
    """Codes of each token, padded for groups of ``depth``, and gamma."""
    x = x if x.dtype in _FLOATS else widened(x)
    *lead, k = x.shape
    results = (
        jax.ShapeDtypeStruct((*lead, _stride(k, depth)), jnp.int8),
        jax.ShapeDtypeStruct((*lead, 1), jnp.float32),
    )
    call = jax.ffi.ffi_call(native.QUANTIZE, results, vmap_method="broadcast_all")
    codes, gamma = call(x, qmax=np.float32(activations.qmax), eps=np.float32(activations.eps))
    return codes, gamma
