"""Patterns of other people's models that must come out right, or be refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from flax import linen as nn
from linen_models import Concrete, Doubled, WrappedInit
from oracles import assert_same_bits

import bitnet_jax as bj

ternarize = bj.ternarize
pytestmark = pytest.mark.optimised

X = jax.random.normal(jax.random.key(0), (8, 16))
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
IDS = jnp.arange(10)[None]
INT8 = bj.Int8Config()


def made(model, x=X, **how):
    """A function of params, ternary, and its params."""
    params = model.init(jax.random.key(1), x)["params"]
    return ternarize(lambda params, x: model.apply({"params": params}, x), **how), params


def dense(x, layer):
    """What a ternary ``nn.Dense`` computes."""
    y = bj.ternary_dot(x, layer["kernel"])
    return y + layer["bias"].reshape(*(1,) * (y.ndim - 1), -1)


def why(ternary, *args):
    return {row.path: row.why for row in ternary.explain(*args).rows}


def serves_what_it_trains(ternary, params, *args):
    packed, _ = ternary.pack(params, *args)
    trained = ternary(params, *args)
    assert_same_bits(ternary(packed, *args), trained)
    return trained


class StdConv(nn.Conv):
    def param(self, name, *args, **kwargs):
        p = super().param(name, *args, **kwargs)
        if name != "kernel":
            return p
        own = {"axis": (0, 1, 2), "keepdims": True}
        return (p - p.mean(**own)) / (p.std(**own) + 1e-5)


class Mapped(nn.Module):
    change: object
    features: int = 16

    @nn.compact
    def __call__(self, x):
        new = self.is_initializing()

        def change(variables):
            return jax.tree.map(lambda w: self.change(w) if w.ndim == 2 else w, variables)

        mapped = nn.map_variables(nn.Dense, "params", change, init=new, mutable=new)
        return nn.Dense(4)(mapped(self.features, name="dense")(x))


class WithNorm(nn.Module):
    kind: object

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(16, name="inner")
        x = self.kind(layer)(x) if self.kind is nn.WeightNorm else layer(x)
        return nn.Dense(4, name="head")(x)


STANDARDISED = nn.Sequential([StdConv(8, (3, 3)), nn.Conv(4, (1, 1))])
CHANGED = {
    "standardised": (
        nn.Sequential([StdConv(8, (3, 3)), nn.Conv(4, (1, 1))]),
        IMAGES,
        "layers_0/kernel",
    ),
    "triangular": (Mapped(jnp.tril), X, "dense/kernel"),
    "doubled": (Mapped(lambda w: 2 * w), X, "dense/kernel"),
    "sign": (Mapped(jnp.sign), X, "dense/kernel"),
    "normed": (WithNorm(nn.WeightNorm), X, "inner/kernel"),
}


@cases("name", list(CHANGED), core=["standardised", "triangular"])
def test_kernels_that_a_model_changes(name):
    model, x, path = CHANGED[name]
    ternary, params = made(model, x)
    reasons = why(ternary, params, x)
    assert "changes it before it is multiplied" in reasons[path]
    trained = serves_what_it_trains(ternary, params, x)
    assert np.isfinite(trained).all()
    by_name, _ = made(model, x, select=bj.only(path))
    with pytest.raises(NotImplementedError, match=f"{path} cannot be ternarised: `.*` changes it"):
        by_name(params, x)


def test_transposed_by_a_map():
    ternary, params = made(Mapped(jnp.transpose))
    rows = {row.path: row for row in ternary.explain(params, X).rows}
    assert rows["dense/kernel"].contracting_axes == (1,)
    turned = {"kernel": params["dense"]["kernel"].T, "bias": params["dense"]["bias"]}
    # The sum behind the scale runs over the leaf as it is stored, not as it is turned.
    wanted = dense(dense(X, turned), params["Dense_0"])
    np.testing.assert_allclose(serves_what_it_trains(ternary, params, X), wanted, rtol=1e-6)


class Net(nn.Module):
    def setup(self):
        self.encoder, self.head = nn.Sequential([nn.Dense(16)]), nn.Dense(4)

    def __call__(self, x):
        return self.head(self.encoder(x))


def encoded(module, x):
    return module.encoder(x)


@pytest.mark.full
def test_every_way_to_call_a_module():
    params = Net().init(jax.random.key(1), X)["params"]
    right = dense(X, params["encoder"]["layers_0"])
    ways = {
        "function": lambda p, x: Net().apply({"params": p}, x, method=encoded),
        "lambda": lambda p, x: Net().apply({"params": p}, x, method=lambda m, x: m.encoder(x)),
        "bind": lambda p, x: Net().bind({"params": p}).encoder(x),
    }
    for way in ways.values():
        ternary = ternarize(way)
        assert_same_bits(serves_what_it_trains(ternary, params, X), right)
        assert why(ternary, params, X)["head/kernel"] == "no product reaches it"


class LM(nn.Module):
    def setup(self):
        self.embed = nn.Embed(64, 32)
        self.block = nn.Dense(32)
        self.lm_head = nn.Dense(64, use_bias=False)

    def __call__(self, ids):
        x = jax.nn.relu(self.block(self.embed(ids)))
        table = self.embed.variables["params"]["embedding"]
        return self.lm_head.apply({"params": {"kernel": table.T}}, x)


def test_head_tied_in_a_scope_of_its_own():
    ternary, params = made(LM(), IDS)
    reasons = why(ternary, params, IDS)
    assert reasons["embed/embedding"] == "an embedding; select it with an Int8Config"
    trained = serves_what_it_trains(ternary, params, IDS)
    x = jax.nn.relu(dense(params["embed"]["embedding"][IDS], params["block"]))
    np.testing.assert_allclose(trained, x @ params["embed"]["embedding"].T, rtol=1e-5, atol=1e-5)
    both, _ = made(LM(), IDS, select=lambda path, _: INT8 if path[0] == "embed" else True)
    assert both.explain(params, IDS).share["int8"] > 0.5
    serves_what_it_trains(both, params, IDS)


class Intercepted(nn.Module):
    model: nn.Module

    @nn.compact
    def __call__(self, x):
        def plus(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            dense = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
            return y + 100.0 if dense else y

        with nn.intercept_methods(plus):
            return self.model(x)


@pytest.mark.parametrize(
    "model",
    [WrappedInit(width=16), Concrete(), Doubled(8), Intercepted(nn.Dense(4))],
    ids=["wrapped init", "abstract", "post init", "intercepted"],
)
def test_classes_that_are_not_plain(model):
    ternary, params = made(model)
    (path,) = ternary.explain(params, X).ternary
    layer = functools.reduce(lambda tree, name: tree[name], path.split("/")[:-1], params)
    more = 100.0 if isinstance(model, Intercepted) else 0.0
    assert_same_bits(serves_what_it_trains(ternary, params, X), dense(X, layer) + more)


def test_nnx_tied_head():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(16, 16, rngs=rngs)
            self.embed = nnx.Embed(16, 16, rngs=rngs)
            self.head = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
            self.head.kernel = self.embed.embedding

        def __call__(self, ids):
            return self.head(self.body(self.embed(ids)))

    graphdef, state = nnx.split(Model(nnx.Rngs(0)))
    ids = jnp.arange(8)
    ternary = ternarize(lambda state, ids: nnx.merge(graphdef, state)(ids))
    assert ternary.explain(state, ids).ternary == ("body/kernel",)
    serves_what_it_trains(ternary, state, ids)
    by_name = ternarize(
        lambda state, ids: nnx.merge(graphdef, state)(ids), select=lambda path, _: INT8
    )
    with pytest.raises(ValueError, match=r"embed/embedding is used over axes \(0,\) and \(1,\)"):
        by_name(state, ids)


@pytest.mark.full
def test_nnx_stacked_along_axis_1():
    from flax import nnx

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return jax.nn.relu(self.linear(x))

    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
    make = nnx.vmap(Layer, in_axes=(nnx.StateAxes({...: 0}),), out_axes=axes)
    model = make(nnx.Rngs(0).split(8))
    graphdef, state = nnx.split(model)
    run = nnx.scan(lambda m, c: m(c), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    ternary = ternarize(lambda state, x: run(nnx.merge(graphdef, state), x))
    wanted = x
    for w in jnp.moveaxis(state["linear"]["kernel"].get_value(), 1, 0):
        wanted = jax.nn.relu(bj.ternary_dot(wanted, w))
    assert_same_bits(ternary(state, x), wanted)
    with pytest.raises(ValueError, match="linear/kernel: `batch_axes` must be the leading axes"):
        ternary.pack(state, x)
