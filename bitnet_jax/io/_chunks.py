"""Reads and writes files in chunks of a MiB, hashed and checked on a few threads.

One thread reads, hashes and checks a chunk while it is in that core's cache. Besides the
tree, memory holds at most one tensor and the chunks in flight.

A file is written to a temporary name, flushed to the disk and renamed: at any moment
there is either the old file or the new one.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import io
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import numpy as np

from bitnet_jax.io import _dense, _memory, _safetensors
from bitnet_jax.io._safetensors import Entry, FormatError, Header, raise_damaged
from bitnet_jax.io._tensors import Part

_Result = TypeVar("_Result")

_THREADS = min(8, os.cpu_count() or 1)

_AHEAD = _THREADS + 2  # chunks in flight


def pool() -> ThreadPoolExecutor:
    """A pool of threads for one call."""
    return ThreadPoolExecutor(_THREADS, "bitnet_jax.io")


def in_order(
    threads: ThreadPoolExecutor, do: Callable[[slice], _Result], chunks: Sequence[slice]
) -> Iterator[_Result]:
    """``map(do, chunks)`` on several threads, with a few chunks in flight."""
    if len(chunks) < 2:  # a thread would cost more than it saves
        yield from map(do, chunks)
        return
    waiting: collections.deque[Future[_Result]] = collections.deque()
    for chunk in chunks:
        if len(waiting) == _AHEAD:
            yield waiting.popleft().result()
        waiting.append(threads.submit(do, chunk))
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

    def chunks_of(name: str) -> Iterator[Any]:
        part, wrong = parts[name], 0
        out = _destination(source, part) if make else None
        do = functools.partial(_read_chunk, source, part, out)
        for hashed, found in in_order(threads, do, tensors[name].chunks):
            wrong += found
            yield hashed
        if wrong:
            faults.append(f"{part.owner!r} {part.fault(wrong)}")
        elif make and out is not None:
            made[name] = make(part, part.view(out))

    with pool() as threads:
        actual = _safetensors.digest(tensors, metadata, chunks_of)
    if metadata[_safetensors.DIGEST] != actual:
        raise_damaged(
            "was changed after it was written: the sha256 of its content is "
            f"{actual[:16]}..., and it was {metadata[_safetensors.DIGEST][:16]}..."
        )
    if faults:  # the digest is right: the file was written with this content
        raise_damaged(f"contains an invalid leaf: {faults[0]}")
    return made


def _destination(source: Source, part: Part) -> np.ndarray:
    """Memory for the bytes of an array."""
    mapping = source.map(part.name)
    if mapping is not None and not part.dense:
        return mapping
    return _memory.empty((part.nbytes,), np.dtype(np.uint8))


def _read_chunk(
    source: Source, part: Part, out: np.ndarray | None, chunk: slice
) -> tuple[Any, int]:
    """Reads a chunk into its place; returns its hash, and how many of its bytes are invalid."""
    mapping = source.map(part.name)
    if mapping is not None:
        raw = mapping[chunk]
    elif out is None or part.dense:
        raw = source.read(part.name, chunk, np.empty(chunk.stop - chunk.start, np.uint8))
    else:
        raw = source.read(part.name, chunk, out[chunk])
    is_old = source.header.metadata["version"] == "1"
    hashed = raw.data if is_old else _safetensors.hash_chunk(raw.data)
    if not part.dense:
        return hashed, part.count_wrong(raw, chunk.start)
    # Four stored bytes are five bytes of two-bit codes.
    at = _dense.packed_slice(chunk, part.nbytes)
    codes = np.empty(at.stop - at.start, np.uint8) if out is None else out[at]
    wrong = _dense.decode(raw, codes)
    return hashed, wrong + part.count_wrong(codes, at.start)
