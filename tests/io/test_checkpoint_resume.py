"""Training that is resumed in the middle has the bits of training that was not interrupted."""

import functools
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import about_of, alone, manager_of, restore, save
from io_files import assert_same
from jax.sharding import NamedSharding, PartitionSpec

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion  # optax's adamw raises under the strict one


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


@pytest.mark.full
def test_training_on_eight_devices_resumed_in_another_process_gives_the_same_bits(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    for part in ("uninterrupted", "resumed"):
        alone(__file__, f"main({part!r}, {str(tmp_path)!r})", XLA_FLAGS=flags)
    with np.load(tmp_path / "uninterrupted.npz") as want, np.load(tmp_path / "resumed.npz") as got:
        wanted, state = [[each[k] for k in each.files] for each in (want, got)]
    wanted[0] = wanted[0][STOP:]
    assert len(state) > 10
    for a, b in zip(state, wanted, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
