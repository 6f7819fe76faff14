"""The benchmarks of conversion without training, on a smaller network and a smaller kernel."""

import importlib
import pathlib
from collections import Counter

import jax
import numpy as np
import pytest
from example_loader import EXAMPLES

import bitnet_jax as bj

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

pytestmark = [pytest.mark.standard_promotion, pytest.mark.full]


@pytest.fixture
def benchmark_of(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def calibration(benchmark_of):
    return benchmark_of("calibration")


@pytest.fixture
def network(calibration):
    return calibration.images(calibration.unedited.ViT(width=16, depth=1, heads=2))


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ((344,), 86),
        ((128,), 128),
        ((4, 16), 64),
        ((3, 3, 32), 96),
        ((3, 3, 64), 64),
        ((2, 2, 1), 4),
    ],
)
def test_groups_are_the_largest_that_tile(calibration, lengths, size):
    assert calibration.groups(128)(lengths).granularity == size
    w = np.ones((*lengths, 3), np.float32)
    axes = tuple(range(len(lengths)))
    bj.quantize(w, calibration.groups(128)(lengths), contracting_axes=axes)  # no error
    for more in range(size + 1, 129):
        with pytest.raises(ValueError, match="granularity"):
            bj.quantize(w, bj.TernaryConfig(granularity=more), contracting_axes=axes)


def test_every_part_of_a_network(calibration, network, monkeypatch):
    sizes = ("one scale an output", "two planes")
    monkeypatch.setattr(calibration, "SIZES", {name: calibration.SIZES[name] for name in sizes})
    net = network.trained(0, 0.1)
    names = ["absmean, one scale", "two planes, gptq"]
    compiled: dict = {}
    found = calibration.by_method(network, net, compiled, names)
    assert list(found) == [calibration.FLOAT, *names]
    assert found[calibration.FLOAT].bytes == sum(x.nbytes for x in jax.tree.leaves(net.params))
    losses, accuracies, nbytes = zip(*found.values(), strict=True)
    assert losses[0] < np.log(10)  # it has learnt something
    assert accuracies[0] > 10
    assert abs(losses[2] - losses[0]) < abs(losses[1] - losses[0])
    assert nbytes[1] < nbytes[2] < nbytes[0]
    ternary, _ = compiled[names[0]]
    kinds = {
        str(type(row.config).__name__) for row in ternary.explain(net.params, net.seen[0]).rows
    }
    assert kinds >= {"TernaryConfig", "Int8Config"}

    ranks = calibration.correlations(network, net)
    assert ranks.keys() == calibration.REPORTED.keys()
    assert all(-1 <= rank <= 1 for each in ranks.values() for rank in each.values())

    chosen = calibration.budgets(network, net)
    assert tuple(chosen) == sizes
    for one in chosen.values():
        assert all(0 < size <= one.limit for size in one.bytes.values())
        assert all(
            sum(kinds.values()) == len(calibration.contractions(network.apply, net))
            for kinds in one.kinds.values()
        )
    config = bj.TernaryConfig(granularity="channel")
    ternary = bj.ternarize(network.apply, weights=config, activations=None)
    packed, _ = bj.convert.calibrate(ternary, net.params, [x for x, _ in net.batches])
    assert (
        network.scores(bj.unpack_params(packed, dequantize=True), net.test)[0]
        == chosen[sizes[0]].uniform
    )
    kernels = filter(bj.is_packed, jax.tree.leaves(packed, is_leaf=bj.is_packed))
    assert sum(kernel.nbytes for kernel in kernels) == chosen[sizes[0]].limit
    assert chosen[sizes[0]].limit < chosen[sizes[1]].limit


def test_rows_are_medians_over_seeds(calibration):
    packed, base = calibration.Packed, calibration.FLOAT
    seeds = [
        {base: packed(1.0, 90.0, 400), "way": packed(1.0 + gap, 90.0 - points, 100)}
        for gap, points in ((0.25, 3.0), (0.125, 1.0), (0.5, -2.0))
    ]
    assert calibration.method_rows(seeds) == [
        [base, "400", "90.00", "", "", "1.000", "", ""],
        [
            "way",
            "100",
            "89.00",
            "1.00",
            "3.00 1.00 -2.00",
            "1.250",
            "+0.250",
            "+0.250 +0.125 +0.500",
        ],
    ]
    ranks = [{"a": {"loss": r, "logits": 1.0, "error": -r}} for r in (0.5, 0.75, 0.25)]
    assert calibration.report_rows("net", ranks) == [
        ["net, a", "0.50", "0.50 0.75 0.25", "1.00", "1.00 1.00 1.00", "-0.50", "-0.50 -0.75 -0.25"]
    ]
    kinds = {"logits": Counter(int8=1, ternary=2)}
    chosen = [
        {"size": calibration.Chosen(100, 2.0, {}, {"loss": 2.0 - x, "logits": 2.0 + x}, kinds)}
        for x in (0.5, 0.25, 1.0)
    ]
    assert calibration.budget_rows("net", chosen) == [
        ["net, size", "100", "2.000", "1.500", "-0.500 -0.250 -1.000"]
        + ["2.500", "+0.500 +0.250 +1.000", "2 ternary, 1 int8"]
    ]


def test_one_kernel(benchmark_of, tmp_path):
    """The operands are of the sizes that are told, and better methods lose less of the products."""
    conversion = benchmark_of("conversion")
    conversion.write_operands(tmp_path, 128, 24, 512)
    assert np.load(tmp_path / conversion.KERNEL).shape == (128, 24)
    inputs = np.load(tmp_path / conversion.INPUTS)
    assert inputs.shape == (512, 128)
    assert len(list(conversion.parts(inputs))) == conversion.BATCHES
    found = {name: conversion.cost(tmp_path, name) for name in conversion.METHODS}
    errors = [cost.error for cost in found.values()]
    assert errors == sorted(errors, reverse=True)
    assert all(cost.peak >= 0 for cost in found.values())
    row = conversion.cells(
        "gptq", conversion.Cost(9.6, 8.2, 31.0, 6_000_000, 0.125), 1.5, 2_000_000
    )
    assert row == ["gptq", "10", "8", "31", "6", "3.0x", "0.1250", "1.5"]
