"""Adapters over packed kernels: the forward pass, gradients, merging, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from flax import nnx
from oracles import assert_same_bits

import bitnet_jax as bj

X = normal(2, 8, 8, 16)
MODELS = {
    "dense": (bj.linen.BitDense(12), X),
    "general": (bj.linen.BitDenseGeneral((3, 4), axis=(-2, -1)), X),
    "conv": (bj.linen.BitConv(6, (3, 3), strides=2), X),
    "experts": (bj.linen.BitEinsum((8, 16, 5), "bexk,ekn->bexn"), jnp.swapaxes(X, 1, 2)),
    "int8": (bj.linen.ternarize(nn.Dense(12), weights=bj.Int8Config()), X),
    "channel": (bj.linen.BitDense(12, weights=bj.PHASE4), X),
    "groups": (bj.linen.BitDense(12, weights=bj.TernaryConfig(granularity=4)), X),
}


@functools.cache
def made(name, rank=3):
    """A model, an input, its packed params, and adapters that are not zero."""
    model, x = MODELS[name]
    params = params_of(model, x)
    packed, _ = bj.linen.pack(model, params, x)
    adapters = bj.lora.init(packed, rank, key=jax.random.key(2), alpha=6.0)
    return model, x, packed, nudged(adapters)


def nudged(adapters, size=0.05):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda v: jnp.asarray(v + size * rng.standard_normal(v.shape, np.float32)), adapters
    )


def canonical(packed, array):
    return np.asarray(bj._quantize.kernel_axes.to_canonical(array, packed.axes), np.float64)


@cases("name", list(MODELS), core=["conv", "groups"])
def test_the_layer_adds_the_low_rank_product(name):
    model, x, packed, adapters = made(name)
    pair = adapters.kernels["kernel"]
    kernel = packed["kernel"]
    _, contraction, outputs = kernel.axes.split(kernel.shape)
    update = 2.0 * np.einsum(
        "...kr,...rn->...kn", *(np.asarray(pair[n], np.float64) for n in ("a", "b"))
    )
    update = bj._quantize.kernel_axes.from_canonical(update, kernel.axes, contraction, outputs)
    apply = jax.jit(model.apply)
    plain = apply({"params": packed}, x)
    y = apply({"params": bj.lora.attach(packed, adapters)}, x)
    # The update as a float layer of the same kind.
    floats = {"dense": nn.Dense(12), "general": nn.DenseGeneral((3, 4), axis=(-2, -1))}
    floats |= {"conv": nn.Conv(6, (3, 3), strides=2), "int8": nn.Dense(12)}
    floats |= {"experts": nn.Einsum((8, 16, 5), "bexk,ekn->bexn")}
    bias = jax.tree.map(jnp.zeros_like, packed["bias"])
    params = {"kernel": jnp.asarray(update, jnp.float32), "bias": bias}
    extra = jax.jit(floats.get(name, nn.Dense(12)).apply)({"params": params}, x)
    np.testing.assert_allclose(y - plain, extra, rtol=1e-3, atol=2e-5)


@cases("name", list(MODELS), core=["dense", "int8"])
def test_untrained_adapters_change_no_bit(name):
    model, x, packed, _ = made(name)
    adapters = bj.lora.init(packed, 2, key=jax.random.key(4))
    tree = bj.lora.attach(packed, adapters)
    plain = model.apply({"params": packed}, x)
    np.testing.assert_array_equal(model.apply({"params": tree}, x), plain)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": tree}, x), plain)


def test_gradients_go_to_the_adapters_alone_and_training_lowers_the_loss():
    model, x, packed, _ = made("dense")
    adapters = bj.lora.init(packed, 3, key=jax.random.key(5))
    target = normal(*x.shape[:-1], 12, seed=6)

    def loss(adapters):
        y = model.apply({"params": bj.lora.attach(packed, adapters)}, x)
        return jnp.square(y - target).mean()

    first, grads = jax.jit(jax.value_and_grad(loss))(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    assert not grads.kernels["kernel"]["a"].any()  # b is zero at first
    assert grads.kernels["kernel"]["b"].any()
    tx = optax.sgd(1.0)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters, state):
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(30):
        adapters, state = step(adapters, state)
    assert jax.jit(loss)(adapters) < 0.9 * first


def test_adapter_gradients_are_those_of_the_formula():
    model, x, packed, adapters = made("dense")
    flat = np.asarray(x, np.float64).reshape(-1, 16)
    a, b = (np.asarray(adapters.kernels["kernel"][n], np.float64) for n in ("a", "b"))

    def total(adapters):
        return model.apply({"params": bj.lora.attach(packed, adapters)}, x).sum()

    grads = jax.jit(jax.grad(total))(adapters).kernels["kernel"]
    g = np.ones((flat.shape[0], 12))
    np.testing.assert_allclose(grads["b"], 2.0 * (flat @ a).T @ g, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["a"], 2.0 * flat.T @ (g @ b.T), rtol=1e-4, atol=1e-4)


def test_scanned_layers():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x):
                return layer(x), None

            axes = {"params": 0}
            scan = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scan(bj.linen.BitDense(16), x)[0]

    model = Stack()
    params = params_of(model, X)
    packed, _ = bj.linen.pack(model, params, X)
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2))
    (path,) = adapters.kernels
    assert adapters.kernels[path]["a"].shape == (3, 16, 2)
    tree = bj.lora.attach(packed, adapters)
    apply = jax.jit(model.apply)
    plain = apply({"params": packed}, X)
    np.testing.assert_array_equal(apply({"params": tree}, X), plain)
    moved = apply({"params": bj.lora.attach(packed, nudged(adapters))}, X)
    assert np.abs(moved - plain).max() > 1e-3
    merged, report = bj.lora.merge(packed, nudged(adapters, 0.3))
    assert report.rows[0].changed > 0
    assert jax.eval_shape(model.apply, {"params": merged}, X).shape == X.shape


@pytest.mark.full
def test_nnx_trains_adapters_over_a_packed_state():
    model = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
    bj.nnx.ternarize(model)
    graphdef, state = nnx.split(bj.nnx.pack(model)[0])
    x = X[:, 0]
    adapters = bj.lora.init(state, 2, select=bj.only("query", "value"), key=jax.random.key(1))
    assert sorted(adapters.kernels) == ["query/kernel", "value/kernel"]

    @jax.jit
    def loss(adapters):
        return jnp.square(nnx.merge(graphdef, bj.lora.attach(state, adapters))(x) - 1.0).mean()

    plain = jnp.square(model(x) - 1.0).mean()
    np.testing.assert_allclose(loss(adapters), plain, rtol=1e-6)
    gradient = jax.jit(jax.grad(loss))
    for _ in range(20):
        grads = gradient(adapters)
        adapters = jax.tree.map(lambda v, g: v - 2.0 * g, adapters, grads)
    assert loss(adapters) < 0.95 * plain


def test_prepared_base():
    model, x, packed, adapters = made("dense")
    apply = jax.jit(model.apply)
    y = apply({"params": bj.lora.attach(packed, adapters)}, x)
    fast = bj.lora.attach(bj.prepare(packed), adapters)
    assert_same_bits(apply({"params": fast}, x), y)


@cases("name", list(MODELS), core=["general", "int8"])
def test_merge_finds_the_nearest_codes_and_their_best_scale(name):
    model, x, packed, adapters = made(name)
    adapters = nudged(adapters, 0.2)
    merged, report = bj.lora.merge(packed, adapters)
    (row,) = report.rows
    base, kernel = packed["kernel"], merged["kernel"]
    assert type(kernel) is type(base)
    assert (kernel.config, kernel.contracting_axes) == (base.config, base.contracting_axes)
    pair = adapters.kernels["kernel"]
    w = canonical(base, base.dequantize(jnp.float32))
    dw = 2.0 * np.einsum("...kr,...rn->...kn", *(np.asarray(pair[n], np.float64) for n in "ab"))
    whole, got = w + dw, canonical(kernel, kernel.dequantize(jnp.float32))
    np.testing.assert_allclose(row.update, np.linalg.norm(dw) / np.linalg.norm(w), rtol=1e-4)
    lost = np.linalg.norm(got - whole) / np.linalg.norm(whole)
    np.testing.assert_allclose(row.error, lost, rtol=1e-4)
    codes = canonical(kernel, kernel.int8_codes())
    old = canonical(base, base.int8_codes())
    np.testing.assert_allclose(row.changed, (codes != old).mean(), rtol=1e-5)
    if name != "int8":
        step = np.abs(w).max()  # one scale: nearest of -s, 0, s
        if name in ("dense", "general", "conv"):
            np.testing.assert_array_equal(codes, np.clip(np.round(whole / step), -1, 1))
            best = (whole * codes).sum() / (codes * codes).sum()
            np.testing.assert_allclose(np.abs(got).max(), best, rtol=1e-5)
    before, after = (jax.eval_shape(model.apply, {"params": tree}, x) for tree in (packed, merged))
    assert before.shape == after.shape


@cases("name", ["dense", "conv", "groups"], core=["groups"])
def test_merging_nothing_changes_nothing(name):
    _, _, packed, _ = made(name)
    adapters = bj.lora.init(packed, 1, key=jax.random.key(0))
    merged, report = bj.lora.merge(packed, adapters)
    assert_same_bits(merged["kernel"].codes, packed["kernel"].codes)
    np.testing.assert_allclose(merged["kernel"].scale, packed["kernel"].scale, rtol=1e-6)
    assert report.rows[0].changed == 0
    assert str(report).splitlines()[0].split() == [
        "path",
        "rank",
        "update",
        "error",
        "codes",
        "changed",
    ]


def test_adapters_survive_a_file(tmp_path):
    _, _, packed, adapters = made("dense")
    bj.io.save(tmp_path / "adapters.safetensors", adapters.kernels)
    kernels = bj.io.load(tmp_path / "adapters.safetensors")
    again = bj.lora.Adapters(kernels, adapters.alpha)
    jax.tree.map(assert_same_bits, again, adapters)
    bj.lora.attach(packed, again)


@pytest.mark.parametrize("rank", [0, -1, 13, 2.0, True, None])
def test_ranks_that_are_refused(rank):
    _, _, packed, _ = made("dense")
    with pytest.raises(ValueError, match=r"^lora.init: `rank` must .* 1 to 12, .* kernel, got"):
        bj.lora.init(packed, rank, key=jax.random.key(0))


def test_trees_and_adapters_that_are_refused():
    _, _, packed, adapters = made("dense")
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"lora.init: the tree holds no packed kernel"):
        bj.lora.init(bj.unpack_params(packed), 2, key=key)
    with pytest.raises(ValueError, match=r"lora.init: the pattern 'nope' matches nothing"):
        bj.lora.init(packed, 2, select=bj.only("nope"), key=key)
    with pytest.raises(TypeError, match=r"lora.init: kernel is prepared for"):
        bj.lora.init(bj.prepare(packed), 2, key=key)
    with pytest.raises(ValueError, match="`alpha` must be a finite number > 0, got -1"):
        bj.lora.init(packed, 2, key=key, alpha=-1)
    with pytest.raises(TypeError, match=r"lora.attach: `adapters` must be a Adapters"):
        bj.lora.attach(packed, adapters.kernels)
    with pytest.raises(ValueError, match=r"`adapters` has kernel, .* those are other"):
        bj.lora.attach({"other": packed["kernel"]}, adapters)
    small = bj.pack_params({"kernel": jnp.ones((8, 12))})[0]
    with pytest.raises(ValueError, match=r"the adapter of kernel has a and b of shapes \(16, 3\)"):
        bj.lora.attach(small, adapters)
    with pytest.raises(TypeError, match=r"lora.merge: kernel is prepared"):
        bj.lora.merge(bj.prepare(packed), adapters)
    bad = jax.tree.map(lambda v: v.at[0, 0].set(jnp.nan), adapters)
    with pytest.raises(ValueError, match=r"lora.merge: the adapter of kernel has NaN or Inf"):
        bj.lora.merge(packed, bad)


def test_a_grouped_convolution_is_refused():
    model = bj.linen.BitConv(8, (3, 3), feature_group_count=2)
    packed, _ = bj.linen.pack(model, params_of(model, X), X)
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2))
    with pytest.raises(NotImplementedError, match="kernel has an adapter and 2 feature groups"):
        jax.eval_shape(model.apply, {"params": bj.lora.attach(packed, adapters)}, X)
