"""What the tests of files share: kernels, files signed without the package, comparisons."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

import bitnet_jax as bj

CHUNK = 1 << 20
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


def gaussian(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def pack(shape=(24, 10), config=bj.B158, dtype=np.float32, **axes):
    return bj.pack(jnp.asarray(gaussian(shape, dtype=dtype)), config, **axes)


def assert_same(got, want):
    """The same structure, static data included, the same dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def round_trip(path, tree):
    bj.io.save(path, tree)
    return bj.io.load(path)


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def split(content):
    """A file's header and data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def digest(header, data):
    """The digest as the head of ``_container`` draws it, of one byte string."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    parts = [str(len(tensors))]
    for name in sorted(tensors):
        begin, end = tensors[name]["data_offsets"]
        raw = data[begin:end]
        if metadata.get("version") != "1":
            pieces = [raw[at : at + CHUNK] for at in range(0, len(raw), CHUNK)]
            raw = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
        parts += [name, tensors[name]["dtype"], canonical(tensors[name]["shape"]), raw]
    for key in sorted(metadata):
        parts += [key, metadata[key]]
    message = b""
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        message += len(raw).to_bytes(8, "little") + raw
    return hashlib.sha256(message).hexdigest()


def signed(header, data):
    """A file with a valid digest, so that what comes after it is what refuses."""
    metadata = {**header["__metadata__"], "sha256": digest(header, data)}
    return join({**header, "__metadata__": metadata}, data)
