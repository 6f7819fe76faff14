"""The pure JAX implementation: unpack a block of output columns, multiply, go on.

XLA never fuses the unpacking into the product. So a prepared kernel is cut into
blocks of output columns, ``u8[blocks, byte rows, columns]``, and ``lax.map``
unpacks one block, which stays in cache, and multiplies by it. Memory: one block
of int8 beside the two-bit kernel.

A byte holds four adjacent rows of the kernel. Its fields come out as four
planes, rows 0, 4, 8, ... first; the activations, which are far smaller, are
permuted to that order instead of the weights. Fields are code + 1, so the sum
of x's codes is subtracted once at the end. All of it is exact in int32.

A stored kernel is one block: correct, slower, and unpacked as a whole.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, UInt8

from bitnet_jax._ops.codes_product import gamma_over_planes, over_planes
from bitnet_jax._ops.product import (
    group_epilogue,
    int32_dot,
    joint_groups,
    merge_rows,
    rows_padded,
)
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import Packed, block, canonical_bytes, lay_out, split
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._quantize.arrays import Activations, DTypeLike
from bitnet_jax._quantize.config import ActivationConfig
from bitnet_jax._quantize.int8 import plain_activation_codes

_COLUMNS = 512


def prepare(packed: PackedTernary) -> Prepared:
    """Cuts the kernel into blocks of output columns."""
    rows = canonical_bytes(packed.joined())
    n = rows.shape[-1]
    # The last block is filled up with columns of code 0, which are cut off after the product.
    columns = min(_COLUMNS, n)
    blocks = -(-n // columns)
    short = [(0, 0)] * (rows.ndim - 1) + [(0, blocks * columns - n)]
    rows = jnp.pad(rows, short, constant_values=trits.ZEROS)
    # (*b, byte rows, N) -> (*b, blocks, byte rows, columns): a block is contiguous.
    rows = rows.reshape(*rows.shape[:-1], blocks, columns)
    return lay_out(packed, jnp.swapaxes(rows, -2, -3), "xla")


def layout(prepared: Prepared) -> tuple[int, ...]:
    """The shape of a prepared kernel's codes: (*batch, blocks, byte rows, columns)."""
    *outer, last = prepared.contraction
    n = math.prod(prepared.outputs)
    columns = min(_COLUMNS, n)
    rows = prepared.planes * math.prod(outer) * trits.packed_length(last)
    return (*prepared.batch, -(-n // columns), rows, columns)


def contract(
    x: Activations,
    packed: PackedTernary | Prepared,
    activations: ActivationConfig,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """Int8 codes of x times the packed codes, block by block, then the epilogue."""
    if isinstance(packed, PackedTernary):
        joined = packed.joined()
        codes = canonical_bytes(joined)[..., None, :, :]  # one block of all columns
        scale = joined.canonical_scale()
    else:
        codes, scale = packed.codes, packed.scale
    _, contraction, outputs = split(packed)
    x_codes, gamma = plain_activation_codes(x, activations, (-1,), block(packed))
    # Planes lie behind each other along the contraction.
    x_codes, gamma = over_planes(x_codes, packed.planes), gamma_over_planes(gamma, packed.planes)
    contraction = (packed.planes, *contraction)
    rows = _byte_rows(x_codes, contraction, joint_groups(gamma, scale))
    sums = _sums(rows, codes)[..., : math.prod(outputs)]  # without the padding columns
    return group_epilogue(sums, gamma, scale, activations.qmax).astype(dtype)


def preferred(packed: Packed, preparing: bool) -> bool:
    """Whether it is the fastest for a kernel: not for a stored one, of which it makes one block.

    GPUs unpack the stored layout faster than its own.
    """
    return (preparing and jax.default_backend() != "gpu") or isinstance(packed, Prepared)


def unsupported_reason(packed: Packed, activations: ActivationConfig | None = None) -> str | None:
    """Why this implementation cannot run a kernel; None if it can."""
    if isinstance(packed, PackedInt8):
        return "implementation 'xla' unpacks two-bit codes. Use implementation='reference'."
    _, contraction, _ = split(packed)
    sizes = (packed.config.granularity, activations and activations.group)
    # A byte that two groups share could not be summed for each.
    for group in sizes:
        if not isinstance(group, int) or group == math.prod(contraction):
            continue
        if group % trits.PER_BYTE or contraction[-1] % trits.PER_BYTE:
            kept = " and the stored kernel" if isinstance(packed, Prepared) else ""
            return (
                f"implementation 'xla' needs groups, and a last contracting axis, of a multiple "
                f"of {trits.PER_BYTE}; got groups of {group} along {contraction}. Use "
                f"implementation='reference'{kept}."
            )
    return None


def codes_of(prepared: Prepared) -> Int8[Array, "*b k n"]:
    """The canonical int8 codes of a prepared kernel; undoes :func:`prepare`."""
    # Blocks side by side again, without the padding columns.
    rows = jnp.swapaxes(prepared.codes, -2, -3)
    rows = rows.reshape(*rows.shape[:-2], -1)[..., : math.prod(prepared.outputs)]
    # Each run along the last contracting axis has bytes, and perhaps padding, of its own.
    return trits.unpack_runs(rows, prepared.contraction[-1])


def _byte_rows(
    x: Int8[Array, "*rows k"], contraction: tuple[int, ...], groups: int
) -> Int8[Array, "*rows g r 4"]:
    """x as (*rows, groups, byte rows, 4), padded with zeros where the bytes are."""
    lead, (*outer, last) = x.shape[:-1], contraction
    # Bytes lie along the last contracting axis: each run of it is padded on its own.
    bytes_each = trits.packed_length(last)
    x = x.reshape(*lead, math.prod(outer), last)
    short = bytes_each * trits.PER_BYTE - last
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    rows = math.prod(outer) * bytes_each // groups
    return x.reshape(*lead, groups, rows, trits.PER_BYTE)


def _sums(
    rows: Int8[Array, "*rows g r 4"], codes: UInt8[Array, "*b blocks gr c"]
) -> Int32[Array, "g *rows n"]:
    """Int32 sums of each group; the rows start with the kernel's batch axes."""
    if codes.ndim > 3:  # one batch axis at a time; groups stay in front
        return jax.vmap(_sums, out_axes=1)(rows, codes)
    lead, (groups, *each) = rows.shape[:-3], rows.shape[-3:]  # each: byte rows, and 4
    sums = _row_sums(rows.reshape(math.prod(lead), groups, *each), codes)
    return jnp.moveaxis(sums, 1, 0).reshape(groups, *lead, sums.shape[-1])


@merge_rows
def _row_sums(
    rows: Int8[Array, "m g r 4"], codes: UInt8[Array, "blocks gr c"]
) -> Int32[Array, "m g n"]:
    return rows_padded(lambda rows: _blocked(rows, codes), rows)


def _blocked(
    rows: Int8[Array, "m g r 4"], codes: UInt8[Array, "blocks gr c"]
) -> Int32[Array, "m g n"]:
    m, groups, r, _ = rows.shape
    columns = codes.shape[-1]
    # Rows 0, 4, 8, ... first, as the fields of the bytes come out: (groups, m, 4 * r).
    planes = rows.transpose(1, 0, 3, 2).reshape(groups, m, r * trits.PER_BYTE)

    def block_sums(block: UInt8[Array, "gr c"]) -> Int32[Array, "g m c"]:
        fields = trits.fields_of(block.reshape(groups, r, columns), axis=-2)
        w = fields.astype(jnp.int8).reshape(groups, r * trits.PER_BYTE, columns)
        if groups == 1:  # a batch axis of 1 keeps XLA from its fastest product
            return int32_dot(planes[0], w[0])[None]
        return jax.vmap(int32_dot)(planes, w)

    sums = lax.map(block_sums, codes)  # (blocks, groups, m, columns)
    sums = sums.transpose(2, 1, 0, 3).reshape(m, groups, codes.shape[0] * columns)
    # A field is code + 1: the ones add up to the sum of x's codes.
    return sums - planes.sum(axis=-1, dtype=jnp.int32).T[..., None]
