"""A decoder in one file: its parameters, packed kernels included, config and tokenizer.

The file is one of ``bj.io.save``, whose digest covers all of it. The tree has
``params``, layer by layer, and ``files``, the checkpoint's text files as bytes. The
metadata has one key more, ``decoder``: the config, and what config.json said, as JSON.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from bitnet_jax import _checks
from bitnet_jax._packed.kernel import is_stored
from bitnet_jax._packed.pack import require_one_plane, unpack
from bitnet_jax._packed.static_data import decoded, encoded
from bitnet_jax._quantize.int8 import ActivationConfig, Int8Config
from bitnet_jax._quantize.ternary import TernaryConfig
from bitnet_jax.io import _chunks, _file
from bitnet_jax.io._huggingface import json_object
from bitnet_jax.io._safetensors import FormatError, canonical_json, parse_json
from bitnet_jax.models import _kernels, _names
from bitnet_jax.models._decoder_config import DecoderConfig
from bitnet_jax.models._kernels import Kernel
from bitnet_jax.models._keys import WHO
from bitnet_jax.models._load_folder import text_of
from bitnet_jax.models._pretrained import (
    Options,
    Origin,
    Pretrained,
    held,
    refuse_leaf,
    unstacked,
)
from bitnet_jax.models._report import LoadedKernel, LoadReport
from bitnet_jax.models._rope import Rope

KEY = "decoder"  # of the metadata

_KINDS = {k.__name__: k for k in (DecoderConfig, Rope, TernaryConfig, Int8Config, ActivationConfig)}


def save(
    model: Any, path: str | os.PathLike[str], dense: bool, progress: Callable[[float], None]
) -> None:
    """Writes a decoder; :func:`load` gives back the same bits."""
    remedy = "Name a file, by convention *.bitnet.safetensors."
    _checks.require_instance("save", "path", path, (str, os.PathLike), remedy)
    tree: dict[str, Any] = {"params": unflatten_dict(unstacked(model), sep="/")}
    texts = dict(_texts(model))
    if texts:
        tree["files"] = {n: np.frombuffer(t, np.uint8) for n, t in texts.items() if t}
    config = dataclasses.replace(model.config, scan=False)
    says = {"config": encoded(config), "origin": model.origin.config}
    notes = {KEY: canonical_json(says)}
    _file.write(path, tree, dense=dense, notes=notes, progress=progress)


def _texts(model: Any) -> Iterator[tuple[str, bytes]]:
    """The files that come with a decoder, byte for byte; a folder's are read."""
    for name, source in model.origin.files(model.text).items():
        if isinstance(source, tuple):
            if os.path.exists(file := os.path.join(*source)):
                with open(file, "rb") as opened:
                    yield name, opened.read()
        else:
            yield name, source.encode() if isinstance(source, str) else source


def described(metadata: Mapping[str, str]) -> tuple[DecoderConfig, dict[str, Any]] | None:
    """The config in a file's metadata, and what its config.json said; None: no decoder's."""
    if KEY not in metadata:
        return None
    try:
        says = parse_json(metadata[KEY])
        config, origin = decoded(_usable(says["config"]), _KINDS), says["origin"]
        if not isinstance(config, DecoderConfig) or not isinstance(origin, dict):
            raise TypeError("another kind of value")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"describes no decoder that this version reads ({error!r:.200}). Update bitnet_jax, "
            "or write it again with Decoder.save."
        ) from None
    return config, origin


def _usable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stored config without a tied decoder's ``head``, which earlier versions let through."""
    fields = config[DecoderConfig.__name__]
    unused = {"head": None} if fields.get("tied") else {}
    return {DecoderConfig.__name__: {**fields, **unused}}


@dataclasses.dataclass(frozen=True)
class _Files:
    """The text files in a file."""

    path: str
    content: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return name in self.content

    def text(self, name: str) -> str:
        try:
            return self.bytes(name).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{WHO}: {name!r} in {self.path!r} is no UTF-8 text ({error.reason} at byte "
                f"{error.start}). Convert the checkpoint again, without it."
            ) from None

    def bytes(self, name: str) -> bytes:
        """A file's content, which may be no text."""
        return np.asarray(self.content[name]).tobytes()

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
        count = sum(bool(leaf.parts) for leaf in _file.declared(source.header))
        found = described(source.header.metadata)
    if found is None:
        raise ValueError(
            f"{WHO}: {path!r} holds parameters and no decoder's config. Load it with bj.io.load, "
            "into the model that it was saved from; Decoder.save writes both."
        )
    config, origin = found
    reading = _Reading(config, options, count)
    everything = _file.load_each(WHO, path, reading.each)
    leaves = {_joined(p): leaf for p, leaf in everything.items() if p[0] == "params"}
    texts = {_joined(p): leaf for p, leaf in everything.items() if p[0] == "files"}
    files = _Files(path, texts)
    text = text_of(files, origin, config.vocabulary)
    says = Origin(origin, texts={name: files.bytes(name) for name in texts})
    return Pretrained(reading.config(), leaves, reading.report(), text, says)


def _joined(path: Sequence[str | int]) -> str:
    return "/".join(map(str, path[1:]))


class _Reading:
    """Takes leaves as they come, into the dtype and the form that a caller asked for."""

    def __init__(self, config: DecoderConfig, options: Options, count: int):
        self._count, self._read = count, 0  # leaves
        self._dtype = options.dtype or config.dtype
        self._config = config
        self._options = dataclasses.replace(options, dtype=options.dtype or config.param_dtype)
        self._places = dict(places(config))
        self._made: dict[str, Kernel] = {}
        self._rows: dict[str, LoadedKernel] = {}

    def each(self, path: Sequence[str | int], leaf: Any) -> Any:
        """A leaf as the decoder holds it; what is no parameter stays."""
        self._read += 1
        self._options.progress(self._read / self._count)
        if path[0] != "params":
            return leaf
        place = _joined(path)
        if place in self._places:
            name = self._places[place]
            asked = self._config.kernel(kernel_name(name))
            kernel = _kernel(place, leaf, asked, self._options, tied=self._config.tied)
            self._made[place] = kernel._replace(value=None)
            self._rows[place] = _kernels.row(name, place, kernel)
            leaf = kernel.value
        return held(place, leaf, self._options)

    def config(self) -> DecoderConfig:
        """The config of what was made."""
        options = self._options
        for place in self._places:
            if place not in self._made:
                refuse_leaf(place, "is missing")
        kinds = {
            kernel_name(name): self._made[place].config for place, name in self._places.items()
        }
        inner = {path: k for path, k in kinds.items() if path not in ("head", "embedding")}
        activations = _kernels.activations(options, self._config.activations, inner)
        return dataclasses.replace(
            self._config,
            **_kernels.decided(inner),
            activations=activations,
            embedding=kinds["embedding"],
            head=kinds.get("head"),
            dtype=self._dtype,
            param_dtype=options.dtype,
            scan=bool(options.scan),
        )

    def report(self) -> LoadReport:
        """What became of each kernel."""
        return LoadReport(tuple(self._rows[place] for place in self._places))


def kernel_name(path: str) -> str:
    """What a config calls a kernel."""
    return "embedding" if path == "embed" else path


def places(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    """The path of every kernel's parameter, and of the kernel."""
    for path, *_ in _names.projections(config):
        yield f"{path}/linear/kernel", path
    yield "embed/embedding", "embed"
    if not config.tied:
        yield "head/kernel", "head"


def _kernel(place: str, value: Any, config: Any, options: Options, *, tied: bool) -> Kernel:
    """One kernel in the form that was asked for."""
    if is_stored(value):
        if options.packed:
            return Kernel(dataclasses.replace(value, dtype=options.dtype), config, "as saved")
        # The floats that this config quantises to the same codes and scales.
        require_one_plane(WHO, place, value)
        return Kernel(unpack(value, options.dtype), config, "as saved")
    whole = place == "embed/embedding"
    outer = place == "head/kernel" or (whole and tied)
    asked = options.head if outer else None if whole else options.weights
    if config is not None or asked is None:
        return Kernel(value, config, "as saved")
    stored = np.asarray(value).astype(options.dtype)
    make = _kernels.table if whole else _kernels.from_floats
    kernel = make(place, stored if whole else stored.T, asked, packed=options.packed)
    return kernel._replace(why=kernel.why or "asked for")
