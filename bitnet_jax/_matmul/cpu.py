"""The native CPU implementation: C++ behind XLA's FFI, from the quantiser to the epilogue.

Two custom calls. One makes int8 codes and gamma of each token; layers that share an
input share it, since XLA merges equal calls in a jit. The other multiplies them by a
prepared kernel and applies the epilogue. ``_native/layout.h`` has the layout. The int32
sums are exact and the float arithmetic is that of ``int8`` and ``product`` in the same
order, so the bits are theirs at every instruction set, thread count and batch. Threads
are XLA's own.

A stored ternary kernel is laid out on the way, each time: :func:`prepare` does it once. A
stored int8 kernel is multiplied as it lies, by steps that are laid out in a cache. Where a
program is lowered for another platform, or exported, plain JAX multiplies the same codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int32, UInt8

from bitnet_jax import _native
from bitnet_jax._matmul import panels, shards
from bitnet_jax._matmul.panels import Layout, layout_of
from bitnet_jax._native import by_platform
from bitnet_jax._ops.codes_product import (
    FOUR,
    contract_codes,
    cuts_no_four,
    gamma_over_planes,
    merged_planes,
    over_planes,
    planes_apart,
)
from bitnet_jax._ops.product import Product, group_epilogue
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import Packed, Stored, block, canonical_bytes, lay_out, split
from bitnet_jax._packed.prepared import Prepared, PreparedInt8
from bitnet_jax._packed.slice_of import SliceOf, cut
from bitnet_jax._packed.stored import PackedInt8, without_planes
from bitnet_jax._quantize import by_library, kernel_axes
from bitnet_jax._quantize.arrays import Activations, CanonicalScale, DTypeLike, PlaneScale
from bitnet_jax._quantize.config import ActivationConfig
from bitnet_jax._quantize.int8 import codes_at, gamma_of, plain_activation_codes
from bitnet_jax._quantize.rotation import rotated

_PADDING = 64  # rows of x are padded to a multiple of it, see _native/layout.h

# Paths that multiply by stored int8 kernels sooner than XLA does, at 1 to 128 rows of 2560x6912
# and 4096x11008 (Zen 5, two cores): .05 to .4 of its time with AVX512, also at 512 rows, .2 to
# .9 with AVX2, .1 to .4 with AVX-VNNI, which XLA has no product for. XLA's was kept to the same
# instruction set; --xla_cpu_max_isa does not do that. Not measured: AMX, whose few rows are
# AVX512's, and Arm, which leaves those kernels to XLA.
_SOONER_THAN_XLA = ("amx", "avx512_vnni", "avx_vnni", "avx2")


def unsupported_reason(packed: Packed, activations: ActivationConfig | None = None) -> str | None:
    """Why this implementation cannot run a kernel; None if it can."""
    int8 = isinstance(packed, (PackedInt8, PreparedInt8))
    remedy = f"Use implementation={'reference' if int8 else 'xla'!r}."
    reason = _native.load().reason
    if reason is not None:
        return f"implementation 'cpu' is not there: {reason}. {remedy}"
    group = None if activations is None else activations.group
    if group is None:
        return None
    depth = _spec_of(packed, None, by_library.FLOATS[0]).layout.depth
    part = math.gcd(depth, group)
    if cuts_no_four(depth, part):
        return None
    kept = " and the stored kernel" if isinstance(packed, Prepared) else ""
    return (
        f"implementation 'cpu' needs groups of activations of a multiple of {FOUR}, or those of "
        f"the kernel; got groups of {group}, and {depth} weights to a scale of the kernel. Use "
        f"implementation='reference'{kept}."
    )


def preferred(packed: Packed, preparing: bool) -> bool:
    """Whether it is the fastest for a kernel.

    Not where the portable path is all there is: it is there for its bits. Not laid out
    on another platform, whose programs would undo it. And a stored int8 kernel
    (contraction, outputs) by the paths of ``_SOONER_THAN_XLA`` alone, at any number of rows.
    """
    paths = _native.load().paths()
    if paths == ["portable"]:
        return False
    if preparing and jax.default_backend() != "cpu":
        return False
    if preparing or not isinstance(packed, PackedInt8) or _is_table(packed):
        return True
    return paths[0] in _SOONER_THAN_XLA


def _is_table(packed: PackedInt8) -> bool:
    """An embedding, (outputs, contraction)."""
    return packed.contracting_axes == (-1,) and packed.kernel_ndim == 2


def prepare(packed: Stored) -> Prepared:
    """Lays codes out in panels of outputs."""
    spec = _spec_of(packed, None, by_library.FLOATS[0])
    codes = merged_planes(_stored_codes(packed), packed.planes)
    return lay_out(packed, _laid_out(spec, codes), "cpu")


# One program: by itself, a reshape would copy the kernel, out of its large pages.
@functools.partial(jax.jit, static_argnums=0)
def _laid_out(spec: _Spec, stored: jax.Array) -> UInt8[Array, "*b bytes"]:
    *batch, r, n = stored.shape
    (laid,) = by_platform.run(_laying_out(spec), stored.reshape(math.prod(batch), r, n))
    return laid.reshape(*batch, spec.layout.nbytes)


def layout(prepared: Prepared) -> tuple[int, ...]:
    """The shape of a prepared kernel's codes: (*batch, bytes)."""
    return (*prepared.batch, layout_of(prepared).nbytes)


def _stored_codes(packed: Stored) -> UInt8[Array, "*b r n"] | Int8[Array, "*b k n"]:
    """Canonical bytes, with an axis of planes, or int8 codes; a table stays (outputs, k)."""
    if not isinstance(packed, PackedInt8):
        return canonical_bytes(packed)
    if _is_table(packed):
        return packed.codes
    return kernel_axes.to_canonical(packed.codes, packed.axes)


@functools.cache
def _laying_out(spec: _Spec) -> by_platform.Operation:
    """Stored codes (B, ...) -> panels (B, 1, bytes)."""
    layout = spec.layout

    def plain(stored: jax.Array) -> jax.Array:
        return panels.lay_out(_int8_codes(spec, stored), layout)[:, None]

    return by_platform.Operation(
        native=lambda stored: _lay_out(spec, stored)[:, None],
        plain=plain,
        results=lambda stored: (
            jax.ShapeDtypeStruct((stored.shape[0], 1, layout.nbytes), jnp.uint8),
        ),
        partitioned=True,
    )


def _lay_out(
    spec: _Spec, stored: UInt8[Array, "b r n"] | Int8[Array, "b k n"]
) -> UInt8[Array, "b bytes"]:
    """Panels of this device's outputs, by the native library."""
    layout = spec.layout._replace(outputs=_outputs_of(spec, stored.shape))
    return by_library.call(
        _native.LAY_OUT,
        jax.ShapeDtypeStruct((len(stored), layout.nbytes), jnp.uint8),
        stored,
        last=np.int64(spec.last),
        depth=np.int64(layout.depth),
        int8=layout.int8,
        transposed=spec.table,
    )


def _int8_codes(
    spec: _Spec, codes: UInt8[Array, "b ..."] | Int8[Array, "b k n"]
) -> Int8[Array, "b *p k n"]:
    """Canonical codes of panels, or of stored codes; planes are an axis of both."""
    if spec.prepared:
        return planes_apart(panels.codes_of(codes, spec.layout), spec.planes)
    if not spec.layout.int8:
        return trits.unpack_runs(codes, spec.last)
    return codes.swapaxes(-1, -2) if spec.table else codes


def _outputs_of(spec: _Spec, codes: tuple[int, ...]) -> int:
    """The outputs of codes of shape (B, ...): of a stored kernel, its shard has them."""
    return spec.layout.outputs if spec.prepared else codes[1 if spec.table else -1]


def contract(
    x: Activations,
    packed: Packed,
    activations: ActivationConfig,
    dtype: DTypeLike,
    *,
    anywhere: bool = False,
) -> Float[Array, "..."]:
    """The product, from float to float; ``anywhere``: in plain JAX on other platforms."""
    batch, _, outputs = split(packed)
    rows, k = x.shape[len(batch) : -1], x.shape[-1]
    # The custom calls know (slices, rows, K): batch axes and row axes are flattened.
    x = x.reshape(math.prod(batch), math.prod(rows), k)
    # The calls write float32 or bfloat16; another dtype is cast from float32.
    wide = jnp.dtype(dtype) if jnp.dtype(dtype) in by_library.FLOATS else by_library.FLOATS[0]
    if isinstance(packed, Prepared):
        codes, scale = packed.codes, packed.scale
    else:
        codes, scale = _stored_codes(packed), packed.canonical_scale()
    spec = _spec_of(packed, activations, wide)
    if isinstance(codes, SliceOf):
        (y,) = by_platform.run(_product_at(spec), x, codes.stack, scale[None], codes.at)
    else:
        one_batch = (a.reshape(len(x), *a.shape[len(batch) :]) for a in (codes, scale))
        (y,) = by_platform.run(_product(spec, anywhere), x, *one_batch)
    return y.astype(dtype).reshape(*batch, *rows, math.prod(outputs))


def sums(x: Int8[Array, "*rows k"], prepared: Prepared) -> Int32[Array, "g *rows n"]:
    """The exact int32 sums of codes that :func:`contract` scales, one for each group."""
    x = over_planes(x, prepared.planes)
    lead, n = len(prepared.batch), math.prod(prepared.outputs)
    rows, count = x.shape[lead:-1], math.prod(prepared.batch)
    codes = cut(prepared.codes)
    codes = codes.reshape(count, *codes.shape[lead:])
    x = x.reshape(count, math.prod(rows), x.shape[-1])
    y = _sums(layout_of(prepared), x, codes, n)
    return y.reshape(y.shape[0], *prepared.batch, *rows, n)


class _Spec(NamedTuple):
    """What is static about a product; JAX transforms functions of arrays only.

    ``layout`` is the whole kernel's, with planes as more groups; ``last`` is the length of its
    last contracting axis, along which bytes lie.
    """

    layout: Layout
    last: int
    planes: int
    prepared: bool
    table: bool
    activations: ActivationConfig | None
    dtype: np.dtype
    block: int  # how many features of x are rotated together


def _spec_of(packed: Packed, activations: ActivationConfig | None, dtype: np.dtype) -> _Spec:
    _, contraction, outputs = split(packed)
    if isinstance(packed, Prepared):
        layout = layout_of(packed)
    else:
        # The scale's lengths along the contraction say how many groups there are.
        scale = without_planes(packed.scale.shape, packed.plane_axis)
        each = math.prod(packed.axes.split(scale)[1])
        depth, groups = math.prod(contraction) // each, each * packed.planes
        layout = Layout(math.prod(outputs), depth, groups, isinstance(packed, PackedInt8))
    return _Spec(
        layout=layout,
        last=contraction[-1],
        planes=packed.planes,
        prepared=isinstance(packed, Prepared),
        table=isinstance(packed, PackedInt8) and _is_table(packed),
        activations=activations,
        dtype=dtype,
        block=block(packed),
    )


@functools.cache
def _product(spec: _Spec, anywhere: bool) -> by_platform.Operation:
    """(x (B, M, K), panels or stored codes (B, ...), scale (B, G, 1 or N)) -> (B, M, N)."""
    return by_platform.Operation(
        native=_native_product(spec),
        plain=functools.partial(_plain_product, spec) if anywhere else None,
        results=lambda x, codes, _: (
            jax.ShapeDtypeStruct((*x.shape[:2], _outputs_of(spec, codes.shape)), spec.dtype),
        ),
        rows=1,
        partitioned=True,
    )


@functools.cache
def _product_at(spec: _Spec) -> by_platform.Operation:
    """(x (1, M, K), a stack of panels (S, bytes), scale (1, G, 1 or N), index) -> (1, M, N)."""

    def plain(x: jax.Array, stack: jax.Array, scale: jax.Array, at: jax.Array) -> jax.Array:
        return _plain_product(spec, x, cut(SliceOf(stack, at))[None], scale)

    return by_platform.Operation(
        native=shards.partitioned(
            shards.Body(functools.partial(_multiply, spec), None, codes="sp", static=spec)
        ),
        plain=plain,
        results=lambda x, *_: (
            jax.ShapeDtypeStruct((*x.shape[:2], spec.layout.outputs), spec.dtype),
        ),
        rows=1,
        mapped=plain,
        partitioned=True,
    )


def _multiply(
    spec: _Spec, x: Activations, panels: jax.Array, scale: CanonicalScale, *at: jax.Array
) -> Float[Array, "_ _ _"]:
    """By custom calls; with an index, from that slice of a stack of panels."""
    assert spec.activations is not None
    layout, activations = spec.layout, spec.activations
    x_codes, gamma = _token_codes(spec, x, activations)
    return by_library.call(
        _native.MULTIPLY,
        jax.ShapeDtypeStruct((*x.shape[:2], layout.outputs), spec.dtype),
        x_codes,
        gamma,
        panels,
        scale,
        *at,
        depth=np.int64(layout.depth),
        int8=layout.int8,
        transposed=spec.table,
        qmax=np.float32(activations.qmax),
    )


def _token_codes(
    spec: _Spec, x: Activations, activations: ActivationConfig
) -> tuple[Int8[Array, "b m _"], Float32[Array, "b m g"]]:
    """Codes of x, rotated, for all planes behind each other, zeros behind them, and gammas."""
    k = x.shape[-1]
    part = math.gcd(spec.layout.depth, activations.group or k)
    stride = _stride(spec.planes * k, part)
    if spec.planes == 1:
        return by_library.token_codes(x, activations, stride, spec.block)
    # Quantised once: twice the codes are sooner copied than made.
    codes, gamma = by_library.token_codes(x, activations, k, spec.block)
    codes = over_planes(codes, spec.planes)
    padding = [(0, 0), (0, 0), (0, stride - codes.shape[-1])]
    return jnp.pad(codes, padding), gamma_over_planes(gamma, spec.planes)


def _plain_product(
    spec: _Spec, x: Activations, codes: jax.Array, scale: CanonicalScale
) -> jax.Array:
    """As ``reference`` multiplies."""
    assert spec.activations is not None
    w = _int8_codes(spec, codes)
    scale = planes_apart(scale, spec.planes) if spec.prepared else scale
    if len(x) == 1:  # XLA's fastest product has no batch axis
        x, w, scale = x[0], w[0], scale[0]
    x_codes, gamma = plain_activation_codes(x, spec.activations, (-1,), spec.block)
    qmax, planes = spec.activations.qmax, spec.planes
    y = contract_codes(Product(), x_codes, gamma, w, scale, qmax, planes)
    return y.astype(spec.dtype).reshape(-1, *y.shape[-2:])


def _native_product(spec: _Spec) -> Callable[..., jax.Array]:
    """By custom calls, for a whole kernel or on each device of a mesh for its shard."""
    assert spec.activations is not None
    activations = spec.activations

    def panels_of(spec: _Spec, codes: jax.Array) -> jax.Array:
        # The call reads stored int8 codes as they are, and lays out what it needs next.
        if spec.prepared or spec.layout.int8:
            return codes
        return _lay_out(spec, merged_planes(codes, spec.planes))

    def scale_of(scale: PlaneScale) -> Float32[Array, "b pg m"]:
        return scale if spec.prepared else merged_planes(scale, spec.planes)

    def whole(x: Activations, codes: jax.Array, scale: CanonicalScale) -> jax.Array:
        part = spec.layout._replace(outputs=_outputs_of(spec, codes.shape))
        return _multiply(spec._replace(layout=part), x, panels_of(spec, codes), scale_of(scale))

    def summed(
        x: Activations, codes: jax.Array, scale: CanonicalScale, axes: tuple[str, ...]
    ) -> jax.Array:
        n, k = (codes.shape[a] for a in ((1, 2) if spec.table else (-1, -2)))
        k *= cut  # weights of this shard, not bytes
        x = rotated(x, spec.block)  # whole, if any of it is
        gamma = gamma_of(x, activations, (-1,))
        if x.shape[-1] == k:  # x is sharded too: a token's maximum is over all shards
            gamma = jax.lax.pmax(gamma, axes)
        else:  # x is whole: this shard's part of it
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * k, k, axis=-1)
        part = spec._replace(layout=spec.layout._replace(depth=k), last=k)
        x_codes = over_planes(codes_at(x, gamma, activations), spec.planes)
        y = _sums(part.layout, x_codes, panels_of(part, codes), n, spec.table)
        # Integers are summed over the devices, and scaled once, after: as on one device.
        y = jax.lax.psum(y, axes)
        return group_epilogue(y, gamma, scale_of(scale), activations.qmax).astype(spec.dtype)

    # The contraction may be cut between bytes, where one axis is contracted, in one group
    # of each plane and of x.
    depth, groups, int8 = spec.layout[1:]
    cut = 1 if int8 else trits.PER_BYTE
    plain = (
        not spec.prepared
        and groups == spec.planes
        and activations.group is None
        and spec.last == depth
    )
    body = shards.Body(
        whole,
        summed,
        codes=_letters(spec),
        static=spec,
        step=1 if plain and depth % cut == 0 else 0,
        whole_x=spec.block > 1,
    )
    return shards.partitioned(body)


def _letters(spec: _Spec) -> str:
    """What the axes of codes after the batch are, see :class:`shards.Body`."""
    if spec.prepared:
        return "p"
    return "nk" if spec.table else "kn" if spec.planes == 1 else "qkn"


def _sums(
    layout: Layout,
    x: Int8[Array, "b m k"],
    codes: UInt8[Array, "b bytes"] | Int8[Array, "b k n"],
    n: int,
    transposed: bool = False,
) -> Int32[Array, "g b m n"]:
    k = x.shape[-1]
    # Codes of 0 behind each row: the kernel reads whole tiles of 64.
    x = jnp.pad(x, [(0, 0), (0, 0), (0, _stride(k, layout.depth) - k)])
    shape = jax.ShapeDtypeStruct((x.shape[0], layout.groups, x.shape[1], n), jnp.int32)
    static = {"depth": np.int64(layout.depth), "int8": layout.int8, "transposed": transposed}
    y = by_library.call(_native.SUMS, shape, x, codes, **static)
    return jnp.moveaxis(y, 1, 0)  # (B, G, M, N) -> (G, B, M, N), as the epilogue has it


def codes_of(prepared: Prepared) -> Int8[Array, "*b k n"]:
    """The canonical int8 codes of a prepared kernel; undoes :func:`prepare`."""
    return panels.codes_of(cut(prepared.codes), layout_of(prepared))


def _stride(k: int, depth: int) -> int:
    """Codes of a row and the zeros behind it: its last ``depth`` are read in whole tiles."""
    return k + -depth % _PADDING
