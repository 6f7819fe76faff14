"""What is restored into the wrong thing is refused.

What Orbax does on its own is asserted too: a test of a refusal first shows that Orbax
restores the wrong thing without a word, so that a later Orbax which refuses is noticed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import (
    FormatError,
    about_of,
    gaussian,
    manager_of,
    replace,
    restore,
    round_trip,
    save,
    small,
)
from jax.sharding import SingleDeviceSharding

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion  # optax's adamw raises under the strict one
Struct = jax.ShapeDtypeStruct


def struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(jax.devices()[0]))


def as_ternary(tree):
    codes, scale = struct((10, 6), jnp.uint8), struct((1, 6), jnp.float32)
    return {**tree, "head": {"kernel": bj.PackedTernary(codes, scale, 40)}}


def as_int8(tree):
    codes, scale = struct((6, 10), jnp.int8), struct((1, 1), jnp.float32)
    head = {**tree["dense"], "kernel": bj.PackedInt8(codes, scale)}
    return {**tree, "dense": head}


# Targets into which Orbax restores what was another thing, and what we say.
WRONG = {
    "config": (
        lambda t: replace(t, "dense", config=bj.PHASE4),
        r"dense/kernel has the config .*'threshold': 0\.1.* saved with .*'threshold': 0\.5",
    ),
    "length": (
        lambda t: replace(t, "dense", length=24),
        r"dense/kernel has the shape \(24, 10\), and was saved with \(23, 10\)",
    ),
    "axes": (
        lambda t: replace(t, "dense", contracting_axes=(-1,), length=40),
        r"dense/kernel has the shape \(6, 40\), and was saved with \(23, 10\)",
    ),
    "axes of an int8 kernel": (
        lambda t: replace(t, "head", contracting_axes=(-1,)),
        r"head/kernel has the contracting_axes \(-1,\), and was saved with \(-2,\)",
    ),
    "dtype it stands for": (
        lambda t: replace(t, "head", dtype=jnp.dtype(jnp.bfloat16)),
        "head/kernel has the dtype bfloat16, and was saved with float32",
    ),
    "codes cast": (
        lambda t: replace(t, "dense", codes=struct((6, 10), jnp.int32)),
        "dense/kernel has codes that are int32",
    ),
    "scale cast": (
        lambda t: replace(t, "dense", scale=struct((1, 1), jnp.bfloat16)),
        "dense/kernel has a bfloat16 scale",
    ),
    "an array cast": (
        lambda t: {**t, "dense": {**t["dense"], "bias": struct((10,), jnp.float16)}},
        "dense/bias has the dtype float16, and was saved with float32",
    ),
    "an array as integers": (
        lambda t: {**t, "dense": {**t["dense"], "bias": struct((10,), jnp.int8)}},
        "dense/bias has the dtype int8, and was saved with float32",
    ),
    "int8 as ternary": (as_ternary, "head/kernel is a PackedTernary, and was saved as a PackedI"),
    "ternary as int8": (as_int8, "dense/kernel is a PackedInt8, and was saved as a PackedTernary"),
    "packed as a dict": (
        lambda t: {
            **t,
            "head": {
                "kernel": {"codes": struct((10, 6), jnp.int8), "scale": struct((1, 6), jnp.float32)}
            },
        },
        r"the tree lacks \['head', 'kernel'\], which was saved",
    ),
    "None": (
        lambda t: {**t, "dense": {**t["dense"], "bias": None}},
        r"the tree lacks \['dense', 'bias'\], which was saved",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with manager_of(tmp_path_factory.mktemp("saved") / "checkpoints") as manager:
        save(manager, 0, tree=small())
        manager.wait_until_finished()
        yield manager


@pytest.mark.parametrize("name", WRONG)
def test_what_orbax_restores_into_the_wrong_thing_is_refused(saved, name):
    wrong, match = WRONG[name]
    about = about_of(saved, 0)["tree"]
    target = wrong(bj.io.abstract(about))
    got = restore(saved, 0, tree=target)["tree"]  # not a word
    with pytest.raises(FormatError, match=f"^check: {match}") as refused:
        bj.io.check(got, about)
    assert "bj.io.abstract(description)" in str(refused.value)
    with pytest.raises(FormatError, match=f"^abstract: {match}") as refused:
        bj.io.abstract(about, like=target)  # before a byte is read
    assert "Pass a `like` of the saved tree" in str(refused.value) or "lacks" in match
    bare = bj.io.describe(small(), digest=False)
    with pytest.raises(FormatError, match=f"^check: {match}"):
        bj.io.check(got, bare)


def test_untyped_restores_are_refused(saved):
    got = restore(saved, 0, tree=None)["tree"]
    with pytest.raises(FormatError, match=r"the tree lacks \['dense', 'kernel'\]"):
        bj.io.check(got, about_of(saved, 0)["tree"])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"codes": Struct((7, 10), jnp.uint8)}, r"codes that are uint8 of shape \(7, 10\)"),
        ({"codes": Struct((6,), jnp.uint8)}, r"shape \(6,\), and was saved with \(23, 10\)"),
        ({"kernel_ndim": 3}, "has the kernel_ndim 3, and was saved with 2"),
        ({"scale": Struct((1, 10), jnp.float32)}, r"scale_shape \(1, 10\).* with \(1, 1\)"),
    ],
    ids=["codes", "rank", "kernel_ndim", "scale"],
)
def test_shapes_and_layouts_of_templates_are_refused(changed, match):
    about = bj.io.describe(small())
    with pytest.raises(FormatError, match=match):
        bj.io.abstract(about, like=replace(bj.io.abstract(about), "dense", **changed))


def test_leaves_that_are_missing_or_new_are_refused():
    tree = small()
    about = bj.io.describe(tree)
    with pytest.raises(FormatError, match=r"lacks \['head', 'kernel'\], which was saved"):
        bj.io.check({"dense": tree["dense"]}, about)
    with pytest.raises(FormatError, match=r"has \['new'\], which was not saved"):
        bj.io.check({**tree, "new": jnp.ones(1)}, about)
    with pytest.raises(FormatError, match=r"lacks \['10'\], which was saved"):
        bj.io.check({10: jnp.ones(1)}, bj.io.describe({"10": jnp.ones(1)}))


def test_prepared_kernels_are_refused():
    tree = small()
    fast = {**tree, "dense": bj.prepare(tree["dense"], implementation="xla")}
    about = bj.io.describe(tree)
    remedy = "Pass the stored tree that bj.pack_params or bj.io.load returned"
    with pytest.raises(TypeError, match=f"^describe: dense/kernel is prepared .*{remedy}"):
        bj.io.describe(fast)
    with pytest.raises(TypeError, match=f"^check: dense/kernel is prepared .*{remedy}"):
        bj.io.check(fast, about)
    with pytest.raises(TypeError, match=f"^abstract: dense/kernel is prepared .*{remedy}"):
        bj.io.abstract(about, like=fast)


@pytest.mark.parametrize("digest", [True, False])
def test_codes_that_are_none_are_refused(digest):
    tree = small()
    about = bj.io.describe(tree, digest=digest)
    ternary, eight = tree["dense"]["kernel"], tree["head"]["kernel"]
    three, padding = np.array(ternary.codes), np.array(ternary.codes)
    three[0, 0] |= 3
    padding[-1, 0] ^= 0x80
    least = np.array(eight.codes)
    least[0, 0] = -128
    wrong = [
        (replace(tree, "dense", codes=three), "dense/kernel has 1 bytes with a code of 3"),
        (replace(tree, "dense", codes=padding), "dense/kernel has 1 bytes with a code of 3, or"),
        (replace(tree, "head", codes=least), "head/kernel has 1 codes of -128"),
    ]
    for value in (0.0, -1.0, np.nan, np.inf):
        bad = replace(tree, "dense", scale=np.full((1, 1), value, np.float32))
        wrong.append((bad, "dense/kernel has a scale that is not finite and > 0"))
    for bad, match in wrong:
        with pytest.raises(FormatError, match=f"^check: {match}"):
            bj.io.check(bad, about)
        with pytest.raises(ValueError, match=f"^describe: {match}.* bj.pack"):
            bj.io.describe(bad, digest=digest)


def test_one_changed_bit_is_refused_and_the_leaf_is_named():
    tree = small()
    about = bj.io.describe(tree)
    codes = np.array(tree["dense"]["kernel"].codes)
    codes[0, 0] = 0x55 if codes[0, 0] != 0x55 else 0xAA  # valid codes, others
    bias = np.array(tree["dense"]["bias"])
    bias.view(np.uint32)[3] ^= 1
    scale = np.nextafter(np.asarray(tree["head"]["kernel"].scale), np.float32(9))
    for bad, where in (
        (replace(tree, "dense", codes=codes), "dense/kernel"),
        (replace(tree, "head", scale=scale), "head/kernel"),
        ({**tree, "dense": {**tree["dense"], "bias": bias}}, "dense/bias"),
    ):
        with pytest.raises(FormatError, match=f"^check: {where} holds other bytes.* another step"):
            bj.io.check(bad, about)
        bj.io.check(bad, bj.io.describe(tree, digest=False))  # what digest=False gives up


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (lambda: {"a": 1}, "a must be an array or a packed kernel, got a int. Wrap a number"),
        (lambda: {"a": "b"}, "got a str"),
        (lambda: {"a": jax.random.key(0)}, "a is key<fry>.*jax.random.key_data"),
        (lambda: {"a": jax.ShapeDtypeStruct((1,), jnp.float32)}, "got a ShapeDtypeStruct"),
        (lambda: {"a": jax.jit(lambda: 1.5)()}, "a is a weak-typed float32.* jnp.asarray"),
        (lambda: {(1, 2): jnp.ones(1)}, r"has the key \(1, 2\) \(tuple\)"),
        (lambda: jnp.ones(1), "is a leaf itself. Wrap it in a dict"),
    ],
    ids=["number", "string", "random key", "abstract", "weak type", "tuple key", "leaf"],
)
def test_what_cannot_be_described_is_refused(tree, match):
    with pytest.raises(TypeError, match=f"^describe: .*{match}"):
        bj.io.describe(tree())


def test_tracers_are_refused():
    with pytest.raises(TypeError, match=r"got a tracer. Call describe outside jit"):
        jax.jit(lambda x: bj.io.describe({"a": x}))(jnp.ones(1))
    about = bj.io.describe({"a": jnp.ones(1)})
    with pytest.raises(TypeError, match=r"got a tracer. Call check outside jit"):
        jax.jit(lambda x: bj.io.check({"a": x}, about))(jnp.ones(1))


def test_a_tree_without_arrays_is_refused():
    with pytest.raises(ValueError, match="describe: `tree` holds no arrays"):
        bj.io.describe({"a": {}})


def test_a_weak_integer_is_described_and_comes_back(folder):
    step = jax.jit(lambda: 3)()
    assert step.weak_type
    assert int(round_trip(folder, {"step": step})["step"]) == 3


@pytest.mark.parametrize(
    "tree",
    [
        lambda: {"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2)},
        lambda: {"k": bj.pack(gaussian((8, 4))), "k.codes": jnp.ones((2, 4), jnp.uint8)},
    ],
    ids=["nested", "packed"],
)
def test_two_leaves_of_one_name_in_orbax_are_refused(folder, tree):
    tree = tree()
    with manager_of(folder) as manager:  # one is written over the other: not a word
        manager.save(0, args=ocp.args.Composite(tree=ocp.args.StandardSave(tree)))
        manager.wait_until_finished()
        got = restore(manager, 0, tree=jax.eval_shape(lambda: tree))["tree"]
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, tree)), strict=True)]
    assert not all(same)
    with pytest.raises(ValueError, match=r"two leaves that Orbax would store as '(a.b|k.codes)'"):
        bj.io.describe(tree)
