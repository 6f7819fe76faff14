"""Specs of packed leaves, what they refuse, and a file loaded onto a mesh."""

import jax
import jax.numpy as jnp
import oracles
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import GROUPS, explicit_in_core, gaussian, mesh_of, net_and_params

import bitnet_jax as bj

K, N, M = 64, 32, 16


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
        ([("kernel", P("pipe"))], ValueError, r"names the mesh axes \['pipe'\], and the mesh"),
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


@explicit_in_core
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
