"""What load does with memory, mappings and devices; what it promises is in test_file_damage."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from io_files import assert_same, canonical, gaussian, join, pack, signed, split

import bitnet_jax as bj
import bitnet_jax.io
from bitnet_jax._native.sha256 import streams
from bitnet_jax.io import _chunks, _safetensors


def run(code, *arguments, devices=1):
    """A fresh interpreter with so many CPU devices; what it printed."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# Chunks.


def large():
    """Kernels and arrays of several chunks, none of a whole number of them."""
    shape = (3, 1201, 1807)  # 3 x 301 x 1807 bytes, padded
    bits = np.random.default_rng(0).integers(0, 81, (3, 301, 1807))
    fields = np.stack([bits // 3**i % 3 for i in range(4)])
    fields[1:, :, -1] = 1  # one code of the last byte is used
    codes = (fields << np.arange(0, 8, 2)[:, None, None, None]).sum(0).astype(np.uint8)
    stacked = bj.PackedTernary(jnp.asarray(codes), jnp.ones((3, 1, 1)), length=shape[1])
    return {
        "stacked": stacked,
        "head": pack((1500, 1000), bj.Int8Config()),
        "embedding": jnp.asarray(gaussian((999, 777)), jnp.bfloat16),
        "step": np.int64(7),
    }


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_of_many_chunks_come_back(path, dense, mmap):
    tree = large()
    bitnet_jax.io.save(path, tree, dense=dense)
    assert_same(bitnet_jax.io.load(path, mmap=mmap), tree)
    with open(path, "rb") as file:
        header, data = split(file.read())
    assert len(data) > 4 * _safetensors.CHUNK
    # The digest is the one that the head of the module draws, for version 1 too.
    assert split(signed(header, data))[0] == header
    header["__metadata__"]["version"] = "1"
    with open(path, "wb") as file:
        file.write(signed(header, data))
    assert_same(bitnet_jax.io.load(path, mmap=mmap), tree)


@pytest.mark.parametrize("mmap", [False, True])
def test_damage_in_any_chunk_is_found(path, mmap):
    bitnet_jax.io.save(path, large())
    with open(path, "rb") as file:
        header, _ = split(file.read())
    size = os.path.getsize(path)
    data = max(e["data_offsets"][1] for name, e in header.items() if name != "__metadata__")
    for at in range(size - 1, size - data, -(_safetensors.CHUNK // 2)):
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
            file.flush()
            with pytest.raises(bitnet_jax.io.FormatError, match="was changed after it was"):
                bitnet_jax.io.load(path, mmap=mmap)
            file.seek(at)
            file.write(bytes([byte]))
    assert_same(bitnet_jax.io.load(path, mmap=mmap), large())


def test_a_code_of_three_in_a_late_chunk_with_a_valid_digest(path):
    bitnet_jax.io.save(path, large())
    with open(path, "rb") as file:
        header, data = split(file.read())
    begin, end = header["stacked.codes"]["data_offsets"]
    for at, value in ((end - 3000, 0xFF), (end - 1, 0x95), (begin + 301 * 1807 - 5, 0x59)):
        raw = bytearray(data)
        raw[at] = value
        with open(path, "wb") as file:
            file.write(signed(header, bytes(raw)))
        with pytest.raises(bitnet_jax.io.FormatError, match="'stacked' has 1 bytes with a code"):
            bitnet_jax.io.load(path)


def test_large_tensors_start_at_multiples_of_64(path):
    tree = {f"{i}": np.zeros(n, np.uint8) for i, n in enumerate((640, 3, 128, 40, 0, 6))}
    bitnet_jax.io.save(path, tree | {"k": pack((256, 64)), "x": np.zeros(5)})
    with open(path, "rb") as file:
        content = file.read()
    header, data = split(content)
    places = {k: v["data_offsets"] for k, v in header.items() if k != "__metadata__"}
    assert (len(content) - len(data)) % 64 == 0
    aligned = {name for name, (begin, end) in places.items() if begin % 64 == 0}
    assert aligned >= {"0", "2", "k.codes"}
    assert all(
        begin % min(64, (end - begin) & -(end - begin) or 64) == 0 for begin, end in places.values()
    )


def test_reading_without_preadv(path, monkeypatch):
    bitnet_jax.io.save(path, large())
    monkeypatch.delattr(os, "preadv")
    assert_same(bitnet_jax.io.load(path), large())


def test_a_file_that_ends_while_it_is_read(path, monkeypatch):
    bitnet_jax.io.save(path, {"x": jnp.ones(100)})
    monkeypatch.setattr(_chunks.Source, "_read_at", lambda *_: 0)
    with pytest.raises(bitnet_jax.io.FormatError, match="it ended inside 'x' while it was read"):
        bitnet_jax.io.load(path)


# Memory.

MEMORY = """
import ctypes, gc, sys, jax, jax.numpy as jnp, numpy as np, bitnet_jax as bj
path, what = sys.argv[1:]
MIB, COUNT = 1 << 20, 12
def status(field):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024
def tree(size):
    raw = np.random.default_rng(0).integers(0, 256, (size,), np.uint8)
    arrays = {f"a{i}": jax.device_put(raw ^ np.uint8(i), rows) for i in range(COUNT - 1)}
    codes = jax.device_put(np.full((size // 1024, 1024), 0x99, np.uint8), rows)
    return arrays | {"kernel": bj.PackedTernary(codes, jnp.ones((1, 1)), length=size // 256)}
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def place(tree):
    kernel = tree["kernel"]
    return {k: rows for k in tree} | {"kernel": bj.PackedTernary(rows, whole, kernel.length)}
# Once with a small tree: what is imported and compiled is there before.
small = tree(MIB)
bj.io.save(path + ".small", small, dense=True)
jax.block_until_ready(bj.io.load(path + ".small", sharding=place))
loaded = None if "load" in what else jax.block_until_ready(tree(16 * MIB))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, and is not found again unseen
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = status("VmRSS")
if "load" in what:
    loaded = bj.io.load(path, sharding=place if "sharded" in what else None)
    before += COUNT * 16 * MIB
else:
    bj.io.save(path, loaded, dense="dense" in what)
print((status("VmHWM") - before) / MIB)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads /proc")
@cases(
    ("devices", "kind"),
    [(devices, kind) for devices in (1, 8) for kind in ("", " dense")],
    core=[(1, "")],
)
def test_memory_beside_the_tree_is_one_tensor(path, devices, kind):
    """One of 12 tensors of 16 MiB, and the chunks that are on their way, a MiB each."""
    calls = [call + kind for call in ("save", "load", "sharded load")]
    extra = {call: float(run(MEMORY, path, call, devices=devices)) for call in calls}
    batches = streams() * (_chunks._BATCHES_AHEAD + 1)
    flying = {call: batches if "load" in call else _chunks._AHEAD for call in calls}
    assert all(extra[call] < 16 + 6 + 1.5 * flying[call] for call in calls), extra
    assert extra.get("load", 0) < 6  # what was read is the array


# Mappings.


def address(array):
    return array.unsafe_buffer_pointer()


def test_a_mapped_file_is_the_memory_of_the_arrays(path):
    tree = {"k": pack((256, 64)), "odd": jnp.ones(3), "step": np.int64(2**40)}
    bitnet_jax.io.save(path, tree)
    one, two = (bitnet_jax.io.load(path, mmap=True) for _ in range(2))
    assert_same(one, tree)
    with open("/proc/self/maps") as file:
        maps = [line.split() for line in file if path in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for loaded in (one, two):
        assert any(a <= address(loaded["k"].codes) < b for a, b in ranges)
    assert address(one["k"].codes) != address(two["k"].codes)
    assert not one["step"].flags.writeable


def test_what_was_read_is_the_memory_of_the_arrays(path, monkeypatch):
    bitnet_jax.io.save(path, {"k": pack((256, 64))})
    seen, real = [], _chunks._destination
    monkeypatch.setattr(_chunks, "_destination", lambda *a: seen.append(real(*a)) or seen[-1])
    codes = bitnet_jax.io.load(path)["k"].codes
    assert address(codes) in {raw.ctypes.data for raw in seen}


def test_mapped_arrays_may_be_donated(path):
    bitnet_jax.io.save(path, {"x": jnp.zeros(1024)})
    x = bitnet_jax.io.load(path, mmap=True)["x"]
    y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert float(y[0]) == 1.0
    assert_same(bitnet_jax.io.load(path), {"x": jnp.zeros(1024)})


def test_mapped_arrays_outlive_the_file(path):
    tree = {"k": pack((256, 64))}
    bitnet_jax.io.save(path, tree)
    loaded = bitnet_jax.io.load(path, mmap=True)
    bitnet_jax.io.save(path, {"k": pack((256, 64), bj.PHASE4)})
    os.unlink(path)
    assert_same(loaded, tree)


def test_a_mapped_file_of_unaligned_data_comes_back(path):
    tree = {"x": gaussian((5, 3)), "y": np.float64([0.5]), "z": jnp.ones(2, jnp.bfloat16)}
    bitnet_jax.io.save(path, tree)
    with open(path, "rb") as file:
        header, data = split(file.read())
    for spaces in range(8):  # a header of any length
        raw = (canonical(header) + " " * spaces).encode()
        with open(path, "wb") as file:
            file.write(join(raw, data))
        assert_same(bitnet_jax.io.load(path, mmap=True), tree)


# Devices.

SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np, bitnet_jax as bj
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
path, = sys.argv[1:]
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
def at(*spec):
    return NamedSharding(mesh, P(*spec))
w = np.random.default_rng(0).standard_normal((64, 32), np.float32)
tree = {
    "layer": {"kernel": bj.pack(w, bj.PHASE4), "bias": jnp.arange(32.0), "none": {}},
    "head": bj.pack(w, bj.Int8Config()),
    "seven": jnp.ones((8, 4), jnp.bfloat16),
}
want = {
    "layer": {
        "kernel": bj.PackedTernary(at("x", "y"), at(None, "y"), length=64), "bias": at("y"),
        "none": {},
    },
    "head": bj.PackedInt8(at("y", "x"), at(None, "x")),
    "seven": at(("x", "y")),
}
def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
def placed(loaded, shardings):
    same(loaded, tree)
    one, two = loaded["layer"]["kernel"], shardings["layer"]["kernel"]
    assert (one.codes.sharding, one.scale.sharding) == (two.codes, two.scale)
    assert loaded["layer"]["bias"].sharding == shardings["layer"]["bias"]
    assert loaded["head"].codes.sharding == shardings["head"].codes
    assert loaded["seven"].sharding == shardings["seven"]
    assert all(x.committed for x in jax.tree.leaves(loaded))
for dense in (False, True):
    bj.io.save(path, tree, dense=dense)
    for mmap in (False, True):
        loaded = bj.io.load(path, mmap=mmap, sharding=want)
        placed(loaded, want)
        assert loaded["layer"]["kernel"].codes.addressable_shards[0].data.shape == (8, 8)
        def make(abstract):
            assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
            assert jax.tree.structure(abstract) == jax.tree.structure(tree)
            assert abstract["layer"]["kernel"].shape == (64, 32)
            return want
        placed(bj.io.load(path, mmap=mmap, sharding=make), want)
        # One for all; one for all of a subtree; a function of jax.tree.map.
        everywhere = bj.io.load(path, mmap=mmap, sharding=at())
        same(everywhere, tree)
        assert {x.sharding for x in jax.tree.leaves(everywhere)} == {at()}
        second = SingleDeviceSharding(jax.devices()[1])
        mixed = bj.io.load(path, mmap=mmap, sharding={**want, "layer": second})
        assert {x.sharding for x in jax.tree.leaves(mixed["layer"])} == {second}
        mapped = bj.io.load(path, sharding=lambda tree: jax.tree.map(lambda _: second, tree))
        assert {x.sharding for x in jax.tree.leaves(mapped)} == {second}
    # What was loaded is saved again, gathered, to the same bytes.
    bj.io.save(path + ".again", loaded, dense=dense)
    assert open(path, "rb").read() == open(path + ".again", "rb").read()
# Refused before data is read: the data is damaged, and that is not what the errors say.
with open(path, "r+b") as file:
    file.seek(-1, 2)
    file.write(b"?")
def refused(kind, text, sharding):
    try:
        bj.io.load(path, sharding=sharding)
    except kind as error:
        assert type(error) is kind and text in str(error), error
        assert str(error).startswith("load: `sharding` "), error
    else:
        raise AssertionError(text)
layer = want["layer"]
refused(TypeError, "NamedSharding(mesh, spec)", P("x"))
bare = layer | {"bias": P()}
refused(TypeError, "at layer/bias, got a P", {**want, "layer": bare})
refused(TypeError, "a dict with the keys ['head', 'layer', 'seven'] at the tree, got a int, 3", 3)
refused(TypeError, "at head, got a NoneType", {**want, "head": None})
refused(TypeError, "a PackedInt8 of two at head", {**want, "head": want["layer"]["kernel"]})
refused(TypeError, "at head.scale, got a NoneType", {**want, "head": bj.PackedInt8(at(), None)})
refused(ValueError, "it lacks", {k: v for k, v in want.items() if k != "head"})
refused(ValueError, "at layer: ", {**want, "layer": layer | {"more": at()}})
refused(ValueError, "layer/kernel.scale of shape (1, 32)", {**want, "layer": at("x")})
refused(ValueError, "Codes and scale", {**want, "layer": layer | {"kernel": at("x")}})
refused(ValueError, "does not fit layer/bias of shape (32,)", {**want, "layer": at("x", "y")})
refused(ValueError, "does not fit seven of shape (8, 4)", {**want, "seven": at(None, ("x", "y"))})
bj.io.save(path, {"x": jnp.ones(8), "step": np.int64(3)})
refused(ValueError, "step of int64, which JAX would make 32 bits", at())
assert bj.io.load(path)["step"] == 3
print("sharded")
"""


def test_arrays_go_straight_onto_their_devices(path):
    assert run(SHARDED, path, devices=8) == "sharded"


def test_arguments_of_another_kind_are_refused(path):
    bitnet_jax.io.save(path, {"x": jnp.ones(1)})
    with pytest.raises(TypeError, match="load: `mmap` must be a bool, got"):
        bitnet_jax.io.load(path, mmap=1)
    with pytest.raises(TypeError, match="save: `dense` must be a bool, got"):
        bitnet_jax.io.save(path, {"x": jnp.ones(1)}, dense="yes")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="is a device or a pipe"):
            bitnet_jax.io.load(name)
