"""A leaf of the parameters as it is seen after casts, transposes, reshapes and slices.

A kernel is quantised as it was stored: in its own dtype and over its own axes. So what
happens to it on the way to its product is not computed but remembered, in a :class:`View`::

    view  = for each axis of the array that the program sees, the parts of the leaf's axes in it
    part  = (axis, stride, length): of the leaf's axis, the digits that count ``stride`` elements

A leaf (512, 64) that is reshaped to (8, 64, 64) and transposed to (64, 8, 64) has the parts
``((0, 1, 64),), ((0, 64, 8),), ((1, 1, 64),)``. A product that contracts the first two view
axes contracts the whole of the leaf's axis 0, most significant digits first.

Left out: reshapes across axes that were broadcast, strides and reversals. They make a kernel
float, as any arithmetic on it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._quantize.arrays import DTypeLike


class Part(NamedTuple):
    """A run of digits of one of the leaf's axes.

    Attributes:
      axis: of the leaf, as it is stored.
      stride: how many elements along that axis one step is.
      length: how many steps there are.
    """

    axis: int
    stride: int
    length: int


Parts = tuple[Part, ...]

T = TypeVar("T")


class View(NamedTuple):
    """How the program sees one leaf, or one slice of it.

    Invariants:
      - The value that goes with a view has the axes ``kept``, in the order of the leaf.
      - Every kept axis longer than 1 has all of its parts in ``parts``, once each.
      - A view axis without parts has length 1, or was broadcast.

    Attributes:
      leaf: which leaf.
      shape: of the array that the program sees.
      parts: for each axis of ``shape``, outermost first.
      kept: the leaf's axes that the value still has.
      lengths: of the kept axes.
      taken: the leaf's axes off which single slices were taken.
      cut: the leaf's axes of which a part was taken.
      dtypes: what the leaf was cast to, one after the other.
      stated: the config of its own layer; None: of what it was selected with.
    """

    leaf: int
    shape: tuple[int, ...]
    parts: tuple[Parts, ...]
    kept: tuple[int, ...]
    lengths: tuple[int, ...]
    taken: tuple[int, ...] = ()
    cut: frozenset[int] = frozenset()
    dtypes: tuple[np.dtype, ...] = ()
    stated: LayerConfig | None = None

    @property
    def ndim(self) -> int:
        """The rank of what the program sees."""
        return len(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether the value is what the program sees, but for its dtype."""
        whole = tuple((Part(a, 1, n),) for a, n in zip(self.kept, self.lengths, strict=True))
        return self.parts == whole

    def length(self, axis: int) -> int:
        """The length of one of the kept axes."""
        return self.lengths[self.kept.index(axis)]

    def position(self, axis: int) -> int:
        """Where one of the leaf's axes lies in the value."""
        return self.kept.index(axis)

    def whole(self, view_axis: int) -> int | None:
        """The leaf's axis that a view axis is, unsplit and alone; None: it is not one."""
        parts = self.parts[view_axis]
        if len(parts) != 1 or parts[0][1:] != (1, self.length(parts[0].axis)):
            return None
        return parts[0].axis

    def cast(self, dtype: DTypeLike) -> View:
        """After ``convert_element_type``."""
        return self._replace(dtypes=(*self.dtypes, np.dtype(dtype)))

    def transpose(self, order: Sequence[int]) -> View:
        """After ``transpose``."""
        return self._replace(
            shape=tuple(self.shape[a] for a in order), parts=tuple(self.parts[a] for a in order)
        )

    def squeeze(self, axes: Sequence[int]) -> View:
        """After ``squeeze``: axes of length 1 go."""
        rest = [a for a in range(self.ndim) if a not in axes]
        return self.transpose(rest)

    def broadcast(self, shape: Sequence[int], axes: Sequence[int]) -> View:
        """After ``broadcast_in_dim``: view axis i becomes axis ``axes[i]`` of ``shape``."""
        parts: list[Parts] = [()] * len(shape)
        for own, at in zip(self.parts, axes, strict=True):
            parts[at] = own
        stretched = [at for at, n in zip(axes, self.shape, strict=True) if n != shape[at]]
        for at in stretched:
            parts[at] = ()
        return self._replace(shape=tuple(shape), parts=tuple(parts))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """After ``reshape``; None where an axis of the leaf is torn."""
        parts: list[Parts] = []
        for olds, news in _groups(self.shape, shape):
            pieces = [p for a in olds for p in self.parts[a]]
            if math.prod(p.length for p in pieces) != math.prod(self.shape[a] for a in olds):
                if len(olds) != 1 or len(news) != 1:
                    return None  # an axis that was broadcast is merged or split
                parts.append(())
                continue
            dealt = _deal(pieces, [shape[a] for a in news])
            if dealt is None:
                return None
            parts += dealt
        return self._replace(shape=tuple(shape), parts=tuple(parts))

    def take(self, view_axis: int) -> View | None:
        """After one index along a view axis, which stays with length 1; None: it is no axis."""
        axis = self.whole(view_axis)
        if axis is None:
            return None
        at = self.position(axis)
        return self._replace(
            shape=_put(self.shape, view_axis, 1),
            parts=_put(self.parts, view_axis, ()),
            kept=(*self.kept[:at], *self.kept[at + 1 :]),
            lengths=(*self.lengths[:at], *self.lengths[at + 1 :]),
            taken=(*self.taken, axis),
        )

    def narrow(self, view_axis: int, length: int) -> View | None:
        """After a part of a view axis was taken; None: the axis is not one of the leaf."""
        axis = self.whole(view_axis)
        if axis is None:
            return None
        return self._replace(
            shape=_put(self.shape, view_axis, length),
            parts=_put(self.parts, view_axis, (Part(axis, 1, length),)),
            lengths=_put(self.lengths, self.position(axis), length),
            cut=self.cut | {axis},
        )

    def shown(self, value: jax.Array) -> jax.Array:
        """What the program sees, computed from the value."""
        flat = [p for parts in self.parts for p in parts]
        stored = self.ordered(self.kept)
        there = [p for p in stored if p in flat]  # a length of 1 may have been squeezed away
        x = value.reshape([p.length for p in there])
        x = x.transpose([there.index(p) for p in flat])
        x = x.reshape([math.prod(p.length for p in parts) for parts in self.parts])
        x = jnp.broadcast_to(x, self.shape)
        for dtype in self.dtypes:
            x = x.astype(dtype)
        return x

    def ordered(self, axes: Sequence[int]) -> list[Part]:
        """The parts of some of the leaf's axes, in the order that the leaf has them."""
        flat = {p for parts in self.parts for p in parts if p.axis in axes}
        return sorted(flat, key=lambda p: (p.axis, -p.stride))


def of_leaf(leaf: int, shape: Sequence[int]) -> View:
    """A leaf as it is stored."""
    axes = tuple(range(len(shape)))
    parts = tuple((Part(a, 1, n),) for a, n in enumerate(shape))
    return View(leaf, tuple(shape), parts, axes, tuple(shape))


def _put(values: Sequence[T], at: int, value: T) -> tuple[T, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and of new axes with as many elements each."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, m, n = [], [], 1, 1
        while True:
            if m <= n and i < len(old) and (m < n or not olds):
                olds.append(i)
                m, i = m * old[i], i + 1
            elif n <= m and j < len(new) and (n < m or not news):
                news.append(j)
                n, j = n * new[j], j + 1
            else:
                break
        groups.append((olds, news))
    return groups


def _deal(pieces: list[Part], lengths: Sequence[int]) -> list[Parts] | None:
    """Parts dealt to axes of some lengths, split where they must be; None: they do not fit."""
    pieces = pieces[::-1]
    dealt: list[Parts] = []
    for length in lengths:
        own: list[Part] = []
        # The first part of an axis of length 1 may be one of length 1.
        while length > 1 or (not own and pieces and pieces[-1].length == 1):
            piece = pieces.pop()
            if length % piece.length == 0:
                own.append(piece)
                length //= piece.length
            elif piece.length % length == 0:
                inner = piece.length // length
                own.append(Part(piece.axis, piece.stride * inner, length))
                pieces.append(Part(piece.axis, piece.stride, inner))
                length = 1
            else:
                return None
        dealt.append(_merged(own))
    return dealt


def _merged(parts: Sequence[Part]) -> Parts:
    """Neighbours that are one run of digits, as one part."""
    done: list[Part] = []
    for part in [p for p in parts if p.length > 1] or parts[:1]:
        last = done[-1] if done else None
        if last and last.axis == part.axis and last.stride == part.stride * part.length:
            done[-1] = Part(part.axis, part.stride, last.length * part.length)
        else:
            done.append(part)
    return tuple(done)
