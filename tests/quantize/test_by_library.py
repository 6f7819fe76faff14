"""The library's quantisers: the bits of the equations, on every path and where it may run."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from native_paths import PATHS, needs_it

import bitnet_jax as bj
from bitnet_jax import _native
from bitnet_jax._quantize import by_library, int8, ternary

pytestmark = needs_it

CONFIGS = {
    "b158": bj.B158,
    "channel": bj.PHASE4,
    "groups": bj.TernaryConfig(granularity=20),
    "survivors": bj.TernaryConfig(scale="survivors", threshold=0.7),
    "survivors-channel": bj.TWN,
    "survivors-groups": bj.TernaryConfig(scale="survivors", threshold=0.7, granularity=20),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# Rows around the sixteen that are summed together, outputs around the 128 of a piece.
SHAPES = [(20, 1), (20, 7), (60, 128), (300, 131), (340, 260), (4100, 3)]


@pytest.fixture(params=PATHS)
def path(request):
    _native.load().choose(request.param)
    yield request.param
    _native.load().choose(None)


def gaussian(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def never(w, config):
    raise AssertionError("the plain form ran")


def native(w, config):
    """Codes and scale of (K, N) by the library, or an error."""
    codes, scale = jax.jit(lambda w: by_library.kernel_codes(w, config, never))(w[None])
    return np.asarray(codes[0]), np.asarray(scale[0])


@cases("config", CONFIGS, core=["b158", "survivors-groups"])
@cases("dtype", DTYPES, core=["bfloat16"])
def test_the_equation_on_every_path(path, config, dtype):
    for i, shape in enumerate(SHAPES):
        w = gaussian(shape, i, dtype)
        codes, scale = native(w, config)
        want = oracles.quantize32(w, config)
        group = config.granularity if isinstance(config.granularity, int) else shape[0]
        oracles.assert_same_bits(codes, want.codes, shape)
        of_each = np.broadcast_to(scale, (len(scale), shape[1])).repeat(group, axis=0)
        oracles.assert_same_bits(of_each, want.scale, shape)


@pytest.mark.parametrize("kind", ["nan", "inf", "zeros", "largest", "smallest", "one of many"])
@cases("config", CONFIGS, core=["b158", "survivors"])
def test_extreme_weights_have_the_bits_of_plain_jax(path, kind, config):
    w = gaussian((100, 140))
    places = np.random.default_rng(1).random(w.shape) < 0.01
    w = {
        "nan": np.where(places, np.nan, w),
        "inf": np.where(places, -np.inf, w),
        "zeros": np.where(places, -0.0, 0.0),
        "largest": np.where(places, np.finfo(np.float32).max, -np.finfo(np.float32).max),
        "smallest": w * 1e-38,
        "one of many": np.where(np.arange(w.size).reshape(w.shape) == 7, 1e30, w),
    }[kind].astype(np.float32)
    config = dataclasses.replace(config, eps=1.2e-38)
    for got, want in zip(native(w, config), ternary._quantize(w[None], config), strict=True):
        oracles.assert_same_bits(got, np.asarray(want)[0])


@cases("dtype", DTYPES, core=["float32"])
def test_codes_of_tokens_have_the_bits_of_plain_jax(path, dtype):
    for shape, group in itertools.product([(1, 60), (5, 60), (2, 3, 60), (60,)], [None, 20]):
        x, config = gaussian(shape, 0, dtype), bj.ActivationConfig(group=group)
        got = jax.jit(bj.quantize_activations, static_argnums=1)(x, config)
        want = int8.plain_activation_codes(x, config, (-1,))
        for one, other in zip(got, want, strict=True):
            oracles.assert_same_bits(one, other)


# Which form runs ---------------------------------------------------------------------------


def calls(function, *operands):
    """The library's custom calls in a lowered program."""
    return set(re.findall(r"@(bitnet_\w+)", jax.jit(function).lower(*operands).as_text()))


ALL = {_native.QUANTIZE, _native.QUANTIZE_KERNEL, _native.MULTIPLY_CODES}


def step(x, w):
    return jax.grad(lambda w: jnp.sum(bj.ternary_dot(x, w) ** 2))(w)


def test_a_training_step_is_three_calls():
    assert calls(step, gaussian((8, 32)), gaussian((32, 16))) == ALL


def test_int8_kernels_and_medians_are_plain():
    w = gaussian((32, 16))
    assert calls(lambda w: bj.fake_quantize(w, bj.Int8Config()), w) == set()
    assert calls(lambda w: bj.fake_quantize(w, bj.TernaryConfig(scale="absmedian")), w) == set()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_plain_jax_where_xla_cuts_arrays_over_devices(kind):
    x, w = gaussian((8, 32)), gaussian((32, 16), 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        assert calls(bj.ternary_dot, rows, whole) == set()
        oracles.assert_same_bits(bj.ternary_dot(rows, whole), bj.ternary_dot(x, w))


def test_each_device_of_a_shard_map_has_its_own():
    x, w = gaussian((8, 32)), gaussian((32, 16), 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("data"), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[0])
    def each(x, w):
        return bj.ternary_dot(x, w)

    assert calls(each, x, w) == ALL
    oracles.assert_same_bits(jax.jit(each)(x, w), bj.ternary_dot(x, w))


def test_mapped_kernels_are_more_slices():
    w = gaussian((3, 2, 40, 12))
    for config in (bj.B158, bj.TWN):
        mapped = jax.vmap(jax.vmap(functools.partial(bj.quantize, config=config)))(w)
        for i, j in itertools.product(range(3), range(2)):
            want = oracles.quantize32(w[i, j], config)
            oracles.assert_same_bits(mapped.codes[i, j], want.codes)
            oracles.assert_same_bits(
                np.broadcast_to(mapped.scale[i, j], want.scale.shape), want.scale
            )


def test_a_derivative_of_the_quantiser_itself_is_that_of_plain_jax():
    w = gaussian((1, 20, 6))

    def scale(quantize):
        return jax.jvp(lambda w: quantize(w, bj.PHASE4)[1], (w,), (np.ones_like(w),))

    got, want = scale(ternary.quantize_canonical), scale(ternary._quantize)
    oracles.assert_same_bits(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    assert np.any(np.asarray(got[1]) != 0)


def test_mapping_over_nothing_gives_nothing():
    x, w = gaussian((0, 4, 32)), gaussian((0, 32, 16))
    one = gaussian((32, 16))
    stack = bj.prepare(bj.pack(gaussian((3, 32, 16)), batch_axes=0))
    none = np.zeros(0, np.int32)
    for mapped, operands, shape in (
        (lambda x: bj.ternary_dot(x, one), (x,), (0, 4, 16)),
        (lambda w: bj.ternary_dot(gaussian((4, 32)), w), (w,), (0, 4, 16)),
        (bj.ternary_dot, (x, w), (0, 4, 16)),
        (lambda x: bj.matmul(x, bj.pack(one)), (x,), (0, 4, 16)),
        (lambda x, at: bj.matmul(x, stack[at]), (x, none), (0, 4, 16)),
        (lambda w: bj.quantize(w).codes, (w,), (0, 32, 16)),
        (lambda x: bj.quantize_activations(x)[0], (x,), (0, 4, 32)),
        (lambda x: bj.ternary_dot(x, one), (x[:, :0],), (0, 0, 16)),
    ):
        assert jax.vmap(mapped)(*operands).shape == shape
        assert jax.jit(jax.vmap(mapped))(*operands).shape == shape


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_debugging_flags_find_what_the_library_gave(kind, capsys):
    x, w = gaussian((4, 32)), gaussian((32, 16))
    bad = x.copy()
    bad[1, 3] = kind
    kernel = bj.prepare(bj.pack(w))
    raises = getattr(jax, f"debug_{kind}s")
    found = pytest.raises(FloatingPointError, match=rf"\({kind}\) encountered in bitnet_native")
    with raises(True):
        for run in (
            lambda x: bj.ternary_dot(x, w),  # its gamma is Inf, its output NaN
            lambda x: jax.grad(lambda w: jnp.sum(bj.ternary_dot(x, w)))(w),
        ):
            run(x)
            with found:
                run(bad)
        bj.matmul(x, kernel)
        if kind == "nan":  # its gamma stays inside
            with found:
                bj.matmul(bad, kernel)
    capsys.readouterr()  # JAX prints that it looks for the operation


def test_a_nan_without_jit_is_what_it_is():
    x, w = gaussian((4, 32)), gaussian((32, 16))
    x[1, 3] = np.nan
    with jax.disable_jit():
        oracles.assert_same_bits(np.isnan(bj.ternary_dot(x, w)).any(1), np.isnan(x).any(1))
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
            bj.ternary_dot(x, w)
