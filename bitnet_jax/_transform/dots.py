"""``dot_general``: a plan of how it meets a kernel.

The kernel may be either operand, and seen in any layout. The input is brought to the order
(*batch, *rows, *contraction) of the leaf's own axes, and the result back to the equation's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax._layers.dimensions import DotCall
from bitnet_jax._transform import mapped
from bitnet_jax._transform.jaxprs import Eqn, scope, shape_of
from bitnet_jax._transform.layout import Value
from bitnet_jax._transform.site import Site, not_whole
from bitnet_jax._transform.view import Part, View


class DotPlan(NamedTuple):
    """A ``dot_general``; see ``site.Plan``.

    Attributes:
      side: which operand the kernel is.
      view: of the kernel.
      contracting: the leaf's axes.
      batch: the leaf's axes, those of ``alone`` included.
      alone: the leaf's axes that were mapped without the input.
    """

    side: int
    view: View
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    alone: tuple[int, ...]

    @property
    def shared(self) -> tuple[int, ...]:
        """The leaf's axes that carry slices of kernel and input."""
        return tuple(a for a in self.batch if a not in self.alone)

    def run(self, site: Site, x: jax.Array, value: Value) -> jax.Array:
        """The result of the equation, from a ternary kernel."""
        view, eqn, shared = self.view, site.eqn, self.shared
        (xc, wc), (xb, wb) = _sided(eqn, self.side)
        met = dict(zip((*xc, *xb), (*wc, *wb), strict=True))
        outputs = tuple(a for a in view.kept if a not in self.batch + self.contracting)
        x, rows, rows_shape = self._ordered(eqn, x)
        y = self._slices(site, x, value, self.alone, view.kept)
        # y is (*alone, *shared, *rows, *outputs): to the order of the equation.
        y_parts = [*view.ordered(self.alone), *view.ordered(shared), *rows, *view.ordered(outputs)]
        y = y.reshape([_length(p, rows, rows_shape) for p in y_parts])
        of_x = [a for a in range(len(shape_of(eqn.invars[1 - self.side]))) if a not in met]
        of_w = [a for a in range(view.ndim) if a not in wc and a not in wb]
        batches = [view.parts[b] or (a,) for a, b in zip(xb, wb, strict=True)]
        free = [[(a,) for a in of_x], [view.parts[a] for a in of_w]]
        groups = [*batches, *(free[0] + free[1] if self.side == 1 else free[1] + free[0])]
        y = y.transpose([y_parts.index(p) for group in groups for p in group])
        shape = [math.prod(_length(p, rows, rows_shape) for p in group) for group in groups]
        return jnp.broadcast_to(y.reshape(shape), shape_of(eqn.outvars[0]))

    def inputs(self, eqn: Eqn, where: str, x: jax.Array) -> jax.Array:
        """What the contraction meets: x as (*shared, tokens, K), K in the leaf's order."""
        del where
        x, _, rows_shape = self._ordered(eqn, x)
        shared = x.shape[: len(self.shared)]
        return x.reshape(
            *shared, math.prod(rows_shape), math.prod(x.shape[-len(self.contracting) :])
        )

    def _ordered(self, eqn: Eqn, x: jax.Array) -> tuple[jax.Array, list[int], list[int]]:
        """x as (*shared, *rows, *contraction), its axes that are rows, and their lengths."""
        view = self.view
        (xc, wc), (xb, wb) = _sided(eqn, self.side)
        met = dict(zip((*xc, *xb), (*wc, *wb), strict=True))
        # The axes of x as the parts of the kernel that they meet; rows by their number.
        x_parts: list[Any] = []
        for axis in range(x.ndim):
            own = view.parts[met[axis]] if axis in met else ()
            x_parts += own or (() if axis in xc else (axis,))
        rows = [p for p in x_parts if isinstance(p, int)]
        sizes = [x.shape[p] if isinstance(p, int) else p.length for p in x_parts]
        order = [*view.ordered(self.shared), *rows, *view.ordered(self.contracting)]
        x = x.reshape(sizes).transpose([x_parts.index(p) for p in order])
        lead = [view.length(a) for a in self.shared]
        rows_shape = [sizes[x_parts.index(row)] for row in rows]
        x = x.reshape(*lead, *rows_shape, *(view.length(a) for a in self.contracting))
        return x, rows, rows_shape

    def _slices(
        self,
        site: Site,
        x: jax.Array,
        value: Value,
        alone: tuple[int, ...],
        kept: tuple[int, ...],
    ) -> jax.Array:
        """The product, mapped over the axes that the kernel alone has."""
        if not alone:
            return self._product(site, x, value, kept)
        at, rest = kept.index(alone[0]), tuple(a for a in kept if a != alone[0])

        def one(value: Value) -> jax.Array:
            return self._slices(site, x, value, alone[1:], rest)

        return jax.vmap(one, in_axes=at)(value)

    def _product(self, site: Site, x: jax.Array, value: Value, kept: tuple[int, ...]) -> jax.Array:
        view = self.view
        contracting = tuple(kept.index(a) for a in self.contracting)
        batch = tuple(kept.index(a) for a in self.batch if a in kept)
        count = len(kept) - len(contracting) + x.ndim - len(contracting) - len(batch)
        call = DotCall(
            kernel_shape=tuple(view.length(a) for a in kept),
            contracting_axes=contracting,
            batch_axes=batch,
            x_order=tuple(range(x.ndim)),
            y_order=tuple(range(count)),
            bias_shape=(),
            bias_spread=(),
        )
        return site.meet(call, x, value)


def _length(part: Part | int, rows: Sequence[int], rows_shape: Sequence[int]) -> int:
    """The length of a part of the kernel, or of one of x's rows."""
    return rows_shape[rows.index(part)] if isinstance(part, int) else part.length


def _sided(eqn: Eqn, side: int) -> Any:
    """The dimension numbers of a ``dot_general``, those of the input first."""
    contract, batch = eqn.params["dimension_numbers"]
    ours = [tuple(pair[::-1] if side == 0 else pair) for pair in (contract, batch)]
    return tuple(tuple(tuple(map(int, axes)) for axes in pair) for pair in ours)


def plan_dot(eqn: Eqn, side: int, view: View) -> DotPlan | str:
    (_, wc), (_, wb) = _sided(eqn, side)
    ranks = len(shape_of(eqn.invars[0])), len(shape_of(eqn.invars[1]))
    alone_axes = mapped.mapped_axes(scope(eqn), ranks)[side]
    contracting = _axes_of(view, wc)
    batch = _axes_of(view, wb)
    alone = _axes_of(view, alone_axes)
    if contracting is None or batch is None or alone is None:
        return "a reshape splits an axis, and only a part of it is contracted"
    if any(not view.parts[a] and view.shape[a] > 1 for a in wc):
        return "it is broadcast along an axis that is contracted"
    reason = not_whole(view, contracting, batch + alone)
    return reason or DotPlan(side, view, contracting, tuple(sorted(batch + alone)), alone)


def _axes_of(view: View, view_axes: Sequence[int]) -> tuple[int, ...] | None:
    """The leaf's axes that some view axes are; None: of one they are only a part."""
    there = {p for a in view_axes for p in view.parts[a]}
    axes = tuple(sorted({p.axis for p in there}))
    return axes if there == set(view.ordered(axes)) else None
