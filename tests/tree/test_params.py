"""Trees are packed, unpacked and prepared: containers, boxes, dtypes, refusals."""

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from flax import linen as nn
from flax import nnx
from oracles import assert_same_bits
from trees import CONTAINERS, array, tree

import bitnet_jax as bj
from bitnet_jax._packed.prepared import PreparedTernary


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
    assert {layer.path for layer in report.rows} == wanted
    chex.assert_trees_all_equal(params, tree())  # untouched
    faked = bj.fake_quantize_params(params, select=select)
    chex.assert_trees_all_equal(bj.unpack_params(packed, dequantize=True), faked)
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
    assert [layer.shape for layer in report.rows] == [(3, 8, 4), (2, 3, 5)]
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
    back = bj.unpack_params(packed, dequantize=True)["layer"]["kernel"]
    assert_same_bits(back.value, bj.fake_quantize(box.value))


def test_frozen_dict_and_state():
    frozen, _ = bj.pack_params(flax.core.freeze(tree()))
    assert isinstance(frozen, flax.core.FrozenDict)
    assert packed_paths(flax.core.unfreeze(frozen)) == {"body/dense/kernel", "head/kernel"}
    state = nnx.state(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.Param)
    packed, report = bj.pack_params(state)
    assert isinstance(packed["kernel"], nnx.Param)
    assert isinstance(packed["kernel"].get_value(), bj.PackedTernary)
    assert report.rows[0].path == "kernel"


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


def test_prepare_changes_packed_leaves_only():
    packed, _ = bj.pack_params(tree())
    fast = bj.prepare(packed)
    assert isinstance(fast["head"]["kernel"], PreparedTernary)
    assert fast["embed"]["embedding"] is packed["embed"]["embedding"]
    same = bj.prepare(packed, implementation="reference")
    assert isinstance(same["head"]["kernel"], bj.PackedTernary)


def of_every_kind():
    """One kernel for each dtype and shape that a byte, a group or a cast could get wrong."""
    return {
        "a": {"kernel": array(7, 5, dtype=jnp.bfloat16)},
        "b": {"kernel": array(8, 4, seed=1, dtype=jnp.float16)},
        "c": {"kernel": np.asarray(array(9, 3, seed=2))},
    }


CONFIGS = {
    "a": bj.TWN,
    "b": bj.TernaryConfig(scale="absmedian", granularity=4),
    "c": bj.PHASE4,
}


def test_dequantized_is_fake_quantized_to_the_bit_for_every_dtype_and_config():
    params = of_every_kind()

    def select(path, leaf):
        return CONFIGS[path[0]]

    packed, report = bj.pack_params(params, select=select)
    assert [layer.config for layer in report.rows] == list(CONFIGS.values())
    faked = bj.fake_quantize_params(params, select=select)
    jitted = jax.jit(lambda p: bj.fake_quantize_params(p, select=select))(params)
    back = bj.unpack_params(packed, dequantize=True)
    wide = bj.unpack_params(packed, dtype=jnp.float32, dequantize=True)
    for name, leaf in back.items():
        w = params[name]["kernel"]
        assert leaf["kernel"].dtype == w.dtype
        exact = np.asarray(bj.quantize(jnp.asarray(w), CONFIGS[name]).dequantize())
        assert_same_bits(wide[name]["kernel"], exact)
        assert_same_bits(leaf["kernel"], exact.astype(w.dtype))
        assert_same_bits(leaf["kernel"], faked[name]["kernel"])
        assert_same_bits(leaf["kernel"], jitted[name]["kernel"])


def test_a_convolution_and_a_stack_of_attention_kernels():
    params = {"conv": {"kernel": array(3, 3, 5, 4)}, "out": {"kernel": array(2, 3, 6, 4, seed=1)}}
    axes = {
        "conv": {"contracting_axes": (0, 1, 2)},
        "out": {"contracting_axes": [-3, -2], "batch_axes": 0},
    }
    config = bj.TernaryConfig(granularity="channel")
    packed, report = bj.pack_params(params, config, axes=lambda path, _: axes[path[0]])
    conv, out = packed["conv"]["kernel"], packed["out"]["kernel"]
    assert conv.codes.shape == (3, 3, 2, 4)  # five input channels fill two bytes
    assert conv.scale.shape == (1, 1, 1, 4)
    assert out.codes.shape == (2, 3, 2, 4)
    assert out.scale.shape == (2, 1, 1, 4)
    # Padding is not counted as zeros, wherever in the kernel it lies.
    for layer, leaf in zip(report.rows, (conv, out), strict=True):
        codes = np.asarray(leaf.int8_codes())
        assert layer.minus == (codes == -1).sum()
        assert layer.zero == (codes == 0).sum()
        assert layer.plus == (codes == 1).sum()
    faked = bj.fake_quantize_params(params, config, axes=lambda path, _: axes[path[0]])
    chex.assert_trees_all_equal(bj.unpack_params(packed, dequantize=True), faked)


def test_an_axis_function_may_leave_a_matrix_to_its_shape():
    params = {"blocks": {"kernel": array(3, 8, 4)}, "head": {"kernel": array(8, 4)}}

    def axes(path, leaf):
        return {"batch_axes": 0} if leaf.ndim == 3 else None

    packed, _ = bj.pack_params(params, axes=axes)
    assert packed["blocks"]["kernel"].scale.shape == (3, 1, 1)
    assert packed["head"]["kernel"].scale.shape == (1, 1)
    one = bj.pack(params["blocks"]["kernel"][1])
    assert_same_bits(packed["blocks"]["kernel"].codes[1], one.codes)
    assert_same_bits(packed["blocks"]["kernel"].scale[1], one.scale)


def test_an_axis_may_be_a_numpy_integer_as_for_pack():
    w = array(3, 8, 4)
    named = {"contracting_axes": np.int64(1), "batch_axes": np.int64(0)}
    wanted = bj.pack(w, **named)
    packed, _ = bj.pack_params({"kernel": w}, axes=lambda *_: named)
    chex.assert_trees_all_equal(packed["kernel"], wanted)


@pytest.mark.parametrize("call", [bj.pack_params, bj.fake_quantize_params])
def test_the_remedy_for_an_unknown_rank_works(call):
    params = {"blocks": {"kernel": array(3, 8, 4)}, "head": {"kernel": array(8, 4)}}
    with pytest.raises(ValueError, match=r"blocks/kernel has shape \(3, 8, 4\)") as caught:
        call(params)
    assert str(caught.value).startswith(call.__name__)
    assert "select=bj.exclude('blocks/kernel')" in str(caught.value)
    call(params, select=bj.exclude("blocks/kernel"))
    call(params, axes=lambda path, leaf: {"batch_axes": 0} if leaf.ndim == 3 else None)


@pytest.mark.parametrize("call", [bj.pack_params, bj.fake_quantize_params])
@pytest.mark.parametrize(
    ("shape", "keywords", "text"),
    [
        ((3, 8, 4), dict(axes=lambda *_: {"contracting_axes": 5}), "rank-3 array"),
        ((3, 8, 4), dict(axes=lambda *_: {"contracting_axes": 0, "batch_axes": 0}), r"axes \[0\]"),
        ((8, 4), dict(config=bj.TernaryConfig(granularity=3)), "`granularity`=3"),
        ((8, 4), dict(axes=lambda *_: {"contracting": 0}), "`axes` returned dict"),
        ((0, 4), {}, "no elements"),
    ],
)
def test_a_bad_kernel_is_named_with_its_path_by_the_function_called(call, shape, keywords, text):
    params = {"q": {"kernel": jnp.zeros(shape)}, "bias": jnp.zeros(4)}
    with pytest.raises((TypeError, ValueError), match=text) as caught:
        call(params, **keywords)
    assert str(caught.value).startswith(f"{call.__name__}: ")
    assert "q/kernel" in str(caught.value)


@pytest.mark.parametrize("axes", [{"contracting_axes": 0}, (0,), 0])
def test_axes_that_are_no_function_are_refused_with_a_remedy(axes):
    with pytest.raises(TypeError, match=r"^pack_params: `axes` must be .*function"):
        bj.pack_params({"kernel": array(8, 4)}, axes=axes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@cases(
    "config",
    {"b158": bj.B158, "twn": bj.TWN, "median": bj.TernaryConfig(scale="absmedian")},
    core=["twn"],
)
def test_bad_weights_are_named_and_the_tree_is_untouched(bad, config):
    params = tree()
    params["body"]["dense"]["kernel"] = params["body"]["dense"]["kernel"].at[3, 2].set(bad)
    before = jax.tree.map(lambda leaf: np.array(leaf), params)
    leaves = jax.tree.leaves(params)
    with pytest.raises(ValueError, match=r"^pack_params: body/dense/kernel has 1 NaN or Inf"):
        bj.pack_params(params, config)
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(params), strict=True))
    for now, then in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
        assert_same_bits(now, then)
    # A leaf that is not selected may hold anything.
    packed, _ = bj.pack_params(params, config, select=bj.only("head"))
    assert packed["body"]["dense"]["kernel"] is params["body"]["dense"]["kernel"]


def test_leaves_that_are_not_selected_are_the_same_objects():
    params = tree()
    packed, _ = bj.pack_params(params, select=bj.only("head"))
    for path in (("embed", "embedding"), ("body", "dense", "kernel"), ("body", "dense", "bias")):
        ours, theirs = packed, params
        for name in path:
            ours, theirs = ours[name], theirs[name]
        assert ours is theirs


def test_the_report_is_none_while_tracing():
    shapes, report = jax.eval_shape(bj.pack_params, tree())
    assert report is None
    leaf = shapes["body"]["dense"]["kernel"]
    assert isinstance(leaf, bj.PackedTernary)
    assert (leaf.shape, leaf.codes.shape, leaf.scale.shape) == ((16, 8), (4, 8), (1, 1))
    assert (leaf.codes.dtype, leaf.scale.dtype) == (jnp.uint8, jnp.float32)
    packed, report = jax.jit(bj.pack_params)(tree())
    assert report is None
    for ours, theirs in zip(
        jax.tree.leaves(packed), jax.tree.leaves(bj.pack_params(tree())[0]), strict=True
    ):
        assert_same_bits(ours, theirs)
    # Tracing cannot see values, so it refuses no value; shapes it does.
    jax.eval_shape(bj.pack_params, {"kernel": jnp.full((4, 4), jnp.nan)})
    with pytest.raises(ValueError, match="blocks/kernel has shape"):
        jax.eval_shape(bj.pack_params, {"blocks": {"kernel": array(3, 8, 4)}})


def test_strength_ends_are_the_float_kernel_and_the_ternary_one():
    params = tree()
    chex.assert_trees_all_equal(bj.fake_quantize_params(params, strength=0.0), params)
    full = bj.fake_quantize_params(params)
    for strength in (1.0, jnp.float32(1.0)):
        some = bj.fake_quantize_params(params, strength=strength)
        assert_same_bits(some["head"]["kernel"], full["head"]["kernel"])
    half = bj.fake_quantize_params(params, strength=0.5)["head"]["kernel"]
    middle = (np.asarray(params["head"]["kernel"]) + np.asarray(full["head"]["kernel"])) / 2
    np.testing.assert_allclose(half, middle, rtol=1e-6)
    with pytest.raises(ValueError, match=r"`strength` must be from 0 to 1, got 1\.5"):
        bj.fake_quantize_params(params, strength=1.5)


def test_prepare_keeps_containers_and_boxes():
    packed, _ = bj.pack_params(tree())
    for name in ("FrozenDict", "list", "Partitioned"):
        whole = CONTAINERS[name](packed)
        fast = bj.prepare(whole)
        assert type(fast) is type(whole)
        kinds = [
            type(leaf)
            for leaf in jax.tree.leaves(fast, is_leaf=lambda n: isinstance(n, PreparedTernary))
        ]
        assert PreparedTernary in kinds
        assert bj.PackedTernary not in kinds
    box = bj.prepare(CONTAINERS["Partitioned"](packed))["kernel"]
    assert box.names == ("in", "out")
    x = array(3, 8, seed=9)
    assert_same_bits(bj.matmul(x, box.value), bj.matmul(x, packed["head"]["kernel"]))
    fast = bj.prepare(packed)
    with pytest.raises(TypeError, match=r"^prepare: \['body'\]\['dense'\]\['kernel'\] is prepared"):
        bj.prepare(fast)
    with pytest.raises(TypeError, match=r"^unpack_params: body/dense/kernel is prepared"):
        bj.unpack_params(fast)


def test_metadata_of_an_nnx_state_survives_the_round():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0), kernel_metadata={"note": "mine"})
    state = nnx.state(model, nnx.Param)
    packed, _ = bj.pack_params(state)
    for some in (packed, bj.prepare(packed), bj.unpack_params(packed)):
        assert type(some) is type(state)
        assert some["kernel"].note == "mine"
    assert_same_bits(
        bj.unpack_params(packed, dequantize=True)["kernel"].get_value(),
        bj.fake_quantize_params(state)["kernel"].get_value(),
    )
    again = bj.combine(*bj.partition(packed))
    assert type(again) is type(state)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    with pytest.raises(TypeError, match=r"^pack_params: kernel is packed already"):
        bj.pack_params(packed)
