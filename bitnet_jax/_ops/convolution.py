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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int8, Int32

_EXACT = 2**24


class Convolution(NamedTuple):
    """How x (examples, *space, channels) meets a kernel (*window, outputs).

    Attributes:
      window: lengths of the kernel's space and of its input channels.
      strides: one for each axis of space.
      padding: (low, high) for each axis of space, or ``"SAME"``, ``"VALID"``.
      input_dilation: one for each axis of space.
      kernel_dilation: one for each axis of space.
      feature_groups: how many groups the channels fall into.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    feature_groups: int = 1

    @property
    def token_axes(self) -> tuple[int, ...]:
        """The axes of x that share one gamma: an example's."""
        return tuple(range(1, len(self.window) + 1))

    def sums(
        self, x: Int8[Array, "b *space c"], w: Int8[Array, "k n"], groups: int
    ) -> Int32[Array, "g b *space n"]:
        """Exact int32 sums of codes, one for each group along the contraction."""
        if groups == 1:
            return self._int32(x, w)[None]
        group = jnp.arange(w.shape[0]) // (w.shape[0] // groups)

        def one(index: jax.Array) -> jax.Array:
            return self._int32(x, jnp.where((group == index)[:, None], w, jnp.int8(0)))

        return lax.map(one, jnp.arange(groups))

    def _int32(self, x: jax.Array, w: jax.Array) -> jax.Array:
        def int8(x, w):
            return self._conv(x, w, preferred_element_type=jnp.int32)

        def bfloat16(x, w):
            x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
            return self._conv(x, w, preferred_element_type=jnp.float32).astype(jnp.int32)

        if 127 * 127 * w.shape[0] > _EXACT:
            return int8(x, w)
        return lax.platform_dependent(x, w, cpu=int8, default=bfloat16)

    def apply(self, x: jax.Array, w: jax.Array, precision: lax.PrecisionLike = None) -> jax.Array:
        """The convolution of floats."""
        return self._conv(x, w, precision=precision)

    def to_input(self, g, w, x_shape: tuple[int, ...], dtype) -> Float32[Array, "b *space c"]:
        """The transpose in x: what an output's gradient says about the input."""
        like = jax.ShapeDtypeStruct(x_shape, dtype)
        w = w.astype(dtype)
        (dx,) = jax.linear_transpose(lambda x: self.apply(x, w), like)(g.astype(dtype))
        return dx.astype(jnp.float32)

    def to_kernel(self, x, g, w_shape: tuple[int, ...], dtype) -> Float32[Array, "k n"]:
        """The transpose in w."""
        like = jax.ShapeDtypeStruct(w_shape, dtype)
        x = x.astype(dtype)
        (dw,) = jax.linear_transpose(lambda w: self.apply(x, w), like)(g.astype(dtype))
        return dw.astype(jnp.float32)

    def _conv(self, x: jax.Array, w: jax.Array, **how: Any) -> jax.Array:
        assert w.shape[-2] == math.prod(self.window)
        last = x.ndim - 1
        space = tuple(range(1, last))
        out = (0, last, *space)
        kernel = (last, last - 1, *range(last - 1))
        return lax.conv_general_dilated(
            x,
            w.reshape(*self.window, w.shape[-1]),
            self.strides,
            self.padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(out, kernel, out),
            feature_group_count=self.feature_groups,
            **how,
        )
