"""Convolutions: integer sums and gradients against float64 NumPy, written from the definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from draws import normal
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax._layers import dimensions
from bitnet_jax._matmul import convolve
from bitnet_jax._ops.ternary_dot import ternary_conv

CASES = {
    "same": {},
    "valid": {"padding": "VALID"},
    "strided": {"strides": (2, 1)},
    "strides as one": {"strides": 2, "padding": 1},
    "pairs": {"padding": ((2, 0), (0, 1))},
    "dilated": {"kernel_dilation": (2, 1), "padding": "VALID"},
    "input dilated": {"input_dilation": 2, "padding": [1, 2]},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4},
    "circular": {"padding": "CIRCULAR", "kernel_dilation": 2},
    "reflect": {"padding": "REFLECT"},
    "one by one": {"kernel_size": (1, 1)},
    "even": {"kernel_size": (2, 4)},
}
DEFAULTS = {
    "kernel_size": (3, 3),
    "strides": 1,
    "padding": "SAME",
    "input_dilation": 1,
    "kernel_dilation": 1,
    "feature_group_count": 1,
}


def case(name, outputs=8, shape=(2, 7, 6, 4)):
    """A call, an input and a kernel."""
    how = DEFAULTS | CASES[name]
    call = dimensions.conv(shape, outputs, how.pop("kernel_size"), **how)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w = np.random.default_rng(1).normal(size=call.kernel_shape).astype(np.float32)
    return call, jnp.asarray(x), jnp.asarray(w)


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def window_sums(x, w, name):
    """sum over window and channels of x * w, in NumPy's own integers or floats, pixel by pixel."""
    how = DEFAULTS | CASES[name]
    x, w = np.asarray(x), np.asarray(w)
    dilation, strides = pair(how["kernel_dilation"]), pair(how["strides"])
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[:2], dilation, strict=True)]
    padding = how["padding"]
    if padding in ("CIRCULAR", "REFLECT"):
        around = [(0, 0), *(((r - 1) // 2, r // 2) for r in reach), (0, 0)]
        x = np.pad(x, around, mode="wrap" if padding == "CIRCULAR" else "reflect")
        padding = "VALID"
    for axis, step in enumerate(pair(how["input_dilation"]), 1):
        if step > 1:
            wide = list(x.shape)
            wide[axis] = (wide[axis] - 1) * step + 1
            spread = np.zeros(wide, x.dtype)
            spread[
                tuple(slice(None, None, step) if a == axis else slice(None) for a in range(4))
            ] = x
            x = spread
    if padding == "SAME":
        pads = []
        for n, r, s in zip(x.shape[1:3], reach, strides, strict=True):
            total = max((-(-n // s) - 1) * s + r - n, 0)
            pads.append((total // 2, total - total // 2))
    elif padding == "VALID":
        pads = [(0, 0), (0, 0)]
    else:
        pads = [pair(p) for p in ((padding,) * 2 if isinstance(padding, int) else padding)]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    rows, columns = ((n - r) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides, strict=True))
    groups, outputs = how["feature_group_count"], w.shape[-1]
    y = np.zeros((x.shape[0], rows, columns, outputs), np.result_type(x, w, np.int64))
    for i, j in itertools.product(range(rows), range(columns)):
        top, left = i * strides[0], j * strides[1]
        patch = x[:, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]]
        for g in range(groups):
            part = patch[..., g * w.shape[2] : (g + 1) * w.shape[2]]
            n = slice(g * outputs // groups, (g + 1) * outputs // groups)
            y[:, i, j, n] = np.einsum("bhwc,hwcn->bn", part, w[..., n])
    return y


def codes_of(x, w, config):
    xq, gamma = bj.quantize_activations(x, axes=(1, 2, 3))
    t = bj.quantize(w, config, contracting_axes=(0, 1, 2))
    return np.asarray(xq, np.int64), np.asarray(gamma), t


@cases("name", list(CASES), core=["strided", "input dilated", "groups", "circular"])
@cases("config", {"tensor": bj.B158, "channel": bj.PHASE4}, core=["channel"])
def test_output_is_the_exact_sum_scaled_once(name, config):
    call, x, w = case(name)
    xq, gamma, t = codes_of(x, w, config)
    sums = window_sums(xq, np.asarray(t.codes, np.int64), name)
    y = call.from_canonical(
        ternary_conv(call.to_canonical(x), w, call.convolution, config), x.shape
    )
    scale = np.asarray(t.scale, np.float64).reshape(-1)
    exact = sums * (gamma.astype(np.float64) / 127) * scale
    np.testing.assert_allclose(y, exact, rtol=3e-7, atol=1e-12)
    # and the int32 sums themselves, to the bit
    flat = t.codes.reshape(-1, w.shape[-1])
    (ours,) = call.convolution.sums(call.to_canonical(jnp.asarray(xq, jnp.int8)), flat, 1)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(call.from_canonical(ours, x.shape), sums)


@cases("name", list(CASES), core=["strided", "groups"])
def test_gradients_are_those_of_the_dequantised_convolution(name):
    call, x, w = case(name)

    def ours(x, w):
        return call.from_canonical(ternary_conv(call.to_canonical(x), w, call.convolution), x.shape)

    g = normal(*jax.eval_shape(ours, x, w).shape, seed=3)
    dx, dw = jax.jit(lambda x, w, g: jax.vjp(ours, x, w)[1](g))(x, w, g)
    x_hat = bj.fake_quantize_activations(x, axes=(1, 2, 3))
    w_hat = bj.fake_quantize(w, contracting_axes=(0, 1, 2))
    # Both are linear in the other operand: <g, conv(u, w_hat)> = <dx, u>, whatever u is.
    u = np.random.default_rng(4).normal(size=x.shape)
    v = np.random.default_rng(5).normal(size=w.shape)
    left = (np.asarray(g, np.float64) * window_sums(u, np.asarray(w_hat, np.float64), name)).sum()
    np.testing.assert_allclose((np.asarray(dx, np.float64) * u).sum(), left, rtol=1e-4, atol=1e-3)
    left = (np.asarray(g, np.float64) * window_sums(np.asarray(x_hat, np.float64), v, name)).sum()
    np.testing.assert_allclose((np.asarray(dw, np.float64) * v).sum(), left, rtol=1e-4, atol=1e-3)


@cases("group", [2, 4, 12, 36], core=[12])
def test_groups_along_the_contraction(group):
    call, x, w = case("same")
    config = bj.TernaryConfig(granularity=group)
    xq, gamma, t = codes_of(x, w, config)
    w_hat = np.asarray(t.dequantize(), np.float64)
    y = ternary_conv(x, w, call.convolution, config)
    exact = window_sums(xq.astype(np.float64), w_hat, "same") * (gamma.astype(np.float64) / 127)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    packed = bj.pack(w, config, contracting_axes=(0, 1, 2))
    assert_same_bits(convolve(x, packed, call.convolution), y)


PACKED = [bj.B158, bj.PHASE4, bj.TWN, bj.Int8Config()]


@pytest.mark.optimised
@cases(
    ("name", "config"),
    [(name, config) for name in ("same", "strided", "groups", "circular") for config in PACKED],
    core=[("strided", bj.B158), ("groups", bj.Int8Config())],
)
def test_packed_gives_the_bits_of_training(name, config):
    call, x, w = case(name)
    x = call.to_canonical(x)
    packed = bj.pack(w, config, contracting_axes=(0, 1, 2))

    def train(x, w):
        return ternary_conv(x, w, call.convolution, config)

    def serve(x, packed):
        return convolve(x, packed, call.convolution)

    y = train(x, w)
    for other in (
        jax.jit(train)(x, w),
        serve(x, packed),
        jax.jit(serve)(x, packed),
        jnp.concatenate([serve(x[:1], packed), serve(x[1:], packed)]),
        jax.vmap(lambda x: serve(x[None], packed)[0])(x),
    ):
        assert_same_bits(other, y)
    g = jnp.ones_like(y)
    served, trained = (
        jax.jit(lambda x, g, f=f: jax.vjp(f, x)[1](g)[0])(x, g)
        for f in (lambda x: serve(x, packed), lambda x: train(x, w))
    )
    np.testing.assert_allclose(served, trained, rtol=1e-5, atol=1e-6)


def test_a_prepared_kernel_convolves_too():
    call, x, w = case("same")
    packed = bj.pack(w, contracting_axes=(0, 1, 2))
    y = convolve(x, packed, call.convolution)
    assert_same_bits(convolve(x, bj.prepare(packed), call.convolution), y)


def test_other_devices_sum_in_bfloat16_as_exactly():
    call, x, w = case("same", outputs=16, shape=(1, 5, 5, 64))
    xq, _, t = codes_of(x, w, bj.B158)
    w_codes = t.codes.reshape(-1, 16)
    codes = jnp.asarray(xq, jnp.int8)
    exact = call.convolution.sums(codes, w_codes, 1)[0]
    bfloat16 = call.convolution._conv(
        codes.astype(jnp.bfloat16),
        w_codes.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    np.testing.assert_array_equal(bfloat16, exact)
    lowered = jax.jit(lambda x, w: call.convolution.sums(x, w, 1)).trace(codes, w_codes)
    assert "bf16" in lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "bf16" not in lowered.lower(lowering_platforms=("cpu",)).as_text()


def test_strength_blends_and_reaches_the_int8_path():
    call, x, w = case("same")

    def at(strength):
        return ternary_conv(x, w, call.convolution, strength=strength)

    plain = window_sums(np.asarray(x, np.float64), np.asarray(w, np.float64), "same")
    np.testing.assert_allclose(at(0.0), plain, rtol=1e-4, atol=1e-4)
    assert_same_bits(jax.jit(at)(jnp.float32(1.0)), at(1.0))
    half = at(0.5)
    assert not np.array_equal(half, at(1.0))
    assert not np.allclose(half, plain, atol=1e-3)


def test_weight_only_is_a_float_convolution():
    call, x, w = case("strided")
    y = ternary_conv(x, w, call.convolution, activations=None)
    w_hat = np.asarray(bj.fake_quantize(w, contracting_axes=(0, 1, 2)), np.float64)
    np.testing.assert_allclose(
        y, window_sums(np.asarray(x, np.float64), w_hat, "strided"), atol=1e-4
    )
    packed = bj.pack(w, contracting_axes=(0, 1, 2))
    served = convolve(x, packed, call.convolution, activations=None)
    np.testing.assert_allclose(served, y, rtol=1e-5, atol=1e-6)


def test_nan_in_an_example_stays_in_it():
    call, x, w = case("same")
    y = ternary_conv(x.at[0, 3, 3, 0].set(jnp.nan), w, call.convolution)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
