"""Packed kernels, adapters and optimizer states as arguments of exported functions."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import export

import bitnet_jax as bj
from bitnet_jax._packed.static_data import from_bytes, to_bytes

X = jax.random.normal(jax.random.key(0), (4, 60))
CONFIGS = {
    "one scale": bj.B158,
    "per channel": bj.PHASE4,
    "groups": bj.TernaryConfig(granularity=20, eps=1e-7),
    "int8": bj.Int8Config(),
}


def kernel(name, dtype=jnp.float32):
    w = jax.random.normal(jax.random.key(1), (60, 16), dtype)
    return bj.pack(w, CONFIGS[name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ready", [lambda p: p, bj.prepare], ids=["stored", "prepared"])
def test_static_data_survives_bytes(name, ready, dtype):
    _, static = jax.tree.structure(ready(kernel(name, dtype))).node_data()
    again = from_bytes(to_bytes(static))
    assert again == static
    assert [type(v) for v in again] == [type(v) for v in static]
    assert hash(again) == hash(static)


def test_bytes_are_plain_json_and_configs_are_validated():
    _, static = jax.tree.structure(kernel("groups")).node_data()
    data = to_bytes(static)
    assert data.isascii()
    with pytest.raises(ValueError, match="threshold"):
        from_bytes(data.replace(b'"threshold": 0.5', b'"threshold": -1'))
    with pytest.raises(KeyError):
        from_bytes(b'[{"os.system": {}}]')


@pytest.mark.parametrize("is_prepared", [False, True], ids=["stored", "prepared"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_arguments_are_exported(name, is_prepared):
    pytest.importorskip("flatbuffers")
    runs_by = "reference" if name == "int8" else "xla"  # a native kernel is not portable
    leaf = kernel(name)
    leaf = bj.prepare(leaf, runs_by) if is_prepared else leaf
    run = jax.jit(lambda packed, x: bj.matmul(x, packed["kernel"], implementation=runs_by))
    data = export.export(run)({"kernel": leaf}, X).serialize()
    again = export.deserialize(data).call({"kernel": leaf}, X)
    oracles.assert_same_bits(again, run({"kernel": leaf}, X))


@pytest.mark.standard_promotion
def test_adapters_and_optimizer_states_are_exported():
    pytest.importorskip("flatbuffers")
    packed = {"kernel": bj.pack(jax.random.normal(jax.random.key(1), (60, 16)))}
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2))
    ema, ma = bj.optim.grokfast_ema(), bj.optim.grokfast_ma(2)

    @jax.jit
    def step(adapters, states, attached):
        updates, slow = ema.update(adapters, states[0])
        updates, window = ma.update(updates, states[1])
        return updates, (slow, window), attached

    states = ema.init(adapters), ma.init(adapters)
    arguments = adapters, states, bj.lora.attach(packed, adapters)
    data = export.export(step)(*arguments).serialize()
    again = export.deserialize(data).call(*arguments)
    for got, want in zip(*map(jax.tree.leaves, (again, step(*arguments))), strict=True):
        np.testing.assert_array_equal(got, want)
    assert again[0].alpha == adapters.alpha


@pytest.mark.standard_promotion
def test_a_watched_state_is_exported():
    pytest.importorskip("flatbuffers")
    params = {"kernel": jax.random.normal(jax.random.key(1), (60, 16))}
    tx = bj.optim.watch_trits(1)
    run = jax.jit(lambda state, params: tx.update(params, state, params)[1])
    data = export.export(run)(tx.init(params), params).serialize()
    state = export.deserialize(data).call(tx.init(params), params)
    assert bj.optim.read_trits(state)["kernel/flip_rate"] == 0
