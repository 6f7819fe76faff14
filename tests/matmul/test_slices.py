"""Products from a slice of a stack that is not cut out: the bits of the slice's own."""

import dataclasses
import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend import core

import bitnet_jax as bj
from bitnet_jax import _native as native
from bitnet_jax._matmul import embedding_rows
from bitnet_jax._packed.slice_of import SliceOf, cut
from bitnet_jax._transform.jaxprs import scan_parts

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


# The public door: an index of a stack ------------------------------------------------------


def by_index(x, stack, count=DEPTH):
    """Layers under a scan, by their index."""

    def step(h, i):
        return bj.matmul(h, stack[i]), None

    return jax.lax.scan(step, x, jnp.arange(count))[0]


def copies(program, *operands):
    """Results of a compiled program's slices that hold codes."""
    text = program.lower(*operands).compile().as_text()
    return [line for line in text.splitlines() if re.search(r"= [us]8\[.*slice", line)]


@pytest.fixture(params=CONFIGS)
def square(request):
    w = jax.random.normal(jax.random.key(0), (DEPTH, 48, 48))
    return bj.prepare(bj.pack(w, CONFIGS[request.param], batch_axes=0), "cpu")


def test_a_scan_by_index_reads_the_stack_in_place(square):
    x = jax.random.normal(jax.random.key(1), (2, 48))
    wanted = functools.reduce(bj.matmul, list(square), x)
    run = jax.jit(by_index)
    np.testing.assert_array_equal(run(x, square), wanted)
    assert not copies(run, x, square)
    sliced = jax.jit(lambda x, s: jax.lax.scan(lambda h, k: (bj.matmul(h, k), None), x, s)[0])
    np.testing.assert_array_equal(sliced(x, square), wanted)
    assert copies(sliced, x, square)  # what the index is for: once it fails, it is not needed


def test_a_static_index_under_jit_reads_in_place(square):
    x = jax.random.normal(jax.random.key(1), (2, 48))
    run = jax.jit(lambda x, s: bj.matmul(x, s[-1]))
    np.testing.assert_array_equal(run(x, square), bj.matmul(x, square[2]))
    assert not copies(run, x, square)


def test_gradients_by_index_are_those_of_slices(square):
    x = jax.random.normal(jax.random.key(1), (2, 48))
    one_by_one = jax.grad(lambda x: functools.reduce(bj.matmul, list(square), x).sum())(x)
    for wrap in (lambda f: f, jax.checkpoint):
        loss = wrap(lambda x, s: by_index(x, s).sum())
        program = jax.jit(jax.grad(loss))
        np.testing.assert_array_equal(program(x, square), one_by_one)
        kept = jax.make_jaxpr(program)(x, square)
        stacks = f"{DEPTH},{DEPTH},{square.codes.shape[1]}]"
        assert stacks not in str(kept)  # the stack is no residual of each step


def test_two_batch_axes(square):
    two = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), square)
    x = jax.random.normal(jax.random.key(1), (2, 48))
    wanted = bj.matmul(x, square[0])
    for at in (lambda s, i: s[i, 2], lambda s, i: s[i][2], lambda s, i: s[i - 2, -1]):
        np.testing.assert_array_equal(bj.matmul(x, at(two, 1)), wanted)
        run = jax.jit(lambda x, s, i, at=at: bj.matmul(x, at(s, i)))
        np.testing.assert_array_equal(run(x, two, 1), wanted)
    experts = jax.jit(lambda x, s, i: bj.matmul(x, s[i]))
    x = jax.random.normal(jax.random.key(2), (DEPTH, 2, 48))
    np.testing.assert_array_equal(experts(x, two, 0), bj.matmul(x, square))


def test_vmap_over_rows_and_over_the_index(square):
    x = jax.random.normal(jax.random.key(1), (4, 2, 48))
    wanted = jnp.stack([functools.reduce(bj.matmul, list(square), row) for row in x])
    np.testing.assert_array_equal(jax.vmap(by_index, (0, None))(x, square), wanted)
    several = jax.jit(jax.vmap(lambda i: bj.matmul(x[0], square[i])))(jnp.array([2, 0]))
    wanted = jnp.stack([bj.matmul(x[0], square[i]) for i in (2, 0)])
    np.testing.assert_array_equal(several, wanted)


def test_an_exported_scan_by_index_is_plain(square):
    x = jax.random.normal(jax.random.key(1), (2, 48))
    exported = jax.export.export(jax.jit(by_index), platforms=("cpu", "cuda", "tpu"))(x, square)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x, square), by_index(x, square))


def test_a_layer_that_leaves_its_function_still_serves(square):
    """It is a pytree of its stack and its index."""
    one = jax.jit(lambda s: s[1])(square)
    x = jax.random.normal(jax.random.key(1), (2, 48))
    wanted = bj.matmul(x, square[1])
    for leaf in (one, jax.tree.map(jnp.copy, one), pickle.loads(pickle.dumps(one))):
        assert (leaf.shape, leaf.nbytes, repr(leaf)) == (
            square[1].shape,
            square[1].nbytes,
            repr(square[1]),
        )
        np.testing.assert_array_equal(bj.matmul(x, leaf), wanted)
    with pytest.raises(TypeError, match="prepared for implementation 'cpu'"):
        bj.unpack_params({"kernel": one})
    with pytest.raises(TypeError, match=r"is not an array\..*Only a stack has an index"):
        one[0]
    damaged = jax.tree.map(lambda a: a | jnp.uint8(3) if a.dtype == jnp.uint8 else a, one)
    if not isinstance(square.config, bj.Int8Config):
        with pytest.raises(ValueError, match="with a code of 3"):
            bj.matmul(x, damaged)


def test_layers_that_were_stacked_by_a_transformation_are_refused(square):
    """Their stack and their indices are arrays, and they are no kernel."""
    x = jax.random.normal(jax.random.key(1), (3, 2, 48))
    one = jax.jit(lambda s: s[1])(square)
    number = jnp.array([2, 0, 1])
    for several in (
        jax.lax.scan(lambda carry, i: (carry, square[i]), 0, number)[1],
        jax.vmap(lambda i: square[i])(number),
        jax.vmap(lambda i: square[i])(number[:2]),
        jax.tree.map(lambda *a: jnp.stack(a), one, one, one),
    ):
        rule = r"has indices of shape \(\d,\).*jax.tree.map\(lambda a: a\[i\], stack\)"
        with pytest.raises(ValueError, match="^matmul: `packed` " + rule):
            bj.matmul(x, several)
        with pytest.raises(ValueError, match="the stack " + rule):
            several[0]
    in_place = jax.vmap(lambda i: jax.tree.map(lambda a: a[i], square))(number)
    np.testing.assert_array_equal(bj.matmul(x, in_place)[0], bj.matmul(x[0], square[2]))


def test_an_embedding_and_weight_only_by_index():
    tables = bj.pack(
        jax.random.normal(jax.random.key(0), (DEPTH, 70, 9)),
        bj.Int8Config(),
        contracting_axes=-1,
        batch_axes=0,
    )
    fast = bj.prepare(tables, "cpu")
    rows = jax.jit(lambda s, i: embedding_rows(s[i], jnp.array([3, 69])))
    np.testing.assert_array_equal(rows(fast, 1), tables[1].rows(jnp.array([3, 69])))
    x = jax.random.normal(jax.random.key(1), (2, 9))
    floats = jax.jit(lambda x, s, i: bj.matmul(x, s[i], activations=None))
    wanted = floats(x, tables, 2)  # a float product, whose sums XLA orders
    np.testing.assert_allclose(floats(x, fast, 2), wanted, rtol=1e-5, atol=1e-5)


def test_layers_take_a_kernel_by_index(square):
    x = jax.random.normal(jax.random.key(1), (2, 48))
    wanted = bj.matmul(x, square[1])
    dense = bj.linen.BitDense(48, use_bias=False, weights=square.config)
    run = jax.jit(lambda x, s, i: dense.apply({"params": {"kernel": s[i]}}, x))
    np.testing.assert_array_equal(run(x, square, 1), wanted)
    assert not copies(run, x, square, 1)
    linear = bj.nnx.BitLinear(48, 48, use_bias=False, weights=square.config, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(linear)

    @jax.jit
    def merged(x, state, i):
        own = jax.tree.map(lambda leaf: leaf[i], state, is_leaf=bj.is_packed)
        return nnx.merge(graph, own)(x)

    linear.kernel.set_value(square)
    state = nnx.split(linear)[1]
    np.testing.assert_array_equal(merged(x, state, 1), wanted)
    assert not copies(merged, x, state, 1)


@pytest.mark.parametrize("remat", [False, True])
def test_scans_of_ternarised_models_read_in_place(remat):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return nn.relu(nn.Dense(48)(h)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block) if remat else Block
            scan = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
            )
            return scan()(x, None)[0]

    x = jax.random.normal(jax.random.key(1), (2, 48))
    model = bj.linen.ternarize(Model())
    params = model.init(jax.random.key(2), x)["params"]
    fast = bj.prepare(bj.linen.pack(model, params, x)[0], "cpu")
    run = jax.jit(lambda x, p: model.apply({"params": p}, x))
    np.testing.assert_array_equal(run(x, fast), run(x, params))
    assert not copies(run, x, fast)


def test_a_function_that_indexes_its_kernels_is_ternarised():
    w = jax.random.normal(jax.random.key(0), (DEPTH, 48, 48))
    x = jax.random.normal(jax.random.key(1), (2, 48))
    scan = bj.ternarize(
        lambda p, x: jax.lax.scan(lambda h, i: (h @ p["w"][i], None), x, jnp.arange(DEPTH))[0]
    )
    fast = bj.prepare(scan.pack({"w": w}, x)[0], "cpu")
    run = jax.jit(scan)
    np.testing.assert_array_equal(run(fast, x), scan({"w": w}, x))
    assert not copies(run, fast, x)


@pytest.mark.parametrize("kind", ["stored", "prepared"])
def test_adapters_of_scanned_layers_are_trained_step_by_step(kind):
    """Their gradient is no stack at every step, and no step keeps a copy of its codes."""
    w = jax.random.normal(jax.random.key(0), (DEPTH, 48, 48))
    x = jax.random.normal(jax.random.key(1), (2, 48))
    scan = bj.ternarize(lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0])
    packed = scan.pack({"w": w}, x)[0]
    adapters = bj.lora.init(packed, 2, key=jax.random.key(2))
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)
    packed = packed if kind == "stored" else bj.prepare(packed, "cpu")

    def loss(adapters, packed):
        return (scan(bj.lora.attach(packed, adapters), x) ** 2).sum()

    def one_by_one(adapters, packed):
        h, kernel = x, bj.lora.attach(packed, adapters)["w"]
        for i in range(DEPTH):
            one = bj.ternarize(lambda p, h: h @ p["w"])
            h = one({"w": jax.tree.map(lambda a, i=i: a[i], kernel)}, h)
        return (h**2).sum()

    step = jax.jit(jax.grad(loss))
    wanted = jax.grad(one_by_one)(adapters, packed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        step(adapters, packed),
        wanted,
    )
    program = jax.make_jaxpr(jax.grad(loss))(adapters, packed).jaxpr
    scans = [eqn for eqn in equations(program) if eqn.primitive.name == "scan"]
    assert len(scans) >= 2
    results = [v.aval for eqn in scans for v in eqn.outvars]
    assert not [a for a in results if a.dtype == jnp.uint8]
    assert not [a for a in results if a.shape[:2] == (DEPTH, DEPTH)]
    # Nor is a stack of adapters summed up, step by step.
    carried = [v.aval for eqn in scans for v in eqn.outvars[: scan_parts(eqn.params)[1]]]
    assert not [a for a in carried if a.shape[:1] == (DEPTH,)]


def equations(jaxpr):
    """Of a program and of the programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(getattr(inner, "jaxpr", inner))
