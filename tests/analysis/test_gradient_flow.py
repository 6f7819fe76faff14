"""`gradient_flow`: states, totals, every kind of leaf."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bitnet_jax as bj


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_gradient_flow_names_every_state():
    grads = {
        "ok": jnp.array([3.0, 4.0]),
        "half": jnp.array([1e-3], jnp.bfloat16),
        "dead": jnp.zeros((2, 2)),
        "none": None,
        "integer": np.zeros(3, jax.dtypes.float0),
        "nan": jnp.array([1.0, jnp.nan]),
        "inf": jnp.array([jnp.inf]),
        "huge": jnp.array([3e38, 3e38]),
    }
    flow = bj.analysis.gradient_flow(grads, exploding=100.0)
    states = {leaf.path: leaf.state for leaf in flow.rows}
    assert states == {
        "ok": "ok",
        "half": "ok",
        "dead": "dead",
        "none": "missing",
        "integer": "missing",
        "nan": "nan",
        "inf": "nan",
        "huge": "exploding",
    }
    assert not flow.ok
    assert flow.paths("nan") == ("inf", "nan")
    norms = {leaf.path: leaf.norm for leaf in flow.rows}
    assert norms["ok"] == pytest.approx(5.0)
    assert "exploding" in str(flow)
    assert bj.analysis.gradient_flow({"a": jnp.ones(2)}).ok


def test_gradient_flow_reads_nnx_states_and_refuses_nothing():
    state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert bj.analysis.gradient_flow(state).paths("dead") == ("bias",)
    with pytest.raises(ValueError, match="`grads` holds no arrays"):
        bj.analysis.gradient_flow({})
    with pytest.raises(ValueError, match="`exploding` must be a finite number > 0"):
        bj.analysis.gradient_flow({"a": jnp.ones(2)}, exploding=-1.0)


def test_norms_and_largest_agree_with_float64():
    rng = np.random.default_rng(0)
    grads = {
        "small": rng.standard_normal((7, 5)) * 1e-30,
        "plain": rng.standard_normal((4, 3, 2)),
        "large": rng.standard_normal(9) * 1e30,
        "scalar": np.array(-2.5),
    }
    grads = {name: g.astype(np.float32) for name, g in grads.items()}
    for leaf in bj.analysis.gradient_flow(jax.tree.map(jnp.asarray, grads), exploding=1e38).rows:
        exact = np.asarray(grads[leaf.path], np.float64)
        np.testing.assert_allclose(leaf.norm, np.sqrt((exact**2).sum()), rtol=1e-5)
        assert leaf.largest == np.float32(abs(exact).max())
        assert leaf.state == "ok"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_gradients_are_summed_in_float32(dtype):
    # In the gradient's own dtype this sum stops at 256 (bfloat16) or overflows (float16).
    (leaf,) = bj.analysis.gradient_flow({"a": jnp.full(10_000, 16.0, dtype)}, exploding=1e4).rows
    assert leaf.norm == pytest.approx(1600.0)
    assert leaf.state == "ok"
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert bj.analysis.gradient_flow({"a": jnp.ones(3, dtype).at[1].set(bad)}).paths("nan") == (
            "a",
        )


def test_exploding_is_above_the_bound_and_not_at_it():
    grads = {"a": jnp.array([3.0, 4.0])}
    assert bj.analysis.gradient_flow(grads, exploding=5.0).ok
    assert bj.analysis.gradient_flow(grads, exploding=4.99).paths("exploding") == ("a",)
    assert bj.analysis.gradient_flow({"a": jnp.full(1, 1001.0)}).paths("exploding") == ("a",)
    for bad in (0.0, -1.0, math.nan, math.inf, "1", True):
        with pytest.raises(ValueError, match=r"^gradient_flow: `exploding` must be a finite"):
            bj.analysis.gradient_flow(grads, exploding=bad)


def test_gradient_flow_of_a_partitioned_tree_names_the_frozen_leaves():
    packed, _ = bj.pack_params({"layer": {"kernel": normal(16, 8), "bias": jnp.zeros(8)}})
    trainable, frozen = bj.partition(packed)

    def loss(trainable):
        params = bj.combine(trainable, frozen)["layer"]
        return jnp.square(bj.matmul(jnp.ones((2, 16)), params["kernel"]) + params["bias"][None])

    flow = bj.analysis.gradient_flow(jax.grad(lambda t: loss(t).sum())(trainable))
    assert {leaf.path: leaf.state for leaf in flow.rows} == {
        "layer/bias": "ok",
        "layer/kernel": "missing",
    }


def test_gradient_flow_takes_the_gradients_of_a_packed_tree():
    packed, _ = bj.pack_params({"layer": {"kernel": normal(16, 8), "bias": jnp.zeros(8)}})

    def loss(params):
        layer = params["layer"]
        y = bj.matmul(jnp.ones((2, 16)), layer["kernel"]) + layer["bias"][None]
        return jnp.square(y).sum()

    grads = jax.grad(loss, allow_int=True)(packed)  # what the guard lets pass
    flow = bj.analysis.gradient_flow(grads)
    assert flow.paths("ok") == ("layer/bias",)
    assert flow.paths("missing") == ("layer/kernel",)


def test_gradient_flow_sees_imaginary_parts():
    flow = bj.analysis.gradient_flow({"a": jnp.array([3j, 4 + 0j], jnp.complex64)})
    (leaf,) = flow.rows
    assert (leaf.state, leaf.norm, leaf.largest) == ("ok", 5.0, 4.0)


def test_gradient_flow_of_an_nnx_gradient():
    model = nnx.Sequential(
        bj.nnx.BitLinear(4, 3, rngs=nnx.Rngs(0)), bj.nnx.BitLinear(3, 2, rngs=nnx.Rngs(1))
    )
    grads = nnx.grad(lambda m: (m(normal(2, 4)) * jnp.array([[1.0, 3.0]])).sum())(model)
    assert type(grads) is nnx.State
    assert bj.analysis.gradient_flow(grads).ok
    bias = grads["layers"][1]["bias"]
    bias.set_value(bias.get_value().at[0].set(jnp.inf))
    flow = bj.analysis.gradient_flow(grads)
    assert flow.paths("nan") == ("layers/1/bias",)
    assert not flow.ok


def test_gradient_flow_of_complex_and_packed_leaves():
    grads = {"c": jnp.array([3.0 + 4.0j, 0.0j])}
    (leaf,) = bj.analysis.gradient_flow(grads).rows
    assert (leaf.norm, leaf.state) == (5.0, "ok")
    params = {"kernel": bj.pack(jnp.ones((8, 4))), "bias": jnp.ones(4)}

    def loss(p):
        return bj.matmul(jnp.ones((2, 8)), p["kernel"]).sum() + p["bias"].sum()

    flow = bj.analysis.gradient_flow(jax.grad(loss, allow_int=True)(params))
    assert flow.paths("missing") == ("kernel",)
    assert flow.paths("ok") == ("bias",)
