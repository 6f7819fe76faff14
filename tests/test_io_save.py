"""A save is all or nothing, whatever happens while it writes."""

import errno
import os
import stat

import jax.numpy as jnp
import pytest
from io_files import assert_same, pack

import bitnet_jax.io
from bitnet_jax.io import _container


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.bitnet.safetensors")


def round_trip(path, tree):
    bitnet_jax.io.save(path, tree)
    return bitnet_jax.io.load(path)


@pytest.mark.parametrize("call", ["replace", "fsync", "write"])
def test_a_failed_save_leaves_the_old_file(path, tmp_path, monkeypatch, call):
    old = {"kernel": pack()}
    bitnet_jax.io.save(path, old)
    before = (tmp_path / "model.bitnet.safetensors").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(_container, "encode", lambda *_: 3)
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
