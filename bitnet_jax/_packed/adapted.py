"""`Adapted`, a packed kernel with a low-rank update beside it: LoRA [1] over two bits.

A layer that finds one computes ``y = x W_q + (alpha / rank) (x A) B``, the first
part from the packed codes, the second in float.

References:
  [1] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeGuard, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bitnet_jax import _mesh
from bitnet_jax._packed import intact
from bitnet_jax._packed.kernel import Packed, split
from bitnet_jax._packed.static_data import register_export
from bitnet_jax._quantize.arrays import AnyArray, DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A packed kernel and its adapter; made by :func:`bitnet_jax.lora.attach`.

    Invariants:
      - ``base`` is packed and frozen: codes have no gradient.
      - ``a`` is (*batch, K, rank) and ``b`` (*batch, rank, N), with K and N the
        products of the kernel's contracting and output axes.
      - Batch axes come first in all three, so that scan slices them together.

    Attributes:
      base: the packed kernel.
      a: float array, the first factor: x A.
      b: float array, the second: (x A) B.
      scale: alpha over rank.
    """

    base: Packed
    a: Float[Array, "*b k r"]
    b: Float[Array, "*b r n"]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> np.dtype:
        """The float dtype of the kernel this leaf stands for."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel this leaf stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The rank of the kernel this leaf stands for."""
        return self.base.ndim

    @property
    def size(self) -> int:
        """How many weights the kernel has that this leaf stands for."""
        return self.base.size

    @property
    def nbytes(self) -> int:
        """Bytes of the packed kernel and of the adapter."""
        return self.base.nbytes + sum(x.size * x.dtype.itemsize for x in (self.a, self.b))

    def __getitem__(self, index: Int[AnyArray, ""] | int | tuple[Any, ...]) -> Adapted:
        """The kernel of one slice of a stack with its adapter, as that of a packed kernel."""
        base = self.base[index]  # checks the index
        return dataclasses.replace(self, base=base, a=self.a[index], b=self.b[index])

    def fault(self) -> str | None:
        """What is wrong with the kernel's arrays or the adapter's; None if nothing."""
        fault = self.base.fault()
        if fault is not None:
            return fault
        batch, contraction, outputs = split(self.base)
        rank = getattr(self.a, "shape", (0,))[-1]
        a, b = (*batch, math.prod(contraction), rank), (*batch, rank, math.prod(outputs))
        return intact.float_fault("a", self.a, a) or intact.float_fault("b", self.b, b)

    def value_fault(self) -> str | None:
        """What is wrong with the kernel's codes, where their values can be read."""
        return self.base.value_fault()

    def rows(self, index: Int[AnyArray, "..."], dtype: DTypeLike) -> Float[Array, "... features"]:
        """What the adapter adds to rows of an embedding (vocabulary, features).

        The kernel contracts over its features, so its update ``scale * a @ b`` is
        (features, vocabulary), and a row of the embedding is a column of it. An index
        outside the vocabulary gives NaN, as ``jnp.take`` does.
        """

        def run(
            index: Int[AnyArray, "..."], a: Float[AnyArray, "k r"], b: Float[AnyArray, "r n"]
        ) -> Float[Array, "... features"]:
            columns = jnp.take(b.astype(dtype).T, index, axis=0)
            return columns @ a.astype(dtype).T * jnp.asarray(self.scale, dtype)

        return _mesh.in_auto_rows(run, index, self.a, self.b, outputs=(None,))


no_type_check(Adapted.__init__)  # as of the packed kernels: trees hold more than arrays
register_export(Adapted)


def is_adapted(leaf: object) -> TypeGuard[Adapted]:
    """Whether a leaf is a packed kernel with an adapter."""
    return isinstance(leaf, Adapted)
