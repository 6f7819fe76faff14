"""`bj.nnx.ternarize` turns a model ternary in place."""

import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax._packed.kernel import is_packed

INT8 = bj.Int8Config()


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)
        self.odd = nnx.LoRALinear(16, 16, lora_rank=2, rngs=rngs)
        self.norm = nnx.WeightNorm(nnx.Linear(16, 16, rngs=rngs), rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(16, 16, rngs=rngs)

        self.layers = stack(rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        x = self.conv(self.attention(self.embed(ids)))
        return self.embed.attend(run(self.odd(self.norm(x)), self.layers))


def small_net():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(16, 8, rngs=rngs), nnx.relu, nnx.LoRALinear(8, 4, lora_rank=2, rngs=rngs)
    )


def test_a_small_net_in_place():
    model, x = nnx.jit(small_net)(), normal(3, 16)
    kept, plain = model.layers[0].kernel, nnx.jit(lambda m: m(x))(model)
    table = bj.nnx.ternarize(model)
    assert model.layers[0].kernel is kept
    configs = {row.path: row.config for row in table.rows}
    assert configs["layers/0/kernel"] == bj.B158
    kinds = {row.path: row.kind for row in table.rows}
    assert kinds["layers/2/kernel"] == kinds["layers/2/lora/lora_a"] == "by call"
    trained = nnx.jit(lambda m: m(x))(model)
    assert np.abs(trained - plain).max() > 1e-3
    with pytest.raises(ValueError, match=r"how LoRALinear uses layers/2/kernel .*pack\(model, \*"):
        bj.nnx.pack(model)
    packed, report = bj.nnx.pack(model, x)
    assert len(report.rows) == 4
    assert_same_bits(nnx.jit(lambda m: m(x))(packed), trained)


@pytest.mark.full
def test_nnx_in_place():
    model, ids = NnxNet(nnx.Rngs(0)), jnp.arange(8).reshape(2, 4)
    kept = model.attention.query.kernel

    def answer(model):  # of a clone: nnx.WeightNorm writes to its kernel at every call
        return nnx.clone(model)(ids)

    plain = answer(model)
    table = bj.nnx.ternarize(
        model, select=lambda path, _: INT8 if path[-1] == "embedding" else path[-1] == "kernel"
    )
    why = {row.path: row.why for row in table.rows if row.config is None}
    assert "decided where it is multiplied" in why["odd/kernel"]
    assert "WeightNorm changes the kernel" in why["norm/layer_instance/kernel"]
    assert model.attention.query.kernel is kept
    trained = answer(model)
    assert np.abs(trained - plain).max() > 1e-3
    with bj.phase_in(0.0):
        np.testing.assert_allclose(answer(model), plain, rtol=1e-3, atol=1e-3)
    graphdef, state = nnx.split(model)
    assert_same_bits(answer(nnx.merge(graphdef, state)), trained)
    grads = nnx.jit(nnx.grad(lambda m: jnp.square(m(ids)).sum()))(nnx.clone(model))
    assert bj.analysis.gradient_flow(grads).paths("nan") == ()
    packed, report = bj.nnx.pack(model, ids)
    assert_same_bits(answer(packed), trained)
    assert_same_bits(answer(model), trained)
    assert model.attention.query.kernel is kept
    assert not is_packed(kept.get_value())
    np.testing.assert_allclose(
        nnx.jit(lambda m, i: m(i))(nnx.clone(packed), ids), trained, rtol=1e-4, atol=1e-5
    )
    for side in (model, packed):
        explained = {row.path: row for row in bj.nnx.explain(side).rows}
        assert explained.keys() == {row.path for row in table.rows}
        for row in table.rows:
            now = explained[row.path]
            assert (now.shape, now.config) == (row.shape, row.config)
            assert now.why == row.why
    calls = {row.path: row.why for row in bj.nnx.explain(model, ids).rows}
    assert calls["odd/kernel"] == "selected"
    assert "`mul` changes it" in calls["norm/layer_instance/kernel"]
    kinds = {layer.path: layer.kind for layer in report.rows}
    assert kinds["embed/embedding"] == "int8"
    assert kinds["layers/kernel"] == kinds["conv/kernel"] == kinds["odd/kernel"] == "ternary"
    with pytest.raises(TypeError, match="is packed already"):
        bj.nnx.ternarize(packed)


def test_nnx_changes_nothing_when_it_raises():
    model = NnxNet(nnx.Rngs(0))
    for select, error in (
        (bj.only("nope"), ValueError),
        (bj.only("norm", "conv"), NotImplementedError),
        (lambda path, leaf: bj.B158 if path[-1] == "embedding" else "yes", TypeError),
    ):
        with pytest.raises(error, match="ternarize"):
            bj.nnx.ternarize(model, select=select)
        assert type(model.conv) is nnx.Conv
    with pytest.raises(ValueError, match="NnxNet uses no kernel as ternary"):
        bj.nnx.pack(model)
    layer = bj.nnx.BitLinear(16, 4, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.ones((8, 4)))
    with pytest.raises(ValueError, match=r"kernel has shape \(8, 4\), and the model makes it"):
        bj.nnx.pack(layer)
