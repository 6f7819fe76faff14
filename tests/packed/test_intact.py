"""A packed node whose arrays a tree.map has changed is refused wherever it is used."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj
from bitnet_jax._packed import intact

pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(0), (2, 16))
W = jax.random.normal(jax.random.key(1), (16, 8))
INT8, GROUPS = bj.Int8Config(), bj.TernaryConfig(granularity=8)


def adapters():
    return bj.lora.init({"kernel": bj.pack(W)}, 2, key=jax.random.key(2))


def adapted(kernel):
    return bj.lora.attach({"kernel": kernel}, adapters())["kernel"]


STORED = {
    "ternary": lambda: bj.pack(W),
    "per channel": lambda: bj.pack(W, bj.PHASE4),
    "groups": lambda: bj.pack(W, GROUPS),
    "int8": lambda: bj.pack(W, INT8),
}
PACKED = STORED | {
    "prepared for xla": lambda: bj.prepare(bj.pack(W), "xla"),
    "prepared for cpu": lambda: bj.prepare(bj.pack(W), "cpu"),
    "int8, prepared": lambda: bj.prepare(bj.pack(W, INT8), "cpu"),
}
NODES = PACKED | {
    "adapted": lambda: adapted(bj.pack(W)),
    "adapted, prepared": lambda: adapted(bj.prepare(bj.pack(W), "cpu")),
}


def layer(node):
    config = getattr(node, "base", node).config
    return bj.linen.BitDense(8, weights=config, use_bias=False)


def nnx_layer(node):
    config = getattr(node, "base", node).config
    made = bj.nnx.BitLinear(16, 8, use_bias=False, weights=config, rngs=nnx.Rngs(0))
    made.kernel.set_value(node)
    return made


def function(node):
    config = getattr(node, "base", node).config
    return bj.ternarize(lambda p, x: x @ p["kernel"], weights=config)


OF_NODES = {
    "BitDense": lambda node: layer(node).apply({"params": {"kernel": node}}, X),
    "BitDense in jit": lambda node: jax.jit(layer(node).apply)({"params": {"kernel": node}}, X),
    "BitLinear": lambda node: nnx_layer(node)(X),
    "ternarize": lambda node: function(node)({"kernel": node}, X),
}
OF_PACKED = {
    "matmul": lambda node: bj.matmul(X, node),
    "matmul, weight-only": lambda node: bj.matmul(X, node, activations=None),
    "matmul in jit": lambda node: jax.jit(bj.matmul)(X, node),
    "matmul in a closure": lambda node: jax.jit(lambda x: bj.matmul(x, node))(X),
    "vmap of matmul": lambda node: jax.vmap(bj.matmul, (0, None))(X, node),
    "grad of matmul": lambda node: jax.grad(lambda x: bj.matmul(x, node).sum())(X),
    "lora.attach": lambda node: bj.lora.attach({"kernel": node}, adapters()),
}
OF_STORED = {
    "prepare": lambda node: bj.prepare({"kernel": node}),
    "prepare of a leaf": lambda node: bj.prepare(node),
    "unpack": lambda node: bj.unpack(node),
    "unpack in jit": lambda node: jax.jit(bj.unpack)(node),
    "dequantize": lambda node: node.dequantize(),
    "unpack_params": lambda node: bj.unpack_params({"kernel": node}),
    "lora.init": lambda node: bj.lora.init({"kernel": node}, 2, key=jax.random.key(0)),
    "lora.merge": lambda node: bj.lora.merge({"kernel": node}, adapters()),
    "describe": lambda node: bj.io.describe({"kernel": node}),
}
USES = [
    (kind, use)
    for kinds, uses in ((NODES, OF_NODES), (PACKED, OF_PACKED), (STORED, OF_STORED))
    for kind in kinds
    for use in uses
]


def half(tree):
    """What every policy of mixed precision does."""
    return jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def codes(change):
    """A change of the codes alone."""
    return lambda tree: jax.tree.map(
        lambda a: change(a) if jnp.issubdtype(a.dtype, jnp.integer) else a, tree
    )


DAMAGE = {
    "mixed precision": (half, "has a bfloat16 scale; it must be float32"),
    "average": (
        lambda t: jax.tree.map(lambda a: 0.9 * a + 0.1 * a, t),
        "has codes that are float32",
    ),
    "cast": (lambda t: optax.tree.cast(t, jnp.float16), "has codes that are float16"),
    "integers": (codes(lambda a: a.astype(jnp.int32)), "has codes that are int32"),
    # A row less of an int8 kernel is one of another shape.
    "a byte less": (
        codes(lambda a: a[:-1] if a.dtype == jnp.uint8 else a[None]),
        "has (codes that are|a scale)",
    ),
    "an axis more": (lambda t: jax.tree.map(lambda a: a[..., None], t), "has (codes|a scale)"),
}


@cases(("kind", "use"), {f"{k} in {u}": (k, u) for k, u in USES}, core=["int8 in matmul"])
def test_a_changed_node_is_refused(kind, use):
    run = (OF_NODES | OF_PACKED | OF_STORED)[use]
    node = NODES[kind]()
    run(node)  # as it was made, it runs
    for damage, said in DAMAGE.values():
        with pytest.raises(ValueError, match=said):
            run(damage(node))


@pytest.mark.parametrize("use", ["matmul in jit", "BitDense", "prepare", "dequantize"])
def test_a_changed_node_is_refused_in_the_core(use):
    test_a_changed_node_is_refused("ternary", use)


def test_a_refusal_says_who_where_what_and_the_remedy():
    params = {"kernel": half(bj.pack(W))}
    with pytest.raises(ValueError) as raised:
        bj.linen.BitDense(8, use_bias=False).apply({"params": params}, X)
    assert str(raised.value) == (
        "BitDense: the kernel at kernel has a bfloat16 scale; it must be float32. " + intact.REMEDY
    )
    with pytest.raises(ValueError, match=r"^save: kernel has a bfloat16 scale; it must"):
        bj.io.save("never-written", params)


def test_convolutions_and_embeddings_refuse_too():
    image = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    conv = bj.linen.BitConv(8, (3, 3))
    packed, _ = bj.linen.pack(conv, conv.init(jax.random.key(1), image)["params"], image)
    with pytest.raises(ValueError, match="BitConv: the kernel at kernel has a bfloat16 scale"):
        conv.apply({"params": half(packed)}, image)
    table, tokens = bj.pack(W, INT8, contracting_axes=-1), jnp.array([1, 3])
    embed = bj.linen.ternarize(nn.Embed(16, 8), lambda path, leaf: INT8)
    for name, (damage, said) in DAMAGE.items():
        if name == "an axis more":
            continue  # a stack of tables
        for ready in (table, bj.prepare(table, "cpu")):
            with pytest.raises(ValueError, match=said):
                embed.apply({"params": {"embedding": damage(ready)}}, tokens)
        with pytest.raises(ValueError, match=said):
            damage(table).rows(tokens)


def test_leaves_that_are_no_arrays_are_named():
    kernel = bj.pack(W)
    for node in (kernel, bj.prepare(kernel, "xla")):
        for value in (None, "x", 3.0):
            with pytest.raises(ValueError, match=r"has (codes|a scale) that (are|is) "):
                bj.matmul(X, jax.tree.map(lambda _, v=value: v, node))
    shapes = jax.eval_shape(lambda: kernel)
    for use in (
        lambda: bj.matmul(X, shapes),
        lambda: bj.prepare(shapes),
        lambda: bj.unpack(shapes),
    ):
        with pytest.raises(TypeError, match=r"is a jax\.ShapeDtypeStruct.*Pass arrays"):
            use()


def test_an_adapter_of_another_shape_or_kind_is_named():
    node = adapted(bj.pack(W))
    for change, said in (
        ({"a": node.a[:-1]}, r"an adapter whose a has shape \(15, 2\); it must be \(16, 2\)"),
        ({"b": node.b[:1]}, r"an adapter whose b has shape \(1, 8\); it must be \(2, 8\)"),
        ({"a": jnp.ones((16, 2), jnp.int32)}, "an adapter whose a is int32 of shape"),
    ):
        with pytest.raises(ValueError, match=said):
            OF_NODES["BitDense"](dataclasses.replace(node, **change))
    OF_NODES["BitDense"](dataclasses.replace(node, a=node.a.astype(jnp.bfloat16)))


# Values -----------------------------------------------------------------------------------

SUMMED = optax.tree.add(bj.pack(W), bj.pack(W))


READ = [use for use in [*OF_NODES, *OF_PACKED, *OF_STORED] if not use.endswith("in jit")]


@pytest.mark.parametrize("use", READ)
def test_codes_of_3_are_refused_where_they_can_be_read(use):
    run = (OF_NODES | OF_PACKED | OF_STORED)[use]
    with pytest.raises(ValueError, match=r"has \d+ bytes with a code of 3"):
        run(SUMMED)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_prepared_codes_of_3_are_refused(implementation):
    node = bj.prepare(bj.pack(W), implementation)
    with pytest.raises(ValueError, match=r"has \d+ bytes with a code of 3"):
        bj.matmul(X, optax.tree.add(node, node))


def test_an_int8_code_of_minus_128_is_refused():
    kernel = bj.pack(W, INT8)
    low = dataclasses.replace(kernel, codes=kernel.codes.at[0, 0].set(-128))
    for use in (bj.prepare, bj.unpack, lambda k: bj.matmul(X, k)):
        with pytest.raises(ValueError, match=r"has 1 codes of -128; they are -127 to 127"):
            use(low)


def test_padding_that_is_not_zero_is_refused():
    kernel = bj.pack(W[:15])
    loud = dataclasses.replace(kernel, codes=kernel.codes.at[-1].set(0xAA))
    with pytest.raises(ValueError, match=r"has 8 bytes with a code of 3, or padding"):
        bj.unpack(loud)


def test_codes_are_read_once_for_each_array(monkeypatch):
    read = []
    count = intact.trits.count_invalid
    monkeypatch.setattr(intact.trits, "count_invalid", lambda *args: read.append(1) or count(*args))
    kernel = bj.pack(W)
    for _ in range(3):
        bj.matmul(X, kernel)
        layer(kernel).apply({"params": {"kernel": kernel}}, X)
    assert len(read) == 1
    known = id(kernel.codes)
    assert known in intact._good
    del kernel
    gc.collect()
    assert known not in intact._good


@pytest.mark.parametrize("kind", NODES)
def test_every_node_has_the_attributes_of_an_array(kind):
    node = NODES[kind]()
    assert (node.shape, node.ndim, node.size, node.dtype) == ((16, 8), 2, 128, np.float32)
    assert node.nbytes == sum(x.nbytes for x in jax.tree.leaves(node))
