"""GGUF files: every block type to the value, what is computed, and what is refused."""

import contextlib
import struct

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import Model, tq1_0, write
from published import Checkpoint, byte_tokenizer, distance

import bitnet_jax as bj
from bitnet_jax.io._gguf import Gguf

pytestmark = pytest.mark.full  # each compiles a decoder

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_1", "TQ1_0", "TQ2_0", "Q2_0", "Q2_0/128"]
IDS = np.array([[3, 17, 31, 5, 11, 9]])
UP = "blk.0.ffn_up.weight"


@nnx.jit
def logits_of(model, ids):
    return model(ids)[0]


def kernel_of(model, name):
    kernel = getattr(model.layers[0].mlp, name).linear.kernel.get_value()
    return np.asarray(kernel.dequantize() if hasattr(kernel, "codes") else kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_to_the_value(kind, tmp_path):
    file = Model(kind=kind)
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    assert np.array_equal(kernel_of(model, "up"), file.kernels[UP].T)
    ternary = "TQ" in kind or "Q2" in kind
    row = {row.path: row for row in model.report.rows}["layers/0/mlp/up"]
    assert row.kind == ("ternary" if ternary else "float")
    assert row.why == kind.split("/")[0]
    assert (model.config.activations is None) == ("TQ" not in kind)


def as_published(file):
    """The same decoder in Hugging Face's names, for the float64 oracle."""
    arch = file.metadata["general.architecture"]
    family = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[arch]
    checkpoint = Checkpoint(
        family,
        "float",
        vocab_size=32,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        head_dim=16,
        rope_theta=10000.0,
    )
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
    names |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

    def value(name):
        if name in file.kernels:
            return file.kernels[name]
        _, shape, raw = file.tensors[name]
        return np.frombuffer(raw, "<f4").reshape(shape)

    for name in file.tensors:
        if name.startswith("blk."):
            part = name.split(".")[2]
            w = value(name)
            if arch == "llama" and part in ("attn_q", "attn_k"):
                # llama.cpp turns neighbours: row 2 i + j of a head is row 8 j + i there
                w = w.reshape(-1, 8, 2, 256).transpose(0, 2, 1, 3).reshape(w.shape)
            checkpoint.tensors[f"model.layers.0.{names[part]}.weight"] = w
    checkpoint.tensors["model.embed_tokens.weight"] = value("token_embd.weight")
    checkpoint.tensors["model.norm.weight"] = value("output_norm.weight")
    return checkpoint


@pytest.mark.parametrize(("arch", "kind"), [("llama", "Q4_1"), ("qwen3", "Q2_0")])
def test_logits(arch, kind, tmp_path):
    file = Model(arch, kind)
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    far = distance(logits_of(model, jnp.asarray(IDS)), as_published(file).logits64(IDS))
    assert (far <= 1e-5).all()


def test_a_scale_of_the_output_and_the_head(tmp_path):
    file = Model("bitnet", "TQ2_0")
    rng = np.random.default_rng(1)
    file.matrix("output.weight", 32, 256, "TQ1_0", rng)
    file.tensors["blk.0.ffn_up.scale"] = ("F32", (1,), struct.pack("<f", 2.5))
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    assert np.allclose(kernel_of(model, "up"), file.kernels[UP].T * 2.5, rtol=1e-6)
    assert np.array_equal(
        np.asarray(model.head.kernel.get_value().dequantize()).T, file.kernels["output.weight"]
    )
    assert model.config.activation == "silu"
    file.metadata["bitnet.hidden_activation"] = "relu2"
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    assert model.config.activation == "relu2"


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32", "Q8_0"])
@pytest.mark.parametrize("scale", [0.1234567, 1e-9])
def test_a_scale_of_floats_is_not_rounded_to_theirs(kind, scale, tmp_path):
    """In float16 the products lose bits, and small ones all of them."""
    file = Model(kind=kind)
    file.tensors["blk.0.ffn_up.scale"] = ("F32", (1,), struct.pack("<f", scale))
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    wanted = file.kernels[UP].T.astype(np.float64) * np.float64(np.float32(scale))
    np.testing.assert_allclose(kernel_of(model, "up"), wanted, rtol=1e-7)


def with_bytes(file):
    """A file of width 32 with one token a byte, and two tokens more."""
    tokens = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().get)
    table = np.random.default_rng(0).normal(size=(258, 32)).astype("<f4")
    file.tensors["token_embd.weight"] = ("F32", table.shape, table.tobytes())
    file.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, "he", "<end>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.bos_token_id": 257,
    }
    return file


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_texts_begin_and_end_as_a_file_says(begin, end, tmp_path):
    """Embedding models take the last token's vector, and it is that of the end."""
    file = with_bytes(Model("qwen3", "Q8_0", width=32))
    file.metadata |= {"tokenizer.ggml.add_bos_token": begin, "tokenizer.ggml.add_eos_token": end}
    text = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf")).text
    wanted = byte_tokenizer().encode("abc").ids
    assert text.encode("abc") == [257] * begin + wanted + [257] * end
    assert text.encode("abc", special=False) == wanted


@pytest.mark.parametrize(("pooling", "fits"), [(0, True), (1, False), (2, False), (3, True)])
def test_vectors_that_are_not_the_last_tokens(pooling, fits, tmp_path):
    file = Model("qwen3", "Q8_0", width=32, **{"qwen3.pooling_type": pooling})
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    if fits:
        assert model.encode([1, 2]).shape == (32,)
        return
    model.save(tmp_path / "saved.safetensors")
    for one in (model, bj.models.Decoder.from_pretrained(tmp_path / "saved.safetensors")):
        with pytest.raises(NotImplementedError, match=f"pooling_type {pooling}, and encode takes"):
            one.encode([1, 2])


def test_the_tokenizer_of_a_file(tmp_path):
    """Byte-pair encoding from the file's own keys, with its special tokens."""
    tokens = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().get)
    tokens = [*tokens, "he", "<end>"]
    merges = ["h e"]
    file = Model(kind="Q8_0", width=32)
    file.tensors["token_embd.weight"] = (
        "F32",
        (258, 32),
        np.random.default_rng(0).normal(size=(258, 32)).astype("<f4").tobytes(),
    )
    file.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    }
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    ids = model.text.encode("he 12<end>")
    assert ids[0] == 256
    assert ids[-1] == 257
    assert len(ids) == 5  # he, space, two digits, the special token
    assert model.text.decode(ids) == "he 12"
    assert model.text.chat([{"role": "user", "content": "he"}]) == [256, 257]
    assert model.text.stops == {257}
    file.metadata["tokenizer.ggml.pre"] = "other"
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre is 'other'.*Pass token ids"):
        model.generate("he", max_new_tokens=2)


def refused(path, match, error=bj.io.FormatError):
    with pytest.raises(error, match=match) as raised:
        bj.models.Decoder.from_pretrained(path)
    assert str(raised.value).startswith("from_pretrained: ")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update({"general.architecture": "gpt2"}), "`general.architecture` is 'gpt2'"),
        (lambda m: m.pop("llama.block_count"), "no `llama.block_count`"),
        (lambda m: m.update({"llama.block_count": "1"}), "`llama.block_count` is '1'"),
        (lambda m: m.update({"llama.rope.dimension_count": 8}), "`llama.rope.dimension_count`"),
        (
            lambda m: m.update(
                {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}
            ),
            "`llama.rope.scaling.type`",
        ),
        (lambda m: m.update({"llama.expert_count": 8}), "`llama.expert_count`"),
        (lambda m: m.update({"llama.vocab_size": 33}), "`llama.vocab_size` is 33"),
        (lambda m: m.update({"llama.hidden_activation": "gelu"}), "`llama.hidden_activation`"),
        (lambda m: m.update({"llama.feed_forward_length": 128}), "has shape"),
        (
            lambda m: m.update({"llama.attn_logit_softcapping": 50.0}),
            "in the file `llama.attn_logit_softcapping` is 50.0, which this library",
        ),
        (lambda m: m.update({"llama.rope.scaling.factor": 4.0}), "`llama.rope.scaling.factor`"),
        (lambda m: m.update({"llama.attention.causal": False}), "`llama.attention.causal`"),
    ],
)
def test_metadata(change, match, tmp_path):
    file = Model(kind="Q8_0", width=64)
    change(file.metadata)
    refused(file.write(tmp_path / "model.gguf"), match, ValueError)


def test_metadata_that_changes_nothing(tmp_path):
    file = Model(kind="Q8_0", width=64)
    want = bj.models.Decoder.from_pretrained(file.write(tmp_path / "a.gguf")).config
    file.metadata |= {
        "llama.attention.causal": True,
        "llama.final_logit_softcapping": 0.0,
        "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.finetuned": False,
        "llama.tensor_data_layout": "Meta AI original pth",
        "other.logit_scale": 2.0,  # of another architecture
    }
    assert bj.models.Decoder.from_pretrained(file.write(tmp_path / "b.gguf")).config == want


def test_tensors(tmp_path):
    path = tmp_path / "model.gguf"
    file = Model(width=256)
    del file.tensors[UP]
    refused(file.write(path), f"no '{UP}'", ValueError)
    file = Model(width=256)
    file.tensors["blk.0.attn_sub_norm.weight"] = ("F32", (64,), bytes(256))
    refused(file.write(path), "1 tensors of the file are not in a decoder", ValueError)
    file = Model(width=256)
    kind, shape, raw = file.tensors[UP]
    for number, name in ((36, "I2_S"), (142, "Bonsai"), (12, "Q4_K"), (99, "unknown")):
        file.tensors[UP] = (number, shape, raw)
        refused(file.write(path), f"as type {number} .*{name}.*F32, F16, Q4_1")
    file.tensors[UP] = (kind, (256, 255), raw)
    refused(file.write(path), "whose rows are no multiples of 256")
    with pytest.raises(ValueError, match="`quantization_config` is for folders"):
        bj.models.Decoder.from_pretrained(path, quantization_config={})


@pytest.mark.parametrize(
    ("kind", "at", "value", "match"),
    [
        ("TQ2_0", 3, 0xFF, "holds the code 3 in 4 places"),
        ("Q2_0", 5, 0x03, "holds the code 3 in 1 places"),
        ("TQ1_0", 3, 0x01, "has 1 bytes that no five trits make"),
        ("TQ1_0", 49, 0x02, "has 1 bytes that no five trits make"),
        ("TQ2_0", 65, 0x7E, "scales that are negative, NaN or Inf"),
        ("TQ1_0", 53, 0xFC, "scales that are negative, NaN or Inf"),
        ("Q2_0", 1, 0x80, "scales that are negative, NaN or Inf"),
    ],
)
def test_codes_and_scales(kind, at, value, match, tmp_path):
    file = Model(kind=kind)
    name, shape, raw = file.tensors[UP]
    file.tensors[UP] = (name, shape, raw[:at] + bytes([value]) + raw[at + 1 :])
    refused(file.write(tmp_path / "model.gguf"), match)


def test_all_canonical_bytes_of_five_trits():
    codes = np.array(np.unravel_index(np.arange(243), (3,) * 5)).T - 1
    padded = np.zeros((8, 256), np.int8)
    for n in range(5):  # 243 values over the bytes 0 to 31 of eight blocks
        flat = np.zeros(256, np.int8)
        flat[:243] = codes[:, n]
        padded[:, 32 * n : 32 * n + 32] = flat.reshape(8, 32)
    raw = tq1_0(padded, np.ones(8))
    assert len(np.unique(raw[:, :32])) == 243


def test_a_scale_of_zero_is_for_zeros(tmp_path):
    file = Model(kind="TQ2_0")
    name, shape, raw = file.tensors[UP]
    zeros = bytes([0x55] * 64 + [0, 0])
    file.tensors[UP] = (name, shape, zeros + raw[66:])
    model = bj.models.Decoder.from_pretrained(file.write(tmp_path / "model.gguf"))
    wanted = file.kernels[UP].copy()
    wanted[0] = 0
    assert np.array_equal(kernel_of(model, "up"), wanted.T)
    file.tensors[UP] = (name, shape, raw[:64] + bytes(2) + raw[66:])
    refused(file.write(tmp_path / "model.gguf"), "scale of 0 over codes", ValueError)


SMALL = {"general.architecture": "llama", "numbers": [1, 2, 3], "words": ["a", "bc"]}
TENSORS = {
    "a": ("Q8_0", (2, 32), bytes(68)),
    "b": ("F32", (3,), struct.pack("<3f", 1, 2, 3)),
    "c": ("Q2_0", (32, 64), bytes([0] + [0x3C] + [0x55] * 16) * 32),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write(path, SMALL, TENSORS)
    return path


def read_all(path):
    file = Gguf("load", path)
    return file.metadata, {n: file.floats(n).tolist() for n in file}, [file[n].shape for n in file]


def test_what_is_written_is_read(small):
    metadata, values, shapes = read_all(small)
    assert metadata == SMALL
    assert values["b"] == [1.0, 2.0, 3.0]
    assert shapes == [(2, 32), (3,), (32, 64)]


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_flipped_and_lost_bytes(data, small, tmp_path_factory):
    """Any byte changed, or the end cut off: read as it is, or refused; never another error."""
    raw = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    path = small.parent / "changed.gguf"
    path.write_bytes(bytes(raw[:cut]))
    with contextlib.suppress(bj.io.FormatError):
        read_all(path)


@pytest.mark.parametrize(
    ("at", "what"), [(8, "its number of tensors"), (16, "its number of keys"), (24, "the length")]
)
def test_counts_that_lie_take_no_memory(at, what, small, tmp_path):
    raw = bytearray(small.read_bytes())
    raw[at : at + 8] = struct.pack("<Q", 2**62)
    (tmp_path / "lying.gguf").write_bytes(bytes(raw))
    refused(tmp_path / "lying.gguf", f"gives {2**62} as {what}")


def test_files_that_are_none(tmp_path, small):
    refused(tmp_path / "none.gguf", "no file", FileNotFoundError)
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"")
    refused(path, "ends within its magic")
    path.write_bytes(b"GGML" + bytes(40))
    refused(path, "is no GGUF file")
    path.write_bytes(small.read_bytes()[:-40])
    refused(path, "is truncated or damaged")
    path.write_bytes(small.read_bytes() + bytes(40))
    refused(path, "is truncated or damaged")
    path.write_bytes(b"GGUF" + struct.pack("<I", 0x03000000) + bytes(40))
    refused(path, "GGUF version 50331648")
