"""Gathers two-bit codes under FSDP, instead of float kernels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from bitnet_jax._context import Ambient
from bitnet_jax._mesh import AnyMesh, Spec, entry_of, fit, made_auto, names, require_axes_of_mesh
from bitnet_jax._packed import trits
from bitnet_jax._quantize.arrays import CanonicalCodes, CanonicalScale

_gathered: Ambient[tuple[str, ...]] = Ambient("gathered", (), key=())


@contextlib.contextmanager
def gather_codes(*axes: str) -> Iterator[None]:
    """Layers inside gather the codes of their kernels over these mesh axes, not the floats.

    For FSDP, where kernels are sharded over the mesh axes of the batch: each shard is
    quantised on its own device, and its codes are gathered at two bits a weight (eight for
    ``Int8Config``, or where a shard is not a multiple of four weights), in the forward pass
    and again in the backward one. Sixteen times fewer bytes than a float32 kernel, and
    the same bits in codes, scales and sums. Left to itself, XLA gathers int8 codes in the
    forward pass, and in the backward one keeps them or gathers them as float32.

    A kernel's placement comes from its Flax metadata (``nn.with_partitioning``, nnx
    ``out_sharding``), from ``ternary_dot(kernel_spec=)``, or from its type where the mesh
    has Explicit axes. There the ``with`` is not needed for axes that the batch is sharded
    over: a kernel sharded over them can only be gathered.

    Args:
      *axes: names of mesh axes, for example ``"data"``.

    Returns:
      A context manager.

    Raises:
      TypeError: an axis that is not a name. Inside, ValueError: a kernel whose sharding
        is not known, or no mesh (``jax.set_mesh``).

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> w = jax.random.normal(jax.random.key(1), (64, 16))
      >>> with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
      ...     y = jax.jit(lambda x, w: bj.ternary_dot(x, w, kernel_spec=P("data", None)))(x, w)
      >>> bool((y == bj.ternary_dot(x, w)).all())
      True

    References:
      Zhao et al., PyTorch FSDP, arXiv:2304.11277, for what is gathered when.
    """
    _require_mesh_axis_names(axes)
    with _gathered.set(axes, key=axes):
        yield


def gathering() -> bool:
    """Whether this is inside :func:`gather_codes`."""
    return bool(_gathered.get())


class Gather(NamedTuple):
    """Brings the shards of a canonical kernel together: its codes, and its scales.

    Attributes:
      mesh: with Auto axes, at least those of the specs.
      shards: the sharding of the codes (*batch, K, N); planes before K are whole.
      whole: the sharding that the product needs.
      packs: whether each shard is a whole number of bytes of four codes.
    """

    mesh: AbstractMesh
    shards: PartitionSpec
    whole: PartitionSpec
    packs: bool

    def __call__(
        self, codes: CanonicalCodes, scale: CanonicalScale
    ) -> tuple[CanonicalCodes, CanonicalScale]:
        """Both, the codes at two bits a weight or at eight; to be called on the mesh."""
        # Twice each: without the first, the second would reach back, to the float kernel.
        shards, whole = (_spread(spec, scale.ndim) for spec in (self.shards, self.whole))
        for spec in (tuple(shards), (*whole[:-2], None, whole[-1])):
            scale = lax.with_sharding_constraint(scale, fit(spec, scale.shape, self.mesh))
        return self._codes(codes, shards, whole), scale

    def _codes(
        self, codes: CanonicalCodes, shards: PartitionSpec, whole: PartitionSpec
    ) -> CanonicalCodes:
        codes = lax.with_sharding_constraint(codes, shards)
        if not self.packs:
            return lax.with_sharding_constraint(codes, whole)
        # Bytes, and not codes, are what has one sharding before and another after.
        packed = trits.pack_trits(codes, axis=-2)
        packed = lax.with_sharding_constraint(packed, shards)
        packed = lax.with_sharding_constraint(packed, whole)
        return trits.unpack_trits(packed, -2, codes.shape[-2])


def _spread(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    """A spec of (*batch, K, N) for codes that may have planes before K."""
    return PartitionSpec(*spec[:-2], *(None,) * (ndim - len(spec)), *spec[-2:])


def gather_of(
    who: str,
    rows: Spec,
    kernel: tuple[Spec, Spec, Spec],
    depth: int,
    *,
    explicit: AnyMesh | None,
    given: bool,
    two_bits: bool,
) -> Gather | None:
    """How the codes of one kernel are to be gathered; None: they are not.

    Args:
      who: the public function, for errors.
      rows: entries of the row axes of x, where its type has them.
      kernel: entries of the kernel's batch, contracting and output axes.
      depth: how many weights are contracted.
      explicit: the mesh of the operands' types, or None.
      given: whether the kernel's sharding is known at all.
      two_bits: whether the codes are trits.
    """
    asked = set(_gathered.get())
    # Auto axes say nothing in types: without the context manager, XLA gathers as it likes.
    if explicit is None and not asked:
        return None
    if asked:
        _require_known_sharding(who, given)
    mesh = explicit if explicit is not None else jax.sharding.get_abstract_mesh()
    _require_mesh_axes(who, sorted(asked), mesh.axis_names)
    # Codes are gathered over the axes asked for, and over those that the rows take.
    batch = {a for entry in rows for a in names(entry)}
    lost = (asked | batch) & {a for part in kernel for entry in part for a in names(entry)}
    if not lost:  # sharded over other axes alone, those of the contraction or the outputs
        return None
    # Canonical codes have one axis for the contraction and one for the outputs. Flattened in
    # C order, they keep a sharding of the first of their axes, and no other.
    merged = [_merged(part) for part in kernel[1:]]
    if None in merged:
        _require_first_axis_sharded(who, not asked, kernel)
        return None
    shards = PartitionSpec(*kernel[0], *(entry_of(part or ()) for part in merged))
    kept = [entry_of([a for a in names(entry) if a not in lost]) for entry in shards]
    # Four codes are a byte: a shard packs where its rows are a multiple of four.
    cuts = math.prod(mesh.shape[a] for a in names(shards[-2]))
    packs = two_bits and depth % (trits.PER_BYTE * cuts) == 0
    return Gather(made_auto(mesh), shards, PartitionSpec(*kept), packs)


def _merged(entries: Spec) -> tuple[str, ...] | None:
    """The mesh axes of several axes as one; None: other axes than the first are sharded."""
    first, *rest = entries or (None,)
    return None if any(names(entry) for entry in rest) else names(first)


def _require_mesh_axis_names(axes: Sequence[object]) -> None:
    """Raises unless they are one or more names."""
    if not axes or not all(isinstance(axis, str) and axis for axis in axes):
        raise TypeError(
            f"gather_codes: `axes` must be one or more names of mesh axes, got {axes!r}. Write for "
            "example bj.gather_codes('data')."
        )


def _require_mesh_axes(who: str, axes: Sequence[str], has: Sequence[str]) -> None:
    """Raises unless there is a mesh with these axes."""
    if axes and not has:
        raise ValueError(
            f"{who}: gather_codes({', '.join(map(repr, axes))}) needs a mesh, and there is none "
            "around this call. Put it under jax.set_mesh(mesh)."
        )
    require_axes_of_mesh(who, "gather_codes", axes, has)


def _require_known_sharding(who: str, known: bool) -> None:
    """Raises if the kernel's sharding is unknown."""
    if not known:
        raise ValueError(
            f"{who}: gather_codes does not know how this kernel is sharded. Annotate it "
            "(nn.with_partitioning, nnx.with_partitioning), pass kernel_spec= to "
            "bj.ternary_dot, or make the mesh with Explicit axes."
        )


def _require_first_axis_sharded(who: str, by_type: bool, parts: tuple[Spec, Spec, Spec]) -> None:
    """Raises where an inner axis of several is sharded, if asked to gather."""
    if not by_type:
        raise NotImplementedError(
            f"{who}: gather_codes cannot gather a kernel sharded as {parts[1:]} (contraction, "
            "outputs): of several axes that are contracted, or put out, only the first may be "
            "sharded. Shard that one, or leave the kernel out of gather_codes."
        )
