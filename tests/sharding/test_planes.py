"""Kernels of ternary planes in shards: the bits of one device, and planes whole on each."""

import jax
import jax.numpy as jnp
import oracles
import pytest
from cases import cases
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    explicit_in_core,
    gaussian,
    mesh_of,
    net_and_params,
    put,
    sharded_params,
)

import bitnet_jax as bj

PLANES = bj.TernaryConfig(planes=2)
CONFIGS = {
    "tensor": PLANES,
    "groups": bj.TernaryConfig(scale="survivors", granularity=8, planes=3),
}
SPECS = [P("model", None), P(None, "model"), P("data", "model")]
every_config = cases("config", CONFIGS, core=["groups"])


@every_config
@cases("spec", SPECS, core=[SPECS[2]], ids=str)
@explicit_in_core
def test_codes_and_scales_are_those_of_one_device(kind, spec, config):
    mesh, w = mesh_of(kind), gaussian(4, 64, 32) * 0.02
    sharded, whole = put(mesh, w, spec), bj.pack(w, config)
    packed, t = bj.pack(sharded, config), bj.quantize(sharded, config)
    jax.tree.map(oracles.assert_same_bits, packed, whole)
    jax.tree.map(oracles.assert_same_bits, t, bj.quantize(w, config))
    floats = packed.dequantize()
    oracles.assert_same_bits(floats, whole.dequantize())
    oracles.assert_same_bits(t.dequantize(), whole.dequantize())
    oracles.assert_same_bits(bj.fake_quantize(sharded, config), whole.dequantize())
    assert not packed.codes.sharding.is_fully_replicated
    if kind == "explicit":
        assert packed.codes.sharding.spec == P(None, *spec)
        assert floats.sharding.spec == spec
        assert t.planes[1].codes.sharding.spec == spec
    tree, report = bj.pack_params({"kernel": sharded}, config)
    assert tree["kernel"].codes.sharding.spec == packed.codes.sharding.spec
    assert str(report) == str(bj.pack_params({"kernel": w}, config)[1])


@every_config
@cases("way", ["fsdp", "tensor", "fsdp and tensor"], core=["fsdp and tensor"])
@explicit_in_core
def test_a_network_has_the_bits_of_one_device(kind, way, config):
    mesh, x = mesh_of(kind), gaussian(6, 16, 32)
    net, boxed = net_and_params(way, config=config)
    want = jax.jit(net.apply)({"params": nn.unbox(boxed)}, x)
    packed, _ = bj.pack_params(boxed, config)
    specs = bj.sharding.partition_specs(packed, mesh=mesh)
    placed = jax.device_put(packed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    with jax.set_mesh(mesh):
        params, x = sharded_params(mesh, boxed), put(mesh, x, P("data"))
        oracles.assert_same_bits(jax.jit(net.apply)({"params": params}, x), want)
        oracles.assert_same_bits(jax.jit(net.apply)({"params": placed}, x), want)
        with bj.sharding.gather_codes("data"):
            oracles.assert_same_bits(jax.jit(net.apply)({"params": params}, x), want)


def test_specs_are_those_of_the_float_kernel():
    mesh = mesh_of("auto")
    tree = {"kernel": bj.pack(gaussian(1, 3, 32, 8), CONFIGS["groups"], batch_axes=0)}
    for given in (mesh, None):
        specs = bj.sharding.partition_specs(
            tree, [("kernel", P(None, "model", "data"))], mesh=given
        )
        assert specs["kernel"].codes == P(None, None, "model", "data")
        groups = None if given is None else "model"  # 4 groups of each plane
        assert specs["kernel"].scale == P(None, None, groups, "data")
    with pytest.raises(ValueError, match="axis 1 of kernel has length 32"):
        bj.sharding.partition_specs(
            tree, [("kernel", P(None, ("model", "data", "rest")))], mesh=WIDE
        )


WIDE = jax.sharding.AbstractMesh((2, 4, 2), ("data", "model", "rest"))


@pytest.mark.full
def test_each_device_of_a_shard_map_multiplies_its_outputs():
    mesh = mesh_of("auto", (8,), ("model",))
    x, packed = gaussian(0, 5, 64), bj.pack(gaussian(1, 64, 32), PLANES)
    specs = bj.sharding.partition_specs(packed, lambda *_: P(None, "model"), mesh=mesh)
    run = jax.shard_map(bj.matmul, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "model"))
    oracles.assert_same_bits(jax.jit(run)(x, packed), bj.matmul(x, packed))
    again = jax.shard_map(
        lambda x, w: bj.matmul(x, bj.prepare(w)),
        mesh=mesh,
        in_specs=(P(), specs),
        out_specs=P(None, "model"),
    )
    oracles.assert_same_bits(jax.jit(again)(x, packed), bj.matmul(x, packed))
    assert jnp.isfinite(bj.matmul(x, packed)).all()
