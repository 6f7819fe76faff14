"""A decoder in one file: its parameters, packed kernels included, config and tokenizer.

The file is one of ``bj.io.save``, whose digest covers all of it. The tree has
``params``, layer by layer, and ``files``, the checkpoint's text files as bytes. The
metadata has one key more, ``decoder``: the config, and what config.json said, as JSON.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bitnet_jax import _checks
from bitnet_jax._packed.kernel import is_stored
from bitnet_jax._packed.static_data import decoded, encoded
from bitnet_jax._quantize.int8 import INT8, ActivationConfig, Int8Config
from bitnet_jax._quantize.ternary import TernaryConfig
from bitnet_jax.io import _chunks, _file
from bitnet_jax.io._huggingface import json_object
from bitnet_jax.io._safetensors import FormatError, canonical_json, parse_json
from bitnet_jax.models import _kernels, _names
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._kernels import Kernel
from bitnet_jax.models._load_folder import text_of
from bitnet_jax.models._pretrained import (
    DECLARED,
    Options,
    Origin,
    Pretrained,
    cast,
    refuse_leaf,
    unstacked,
)
from bitnet_jax.models._published import WHO
from bitnet_jax.models._report import LoadReport
from bitnet_jax.models._rope import Rope

KEY = "decoder"  # of the metadata

_KINDS = {k.__name__: k for k in (DecoderConfig, Rope, TernaryConfig, Int8Config, ActivationConfig)}


def save(model: Any, path: str | os.PathLike[str], dense: bool) -> None:
    """Writes a decoder; :func:`load` gives back the same bits."""
    remedy = "Name a file, by convention *.bitnet.safetensors."
    _checks.require_instance("save", "path", path, (str, os.PathLike), remedy)
    tree: dict[str, Any] = {"params": nested(unstacked(model))}
    texts = dict(_texts(model))
    if texts:
        tree["files"] = {n: np.frombuffer(t.encode(), np.uint8) for n, t in texts.items() if t}
    config = dataclasses.replace(model.config, scan=False)
    says = {"config": encoded(config), "origin": model.origin.config}
    _file.write(path, tree, dense=dense, notes={KEY: canonical_json(says)})


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as dicts of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _texts(model: Any) -> Iterator[tuple[str, str]]:
    """The text files that come with a decoder; a folder's are read."""
    for name, source in model.origin.files(model.text).items():
        if isinstance(source, str):
            yield name, source
        elif os.path.exists(file := os.path.join(*source)) and not name.endswith(".model"):
            with open(file, encoding="utf-8") as opened:
                yield name, opened.read()


def described(metadata: Mapping[str, str]) -> tuple[DecoderConfig, dict[str, Any]] | None:
    """The config in a file's metadata, and what its config.json said; None: no decoder's."""
    if KEY not in metadata:
        return None
    try:
        says = parse_json(metadata[KEY])
        config, origin = decoded(says["config"], _KINDS), says["origin"]
        if not isinstance(config, DecoderConfig) or not isinstance(origin, dict):
            raise TypeError("another kind of value")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"describes no decoder that this version reads ({error!r:.200}). Update bitnet_jax, "
            "or write it again with Decoder.save."
        ) from None
    return config, origin


@dataclasses.dataclass(frozen=True)
class _Files:
    """The text files in a file."""

    path: str
    content: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return name in self.content

    def text(self, name: str) -> str:
        return np.asarray(self.content[name]).tobytes().decode()

    def json(self, name: str, *, needed: bool = True) -> dict[str, Any]:
        del needed
        return json_object(WHO, name, lambda: self.text(name)) if self.has(name) else {}


def load(path: str | os.PathLike[str], options: Options) -> Pretrained:
    """Reads a file of :func:`save`: config, leaves, report and tokenizer."""
    path = os.fspath(path)
    if options.quantization_config is not None:
        raise ValueError(
            f"{WHO}: `quantization_config` is for folders; {path!r} says of each kernel how it is "
            "stored. Leave it out."
        )
    with _chunks.open_source(WHO, path) as source:
        _file.declared(source.header)
        found = described(source.header.metadata)
    if found is None:
        raise ValueError(
            f"{WHO}: {path!r} holds parameters and no decoder's config. Load it with bj.io.load, "
            "into the model that it was saved from; Decoder.save writes both."
        )
    config, origin = found
    tree = _file.load(path)
    leaves = dict(_flat((), tree.get("params", {})))
    options.progress(1.0)
    leaves, config, report = _as_asked(leaves, config, options)
    files = _Files(path, tree.get("files", {}))
    text = text_of(files, origin, config.vocabulary)
    texts = {name: files.text(name) for name in files.content}
    return Pretrained(config, leaves, report, text, Origin(origin, texts=texts))


def _flat(path: tuple[str, ...], node: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield "/".join(path), node
        return
    for key, value in node.items():
        yield from _flat((*path, str(key)), value)


def _as_asked(
    leaves: dict[str, Any], config: DecoderConfig, options: Options
) -> tuple[dict[str, Any], DecoderConfig, LoadReport]:
    """Leaves in the dtype and the form that a caller asked for, and the config of these."""
    leaves = cast(leaves, options.dtype)
    rows, kinds = [], {}
    for path, place in _places(config):
        if place not in leaves:
            refuse_leaf(place, "is missing")
        kind = "embedding" if path == "embed" else path
        kernel = _kernel(place, leaves[place], config.kernel(kind), options)
        leaves[place], kinds[kind] = kernel.value, kernel.config
        rows.append(_kernels.row(path, place, kernel))
    inner = {path: k for path, k in kinds.items() if path not in ("head", "embedding")}
    activations = INT8 if options.weights is not None else config.activations
    config = dataclasses.replace(
        config,
        **_kernels.decided(inner),
        activations=activations if options.activations == DECLARED else options.activations,
        embedding=kinds.get("embedding"),
        head=kinds.get("head"),
        dtype=options.dtype,
        param_dtype=options.dtype,
        scan=options.scan,
    )
    return leaves, config, LoadReport(tuple(rows))


def _places(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    """The path of every kernel, and of its parameter."""
    for path, *_ in _names.projections(config):
        yield path, f"{path}/linear/kernel"
    yield "embed", "embed/embedding"
    if not config.tied:
        yield "head", "head/kernel"


def _kernel(place: str, value: Any, config: Any, options: Options) -> Kernel:
    """One kernel in the form that was asked for."""
    if is_stored(value):
        if options.packed:
            return Kernel(dataclasses.replace(value, dtype=options.dtype), config, "as saved")
        return Kernel(value.dequantize(options.dtype), config, "as saved")
    whole = place == "embed/embedding"
    outer = whole or place == "head/kernel"
    asked = options.head if outer else options.weights
    if config is not None or asked is None:
        return Kernel(value, config, "as saved")
    stored = np.asarray(value)
    make = _kernels.table if whole else _kernels.from_floats
    kernel = make(place, stored if whole else stored.T, asked, packed=options.packed)
    return kernel._replace(why=kernel.why or "asked for")
