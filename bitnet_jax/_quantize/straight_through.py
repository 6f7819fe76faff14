"""Straight-through estimators: ternary forward, float backward.

Rounding has a zero gradient almost everywhere. The straight-through estimator
[1] passes the output's gradient to the latent float weight unchanged. Each
estimator here is one ``jax.custom_vjp``, not ``w + stop_gradient(q - w)``: in
bfloat16 and float16 that sum leaves the grid.

``strength`` phases quantisation in: ``(1 - strength) * w + strength * q``. That
form is exactly ``q`` at 1. A Python float is static; a traced float32 changes
without retracing. It is a schedule, not a parameter: its gradient is zero.

Hessians and forward mode (``jax.jvp``) of an estimator mean nothing: a
``custom_vjp`` refuses the second and returns zeros for the first.

References:
  [1] Bengio, Leonard and Courville, Estimating or Propagating Gradients Through
      Stochastic Neurons, arXiv:1308.3432.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from bitnet_jax import _checks, _mesh
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import Activations, AnyArray, Gradient, Kernel
from bitnet_jax._quantize.config import B158, INT8, ActivationConfig, Int8Config, KernelConfig
from bitnet_jax._quantize.int8 import activation_codes, dequantize_activations, token_axes
from bitnet_jax._quantize.kernel_spec import KernelSpec, kernel_spec
from bitnet_jax._quantize.pinned import pinned, widened
from bitnet_jax._quantize.rounded import quotient
from bitnet_jax._quantize.statistics import rms
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._quantize.ternary import dequantize_kernel, quantize_kernel


def fake_quantize(
    w: Kernel,
    config: KernelConfig = B158,
    *,
    contracting_axes: kernel_axes.AxesLike | None = None,
    batch_axes: kernel_axes.AxesLike = (),
    strength: Strength = 1.0,
) -> Float[Array, "..."]:
    """The quantised kernel in its own dtype, with a straight-through gradient.

    Forward ``(1 - strength) * w + strength * quantize(w).dequantize()``,
    backward the identity. At strength 1 every entry is exactly -s, 0 or +s, or, with
    ``config.rotation``, what these are rotated back.

    Args:
      w: float32, bfloat16 or float16 kernel. 2-D: (in, out).
      config: the quantiser.
      contracting_axes: the axes that meet x; needed for other ranks than 2.
      batch_axes: axes that carry slices, each with its own scale.
      strength: 0 (float) to 1 (ternary); static or traced float32.

    Returns:
      An array of w's shape and dtype.

    Raises:
      TypeError: ``w`` is not floating point.
      ValueError: as :func:`quantize`; or a static strength outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> w = jnp.array([[0.9, -0.1], [-0.8, 0.2]])
      >>> bj.fake_quantize(w).tolist()
      [[0.5, 0.0], [-0.5, 0.0]]
      >>> jax.grad(lambda w: (3.0 * bj.fake_quantize(w)).sum())(w).tolist()
      [[3.0, 3.0], [3.0, 3.0]]

    References:
      Bengio et al., arXiv:1308.3432; Ma et al., arXiv:2402.17764.
    """
    _checks.require_values("fake_quantize", "`w`", w)
    spec = kernel_spec("fake_quantize", w, config, contracting_axes, batch_axes)
    phase = traced_strength("fake_quantize", strength)
    return _mesh.in_auto_like(functools.partial(fake_quantize_kernel, spec=spec), w, phase)


def fake_quantize_kernel(
    w: Kernel, phase: Float32[AnyArray, ""] | None, spec: KernelSpec
) -> Float[Array, "..."]:
    """:func:`fake_quantize` of a checked kernel; ``phase`` None: at strength 1."""
    # Nothing flows through the scale, only through the estimator below.
    t = quantize_kernel(lax.stop_gradient(w), spec)
    w_hat = dequantize_kernel(t)
    if isinstance(spec.config, Int8Config):  # -s, 0 and +s are exact; int8 codes times s round
        w_hat = pinned(w_hat)
    return straight_through(w, w_hat, phase)


def fake_quantize_activations(
    x: Activations,
    config: ActivationConfig = INT8,
    *,
    axes: kernel_axes.AxesLike = -1,
    strength: Strength = 1.0,
) -> Float[Array, "..."]:
    """Activations rounded to their int8 grid, with a straight-through gradient.

    Args:
      x: (..., features), floating point.
      config: bits, eps and group.
      axes: the axes that share one gamma; with groups, the last.
      strength: 0 (float) to 1 (quantised); static or traced float32.

    Returns:
      ``codes * gamma / qmax`` in x's shape and dtype.

    Raises:
      TypeError: ``x`` is not floating point.
      ValueError: as :func:`quantize_activations`; a static strength outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> bj.fake_quantize_activations(jnp.array([1.0, 0.3]), bj.ActivationConfig(bits=2)).tolist()
      [1.0, 0.0]

    References:
      Ma et al., arXiv:2402.17764, section 2.
    """
    who = "fake_quantize_activations"
    shared = token_axes(who, x, config, axes)

    def run(x: Activations, phase: Float32[AnyArray, ""] | None) -> Float[Array, "..."]:
        codes, gamma = activation_codes(lax.stop_gradient(x), config, shared)
        return straight_through(x, dequantize_activations(codes, gamma, config), phase)

    return _mesh.in_auto_like(run, x, traced_strength(who, strength))


def traced_strength(who: str, strength: Strength) -> Float32[AnyArray, ""] | None:
    """None for the static 1.0, which has a path of its own; else a float32 array."""
    if isinstance(strength, (int, float, np.number)):
        _checks.require_static_strength(who, float(strength))
        if strength == 1.0:  # known when traced: no blend is compiled
            return None
    return jnp.asarray(strength, jnp.float32)


def blend(
    latent: Float[AnyArray, "..."], hat: Float[Array, "..."], strength: Float32[AnyArray, ""]
) -> Float32[Array, "..."]:
    """``(1 - strength) * latent + strength * hat`` in float32: exactly ``hat`` at 1."""
    # Two products: latent + strength * (hat - latent) would miss hat by a rounding at 1.
    return (1.0 - strength) * latent.astype(jnp.float32) + strength * hat


def straight_through(
    latent: Float[AnyArray, "..."], hat: Float[Array, "..."], strength: Float32[AnyArray, ""] | None
) -> Float[Array, "..."]:
    """``hat`` (None: at strength 1) in latent's dtype, with latent's gradient."""
    if strength is not None:
        # The blend depends on latent: without the stop its gradient would come on top.
        hat = lax.stop_gradient(blend(latent, hat, strength))
    return _straight_through(*_mesh.varying_alike(latent, hat.astype(latent.dtype)))


@jax.custom_vjp
def _straight_through(
    latent: Float[AnyArray, "..."], hat: Float[Array, "..."]
) -> Float[Array, "..."]:
    """``hat`` forward; its gradient goes to ``latent``, and none to ``hat``."""
    del latent
    return hat


def _straight_through_forward(
    latent: Float[AnyArray, "..."], hat: Float[Array, "..."]
) -> tuple[Float[Array, "..."], None]:
    return _straight_through(latent, hat), None


def _straight_through_backward(_: None, g: Gradient) -> tuple[Gradient, Gradient]:
    return g, jnp.zeros_like(g)


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_normalize(x: Float[AnyArray, "... k"], eps: float = 1e-5) -> Float[Array, "... k"]:
    """RMSNorm without parameters over the last axis, in float32, the same bits everywhere.

    ``x / sqrt(mean(x**2) + eps)`` (Zhang and Sennrich, arXiv:1910.07467, eq. 4).
    """
    return _rms_normalize_forward(x, eps)[0]


_NormResiduals = tuple[Float[Array, "... k"], Float32[Array, "... 1"]]


def _rms_normalize_forward(
    x: Float[AnyArray, "... k"], eps: float
) -> tuple[Float[Array, "... k"], _NormResiduals]:
    wide = widened(x)
    # A reciprocal and a product, as the backward pass has them: not a division by the root.
    inverse = quotient(1.0, rms(wide, eps))
    return (wide * inverse).astype(x.dtype), (x, inverse)


def _rms_normalize_backward(
    eps: float, residuals: _NormResiduals, g: Float[AnyArray, "... k"]
) -> tuple[Float[Array, "... k"]]:
    del eps
    x, inverse = residuals
    # y = x / rms, so dx = (g - y * mean(g * y)) / rms: g without its part along y.
    y, g = x.astype(jnp.float32) * inverse, g.astype(jnp.float32)
    return (((g - y * jnp.mean(g * y, axis=-1, keepdims=True)) * inverse).astype(x.dtype),)


rms_normalize.defvjp(_rms_normalize_forward, _rms_normalize_backward)
