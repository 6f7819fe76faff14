"""Straight-through estimators: on the grid, identity backward, phased in by `strength`."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases
from dots import AXES, CONFIGS, DTYPES, gaussian

import bitnet_jax as bj

fake_quantize = jax.jit(bj.fake_quantize, static_argnums=1, static_argnames=AXES)


@cases("dtype", DTYPES, core=["bfloat16"])
@cases("config", CONFIGS, core=["b158", "groups"])
def test_every_entry_is_on_the_grid(config, dtype):
    w = gaussian((24, 10), dtype=dtype, sigma=0.05)
    hat = fake_quantize(w, config)
    exact = oracles.quantize32(w, config)
    oracles.assert_same_bits(hat, (exact.codes * exact.scale).astype(dtype))
    assert set(np.sign(np.asarray(hat, np.float32)).ravel()) == {-1, 0, 1}


@cases("dtype", DTYPES, core=["float16"])
@pytest.mark.parametrize("strength", [1.0, 0.25, jnp.float32(1.0), jnp.float32(0.25)])
def test_the_gradient_of_fake_quantize_is_the_identity(dtype, strength):
    w, g = gaussian((24, 10), dtype=dtype), gaussian((24, 10), 1, dtype)
    _, pull = jax.vjp(lambda w: bj.fake_quantize(w, strength=strength), w)
    oracles.assert_same_bits(pull(g)[0], g)
    _, pull = jax.vjp(lambda x: bj.fake_quantize_activations(x, strength=strength), w)
    oracles.assert_same_bits(pull(g)[0], g)


@cases("dtype", DTYPES, core=["bfloat16"])
def test_strength_blends_and_ends_exactly_on_the_grid(dtype):
    w = gaussian((24, 10), dtype=dtype)
    wide, exact = w.astype(np.float64), oracles.quantize32(w, bj.B158)
    q = exact.codes * exact.scale
    traced = jax.jit(lambda w, s: bj.fake_quantize(w, strength=s))
    for strength in (0.0, 0.25, 0.5, 0.9):
        want = (1 - strength) * wide + strength * q.astype(np.float64)
        tight = float(ml_dtypes.finfo(dtype).eps)
        for got in (
            fake_quantize(w, strength=jnp.float32(strength)),
            traced(w, jnp.float32(strength)),
            bj.fake_quantize(w, strength=strength),
        ):
            assert got.dtype == dtype
            np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tight, atol=1e-7)
    oracles.assert_same_bits(traced(w, jnp.float32(0.0)), w)
    oracles.assert_same_bits(bj.fake_quantize(w, strength=0.0), w)
    oracles.assert_same_bits(traced(w, jnp.float32(1.0)), q.astype(dtype))
    oracles.assert_same_bits(bj.fake_quantize(w, strength=1), q.astype(dtype))


def test_a_traced_strength_traces_once_and_has_no_gradient():
    w = gaussian((24, 10))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(w, strength):
        return (bj.fake_quantize(w, strength=strength) ** 2).sum()

    values = [float(loss(w, jnp.float32(s))) for s in (0.0, 0.3, 0.7, 1.0)]
    assert len(set(values)) == 4
    assert jax.jit(jax.grad(loss, argnums=1))(w, jnp.float32(0.5)) == 0.0


def test_fake_quantize_takes_axes():
    w = gaussian((3, 8, 5))
    exact = oracles.quantize32(w, bj.PHASE4, None, 0)
    hat = fake_quantize(w, bj.PHASE4, batch_axes=0)
    oracles.assert_same_bits(hat, exact.codes * exact.scale)
    exact = oracles.quantize32(w, bj.PHASE4, (0, 1))
    hat = fake_quantize(w, bj.PHASE4, contracting_axes=(0, 1))
    oracles.assert_same_bits(hat, exact.codes * exact.scale)


@cases("dtype", DTYPES, core=["bfloat16"])
@cases("bits", [2, 4, 8], core=[2, 8])
def test_fake_quantized_activations_are_on_their_grid(dtype, bits):
    config = bj.ActivationConfig(bits=bits)
    x = gaussian((5, 33), dtype=dtype)
    codes, gamma = oracles.activations32(x, config)
    want = (codes * (gamma * np.float32(1 / config.qmax))).astype(dtype)
    oracles.assert_same_bits(bj.fake_quantize_activations(x, config), want)
