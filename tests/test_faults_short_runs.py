"""Defaults that fit a run of any length, and hyperparameters that optax turns into arrays."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)}


@pytest.mark.parametrize("steps", [2, 3, 10, 100, 750, 1000, 3750, 100_000])
def test_the_recipe_needs_no_argument_but_steps(steps):
    lr = bj.optim.two_stage_lr(steps)
    rates = np.array([lr(t) for t in sorted({*range(0, steps + 1, -(-steps // 500)), steps})])
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert (float(lr(round(steps / 2))), float(lr(steps))) == (np.float32(5e-4), 0.0)
    warmup = min(375, round(steps / 2) // 5)
    np.testing.assert_allclose(lr(warmup), 1.5e-3)
    if warmup:
        assert lr(0) == 0
        assert float(lr(warmup - 1)) < float(lr(warmup))
    tx = bj.optim.b158_adamw(steps)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert jnp.isfinite(updates["kernel"]).all()


@pytest.mark.parametrize("switch", [0.01, 0.5, 0.99])
def test_a_default_warmup_leaves_most_of_the_first_stage(switch):
    for steps in (2, 5, 17, 400, 5000):
        lr, middle = bj.optim.two_stage_lr(steps, switch=switch), max(1, round(steps * switch))
        top = max(float(lr(t)) for t in range(min(middle, steps - 1)))
        np.testing.assert_allclose(top, 1.5e-3, rtol=1e-6)


def test_a_warmup_that_was_asked_for_is_not_shortened():
    assert bj.optim.two_stage_lr(100, warmup_steps=50)(49) < 1.5e-3
    with pytest.raises(ValueError, match="`warmup_steps` must be at most 50"):
        bj.optim.b158_adamw(100, warmup_steps=51)


FACTORIES = {
    "b158_adamw": ({"steps": 100}, ()),
    "b158_adamw, all given": (
        {"steps": 100, "first": 1e-3, "second": 1e-4, "warmup_steps": 5, "weight_decay": 0.1},
        (),
    ),
    "grokfast_ema": ({"start_step": 2}, ()),
    "grokfast_ma": ({"window_size": 3}, ("window_size",)),
    "mugrokfast": ({"learning_rate": 1e-3, "weight_decay": 0.1, "ns_steps": 5, "qk_tau": 30.0}, ()),
    "mugrokfast, by phase": ({"phase": "curriculum"}, ()),
    "watch_trits": ({"every": 2, "near": 0.1}, ()),
    "clip_by_max_logits": ({"tau": 30.0}, ()),
    "mugrokfast, in bfloat16": ({"learning_rate": 1e-3, "mu_dtype": jnp.bfloat16}, ()),
    "grokfast_ema, in bfloat16": ({"accumulator_dtype": jnp.bfloat16}, ()),
    "grokfast_ma, in bfloat16": (
        {"window_size": 3, "buffer_dtype": jnp.bfloat16},
        ("window_size",),
    ),
    "mugrokfast, selected": (
        {"learning_rate": 1e-3, "select": bj.only("kernel")},
        ("select", "axes"),
    ),
    "watch_trits, selected": ({"every": 2, "select": bj.only("kernel")}, ("select",)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_every_optimizer_under_inject_hyperparams(name):
    """Numbers arrive as arrays in ``init`` and as tracers in a jitted ``update``."""
    options, static = FACTORIES[name]
    factory = getattr(bj.optim, name.split(",")[0])
    extra = {}
    params = PARAMS
    if name == "clip_by_max_logits":
        params = {key: {"kernel": jnp.ones((4, 1, 2))} for key in ("query", "key")}
        extra = {"max_logits": jnp.array([120.0])}
    runs = []
    for tx in (factory(**options), optax.inject_hyperparams(factory, static)(**options)):
        state, update, p = jax.jit(tx.init)(params), jax.jit(tx.update), params
        for _ in range(4):
            updates, state = update(jax.tree.map(jnp.ones_like, p), state, p, **extra)
            p = optax.apply_updates(p, updates)
        runs.append(p)
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_a_dtype_is_injected_as_a_dtype():
    # With an array for b1, optax rounds a moment in bfloat16 elsewhere: no bits are compared.
    tx = optax.inject_hyperparams(bj.optim.b158_adamw)(steps=100, mu_dtype=jnp.bfloat16)
    state = jax.jit(tx.init)(PARAMS)
    updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.bfloat16
    assert jnp.isfinite(updates["kernel"]).all()


@pytest.mark.parametrize("select", [bj.only("kernel"), bj.exclude("head")])
def test_a_selector_that_is_taken_for_a_schedule_says_so(select):
    for tx in (
        optax.inject_hyperparams(bj.optim.mugrokfast)(learning_rate=1e-3, select=select),
        optax.inject_hyperparams(bj.optim.watch_trits)(select=select),
    ):
        with pytest.raises(TypeError, match=r"^select: .*static_args=\('select',\)"):
            tx.init(PARAMS)


def test_injected_steps_can_be_changed_during_a_run():
    tx = optax.inject_hyperparams(bj.optim.b158_adamw)(steps=1000)
    state = tx.init(PARAMS)
    assert {"steps", "switch", "weight_decay"} <= set(state.hyperparams)
    state.hyperparams["steps"] = jnp.int32(100)
    updates, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert jnp.isfinite(updates["kernel"]).all()


@pytest.mark.parametrize("kind", [int, np.int32, jnp.int32, np.asarray])
def test_schedules_take_numbers_of_every_kind(kind):
    lr = bj.optim.two_stage_lr(kind(1000), warmup_steps=kind(10))
    strength = bj.optim.strength_schedule(kind(10), start=kind(5))
    np.testing.assert_allclose([lr(10), lr(500), strength(10)], [1.5e-3, 5e-4, 0.5], rtol=1e-6)


def test_bad_numbers_are_refused_as_arrays_too():
    bad = {
        "steps": lambda v: bj.optim.two_stage_lr(v(1)),
        "warmup_steps": lambda v: bj.optim.two_stage_lr(100, warmup_steps=v(60)),
        "every": lambda v: bj.optim.watch_trits(v(0)),
        "tau": lambda v: bj.optim.clip_by_max_logits(v(0)),
        "start_step": lambda v: bj.optim.grokfast_ema(start_step=v(-1)),
        "alpha": lambda v: bj.optim.grokfast_ema(v(1)),
    }
    for (name, make), kind in itertools.product(bad.items(), (int, np.int64, jnp.asarray)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            make(kind)
