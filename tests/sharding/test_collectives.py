"""Collectives read from HLO."""

import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import compiled, mesh_of, put

import bitnet_jax as bj


def test_traffic_counts_bytes():
    mesh = mesh_of("auto", (8,), ("data",))
    x = put(mesh, jnp.zeros((16, 4), jnp.bfloat16), P("data"))
    whole = NamedSharding(mesh, P())
    told = bj.sharding.collectives(compiled(lambda x: x * 2, x, out_shardings=whole))
    (gather,) = told.of("all-gather").rows
    assert (gather.dtype, gather.shape, gather.nbytes) in [
        ("bf16", (16, 4), 128),
        ("u16", (16, 4), 128),
        ("f32", (16, 4), 256),  # where XLA widens before it gathers
    ]
    assert told.nbytes == gather.nbytes
    assert "all-gather" in str(told)
    assert "total" in str(told)
    with pytest.raises(TypeError, match="`compiled` must be"):
        bj.sharding.collectives(x)


def test_traffic_reads_tuples_and_asynchronous_starts():
    class Program:
        def as_text(self):
            return """
  %a = (f32[2,3]{1,0}, s8[4]{0}) all-reduce(%x, %y), replica_groups={}
  %b = (u8[8]{0}, u8[64]{0}) all-gather-start(%z), dimensions={0}
  %c = u8[64]{0} all-gather-done(%b)
  %d = f32[] all-reduce(%w)
  %p = ((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0})) all-gather-start(%x, %y), dimensions={0}
  %q = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={}
  %r = f32[8]{0} ragged-all-to-all(%x, %y)
  %e = f32[8]{0} fusion(%all-reduce.3), calls=%all-reduce(
"""

    found = bj.sharding._collectives.collectives_in(Program().as_text())
    assert [(c.kind, c.dtype, c.shape, c.nbytes) for c in found] == [
        ("all-reduce", "f32", (2, 3), 24),
        ("all-reduce", "s8", (4,), 4),
        ("all-gather", "u8", (64,), 64),
        ("all-reduce", "f32", (), 4),
        ("all-gather", "f32", (8,), 32),
        ("all-gather", "f32", (12,), 48),
        ("collective-permute", "f32", (4,), 16),
        ("ragged-all-to-all", "f32", (8,), 32),
    ]
