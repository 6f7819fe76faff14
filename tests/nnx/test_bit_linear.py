"""BitLinear: nnx.Linear's arguments and parameters, the same bits from float and packed kernels."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from flax import nnx
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax.nnx import BitLinear

K, N = 24, 10


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer(**fields):
    made = nnx.jit(lambda: BitLinear(K, N, rngs=nnx.Rngs(0), **fields))()
    if made.bias is not None:
        made.bias.set_value(inputs(N, seed=5).astype(made.bias.get_value().dtype))
    return made


def pack(model, config=bj.B158):
    """A copy of a model with packed kernels."""
    copy = nnx.clone(model)
    nnx.update(copy, bj.pack_params(nnx.state(copy, nnx.Param), config)[0])
    return copy


def prepare(packed):
    copy = nnx.clone(packed)
    nnx.update(copy, bj.prepare(nnx.state(copy, nnx.Param)))
    return copy


def test_arguments_are_those_of_linear():
    ours = set(inspect.signature(BitLinear).parameters)
    assert ours - set(inspect.signature(nnx.Linear.__init__).parameters) == {
        "weights",
        "activations",
        "norm",
        "backward_dtype",
    }
    theirs = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    made = BitLinear(K, N, rngs=nnx.Rngs(0))
    assert_same_bits(made.kernel.get_value(), theirs.kernel.get_value())
    assert sorted(nnx.state(made)) == sorted(nnx.state(theirs)) == ["bias", "kernel"]
    for name in ("use_bias", "dtype", "param_dtype", "precision"):
        assert getattr(made, name) == getattr(theirs, name)
    nnx.update(made, nnx.state(theirs))  # a float checkpoint drops in


@pytest.mark.optimised
@cases(
    "fields",
    {
        "plain": {},
        "no bias": dict(use_bias=False),
        "norm": dict(norm=True),
        "dtype bf16": dict(dtype=jnp.bfloat16),
        "per channel": dict(weights=bj.PHASE4),
        "groups": dict(weights=bj.TernaryConfig(granularity=8)),
    },
    core=["per channel"],
)
def test_one_set_of_bits(fields):
    x = inputs(5, K)
    model = layer(**fields)
    packed = pack(model, model.weights)
    wanted = nnx.jit(lambda m, x: m(x))(model, x)
    linen = bj.linen.BitDense(N, **fields)
    params = {name: v.get_value() for name, v in nnx.state(model, nnx.Param).items()}
    assert_same_bits(jax.jit(linen.apply)({"params": params}, x), wanted)
    for form in (model, packed, prepare(packed)):
        assert_same_bits(form(x), wanted)
        assert_same_bits(nnx.jit(lambda m, x: m(x))(form, x), wanted)
        assert_same_bits(form(x[1]), wanted[1])
        graphdef, state = nnx.split(form)
        assert_same_bits(nnx.merge(graphdef, state)(x), wanted)
        assert_same_bits(jax.jit(lambda s, x, g=graphdef: nnx.merge(g, s)(x))(state, x), wanted)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = BitLinear(K, 16, rngs=rngs)
        self.second = BitLinear(16, 4, norm=True, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.standard_promotion
def test_a_net_trains_and_serves_the_same_bits():
    x, target = inputs(32, K), inputs(32, 4, seed=2)
    net = nnx.jit(lambda: Net(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(net, optax.adamw(1e-2), wrt=nnx.Param)

    def loss(net):
        return jnp.square(net(x) - target).mean()

    @nnx.jit
    def step(net, optimizer):
        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        return value, grads

    first, grads = step(net, optimizer)
    assert bj.analysis.gradient_flow(grads).ok
    for _ in range(20):
        value, _ = step(net, optimizer)
    assert value < 0.8 * first
    wanted = nnx.jit(lambda m, x: m(x))(net, x)
    packed = pack(net)
    assert_same_bits(nnx.jit(lambda m, x: m(x))(packed, x), wanted)
    assert_same_bits(nnx.jit(lambda m, x: m(x))(prepare(packed), x), wanted)


@pytest.mark.standard_promotion
def test_biases_train_around_packed_kernels():
    x, target = inputs(32, K), inputs(32, 4, seed=2)
    net = pack(nnx.jit(lambda: Net(nnx.Rngs(0)))())
    optimizer = nnx.Optimizer(net, optax.adamw(1e-1), wrt=bj.nnx.trainable)
    assert all(leaf.dtype != jnp.uint8 for leaf in jax.tree.leaves(nnx.state(optimizer)))

    @nnx.jit
    def step(net, optimizer):
        def loss(net):
            return jnp.square(net(x) - target).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, bj.nnx.trainable))(net)
        optimizer.update(net, grads)
        return value

    codes = np.asarray(net.first.kernel.get_value().codes)
    values = [step(net, optimizer) for _ in range(10)]
    assert values[-1] < values[0]
    np.testing.assert_array_equal(net.first.kernel.get_value().codes, codes)


def test_strength():
    x, model = inputs(4, K), layer()
    run = nnx.jit(lambda m, x, **how: m(x, **how), static_argnames=())
    dense = np.asarray(x) @ np.asarray(model.kernel[...]) + np.asarray(model.bias[...])[None]
    np.testing.assert_allclose(model(x, strength=0.0), dense, rtol=1e-5, atol=1e-5)
    assert_same_bits(run(model, x, strength=jnp.float32(1.0)), run(model, x))


def test_what_is_refused():
    with pytest.raises(ValueError, match="`dot_general` cannot be used"):
        BitLinear(K, N, dot_general=jnp.dot, rngs=nnx.Rngs(0))
    packed = pack(layer())
    packed.weights = bj.PHASE4
    with pytest.raises(ValueError, match="set weights="):
        packed(inputs(4, K))
    packed = pack(layer())
    packed.out_features = 11
    with pytest.raises(ValueError, match=r"stands for shape \(24, 10\).*\(24, 11\)"):
        packed(inputs(4, K))
