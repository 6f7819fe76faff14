"""Layers whose kernels are rotated: the same bits in every form, and what is refused by path."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from flax import nnx
from meshes import both_kinds, mesh_of

import bitnet_jax as bj
from bitnet_jax.convert import Method, calibrate
from bitnet_jax.convert._methods import METHODS
from bitnet_jax.io import FormatError

ROTATED = bj.TernaryConfig(granularity="channel", rotation="hadamard")
PLAIN = bj.TernaryConfig(granularity="channel")
PLANES = bj.TernaryConfig(planes=2, rotation="hadamard")
X = normal(2, 6, 8, 12)
LAYERS = {
    "dense": bj.linen.BitDense(5, weights=ROTATED),
    "general": bj.linen.BitDenseGeneral((3, 4), axis=(-2, -1), weights=ROTATED),
    "conv": bj.linen.BitConv(6, (3, 3), strides=2, weights=ROTATED),
    "conv-groups": bj.linen.BitConv(6, (3, 3), feature_group_count=3, weights=ROTATED),
    "einsum": bj.linen.BitEinsum((6, 12, 5), "behk,ekn->behn", weights=ROTATED),
    "weight-only": bj.linen.BitDense(5, weights=ROTATED, activations=None),
    "x-groups": bj.linen.BitDense(5, weights=ROTATED, activations=bj.ActivationConfig(group=4)),
    "float-model": bj.linen.ternarize(nn.Dense(5), weights=ROTATED),
}


@cases("name", list(LAYERS), core=["general", "conv", "conv-groups", "weight-only"])
def test_packed_gives_the_bits_of_training(name):
    model = LAYERS[name]
    params = params_of(model, X)
    packed, _ = bj.linen.pack(model, params, X)

    def run(p):
        return model.apply({"params": p}, X)

    trained = jax.jit(run)(params)
    if name == "weight-only":
        np.testing.assert_allclose(jax.jit(run)(packed), trained, rtol=1e-5, atol=1e-5)
    else:
        oracles.assert_same_bits(jax.jit(run)(packed), trained)
        oracles.assert_same_bits(run(params), trained)
    prepared = jax.jit(run)(bj.prepare(packed))
    np.testing.assert_allclose(prepared, trained, rtol=1e-5, atol=1e-5)
    if name == "general":  # up to rounding it is the product with the dequantised kernel
        y = np.einsum("bhwc,wcnm->bhnm", X, packed["kernel"].dequantize())
        y = y + np.asarray(params["bias"])
        np.testing.assert_allclose(trained, y, atol=0.1 * np.abs(y).max())


def test_a_convolution_is_that_of_the_rotated_channels():
    model = LAYERS["conv"].clone(activations=None, use_bias=False)
    params = params_of(model, X)
    hat = bj.quantize(params["kernel"], ROTATED, contracting_axes=(0, 1, 2)).dequantize()
    want = nn.Conv(6, (3, 3), strides=2, use_bias=False).apply({"params": {"kernel": hat}}, X)
    np.testing.assert_allclose(model.apply({"params": params}, X), want, atol=1e-5)


@cases("name", ["dense", "general", "conv", "weight-only"], core=["conv", "weight-only"])
def test_gradients_are_those_of_a_layer_that_is_given_what_is_rotated(name):
    model = LAYERS[name]
    plain = model.clone(weights=PLAIN)
    r = jnp.asarray(oracles.rotation64(12), jnp.float32)
    params = params_of(model, X)
    g = normal(*model.apply({"params": params}, X).shape, seed=5)

    def loss(params, x):
        return (model.apply({"params": params}, x) * g).sum()

    def by_hand(params, x):
        kernel = jnp.einsum("...cn,cd->...dn", params["kernel"].reshape(*lead, 12, -1), r)
        kernel = kernel.reshape(params["kernel"].shape)
        return (plain.apply({"params": params | {"kernel": kernel}}, x @ r) * g).sum()

    lead = {"general": (8,), "conv": (3, 3)}.get(name, ())
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, X)
    want = jax.jit(jax.grad(by_hand, argnums=(0, 1)))(params, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), got, want)


@pytest.mark.parametrize("config", [ROTATED, PLANES], ids=["one plane", "planes"])
def test_nnx_layers_and_scans_over_stacks(config):
    layer = bj.nnx.BitLinear(12, 12, weights=config, rngs=nnx.Rngs(0))
    x, w = X.reshape(-1, 12), layer.kernel.get_value()
    oracles.assert_same_bits(layer(x), bj.ternary_dot(x, w, config))
    stack = bj.pack(jnp.stack([w, -w, w.T]), config, batch_axes=0)
    want = functools.reduce(lambda h, i: bj.matmul(h, stack[i]), range(3), x)
    for kernels in (stack, bj.prepare(stack)):

        @jax.jit
        def run(kernels, x):
            body = lambda h, i: (bj.matmul(h, kernels[i]), None)  # noqa: E731
            return jax.lax.scan(body, x, jnp.arange(3))[0]

        oracles.assert_same_bits(run(kernels, x), want)


def test_a_function_packs_and_trains_alike():
    def net(params, x):
        h = jax.nn.relu(jnp.einsum("...hd,hdn->...n", x, params["out"]))
        return h @ params["down"].T

    params = {"out": normal(8, 12, 16), "down": normal(5, 16, seed=1)}
    ternary = bj.ternarize(net, weights=ROTATED)
    packed, _ = ternary.pack(params, X)
    assert packed["out"].config == ROTATED
    oracles.assert_same_bits(jax.jit(ternary)(packed, X), jax.jit(ternary)(params, X))


def test_a_convolution_whose_channels_are_not_last_is_refused_by_path():
    def net(params, x):
        dims = ("NHWC", "OIHW", "NHWC")
        return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims)

    ternary = bj.ternarize(net, weights=ROTATED)
    with pytest.raises(ValueError, match=r"^ternarize: w: `rotation`=.*Store the kernel channels"):
        ternary({"w": normal(6, 12, 4, 4)}, X)


def test_layers_without_blocks_are_refused_by_path():
    model = bj.linen.ternarize(nn.Conv(4, (3, 3), name=None), weights=ROTATED)
    x = X[..., :3]
    params = params_of(nn.Conv(4, (3, 3)), x)
    with pytest.raises(ValueError, match=r"`rotation`='hadamard' rotates blocks .* of 1\. Pass"):
        bj.linen.pack(model, params, x)


def test_a_float_layer_refuses_a_rotated_kernel_and_an_unrotated_one():
    model = LAYERS["dense"]
    params = params_of(model, X)
    other, _ = bj.linen.pack(model.clone(weights=PLAIN), params, X)
    with pytest.raises(ValueError, match=r"was packed with TernaryConfig.*rotation='hadamard'\)"):
        model.apply({"params": other}, X)


@cases("name", ["dense", "general", "conv"], core=["general"])
def test_adapters_meet_the_input_as_it_is(name):
    model = LAYERS[name]
    packed, _ = bj.linen.pack(model, params_of(model, X), X)
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2))
    adapters = jax.tree.map(lambda a: a + 0.05, adapters)
    y = model.apply({"params": bj.lora.attach(packed, adapters)}, X)
    pair, kernel = adapters.kernels["kernel"], packed["kernel"]
    update = np.asarray(pair["a"] @ pair["b"]).reshape(kernel.shape)
    base = np.asarray(model.apply({"params": packed}, X))
    low = {
        "dense": lambda: X @ update,
        "general": lambda: np.einsum("bhwc,wcnm->bhnm", X, update),
        "conv": lambda: nn.Conv(6, (3, 3), strides=2, use_bias=False).apply(
            {"params": {"kernel": update}}, X
        ),
    }[name]()
    np.testing.assert_allclose(y, base + low, atol=1e-4)
    merged, report = bj.lora.merge(packed, adapters)
    whole = np.asarray(kernel.dequantize()) + update
    lost = np.linalg.norm(merged["kernel"].dequantize() - whole) / np.linalg.norm(whole)
    np.testing.assert_allclose(report.rows[0].error, lost, rtol=1e-4)
    assert lost < 1.1 * np.linalg.norm(kernel.dequantize() - whole) / np.linalg.norm(whole)


def test_files_keep_the_rotation_and_older_readers_are_told(path):
    tree = {"rotated": {"kernel": bj.pack(normal(24, 5), ROTATED)}}
    plain = {"plain": {"kernel": bj.pack(normal(24, 5), PLAIN)}}
    bj.io.save(path, tree | plain)
    content = pathlib.Path(path).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header["__metadata__"]
    assert metadata["version"] == "3"
    configs = [one["config"] for one in json.loads(metadata["leaves"])]
    assert sorted("rotation" in config for config in configs) == [False, True]
    loaded = bj.io.load(path)
    assert loaded["rotated"]["kernel"].config == ROTATED
    assert loaded["plain"]["kernel"].config == PLAIN
    oracles.assert_same_bits(loaded["rotated"]["kernel"].codes, tree["rotated"]["kernel"].codes)
    bj.io.save(path, plain)
    content = pathlib.Path(path).read_bytes()
    assert b'"version":"2"' in content
    assert b"rotation" not in content


def test_descriptions_of_checkpoints_keep_it_too():
    tree = {"kernel": bj.pack(normal(24, 5), ROTATED)}
    about = json.loads(json.dumps(bj.io.describe(tree)))
    assert about["version"] == "2"
    bj.io.check(tree, about)
    assert bj.io.abstract(about)["kernel"].config == ROTATED
    other = {"kernel": bj.pack(normal(24, 5), PLAIN)}
    assert bj.io.describe(other)["version"] == "1"
    with pytest.raises(FormatError, match="has the config "):
        bj.io.check(other, about)


def test_exported_programs_and_state_dicts_keep_it():
    from flax import serialization

    packed = bj.pack(normal(24, 5), ROTATED)
    again = serialization.from_state_dict(packed, serialization.to_state_dict(packed))
    assert again.config == ROTATED
    x = normal(3, 24)
    run = jax.jit(bj.matmul)
    exported = jax.export.deserialize(jax.export.export(run)(x, packed).serialize())
    oracles.assert_same_bits(exported.call(x, packed), run(x, packed))


@pytest.mark.parametrize("needs", ["nothing", "diagonal", "matrix"])
def test_calibration_sees_the_rotated_kernel_and_its_rotated_inputs(needs):
    seen = []

    def quantize(w, statistics, config):
        seen.append((w, statistics))
        return METHODS["absmean"].quantize(w, statistics, config)

    params = {"w": normal(24, 5), "c": normal(3, 3, 4, 5, seed=1)}
    x, image = normal(40, 24, seed=2), normal(2, 5, 5, 4, seed=3)

    def net(params, x, image):
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            image, params["c"], (1, 1), "VALID", dimension_numbers=dims
        )
        return x @ params["w"], y

    ternary = bj.ternarize(net, weights=ROTATED)
    packed, report = calibrate(ternary, params, [(x, image)], method=Method(needs, quantize))
    by_length = {w.shape[1]: (w, s) for w, s in seen}
    w, statistics = by_length[24]
    oracles.assert_same_bits(w[0], oracles.rotated32(params["w"], ROTATED, 0))
    oracles.assert_same_bits(
        by_length[36][0][0].reshape(3, 3, 4, 5), oracles.rotated32(params["c"], ROTATED, 2)
    )
    # What absmean makes of it is what the quantiser makes.
    oracles.assert_same_bits(packed["w"].codes, bj.pack(params["w"], ROTATED).codes)
    if needs == "nothing":
        return
    wide = np.asarray(x, np.float64) @ oracles.rotation64(24)
    want = wide.T @ wide if needs == "matrix" else np.square(wide).sum(0)
    np.testing.assert_allclose(statistics.moments[0], want, atol=1e-4)
    patches = [
        (np.asarray(image[n, i : i + 3, j : j + 3], np.float64) @ oracles.rotation64(4)).ravel()
        for n in range(2)
        for i in range(3)
        for j in range(3)
    ]
    h = np.transpose(patches) @ patches
    np.testing.assert_allclose(
        by_length[36][1].moments[0], h if needs == "matrix" else h.diagonal(), atol=1e-4
    )
    if needs == "matrix":  # the error is that of x W, whatever the basis
        hat = np.asarray(packed["w"].dequantize(), np.float64)
        lost = np.square(x @ (hat - params["w"])).sum() / np.square(x @ params["w"]).sum()
        (row,) = (row for row in report.rows if row.path == "w")
        np.testing.assert_allclose(row.error, lost, rtol=1e-3)


@both_kinds
@pytest.mark.parametrize("spec", [("data", None), (None, "data")], ids=["contraction", "outputs"])
def test_shards_give_the_bits_of_one_device(spec, kind):
    mesh = mesh_of(kind, (4,), ("data",))
    x, w = normal(8, 64), normal(64, 16, seed=1)
    packed = bj.pack(w, ROTATED)
    want = jax.jit(bj.matmul)(x, packed)

    def loss(x, w):
        return jnp.square(bj.ternary_dot(x, w, ROTATED)).sum()

    wanted = jax.jit(jax.grad(loss, argnums=1))(x, w)
    with jax.set_mesh(mesh):
        w_cut = jax.device_put(w, jax.NamedSharding(mesh, jax.P(*spec)))
        packed_cut = jax.jit(functools.partial(bj.pack, config=ROTATED))(w_cut)
        oracles.assert_same_bits(packed_cut.codes, packed.codes)
        oracles.assert_same_bits(packed_cut.scale, packed.scale)
        x_whole = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
        x_rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        x_features = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "data")))
        for given in (x_whole, x_rows, x_features):
            oracles.assert_same_bits(jax.jit(bj.matmul)(given, packed_cut), want)
        np.testing.assert_allclose(packed_cut.dequantize(), packed.dequantize(), atol=0)
        got = jax.jit(jax.grad(loss, argnums=1))(x_whole, w_cut)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)
