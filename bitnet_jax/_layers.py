"""The forward pass of a layer, from a float kernel or a packed one.

Both Flax front ends call this; they differ only in where a parameter lives.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bitnet_jax import _axes, _boxes, _checks, _placement
from bitnet_jax._adapted import Adapted
from bitnet_jax._calls import Call, ConvCall, dot_general
from bitnet_jax._contract import ternary_conv, ternary_dot
from bitnet_jax._dot import Product
from bitnet_jax._int8 import INT8, ActivationConfig, Int8Config, check_activations
from bitnet_jax._matmul import convolve, embedding_rows, matmul
from bitnet_jax._packed import PackedInt8, Prepared, PreparedInt8, is_packed
from bitnet_jax._phase import Strength, ambient
from bitnet_jax._ste import fake_quantize, rms_normalize
from bitnet_jax._ternary import B158, KernelConfig, TernaryConfig


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
    _checks.instance(who, "weights", weights, (TernaryConfig, Int8Config), "Use bj.B158.")
    check_activations(who, activations)
    return LayerConfig(weights, activations, norm, backward_dtype)


class Fields(NamedTuple):
    """What a float layer says about its arithmetic, and the box that its kernel came in."""

    dtype: Any
    precision: Any
    box: Any = None


def run(
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
    x = call.enter(x)
    if config.norm:
        flat = x.reshape(*x.shape[: x.ndim - call.features], -1)
        x = _placement.in_auto_like(rms_normalize, flat).reshape(x.shape)
    adapted = kernel if isinstance(kernel, Adapted) else None
    kernel = kernel if adapted is None else adapted.base
    if is_packed(kernel):
        check_packed(who, where, config, call, kernel)
        y = _serve(config, call, x, kernel, dtype, fields.precision)
        if adapted is not None:
            y = y + _low_rank(who, where, call, x, adapted, dtype, fields.precision)
    else:
        y = _train(config, call, x, kernel, ambient(strength), dtype, fields)
    y = call.leave(y, x_shape)
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
        "kernel_spec": _boxes.placement(fields.box) if _placement.gathering() else None,
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
        _checks.adapter_groups(who, where, call.convolution.feature_groups)
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
    return _placement.in_auto_rows(run, x, kernel.a, kernel.b, outputs=whole)


def check_packed(who: str, where: str, config: LayerConfig, call: Call, kernel: Any) -> None:
    """Refuses a packed kernel of another config, shape or axes than this call's."""
    _checks.layer_config(who, where, config.weights, kernel.config)
    shape = call.kernel_shape
    if isinstance(kernel, Prepared):
        outputs = [a for a in range(len(shape)) if a not in call.contracting_axes + call.batch_axes]
        order = (*call.batch_axes, *call.contracting_axes, *outputs)
        _checks.layer_shape(who, where, [shape[a] for a in order], kernel.shape)
        return
    _checks.layer_shape(who, where, shape, kernel.shape)
    _checks.layer_axes(who, where, call.contracting_axes, kernel.axes.contracting)


def embed(
    where: str,
    config: KernelConfig,
    embedding: Any,
    index: jax.Array,
    dtype: Any,
    strength: Strength | None,
) -> jax.Array:
    """Rows of an int8 embedding; the same bits from a float table and a packed one."""
    if is_packed(embedding):
        _checks.layer_config("Embed", where, config, embedding.config)
        assert isinstance(embedding, PackedInt8 | PreparedInt8)  # what fits an Embed
        return embedding_rows(embedding, index).astype(dtype or embedding.dtype)
    strength = ambient(strength)
    table = fake_quantize(embedding, config, contracting_axes=-1, strength=strength)
    return _placement.rows_of(table, index).astype(dtype or embedding.dtype)


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
    backward_dtype: Any = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: lax.DotDimensionNumbers,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
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
        _checks.unsupported_field("TernaryDotGeneral", "out_sharding", out_sharding, None)
        (_, w_axes), (_, w_batch) = dimension_numbers
        _axes.resolve("TernaryDotGeneral", rhs, w_axes, w_batch)  # refuses axes it has not
        call = dot_general(lhs.ndim, rhs.shape, dimension_numbers)
        config = LayerConfig(self.weights, self.activations, False, self.backward_dtype)
        fields = Fields(preferred_element_type, precision)
        where = "the kernel"
        return run(
            "TernaryDotGeneral", where, config, call, lhs, rhs, None, strength=None, fields=fields
        )
