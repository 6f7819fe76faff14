"""The operator of a convolution, channels last: integer sums, float form, transposes.

``Convolution`` does for a convolution what ``Product`` does for a
dense layer. Its kernel is canonical too, (K, N) with ``K = prod(window)``, the
window and the input channels of one feature group. One example shares one
gamma: a scale for each pixel could not leave the window's sum.

XLA's CPU backend has a fast int8 convolution; its GPU and TPU backends have
bfloat16 ones, and those are as exact while the sums fit 24 bits: a code has at
most 7 bits, and their products are summed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Int32, Shaped

from bitnet_jax import _mesh
from bitnet_jax._quantize.arrays import Activations, AnyArray, DTypeLike, Gradient, Kernel

_EXACT = 2**24  # float32 has 24 bits of significand


class Convolution(NamedTuple):
    """The operator of a convolution: x (examples, *space, channels), kernel (*window, outputs).

    Attributes:
      window: lengths of the kernel's space and of its input channels.
      strides: one for each axis of space.
      padding: (low, high) for each axis of space, or ``"SAME"``, ``"VALID"``.
      input_dilation: one for each axis of space.
      kernel_dilation: one for each axis of space.
      feature_groups: how many groups the channels fall into.
      order: where the input channels and each axis of space lie in ``window``, for kernels
        that are not stored channels last; None: (*space, channels).
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    feature_groups: int = 1
    order: tuple[int, ...] | None = None

    @property
    def has_channels_last(self) -> bool:
        """Whether the input channels are the last of ``window``."""
        return self.order is None or self.order[0] == len(self.window) - 1

    @property
    def token_axes(self) -> tuple[int, ...]:
        """The axes of x that share one gamma: an example's."""
        return tuple(range(1, len(self.window) + 1))

    def sums(
        self, x: Int8[Array, "b *space c"], w: Int8[Array, "k n"], groups: int
    ) -> Int32[Array, "g b *out n"]:
        """Exact int32 sums of codes, one for each group along the contraction."""
        if groups == 1:
            return self._int32(x, w)[None]
        # A window cannot be cut: each group convolves with all other weights at code 0.
        group = jnp.arange(w.shape[0]) // (w.shape[0] // groups)

        def one(index: Int32[Array, ""]) -> Int32[Array, "b *out n"]:
            return self._int32(x, jnp.where((group == index)[:, None], w, jnp.int8(0)))

        # One group after another: all at once would hold as many kernels as there are groups.
        return lax.map(one, jnp.arange(groups))

    def _int32(
        self, x: Int8[Array, "b *space c"], w: Int8[Array, "k n"]
    ) -> Int32[Array, "b *out n"]:
        def int8(x: jax.Array, w: jax.Array) -> jax.Array:
            return self._conv(x, w, preferred_element_type=jnp.int32)

        def bfloat16(x: jax.Array, w: jax.Array) -> jax.Array:
            x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
            return self._conv(x, w, preferred_element_type=jnp.float32).astype(jnp.int32)

        # Float32 holds every partial sum exactly only up to here.
        if 127 * 127 * w.shape[0] > _EXACT:
            return int8(x, w)
        return lax.platform_dependent(x, w, cpu=int8, default=bfloat16)

    def apply(
        self, x: Activations, w: Kernel, precision: lax.PrecisionLike = None
    ) -> Float[Array, "b *out n"]:
        """The convolution of floats."""
        return self._conv(x, w, precision=precision)

    def patches(self, x: Activations) -> Float[Array, "b *out k"]:
        """What each place of the window contracts, without feature groups: K as in a kernel."""
        space = x.ndim - 2
        order = self.order or (space, *range(space))
        lengths = [self.window[at] for at in order]
        last, axes = x.ndim - 1, tuple(range(1, x.ndim - 1))
        dims = (0, last, *axes), (last, last - 1, *range(space)), (0, last, *axes)
        found = lax.conv_general_dilated_patches(
            x,
            lengths[1:],
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(*dims),
            precision=lax.Precision.HIGHEST,
        )
        # Its features are (channels, *space); the kernel's are where `order` says.
        lead = found.shape[:-1]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        found = found.reshape(*lead, *lengths)
        found = found.transpose(*range(len(lead)), *(len(lead) + i for i in inverse))
        return found.reshape(*lead, -1)

    def to_input(
        self,
        g: Float[AnyArray, "b *out n"],
        w: Shaped[AnyArray, "k n"],
        x_shape: tuple[int, ...],
        dtype: DTypeLike,
    ) -> Float32[Array, "b *space c"]:
        """The transpose in x: the gradient of the input."""
        w = w.astype(dtype)  # codes or floats: linear in x all the same
        return _transposed(lambda x: self.apply(x, w), x_shape, g, dtype)

    def to_kernel(
        self,
        x: Shaped[AnyArray, "b *space c"],
        g: Float[AnyArray, "b *out n"],
        w_shape: tuple[int, ...],
        dtype: DTypeLike,
    ) -> Float32[Array, "k n"]:
        """The transpose in w: the gradient of the kernel."""
        x = x.astype(dtype)
        return _transposed(lambda w: self.apply(x, w), w_shape, g, dtype)

    def _conv(
        self,
        x: Shaped[AnyArray, "b *space c"],
        w: Shaped[AnyArray, "k n"],
        *,
        precision: lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> Shaped[Array, "b *out n"]:
        assert w.shape[-2] == math.prod(self.window)
        # Axes of x and y: batch, channels, space; of the kernel: outputs, inputs, space.
        last = x.ndim - 1
        space = tuple(range(1, last))
        out = (0, last, *space)
        kernel = (last, *(self.order or (last - 1, *range(last - 1))))
        return lax.conv_general_dilated(
            x,
            w.reshape(*self.window, w.shape[-1]),  # (K, N) -> (*window, N), channels last in K
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(out, kernel, out),
            feature_group_count=self.feature_groups,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )


def _transposed(
    linear: Callable[[jax.Array], jax.Array],
    shape: tuple[int, ...],
    g: Gradient,
    dtype: DTypeLike,
) -> Float32[Array, "..."]:
    """g through the transpose of a linear function of an array of this shape."""
    g = g.astype(dtype)
    like = _mesh.struct_varying_like(shape, dtype, g)  # nothing is computed with it
    (gradient,) = jax.linear_transpose(linear, like)(g)
    return gradient.astype(jnp.float32)
