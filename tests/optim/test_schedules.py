"""Schedules end where they say."""

import numpy as np
import pytest

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_strength_ends_at_one_to_the_bit(shape):
    ramp = bj.optim.strength_schedule(37, start=5, shape=shape)
    values = np.array([ramp(t) for t in range(60)])
    assert values.dtype == np.float32
    assert (values[:6] == 0).all()
    assert (values[42:] == 1).all()
    assert (np.diff(values) >= 0).all()
    way = (np.arange(5, 43) - 5) / 37
    want = way if shape == "linear" else 0.5 - 0.5 * np.cos(np.pi * way)
    np.testing.assert_allclose(values[5:43], want, atol=1e-6)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_two_stages(shape):
    lr = bj.optim.two_stage_lr(1000, (1e-2, 4e-3), (2e-3, 0.0), warmup_steps=100, shape=shape)
    decay = bj.optim.two_stage_weight_decay(1000)
    values = np.array([lr(t) for t in range(1101)])
    np.testing.assert_allclose(values[[0, 50, 100, 500, 1000, 1100]], [0, 5e-3, 1e-2, 2e-3, 0, 0])
    middle = 100 + 200
    np.testing.assert_allclose(values[middle], 7e-3, rtol=1e-5)
    assert (float(decay(499)), float(decay(500))) == (pytest.approx(0.1), 0.0)
