"""BitDense: nn.Dense's fields and parameters, and one set of bits from float and packed kernels."""

import dataclasses
import os
import subprocess
import sys

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax.linen import BitDense

K, N = 24, 10


def inputs(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def init(layer, x, seed=1):
    return layer.init(jax.random.key(seed), x)["params"]


def test_fields_are_those_of_dense():
    theirs = {f.name: f.default for f in dataclasses.fields(nn.Dense)}
    ours = {f.name: f.default for f in dataclasses.fields(BitDense)}
    added = {k: ours[k] for k in ours if k not in theirs}
    assert added == {
        "weights": bj.B158,
        "activations": bj.ActivationConfig(),
        "norm": False,
        "backward_dtype": None,
    }
    assert {k: ours[k] for k in theirs if k != "kernel_init"} == {
        k: v for k, v in theirs.items() if k != "kernel_init"
    }


def test_float_checkpoints_drop_in():
    x = inputs(3, K)
    params = init(nn.Dense(N), x)
    chex.assert_trees_all_equal(params, init(BitDense(N), x))
    y = BitDense(N).apply({"params": params}, x)
    wanted = bj.ternary_dot(x, params["kernel"]) + params["bias"][None]
    assert_same_bits(y, wanted)


CASES = {
    "plain": ({}, jnp.float32),
    "no bias": (dict(use_bias=False), jnp.float32),
    "norm": (dict(norm=True), jnp.float32),
    "norm, bf16 inputs": (dict(norm=True, dtype=jnp.bfloat16), jnp.bfloat16),
    "dtype bf16": (dict(dtype=jnp.bfloat16), jnp.float32),
    "params bf16": (dict(param_dtype=jnp.bfloat16), jnp.bfloat16),
    "per channel": (dict(weights=bj.PHASE4), jnp.float32),
    "groups": (dict(weights=bj.TernaryConfig(granularity=8)), jnp.float32),
    "odd groups": (dict(weights=bj.TernaryConfig(granularity=3)), jnp.float32),
    "4-bit activations": (dict(activations=bj.ActivationConfig(bits=4)), jnp.float32),
}


def ready(fields, x):
    """A layer with a bias that is not zero, its float, packed and prepared params."""
    layer = BitDense(N, **fields)
    params = init(layer, x)
    if "bias" in params:
        params["bias"] = inputs(N, seed=5).astype(params["bias"].dtype)
    packed, _ = bj.pack_params(params, layer.weights)
    return layer, params, packed, bj.prepare(packed)


@pytest.mark.parametrize("name", CASES)
def test_one_set_of_bits(name):
    fields, dtype = CASES[name]
    x = inputs(5, K, dtype=dtype)
    layer, *forms = ready(fields, x)

    def apply(p, x):
        return layer.apply({"params": p}, x)

    wanted = jax.jit(apply)(forms[0], x)
    assert wanted.dtype == (layer.dtype or layer.param_dtype)
    for params in forms:
        assert_same_bits(apply(params, x), wanted)
        assert_same_bits(jax.jit(apply)(params, x), wanted)
        assert_same_bits(jax.jit(apply)(params, x[2:3]), wanted[2:3])
        assert_same_bits(apply(params, x[2]), wanted[2])
        assert_same_bits(jax.vmap(apply, in_axes=(None, 0))(params, x), wanted)
        assert_same_bits(apply(params, x.reshape(5, 1, K)), wanted.reshape(5, 1, N))
    value, _ = jax.value_and_grad(lambda p: apply(p, x).astype(jnp.float32).sum())(forms[0])
    assert np.isfinite(value)


def test_weight_only_agrees_within_a_tolerance():
    x = inputs(5, K)
    layer, params, packed, fast = ready(dict(activations=None), x)
    exact = np.asarray(x, np.float64) @ np.asarray(packed["kernel"].dequantize(), np.float64)
    exact = exact + np.asarray(params["bias"], np.float64)
    for form in (params, packed, fast):
        np.testing.assert_allclose(layer.apply({"params": form}, x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.standard_promotion
def test_integer_inputs_are_taken_as_dense_takes_them():
    x = jnp.arange(2 * K).reshape(2, K) % 5
    layer, params, packed, _ = ready({}, x.astype(jnp.float32))
    wanted = layer.apply({"params": params}, x.astype(jnp.float32))
    assert_same_bits(layer.apply({"params": params}, x), wanted)
    assert_same_bits(layer.apply({"params": packed}, x), wanted)


def test_norm_is_rms_norm_before_quantising():
    x = 7.0 * inputs(4, K)
    layer, params, *_ = ready(dict(norm=True), x)
    wide = np.asarray(x, np.float64)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    plain = BitDense(N).apply({"params": params}, jnp.asarray(normal, jnp.float32))
    np.testing.assert_allclose(layer.apply({"params": params}, x), plain, rtol=1e-5, atol=1e-5)

    def loss(x, norm):
        return (nn_norm(x) if norm is None else bj._quantize.straight_through.rms_normalize(x)).dot(
            inputs(K, seed=3)
        )

    def nn_norm(x):
        return x / jnp.sqrt(jnp.mean(x * x) + 1e-5)

    ours, theirs = (jax.grad(loss)(x[0], norm) for norm in (True, None))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


class Net(nn.Module):
    """ReLU, a residual and biases between ternary layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(BitDense(16)(x))
        x = x + BitDense(16, norm=True)(x)
        return BitDense(4)(nn.relu(x))


@pytest.mark.standard_promotion
def test_a_net_trains_and_serves_the_same_bits():
    x, target = inputs(32, K), inputs(32, 4, seed=2)
    net = Net()
    state = TrainState.create(apply_fn=net.apply, params=init(net, x), tx=optax.adamw(1e-2))

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn({"params": params}, x)
            return jnp.square(logits - target).mean(), logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), value, logits, grads

    _, first, _, grads = step(state)
    assert bj.analysis.gradient_flow(grads).ok
    for _ in range(20):
        params = state.params
        state, value, logits, _ = step(state)
    assert value < 0.8 * first
    packed, _ = bj.pack_params(params)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(net.apply)({"params": form}, x), logits)


class Stack(nn.Module):
    """Three layers under nn.scan, rematerialised."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + BitDense(K)(nn.relu(x)), None


def leading(path, leaf):
    return {"contracting_axes": 1, "batch_axes": 0}


def test_scan_and_remat():
    x = inputs(4, K)
    params = init(Stack(), x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(Stack().apply)({"params": params}, x)
    for form in (params, packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(Stack().apply)({"params": form}, x), wanted)
    grads = jax.grad(lambda p: Stack().apply({"params": p}, x).sum())(params)
    assert bj.analysis.gradient_flow(grads).ok


def test_vmap_of_a_module():
    experts = nn.vmap(BitDense, variable_axes={"params": 0}, split_rngs={"params": True})(N)
    x = inputs(3, 4, K)
    params = init(experts, x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = experts.apply({"params": params}, x)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(experts.apply({"params": form}, x), wanted)


class Shared(nn.Module):
    def setup(self):
        self.layer = BitDense(K)

    def __call__(self, x):
        return self.layer(nn.relu(self.layer(x)))


def test_sharing_bind_frozen_dict_and_boxes():
    x = inputs(4, K)
    params = init(Shared(), x)
    assert list(params) == ["layer"]
    packed, _ = bj.pack_params(params)
    wanted = Shared().apply({"params": params}, x)
    assert_same_bits(Shared().apply({"params": packed}, x), wanted)
    assert_same_bits(Shared().bind({"params": packed})(x), wanted)
    assert_same_bits(Shared().apply({"params": flax.core.freeze(packed)}, x), wanted)
    boxed = BitDense(N, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    params = init(boxed, x)
    assert isinstance(params["kernel"], nn.Partitioned)
    packed, _ = bj.pack_params(params)
    wanted = boxed.apply({"params": params}, x)
    assert_same_bits(boxed.apply({"params": packed}, x), wanted)


def test_strength_is_traced_once():
    x = inputs(4, K)
    layer, params, *_ = ready({}, x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def apply(strength):
        return layer.apply({"params": params}, x, strength=strength)

    dense = nn.Dense(N).apply({"params": params}, x)
    np.testing.assert_allclose(apply(jnp.float32(0.0)), dense, rtol=1e-5, atol=1e-5)
    assert_same_bits(apply(jnp.float32(1.0)), layer.apply({"params": params}, x))
    between = np.asarray(apply(jnp.float32(0.5)))
    assert np.isfinite(between).all()
    assert not np.array_equal(between, np.asarray(dense))


def test_gradients_reach_inputs_through_packed_kernels():
    x = inputs(4, K)
    layer, params, packed, fast = ready({}, x)
    wanted = jax.grad(lambda x: layer.apply({"params": params}, x).sum())(x)
    for form in (packed, fast):
        got = jax.grad(lambda x, p=form: layer.apply({"params": p}, x).sum())(x)
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_what_is_refused():
    x = inputs(4, K)
    layer, params, packed, _ = ready({}, x)
    with pytest.raises(ValueError, match=r"at kernel stands for shape \(24, 10\).*\(24, 11\)"):
        BitDense(11, use_bias=False).apply({"params": packed}, x)
    with pytest.raises(ValueError, match=r"stands for shape \(24, 10\).*\(20, 10\)"):
        layer.apply({"params": packed}, x[:, :20])
    with pytest.raises(ValueError, match=r"packed with TernaryConfig.*set weights="):
        BitDense(N, weights=bj.PHASE4).apply({"params": packed}, x)
    with pytest.raises(ValueError, match="`dot_general` cannot be used"):
        BitDense(N, dot_general=jax.lax.dot_general).apply({"params": params}, x)
    complex_x = x.astype(jnp.complex64)
    with pytest.raises(TypeError, match="complex64"), jax.numpy_dtype_promotion("standard"):
        layer.apply({"params": params}, complex_x)


def test_fields_stand_in_the_order_of_dense():
    theirs = [f.name for f in dataclasses.fields(nn.Dense) if f.name not in ("parent", "name")]
    ours = [f.name for f in dataclasses.fields(BitDense) if f.name not in ("parent", "name")]
    added = ["weights", "activations", "norm", "backward_dtype"]
    assert ours == theirs + added  # so positional arguments mean the same
    assert issubclass(BitDense, nn.Dense)
    layer = BitDense(N, False)
    assert (layer.features, layer.use_bias) == (N, False)


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_bias=False),
        dict(param_dtype=jnp.bfloat16),
        dict(kernel_init=nn.initializers.normal(0.3), bias_init=nn.initializers.normal(0.1)),
    ],
    ids=["no bias", "bf16", "initializers"],
)
def test_init_has_the_bits_of_dense(fields):
    x = inputs(1, K, dtype=fields.get("param_dtype", jnp.float32))
    ours, theirs = (init(layer, x) for layer in (BitDense(N, **fields), nn.Dense(N, **fields)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for name, leaf in theirs.items():
        assert_same_bits(ours[name], leaf)


class FloatNet(nn.Module):
    """``Net`` before anyone made it ternary: the same names, in the same order."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="BitDense_0")(x))
        x = x + nn.Dense(16, name="BitDense_1")(x)
        return nn.Dense(4, name="BitDense_2")(nn.relu(x))


def test_a_float_net_drops_in_whole():
    x = inputs(2, K)
    theirs, ours = (jax.jit(net.init)(jax.random.key(1), x) for net in (FloatNet(), Net()))
    chex.assert_trees_all_equal_shapes_and_dtypes(theirs, ours)
    chex.assert_trees_all_equal(theirs, ours)
    packed, report = bj.pack_params(theirs)
    paths = [f"params/BitDense_{i}/kernel" for i in range(3)]
    assert [layer.path for layer in report.rows] == paths
    assert_same_bits(jax.jit(Net().apply)(packed, x), jax.jit(Net().apply)(theirs, x))


@pytest.mark.parametrize(
    "config", [bj.B158, bj.PHASE4, bj.TernaryConfig(granularity=8)], ids=["b158", "channel", "8"]
)
def test_outputs_and_gradients_are_those_of_the_equations(config):
    x, g = inputs(3, 2, K), inputs(3, 2, N, seed=4)
    layer, params, packed, _ = ready(dict(weights=config), x)

    def apply(params, x):
        return layer.apply({"params": params}, x)

    y, pull = jax.vjp(apply, params, x)
    kernel, bias = params["kernel"], np.asarray(params["bias"])
    wanted = oracles.dot32(x, kernel, config, layer.activations) + bias
    assert_same_bits(y, wanted)
    grads, dx = pull(g)
    dx_wanted, dw_wanted = oracles.gradients64(x, kernel, g, config, layer.activations)
    np.testing.assert_allclose(dx, dx_wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["kernel"], dw_wanted, rtol=1e-5, atol=1e-5)
    db_wanted = np.asarray(g, np.float64).sum((0, 1))
    np.testing.assert_allclose(grads["bias"], db_wanted, rtol=1e-5, atol=1e-5)
    assert_same_bits(jax.vjp(lambda x: apply(packed, x), x)[1](g)[0], dx)


def test_backward_dtype_rounds_the_gradients_only():
    x = inputs(4, K)
    layer, params, *_ = ready({}, x)
    low = BitDense(N, backward_dtype=jnp.bfloat16)

    def grads(layer):
        return jax.value_and_grad(
            lambda p: jnp.square(layer.apply({"params": p}, x)).sum(), allow_int=False
        )(params)

    (y, exact), (y_low, rough) = grads(layer), grads(low)
    assert_same_bits(y_low, y)
    assert not np.array_equal(rough["kernel"], exact["kernel"])
    largest = float(abs(exact["kernel"]).max())
    np.testing.assert_allclose(rough["kernel"], exact["kernel"], atol=0.02 * largest)
    assert_same_bits(rough["bias"], exact["bias"])


def test_packed_kernels_are_ternary_whatever_the_strength():
    x = inputs(4, K)
    layer, params, packed, fast = ready({}, x)
    wanted = layer.apply({"params": params}, x)
    for form in (packed, fast):
        for strength in (0.0, jnp.float32(0.5)):
            assert_same_bits(layer.apply({"params": form}, x, strength=strength), wanted)


def test_a_schedule_of_strength_does_not_retrace_a_training_step():
    x, target = inputs(8, K), inputs(8, N, seed=2)
    layer, params, *_ = ready({}, x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, strength):
        def loss(p):
            return jnp.square(layer.apply({"params": p}, x, strength=strength) - target).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value, grads

    for strength in (0.0, 0.25, 0.5, 1.0):
        params, value, grads = step(params, jnp.float32(strength))
        assert np.isfinite(value)
        assert bj.analysis.gradient_flow(grads).ok


def test_norm_is_close_to_float64_and_keeps_its_bits_for_any_batch():
    """Zero tokens, large and tiny ones among them."""
    x = np.array(inputs(6, K))
    x[1], x[2], x[3] = 0.0, x[2] * 1e4, x[3] * 1e-4
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    layer, params, packed, fast = ready(dict(norm=True), jnp.asarray(x))
    # The codes are those of the normalised token, so y is within one code step a feature.
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    near = oracles.dot64(exact.astype(np.float32), kernel, bj.B158, layer.activations) + bias
    step = np.maximum(abs(exact).max(-1, keepdims=True), 1e-5) / 127
    y = layer.apply({"params": params}, jnp.asarray(x))
    off = abs(np.asarray(y) - near)
    assert (off <= step * np.asarray(packed["kernel"].scale) + 1e-5).all()
    assert (off.max(-1) < 1e-4).sum() >= 4  # most tokens flip no code
    for rows in (slice(0, 1), slice(2, 3), slice(1, 4)):
        for form in (params, packed, fast):
            some = jax.jit(layer.apply)({"params": form}, jnp.asarray(x[rows]))
            assert_same_bits(some, y[rows])


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.bool_], ids=lambda d: d.__name__)
def test_small_integers_and_booleans_are_inputs(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, K)), dtype)
    layer, params, packed, _ = ready({}, x.astype(jnp.float32))
    wanted = layer.apply({"params": params}, x.astype(jnp.float32))
    assert wanted.dtype == nn.Dense(N).apply({"params": params}, x).dtype
    assert_same_bits(layer.apply({"params": params}, x), wanted)
    assert_same_bits(layer.apply({"params": packed}, x), wanted)


def test_no_rows():
    layer, params, packed, fast = ready({}, inputs(2, K))
    for form in (params, packed, fast):
        assert layer.apply({"params": form}, jnp.zeros((0, K))).shape == (0, N)


class Loop(nn.Module):
    """The layers of ``Stack`` one by one."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Block(name=f"block_{i}")(x, None)
        return x


def test_a_scan_is_the_loop_over_its_slices():
    x = inputs(4, K)
    params = init(Stack(), x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(Stack().apply)({"params": params}, x)
    for form in (params, packed):
        # is_leaf stays out: a slice of a packed leaf is a packed leaf.
        slices = {
            f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], form["blocks"]) for i in range(3)
        }
        assert_same_bits(jax.jit(Loop().apply)({"params": slices}, x), wanted)


def test_boxes_of_a_scan_are_opened():
    """nn.scan adds an axis name to each box, around packed and prepared kernels too."""

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            start = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return x + BitDense(K, kernel_init=start)(x), None

    class Boxes(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Boxed,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return layers(name="blocks")(x, None)[0]

    x = inputs(4, K)
    params = init(Boxes(), x)
    box = params["blocks"]["BitDense_0"]["kernel"]
    assert box.names == ("layers", "in", "out")
    packed, _ = bj.pack_params(params, axes=leading)
    assert packed["blocks"]["BitDense_0"]["kernel"].names == box.names
    wanted = jax.jit(Boxes().apply)({"params": params}, x)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(Boxes().apply)({"params": form}, x), wanted)


def test_module_tools_see_packed_kernels():
    x = inputs(2, K)
    params = jax.jit(Net().init)(jax.random.key(1), x)["params"]
    packed, _ = bj.pack_params(params)
    wanted = Net().apply({"params": packed}, x)
    y, state = Net().apply(
        {"params": packed}, x, capture_intermediates=True, mutable=["intermediates"]
    )
    assert_same_bits(y, wanted)
    assert_same_bits(state["intermediates"]["__call__"][0], wanted)
    y, state = Net().apply({"params": packed}, x, mutable=["params"])
    chex.assert_trees_all_equal(state["params"], packed)
    first = BitDense(16).bind({"params": packed["BitDense_0"]})
    assert isinstance(first.variables["params"]["kernel"], bj.PackedTernary)
    assert_same_bits(
        nn.jit(Net)().apply({"params": packed}, x), jax.jit(Net().apply)({"params": packed}, x)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dot_general", jax.lax.dot_general),
        ("dot_general_cls", object),
        ("promote_dtype", lambda *args, **_: args),
    ],
)
def test_fields_without_a_use_are_refused_at_init_and_at_apply(name, value):
    x = inputs(2, K)
    packed = ready({}, x)[2]
    with pytest.raises(ValueError, match=rf"^BitDense: `{name}` cannot be used"):
        init(BitDense(N, **{name: value}), x)
    with pytest.raises(ValueError, match=rf"^BitDense: `{name}` cannot be used"):
        BitDense(N, **{name: value}).apply({"params": packed}, x)


def test_refusals_name_the_kernel_by_its_path():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Net(name="net")(x)

    x = inputs(2, K)
    params = jax.jit(Outer().init)(jax.random.key(1), x)["params"]
    packed, _ = bj.pack_params(params)
    other, _ = bj.pack_params(params, bj.PHASE4)
    mixed = {"net": {**packed["net"], "BitDense_1": other["net"]["BitDense_1"]}}
    with pytest.raises(ValueError, match=r"^BitDense: the kernel at net/BitDense_1/kernel was pa"):
        Outer().apply({"params": mixed}, x)
    with pytest.raises(ValueError, match=r"^BitDense: the kernel at net/BitDense_1/kernel was pa"):
        Outer().apply({"params": bj.prepare(mixed)}, x)
    swapped = {"net": {**packed["net"], "BitDense_2": packed["net"]["BitDense_1"]}}
    with pytest.raises(ValueError, match=r"at net/BitDense_2/kernel stands for shape \(16, 16\)"):
        Outer().apply({"params": swapped}, x)


def test_a_square_kernel_packed_along_its_other_axis_is_refused():
    """Its shape is right; the product would be with the transposed kernel."""
    x, w = inputs(2, K), inputs(K, K, seed=1)
    layer = BitDense(K, use_bias=False)
    right, wrong = bj.pack(w), bj.pack(w, contracting_axes=1)
    layer.apply({"params": {"kernel": right}}, x)
    with pytest.raises(ValueError, match=r"^BitDense: the packed kernel at kernel"):
        layer.apply({"params": {"kernel": wrong}}, x)


SHARDED_BOXES = """
import jax, jax.numpy as jnp, numpy as np, bitnet_jax as bj
from flax import linen as nn
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)
plain = bj.linen.BitDense(8)
wanted = np.asarray(plain.apply(plain.init(jax.random.key(0), x), x))
for names in (("model", None), (None, "model")):
    start = nn.with_partitioning(nn.linear.default_kernel_init, names)
    layer = bj.linen.BitDense(8, kernel_init=start)
    with jax.set_mesh(mesh):
        params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
        params = jax.device_put(params, nn.get_sharding(params, mesh))
        assert not params["kernel"].value.sharding.is_fully_replicated
        packed, _ = bj.pack_params(params)
        for form in (params, packed, bj.prepare(packed)):
            for apply in (jax.jit(layer.apply), layer.apply):
                try:
                    np.testing.assert_array_equal(apply({"params": form}, x), wanted)
                except Exception as error:
                    raise AssertionError((names, type(form["kernel"].value), apply)) from error
"""


def test_partitioned_kernels_run_on_a_mesh_in_jit_and_eager():
    """Two devices need a process of their own; the float kernel runs in all of these."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED_BOXES],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
