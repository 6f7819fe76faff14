"""SHA-256 of many messages at once, in C++ where the native library is there.

The digests are those of ``hashlib``, several times as fast: one message is a chain of
operations that wait for each other, and several messages side by side are not (``sha256.h``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from bitnet_jax import _native

_DIGEST = 32  # bytes

_WORTH = 3  # hashlib takes about so many messages in the time of one call for all streams


class Hasher(NamedTuple):
    """One of the library's hashers that this processor runs.

    Attributes:
      place: among them, fastest first.
      name: of its instruction set.
      streams: messages that it takes at once.
    """

    place: int
    name: str
    streams: int


class Hashed(NamedTuple):
    """What was found of some messages.

    Attributes:
      digests: the SHA-256 of each, 32 bytes.
      threes: for each, whether any of its two-bit fields is 3, which no ternary code is; None
        where nobody looked.
    """

    digests: list[bytes]
    threes: list[bool] | None


@functools.cache
def hashers() -> tuple[Hasher, ...]:
    """Those that this processor runs, fastest first; empty without the native library."""
    library = _native.load().library
    if library is None:
        return ()
    found = []
    while name := library.bitnet_hasher(len(found)):
        streams = library.bitnet_hasher_streams(len(found))
        found.append(Hasher(len(found), name.decode(), streams))
    return tuple(found)


def streams() -> int:
    """How many messages are best given at once: 1 where ``hashlib`` takes one by one."""
    return next((hasher.streams for hasher in hashers()), 1)


def sha256(messages: Sequence[UInt8[np.ndarray, " _"]]) -> Hashed:
    """The SHA-256 of each message, and whether it has a field of 3.

    Args:
      messages: contiguous bytes, of any lengths; those of one length are hashed side by side.

    Returns:
      The digests, and the threes, which are None where ``hashlib`` was faster, or all there is.
    """
    sizes = [message.size for message in messages]
    for hasher in hashers()[:1]:
        if _WORTH * sum(sizes) >= hasher.streams * max(sizes, default=0) > 0:
            return _natively(hasher, messages)
    return Hashed([hashlib.sha256(message.data).digest() for message in messages], None)


def _natively(hasher: Hasher, messages: Sequence[np.ndarray]) -> Hashed:
    library = _native.load().library
    assert library is not None
    # As struct Message of native/sha256.h.
    table = np.array([(message.ctypes.data, message.size) for message in messages], np.int64)
    digests = np.empty((len(messages), _DIGEST), np.uint8)
    threes = np.empty(len(messages), np.uint8)
    # The GIL is free during this call.
    library.bitnet_sha256(
        hasher.place,
        ctypes.c_void_p(table.ctypes.data),
        ctypes.c_int64(len(messages)),
        ctypes.c_void_p(digests.ctypes.data),
        ctypes.c_void_p(threes.ctypes.data),
    )
    return Hashed([digest.tobytes() for digest in digests], threes.astype(bool).tolist())
