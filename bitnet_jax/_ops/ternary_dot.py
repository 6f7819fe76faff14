"""The training op: int8 x int8 -> int32 forward, straight-through float backward.

:func:`ternary_dot` and :func:`ternary_conv` check their operands and meet the mesh, once;
``contraction`` computes.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32

from bitnet_jax import _checks, _mesh
from bitnet_jax._checks import describe
from bitnet_jax._ops.contraction import Contraction, contract
from bitnet_jax._ops.convolution import Convolution
from bitnet_jax._ops.gather import Gather, gather_of
from bitnet_jax._ops.product import Product
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import Activations, DTypeLike, Kernel
from bitnet_jax._quantize.config import B158, INT8, ActivationConfig, Int8Config, KernelConfig
from bitnet_jax._quantize.int8 import (
    check_activations,
    require_activation_groups,
    require_no_activation_groups,
)
from bitnet_jax._quantize.kernel_axes import AxesLike
from bitnet_jax._quantize.kernel_spec import KernelSpec, contraction_spec, require_kernel_config
from bitnet_jax._quantize.rotation import require_rotated_channels, rotated_kernel
from bitnet_jax._quantize.straight_through import traced_strength
from bitnet_jax._quantize.strength import Strength

Phase = Float32[Array, ""] | None


def ternary_dot(
    x: Activations,
    w: Kernel,
    weights: KernelConfig = B158,
    *,
    activations: ActivationConfig | None = INT8,
    strength: Strength = 1.0,
    contracting_axes: AxesLike | None = None,
    batch_axes: AxesLike = (),
    dtype: DTypeLike | None = None,
    backward_dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    kernel_spec: PartitionSpec | None = None,
) -> Float[Array, "..."]:
    """The training op: ``x @ w`` in int8 x int8 -> int32, with float gradients.

    Forward: the codes of x (per token) times the codes of w, summed in int32,
    then scaled once; with groups of x or w, each group's sum is scaled, and they are
    added in ascending order. Backward, with g the output's gradient and x_q, w_q the
    dequantised operands: ``dw = x_q^T g`` and ``dx = g w_q^T``; nothing flows
    through a scale. Only int8 codes and scales are saved for the backward pass.
    With ``weights.rotation``, x and w are rotated before all this, and the gradients back.

    Sums are exact; they round once on their way to float32 where
    ``127 * K >= 2**24``. A token with NaN or Inf gives a NaN row.

    Args:
      x: activations; the last axes meet w's contracting axes, in order. With
        batch axes, x starts with them.
      w: kernel, quantised from the dtype it has. 2-D: (in, out).
      weights: the kernel's quantiser.
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
      kernel_spec: how w is sharded, for :func:`gather_codes`, where w's type does
        not say it (Auto axes).

    Returns:
      (*batch, ..., *outputs) of ``dtype``. On Explicit mesh axes it is sharded as
      x's rows and w's outputs are.

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
    spec = _checked(who, x, w, weights, activations, contracting_axes, batch_axes)
    batch, contraction, outputs = spec.axes.split(w.shape)
    _checks.require_contraction(who, x.shape, contraction, batch)
    require_activation_groups(who, activations, contraction)
    # x is (*lead, *contraction); lead starts with the kernel's batch axes.
    lead = x.shape[: x.ndim - len(contraction)]
    rows = _mesh.spec_of(x)[: len(lead)]
    parts, gather = _placement(who, rows, w, spec, kernel_spec)
    backward = np.dtype(backward_dtype or jnp.float32)
    product = Contraction(Product(), weights, activations, backward, gather, spec.block(w.shape))
    dtype = dtype or jnp.promote_types(x.dtype, w.dtype)

    def run(x: Activations, w: Kernel, phase: Phase) -> Float[Array, "..."]:
        # To (*rows, K) times (*b, K, N), and the outputs' axes back.
        x = x.reshape(*lead, math.prod(contraction))
        w = rotated_kernel(kernel_axes.to_canonical(w, spec.axes), product.block)
        return contract(product, x, w, phase, dtype, precision).reshape(*lead, *outputs)

    phase = traced_strength(who, strength)
    return _mesh.in_auto_rows(run, x, w, phase, outputs=parts[2])


def ternary_conv(
    x: Float[Array, "b *space c"],
    w: Kernel,
    convolution: Convolution,
    weights: KernelConfig = B158,
    *,
    activations: ActivationConfig | None = INT8,
    strength: Strength = 1.0,
    dtype: DTypeLike | None = None,
    backward_dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    kernel_spec: PartitionSpec | None = None,
    contracting_axes: AxesLike | None = None,
) -> Float[Array, "b *out n"]:
    """:func:`ternary_dot` for a convolution: one gamma per example, no groups of x."""
    who = "ternary_conv"
    # All axes but the outputs are contracted: the window, and the channels of a group.
    window = tuple(range(w.ndim - 1)) if contracting_axes is None else contracting_axes
    spec = _checked(who, x, w, weights, activations, window, ())
    require_no_activation_groups(who, activations)
    require_rotated_channels(who, weights, convolution.has_channels_last)
    parts, gather = _placement(who, _mesh.spec_of(x)[:1], w, spec, kernel_spec)
    backward = np.dtype(backward_dtype or jnp.float32)
    product = Contraction(convolution, weights, activations, backward, gather, spec.block(w.shape))
    dtype = dtype or jnp.promote_types(x.dtype, w.dtype)

    def run(x: Activations, w: Kernel, phase: Phase) -> Float[Array, "..."]:
        w = rotated_kernel(kernel_axes.to_canonical(w, spec.axes), product.block)
        return contract(product, x, w, phase, dtype, precision)

    phase = traced_strength(who, strength)
    return _mesh.in_auto_rows(run, x, w, phase, outputs=parts[2])


def _checked(
    who: str,
    x: Activations,
    w: Kernel,
    weights: KernelConfig,
    activations: ActivationConfig | None,
    contracting_axes: AxesLike | None,
    batch_axes: AxesLike,
) -> KernelSpec:
    """The spec of a kernel to contract with; raises unless all three operands can be used."""
    check_activations(who, activations)
    _checks.require_float_array(who, "x", x)
    for name, value in (("`x`", x), ("`w`", w)):
        _checks.require_values(who, name, value)
    require_kernel_config(who, weights, "weights")
    return contraction_spec(who, w, weights, contracting_axes, batch_axes)


def _placement(
    who: str,
    rows: _mesh.Spec,
    w: Kernel,
    spec: KernelSpec,
    kernel_spec: PartitionSpec | None,
) -> tuple[tuple[_mesh.Spec, _mesh.Spec, _mesh.Spec], Gather | None]:
    """The kernel's sharding, (batch, contraction, outputs), and how its codes are gathered."""
    _require_kernel_spec(who, kernel_spec, w.ndim)
    # On Explicit axes the type has the sharding, and the argument is not needed.
    typed = _mesh.is_typed(w)
    entries = _mesh.spec_of(w) if typed else kernel_spec or ()
    parts = spec.axes.split(_mesh.padded(entries, w.ndim))
    gather = gather_of(
        who,
        rows,
        parts,
        math.prod(spec.axes.split(w.shape)[1]),
        explicit=_mesh.explicit_mesh(w),
        given=typed or kernel_spec is not None,
        two_bits=not isinstance(spec.config, Int8Config),
    )
    return parts, gather


def _require_kernel_spec(who: str, spec: object, ndim: int) -> None:
    """Raises unless it is None or a PartitionSpec of no more entries than the kernel has axes."""
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
