"""Layers, transformed functions and side rooms over kernels of ternary planes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj

PLANES = bj.TernaryConfig(planes=2)
CONFIGS = {
    "tensor": PLANES,
    "channel": bj.TernaryConfig(scale="survivors", granularity="channel", planes=3),
    "groups": bj.TernaryConfig(granularity=2, planes=2),
}
every_config = cases("config", CONFIGS, core=["groups"])
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))


class Net(nn.Module):
    """A convolution, one with feature groups, attention, and layers under a scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(x)).reshape(x.shape[0], -1, 8)
        x = nn.relu(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x))
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(12)(layers()(x, None)[0])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(x.shape[-1])(x)), None


@every_config
@pytest.mark.optimised
def test_linen_models_give_packed_the_bits_of_each_layer(config):
    model = bj.linen.ternarize(Net(), weights=config)
    params = model.init(jax.random.key(1), X)["params"]
    packed, report = bj.linen.pack(model, params, X)
    assert all(row.config == config for row in report.rows)
    kernels = [k for k in jax.tree.leaves(packed, is_leaf=bj.is_packed) if bj.is_packed(k)]
    assert len(kernels) == 8
    apply = jax.jit(model.apply)
    y, served = apply({"params": params}, X), apply({"params": packed}, X)
    np.testing.assert_allclose(served, y, atol=2e-2)  # softmax between may flip a code
    floats = bj.unpack_params(packed, dequantize=True)
    near = Net().apply({"params": floats}, X)  # int8 activations are all that differs
    np.testing.assert_allclose(y, near, atol=0.1 * float(jnp.abs(near).max()))
    fast = bj.prepare(packed)
    oracles.assert_same_bits(apply({"params": fast}, X), served)


@every_config
@pytest.mark.parametrize(
    "layer",
    [
        bj.linen.BitDense(6),
        bj.linen.BitDenseGeneral(6, axis=(-2, -1)),
        bj.linen.BitConv(6, (3, 3), strides=2),
        bj.linen.BitConv(8, (3, 3), feature_group_count=2),
        bj.linen.BitEinsum((8, 4, 2), "bhwc,hcd->bhwd"),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.optimised
def test_linen_layers_have_one_set_of_bits(layer, config):
    layer = layer.clone(weights=config)
    params = layer.init(jax.random.key(1), X)["params"]
    packed, _ = bj.linen.pack(layer, params, X)
    want = jax.jit(layer.apply)({"params": params}, X)
    for one in (packed, bj.prepare(packed)):
        oracles.assert_same_bits(jax.jit(layer.apply)({"params": one}, X), want)
    g = jax.grad(lambda p: layer.apply({"params": p}, X).sum())(params)
    assert all(float(jnp.abs(a).max()) > 0 for a in jax.tree.leaves(g))
    np.testing.assert_allclose(
        jax.grad(lambda x: layer.apply({"params": params}, x).sum())(X),
        jax.grad(lambda x: layer.apply({"params": packed}, x).sum())(X),
        atol=1e-4,
    )


@every_config
@pytest.mark.optimised
def test_a_convolution_is_that_of_the_summed_planes(config):
    layer = bj.linen.BitConv(6, (3, 3), use_bias=False, weights=config, activations=None)
    params = layer.init(jax.random.key(1), X)["params"]
    packed, _ = bj.linen.pack(layer, params, X)
    want = nn.Conv(6, (3, 3), use_bias=False).apply(
        {"params": bj.unpack_params(packed, dequantize=True)}, X
    )
    for weights in (params, packed):
        np.testing.assert_allclose(layer.apply({"params": weights}, X), want, atol=1e-5)


@every_config
@pytest.mark.optimised
def test_nnx_models(config):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.LinearGeneral((8, 16), 5, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(nnx.relu(self.conv(x)))))

    model = Model(nnx.Rngs(0))
    bj.nnx.ternarize(model, weights=config)
    want = nnx.jit(lambda m, x: m(x))(model, X)
    packed, report = bj.nnx.pack(model)
    assert [row.config for row in report.rows] == [config] * 3
    oracles.assert_same_bits(nnx.jit(lambda m, x: m(x))(packed, X), want)


def mlp(params, x):
    for w in params["layers"]:
        x = jax.nn.relu(x @ w)
    x, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["stack"])
    return jnp.einsum("bk,nk->bn", x, params["head"])


@every_config
@pytest.mark.optimised
def test_functions_of_arrays(config):
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        "layers": [jax.random.normal(k, (16, 16)) for k in keys[:2]],
        "stack": jax.random.normal(keys[2], (3, 16, 16)),
        "head": jax.random.normal(keys[3], (6, 16)),
    }
    x = jax.random.normal(jax.random.key(3), (5, 16))
    ternary = bj.ternarize(mlp, weights=config)

    def by_hand(params, x):
        dot = functools.partial(bj.ternary_dot, weights=config)
        for w in params["layers"]:
            x = jax.nn.relu(dot(x, w))
        for w in params["stack"]:
            x = jax.nn.relu(dot(x, w))
        return dot(x, params["head"], contracting_axes=1)

    want = jax.jit(by_hand)(params, x)
    oracles.assert_same_bits(jax.jit(ternary)(params, x), want)
    packed, _ = ternary.pack(params, x)
    assert packed["stack"].shape == (3, 16, 16)
    for tree in (packed, bj.prepare(packed)):
        oracles.assert_same_bits(jax.jit(ternary)(tree, x), want)
        rows = jax.vmap(lambda x, tree=tree: ternary(tree, x[None])[0])(x)
        oracles.assert_same_bits(rows, want)
    assert "planes=2" in str(ternary.explain(params, x).to_dict()) or config != PLANES


def test_a_layer_of_another_number_of_planes_refuses_a_packed_kernel():
    layer = bj.linen.BitDense(6, weights=PLANES)
    params = layer.init(jax.random.key(1), X)["params"]
    packed, _ = bj.pack_params(params)
    with pytest.raises(ValueError, match=r"was packed with .*the layer trains with .*planes=2"):
        layer.apply({"params": packed}, X)


def test_adapters_run_over_planes_and_are_not_merged_into_them():
    packed = {"layer": {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (4, 6)), PLANES)}}
    adapters = bj.lora.init(packed, 2, key=jax.random.key(1))
    adapters = jax.tree.map(jnp.ones_like, adapters)
    layer = bj.linen.BitDense(6, use_bias=False, weights=PLANES)
    y = layer.apply({"params": bj.lora.attach(packed, adapters)["layer"]}, X)
    base = layer.apply({"params": packed["layer"]}, X)
    (pair,) = adapters.kernels.values()
    update = X @ pair["a"] @ pair["b"] * adapters.alpha / 2
    np.testing.assert_allclose(y, base + update, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"^lora.merge: layer/kernel is a sum .*attach"):
        bj.lora.merge(packed, adapters)


def test_reports_count_the_codes_of_all_planes():
    w = jax.random.normal(jax.random.key(0), (37, 11))
    t = bj.quantize(w, PLANES)
    (row,) = bj.pack_params({"kernel": w}, PLANES)[1].rows
    codes = np.asarray(t.codes)
    assert (row.minus, row.zero, row.plus) == tuple((codes == c).sum() for c in (-1, 0, 1))
    assert row.bytes_after == 2 * (10 * 11 + 4)
    lost = np.square(w - np.asarray(t.dequantize())).sum() / np.square(w).sum()
    np.testing.assert_allclose(row.error, lost, rtol=1e-5)


def test_trit_statistics_are_over_the_codes_of_all_planes():
    w = jax.random.normal(jax.random.key(0), (37, 11))
    first = bj.analysis.trit_stats({"kernel": w}, PLANES)
    moved = w.at[3].multiply(-1.0)
    (row,) = bj.analysis.trit_stats({"kernel": moved}, PLANES, previous=first).rows
    before, after = (np.asarray(bj.quantize(v, PLANES).codes) for v in (w, moved))
    np.testing.assert_allclose(row.flip_rate, (before != after).mean(), rtol=1e-6)
    np.testing.assert_allclose(row.zeros, (after == 0).mean(), rtol=1e-6)
    kernels = oracles.planes(oracles.quantize64, np.asarray(moved, np.float64), PLANES)
    near = [np.abs(kernel.ratio - 0.5) <= 0.1 for kernel in kernels]
    np.testing.assert_allclose(row.near_threshold, np.mean(near), rtol=1e-5)
    with pytest.raises(ValueError, match=r"codes of shape \(10, 11\).*\(2, 10, 11\)"):
        bj.analysis.trit_stats({"kernel": w}, previous=first)


def decoder(**fields):
    config = bj.models.DecoderConfig(
        vocabulary=32, width=16, hidden=24, depth=2, heads=2, kv_heads=2, **fields
    )
    return bj.models.Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.full
def test_a_decoder_runs_saves_and_is_not_published(tmp_path):
    model = decoder(weights=PLANES, embedding=PLANES, head=PLANES, tied=False)
    ids = jnp.arange(10).reshape(2, 5)
    want = nnx.jit(lambda m, i: m(i)[0])(model, ids)
    packed, _ = bj.nnx.pack(model)
    np.testing.assert_allclose(packed(ids)[0], want, atol=1e-2)
    packed.save(tmp_path / "a.safetensors")
    again = bj.models.Decoder.from_pretrained(tmp_path / "a.safetensors", prepared=False)
    oracles.assert_same_bits(again(ids)[0], packed(ids)[0])
    with pytest.raises(NotImplementedError, match=r"is a sum of 2 ternary planes.*dequantize"):
        bj.models.Decoder.from_pretrained(tmp_path / "a.safetensors", packed=False)
    for one in (model, packed):
        with pytest.raises(NotImplementedError, match=r"^export_huggingface: .*Decoder.save"):
            bj.io.export_huggingface(one, tmp_path / "folder")
