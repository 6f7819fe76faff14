"""Refusals that say what is the matter: kernels without a ternary form, leaves without values."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj

X = jnp.linspace(-1, 1, 160).reshape(2, 5, 16)
FORM = r"^ternarize: `select` matches kernels, and none of them has a ternary form \("


class Own(nn.Module):
    """A layer of a user's own, with a parameter that is called kernel."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (16, 8))


LINEN = {
    "fused cell": (nn.RNN(nn.OptimizedLSTMCell(8)), "cell/hf/kernel: `concatenate` changes it"),
    "weight norm": (nn.WeightNorm(nn.Dense(4)), "kernel: `mul` changes it"),
    "looked up": (nn.Sequential([lambda x: x.astype(int), nn.Embed(8, 4)]), "an embedding"),
}


@pytest.mark.parametrize("case", LINEN)
def test_linen_says_what_becomes_of_what_it_cannot_quantise(case):
    model, why = LINEN[case]
    params = model.init(jax.random.key(0), X)
    ternary = bj.linen.ternarize(model)
    for run in (lambda: ternary.init(jax.random.key(0), X), lambda: ternary.apply(params, X)):
        with pytest.raises(ValueError, match=f"^ternarize: nothing can be quantised.*{why}"):
            run()


REACHED = {
    "own layer": Own(),
    "nnx inside": nnx.bridge.ToLinen(nnx.Linear, args=(16, 8)),
    "a kernel for each place": nn.ConvLocal(4, (2,)),
    "set field": nn.Dense(4, dot_general=jax.lax.dot_general),
    "transposed": nn.ConvTranspose(4, (2,)),
    "bilinear": nn.Sequential([Own(), nn.DenseGeneral(3, axis=(-2, -1))]),
}


@pytest.mark.parametrize("case", REACHED)
def test_linen_reaches_kernels_of_every_layer(case):
    model = REACHED[case]
    params = jax.jit(model.init)(jax.random.key(0), X)
    ternary = bj.linen.ternarize(model)
    jax.tree.map(np.testing.assert_array_equal, ternary.init(jax.random.key(0), X), params)
    packed, report = bj.linen.pack(ternary, params["params"], X)
    assert all(row.path.endswith("kernel") for row in report.rows)
    y = jax.jit(ternary.apply)(params, X)
    served = jax.jit(ternary.apply)({**params, "params": packed}, X)
    np.testing.assert_array_equal(served, y)
    assert np.abs(y - model.apply(params, X)).max() > 1e-3


def test_linen_leaves_such_kernels_where_others_are_ternary():
    model = nn.Sequential([nn.Dense(16), nn.WeightNorm(nn.Dense(4))])
    ternary = bj.linen.ternarize(model)
    params = ternary.init(jax.random.key(0), X)["params"]
    _, report = bj.linen.pack(ternary, params, X)
    assert [row.path for row in report.rows] == ["layers_0/kernel"]
    with pytest.raises(ValueError, match="`select` matches nothing"):
        bj.linen.ternarize(model, select=lambda path, leaf: False).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="matches nothing of what this function multiplies"):
        bj.linen.ternarize(model, select=bj.exclude("layers_0")).init(jax.random.key(0), X)


def test_nnx_says_so_too_and_changes_nothing():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.WeightNorm(nnx.Linear(16, 4, rngs=rngs), rngs=rngs), nnx.Embed(4, 8, rngs=rngs)
    )
    with pytest.raises(ValueError, match=FORM + r"layers/0/.*/kernel: WeightNorm changes the ker"):
        bj.nnx.ternarize(model)
    every = lambda path, leaf: path[-1] == "embedding"  # noqa: E731
    with pytest.raises(ValueError, match=FORM + "layers/1/embedding: Embed takes an Int8Config"):
        bj.nnx.ternarize(model, select=every)
    assert type(model.layers[1]) is nnx.Embed


@pytest.mark.standard_promotion
def test_a_linen_model_inside_nnx_is_made_ternary_before_it_is_wrapped():
    model, rngs = nn.Sequential([nn.Dense(8), nn.Dense(4)]), nnx.Rngs(0)
    plain = nnx.bridge.ToNNX(model, rngs=rngs).lazy_init(X)
    with pytest.raises(ValueError, match=r"ToNNX holds no nnx\.Param .*ToNNX\(bj\.linen\.tern"):
        bj.nnx.ternarize(plain)
    ternary = nnx.bridge.ToNNX(bj.linen.ternarize(model), rngs=rngs).lazy_init(X)
    nnx.update(plain, nnx.state(ternary))
    assert bool((plain(X) != ternary(X)).any())


SHAPES = {"layer": {"kernel": jax.ShapeDtypeStruct((16, 8), "float32")}}
PACKED = jax.eval_shape(lambda p: bj.pack_params(p)[0], SHAPES)
NEEDS_VALUES = {
    "pack_params": lambda: bj.pack_params(SHAPES),
    "fake_quantize_params": lambda: bj.fake_quantize_params(SHAPES),
    "unpack_params": lambda: bj.unpack_params(PACKED),
    "trit_stats": lambda: bj.analysis.trit_stats(SHAPES),
    "sensitivity": lambda: bj.analysis.sensitivity(lambda p: jnp.float32(0.0), SHAPES),
    "gradient_flow": lambda: bj.analysis.gradient_flow(SHAPES),
    "compare": lambda: bj.analysis.compare(nn.Dense(8), SHAPES, PACKED, [X]),
}


ABSTRACT_X = jax.ShapeDtypeStruct((2, 16), "float32")
ABSTRACT_W = SHAPES["layer"]["kernel"]
W = jnp.ones((16, 8))
OPERANDS = {
    "pack": lambda: bj.pack(ABSTRACT_W),
    "unpack": lambda: bj.unpack(PACKED["layer"]["kernel"]),
    "prepare": lambda: bj.prepare(PACKED),
    "quantize": lambda: bj.quantize(ABSTRACT_W),
    "fake_quantize": lambda: bj.fake_quantize(ABSTRACT_W),
    "fake_quantize_activations": lambda: bj.fake_quantize_activations(ABSTRACT_X),
    "quantize_activations": lambda: bj.quantize_activations(ABSTRACT_X),
    "ternary_dot, x": lambda: bj.ternary_dot(ABSTRACT_X, W),
    "ternary_dot, w": lambda: bj.ternary_dot(X[0, :2], ABSTRACT_W),
    "matmul, x": lambda: bj.matmul(ABSTRACT_X, bj.pack(W)),
    "matmul, kernel": lambda: bj.matmul(X[0, :2], PACKED["layer"]["kernel"]),
    "rows": lambda: bj.pack(W, bj.Int8Config(), contracting_axes=-1).rows(
        jax.ShapeDtypeStruct((2,), "int32")
    ),
    "BitDense": lambda: bj.linen.BitDense(8, use_bias=False).apply({"params": SHAPES["layer"]}, X),
    "linen.ternarize": lambda: bj.linen.ternarize(nn.Dense(8, use_bias=False)).apply(
        {"params": SHAPES["layer"]}, X
    ),
    "qk_clip": lambda: bj.optim.qk_clip(
        {n: {"kernel": jax.ShapeDtypeStruct((4, 2, 3), "float32")} for n in ("query", "key")},
        jnp.ones(2),
        tau=3.0,
    ),
    "lora.merge": lambda: bj.lora.merge(
        PACKED, bj.lora.init({"layer": {"kernel": bj.pack(W)}}, 2, key=jax.random.key(0))
    ),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_abstract_operands_are_refused_by_name(name):
    words = r"is a jax\.ShapeDtypeStruct.* Pass arrays|hold jax\.ShapeDtypeStruct.* needs arrays"
    with pytest.raises(TypeError, match=words):
        OPERANDS[name]()


@pytest.mark.parametrize("who", NEEDS_VALUES)
def test_abstract_leaves_are_refused_by_path_where_values_are_read(who):
    wanted = rf"^{who}: layer/kernel is a jax.ShapeDtypeStruct.* Pass arrays"
    with pytest.raises(TypeError, match=wanted):
        NEEDS_VALUES[who]()


def test_abstract_models_are_refused_by_path():
    model = bj.linen.ternarize(nn.Dense(8))
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    with pytest.raises(TypeError, match=r"kernel is a jax\.ShapeDtypeStruct"):
        bj.linen.pack(model, params, X)
    abstract = nnx.eval_shape(lambda: bj.nnx.BitLinear(16, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"kernel is a jax\.ShapeDtypeStruct"):
        bj.nnx.pack(abstract)


def test_abstract_leaves_do_where_shapes_are_enough():
    model = bj.linen.ternarize(nn.Dense(8))
    params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    kernels = bj.linen.kernels(model, params, X)
    assert kernels.uses[("kernel",)].shape == (16, 8)
    assert bj.partition(SHAPES)[1] == {"layer": {"kernel": None}}
    assert jax.eval_shape(lambda p: bj.unpack_params(p), PACKED) == SHAPES
    assert bj.optim.muon_dimensions(SHAPES)["layer"]["kernel"].reduction_axis == (0,)


def test_gradient_flow_is_plain_data():
    grads = {"a": jnp.ones(4), "b": None, "c": jnp.array([jnp.inf])}
    told = json.loads(json.dumps(bj.analysis.gradient_flow(grads).to_dict(), allow_nan=False))
    assert told["ok"] is False
    assert [row["state"] for row in told["rows"]] == ["ok", "missing", "nan"]
    assert told["rows"][0] == {"path": "a", "norm": 2.0, "largest": 1.0, "state": "ok"}
    assert told["rows"][1]["norm"] is told["rows"][2]["largest"] is None


def test_coverage_and_comparison_are_plain_data():
    model = bj.nnx.BitLinear(16, 8, rngs=nnx.Rngs(0))
    table = bj.nnx.explain(model)
    (row,) = json.loads(json.dumps(table.to_dict()))["rows"]
    assert (row["path"], row["shape"], row["kind"]) == ("kernel", [16, 8], "ternary")
    assert row["config"]["scale"] == "absmean"
    layer = bj.linen.BitDense(8)
    params = layer.init(jax.random.key(0), X)["params"]
    found = bj.analysis.compare(layer, params, bj.pack_params(params)[0], [X])
    assert found.rows[0].name == "KL(float || packed)"
    assert found.rows[-1].of_packed == found.max_difference == found.to_dict()["max_difference"]
