"""Codes and scales in shards are those of one device."""

import jax.numpy as jnp
import oracles
from cases import cases
from jax.sharding import PartitionSpec as P
from meshes import GROUPS, both_kinds, explicit_in_core, gaussian, mesh_of, put

import bitnet_jax as bj

K, N, M = 64, 32, 16


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


@cases(
    ("name", "spec"),
    QUANTISED,
    core=[("b158", SPECS[2]), ("groups", SPECS[0]), ("median", SPECS[3]), ("int8", SPECS[1])],
    ids=str,
)
@explicit_in_core
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


@explicit_in_core
def test_activations_in_shards(kind):
    for axis in (bj.ActivationConfig(bits=4), bj.ActivationConfig(group=4)):
        _check_activations_in_shards(kind, axis)


def _check_activations_in_shards(kind, axis):
    x = gaussian(5, 8, K)
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
