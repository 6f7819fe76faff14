"""GGUF files, read strictly: metadata, and tensors mapped from the file.

A file is ``GGUF``, a version, two counts, key and value pairs, a description of every
tensor, and their data, each tensor from a multiple of ``general.alignment`` on. Every
count and length is compared with what is left of the file before anything is allocated
for it; a key that is there twice, a tensor that overlaps another or leaves the file, or a
type that is not read here is refused by its name.

Types: F32, F16, BF16; Q8_0 and Q4_1, blocks of 32; TQ1_0 and TQ2_0, ternary blocks of
256; Q2_0, ternary blocks of 64, or of 128 as its first writers had them (_gguf_blocks).
Left out: writing; I2_S and others of bitnet.cpp's own, whose numbers the mainline gives to
other types.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from bitnet_jax.io._gguf_blocks import TYPES, Block
from bitnet_jax.io._safetensors import GGUF_MAGIC, MAX_ELEMENTS, FormatError

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    10: "Q",
    11: "q",
    12: "d",
}

_BOOL, _STRING, _ARRAY = 7, 8, 9

_MAX_NAME = 1 << 16  # bytes of a key or of a tensor's name

# What this library reads; others have names of their own, which messages use.
_OTHERS = {
    2: "Q4_0",
    6: "Q5_0",
    7: "Q5_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    36: "I2_S (bitnet.cpp's own)",
    142: "a type of Bonsai 2",
    143: "a type of Bonsai 2",
}


class Tensor(NamedTuple):
    """One tensor as the file describes it.

    Attributes:
      shape: slowest axis first, so (out, in) for a matrix.
      block: how its values are stored.
      begin: its first byte in the file.
      nbytes: how many bytes it takes.
    """

    shape: tuple[int, ...]
    block: Block
    begin: int
    nbytes: int


class Gguf(Mapping[str, Tensor]):
    """A file: its metadata, and its tensors by name.

    Attributes:
      path: of the file.
      metadata: by key; arrays are lists.
    """

    def __init__(self, who: str, path: str | os.PathLike[str]):
        self.who, self.path = who, os.fspath(path)
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{who}: no file {self.path!r}. Name a .gguf file or a folder.")
        size = os.path.getsize(self.path)
        self._bytes = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        try:
            self._read(_Reader(self._bytes))
        except FormatError as error:
            raise FormatError(f"{who}: {self.path!r} {error}. Download it again.") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def floats(self, name: str) -> np.ndarray:
        """A tensor's values, float32 unless they are stored as narrower floats."""
        tensor = self[name]
        return self._checked(name, tensor.block.floats, self._blocks(tensor)).reshape(tensor.shape)

    def ternary(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The codes (out, in), int8, and scales (out, groups), float32, of a ternary tensor."""
        tensor = self[name]
        ternary = tensor.block.ternary
        assert ternary is not None
        codes, scale = self._checked(name, ternary, self._blocks(tensor))
        rows = tensor.shape[0]
        return codes.reshape(tensor.shape), scale.reshape(rows, -1)

    def _blocks(self, tensor: Tensor) -> np.ndarray:
        raw = self._bytes[tensor.begin : tensor.begin + tensor.nbytes]
        return np.asarray(raw).reshape(-1, tensor.block.nbytes)

    def _checked(self, name: str, read: Any, blocks: np.ndarray) -> Any:
        try:
            return read(blocks)
        except FormatError as error:
            raise FormatError(
                f"{self.who}: {self.path!r}: {name!r} {error}. Download it again."
            ) from None

    def _read(self, reader: _Reader) -> None:
        if reader.take(4, "its magic") != GGUF_MAGIC:
            _refuse("is no GGUF file")
        version = reader.number("I", "its version")
        if version not in (2, 3):
            _refuse(f"is of GGUF version {version}, and 2 and 3 are read (little-endian)")
        # A tensor is described by at least 24 bytes, and a pair by 13.
        tensors = reader.count("its number of tensors", 24)
        pairs = reader.count("its number of keys", 13)
        for _ in range(pairs):
            key = reader.name("a key")
            if key in self.metadata:
                _refuse(f"has the key {key!r} twice")
            self.metadata[key] = reader.value(key, reader.number("I", key))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            _refuse(f"has general.alignment {alignment!r}, which is no power of two")
        described = [reader.tensor() for _ in range(tensors)]
        start = reader.at + -reader.at % alignment
        self._place(described, start, alignment, reader.size)

    def _place(self, described: list[Any], start: int, alignment: int, size: int) -> None:
        """Finds every tensor's blocks: one after the other, to the end of the file."""
        ordered = sorted(described, key=lambda one: one[3])
        ends = [one[3] for one in ordered[1:]] + [size - start]
        for (name, shape, number, offset), end in zip(ordered, ends, strict=True):
            if name in self._tensors:
                _refuse(f"has the tensor {name!r} twice")
            if offset % alignment:
                _refuse(f"has {name!r} at byte {offset} of the data, off its alignment")
            block, nbytes = _block_of(name, shape, number, end - offset, alignment)
            self._tensors[name] = Tensor(shape, block, start + offset, nbytes)
        self._tensors = {one[0]: self._tensors[one[0]] for one in described}


def _refuse(what: str) -> NoReturn:
    raise FormatError(what)


def _block_of(
    name: str, shape: tuple[int, ...], number: int, room: int, alignment: int
) -> tuple[Block, int]:
    """How a tensor is stored, and its bytes: what is left of its room only fills it up.

    One number stands for two layouts, which the size tells apart.
    """
    if number not in TYPES:
        known = ", ".join(dict.fromkeys(b.name for blocks in TYPES.values() for b in blocks))
        _refuse(
            f"has {name!r} as type {number} ({_OTHERS.get(number, 'unknown')}), and {known} are "
            "read"
        )
    fitting = [b for b in TYPES[number] if shape[-1] % b.length == 0]
    if not fitting:
        _refuse(
            f"has {name!r} of shape {shape}, whose rows are no multiples of "
            f"{TYPES[number][0].length}"
        )
    sizes = [(b, math.prod(shape) // b.length * b.nbytes) for b in fitting]
    right = [(b, nbytes) for b, nbytes in sizes if nbytes <= room < nbytes + alignment]
    if len(right) != 1:
        _refuse(
            f"is truncated or damaged: {name!r} takes {sizes[0][1]} bytes, and has room for {room}"
        )
    return right[0]


class _Reader:
    """Numbers and texts off the front of a file; what runs out of it is refused."""

    def __init__(self, raw: np.ndarray):
        self.raw, self.at, self.size = raw, 0, len(raw)

    def take(self, length: int, what: str) -> bytes:
        """The next bytes."""
        if length > self.size - self.at:
            _refuse(f"ends within {what}")
        part = self.raw[self.at : self.at + length].tobytes()
        self.at += length
        return part

    def number(self, code: str, what: str) -> Any:
        """The next number, little-endian."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def count(self, what: str, least: int) -> int:
        """How many things follow, each of at least so many bytes."""
        count = self.number("Q", what)
        if count > (self.size - self.at) // least:
            _refuse(f"gives {count} as {what}, more than it has room for")
        return count

    def string(self, what: str) -> str:
        """The next text."""
        raw = self.take(self.count(f"the length of {what}", 1), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            _refuse(f"has {what} that is no UTF-8")

    def name(self, what: str) -> str:
        """A text that is not empty or long."""
        text = self.string(what)
        if not 0 < len(text) <= _MAX_NAME:
            _refuse(f"has {what} of {len(text)} characters")
        return text

    def value(self, key: str, kind: int) -> Any:
        """A value of metadata."""
        if kind == _ARRAY:
            return self._array(key)
        if kind == _STRING:
            return self.string(f"the value of {key!r:.100}")
        if kind == _BOOL:
            value = self.number("B", key)
            if value > 1:
                _refuse(f"has {value} for {key!r:.100}, which is true or false")
            return bool(value)
        if kind not in _NUMBERS:
            _refuse(f"has {key!r:.100} of type {kind}, which there is not")
        return self.number(_NUMBERS[kind], key)

    def _array(self, key: str) -> list[Any]:
        kind = self.number("I", key)
        if kind == _STRING:
            count = self.count(f"the length of {key!r:.100}", 8)
            return [self.string(key) for _ in range(count)]
        if kind not in _NUMBERS and kind != _BOOL:
            _refuse(f"has {key!r:.100} as an array of type {kind}")
        code = _NUMBERS.get(kind, "B")
        width = struct.calcsize(code)
        count = self.count(f"the length of {key!r:.100}", width)
        raw = self.take(count * width, key)
        return np.frombuffer(raw, np.dtype(code).newbyteorder("<")).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, type and offset."""
        name = self.name("a tensor's name")
        rank = self.number("I", name)
        if not 1 <= rank <= 4:
            _refuse(f"has {name!r:.100} of {rank} axes")
        shape = tuple(self.number("Q", name) for _ in range(rank))[::-1]
        if any(n < 1 for n in shape) or math.prod(shape) > MAX_ELEMENTS:
            _refuse(f"has {name!r:.100} of shape {shape}")
        return name, shape, self.number("I", name), self.number("Q", name)
