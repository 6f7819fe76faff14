"""Checkpoints and requests that are refused, each with what is wrong and what to do."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import Checkpoint, byte_tokenizer

import bitnet_jax as bj
from bitnet_jax.models import _names
from bitnet_jax.models._template import render
from bitnet_jax.models._template_limits import TemplateError

ONE = {"num_hidden_layers": 1}
UP = "model.layers.0.mlp.up_proj"
GROUPS_OF_48 = bj.ActivationConfig(group=48)


def refused(folder, error, match, **options):
    with pytest.raises(error, match=match) as raised:
        bj.models.Decoder.from_pretrained(folder, **options)
    assert str(raised.value).startswith("from_pretrained: ")
    return str(raised.value)


# What a config may hold, and what the refusal says.
KEYS = {
    "architectures": (["GPT2LMHeadModel"], "`architectures` is .*GPT2"),
    "hidden_act": ("gelu", "`hidden_act` is 'gelu', and must be one of silu, swish, relu2"),
    "hidden_size": ("32", "`hidden_size` is '32', and must be a int"),
    "rms_norm_eps": (True, "`rms_norm_eps`"),
    "rope_scaling": ({"rope_type": "longrope"}, "`rope_scaling.rope_type` is 'longrope'"),
    "rope_theta": ("big", "`rope_theta`"),
    "use_sliding_window": (True, "sliding"),
    "layer_types": (["sliding_attention"], "`layer_types`"),
    "partial_rotary_factor": (0.5, "`partial_rotary_factor`"),
    "num_local_experts": (8, "experts"),
    "vocab_size": (None, "config.json has no `vocab_size`"),
    "sliding_window": (32, "`sliding_window` is 32, and must be null"),
    "final_logit_softcapping": (30.0, "in config.json `final_logit_softcapping` is 30.0, which"),
    "attn_logit_softcapping": (50, "`attn_logit_softcapping`"),
    "logit_scale": (0.5, "`logit_scale`"),
    "scale_emb": (12, "`scale_emb` is 12"),  # of another family
    "attention_multiplier": (1.0, "`attention_multiplier`"),  # in place of 1 / sqrt(head_dim)
    "is_causal": (False, "`is_causal` is False"),
    "input_bits": (4, "`input_bits` is 4"),
    "kv_channels": (4, "`kv_channels` is 4"),
    "experts_per_token": (2, "`experts_per_token` is 2"),
    "no_rope_layers": ([1, 0], "`no_rope_layers`"),
    "rope_parameters": ({"rope_type": "yarn", "attn_scale": 2.0, "factor": 2.0}, "`attn_scale`"),
}
SCALINGS = {
    "factor of a kind without one": ({"factor": 8.0}, "in rope_scaling `factor` is 8.0"),
    "a part of each head": ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is 0.5"),
    "yarn's key for linear": (
        {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5},
        "`attention_factor` is 1.5",
    ),
    "two kinds": ({"rope_type": "default", "type": "linear", "factor": 2.0}, "rope_scaling.type"),
    "one for each kind of layer": ({"full_attention": {"rope_theta": 1.0}}, "`full_attention`"),
}
SAYS = {
    "quant_method": ("gptq", "`quantization_config.quant_method` is 'gptq'"),
    "linear_class": ("bitlinear2", "`quantization_config.linear_class` is 'bitlinear2'"),
    "quantization_mode": ("later", "`quantization_config.quantization_mode` is 'later'"),
    "modules_to_not_convert": ("lm_head", "`quantization_config.modules_to_not_convert`"),
    "use_rms_norm": ("yes", "`use_rms_norm` is 'yes', and must be a bool"),
    "group_size": (128, "in quantization_config `group_size` is 128, which this library"),
}
# What transformers 4 and 5 write by default for these families, and what publishers add.
ORDINARY = {
    "a_note_of_the_publisher": [1],
    "_name_or_path": "x/y",
    "_attn_implementation_autoset": True,
    "activation": "swiglu",
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"},
    "cache_implementation": "dynamic",
    "dtype": "bfloat16",
    "final_logit_softcapping": None,
    "id2label": {"0": "LABEL_0"},
    "initializer_range": 0.02,
    "input_bits": 8,
    "is_causal": True,
    "is_llama_config": True,
    "kv_channels": 8,
    "label2id": {"LABEL_0": 0},
    "layer_types": ["full_attention"],
    "logit_scale": 1.0,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "llama",
    "num_experts": 0,
    "pad_token": "<pad>",
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "qk_layernorm": False,
    "repetition_penalty": 1.0,
    "rope_interleaved": False,
    "sliding_window": 4096,
    "temperature": 0.6,
    "torch_dtype": "float16",
    "transformers.js_config": {"dtype": "q4"},
    "transformers_version": "5.24.0",
    "unsloth_fixed": True,
    "use_cache": True,
    "use_sliding_window": False,
    "weight_bits": 1,
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_a_config(key, tmp_path):
    value, match = KEYS[key]
    checkpoint = Checkpoint(**ONE)
    checkpoint.config[key] = value
    refused(checkpoint.write(tmp_path), ValueError, match)


@pytest.mark.parametrize("key", SAYS)
def test_keys_of_a_quantization_config(key, tmp_path):
    value, match = SAYS[key]
    checkpoint = Checkpoint(**ONE, quantization_config={key: value})
    refused(checkpoint.write(tmp_path), ValueError, match)


@pytest.mark.parametrize("case", SCALINGS)
def test_keys_of_a_rope(case, tmp_path):
    value, match = SCALINGS[case]
    refused(Checkpoint(**ONE, rope_scaling=value).write(tmp_path), ValueError, match)


def test_two_ropes_that_differ(tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0}
    both = Checkpoint(**ONE, rope_scaling=linear)
    both.config["rope_parameters"] = dict(linear)
    bj.models.Decoder.from_pretrained(both.write(tmp_path / "a"))
    both.config["rope_parameters"]["factor"] = 4.0
    refused(both.write(tmp_path / "b"), ValueError, "`rope_scaling` is .*what rope_parameters says")


def test_unknown_keys_are_named_together(tmp_path):
    checkpoint = Checkpoint(**ONE)
    checkpoint.config |= {"b_scale": 2, "a_scale": [3]}
    said = refused(checkpoint.write(tmp_path), ValueError, r"`a_scale` is \[3\], `b_scale` is 2, ")
    assert said.endswith("If it does not, remove it from config.json.")


def test_ordinary_keys_change_nothing(tmp_path):
    plain = Checkpoint(**ONE)
    want = bj.models.Decoder.from_pretrained(plain.write(tmp_path / "a")).config
    plain.config = ORDINARY | plain.config
    rope = {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 1.0}
    plain.config["rope_parameters"] = rope
    plain.config["quantization_config"] |= {"_load_in_4bit": False, "rms_norm_eps": 1e-6}
    assert bj.models.Decoder.from_pretrained(plain.write(tmp_path / "b")).config == want


def test_online_needs_autobitlinear(tmp_path):
    says = {"linear_class": "bitlinear", "quantization_mode": "online"}
    checkpoint = Checkpoint(**ONE, stored="online", quantization_config=says)
    refused(checkpoint.write(tmp_path), ValueError, "offline for linear_class bitlinear")


def test_what_the_config_says_and_the_file_holds_must_agree(tmp_path):
    """Every pairing that transformers runs in silence, or fails at."""
    floats, packed = Checkpoint(**ONE, stored="online"), Checkpoint(**ONE)
    floats.config["quantization_config"] = packed.config["quantization_config"]
    match = "'model.layers.0.self_attn.q_proj.weight' is float32, and the config .offline. means"
    refused(floats.write(tmp_path / "a"), ValueError, match)
    packed.config["quantization_config"]["quantization_mode"] = "online"
    refused(packed.write(tmp_path / "b"), ValueError, "is uint8, and the config .*means floats")
    del packed.config["quantization_config"]
    refused(packed.write(tmp_path / "c"), ValueError, "no `quantization_config`")
    llama = Checkpoint("LlamaForCausalLM", **ONE)
    del llama.config["quantization_config"]
    refused(llama.write(tmp_path / "d"), ValueError, "is uint8")
    asked = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    bj.models.Decoder.from_pretrained(tmp_path / "d", quantization_config=asked)


def test_tensors_that_a_config_forgets(tmp_path):
    normed = Checkpoint("LlamaForCausalLM", **ONE, quantization_config={"use_rms_norm": True})
    normed.config["quantization_config"]["use_rms_norm"] = False
    refused(normed.write(tmp_path / "a"), ValueError, "7 tensors are not in a decoder.*rms_norm")
    biased = Checkpoint("LlamaForCausalLM", **ONE, attention_bias=True)
    biased.config["attention_bias"] = False
    refused(biased.write(tmp_path / "b"), ValueError, "k_proj.bias")
    missing = Checkpoint(**ONE)
    del missing.tensors[f"{UP}.weight_scale"]
    refused(missing.write(tmp_path / "c"), ValueError, "has no .*up_proj.weight_scale")


def test_a_head_that_is_not_the_embedding(tmp_path):
    checkpoint = Checkpoint(**ONE, tie_word_embeddings=False)
    checkpoint.config["tie_word_embeddings"] = True
    refused(checkpoint.write(tmp_path / "a"), ValueError, "`tie_word_embeddings` is true")
    tied = Checkpoint(**ONE)
    tied.tensors["lm_head.weight"] = tied.tensors["model.embed_tokens.weight"].copy()
    bj.models.Decoder.from_pretrained(tied.write(tmp_path / "b"))
    tied.config["quantization_config"]["modules_to_not_convert"] = []
    refused(tied.write(tmp_path / "c"), ValueError, "lm_head")


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("stored", ["multiply", "divide"])
def test_scales(stored, value, tmp_path):
    checkpoint = Checkpoint(**ONE, stored=stored)
    checkpoint.tensors[f"{UP}.weight_scale"][0] = value
    refused(checkpoint.write(tmp_path), ValueError, "up_proj.weight_scale' (is|has)")


def test_codes_shapes_and_floats(tmp_path):
    three = Checkpoint(**ONE)
    three.tensors[f"{UP}.weight"][0, 0] |= 3
    refused(three.write(tmp_path / "a"), ValueError, "up_proj.weight' holds the code 3 in 1 bytes")
    short = Checkpoint(**ONE)
    short.tensors[f"{UP}.weight"] = short.tensors[f"{UP}.weight"][:-1]
    refused(short.write(tmp_path / "b"), ValueError, r"has shape \(11, 32\).*\(12, 32\)")
    odd = Checkpoint(**ONE, intermediate_size=46)
    refused(odd.write(tmp_path / "c"), ValueError, "has 46 outputs, which .* cannot pack")
    broken = Checkpoint(**ONE, stored="online")
    broken.tensors[f"{UP}.weight"][0, 0] = np.nan
    refused(broken.write(tmp_path / "d"), ValueError, "up_proj.weight' has 1 NaN or Inf")


@pytest.mark.parametrize(("value", "what"), [(0.0, "all zero"), (0.5, "all the same")])
def test_degenerate_weights_are_named(value, what, tmp_path):
    checkpoint = Checkpoint("LlamaForCausalLM", **ONE, stored="online")
    checkpoint.tensors[f"{UP}.weight"][:] = value
    with pytest.warns(UserWarning, match=f"up_proj' are {what}"):
        model = bj.models.Decoder.from_pretrained(checkpoint.write(tmp_path))
    assert {row.path: row.why for row in model.report.rows}["layers/0/mlp/up"] == what


def test_files(tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "no folder")
    folder = Checkpoint(**ONE).write(tmp_path / "a", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, FileNotFoundError, "has no model-00002-of-00002.safetensors, a shard")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    refused(folder, bj.io.FormatError, "no file of the folder")
    index.write_text("{")
    refused(folder, bj.io.FormatError, "is no JSON")
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, FileNotFoundError, "only pytorch_model.bin, which")
    (folder / "config.json").unlink()
    whole = Checkpoint(**ONE).write(tmp_path / "b")
    (whole / "config.json").unlink()
    refused(whole, FileNotFoundError, "has no config.json")
    cut = Checkpoint(**ONE).write(tmp_path / "c") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    refused(tmp_path / "c", bj.io.FormatError, "truncated")


def test_an_index_that_names_what_a_shard_does_not_hold(tmp_path):
    folder = Checkpoint(**ONE).write(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(folder, bj.io.FormatError, "does not hold 'ghost'")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return bj.models.Decoder.from_pretrained(Checkpoint(**ONE).write(folder))


@pytest.mark.parametrize(
    ("prompt", "options", "error", "match"),
    [
        ("text", {}, ValueError, "no tokenizer.*Pass token ids"),
        ([{"role": "user", "content": "x"}], {}, ValueError, "no chat template"),
        ([], {}, TypeError, "`prompt` must be"),
        ([[]], {}, TypeError, "`prompt` must be"),
        (3, {}, TypeError, "`prompt` must be"),
        ([[1], "a"], {}, ValueError, "no tokenizer"),
        ([40], {}, ValueError, "token 40 is not in the model's vocabulary of 40"),
        ([-1], {}, ValueError, "token -1"),
        ([1] * 60, {"max_new_tokens": 10}, ValueError, "context 64.*at most 4 tokens"),
        ([1], {"max_new_tokens": 0}, ValueError, "`max_new_tokens`"),
        ([1], {"temperature": -1}, ValueError, "`temperature`"),
        ([1], {"top_k": 0}, ValueError, "`top_k`"),
        ([1], {"top_p": 1.5}, ValueError, "`top_p`"),
        ([1], {"min_p": 0}, ValueError, "`min_p`"),
        ([1], {"repetition_penalty": 0.0}, ValueError, "`repetition_penalty`"),
        ([1], {"stop": ""}, TypeError, "`stop`"),
        ([1], {"stop": "x"}, ValueError, "`stop` has the text 'x', .*no tokenizer.* token ids"),
        ([1], {"cache_size": "8"}, ValueError, "`cache_size` must be an integer >= 1"),
        ([1], {"cache_size": 10, "max_new_tokens": 4}, ValueError, "19 slots are needed"),
        ([1], {"cache_size": 99.0}, ValueError, "`cache_size` must be an integer"),
        ([1], {"cache_dtype": "int32"}, ValueError, "`cache_dtype` must be .* got 'int32'"),
        ([1], {"cache_dtype": "junk"}, ValueError, "`cache_dtype` must be"),
        ([1], {"max_new_tokens": True}, ValueError, "`max_new_tokens`"),
        ([1], {"stop": True}, TypeError, "`stop`"),
        ([1], {"stop": [3, 40]}, ValueError, "`stop` has the token 40"),
        ([1, 2.5], {}, TypeError, "`prompt` must be"),
        ([1, "a"], {}, TypeError, "`prompt` must be"),
        ([1, True], {}, TypeError, "`prompt` must be"),
        (b"text", {}, TypeError, "`prompt` must be"),
    ],
)
def test_requests(model, prompt, options, error, match):
    with pytest.raises(error, match=match):
        model.generate(prompt, **({"max_new_tokens": 2} | options))


@pytest.mark.parametrize("kind", ["int4", "uint8", jnp.int16, bool, "float8_e4m3fn", "floaty", 8])
def test_a_cache_that_would_cut_its_values(model, kind):
    match = "must be float32, bfloat16, float16 or int8, got"
    with pytest.raises(ValueError, match=f"generate: `cache_dtype` {match}"):
        model.generate([1], max_new_tokens=2, cache_dtype=kind)
    with pytest.raises(ValueError, match=f"init_cache: `dtype` {match}"):
        model.init_cache(1, 8, kind)


# Refused before the checkpoint is looked for: there is none.
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"activations": 64}, TypeError, "`activations` must be a ActivationConfig.*got int 64"),
        ({"activations": "int8"}, TypeError, "`activations` must be"),
        ({"activations": bj.B158}, TypeError, "`activations` must be"),
        ({"weights": 8}, TypeError, "`weights` must be a TernaryConfig or Int8Config"),
        ({"head": "int8"}, TypeError, "`head` must be a TernaryConfig or Int8Config"),
        ({"dtype": "floaty"}, TypeError, "`dtype` is 'floaty', which names no dtype"),
        ({"dtype": jnp.int8}, ValueError, "`dtype` must be a floating-point .*bj.Int8Config"),
        ({"packed": "no"}, TypeError, "`packed` must be a bool"),
        ({"prepared": None}, TypeError, "`prepared` must be a bool"),
        ({"scan": "yes"}, TypeError, "`scan` must be a bool or NoneType"),
    ],
)
@pytest.mark.parametrize("name", ["none", "none.gguf"])
def test_options_of_loading(tmp_path, name, options, error, match):
    refused(tmp_path / name, error, match, **options)


def test_several_prompts_are_no_stream(model):
    with pytest.raises(ValueError, match="must be one prompt"):
        model.stream([[1], [2]], max_new_tokens=2)


def test_a_tokenizer_of_another_model(tmp_path):
    folder = Checkpoint(**ONE).write(tmp_path)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    model = bj.models.Decoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, and the model 40"):
        model.generate("abc", max_new_tokens=2)
    (folder / "tokenizer.json").write_text("{}")
    model = bj.models.Decoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="is no tokenizer"):
        model.generate("abc", max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("1_Pooling", {"pooling_mode_mean_tokens": True}, "by pooling_mode_mean_tokens, and"),
        ("1_Pooling", {"pooling_mode": "cls", "include_prompt": True}, "by pooling_mode 'cls'"),
        ("2_Dense", {"in_features": 32}, "by 2_Dense"),
        ("1_Pooling", {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, ""),
        ("1_Pooling", {"pooling_mode": "lasttoken", "embedding_dimension": 32}, ""),
        ("2_Normalize", {}, ""),
    ],
)
def test_vectors_that_are_not_the_last_tokens(name, content, match, tmp_path):
    folder = Checkpoint(**ONE).write(tmp_path / "in")
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(content))
    model = bj.models.Decoder.from_pretrained(folder)
    if not match:
        assert model.encode([1, 2]).shape == (32,)
        return
    model.save(tmp_path / "saved.safetensors")
    bj.io.export_huggingface(model, tmp_path / "out")
    for path in (folder, tmp_path / "saved.safetensors", tmp_path / "out"):
        with pytest.raises(NotImplementedError, match=match):
            bj.models.Decoder.from_pretrained(path).encode([1, 2])


def test_calls(model):
    ids = jnp.zeros((1, 4), jnp.int32)
    for tokens, options, error, match in (
        (ids[0], {}, ValueError, "`tokens` must be .batch, length."),
        (ids.astype(jnp.float32), {}, TypeError, "`tokens` must be integers"),
        (ids, {"cache": model.init_cache(1, 3)}, ValueError, "3 slots, and 4 tokens"),
        (ids, {"attention_mask": jnp.ones((1, 5))}, ValueError, "`attention_mask` must have"),
        (ids, {"attention_mask": jnp.zeros((1, 4, 4))}, TypeError, "mask == 0 for zeros and -inf"),
        (ids, {"cache": model.init_cache(2, 4)}, ValueError, "`cache` has 2 rows, and `tokens` 1"),
        (ids, {"cache": {}}, ValueError, "`cache` must be what init_cache of this decoder"),
        (ids, {"cache": {"layers": 1}}, ValueError, "`cache` must be .* not stacked"),
        (ids, {"positions": jnp.arange(4)}, ValueError, "`positions` must have shape .1, 4."),
        (ids, {"positions": jnp.zeros((1, 1), jnp.int32)}, ValueError, "`positions` must have"),
        (ids, {"positions": jnp.zeros((1, 4))}, TypeError, "`positions` must be integers"),
    ):
        with pytest.raises(error, match=match):
            model(tokens, **options)
    for options in ({"cache_size": 0}, {"batch_size": 1.5}, {"dtype": "uint8"}):
        with pytest.raises(ValueError, match=r"^init_cache: `\w+` must be"):
            model.init_cache(**{"batch_size": 1, "cache_size": 4} | options)


@pytest.mark.parametrize("scan", [False, True])
def test_a_full_cache(scan):
    """Refused where it is known how full it is, NaN under jit: never in the slots of others."""
    config = bj.models.DecoderConfig(vocabulary=8, width=16, hidden=16, depth=1, scan=scan)
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    ids = jnp.zeros((1, 3), jnp.int32)
    run = nnx.jit(lambda m, ids, cache: m(ids, None, cache))
    logits, cache = run(model, ids, model.init_cache(1, 5))
    assert jnp.isfinite(logits).all()
    with pytest.raises(ValueError, match="5 slots, 3 of them taken, and 3 tokens came"):
        model(ids, None, cache)
    assert jnp.isnan(run(model, ids, cache)[0]).all()
    assert jnp.isfinite(run(model, ids[:, :2], cache)[0]).all()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"depth": 0}, "`depth`"),
        ({"heads": 5}, "`width` must be a multiple of heads"),
        ({"kv_heads": 3}, "`heads` must be a multiple of kv_heads"),
        ({"head_dim": 7}, "`head_dim` must be a multiple of 2"),
        ({"activation": "gelu"}, "`activation` must be one of"),
        ({"activation_rounding": "bfloat16"}, "`activation_rounding` must be one of"),
        (
            {"activation_rounding": "input", "activations": bj.ActivationConfig(group=64)},
            r"`activation_rounding`='input' .*`activations.group` is 64. Use activation_rounding=",
        ),
        (
            {"activations": bj.ActivationConfig(group=64)},  # of 256 and 688 inputs
            r"`activations.group`=64 does not divide the 688 inputs of 'layers/0/mlp/down'. Use a "
            "divisor of 16,",
        ),
        (
            {"head_dim": 6, "activations": bj.ActivationConfig(group=16)},
            "=16 does not divide the 24 inputs of 'layers/0/attention/out'. Use a divisor of 8,",
        ),
        (
            {"embedding": bj.Int8Config(), "weights": None, "activations": GROUPS_OF_48},
            "=48 does not divide the 256 inputs of 'embedding'",
        ),
        (
            {"overrides": (("layers/3/mlp/up", bj.TernaryConfig(granularity=48)),)},
            "`granularity`=48 does not divide the 256 inputs of 'layers/3/mlp/up'",
        ),
        ({"norm_eps": 0.0}, "`eps`"),
        ({"dtype": jnp.int8}, "`dtype` must be a floating-point"),
        ({"logit_multiplier": 0.0}, "`logit_multiplier`"),
        ({"head": bj.Int8Config()}, "`head` is Int8Config.*its embedding. Give `embedding=`"),
        ({"overrides": (("head", bj.B158),)}, "'head', which is no kernel of this decoder"),
        ({"overrides": (("embed", None),)}, "`overrides` names 'embed', which .* 'embedding'"),
        ({"overrides": (("layers/4/mlp/up", None),)}, "'layers/4/mlp/up', .*'layers/3/mlp/down'"),
        ({"overrides": (("layers/0/mlp/up/kernel", None),)}, "is no kernel"),
        ({"overrides": (("layers/0/mlp/up", None),) * 2}, "'layers/0/mlp/up' twice"),
    ],
)
def test_configs(fields, match):
    with pytest.raises(ValueError, match=match):
        bj.models.DecoderConfig(vocabulary=8, **fields)
    with pytest.raises(ValueError, match=re.escape("Rope: `kind` must be one of")):
        bj.models.Rope(kind="dynamic")


def test_groups_are_asked_of_quantised_kernels_alone():
    down = tuple((f"layers/{i}/mlp/down", None) for i in range(4))  # of 688 inputs
    for fields in (
        {"weights": None},
        {"width": 192, "hidden": 96},
        {"width": 192, "overrides": down},
        {"weights": None, "embedding": bj.Int8Config(), "tied": False},  # a table, looked up
    ):
        config = bj.models.DecoderConfig(vocabulary=8, activations=GROUPS_OF_48, **fields)
        assert config.activations == GROUPS_OF_48


@pytest.mark.parametrize("tied", [True, False])
def test_every_kernel_can_be_overridden(tied):
    config = bj.models.DecoderConfig(vocabulary=8, width=16, hidden=16, depth=11, tied=tied)
    paths = [path for path, *_ in _names.projections(config)]
    paths += ["embedding"] if tied else ["embedding", "head"]
    made = dataclasses.replace(config, overrides=tuple((p, bj.Int8Config()) for p in paths))
    assert {made.kernel(path) for path in paths} == {bj.Int8Config()}


def test_a_config_costs_the_same_whatever_the_depth():
    # A file may say so; that it has no such layers is found when they are read.
    override = ("layers/999999998/mlp/down", None)
    config = bj.models.DecoderConfig(vocabulary=8, depth=10**9, overrides=(override,))
    assert config.kernel("layers/999999998/mlp/down") is None


def test_stacked_layers_must_be_alike():
    config = bj.models.DecoderConfig(
        vocabulary=8, width=16, hidden=16, overrides=(("layers/0/mlp/up", None),), scan=True
    )
    with pytest.raises(ValueError, match="`scan` stacks layers that are all alike"):
        bj.models.Decoder(config, rngs=nnx.Rngs(0))


def test_kernels_of_stacked_layers_must_be_alike(tmp_path):
    config = bj.models.DecoderConfig(vocabulary=8, width=16, hidden=16, depth=2)
    model, _ = bj.nnx.pack(bj.models.Decoder(config, rngs=nnx.Rngs(0)))
    finer = bj.TernaryConfig(granularity="channel")
    kernel = model.layers[1].mlp.up.linear.kernel
    kernel.set_value(bj.pack(kernel.get_value().dequantize(), finer))
    model.save(tmp_path / "file.safetensors")
    match = r"'layers/1/mlp/up/linear/kernel' is not as in layer 0, and scan=True stacks layers"
    refused(tmp_path / "file.safetensors", ValueError, match, scan=True)


MESSAGES = [{"role": "user", "content": "x & <y>"}]
LOOP = "{% for i in range(60) %}"
BAD_TEMPLATES = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "a long loop": "{% for i in range(999999999) %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "doubling": "{% set n = namespace(x='a') %}" + LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='a') %}" + LOOP + "{% set n.x = n.x + n.x %}{% endfor %}",
    "blocks": "{% set n = namespace(x='a') %}"
    + LOOP
    + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "replacing": "{% set n = namespace(x='a') %}"
    + LOOP
    + "{% set n.x = n.x|replace('a', 'aa') %}{% endfor %}",
    "a product": "{{ 'a' * 999999999 }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a format": "{{ '%999999999d' % 5 }}",
    "another format": "{{ '{:999999999}'.format(5) }}",
    "padding": "{{ 'a'.ljust(999999999) }}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ messages.__class__.__base__.__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import '/etc/passwd' as x %}",
    "open": "{{ open('/etc/passwd').read() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "changing the messages": "{{ messages.append(1) }}",
    "what is not there": "{{ messages[7].content }}",
    "no template": "{% if %}",
    "its own refusal": "{{ raise_exception('only one system message') }}",
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_templates(name):
    with pytest.raises(TemplateError, match=r"^generate: the checkpoint's chat template"):
        render(BAD_TEMPLATES[name], MESSAGES, {"eos_token": "</s>"})


def test_what_published_templates_use():
    source = (
        "{%- for m in messages %}\n"
        "    {{- '<|' + m['role'] + '|>' ~ m.content | trim + eos_token }}"
        "\n{%- endfor %}{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}"
        "{{ {'k': '<&>'} | tojson }}{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{{ i }}{% endfor %}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    )
    got = render(source, MESSAGES, {"eos_token": "</s>"})
    assert got == '<|user|>x & <y></s>2{"k": "<&>"}021'
