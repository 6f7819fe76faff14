"""Layers inside `jax.shard_map`, which checks what varies over its mesh axes, as `nn.Dense` in it.

Forward bits are those of the same layer outside. Gradients are sums over devices: they agree
within what the order of a float32 sum allows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from cases import cases
from draws import params_of
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import both_kinds, explicit_in_core, gaussian, mesh_of, put

import bitnet_jax as bj
from bitnet_jax import linen

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

X, IMAGE = gaussian(0, 8, 4, 16), gaussian(1, 8, 6, 6, 4)
GROUPS = bj.TernaryConfig(granularity=8)
LAYERS = {
    "nn.Dense": (nn.Dense(12), X),
    "BitDense": (linen.BitDense(12, norm=True), X),
    "BitDense by groups": (linen.BitDense(12, weights=GROUPS), X),
    "BitDense, weights only": (linen.BitDense(12, activations=None), X),
    "BitDense, bfloat16 backward": (linen.BitDense(12, backward_dtype=jnp.bfloat16), X),
    "BitDenseGeneral": (linen.BitDenseGeneral((3, 4), axis=(-2, -1)), X),
    "BitEinsum": (linen.BitEinsum((16, 3, 4), "btd,dnh->btnh"), X),
    "BitConv": (linen.BitConv(5, (3, 3)), IMAGE),
    "BitConv by groups": (linen.BitConv(5, (3, 3), weights=bj.TernaryConfig(granularity=4)), IMAGE),
    "int8": (linen.BitDense(12, weights=bj.Int8Config()), X),
}
TREES = {
    "float": lambda layer, params, x: params,
    "stored": lambda layer, params, x: bj.linen.pack(layer, params, x)[0],
    "xla": lambda layer, params, x: bj.prepare(bj.linen.pack(layer, params, x)[0], "xla"),
    "cpu": lambda layer, params, x: bj.prepare(bj.linen.pack(layer, params, x)[0], "cpu"),
}
RUNS = [(name, "float") for name in LAYERS]
RUNS += [(name, "stored") for name in LAYERS if name != "nn.Dense"]
RUNS += [(name, "cpu") for name in ("BitDense", "BitDense by groups", "BitEinsum", "int8")]
RUNS += [(name, "xla") for name in ("BitDense", "BitDense by groups")]


def whole(mesh, tree):
    return jax.device_put(tree, NamedSharding(mesh, P()))


def gradients(apply, params, x, *, trained, over=None):
    """Output, mean loss over all devices, and its gradients in x and, if trained, in params."""

    def loss(x, params):
        y = apply(params, x)
        value = jnp.square(y - 1.0).mean()
        return (value if over is None else lax.pmean(value, over)), y

    argnums = (0, 1) if trained else (0,)  # codes have no gradient
    (value, y), grads = jax.value_and_grad(loss, argnums, has_aux=True)(x, params)
    return y, value, grads


@cases(
    ("name", "tree"),
    RUNS,
    core=[("BitDense", "float"), ("BitDense by groups", "stored"), ("BitDense", "cpu")],
)
@explicit_in_core
def test_data_parallel(kind, name, tree):
    layer, x = LAYERS[name]
    params = TREES[tree](layer, params_of(layer, x), x)
    trained = tree == "float"

    def run(params, x, over=None):
        def apply(params, x):
            return layer.apply({"params": params}, x)

        return gradients(apply, params, x, trained=trained, over=over)

    want, mesh = jax.jit(run)(params, x), mesh_of(kind, (8,), ("data",))
    sharded = jax.shard_map(
        functools.partial(run, over="data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P(), (P("data"), P())[: 1 + trained]),
    )
    got = jax.jit(sharded)(whole(mesh, params), put(mesh, x, P("data")))
    if name != "nn.Dense":
        oracles.assert_same_bits(got[0], want[0])
    jax.tree.map(close, got[1:], want[1:])


# Tensor parallel --------------------------------------------------------------------------

W1, W2 = gaussian(2, 16, 16), gaussian(3, 16, 12)
SHARDS = 4  # of the mesh axis "model"
CHANNELS = bj.PHASE4  # a scale for each output: a shard of outputs has the whole kernel's


def packed_dot(x, w, implementation):
    """dx from packed codes, dw from the float kernel: both must pass."""
    packed = bj.prepare(bj.pack(w, CHANNELS), implementation)
    return bj.matmul(x, packed) + (x @ w - lax.stop_gradient(x @ w)) * 0.5


DOTS = {
    "float": jnp.matmul,
    "ternary": lambda x, w: bj.ternary_dot(x, w, CHANNELS),
    "phased": lambda x, w: bj.ternary_dot(x, w, CHANNELS, strength=jnp.float32(0.5)),
    "estimators": lambda x, w: bj.fake_quantize_activations(x) @ bj.fake_quantize(w, CHANNELS),
    "reference": functools.partial(packed_dot, implementation="reference"),
    "xla": functools.partial(packed_dot, implementation="xla"),
    "cpu": functools.partial(packed_dot, implementation="cpu"),
}


def parallel(dot, w1, w2, x):
    """Two layers on one device of a mesh: it has columns of the first, rows of the second."""

    def loss(w1, w2, x):
        y = lax.psum(dot(jnp.tanh(dot(x, w1)), w2), "model")
        return lax.pmean(jnp.square(y - 1.0).mean(), "data")

    return jax.value_and_grad(loss, (0, 1, 2))(w1, w2, x)


def alone(dot, w1, w2, x):
    """The same on one device: a shard after another."""

    def loss(w1, w2, x):
        pairs = zip(jnp.split(w1, SHARDS, 1), jnp.split(w2, SHARDS), strict=True)
        y = sum(dot(jnp.tanh(dot(x, up)), down) for up, down in pairs)
        return jnp.square(y - 1.0).mean()

    return jax.value_and_grad(loss, (0, 1, 2))(w1, w2, x)


@cases("name", list(DOTS), core=["ternary", "cpu"])
@explicit_in_core
def test_tensor_and_data_parallel(kind, name):
    mesh, specs = mesh_of(kind, (2, SHARDS)), (P(None, "model"), P("model"), P("data"))
    dot, operands = DOTS[name], (W1, W2, X[:, 0])
    run = functools.partial(parallel, dot)
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P(), specs)))
    got = run(*(put(mesh, a, spec) for a, spec in zip(operands, specs, strict=True)))
    jax.tree.map(close, got, jax.jit(functools.partial(alone, dot))(*operands))


@both_kinds
def test_a_mesh_axis_that_stays_outside(kind):
    """A shard_map over "data" alone; the kernels stay sharded over "model"."""
    mesh, dot = mesh_of(kind), DOTS["ternary"]
    where = {"mesh": mesh, "axis_names": {"data"}}

    def loss(w, x):
        value = jnp.square(dot(x, w) - 1.0).mean()
        return lax.pmean(value, "data")

    run = jax.shard_map(
        jax.grad(loss, (0, 1)), in_specs=(P(), P("data")), **where, out_specs=(P(), P("data"))
    )
    got = jax.jit(run)(put(mesh, W1, P(None, "model")), put(mesh, X[:, 0], P("data")))
    want = jax.grad(lambda w, x: jnp.square(dot(x, w) - 1.0).mean(), (0, 1))(W1, X[:, 0])
    jax.tree.map(close, got, want)


# Other layers -----------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = bj.nnx.BitLinear(16, 32, norm=True, rngs=rngs)
        self.down = bj.nnx.BitLinear(32, 12, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        table = nn.Embed(9, 16)
        tokens = table((jnp.abs(x[:, 0]) * 4).astype(jnp.int32))
        return table.attend(nn.Dense(16)(tokens + x))


def of_nnx():
    split, state = nnx.split(Model(nnx.Rngs(0)))
    return (lambda state, x: nnx.merge(split, state)(x)), state


def of_an_embedding():
    tied = bj.linen.ternarize(Tied(), select=lambda *_: bj.Int8Config())
    return (lambda params, x: tied.apply({"params": params}, x)), params_of(tied, X[:, 0])


def of_adapters():
    configs = {"up": bj.B158, "down": bj.Int8Config()}
    packed = {"up": bj.pack(W1, configs["up"]), "down": bj.pack(W2, configs["down"])}

    def apply(adapters, x):
        kernels = bj.lora.attach(packed, adapters)
        for name, features in (("up", 16), ("down", 12)):
            layer = linen.BitDense(features, weights=configs[name], use_bias=False)
            x = layer.apply({"params": {"kernel": kernels[name]}}, x)
        return x

    adapters = bj.lora.init(packed, 2, key=jax.random.key(0))
    return apply, jax.tree.map(lambda leaf: gaussian(leaf.size, *leaf.shape), adapters)


def of_a_function():
    apply = bj.ternarize(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])
    return apply, {"up": W1, "down": W2}


@cases(
    ("make", "same_bits"),
    {
        "nnx": (of_nnx, True),
        "embedding": (of_an_embedding, True),
        "adapters": (of_adapters, False),  # their low-rank part is a float product
        "ternarize": (of_a_function, True),
    },
    core=["nnx", "adapters"],
)
def test_models(make, same_bits):
    (apply, params), x = make(), X[:, 0]
    mesh, run = mesh_of("auto", (8,), ("data",)), functools.partial(gradients, apply, trained=True)
    want = jax.jit(run)(params, x)
    sharded = jax.shard_map(
        functools.partial(run, over="data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P(), (P("data"), P())),
    )
    got = jax.jit(sharded)(whole(mesh, params), put(mesh, x, P("data")))
    if same_bits:
        oracles.assert_same_bits(got[0], want[0])
    jax.tree.map(close, got, want)
