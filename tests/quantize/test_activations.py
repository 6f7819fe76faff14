"""Codes and scales of activations against float64 NumPy."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases

import bitnet_jax as bj

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def gaussian(shape, seed=0, dtype=np.float32, sigma=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * sigma).astype(dtype)


@cases("bits", range(2, 9), core=[2, 8])
def test_activations_at_every_width(bits):
    config = bj.ActivationConfig(bits=bits)
    x = gaussian((5, 33), seed=bits)
    codes, gamma = jax.jit(functools.partial(bj.quantize_activations, config=config))(x)
    assert (codes.dtype, gamma.dtype, gamma.shape) == (jnp.int8, jnp.float32, (5, 1))
    exact, exact_gamma = oracles.activations64(x, config)
    np.testing.assert_array_equal(gamma, exact_gamma)
    assert np.abs(np.asarray(codes) - exact).max() <= 0.5 + 1e-5
    assert np.abs(codes).max() == config.qmax == 2 ** (bits - 1) - 1
    want_codes, want_gamma = oracles.activations32(x, config)
    oracles.assert_same_bits(codes, want_codes)
    oracles.assert_same_bits(gamma, want_gamma)


@cases("dtype", DTYPES, core=["bfloat16"])
@pytest.mark.parametrize(
    ("shape", "axes"), [((7,), -1), ((2, 3, 5), (-1,)), ((2, 3, 4, 5), (1, 2, 3))]
)
def test_activations_over_any_axes(shape, axes, dtype):
    x = gaussian(shape, dtype=dtype)
    codes, gamma = bj.quantize_activations(x, axes=axes)
    shared = (axes,) if isinstance(axes, int) else axes
    want_codes, want_gamma = oracles.activations32(x, bj.ActivationConfig(), shared)
    oracles.assert_same_bits(codes, want_codes)
    oracles.assert_same_bits(gamma, want_gamma)


@cases("dtype", DTYPES, core=["bfloat16"])
@pytest.mark.parametrize(
    ("shape", "group"), [((12,), 3), ((2, 3, 64), 16), ((5, 8), 8), ((5, 8), 1)]
)
def test_each_group_of_a_token_has_its_own_gamma(shape, group, dtype):
    config = bj.ActivationConfig(group=group)
    x = gaussian(shape, dtype=dtype)
    codes, gamma = jax.jit(functools.partial(bj.quantize_activations, config=config))(x)
    assert gamma.shape == (*shape[:-1], shape[-1] // group)
    want_codes, want_gamma = oracles.activations32(x, config)
    oracles.assert_same_bits(codes, want_codes)
    oracles.assert_same_bits(gamma, want_gamma)
    # Against float64, from the definition.
    parts = np.asarray(x, np.float64).reshape(*shape[:-1], -1, group)
    largest = np.maximum(np.abs(parts).max(-1, keepdims=True), config.eps)
    exact = (parts * 127 / largest).reshape(shape)
    assert np.abs(np.asarray(codes) - exact).max() <= 0.5 + 1e-5
    step = np.repeat(np.asarray(gamma), group, -1) * np.float32(1 / 127)
    hat = jax.jit(functools.partial(bj.fake_quantize_activations, config=config))(x)
    oracles.assert_same_bits(hat, (np.asarray(codes, np.float32) * step).astype(dtype))


def test_the_gradient_of_grouped_activations_is_straight_through():
    config = bj.ActivationConfig(group=4)
    x, g = gaussian((5, 24)), gaussian((5, 24), 1)
    _, pull = jax.vjp(lambda x: bj.fake_quantize_activations(x, config), x)
    oracles.assert_same_bits(pull(g)[0], g)


def test_groups_of_tokens_without_features():
    codes, gamma = bj.quantize_activations(
        np.zeros((2, 0), np.float32), bj.ActivationConfig(group=4)
    )
    assert (codes.shape, gamma.shape) == ((2, 0), (2, 0))


def test_a_bad_feature_spoils_its_group_alone():
    x = gaussian((2, 8))
    x[1, 5] = np.nan
    _, gamma = bj.quantize_activations(x, bj.ActivationConfig(group=4))
    assert np.isfinite(gamma).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-6, 3e38])
def test_activations_of_any_magnitude_are_finite(magnitude):
    x = np.array([[magnitude, -magnitude, 0.0]], np.float32)
    codes, gamma = bj.quantize_activations(x)
    assert np.isfinite(gamma).all()
    want = 127 if magnitude > 1 else round(127 * magnitude / 1e-5)
    assert codes.tolist() == [[want, -want, 0]]
    assert np.isfinite(bj.fake_quantize_activations(x)).all()


@pytest.mark.parametrize("eps", [1e-30, 1e-38, 1e-60, 1e39])
def test_an_activation_eps_is_refused_or_works(eps):
    try:
        config = bj.ActivationConfig(eps=eps)
    except ValueError as error:
        assert "`eps`" in str(error)  # noqa: PT017 - either outcome is right
        return
    codes, gamma = bj.quantize_activations(np.zeros((1, 4), np.float32), config)
    assert not np.asarray(codes).any()
    assert 0 < gamma.item() < np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_has_a_gamma_that_is_not_finite(bad):
    x = gaussian((3, 8))
    x[1, 4] = bad
    _, gamma = bj.quantize_activations(x)
    assert np.isfinite(gamma).tolist() == [[True], [False], [True]]


def test_a_token_without_features_is_given_eps():
    codes, gamma = bj.quantize_activations(np.zeros((2, 0), np.float32))
    assert codes.shape == (2, 0)
    np.testing.assert_array_equal(gamma, np.float32(1e-5))


# XLA's CPU flushes subnormals to zero and NumPy does not: no value that leads to one.
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0)


@hypothesis.given(
    x=hnp.arrays(np.float32, (3, 8), elements=FLOATS), bits=st.sampled_from([2, 4, 8])
)
def test_any_token_has_the_oracles_codes(x, bits):
    config = bj.ActivationConfig(bits=bits)
    codes, gamma = bj.quantize_activations(x, config)
    want_codes, want_gamma = oracles.activations32(x, config)
    oracles.assert_same_bits(codes, want_codes)
    oracles.assert_same_bits(gamma, want_gamma)
    assert np.abs(codes).max() <= config.qmax


W = np.ones((4, 3), np.float32)
GROUP = bj.ActivationConfig(group=2)


@pytest.mark.parametrize("function", [bj.quantize_activations, bj.fake_quantize_activations])
@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "match"),
    [
        (TypeError, (np.ones((2, 3), np.int32),), {}, r"`x` must be floating point .*int32"),
        (TypeError, ("x",), {}, r"`x` must be a floating-point array, got str"),
        (TypeError, (W, 8), {}, r"`config` must be a ActivationConfig.*bj.ActivationConfig\(\)"),
        (ValueError, (W,), {"axes": 2}, r"`axes` must name axes of a rank-2"),
        (ValueError, (W,), {"axes": (0, -2)}, r"`axes` names an axis twice"),
        (ValueError, (W, GROUP), {}, r"`config.group`=2 does not divide .*\(3,\). Pass a group"),
        (ValueError, (W, GROUP), {"axes": 0}, r"`axes`=\(0,\) .*`config.group`=2 .*axes=-1, or"),
    ],
)
def test_bad_activations_are_refused_with_a_remedy(function, kind, args, kwargs, match):
    with pytest.raises(kind, match=match):
        function(*args, **kwargs)
