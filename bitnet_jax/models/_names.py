"""Where each parameter of a decoder is in a published checkpoint.

Paths here are this library's, ``layers/0/attention/query``; names there are those of
transformers, ``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitnet_jax.models._decoder_config import DecoderConfig, projection_sizes

PROJECTIONS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}

_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}

_SUB_NORMS = {
    "attention/sub_norm": "self_attn.attn_sub_norm",
    "mlp/sub_norm": "mlp.ffn_sub_norm",
}

_QUERY_KEY_NORMS = {
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}

# What other publishers call the same tensors.
ALIASES = {
    "self_attn.inner_attn_ln": "self_attn.attn_sub_norm",  # 1bitLLM
    "mlp.ffn_layernorm": "mlp.ffn_sub_norm",
    "proj.norm": "proj.rms_norm",  # BitNet embedding models
}


def projections(config: DecoderConfig) -> Iterator[tuple[str, str, int, int, bool]]:
    """Path, name, lengths in and out, and whether there is a bias, of every projection."""
    sizes = projection_sizes(config)
    for i in range(config.depth):
        for path, name in PROJECTIONS.items():
            bias = config.attention_bias if path.startswith("attention") else config.mlp_bias
            yield f"layers/{i}/{path}", f"model.layers.{i}.{name}", *sizes[path], bias


def norms(config: DecoderConfig) -> Iterator[tuple[str, str, int]]:
    """Path, name and length of every norm outside projections."""
    own = dict(_NORMS)
    if config.query_key_norm:
        own |= _QUERY_KEY_NORMS
    if config.sub_norms:
        own |= _SUB_NORMS
    sizes = {"attention/sub_norm": config.heads * config.head_dim, "mlp/sub_norm": config.hidden}
    sizes |= dict.fromkeys(_QUERY_KEY_NORMS, config.head_dim)
    for i in range(config.depth):
        for path, name in own.items():
            yield f"layers/{i}/{path}", f"model.layers.{i}.{name}", sizes.get(path, config.width)
    yield "norm", "model.norm", config.width
