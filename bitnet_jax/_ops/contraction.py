"""A product of codes and its gradients: one pair of ``jax.custom_vjp`` for every layer.

What differs between a dense layer and a convolution is the operator
(``product.Product``, ``convolution.Convolution``). Only int8 codes and scales are saved
for the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int8

from bitnet_jax import _mesh
from bitnet_jax._ops.codes_product import Gamma, Operator, multiply_codes
from bitnet_jax._ops.gather import Gather
from bitnet_jax._ops.product import align_scale
from bitnet_jax._quantize.arrays import (
    Activations,
    AnyArray,
    CanonicalKernel,
    DTypeLike,
    Gradient,
    PlaneCodes,
    PlaneScale,
)
from bitnet_jax._quantize.config import ActivationConfig, KernelConfig, planes_of
from bitnet_jax._quantize.int8 import activation_codes, dequantize_activations
from bitnet_jax._quantize.rotation import rotated
from bitnet_jax._quantize.straight_through import blend, straight_through
from bitnet_jax._quantize.ternary import dequantize_canonical, quantize_canonical


class Contraction(NamedTuple):
    """What is static about a contraction of x with a canonical kernel.

    Attributes:
      operator: the product or the convolution.
      config: the kernel's quantiser.
      activations: that of the activations; None: a float product.
      backward_dtype: of the backward products' operands.
      gather: brings the kernel's shards together; None: they stay where they are.
      block: how many features of x are rotated together; the kernel is rotated already.
    """

    operator: Operator
    config: KernelConfig
    activations: ActivationConfig | None
    backward_dtype: np.dtype
    gather: Gather | None
    block: int = 1

    @property
    def qmax(self) -> int:
        """The largest code of x."""
        return self._int8().qmax

    @property
    def planes(self) -> int:
        """How many planes add up to the kernel."""
        return planes_of(self.config)

    def quantized(self, x: Activations) -> tuple[Int8[Array, "..."], Gamma]:
        """The codes of x, rotated, and their gammas."""
        return activation_codes(x, self._int8(), self.operator.token_axes, self.block)

    def dequantized(self, x: Activations) -> Float32[Array, "..."]:
        """x rounded to its int8 grid."""
        return dequantize_activations(*self.quantized(x), self._int8())

    def kernel_gradient(
        self, codes: Int8[Array, "..."], gamma: Gamma, g: Gradient, w_shape: tuple[int, ...]
    ) -> Float32[Array, "*b k n"]:
        """``x_q^T g``; a step without groups is applied to g, one product fewer."""
        to_kernel, dtype = self.operator.to_kernel, self.backward_dtype
        if gamma.shape[-1] == 1:
            return to_kernel(codes, g * (gamma * np.float32(1 / self.qmax)), w_shape, dtype)
        x = dequantize_activations(codes, gamma, self._int8())
        return to_kernel(x, g, w_shape, dtype)

    def on_mesh(self) -> contextlib.AbstractContextManager[object]:
        """The gather's mesh, on which its specs mean something.

        A custom_vjp is traced outside of its caller's contexts.
        """
        if self.gather is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.gather.mesh)

    def whole(self, w_codes: PlaneCodes, scale: PlaneScale) -> tuple[PlaneCodes, PlaneScale]:
        """Gathers w's codes and scale. Only this device's shard is kept as a residual."""
        return (w_codes, scale) if self.gather is None else self.gather(w_codes, scale)

    def _int8(self) -> ActivationConfig:
        assert self.activations is not None  # contract sends weight-only to the float product
        return self.activations


def contract(
    spec: Contraction,
    x: Activations,
    w: CanonicalKernel,
    phase: Float32[AnyArray, ""] | None,
    dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> Float[Array, "..."]:
    """x times a canonical kernel, by a path for each kind of activations and strength."""
    if spec.activations is None or phase is not None:
        # In front of a float product; the int8 path has the rotation in its quantiser.
        x, spec = rotated(x, spec.block), spec._replace(block=1)
    if spec.activations is None:
        # Weight-only: a float product with the kernel on its grid, and XLA's own gradient.
        with spec.on_mesh():
            quantized = quantize_canonical(lax.stop_gradient(w), spec.config)
            w_hat = dequantize_canonical(*spec.whole(*quantized), spec.planes)
            w_hat = straight_through(w, w_hat, phase)
        return spec.operator.apply(x.astype(dtype), w_hat.astype(dtype), precision)
    x, w, phase = _mesh.varying_alike(x, w, phase)
    # A traced strength has a path of its own: it saves float operands, not codes.
    y = _int8_dot(spec, x, w) if phase is None else _phased_dot(spec, x, w, phase)
    return cast(jax.Array, y).astype(dtype)  # custom_vjp loses the type


# Codes and gamma of x, codes and scale of w, and an empty array of each one's dtype.
_Residuals = tuple[Int8[Array, "..."], Gamma, PlaneCodes, PlaneScale, tuple[jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_dot(spec: Contraction, x: Activations, w: CanonicalKernel) -> Float32[Array, "..."]:
    return _int8_dot_forward(spec, x, w)[0]


def _int8_dot_forward(
    spec: Contraction, x: Activations, w: CanonicalKernel
) -> tuple[Float32[Array, "..."], _Residuals]:
    with spec.on_mesh():
        # Before the gather: each shard is quantised where it is.
        codes, gamma = spec.quantized(x)
        w_codes, scale = quantize_canonical(w, spec.config)
        whole = spec.whole(w_codes, scale)
        y = multiply_codes(spec.operator, codes, gamma, *whole, spec.qmax, spec.config)
    # An empty array carries a dtype through the residuals at no cost.
    dtypes = jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype)
    # The codes before whole: under a gather, the shard is saved and gathered again.
    return y, (codes, gamma, w_codes, scale, dtypes)


def _int8_dot_backward(
    spec: Contraction, residuals: _Residuals, g: Gradient
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    codes, gamma, w_codes, scale, (x_like, w_like) = residuals
    dtype = spec.backward_dtype
    with spec.on_mesh():
        # Straight through to the kernel, whatever planes its codes have.
        w_shape = (*w_codes.shape[: -3 if spec.planes > 1 else -2], *w_codes.shape[-2:])
        dw = spec.kernel_gradient(codes, gamma, g, w_shape)
        whole = spec.whole(w_codes, scale)
        dx = input_gradient(spec.operator, g, *whole, codes.shape, dtype, spec.planes)
        dx = rotated(dx, spec.block)  # R is its own transpose
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


_int8_dot.defvjp(_int8_dot_forward, _int8_dot_backward)


def input_gradient(
    operator: Operator,
    g: Gradient,
    codes: PlaneCodes,
    scale: PlaneScale,
    x_shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
    planes: int = 1,
) -> Float32[Array, "..."]:
    """``g w_q^T``; a scale without groups is applied to g, which is smaller than w."""
    if planes == 1 and scale.shape[-2] == 1:
        # (g * s) w_codes^T: a scale for each output, or one, leaves the sum over outputs.
        return operator.to_input(g * align_scale(scale, g.ndim), codes, x_shape, dtype)
    return operator.to_input(g, dequantize_canonical(codes, scale, planes), x_shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _phased_dot(
    spec: Contraction, x: Activations, w: CanonicalKernel, strength: Float32[AnyArray, ""]
) -> Float32[Array, "..."]:
    """The int8 path at strength 1, else a float product of the blends.

    The choice lies inside the custom_vjp: a cond outside would save the
    residuals of both branches.
    """
    return lax.cond(
        strength >= 1.0,
        lambda x, w: _int8_dot_forward(spec, x, w)[0],
        lambda x, w: spec.operator.apply(*_blends(spec, x, w, strength)),
        x,
        w,
    )


def _blends(
    spec: Contraction, x: Activations, w: CanonicalKernel, strength: Float32[AnyArray, ""]
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """x and w on their way from float to codes."""
    # No gather here: below strength 1 the float kernel itself is needed.
    w_hat = dequantize_canonical(*quantize_canonical(w, spec.config), planes=spec.planes)
    return blend(x, spec.dequantized(x), strength), blend(w, w_hat, strength)


def _phased_dot_forward(
    spec: Contraction, x: Activations, w: CanonicalKernel, strength: Float32[AnyArray, ""]
) -> tuple[Float32[Array, "..."], tuple[AnyArray, AnyArray, Float32[AnyArray, ""]]]:
    return _phased_dot(spec, x, w, strength), (x, w, strength)


def _phased_dot_backward(
    spec: Contraction,
    residuals: tuple[AnyArray, AnyArray, Float32[AnyArray, ""]],
    g: Gradient,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float32[AnyArray, ""]]:
    x, w, strength = residuals
    # The products of the blends; each blend's own derivative is straight through, that is 1.
    x_mix, w_mix = _blends(spec, x, w, strength)
    dw = spec.operator.to_kernel(x_mix, g, w.shape, spec.backward_dtype)
    dx = spec.operator.to_input(g, w_mix, x.shape, spec.backward_dtype)
    # A strength is a schedule, not a parameter.
    return dx.astype(x.dtype), dw.astype(w.dtype), jnp.zeros_like(strength)


_phased_dot.defvjp(_phased_dot_forward, _phased_dot_backward)
