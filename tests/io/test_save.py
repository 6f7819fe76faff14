"""A save is all or nothing, whatever happens while it writes."""

import errno
import os
import stat
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from io_files import assert_same, pack, round_trip

import bitnet_jax.io
from bitnet_jax.io import _safetensors


@pytest.mark.parametrize("call", ["replace", "fsync", "write"])
def test_a_failed_save_leaves_the_old_file(path, tmp_path, monkeypatch, call):
    old = {"kernel": pack()}
    bitnet_jax.io.save(path, old)
    before = (tmp_path / "model.bitnet.safetensors").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(_safetensors, "encode", lambda *_: 3)
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


FULL = """
import os, resource, signal, sys, numpy as np, bitnet_jax as bj
path, = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
for size in (6 << 20, (5 << 20) - 100):  # within the data, and at its last bytes
    try:
        bj.io.save(path, {"x": np.ones(size, np.uint8)})
    except OSError as error:
        print(error.strerror)
"""


def test_a_disk_that_fills_leaves_the_old_file(path, tmp_path):
    old = {"kernel": pack()}
    bitnet_jax.io.save(path, old)
    done = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n") == ["File too large"] * 2 + [""], done.stderr
    assert os.listdir(tmp_path) == ["model.bitnet.safetensors"]
    assert_same(bitnet_jax.io.load(path), old)


LOOP = """
import sys, numpy as np, bitnet_jax as bj
path, = sys.argv[1:]
trees = [
    {f"{i}": np.random.default_rng(10 * t + i).integers(0, 2**63, 1 << 18) for i in range(8)}
    for t in range(2)
]
print("ready", flush=True)
while True:
    for tree in trees:
        bj.io.save(path, tree)
        print("saved", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_save_leaves_one_whole_file(path, tmp_path, seed):
    """16 MiB that do not compress, over a file that was good, killed at 30 moments."""
    random = np.random.default_rng(seed)
    trees = [
        {f"{i}": np.random.default_rng(10 * t + i).integers(0, 2**63, 1 << 18) for i in range(8)}
        for t in range(2)
    ]
    bitnet_jax.io.save(path, trees[0])
    torn = 0
    for _ in range(30):
        child = subprocess.Popen([sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        for _ in range(random.integers(3)):
            child.stdout.readline()
        time.sleep(random.uniform(0, 0.15))
        child.kill()
        child.wait()
        child.stdout.close()
        loaded = bitnet_jax.io.load(path)
        assert any(all((loaded[k] == tree[k]).all() for k in tree) for tree in trees)
        left = [name for name in os.listdir(tmp_path) if name != os.path.basename(path)]
        for name in left:  # what the killed process wrote aside
            assert name.startswith(".bitnet_jax-")
            assert name.endswith(".tmp")
            try:
                loaded = bitnet_jax.io.load(tmp_path / name)
            except bitnet_jax.io.FormatError:
                torn += 1
            else:  # killed before it was moved into place
                assert any(all((loaded[k] == tree[k]).all() for k in tree) for tree in trees)
            os.unlink(tmp_path / name)
    assert torn > 5  # the moments were within a save
