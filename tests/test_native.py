"""The native CPU product: every instruction set, the loader, threads and bad buffers."""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import kernel_suite as suite
import numpy as np
import pytest

import bitnet_jax as bj
from bitnet_jax._matmul import native

PATHS = native.load().paths()
needs_it = pytest.mark.skipif(not PATHS, reason="no C++ compiler built the native product")


@pytest.fixture
def path(request):
    native.load().choose(request.param)
    yield request.param
    native.load().choose(None)


every_path = pytest.mark.parametrize("path", PATHS, indirect=True)


def random_product(rng, rows, k, n):
    """Activations that are codes, a kernel that is its codes, and the float32 outputs."""
    x = rng.integers(-127, 128, (rows, k)).astype(np.float32)
    x[:, 0] = 127  # the absmax of every token
    codes = rng.integers(-1, 2, (k, n)).astype(np.float32)
    sums = x.astype(np.int64) @ codes.astype(np.int64)
    packed = bj.pack(jnp.asarray(codes), bj.TWN)  # a scale of 1
    return x, packed, sums.astype(np.float32) * np.float32(127) * np.float32(1 / 127)


def test_it_is_there_where_a_compiler_is():
    assert PATHS or shutil.which("c++") is None, native.load().reason
    assert not PATHS or PATHS[-1] == "portable"


@every_path
@pytest.mark.parametrize("case", suite.CASES.values(), ids=suite.CASES)
def test_every_instruction_set_has_the_oracles_bits(path, case):
    suite.check_product(case, "cpu", "prepared")


@every_path
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 2560, 333), (7, 257, 100), (64, 256, 16), (65, 1024, 79), (130, 300, 513)],
)
def test_tails_and_pieces(path, rows, k, n):
    x, packed, want = random_product(np.random.default_rng(rows), rows, k, n)
    np.testing.assert_array_equal(bj.matmul(x, bj.prepare(packed, "cpu")), want)


@needs_it
def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="path: no 'sse2' here, got one of"):
        native.load().choose("sse2")


@needs_it
@pytest.mark.parametrize("shape", [(1, 2, 2, 64), (1, 1, 3, 64), (2, 1, 2, 64)])
def test_a_corrupted_leaf_is_an_error_and_no_crash(shape):
    prepared = bj.prepare(bj.pack(jnp.ones((24, 10))), "cpu")
    assert prepared.codes.shape == (1, 1, 2, 64)
    bad = dataclasses.replace(prepared, codes=jnp.zeros(shape, jnp.uint8))
    with pytest.raises(Exception, match=r"prepare the kernel again|shape|reshape|size"):
        jax.block_until_ready(bj.matmul(jnp.ones((2, 24)), bad))


@needs_it
def test_eight_threads_at_once():
    rng = np.random.default_rng(0)
    jobs = [random_product(rng, rows, 1030, 1040) for rows in (1, 3, 40, 70)] * 4
    run = jax.jit(bj.matmul)
    leaves = [bj.prepare(packed, "cpu") for _, packed, _ in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            given = pool.map(lambda job, leaf: np.asarray(run(job[0], leaf)), jobs, leaves)
            for y, (_, _, want) in zip(given, jobs, strict=True):
                np.testing.assert_array_equal(y, want)


MANY_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, bitnet_jax as bj
from jax.sharding import NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 8
x = jax.random.normal(jax.random.key(0), (64, 512))
packed = bj.pack(jax.random.normal(jax.random.key(1), (512, 2048)))
want = bj.matmul(x, packed, implementation="xla")
leaf = bj.prepare(packed, "cpu")
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
run = jax.shard_map(bj.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
for _ in range(20):
    y = jax.jit(run)(x, leaf)
np.testing.assert_array_equal(y, want)
"""


def in_a_new_process(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_it
def test_many_devices_on_one_host():
    flags = "--xla_force_host_platform_device_count=8"
    done = in_a_new_process(MANY_DEVICES, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr


TURNED_OFF = """
import jax, bitnet_jax as bj
packed = bj.pack(jax.numpy.ones((8, 4)))
print(bj.prepare(packed))
bj.prepare(packed, "cpu")
"""


def test_it_can_be_turned_off():
    done = in_a_new_process(TURNED_OFF, BITNET_JAX_NATIVE="0")
    assert "for 'xla'" in done.stdout
    assert "'cpu' is not there: BITNET_JAX_NATIVE=0 turns it off. Use implementation='xla'" in (
        done.stderr
    )


def test_without_a_library_one_line_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    with caplog.at_level(logging.INFO, logger=native.__name__):
        found = native.load.__wrapped__()
    assert found.library is None
    assert found.paths() == []
    assert "it was not built" in found.reason
    assert [record.getMessage() for record in caplog.records] == [
        f"The native CPU product is not used, 'xla' serves instead: {found.reason}."
    ]


def test_a_library_that_does_not_load_is_a_reason_and_no_crash(monkeypatch, tmp_path):
    (tmp_path / "product.native").write_bytes(b"\x7fELF junk")
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    found = native.load.__wrapped__()
    assert "it does not load" in found.reason
    with pytest.raises(ValueError, match="got one of"):
        found.choose(None)


@needs_it
def test_the_portable_path_alone_is_not_picked_but_runs_by_name(monkeypatch):
    monkeypatch.setattr(native.Native, "paths", lambda self: ["portable"])
    packed = suite.CASES["dense"].pack()
    assert bj.prepare(packed).implementation == "xla"
    assert bj.prepare(packed, "cpu").implementation == "cpu"


@needs_it
@pytest.mark.parametrize("version", [0, 1001])
def test_another_version_of_the_ffi_is_found_before_anything_is_registered(monkeypatch, version):
    monkeypatch.setattr(native, "_runtime_version", lambda: version)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", None)
    found = native.load.__wrapped__()
    assert found.library is None
    assert "built for XLA FFI 0." in found.reason
    assert "Install bitnet_jax again" in found.reason


def test_the_version_is_that_of_the_header():
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = divmod(native._runtime_version(), 1000)
    assert f"#define XLA_FFI_API_MAJOR {major}\n" in header
    assert f"#define XLA_FFI_API_MINOR {minor}\n" in header
