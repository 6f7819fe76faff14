"""The promise: the codes, sums and outputs you trained with, bit for bit, everywhere.

Every comparison asks for zero differing bits. Nets are built by hand from the two ops
with biases, ReLU and residuals between the layers.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import cases

import bitnet_jax as bj

pytestmark = pytest.mark.optimised

INT8 = bj.ActivationConfig()
PRESETS = {"b158": bj.B158, "phase4": bj.PHASE4, "twn": bj.TWN}
CONFIGS = {
    **PRESETS,
    "median": bj.TernaryConfig(scale="absmedian", granularity="channel"),
    "groups": bj.TernaryConfig(granularity=8),
}
every_config = cases("config", CONFIGS, core=["twn", "groups"])


def gaussian(shape, seed=0, sigma=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * sigma).astype(np.float32)


def same(got, want, message):
    jax.tree.map(functools.partial(oracles.assert_same_bits, message=message), got, want)


# Scales -----------------------------------------------------------------------------------


@cases("shape", [(16, 24), (33, 17), (7, 5), (100, 64)], core=[(33, 17)])
def test_scales_of_fifteen_kernels_are_the_same_in_every_program(shape):
    kernels = gaussian((15, *shape), shape[0], sigma=0.05)

    def every_preset(w):
        return {name: bj.quantize(w, config) for name, config in PRESETS.items()}

    eager = [every_preset(w) for w in kernels]
    jitted = jax.jit(every_preset)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *eager)
    same(jax.tree.map(lambda *a: np.stack(a), *map(jitted, kernels)), stacked, "jit")
    same(jax.jit(jax.vmap(every_preset))(kernels), stacked, "vmap")
    same(jax.vmap(every_preset)(kernels), stacked, "eager vmap")
    constants = jax.jit(lambda: [every_preset(w) for w in kernels[:2]])()
    same(constants, eager[:2], "constants")

    def loss(w):
        t = every_preset(w * 1.0)
        return sum(jnp.sum(w * v.dequantize()) for v in t.values()), t

    (_, inside), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(kernels[0])
    same(inside, eager[0], "inside value_and_grad")
    for one, w in zip(eager, kernels, strict=True):
        for name, config in PRESETS.items():
            pinned = oracles.quantize32(w, config)
            oracles.assert_same_bits(one[name].codes, pinned.codes)
            scale = np.broadcast_to(one[name].scale, shape)
            oracles.assert_same_bits(scale, pinned.scale)


@every_config
def test_a_batch_axis_gives_each_slice_the_bits_it_has_alone(config):
    w = gaussian((5, 16, 24))
    whole = jax.jit(lambda w: bj.quantize(w, config, batch_axes=0))(w)
    for i in range(5):
        same(jax.tree.map(lambda a, i=i: a[i], whole), bj.quantize(w[i], config), f"slice {i}")


@every_config
def test_kernels_of_any_magnitude_are_quantised_the_same_in_every_program(config):
    quantize = functools.partial(bj.quantize, config=config)
    jitted, mapped = jax.jit(quantize), jax.jit(jax.vmap(quantize))
    for sigma in (1e-9, 1e-4, 1e4, 1e30, 5e37, 1.1e38):
        w = np.clip(gaussian((16, 24)), -3, 3) * np.float32(sigma)
        eager = quantize(w)
        same(jitted(w), eager, f"jit, {sigma}")
        same(jax.tree.map(lambda a: a[0], mapped(w[None])), eager, f"vmap, {sigma}")
    same(jax.jit(lambda: quantize(w))(), eager, f"constants, {sigma}")


# One layer --------------------------------------------------------------------------------


@cases("shape", [(16, 24), (7, 5), (64, 33), (1, 8)], core=[(7, 5)])
def test_one_layer_over_shapes_and_presets(shape):
    k, _ = shape
    x, w = gaussian((9, k)), gaussian(shape, 1, 0.1)

    def train(x, w):
        return {n: bj.ternary_dot(x, w, c) for n, c in PRESETS.items()}

    def serve(x, packed):
        return {n: bj.matmul(x, p) for n, p in packed.items()}

    want = {n: oracles.dot32(x, w, c, INT8) for n, c in PRESETS.items()}
    packed = {n: bj.pack(w, c) for n, c in PRESETS.items()}
    prepared = bj.prepare(packed)
    same(jax.jit(train)(x, w), want, "training, jit")
    same(train(x, w), want, "training, eager")
    same(jax.jit(serve)(x, packed), want, "packed, jit")
    same(serve(x, packed), want, "packed, eager")
    same(jax.jit(serve)(x, prepared), want, "prepared, jit")
    same(jax.jit(lambda x: train(x, w))(x), want, "training, constants")
    same(jax.jit(lambda x: serve(x, prepared))(x), want, "prepared, constants")
    one = jax.tree.map(lambda a: a[4:5], want)
    same(jax.jit(train)(x[4:5], w), one, "training, batch 1")
    same(jax.jit(serve)(x[4:5], prepared), one, "prepared, batch 1")


@cases("dtype", [ml_dtypes.bfloat16, np.float16], core=[ml_dtypes.bfloat16])
def test_low_precision_layers_are_the_same_packed(dtype):
    x, w = gaussian((9, 24)).astype(dtype), gaussian((24, 10), 1).astype(dtype)
    for config in (bj.B158, bj.TWN, CONFIGS["groups"]):
        want = jax.jit(functools.partial(bj.ternary_dot, weights=config))(x, w)
        same(want, oracles.dot32(x, w, config, INT8).astype(dtype), "oracle")
        same(bj.ternary_dot(x, w, config), want, "eager")
        packed = bj.pack(w, config)
        same(jax.jit(bj.matmul)(x, packed), want, "packed")
        same(jax.jit(bj.matmul)(x, bj.prepare(packed)), want, "prepared")


# Whole nets -------------------------------------------------------------------------------

# widths of the layers; a layer that keeps its width gets a residual
NETS = {
    "residual": (24, 24, 24, 24),
    "funnel": (64, 16, 8, 10),
    "mixed": (16, 24, 24, 16),
}


def net(op, x, params, *, relu_last=False):
    """Layers of ``op(h, kernel) + bias``, ReLU, and a residual where the width allows."""
    h = x
    for i, (kernel, bias) in enumerate(params):
        y = op(h, kernel) + (bias if h.ndim == 1 else bias[None])
        last = i == len(params) - 1
        y = y if last and not relu_last else jnp.maximum(y, 0.0)
        h = y + h if y.shape == h.shape else y
    return h


def net_oracle(x, params, config):
    h = x
    for i, (w, b) in enumerate(params):
        y = oracles.dot32(h, w, config, INT8) + b
        y = y if i == len(params) - 1 else np.maximum(y, np.float32(0))
        h = y + h if y.shape == h.shape else y
    return h


def make(widths, seed=1):
    pairs = list(itertools.pairwise(widths))
    return [
        (gaussian((k, n), seed + i, k**-0.5), gaussian(n, 50 + seed + i, 0.1))
        for i, (k, n) in enumerate(pairs)
    ]


@cases(
    ("name", "preset"),
    [("mixed", "b158"), ("mixed", "groups"), ("residual", "phase4"), ("residual", "twn")]
    + [("funnel", "median")],
    core=[("residual", "phase4")],
)
def test_nets_have_one_set_of_bits(name, preset):
    widths, config = NETS[name], CONFIGS[preset]
    x, params = gaussian((9, widths[0])), make(widths)
    packed = [(bj.pack(w, config), b) for w, b in params]
    prepared = bj.prepare(packed)
    dot = functools.partial(bj.ternary_dot, weights=config)
    train, serve = functools.partial(net, dot), functools.partial(net, bj.matmul)
    want = net_oracle(x, params, config)
    one = want[4:5]

    same(jax.jit(train)(x, params), want, "training, jit")
    if (name, preset) in (("mixed", "b158"), ("residual", "phase4")):
        same(train(x, params), want, "training, eager")
    same(jax.jit(jax.vmap(train, (0, None)))(x, params), want, "training, vmap")
    same(jax.jit(lambda x: train(x, params))(x), want, "training, constants")
    same(jax.jit(train)(x[4:5], params), one, "training, batch 1")
    same(jax.jit(train)(x[4], params), one[0], "training, one token")

    def loss(params, x, apply):
        y = apply(x, params)
        return jnp.mean(y**2), y

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (_, y), _ = grad(params, x, train)
    same(y, want, "inside value_and_grad")
    (_, y), _ = grad(params, x, functools.partial(net, jax.checkpoint(dot)))
    same(y, want, "inside value_and_grad with remat")

    same(jax.jit(serve)(x, packed), want, "packed, jit")
    same(jax.jit(serve)(x, prepared), want, "prepared, jit")
    same(jax.jit(jax.vmap(serve, (0, None)))(x, prepared), want, "prepared, vmap")
    same(jax.jit(serve)(x[4:5], prepared), one, "prepared, batch 1")
    if (name, preset) == ("mixed", "b158"):
        same(serve(x, prepared), want, "prepared, eager")
        same(jax.jit(lambda x: serve(x, prepared))(x), want, "prepared, constants")
        same(serve(x, packed), want, "packed, eager")
        same(jax.jit(serve)(x[4:5], packed), one, "packed, batch 1")
        reference = functools.partial(net, functools.partial(bj.matmul, implementation="reference"))
        same(jax.jit(reference)(x, packed), want, "packed, reference")


@cases("config", [bj.B158, bj.TWN, CONFIGS["groups"]], core=[CONFIGS["groups"]])
def test_data_as_a_constant_gives_the_same_bits(config):
    # A closed-over batch: XLA then knows gamma while it compiles, and no longer the weights.
    x, params = gaussian((9, 24)), make((24, 24, 24))
    dot = functools.partial(bj.ternary_dot, weights=config)
    want = net_oracle(x, params, config)
    same(jax.jit(lambda params: net(dot, x, params))(params), want, "training")

    def loss(params):
        y = net(dot, x, params)
        return jnp.mean(y**2), y

    (_, y), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    same(y, want, "inside value_and_grad")
    packed = [(bj.pack(w, config), b) for w, b in params]
    same(jax.jit(lambda params: net(bj.matmul, x, params))(packed), want, "packed")
    same(jax.jit(lambda params: net(bj.matmul, x, params))(bj.prepare(packed)), want, "prepared")


@cases("config", PRESETS, core=["b158"])
def test_data_and_kernels_as_constants_and_biases_as_arguments(config):
    x, params = gaussian((9, 24)), make((24, 24, 24))
    kernels, biases = zip(*params, strict=True)
    dot = functools.partial(bj.ternary_dot, weights=config)

    def run(biases):
        return net(dot, x, list(zip(kernels, biases, strict=True)))

    same(jax.jit(run)(biases), net_oracle(x, params, config), "training")


@cases("config", PRESETS, core=["phase4"])
def test_scan_over_layers_is_the_loop(config):
    x, params = gaussian((9, 24)), make((24, 24, 24, 24, 24))
    want = net(functools.partial(bj.ternary_dot, weights=config), x, params, relu_last=True)
    kernels, biases = (np.stack(part) for part in zip(*params, strict=True))
    packed = bj.pack(kernels, config, batch_axes=0)

    def scanned(op, x, kernels):
        def layer(h, params):
            kernel, bias = params
            return jnp.maximum(op(h, kernel) + bias[None], 0.0) + h, None

        return jax.lax.scan(layer, x, (kernels, biases))[0]

    dot = functools.partial(bj.ternary_dot, weights=config)
    same(jax.jit(functools.partial(scanned, dot))(x, kernels), want, "training")
    remat = jax.checkpoint(dot)
    y = jax.jit(lambda x, k: jax.vjp(functools.partial(scanned, remat), x, k)[0])(x, kernels)
    same(y, want, "training, remat, inside vjp")
    serve = jax.jit(functools.partial(scanned, bj.matmul))
    same(serve(x, packed), want, "packed")
    same(serve(x, bj.prepare(packed)), want, "prepared")
    same(serve(x[4:5], bj.prepare(packed)), want[4:5], "prepared, batch 1")


@cases("config", {"b158": bj.B158, "groups": CONFIGS["groups"]}, core=["b158"])
def test_a_net_trained_for_some_steps_serves_the_same_bits(config):
    x, params = gaussian((17, 16)), make((16, 32, 32, 8), 3)
    train = functools.partial(net, functools.partial(bj.ternary_dot, weights=config))

    @jax.jit
    def step(params, x):
        def loss(params):
            y = train(x, params)
            return jnp.mean((y - 1.0) ** 2), y

        (value, y), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), y, value

    losses = []
    serve = jax.jit(functools.partial(net, bj.matmul))
    for _ in range(5):
        packed = [(bj.pack(w, config), b) for w, b in params]
        params, y, value = step(params, x)
        losses.append(float(value))
        same(serve(x, packed), y, "the step's own outputs, packed")
        same(serve(x, bj.prepare(packed)), y, "the step's own outputs, prepared")
    assert losses[-1] < losses[0]


@cases("config", {"phase4": bj.PHASE4, "groups": CONFIGS["groups"]}, core=["groups"])
def test_experts_and_their_slices_are_the_same(config):
    x, w = gaussian((3, 9, 16)), gaussian((3, 16, 24), 1)
    dot = functools.partial(bj.ternary_dot, weights=config)
    whole = jax.jit(functools.partial(dot, batch_axes=0))(x, w)
    packed = bj.pack(w, config, batch_axes=0)
    each = np.stack([oracles.dot32(a, b, config, INT8) for a, b in zip(x, w, strict=True)])
    same(whole, each, "training")
    same(jax.jit(jax.vmap(dot))(x, w), each, "training, vmap")
    for leaf in (packed, bj.prepare(packed)):
        same(jax.jit(bj.matmul)(x, leaf), each, "packed")
        same(jax.jit(jax.vmap(bj.matmul))(x, leaf), each, "packed, vmap")


# Lowering ---------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@cases("config", {"b158": bj.B158, "groups": CONFIGS["groups"]}, core=["groups"])
def test_a_training_step_and_a_packed_apply_lower_everywhere(platform, config):
    x, params = gaussian((8, 16)), make((16, 16, 8))
    train = functools.partial(net, functools.partial(bj.ternary_dot, weights=config))

    def step(params, x, strength):
        def loss(params):
            w, b = params[0]
            first = bj.ternary_dot(x, w, config, strength=strength) + b[None]
            return jnp.mean(train(first, params[1:]) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    apply = functools.partial(net, functools.partial(bj.matmul, implementation="xla"))
    packed = [(bj.pack(w, config), b) for w, b in params]
    for function, args, products in (
        (step, (params, x, jnp.float32(0.5)), "xi32>"),
        (apply, (x, packed), "xi32>"),
        (apply, (x, bj.prepare(packed, "xla")), "xi32>"),
        (jax.vmap(apply, (0, None)), (x, packed), "xi32>"),
    ):
        traced = jax.jit(function).trace(*args)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        integer = [line for line in dots if line.endswith(products)]
        # The forward products are int8 x int8 -> int32, or native.
        assert integer or (platform == "cpu" and "@bitnet_multiply_codes" in text)
        assert all("xi8>" in line for line in integer)
    exported = jax.export.export(jax.jit(step), platforms=[platform])(params, x, jnp.float32(0.5))
    assert exported.platforms == (platform,)
