"""The six sandbox tests of the original system, over twenty seeds, and the script that prints them.

Expected values are the original's (arithmetic on its nets) or follow from the distributions
below; none is taken from the script's own tables.
"""

import functools
import math
import re

import numpy as np
import pytest
from example_loader import load_example

import bitnet_jax as bj

SEEDS = range(20)
TAU = 0.1
# A weight counts in its own mean of 128: |w| < tau * (|w| + the other 127) / 128.
OWN_SHARE = 127 / (128 - TAU)


@functools.cache
def over_seeds(name):
    """What one test measures, for every seed, by the name of the number."""
    runs = [getattr(load_example("sandbox"), name)(seed) for seed in SEEDS]
    return {key: [run[key] for run in runs] for key in runs[0]}


def all_are(values, expected):
    return values == [expected] * len(values)


def mean_is(values, mean, sigma):
    """Within four standard errors of the mean, and each within four standard deviations."""
    values = np.array(values)
    assert values.size == len(SEEDS)
    assert abs(values.mean() - mean) <= 4 * sigma / math.sqrt(values.size)
    assert (abs(values - mean) <= 4 * sigma).all()


def test_1_normal_matrix():
    one = over_seeds("quantise_matrix")
    assert all_are(one["codes"], [-1, 0, 1])
    assert all_are(one["scales"], 64)
    share = math.erf(TAU * math.sqrt(2 / math.pi) * OWN_SHARE / math.sqrt(2))
    assert share == pytest.approx(0.0636, rel=0.01)
    mean_is(one["zeros"], share, math.sqrt(share * (1 - share) / 8192))
    spread = math.sqrt((1 - 2 / math.pi) / 128)
    assert spread == pytest.approx(0.053, rel=0.01)
    mean_is(one["scale"], math.sqrt(2 / math.pi), spread / 8)
    mean_is(one["scale_spread"], spread, spread / math.sqrt(2 * 63))


@pytest.mark.full
def test_2_whole_model():
    two = over_seeds("quantise_model")
    assert all_are(two["layers"], 3)
    assert all_are(two["weights"], 64 * 64 + 64 * 64 + 64 * 10)
    assert all_are(two["positive_scales"], 64 + 64 + 10)
    assert all_are(two["differing"], 0)


@pytest.mark.full
def test_3_compression():
    three = over_seeds("compress")
    assert all_are(three["params"], 50_826)
    assert all_are(three["before"], 203_304)
    assert all_are(three["after"], 52_008)
    assert all_are([round(ratio, 4) for ratio in three["ratio"]], 3.9091)


@pytest.mark.full
def test_4_forward():
    four = over_seeds("forward")
    assert all_are(four["shapes"], ((8, 128), (8, 10)))
    assert all_are(four["finite"], True)
    assert all_are(four["differing"], 0)


@pytest.mark.full
def test_5_gradients():
    five = over_seeds("gradients")
    assert all_are(five["tensors"], 6)
    assert all_are(five["reached"], 6)
    norms = np.array(five["norms"])
    assert norms.shape == (len(SEEDS), 6)
    assert np.isfinite(norms).all()
    assert (norms > 0).all()
    assert norms.max() < 10
    # Spread of the loss: 20,000 such nets in NumPy, float64.
    mean_is(five["loss"], math.log(10), 0.046)


@pytest.mark.full
def test_6_sparsity():
    six = over_seeds("sparsity")
    assert all_are(six["weights"], 66_816)
    share = TAU / 2 * OWN_SHARE
    mean_is(six["zeros"], share, math.sqrt(share * (1 - share) / 66_816))
    mean_is(six["plus"], 0.5, 0.5 / math.sqrt(66_816 * (1 - share)))


@pytest.mark.full
def test_the_nets_start_as_torch_starts_them():
    net, params, _, _ = load_example("sandbox").build(64, 2, 1, 0)
    assert net.weights == bj.PHASE4
    assert len(params) == 3
    for layer in params.values():
        assert layer["kernel"].shape[0] == 64
        for leaf in (layer["kernel"], layer["bias"]):
            assert float(abs(leaf).max()) <= 1 / math.sqrt(64)
        # A uniform's variance; 640 weights are the fewest, and (w / bound)**2 spreads by 0.298.
        mean_square = float((layer["kernel"] ** 2).mean()) * 64
        assert mean_square == pytest.approx(1 / 3, abs=4 * 0.298 / math.sqrt(640))
        assert float(layer["bias"].min()) < 0 < float(layer["bias"].max())


@pytest.mark.full
def test_bytes():
    rows = {row.what: row for row in load_example("sandbox").byte_counts(0)}
    floats, original, phase4, phase4_file, b158, b158_file, trits = rows.values()
    weights, outputs = 3 * 128 * 128 + 128 * 10, 3 * 128 + 10
    assert (floats.codes, floats.biases, floats.total) == (4 * weights, 4 * outputs, 203_304)
    assert (original.codes, original.scales, original.biases) == (weights, 788, 788)
    assert original.total == 52_008
    assert (phase4.codes, phase4.scales) == (weights // 4, 4 * outputs)
    assert phase4.total == 15_760
    assert (b158.codes, b158.scales) == (weights // 4, 4 * 4)
    assert b158.total == 14_200
    assert floats.total / b158.total >= 14.3
    for packed, file in ((phase4, phase4_file), (b158, b158_file)):
        assert file.total == packed.total + file.header
        assert 0 < file.header < 4096
    assert floats.total / trits.total == pytest.approx(17.4, abs=0.05)


@pytest.mark.full
def test_the_gate_of_25_to_45_percent_zeros_needs_another_tau():
    rng = np.random.default_rng(0)
    draws = {
        "normal": rng.standard_normal((4096, 64), np.float32),
        "uniform": rng.random((4096, 64), np.float32),
    }
    for name, taus in {"normal": (0.40, 0.75), "uniform": (0.5, 0.9)}.items():
        for tau, zeros in zip(taus, (0.25, 0.45), strict=True):
            config = bj.TernaryConfig(threshold=tau, granularity="channel")
            codes = bj.quantize(draws[name], config).codes
            assert float((codes == 0).mean()) == pytest.approx(zeros, abs=0.005)


@pytest.mark.full
def test_a_saved_net_is_the_net():
    assert load_example("sandbox").reloaded(0) == 0


@pytest.mark.full
def test_the_script_prints_its_tables(capsys):
    assert load_example("sandbox").main(["--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for cell in ("seed 3", "50,826", "203,304 B", "52,008 B", "3.9091x", "14.32x", "17.41x"):
        assert cell in printed
    assert "FAILED" not in printed
    assert re.search(r"(\d+) of \1 checks hold", printed)
    for claim in ("8.2x", "3.8x", "25-45 %", "saved weights"):
        assert claim in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.full
def test_the_script_fails_when_a_test_does(capsys, monkeypatch):
    b158_by_output = bj.TernaryConfig(granularity="channel")
    monkeypatch.setattr(load_example("sandbox"), "QUANTISER", b158_by_output)
    assert load_example("sandbox").main([]) == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.endswith("FAILED")]
    assert ["zeros" in line for line in failed] == [True, True]
    assert "18 of 20 checks hold" in printed


def test_numbers_off_by_more_than_chance_fail():
    near = load_example("sandbox").near
    verdicts = [near("", "", value, 1.0, 0.1).ok for value in (1.39, 0.61, 1.41, 0.59, math.nan)]
    assert verdicts == [True, True, False, False, False]
