"""The safetensors container, with a digest: named tensors with a dtype and a shape.

A file is eight bytes of header length, the header (JSON), then the bytes of all
tensors, one after the other. The safetensors library accepts a file with a key twice,
with a relabelled dtype, or with most of its bits flipped. This reader refuses them, by a
digest in the metadata::

    __metadata__["sha256"] = sha256(n, name, dtype, shape, chunks of each of n tensors by name,
                                    key, value of all other metadata by key)
    chunks                 = sha256(first MiB) sha256(second MiB) ... of a tensor's bytes, the
                             last of what is left; in version 1, the bytes themselves

Each part is preceded by its length, so that different contents never give the same
input to the hash. All chunks of a tensor are one part, hashed side by side.

The header is padded with spaces to a multiple of 64 bytes, and tensors are sorted by the
powers of two in their sizes. So a tensor whose size is a multiple of 64 bytes begins at a
multiple of 64, and JAX on a CPU uses that memory without a copy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeGuard

import jax.numpy as jnp

GGUF_MAGIC = b"GGUF"  # another format's first bytes

# Bounds on a header, far above any model's. They keep memory and time small whatever a
# file declares. ``save`` keeps to them too.
MAX_HEADER = 32 << 20  # bytes; some 50,000 leaves

MAX_RANK = 64  # NumPy's own

MAX_ELEMENTS = 2**48

MAX_INT = 2**63 - 1

ALIGNMENT = 64

CHUNK = 1 << 20

DIGEST = "sha256"

METADATA = "__metadata__"

# The names of dtypes in a header, for those that safetensors has a name for.
TAGS = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}

_ITEMSIZE = {tag: jnp.dtype(name).itemsize for name, tag in TAGS.items()}

REMEDY = "Copy or download it again, or write it again with bj.io.save."


class FormatError(ValueError):
    """A file or a checkpoint was refused: it is damaged, changed, or of another format.

    The message names the file or the leaf, the fault and the remedy.

    Example:
      >>> import os, tempfile, bitnet_jax as bj
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.bitnet.safetensors")
      ...     with open(path, "wb") as file:
      ...         written = file.write(b"model")
      ...     try:
      ...         bj.io.load(path)
      ...     except bj.io.FormatError as error:
      ...         print(str(error).replace(folder, "folder"))
      load: 'folder/model.bitnet.safetensors' is not a safetensors file: it has 5 bytes. Copy or \
download it again, or write it again with bj.io.save.
    """


class Entry(NamedTuple):
    """One tensor in a header: a dtype's name, a shape, and its bytes in the file.

    ``begin`` and ``end`` are offsets from the end of the header.
    """

    tag: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def chunks(self) -> list[slice]:
        """Its chunks, as offsets from its first byte."""
        return chunks_of(self.end - self.begin)


def chunks_of(size: int) -> list[slice]:
    """``size`` bytes in chunks; the last one may be shorter."""
    return [slice(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]


class Header(NamedTuple):
    """The header of a file: its tensors, its metadata, and the offset of its data."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    start: int


def raise_damaged(what: str) -> NoReturn:
    """Raises on a damaged or changed file; the caller puts the file's name in front."""
    if len(what) > 1000:  # names in a header may be of any length
        what = f"{what[:700]} ... {what[-200:]}"
    raise FormatError(f"{what}. {REMEDY}")


def canonical_json(value: object) -> str:
    """A value as JSON in one fixed form: keys sorted, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def parse_json(text: str, pairs_hook: Callable[[list], dict] | None = None) -> Any:
    """Parses JSON; raises on integers of more than 64 bits, which take quadratic time."""
    return json.loads(text, parse_int=_parse_int, object_pairs_hook=pairs_hook)


def _parse_int(text: str) -> int:
    value = int(text) if len(text) <= 20 else MAX_INT + 1
    if abs(value) > MAX_INT:
        raise ValueError(f"an integer of {len(text)} digits")
    return value


def hash_chunk(chunk: memoryview) -> bytes:
    """The hash of a chunk that goes into the digest; version 1 uses the chunk itself."""
    return hashlib.sha256(chunk).digest()


def digest(
    tensors: Mapping[str, Entry],
    metadata: Mapping[str, str],
    chunks: Callable[[str], Iterable[bytes | memoryview]],
) -> str:
    """SHA-256 over the whole content of a file but the digest itself.

    Args:
      tensors: by name.
      metadata: all of it; a digest in it is ignored.
      chunks: from a tensor's name to the hashes of its chunks (version 1: the chunks).

    Returns:
      64 hexadecimal digits.
    """
    sha = hashlib.sha256()

    def put(length: int, parts: Iterable[bytes | memoryview]) -> None:
        sha.update(length.to_bytes(8, "little"))
        for part in parts:
            sha.update(part)

    def put_text(text: str) -> None:
        # surrogatepass: a crafted header may contain surrogates, which UTF-8 lacks.
        raw = text.encode("utf-8", "surrogatepass")
        put(len(raw), [raw])

    put_text(str(len(tensors)))
    for name in sorted(tensors):
        entry = tensors[name]
        put_text(name)
        put_text(entry.tag)
        put_text(canonical_json(entry.shape))
        size = entry.end - entry.begin
        put(size if metadata["version"] == "1" else 32 * len(entry.chunks), chunks(name))
    for key in sorted(set(metadata) - {DIGEST}):
        put_text(key)
        put_text(metadata[key])
    return sha.hexdigest()


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Places tensors, each given by its dtype's name and its shape, one after the other."""
    sizes = {name: math.prod(shape) * _ITEMSIZE[tag] for name, (tag, shape) in tensors.items()}
    twos = {name: min(size & -size or ALIGNMENT, ALIGNMENT) for name, size in sizes.items()}
    entries, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-twos[name], name)):
        begin, end = end, end + sizes[name]
        entries[name] = Entry(*tensors[name], begin, end)
    return entries


def encode(tensors: Mapping[str, Entry], metadata: Mapping[str, str], digest: str) -> bytes:
    """The bytes before the data; the same content always gives the same bytes."""
    entries = {
        name: {"dtype": entry.tag, "shape": entry.shape, "data_offsets": entry[2:]}
        for name, entry in tensors.items()
    }
    header = canonical_json({METADATA: {**metadata, DIGEST: digest}, **entries}).encode()
    length = len(header) + -(8 + len(header)) % ALIGNMENT
    if length > MAX_HEADER:
        raise ValueError(
            f"save: `tree` needs a header of {length} bytes, and a file has at most {MAX_HEADER}. "
            "Stack layers into one leaf, or save parts of the tree."
        )
    return length.to_bytes(8, "little") + header.ljust(length)


def read_header(file: BinaryIO, size: int) -> Header:
    """Reads and checks the header of a file of ``size`` bytes."""
    header, start = _read_json(file, size)
    metadata = header.pop(METADATA, {})
    if not _is_strings(metadata):
        raise_damaged("has a damaged header: its metadata must map strings to strings")
    places = {name: _place(name, entry) for name, entry in header.items()}
    tensors = {}
    position = 0
    for name in sorted(places, key=lambda n: places[n][2:]):
        tensors[name] = entry = places[name]
        if entry.begin != position:
            raise_damaged(
                f"has a damaged header: {name!r} begins at byte {entry.begin} of the data, and "
                f"what is before it ends at {position}"
            )
        position = entry.end
        if position > size - start:
            raise_damaged(
                f"is truncated: {name!r} ends at byte {start + position}, the file at {size}"
            )
    if start + position != size:
        raise_damaged(f"has {size - start - position} bytes after its last tensor")
    return Header(tensors, metadata, start)


def _read_json(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header as a dict, and the offset of the data."""
    if size < 8:
        raise_damaged(f"is not a safetensors file: it has {size} bytes")
    start = file.read(8)
    if start.startswith(GGUF_MAGIC):
        raise FormatError(
            "is a GGUF file, which has no checksums. bj.models.Decoder.from_pretrained and inspect "
            "read it."
        )
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise_damaged(
            f"is not a safetensors file: it gives its header {length} bytes, and has "
            f"{size - 8} after the length"
        )
    if length > MAX_HEADER:
        raise_damaged(f"has a header of {length} bytes; the most is {MAX_HEADER}")
    try:
        header = parse_json(file.read(length).decode("utf-8"), _once)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise_damaged(f"is not a safetensors file: its header is not JSON ({error})")
    if not isinstance(header, dict):
        raise_damaged("is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises if a key is there twice, of which ``json`` keeps the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise_damaged(f"has a damaged header: the key {twice!r} is there twice")
    return result


def _place(name: str, entry: object) -> Entry:
    """One tensor of a header; raises unless its dtype, shape and bytes agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise_damaged(f"has a damaged header: {name!r} must have a dtype, a shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (is_shape(shape) and is_ints(offsets) and len(offsets) == 2):
        raise_damaged(
            f"has a damaged header: {name!r} has shape {shape!r} and data_offsets {offsets!r}"
        )
    if not isinstance(tag, str) or tag not in _ITEMSIZE:
        raise_damaged(f"has a damaged header: {name!r} has the unknown dtype {tag!r}")
    begin, end = offsets
    wanted = math.prod(shape) * _ITEMSIZE[tag]
    if end - begin != wanted:
        raise_damaged(
            f"has a damaged header: {name!r} is {tag} of shape {tuple(shape)}, {wanted} bytes, "
            f"and has {end - begin}"
        )
    return Entry(tag, tuple(shape), begin, end)


def is_ints(value: object, low: int = 0) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of integers, none below ``low``."""
    return isinstance(value, list) and all(type(v) is int and v >= low for v in value)


def is_shape(value: object, low: int = 0) -> TypeGuard[list[int]]:
    """Whether a JSON value is the shape of a possible array, no axis below ``low``."""
    if not is_ints(value, low) or len(value) > MAX_RANK or any(v > MAX_ELEMENTS for v in value):
        return False
    return math.prod(max(v, 1) for v in value) <= MAX_ELEMENTS


def _is_strings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
