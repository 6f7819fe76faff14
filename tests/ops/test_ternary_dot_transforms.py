"""`ternary_dot` under vmap, scan, remat, donation and hessians."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from dots import CONFIGS, GROUPS, INT8, gaussian
from jax.ad_checkpoint import checkpoint_policies
from native_paths import needs_it

import bitnet_jax as bj
from bitnet_jax import _native


@cases("config", {"b158": bj.B158, "groups": GROUPS}, core=["groups"])
def test_vmap_over_x_over_w_and_over_both(config):
    x, w = gaussian((3, 6, 24)), gaussian((3, 24, 10), 1)
    dot = functools.partial(bj.ternary_dot, weights=config)
    one = [[oracles.dot32(a, b, config, INT8) for b in w] for a in x]
    over_x = jax.jit(jax.vmap(dot, (0, None)))(x, w[0])
    over_w = jax.jit(jax.vmap(dot, (None, 0)))(x[0], w)
    both = jax.jit(jax.vmap(dot))(x, w)
    grid = jax.jit(jax.vmap(jax.vmap(dot, (None, 0)), (0, None)))(x, w)
    examples = jax.jit(jax.vmap(jax.vmap(dot, (0, None)), (0, None)))(x, w[0])
    oracles.assert_same_bits(over_x, np.stack([one[i][0] for i in range(3)]))
    oracles.assert_same_bits(over_w, np.stack([one[0][i] for i in range(3)]))
    oracles.assert_same_bits(both, np.stack([one[i][i] for i in range(3)]))
    oracles.assert_same_bits(grid, np.array(one))
    oracles.assert_same_bits(examples, np.stack([one[i][0] for i in range(3)]))


def test_vmap_moves_other_axes_and_per_example_gradients():
    x, w, g = gaussian((6, 24, 3)), gaussian((24, 10), 1), gaussian((6, 10), 2)
    y = jax.jit(jax.vmap(bj.ternary_dot, (2, None), 2))(x, w)
    for i in range(3):
        oracles.assert_same_bits(y[..., i], oracles.dot32(x[..., i], w, bj.B158, INT8))

    def dw(row, g):
        return jax.grad(lambda w: (bj.ternary_dot(row, w) * g).sum())(w)

    each = jax.jit(jax.vmap(dw))(x[..., 0], g)
    for row, gradient, got in zip(x[..., 0], g, each, strict=True):
        _, want = oracles.gradients64(row, w, gradient, bj.B158, INT8)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_it), False])
def test_a_lone_row_in_vmap_becomes_one_product_of_all_rows(native, monkeypatch):
    # Padding each lone row inside the batch would cost several times as much.
    monkeypatch.setattr(_native, "preferred", lambda: native)
    rows = jax.vmap(lambda x, w: bj.ternary_dot(x, w), (0, None))  # not traced before
    text = jax.jit(rows).lower(gaussian((32, 24)), gaussian((24, 10))).as_text()
    product = re.compile(
        r"bitnet_multiply_codes.*: \(tensor<1x32x24xi8>, .*tensor<1x24x10xi8>"
        if native
        else r"\(tensor<32x24xi8>, tensor<24x10xi8>\) -> tensor<32x10xi32>"
    )
    assert len(product.findall(text)) == 1


def test_scan_over_stacked_kernels_is_the_loop():
    x, w = gaussian((5, 16)), gaussian((4, 16, 16), 1)

    def step(h, kernel):
        return jnp.maximum(bj.ternary_dot(h, kernel), 0.0) + h, None

    def loss(w):
        return jax.lax.scan(step, x, w)[0]

    h = x
    for kernel in w:
        h = np.maximum(oracles.dot32(h, kernel, bj.B158, INT8), 0) + h
    oracles.assert_same_bits(jax.jit(loss)(w), h)
    looped = jax.jit(jax.grad(lambda w: functools.reduce(lambda h, k: step(h, k)[0], w, x).sum()))
    scanned = jax.jit(jax.grad(lambda w: loss(w).sum()))
    want = looped(w)
    np.testing.assert_allclose(scanned(w), want, rtol=1e-5, atol=1e-5)
    remat = jax.checkpoint(step, policy=checkpoint_policies.nothing_saveable)
    rematted = jax.jit(jax.grad(lambda w: jax.lax.scan(remat, x, w)[0].sum()))
    np.testing.assert_allclose(rematted(w), want, rtol=1e-5, atol=1e-5)


def test_remat_recomputes_the_same_gradient():
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)

    def loss(x, w):
        return (bj.ternary_dot(x, w) ** 2).sum()

    plain = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
    for policy in (None, checkpoint_policies.dots_saveable):
        remat = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1)))(x, w)
        jax.tree.map(oracles.assert_same_bits, remat, plain)


def test_a_training_step_may_donate_its_kernel():
    x = gaussian((5, 24))
    w = jnp.asarray(gaussian((24, 10), 1))
    want = np.asarray(w) - 0.1 * oracles.gradients64(x, w, np.ones((5, 10)), bj.B158, INT8)[1]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(w):
        return w - 0.1 * jax.grad(lambda w: bj.ternary_dot(x, w).sum())(w)

    new = step(w)
    assert w.is_deleted()
    np.testing.assert_allclose(new, want, rtol=1e-5, atol=1e-5)


@cases("config", CONFIGS, core=["groups"])
def test_only_int8_codes_and_scales_wait_for_the_backward_pass(config):
    x, w = gaussian((32, 24)), gaussian((24, 10), 1)
    pull = jax.jit(lambda x, w: jax.vjp(lambda x, w: bj.ternary_dot(x, w, config), x, w)[1])(x, w)
    saved = jax.tree.leaves(pull)
    assert {leaf.shape for leaf in saved if leaf.dtype == jnp.int8} == {(32, 24), (24, 10)}
    floats = sum(leaf.size for leaf in saved if leaf.dtype != jnp.int8)
    assert floats <= 32 + oracles.quantize32(w, config).scale[::4].size
    assert sum(leaf.nbytes for leaf in saved) < (x.nbytes + w.nbytes) / 2


def test_hessians_and_forward_mode_are_refused_or_zero():
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(bj.ternary_dot, (x, w), (x, w))
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(bj.fake_quantize, (w,), (w,))
