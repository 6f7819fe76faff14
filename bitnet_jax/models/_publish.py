"""A decoder as a folder that transformers loads; undoes what ``_load_folder`` reads.

Ternary kernels with one scale for a tensor are written packed, with a
``quantization_config``; those with one for an output or a group, and those that run
weight-only, as floats on their grid, which is how such models are published; float kernels
as they are. What transformers could not run, or would run as something else, is refused.

``bitlinear`` stores 1/s, and not every float32 s is the reciprocal of a float32: the few
that are not are in the files' metadata, where this library finds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from bitnet_jax._packed.pack import pack
from bitnet_jax._packed.prepared import Prepared
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._packed.trits import PER_BYTE
from bitnet_jax._quantize.int8 import INT8, Int8Config
from bitnet_jax._quantize.ternary import TernaryConfig
from bitnet_jax.io._huggingface import Lazy, Published
from bitnet_jax.models import _codes, _names
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._pretrained import apart
from bitnet_jax.models._published import FLOATS, ROUNDING, SCALES
from bitnet_jax.models._rope import Rope

WHO = "export_huggingface"

Layout = Literal["bitlinear", "autobitlinear"]


def published(model: Any, layout: Layout) -> Published:
    """The config, tensors and files of a folder."""
    model = apart(model)
    config: DecoderConfig = model.config
    writer = _Writer(model, layout)
    tensors = dict(writer.tensors())
    # What a newer file says of rope in one key is written in two; remote code is not needed.
    replaced = ("quantization_config", "rope_parameters", "auto_map")
    content = {k: v for k, v in model.origin.config.items() if k not in replaced}
    content |= _content(config, model.origin.config)
    if writer.packed:
        content["quantization_config"] = writer.quantization_config()
    metadata = {"format": "pt"}
    if writer.packed:
        metadata[ROUNDING] = config.activation_rounding
    else:
        metadata[FLOATS] = "as they are"
    if writer.scales:
        metadata[SCALES] = json.dumps(writer.scales, sort_keys=True)
    return Published(content, tensors, metadata, model.origin.files(model.text))


class _Writer:
    """Every tensor by its published name, made when it is written."""

    def __init__(self, model: Any, layout: Layout):
        self.model, self.layout, self.config = model, layout, model.config
        self.packed: list[str] = []
        self.floats: list[str] = []
        self.on_grid: list[str] = []
        self.scales: dict[str, str] = {}
        self.dtype = np.dtype(self.config.param_dtype)

    def tensors(self) -> Iterator[tuple[str, Lazy]]:
        """Names and what makes each array; what cannot be written is refused here."""
        self._refuse()
        yield "model.embed_tokens.weight", self._table(self.model.embed.embedding.get_value())
        for path, name, n_in, n_out, bias in _names.projections(self.config):
            projection = self._at(path)
            yield from self._linear(name, projection.linear, n_in, n_out, bias)
            if projection.norm is not None:
                norm = f"{name}.rms_norm.weight"
                yield norm, self._floats(norm, projection.norm.scale.get_value())
        for path, name, _ in _names.norms(self.config):
            norm = f"{name}.weight"
            yield norm, self._floats(norm, self._at(path).scale.get_value())
        if self.model.head is not None:
            sizes = self.config.width, self.config.vocabulary
            yield from self._linear("lm_head", self.model.head, *sizes, False)
        self._refuse_mixtures()

    def _at(self, path: str) -> Any:
        node = self.model
        for part in path.split("/"):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        return node

    def _linear(
        self, name: str, layer: Any, n_in: int, n_out: int, bias: bool
    ) -> Iterator[tuple[str, Lazy]]:
        kernel: Any = layer.kernel.get_value()
        weights = getattr(layer, "weights", None)
        _require_published_kind(name, kernel, weights)
        _require_finite(f"{name}.weight", kernel)
        _require_no_rotation(name, kernel, weights)
        if isinstance(weights, TernaryConfig) and not isinstance(kernel, PackedTernary):
            kernel = pack(kernel, weights)
        if not isinstance(kernel, PackedTernary):
            self.floats.append(name)
            yield f"{name}.weight", self._turned(kernel)
        elif kernel.scale.size > 1 or self.config.activations is None:
            self.on_grid.append(name)
            yield f"{name}.weight", self._turned(kernel)
        else:
            self.packed.append(name)
            yield from self._codes(name, kernel, n_in, n_out)
        if bias:
            stored = self._floats(f"{name}.bias", layer.bias.get_value())
            if self.layout == "autobitlinear" and name in self.packed:
                stored = _over(stored.make(), np.float32(kernel.scale.reshape(())))
            yield f"{name}.bias", stored

    def _codes(
        self, name: str, kernel: PackedTernary, n_in: int, n_out: int
    ) -> Iterator[tuple[str, Lazy]]:
        if n_out % PER_BYTE:
            raise ValueError(
                f"{WHO}: {name} has {n_out} outputs, and this layout packs four to a byte. Choose "
                "a multiple of 4."
            )
        scale = np.asarray(kernel.scale, np.float32).reshape(1)
        if self.layout == "bitlinear":
            stored, exact = _reciprocal(scale[0])
            if not exact:
                self.scales[name] = float(scale[0]).hex()
            if not 0 < stored < np.inf:
                raise ValueError(
                    f"{WHO}: '{name}.weight_scale' would be {stored}, for 1/{scale[0]} is no "
                    "float32. Use layout='autobitlinear', which stores the scale itself."
                )
            scale = np.array([stored], np.float32)
        yield (
            f"{name}.weight",
            Lazy(
                (n_out // PER_BYTE, n_in),
                np.dtype(np.uint8),
                lambda: _codes.to_huggingface(np.asarray(kernel.codes), n_in),
            ),
        )
        yield f"{name}.weight_scale", Lazy((1,), scale.dtype, lambda: scale)

    def _floats(self, name: str, array: Any) -> Lazy:
        """A vector: in the model's dtype, unless that would change it."""
        _require_finite(name, array)
        wide = np.asarray(array)
        narrow = wide.astype(self.dtype)
        kept = narrow if np.array_equal(narrow.astype(wide.dtype), wide) else wide
        return Lazy(kept.shape, kept.dtype, lambda: kept)

    def _turned(self, kernel: Any) -> Lazy:
        """A kernel (in, out) as floats (out, in), in its own dtype if that holds its scales."""
        shape, dtype = tuple(kernel.shape), _dtype_of_floats(kernel)

        def make() -> np.ndarray:
            floats = kernel.dequantize(dtype) if isinstance(kernel, PackedTernary) else kernel
            return np.ascontiguousarray(np.asarray(floats).T)

        return Lazy(shape[::-1], dtype, make)

    def _table(self, table: Any) -> Lazy:
        kind = self.config.kernel("embedding")
        _require_published_kind("the embedding", table, kind)
        _require_finite("model.embed_tokens.weight", table)
        if kind is not None and not isinstance(table, PackedTernary):
            table = pack(table, kind, contracting_axes=-1)
        dtype = _dtype_of_floats(table)
        return Lazy(
            tuple(table.shape),
            dtype,
            lambda: np.asarray(table.dequantize(dtype) if kind is not None else table),
        )

    def _refuse(self) -> None:
        """Refuses flags that no architecture of transformers has together."""
        config = self.config
        if config.rope.kind == "factors":
            raise NotImplementedError(
                f"{WHO}: this decoder's rope divides by a list of factors (GGUF's rope_freqs), "
                "which transformers does not read. Replace config.rope by one of kind llama3."
            )
        family(config)

    def _refuse_mixtures(self) -> None:
        """Refuses what a quantization_config cannot say."""
        if self.packed and self.on_grid:
            raise NotImplementedError(
                f"{WHO}: {self.packed[0]} has one scale and {self.on_grid[0]} several, and no "
                "layout holds both. Quantise both alike."
            )
        if self.packed and self.config.activations != INT8:
            raise NotImplementedError(
                f"{WHO}: transformers runs packed kernels with int8 activations, and this decoder "
                f"has {self.config.activations}. Build it with activations=bj.ActivationConfig()."
            )
        if self.on_grid and self.config.activations is not None:
            raise NotImplementedError(
                f"{WHO}: transformers runs kernels with several scales as floats, weight-only, and "
                "this decoder quantises activations. Use one scale for a tensor, or "
                "activations=None."
            )
        if self.on_grid and self.config.projection_norm:
            raise NotImplementedError(
                f"{WHO}: transformers has norms inside packed kernels alone, and {self.on_grid[0]} "
                "is written as floats. Build the decoder with projection_norm=False."
            )

    def quantization_config(self) -> dict[str, Any]:
        """What transformers has to be told."""
        config = self.config
        left = ["lm_head", *(name for name in self.floats if name != "lm_head")]
        says: dict[str, Any] = {
            "quant_method": "bitnet",
            "linear_class": self.layout,
            "quantization_mode": "offline",
            "modules_to_not_convert": [name for name in left if name not in self.packed],
        }
        if config.projection_norm:
            says |= {"use_rms_norm": True, "rms_norm_eps": config.projection_norm_eps}
        return says


def _require_no_rotation(name: str, kernel: Any, weights: Any) -> None:
    """Refuses a kernel whose codes meet rotated inputs: no layer of transformers rotates them."""
    config = kernel.config if isinstance(kernel, PackedTernary) else weights
    if config is not None and config.rotation is not None:
        raise NotImplementedError(
            f"{WHO}: {name} has rotation={config.rotation!r}, and transformers does not rotate "
            "inputs. Save it with Decoder.save, or build the decoder without a rotation."
        )


def _dtype_of_floats(kernel: Any) -> np.dtype:
    """The dtype that a kernel is written in as floats: its own, or float32 for its scales."""
    own = np.dtype(kernel.dtype)
    if not isinstance(kernel, PackedTernary):
        return own
    scale = np.asarray(kernel.scale, np.float32)
    kept = np.array_equal(scale.astype(own).astype(np.float32), scale)
    return own if kept else np.dtype(np.float32)


def _require_published_kind(name: str, kernel: Any, weights: Any) -> None:
    """Refuses prepared and int8 kernels, and those of planes."""
    planes = max(getattr(part, "planes", 1) for part in (kernel, weights))
    if planes > 1:
        raise NotImplementedError(
            f"{WHO}: {name} is a sum of {planes} ternary planes, which no published layout holds. "
            "Save the decoder with Decoder.save, or build it with weights of one plane."
        )
    if not isinstance(kernel, (Prepared, PackedInt8)) and not isinstance(weights, Int8Config):
        return
    what = "is prepared" if isinstance(kernel, Prepared) else "is int8"
    remedy = (
        "Export the stored model, before bj.prepare"
        if isinstance(kernel, Prepared)
        else "Load or build the model with this kernel in float or ternary"
    )
    raise TypeError(f"{WHO}: {name} {what}, which no published layout holds. {remedy}.")


def _require_finite(name: str, array: Any) -> None:
    """Refuses a tensor with NaN or Inf, and scales that are none; one tensor at a time."""
    what = "NaN or Inf"
    if isinstance(array, PackedTernary):
        scale = np.asarray(array.scale)
        bad = np.count_nonzero(~(np.isfinite(scale) & (scale > 0)))
        what = "scales that are 0, negative, NaN or Inf"
    else:
        bad = int(jnp.count_nonzero(~jnp.isfinite(array)))
    if bad:
        raise ValueError(
            f"{WHO}: {name!r} has {bad} {what}, which no model computes with. Export a checkpoint "
            "from before they came; jax_debug_nans finds where they come from."
        )


def _reciprocal(scale: np.float32) -> tuple[np.float32, bool]:
    """A float32 whose reciprocal is a scale, and whether there is one."""
    with np.errstate(over="ignore"):  # of a subnormal scale
        near = np.float32(1) / scale
    for one in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))):
        if np.float32(1) / one == scale:
            return one, True
    return near, False


def _over(bias: np.ndarray, scale: np.float32) -> Lazy:
    """What times a scale is a bias, for autobitlinear multiplies both: float64 where it has to."""
    wide = bias.astype(np.float64) / np.float64(scale)
    narrow = wide.astype(np.float32)
    same = np.array_equal(narrow.astype(np.float64) * np.float64(scale), bias.astype(np.float64))
    kept = narrow if same else wide
    return Lazy(kept.shape, kept.dtype, lambda: kept)


def family(config: DecoderConfig) -> str:
    """The architecture of transformers, or of MiniCPM, that computes what a config describes."""
    what = []
    multiplied = any(getattr(config, f"{name}_multiplier") != 1.0 for name in _MULTIPLIERS)
    if config.sub_norms and config.query_key_norm:
        what.append("sub_norms with query_key_norm")
    if config.mlp_bias and (config.sub_norms or config.query_key_norm):
        what.append("mlp_bias with sub_norms or query_key_norm")
    if multiplied and (config.sub_norms or config.query_key_norm):
        what.append("MiniCPM's multipliers with sub_norms or query_key_norm")
    if what:
        raise NotImplementedError(
            f"{WHO}: no architecture of transformers has {' and '.join(what)}. Save the decoder "
            "with Decoder.save."
        )
    if config.sub_norms:
        return "BitNetForCausalLM"
    if multiplied:
        return "MiniCPMForCausalLM"
    return "Qwen3ForCausalLM" if config.query_key_norm else "LlamaForCausalLM"


_MULTIPLIERS = ("embedding", "residual", "logit")

_MODEL_TYPES = {
    "BitNetForCausalLM": "bitnet",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "MiniCPMForCausalLM": "minicpm",
}


def _content(config: DecoderConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``, but for the quantization; ``origin`` is the one that was loaded."""
    name = family(config)
    dtype = np.dtype(config.param_dtype).name
    content = {
        "architectures": [name],
        "model_type": _MODEL_TYPES[name],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _scaling(config.rope),
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if name in ("LlamaForCausalLM", "MiniCPMForCausalLM"):
        content["mlp_bias"] = config.mlp_bias
    if name == "MiniCPMForCausalLM":
        content |= _multipliers(config, origin)
    return content


def _multipliers(config: DecoderConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
    """MiniCPM's three: as they were loaded, or numbers that mean the same."""
    root, width = config.depth**0.5, config.width
    means = {
        "scale_emb": (config.embedding_multiplier, 1.0),
        "scale_depth": (config.residual_multiplier, root),
        "dim_model_base": (config.logit_multiplier, width),
    }
    says: dict[str, Any] = {"auto_map": origin["auto_map"]} if "auto_map" in origin else {}
    for key, (wanted, over) in means.items():
        loaded = origin.get(key)
        near = float(wanted * over)
        tried = [loaded, near, float(np.nextafter(near, 0.0)), float(np.nextafter(near, np.inf))]
        numbers = [x for x in tried if isinstance(x, (int, float)) and not isinstance(x, bool)]
        # Float32 is what a decoder multiplies by, should no float64 be the very number.
        says[key] = next((x for x in numbers if x / over == wanted), near)
        assert np.float32(says[key] / over) == np.float32(wanted)
    return says


def _scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    says: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        says["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        says |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.kind == "yarn":
        says |= {"beta_slow": rope.low, "beta_fast": rope.high, "truncate": rope.truncate}
        says["attention_factor"] = rope.magnitude
    return says
