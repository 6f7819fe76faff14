"""BitDense in training: whole nets, gradients, strength."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from cases import cases
from draws import params_of
from flax import linen as nn
from flax.training.train_state import TrainState
from linen_layers import K, N, Net, inputs, ready
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax.linen import BitDense


@pytest.mark.optimised
@pytest.mark.standard_promotion
def test_a_net_trains_and_serves_the_same_bits():
    x, target = inputs(32, K), inputs(32, 4, seed=2)
    net = Net()
    state = TrainState.create(apply_fn=net.apply, params=params_of(net, x), tx=optax.adamw(1e-2))

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn({"params": params}, x)
            return jnp.square(logits - target).mean(), logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), value, logits, grads

    _, first, _, grads = step(state)
    assert bj.analysis.gradient_flow(grads).ok
    for _ in range(20):
        params = state.params
        state, value, logits, _ = step(state)
    assert value < 0.8 * first
    packed, _ = bj.pack_params(params)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(net.apply)({"params": form}, x), logits)


def test_strength_is_traced_once():
    x = inputs(4, K)
    layer, params, *_ = ready({}, x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def apply(strength):
        return layer.apply({"params": params}, x, strength=strength)

    dense = jax.jit(nn.Dense(N).apply)({"params": params}, x)
    np.testing.assert_allclose(apply(jnp.float32(0.0)), dense, rtol=1e-5, atol=1e-5)
    assert_same_bits(apply(jnp.float32(1.0)), jax.jit(layer.apply)({"params": params}, x))
    between = np.asarray(apply(jnp.float32(0.5)))
    assert np.isfinite(between).all()
    assert not np.array_equal(between, np.asarray(dense))


def test_gradients_reach_inputs_through_packed_kernels():
    x = inputs(4, K)
    layer, params, packed, fast = ready({}, x)
    gradient = jax.jit(jax.grad(lambda x, p: layer.apply({"params": p}, x).sum()))
    wanted = gradient(x, params)
    for form in (packed, fast):
        got = gradient(x, form)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


class FloatNet(nn.Module):
    """``Net`` before anyone made it ternary: the same names, in the same order."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="BitDense_0")(x))
        x = x + nn.Dense(16, name="BitDense_1")(x)
        return nn.Dense(4, name="BitDense_2")(nn.relu(x))


@pytest.mark.full
def test_a_float_net_drops_in_whole():
    x = inputs(2, K)
    theirs, ours = (jax.jit(net.init)(jax.random.key(1), x) for net in (FloatNet(), Net()))
    chex.assert_trees_all_equal_shapes_and_dtypes(theirs, ours)
    chex.assert_trees_all_equal(theirs, ours)
    packed, report = bj.pack_params(theirs)
    paths = [f"params/BitDense_{i}/kernel" for i in range(3)]
    assert [layer.path for layer in report.rows] == paths
    assert_same_bits(jax.jit(Net().apply)(packed, x), jax.jit(Net().apply)(theirs, x))


@cases(
    "config",
    {"b158": bj.B158, "channel": bj.PHASE4, "8": bj.TernaryConfig(granularity=8)},
    core=["channel"],
)
def test_outputs_and_gradients_are_those_of_the_equations(config):
    x, g = inputs(3, 2, K), inputs(3, 2, N, seed=4)
    layer, params, packed, _ = ready(dict(weights=config), x)

    def apply(params, x):
        return layer.apply({"params": params}, x)

    y, pull = jax.vjp(apply, params, x)
    kernel, bias = params["kernel"], np.asarray(params["bias"])
    wanted = oracles.dot32(x, kernel, config, layer.activations) + bias
    assert_same_bits(y, wanted)
    grads, dx = pull(g)
    dx_wanted, dw_wanted = oracles.gradients64(x, kernel, g, config, layer.activations)
    np.testing.assert_allclose(dx, dx_wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["kernel"], dw_wanted, rtol=1e-5, atol=1e-5)
    db_wanted = np.asarray(g, np.float64).sum((0, 1))
    np.testing.assert_allclose(grads["bias"], db_wanted, rtol=1e-5, atol=1e-5)
    assert_same_bits(jax.vjp(lambda x: apply(packed, x), x)[1](g)[0], dx)


@pytest.mark.full
def test_backward_dtype_rounds_the_gradients_only():
    x = inputs(4, K)
    layer, params, *_ = ready({}, x)
    low = BitDense(N, backward_dtype=jnp.bfloat16)

    def grads(layer):
        return jax.value_and_grad(
            lambda p: jnp.square(layer.apply({"params": p}, x)).sum(), allow_int=False
        )(params)

    (y, exact), (y_low, rough) = grads(layer), grads(low)
    assert_same_bits(y_low, y)
    assert not np.array_equal(rough["kernel"], exact["kernel"])
    largest = float(abs(exact["kernel"]).max())
    np.testing.assert_allclose(rough["kernel"], exact["kernel"], atol=0.02 * largest)
    assert_same_bits(rough["bias"], exact["bias"])


def test_packed_kernels_are_ternary_whatever_the_strength():
    x = inputs(4, K)
    layer, params, packed, fast = ready({}, x)
    wanted = jax.jit(layer.apply)({"params": params}, x)
    for form in (packed, fast):
        for strength in (0.0, jnp.float32(0.5)):
            y = jax.jit(layer.apply)({"params": form}, x, strength=strength)
            assert_same_bits(y, wanted)


def test_a_schedule_of_strength_does_not_retrace_a_training_step():
    x, target = inputs(8, K), inputs(8, N, seed=2)
    layer, params, *_ = ready({}, x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, strength):
        def loss(p):
            return jnp.square(layer.apply({"params": p}, x, strength=strength) - target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value, grads

    for strength in (0.0, 0.25, 0.5, 1.0):
        params, value, grads = step(params, jnp.float32(strength))
        assert np.isfinite(value)
        assert bj.analysis.gradient_flow(grads).ok
