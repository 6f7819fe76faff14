"""Predicted changes of the loss, and the choice of configs under a budget of bytes."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convert_kernels import normal
from flax import linen as nn
from flax import nnx
from meshes import both_kinds, mesh_of
from scipy.stats import spearmanr

import bitnet_jax as bj
from bitnet_jax.convert import _knapsack, budget, calibrate
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._options import stakes
from bitnet_jax.convert._output_square import whole_squares

CHANNEL = bj.TernaryConfig(granularity="channel")
GROUPS = bj.TernaryConfig(granularity=8)
INT8 = bj.Int8Config()


def net(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def squared(y, x, *rest):
    """One loss for each row of x."""
    return jnp.square(y - jnp.sin(x[..., : y.shape[-1]])).sum(-1)


PARAMS = {"a": normal(1, 16, 24, scale=0.3), "b": normal(2, 24, 8, scale=0.3)}
ROWS = [normal(10 + i, 16) for i in range(5)]
TERNARY = bj.ternarize(net, weights=CHANNEL)


def expected(w, w_hat, inputs, gradients):
    """``1/2 sum |d|**2 / sum |x|**2 * mean |g|**2 / N`` in float64, x of the diagonal alone."""
    w, w_hat, inputs = (np.asarray(v, np.float64) for v in (w, w_hat, inputs))
    squares = np.square(inputs).sum(0)
    lost = (squares[:, None] * np.square(w - w_hat)).sum()
    mean = np.mean([np.square(np.asarray(g, np.float64)).sum() for g in gradients])
    return 0.5 * lost / squares.sum() * mean / w.shape[1]


def by_path(tree):
    """Leaves by their paths, packed ones whole."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=bj.is_packed)
    return {"/".join(key.key for key in keys): leaf for keys, leaf in flat}


def check_changes(report, packed, params, apply):
    """Rows of a report of batches of one loss each, whose signs fall out, against the formula."""
    gradients = [by_path(jax.grad(lambda p, x=x: squared(apply(p, x), x))(params)) for x in ROWS]
    floats, kernels = by_path(params), by_path(packed)
    assert report.predicts == "loss"
    assert {row.path for row in report.rows} == set(floats)
    for row in report.rows:
        own = [each[row.path] for each in gradients]
        inputs = inputs_of(row.path)
        wanted = expected(floats[row.path], kernels[row.path].dequantize(), inputs, own)
        assert row.change == pytest.approx(wanted, rel=1e-4)


def inputs_of(path):
    x = np.stack(ROWS)
    return x if path.startswith("a") else np.tanh(x @ np.asarray(PARAMS["a"]))


@pytest.mark.parametrize("method", ["absmean", "survivors", "weighted"])
def test_the_change_is_the_formula(method):
    packed, report = calibrate(TERNARY, PARAMS, ROWS, method=method, loss=squared)
    check_changes(report, packed, PARAMS, net)


def test_the_change_with_all_second_moments():
    packed, report = calibrate(TERNARY, PARAMS, ROWS, method="gptq", loss=squared)
    x = np.asarray(ROWS, np.float64)
    d = np.asarray(packed["a"].dequantize() - PARAMS["a"], np.float64)
    gradients = [jax.grad(lambda p, x=x: squared(net(p, x), x))(PARAMS)["a"] for x in ROWS]
    mean = np.mean([np.square(np.asarray(g, np.float64)).sum() for g in gradients])
    wanted = 0.5 * np.square(x @ d).sum() / np.square(x).sum() * mean / 24
    assert report.rows[0].change == pytest.approx(wanted, rel=1e-4)


def test_a_linen_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(24, use_bias=False, name="a")(x))
            return nn.Dense(8, use_bias=False, name="b")(x)

    params = {name: {"kernel": w} for name, w in PARAMS.items()}
    model = bj.linen.ternarize(Net(), weights=CHANNEL)
    packed, report = calibrate(model, params, ROWS, method="weighted", loss=squared)
    check_changes(report, packed, params, lambda p, x: Net().apply({"params": p}, x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(16, 24, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(24, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.a(x)) @ self.b.kernel.get_value(), x  # an input comes back


def test_an_nnx_model():
    model = Nnx(nnx.Rngs(0))
    for name, w in PARAMS.items():
        getattr(model, name).kernel.set_value(w)
    bj.nnx.ternarize(model, weights=CHANNEL)

    def loss(outputs, x):
        y, same = outputs
        return squared(y, same) + squared(y, x) * 0

    _, report = calibrate(model, None, ROWS, method="weighted", loss=loss)
    _, other = calibrate(TERNARY, PARAMS, ROWS, method="weighted", loss=squared)
    found = {row.path.removesuffix("/kernel"): row.change for row in report.rows}
    assert found == pytest.approx({row.path: row.change for row in other.rows}, rel=1e-5)


def test_slices_have_slopes_of_their_own():
    stack = jnp.stack(
        [PARAMS["a"][:, :16], 0.1 * PARAMS["a"][:, 8:], PARAMS["b"][:16] @ normal(3, 8, 16)]
    )

    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, w)[0]

    def apart(ws, x):
        return functools.reduce(lambda x, w: x + jnp.tanh(x @ w), ws, x)

    _, one = calibrate(bj.ternarize(scanned), stack, ROWS, method="survivors", loss=squared)
    _, several = calibrate(bj.ternarize(apart), [*stack], ROWS, method="survivors", loss=squared)
    assert one.rows[0].change == pytest.approx(sum(row.change for row in several.rows), rel=1e-5)


def test_signs_give_the_mean_over_losses():
    """Losses of one batch, signed, against batches of one loss each: noise, but no bias."""
    x = normal(4, 64, 16)
    _, signed = calibrate(TERNARY, PARAMS, [*x.reshape(8, 8, 16)], method="weighted", loss=squared)
    _, exact = calibrate(TERNARY, PARAMS, [*x], method="weighted", loss=squared)
    for row, other in zip(signed.rows, exact.rows, strict=True):
        assert row.change != other.change
        assert row.change == pytest.approx(other.change, rel=0.3)


def test_experts_that_saw_no_token_cost_nothing():
    params = {"w": normal(1, 2, 16, 8)}
    x = np.array(normal(2, 2, 6, 16))
    x[1] = 0
    ternary = bj.ternarize(lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]))
    _, report = calibrate(ternary, params, [x], method="gptq", loss=lambda y, x: y)
    alone = bj.ternarize(lambda p, x: x @ p["w"])
    _, other = calibrate(alone, {"w": params["w"][0]}, [x[0]], method="gptq", loss=lambda y, x: y)
    assert math.isfinite(report.rows[0].change)
    assert report.rows[0].change == pytest.approx(other.rows[0].change, rel=0.5)


@both_kinds
def test_on_a_mesh(kind):
    mesh = mesh_of(kind, (2, 4), ("data", "model"))
    spec = jax.sharding.PartitionSpec
    place = functools.partial(jax.sharding.NamedSharding, mesh)

    def fn(params, x):
        h = jnp.tanh(x @ params["a"])
        out = spec("data", None) if kind == "explicit" else None
        return jnp.einsum("td,df->tf", h, params["b"], out_sharding=out)

    x = jnp.stack(ROWS[:4])
    with jax.set_mesh(mesh):
        params = {
            "a": jax.device_put(PARAMS["a"], place(spec(None, "model"))),
            "b": jax.device_put(PARAMS["b"], place(spec("model", None))),
        }
        there = jax.device_put(x, place(spec("data", None)))
        ternary = bj.ternarize(fn, weights=CHANNEL)
        _, report = calibrate(ternary, params, [there], method="weighted", loss=lambda y, x: y)
    _, other = calibrate(TERNARY, PARAMS, [x], method="weighted", loss=lambda y, x: y)
    for row, wanted in zip(report.rows, other.rows, strict=True):
        assert row.change == pytest.approx(wanted.change, rel=1e-4)


def test_without_a_loss_the_change_is_the_error():
    _, report = calibrate(TERNARY, PARAMS, [normal(0, 50, 16)], method="weighted")
    assert report.predicts == "error"
    assert [row.change for row in report.rows] == [row.error for row in report.rows]
    assert "change" not in str(report)
    assert report.rows[0].options == ()


def test_a_stake_of_inputs_that_go_together():
    """``1/2 tr(W^T H W) / tr(H) squares / N``, in float64."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 30, 6)), rng.normal(size=(2, 6, 4)).astype(np.float32)
    h = np.einsum("bti,btj->bij", x, x)
    seen = Statistics(np.array([30, 30]), h)
    found = stakes(w, seen, whole_squares(w, seen), np.array([2.0, 5.0]))
    y = np.einsum("bti,bin->btn", x, w.astype(np.float64))
    wanted = 0.5 * np.square(y).sum((1, 2)) / np.square(x).sum((1, 2)) * [2.0, 5.0] / 4
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def trained():
    """A network of residual layers, trained on a task of its own, and data."""
    x, first, second = normal(0, 1024, 16), normal(5, 16, 16, scale=0.5), normal(6, 16, 4)
    labels = jax.random.categorical(jax.random.key(7), jnp.tanh(x @ first) @ second)
    widths = (16, 64, 8, 48, 16, 4)
    sizes = [*itertools.pairwise(widths)]
    params = {
        f"layer_{i}": normal(20 + i, *size) / math.sqrt(size[0]) for i, size in enumerate(sizes)
    }
    params |= {
        "skip_0": normal(30, 16, 8) / 4,
        "skip_1": normal(31, 8, 16) / 3,
        "wide": normal(32, 16, 4) / 4,
    }

    def fn(p, x, labels):
        h = jnp.tanh(x @ p["layer_0"]) @ p["layer_1"] + x @ p["skip_0"]
        h = jnp.tanh(h @ p["layer_2"]) @ p["layer_3"] + h @ p["skip_1"]
        logits = h @ p["layer_4"] + x @ p["wide"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    tx = optax.adam(1e-2)

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(lambda p: fn(p, x, labels).mean())(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=80)
    return fn, params, (x, labels)


@pytest.mark.standard_promotion  # optax fails under strict promotion
@pytest.mark.parametrize("method", ["absmean", "gptq"])
def test_the_order_is_that_of_the_loss(method):
    """Spearman of what is predicted and of what one kernel alone does to the loss."""
    fn, params, batch = trained()
    batches = [tuple(part[i : i + 128] for part in batch) for i in range(0, 1024, 128)]
    ternary = bj.ternarize(fn, weights=CHANNEL, activations=None)
    packed, report = calibrate(
        ternary, params, batches, method=method, loss=lambda losses, *args: losses
    )

    def mean(p):
        return float(fn(p, *batch).mean())

    hats = {name: kernel.dequantize() for name, kernel in packed.items()}
    changes = [mean({**params, row.path: hats[row.path]}) - mean(params) for row in report.rows]
    found = [row.change for row in report.rows]
    assert spearmanr(found, changes).statistic >= 0.8
    if method == "absmean":
        measured = bj.analysis.sensitivity(
            lambda p: fn(p, *batch).mean(), params, CHANNEL, select=ternary.kernels(params, *batch)
        )
        alone = {row.path: row.change for row in measured.rows}
        assert spearmanr(found, [alone[row.path] for row in report.rows]).statistic >= 0.8
        assert 0.1 < sum(found) / sum(alone.values()) < 2


def brute(items, limit):
    """The least cost of all choices that fit; None where none does."""
    choices = itertools.product(*(range(len(sizes)) for sizes, _ in items))
    costs = [
        sum(costs[i] for (_, costs), i in zip(items, choice, strict=True))
        for choice in choices
        if sum(sizes[i] for (sizes, _), i in zip(items, choice, strict=True)) <= limit
    ]
    return min(costs, default=None)


def drawn(seed, sizes=60):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, rng.integers(1, 7))
    items = [(rng.integers(1, sizes, n).tolist(), rng.random(n).round(2).tolist()) for n in counts]
    return items, int(rng.integers(1, 4 * sizes))


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_best(seed):
    items, limit = drawn(seed)
    wanted, found = brute(items, limit), _knapsack.cheapest(items, limit)
    assert (found is None) == (wanted is None)
    if found is not None:
        pairs = list(zip(items, found, strict=True))
        assert sum(sizes[i] for (sizes, _), i in pairs) <= limit
        assert sum(costs[i] for (_, costs), i in pairs) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(40))
def test_where_there_are_too_many_sums_sizes_are_rounded(seed, monkeypatch):
    """The choice fits, and is as good as any that leaves a unit for each item."""
    monkeypatch.setattr(_knapsack, "MOST", 12)
    items, limit = drawn(seed, sizes=1000)
    limit += sum(min(sizes) + 1 for sizes, _ in items) * 2
    unit = -(-limit // 12)
    found = _knapsack.cheapest(items, limit)
    assert found is not None
    pairs = list(zip(items, found, strict=True))
    assert sum(sizes[i] for (sizes, _), i in pairs) <= limit
    known = brute(items, limit - len(items) * unit)
    if known is not None:
        assert sum(costs[i] for (_, costs), i in pairs) <= known + 1e-9


@functools.cache
def compared():
    """A report of four options a kernel."""
    how = {"method": "weighted", "loss": squared, "candidates": (CHANNEL, GROUPS, INT8)}
    return calibrate(TERNARY, PARAMS, [normal(0, 50, 16)], **how)[1]


def test_options_are_what_packing_gives():
    report = compared()
    for row in report.rows:
        assert [option.config for option in row.options] == [CHANNEL, GROUPS, INT8, None]
        assert row.options[0].error == row.error
        assert row.options[0].change == row.change
        for option in row.options[:-1]:
            w = PARAMS[row.path]
            assert option.bytes == bj.pack(w, option.config).nbytes
            alone = bj.ternarize(net, select=lambda path, _, c=option.config: c)
            _, other = calibrate(
                alone, PARAMS, [normal(0, 50, 16)], method="weighted", loss=squared
            )
            (same,) = [r for r in other.rows if r.path == row.path]
            assert option.change == pytest.approx(same.change, rel=1e-6)
        assert row.options[-1] == bj.convert.Option(None, PARAMS[row.path].nbytes, 0.0, 0.0)


def test_a_budget_is_a_selector():
    report = compared()
    least = sum(min(o.bytes for o in row.options) for row in report.rows)
    for limit in (least, least + 300, 10**6):
        choice = budget(report, bytes=limit)
        assert choice.bytes <= limit
        assert choice.change == pytest.approx(brute_of(report, limit))
        if choice.bytes == sum(w.nbytes for w in PARAMS.values()):
            assert choice.change == 0
            assert limit == 10**6
            continue
        ternary = bj.ternarize(net, select=choice)
        packed, again = calibrate(ternary, PARAMS, [normal(0, 50, 16)], method="weighted")
        assert {r.path: r.config for r in again.rows} == {
            r.path: r.config for r in choice.rows if r.config is not None
        }
        assert sum(leaf.nbytes for leaf in packed.values()) == choice.bytes
    assert choice(("elsewhere",), PARAMS["a"]) is None


def brute_of(report, limit):
    items = [([o.bytes for o in r.options], [o.change for o in r.options]) for r in report.rows]
    return brute(items, limit)


def test_a_budget_of_a_linen_model():
    model = nn.Sequential([nn.Dense(24), nn.tanh, nn.Dense(8)])
    x = normal(0, 50, 16)
    params = model.init(jax.random.key(0), x)["params"]
    ternary = bj.linen.ternarize(model, weights=CHANNEL)
    _, report = calibrate(ternary, params, [x], loss=squared, candidates=[INT8])
    choice = budget(report, bytes=600)
    again, _ = calibrate(bj.linen.ternarize(model, select=choice), params, [x])
    kinds = [type(again[f"layers_{i}"]["kernel"]).__name__ for i in (0, 2)]
    assert sorted(kinds) == ["PackedInt8", "PackedTernary"]


def test_int8_kernels_stay_as_they_were_selected():
    select = {("a",): INT8, ("b",): CHANNEL}
    ternary = bj.ternarize(net, select=lambda path, _: select[path])
    _, report = calibrate(ternary, PARAMS, ROWS, candidates=[GROUPS], loss=squared)
    assert [[o.config for o in row.options] for row in report.rows] == [
        [INT8, None],
        [CHANNEL, GROUPS, None],
    ]
    assert report.rows[0].change > 0


def test_text_and_numbers():
    report = compared()
    choice = budget(report, bytes=1000)
    for one in (report, choice):
        json.loads(json.dumps(one.to_dict(), allow_nan=False))
    numbers = choice.to_dict()
    assert numbers["bytes"] == choice.bytes == sum(row["bytes"] for row in numbers["rows"])
    assert [row["config"] for row in numbers["rows"]] == [repr(r.config) for r in choice.rows]
    lines = str(choice).splitlines()
    assert [line.split()[0] for line in lines] == ["path", "a", "b", "all"]
    assert "change" in lines[0]
    assert str(report).splitlines()[0].split() == (
        ["path", "method", "shape", "tokens", "error", "absmean", "change", "notes"]
    )
    options = report.to_dict()["rows"][0]["options"]
    assert [option["kind"] for option in options] == ["ternary", "ternary", "int8", "float"]


def test_a_budget_by_errors_says_so():
    _, report = calibrate(TERNARY, PARAMS, ROWS, method="weighted", candidates=[INT8])
    choice = budget(report, bytes=10**6)
    assert choice.predicts == "error"
    assert "change" not in str(choice)


def test_budgets_that_are_none():
    report = compared()
    least = sum(min(o.bytes for o in row.options) for row in report.rows)
    with pytest.raises(ValueError, match=f"`bytes`={least - 1} is less .* the least, {least} "):
        budget(report, bytes=least - 1)
    with pytest.raises(ValueError, match="less than the kernels take"):
        budget(report, bytes=-5)
    for size in (1e6, "1 MB", None, True):
        with pytest.raises(TypeError, match="`bytes` must be an integer"):
            budget(report, bytes=size)
    with pytest.raises(TypeError, match="`report` must be"):
        budget(report.rows, bytes=1000)
    _, plain = calibrate(TERNARY, PARAMS, ROWS, method="weighted")
    with pytest.raises(ValueError, match=r"compares no configs of a\. .*CANDIDATES"):
        budget(plain, bytes=1000)
    option = dataclasses.replace(report.rows[1].options[0], change=math.nan)
    rows = report.rows[0], dataclasses.replace(report.rows[1], options=(option,))
    with pytest.raises(ValueError, match="change of b as ternary, channel is nan"):
        budget(dataclasses.replace(report, rows=rows), bytes=1000)


def refused(error, match, **how):
    with pytest.raises(error, match=match):
        calibrate(TERNARY, PARAMS, ROWS, method="weighted", **how)


def test_losses_that_are_none():
    refused(TypeError, "`loss` must be a function", loss="logits")
    refused(TypeError, "`loss` must return an array of losses.*int", loss=lambda y, x: y.argmax(-1))
    refused(TypeError, "`loss` must return an array", loss=lambda y, x: 1.0)
    refused(TypeError, "`loss` must return an array", loss=lambda y, x: y[:0])
    refused(
        ValueError,
        "gradient of `loss` for a is NaN or Inf in batch 0",
        loss=lambda y, x: jnp.sqrt(y * 0),
    )
    refused(ValueError, "does not run on batch 0.*positional", loss=lambda y: y)


def test_candidates_that_are_none():
    refused(TypeError, "`candidates` must be a list", candidates="int8")
    refused(TypeError, "`candidates` must be a list", candidates=[])
    refused(TypeError, "`candidates` must be a list", candidates=INT8)
    refused(TypeError, r"candidates\[1\]", candidates=[INT8, 3])
    seven = bj.TernaryConfig(granularity=7)
    refused(ValueError, r"no kernel can have .*=7.*contractions \[16, 24\]", candidates=[seven])
    # One that only some kernels can have is theirs.
    _, report = calibrate(
        TERNARY, PARAMS, ROWS, method="weighted", candidates=[bj.TernaryConfig(granularity=12)]
    )
    assert [len(row.options) for row in report.rows] == [2, 3]


def test_ready_candidates_serve_narrow_kernels():
    """Those with groups that fit none are left out, and budget's remedy works everywhere."""
    how = {"loss": squared, "candidates": bj.convert.CANDIDATES}
    _, report = calibrate(TERNARY, PARAMS, ROWS, method="weighted", **how)
    for row in report.rows:
        assert {option.config for option in row.options} == {CHANNEL, INT8, None}
    assert bj.convert.budget(report, bytes=10_000).bytes <= 10_000
