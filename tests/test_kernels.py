"""What ``bj.linen.kernels`` and ``bj.nnx.kernels`` return is all that ``select=`` needs."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax._tree.select import Kernels

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).reshape(x.shape[0], -1)
        return nn.Dense(5, name="head")(x)


@pytest.fixture(scope="module")
def case():
    def select(path, leaf):
        del leaf
        return {"conv": bj.TWN, "head": bj.Int8Config()}[path[0]]

    model = bj.linen.ternarize(Net(), select=select)
    params = model.init(jax.random.key(1), X)["params"]
    return model, params, bj.linen.kernels(model, params, X)


def test_they_are_a_selector_with_axes(case):
    _, params, kernels = case
    path, leaf = ("conv", "kernel"), params["conv"]["kernel"]
    assert kernels(path, leaf) == bj.TWN
    assert kernels.axes(path, leaf) == {"contracting_axes": (0, 1, 2), "batch_axes": ()}
    assert kernels(("conv", "bias"), leaf) is kernels.axes(("conv", "bias"), leaf) is None
    assert list(kernels.ternary.uses) == [path]
    assert [line.split("  ")[0] for line in str(kernels).splitlines()] == [
        "path",
        "conv/kernel",
        "head/kernel",
    ]
    assert "3x3x3x4" in repr(kernels)
    assert "Int8Config" in repr(kernels)


def test_every_select_takes_them_and_needs_no_axes(case):
    model, params, kernels = case
    packed, report = bj.linen.pack(model, params, X)
    again, _ = bj.pack_params(params, select=kernels)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), packed, again))
    paths = [row.path for row in report.rows]
    with pytest.raises(ValueError, match=r"conv/kernel has shape .* Pass axes="):
        bj.pack_params(params, select=lambda path, leaf: kernels(path, leaf))
    hat = bj.fake_quantize_params(params, select=kernels)["conv"]["kernel"]
    assert_same_bits(hat, packed["conv"]["kernel"].dequantize())

    def loss(p):
        return jnp.square(model.apply({"params": p}, X)).mean()

    found = bj.analysis.sensitivity(loss, params, select=kernels, jit=False)
    assert sorted(row.path for row in found.rows) == sorted(paths)
    stats = bj.analysis.trit_stats(params, select=kernels.ternary)
    assert [row.path for row in stats.rows] == ["conv/kernel"]
    state = bj.optim.watch_trits(select=kernels.ternary).init(params)
    assert list(state.snapshot) == ["conv/kernel"]
    assert bj.optim.muon_dimensions(params, select=kernels)["conv"]["kernel"] == (
        optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    )
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    memory = bj.sharding.training_memory(
        params,
        rules=[("head/kernel", jax.P("data"))],
        mesh=mesh,
        optimizer=optax.adamw(1e-3),
        tokens=1,
        select=kernels,
    )
    assert memory.served_packed == report.model_bytes_after
    with pytest.raises(TypeError, match="int8 codes do not flip"):
        bj.analysis.trit_stats(params, select=kernels)


def test_axes_that_are_given_win(case):
    _, params, kernels = case

    def axes(path, leaf):
        del path
        return {"contracting_axes": range(leaf.ndim - 1), "batch_axes": ()} | (
            {"contracting_axes": 0} if leaf.ndim == 4 else {}
        )

    packed, _ = bj.pack_params(params, select=kernels, axes=axes)
    assert packed["conv"]["kernel"].axes.contracting == (0,)


def test_nnx_has_them_too():
    model = nnx.Sequential(
        bj.nnx.BitConv(3, 4, (3, 3), weights=bj.TWN, rngs=nnx.Rngs(0)),
        nnx.Conv(4, 2, (1, 1), rngs=nnx.Rngs(1)),
    )
    kernels, state = bj.nnx.kernels(model), nnx.state(model, nnx.Param)
    assert isinstance(kernels, Kernels)
    packed, _ = bj.pack_params(state, select=kernels)
    ready, report = bj.nnx.pack(model)
    assert [row.path for row in report.rows] == ["layers/0/kernel"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), packed, nnx.state(ready, nnx.Param))
    assert jax.tree.all(same)
    assert_same_bits(ready(X), model(X))
    assert isinstance(ready.layers[0].kernel.get_value(), bj.PackedTernary)
    assert isinstance(model.layers[0].kernel.get_value(), jax.Array)


class Tied(nnx.Module):
    """Its head multiplies by the embedding, as one variable."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.head.kernel = self.embed.embedding

    def __call__(self, ids):
        return self.head(self.embed(ids))


def test_nnx_refuses_a_variable_that_is_ternary_here_and_float_there():
    model = Tied(nnx.Rngs(0))
    with pytest.raises(ValueError, match="embed/embedding, head/kernel: an embedding; select it"):
        bj.nnx.ternarize(model)
    with pytest.raises(ValueError, match=r"embed/embedding and head/kernel are one parameter"):
        bj.nnx.ternarize(model, select=bj.only("head"))
    bj.nnx.ternarize(model, select=lambda path, leaf: bj.Int8Config())
    with pytest.raises(ValueError, match=r"embed/embedding is used over axes \(0,\) and \(1,\)"):
        model(jnp.arange(4))
    for use in (bj.nnx.pack, bj.nnx.kernels):
        with pytest.raises(ValueError, match=r"the kernel at head/kernel is used in another way"):
            use(model)


def test_nnx_refuses_a_layer_of_ours_that_shares_a_float_kernel():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(bj.nnx.BitLinear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs))
    model.layers[1].kernel = model.layers[0].kernel
    for use in (bj.nnx.pack, bj.nnx.kernels):
        with pytest.raises(ValueError, match=r"the kernel at layers/1/kernel is used as ternary"):
            use(model)
