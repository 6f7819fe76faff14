"""A GGUF file as a decoder's config and leaves.

What llama.cpp computes for an architecture is what is meant: ``bitnet`` has sub-norms and
SiLU unless ``bitnet.hidden_activation`` says otherwise; ``llama`` holds the rows of
queries and keys for a rotation of neighbours, which are put back here; an output is
multiplied by ``X.scale`` where there is one. It runs ternary TQ1_0 and TQ2_0 with int8
activations for each 256 inputs, here int8 for each token; Q2_0 runs weight-only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from bitnet_jax._packed.stored import PackedTernary
from bitnet_jax._quantize.int8 import INT8
from bitnet_jax._quantize.ternary import KernelConfig
from bitnet_jax.io._gguf import Gguf
from bitnet_jax.models import _codes, _gguf_tokenizer, _grid, _kernels
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._kernels import Kernel
from bitnet_jax.models._keys import ARITHMETIC, WHO, refuse, refuse_unknown
from bitnet_jax.models._names import norms, projections
from bitnet_jax.models._pretrained import Options, Origin, Outline, Pretrained, held
from bitnet_jax.models._report import LoadedKernel, LoadReport
from bitnet_jax.models._rope import Rope
from bitnet_jax.models._text import POOLING

_FLAGS: dict[str, dict[str, Any]] = {
    "bitnet": {"sub_norms": True},
    "llama": {"sub_norms": False},
    "qwen3": {"sub_norms": False, "query_key_norm": True},
}

# Of this library's paths within a layer, and outside.
_NAMES = {
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/out": "attn_output",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention/sub_norm": "attn_sub_norm",
    "mlp/sub_norm": "ffn_sub_norm",
    "attention/query_norm": "attn_q_norm",
    "attention/key_norm": "attn_k_norm",
}


def name_of(path: str) -> str:
    """What a file calls a projection or a norm of a layer."""
    _, layer, inner = path.split("/", 2)
    return f"blk.{layer}.{_NAMES[inner]}"


# Keys that change no number, and the values with which others do not.
_PASSING = {
    "attention.layer_norm_epsilon",  # of models with another norm
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
}
_NEUTRAL = {
    "attention.causal": True,
    "logit_scale": 1,
    "embedding_scale": 1,
    "residual_scale": 1,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
    "rope.scaling.yarn_ext_factor": 1,
}

_INT8_TYPES = ("TQ1_0", "TQ2_0")  # that llama.cpp runs with int8 activations


def load(path: str | os.PathLike[str], options: Options) -> Pretrained:
    """Reads a file: the decoder's config, its leaves by path, the report and the tokenizer."""
    if options.quantization_config is not None:
        raise ValueError(
            f"{WHO}: `quantization_config` is for folders; a GGUF file says of each tensor how it "
            "is stored. Leave it out."
        )
    file = Gguf(WHO, path)
    loader = _Loader(file, options)
    leaves = {path: held(path, leaf, options) for path, leaf in loader.leaves()}
    loader.refuse_rest()
    options.progress(1.0)
    text = _gguf_tokenizer.text_of(file, loader.config.vocabulary)
    origin = Origin({} if text.pooling is None else {POOLING: text.pooling})
    return Pretrained(loader.final_config(), leaves, LoadReport(tuple(loader.rows)), text, origin)


def outline(path: str | os.PathLike[str]) -> Outline:
    """What a file says without its weights."""
    file = Gguf(WHO, path)
    config = decoder_config(file)
    return Outline(config, _gguf_tokenizer.text_of(file, config.vocabulary))


class _Keys:
    """The metadata of an architecture, checked as it is asked for."""

    def __init__(self, file: Gguf):
        self.metadata = file.metadata
        arch = file.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in _FLAGS:
            refuse("general.architecture", arch, f"one of {', '.join(_FLAGS)}")
        self.arch = arch
        self.asked: set[str] = set()

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """A value under the architecture's name; ``...`` as default: it must be there."""
        self.asked.add(key)
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, default)
        if value is ...:
            raise ValueError(f"{WHO}: the file has no `{key}`. Download the model's own file.")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            refuse(key, value, f"a {kind.__name__}")
        return value

    def refuse_rest(self) -> None:
        """Refuses keys under the architecture's name that nothing asked for."""
        start = f"{self.arch}."
        content = {k: v for k, v in self.metadata.items() if k.startswith(start)}
        known = {f"{start}{key}" for key in self.asked | _PASSING}
        neutral = {f"{start}{key}": value for key, value in _NEUTRAL.items()}
        refuse_unknown(content, known, neutral, "the file", ARITHMETIC)


def decoder_config(file: Gguf) -> DecoderConfig:
    """The shape of the decoder that a file's metadata describes."""
    keys = _Keys(file)
    width, heads = keys.get("embedding_length", int), keys.get("attention.head_count", int)
    head_dim = keys.get("attention.key_length", int, None) or width // max(heads, 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, int, head_dim) != head_dim:
            refuse(f"{keys.arch}.{key}", keys.get(key, int), f"the length of a head, {head_dim}")
    if keys.get("expert_count", int, 0):
        refuse(f"{keys.arch}.expert_count", keys.get("expert_count", int), "0")
    activation = keys.get("hidden_activation", str, "silu")
    if activation not in ("silu", "relu2"):
        refuse(f"{keys.arch}.hidden_activation", activation, "silu or relu2")
    table = "token_embd.weight"
    if table not in file or len(file[table].shape) != 2:
        raise ValueError(f"{WHO}: the file has no matrix {table!r}. Download it again.")
    vocabulary = file[table].shape[0]
    said = keys.get("vocab_size", int, vocabulary)
    if said != vocabulary:
        refuse(f"{keys.arch}.vocab_size", said, f"the rows of {table!r}, {vocabulary}")
    config = DecoderConfig(
        vocabulary=vocabulary,
        width=width,
        hidden=keys.get("feed_forward_length", int),
        depth=keys.get("block_count", int),
        heads=heads,
        kv_heads=keys.get("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        context=keys.get("context_length", int),
        rope=_rope(keys, file, head_dim),
        activation="relu2" if activation == "relu2" else "silu",
        attention_bias=any(f"blk.0.attn_{n}.bias" in file for n in ("q", "k", "v", "output")),
        mlp_bias=any(f"blk.0.ffn_{n}.bias" in file for n in ("gate", "up", "down")),
        tied="output.weight" not in file,
        norm_eps=keys.get("attention.layer_norm_rms_epsilon", float),
        **_FLAGS[keys.arch],
    )
    keys.refuse_rest()
    return config


def _rope(keys: _Keys, file: Gguf, head_dim: int) -> Rope:
    theta = keys.get("rope.freq_base", float, 10000.0)
    kind = keys.get("rope.scaling.type", str, "none")
    if "rope_freqs.weight" in file:
        factors = file.floats("rope_freqs.weight").reshape(-1)
        if kind != "none" or len(factors) != head_dim // 2:
            refuse("rope_freqs.weight", factors.shape, f"({head_dim // 2},), with no rope.scaling")
        return Rope(theta, kind="factors", factors=tuple(map(float, factors)))
    if kind == "none":
        return Rope(theta)
    factor = keys.get("rope.scaling.factor", float)
    if kind == "linear":
        return Rope(theta, kind="linear", factor=factor)
    if kind != "yarn":
        refuse(f"{keys.arch}.rope.scaling.type", kind, "none, linear or yarn")
    context = keys.get("rope.scaling.original_context_length", int)
    return Rope(theta, kind="yarn", factor=factor, original_context=context, high=32.0)


class _Loader:
    """Reads tensors by name, notes which were used, and decides every kernel's form."""

    def __init__(self, file: Gguf, options: Options):
        self.file, self.options = file, options
        self.config = decoder_config(file)
        self.neighbours = file.metadata["general.architecture"] == "llama"
        self.used = {"rope_freqs.weight"}
        self.rows: list[LoadedKernel] = []
        self.kinds: dict[str, KernelConfig | None] = {}
        self.types: set[str] = set()

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every parameter of the decoder, by path."""
        for path, _, n_in, n_out, bias in projections(self.config):
            yield from self._projection(path, name_of(path), n_in, n_out, bias)
            self.options.progress(len(self.used) / len(self.file))
        for path, _, length in norms(self.config):
            name = "output_norm" if path == "norm" else name_of(path)
            yield f"{path}/scale", jnp.asarray(self._vector(f"{name}.weight", length))
        yield "embed/embedding", self._table()
        if not self.config.tied:
            sizes = self.config.width, self.config.vocabulary
            yield from self._projection("head", "output", *sizes, False)

    def _has(self, name: str) -> bool:
        return name in self.file

    def _matrix(self, name: str, shape: tuple[int, int]) -> None:
        """Checks that a matrix is there, and marks it as used."""
        if name not in self.file:
            raise ValueError(f"{WHO}: the file has no {name!r}. Download it again.")
        if self.file[name].shape != shape:
            _kernels.refuse_tensor(
                name,
                f"has shape {self.file[name].shape}, and the metadata makes it {shape}",
                "Download it again.",
            )
        self.used.add(name)

    def _vector(self, name: str, length: int) -> np.ndarray:
        if name not in self.file:
            raise ValueError(f"{WHO}: the file has no {name!r}. Download it again.")
        array = self.file.floats(name)
        self.used.add(name)
        _kernels.require_shape(name, array, (length,))
        _kernels.require_floats(name, array, "a vector")
        return array.astype(np.float32)

    def _projection(
        self, path: str, name: str, n_in: int, n_out: int, has_bias: bool
    ) -> Iterator[tuple[str, Any]]:
        self._matrix(f"{name}.weight", (n_out, n_in))
        turned = self.neighbours and path.endswith(("/query", "/key"))
        factor = np.float32(1)
        if self._has(f"{name}.scale"):
            factor = _kernels.scale_of(
                f"{name}.scale", self._vector(f"{name}.scale", 1), "multiply"
            )
        kernel = self._kernel(path, f"{name}.weight", factor, turned)
        self.kinds[path] = kernel.config
        self.rows.append(_kernels.row(path, f"{name}.weight", kernel))
        where = path if path == "head" else f"{path}/linear"
        yield f"{where}/kernel", kernel.value
        if has_bias:
            bias = np.zeros(n_out, np.float32)
            if self._has(f"{name}.bias"):
                bias = self._vector(f"{name}.bias", n_out)
            yield f"{where}/bias", jnp.asarray(self._halves(bias) if turned else bias)

    def _halves(self, rows: np.ndarray) -> np.ndarray:
        """Rows of heads whose pairs are neighbours, as rows whose pairs are half a head apart."""
        dim = self.config.head_dim
        pairs = rows.reshape(-1, dim // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def _kernel(self, path: str, name: str, factor: np.float32, turned: bool) -> Kernel:
        block = self.file[name].block
        options = self.options
        if block.ternary is not None:
            self.types.add(block.name)
            codes, scale = self.file.ternary(name)
            if turned:
                codes, scale = self._halves(codes), self._halves(scale)
            packed = _ternary(name, codes, scale * factor, options.dtype)
            why = _kernels.oddness_of_codes(name, packed) or block.name
            if options.packed:
                return Kernel(packed, packed.config, why)
            return Kernel(packed.dequantize(), packed.config, why)
        w = self.file.floats(name)
        _kernels.require_floats(name, w, block.name)
        w = self._halves(w) if turned else w
        if factor != 1:  # in float32: float16 would round the products, or lose small ones
            w = w.astype(np.float32) * factor
        asked = options.head if path == "head" else options.weights
        kernel = _kernels.from_floats(name, w.astype(options.dtype), asked, packed=options.packed)
        why = block.name if asked is None else f"{block.name}; asked for"
        return kernel._replace(why=kernel.why or why)

    def _table(self) -> Any:
        name, config, options = "token_embd.weight", self.config, self.options
        self._matrix(name, (config.vocabulary, config.width))
        block = self.file[name].block
        asked = options.head if config.tied else None
        if block.ternary is not None and asked is None:
            packed = _ternary(name, *self.file.ternary(name), options.dtype)
            kernel = Kernel(_kernels.turned(packed), packed.config, block.name)
        else:
            w = self.file.floats(name)
            _kernels.require_floats(name, w, block.name)
            kernel = _kernels.table(name, w.astype(options.dtype), asked, packed=options.packed)
            why = block.name if asked is None else f"{block.name}; asked for"
            kernel = kernel._replace(why=kernel.why or why)
        self.kinds["embedding"] = kernel.config
        self.rows.append(_kernels.row("embed", name, kernel))
        return kernel.value

    def final_config(self) -> DecoderConfig:
        """The config with what was decided of every kernel."""
        options = self.options
        inner = {p: k for p, k in self.kinds.items() if p not in ("head", "embedding")}
        declared = INT8 if self.types & {*_INT8_TYPES} else None
        activations = _kernels.activations(options, declared, inner)
        return dataclasses.replace(
            self.config,
            **_kernels.decided(inner),
            activations=activations,
            embedding=self.kinds["embedding"],
            head=self.kinds.get("head"),
            dtype=options.dtype,
            param_dtype=options.dtype,
            scan=bool(options.scan),
        )

    def refuse_rest(self) -> None:
        """Refuses tensors that nothing used."""
        rest = sorted(set(self.file) - self.used)
        if rest:
            shown = ", ".join(rest[:4]) + (", ..." if len(rest) > 4 else "")
            raise ValueError(
                f"{WHO}: {len(rest)} tensors of the file are not in a decoder of its "
                f"architecture: {shown}. It is of a model that this library does not run."
            )


def _ternary(name: str, codes: np.ndarray, scale: np.ndarray, dtype: Any) -> PackedTernary:
    """Codes (out, in) and scales (out, groups) as a packed (in, out) kernel."""
    n_out, n_in = codes.shape
    groups = scale.shape[1]
    zero = scale == 0
    filled = codes.reshape(n_out, groups, -1).any(axis=2)
    if bool((zero & filled).any()):
        _kernels.refuse_tensor(name, "has a scale of 0 over codes", "Download the file again.")
    first = scale.reshape(-1)[np.argmax(~zero.reshape(-1))]
    one = bool((zero | (scale == first)).all())
    config = _grid.config_of("tensor" if one else "channel" if groups == 1 else n_in // groups)
    if one:
        scale = np.full((1, 1), first, np.float32)
    scale = np.where(scale == 0, np.float32(config.eps), scale)
    return PackedTernary(
        jnp.asarray(_codes.pack_rows(codes)),
        jnp.asarray(np.ascontiguousarray(scale.T.astype(np.float32))),
        length=n_in,
        config=config,
        dtype=np.dtype(dtype),
    )
