"""Where the arrays of a checkpoint are placed, on one process and on several."""

import dataclasses
import socket
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FormatError, gaussian, replace, small, start
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion  # optax's adamw raises under the strict one


def test_shardings_are_given_by_one_by_a_tree_or_by_a_function():
    tree = small()
    about = bj.io.describe(tree)
    mesh = jax.make_mesh((1,), ("d",))
    one = NamedSharding(mesh, PartitionSpec())
    default = SingleDeviceSharding(jax.devices()[0])

    def of(target):
        return {leaf.sharding for leaf in jax.tree.leaves(target)}

    assert of(bj.io.abstract(about)) == {default}
    assert of(bj.io.abstract(about, sharding=one)) == {one}
    prefix = {"dense": one, "head": {"kernel": default}}
    got = bj.io.abstract(about, sharding=prefix)
    assert (of(got["dense"]), of(got["head"])) == ({one}, {default})
    seen = []

    def choose(target):
        seen.append(target)
        return jax.tree.map(lambda a: one if a.dtype == jnp.uint8 else default, target)

    got = bj.io.abstract(about, sharding=choose)
    assert got["dense"]["kernel"].codes.sharding == one
    assert of(got["head"]) == {default}
    assert isinstance(seen[0]["dense"]["kernel"], bj.PackedTernary)
    like = jax.device_put(tree, one)
    assert of(bj.io.abstract(about, like=like)) == {one}
    assert of(bj.io.abstract(about, like=jax.eval_shape(lambda: tree))) == {default}
    assert of(bj.io.abstract(about, like=like, sharding=default)) == {default}


def two_processes(rank, port):
    """One of two processes with a device each, over which arrays are copied or spread."""
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    value = np.arange(8, dtype=np.float32)
    packed = jax.tree.map(np.asarray, bj.pack(gaussian((8, 4))))

    def placed(spec, array):
        at = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, at, lambda index: array[index])

    def both(spec):
        kernel = jax.tree.map(lambda a: placed(PartitionSpec(), a), packed)
        codes = placed(PartitionSpec(None, *spec), packed.codes)
        return {"x": placed(spec, value), "kernel": dataclasses.replace(kernel, codes=codes)}

    here = {"x": value, "kernel": packed}
    copied, spread = both(PartitionSpec()), both(PartitionSpec("d"))
    assert not copied["x"].is_fully_addressable
    assert bj.io.describe(copied) == bj.io.describe(here)
    bj.io.check(copied, bj.io.describe(here))
    for call in (lambda: bj.io.describe(spread), lambda: bj.io.check(spread, bj.io.describe(here))):
        with pytest.raises(ValueError, match=r"spread over several processes.* digest=False"):
            call()
    about = bj.io.describe(spread, digest=False)
    assert about == bj.io.describe(here, digest=False)
    bj.io.check(spread, about)
    with pytest.raises(FormatError, match="has the config"):
        bj.io.check(replace({"a": spread}, "a", config=bj.PHASE4)["a"], about)
    print("agreed")


@pytest.mark.slow
def test_arrays_of_several_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    calls = [f"two_processes({rank}, {port})" for rank in range(2)]
    both = [start(__file__, call, stdout=subprocess.PIPE) for call in calls]
    assert [process.communicate(timeout=120)[0] for process in both] == ["agreed\n"] * 2


def test_shardings_that_cannot_be_are_refused():
    about = bj.io.describe({**small(), "step": np.int64([1])})
    mesh = jax.sharding.AbstractMesh((3,), ("d",))
    three = NamedSharding(mesh, PartitionSpec("d"))
    for given, match in (
        (PartitionSpec(), "must have a jax.sharding.Sharding at dense/bias.* Make one from a spec"),
        (
            {"dense": "d", "head": "d", "step": "d"},
            "a jax.sharding.Sharding at dense/bias, got 'd'",
        ),
    ):
        with pytest.raises(TypeError, match=match):
            bj.io.abstract(about, sharding=given)
    place = SingleDeviceSharding(jax.devices()[0])
    for given, match in (
        ({"dense": place}, "`sharding` has another structure than the tree"),
        (place, "cannot place step of int64"),
        (three, r"does not fit dense/bias of shape \(10,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            bj.io.abstract(about, sharding=given)
