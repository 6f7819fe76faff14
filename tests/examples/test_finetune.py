"""The fine-tuning example, in pieces; its figures are in the README and in a slow test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_loader import EXAMPLES, load_example
from tqdm import tqdm

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load_example("finetune")


def test_text_is_split_once_and_asks_for_the_next_byte(example):
    text = np.frombuffer(example.manual(), np.uint8)
    train, (x, y) = example.data_of(example.BYTES, 0)
    x, y = np.asarray(x).ravel(), np.asarray(y).ravel()
    np.testing.assert_array_equal(x[1:], y[:-1])
    np.testing.assert_array_equal(train, text[: len(train)])
    np.testing.assert_array_equal(x, text[len(train) : len(train) + len(x)])
    assert 0.09 < len(x) / len(text) < 0.1
    for key in jax.random.split(jax.random.key(0), 3):
        rows, following = example.batch_of_text(key, jnp.arange(500))
        np.testing.assert_array_equal(rows + 1, following)
        assert rows.shape == (32, example.CONTEXT)
        assert following.max() < 500


@pytest.mark.full
def test_fine_tuning_mends_what_packing_broke(example, tmp_path):
    net = dataclasses.replace(example.DIGITS.model, hidden=(8,))
    task = dataclasses.replace(example.DIGITS, model=net, steps=240)
    ways = (example.FLOAT, example.TUNED)
    run = example.run(task, example.RATES["digits"], 0, tqdm(disable=True), ways)
    float32, untrained, tuned = (
        run[name] for name in (example.FLOAT.name, example.UNTRAINED, example.TUNED.name)
    )
    assert float32.loss < float32.curve[0]
    assert tuned.loss < untrained.loss - 0.1
    np.testing.assert_allclose(tuned.loss, tuned.curve[-1], rtol=1e-5)  # served as trained
    table = str(example.summary({"digits": [run, run]}, [task]))
    assert "120" in table
    assert "±" in table
    example.draw({"digits": [run]}, [task], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.full
def test_training_takes_a_copy_of_its_start(example):
    task = dataclasses.replace(example.DIGITS, steps=2 * example.EVERY)
    data = example.data_of(task, 0)
    start = task.model.init(jax.random.key(0), data[1][0][:1])["params"]
    before = jax.tree.map(np.array, start)
    bar = tqdm(disable=True)
    moved, curve = example.train(task, example.TUNED, 1e-2, 0, start, data, bar)
    jax.tree.map(np.testing.assert_array_equal, before, start)  # the teacher
    assert len(curve) == 1
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved, start)), strict=True))


@pytest.mark.slow
def test_ternary_language_models_are_within_reach_of_float_ones(example, tmp_path):
    results = example.main(["--out", str(tmp_path)])
    (run,) = results["bytes"]
    loss = {name: result.loss for name, result in run.items()}
    untrained = loss[example.UNTRAINED]
    assert loss[example.SCRATCH.name] <= loss[example.FLOAT.name] + 0.1, loss  # aimed at: 0.05
    assert loss[example.SCRATCH.name] <= untrained - 0.3, loss
    assert loss[example.TUNED.name] <= untrained - 0.3, loss
