"""Bad and extreme values in `ternary_dot`, and what it refuses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from dots import CONFIGS, GROUPS, INT8, gaussian, ternary_dot, vjp

import bitnet_jax as bj

traced_dot = jax.jit(bj.ternary_dot, static_argnums=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@cases("config", {"b158": bj.B158, "groups": GROUPS}, core=["b158"])
def test_a_bad_token_gives_a_nan_row_and_touches_no_other(config, bad):
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)
    clean = np.asarray(ternary_dot(x, w, config))
    x[3, 7] = bad
    y = np.asarray(ternary_dot(x, w, config))
    assert np.isnan(y[3]).all()
    oracles.assert_same_bits(np.delete(y, 3, 0), np.delete(clean, 3, 0))
    w[:] = 0  # codes 0 do not hide it
    assert np.isnan(np.asarray(ternary_dot(x, w, config))[3]).all()
    assert np.isnan(np.asarray(traced_dot(x, w, config, strength=jnp.float32(1)))[3]).all()


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


@cases("config", CONFIGS, core=["b158"])
def test_zeros_give_zeros(config):
    x, w = gaussian((5, 24)), gaussian((24, 10), 1)
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


@cases("shape", [(0, 24), (2, 0, 24)], core=[(2, 0, 24)])
def test_empty_batches(shape):
    w, x = gaussian((24, 10)), np.zeros(shape, np.float32)
    for activations in (INT8, None):
        y = bj.ternary_dot(x, w, bj.B158, activations=activations)
        assert (y.shape, y.dtype) == ((*shape[:-1], 10), jnp.float32)
    gradient = jax.jit(jax.grad(lambda w: bj.ternary_dot(x, w).sum()))(w)
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
        (TypeError, (X, W, "b158"), {}, r"`weights` must be a TernaryConfig.*bj.B158"),
        (TypeError, (X, W), {"activations": 8}, r"`activations` .*got int 8. Use ActivationConfig"),
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
