"""The native CPU product under bad buffers, threads, forks, and without its library."""

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
from native_paths import needs_it, random_product

import bitnet_jax as bj
from bitnet_jax import _native as native


@needs_it
@pytest.mark.parametrize("shape", [(256,), (192,), (64,), (0,), (1, 128)])
def test_a_corrupted_leaf_is_an_error_and_no_crash(shape):
    prepared = bj.prepare(bj.pack(jnp.ones((24, 10))), "cpu")
    assert prepared.codes.shape == (128,)
    bad = dataclasses.replace(prepared, codes=jnp.zeros(shape, jnp.uint8))
    with pytest.raises(Exception, match=r"prepare the kernel again|shape|reshape|size"):
        jax.block_until_ready(bj.matmul(jnp.ones((2, 24)), bad))


GOOD = {
    "codes": np.zeros((1, 2, 64), np.int8),
    "gamma": np.ones((1, 2, 1), np.float32),
    "panels": np.zeros((1, 128), np.uint8),
    "scale": np.ones((1, 1, 1), np.float32),
}
BAD = {
    "codes of another dtype": {"codes": np.zeros((1, 2, 64), np.uint8)},
    "codes without padding": {"codes": np.zeros((1, 2, 24), np.int8)},
    "another batch": {"codes": np.zeros((2, 2, 64), np.int8)},
    "another rank": {"codes": np.zeros((2, 64), np.int8)},
    "gamma of other rows": {"gamma": np.ones((1, 3, 1), np.float32)},
    "gamma of another dtype": {"gamma": np.ones((1, 2, 1), jnp.bfloat16)},
    "gamma of another rank": {"gamma": np.ones((1, 2), np.float32)},
    "no gamma": {"gamma": np.ones((1, 2, 0), np.float32)},
    "groups that cut fours": {"gamma": np.ones((1, 2, 4), np.float32)},
    "groups that do not divide": {"gamma": np.ones((1, 2, 5), np.float32)},
    "groups without padding": {"gamma": np.ones((1, 2, 2), np.float32)},
    "fewer panels": {"panels": np.zeros((1, 64), np.uint8)},
    "panels of another dtype": {"panels": np.zeros((1, 128), np.float32)},
    "stored codes of a ternary kernel": {"panels": np.zeros((1, 24, 10), np.int8)},
    "scales of other outputs": {"scale": np.ones((1, 1, 9), np.float32)},
    "no scale": {"scale": np.ones((1, 1, 0), np.float32)},
    "no groups": {"scale": np.ones((1, 0, 1), np.float32)},
    "more groups": {"scale": np.ones((1, 2, 1), np.float32)},
}


def call_multiply(operands, dtype=jnp.float32, depth=24, int8=False, transposed=False):
    y = jax.ShapeDtypeStruct((1, 2, 10), dtype)
    call = jax.ffi.ffi_call(native.MULTIPLY, y)
    static = {"depth": np.int64(depth), "int8": int8, "transposed": transposed}
    run = jax.jit(lambda *a: call(*a, **static, qmax=np.float32(127)))
    return jax.block_until_ready(run(*operands.values()))


@needs_it
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_buffers_that_do_not_meet_are_errors_and_no_crash(bad):
    call_multiply(GOOD)
    with pytest.raises(Exception, match=r"bitnet_jax|Wrong buffer"):
        call_multiply({**GOOD, **bad})


@needs_it
@pytest.mark.parametrize("transposed", [False, True])
def test_stored_codes_that_do_not_meet_are_errors_and_no_crash(transposed):
    shape = (10, 24) if transposed else (24, 10)
    how = {"int8": True, "transposed": transposed}
    call_multiply({**GOOD, "panels": jnp.zeros((1, *shape), jnp.int8)}, **how)
    for bad in ((1, *shape[::-1]), (2, *shape), shape, (1, 240), (1, 24, 9), (1, 0, 10)):
        with pytest.raises(Exception, match="stored codes and outputs do not meet"):
            call_multiply({**GOOD, "panels": jnp.zeros(bad, jnp.int8)}, **how)
    groups = {"panels": jnp.zeros((1, *shape), jnp.int8), "scale": jnp.ones((1, 2, 1))}
    with pytest.raises(Exception, match="bitnet_jax"):
        call_multiply({**GOOD, **groups}, depth=12, **how)


@needs_it
def test_outputs_and_lengths_that_do_not_meet_are_errors_and_no_crash():
    for arguments in ({"dtype": jnp.int32}, {"depth": 0}, {"depth": 100}, {"depth": -1}):
        with pytest.raises(Exception, match="bitnet_jax"):
            call_multiply(GOOD, **arguments)


DRIVER = pathlib.Path(__file__).parents[1] / "native"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.full
def test_paths_for_other_processors_have_the_sums_of_their_definition(tmp_path):
    """On x86: AMX with its tiles on plain arrays, AVX-VNNI in the encoding of AVX512-VNNI."""
    sources = pathlib.Path(native.__file__).parent
    files = [str(f) for f in sorted(sources.glob("*.cc")) if f.name != "ffi.cc"]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", f"-I{sources}", f"-I{DRIVER}"]
    by_hand = ["-DBITNET_TEST_AMX_BY_HAND", "-DBITNET_TEST_AVX_VNNI_AS_AVX512"]
    driver = tmp_path / "driver"
    build = ["c++", *flags, *by_hand, str(DRIVER / "driver.cc"), *files, "-o", str(driver)]
    subprocess.run(build, check=True)
    done = subprocess.run([str(driver)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == native.load().built()
    assert lines[-1] == "0 failures"


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


AFTER_A_FORK = """
import os, jax, numpy as np, bitnet_jax as bj
rng = np.random.default_rng(0)
x = jax.device_put(rng.standard_normal((64, 1024), np.float32))
leaf = bj.prepare(bj.pack(rng.standard_normal((1024, 2048), np.float32)), "cpu")
run = jax.jit(bj.matmul)
want = np.asarray(run(x, leaf))
child = os.fork()  # the pool's threads stay behind: the caller has to do it all
if child == 0:
    os._exit(int((np.asarray(run(x, leaf)) != want).any()))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@needs_it
def test_a_forked_child_multiplies_on():
    done = in_a_new_process(AFTER_A_FORK, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, numpy as np, bitnet_jax as bj
rng = np.random.default_rng(0)
x = rng.standard_normal((130, 1024), np.float32)
packed = bj.pack(rng.standard_normal((1024, 2048), np.float32), bj.PHASE4)
for rows in (1, 130):
    want = bj.matmul(x[:rows], packed, implementation="reference")
    np.testing.assert_array_equal(bj.matmul(x[:rows], bj.prepare(packed, "cpu")), want)
"""


@needs_it
@pytest.mark.full
def test_one_thread_has_the_same_bits():
    done = in_a_new_process(ON_ONE_CORE)
    assert done.returncode == 0, done.stderr


MANY_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, bitnet_jax as bj
from jax.sharding import NamedSharding, PartitionSpec as P
assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
x = rng.standard_normal((64, 512), np.float32)
packed = bj.pack(rng.standard_normal((512, 2048), np.float32))
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
@pytest.mark.full
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
def test_a_library_of_other_sources_is_a_reason_and_no_crash(monkeypatch, tmp_path):
    source = tmp_path / "stale.cc"
    version = native.load().library.bitnet_ffi_version()
    source.write_text(f'extern "C" int bitnet_ffi_version() {{ return {version}; }}\n')
    build = ["c++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "product.native")]
    subprocess.run(build, check=True)
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    monkeypatch.setattr(jax.ffi, "register_ffi_target", None)
    found = native.load.__wrapped__()
    assert "it was built from other sources" in found.reason
    assert "Install bitnet_jax again" in found.reason


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
