"""BitDense: Dense's fields and initialisation, and one set of bits."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from flax import linen as nn
from linen_layers import K, N, inputs, ready
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax.linen import BitDense


def test_fields_are_those_of_dense():
    theirs = {f.name: f.default for f in dataclasses.fields(nn.Dense)}
    ours = {f.name: f.default for f in dataclasses.fields(BitDense)}
    added = {k: ours[k] for k in ours if k not in theirs}
    assert added == {
        "weights": bj.B158,
        "activations": bj.ActivationConfig(),
        "norm": False,
        "backward_dtype": None,
    }
    assert {k: ours[k] for k in theirs if k != "kernel_init"} == {
        k: v for k, v in theirs.items() if k != "kernel_init"
    }


def init(layer, x):
    return jax.jit(layer.init)(jax.random.key(1), x)["params"]


def test_float_checkpoints_drop_in():
    x = inputs(3, K)
    params = init(nn.Dense(N), x)
    chex.assert_trees_all_equal(params, init(BitDense(N), x))
    y = BitDense(N).apply({"params": params}, x)
    wanted = bj.ternary_dot(x, params["kernel"]) + params["bias"][None]
    assert_same_bits(y, wanted)


CASES = {
    "plain": ({}, jnp.float32),
    "no bias": (dict(use_bias=False), jnp.float32),
    "norm": (dict(norm=True), jnp.float32),
    "norm, bf16 inputs": (dict(norm=True, dtype=jnp.bfloat16), jnp.bfloat16),
    "dtype bf16": (dict(dtype=jnp.bfloat16), jnp.float32),
    "params bf16": (dict(param_dtype=jnp.bfloat16), jnp.bfloat16),
    "per channel": (dict(weights=bj.PHASE4), jnp.float32),
    "groups": (dict(weights=bj.TernaryConfig(granularity=8)), jnp.float32),
    "odd groups": (dict(weights=bj.TernaryConfig(granularity=3)), jnp.float32),
    "4-bit activations": (dict(activations=bj.ActivationConfig(bits=4)), jnp.float32),
}


@pytest.mark.optimised
@cases("name", list(CASES), core=["norm, bf16 inputs"])
def test_one_set_of_bits(name):
    fields, dtype = CASES[name]
    x = inputs(5, K, dtype=dtype)
    layer, *forms = ready(fields, x)

    def apply(p, x):
        return layer.apply({"params": p}, x)

    wanted = jax.jit(apply)(forms[0], x)
    assert wanted.dtype == (layer.dtype or layer.param_dtype)
    for params in forms:
        assert_same_bits(apply(params, x), wanted)
        assert_same_bits(jax.jit(apply)(params, x), wanted)
        assert_same_bits(jax.jit(apply)(params, x[2:3]), wanted[2:3])
        assert_same_bits(apply(params, x[2]), wanted[2])
        assert_same_bits(jax.vmap(apply, in_axes=(None, 0))(params, x), wanted)
        assert_same_bits(apply(params, x.reshape(5, 1, K)), wanted.reshape(5, 1, N))
    value, _ = jax.value_and_grad(lambda p: apply(p, x).astype(jnp.float32).sum())(forms[0])
    assert np.isfinite(value)


def test_weight_only_agrees_within_a_tolerance():
    x = inputs(5, K)
    layer, params, packed, fast = ready(dict(activations=None), x)
    exact = np.asarray(x, np.float64) @ np.asarray(packed["kernel"].dequantize(), np.float64)
    exact = exact + np.asarray(params["bias"], np.float64)
    for form in (params, packed, fast):
        y = jax.jit(layer.apply)({"params": form}, x)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.standard_promotion
def test_integer_inputs_are_taken_as_dense_takes_them():
    x = jnp.arange(2 * K).reshape(2, K) % 5
    layer, params, packed, _ = ready({}, x.astype(jnp.float32))
    apply = jax.jit(layer.apply)
    wanted = apply({"params": params}, x.astype(jnp.float32))
    assert_same_bits(apply({"params": params}, x), wanted)
    assert_same_bits(apply({"params": packed}, x), wanted)


def test_norm_is_rms_norm_before_quantising():
    x = 7.0 * inputs(4, K)
    layer, params, *_ = ready(dict(norm=True), x)
    wide = np.asarray(x, np.float64)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    plain = jax.jit(BitDense(N).apply)({"params": params}, jnp.asarray(normal, jnp.float32))
    y = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)

    def loss(x, norm):
        return (nn_norm(x) if norm is None else bj._quantize.straight_through.rms_normalize(x)).dot(
            inputs(K, seed=3)
        )

    def nn_norm(x):
        return x / jnp.sqrt(jnp.mean(x * x) + 1e-5)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    ours, theirs = (gradient(x[0], norm) for norm in (True, None))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_fields_stand_in_the_order_of_dense():
    theirs = [f.name for f in dataclasses.fields(nn.Dense) if f.name not in ("parent", "name")]
    ours = [f.name for f in dataclasses.fields(BitDense) if f.name not in ("parent", "name")]
    added = ["weights", "activations", "norm", "backward_dtype"]
    assert ours == theirs + added  # so positional arguments mean the same
    assert issubclass(BitDense, nn.Dense)
    layer = BitDense(N, False)
    assert (layer.features, layer.use_bias) == (N, False)


@cases(
    "fields",
    {
        "no bias": dict(use_bias=False),
        "bf16": dict(param_dtype=jnp.bfloat16),
        "initializers": dict(
            kernel_init=nn.initializers.normal(0.3), bias_init=nn.initializers.normal(0.1)
        ),
    },
    core=["initializers"],
)
def test_init_has_the_bits_of_dense(fields):
    x = inputs(1, K, dtype=fields.get("param_dtype", jnp.float32))
    ours, theirs = (init(layer, x) for layer in (BitDense(N, **fields), nn.Dense(N, **fields)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for name, leaf in theirs.items():
        assert_same_bits(ours[name], leaf)


@pytest.mark.full
def test_norm_is_close_to_float64_and_keeps_its_bits_for_any_batch():
    """Zero tokens, large and tiny ones among them."""
    x = np.array(inputs(6, K))
    x[1], x[2], x[3] = 0.0, x[2] * 1e4, x[3] * 1e-4
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    layer, params, packed, fast = ready(dict(norm=True), jnp.asarray(x))
    # The codes are those of the normalised token, so y is within one code step a feature.
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    near = oracles.dot64(exact.astype(np.float32), kernel, bj.B158, layer.activations) + bias
    step = np.maximum(abs(exact).max(-1, keepdims=True), 1e-5) / 127
    y = layer.apply({"params": params}, jnp.asarray(x))
    off = abs(np.asarray(y) - near)
    assert (off <= step * np.asarray(packed["kernel"].scale) + 1e-5).all()
    assert (off.max(-1) < 1e-4).sum() >= 4  # most tokens flip no code
    for rows in (slice(0, 1), slice(2, 3), slice(1, 4)):
        for form in (params, packed, fast):
            some = jax.jit(layer.apply)({"params": form}, jnp.asarray(x[rows]))
            assert_same_bits(some, y[rows])


@pytest.mark.standard_promotion
@cases("dtype", {d.__name__: d for d in (jnp.int8, jnp.uint8, jnp.bool_)}, core=["bool"])
def test_small_integers_and_booleans_are_inputs(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, K)), dtype)
    layer, params, packed, _ = ready({}, x.astype(jnp.float32))
    apply = jax.jit(layer.apply)
    wanted = apply({"params": params}, x.astype(jnp.float32))
    assert wanted.dtype == jax.eval_shape(nn.Dense(N).apply, {"params": params}, x).dtype
    assert_same_bits(apply({"params": params}, x), wanted)
    assert_same_bits(apply({"params": packed}, x), wanted)


def test_no_rows():
    layer, params, packed, fast = ready({}, inputs(2, K))
    for form in (params, packed, fast):
        assert layer.apply({"params": form}, jnp.zeros((0, K))).shape == (0, N)
