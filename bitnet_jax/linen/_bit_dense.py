"""Flax linen layers with ternary kernels."""

from __future__ import annotations

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from bitnet_jax._layers.forward import LayerConfig
from bitnet_jax._quantize.int8 import INT8, ActivationConfig
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._quantize.ternary import B158, TernaryConfig
from bitnet_jax.linen import _in_scope


class _Ternary(nn.Module):
    # Runtime type checkers (jaxtyping's hook) leave the dataclass's __init__ alone: linen
    # annotates fields with protocols that isinstance refuses. Methods are checked.
    __no_type_check__ = True

    weights: TernaryConfig = B158
    activations: ActivationConfig | None = INT8
    norm: bool = False
    backward_dtype: DTypeLike | None = None

    def _config(self) -> LayerConfig:
        return LayerConfig(self.weights, self.activations, self.norm, self.backward_dtype)


class BitDense(_Ternary, nn.Dense):
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

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Float[Array, "*m k"], *, strength: Strength | None = None
    ) -> Float[Array, "*m n"]:
        """The layer's output.

        Args:
          inputs: (..., features in), floating point or integer.
          strength: 0 (float) to 1 (ternary), for phasing quantisation in;
            static or traced; None: that of the ``bj.phase_in`` around the call,
            or 1. Packed kernels are at 1 whatever it says.

        Returns:
          (..., features).

        Raises:
          ValueError: a field that a ternary contraction has no use for, or a
            packed kernel of another shape or config.
        """
        return _in_scope.forward(self, _in_scope.DENSE, self._config(), inputs, strength=strength)


class BitDenseGeneral(_Ternary, nn.DenseGeneral):
    """``nn.DenseGeneral`` with a ternary kernel: several axes in, several out.

    One scale for the whole kernel, or as ``weights`` says; with ``batch_dims``
    one for each slice. One activation scale per token, over all axes that are
    contracted.

    Attributes:
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the features, before quantising.
      backward_dtype: of the backward products' operands; None: float32.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> heads = bj.linen.BitDenseGeneral(features=(4, 16))
      >>> x = jax.random.normal(jax.random.key(0), (2, 7, 64))
      >>> params = heads.init(jax.random.key(1), x)["params"]
      >>> params["kernel"].shape, heads.apply({"params": params}, x).shape
      ((64, 4, 16), (2, 7, 4, 16))
      >>> packed, report = bj.linen.pack(heads, params, x)
      >>> bool((heads.apply({"params": packed}, x) == heads.apply({"params": params}, x)).all())
      True
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Float[Array, "..."], *, strength: Strength | None = None
    ) -> Float[Array, "..."]:
        """The layer's output.

        Args:
          inputs: an array that has the axes named by ``axis`` and ``batch_dims``.
          strength: as for :class:`BitDense`.

        Returns:
          (*batch_dims, ..., *features).

        Raises:
          ValueError: as :class:`BitDense`; axes that the inputs do not have.
        """
        return _in_scope.forward(self, _in_scope.GENERAL, self._config(), inputs, strength=strength)


class BitConv(_Ternary, nn.Conv):
    """``nn.Conv`` with a ternary kernel, channels last.

    One activation scale per example: a scale per pixel could not leave the
    window's integer sum. Strides, padding, dilation and feature groups are
    ``nn.Conv``'s; ``mask`` is not taken.

    Attributes:
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the channels, before quantising.
      backward_dtype: of the backward convolutions' operands; None: float32.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> layer = bj.linen.BitConv(features=8, kernel_size=(3, 3))
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> packed, report = bj.linen.pack(layer, params, x)
      >>> packed["kernel"]
      PackedTernary(shape=(3, 3, 4, 8), scale=(1, 1, 1, 1), 76 bytes)
      >>> bool((layer.apply({"params": packed}, x) == layer.apply({"params": params}, x)).all())
      True
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Float[Array, "..."], *, strength: Strength | None = None
    ) -> Float[Array, "..."]:
        """The layer's output.

        Args:
          inputs: (*batch, *space, channels).
          strength: as for :class:`BitDense`.

        Returns:
          (*batch, *space, features).

        Raises:
          ValueError: as :class:`BitDense`; a padding that is none; channels
            that the feature groups do not divide.
        """
        return _in_scope.forward(self, _in_scope.CONV, self._config(), inputs, strength=strength)


class BitEinsum(_Ternary, nn.Einsum):
    """``nn.Einsum`` with a ternary kernel: any contraction of inputs with a kernel.

    An axis that inputs, kernel and result share is a batch axis (experts), with
    a scale of its own for each slice.

    Attributes:
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the features, before quantising.
      backward_dtype: of the backward products' operands; None: float32.

    Example:
      >>> import jax, jax.numpy as jnp, bitnet_jax as bj
      >>> experts = bj.linen.BitEinsum((4, 64, 32), "ebk,ekn->ebn")
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 64))
      >>> params = experts.init(jax.random.key(1), x)["params"]
      >>> packed, report = bj.linen.pack(experts, params, x)
      >>> packed["kernel"]
      PackedTernary(shape=(4, 64, 32), scale=(4, 1, 1), 2064 bytes)
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Float[Array, "..."],
        einsum_str: str | None = None,
        *,
        strength: Strength | None = None,
    ) -> Float[Array, "..."]:
        """The layer's output.

        Args:
          inputs: the equation's first operand.
          einsum_str: the equation, where the field has none.
          strength: as for :class:`BitDense`.

        Returns:
          The equation's result.

        Raises:
          ValueError: as :class:`BitDense`; an equation that does not fit.
          NotImplementedError: an equation that is no contraction.
        """
        return _in_scope.forward(
            self, _in_scope.EINSUM, self._config(), inputs, einsum_str, strength=strength
        )
