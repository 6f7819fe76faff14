"""The safetensors container: named byte strings with a dtype, a shape and a digest.

A file is eight bytes of header length, the header (JSON), then the bytes of all
tensors, end to end. The safetensors library reads a file with a key twice, with
a relabelled dtype, or with most of its bits flipped. This reader does not::

    __metadata__["sha256"] = sha256(n, name, dtype, shape, bytes of each of n tensors by name,
                                    key, value of all other metadata by key)

where each part is preceded by its length, so that no two contents spell the
same. The bytes are written aside, forced to the disk and moved into place: at
any moment there is the old file or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
import safetensors

# What safetensors itself accepts; checked before a byte of the header is read.
MAX_HEADER = 100_000_000
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
_NAMES = {tag: name for name, tag in TAGS.items()}
_ITEMSIZE = {tag: jnp.dtype(name).itemsize for name, tag in TAGS.items()}
_DAMAGED = "Copy or download it again, or write it again with bj.io.save."


class FormatError(ValueError):
    """A file that :func:`bitnet_jax.io.load` refuses: damaged, changed, or of another format.

    The text names the file, what is wrong with it, and what to do.

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
      load: 'folder/model.bitnet.safetensors' is no safetensors file: it has 5 bytes. Copy or \
download it again, or write it again with bj.io.save.
    """


class Tensor(NamedTuple):
    """One tensor as a file holds it: a dtype's name in the header, a shape, uint8 bytes."""

    tag: str
    shape: tuple[int, ...]
    data: np.ndarray


def damaged(what: str) -> NoReturn:
    """Refuses a file that is not as it was written; :func:`load` puts its name before this."""
    raise FormatError(f"{what}. {_DAMAGED}")


def canonical_json(value: Any) -> str:
    """The one spelling of a value: keys sorted, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over all that a file says, but for the digest itself."""
    sha = hashlib.sha256()

    def put(part: str | memoryview) -> None:
        # surrogatepass: a crafted header may hold what UTF-8 cannot.
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(len(raw).to_bytes(8, "little"))
        sha.update(raw)

    put(str(len(tensors)))
    for name in sorted(tensors):
        put(name)
        put(tensors[name].tag)
        put(canonical_json(tensors[name].shape))
        put(tensors[name].data.data)
    for key in sorted(set(metadata) - {DIGEST}):
        put(key)
        put(metadata[key])
    return sha.hexdigest()


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file with its digest: all of it, or nothing."""
    target = os.path.realpath(path)  # through a link, as open() does
    _check_target(path, target)
    parts = _encode(tensors, {**metadata, DIGEST: digest(tensors, metadata)})
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".bitnet_jax-{secrets.token_hex(8)}.tmp")
    # The mode of the file that is replaced, so that a private one stays private.
    mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else 0o666
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, mode)
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _check_target(path: str, target: str) -> None:
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        text = "save: there is no such directory. Make it first (os.makedirs)"
        raise FileNotFoundError(errno.ENOENT, text, folder)
    if os.path.exists(target) and not os.path.isfile(target):
        text = "save: `path` is a directory or a device. Name a file"
        kind = IsADirectoryError if os.path.isdir(target) else OSError
        raise kind(errno.EISDIR if os.path.isdir(target) else errno.EINVAL, text, path)


def _encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The bytes of a file, in parts; the same content always gives the same bytes."""
    specs = {
        name: safetensors.TensorSpec(
            dtype=_NAMES[t.tag],
            shape=list(t.shape),
            data_ptr=t.data.ctypes.data,
            data_len=t.data.nbytes,
        )
        for name, t in tensors.items()
    }
    blob = safetensors.serialize(specs, metadata=dict(metadata))
    # safetensors writes the metadata in an order that changes from call to call.
    length = int.from_bytes(blob[:8], "little")
    header = canonical_json(json.loads(blob[8 : 8 + length])).encode()
    start = len(header) + -len(header) % 8
    return [start.to_bytes(8, "little"), header.ljust(start), memoryview(blob)[8 + length :]]


def _sync_folder(folder: str) -> None:
    """Forces the new name to the disk, where a file system can do that for a directory."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file; the container is checked, the digest is not."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, size)
        metadata = header.pop(METADATA, {})
        if not _is_strings(metadata):
            damaged("has a damaged header: its metadata maps no strings to strings")
        places = {name: _place(name, entry) for name, entry in header.items()}
        tensors = {}
        position = 0
        for name in sorted(places, key=lambda n: places[n][2:]):
            tag, shape, begin, end = places[name]
            if begin != position:
                damaged(
                    f"has a damaged header: {name!r} begins at byte {begin} of the data, and "
                    f"what is before it ends at {position}"
                )
            position = end
            if end > size - start:
                damaged(f"is truncated: {name!r} ends at byte {start + end}, the file at {size}")
            data = np.empty(end - begin, np.uint8)
            if file.readinto(data.data) != data.size:
                damaged(f"is truncated: it ended inside {name!r} while it was read")
            tensors[name] = Tensor(tag, shape, data)
        if start + position != size:
            damaged(f"has {size - start - position} bytes after its last tensor")
    return tensors, metadata


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header as a dict, and where the data starts."""
    if size < 8:
        damaged(f"is no safetensors file: it has {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        damaged(
            f"is no safetensors file: it gives its header {length} bytes, and has "
            f"{size - 8} after the length"
        )
    if length > MAX_HEADER:
        damaged(f"has a header of {length} bytes; the most is {MAX_HEADER}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_once)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        damaged(f"is no safetensors file: its header is no JSON ({error})")
    if not isinstance(header, dict):
        damaged("is no safetensors file: its header is no JSON object")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself keeps the last of two values and says nothing."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        damaged(f"has a damaged header: the key {twice!r} is there twice")
    return result


def _place(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and end of one tensor, which must agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        damaged(f"has a damaged header: {name!r} must have a dtype, a shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (is_ints(shape) and is_ints(offsets) and len(offsets) == 2):
        damaged(f"has a damaged header: {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    if not isinstance(tag, str) or tag not in _ITEMSIZE:
        damaged(f"has a damaged header: {name!r} has dtype {tag!r}, which no array here has")
    begin, end = offsets
    wanted = math.prod(shape) * _ITEMSIZE[tag]
    if end - begin != wanted:
        damaged(
            f"has a damaged header: {name!r} is {tag} of shape {tuple(shape)}, {wanted} bytes, "
            f"and has {end - begin}"
        )
    return tag, tuple(shape), begin, end


def is_ints(value: Any, low: int = 0) -> bool:
    """Whether a JSON value is a list of integers, none below ``low``."""
    return isinstance(value, list) and all(type(v) is int and v >= low for v in value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
