"""Reads and writes files in chunks of a MiB, hashed and checked on a few threads.

One thread reads, hashes and checks some chunks while they are in its caches: as many as are
hashed side by side, of one tensor or several. Besides the tree, memory holds at most one
tensor and the chunks in flight.

A file is written to a temporary name, flushed to the disk and renamed: at any moment
there is either the old file or the new one.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import io
import itertools
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from bitnet_jax._native.sha256 import sha256, streams
from bitnet_jax.io import _dense, _memory, _safetensors
from bitnet_jax.io._safetensors import Entry, FormatError, Header, raise_damaged
from bitnet_jax.io._tensors import Part

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_THREADS = min(8, os.cpu_count() or 1)

_AHEAD = _THREADS + 2  # chunks in flight

_BATCHES_AHEAD = _THREADS + 1  # the same of batches of chunks


def pool() -> ThreadPoolExecutor:
    """A pool of threads for one call."""
    return ThreadPoolExecutor(_THREADS, "bitnet_jax.io")


def in_order(
    threads: ThreadPoolExecutor,
    do: Callable[[_Item], _Result],
    items: Iterable[_Item],
    ahead: int = _AHEAD,
) -> Iterator[_Result]:
    """``map(do, items)`` on several threads, with a few items in flight."""
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:  # a thread would cost more than it saves
        yield from map(do, first)
        return
    waiting: collections.deque[Future[_Result]] = collections.deque()
    for item in itertools.chain(first, items):
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(threads.submit(do, item))
    while waiting:
        yield waiting.popleft().result()


def write(
    path: str,
    tensors: Mapping[str, Entry],
    metadata: Mapping[str, str],
    content: Callable[[str], Callable[[slice], np.ndarray]],
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Writes a file with its digest. On failure nothing changes on the disk.

    Args:
      path: of the file.
      tensors: as ``_safetensors.lay_out`` places them.
      metadata: all but the digest.
      content: from a tensor's name to a function from a chunk to its bytes.
      progress: called with the part of the tensors' bytes that is written, 0 to 1.
    """
    end = max((entry.end for entry in tensors.values()), default=0)
    # The digest covers the data and is in the header, so the header is written twice.
    header = _safetensors.encode(tensors, metadata, "0" * 64)
    hashes: dict[str, list[bytes]] = {}
    with _replacing(path) as file, pool() as threads:
        file.write(header)
        for name, entry in tensors.items():
            hashes[name] = _write_tensor(file, threads, entry, content(name))
            progress(entry.end / end if end else 1.0)
        digest = _safetensors.digest(tensors, metadata, hashes.__getitem__)
        file.seek(0)
        file.write(_safetensors.encode(tensors, metadata, digest))


def _write_tensor(
    file: BinaryIO,
    threads: ThreadPoolExecutor,
    entry: Entry,
    content: Callable[[slice], np.ndarray],
) -> list[bytes]:
    """Writes one tensor; returns the hashes of its chunks."""

    def prepare(chunk: slice) -> tuple[np.ndarray, bytes]:
        raw = content(chunk)
        return raw, _safetensors.hash_chunk(raw.data)

    hashes = []
    for raw, digest in in_order(threads, prepare, entry.chunks):
        file.write(raw.data)
        hashes.append(digest)
    return hashes


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A temporary file, renamed to ``path`` if the body does not raise."""
    target = os.path.realpath(path)  # follows a link, as open() does
    _require_file_target(path, target)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".bitnet_jax-{secrets.token_hex(8)}.tmp")
    # Keeps the permissions of a file that is replaced.
    mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else 0o666
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _require_file_target(path: str, target: str) -> None:
    """Raises unless a file can be written at a path."""
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        text = "save: there is no such directory. Make it first (os.makedirs)"
        raise FileNotFoundError(errno.ENOENT, text, folder)
    if os.path.exists(target) and not os.path.isfile(target):
        text = "save: `path` is a directory or a device. Name a file"
        kind = IsADirectoryError if os.path.isdir(target) else OSError
        raise kind(errno.EISDIR if os.path.isdir(target) else errno.EINVAL, text, path)


def _sync_folder(folder: str) -> None:
    """Flushes the renaming to the disk, where the file system supports it for a directory."""
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


class Source:
    """An open file whose header was read and checked.

    Attributes:
      size: bytes of the file.
      header: its tensors, metadata and the offset of its data.
    """

    def __init__(self, file: io.BufferedReader, mapped: bool):
        self.size = os.fstat(file.fileno()).st_size
        self.header: Header = _safetensors.read_header(file, self.size)
        self._file, self._lock = file, threading.Lock()
        self._mapping: np.ndarray | None = None
        if mapped:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._mapping = np.frombuffer(view, np.uint8)[self.header.start :]

    def map(self, name: str) -> np.ndarray | None:
        """The bytes of a tensor in the mapped file; None if the file is not mapped."""
        entry = self.header.tensors[name]
        return None if self._mapping is None else self._mapping[entry.begin : entry.end]

    def read(self, name: str, chunk: slice, out: np.ndarray) -> np.ndarray:
        """Fills ``out`` with a chunk of a tensor."""
        at = self.header.start + self.header.tensors[name].begin + chunk.start
        done = 0
        while done < out.size:
            got = self._read_at(at + done, out[done:].data)
            if not got:
                raise_damaged(f"is truncated: it ended inside {name!r} while it was read")
            done += got
        return out

    def _read_at(self, at: int, out: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], at)
        with self._lock:  # Windows
            self._file.seek(at)
            return self._file.readinto(out)


@contextlib.contextmanager
def open_source(who: str, path: str, *, mapped: bool = False) -> Iterator[Source]:
    """Opens a file to read; errors inside the ``with`` name ``who`` and the file."""
    if os.path.isdir(path):
        text = f"{who}: this is a folder, and a file of bj.io.save is read. Name the file"
        raise IsADirectoryError(errno.EISDIR, text, path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, f"{who}: `path` is a device or a pipe. Name a file", path)
    try:
        with open(path, "rb") as file:
            yield Source(file, mapped)
    except FileNotFoundError:
        text = f"{who}: there is no such file. Check the path, or write it with bj.io.save"
        raise FileNotFoundError(errno.ENOENT, text, path) from None
    except FormatError as error:
        raise FormatError(f"{who}: {path!r} {error}") from None
    except RecursionError:
        raise FormatError(f"{who}: {path!r} has a header that is nested too deeply.") from None


def read(
    source: Source, parts: Mapping[str, Part], make: Callable[[Part, np.ndarray], Any] | None
) -> dict[str, Any]:
    """Reads every tensor once; raises if the digest or the content of the file is wrong.

    Args:
      source: the file.
      parts: the arrays of its tensors, by name.
      make: called with each array as soon as it is read, to place it on its devices. With
        None the file is checked and nothing is kept.

    Returns:
      The results of ``make``, by name.
    """
    made: dict[str, Any] = {}
    faults: list[str] = []
    tensors, metadata = source.header.tensors, source.header.metadata

    def destination(part: Part) -> np.ndarray | None:
        return _destination(source, part) if make else None

    def chunks_of(name: str) -> Iterator[Any]:
        part, wrong = parts[name], 0
        out = None if tensors[name].chunks else destination(part)
        for _ in tensors[name].chunks:
            out, hashed, found = next(done)
            wrong += found
            yield hashed
        if wrong:
            faults.append(f"{part.owner!r} {part.fault(wrong)}")
        elif make and out is not None:
            made[name] = make(part, part.view(out))

    with pool() as threads:
        do = functools.partial(_read_batch, source)
        batches = _batches(source, parts, destination)
        done = itertools.chain.from_iterable(in_order(threads, do, batches, _BATCHES_AHEAD))
        actual = _safetensors.digest(tensors, metadata, chunks_of)
    if metadata[_safetensors.DIGEST] != actual:
        raise_damaged(
            "was changed after it was written: the sha256 of its content is "
            f"{actual[:16]}..., and it was {metadata[_safetensors.DIGEST][:16]}..."
        )
    if faults:  # the digest is right: the file was written with this content
        raise_damaged(f"contains an invalid leaf: {faults[0]}")
    return made


class _Chunk(NamedTuple):
    """A chunk that is to be read.

    Attributes:
      part: its array.
      out: memory for the array; None if it is not kept.
      place: in the tensor.
    """

    part: Part
    out: np.ndarray | None
    place: slice


class _Read(NamedTuple):
    """A chunk that was read.

    Attributes:
      out: as of ``_Chunk``.
      hashed: what goes into the digest.
      wrong: how many of its bytes are invalid.
    """

    out: np.ndarray | None
    hashed: Any
    wrong: int


def _batches(
    source: Source, parts: Mapping[str, Part], destination: Callable[[Part], np.ndarray | None]
) -> Iterator[list[_Chunk]]:
    """All chunks by the names of their tensors, in lists of those that one thread reads."""
    tensors = source.header.tensors
    share = -(-sum(entry.end - entry.begin for entry in tensors.values()) // _THREADS)
    most = _safetensors.CHUNK if _is_old(source) else streams() * _safetensors.CHUNK
    batch: list[_Chunk] = []
    size = 0
    for name in sorted(tensors):
        out = destination(parts[name]) if tensors[name].chunks else None
        for place in tensors[name].chunks:
            if batch and size + place.stop - place.start > min(share, most):
                yield batch
                batch, size = [], 0
            batch.append(_Chunk(parts[name], out, place))
            size += place.stop - place.start
    if batch:
        yield batch


def _is_old(source: Source) -> bool:
    """Whether the digest is over the chunks themselves, one after the other."""
    return source.header.metadata["version"] == "1"


def _destination(source: Source, part: Part) -> np.ndarray:
    """Memory for the bytes of an array."""
    mapping = source.map(part.name)
    if mapping is not None and not part.dense:
        return mapping
    return _memory.empty((part.nbytes,), np.dtype(np.uint8))


def _read_batch(source: Source, batch: list[_Chunk]) -> list[_Read]:
    """Reads chunks into their places, hashes them and looks for invalid bytes."""
    raws = [_raw(source, chunk) for chunk in batch]
    if _is_old(source):
        hashes, threes = [raw.data for raw in raws], None
    else:
        hashes, threes = sha256(raws)
    return [
        _Read(chunk.out, hashed, _count_wrong(chunk, raw, three))
        for chunk, raw, hashed, three in zip(
            batch, raws, hashes, threes or [None] * len(raws), strict=True
        )
    ]


def _raw(source: Source, chunk: _Chunk) -> np.ndarray:
    """The bytes of a chunk in the file."""
    part, out, place = chunk
    mapping = source.map(part.name)
    if mapping is not None:
        return mapping[place]
    if out is None or part.dense:
        return source.read(part.name, place, np.empty(place.stop - place.start, np.uint8))
    return source.read(part.name, place, out[place])


def _count_wrong(chunk: _Chunk, raw: np.ndarray, threes: bool | None) -> int:
    """How many bytes of a chunk are invalid; decodes those of a dense array into their place."""
    part, out, place = chunk
    if not part.dense:
        return part.count_wrong(raw, place.start, threes)
    # Four stored bytes are five bytes of two-bit codes.
    at = _dense.packed_slice(place, part.nbytes)
    codes = np.empty(at.stop - at.start, np.uint8) if out is None else out[at]
    wrong = _dense.decode(raw, codes)
    return wrong + part.count_wrong(codes, at.start)
