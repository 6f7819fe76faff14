"""Ternary weights: pure maths, no gradients, no layout.

A kernel ``W`` becomes codes in {-1, 0, +1} and a float32 scale ``s``::

    s    = max(mean|W|, eps)                          (absmean)
    r    = W * (1 / s)
    code = 0 where |r| <= threshold, else sign(r)

With threshold 0.5 this is ``clip(round(W / s), -1, 1)``, the b1.58 quantiser
[1, eq. 1-3]. ``statistics`` pins the bits of the mean.

A kernel of planes [3] is ``W = s1 T1 + s2 T2``: each plane quantises, as above, what the
planes before it left over, and they are added in that order.

References:
  [1] Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764.
  [2] Li et al., Ternary Weight Networks, arXiv:1605.04711.
  [3] PTQTP: Post-Training Quantization to Trit-Planes, arXiv:2509.16989.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from bitnet_jax import _checks, _mesh
from bitnet_jax._quantize import by_library, kernel_axes, statistics
from bitnet_jax._quantize.arrays import (
    CanonicalCodes,
    CanonicalKernel,
    CanonicalScale,
    Codes,
    DTypeLike,
    Kernel,
    PlaneCodes,
    PlaneScale,
    Scale,
)
from bitnet_jax._quantize.config import (
    B158,
    Int8Config,
    KernelConfig,
    TernaryConfig,
    planes_of,
    rule_of,
)
from bitnet_jax._quantize.int8 import quantize_channels
from bitnet_jax._quantize.kernel_spec import KernelSpec, kernel_spec
from bitnet_jax._quantize.pinned import widened
from bitnet_jax._quantize.rotation import largest_block, rotated, rotated_kernel
from bitnet_jax._quantize.rounded import quotient

_HUGE = np.float32(2.0**100)  # statistics above it are scaled down before their reciprocal


class Ternary(NamedTuple):
    """A kernel as codes and scale, both of the kernel's rank.

    Attributes:
      codes: int8 in {-1, 0, +1}, the kernel's shape.
      scale: float32; each axis has length 1 (shared), the kernel's length, or
        the number of groups along it.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> t = bj.quantize(jnp.array([[0.9, -0.1], [-0.8, 0.2]]))
      >>> t.codes.tolist(), t.scale.shape
      ([[1, 0], [-1, 0]], (1, 1))
      >>> t.dequantize().tolist()
      [[0.5, 0.0], [-0.5, 0.0]]
    """

    codes: Codes
    scale: Scale

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """Codes times scale, computed in float32 and cast once to ``dtype``."""
        return _mesh.in_auto_like(functools.partial(dequantize_kernel, dtype=dtype), self)

    @property
    def rotated_axis(self) -> int | None:
        """The axis along which the codes are those of a rotated kernel; None: they are not."""
        return None


class RotatedTernary(Ternary):
    """Codes and scale of a kernel that was rotated; :meth:`dequantize` rotates back.

    The axis is static: a pytree node with the two arrays as its leaves.
    """

    def __new__(cls, codes: Codes, scale: Scale, rotated_axis: int) -> RotatedTernary:
        """Codes, scale and the axis, counted from the end."""
        made = super().__new__(cls, codes, scale)
        made._rotated_axis = rotated_axis
        return made

    _rotated_axis: int

    @property
    def rotated_axis(self) -> int:
        """The axis along which the codes are those of a rotated kernel."""
        return self._rotated_axis

    def _replace(self, **changed: Any) -> RotatedTernary:  # pyright: ignore[reportIncompatibleMethodOverride] - its own loses the axis
        return _of_leaves(self._rotated_axis, super()._replace(**changed))

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What a copy is made from."""
        return (*self, self._rotated_axis)


def _of_leaves(rotated_axis: int, leaves: Iterable[Any]) -> RotatedTernary:
    """One of whatever stands for its arrays, as pytrees are rebuilt."""
    made = RotatedTernary._make(leaves)
    made._rotated_axis = rotated_axis
    return made


jax.tree_util.register_pytree_with_keys(
    RotatedTernary,
    lambda t: (
        tuple((jax.tree_util.GetAttrKey(n), getattr(t, n)) for n in ("codes", "scale")),
        t.rotated_axis,
    ),
    _of_leaves,
)


class TernaryPlanes(NamedTuple):
    """A kernel as the sum of several ternary ones, of a config with ``planes``.

    Attributes:
      planes: a ``Ternary`` each, in the order in which they are added.

    Example:
      >>> import jax.numpy as jnp, bitnet_jax as bj
      >>> w = jnp.array([[0.9, -0.1], [-0.8, 0.2]])
      >>> t = bj.quantize(w, bj.TernaryConfig(planes=2))
      >>> t.codes.tolist()
      [[[1, 0], [-1, 0]], [[1, 0], [-1, 1]]]
      >>> t.dequantize().tolist()
      [[0.75, 0.0], [-0.75, 0.25]]
    """

    planes: tuple[Ternary, ...]

    @property
    def codes(self) -> Codes:
        """int8 in {-1, 0, +1}: the codes of all planes, (planes, *kernel)."""
        return jnp.stack([plane.codes for plane in self.planes])

    @property
    def scale(self) -> Scale:
        """float32: the scales of all planes, (planes, *scale)."""
        return jnp.stack([plane.scale for plane in self.planes])

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The sum of all planes, added in order in float32 and cast once to ``dtype``.

        The planes of a rotated kernel are those of the sum before it is rotated back.
        """
        return _mesh.in_auto_like(functools.partial(dequantize_kernel, dtype=dtype), self)

    @property
    def rotated_axis(self) -> int | None:
        """The axis along which the codes are those of a rotated kernel; None: they are not."""
        return self.planes[0].rotated_axis


def quantize(
    w: Kernel,
    config: TernaryConfig = B158,
    *,
    contracting_axes: kernel_axes.AxesLike | None = None,
    batch_axes: kernel_axes.AxesLike = (),
) -> Ternary | TernaryPlanes:
    """Codes in {-1, 0, +1} and the float32 scale of a kernel.

    ``r = w * (1 / s)``; a code is 0 where ``|r| <= config.threshold``, else
    ``sign(r)``. The statistic ``s`` is computed in float32 by an order-fixed
    sum, so the same kernel gives the same bits under jit, vmap and on shards. With
    ``config.rotation`` codes and scale are those of ``R^T w``.

    Args:
      w: float32, bfloat16 or float16 kernel. 2-D: (in, out).
      config: the quantiser.
      contracting_axes: the axes that meet x; needed for other ranks than 2.
      batch_axes: axes that carry slices (stacked layers, experts), each slice
        with its own scale.

    Returns:
      A ``Ternary`` of the kernel's rank; a ``TernaryPlanes`` of a config with planes.

    Raises:
      TypeError: ``w`` is not floating point.
      ValueError: rank below 2, no elements, unknown axes, a group that does
        not divide the contraction, or one without blocks to rotate.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> w = jax.random.normal(jax.random.key(0), (64, 16))
      >>> t = bj.quantize(w, bj.PHASE4)
      >>> t.codes.dtype.name, t.scale.shape
      ('int8', (1, 16))

    References:
      Ma et al., arXiv:2402.17764, eq. 1-3; Li et al., arXiv:1605.04711, eq. 5-6.
    """
    _checks.require_instance(
        "quantize", "config", config, TernaryConfig, "Use bj.B158 or your own."
    )
    _checks.require_values("quantize", "`w`", w)
    spec = kernel_spec("quantize", w, config, contracting_axes, batch_axes)
    run = functools.partial(quantize_kernel, spec=spec)
    return _mesh.in_auto_like(run, jax.lax.stop_gradient(w))


def quantize_kernel(w: Kernel, spec: KernelSpec) -> Ternary | TernaryPlanes:
    """Codes and scale of a kernel of any rank, both of its rank."""
    _, contraction, outputs = spec.axes.split(w.shape)
    # Only transposes and reshapes here; the maths sees (*b, K, N) alone.
    canonical = rotated_kernel(kernel_axes.to_canonical(w, spec.axes), spec.block(w.shape))
    codes, scale = quantize_canonical(canonical, spec.config)
    return of_canonical(codes, scale, spec, contraction, outputs)


def of_canonical(
    codes: PlaneCodes,
    scale: PlaneScale,
    spec: KernelSpec,
    contraction: tuple[int, ...],
    outputs: tuple[int, ...],
) -> Ternary | TernaryPlanes:
    """Canonical codes and scale, both of the kernel's rank; with planes, of each plane."""
    planes = planes_of(spec.config)
    if planes == 1:
        return _one_of_canonical(codes, scale, spec, contraction, outputs)
    each = each_plane(codes, scale, planes)
    return TernaryPlanes(
        tuple(_one_of_canonical(*plane, spec, contraction, outputs) for plane in each)
    )


def _one_of_canonical(
    codes: CanonicalCodes,
    scale: CanonicalScale,
    spec: KernelSpec,
    contraction: tuple[int, ...],
    outputs: tuple[int, ...],
) -> Ternary:
    codes = kernel_axes.from_canonical(codes, spec.axes, contraction, outputs)
    # One scale for all outputs, or for each: a length of 1 on each of their axes, or theirs.
    across = outputs if scale.shape[-1] > 1 else (1,) * len(outputs)
    grid = spec.scale_grid(contraction)
    scale = kernel_axes.from_canonical(scale, spec.axes, grid, across)
    axis = spec.rotated_axis(codes.ndim)
    return Ternary(codes, scale) if axis is None else RotatedTernary(codes, scale, axis)


@functools.partial(jax.jit, static_argnums=1)  # traced once for all layers of a shape
def quantize_canonical(w: CanonicalKernel, config: KernelConfig) -> tuple[PlaneCodes, PlaneScale]:
    """Codes and scale of a canonical kernel, rotated already; g groups, m = 1 or n across.

    Planes are an axis of both, right before their last two.
    """
    if isinstance(config, Int8Config):
        return quantize_channels(w, config)
    if config.planes > 1:
        _, codes, scale = zip(*_plane_by_plane(w, config), strict=True)
        return jnp.stack(codes, axis=-3), jnp.stack(scale, axis=-3)
    if by_library.quantizes(config):
        return by_library.kernel_codes(w, config, _quantize)
    return _quantize(w, config)


def _plane_by_plane(
    w: CanonicalKernel, config: TernaryConfig
) -> list[tuple[CanonicalKernel, CanonicalCodes, CanonicalScale]]:
    """For each plane what those before it left over, and its codes and scale of that."""
    made = []
    for _ in range(config.planes):
        if made:
            _, codes, scale = made[-1]
            w = widened(w) - dequantize_canonical(codes, scale)
        made.append((w, *quantize_canonical(w, config.one_plane)))
    return made


def _quantize(w: CanonicalKernel, config: TernaryConfig) -> tuple[CanonicalCodes, CanonicalScale]:
    """The same in plain JAX."""
    wide, r, floor = _ratio(w, config)
    across = config.granularity == "tensor"
    # Not |r| > threshold: a NaN is kept, and its code is not 0.
    keep = ~(jnp.abs(r) <= np.float32(config.threshold))
    codes = jnp.where(keep, jnp.where(r < 0, jnp.int8(-1), jnp.int8(1)), jnp.int8(0))
    if rule_of(config).of_kept:
        # The codes stay as the mean set them; only the scale is of the kept weights.
        mean = statistics.mean_of_kept(jnp.abs(wide) * statistics.SHIFT, keep, across)
        floor = jnp.maximum(mean * statistics.UNSHIFT, config.eps)
    # Groups back into one contraction: codes (*b, K, N), scale (*b, G, 1 or N).
    return codes.reshape(w.shape), floor[..., 0, :]


def ratio_canonical(w: CanonicalKernel, config: TernaryConfig) -> Float32[Array, "*bp k n"]:
    """``r``, a canonical kernel, rotated, over its statistic: what meets the threshold."""
    if config.planes > 1:
        each = [ratio_canonical(w, config.one_plane) for w, *_ in _plane_by_plane(w, config)]
        return jnp.stack(each, axis=-3)
    return _ratio(w, config)[1].reshape(w.shape)


def _ratio(
    w: CanonicalKernel, config: TernaryConfig
) -> tuple[
    Float32[Array, "*b g s n"],
    Float32[Array, "*b g s n"],
    Float32[Array, "*b g 1 m"],
]:
    """A kernel in its groups (*b, G, K/G, N), the same over its statistic, and the statistic."""
    group = config.granularity if isinstance(config.granularity, int) else w.shape[-2]
    wide = widened(w)
    # (*b, K, N) -> (*b, G, K/G, N): a group is a run of adjacent weights of one output.
    wide = wide.reshape(*w.shape[:-2], w.shape[-2] // group, group, w.shape[-1])
    across = config.granularity == "tensor"
    statistic = rule_of(config).statistic
    magnitude = statistic(jnp.abs(wide) * statistics.SHIFT, across) * statistics.UNSHIFT
    floor = jnp.maximum(magnitude, config.eps)
    return wide, over_statistic(wide, floor), floor


def over_statistic(
    wide: Float32[Array, "..."], floor: Float32[Array, "*b g 1 m"]
) -> Float32[Array, "..."]:
    """Weights over the statistic of their group, as the quantiser divides them."""
    # 1 / floor underflows for the largest floats, unless both factors are shifted.
    shift = jnp.where(floor > _HUGE, statistics.SHIFT, 1.0)
    return (wide * shift) * quotient(1.0, floor * shift)


def dequantize(codes: Codes, scale: Scale, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
    """Codes times scale, both of a kernel's rank, computed in float32 and cast once."""
    return (codes.astype(jnp.float32) * kernel_axes.broadcast_scale(scale, codes.shape)).astype(
        dtype
    )


def dequantize_kernel(
    t: Ternary | TernaryPlanes, dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """The sum of codes times scale of each plane, rotated back once and cast once."""
    planes = (t,) if isinstance(t, Ternary) else t.planes
    w = sum_in_order([dequantize(codes, scale) for codes, scale in planes])
    return rotated_back(w, t.rotated_axis).astype(dtype)


def rotated_back(w: Float32[Array, "..."], axis: int | None) -> Float32[Array, "..."]:
    """A float kernel from its rotated one along an axis, from the end; None: it is not rotated."""
    return w if axis is None else rotated(w, largest_block(w.shape[axis]), axis)


def dequantize_canonical(
    codes: PlaneCodes, scale: PlaneScale, planes: int = 1
) -> Float32[Array, "*b k n"]:
    """Codes (*b, K, N) times scale (*b, G, 1 or N), in float32; the sum of so many planes."""
    if planes > 1:
        return sum_in_order([dequantize_canonical(*p) for p in each_plane(codes, scale, planes)])
    groups = scale.shape[-2]
    if groups > 1:  # each group's scale beside every code of it
        scale = jnp.repeat(scale, codes.shape[-2] // groups, axis=-2)
    return codes.astype(jnp.float32) * scale


def each_plane(
    codes: PlaneCodes, scale: PlaneScale, planes: int
) -> list[tuple[CanonicalCodes, CanonicalScale]]:
    """Codes and scale of each plane, of canonical ones."""
    return [(codes[..., i, :, :], scale[..., i, :, :]) for i in range(planes)]


def sum_in_order(parts: Sequence[Float32[Array, "..."]]) -> Float32[Array, "..."]:
    """The sum of planes; codes times scale is exact, so a contracted add has these bits too."""
    return functools.reduce(operator.add, parts)
