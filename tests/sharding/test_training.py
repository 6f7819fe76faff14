"""Training on a mesh has the bits, or stays with the losses, of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from cases import cases
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from meshes import WAYS, explicit_in_core, gaussian, mesh_of, net_and_params, put, sharded_params

import bitnet_jax as bj


@cases(
    ("way", "norm"),
    [*((way, False) for way in WAYS), ("tensor", True)],
    core=[("fsdp and tensor", False), ("tensor", True)],
)
@explicit_in_core
def test_the_forward_pass_of_training_has_the_bits_of_one_device(kind, norm, way):
    mesh = mesh_of(kind)
    net, boxed = net_and_params(way, norm=norm)
    x = gaussian(6, 16, 32)
    want = jax.jit(net.apply)({"params": nn.unbox(boxed)}, x)
    with jax.set_mesh(mesh):
        params = sharded_params(mesh, boxed)
        y = jax.jit(net.apply)({"params": params}, put(mesh, x, P("data")))
    oracles.assert_same_bits(y, want)


def trained(net, params, x, steps=4):
    """Losses of a few steps, and the parameters after them."""
    tx = optax.adamw(1e-2)

    def loss(params):
        y = jax.nn.log_softmax(net.apply({"params": params}, x))
        return -(y * jnp.eye(16)).sum(axis=-1).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params


@functools.cache
def trained_on_one_device():
    net, boxed = net_and_params("data")
    return trained(net, nn.unbox(boxed), gaussian(6, 16, 32))[0]


@pytest.mark.standard_promotion  # optax's adamw raises under the strict one
@cases("way", ["data", "fsdp", "tensor", "fsdp and tensor"], core=["fsdp and tensor"])
@explicit_in_core
def test_a_training_run_stays_with_that_of_one_device(kind, way):
    net, boxed = net_and_params(way)
    mesh, want = mesh_of(kind), trained_on_one_device()
    with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
        params = sharded_params(mesh, boxed)
        got, after = trained(net, params, put(mesh, gaussian(6, 16, 32), P("data")))
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert want[-1] < want[0]
    if kind == "explicit":
        for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
            assert now.sharding.spec == before.sharding.spec
