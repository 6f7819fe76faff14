"""Packed trees given to other libraries: stored with Flax, read as arrays, adapters in files."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion

W = jax.random.normal(jax.random.key(0), (16, 8))
X = jax.random.normal(jax.random.key(1), (2, 16))
CONFIGS = {"ternary": bj.PHASE4, "int8": bj.Int8Config()}


def params(config=bj.B158, w=W):
    return bj.pack_params({"layer": {"kernel": w, "bias": jnp.ones(8)}}, config)[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_flax_serialization_restores_every_bit(config):
    packed = params(CONFIGS[config])
    raw = flax.serialization.to_bytes(packed)
    blank = jax.tree.map(jnp.zeros_like, packed)
    again = flax.serialization.from_bytes(blank, raw)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    jax.tree.map(oracles.assert_same_bits, again, packed)
    state = flax.serialization.to_state_dict(packed)
    assert sorted(state["layer"]["kernel"]) == ["codes", "scale", "static"]
    again = flax.serialization.from_state_dict(blank, state)
    jax.tree.map(oracles.assert_same_bits, again, packed)


def test_flax_serialization_refuses_another_kernel():
    state = flax.serialization.to_state_dict(params())
    for target in (params(bj.PHASE4), params(w=W[:15]), params(bj.Int8Config())):
        with pytest.raises(ValueError, match=r"from_state_dict: the Packed.* was saved as"):
            flax.serialization.from_state_dict(target, state)
    state["layer"]["kernel"]["scale"] = np.ones((1, 1), np.float16)
    with pytest.raises(ValueError, match="has a float16 scale; it must be float32"):
        flax.serialization.from_state_dict(params(), state)
    # A layout that only one implementation reads is restored into the same layout alone.
    fast = bj.prepare(params(), "xla")
    state = flax.serialization.to_state_dict(fast)
    restored = flax.serialization.from_state_dict(fast, state)
    jax.tree.map(oracles.assert_same_bits, restored, fast)
    with pytest.raises(ValueError, match="was saved as"):
        flax.serialization.from_state_dict(bj.prepare(params(), "cpu"), state)


@pytest.mark.parametrize("alpha", [None, 3.3, 16])
def test_adapters_keep_their_alpha_in_files(alpha, path):
    packed = params()
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2), alpha=alpha)
    bj.io.save(path, adapters.to_dict())
    again = bj.lora.Adapters.from_dict(bj.io.load(path))
    assert again.alpha == adapters.alpha
    jax.tree.map(oracles.assert_same_bits, again.kernels, adapters.kernels)
    y, z = (bj.lora.attach(packed, a)["layer"]["kernel"].scale for a in (adapters, again))
    assert y == z
    raw = flax.serialization.to_bytes(adapters)
    other = bj.lora.init(packed, 2, key=jax.random.key(3))
    again = flax.serialization.from_bytes(other, raw)
    assert again.alpha == adapters.alpha
    jax.tree.map(oracles.assert_same_bits, again.kernels, adapters.kernels)


def test_adapters_are_named_where_they_are_not_a_tree(path):
    adapters = bj.lora.init(params(), 2, key=jax.random.key(2))
    for tree in (adapters, {"lora": adapters}):
        with pytest.raises(TypeError, match=r"got (a )?Adapters\..*to_dict\(\)"):
            bj.io.save(path, tree)
    for tree, said in (
        ({"kernels": {}}, "must have the keys kernels and alpha, got"),
        ([], "must have the keys kernels and alpha, got list"),
        ({"kernels": {}, "alpha": 0.0}, "`alpha` must be a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=said):
            bj.lora.Adapters.from_dict(tree)


NO_ARRAY = r"^PackedTernary: a packed kernel is not an array\. bj\.matmul\(x, kernel\)"
AS_ARRAY = {
    "x @ kernel": lambda k: X @ k,
    "kernel @ x": lambda k: k @ X.T,
    "times": lambda k: k * 2.0,
    "array times": lambda k: X[0] + k,
    "index": lambda k: k[0],
    "numpy": lambda k: np.asarray(k),
    "nnx.Linear": lambda k: linear(k)(X),
}


def linear(kernel):
    layer = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    layer.kernel.set_value(kernel)
    return layer


@pytest.mark.parametrize("name", AS_ARRAY)
def test_a_packed_kernel_used_as_an_array_says_what_it_is(name):
    with pytest.raises(TypeError, match=NO_ARRAY):
        AS_ARRAY[name](bj.pack(W))


def test_it_has_no_transpose():
    kernel = bj.pack(W)
    assert not hasattr(kernel, "T")
    with pytest.raises(AttributeError, match=NO_ARRAY):
        kernel.T  # noqa: B018


@pytest.mark.parametrize("config", CONFIGS)
def test_packed_params_in_a_float_linen_layer(config):
    packed = params(CONFIGS[config])["layer"]
    with pytest.raises(TypeError, match=r"^flax: the parameter 'kernel' is packed.*ternarize"):
        nn.Dense(8).apply({"params": packed}, X)
    floats = bj.unpack_params(packed, dequantize=True)
    assert nn.Dense(8).apply({"params": floats}, X).shape == (2, 8)


def test_statistics_are_read_from_every_form_of_an_optimizer_state():
    tx = optax.chain(bj.optim.watch_trits(), optax.adamw(1e-3))
    optimizer = nnx.Optimizer(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    wanted = bj.optim.read_trits(optimizer.opt_state)
    assert sorted(wanted) == ["kernel/near_threshold", "kernel/scale", "kernel/zeros"]
    state = nnx.state(optimizer)
    assert bj.optim.read_trits(state) == wanted
    assert bj.optim.read_trits(nnx.to_pure_dict(state)) == wanted
    plain = tx.init({"kernel": W})
    stored = flax.serialization.to_state_dict(plain)
    assert bj.optim.read_trits(stored) == bj.optim.read_trits(plain)


def test_a_prepared_kernel_has_the_shape_of_the_float_one():
    w = jax.random.normal(jax.random.key(0), (3, 8, 4, 16))
    cases = [
        bj.pack(w, contracting_axes=(-3, -2)),  # attention's output, stacked
        bj.pack(w, contracting_axes=(0, 1, 2)),  # a convolution
        bj.pack(w[0], contracting_axes=(0,)),  # attention's query
        bj.pack(w[0], contracting_axes=-1),
        bj.pack(w, contracting_axes=-1, batch_axes=(0, 1)),
        bj.pack(w[0, :, 0], bj.Int8Config(), contracting_axes=-1),  # an embedding
    ]
    for packed, implementation in [
        *((case, "xla") for case in cases[:-1]),
        *((case, "cpu") for case in cases),
    ]:
        prepared = bj.prepare(packed, implementation)
        assert (prepared.shape, prepared.axes) == (packed.shape, packed.axes)
        assert (prepared.ndim, prepared.size) == (packed.ndim, packed.size)
