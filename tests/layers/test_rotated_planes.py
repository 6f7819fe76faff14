"""Kernels that are rotated once, and then sums of ternary planes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from convert_kernels import dequantized
from draws import normal, params_of
from meshes import both_kinds, mesh_of

import bitnet_jax as bj
from bitnet_jax.convert import calibrate
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._methods import METHODS

BOTH = bj.TernaryConfig(planes=2, rotation="hadamard")
CONFIGS = {
    "tensor": BOTH,
    "channel": bj.TernaryConfig(
        scale="survivors", granularity="channel", planes=3, rotation="hadamard"
    ),
    "groups": bj.TernaryConfig(granularity=4, planes=4, rotation="hadamard"),
}
KERNELS = {
    "dense": ((12, 5), None, ()),
    "attention-out": ((3, 4, 5), (0, 1), ()),
    "stacked": ((2, 3, 12, 5), (1, 2), 0),
}
X = normal(2, 6, 8, 12)
LAYERS = {
    "dense": bj.linen.BitDense(5, weights=BOTH),
    "general": bj.linen.BitDenseGeneral((3, 4), axis=(-2, -1), weights=CONFIGS["channel"]),
    "conv": bj.linen.BitConv(6, (3, 3), strides=2, weights=BOTH),
    "einsum": bj.linen.BitEinsum((6, 12, 5), "behk,ekn->behn", weights=CONFIGS["groups"]),
}


def same_leaves(got, want):
    """Both trees have the same arrays."""
    jax.tree.map(oracles.assert_same_bits, jax.tree.leaves(got), jax.tree.leaves(want))


@cases("config", CONFIGS, core=["tensor", "groups"])
@cases(("shape", "contracting", "batch"), KERNELS, core=["dense", "stacked"])
def test_planes_are_of_the_rotated_kernel_and_come_back_together(shape, contracting, batch, config):
    w, axes = normal(*shape), {"contracting_axes": contracting, "batch_axes": batch}
    exact = oracles.planes(oracles.quantize64, np.float64(w), config, contracting, batch)
    bits = oracles.planes(oracles.quantize32, np.asarray(w), config, contracting, batch)
    t = jax.jit(lambda w: bj.quantize(w, config, **axes))(w)
    assert isinstance(t, bj.TernaryPlanes)
    assert t.rotated_axis == -2
    for plane, want, pinned in zip(t.planes, exact, bits, strict=True):
        oracles.assert_codes_agree(plane.codes, want, config.threshold)
        oracles.assert_same_bits(plane.codes, pinned.codes)
    total = sum(kernel.codes * kernel.scale for kernel in exact)
    want = oracles.rotation64(shape[-2]) @ total
    np.testing.assert_allclose(t.dequantize(), want, atol=1e-5)
    # A plane is a summand of the kernel.
    parts = sum(np.asarray(plane.dequantize(), np.float64) for plane in t.planes)
    np.testing.assert_allclose(parts, want, atol=1e-5)
    packed = bj.pack(w, config, **axes)
    for other in (packed.dequantize(), bj.fake_quantize(w, config, **axes)):
        oracles.assert_same_bits(other, t.dequantize())
    low = bj.quantize(w, config, **axes).dequantize(jnp.bfloat16)
    oracles.assert_same_bits(low, t.dequantize().astype(jnp.bfloat16))
    moved = jax.tree.map(lambda a: a, t)
    oracles.assert_same_bits(moved.dequantize(), t.dequantize())


def test_two_planes_lose_less_than_one_and_rotated_ones_less_than_both():
    large = np.ones((96, 1), np.float32)
    large[:3] = 50
    w = np.asarray(normal(96, 40)) * large
    lost = {}
    for planes in (1, 2):
        for rotation in (None, "hadamard"):
            t = bj.quantize(w, bj.TernaryConfig(planes=planes, rotation=rotation))
            error = np.square(w - np.asarray(t.dequantize())).sum()
            lost[planes, rotation] = error / np.square(w).sum()
    assert lost[2, "hadamard"] < 0.7 * min(lost[2, None], lost[1, "hadamard"])


def test_configs_print_and_name_both():
    assert repr(BOTH).endswith("eps=1e-05, planes=2, rotation='hadamard')")
    assert BOTH.one_plane == bj.TernaryConfig(rotation="hadamard")


@pytest.mark.optimised
@cases("name", list(LAYERS), core=["general", "conv"])
def test_packed_gives_the_bits_of_training(name):
    model = LAYERS[name]
    params = params_of(model, X)
    packed, _ = bj.linen.pack(model, params, X)

    def run(p):
        return model.apply({"params": p}, X)

    trained = jax.jit(run)(params)
    oracles.assert_same_bits(jax.jit(run)(packed), trained)
    oracles.assert_same_bits(run(params), trained)
    prepared = jax.jit(run)(bj.prepare(packed))
    if name != "conv":  # a convolution has no prepared form of its own
        oracles.assert_same_bits(prepared, trained)


def test_weight_only_products_are_those_of_the_kernel_that_came_back():
    x, packed = normal(5, 12), bj.pack(normal(12, 5, seed=1), BOTH)
    want = np.float64(x) @ np.asarray(packed.dequantize(), np.float64)
    for leaf in (packed, bj.prepare(packed)):
        np.testing.assert_allclose(bj.matmul(x, leaf, activations=None), want, atol=1e-5)


def test_statistics_are_over_the_codes_of_all_planes_of_the_rotated_kernel():
    w = normal(64, 32)
    first = bj.analysis.trit_stats({"kernel": w}, BOTH)
    again = bj.analysis.trit_stats({"kernel": w * 1.5}, BOTH, previous=first)
    assert again.rows[0].flip_rate == 0.0
    assert again.rows[0].zeros == float((bj.quantize(w, BOTH).codes == 0).mean())
    with pytest.raises(NotImplementedError, match="is a sum of 2 ternary planes"):
        bj.unpack(bj.pack(w, BOTH))


@both_kinds
@pytest.mark.parametrize("spec", [("data", None), (None, "data")], ids=["contraction", "outputs"])
def test_shards_give_the_bits_of_one_device(spec, kind):
    mesh = mesh_of(kind, (4,), ("data",))
    x, w = normal(8, 64), normal(64, 16, seed=1)
    packed = bj.pack(w, BOTH)
    want = jax.jit(bj.matmul)(x, packed)
    trained = jax.jit(functools.partial(bj.ternary_dot, weights=BOTH))
    with jax.set_mesh(mesh):
        w_cut = jax.device_put(w, jax.NamedSharding(mesh, jax.P(*spec)))
        packed_cut = jax.jit(functools.partial(bj.pack, config=BOTH))(w_cut)
        same_leaves(packed_cut, packed)
        for at in ((), ("data",), (None, "data")):
            given = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*at)))
            oracles.assert_same_bits(jax.jit(bj.matmul)(given, packed_cut), want)
        oracles.assert_same_bits(
            trained(jax.device_put(x, jax.NamedSharding(mesh, jax.P())), w_cut), want
        )
        oracles.assert_same_bits(packed_cut.dequantize(), packed.dequantize())
        t = bj.quantize(w_cut, BOTH)
        oracles.assert_same_bits(t.dequantize(), packed.dequantize())


# ---- conversion


def moments_of(x, needs):
    """What a kernel of a rotated config is to know of its inputs, in float64."""
    h = oracles.rotation64(12) @ (np.float64(x).T @ np.float64(x)) @ oracles.rotation64(12)
    return Statistics(np.array([len(x)]), (h if needs == "matrix" else h.diagonal())[None])


@pytest.mark.parametrize("method", ["planes", "gptq", "absmean"])
@cases("granularity", ["tensor", "channel", 4], core=["channel"])
def test_calibrate_fits_the_planes_of_the_rotated_kernel(method, granularity):
    how = bj.TernaryConfig(granularity=granularity, planes=2, rotation="hadamard")
    params, x = {"w": normal(12, 5)}, normal(60, 12, seed=1)
    ternary = bj.ternarize(lambda p, x: x @ p["w"], weights=how, activations=None)
    packed, report = calibrate(ternary, params, [x], method=method)
    rotated = oracles.rotated32(params["w"], how, 0)[None]
    known = moments_of(x, METHODS[method].needs)
    found = METHODS[method].quantize(rotated, known, how)
    hat = oracles.rotation64(12) @ dequantized(found, 2)[0]
    np.testing.assert_allclose(packed["w"].dequantize(), hat, atol=1e-5)
    np.testing.assert_allclose(ternary(packed, x), np.float64(x) @ hat, atol=1e-4)
    (row,) = report.rows
    assert row.error <= row.absmean_error
    if method == "gptq":  # by all moments the error is that of x W, whatever the basis
        lost = np.square(x @ (hat - params["w"])).sum() / np.square(x @ params["w"]).sum()
        np.testing.assert_allclose(row.error, lost, rtol=1e-3)
    if method == "absmean":
        same_leaves(packed, ternary.pack(params, x)[0])


@pytest.mark.parametrize("method", ["weighted", "gptq", "absmean"])
@pytest.mark.parametrize("own", ["rotated", "plain"])
def test_candidates_are_measured_each_in_its_own_basis(own, method):
    """What an option says is what a calibration with its config alone says."""
    configs = {"rotated": bj.TernaryConfig(rotation="hadamard"), "plain": bj.B158}
    candidates = [*configs.values(), BOTH, bj.Int8Config()]
    params, x = {"w": normal(12, 5)}, normal(60, 12, seed=1)

    def run(config, **how):
        ternary = bj.ternarize(
            lambda p, x: x @ p["w"], select=lambda path, _: config, activations=None
        )
        return calibrate(ternary, params, [x], method=method, **how)[1].rows[0]

    def loss(y, x):
        return jnp.square(y).sum(-1)

    row = run(configs[own], candidates=candidates, loss=loss)
    assert {option.config for option in row.options} == {*candidates, None}
    for option in row.options[:-1]:
        assert option.bytes == bj.pack(params["w"], option.config).nbytes
        if not isinstance(option.config, bj.Int8Config):
            alone = run(option.config, loss=loss)
            np.testing.assert_allclose(option.error, alone.error, rtol=1e-5)


def test_a_rotated_candidate_is_that_of_kernels_with_blocks():
    params = {"a": normal(12, 6), "b": normal(6, 5)}
    ternary = bj.ternarize(lambda p, x: x @ p["a"] @ p["b"], activations=None)
    x = normal(30, 12, seed=1)
    _, report = calibrate(ternary, params, [x], method="weighted", candidates=[BOTH])
    assert [len(row.options) for row in report.rows] == [3, 2]
    choice = str(bj.convert.budget(report, bytes=10**6))
    assert "float" in choice
    small = {"a": params["b"]}
    ternary = bj.ternarize(lambda p, x: x @ p["a"], activations=None)
    with pytest.raises(ValueError, match=r"no kernel can have .*blocks of 4 to rotate tile none"):
        calibrate(ternary, small, [x[:, :6]], method="weighted", candidates=[BOTH])


@pytest.mark.parametrize("method", ["gptq", "weighted"])
@pytest.mark.parametrize("seed", range(6))
def test_inputs_whose_sum_cancels_are_no_fault_of_the_callers(seed, method):
    """The sum of centred inputs is a rotated feature: nothing but rounding is left of it."""
    x = normal(300, 64, seed=seed)
    x = x - x.mean(-1, keepdims=True)
    how = bj.TernaryConfig(rotation="hadamard")
    ternary = bj.ternarize(lambda p, x: x @ p["w"], weights=how, activations=None)
    params = {"w": normal(64, 8, seed=seed + 10)}
    packed, report = calibrate(ternary, params, [x], method=method)
    hat = packed["w"].dequantize()
    lost = np.square(x @ (hat - params["w"])).sum() / np.square(x @ params["w"]).sum()
    assert lost < 0.3
    if method == "gptq":
        np.testing.assert_allclose(report.rows[0].error, lost, rtol=1e-3)
