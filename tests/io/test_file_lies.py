"""Files that contradict themselves, with a valid digest, are refused."""

import dataclasses
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from damaged_files import FormatError, refused, with_leaves
from io_files import canonical, join, pack, signed, split

import bitnet_jax.io


def edited(content, **changes):
    """The header with one tensor's entry changed by each keyword."""
    header, data = split(content)
    header["layer/bias"].update(changes)
    return join(header, data)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "F4"}, "unknown dtype"),
        ({"dtype": ["BF16"]}, "unknown dtype"),
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
        ("version", "4", "of version '4', .* Update bitnet_jax"),
        ("version", None, "of version None"),
        ("leaves", None, "does not describe its leaves"),
        ("leaves", "{}", "canonical JSON"),
        ("leaves", "[NaN]", "does not describe its leaves"),
        ("leaves", "[[[", "does not describe its leaves"),
        ("leaves", "[" * 100_000, "does not describe its leaves"),
        ("leaves", "[1]", "invalid description of a leaf"),
        ("leaves", '[{"kind":[]}]', "invalid description of a leaf"),
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
    refused(path, join(header, data), "must map strings to strings")
    header["__metadata__"] = {"format": 1}
    refused(path, join(header, data), "must map strings to strings")


def test_unknown_metadata_is_under_the_digest(small):
    path, content = small
    header, data = split(content)
    header["__metadata__"]["note"] = "mine"
    refused(path, join(header, data), "was changed after it was written")


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
        ({"kind": "prepared"}, "invalid description of a leaf"),
        ({"more": 1}, "invalid description of a leaf"),
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
