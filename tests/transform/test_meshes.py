"""Ternary functions on meshes: shards, codes that are gathered, Explicit axes, boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import assert_same_bits

import bitnet_jax as bj

ternarize = bj.ternarize
pytestmark = pytest.mark.optimised

X = jax.random.normal(jax.random.key(0), (8, 16))
W = jax.random.normal(jax.random.key(1), (16, 16))
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
dot = bj.ternary_dot


def mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        specs = [("data", None), ("data", None), (None, "model")]
        for i, spec in enumerate(specs):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), spec)
            x = nn.relu(nn.Dense(32, kernel_init=init, use_bias=False, name=f"layer_{i}")(x))
        return x


@cases("kind", list(KINDS), core=["auto"])
def test_boxed_params_in_shards(kind):
    boxed = Net().init(jax.random.key(1), X)["params"]
    ternary = ternarize(lambda params, x: Net().apply({"params": params}, x))
    layers = bj.linen.ternarize(Net())

    def loss(function):
        return jax.jit(lambda p, x: jnp.square(function(p, x)).mean())

    alone = jax.jit(ternary)(nn.unbox(boxed), X)
    on = mesh(kind)
    with jax.set_mesh(on), bj.sharding.gather_codes("data"):
        places = jax.tree.map(lambda spec: NamedSharding(on, spec), nn.get_partition_spec(boxed))
        params = jax.device_put(boxed, places)
        x = jax.device_put(X, NamedSharding(on, P("data")))
        assert_same_bits(jax.jit(ternary)(params, x), alone)
        ours = jax.jit(jax.grad(loss(ternary))).lower(params, x).compile()
        theirs = (
            jax.jit(jax.grad(loss(lambda p, x: layers.apply({"params": p}, x))))
            .lower(params, x)
            .compile()
        )
        moved = [
            bj.sharding.collectives(program).of("all-gather").rows for program in (ours, theirs)
        ]
        assert [(g.dtype, g.shape) for g in moved[0]] == [(g.dtype, g.shape) for g in moved[1]]
        assert {"u8"} <= {g.dtype for g in moved[0]}
        packed, _ = ternary.pack(params, x)
        assert isinstance(packed["layer_0"]["kernel"], nn.Partitioned)
        assert_same_bits(jax.jit(ternary)(packed, x), alone)


def test_shard_map():
    with jax.set_mesh(mesh("auto")):

        def fn(w, x):
            run = jax.shard_map(
                lambda w, x: lax.psum(x @ w, "data"), in_specs=(P(), P("data")), out_specs=P()
            )
            return run(w, x)

        ternary = ternarize(fn)
        y = jax.jit(ternary)(W, X)
        np.testing.assert_allclose(y, dot(X, W).reshape(4, 2, 16).sum(0), rtol=1e-5, atol=1e-5)
        assert_same_bits(jax.jit(ternary)(ternary.pack(W, X)[0], X), y)
        assert ternary.explain(W, X).flops == 2 * 8 * 16 * 16 * 2  # each half of "model" does it


@pytest.mark.full
def test_experts_in_shards():
    experts = jax.random.normal(jax.random.key(5), (4, 16, 8))
    tokens = jnp.stack([X, 2 * X, 3 * X, -X])

    def fn(w, x):
        specs = (P("data"), P("data"))
        run = jax.shard_map(
            lambda w, x: jnp.einsum("ebk,ekn->ebn", x, w), in_specs=specs, out_specs=P("data")
        )
        return run(w, x)

    with jax.set_mesh(mesh("auto")):
        ternary = ternarize(fn)
        wanted = dot(tokens, experts, contracting_axes=(1,), batch_axes=(0,))
        assert_same_bits(jax.jit(ternary)(experts, tokens), wanted)
        assert_same_bits(jax.jit(ternary)(ternary.pack(experts, tokens)[0], tokens), wanted)


def test_a_kernel_that_a_shard_map_splits_is_float():
    def fn(w, x):
        specs = (P(None, "model"), P("data"))
        return jax.shard_map(lambda w, x: x @ w, in_specs=specs, out_specs=P("data", "model"))(w, x)

    with jax.set_mesh(mesh("auto")):
        (row,) = ternarize(fn).explain(W, X).rows
        assert row.why == "only a part of its axis 1 is taken"
        with pytest.raises(NotImplementedError, match="only a part of its axis 1 is taken"):
            ternarize(lambda p, x: fn(p["w"], x), select=bj.only("w"))({"w": W}, X)


@pytest.mark.full
def test_inside_a_shard_map():
    ternary = ternarize(lambda w, x: jnp.tanh(x @ w) @ w)
    with jax.set_mesh(mesh("auto")):
        run = jax.jit(jax.shard_map(ternary, in_specs=(P(), P("data")), out_specs=P("data")))
        wanted = jax.jit(ternary)(W, X)
        assert_same_bits(run(W, X), wanted)
        assert_same_bits(run(bj.pack(W), X), wanted)


def test_explicit_axes_and_out_sharding():
    on = mesh("explicit")
    with jax.set_mesh(on):
        x = jax.device_put(X, NamedSharding(on, P("data")))

        def fn(params, x):
            h = jnp.tanh(x @ params["up"])
            return jnp.einsum("bk,kn->bn", h, params["down"], out_sharding=P("data", None))

        places = {"up": P(None, "model"), "down": P("model", None)}
        params = {name: jax.device_put(W, NamedSharding(on, at)) for name, at in places.items()}
        ternary = ternarize(fn)
        y = jax.jit(ternary)(params, x)
        assert y.sharding.spec == P("data", None)
        assert_same_bits(y, dot(jnp.tanh(dot(x, params["up"])), params["down"]))
        packed, _ = ternary.pack(params, x)
        assert_same_bits(jax.jit(ternary)(packed, x), y)
        grads = jax.jit(jax.grad(lambda p: ternary(p, x).sum()))(params)
        assert grads["up"].sharding.spec == P(None, "model")
