"""A function made ternary computes what the layers of this package compute, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from flax import linen as nn
from linen_models import Model
from oracles import assert_same_bits

import bitnet_jax as bj

ternarize = bj.ternarize
pytestmark = pytest.mark.optimised

X = jax.random.normal(jax.random.key(0), (2, 7, 16))
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
INT8 = bj.Int8Config()


KINDS = ["plain", "remat", "jit", "scan", "scan 1", "vmap", "ensemble", "shared"]


def init(model, x=X):
    return model.init(jax.random.key(1), x)["params"]


def of(model, **how):
    return ternarize(lambda params, x: model.apply({"params": params}, x), **how)


def apply(model):
    return lambda params, x: model.apply({"params": params}, x)


def loss(function):
    return jax.jit(jax.value_and_grad(lambda params, x: jnp.square(function(params, x)).mean()))


@cases("kind", KINDS, core=["scan", "ensemble"])
def test_models(kind):
    model, select = Model(kind), bj.exclude("head")
    params = init(model)
    ternary = of(model, select=select)
    layers = apply(bj.linen.ternarize(model, select))
    trained = jax.jit(ternary)(params, X)
    assert_same_bits(trained, jax.jit(layers)(params, X))
    jax.tree.map(assert_same_bits, loss(ternary)(params, X), loss(layers)(params, X))
    assert [p for p in ternary.explain(params, X).left if "bias" not in p] == ["head/kernel"]
    if kind == "scan 1":
        with pytest.raises(ValueError, match="must be the leading axes"):
            ternary.pack(params, X)
        return
    packed, report = ternary.pack(params, X)
    wanted = bj.linen.pack(bj.linen.ternarize(model, select), params, X)[0]
    assert jax.tree.structure(packed) == jax.tree.structure(wanted)
    jax.tree.map(assert_same_bits, packed, wanted)
    assert {layer.path for layer in report.rows} == {*ternary.explain(params, X).ternary}
    for served in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(ternary)(served, X), trained)


@cases("kind", ["plain", "scan"], core=["plain"])
def test_eager(kind):
    model = Model(kind)
    params = init(model)
    ternary, layers = of(model), apply(bj.linen.ternarize(model))
    trained = ternary(params, X)
    assert_same_bits(trained, layers(params, X))
    packed, _ = ternary.pack(params, X)
    assert_same_bits(ternary(packed, X), trained)


LAYERS = {
    "dense": (nn.Dense(6), X),
    "general": (nn.DenseGeneral((3, 5), axis=(-3, -1), batch_dims=(0,)), IMAGES),
    "conv": (nn.Conv(6, (3, 3), 2, "CIRCULAR"), IMAGES),
    "one example": (nn.Conv(6, (3, 3)), IMAGES[0]),
    "causal": (nn.Conv(6, (3,), padding="CAUSAL"), IMAGES),
    "grouped": (nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2), IMAGES),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), IMAGES),
    "pixels": (nn.Conv(6, (1, 1), padding=0, input_dilation=2), IMAGES),
    "einsum": (nn.Einsum((8, 5, 4), "...hk,hok->...oh", use_bias=False), IMAGES),
    "one output": (nn.Dense(1), X),
}


CASES = [
    *((name, bj.B158) for name in LAYERS),
    *((name, w) for name in ("general", "conv") for w in (INT8, bj.TernaryConfig(granularity=4))),
    ("grouped", bj.PHASE4),
]


@cases(("name", "weights"), CASES, core=CASES[:3], ids=str)
def test_layers(name, weights):
    layer, x = LAYERS[name]
    params = init(layer, x)
    ternary = of(layer, weights=weights)
    layers = apply(bj.linen.ternarize(layer, weights=weights))
    trained = ternary(params, x)
    assert_same_bits(trained, layers(params, x))
    packed, _ = ternary.pack(params, x)
    assert_same_bits(
        packed["kernel"].codes,
        bj.linen.pack(bj.linen.ternarize(layer, weights=weights), params, x)[0]["kernel"].codes,
    )
    assert_same_bits(ternary(packed, x), trained)
    assert_same_bits(ternary(bj.prepare(packed), x), trained)


@pytest.mark.full
@pytest.mark.parametrize(
    "how",
    [
        {"norm": True},
        {"activations": None},
        {"backward_dtype": jnp.bfloat16},
        {"activations": bj.ActivationConfig(bits=4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_options(name, how):
    layer, x = LAYERS[name]
    params = init(layer, x)
    ternary, layers = of(layer, **how), apply(bj.linen.ternarize(layer, **how))
    jax.tree.map(assert_same_bits, loss(ternary)(params, x), loss(layers)(params, x))


@pytest.mark.full
@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(dtype, x_dtype):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16, dtype=dtype)(nn.LayerNorm(dtype=dtype)(nn.Dense(16, dtype=dtype)(x)))
            x = nn.relu(nn.Einsum((16, 16), "...a,ab->...b", dtype=dtype)(x))
            return nn.Conv(8, (3,), dtype=dtype)(x)

    x = X.astype(x_dtype)
    params = init(Mixed(), x)
    ternary, layers = of(Mixed()), apply(bj.linen.ternarize(Mixed()))
    trained = ternary(params, x)
    assert_same_bits(trained, layers(params, x))
    assert_same_bits(ternary(ternary.pack(params, x)[0], x), trained)


@cases("dtype", [jnp.bfloat16, jnp.float32], core=[jnp.bfloat16], ids=str)
def test_a_bias_is_rounded_before_what_follows(dtype):
    model = nn.Sequential([nn.Dense(32, dtype=dtype, param_dtype=dtype) for _ in range(3)])
    x = X.astype(dtype)
    params = jax.tree.map(lambda a: a + jnp.asarray(0.1, a.dtype), init(model, x))
    ternary = of(model)
    eager = ternary(params, x)
    assert_same_bits(jax.jit(ternary)(params, x), eager)
    assert_same_bits(jax.jit(lambda x: ternary(params, x))(x), eager)
    assert_same_bits(jax.jit(ternary)(ternary.pack(params, x)[0], x), eager)


def test_strength():
    model = Model("scan")
    params = init(model)
    ternary, layers = of(model), apply(bj.linen.ternarize(model))
    traces = []

    def at(function):
        @jax.jit
        def run(strength):
            traces.append(0)
            with bj.phase_in(strength):
                return function(params, X)

        return run

    ours, theirs = at(ternary), at(layers)
    for strength in (0.0, 0.25, 1.0):
        assert_same_bits(ours(strength), theirs(strength))
    assert len(traces) == 2
    with bj.phase_in(0.0):
        np.testing.assert_allclose(
            ternary(params, X), model.apply({"params": params}, X), atol=1e-4
        )
    assert_same_bits(ternary(params, X), layers(params, X))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 16, name="embed")
        return embed.attend(nn.relu(nn.Dense(16, name="body")(embed(ids))))


def test_tied_embeddings():
    ids = jnp.array([[1, 4, 9, 0], [2, -1, 10, 3]])
    params = init(Tied(), ids)
    plain = of(Tied())
    rows = {row.path: row for row in plain.explain(params, ids).rows}
    assert rows["embed/embedding"].why == "an embedding; select it with an Int8Config"
    assert rows["body/kernel"].config == bj.B158

    def select(path, leaf):
        return INT8 if path[-1] == "embedding" else path[-1] == "kernel"

    ternary, layers = of(Tied(), select=select), apply(bj.linen.ternarize(Tied(), select))
    trained = ternary(params, ids)
    assert_same_bits(trained, layers(params, ids))
    jax.tree.map(assert_same_bits, loss(ternary)(params, ids), loss(layers)(params, ids))
    packed, report = ternary.pack(params, ids)
    assert {layer.path: layer.kind for layer in report.rows}["embed/embedding"] == "int8"
    for served in (packed, bj.prepare(packed)):
        assert_same_bits(ternary(served, ids), trained)
    with bj.phase_in(0.5):  # a float product
        np.testing.assert_allclose(ternary(params, ids), layers(params, ids), rtol=1e-5, atol=1e-6)


def test_rows_past_the_features():
    """A prepared table has its features first; its rows are counted all the same."""
    table = {"embed": jax.random.normal(jax.random.key(1), (40, 8))}
    ids = jnp.array([0, 7, 8, 39, -1, -40, 40])
    for mode in ("fill", "clip"):
        ternary = bj.ternarize(
            lambda p, i, mode=mode: p["embed"].at[i].get(mode=mode), select=lambda path, leaf: INT8
        )
        trained = ternary(table, ids)
        packed, _ = ternary.pack(table, ids)
        assert_same_bits(ternary(bj.prepare(packed), ids), trained)
        assert_same_bits(jax.jit(ternary)(bj.prepare(packed), ids), trained)


def test_tables_whose_rows_cannot_be_looked_up_packed():
    """Experts chosen by their number: they train, and pack refuses, not the packed call."""
    experts = {"w": jax.random.normal(jax.random.key(1), (3, 16, 8))}
    chosen = jnp.array([0, 2])
    ternary = bj.ternarize(
        lambda p, x: jnp.einsum("bd,bdo->bo", x, p["w"][chosen]), select=lambda path, leaf: INT8
    )
    assert ternary(experts, X[:, 0]).shape == (2, 8)
    with pytest.raises(NotImplementedError, match="the table at w cannot be packed"):
        ternary.pack(experts, X[:, 0])


@pytest.mark.full
def test_adapters():
    model = Model("scan")
    params = init(model)
    ternary, layers = of(model), apply(bj.linen.ternarize(model))
    packed, _ = ternary.pack(params, X)
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2))
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)

    def of_adapters(function):
        return lambda adapters, x: function(bj.lora.attach(packed, adapters), x)

    ours, theirs = loss(of_adapters(ternary)), loss(of_adapters(layers))
    jax.tree.map(assert_same_bits, ours(adapters, X), theirs(adapters, X))
