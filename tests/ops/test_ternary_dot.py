"""`ternary_dot` against the equations: forward, gradients, strength."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases
from dots import CONFIGS, DTYPES, GROUPS, INT8, gaussian, ternary_dot, vjp

import bitnet_jax as bj

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


@cases("config", CONFIGS, core=["phase4", "groups"])
@cases(("xs", "ws", "contracting", "batch"), DOTS, core=["odd", "outer", "experts-heads"])
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


TWO_DTYPES = [(x, w) for x in DTYPES.values() for w in DTYPES.values()]


@cases(("x_dtype", "w_dtype"), TWO_DTYPES, core=[(ml_dtypes.bfloat16, np.float32)])
def test_dtypes_of_output_and_gradients(x_dtype, w_dtype):
    x, w = gaussian((5, 24), dtype=x_dtype), gaussian((24, 10), 1, w_dtype)
    exact = oracles.dot32(x, w, bj.B158, INT8)
    for dtype in (jnp.float32, np.dtype(ml_dtypes.bfloat16), "float16"):
        y, dx, dw = vjp(x, w, np.ones((5, 10), np.float32), dtype=dtype)
        assert (dx.dtype, dw.dtype) == (x_dtype, w_dtype)
        oracles.assert_same_bits(y, exact.astype(dtype))


@pytest.mark.standard_promotion
@cases(("x_dtype", "w_dtype"), TWO_DTYPES, core=[(np.float16, ml_dtypes.bfloat16)])
def test_the_output_has_the_dtype_that_x_and_w_promote_to(x_dtype, w_dtype):
    x, w = gaussian((5, 24), dtype=x_dtype), gaussian((24, 10), 1, w_dtype)
    for activations in (INT8, None):
        y = ternary_dot(x, w, bj.B158, activations=activations)
        assert y.dtype == jnp.promote_types(x_dtype, w_dtype)


@cases("bits", [2, 4, 8], core=[4])
def test_activation_widths(bits):
    config = bj.ActivationConfig(bits=bits)
    x, w, g = gaussian((5, 24)), gaussian((24, 10), 1), gaussian((5, 10), 2)
    y, dx, dw = vjp(x, w, g, activations=config)
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


@cases("config", CONFIGS, core=["groups"])
def test_weight_only_is_a_float_product_with_the_grid(config):
    x, w, g = gaussian((5, 24)), gaussian((24, 10), 1), gaussian((5, 10), 2)
    y, dx, dw = vjp(x, w, g, config, activations=None)
    exact = oracles.quantize32(w, config)
    hat = exact.codes.astype(np.float64) * exact.scale
    np.testing.assert_allclose(y, x @ hat, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ hat.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T.astype(np.float64) @ g, rtol=1e-5, atol=1e-5)


def test_weight_only_takes_batch_axes():
    y = ternary_dot(
        gaussian((3, 6, 8)), gaussian((3, 8, 5), 1), bj.TWN, activations=None, batch_axes=0
    )
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


@pytest.mark.full
def test_bfloat16_backward_of_groups_is_close():
    x, w, g = gaussian((33, 64)), gaussian((64, 24), 1), gaussian((33, 24), 2)
    _, dx, dw = vjp(x, w, g, GROUPS, backward_dtype=jnp.bfloat16)
    want_dx, want_dw = oracles.gradients64(x, w, g, GROUPS, INT8)
    assert np.linalg.norm(dx - want_dx) / np.linalg.norm(want_dx) < 2**-7
    assert np.linalg.norm(dw - want_dw) / np.linalg.norm(want_dw) < 2**-7


# Strength ---------------------------------------------------------------------------------


@cases("config", {"b158": bj.B158, "groups": GROUPS}, core=["groups"])
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
        static = ternary_dot(x, w, config, strength=strength)
        np.testing.assert_allclose(static, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activations", [INT8, None], ids=["int8", "weight-only"])
def test_a_traced_strength_has_no_gradient(activations):
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)

    def loss(strength):
        return bj.ternary_dot(x, w, bj.B158, activations=activations, strength=strength).sum()

    assert jax.jit(jax.grad(loss))(jnp.float32(0.5)) == 0.0


@cases("dtype", DTYPES, core=["bfloat16"])
def test_a_traced_strength_of_one_has_the_bits_of_weight_only(dtype):
    x, w = gaussian((5, 24), dtype=dtype), gaussian((24, 10), 1, dtype)
    y = ternary_dot(x, w, bj.B158, activations=None)
    one = jax.jit(lambda x, w, s: bj.ternary_dot(x, w, bj.B158, activations=None, strength=s))
    oracles.assert_same_bits(one(x, w, jnp.float32(1)), y)


@pytest.mark.full
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
