"""Published models of other codebases, tiny, as functions of their parameters and inputs."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PACKAGES = ("transformers", "diffusers", "equinox", "haiku")
FOUND = all(map(importlib.util.find_spec, PACKAGES))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 64, "max_position_embeddings": 32}


class Case(NamedTuple):
    """A model: ``fn(params, *inputs)`` returns one float array; ``module``: of linen."""

    fn: Callable[..., jax.Array]
    params: Any
    inputs: tuple[Any, ...]
    module: Any = None


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


IDS = jnp.asarray(np.random.default_rng(0).integers(2, 60, (2, 12)), jnp.int32)
MASK = jnp.ones_like(IDS)
POSITIONS = jnp.broadcast_to(jnp.arange(12), (2, 12))
TOKENS = (IDS, MASK, POSITIONS)


def linen(module: Any, params: Any, *inputs: Any, method: Any = None) -> Case:
    """A linen module, by its ``apply``; models of several outputs answer with the first."""

    def fn(params: Any, *inputs: Any) -> jax.Array:
        out = module.apply({"params": params}, *inputs, method=method)
        return jax.tree.leaves(out[0] if isinstance(out, tuple) or hasattr(out, "keys") else out)[0]

    return Case(fn, params, inputs, module if method is None else None)


def of_transformers(model: Any, *inputs: Any, method: Any = None) -> Case:
    return linen(model.module, model.params, *inputs, method=method)


def gpt2() -> Case:
    import transformers as hf

    config = hf.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64)
    return of_transformers(hf.FlaxGPT2LMHeadModel(config), *TOKENS)


def bert() -> Case:
    import transformers as hf

    config = hf.BertConfig(**SIZES, **TEXT, intermediate_size=64)
    types = jnp.zeros_like(IDS)
    return of_transformers(hf.FlaxBertForMaskedLM(config), IDS, MASK, types, POSITIONS, None)


def llama() -> Case:
    import transformers as hf

    config = hf.LlamaConfig(**SIZES, **TEXT, intermediate_size=64)
    return of_transformers(hf.FlaxLlamaForCausalLM(config), *TOKENS)


def mistral() -> Case:
    import transformers as hf

    config = hf.MistralConfig(**SIZES, **TEXT, intermediate_size=64, num_key_value_heads=1)
    return of_transformers(hf.FlaxMistralForCausalLM(config), *TOKENS)


def gemma() -> Case:
    import transformers as hf

    config = hf.GemmaConfig(
        **SIZES, **TEXT, intermediate_size=64, num_key_value_heads=1, head_dim=16
    )
    return of_transformers(hf.FlaxGemmaForCausalLM(config), *TOKENS)


def _encoder_decoder() -> dict[str, int]:
    return {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 64,
    }


def bart() -> Case:
    import transformers as hf

    config = hf.BartConfig(**_encoder_decoder(), max_position_embeddings=32)
    model = hf.FlaxBartForConditionalGeneration(config)
    return of_transformers(model, IDS, MASK, IDS, MASK, POSITIONS, POSITIONS)


def _whisper() -> Any:
    import transformers as hf

    special = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    config = hf.WhisperConfig(
        **_encoder_decoder(),
        **{name: i for i, name in enumerate(special)},
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
    )
    return hf.FlaxWhisperForConditionalGeneration(config, input_shape=(1, 8, 32))


def whisper() -> Case:
    return of_transformers(_whisper(), normal(2, 8, 32), *TOKENS)


def whisper_encode() -> Case:
    """By ``method=`` with a function of the module, as transformers' ``encode`` does."""
    method = lambda module, x: module._get_encoder_module()(x)  # noqa: E731
    return of_transformers(_whisper(), normal(2, 8, 32), method=method)


def vit() -> Case:
    import transformers as hf

    config = hf.ViTConfig(**SIZES, intermediate_size=64, image_size=16, patch_size=4)
    return of_transformers(hf.FlaxViTForImageClassification(config), normal(2, 16, 16, 3))


def unet() -> Case:
    from diffusers import FlaxUNet2DConditionModel

    model = FlaxUNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    params = jax.jit(model.init_weights)(jax.random.key(0))
    return linen(model, params, normal(2, 4, 8, 8), jnp.ones((2,), jnp.int32), normal(2, 5, 16))


def autoencoder() -> Case:
    from diffusers import FlaxAutoencoderKL

    model = FlaxAutoencoderKL(sample_size=16, block_out_channels=(32,), norm_num_groups=8)
    params = jax.jit(model.init_weights)(jax.random.key(0))
    return linen(model, params, normal(1, 3, 16, 16))


def _of_equinox(model: Any, call: Callable[..., jax.Array], x: jax.Array) -> Case:
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Case(
        lambda params, x: jax.vmap(call, (None, 0))(eqx.combine(params, static), x), params, (x,)
    )


def equinox_mlp() -> Case:
    import equinox as eqx

    model = eqx.nn.MLP(16, 4, 32, 2, key=jax.random.key(0))
    return _of_equinox(model, lambda model, x: model(x), normal(8, 16))


def equinox_attention() -> Case:
    import equinox as eqx

    model = eqx.nn.MultiheadAttention(2, 32, key=jax.random.key(0))
    return _of_equinox(model, lambda model, x: model(x, x, x), normal(2, 6, 32))


def equinox_convolutions() -> Case:
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 2)
    layers = [eqx.nn.Conv2d(3, 8, 3, key=keys[0]), eqx.nn.Lambda(jax.nn.relu)]
    layers.append(eqx.nn.Conv2d(8, 8, 3, groups=2, key=keys[1]))
    return _of_equinox(eqx.nn.Sequential(layers), lambda m, x: m(x), normal(2, 3, 9, 9))


def _of_haiku(forward: Callable[..., jax.Array], x: jax.Array) -> Case:
    import haiku as hk

    made = hk.without_apply_rng(hk.transform(forward))
    return Case(made.apply, made.init(jax.random.key(0), x), (x,))


def haiku_mlp() -> Case:
    import haiku as hk

    return _of_haiku(lambda x: hk.nets.MLP([32, 32, 4])(x), normal(8, 16))


def haiku_transformer() -> Case:
    import haiku as hk

    def forward(x: jax.Array) -> jax.Array:
        init = hk.initializers.VarianceScaling(1.0)
        for _ in range(2):
            norm = functools.partial(hk.LayerNorm, -1, True, True)
            h = norm()(x)
            x = x + hk.MultiHeadAttention(2, 16, w_init=init)(h, h, h)
            x = x + hk.nets.MLP([64, 32])(norm()(x))
        return hk.Linear(4)(x)

    return _of_haiku(forward, normal(2, 6, 32))


CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "GPT-2": ("transformers", gpt2),
    "BERT": ("transformers", bert),
    "Llama": ("transformers", llama),
    "Mistral": ("transformers", mistral),
    "Gemma": ("transformers", gemma),
    "BART": ("transformers", bart),
    "Whisper": ("transformers", whisper),
    "Whisper, encode": ("transformers", whisper_encode),
    "ViT": ("transformers", vit),
    "UNet2DCondition": ("diffusers", unet),
    "AutoencoderKL": ("diffusers", autoencoder),
    "MLP": ("equinox", equinox_mlp),
    "MultiheadAttention": ("equinox", equinox_attention),
    "Conv2d, groups": ("equinox", equinox_convolutions),
    "nets.MLP": ("haiku", haiku_mlp),
    "transformer": ("haiku", haiku_transformer),
}
