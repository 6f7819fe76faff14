"""A checkpoint's description: its format, its digests, and lies in it."""

import copy
import hashlib
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import OPTIMIZERS, FormatError, gaussian, packed_tree, small

import bitnet_jax as bj
from bitnet_jax.io import _description

pytestmark = pytest.mark.standard_promotion  # optax's adamw raises under the strict one


def test_a_description_is_json_and_returns_from_it():
    for tree in (
        packed_tree(),
        OPTIMIZERS["mugrokfast"]().init({"l": {"kernel": jnp.ones((4, 4))}}),
    ):
        about = bj.io.describe(tree)
        assert json.loads(json.dumps(about)) == about
        bj.io.check(tree, json.loads(json.dumps(about)))


def test_digests_are_what_the_module_says():
    kernel, large = bj.pack(gaussian((8, 3))), gaussian((300_000,))  # more than a MiB
    about = bj.io.describe({"kernel": kernel, "large": large})

    def sha256(*parts):
        return hashlib.sha256(b"".join(parts))

    def of(array):
        raw, size = np.asarray(array).tobytes(), 1 << 20
        chunks = [sha256(raw[at : at + size]).digest() for at in range(0, len(raw), size)]
        return len(raw).to_bytes(8, "little") + b"".join(chunks)

    first, second = about["leaves"]
    assert first["sha256"] == sha256(of(kernel.codes), of(kernel.scale)).hexdigest()
    assert second["sha256"] == sha256(of(large)).hexdigest()
    bare = {key: value for key, value in about.items() if key != "sha256"}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert about["sha256"] == sha256(canonical.encode()).hexdigest()


def test_every_flipped_bit_of_a_description_is_refused():
    tree = {"k": bj.pack(gaussian((7, 3)))}
    text = json.dumps(bj.io.describe(tree)).encode()
    parsed = 0
    for position, bit in itertools.product(range(len(text)), range(8)):
        flipped = bytearray(text)
        flipped[position] ^= 1 << bit
        try:
            about = json.loads(flipped.decode())
        except ValueError:
            continue
        if about == json.loads(text):  # a space became another
            continue
        parsed += 1
        with pytest.raises(FormatError, match=r"^abstract: "):
            bj.io.abstract(about)
    assert parsed > 1000


def resealed(about):
    """Whoever wrote a wrong description took its digest too."""
    about = {key: about[key] for key in about if key != "sha256"}
    return {**about, "sha256": _description.digest_of(about)}


# Each with its digest made anew: what a kernel may declare, and what a description may.
LEAF_LIES = {
    "kind": [{"kind": "prepared"}, {"kind": "int8"}, {"kind": "empty"}, {"kind": None}],
    "path": [{"path": []}, {"path": "dense"}, {"path": [1.5]}, {"path": ["head"]}],
    "shape": [{"shape": [24, 10]}, {"shape": [23, -10]}, {"shape": [23]}, {"shape": [True, 10]}],
    "length": [{"length": 22}, {"length": 23.0}, {"length": None}],
    "dtype": [{"dtype": "int8"}, {"dtype": "object"}, {"dtype": 7}],
    "axes": [{"contracting_axes": [0]}, {"contracting_axes": []}, {"contracting_axes": [-3]}],
    "ndim": [{"kernel_ndim": 1}, {"kernel_ndim": 3}, {"kernel_ndim": True}],
    "config": [{"config": {}}, {"config": {"scale": "absmean"}}, {"config": None}],
    "scale": [{"scale_shape": [5, 1]}, {"scale_shape": [1]}, {"scale_shape": [0, 1]}],
    "scale type": [{"scale_shape": None}, {"scale_shape": [1.0, 1]}],
    "sha256": [{"sha256": 7}, {"sha256": None}],
    "extra": [{"codes": 0}, {"stored": "trits"}],
}
WHOLE_LIES = {
    "two leaves": lambda about: {"leaves": about["leaves"] * 2},
    "no list": lambda about: {"leaves": {}},
    "no leaves": lambda about: {"leaves": ["dense"]},
    "mappings": lambda about: {"mappings": 1},
    "extra key": lambda about: {"also": 1},
}


def assert_refused(lie, tree):
    with pytest.raises(FormatError, match=r"^abstract: the description .*Restore another step"):
        bj.io.abstract(lie)
    with pytest.raises(FormatError, match=r"^check: "):
        bj.io.check(tree, lie)


@pytest.mark.parametrize("name", LEAF_LIES)
def test_a_leaf_that_contradicts_itself_is_refused(name):
    tree = small()
    for change in LEAF_LIES[name]:
        lie = copy.deepcopy(bj.io.describe(tree))
        kernel = next(leaf for leaf in lie["leaves"] if leaf["path"] == ["dense", "kernel"])
        kernel.update(change)
        assert_refused(resealed(lie), tree)


@pytest.mark.parametrize("name", WHOLE_LIES)
def test_a_description_that_contradicts_itself_is_refused(name):
    about = bj.io.describe(small())
    assert_refused(resealed({**about, **WHOLE_LIES[name](about)}), small())


def test_a_leaf_inside_another_is_refused():
    tree = {"a": jnp.ones(1), "b": {"c": jnp.ones(1)}}
    about = bj.io.describe(tree)
    about["leaves"][1]["path"] = ["a", "c"]
    assert_refused(resealed(about), tree)


def test_other_formats_and_versions_are_refused():
    tree = small()
    about = bj.io.describe(tree)
    later = resealed({**about, "version": "3"})
    for call in (lambda d: bj.io.check(tree, d), bj.io.abstract):
        with pytest.raises(
            FormatError, match=r"version '3', and this bitnet_jax reads '1' and '2'. Update"
        ):
            call(later)
        for other in (None, [], "about", {}, {**about, "format": "bitnet_jax"}, {"tree": about}):
            with pytest.raises(
                FormatError, match=r"the description is not one of bj.io.describe: "
            ):
                call(other)
        with pytest.raises(FormatError, match="was changed after it was made"):
            call({**about, "leaves": about["leaves"][:-1]})
        with pytest.raises(FormatError, match="is not JSON"):
            call({**about, "leaves": object()})
        with pytest.raises(FormatError, match="is not JSON"):
            call({**about, "leaves": [float("nan")]})
