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
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from bitnet_jax import _axes, _checks, _dot
from bitnet_jax._ternary import (
    B158,
    INT8,
    ActivationConfig,
    TernaryConfig,
    dequantize_activations,
    quantize_activations,
    quantize_activations_as,
    quantize_as,
    quantize_canonical,
    rms,
    scale_grid,
)

Strength = float | Float32[Array, ""]
DTypeLike = jax.typing.DTypeLike


def fake_quantize(
    w: Float[Array, "..."],
    config: TernaryConfig = B158,
    *,
    contracting_axes: _axes.AxesLike | None = None,
    batch_axes: _axes.AxesLike = (),
    strength: Strength = 1.0,
) -> Float[Array, "..."]:
    """The quantised kernel in its own dtype, with a straight-through gradient.

    Forward ``(1 - strength) * w + strength * quantize(w).dequantize()``,
    backward the identity. At strength 1 every entry is exactly -s, 0 or +s.

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
    t = quantize_as("fake_quantize", w, config, contracting_axes, batch_axes)
    return _through(w, t.dequantize(), _strength("fake_quantize", strength))


def fake_quantize_activations(
    x: Float[Array, "..."],
    config: ActivationConfig = INT8,
    *,
    axes: _axes.AxesLike = -1,
    strength: Strength = 1.0,
) -> Float[Array, "..."]:
    """Activations rounded to their int8 grid, with a straight-through gradient.

    Args:
      x: (..., features), floating point.
      config: bits and eps.
      axes: the axes that share one gamma.
      strength: 0 (float) to 1 (quantised); static or traced float32.

    Returns:
      ``codes * gamma / qmax`` in x's shape and dtype.

    Raises:
      TypeError: ``x`` is not floating point.
      ValueError: a static strength outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> bj.fake_quantize_activations(jnp.array([1.0, 0.3]), bj.ActivationConfig(bits=2)).tolist()
      [1.0, 0.0]

    References:
      Ma et al., arXiv:2402.17764, section 2.
    """
    who = "fake_quantize_activations"
    codes, gamma = quantize_activations_as(who, x, config, axes)
    x_hat = dequantize_activations(codes, gamma, config)
    return _through(x, x_hat, _strength(who, strength))


def ternary_dot(
    x: Float[Array, "*b *m k"],
    w: Float[Array, "..."],
    config: TernaryConfig = B158,
    activations: ActivationConfig | None = INT8,
    *,
    strength: Strength = 1.0,
    contracting_axes: _axes.AxesLike | None = None,
    batch_axes: _axes.AxesLike = (),
    dtype: DTypeLike | None = None,
    backward_dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "*b *m n"]:
    """The training op: ``x @ w`` in int8 x int8 -> int32, with float gradients.

    Forward: the codes of x (per token) times the codes of w, summed in int32,
    then scaled once. Backward, with g the output's gradient and x_q, w_q the
    dequantised operands: ``dw = x_q^T g`` and ``dx = g w_q^T``; nothing flows
    through a scale. Only int8 codes and scales are saved for the backward pass.

    Sums are exact; they round once on their way to float32 where
    ``127 * K >= 2**24``. A token with NaN or Inf gives a NaN row.

    Args:
      x: activations; the last axes meet w's contracting axes, in order. With
        batch axes, x starts with them.
      w: kernel, quantised from the dtype it has. 2-D: (in, out).
      config: the weights' quantiser.
      activations: the activations' quantiser, or None for weight-only, a float
        product with the dequantised kernel.
      strength: 0 (float) to 1 (ternary), for x and w alike; static or traced.
        Only the static 1.0 saves int8 residuals.
      contracting_axes: the axes of w that meet x; needed for ranks other than 2.
      batch_axes: axes of w that carry slices (experts).
      dtype: of the output; by default what x and w promote to.
      backward_dtype: of the backward products' operands, for example bfloat16;
        they are summed in float32. By default float32.
      precision: of the float product, where there is one.

    Returns:
      (*batch, ..., *outputs) of ``dtype``.

    Raises:
      TypeError: x or w is not floating point.
      ValueError: shapes that do not meet; as :func:`quantize`.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> x, w = jnp.ones((2, 4)), jnp.array([[0.9], [-0.1], [-0.8], [0.6]])
      >>> bj.ternary_dot(x, w).tolist()
      [[0.6000000238418579], [0.6000000238418579]]
      >>> jax.grad(lambda w: bj.ternary_dot(x, w).sum())(w).tolist()
      [[2.0], [2.0], [2.0], [2.0]]

    References:
      Ma et al., arXiv:2402.17764; Bengio et al., arXiv:1308.3432.
    """
    who = "ternary_dot"
    _checks.instance(who, "config", config, TernaryConfig, "Use bj.B158 or your own.")
    _checks.instance(
        who, "activations", activations, (ActivationConfig, type(None)), "Use ActivationConfig()."
    )
    _checks.float_array(who, "x", x)
    _checks.kernel(who, w)
    axes = _axes.resolve(who, w, contracting_axes, batch_axes)
    batch, contraction, outputs = axes.split(w.shape)
    _checks.contraction(who, x.shape, contraction, batch)
    scale_grid(who, contraction, config)
    phase = _strength(who, strength)
    dtype = dtype or jnp.promote_types(x.dtype, w.dtype)

    lead = x.shape[: x.ndim - len(contraction)]
    x = x.reshape(*lead, math.prod(contraction))
    w = _axes.canonical(w, axes)
    if activations is None:
        w_hat = _through(w, _dequantized(w, config), phase)
        y = product(x.astype(dtype), w_hat.astype(dtype), batch, precision)
    else:
        spec = _Spec(config, activations, np.dtype(backward_dtype or jnp.float32))
        y = _int8_dot(spec, x, w) if phase is None else _phased_dot(spec, x, w, phase)
        y = cast(jax.Array, y)  # custom_vjp loses the type
    return y.astype(dtype).reshape(*lead, *outputs)


class _Spec(NamedTuple):
    config: TernaryConfig
    activations: ActivationConfig
    backward_dtype: Any


def _strength(who: str, strength: Strength) -> Float32[Array, ""] | None:
    """None for the static 1.0, which has a path of its own; else a float32 array."""
    if isinstance(strength, (int, float, np.number)):
        _checks.static_strength(who, float(strength))
        if strength == 1.0:
            return None
    return jnp.asarray(strength, jnp.float32)


def _blend(latent: jax.Array, hat: jax.Array, strength: jax.Array) -> jax.Array:
    return (1.0 - strength) * latent.astype(jnp.float32) + strength * hat


def _through(latent: jax.Array, hat: jax.Array, strength: jax.Array | None) -> jax.Array:
    if strength is not None:
        hat = lax.stop_gradient(_blend(latent, hat, strength))
    return _straight_through(latent, hat.astype(latent.dtype))


@jax.custom_vjp
def _straight_through(latent: jax.Array, hat: jax.Array) -> jax.Array:
    """``hat`` forward; its gradient goes to ``latent``, and none to ``hat``."""
    del latent
    return hat


def _straight_through_forward(latent, hat):
    return _straight_through(latent, hat), None


def _straight_through_backward(_, g):
    return g, jnp.zeros_like(g)


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def _dequantized(w: Float[Array, "*b k n"], config: TernaryConfig) -> Float32[Array, "*b k n"]:
    return dequantize_canonical(*quantize_canonical(lax.stop_gradient(w), config))


def dequantize_canonical(codes: jax.Array, scale: jax.Array) -> Float32[Array, "*b k n"]:
    """Codes (*b, K, N) times scale (*b, G, 1 or N), in float32."""
    groups = scale.shape[-2]
    if groups > 1:
        scale = jnp.repeat(scale, codes.shape[-2] // groups, axis=-2)
    return codes.astype(jnp.float32) * scale


def product(x, w, batch: tuple[int, ...], precision=None) -> jax.Array:
    """The float product of x (*b, *m, K) and a canonical kernel."""
    lead = tuple(range(len(batch)))
    dims = (((x.ndim - 1,), (len(lead),)), (lead, lead))
    return lax.dot_general(x, w, dims, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_dot(spec: _Spec, x: jax.Array, w: jax.Array) -> Float32[Array, "*b *m n"]:
    return _int8_dot_forward(spec, x, w)[0]


def _int8_dot_forward(spec: _Spec, x, w):
    codes, gamma = quantize_activations(x, spec.activations)
    w_codes, scale = quantize_canonical(w, spec.config)
    y = _dot.contract(codes, gamma, w_codes, scale, spec.activations.qmax)
    # An empty array carries a dtype through the residuals at no cost.
    dtypes = jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype)
    return y, (codes, gamma, w_codes, scale, dtypes)


def _int8_dot_backward(spec: _Spec, residuals, g):
    codes, gamma, w_codes, scale, (x_like, w_like) = residuals
    step = gamma * np.float32(1 / spec.activations.qmax)
    dw = _weight_gradient(codes, g * step, w_codes.ndim - 2, spec.backward_dtype)
    dx = input_gradient(g, w_codes, scale, spec.backward_dtype)
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


_int8_dot.defvjp(_int8_dot_forward, _int8_dot_backward)


def input_gradient(
    g: Float32[Array, "*b *m n"], codes, scale, dtype: DTypeLike = jnp.float32
) -> Float32[Array, "*b *m k"]:
    """``g w_q^T``; a scale without groups is applied to g, which is smaller than w."""
    batch = codes.ndim - 2
    if scale.shape[-2] == 1:
        g, w = g * _dot.align(scale, g.ndim), codes
    else:
        w = dequantize_canonical(codes, scale)
    lead = tuple(range(batch))
    dims = (((g.ndim - 1,), (batch + 1,)), (lead, lead))
    return lax.dot_general(
        g.astype(dtype), w.astype(dtype), dims, preferred_element_type=jnp.float32
    )


def _weight_gradient(x, g, batch: int, dtype: DTypeLike) -> Float32[Array, "*b k n"]:
    """``x^T g`` over every row axis."""
    lead, rows = tuple(range(batch)), tuple(range(batch, g.ndim - 1))
    dims = ((rows, rows), (lead, lead))
    return lax.dot_general(
        x.astype(dtype), g.astype(dtype), dims, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _phased_dot(spec: _Spec, x, w, strength) -> Float32[Array, "*b *m n"]:
    """The int8 path at strength 1, else a float product of the blends.

    The choice lies inside the custom_vjp: a cond outside would save the
    residuals of both branches.
    """
    batch = w.shape[:-2]
    return lax.cond(
        strength >= 1.0,
        lambda x, w: _int8_dot_forward(spec, x, w)[0],
        lambda x, w: product(*_blends(spec, x, w, strength), batch),
        x,
        w,
    )


def _blends(spec: _Spec, x, w, strength) -> tuple[jax.Array, jax.Array]:
    x_hat = dequantize_activations(*quantize_activations(x, spec.activations), spec.activations)
    return _blend(x, x_hat, strength), _blend(w, _dequantized(w, spec.config), strength)


def _phased_dot_forward(spec: _Spec, x, w, strength):
    return _phased_dot(spec, x, w, strength), (x, w, strength)


def _phased_dot_backward(spec: _Spec, residuals, g):
    x, w, strength = residuals
    x_mix, w_mix = _blends(spec, x, w, strength)
    one = jnp.ones((*w.shape[:-2], 1, 1), jnp.float32)
    dw = _weight_gradient(x_mix, g, w.ndim - 2, spec.backward_dtype)
    dx = input_gradient(g, w_mix, one, spec.backward_dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype), jnp.zeros_like(strength)


_phased_dot.defvjp(_phased_dot_forward, _phased_dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_normalize(x: Float[Array, "... k"], eps: float = 1e-5) -> Float[Array, "... k"]:
    """RMSNorm without parameters over the last axis, in float32, the same bits everywhere.

    ``x / sqrt(mean(x**2) + eps)`` (Zhang and Sennrich, arXiv:1910.07467, eq. 4).
    """
    return _rms_normalize_forward(x, eps)[0]


def _rms_normalize_forward(x, eps: float):
    wide = x.astype(jnp.float32)
    inverse = 1.0 / rms(wide, eps)
    return (wide * inverse).astype(x.dtype), (x, inverse)


def _rms_normalize_backward(eps: float, residuals, g):
    del eps
    x, inverse = residuals
    y, g = x.astype(jnp.float32) * inverse, g.astype(jnp.float32)
    return (((g - y * jnp.mean(g * y, axis=-1, keepdims=True)) * inverse).astype(x.dtype),)


rms_normalize.defvjp(_rms_normalize_forward, _rms_normalize_backward)
