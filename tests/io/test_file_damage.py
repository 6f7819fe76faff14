"""Damage: what was changed after it was written does not come back, whatever was changed."""

import json
import os

import numpy as np
import pytest
from damaged_files import FormatError, contents, refused, tree
from io_files import assert_same, join, signed, split

import bitnet_jax.io
from bitnet_jax.io import _safetensors

KINDS = ["plain", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("dense", "version 1"))]


@pytest.fixture(scope="module", params=KINDS)
def each(request, tmp_path_factory):
    """The bytes of a small file of each kind, and a place to write it changed."""
    path, found = contents(tmp_path_factory.mktemp("each"))
    return path, found[request.param]


def test_each_kind_of_file_comes_back(each):
    path, content = each
    with open(path, "wb") as file:
        file.write(content)
    assert_same(bitnet_jax.io.load(path), tree())
    assert_same(bitnet_jax.io.load(path, mmap=True), tree())


def test_every_flipped_bit_is_refused(each):
    path, content = each
    assert 2000 < len(content) < 4000
    with open(path, "wb") as file:
        file.write(content)
    passed = []
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(content)):
            at, byte = bit // 8, content[bit // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), at)
            try:
                bitnet_jax.io.load(path)
            except FormatError:
                pass
            else:
                passed.append(bit)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert passed == []
    assert "layer" in bitnet_jax.io.load(path)  # every bit was put back


def test_every_truncation_is_refused(each):
    path, content = each
    for length in range(len(content)):
        refused(path, content[:length])


@pytest.mark.parametrize("more", [1, 8, 5000])
def test_appended_bytes_are_refused(each, more):
    path, content = each
    refused(path, content + b"\0" * more, f"has {more} bytes after its last tensor")


def test_the_helper_signs_as_save_does(small):
    path, content = small
    with open(path, "wb") as file:
        file.write(signed(*split(content)))
    assert "layer" in bitnet_jax.io.load(path)


def test_huge_and_short_headers_are_refused(small, monkeypatch):
    path, content = small
    refused(path, b"\xff" * 8 + content[8:], "it gives its header 18446744073709551615 bytes")
    refused(path, b"", "it has 0 bytes")
    refused(path, (5).to_bytes(8, "little") + b"[1,2]", "not a JSON object")
    refused(path, (2).to_bytes(8, "little") + b"\xff\xfe", "is not JSON")
    refused(path, join(b"[" * 100_000, b""), "is not JSON")
    refused(path, join(b'{"a":' + b"9" * 5000 + b"}", b""), "is not JSON|must have a dtype")
    refused(path, join({}, b""), "was not written by bj.io.save.* name its folder")
    refused(path, b"GGUF" + content[4:], "is a GGUF file.*from_pretrained and inspect read it")
    monkeypatch.setattr(_safetensors, "MAX_HEADER", 100)
    refused(path, content, "header of .* bytes; the most is 100")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            b'"layer/bias":{',
            b'"layer/bias":{"dtype":"BF16","shape":[9],"data_offsets":[0,18]},"layer/bias":{',
        ),
        (b'"version":"2"', b'"version":"2","version":"2"'),
        (b'"shape":[9]', b'"shape":[9],"shape":[9]'),
    ],
)
def test_duplicate_keys_are_refused(small, old, new):
    path, content = small
    header, data = split(content)
    raw = json.dumps(header, separators=(",", ":")).encode()
    assert raw.count(old) == 1
    refused(path, join(raw.replace(old, new), data), "is there twice")


def test_a_relabelled_dtype_is_refused(small):
    path, content = small
    header, data = split(content)
    header["layer/kernel.codes"]["dtype"] = "I8"
    for content in (join(header, data), signed(header, data)):
        refused(path, content, "declares 'layer/kernel.codes' as U8 .* and has I8")


def mutated(random, header):
    """A header, as bytes, with one to three bytes or numbers in it changed, added or lost."""
    raw = bytearray(header)
    for _ in range(random.integers(1, 4)):
        at = random.integers(len(raw))
        kind = random.integers(5)
        if kind == 0:
            raw[at] = random.integers(256)
        elif kind == 1:
            del raw[at : at + random.integers(1, 9)]
        elif kind == 2:
            raw[at:at] = random.choice(
                list(b' ,:{}[]"0123456789eE.-'), random.integers(1, 4)
            ).tolist()
        elif kind == 3:  # two pieces change places
            other, size = random.integers(len(raw)), random.integers(1, 30)
            one, two = raw[at : at + size], raw[other : other + size]
            if abs(at - other) >= size and len(one) == len(two):
                raw[at : at + size], raw[other : other + size] = two, one
        else:
            digits = [i for i, byte in enumerate(raw) if byte in b"0123456789"]
            raw[random.choice(digits)] = random.integers(ord("0"), ord("9") + 1)
    return bytes(raw)


def test_random_headers_are_refused_or_mean_the_same(each):
    path, content = each
    end = 8 + int.from_bytes(content[:8], "little")
    random, refusals = np.random.default_rng(0), 0
    for _ in range(500):
        header = mutated(random, content[8:end])
        with open(path, "wb") as file:
            file.write(join(header, content[end:]))
        try:
            got = bitnet_jax.io.load(path)
        except FormatError:
            refusals += 1
        else:
            assert_same(got, tree())
    assert 400 < refusals < 500  # some changes are of spaces


def test_every_relabelled_dtype_is_refused(each):
    path, content = each
    header, data = split(content)
    for name in header.keys() - {"__metadata__"}:
        for tag in _safetensors.TAGS.values():
            if tag != header[name]["dtype"]:
                refused(path, join(header | {name: header[name] | {"dtype": tag}}, data))


def test_every_duplicate_key_is_refused(each):
    path, content = each
    header, data = split(content)
    for key, entry in header.items():
        twice = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}"
        refused(path, join(twice.encode(), data), "is there twice")
        for inner, value in entry.items():
            raw = json.dumps(entry)[:-1] + f", {json.dumps(inner)}: {json.dumps(value)}}}"
            twice = json.dumps(header).replace(json.dumps(entry), raw)
            refused(path, join(twice.encode(), data), "is there twice")
