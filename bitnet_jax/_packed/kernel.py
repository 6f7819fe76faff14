"""`PackedTernary`, a kernel at two bits a weight, `PackedInt8`, and prepared forms.

All are pytree nodes: their arrays are traced, sliced, stacked, donated and
sharded like any others, and what is static never mentions a batch axis, so that
``nn.scan`` may slice stacked layers and ``vmap`` may stack them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn, TypeGuard, TypeVar, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8, Integer, UInt8

from bitnet_jax import _checks, _mesh
from bitnet_jax._packed import intact, trits
from bitnet_jax._packed.not_trainable import ASKERS, refuse_training
from bitnet_jax._packed.slice_of import SliceOf, one_slice
from bitnet_jax._packed.static_data import register_export, register_state_dict
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import AnyArray, Codes, DTypeLike, PackedCodes, Scale
from bitnet_jax._quantize.config import B158, Int8Config, TernaryConfig, planes_of
from bitnet_jax._quantize.pinned import pinned
from bitnet_jax._quantize.rotation import block_of
from bitnet_jax._quantize.ternary import dequantize, rotated_back, sum_in_order

_FLOAT32 = np.dtype(np.float32)

_INT8_CONFIG = Int8Config()

T = TypeVar("T")

_Kind = TypeVar("_Kind", bound="_Node")


class _Node:
    """What stored and prepared kernels have in common."""

    codes: Array
    scale: Array
    contracting_axes: tuple[int, ...]
    config: Any  # a KernelConfig; each kind says which
    dtype: np.dtype

    @property
    def planes(self) -> int:
        """How many ternary planes add up to the kernel."""
        return planes_of(self.config)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float kernel this leaf stands for."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The kernel's rank, batch axes included."""
        raise NotImplementedError

    def _batch_ndim(self) -> int:
        """How many batch axes it has."""
        raise NotImplementedError

    @property
    def axes(self) -> kernel_axes.KernelAxes:
        """The kernel's axes, non-negative, as they are in this slice or stack."""
        # Counted from the end, and batch axes first: valid for a slice and for a stack.
        contracting = tuple(a + self.ndim for a in self.contracting_axes)
        batch = tuple(range(self._batch_ndim()))
        taken = {*contracting, *batch}
        return kernel_axes.KernelAxes(
            contracting, batch, tuple(a for a in range(self.ndim) if a not in taken)
        )

    @property
    def size(self) -> int:
        """How many weights it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale."""
        return _nbytes(self.codes) + _nbytes(self.scale)

    @functools.cached_property
    def _static(self) -> tuple[Any, ...]:
        """The fields after codes and scale: made once, because every jitted call asks."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType] - all are dataclasses
        return tuple(getattr(self, field.name) for field in fields[2:])

    @functools.cached_property
    def _flat(self) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
        """Children and static data, as pytrees give them: made once, as above."""
        return (self.codes, self.scale), self._static

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made from: not the arrays a second time."""
        return {name: value for name, value in self.__dict__.items() if name != "_flat"}

    def _no_array(self) -> str:
        return (
            f"{type(self).__name__}: a packed kernel is not an array. bj.matmul(x, kernel) "
            "multiplies from its codes, kernel.dequantize() gives floats; a model runs from it "
            "after bj.linen.ternarize(model) or bj.nnx.ternarize(model)."
        )

    def _raise_no_array(self, *_: object, **__: object) -> NoReturn:
        """Reports a packed kernel that is used as an array, by a float layer or by hand."""
        raise TypeError(self._no_array())

    @property
    def T(self) -> NoReturn:
        """A packed kernel has no transpose; raises with what to do."""
        raise AttributeError(self._no_array())

    def __getitem__(
        self: _Kind, index: Integer[AnyArray, ""] | np.integer | int | tuple[Any, ...]
    ) -> _Kind:
        """The kernel of one slice of a stack: ``stack[i]``, or ``stack[i, j]`` of two batch axes.

        In a traced function (``jax.jit``, the body of ``jax.lax.scan``) a layer of a stack that
        was prepared for ``"cpu"`` is not cut out: its ``codes`` are the stack and the index, and
        the product reads them where they lie. So use it where it is made; what leaves the
        function, or goes round a loop, is ``jax.tree.map(lambda a: a[i], stack)``. Anywhere else
        the slice is a copy, as of an array. The bits are the same.

        Args:
          index: an integer for each of the first batch axes. A traced one is held within its
            axis, as that of an array is.

        Returns:
          A kernel of this kind, without those axes.

        Raises:
          TypeError: the kernel has no batch axes, or the index is no integer.
          IndexError: a static index is out of range, or there are more than batch axes.

        Example:
          >>> import jax, jax.numpy as jnp, bitnet_jax as bj
          >>> stack = bj.prepare(bj.pack(jnp.ones((3, 8, 8)), batch_axes=0))
          >>> def layer(h, i):
          ...     return bj.matmul(h, stack[i]), None
          >>> jax.lax.scan(layer, jnp.ones((1, 8)), jnp.arange(3))[0].shape
          (1, 8)
          >>> [kernel.shape for kernel in stack]
          [(8, 8), (8, 8), (8, 8)]
        """
        who = type(self).__name__
        intact.require_arrays(who, "the stack", self)
        lengths = self.shape[: self._batch_ndim()]
        if not lengths:
            raise TypeError(f"{self._no_array()} Only a stack has an index: its layers.")
        in_place = is_read_in_place(self)
        codes, scale = one_slice(who, index, lengths, self.codes, self.scale, in_place=in_place)
        return dataclasses.replace(self, codes=codes, scale=scale)  # pyright: ignore[reportArgumentType] - all are dataclasses

    __array__ = __matmul__ = __rmatmul__ = _raise_no_array
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _raise_no_array


class _Stored(_Node):
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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prepared(_Node):
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


def _dequantize(packed: Stored, dtype: DTypeLike) -> Float[Array, "..."]:
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


Stored = PackedTernary | PackedInt8

Packed = Stored | Prepared


def _nbytes(array: Array | SliceOf | jax.ShapeDtypeStruct) -> int:
    """Bytes of an array, or of the one that a ``jax.ShapeDtypeStruct`` stands for."""
    return math.prod(array.shape) * array.dtype.itemsize


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
    """Whether a product reads a layer of this stack where it lies.

    A stored kernel is laid out first, and XLA reads slices by itself where it unpacks.
    """
    return isinstance(leaf, Prepared) and leaf.implementation == "cpu"


def is_stored(leaf: object) -> TypeGuard[Stored]:
    """Whether a leaf is a packed kernel in storage layout."""
    return isinstance(leaf, (PackedTernary, PackedInt8))


def _register(cls: type[Packed]) -> None:
    """Registers a node with children codes and scale, and the rest static.

    Trees of these nodes hold shapes, specs and shardings in the place of arrays, so a run-time
    type checker must not look at what they are made from. The hidden frames of a checker around
    ``flatten`` would also hide who flattens (``not_trainable``).
    """
    no_type_check(cls.__init__)
    keys = jax.tree_util.GetAttrKey("codes"), jax.tree_util.GetAttrKey("scale")

    names = tuple(field.name for field in dataclasses.fields(cls))[2:]
    # Every call of a jitted function runs these for every node: no call is made in vain.
    asker = sys._getframe
    tree_util, tree, flattree, api = ASKERS

    @no_type_check
    def flatten_with_keys(node: Packed) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        module = asker(1).f_globals
        if module is tree_util or module is tree or module is flattree or module is api:
            refuse_training(node.codes, asker(1))
        return ((keys[0], node.codes), (keys[1], node.scale)), node._static

    @no_type_check
    def flatten(node: Packed) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
        module = asker(1).f_globals
        if module is tree_util or module is tree or module is flattree or module is api:
            refuse_training(node.codes, asker(1))
        return node._flat

    @no_type_check
    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Packed:
        # What __init__ does: a frozen dataclass sets each field by a call.
        node = object.__new__(cls)
        fields = node.__dict__
        fields["codes"], fields["scale"] = children
        fields["_static"] = aux
        fields.update(zip(names, aux, strict=True))
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    register_export(cls)
    register_state_dict(cls, lambda node: node._static)


for _kind in (PackedTernary, PackedInt8, PreparedTernary, PreparedInt8):
    _register(_kind)


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
