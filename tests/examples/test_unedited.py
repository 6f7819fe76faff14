"""The example of unedited models, on small ones; the figures of the README are slow."""

import numpy as np
import pytest
from example_loader import EXAMPLES, load_example
from tqdm import tqdm

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load_example("unedited")


def test_models_are_plain_flax():
    for file in (EXAMPLES / "models").glob("*.py"):
        assert "bitnet" not in file.read_text(), file


@pytest.mark.full
def test_a_run_resumes_in_mid_ramp_and_serves_what_it_trained(example, tmp_path):
    task = example.digits(0)
    small = example.Task(tuple(a[:320] for a in task.train), task.test, task.learning_rate)
    model = example.ViT(width=16, depth=1, heads=2)
    traces = []
    apply = type(model).apply

    def counted(self, *args, **kwargs):
        traces.append(kwargs)
        return apply(self, *args, **kwargs)

    type(model).apply, kept = counted, apply
    try:
        result = example.run(model, small, 0, 10, tmp_path, tqdm(disable=True), whole=True)
    finally:
        type(model).apply = kept
    assert result.resumed == (0, 50)
    # One trace a training step of each kind, and a few of whole test sets: none along the ramp.
    assert len(traces) < 15
    assert result.scores["loaded"] == result.scores["ternary"]
    assert result.scores["ternary"] > 25
    assert result.curves["ternary"][-1] < 0.9 * result.curves["ternary"][0]
    assert set(result.coverage.left) == {"position"}
    assert result.report.to_dict()["int8"]["bytes_after"] > 0
    assert np.isfinite(result.flips).all()
    assert bj.io.load(tmp_path / "unedited-ViT.bitnet.safetensors").keys() >= {"head", "block_0"}


@pytest.mark.slow
def test_ternary_models_are_within_a_point_of_float_ones(example, tmp_path):
    results = example.main(["--seeds", "5", "--out", str(tmp_path)])
    assert (tmp_path / "unedited.png").stat().st_size > 10_000
    for name in ("ViT", "ConvNet"):
        scores = {k: np.mean([r.scores[k] for r in results[name]]) for k in ("float32", "ternary")}
        assert scores["ternary"] >= scores["float32"] - 1.0, (name, scores)
        assert all(r.scores["loaded"] == r.scores["ternary"] for r in results[name])
    assert all(runs[0].resumed[0] == 0 for name, runs in results.items() if runs[0].resumed)
