"""Methods of conversion against float64 loops written from the equations, and brute force."""

import functools
import itertools

import hypothesis
import numpy as np
import pytest
from cases import cases
from convert_kernels import NOTHING, config, dequantized, diagonal, inputs, kernel, seen
from hypothesis import strategies as st

import bitnet_jax as bj
from bitnet_jax.convert import _best_scale, _gptq, _methods, _output_square, _refit
from bitnet_jax.convert._input_statistics import Statistics
from bitnet_jax.convert._methods import METHODS, gptq, survivors, weighted
from bitnet_jax.convert._quantized import Quantized
from bitnet_jax.convert._relative_error import error

GRANULARITIES = ("tensor", "channel", 8, 4, 1)
ONE_PLANE = [name for name in METHODS if name != "planes"]


def sharing(shape, granularity):
    """Index pairs (rows, columns) of the weights (K, N) that share each scale."""
    k, n = shape
    if granularity == "tensor":
        yield np.mgrid[:k, :n].reshape(2, -1)
        return
    size = k if granularity == "channel" else granularity
    for g, column in itertools.product(range(k // size), range(n)):
        yield np.stack([np.arange(g * size, (g + 1) * size), np.full(size, column)])


def least(w, h, eps):
    """The least ``sum h (w - s c)**2`` over all codes and all scales >= eps, by trying them."""
    codes = np.array(list(itertools.product((-1, 0, 1), repeat=len(w))))
    a, m = codes @ (h * w), np.abs(codes) @ h
    s = np.maximum(np.divide(a, m, out=np.zeros_like(a), where=m > 0), eps)
    return ((w - s[:, None] * codes) ** 2 @ h).min()


# ---- the exact optimum of one group


def check_optimum(w, h, granularity, eps):
    """The error of each group is the least there is."""
    w = np.asarray(w, np.float32)
    if h is None:
        found, h = survivors(w[None], NOTHING, config(granularity, eps)), np.ones(len(w))
    else:
        statistics = Statistics(np.array([1]), np.asarray(h, np.float64)[None])
        found = weighted(w[None], statistics, config(granularity, eps))
    left = (w - dequantized(found)[0]) ** 2
    for rows, columns in sharing(w.shape, granularity):
        v, weight = w[rows, columns].astype(np.float64), np.asarray(h, np.float64)[rows]
        if not weight.any():
            weight = np.ones_like(weight)
        best, size = least(v, weight, eps), weight @ v**2
        assert weight @ left[rows, columns] <= best + 1e-6 * size + 1e-40
    assert (found.scale >= np.float32(eps)).all()


MAGNITUDES = st.sampled_from([0.0, 0.25, -0.25, 0.5, 1.0, -1.0, 3.0, -7.0]) | st.floats(
    -4, 4, width=32
)


@hypothesis.given(
    w=st.lists(MAGNITUDES, min_size=8, max_size=8),
    h=st.none() | st.lists(st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]), min_size=4, max_size=4),
    granularity=st.sampled_from(["tensor", "channel", 4, 2, 1]),
    eps=st.sampled_from([1e-5, 0.3, 2.0]),
)
def test_the_best_scale_is_that_of_brute_force(w, h, granularity, eps):
    check_optimum(np.array(w).reshape(4, 2), h, granularity, eps)


def test_the_best_scale_of_long_groups_is_that_of_every_threshold(monkeypatch):
    monkeypatch.setattr(_best_scale, "AT_ONCE", 64)  # sums go on from part to part
    w, h = kernel(40, 6)[0], np.random.default_rng(3).exponential(size=40)
    for granularity in ("tensor", "channel", 20):
        found = weighted(w[None], Statistics(np.array([1]), h[None]), config(granularity))
        left = (w - dequantized(found)[0]) ** 2
        for rows, columns in sharing(w.shape, granularity):
            v, weight = np.abs(w[rows, columns]).astype(np.float64), h[rows]
            errors = []
            for threshold in v:
                kept = v >= threshold
                s = (weight * v)[kept].sum() / weight[kept].sum()
                errors.append(weight @ (v - s * kept) ** 2)
            assert weight @ left[rows, columns] == pytest.approx(min(errors), rel=1e-6)


def test_survivors_and_weighted_are_better_than_absmean_where_they_promise_it():
    w, statistics = kernel(64, 24), seen(inputs(64, 200))
    for granularity in ("tensor", "channel", 16):
        found = {name: METHODS[name].quantize(w, statistics, config(granularity))
                 for name in ("absmean", "survivors", "weighted")}  # fmt: skip
        plain = {name: error(w, q, NOTHING)[0] for name, q in found.items()}
        by_input = {name: error(w, q, diagonal(statistics))[0] for name, q in found.items()}
        assert plain["survivors"] < plain["absmean"]
        assert plain["survivors"] <= plain["weighted"]
        assert by_input["weighted"] <= by_input["survivors"]


@pytest.mark.parametrize("name", ["absmean", "absmedian", "survivors"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_absmean_is_quantize(name, granularity):
    w = kernel(8, 6)
    how = bj.TernaryConfig(scale=name, granularity=granularity)
    found, wanted = METHODS["absmean"].quantize(w, NOTHING, how), bj.quantize(w[0], how)
    assert (found.codes[0] == wanted.codes).all()
    assert (found.scale[0] == wanted.scale).all()


def test_a_matrix_serves_where_the_diagonal_is_needed():
    w, statistics = kernel(16, 5), seen(inputs(16, 50))
    found = weighted(w, statistics, config(4))
    wanted = weighted(w, diagonal(statistics), config(4))
    assert (found.codes == wanted.codes).all()
    assert (found.scale == wanted.scale).all()


# ---- gptq


def best_by_threshold(v, h, eps):
    """The best scale of weights v: the largest reduction over every threshold."""
    best, scale = 0.0, eps
    for threshold in np.unique(np.abs(v)):
        kept = np.abs(v) >= threshold
        a, m = (h * np.abs(v))[kept].sum(), h[kept].sum()
        s = max(a / m, eps)
        if 2 * s * a - s * s * m > best:
            best, scale = 2 * s * a - s * s * m, s
    return scale


def fed_forward(w, upper, scale):
    """The textbook's loop over the rows of w (k, n): codes, and the error of each row."""
    w, codes, errors = w.copy(), np.zeros(w.shape), np.zeros(w.shape)
    for i in range(len(w)):
        codes[i] = np.where(np.abs(w[i]) > scale / 2, np.sign(w[i]), 0)
        errors[i] = (w[i] - scale * codes[i]) / upper[i, i]
        for j in range(i + 1, len(w)):
            w[j] -= upper[i, j] * errors[i]
    return codes, errors


def textbook(w, moment, granularity, *, damping=0.01, rounds=2, order=None, eps=1e-5):
    """GPTQ in float64, one row after another, with scales by turns; (K, N), (G, 1 or N)."""
    k, n = w.shape
    order = np.arange(k) if order is None else order
    size = granularity if isinstance(granularity, int) else k
    h = moment / np.mean(np.diag(moment)) + damping * np.eye(k)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    moving, weight = w.astype(np.float64)[order], np.diag(moment)[order]
    codes, scale = np.zeros((k, n)), np.zeros((k // size, 1 if granularity == "tensor" else n))
    outputs = [slice(0, n)] if granularity == "tensor" else [slice(i, i + 1) for i in range(n)]
    for g, part in itertools.product(range(k // size), outputs):
        rows = slice(g * size, (g + 1) * size)
        at_first, own = moving[rows, part].copy(), upper[rows, rows]
        width = at_first.shape[1]
        s = best_by_threshold(at_first.ravel(), np.repeat(weight[rows], width), eps)
        chosen, kept, loss = fed_forward(at_first, own, s)[0], s, np.inf
        back = np.linalg.inv(own).T
        for _ in range(rounds):
            c, _ = fed_forward(at_first, own, s)
            z = back @ c
            s = (z * (back @ at_first)).sum() / (z * z).sum()
            if (now := ((back @ (at_first - s * c)) ** 2).sum()) < loss:
                chosen, kept, loss = c, s, now
        codes[order[rows], part] = chosen
        scale[order[rows.start] // size, part] = kept
        errors = back @ (at_first - kept * chosen)
        for i, j in itertools.product(range(size), range(rows.stop, k)):
            moving[j, part] -= upper[rows.start + i, j] * errors[i]
    return codes, scale


@cases("granularity", GRANULARITIES, core=["tensor", 8])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_gptq_is_the_textbook_loop(granularity, rounds):
    w, statistics = kernel(24, 10), seen(inputs(24, 100))
    found = gptq(w, statistics, config(granularity), rounds=rounds, refit=False)
    codes, scale = textbook(w[0], statistics.moments[0], granularity, rounds=rounds)
    assert (found.codes[0] == codes).all()
    np.testing.assert_allclose(found.scale[0], scale, rtol=1e-5)
    assert found.notes == ()


@cases("granularity", GRANULARITIES, core=["channel", 4])
def test_act_order_is_the_textbook_loop_by_falling_mean_square(granularity):
    w, statistics = kernel(24, 10), seen(inputs(24, 100))
    h = np.diag(statistics.moments[0])
    size = granularity if isinstance(granularity, int) else 24
    groups = sorted(range(24 // size), key=lambda g: -h[g * size : (g + 1) * size].sum())
    order = [
        i for g in groups for i in sorted(range(g * size, (g + 1) * size), key=lambda i: -h[i])
    ]
    found = gptq(w, statistics, config(granularity), act_order=True, refit=False)
    codes, scale = textbook(w[0], statistics.moments[0], granularity, order=np.array(order))
    assert (found.codes[0] == codes).all()
    np.testing.assert_allclose(found.scale[0], scale, rtol=1e-5)
    named = METHODS["gptq-act-order"].quantize(w, statistics, config(granularity))
    assert (named.codes == found.codes).all()


def least_squares(w, codes, scale, x, shared, run, damping=0.01, eps=1e-5):
    """Scales (G, n) refitted in float64, a run of groups after another."""
    k, n = w.shape
    # The tokens, and a token for each input whose square is the damping.
    rows = np.vstack([x, np.sqrt(damping * np.square(x).sum(axis=0).mean()) * np.eye(k)])
    grid = np.repeat(np.eye(len(scale)), k // len(scale), axis=0)  # which group a row is in
    scale = scale.astype(np.float64).copy()
    for part in [slice(0, n)] if shared else [slice(i, i + 1) for i in range(n)]:
        weights, chosen = w[:, part].T.astype(np.float64), codes[:, part].T
        own = scale[:, 0] if shared else scale[:, part.start]
        for first in range(0, len(scale), run):
            now = slice(first, first + run)
            others = own.copy()
            others[now] = 0
            aim = [rows @ (v - c * (grid @ others)) for v, c in zip(weights, chosen, strict=True)]
            design = [rows @ (c[:, None] * grid[:, now]) for c in chosen]
            new = others.copy()
            new[now] = np.linalg.lstsq(np.vstack(design), np.concatenate(aim))[0]
            empty = np.abs(chosen).sum(axis=0) @ grid == 0
            new[empty] = own[empty]
            square = [
                sum(
                    np.square(x @ (v - c * (grid @ s))).sum()
                    for v, c in zip(weights, chosen, strict=True)
                )
                for s in (own, new)
            ]
            if square[1] < square[0] and (new[now] >= eps).all():
                own[:] = new
    return scale


@cases("granularity", GRANULARITIES[:-1], core=["tensor", 4])
@pytest.mark.parametrize("run", [32, 2])
def test_the_last_scales_are_the_least_squares_of_the_outputs(granularity, run, monkeypatch):
    monkeypatch.setattr(_refit, "_RUN", run)
    w, x = kernel(24, 10), inputs(24, 100)
    before = gptq(w, seen(x), config(granularity), rounds=0, refit=False)
    after = gptq(w, seen(x), config(granularity), rounds=0)
    assert (after.codes == before.codes).all()
    shared = granularity == "tensor"
    codes = before.codes[0].astype(np.float64)
    wanted = least_squares(w[0], codes, before.scale[0], x, shared, run)
    np.testing.assert_allclose(after.scale[0], wanted, rtol=2e-4)
    assert np.mean(after.scale != before.scale) > 0.3


def output_error(w, quantized, x):
    """The relative squared error of each output, in float64."""
    left = x @ (w[0].astype(np.float64) - dequantized(quantized)[0])
    return (left**2).sum(axis=0) / ((x @ w[0]) ** 2).sum(axis=0)


@pytest.mark.parametrize("granularity", ["channel", 8, 2])
def test_the_last_refit_makes_no_output_worse(granularity, monkeypatch):
    monkeypatch.setattr(_refit, "_RUN", 3)  # groups in several runs, the last one shorter
    w, x = kernel(64, 20), inputs(64, 300)
    how = functools.partial(gptq, w, seen(x), config(granularity), rounds=0)
    before, after = output_error(w, how(refit=False), x), output_error(w, how(), x)
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < before * (1 - 1e-5)).any()


def test_more_rounds_are_never_worse_where_no_row_comes_after():
    w, x = kernel(32, 20), inputs(32, 300)
    h = x.T @ x
    h += 0.01 * np.mean(np.diag(h)) * np.eye(32)  # what gptq lowers: the damped error
    last = np.inf
    for rounds in (1, 2, 4):
        left = w[0] - dequantized(gptq(w, seen(x), config("channel"), rounds=rounds, refit=False))
        loss = np.einsum("kn,kj,jn->n", left[0], h, left[0])
        assert (loss <= last * (1 + 1e-5)).all()
        last = loss


@pytest.mark.parametrize("granularity", ["tensor", "channel", 16])
def test_gptq_loses_less_than_methods_that_know_less(granularity):
    w, x = kernel(64, 32), inputs(64, 400)
    lost = {
        name: error(w, METHODS[name].quantize(w, seen(x), config(granularity)), seen(x))[0]
        for name in ONE_PLANE
    }
    assert lost["gptq-act-order"] < 0.9 * lost["weighted"] <= 0.9 * lost["absmean"]
    assert lost["gptq"] < 0.9 * lost["weighted"]


@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
def test_blocks_of_outputs_cannot_be_seen(granularity, monkeypatch):
    w, statistics = kernel(16, 150), seen(inputs(16, 60))
    whole = gptq(w, statistics, config(granularity))
    monkeypatch.setattr(_gptq, "_AT_ONCE", 16)  # blocks of 64, 64 and 22 outputs
    parts = gptq(w, statistics, config(granularity))
    assert (parts.codes == whole.codes).all()
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-5)


# ---- the error


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("large", [2**33, 0])
def test_error_is_that_of_the_outputs(granularity, large, monkeypatch):
    monkeypatch.setattr(_output_square, "_LARGE", large)  # float64, then float32
    monkeypatch.setattr(_output_square, "_AT_ONCE", 40)  # several outputs at a time
    w, x = np.concatenate([kernel(8, 12), kernel(8, 12, 1)]), [inputs(8, 30), inputs(8, 50, 1)]
    found = survivors(w, Statistics(np.array([30, 50]), None), config(granularity))
    left = w - dequantized(found)
    wanted = [((x[b] @ left[b]) ** 2).sum() / ((x[b] @ w[b]) ** 2).sum() for b in (0, 1)]
    np.testing.assert_allclose(error(w, found, seen(*x)), wanted, rtol=1e-5 if large == 0 else 1e-9)
    h = [np.square(x[b]).sum(axis=0) for b in (0, 1)]
    by_input = [
        (h[b] @ left[b] ** 2).sum() / (h[b] @ w[b].astype(np.float64) ** 2).sum() for b in (0, 1)
    ]
    np.testing.assert_allclose(error(w, found, diagonal(seen(*x))), by_input, rtol=1e-9)
    plain = [(left[b] ** 2).sum() / (w[b].astype(np.float64) ** 2).sum() for b in (0, 1)]
    none = Statistics(np.array([30, 50]), None)
    np.testing.assert_allclose(error(w, found, none), plain, rtol=1e-9)


def test_error_of_a_slice_without_tokens_is_that_of_the_weights():
    w = np.concatenate([kernel(8, 12), kernel(8, 12)])
    x = inputs(8, 30)
    statistics = seen(x, x[:0])
    found = survivors(w, statistics, config("channel"))
    assert error(w, found, statistics)[1] == error(w[1:], survivors(w[1:], NOTHING,
                                                   config("channel")), NOTHING)[0]  # fmt: skip


def test_error_of_zeros():
    zeros, ones = np.zeros((1, 4, 2), np.float32), np.ones((1, 4, 2), np.int8)
    scale = np.ones((1, 1, 1), np.float32)
    assert error(zeros, Quantized(0 * ones, scale, ()), NOTHING) == [0.0]
    assert error(zeros, Quantized(ones, scale, ()), NOTHING) == [np.inf]
    assert error(zeros + 1, Quantized(ones, scale, ()), NOTHING) == [0.0]
    assert error(zeros + 1, Quantized(0 * ones, scale, ()), NOTHING) == [1.0]


# ---- what every method promises


@pytest.mark.parametrize("name", [name for name in ONE_PLANE if name != "absmean"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_no_scale_is_below_eps(name, granularity):
    w, statistics = kernel(16, 60), seen(inputs(16, 40))
    eps = float(np.abs(w).mean())
    found = METHODS[name].quantize(w, statistics, config(granularity, eps))
    assert (found.scale >= np.float32(eps)).all()
    free = METHODS[name].quantize(w, statistics, config(granularity))
    assert granularity == "tensor" or (free.scale < eps).any()
    if name.startswith("gptq"):
        found = gptq(w, statistics, config(granularity, eps), refit=False)
        assert (found.scale >= np.float32(eps)).all()


@pytest.mark.parametrize("name", ONE_PLANE)
@cases("granularity", GRANULARITIES, core=["tensor", 4])
def test_every_method_returns_codes_scales_and_leaves_its_operands(name, granularity):
    w = np.concatenate([kernel(16, 6, seed) for seed in range(3)])
    statistics = seen(*(inputs(16, 40, seed) for seed in range(3)))
    copies = w.copy(), statistics.moments.copy()
    found = METHODS[name].quantize(w, statistics, config(granularity))
    again = METHODS[name].quantize(w, statistics, config(granularity))
    groups = 16 // granularity if isinstance(granularity, int) else 1
    assert found.codes.dtype == np.int8
    assert found.codes.shape == w.shape
    assert np.isin(found.codes, (-1, 0, 1)).all()
    assert found.scale.dtype == np.float32
    assert found.scale.shape == (3, groups, 1 if granularity == "tensor" else 6)
    assert (found.scale >= np.float32(1e-5)).all()
    assert (found.codes == again.codes).all()  # the same bits each time
    assert (found.scale == again.scale).all()
    assert (w == copies[0]).all()
    assert (statistics.moments == copies[1]).all()
    for b in range(3):  # a slice is as it is alone
        one = Statistics(statistics.tokens[b : b + 1], statistics.moments[b : b + 1])
        alone = METHODS[name].quantize(w[b : b + 1], one, config(granularity))
        assert (alone.codes[0] == found.codes[b]).all()
        assert (alone.scale[0] == found.scale[b]).all()


@pytest.mark.parametrize("name", ONE_PLANE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_the_smallest_kernels(name, shape):
    w = kernel(*shape)
    for granularity in ("tensor", "channel", 1):
        found = METHODS[name].quantize(w, seen(inputs(shape[0], 9)), config(granularity))
        assert np.isfinite(dequantized(found)).all()
        if granularity == 1:
            np.testing.assert_allclose(dequantized(found), w, rtol=0.02)


@pytest.mark.parametrize("name", ["survivors", "weighted", "gptq", "gptq-act-order"])
@pytest.mark.parametrize("power", [-100, 100])
def test_a_power_of_two_on_all_weights_is_one_on_all_scales(name, power):
    w, statistics = kernel(16, 6), seen(inputs(16, 40))
    how = functools.partial(METHODS[name].quantize, statistics=statistics)
    plain = how(w, config=config(4, 1e-7))
    moved = how(w * np.float32(2.0**power), config=config(4, 1e-7 * 2.0**power))
    assert (moved.codes == plain.codes).all()
    np.testing.assert_allclose(moved.scale * 2.0**-power, plain.scale, rtol=1e-6)


@pytest.mark.parametrize("name", ["weighted", "gptq", "gptq-act-order"])
def test_the_unit_of_the_inputs_does_not_matter(name):
    w, statistics = kernel(16, 6), seen(inputs(16, 40))
    plain = METHODS[name].quantize(w, statistics, config(4))
    for unit in (2.0**-900, 2.0**900):
        moved = Statistics(statistics.tokens, statistics.moments * unit)
        found = METHODS[name].quantize(w, moved, config(4))
        assert (found.codes == plain.codes).all()
        assert (found.scale == plain.scale).all()


def test_zeros_stay_zeros():
    w = np.zeros((1, 8, 3), np.float32)
    for name in ONE_PLANE:
        found = METHODS[name].quantize(w, seen(inputs(8, 20)), config(4))
        assert not found.codes.any(), name
        assert (found.scale == np.float32(1e-5)).all(), name


# ---- inputs that say little


@pytest.mark.parametrize("name", ["weighted", "gptq", "gptq-act-order"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_slice_that_saw_nothing_is_quantised_by_its_weights(name, tokens):
    w = np.concatenate([kernel(8, 6), kernel(8, 6, 1)])
    statistics = seen(inputs(8, 30), np.zeros((tokens, 8)))
    found = METHODS[name].quantize(w, statistics, config(4))
    wanted = survivors(w, statistics, config(4))
    assert (found.codes[1] == wanted.codes[1]).all()
    assert (found.scale[1] == wanted.scale[1]).all()
    assert not (found.codes[0] == wanted.codes[0]).all()
    (note,) = found.notes
    assert note.startswith("slice 1: no tokens" if tokens == 0 else "slice 1: 5 tokens, all")


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_have_no_say_and_get_the_nearest_codes(act_order):
    w, x = kernel(12, 7), inputs(12, 60)
    x[:, [2, 3, 9]] = 0
    live = np.flatnonzero(x.any(axis=0))
    how = functools.partial(gptq, act_order=act_order)
    found = how(w, seen(x), config("channel"))
    # Damping is in units of the mean square, which the dead ones lower.
    alone = how(w[:, live], seen(x[:, live]), config("channel"), damping=0.01 * 9 / 12)
    assert (found.codes[:, live] == alone.codes).all()
    np.testing.assert_allclose(found.scale, alone.scale, rtol=1e-5)
    dead = w[:, [2, 3, 9]]
    nearest = np.where(np.abs(dead) > found.scale / 2, np.sign(dead), 0)
    assert (found.codes[:, [2, 3, 9]] == nearest).all()
    assert found.notes == ("slice 0: 3 of 12 inputs were always 0; their codes are the nearest",)


@pytest.mark.parametrize("name", ["weighted", "gptq", "gptq-act-order"])
def test_a_group_of_dead_inputs_is_quantised_by_its_weights(name):
    w, x = kernel(12, 7), inputs(12, 60)
    x[:, 4:8] = 0
    found = METHODS[name].quantize(w, seen(x), config(4))
    wanted = survivors(w, NOTHING, config(4))
    assert (found.codes[0, 4:8] == wanted.codes[0, 4:8]).all()
    np.testing.assert_allclose(found.scale[0, 1], wanted.scale[0, 1], rtol=1e-6)
    assert len(found.notes) == 1


@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_are_enough_to_be_no_worse(granularity, tokens):
    w, x = kernel(32, 9), inputs(32, tokens)
    found = gptq(w, seen(x), config(granularity))
    assert np.isfinite(found.scale).all()
    before = error(w, survivors(w, NOTHING, config(granularity)), seen(x))[0]
    assert error(w, found, seen(x))[0] < before
    # The weights themselves do not run away for the few tokens' sake.
    assert error(w, found, NOTHING)[0] < 3 * error(w, survivors(w, NOTHING, config(granularity)),
                                                   NOTHING)[0]  # fmt: skip
    assert found.notes == (f"slice 0: {tokens} tokens for 32 inputs; damping decides the rest",)


def test_damping_is_raised_until_there_is_a_factor():
    h = np.array([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])  # an eigenvalue of -0.8
    w = kernel(3, 4)
    found = gptq(w, Statistics(np.array([9]), h[None]), config("channel"), refit=False)
    assert found.notes == ("slice 0: damping was raised from 0.01 to 1",)
    codes, scale = textbook(w[0], h, "channel", damping=1.0)
    assert (found.codes[0] == codes).all()
    np.testing.assert_allclose(found.scale[0], scale, rtol=1e-5)
    ones = Statistics(np.array([3]), np.ones((1, 3, 3)))  # of rank one, and no damping
    (note,) = gptq(w, ones, config("channel"), damping=0.0).notes
    assert note.startswith("slice 0: damping was raised from 0 to ")


# ---- bad input


def with_moments(change):
    """Statistics of eight inputs with one thing changed."""
    statistics = seen(inputs(8, 20))
    moments = statistics.moments.copy()
    change(moments)
    return Statistics(statistics.tokens, moments)


def put(*index, value):
    return lambda moments: moments.__setitem__((0, *index), value)


BAD_MOMENTS = {
    "nan": (put(1, 2, value=np.nan), "`moments` of slice 0 must be finite"),
    "inf": (put(1, 1, value=np.inf), "`moments` of slice 0 must be finite"),
    "negative": (put(3, 3, value=-1.0), "got -1 for input 3"),
    "crooked": (put(1, 2, value=1e-9), "must be symmetric"),
    "large": (lambda m: m.__imul__(1 + 99 * (1 - np.eye(8))), "sqrt"),
}


@cases(("change", "message"), BAD_MOMENTS, core=["nan", "negative"])
def test_moments_that_are_none_are_refused(change, message):
    w, statistics = kernel(8, 3), with_moments(change)
    with pytest.raises(ValueError, match=message):
        gptq(w, statistics, config("channel"))
    with pytest.raises(ValueError, match=message):
        error(w, survivors(w, NOTHING, config("channel")), statistics)


def test_a_diagonal_that_is_none_is_refused():
    w, h = kernel(8, 3), np.ones((1, 8))
    h[0, 2] = np.nan
    with pytest.raises(ValueError, match="weighted: `moments` of slice 0 must be finite"):
        weighted(w, Statistics(np.array([4]), h), config(4))
    h[0, 2] = -3
    with pytest.raises(ValueError, match=r"weighted: `moments` of slice 0 must be >= 0 .* input 2"):
        weighted(w, Statistics(np.array([4]), h), config(4))
    with pytest.raises(
        ValueError, match=r"weighted: .* must be 0 where `tokens` is 0, got up to 1"
    ):
        weighted(w, Statistics(np.array([0]), np.ones((1, 8))), config(4))


BAD_OPERANDS = {
    "no moments": (kernel(8, 3), NOTHING, config(4), "must be the matrix .*, got None"),
    "diagonal": (
        kernel(8, 3), diagonal(seen(inputs(8, 9))), config(4), r"shape \(1, 8, 8\), got \(1, 8\)",
    ),
    "other length": (kernel(6, 3), seen(inputs(8, 9)), config(3), r"must have shape \(1, 6, 6\)"),
    "tokens": (
        kernel(8, 3), seen(inputs(8, 9))._replace(tokens=np.array([9, 9])), config(4), "`tokens`",
    ),
    "fractions": (
        kernel(8, 3), seen(inputs(8, 9))._replace(tokens=np.array([9.5])), config(4), "`tokens`",
    ),
    "nan": (kernel(8, 3) * np.float32(np.nan), seen(inputs(8, 9)), config(4), "24 NaN or infinite"),
    "rank": (kernel(8, 3)[0], seen(inputs(8, 9)), config(4), r"float32 kernel \(B, K, N\)"),
    "float64": (kernel(8, 3) * 1.0, seen(inputs(8, 9)), config(4), None),
    "group": (kernel(8, 3), seen(inputs(8, 9)), config(3), "granularity"),
}  # fmt: skip
BAD_OPERANDS["float64"] = (
    kernel(8, 3).astype(np.float64), seen(inputs(8, 9)), config(4), "got float64 of shape",
)  # fmt: skip


@cases(("w", "statistics", "how", "message"), BAD_OPERANDS, core=["no moments", "group"])
def test_operands_that_do_not_fit_are_refused(w, statistics, how, message):
    with pytest.raises(ValueError, match=f"gptq: .*{message}"):
        gptq(w, statistics, how)


def test_options_that_are_none_are_refused():
    w, statistics = kernel(8, 3), seen(inputs(8, 9))
    for damping in (-1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="gptq: `damping`"):
            gptq(w, statistics, config(4), damping=damping)
    for rounds in (-1, 1.5, True):
        with pytest.raises(ValueError, match="gptq: `rounds` must be an integer >= 0"):
            gptq(w, statistics, config(4), rounds=rounds)
    with pytest.raises(TypeError, match="survivors: `config` must be a TernaryConfig"):
        survivors(w, statistics, bj.Int8Config())


def test_error_refuses_what_is_of_another_kernel():
    w, statistics = kernel(8, 3), seen(inputs(8, 9))
    found = survivors(w, statistics, config(4))
    wrong = [
        survivors(kernel(4, 3), NOTHING, config(4)),
        found._replace(scale=found.scale[0]),
        found._replace(scale=found.scale[:, :, :2]),
        found._replace(scale=np.repeat(found.scale, 2, axis=0)),
        found._replace(scale=np.repeat(found.scale, 3, axis=1)[:, :3]),
    ]
    for one in wrong:
        with pytest.raises(ValueError, match=r"error: `quantized` must be of a kernel of shape"):
            error(w, one, statistics)
    with pytest.raises(ValueError, match=r"error: `w` must be a float32 kernel \(B, K, N\)"):
        error(w[0], found, statistics)


def test_the_examples_in_the_docstrings_run():
    import doctest

    result = doctest.testmod(_methods)
    assert result.failed == 0
    assert result.attempted > 10
