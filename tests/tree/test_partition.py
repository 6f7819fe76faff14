"""`partition` and `combine`, and float leaves that train around packed kernels."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from trees import CONTAINERS, array, tree

import bitnet_jax as bj


@pytest.mark.standard_promotion
def test_float_leaves_train_around_packed_kernels():
    packed, _ = bj.pack_params(tree())
    trainable, frozen = bj.partition(packed)
    assert trainable["head"]["kernel"] is None
    assert frozen["embed"]["embedding"] is None
    chex.assert_trees_all_equal(bj.combine(trainable, frozen), packed)
    tx = optax.adamw(1e-2)
    state = tx.init(trainable)

    @jax.jit
    def loss(trainable):
        params = bj.combine(trainable, frozen)
        x = params["embed"]["embedding"]
        y = bj.matmul(x, params["body"]["dense"]["kernel"]) + params["body"]["dense"]["bias"][None]
        return jnp.square(bj.matmul(nn.relu(y), params["head"]["kernel"]) - 1.0).mean()

    @jax.jit
    def step(trainable, state):
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    first = loss(trainable)
    for _ in range(5):
        trainable, state = step(trainable, state)
    assert loss(trainable) < first


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("prepare", [False, True])
def test_partition_and_combine_are_inverse(name, prepare):
    packed, _ = bj.pack_params(tree())
    whole = CONTAINERS[name](bj.prepare(packed) if prepare else packed)
    trainable, frozen = bj.partition(whole)
    assert type(trainable) is type(frozen) is type(whole)
    # No leaf is lost or doubled, and each is on the side it belongs to.
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trainable))
    sizes = [len(jax.tree.leaves(part)) for part in (trainable, frozen, whole)]
    assert sizes[0] + sizes[1] == sizes[2]
    assert min(sizes) > 0
    again = bj.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        assert ours is theirs
    jitted = jax.jit(bj.combine)(trainable, frozen)
    chex.assert_trees_all_equal(jitted, whole)


def test_what_has_no_gradient_is_frozen():
    params = {
        "float": jnp.ones(2),
        "half": jnp.ones(2, jnp.bfloat16),
        "complex": jnp.ones(2, jnp.complex64),
        "python": 1.0,
        "int": jnp.ones(2, jnp.int32),
        "bool": np.array(True),
        "count": 3,
        "key": jax.random.key(0),
        "packed": bj.pack(array(8, 4)),
    }
    trainable, frozen = bj.partition(params)
    trains = {name for name, leaf in trainable.items() if leaf is not None}
    assert trains == {"float", "half", "complex", "python"}
    assert {name for name, leaf in frozen.items() if leaf is not None} == set(params) - trains


def test_partition_and_combine_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^partition: `params` holds no arrays"):
        bj.partition({})
    trainable, frozen = bj.partition(bj.pack_params(tree())[0])
    del frozen["head"]
    with pytest.raises(ValueError, match=r"pytree|key mismatch"):  # jax 0.10.0 names the keys
        bj.combine(trainable, frozen)


def test_grad_of_a_packed_tree_names_the_way_and_the_way_works():
    packed, _ = bj.pack_params(tree())

    def loss(params):
        x = params["embed"]["embedding"]
        return bj.matmul(x, params["body"]["dense"]["kernel"]).sum()

    with pytest.raises(TypeError, match=r"^jax\.grad: .*bj\.partition\(params\)"):
        jax.grad(loss)(packed)
    trainable, frozen = bj.partition(packed)
    grads = jax.jit(jax.grad(lambda t: loss(bj.combine(t, frozen))))(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    w_q = np.asarray(packed["body"]["dense"]["kernel"].dequantize(), np.float64)
    wanted = np.ones((10, 8)) @ w_q.T
    np.testing.assert_allclose(grads["embed"]["embedding"], wanted, rtol=1e-5, atol=1e-6)
