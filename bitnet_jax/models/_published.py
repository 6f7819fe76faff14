"""``config.json`` of a published checkpoint as a `DecoderConfig`, and how its kernels are stored.

Three stored forms are told apart by ``quantization_config`` and by nothing else::

    online     float weights, quantised where they are used: s = mean|W|
    offline    uint8 codes, and in weight_scale ...
      autobitlinear   ... s, which outputs are multiplied by
      bitlinear       ... 1/s, which outputs are divided by; also where linear_class is missing

A key that is unknown, or unknown in value or type, is refused by its name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._keys import ARITHMETIC, NEUTRAL, PASSING, WHO, Keys, refuse
from bitnet_jax.models._rope import Rope

Stored = Literal["float", "online", "multiply", "divide"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What an architecture leaves unsaid in its config, and what it is made of."""

    defaults: Mapping[str, Any]
    flags: Mapping[str, Any]
    online: bool = False  # quantised by its own code, without a quantization_config
    latent: bool = False  # never meant to run unquantised


_LLAMA = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_BITNET = _LLAMA | {
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}

FAMILIES = {
    "BitNetForCausalLM": Family(_BITNET, {"sub_norms": True}, latent=True),
    "BitnetForCausalLM": Family(_LLAMA, {"sub_norms": True}, online=True, latent=True),
    "LlamaForCausalLM": Family(_LLAMA, {"sub_norms": False}),
    "Qwen3ForCausalLM": Family(
        _LLAMA | {"head_dim": 128, "max_position_embeddings": 32768},
        {"sub_norms": False, "query_key_norm": True},
    ),
    # The same without its head: an encoder of texts.
    "Qwen3Model": Family(
        _LLAMA | {"head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": True},
        {"sub_norms": False, "query_key_norm": True},
    ),
    "MiniCPMForCausalLM": Family(_LLAMA | {"tie_word_embeddings": True}, {"sub_norms": False}),
}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu2": "relu2"}

# Keys in the metadata of exported files: exact scales; whether activations are rounded in
# float32 or in the input's dtype; that weights without a quantization_config run as they are.
SCALES = "bitnet_jax.scales"
ROUNDING = "bitnet_jax.activation_rounding"
FLOATS = "bitnet_jax.floats"


def architecture(content: Mapping[str, Any]) -> tuple[str, Family]:
    """The family that a config names."""
    names = content.get("architectures")
    known = ", ".join(FAMILIES)
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        refuse("architectures", names, f"a list with one of {known}")
    return names[0], FAMILIES[names[0]]


def decoder_config(content: Mapping[str, Any]) -> DecoderConfig:
    """The shape of the decoder that a config describes; kernels are not looked at."""
    name, family = architecture(content)
    keys = Keys(content, family.defaults, "config.json")
    activation = keys.get("hidden_act", str)
    if activation not in _ACTIVATIONS:
        refuse("hidden_act", activation, f"one of {', '.join(_ACTIVATIONS)}")
    _refuse_what_is_left_out(content, family)
    width, heads = keys.get("hidden_size", int), keys.get("num_attention_heads", int)
    fields: dict[str, Any] = {
        "vocabulary": keys.get("vocab_size", int),
        "width": width,
        "hidden": keys.get("intermediate_size", int),
        "depth": keys.get("num_hidden_layers", int),
        "heads": heads,
        "kv_heads": keys.get("num_key_value_heads", int, heads),
        "head_dim": keys.get("head_dim", int, None),
        "context": keys.get("max_position_embeddings", int),
        "rope": rope(content, family.defaults["rope_theta"]),
        "activation": _ACTIVATIONS[activation],
        "attention_bias": keys.get("attention_bias", bool),
        "mlp_bias": keys.get("mlp_bias", bool),
        "tied": keys.get("tie_word_embeddings", bool),
        "norm_eps": keys.get("rms_norm_eps", float),
        **family.flags,
    }
    if name == "MiniCPMForCausalLM":
        fields |= _multipliers(keys, width, fields["depth"])
    config = DecoderConfig(**fields)
    neutral = {**NEUTRAL, "kv_channels": config.head_dim}
    keys.refuse_rest(PASSING | _READ_ELSEWHERE, neutral, ARITHMETIC)
    return config


def _multipliers(keys: Keys, width: int, depth: int) -> dict[str, float]:
    """MiniCPM's three: of embeddings, of branches, of the head's input."""
    return {
        "embedding_multiplier": keys.get("scale_emb", float, 1.0),
        "residual_multiplier": keys.get("scale_depth", float, 1.0) / depth**0.5,
        "logit_multiplier": keys.get("dim_model_base", float, 1.0) / width,
    }


_READ_ELSEWHERE = {
    "layer_types",
    "num_experts",
    "num_local_experts",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
}


def _refuse_what_is_left_out(content: Mapping[str, Any], family: Family) -> None:
    """Refuses what a config may ask for and no decoder here does."""
    if content.get("use_sliding_window"):
        refuse("use_sliding_window", True, "false: sliding windows are not implemented")
    window, context = content.get("sliding_window"), content.get("max_position_embeddings")
    # Qwen3 writes the window that it does not use.
    unused = "use_sliding_window" in content or family.flags.get("query_key_norm")
    if window and not unused and not (type(window) is type(context) and window >= context):
        refuse("sliding_window", window, "null: sliding windows are not implemented")
    kinds = content.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        refuse("layer_types", kinds, "full_attention everywhere")
    if content.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        refuse("partial_rotary_factor", content["partial_rotary_factor"], "1")
    if content.get("num_experts") or content.get("num_local_experts"):
        refuse("num_experts", content.get("num_experts"), "absent: experts are not implemented")


_ROPE_NOTES = ("finetuned", "rope_theta", "rope_type", "type")
_ROPE_NEUTRAL: dict[str, Any] = dict.fromkeys(
    (
        "attention_factor",
        "attn_factor",
        "extrapolation_factor",
        "factor",
        "mscale",
        "mscale_all_dim",
        "partial_rotary_factor",
    ),
    1,
)


def rope(content: Mapping[str, Any], default_theta: float) -> Rope:
    """Positions, from ``rope_parameters`` or ``rope_scaling``, and ``rope_theta``."""
    found = [
        _rope(content, where, default_theta)
        for where in ("rope_parameters", "rope_scaling")
        if content.get(where)
    ]
    if len({*found}) > 1:
        refuse("rope_scaling", content["rope_scaling"], "absent, or say what rope_parameters says")
    return found[0] if found else _rope(content, "rope_scaling", default_theta)


def _rope(content: Mapping[str, Any], where: str, default_theta: float) -> Rope:
    """Positions as the object under one key says; the key may be absent."""
    given = content.get(where) or {}
    if not isinstance(given, dict):
        refuse(where, given, "an object")
    keys = Keys(given, {}, where)
    theta = given.get("rope_theta", content.get("rope_theta"))
    theta = default_theta if theta is None else theta
    kind = given.get("rope_type", given.get("type", "default"))
    if "type" in given and given["type"] != kind:
        refuse(f"{where}.type", given["type"], f"absent, or rope_type, {kind!r}")
    if type(theta) not in (int, float):
        refuse("rope_theta", theta, "a number")
    context = keys.get("original_max_position_embeddings", int, None)
    context = context or content.get("max_position_embeddings", 0)
    made = _rope_of_kind(kind, keys, float(theta), context)
    keys.refuse_rest(_ROPE_NOTES, _ROPE_NEUTRAL)
    return made


def _rope_of_kind(kind: Any, keys: Keys, theta: float, context: int) -> Rope:
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind="linear", factor=keys.get("factor", float))
    if kind == "llama3":
        return Rope(
            theta,
            kind="llama3",
            factor=keys.get("factor", float),
            original_context=context,
            low=keys.get("low_freq_factor", float),
            high=keys.get("high_freq_factor", float),
        )
    if kind != "yarn":
        refuse(f"{keys.where}.rope_type", kind, "one of default, linear, llama3, yarn")
    return _yarn(keys, theta, context)


def _yarn(keys: Keys, theta: float, context: int) -> Rope:
    plain = Rope(
        theta,
        kind="yarn",
        factor=keys.get("factor", float),
        original_context=context,
        low=keys.get("beta_slow", float, 1.0),
        high=keys.get("beta_fast", float, 32.0),
        attention_factor=keys.get("attention_factor", float, None),
        truncate=keys.get("truncate", bool, True),
    )
    a, b = keys.get("mscale", float, None), keys.get("mscale_all_dim", float, None)
    if plain.attention_factor is not None or not (a and b):
        return plain
    step = plain.magnitude - 1.0  # 0.1 log(factor)
    return dataclasses.replace(plain, attention_factor=(a * step + 1.0) / (b * step + 1.0))


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a checkpoint says that its linear layers are stored.

    Attributes:
      stored: the form of those that are converted; "float": none is.
      left: patterns of modules that are not converted; None: only the head is not.
      norm: whether each converted layer has a norm inside.
      norm_eps: of that norm.
      said: by which key it was decided, for the report.
    """

    stored: Stored
    left: tuple[str, ...] | None = None
    norm: bool = False
    norm_eps: float = 1e-6
    said: str = "no quantization_config"

    def of(self, module: str) -> Stored:
        """The form of one linear layer, by transformers' rule for its name."""
        left = ("lm_head",) if self.left is None else self.left
        return "float" if any(_matches(key, module) for key in left) else self.stored


def _matches(key: str, module: str) -> bool:
    """From the start to a dot (or the end) as a regular expression, or as a suffix."""
    try:
        from_start = re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        from_start = False
    return from_start or module.endswith(key)


def quantization(content: Mapping[str, Any], asked: Mapping[str, Any] | None) -> Quantization:
    """What a config, or the caller in its place, says of the linear layers."""
    name, family = architecture(content)
    given = content.get("quantization_config") if asked is None else asked
    if given is None and family.online:
        return Quantization("online", said=f"{name} quantises by itself")
    if given is None and family.latent:
        raise ValueError(
            f"{WHO}: config.json has no `quantization_config`, and {name} is not meant to run "
            "from unquantised weights. Pass what its publisher says, for float weights "
            "quantization_config={'quant_method': 'bitnet', 'linear_class': 'autobitlinear', "
            "'quantization_mode': 'online'}, or {} to run them as they are."
        )
    if not given:
        return Quantization("float")
    where = "quantization_config"
    if not isinstance(given, Mapping):
        refuse(where, given, "an object")
    keys = Keys(given, {}, where)
    method = keys.get("quant_method", str)
    if method != "bitnet":
        refuse(f"{where}.quant_method", method, "bitnet")
    linear = keys.get("linear_class", str, "bitlinear")
    mode = keys.get("quantization_mode", str, "offline")
    if linear not in ("bitlinear", "autobitlinear"):
        refuse(f"{where}.linear_class", linear, "bitlinear or autobitlinear")
    if mode not in ("online", "offline"):
        refuse(f"{where}.quantization_mode", mode, "online or offline")
    if linear == "bitlinear" and mode == "online":
        refuse(f"{where}.quantization_mode", mode, "offline for linear_class bitlinear")
    left = given.get("modules_to_not_convert")
    if left is not None and not (
        isinstance(left, (list, tuple)) and all(isinstance(one, str) for one in left)
    ):
        refuse(f"{where}.modules_to_not_convert", left, "a list of names")
    offline: Stored = "divide" if linear == "bitlinear" else "multiply"
    declared = linear if "linear_class" in given else "no linear_class, so bitlinear"
    found = Quantization(
        stored="online" if mode == "online" else offline,
        left=None if left is None else tuple(left),
        norm=keys.get("use_rms_norm", bool, False),
        norm_eps=keys.get("rms_norm_eps", float, 1e-6),
        said=f"{declared}, {mode}",
    )
    keys.refuse_rest(("modules_to_not_convert",), {})
    return found
