"""Ten thousand files that somebody made up: each is refused in time, or is a tree.

Headers are changed as JSON and signed again, so that the digest does not stand
before what is tested. Whoever signs a file may say anything in it that is a tree.
"""

import json
import signal

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from damaged_files import contents, tree
from io_files import assert_same, canonical, join, signed, split

import bitnet_jax.io

SECONDS = 30  # the largest of these files takes one, on a machine that is not busy
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**47, 2**48, 2**60, 2**63, 2**64, 10**400, 10**4299, -(10**4299)]),
    st.floats(),
)
NAMES = st.one_of(
    st.sampled_from(
        ["dtype", "shape", "data_offsets", "kind", "path", "config", "packed", "array", "empty"]
        + ["int8", "uint8", "U8", "F32", "BF16", "BOOL", "F64", "float64", "int64", "bool", "int4"]
        + ["layer/kernel.codes", "layer/kernel", "trits", "stored", "1", "2", "tensor", "channel"]
        + ["", "\x1b[2J", "\ud800", "\u202e", "\n", "__metadata__", "a" * 5000]
    ),
    st.text(max_size=3),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, NAMES, st.none(), st.booleans()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(NAMES, inner, max_size=4),
        st.builds(lambda value, n: [value] * n, inner, st.sampled_from([64, 65, 1000])),
    ),
    max_leaves=6,
)


def nested(value, depth, wrap):
    for _ in range(depth):
        value = {"a": value} if wrap else [value]
    return value


DEEP = st.builds(nested, NUMBERS, st.sampled_from([50, 101, 500, 950]), st.booleans())


def nodes(value, path=()):
    """The paths of everything in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from nodes(inner, (*path, key))


def change(draw, value):
    """A JSON value with one place in it replaced, dropped, doubled or moved."""
    path = draw(st.sampled_from(sorted(nodes(value), key=repr)))
    if not path:
        return draw(VALUES)
    *folders, last = path
    node = value
    for key in folders:
        node = node[key]
    kind = draw(st.sampled_from(["replace", "number", "drop", "copy", "rename", "deep"]))
    if kind == "drop":
        del node[last]
    elif kind == "copy":
        other = draw(st.sampled_from(sorted(nodes(value), key=repr)))
        found = value
        for key in other:
            found = found[key]
        node[last] = json.loads(json.dumps(found))
    elif kind == "rename" and isinstance(node, dict):
        node[draw(NAMES)] = node.pop(last)
    else:
        node[last] = draw({"number": NUMBERS, "deep": DEEP}.get(kind, VALUES))
    return value


def change_data(draw, data):
    """Bytes with some of them changed, more or lost."""
    raw = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw)))
        new = draw(st.binary(max_size=8))
        raw[at : at + draw(st.sampled_from([0, len(new), len(new), 8]))] = new
    return bytes(raw)


@st.composite
def files(draw, sound):
    """A changed file, and whether it was signed again."""
    content = draw(st.sampled_from(sorted(sound)))
    if draw(st.integers(0, 5)) == 0:
        return change_data(draw, content), False
    header, data = split(content)
    for _ in range(draw(st.integers(1, 3))):
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        where = draw(st.sampled_from(["header", "leaves", "leaves", "data"]))
        if where == "data":
            data = change_data(draw, data)
        elif where == "header" or not isinstance(metadata, dict):
            header = change(draw, header)
        else:
            try:
                leaves = json.loads(metadata["leaves"])
            except (KeyError, TypeError, ValueError, RecursionError):
                continue
            text = canonical if draw(st.integers(0, 9)) else json.dumps
            metadata["leaves"] = text(change(draw, leaves))
    try:
        return signed(header, data), True
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError, OverflowError):
        return join(header, data), False


class HangError(BaseException):
    """Nothing in the package catches it."""


def alarm(*_):
    raise HangError


@pytest.mark.slow
def test_ten_thousand_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path, found = contents(folder)
    outcomes = {"tree": 0, "refused": 0}

    @hypothesis.settings(max_examples=10_000)
    @hypothesis.given(files(list(found.values())))
    def examine(made):
        content, is_signed = made
        with open(path, "wb") as file:
            file.write(content)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            results, texts = [], []
            for mmap in (False, True):
                try:
                    results.append(bitnet_jax.io.load(path, mmap=mmap))
                except bitnet_jax.io.FormatError as error:
                    results.append(None)
                    texts.append(str(error))
            assert all(text.isprintable() and len(text) < 2500 for text in texts)
            loaded, mapped = results
            assert (loaded is None) == (mapped is None)
            outcomes["refused" if loaded is None else "tree"] += 1
            if loaded is not None and not is_signed:
                assert_same(loaded, tree())
            elif loaded is not None:  # it is a tree: jax walks it, and save writes it
                bitnet_jax.io.save(folder / "again", loaded)
                again = bitnet_jax.io.load(folder / "again")
                for a, b in zip(leaves(loaded), leaves(again), strict=True):
                    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, alarm)
    try:
        examine()
    finally:
        signal.signal(signal.SIGALRM, before)
    print(outcomes)
    assert min(outcomes.values()) > 100


def leaves(node):
    """The arrays of a tree whose keys, str beside int, JAX would not sort."""
    if isinstance(node, dict):
        return [leaf for key in sorted(node, key=repr) for leaf in leaves(node[key])]
    return jax.tree.leaves(node)
