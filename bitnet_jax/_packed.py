"""`PackedTernary`, a kernel at two bits a weight, and its kernel-ready forms.

Both are pytree nodes: their arrays are traced, sliced, stacked, donated and
sharded like any others, and what is static never mentions a batch axis, so that
``nn.scan`` may slice stacked layers and ``vmap`` may stack them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, UInt8

from bitnet_jax import _axes, _checks, _guard, _packing
from bitnet_jax._ternary import B158, Ternary, TernaryConfig, quantize_as, scale_grid, spread

_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedTernary:
    """A ternary kernel in storage layout: what files hold and meshes shard.

    Invariants:
      - ``codes`` is uint8 and has the kernel's rank; its packed axis, the last
        contracting one, holds ``ceil(length / 4)`` bytes (``_packing``).
      - ``scale`` is float32 and has the kernel's rank; each axis is 1, the
        kernel's length, or the number of groups along it.
      - Axes before the last ``kernel_ndim`` are batch axes; they come and go
        with scan, vmap and stacking, and every slice is a valid leaf.
      - ``contracting_axes`` are negative and ascending.
      - ``dtype`` is the float dtype of the kernel this leaf stands for.
      - It is not trainable: codes have no gradient.

    Attributes:
      codes: uint8 array, four codes to a byte.
      scale: float32 array.
      length: how many codes lie along the packed axis.
      contracting_axes: the axes that meet x.
      kernel_ndim: the rank of one kernel, batch axes not counted.
      config: the quantiser that made it.
      dtype: see above.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> packed = bj.pack(w)
      >>> packed
      PackedTernary(shape=(64, 16), scale=(1, 1), 260 bytes)
      >>> packed.codes.shape, packed.codes.dtype.name
      ((16, 16), 'uint8')
    """

    codes: UInt8[Array, "..."]
    scale: Float32[Array, "..."]
    length: int
    contracting_axes: tuple[int, ...] = (-2,)
    kernel_ndim: int = 2
    config: TernaryConfig = B158
    dtype: Any = _FLOAT32

    @property
    def ndim(self) -> int:
        """The kernel's rank, batch axes included."""
        return self.codes.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float kernel this leaf stands for."""
        shape = list(self.codes.shape)
        shape[self.contracting_axes[-1]] = self.length
        return tuple(shape)

    @property
    def size(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale."""
        return _nbytes(self.codes) + _nbytes(self.scale)

    @property
    def axes(self) -> _axes.KernelAxes:
        """The kernel's axes, non-negative, as they are in this slice or stack."""
        contracting = tuple(a + self.ndim for a in self.contracting_axes)
        batch = tuple(range(self.ndim - self.kernel_ndim))
        taken = {*contracting, *batch}
        return _axes.KernelAxes(
            contracting, batch, tuple(a for a in range(self.ndim) if a not in taken)
        )

    def trits(self) -> Int8[Array, "..."]:
        """The int8 codes in {-1, 0, +1}, in the kernel's shape."""
        return _packing.unpack_trits(self.codes, self.contracting_axes[-1], self.length)

    def dequantize(self, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "..."]:
        """Codes times scale as a float kernel; by default in the kernel's own dtype."""
        w = self.trits().astype(jnp.float32) * spread(self.scale, self.shape)
        return w.astype(dtype or self.dtype)

    def canonical_scale(self) -> Float32[Array, "*b g m"]:
        """The scale with its contraction on axis -2 and its outputs on axis -1."""
        return _axes.canonical(self.scale, self.axes)

    def __repr__(self) -> str:
        try:
            return (
                f"PackedTernary(shape={self.shape}, scale={tuple(self.scale.shape)}, "
                f"{self.nbytes} bytes)"
            )
        except (AttributeError, TypeError, IndexError):  # leaves replaced by a tree.map
            return f"PackedTernary(codes={self.codes!r}, scale={self.scale!r})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedTernary:
    """A packed kernel laid out for one implementation; never written to a file.

    Invariants:
      - ``codes`` is uint8 in a layout that only ``implementation`` reads.
      - ``scale`` is float32, canonical: (*batch, groups, 1 or outputs).
      - Static data describes one kernel, without its batch axes.

    Attributes:
      codes: uint8 array.
      scale: float32 array.
      contraction: lengths of the contracting axes.
      outputs: lengths of the output axes.
      implementation: the name of the only implementation that reads it.
      config: the quantiser that made it.
      dtype: the float dtype of the kernel it stands for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> packed = bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))
      >>> bj.prepare(packed, implementation="xla")
      PreparedTernary(shape=(64, 16), for 'xla')
    """

    codes: UInt8[Array, "..."]
    scale: Float32[Array, "..."]
    contraction: tuple[int, ...]
    outputs: tuple[int, ...]
    implementation: str
    config: TernaryConfig = B158
    dtype: Any = _FLOAT32

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the batch axes, as they are in this slice or stack."""
        return self.scale.shape[:-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """(*batch, *contraction, *outputs)."""
        return (*self.batch, *self.contraction, *self.outputs)

    @property
    def ndim(self) -> int:
        """The rank of :attr:`shape`."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale."""
        return _nbytes(self.codes) + _nbytes(self.scale)

    def __repr__(self) -> str:
        kernel = (*self.contraction, *self.outputs)
        return f"PreparedTernary(shape={kernel}, for {self.implementation!r})"


Packed = PackedTernary | PreparedTernary


def _nbytes(array: Any) -> int:
    """Bytes of an array, or of the one that a ``jax.ShapeDtypeStruct`` stands for."""
    return math.prod(array.shape) * array.dtype.itemsize


def is_packed(leaf: Any) -> bool:
    """Whether a leaf is a packed kernel, stored or prepared."""
    return isinstance(leaf, (PackedTernary, PreparedTernary))


def _register(cls: type, static: tuple[str, ...]) -> None:
    """Registers a node with children codes and scale, and the rest static."""

    def flatten_with_keys(node):
        keys = jax.tree_util.GetAttrKey("codes"), jax.tree_util.GetAttrKey("scale")
        children, aux = flatten(node)
        return tuple(zip(keys, children, strict=True)), aux

    def flatten(node):
        _guard.refuse_training(node.codes)
        return (node.codes, node.scale), tuple(getattr(node, name) for name in static)

    def unflatten(aux, children):
        return cls(*children, **dict(zip(static, aux, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


_register(PackedTernary, ("length", "contracting_axes", "kernel_ndim", "config", "dtype"))
_register(PreparedTernary, ("contraction", "outputs", "implementation", "config", "dtype"))


def pack(
    w: Float[Array, "..."],
    config: TernaryConfig = B158,
    *,
    contracting_axes: _axes.AxesLike | None = None,
    batch_axes: _axes.AxesLike = (),
) -> PackedTernary:
    """Quantises a kernel and packs its codes to two bits.

    Args:
      w: float32, bfloat16 or float16 kernel. 2-D: (in, out).
      config: the quantiser.
      contracting_axes: the axes that meet x; needed for ranks other than 2.
      batch_axes: leading axes that carry slices, each with its own scale.

    Returns:
      A ``PackedTernary`` whose ``unpack`` is ``quantize(w).dequantize()``, to
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
    axes = pack_axes("pack", w, config, contracting_axes, batch_axes)
    return pack_quantized(w, config, axes)[1]


def pack_axes(
    who: str,
    w: Any,
    config: TernaryConfig,
    contracting_axes: _axes.AxesLike | None,
    batch_axes: _axes.AxesLike,
) -> _axes.KernelAxes:
    """The axes of a kernel to pack; all that can be refused by its shape is refused here."""
    _checks.instance(who, "config", config, TernaryConfig, "Use bj.B158 or your own.")
    _checks.kernel(who, w)
    axes = _axes.resolve(who, w, contracting_axes, batch_axes)
    _checks.batch_leads(who, axes.batch)
    scale_grid(who, axes.split(w.shape)[1], config)
    return axes


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack_quantized(
    w: Float[Array, "..."], config: TernaryConfig, axes: _axes.KernelAxes
) -> tuple[Ternary, PackedTernary]:
    """A kernel's codes and scale, and the same packed."""
    t = quantize_as("pack", w, config, axes.contracting, axes.batch)
    last = axes.contracting[-1]
    return t, PackedTernary(
        codes=_packing.pack_trits(t.codes, last),
        scale=t.scale,
        length=w.shape[last],
        contracting_axes=tuple(a - w.ndim for a in axes.contracting),
        kernel_ndim=w.ndim - len(axes.batch),
        config=config,
        dtype=np.dtype(w.dtype),
    )


def unpack(packed: PackedTernary, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "..."]:
    """The float kernel of a packed one: codes times scale.

    Args:
      packed: a stored kernel.
      dtype: of the result; by default that of the kernel that was packed.

    Returns:
      An array of ``packed.shape``.

    Raises:
      TypeError: ``packed`` is no ``PackedTernary``, or is prepared.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> bj.unpack(bj.pack(jnp.array([[0.9, -0.1], [-0.8, 0.2]]))).tolist()
      [[0.5, 0.0], [-0.5, 0.0]]
    """
    if isinstance(packed, PreparedTernary):
        _checks.stored_layout("unpack", "`packed`", packed.implementation)
    _checks.instance("unpack", "packed", packed, PackedTernary, "Make one with bj.pack(w).")
    return packed.dequantize(dtype)


def canonical_bytes(packed: PackedTernary) -> UInt8[Array, "*b r n"]:
    """The bytes of a stored kernel as (*batch, byte rows, outputs)."""
    return _axes.canonical(packed.codes, packed.axes)
