"""The forward pass of a layer, from a float kernel or a packed one.

Both Flax front ends call this; they differ only in where a parameter lives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax import _checks, _mesh
from bitnet_jax._layers.dimensions import Call, ConvCall
from bitnet_jax._matmul import convolve, embedding_rows, matmul
from bitnet_jax._ops.gather import gathering
from bitnet_jax._ops.product import Product
from bitnet_jax._ops.ternary_dot import ternary_conv, ternary_dot
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import PackedInt8, Prepared, PreparedInt8, is_packed
from bitnet_jax._quantize.int8 import INT8, ActivationConfig, Int8Config, check_activations
from bitnet_jax._quantize.straight_through import fake_quantize, rms_normalize
from bitnet_jax._quantize.strength import Strength, ambient
from bitnet_jax._quantize.ternary import B158, KernelConfig, TernaryConfig
from bitnet_jax._tree.leaves import placement


class LayerConfig(NamedTuple):
    """What a ternary layer has beyond the float layer it stands for."""

    weights: KernelConfig = B158
    activations: ActivationConfig | None = INT8
    norm: bool = False
    backward_dtype: Any = None


def layer_config(
    who: str, weights: Any, activations: Any, norm: bool, backward_dtype: Any
) -> LayerConfig:
    """The config that both ``ternarize`` are asked for, checked."""
    _checks.require_instance(who, "weights", weights, (TernaryConfig, Int8Config), "Use bj.B158.")
    check_activations(who, activations)
    return LayerConfig(weights, activations, norm, backward_dtype)


class Fields(NamedTuple):
    """What a float layer says about its arithmetic, and the box that its kernel came in."""

    dtype: Any
    precision: Any
    box: Any = None


def run_layer(
    who: str,
    where: str,
    config: LayerConfig,
    call: Call,
    x: jax.Array,
    kernel: Any,
    bias: jax.Array | None,
    *,
    strength: Strength | None,
    fields: Fields,
) -> jax.Array:
    """x times a kernel, plus bias; the same bits from float and packed kernels."""
    operands = [x, kernel] if bias is None else [x, kernel, bias]
    dtype = fields.dtype or functools.reduce(jnp.promote_types, (a.dtype for a in operands))
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
        x = x.astype(dtype)
    x_shape = x.shape
    x = call.to_canonical(x)
    if config.norm:
        flat = x.reshape(*x.shape[: x.ndim - call.features], -1)
        x = _mesh.in_auto_like(rms_normalize, flat).reshape(x.shape)
    adapted = kernel if isinstance(kernel, Adapted) else None
    kernel = kernel if adapted is None else adapted.base
    if is_packed(kernel):
        check_packed(who, where, config, call, kernel)
        y = _serve(config, call, x, kernel, dtype, fields.precision)
        if adapted is not None:
            y = y + _low_rank(who, where, call, x, adapted, dtype, fields.precision)
    else:
        y = _train(config, call, x, kernel, ambient(strength), dtype, fields)
    y = call.from_canonical(y, x_shape)
    if bias is None:
        return y
    spread = (1,) * (y.ndim - len(call.bias_spread)) + call.bias_spread
    return y + bias.astype(dtype).reshape(spread)


def _train(
    config: LayerConfig, call: Call, x, kernel, strength, dtype, fields: Fields
) -> jax.Array:
    how: dict[str, Any] = {
        "strength": strength,
        "dtype": dtype,
        "backward_dtype": config.backward_dtype,
        "precision": fields.precision,
        "kernel_spec": placement(fields.box) if gathering() else None,
    }
    if isinstance(call, ConvCall):
        convolution = call.convolution
        return ternary_conv(x, kernel, convolution, config.weights, config.activations, **how)
    axes = {"contracting_axes": call.contracting_axes, "batch_axes": call.batch_axes}
    return ternary_dot(x, kernel, config.weights, config.activations, **axes, **how)


def _serve(config: LayerConfig, call: Call, x, kernel, dtype, precision) -> jax.Array:
    how: dict[str, Any] = {
        "activations": config.activations,
        "dtype": dtype,
        "precision": precision,
    }
    if isinstance(call, ConvCall):
        return convolve(x, kernel, call.convolution, **how)
    return matmul(x, kernel, **how)


def _low_rank(who: str, where: str, call: Call, x, kernel: Adapted, dtype, precision) -> jax.Array:
    """``scale (x A) B``, in float, before the axes are put in the layer's order."""
    operator = Product()
    if isinstance(call, ConvCall):
        _require_one_feature_group(who, where, call.convolution.feature_groups)
        operator = call.convolution
    taken = call.contracting_axes + call.batch_axes
    outputs = tuple(n for axis, n in enumerate(call.kernel_shape) if axis not in taken)

    def run(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        if not isinstance(call, ConvCall):
            x = x.reshape(*x.shape[: x.ndim - call.features], -1)
        h = operator.apply(x.astype(dtype), a.astype(dtype), precision)
        y = Product().apply(h, b.astype(dtype), precision) * jnp.asarray(kernel.scale, dtype)
        return y.reshape(*y.shape[:-1], *outputs)

    whole = (None,) * len(outputs)
    return _mesh.in_auto_rows(run, x, kernel.a, kernel.b, outputs=whole)


def check_packed(who: str, where: str, config: LayerConfig, call: Call, kernel: Any) -> None:
    """Refuses a packed kernel of another config, shape or axes than this call's."""
    _require_same_config(who, where, config.weights, kernel.config)
    shape = call.kernel_shape
    if isinstance(kernel, Prepared):
        outputs = [a for a in range(len(shape)) if a not in call.contracting_axes + call.batch_axes]
        order = (*call.batch_axes, *call.contracting_axes, *outputs)
        _require_same_shape(who, where, [shape[a] for a in order], kernel.shape)
        return
    _require_same_shape(who, where, shape, kernel.shape)
    _require_same_axes(who, where, call.contracting_axes, kernel.axes.contracting)


def embed_lookup(
    where: str,
    config: KernelConfig,
    embedding: Any,
    index: jax.Array,
    dtype: Any,
    strength: Strength | None,
) -> jax.Array:
    """Rows of an int8 embedding; the same bits from a float table and a packed one."""
    if is_packed(embedding):
        _require_same_config("Embed", where, config, embedding.config)
        assert isinstance(embedding, PackedInt8 | PreparedInt8)  # what fits an Embed
        return embedding_rows(embedding, index).astype(dtype or embedding.dtype)
    strength = ambient(strength)
    table = fake_quantize(embedding, config, contracting_axes=-1, strength=strength)
    return _mesh.rows_of(table, index).astype(dtype or embedding.dtype)


def _require_same_config(who: str, path: str, trained: Any, packed: Any) -> None:
    """Refuses a packed kernel quantised by another rule than its layer trains with."""
    if trained != packed:
        raise ValueError(
            f"{who}: the kernel at {path} was packed with {packed}, and the layer trains with "
            f"{trained}: its outputs would not be the ones trained. Pack with the layer's own "
            "config, or set weights= to the packed one."
        )


def _require_same_shape(who: str, path: str, wanted: Sequence[int], packed: Sequence[int]) -> None:
    """Refuses a packed kernel of another shape than its layer's."""
    if tuple(wanted) != tuple(packed):
        raise ValueError(
            f"{who}: the packed kernel at {path} stands for shape {tuple(packed)}, and the layer "
            f"needs {tuple(wanted)}. Check that the params belong to this model."
        )


def _require_same_axes(who: str, path: str, wanted: Sequence[int], packed: Sequence[int]) -> None:
    """Refuses a packed kernel that contracts over other axes than its layer."""
    if tuple(wanted) != tuple(packed):
        raise ValueError(
            f"{who}: the packed kernel at {path} contracts over its axes {tuple(packed)}, and the "
            f"layer over {tuple(wanted)}. Pack with bj.linen.pack or bj.nnx.pack, which learn the "
            "axes from the model."
        )


def _require_one_feature_group(who: str, path: str, groups: int) -> None:
    """Refuses an adapter over a convolution with feature groups."""
    if groups != 1:
        raise NotImplementedError(
            f"{who}: the kernel at {path} has an adapter and {groups} feature groups; a low-rank "
            "update mixes all channels. Leave this kernel out of bj.lora.init (select=)."
        )
