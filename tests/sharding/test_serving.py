"""Meshes: one device against eight, what travels, how packed leaves are placed.

conftest.py gives every test eight CPU devices.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj

K, N, M = 64, 32, 16
GROUPS = bj.TernaryConfig(granularity=8)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}

both_kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def mesh_of(kind, shape=(2, 4), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))


def put(mesh, value, spec):
    return jax.device_put(value, NamedSharding(mesh, spec))


def gaussian(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def compiled(function, *operands, **how):
    return jax.jit(function, **how).lower(*operands).compile()


# Serving.

PLACES = {
    # of x, of the kernel
    "outputs": (P(), P(None, "model")),
    "contraction": (P(), P("model", None)),
    "contraction, x too": (P(None, "model"), P("model", None)),
    "rows and outputs": (P("data"), P(None, "model")),
    "rows and contraction": (P("data"), P("model", None)),
    "both axes of the kernel": (P(), P("data", "model")),
    "the rows' own axis": (P("data"), P("data", None)),
}
CONFIGS = {"tensor": bj.B158, "channel": bj.PHASE4, "groups": GROUPS, "int8": bj.Int8Config()}


def placed(mesh, packed, spec):
    specs = bj.sharding.partition_specs({"w": packed}, lambda *_: spec, mesh=mesh)["w"]
    return jax.device_put(packed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


SERVED = [("cpu", "channel", place) for place in PLACES]
SERVED += [("reference", config, "contraction, x too") for config in ("tensor", "groups", "int8")]
SERVED += [("cpu", config, "contraction, x too") for config in ("tensor", "groups", "int8")]
SERVED += [("reference", "channel", "rows and outputs"), ("cpu", "groups", "rows and outputs")]


@pytest.mark.parametrize(("name", "config", "place"), SERVED)
@both_kinds
def test_one_packed_tree_gives_the_same_bits_on_eight_devices(kind, name, config, place):
    mesh, (x_spec, spec) = mesh_of(kind), PLACES[place]
    x, packed = gaussian(0, M, K), bj.pack(gaussian(1, K, N), CONFIGS[config])
    multiply = functools.partial(bj.matmul, implementation=name)
    program = compiled(multiply, put(mesh, x, x_spec), placed(mesh, packed, spec))
    y = program(put(mesh, x, x_spec), placed(mesh, packed, spec))
    oracles.assert_same_bits(y, jax.jit(multiply)(x, packed))
    if kind == "explicit":
        rows, outputs = (*x_spec, None)[0], spec[1]
        assert y.sharding.spec == P(rows, outputs)


@pytest.mark.parametrize(
    ("name", "config"), [("cpu", "tensor"), ("cpu", "int8"), ("reference", "channel")]
)
@both_kinds
def test_what_travels(kind, config, name):
    """Outputs sharded: nothing. Contraction sharded: int32 sums, and gammas if x is, too."""
    mesh = mesh_of(kind)
    multiply = functools.partial(bj.matmul, implementation=name)

    def told(place):
        x_spec, spec = PLACES[place]
        packed = placed(mesh, bj.pack(gaussian(1, K, N), CONFIGS[config]), spec)
        operands = put(mesh, gaussian(0, M, K), x_spec), packed
        found = bj.sharding.traffic(compiled(multiply, *operands)).collectives
        return sorted((c.kind, c.dtype, math.prod(c.shape)) for c in found)

    sums, gammas = ("all-reduce", "s32", M * N), ("all-reduce", "f32", M)
    assert told("outputs") == []
    assert told("rows and outputs") == []
    assert told("contraction") == [sums]
    assert told("contraction, x too") == [gammas, sums]
    assert told("rows and contraction") == [("all-reduce", "s32", M * N // 2)]


def test_the_epilogue_comes_after_the_sum():
    """Sums near 2**24 would round apart if they were scaled on each device and then added."""
    mesh, k = mesh_of("auto"), 4 * 40_000
    x = jnp.full((4, k), 0.7).at[:, ::3].set(0.3)
    packed = bj.pack(jnp.where(gaussian(2, k, 16) > 0, 0.1, -0.3))
    for name in ("cpu", "reference"):
        multiply = jax.jit(functools.partial(bj.matmul, implementation=name))
        y = multiply(put(mesh, x, P(None, "model")), placed(mesh, packed, P("model", None)))
        oracles.assert_same_bits(y, multiply(x, packed))


@both_kinds
def test_a_kernel_that_does_not_divide_is_gathered_in_its_bytes(kind):
    mesh, x, packed = mesh_of(kind), gaussian(0, 6, 40), bj.pack(gaussian(1, 40, 12))
    # 10 bytes of four rows: not for four devices; as the codes come from somebody else.
    sharded = dataclasses.replace(packed, codes=put(mesh, packed.codes, P("data", "model")))
    y = jax.jit(bj.matmul)(x, sharded)
    oracles.assert_same_bits(y, jax.jit(bj.matmul)(x, packed))


@both_kinds
def test_other_kernels(kind):
    """Experts over a mesh axis, heads, a tied table."""
    mesh, serve = mesh_of(kind), jax.jit(bj.matmul)
    experts = bj.pack(gaussian(1, 4, K, N), contracting_axes=1, batch_axes=0)
    x = gaussian(0, 4, M, K)
    y = serve(put(mesh, x, P("model", "data")), placed(mesh, experts, P("model", None, None)))
    oracles.assert_same_bits(y, serve(x, experts))

    heads = bj.pack(gaussian(1, 8, 16, N), contracting_axes=(0, 1))
    x = gaussian(0, M, 8, 16)
    y = serve(put(mesh, x, P(None, "model")), placed(mesh, heads, P("model", None, None)))
    oracles.assert_same_bits(y, serve(x, heads))

    table = bj.pack(gaussian(1, 40, K), bj.Int8Config(), contracting_axes=-1)
    x, index = gaussian(0, M, K), jnp.arange(-1, 41)
    for spec in (P("model", None), P(None, "model")):
        sharded = placed(mesh, table, spec)
        oracles.assert_same_bits(serve(x, sharded), serve(x, table))
        oracles.assert_same_bits(jax.jit(lambda t: t.rows(index))(sharded), table.rows(index))
        oracles.assert_same_bits(sharded.dequantize(), table.dequantize())


@both_kinds
def test_a_convolution(kind):
    mesh, layer = mesh_of(kind), bj.linen.BitConv(16, (3, 3))
    image = gaussian(0, 4, 8, 8, 8)
    params = layer.init(jax.random.key(2), image)["params"]
    packed = bj.linen.pack(layer, params, image)[0]
    want = jax.jit(layer.apply)({"params": packed}, image)
    specs = bj.sharding.partition_specs(
        packed, [("kernel", P(None, None, None, "model"))], mesh=mesh
    )
    packed = jax.device_put(packed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    y = jax.jit(layer.apply)({"params": packed}, put(mesh, image, P("data")))
    oracles.assert_same_bits(y, want)


@pytest.mark.parametrize(("kind", "name"), [("auto", "reference"), ("explicit", "cpu")])
def test_vmap_and_gradient(kind, name):
    mesh = mesh_of(kind)
    packed = bj.pack(gaussian(1, K, N))
    multiply = functools.partial(bj.matmul, implementation=name)
    x, g = gaussian(0, 4, M, K), gaussian(3, 4, M, N)

    def vjp(x, packed):
        y, pull = jax.vjp(lambda x: jax.vmap(multiply, (0, None))(x, packed), x)
        return y, pull(g)[0]

    want = jax.jit(vjp)(x, packed)
    for spec in (P(None, "model"), P("model", None)):
        got = jax.jit(vjp)(put(mesh, x, P()), placed(mesh, packed, spec))
        oracles.assert_same_bits(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_prepared_kernels_serve_sharded_rows():
    mesh, x = mesh_of("auto"), gaussian(0, M, K)
    fast = bj.prepare(bj.pack(gaussian(1, K, N)), "cpu")
    program = compiled(bj.matmul, put(mesh, x, P("data")), fast)
    oracles.assert_same_bits(program(put(mesh, x, P("data")), fast), bj.matmul(x, fast))
    assert bj.sharding.traffic(program).nbytes == 0


@both_kinds
def test_shards_are_not_prepared(kind):
    mesh = mesh_of(kind)
    packed = {"w": placed(mesh, bj.pack(gaussian(1, K, N)), P(None, "model"))}
    assert bj.prepare(packed)["w"] is packed["w"]
    for name in ("cpu", "xla"):
        with pytest.raises(NotImplementedError, match=r"prepare: \['w'\] lies in shards"):
            bj.prepare(packed, name)


def test_prepared_in_shards_under_shard_map():
    mesh, x, w = mesh_of("auto"), gaussian(0, M, K), gaussian(1, K, N)
    packed = placed(mesh, bj.pack(w), P(None, "model"))
    specs = dataclasses.replace(packed, codes=P(None, "model"), scale=P())

    def shard(x, packed):
        return bj.matmul(x, bj.prepare(packed))

    run = jax.shard_map(shard, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "model"))
    oracles.assert_same_bits(jax.jit(run)(x, packed), bj.matmul(x, bj.pack(w)))


def test_a_shard_map_that_leaves_axes_alone():
    mesh, x, packed = mesh_of("auto"), gaussian(0, M, K), bj.pack(gaussian(1, K, N))
    how = {"in_specs": (P("data"), P()), "out_specs": P("data"), "axis_names": {"data"}}
    run = jax.jit(jax.shard_map(bj.matmul, mesh=mesh, **how))
    oracles.assert_same_bits(run(x, placed(mesh, packed, P(None, "model"))), bj.matmul(x, packed))


# Quantising in shards.

SPECS = [P("model", None), P(None, "model"), P("data", "model"), P(("data", "model"), None)]
QUANTISERS = {
    "b158": bj.B158,
    "phase4": bj.PHASE4,
    "twn": bj.TWN,
    "median": bj.TernaryConfig(scale="absmedian"),
    "groups": GROUPS,
    "int8": bj.Int8Config(),
}


QUANTISED = [(name, SPECS[i]) for name in ("b158", "groups") for i in range(4)]
QUANTISED += [("phase4", SPECS[0]), ("twn", SPECS[2]), ("median", SPECS[3]), ("int8", SPECS[1])]


@pytest.mark.parametrize(("name", "spec"), QUANTISED, ids=str)
@both_kinds
def test_codes_and_scales_are_those_of_one_device(kind, name, spec):
    shape = {SPECS[0]: (K, N), SPECS[1]: (96, 40), SPECS[2]: (8 * 33, 24)}.get(spec, (160, 9))
    mesh, w, config = mesh_of(kind), gaussian(4, *shape) * 0.02, QUANTISERS[name]
    sharded, whole = put(mesh, w, spec), bj.pack(w, config)
    packed = bj.pack(sharded, config)
    oracles.assert_same_bits(packed.codes, whole.codes)
    oracles.assert_same_bits(packed.scale, whole.scale)
    oracles.assert_same_bits(bj.unpack(packed), bj.unpack(whole))
    hat = bj.fake_quantize(sharded, config)
    oracles.assert_same_bits(hat, bj.fake_quantize(w, config))
    assert not packed.codes.sharding.is_fully_replicated
    if kind == "explicit":
        assert hat.sharding.spec == spec


@both_kinds
def test_activations_in_shards(kind):
    x, axis = gaussian(5, 8, K), bj.ActivationConfig(bits=4)
    want, hat = bj.quantize_activations(x, axis), bj.fake_quantize_activations(x, axis)
    for spec in (P("data", "model"), P(None, "model")):
        sharded = put(mesh_of(kind), x, spec)
        for got, whole in zip(bj.quantize_activations(sharded, axis), want, strict=True):
            oracles.assert_same_bits(got, whole)
        oracles.assert_same_bits(bj.fake_quantize_activations(sharded, axis), hat)


@both_kinds
def test_a_tree_in_shards_is_packed_where_it_lies(kind):
    mesh = mesh_of(kind)
    params = {"up": {"kernel": gaussian(1, K, N), "bias": jnp.zeros(N)}}
    sharded = {"up": {"kernel": put(mesh, params["up"]["kernel"], P("data", "model"))}}
    packed, report = bj.pack_params(sharded)
    want, whole = bj.pack_params({"up": {"kernel": params["up"]["kernel"]}})
    leaf = packed["up"]["kernel"]
    assert leaf.codes.sharding.spec == P("data", "model")
    oracles.assert_same_bits(leaf.codes, want["up"]["kernel"].codes)
    assert str(report) == str(whole)


# Training.


class Net(nn.Module):
    """Three layers; their kernels are annotated for FSDP over ``data``, or for ``model``."""

    specs: tuple = ((None, None),) * 3
    norm: bool = False
    config: object = bj.B158

    @nn.compact
    def __call__(self, x):
        for i, (features, spec) in enumerate(zip((64, 48, 16), self.specs, strict=True)):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), spec)
            layer = bj.linen.BitDense(
                features, kernel_init=init, norm=self.norm, weights=self.config, name=f"layer_{i}"
            )
            x = layer(x)
            x = nn.relu(x) if i < 2 else x
        return x


WAYS = {
    "data": ((None, None),) * 3,
    "fsdp": (("data", None),) * 3,
    "fsdp, outputs": ((None, "data"),) * 3,
    "tensor": ((None, "model"), ("model", None), (None, "model")),
    "fsdp and tensor": (("data", "model"), ("model", "data"), ("data", "model")),
}


def net_and_params(way, **fields):
    net = Net(WAYS[way], **fields)
    boxed = net.init(jax.random.key(0), jnp.ones((1, 32)))["params"]
    return net, boxed


def sharded_params(mesh, boxed):
    specs = bj.sharding.partition_specs(boxed, mesh=mesh)
    return jax.device_put(boxed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


@pytest.mark.parametrize(("way", "norm"), [*((way, False) for way in WAYS), ("tensor", True)])
@both_kinds
def test_the_forward_pass_of_training_has_the_bits_of_one_device(kind, norm, way):
    mesh = mesh_of(kind)
    net, boxed = net_and_params(way, norm=norm)
    x = gaussian(6, 16, 32)
    want = jax.jit(net.apply)({"params": nn.unbox(boxed)}, x)
    with jax.set_mesh(mesh):
        params = sharded_params(mesh, boxed)
        y = jax.jit(net.apply)({"params": params}, put(mesh, x, P("data")))
    oracles.assert_same_bits(y, want)


def trained(net, params, x, steps=4):
    """Losses of a few steps, and the parameters after them."""
    tx = optax.adamw(1e-2)

    def loss(params):
        y = jax.nn.log_softmax(net.apply({"params": params}, x))
        return -(y * jnp.eye(16)).sum(axis=-1).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params


@functools.cache
def trained_on_one_device():
    net, boxed = net_and_params("data")
    return trained(net, nn.unbox(boxed), gaussian(6, 16, 32))[0]


@pytest.mark.standard_promotion  # optax's adamw raises under the strict one
@pytest.mark.parametrize("way", ["data", "fsdp", "tensor", "fsdp and tensor"])
@both_kinds
def test_a_training_run_stays_with_that_of_one_device(kind, way):
    net, boxed = net_and_params(way)
    mesh, want = mesh_of(kind), trained_on_one_device()
    with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
        params = sharded_params(mesh, boxed)
        got, after = trained(net, params, put(mesh, gaussian(6, 16, 32), P("data")))
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert want[-1] < want[0]
    if kind == "explicit":
        for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
            assert now.sharding.spec == before.sharding.spec


# FSDP: codes travel, not floats.


def step_of(net, boxed, x):
    def loss(params, x):
        return jnp.square(net.apply({"params": params}, x)).mean()

    return jax.value_and_grad(loss), (boxed, x)


@pytest.mark.parametrize(
    ("way", "config"),
    [
        ("fsdp", bj.B158),
        ("fsdp", bj.Int8Config()),
        ("fsdp, outputs", bj.B158),
        ("fsdp and tensor", bj.B158),
    ],
    ids=["fsdp", "eight bits", "outputs", "and tensor"],
)
@both_kinds
def test_fsdp_gathers_codes(kind, way, config):
    """Each kernel's codes once forward and once backward, but for the first layer's dx."""
    mesh = mesh_of(kind)
    net, boxed = net_and_params(way, config=config)
    with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
        params = sharded_params(mesh, boxed)
        places = jax.tree.map(lambda a: a.sharding, params)
        function, operands = step_of(net, params, put(mesh, gaussian(6, 16, 32), P("data")))
        how = {"out_shardings": (None, places)} if kind == "auto" else {}
        gathers = (
            bj.sharding.traffic(compiled(function, *operands, **how)).of("all-gather").collectives
        )
    bits = {bj.B158: 2}.get(config, 8)
    kernels = [math.prod(boxed[f"layer_{i}"]["kernel"].value.shape) for i in range(3)]
    twice = kernels + kernels[1:]
    cut = 4 if way == "fsdp and tensor" else 1
    assert (
        sum(g.nbytes for g in gathers if g.dtype in ("u8", "s8")) == sum(twice) * bits // 8 // cut
    )
    floats = [math.prod(g.shape) for g in gathers if g.dtype == "f32"]
    assert max(floats, default=0) < min(kernels) // cut  # rows of sums for the scale, at most


def test_without_the_context_xla_gathers_int8_codes():
    mesh = mesh_of("auto", (8,), ("data",))
    ws = [gaussian(i, 1024, 1024) * 0.03 for i in range(3)]
    ws = [put(mesh, w, P("data", None)) for w in ws]

    def loss(ws, x):
        for w in ws:
            x = nn.relu(bj.ternary_dot(x, w))
        return jnp.square(x).mean()

    x = put(mesh, gaussian(9, 512, 1024), P("data"))
    gathers = bj.sharding.traffic(compiled(loss, ws, x)).of("all-gather").collectives
    assert [(g.dtype, g.shape) for g in gathers if g.nbytes > 10_000] == [("s8", (1024, 1024))] * 3


def test_weight_only_gathers_codes_too():
    mesh = mesh_of("auto", (8,), ("data",))
    w, x = put(mesh, gaussian(1, K, N), P("data", None)), put(mesh, gaussian(0, M, K), P("data"))

    def product(x, w):
        return bj.ternary_dot(x, w, activations=None, kernel_spec=P("data", None))

    with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
        told = bj.sharding.traffic(compiled(product, x, w)).of("all-gather").collectives
        assert [(g.dtype, g.nbytes) for g in told] == [("u8", K * N // 4)]
        dw = jax.jit(jax.grad(lambda w: product(x, w).sum()))(w)
    np.testing.assert_allclose(dw, jnp.broadcast_to(x.sum(axis=0)[:, None], (K, N)), rtol=1e-4)


def test_explicit_axes_and_several_axes_of_outputs_or_a_traced_strength():
    mesh, x = mesh_of("explicit"), gaussian(0, M, K)
    heads, w, one = gaussian(1, K, 8, 16), gaussian(1, K, N), jnp.float32(1)

    def project(x, heads):
        return bj.ternary_dot(x, heads, contracting_axes=0)

    def phased(x, w, strength):
        return bj.ternary_dot(x, w, strength=strength)

    with jax.set_mesh(mesh):
        rows = put(mesh, x, P("data"))
        y = jax.jit(project)(rows, put(mesh, heads, P("data", "model", None)))
        phase = jax.jit(phased)(rows, put(mesh, w, P("data")), one)
    oracles.assert_same_bits(y, jax.jit(project)(x, heads))
    oracles.assert_same_bits(phase, jax.jit(phased)(x, w, one))


def nnx_product(kernel_metadata):
    from flax import nnx

    return bj.nnx.BitLinear(K, N, rngs=nnx.Rngs(0), kernel_metadata=kernel_metadata)


@pytest.mark.parametrize("logical", [False, True])
def test_nnx_metadata(logical):
    from flax import nnx

    mesh, metadata = mesh_of("auto", (8,), ("data",)), {"out_sharding": ("data", None)}
    if logical:
        rules = (("embed", "data"), ("mlp", None))
        metadata = {"out_sharding": ("embed", "mlp"), "sharding_rules": rules}
    with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
        layer = nnx_product(metadata)
        x = put(mesh, gaussian(0, M, K), P("data"))
        graph, state = nnx.split(layer)
        program = compiled(lambda s, x: nnx.merge(graph, s)(x), state, x)
        told = bj.sharding.traffic(program).of("all-gather").collectives
    assert [(g.dtype, g.nbytes) for g in told] == [("u8", K * N // 4)]
    packed, _ = bj.nnx.pack(layer)
    specs = bj.sharding.partition_specs(nnx.state(packed, nnx.Param))
    assert specs["kernel"].get_value().codes == P("data", None)
    assert specs["bias"].get_value() == P(None)


def test_logical_names():
    mesh = mesh_of("auto", (8,), ("data",))
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer = bj.linen.BitDense(N, kernel_init=init)
    x = gaussian(0, M, K)
    boxed = layer.init(jax.random.key(0), x)["params"]
    packed, _ = bj.pack_params(boxed, bj.PHASE4)
    with pytest.raises(ValueError, match=r"logical axes \('embed', 'mlp'\) .* map to no mesh axes"):
        bj.sharding.partition_specs(packed)
    with nn.logical_axis_rules([("embed", None), ("mlp", "data")]):
        specs = bj.sharding.partition_specs(packed, mesh=mesh)
        leaf = specs["kernel"].unbox()
        assert (leaf.codes, leaf.scale) == (P(None, "data"), P(None, "data"))
        with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
            program = compiled(layer.apply, {"params": boxed}, x)
    assert program({"params": boxed}, x).shape == (M, N)


# Refusals.


def test_what_gather_codes_refuses():
    mesh, w, x = mesh_of("auto"), gaussian(1, K, N), gaussian(0, M, K)
    with (
        pytest.raises(TypeError, match="`axes` must be one or more names of mesh axes"),
        bj.sharding.gather_codes(),
    ):
        pass
    with bj.sharding.gather_codes("data"):
        with pytest.raises(ValueError, match="does not know how this kernel lies on the mesh"):
            bj.ternary_dot(x, w)
        with pytest.raises(ValueError, match="needs a mesh, and there is none"):
            bj.ternary_dot(x, w, kernel_spec=P("data"))
        with pytest.raises(TypeError, match="`kernel_spec` must be a"):
            bj.ternary_dot(x, w, kernel_spec=("data", None))
        with pytest.raises(ValueError, match="`kernel_spec` has 3 entries, and the kernel 2 axes"):
            bj.ternary_dot(x, w, kernel_spec=P("data", None, None))
    with (
        jax.set_mesh(mesh),
        bj.sharding.gather_codes("fsdp"),
        pytest.raises(ValueError, match=r"names the mesh axes \['fsdp'\], and the mesh has"),
    ):
        bj.ternary_dot(x, w, kernel_spec=P("data"))
    with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
        heads = gaussian(1, 8, 8, N)
        with pytest.raises(NotImplementedError, match="only the first may be sharded"):
            bj.ternary_dot(
                x.reshape(M, 8, 8), heads, contracting_axes=(0, 1), kernel_spec=P(None, "data")
            )


TREE = {"up": {"kernel": jnp.ones((K, N)), "bias": jnp.zeros(N)}}


@pytest.mark.parametrize(
    ("rules", "kind", "match"),
    [
        (None, ValueError, "holds no partitioning metadata"),
        ([("down", P("model"))], ValueError, "the pattern 'down' matches nothing"),
        ([], TypeError, "`rules` must be pairs of a pattern and a PartitionSpec"),
        ([("up", "model")], TypeError, "`rules` must be pairs"),
        (lambda *_: "model", TypeError, "`rules` returned str 'model' for up/"),
        ([("kernel", P(None, None, "model"))], ValueError, r"shape \(64, 32\), and its spec 3"),
        ([("kernel", P("pipe"))], ValueError, r"names \['pipe'\], and the mesh has the axes"),
        ([("kernel", P("data", "data"))], ValueError, "names a mesh axis twice"),
    ],
)
def test_what_partition_specs_refuses(rules, kind, match):
    with pytest.raises(kind, match=match):
        bj.sharding.partition_specs(TREE, rules, mesh=mesh_of("auto"))


def test_shards_end_between_bytes():
    mesh = mesh_of("auto")
    tree = {"kernel": bj.pack(gaussian(1, 24, 6))}
    with pytest.raises(ValueError, match="length 24, which 'model' would cut into 4 equal shards"):
        bj.sharding.partition_specs(tree, [("kernel", P("model", None))], mesh=mesh)
    with pytest.raises(ValueError, match="axis 1 of kernel has length 6"):
        bj.sharding.partition_specs(tree, [("kernel", P(None, "model"))], mesh=mesh)
    specs = bj.sharding.partition_specs(tree, [("kernel", P("data", None))], mesh=mesh)
    assert specs["kernel"].codes == P("data", None)
    with pytest.raises(TypeError, match="prepared for"):
        bj.sharding.partition_specs(bj.prepare(tree), [("kernel", P())])


def test_specs_keep_boxes_and_leave_the_rest_whole():
    _, boxed = net_and_params("tensor")
    packed, _ = bj.pack_params(boxed, GROUPS, select=bj.exclude("layer_2"))
    specs = bj.sharding.partition_specs(packed, mesh=mesh_of("auto"))
    assert jax.tree.structure(specs) == jax.tree.structure(packed)
    leaf = specs["layer_1"]["kernel"].value
    assert leaf.codes == P("model", None)
    assert leaf.scale == P("model", None)  # 8 groups over 4 devices
    assert specs["layer_0"]["bias"] == P(None)
    assert specs["layer_2"]["kernel"].value == P(None, "model")


@both_kinds
def test_a_file_is_loaded_onto_a_mesh(kind, tmp_path):
    mesh, x = mesh_of(kind), gaussian(0, M, K)
    packed, _ = bj.pack_params(
        {"up": {"kernel": gaussian(1, K, N), "bias": jnp.ones(N)}}, bj.PHASE4
    )
    bj.io.save(tmp_path / "model", packed, dense=True)

    def places(tree):
        specs = bj.sharding.partition_specs(tree, [("kernel", P("data", "model"))], mesh=mesh)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    loaded = bj.io.load(tmp_path / "model", sharding=places)
    leaf = loaded["up"]["kernel"]
    assert leaf.codes.sharding.spec == P("data", "model")
    assert leaf.scale.sharding.spec == P(None, "model")
    oracles.assert_same_bits(jax.jit(bj.matmul)(x, leaf), bj.matmul(x, packed["up"]["kernel"]))


# What is read from HLO.


def test_traffic_counts_bytes():
    mesh = mesh_of("auto", (8,), ("data",))
    x = put(mesh, jnp.zeros((16, 4), jnp.bfloat16), P("data"))
    whole = NamedSharding(mesh, P())
    told = bj.sharding.traffic(compiled(lambda x: x * 2, x, out_shardings=whole))
    (gather,) = told.of("all-gather").collectives
    assert (gather.dtype, gather.shape, gather.nbytes) in [
        ("bf16", (16, 4), 128),
        ("u16", (16, 4), 128),
        ("f32", (16, 4), 256),  # where XLA widens before it gathers
    ]
    assert told.nbytes == gather.nbytes
    assert "all-gather" in str(told)
    assert "total" in str(told)
    with pytest.raises(TypeError, match="`compiled` must be"):
        bj.sharding.traffic(x)


def test_traffic_reads_tuples_and_asynchronous_starts():
    class Program:
        def as_text(self):
            return """
  %a = (f32[2,3]{1,0}, s8[4]{0}) all-reduce(%x, %y), replica_groups={}
  %b = (u8[8]{0}, u8[64]{0}) all-gather-start(%z), dimensions={0}
  %c = u8[64]{0} all-gather-done(%b)
  %d = f32[] all-reduce(%w)
  %p = ((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0})) all-gather-start(%x, %y), dimensions={0}
  %q = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={}
  %r = f32[8]{0} ragged-all-to-all(%x, %y)
  %e = f32[8]{0} fusion(%all-reduce.3), calls=%all-reduce(
"""

    found = bj.sharding._collectives.collectives_in(Program().as_text())
    assert [(c.kind, c.dtype, c.shape, c.nbytes) for c in found] == [
        ("all-reduce", "f32", (2, 3), 24),
        ("all-reduce", "s8", (4,), 4),
        ("all-gather", "u8", (64,), 64),
        ("all-reduce", "f32", (), 4),
        ("all-gather", "f32", (8,), 32),
        ("all-gather", "f32", (12,), 48),
        ("collective-permute", "f32", (4,), 16),
        ("ragged-all-to-all", "f32", (8,), 32),
    ]
