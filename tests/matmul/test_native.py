"""The native CPU product on every instruction set, and what XLA makes of it."""

import functools
import shutil

import jax
import jax.numpy as jnp
import kernel_suite as suite
import numpy as np
import oracles
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from jax import export
from native_paths import PATHS, needs_it, random_product

import bitnet_jax as bj
from bitnet_jax import _native as native
from bitnet_jax._matmul import cpu, embedding_rows
from bitnet_jax._packed.prepared import PreparedInt8

pytestmark = pytest.mark.optimised


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


def test_it_is_there_where_a_compiler_is():
    assert PATHS or shutil.which("c++") is None, native.load().reason
    assert not PATHS or PATHS[-1] == "portable"


@needs_it
@cases(
    "case",
    suite.CASES,
    core=[*("odd-k-and-n", "groups", "experts-heads", "int8-odd", "x-groups", "rotated-576")],
)
def test_every_instruction_set_has_the_oracles_bits(paths, case):
    suite.check_product(case, "cpu", "prepared", paths)


@every_path
@cases(
    ("rows", "k", "n"),
    [(1, 2560, 333), (7, 257, 100), (64, 256, 16), (65, 1024, 79), (130, 300, 513)],
    core=[(7, 257, 100), (65, 1024, 79)],
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
    return bj.prepare(bj.pack(w, config), "cpu"), np.float64(oracles.quantize32(w, config).codes)


@every_path
@pytest.mark.parametrize("config", SUMS.values(), ids=SUMS)
@cases("rows", [1, 3, 12, 40, 300], core=[1, 12])
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
@pytest.mark.full
def test_a_contraction_of_more_than_a_quarter_million(path):
    k = 2**18 + 4
    leaf = bj.prepare(bj.pack(jnp.ones((k, 70))), "cpu")
    for rows in (1, 2):
        sums = cpu.sums(jnp.full((rows, k), 127, jnp.int8), leaf)
        np.testing.assert_array_equal(sums, np.full((1, rows, 70), 127 * k))


@every_path
@cases("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], core=[jnp.bfloat16])
def test_every_dtype_in_and_out_has_the_bits_of_reference(path, dtype):
    w = normal(100, 70)
    x = np.array(normal(9, 100, seed=1))
    x[3], x[4, 5], x[6, 7] = 0, np.nan, -np.inf
    x[8] *= 1e-7
    x = jnp.asarray(x.astype(dtype))
    for config in (bj.B158, bj.PHASE4, bj.TernaryConfig(granularity=20), bj.Int8Config()):
        packed = bj.pack(w, config)
        for out in (jnp.float32, jnp.bfloat16, jnp.float16):
            want = bj.matmul(x, packed, implementation="reference", dtype=out)
            got = bj.matmul(x, bj.prepare(packed, "cpu"), dtype=out)
            assert got.dtype == out
            oracles.assert_same_bits(got, want)
            assert np.isnan(np.asarray(got, np.float32)[[4, 6]]).all()


@needs_it
@cases(("k", "n"), [(1, 1), (16, 64), (260, 130), (1031, 6), (300, 65)], core=[(300, 65)])
def test_the_layout_is_undone_to_the_code(k, n):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(k, n)).astype(np.float32))
    for config in (bj.B158, bj.Int8Config()):
        packed = bj.pack(w, config)
        got = jax.jit(cpu.codes_of)(bj.prepare(packed, "cpu"))
        np.testing.assert_array_equal(got, jax.jit(type(packed).int8_codes)(packed))


@needs_it
def test_prepared_embeddings_are_looked_up_like_stored_ones():
    table = bj.pack(normal(70, 18), bj.Int8Config(), contracting_axes=-1)
    prepared = bj.prepare(table, "cpu")
    assert isinstance(prepared, PreparedInt8)
    index = jnp.array([[0, 15, 16], [63, 64, 69], [-1, -70, 3]])
    rows = jax.jit(embedding_rows)(prepared, index)
    oracles.assert_same_bits(rows, table.rows(index))
    oracles.assert_same_bits(rows, jnp.take(table.dequantize(), index, axis=0))
    assert np.isnan(embedding_rows(prepared, jnp.array([70, -71]))).all()


@needs_it
def test_a_model_with_an_int8_embedding_serves_prepared():
    model = bj.linen.ternarize(nn.Embed(70, 16), select=lambda *_: bj.Int8Config())
    index = jnp.array([3, 69])
    params = params_of(model, index)
    packed, _ = bj.linen.pack(model, params, index)
    prepared = bj.prepare(packed, "cpu")
    x = normal(2, 16, seed=1)
    for method, given in (("__call__", index), ("attend", x)):
        apply = jax.jit(functools.partial(model.apply, method=method))
        want = apply({"params": packed}, given)
        got = apply({"params": prepared}, given)
        oracles.assert_same_bits(got, want)


@needs_it
@pytest.mark.full
def test_a_small_group_takes_two_bits_a_weight():
    w = normal(1024, 64)
    for group in (16, 32, 128, 1024):
        leaf = bj.prepare(bj.pack(w, bj.TernaryConfig(granularity=group)), "cpu")
        assert leaf.codes.nbytes == w.size // 4


def stored_int8(k, n, table):
    """Codes (k, n) as a kernel or as a table, with scales of 1."""
    codes = np.random.default_rng(k).integers(-127, 128, (k, n)).astype(np.int8)
    codes[:, 0], codes[:, -1] = 127, -127  # where narrow sums would overflow
    scale = jnp.ones((n, 1) if table else (1, n), jnp.float32)
    stored = jnp.asarray(codes.T if table else codes)
    return bj.PackedInt8(stored, scale, contracting_axes=(-1,) if table else (-2,)), codes


@needs_it
@pytest.mark.parametrize("table", [False, True], ids=["kernel", "table"])
@cases(
    ("k", "n"),
    [(1, 1), (3, 16), (255, 64), (256, 65), (260, 130), (1030, 79), (2051, 200)],
    core=[(3, 16), (1030, 79)],
)
def test_stored_int8_codes_are_multiplied_where_they_lie(paths, table, k, n):
    packed, codes = stored_int8(k, n, table)
    run = jax.jit(functools.partial(bj.matmul, implementation="cpu"))
    rows = [1, 2, 5, 8, 17, 50, 128, 131]
    xs = [np.random.default_rng(m).integers(-127, 128, (m, k)).astype(np.int8) for m in rows]
    for x in xs:
        x[:, 0] = 127  # the absmax of every token
    for path in paths:
        for x in xs:
            sums = (np.float64(x) @ np.float64(codes)).astype(np.float32)
            want = sums * np.float32(127) * np.float32(1 / 127)
            got = run(jnp.asarray(x, jnp.float32), packed)
            oracles.assert_same_bits(got, want, path)


@needs_it
@pytest.mark.parametrize("table", [False, True], ids=["kernel", "table"])
def test_stored_int8_codes_are_not_laid_out_first(table):
    packed, _ = stored_int8(64, 48, table)
    run = functools.partial(bj.matmul, implementation="cpu")
    text = jax.jit(run).lower(jnp.ones((4, 64)), packed).compile().as_text()
    assert native.MULTIPLY in text
    assert native.LAY_OUT not in text
    assert " transpose(" not in text


# What XLA makes of it ---------------------------------------------------------------------


def calls_in(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    return {t: text.count(f'custom_call_target="{t}"') for t in (native.QUANTIZE, native.MULTIPLY)}


@needs_it
def test_layers_with_the_same_input_share_its_quantisation():
    model = bj.linen.ternarize(nn.MultiHeadDotProductAttention(num_heads=4))
    tokens = normal(2, 16, 64)
    params = params_of(model, tokens)
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
    stack = bj.pack(normal(16, 256, 256), contracting_axes=1, batch_axes=0)
    stack = bj.prepare(stack, "cpu")
    x = normal(4, 256, seed=1)

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
    call = jax.jit(lambda x: bj.matmul(x, packed, implementation="cpu"))
    with pytest.raises(ValueError, match=r"(?s)custom calls .*bitnet_multiply"):
        export.export(call)(x)
    # Where the other side has this package on a CPU, it may say so.
    safe = [export.DisabledSafetyCheck.custom_call(t) for t in native.TARGETS]
    there = export.export(call, disabled_checks=safe)(x)
    anywhere = export.export(jax.jit(lambda x: bj.matmul(x, packed, implementation="xla")))(x)
    for exported in (there, anywhere):
        oracles.assert_same_bits(exported.call(x), bj.matmul(x, packed))
