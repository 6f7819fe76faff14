"""Second moments of what a kernel meets, collected by differentiating a program.

A *probe* is an array of zeros that travels beside a kernel. Where the kernel meets x, the program
owes a *toll*, ``sum(probe * moments(x))``: zero, and linear in the probe. The interpreter adds the
tolls up and hands them out of jitted, scanned, rematerialised, conditional and sharded code. So
the gradient of the toll is the moments, summed over uses, and stacked where a loop or a map
slices the kernel, by JAX's own transposition. Only the toll is differentiated: no cotangent comes
back through the model, and nothing in it (``stop_gradient``, an argmax) can cut one.

Left out: a ``custom_vjp`` around x, whose rule is not run where no cotangent arrives, and which
costs a backward pass; a callback, which does not know the slice that it is called for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, PyTree

from bitnet_jax import _mesh
from bitnet_jax._quantize.arrays import AnyArray
from bitnet_jax._quantize.kernel_axes import KernelAxes

# Squares of so many rows are summed first: two short float32 sums are closer than a long one.
_BLOCK = 128


class Probe(NamedTuple):
    """Zeros beside a kernel, or the statistics that are their gradient.

    Attributes:
      tokens: how many rows of x that are not all 0 each slice meets.
      moments: sums over rows of ``x_i**2``, or of ``x_i x_j``.
    """

    tokens: Float32[Array, "*b"]
    moments: Float32[Array, "*b k"] | Float32[Array, "*b k k"]


class EqualProbe(Probe):
    """A probe in whose sums every row counts the same: each is divided by its root mean square."""

    __slots__ = ()


class PeakProbe(Probe):
    """A probe whose moments are the largest ``|x_i|`` of the rows of a product.

    Of a kernel that several products meet, or one in all steps of a loop, they would be summed.
    """

    __slots__ = ()


class Probed(NamedTuple):
    """A float kernel on its way with its probe; batch axes come first in both."""

    kernel: jax.Array
    probe: Probe


class Wanted(NamedTuple):
    """What is asked of one kernel.

    Attributes:
      shape: of the kernel.
      axes: of the kernel; the batch axes come first.
      matrix: whether all of ``x_i x_j``, or ``x_i**2`` alone.
      equal: whether each row is divided by its root mean square.
      peak: whether the largest ``|x_i|`` instead.
    """

    shape: tuple[int, ...]
    axes: KernelAxes
    matrix: bool
    equal: bool = False
    peak: bool = False

    def probe(self) -> Probe:
        """The zeros."""
        batch, contraction, _ = self.axes.split(self.shape)
        length = math.prod(contraction)
        each = (length, length) if self.matrix else (length,)
        kind = PeakProbe if self.peak else EqualProbe if self.equal else Probe
        return kind(jnp.zeros(batch, jnp.float32), jnp.zeros((*batch, *each), jnp.float32))


def toll(x: Float[AnyArray, "*shared t k"], probe: Probe, alone: tuple[int, ...]) -> jax.Array:
    """What a product owes: the inner product of its probe with the statistics of its input.

    Args:
      x: the input, its contraction flattened.
      probe: of the kernel, (*batch) first.
      alone: the batch axes that x does not have: each of their slices meets all of x.
    """
    matrix = probe.moments.ndim == probe.tokens.ndim + 2
    kind: Any = type(probe)

    def run(x: jax.Array) -> Probe:
        x = x.astype(jnp.float32)
        if kind is PeakProbe:
            return kind(_statistics(x, matrix=False).tokens, _peaks(x))
        return kind(*_statistics(_equal_rows(x) if kind is EqualProbe else x, matrix))

    def whole(_: Any) -> Probe:
        return kind(PartitionSpec(), PartitionSpec())

    found = _mesh.in_auto(run, lax.stop_gradient(x), out=whole)
    owed = jax.tree.map(lambda zeros, sums: jnp.sum(zeros.sum(alone) * sums), probe, found)
    return owed.tokens + owed.moments


class Paired(NamedTuple):
    """Sums over the rows y of an input, and over the rows x that it stands for.

    Attributes:
      tokens: how many rows of y are not all 0.
      moments: sums of ``y_i**2``, or of ``y_i y_j``.
      cross: sums of ``y_i x_j``; None: they are not asked for.
    """

    tokens: Float32[Array, "*b"]
    moments: Float32[Array, "*b k"] | Float32[Array, "*b k k"]
    cross: Float32[Array, "*b k k"] | None


@functools.partial(jax.jit, static_argnames=("matrix", "equal"))
def paired(
    y: Float[AnyArray, "*b t k"], x: Float[AnyArray, "*b t k"] | None, *, matrix: bool, equal: bool
) -> Paired:
    """Sums over rows, at once.

    Args:
      y: what a kernel meets.
      x: what y stands for; None: no cross sums.
      matrix: whether all of ``y_i y_j``, or ``y_i**2`` alone.
      equal: whether each pair of rows is divided by the root mean square of y's.
    """

    def run(y: jax.Array, *others: jax.Array) -> Paired:
        y = y.astype(jnp.float32)
        size = _sizes(y) if equal else jnp.float32(1)
        sums = _statistics(y / size, matrix)
        if not others:
            return Paired(*sums, None)
        pair = y / size, others[0].astype(jnp.float32) / size
        cross = jnp.einsum("...ti,...tj->...ij", *pair, precision=lax.Precision.HIGHEST)
        return Paired(*sums, cross)

    def whole(_: Any) -> Any:
        kind: Any = Paired
        return kind(PartitionSpec(), PartitionSpec(), None if x is None else PartitionSpec())

    return _mesh.in_auto(run, y, *(() if x is None else (x,)), out=whole)


def _equal_rows(x: Float32[Array, "*shared t k"]) -> jax.Array:
    """Rows over their root mean squares; rows of zeros stay, and NaN and Inf come out as NaN."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    x = x / jnp.where(largest == 0, jnp.float32(1), largest)  # so that no square overflows
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(largest == 0, jnp.float32(1), mean))


def _sizes(x: Float32[Array, "*b t k"]) -> Float32[Array, "*b t 1"]:
    """The root mean squares of rows; 1 of rows of zeros."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scaled = x / jnp.where(largest == 0, jnp.float32(1), largest)
    size = largest * jnp.sqrt(jnp.mean(jnp.square(scaled), axis=-1, keepdims=True))
    return jnp.where(largest == 0, jnp.float32(1), size)


def _statistics(x: Float32[Array, "*shared t k"], matrix: bool) -> Probe:
    tokens = jnp.any(x != 0, axis=-1).astype(jnp.float32).sum(axis=-1)
    if matrix:
        pairs = jnp.einsum("...ti,...tj->...ij", x, x, precision=lax.Precision.HIGHEST)
        return Probe(tokens, pairs)
    rows = x.shape[-2]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -rows % _BLOCK), (0, 0)]
    squares = jnp.pad(jnp.square(x), padding)
    blocks = squares.reshape(*x.shape[:-2], -1, _BLOCK, x.shape[-1])
    return Probe(tokens, blocks.sum(axis=-2).sum(axis=-2))


def _peaks(x: Float32[Array, "*shared t k"]) -> jax.Array:
    """The largest absolute value of each feature; NaN where there is one."""
    return jnp.max(jnp.abs(x), axis=-2, initial=0)


def placed(spec: PartitionSpec) -> PartitionSpec:
    """The spec of a kernel that ``shard_map`` splits along batch axes alone, for its probe too."""
    entries = [*spec]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def once(owed: jax.Array, axes: Sequence[str]) -> jax.Array:
    """A toll inside ``shard_map``, owed by one of the devices that have the same one."""
    for axis in axes:
        if axis not in _mesh.varying(owed):
            owed = jnp.where(lax.axis_index(axis) == 0, owed, jnp.float32(0))
    return owed


def plain(value: PyTree) -> Any:
    """The float kernel of a probed one; any other value as it is."""
    return value.kernel if isinstance(value, Probed) else value
