"""Folders as Hugging Face publishes them, written one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from bitnet_jax import _checks
from bitnet_jax.io import _safetensors
from bitnet_jax.io._huggingface import CONFIG, INDEX, WHOLE, Lazy, Published

_WHO = "export_huggingface"


def export_huggingface(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    layout: Literal["bitlinear", "autobitlinear"] = "bitlinear",
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Writes a decoder as a folder that transformers loads and runs.

    Ternary kernels are packed as BitNet checkpoints are, four codes to a byte, and
    :meth:`bitnet_jax.models.Decoder.from_pretrained` gives back the same bits. What is
    float stays float, in the decoder's ``param_dtype``. Tokenizer files are passed through.
    The config is written last: a folder that has one is whole. Stacked layers are written one
    by one. A decoder with MiniCPM's multipliers becomes a MiniCPM folder, which transformers
    runs by its publisher's code.

    Args:
      model: a ``bj.models.Decoder``, packed or not.
      directory: the folder; it is made, and must not hold weights.
      layout: how the scale s of a kernel is stored. ``"bitlinear"``: 1/s, which
        transformers divides by; it loads such a file in any dtype and saves it again.
        ``"autobitlinear"``: s, which it multiplies by.
      shard_bytes: a file is begun when the one before has so many bytes of tensors.
      progress: called with the part that is written, 0 to 1.

    Raises:
      FileExistsError: the folder holds weights.
      NotImplementedError: a decoder that no architecture of transformers computes.
      TypeError: another kind of model; prepared or int8 kernels.
      ValueError: outputs that are no multiple of four; a tensor with NaN or Inf, by its name.

    Example:
      >>> import os, tempfile, bitnet_jax as bj
      >>> from flax import nnx
      >>> config = bj.models.DecoderConfig(vocabulary=64, width=32, hidden=64, depth=1)
      >>> model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     bj.io.export_huggingface(model, folder)
      ...     sorted(os.listdir(folder))
      ['config.json', 'model.safetensors']
    """
    _checks.require_one_of(_WHO, "layout", layout, ("bitlinear", "autobitlinear"))
    _checks.require_positive(_WHO, "shard_bytes", shard_bytes)
    if not callable(getattr(model, "published", None)):
        raise TypeError(
            f"{_WHO}: `model` must be a bj.models.Decoder, got {type(model).__name__}. Save other "
            "models with bj.io.save."
        )
    content: Published = model.published(layout)
    folder = os.fspath(directory)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise FileExistsError(f"{_WHO}: {folder!r} is a file. Name a folder.")
    os.makedirs(folder, exist_ok=True)
    there = [n for n in sorted(os.listdir(folder)) if n.endswith((".safetensors", ".bin", INDEX))]
    if there:
        raise FileExistsError(
            f"{_WHO}: {folder!r} holds {there[0]} already. Name an empty folder, or remove it."
        )
    tensors = dict(_counted(content.tensors, progress))
    _write_tensors(folder, tensors, content.metadata, shard_bytes)
    for name, source in content.files.items():
        _write_file(os.path.join(folder, name), source)
    _write_file(os.path.join(folder, CONFIG), json.dumps(content.config, indent=2) + "\n")


def _counted(
    tensors: Mapping[str, Lazy], progress: Callable[[float], None]
) -> Iterator[tuple[str, Lazy]]:
    """The tensors, each of which says when it is made what part of all bytes that makes."""
    whole, done = sum(lazy.nbytes for lazy in tensors.values()), 0

    def made(lazy: Lazy) -> np.ndarray:
        nonlocal done
        array, done = lazy.make(), done + lazy.nbytes
        progress(done / whole)
        return array

    for name, lazy in tensors.items():
        yield name, lazy._replace(make=lambda lazy=lazy: made(lazy))


def _write_tensors(
    folder: str, tensors: Mapping[str, Lazy], metadata: Mapping[str, str], most: int
) -> None:
    shards: list[dict[str, Lazy]] = [{}]
    for name, lazy in tensors.items():
        have = sum(one.nbytes for one in shards[-1].values())
        if have and have + lazy.nbytes > most:
            shards.append({})
        shards[-1][name] = lazy
    if len(shards) == 1:
        _write_shard(os.path.join(folder, WHOLE), shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(os.path.join(folder, file), shard, metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(lazy.nbytes for lazy in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_file(os.path.join(folder, INDEX), json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(path: str, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    """One safetensors file; no more than one tensor is in memory."""
    described = {n: (_safetensors.TAGS[t.dtype.name], t.shape) for n, t in tensors.items()}
    entries = _safetensors.lay_out(described)
    header: dict[str, Any] = {_safetensors.METADATA: dict(metadata)}
    for name, entry in entries.items():
        header[name] = {"dtype": entry.tag, "shape": entry.shape, "data_offsets": entry[2:]}
    text = _safetensors.canonical_json(header).encode()
    text += b" " * (-(8 + len(text)) % _safetensors.ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            array = np.ascontiguousarray(tensors[name].make())
            assert array.shape == entry.shape
            file.write(array.view(np.uint8).reshape(-1).data)


def _write_file(path: str, source: str | bytes | tuple[str, str]) -> None:
    """A text, bytes, or a copy of a file where that is there."""
    if not isinstance(source, tuple):
        with open(path, "wb") as file:
            file.write(source.encode() if isinstance(source, str) else source)
        return
    old = os.path.join(*source)
    if os.path.exists(old):
        shutil.copyfile(old, path)
