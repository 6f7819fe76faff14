"""The comparison of training recipes: what each changes, and a record that is gone on with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_loader import EXAMPLES, load_example

import bitnet_jax as bj

pytestmark = pytest.mark.standard_promotion
RECORD = EXAMPLES / "results/training_options.json"
X = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
G = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES.parent / "tests/benchmarks"))
        yield load_example("../tests/benchmarks/training_options")


@pytest.fixture(scope="module")
def recipes(script):
    return load_example("../tests/benchmarks/training_recipes")


def codes_of(x):
    """Int8 inputs, as float64."""
    scale = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    return np.round(x * (127 / scale)) * scale / 127


def test_a_dead_zone_bias_is_the_sum_of_the_weights_whose_code_is_0(recipes):
    y, vjp = jax.vjp(lambda w: recipes.dead_zone_bias(0.25)(X, w, jnp.ones(())), jnp.asarray(W))
    wide = W.astype(np.float64)
    scale = np.abs(wide).mean()
    dead = np.abs(wide) <= scale / 2
    assert 0 < dead.sum() < dead.size
    quantised = np.where(dead, 0, np.sign(wide)) * scale
    np.testing.assert_allclose(y, codes_of(X) @ quantised + 0.25 * (wide * dead).sum(0), rtol=1e-5)
    slope = codes_of(X).T @ G + 0.25 * dead * G.sum(0)
    np.testing.assert_allclose(vjp(jnp.asarray(G))[0], slope, rtol=1e-5, atol=1e-6)


def test_three_weights_of_four_are_a_channels_scale(recipes):
    for strength in (0.0, 0.75, 1.0):
        y, vjp = jax.vjp(
            lambda w, part=strength: recipes.three_of_four(X, w, jnp.float32(part)), jnp.asarray(W)
        )
        quantised = np.zeros(W.shape)
        for column in range(3):
            for start in range(0, 16, 4):
                block = W[start : start + 4, column]
                for i in range(4):
                    kept = i != int(np.argmin(np.abs(block)))
                    quantised[start + i, column] = np.sign(block[i]) * kept
        kept = np.abs(W.astype(np.float64)) * np.abs(quantised)
        quantised *= kept.sum(axis=0) / np.abs(quantised).sum(axis=0)
        wanted = codes_of(X) @ (quantised + (1 - strength) * W)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
        slope = (2 - strength) * (codes_of(X).T @ G)
        np.testing.assert_allclose(vjp(jnp.asarray(G))[0], slope, rtol=1e-5, atol=1e-5)


def test_latents_are_rounded_to_bfloat16_to_nearest_or_without_bias(recipes):
    params = {"w": jnp.full((4000,), 1.0), "v": jnp.asarray(W).astype(jnp.bfloat16).astype("f")}
    updates = {"w": jnp.full((4000,), 2.0**-9), "v": jnp.asarray(W) * 0.01}  # a quarter of a step
    made = {}
    for stochastic in (False, True):
        tx = recipes.rounded_latents(stochastic)
        state = tx.init(params)
        for _ in range(2):  # each draws anew
            changes, state = jax.jit(tx.update)(updates, state, params)
            made[stochastic] = jax.tree.map(jnp.add, params, changes)
        for value in made[stochastic].values():
            assert (value == value.astype(jnp.bfloat16).astype(jnp.float32)).all()
    nearest = (params["v"] + updates["v"]).astype(jnp.bfloat16).astype(jnp.float32)
    assert (made[False]["v"] == nearest).all()
    assert (made[False]["w"] == 1.0).all()
    assert set(np.unique(made[True]["w"])) == {1.0, 1.0 + 2.0**-7}
    # 1000 of 4000 are rounded up, give or take five standard deviations.
    assert abs(int((made[True]["w"] > 1.0).sum()) - 1000) < 140


@pytest.mark.full
def test_calibrated_latents_have_the_codes_that_the_method_made(script):
    model = script.example.decoder("ternary", width=32, hidden=64, depth=1)
    batches = [jnp.asarray(np.random.default_rng(3).integers(0, 256, (4, 33)))]
    packed, _ = bj.convert.calibrate(model, None, [batches[0][:, :-1]], method="gptq")
    before = [bj.quantize(p.linear.kernel.get_value()).codes for p in script.projections(model)]
    script.calibrate(model, "gptq", batches)
    changed = 0
    for part, made, old in zip(
        script.projections(model), script.projections(packed), before, strict=True
    ):
        kernel = made.linear.kernel.get_value()
        found = bj.quantize(part.linear.kernel.get_value())
        wanted = bj.quantize(bj.unpack(kernel))
        assert (found.codes == wanted.codes).all()
        assert (found.scale == kernel.scale).all()
        changed += int((found.codes != old).sum())
    assert changed


def test_schedules_start_rise_and_end_as_they_say(recipes):
    rate = recipes.two_stage(0.3, 600)
    np.testing.assert_allclose(
        [rate(step) for step in (0, 100, 299, 300, 600)], [0, 0.3, 0.16, 0.1, 0], atol=1e-3
    )
    decay = recipes.decay_at_first(600)
    np.testing.assert_allclose([decay(step) for step in (0, 299, 300)], [0.1, 0.1, 0])
    np.testing.assert_allclose(
        [recipes.stable(0.5)(1.0, 600)(step) for step in (99, 299, 450, 600)], [1, 1, 0.5, 0]
    )


def test_every_recorded_row_is_an_option(recipes):
    (run,) = json.loads(RECORD.read_text())
    rows = run["tables"][0]["rows"]
    assert [row[0] for row in rows] == list(recipes.OPTIONS)
    for name, kernels, rest, losses, _, _ in rows:
        option = recipes.OPTIONS[name]
        assert (float(kernels), float(rest)) == (option.kernels, option.rest)
        assert len(losses.split()) == (3 if name in recipes.FINALISTS else 1)


def test_a_record_is_gone_on_with(script, tmp_path, monkeypatch, capsys):
    path, trained = tmp_path / "record.json", []

    def loss_after(option, seed, steps, bar):
        trained.append((option.kernels, seed))
        return 1.5 + 0.25 * seed

    def run(*args):
        trained.clear()
        monkeypatch.setattr("sys.argv", ["training_options.py", "--json", str(path), *args])
        script.main()
        return {row[0]: row[3] for row in json.loads(path.read_text())[0]["tables"][0]["rows"]}

    monkeypatch.setattr(script, "loss_after", loss_after)
    assert run("--only", script.FLOAT) == {script.FLOAT: "1.500"}
    assert trained == [(3e-3, 0)]
    only = ("--only", script.FLOAT, "ternary, one rate, low", "--seeds", "2")
    assert run(*only) == {script.FLOAT: "1.500 1.750", "ternary, one rate, lower": "1.500"}
    assert trained == [(3e-3, 1), (4e-3, 0)]
    run(*only)
    assert not trained
    with pytest.raises(SystemExit):
        run("--steps", "5")
    assert "a record is of 600 steps, not of 5" in capsys.readouterr().err
