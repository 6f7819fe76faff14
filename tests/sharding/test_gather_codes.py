"""Under FSDP two-bit codes travel, not floats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import cases
from draws import params_of
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from meshes import (
    compiled,
    explicit_in_core,
    gaussian,
    mesh_of,
    net_and_params,
    put,
    sharded_params,
)

import bitnet_jax as bj

K, N, M = 64, 32, 16


def step_of(net, boxed, x):
    def loss(params, x):
        return jnp.square(net.apply({"params": params}, x)).mean()

    return jax.value_and_grad(loss), (boxed, x)


@cases(
    ("way", "config"),
    {
        "fsdp": ("fsdp", bj.B158),
        "eight bits": ("fsdp", bj.Int8Config()),
        "outputs": ("fsdp, outputs", bj.B158),
        "and tensor": ("fsdp and tensor", bj.B158),
        "planes": ("fsdp", bj.TernaryConfig(planes=2)),
    },
    core=["fsdp", "eight bits"],
)
@explicit_in_core
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
            bj.sharding.collectives(compiled(function, *operands, **how)).of("all-gather").rows
        )
    bits = {bj.B158: 2, bj.Int8Config(): 8}.get(config, 4)
    kernels = [math.prod(boxed[f"layer_{i}"]["kernel"].value.shape) for i in range(3)]
    twice = kernels + kernels[1:]
    cut = 4 if way == "fsdp and tensor" else 1
    assert (
        sum(g.nbytes for g in gathers if g.dtype in ("u8", "s8")) == sum(twice) * bits // 8 // cut
    )
    floats = [math.prod(g.shape) for g in gathers if g.dtype == "f32"]
    assert max(floats, default=0) < min(kernels) // cut  # rows of sums for the scale, at most


@pytest.mark.full
def test_without_the_context_xla_gathers_int8_codes():
    mesh = mesh_of("auto", (8,), ("data",))
    ws = [gaussian(i, 1024, 1024) * 0.03 for i in range(3)]
    ws = [put(mesh, w, P("data", None)) for w in ws]

    def loss(ws, x):
        for w in ws:
            x = nn.relu(bj.ternary_dot(x, w))
        return jnp.square(x).mean()

    x = put(mesh, gaussian(9, 512, 1024), P("data"))
    gathers = bj.sharding.collectives(compiled(loss, ws, x)).of("all-gather").rows
    assert [(g.dtype, g.shape) for g in gathers if g.nbytes > 10_000] == [("s8", (1024, 1024))] * 3


def test_weight_only_gathers_codes_too():
    mesh = mesh_of("auto", (8,), ("data",))
    w, x = put(mesh, gaussian(1, K, N), P("data", None)), put(mesh, gaussian(0, M, K), P("data"))

    def product(x, w):
        return bj.ternary_dot(x, w, activations=None, kernel_spec=P("data", None))

    with jax.set_mesh(mesh), bj.sharding.gather_codes("data"):
        told = bj.sharding.collectives(compiled(product, x, w)).of("all-gather").rows
        assert [(g.dtype, g.nbytes) for g in told] == [("u8", K * N // 4)]
        dw = jax.jit(jax.grad(lambda w: product(x, w).sum()))(w)
    np.testing.assert_allclose(dw, jnp.broadcast_to(x.sum(axis=0)[:, None], (K, N)), rtol=1e-4)


@pytest.mark.full
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


@cases("logical", [False, True], core=[True])
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
        told = bj.sharding.collectives(program).of("all-gather").rows
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
    boxed = params_of(layer, x)
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
        with pytest.raises(ValueError, match="does not know how this kernel is sharded"):
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
