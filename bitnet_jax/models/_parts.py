"""What a decoder is built from: norms, projections, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bitnet_jax._matmul import matmul
from bitnet_jax._ops.ternary_dot import ternary_dot
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._packed.stored import PackedTernary
from bitnet_jax._quantize.int8 import ActivationConfig
from bitnet_jax._quantize.straight_through import fake_quantize
from bitnet_jax._quantize.ternary import KernelConfig, TernaryConfig
from bitnet_jax._tree.select import only
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.nnx import BitLinear, ternarize


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x**2) + eps) * scale``, in float32 until the scale."""

    def __init__(self, features: int, eps: float, *, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
        """The normalised features, in x's dtype."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        y = (wide * jax.lax.rsqrt(mean + np.float32(self.eps))).astype(x.dtype)
        scale = self.scale.get_value().astype(x.dtype)
        return y * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def norm_if(wanted: bool, features: int, eps: float, rngs: nnx.Rngs) -> RMSNorm | None:
    """A norm, or None."""
    return RMSNorm(features, eps, rngs=rngs) if wanted else None


class Projection(nnx.Module):
    """A linear layer, quantised or float by its config, with a norm before it if asked for."""

    def __init__(
        self, path: str, n_in: int, n_out: int, bias: bool, config: DecoderConfig, rngs: nnx.Rngs
    ):
        kernel = config.kernel(path)
        normed = config.projection_norm and kernel is not None
        self.norm = norm_if(normed, n_in, config.projection_norm_eps, rngs)
        self.linear: Any = linear(n_in, n_out, bias, kernel, config.activations, config, rngs)
        self.dtype = config.dtype
        narrow = config.activation_rounding == "input" and config.dtype != np.float32
        self.narrow = narrow and isinstance(self.linear, BitLinear)

    def __call__(self, x: Float[Array, "*b k"]) -> Float[Array, "*b n"]:
        """x times the kernel, plus bias."""
        x = x if self.norm is None else self.norm(x)
        if self.narrow and self.linear.activations is not None:
            return self._round_in_dtype(x, self.linear.activations)
        return self.linear(x)

    def _round_in_dtype(self, x: jax.Array, config: ActivationConfig) -> jax.Array:
        """The product with int8 codes that are computed in x's own, narrow dtype."""
        codes, scale = codes_in_dtype(x, config)
        # eps = qmax makes every gamma qmax: the quantiser inside returns these codes.
        same = ActivationConfig(bits=config.bits, eps=float(config.qmax))
        kernel: Any = self.linear.kernel.get_value()
        if is_packed(kernel):
            y = matmul(codes, kernel, activations=same, dtype=jnp.float32)
        else:
            weights = self.linear.weights
            y = ternary_dot(codes, kernel, weights, activations=same, dtype=jnp.float32)
        y = (y / scale).astype(self.dtype)
        if self.linear.bias is None:
            return y
        bias = self.linear.bias.get_value().astype(self.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def codes_in_dtype(
    x: Float[Array, "*b k"], config: ActivationConfig
) -> tuple[Float[Array, "*b k"], Float[Array, "*b 1"]]:
    """Int8 codes as float32, and what x was multiplied by, each rounded to x's dtype.

    ``scale = qmax / max(max|x|, eps)``, ``code = round(x * scale)``; straight through to x.
    The clip that transformers sets at -128 is at -qmax here.
    """
    limits = jnp.finfo(x.dtype)

    def rounded(y: jax.Array) -> jax.Array:
        # XLA drops a cast to bfloat16 and back; this it keeps.
        return jax.lax.reduce_precision(y, limits.nexp, limits.nmant)

    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    floor = rounded(jnp.maximum(largest, np.float32(config.eps)))
    scale = jax.lax.stop_gradient(rounded(np.float32(config.qmax) / floor))
    y = rounded(wide * scale)
    codes = jnp.clip(jnp.round(y), -config.qmax, config.qmax)
    return y + jax.lax.stop_gradient(codes - y), scale


class Blank(nnx.Rngs):
    """The keys of a decoder that is filled from a checkpoint: nothing is drawn, or traced."""


def _drawn_by(init: Callable[..., Any], rngs: nnx.Rngs) -> Callable[..., Any]:
    return nnx.initializers.zeros_init() if isinstance(rngs, Blank) else init


def linear(
    n_in: int,
    n_out: int,
    bias: bool,
    kernel: KernelConfig | None,
    activations: ActivationConfig | None,
    config: DecoderConfig,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """``nnx.Linear``, or this library's layer where the kernel is quantised."""
    shared: dict[str, Any] = {
        "use_bias": bias,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "kernel_init": _drawn_by(nnx.initializers.lecun_normal(), rngs),
        "rngs": rngs,
    }
    if kernel is None:
        return nnx.Linear(n_in, n_out, **shared)
    layer: Any = BitLinear
    return layer(n_in, n_out, weights=kernel, activations=activations, **shared)


class FloatEmbed(nnx.Embed):
    """``nnx.Embed`` that casts the rows it takes, and not the whole table."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # no out_sharding here
        self, inputs: Int[Array, "*b"]
    ) -> Float[Array, "*b k"]:
        """The rows of the table that ``inputs`` names."""
        rows = jnp.take(self.embedding.get_value(), inputs, axis=0)
        return rows.astype(self.dtype)


class TernaryEmbed(nnx.Module):
    """An embedding at two bits a weight, with scales along the features."""

    def __init__(self, shape: tuple[int, int], weights: TernaryConfig, config: DecoderConfig, rngs):
        init = _drawn_by(nnx.initializers.normal(0.02), rngs)
        self.embedding = nnx.Param(init(rngs.params(), shape, config.param_dtype))
        self.weights = weights
        self.activations = config.head_activations
        self.dtype = config.dtype

    def __call__(self, inputs: Int[Array, "*b"]) -> Float[Array, "*b k"]:
        """The rows of the table that ``inputs`` names."""
        table: Any = self.embedding.get_value()
        if not isinstance(table, PackedTernary):
            table = fake_quantize(table, self.weights, contracting_axes=-1)
            return jnp.take(table, inputs, axis=0).astype(self.dtype)
        flat = inputs.reshape(-1)
        scale = jnp.broadcast_to(table.scale, (table.shape[0], *table.scale.shape[1:]))
        rows = PackedTernary(
            jnp.take(table.codes, flat, axis=0),
            jnp.take(scale, flat, axis=0),
            length=table.length,
            contracting_axes=(-1,),
            config=self.weights,
        )
        return rows.dequantize(self.dtype).reshape(*inputs.shape, table.length)

    def attend(self, query: Float[Array, "*b k"]) -> Float[Array, "*b v"]:
        """``query @ embedding.T``."""
        table: Any = self.embedding.get_value()
        if is_packed(table):
            return matmul(query, table, activations=self.activations, dtype=self.dtype)
        options: dict[str, Any] = {"contracting_axes": -1, "dtype": self.dtype}
        return ternary_dot(query, table, self.weights, activations=self.activations, **options)


def embedding(config: DecoderConfig, rngs: nnx.Rngs) -> Any:
    """The table of tokens: float, int8 or ternary."""
    kind = config.kernel("embedding")
    shape = config.vocabulary, config.width
    if isinstance(kind, TernaryConfig):
        return TernaryEmbed(shape, kind, config, rngs)
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "embedding_init": _drawn_by(nnx.initializers.normal(0.02), rngs),
        "rngs": rngs,
    }
    if kind is None:
        return FloatEmbed(*shape, **options)
    table = nnx.Embed(*shape, **options)
    chosen = only("embedding")
    ternarize(table, select=chosen, weights=kind, activations=config.head_activations)
    return table
