"""Losses of distillation against float64 loops written from the equations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bitnet_jax as bj

answers, states, relation = (
    bj.convert.logit_distillation,
    bj.convert.hidden_distillation,
    bj.convert.attention_relation,
)
LOSSES = {
    "logits": answers,
    "logits, reverse": lambda s, t, **how: answers(s, t, direction="reverse", **how),
    "mse": states,
    "cosine": lambda s, t, **how: states(s, t, distance="cosine", **how),
    "relations": lambda s, t, **how: relation(s, t, heads=2, **how),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def drawn(*shape, seed=0, scale=1.0):
    """States, or logits, of a student and of its teacher, in float64."""
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=shape), scale * rng.normal(size=shape)


def log_softmax64(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def kl64(p, q):
    """Of log-probabilities of one token."""
    return sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -np.inf)


def mean64(values, weight):
    return sum(w * v for w, v in zip(weight, values, strict=True)) / sum(weight)


def logits64(student, teacher, weight, temperature=1.0, direction="forward"):
    each = []
    for s, t in zip(student, teacher, strict=True):
        q, p = log_softmax64(s / temperature), log_softmax64(t / temperature)
        each.append(temperature**2 * (kl64(p, q) if direction == "forward" else kl64(q, p)))
    return mean64(each, weight)


def relations64(student, teacher, heads, weight):
    """One sequence; weight 0 takes a token out of queries and keys."""
    tokens, total = [i for i, w in enumerate(weight) if w], 0.0
    for head, i in itertools.product(range(heads), tokens):
        rows = []
        for x in (teacher, student):
            d = x.shape[1] // heads
            cut = x[:, head * d : (head + 1) * d]
            rows.append(log_softmax64(np.array([cut[i] @ cut[j] / np.sqrt(d) for j in tokens])))
        total += weight[i] * kl64(*rows)
    return total / heads / sum(weight)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits(direction, temperature, dtype):
    student, teacher = (jnp.asarray(x, dtype) for x in drawn(6, 5, scale=3.0))
    given = [np.asarray(x, np.float64) for x in (student, teacher)]
    for weight in (np.ones(6), np.array([1.0, 0.0, 0.25, 2.0, 0.0, 1.0])):
        wanted = logits64(*given, weight, temperature, direction)
        how = {"temperature": temperature, "direction": direction, "where": jnp.float32(weight)}
        got = answers(student, teacher, **how)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=2e-5)


def test_logits_gradient_is_that_of_the_equation():
    """``T (q - p) / tokens`` in the student, and nothing in the teacher."""
    (student, teacher), t = drawn(3, 4), 2.0
    loss = lambda s, z: answers(s, z, temperature=t)  # noqa: E731
    by_student, by_teacher = jax.grad(loss, (0, 1))(jnp.float32(student), jnp.float32(teacher))
    p, q = (np.exp([log_softmax64(z / t) for z in x]) for x in (teacher, student))
    np.testing.assert_allclose(by_student, t * (q - p) / 3, atol=1e-6)
    assert not np.any(by_teacher)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_hot_logits_are_compared_by_their_variance(direction):
    """The limit that the docstring states; a cold teacher answers with its largest logit."""
    student, teacher = drawn(6, 5)
    hot = answers(
        jnp.float32(student), jnp.float32(teacher), temperature=100.0, direction=direction
    )
    np.testing.assert_allclose(hot, 0.5 * (student - teacher).var(axis=-1).mean(), rtol=0.03)
    cold = answers(jnp.float32(student), jnp.float32(teacher), temperature=1e-3)
    best = teacher.argmax(-1)
    by_rank = student.max(-1) - student[np.arange(6), best]  # times T, what that answer lacks
    np.testing.assert_allclose(cold / 1e-3, by_rank.mean(), rtol=1e-3, atol=1e-4)


def test_hidden_states():
    student, teacher = drawn(2, 3, 4, seed=1)
    weight = np.array([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])
    s, t, w = student.reshape(-1, 4), teacher.reshape(-1, 4), weight.ravel()
    mse = mean64(((s - t) ** 2).sum(-1), w) / mean64((t**2).sum(-1), w)
    cosine = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s, t, strict=True)]
    given = jnp.float32(student), jnp.float32(teacher)
    np.testing.assert_allclose(states(*given, where=jnp.float32(weight)), mse, rtol=1e-5)
    got = states(*given, distance="cosine", where=jnp.float32(weight))
    np.testing.assert_allclose(got, mean64(cosine, w), rtol=1e-5)
    same = states(given[1], given[1]), states(3 * given[1], given[1], distance="cosine")
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    np.testing.assert_allclose(states(0 * given[1], given[1]), 1.0, rtol=1e-6)  # what 0 loses


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("weight", [np.ones(5), np.array([1.0, 0.0, 0.5, 2.0, 0.0])])
def test_relations(heads, weight):
    """Of a student with another width, so with other heads, than the teacher's."""
    student, teacher = drawn(5, 8)[0], drawn(5, 12, seed=1)[1]
    wanted = relations64(student, teacher, heads, weight)
    given = jnp.float32(student), jnp.float32(teacher)
    got = relation(*given, heads=heads, where=jnp.float32(weight))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    batch = relation(
        *(jnp.stack([x, 2 * x]) for x in given), heads=heads, where=jnp.float32([weight, weight])
    )
    np.testing.assert_allclose(
        batch, (wanted + relations64(2 * student, 2 * teacher, heads, weight)) / 2, rtol=1e-5
    )


def test_relations_see_no_rotation_of_a_head():
    """They are of dot products: what turns student and teacher does not count."""
    x, _ = drawn(5, 8)
    turn = np.linalg.qr(drawn(8, 8, seed=2)[0])[0]
    loss = relation(jnp.float32(x @ turn), jnp.float32(x), heads=1)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


@every_loss
def test_tokens_left_out_do_not_count(loss):
    """Whatever they hold; if all are left out the loss is 0, and so is its gradient."""
    student, teacher = (jnp.float32(x) for x in drawn(2, 6, 8))
    real = jnp.arange(6)[None] < jnp.array([[6], [3]])
    wanted, slope = jax.value_and_grad(loss)(student, teacher, where=real)
    for junk in (jnp.nan, jnp.inf, 1e30):
        filled = [jnp.where(real[..., None], x, jnp.float32(junk)) for x in (student, teacher)]
        value, gradient = jax.value_and_grad(loss)(*filled, where=real)
        np.testing.assert_array_equal(value, wanted)
        np.testing.assert_array_equal(gradient, slope)
        assert not np.any(np.asarray(gradient)[~np.asarray(real)])
    nothing = jax.value_and_grad(loss)(*filled, where=jnp.zeros_like(real))
    assert float(nothing[0]) == 0.0
    assert not np.any(nothing[1])


@every_loss
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_extremes_are_finite(loss, scale):
    student, teacher = (jnp.float32(x) for x in drawn(2, 6, 8))
    signs = scale * jnp.sign(student), scale * jnp.sign(teacher)
    for pair in itertools.product((*signs, jnp.zeros_like(student)), (*signs, student)):
        value, gradient = jax.value_and_grad(loss)(*pair)
        assert np.isfinite(value)
        assert value >= -1e-6
        assert np.isfinite(gradient).all()


@every_loss
def test_under_transformations(loss):
    student, teacher = (jnp.float32(x) for x in drawn(3, 6, 8))
    whole = loss(student, teacher)
    np.testing.assert_allclose(jax.jit(loss)(student, teacher), whole, rtol=1e-5)
    each = jax.vmap(loss)(student, teacher)
    if loss is not LOSSES["mse"]:  # a quotient of means
        np.testing.assert_allclose(each.mean(), whole, rtol=1e-5)
    narrow = loss(*(x.astype(jnp.bfloat16) for x in (student, teacher)))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, whole, rtol=0.05)


def test_answers_that_are_excluded():
    """-inf in both: as if the answer was not there. In one: infinitely far."""
    student, teacher = (jnp.float32(x) for x in drawn(3, 5))
    out = jnp.arange(5) >= 3
    cut = [jnp.where(out[None], -jnp.inf, x) for x in (student, teacher)]
    for direction in ("forward", "reverse"):
        value, gradient = jax.value_and_grad(answers)(*cut, direction=direction)
        np.testing.assert_allclose(
            value, answers(student[:, :3], teacher[:, :3], direction=direction), rtol=1e-6
        )
        assert np.isfinite(gradient).all()
    assert answers(cut[0], teacher) == jnp.inf
    assert np.isfinite(answers(student, cut[1]))
    assert answers(student, cut[1], direction="reverse") == jnp.inf


def test_temperature_may_be_traced():
    student, teacher = (jnp.float32(x) for x in drawn(3, 5))
    run = jax.jit(lambda t: answers(student, teacher, temperature=t))
    np.testing.assert_allclose(run(2.0), answers(student, teacher, temperature=2.0), rtol=1e-6)


X = jnp.ones((2, 4, 8))
WRONG = {
    "kind": (answers, (X, [1.0]), {}, TypeError, "logit_distillation: `teacher` must be a float"),
    "integers": (states, (X.astype(jnp.int32), X), {}, TypeError, "`student` must be floating"),
    "shape": (answers, (X, X[:1]), {}, ValueError, r"one shape, got \(2, 4, 8\) and \(1, 4, 8\)"),
    "width": (states, (X, X[..., :4]), {}, ValueError, "Project the student's states"),
    "scalar": (answers, (X[0, 0, 0], X[0, 0, 0]), {}, ValueError, "`student` must have axes"),
    "empty": (answers, (X[..., :0], X[..., :0]), {}, ValueError, "`student` must have axes"),
    "cold": (answers, (X, X), {"temperature": 0.0}, ValueError, "`temperature` must be a finite"),
    "nan": (answers, (X, X), {"temperature": np.nan}, ValueError, "`temperature` must be"),
    "way": (answers, (X, X), {"direction": "forwards"}, ValueError, "Did you mean 'forward'"),
    "distance": (states, (X, X), {"distance": "l2"}, ValueError, "`distance` must be one of"),
    "mask": (answers, (X, X), {"where": X[0, :, 0] > 0}, ValueError, "`where` must have the shape"),
    "mask kind": (states, (X, X), {"where": True}, TypeError, "`where` must be an array"),
    "tokens": (relation, (X, X[:, :3]), {"heads": 1}, ValueError, "of the same tokens"),
    "heads": (relation, (X, X[..., :6]), {"heads": 4}, ValueError, "divide the widths .* 8 and 6"),
    "no heads": (relation, (X, X), {"heads": 0}, ValueError, "`heads` must be an integer >= 1"),
    "axes": (relation, (X[0, 0], X[0, 0]), {"heads": 1}, ValueError, r"axes \(..., tokens, width"),
}


@pytest.mark.parametrize(("loss", "args", "how", "kind", "text"), WRONG.values(), ids=WRONG)
def test_bad_input_is_named(loss, args, how, kind, text):
    with pytest.raises(kind, match=text):
        loss(*args, **how)
