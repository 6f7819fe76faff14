"""The Hadamard rotation of a contraction, against explicit float64 matrices from the recursion."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from draws import normal

import bitnet_jax as bj
from bitnet_jax._quantize.rotation import largest_block, rotated, transform64

ROTATED = bj.TernaryConfig(rotation="hadamard")
CHANNELS = bj.TernaryConfig(granularity="channel", rotation="hadamard")
LENGTHS = (12, 576, 1536, 4096)


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_product_with_the_matrix(length):
    r = oracles.rotation64(length)
    np.testing.assert_allclose(r @ r.T, np.eye(length), atol=1e-12)
    assert largest_block(length) == np.count_nonzero(r[0])
    x = np.asarray(normal(3, length))
    got = rotated(jnp.asarray(x), largest_block(length))
    np.testing.assert_allclose(got, x @ r, atol=2e-6)
    oracles.assert_same_bits(got, oracles.rotated32(x, ROTATED))
    np.testing.assert_allclose(rotated(got, largest_block(length)), x, atol=3e-6)  # R R = 1
    columns = rotated(jnp.asarray(x).T, largest_block(length), 0)
    oracles.assert_same_bits(columns.T, got)


def test_the_float64_form_works_in_place_along_both_axes():
    h = np.random.default_rng(0).normal(size=(2, 24, 24))
    want = oracles.rotation64(24).T @ h @ oracles.rotation64(24)
    transform64(h, 8, -1)
    transform64(h, 8, -2)
    np.testing.assert_allclose(h, want, atol=1e-14)


@cases("dtype", ["float32", "bfloat16", "float16"], core=["bfloat16"])
def test_its_bits_do_not_depend_on_what_is_around_it(dtype):
    """A product before the first sum, one after the last, known values, a map."""
    x, g = jnp.asarray(normal(4, 24), dtype), jnp.asarray(normal(24, seed=1), dtype)

    def net(x, g):
        y = rotated(x * g[None], 8)
        return y, y * 0.3, (y * jnp.float32(1.7)) + 1.0

    eager = net(x, g)
    known = jax.jit(lambda: net(x, g))()
    mapped = jax.vmap(lambda x: jax.tree.map(lambda y: y[0], net(x[None], g)))(x)
    for other in (jax.jit(net)(x, g), known, mapped):
        oracles.assert_same_bits(other[0], eager[0])
        oracles.assert_same_bits(other[1], eager[1])


@pytest.mark.parametrize("config", [ROTATED, CHANNELS], ids=["tensor", "channel"])
@pytest.mark.parametrize("length", [12, 576])
def test_codes_are_of_the_rotated_kernel_and_come_back_unrotated(length, config):
    w = normal(length, 10)
    t = bj.quantize(w, config)
    exact = oracles.quantize64(w, config)
    oracles.assert_codes_agree(t.codes, exact, config.threshold)
    want = oracles.rotation64(length) @ (np.float64(t.codes) * np.asarray(t.scale, np.float64))
    np.testing.assert_allclose(t.dequantize(), want, atol=1e-6)
    packed = bj.pack(w, config)
    hat = bj.fake_quantize(w, config)
    for other in (packed.dequantize(), hat, jax.jit(lambda w: bj.quantize(w, config))(w)):
        other = other.dequantize() if isinstance(other, tuple) else other
        oracles.assert_same_bits(other, t.dequantize())
    codes, scale = t  # still two
    assert isinstance(t, bj.Ternary)
    assert (codes.shape, scale.shape) == (w.shape, (1, 10 if config == CHANNELS else 1))
    moved = jax.tree.map(lambda a: a, t)
    assert moved.rotated_axis == -2
    oracles.assert_same_bits(moved.dequantize(), t.dequantize())
    stack = jax.vmap(lambda w: bj.quantize(w, config))(jnp.stack([w, -w]))
    oracles.assert_same_bits(stack.dequantize()[0], t.dequantize())
    assert (jax.grad(lambda w: bj.fake_quantize(w, config).sum())(w) == 1).all()


def test_copies_keep_the_axis():
    t = bj.quantize(normal(12, 5), ROTATED)
    doubled = t._replace(scale=2 * t.scale)
    oracles.assert_same_bits(doubled.dequantize(), 2 * t.dequantize())
    for other in (copy.copy(t), copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
        assert other.rotated_axis == -2
        oracles.assert_same_bits(other.dequantize(), t.dequantize())
    shapes = jax.eval_shape(lambda w: bj.quantize(w, ROTATED), normal(12, 5))
    assert (shapes.rotated_axis, shapes.codes.shape) == (-2, (12, 5))


def test_the_last_contracting_axis_is_rotated():
    w = normal(3, 8, 5)
    t = bj.quantize(w, ROTATED, contracting_axes=(0, 1))
    exact = oracles.quantize64(w, ROTATED, (0, 1))
    oracles.assert_codes_agree(t.codes, exact, 0.5)
    flat = np.einsum("hdn,de->hen", np.asarray(w, np.float64), oracles.rotation64(8))
    np.testing.assert_array_equal(
        np.sign(flat) * (np.abs(flat) > 0.5 * np.abs(flat).mean()), t.codes
    )


@cases("strength", {"ternary": 1.0, "halfway": jnp.float32(0.4)}, core=["ternary", "halfway"])
@cases("activations", {"int8": bj.ActivationConfig(), "float": None}, core=["int8", "float"])
def test_gradients_are_those_of_the_matrix_form(strength, activations):
    """``(x R) Q(R^T W)`` with R a matrix and Q straight through, in float64 on the host."""
    x, w, g = normal(6, 24), normal(24, 5, seed=1), normal(6, 5, seed=2)

    def dot(x, w):
        how = {"activations": activations, "strength": strength}
        return bj.ternary_dot(x, w, ROTATED, **how)

    y, pull = jax.vjp(dot, x, w)
    r, s = oracles.rotation64(24), float(strength)
    xr = np.asarray(x, np.float64) @ r
    wr = r.T @ np.asarray(w, np.float64)
    exact = oracles.quantize64(w, ROTATED)
    w_mix = (1 - s) * wr + s * exact.codes * exact.scale
    x_mix = xr
    if activations is not None:
        gamma = np.abs(xr).max(-1, keepdims=True)
        x_mix = (1 - s) * xr + s * np.round(xr * 127 / gamma) * gamma / 127
    np.testing.assert_allclose(y, x_mix @ w_mix, atol=1e-5)
    dx, dw = pull(g)
    g = np.asarray(g, np.float64)
    np.testing.assert_allclose(dx, g @ w_mix.T @ r.T, atol=1e-5)
    np.testing.assert_allclose(dw, r @ x_mix.T @ g, atol=1e-5)


@cases("scale", ["absmean", "survivors", "absmedian"], core=["absmean"])
@cases("granularity", ["tensor", "channel", 48], core=["channel"])
@cases("dtype", ["float32", "bfloat16", "float16"], core=["float32"])
def test_an_unpacked_kernel_packs_to_the_same_codes(scale, granularity, dtype):
    config = bj.TernaryConfig(scale=scale, granularity=granularity, rotation="hadamard")
    packed = bj.pack(jnp.asarray(normal(96, 12), dtype), config)
    again = bj.pack(bj.unpack(packed), config)
    np.testing.assert_array_equal(again.codes, packed.codes)
    near = {"float32": 4e-7, "bfloat16": 3e-3, "float16": 4e-4}[dtype]
    np.testing.assert_allclose(again.scale, packed.scale, rtol=near)


def test_the_scale_of_a_whole_kernel_comes_back_to_the_bit():
    packed = bj.pack(normal(576, 40), ROTATED)
    oracles.assert_same_bits(bj.pack(bj.unpack(packed), ROTATED).scale, packed.scale)


def test_a_few_large_inputs_no_longer_coarsen_the_others():
    """5 of 512 inputs at 50 times the others: what int8 and what two bits lose of x W."""
    x, w = np.array(normal(64, 512)), np.array(normal(512, 64, seed=1)) / np.sqrt(512)
    x[:, :5] *= 50
    lost = {}
    exact = x.astype(np.float64) @ w
    for name, config in (("plain", bj.B158), ("rotated", ROTATED)):
        w_hat = np.asarray(bj.quantize(jnp.asarray(w), config).dequantize(), np.float64)
        ternary = x @ w_hat
        y = np.asarray(bj.ternary_dot(jnp.asarray(x), jnp.asarray(w), config), np.float64)
        size = np.square(exact).mean()
        lost[name] = np.square(y - ternary).mean() / size, np.square(ternary - exact).mean() / size
    assert lost["rotated"][0] < 0.05 * lost["plain"][0]  # the activations' codes
    # and the kernel's, where its input features have outliers as well
    w[:5] *= 50
    for config, name in ((bj.B158, "plain"), (ROTATED, "rotated")):
        w_hat = np.asarray(bj.quantize(jnp.asarray(w), config).dequantize())
        lost[name] = np.square(w_hat - w).sum() / np.square(w).sum()
    assert lost["rotated"] < 0.4 * lost["plain"]


def test_configs_print_and_compare_as_before():
    assert repr(bj.B158) == (
        "TernaryConfig(scale='absmean', threshold=0.5, granularity='tensor', eps=1e-05)"
    )
    assert repr(ROTATED).endswith(", eps=1e-05, rotation='hadamard')")
    assert eval(repr(ROTATED), {"TernaryConfig": bj.TernaryConfig}) == ROTATED != bj.B158


@pytest.mark.parametrize("name", ["hadamrad", "", True, 1, ("hadamard",)])
def test_only_a_hadamard_rotation_is_known(name):
    with pytest.raises(ValueError, match="`rotation` must be one of None, 'hadamard', got"):
        bj.TernaryConfig(rotation=name)


@pytest.mark.parametrize(
    "call", [bj.quantize, bj.pack, bj.fake_quantize], ids=["quantize", "pack", "fake_quantize"]
)
@pytest.mark.parametrize("length", [1, 7, 6, 4098])
def test_lengths_without_blocks_are_refused(call, length):
    with pytest.raises(ValueError, match=rf"\({length},\) has blocks of [12]. Pass a config with"):
        call(jnp.ones((length, 3)), ROTATED)


def test_products_refuse_them_too():
    with pytest.raises(ValueError, match=r"^ternary_dot: `rotation`='hadamard' rotates blocks of"):
        bj.ternary_dot(jnp.ones((2, 6)), jnp.ones((6, 3)), ROTATED)
    dense = bj.ternarize(lambda p, x: x @ p["w"], weights=ROTATED)
    with pytest.raises(ValueError, match=r"^ternarize: w: `rotation`='hadamard' rotates blocks"):
        dense({"w": jnp.ones((6, 3))}, jnp.ones((2, 6)))


def test_bad_tokens_stay_in_their_rows():
    x = normal(3, 24).at[1, 2].set(jnp.inf)
    w = normal(24, 5, seed=1)
    for y in (bj.ternary_dot(x, w, ROTATED), bj.matmul(x, bj.pack(w, ROTATED))):
        assert np.isnan(y).all(-1).tolist() == [False, True, False]
        assert np.isfinite(y[::2]).all()


def test_a_trit_that_flips_is_one_of_the_rotated_kernel():
    w = normal(24, 5)
    first = bj.analysis.trit_stats({"kernel": w}, ROTATED)
    given = {"inputs": {"kernel": w.T}}
    again = bj.analysis.trit_stats({"kernel": w * 1.5}, ROTATED, previous=first, **given)
    assert again.rows[0].flip_rate == 0.0
    assert again.rows[0].zeros == float((bj.quantize(w, ROTATED).codes == 0).mean())
    codes, _ = bj.quantize_activations(jnp.asarray(oracles.rotated32(w.T, ROTATED)))
    np.testing.assert_allclose(again.rows[0].clipped, (abs(np.asarray(codes)) == 127).mean())


def test_a_report_measures_the_kernel_and_not_its_rotation():
    w = normal(24, 5)
    _, report = bj.pack_params({"kernel": w}, ROTATED)
    hat = np.asarray(bj.quantize(w, ROTATED).dequantize())
    want = np.square(w - hat).sum() / np.square(w).sum()
    np.testing.assert_allclose(report.rows[0].error, want, rtol=1e-5)
