"""A packed kernel of any kind: which kind it is, its axes, and how a stored one is laid out."""

from __future__ import annotations

from typing import TypeGuard

from jaxtyping import Array, UInt8

from bitnet_jax._packed.prepared import Prepared, PreparedInt8, PreparedTernary
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.rotation import block_of

Stored = PackedTernary | PackedInt8

Packed = Stored | Prepared


def split(packed: Packed) -> tuple[tuple[int, ...], ...]:
    """The lengths of the batch, contracting and output axes of a packed kernel."""
    return packed.axes.split(packed.shape)


def block(packed: Packed) -> int:
    """How many features of its input are rotated together; 1: none."""
    return block_of(packed.config, split(packed)[1])


def is_packed(leaf: object) -> TypeGuard[Packed]:
    """Whether a leaf is a packed kernel, stored or prepared.

    For ``is_leaf`` of ``jax.tree.map``, where each kernel is to be met as one. One with an
    adapter is not: the kernel inside it is.

    Args:
      leaf: anything.

    Returns:
      True for what :func:`pack` or :func:`prepare` makes of a kernel.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (3, 64, 64))
      >>> layers = {"kernel": bj.prepare(bj.pack(w, batch_axes=0)), "bias": jax.numpy.ones((3, 64))}
      >>> one = jax.tree.map(lambda leaf: leaf[2], layers, is_leaf=bj.is_packed)
      >>> one["kernel"].shape, one["bias"].shape
      ((64, 64), (64,))
    """
    return isinstance(leaf, (PackedTernary, PackedInt8, Prepared))


def is_read_in_place(leaf: object) -> TypeGuard[Prepared]:
    """Whether a product reads a layer of this stack where it lies."""
    return isinstance(leaf, Prepared) and leaf.in_place


def is_stored(leaf: object) -> TypeGuard[Stored]:
    """Whether a leaf is a packed kernel in storage layout."""
    return isinstance(leaf, (PackedTernary, PackedInt8))


def lay_out(packed: Stored, codes: UInt8[Array, "..."], implementation: str) -> Prepared:
    """The prepared kernel of a stored one, from its codes in an implementation's layout.

    The scale becomes canonical, (*batch, groups, 1 or outputs), and the lengths static. Planes
    are more groups, those of the first plane first.
    """
    _, contraction, outputs = packed.axes.split(packed.shape)
    kind = PreparedInt8 if isinstance(packed, PackedInt8) else PreparedTernary
    joined = packed.joined() if isinstance(packed, PackedTernary) else packed
    return kind(
        codes=codes,
        scale=joined.canonical_scale(),
        contraction=contraction,
        outputs=outputs,
        implementation=implementation,
        config=packed.config,
        dtype=packed.dtype,
        contracting_axes=packed.contracting_axes,
    )


def canonical_bytes(packed: PackedTernary) -> UInt8[Array, "*b r n"]:
    """The bytes of a stored kernel as (*batch, byte rows, outputs); planes before the rows."""
    return kernel_axes.to_canonical(packed.codes, packed.stored_axes)
