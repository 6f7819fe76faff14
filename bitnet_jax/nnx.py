"""Flax NNX layers with ternary kernels."""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bitnet_jax import _checks, _layers
from bitnet_jax._packed import is_packed
from bitnet_jax._ste import Strength
from bitnet_jax._ternary import B158, INT8, ActivationConfig, TernaryConfig

__all__ = ["BitLinear", "trainable"]


class BitLinear(nnx.Linear):
    """``nnx.Linear`` with a ternary kernel and int8 activations.

    Arguments, defaults and parameter names are ``nnx.Linear``'s, so its
    checkpoints drop in. The same call trains from a float kernel and serves
    from a packed one, with the same bits::

        packed, report = bj.pack_params(nnx.state(model, nnx.Param))
        nnx.update(model, packed)

    The bias stays float. To train what stayed float around packed kernels, use
    :func:`trainable` as the filter of ``nnx.grad`` and ``nnx.Optimizer``.

    Args:
      in_features: features of the input.
      out_features: features of the output.
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the features, before quantising.
      backward_dtype: of the backward products' operands; None: float32.
      rngs: as for ``nnx.Linear``.
      **linear: the other arguments of ``nnx.Linear``.

    Raises:
      ValueError: an argument that a ternary contraction has no use for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import nnx
      >>> layer = bj.nnx.BitLinear(64, 16, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> trained = layer(x)
      >>> packed, report = bj.pack_params(nnx.state(layer, nnx.Param))
      >>> nnx.update(layer, packed)
      >>> bool((layer(x) == trained).all())
      True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weights: TernaryConfig = B158,
        activations: ActivationConfig | None = INT8,
        norm: bool = False,
        backward_dtype: Any = None,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        for name, default in _UNUSED.items():
            given = linear.get(name, default)
            _checks.unsupported_field("BitLinear", name, given, default)
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        self.weights = weights
        self.activations = activations
        self.norm = norm
        self.backward_dtype = backward_dtype

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Float[Array, "*m k"], *, strength: Strength = 1.0
    ) -> Float[Array, "*m n"]:
        """The layer's output.

        Args:
          inputs: (..., in_features), floating point or integer.
          strength: 0 (float) to 1 (ternary), for phasing quantisation in;
            static or traced. Packed kernels are at 1 whatever it says.

        Returns:
          (..., out_features).

        Raises:
          ValueError: a packed kernel of another shape or config.
        """
        kernel = self.kernel.get_value()
        where = "`kernel`"
        if is_packed(kernel):
            shape = (self.in_features, self.out_features)
            _checks.layer_shape("BitLinear", where, shape, kernel.shape)
        config = _layers.LayerConfig(self.weights, self.activations, self.norm, self.backward_dtype)
        return _layers.dense(
            "BitLinear",
            where,
            config,
            jnp.asarray(inputs),
            kernel,
            None if self.bias is None else self.bias.get_value(),
            strength=strength,
            dtype=self.dtype,
            precision=self.precision,
        )


def trainable(path: tuple[Any, ...], variable: Any) -> bool:
    """An nnx filter: parameters that have a gradient, packed kernels left out.

    Args:
      path: of the variable.
      variable: the variable.

    Returns:
      Whether it is an ``nnx.Param`` that holds no packed kernel.

    Example:
      >>> import bitnet_jax as bj
      >>> from flax import nnx
      >>> layer = bj.nnx.BitLinear(64, 16, rngs=nnx.Rngs(0))
      >>> nnx.update(layer, bj.pack_params(nnx.state(layer, nnx.Param))[0])
      >>> list(nnx.state(layer, bj.nnx.trainable))
      ['bias']
    """
    del path
    return isinstance(variable, nnx.Param) and not is_packed(variable.get_value())


# What nnx.Linear lets a user replace and a ternary contraction brings along.
_UNUSED = {
    name: inspect.signature(nnx.Linear.__init__).parameters[name].default
    for name in ("promote_dtype", "dot_general", "preferred_element_type")
}
