"""Straight-through estimators: on the grid forward, the closed form backward."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from jax.ad_checkpoint import checkpoint_policies

import bitnet_jax as bj

INT8 = bj.ActivationConfig()
GROUPS = bj.TernaryConfig(granularity=4)
CONFIGS = {"b158": bj.B158, "phase4": bj.PHASE4, "twn": bj.TWN, "groups": GROUPS}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
AXES = ("contracting_axes", "batch_axes")

fake_quantize = jax.jit(bj.fake_quantize, static_argnums=1, static_argnames=AXES)
ternary_dot = jax.jit(
    bj.ternary_dot,
    static_argnums=(2, 3),
    static_argnames=(*AXES, "strength", "dtype", "backward_dtype"),
)


def gaussian(shape, seed=0, dtype=np.float32, sigma=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * sigma).astype(dtype)


def vjp(x, w, g, *args, **kwargs):
    """Output and gradients of ternary_dot, in one program."""

    def run(x, w, g):
        y, pull = jax.vjp(lambda x, w: bj.ternary_dot(x, w, *args, **kwargs), x, w)
        return y, *pull(g.astype(y.dtype))

    return jax.jit(run)(x, w, g)


# fake_quantize ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_entry_is_on_the_grid(config, dtype):
    w = gaussian((24, 10), dtype=dtype, sigma=0.05)
    hat = fake_quantize(w, config)
    exact = oracles.quantize32(w, config)
    oracles.assert_same_bits(hat, (exact.codes * exact.scale).astype(dtype))
    assert set(np.sign(np.asarray(hat, np.float32)).ravel()) == {-1, 0, 1}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("strength", [1.0, 0.25, jnp.float32(1.0), jnp.float32(0.25)])
def test_the_gradient_of_fake_quantize_is_the_identity(dtype, strength):
    w, g = gaussian((24, 10), dtype=dtype), gaussian((24, 10), 1, dtype)
    _, pull = jax.vjp(lambda w: bj.fake_quantize(w, strength=strength), w)
    oracles.assert_same_bits(pull(g)[0], g)
    _, pull = jax.vjp(lambda x: bj.fake_quantize_activations(x, strength=strength), w)
    oracles.assert_same_bits(pull(g)[0], g)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strength_blends_and_ends_exactly_on_the_grid(dtype):
    w = gaussian((24, 10), dtype=dtype)
    wide, exact = w.astype(np.float64), oracles.quantize32(w, bj.B158)
    q = exact.codes * exact.scale
    traced = jax.jit(lambda w, s: bj.fake_quantize(w, strength=s))
    for strength in (0.0, 0.25, 0.5, 0.9):
        want = (1 - strength) * wide + strength * q.astype(np.float64)
        tight = float(ml_dtypes.finfo(dtype).eps)
        for got in (
            fake_quantize(w, strength=jnp.float32(strength)),
            traced(w, jnp.float32(strength)),
            bj.fake_quantize(w, strength=strength),
        ):
            assert got.dtype == dtype
            np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tight, atol=1e-7)
    oracles.assert_same_bits(traced(w, jnp.float32(0.0)), w)
    oracles.assert_same_bits(bj.fake_quantize(w, strength=0.0), w)
    oracles.assert_same_bits(traced(w, jnp.float32(1.0)), q.astype(dtype))
    oracles.assert_same_bits(bj.fake_quantize(w, strength=1), q.astype(dtype))


def test_a_traced_strength_traces_once_and_has_no_gradient():
    w = gaussian((24, 10))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(w, strength):
        return (bj.fake_quantize(w, strength=strength) ** 2).sum()

    values = [float(loss(w, jnp.float32(s))) for s in (0.0, 0.3, 0.7, 1.0)]
    assert len(set(values)) == 4
    assert jax.grad(loss, argnums=1)(w, jnp.float32(0.5)) == 0.0


def test_fake_quantize_takes_axes():
    w = gaussian((3, 8, 5))
    exact = oracles.quantize32(w, bj.PHASE4, None, 0)
    hat = fake_quantize(w, bj.PHASE4, batch_axes=0)
    oracles.assert_same_bits(hat, exact.codes * exact.scale)
    exact = oracles.quantize32(w, bj.PHASE4, (0, 1))
    hat = fake_quantize(w, bj.PHASE4, contracting_axes=(0, 1))
    oracles.assert_same_bits(hat, exact.codes * exact.scale)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fake_quantized_activations_are_on_their_grid(dtype, bits):
    config = bj.ActivationConfig(bits=bits)
    x = gaussian((5, 33), dtype=dtype)
    codes, gamma = oracles.activations32(x, config)
    want = (codes * (gamma * np.float32(1 / config.qmax))).astype(dtype)
    oracles.assert_same_bits(bj.fake_quantize_activations(x, config), want)


# ternary_dot: forward ---------------------------------------------------------------------

# x, w, contracting_axes, batch_axes
DOTS = {
    "dense": ((5, 24), (24, 10), None, ()),
    "odd": ((5, 7), (7, 3), None, ()),
    "one-token": ((24,), (24, 10), None, ()),
    "one-row": ((1, 24), (24, 10), None, ()),
    "one-by-one": ((2, 1), (1, 1), None, ()),
    "sequence": ((2, 3, 24), (24, 10), None, ()),
    "transposed": ((5, 24), (10, 24), 1, ()),
    "attention-out": ((2, 3, 4), (3, 4, 5), (0, 1), ()),
    "attention-in": ((2, 6, 8), (8, 3, 5), 0, ()),
    "outer": ((6, 4, 8), (4, 5, 8), (0, 2), ()),
    "conv": ((6, 2, 3, 4), (2, 3, 4, 5), (0, 1, 2), ()),
    "experts": ((3, 6, 8), (3, 8, 5), None, 0),
    "experts-middle": ((3, 6, 8), (8, 3, 5), None, 1),
    "experts-heads": ((2, 6, 3, 4), (2, 3, 4, 5), (1, 2), 0),
    "two-batch": ((2, 3, 6, 8), (2, 3, 8, 5), None, (0, 1)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("xs", "ws", "contracting", "batch"), DOTS.values(), ids=DOTS)
def test_forward_and_gradients_match_the_equations(xs, ws, contracting, batch, config):
    if config is GROUPS and ws[0] in (1, 7):
        config = bj.TernaryConfig(granularity=ws[0])  # 4 does not divide these
    x, w = gaussian(xs), gaussian(ws, 1)
    axes = {"contracting_axes": contracting, "batch_axes": batch}
    truth = (x, w, config, INT8, contracting, batch)
    want = oracles.dot32(*truth)
    g = gaussian(want.shape, 2)
    y, dx, dw = vjp(x, w, g, config, **axes)
    oracles.assert_same_bits(y, want, "forward")
    scale = np.abs(oracles.dot64(*truth)).max()
    np.testing.assert_allclose(y, oracles.dot64(*truth), rtol=1e-5, atol=1e-5 * scale)
    want_dx, want_dw = oracles.gradients64(x, w, g, config, INT8, contracting, batch)
    assert (dx.dtype, dw.dtype) == (x.dtype, w.dtype)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-5 * np.abs(want_dx).max())
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5 * np.abs(want_dw).max())


@pytest.mark.parametrize("x_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_of_output_and_gradients(x_dtype, w_dtype):
    x, w = gaussian((5, 24), dtype=x_dtype), gaussian((24, 10), 1, w_dtype)
    exact = oracles.dot32(x, w, bj.B158, INT8)
    for dtype in (jnp.float32, np.dtype(ml_dtypes.bfloat16), "float16"):
        y, dx, dw = vjp(x, w, np.ones((5, 10), np.float32), dtype=dtype)
        assert (dx.dtype, dw.dtype) == (x_dtype, w_dtype)
        oracles.assert_same_bits(y, exact.astype(dtype))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("x_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES.values(), ids=DTYPES)
def test_the_output_has_the_dtype_that_x_and_w_promote_to(x_dtype, w_dtype):
    x, w = gaussian((5, 24), dtype=x_dtype), gaussian((24, 10), 1, w_dtype)
    for activations in (INT8, None):
        y = ternary_dot(x, w, bj.B158, activations)
        assert y.dtype == jnp.promote_types(x_dtype, w_dtype)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activation_widths(bits):
    config = bj.ActivationConfig(bits=bits)
    x, w, g = gaussian((5, 24)), gaussian((24, 10), 1), gaussian((5, 10), 2)
    y, dx, dw = vjp(x, w, g, bj.B158, config)
    oracles.assert_same_bits(y, oracles.dot32(x, w, bj.B158, config))
    want_dx, want_dw = oracles.gradients64(x, w, g, bj.B158, config)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5)


def test_groups_are_added_in_ascending_order():
    # In descending order some of these sums round elsewhere, so the oracle can tell.
    config = bj.TernaryConfig(granularity=2)
    x, w = gaussian((16, 24)), gaussian((24, 10), 1)
    y = ternary_dot(x, w, config)
    oracles.assert_same_bits(y, oracles.dot32(x, w, config, INT8))
    c = oracles.canonical(x, w, config, INT8)
    backwards = np.zeros_like(y)
    for k in reversed(range(0, 24, 2)):
        sums = c.x[:, k : k + 2].astype(np.int64) @ c.w[k : k + 2].astype(np.int64)
        backwards += (sums.astype(np.float32) * c.gamma) * (c.scale[k] * np.float32(1 / 127))
    assert (backwards != np.asarray(y)).any()


def test_weight_only_is_a_float_product_with_the_grid():
    x, w, g = gaussian((5, 24)), gaussian((24, 10), 1), gaussian((5, 10), 2)
    for config in CONFIGS.values():
        y, dx, dw = vjp(x, w, g, config, None)
        exact = oracles.quantize32(w, config)
        hat = exact.codes.astype(np.float64) * exact.scale
        np.testing.assert_allclose(y, x @ hat, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, g @ hat.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw, x.T.astype(np.float64) @ g, rtol=1e-5, atol=1e-5)
    y = ternary_dot(gaussian((3, 6, 8)), gaussian((3, 8, 5), 1), bj.TWN, None, batch_axes=0)
    exact = oracles.quantize32(gaussian((3, 8, 5), 1), bj.TWN, None, 0)
    want = gaussian((3, 6, 8)) @ (exact.codes.astype(np.float64) * exact.scale)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_backward_is_close_and_leaves_the_forward_alone():
    x, w, g = gaussian((33, 64)), gaussian((64, 24), 1), gaussian((33, 24), 2)
    y, dx, dw = vjp(x, w, g, backward_dtype=jnp.bfloat16)
    oracles.assert_same_bits(y, oracles.dot32(x, w, bj.B158, INT8))
    want_dx, want_dw = oracles.gradients64(x, w, g, bj.B158, INT8)
    for got, want in ((dx, want_dx), (dw, want_dw)):
        assert got.dtype == jnp.float32
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert 1e-6 < error < 2**-8  # bfloat16 operands, float32 sums: and it did use them
    _, dx, dw = vjp(x, w, g, GROUPS, backward_dtype=jnp.bfloat16)
    want_dx, want_dw = oracles.gradients64(x, w, g, GROUPS, INT8)
    assert np.linalg.norm(dx - want_dx) / np.linalg.norm(want_dx) < 2**-7
    assert np.linalg.norm(dw - want_dw) / np.linalg.norm(want_dw) < 2**-7


# ternary_dot: strength --------------------------------------------------------------------


@pytest.mark.parametrize("config", [bj.B158, GROUPS], ids=["b158", "groups"])
def test_a_traced_strength_of_one_has_the_bits_of_the_int8_path(config):
    x, w, g = gaussian((5, 24)), gaussian((24, 10), 1), gaussian((5, 10), 2)
    y, dx, dw = vjp(x, w, g, config)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def phased(x, w, g, strength):
        y, pull = jax.vjp(lambda x, w: bj.ternary_dot(x, w, config, strength=strength), x, w)
        return y, *pull(g)

    y1, dx1, dw1 = phased(x, w, g, jnp.float32(1.0))
    oracles.assert_same_bits(y1, y)
    np.testing.assert_allclose(dx1, dx, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw1, dw, rtol=1e-5, atol=1e-5)

    x_q, w_q = oracles.operands64(x, w, config, INT8)
    for strength in (0.0, 0.3, 0.7):
        x_mix = (1 - strength) * x.astype(np.float64) + strength * x_q
        w_mix = (1 - strength) * w.astype(np.float64) + strength * w_q
        y, dx, dw = phased(x, w, g, jnp.float32(strength))
        np.testing.assert_allclose(y, x_mix @ w_mix, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, g @ w_mix.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw, x_mix.T @ g, rtol=1e-5, atol=1e-5)
        static = bj.ternary_dot(x, w, config, strength=strength)
        np.testing.assert_allclose(static, y, rtol=1e-6, atol=1e-6)


def test_a_traced_strength_has_no_gradient_and_works_weight_only():
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)
    for activations in (INT8, None):

        def loss(strength, activations=activations):
            return bj.ternary_dot(x, w, bj.B158, activations, strength=strength).sum()

        assert jax.grad(loss)(jnp.float32(0.5)) == 0.0
    for dtype in DTYPES.values():
        w16 = w.astype(dtype)
        y = ternary_dot(x.astype(dtype), w16, bj.B158, None)
        one = jax.jit(lambda x, w, s: bj.ternary_dot(x, w, bj.B158, None, strength=s))
        oracles.assert_same_bits(one(x.astype(dtype), w16, jnp.float32(1)), y)


def test_strength_phases_in_batched_and_low_precision_kernels():
    x, w = gaussian((3, 6, 8)), gaussian((3, 8, 5), 1)
    f = jax.jit(lambda x, w, s: bj.ternary_dot(x, w, batch_axes=0, strength=s))
    oracles.assert_same_bits(
        f(x, w, jnp.float32(1)), oracles.dot32(x, w, bj.B158, INT8, None, 0), "strength 1"
    )
    np.testing.assert_allclose(f(x, w, jnp.float32(0)), x @ w, rtol=1e-5, atol=1e-5)
    half = [a.astype(ml_dtypes.bfloat16) for a in (x, w)]
    y = f(*half, jnp.float32(0))
    want = half[0].astype(np.float64) @ half[1].astype(np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8, atol=1e-5)


# ternary_dot: transformations -------------------------------------------------------------


def test_vmap_over_x_over_w_and_over_both():
    x, w = gaussian((3, 6, 24)), gaussian((3, 24, 10), 1)
    for config in (bj.B158, GROUPS):
        dot = functools.partial(bj.ternary_dot, config=config)
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


def test_a_lone_row_in_vmap_becomes_one_product_of_all_rows():
    # Padding each lone row inside the batch would cost several times as much.
    lowered = jax.jit(jax.vmap(bj.ternary_dot, (0, None))).lower(
        gaussian((32, 24)), gaussian((24, 10))
    )
    assert "(tensor<32x24xi8>, tensor<24x10xi8>) -> tensor<32x10xi32>" in lowered.as_text()


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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_only_int8_codes_and_scales_wait_for_the_backward_pass(config):
    x, w = gaussian((32, 24)), gaussian((24, 10), 1)
    _, pull = jax.vjp(lambda x, w: bj.ternary_dot(x, w, config), x, w)
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


# ternary_dot: bad and extreme values ------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", [bj.B158, GROUPS], ids=["b158", "groups"])
def test_a_bad_token_gives_a_nan_row_and_touches_no_other(config, bad):
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)
    clean = np.asarray(ternary_dot(x, w, config))
    x[3, 7] = bad
    y = np.asarray(ternary_dot(x, w, config))
    assert np.isnan(y[3]).all()
    oracles.assert_same_bits(np.delete(y, 3, 0), np.delete(clean, 3, 0))
    w[:] = 0  # codes 0 do not hide it
    assert np.isnan(np.asarray(ternary_dot(x, w, config))[3]).all()
    traced = jax.jit(lambda x, w, s: bj.ternary_dot(x, w, config, strength=s))
    assert np.isnan(np.asarray(traced(x, w, jnp.float32(1)))[3]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_weights_are_not_hidden(bad):
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)
    w[3, 4] = bad
    y = np.asarray(ternary_dot(x, w, bj.B158))
    assert not np.isfinite(y).any()
    y = np.asarray(ternary_dot(x, w, bj.PHASE4))
    assert (~np.isfinite(y)).sum(0).tolist() == [0, 0, 0, 0, 5, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e15])
def test_extreme_operands_stay_finite(magnitude):
    x, w, g = gaussian((5, 24)), gaussian((24, 10), 1), np.ones((5, 10), np.float32)
    scaled = (np.float64(magnitude) * w).astype(np.float32)
    for a, b in ((x, scaled), ((np.float64(magnitude) * x).astype(np.float32), w)):
        assert all(np.isfinite(leaf).all() for leaf in vjp(a, b, g))


def test_zeros_give_zeros():
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)
    for config in CONFIGS.values():
        assert not np.asarray(ternary_dot(np.zeros_like(x), w, config)).any()
        assert not np.asarray(ternary_dot(x, np.zeros_like(w), config)).any()


def test_sums_are_exact_and_round_once_when_the_contraction_is_long():
    k = 400_000  # 127 * k = 50.8e6 > 2**24
    x = np.ones((2, k), np.float32)
    x[1, ::3] = -0.37
    w = np.ones((k, 2), np.float32)
    w[:5, 1] = -1
    c = oracles.canonical(x, w[:, :1], bj.B158, INT8)
    codes = np.sign(w).astype(np.int64)
    sums = c.x.astype(np.int64) @ codes
    assert np.abs(sums).max() > 2**25
    y = np.asarray(ternary_dot(x, w))
    np.testing.assert_allclose(y, sums / 127 * np.float64(1.0), rtol=3 * 2.0**-24 * 2)
    oracles.assert_same_bits(
        y, (sums.astype(np.float32) * np.float32(1)) * (np.float32(1) * np.float32(1 / 127))
    )


def test_empty_batches():
    w = gaussian((24, 10))
    for shape in ((0, 24), (2, 0, 24)):
        x = np.zeros(shape, np.float32)
        for activations in (INT8, None):
            y = bj.ternary_dot(x, w, bj.B158, activations)
            assert (y.shape, y.dtype) == ((*shape[:-1], 10), jnp.float32)
        gradient = jax.grad(lambda w, x=x: bj.ternary_dot(x, w).sum())(w)
        assert not np.asarray(gradient).any()


def test_traces_once_per_shape():
    @jax.jit
    @chex.assert_max_traces(n=2)
    def dot(x, w):
        return bj.ternary_dot(x, w)

    for rows in (5, 5, 6, 5, 6):
        dot(gaussian((rows, 24)), gaussian((24, 10)))


# Errors -----------------------------------------------------------------------------------

X, W = np.ones((2, 4), np.float32), np.ones((4, 3), np.float32)
CUBE = np.ones((2, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "match"),
    [
        (TypeError, (X.astype(np.int8), W), {}, r"`x` must be floating .*int8.*Cast it"),
        (TypeError, (X, W.astype(np.int8)), {}, r"`w` must be floating point .*int8"),
        (TypeError, (X, W, "b158"), {}, r"`config` must be a TernaryConfig.*bj.B158"),
        (TypeError, (X, W, bj.B158, 8), {}, r"`activations` .*got int 8. Use ActivationConfig"),
        (ValueError, (X, W[0]), {}, r"`w` needs at least 2 axes"),
        (ValueError, (X, W[:0]), {}, r"`w` has no elements"),
        (ValueError, (X[:, :3], W), {}, r"`x` must end .*\(4,\), got shape \(2, 3\). Check"),
        (ValueError, (np.float32(1) + X[0, 0], W), {}, r"`x` must end .*got shape \(\)"),
        (ValueError, (X, CUBE), {}, r"\(2, 4, 3\) does not tell .*Pass contracting_axes="),
        (
            ValueError,
            (np.ones((3, 5, 4), np.float32), CUBE),
            {"batch_axes": 0},
            r"`x` must end with .*\(4,\) and start with the kernel's batch axes \(2,\)",
        ),
        (ValueError, (X, W), {"strength": 1.5}, r"`strength` must be from 0 to 1, got 1.5"),
        (ValueError, (X, W), {"strength": -0.1}, r"`strength` must be from 0 to 1"),
        (ValueError, (X, W), {"strength": float("nan")}, r"`strength` must be from 0 to 1"),
        (ValueError, (X, W, bj.TernaryConfig(granularity=3)), {}, r"`granularity`=3 .*Pass a gr"),
        (ValueError, (X, W), {"contracting_axes": 5}, r"`contracting_axes` must name axes"),
        (ValueError, (X, W), {"contracting_axes": 0, "batch_axes": 0}, r"axes \[0\] are in"),
    ],
)
def test_bad_arguments_are_refused_with_a_remedy(kind, args, kwargs, match):
    with pytest.raises(kind, match=f"^ternary_dot: .*{match}"):
        bj.ternary_dot(*args, **kwargs)


def test_a_static_strength_out_of_range_is_refused_by_both_estimators():
    for function in (bj.fake_quantize, bj.fake_quantize_activations):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: `strength` must be from 0"):
            function(W, strength=2)
