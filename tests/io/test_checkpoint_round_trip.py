"""Checkpoints through Orbax come back typed, to the bit."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from checkpoints import (
    KERNELS,
    OPTIMIZERS,
    FormatError,
    about_of,
    gaussian,
    manager_of,
    packed_tree,
    restore,
    round_trip,
    save,
    small,
)
from flax import nnx
from io_files import assert_same
from jax.sharding import SingleDeviceSharding

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion  # optax's adamw raises under the strict one


@cases("asynchronous", [True, False], core=[True])
def test_packed_trees_come_back_typed(folder, asynchronous):
    tree = packed_tree()
    with manager_of(folder, enable_async_checkpointing=asynchronous) as manager:
        save(manager, 1, params=tree)
        manager.wait_until_finished()
        about = about_of(manager, 1)["params"]
        target = bj.io.abstract(about)
        assert {type(leaf) for leaf in jax.tree.leaves(target)} == {jax.ShapeDtypeStruct}
        got = bj.io.check(restore(manager, 1, params=target)["params"], about)
    assert_same(got, tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    kinds = {name: type(got[name]["kernel"]) for name in KERNELS}
    assert kinds == {name: bj.PackedTernary for name in KERNELS} | {"head": bj.PackedInt8}
    assert got["dense"]["kernel"].config == bj.B158
    assert got["half"]["kernel"].dtype == jnp.bfloat16


@cases("name", list(OPTIMIZERS), core=["grokfast_ma", "watch_trits"])
def test_optimizer_states_come_back_typed(folder, name):
    tx = OPTIMIZERS[name]()
    params = {"layer": {"kernel": gaussian((8, 4)), "bias": jnp.zeros(4)}}
    state = tx.init(params)
    for seed in range(3):
        grads = jax.tree.map(lambda p, s=seed: gaussian(p.shape, s), params)
        _, state = jax.jit(tx.update)(grads, state, params)
    assert_same(round_trip(folder, state, like=jax.eval_shape(tx.init, params)), state)


def test_frozen_dict_comes_back_as_dicts_or_as_itself(folder):
    tree = flax.core.freeze(small())
    assert_same(round_trip(folder / "a", tree), small())
    assert_same(round_trip(folder / "b", tree, like=tree), tree)


def test_boxes_come_back_closed_or_are_opened_before(folder):
    boxed = {"kernel": nn.Partitioned(bj.pack(gaussian((8, 4))), names=("in", "out"))}
    assert_same(round_trip(folder / "a", boxed, like=jax.eval_shape(lambda: boxed)), boxed)
    plain = nn.unbox(boxed)
    assert bj.io.describe(plain) == bj.io.describe(boxed)
    assert_same(round_trip(folder / "b", plain), plain)
    # Orbax keeps the box's field as a name: what was saved closed is not restored open.
    with pytest.raises(ValueError, match="do not match"):
        round_trip(folder / "c", boxed)


def test_nnx_state_comes_back_as_itself_or_as_dicts(folder):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    model.kernel = nnx.Param(bj.pack(model.kernel.get_value()))
    state = nnx.state(model)
    got = round_trip(folder / "a", state, like=nnx.eval_shape(lambda: state))
    assert isinstance(got, nnx.State)
    assert_same(got, state)
    nnx.update(model, got)
    pure = nnx.to_pure_dict(state)
    assert_same(round_trip(folder / "b", pure), pure)


@pytest.mark.full
def test_an_nnx_optimizer_comes_back_as_its_state(folder):
    def fresh(seed):
        model = bj.nnx.BitLinear(8, 4, rngs=nnx.Rngs(seed))
        return nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    optimizer, model = fresh(0), bj.nnx.BitLinear(8, 4, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: m(jnp.ones((2, 8))).sum())(model)
    optimizer.update(model, grads)
    state, other = nnx.state(optimizer), fresh(1)
    got = round_trip(folder, state, like=nnx.state(other))
    assert_same(got, state)
    nnx.update(other, got)
    assert other.step.get_value() == 1


def test_64_bits_are_not_cut_to_32(folder):
    tree = {"step": np.int64([2**40 + 1]), "x": np.float64(0.1).reshape(1, 1)}
    got = round_trip(folder, tree)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(got))
    assert_same(got, tree)
    # Orbax alone cuts them.
    place = SingleDeviceSharding(jax.devices()[0])
    target = {
        "step": jax.ShapeDtypeStruct((1,), np.int64, sharding=place),
        "x": jax.ShapeDtypeStruct((1, 1), np.float64, sharding=place),
    }
    with manager_of(folder) as manager:
        cut = restore(manager, 3, tree=target)["tree"]
    assert int(cut["step"][0]) == 1
    with pytest.raises(FormatError, match="step has the dtype int32, and was saved with int64"):
        bj.io.check(cut, bj.io.describe(tree))


def test_a_tree_that_mappings_do_not_make_needs_a_template():
    about = bj.io.describe((jnp.ones(2), None))
    with pytest.raises(ValueError, match=r"tuples, lists, None.*Pass like="):
        bj.io.abstract(about)
    for tree in ({"a": jnp.ones(1), "b": None}, {"a": [jnp.ones(1)]}, {"a": optax.EmptyState()}):
        tree["x"] = jnp.ones(3)
        with pytest.raises(ValueError, match="Pass like="):
            bj.io.abstract(bj.io.describe(tree))
        like = jax.eval_shape(lambda tree=tree: tree)
        got = bj.io.abstract(bj.io.describe(tree), like=like)
        assert jax.tree.structure(got) == jax.tree.structure(tree)


def test_empty_mappings_are_kept(folder):
    tree = {"a": {}, "b": {"c": {}, "d": jnp.ones(2)}}
    assert_same(round_trip(folder, tree), tree)
