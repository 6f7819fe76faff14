"""Boxes: opened, changed and closed again, with what they carry beside the value."""

import dataclasses
from typing import Any, NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import meta

import bitnet_jax as bj
from bitnet_jax._packed.prepared import PreparedTernary
from bitnet_jax._tree import leaves as _boxes

VALUE = np.arange(12.0, dtype=np.float32).reshape(4, 3)


@flax.struct.dataclass
class Recorder(meta.AxisMetadata):
    """A box of a user's own."""

    value: Any
    note: str = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, *_):
        return self

    def remove_axis(self, *_):
        return self


def logical(value):
    return nn.LogicallyPartitioned(value, names=("in", "out"), rules=(("in", "data"),))


BOXES = {
    "Partitioned": lambda value: nn.Partitioned(value, names=("in", None)),
    "LogicallyPartitioned": logical,
    "a user's": lambda value: Recorder(value, note="mine"),
    "nnx.Param": lambda value: nnx.Param(
        value, out_sharding=("in", None), eager_sharding=False, note="mine"
    ),
    "nnx.BatchStat": lambda value: nnx.BatchStat(value),
}


def beside_the_value(box):
    if isinstance(box, nnx.Variable):
        return box.get_metadata()
    return {f.name: getattr(box, f.name) for f in dataclasses.fields(box) if f.name != "value"}


@pytest.mark.parametrize("name", BOXES)
def test_a_box_keeps_what_it_carries(name):
    box = BOXES[name](jnp.asarray(VALUE))
    assert _boxes.is_box(box)
    np.testing.assert_array_equal(_boxes.unbox(box), VALUE)
    packed = bj.pack(jnp.asarray(VALUE))
    closed = _boxes.rebox(box, packed)
    assert type(closed) is type(box)
    assert beside_the_value(closed) == beside_the_value(box)
    chex.assert_trees_all_equal(_boxes.unbox(closed), packed)  # nnx flattens what it is given
    np.testing.assert_array_equal(_boxes.unbox(box), VALUE)  # the first box is untouched


@pytest.mark.parametrize("name", BOXES)
def test_a_whole_round_in_a_box(name):
    params = {"layer": {"kernel": BOXES[name](jnp.asarray(VALUE)), "bias": jnp.zeros(3)}}
    packed, report = bj.pack_params(params)
    assert [layer.path for layer in report.rows] == ["layer/kernel"]
    assert report.model_bytes_before == VALUE.nbytes + 12
    trainable, frozen = bj.partition(packed)
    assert trainable["layer"]["kernel"] is None
    assert type(frozen["layer"]["kernel"]) is type(params["layer"]["kernel"])
    fast = bj.prepare(bj.combine(trainable, frozen))
    for tree in (packed, fast, bj.unpack_params(packed), bj.fake_quantize_params(params)):
        leaf = tree["layer"]["kernel"]
        assert type(leaf) is type(params["layer"]["kernel"])
        assert beside_the_value(leaf) == beside_the_value(params["layer"]["kernel"])
    assert isinstance(_boxes.unbox(fast["layer"]["kernel"]), PreparedTernary)
    np.testing.assert_array_equal(
        _boxes.unbox(bj.unpack_params(packed, dequantize=True)["layer"]["kernel"]),
        bj.quantize(jnp.asarray(VALUE)).dequantize(),
    )


@pytest.mark.parametrize("leaf", [VALUE, 1.0, None, "text"])
def test_what_is_no_box_stays_itself(leaf):
    assert not _boxes.is_box(leaf)
    assert _boxes.unbox(leaf) is leaf
    assert _boxes.rebox(leaf, VALUE) is VALUE


class Pair(NamedTuple):
    left: Any
    right: Any


def test_paths_are_the_names_on_the_way():
    tree = {
        "b": [VALUE, (VALUE, VALUE)],
        "a": Pair(VALUE, {"kernel": nn.Partitioned(VALUE, names=(None, None))}),
        3: VALUE,
    }
    tree = {"x": tree["a"], "y": tree["b"], "z": {3: tree[3]}}
    found, treedef = _boxes.flatten("test", "tree", tree)
    assert [leaf.where for leaf in found] == [
        "x/left",
        "x/right/kernel",
        "y/0",
        "y/1/0",
        "y/1/1",
        "z/3",
    ]
    assert all(leaf.value is VALUE for leaf in found)
    assert isinstance(found[1].boxed, nn.Partitioned)
    rebuilt = jax.tree.unflatten(treedef, [leaf.boxed for leaf in found])
    assert jax.tree.structure(rebuilt) == jax.tree.structure(tree)


def test_names_inside_flax_containers():
    frozen = flax.core.freeze({"layer": {"kernel": VALUE}})
    assert _boxes.flatten("test", "tree", frozen)[0][0].where == "layer/kernel"
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    found = _boxes.flatten("test", "tree", nnx.state(model))[0]
    assert sorted(leaf.where for leaf in found) == ["layers/0/bias", "layers/0/kernel"]
    assert all(isinstance(leaf.value, jax.Array) for leaf in found)


def test_packed_kernels_are_leaves_and_none_is_one_on_request():
    tree = {"kernel": bj.pack(jnp.asarray(VALUE)), "missing": None}
    (only,) = _boxes.flatten("test", "tree", tree)[0]
    assert only.value is tree["kernel"]
    both = _boxes.flatten("test", "tree", tree, is_leaf=lambda leaf: leaf is None)[0]
    assert [leaf.where for leaf in both] == ["kernel", "missing"]


@pytest.mark.parametrize("tree", [{}, [], {"a": {}}, None, {"a": None}])
def test_a_tree_without_arrays_is_refused(tree):
    with pytest.raises(ValueError, match=r"^pack_params: `params` holds no arrays\. Pass the tree"):
        bj.pack_params(tree)
