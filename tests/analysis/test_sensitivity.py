"""Sensitivity and comparison say what NumPy says, computed from the definitions in float64."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from draws import params_of
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import bitnet_jax as bj
from bitnet_jax.analysis import _sensitivity as survive


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def hat64(w, config=bj.B158, contracting=None, batch=()):
    """The quantised and dequantised kernel, by the slow oracle."""
    k = oracles.quantize64(np.asarray(w, np.float64), config, contracting, batch)
    return k.codes * k.scale


def squares(targets, weights):
    """A loss with a known answer for each kernel: a weighted squared distance to its target."""

    def loss(params):
        terms = jax.tree.map(lambda t, c, w: c * ((w - t) ** 2).sum(), targets, weights, params)
        return sum(jax.tree.leaves(terms))

    return loss


@cases("config", {"b158": bj.B158, "phase4": bj.PHASE4, "twn": bj.TWN}, core=["phase4"])
@pytest.mark.parametrize("jit", [True, False])
def test_changes_are_those_of_the_definition(config, jit):
    params = {name: {"kernel": normal(12, 5, seed=i)} for i, name in enumerate("abcd")}
    targets = jax.tree.map(lambda w: w + jnp.float32(0.1), params)
    weights = {name: {"kernel": c} for name, c in zip("abcd", (1.0, 30.0, 0.01, 5.0), strict=True)}
    found = survive.sensitivity(squares(targets, weights), params, config, jit=jit)

    def term(name, w):
        target = np.asarray(targets[name]["kernel"], np.float64)
        return weights[name]["kernel"] * ((np.asarray(w, np.float64) - target) ** 2).sum()

    before = {name: term(name, params[name]["kernel"]) for name in params}
    after = {name: term(name, hat64(params[name]["kernel"], config)) for name in params}
    base = sum(before.values())
    np.testing.assert_allclose(found.base, base, 1e-5)
    np.testing.assert_allclose(found.all, sum(after.values()), 1e-5)
    for layer in found.rows:
        name = layer.path[0]
        np.testing.assert_allclose(layer.loss, base - before[name] + after[name], 1e-5)
        assert layer.change == layer.loss - found.base
        assert (layer.shape, layer.config) == ((12, 5), config)
    assert [layer.path[0] for layer in found.rows] == ["b", "d", "a", "c"]  # by weight
    _, report = bj.pack_params(params, config)
    saved = report.bytes_before - report.bytes_after
    assert sum(layer.bytes_saved for layer in found.rows) == saved


def test_worst_layer_of_a_network_is_found():
    # `fragile` has one weight in a hundred that matters and is small; `tough` is ternary already.
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, use_bias=False, name="fragile")(nn.Dense(8, name="tough")(x))

    x = normal(16, 4)
    params = {
        "tough": {"kernel": jnp.sign(normal(4, 8, seed=1)), "bias": jnp.zeros(8)},
        "fragile": {"kernel": jnp.linspace(0.05, 1.0, 8).reshape(8, 1)},
    }
    y = Model().apply({"params": params}, x)
    found = survive.sensitivity(
        lambda p: jnp.mean((Model().apply({"params": p}, x) - y) ** 2), params
    )
    assert [layer.path for layer in found.rows] == ["fragile/kernel", "tough/kernel"]
    assert found.base == found.rows[1].change == 0.0
    exact = np.asarray(x, np.float64) @ np.asarray(params["tough"]["kernel"], np.float64)
    head = np.asarray(params["fragile"]["kernel"], np.float64)
    expected = ((exact @ (hat64(params["fragile"]["kernel"]) - head)) ** 2).mean()
    np.testing.assert_allclose(found.rows[0].loss, expected, 1e-4)
    np.testing.assert_allclose(found.all, found.rows[0].loss, 1e-6)


def test_improvements_come_last_and_nan_comes_first():
    params = {name: {"kernel": normal(6, 4, seed=i)} for i, name in enumerate("abc")}

    def loss(p):
        better = jnp.abs(p["a"]["kernel"] - bj.fake_quantize(params["a"]["kernel"])).sum()
        worse = jnp.abs(p["b"]["kernel"] - params["b"]["kernel"]).sum()
        same = (p["c"]["kernel"] == params["c"]["kernel"]).all()
        return better + worse + jnp.where(same, 0.0, jnp.nan)

    found = survive.sensitivity(loss, params)
    assert [layer.path[0] for layer in found.rows] == ["c", "b", "a"]
    assert math.isnan(found.rows[0].change)
    assert found.rows[1].change > 0 > found.rows[2].change
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["rows"][0]["loss"] is None
    assert plain["all"] is None
    assert plain["base"] == found.base
    assert plain["rows"][1]["shape"] == [6, 4]
    assert plain["rows"][1]["config"]["scale"] == "absmean"


def test_the_loss_is_traced_once_and_called_when_asked():
    params = {name: {"kernel": normal(6, 4, seed=i)} for i, name in enumerate("abc")}
    calls = []

    def loss(p):
        calls.append(isinstance(p["a"]["kernel"], jax.core.Tracer))
        return sum(leaf["kernel"].sum() for leaf in p.values())

    survive.sensitivity(loss, params)
    assert calls == [True]
    calls.clear()
    survive.sensitivity(loss, params, jit=False)
    assert calls == [False] * 5


def test_numpy_and_python_losses_without_jit():
    params = {"a": {"kernel": np.asarray(normal(6, 4))}}
    found = survive.sensitivity(lambda p: float(np.abs(p["a"]["kernel"]).max()), params, jit=False)
    np.testing.assert_allclose(found.base, np.abs(params["a"]["kernel"]).max())
    np.testing.assert_allclose(found.all, np.abs(hat64(params["a"]["kernel"])).max(), 1e-6)


def test_boxes_stay_closed():
    box = nn.Partitioned(normal(6, 4), names=("in", "out"))
    params = FrozenDict({"a": {"kernel": box}, "b": {"bias": jnp.zeros(3)}})

    def loss(p):
        assert isinstance(p, FrozenDict)
        assert p["a"]["kernel"].names == ("in", "out")
        return jnp.abs(p["a"]["kernel"].value).max()

    found = survive.sensitivity(loss, params)
    assert [layer.path for layer in found.rows] == ["a/kernel"]
    np.testing.assert_allclose(found.all, np.abs(hat64(box.value)).max(), 1e-6)


def test_nnx_state():
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 2, rngs=nnx.Rngs(1)))
    graphdef, params = nnx.split(model, nnx.Param)
    x = normal(7, 6)
    found = survive.sensitivity(lambda p: (nnx.merge(graphdef, p)(x) ** 2).mean(), params)
    w = [np.asarray(layer.kernel[...], np.float64) for layer in model.layers]

    def loss(first, second):
        return ((np.asarray(x, np.float64) @ first @ second) ** 2).mean()

    np.testing.assert_allclose(found.base, loss(*w), 1e-5)
    by_path = {layer.path: layer.loss for layer in found.rows}
    np.testing.assert_allclose(by_path["layers/0/kernel"], loss(hat64(w[0]), w[1]), 1e-5)
    np.testing.assert_allclose(by_path["layers/1/kernel"], loss(w[0], hat64(w[1])), 1e-5)
    np.testing.assert_allclose(found.all, loss(*map(hat64, w)), 1e-5)


def test_stacked_kernels_and_a_select_with_configs():
    params = {
        "experts": {"kernel": normal(3, 6, 4)},
        "head": {"kernel": normal(4, 5, seed=1)},
        "other": {"kernel": normal(4, 5, seed=2)},
    }

    def select(path, leaf):
        return {"experts": True, "head": bj.PHASE4, "other": None}[path[0]]

    def axes(path, leaf):
        return {"contracting_axes": 1, "batch_axes": 0} if leaf.ndim == 3 else None

    zeros = jax.tree.map(jnp.zeros_like, params)
    loss = squares(zeros, jax.tree.map(lambda _: 1.0, params))
    found = survive.sensitivity(loss, params, bj.TWN, select=select, axes=axes)
    by_name = {layer.path.split("/")[0]: layer for layer in found.rows}
    assert {name: layer.config for name, layer in by_name.items()} == {
        "experts": bj.TWN,
        "head": bj.PHASE4,
    }
    experts = np.asarray(params["experts"]["kernel"], np.float64)
    hat = hat64(experts, bj.TWN, (1,), (0,))
    expected = (hat**2).sum() - (experts**2).sum()
    np.testing.assert_allclose(by_name["experts"].change, expected, 1e-4)
    with pytest.raises(ValueError, match="sensitivity: experts/kernel has shape"):
        survive.sensitivity(loss, params, select=select)


def test_half_precision_kernels_keep_their_dtype():
    params = {"kernel": normal(6, 4).astype(jnp.bfloat16)}

    def loss(p):
        assert p["kernel"].dtype == jnp.bfloat16
        return jnp.abs(p["kernel"]).max()

    found = survive.sensitivity(loss, params)
    assert found.rows[0].bytes_saved == 2 * 24 - (2 * 4 + 4)
    assert found.all == float(jnp.abs(bj.fake_quantize(params["kernel"])).max())


def test_ternary_layers_are_float_ones_at_the_base():
    model, x = bj.linen.BitDense(3, use_bias=False), normal(9, 6)
    params = params_of(model, x)
    found = survive.sensitivity(lambda p: (model.apply({"params": p}, x) ** 2).mean(), params)
    w, x64 = np.asarray(params["kernel"], np.float64), np.asarray(x, np.float64)
    np.testing.assert_allclose(found.base, ((x64 @ w) ** 2).mean(), 1e-5)
    np.testing.assert_allclose(found.all, ((x64 @ hat64(w)) ** 2).mean(), 1e-5)


KERNEL = {"a": {"kernel": jnp.ones((4, 4))}}


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda p: p["a"]["kernel"].sum(0), TypeError, "`loss_fn` must return one real number"),
        (lambda p: (p["a"]["kernel"].sum(), {}), TypeError, "without auxiliary values"),
        (
            lambda p: jax.lax.complex(*[p["a"]["kernel"].sum()] * 2),
            TypeError,
            "one real number, got complex",
        ),
        (lambda p: None, TypeError, "got NoneType"),
        (lambda p: p["a"]["kernel"].sum() / 0, ValueError, "of the float params is inf"),
        (lambda p: jnp.nan * p["a"]["kernel"].sum(), ValueError, "of the float params is nan"),
    ],
)
@pytest.mark.parametrize("jit", [True, False])
def test_losses_that_are_refused(loss, error, match, jit):
    with pytest.raises(error, match=match):
        survive.sensitivity(loss, KERNEL, jit=jit)


def test_trees_that_are_refused():
    def loss(p):
        return jnp.float32(0)

    with pytest.raises(ValueError, match="sensitivity: `params` holds no arrays"):
        survive.sensitivity(loss, {})
    with pytest.raises(ValueError, match="sensitivity: the pattern 'nope' matches nothing"):
        survive.sensitivity(loss, KERNEL, select=bj.exclude("nope"))
    with pytest.raises(TypeError, match="sensitivity: a/kernel is packed already"):
        survive.sensitivity(loss, bj.pack_params(KERNEL)[0], select=lambda path, leaf: True)
    with pytest.raises(TypeError, match="`config` must be"):
        survive.sensitivity(loss, KERNEL, config="b158")
    with pytest.raises(ValueError, match=r"sensitivity: a/kernel: `granularity`=3 does not divide"):
        survive.sensitivity(loss, KERNEL, config=bj.TernaryConfig(granularity=3))


def row(path, change, loss=1.0):
    return survive.LayerSensitivity(path, (64, 16), bj.B158, loss, change, 3836)


def test_table():
    layers = (row("a/kernel", 12.5, 13.5), row("long/name/kernel", -0.25, 0.75))
    assert str(survive.Sensitivity(layers, 1.0, 14.0)).split("\n") == [
        "path              shape  loss  change   saved",
        "a/kernel          64x16  13.5   +12.5  3.8 kB",
        "long/name/kernel  64x16  0.75   -0.25  3.8 kB",
        "all at once                14     +13  7.7 kB",
        "none (float)                1      +0     0 B",
    ]


@pytest.mark.parametrize("count", [1, 100])
def test_plot(tmp_path, count):
    pytest.importorskip("matplotlib")
    layers = [row(f"layer_{i}/kernel", 2.0 - 0.03 * i) for i in range(count)]
    layers[-1] = row("nan/kernel", math.nan)
    survive.Sensitivity(tuple(layers), 1.0, 9.0).plot(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").stat().st_size > 5000
    (axis,) = survive._draw(survive.Sensitivity(tuple(layers), 1.0, 9.0)).axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[::-1] == [layer.path for layer in layers]  # the first row is on top
    assert [bar.get_width() for bar in axis.patches][::-1][:-1] == [x.change for x in layers[:-1]]


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'bitnet_jax\[plot\]'"):
        survive.Sensitivity((row("a", 1.0),), 1.0, 2.0).plot(tmp_path / "no.png")


def test_all_kernels_share_one_compilation():
    fresh = jax.jit(lambda: {f"layer_{i}": {"kernel": jnp.ones((8, 8))} for i in range(4)})()
    loss = jax.jit(lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))
    bj.analysis.sensitivity(loss, fresh, jit=False)
    assert loss._cache_size() == 1
