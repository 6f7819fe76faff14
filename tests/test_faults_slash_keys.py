"""Keys that hold several names, as Haiku and flattened dicts have them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj

HAIKU = {
    "mlp/~/linear_0": {"w": jnp.ones((16, 32)), "b": jnp.ones(32)},
    "mlp/~/linear_1": {"w": jnp.ones((32, 8)), "b": jnp.ones(8)},
}
FLAT = flatten_dict(
    {"body": {"kernel": jnp.ones((8, 8))}, "head": {"kernel": jnp.ones((8, 4))}}, sep="/"
)


def is_packed(leaf):
    return isinstance(leaf, bj.PackedTernary)


def packed_paths(params, select=None):
    tree, _ = bj.pack_params(params, select=select)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    keys = (("/".join(str(k.key) for k in path), leaf) for path, leaf in flat)
    return [path for path, leaf in keys if is_packed(leaf)]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["mlp/~/linear_0/w"], ["mlp/~/linear_0/w"]),
        (["linear_0/w"], ["mlp/~/linear_0/w"]),
        (["w"], ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]),
        (["linear_?/w"], ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]),
        (["mlp/*/linear_1/w"], ["mlp/~/linear_1/w"]),
    ],
)
def test_only_reads_names_inside_keys(patterns, found):
    assert packed_paths(HAIKU, bj.only(*patterns)) == found


def test_flattened_dicts():
    assert packed_paths(FLAT) == ["body/kernel", "head/kernel"]
    assert packed_paths(FLAT, bj.exclude("head")) == ["body/kernel"]
    assert packed_paths(FLAT, bj.only("head")) == ["head/kernel"]
    assert packed_paths(FLAT, bj.only("head/kernel")) == ["head/kernel"]


def test_a_whole_key_is_a_pattern():
    params = {f"net/{name}": {"kernel": jnp.ones((8, 8))} for name in ("a", "b")}
    assert packed_paths(params, bj.exclude("net/a")) == ["net/b/kernel"]
    with pytest.raises(ValueError, match="the pattern 'net/c' matches nothing"):
        bj.pack_params(params, select=bj.exclude("net/c"))


def test_attention_of_a_flattened_tree():
    nested = {"attn": {name: {"kernel": jnp.ones((4, 2, 3))} for name in ("query", "key")}}
    largest = {"attn": jnp.array([120.0, 5.0])}
    want = flatten_dict(bj.optim.qk_clip(nested, largest, 30.0), sep="/")
    got = bj.optim.qk_clip(flatten_dict(nested, sep="/"), largest, 30.0)
    assert want.keys() == got.keys()
    for path, kernel in got.items():
        assert jnp.array_equal(kernel, want[path]), path
    assert float(got["attn/key/kernel"].min()) == 0.5


def test_a_flattened_embedding_is_looked_up():
    params = {"embed/embedding": jnp.ones((8, 4)), "up/kernel": jnp.ones((4, 8))}
    memory = bj.sharding.training_memory(
        params,
        mesh=AbstractMesh((1,), ("x",)),
        optimizer=optax.sgd(1.0),
        tokens=2,
        rules=lambda *_: None,
        select=lambda path, leaf: True,
    )
    assert memory.saved == 2 * (4 + 4) + 4 * 8 + 4  # by the kernel alone


def test_rules_of_shardings_and_muon():
    rules = [("linear_0/w", P("x")), ("mlp/~/linear_1", P())]
    specs = bj.sharding.partition_specs(HAIKU, rules)
    assert specs["mlp/~/linear_0"]["w"] == P("x", None)
    dims = bj.optim.muon_dimensions(HAIKU, select=bj.only("linear_1/w"))
    assert dims["mlp/~/linear_0"]["w"] is None
    assert dims["mlp/~/linear_1"]["w"] is not None
