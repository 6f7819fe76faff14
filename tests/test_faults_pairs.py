"""What a newcomer passes: a tree beside its report, labels in batches, the mean of losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj

W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(32, 16)), jnp.float32)
LABELS = jnp.arange(32) % 8
PARAMS = {"w": {"kernel": W}}
FUNCTION = bj.ternarize(lambda params, x: x @ params["w"]["kernel"])
SPEC = [("w/kernel", jax.sharding.PartitionSpec())]

TAKES_A_TREE = {
    "prepare": bj.prepare,
    "save": lambda pair: bj.io.save("never.safetensors", pair),
    "unpack_params": bj.unpack_params,
    "pack_params": bj.pack_params,
    "partition": bj.partition,
    "lora.init": lambda pair: bj.lora.init(pair, rank=2, key=jax.random.key(0)),
    "partition_specs": lambda pair: bj.sharding.partition_specs(pair, SPEC),
    "compare": lambda pair: bj.analysis.compare(FUNCTION, PARAMS, pair, [X]),
    "ternarize": lambda pair: FUNCTION(pair, X),
    "calibrate": lambda pair: bj.convert.calibrate(FUNCTION, pair, [X]),
    "smooth": lambda pair: bj.convert.smooth(FUNCTION, pair, [X]),
}


@pytest.mark.parametrize("name", TAKES_A_TREE)
def test_a_tree_beside_its_report_is_refused(name):
    pair = bj.pack_params(PARAMS)
    with pytest.raises(TypeError, match=rf"^{name}: .* is a tree and a PackReport\. Take apart"):
        TAKES_A_TREE[name](pair)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.LayerNorm()(x))


MODEL = bj.linen.ternarize(Normed())


def linen_params():
    return MODEL.init(jax.random.key(0), X)["params"]


def test_a_smoothed_pair_is_refused():
    pair = bj.convert.smooth(MODEL, linen_params(), [X])
    with pytest.raises(TypeError, match=r"^calibrate: `params` is a tree and a Smoothing\."):
        bj.convert.calibrate(MODEL, pair, [X])


@pytest.mark.parametrize("call", [bj.convert.calibrate, bj.convert.smooth])
@pytest.mark.parametrize("wrong", ["labels in the batch", "variables for params"])
def test_a_linen_model_that_does_not_take_the_batch(call, wrong):
    params = linen_params()
    given = ({"params": params}, [X]) if wrong.startswith("var") else (params, [(X, LABELS)])
    match = f"^{call.__name__}: the model does not run on batch 0 with .* go into call="
    with pytest.raises(ValueError, match=match):
        call(MODEL, *given)


def test_labels_reach_the_loss_of_a_linen_model_by_a_method():
    params = linen_params()

    def loss(logits, x, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    call = {"method": lambda model, x, labels: model(x)}
    batches = [(X, LABELS)]
    _, report = bj.convert.calibrate(MODEL, params, batches, loss=loss, call=call)
    _, same = bj.convert.calibrate(MODEL, params, [X], loss=lambda y, x: loss(y, x, LABELS))
    assert report.rows[0].change == same.rows[0].change > 0


def test_the_other_library():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"^pack: .* for an nnx model call the function of bj\.nnx"):
        bj.linen.pack(model, None, X)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"Call bj\.nnx\.ternarize\(model\) first\.$"):
        bj.convert.calibrate(model, None, [X])
    outer = nnx.Sequential(model)
    bj.nnx.ternarize(outer)
    with pytest.raises(TypeError, match=r"^calibrate: `method` must be a str, got .* name it\."):
        bj.convert.calibrate(outer, None, [X], call={"method": lambda model, x: model(x)})


def test_the_mean_of_a_batch_is_refused():
    """Its gradient is the mean's, not the mean of squares: 100 times less, with no error."""
    params, model = linen_params(), nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    bj.nnx.ternarize(model)
    for network, own in ((FUNCTION, PARAMS), (MODEL, params), (model, None)):
        with pytest.raises(ValueError, match=r"one loss for each .*\(32, 8\)\. .*Leave out \.mean"):
            bj.convert.calibrate(network, own, [X], loss=lambda y, x: y.mean())
    # Of one example a single number is the loss of that example.
    _, one = bj.convert.calibrate(FUNCTION, PARAMS, [X[0]], loss=lambda y, x: y.sum())
    _, same = bj.convert.calibrate(FUNCTION, PARAMS, [X[:1]], loss=lambda y, x: y.sum(-1))
    assert one.rows[0].change == pytest.approx(same.rows[0].change, rel=1e-5)
