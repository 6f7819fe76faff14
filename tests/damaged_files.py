"""Small files of every kind, to be damaged and signed anew."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from io_files import GROUPS, canonical, digest, gaussian, join, pack, signed, split

import bitnet_jax as bj
import bitnet_jax.io

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


def refused(path, content, match="load: "):
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(FormatError, match=match) as error:
        bitnet_jax.io.load(path)
    assert str(error.value).startswith(f"load: {path!r} ")
    return str(error.value)


def with_leaves(content, change, rename=None):
    """A signed file whose description was changed by a function of its leaves by path."""
    header, data = split(content)
    leaves = json.loads(header["__metadata__"]["leaves"])
    change({"/".join(map(str, leaf["path"])): leaf for leaf in leaves}, leaves)
    header["__metadata__"]["leaves"] = canonical(leaves)
    for old, new in (rename or {}).items():
        header[new] = header.pop(old)
    return signed(header, data)
