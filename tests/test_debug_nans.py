"""Nothing makes a NaN on purpose: the public surface runs under ``jax_debug_nans``."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bitnet_jax as bj

pytestmark = [pytest.mark.standard_promotion, pytest.mark.optimised]

X = jax.random.normal(jax.random.key(0), (4, 16))
IMAGE = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
TOKENS = jnp.array([[1, 3], [0, 2]])
# Zeros: where there is nothing to divide by.
KERNELS = {
    "normal": jax.random.normal(jax.random.key(1), (16, 8)),
    "zeros": jnp.zeros((16, 8)),
    "zero channels": jax.random.normal(jax.random.key(2), (16, 8)).at[:, ::2].set(0.0),
}
CONFIGS = {
    "b158": bj.B158,
    "phase4": bj.PHASE4,
    "twn": bj.TWN,
    "median": bj.TernaryConfig("absmedian", granularity=8),
    "int8": bj.Int8Config(),
}


def params(w):
    return {"kernel": w, "bias": jnp.zeros(8)}


def steps(tx, w, count=4):
    p, state = params(w), tx.init(params(w))
    update = jax.jit(tx.update)
    for _ in range(count):
        updates, state = update(jax.tree.map(jnp.ones_like, p), state, p)
        p = optax.apply_updates(p, updates)
    return state


def trained(w, config):
    layer = bj.linen.BitDense(8, weights=config)
    return jax.jit(jax.grad(lambda p: jnp.square(layer.apply({"params": p}, X)).sum()))(params(w))


def served(w, config):
    packed, report = bj.pack_params(params(w), config)
    layer = bj.linen.BitDense(8, weights=config)
    outputs = [layer.apply({"params": tree}, X) for tree in (packed, bj.prepare(packed))]
    return outputs, str(report), report.to_dict()


def adapted(w, config):
    packed, _ = bj.pack_params(params(w), config)
    adapters = bj.lora.init(packed, 2, key=jax.random.key(0))
    layer = bj.linen.BitDense(8, weights=config)
    jax.grad(lambda a: layer.apply({"params": bj.lora.attach(packed, a)}, X).sum())(adapters)
    return bj.lora.merge(packed, adapters)


OF_CONFIGS = {
    "pack": lambda w, c: bj.pack(w, c),
    "unpack": lambda w, c: bj.unpack(bj.pack(w, c)),
    "unpack_params": lambda w, c: bj.unpack_params(bj.pack_params(params(w), c)[0]),
    "dequantize": lambda w, c: bj.pack(w, c).dequantize(),
    "fake_quantize": lambda w, c: jax.grad(lambda w: bj.fake_quantize(w, c).sum())(w),
    "fake_quantize_params": lambda w, c: bj.fake_quantize_params(params(w), c, strength=0.5),
    "ternary_dot": lambda w, c: jax.grad(lambda w: bj.ternary_dot(X, w, c).sum())(w),
    "ternary_dot of zeros": lambda w, c: bj.ternary_dot(jnp.zeros_like(X), w, c),
    "matmul": lambda w, c: jax.grad(lambda x: bj.matmul(x, bj.pack(w, c)).sum())(X),
    "matmul, weight-only": lambda w, c: bj.matmul(X, bj.pack(w, c), activations=None),
    "training": trained,
    "serving": served,
    "adapters": adapted,
    "ternarize": lambda w, c: bj.ternarize(lambda p, x: x @ p["kernel"], weights=c)(params(w), X),
    "sensitivity": lambda w, c: bj.analysis.sensitivity(
        lambda p: jnp.square(X @ p["kernel"]).mean(), params(w), c
    ),
}


@pytest.fixture(autouse=True)
def debug_nans():
    with jax.debug_nans(True):
        yield


@pytest.mark.full
@pytest.mark.parametrize("name", OF_CONFIGS)
@pytest.mark.parametrize("config", CONFIGS)
def test_kernels_and_layers(name, config):
    for w in KERNELS.values():
        OF_CONFIGS[name](w, CONFIGS[config])


@pytest.mark.parametrize("name", OF_CONFIGS)
def test_kernels_of_zeros(name):
    OF_CONFIGS[name](KERNELS["zeros"], bj.B158)


def trit_stats(w):
    first = bj.analysis.trit_stats(params(w))
    second = bj.analysis.trit_stats(params(w), previous=first)
    return str(first), first.to_dict(), str(second), second.to_dict()


def watched(w):
    state = steps(bj.optim.watch_trits(every=2), w, 1)
    early = bj.optim.read_trits(state)
    assert not [name for name in early if name.endswith(("flip_rate", "scale_drift"))]
    late = bj.optim.read_trits(steps(bj.optim.watch_trits(every=2), w))
    assert 0.0 <= late["kernel/flip_rate"] <= 1.0
    assert late["kernel/scale_drift"] > -1.0


def waiting(init, track):
    tx = bj.optim.grokfast_ema(start_step=2, init=init, track_while_waiting=track)
    return lambda w: steps(tx, w)


def coverage(w):
    ternary = bj.ternarize(lambda p, x: x @ p["kernel"])
    return str(ternary.explain(params(w), X))


REPORTS = {
    "trit_stats": trit_stats,
    "watch_trits": watched,
    "gradient_flow": lambda w: str(bj.analysis.gradient_flow({"a": w, "b": None})),
    "explain": coverage,
    "b158_adamw": lambda w: steps(bj.optim.b158_adamw(4), w),
    "grokfast_ma": lambda w: steps(bj.optim.grokfast_ma(2), w),
    "grokfast_ma, no warm-up": lambda w: steps(bj.optim.grokfast_ma(3, warmup=False), w),
    "mugrokfast": lambda w: steps(bj.optim.mugrokfast(1e-3, phase="curriculum"), w),
    **{
        f"grokfast_ema, {init}, {'tracked' if track else 'waiting'}": waiting(init, track)
        for init in ("first", "zeros", "debiased")
        for track in (True, False)
    },
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", REPORTS)
def test_reports_and_optimizers(name, kernel):
    REPORTS[name](KERNELS[kernel])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 3, 100])
def test_schedules(steps, shape):
    schedules = (
        bj.optim.two_stage_lr(steps, warmup_steps=0, shape=shape),
        bj.optim.two_stage_lr(steps, shape=shape),
        bj.optim.two_stage_weight_decay(steps),
        bj.optim.strength_schedule(steps, shape=shape),
    )
    for schedule in schedules:
        for step in (0, 1, steps // 2, steps, 10 * steps):
            assert jnp.isfinite(jax.jit(schedule)(jnp.int32(step)))


def test_qk_clip():
    attention = {name: {"kernel": jnp.ones((4, 2, 3))} for name in ("query", "key")}
    bj.optim.qk_clip(attention, jnp.array([120.0, 0.0]), tau=30.0)
    tx = bj.optim.clip_by_max_logits(30.0)
    grads = jax.tree.map(jnp.zeros_like, attention)
    tx.update(grads, tx.init(attention), attention, max_logits=jnp.array([0.0, 31.0]))
    bj.optim.attention_max_logits(jnp.zeros((2, 3, 2, 4)), jnp.zeros((2, 3, 1, 4)))


@pytest.mark.parametrize("norm", [False, True])
def test_other_layers(norm):
    conv = bj.linen.BitConv(8, (3, 3), norm=norm)
    variables = conv.init(jax.random.key(1), IMAGE)
    jax.grad(lambda p: conv.apply({"params": p}, 0.0 * IMAGE).sum())(variables["params"])
    linear = bj.nnx.BitLinear(16, 8, norm=norm, rngs=nnx.Rngs(0))
    nnx.grad(lambda m: m(0.0 * X).sum())(linear)
    packed, _ = bj.nnx.pack(linear)
    packed(0.0 * X)
    embed = bj.linen.ternarize(nn.Embed(16, 8), lambda path, leaf: bj.Int8Config())
    table = embed.init(jax.random.key(0), TOKENS)["params"]
    for tree in (table, bj.linen.pack(embed, table, TOKENS)[0]):
        embed.apply({"params": tree}, TOKENS)


def test_a_comparison_and_files(tmp_path):
    layer = bj.linen.BitDense(8)
    tree = params(KERNELS["zero channels"])
    packed, _ = bj.pack_params(tree)
    str(bj.analysis.compare(layer, tree, packed, [X]))
    str(bj.analysis.compare(layer, tree, packed, [(X, jnp.arange(4))]))
    bj.io.save(tmp_path / "model.bitnet.safetensors", packed)
    bj.io.check(bj.io.load(tmp_path / "model.bitnet.safetensors"), bj.io.describe(packed))


def test_a_decoder_generates():
    config = bj.models.DecoderConfig(vocabulary=32, width=16, hidden=32, depth=1)
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    for ready in (model, bj.nnx.pack(model)[0]):
        assert len(ready.generate([1, 2], max_new_tokens=3)) == 3
