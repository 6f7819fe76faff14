"""Two-bit kernels at 1.6 bits a weight in a file: the same bits back, and nothing twice spelt."""

import itertools
import os

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from io_files import assert_same, join, pack, signed, split

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax._packed import trits
from bitnet_jax.io import _dense

FormatError = bitnet_jax.io.FormatError
BYTES = [b for b in range(256) if all(b >> i & 3 != 3 for i in (0, 2, 4, 6))]
BLOCK = 1 << 14  # bytes of a plane


def encoded(packed):
    """Trit by trit, from the drawing in the head of the module."""
    out = []
    for at in range(0, len(packed), 5 * BLOCK):
        block = list(packed[at : at + 5 * BLOCK])
        size = -(-len(block) // 5)
        block += [0x55] * (5 * size - len(block))
        for plane, place in itertools.product(range(4), range(size)):
            fields = [block[plane * size + place] >> 2 * i & 3 for i in range(4)]
            fields.append(block[4 * size + place] >> 2 * plane & 3)
            out.append(sum(field * 3**i for i, field in enumerate(fields)))
    return out


def valid(size, seed=0):
    return np.random.default_rng(seed).choice(np.array(BYTES, np.uint8), size)


@pytest.mark.parametrize("size", [0, 1, 4, 5, 6, 10, 99, 5 * BLOCK - 1, 5 * BLOCK, 5 * BLOCK + 7])
def test_the_layout_is_the_one_that_is_drawn(size):
    packed = valid(size)
    stored = _dense.encode(packed)
    assert stored.tolist() == encoded(packed)
    assert stored.size == trits.dense_length(size)
    out = np.full(size, 0xFF, np.uint8)
    assert _dense.decode(stored, out) == 0
    np.testing.assert_array_equal(out, packed)


@hypothesis.given(size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_come_back(size, seed):
    packed = valid(size, seed)
    out = np.empty(size, np.uint8)
    assert _dense.decode(_dense.encode(packed), out) == 0
    np.testing.assert_array_equal(out, packed)


def test_every_stored_byte_is_five_codes_or_refused():
    seen = set()
    for byte in range(256):
        stored, out = np.array([byte, 121, 121, 121], np.uint8), np.empty(5, np.uint8)
        wrong = _dense.decode(stored, out)
        assert wrong == (byte > 242)
        if not wrong:
            seen.add(out.tobytes())
            np.testing.assert_array_equal(_dense.encode(out), stored)
    assert len(seen) == 243


def test_no_two_stored_chunks_are_one():
    """Whatever decodes is what would be encoded: of every byte in every place, at every length."""
    for size in range(1, 11):
        stored = _dense.encode(valid(size))
        for at, byte in itertools.product(range(stored.size), range(256)):
            changed, out = stored.copy(), np.empty(size, np.uint8)
            changed[at] = byte
            if _dense.decode(changed, out) == 0:
                np.testing.assert_array_equal(_dense.encode(out), changed)


def damaged(path, name, at, value):
    """The file with one byte of a tensor changed, signed again."""
    with open(path, "rb") as file:
        header, data = split(file.read())
    begin = header[name]["data_offsets"][0]
    at = at % (header[name]["data_offsets"][1] - begin)
    with open(path, "wb") as file:
        file.write(signed(header, data[: begin + at] + bytes([value]) + data[begin + at + 1 :]))


@pytest.mark.parametrize(("at", "value"), [(0, 243), (0, 255), (7, 250), (-1, 243)])
@pytest.mark.parametrize("mmap", [False, True])
def test_bytes_above_242_with_a_valid_digest(path, at, value, mmap):
    bitnet_jax.io.save(path, {"k": pack((24, 10))}, dense=True)
    damaged(path, "k.trits", at, value)
    with pytest.raises(FormatError, match="'k' has 1 bytes that are not five codes, or padding"):
        bitnet_jax.io.load(path, mmap=mmap)


def test_filling_and_padding_that_is_not_zero_with_a_valid_digest(path):
    tree = {"k": pack((8, 3))}  # six bytes, filled up to ten: planes of two, the last is filling
    for at in (1, 3, 5, 7):  # what is above 81 in these is a field of that last byte
        bitnet_jax.io.save(path, tree, dense=True)
        with open(path, "rb") as file:
            header, data = split(file.read())
        byte = data[header["k.trits"]["data_offsets"][0] + at]
        damaged(path, "k.trits", at, byte % 81 + 162)
        with pytest.raises(FormatError, match="bytes that are not five codes, or padding"):
            bitnet_jax.io.load(path)
    tree = {"k": pack((5, 5))}  # ten bytes, of which the last five hold one code
    bitnet_jax.io.save(path, tree, dense=True)
    with open(path, "rb") as file:
        header, data = split(file.read())
    byte = data[header["k.trits"]["data_offsets"][0] + 7]  # of the byte before last
    damaged(path, "k.trits", 7, (byte + 27) % 81 + byte // 81 * 81)
    with pytest.raises(FormatError, match="bytes that are not five codes, or padding"):
        bitnet_jax.io.load(path)


def test_the_description_says_how_codes_are_stored(path):
    tree = {"k": pack(), "head": bj.pack(jnp.ones((8, 4)), bj.Int8Config()), "x": jnp.ones(3)}
    bitnet_jax.io.save(path, tree, dense=True)
    with open(path, "rb") as file:
        content = file.read()
    header, data = split(content)
    assert set(header) == {"__metadata__", "k.trits", "k.scale", "head.codes", "head.scale", "x"}
    text = header["__metadata__"]["leaves"]
    assert text.count('"stored":"trits"') == 1
    for other in ('"stored":"bits"', '"stored":1', '"storage":"trits"'):
        header["__metadata__"]["leaves"] = text.replace('"stored":"trits"', other)
        with open(path, "wb") as file:
            file.write(signed(header, data))
        with pytest.raises(FormatError, match="invalid description of a leaf"):
            bitnet_jax.io.load(path)
    # What is declared as two-bit codes must be stored as such.
    header["__metadata__"]["leaves"] = text.replace(',"stored":"trits"', "")
    with open(path, "wb") as file:
        file.write(signed(header, data))
    with pytest.raises(FormatError, match=r"lacks the tensor 'k\.codes'"):
        bitnet_jax.io.load(path)


def test_trits_of_another_number_are_refused(path):
    bitnet_jax.io.save(path, {"k": pack((24, 10))}, dense=True)
    with open(path, "rb") as file:
        header, data = split(file.read())
    size = header["k.trits"]["shape"][0]
    assert size == 48
    for wrong in ([size - 4], [size // 2, 2]):
        changed = {**header, "k.trits": {**header["k.trits"], "shape": wrong}}
        with open(path, "wb") as file:
            file.write(join(changed, data))
        with pytest.raises(FormatError, match=r"declares 'k\.trits' as U8|48"):
            bitnet_jax.io.load(path)


def test_dense_and_plain_files_hold_the_same(path, tmp_path):
    tree = {"k": pack((64, 31), bj.PHASE4), "c": pack((3, 8, 5), bj.TWN, batch_axes=0)}
    bitnet_jax.io.save(path, tree, dense=True)
    loaded = bitnet_jax.io.load(path)
    assert_same(loaded, tree)
    bitnet_jax.io.save(tmp_path / "plain", loaded)
    bitnet_jax.io.save(tmp_path / "direct", tree)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "direct").read_bytes()


def test_a_whole_model_is_nineteen_times_smaller(path):
    sizes = (1024, 4096, 4096, 1024)
    random = np.random.default_rng(0)
    params = {
        f"Dense_{i}": {
            "kernel": jnp.asarray(random.standard_normal((a, b), np.float32)),
            "bias": jnp.zeros(b),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }
    packed, report = bj.pack_params(params, bj.B158)
    bitnet_jax.io.save(path, packed, dense=True)
    as_float = 4 * sum(a * b + b for a, b in itertools.pairwise(sizes))
    assert report.model_bytes_before == as_float
    assert as_float / os.path.getsize(path) >= 19
    assert_same(bitnet_jax.io.load(path), packed)
    # The report knows it before: all but the header.
    header = os.path.getsize(path) - report.model_bytes_dense
    assert 0 < header < 4096
