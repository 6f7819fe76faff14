"""Digests of many messages at once, on every hasher of this processor, against hashlib."""

import hashlib

import numpy as np
import pytest

from bitnet_jax import _native as native
from bitnet_jax._native import sha256

HASHERS = sha256.hashers()


@pytest.fixture(params=[*HASHERS, None], ids=[*(hasher.name for hasher in HASHERS), "hashlib"])
def hasher(request, monkeypatch):
    """Hashes with this from now on; None: with hashlib."""
    found = () if request.param is None else (request.param,)
    monkeypatch.setattr(sha256, "hashers", lambda: found)
    return request.param


def has_three(message):
    fields = message[:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    return bool((fields == 3).any())


def assert_right(messages):
    digests, threes = sha256.sha256(messages)
    assert digests == [hashlib.sha256(message.tobytes()).digest() for message in messages]
    assert threes is None or threes == [has_three(message) for message in messages]
    return threes


@pytest.mark.parametrize("sides", ["equal", "near a block", "any", "long and short"])
def test_digests_are_those_of_hashlib(monkeypatch, hasher, sides):
    monkeypatch.setattr(sha256, "_WORTH", 10**9)  # natively, however few there are
    rng = np.random.default_rng(len(sides))
    # Codes have no field of 3; a few messages get one, each at another place.
    codes = rng.choice(np.array([0b00011010, 0b10100100, 0b01010101, 0], np.uint8), 70_000)
    natively = 0
    for _ in range(40):
        count = rng.integers(1, 3 * sha256.streams() + 1)
        sizes = {
            "equal": np.full(count, 64 * rng.integers(1, 30)),
            "near a block": 64 * rng.integers(0, 4, count) + rng.integers(-9, 10, count),
            "any": rng.integers(0, 3000, count),
            "long and short": rng.choice([3, 70, 30_000], count),
        }[sides]
        starts = rng.integers(0, 20_000, count)  # of any alignment
        messages = [codes[at : at + max(0, n)].copy() for at, n in zip(starts, sizes, strict=True)]
        for message in messages[:: rng.integers(1, 5)]:
            if message.size:
                message[rng.integers(message.size)] |= 3 << 2 * rng.integers(4)
        natively += assert_right(messages) is not None
    # All but those whose messages are all empty.
    assert natively > 30 if hasher else natively == 0


def test_processors_of_x86_have_a_hasher():
    x86 = {"avx512_vnni", "avx2"} & set(native.load().paths())
    assert bool(HASHERS) == bool(x86)
    assert sha256.streams() == (HASHERS[0].streams if HASHERS else 1)


def test_few_messages_go_to_hashlib(hasher):
    message = np.arange(256, dtype=np.uint8)
    streams = sha256.streams()
    enough = -(-streams // sha256._WORTH)
    for count in range(2 * streams):
        threes = assert_right([message] * count)
        assert (threes is not None) == (hasher is not None and count >= enough)
    # A long one, which the others would have to wait for.
    alone = [np.zeros(100_000, np.uint8), *[message] * streams]
    natively = hasher is not None and streams <= sha256._WORTH
    assert (assert_right(alone) is not None) == natively


def test_no_messages_and_empty_ones():
    assert sha256.sha256([]) == ([], None)
    assert_right([np.zeros(0, np.uint8)] * 20)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Native(None, "it was not built"))
    monkeypatch.setattr(sha256, "hashers", sha256.hashers.__wrapped__)
    assert sha256.hashers() == ()
    assert sha256.streams() == 1
    assert assert_right([np.arange(99, dtype=np.uint8)] * 40) is None


def test_a_message_that_is_read_only_and_in_the_middle_of_others():
    whole = np.random.default_rng(0).integers(0, 256, 64 * 1000, np.uint8)
    whole.flags.writeable = False
    assert_right([whole[at : at + 1000] for at in range(0, whole.size, 1000)])
