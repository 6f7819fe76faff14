"""Checkpoints through Orbax: typed, resumed to the bit, refused where they are not what was saved.

What Orbax does on its own is asserted too: a test of a refusal first shows that Orbax
restores the wrong thing without a word, so that a later Orbax which refuses is noticed.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import flax.core
import flax.linen as nn
import io_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax_saver
import pytest
from flax import nnx
from io_files import assert_same
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax.io import _description

pytestmark = pytest.mark.standard_promotion  # optax's adamw raises under the strict one
FormatError = bitnet_jax.io.FormatError
Struct = jax.ShapeDtypeStruct
KERNELS = io_files.KERNELS | {"head": ((10, 6), bj.Int8Config(), {})}


def gaussian(shape, seed=0, dtype=np.float32):
    return jnp.asarray(io_files.gaussian(shape, seed, dtype))


def packed_tree():
    """Every kind of leaf that a served model has."""
    kernels = {k: {"kernel": bj.pack(gaussian(s), c, **a)} for k, (s, c, a) in KERNELS.items()}
    kernels["half"] = {"kernel": bj.pack(gaussian((8, 4), dtype=jnp.bfloat16))}
    norms = {"scale": jnp.float32([jnp.nan, -0.0, 1e-45]), "step": jnp.int32(7)}
    return {**kernels, "norm": norms, "layers": {10: jnp.ones(2, jnp.bfloat16), 2: jnp.ones(1)}}


def small():
    return {
        "dense": {"kernel": bj.pack(gaussian((23, 10))), "bias": gaussian((10,))},
        "head": {"kernel": bj.pack(gaussian((10, 6)), bj.Int8Config())},
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def manager_of(folder, **options):
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options))


def save(manager, step, **trees):
    """Saves trees and their descriptions, as the README does."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    about = {name: bj.io.describe(tree) for name, tree in trees.items()}
    manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about)))


def about_of(manager, step):
    return manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]


def restore(manager, step, **targets):
    """What Orbax makes of targets, unchecked."""
    items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    return manager.restore(step, args=ocp.args.Composite(**items))


def round_trip(folder, tree, like=None, sharding=None):
    with manager_of(folder) as manager:
        save(manager, 3, tree=tree)
        manager.wait_until_finished()
    with manager_of(folder) as manager:
        about = about_of(manager, 3)["tree"]
        assert about == bj.io.describe(tree)
        target = bj.io.abstract(about, like=like, sharding=sharding)
        return bj.io.check(restore(manager, 3, tree=target)["tree"], about)


# What comes back.


@pytest.mark.parametrize("asynchronous", [True, False])
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


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
    "grokfast_ema": lambda: optax.chain(bj.optim.grokfast_ema(), optax.adamw(1e-3)),
    "grokfast_ma": lambda: optax.chain(bj.optim.grokfast_ma(window_size=5), optax.sgd(1e-3)),
    "mugrokfast": lambda: bj.optim.mugrokfast(learning_rate=1e-3, phase="curriculum"),
    "watch_trits": lambda: optax.chain(bj.optim.watch_trits(every=2), optax.sgd(1e-3, 0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
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


# Where it is placed.


def test_shardings_are_given_by_one_by_a_tree_or_by_a_function():
    tree = small()
    about = bj.io.describe(tree)
    mesh = jax.make_mesh((1,), ("d",))
    one = NamedSharding(mesh, PartitionSpec())
    default = SingleDeviceSharding(jax.devices()[0])

    def of(target):
        return {leaf.sharding for leaf in jax.tree.leaves(target)}

    assert of(bj.io.abstract(about)) == {default}
    assert of(bj.io.abstract(about, sharding=one)) == {one}
    prefix = {"dense": one, "head": {"kernel": default}}
    got = bj.io.abstract(about, sharding=prefix)
    assert (of(got["dense"]), of(got["head"])) == ({one}, {default})
    seen = []

    def choose(target):
        seen.append(target)
        return jax.tree.map(lambda a: one if a.dtype == jnp.uint8 else default, target)

    got = bj.io.abstract(about, sharding=choose)
    assert got["dense"]["kernel"].codes.sharding == one
    assert of(got["head"]) == {default}
    assert isinstance(seen[0]["dense"]["kernel"], bj.PackedTernary)
    like = jax.device_put(tree, one)
    assert of(bj.io.abstract(about, like=like)) == {one}
    assert of(bj.io.abstract(about, like=jax.eval_shape(lambda: tree))) == {default}
    assert of(bj.io.abstract(about, like=like, sharding=default)) == {default}


def two_processes(rank, port):
    """One of two processes with a device each, over which arrays are copied or spread."""
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    value = np.arange(8, dtype=np.float32)
    packed = jax.tree.map(np.asarray, bj.pack(gaussian((8, 4))))

    def placed(spec, array):
        at = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, at, lambda index: array[index])

    def both(spec):
        kernel = jax.tree.map(lambda a: placed(PartitionSpec(), a), packed)
        codes = placed(PartitionSpec(None, *spec), packed.codes)
        return {"x": placed(spec, value), "kernel": dataclasses.replace(kernel, codes=codes)}

    here = {"x": value, "kernel": packed}
    copied, spread = both(PartitionSpec()), both(PartitionSpec("d"))
    assert not copied["x"].is_fully_addressable
    assert bj.io.describe(copied) == bj.io.describe(here)
    bj.io.check(copied, bj.io.describe(here))
    for call in (lambda: bj.io.describe(spread), lambda: bj.io.check(spread, bj.io.describe(here))):
        with pytest.raises(ValueError, match=r"spread over several processes.* digest=False"):
            call()
    about = bj.io.describe(spread, digest=False)
    assert about == bj.io.describe(here, digest=False)
    bj.io.check(spread, about)
    with pytest.raises(FormatError, match="has the config"):
        bj.io.check(replace({"a": spread}, "a", config=bj.PHASE4)["a"], about)
    print("agreed")


@pytest.mark.slow
def test_arrays_of_several_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = "import test_checkpoint_refusals; test_checkpoint_refusals.two_processes({}, {})"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(rank, port)],
            cwd=pathlib.Path(__file__).parent,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in both] == ["agreed\n"] * 2


def test_shardings_that_cannot_be_are_refused():
    about = bj.io.describe({**small(), "step": np.int64([1])})
    mesh = jax.sharding.AbstractMesh((3,), ("d",))
    three = NamedSharding(mesh, PartitionSpec("d"))
    for given, match in (
        (PartitionSpec(), "must have a jax.sharding.Sharding at dense/bias.* Put a mesh to a spec"),
        (
            {"dense": "d", "head": "d", "step": "d"},
            "a jax.sharding.Sharding at dense/bias, got 'd'",
        ),
    ):
        with pytest.raises(TypeError, match=match):
            bj.io.abstract(about, sharding=given)
    place = SingleDeviceSharding(jax.devices()[0])
    for given, match in (
        ({"dense": place}, "`sharding` has another structure than the tree"),
        (place, "cannot place step of int64"),
        (three, r"does not fit dense/bias of shape \(10,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            bj.io.abstract(about, sharding=given)


def alone(call, **environment):
    """Runs a function of this file in a process of its own; an error in it fails."""
    subprocess.run(
        [sys.executable, "-c", f"import test_checkpoint_refusals; test_checkpoint_refusals.{call}"],
        check=True,
        cwd=pathlib.Path(__file__).parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


# Resumed in the middle.

STEPS, STOP = 12, 5


@functools.cache
def resumable():
    """A small ternary network with a filter, AdamW and a strength that is phased in."""
    model = nn.Sequential([bj.linen.BitDense(32), nn.relu, bj.linen.BitDense(4)])
    tx = optax.chain(bj.optim.grokfast_ema(), optax.adamw(3e-3))
    strength = optax.linear_schedule(0.0, 1.0, 10)

    def fresh(seed):
        params = model.init(jax.random.key(seed), jnp.ones((1, 16)))["params"]
        return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)}

    @jax.jit
    def step(state, x, y):
        def loss_fn(params):
            with bj.phase_in(strength(state["step"]).astype(jnp.float32)):
                logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, loss

    return fresh, step


def whole(mesh):
    return NamedSharding(mesh, PartitionSpec())


def go_on(state, step, mesh, manager=None):
    """Trains to the end, and saves in the middle."""
    losses = []
    for at in range(int(state["step"]), STEPS):
        if manager is not None and at == STOP:
            save(manager, at, state=state)
        key = jax.random.key(100 + at)
        x = jax.random.normal(key, (64, 16))
        y = (x[:, :4] > x[:, 4:8]).argmax(-1)
        x, y = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("data")))
        state, loss = step(state, x, y)
        losses.append(np.asarray(loss))
    return state, np.array(losses)


def uninterrupted(folder, mesh):
    fresh, step = resumable()
    with manager_of(folder) as manager:
        state = jax.device_put(fresh(0), whole(mesh))
        state, losses = go_on(state, step, mesh, manager)
        manager.wait_until_finished()
    return state, losses


def resumed(folder, mesh):
    """From the files alone: another seed makes only the structure."""
    fresh, step = resumable()
    with manager_of(folder) as manager:
        at = manager.latest_step()
        assert at == STOP
        about = about_of(manager, at)["state"]
        target = bj.io.abstract(about, like=fresh(1), sharding=whole(mesh))
        state = bj.io.check(restore(manager, at, state=target)["state"], about)
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {whole(mesh)}
    return go_on(state, step, mesh)


TRAINED = []


@pytest.fixture
def trained(promotion, tmp_path_factory):
    """A run on one device that nothing interrupts, and where it saved."""
    # Not of the module's scope: outside the fixture of promotion all would compile again.
    if not TRAINED:
        folder = tmp_path_factory.mktemp("trained") / "checkpoints"
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        TRAINED.extend([folder, mesh, uninterrupted(folder, mesh)])
    return TRAINED


def test_training_resumed_in_the_middle_gives_the_same_bits(trained):
    folder, mesh, (wanted, all_losses) = trained
    state, losses = resumed(folder, mesh)
    assert len(losses) == STEPS - STOP
    assert losses.tobytes() == all_losses[STOP:].tobytes()
    assert len(set(all_losses.tolist())) == STEPS  # every step has another loss
    assert_same(state, wanted)


def test_training_resumed_without_its_filter_gives_other_bits(trained):
    folder, mesh, (_, losses) = trained
    fresh, step = resumable()
    with manager_of(folder) as manager:
        target = bj.io.abstract(about_of(manager, STOP)["state"], like=fresh(1))
        got = restore(manager, STOP, state=target)["state"]
    got["opt_state"] = (fresh(1)["opt_state"][0], got["opt_state"][1])
    _, others = go_on(jax.device_put(got, whole(mesh)), step, mesh)
    assert others[0] == losses[STOP]  # the same parameters
    assert (others != losses[STOP:]).any()


def main(part, folder):
    """One life of a run on eight devices; its end goes to a file."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    folder = pathlib.Path(folder)
    run = {"uninterrupted": uninterrupted, "resumed": resumed}[part]
    state, losses = run(folder / "checkpoints", mesh)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    np.savez(folder / f"{part}.npz", losses, *leaves)


def test_training_on_eight_devices_resumed_in_another_process_gives_the_same_bits(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    for part in ("uninterrupted", "resumed"):
        alone(f"main({part!r}, {str(tmp_path)!r})", XLA_FLAGS=flags)
    with np.load(tmp_path / "uninterrupted.npz") as want, np.load(tmp_path / "resumed.npz") as got:
        wanted, state = [[each[k] for k in each.files] for each in (want, got)]
    wanted[0] = wanted[0][STOP:]
    assert len(state) > 10
    for a, b in zip(state, wanted, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# What is refused.


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(jax.devices()[0]))


def replace(tree, name, leaf="kernel", **changed):
    """The tree with one packed kernel changed."""
    kernel = dataclasses.replace(tree[name][leaf], **changed)
    return {**tree, name: {**tree[name], leaf: kernel}}


def as_ternary(tree):
    codes, scale = struct((10, 6), jnp.uint8), struct((1, 6), jnp.float32)
    return {**tree, "head": {"kernel": bj.PackedTernary(codes, scale, 40)}}


def as_int8(tree):
    codes, scale = struct((6, 10), jnp.int8), struct((1, 1), jnp.float32)
    head = {**tree["dense"], "kernel": bj.PackedInt8(codes, scale)}
    return {**tree, "dense": head}


# Targets into which Orbax restores what was another thing, and what we say.
WRONG = {
    "config": (
        lambda t: replace(t, "dense", config=bj.PHASE4),
        r"dense/kernel has the config .*'threshold': 0\.1.* saved with .*'threshold': 0\.5",
    ),
    "length": (
        lambda t: replace(t, "dense", length=24),
        r"dense/kernel has the shape \(24, 10\), and was saved with \(23, 10\)",
    ),
    "axes": (
        lambda t: replace(t, "dense", contracting_axes=(-1,), length=40),
        r"dense/kernel has the shape \(6, 40\), and was saved with \(23, 10\)",
    ),
    "axes of an int8 kernel": (
        lambda t: replace(t, "head", contracting_axes=(-1,)),
        r"head/kernel has the contracting_axes \(-1,\), and was saved with \(-2,\)",
    ),
    "dtype it stands for": (
        lambda t: replace(t, "head", dtype=jnp.dtype(jnp.bfloat16)),
        "head/kernel has the dtype bfloat16, and was saved with float32",
    ),
    "codes cast": (
        lambda t: replace(t, "dense", codes=struct((6, 10), jnp.int32)),
        "dense/kernel has codes that are int32",
    ),
    "scale cast": (
        lambda t: replace(t, "dense", scale=struct((1, 1), jnp.bfloat16)),
        "dense/kernel has a bfloat16 scale",
    ),
    "an array cast": (
        lambda t: {**t, "dense": {**t["dense"], "bias": struct((10,), jnp.float16)}},
        "dense/bias has the dtype float16, and was saved with float32",
    ),
    "an array as integers": (
        lambda t: {**t, "dense": {**t["dense"], "bias": struct((10,), jnp.int8)}},
        "dense/bias has the dtype int8, and was saved with float32",
    ),
    "int8 as ternary": (as_ternary, "head/kernel is a PackedTernary, and was saved as a PackedI"),
    "ternary as int8": (as_int8, "dense/kernel is a PackedInt8, and was saved as a PackedTernary"),
    "packed as a dict": (
        lambda t: {
            **t,
            "head": {
                "kernel": {"codes": struct((10, 6), jnp.int8), "scale": struct((1, 6), jnp.float32)}
            },
        },
        r"the tree lacks \['head', 'kernel'\], which was saved",
    ),
    "None": (
        lambda t: {**t, "dense": {**t["dense"], "bias": None}},
        r"the tree lacks \['dense', 'bias'\], which was saved",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with manager_of(tmp_path_factory.mktemp("saved") / "checkpoints") as manager:
        save(manager, 0, tree=small())
        manager.wait_until_finished()
        yield manager


@pytest.mark.parametrize("name", WRONG)
def test_what_orbax_restores_into_the_wrong_thing_is_refused(saved, name):
    wrong, match = WRONG[name]
    about = about_of(saved, 0)["tree"]
    target = wrong(bj.io.abstract(about))
    got = restore(saved, 0, tree=target)["tree"]  # not a word
    with pytest.raises(FormatError, match=f"^check: {match}") as refused:
        bj.io.check(got, about)
    assert "bj.io.abstract(description)" in str(refused.value)
    with pytest.raises(FormatError, match=f"^abstract: {match}") as refused:
        bj.io.abstract(about, like=target)  # before a byte is read
    assert "Make `like` what was saved" in str(refused.value) or "lacks" in match
    bare = bj.io.describe(small(), digest=False)
    with pytest.raises(FormatError, match=f"^check: {match}"):
        bj.io.check(got, bare)


def test_untyped_restores_are_refused(saved):
    got = restore(saved, 0, tree=None)["tree"]
    with pytest.raises(FormatError, match=r"the tree lacks \['dense', 'kernel'\]"):
        bj.io.check(got, about_of(saved, 0)["tree"])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"codes": Struct((7, 10), jnp.uint8)}, r"codes that are uint8 of shape \(7, 10\)"),
        ({"codes": Struct((6,), jnp.uint8)}, r"shape \(6,\), and was saved with \(23, 10\)"),
        ({"kernel_ndim": 3}, "has the kernel_ndim 3, and was saved with 2"),
        ({"scale": Struct((1, 10), jnp.float32)}, r"scale_shape \(1, 10\).* with \(1, 1\)"),
    ],
    ids=["codes", "rank", "kernel_ndim", "scale"],
)
def test_shapes_and_layouts_of_templates_are_refused(changed, match):
    about = bj.io.describe(small())
    with pytest.raises(FormatError, match=match):
        bj.io.abstract(about, like=replace(bj.io.abstract(about), "dense", **changed))


def test_leaves_that_are_missing_or_new_are_refused():
    tree = small()
    about = bj.io.describe(tree)
    with pytest.raises(FormatError, match=r"lacks \['head', 'kernel'\], which was saved"):
        bj.io.check({"dense": tree["dense"]}, about)
    with pytest.raises(FormatError, match=r"has \['new'\], which was not saved"):
        bj.io.check({**tree, "new": jnp.ones(1)}, about)
    with pytest.raises(FormatError, match=r"lacks \['10'\], which was saved"):
        bj.io.check({10: jnp.ones(1)}, bj.io.describe({"10": jnp.ones(1)}))


def test_prepared_kernels_are_refused():
    tree = small()
    fast = {**tree, "dense": bj.prepare(tree["dense"], implementation="xla")}
    about = bj.io.describe(tree)
    remedy = "Pass the stored tree that bj.pack_params or bj.io.load returned"
    with pytest.raises(TypeError, match=f"^describe: dense/kernel is prepared .*{remedy}"):
        bj.io.describe(fast)
    with pytest.raises(TypeError, match=f"^check: dense/kernel is prepared .*{remedy}"):
        bj.io.check(fast, about)
    with pytest.raises(TypeError, match=f"^abstract: dense/kernel is prepared .*{remedy}"):
        bj.io.abstract(about, like=fast)


@pytest.mark.parametrize("digest", [True, False])
def test_codes_that_are_none_are_refused(digest):
    tree = small()
    about = bj.io.describe(tree, digest=digest)
    ternary, eight = tree["dense"]["kernel"], tree["head"]["kernel"]
    three, padding = np.array(ternary.codes), np.array(ternary.codes)
    three[0, 0] |= 3
    padding[-1, 0] ^= 0x80
    least = np.array(eight.codes)
    least[0, 0] = -128
    wrong = [
        (replace(tree, "dense", codes=three), "dense/kernel has 1 bytes with a code of 3"),
        (replace(tree, "dense", codes=padding), "dense/kernel has 1 bytes with a code of 3, or"),
        (replace(tree, "head", codes=least), "head/kernel has 1 codes of -128"),
    ]
    for value in (0.0, -1.0, np.nan, np.inf):
        bad = replace(tree, "dense", scale=np.full((1, 1), value, np.float32))
        wrong.append((bad, "dense/kernel has a scale that is not finite and > 0"))
    for bad, match in wrong:
        with pytest.raises(FormatError, match=f"^check: {match}"):
            bj.io.check(bad, about)
        with pytest.raises(ValueError, match=f"^describe: {match}.* bj.pack"):
            bj.io.describe(bad, digest=digest)


def test_one_changed_bit_is_refused_and_the_leaf_is_named():
    tree = small()
    about = bj.io.describe(tree)
    codes = np.array(tree["dense"]["kernel"].codes)
    codes[0, 0] = 0x55 if codes[0, 0] != 0x55 else 0xAA  # valid codes, others
    bias = np.array(tree["dense"]["bias"])
    bias.view(np.uint32)[3] ^= 1
    scale = np.nextafter(np.asarray(tree["head"]["kernel"].scale), np.float32(9))
    for bad, where in (
        (replace(tree, "dense", codes=codes), "dense/kernel"),
        (replace(tree, "head", scale=scale), "head/kernel"),
        ({**tree, "dense": {**tree["dense"], "bias": bias}}, "dense/bias"),
    ):
        with pytest.raises(FormatError, match=f"^check: {where} holds other bytes.* another step"):
            bj.io.check(bad, about)
        bj.io.check(bad, bj.io.describe(tree, digest=False))  # what digest=False gives up


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (lambda: {"a": 1}, "a must be an array or a packed kernel, got a int. Wrap a number"),
        (lambda: {"a": "b"}, "got a str"),
        (lambda: {"a": jax.random.key(0)}, "a is key<fry>.*jax.random.key_data"),
        (lambda: {"a": jax.ShapeDtypeStruct((1,), jnp.float32)}, "got a ShapeDtypeStruct"),
        (lambda: {"a": jax.jit(lambda: 1.5)()}, "a is a weak-typed float32.* jnp.asarray"),
        (lambda: {(1, 2): jnp.ones(1)}, r"has the key \(1, 2\) \(tuple\)"),
        (lambda: jnp.ones(1), "is a leaf itself. Wrap it in a dict"),
    ],
    ids=["number", "string", "random key", "abstract", "weak type", "tuple key", "leaf"],
)
def test_what_cannot_be_described_is_refused(tree, match):
    with pytest.raises(TypeError, match=f"^describe: .*{match}"):
        bj.io.describe(tree())


def test_tracers_are_refused():
    with pytest.raises(TypeError, match=r"a is a tracer. Call describe outside jit"):
        jax.jit(lambda x: bj.io.describe({"a": x}))(jnp.ones(1))
    about = bj.io.describe({"a": jnp.ones(1)})
    with pytest.raises(TypeError, match=r"a is a tracer. Call check outside jit"):
        jax.jit(lambda x: bj.io.check({"a": x}, about))(jnp.ones(1))


def test_a_tree_without_arrays_is_refused():
    with pytest.raises(ValueError, match="describe: `tree` holds no arrays"):
        bj.io.describe({"a": {}})


def test_a_weak_integer_is_described_and_comes_back(folder):
    step = jax.jit(lambda: 3)()
    assert step.weak_type
    assert int(round_trip(folder, {"step": step})["step"]) == 3


@pytest.mark.parametrize(
    "tree",
    [
        lambda: {"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2)},
        lambda: {"k": bj.pack(gaussian((8, 4))), "k.codes": jnp.ones((2, 4), jnp.uint8)},
    ],
    ids=["nested", "packed"],
)
def test_two_leaves_of_one_name_in_orbax_are_refused(folder, tree):
    tree = tree()
    with manager_of(folder) as manager:  # one is written over the other: not a word
        manager.save(0, args=ocp.args.Composite(tree=ocp.args.StandardSave(tree)))
        manager.wait_until_finished()
        got = restore(manager, 0, tree=jax.eval_shape(lambda: tree))["tree"]
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, tree)), strict=True)]
    assert not all(same)
    with pytest.raises(ValueError, match=r"two leaves that Orbax would store as '(a.b|k.codes)'"):
        bj.io.describe(tree)


# Descriptions that lie.


def test_a_description_is_json_and_returns_from_it():
    for tree in (
        packed_tree(),
        OPTIMIZERS["mugrokfast"]().init({"l": {"kernel": jnp.ones((4, 4))}}),
    ):
        about = bj.io.describe(tree)
        assert json.loads(json.dumps(about)) == about
        bj.io.check(tree, json.loads(json.dumps(about)))


def test_digests_are_what_the_module_says():
    kernel, large = bj.pack(gaussian((8, 3))), gaussian((300_000,))  # more than a MiB
    about = bj.io.describe({"kernel": kernel, "large": large})

    def sha256(*parts):
        return hashlib.sha256(b"".join(parts))

    def of(array):
        raw, size = np.asarray(array).tobytes(), 1 << 20
        chunks = [sha256(raw[at : at + size]).digest() for at in range(0, len(raw), size)]
        return len(raw).to_bytes(8, "little") + b"".join(chunks)

    first, second = about["leaves"]
    assert first["sha256"] == sha256(of(kernel.codes), of(kernel.scale)).hexdigest()
    assert second["sha256"] == sha256(of(large)).hexdigest()
    bare = {key: value for key, value in about.items() if key != "sha256"}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert about["sha256"] == sha256(canonical.encode()).hexdigest()


def test_every_flipped_bit_of_a_description_is_refused():
    tree = {"k": bj.pack(gaussian((7, 3)))}
    text = json.dumps(bj.io.describe(tree)).encode()
    parsed = 0
    for position, bit in itertools.product(range(len(text)), range(8)):
        flipped = bytearray(text)
        flipped[position] ^= 1 << bit
        try:
            about = json.loads(flipped.decode())
        except ValueError:
            continue
        if about == json.loads(text):  # a space became another
            continue
        parsed += 1
        with pytest.raises(FormatError, match=r"^abstract: "):
            bj.io.abstract(about)
    assert parsed > 1000


def resealed(about):
    """Whoever wrote a wrong description took its digest too."""
    about = {key: about[key] for key in about if key != "sha256"}
    return {**about, "sha256": _description.digest_of(about)}


# Each with its digest made anew: what a kernel may declare, and what a description may.
LEAF_LIES = {
    "kind": [{"kind": "prepared"}, {"kind": "int8"}, {"kind": "empty"}, {"kind": None}],
    "path": [{"path": []}, {"path": "dense"}, {"path": [1.5]}, {"path": ["head"]}],
    "shape": [{"shape": [24, 10]}, {"shape": [23, -10]}, {"shape": [23]}, {"shape": [True, 10]}],
    "length": [{"length": 22}, {"length": 23.0}, {"length": None}],
    "dtype": [{"dtype": "int8"}, {"dtype": "object"}, {"dtype": 7}],
    "axes": [{"contracting_axes": [0]}, {"contracting_axes": []}, {"contracting_axes": [-3]}],
    "ndim": [{"kernel_ndim": 1}, {"kernel_ndim": 3}, {"kernel_ndim": True}],
    "config": [{"config": {}}, {"config": {"scale": "absmean"}}, {"config": None}],
    "scale": [{"scale_shape": [5, 1]}, {"scale_shape": [1]}, {"scale_shape": [0, 1]}],
    "scale type": [{"scale_shape": None}, {"scale_shape": [1.0, 1]}],
    "sha256": [{"sha256": 7}, {"sha256": None}],
    "extra": [{"codes": 0}, {"stored": "trits"}],
}
WHOLE_LIES = {
    "two leaves": lambda about: {"leaves": about["leaves"] * 2},
    "no list": lambda about: {"leaves": {}},
    "no leaves": lambda about: {"leaves": ["dense"]},
    "mappings": lambda about: {"mappings": 1},
    "extra key": lambda about: {"also": 1},
}


def assert_refused(lie, tree):
    with pytest.raises(FormatError, match=r"^abstract: the description .*Restore another step"):
        bj.io.abstract(lie)
    with pytest.raises(FormatError, match=r"^check: "):
        bj.io.check(tree, lie)


@pytest.mark.parametrize("name", LEAF_LIES)
def test_a_leaf_that_contradicts_itself_is_refused(name):
    tree = small()
    for change in LEAF_LIES[name]:
        lie = copy.deepcopy(bj.io.describe(tree))
        kernel = next(leaf for leaf in lie["leaves"] if leaf["path"] == ["dense", "kernel"])
        kernel.update(change)
        assert_refused(resealed(lie), tree)


@pytest.mark.parametrize("name", WHOLE_LIES)
def test_a_description_that_contradicts_itself_is_refused(name):
    about = bj.io.describe(small())
    assert_refused(resealed({**about, **WHOLE_LIES[name](about)}), small())


def test_a_leaf_inside_another_is_refused():
    tree = {"a": jnp.ones(1), "b": {"c": jnp.ones(1)}}
    about = bj.io.describe(tree)
    about["leaves"][1]["path"] = ["a", "c"]
    assert_refused(resealed(about), tree)


def test_other_formats_and_versions_are_refused():
    tree = small()
    about = bj.io.describe(tree)
    later = resealed({**about, "version": "2"})
    for call in (lambda d: bj.io.check(tree, d), bj.io.abstract):
        with pytest.raises(
            FormatError, match=r"version '2', and this bitnet_jax reads '1'. Update"
        ):
            call(later)
        for other in (None, [], "about", {}, {**about, "format": "bitnet_jax"}, {"tree": about}):
            with pytest.raises(FormatError, match=r"the description is none: its format must be"):
                call(other)
        with pytest.raises(FormatError, match="was changed after it was made"):
            call({**about, "leaves": about["leaves"][:-1]})
        with pytest.raises(FormatError, match="is no JSON"):
            call({**about, "leaves": object()})
        with pytest.raises(FormatError, match="is no JSON"):
            call({**about, "leaves": [float("nan")]})


# Damage in the files.


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


# What restores from damaged files runs alone: one that fails halfway leaves coroutines and
# event loops of Orbax's behind, which Python reports whenever it finds them.


def flip_bits(folder):
    """Flips bits of a checkpoint, one at a time, and restores from what it then is."""
    folder = pathlib.Path(folder)
    tree = {"kernel": bj.pack(gaussian((256, 32))), "bias": gaussian((512,))}
    with manager_of(folder) as manager:
        save(manager, 0, tree=tree)
        manager.wait_until_finished()
    about = bj.io.describe(tree)
    target = bj.io.abstract(about)
    draw, seen = random.Random(0), collections.Counter()
    data = [path for path in files_of(folder / "0" / "tree") if "/d/" in str(path)]
    for _ in range(150):
        path = draw.choices(data, [path.stat().st_size for path in data])[0]
        kept = path.read_bytes()
        bad = bytearray(kept)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            with manager_of(folder) as manager:  # a manager keeps what it has read
                got = restore(manager, 0, tree=target)["tree"]
        except Exception:  # Orbax has no one kind for damage
            seen["refused by Orbax"] += 1
            continue
        finally:
            path.write_bytes(kept)
        try:
            bj.io.check(got, about)
        except FormatError:
            seen["refused by check"] += 1
            continue
        assert_same(got, tree)
        seen["harmless"] += 1
    assert seen["refused by check"] > 50, seen  # Orbax restored these without a word


def test_flipped_bits_in_the_files_of_orbax_are_refused_or_do_no_harm(folder):
    alone(f"flip_bits({str(folder)!r})")


class Saver:
    """The process of orbax_saver.py, and what the children that it forks have said."""

    def __init__(self, folder):
        script = pathlib.Path(__file__).parents[1] / "orbax_saver.py"
        self.process = subprocess.Popen(
            [sys.executable, script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def lines(self):
        for line in self.process.stdout:
            word, number = line.split()
            yield word.decode(), int(number)

    def killed(self, draw):
        """Forks a child and kills it, up to three saves after its first began; what it said."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        said = []
        for word, number in self.lines():
            said.append((word, number))
            if word == "child":
                child = number
            elif word == "begins":
                time.sleep(draw.uniform(0, 0.6))
                os.kill(child, signal.SIGKILL)
                break
        for word, number in self.lines():
            if word == "dead":
                return said
            said.append((word, number))
        raise AssertionError("the saver ended")

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def restored(folder):
    """The steps that a manager lists: those that came back to the bit, and those refused."""
    good, refused = [], []
    with orbax_saver.manager_of(folder) as manager:
        for step in manager.all_steps():
            try:
                about = about_of(manager, step)
                got = restore(manager, step, tree=bj.io.abstract(about))["tree"]
                bj.io.check(got, about)
            except Exception:  # whatever Orbax makes of a step that is half deleted
                refused.append(step)
                continue
            assert about == bj.io.describe(orbax_saver.tree_of(step))
            good.append(step)
    return good, refused


def kill(folder):
    """Kills savers until a hundred were inside a save, and restores after each."""
    folder = pathlib.Path(folder)
    draw, saver = random.Random(0), Saver(folder)
    seen, last = collections.Counter(), -1
    try:
        while seen["inside a save"] < 100:
            said = saver.killed(draw)
            last = max([last, *(step for word, step in said if word == "saved")])
            good, refused = restored(folder)
            # All that was said to be there is there; what is refused was older, and being deleted.
            assert last < 0 or max(good) >= last, (good, refused, said)
            assert max(refused, default=-1) < max(good, default=0), (good, refused, said)
            seen.update({"kills": 1, "inside a save": said[-1][0] == "begins"})
            seen.update({"restored": len(good), "half deleted": len(refused)})
    finally:
        saver.close()
    print(dict(seen), "steps saved:", last + 1)
    assert last > 20  # they save, between and before the kills


@pytest.mark.slow
def test_kill_at_a_hundred_random_moments_loses_nothing(folder):
    alone(f"kill({str(folder)!r})")
