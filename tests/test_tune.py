"""``doctor --tune``: what it advises, what it prints, and that nothing stays changed."""

import jax.numpy as jnp
import numpy as np
import pytest
from native_paths import PATHS, needs_it

import bitnet_jax as bj
from bitnet_jax import _native as native
from bitnet_jax import _tune
from bitnet_jax.__main__ import main

TRIALS = {
    "direct rows": _tune.Trial((1, 4), (2, 5)),
    "slab": _tune.Trial((2, 3), (5,)),
    "step rows": _tune.Trial((16, 24, 1 << 40), (5,)),
}
TINY = _tune.Load(side=256, kernels=1, rounds=2, trials=TRIALS)
SERVES = [path for path in PATHS if path != "portable"]
needs_a_path = pytest.mark.skipif(not SERVES, reason="no path that serves")


def rounds(*seconds):
    return np.array(seconds, np.float64)


def test_the_value_that_is_faster_within_a_round_is_advised():
    # The machine halves its speed after the first round: 4 is faster in each of them.
    times = {
        8: rounds([1.0, 3.0], [2.0, 6.0], [2.0, 6.0]),
        4: rounds([0.5, 3.0], [1.0, 6.0], [1.0, 6.0]),
        2: rounds([1.0, 9.0], [0.2, 9.0], [9.0, 9.0]),
    }
    value, low, gain, high = _tune.advise(times, now=8)
    assert value == 4
    np.testing.assert_allclose([low, gain, high], 1 - np.sqrt(0.5))  # rows of x count alike


@pytest.mark.parametrize(
    "other",
    [
        rounds([0.98], [0.98], [0.98], [0.98]),  # less than noise
        rounds([0.5], [0.5], [1.5], [1.6]),  # not in three quarters of the rounds
        rounds([1.5], [1.5], [1.5], [1.5]),  # slower
        rounds([1.0], [1.0], [1.0], [1.0]),
    ],
)
def test_nothing_is_advised_without_a_gain(other):
    times = {32: np.ones((4, 1)), 16: other}
    assert _tune.advise(times, now=32) == (32, 0.0, 0.0, 0.0)


def test_every_constant_is_tried():
    assert list(_tune.Load().trials) == list(native.CONSTANTS) == list(TRIALS)


def all_constants():
    return {path: native.load().tuning(path) for path in native.load().built()}


@needs_a_path
def test_the_tables_of_all_paths_and_nothing_stays_changed(monkeypatch, capsys):
    before, tried, tune = all_constants(), [], native.Native.tune

    def tune_and_tell(self, path, constant, value):
        taken = tune(self, path, constant, value)
        assert self.chosen() == path
        tried.append((path, constant, value, taken))
        return taken

    monkeypatch.setattr(native.Native, "tune", tune_and_tell)
    assert _tune.tune(TINY) == 0
    assert all_constants() == before
    assert native.load().chosen() == PATHS[0]
    text = capsys.readouterr().out
    for path in SERVES:
        lines = text.split(f"\n{path}\n\n", 1)[1].split("\n\n")[0].splitlines()
        assert lines[0].split("  ")[0] == "constant"
        assert [line[:13].strip() for line in lines[1:]] == list(native.CONSTANTS)
        for line, (constant, value) in zip(lines[1:], before[path].items(), strict=True):
            shown = "whole" if value == 1 << 40 else str(value)
            assert line[len(constant) :].split()[0] == shown
        assert {v for p, c, v, _ in tried if (p, c) == (path, "slab")} == {
            2,
            3,
            before[path]["slab"],
        }
        assert (path, "step rows", 24, False) in tried  # cuts a block
    assert "portable" not in text
    assert "Nothing was changed." in text


@needs_a_path
def test_constants_and_path_are_put_back_after_an_error(monkeypatch):
    before = all_constants()

    def fail(run):
        raise RuntimeError("out of order")

    monkeypatch.setattr(_tune, "seconds_of", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        _tune.tune(TINY)
    assert all_constants() == before
    assert native.load().chosen() == PATHS[0]


@needs_it
def test_values_that_a_path_cannot_take_are_refused_and_change_nothing():
    library, before = native.load(), all_constants()
    for path in library.built():
        for constant in native.CONSTANTS:
            assert not library.tune(path, constant, 0)
            assert not library.tune(path, constant, -16)
        assert not library.tune(path, "step rows", 17)
    assert not library.tune("portable", "direct rows", 4)  # it has none
    if "avx2" in library.built():
        assert not library.tune("avx2", "step rows", 32)  # narrow sums would overflow
    assert all_constants() == before


@needs_a_path
def test_no_constant_changes_a_bit():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((40, 300), np.float32))
    packed = bj.pack(jnp.asarray(np.random.default_rng(1).standard_normal((300, 100), np.float32)))
    want = bj.matmul(x, packed, implementation="reference")
    library, before = native.load(), all_constants()
    small = dict(zip(native.CONSTANTS, (1, 3, 16), strict=True))
    try:
        for path in SERVES:
            library.choose(path)
            for constant, value in small.items():
                assert library.tune(path, constant, value)
                got = bj.matmul(x, packed, implementation="cpu")
                np.testing.assert_array_equal(got, want)
    finally:
        library.choose(None)
        for path, values in before.items():
            for constant, value in values.items():
                library.tune(path, constant, value)
    assert all_constants() == before


def test_without_the_native_product_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(native, "load", lambda: native.Native(None, "it was not built"))
    assert main(["doctor", "--tune"]) == 1
    assert "Nothing to tune: the native product is not in use here" in capsys.readouterr().out


def test_quick_and_tune_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--quick", "--tune"])
    assert "not allowed with argument --quick" in capsys.readouterr().err
