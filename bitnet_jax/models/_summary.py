"""``python -m bitnet_jax inspect`` of a checkpoint: what it holds, by its headers.

Nothing but config.json, the headers of safetensors files or the metadata of a GGUF file
is read; of a file of ``Decoder.save``, its header. Whether float weights lie on a ternary
grid is in their data, and so is not said.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bitnet_jax._display import size_text, table
from bitnet_jax._quantize.config import Int8Config, KernelConfig, TernaryConfig, planes_of
from bitnet_jax.io import _inspect
from bitnet_jax.io._chunks import Source
from bitnet_jax.io._gguf import Gguf
from bitnet_jax.io._huggingface import Folder
from bitnet_jax.io._manifest import Leaf
from bitnet_jax.io._source import kind_of
from bitnet_jax.io._tensors import name_of
from bitnet_jax.models import (
    _gguf_tokenizer,
    _load_folder,
    _load_gguf,
    _names,
    _published,
    _saved,
)
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._text import TOKENIZER

_COLUMNS = ("kernel", "tensors", "shape", "kind", "stored as", "scales", "bytes", "bits/weight")

_SAID = {
    "multiply": ("ternary", "2 bits", "one for a tensor"),
    "divide": ("ternary", "2 bits", "one for a tensor, as 1/s"),
    "online": ("ternary", "", "one for a tensor, when loaded"),
    "float": ("float", "", ""),
}

_UNSEEN = "; floats on a ternary grid are found when they are read"


class _Stored(NamedTuple):
    """One kernel, embedding or head as a checkpoint stores it.

    Attributes:
      path: of this library; layers are ``*``.
      shape: (in, out), or (vocabulary, features).
      kind: ``"ternary"`` or ``"float"``, as it is run.
      form: the bits, or the name of the type.
      scales: how many share one; empty: none.
      nbytes: with its scales.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    form: str
    scales: str
    nbytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def inspect(path: str) -> int:
    """Prints what a folder, a GGUF file or a file of this library holds; returns the exit code."""
    kind = kind_of(path)
    # A folder of anything else is told what a checkpoint's folder has.
    texts = {"folder": _of_folder, "gguf": _of_gguf}
    if kind in texts:
        return _inspect.report(lambda: texts[kind](path))
    return _inspect.inspect(path, _of_saved)


def _of_folder(path: str) -> str:
    folder = Folder("inspect", path)
    content = folder.json("config.json")
    name, _ = _published.architecture(content)
    config = _published.decoder_config(content)
    says = _load_folder.quantization_of(folder, content, None)
    tensors = _load_folder.canonical_names(folder)
    rows = list(_folder_rows(tensors, config, says))
    text = _load_folder.text_of(folder, content, config.vocabulary)
    return _page(
        rows,
        {
            "architecture": name,
            **_shape(config),
            "quantization": says.said + (_UNSEEN if says.stored == "float" else ""),
            **_sizes(rows),
            "bytes": f"{sum(a.nbytes for a in tensors.values()):,} in {len(tensors)} tensors",
            **_tokens(folder.has(TOKENIZER), text.has_template),
        },
    )


def _folder_rows(
    tensors: Mapping[str, Any], config: DecoderConfig, says: _published.Quantization
) -> Iterator[_Stored]:
    kernels = [(p, n, (i, o)) for p, n, i, o, _ in _names.projections(config)]
    rows, width = config.vocabulary, config.width
    kernels.append(("embed", "model.embed_tokens", (rows, width)))
    if not config.tied:
        kernels.append(("head", "lm_head", (width, rows)))
    for path, name, shape in kernels:
        array = _tensor(tensors, f"{name}.weight")
        kind, form, scales = _SAID["float" if path == "embed" else says.of(name)]
        nbytes = array.nbytes
        if f"{name}.weight_scale" in tensors:
            nbytes += tensors[f"{name}.weight_scale"].nbytes
        yield _Stored(path, shape, kind, form or array.dtype.name, scales, nbytes)


def _tensor(tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise ValueError(
            f"inspect: the checkpoint has no {name!r}, which its config asks for. Download all of "
            "its files."
        )
    return tensors[name]


def _of_gguf(path: str) -> str:
    file = Gguf("inspect", path)
    config = _load_gguf.decoder_config(file)
    rows = list(_gguf_rows(file, config))
    nbytes = sum(tensor.nbytes for tensor in file.values())
    text = _gguf_tokenizer.text_of(file, config.vocabulary)
    return _page(
        rows,
        {
            "architecture": f"{file.metadata['general.architecture']} (GGUF)",
            **_shape(config),
            "quantization": ", ".join(sorted({row.form for row in rows})),
            **_sizes(rows),
            "bytes": f"{nbytes:,} in {len(file)} tensors",
            **_tokens(text.has_tokenizer, text.has_template),
        },
    )


def _gguf_rows(file: Gguf, config: DecoderConfig) -> Iterator[_Stored]:
    names = [(p, f"{_load_gguf.name_of(p)}.weight") for p, *_ in _names.projections(config)]
    names.append(("embed", "token_embd.weight"))
    if not config.tied:
        names.append(("head", "output.weight"))
    for path, name in names:
        tensor = _tensor(file, name)
        shape = tensor.shape if path == "embed" else tensor.shape[::-1]
        block = tensor.block
        kind = "float" if block.ternary is None else "ternary"
        scales = f"one for each {block.length} inputs" if block.length > 1 else ""
        yield _Stored(path, shape, kind, block.name, scales, tensor.nbytes)


def _of_saved(leaves: list[Leaf], source: Source) -> str | None:
    """The page of a decoder in a file of this library; None where it holds other parameters."""
    found = _saved.described(source.header.metadata)
    if found is None:
        return None
    config, origin = found
    named = {name_of(leaf.path): leaf for leaf in leaves}
    rows = list(_saved_rows(named, source, config))
    names = origin.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    lines = {
        "architecture": name or "Decoder",
        **_shape(config),
        "quantization": ", ".join(sorted({f"{row.kind} as {row.form}" for row in rows})),
        **_sizes(rows),
        **_tokens(f"files/{TOKENIZER}" in named, "files/chat_template.jinja" in named),
    }
    if "files/chat_template.jinja" not in named and "files/tokenizer_config.json" in named:
        lines["text"] = lines["text"].replace(
            "no chat template", "a chat template if tokenizer_config.json, not read, has one"
        )
    totals = _inspect.totals(leaves, source)
    return _page(rows, lines | {k: v for k, v in totals.items() if k not in lines})


def _saved_rows(
    leaves: Mapping[str, Leaf], source: Source, config: DecoderConfig
) -> Iterator[_Stored]:
    shapes = {p: (n_in, n_out) for p, _, n_in, n_out, _ in _names.projections(config)}
    shapes["embed"] = config.vocabulary, config.width
    shapes["head"] = config.width, config.vocabulary
    for place, path in _saved.places(config):
        leaf = leaves.get(f"params/{place}")
        if leaf is None or leaf.described.get("shape") != list(shapes[path]):
            raise ValueError(
                f"inspect: the file has no {place!r} of shape {shapes[path]}, which its decoder's "
                "config asks for. Write it again with Decoder.save."
            )
        runs_as = config.kernel(_saved.kernel_name(path))
        kind = {TernaryConfig: "ternary", Int8Config: "int8"}.get(type(runs_as), "float")
        scales = "" if runs_as is None else _scales(runs_as)
        if runs_as is not None and leaf.described["kind"] == "array":
            scales += ", when run"
        nbytes = _inspect.stored_bytes(leaf, source)
        yield _Stored(path, shapes[path], kind, _inspect.stored_as(leaf), scales, nbytes)


def _scales(config: KernelConfig) -> str:
    """How many weights share a scale, and what else there is to a config."""
    per = config.granularity if isinstance(config, TernaryConfig) else "channel"
    planes = planes_of(config)
    of = "" if planes == 1 else f", in {planes} planes"
    of += "" if config.rotation is None else ", rotated"
    if isinstance(per, int):
        return f"one for each {per} inputs{of}"
    return f"one for a tensor{of}" if per == "tensor" else f"one for each output{of}"


def _shape(config: DecoderConfig) -> dict[str, str]:
    head = "tied head" if config.tied else "a head of its own"
    heads = f"{config.heads} heads, {config.kv_heads} of keys and values, {config.head_dim} wide"
    return {
        "layers": f"{config.depth}, width {config.width}, hidden {config.hidden}",
        "attention": f"{heads}, context {config.context:,}",
        "vocabulary": f"{config.vocabulary:,}, {head}",
    }


def _sizes(rows: list[_Stored]) -> dict[str, str]:
    """Counts of what is ternary, and bits a weight."""
    ternary = [row for row in rows if row.kind == "ternary"]
    weights = sum(row.weights for row in rows)
    lines = {"ternary kernels": f"{len(ternary)} of {len(rows)}"}
    if ternary:
        share = sum(row.weights for row in ternary)
        lines["ternary kernels"] += f", {share:,} weights at {_bits(ternary)} bits"
    lines["parameters"] = f"{weights:,} at {_bits(rows)} bits, norms and biases not counted"
    return lines


def _bits(rows: list[_Stored]) -> str:
    return f"{8 * sum(row.nbytes for row in rows) / sum(row.weights for row in rows):.2f}"


def _tokens(tokenizer: bool, template: bool) -> dict[str, str]:
    found = "tokenizer" if tokenizer else "no tokenizer: token ids in, token ids out"
    return {"text": f"{found}, {'a' if template else 'no'} chat template"}


def _page(rows: list[_Stored], lines: dict[str, str]) -> str:
    """The table, one row for kernels that are alike in all layers, and lines below it."""
    alike: dict[_Stored, list[_Stored]] = collections.defaultdict(list)
    for row in rows:
        starred = row._replace(path=re.sub(r"/\d+/", "/*/", row.path))
        alike[starred].append(row)
    cells = [
        (
            one.path,
            str(len(group)),
            "x".join(map(str, one.shape)),
            one.kind,
            one.form,
            one.scales,
            size_text(sum(row.nbytes for row in group)),
            _bits(group),
        )
        for one, group in alike.items()
    ]
    if "data" not in lines:
        lines = lines | {"data": "not read; python -m bitnet_jax generate or convert reads it"}
    return f"{table(_COLUMNS, cells)}\n\n{_inspect.aligned(lines)}"
