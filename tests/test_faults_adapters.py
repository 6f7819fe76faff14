"""Adapters over embeddings, and trees with adapters given to functions that would lose them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj

pytestmark = pytest.mark.optimised


class Language(nn.Module):
    @nn.compact
    def __call__(self, t):
        table = nn.Embed(20, 16, name="embed")
        return table.attend(nn.Dense(16, name="body")(table(t)))


def int8_embedding(path, leaf):
    return bj.Int8Config() if path[-1] == "embedding" else path[-1] == "kernel"


TOKENS = jnp.arange(6).reshape(2, 3)


def trained(packed):
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2), alpha=3.0)
    return jax.tree.map(lambda a: a + jnp.float32(0.1), adapters)


def folded(table, pair):
    """The float embedding with the update in it, features contracted."""
    update = 1.5 * np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
    return np.asarray(table.dequantize(), np.float64) + update.T


@pytest.fixture(scope="module")
def language():
    model = bj.linen.ternarize(Language(), int8_embedding)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    return model, bj.linen.pack(model, params, TOKENS)[0]


@pytest.mark.parametrize("ready", [lambda p: p, bj.prepare], ids=["stored", "prepared"])
def test_an_adapted_embedding_is_looked_up(language, ready):
    _, packed = language
    layer = bj.linen.ternarize(nn.Embed(20, 16), int8_embedding)
    table = packed["embed"]
    adapters = trained(table)
    params = {"params": bj.lora.attach(ready(table), adapters)}
    rows = jax.jit(layer.apply)(params, TOKENS)
    want = folded(table["embedding"], adapters.kernels["embedding"])[np.asarray(TOKENS)]
    np.testing.assert_allclose(rows, want, rtol=1e-5, atol=1e-5)
    outside = layer.apply(params, jnp.array([0, 20, -1]))
    assert jnp.isnan(outside[1]).all()
    last = layer.apply(params, jnp.array([19]))[0]
    np.testing.assert_allclose(outside[2], last, rtol=1e-5, atol=1e-6)  # a float product


def test_a_model_with_an_adapted_tied_embedding_trains(language):
    model, packed = language
    adapters = bj.lora.init(packed, 2, key=jax.random.key(1))
    assert sorted(adapters.kernels) == ["body/kernel", "embed/embedding"]
    plain = model.apply({"params": packed}, TOKENS)
    logits = model.apply({"params": bj.lora.attach(packed, adapters)}, TOKENS)
    np.testing.assert_allclose(logits, plain, rtol=1e-6)

    def loss(adapters):
        y = model.apply({"params": bj.lora.attach(packed, adapters)}, TOKENS)
        return jnp.square(y - jnp.float32(1)).mean()

    grads = jax.grad(loss)(adapters).kernels
    assert all(jnp.any(pair["b"] != 0) for pair in grads.values())


def test_an_adapted_embedding_under_nnx():
    model = nnx.Embed(20, 16, rngs=nnx.Rngs(0))
    bj.nnx.ternarize(model, select=lambda path, leaf: bj.Int8Config())
    state, _ = bj.nnx.pack(model)
    state = nnx.state(state) if isinstance(state, nnx.Module) else state
    table = state["embedding"].get_value()
    adapters = trained(state)
    nnx.update(model, bj.lora.attach(state, adapters))
    want = folded(table, adapters.kernels["embedding"])
    np.testing.assert_allclose(model(TOKENS), want[np.asarray(TOKENS)], rtol=1e-5, atol=1e-5)


def test_unpacking_does_not_drop_adapters(language):
    _, packed = language
    attached = bj.lora.attach(packed, trained(packed))
    with pytest.raises(TypeError, match=r"body/kernel has an adapter.*bj\.lora\.merge\(packed"):
        bj.unpack_params(attached)
    with pytest.raises(TypeError, match="has an adapter"):
        bj.unpack_params(bj.lora.attach(bj.prepare(packed), trained(packed)))
    assert bj.unpack_params(bj.lora.merge(packed, trained(packed))[0])


def test_adapters_are_not_stacked_or_saved_in_place(language, tmp_path):
    _, packed = language
    adapters = trained(packed)
    attached = bj.lora.attach(packed, adapters)
    for call in (
        lambda: bj.lora.init(attached, 2, key=jax.random.key(0)),
        lambda: bj.lora.attach(attached, adapters),
        lambda: bj.lora.merge(attached, adapters),
    ):
        with pytest.raises(TypeError, match=r"has an adapter already\. Pass the packed tree"):
            call()
    with pytest.raises(TypeError, match="got a kernel with an adapter"):
        bj.io.save(tmp_path / "model.bitnet.safetensors", attached)


def test_two_leaves_of_one_path_get_no_common_adapter():
    kernel = bj.pack(jnp.ones((8, 8)))
    with pytest.raises(ValueError, match=r"lora\.init: `packed` has two leaves with the path a/b"):
        bj.lora.init({"a/b": kernel, "a": {"b": kernel}}, 2, key=jax.random.key(0))
