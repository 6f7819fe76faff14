"""Grokfast filters against float64 NumPy, from the formulas."""

import collections
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from draws import normal, params_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from transforms import FILTERS, TRANSFORMS, tree

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion
STEPS = 200


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
    "zeros": {"init": "zeros"},
    "debiased": {"init": "debiased"},
    "waits": {"start_step": 30},
    "seeded late": {"start_step": 30, "track_while_waiting": False},
    "debiased late": {"init": "debiased", "start_step": 30, "track_while_waiting": False},
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
            options.get("init", "first"),
            options.get("start_step", 0),
            options.get("track_while_waiting", True),
        )
        np.testing.assert_allclose([leaf(u) for u in out], want, rtol=0, atol=1e-6 * 20)
        assert np.abs(np.array([leaf(u) for u in out]) - want).mean() < 1e-6


@cases("window", [1, 7, 50], core=[7])
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
    grads = np.array(normal(100_000, 4))
    spikes = np.random.default_rng(1).random((100_000, 1)) < 1e-3
    grads = grads * np.where(spikes, np.float32(1e4), np.float32(1))
    grads[-25:] /= np.abs(grads[-25:])
    state, _ = jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), tx.init(grads[0]), grads)
    exact = np.asarray(grads[-10:], np.float64).sum(0)
    np.testing.assert_allclose(state.total, exact, rtol=0, atol=1e-6 * 10)


@cases("at", range(12), core=[0, 5, 11])
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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", FILTERS)
def test_states_are_sharded_as_their_gradients(kind, name):
    g = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    options = {"grokfast_ema": {}, "grokfast_ma": {"window_size": 2, "warmup": False}}[name]
    tx = getattr(bj.optim, name)(**options)
    alone, update = tx.init(g), jax.jit(tx.update)
    for _ in range(3):
        want, alone = update(g, alone)
    with jax.set_mesh(mesh):
        w = jax.device_put(g, NamedSharding(mesh, P("x", "y")))
        state = tx.init(w)
        for _ in range(3):
            got, state = update(w, state)
    for leaf in (got, *jax.tree.leaves(state)):
        assert leaf.ndim == 0 or leaf.sharding.spec[-2:] == ("x", "y"), leaf.sharding
    np.testing.assert_allclose(got, want, rtol=1e-6)


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


@pytest.mark.parametrize("name", FILTERS)
def test_mixed_dtypes(name):
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "c": jnp.ones(3, jnp.float16)}
    out, _ = run(TRANSFORMS[name](), [params] * 5)
    for key, x in params.items():
        assert out[-1][key].dtype == x.dtype
        np.testing.assert_allclose(out[-1][key].astype(np.float32), 1.5, rtol=1e-2)


def test_the_filter_sees_straight_through_gradients():
    """dW = x_q^T g of the latent kernel, averaged as it is."""
    layer, x = bj.linen.BitDense(3), normal(8, 5)
    params = params_of(layer, x)
    grads = jax.jit(jax.grad(lambda p: layer.apply({"params": p}, x).sum()))(params)
    codes, scale = bj.quantize_activations(x)
    want = np.repeat((np.asarray(codes) * np.asarray(scale) / 127).sum(0)[:, None], 3, 1)
    out, _ = run(bj.optim.grokfast_ema(lamb=2.0), [grads])
    np.testing.assert_allclose(out[0]["kernel"], 3 * want, rtol=1e-5)
