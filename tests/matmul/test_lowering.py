"""Which form of the native product runs is decided when a program is lowered, not when traced."""

import functools
import re

import jax
import jax.numpy as jnp
import kernel_suite as suite
import oracles
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from jax import export
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from native_paths import needs_it

import bitnet_jax as bj
from bitnet_jax import _native as native
from bitnet_jax import linen
from bitnet_jax._matmul import IMPLEMENTATIONS, panels
from bitnet_jax._matmul.panels import layout_of

PLATFORMS = ("cpu", "cuda", "tpu")
READY = {"stored": lambda tree: tree, "prepared": bj.prepare}


class Net(nn.Module):
    """Every kind of kernel: a convolution, heads, experts, int8, groups, an embedding."""

    @nn.compact
    def __call__(self, ids, image):
        table = nn.Embed(11, 12)
        x = nn.relu(nn.Conv(12, (3, 3))(image)).mean((1, 2)) + table(ids)
        x = linen.BitDense(12, weights=bj.TernaryConfig(granularity=4), name="groups")(x)
        x = linen.BitDenseGeneral((3, 4), name="heads")(x)
        x = linen.BitEinsum((3, 4, 12), "bhd,hdf->bhf", name="experts")(x).sum(1)
        return table.attend(x)


@functools.cache
def net():
    """The model, its packed parameters and its inputs."""

    def select(path, _):
        return bj.Int8Config() if "embedding" in path else bj.B158

    model = bj.linen.ternarize(Net(), select=select)
    inputs = jnp.array([3, 0, 10]), normal(3, 6, 6, 2)
    packed, _ = bj.linen.pack(model, params_of(model, *inputs), *inputs)
    return (lambda packed, *inputs: model.apply({"params": packed}, *inputs)), packed, inputs


def native_calls(text):
    return {target for target in native.TARGETS if target in text}


@pytest.mark.parametrize("ready", READY.values(), ids=READY)
def test_one_export_runs_on_three_platforms(ready):
    pytest.importorskip("flatbuffers")
    apply, packed, inputs = net()
    tree = ready(packed)
    exported = export.export(jax.jit(apply), platforms=PLATFORMS)(tree, *inputs)
    assert not native_calls(exported.mlir_module())
    assert exported.platforms == PLATFORMS
    again = export.deserialize(exported.serialize())
    oracles.assert_same_bits(again.call(tree, *inputs), jax.jit(apply)(packed, *inputs))


@needs_it
@pytest.mark.parametrize("platform", PLATFORMS[1:])
def test_one_trace_is_lowered_for_each_platform(platform):
    apply, packed, inputs = net()
    for tree in (packed, bj.prepare(packed)):
        traced = jax.jit(apply).trace(tree, *inputs)
        here = native_calls(traced.lower().as_text())
        assert native.MULTIPLY in here
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert not native_calls(text)
        assert "custom_call" not in text.replace("custom_call @Sharding", "")


@needs_it
def test_an_implementation_that_is_asked_for_runs_or_raises():
    packed, x = bj.pack(normal(24, 10)), normal(2, 24, seed=1)
    for leaf in (packed, bj.prepare(packed, "cpu")):
        traced = jax.jit(functools.partial(bj.matmul, implementation="cpu")).trace(x, leaf)
        assert native.MULTIPLY in native_calls(traced.lower().as_text())
        with pytest.raises(NotImplementedError, match=r"^matmul: .*'cpu' runs on a CPU.*for tpu"):
            traced.lower(lowering_platforms=("tpu",))


def programs():
    """Programs around a product, each traced here and lowered elsewhere."""
    packed, x = bj.pack(normal(24, 10)), normal(3, 5, 24, seed=1)
    stack = bj.pack(normal(3, 24, 24), batch_axes=0)
    mesh = mesh_of("auto", (8,), ("data",))

    def scanned(x, stack):
        return jax.lax.scan(lambda x, leaf: (bj.matmul(x, leaf), None), x, stack)[0]

    def sharded(x, packed):
        return jax.shard_map(bj.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(
            x, packed
        )

    def loss(x, packed):
        return jnp.square(bj.matmul(x, packed)).sum()

    return {
        "vmap of rows": (jax.vmap(bj.matmul, (0, None)), x, packed),
        "vmap of kernels": (jax.vmap(bj.matmul), x, stack),
        "scan": (scanned, x[0], stack),
        "gradient": (jax.value_and_grad(loss), x, packed),
        "prepared inside": (lambda x, packed: bj.matmul(x, bj.prepare(packed)), x, packed),
        "shard_map": (sharded, normal(8, 24), packed),
    }


@needs_it
@cases("name", list(programs()), core=["vmap of kernels", "prepared inside"])
def test_around_a_product(name):
    function, *operands = programs()[name]
    traced = jax.jit(function).trace(*operands)
    assert native.MULTIPLY in native_calls(traced.lower().as_text())
    assert not native_calls(traced.lower(lowering_platforms=("tpu",)).as_text())
    plain = export.export(jax.jit(function))(*operands)
    assert not native_calls(plain.mlir_module())
    if name not in ("shard_map", "gradient"):  # one is called by eight devices; a sum has no order
        oracles.assert_same_bits(plain.call(*operands), traced.lower().compile()(*operands))


@needs_it
@cases("case", suite.CASES, core=["odd-k-and-n", "groups-conv-odd", "experts-heads", "int8-table"])
def test_both_forms_have_the_same_bits(case):
    """Products in plain JAX, from both layouts, and the layout itself, byte for byte."""
    x, packed = case.x(5), case.pack()
    prepared = bj.prepare(packed, "cpu")
    multiply = jax.jit(functools.partial(bj.matmul, activations=case.activations))
    for leaf in (packed, prepared):
        if IMPLEMENTATIONS["cpu"].unsupported_reason(leaf, case.activations):
            continue  # it is refused: groups of fewer than four activations
        plain = export.export(multiply)(x, leaf)
        assert not native_calls(plain.mlir_module())
        oracles.assert_same_bits(plain.call(x, leaf), case.oracle(x))
    layout = layout_of(prepared)
    codes = panels.codes_of(prepared.codes, layout)
    oracles.assert_same_bits(panels.lay_out(codes, layout), prepared.codes)


@needs_it
def test_without_jit():
    packed, x = bj.pack(normal(24, 10)), normal(2, 24, seed=1)
    with jax.disable_jit():
        y = bj.matmul(x, packed)
    oracles.assert_same_bits(y, bj.matmul(x, packed, implementation="reference"))


@pytest.mark.parametrize("config", [bj.B158, bj.TernaryConfig(granularity=8), bj.Int8Config()])
def test_integer_products_are_kept_apart_on_gpus(config):
    """XLA's fusion of one with what makes its operands gave twice the sums on a GPU."""
    x, w = normal(3, 64), normal(64, 48)
    packed = bj.pack(w, config)
    for call in (lambda: bj.ternary_dot(x, w, config), lambda: bj.matmul(x, packed)):
        module = {p: export.export(jax.jit(call), platforms=[p])().mlir_module() for p in PLATFORMS}
        apart = r"optimization_barrier[^\n]*xi8>"
        assert re.search(apart, module["cuda"])
        assert not re.search(apart, module["cpu"])
