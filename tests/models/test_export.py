"""Folders that are written: read again to the bit, and refused where transformers would differ."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import Checkpoint, byte_tokenizer, distance

import bitnet_jax as bj
from bitnet_jax.models._publish import _reciprocal

pytestmark = pytest.mark.full  # each compiles a decoder

IDS = np.array([[3, 17, 31, 5, 38, 11, 9]])
NORM = {"use_rms_norm": True}
CASES = {
    "bitnet-tied": Checkpoint(num_hidden_layers=1),
    "bitnet-untied": Checkpoint(num_hidden_layers=1, tie_word_embeddings=False),
    "llama-norm": Checkpoint("LlamaForCausalLM", "divide", quantization_config=NORM),
    "llama-online": Checkpoint("LlamaForCausalLM", "online", tie_word_embeddings=False),
    "llama-float": Checkpoint("LlamaForCausalLM", "float", attention_bias=True),
    "qwen3-grid": Checkpoint("Qwen3ForCausalLM", "channel", num_hidden_layers=1),
    "llama-grid": Checkpoint("LlamaForCausalLM", "tensor", num_hidden_layers=1),
    "llama-bias": Checkpoint(
        "LlamaForCausalLM", "multiply", num_hidden_layers=1, attention_bias=True, mlp_bias=True
    ),
    "minicpm": Checkpoint("MiniCPMForCausalLM", "divide", auto_map={"AutoConfig": "x.Y"}),
    "minicpm-float": Checkpoint("MiniCPMForCausalLM", "float", num_hidden_layers=1),
    "qwen3-packed": Checkpoint("Qwen3ForCausalLM", "multiply", num_hidden_layers=1),
}


def load(folder, **options):
    return bj.models.Decoder.from_pretrained(folder, **options)


def leaves(model):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    }


def same_bits(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert np.array_equal(a[path], b[path]), path


@pytest.mark.parametrize("layout", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_gives_the_same_bits(case, layout, tmp_path):
    model = load(CASES[case].write(tmp_path / "in"))
    bj.io.export_huggingface(model, tmp_path / "out", layout=layout)
    again = load(tmp_path / "out")
    same_bits(model, again)
    skipped = {"activation_rounding": "float32"}
    assert dataclasses.replace(again.config, **skipped) == dataclasses.replace(
        model.config, **skipped
    )
    bj.io.export_huggingface(again, tmp_path / "twice", layout=layout)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_every_scale_survives_its_reciprocal(tmp_path):
    """About one float32 in five is no reciprocal of another; the metadata has those."""
    rng = np.random.default_rng(0)
    scales = np.float32(rng.uniform(1e-3, 2, 2000))
    exact = [_reciprocal(s) for s in scales]
    assert all(
        np.float32(1) / stored == s for s, (stored, ok) in zip(scales, exact, strict=True) if ok
    )
    lost = next(s for s, (_, ok) in zip(scales, exact, strict=True) if not ok)
    assert 0 < np.mean([not ok for _, ok in exact]) < 0.5
    checkpoint = Checkpoint(num_hidden_layers=1)
    checkpoint.tensors["model.layers.0.mlp.up_proj.weight_scale"][:] = lost
    model = load(checkpoint.write(tmp_path / "in"))
    bj.io.export_huggingface(model, tmp_path / "out")
    same_bits(model, load(tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    hexed = float(lost).hex().encode()
    assert hexed in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(hexed, hexed.replace(b"0x1", b"0x2")))
    with pytest.raises(ValueError, match=r"up_proj.weight_scale' means .* and the metadata"):
        load(tmp_path / "out")


def test_a_trained_decoder_in_shards(tmp_path):
    """Float kernels are packed on the way; a file is begun when the last is full."""
    config = bj.models.DecoderConfig(vocabulary=40, width=32, hidden=48, depth=2, tied=False)
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    bj.io.export_huggingface(model, tmp_path, shard_bytes=6000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    packed, _ = bj.nnx.pack(model)
    same_bits(packed, load(tmp_path))
    answer = nnx.jit(lambda m, ids: m(ids)[0])
    ids = jnp.asarray(IDS)
    assert bool((answer(packed, ids) == answer(load(tmp_path), ids)).all())


def test_a_rotation_is_refused_and_written_by_save_alone(tmp_path):
    rotated = bj.TernaryConfig(rotation="hadamard")
    shape = {"vocabulary": 40, "width": 32, "hidden": 48, "depth": 1, "heads": 4, "kv_heads": 2}
    config = bj.models.DecoderConfig(**shape, weights=rotated, embedding=rotated)
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    for one in (model, bj.nnx.pack(model)[0]):
        with pytest.raises(NotImplementedError, match=r"q_proj has rotation='hadamard'.*Decoder.s"):
            bj.io.export_huggingface(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    packed, _ = bj.nnx.pack(model)
    ids = jnp.asarray(IDS)
    want = nnx.jit(lambda m, ids: m(ids)[0])(model, ids)
    packed.save(tmp_path / "model.bitnet.safetensors")
    again = bj.models.Decoder.from_pretrained(tmp_path / "model.bitnet.safetensors")
    assert again.config == config
    for one in (packed, again):
        np.testing.assert_allclose(nnx.jit(lambda m, ids: m(ids)[0])(one, ids), want, atol=1e-4)
    with pytest.raises(ValueError, match=r"mlp/down: `rotation`='hadamard' rotates blocks"):
        bj.models.DecoderConfig(**shape | {"hidden": 50}, weights=rotated)


def test_what_is_written_is_what_the_layout_means(tmp_path):
    """The float64 oracle, which reads the published layout, reads the export."""
    from safetensors.numpy import load_file

    model = load(CASES["bitnet-untied"].write(tmp_path / "in"))
    for layout, stored in (("bitlinear", "divide"), ("autobitlinear", "multiply")):
        bj.io.export_huggingface(model, tmp_path / layout, layout=layout)
        oracle = Checkpoint(num_hidden_layers=1, tie_word_embeddings=False, stored=stored)
        oracle.tensors = load_file(tmp_path / layout / "model.safetensors")
        far = distance(nnx.jit(lambda m, i: m(i)[0])(model, jnp.asarray(IDS)), oracle.logits64(IDS))
        assert (far <= 1e-5).all()


def test_tokenizer_and_unknown_keys_pass_through(tmp_path):
    folder = Checkpoint(vocab_size=256, num_hidden_layers=1, my_own_key=[1, 2]).write(
        tmp_path / "a"
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    bj.io.export_huggingface(load(folder), tmp_path / "b")
    again = load(tmp_path / "b")
    assert again.text.encode("abc") == load(folder).text.encode("abc")
    assert again.text.stops == {2, 7, 9}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["my_own_key"] == [1, 2]


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"query_key_norm": True}, NotImplementedError, "sub_norms with query_key_norm"),
        ({"mlp_bias": True}, NotImplementedError, "mlp_bias with sub_norms"),
        ({"logit_multiplier": 2.0}, NotImplementedError, "multipliers"),
        ({"activations": bj.ActivationConfig(bits=4)}, NotImplementedError, "int8 activations"),
        ({"weights": bj.PHASE4}, NotImplementedError, "weight-only"),
        (
            {"activations": None, "projection_norm": True},
            NotImplementedError,
            "norms inside packed kernels alone",
        ),
        ({"weights": bj.Int8Config()}, TypeError, "q_proj is int8"),
        ({"embedding": bj.Int8Config()}, TypeError, "the embedding is int8"),
        ({"hidden": 46}, ValueError, "46 outputs"),
        ({"rope": bj.models.Rope(kind="factors", factors=(1.0,) * 4)}, NotImplementedError, "rope"),
    ],
)
def test_what_transformers_does_not_run(fields, error, match, tmp_path):
    shape = {"vocabulary": 16, "width": 32, "hidden": 48, "depth": 1}
    model = bj.models.Decoder(bj.models.DecoderConfig(**shape | fields), rngs=nnx.Rngs(0))
    with pytest.raises(error, match=match) as raised:
        bj.io.export_huggingface(model, tmp_path / "out")
    assert str(raised.value).startswith("export_huggingface: ")
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path):
    model = load(CASES["bitnet-tied"].write(tmp_path / "in"))
    with pytest.raises(FileExistsError, match=r"holds model.safetensors already"):
        bj.io.export_huggingface(model, tmp_path / "in")
    with pytest.raises(ValueError, match=r"`layout` must be one of"):
        bj.io.export_huggingface(model, tmp_path / "out", layout="bit")
    with pytest.raises(TypeError, match=r"`model` must be a bj.models.Decoder, got dict"):
        bj.io.export_huggingface({}, tmp_path / "out")
    nnx.update(model, bj.prepare(nnx.state(model, nnx.Param)))
    with pytest.raises(TypeError, match=r"is prepared.*before bj.prepare"):
        bj.io.export_huggingface(model, tmp_path / "out")


def test_scales_that_a_narrow_dtype_does_not_hold(tmp_path):
    """Weight-only kernels are floats in the export: float32 where bfloat16 would round scales."""
    folder = Checkpoint("LlamaForCausalLM", "multiply", num_hidden_layers=1).write(tmp_path / "in")
    model = load(folder, dtype="bfloat16", activations=None)
    bj.io.export_huggingface(model, tmp_path / "out")
    again = load(tmp_path / "out", dtype="bfloat16")
    ids = jnp.asarray(IDS)
    answer = nnx.jit(lambda m, ids: m(ids)[0])
    assert again.config.activations is None
    assert bool((answer(model, ids) == answer(again, ids)).all())
    for row in again.report.rows:
        assert row.kind == ("float" if row.path == "embed" else "ternary")


@pytest.mark.parametrize("layout", ["bitlinear", "autobitlinear"])
def test_stacked_layers_are_written_one_by_one(layout, tmp_path):
    source = Checkpoint(num_hidden_layers=2).write(tmp_path / "in")
    bj.io.export_huggingface(load(source), tmp_path / "apart", layout=layout)
    bj.io.export_huggingface(load(source, scan=True), tmp_path / "stacked", layout=layout)
    for name in ("config.json", "model.safetensors"):
        same = (tmp_path / "stacked" / name).read_bytes()
        assert same == (tmp_path / "apart" / name).read_bytes()
    config = bj.models.DecoderConfig(vocabulary=40, width=32, hidden=48, depth=2, scan=True)
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))  # float, each slice with its own scale
    bj.io.export_huggingface(model, tmp_path / "trained", layout=layout)
    same_bits(bj.nnx.pack(model)[0], load(tmp_path / "trained", scan=True))


def test_multipliers_that_were_not_loaded(tmp_path):
    shape = {"vocabulary": 16, "width": 48, "hidden": 48, "depth": 3, "sub_norms": False}
    rng = np.random.default_rng(0)
    for i in range(4):
        names = ("embedding_multiplier", "residual_multiplier", "logit_multiplier")
        numbers = dict(zip(names, rng.uniform(0.1, 12, 3).tolist(), strict=True))
        config = bj.models.DecoderConfig(**shape, **numbers)
        bj.io.export_huggingface(bj.models.Decoder(config, rngs=nnx.Rngs(i)), tmp_path / str(i))
        again = load(tmp_path / str(i)).config
        for name, number in numbers.items():
            assert np.float32(getattr(again, name)) == np.float32(number)


def test_biases_survive_the_scale(tmp_path):
    """Few floats are a float32 times the scale; where one is not, float64 is written."""
    model = load(CASES["llama-bias"].write(tmp_path / "in"))
    bj.io.export_huggingface(model, tmp_path / "out", layout="autobitlinear")
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    stored, scale = tensors[f"{name}.bias"], tensors[f"{name}.weight_scale"]
    bias = model.layers[0].attention.query.linear.bias.get_value()
    np.testing.assert_allclose(stored * scale, bias, rtol=1e-7)
    assert stored.dtype == np.float64


def small(**fields):
    shape = {"vocabulary": 24, "width": 16, "hidden": 16, "depth": 1, "heads": 2}
    return bj.models.Decoder(bj.models.DecoderConfig(**shape | fields), rngs=nnx.Rngs(0))


# A parameter of a decoder, what is in it, and the tensor that the refusal names.
BROKEN = {
    "kernel": ("layers/0/mlp/up/linear/kernel", np.nan, "model.layers.0.mlp.up_proj.weight"),
    "bias": ("layers/0/attention/key/linear/bias", np.inf, "model.layers.0.self_attn.k_proj.bias"),
    "norm": ("layers/0/mlp_norm/scale", -np.inf, "model.layers.0.post_attention_layernorm.weight"),
    "inner norm": (
        "layers/0/attention/out/norm/scale",
        np.nan,
        "model.layers.0.self_attn.o_proj.rms_norm.weight",
    ),
    "embedding": ("embed/embedding", np.nan, "model.embed_tokens.weight"),
    "head": ("head/kernel", np.nan, "lm_head.weight"),
}


@pytest.mark.parametrize("weights", [None, bj.B158])
@pytest.mark.parametrize("case", BROKEN)
def test_a_parameter_that_is_not_finite_is_named(case, weights, tmp_path):
    path, value, name = BROKEN[case]
    weights = bj.B158 if case == "inner norm" else weights  # float projections have none
    flags = {"projection_norm": True, "attention_bias": True, "tied": False, "weights": weights}
    model = small(**flags)
    nnx.update(model, broken(nnx.state(model, nnx.Param), path, value))
    with pytest.raises(ValueError, match=f"^export_huggingface: '{name}' has 1 NaN or Inf"):
        bj.io.export_huggingface(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(state, path, value):
    flat = dict(nnx.to_flat_state(state))
    (key,) = [key for key in flat if "/".join(map(str, key)) == path]
    array = flat[key].get_value()
    flat[key] = flat[key].replace(array.at[(0,) * array.ndim].set(value))
    return nnx.from_flat_state(flat)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_scale_that_is_none_is_named(granularity, tmp_path):
    config = dataclasses.replace(bj.B158, granularity=granularity)
    activations = bj.ActivationConfig() if granularity == "tensor" else None
    model, _ = bj.nnx.pack(small(weights=config, activations=activations))
    kernel = model.layers[0].mlp.up.linear.kernel
    packed = kernel.get_value()
    kernel.set_value(dataclasses.replace(packed, scale=packed.scale.at[0, 0].set(np.nan)))
    with pytest.raises(ValueError, match=r"up_proj.weight' has 1 scales that are 0, negative"):
        bj.io.export_huggingface(model, tmp_path / "out")
    kernel.set_value(dataclasses.replace(packed, scale=jnp.full_like(packed.scale, 1e-39)))
    if granularity == "tensor":
        with pytest.raises(ValueError, match=r"weight_scale' would be inf, for 1/.*autobitlinear"):
            bj.io.export_huggingface(model, tmp_path / "out")
