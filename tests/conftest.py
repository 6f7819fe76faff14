"""Settings of every test: strict promotion, rank promotion refused, hypothesis reproducible.

Compiling is most of what the tests do. JAX keeps what it compiled in pytest's cache folder, so
a second run takes a fraction of the first; `pytest --cache-clear` forgets it. In the core, tests
that are not marked ``optimised`` compile without LLVM's optimisations.
"""

import gc
import importlib.metadata
import os
import sys

import chex
import hypothesis
import jax
import pytest

# Meshes of eight devices, on any machine; what names no device runs on the first.
jax.config.update("jax_num_cpu_devices", 8)

# BITNET_JAX_BEARTYPE=1 checks every annotation of the package at every call. The hook must be
# there before the package is imported, in each of pytest-xdist's workers too.
if os.environ.get("BITNET_JAX_BEARTYPE") == "1":
    import jaxtyping

    jaxtyping.install_import_hook("bitnet_jax", "beartype.beartype")
    # The hook imports from the checkout, past an editable install: its compiled kernels are
    # in another folder.
    import bitnet_jax._native

    for distribution in importlib.metadata.distributions(name="bitnet_jax"):
        for file in distribution.files or ():
            if file.name == "product.native":
                bitnet_jax._native.__path__.append(str(file.locate().parent))
    expect = pytest.raises

    class Refused:
        """What an annotation refuses is refused, before the library's own words come."""

        def __init__(self, expected):
            self.expected = expected

        def __enter__(self):
            return self.expected.__enter__()

        def __exit__(self, kind, value, trace):
            if kind is not None and issubclass(kind, jaxtyping.TypeCheckError):
                return True
            return self.expected.__exit__(kind, value, trace)

    pytest.raises = lambda *args, **how: Refused(expect(*args, **how))

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

CORE = "not slow and not full"  # the marks of pyproject.toml
LARGE = 1 << 30  # bytes of a process from which on it forgets what it compiled


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "standard_promotion: runs under JAX's default dtype promotion, because a dependency "
        "(optax's adam, adamw, muon) raises under the strict one",
    )
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_runtest_setup(item):
    """In the core, most tests compile fast; what those left compiled is not for the others."""
    marked = item.get_closest_marker("optimised") is not None
    fast = item.config.option.markexpr == CORE and not marked
    if fast != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", fast)
        if not fast:
            jax.clear_caches()


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


# Memory -----------------------------------------------------------------------------------


def resident():
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between two files, a process that has grown large forgets its programs."""
    if (nextitem is None or nextitem.path != item.path) and resident() > LARGE:
        jax.clear_caches()
        gc.collect()


def peak():
    """The most memory that this process has held, in GB. Linux counts it in KiB; Windows not."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak()


PEAKS = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """pytest-xdist's: one of its workers has ended."""
    PEAKS.append(getattr(node, "workeroutput", {}).get("peak", 0.0))


def pytest_terminal_summary(terminalreporter):
    most = max(PEAKS, default=peak())
    terminalreporter.write_line(f"at most {most:.2f} GB of memory in one process")
