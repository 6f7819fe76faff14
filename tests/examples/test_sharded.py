"""The example of eight devices, and two real processes: the same bits."""

import jax
import jax.numpy as jnp
import pytest
from example_loader import load_example

example = load_example("sharded")


@pytest.mark.full
@pytest.mark.standard_promotion  # optax's adamw raises under the strict one
def test_one_process_and_two_have_the_same_bits():
    rows = example.compare_bits("explicit", ["FSDP and tensor"])  # Auto: the example, in .ci/slow
    assert [row[1] for row in rows] == [
        "codes and scales",
        "outputs in training",
        "outputs from packed",
        "three losses",
    ]
    assert [row[2:] for row in rows[:3]] == [("same bits", "same bits")] * 3


@pytest.mark.full
def test_digests_see_a_bit(monkeypatch):
    want, x = example.bits("data", None), jnp.asarray(example.data()[0])
    monkeypatch.setattr(example, "data", lambda: (x.at[3, 5].add(1.0), None))
    changed = example.bits("data", None)
    assert changed["codes and scales"] == want["codes and scales"]
    assert changed["outputs in training"] != want["outputs in training"]
    assert changed["outputs from packed"] == changed["outputs in training"]


@pytest.mark.full
def test_gathered_bytes():
    whole, left, codes = example.gathered("auto")
    kernels = [k * n for k, n in zip(example.FEATURES, example.FEATURES[1:], strict=False)]
    assert whole.nbytes == 4 * left.nbytes == 4 * sum(kernels)
    assert codes.nbytes == (2 * sum(kernels) - kernels[0]) // 4
    assert (whole.dtype, left.dtype, codes.dtype) == ("f32", "s8", "u8")


def test_devices_are_there():
    assert jax.device_count() == example.DEVICES
