"""Whole trees: which leaves are taken, what they become, what is refused."""

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from oracles import assert_same_bits

import bitnet_jax as bj


def array(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tree():
    return {
        "body": {"dense": {"kernel": array(16, 8), "bias": array(8, seed=1)}},
        "embed": {"embedding": array(10, 16, seed=2)},
        "head": {"kernel": array(8, 4, seed=3)},
    }


def packed_paths(packed):
    flat = flax.traverse_util.flatten_dict(packed, sep="/")
    return {path for path, leaf in flat.items() if isinstance(leaf, bj.PackedTernary)}


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        (None, {"body/dense/kernel", "head/kernel"}),
        (bj.exclude("head"), {"body/dense/kernel"}),
        (bj.exclude("body/dense"), {"head/kernel"}),
        (bj.exclude("b*"), {"head/kernel"}),
        (bj.only("dense"), {"body/dense/kernel"}),
        (bj.only("body/*", "head"), {"body/dense/kernel", "head/kernel"}),
        (bj.only("embed/embedding"), {"embed/embedding"}),
        (lambda path, leaf: leaf.ndim == 2 and "head" not in path, None),
    ],
)
def test_selectors(select, wanted):
    params = tree()
    packed, report = bj.pack_params(params, select=select)
    wanted = wanted or {"body/dense/kernel", "embed/embedding"}
    assert packed_paths(packed) == wanted
    assert {layer.path for layer in report.layers} == wanted
    chex.assert_trees_all_equal(params, tree())  # untouched
    faked = bj.fake_quantize_params(params, select=select)
    chex.assert_trees_all_equal(bj.unpack_params(packed), faked)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, faked)


def test_a_config_for_each_path():
    group = bj.TernaryConfig(granularity=4)

    def select(path, leaf):
        return {"head": group, "body": bj.PHASE4}.get(path[0]) if leaf.ndim == 2 else None

    packed, _ = bj.pack_params(tree(), select=select)
    assert packed["head"]["kernel"].config == group
    assert packed["head"]["kernel"].scale.shape == (2, 4)
    assert packed["body"]["dense"]["kernel"].config == bj.PHASE4


def refusals():
    params = tree()
    stacked = {"blocks": {"kernel": array(3, 8, 4)}}
    broken = {"layer": {"kernel": array(8, 4).at[2, 1].set(jnp.nan).at[0, 0].set(jnp.inf)}}
    return {
        "typo in exclude": (params, dict(select=bj.exclude("haed")), "'haed' matches .*head"),
        "typo in only": (params, dict(select=bj.only("dens")), "'dens' matches .*body/dense"),
        "nothing selected": (params, dict(select=lambda *_: False), "`select` matches nothing"),
        "no kernels": ({"w": array(4, 4)}, {}, "default selection.*Near paths: w"),
        "garbage": (params, dict(select=lambda *_: "yes"), "str 'yes' for body/dense/bias"),
        "a bias": (params, dict(select=lambda p, _: p[-1] == "bias"), "`body/dense/bias` needs at"),
        "integers": (
            {"kernel": jnp.ones((4, 4), jnp.int32)},
            dict(select=lambda *_: True),
            "int32",
        ),
        "empty": ({}, {}, "`params` holds no arrays"),
        "rank 3": (stacked, {}, r"blocks/kernel has shape \(3, 8, 4\).*axes="),
        "bad axes": (stacked, dict(axes=lambda *_: 1), "`axes` returned int 1 for blocks/kernel"),
        "NaN and Inf": (broken, {}, "layer/kernel has 2 NaN or Inf weights"),
        "config": (params, dict(config="b158"), "`config` must be a TernaryConfig"),
        "group": (
            params,
            dict(config=bj.TernaryConfig(granularity=3)),
            "`granularity`=3 does not divide",
        ),
        "packed twice": (bj.pack_params(params)[0], {}, "body/dense/kernel is packed already"),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_what_pack_params_refuses(name):
    params, keywords, text = refusals()[name]
    with pytest.raises((TypeError, ValueError), match=f"^pack_params: .*{text}"):
        bj.pack_params(params, **keywords)


def test_what_the_others_refuse():
    for call in (bj.unpack_params, bj.prepare):
        with pytest.raises(ValueError, match="holds no packed kernel"):
            call(tree())
    fast = bj.prepare(bj.pack_params(tree())[0])
    for call in (bj.unpack_params, bj.prepare):
        with pytest.raises(TypeError, match="stored tree"):
            call(fast)
    with pytest.raises(ValueError, match="`patterns` must be one or more names"):
        bj.exclude()
    with pytest.raises(TypeError, match=r"^fake_quantize_params: .*is packed already"):
        bj.fake_quantize_params(bj.pack_params(tree())[0])


def test_learned_axes_come_from_the_caller():
    params = {"blocks": {"kernel": array(3, 8, 4)}, "out": {"kernel": array(2, 3, 5)}}
    axes = {
        "blocks": {"contracting_axes": 1, "batch_axes": 0},
        "out": {"contracting_axes": (0, 1)},
    }
    packed, report = bj.pack_params(params, axes=lambda path, _: axes[path[0]])
    assert packed["blocks"]["kernel"].scale.shape == (3, 1, 1)
    assert packed["out"]["kernel"].scale.shape == (1, 1, 1)
    assert [layer.shape for layer in report.layers] == [(3, 8, 4), (2, 3, 5)]
    for name, keywords in axes.items():
        w = params[name]["kernel"]
        hat = bj.quantize(w, **keywords).dequantize()
        assert_same_bits(packed[name]["kernel"].dequantize(), hat)


def test_boxes_stay_closed():
    box = nn.Partitioned(array(16, 8), names=("in", "out"))
    packed, _ = bj.pack_params({"layer": {"kernel": box}})
    leaf = packed["layer"]["kernel"]
    assert isinstance(leaf, nn.Partitioned)
    assert leaf.names == ("in", "out")
    assert isinstance(leaf.value, bj.PackedTernary)
    back = bj.unpack_params(packed)["layer"]["kernel"]
    assert_same_bits(back.value, bj.fake_quantize(box.value))


def test_frozen_dict_and_state():
    frozen, _ = bj.pack_params(flax.core.freeze(tree()))
    assert isinstance(frozen, flax.core.FrozenDict)
    assert packed_paths(flax.core.unfreeze(frozen)) == {"body/dense/kernel", "head/kernel"}
    state = nnx.state(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.Param)
    packed, report = bj.pack_params(state)
    assert isinstance(packed["kernel"], nnx.Param)
    assert isinstance(packed["kernel"].get_value(), bj.PackedTernary)
    assert report.layers[0].path == "kernel"


def test_while_tracing_there_is_no_report():
    shapes = jax.eval_shape(lambda p: bj.pack_params(p)[0], tree())
    packed, _ = bj.pack_params(tree())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, packed)
    assert shapes["head"]["kernel"].nbytes == packed["head"]["kernel"].nbytes
    jitted = jax.jit(lambda p: bj.pack_params(p)[0])(tree())
    chex.assert_trees_all_equal(jitted, packed)


def test_dtypes_come_back():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree())
    packed, _ = bj.pack_params(params)
    back = bj.unpack_params(packed)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, params)
    assert bj.unpack_params(packed, dtype=jnp.float32)["head"]["kernel"].dtype == jnp.float32


def test_fake_quantize_params_passes_gradients_and_does_not_retrace():
    params = tree()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradients(params, strength):
        def loss(p):
            q = bj.fake_quantize_params(p, strength=strength)
            return (3.0 * q["head"]["kernel"]).sum() + q["body"]["dense"]["bias"].sum()

        return jax.grad(loss)(params)

    for strength in (0.0, 0.3, 1.0):
        grads = gradients(params, jnp.float32(strength))
        np.testing.assert_array_equal(grads["head"]["kernel"], np.full((8, 4), 3, np.float32))
        np.testing.assert_array_equal(grads["body"]["dense"]["bias"], np.ones(8, np.float32))


@pytest.mark.standard_promotion
def test_float_leaves_train_around_packed_kernels():
    packed, _ = bj.pack_params(tree())
    trainable, frozen = bj.partition(packed)
    assert trainable["head"]["kernel"] is None
    assert frozen["embed"]["embedding"] is None
    chex.assert_trees_all_equal(bj.combine(trainable, frozen), packed)
    tx = optax.adamw(1e-2)
    state = tx.init(trainable)

    def loss(trainable):
        params = bj.combine(trainable, frozen)
        x = params["embed"]["embedding"]
        y = bj.matmul(x, params["body"]["dense"]["kernel"]) + params["body"]["dense"]["bias"][None]
        return jnp.square(bj.matmul(nn.relu(y), params["head"]["kernel"]) - 1.0).mean()

    first = loss(trainable)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert loss(trainable) < first


def test_prepare_changes_packed_leaves_only():
    packed, _ = bj.pack_params(tree())
    fast = bj.prepare(packed)
    assert isinstance(fast["head"]["kernel"], bj.PreparedTernary)
    assert fast["embed"]["embedding"] is packed["embed"]["embedding"]
    same = bj.prepare(packed, implementation="reference")
    assert isinstance(same["head"]["kernel"], bj.PackedTernary)
