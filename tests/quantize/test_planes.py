"""Kernels as sums of ternary planes, ``w = s1 T1 + s2 T2``, against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases

import bitnet_jax as bj

CONFIGS = {
    "tensor": bj.TernaryConfig(planes=2),
    "channel": bj.TernaryConfig(scale="survivors", granularity="channel", planes=3),
    "groups": bj.TernaryConfig(granularity=4, planes=2),
    "median": bj.TernaryConfig(scale="absmedian", planes=4),
}
KERNELS = {
    "dense": ((24, 10), None, ()),
    "attention-out": ((3, 4, 5), (0, 1), ()),
    "outer": ((4, 5, 8), (0, 2), ()),
    "experts": ((3, 8, 5), None, 0),
    "stacked-attention": ((2, 3, 4, 5), (1, 2), 0),
}


def gaussian(shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def spread(scale, shape):
    """A scale over every code, by NumPy alone."""
    for axis, want in enumerate(shape):
        scale = np.repeat(scale, want // scale.shape[axis], axis=axis)
    return scale


@cases("config", CONFIGS, core=["tensor", "groups"])
@cases(("shape", "contracting", "batch"), KERNELS, core=["dense", "stacked-attention"])
def test_each_plane_quantises_what_those_before_it_left_over(shape, contracting, batch, config):
    w, axes = gaussian(shape), {"contracting_axes": contracting, "batch_axes": batch}
    exact = oracles.planes(oracles.quantize64, w.astype(np.float64), config, contracting, batch)
    pinned = oracles.planes(oracles.quantize32, w, config, contracting, batch)
    t = jax.jit(lambda w: bj.quantize(w, config, **axes))(w)
    assert isinstance(t, bj.TernaryPlanes)
    assert len(t.planes) == config.planes
    for plane, want, bits in zip(t.planes, exact, pinned, strict=True):
        assert plane.scale.ndim == w.ndim
        np.testing.assert_allclose(spread(plane.scale, shape), want.scale, rtol=1e-5)
        oracles.assert_codes_agree(plane.codes, want, config.threshold)
        oracles.assert_same_bits(plane.codes, bits.codes)
        oracles.assert_same_bits(spread(np.asarray(plane.scale), shape), bits.scale)
    assert t.codes.shape == (config.planes, *shape)
    assert t.scale.shape == (config.planes, *t.planes[0].scale.shape)
    total = sum(kernel.codes * kernel.scale for kernel in exact)
    np.testing.assert_allclose(t.dequantize(), total, atol=1e-5)
    oracles.assert_same_bits(jax.jit(bj.TernaryPlanes.dequantize)(t), t.dequantize(), "under jit")
    oracles.assert_same_bits(bj.quantize(w, config, **axes).dequantize(), t.dequantize(), "eager")
    packed = bj.pack(np.moveaxis(w, batch, 0) if batch else w, config, **axes)
    oracles.assert_same_bits(packed.dequantize(), t.dequantize(), "packed")
    oracles.assert_same_bits(bj.fake_quantize(w, config, **axes), t.dequantize(), "fake")


def test_more_planes_leave_less():
    w = gaussian((64, 48))
    lost = []
    for planes in range(1, 5):
        t = bj.quantize(w, bj.TernaryConfig(granularity="channel", planes=planes))
        lost.append(float(np.square(w - np.asarray(t.dequantize())).sum() / np.square(w).sum()))
    assert lost[1] < 0.5 * lost[0]
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_low_precision_kernels_are_quantised_in_float32_and_summed_before_the_cast(dtype):
    w, config = gaussian((24, 10), dtype), CONFIGS["tensor"]
    bits = oracles.planes(oracles.quantize32, w.astype(np.float32), config)
    total = sum(kernel.codes.astype(np.float32) * kernel.scale for kernel in bits)
    t = bj.quantize(w, config)
    oracles.assert_same_bits(t.dequantize(), total)
    oracles.assert_same_bits(t.dequantize(dtype), total.astype(dtype))
    oracles.assert_same_bits(bj.fake_quantize(w, config), total.astype(dtype))
    oracles.assert_same_bits(bj.pack(w, config).dequantize(), total.astype(dtype))


def test_the_gradient_is_straight_through():
    w, g = gaussian((24, 10)), gaussian((24, 10))[::-1]
    back = jax.grad(lambda w: (g * bj.fake_quantize(w, CONFIGS["channel"])).sum())(w)
    oracles.assert_same_bits(back, g)
    half = bj.fake_quantize(w, CONFIGS["channel"], strength=0.5)
    want = 0.5 * w + 0.5 * np.asarray(bj.quantize(w, CONFIGS["channel"]).dequantize())
    np.testing.assert_allclose(half, want, rtol=1e-6)


@cases("config", CONFIGS, core=["groups"])
@pytest.mark.parametrize("activations", [bj.ActivationConfig(), None], ids=["int8", "float"])
def test_both_gradients_of_the_training_op_are_the_closed_forms(config, activations):
    x, w, g = gaussian((5, 24)), gaussian((24, 10)), gaussian((5, 10))
    _, back = jax.vjp(lambda x, w: bj.ternary_dot(x, w, config, activations=activations), x, w)
    dx, dw = back(g)
    want_dx, want_dw = oracles.gradients64(x, w, g, config, bj.ActivationConfig())
    if activations is None:
        want_dw = x.astype(np.float64).T @ g
    np.testing.assert_allclose(dx, want_dx, atol=1e-4)
    np.testing.assert_allclose(dw, want_dw, atol=1e-4)
    phased, back = jax.vjp(
        lambda w: bj.ternary_dot(x, w, config, activations=activations, strength=jnp.float32(1)), w
    )
    np.testing.assert_allclose(phased, bj.ternary_dot(x, w, config, activations=activations), 1e-5)
    np.testing.assert_allclose(back(g)[0], want_dw, atol=1e-4)


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
def test_weight_only_products_are_those_of_the_summed_kernel(implementation):
    x, w, config = gaussian((5, 24)), gaussian((24, 10)), CONFIGS["groups"]
    packed, how = bj.pack(w, config), {"activations": None, "implementation": implementation}
    want = x.astype(np.float64) @ np.asarray(packed.dequantize(), np.float64)
    for leaf in (packed, bj.prepare(packed, None if implementation == "reference" else "xla")):
        if leaf is packed or implementation != "reference":
            name = "xla" if leaf is not packed else implementation
            y = bj.matmul(x, leaf, **(how | {"implementation": name}))
            np.testing.assert_allclose(y, want, atol=1e-5)
    oracles.assert_same_bits(
        jax.jit(lambda x: bj.ternary_dot(x, w, config, activations=None))(x),
        jax.jit(lambda x: bj.matmul(x, packed, activations=None))(x),
    )


def test_zero_kernels_have_the_smallest_scale_in_every_plane():
    t = bj.quantize(np.zeros((8, 4), np.float32), CONFIGS["channel"])
    assert not np.asarray(t.codes).any()
    np.testing.assert_array_equal(t.scale, np.float32(1e-5))


@pytest.mark.parametrize("planes", [0, -1, 5, True, 1.5, "2", None])
def test_a_number_of_planes_that_is_none(planes):
    with pytest.raises(
        ValueError, match=r"^TernaryConfig: `planes` must be an integer from 1 to 4"
    ):
        bj.TernaryConfig(planes=planes)


def test_a_config_states_its_planes_where_it_has_any():
    assert "planes" not in repr(bj.B158)
    assert repr(bj.TernaryConfig(planes=2)).endswith("eps=1e-05, planes=2)")
    assert bj.TernaryConfig(planes=1) == bj.B158
    assert bj.TernaryConfig(planes=2) != bj.B158
    assert bj.TernaryConfig(planes=2).one_plane == bj.B158


def test_unpack_refuses_and_names_what_to_do():
    packed = bj.pack(gaussian((24, 10)), CONFIGS["tensor"])
    with pytest.raises(NotImplementedError, match=r"^unpack: `packed` is a sum of 2.*dequantize"):
        bj.unpack(packed)
    tree = {"a": {"kernel": packed}}
    with pytest.raises(NotImplementedError, match=r"^unpack_params: a/kernel is a sum of 2 tern"):
        bj.unpack_params(tree)
    floats = bj.unpack_params(tree, dequantize=True)["a"]["kernel"]
    oracles.assert_same_bits(floats, packed.dequantize())


def test_arrays_that_are_not_those_of_planes_are_refused():
    packed = bj.pack(gaussian((24, 10)), CONFIGS["tensor"])
    x = gaussian((2, 24))
    for change, match in (
        (
            lambda a: a[:1],
            r"has codes that are uint8 of shape \(1, 6, 10\); shape \(24, 10\) needs",
        ),
        (lambda a: a[0], "has codes that are"),
        (lambda a: a if a.ndim == 3 and a.shape[-1] > 1 else a[:1], "each of its 2 planes needs"),
    ):
        with pytest.raises(ValueError, match=f"^matmul: `packed` .*{match}"):
            bj.matmul(x, jax.tree.map(change, packed))
    prepared = bj.prepare(packed, "xla")
    with pytest.raises(ValueError, match="each of its 2 planes needs its own"):
        bj.matmul(x, jax.tree.map(lambda a: a[:1] if a.ndim == 2 else a, prepared))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_layers_of_a_stack_and_scans_have_the_bits_of_their_own_kernels(implementation):
    w, config = gaussian((3, 24, 24)), CONFIGS["groups"]
    stack = bj.pack(w, config, batch_axes=0)
    assert (stack.shape, stack.ndim, stack.codes.shape) == (w.shape, 3, (3, 2, 6, 24))
    x, alone = gaussian((5, 24)), [bj.pack(one, config) for one in w]
    want = x
    for one in alone:
        want = bj.matmul(want, one)
    try:
        prepared = bj.prepare(stack, implementation)
    except NotImplementedError:
        pytest.skip("no C++ compiler built the native product")
    assert prepared.shape == w.shape
    for kernels in (stack, prepared):
        assert [kernel.shape for kernel in kernels] == [(24, 24)] * 3
        oracles.assert_same_bits(bj.matmul(x, kernels[1]), bj.matmul(x, alone[1]))

        @jax.jit
        def run(x, kernels):
            return jax.lax.scan(lambda h, i: (bj.matmul(h, kernels[i]), None), x, jnp.arange(3))[0]

        @jax.jit
        def sliced(x, kernels):
            return jax.lax.scan(lambda h, one: (bj.matmul(h, one), None), x, kernels)[0]

        oracles.assert_same_bits(run(x, kernels), want)
        oracles.assert_same_bits(sliced(x, kernels), want)
