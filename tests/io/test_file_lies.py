"""Damage: what was changed after it was written does not come back, whatever was changed."""

import dataclasses
import json
import os
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from io_files import GROUPS, assert_same, canonical, digest, gaussian, join, pack, signed, split

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax.io import _safetensors

FormatError = bitnet_jax.io.FormatError


def tree():
    """A bit of everything."""
    return {
        "layer": {"kernel": pack((10, 9), bj.PHASE4), "bias": jnp.ones(9, jnp.bfloat16)},
        "conv": {"kernel": pack((2, 3, 4, 5), GROUPS, contracting_axes=(0, 1, 2))},
        "head": {"kernel": bj.pack(jnp.asarray(gaussian((6, 3))), bj.Int8Config())},
        "naïve key": {0: np.int64(3), 1: {}, 2: np.array([True, False])},
        "raw": np.ones(2, ml_dtypes.int4),
    }


def as_version_1(content):
    """The file as version 1 signed it, its header padded to 8 bytes as then."""
    header, data = split(content)
    header["__metadata__"]["version"] = "1"
    header["__metadata__"]["sha256"] = digest(header, data)
    raw = canonical(header).encode()
    return join(raw.ljust(len(raw) + -len(raw) % 8), data)


def contents(folder):
    """The bytes of a small file of every kind that is read."""
    path = str(folder / "small.bitnet.safetensors")
    found = {}
    for name, dense in (("plain", False), ("dense", True)):
        bitnet_jax.io.save(path, tree(), dense=dense)
        with open(path, "rb") as file:
            found[name] = file.read()
    return path, found | {"version 1": as_version_1(found["plain"])}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small plain file, and a place to write it changed."""
    path, found = contents(tmp_path_factory.mktemp("small"))
    return path, found["plain"]


@pytest.fixture(scope="module", params=["plain", "dense", "version 1"])
def each(request, tmp_path_factory):
    """The bytes of a small file of each kind, and a place to write it changed."""
    path, found = contents(tmp_path_factory.mktemp("each"))
    return path, found[request.param]


def test_each_kind_of_file_comes_back(each):
    path, content = each
    with open(path, "wb") as file:
        file.write(content)
    assert_same(bitnet_jax.io.load(path), tree())
    assert_same(bitnet_jax.io.load(path, mmap=True), tree())


def refused(path, content, match="load: "):
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(FormatError, match=match) as error:
        bitnet_jax.io.load(path)
    assert str(error.value).startswith(f"load: {path!r} ")
    return str(error.value)


def test_every_flipped_bit_is_refused(each):
    path, content = each
    assert 2000 < len(content) < 4000
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


def test_every_truncation_is_refused(each):
    path, content = each
    for length in range(len(content)):
        refused(path, content[:length])


@pytest.mark.parametrize("more", [1, 8, 5000])
def test_appended_bytes_are_refused(each, more):
    path, content = each
    refused(path, content + b"\0" * more, f"has {more} bytes after its last tensor")


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
    monkeypatch.setattr(_safetensors, "MAX_HEADER", 100)
    refused(path, content, "header of .* bytes; the most is 100")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            b'"layer/bias":{',
            b'"layer/bias":{"dtype":"BF16","shape":[9],"data_offsets":[0,18]},"layer/bias":{',
        ),
        (b'"version":"2"', b'"version":"2","version":"2"'),
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
    for content in (join(header, data), signed(header, data)):
        refused(path, content, "declares 'layer/kernel.codes' as U8 .* and holds I8")


def mutated(random, header):
    """A header, as bytes, with one to three bytes or numbers in it changed, added or lost."""
    raw = bytearray(header)
    for _ in range(random.integers(1, 4)):
        at = random.integers(len(raw))
        kind = random.integers(5)
        if kind == 0:
            raw[at] = random.integers(256)
        elif kind == 1:
            del raw[at : at + random.integers(1, 9)]
        elif kind == 2:
            raw[at:at] = random.choice(
                list(b' ,:{}[]"0123456789eE.-'), random.integers(1, 4)
            ).tolist()
        elif kind == 3:  # two pieces change places
            other, size = random.integers(len(raw)), random.integers(1, 30)
            one, two = raw[at : at + size], raw[other : other + size]
            if abs(at - other) >= size and len(one) == len(two):
                raw[at : at + size], raw[other : other + size] = two, one
        else:
            digits = [i for i, byte in enumerate(raw) if byte in b"0123456789"]
            raw[random.choice(digits)] = random.integers(ord("0"), ord("9") + 1)
    return bytes(raw)


def test_random_headers_are_refused_or_mean_the_same(each):
    path, content = each
    end = 8 + int.from_bytes(content[:8], "little")
    random, refusals = np.random.default_rng(0), 0
    for _ in range(500):
        header = mutated(random, content[8:end])
        with open(path, "wb") as file:
            file.write(join(header, content[end:]))
        try:
            got = bitnet_jax.io.load(path)
        except FormatError:
            refusals += 1
        else:
            assert_same(got, tree())
    assert 400 < refusals < 500  # some changes are of spaces


def test_every_relabelled_dtype_is_refused(each):
    path, content = each
    header, data = split(content)
    for name in header.keys() - {"__metadata__"}:
        for tag in _safetensors.TAGS.values():
            if tag != header[name]["dtype"]:
                refused(path, join(header | {name: header[name] | {"dtype": tag}}, data))


def test_every_duplicate_key_is_refused(each):
    path, content = each
    header, data = split(content)
    for key, entry in header.items():
        twice = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}"
        refused(path, join(twice.encode(), data), "is there twice")
        for inner, value in entry.items():
            raw = json.dumps(entry)[:-1] + f", {json.dumps(inner)}: {json.dumps(value)}}}"
            twice = json.dumps(header).replace(json.dumps(entry), raw)
            refused(path, join(twice.encode(), data), "is there twice")


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
        ("version", "3", "of version '3', .* Update bitnet_jax"),
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
    change({"/".join(map(str, leaf["path"])): leaf for leaf in leaves}, leaves)
    header["__metadata__"]["leaves"] = canonical(leaves)
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


@pytest.mark.parametrize("shape", [[0, 2**60], [0, 2**47, 4], [0] * 65], ids=str)
def test_a_shape_that_no_array_has(path, shape):
    bitnet_jax.io.save(path, {"x": np.zeros((0, 2), np.float32)})
    with open(path, "rb") as file:
        header, data = split(file.read())
    leaves = json.loads(header["__metadata__"]["leaves"])
    leaves[0]["shape"] = shape
    header["__metadata__"]["leaves"] = canonical(leaves)
    refused(path, signed(header, data), "declares 'x' as")
    header["x"]["shape"] = shape
    refused(path, signed(header, data), "'x' has shape")


def test_claims_beyond_the_file_cost_nothing(path):
    header = {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    refused(path, join(header, b""), "is truncated: 'x' ends at")
    header["x"] = {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}
    refused(path, join(header, b""), "'x' has shape")
    header["x"] = {"dtype": "U8", "shape": [1], "data_offsets": [10**4299 * 9, 10**4299 * 9 + 1]}
    refused(path, join(header, b""), "an integer of 4300 digits")
    header["x"]["data_offsets"] = [2**63, 2**63 + 1]
    refused(path, join(header, b""), "an integer of 19 digits")


def test_a_header_of_long_numbers_is_refused_at_once(path):
    raw = b'{"x":[' + b",".join([b"9" * 4299] * 4000) + b"]}"
    start = time.process_time()
    refused(path, join(raw, b""), "an integer of 4299 digits")
    assert time.process_time() - start < 1  # its square would be several seconds


def test_a_leaf_too_deep_is_refused(small):
    path, content = small
    deep = with_leaves(content, lambda named, _: named["layer/bias"].update(path=["a"] * 101))
    refused(path, deep, "at most 100")
    nested = b'{"x":' + b'{"a":' * 900 + b"1" + b"}" * 901
    refused(path, join(nested, b""))


@pytest.mark.parametrize("key", ["a\x1b[31m", "a\u202eb", "\ud800", "a\nb"])
def test_keys_that_a_terminal_would_obey_are_refused(small, key):
    path, content = small
    changed = with_leaves(
        content, lambda named, _: named["layer/bias"].update(path=[key]), {"layer/bias": key}
    )
    assert refused(path, changed, "printable").isprintable()


def test_a_long_name_makes_no_long_error(small):
    path, content = small
    header, data = split(content)
    header["n" * 10**6] = header.pop("raw")
    assert len(refused(path, join(header, data), "lacks|declares")) < 2000


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
