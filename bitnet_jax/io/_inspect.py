"""``python -m bitnet_jax inspect`` and ``verify``: the contents and integrity of a file.

Both work on untrusted files. ``inspect`` reads the header only, whose size is bounded;
``verify`` reads the whole file, a chunk at a time, and keeps nothing. Names come from the
file: keys that are not printable are refused, and all other text is escaped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bitnet_jax._display import size_text, table
from bitnet_jax.io import _chunks, _file, _safetensors
from bitnet_jax.io._chunks import Source
from bitnet_jax.io._manifest import Leaf
from bitnet_jax.io._tensors import name_of

_COLUMNS = ("path", "kind", "shape", "config", "dtype", "stored as", "in file", "loaded")

_WIDEST = 120

_KINDS = {"packed": "ternary", "int8": "int8", "array": "array", "empty": "empty"}


Page = Callable[[list[Leaf], Source], str | None]


def inspect(path: str, page: Page = lambda *_: None) -> int:
    """Prints what a file contains, from its header; returns the exit code.

    ``page`` makes the text for files that it knows; None: a row for each leaf.
    """

    def text() -> str:
        with _chunks.open_source("inspect", path) as source:
            leaves = _file.declared(source.header)
            known = page(leaves, source)
            if known is not None:
                return known
            rows = [_row(leaf, source) for leaf in leaves]
            return f"{table(_COLUMNS, rows)}\n\n{aligned(totals(leaves, source))}"

    return report(text)


def verify(path: str) -> int:
    """Reads a whole file and prints whether it is intact; returns the exit code."""

    def check() -> str:
        with _chunks.open_source("verify", path) as source:
            leaves = _file.declared(source.header)
            _file.build(leaves, lambda part: part)  # raises if two leaves have one path
            _chunks.read(source, {part.name: part for leaf in leaves for part in leaf.parts}, None)
            digest = source.header.metadata[_safetensors.DIGEST]
            return (
                f"ok {printable(path)}: {len(leaves)} leaves, "
                f"{sum(map(_size, leaves)):,} parameters, {source.size:,} bytes, "
                f"version {source.header.metadata['version']}, sha256 {digest[:16]}..."
            )

    return report(check)


def report(text: Callable[[], str]) -> int:
    """Prints a text, or the error that making it raised; returns the exit code."""
    try:
        print("\n".join(map(printable, text().split("\n"))))
    except OSError as error:
        said = str(error) if error.strerror is None else f"{error.strerror}: {error.filename}"
        print(printable(said), file=sys.stderr)
        return 1
    except ValueError as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    return 0


def aligned(lines: Mapping[str, str]) -> str:
    """Lines of a name and what is said of it."""
    return "\n".join(f"{name:18}{value}" for name, value in lines.items())


def printable(text: str) -> str:
    """A line with control characters, which a terminal would act on, escaped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "ascii"
    return "".join(escaped).encode(encoding, "backslashreplace").decode(encoding)


def _row(leaf: Leaf, source: Source) -> tuple[str, ...]:
    described, kind = leaf.described, leaf.described["kind"]
    if kind == "empty":
        return (name_of(leaf.path)[:_WIDEST], "empty", *("",) * 6)
    cells = (
        name_of(leaf.path),
        _KINDS[kind],
        "x".join(map(str, described["shape"])) or "scalar",
        _config(described.get("config")),
        described["dtype"],
        stored_as(leaf),
        size_text(stored_bytes(leaf, source)),
        size_text(_loaded_bytes(leaf)),
    )
    # A column is as wide as its widest cell, in every row.
    return tuple(cell if len(cell) <= _WIDEST else f"{cell[: _WIDEST - 3]}..." for cell in cells)


def stored_as(leaf: Leaf) -> str:
    """The form of a leaf's numbers in the file."""
    if any(part.dense for part in leaf.parts):
        return "5 trits/byte"
    planes = leaf.described.get("config", {}).get("planes", 1)
    forms = {"packed": "2 bits" if planes == 1 else f"{planes} x 2 bits", "int8": "8 bits"}
    return forms.get(leaf.described["kind"], str(leaf.described["dtype"]))


def _config(config: dict[str, Any] | None) -> str:
    """A short text for a quantiser."""
    if config is None:
        return ""
    if "granularity" not in config:
        return "per channel"
    granularity = config["granularity"]
    per = f"groups of {granularity}" if isinstance(granularity, int) else f"per {granularity}"
    planes = f", {config['planes']} planes" if "planes" in config else ""
    rotation = ", rotated" if "rotation" in config else ""
    return f"{config['scale']} {config['threshold']:g}, {per}{planes}{rotation}"


def _size(leaf: Leaf) -> int:
    return 0 if leaf.described["kind"] == "empty" else math.prod(leaf.described["shape"])


def stored_bytes(leaf: Leaf, source: Source) -> int:
    """Bytes of a leaf in the file."""
    entries = [source.header.tensors[part.name] for part in leaf.parts]
    return sum(entry.end - entry.begin for entry in entries)


def _loaded_bytes(leaf: Leaf) -> int:
    return sum(part.nbytes for part in leaf.parts)


def totals(leaves: list[Leaf], source: Source) -> dict[str, str]:
    """The lines below the table: sizes of the whole file."""
    parameters = sum(map(_size, leaves))
    loaded = sum(map(_loaded_bytes, leaves))
    as_float = parameters * np.dtype(np.float32).itemsize
    ternary = [leaf for leaf in leaves if leaf.described["kind"] == "packed"]
    lines = {"parameters": f"{parameters:,}"}
    if ternary:
        bits = 8 * sum(stored_bytes(leaf, source) for leaf in ternary)
        said = f"{len(ternary)}, at {bits / max(sum(map(_size, ternary)), 1):.2f} bits a weight"
        lines["ternary kernels"] = said
    return lines | {
        "bytes in file": f"{source.size:,}, {source.header.start:,} of them header",
        "bytes loaded": f"{loaded:,}",
        "bytes as float32": f"{as_float:,}",
        "ratio": f"{as_float / source.size:.2f}x in file, {as_float / max(loaded, 1):.2f}x loaded",
        "format": f"version {source.header.metadata['version']}",
        "data": "not read; python -m bitnet_jax verify checks it",
    }
