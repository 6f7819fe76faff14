"""The distillation example, in pieces, on the digits and a smaller network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_loader import EXAMPLES, load_example
from tqdm import tqdm

pytestmark = [pytest.mark.standard_promotion, pytest.mark.full]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load_example("distill")


def test_the_digits_come_back_from_packing(example):
    """The float network is the teacher, and is left as it is; the table has a row for each way."""
    task = dataclasses.replace(example.digits(400), relations=())
    states = next(way for way in example.WAYS if way.recipe == {"hidden": 1.0})
    results: dict = {}
    example.run(task, 0, (example.FLOAT, states), results, tqdm(disable=True))
    (float_loss, _), (untrained, _), (tuned, accuracy) = (
        results[name][0] for name in (example.FLOAT.name, example.UNTRAINED, states.name)
    )
    assert float_loss < 0.5
    assert tuned < untrained - 0.1
    assert accuracy > 90
    table = str(example.summary("Ways", {task: results}))
    assert "+ 200" in table
    assert states.name in table


def test_training_takes_a_copy_of_its_start(example):
    task = example.digits(2 * example.EVERY)
    data, _ = task.data(0)
    start = task.init(0)
    before = jax.tree.map(np.array, start)
    moved = example.train(task, example.RECIPE, 0, start, data, tqdm(disable=True))
    jax.tree.map(np.testing.assert_array_equal, before, start)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved, start)), strict=True))


def test_both_decoders_hand_out_the_same_states(example):
    """Float and ternary, of one tree of parameters: what the recipe compares is there."""
    task = example.manual(600)
    patterns = [task.hidden, *task.relations]
    params, x = task.init(0), jnp.zeros((1, 6), jnp.int32)
    shapes = [
        jax.eval_shape(task.run(kind, patterns), params, x)[1] for kind in ("float", "ternary")
    ]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
    assert set(shapes[0]) == {"layers/0", "layers/1", *task.relations}
