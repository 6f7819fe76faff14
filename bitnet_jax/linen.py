"""Flax linen layers with ternary kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Float

from bitnet_jax import _checks, _layers
from bitnet_jax._packed import is_packed
from bitnet_jax._ste import Strength
from bitnet_jax._ternary import B158, INT8, ActivationConfig, TernaryConfig

__all__ = ["BitDense"]


class BitDense(nn.Dense):
    """``nn.Dense`` with a ternary kernel and int8 activations.

    Fields, defaults and parameter names are ``nn.Dense``'s, so its checkpoints
    drop in. The same ``apply`` trains from float params and serves from the
    packed ones that ``bj.pack_params`` or ``bj.io.load`` returns, with the same
    bits. The bias stays float.

    Attributes:
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the features, before quantising.
      backward_dtype: of the backward products' operands; None: float32.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> layer = bj.linen.BitDense(features=16)
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (16,), 'kernel': (64, 16)}
      >>> packed, report = bj.pack_params(params)
      >>> y = layer.apply({"params": packed}, x)
      >>> bool((y == layer.apply({"params": params}, x)).all())
      True
    """

    weights: TernaryConfig = B158
    activations: ActivationConfig | None = INT8
    norm: bool = False
    backward_dtype: Any = None

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Float[Array, "*m k"], *, strength: Strength = 1.0
    ) -> Float[Array, "*m n"]:
        """The layer's output.

        Args:
          inputs: (..., features in), floating point or integer.
          strength: 0 (float) to 1 (ternary), for phasing quantisation in;
            static or traced. Packed kernels are at 1 whatever it says.

        Returns:
          (..., features).

        Raises:
          ValueError: a field that a ternary contraction has no use for, or a
            packed kernel of another shape or config.
        """
        for name, default in _UNUSED.items():
            _checks.unsupported_field("BitDense", name, getattr(self, name), default)
        inputs = jnp.asarray(inputs)
        shape = (inputs.shape[-1], self.features)
        where = "/".join((*self.path, "kernel"))
        kernel = self._packed("kernel")
        if kernel is None:
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        else:
            _checks.layer_shape("BitDense", where, shape, kernel.shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        config = _layers.LayerConfig(self.weights, self.activations, self.norm, self.backward_dtype)
        return _layers.dense(
            "BitDense",
            where,
            config,
            inputs,
            kernel,
            bias,
            strength=strength,
            dtype=self.dtype,
            precision=self.precision,
        )

    def _packed(self, name: str) -> Any:
        """The packed leaf of this name; None where there is none, or a float one."""
        if not self.has_variable("params", name):
            return None
        leaf = meta.unbox(self.get_variable("params", name))
        return leaf if is_packed(leaf) else None


# What nn.Dense lets a user replace and a ternary contraction brings along.
_UNUSED = {
    field.name: field.default
    for field in dataclasses.fields(nn.Dense)
    if field.name in ("promote_dtype", "dot_general", "dot_general_cls")
}
