"""Every report of meshes and adapters keeps its lines in ``rows`` and gives plain data."""

import json

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj


def test_collectives_are_plain_data():
    row = bj.sharding.Collective("all-gather", "u8", (4, 16), 64)
    other = bj.sharding.Collective("all-reduce", "f32", (), 4)
    found = bj.sharding.Collectives((row, other, row))
    assert found.rows == (row, other, row)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["nbytes"] == found.nbytes == 132
    assert told["rows"][0] == {"kind": "all-gather", "dtype": "u8", "shape": [4, 16], "nbytes": 64}
    assert [line.split() for line in str(found).splitlines()] == [
        ["collective", "result", "times", "bytes"],
        ["all-gather", "u8[4,16]", "2", "128"],
        ["all-reduce", "f32[]", "1", "4"],
        ["total", "3", "132"],
    ]
    assert found.of("all-reduce").to_dict()["nbytes"] == 4


def test_training_memory_is_plain_data():
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 32), "float32")}}
    memory = bj.sharding.training_memory(
        params,
        bj.PHASE4,
        rules=[("kernel", P("data", None))],
        mesh=AbstractMesh((8,), ("data",)),
        optimizer=optax.adamw(1e-3),
        tokens=16,
    )
    told = json.loads(json.dumps(memory.to_dict()))
    assert told["held"] == memory.held
    assert told["parameters"] == dict(memory.rows)["parameters"] == 64 * 32 * 4 // 8
    assert len(str(memory).splitlines()) == 1 + len(memory.rows)


def test_a_merge_report_is_plain_data():
    packed = {"kernel": bj.pack(jax.random.normal(jax.random.key(0), (64, 16)))}
    adapters = bj.lora.init(packed, 4, key=jax.random.key(1))
    report = bj.lora.merge(packed, jax.tree.map(lambda a: a + jnp.float32(1.0), adapters))[1]
    (row,) = json.loads(json.dumps(report.to_dict()))["rows"]
    assert row["path"] == report.rows[0].path == "kernel"
    assert row["changed"] == report.rows[0].changed > 0
