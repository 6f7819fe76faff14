"""Files: what is saved comes back to the bit, and what was changed does not come back at all."""

import dataclasses
import os
import stat

import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import safetensors
from cases import cases
from draws import params_of
from flax import nnx
from io_files import KERNELS, assert_same, gaussian, pack, round_trip

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax.io import _tensors

FormatError = bitnet_jax.io.FormatError
DTYPES = sorted(_tensors.DTYPES)


# Round trips.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3, 4), (0, 2)], ids=str)
def test_every_dtype_comes_back(path, dtype, shape):
    x = gaussian(shape).astype(jnp.dtype(dtype))
    assert_same(round_trip(path, {"x": x}), {"x": x})


def test_arrays_of_jax_come_back_as_arrays_of_jax(path):
    tree = {
        "float32": jnp.array([1.5, jnp.nan, -jnp.inf, -0.0, 1e-45]),
        "bfloat16": jnp.array([[0.5, -2]], jnp.bfloat16),
        "scalar": jnp.int32(7),
        "numpy-scalar": np.float32(0.1),
    }
    got = round_trip(path, tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    assert_same(got, tree)


def test_64_bits_are_not_cut_to_32(path):
    got = round_trip(path, {"step": np.int64(2**40 + 1), "x": np.float64([0.1])})
    assert isinstance(got["step"], np.ndarray)
    assert got["step"] == 2**40 + 1
    assert got["x"].dtype == np.float64


@cases(("shape", "config", "axes"), KERNELS, core=["odd", "groups", "conv", "stacked-attention"])
def test_packed_kernels_come_back_typed(path, shape, config, axes):
    tree = {"layer": {"kernel": pack(shape, config, **axes)}}
    got = round_trip(path, tree)
    assert_same(got, tree)
    leaf = got["layer"]["kernel"]
    assert isinstance(leaf, bj.PackedTernary)
    assert leaf.shape == shape
    assert leaf.config == config
    oracles.assert_same_bits(bj.unpack(leaf), bj.unpack(tree["layer"]["kernel"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_of_the_kernel_is_kept(path, dtype):
    tree = {"kernel": pack(dtype=jnp.dtype(dtype))}
    assert_same(round_trip(path, tree), tree)


def test_a_slice_of_a_stack_comes_back(path):
    stacked = pack((3, 8, 5), bj.PHASE4, batch_axes=0)
    tree = {"kernel": jax.tree.map(lambda a: a[1], stacked)}
    assert_same(round_trip(path, tree), tree)


@pytest.mark.full
@hypothesis.given(data=st.data())
def test_any_kernel_comes_back(tmp_path_factory, data):
    path = str(tmp_path_factory.getbasetemp() / "any.bitnet.safetensors")
    length = data.draw(st.integers(1, 9))
    shape = (
        *data.draw(st.lists(st.integers(1, 3), max_size=2)),
        length,
        data.draw(st.integers(1, 5)),
    )
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    config = bj.TernaryConfig(
        scale=data.draw(st.sampled_from(["absmean", "absmedian", "survivors"])),
        threshold=data.draw(st.floats(1e-3, 2.0)),
        granularity=data.draw(st.sampled_from(["tensor", "channel", *divisors])),
        eps=data.draw(st.floats(1e-12, 1.0)),
    )
    name = data.draw(st.text('ab/.~é\\" ', max_size=4))
    tree = {name: pack(shape, config, batch_axes=tuple(range(len(shape) - 2)))}
    assert_same(round_trip(path, tree), tree)


@pytest.mark.parametrize("order", ["F", "step", "reversed", "swapped"])
def test_memory_order_does_not_matter(path, order):
    x = gaussian((6, 8))
    strange = {
        "F": np.asfortranarray(x),
        "step": np.repeat(x, 2, axis=1)[:, ::2],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "swapped": x.astype(">f4"),
    }[order]
    got = round_trip(path, {"x": strange, "t": jnp.asarray(x).T})
    oracles.assert_same_bits(got["x"], x)
    oracles.assert_same_bits(got["t"], x.T)


def test_a_packed_kernel_with_strided_bytes_comes_back(path):
    packed = pack()
    strided = dataclasses.replace(packed, codes=np.asfortranarray(packed.codes))
    assert_same(round_trip(path, {"kernel": strided}), {"kernel": packed})


def test_keys_keep_their_type(path):
    tree = {"layers": {10: {"w": jnp.ones(2)}, 2: {"w": jnp.zeros(2)}, -1: {}}, "10": jnp.ones(1)}
    got = round_trip(path, tree)
    assert_same(got, tree)
    assert set(got["layers"]) == {10, 2, -1}
    both = round_trip(path, {0: jnp.zeros(1), "a": {"b": jnp.ones(2)}, "": jnp.ones(3)})
    assert list(both) == [0, "", "a"]


def test_names_with_slashes_are_not_nested(path):
    tree = {"a/b": jnp.ones(1), "a": {"c": jnp.zeros(2)}, 'é "\\': jnp.ones(3)}
    assert_same(round_trip(path, tree), tree)


def test_frozen_dict_and_boxes_are_opened(path):
    packed = pack()
    tree = flax.core.freeze(
        {
            "layer": {
                "kernel": nn.Partitioned(packed, names=("a", "b")),
                "bias": nn.LogicallyPartitioned(jnp.ones(10), names=("b",)),
            }
        }
    )
    want = {"layer": {"kernel": packed, "bias": jnp.ones(10)}}
    assert_same(round_trip(path, tree), want)


def test_nnx_state(path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)])

    model = Model(nnx.Rngs(0))
    model.layers[0].kernel = nnx.Param(bj.pack(model.layers[0].kernel.get_value()))
    state = nnx.state(model)
    got = round_trip(path, state)
    assert_same(got, nnx.to_pure_dict(state))
    assert isinstance(got["layers"][0]["kernel"], bj.PackedTernary)


def test_a_model_runs_from_its_file(path):
    from bitnet_jax.linen import BitDense

    model, x = BitDense(6), jnp.asarray(gaussian((4, 8)))
    params = params_of(model, x)
    loaded = round_trip(path, bj.pack_params(params)[0])
    apply = jax.jit(model.apply)
    oracles.assert_same_bits(apply({"params": loaded}, x), apply({"params": params}, x))


def test_the_same_tree_gives_the_same_bytes(path, tmp_path):
    one = {"b": {"w": pack()}, "a": jnp.ones(3)}
    other = {"a": np.ones(3, np.float32), "b": flax.core.freeze({"w": one["b"]["w"]})}
    bitnet_jax.io.save(path, one)
    with open(path, "rb") as file:
        content = file.read()
    for _ in range(4):
        bitnet_jax.io.save(tmp_path / "other", other)
        assert (tmp_path / "other").read_bytes() == content


def test_safetensors_reads_the_file(path):
    tree = {"layer": {"kernel": pack()}, "bias": jnp.ones(3), "flag": np.array(True)}
    bitnet_jax.io.save(path, tree)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["format"] == "bitnet_jax"
        assert set(file.keys()) == {"layer/kernel.codes", "layer/kernel.scale", "bias", "flag"}
        oracles.assert_same_bits(
            file.get_tensor("layer/kernel.codes"), np.asarray(tree["layer"]["kernel"].codes)
        )
        oracles.assert_same_bits(file.get_tensor("bias"), np.ones(3, np.float32))


# What load and save refuse.


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError, match=r"no such file\. Check the path") as error:
        bitnet_jax.io.load(path)
    assert error.value.filename == path


@pytest.mark.parametrize("wrong", [3, b"bytes", None, ["a"]], ids=repr)
def test_a_path_that_is_none(wrong):
    for call in (lambda: bitnet_jax.io.load(wrong), lambda: bitnet_jax.io.save(wrong, {})):
        with pytest.raises(TypeError, match="`path` must be a str or PathLike"):
            call()


def rows():
    return [jnp.ones(1)]


REFUSED = {
    "list": (
        lambda: {"a": rows()},
        TypeError,
        r"a must be an array .* a list\. Make it a dict",
    ),
    "tuple": (lambda: {"a": {"b": (1,)}}, TypeError, "a/b must be an array .* got a tuple"),
    "none": (lambda: {"a": None}, TypeError, r"got None\. .*bj\.combine"),
    "float": (lambda: {"a": 0.5}, TypeError, r"got a float\. Wrap a number in jnp\.asarray"),
    "string": (lambda: {"a": "text"}, TypeError, "got a str"),
    "struct": (lambda: {"a": jax.ShapeDtypeStruct((1,), jnp.float32)}, TypeError, "describes"),
    "object": (lambda: {"a": np.array([None])}, TypeError, "a is object of shape"),
    "text": (lambda: {"a": np.array(["x"])}, TypeError, "a dtype that a file cannot hold"),
    "time": (lambda: {"a": np.datetime64("2020-01-01")}, TypeError, "a is datetime64"),
    "record": (lambda: {"a": np.zeros(2, [("x", "f4")])}, TypeError, "cannot hold"),
    "key": (lambda: {"a": jax.random.key(0)}, TypeError, r"jax\.random\.key_data"),
    "prepared": (
        lambda: {"a": {"kernel": bj.prepare(pack(), implementation="xla")}},
        TypeError,
        "save: a/kernel is prepared for implementation 'xla'",
    ),
    "abstract": (
        lambda: {"a": jax.eval_shape(lambda: pack())},
        TypeError,
        r"a\.codes must be an array .* a ShapeDtypeStruct",
    ),
    "empty": (dict, ValueError, "`tree` holds no arrays"),
    "empties": (lambda: {"a": {"b": {}}}, ValueError, "`tree` holds no arrays"),
    "array": (lambda: jnp.ones(2), TypeError, "`tree` must be a Mapping, .* Wrap a leaf in a dict"),
    "packed": (pack, TypeError, "`tree` must be a Mapping"),
    "root-list": (rows, TypeError, "`tree` must be a Mapping"),
    "model": (lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TypeError, r"nnx\.state\(model\)"),
    "float-key": (lambda: {1.5: jnp.ones(1)}, TypeError, "`tree` has the key 1.5"),
    "bool-key": (lambda: {"a": {True: jnp.ones(1)}}, TypeError, "'a' has the key True"),
    "long-key": (lambda: {10**5000: jnp.ones(1)}, TypeError, "ints of 64 bits"),
    "long-64-key": (lambda: {2**63: jnp.ones(1)}, TypeError, "ints of 64 bits"),
    "control-key": (lambda: {"a\x1f": jnp.ones(1)}, TypeError, "printable strings"),
    "surrogate-key": (lambda: {"\ud800": jnp.ones(1)}, TypeError, "printable strings"),
    "slash": (lambda: {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, ValueError, "file is 'a/b'"),
    "int-and-str": (lambda: {0: jnp.ones(1), "0": jnp.ones(1)}, ValueError, "two leaves"),
    "codes": (lambda: {"k": pack(), "k.codes": jnp.ones(1)}, ValueError, "two leaves"),
    "metadata": (lambda: {"__metadata__": jnp.ones(1)}, ValueError, "safetensors reserves"),
    "cast": (
        lambda: {"k": jax.tree.map(lambda a: a.astype(jnp.bfloat16), pack())},
        ValueError,
        r"save: k has codes that are bfloat16 .* Make packed kernels with bj\.pack",
    ),
    "cast-scale": (
        lambda: {"k": dataclasses.replace(pack(), scale=jnp.ones((1, 1), jnp.bfloat16))},
        ValueError,
        "k has a bfloat16 scale",
    ),
    "nan": (
        lambda: {"k": dataclasses.replace(pack(), scale=jnp.full((1, 1), jnp.nan))},
        ValueError,
        "k has a scale that is not finite",
    ),
    "three": (
        lambda: {"k": dataclasses.replace(pack(), codes=jnp.full((6, 10), 255, jnp.uint8))},
        ValueError,
        "k has 60 bytes with a code of 3",
    ),
    "lost-axis": (
        lambda: {"k": jax.tree.map(lambda a: a[0], pack())},
        ValueError,
        "k has shape .* and a kernel_ndim of 2",
    ),
    "config": (
        lambda: {"k": dataclasses.replace(pack(), dtype=np.dtype(np.int8))},
        ValueError,
        "stands for a kernel of dtype 'int8'",
    ),
}


@pytest.mark.parametrize(("tree", "kind", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_trees_write_nothing(path, tmp_path, tree, kind, match):
    with pytest.raises(kind, match=match) as error:
        bitnet_jax.io.save(path, tree())
    assert str(error.value).startswith("save: ")
    assert os.listdir(tmp_path) == []


def test_refused_under_jit(path, tmp_path):
    @jax.jit
    def f(x):
        bitnet_jax.io.save(path, {"x": x})
        return x

    @jax.jit
    def g(packed):
        bitnet_jax.io.save(path, {"k": packed})
        return packed.scale

    with pytest.raises(TypeError, match=r"x must be an array .* got a tracer"):
        f(jnp.ones(2))
    with pytest.raises(TypeError, match=r"k\.codes must be an array .* got a tracer"):
        g(pack())
    assert os.listdir(tmp_path) == []


def test_places_that_are_no_file(tmp_path):
    tree = {"x": jnp.ones(1)}
    with pytest.raises(FileNotFoundError, match="no such directory"):
        bitnet_jax.io.save(tmp_path / "none" / "x", tree)
    with pytest.raises(IsADirectoryError, match="Name a file"):
        bitnet_jax.io.save(tmp_path, tree)
    with pytest.raises(OSError, match="Name a file"):
        bitnet_jax.io.save("/dev/null", tree)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(IsADirectoryError):
        bitnet_jax.io.load(tmp_path)
