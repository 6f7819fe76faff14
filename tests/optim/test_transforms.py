"""Laws of every transform: chains, restores, masks, bad gradients, refusals."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import cases
from transforms import FILTERS, TRANSFORMS, equal, follow

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion


@pytest.mark.parametrize("name", TRANSFORMS)
@cases("dtype", [jnp.float32, jnp.bfloat16], core=[jnp.bfloat16])
def test_every_transform_under_chain_and_jit(name, dtype):
    params, _ = follow(optax.chain(TRANSFORMS[name](), optax.scale(0.5)), dtype=dtype)
    assert all(x.dtype == dtype and np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_under_multi_steps(name):
    params, state = follow(optax.MultiSteps(TRANSFORMS[name](), 2))
    assert int(state.gradient_step) == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_restores(name, tmp_path):
    tx = TRANSFORMS[name]()
    params, state = follow(tx)
    raw = flax.serialization.to_bytes(state)
    assert equal(flax.serialization.from_bytes(tx.init(params), raw), state)
    with ocp.StandardCheckpointer() as keeper:
        keeper.save(tmp_path / "state", state)
        keeper.wait_until_finished()
        assert equal(keeper.restore(tmp_path / "state", tx.init(params)), state)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_takes_masks_and_partitions(name):
    mask = {"a": {"kernel": True}, "b": False}
    params, _ = follow(optax.masked(TRANSFORMS[name](), mask))
    alone, _ = follow(
        optax.partition(
            {True: TRANSFORMS[name](), False: optax.identity()},
            {"a": {"kernel": True}, "b": False},
        )
    )
    assert equal(params, alone)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_survives_bad_gradients(name):
    tx = optax.apply_if_finite(TRANSFORMS[name](), 5)
    params, state = follow(tx)
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, after = jax.jit(tx.update)(bad, state, params)
    assert equal(after.inner_state, state.inner_state)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["grokfast_ema", "grokfast_ma", "mugrokfast", "b158_adamw"])
def test_every_transform_takes_an_empty_tree(name):
    tx = TRANSFORMS[name]()
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


@pytest.mark.parametrize(
    ("name", "static", "options"),
    [
        ("grokfast_ema", (), {"lamb": lambda t: 0.1 * t}),
        ("grokfast_ma", ("window_size",), {"lamb": lambda t: 0.1 * t, "window_size": 3}),
        ("mugrokfast", ("select", "axes"), {"learning_rate": lambda t: 0.01 / (1 + t)}),
    ],
)
def test_injected_schedules_are_schedules(name, static, options):
    factory = getattr(bj.optim, name)
    injected, _ = follow(optax.inject_hyperparams(factory, static)(**options))
    plain, _ = follow(factory(**options))
    for a, b in zip(jax.tree.leaves(injected), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FILTERS)
def test_trees_that_differ_are_named(name):
    tx = TRANSFORMS[name]()
    state = tx.init({"a": jnp.ones(3), "b": jnp.ones(2)})
    for updates, said in (
        ({"a": jnp.ones(3)}, "lacks b"),
        ({"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(1)}, "has c, unknown"),
        ({"a": jnp.ones(3), "b": jnp.ones(4)}, r"has b of shape \(4,\), in the state \(2,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            tx.update(updates, state)
    with pytest.raises(TypeError, match="has no gradient"):
        tx.init({"codes": jnp.ones(3, jnp.int8)})
    with pytest.raises(TypeError):
        tx.init(bj.pack_params({"kernel": jnp.ones((8, 4))})[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bj.optim.grokfast_ema(1.0), "`alpha` must be a number in .0, 1."),
        (lambda: bj.optim.grokfast_ema(jnp.float32(1.0)), "`alpha`"),
        (lambda: bj.optim.grokfast_ema(-0.1), "`alpha`"),
        (lambda: bj.optim.grokfast_ema(lamb=-1.0), "`lamb` must be a finite number >= 0"),
        (lambda: bj.optim.grokfast_ema(lamb=float("nan")), "`lamb`"),
        (lambda: bj.optim.grokfast_ema(init="zero"), "Did you mean 'zeros'"),
        (lambda: bj.optim.grokfast_ema(start_step=-1), "`start_step`"),
        (lambda: bj.optim.grokfast_ema(accumulator_dtype=jnp.int8), "`accumulator_dtype`"),
        (lambda: bj.optim.grokfast_ma(0), "`window_size` must be an integer >= 1"),
        (lambda: bj.optim.grokfast_ma(filter_type="median"), "`filter_type` must be one of"),
        (lambda: bj.optim.grokfast_ma(lamb=-5), "`lamb`"),
        (lambda: bj.optim.mugrokfast(phase="pretraining"), "Did you mean 'pretrain'"),
        (lambda: bj.optim.mugrokfast(), "`learning_rate` is missing"),
        (lambda: bj.optim.mugrokfast(1e-3, momentum=1.0), "`momentum`"),
        (lambda: bj.optim.two_stage_lr(1), "`steps`"),
        (lambda: bj.optim.two_stage_lr(100, warmup_steps=51), "`warmup_steps`"),
        (lambda: bj.optim.two_stage_lr(100, (1, 2, 3), warmup_steps=0), "`first`"),
        (lambda: bj.optim.two_stage_lr(100, warmup_steps=0, switch=1.0), "`switch`"),
        (lambda: bj.optim.two_stage_weight_decay(100, -0.1), "`first`"),
        (lambda: bj.optim.strength_schedule(0), "`steps`"),
        (lambda: bj.optim.strength_schedule(5, shape="square"), "`shape`"),
        (lambda: bj.optim.clip_by_max_logits(0.0), "`tau`"),
    ],
)
def test_bad_input_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_window_that_is_traced_is_refused():
    tx = optax.inject_hyperparams(bj.optim.grokfast_ma)(window_size=3)
    with pytest.raises(TypeError, match="static_args="):
        tx.init(jnp.ones(3))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("grokfast_ema", bj.optim.GrokfastEmaState),
        ("grokfast_ma", bj.optim.GrokfastMaState),
        ("watch_trits", bj.optim.WatchTritsState),
    ],
)
def test_states_have_public_types(name, kind):
    assert isinstance(TRANSFORMS[name]().init({"kernel": jnp.ones((8, 4))}), kind)


def test_presets_have_a_public_type():
    assert all(isinstance(preset, bj.optim.MuGrokfastPhase) for preset in bj.optim.PHASES.values())
