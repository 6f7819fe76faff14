"""What the tests of meshes share. conftest.py gives every test eight CPU devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding

import bitnet_jax as bj

GROUPS = bj.TernaryConfig(granularity=8)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}

both_kinds = pytest.mark.parametrize("kind", KINDS)
explicit_in_core = cases("kind", list(KINDS), core=["explicit"])


@functools.cache
def mesh_of(kind, shape=(2, 4), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))


def put(mesh, value, spec):
    return jax.device_put(value, NamedSharding(mesh, spec))


def gaussian(seed, *shape):
    return normal(*shape, seed=seed)


def compiled(function, *operands, **how):
    return jax.jit(function, **how).lower(*operands).compile()


class Net(nn.Module):
    """Three layers; their kernels are annotated for FSDP over ``data``, or for ``model``."""

    specs: tuple = ((None, None),) * 3
    norm: bool = False
    config: object = bj.B158

    @nn.compact
    def __call__(self, x):
        for i, (features, spec) in enumerate(zip((64, 48, 16), self.specs, strict=True)):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), spec)
            layer = bj.linen.BitDense(
                features, kernel_init=init, norm=self.norm, weights=self.config, name=f"layer_{i}"
            )
            x = layer(x)
            x = nn.relu(x) if i < 2 else x
        return x


WAYS = {
    "data": ((None, None),) * 3,
    "fsdp": (("data", None),) * 3,
    "fsdp, outputs": ((None, "data"),) * 3,
    "tensor": ((None, "model"), ("model", None), (None, "model")),
    "fsdp and tensor": (("data", "model"), ("model", "data"), ("data", "model")),
}


def net_and_params(way, **fields):
    net = Net(WAYS[way], **fields)
    boxed = params_of(net, jnp.ones((1, 32)))
    return net, boxed


def sharded_params(mesh, boxed):
    specs = bj.sharding.partition_specs(boxed, mesh=mesh)
    return jax.device_put(boxed, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
