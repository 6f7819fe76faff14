"""The language model example: it learns, and packing changes nothing that it learnt."""

import pytest
from example_loader import load_example

pytestmark = pytest.mark.full  # each compiles a decoder


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_quick(tmp_path, capsys):
    results = load_example("language_model").main(["--quick", "--out", str(tmp_path)])
    assert set(results) == {"float", "ternary", "packed"}
    assert results["packed"][0] == pytest.approx(results["ternary"][0], abs=1e-5)
    assert results["packed"][1] < results["ternary"][1] / 4
    assert "from the bits: The with statement " in capsys.readouterr().out
    assert (tmp_path / "language_model.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_it_learns(tmp_path):
    results = load_example("language_model").main(["--out", str(tmp_path)])
    assert results["ternary"][0] < 2.0
    assert abs(results["ternary"][0] - results["float"][0]) < 0.2
    assert results["packed"][0] == pytest.approx(results["ternary"][0], abs=1e-4)
