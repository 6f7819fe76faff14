"""The language model example: it learns, and packing changes nothing that it learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_loader import load_example
from flax import nnx

pytestmark = pytest.mark.full  # each compiles a decoder


@pytest.mark.standard_promotion
def test_kernels_and_the_rest_have_rates_of_their_own():
    """Adam's first step is the rate, against the gradient's sign; at 0 no weight decays."""
    example = load_example("language_model")
    params = nnx.state(nnx.eval_shape(lambda: example.decoder("ternary")), nnx.Param)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    tx = example.optimizer_of(1e-2, 3e-2)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, zeros), tx.init(zeros), zeros)
    steps = {"kernel": set(), "rest": set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        kind = "kernel" if leaf.ndim == 2 and leaf.shape[0] != 256 else "rest"
        assert ("kernel" in jax.tree_util.keystr(path)) == (kind == "kernel")
        steps[kind] |= set(np.unique(leaf).tolist())
    np.testing.assert_allclose(sorted(steps["kernel"]), -1e-2, rtol=1e-6)
    np.testing.assert_allclose(sorted(steps["rest"]), -3e-2, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_quick(tmp_path, capsys):
    results = load_example("language_model").main(["--quick", "--out", str(tmp_path)])
    assert set(results) == {"float", "ternary", "packed"}
    assert results["packed"][0] == pytest.approx(results["ternary"][0], abs=1e-5)
    assert results["packed"][1] < results["ternary"][1] / 4
    assert "from the bits: The with statement " in capsys.readouterr().out
    assert (tmp_path / "language_model.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_it_learns(tmp_path):
    results = load_example("language_model").main(["--out", str(tmp_path)])
    assert results["ternary"][0] < 2.0
    assert abs(results["ternary"][0] - results["float"][0]) < 0.2
    assert results["packed"][0] == pytest.approx(results["ternary"][0], abs=1e-4)
