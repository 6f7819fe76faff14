"""BitDense inside scan, vmap, shared and boxed modules, and on a mesh."""

import chex
import flax
import jax
import numpy as np
import pytest
from cases import cases
from draws import params_of
from flax import linen as nn
from linen_layers import K, N, Net, inputs
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
    params = params_of(Stack(), x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(Stack().apply)({"params": params}, x)
    for form in (params, packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(Stack().apply)({"params": form}, x), wanted)
    grads = jax.jit(jax.grad(lambda p: Stack().apply({"params": p}, x).sum()))(params)
    assert bj.analysis.gradient_flow(grads).ok


def test_vmap_of_a_module():
    experts = nn.vmap(BitDense, variable_axes={"params": 0}, split_rngs={"params": True})(N)
    x = inputs(3, 4, K)
    params = params_of(experts, x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(experts.apply)({"params": params}, x)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(experts.apply)({"params": form}, x), wanted)


class Shared(nn.Module):
    def setup(self):
        self.layer = BitDense(K)

    def __call__(self, x):
        return self.layer(nn.relu(self.layer(x)))


def test_sharing_bind_frozen_dict_and_boxes():
    x = inputs(4, K)
    params = params_of(Shared(), x)
    assert list(params) == ["layer"]
    packed, _ = bj.pack_params(params)
    apply = jax.jit(Shared().apply)
    wanted = apply({"params": params}, x)
    assert_same_bits(apply({"params": packed}, x), wanted)
    assert_same_bits(jax.jit(lambda p, x: Shared().bind({"params": p})(x))(packed, x), wanted)
    assert_same_bits(apply({"params": flax.core.freeze(packed)}, x), wanted)
    boxed = BitDense(N, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    params = params_of(boxed, x)
    assert isinstance(params["kernel"], nn.Partitioned)
    packed, _ = bj.pack_params(params)
    wanted = jax.jit(boxed.apply)({"params": params}, x)
    assert_same_bits(jax.jit(boxed.apply)({"params": packed}, x), wanted)


class Loop(nn.Module):
    """The layers of ``Stack`` one by one."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Block(name=f"block_{i}")(x, None)
        return x


@pytest.mark.full
def test_a_scan_is_the_loop_over_its_slices():
    x = inputs(4, K)
    params = params_of(Stack(), x)
    packed, _ = bj.pack_params(params, axes=leading)
    wanted = jax.jit(Stack().apply)({"params": params}, x)
    for form in (params, packed):
        # is_leaf stays out: a slice of a packed leaf is a packed leaf.
        slices = {
            f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], form["blocks"]) for i in range(3)
        }
        assert_same_bits(jax.jit(Loop().apply)({"params": slices}, x), wanted)


@pytest.mark.full
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
    params = params_of(Boxes(), x)
    box = params["blocks"]["BitDense_0"]["kernel"]
    assert box.names == ("layers", "in", "out")
    packed, _ = bj.pack_params(params, axes=leading)
    assert packed["blocks"]["BitDense_0"]["kernel"].names == box.names
    wanted = jax.jit(Boxes().apply)({"params": params}, x)
    for form in (packed, bj.prepare(packed)):
        assert_same_bits(jax.jit(Boxes().apply)({"params": form}, x), wanted)


def test_module_tools_see_packed_kernels():
    x = inputs(2, K)
    packed, _ = bj.pack_params(params_of(Net(), x))

    def applied(**how):
        return jax.jit(lambda p, x: Net().apply({"params": p}, x, **how))(packed, x)

    wanted = applied()
    y, state = applied(capture_intermediates=True, mutable=["intermediates"])
    assert_same_bits(y, wanted)
    assert_same_bits(state["intermediates"]["__call__"][0], wanted)
    y, state = applied(mutable=["params"])
    chex.assert_trees_all_equal(state["params"], packed)
    first = BitDense(16).bind({"params": packed["BitDense_0"]})
    assert isinstance(first.variables["params"]["kernel"], bj.PackedTernary)
    assert_same_bits(nn.jit(Net)().apply({"params": packed}, x), wanted)


@cases(
    ("names", "jit"),
    [(names, jit) for names in (("model", None), (None, "model")) for jit in (True, False)],
    core=[(("model", None), True)],
)
def test_partitioned_kernels_run_on_a_mesh_in_jit_and_eager(names, jit):
    """The float kernel runs in all of these."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x, plain = inputs(4, 16), BitDense(8)
    start = nn.with_partitioning(nn.linear.default_kernel_init, names)
    layer = BitDense(8, kernel_init=start)
    with jax.set_mesh(mesh):
        whole = params_of(layer, x)
        params = jax.device_put(whole, nn.get_sharding(whole, mesh))
        assert not params["kernel"].value.sharding.is_fully_replicated
        packed, _ = bj.pack_params(params)
        forms = (params, packed, bj.prepare(packed))
        run = jax.jit(layer.apply) if jit else layer.apply
        outputs = [np.asarray(run({"params": form}, x)) for form in forms]
    wanted = jax.jit(plain.apply)({"params": nn.unbox(whole)}, x)
    for y in outputs:
        assert_same_bits(y, wanted)
