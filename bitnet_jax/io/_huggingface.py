"""Folders as Hugging Face publishes them: JSON files and safetensors, whole or in shards.

What is read is named arrays, mapped and not copied; what they mean is for
``bitnet_jax.models`` to say. Nothing is executed or unpickled: ``pytorch_model.bin``
is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bitnet_jax.io import _safetensors
from bitnet_jax.io._safetensors import TAGS, FormatError

CONFIG = "config.json"

WHOLE = "model.safetensors"

INDEX = "model.safetensors.index.json"

_ALONE = re.compile(r"(?<!-of-\d{5})\.(?:gguf|safetensors)$", re.IGNORECASE)  # no shard

_MAX_JSON = 64 << 20  # bytes; a tokenizer has about 20 MB

_DTYPES = {tag: jnp.dtype(name) for name, tag in TAGS.items()}


class Lazy(NamedTuple):
    """An array that is made when it is written.

    Attributes:
      shape: of the array.
      dtype: of the array.
      make: makes it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


class Published(NamedTuple):
    """What a folder is to hold.

    Attributes:
      config: the content of config.json.
      tensors: by name.
      metadata: of the safetensors files.
      files: others by name: their text or bytes, or the folder and name of one to copy if there.
    """

    config: dict[str, Any]
    tensors: dict[str, Lazy]
    metadata: dict[str, str]
    files: dict[str, str | bytes | tuple[str, str]]


def json_object(who: str, name: str, text: Callable[[], str]) -> dict[str, Any]:
    """A text as a JSON object; ``name`` is the file that an error names."""
    try:
        content = json.loads(text())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{who}: {name!r} is no JSON ({error}). Download it again.") from None
    if not isinstance(content, dict):
        raise FormatError(f"{who}: {name!r} is no JSON object. Download it again.")
    return content


def _download_of(path: str) -> str:
    """How to download what looks like a name on the Hugging Face hub: owner/name."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", path):
        return ""
    name = path.split("/")[1]
    return f" Nothing is downloaded here: hf download {path} --local-dir {name}, and name {name!r}."


class Folder(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, each a read-only view of its file.

    Attributes:
      path: the folder.
      metadata: the safetensors files' own, merged.
    """

    def __init__(self, who: str, path: str | os.PathLike[str]):
        self.who = who
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            raise FileNotFoundError(
                f"{who}: no folder {self.path!r}. Download a checkpoint there, config.json and "
                f"*.safetensors, or name a .gguf file.{_download_of(self.path)}"
            )
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, tuple[str, _safetensors.Entry, int]] = {}
        files = self._files()
        for name, wanted in files.items():
            self._read_header(name, wanted)

    def __getitem__(self, name: str) -> np.ndarray:
        file, entry, start = self._entries[name]
        dtype = _DTYPES[entry.tag]
        if entry.end == entry.begin:
            return np.zeros(entry.shape, dtype)
        offset = start + entry.begin
        raw = np.memmap(file, np.uint8, "r", offset, (entry.end - entry.begin,))
        # A plain array over the same pages: memmap's own type costs time at every slice.
        return np.asarray(raw).view(dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, name: str) -> bool:
        """Whether the folder has a file."""
        return os.path.exists(os.path.join(self.path, name))

    def text(self, name: str) -> str:
        """The content of a text file of the folder."""
        with open(os.path.join(self.path, name), encoding="utf-8") as file:
            return file.read()

    def json(self, name: str, *, needed: bool = True) -> dict[str, Any]:
        """A JSON file of the folder; empty where it is not there and not needed."""
        file = os.path.join(self.path, name)
        if not self.has(name):
            if not needed:
                return {}
            raise FileNotFoundError(
                f"{self.who}: {self.path!r} has no {name}. Download the whole checkpoint."
            )
        if os.path.getsize(file) > _MAX_JSON:
            raise FormatError(f"{self.who}: {file!r} has more than {_MAX_JSON} bytes.")
        return json_object(self.who, file, lambda: self.text(name))

    def _files(self) -> dict[str, set[str] | None]:
        """The files with tensors, and the names that an index gives to each."""
        if os.path.exists(os.path.join(self.path, INDEX)):
            weight_map = self.json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise FormatError(f"{self.who}: {INDEX} has no weight_map. Download it again.")
            files: dict[str, set[str] | None] = {}
            for name, file in sorted(weight_map.items()):
                if not isinstance(file, str) or os.path.basename(file) != file:
                    raise FormatError(
                        f"{self.who}: {INDEX} says that {name!r} is in {file!r}, which is no "
                        "file of the folder. Download it again."
                    )
                names = files.setdefault(file, set())
                assert names is not None
                names.add(name)
            return files
        if os.path.exists(os.path.join(self.path, WHOLE)):
            return {WHOLE: None}
        there = sorted(os.listdir(self.path))
        said = f"{self.who}: {self.path!r} has neither {WHOLE} nor {INDEX}"
        own = [n for n in there if _ALONE.search(n)]
        if own:
            file = os.path.join(self.path, own[0])
            raise FileNotFoundError(
                f"{said}, and is no folder of a checkpoint. Name one of its files: {file!r}."
            )
        other = next((n for n in there if n.endswith((".bin", ".pt", ".pth"))), None)
        raise FileNotFoundError(
            said
            + (f", only {other}, which this library does not open" if other else "")
            + ". Download the safetensors files of the checkpoint."
        )

    def _read_header(self, name: str, wanted: set[str] | None) -> None:
        file = os.path.join(self.path, name)
        if not os.path.exists(file):
            raise FileNotFoundError(
                f"{self.who}: {self.path!r} has no {name}, a shard that {INDEX} names. Download "
                "the whole checkpoint."
            )
        try:
            with open(file, "rb") as opened:
                header = _safetensors.read_header(opened, os.path.getsize(file))
        except FormatError as error:
            raise FormatError(f"{self.who}: {file!r} {error}") from None
        missing = (wanted or set()) - set(header.tensors)
        if missing:
            raise FormatError(
                f"{self.who}: {file!r} does not hold {min(missing)!r}, which {INDEX} says it "
                "does. Download the whole checkpoint."
            )
        for tensor, entry in header.tensors.items():
            if tensor in self._entries:
                raise FormatError(
                    f"{self.who}: {tensor!r} is in two files of {self.path!r}. Remove the one "
                    "that does not belong to the checkpoint."
                )
            self._entries[tensor] = (file, entry, header.start)
        self.metadata.update(header.metadata)
