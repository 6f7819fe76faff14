"""What kind of checkpoint a path names, told by what is there and not by its name."""

from __future__ import annotations

import os
from typing import Literal

from bitnet_jax.io._safetensors import GGUF_MAGIC

_GGUF = ".gguf"

Kind = Literal["folder", "gguf", "saved"]


def kind_of(path: str | os.PathLike[str]) -> Kind | None:
    """A folder, a GGUF file, or another file, which ``save`` may have written; None: nothing."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return "folder"
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        found = path.endswith(_GGUF) or file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    return "gguf" if found else "saved"


def kind_to_load(path: str | os.PathLike[str]) -> Kind | None:
    """The same for a loader: what is named ``.gguf`` is one, there or not."""
    return "gguf" if os.fspath(path).endswith(_GGUF) else kind_of(path)
