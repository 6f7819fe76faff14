"""Flax NNX layers with ternary kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from bitnet_jax import _checks
from bitnet_jax._layers import dimensions
from bitnet_jax._layers.forward import Fields, LayerConfig, run_layer
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.int8 import INT8, ActivationConfig
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._quantize.ternary import B158, KernelConfig

# What nnx layers take; a ternary one takes None alone.
OutSharding = NamedSharding | PartitionSpec | None


class TernaryLayer(nnx.Module):
    """What ternary layers share; ``_float`` is the layer that each stands for."""

    _float: type[nnx.Module]
    unused: tuple[str, ...]
    weights: KernelConfig
    activations: ActivationConfig | None
    norm: bool
    backward_dtype: DTypeLike | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__init__ is not TernaryLayer.__init__:
            return
        # help() and editors show the float layer's arguments and these four.
        own = inspect.signature(TernaryLayer.__init__).parameters.values()
        extra = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
        float_ = [*inspect.signature(cls._float.__init__).parameters.values()][1:]
        cls.__signature__ = inspect.Signature([*float_, *extra])

    def __init__(
        self,
        *args: PyTree,
        weights: KernelConfig = B158,
        activations: ActivationConfig | None = INT8,
        norm: bool = False,
        backward_dtype: DTypeLike | None = None,
        **rest: PyTree,
    ):
        for name in self.unused:
            default = default_of(self._float, name)
            given = rest.get(name, default)
            _checks.require_unset(type(self).__name__, name, given, default)
        super().__init__(*args, **rest)
        self.weights = weights
        self.activations = activations
        self.norm = norm
        self.backward_dtype = backward_dtype

    def _forward(
        self,
        call_of: Callable[..., dimensions.Call],
        inputs: ArrayLike,
        *args: str | None,
        strength: Strength | None,
    ) -> jax.Array:
        """The layer's output, by the dimension numbers that ``call_of`` gives its inputs."""
        inputs = jnp.asarray(inputs)
        config = LayerConfig(self.weights, self.activations, self.norm, self.backward_dtype)
        module: Any = self
        return run_layer(
            type(self).__name__,
            "`kernel`",
            config,
            call_of(self, inputs.shape, *args),
            inputs,
            module.kernel.get_value(),
            None if module.bias is None else module.bias.get_value(),
            strength=strength,
            fields=Fields(module.dtype, module.precision, module.kernel),
        )


def default_of(kind: type[nnx.Module], name: str) -> Any:
    """The default of an argument of a layer."""
    return inspect.signature(kind.__init__).parameters[name].default


class BitLinear(TernaryLayer, nnx.Linear):
    """``nnx.Linear`` with a ternary kernel and int8 activations.

    Arguments, defaults and parameter names are ``nnx.Linear``'s, so its
    checkpoints drop in. The same call trains from a float kernel and serves
    from a packed one, with the same bits::

        packed, report = bj.nnx.pack(model)
        y = packed(x)

    The bias stays float. To train what stayed float around packed kernels, use
    :func:`trainable` as the filter of ``nnx.grad`` and ``nnx.Optimizer``.

    Args:
      *args: as for ``nnx.Linear``: in_features, out_features.
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the features, before quantising.
      backward_dtype: of the backward products' operands; None: float32.
      **rest: the other arguments of ``nnx.Linear``.

    Raises:
      ValueError: an argument that a ternary contraction has no use for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import nnx
      >>> layer = bj.nnx.BitLinear(64, 16, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (8, 64))
      >>> packed, report = bj.nnx.pack(layer)
      >>> bool((packed(x) == layer(x)).all())
      True
    """

    _float = nnx.Linear
    unused = ("promote_dtype", "dot_general", "preferred_element_type")

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Float[Array, "*m k"],
        out_sharding: OutSharding = None,
        *,
        strength: Strength | None = None,
    ) -> Float[Array, "*m n"]:
        """The layer's output.

        Args:
          inputs: (..., in_features), floating point or integer.
          out_sharding: must be None.
          strength: 0 (float) to 1 (ternary), for phasing quantisation in;
            static or traced; None: that of the ``bj.phase_in`` around the call,
            or 1. Packed kernels are at 1 whatever it says.

        Returns:
          (..., out_features).

        Raises:
          ValueError: a packed kernel of another shape or config.
        """
        _checks.require_unset("BitLinear", "out_sharding", out_sharding, None)
        return self._forward(linear_call, inputs, strength=strength)


class BitLinearGeneral(TernaryLayer, nnx.LinearGeneral):
    """``nnx.LinearGeneral`` with a ternary kernel: several axes in, several out.

    Args:
      *args: as for ``nnx.LinearGeneral``: in_features, out_features.
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the features, before quantising.
      backward_dtype: of the backward products' operands; None: float32.
      **rest: the other arguments of ``nnx.LinearGeneral``.

    Raises:
      ValueError: an argument that a ternary contraction has no use for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import nnx
      >>> out = bj.nnx.BitLinearGeneral((4, 16), 64, axis=(-2, -1), rngs=nnx.Rngs(0))
      >>> out(jax.random.normal(jax.random.key(0), (2, 7, 4, 16))).shape
      (2, 7, 64)
      >>> bj.nnx.pack(out)[0].kernel.get_value()
      PackedTernary(shape=(4, 16, 64), scale=(1, 1, 1), 1028 bytes)
    """

    _float = nnx.LinearGeneral
    unused = ("promote_dtype", "dot_general", "dot_general_cls", "preferred_element_type")

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Float[Array, "..."],
        out_sharding: OutSharding = None,
        *,
        strength: Strength | None = None,
    ) -> Float[Array, "..."]:
        """The layer's output.

        Args:
          inputs: an array that has the axes named by ``axis`` and ``batch_axis``.
          out_sharding: must be None.
          strength: as for :class:`BitLinear`.

        Returns:
          (*batch, ..., *out_features).

        Raises:
          ValueError: as :class:`BitLinear`; axes that the inputs do not have.
        """
        _checks.require_unset("BitLinearGeneral", "out_sharding", out_sharding, None)
        return self._forward(general_call, inputs, strength=strength)


class BitConv(TernaryLayer, nnx.Conv):
    """``nnx.Conv`` with a ternary kernel, channels last; one activation scale per example.

    Args:
      *args: as for ``nnx.Conv``: in_features, out_features, kernel_size, strides.
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the channels, before quantising.
      backward_dtype: of the backward convolutions' operands; None: float32.
      **rest: the other arguments of ``nnx.Conv``, but ``mask``.

    Raises:
      ValueError: an argument that a ternary convolution has no use for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import nnx
      >>> layer = bj.nnx.BitConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
      >>> packed, report = bj.nnx.pack(layer)
      >>> bool((packed(x) == layer(x)).all())
      True
    """

    _float = nnx.Conv
    unused = ("promote_dtype", "conv_general_dilated", "mask", "preferred_element_type")

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Float[Array, "..."],
        out_sharding: OutSharding = None,
        *,
        strength: Strength | None = None,
    ) -> Float[Array, "..."]:
        """The layer's output.

        Args:
          inputs: (*batch, *space, in_features).
          out_sharding: must be None.
          strength: as for :class:`BitLinear`.

        Returns:
          (*batch, *space, out_features).

        Raises:
          ValueError: as :class:`BitLinear`; a padding that is none.
        """
        _checks.require_unset("BitConv", "out_sharding", out_sharding, None)
        return self._forward(conv_call, inputs, strength=strength)


class BitEinsum(TernaryLayer, nnx.Einsum):
    """``nnx.Einsum`` with a ternary kernel: any contraction of inputs with a kernel.

    Args:
      *args: as for ``nnx.Einsum``: einsum_str, kernel_shape, bias_shape.
      weights: the kernel's quantiser.
      activations: the activations' quantiser; None for weight-only.
      norm: RMSNorm without parameters over the features, before quantising.
      backward_dtype: of the backward products' operands; None: float32.
      **rest: the other arguments of ``nnx.Einsum``.

    Raises:
      ValueError: an argument that a ternary contraction has no use for.

    Example:
      >>> import jax, bitnet_jax as bj
      >>> from flax import nnx
      >>> experts = bj.nnx.BitEinsum("ebk,ekn->ebn", (4, 64, 32), rngs=nnx.Rngs(0))
      >>> bj.nnx.pack(experts)[0].kernel.get_value()
      PackedTernary(shape=(4, 64, 32), scale=(4, 1, 1), 2064 bytes)
    """

    _float = nnx.Einsum
    unused = ("promote_dtype", "einsum_op", "preferred_element_type")

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Float[Array, "..."],
        einsum_str: str | None = None,
        out_sharding: OutSharding = None,
        *,
        strength: Strength | None = None,
    ) -> Float[Array, "..."]:
        """The layer's output.

        Args:
          inputs: the equation's first operand.
          einsum_str: the equation, where it is not the layer's own.
          out_sharding: must be None.
          strength: as for :class:`BitLinear`.

        Returns:
          The equation's result.

        Raises:
          ValueError: as :class:`BitLinear`; an equation that does not fit.
          NotImplementedError: an equation that is no contraction.
        """
        _checks.require_unset("BitEinsum", "out_sharding", out_sharding, None)
        return self._forward(einsum_call, inputs, einsum_str, strength=strength)


def linear_call(module: nnx.Linear, x_shape: tuple[int, ...]) -> dimensions.Call:
    """The dimension numbers of a call of ``nnx.Linear``."""
    return dimensions.dense((*x_shape[:-1], module.in_features), module.out_features)


def general_call(module: nnx.LinearGeneral, x_shape: tuple[int, ...]) -> dimensions.Call:
    """The dimension numbers of a call of ``nnx.LinearGeneral``."""
    return dimensions.general(x_shape, module.axis, tuple(module.batch_axis), module.out_features)


def conv_call(module: nnx.Conv, x_shape: tuple[int, ...]) -> dimensions.Call:
    """The dimension numbers of a call of ``nnx.Conv``."""
    return dimensions.conv_of(module, (*x_shape[:-1], module.in_features), module.out_features)


def einsum_call(
    module: nnx.Einsum, x_shape: tuple[int, ...], einsum_str: str | None = None
) -> dimensions.Call:
    """The dimension numbers of a call of ``nnx.Einsum``."""
    return dimensions.einsum(x_shape, tuple(module.kernel_shape), einsum_str or module.einsum_str)


def trainable(path: tuple[Any, ...], variable: object) -> bool:
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
      >>> packed, report = bj.nnx.pack(layer)
      >>> list(nnx.state(packed, bj.nnx.trainable))
      ['bias']
    """
    del path
    return isinstance(variable, nnx.Param) and not is_packed(variable.get_value())
