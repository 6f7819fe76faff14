"""The grokking example, in pieces; its figures are in the README."""

import numpy as np
import pytest
from example_loader import load_example
from tqdm import tqdm

pytestmark = pytest.mark.standard_promotion


def test_halves_are_the_products_and_share_none():
    x, y, x_val, y_val = (np.asarray(a) for a in load_example("grokking").products(11, 0))
    both = np.concatenate([x, x_val])
    assert len({tuple(row) for row in both}) == len(both) == 110
    np.testing.assert_array_equal(both[:, 0] * both[:, 2] % 11, np.concatenate([y, y_val]))


@pytest.mark.full
def test_small_runs_learn_the_training_half(tmp_path):
    example = load_example("grokking")
    setting = example.Setting(7, 16, 1, 2, normed_residual=True)
    muon, ma = example.Way("Muon", "muon", 0.0), example.Way("MA", "adam", 0.01, "ma")
    results = {}
    for way, ternary in ((muon, True), (ma, False)):
        run = example.learn(way, setting, 0, ternary, 200, tqdm(disable=True))
        assert run.train.max() > 50
        results[way.name] = [run]
    table = "".join(map(str, example.summary(results, (muon, ma), 200, True)))
    assert "ternary" in table
    assert "float" in table
    example.draw(results, (muon, ma), "", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
