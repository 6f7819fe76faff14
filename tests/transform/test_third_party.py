"""Published models of other codebases: most of each is ternary, trains and packs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from third_party import CASES

import bitnet_jax as bj

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]


@pytest.fixture(autouse=True)
def as_users_run():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_published_model_is_ternary_trains_and_packs(name):
    case = CASES[name][1]()
    ternary = bj.ternarize(case.fn)
    table = ternary.explain(case.params, *case.inputs)
    assert sum(table.share.values()) > 0.5, str(table)
    kernels = [row for row in table.rows if row.share and "embedding" not in row.why]
    assert all(row.config is not None for row in kernels), str(table)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.square(ternary(params, *case.inputs).astype(jnp.float32) - 0.5).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = case.params, tx.init(case.params), []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    packed, report = ternary.pack(params, *case.inputs)
    assert {row.path for row in report.rows} == set(table.ternary)
    apply = jax.jit(ternary)
    trained, served = apply(params, *case.inputs), apply(packed, *case.inputs)
    # Norms and softmaxes may be fused otherwise around a packed product; no code flips here.
    np.testing.assert_allclose(served, trained, rtol=1e-4, atol=1e-5)
    if case.module is not None:
        model = bj.linen.ternarize(case.module)
        out = jax.jit(model.apply)({"params": packed}, *case.inputs)
        first = jax.tree.leaves(out[0] if isinstance(out, tuple) or hasattr(out, "keys") else out)
        np.testing.assert_allclose(first[0], served, rtol=1e-4, atol=1e-5)
