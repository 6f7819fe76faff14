"""BitDense inside scan, vmap, shared and boxed modules, and on a mesh."""

import os
import subprocess
import sys

import chex
import flax
import jax
from flax import linen as nn
from linen_layers import K, N, Net, init, inputs
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax.linen import BitDense


class Stack(nn.Module):
    """Three layers under nn.scan, rematerialised."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + BitDense(K)(nn.relu(x)), None


def leading(path, leaf):
    return {"contracting_axes": 1, "batch_axes": 0}


def test_scan_and_remat():
    x = inputs(4, K)
    params = init(Stack(), x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(Stack().apply)({"params": params}, x)
    for form in (params, packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(Stack().apply)({"params": form}, x), wanted)
    grads = jax.grad(lambda p: Stack().apply({"params": p}, x).sum())(params)
    assert bj.analysis.gradient_flow(grads).ok


def test_vmap_of_a_module():
    experts = nn.vmap(BitDense, variable_axes={"params": 0}, split_rngs={"params": True})(N)
    x = inputs(3, 4, K)
    params = init(experts, x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = experts.apply({"params": params}, x)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(experts.apply({"params": form}, x), wanted)


class Shared(nn.Module):
    def setup(self):
        self.layer = BitDense(K)

    def __call__(self, x):
        return self.layer(nn.relu(self.layer(x)))


def test_sharing_bind_frozen_dict_and_boxes():
    x = inputs(4, K)
    params = init(Shared(), x)
    assert list(params) == ["layer"]
    packed, _ = bj.pack_params(params)
    wanted = Shared().apply({"params": params}, x)
    assert_same_bits(Shared().apply({"params": packed}, x), wanted)
    assert_same_bits(Shared().bind({"params": packed})(x), wanted)
    assert_same_bits(Shared().apply({"params": flax.core.freeze(packed)}, x), wanted)
    boxed = BitDense(N, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    params = init(boxed, x)
    assert isinstance(params["kernel"], nn.Partitioned)
    packed, _ = bj.pack_params(params)
    wanted = boxed.apply({"params": params}, x)
    assert_same_bits(boxed.apply({"params": packed}, x), wanted)


class Loop(nn.Module):
    """The layers of ``Stack`` one by one."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Block(name=f"block_{i}")(x, None)
        return x


def test_a_scan_is_the_loop_over_its_slices():
    x = inputs(4, K)
    params = init(Stack(), x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(Stack().apply)({"params": params}, x)
    for form in (params, packed):
        # is_leaf stays out: a slice of a packed leaf is a packed leaf.
        slices = {
            f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], form["blocks"]) for i in range(3)
        }
        assert_same_bits(jax.jit(Loop().apply)({"params": slices}, x), wanted)


def test_boxes_of_a_scan_are_opened():
    """nn.scan adds an axis name to each box, around packed and prepared kernels too."""

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            start = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return x + BitDense(K, kernel_init=start)(x), None

    class Boxes(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Boxed,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return layers(name="blocks")(x, None)[0]

    x = inputs(4, K)
    params = init(Boxes(), x)
    box = params["blocks"]["BitDense_0"]["kernel"]
    assert box.names == ("layers", "in", "out")
    packed, _ = bj.pack_params(params, axes=leading)
    assert packed["blocks"]["BitDense_0"]["kernel"].names == box.names
    wanted = jax.jit(Boxes().apply)({"params": params}, x)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(Boxes().apply)({"params": form}, x), wanted)


def test_module_tools_see_packed_kernels():
    x = inputs(2, K)
    params = jax.jit(Net().init)(jax.random.key(1), x)["params"]
    packed, _ = bj.pack_params(params)
    wanted = Net().apply({"params": packed}, x)
    y, state = Net().apply(
        {"params": packed}, x, capture_intermediates=True, mutable=["intermediates"]
    )
    assert_same_bits(y, wanted)
    assert_same_bits(state["intermediates"]["__call__"][0], wanted)
    y, state = Net().apply({"params": packed}, x, mutable=["params"])
    chex.assert_trees_all_equal(state["params"], packed)
    first = BitDense(16).bind({"params": packed["BitDense_0"]})
    assert isinstance(first.variables["params"]["kernel"], bj.PackedTernary)
    assert_same_bits(
        nn.jit(Net)().apply({"params": packed}, x), jax.jit(Net().apply)({"params": packed}, x)
    )


SHARDED_BOXES = """
import jax, jax.numpy as jnp, numpy as np, bitnet_jax as bj
from flax import linen as nn
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)
plain = bj.linen.BitDense(8)
wanted = np.asarray(plain.apply(plain.init(jax.random.key(0), x), x))
for names in (("model", None), (None, "model")):
    start = nn.with_partitioning(nn.linear.default_kernel_init, names)
    layer = bj.linen.BitDense(8, kernel_init=start)
    with jax.set_mesh(mesh):
        params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
        params = jax.device_put(params, nn.get_sharding(params, mesh))
        assert not params["kernel"].value.sharding.is_fully_replicated
        packed, _ = bj.pack_params(params)
        for form in (params, packed, bj.prepare(packed)):
            for apply in (jax.jit(layer.apply), layer.apply):
                try:
                    np.testing.assert_array_equal(apply({"params": form}, x), wanted)
                except Exception as error:
                    raise AssertionError((names, type(form["kernel"].value), apply)) from error
"""


def test_partitioned_kernels_run_on_a_mesh_in_jit_and_eager():
    """Two devices need a process of their own; the float kernel runs in all of these."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED_BOXES],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
