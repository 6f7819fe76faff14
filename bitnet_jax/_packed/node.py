"""What all packed kernels have in common: pytree nodes with arrays codes and scale.

Their arrays are traced, sliced, stacked, donated and sharded like any others, and what is
static never mentions a batch axis, so that ``nn.scan`` may slice stacked layers and ``vmap`` may
stack them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, no_type_check

import jax
import numpy as np
from jaxtyping import Array, Integer

from bitnet_jax._packed import intact
from bitnet_jax._packed.not_trainable import ASKERS, refuse_training
from bitnet_jax._packed.slice_of import SliceOf, one_slice
from bitnet_jax._packed.static_data import register_export, register_state_dict
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import AnyArray
from bitnet_jax._quantize.config import planes_of

Kind = TypeVar("Kind", bound="Node")


class Node:
    """A pytree node with children codes and scale, and the rest static."""

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
    def in_place(self) -> bool:
        """Whether a product reads a layer of this stack where it lies.

        A stored kernel is laid out first, and XLA reads slices by itself where it unpacks.
        """
        return False

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
        self: Kind, index: Integer[AnyArray, ""] | np.integer | int | tuple[Any, ...]
    ) -> Kind:
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
        codes, scale = one_slice(
            who, index, lengths, self.codes, self.scale, in_place=self.in_place
        )
        return dataclasses.replace(self, codes=codes, scale=scale)  # pyright: ignore[reportArgumentType] - all are dataclasses

    __array__ = __matmul__ = __rmatmul__ = _raise_no_array
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _raise_no_array


def _nbytes(array: Array | SliceOf | jax.ShapeDtypeStruct) -> int:
    """Bytes of an array, or of the one that a ``jax.ShapeDtypeStruct`` stands for."""
    return math.prod(array.shape) * array.dtype.itemsize


def register(cls: type[Node]) -> None:
    """Registers a node with children codes and scale, and the rest static.

    Trees of these nodes hold shapes, specs and shardings in the place of arrays, so a run-time
    type checker must not look at what they are made from. The hidden frames of a checker around
    ``flatten`` would also hide who flattens (``not_trainable``).
    """
    no_type_check(cls.__init__)
    keys = jax.tree_util.GetAttrKey("codes"), jax.tree_util.GetAttrKey("scale")

    declared = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType] - all are dataclasses
    names = tuple(field.name for field in declared[2:])
    # Every call of a jitted function runs these for every node: no call is made in vain.
    asker = sys._getframe
    tree_util, tree, flattree, api = ASKERS

    @no_type_check
    def flatten_with_keys(node: Node) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        module = asker(1).f_globals
        if module is tree_util or module is tree or module is flattree or module is api:
            refuse_training(node.codes, asker(1))
        return ((keys[0], node.codes), (keys[1], node.scale)), node._static

    @no_type_check
    def flatten(node: Node) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
        module = asker(1).f_globals
        if module is tree_util or module is tree or module is flattree or module is api:
            refuse_training(node.codes, asker(1))
        return node._flat

    @no_type_check
    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> Node:
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
