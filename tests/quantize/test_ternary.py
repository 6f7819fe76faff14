"""Ternary codes and scales against float64 NumPy."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases

import bitnet_jax as bj

CONFIGS = {
    "b158": bj.B158,
    "phase4": bj.PHASE4,
    "twn": bj.TWN,
    "median": bj.TernaryConfig(scale="absmedian"),
    "median-channel": bj.TernaryConfig(scale="absmedian", granularity="channel"),
    "median-groups": bj.TernaryConfig(scale="absmedian", granularity=4),
    "mean-groups": bj.TernaryConfig(granularity=4),
    "twn-tensor": bj.TernaryConfig(scale="survivors", threshold=0.7),
    "twn-groups": bj.TernaryConfig(scale="survivors", threshold=0.7, granularity=4),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# shape, contracting_axes, batch_axes
KERNELS = {
    "dense": ((24, 10), None, ()),
    "odd": ((12, 7), None, ()),
    "one-row": ((4, 1), None, ()),
    "attention-out": ((3, 4, 5), (0, 1), ()),
    "attention-in": ((8, 3, 5), 0, ()),
    "transposed": ((6, 8), -1, ()),
    "outer": ((4, 5, 8), (0, 2), ()),
    "stacked": ((3, 8, 5), None, 0),
    "stacked-middle": ((8, 3, 5), None, 1),
    "conv": ((2, 3, 4, 5), (0, 1, 2), ()),
    "stacked-attention": ((2, 3, 4, 5), (1, 2), 0),
    "two-batch": ((2, 3, 8, 5), None, (0, 1)),
}
quantize = jax.jit(
    bj.quantize, static_argnums=1, static_argnames=("contracting_axes", "batch_axes")
)


def gaussian(shape, seed=0, dtype=np.float32, sigma=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * sigma).astype(dtype)


def full_scale(t):
    """A Ternary's scale over every code, by NumPy alone."""
    s = np.asarray(t.scale)
    for axis, want in enumerate(t.codes.shape):
        if s.shape[axis] != want:
            assert want % s.shape[axis] == 0
            s = np.repeat(s, want // s.shape[axis], axis=axis)
    return s


@cases("config", CONFIGS, core=["b158", "twn", "median-groups"])
@cases(("shape", "contracting", "batch"), KERNELS, core=["dense", "outer", "stacked-attention"])
def test_every_config_on_every_kernel(shape, contracting, batch, config):
    w = gaussian(shape)
    t = quantize(w, config, contracting_axes=contracting, batch_axes=batch)
    assert t.codes.dtype == jnp.int8
    assert t.scale.dtype == jnp.float32
    assert t.scale.ndim == w.ndim
    exact = oracles.quantize64(w, config, contracting, batch)
    oracles.assert_codes_agree(t.codes, exact, config.threshold)
    np.testing.assert_allclose(full_scale(t), exact.scale, rtol=1e-6)
    pinned = oracles.quantize32(w, config, contracting, batch)
    oracles.assert_same_bits(t.codes, pinned.codes, "codes")
    oracles.assert_same_bits(full_scale(t), pinned.scale, "scale")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@cases("config", {"b158": bj.B158, "phase4": bj.PHASE4, "twn": bj.TWN}, core=["phase4"])
def test_low_precision_kernels_are_quantised_in_float32(config, dtype):
    w = gaussian((24, 10), dtype=dtype, sigma=0.05)
    t = quantize(w, config)
    pinned = oracles.quantize32(w, config)
    oracles.assert_same_bits(t.codes, pinned.codes, "codes")
    oracles.assert_same_bits(full_scale(t), pinned.scale, "scale")
    for out in DTYPES.values():
        want = (pinned.codes.astype(np.float32) * pinned.scale).astype(out)
        oracles.assert_same_bits(t.dequantize(out), want, "dequantize")


@cases("shape", [(1, 1), (7, 3), (16, 24), (33, 5), (64, 64), (100, 9)], core=[(1, 1), (33, 5)])
def test_scales_have_the_bits_of_the_pinned_tree(shape):
    for config in (bj.B158, bj.PHASE4, bj.TWN):
        w = gaussian(shape, seed=shape[0])
        t = quantize(w, config)
        pinned = oracles.quantize32(w, config)
        oracles.assert_same_bits(full_scale(t), pinned.scale, f"{config}")
        oracles.assert_same_bits(t.codes, pinned.codes, f"{config}")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_b158_is_hugging_faces_formula_to_the_bit(seed, dtype):
    w = gaussian((64, 24), seed, dtype, sigma=0.03)
    codes = np.asarray(quantize(w, bj.B158).codes)
    oracles.assert_same_bits(codes.astype(np.float32), oracles.quantize_hugging_face(w) + 0.0)


def test_a_weight_exactly_at_the_threshold_is_zero():
    # mean|w| = 1, so r = w; 0.5 rounds to 0 (half to even), the next float to 1.
    above = np.nextafter(np.float32(0.5), np.float32(1))
    w = np.array([[0.5, -0.5, 2.0, 1.0]], np.float32)
    assert quantize(w, bj.B158).codes.tolist() == [[0, 0, 1, 1]]
    t = quantize(np.array([[1.0], [above]], np.float32), bj.TernaryConfig(threshold=float(above)))
    assert t.codes.tolist() == [[1], [1]]
    scaled = bj.TernaryConfig(threshold=1.0, granularity="channel")
    assert quantize(np.full((4, 2), 0.25, np.float32), scaled).codes.tolist() == [[0, 0]] * 4


def test_the_one_weight_of_a_kernel_is_its_own_scale():
    for value, code in ((3.0, 1), (-3.0, -1)):
        t = quantize(np.full((1, 1), value, np.float32), bj.B158)
        assert (t.codes.item(), t.scale.item()) == (code, 3.0)


@cases("config", CONFIGS, core=["b158", "twn", "mean-groups"])
def test_zero_kernels_rows_and_columns(config):
    t = quantize(np.zeros((12, 7), np.float32), config)
    assert not np.asarray(t.codes).any()
    np.testing.assert_array_equal(t.scale, np.float32(config.eps))
    w = gaussian((12, 7))
    w[4:8], w[:, 2] = 0, 0  # a whole group of four rows
    t = quantize(w, config)
    assert not np.asarray(t.codes)[w == 0].any()
    oracles.assert_same_bits(t.codes, oracles.quantize32(w, config).codes)
    assert np.isfinite(t.scale).all()
    assert (np.asarray(t.scale) >= np.float32(config.eps)).all()


@pytest.mark.parametrize("magnitude", [3e38, 1e38, 1e-38, 1e-45])
@cases("config", CONFIGS, core=["b158", "twn", "mean-groups"])
def test_huge_and_tiny_kernels_stay_finite(config, magnitude):
    w = np.full((12, 7), magnitude, np.float32)
    w[::2] *= -1
    t = quantize(w, config)
    assert np.isfinite(t.scale).all()
    assert (np.asarray(t.scale) > 0).all()
    if magnitude > 1:
        np.testing.assert_array_equal(t.codes, np.sign(w))
        np.testing.assert_allclose(t.scale, magnitude, rtol=1e-6)
        assert np.isfinite(t.dequantize()).all()
    else:  # below every eps
        assert not np.asarray(t.codes).any()
        np.testing.assert_array_equal(t.scale, np.float32(config.eps))


@pytest.mark.parametrize("eps", [1e-30, 1e-38, 1e-60, 1e39])
def test_an_eps_is_refused_or_works(eps):
    # Whatever is accepted leaves a zero kernel with codes 0 and a finite positive scale.
    try:
        config = bj.TernaryConfig(eps=eps)
    except ValueError as error:
        assert "`eps`" in str(error)  # noqa: PT017 - either outcome is right
        return
    t = quantize(np.zeros((4, 4), np.float32), config)
    assert not np.asarray(t.codes).any()
    assert 0 < t.scale.item() < np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@cases("config", CONFIGS, core=["b158", "twn", "mean-groups"])
def test_a_bad_weight_shows_in_its_scale_and_in_no_other(config, bad):
    w = gaussian((12, 7))
    w[1, 2] = bad
    scale = full_scale(quantize(w, config))
    touched = np.zeros(w.shape, bool)
    rows = slice(0, 4) if isinstance(config.granularity, int) else slice(None)
    touched[rows, slice(None) if config.granularity == "tensor" else 2] = True
    np.testing.assert_array_equal(np.isfinite(scale), ~touched)


@cases("config", CONFIGS, core=["median", "twn-groups"])
def test_a_slice_of_a_stack_is_quantised_on_its_own(config):
    w = gaussian((3, 8, 5))
    stacked = quantize(w, config, batch_axes=0)
    for i in range(3):
        alone = quantize(w[i], config)
        oracles.assert_same_bits(np.asarray(stacked.codes)[i], alone.codes)
        oracles.assert_same_bits(np.asarray(stacked.scale)[i], alone.scale)


def test_negative_and_unsorted_axes_mean_the_same():
    w = gaussian((3, 4, 5))
    plain = quantize(w, bj.PHASE4, contracting_axes=(0, 1))
    for axes in ((1, 0), (-2, -3), [0, -2], (np.int64(0), 1)):
        other = bj.quantize(w, bj.PHASE4, contracting_axes=axes)
        oracles.assert_same_bits(other.codes, plain.codes)
        oracles.assert_same_bits(other.scale, plain.scale)


@pytest.mark.parametrize(
    ("granularity", "grid"),
    [(2, (2, 3, 2)), (4, (2, 3, 1)), (8, None), (12, (2, 1, 1)), (24, (1, 1, 1)), (3, None)],
)
def test_groups_tile_the_contraction_from_its_last_axis(granularity, grid):
    w = gaussian((2, 3, 4, 5))
    config = bj.TernaryConfig(granularity=granularity)
    if grid is None:
        with pytest.raises(ValueError, match=r"`granularity`=\d does not divide .*\(2, 3, 4\)"):
            bj.quantize(w, config, contracting_axes=(0, 1, 2))
        return
    t = quantize(w, config, contracting_axes=(0, 1, 2))
    assert t.scale.shape == (*grid, 5)
    pinned = oracles.quantize32(w, config, (0, 1, 2))
    oracles.assert_same_bits(t.codes, pinned.codes)
    oracles.assert_same_bits(full_scale(t), pinned.scale)


def test_one_group_is_a_channel():
    w = gaussian((24, 10))
    a = quantize(w, bj.TernaryConfig(granularity=24))
    b = quantize(w, bj.TernaryConfig(granularity="channel"))
    oracles.assert_same_bits(a.codes, b.codes)
    oracles.assert_same_bits(a.scale, b.scale)


def test_gaussians_have_the_known_zero_fractions():
    # P(|w| <= tau * mean|w|) with mean|w| = sqrt(2/pi): 6.36 % at 0.1; 31.0 % at 0.5.
    zeros = [
        (np.asarray(quantize(gaussian((64, 128), seed), bj.PHASE4).codes) == 0).mean()
        for seed in range(20)
    ]
    assert abs(np.mean(zeros) - 0.0636) < 5 * 0.0027 / np.sqrt(20)
    big = gaussian((512, 512))
    assert abs((np.asarray(quantize(big, bj.B158).codes) == 0).mean() - 0.3100) < 0.005
    # sandbox test 1: the scale of a channel of 64 weights
    scale = np.asarray(quantize(gaussian((64, 128)), bj.PHASE4).scale)
    assert abs(scale.mean() - 0.798) < 0.03
    # uniform weights lose tau / 2, and the signs balance
    uniform = np.random.default_rng(0).uniform(-1, 1, (256, 261)).astype(np.float32)
    codes = np.asarray(quantize(uniform, bj.PHASE4).codes)
    assert abs((codes == 0).mean() - 0.05) < 0.005
    assert abs((codes == 1).mean() - (codes == -1).mean()) < 0.02


@pytest.mark.parametrize(
    ("config", "error"),
    [(bj.TernaryConfig(threshold=0.1), 0.327), (bj.B158, 0.263)]
    + [(bj.TernaryConfig(scale="survivors", threshold=0.7), 0.190)],
    ids=["phase4", "b158", "twn"],
)
def test_gaussians_have_the_known_relative_squared_error(config, error):
    w = gaussian((512, 512))
    hat = np.asarray(quantize(w, config).dequantize())
    assert abs(((w - hat) ** 2).sum() / (w**2).sum() - error) < 0.003


# Any array at all -------------------------------------------------------------------------

SHAPES = st.sampled_from([(1, 1), (4, 3), (9, 2), (16, 4)])
# XLA's CPU flushes subnormals to zero and NumPy does not: no value that leads to one.
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0)


@hypothesis.given(
    w=SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS)),
    name=st.sampled_from(["b158", "phase4", "twn", "median", "median-channel", "twn-tensor"]),
)
def test_any_kernel_has_the_oracles_codes(w, name):
    t = quantize(w, CONFIGS[name])
    pinned = oracles.quantize32(w, CONFIGS[name])
    oracles.assert_same_bits(t.codes, pinned.codes, "codes")
    oracles.assert_same_bits(full_scale(t), pinned.scale, "scale")


# Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: bj.TernaryConfig(scale="absmaen"), r"`scale` .*'absmean'.*Did you mean 'absmean'"),
        (lambda: bj.TernaryConfig(threshold=0.0), r"TernaryConfig: `threshold` .*> 0, got 0.0"),
        (lambda: bj.TernaryConfig(threshold=float("nan")), r"`threshold` must be a finite number"),
        (lambda: bj.TernaryConfig(threshold=float("inf")), r"`threshold` must be a finite number"),
        (lambda: bj.TernaryConfig(threshold="0.5"), r"`threshold` must be a finite number"),
        (lambda: bj.TernaryConfig(threshold=True), r"`threshold` must be a finite number"),
        (lambda: bj.TernaryConfig(eps=-1e-5), r"TernaryConfig: `eps` .*> 0"),
        (lambda: bj.TernaryConfig(granularity="row"), r"`granularity` must be 'tensor', 'channel'"),
        (lambda: bj.TernaryConfig(granularity=0), r"`granularity` as a group size must be >= 1"),
        (lambda: bj.TernaryConfig(granularity=True), r"`granularity` must be .*group size \(int\)"),
        (lambda: bj.TernaryConfig(granularity=4.0), r"`granularity` must be .*group size \(int\)"),
        (lambda: bj.ActivationConfig(bits=1), r"ActivationConfig: `bits` .*from 2 to 8, got 1"),
        (lambda: bj.ActivationConfig(bits=9), r"`bits` must be an integer from 2 to 8, got 9"),
        (lambda: bj.ActivationConfig(bits=8.0), r"`bits` must be an integer"),
        (lambda: bj.ActivationConfig(bits=True), r"`bits` must be an integer"),
        (lambda: bj.ActivationConfig(eps=0), r"ActivationConfig: `eps` must be a finite number"),
        (lambda: bj.ActivationConfig(group=0), r"ActivationConfig: `group` .* >= 1, got 0"),
        (lambda: bj.ActivationConfig(group=True), r"`group` must be None .*, got True"),
        (lambda: bj.ActivationConfig(group=64.0), r"`group` must be None .*, got 64.0"),
        (lambda: bj.ActivationConfig(group="channel"), r"`group` must be None .*'channel'"),
    ],
)
def test_configs_are_validated_when_made(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_configs_are_values():
    assert bj.TernaryConfig() == bj.B158
    assert hash(bj.TernaryConfig()) == hash(bj.B158)
    assert bj.B158 != bj.PHASE4
    with pytest.raises(AttributeError):
        bj.B158.threshold = 0.7
    assert bj.TernaryConfig("absmean", 0.1, "channel", 1e-8) == bj.PHASE4
    assert bj.TernaryConfig("survivors", 0.7, "channel") == bj.TWN


W = np.ones((4, 3), np.float32)
CUBE = np.ones((2, 4, 3), np.float32)


@pytest.mark.parametrize("function", [bj.quantize, bj.fake_quantize, bj.pack])
@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "match"),
    [
        (ValueError, (np.ones(5, np.float32),), {}, r"`w` .*2 axes, got shape \(5,\). Pass a ker"),
        (ValueError, (np.ones((0, 3), np.float32),), {}, r"`w` has no elements, got .*\(0, 3\)"),
        (TypeError, (np.ones((4, 3), np.int8),), {}, r"`w` must be floating .*int8.*Cast it"),
        (TypeError, (np.ones((4, 3), bool),), {}, r"`w` must be floating point"),
        (TypeError, (np.ones((4, 3), np.complex64),), {}, r"`w` must be floating point"),
        (TypeError, ([[1.0, 2.0]],), {}, r"`w` .*got list.*Pass a jax.Array"),
        (TypeError, (W, "b158"), {}, r"`config` must be a TernaryConfig.*, got str.*bj.B158"),
        (ValueError, (CUBE,), {}, r"\(2, 4, 3\) does not tell.*Pass contracting_axes="),
        (ValueError, (W,), {"contracting_axes": 2}, r"`contracting_axes` .*rank-2 .*got 2"),
        (ValueError, (W,), {"contracting_axes": -3}, r"`contracting_axes` .*\(-2 to 1\), got -3"),
        (ValueError, (W,), {"contracting_axes": ()}, r"`contracting_axes` is empty. Name"),
        (ValueError, (W,), {"contracting_axes": "a"}, r"`contracting_axes` must name axes"),
        (ValueError, (CUBE,), {"batch_axes": 3}, r"`batch_axes` must name axes of a rank-3"),
        (ValueError, (CUBE,), {"contracting_axes": (0, -3)}, r"`contracting_axes` .*axis twice"),
        (
            ValueError,
            (CUBE,),
            {"contracting_axes": (0, 1), "batch_axes": 0},
            r"axes \[0\] are in `contracting_axes` and in `batch_axes`",
        ),
        (ValueError, (W, bj.TernaryConfig(granularity=3)), {}, r"`granularity`=3 .*\(4,\).*Pass a"),
    ],
)
def test_bad_kernels_are_refused_with_a_remedy(function, kind, args, kwargs, match):
    with pytest.raises(kind, match=match):
        function(*args, **kwargs)


def test_axes_that_are_no_integers_are_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="`contracting_axes`"):
        bj.quantize(W, contracting_axes=0.5)


def test_errors_name_the_function_that_was_called():
    for name in ("quantize", "fake_quantize", "pack"):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            getattr(bj, name)(np.ones(5, np.float32))


@pytest.mark.optimised
@pytest.mark.parametrize("granularity", ["tensor", "channel", 64])
def test_a_median_of_a_kernel_known_at_compile_time_is_sorted_when_it_runs(granularity):
    """XLA folds a sort of constants in seconds for each thousand of them."""
    config = bj.TernaryConfig(scale="absmedian", granularity=granularity)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((128, 8), np.float32))
    done = jax.jit(lambda: bj.quantize(w, config)).lower().compile()
    assert " sort(" in done.as_text()
    jax.tree.map(oracles.assert_same_bits, done(), bj.quantize(w, config))
