"""Comparisons against float64 NumPy, written from the definitions."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import params_of
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj

KERNEL = {"a": {"kernel": jnp.ones((4, 4))}}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def log_softmax64(logits):
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def comparison64(a, b, labels=None):
    """The numbers of a comparison from all logits at once."""
    p, q = log_softmax64(a), log_softmax64(b)
    found = {
        "examples": p[..., 0].size,
        "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
        "max_difference": np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(),
    }
    if labels is not None:
        for name, logp in (("float", p), ("packed", q)):
            at = np.take_along_axis(logp, labels[..., None], -1)
            found |= {
                f"loss_{name}": -at.mean(),
                f"accuracy_{name}": (logp.argmax(-1) == labels).mean(),
            }
    return found


def assert_close(result, expected, rtol=1e-5):
    for name, value in result.to_dict().items():
        if name in expected:
            np.testing.assert_allclose(value, expected[name], rtol, 1e-7, err_msg=name)
        else:
            assert value is None, name


def table_of(p, x):
    """A model of two parameters: the logits are looked up, so that any can be made."""
    return p["logits"][x]


def looked_up(a, b, batches):
    return bj.analysis.compare(None, {"logits": a}, {"logits": b}, batches, apply=table_of)


def test_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4): KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3).
    a, b = jnp.zeros((1, 2)), jnp.log(jnp.array([[3.0, 1.0]]))
    result = looked_up(a, b, [(np.array([0]), np.array([1]))])
    np.testing.assert_allclose(result.kl, 0.5 * math.log(4 / 3), 1e-6)
    np.testing.assert_allclose(result.loss_float, math.log(2), 1e-6)
    np.testing.assert_allclose(result.loss_packed, math.log(4), 1e-6)
    np.testing.assert_allclose(result.max_difference, math.log(3), 1e-6)
    assert (result.examples, result.agreement) == (1, 1.0)
    assert (result.accuracy_float, result.accuracy_packed) == (0.0, 0.0)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2), (1, 11)])
def test_examples_weigh_the_same_in_uneven_batches(sizes, labelled):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((12, 5)) * 3, jnp.float32) for _ in range(2))
    labels = rng.integers(0, 5, 12)
    xs = np.split(np.arange(12), np.cumsum(sizes)[:-1])
    result = looked_up(a, b, ((x, labels[x]) if labelled else x for x in xs))
    assert_close(result, comparison64(a, b, labels if labelled else None))
    assert math.isnan(result.loss_float) != labelled


def test_sequences_of_logits():
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.standard_normal((6, 7, 5)), jnp.float32) for _ in range(2))
    labels = rng.integers(0, 5, (6, 7)).astype(np.uint8)
    batches = [[np.arange(4), labels[:4]], [np.arange(4, 6), labels[4:].tolist()]]
    assert_close(looked_up(a, b, batches), comparison64(a, b, labels))


def test_bfloat16_logits_are_widened():
    a, b = normal(9, 5).astype(jnp.bfloat16), normal(9, 5, seed=1).astype(jnp.bfloat16)
    expected = comparison64(a.astype(jnp.float32), b.astype(jnp.float32))
    assert_close(looked_up(a, b, [np.arange(9)]), expected)


def test_extreme_logits():
    a = jnp.array([[1e4, 0.0, -1e4], [0.0, -jnp.inf, 1.0]])
    same = looked_up(a, a, [np.arange(2)])
    assert (same.kl, same.agreement, same.max_difference) == (0.0, 1.0, 0.0)
    far = looked_up(a[:1], a[:1, ::-1], [np.arange(1)])
    assert (far.kl, far.agreement, far.max_difference) == (2e4, 0.0, 2e4)
    masked = looked_up(jnp.array([[0.0, -jnp.inf]]), jnp.zeros((1, 2)), [np.arange(1)])
    np.testing.assert_allclose(masked.kl, math.log(2), 1e-6)
    gone = looked_up(jnp.zeros((1, 2)), jnp.array([[0.0, -jnp.inf]]), [np.arange(1)])
    assert gone.kl == math.inf
    lost = looked_up(
        jnp.zeros((2, 2)), jnp.array([[0.0, jnp.nan], [0.0, 0.0]]), [np.array([1]), np.array([0])]
    )
    assert math.isnan(lost.kl)
    assert math.isnan(lost.max_difference)
    assert lost.to_dict()["kl"] is None


def test_linen_float_side_is_at_strength_zero():
    model = bj.linen.BitDense(5)
    x, labels = normal(11, 8), np.arange(11) % 5
    params = params_of(model, x)
    packed, _ = bj.pack_params(params)
    batches = [(x[:8], labels[:8]), (x[8:], labels[8:])]
    result = bj.analysis.compare(model, params, packed, batches)
    w, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    floats = np.asarray(x, np.float64) @ w + bias  # and no int8 activations
    served = jax.jit(model.apply)({"params": packed}, x)
    assert_close(result, comparison64(floats, served, labels))
    assert result.kl > 1e-4
    # Float params on the other side run ternary, and no strength around the call changes that.
    with bj.phase_in(0.0):
        assert bj.analysis.compare(model, params, packed, batches) == result
        assert bj.analysis.compare(model, params, params, batches) == result


def test_float_layers_compare_unpacked_params():
    model, x = nn.Dense(5), normal(11, 8)
    params = params_of(model, x)
    hat = bj.unpack_params(bj.pack_params(params)[0], dequantize=True)
    expected = comparison64(model.apply({"params": params}, x), model.apply({"params": hat}, x))
    assert_close(bj.analysis.compare(model, params, hat, [x]), expected, 1e-4)


def test_nnx_by_a_function_that_merges():
    model = bj.nnx.BitLinear(8, 5, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    packed, _ = bj.pack_params(params)
    x = normal(11, 8)
    result = bj.analysis.compare(
        None, params, packed, [x], apply=lambda p, x: nnx.merge(graphdef, p)(x)
    )
    floats = np.asarray(x, np.float64) @ np.asarray(model.kernel[...], np.float64)
    assert_close(result, comparison64(floats, nnx.merge(graphdef, packed)(x)))


def test_each_side_is_traced_once_for_each_shape():
    traced = []

    def apply(p, x):
        traced.append(x.shape)
        return p["logits"][x]

    p = {"logits": normal(12, 5)}
    batches = [np.arange(5), np.arange(5), np.arange(5), np.arange(2)]
    bj.analysis.compare(None, p, p, batches, apply=apply)
    assert traced == [(5,), (5,), (2,), (2,)]


X, Y = np.arange(4), np.zeros(4, int)


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "yielded no examples"),
        (iter(()), ValueError, "yielded no examples"),
        ([X[:0]], ValueError, "yielded no examples"),
        (X, TypeError, r"Put a single batch into a list: \[x\]"),
        ({"x": X}, TypeError, "iterable of x"),
        (None, TypeError, "iterable of x"),
        ([(X, Y, Y)], ValueError, r"must yield x or \(x, labels\), got a tuple of 3"),
        ([(X, Y), X], ValueError, "labels in every batch or in none"),
        ([X, (X, Y)], ValueError, "labels in every batch or in none"),
        ([(X, Y.astype(np.float32))], TypeError, "must yield integer labels, got float32"),
        ([(X, Y[:3])], ValueError, r"labels of shape \(4,\) for logits \(4, 3\), got \(3,\)"),
        ([(X, Y[:, None])], ValueError, r"got \(4, 1\)"),
        ([(X, Y + 3)], ValueError, "has 4 labels outside 0 to 2"),
        ([(X, Y - np.array([0, 1, 0, 101]))], ValueError, "has 2 labels outside 0 to 2"),
    ],
)
def test_batches_that_are_refused(batches, error, match):
    with pytest.raises(error, match=f"compare: .*{match}"):
        looked_up(normal(4, 3), normal(4, 3), batches)


def test_a_function_is_a_model():
    def fn(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    params = {"in": normal(8, 16), "out": normal(16, 3)}
    ternary = bj.ternarize(fn)
    packed, _ = ternary.pack(params, X8 := normal(6, 8))
    result = bj.analysis.compare(ternary, params, packed, [X8])
    assert_close(result, comparison64(fn(params, X8), ternary(params, X8)), rtol=1e-4)
    kernels = ternary.kernels(params, X8)
    worst = bj.analysis.sensitivity(lambda p: jnp.square(fn(p, X8)).mean(), params, select=kernels)
    assert {row.path for row in worst.rows} == {"in", "out"}
    assert {row.path for row in bj.analysis.trit_stats(params, select=kernels).rows} == {
        "in",
        "out",
    }


def test_models_that_are_refused():
    a, p = normal(4, 3), {"logits": normal(4, 3)}
    with pytest.raises(
        ValueError, match=r"one shape, got \(4, 3\) for `float_params` and \(4, 2\)"
    ):
        looked_up(a, a[:, :2], [X])
    with pytest.raises(ValueError, match="logits must be"):
        bj.analysis.compare(None, p, p, [X], apply=lambda p, x: p["logits"].sum())
    with pytest.raises(TypeError, match=r"got tuple for `float_params`\. Pass apply="):
        bj.analysis.compare(None, p, p, [X], apply=lambda p, x: (p["logits"], x))
    with pytest.raises(TypeError, match=r"`model` must have linen's apply.*got NoneType"):
        bj.analysis.compare(None, p, p, [X])
    with pytest.raises(TypeError, match=r"got Linear\. Pass apply="):
        bj.analysis.compare(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), p, p, [X])
    packed = bj.pack_params(KERNEL)[0]
    with pytest.raises(ValueError, match="float tree, and a/kernel is packed"):
        bj.analysis.compare(nn.Dense(2), packed, packed, [X])
    with pytest.raises(ValueError, match="`float_params` holds no arrays"):
        bj.analysis.compare(nn.Dense(2), {}, packed, [X])


def test_comparison_table():
    full = bj.analysis.Comparison(1000, 0.51234, 0.6, 0.98, 0.9712, 0.01234, 0.99, 3.14159)
    assert str(full).split("\n") == [
        "over 1000 examples     float  packed",
        "loss                  0.5123  0.6000",
        "accuracy              98.00%  97.12%",
        "KL(float || packed)           0.0123",
        "top-1 agreement               99.00%",
        "max logit difference            3.14",
    ]
    nan = math.nan
    bare = bj.analysis.Comparison(7, nan, nan, nan, nan, 0.01234, 0.99, 3.14159)
    assert len(str(bare).split("\n")) == 4
    assert "nan" not in str(bare)
    json.dumps(full.to_dict(), allow_nan=False)
