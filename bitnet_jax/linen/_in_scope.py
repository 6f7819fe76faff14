"""What each ternary linen layer does with its kernel, in the layer's own scope.

:func:`forward` is the ``__call__`` of the layers of this package: the parameters, the
initialisers and the random keys of the float layer, so that its checkpoints fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.nn.initializers import Initializer
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._layers import dimensions
from bitnet_jax._layers.dimensions import Call
from bitnet_jax._layers.forward import Fields, LayerConfig, check_packed, run_layer
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._tree.leaves import unbox

# The layers that have a ternary form.
LinenLayer = nn.Dense | nn.DenseGeneral | nn.Conv | nn.Einsum


class Layer(NamedTuple):
    """A linen layer that has a ternary form.

    Attributes:
      kind: the class.
      call: (module, inputs, ...) -> the dimension numbers of the call.
      unused: fields that replace the product, which a ternary layer cannot use.
      flat: whether the initialisers see flattened shapes.
    """

    kind: type[nn.Module]
    call: Callable[..., Call]
    unused: tuple[str, ...]
    flat: bool = False


def _dense(module: nn.Dense, inputs: jax.Array) -> Call:
    return dimensions.dense(inputs.shape, module.features)


def _general(module: nn.DenseGeneral, inputs: jax.Array) -> Call:
    axis, batch, features = (
        (v,) if isinstance(v, int) else tuple(v)
        for v in (module.axis, module.batch_dims, module.features)
    )
    return dimensions.general(inputs.shape, axis, batch, features)


def _conv(module: nn.Conv, inputs: jax.Array) -> Call:
    return dimensions.conv_of(module, inputs.shape, module.features)


def _einsum(module: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None) -> Call:
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    return dimensions.einsum(inputs.shape, tuple(module.shape), equation)


_DOT = ("promote_dtype", "dot_general", "dot_general_cls")

_CONV = ("promote_dtype", "conv_general_dilated", "conv_general_dilated_cls", "mask")

DENSE = Layer(nn.Dense, _dense, _DOT)

GENERAL = Layer(nn.DenseGeneral, _general, _DOT, flat=True)

CONV = Layer(nn.Conv, _conv, _CONV)

EINSUM = Layer(nn.Einsum, _einsum, ("promote_dtype", "preferred_element_type"))


def _replaced_field(module: nn.Module, layer: Layer) -> str | None:
    """The first field that is set and that a ternary layer cannot use; None if there is none."""
    defaults = {f.name: f.default for f in dataclasses.fields(layer.kind)}
    given = (name for name in layer.unused if getattr(module, name) is not defaults[name])
    return next(given, None)


def forward(
    module: LinenLayer,
    layer: Layer,
    config: LayerConfig,
    inputs: jax.typing.ArrayLike,
    *args: str | None,
    strength: Strength | None = None,
    **kwargs: str | None,
) -> jax.Array:
    """The output of a ternary layer, with its parameters in the module's own scope."""
    who, where = type(module).__name__, "/".join((*module.path, "kernel"))
    name = _replaced_field(module, layer)
    if name is not None:
        _checks.require_unset(who, name, getattr(module, name), None)
    inputs = jnp.asarray(inputs)
    call = layer.call(module, inputs, *args, **kwargs)
    kernel = _packed_leaf(module, "kernel")
    if is_packed(kernel):  # before the bias, whose own error would hide this one
        check_packed(who, where, config, call, kernel)
    if kernel is None:
        kernel = _param(module, "kernel", module.kernel_init, call, layer.flat)
    bias = _param(module, "bias", module.bias_init, call, layer.flat) if module.use_bias else None
    fields = Fields(module.dtype, module.precision, module.get_variable("params", "kernel"))
    return run_layer(
        who, where, config, call, inputs, kernel, bias, strength=strength, fields=fields
    )


def _packed_leaf(module: nn.Module, name: str) -> Any:
    """The packed leaf of this name; None if there is none, or if it is float."""
    if not module.has_variable("params", name):
        return None
    # Opened without its sharding constraint, which is the float kernel's.
    leaf = unbox(module.get_variable("params", name))
    return leaf if is_packed(leaf) or isinstance(leaf, Adapted) else None


def _param(module: LinenLayer, name: str, init: Initializer, call: Call, flat: bool) -> jax.Array:
    """A parameter of the layer, as the float layer makes it."""
    shape = call.kernel_shape if name == "kernel" else call.bias_shape
    if flat:
        init = _flattened(init, name, call)
    return module.param(name, init, shape, module.param_dtype)


def _flattened(init: Initializer, name: str, call: Call) -> Callable[..., PyTree]:
    """An initialiser that sees what ``nn.DenseGeneral`` shows it: (fan in, fan out), or (n,)."""
    split = len(call.batch_axes) + len(call.contracting_axes)

    def reshaped(
        rng: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike | None
    ) -> PyTree:
        parts = (shape[:split], shape[split:]) if name == "kernel" else (shape,)
        value = init(rng, tuple(math.prod(part) for part in parts), dtype)
        if isinstance(value, meta.AxisMetadata):
            return meta.replace_boxed(value, value.unbox().reshape(shape))
        return value.reshape(shape)

    return reshaped
