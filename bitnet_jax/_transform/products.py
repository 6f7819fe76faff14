"""Where a kernel meets its input: ``dot_general`` and ``conv_general_dilated``.

A plan says over which of the leaf's own axes a product contracts the kernel, which carry slices
with a scale each, and how the axes of input and output go to the canonical order and back. It
is made from the equation and the view alone; where there is none, the reason says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bitnet_jax._layers.dimensions import ConvCall, DotCall
from bitnet_jax._layers.forward import Fields, LayerConfig, run_layer
from bitnet_jax._ops.convolution import Convolution
from bitnet_jax._transform import mapped
from bitnet_jax._transform.jaxprs import scope
from bitnet_jax._transform.kinds import Eqn, Value
from bitnet_jax._transform.view import Part, View

PRODUCTS = ("dot_general", "conv_general_dilated")


class Chosen(NamedTuple):
    """A leaf that is quantised.

    Attributes:
      where: its names joined by ``/``.
      config: how it is quantised.
      box: the box that it came in, which may say how it lies on a mesh.
    """

    where: str
    config: LayerConfig
    box: Any = None


@runtime_checkable
class Plan(Protocol):
    """How one product meets its kernel.

    Attributes:
      contracting: the leaf's axes that meet the input.
      batch: the leaf's axes that carry slices in this product.
    """

    @property
    def contracting(self) -> tuple[int, ...]: ...

    @property
    def batch(self) -> tuple[int, ...]: ...

    def run(self, eqn: Eqn, chosen: Chosen, x: jax.Array, value: Value) -> jax.Array:
        """The result of the equation, from a ternary kernel."""
        ...


def multiplications(eqn: Eqn) -> int:
    """How many numbers an equation multiplies; 0: it is no product."""
    if eqn.primitive.name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[a] for a in axes)
    elif eqn.primitive.name == "conv_general_dilated":
        _, rhs, _ = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[1].aval.shape[a] for a in rhs[1:])
    else:
        return 0
    return math.prod(eqn.outvars[0].aval.shape) * depth


def plan_of(eqn: Eqn, side: int, view: View) -> Plan | str:
    """How a product meets the kernel that is its operand ``side``, or why it does not."""
    if eqn.primitive.name == "dot_general":
        return _plan_dot(eqn, side, view)
    return _plan_conv(eqn, side, view)


def _not_whole(view: View, contracting: Sequence[int], batch: Sequence[int]) -> str | None:
    """Why the scale of a kernel would not be that of the leaf; None: it is."""
    cut = sorted(view.cut - {*batch, *view.taken})
    if cut:
        return f"only a part of its axis {cut[0]} is taken"
    if not contracting:
        return "no axis of it is contracted"
    if len(view.kept) == len(contracting) + len(batch):
        return "it is a vector: no axis of it is an output"
    return None


class DotPlan(NamedTuple):
    """A ``dot_general``; see :class:`Plan`.

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

    def run(self, eqn: Eqn, chosen: Chosen, x: jax.Array, value: Value) -> jax.Array:
        """The result of the equation, from a ternary kernel."""
        view = self.view
        (xc, wc), (xb, wb) = _sided(eqn, self.side)
        met = dict(zip((*xc, *xb), (*wc, *wb), strict=True))
        shared = tuple(a for a in self.batch if a not in self.alone)
        outputs = tuple(a for a in view.kept if a not in self.batch + self.contracting)

        # The axes of x as the parts of the kernel that they meet; rows by their number.
        x_parts: list[Any] = []
        for axis in range(x.ndim):
            own = view.parts[met[axis]] if axis in met else ()
            x_parts += own or (() if axis in xc else (axis,))
        rows = [p for p in x_parts if isinstance(p, int)]
        sizes = [x.shape[p] if isinstance(p, int) else p.length for p in x_parts]
        order = [*view.ordered(shared), *rows, *view.ordered(self.contracting)]
        x = x.reshape(sizes).transpose([x_parts.index(p) for p in order])
        lead = [view.length(a) for a in shared]
        rows_shape = [sizes[x_parts.index(row)] for row in rows]
        x = x.reshape(*lead, *rows_shape, *(view.length(a) for a in self.contracting))

        y = self._slices(eqn, chosen, x, value, self.alone, view.kept)
        # y is (*alone, *shared, *rows, *outputs): to the order of the equation.
        y_parts = [*view.ordered(self.alone), *view.ordered(shared), *rows, *view.ordered(outputs)]
        y = y.reshape([_length(p, rows, rows_shape) for p in y_parts])
        of_x = [a for a in range(eqn.invars[1 - self.side].aval.ndim) if a not in met]
        of_w = [a for a in range(view.ndim) if a not in wc and a not in wb]
        batches = [view.parts[b] or (a,) for a, b in zip(xb, wb, strict=True)]
        free = [[(a,) for a in of_x], [view.parts[a] for a in of_w]]
        groups = [*batches, *(free[0] + free[1] if self.side == 1 else free[1] + free[0])]
        y = y.transpose([y_parts.index(p) for group in groups for p in group])
        shape = [math.prod(_length(p, rows, rows_shape) for p in group) for group in groups]
        return jnp.broadcast_to(y.reshape(shape), eqn.outvars[0].aval.shape)

    def _slices(
        self, eqn: Eqn, chosen: Chosen, x: jax.Array, value: Value, alone: Any, kept: Any
    ) -> jax.Array:
        """The product, mapped over the axes that the kernel alone has."""
        if not alone:
            return self._product(eqn, chosen, x, value, kept)
        at, rest = kept.index(alone[0]), tuple(a for a in kept if a != alone[0])

        def one(value: Value) -> jax.Array:
            return self._slices(eqn, chosen, x, value, alone[1:], rest)

        return jax.vmap(one, in_axes=at)(value)

    def _product(
        self, eqn: Eqn, chosen: Chosen, x: jax.Array, value: Value, kept: Any
    ) -> jax.Array:
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
        return _meet(eqn, chosen, call, x, value)


def _length(part: Any, rows: Sequence[int], rows_shape: Sequence[int]) -> int:
    """The length of a part of the kernel, or of one of x's rows."""
    return rows_shape[rows.index(part)] if isinstance(part, int) else part.length


def _sided(eqn: Eqn, side: int) -> Any:
    """The dimension numbers of a ``dot_general``, those of the input first."""
    contract, batch = eqn.params["dimension_numbers"]
    ours = [tuple(pair[::-1] if side == 0 else pair) for pair in (contract, batch)]
    return tuple(tuple(tuple(map(int, axes)) for axes in pair) for pair in ours)


def _plan_dot(eqn: Eqn, side: int, view: View) -> DotPlan | str:
    (_, wc), (_, wb) = _sided(eqn, side)
    ranks = eqn.invars[0].aval.ndim, eqn.invars[1].aval.ndim
    alone_axes = mapped.mapped_axes(scope(eqn), ranks)[side]
    contracting = _axes_of(view, wc)
    batch = _axes_of(view, wb)
    alone = _axes_of(view, alone_axes)
    if contracting is None or batch is None or alone is None:
        return "a reshape splits an axis, and only a part of it is contracted"
    if any(not view.parts[a] and view.shape[a] > 1 for a in wc):
        return "it is broadcast along an axis that is contracted"
    reason = _not_whole(view, contracting, batch + alone)
    return reason or DotPlan(side, view, contracting, tuple(sorted(batch + alone)), alone)


def _axes_of(view: View, view_axes: Sequence[int]) -> tuple[int, ...] | None:
    """The leaf's axes that some view axes are; None: of one they are only a part."""
    there = {p for a in view_axes for p in view.parts[a]}
    axes = tuple(sorted({p.axis for p in there}))
    return axes if there == set(view.ordered(axes)) else None


class ConvPlan(NamedTuple):
    """A ``conv_general_dilated``; see :class:`Plan`.

    Attributes:
      view: of the kernel.
      contracting: the leaf's axes: window and input channels.
      batch: the leaf's axes that were mapped.
      alone: those of them that the input does not have.
      convolution: the operator of one slice.
    """

    view: View
    contracting: tuple[int, ...]
    batch: tuple[int, ...]
    alone: tuple[int, ...]
    convolution: Convolution

    def run(self, eqn: Eqn, chosen: Chosen, x: jax.Array, value: Value) -> jax.Array:
        """The result of the equation, from a ternary kernel."""
        view = self.view
        lhs, _, out = eqn.params["dimension_numbers"]
        shared = [a for a in self.batch if a not in self.alone]
        x = x.transpose((lhs[0], *lhs[2:], lhs[1]))
        lead = [view.length(a) for a in shared]
        x = x.reshape(*x.shape[:-1], *lead, x.shape[-1] // math.prod(lead))
        first = range(x.ndim - 1 - len(lead), x.ndim - 1)
        x = jnp.moveaxis(x, tuple(first), tuple(range(len(lead))))
        y = self._slices(eqn, chosen, x, value, view.kept)
        # The mapped axes were outer digits of the output channels.
        y = jnp.moveaxis(y, range(len(self.batch)), range(y.ndim - 1 - len(self.batch), y.ndim - 1))
        y = y.reshape(*y.shape[: len(out) - 1], -1)
        at = {out[0]: 0, out[1]: y.ndim - 1, **{a: i + 1 for i, a in enumerate(out[2:])}}
        return y.transpose([at[a] for a in range(y.ndim)])

    def _slices(self, eqn: Eqn, chosen: Chosen, x: jax.Array, value: Value, kept: Any) -> jax.Array:
        """The convolution, mapped over the axes of slices."""
        left = [a for a in self.batch if a in kept]
        if not left:
            return self._product(eqn, chosen, x, value, kept)
        at, rest = kept.index(left[0]), tuple(a for a in kept if a != left[0])

        def one(x: jax.Array, value: Value) -> jax.Array:
            return self._slices(eqn, chosen, x, value, rest)

        return jax.vmap(one, in_axes=(None if left[0] in self.alone else 0, at))(x, value)

    def _product(
        self, eqn: Eqn, chosen: Chosen, x: jax.Array, value: Value, kept: Any
    ) -> jax.Array:
        (output,) = (kept.index(a) for a in kept if a not in self.contracting)
        call = ConvCall(
            kernel_shape=tuple(self.view.length(a) for a in kept),
            convolution=self.convolution,
            output_axis=output - len(kept),
        )
        return _meet(eqn, chosen, call, x, value)


def _plan_conv(eqn: Eqn, side: int, view: View) -> ConvPlan | str:
    if side != 1:
        return "it is the input of a convolution"
    if eqn.params["batch_group_count"] != 1:
        return "its convolution groups the batch"
    output, *window = eqn.params["dimension_numbers"][1]
    groups, parts = eqn.params["feature_group_count"], view.parts[output]
    lead = tuple(p.axis for p in parts[:-1])
    whole = [view.whole(a) for a in window]
    last = parts[-1].axis if parts else _spare(view)
    if last is None or any(p != Part(p.axis, 1, view.length(p.axis)) for p in parts):
        return "its output channels are not one axis of it"
    if any(axis is None and view.shape[a] > 1 for axis, a in zip(whole, window, strict=True)):
        return "an axis of its window is not one axis of it"
    count = mapped.counted(scope(eqn))
    alone = lead if lead and count >= len(lead) else ()
    if lead and not alone and groups % math.prod(p.length for p in parts[:-1]):
        return "its output channels are several axes of it"
    if not alone:
        groups //= math.prod(view.length(a) for a in lead)
    contracting = tuple(a for a in view.kept if a != last and a not in lead)
    reason = _not_whole(view, contracting, lead)
    if reason is not None:
        return reason
    # The window in the order of the leaf, where its scale and its codes are counted.
    order = sorted(range(len(window)), key=lambda i: (whole[i] is None, whole[i] or 0))
    convolution = Convolution(
        window=tuple(view.shape[window[i]] for i in order),
        strides=tuple(eqn.params["window_strides"]),
        padding=tuple(tuple(p) for p in eqn.params["padding"]),
        input_dilation=tuple(eqn.params["lhs_dilation"]),
        kernel_dilation=tuple(eqn.params["rhs_dilation"]),
        feature_groups=groups,
        order=tuple(order.index(i) for i in range(len(window))),
    )
    if convolution.order == (len(window) - 1, *range(len(window) - 1)):
        convolution = convolution._replace(order=None)
    return ConvPlan(view, contracting, lead, alone, convolution)


def _spare(view: View) -> int | None:
    """A kept axis of length 1 that no view axis shows any more."""
    shown = {p.axis for parts in view.parts for p in parts}
    return next((a for a in view.kept if a not in shown), None)


def _meet(eqn: Eqn, chosen: Chosen, call: Any, x: jax.Array, value: Value) -> jax.Array:
    """The one place where a kernel, float or packed, meets its input."""
    fields = Fields(eqn.outvars[0].aval.dtype, eqn.params["precision"], chosen.box)
    return run_layer(
        "ternarize",
        chosen.where,
        chosen.config,
        call,
        x,
        value,
        None,
        strength=None,
        fields=fields,
    )
