"""A published folder as a decoder's config and leaves.

Every tensor of the checkpoint is used, or is one that is known to carry nothing, or the
checkpoint is refused: a bias, a norm or a head that a config forgets would otherwise be
dropped in silence.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from bitnet_jax._packed.pack import unpack
from bitnet_jax._quantize.int8 import INT8
from bitnet_jax._quantize.ternary import B158, KernelConfig
from bitnet_jax.io._huggingface import Folder
from bitnet_jax.io._safetensors import parse_json
from bitnet_jax.models import _kernels, _names
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._kernels import Kernel
from bitnet_jax.models._keys import WHO, refuse
from bitnet_jax.models._pretrained import Options, Origin, Outline, Pretrained, held
from bitnet_jax.models._published import (
    FLOATS,
    ROUNDING,
    SCALES,
    Quantization,
    Stored,
    decoder_config,
    quantization,
)
from bitnet_jax.models._report import LoadedKernel, LoadReport
from bitnet_jax.models._text import POOLING, TOKENIZER, Text, tokenizer_from


def load(path: str | os.PathLike[str], options: Options) -> Pretrained:
    """Reads a folder: the decoder's config, its leaves by path, and the report."""
    folder = Folder(WHO, path)
    content = folder.json("config.json")
    says = quantization_of(folder, content, options.quantization_config)
    shape = decoder_config(content)
    if shape.tied and says.of("lm_head") != "float":
        refuse(
            "quantization_config.modules_to_not_convert",
            list(says.left or ()),
            "a list with lm_head where tie_word_embeddings is true",
        )
    loader = _Loader(folder, shape, says, options)
    leaves = {path: held(path, leaf, options) for path, leaf in loader.leaves()}
    loader.refuse_rest()
    options.progress(1.0)
    text = text_of(folder, content, shape.vocabulary)
    content = content if text.pooling is None else content | {POOLING: text.pooling}
    return Pretrained(
        loader.final_config(),
        leaves,
        LoadReport(tuple(loader.rows)),
        text,
        Origin(content, folder.path),
    )


def outline(path: str | os.PathLike[str]) -> Outline:
    """What a folder says without its weights."""
    folder = Folder(WHO, path)
    content = folder.json("config.json")
    config = decoder_config(content)
    return Outline(config, text_of(folder, content, config.vocabulary))


def quantization_of(
    folder: Folder, content: Mapping[str, Any], asked: Mapping[str, Any] | None
) -> Quantization:
    """How a folder's linear layers are stored: as asked, as config.json or an export says."""
    if asked is None and folder.metadata.get(FLOATS) == "as they are":
        asked = content.get("quantization_config", {})
    return quantization(content, asked)


@runtime_checkable
class Texts(Protocol):
    """Text files by name, of a folder or of one file that holds them."""

    @property
    def path(self) -> str:
        """Of the folder or the file."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def text(self, name: str) -> str:
        """Its content."""
        ...

    def json(self, name: str, *, needed: bool = True) -> dict[str, Any]:
        """Its content as a JSON object; empty where it is not there and not needed."""
        ...


def text_of(files: Texts, content: Mapping[str, Any], vocabulary: int) -> Text:
    """The tokenizer, chat template and stop tokens of a folder; none of them has to be there."""
    says = files.json("tokenizer_config.json", needed=False)
    stops: set[int] = set()
    for given in (content, files.json("generation_config.json", needed=False)):
        eos = given.get("eos_token_id")
        for one in eos if isinstance(eos, list) else [eos]:
            if isinstance(one, int) and not isinstance(one, bool):
                stops.add(one)
    tokens = {}
    for key, value in says.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    file = os.path.join(files.path, TOKENIZER)
    return Text(
        vocabulary,
        frozenset(stops),
        (lambda: tokenizer_from(file, files.text(TOKENIZER))) if files.has(TOKENIZER) else None,
        _template(files, says),
        tokens,
        f"{files.path!r} has no {TOKENIZER}",
        _pooling(files, content),
    )


def _pooling(files: Texts, content: Mapping[str, Any]) -> str | None:
    """What sentence-transformers makes vectors by, where it is not the last token alone."""
    if isinstance(content.get(POOLING), str):
        return content[POOLING]
    says = files.json("1_Pooling/config.json", needed=False)
    modes = {key for key, on in says.items() if key.startswith("pooling_mode_") and on is True}
    if says.get("pooling_mode"):  # of newer versions
        modes = {f"pooling_mode {says['pooling_mode']!r:.50}"} - {"pooling_mode 'lasttoken'"}
    dense = [f"{n}_Dense" for n in (2, 3) if files.has(f"{n}_Dense/config.json")]
    return ", ".join([*sorted(modes - {"pooling_mode_lasttoken"}), *dense]) or None


def _template(files: Texts, says: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or in tokenizer_config.json, alone or by name."""
    if files.has("chat_template.jinja"):
        return files.text("chat_template.jinja")
    given = says.get("chat_template")
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


class _Loader:
    """Reads tensors by name, notes which were used, and decides every kernel's form."""

    def __init__(self, folder: Folder, config: DecoderConfig, says: Quantization, options: Options):
        self.config, self.says, self.options = config, says, options
        self.tensors = canonical_names(folder)
        self.used: set[str] = set()
        self.rows: list[LoadedKernel] = []
        self.kinds: dict[str, KernelConfig | None] = {}
        self.scales = _exact_scales(folder.metadata)
        self.rounding = folder.metadata.get(ROUNDING)

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every parameter of the decoder, by path."""
        for path, name, n_in, n_out, bias in _names.projections(self.config):
            yield from self._projection(path, name, n_in, n_out, bias)
            self.options.progress(len(self.used) / len(self.tensors))
        for path, name, length in _names.norms(self.config):
            yield f"{path}/scale", self._vector(f"{name}.weight", length)
        yield "embed/embedding", self._table()
        if not self.config.tied:
            yield from self._projection(
                "head", "lm_head", self.config.width, self.config.vocabulary, False
            )

    def take(self, name: str) -> np.ndarray:
        """A tensor that has to be there."""
        if name not in self.tensors:
            raise ValueError(
                f"{WHO}: the checkpoint has no {name!r}, which config.json asks for. Download "
                "all of its files."
            )
        self.used.add(name)
        return self.tensors[name]

    def _vector(self, name: str, length: int, times: np.float32 | None = None) -> Any:
        array = self.take(name)
        _kernels.require_floats(name, array, "a vector")
        _kernels.require_shape(name, array, (length,))
        if times is not None:  # in float64, where a product of float32 is exact
            array = array.astype(np.float64) * np.float64(times)
        return jnp.asarray(array.astype(np.float32))

    def _projection(
        self, path: str, name: str, n_in: int, n_out: int, has_bias: bool
    ) -> Iterator[tuple[str, Any]]:
        """The kernel, bias and norm of one linear layer, by path."""
        stored = self.says.of(name)
        where = path if path == "head" else f"{path}/linear"
        if stored in ("multiply", "divide"):
            kernel, scale = self._offline(name, n_in, n_out, stored)
            # The offline autobitlinear adds its bias before it multiplies by the scale.
            scale = scale if stored == "multiply" else None
        else:
            kernel, scale = self._floats(path, name, n_in, n_out, stored), None
        self.kinds[path] = kernel.config
        self.rows.append(_kernels.row(path, f"{name}.weight", kernel))
        yield f"{where}/kernel", kernel.value
        if has_bias:
            yield f"{where}/bias", self._vector(f"{name}.bias", n_out, times=scale)
        if self.says.norm and stored != "float":
            yield f"{path}/norm/scale", self._vector(f"{name}.rms_norm.weight", n_in)

    def _offline(
        self, name: str, n_in: int, n_out: int, stored: Stored
    ) -> tuple[Kernel, np.float32]:
        packed = self.take(f"{name}.weight")
        if f"{name}.weight_scale" not in self.tensors and packed.dtype != np.uint8:
            _kernels.from_offline(f"{name}.weight", packed, np.float32(1), n_in, n_out, np.float32)
        raw = self.take(f"{name}.weight_scale")
        scale = _kernels.scale_of(f"{name}.weight_scale", raw, stored)
        scale = self._exact(name, scale)
        value = _kernels.from_offline(
            f"{name}.weight", packed, scale, n_in, n_out, self.options.dtype
        )
        why = _kernels.oddness_of_codes(f"{name}.weight", value) or self.says.said
        if self.options.packed:
            return Kernel(value, B158, why), scale
        return Kernel(unpack(value), B158, why), scale

    def _exact(self, name: str, scale: np.float32) -> np.float32:
        """A scale as it was before its reciprocal was stored, where the file says so."""
        exact = self.scales.get(name, scale)
        if not abs(exact - scale) <= 2 * np.spacing(scale):
            _kernels.refuse_tensor(
                f"{name}.weight_scale",
                f"means {scale}, and the metadata {exact}",
                "Export the model again.",
            )
        return exact

    def _floats(self, path: str, name: str, n_in: int, n_out: int, stored: Stored) -> Kernel:
        w = self.take(f"{name}.weight")
        _kernels.require_floats(f"{name}.weight", w, self.says.said)
        _kernels.require_shape(f"{name}.weight", w, (n_out, n_in))
        if stored == "online":
            kernel = _kernels.from_floats(name, w, B158, packed=self.options.packed)
            return kernel._replace(why=kernel.why or self.says.said)
        asked = self.options.head if path == "head" else self.options.weights
        # Beside declared kernels, what is left out runs as floats; on a grid it would get their
        # int8 activations.
        if asked is None and self.options.packed and self.says.stored == "float":
            found = _kernels.detect(name, w)
            if found is not None:
                return found
        kernel = _kernels.from_floats(
            name, w.astype(self.options.dtype), asked, packed=self.options.packed
        )
        why = self._why_float() if asked is None else "asked for"
        return kernel._replace(why=kernel.why or why)

    def _why_float(self) -> str:
        if self.says.stored != "float":
            return "in modules_to_not_convert"
        return "floats on no grid" if self.options.packed else "floats"

    def _table(self) -> Any:
        """The embedding, and the head where both are one."""
        config, name = self.config, "model.embed_tokens.weight"
        w = self.take(name)
        _kernels.require_floats(name, w, "the embedding")
        _kernels.require_shape(name, w, (config.vocabulary, config.width))
        if config.tied and "lm_head.weight" in self.tensors:
            self._require_same("lm_head.weight", w)
        asked = self.options.head if config.tied else None
        found = None
        if asked is None and self.options.packed and self.says.stored == "float":
            found = _kernels.detect(name, w)
        if found is not None:
            kernel = found._replace(value=_kernels.turned(found.value))
        else:
            w = w.astype(self.options.dtype)
            kernel = _kernels.table(name, w, asked, packed=self.options.packed)
            why = "floats" if asked is None else "asked for"
            kernel = kernel._replace(why=kernel.why or why)
        self.kinds["embedding"] = kernel.config
        self.rows.append(_kernels.row("embed", name, kernel))
        return kernel.value

    def _require_same(self, name: str, table: np.ndarray) -> None:
        head = self.take(name)
        if head.shape != table.shape or not np.array_equal(head, table):
            raise ValueError(
                f"{WHO}: `tie_word_embeddings` is true, and {name!r} is not the embedding. "
                "Set it to false in config.json if the head is its own."
            )

    def final_config(self) -> DecoderConfig:
        """The config with what was decided of every kernel."""
        options, says = self.options, self.says
        inner = {p: k for p, k in self.kinds.items() if p not in ("head", "embedding")}
        declared = INT8 if says.stored != "float" else None
        activations = _kernels.activations(options, declared, inner)
        rounding = self.rounding or ("input" if says.stored == "divide" else "float32")
        if activations is not None and activations.group is not None:
            rounding = "float32"  # of what is asked for here; BitLinear has one scale per token
        return dataclasses.replace(
            self.config,
            **_kernels.decided(inner),
            activations=activations,
            activation_rounding=rounding,
            projection_norm=says.norm and says.stored != "float",
            projection_norm_eps=says.norm_eps,
            embedding=self.kinds["embedding"],
            head=self.kinds.get("head"),
            dtype=options.dtype,
            param_dtype=options.dtype,
            scan=bool(options.scan),
        )

    def refuse_rest(self) -> None:
        """Refuses tensors that nothing used."""
        unknown = sorted(set(self.scales) - {name.removesuffix(".weight") for name in self.used})
        if unknown:
            _kernels.refuse_tensor(
                f"{unknown[0]}.weight_scale",
                f"is in the metadata ({SCALES}), and there is no such kernel",
                "Export the model again.",
            )
        rest = sorted(n for n in set(self.tensors) - self.used if not n.endswith(".inv_freq"))
        if rest:
            shown = ", ".join(rest[:4]) + (", ..." if len(rest) > 4 else "")
            raise ValueError(
                f"{WHO}: {len(rest)} tensors are not in a decoder of this config: {shown}. "
                "config.json is of another checkpoint, or leaves out a key (use_rms_norm, "
                "attention_bias, tie_word_embeddings)."
            )


def canonical_names(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The tensors by transformers' names, whatever the publisher calls them."""
    names: dict[str, str] = {}
    for name in tensors:
        canonical = name
        for old, new in _names.ALIASES.items():
            canonical = canonical.replace(f"{old}.", f"{new}.")
        if name.startswith(("layers.", "embed_tokens.", "norm.")):  # a model without its head
            canonical = f"model.{canonical}"
        names[canonical] = name
    return _Renamed(tensors, names)


class _Renamed(Mapping[str, np.ndarray]):
    """Tensors under other names; each is still read when it is asked for."""

    def __init__(self, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _exact_scales(metadata: Mapping[str, str]) -> dict[str, np.float32]:
    """Scales that this library exported, to the bit; a reciprocal alone may lose the last one."""
    try:
        given = parse_json(metadata.get(SCALES, "{}"))
        return {name: np.float32(float.fromhex(text)) for name, text in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{WHO}: the files' metadata has a damaged {SCALES!r}. Download or export again."
        ) from None
