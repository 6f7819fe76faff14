"""BitDense: nn.Dense's fields and parameters, and one set of bits from float and packed kernels."""

import dataclasses

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax.linen import BitDense

K, N = 24, 10


def inputs(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def init(layer, x, seed=1):
    return layer.init(jax.random.key(seed), x)["params"]


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


def ready(fields, x):
    """A layer with a bias that is not zero, its float, packed and prepared params."""
    layer = BitDense(N, **fields)
    params = init(layer, x)
    if "bias" in params:
        params["bias"] = inputs(N, seed=5).astype(params["bias"].dtype)
    packed, _ = bj.pack_params(params, layer.weights)
    return layer, params, packed, bj.prepare(packed)


@pytest.mark.parametrize("name", CASES)
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
        np.testing.assert_allclose(layer.apply({"params": form}, x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.standard_promotion
def test_integer_inputs_are_taken_as_dense_takes_them():
    x = jnp.arange(2 * K).reshape(2, K) % 5
    layer, params, packed, _ = ready({}, x.astype(jnp.float32))
    wanted = layer.apply({"params": params}, x.astype(jnp.float32))
    assert_same_bits(layer.apply({"params": params}, x), wanted)
    assert_same_bits(layer.apply({"params": packed}, x), wanted)


def test_norm_is_rms_norm_before_quantising():
    x = 7.0 * inputs(4, K)
    layer, params, *_ = ready(dict(norm=True), x)
    wide = np.asarray(x, np.float64)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    plain = BitDense(N).apply({"params": params}, jnp.asarray(normal, jnp.float32))
    np.testing.assert_allclose(layer.apply({"params": params}, x), plain, rtol=1e-5, atol=1e-5)

    def loss(x, norm):
        return (nn_norm(x) if norm is None else bj._ste.rms_normalize(x)).dot(inputs(K, seed=3))

    def nn_norm(x):
        return x / jnp.sqrt(jnp.mean(x * x) + 1e-5)

    ours, theirs = (jax.grad(loss)(x[0], norm) for norm in (True, None))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class Net(nn.Module):
    """ReLU, a residual and biases between ternary layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(BitDense(16)(x))
        x = x + BitDense(16, norm=True)(x)
        return BitDense(4)(nn.relu(x))


@pytest.mark.standard_promotion
def test_a_net_trains_and_serves_the_same_bits():
    x, target = inputs(32, K), inputs(32, 4, seed=2)
    net = Net()
    state = TrainState.create(apply_fn=net.apply, params=init(net, x), tx=optax.adamw(1e-2))

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn({"params": params}, x)
            return jnp.square(logits - target).mean(), logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), value, logits, grads

    _, first, _, grads = step(state)
    assert bj.gradient_flow(grads).ok
    for _ in range(20):
        params = state.params
        state, value, logits, _ = step(state)
    assert value < 0.8 * first
    packed, _ = bj.pack_params(params)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(net.apply)({"params": form}, x), logits)


class Stack(nn.Module):
    """Three layers under nn.scan, rematerialised."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + BitDense(K)(nn.relu(x)), None


def leading(path, leaf):
    return {"contracting_axes": 1, "batch_axes": 0}


def test_scan_and_remat():
    x = inputs(4, K)
    params = init(Stack(), x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(Stack().apply)({"params": params}, x)
    for form in (params, packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(Stack().apply)({"params": form}, x), wanted)
    grads = jax.grad(lambda p: Stack().apply({"params": p}, x).sum())(params)
    assert bj.gradient_flow(grads).ok


def test_vmap_of_a_module():
    experts = nn.vmap(BitDense, variable_axes={"params": 0}, split_rngs={"params": True})(N)
    x = inputs(3, 4, K)
    params = init(experts, x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = experts.apply({"params": params}, x)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(experts.apply({"params": form}, x), wanted)


class Shared(nn.Module):
    def setup(self):
        self.layer = BitDense(K)

    def __call__(self, x):
        return self.layer(nn.relu(self.layer(x)))


def test_sharing_bind_frozen_dict_and_boxes():
    x = inputs(4, K)
    params = init(Shared(), x)
    assert list(params) == ["layer"]
    packed, _ = bj.pack_params(params)
    wanted = Shared().apply({"params": params}, x)
    assert_same_bits(Shared().apply({"params": packed}, x), wanted)
    assert_same_bits(Shared().bind({"params": packed})(x), wanted)
    assert_same_bits(Shared().apply({"params": flax.core.freeze(packed)}, x), wanted)
    boxed = BitDense(N, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    params = init(boxed, x)
    assert isinstance(params["kernel"], nn.Partitioned)
    packed, _ = bj.pack_params(params)
    wanted = boxed.apply({"params": params}, x)
    assert_same_bits(boxed.apply({"params": packed}, x), wanted)


def test_strength_is_traced_once():
    x = inputs(4, K)
    layer, params, *_ = ready({}, x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def apply(strength):
        return layer.apply({"params": params}, x, strength=strength)

    dense = nn.Dense(N).apply({"params": params}, x)
    np.testing.assert_allclose(apply(jnp.float32(0.0)), dense, rtol=1e-5, atol=1e-5)
    assert_same_bits(apply(jnp.float32(1.0)), layer.apply({"params": params}, x))
    between = np.asarray(apply(jnp.float32(0.5)))
    assert np.isfinite(between).all()
    assert not np.array_equal(between, np.asarray(dense))


def test_gradients_reach_inputs_through_packed_kernels():
    x = inputs(4, K)
    layer, params, packed, fast = ready({}, x)
    wanted = jax.grad(lambda x: layer.apply({"params": params}, x).sum())(x)
    for form in (packed, fast):
        got = jax.grad(lambda x, p=form: layer.apply({"params": p}, x).sum())(x)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_what_is_refused():
    x = inputs(4, K)
    layer, params, packed, _ = ready({}, x)
    with pytest.raises(ValueError, match=r"at kernel stands for shape \(24, 10\).*\(24, 11\)"):
        BitDense(11, use_bias=False).apply({"params": packed}, x)
    with pytest.raises(ValueError, match=r"stands for shape \(24, 10\).*\(20, 10\)"):
        layer.apply({"params": packed}, x[:, :20])
    with pytest.raises(ValueError, match=r"packed with TernaryConfig.*set weights="):
        BitDense(N, weights=bj.PHASE4).apply({"params": packed}, x)
    with pytest.raises(ValueError, match="`dot_general` cannot be used"):
        BitDense(N, dot_general=jax.lax.dot_general).apply({"params": params}, x)
    complex_x = x.astype(jnp.complex64)
    with pytest.raises(TypeError, match="complex64"), jax.numpy_dtype_promotion("standard"):
        layer.apply({"params": params}, complex_x)
