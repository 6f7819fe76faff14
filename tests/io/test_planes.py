"""Kernels of ternary planes in files, checkpoints, state dicts and exported programs."""

import json

import flax.serialization
import jax
import numpy as np
import oracles
import pytest
from cases import cases
from io_files import assert_same, gaussian, join, pack, round_trip, signed, split

import bitnet_jax as bj
from bitnet_jax.__main__ import main

FormatError = bj.io.FormatError
PLANES = bj.TernaryConfig(planes=2)
ROTATED = bj.TernaryConfig(planes=2, rotation="hadamard")
KERNELS = {
    "dense": ((24, 10), PLANES, {}),
    "odd": ((7, 3), bj.TernaryConfig(granularity="channel", planes=3), {}),
    "outer": ((4, 5, 8), bj.TernaryConfig(granularity=8, planes=2), {"contracting_axes": (0, 2)}),
    "stacked": ((3, 4, 8, 5), PLANES, {"contracting_axes": (1, 2), "batch_axes": 0}),
    "rotated": ((12, 5), ROTATED, {}),
}


@pytest.mark.parametrize("dense", [False, True])
@cases(("shape", "config", "axes"), KERNELS, core=["odd", "stacked", "rotated"])
def test_they_come_back_to_the_bit(path, shape, config, axes, dense):
    tree = {"layer": {"kernel": pack(shape, config, **axes), "bias": np.ones(3, np.float32)}}
    bj.io.save(path, tree, dense=dense)
    got = bj.io.load(path)
    assert_same(got, tree)
    leaf = got["layer"]["kernel"]
    assert (leaf.shape, leaf.config) == (shape, config)
    oracles.assert_same_bits(leaf.dequantize(), tree["layer"]["kernel"].dequantize())


def test_a_file_without_planes_is_as_it_was_and_one_with_them_has_a_later_version(path):
    for config, version in ((bj.B158, "2"), (PLANES, "3")):
        bj.io.save(path, {"kernel": pack(config=config)})
        with open(path, "rb") as file:
            metadata = split(file.read())[0]["__metadata__"]
        (leaf,) = json.loads(metadata["leaves"])
        assert metadata["version"] == version
        assert leaf["shape"] == [24, 10]
        assert leaf["config"].get("planes") == (None if config == bj.B158 else 2)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"planes": 1}, "which states a default"),
        ({"planes": 9}, "`planes` must be an integer from 1 to 4"),
        ({"planes": True}, "`planes` must be an integer"),
        ({"planes": 3}, "declares 'kernel.codes' as U8"),
        ({"plane": 2}, "its fields are"),
        ({"planes": 2, "rotation": None}, "which states a default"),
        ({"planes": 2, "rotation": "hadamrad"}, "`rotation` must be one of None, 'hadamard'"),
    ],
)
def test_a_file_that_lies_about_its_planes_is_refused(path, config, match):
    bj.io.save(path, {"kernel": pack(config=PLANES)})
    with open(path, "rb") as file:
        header, data = split(file.read())
    (leaf,) = json.loads(header["__metadata__"]["leaves"])
    del leaf["config"]["planes"]
    leaf["config"] |= config
    text = json.dumps([leaf], sort_keys=True, separators=(",", ":"))
    header["__metadata__"]["leaves"] = text
    with open(path, "wb") as file:
        file.write(signed(header, data))
    with pytest.raises(FormatError, match=match):
        bj.io.load(path)
    with open(path, "wb") as file:
        file.write(join(header, data))
    with pytest.raises(FormatError):
        bj.io.load(path)


def test_a_file_that_rotates_a_kernel_without_blocks_is_refused(path):
    bj.io.save(path, {"kernel": pack((6, 3))})
    with open(path, "rb") as file:
        header, data = split(file.read())
    (leaf,) = json.loads(header["__metadata__"]["leaves"])
    leaf["config"]["rotation"] = "hadamard"
    text = json.dumps([leaf], sort_keys=True, separators=(",", ":"))
    header["__metadata__"] |= {"leaves": text, "version": "3"}
    with open(path, "wb") as file:
        file.write(signed(header, data))
    with pytest.raises(FormatError, match="has a rotation, and 6 weights along an axis have no"):
        bj.io.load(path)


def test_one_scale_for_all_planes_is_refused(path):
    kernel = pack(config=PLANES)
    broken = jax.tree.map(lambda a: a[:1] if a.shape[-1] == 1 else a, kernel)
    with pytest.raises(ValueError, match=r"^save: kernel has a scale .*each of its 2 planes"):
        bj.io.save(path, {"kernel": broken})


def test_the_commands_name_the_planes(path, capsys):
    bj.io.save(path, {"kernel": pack((64, 32), PLANES)})
    assert main(["inspect", path]) == 0
    printed = capsys.readouterr().out
    assert "absmean 0.5, per tensor, 2 planes  float32  2 x 2 bits" in printed
    assert "at 4.03 bits a weight" in printed
    assert main(["verify", path]) == 0
    bj.io.save(path, {"kernel": pack((64, 32), ROTATED)})
    assert main(["inspect", path]) == 0
    printed = capsys.readouterr().out
    assert "absmean 0.5, per tensor, 2 planes, rotated  float32  2 x 2 bits" in printed


def test_descriptions_of_checkpoints_tell_planes_from_none():
    tree, other = {"kernel": pack(config=PLANES)}, {"kernel": pack()}
    about = bj.io.describe(tree)
    assert (about["version"], bj.io.describe(other)["version"]) == ("2", "1")
    bj.io.check(tree, json.loads(json.dumps(about)))
    like = bj.io.abstract(about)
    assert jax.tree.structure(like) == jax.tree.structure(tree)
    assert like["kernel"].codes.shape == tree["kernel"].codes.shape
    for one, wrong in ((other, about), (tree, bj.io.describe(other))):
        with pytest.raises(ValueError, match=r"^check: kernel has the config"):
            bj.io.check(one, wrong)


def test_state_dicts_restore_planes_into_planes_alone():
    kernel = pack(config=PLANES)
    state = flax.serialization.to_bytes({"kernel": kernel})
    assert_same(flax.serialization.from_bytes({"kernel": kernel}, state), {"kernel": kernel})
    with pytest.raises(ValueError, match=r"from_state_dict: the PackedTernary was saved as"):
        flax.serialization.from_bytes({"kernel": pack()}, state)
    static = flax.serialization.to_state_dict(pack())["static"]
    assert "planes" not in static


@pytest.mark.parametrize("prepared", [False, True])
def test_an_exported_product_has_the_bits(prepared):
    kernel, x = pack(config=PLANES), gaussian((5, 24))
    want = bj.matmul(x, kernel)
    kernel = bj.prepare(kernel) if prepared else kernel
    blob = jax.export.export(jax.jit(bj.matmul))(x, kernel).serialize()
    got = jax.export.deserialize(blob).call(x, kernel)
    oracles.assert_same_bits(got, want)


def test_a_sharding_for_each_array_or_for_both(path):
    tree = {"kernel": pack(config=PLANES)}
    bj.io.save(path, tree)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_same(bj.io.load(path, sharding=place), tree)
    assert_same(bj.io.load(path, sharding=lambda t: jax.tree.map(lambda _: place, t)), tree)
    assert_same(round_trip(path, tree), tree)
