"""Kernels into their packed form and back: quantise, pack, unpack."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from bitnet_jax import _checks, _mesh
from bitnet_jax._packed import trits
from bitnet_jax._packed.kernel import PackedInt8, PackedTernary, Prepared, Stored
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.int8 import Int8Config
from bitnet_jax._quantize.ternary import B158, KernelConfig, Ternary, axes_to_contract, quantize_as


def pack(
    w: Float[Array, "..."],
    config: KernelConfig = B158,
    *,
    contracting_axes: kernel_axes.AxesLike | None = None,
    batch_axes: kernel_axes.AxesLike = (),
) -> Stored:
    """Quantises a kernel and packs its codes to two bits, or to int8.

    Args:
      w: float32, bfloat16 or float16 kernel. 2-D: (in, out).
      config: the quantiser: a ``TernaryConfig``, or an ``Int8Config``.
      contracting_axes: the axes that meet x; needed for ranks other than 2.
      batch_axes: leading axes that carry slices, each with its own scale.

    Returns:
      A ``PackedTernary`` (``PackedInt8``) whose ``unpack`` is ``quantize(w).dequantize()``, to
      the bit.

    Raises:
      TypeError: ``w`` is not floating point.
      ValueError: as :func:`quantize`; or batch axes that are not the first.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> bool((bj.unpack(bj.pack(w)) == bj.quantize(w).dequantize()).all())
      True
    """
    axes = axes_to_pack("pack", w, config, contracting_axes, batch_axes)
    return pack_quantized(w, config, axes)[1]


def axes_to_pack(
    who: str,
    w: Any,
    config: KernelConfig,
    contracting_axes: kernel_axes.AxesLike | None,
    batch_axes: kernel_axes.AxesLike,
) -> kernel_axes.KernelAxes:
    """The axes of a kernel to pack; all that can be refused by its shape is refused here."""
    axes = axes_to_contract(who, w, config, contracting_axes, batch_axes)
    _require_leading_batch_axes(who, axes.batch)
    return axes


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack_quantized(
    w: Float[Array, "..."], config: KernelConfig, axes: kernel_axes.KernelAxes
) -> tuple[Ternary, Stored]:
    """A kernel's codes and scale, and the same packed."""
    last = axes.contracting[-1]
    static: dict[str, Any] = {
        "contracting_axes": tuple(a - w.ndim for a in axes.contracting),
        "kernel_ndim": w.ndim - len(axes.batch),
        "config": config,
        "dtype": np.dtype(w.dtype),
    }

    def run(w: jax.Array) -> tuple[Ternary, Stored]:
        t = quantize_as("pack", w, config, axes.contracting, axes.batch)
        if isinstance(config, Int8Config):
            return t, PackedInt8(t.codes, t.scale, **static)
        codes = trits.pack_trits(t.codes, last)
        return t, PackedTernary(codes, t.scale, length=w.shape[last], **static)

    return _mesh.in_auto_like(run, w)


def unpack(packed: Stored, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "..."]:
    """The float kernel of a packed one: codes times scale.

    Args:
      packed: a stored kernel.
      dtype: of the result; by default that of the kernel that was packed.

    Returns:
      An array of ``packed.shape``.

    Raises:
      TypeError: ``packed`` is not packed, or is prepared.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> bj.unpack(bj.pack(jnp.array([[0.9, -0.1], [-0.8, 0.2]]))).tolist()
      [[0.5, 0.0], [-0.5, 0.0]]
    """
    if isinstance(packed, Prepared):
        _checks.raise_prepared("unpack", "`packed`", packed.implementation)
    kinds = (PackedTernary, PackedInt8)
    _checks.require_instance("unpack", "packed", packed, kinds, "Make one with bj.pack(w).")
    return packed.dequantize(dtype)


def _require_leading_batch_axes(who: str, batch: Sequence[int]) -> None:
    """Refuses to pack a kernel whose stacked axes are not its first."""
    if tuple(batch) != tuple(range(len(batch))):
        raise ValueError(
            f"{who}: `batch_axes` must be the leading axes of a kernel to pack, got "
            f"{tuple(batch)}. Move them to the front (jnp.moveaxis), as nn.scan with "
            "variable_axes={'params': 0} stores them."
        )
