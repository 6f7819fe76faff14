"""Products from a slice of a stack that is not cut out: the bits of the slice's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitnet_jax as bj
from bitnet_jax import _native as native
from bitnet_jax._packed.slice_of import SliceOf, cut

CONFIGS = {
    "one scale": bj.B158,
    "channels": bj.PHASE4,
    "groups": bj.TernaryConfig(granularity=16),
    "int8": bj.Int8Config(),
}
DEPTH = 3

pytestmark = pytest.mark.skipif(native.load().reason is not None, reason="no native library")


def stack_of(config):
    w = jax.random.normal(jax.random.key(0), (DEPTH, 48, 40))
    return bj.prepare(bj.pack(w, config, batch_axes=0), "cpu")


def slice_at(stack, at):
    """As a scan over layers has it: codes by the stack, the scale cut out."""
    return dataclasses.replace(
        stack, codes=SliceOf(stack.codes, jnp.int32(at)), scale=stack.scale[at]
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_bits_are_those_of_the_slice(name, dtype):
    stack = stack_of(CONFIGS[name])
    x = jax.random.normal(jax.random.key(1), (2, 5, 48), dtype)
    for at in range(DEPTH):
        whole = jax.tree.map(lambda a, at=at: a[at], stack)
        multiply = functools.partial(bj.matmul, dtype=dtype)
        wanted = multiply(x, whole)
        for run in (multiply, jax.jit(multiply)):
            np.testing.assert_array_equal(run(x, slice_at(stack, at)), wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_jax_transforms_it(name):
    stack = stack_of(CONFIGS[name])
    x = jax.random.normal(jax.random.key(1), (4, 2, 48))
    wanted = jnp.stack([bj.matmul(x[0], jax.tree.map(lambda a, i=i: a[i], stack)) for i in (2, 0)])

    def scanned(x):
        def step(x, at):
            return x, bj.matmul(x, slice_at(stack, at))

        return jax.lax.scan(step, x, jnp.array([2, 0]))[1]

    np.testing.assert_array_equal(jax.jit(scanned)(x[0]), wanted)
    mapped = jax.vmap(lambda x: bj.matmul(x, slice_at(stack, 1)))(x)
    own = jax.tree.map(lambda a: a[1], stack)
    np.testing.assert_array_equal(mapped, bj.matmul(x, own))
    several = jax.vmap(lambda at: bj.matmul(x[0], slice_at(stack, at)))(jnp.array([2, 0]))
    np.testing.assert_array_equal(several, wanted)
    grads = [jax.grad(lambda x, k=k: bj.matmul(x, k).sum())(x) for k in (slice_at(stack, 1), own)]
    np.testing.assert_array_equal(*grads)


def test_other_platforms_cut_it_out():
    stack = stack_of(bj.B158)
    x = jax.random.normal(jax.random.key(1), (2, 48))
    lowered = jax.jit(lambda x: bj.matmul(x, slice_at(stack, 1))).trace(x)
    text = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "bitnet_multiply" not in text
    assert "dynamic_slice" in text


def test_a_slice_has_the_shape_of_its_array():
    stack = jnp.arange(24, dtype=jnp.uint8).reshape(2, 3, 4)
    one = SliceOf(stack, jnp.int32(1))
    assert (one.shape, one.ndim, one.size, one.dtype) == ((3, 4), 2, 12, jnp.uint8)
    np.testing.assert_array_equal(cut(one), stack[1])
    assert cut(stack) is stack
