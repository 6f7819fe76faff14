"""Files: what is saved comes back to the bit, and what was changed does not come back at all."""

import dataclasses
import errno
import json
import os
import stat

import flax.core
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
import safetensors
from flax import nnx

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax.io import _container, _leaves

FormatError = bitnet_jax.io.FormatError
GROUPS = bj.TernaryConfig(granularity=4)
KERNELS = {
    "dense": ((24, 10), bj.B158, {}),
    "odd": ((7, 3), bj.PHASE4, {}),
    "groups": ((24, 10), GROUPS, {}),
    "transposed": ((6, 8), bj.TWN, {"contracting_axes": 1}),
    "attention-out": ((3, 4, 5), bj.PHASE4, {"contracting_axes": (0, 1)}),
    "conv": ((2, 3, 5, 6), bj.B158, {"contracting_axes": (0, 1, 2)}),
    "stacked": ((3, 8, 5), bj.PHASE4, {"batch_axes": 0}),
    "stacked-attention": ((2, 3, 4, 5), GROUPS, {"contracting_axes": (1, 2), "batch_axes": 0}),
    "two-batch": ((2, 3, 8, 5), bj.TWN, {"batch_axes": (0, 1)}),
    "one-output": ((9, 1), bj.B158, {}),
}
DTYPES = sorted(_leaves._DTYPES)


def gaussian(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def pack(shape=(24, 10), config=bj.B158, dtype=np.float32, **axes):
    return bj.pack(jnp.asarray(gaussian(shape, dtype=dtype)), config, **axes)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.bitnet.safetensors")


def round_trip(path, tree):
    bitnet_jax.io.save(path, tree)
    return bitnet_jax.io.load(path)


def assert_same(got, want):
    """The same structure, static data included, the same dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


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


@pytest.mark.parametrize(("shape", "config", "axes"), KERNELS.values(), ids=KERNELS)
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
    params = model.init(jax.random.key(0), x)["params"]
    loaded = round_trip(path, bj.pack_params(params)[0])
    oracles.assert_same_bits(
        model.apply({"params": loaded}, x), jax.jit(model.apply)({"params": params}, x)
    )


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


# Damage.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small file with a bit of everything, and a place to write it changed."""
    path = str(tmp_path_factory.mktemp("small") / "small.bitnet.safetensors")
    tree = {
        "layer": {"kernel": pack((10, 9), bj.PHASE4), "bias": jnp.ones(9, jnp.bfloat16)},
        "conv": {"kernel": pack((2, 3, 4, 5), GROUPS, contracting_axes=(0, 1, 2))},
        "naïve key": {0: np.int64(3), 1: {}, 2: np.array([True, False])},
        "raw": np.ones(2, ml_dtypes.int4),
    }
    bitnet_jax.io.save(path, tree)
    with open(path, "rb") as file:
        return path, file.read()


def refused(path, content, match="load: "):
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(FormatError, match=match) as error:
        bitnet_jax.io.load(path)
    assert str(error.value).startswith(f"load: {path!r} ")
    return str(error.value)


def test_every_flipped_bit_is_refused(small):
    path, content = small
    assert 1500 < len(content) < 3500
    with open(path, "wb") as file:
        file.write(content)
    passed = []
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(content)):
            at, byte = bit // 8, content[bit // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), at)
            try:
                bitnet_jax.io.load(path)
            except FormatError:
                pass
            else:
                passed.append(bit)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert passed == []
    assert "layer" in bitnet_jax.io.load(path)  # every bit was put back


def test_every_truncation_is_refused(small):
    path, content = small
    for length in range(len(content)):
        refused(path, content[:length])


@pytest.mark.parametrize("more", [1, 8, 5000])
def test_appended_bytes_are_refused(small, more):
    path, content = small
    refused(path, content + b"\0" * more, f"has {more} bytes after its last tensor")


def split(content):
    """A file's header and data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def signed(header, data):
    """A file with a valid digest, so that what comes after it is what refuses."""
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = np.frombuffer(data, np.uint8)[begin:end]
            tensors[name] = _container.Tensor(entry["dtype"], tuple(entry["shape"]), raw)
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    sha = _container.digest(tensors, metadata)
    return join({**header, "__metadata__": {**metadata, "sha256": sha}}, data)


def test_the_helper_signs_as_save_does(small):
    path, content = small
    with open(path, "wb") as file:
        file.write(signed(*split(content)))
    assert "layer" in bitnet_jax.io.load(path)


def test_huge_and_short_headers_are_refused(small, monkeypatch):
    path, content = small
    refused(path, b"\xff" * 8 + content[8:], "it gives its header 18446744073709551615 bytes")
    refused(path, b"", "it has 0 bytes")
    refused(path, (5).to_bytes(8, "little") + b"[1,2]", "no JSON object")
    refused(path, (2).to_bytes(8, "little") + b"\xff\xfe", "no JSON")
    refused(path, join(b"[" * 100_000, b""), "no JSON")
    refused(path, join(b'{"a":' + b"9" * 5000 + b"}", b""), "no JSON|must have a dtype")
    refused(path, join({}, b""), "was not written by bj.io.save")
    monkeypatch.setattr(_container, "MAX_HEADER", 100)
    refused(path, content, "header of .* bytes; the most is 100")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            b'"layer/bias":{',
            b'"layer/bias":{"dtype":"BF16","shape":[9],"data_offsets":[0,18]},"layer/bias":{',
        ),
        (b'"version":"1"', b'"version":"1","version":"1"'),
        (b'"shape":[9]', b'"shape":[9],"shape":[9]'),
    ],
)
def test_duplicate_keys_are_refused(small, old, new):
    path, content = small
    header, data = split(content)
    raw = json.dumps(header, separators=(",", ":")).encode()
    assert raw.count(old) == 1
    refused(path, join(raw.replace(old, new), data), "is there twice")


def test_a_relabelled_dtype_is_refused(small):
    path, content = small
    header, data = split(content)
    header["layer/kernel.codes"]["dtype"] = "I8"
    refused(path, join(header, data), "was changed after it was written")
    refused(path, signed(header, data), "declares 'layer/kernel.codes' as U8 .* and holds I8")


def edited(content, **changes):
    """The header with one tensor's entry changed by each keyword."""
    header, data = split(content)
    header["layer/bias"].update(changes)
    return join(header, data)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "F4"}, "which no array here has"),
        ({"dtype": ["BF16"]}, "which no array here has"),
        ({"dtype": "F32"}, "36 bytes, and has 18"),
        ({"shape": [3, 4]}, "24 bytes, and has 18"),
        ({"shape": [-9]}, "has shape"),
        ({"shape": [9.0]}, "has shape"),
        ({"shape": [True, 9]}, "has shape"),
        ({"shape": "9"}, "has shape"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [10**6, 10**6 + 18]}, "begins at|what is before it ends"),
        ({"data_offsets": [18, 0]}, "bytes, and has -18"),
        ({"more": 1}, "must have a dtype"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(small, changes, match):
    path, content = small
    refused(path, edited(content, **changes), match)


def test_overlapping_tensors_are_refused(small):
    path, content = small
    header, data = split(content)
    header["copy"] = dict(header["layer/bias"])
    refused(path, join(header, data), "begins at byte .* what is before it ends at")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", "pt", "was not written by bj.io.save"),
        ("format", None, "was not written by bj.io.save"),
        ("version", "2", "of version '2', .* Update bitnet_jax"),
        ("version", None, "of version None"),
        ("leaves", None, "does not describe its leaves"),
        ("leaves", "{}", "canonical JSON"),
        ("leaves", "[NaN]", "does not describe its leaves"),
        ("leaves", "[[[", "does not describe its leaves"),
        ("leaves", "[" * 100_000, "does not describe its leaves"),
        ("leaves", "[1]", "describes wrongly"),
        ("leaves", '[{"kind":[]}]', "describes wrongly"),
        ("leaves", "[]", "that no leaf declares"),
    ],
)
def test_metadata_with_a_valid_digest(small, key, value, match):
    path, content = small
    header, data = split(content)
    header["__metadata__"][key] = value
    if value is None:
        del header["__metadata__"][key]
    refused(path, signed(header, data), match)


def test_digest_missing_or_wrong(small):
    path, content = small
    header, data = split(content)
    sha = header["__metadata__"].pop("sha256")
    refused(path, join(header, data), "has no sha256")
    header["__metadata__"]["sha256"] = sha.upper()
    refused(path, join(header, data), "was changed after it was written")
    header["__metadata__"] = [sha]
    refused(path, join(header, data), "maps no strings to strings")
    header["__metadata__"] = {"format": 1}
    refused(path, join(header, data), "maps no strings to strings")


def test_unknown_metadata_is_under_the_digest(small):
    path, content = small
    header, data = split(content)
    header["__metadata__"]["note"] = "mine"
    refused(path, join(header, data), "was changed after it was written")


def with_leaves(content, change, rename=None):
    """A signed file whose description was changed by a function of its leaves by path."""
    header, data = split(content)
    leaves = json.loads(header["__metadata__"]["leaves"])
    change({_leaves.name_of(leaf["path"]): leaf for leaf in leaves}, leaves)
    header["__metadata__"]["leaves"] = _container.canonical_json(leaves)
    for old, new in (rename or {}).items():
        header[new] = header.pop(old)
    return signed(header, data)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"length": 11}, "has a length of 11"),
        ({"length": 10.0}, "has a length of 10.0"),
        ({"length": True}, "has a length of True"),
        ({"shape": [13, 9], "length": 13}, "declares 'layer/kernel.codes' as U8"),
        ({"shape": [9, 10], "length": 9}, "declares 'layer/kernel.codes' as U8"),
        ({"shape": [10]}, "a kernel_ndim of 2"),
        ({"shape": [0, 9]}, "a kernel_ndim of 2"),
        ({"kernel_ndim": 1}, "a kernel_ndim of 1"),
        ({"kernel_ndim": 3}, "a kernel_ndim of 3"),
        ({"contracting_axes": []}, "negative and ascending"),
        ({"contracting_axes": [0]}, "negative and ascending"),
        ({"contracting_axes": [-3]}, "negative and ascending"),
        ({"contracting_axes": [-1, -2]}, "negative and ascending"),
        ({"contracting_axes": [-2, -2]}, "negative and ascending"),
        ({"contracting_axes": [-1], "length": 9}, "declares 'layer/kernel.codes' as U8"),
        ({"dtype": "int8"}, "not floating point"),
        ({"dtype": "object"}, "as 'object'"),
        ({"dtype": ["float32"]}, "declares 'layer/kernel' as"),
        ({"config": None}, "its fields are"),
        ({"config": {"scale": "absmean"}}, "its fields are"),
        ({"kind": "prepared"}, "describes wrongly"),
        ({"more": 1}, "describes wrongly"),
        ({"path": []}, "the path"),
        ({"path": ["layer", True]}, "the path"),
        ({"path": ["layer", 1.5]}, "the path"),
        ({"path": ["other"]}, "lacks the tensor 'other.codes'"),
    ],
)
def test_a_wrong_description_with_a_valid_digest(small, change, match):
    path, content = small
    changed = with_leaves(content, lambda named, _: named["layer/kernel"].update(change))
    refused(path, changed, match)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", "absmaen"),
        ("scale", 1),
        ("threshold", 0),
        ("threshold", "0.5"),
        ("granularity", 0),
        ("granularity", None),
        ("granularity", [4]),
        ("eps", -1),
        ("eps", True),
    ],
)
def test_an_invalid_config_with_a_valid_digest(small, field, value):
    path, content = small

    def change(named, _):
        named["layer/kernel"]["config"][field] = value

    refused(path, with_leaves(content, change), "has no valid config: TernaryConfig: ")


def test_leaves_that_meet_are_refused(small):
    path, content = small

    def nested(named, leaves):
        named["layer/kernel"]["path"] = ["layer", "bias", "kernel"]

    rename = {f"layer/kernel{e}": f"layer/bias/kernel{e}" for e in (".codes", ".scale")}
    refused(path, with_leaves(content, nested, rename), "a leaf inside another")
    twice = with_leaves(content, lambda named, leaves: leaves.append(named["layer/bias"]))
    refused(path, twice, "that no leaf declares, or several do")
    empty = {"kind": "empty", "path": ["layer"]}
    refused(path, with_leaves(content, lambda _, leaves: leaves.append(empty)), "two leaves at")


def test_unknown_and_missing_tensors_with_a_valid_digest(small):
    path, content = small
    refused(path, with_leaves(content, lambda _, leaves: leaves.pop(0)), "that no leaf declares")
    more = {"kind": "array", "path": ["more"], "dtype": "int8", "shape": [1]}
    refused(path, with_leaves(content, lambda _, leaves: leaves.append(more)), "lacks the tensor")


def with_bytes(content, name, change):
    """A signed file with the bytes of one tensor changed."""
    header, data = split(content)
    begin, end = header[name]["data_offsets"]
    part = np.frombuffer(data[begin:end], np.uint8).copy()
    change(part)
    return signed(header, data[:begin] + part.tobytes() + data[end:])


def put(index, value):
    def change(part):
        part[index] = value

    return change


def scale_at(index, value):
    def change(part):
        part.view(np.float32)[index] = value

    return change


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf])
def test_a_bad_scale_with_a_valid_digest(small, value):
    path, content = small
    changed = with_bytes(content, "layer/kernel.scale", scale_at(4, value))
    refused(path, changed, "'layer/kernel' has a scale that is not finite and > 0")


@pytest.mark.parametrize("field", range(4))
def test_a_code_of_three_with_a_valid_digest(small, field):
    path, content = small
    changed = with_bytes(content, "layer/kernel.codes", put(0, 0x55 | 3 << 2 * field))
    refused(path, changed, "'layer/kernel' has 1 bytes with a code of 3, or padding")


@pytest.mark.parametrize("byte", [0x05, 0x15, 0x65, 0xA5])
def test_padding_that_is_not_zero_with_a_valid_digest(small, byte):
    path, content = small  # ten codes: the last byte row holds two, and two of padding
    changed = with_bytes(content, "layer/kernel.codes", put(-1, byte))
    refused(path, changed, "padding that is not zero")


def test_a_boolean_of_two_with_a_valid_digest(small):
    path, content = small
    refused(path, with_bytes(content, "naïve key/2", put(0, 2)), "neither 0 nor 1")


def test_a_shape_that_no_array_has(path):
    bitnet_jax.io.save(path, {"x": np.zeros((0, 2), np.float32)})
    with open(path, "rb") as file:
        header, data = split(file.read())
    leaves = json.loads(header["__metadata__"]["leaves"])
    leaves[0]["shape"] = header["x"]["shape"] = [0, 2**70]
    header["__metadata__"]["leaves"] = _container.canonical_json(leaves)
    refused(path, signed(header, data), "which no array has")


@pytest.mark.parametrize("shape", [(1,), (1, 1, 10), (4, 10), (0, 10), (6, 20), ()], ids=str)
def test_a_scale_that_does_not_tile_the_kernel(path, shape):
    bad = dataclasses.replace(pack((6, 10)), scale=jnp.ones(shape))
    with pytest.raises(ValueError, match="which does not tile shape"):
        bitnet_jax.io.save(path, {"kernel": bad})


def test_a_safetensors_file_of_somebody_else(path):
    import safetensors.numpy

    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"written by bj.io.save: .* 'pt', .*that wrote it\.$"):
        bitnet_jax.io.load(path)


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
    "control-key": (lambda: {"a\x1f": jnp.ones(1)}, TypeError, "printable strings"),
    "surrogate-key": (lambda: {"\ud800": jnp.ones(1)}, TypeError, "printable strings"),
    "slash": (lambda: {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, ValueError, "'a/b' in a file"),
    "int-and-str": (lambda: {0: jnp.ones(1), "0": jnp.ones(1)}, ValueError, "two leaves"),
    "codes": (lambda: {"k": pack(), "k.codes": jnp.ones(1)}, ValueError, "two leaves"),
    "metadata": (lambda: {"__metadata__": jnp.ones(1)}, ValueError, "keeps for itself"),
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


# A save is all or nothing.


@pytest.mark.parametrize("call", ["replace", "fsync", "open-write"])
def test_a_failed_save_leaves_the_old_file(path, tmp_path, monkeypatch, call):
    old = {"kernel": pack()}
    bitnet_jax.io.save(path, old)
    before = (tmp_path / "model.bitnet.safetensors").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        if call == "open-write":
            patch.setattr(_container, "_encode", lambda *_: [before[:50], 3])
        else:
            patch.setattr(os, call, full)
        with pytest.raises((OSError, TypeError)):
            bitnet_jax.io.save(path, {"kernel": pack((8, 8))})
    assert os.listdir(tmp_path) == ["model.bitnet.safetensors"]
    assert (tmp_path / "model.bitnet.safetensors").read_bytes() == before
    assert_same(bitnet_jax.io.load(path), old)


def test_an_interrupted_save_leaves_nothing(path, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bitnet_jax.io.save(path, {"x": jnp.ones(1)})
    assert os.listdir(tmp_path) == []


def test_the_file_is_on_the_disk_before_its_name(path, monkeypatch):
    calls = []

    def watch(name, kind):
        real = getattr(os, name)

        def watched(*args):
            calls.append(kind(*args))
            return real(*args)

        monkeypatch.setattr(os, name, watched)

    def synced(descriptor):
        return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"

    watch("fsync", synced)
    watch("replace", lambda *_: "replace")
    bitnet_jax.io.save(path, {"x": jnp.ones(1)})
    assert calls == ["file", "replace", "folder"]


def test_a_folder_that_cannot_be_synced(path, monkeypatch):
    real = os.fsync

    def fsync(descriptor, code):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", lambda d: fsync(d, errno.EINVAL))
    assert_same(round_trip(path, {"x": jnp.ones(1)}), {"x": jnp.ones(1)})
    monkeypatch.setattr(os, "fsync", lambda d: fsync(d, errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        bitnet_jax.io.save(path, {"x": jnp.ones(1)})


def test_mode_and_links_are_kept(path, tmp_path):
    tree = {"x": jnp.ones(1)}
    bitnet_jax.io.save(path, tree)
    fresh = tmp_path / "plain"
    fresh.write_bytes(b"")
    assert os.stat(path).st_mode == os.stat(fresh).st_mode
    os.chmod(path, 0o600)
    os.symlink(path, tmp_path / "latest")
    bitnet_jax.io.save(tmp_path / "latest", {"x": jnp.zeros(2)})
    assert os.path.islink(tmp_path / "latest")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert bitnet_jax.io.load(path)["x"].shape == (2,)


def test_pathlike_and_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bitnet_jax.io.save("model", {"x": jnp.ones(1)})
    assert_same(bitnet_jax.io.load(tmp_path / "model"), {"x": jnp.ones(1)})
