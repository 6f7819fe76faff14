"""Dimension numbers of a layer call: axes, their order, a convolution's window.

Every layer is a product of x (*batch, *rows, *contraction) with a kernel whose axes
are named, or a convolution, channels last. A call is made from shapes alone. Both
Flax front ends make calls, and read the kernels' axes from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from bitnet_jax import _checks
from bitnet_jax._ops.convolution import Convolution

Shape = tuple[int, ...]

Pairs = tuple[tuple[int, int], ...]

PerAxis = int | Sequence[int] | None

Padding = str | int | Sequence[int | Sequence[int]]

# As lax.DotDimensionNumbers: the contracting axes of x and of the kernel, then the batch axes.
DimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]],
    tuple[Sequence[int], Sequence[int]],
]


class DotCall(NamedTuple):
    """A call that is a product, up to the order of axes.

    Attributes:
      kernel_shape: of the float kernel.
      contracting_axes: of the kernel.
      batch_axes: of the kernel.
      x_order: brings x to (*batch, *rows, *contraction).
      y_order: brings (*batch, *rows, *outputs) to the layer's output.
      bias_shape: of the bias parameter.
      bias_spread: the shape that broadcasts it over the output.
    """

    kernel_shape: Shape
    contracting_axes: Shape
    batch_axes: Shape
    x_order: Shape
    y_order: Shape
    bias_shape: Shape
    bias_spread: Shape

    @property
    def features(self) -> int:
        """How many of the last axes of a canonical x are contracted."""
        return len(self.contracting_axes)

    def to_canonical(self, x: jax.Array) -> jax.Array:
        """The input as (*batch, *rows, *contraction)."""
        return x.transpose(self.x_order)

    def from_canonical(self, y: jax.Array, x_shape: Shape) -> jax.Array:
        """The layer's output."""
        del x_shape
        return y.transpose(self.y_order)


class ConvCall(NamedTuple):
    """A call that is a convolution.

    Attributes:
      kernel_shape: (*window, channels of a group, outputs).
      convolution: strides, padding, dilation and groups.
      pad: what to pad the input with, by ``pad_mode``, before it.
      pad_mode: as of ``jnp.pad``; None: nothing to pad.
      output_axis: of the kernel.
    """

    kernel_shape: Shape
    convolution: Convolution
    pad: tuple[tuple[int, int], ...] = ()
    pad_mode: str | None = None
    output_axis: int = -1

    @property
    def contracting_axes(self) -> Shape:
        """Of the kernel: all but the outputs."""
        ndim = len(self.kernel_shape)
        return tuple(a for a in range(ndim) if a != self.output_axis % ndim)

    @property
    def batch_axes(self) -> Shape:
        """A convolution has none."""
        return ()

    @property
    def bias_shape(self) -> Shape:
        """One for each output."""
        return self.kernel_shape[-1:]

    @property
    def bias_spread(self) -> Shape:
        """Broadcasts over the last axis of the output."""
        return self.kernel_shape[-1:]

    @property
    def features(self) -> int:
        """The channels alone."""
        return 1

    def to_canonical(self, x: jax.Array) -> jax.Array:
        """The input as (examples, *space, channels), padded in the modes that XLA has not."""
        space = len(self.kernel_shape) - 1  # the axes of space, and the channels
        # Any number of batch axes becomes one.
        x = x.reshape(math.prod(x.shape[: x.ndim - space]), *x.shape[x.ndim - space :])
        return x if self.pad_mode is None else jnp.pad(x, self.pad, mode=self.pad_mode)

    def from_canonical(self, y: jax.Array, x_shape: Shape) -> jax.Array:
        """The layer's output, its batch axes as the input's."""
        return y.reshape(*x_shape[: len(x_shape) - len(self.kernel_shape) + 1], *y.shape[1:])


Call = DotCall | ConvCall


def dense(x_shape: Shape, features: int) -> DotCall:
    """``nn.Dense``, ``nnx.Linear``: the last axis."""
    return general(x_shape, (-1,), (), (features,))


def general(
    x_shape: Shape, axis: Sequence[int], batch_dims: Sequence[int], features: Shape
) -> DotCall:
    """``nn.DenseGeneral``, ``nnx.LinearGeneral``: any axes, ascending, and batch axes.

    Flax makes the kernel (*batch, *contraction, *features), its batch axes first.
    """
    ndim = len(x_shape)
    axis = _checks.normalize_axes("DenseGeneral", "axis", axis, ndim)
    batch = _checks.normalize_axes("DenseGeneral", "batch_dims", batch_dims, ndim)
    rows = tuple(a for a in range(ndim) if a not in axis and a not in batch)
    lead = tuple(x_shape[a] for a in batch)
    n = len(batch)
    kernel_shape = (*lead, *(x_shape[a] for a in axis), *features)
    dimensions = (axis, range(n, n + len(axis))), (batch, range(n))
    return dot_general(ndim, kernel_shape, dimensions)._replace(
        bias_shape=(*lead, *features), bias_spread=(*lead, *(1,) * len(rows), *features)
    )


def table(shape: Shape, x_ndim: int) -> DotCall:
    """``Embed.attend``: contracts the features of a table (vocabulary, features)."""
    return dot_general(x_ndim, shape, (((x_ndim - 1,), (1,)), ((), ())))


def dot_general(x_ndim: int, kernel_shape: Shape, dimensions: DimensionNumbers) -> DotCall:
    """The product that ``lax.dot_general`` describes, without a bias; axes are not negative."""
    (x_axes, w_axes), (x_batch, w_batch) = dimensions
    # The axis of x that goes with each contracting or batch axis of the kernel.
    x_of = dict(zip((*w_axes, *w_batch), (*x_axes, *x_batch), strict=True))
    contracting, batch = tuple(sorted(w_axes)), tuple(sorted(w_batch))
    rows = [a for a in range(x_ndim) if a not in x_of.values()]
    return DotCall(
        kernel_shape=kernel_shape,
        contracting_axes=contracting,
        batch_axes=batch,
        # x follows the kernel: its batch and contraction in the order of the kernel's axes.
        x_order=(*(x_of[a] for a in batch), *rows, *(x_of[a] for a in contracting)),
        # lax.dot_general's result is (*batch, *rows, *outputs) already.
        y_order=tuple(range(len(rows) + len(kernel_shape) - len(contracting))),
        bias_shape=(),
        bias_spread=(),
    )


def einsum(x_shape: Shape, kernel_shape: Shape, equation: str) -> DotCall:
    """``nn.Einsum``, ``nnx.Einsum``: an equation of two operands, the kernel second."""
    x, w, out = _letters(equation.replace(" ", ""), len(x_shape), len(kernel_shape))
    # A letter that x and w share is contracted, or a batch axis if the result has it too.
    both = [c for c in w if c in x]
    batch, contracted = [c for c in both if c in out], [c for c in both if c not in out]
    rows, outputs = [c for c in x if c not in w], [c for c in w if c not in x]
    _require_einsum_contracts(equation, contracted, [*rows, *outputs], x, w, out)
    y = [*batch, *rows, *outputs]  # what the product returns; y_order makes it the result
    length = dict(zip(w, kernel_shape, strict=True))
    return DotCall(
        kernel_shape=tuple(kernel_shape),
        contracting_axes=tuple(w.index(c) for c in contracted),
        batch_axes=tuple(w.index(c) for c in batch),
        x_order=tuple(x.index(c) for c in (*batch, *rows, *contracted)),
        y_order=tuple(y.index(c) for c in out),
        bias_shape=tuple(length[c] for c in out if c in length),
        bias_spread=tuple(length.get(c, 1) for c in out),
    )


def _letters(equation: str, x_ndim: int, w_ndim: int) -> tuple[str, str, str]:
    """The operands and the result of an equation, with letters for an ellipsis."""
    _require_two_operands(equation)
    operands, out = equation.split("->")
    x, w = operands.split(",")
    # As many unused letters as the ellipsis stands for axes of x.
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    dots = "".join(free[: max(0, x_ndim - len(x.replace("...", "")))])
    x, out = x.replace("...", dots), out.replace("...", dots)
    _require_einsum_ranks(equation, (len(x), len(w)), (x_ndim, w_ndim))
    return x, w, out


def conv(
    x_shape: Shape,
    features: int,
    kernel_size: int | Sequence[int],
    *,
    strides: PerAxis,
    padding: Padding,
    input_dilation: PerAxis,
    kernel_dilation: PerAxis,
    feature_group_count: int,
) -> ConvCall:
    """``nn.Conv``, ``nnx.Conv``: channels last."""
    size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    rank = len(size)
    _require_conv_input(x_shape, rank, feature_group_count)
    each = [_per_axis(v, rank) for v in (strides, input_dilation, kernel_dilation)]
    for_xla, pad, mode = _padding(padding, size, each[2])
    channels = x_shape[-1] // feature_group_count
    convolution = Convolution(
        (*size, channels), each[0], for_xla, each[1], each[2], feature_group_count
    )
    return ConvCall((*size, channels, features), convolution, pad, mode)


def conv_of(layer: Any, x_shape: Shape, features: int) -> ConvCall:
    """:func:`conv` by the fields of a layer, which linen and nnx name alike."""
    return conv(
        x_shape,
        features,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        input_dilation=layer.input_dilation,
        kernel_dilation=layer.kernel_dilation,
        feature_group_count=layer.feature_group_count,
    )


def _per_axis(value: PerAxis, rank: int) -> Shape:
    """One number for each axis of space."""
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _padding(padding: Padding, size: Shape, dilation: Shape) -> tuple[Any, Pairs, str | None]:
    """Padding for XLA; and padding and mode for ``jnp.pad`` before it, or None."""
    rank = len(size)
    if padding in ("SAME", "VALID", "SAME_LOWER"):
        return padding, (), None
    # How far a dilated window reaches beyond its first place.
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        around = tuple((r // 2, (r + 1) // 2) for r in reach)
        mode = "wrap" if padding == "CIRCULAR" else "reflect"
        return "VALID", ((0, 0), *around, (0, 0)), mode  # examples and channels: not padded
    if padding == "CAUSAL" and rank == 1:
        return ((reach[0], 0),), (), None
    if isinstance(padding, int):
        return ((padding, padding),) * rank, (), None
    if isinstance(padding, str) or not isinstance(padding, Sequence) or len(padding) != rank:
        _raise_padding_unknown(padding, rank)
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding), (), None


def _require_two_operands(equation: str) -> None:
    """Raises unless an equation has two operands and a result."""
    if equation.count(",") != 1 or equation.count("->") != 1:
        raise ValueError(
            f"Einsum: `einsum_str` must have two operands and a result, got {equation!r}. Write "
            "for example '...a,ab->...b'."
        )


def _require_einsum_ranks(equation: str, named: Sequence[int], got: Sequence[int]) -> None:
    """Raises unless the operands have the ranks that the equation names."""
    if tuple(named) != tuple(got):
        raise ValueError(
            f"Einsum: {equation!r} names {named[0]} axes of the input and {named[1]} of the "
            f"kernel, got arrays of rank {got[0]} and {got[1]}."
        )


def _require_einsum_contracts(
    equation: str, contracted: Sequence[str], free: Sequence[str], x: str, w: str, out: str
) -> None:
    """Raises unless an equation contracts the input with the kernel."""
    once = all(len(set(part)) == len(part) for part in (x, w, out))
    if not contracted or not once or any(c not in out for c in free):
        raise NotImplementedError(
            f"Einsum: {equation!r} does not contract an input with a kernel: an axis is repeated, "
            "or summed in one operand alone, or none is contracted. Leave this layer in "
            "float (select=bj.exclude(...))."
        )


def _require_conv_input(x_shape: Sequence[int], rank: int, groups: int) -> None:
    """Raises unless an input has the rank and the channels for a convolution."""
    if len(x_shape) < rank + 1:
        raise ValueError(
            f"Conv: the input needs {rank} axes of space and one of channels, got shape "
            f"{tuple(x_shape)}."
        )
    if x_shape[-1] % groups:
        raise ValueError(
            f"Conv: `feature_group_count`={groups} does not divide the {x_shape[-1]} channels of "
            "the input."
        )


def _raise_padding_unknown(value: object, rank: int) -> NoReturn:
    """Reports a padding that is not one of ``nn.Conv``'s."""
    raise ValueError(
        f"Conv: `padding` must be 'SAME', 'VALID', 'CIRCULAR', 'REFLECT', 'CAUSAL' (1-D), an "
        f"integer, or {rank} integers or pairs, got {value!r}."
    )
