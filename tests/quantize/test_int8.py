"""Int8 kernels and embeddings against float64 NumPy, written from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from draws import normal
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax._packed.prepared import PreparedTernary

INT8 = bj.Int8Config()
W = normal(24, 10) * np.linspace(0.01, 3.0, 10, dtype=np.float32)[None]
X = normal(5, 24, seed=1)


def exact(w, axis=0):
    """Codes and steps, as the docstring of ``_int8`` defines them."""
    w = np.asarray(w, np.float64)
    largest = np.maximum(np.abs(w).max(axis=axis, keepdims=True), 1e-8)
    return np.round(w * 127 / largest), largest / 127


def test_codes_and_scales_are_those_of_the_definition():
    packed = bj.pack(W, INT8)
    codes, step = exact(W)
    assert packed.codes.dtype == jnp.int8
    # A value half way between two codes may round either way in float32.
    assert (np.abs(np.asarray(packed.codes, np.int64) - codes) <= 1).all()
    assert (np.asarray(packed.codes) != codes).mean() < 0.01
    np.testing.assert_allclose(packed.scale, step, rtol=2e-7)
    np.testing.assert_allclose(packed.dequantize(), codes * step, atol=float(step.max()) * 1.01)
    error = np.abs(np.asarray(packed.dequantize(), np.float64) - np.asarray(W, np.float64))
    assert (error <= step * 0.5001).all()  # half a step
    assert np.abs(np.asarray(packed.codes)).max() == 127


@cases("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], core=[jnp.bfloat16])
def test_dtypes_zeros_and_extremes(dtype):
    w = W.astype(dtype).at[:, 3].set(0)
    packed = bj.pack(w, INT8)
    assert packed.dtype == dtype
    assert packed.dequantize().dtype == dtype
    assert not packed.codes[:, 3].any()
    huge = jnp.full((4, 4), float(jnp.finfo(dtype).max), dtype)
    assert (bj.pack(huge, INT8).codes == 127).all()
    assert np.isfinite(bj.pack(huge, INT8).dequantize(jnp.float32)).all()


def test_matmul_is_the_exact_integer_sum_scaled_once():
    packed = bj.pack(W, INT8)
    x_codes, gamma = bj.quantize_activations(X)
    sums = np.asarray(x_codes, np.int64) @ np.asarray(packed.codes, np.int64)
    want = sums * (np.asarray(gamma, np.float64) / 127) * np.asarray(packed.scale, np.float64)
    np.testing.assert_allclose(bj.matmul(X, packed), want, rtol=3e-7)


@pytest.mark.optimised
def test_the_bits_of_training_everywhere():
    packed = bj.pack(W, INT8)
    y = bj.ternary_dot(X, W, INT8)
    for other in (
        jax.jit(lambda x, w: bj.ternary_dot(x, w, INT8))(X, W),
        jax.jit(lambda: bj.ternary_dot(X, W, INT8))(),
        bj.matmul(X, packed),
        jax.jit(bj.matmul)(X, packed),
        jax.vmap(lambda x: bj.matmul(x, packed))(X),
        jnp.concatenate([bj.matmul(X[i : i + 1], packed) for i in range(5)]),
        jax.vjp(lambda w: bj.ternary_dot(X, w, INT8), W)[0],
        bj.matmul(X, packed, implementation="reference"),
    ):
        assert_same_bits(other, y)


def test_gradients():
    g = normal(5, 10, seed=2)
    dx, dw = jax.vjp(lambda x, w: bj.ternary_dot(x, w, INT8), X, W)[1](g)
    codes, step = exact(W)
    x_codes, gamma = bj.quantize_activations(X)
    x_hat = np.asarray(x_codes, np.float64) * np.asarray(gamma, np.float64) / 127
    np.testing.assert_allclose(dw, x_hat.T @ np.asarray(g, np.float64), rtol=1e-4, atol=1e-5)
    want = np.asarray(g, np.float64) @ (codes * step).T
    np.testing.assert_allclose(dx, want, rtol=2e-2, atol=2e-2)
    served = jax.vjp(lambda x: bj.matmul(x, bj.pack(W, INT8)), X)[1](g)[0]
    np.testing.assert_allclose(served, dx, rtol=1e-5, atol=1e-6)


# From 4096 elements on, 20 rows here, XLA's maximum drops NaN.
@cases("rows", [2, 20], core=[20])
def test_a_nan_is_never_lost(rows):
    x = normal(rows, 256).at[1, 7].set(jnp.nan)
    for quantize in (bj.quantize_activations, jax.jit(bj.quantize_activations)):
        gamma = quantize(x)[1][:, 0]
        assert not np.isfinite(gamma[1])
        assert np.isfinite(np.delete(gamma, 1)).all()
    step = bj.pack(x.T, INT8).scale[0]
    assert not np.isfinite(step[1])
    assert np.isfinite(np.delete(step, 1)).all()
    y = bj.ternary_dot(x, jnp.ones((256, 3)))
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()


def test_an_eps_that_127_over_it_leaves_float32_is_refused():
    for config in (bj.ActivationConfig, bj.Int8Config):
        config(eps=4e-37)
        with pytest.raises(ValueError, match=r"`eps` must be .* finite 127 / eps, 3.73e-37 to"):
            config(eps=3.7e-37)
    bj.ActivationConfig(bits=2, eps=1.2e-38)
    bj.TernaryConfig(eps=1.2e-38)


def test_stacks_slice_and_scan():
    stack = jnp.stack([W, 2 * W, -W])
    packed = bj.pack(stack, INT8, contracting_axes=1, batch_axes=0)
    ys = jax.lax.scan(lambda c, p: (c, bj.matmul(X, p)), 0, packed)[1]
    for i in range(3):
        assert_same_bits(ys[i], bj.matmul(X, bj.pack(stack[i], INT8)))
    assert jax.tree.map(lambda a: a[0], packed).shape == (24, 10)


def test_rows_look_up_without_dequantising():
    table = bj.pack(W, INT8, contracting_axes=-1)
    assert table.scale.shape == (24, 1)
    index = jnp.array([[3, 0], [23, 3]])
    assert_same_bits(table.rows(index), jnp.take(table.dequantize(), index, axis=0))
    assert np.isnan(table.rows(jnp.array([24]))).all()  # as jnp.take
    peak = jax.jit(lambda t, i: t.rows(i)).lower(table, index).compile().memory_analysis()
    assert peak.temp_size_in_bytes < 4 * W.size
    with pytest.raises(TypeError, match=r"rows: `index` must be of integers, got float32"):
        table.rows(jnp.array([1.0]))
    stack = bj.pack(jnp.stack([W, W]), INT8, contracting_axes=2, batch_axes=0)
    with pytest.raises(ValueError, match=r"only an embedding .* has rows, got shape \(2, 24, 10\)"):
        stack.rows(index)


def test_trees_mix_and_the_report_says_so(tmp_path):
    params = {"body": {"kernel": W}, "head": {"kernel": W, "bias": jnp.zeros(10)}}

    def select(path, leaf):
        return {"head": INT8, "body": bj.PHASE4}[path[0]] if path[-1] == "kernel" else None

    packed, report = bj.pack_params(params, select=select)
    assert isinstance(packed["head"]["kernel"], bj.PackedInt8)
    assert isinstance(packed["body"]["kernel"], bj.PackedTernary)
    body, head = report.rows
    assert (body.kind, head.kind) == ("ternary", "int8")
    codes = np.asarray(packed["head"]["kernel"].codes)
    assert (head.minus, head.zero, head.plus) == tuple(
        int(f(codes).sum()) for f in (lambda c: c < 0, lambda c: c == 0, lambda c: c > 0)
    )
    assert head.bytes_after == 240 + 40
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["ternary", "int8", "whole", "whole"]
    assert "int8" in lines[2]
    data = report.to_dict()
    assert data["int8"]["bytes_after"] == 280
    assert data["ternary"]["bytes_after"] == body.bytes_after
    report.plot(tmp_path / "mix.png")
    for name in ("codes", "scale"):
        whole = bj.pack(W, INT8)
        assert_same_bits(getattr(packed["head"]["kernel"], name), getattr(whole, name))
    floats = bj.unpack_params(packed, dequantize=True)
    assert_same_bits(floats["head"]["kernel"], bj.fake_quantize(W, INT8))


def test_files(tmp_path):
    tree = {"embed": {"embedding": bj.pack(W, INT8, contracting_axes=-1)}, "w": bj.pack(W)}
    path = tmp_path / "mixed.safetensors"
    bj.io.save(path, tree)
    loaded = bj.io.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(assert_same_bits, loaded, tree)
    broken = jax.tree.map(lambda a: a, tree["embed"]["embedding"])
    object.__setattr__(broken, "codes", broken.codes.at[0, 0].set(-128))
    with pytest.raises(ValueError, match=r"save: w has 1 codes of -128; they are -127 to 127"):
        bj.io.save(path, {"w": broken})
    jax.tree.map(assert_same_bits, bj.io.load(path), tree)  # nothing half-written


def test_prepare_names_what_cannot_be_laid_out():
    tree = {"head": bj.pack(W, INT8), "body": bj.pack(W)}
    assert isinstance(bj.prepare(tree)["body"], PreparedTernary)
    for run in (bj.prepare, lambda tree, name: bj.matmul(X, tree["head"], implementation=name)):
        with pytest.raises(NotImplementedError, match="'xla' unpacks two-bit codes"):
            run(tree, "xla")


def test_what_is_refused():
    with pytest.raises(ValueError, match="Int8Config: `eps` must be"):
        bj.Int8Config(eps=0)
    with pytest.raises(TypeError, match="quantize: `config` must be a TernaryConfig, got"):
        bj.quantize(W, INT8)
    long = jax.ShapeDtypeStruct((133_145, 2), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 133_145), jnp.float32)
    with pytest.raises(ValueError, match="may contract over 133144 weights, got 133145"):
        jax.eval_shape(lambda x, w: bj.ternary_dot(x, w, INT8), x, long)
    with pytest.raises(ValueError, match=r"layer.*NaN or Inf|has 1 NaN or Inf weights"):
        bj.pack_params({"layer": {"kernel": W.at[0, 0].set(jnp.nan)}}, INT8)


def test_not_trainable():
    with pytest.raises(TypeError, match=r"jax.grad: `params` holds packed kernels"):
        jax.grad(lambda p: bj.matmul(X, p["k"]).sum())({"k": bj.pack(W, INT8)})
