"""The native CPU implementation: a C++ product of int8 activations and two-bit codes.

``native/product.h`` has the layout. It gives the int32 sums, which are exact at
every instruction set and thread count; quantiser and epilogue are those of the
other implementations, so the bits are too. Threads are XLA's own.

Groups of weights along the contraction become a batch axis: each is padded to
whole blocks of its own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8, Int32, UInt8

from bitnet_jax import _axes, _dot, _packing
from bitnet_jax._matmul import native
from bitnet_jax._packed import Packed, PackedInt8, PackedTernary, PreparedTernary, lay_out

_OUTPUTS, _DEPTH = 16, 256  # of a panel, and of a block: native/product.h
_MOST = 2**18  # weights along the contraction: kMostDepth


def cannot(packed: Packed) -> str | None:
    """Why this implementation cannot run a kernel; None if it can."""
    if isinstance(packed, PackedInt8):
        return "implementation 'cpu' multiplies two-bit codes. Use implementation='reference'."
    reason = native.load().reason
    if reason is not None:
        return f"implementation 'cpu' is not there: {reason}. Use implementation='xla'."
    if jax.default_backend() != "cpu":
        return (
            f"implementation 'cpu' runs on a CPU, and the default backend is "
            f"{jax.default_backend()!r}. Use implementation='xla'."
        )
    if isinstance(packed, PreparedTernary):
        return None
    _, contraction, _ = packed.axes.split(packed.shape)
    if math.prod(contraction) > _MOST:
        return (
            f"implementation 'cpu' sums up to {_MOST} weights, got {math.prod(contraction)}. "
            "Use implementation='xla'."
        )
    return None


def picked() -> bool:
    """Not where the portable path is all there is: it is there for its bits, slower than XLA."""
    return native.load().paths() != ["portable"]


def prepare(packed: PackedTernary) -> PreparedTernary:
    """Lays codes out in panels of outputs and blocks of the contraction."""
    reason = cannot(packed)
    if reason is not None:
        raise NotImplementedError(f"prepare: {reason}")
    codes = _axes.canonical(packed.int8_codes(), packed.axes)
    return lay_out(packed, _panels(codes, packed.canonical_scale().shape[-2]), "cpu")


def contract(
    x: Int8[Array, "*b *m k"],
    gamma: Float32[Array, "*b *m 1"],
    packed: PackedTernary | PreparedTernary,
    qmax: int,
) -> Float32[Array, "*b *m n"]:
    """Int8 codes of x times the packed codes, then the epilogue.

    Raises:
      NotImplementedError: a stored kernel, or no library.
    """
    reason = cannot(packed)
    if reason is None and isinstance(packed, PackedTernary):
        reason = "implementation 'cpu' runs from prepared kernels. Call bj.prepare(packed) first."
    if reason is not None:
        raise NotImplementedError(f"matmul: {reason}")
    assert isinstance(packed, PreparedTernary)
    sums = _sums(x, packed.codes, math.prod(packed.outputs))
    return _dot.finish(sums, gamma, packed.scale, qmax)


def codes_of(prepared: PreparedTernary) -> Int8[Array, "*b k n"]:
    """The canonical int8 codes of a prepared kernel; undoes :func:`prepare`."""
    fields = _packing.fields_of(prepared.codes, axis=-1)  # (*b, g, panels, blocks, 16, 4, 64)
    lead, (panels, blocks) = fields.shape[:-5], fields.shape[-5:-3]
    fields = fields.reshape(*lead, panels, blocks, 16, 4, _OUTPUTS, 4)
    order = (1, 3, 2, 5, 0, 4)  # block, field, row, byte; panel, output
    start = len(lead)
    fields = fields.transpose(*range(start), *(start + axis for axis in order))
    fields = fields.reshape(*lead, blocks * _DEPTH, panels * _OUTPUTS)
    k = math.prod(prepared.contraction)
    codes = fields[..., : k // lead[-1], : math.prod(prepared.outputs)].astype(jnp.int8) - 1
    return codes.reshape(*lead[:-1], k, codes.shape[-1])


def _panels(codes: Int8[Array, "*b k n"], groups: int) -> UInt8[Array, "*b g p d 16 64"]:
    *batch, k, n = codes.shape
    codes = codes.reshape(*batch, groups, k // groups, n)
    short = (-(k // groups) % _DEPTH, -n % _OUTPUTS)
    lead = codes.ndim - 2
    codes = jnp.pad(codes, [(0, 0)] * lead + [(0, s) for s in short])
    blocks, panels = codes.shape[-2] // _DEPTH, codes.shape[-1] // _OUTPUTS
    codes = codes.reshape(*batch, groups, blocks, 4, 16, 4, panels, _OUTPUTS)
    packed = _packing.pack_trits(codes, lead + 1).squeeze(lead + 1)
    # (*b, g, blocks, 16, 4, panels, outputs) -> panels, blocks, 16, outputs, 4
    packed = packed.transpose(*range(lead), *(lead + axis for axis in (3, 0, 1, 4, 2)))
    return packed.reshape(*batch, groups, panels, blocks, 16, 4 * _OUTPUTS)


def _sums(
    x: Int8[Array, "*b *m k"], codes: UInt8[Array, "*b g p d 16 64"], outputs: int
) -> Int32[Array, "g *b *m n"]:
    *batch, groups = codes.shape[:-4]
    rows, k = x.shape[len(batch) : -1], x.shape[-1] // groups
    count = math.prod(batch)
    slices = x.reshape(count, math.prod(rows), groups, k).swapaxes(1, 2)
    slices = slices.reshape(count * groups, math.prod(rows), k)
    like = jnp.zeros((outputs, 0), jnp.int8)  # carries a length through the rule of vmap
    sums = _product(slices, codes.reshape(count * groups, *codes.shape[-4:]), like)
    return jnp.moveaxis(sums.reshape(*batch, groups, *rows, outputs), len(batch), 0)


@jax.custom_batching.custom_vmap
def _product(
    x: Int8[Array, "b m k"], codes: UInt8[Array, "b p d 16 64"], like: Int8[Array, "n 0"]
) -> Int32[Array, "b m n"]:
    sums = jax.ShapeDtypeStruct((*x.shape[:2], like.shape[0]), jnp.int32)
    return jax.ffi.ffi_call(native.TARGET, sums)(x, codes)


@_product.def_vmap
def _one_call(size, mapped, x, codes, like):
    """Mapped rows are more rows, mapped kernels are more slices: one call, and no loop."""
    x_mapped, codes_mapped, _ = mapped
    if not codes_mapped:
        _, slices, rows, k = x.shape
        y = _product(x.swapaxes(0, 1).reshape(slices, size * rows, k), codes, like)
        return y.reshape(slices, size, rows, y.shape[-1]).swapaxes(0, 1), True
    x = x if x_mapped else jnp.broadcast_to(x, (size, *x.shape))
    slices = x.shape[1]
    codes = codes.reshape(size * slices, *codes.shape[2:])
    y = _product(x.reshape(size * slices, *x.shape[2:]), codes, like)
    return y.reshape(size, slices, *y.shape[1:]), True
