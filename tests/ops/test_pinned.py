"""Bits where XLA would contract, fold or drop a rounding; each case differed without its pin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax._quantize.pinned import pinned, widened

pytestmark = pytest.mark.optimised

FLOATS = ("float32", "bfloat16", "float16")


def gaussian(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_value_is_its_own(dtype):
    bits = jnp.arange(2**16, dtype=jnp.uint16)
    if dtype == "float32":
        bits = bits.astype(jnp.uint32) << 16 | 0xABCD
    x = jax.lax.bitcast_convert_type(bits, jnp.dtype(dtype))
    kept = ~np.isnan(np.asarray(x, np.float32))
    for run in (pinned, jax.jit(pinned), jax.vmap(pinned)):
        np.testing.assert_array_equal(np.asarray(run(x))[kept], np.asarray(x)[kept])
        assert np.isnan(np.asarray(run(x), np.float32)[~kept]).all()
        assert_same_bits(jax.jit(widened)(x)[kept], np.asarray(x)[kept].astype(np.float32))


def test_gradients_pass_through():
    x, t = gaussian(0, 8), gaussian(1, 8)
    assert_same_bits(jax.grad(lambda x: (pinned(x) * t).sum())(x), t)
    assert_same_bits(jax.jvp(pinned, (x,), (t,))[1], t)


def test_x_known_when_compiled():
    x, w = gaussian(0, 1, 37), gaussian(1, 37, 61)
    assert_same_bits(jax.jit(lambda w: bj.ternary_dot(x, w))(w), bj.ternary_dot(x, w))


def test_x_and_w_known_then_an_add():
    x, packed, c = gaussian(0, 1, 37), bj.pack(gaussian(1, 37, 61)), gaussian(2, 1, 61)
    y = bj.matmul(x, packed, implementation="reference")
    run = jax.jit(lambda c: bj.matmul(x, packed, implementation="reference") + c)
    assert_same_bits(run(c), np.asarray(y) + np.asarray(c))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", [False, True])
def test_a_bias_or_residual_straight_into_the_next_layer(dtype, norm):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                how = {"param_dtype": x.dtype, "bias_init": nn.initializers.normal()}
                x = x + bj.linen.BitDense(64, norm=norm, **how)(x)
            return x

    net, x = Net(), gaussian(0, 8, 64, dtype=dtype)
    params = net.init(jax.random.key(0), x)
    packed = {"params": bj.pack_params(params["params"])[0]}
    want = net.apply(params, x)
    assert want.dtype == dtype
    for tree in (params, packed, bj.prepare(packed), bj.prepare(packed, "xla")):
        assert_same_bits(jax.jit(net.apply)(tree, x), want)
        assert_same_bits(jax.jit(lambda x, tree=tree: net.apply(tree, x))(x), want)


@pytest.mark.parametrize("packed", [False, True])
def test_an_int8_embedding_then_positions(packed):
    class Embedded(nn.Module):
        @nn.compact
        def __call__(self, ids, positions):
            return nn.Embed(50, 64)(ids) + positions

    model = bj.linen.ternarize(Embedded(), select=lambda *_: bj.Int8Config())
    ids, positions = jnp.arange(9), jnp.broadcast_to(gaussian(0, 1, 64), (9, 64))
    params = model.init(jax.random.key(0), ids, positions)["params"]
    want = model.apply({"params": params}, ids, positions)
    tree = bj.linen.pack(model, params, ids, positions)[0] if packed else params
    assert_same_bits(jax.jit(model.apply)({"params": tree}, ids, positions), want)


def test_quantised_activations_then_an_add():
    x, c = gaussian(0, 8, 64), gaussian(1, 8, 64)
    run = jax.jit(lambda x, c: bj.fake_quantize_activations(x) + c)
    assert_same_bits(run(x, c), np.asarray(bj.fake_quantize_activations(x)) + np.asarray(c))
    w, kept = gaussian(2, 64, 16), bj.Int8Config()
    run = jax.jit(lambda w, c: bj.fake_quantize(w, kept) + c)
    c = gaussian(3, 64, 16)
    assert_same_bits(run(w, c), np.asarray(bj.fake_quantize(w, kept)) + np.asarray(c))


W = jax.random.normal(jax.random.key(7), (32, 16))
INT8 = bj.Int8Config()
OF_TRANSPOSED = {
    "pinned": pinned,
    "widened": widened,
    "quantize": bj.quantize,
    "fake_quantize": bj.fake_quantize,
    "fake_quantize, int8": lambda w: bj.fake_quantize(w, INT8, contracting_axes=0),
    "quantize_activations": bj.quantize_activations,
    "quantize_activations, groups": lambda x: bj.quantize_activations(
        x, bj.ActivationConfig(group=8)
    ),
    "pack": bj.pack,
    "pack, int8": lambda w: bj.pack(w, INT8),
    "unpack": lambda w: bj.unpack(bj.pack(w)),
    "ternary_dot, kernel": lambda w: bj.ternary_dot(jnp.ones((3, 16), w.dtype), w),
    "ternary_dot, x": lambda x: bj.ternary_dot(x, jnp.eye(32, 4, dtype=x.dtype)),
    "matmul": lambda x: bj.matmul(x, bj.pack(W.astype(x.dtype))),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OF_TRANSPOSED)
def test_a_call_of_a_known_transposed_array(name, dtype):
    """XLA evaluates such a call while it compiles, and its bitcasts read views as if none."""
    known = W.astype(dtype)

    def run(a):
        results = OF_TRANSPOSED[name](a.T)
        # Transposed again: XLA keeps the view through the whole call.
        return jax.tree.map(lambda y: y.T if y.ndim == 2 else y, results)

    right = jax.jit(run)(known)
    jax.tree.map(assert_same_bits, jax.jit(lambda: jax.jit(run)(known))(), right)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_known_scale_is_divided_by(dtype):
    """Large enough that XLA folds step by step, and would multiply by a rounded reciprocal."""
    w = gaussian(8, 256, 512, dtype=dtype)
    right = jax.jit(lambda w: bj.pack(w, INT8))(w)
    known = jax.jit(lambda: jax.jit(lambda w: bj.pack(w, INT8))(w))()
    jax.tree.map(assert_same_bits, known, right)
    codes = jax.jit(bj.quantize_activations)(w)
    jax.tree.map(assert_same_bits, jax.jit(lambda: jax.jit(bj.quantize_activations)(w))(), codes)
