"""One packed tree on one device and on eight: the same bits, and what travels."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from draws import params_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import GROUPS, both_kinds, compiled, explicit_in_core, gaussian, mesh_of, put

import bitnet_jax as bj

K, N, M = 64, 32, 16


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
CONFIGS["planes"] = bj.TernaryConfig(granularity="channel", planes=2)


def placed(mesh, packed, spec):
    specs = bj.sharding.partition_specs({"w": packed}, lambda *_: spec, mesh=mesh)["w"]
    return jax.device_put(packed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


SERVED = [("cpu", "channel", place) for place in PLACES]
SERVED += [("reference", config, "contraction, x too") for config in ("tensor", "groups", "int8")]
SERVED += [("cpu", config, "contraction, x too") for config in ("tensor", "groups", "int8")]
SERVED += [("reference", "channel", "rows and outputs"), ("cpu", "groups", "rows and outputs")]

SERVED += [("cpu", "planes", place) for place in PLACES]
SERVED += [("reference", "planes", "contraction, x too"), ("xla", "planes", "contraction")]


@cases(
    ("name", "config", "place"),
    SERVED,
    core=[
        ("cpu", "channel", "contraction"),
        ("cpu", "channel", "rows and outputs"),
        ("reference", "groups", "contraction, x too"),
        ("cpu", "planes", "contraction, x too"),
    ],
)
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


@cases(
    ("config", "place"),
    [("tensor", "contraction, x too"), ("groups", "rows and contraction"), ("int8", "outputs")],
    core=[("tensor", "contraction, x too")],
)
@both_kinds
def test_groups_of_activations_have_the_bits_of_one_device(kind, config, place):
    mesh, (x_spec, spec), config = mesh_of(kind), PLACES[place], CONFIGS[config]
    x, w = gaussian(0, M, K), gaussian(1, K, N)
    for group in (4, 32):  # inside a shard of the contraction, and across two
        activations = bj.ActivationConfig(group=group)

        def train(x, w, activations=activations):
            return bj.ternary_dot(x, w, config, activations=activations)

        def serve(x, w, activations=activations):
            return bj.matmul(x, w, activations=activations)

        x_put, w_put = put(mesh, x, x_spec), put(mesh, w, spec)
        want = jax.jit(train)(x, w)
        oracles.assert_same_bits(compiled(train, x_put, w_put)(x_put, w_put), want)
        packed = placed(mesh, bj.pack(w, config), spec)
        oracles.assert_same_bits(compiled(serve, x_put, packed)(x_put, packed), want)


@cases(
    ("name", "config"),
    [("cpu", "tensor"), ("cpu", "int8"), ("cpu", "planes"), ("reference", "channel")]
    + [("reference", "planes")],
    core=[("cpu", "tensor")],
)
@explicit_in_core
def test_what_travels(kind, config, name):
    """Outputs sharded: nothing. Contraction sharded: int32 sums, and gammas if x is, too."""
    mesh = mesh_of(kind)
    multiply = functools.partial(bj.matmul, implementation=name)

    def told(place):
        x_spec, spec = PLACES[place]
        packed = placed(mesh, bj.pack(gaussian(1, K, N), CONFIGS[config]), spec)
        operands = put(mesh, gaussian(0, M, K), x_spec), packed
        found = bj.sharding.collectives(compiled(multiply, *operands)).rows
        return sorted((c.kind, c.dtype, math.prod(c.shape)) for c in found)

    # The native product sums its planes at once, plain JAX one after another.
    planes = getattr(CONFIGS[config], "planes", 1)
    times, many = (planes, 1) if name == "reference" else (1, planes)
    sums, gammas = [("all-reduce", "s32", many * M * N)] * times, ("all-reduce", "f32", M)
    assert told("outputs") == []
    assert told("rows and outputs") == []
    assert told("contraction") == sums
    assert told("contraction, x too") == [gammas, *sums]
    assert told("rows and contraction") == [("all-reduce", "s32", many * M * N // 2)] * times


def test_the_epilogue_comes_after_the_sum():
    """Sums near 2**24 would round apart if they were scaled on each device and then added."""
    mesh, k = mesh_of("auto"), 4 * 40_000
    x = np.full((4, k), 0.7, np.float32)
    x[:, ::3] = 0.3
    signs = np.random.default_rng(2).random((k, 16)) > 0.5
    packed = bj.pack(np.where(signs, np.float32(0.1), np.float32(-0.3)))
    for name in ("cpu", "reference"):
        multiply = jax.jit(functools.partial(bj.matmul, implementation=name))
        y = multiply(put(mesh, x, P(None, "model")), placed(mesh, packed, P("model", None)))
        oracles.assert_same_bits(y, multiply(x, packed))


@explicit_in_core
def test_a_kernel_that_does_not_divide_is_gathered_in_its_bytes(kind):
    mesh, x, packed = mesh_of(kind), gaussian(0, 6, 40), bj.pack(gaussian(1, 40, 12))
    # 10 bytes of four rows: not for four devices; as the codes come from somebody else.
    sharded = dataclasses.replace(packed, codes=put(mesh, packed.codes, P("data", "model")))
    y = jax.jit(bj.matmul)(x, sharded)
    oracles.assert_same_bits(y, jax.jit(bj.matmul)(x, packed))


@explicit_in_core
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


@explicit_in_core
def test_a_convolution(kind):
    mesh, layer = mesh_of(kind), bj.linen.BitConv(16, (3, 3))
    image = gaussian(0, 4, 8, 8, 8)
    params = params_of(layer, image)
    packed = bj.linen.pack(layer, params, image)[0]
    want = jax.jit(layer.apply)({"params": packed}, image)
    specs = bj.sharding.partition_specs(
        packed, [("kernel", P(None, None, None, "model"))], mesh=mesh
    )
    packed = jax.device_put(packed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    y = jax.jit(layer.apply)({"params": packed}, put(mesh, image, P("data")))
    oracles.assert_same_bits(y, want)


@cases(
    ("kind", "name"),
    [("auto", "reference"), ("explicit", "cpu")],
    core=[("explicit", "cpu")],
)
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
    assert bj.sharding.collectives(program).nbytes == 0


@both_kinds
def test_shards_are_not_prepared(kind):
    mesh = mesh_of(kind)
    packed = {"w": placed(mesh, bj.pack(gaussian(1, K, N)), P(None, "model"))}
    assert bj.prepare(packed)["w"] is packed["w"]
    for name in ("cpu", "xla"):
        with pytest.raises(NotImplementedError, match=r"prepare: \['w'\] is in shards"):
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


@both_kinds
def test_layers_by_index_keep_their_rows_on_their_devices(kind):
    """Stacks are whole on each device, and so is nothing else."""
    mesh = mesh_of(kind)
    stack = bj.prepare(bj.pack(gaussian(1, 3, K, K), bj.PHASE4, batch_axes=0), "cpu")
    x = gaussian(0, M, K)

    def layers(x, stack):
        def step(h, i):
            return bj.matmul(h, stack[i]), None

        return jax.lax.scan(step, x, jnp.arange(3))[0]

    placed = put(mesh, x, P("data")), jax.device_put(stack, NamedSharding(mesh, P()))
    program = compiled(layers, *placed)
    assert not bj.sharding.collectives(program).rows
    y = program(*placed)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), y.ndim)
    oracles.assert_same_bits(y, functools.reduce(bj.matmul, list(stack), x))


@both_kinds
def test_a_layer_of_a_stack_in_shards(kind):
    """Each slice is sharded as its stack is, but for the axis of the layers."""
    mesh, whole = mesh_of(kind), bj.pack(gaussian(1, 4, K, N), bj.PHASE4, batch_axes=0)
    x = gaussian(0, M, K)
    for spec in (P("model"), P(None, "model"), P(None, None, "model"), P("data", "model")):
        stack = placed(mesh, whole, spec)
        wanted = bj.matmul(x, whole[2])
        one = stack[2]
        oracles.assert_same_bits(one.codes, whole[2].codes)
        for run in (bj.matmul, jax.jit(bj.matmul)):
            oracles.assert_same_bits(run(put(mesh, x, P()), one), wanted)
        by_index = jax.jit(lambda x, s, i: bj.matmul(x, s[i]))
        oracles.assert_same_bits(by_index(put(mesh, x, P()), stack, 2), wanted)


@pytest.mark.parametrize("group", [None, 32])
def test_programs_that_compute_different_things_differ_in_their_text(group):
    """XLA's persistent cache knows a program by its text, addresses of objects included."""
    mesh = mesh_of("auto")
    x, packed = gaussian(0, M, K), placed(mesh, bj.pack(gaussian(1, K, N)), P("model", None))

    def text(activations):
        serve = jax.jit(lambda x, w: bj.matmul(x, w, activations=activations))
        return re.sub(r'(backend_config = )"\d+"', r"\1", serve.lower(x, packed).as_text())

    other = bj.ActivationConfig(group=4)
    assert "CustomSPMDPartitioning" in text(other)
    assert text(other) == text(other)
    assert text(bj.ActivationConfig(group=group)) != text(other)
    assert text(bj.ActivationConfig(group=4, eps=1e-3)) != text(other)
