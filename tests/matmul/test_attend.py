"""Attention over a cache: both forms against float64, and how JAX transforms them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax._matmul import attend
from bitnet_jax._packed.slice_of import SliceOf

# batch, length, heads, heads of keys, dim, slots
SHAPES = [
    (1, 1, 20, 5, 128, 64),
    (2, 3, 4, 2, 12, 40),
    (1, 7, 6, 1, 72, 33),
    (2, 5, 3, 3, 80, 17),
    (1, 2, 14, 2, 64, 16),
    (3, 1, 2, 2, 2, 1),
]


def draw(shape, dtype="float32"):
    batch, length, heads, groups, dim, slots = shape
    rng = np.random.default_rng(sum(shape))
    q = jnp.asarray(rng.normal(size=(batch, length, heads, dim)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(batch, slots, groups, dim)), dtype) for _ in range(2))
    mask = rng.random((batch, length, slots)) < 0.6
    mask[..., slots // 2] = True
    return q, k, v, jnp.asarray(mask)


def truth(q, k, v, mask):
    """By the equation, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    share = q.shape[2] // k.shape[2]
    y = np.zeros(q.shape)
    for b, r, h in np.ndindex(q.shape[:3]):
        keys, values = k[b, :, h // share], v[b, :, h // share]
        scores = np.where(mask[b, r], keys @ q[b, r, h] / np.sqrt(q.shape[3]), -np.inf)
        weights = np.exp(scores - scores.max())
        y[b, r, h] = weights @ values / weights.sum()
    return y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_are_the_equation(shape, dtype):
    q, k, v, mask = draw(shape, dtype)
    wanted = truth(q, k, v, mask)
    for form in (attend.attend, attend.plain):
        np.testing.assert_allclose(form(q, k, v, mask), wanted, atol=3e-6)


@pytest.mark.parametrize("largest", [1e-30, 60.0, 3e4])
def test_large_and_small_scores(largest):
    q, k, v, mask = draw(SHAPES[1])
    q = q * jnp.float32(largest)
    np.testing.assert_allclose(attend.attend(q, k, v, mask), truth(q, k, v, mask), atol=1e-5)


def test_a_row_that_sees_nothing_is_finite():
    q, k, v, mask = draw(SHAPES[1])
    y = attend.attend(q, k, v, mask.at[0, 1].set(False))
    assert bool(jnp.isfinite(y).all())
    np.testing.assert_array_equal(y[1], attend.attend(q, k, v, mask)[1])


def test_hidden_slots_are_not_read():
    q, k, v, mask = draw(SHAPES[1])
    mask = mask.at[:, :, 30:].set(False)
    dirty = (a.at[:, 30:].set(jnp.nan) for a in (k, v))
    np.testing.assert_array_equal(attend.attend(q, *dirty, mask), attend.attend(q, k, v, mask))


def test_a_slice_of_a_stack_is_read_where_it_lies():
    q, k, v, mask = draw(SHAPES[1])
    at = jnp.int32(1)
    stacks = (SliceOf(jnp.stack([a - 1, a, a + 1]), at) for a in (k, v))
    np.testing.assert_array_equal(
        jax.jit(attend.attend)(q, *stacks, mask), attend.attend(q, k, v, mask)
    )


def test_jit_vmap_and_grad():
    q, k, v, mask = draw(SHAPES[1])
    y = attend.attend(q, k, v, mask)
    np.testing.assert_array_equal(jax.jit(attend.attend)(q, k, v, mask), y)
    many = (jnp.stack([a, a[::-1]]) for a in (q, k, v, mask))
    np.testing.assert_allclose(jax.vmap(attend.attend)(*many)[0], y, atol=3e-6)
    grads = [
        jax.grad(lambda *a, form=form: form(*a, mask).sum(), (0, 1, 2))(q, k, v)
        for form in (attend.attend, attend.plain)
    ]
    jax.tree.map(np.testing.assert_array_equal, *grads)


@pytest.mark.parametrize("length", [1, 5])
def test_many_slots_in_parts(length):
    """A few tokens are cut along the slots, of which some parts are hidden; more are not."""
    q, k, v, mask = draw((2, length, 6, 2, 24, 700))
    mask = mask.at[0, :, :300].set(False).at[1, :, 450:].set(False).at[1, :, 128:256].set(False)
    got = attend.attend(q, k, v, mask)
    np.testing.assert_allclose(got, truth(q, k, v, mask), atol=3e-6)
    np.testing.assert_array_equal(attend.attend(q, k, v, mask), got)
