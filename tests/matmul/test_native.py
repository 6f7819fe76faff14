"""The native CPU product: every instruction set, the loader, threads and bad buffers."""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import kernel_suite as suite
import numpy as np
import oracles
import pytest
from flax import linen as nn
from jax import export

import bitnet_jax as bj
from bitnet_jax._matmul import cpu, embedding_rows, native
from bitnet_jax._packed.kernel import PreparedInt8

PATHS = native.load().paths()
needs_it = pytest.mark.skipif(not PATHS, reason="no C++ compiler built the native product")


@pytest.fixture
def path(request):
    native.load().choose(request.param)
    yield request.param
    native.load().choose(None)


@pytest.fixture
def paths():
    """Takes one path after the other, for a program that is compiled once."""

    def take():
        for path in PATHS:
            native.load().choose(path)
            yield path

    yield take()
    native.load().choose(None)


every_path = pytest.mark.parametrize("path", PATHS, indirect=True)


@functools.partial(jax.jit, static_argnames="config")
def pack(w, config=bj.B158):
    return bj.pack(w, config)


def random_product(rng, rows, k, n):
    """Activations that are codes, a kernel that is its codes, and the float32 outputs."""
    x = rng.integers(-127, 128, (rows, k)).astype(np.float32)
    x[:, 0] = 127  # the absmax of every token
    codes = rng.integers(-1, 2, (k, n)).astype(np.float32)
    sums = x.astype(np.int64) @ codes.astype(np.int64)
    packed = pack(codes, bj.TWN)  # a scale of 1
    return x, packed, sums.astype(np.float32) * np.float32(127) * np.float32(1 / 127)


def test_it_is_there_where_a_compiler_is():
    assert PATHS or shutil.which("c++") is None, native.load().reason
    assert not PATHS or PATHS[-1] == "portable"


@needs_it
@pytest.mark.parametrize("case", suite.CASES.values(), ids=suite.CASES)
def test_every_instruction_set_has_the_oracles_bits(paths, case):
    suite.check_product(case, "cpu", "prepared", paths)


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


SUMS = {
    "whole": bj.TWN,
    "groups": bj.TernaryConfig(granularity=20),
    "int8": bj.Int8Config(),
}


@functools.cache  # the oracle is slow, and no instruction set changes it
def kernel_of_sums(config):
    w = np.random.default_rng(0).normal(size=(260, 150)).astype(np.float32)
    return bj.prepare(pack(w, config), "cpu"), np.float64(oracles.quantize32(w, config).codes)


@every_path
@pytest.mark.parametrize("config", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("rows", [1, 3, 12, 40, 300])
def test_sums_of_codes_are_exact(path, config, rows):
    leaf, codes = kernel_of_sums(config)
    x = np.random.default_rng(rows).integers(-127, 128, (rows, 260)).astype(np.int8)
    x[0], x[-1] = 127, -127
    groups = leaf.scale.shape[-2]
    # Integers below 2**53: exact in float64, whatever the order.
    parts = np.float64(x).reshape(rows, groups, -1).swapaxes(0, 1)
    want = parts @ codes.reshape(groups, -1, 150)
    got = cpu.sums(jnp.asarray(x), leaf)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


@every_path
def test_a_contraction_of_more_than_a_quarter_million(path):
    k = 2**18 + 4
    leaf = bj.prepare(pack(jnp.ones((k, 70))), "cpu")
    for rows in (1, 2):
        sums = cpu.sums(jnp.full((rows, k), 127, jnp.int8), leaf)
        np.testing.assert_array_equal(sums, np.full((1, rows, 70), 127 * k))


@every_path
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_dtype_in_and_out_has_the_bits_of_reference(path, dtype):
    w = jax.random.normal(jax.random.key(0), (100, 70))
    x = jax.random.normal(jax.random.key(1), (9, 100)).astype(dtype)
    x = x.at[3].set(0).at[4, 5].set(jnp.nan).at[6, 7].set(-jnp.inf).at[8].multiply(1e-7)
    for config in (bj.B158, bj.PHASE4, bj.TernaryConfig(granularity=20), bj.Int8Config()):
        packed = pack(w, config)
        for out in (jnp.float32, jnp.bfloat16, jnp.float16):
            want = bj.matmul(x, packed, implementation="reference", dtype=out)
            got = bj.matmul(x, bj.prepare(packed, "cpu"), dtype=out)
            assert got.dtype == out
            oracles.assert_same_bits(got, want)
            assert np.isnan(np.asarray(got, np.float32)[[4, 6]]).all()


@needs_it
def test_the_layout_is_undone_to_the_code():
    rng = np.random.default_rng(0)
    for k, n in ((1, 1), (16, 64), (260, 130), (1031, 6), (300, 65)):
        w = jnp.asarray(rng.normal(size=(k, n)).astype(np.float32))
        for config in (bj.B158, bj.Int8Config()):
            packed = pack(w, config)
            got = jax.jit(cpu.codes_of)(bj.prepare(packed, "cpu"))
            np.testing.assert_array_equal(got, jax.jit(type(packed).int8_codes)(packed))


@needs_it
def test_prepared_embeddings_are_looked_up_like_stored_ones():
    table = bj.pack(
        jax.random.normal(jax.random.key(0), (70, 18)), bj.Int8Config(), contracting_axes=-1
    )
    prepared = bj.prepare(table, "cpu")
    assert isinstance(prepared, PreparedInt8)
    index = jnp.array([[0, 15, 16], [63, 64, 69], [-1, -70, 3]])
    rows = jax.jit(embedding_rows)(prepared, index)
    oracles.assert_same_bits(rows, table.rows(index))
    oracles.assert_same_bits(rows, jnp.take(bj.unpack(table), index, axis=0))
    assert np.isnan(embedding_rows(prepared, jnp.array([70, -71]))).all()


@needs_it
def test_a_model_with_an_int8_embedding_serves_prepared():
    model = bj.linen.ternarize(nn.Embed(70, 16), select=lambda *_: bj.Int8Config())
    index = jnp.array([3, 69])
    params = model.init(jax.random.key(0), index)["params"]
    packed, _ = bj.linen.pack(model, params, index)
    prepared = bj.prepare(packed, "cpu")
    x = jax.random.normal(jax.random.key(1), (2, 16))
    for method, given in (("__call__", index), ("attend", x)):
        want = model.apply({"params": packed}, given, method=method)
        got = model.apply({"params": prepared}, given, method=method)
        oracles.assert_same_bits(got, want)


@needs_it
def test_a_small_group_takes_two_bits_a_weight():
    w = jax.random.normal(jax.random.key(0), (1024, 64))
    for group in (16, 32, 128, 1024):
        leaf = bj.prepare(bj.pack(w, bj.TernaryConfig(granularity=group)), "cpu")
        assert leaf.codes.nbytes == w.size // 4


# What XLA makes of it ---------------------------------------------------------------------


def calls_in(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return {t: text.count(f'custom_call_target="{t}"') for t in (native.QUANTIZE, native.MULTIPLY)}


@needs_it
def test_layers_with_the_same_input_share_its_quantisation():
    model = bj.linen.ternarize(nn.MultiHeadDotProductAttention(num_heads=4))
    tokens = jax.random.normal(jax.random.key(0), (2, 16, 64))
    params = model.init(jax.random.key(1), tokens)["params"]
    packed, _ = bj.linen.pack(model, params, tokens)

    def run(packed, tokens):
        return model.apply({"params": packed}, tokens)

    for leaves in (packed, bj.prepare(packed, "cpu")):  # query, key and value; out
        assert calls_in(run, leaves, tokens) == {native.QUANTIZE: 2, native.MULTIPLY: 4}


@needs_it
def test_vmap_is_one_call():
    x = jnp.ones((3, 5, 24))
    leaf = bj.prepare(bj.pack(jnp.ones((24, 10))), "cpu")
    one = {native.QUANTIZE: 1, native.MULTIPLY: 1}
    assert calls_in(jax.vmap(bj.matmul, (0, None)), x, leaf) == one
    stack = jax.tree.map(lambda a: jnp.stack([a] * 3), leaf)
    assert calls_in(jax.vmap(bj.matmul), x, stack) == one


@needs_it
def test_scan_copies_one_layer_at_a_time():
    stack = bj.pack(
        jax.random.normal(jax.random.key(0), (16, 256, 256)), contracting_axes=1, batch_axes=0
    )
    stack = bj.prepare(stack, "cpu")
    x = jax.random.normal(jax.random.key(1), (4, 256))

    def run(x, stack):
        return jax.lax.scan(lambda x, leaf: (bj.matmul(x, leaf), None), x, stack)[0]

    done = jax.jit(run).lower(x, stack).compile()
    assert done.memory_analysis().temp_size_in_bytes < stack.nbytes // 4
    want = x
    for i in range(16):
        want = bj.matmul(want, jax.tree.map(lambda a, i=i: a[i], stack))
    oracles.assert_same_bits(done(x, stack), want)


@needs_it
def test_export_refuses_what_cannot_travel_by_name():
    x = jnp.ones((2, 24))
    packed = bj.pack(jnp.ones((24, 10)))
    call = jax.jit(lambda x: bj.matmul(x, bj.prepare(packed, "cpu")))
    with pytest.raises(ValueError, match=r"(?s)custom calls .*bitnet_multiply"):
        export.export(call)(x)
    # Where the other side has this package on a CPU, it may say so.
    safe = [export.DisabledSafetyCheck.custom_call(t) for t in native.TARGETS]
    there = export.export(call, disabled_checks=safe)(x)
    anywhere = export.export(jax.jit(lambda x: bj.matmul(x, packed, implementation="xla")))(x)
    for exported in (there, anywhere):
        oracles.assert_same_bits(exported.call(x), bj.matmul(x, packed))


# Faults -----------------------------------------------------------------------------------


@needs_it
@pytest.mark.parametrize("shape", [(256,), (192,), (64,), (0,), (1, 128)])
def test_a_corrupted_leaf_is_an_error_and_no_crash(shape):
    prepared = bj.prepare(bj.pack(jnp.ones((24, 10))), "cpu")
    assert prepared.codes.shape == (128,)
    bad = dataclasses.replace(prepared, codes=jnp.zeros(shape, jnp.uint8))
    with pytest.raises(Exception, match=r"prepare the kernel again|shape|reshape|size"):
        jax.block_until_ready(bj.matmul(jnp.ones((2, 24)), bad))


GOOD = {
    "codes": jnp.zeros((1, 2, 64), jnp.int8),
    "gamma": jnp.ones((1, 2, 1)),
    "panels": jnp.zeros((1, 128), jnp.uint8),
    "scale": jnp.ones((1, 1, 1)),
}
BAD = {
    "codes of another dtype": {"codes": jnp.zeros((1, 2, 64), jnp.uint8)},
    "codes without padding": {"codes": jnp.zeros((1, 2, 24), jnp.int8)},
    "another batch": {"codes": jnp.zeros((2, 2, 64), jnp.int8)},
    "another rank": {"codes": jnp.zeros((2, 64), jnp.int8)},
    "gamma of other rows": {"gamma": jnp.ones((1, 3, 1))},
    "gamma of another dtype": {"gamma": jnp.ones((1, 2, 1), jnp.bfloat16)},
    "fewer panels": {"panels": jnp.zeros((1, 64), jnp.uint8)},
    "scales of other outputs": {"scale": jnp.ones((1, 1, 9))},
    "no scale": {"scale": jnp.ones((1, 1, 0))},
    "no groups": {"scale": jnp.ones((1, 0, 1))},
    "more groups": {"scale": jnp.ones((1, 2, 1))},
}


def call_multiply(operands, dtype=jnp.float32, depth=24):
    y = jax.ShapeDtypeStruct((1, 2, 10), dtype)
    call = jax.ffi.ffi_call(native.MULTIPLY, y)
    run = jax.jit(lambda *a: call(*a, depth=np.int64(depth), int8=False, qmax=np.float32(127)))
    return jax.block_until_ready(run(*operands.values()))


@needs_it
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_buffers_that_do_not_meet_are_errors_and_no_crash(bad):
    call_multiply(GOOD)
    with pytest.raises(Exception, match=r"bitnet_jax|Wrong buffer"):
        call_multiply({**GOOD, **bad})


@needs_it
def test_outputs_and_lengths_that_do_not_meet_are_errors_and_no_crash():
    for arguments in ({"dtype": jnp.int32}, {"depth": 0}, {"depth": 100}, {"depth": -1}):
        with pytest.raises(Exception, match="bitnet_jax"):
            call_multiply(GOOD, **arguments)


DRIVER = pathlib.Path(__file__).parents[1] / "native"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_paths_for_other_processors_have_the_sums_of_their_definition(tmp_path):
    """AMX with its tiles on plain arrays, AVX-VNNI in the encoding of AVX512-VNNI."""
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
x = jax.random.normal(jax.random.key(0), (64, 1024))
leaf = bj.prepare(bj.pack(jax.random.normal(jax.random.key(1), (1024, 2048))), "cpu")
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
x = jax.random.normal(jax.random.key(0), (130, 1024))
packed = bj.pack(jax.random.normal(jax.random.key(1), (1024, 2048)), bj.PHASE4)
for rows in (1, 130):
    want = bj.matmul(x[:rows], packed, implementation="reference")
    np.testing.assert_array_equal(bj.matmul(x[:rows], bj.prepare(packed, "cpu")), want)
"""


@needs_it
def test_one_thread_has_the_same_bits():
    done = in_a_new_process(ON_ONE_CORE)
    assert done.returncode == 0, done.stderr


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
