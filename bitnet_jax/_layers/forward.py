"""The forward pass of a layer, from a float kernel or a packed one.

Both Flax front ends call this; they differ only in where a parameter lives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from bitnet_jax import _mesh
from bitnet_jax._layers.dimensions import Call, ConvCall
from bitnet_jax._layers.stated import reading, state
from bitnet_jax._matmul import convolve, embedding_rows, matmul, require_usable
from bitnet_jax._ops.gather import gathering
from bitnet_jax._ops.product import Product
from bitnet_jax._ops.ternary_dot import ternary_conv, ternary_dot
from bitnet_jax._packed.adapted import Adapted
from bitnet_jax._packed.kernel import Packed
from bitnet_jax._packed.prepared import PreparedInt8
from bitnet_jax._packed.stored import PackedInt8
from bitnet_jax._quantize import kernel_axes
from bitnet_jax._quantize.arrays import Activations, AnyArray, DTypeLike, Kernel
from bitnet_jax._quantize.config import B158, INT8, ActivationConfig, KernelConfig
from bitnet_jax._quantize.int8 import check_activations
from bitnet_jax._quantize.kernel_spec import require_kernel_config
from bitnet_jax._quantize.pinned import pinned
from bitnet_jax._quantize.straight_through import fake_quantize, rms_normalize
from bitnet_jax._quantize.strength import Strength, ambient
from bitnet_jax._tree.leaves import placement


class LayerConfig(NamedTuple):
    """What a ternary layer has beyond the float layer it stands for."""

    weights: KernelConfig = B158
    activations: ActivationConfig | None = INT8
    norm: bool = False
    backward_dtype: DTypeLike | None = None


def layer_config(
    who: str,
    weights: KernelConfig,
    activations: ActivationConfig | None,
    norm: bool,
    backward_dtype: DTypeLike | None,
) -> LayerConfig:
    """The config that both ``ternarize`` are asked for, checked."""
    require_kernel_config(who, weights, "weights")
    check_activations(who, activations)
    return LayerConfig(weights, activations, norm, backward_dtype)


class Fields(NamedTuple):
    """A float layer's dtype and precision, and the box (Flax metadata) around its kernel."""

    dtype: DTypeLike | None
    precision: lax.PrecisionLike
    box: PyTree = None


class _Arithmetic(NamedTuple):
    """The dtype of a layer's output, and the precision of its float products."""

    dtype: DTypeLike
    precision: lax.PrecisionLike


def run_layer(
    who: str,
    where: str,
    config: LayerConfig,
    call: Call,
    x: Shaped[AnyArray, "..."],
    kernel: Kernel | Packed | Adapted,
    bias: Float[AnyArray, "..."] | None,
    *,
    strength: Strength | None,
    fields: Fields,
) -> Float[Array, "..."]:
    """x times a kernel, plus bias; the same bits from float and packed kernels."""
    operands = [x, kernel] if bias is None else [x, kernel, bias]
    dtype = fields.dtype or functools.reduce(jnp.promote_types, (a.dtype for a in operands))
    arithmetic = _Arithmetic(dtype, fields.precision)
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
        x = x.astype(dtype)
    x_shape = x.shape
    x = call.to_canonical(x)
    if reading.get() and not isinstance(kernel, Packed | Adapted):
        y = _stated(config, call, x, kernel, ambient(strength), arithmetic)
        return _with_bias(call, call.from_canonical(y, x_shape), bias)
    if config.norm:
        flat = x.reshape(*x.shape[: x.ndim - call.features], -1)
        x = _mesh.in_auto_like(rms_normalize, flat).reshape(x.shape)
    if isinstance(kernel, Adapted):
        check_packed(who, where, config, call, kernel)
        y = _serve(config, call, x, kernel.base, arithmetic)
        y = y + _low_rank(call, x, kernel, arithmetic)
    elif isinstance(kernel, Packed):
        check_packed(who, where, config, call, kernel)
        y = _serve(config, call, x, kernel, arithmetic)
    else:
        y = _train(config, call, x, kernel, ambient(strength), fields.box, arithmetic)
    return _with_bias(call, call.from_canonical(y, x_shape), bias)


def _with_bias(
    call: Call, y: Float[Array, "..."], bias: Float[AnyArray, "..."] | None
) -> Float[Array, "..."]:
    if bias is None:
        return y
    # Ones for the row axes: rank promotion is the caller's to allow, not ours to use.
    spread = (1,) * (y.ndim - len(call.bias_spread)) + call.bias_spread
    # Pinned: what the caller adds or widens next must start from this rounding.
    return pinned(y + bias.astype(y.dtype).reshape(spread))


def _train(
    config: LayerConfig,
    call: Call,
    x: Activations,
    kernel: Kernel,
    strength: Strength,
    box: PyTree,
    arithmetic: _Arithmetic,
) -> Float[Array, "..."]:
    """From a float kernel, quantised on the way."""
    how: dict[str, Any] = {
        "activations": config.activations,
        "strength": strength,
        "backward_dtype": config.backward_dtype,
        "kernel_spec": placement(box) if gathering() else None,
        **arithmetic._asdict(),
    }
    if isinstance(call, ConvCall):
        how["contracting_axes"] = call.contracting_axes
        return ternary_conv(x, kernel, call.convolution, config.weights, **how)
    axes = {"contracting_axes": call.contracting_axes, "batch_axes": call.batch_axes}
    return ternary_dot(x, kernel, config.weights, **axes, **how)


def _stated(
    config: LayerConfig,
    call: Call,
    x: Activations,
    kernel: Kernel,
    strength: Strength,
    arithmetic: _Arithmetic,
) -> Float[Array, "..."]:
    """The float product of a kernel that states its config: what a program is read from."""
    dtype, precision = arithmetic

    def run(x: Activations, kernel: Kernel) -> Float[Array, "..."]:
        x, kernel = x.astype(dtype), state(kernel, config, strength).astype(dtype)
        if isinstance(call, ConvCall):
            axes = kernel_axes.resolve("Conv", kernel, call.contracting_axes, ())
            return call.convolution.apply(x, kernel_axes.to_canonical(kernel, axes), precision)
        features = tuple(range(x.ndim - call.features, x.ndim))
        lead = tuple(range(len(call.batch_axes)))
        dims = ((features, call.contracting_axes), (lead, call.batch_axes))
        return lax.dot_general(x, kernel, dims, precision=precision)

    outputs = len(call.kernel_shape) - len(call.contracting_axes) - len(call.batch_axes)
    return _mesh.in_auto_rows(run, x, kernel, outputs=(None,) * outputs)


def _serve(
    config: LayerConfig, call: Call, x: Activations, kernel: Packed, arithmetic: _Arithmetic
) -> Float[Array, "..."]:
    """From a packed kernel."""
    how: dict[str, Any] = {"activations": config.activations, **arithmetic._asdict()}
    if isinstance(call, ConvCall):
        return convolve(x, kernel, call.convolution, **how)
    return matmul(x, kernel, **how)


def _low_rank(
    call: Call, x: Activations, kernel: Adapted, arithmetic: _Arithmetic
) -> Float[Array, "..."]:
    """``scale (x A) B``, in float, before the axes are put in the layer's order."""
    dtype, precision = arithmetic
    operator = call.convolution if isinstance(call, ConvCall) else Product()
    taken = call.contracting_axes + call.batch_axes
    outputs = tuple(n for axis, n in enumerate(call.kernel_shape) if axis not in taken)

    def run(
        x: Activations, a: Float[Array, "*b k r"], b: Float[Array, "*b r n"]
    ) -> Float[Array, "..."]:
        if not isinstance(call, ConvCall):
            x = x.reshape(*x.shape[: x.ndim - call.features], -1)
        h = operator.apply(x.astype(dtype), a.astype(dtype), precision)
        y = Product().apply(h, b.astype(dtype), precision) * jnp.asarray(kernel.scale, dtype)
        return y.reshape(*y.shape[:-1], *outputs)

    whole = (None,) * len(outputs)
    return _mesh.in_auto_rows(run, x, kernel.a, kernel.b, outputs=whole)


def check_packed(
    who: str, where: str, config: LayerConfig, call: Call, kernel: Packed | Adapted
) -> None:
    """Raises unless a packed kernel is intact and has this call's config, shape and axes."""
    require_usable(who, f"the kernel at {where}", kernel)
    if isinstance(kernel, Adapted):
        if isinstance(call, ConvCall):
            _require_one_feature_group(who, where, call.convolution.feature_groups)
        kernel = kernel.base
    _require_same_config(who, where, config.weights, kernel.config)
    _require_same_shape(who, where, call.kernel_shape, kernel.shape)
    _require_same_axes(who, where, call.contracting_axes, kernel.axes.contracting)


def embed_lookup(
    where: str,
    config: KernelConfig,
    embedding: Kernel | Packed | Adapted,
    index: Int[Array, "..."],
    dtype: DTypeLike | None,
    strength: Strength | None,
) -> Float[Array, "... features"]:
    """Rows of an int8 embedding; the same bits from a float table and a packed one."""
    if isinstance(embedding, Adapted | Packed):
        require_usable("Embed", f"the table at {where}", embedding)
    if isinstance(embedding, Adapted):
        rows = embed_lookup(where, config, embedding.base, index, dtype, strength)
        return rows + embedding.rows(index, rows.dtype)
    if isinstance(embedding, Packed):
        _require_same_config("Embed", where, config, embedding.config)
        assert isinstance(embedding, PackedInt8 | PreparedInt8)  # by its config
        return embedding_rows(embedding, index).astype(dtype or embedding.dtype)
    strength = ambient(strength)
    if reading.get():
        table = state(embedding, LayerConfig(config, None), strength)
    else:
        table = fake_quantize(embedding, config, contracting_axes=-1, strength=strength)
    return _mesh.rows_of(table, index).astype(dtype or embedding.dtype)


def _require_same_config(who: str, path: str, trained: KernelConfig, packed: KernelConfig) -> None:
    """Raises unless a packed kernel was quantised as its layer trains."""
    if trained != packed:
        raise ValueError(
            f"{who}: the kernel at {path} was packed with {packed}, and the layer trains with "
            f"{trained}: its outputs would not be the ones trained. Pack with the layer's own "
            "config, or set weights= to the packed one."
        )


def _require_same_shape(who: str, path: str, wanted: Sequence[int], packed: Sequence[int]) -> None:
    """Raises unless a packed kernel has its layer's shape."""
    if tuple(wanted) != tuple(packed):
        raise ValueError(
            f"{who}: the packed kernel at {path} stands for shape {tuple(packed)}, and the layer "
            f"needs {tuple(wanted)}. Check that the params belong to this model."
        )


def _require_same_axes(who: str, path: str, wanted: Sequence[int], packed: Sequence[int]) -> None:
    """Raises unless a packed kernel contracts over its layer's axes."""
    if tuple(wanted) != tuple(packed):
        raise ValueError(
            f"{who}: the packed kernel at {path} contracts over its axes {tuple(packed)}, and the "
            f"layer over {tuple(wanted)}. Pack with bj.linen.pack or bj.nnx.pack, which take the "
            "axes from the model."
        )


def _require_one_feature_group(who: str, path: str, groups: int) -> None:
    """Raises where an adapter is to run over a convolution with feature groups."""
    if groups != 1:
        raise NotImplementedError(
            f"{who}: the kernel at {path} has an adapter and {groups} feature groups; a low-rank "
            "update mixes all channels. Leave this kernel out of bj.lora.init (select=)."
        )
