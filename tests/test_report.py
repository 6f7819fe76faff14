"""The report counts what is there: codes, scales, errors, bytes, gradients."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("config", [bj.B158, bj.PHASE4, bj.TWN, bj.TernaryConfig(granularity=5)])
@pytest.mark.parametrize("shape", [(30, 7), (35, 8)])
def test_numbers_are_counted_from_the_arrays(config, shape):
    w = normal(*shape)
    params = {"layer": {"kernel": w, "bias": jnp.zeros(shape[1])}, "steps": jnp.arange(3)}
    packed, report = bj.pack_params(params, config)
    (layer,) = report.layers
    codes = np.asarray(bj.quantize(w, config).codes)
    assert [layer.minus, layer.zero, layer.plus] == [(codes == c).sum() for c in (-1, 0, 1)]
    leaf = packed["layer"]["kernel"]
    scale = np.asarray(leaf.scale)
    assert (layer.scale_min, layer.scale_max) == (scale.min(), scale.max())
    exact, hat = np.asarray(w, np.float64), np.asarray(leaf.dequantize(), np.float64)
    np.testing.assert_allclose(layer.error, ((exact - hat) ** 2).sum() / (exact**2).sum(), 1e-5)
    assert layer.shape == shape
    assert layer.config == config
    assert layer.bytes_before == 4 * w.size
    assert layer.bytes_after == -(-shape[0] // 4) * shape[1] + 4 * scale.size
    rest = 4 * shape[1] + 12
    assert report.model_bytes_before == layer.bytes_before + rest
    assert report.model_bytes_after == layer.bytes_after + rest
    assert report.model_bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert report.ratio == layer.ratio == layer.bytes_before / layer.bytes_after


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (bj.TernaryConfig(threshold=0.1), 0.327),
        (bj.B158, 0.263),
        (bj.TernaryConfig(scale="survivors", threshold=0.7), 0.190),
    ],
)
def test_error_of_gaussian_weights(config, error):
    _, report = bj.pack_params({"kernel": normal(512, 512)}, config)
    assert abs(report.layers[0].error - error) < 0.005


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_error_of_huge_and_tiny_weights_is_finite(magnitude):
    _, report = bj.pack_params({"kernel": normal(8, 8) * magnitude})
    assert 0 < report.layers[0].error <= 1.0


def test_a_kernel_of_zeros_has_no_error_to_speak_of():
    _, report = bj.pack_params({"kernel": jnp.zeros((8, 8))})
    assert math.isnan(report.layers[0].error)
    assert report.to_dict()["layers"][0]["error"] is None


class MLP(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes:
            x = bj.linen.BitDense(size)(x)
        return x


@pytest.mark.parametrize(
    ("inputs", "sizes", "count", "ratio"),
    [
        (128, (128, 128, 128, 10), 50_826, 14.3),
        (2048, (4096, 2048, 2048, 2048), 25_176_064, 15.9),
    ],
)
def test_whole_model_ratio(inputs, sizes, count, ratio):
    params = MLP(sizes).init(jax.random.key(0), jnp.ones((1, inputs)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    _, report = bj.pack_params(params)
    assert report.model_ratio >= ratio


def report_of(layers):
    return bj.pack_params({f"block_{i}": {"kernel": normal(16, 8)} for i in range(layers)})[1]


def test_table_and_dict():
    report = report_of(2)
    text = str(report)
    for wanted in ("block_0/kernel", "block_1/kernel", "16x8", "ternary kernels", "whole model"):
        assert wanted in text
    assert len({line.rindex("x") for line in text.splitlines()[1:]}) == 1  # ratios line up
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["layers"][1]["config"]["threshold"] == 0.5
    assert plain["layers"][1]["shape"] == [16, 8]
    assert plain["model"] == plain["ternary"]
    assert plain["model"]["ratio"] == report.model_ratio


@pytest.mark.parametrize("layers", [1, 12])
def test_plot_writes_a_picture(tmp_path, layers):
    path = tmp_path / "weights.png"
    report_of(layers).plot(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5_000


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'bitnet_jax\[plot\]'"):
        report_of(1).plot(tmp_path / "weights.png")


def test_gradient_flow_names_every_state():
    grads = {
        "ok": jnp.array([3.0, 4.0]),
        "half": jnp.array([1e-3], jnp.bfloat16),
        "dead": jnp.zeros((2, 2)),
        "none": None,
        "integer": np.zeros(3, jax.dtypes.float0),
        "nan": jnp.array([1.0, jnp.nan]),
        "inf": jnp.array([jnp.inf]),
        "huge": jnp.array([3e38, 3e38]),
    }
    flow = bj.gradient_flow(grads, exploding=100.0)
    states = {leaf.path: leaf.state for leaf in flow.leaves}
    assert states == {
        "ok": "ok",
        "half": "ok",
        "dead": "dead",
        "none": "missing",
        "integer": "missing",
        "nan": "nan",
        "inf": "nan",
        "huge": "exploding",
    }
    assert not flow.ok
    assert flow.paths("nan") == ("inf", "nan")
    norms = {leaf.path: leaf.norm for leaf in flow.leaves}
    assert norms["ok"] == pytest.approx(5.0)
    assert "exploding" in str(flow)
    assert bj.gradient_flow({"a": jnp.ones(2)}).ok


def test_gradient_flow_reads_nnx_states_and_refuses_nothing():
    state = nnx.state(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert bj.gradient_flow(state).paths("dead") == ("bias",)
    with pytest.raises(ValueError, match="`grads` holds no arrays"):
        bj.gradient_flow({})
    with pytest.raises(ValueError, match="`exploding` must be a finite number > 0"):
        bj.gradient_flow({"a": jnp.ones(2)}, exploding=-1.0)
