"""Filters, routing, QK-clip and schedules against float64 NumPy, from the formulas."""

import collections
import logging
import os
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from optax import contrib

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion
STEPS = 200
SHAPES = {"a": {"kernel": (5, 3)}, "b": (7,)}


def tree(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: rng.normal(size=s).astype(dtype), SHAPES, is_leaf=is_shape)


def ema_oracle(grads, alpha, lamb, seed="first", start=0, track=True):
    """alpha and lamb are functions of the step."""
    e, weight, out = np.zeros_like(grads[0]), 0.0, []
    for t, g in enumerate(grads):
        if track or t >= start:
            a = 0.0 if seed == "first" and weight == 0 else alpha(t)
            e = a * e + (1 - a) * g
            weight = a * weight + 1 - a
        slow = e / weight if seed == "debiased" and weight else e
        out.append(g + lamb(t) * slow if t >= start else g)
    return np.array(out)


def ma_oracle(grads, window, lamb, kind="mean", warmup=True):
    ring, out = collections.deque(maxlen=window), []
    for t, g in enumerate(grads):
        ring.append(g)
        average = sum(ring) / (len(ring) if kind == "mean" else 1)
        out.append(g + lamb(t) * average if len(ring) == window or not warmup else g)
    return np.array(out)


def run(tx, grads, params=None):
    state, out = tx.init(grads[0]), []
    update = jax.jit(tx.update, donate_argnums=1)
    for g in grads:
        updates, state = update(g, state, params)
        out.append(updates)
    return out, state


EMA = {
    "paper": {},
    "other": {"alpha": 0.9, "lamb": 0.3},
    "zeros": {"seed": "zeros"},
    "debiased": {"seed": "debiased"},
    "waits": {"start_step": 30},
    "seeded late": {"start_step": 30, "track_while_waiting": False},
    "debiased late": {"seed": "debiased", "start_step": 30, "track_while_waiting": False},
    "no decay": {"alpha": 0.0, "lamb": 1.0},
    "scheduled": {
        "alpha": lambda t: 0.5 + 0.4 * (t >= 50),
        "lamb": lambda t: 2.0 * (t >= 20),
    },
}


@pytest.mark.parametrize("name", EMA)
def test_ema_is_its_formula(name):
    options = EMA[name]
    grads = [tree(t, np.float32) for t in range(STEPS)]
    out, _ = run(bj.optim.grokfast_ema(**options), grads)

    def function(key, default):
        value = options.get(key, default)
        return value if callable(value) else lambda t: value

    for leaf in (lambda g: g["a"]["kernel"], lambda g: g["b"]):
        want = ema_oracle(
            [leaf(g).astype(np.float64) for g in grads],
            function("alpha", 0.98),
            function("lamb", 2.0),
            options.get("seed", "first"),
            options.get("start_step", 0),
            options.get("track_while_waiting", True),
        )
        np.testing.assert_allclose([leaf(u) for u in out], want, rtol=0, atol=1e-6 * 20)
        assert np.abs(np.array([leaf(u) for u in out]) - want).mean() < 1e-6


@pytest.mark.parametrize("window", [1, 7, 50])
@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_ma_is_its_formula(window, kind, warmup, dtype):
    grads = [jnp.asarray(tree(t, np.float32)["b"]) for t in range(STEPS)]
    tx = bj.optim.grokfast_ma(
        window, lambda t: 0.5 + 0.5 * (t > 9), filter_type=kind, warmup=warmup, buffer_dtype=dtype
    )
    out, state = run(tx, grads)
    stored = [np.asarray(g.astype(dtype or g.dtype), np.float64) for g in grads]
    want = ma_oracle(stored, window, lambda t: 0.5 + 0.5 * (t > 9), kind, warmup)
    want += np.array(grads, np.float64) - np.array(stored)  # only the window is rounded
    np.testing.assert_allclose(np.array(out), want, rtol=2e-6, atol=5e-6)
    assert state.window.dtype == (jnp.uint16 if dtype else jnp.float32)


@pytest.mark.parametrize("name", ["grokfast_ema", "grokfast_ma"])
def test_low_pass(name):
    lamb = 2.0
    filters = {
        "grokfast_ema": bj.optim.grokfast_ema(lamb=lamb),
        "grokfast_ma": bj.optim.grokfast_ma(100, lamb),
    }
    for sign, low, high in ((1.0, 2.999, 3.001), (-1.0, 0.9, 1.1)):
        grads = [jnp.float32(sign**t) for t in range(400)]
        out, _ = run(filters[name], grads)
        gain = float(np.abs(out[-1]))
        assert low <= gain <= high, (name, sign, gain)


def test_ema_impulse():
    out, _ = run(bj.optim.grokfast_ema(), [jnp.float32(t == 0) for t in range(4)])
    np.testing.assert_allclose(out, [3.0, 2 * 0.98, 2 * 0.9604, 2 * 0.941192], rtol=1e-6)


def test_ma_sum_does_not_drift():
    """After 1e5 steps with spikes, the running sum is the sum of the ring to its rounding."""
    tx = bj.optim.grokfast_ma(10, 1.0, filter_type="sum")
    grads = jax.random.normal(jax.random.key(0), (100_000, 4))
    spikes = jax.random.bernoulli(jax.random.key(1), 1e-3, (100_000, 1))
    grads = grads * jnp.where(spikes, 1e4, 1.0)
    grads = grads.at[-25:].set(grads[-25:] / jnp.abs(grads[-25:]))
    state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(grads[0]), grads)
    exact = np.asarray(grads[-10:], np.float64).sum(0)
    np.testing.assert_allclose(state.total, exact, rtol=0, atol=1e-6 * 10)


@pytest.mark.parametrize("at", range(12))
def test_nan_leaves_the_sums_within_two_windows(at):
    tx = bj.optim.grokfast_ma(5, 1.0, warmup=False)
    grads = [jnp.float32(jnp.nan if t == at else 1.0) for t in range(at + 11)]
    out, _ = run(tx, grads)
    assert np.isnan(out[at])
    assert float(out[-1]) == 2.0


def test_a_window_stays_in_place():
    """No copy of the ring, which at a window of 100 would be 67 times the update."""
    params = {"w": jnp.zeros((64, 64))}
    for dtype in (None, jnp.bfloat16):
        tx = optax.chain(bj.optim.grokfast_ma(50, buffer_dtype=dtype), optax.adamw(1e-3))
        step = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p), donate_argnums=1)
        compiled = step.lower(params, tx.init(params), params).compile()
        copies = [
            line
            for line in compiled.as_text().splitlines()
            if " copy(" in line and "[50,64,64]" in line.split("copy(")[0]
        ]
        assert copies == []
        assert compiled.memory_analysis().temp_size_in_bytes < 64 * 64 * 4 * 3


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, bitnet_jax as bj
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
g = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    for tx in (bj.optim.grokfast_ema(), bj.optim.grokfast_ma(2, warmup=False)):
        alone = tx.init(g)
        for _ in range(3):
            want, alone = jax.jit(tx.update)(g, alone)
        with jax.set_mesh(mesh):
            w = jax.device_put(g, NamedSharding(mesh, P("x", "y")))
            state = tx.init(w)
            for _ in range(3):
                got, state = jax.jit(tx.update)(w, state)
        for leaf in (got, *jax.tree.leaves(state)):
            assert leaf.ndim == 0 or leaf.sharding.spec[-2:] == ("x", "y"), leaf.sharding
        np.testing.assert_allclose(got, want, rtol=1e-6)
print("sharded")
"""


def test_states_are_sharded_as_their_gradients():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "sharded", done.stderr


def test_memory_is_said_before_it_is_taken(caplog):
    params = tree(dtype=np.float32)
    for dtype in (None, jnp.bfloat16):
        with caplog.at_level(logging.INFO, "bitnet_jax.optim._grokfast_ma"):
            state = bj.optim.grokfast_ma(9, buffer_dtype=dtype).init(params)
        taken = sum(x.nbytes for x in jax.tree.leaves(state))
        assert bj.optim.grokfast_ma_bytes(params, 9, buffer_dtype=dtype) == taken
    assert "a window of 9 gradients" in caplog.text


def test_bfloat16_average_does_not_stand_still():
    grads = [jnp.full(3, 1.0 + (t > 0), jnp.bfloat16) for t in range(400)]
    _, state = run(bj.optim.grokfast_ema(), grads)
    assert state.average.dtype == jnp.float32
    np.testing.assert_allclose(state.average, 2.0, atol=1e-2)
    out, state = run(bj.optim.grokfast_ema(accumulator_dtype=jnp.bfloat16), grads)
    assert (state.average.dtype, out[-1].dtype) == (jnp.bfloat16, jnp.bfloat16)


TRANSFORMS = {
    "grokfast_ema": lambda **k: bj.optim.grokfast_ema(**{"lamb": 0.5} | k),
    "grokfast_ma": lambda **k: bj.optim.grokfast_ma(**{"window_size": 3, "lamb": 0.5} | k),
    "mugrokfast": lambda **k: bj.optim.mugrokfast(**{"learning_rate": 1e-2} | k),
    "b158_adamw": lambda **k: bj.optim.b158_adamw(100, warmup_steps=5, **k),
    "watch_trits": lambda **k: bj.optim.watch_trits(2, **k),
}
FILTERS = ("grokfast_ema", "grokfast_ma")


def follow(tx, steps=7, dtype=jnp.float32):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree())
    state, update = tx.init(params), jax.jit(tx.update, donate_argnums=1)
    for t in range(steps):
        grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(t + 1))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def equal(one, other):
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
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
def test_mixed_dtypes(name):
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": jnp.ones(3, jnp.float16)}
    out, _ = run(TRANSFORMS[name](), [params] * 5)
    for key, x in params.items():
        assert out[-1][key].dtype == x.dtype
        np.testing.assert_allclose(out[-1][key].astype(np.float32), 1.5, rtol=1e-2)


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
        (lambda: bj.optim.grokfast_ema(seed="zero"), "Did you mean 'zeros'"),
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


def test_routing_by_selector_and_contraction():
    params = {
        "embed": {"embedding": jnp.ones((9, 4))},
        "conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)},
        "out": {"kernel": jnp.ones((2, 4, 8))},
        "head": {"kernel": jnp.ones((4, 9))},
        "up": {"kernel": jnp.ones((4, 9))},
    }
    axes = {"conv": (0, 1, 2), "out": (0, 1)}
    found = bj.optim.muon_dimensions(
        params,
        select=bj.exclude("head"),
        axes=lambda path, _: {"contracting_axes": axes[path[0]]} if path[0] in axes else None,
    )
    dims = contrib.MuonDimensionNumbers
    assert found["conv"] == {"kernel": dims((0, 1, 2), (3,)), "bias": None}
    assert found["out"]["kernel"] == dims((0, 1), (2,))
    assert found["up"]["kernel"] == dims((0,), (1,))
    assert found["embed"]["embedding"] is found["head"]["kernel"] is None
    with pytest.raises(ValueError, match="only a 2-D kernel"):
        bj.optim.muon_dimensions(params)
    with pytest.raises(ValueError, match="matches nothing"):
        bj.optim.mugrokfast(1e-3, select=bj.only("nowhere")).init(params)


def test_muon_orthogonalises_kernels_only():
    grads = jax.tree.map(jnp.asarray, tree(1, np.float32)) | {
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (2, 2, 4, 3))}
    }
    axes = lambda p, _: {"contracting_axes": (0, 1, 2)} if p[0] == "conv" else None  # noqa: E731
    tx = bj.optim.mugrokfast(1.0, lamb=0.0, nesterov=False, adam_learning_rate=0.5, axes=axes)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    for kernel in (updates["a"]["kernel"], updates["conv"]["kernel"].reshape(16, 3)):
        singular = np.linalg.svd(kernel, compute_uv=False)
        assert singular.min() > 0.5
        assert singular.max() < 1.5
    np.testing.assert_allclose(np.abs(updates["b"]), 0.5, rtol=1e-2)


def test_the_filter_sees_straight_through_gradients():
    """dW = x_q^T g of the latent kernel, averaged as it is."""
    layer, x = bj.linen.BitDense(3), jax.random.normal(jax.random.key(0), (8, 5))
    params = layer.init(jax.random.key(1), x)["params"]
    grads = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)
    codes, scale = bj.quantize_activations(x)
    want = np.repeat((np.asarray(codes) * np.asarray(scale) / 127).sum(0)[:, None], 3, 1)
    out, _ = run(bj.optim.grokfast_ema(lamb=2.0), [grads])
    np.testing.assert_allclose(out[0]["kernel"], 3 * want, rtol=1e-5)


@pytest.mark.parametrize("phase", list(bj.optim.PHASES))
def test_phases_are_their_settings(phase):
    preset = bj.optim.PHASES[phase]
    params = jax.tree.map(jnp.asarray, tree(0, np.float32))
    by_name = bj.optim.mugrokfast(phase=phase)
    by_hand = bj.optim.mugrokfast(
        preset.learning_rate, alpha=0.98, lamb=preset.lamb, momentum=0.95, ns_steps=5
    )
    assert equal(follow(by_name)[0], follow(by_hand)[0])
    del params


def attention_case(ternary, heads=4):
    model = nn.MultiHeadDotProductAttention(heads, qkv_features=32)
    if ternary:
        model = bj.linen.ternarize(
            model, select=lambda path, _: bj.PHASE4 if path[-1] == "kernel" else None
        )
    x = 20.0 * jax.random.normal(jax.random.key(0), (2, 9, 16))
    params = model.init(jax.random.key(1), x)["params"]
    params["query"]["bias"] = 3.0 * jax.random.normal(jax.random.key(2), (heads, 8))

    def logits(params):
        kept = model.apply(
            {"params": params},
            x,
            capture_intermediates=lambda m, _: m.name in ("query", "key"),
        )[1]["intermediates"]
        q, k = (kept[name]["__call__"][0] for name in ("query", "key"))
        return bj.optim.attention_max_logits(q, k)

    return params, logits


@pytest.mark.parametrize("ternary", [False, True])
def test_qk_clip_bounds_attention_logits(ternary):
    params, logits = attention_case(ternary)
    before = logits(params)
    tau = float(jnp.median(before))
    after = logits(bj.optim.qk_clip(params, before, tau))
    assert before.max() > tau
    np.testing.assert_allclose(after, jnp.minimum(before, tau), rtol=1e-4)
    tx = optax.chain(optax.sgd(0.0), bj.optim.clip_by_max_logits(tau))
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params, max_logits={"": before}
    )
    np.testing.assert_allclose(logits(optax.apply_updates(params, updates)), after, rtol=1e-4)


def test_qk_clip_shares_keys_and_leaves_the_rest():
    q = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    k = jax.random.normal(jax.random.key(1), (2, 6, 2, 8))
    x = jnp.eye(48)
    params = {
        "layer": {
            "query": {"kernel": q.reshape(12, 32)},
            "key": {"kernel": k.reshape(12, 16)},
            "value": {"kernel": x},
        }
    }
    largest = bj.optim.attention_max_logits(q, k)
    tau = float(largest.min()) * 1.01
    done = bj.optim.qk_clip(params, {"layer": largest}, tau)["layer"]
    again = bj.optim.attention_max_logits(
        done["query"]["kernel"].reshape(q.shape), done["key"]["kernel"].reshape(k.shape)
    )
    np.testing.assert_allclose(again, jnp.minimum(largest, tau), rtol=1e-5)
    assert done["value"]["kernel"] is x
    same = bj.optim.qk_clip(params, {"layer": largest * jnp.nan}, tau)
    assert equal(same, params)
    with pytest.raises(ValueError, match="no query and no key kernel"):
        bj.optim.qk_clip(params, {"elsewhere": largest}, tau)
    with pytest.raises(ValueError, match="does not divide"):
        bj.optim.qk_clip(params, {"layer": jnp.ones(5)}, tau)


def test_mugrokfast_clips_where_it_is_given_logits():
    params, logits = attention_case(False)
    axes = lambda path, _: {  # noqa: E731
        "contracting_axes": (0, 1) if path[0] == "out" else 0
    }
    tx = bj.optim.mugrokfast(1e-6, axes=axes, qk_tau=5.0)
    grads, before = jax.tree.map(jnp.ones_like, params), logits(params)
    updates, _ = tx.update(grads, tx.init(params), params, max_logits=before)
    assert logits(optax.apply_updates(params, updates)).max() <= 5.0 * 1.01
    plain = bj.optim.mugrokfast(1e-6, axes=axes)
    with pytest.raises(ValueError, match="there is no bound"):
        plain.update(grads, plain.init(params), params, max_logits=before)


def test_nnx_optimizer_takes_them():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    bj.nnx.ternarize(model)
    tx = optax.chain(bj.optim.grokfast_ema(), bj.optim.mugrokfast(1e-2))
    optimizer, x = nnx.Optimizer(model, tx, wrt=bj.nnx.trainable), jnp.ones((2, 8))
    before = model.kernel.get_value()
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda m: jnp.square(m(x) - 1.0).mean())(model))
    assert np.abs(model.kernel.get_value() - before).max() > 0


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_strength_ends_at_one_to_the_bit(shape):
    ramp = bj.optim.strength_schedule(37, start=5, shape=shape)
    values = np.array([ramp(t) for t in range(60)])
    assert values.dtype == np.float32
    assert (values[:6] == 0).all()
    assert (values[42:] == 1).all()
    assert (np.diff(values) >= 0).all()
    way = (np.arange(5, 43) - 5) / 37
    want = way if shape == "linear" else 0.5 - 0.5 * np.cos(np.pi * way)
    np.testing.assert_allclose(values[5:43], want, atol=1e-6)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_two_stages(shape):
    lr = bj.optim.two_stage_lr(1000, (1e-2, 4e-3), (2e-3, 0.0), warmup_steps=100, shape=shape)
    decay = bj.optim.two_stage_weight_decay(1000)
    values = np.array([lr(t) for t in range(1101)])
    np.testing.assert_allclose(values[[0, 50, 100, 500, 1000, 1100]], [0, 5e-3, 1e-2, 2e-3, 0, 0])
    middle = 100 + 200
    np.testing.assert_allclose(values[middle], 7e-3, rtol=1e-5)
    assert (float(decay(499)), float(decay(500))) == (pytest.approx(0.1), 0.0)
