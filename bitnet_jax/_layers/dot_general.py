"""``TernaryDotGeneral``: a ternary ``dot_general`` for Flax layers that take one."""

from __future__ import annotations

import dataclasses

from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from bitnet_jax import _checks
from bitnet_jax._layers.dimensions import dot_general
from bitnet_jax._layers.forward import Fields, LayerConfig, run_layer
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import Activations, DTypeLike, Kernel
from bitnet_jax._quantize.config import B158, INT8, ActivationConfig, TernaryConfig


@dataclasses.dataclass(frozen=True)
class TernaryDotGeneral:
    """A ``dot_general_cls`` that trains a layer's kernel as ternary.

    For a layer that takes a product instead of being replaced, for example
    ``nn.MultiHeadDotProductAttention(qkv_dot_general_cls=TernaryDotGeneral)``;
    with arguments, ``functools.partial(TernaryDotGeneral, weights=bj.PHASE4)``.

    For training only: the layer checks its kernel's shape before it multiplies,
    so it cannot run from packed kernels, and under ``dtype=jnp.bfloat16`` it casts
    the kernel before it is quantised, which moves some codes (.08 %).
    ``bj.linen.ternarize`` and the layers of this package have neither limit.

    Args:
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      backward_dtype: of the backward products' operands; None: float32.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import linen as nn
      >>> layer = nn.Dense(16, dot_general_cls=bj.linen.TernaryDotGeneral)
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> params = layer.init(jax.random.key(1), x)
      >>> bool((layer.apply(params, x) == bj.linen.BitDense(16).apply(params, x)).all())
      True
    """

    weights: TernaryConfig = B158
    activations: ActivationConfig | None = INT8
    backward_dtype: DTypeLike | None = None

    def __call__(
        self,
        lhs: Activations,
        rhs: Kernel,
        dimension_numbers: lax.DotDimensionNumbers,
        precision: lax.PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        *,
        out_sharding: NamedSharding | PartitionSpec | None = None,
    ) -> Float[Array, "..."]:
        """``lax.dot_general`` with a ternary second operand.

        Args:
          lhs: activations.
          rhs: the kernel.
          dimension_numbers: as of ``lax.dot_general``.
          precision: of the float product, where there is one.
          preferred_element_type: of the output; None: what lhs and rhs promote to.
          out_sharding: must be None.

        Returns:
          (*batch, ..., *outputs).

        Raises:
          ValueError: an ``out_sharding``; shapes that do not meet.
        """
        _checks.require_unset("TernaryDotGeneral", "out_sharding", out_sharding, None)
        (_, w_axes), (_, w_batch) = dimension_numbers
        kernel_axes.resolve(
            "TernaryDotGeneral", rhs, w_axes, w_batch
        )  # raises for axes that rhs does not have
        call = dot_general(lhs.ndim, rhs.shape, dimension_numbers)
        config = LayerConfig(self.weights, self.activations, False, self.backward_dtype)
        fields = Fields(preferred_element_type, precision)
        where = "the kernel"
        return run_layer(
            "TernaryDotGeneral", where, config, call, lhs, rhs, None, strength=None, fields=fields
        )
