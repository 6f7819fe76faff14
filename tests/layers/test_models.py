"""Whole models that nobody edited: every layer call gives the bits of its packed kernel.

A layer call is caught where it happens, inside the jitted network, under scan and
remat too, with what went in and what came out; then the packed kernel is given the
same input on its own.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from flax import traverse_util
from oracles import assert_same_bits

import bitnet_jax as bj

pytestmark = pytest.mark.optimised


class Block(nn.Module):
    causal: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1])) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        y = nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (2, 2), strides=2)(x)
        x = x.reshape(x.shape[0], -1, 32)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], 32))
        for _ in range(2):
            x, _ = Block()(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = x + nn.relu(nn.Conv(16, (3, 3), feature_group_count=4)(x))
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(24, (3, 3), strides=2)(x)))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(17, 32)
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0, "caught": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(causal=True)(embed(ids), None)
        return embed.attend(nn.LayerNorm()(x))


def eight_bit_table(path, leaf):
    return bj.Int8Config() if path[-1] == "embedding" else path[-1] == "kernel"


IMAGES = normal(3, 8, 8, 1)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 9)), jnp.int32)
MODELS = {
    "vit": (ViT(), None, IMAGES),
    "convnet": (ConvNet(), None, IMAGES),
    "decoder": (Decoder(), eight_bit_table, IDS),
}


@cache
def made(name):
    """A model that was made ternary, its parameters, packed ones and what packing did."""
    model, select, x = MODELS[name]
    ternary = bj.linen.ternarize(model, select=select)
    params = params_of(ternary, x)
    return ternary, params, *bj.linen.pack(ternary, params, x)


def leaf_at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv)


def catching(found):
    """Makes every layer sow its input and its output, and notes the layers by their paths."""

    def sow(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module = context.module
        if isinstance(module, LAYERS) and context.method_name == "__call__":
            module.sow("caught", "kernel", (args[0], y))
            found["/".join((*module.path, "kernel"))] = module.clone(parent=None, name=None)
        return y

    return nn.intercept_methods(sow)


@cases("name", list(MODELS), core=["convnet"])
def test_every_layer_call_gives_the_bits_of_its_packed_kernel(name):
    x, layers = MODELS[name][-1], {}
    ternary, params, packed, report = made(name)
    with catching(layers):
        apply = jax.jit(lambda p, x: ternary.apply({"params": p}, x, mutable=["caught"]))
        _, state = apply(params, x)
    called = set()
    for path, calls in traverse_util.flatten_dict(state["caught"]).items():
        where = "/".join(path)
        own = leaf_at(packed, where[: -len("/kernel")])
        one = bj.linen.ternarize(layers[where])
        for x, y in calls:
            stacked = "blocks" in where or "Scan" in where  # one slice a turn of the scan
            for i in range(own["kernel"].shape[0]) if stacked else [...]:
                slice_ = jax.tree.map(lambda a, i=i: a[i], own)
                assert_same_bits(one.apply({"params": slice_}, x[i]), y[i], where)
        called.add(where)
    # A table is met in its own way; test_int8.py holds it.
    tables = {row.path for row in report.rows if row.path.endswith("embedding")}
    assert called == {row.path for row in report.rows} - tables


@cases("name", list(MODELS), core=["convnet"])
def test_whole_networks_agree(name):
    x = MODELS[name][-1]
    ternary, params, packed, _ = made(name)
    apply = jax.jit(lambda p: ternary.apply({"params": p}, x))
    trained, served = apply(params), apply(packed)
    # Norms, softmax and gelu may be fused otherwise; no code flips on these inputs.
    np.testing.assert_allclose(served, trained, rtol=1e-4, atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: jnp.square(apply(p)).sum()))(params)
    assert bj.analysis.gradient_flow(grads).paths("nan") == ()
    dead = [
        path for path in bj.analysis.gradient_flow(grads).paths("dead") if "key/bias" not in path
    ]
    assert dead == []  # softmax does not see a key's bias
