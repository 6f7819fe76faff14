"""PackedTernary and PreparedTernary: a pytree node's laws, and no gradient."""

import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases

import bitnet_jax as bj
from bitnet_jax._matmul import xla
from bitnet_jax._packed import trits
from bitnet_jax._packed.prepared import PreparedTernary

INT8 = bj.ActivationConfig()
KERNELS = {
    "dense": ((24, 10), bj.B158, {}),
    "odd": ((7, 3), bj.PHASE4, {}),
    "groups": ((24, 10), bj.TernaryConfig(granularity=4), {}),
    "transposed": ((6, 8), bj.TWN, {"contracting_axes": 1}),
    "attention-out": ((3, 4, 5), bj.PHASE4, {"contracting_axes": (0, 1)}),
    "attention-in": ((8, 3, 5), bj.PHASE4, {"contracting_axes": 0}),
    "conv": ((2, 3, 5, 6), bj.B158, {"contracting_axes": (0, 1, 2)}),
    "stacked": ((3, 8, 5), bj.PHASE4, {"batch_axes": 0}),
    "stacked-attention": (
        (2, 3, 4, 5),
        bj.TernaryConfig(granularity=4),
        {"contracting_axes": (1, 2), "batch_axes": 0},
    ),
    "two-batch": ((2, 3, 8, 5), bj.TWN, {"batch_axes": (0, 1)}),
}
every_kernel = cases(
    ("shape", "config", "axes"), KERNELS, core=["odd", "groups", "stacked-attention"]
)


def gaussian(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def pack(w, config=bj.B158, **axes):
    return bj.pack(w, config, **axes)


def static(leaf):
    return jax.tree.structure(leaf)


def assert_valid(packed, shape):
    """The invariants in the docstring of PackedTernary."""
    assert packed.shape == tuple(shape)
    assert packed.codes.dtype == jnp.uint8
    assert packed.scale.dtype == jnp.float32
    assert packed.codes.ndim == packed.scale.ndim == packed.ndim == len(shape)
    assert all(a < 0 for a in packed.contracting_axes)
    assert list(packed.contracting_axes) == sorted(packed.contracting_axes)
    last = packed.contracting_axes[-1]
    assert packed.codes.shape[last] == -(-packed.length // 4)
    codes = np.asarray(packed.codes)
    assert not trits.count_invalid(codes.reshape(-1), 0, codes.shape, last, packed.length)
    for have, want in zip(packed.scale.shape, shape, strict=True):
        assert want % have == 0
    assert (np.asarray(packed.scale) > 0).all()
    assert packed.size == np.prod(shape)
    assert packed.nbytes == packed.codes.size + 4 * packed.scale.size


@every_kernel
def test_invariants_and_bytes(shape, config, axes):
    w = gaussian(shape)
    packed = pack(w, config, **axes)
    assert_valid(packed, shape)
    exact = oracles.quantize32(w, config, axes.get("contracting_axes"), axes.get("batch_axes", ()))
    oracles.assert_same_bits(
        packed.codes, oracles.pack_bytes(exact.codes, packed.contracting_axes[-1])
    )
    oracles.assert_same_bits(packed.int8_codes(), exact.codes)
    oracles.assert_same_bits(packed.dequantize(), exact.codes * exact.scale)
    assert (packed.config, packed.dtype) == (config, np.float32)


@cases("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], core=[ml_dtypes.bfloat16])
def test_unpack_returns_the_kernels_own_dtype_or_the_one_asked_for(dtype):
    w = gaussian((24, 10), dtype=dtype)
    packed = pack(w)
    exact = oracles.quantize32(w, bj.B158)
    hat = exact.codes * exact.scale
    assert packed.dtype == dtype
    oracles.assert_same_bits(packed.dequantize(), hat.astype(dtype))
    oracles.assert_same_bits(packed.dequantize(jnp.float32), hat)
    oracles.assert_same_bits(packed.dequantize(np.dtype(np.float16)), hat.astype(np.float16))


@every_kernel
def test_flattening_and_back(shape, config, axes):
    packed = pack(gaussian(shape), config, **axes)
    leaves, treedef = jax.tree.flatten(packed)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint8, jnp.float32]
    assert_valid(jax.tree.unflatten(treedef, leaves), shape)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(packed)[0]]
    assert paths == [".codes", ".scale"]
    same = jax.tree.map(lambda a: a, packed)
    assert static(same) == static(packed)
    assert hash(static(same)) == hash(static(packed))
    out = jax.jit(lambda p: p)(packed)
    assert_valid(out, shape)
    jax.tree.map(oracles.assert_same_bits, out, packed)
    abstract = jax.eval_shape(lambda w: bj.pack(w, config, **axes), gaussian(shape))
    assert static(abstract) == static(packed)
    assert (abstract.shape, abstract.axes) == (packed.shape, packed.axes)


def test_static_data_tells_kernels_apart():
    packed = pack(gaussian((8, 4)))
    for other in (
        pack(gaussian((7, 4))),
        pack(gaussian((8, 4)), bj.TWN),
        pack(gaussian((8, 4)), contracting_axes=1),
        pack(gaussian((8, 4), dtype=ml_dtypes.bfloat16)),
        bj.prepare(packed, "xla"),
    ):
        assert static(other) != static(packed)
    # and says nothing about batch axes or outputs
    assert static(pack(gaussian((3, 8, 9)), batch_axes=0)) == static(packed)


@cases(
    "config",
    {"tensor": bj.B158, "channel": bj.PHASE4, "groups": bj.TernaryConfig(granularity=4)},
    core=["groups"],
)
def test_slices_of_a_stack_are_leaves_and_stacking_them_restores_it(config):
    w = gaussian((3, 8, 5))
    stacked = pack(w, config, batch_axes=0)
    alone = [pack(w[i], config) for i in range(3)]
    for i, one in enumerate(alone):
        piece = jax.tree.map(lambda a, i=i: a[i], stacked)
        assert_valid(piece, (8, 5))
        assert static(piece) == static(one)
        jax.tree.map(oracles.assert_same_bits, piece, one)
    again = jax.tree.map(lambda *parts: jnp.stack(parts), *alone)
    assert_valid(again, (3, 8, 5))
    jax.tree.map(oracles.assert_same_bits, again, stacked)
    by_vmap = jax.vmap(functools.partial(bj.pack, config=config))(w)
    assert_valid(by_vmap, (3, 8, 5))
    jax.tree.map(oracles.assert_same_bits, by_vmap, stacked)
    assert static(by_vmap) == static(stacked)


@pytest.mark.parametrize("prepare", [False, True], ids=["stored", "prepared"])
@cases(
    "config", {"channel": bj.PHASE4, "groups": bj.TernaryConfig(granularity=4)}, core=["channel"]
)
def test_scan_and_vmap_over_stacked_layers(config, prepare):
    x, w = gaussian((5, 8)), gaussian((3, 8, 8), 1)
    stacked = pack(w, config, batch_axes=0)
    if prepare:
        stacked = bj.prepare(stacked, "xla")
        assert (stacked.batch, stacked.shape, stacked.ndim) == ((3,), (3, 8, 8), 3)

    @jax.jit
    def run(x, stacked):
        scanned, each = jax.lax.scan(lambda h, k: (bj.matmul(h, k),) * 2, x, stacked)
        mapped = jax.vmap(bj.matmul, (None, 0))(x, stacked)
        return scanned, each, mapped

    scanned, each, mapped = run(x, stacked)
    h = x
    for i in range(3):
        h = oracles.dot32(h, w[i], config, INT8)
        oracles.assert_same_bits(each[i], h)
        oracles.assert_same_bits(mapped[i], oracles.dot32(x, w[i], config, INT8))
    oracles.assert_same_bits(scanned, h)


@every_kernel
def test_copies_and_pickles(shape, config, axes):
    packed = pack(gaussian(shape), config, **axes)
    for leaf in (packed, bj.prepare(packed, "xla")):
        for other in (copy.copy(leaf), copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
            assert type(other) is type(leaf)
            assert static(other) == static(leaf)
            jax.tree.map(oracles.assert_same_bits, other, leaf)
            assert (other.shape, other.nbytes) == (leaf.shape, leaf.nbytes)


def test_a_copy_does_not_hold_its_arrays_twice():
    """What flattening keeps for the next call is of one node alone."""
    packed = pack(gaussian((24, 10)))
    size = len(pickle.dumps(packed))
    jax.tree.leaves(packed)
    assert len(pickle.dumps(packed)) <= size + 200  # static data, which is kept as well
    other = dataclasses.replace(copy.copy(packed), codes=packed.codes + 0)
    assert jax.tree.leaves(other)[0] is other.codes
    assert jax.tree.leaves(copy.deepcopy(packed))[0] is not packed.codes


def test_a_leaf_is_frozen():
    packed = pack(gaussian((8, 4)))
    with pytest.raises(AttributeError):
        packed.length = 9
    with pytest.raises(AttributeError):
        bj.prepare(packed, "xla").outputs = (3,)


def test_repr_is_one_short_line_whatever_the_leaves():
    packed = pack(gaussian((24, 10)), bj.PHASE4)
    assert repr(packed) == "PackedTernary(shape=(24, 10), scale=(1, 10), 100 bytes)"
    prepared = bj.prepare(packed, "xla")
    assert repr(prepared) == "PreparedTernary(shape=(24, 10), for 'xla')"
    for leaf in (packed, prepared):
        seen = []
        jax.jit(lambda p, seen=seen: seen.append(repr(p)) or p.scale)(leaf)
        seen += [repr(jax.eval_shape(lambda leaf=leaf: leaf))]
        seen += [repr(jax.tree.map(lambda _, v=v: v, leaf)) for v in (None, "x", 3, object())]
        assert all(text.startswith(type(leaf).__name__ + "(") for text in seen)
        assert not any("\n" in text for text in seen)


def test_it_can_be_donated_and_put_on_a_device():
    packed = jax.device_put(pack(gaussian((24, 10))), jax.devices()[0])
    assert_valid(packed, (24, 10))
    kept = jax.tree.map(np.array, packed)  # copies, not views of buffers that go away
    flip = jax.jit(lambda p: jax.tree.map(lambda a: jnp.flip(a, -1), p), donate_argnums=0)
    flipped = flip(packed)
    assert packed.codes.is_deleted()
    jax.tree.map(lambda a, b: oracles.assert_same_bits(a, b[:, ::-1]), flipped, kept)


@every_kernel
def test_prepared_kernels_keep_the_codes_and_the_scale(shape, config, axes):
    packed = pack(gaussian(shape), config, **axes)
    prepared = bj.prepare(packed, "xla")
    assert isinstance(prepared, PreparedTernary)
    assert prepared.codes.dtype == jnp.uint8
    batch, contraction, outputs = packed.axes.split(packed.shape)
    assert (prepared.batch, prepared.contraction, prepared.outputs) == (batch, contraction, outputs)
    assert (prepared.implementation, prepared.config) == ("xla", config)
    order = packed.axes.order
    want = np.asarray(packed.int8_codes()).transpose(order)
    got = np.asarray(xla.codes_of(prepared))
    np.testing.assert_array_equal(got.ravel(), want.ravel())


# An index of a stack ----------------------------------------------------------------------

STACKS = {
    "stored": lambda: pack(gaussian((3, 8, 5)), bj.PHASE4, batch_axes=0),
    "int8": lambda: pack(gaussian((3, 8, 5)), bj.Int8Config(), batch_axes=0),
    "prepared for xla": lambda: bj.prepare(STACKS["stored"](), "xla"),
    "prepared for cpu": lambda: bj.prepare(STACKS["stored"](), "cpu"),
}
every_stack = pytest.mark.parametrize("name", STACKS)


@every_stack
def test_an_index_of_a_stack_is_its_slice(name):
    stack = STACKS[name]()
    assert len(list(stack)) == 3
    for i, kernel in enumerate(stack):
        wanted = jax.tree.map(lambda a, i=i: a[i], stack)
        same = [stack[j] for j in (i, i - 3, np.int8(i), np.array(i), jnp.uint8(i), (i,))]
        same += [stack[jnp.int32(i - 3)]]
        for leaf in (kernel, *same):
            assert (type(leaf), leaf.shape, static(leaf)) == (type(stack), (8, 5), static(wanted))
            jax.tree.map(oracles.assert_same_bits, leaf, wanted)
    with jax.disable_jit():
        jax.tree.map(oracles.assert_same_bits, stack[1], jax.tree.map(lambda a: a[1], stack))


@every_stack
def test_a_traced_index_is_held_within_the_stack(name):
    stack, x = STACKS[name](), gaussian((2, 8), 1)
    run = jax.jit(lambda i, stack: bj.matmul(x, stack[i]))
    numbers = {-9: 0, -3: 0, -1: 2, 0: 0, 2: 2, 3: 2, 100: 2}
    for i, at in numbers.items():
        oracles.assert_same_bits(run(np.int8(i), stack), bj.matmul(x, stack[at]))
    long = pack(gaussian((200, 8, 5)), batch_axes=0)  # longer than an int8 reaches
    oracles.assert_same_bits(run(np.int8(-1), long), bj.matmul(x, long[199]))
    oracles.assert_same_bits(run(np.uint8(199), long), bj.matmul(x, long[199]))


@every_stack
def test_an_index_that_is_none_is_refused(name):
    stack = STACKS[name]()
    who = rf"^{type(stack).__name__}: "
    for i in (3, -4, np.int8(7)):
        with pytest.raises(IndexError, match=who + r"index -?\d is out of range for 3 layers"):
            stack[i]
    for i in (1.0, True, None, "a", slice(0, 2), [1], jnp.arange(2), jnp.float32(1), ...):
        with pytest.raises(TypeError, match=who + r"the index of a layer must be an integer, got"):
            stack[i]
    for i in ((), (0, 1)):
        with pytest.raises(IndexError, match=who + r"the index must be an integer for each"):
            stack[i]
    no_array = who + r"a packed kernel is not an array.*Only a stack has an index: its layers\.$"
    with pytest.raises(TypeError, match=no_array):
        stack[0][0]
    abstract = jax.eval_shape(lambda: stack)
    with pytest.raises(TypeError, match=who + r"the stack is a jax\.ShapeDtypeStruct"):
        abstract[0]
    damaged = jax.tree.map(lambda a: a.astype(jnp.float32), stack)
    with pytest.raises(ValueError, match=who + r"the stack has codes that are float32"):
        damaged[0]


def test_an_index_of_adapted_layers():
    stack = pack(gaussian((3, 8, 5)), batch_axes=0)
    adapters = bj.lora.init({"kernel": stack}, 2, key=jax.random.key(0))
    adapted = bj.lora.attach({"kernel": stack}, adapters)["kernel"]
    jax.tree.map(oracles.assert_same_bits, adapted[1], jax.tree.map(lambda leaf: leaf[1], adapted))
    with pytest.raises(IndexError, match=r"index 3 is out of range"):
        adapted[3]


def test_which_leaves_are_packed():
    packed = pack(gaussian((8, 5)))
    leaves = [packed, bj.prepare(packed, "xla"), pack(gaussian((8, 5)), bj.Int8Config())]
    assert all(map(bj.is_packed, leaves))
    assert not any(map(bj.is_packed, (None, gaussian((8, 5)), bj.quantize(gaussian((8, 5))), {})))


# No gradient ------------------------------------------------------------------------------

X = gaussian((5, 24), 1)
PACKED = {
    "stored": lambda: pack(gaussian((24, 10))),
    "prepared": lambda: bj.prepare(PACKED["stored"](), "xla"),
}
REMEDY = r"^jax.grad: .*packed kernels.*no gradient.*bj.partition\(params\).*bj.unpack_params"


@pytest.fixture(params=PACKED)
def leaf(request):
    return PACKED[request.param]()


def test_grad_over_packed_kernels_names_the_remedy(leaf):
    def loss(p):
        return bj.matmul(X, p).sum()

    def nested(p):
        return loss(p["a"]["kernel"]) + p["bias"].sum()

    params = {"a": {"kernel": leaf}, "bias": jnp.ones(10)}
    for run in (
        lambda: jax.grad(loss)(leaf),
        lambda: jax.value_and_grad(loss)(leaf),
        lambda: jax.grad(nested)(params),
        lambda: jax.value_and_grad(nested)(params),
        lambda: jax.grad(lambda p, _: loss(p[0]), argnums=(0, 1))([leaf], X),
        lambda: jax.grad(lambda _, p: loss(p), argnums=1)(X, leaf),
        lambda: jax.jit(jax.grad(nested))(params),
        lambda: jax.jit(lambda p: jax.value_and_grad(nested)(p))(params),
        lambda: jax.jit(lambda p: jax.grad(lambda q: nested(q))(p))(params),
        lambda: jax.grad(nested, has_aux=False, allow_int=False)(params),
        lambda: jax.vmap(jax.grad(lambda _, p: loss(p), argnums=1), (0, None))(X, leaf),
    ):
        with pytest.raises(TypeError, match=REMEDY):
            run()


def test_grad_of_anything_else_works_around_packed_kernels(leaf):
    w_q = np.asarray(PACKED["stored"]().dequantize(jnp.float32), np.float64)
    want = np.ones((5, 10)) @ w_q.T

    def loss(x, p):
        return bj.matmul(x, p).sum()

    for gradient in (
        jax.grad(loss)(X, leaf),
        jax.grad(loss)(X, p=leaf),
        jax.jit(jax.grad(loss))(X, leaf),
        jax.grad(lambda x: loss(x, leaf))(X),
        jax.grad(jax.jit(lambda x: loss(x, leaf)))(X),
        jax.grad(jax.checkpoint(loss))(X, leaf),
        jax.vmap(jax.grad(loss), (0, None))(X, leaf),
        jax.value_and_grad(lambda x: (loss(x, leaf), leaf), has_aux=True)(X)[1],
        jax.grad(lambda t, p: loss(t["x"], p["k"]))({"x": X}, {"k": leaf})["x"],
    ):
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


def test_a_gradient_step_inside_a_step_that_holds_packed_kernels(leaf):
    # The trees below are flattened by code that grad called: none of it is refused.
    def loss(bias, p):
        p = jax.tree.map(lambda a: a, {"k": p})["k"]
        h = jax.jit(bj.matmul)(X, p)
        h = jax.lax.cond(h.sum() > 0, lambda p: bj.matmul(X, p), lambda p: -bj.matmul(X, p), p)
        return (h + bias[None]).sum()

    gradient = jax.grad(loss)(jnp.zeros(10), leaf)
    np.testing.assert_array_equal(gradient, 5.0)


def test_allow_int_passes(leaf):
    def loss(p):
        return bj.matmul(X, p["k"]).sum() + (p["b"] ** 2).sum()

    gradient = jax.grad(loss, allow_int=True)({"k": leaf, "b": jnp.ones(3)})
    np.testing.assert_array_equal(gradient["b"], 2.0)
    assert gradient["k"].codes.dtype == jax.dtypes.float0
    assert not np.asarray(gradient["k"].scale).any()


def test_nothing_flows_into_a_scale_weight_only(leaf):
    gradient = jax.grad(lambda p: bj.matmul(X, p, activations=None).sum(), allow_int=True)(leaf)
    assert not np.asarray(gradient.scale).any()


# Errors -----------------------------------------------------------------------------------


def test_batch_axes_must_lead():
    with pytest.raises(
        ValueError, match=r"^pack: `batch_axes` must be the leading .*got \(1,\).*m"
    ):
        bj.pack(gaussian((8, 3, 5)), batch_axes=1)
    with pytest.raises(ValueError, match=r"`batch_axes` must be the leading axes .*\(0, 2\)"):
        bj.pack(gaussian((2, 8, 3, 5)), batch_axes=(0, 2))


def test_unpack_refuses_what_it_cannot_read():
    prepared = PACKED["prepared"]()
    with pytest.raises(TypeError, match=r"^unpack: `packed` is prepared for .*'xla'.*stored tree"):
        bj.unpack(prepared)
    for other in (gaussian((4, 3)), None, {"kernel": pack(gaussian((4, 3)))}):
        with pytest.raises(TypeError, match=r"^unpack: `packed` must be a PackedTernary.*bj.pack"):
            bj.unpack(other)


def test_pack_names_itself():
    for args, kwargs in (
        ((gaussian((8, 4)), bj.TernaryConfig(granularity=3)), {}),
        ((gaussian((2, 8, 4)),), {}),
        ((gaussian((8, 4)),), {"contracting_axes": 4}),
    ):
        with pytest.raises(ValueError, match=r"^pack: "):
            bj.pack(*args, **kwargs)
    with pytest.raises(TypeError, match=r"^pack: `config`"):
        bj.pack(gaussian((8, 4)), "b158")
