"""Groups of activations in `ternary_dot` and the layers, alone and with groups of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from dots import DTYPES, gaussian, ternary_dot, vjp
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj


def groups(size):
    return bj.ActivationConfig(group=size)


def weights(granularity):
    return bj.TernaryConfig(granularity=granularity)


# Of the same size, of sizes of which one divides the other, and of others: 48 is contracted.
PAIRS = {
    "activations alone": (weights("tensor"), groups(8)),
    "channels": (weights("channel"), groups(16)),
    "int8": (bj.Int8Config(), groups(8)),
    "same size": (weights(8), groups(8)),
    "finer activations": (weights(24), groups(4)),
    "finer weights": (weights(4), groups(24)),
    "neither divides": (weights(16), groups(12)),
    "one feature": (weights("tensor"), groups(1)),
    "whole": (weights("tensor"), groups(48)),
    "4 bits": (weights(8), bj.ActivationConfig(bits=4, group=16)),
}
SOME = ["same size", "neither divides"]


def by_definition64(x, w, config, activations):
    """The sum over groups of (integer sum) * gamma / qmax * scale, term by term."""
    codes, gamma = oracles.activations32(x, activations)
    kernel = oracles.quantize32(w, config)
    y = np.zeros((x.shape[0], w.shape[1]))
    for k in range(x.shape[1]):
        step = gamma[:, k // activations.group].astype(np.float64) / activations.qmax
        y += np.outer(codes[:, k] * step, kernel.codes[k] * kernel.scale[k].astype(np.float64))
    return y


@cases(("config", "activations"), PAIRS, core=SOME)
def test_the_product_and_its_gradients(config, activations):
    x, w, g = gaussian((5, 48)), gaussian((48, 10), 1), gaussian((5, 10), 2)
    y, dx, dw = vjp(x, w, g, config, activations=activations)
    oracles.assert_same_bits(y, oracles.dot32(x, w, config, activations))
    truth = by_definition64(x, w, config, activations)
    np.testing.assert_allclose(y, truth, rtol=0, atol=1e-6 * np.abs(truth).max())
    want_dx, want_dw = oracles.gradients64(x, w, g, config, activations)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5)


@cases("dtype", DTYPES, core=["bfloat16"])
@pytest.mark.parametrize("pair", SOME)
def test_dtypes(pair, dtype):
    config, activations = PAIRS[pair]
    x, w = gaussian((5, 48), dtype=dtype), gaussian((48, 10), 1, dtype)
    y, dx, dw = vjp(x, w, np.ones((5, 10), np.float32), config, activations=activations)
    oracles.assert_same_bits(y, oracles.dot32(x, w, config, activations).astype(dtype))
    assert (dx.dtype, dw.dtype) == (dtype, dtype)


def test_one_group_is_one_scale_per_token():
    x, w = gaussian((5, 48)), gaussian((48, 10), 1)
    oracles.assert_same_bits(ternary_dot(x, w, activations=groups(48)), ternary_dot(x, w))


def test_several_contracting_axes_and_batch_axes():
    x, w = gaussian((3, 5, 4, 6)), gaussian((3, 4, 6, 7), 1)
    axes = {"contracting_axes": (1, 2), "batch_axes": (0,)}
    for size in (2, 12):  # inside the last axis, and whole last axes
        y = ternary_dot(x, w, bj.PHASE4, activations=groups(size), **axes)
        want = oracles.dot32(x, w, bj.PHASE4, groups(size), (1, 2), (0,))
        oracles.assert_same_bits(y, want)


def test_a_bad_feature_gives_a_nan_row():
    x, w = gaussian((5, 48)), gaussian((48, 10), 1)
    clean = np.asarray(ternary_dot(x, w, activations=groups(8)))
    x[3, 7] = np.inf
    y = np.asarray(ternary_dot(x, w, activations=groups(8)))
    assert np.isnan(y[3]).all()
    oracles.assert_same_bits(np.delete(y, 3, 0), np.delete(clean, 3, 0))


def test_a_traced_strength():
    config, activations = PAIRS["same size"]
    x, w, g = gaussian((5, 48)), gaussian((48, 10), 1), gaussian((5, 10), 2)

    @jax.jit
    def run(x, w, strength):
        y, pull = jax.vjp(
            lambda x, w: bj.ternary_dot(x, w, config, activations=activations, strength=strength),
            x,
            w,
        )
        return y, *pull(jnp.asarray(g))

    y, dx, dw = run(x, w, jnp.float32(1))
    oracles.assert_same_bits(y, oracles.dot32(x, w, config, activations))
    want_dx, want_dw = oracles.gradients64(x, w, g, config, activations)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5)
    x_q, w_q = oracles.operands64(x, w, config, activations)
    half = (x + x_q) / 2 @ ((w + w_q) / 2)
    np.testing.assert_allclose(run(x, w, jnp.float32(0.5))[0], half, rtol=1e-5, atol=1e-5)


def test_one_outlier_costs_its_group_alone():
    x, w = gaussian((64, 128)), gaussian((128, 32), 1)
    x[:, 3] *= 100
    hat = np.asarray(bj.quantize(w).dequantize(), np.float64)
    errors = []
    for config in (bj.ActivationConfig(), groups(16)):
        y = ternary_dot(x, w, activations=config)
        errors.append(np.linalg.norm(y - x @ hat))
    assert errors[1] < errors[0] / 2


X, W = np.ones((2, 8), np.float32), np.ones((8, 3), np.float32)


def test_groups_that_do_not_divide_are_refused():
    match = r"`activations.group`=3 does not divide the contraction \(8,\). Pass a group size that"
    with pytest.raises(ValueError, match=f"^ternary_dot: {match}"):
        bj.ternary_dot(X, W, activations=groups(3))
    with pytest.raises(ValueError, match=f"^matmul: {match}"):
        bj.matmul(X, bj.pack(W), activations=groups(3))


def test_a_convolution_refuses_groups():
    layer = bj.linen.BitConv(4, (3,), activations=groups(8))
    x = jnp.ones((2, 5, 8))
    match = r"`activations.group`=8, and a convolution has one scale .*\(select=\), or pass"
    with pytest.raises(ValueError, match=f"ternary_conv: {match}"):
        layer.init(jax.random.key(0), x)
    plain = layer.clone(activations=bj.ActivationConfig())
    params = plain.init(jax.random.key(0), x)["params"]
    packed, _ = bj.linen.pack(plain, params, x)
    with pytest.raises(ValueError, match=f"convolve: {match}"):
        layer.apply({"params": packed}, x)


def test_layers_and_ternarized_functions_take_them():
    activations = groups(8)
    x = jnp.asarray(gaussian((3, 4, 16)))

    def f(w, x):
        return jax.nn.relu(x @ w["a"]) @ w["b"]

    w = {"a": jnp.asarray(gaussian((16, 24), 1)), "b": jnp.asarray(gaussian((24, 5), 2))}
    ternary = bj.ternarize(f, activations=activations)
    y = jax.jit(ternary)(w, x)
    dot = functools.partial(bj.ternary_dot, activations=activations)
    oracles.assert_same_bits(y, dot(jax.nn.relu(dot(x, w["a"])), w["b"]))
    packed, _ = ternary.pack(w, x)
    oracles.assert_same_bits(jax.jit(ternary)(packed, x), y)
    per_token = bj.ActivationConfig()
    for layer in (
        bj.linen.BitDense(5, activations=activations),
        bj.linen.BitDenseGeneral((2, 3), activations=activations),
        bj.linen.BitEinsum((16, 3), "bti,io->bto", activations=activations),
    ):
        params = layer.init(jax.random.key(0), x)["params"]
        packed, _ = bj.linen.pack(layer, params, x)
        y = layer.apply({"params": params}, x)
        oracles.assert_same_bits(layer.apply({"params": packed}, x), y)
        assert (y != layer.clone(activations=per_token).apply({"params": params}, x)).any()
    layer = bj.nnx.BitLinear(16, 5, activations=activations, rngs=nnx.Rngs(0))
    packed, _ = bj.nnx.pack(layer)
    oracles.assert_same_bits(packed(x), layer(x))


def test_what_groups_do_not_fit_is_said_before_a_call():
    activations = bj.ActivationConfig(group=16)
    ternary = bj.ternarize(lambda p, x: x @ p["w"], activations=activations)
    params, x = {"w": jnp.ones((24, 8))}, jnp.ones((2, 24))
    (row,) = ternary.explain(params, x).rows
    assert row.config is None
    assert "`activations.group`=16 does not divide" in row.why
    model = bj.linen.ternarize(nn.Conv(4, (3,)), activations=activations)
    image = jnp.ones((1, 8, 16))
    (row,) = bj.linen.explain(model, image).rows
    assert "a convolution has one scale per example" in row.why
    for refused in (lambda: ternary.pack(params, x), lambda: model.init(jax.random.key(0), image)):
        with pytest.raises(ValueError, match=r"activations\.group"):
            refused()
