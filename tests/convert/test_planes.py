"""Methods for several planes against brute force and float64 loops written from the equations."""

import itertools

import jax
import numpy as np
import pytest
from cases import cases
from convert_kernels import NOTHING, config, dequantized, diagonal, inputs, kernel, seen

import bitnet_jax as bj
from bitnet_jax.convert import _best_scale, _gptq, _plane_scales, _refit
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._methods import METHODS, gptq, planes, survivors, weighted
from bitnet_jax.convert._plane_grid import grid_of, largest_first, solved
from bitnet_jax.convert._relative_error import error


def combos(count):
    """All codes of the planes of one weight, (3**P, P)."""
    return np.array(list(itertools.product((-1, 0, 1), repeat=count)))


def by_plane(quantized, count):
    """Codes (P, K, N) and scales (P, G, N) in float64 of a kernel without batch axes."""
    parts = quantized.codes[0], quantized.scale[0].astype(np.float64)
    return tuple(part.reshape(count, -1, part.shape[1]) for part in parts)


# ---- the grid


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_codes_of_given_scales_are_the_best_of_all(count):
    rng = np.random.default_rng(count)
    w = rng.normal(size=(40, 6)).astype(np.float32)
    scale = rng.exponential(size=(count, 6)).astype(np.float32)
    scale[:, 0] = np.float32(2.0) ** -np.arange(count)  # values that several codes make
    values = grid_of(scale)
    index = values.indices(w)
    codes = values.codes(index)
    assert codes.dtype == np.int8
    assert np.isin(codes, (-1, 0, 1)).all()
    every = combos(count) @ scale.astype(np.float64)  # (3**P, n)
    least = np.abs(w - every[:, None]).min(axis=0)
    made = (codes * scale[:, None].astype(np.float64)).sum(axis=0)
    np.testing.assert_allclose(np.abs(w - made), least, atol=1e-6)
    rows = np.stack([values.row(one) for one in index])
    np.testing.assert_allclose(rows, made, atol=1e-6)
    np.testing.assert_array_equal(index == 0, ~codes.any(axis=0))


def test_steps_are_least_squares_and_planes_that_are_alike_do_not_move():
    rng = np.random.default_rng(0)
    c, r = rng.integers(-1, 2, size=(30, 3)).astype(float), rng.normal(size=30)
    step = solved((c.T @ c)[..., None], (c.T @ r)[:, None])[:, 0]
    np.testing.assert_allclose(step, np.linalg.lstsq(c, r)[0], rtol=1e-10)
    c[:, 1] = -c[:, 0]
    step = solved((c.T @ c)[..., None], (c.T @ r)[:, None])[:, 0]
    assert step[1] == 0
    np.testing.assert_allclose(step[[0, 2]], np.linalg.lstsq(c[:, [0, 2]], r)[0], rtol=1e-10)
    assert not solved(np.zeros((2, 2, 1)), np.zeros((2, 1))).any()


def test_planes_of_each_group_come_by_falling_scale():
    codes = np.arange(2 * 4 * 2, dtype=np.int8).reshape(2, 4, 2)
    scale = np.array([[[1, 3], [2, 2]], [[2, 1], [2, 5]]], np.float32)
    ordered, falling = largest_first(codes, scale)
    assert falling.tolist() == [[[2, 3], [2, 5]], [[1, 1], [2, 2]]]
    made = (codes * np.repeat(scale, 2, axis=1)).sum(axis=0)
    assert ((ordered * np.repeat(falling, 2, axis=1)).sum(axis=0) == made).all()


# ---- "planes"


def least_of_all(w, h, count):
    """The least ``sum h (w - sum_p s_p c_p)**2`` over all codes of a few weights."""
    codes = np.array(list(itertools.product(combos(count), repeat=len(w))), np.float64)
    square = np.einsum("ckp,k,ckq->cpq", codes, h, codes)
    along = np.einsum("ckp,k,k->cp", codes, h, w)
    scale = np.einsum("cpq,cq->cp", np.linalg.pinv(square, rcond=1e-9, hermitian=True), along)
    return (np.square(w - np.einsum("ckp,cp->ck", codes, scale)) @ h).min()


@pytest.mark.parametrize("length", [2, 3, 4])
def test_little_more_is_lost_than_by_the_best_of_all_codes(length):
    rng, excess = np.random.default_rng(length), []
    for _ in range(40):
        w = rng.standard_t(5, size=(1, length, 1)).astype(np.float32)
        h = rng.exponential(size=(1, length))
        found = planes(w, Statistics(np.array([1]), h), config("channel", 1e-9, 2))
        lost = h[0] @ np.square(w - dequantized(found, 2))[0, :, 0]
        size = h[0] @ np.square(w[0, :, 0].astype(np.float64))
        excess.append((lost - least_of_all(w[0, :, 0].astype(np.float64), h[0], 2)) / size)
    assert max(excess) < 0.05  # of the weights' own square
    assert np.mean(excess) < 0.003


@cases("count", [2, 3, 4], core=[2])
@cases("granularity", ["tensor", "channel", 32], core=["channel"])
def test_codes_and_scales_are_each_the_best_for_the_other(granularity, count):
    w, statistics = kernel(64, 6), diagonal(seen(inputs(64, 200)))
    h = statistics.moments[0]
    found = planes(w, statistics, config(granularity, planes=count))
    codes, scale = by_plane(found, count)
    size = 64 // scale.shape[1]
    for g, n in np.ndindex(scale.shape[1:]):
        rows, part = slice(g * size, (g + 1) * size), slice(n, n + 1)
        if granularity == "tensor":
            part = slice(0, 6)
        v = w[0, rows, part].astype(np.float64)
        every = combos(count) @ scale[:, g, n]
        least = np.abs(v[..., None] - every).min(axis=-1)
        c = codes[:, rows, part]
        made = np.einsum("pkn,p->kn", c, scale[:, g, n])
        np.testing.assert_allclose(np.abs(v - made), least, atol=1e-8)
        root = np.repeat(np.sqrt(h[rows]), v.shape[1])  # the closed form, with a ridge of 1e-12
        design = c.reshape(count, -1).T * root[:, None]
        ridge = 1e-12 * np.trace(design.T @ design) * np.eye(count)
        wanted = np.linalg.solve(design.T @ design + ridge, design.T @ (root * v.ravel()))
        np.testing.assert_allclose(scale[:, g, n], wanted, rtol=1e-4)


@cases("count", [2, 3], core=[2])
@cases("granularity", ["tensor", "channel", 32, 4], core=["channel", 4])
def test_planes_together_lose_no_more_than_one_after_another(granularity, count):
    w, statistics = kernel(64, 40), seen(inputs(64, 200))
    how = config(granularity, planes=count)
    lost = {
        name: error(w, METHODS[name].quantize(w, statistics, how), diagonal(statistics))[0]
        for name in ("absmean", "survivors", "weighted", "planes")
    }
    assert max(lost["weighted"], lost["survivors"]) < lost["absmean"]
    assert lost["planes"] < 0.85 * min(lost["weighted"], lost["survivors"])
    one = error(w, weighted(w, statistics, config(granularity)), diagonal(statistics))[0]
    assert lost["weighted"] < 0.5 * one  # each plane says more


def test_one_plane_after_another_is_the_method_on_the_rest():
    w, statistics = kernel(16, 5), seen(inputs(16, 50))
    for name in ("absmean", "survivors", "weighted"):
        found = METHODS[name].quantize(w, statistics, config(4, planes=2))
        first = METHODS[name].quantize(w, statistics, config(4))
        rest = (w - dequantized(first)).astype(np.float32)
        second = METHODS[name].quantize(rest, statistics, config(4))
        codes, scale = (
            np.concatenate([getattr(one, part) for one in (first, second)])
            for part in ("codes", "scale")
        )
        if name != "absmean":  # which keeps the order of bj.quantize
            codes, scale = largest_first(codes, scale)
        np.testing.assert_array_equal(by_plane(found, 2)[0], codes)
        np.testing.assert_allclose(by_plane(found, 2)[1], scale, rtol=1e-5)


def test_weights_count_for_what_their_inputs_are():
    w = kernel(32, 20)
    statistics = seen(inputs(32, 200))
    found = planes(w, statistics, config("channel", planes=2))
    alike = planes(w, NOTHING, config("channel", planes=2))
    assert error(w, found, diagonal(statistics)) < error(w, alike, diagonal(statistics))
    assert error(w, alike, NOTHING) < error(w, found, NOTHING)


def test_many_weights_are_taken_as_runs_of_neighbours(monkeypatch):
    w, statistics = kernel(64, 60), diagonal(seen(inputs(64, 200)))
    statistics.moments[0, 5:9] = 0
    whole = planes(w, statistics, config("tensor", planes=2))
    monkeypatch.setattr(_best_scale, "AT_ONCE", 600)
    parts = planes(w, statistics, config("tensor", planes=2))
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=0.05)
    lost = [error(w, found, statistics)[0] for found in (whole, parts)]
    assert lost[1] < 1.01 * lost[0]


# ---- "gptq" of several planes


def nearest_of(v, scale):
    """Codes (P, n) of the nearest values to v (n,), scales (P, n)."""
    every = combos(len(scale))
    return every[np.abs(v - every @ scale).argmin(axis=0)].T


def fed_forward(w, upper, scale):
    """The textbook's loop over the rows of w (k, n): codes (P, k, n)."""
    w, codes = w.copy(), np.zeros((len(scale), *w.shape))
    for i in range(len(w)):
        codes[:, i] = nearest_of(w[i], scale)
        miss = (w[i] - (scale * codes[:, i]).sum(axis=0)) / upper[i, i]
        for j in range(i + 1, len(w)):
            w[j] -= upper[i, j] * miss
    return codes


def textbook(w, moment, granularity, count, *, damping=0.01, rounds=2, order=None):
    """GPTQ of several planes in float64, one row after another: (P, K, N), (P, G, 1 or N)."""
    k, n = w.shape
    order = np.arange(k) if order is None else order
    size = granularity if isinstance(granularity, int) else k
    h = moment / np.mean(np.diag(moment)) + damping * np.eye(k)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    moving, weight = w.astype(np.float64)[order], np.diag(moment)[order]
    shared = granularity == "tensor"
    codes, scale = np.zeros((count, k, n)), np.zeros((count, k // size, 1 if shared else n))
    outputs = [slice(0, n)] if shared else [slice(i, i + 1) for i in range(n)]
    for g, part in itertools.product(range(k // size), outputs):
        rows = slice(g * size, (g + 1) * size)
        at_first, own = moving[rows, part].copy(), upper[rows, rows]
        beginning = at_first.astype(np.float32)
        share = granularity if shared else size
        s = _plane_scales.plane_scales(beginning, weight[rows], share, 1e-5, count)[:, 0]
        s = s.astype(np.float64)
        back = np.linalg.inv(own).T
        chosen, kept, loss = fed_forward(at_first, own, s), s, np.inf
        for _ in range(rounds):
            c = fed_forward(at_first, own, s)
            design = np.stack([(back @ plane).ravel() for plane in c], axis=1)
            s = np.linalg.lstsq(design, (back @ at_first).ravel())[0][:, None]
            assert (s > 1e-5).all()
            now = np.square(back @ (at_first - (s[:, None] * c).sum(axis=0))).sum()
            if now < loss:
                chosen, kept, loss = c, s, now
        codes[:, order[rows], part] = chosen
        scale[:, order[rows.start] // size, part] = kept
        miss = back @ (at_first - (kept[:, None] * chosen).sum(axis=0))
        for i, j in itertools.product(range(size), range(rows.stop, k)):
            moving[j, part] -= upper[rows.start + i, j] * miss[i]
    return codes, scale


@cases("granularity", ["tensor", "channel", 12], core=["tensor", 12])
@cases("rounds", [0, 1, 3], core=[3])
@pytest.mark.parametrize("count", [2, 3])
def test_gptq_is_the_textbook_loop(granularity, rounds, count):
    w, statistics = kernel(24, 5), seen(inputs(24, 100))
    how = config(granularity, planes=count)
    found = gptq(w, statistics, how, rounds=rounds, refit=False)
    wanted = textbook(w[0], statistics.moments[0], granularity, count, rounds=rounds)
    codes, scale = largest_first(*wanted)
    made = (codes * np.repeat(scale, 24 // scale.shape[1], axis=1)).sum(axis=0)
    np.testing.assert_allclose(dequantized(found, count)[0], made, atol=1e-6)
    np.testing.assert_allclose(by_plane(found, count)[1], scale, rtol=1e-4)


def test_act_order_is_the_textbook_loop_by_falling_mean_square():
    w, statistics = kernel(24, 5), seen(inputs(24, 100))
    order = _gptq.input_order(np.diag(statistics.moments[0]), 12, True)
    found = gptq(w, statistics, config(12, planes=2), act_order=True, refit=False)
    codes, scale = textbook(w[0], statistics.moments[0], 12, 2, order=order)
    made = (codes * np.repeat(scale, 12, axis=1)).sum(axis=0)
    np.testing.assert_allclose(dequantized(found, 2)[0], made, atol=1e-6)
    named = METHODS["gptq-act-order"].quantize(w, statistics, config(12, planes=2))
    assert error(w, named, statistics) <= error(w, found, statistics)


@cases("granularity", ["tensor", "channel", 12], core=["tensor", 12])
@pytest.mark.parametrize("count", [2, 3])
def test_the_last_scales_are_the_least_squares_of_the_outputs(granularity, count):
    w, x = kernel(24, 6), inputs(24, 100)
    how = config(granularity, planes=count)
    codes, before = by_plane(gptq(w, seen(x), how, rounds=0, refit=False), count)
    after = _refit.refitted(w[0], codes.astype(np.int8), before.astype(np.float32),
                            seen(x).moments[0], 0.01, 1e-5)  # fmt: skip
    rows = np.vstack([x, np.sqrt(0.01 * np.square(x).sum(axis=0).mean()) * np.eye(24)])
    groups = before.shape[1]
    which = np.repeat(np.eye(groups), 24 // groups, axis=0)
    moved = 0
    for n in range(1 if granularity == "tensor" else 6):
        part = slice(0, 6) if granularity == "tensor" else slice(n, n + 1)
        design = np.vstack([
            rows @ (codes[:, :, i, None] * which).transpose(1, 0, 2).reshape(24, -1)
            for i in range(6)[part]
        ])  # fmt: skip
        aim = np.concatenate([rows @ w[0, :, i] for i in range(6)[part]])
        wanted = np.linalg.lstsq(design, aim)[0].reshape(count, groups)
        if (after[:, :, n] == before[:, :, n].astype(np.float32)).all():
            continue  # it would not serve, which the next test looks at
        moved += 1
        np.testing.assert_allclose(after[:, :, n], wanted, rtol=1e-3)
    assert moved > (0 if granularity == "tensor" else 3)


@pytest.mark.parametrize("granularity", ["channel", 8, 1])
def test_the_last_refit_makes_no_output_worse(granularity, monkeypatch):
    monkeypatch.setattr(_refit, "_RUN", 6)  # groups in several runs, the last one shorter
    w, x = kernel(64, 20), inputs(64, 300)
    lost = []
    for refit in (False, True):
        found = gptq(w, seen(x), config(granularity, planes=2), rounds=0, refit=refit)
        left = x @ (w[0].astype(np.float64) - dequantized(found, 2)[0])
        lost.append(np.square(left).sum(axis=0))
    assert (lost[1] <= lost[0] * (1 + 1e-5) + 1e-9).all()
    assert granularity == 1 or (lost[1] < lost[0] * (1 - 1e-5)).any()


@pytest.mark.parametrize("granularity", ["tensor", "channel", 16])
def test_gptq_loses_less_than_planes_where_inputs_go_together(granularity):
    w, x = kernel(64, 32), inputs(64, 400)
    how = config(granularity, planes=2)
    lost = {
        name: error(w, METHODS[name].quantize(w, seen(x), how), seen(x))[0]
        for name in ("planes", "gptq", "gptq-act-order")
    }
    assert lost["gptq"] < 0.9 * lost["planes"]
    assert lost["gptq-act-order"] < 0.9 * lost["planes"]


@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
def test_blocks_of_outputs_cannot_be_seen(granularity, monkeypatch):
    w, statistics = kernel(16, 150), seen(inputs(16, 60))
    whole = gptq(w, statistics, config(granularity, planes=2))
    monkeypatch.setattr(_gptq, "_AT_ONCE", 16)  # blocks of 64, 64 and 22 outputs
    parts = gptq(w, statistics, config(granularity, planes=2))
    assert (parts.codes == whole.codes).all()
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-5)


# ---- what every method promises


@pytest.mark.parametrize("name", METHODS)
@cases("granularity", ["tensor", "channel", 8, 1], core=["tensor", 8])
@cases("count", [2, 3], core=[2])
def test_every_method_returns_codes_scales_and_leaves_its_operands(name, granularity, count):
    w = np.concatenate([kernel(16, 6, seed) for seed in range(2)])
    statistics = seen(*(inputs(16, 40, seed) for seed in range(2)))
    copies = w.copy(), statistics.moments.copy()
    how = config(granularity, planes=count)
    found = METHODS[name].quantize(w, statistics, how)
    again = METHODS[name].quantize(w, statistics, how)
    groups = 16 // granularity if isinstance(granularity, int) else 1
    assert found.codes.dtype == np.int8
    assert found.codes.shape == (2, count * 16, 6)
    assert np.isin(found.codes, (-1, 0, 1)).all()
    assert found.scale.dtype == np.float32
    assert found.scale.shape == (2, count * groups, 1 if granularity == "tensor" else 6)
    assert (found.scale >= np.float32(1e-5)).all()
    by_planes = found.scale.reshape(2, count, groups, -1)
    assert name == "absmean" or (by_planes[:, :-1] >= by_planes[:, 1:]).all()
    assert (found.codes == again.codes).all()  # the same bits each time
    assert (found.scale == again.scale).all()
    assert (w == copies[0]).all()
    assert (statistics.moments == copies[1]).all()
    for b in range(2):  # a slice is as it is alone
        one = Statistics(statistics.tokens[b : b + 1], statistics.moments[b : b + 1])
        alone = METHODS[name].quantize(w[b : b + 1], one, how)
        assert (alone.codes[0] == found.codes[b]).all()
        assert (alone.scale[0] == found.scale[b]).all()
    left = [
        x @ (a - b)
        for x, a, b in zip(
            (inputs(16, 40, 0), inputs(16, 40, 1)), w, dequantized(found, count), strict=True
        )
    ]
    whole = [x @ a for x, a in zip((inputs(16, 40, 0), inputs(16, 40, 1)), w, strict=True)]
    wanted = [np.square(a).sum() / np.square(b).sum() for a, b in zip(left, whole, strict=True)]
    np.testing.assert_allclose(error(w, found, statistics), wanted, rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_no_scale_is_below_eps(name, granularity):
    w, statistics = kernel(16, 60), seen(inputs(16, 40))
    eps = 0.5 * float(np.abs(w).mean())
    found = METHODS[name].quantize(w, statistics, config(granularity, eps, 2))
    assert (found.scale >= np.float32(eps)).all()


@pytest.mark.parametrize("name", ["planes", "gptq", "gptq-act-order"])
@pytest.mark.parametrize("power", [-100, 100])
def test_a_power_of_two_on_all_weights_is_one_on_all_scales(name, power):
    w, statistics = kernel(16, 6), seen(inputs(16, 40))
    plain = METHODS[name].quantize(w, statistics, config(4, 1e-7, 2))
    how = config(4, 1e-7 * 2.0**power, 2)
    moved = METHODS[name].quantize(w * np.float32(2.0**power), statistics, how)
    assert (moved.codes == plain.codes).all()
    np.testing.assert_allclose(moved.scale * 2.0**-power, plain.scale, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_the_smallest_kernels(name, shape):
    w = kernel(*shape)
    for granularity in ("tensor", "channel", 1):
        how = config(granularity, planes=2)
        found = METHODS[name].quantize(w, seen(inputs(shape[0], 9)), how)
        assert np.isfinite(found.scale).all()
        if granularity == 1:
            np.testing.assert_allclose(dequantized(found, 2), w, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_stay_zeros(name):
    found = METHODS[name].quantize(
        np.zeros((1, 8, 3), np.float32), seen(inputs(8, 20)), config(4, planes=2)
    )
    assert not found.codes.any()
    assert (found.scale == np.float32(1e-5)).all()


@pytest.mark.parametrize("name", ["planes", "gptq", "gptq-act-order"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_slice_that_saw_nothing_is_quantised_by_its_weights(name, tokens):
    w = np.concatenate([kernel(8, 6), kernel(8, 6, 1)])
    statistics = seen(inputs(8, 30), np.zeros((tokens, 8)))
    found = METHODS[name].quantize(w, statistics, config(4, planes=2))
    wanted = planes(w, Statistics(statistics.tokens, None), config(4, planes=2))
    assert (found.codes[1] == wanted.codes[1]).all()
    assert (found.scale[1] == wanted.scale[1]).all()
    (note,) = found.notes
    assert note.startswith("slice 1: no tokens" if tokens == 0 else "slice 1: 5 tokens, all")


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_get_the_nearest_codes(act_order):
    w, x = kernel(12, 7), inputs(12, 60)
    x[:, [1, 4, 5, 6, 7]] = 0  # a whole group among them
    found = gptq(w, seen(x), config(4, planes=2), act_order=act_order)
    codes, scale = by_plane(found, 2)
    made = dequantized(found, 2)[0]
    for n in range(7):
        every = combos(2) @ scale[:, 0, n]
        assert abs(w[0, 1, n] - made[1, n]) <= np.abs(w[0, 1, n] - every).min() + 1e-7
    alone = planes(w[:, 4:8], NOTHING, config("channel", planes=2))
    np.testing.assert_allclose(scale[:, 1], alone.scale[0], rtol=1e-6)
    assert (codes[:, 4:8].reshape(8, 7) == alone.codes[0]).all()
    assert len(found.notes) == 1


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_are_enough_to_be_no_worse(name, tokens):
    w, x = kernel(32, 9), inputs(32, tokens)
    how = config(8, planes=2)
    found = METHODS[name].quantize(w, seen(x), how)
    before = survivors(w, NOTHING, how)
    assert error(w, found, seen(x))[0] < error(w, before, seen(x))[0]
    assert error(w, found, NOTHING)[0] < 3 * error(w, before, NOTHING)[0]


# ---- a whole network


@pytest.mark.parametrize("method", METHODS)
@cases("granularity", ["tensor", "channel", 4], core=["tensor", 4])
def test_a_calibrated_network_runs_from_its_planes(method, granularity):
    params = {"a": kernel(8, 12)[0], "b": kernel(12, 5)[0]}
    x = inputs(8, 30).astype(np.float32)
    how = bj.TernaryConfig(granularity=granularity, planes=2)
    ternary = bj.ternarize(lambda p, x: x @ p["a"] @ p["b"], weights=how, activations=None)
    packed, report = bj.convert.calibrate(ternary, params, [x], method=method)
    float_again = bj.unpack_params(packed, dequantize=True)
    np.testing.assert_allclose(ternary(packed, x), x @ float_again["a"] @ float_again["b"],
                               rtol=1e-3, atol=1e-6)  # fmt: skip
    found = METHODS[method].quantize(params["a"][None], seen(x.astype(np.float64)), how)
    np.testing.assert_allclose(float_again["a"], dequantized(found, 2)[0], atol=1e-6)
    if method == "absmean":
        plain, _ = ternary.pack(params, x)
        for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(plain), strict=True):
            assert (a == b).all()
    assert all(row.error <= row.absmean_error for row in report.rows)


# ---- bad input


def test_planes_of_a_config_with_one_are_refused():
    w, statistics = kernel(8, 3), seen(inputs(8, 9))
    message = r"planes: `config` must have at least two planes, .*Write TernaryConfig\(planes=2\)"
    with pytest.raises(ValueError, match=message):
        planes(w, statistics, bj.B158)
    with pytest.raises(TypeError, match="planes: `config` must be a TernaryConfig"):
        planes(w, statistics, bj.Int8Config())
    with pytest.raises(ValueError, match=r"planes: .*granularity"):
        planes(w, statistics, config(3, planes=2))


def test_calibrate_refuses_planes_for_a_kernel_of_one_before_it_runs():
    params = {"a": {"kernel": kernel(8, 4)[0]}}
    ternary = bj.ternarize(lambda params, x: x @ params["a"]["kernel"], activations=None)

    def batches():
        yield np.ones((3, 8), np.float32)
        pytest.fail("the batches were read")

    message = (
        r"calibrate: the method 'planes' is for .*, and a/kernel has .*TernaryConfig\(planes=2"
    )
    for method in ("planes", {"*": "gptq", "a/*": "planes"}):
        with pytest.raises(ValueError, match=message):
            bj.convert.calibrate(ternary, params, batches(), method=method)


def test_planes_refuse_moments_that_are_none():
    w, h = kernel(8, 3), np.ones((1, 8))
    h[0, 2] = np.nan
    with pytest.raises(ValueError, match="planes: `moments` of slice 0 must be finite"):
        planes(w, Statistics(np.array([4]), h), config(4, planes=2))


def test_error_refuses_scales_that_do_not_cut_the_planes_evenly():
    w, statistics = kernel(8, 3), seen(inputs(8, 9))
    found = planes(w, statistics, config(4, planes=2))
    wrong = [
        found._replace(codes=found.codes[:, :12]),
        found._replace(scale=found.scale[:, :3]),
        found._replace(scale=found.scale[:, :1]),
        found._replace(codes=found.codes[:, :0]),
    ]
    for one in wrong:
        with pytest.raises(ValueError, match=r"error: `quantized` must be of a kernel of shape"):
            error(w, one, statistics)
