"""Files whose chunks are hashed side by side, on every hasher of this processor and on none."""

import jax.numpy as jnp
import numpy as np
import pytest
from damaged_files import as_version_1
from io_files import assert_same, gaussian, signed, split

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax._native import sha256
from bitnet_jax.io import FormatError, _chunks, _safetensors
from bitnet_jax.io._tensors import Part

HASHERS = sha256.hashers()
MIB = _safetensors.CHUNK


@pytest.fixture(params=[*HASHERS, None], ids=[*(h.name for h in HASHERS), "hashlib"])
def hasher(request, monkeypatch):
    """Hashes with this from now on."""
    found = () if request.param is None else (request.param,)
    monkeypatch.setattr(sha256, "hashers", lambda: found)
    monkeypatch.setattr(sha256, "_WORTH", 10**9)
    return request.param


def kernel(seed, rows, columns):
    """A packed kernel of random codes, (rows, columns) bytes, padded: 2 codes in its last."""
    fields = np.random.default_rng(seed).integers(0, 3, (4, rows, columns)).astype(np.uint8)
    fields[2:, -1] = 1
    codes = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    return bj.PackedTernary(jnp.asarray(codes), jnp.ones((1, 1)), length=4 * rows - 2)


@pytest.fixture(scope="module")
def tree():
    """Tensors of many chunks, of one, of a part of one, of a few bytes and of none."""
    return {
        "long": kernel(0, 1024, 5001),
        "whole": kernel(1, 1024, 2048),
        "layers": {seed: kernel(seed, 301, 1207) for seed in range(5)},
        "bias": jnp.arange(9, dtype=jnp.bfloat16),
        "none": jnp.ones((0, 3)),
        "int8": bj.pack(jnp.asarray(gaussian((256, 640))), bj.Int8Config()),
        "step": np.int64(7),
    }


@pytest.fixture(scope="module")
def contents(tree, tmp_path_factory):
    """The bytes of a file of the tree, plain and dense; save takes its digest with hashlib."""
    path = tmp_path_factory.mktemp("whole") / "file"
    found = {}
    for dense in (False, True):
        bitnet_jax.io.save(path, tree, dense=dense)
        found[dense] = path.read_bytes()
    return found


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


@pytest.fixture
def asked(monkeypatch):
    """Counts the chunks that were hashed natively."""
    real, found = sha256._natively, []

    def watched(one, messages):
        found.extend(messages)
        return real(one, messages)

    monkeypatch.setattr(sha256, "_natively", watched)
    return found


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_files_are_loaded(hasher, asked, path, contents, tree, dense, mmap):
    write(path, contents[dense])
    assert_same(bitnet_jax.io.load(path, mmap=mmap), tree)
    assert bool(asked) == (hasher is not None)


@pytest.mark.parametrize("dense", [False, True])
def test_a_changed_bit_in_any_tensor_is_found(hasher, path, contents, dense):
    header, data = split(contents[dense])
    start = len(contents[dense]) - len(data)
    for entry in header.values():
        begin, end = entry.get("data_offsets", (0, 0))
        for at in {begin, (begin + end) // 2, end - 1} if end > begin else ():
            changed = bytearray(contents[dense])
            changed[start + at] ^= 1 << at % 8
            write(path, changed)
            with pytest.raises(FormatError, match="was changed after it was written"):
                bitnet_jax.io.load(path)


def tensor(header, name):
    return slice(*header[name]["data_offsets"])


@pytest.mark.parametrize("name", ["long", "layers/3"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_three_under_a_right_digest_is_found(hasher, path, contents, name, where):
    header, data = split(contents[False])
    place = tensor(header, f"{name}.codes")
    codes = np.frombuffer(data, np.uint8).copy()
    at = int(where * (place.stop - place.start)) % (place.stop - place.start)
    codes[place][at] |= 3 << 2
    write(path, signed(header, codes.tobytes()))
    with pytest.raises(FormatError, match=f"{name}' has 1 bytes"):
        bitnet_jax.io.load(path)


def test_padding_under_a_right_digest_is_found(hasher, path, contents):
    header, data = split(contents[False])
    place = tensor(header, "long.codes")
    codes = np.frombuffer(data, np.uint8).copy()
    codes[place][-5:] ^= 0b11 << 6  # the last field, 1, is 2
    write(path, signed(header, codes.tobytes()))
    with pytest.raises(FormatError, match="long' has 5 bytes"):
        bitnet_jax.io.load(path)


def test_files_of_version_1_are_loaded(hasher, asked, path, contents, tree):
    write(path, as_version_1(contents[False]))
    assert_same(bitnet_jax.io.load(path), tree)
    assert not asked  # their digest is one chain


def test_batches_are_all_chunks_in_order_and_of_a_bounded_size(hasher, path, contents):
    write(path, contents[False])
    with _chunks.open_source("load", str(path)) as source:
        tensors = source.header.tensors
        parts = {name: Part(name, "", "uint8", (1,)) for name in tensors}
        batches = list(_chunks._batches(source, parts, lambda part: None))
    found = [(chunk.part.name, chunk.place) for batch in batches for chunk in batch]
    assert found == [(name, chunk) for name in sorted(tensors) for chunk in tensors[name].chunks]
    sizes = [sum(chunk.place.stop - chunk.place.start for chunk in batch) for batch in batches]
    assert max(sizes) <= MIB * (hasher.streams if hasher else 1)
    shared = len(contents[False]) / _chunks._THREADS
    assert max(sizes) <= max(MIB, shared)  # each thread has something to do
