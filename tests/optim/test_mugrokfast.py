"""Routing to Muon and QK-clip against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from flax import nnx
from optax import contrib
from transforms import equal, follow, tree

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion


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
        "conv": {"kernel": normal(2, 2, 4, 3)}
    }
    axes = lambda p, _: {"contracting_axes": (0, 1, 2)} if p[0] == "conv" else None  # noqa: E731
    tx = bj.optim.mugrokfast(1.0, lamb=0.0, nesterov=False, adam_learning_rate=0.5, axes=axes)
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(grads), grads)
    for kernel in (updates["a"]["kernel"], updates["conv"]["kernel"].reshape(16, 3)):
        singular = np.linalg.svd(kernel, compute_uv=False)
        assert singular.min() > 0.5
        assert singular.max() < 1.5
    np.testing.assert_allclose(np.abs(updates["b"]), 0.5, rtol=1e-2)


@cases("phase", list(bj.optim.PHASES), core=["curriculum"])
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
            model, lambda path, _: bj.PHASE4 if path[-1] == "kernel" else None
        )
    x = 20.0 * normal(2, 9, 16)
    params = params_of(model, x)
    params["query"]["bias"] = 3.0 * normal(heads, 8, seed=2)

    @jax.jit
    def logits(params):
        kept = model.apply(
            {"params": params},
            x,
            capture_intermediates=lambda m, _: m.name in ("query", "key"),
        )[1]["intermediates"]
        q, k = (kept[name]["__call__"][0] for name in ("query", "key"))
        return bj.optim.attention_max_logits(q, k)

    return params, logits


@cases("ternary", [False, True], core=[True])
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
    q = normal(2, 6, 4, 8)
    k = normal(2, 6, 2, 8, seed=1)
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
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params, max_logits=before)
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

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.square(m(x) - 1.0).mean())(model))

    for _ in range(2):
        step(model, optimizer)
    assert np.abs(model.kernel.get_value() - before).max() > 0
