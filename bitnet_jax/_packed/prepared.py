"""`PreparedTernary` and `PreparedInt8`: kernels laid out for one implementation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from bitnet_jax import _checks
from bitnet_jax._packed import intact, trits
from bitnet_jax._packed.node import Node, register
from bitnet_jax._quantize.arrays import PackedCodes, Scale
from bitnet_jax._quantize.config import Int8Config, TernaryConfig

_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepared(Node):
    """What ``PreparedTernary`` and ``PreparedInt8`` have in common."""

    codes: PackedCodes
    scale: Scale
    contraction: tuple[int, ...]
    outputs: tuple[int, ...]
    contracting_axes: tuple[int, ...]
    implementation: str
    config: TernaryConfig | Int8Config
    dtype: np.dtype = _FLOAT32

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the batch axes, as they are in this slice or stack."""
        return self.scale.shape[:-2]

    @property
    def ndim(self) -> int:
        """The kernel's rank, batch axes included."""
        return len(self.batch) + len(self.contraction) + len(self.outputs)

    def _batch_ndim(self) -> int:
        return len(self.batch)

    @property
    def in_place(self) -> bool:
        """Whether a product reads a layer of this stack where it lies."""
        return self.implementation == "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float kernel this leaf stands for."""
        return (*self.batch, *self._one_shape())

    def _one_shape(self) -> tuple[int, ...]:
        """The shape of one kernel, without batch axes."""
        contracted, outputs = iter(self.contraction), iter(self.outputs)
        ndim = len(self.contraction) + len(self.outputs)
        met = (a in self.contracting_axes for a in range(-ndim, 0))
        return tuple(next(contracted if one else outputs) for one in met)

    def fault(self) -> str | None:
        """What is wrong with the dtypes or the shapes of codes and scale; None if nothing."""
        rank = len(getattr(self.scale, "shape", ()))
        if rank < 2:
            return f"has a scale that is {_checks.describe(self.scale)}, not (*batch, groups, n)"
        k, n = self.planes * math.prod(self.contraction), math.prod(self.outputs)
        codes = getattr(self.codes, "shape", None)
        lead = self.batch if codes is None else (*self.batch, *codes[rank - 2 :])
        fault = intact.codes_fault(self.codes, "uint8", lead, self.shape)
        fault = fault or intact.scale_array_fault(self.scale, (*self.batch, k, n), rank - 2)
        if fault or self.scale.shape[-2] % self.planes == 0:
            return fault
        return intact.planes_fault(self.scale.shape, self.planes)

    def value_fault(self) -> str | None:
        """What is wrong with the codes, where their values can be read; None if nothing."""
        return None  # int8: a byte may hold any code, and the padding of a layout is one

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self._one_shape()}, for {self.implementation!r})"


class PreparedTernary(Prepared):
    """A two-bit kernel laid out for one implementation; never written to a file.

    Invariants:
      - ``codes`` is uint8 in a layout that only ``implementation`` reads.
      - ``scale`` is float32, canonical: (*batch, groups, 1 or outputs); of each plane
        so many groups.
      - Static data describes one kernel, without its batch axes.

    Attributes:
      codes: uint8 array.
      scale: float32 array.
      contraction: lengths of the contracting axes.
      outputs: lengths of the output axes.
      contracting_axes: the axes that meet x, counted from the kernel's end.
      implementation: the name of the only implementation that reads it.
      config: the quantiser that made it.
      dtype: the float dtype of the kernel it stands for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> packed = bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))
      >>> bj.prepare(packed, implementation="xla")
      PreparedTernary(shape=(64, 16), for 'xla')
    """

    def value_fault(self) -> str | None:
        """How many bytes hold a 3, where their values can be read; None if none."""
        # No layout has a 3, and a length of four codes to a byte has no padding of its own.
        codes = self.codes
        wrong = intact.count_invalid(codes, -1, trits.PER_BYTE * codes.shape[-1])
        return f"has {intact.BITS.format(wrong)}" if wrong else None


class PreparedInt8(Prepared):
    """An eight-bit kernel laid out for one implementation; never written to a file.

    Invariants and attributes are those of ``PreparedTernary``, with one scale
    for each output.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> head = bj.prepare(bj.pack(w, bj.Int8Config()))
      >>> bj.matmul(jax.numpy.ones((2, 64)), head).shape
      (2, 16)
    """


register(PreparedTernary)
register(PreparedInt8)
