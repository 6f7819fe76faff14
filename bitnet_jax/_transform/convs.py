"""``conv_general_dilated``: a plan of how it meets a kernel.

The kernel may be stored in any order of its axes; its codes and its scale are counted in that
order, and the operator of the convolution is told where the window lies in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from bitnet_jax._layers.dimensions import ConvCall
from bitnet_jax._ops.convolution import Convolution
from bitnet_jax._transform import mapped
from bitnet_jax._transform.jaxprs import Eqn, scope
from bitnet_jax._transform.layout import Value
from bitnet_jax._transform.site import Site, not_whole
from bitnet_jax._transform.view import Part, View


class ConvPlan(NamedTuple):
    """A ``conv_general_dilated``; see ``site.Plan``.

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

    def run(self, site: Site, x: jax.Array, value: Value) -> jax.Array:
        """The result of the equation, from a ternary kernel."""
        out = site.eqn.params["dimension_numbers"][2]
        y = self._slices(site, self._ordered(site.eqn, x)[0], value, self.view.kept)
        # The mapped axes were outer digits of the output channels.
        y = jnp.moveaxis(y, range(len(self.batch)), range(y.ndim - 1 - len(self.batch), y.ndim - 1))
        y = y.reshape(*y.shape[: len(out) - 1], -1)
        at = {out[0]: 0, out[1]: y.ndim - 1, **{a: i + 1 for i, a in enumerate(out[2:])}}
        return y.transpose([at[a] for a in range(y.ndim)])

    def inputs(self, eqn: Eqn, where: str, x: jax.Array) -> jax.Array:
        """See ``DotPlan``: each place of the window is a token."""
        if self.convolution.feature_groups != 1:
            _raise_grouped(where, self.convolution.feature_groups)
        x, shared = self._ordered(eqn, x)
        run = self.convolution.patches
        for _ in range(shared):
            run = jax.vmap(run)
        x = run(x)
        return x.reshape(*x.shape[:shared], -1, x.shape[-1])

    def _ordered(self, eqn: Eqn, x: jax.Array) -> tuple[jax.Array, int]:
        """x as (*shared, examples, *space, channels), and how many axes the first are."""
        lhs = eqn.params["dimension_numbers"][0]
        lead = [self.view.length(a) for a in self.batch if a not in self.alone]
        x = x.transpose((lhs[0], *lhs[2:], lhs[1]))
        x = x.reshape(*x.shape[:-1], *lead, x.shape[-1] // math.prod(lead))
        first = range(x.ndim - 1 - len(lead), x.ndim - 1)
        return jnp.moveaxis(x, tuple(first), tuple(range(len(lead)))), len(lead)

    def _slices(self, site: Site, x: jax.Array, value: Value, kept: tuple[int, ...]) -> jax.Array:
        """The convolution, mapped over the axes of slices."""
        left = [a for a in self.batch if a in kept]
        if not left:
            return self._product(site, x, value, kept)
        at, rest = kept.index(left[0]), tuple(a for a in kept if a != left[0])

        def one(x: jax.Array, value: Value) -> jax.Array:
            return self._slices(site, x, value, rest)

        return jax.vmap(one, in_axes=(None if left[0] in self.alone else 0, at))(x, value)

    def _product(self, site: Site, x: jax.Array, value: Value, kept: tuple[int, ...]) -> jax.Array:
        (output,) = (kept.index(a) for a in kept if a not in self.contracting)
        call = ConvCall(
            kernel_shape=tuple(self.view.length(a) for a in kept),
            convolution=self.convolution,
            output_axis=output - len(kept),
        )
        return site.meet(call, x, value)


def plan_conv(eqn: Eqn, side: int, view: View) -> ConvPlan | str:
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
    reason = not_whole(view, contracting, lead)
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


def _raise_grouped(path: str, groups: int) -> NoReturn:
    """Refuses statistics of inputs that differ from output to output."""
    raise NotImplementedError(
        f"calibrate: the kernel at {path} is of a convolution with {groups} feature groups, whose "
        "outputs do not meet the same inputs: they have no statistics in common. Give it a method "
        f"that needs none, method={{'*': 'gptq', {path!r}: 'survivors'}}, or leave it in float "
        "(select=)."
    )


def _spare(view: View) -> int | None:
    """A kept axis of length 1 that no view axis shows any more."""
    shown = {p.axis for parts in view.parts for p in parts}
    return next((a for a in view.kept if a not in shown), None)
