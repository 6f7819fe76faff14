"""The recipe of a run from float to ternary: its losses, its schedules, and that it works."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bitnet_jax as bj

recipe_of = bj.convert.finetune_recipe
KEYS = jax.random.split(jax.random.key(0), 6)
LOGITS = jax.random.normal(KEYS[0], (2, 3, 4, 5))  # student and teacher, (3, 4, 5) each
STATES = jax.random.normal(KEYS[1], (2, 3, 4, 8))
LABELS = jax.random.randint(KEYS[2], (3, 4), 0, 5)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    recipe = recipe_of(
        100, 1e-2, temperature=2.0, labels=0.5, logits=3.0, hidden=0.25, relations=7.0, heads=2
    )
    where = jnp.arange(4)[None] < jnp.array([[4], [2], [1]])
    pairs = [tuple(STATES), tuple(2 * STATES), tuple(STATES**2)]
    found = recipe.loss(*LOGITS, LABELS, hidden=pairs[:2], relations=pairs, where=where)
    assert isinstance(found, bj.convert.Losses)
    log_q = np.asarray(jax.nn.log_softmax(LOGITS[0]), np.float64)
    picked = np.take_along_axis(log_q, np.asarray(LABELS)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.labels, -picked[np.asarray(where)].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        found.logits, bj.convert.logit_distillation(*LOGITS, temperature=2.0, where=where)
    )
    hidden = [bj.convert.hidden_distillation(*pair, where=where) for pair in pairs[:2]]
    alike = [bj.convert.attention_relation(*pair, heads=2, where=where) for pair in pairs]
    np.testing.assert_allclose(found.hidden, np.mean(hidden), rtol=1e-6)
    np.testing.assert_allclose(found.relations, np.mean(alike), rtol=1e-6)
    wanted = 0.5 * found.labels + 3 * found.logits + 0.25 * found.hidden + 7 * found.relations
    np.testing.assert_allclose(found.total, wanted, rtol=1e-6)


def test_padding_may_hold_anything():
    """Labels of -100 and logits of NaN, where the mask leaves them out."""
    recipe = recipe_of(10, 1e-2)
    where = jnp.arange(4)[None] < jnp.array([[4], [2], [0]])
    labels = jnp.where(where, LABELS, -100)
    student = jnp.where(where[..., None], LOGITS[0], jnp.nan)

    def total(student):
        return recipe.loss(student, LOGITS[1], labels, where=where).total

    value, gradient = jax.value_and_grad(total)(student)
    np.testing.assert_allclose(value, recipe.loss(*LOGITS, LABELS, where=where).total, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[~np.asarray(where)])


def test_a_part_without_weight_costs_nothing():
    """Not even where it is Inf: a teacher of another kind beside labels alone."""
    recipe = recipe_of(10, 1e-2, logits=0.0)
    student = LOGITS[0].at[..., 0].set(-jnp.inf)
    found = recipe.loss(student, LOGITS[1], jnp.maximum(LABELS, 1))
    assert found.logits == jnp.inf
    np.testing.assert_array_equal(found.total, found.labels)


def test_schedules():
    recipe = recipe_of(1000, 2e-3)
    rates = [float(recipe.learning_rate(step)) for step in (0, 25, 50, 525, 1000)]
    np.testing.assert_allclose(rates, [0.0, 1e-3, 2e-3, 1e-3, 0.0], atol=1e-9)
    assert [float(recipe.weight_decay(step)) for step in (0, 499, 500)] == [
        np.float32(0.1),
        np.float32(0.1),
        0.0,
    ]
    assert [float(recipe.strength(step)) for step in (0, 200, 400, 999)] == [0.0, 0.5, 1.0, 1.0]
    assert float(recipe_of(10_000, 1e-3).strength(1000)) == 1.0  # the published ramp at most
    assert float(recipe_of(100, 1e-3, ramp_steps=0).strength(0)) == 1.0
    assert float(recipe_of(100, 1e-3, warmup_steps=0).learning_rate(0)) == np.float32(1e-3)


@pytest.mark.standard_promotion
def test_only_matrices_decay():
    params = {"kernel": jnp.ones((4, 4)), "scale": jnp.ones(4), "bias": jnp.zeros(())}
    tx = recipe_of(10, 1e-2, warmup_steps=0).optimizer()
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -1e-2 * 0.1, rtol=1e-5)
    assert not np.any(updates["scale"])
    assert not np.any(updates["bias"])


@pytest.mark.standard_promotion
def test_a_run_brings_the_student_to_its_teacher():
    """A plain function, by the recipe with everything in it: from hidden states to relations."""
    params = {
        name: jax.random.normal(key, shape) / np.sqrt(shape[0])
        for name, key, shape in zip("abc", KEYS[3:], ((8, 32), (32, 32), (32, 5)), strict=True)
    }

    def network(params, x):
        hidden = jax.nn.relu(x @ params["a"])
        hidden = jax.ad_checkpoint.checkpoint_name(hidden @ params["b"], "hidden")
        return jax.nn.relu(hidden) @ params["c"]

    recipe = recipe_of(150, 2e-2, labels=0.0, logits=1.0, hidden=1.0, relations=1.0, heads=4)
    teacher = bj.convert.capture(network, "hidden")
    student = bj.convert.capture(bj.ternarize(network), "hidden")
    tx = recipe.optimizer()

    def loss(tuned, step, x):
        with bj.phase_in(recipe.strength(step)):
            logits, states = student(tuned, x)
        answers, wanted = teacher(params, x)
        pairs = [(states["hidden"][0], wanted["hidden"][0])]
        labels = answers.argmax(-1)
        return recipe.loss(logits, answers, labels, hidden=pairs, relations=pairs)

    @jax.jit
    def update(carry, step):
        tuned, state = carry
        x = jax.random.normal(jax.random.fold_in(KEYS[0], step), (4, 16, 8))
        gradients = jax.grad(lambda tuned: loss(tuned, step, x).total)(tuned)
        updates, state = tx.update(gradients, state, tuned)
        return (optax.apply_updates(tuned, updates), state), None

    x = jax.random.normal(KEYS[1], (4, 64, 8))
    before = loss(params, recipe.steps, x)
    (tuned, _), _ = jax.lax.scan(update, (params, tx.init(params)), jnp.arange(recipe.steps))
    after = loss(tuned, recipe.steps, x)
    for name in ("logits", "hidden", "relations"):
        assert getattr(after, name) < 0.5 * getattr(before, name), (name, before, after)


WRONG = {
    "steps": ((1, 1e-2), {}, "`steps` must be an integer >= 2, got 1"),
    "rate": ((10, 0.0), {}, "`learning_rate` must be a finite number > 0"),
    "decay": ((10, 1e-2), {"weight_decay": -1.0}, "must be a finite number >= 0"),
    "weight": ((10, 1e-2), {"hidden": -1.0}, "`hidden` must be a finite number >= 0"),
    "nothing": ((10, 1e-2), {"labels": 0.0, "logits": 0.0}, "Give one a weight"),
    "ramp": ((10, 1e-2), {"ramp_steps": 10}, "`ramp_steps` must be less than `steps`, 10, got 10"),
    "warm-up": ((10, 1e-2), {"warmup_steps": -1}, "`warmup_steps` must be an integer >= 0"),
    "temperature": ((10, 1e-2), {"temperature": 0}, "`temperature` must be a finite number > 0"),
    "heads": ((10, 1e-2), {"heads": 1.5}, "`heads` must be an integer >= 1"),
}


@pytest.mark.parametrize(("args", "how", "text"), WRONG.values(), ids=WRONG)
def test_bad_input_is_named(args, how, text):
    with pytest.raises(ValueError, match=text):
        recipe_of(*args, **how)


def test_bad_input_of_the_loss_is_named():
    recipe = recipe_of(10, 1e-2, hidden=1.0)
    pair = [tuple(STATES)]
    with pytest.raises(TypeError, match="`labels` must be an array of integers, got float32"):
        recipe.loss(*LOGITS, LABELS.astype(jnp.float32), hidden=pair)
    with pytest.raises(ValueError, match=r"`labels` must have the shape of .* \(3, 4\), got \(3,"):
        recipe.loss(*LOGITS, LABELS[:, 0], hidden=pair)
    with pytest.raises(ValueError, match="`hidden` is 1, and 0 pairs were passed"):
        recipe.loss(*LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"`relations` is 0, and 1 pairs were passed\. Leave"):
        recipe.loss(*LOGITS, LABELS, hidden=pair, relations=pair)
    with pytest.raises(TypeError, match="`hidden` must be a sequence of pairs"):
        recipe.loss(*LOGITS, LABELS, hidden=STATES)


def test_its_text_has_no_addresses():
    assert "0x" not in repr(recipe_of(10, 1e-3))
    assert "temperature=" in repr(recipe_of(10, 1e-3))
