"""Packed kernels given to jax.grad or to an optimizer: an error that says what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion


def packed_params():
    layer = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    return bj.pack_params({"layer": layer})[0]


def packed_model():
    model = nnx.Sequential(bj.nnx.BitLinear(8, 8, rngs=nnx.Rngs(0)))
    nnx.update(model, bj.pack_params(nnx.state(model, nnx.Param))[0])
    return model


def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if "kernel" in jax.tree_util.keystr(path) else "trained", params
    )


def loss(params):
    return jnp.square(params["layer"]["bias"]).sum()


def output(model):
    return model(jnp.ones((2, 8))).sum()


REFUSED = {
    "grad": lambda p: jax.grad(loss)(p),
    "value_and_grad": lambda p: jax.value_and_grad(loss)(p),
    "grad in jit": lambda p: jax.jit(jax.grad(loss))(p),
    "grad of a leaf": lambda p: jax.grad(lambda leaf: leaf.scale.sum())(p["layer"]["kernel"]),
    "nnx.grad": lambda p: nnx.grad(output)(packed_model()),
    "adamw": lambda p: optax.adamw(1e-3).init(p),
    "adamw in jit": lambda p: jax.jit(optax.adamw(1e-3).init)(p),
    "sgd with momentum": lambda p: optax.sgd(1e-3, momentum=0.9).init(p),
    "lion": lambda p: optax.lion(1e-3).init(p),
    "muon": lambda p: optax.contrib.muon(1e-3).init(p),
    "MultiSteps": lambda p: optax.MultiSteps(optax.adamw(1e-3), 2).init(p),
    "inject_hyperparams": lambda p: optax.inject_hyperparams(optax.adamw)(1e-3).init(p),
    "TrainState": lambda p: TrainState.create(apply_fn=None, params=p, tx=optax.adamw(1e-3)),
    "nnx.Optimizer": lambda p: nnx.Optimizer(packed_model(), optax.adamw(1e-3), wrt=nnx.Param),
}

ALLOWED = {
    "allow_int": lambda p: jax.grad(loss, allow_int=True)(p),
    "a closure": lambda p: jax.grad(lambda b: loss(jax.tree.map(lambda v: v, p)) * b)(1.0),
    "jit inside grad": lambda p: jax.grad(lambda b: jax.jit(lambda p, b: loss(p) * b)(p, b))(1.0),
    "zeros_like": lambda p: optax.tree.zeros_like(p),
    "masked": lambda p: optax.masked(
        optax.adamw(1e-3), jax.tree.map(lambda name: name == "trained", labels(p))
    ).init(p),
    "partitioned": lambda p: optax.partition(
        {"frozen": optax.set_to_zero(), "trained": optax.adamw(1e-3)}, labels(p)
    ).init(p),
    "nnx.Optimizer over what trains": lambda p: nnx.Optimizer(
        packed_model(), optax.adamw(1e-3), wrt=bj.nnx.trainable
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_packed_kernels_is_refused(name):
    with pytest.raises(TypeError, match=r"bj\.partition\(params\).*bj\.unpack_params\(params\)"):
        REFUSED[name](packed_params())


@pytest.mark.parametrize("name", ALLOWED)
def test_what_does_not_train_them_passes(name):
    assert ALLOWED[name](packed_params()) is not None
