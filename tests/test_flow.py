"""How often one call meets the mesh: once for each operation, and never inside another."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj
from bitnet_jax import _mesh

X = jax.random.normal(jax.random.key(0), (4, 32))
W = jax.random.normal(jax.random.key(1), (32, 16))
TABLE = bj.pack(jax.random.normal(jax.random.key(2), (16, 8)), bj.Int8Config(), contracting_axes=-1)
INDEX = jnp.array([3, 1])


@pytest.fixture
def entries(monkeypatch):
    """The depth at which each call of ``in_auto``, the one door to the mesh, was made."""
    depths, depth, door = [], [0], _mesh.in_auto

    def counted(run, *operands, **how):
        depths.append(depth[0])
        depth[0] += 1
        try:
            return door(run, *operands, **how)
        finally:
            depth[0] -= 1

    monkeypatch.setattr(_mesh, "in_auto", counted)
    return depths


def layer(**fields):
    module = bj.linen.BitDense(16, **fields)
    return functools.partial(module.apply, {"params": {"kernel": W, "bias": jnp.zeros(16)}})


def served(kernel):
    params = {"kernel": kernel, "bias": jnp.zeros(16)}
    return functools.partial(bj.linen.BitDense(16).apply, {"params": params})


CALLS = {
    "quantize": (1, lambda: bj.quantize(W)),
    "dequantize": (2, lambda: bj.quantize(W).dequantize()),
    "fake_quantize": (1, lambda: bj.fake_quantize(W)),
    "fake_quantize, phased": (1, lambda: bj.fake_quantize(W, strength=0.5)),
    "fake_quantize_activations": (1, lambda: bj.fake_quantize_activations(X)),
    "fake_quantize_params": (2, lambda: bj.fake_quantize_params([{"kernel": W}] * 2)),
    "quantize_activations": (1, lambda: bj.quantize_activations(X)),
    "pack": (1, lambda: bj.pack(W)),
    "pack_params": (2, lambda: bj.pack_params([{"kernel": W}] * 2)),
    "unpack": (1, lambda: bj.unpack(TABLE)),
    "rows": (1, lambda: TABLE.rows(INDEX)),
    "ternary_dot": (1, lambda: bj.ternary_dot(X, W)),
    "ternary_dot, backward": (1, lambda: jax.grad(lambda w: bj.ternary_dot(X, w).sum())(W)),
    "ternary_dot, phased": (1, lambda: bj.ternary_dot(X, W, strength=jnp.float32(0.5))),
    "ternary_dot, weight-only": (1, lambda: bj.ternary_dot(X, W, activations=None)),
    "BitDense": (1, lambda: layer()(X)),
    "BitDense, normed": (2, lambda: layer(norm=True)(X)),
}
PACKED = {
    "matmul": lambda kernel: bj.matmul(X, kernel),
    "BitDense": lambda kernel: served(kernel)(X),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_meets_the_mesh_once(entries, name):
    wanted, call = CALLS[name]
    call()
    assert entries == [0] * wanted


@pytest.mark.parametrize("config", [bj.B158, bj.Int8Config()], ids=["two bits", "int8"])
@pytest.mark.parametrize("prepared", [False, True], ids=["stored", "prepared"])
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_kernel_meets_the_mesh_once(entries, name, prepared, config):
    kernel = bj.pack(W, config)
    kernel = bj.prepare(kernel) if prepared else kernel
    entries.clear()
    if name == "BitDense" and config != bj.B158:
        with pytest.raises(ValueError, match="was packed with"):
            PACKED[name](kernel)
        assert entries == []
    else:
        PACKED[name](kernel)
        assert entries == [0]


def test_on_explicit_axes_an_operation_meets_the_mesh_once(entries):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    w = jax.device_put(W, NamedSharding(mesh, P(None, "model")))
    y = jax.jit(bj.ternary_dot)(x, w)
    assert entries == [0]
    assert y.sharding.spec == P("data", "model")
    entries.clear()
    y = bj.matmul(x, bj.pack(w))
    assert entries == [0, 0]
    assert y.sharding.spec == P("data", "model")
