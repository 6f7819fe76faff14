"""What each Flax linen layer does with its kernel, in that layer's own scope.

:func:`forward` stands in for a layer's ``__call__``: same parameters, same
initialisers, same random keys, so a checkpoint of the float layer fits. The
layers of this package and ``ternarize`` both run it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.nn.initializers import Initializer
from jaxtyping import PyTree

from bitnet_jax import _checks
from bitnet_jax._layers import dimensions
from bitnet_jax._layers.dimensions import Call
from bitnet_jax._layers.forward import Fields, LayerConfig, check_packed, embed_lookup, run_layer
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._quantize.strength import Strength
from bitnet_jax._tree.leaves import unbox

Observer = Callable[..., None]

# The layers that have a ternary form; nn.ConvLocal has nn.Conv's __call__.
LinenLayer = nn.Dense | nn.DenseGeneral | nn.Conv | nn.ConvLocal | nn.Einsum

# Called with every layer: (module, name of the leaf, its call or None, its config or the
# reason why it stays float, the leaf).
observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


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


def _conv(module: nn.Conv | nn.ConvLocal, inputs: jax.Array) -> Call:
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


def raw(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside Flax's wrappers: what an interceptor's context holds."""
    return inspect.unwrap(method)


LAYERS = {raw(layer.kind.__call__): layer for layer in (DENSE, GENERAL, CONV, EINSUM)}


def replaced_field(module: nn.Module, layer: Layer) -> str | None:
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
    name = replaced_field(module, layer)
    if name is not None:
        _checks.require_unset(who, name, getattr(module, name), None)
    inputs = jnp.asarray(inputs)
    call = layer.call(module, inputs, *args, **kwargs)
    _tell(module, "kernel", call, config)
    kernel = packed_leaf(module, "kernel")
    if is_packed(kernel):  # before the bias, whose own error would hide this one
        check_packed(who, where, config, call, kernel)
    if kernel is None:
        kernel = _param(module, "kernel", module.kernel_init, call, layer.flat)
    bias = _param(module, "bias", module.bias_init, call, layer.flat) if module.use_bias else None
    fields = Fields(module.dtype, module.precision, module.get_variable("params", "kernel"))
    return run_layer(
        who, where, config, call, inputs, kernel, bias, strength=strength, fields=fields
    )


def left_float(module: nn.Module, name: str, why: str) -> None:
    """Tells the observer that a kernel stays float; raises if it is packed."""
    leaf = packed_leaf(module, name)
    if leaf is not None:
        where = "/".join((*module.path, name))
        _raise_packed_but_float(type(module).__name__, where, why)
    _tell(module, name, None, why)


def _tell(module: nn.Module, name: str, call: Call | None, config: LayerConfig | str) -> None:
    """Calls the observer, if there is one."""
    tell = observer.get()
    if tell is not None:
        has = module.has_variable("params", name)
        tell(module, name, call, config, module.get_variable("params", name) if has else None)


def packed_leaf(module: nn.Module, name: str) -> Any:
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


def take_packed_table(module: nn.Embed) -> bool:
    """``nn.Embed.setup`` with a packed table, whose shape Flax would refuse."""
    table = packed_leaf(module, "embedding")
    if table is None:
        return False
    module.embedding = table
    return True


def embed(module: nn.Embed, config: LayerConfig, inputs: jax.typing.ArrayLike) -> jax.Array:
    """The look-up of ``nn.Embed``, from an int8 table."""
    inputs, where = jnp.asarray(inputs), "/".join((*module.path, "embedding"))
    shape = (module.num_embeddings, module.features)
    _checks.require_embedding_lookup("Embed", inputs, shape)
    _tell(module, "embedding", dimensions.table(shape, 1), config)
    return embed_lookup(where, config.weights, module.embedding, inputs, module.dtype, None)


def attend(module: nn.Embed, config: LayerConfig, query: jax.typing.ArrayLike) -> jax.Array:
    """``query @ embedding.T`` of ``nn.Embed``, from an int8 table."""
    query, where = jnp.asarray(query), "/".join((*module.path, "embedding"))
    call = dimensions.table((module.num_embeddings, module.features), query.ndim)
    _tell(module, "embedding", call, config)
    fields = Fields(module.dtype, None)
    return run_layer(
        "Embed", where, config, call, query, module.embedding, None, strength=None, fields=fields
    )


def _raise_packed_but_float(who: str, path: str, why: str) -> NoReturn:
    """Reports a packed kernel in a layer that stays float."""
    raise ValueError(
        f"{who}: the kernel at {path} is packed, and this model leaves it in float ({why}). "
        "Ternarise the model with the `select` that the kernels were packed with."
    )
