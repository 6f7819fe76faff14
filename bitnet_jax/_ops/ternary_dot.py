"""The training op: int8 x int8 -> int32 forward, straight-through float backward.

One pair of ``jax.custom_vjp`` serves every layer; what differs between a dense
layer and a convolution is the operator (``product.Product``,
``convolution.Convolution``).
Only int8 codes and scales are saved for the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32

from bitnet_jax import _checks, _mesh
from bitnet_jax._checks import describe
from bitnet_jax._ops.convolution import Convolution
from bitnet_jax._ops.gather import Gather, gather_of
from bitnet_jax._ops.product import Product, align_scale, group_epilogue
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.int8 import (
    INT8,
    ActivationConfig,
    Int8Config,
    check_activations,
    dequantize_activations,
    quantize_activations_as,
)
from bitnet_jax._quantize.straight_through import blend, straight_through, traced_strength
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._quantize.ternary import B158, KernelConfig, axes_to_contract, quantize_canonical

DTypeLike = jax.typing.DTypeLike

Operator = Product | Convolution


def ternary_dot(
    x: Float[Array, "*b *m k"],
    w: Float[Array, "..."],
    config: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    *,
    strength: Strength = 1.0,
    contracting_axes: kernel_axes.AxesLike | None = None,
    batch_axes: kernel_axes.AxesLike = (),
    dtype: DTypeLike | None = None,
    backward_dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    kernel_spec: PartitionSpec | None = None,
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
      kernel_spec: how w lies on a mesh, for :func:`gather_codes`, where w's type
        does not say it (Auto axes).

    Returns:
      (*batch, ..., *outputs) of ``dtype``. On Explicit mesh axes it lies as x's rows
      and w's outputs do.

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
    axes = _operands(who, x, w, config, activations, contracting_axes, batch_axes)
    batch, contraction, outputs = axes.split(w.shape)
    _checks.require_contraction(who, x.shape, contraction, batch)
    lead = x.shape[: x.ndim - len(contraction)]
    rows = _mesh.spec_of(x)[: len(lead)]
    placed, gather = _placed(who, rows, w, axes, config, kernel_spec)
    spec = _Spec(Product(), config, activations, np.dtype(backward_dtype or jnp.float32), gather)
    dtype = dtype or jnp.promote_types(x.dtype, w.dtype)

    def run(x: jax.Array, w: jax.Array, phase: jax.Array | None) -> jax.Array:
        x = x.reshape(*lead, math.prod(contraction))
        y = _contract(spec, x, kernel_axes.to_canonical(w, axes), phase, dtype, precision)
        return y.reshape(*lead, *outputs)

    phase = traced_strength(who, strength)
    return _mesh.in_auto_rows(run, x, w, phase, outputs=placed[2])


def ternary_conv(
    x: Float[Array, "b *space c"],
    w: Float[Array, "*window n"],
    convolution: Convolution,
    config: KernelConfig = B158,
    activations: ActivationConfig | None = INT8,
    *,
    strength: Strength = 1.0,
    dtype: DTypeLike | None = None,
    backward_dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    kernel_spec: PartitionSpec | None = None,
) -> Float[Array, "b *space n"]:
    """:func:`ternary_dot` for a convolution: one gamma per example."""
    who = "ternary_conv"
    axes = _operands(who, x, w, config, activations, tuple(range(w.ndim - 1)), ())
    rows = _mesh.spec_of(x)[:1]
    placed, gather = _placed(who, rows, w, axes, config, kernel_spec)
    spec = _Spec(convolution, config, activations, np.dtype(backward_dtype or jnp.float32), gather)
    dtype = dtype or jnp.promote_types(x.dtype, w.dtype)

    def run(x: jax.Array, w: jax.Array, phase: jax.Array | None) -> jax.Array:
        return _contract(spec, x, kernel_axes.to_canonical(w, axes), phase, dtype, precision)

    phase = traced_strength(who, strength)
    return _mesh.in_auto_rows(run, x, w, phase, outputs=placed[2])


def _operands(
    who, x, w, config, activations, contracting_axes, batch_axes
) -> kernel_axes.KernelAxes:
    """Checks the operands of a contraction and names the kernel's axes."""
    check_activations(who, activations)
    _checks.require_float_array(who, "x", x)
    return axes_to_contract(who, w, config, contracting_axes, batch_axes)


def _placed(
    who: str,
    rows: _mesh.Spec,
    w: jax.Array,
    axes: kernel_axes.KernelAxes,
    config: KernelConfig,
    kernel_spec: PartitionSpec | None,
) -> tuple[tuple[_mesh.Spec, _mesh.Spec, _mesh.Spec], Gather | None]:
    """How the kernel lies, (batch, contraction, outputs), and how its codes are gathered."""
    _require_kernel_spec(who, kernel_spec, w.ndim)
    typed = _mesh.is_typed(w)
    lies = _mesh.spec_of(w) if typed else kernel_spec or ()
    parts = axes.split(_mesh.padded(lies, w.ndim))
    gather = gather_of(
        who,
        rows,
        parts,
        math.prod(axes.split(w.shape)[1]),
        explicit=_mesh.explicit_mesh(w),
        given=typed or kernel_spec is not None,
        two_bits=not isinstance(config, Int8Config),
    )
    return parts, gather


class _Spec(NamedTuple):
    operator: Operator
    config: KernelConfig
    activations: Any  # ActivationConfig, or None on the way to a float product
    backward_dtype: Any
    gather: Gather | None

    def quantized(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The codes of x and their gammas."""
        axes = self.operator.token_axes
        return quantize_activations_as("ternary_dot", x, self.activations, axes)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Where the gather's specs mean its mesh: a custom_vjp is traced out of its caller's."""
        if self.gather is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.gather.mesh)

    def whole(self, w_codes: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What of w the product needs here; only the shard is saved for later."""
        return (w_codes, scale) if self.gather is None else self.gather(w_codes, scale)


def _contract(spec: _Spec, x, w, phase, dtype, precision) -> jax.Array:
    """x times a canonical kernel, by a path for each kind of activations and strength."""
    if spec.activations is None:
        with spec.on_mesh():
            quantized = quantize_canonical(lax.stop_gradient(w), spec.config)
            w_hat = straight_through(w, dequantize_canonical(*spec.whole(*quantized)), phase)
        return spec.operator.apply(x.astype(dtype), w_hat.astype(dtype), precision)
    y = _int8_dot(spec, x, w) if phase is None else _phased_dot(spec, x, w, phase)
    return cast(jax.Array, y).astype(dtype)  # custom_vjp loses the type


def dequantize_canonical(codes: jax.Array, scale: jax.Array) -> Float32[Array, "*b k n"]:
    """Codes (*b, K, N) times scale (*b, G, 1 or N), in float32."""
    groups = scale.shape[-2]
    if groups > 1:
        scale = jnp.repeat(scale, codes.shape[-2] // groups, axis=-2)
    return codes.astype(jnp.float32) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_dot(spec: _Spec, x: jax.Array, w: jax.Array) -> Float32[Array, "*b *m n"]:
    return _int8_dot_forward(spec, x, w)[0]


def _int8_dot_forward(spec: _Spec, x, w):
    with spec.on_mesh():
        codes, gamma = spec.quantized(x)
        w_codes, scale = quantize_canonical(w, spec.config)
        whole, qmax = spec.whole(w_codes, scale), spec.activations.qmax
        y = contract_codes(spec.operator, codes, gamma, *whole, qmax)
    # An empty array carries a dtype through the residuals at no cost.
    dtypes = jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype)
    return y, (codes, gamma, w_codes, scale, dtypes)


def _int8_dot_backward(spec: _Spec, residuals, g):
    codes, gamma, w_codes, scale, (x_like, w_like) = residuals
    step = gamma * np.float32(1 / spec.activations.qmax)
    to_kernel, dtype = spec.operator.to_kernel, spec.backward_dtype
    with spec.on_mesh():
        dw = to_kernel(codes, g * step, w_codes.shape, dtype)
        dx = input_gradient(spec.operator, g, *spec.whole(w_codes, scale), codes.shape, dtype)
    return dx.astype(x_like.dtype), dw.astype(w_like.dtype)


_int8_dot.defvjp(_int8_dot_forward, _int8_dot_backward)


def contract_codes(
    operator: Operator, codes, gamma, w_codes, scale, qmax: int
) -> Float32[Array, "..."]:
    """The integer sums of codes, and the epilogue."""
    sums = operator.sums(codes, w_codes, scale.shape[-2])
    return group_epilogue(sums, gamma, scale, qmax)


def input_gradient(
    operator: Operator, g, codes, scale, x_shape, dtype: DTypeLike = jnp.float32
) -> Float32[Array, "..."]:
    """``g w_q^T``; a scale without groups is applied to g, which is smaller than w."""
    if scale.shape[-2] == 1:
        return operator.to_input(g * align_scale(scale, g.ndim), codes, x_shape, dtype)
    return operator.to_input(g, dequantize_canonical(codes, scale), x_shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _phased_dot(spec: _Spec, x, w, strength) -> Float32[Array, "*b *m n"]:
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


def _blends(spec: _Spec, x, w, strength) -> tuple[jax.Array, jax.Array]:
    x_hat = dequantize_activations(*spec.quantized(x), spec.activations)
    return blend(x, x_hat, strength), blend(
        w, dequantize_canonical(*quantize_canonical(w, spec.config)), strength
    )


def _phased_dot_forward(spec: _Spec, x, w, strength):
    return _phased_dot(spec, x, w, strength), (x, w, strength)


def _phased_dot_backward(spec: _Spec, residuals, g):
    x, w, strength = residuals
    x_mix, w_mix = _blends(spec, x, w, strength)
    dw = spec.operator.to_kernel(x_mix, g, w.shape, spec.backward_dtype)
    dx = spec.operator.to_input(g, w_mix, x.shape, spec.backward_dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype), jnp.zeros_like(strength)


_phased_dot.defvjp(_phased_dot_forward, _phased_dot_backward)


def _require_kernel_spec(who: str, spec: Any, ndim: int) -> None:
    """Refuses a spec that is none, or of more axes than the kernel has."""
    if spec is None:
        return
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"{who}: `kernel_spec` must be a jax.sharding.PartitionSpec, got {describe(spec)}. "
            "Write for example PartitionSpec('data', None)."
        )
    if len(spec) > ndim:
        raise ValueError(
            f"{who}: `kernel_spec` has {len(spec)} entries, and the kernel {ndim} axes: {spec}. "
            "Give it one entry for each axis."
        )
