"""Statistics of codes in training against float64 NumPy, written from the definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj
from bitnet_jax.analysis import trit_stats

CONFIGS = {
    "tensor": bj.B158,
    "channel": bj.PHASE4,
    "survivors": bj.TWN,
    "median": bj.TernaryConfig(scale="absmedian"),
    "groups": bj.TernaryConfig(granularity=3),
}


def kernel(seed=0, shape=(12, 7)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exact(w, config):
    """Ratio to the statistic, codes and scales of a 2-D kernel."""
    w = np.asarray(w, np.float64)
    k, n = w.shape
    size = config.granularity if isinstance(config.granularity, int) else k
    groups = w.reshape(k // size, size, n)
    over = (1, 2) if config.granularity == "tensor" else 1
    statistic = np.median if config.scale == "absmedian" else np.mean
    s = np.maximum(statistic(np.abs(groups), axis=over, keepdims=True), config.eps)
    r = groups / s
    codes = np.where(np.abs(r) <= config.threshold, 0, np.sign(r))
    if config.scale == "survivors":
        kept = codes != 0
        s = (np.abs(groups) * kept).sum(over, keepdims=True) / kept.sum(over, keepdims=True)
    return r, codes, s


@cases("name", list(CONFIGS), core=["groups", "survivors"])
def test_statistics_are_those_of_the_definition(name):
    config = CONFIGS[name]
    w, moved = kernel(), kernel() + 0.3 * kernel(1)
    first = trit_stats({"layer": {"kernel": w}}, config=config)
    second = trit_stats({"layer": {"kernel": moved}}, previous=first, config=config, near=0.2)
    _, old_codes, old_scale = exact(w, config)
    r, codes, scale = exact(moved, config)
    (row,) = second.rows
    assert row.path == "layer/kernel"
    assert row.flip_rate == pytest.approx((codes != old_codes).mean(), abs=1e-6)
    assert row.zeros == pytest.approx((codes == 0).mean(), abs=1e-6)
    assert row.scale == pytest.approx(scale.mean(), rel=1e-5)
    assert row.scale_drift == pytest.approx(scale.mean() / old_scale.mean() - 1, abs=1e-5)
    near = (np.abs(np.abs(r) - config.threshold) <= 0.2).mean()
    assert row.near_threshold == pytest.approx(near, abs=1e-6)
    assert math.isnan(first.rows[0].flip_rate)
    assert sorted(first.to_dict()) == [
        "layer/kernel/near_threshold",
        "layer/kernel/scale",
        "layer/kernel/zeros",
    ]
    again = trit_stats(
        {"layer": {"kernel": moved}}, previous=first.snapshot, config=config, near=0.2
    )
    assert again.to_dict() == second.to_dict()


def test_every_kind_of_flip_counts_once():
    w = np.array([[1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 1.0]] * 3, np.float32)
    moved = np.array([[0.0, -1.0, 0.0, 1.0, 1.0, -1.0, 1.0]] * 3, np.float32)
    first = trit_stats({"kernel": w})
    assert trit_stats({"kernel": moved}, previous=first).rows[0].flip_rate == pytest.approx(6 / 7)
    assert trit_stats({"kernel": w}, previous=first).rows[0].flip_rate == 0


def test_activations_that_are_clipped_or_lost():
    x = np.zeros((2, 4), np.float32)
    x[0] = [1.0, -1.0, 0.5, 0.0]
    x[1] = [1.0, 1e-4, 1e-4, 0.25]
    stats = trit_stats({"kernel": kernel()}, inputs={"kernel": jnp.asarray(x)})
    assert stats.rows[0].clipped == pytest.approx(3 / 8)
    assert stats.rows[0].zeroed == pytest.approx(2 / 8)
    assert "clipped" in str(stats)


def test_table_leaves_out_what_is_not_there():
    first = trit_stats({"kernel": kernel()})
    assert str(first).splitlines()[0].split() == ["path", "zeros", "scale", "near_threshold"]
    header = str(trit_stats({"kernel": kernel()}, previous=first)).splitlines()[0].split()
    assert header == ["path", "flip_rate", "zeros", "scale", "scale_drift", "near_threshold"]


def test_stacked_and_boxed_and_nnx_kernels():
    stack = np.stack([kernel(0), kernel(1), kernel(2)])

    def axes(path, leaf):
        return {"contracting_axes": 1, "batch_axes": 0}

    boxed = nn.Partitioned(jnp.asarray(stack), (None, "model", None))
    for params in ({"kernel": stack}, {"kernel": boxed}):
        stats = trit_stats(params, axes=axes)
        zeros = np.mean([(exact(w, bj.B158)[1] == 0).mean() for w in stack])
        assert stats.rows[0].zeros == pytest.approx(zeros, abs=1e-6)
    model = nnx.Linear(12, 7, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    assert trit_stats(state).rows[0].path == "kernel"


def params_of(seed=0):
    return {
        "a": {"kernel": jnp.asarray(kernel(seed)), "bias": jnp.zeros(7)},
        "b": {"kernel": jnp.asarray(kernel(seed + 1, (7, 5)))},
    }


@pytest.mark.standard_promotion
def test_the_transform_sees_what_trit_stats_sees():
    tx = optax.chain(optax.clip(1.0), bj.optim.watch_trits(every=3), optax.adamw(0.05))
    params = params_of()
    state = jax.jit(tx.init)(params)
    last = trit_stats(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.cos(3 * p), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(1, 8):
        before = params
        params, state = step(params, state)
        if i % 3 == 0:
            now = trit_stats(before, previous=last)
            read = bj.optim.read_trits(state)
            assert read.keys() == now.to_dict().keys()
            for name, value in now.to_dict().items():
                assert read[name] == pytest.approx(value, rel=1e-6, abs=1e-7)
            assert any(v > 0 for k, v in read.items() if k.endswith("flip_rate"))
            last, kept = now, read
        elif i > 3:
            assert bj.optim.read_trits(state) == kept  # between looks nothing changes


@pytest.mark.standard_promotion
@cases("dtype", [jnp.float32, jnp.bfloat16], core=[jnp.bfloat16])
def test_updates_pass_unchanged_in_a_donated_scan(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), params_of())
    watched = optax.chain(bj.optim.watch_trits(every=2), optax.sgd(0.1))

    def run(tx):
        def body(carry, _):
            params, state = carry
            grads = jax.tree.map(jnp.sin, params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        scan = jax.jit(lambda c: jax.lax.scan(body, c, None, 5)[0], donate_argnums=0)
        return scan(jax.tree.map(jnp.copy, (params, tx.init(params))))

    jax.tree.map(np.testing.assert_array_equal, run(watched)[0], run(optax.sgd(0.1))[0])
    state = run(watched)[1]
    codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]
    assert sum(c.size for c in codes) == 3 * 7 + 2 * 5  # two bits a weight


def test_the_transform_sees_stacked_boxed_kernels():
    stack = jnp.stack([jnp.asarray(kernel(i)) for i in range(3)])

    def axes(path, leaf):
        return {"contracting_axes": 1, "batch_axes": 0}

    tx = bj.optim.watch_trits(every=1, config=bj.PHASE4, axes=axes)
    first, second = (
        {"kernel": nn.Partitioned(w, (None, None, "model"))} for w in (stack, 2 - stack)
    )
    _, state = jax.jit(tx.update)(first, tx.init(first), second)
    last = trit_stats(first, config=bj.PHASE4, axes=axes)
    now = trit_stats(second, previous=last, config=bj.PHASE4, axes=axes)
    flips = np.mean(
        [(exact(w, bj.PHASE4)[1] != exact(2 - w, bj.PHASE4)[1]).mean() for w in np.asarray(stack)]
    )
    assert now.rows[0].flip_rate == pytest.approx(flips, abs=1e-6)
    assert bj.optim.read_trits(state) == pytest.approx(now.to_dict(), rel=1e-6)


@pytest.mark.standard_promotion
def test_nnx_optimizer():
    model = bj.nnx.BitLinear(12, 7, rngs=nnx.Rngs(0))
    tx = optax.chain(bj.optim.watch_trits(every=1), optax.sgd(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.asarray(kernel(3, (4, 12)))
    grads = nnx.jit(nnx.grad(lambda m: jnp.square(m(x)).sum()))(model)
    step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    step(model, optimizer, grads)
    assert bj.optim.read_trits(optimizer.opt_state)["kernel/flip_rate"] == 0
    step(model, optimizer, grads)
    assert bj.optim.read_trits(optimizer.opt_state)["kernel/flip_rate"] > 0


def test_what_is_refused():
    w = {"kernel": kernel()}
    with pytest.raises(ValueError, match=r"trit_stats: b/kernel .* `previous` has no codes of it"):
        trit_stats({"b": w}, previous=trit_stats({"a": w}))
    with pytest.raises(ValueError, match=r"`previous` has codes of shape \(3, 7\)"):
        trit_stats({"kernel": kernel(shape=(16, 7))}, previous=trit_stats(w))
    with pytest.raises(ValueError, match=r"`previous` has b/kernel, which is no selected kernel"):
        trit_stats({"a": w}, previous=trit_stats({"a": w, "b": w}))
    for entry in (3, jnp.ones((12, 7)), bj.pack(jnp.asarray(w["kernel"]))):
        with pytest.raises(TypeError, match=r"`previous` must hold codes and scale for kernel"):
            trit_stats(w, previous={"kernel": entry})
    for near in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"trit_stats: `near` must be a finite number > 0"):
            trit_stats(w, near=near)
    with pytest.raises(TypeError, match=r"trit_stats: `config` must be a TernaryConfig.*int8"):
        trit_stats(w, select=lambda path, leaf: bj.Int8Config())
    with pytest.raises(ValueError, match=r"`inputs` has x, .* those are kernel"):
        trit_stats(w, inputs={"x": jnp.ones((2, 12))})
    with pytest.raises(ValueError, match=r"trit_stats: `select` matches nothing"):
        trit_stats(w, select=lambda path, leaf: False)
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"watch_trits: `every` must be an integer >= 1"):
            bj.optim.watch_trits(every)
    tx = bj.optim.watch_trits()
    state = tx.init(params_of())
    with pytest.raises(ValueError, match="watch_trits: `params` is missing"):
        tx.update(params_of(), state)
    with pytest.raises(ValueError, match=r"has the kernels kernel, and the state was made for a/k"):
        tx.update(w, state, w)
    other = params_of() | {"b": {"kernel": jnp.asarray(kernel(shape=(16, 5)))}}
    with pytest.raises(ValueError, match=r"watch_trits: b/kernel has codes of shape \(4, 5\)"):
        tx.update(other, state, other)
    with pytest.raises(ValueError, match=r"read_trits: `opt_state` holds 0 states"):
        bj.optim.read_trits(optax.sgd(1.0).init(params_of()))
