"""The two-bit layout, byte by byte, against pure Python."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases

import bitnet_jax as bj
from bitnet_jax._packed import trits

ALL_FOURS = np.array(list(itertools.product((-1, 0, 1), repeat=4)), np.int8)
pack_trits = jax.jit(trits.pack_trits, static_argnums=1)
unpack_trits = jax.jit(trits.unpack_trits, static_argnums=(1, 2))


def draw_codes(shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def test_all_81_bytes():
    packed = np.asarray(pack_trits(ALL_FOURS, 1))
    assert (packed.dtype, packed.shape) == (np.uint8, (81, 1))
    want = [
        (a + 1) | (b + 1) << 2 | (c + 1) << 4 | (d + 1) << 6 for a, b, c, d in ALL_FOURS.tolist()
    ]
    assert packed.ravel().tolist() == want
    assert len(set(want)) == 81
    np.testing.assert_array_equal(unpack_trits(packed, 1, 4), ALL_FOURS)


def test_the_bytes_named_in_the_file():
    for four, byte in (
        ([0, 0, 0, 0], 0x55),
        ([1, 1, 1, 1], 0xAA),
        ([-1, -1, -1, -1], 0x00),
        ([1, -1, -1, -1], 0b00000010),
        ([-1, -1, -1, 1], 0b10000000),
        ([1], 0b01010110),
    ):
        assert pack_trits(np.array(four, np.int8), 0).tolist() == [byte]
        assert oracles.pack_line(four) == [byte]
    assert trits.ZEROS == 0x55


@cases("length", range(1, 14), core=[1, 3, 5, 8])
def test_every_length(length):
    line = draw_codes((length,), length)
    packed = pack_trits(line, 0)
    assert packed.tolist() == oracles.pack_line(line.tolist())
    assert packed.shape == (trits.packed_length(length),) == (-(-length // 4),)
    back = unpack_trits(packed, 0, length)
    assert back.dtype == jnp.int8
    assert back.tolist() == line.tolist() == oracles.unpack_line(packed.tolist(), length)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@cases("shape", [(4, 8, 3, 5), (1, 2, 6, 7)], core=[(1, 2, 6, 7)])
def test_every_axis(shape, axis):
    codes = draw_codes(shape)
    packed = pack_trits(codes, axis)
    oracles.assert_same_bits(packed, oracles.pack_bytes(codes, axis))
    oracles.assert_same_bits(unpack_trits(packed, axis, shape[axis]), codes)


def test_a_cut_at_a_multiple_of_four_rows_is_a_cut_between_bytes():
    codes = draw_codes((24, 5))
    packed = np.asarray(pack_trits(codes, 0))
    for rows in (4, 8, 20):
        oracles.assert_same_bits(pack_trits(codes[:rows], 0), packed[: rows // 4])
        oracles.assert_same_bits(pack_trits(codes[rows:], 0), packed[rows // 4 :])


def test_fields_are_planes():
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    for axis in (0, 1):
        fields = np.asarray(trits.fields_of(packed, axis))
        assert fields.shape == (*packed.shape[:axis], 4, *packed.shape[axis:])
        for i in range(4):
            np.testing.assert_array_equal(fields.take(i, axis), (packed >> (2 * i)) & 3)


def invalid(packed, axis, length):
    """The marks of a whole array, which its parts of any size must give too."""
    marks = trits.invalid(packed.reshape(-1), 0, packed.shape, axis, length)
    for size in (1, 5, 64, packed.size):
        for start in range(0, min(packed.size, 300), size):
            part = packed.reshape(-1)[start : start + size].copy()
            about = (part, start, packed.shape, axis, length)
            np.testing.assert_array_equal(trits.invalid(*about), marks[start : start + size])
            assert trits.count_invalid(*about) == marks[start : start + size].sum()
    return marks.reshape(packed.shape)


@pytest.mark.parametrize("length", range(1, 9))
def test_invalid_knows_all_256_bytes_in_every_place(length):
    every = np.arange(256, dtype=np.uint8)
    count = -(-length // 4)
    for place in range(count):
        packed = np.full((count, 256), 0x55, np.uint8)
        packed[place] = every
        used = min(4, length - 4 * place)
        fields = [[(b >> (2 * i)) & 3 for i in range(4)] for b in range(256)]
        want = [3 in f or any(v != 1 for v in f[used:]) for f in fields]
        before = packed.copy()
        got = invalid(packed, 0, length)
        np.testing.assert_array_equal(packed, before)
        assert got.shape == packed.shape
        assert got[place].tolist() == want
        assert not np.delete(got, place, 0).any()
        assert (256 - sum(want)) == 3**used
        np.testing.assert_array_equal(invalid(packed.T, 1, length), got.T)
        np.testing.assert_array_equal(invalid(packed.T, -1, length), got.T)


def test_nothing_that_pack_wrote_is_invalid():
    for shape in ((13, 4), (5, 6), (8, 3)):
        for axis in (0, 1):
            packed = np.asarray(pack_trits(draw_codes(shape), axis))
            assert not invalid(packed, axis, shape[axis]).any()


@pytest.mark.full
@hypothesis.given(
    shape=st.sampled_from([(1, 1), (5, 3), (8, 2), (13, 7)]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
    config=st.sampled_from([bj.B158, bj.PHASE4, bj.TWN]),
    seed=st.integers(0, 2**32 - 1),
    sigma=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
)
def test_unpack_of_pack_is_the_dequantised_kernel(shape, dtype, config, seed, sigma):
    w = (np.random.default_rng(seed).normal(size=shape) * sigma).astype(dtype)
    packed, t = jax.jit(lambda w: (bj.pack(w, config), bj.quantize(w, config)))(w)
    oracles.assert_same_bits(packed.dequantize(), t.dequantize(dtype))
    oracles.assert_same_bits(packed.dequantize(jnp.float32), t.dequantize())
    oracles.assert_same_bits(packed.codes, oracles.pack_bytes(t.codes, 0))
    assert not invalid(np.asarray(packed.codes), 0, shape[0]).any()


@hypothesis.given(line=st.lists(st.integers(-1, 1), min_size=1, max_size=24))
def test_any_line_survives(line):
    packed = oracles.pack_line(line)
    assert oracles.unpack_line(packed, len(line)) == line
    padded = np.array(packed + [0x55] * (6 - len(packed)), np.uint8)  # one shape, one compile
    assert unpack_trits(padded, 0, 24).tolist() == line + [0] * (24 - len(line))
    filled = np.array(line + [0] * (24 - len(line)), np.int8)
    assert pack_trits(filled, 0).tolist() == padded.tolist()
