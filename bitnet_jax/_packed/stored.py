"""`PackedTernary`, a kernel at two bits a weight, and `PackedInt8`: what files hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8

from bitnet_jax import _checks, _mesh
from bitnet_jax._packed import intact, trits
from bitnet_jax._packed.node import Node, register
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import Codes, DTypeLike, PackedCodes, Scale
from bitnet_jax._quantize.config import B158, Int8Config, TernaryConfig
from bitnet_jax._quantize.pinned import pinned
from bitnet_jax._quantize.ternary import dequantize, rotated_back, sum_in_order

_FLOAT32 = np.dtype(np.float32)

_INT8_CONFIG = Int8Config()

T = TypeVar("T")


class _Stored(Node):
    """What ``PackedTernary`` and ``PackedInt8`` have in common."""

    kernel_ndim: int
    _codes_dtype: ClassVar[str]

    def int8_codes(self) -> Int8[Array, "..."]:
        """The codes as int8, in the kernel's shape."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The kernel's rank, batch axes included."""
        return self.codes.ndim - (self.planes > 1)

    def _batch_ndim(self) -> int:
        return self.ndim - self.kernel_ndim

    @property
    def plane_axis(self) -> int | None:
        """The axis of planes in codes and scale, counted from the end; None: there is none."""
        return self.contracting_axes[0] - 1 if self.planes > 1 else None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the int8 codes: the kernel's, with its axis of planes."""
        return with_planes(self.shape, self.plane_axis, self.planes)

    def _codes_shape(self) -> tuple[int, ...]:
        """The shape that codes of this shape and length have."""
        raise NotImplementedError

    def fault(self) -> str | None:
        """What is wrong with the dtypes or the shapes of codes and scale; None if nothing."""
        rank = len(getattr(self.codes, "shape", ())) - (self.planes > 1)
        if rank < max(self.kernel_ndim, -self.contracting_axes[0]):
            return f"has codes that are {_checks.describe(self.codes)}, without the kernel's axes"
        shape, batch, at = self.shape, rank - self.kernel_ndim, self.plane_axis
        fault = intact.codes_fault(self.codes, self._codes_dtype, self._codes_shape(), shape)
        fault = fault or intact.scale_array_fault(self.scale, self.stored_shape, batch)
        if fault or at is None or self.scale.shape[at] == self.planes:
            return fault
        return intact.planes_fault(self.scale.shape, self.planes)

    def value_fault(self) -> str | None:
        """What is wrong with the codes, where their values can be read; None if nothing."""
        raise NotImplementedError

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Codes times scale as a float kernel, rotated back; by default in its own dtype."""
        intact.require_arrays(f"{type(self).__name__}.dequantize", "the kernel", self)
        run = functools.partial(_dequantize, dtype=dtype or self.dtype)
        spec = without_planes(_mesh.spec_of(self.codes), self.plane_axis)
        return _mesh.in_auto(run, self, out=lambda mesh: _mesh.fit(spec, self.shape, mesh))

    def canonical_codes(self) -> Int8[Array, "*b k n"]:
        """The int8 codes in canonical order; with planes, (*b, planes, k, n)."""
        return kernel_axes.to_canonical(self.int8_codes(), self.stored_axes)

    def canonical_scale(self) -> Float32[Array, "*b g m"]:
        """The scale in canonical order; with planes, (*b, planes, g, m)."""
        return kernel_axes.to_canonical(self.scale, self.stored_axes)

    @property
    def stored_axes(self) -> kernel_axes.KernelAxes:
        """The axes of codes and scale, planes as the last batch axis."""
        return self.axes if self.planes == 1 else kernel_axes.with_planes(self.axes)

    def __repr__(self) -> str:
        try:
            return (
                f"{type(self).__name__}(shape={self.shape}, scale={tuple(self.scale.shape)}, "
                f"{self.nbytes} bytes)"
            )
        except (AttributeError, TypeError, IndexError):  # leaves replaced by a tree.map
            return f"{type(self).__name__}(codes={self.codes!r}, scale={self.scale!r})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedTernary(_Stored):
    """A ternary kernel in storage layout: what files hold and meshes shard.

    Invariants:
      - ``codes`` is uint8 and has the kernel's rank; its packed axis, the last
        contracting one, holds ``ceil(length / 4)`` bytes (``trits``).
      - ``scale`` is float32 and has the kernel's rank; each axis is 1, the
        kernel's length, or the number of groups along it.
      - With ``config.planes``, both have one axis more, of the planes, right
        before the first contracting one: ``w = s[0] T[0] + s[1] T[1]``.
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

    codes: PackedCodes
    scale: Scale
    length: int
    contracting_axes: tuple[int, ...] = (-2,)
    kernel_ndim: int = 2
    config: TernaryConfig = B158
    dtype: np.dtype = _FLOAT32
    _codes_dtype = "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float kernel this leaf stands for."""
        shape = list(self.codes.shape)
        shape[self.contracting_axes[-1]] = self.length
        return without_planes(shape, self.plane_axis)

    def int8_codes(self) -> Int8[Array, "..."]:
        """The int8 codes in {-1, 0, +1}, in the kernel's shape; with planes, in one axis more."""
        return trits.unpack_trits(self.codes, self.contracting_axes[-1], self.length)

    def joined(self) -> PackedTernary:
        """The same arrays as a kernel of one plane, which contracts over the planes as well.

        It multiplies x beside itself, ``[x, x] @ [s1 T1; s2 T2]``, in groups: those of the
        first plane, then those of the second.
        """
        if self.plane_axis is None:
            return self
        assert isinstance(self.config, TernaryConfig)
        return dataclasses.replace(
            self,
            contracting_axes=(self.plane_axis, *self.contracting_axes),
            kernel_ndim=self.kernel_ndim + 1,
            config=self.config.one_plane,
        )

    def _codes_shape(self) -> tuple[int, ...]:
        return trits.packed_shape(self.stored_shape, self.contracting_axes[-1])

    def value_fault(self) -> str | None:
        """How many bytes are no codes, where their values can be read; None if none."""
        wrong = intact.count_invalid(self.codes, self.contracting_axes[-1], self.length)
        return f"has {intact.BITS.format(wrong)}" if wrong else None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedInt8(_Stored):
    """A kernel or an embedding at eight bits a weight, one scale per output channel.

    Invariants:
      - ``codes`` is int8 in [-127, 127] and has the kernel's shape.
      - ``scale`` is float32 and has the kernel's rank, with length 1 on the
        contracting axes: a code's value is ``code * scale``.
      - Batch axes, ``contracting_axes``, ``kernel_ndim`` and ``dtype`` are as in
        ``PackedTernary``. An embedding (vocabulary, features) contracts over
        its features: one scale per row.
      - It is not trainable: codes have no gradient.

    Attributes:
      codes: int8 array.
      scale: float32 array.
      contracting_axes: the axes that meet x.
      kernel_ndim: the rank of one kernel, batch axes not counted.
      config: the quantiser that made it.
      dtype: the float dtype of the kernel this leaf stands for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 10))
      >>> head = bj.pack(w, bj.Int8Config())
      >>> head
      PackedInt8(shape=(64, 10), scale=(1, 10), 680 bytes)
      >>> bj.matmul(jax.numpy.ones((2, 64)), head).shape
      (2, 10)
    """

    codes: Codes
    scale: Scale
    contracting_axes: tuple[int, ...] = (-2,)
    kernel_ndim: int = 2
    config: Int8Config = _INT8_CONFIG
    dtype: np.dtype = _FLOAT32
    _codes_dtype = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float kernel this leaf stands for."""
        return tuple(self.codes.shape)

    def int8_codes(self) -> Int8[Array, "..."]:
        """The codes themselves."""
        return self.codes

    def _codes_shape(self) -> tuple[int, ...]:
        return self.shape

    def value_fault(self) -> str | None:
        """How many codes are below -127, where their values can be read; None if none."""
        wrong = intact.count_lowest(self.codes)
        return f"has {intact.INT8.format(wrong)}" if wrong else None

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... features"]:
        """The embedding look-up: rows of the dequantised kernel, without dequantising it.

        An index outside the vocabulary gives NaN, as ``jnp.take`` does.

        Args:
          index: integers, any shape.

        Returns:
          (*index, features) of :attr:`dtype`.

        Raises:
          TypeError: the index is not of integers.
          ValueError: the kernel is not an embedding (vocabulary, features).
        """
        intact.require_arrays("PackedInt8.rows", "the kernel", self)
        _checks.require_embedding_lookup("PackedInt8.rows", index, self.shape)
        features = _mesh.spec_of(self.codes)[1:]
        return _mesh.in_auto_rows(_look_up, index, self, outputs=features)


register(PackedTernary)
register(PackedInt8)


def look_up(
    codes_of: Callable[[Int[Array, "..."]], Int8[Array, "... features"]],
    scale: Float32[Array, "n 1"],
    index: Int[Array, "..."],
    dtype: DTypeLike,
) -> Float[Array, "... features"]:
    """Rows of an embedding, from what gives their codes; indices as ``jnp.take`` has them."""
    # Codes of a row that exists, always; the scale below turns the others into NaN.
    at = index.astype(jnp.int32)
    at = jnp.clip(jnp.where(at < 0, at + len(scale), at), 0, len(scale) - 1)
    scale = jnp.take(scale, index, axis=0)  # NaN where there is no such row
    return pinned(codes_of(at).astype(jnp.float32) * scale).astype(dtype)


def _look_up(index: Int[Array, "..."], table: PackedInt8) -> Float[Array, "... features"]:
    scale = jnp.broadcast_to(table.scale, (table.shape[0], 1))
    codes_of = functools.partial(jnp.take, table.codes, axis=0)
    return look_up(codes_of, scale, index, table.dtype)


def _dequantize(packed: PackedTernary | PackedInt8, dtype: DTypeLike) -> Float[Array, "..."]:
    w = dequantize(packed.int8_codes(), packed.scale)
    at = packed.plane_axis
    if at is not None:
        w = sum_in_order([jnp.take(w, i, axis=at) for i in range(packed.planes)])
    axis = None if packed.config.rotation is None else packed.contracting_axes[-1]
    return rotated_back(w, axis).astype(dtype)


def without_planes(entries: Sequence[T], at: int | None) -> tuple[T, ...]:
    """One entry for each axis of a float kernel, of those of its codes."""
    return tuple(entries) if at is None else (*entries[:at], *entries[len(entries) + at + 1 :])


def with_planes(entries: Sequence[T], at: int | None, planes: T) -> tuple[T, ...]:
    """One entry for each axis of a float kernel, with one for its planes at their axis."""
    if at is None:
        return tuple(entries)
    before = len(entries) + 1 + at
    return (*entries[:before], planes, *entries[before:])
