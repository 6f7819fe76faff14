"""Packed kernels given to a derivative or to an optimizer: an error that says what to do."""

import inspect
import sys
import warnings

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
    "vjp": lambda p: jax.vjp(loss, p),
    "vjp of two": lambda p: jax.vjp(lambda b, p: loss(p) * b, 1.0, p),
    "linearize": lambda p: jax.linearize(loss, p),
    "jvp": lambda p: jax.jvp(loss, (p,), (p,)),
    "jacrev": lambda p: jax.jacrev(loss)(p),
    "jacfwd": lambda p: jax.jacfwd(loss)(p),
    "hessian": lambda p: jax.hessian(loss)(p),
    "nnx.vjp": lambda p: nnx.vjp(output, packed_model(), graph=False),
    "apply_updates": lambda p: optax.apply_updates(p, p),
    "incremental_update": lambda p: optax.incremental_update(p, p, 0.1),
    "sgd.update": lambda p: optax.sgd(1e-3).update(p, optax.sgd(1e-3).init(p)),
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
    "vjp of x": lambda p: jax.vjp(lambda b: loss(p) * b, 1.0)[1](1.0),
    "linearize in jit": lambda p: jax.jit(lambda p, b: jax.linearize(lambda b: loss(p) * b, b)[0])(
        p, 1.0
    ),
    "jacobian of x": lambda p: jax.jacrev(lambda b: loss(p) * b)(1.0),
    "hessian of x": lambda p: jax.hessian(lambda b: loss(p) * b**2)(1.0),
    "jacrev with allow_int": lambda p: jax.jacrev(loss, allow_int=True)(p),
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


# Every optimizer of optax ------------------------------------------------------------------

ARGUMENTS = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "decay": 0.9,
    "max_norm": 1.0,
    "step_size": 0.1,
    "weight_decay": 0.1,
    "clipping": 1.0,
    "key": jax.random.key(0),
}
INNER = {"inner", "optimizer", "base_optimizer", "opt"}


def transforms():
    """Every public transform of optax that these arguments make."""
    made = {}
    for module in (optax, optax.contrib):
        for name, factory in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(factory):
                continue
            parameters = inspect.signature(factory).parameters.values()
            needed = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_KEYWORD]
            given = {n: ARGUMENTS[n] for n in needed if n in ARGUMENTS}
            given |= {n: optax.adam(1e-3) for n in needed if n in INNER}
            if "key" in inspect.signature(factory).parameters:
                given["key"] = ARGUMENTS["key"]
            if set(needed) <= set(given) and (tx := made_of(factory, given)) is not None:
                made[f"{module.__name__}.{name}"] = tx
    return made


def made_of(factory, given):
    try:
        with warnings.catch_warnings(action="ignore"):  # some are deprecated
            tx = factory(**given)
    except (TypeError, ValueError):  # no transform, or one of several transforms
        return None
    return tx if isinstance(tx, optax.GradientTransformation) else None


def holds_state_of(params, state):
    """Whether a state has an array that is as large as the codes."""
    size = params["layer"]["kernel"].codes.size
    return any(getattr(x, "size", 0) >= size for x in jax.tree.leaves(state))


TRANSFORMS = transforms()
# Of packed leaves alone: whatever is as large as the codes is a state of them.
ALONE = bj.pack_params({"layer": {"kernel": jnp.ones((16, 64))}})[0]


def test_most_of_optax_is_tried():
    assert len(TRANSFORMS) >= 80
    assert {f"optax.{n}" for n in ("adamw", "adafactor", "rmsprop", "yogi")} <= set(TRANSFORMS)
    assert {f"optax.contrib.{n}" for n in ("dog", "schedule_free", "prodigy")} <= set(TRANSFORMS)


def outcome(run, *args, **kwargs):
    """What a function returns; None where it refuses packed leaves, or needs more arguments."""
    try:
        return run(*args, **kwargs)
    except (TypeError, ValueError, AttributeError) as error:
        words = "bj.partition(params)" in str(error)
        if not words and type(error) is TypeError:
            raise
        return None


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_optax_transform_keeps_state_of_codes_or_updates_them(name):
    tx = optax.with_extra_args_support(TRANSFORMS[name])
    state = outcome(tx.init, ALONE)
    if state is None:
        return
    assert not holds_state_of(ALONE, state)
    done = outcome(tx.update, ALONE, state, ALONE, value=jnp.float32(1.0))
    if done is None:
        return
    same = jax.tree.map(lambda a, b: a is b, done[0], ALONE)
    assert all(jax.tree.leaves(same))
    with pytest.raises(TypeError, match=r"optax\.apply_updates: `params` holds packed"):
        optax.apply_updates(ALONE, done[0])


OWN = {
    "b158_adamw": lambda: bj.optim.b158_adamw(100),
    "grokfast_ema": bj.optim.grokfast_ema,
    "grokfast_ma": bj.optim.grokfast_ma,
    "mugrokfast": lambda: bj.optim.mugrokfast(1e-3),
    "watch_trits": bj.optim.watch_trits,
}


@pytest.mark.parametrize("name", OWN)
def test_own_transforms_refuse_packed_leaves(name):
    with pytest.raises((TypeError, ValueError), match=r"packed|no gradient|matches nothing"):
        OWN[name]().init(ALONE)


def test_flattening_a_packed_leaf_is_little_work():
    node = ALONE["layer"]["kernel"]
    jax.tree.flatten(node)
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event))
    try:
        jax.tree.flatten([node] * 10)
    finally:
        sys.setprofile(None)
    own = calls.count("call") - 2  # of jax.tree.flatten itself
    assert own <= 2 * 10  # flatten, and a look at who asks
