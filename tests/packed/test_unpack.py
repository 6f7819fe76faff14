"""``unpack`` is the inverse of ``pack``: packed again, codes and scale are the same bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

import bitnet_jax as bj

pytestmark = pytest.mark.optimised

CONFIGS = {
    "b158": bj.B158,
    "phase4": bj.PHASE4,
    "groups of phase4": bj.TernaryConfig(threshold=0.1, granularity=4, eps=1e-8),
    "groups": bj.TernaryConfig(granularity=8),
    "median": bj.TernaryConfig("absmedian"),
    "median per channel": bj.TernaryConfig("absmedian", granularity="channel"),
    "median of groups": bj.TernaryConfig("absmedian", 0.3, 4),
    "twn": bj.TWN,
    "survivors": bj.TernaryConfig("survivors", 0.7),
    "survivors of groups": bj.TernaryConfig("survivors", 0.7, 4),
    "high threshold": bj.TernaryConfig(threshold=1.2),
    "median, high threshold": bj.TernaryConfig("absmedian", 1.3, "channel"),
    "survivors, high threshold": bj.TernaryConfig("survivors", 1.1, "channel"),
    "int8": bj.Int8Config(),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def drawn(seed, kind, shape=(24, 8)):
    """Kernels with many and with few zeros, of one magnitude, tiny, and with slices of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape)
    if kind == "no zeros":
        w = rng.uniform(0.2, 1.0, size=shape) * rng.choice([-1.0, 1.0], size=shape)
    if kind == "sparse":
        w *= rng.random(shape) < 0.3
    if kind == "zero slices":
        w[:8] = 0.0
        w[:, ::2] = 0.0
    if kind == "tiny":
        w *= 1e-5
    if kind == "uneven":
        w *= np.exp(rng.normal(size=shape))
    if kind == "one magnitude":
        w = np.sign(w)
    if kind == "zeros":
        w *= 0.0
    return w


KINDS = ["normal", "no zeros", "sparse", "zero slices", "tiny", "uneven", "one magnitude", "zeros"]


def assert_inverse(packed, message=""):
    w = bj.unpack(packed)
    assert (w.shape, w.dtype) == (packed.shape, packed.dtype)
    axes = packed.axes
    again = bj.pack(w, packed.config, contracting_axes=axes.contracting, batch_axes=axes.batch)
    oracles.assert_same_bits(again.codes, packed.codes, message)
    oracles.assert_same_bits(again.scale, packed.scale, message)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    return w


@cases("config", CONFIGS, core=["b158", "groups of phase4", "int8"])
@cases("dtype", DTYPES, core=["bfloat16"])
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_packing_again_changes_no_bit(config, dtype, seed, kind):
    w = drawn(seed, kind).astype(dtype)
    packed = bj.pack(w, config)
    back = assert_inverse(packed, f"{kind}, {seed}")
    # And by the equations, without this library's own code.
    exact = oracles.quantize32(back, config)
    oracles.assert_same_bits(packed.int8_codes(), exact.codes)
    shown = np.broadcast_to(
        np.repeat(np.asarray(packed.scale), len(w) // packed.scale.shape[0], axis=0), w.shape
    )
    oracles.assert_same_bits(shown, exact.scale)


@cases("config", {k: c for k, c in CONFIGS.items() if k != "int8"}, core=["phase4"])
def test_by_float64_too(config):
    packed = bj.pack(drawn(0, "normal", (48, 16)), config)
    exact = oracles.quantize64(bj.unpack(packed), config)
    np.testing.assert_array_equal(packed.int8_codes(), exact.codes)
    np.testing.assert_allclose(
        np.asarray(packed.dequantize()), exact.codes * exact.scale, rtol=1e-6
    )


SHAPES = {
    "one weight of each output": ((1, 5), {}),
    "transposed": ((6, 8), {"contracting_axes": 1}),
    "attention-out": ((3, 4, 5), {"contracting_axes": (0, 1)}),
    "convolution": ((2, 3, 5, 6), {"contracting_axes": (0, 1, 2)}),
    "stacked": ((3, 8, 5), {"batch_axes": 0}),
    "stacked attention": ((2, 3, 4, 5), {"contracting_axes": (1, 2), "batch_axes": 0}),
}


@cases(("shape", "axes"), SHAPES, core=["stacked attention"])
@pytest.mark.parametrize("config", [bj.PHASE4, bj.TernaryConfig("absmedian"), bj.Int8Config()])
def test_every_arrangement_of_axes(shape, axes, config):
    assert_inverse(bj.pack(drawn(1, "normal", shape).astype(np.float32), config, **axes))


@pytest.mark.full
def test_a_large_kernel_whose_sum_rounds():
    for config in (bj.B158, bj.PHASE4, bj.TernaryConfig(granularity=128)):
        assert_inverse(bj.pack(drawn(2, "normal", (1536, 1024)).astype(np.float32), config))


def test_nonzero_weights_have_one_magnitude():
    w = drawn(3, "normal", (64, 16)).astype(np.float32)
    for config, wanted in ((bj.B158, None), (bj.TernaryConfig("absmedian"), 1.0)):
        packed = bj.pack(w, config)
        back, codes = np.asarray(bj.unpack(packed)), np.asarray(packed.int8_codes())
        kept = np.abs(back[codes != 0]) / float(packed.scale[0, 0])
        share = codes.size / (codes != 0).sum() if wanted is None else wanted
        np.testing.assert_allclose(kept, share, rtol=1e-6)
        assert np.abs(back[codes == 0]).max() < 1e-5


def test_it_runs_in_jit_and_over_a_stack():
    w = drawn(4, "normal", (3, 8, 5)).astype(np.float32)
    packed = bj.pack(w, bj.PHASE4, batch_axes=0)
    oracles.assert_same_bits(jax.jit(bj.unpack)(packed), bj.unpack(packed))
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], packed)
        oracles.assert_same_bits(bj.unpack(one), bj.unpack(packed)[i])


def test_a_scale_of_another_program_is_approached():
    packed = bj.pack(drawn(5, "normal").astype(np.float32))
    for factor in (1.1, 3.7, 1e-3):
        foreign = bj.PackedTernary(packed.codes, packed.scale * np.float32(factor), packed.length)
        again = bj.pack(bj.unpack(foreign))
        oracles.assert_same_bits(again.codes, foreign.codes)
        np.testing.assert_allclose(again.scale, foreign.scale, rtol=2e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_unpacked_and_packed_again_gives_the_same_logits(dtype):
    x = jax.random.normal(jax.random.key(0), (8, 32), dtype)
    layers = [nn.Dense(48, param_dtype=dtype), nn.relu, nn.Dense(10, param_dtype=dtype)]
    model = bj.linen.ternarize(nn.Sequential(layers))
    params = model.init(jax.random.key(1), x)["params"]
    packed, _ = bj.linen.pack(model, params, x)
    again = bj.unpack_params(packed)
    logits = model.apply({"params": packed}, x)
    oracles.assert_same_bits(model.apply({"params": again}, x), logits)
    jax.tree.map(oracles.assert_same_bits, bj.linen.pack(model, again, x)[0], packed)
    # What a float network needs is another tree, on the grid itself.
    floats = bj.unpack_params(packed, dequantize=True)
    for name in ("layers_0", "layers_2"):
        hat = bj.fake_quantize(params[name]["kernel"])
        oracles.assert_same_bits(floats[name]["kernel"], hat)
