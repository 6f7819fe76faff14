"""Settings of every test: strict promotion, rank promotion refused, hypothesis reproducible."""

import chex
import hypothesis
import jax
import pytest

# Meshes of eight devices, on any machine; what names no device runs on the first.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "bitnet_jax",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    # The autouse fixture below is the same for every example.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("bitnet_jax")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "standard_promotion: runs under JAX's default dtype promotion, because a dependency "
        "(optax's adam, adamw, muon) raises under the strict one",
    )


@pytest.fixture(autouse=True)
def promotion(request):
    """Strict dtype promotion, and rank promotion raises; ``standard_promotion`` opts out."""
    opted_out = request.node.get_closest_marker("standard_promotion") is not None
    dtypes = "standard" if opted_out else "strict"
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion("raise"):
        yield dtypes


@pytest.fixture(autouse=True)
def traces():
    """``chex.assert_max_traces`` counts by name: a parametrised test starts at zero again."""
    chex.clear_trace_counter()


@pytest.fixture
def path(tmp_path):
    """Where a test saves a file."""
    return str(tmp_path / "model.bitnet.safetensors")
