"""Published layouts, loaded and run, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import Checkpoint, distance

import bitnet_jax as bj

IDS = np.array([[3, 17, 31, 5, 38, 11, 9], [7, 7, 7, 30, 1, 4, 37]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 3.0}
NORM = {"use_rms_norm": True}
CASES = {
    "bitnet-multiply": Checkpoint(),
    "bitnet-divide": Checkpoint(stored="divide", rope_scaling=LLAMA3),
    "bitnet-online": Checkpoint(stored="online", tie_word_embeddings=False),
    "llama-multiply-bias": Checkpoint("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "llama-divide-norm": Checkpoint("LlamaForCausalLM", "divide", quantization_config=NORM),
    # of seed 0 one activation lies on the border of two codes
    "llama-divide-mqa": Checkpoint(
        "LlamaForCausalLM", "divide", 1, num_key_value_heads=1, head_dim=16, rope_scaling=YARN
    ),
    "qwen3-float": Checkpoint("Qwen3ForCausalLM", "float", rope_scaling=LINEAR),
    "qwen3-grid": Checkpoint("Qwen3ForCausalLM", 16, tie_word_embeddings=False),
    "minicpm-tensor": Checkpoint("MiniCPMForCausalLM", "tensor"),
    "minicpm-channel": Checkpoint("MiniCPMForCausalLM", "channel"),
    "minicpm-defaults": Checkpoint("MiniCPMForCausalLM", "tensor"),
}
for key in ("scale_emb", "scale_depth", "dim_model_base"):
    del CASES["minicpm-defaults"].config[key]


@nnx.jit
def logits_of(model, ids, mask):
    return model(ids, None, None, mask)[0]


@pytest.fixture
def load(tmp_path):
    def write_and_load(checkpoint, shards=1, **options):
        return bj.models.Decoder.from_pretrained(checkpoint.write(tmp_path, shards), **options)

    return write_and_load


@pytest.mark.parametrize("name", CASES)
def test_logits(name, load):
    checkpoint = CASES[name]
    model = load(checkpoint)
    got = logits_of(model, jnp.asarray(IDS), jnp.asarray(MASK))
    far = distance(got, checkpoint.logits64(IDS, MASK))[MASK > 0]
    print(f"{name}: {far.max():.1e}, {(far > 1e-5).sum()} of {far.size} beyond an int8 flip")
    assert (far <= 1e-5).all()


def test_shards_and_stacked_layers(load):
    checkpoint = CASES["bitnet-multiply"]
    model = load(checkpoint, shards=3, scan=True)
    assert model.layers.mlp.down.linear.kernel.get_value().shape == (2, 48, 32)
    far = distance(logits_of(model, jnp.asarray(IDS), None), checkpoint.logits64(IDS))
    assert (far <= 1e-5).all()


def test_modules_to_not_convert(load):
    checkpoint = Checkpoint("LlamaForCausalLM", "online", tie_word_embeddings=False)
    left = ["lm_head", "down_proj"]
    checkpoint.config["quantization_config"]["modules_to_not_convert"] = left
    model = load(checkpoint)
    kinds = {row.path: row.kind for row in model.report.rows}
    assert kinds["layers/1/mlp/down"] == kinds["head"] == "float"
    assert kinds["layers/1/mlp/up"] == "ternary"
    far = distance(logits_of(model, jnp.asarray(IDS), None), checkpoint.logits64(IDS))
    assert (far <= 1e-5).all()


def test_the_names_of_1bitllm(load):
    """Another class, other names for the sub-norms, and no quantization_config: online."""
    checkpoint = Checkpoint(stored="online", num_hidden_layers=1, hidden_act="silu")
    wanted = checkpoint.logits64(IDS)
    checkpoint.config["architectures"] = ["BitnetForCausalLM"]
    del checkpoint.config["quantization_config"]
    for old, new in (("attn_sub_norm", "inner_attn_ln"), ("ffn_sub_norm", "ffn_layernorm")):
        for name in [name for name in checkpoint.tensors if old in name]:
            checkpoint.tensors[name.replace(old, new)] = checkpoint.tensors.pop(name)
    far = distance(logits_of(load(checkpoint), jnp.asarray(IDS), None), wanted)
    assert (far <= 1e-5).all()


def test_an_embedding_model(load):
    """No head, no prefix, a norm in each projection; the last token's vector is the text's."""
    says = {"use_rms_norm": True}
    checkpoint = Checkpoint("Qwen3ForCausalLM", "online", quantization_config=says)
    prompts = [row[row_mask > 0].tolist() for row, row_mask in zip(IDS, MASK, strict=True)]
    # With the identity as its head, the oracle's logits are what comes before the head.
    checkpoint.config["tie_word_embeddings"] = False
    checkpoint.tensors["lm_head.weight"] = np.eye(32, dtype=np.float32)
    wanted = checkpoint.logits64(IDS, MASK)[:, -1]
    del checkpoint.tensors["lm_head.weight"]
    checkpoint.config |= {"architectures": ["Qwen3Model"], "tie_word_embeddings": True}
    checkpoint.tensors = {
        name.removeprefix("model.").replace(".rms_norm.", ".norm."): tensor
        for name, tensor in checkpoint.tensors.items()
    }
    model = load(checkpoint)
    assert np.allclose(model.encode(prompts, normalize=False), wanted, atol=1e-5)
    unit = np.asarray(model.encode(prompts[0]))
    assert unit.shape == (32,)
    assert np.allclose(unit, wanted[0] / np.linalg.norm(wanted[0]), atol=1e-5)


def test_an_int8_head_and_int8_projections(load):
    checkpoint = CASES["qwen3-float"]
    model = load(checkpoint, weights=bj.Int8Config(), head=bj.Int8Config())
    assert {row.kind for row in model.report.rows} == {"int8"}
    far = distance(logits_of(model, jnp.asarray(IDS), None), checkpoint.logits64(IDS))
    assert 1e-5 < far.max() < 0.1


@pytest.mark.parametrize("stored", ["multiply", "online"])
def test_floats_to_train(stored, load):
    """Unpacked kernels train; before a step they answer as the packed ones do."""
    checkpoint = Checkpoint(stored=stored, num_hidden_layers=1)
    model = load(checkpoint, packed=False)
    far = distance(logits_of(model, jnp.asarray(IDS), None), checkpoint.logits64(IDS))
    assert (far <= 1e-5).all()
    packed, report = bj.nnx.pack(model)
    assert len(report.rows) == 7
    difference = logits_of(packed, jnp.asarray(IDS), None) != logits_of(
        model, jnp.asarray(IDS), None
    )
    print(f"{int(difference.sum())} of {difference.size} logits differ between float and packed")
    assert int(difference.sum()) == 0


def test_the_report_names_what_was_decided(load):
    model = load(CASES["bitnet-divide"])
    rows = {row.path: row for row in model.report.rows}
    assert isinstance(model.report, bj.models.LoadReport)
    assert all(isinstance(row, bj.models.LoadedKernel) for row in model.report.rows)
    assert rows["layers/0/mlp/up"].why == "no linear_class, so bitlinear, offline"
    assert rows["embed"].kind == "float"
    assert str(model.report).startswith("path ")
    assert model.report.to_dict()["rows"][0]["shape"] == [32, 32]


@pytest.mark.parametrize(
    ("granularity", "kept"), [("tensor", "tensor"), ("channel", "channel"), (16, None), (32, 32)]
)
def test_a_grid_is_found_only_where_it_is_exact(granularity, kept, load):
    """Groups of 16 are not looked for; of 32 are."""
    checkpoint = Checkpoint(
        "Qwen3ForCausalLM",
        granularity,
        hidden_size=64,
        intermediate_size=64,
        head_dim=16,
        num_hidden_layers=1,
    )
    model = load(checkpoint)
    kernel = model.layers[0].mlp.down.linear.kernel.get_value()
    assert (kept is None) == (not hasattr(kernel, "codes"))
    if kept is None:
        assert model.report.rows[0].why == "floats on no grid"
        return
    assert kernel.config.granularity == kept
    w = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    assert np.array_equal(np.asarray(kernel.dequantize()), w.T)


def test_bfloat16_stays_within_its_own_distance(load):
    """Both roundings of activations: of the input's dtype, and float32."""
    for name in ("bitnet-multiply", "bitnet-divide"):
        checkpoint = CASES[name]
        model = load(checkpoint, dtype=jnp.bfloat16)
        assert model.config.activation_rounding == ("input" if "divide" in name else "float32")
        far = distance(logits_of(model, jnp.asarray(IDS), None), checkpoint.logits64(IDS))
        print(f"{name} in bfloat16: {far.max():.4f} of max")
        assert far.max() < 0.08


@pytest.mark.parametrize("left", ["mlp.down_proj", "lm_head"])
def test_what_is_not_converted_runs_as_floats_on_a_grid_too(left, tmp_path):
    """Packed, it would share the int8 activations that are declared for the others."""
    quantization = {"modules_to_not_convert": ["lm_head", left]}
    made = Checkpoint(
        "LlamaForCausalLM",
        num_hidden_layers=1,
        tie_word_embeddings=False,
        quantization_config=quantization,
    )
    name = "lm_head" if left == "lm_head" else f"model.layers.0.{left}"
    shape = (40, 32) if left == "lm_head" else (32, 48)
    codes = np.random.default_rng(0).integers(-1, 2, shape)
    made.tensors[f"{name}.weight"] = np.float32(0.3) * codes.astype(np.float32)
    made.tensors.pop(f"{name}.weight_scale", None)
    model = bj.models.Decoder.from_pretrained(made.write(tmp_path))
    ids = np.arange(9)[None]
    assert (distance(model(jnp.asarray(ids))[0], made.logits64(ids)) <= 1e-5).all()
