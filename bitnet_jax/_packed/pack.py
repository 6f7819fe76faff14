"""Kernels into their packed form and back: quantise, pack, unpack."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bitnet_jax import _checks, _mesh
from bitnet_jax._packed import intact, trits
from bitnet_jax._packed.kernel import Stored
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._quantize.arrays import AnyArray, DTypeLike, Kernel
from bitnet_jax._quantize.config import B158, Int8Config, KernelConfig
from bitnet_jax._quantize.kernel_axes import AxesLike
from bitnet_jax._quantize.kernel_spec import KernelSpec, contraction_spec
from bitnet_jax._quantize.latent import latent_kernel
from bitnet_jax._quantize.ternary import Ternary, TernaryPlanes, quantize_kernel


def pack(
    w: Kernel,
    config: KernelConfig = B158,
    *,
    contracting_axes: AxesLike | None = None,
    batch_axes: AxesLike = (),
) -> Stored:
    """Quantises a kernel and packs its codes to two bits, or to int8.

    Args:
      w: float32, bfloat16 or float16 kernel. 2-D: (in, out).
      config: the quantiser: a ``TernaryConfig``, or an ``Int8Config``.
      contracting_axes: the axes that meet x; needed for ranks other than 2.
      batch_axes: leading axes that carry slices, each with its own scale.

    Returns:
      A ``PackedTernary`` (``PackedInt8``) whose ``dequantize()`` is
      ``quantize(w).dequantize()``, to the bit.

    Raises:
      TypeError: ``w`` is not floating point.
      ValueError: as :func:`quantize`; or batch axes that are not the first.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> bool((bj.pack(w).dequantize() == bj.quantize(w).dequantize()).all())
      True
    """
    _checks.require_values("pack", "`w`", w)
    spec = packing_spec("pack", w, config, contracting_axes, batch_axes)
    return pack_kernel(w, spec)


def pack_kernel(w: Kernel, spec: KernelSpec) -> Stored:
    """:func:`pack` of a checked kernel."""
    run = functools.partial(pack_quantized, spec=spec)
    return _mesh.in_auto_like(run, w, more=spec.plane_axis)[1]


def packing_spec(
    who: str,
    w: AnyArray | jax.ShapeDtypeStruct,
    config: KernelConfig,
    contracting_axes: AxesLike | None,
    batch_axes: AxesLike,
) -> KernelSpec:
    """:func:`contraction_spec` of a kernel to pack: its batch axes come first."""
    spec = contraction_spec(who, w, config, contracting_axes, batch_axes)
    _require_leading_batch_axes(who, spec.axes.batch)
    return spec


@functools.partial(jax.jit, static_argnames="spec")
def pack_quantized(w: Kernel, spec: KernelSpec) -> tuple[Ternary | TernaryPlanes, Stored]:
    """A kernel's codes and scale, and the same packed."""
    t = quantize_kernel(w, spec)
    return t, stored(t, spec, np.dtype(w.dtype))


def stored(t: Ternary | TernaryPlanes, spec: KernelSpec, dtype: np.dtype) -> Stored:
    """Codes and scale of a kernel of this dtype, packed."""
    contracting = spec.axes.contracting
    ndim = len(spec.axes.order)
    # Axes from the end, and no batch axis: scan and vmap take those away and bring them back.
    static: dict[str, Any] = {
        "contracting_axes": tuple(a - ndim for a in contracting),
        "kernel_ndim": ndim - len(spec.axes.batch),
        "config": spec.config,
        "dtype": dtype,
    }
    if isinstance(spec.config, Int8Config):
        return PackedInt8(t.codes, t.scale, **static)
    codes, scale = t.codes, t.scale
    if isinstance(t, TernaryPlanes):  # planes, which come first, before the contraction
        codes, scale = (jnp.moveaxis(part, 0, contracting[0]) for part in (codes, scale))
    last = static["contracting_axes"][-1]
    length = codes.shape[last]
    return PackedTernary(trits.pack_trits(codes, last), scale, length=length, **static)


def unpack(packed: Stored, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """A float kernel that packs to this one: the same codes and scale, to the bit.

    To train on, or to pack again. It has one magnitude for all nonzero weights of a scale
    (a few may differ in the last place): for ``"absmean"`` the scale times the weights that
    share it over the nonzero ones, else the scale. What a ternary layer computes with is
    :meth:`PackedTernary.dequantize`, codes times scale: take that in a float network. Packed
    again, it would have a smaller scale.

    Args:
      packed: a stored kernel.
      dtype: of the result, float32, bfloat16 or float16; by default that of the kernel that
        was packed. Another keeps codes and scale only if it can hold them.

    Returns:
      An array of ``packed.shape``. For a scale that no kernel of this dtype has (of another
      program's file, say), the nearest below it. A kernel with a rotation comes back unrotated,
      and rounds on its way: its codes are kept, and its scale is the same or some last bits off,
      in bfloat16 up to .3 %: pass ``dtype=jnp.float32``.

    Raises:
      TypeError: ``packed`` is not packed, or is prepared.
      ValueError: codes or scale are not as they were made.
      NotImplementedError: the kernel has planes.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> packed = bj.pack(jnp.array([[0.9, -0.1], [-0.8, 0.2]]))
      >>> bj.unpack(packed).tolist(), packed.dequantize().tolist()
      ([[1.0, 0.0], [-1.0, 0.0]], [[0.5, 0.0], [-0.5, 0.0]])
      >>> bool((bj.pack(bj.unpack(packed)).scale == packed.scale).all())
      True
    """
    if isinstance(packed, Prepared):
        _checks.raise_prepared("unpack", "`packed`", packed.implementation)
    kinds = (PackedTernary, PackedInt8)
    _checks.require_instance("unpack", "packed", packed, kinds, "Make one with bj.pack(w).")
    intact.require_arrays("unpack", "`packed`", packed)
    require_one_plane("unpack", "`packed`", packed)
    return unpack_kernel(packed, dtype)


def unpack_kernel(packed: Stored, dtype: DTypeLike | None) -> Float[Array, "..."]:
    """:func:`unpack` of a checked kernel."""
    run = functools.partial(_latent, dtype=dtype or packed.dtype)
    return _mesh.in_auto_like(run, packed)


def _latent(packed: Stored, dtype: DTypeLike) -> Float[Array, "..."]:
    return latent_kernel(packed.int8_codes(), packed.scale, packed.config, packed.axes, dtype)


def require_one_plane(who: str, name: str, packed: Stored) -> None:
    """Raises on a kernel of planes, which no float kernel is known to pack to."""
    if packed.planes > 1:
        raise NotImplementedError(
            f"{who}: {name} is a sum of {packed.planes} ternary planes, and no float kernel is "
            "known that packs to their codes and scales. Take dequantize() of it (of a tree: "
            "dequantize=True), or keep the float params."
        )


def _require_leading_batch_axes(who: str, batch: Sequence[int]) -> None:
    """Raises unless the stacked axes of a kernel to pack are its first."""
    if tuple(batch) != tuple(range(len(batch))):
        raise ValueError(
            f"{who}: `batch_axes` must be the leading axes of a kernel to pack, got "
            f"{tuple(batch)}. Move them to the front (jnp.moveaxis), as nn.scan with "
            "variable_axes={'params': 0} stores them."
        )
