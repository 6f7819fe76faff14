"""``calibrate(sequential=True)`` against the loop of the textbook in NumPy, and what is refused."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from convert_kernels import normal
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import both_kinds, mesh_of, put

import bitnet_jax as bj
from bitnet_jax.convert import Method, Quantized, calibrate

DAMPING = 1.0


class Halves:
    """A method that keeps what it is given: signs, times half of the mean size of all weights."""

    def __init__(self, needs="matrix"):
        self.seen = []
        self.method = Method(needs, self.quantize)

    def quantize(self, w, statistics, config):
        self.seen.append((w, statistics))
        scale = np.float32(0.5) * np.abs(w).mean(axis=(1, 2), keepdims=True)
        groups = (len(w), 1, 1 if config.granularity == "tensor" else w.shape[2])
        scale = np.broadcast_to(scale, groups).astype(np.float32)
        return Quantized(np.sign(w).astype(np.int8), scale, ("slice 0: kept",))


def halves64(w):
    return np.sign(w) * 0.5 * np.abs(w).mean()


def int8_64(y):
    codes, gamma = oracles.activations64(y, bj.ActivationConfig())
    return np.rint(codes) * gamma / 127


def textbook(weights, batches, activation, inputs=lambda y: y, equal=False):
    """Kernel after kernel: (W', H) of each, float64; both networks apply ``activation`` between."""
    xs = [np.asarray(x, np.float64) for x in batches]
    ys, found = list(xs), []
    for w in weights:
        w = np.asarray(w, np.float64)
        sizes = [np.sqrt((y**2).mean(-1, keepdims=True)) if equal else 1.0 for y in ys]
        h = sum((y / s).T @ (y / s) for y, s in zip(ys, sizes, strict=True))
        c = sum((y / s).T @ (x / s) for x, y, s in zip(xs, ys, sizes, strict=True))
        ridge = DAMPING * np.trace(h) / len(h) * np.eye(len(h))
        target = np.linalg.solve(h + ridge, (c + ridge) @ w)
        found.append((target, h))
        v = halves64(target)
        xs = [activation(x @ w) for x in xs]
        ys = [activation(inputs(y) @ v) for y in ys]
    return found


def check(seen, wanted, atol=2e-5):
    """What the method was given, in the order of the program, against the textbook's."""
    assert len(seen) == len(wanted)
    for (w, statistics), (target, moment) in zip(seen, wanted, strict=True):
        assert w.dtype == np.float32
        np.testing.assert_allclose(w[0], target, atol=atol * np.abs(target).max())
        scale = np.abs(moment).max()
        np.testing.assert_allclose(statistics.moments[0], moment, atol=atol * scale)


MIX = np.asarray(normal(9, 12, 12))
BATCHES = [np.asarray(normal(i, n, 12)) @ MIX for i, n in ((1, 30), (2, 30), (3, 17))]
WEIGHTS = [normal(4, 12, 20, scale=0.3), normal(5, 20, 16, scale=0.3), normal(6, 16, 8, scale=0.3)]
PARAMS = {f"w{i}": w for i, w in enumerate(WEIGHTS)}


def network(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params[f"w{i}"])
    return x


@pytest.mark.parametrize("equal", [False, True])
def test_the_loop_of_the_textbook(equal):
    halves = Halves()
    ternary = bj.ternarize(network, activations=None)
    how = {"equal_tokens": equal, "sequential": True}
    packed, report = calibrate(ternary, PARAMS, iter(BATCHES), method=halves.method, **how)
    wanted = textbook(WEIGHTS, BATCHES, np.tanh, equal=equal)
    check(halves.seen, wanted)
    assert [s.tokens.tolist() for _, s in halves.seen] == [[77]] * 3
    for path, (target, _) in zip(PARAMS, wanted, strict=True):
        found = np.asarray(packed[path].dequantize())
        np.testing.assert_allclose(found, halves64(target), atol=2e-5)
    assert [row.path for row in report.rows] == list(PARAMS)
    # The first kernel meets what it meets in float; later ones do not.
    np.testing.assert_allclose(wanted[0][0], WEIGHTS[0], atol=1e-6)
    assert np.abs(wanted[1][0] - WEIGHTS[1]).max() > 0.05


def test_converted_kernels_meet_int8_inputs():
    halves = Halves()
    calibrate(bj.ternarize(network), PARAMS, BATCHES, method=halves.method, sequential=True)
    wanted = textbook(WEIGHTS, BATCHES, np.tanh, int8_64)
    check(halves.seen, wanted, atol=3e-4)  # an input that rounds the other way
    plain = textbook(WEIGHTS, BATCHES, np.tanh)
    assert np.abs(plain[2][1] - wanted[2][1]).max() > 1e-3 * np.abs(plain[2][1]).max()


@pytest.mark.parametrize("method", ["gptq", "weighted"])
def test_it_loses_less(method):
    groups = bj.TernaryConfig(granularity=4)
    ternary = bj.ternarize(network, weights=groups, activations=None)
    lost = []
    for sequential in (False, True):
        packed, _ = calibrate(ternary, PARAMS, BATCHES, method=method, sequential=sequential)
        lost.append(sum(np.square(ternary(packed, x) - network(PARAMS, x)).sum() for x in BATCHES))
    assert lost[1] < 0.9 * lost[0]


def test_planes_lose_less():
    planes = bj.TernaryConfig(granularity=4, planes=2)
    ternary = bj.ternarize(network, weights=planes, activations=None)
    lost = []
    for sequential in (False, True):
        packed, _ = calibrate(ternary, PARAMS, BATCHES, method="planes", sequential=sequential)
        lost.append(sum(np.square(ternary(packed, x) - network(PARAMS, x)).sum() for x in BATCHES))
    assert lost[1] < 0.9 * lost[0]


def test_methods_that_need_nothing_convert_the_kernel():
    ternary = bj.ternarize(network)
    want, _ = calibrate(ternary, PARAMS, BATCHES, method="survivors")
    found, report = calibrate(ternary, PARAMS, BATCHES, method="survivors", sequential=True)
    for path in PARAMS:
        assert (found[path].codes == want[path].codes).all()
        assert (found[path].scale == want[path].scale).all()
    assert [row.tokens for row in report.rows] == [None] * 3


SQUARE = normal(7, 3, 12, 12, scale=0.4)
SQUARE_BATCHES = [np.asarray(normal(i, 40, 12)) @ MIX / 3 for i in (1, 2)]


def step(x, w):
    return jnp.tanh(x @ w), None


STACKED = {
    "one by one": lambda s, x: functools.reduce(lambda x, i: step(x, s[i])[0], range(3), x),
    "scan": lambda s, x: jax.lax.scan(step, x, s)[0],
    "scan in jit": jax.jit(lambda s, x: jax.lax.scan(step, x, s)[0]),
    "scan by index": lambda s, x: jax.lax.scan(lambda x, i: step(x, s[i]), x, jnp.arange(3))[0],
    "fori_loop": lambda s, x: jax.lax.fori_loop(0, 3, lambda i, x: step(x, s[i])[0], x),
    "two scans": lambda s, x: jax.lax.scan(step, jax.lax.scan(step, x, s[:2])[0], s[2:])[0],
    "carried": lambda s, x: jax.lax.scan(
        lambda c, i: ((step(c[0], c[1][i])[0], c[1]), None), (x, s), jnp.arange(3)
    )[0][0],
    "remat": lambda s, x: jax.lax.scan(jax.checkpoint(step), x, s, unroll=3)[0],
    "jit": lambda s, x: functools.reduce(jax.jit(lambda x, w: step(x, w)[0]), s, x),
}


@pytest.mark.parametrize("name", STACKED)
def test_each_slice_of_a_stack_has_its_turn(name):
    halves = Halves()
    ternary = bj.ternarize(STACKED[name], activations=None)
    batches = [(x,) for x in SQUARE_BATCHES]
    packed, report = calibrate(ternary, SQUARE, batches, method=halves.method, sequential=True)
    wanted = textbook(SQUARE, SQUARE_BATCHES, np.tanh)
    check(halves.seen, wanted)
    each = np.stack([halves64(target) for target, _ in wanted])
    np.testing.assert_allclose(np.asarray(packed.dequantize()), each, atol=2e-5)
    (row,) = report.rows
    assert row.shape == (3, 12, 12)
    assert row.tokens == 80
    assert row.notes == ("slice 0: kept", "slice 1: kept", "slice 2: kept")


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_batches_share_the_stacks(kind):
    """Of a stack there is one array, and not one for each run of each batch."""
    params = {"s": kind(normal(7, 3, 12, 12, scale=0.4)), "end": kind(normal(8, 12, 41))}
    counts = []

    def count(_):
        shapes = [array.shape for array in jax.live_arrays()]
        counts.append((shapes.count((3, 12, 12)), shapes.count((12, 41))))

    def fn(params, x):
        return STACKED["scan"](params["s"], x) @ params["end"]

    gc.collect()
    count(None)
    before = counts.pop()
    batches = [normal(i, 5, 12) for i in range(6)]
    ternary = bj.ternarize(fn, activations=None)
    calibrate(ternary, params, batches, method="gptq", sequential=True, progress=count)
    assert len(counts) == 4  # kernels
    assert max(stacks for stacks, _ in counts) <= before[0] + 2
    assert max(ends for _, ends in counts) <= before[1] + 2


def test_a_scan_backwards_and_what_it_stacks():
    def fn(s, x):
        x, ys = jax.lax.scan(lambda x, w: (step(x, w)[0], x.sum()), x, s, reverse=True)
        return x + ys.sum()

    halves = Halves()
    ternary = bj.ternarize(fn, activations=None)
    packed, _ = calibrate(
        ternary, SQUARE, [(x,) for x in SQUARE_BATCHES], method=halves.method, sequential=True
    )
    wanted = textbook(SQUARE[::-1], SQUARE_BATCHES, np.tanh)
    check(halves.seen, wanted)
    each = np.stack([halves64(target) for target, _ in wanted])[::-1]
    np.testing.assert_allclose(np.asarray(packed.dequantize()), each, atol=2e-5)


def test_experts_with_and_without_inputs_of_their_own():
    params = {"up": normal(1, 4, 12, 8), "down": normal(2, 4, 8, 12)}

    def fn(params, x):
        h = jax.vmap(lambda w: jnp.tanh(x @ w))(params["up"])  # all meet x
        return jax.vmap(jnp.matmul)(h, params["down"])  # each meets its own

    halves = Halves()
    ternary = bj.ternarize(fn, activations=None)
    calibrate(ternary, params, SQUARE_BATCHES, method=halves.method, sequential=True)
    (up, of_up), (down, of_down) = halves.seen
    assert of_up.tokens.tolist() == of_down.tokens.tolist() == [80] * 4
    for i in range(4):
        pair = [params["up"][i], params["down"][i]]
        (w, h), (target, moment) = textbook(pair, SQUARE_BATCHES, np.tanh)
        np.testing.assert_allclose(up[i], w, atol=1e-5)
        np.testing.assert_allclose(of_up.moments[i], h, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(of_down.moments[i], moment, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(down[i], target, atol=2e-4)


def test_a_kernel_that_is_met_twice_is_converted_first():
    params = {"in": normal(1, 12, 12, scale=0.3), "twice": normal(2, 12, 12, scale=0.3)}

    def fn(params, x):
        x = jnp.tanh(x @ params["twice"])
        return jnp.tanh(x @ params["in"]) @ params["twice"]

    ternary = bj.ternarize(fn, activations=None)
    kept, plain = Halves(), Halves()
    calibrate(ternary, params, SQUARE_BATCHES, method=kept.method, sequential=True)
    calibrate(ternary, params, SQUARE_BATCHES, method=plain.method)
    first = next(s for w, s in plain.seen if (w[0] == np.asarray(params["twice"])).all())
    assert (kept.seen[0][0][0] == np.asarray(params["twice"])).all()
    assert (kept.seen[0][1].moments == first.moments).all()
    assert kept.seen[0][1].tokens.tolist() == [160]
    twice, between = (np.asarray(params[n], np.float64) for n in ("twice", "in"))
    x = np.concatenate(SQUARE_BATCHES).astype(np.float64)
    y = np.tanh(x @ halves64(twice))
    np.testing.assert_allclose(kept.seen[1][1].moments[0], y.T @ y, rtol=1e-4, atol=1e-3)
    assert np.abs(kept.seen[1][0][0] - between).max() > 0.01


def test_branches_that_batches_take_apart():
    """Each branch's kernel is converted by the batches that take it; then all go on together."""
    params = {"a": normal(1, 12, 12), "b": normal(2, 12, 12), "end": normal(3, 12, 6)}

    def fn(params, x, first):
        branches = (lambda x: x @ params["a"], lambda x: jnp.tanh(x @ params["b"]))
        return jax.lax.cond(first, *branches, x) @ params["end"]

    batches = [(SQUARE_BATCHES[0], jnp.array(True)), (SQUARE_BATCHES[1][:9], jnp.array(False))]
    ternary = bj.ternarize(fn, activations=None)
    _, report = calibrate(ternary, params, batches, method="gptq", sequential=True)
    assert {row.path: row.tokens for row in report.rows} == {"a": 40, "b": 9, "end": 49}


@pytest.mark.parametrize("longer", [0, 1])
def test_batches_whose_programs_differ(longer):
    """A kernel waits for the batches in which more comes before it."""
    params = {"first": normal(1, 12, 12), "end": normal(3, 12, 6)}

    def fn(params, x, more):
        if more:
            x = jnp.tanh(jnp.sin(jnp.cos(x)) @ params["first"])
        return x @ params["end"]

    batches = [
        (SQUARE_BATCHES[0], True),
        (SQUARE_BATCHES[1][:9], longer == 1),
        (normal(1, 7, 12), False),
    ]
    ternary = bj.ternarize(fn, activations=None)
    _, report = calibrate(ternary, params, batches, method="gptq", sequential=True)
    tokens = {row.path: row.tokens for row in report.rows}
    assert tokens == {"first": 40 + 9 * longer, "end": 56}


@both_kinds
def test_sharded_batches(kind):
    """Tokens that lie on several devices are summed over all of them."""
    ternary = bj.ternarize(network, activations=None)
    batches = [normal(i, 8, 12) for i in (1, 2)]
    want, _ = calibrate(ternary, PARAMS, batches, method="gptq", sequential=True)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = {name: put(mesh, w, P()) for name, w in PARAMS.items()}
        sharded = [put(mesh, x, P("data", None)) for x in batches]
        found, _ = calibrate(ternary, params, sharded, method="gptq", sequential=True)
    for name, kernel in want.items():
        assert (np.asarray(found[name].codes) == np.asarray(kernel.codes)).all()
        np.testing.assert_allclose(np.asarray(found[name].scale), kernel.scale, rtol=1e-5)


def test_networks_that_part_ways():
    """Where the float network takes another branch, the target is the kernel's own product."""
    params = {"in": normal(1, 12, 12), "a": normal(2, 12, 12), "b": normal(3, 12, 12)}

    def fn(params, x):
        h = x @ params["in"]
        share = jnp.square(h).sum() / 1e4
        return jax.lax.cond(share > 1e-2, lambda h: h @ params["a"], lambda h: h @ params["b"], h)

    class Small(Halves):
        def quantize(self, w, statistics, config):
            made = super().quantize(w, statistics, config)
            return made._replace(scale=made.scale * np.float32(1e-3))

    small = Small()
    ternary = bj.ternarize(fn, activations=None)
    _, report = calibrate(ternary, params, SQUARE_BATCHES, method=small.method, sequential=True)
    assert {row.path: row.tokens for row in report.rows} == {"in": 80, "a": 0, "b": 80}
    target = next(w for w, s in small.seen if s.tokens[0] == 80 and w is not small.seen[0][0])
    np.testing.assert_allclose(target[0], params["b"], atol=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(20)(x))
        return nn.Dense(8, name="head")(x)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(12, 20, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(20, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.first(x)))


def test_a_linen_model():
    model = bj.linen.ternarize(Net(), activations=None)
    params = model.init(jax.random.key(0), BATCHES[0])["params"]
    halves = Halves()
    packed, _ = calibrate(model, params, BATCHES, method=halves.method, sequential=True)
    kernels = [params[name]["kernel"] for name in ("Dense_0", "head")]
    check(halves.seen, textbook(kernels, BATCHES, np.tanh))
    assert model.apply({"params": packed}, BATCHES[0]).shape == (30, 8)


def test_an_nnx_model():
    model = Twin(nnx.Rngs(0))
    kernels = [model.first.kernel[...], model.head.kernel[...]]
    bj.nnx.ternarize(model, activations=None)
    halves = Halves()
    packed, _ = calibrate(model, None, BATCHES, method=halves.method, sequential=True)
    check(halves.seen, textbook(kernels, BATCHES, np.tanh))
    assert packed(BATCHES[0]).shape == (30, 8)


def test_a_decoder_scanned_or_not_has_the_same_codes():
    config = bj.models.DecoderConfig(
        vocabulary=32, width=16, hidden=32, depth=2, heads=2, embedding=bj.Int8Config()
    )
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    stacked = bj.models.Decoder(
        bj.models.DecoderConfig(**{**vars(config), "scan": True}), rngs=nnx.Rngs(0)
    )
    flat = {tuple(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for path, variable in nnx.to_flat_state(nnx.state(stacked, nnx.Param)):
        if path[0] == "layers":
            parts = [flat[("layers", str(i), *map(str, path[1:]))][...] for i in range(2)]
            variable.set_value(jnp.stack(parts))
        else:
            variable.set_value(flat[tuple(map(str, path))][...])
    batches = [jax.random.randint(jax.random.key(i), (3, 8), 0, 32) for i in range(2)]
    one, report = calibrate(model, None, batches, method="gptq", sequential=True)
    other, short = calibrate(stacked, None, batches, method="gptq", sequential=True)
    for name in ("attention/query", "attention/out", "mlp/up", "mlp/down"):
        room, kind = name.split("/")
        whole = getattr(getattr(other.layers, room), kind).linear.kernel.get_value()
        for i in range(2):
            part = getattr(getattr(one.layers[i], room), kind).linear.kernel.get_value()
            assert (whole[i].codes == part.codes).all()
            np.testing.assert_array_equal(whole[i].scale, part.scale)
    errors = {row.path: row.error for row in report.rows}
    for row in short.rows:
        if row.path.startswith("layers"):
            each = [errors[row.path.replace("layers/", f"layers/{i}/")] for i in range(2)]
            assert row.error == pytest.approx(np.mean(each), rel=1e-6)
    assert {row.tokens for row in short.rows if row.path.startswith("layers")} == {48}


def test_windows_of_a_convolution():
    params = {"a": normal(1, 3, 4, 6), "b": normal(2, 3, 6, 5)}

    def conv(x, w):
        layout = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=layout)

    ternary = bj.ternarize(lambda p, x: conv(jnp.tanh(conv(x, p["a"])), p["b"]), activations=None)
    halves = Halves()
    x = np.asarray(normal(3, 2, 9, 4))
    calibrate(ternary, params, [x], method=halves.method, sequential=True)

    def windows(x):
        return np.concatenate([x[:, i : i + x.shape[1] - 2] for i in range(3)], -1)

    a = np.asarray(params["a"], np.float64).reshape(12, 6)
    b = np.asarray(params["b"], np.float64).reshape(18, 5)
    rows = windows(np.asarray(x, np.float64))
    xs, ys = (windows(np.tanh(rows @ w)).reshape(-1, 18) for w in (a, halves64(a)))
    h, c = ys.T @ ys, ys.T @ xs
    ridge = DAMPING * np.trace(h) / 18 * np.eye(18)
    target = np.linalg.solve(h + ridge, (c + ridge) @ b)
    np.testing.assert_allclose(halves.seen[1][0][0], target, atol=1e-4)


def test_losses_and_candidates():
    ternary = bj.ternarize(network, weights=bj.TernaryConfig(granularity=4))
    how = {
        "loss": lambda y, x: jnp.square(y).sum(-1),
        "candidates": [bj.TernaryConfig(granularity="channel"), bj.Int8Config()],
        "sequential": True,
    }
    progress = []
    _, report = calibrate(ternary, PARAMS, BATCHES, progress=progress.append, **how)
    assert report.predicts == "loss"
    assert all(row.change > 0 and len(row.options) == 4 for row in report.rows)
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    choice = bj.convert.budget(report, bytes=2_000)
    assert len(choice.rows) == 3


def test_losses_and_candidates_of_stacks_add_up():
    how = {
        "loss": lambda y, *x: jnp.square(y).sum(-1),
        "candidates": [bj.Int8Config()],
        "sequential": True,
    }
    groups = bj.TernaryConfig(granularity=4)
    batches = [(x,) for x in SQUARE_BATCHES]
    stacked = bj.ternarize(STACKED["scan"], weights=groups)
    _, report = calibrate(stacked, SQUARE, batches, **how)
    apart = bj.ternarize(lambda s, x: STACKED["one by one"](s, x), weights=groups)
    _, parts = calibrate(apart, [*SQUARE], batches, **how)
    (row,) = report.rows
    assert row.error == pytest.approx(np.mean([part.error for part in parts.rows]), rel=1e-4)
    assert row.change == pytest.approx(sum(part.change for part in parts.rows), rel=1e-4)
    for one, *others in zip(row.options, *(part.options for part in parts.rows), strict=True):
        assert one.bytes == sum(other.bytes for other in others)
        assert one.change == pytest.approx(sum(other.change for other in others), rel=1e-4)


def test_slices_that_nothing_meets():
    params = {"layers": normal(1, 3, 12, 12, scale=0.2)}

    def fn(params, x):
        for i in (2, 0):
            x = jnp.tanh(x @ params["layers"][i])
        return x

    packed, report = calibrate(
        bj.ternarize(fn), params, SQUARE_BATCHES, method="gptq", sequential=True
    )
    assert packed["layers"].shape == (3, 12, 12)
    assert report.rows[0].tokens == 0
    assert report.rows[0].notes[-1].startswith("slice 1: no tokens")


def test_what_is_refused():
    ternary = bj.ternarize(network)
    with pytest.raises(TypeError, match=r"calibrate: `sequential` must be a bool, got int 1\."):
        calibrate(ternary, PARAMS, BATCHES, sequential=1)
    with pytest.raises(ValueError, match="calibrate: the network does not run on batch 1"):
        calibrate(ternary, PARAMS, [BATCHES[0], BATCHES[1][:, :5]], sequential=True)
    spoilt = BATCHES[1].copy()
    spoilt[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"w0 have \d+ NaN or Inf second moments in batch 1"):
        calibrate(ternary, PARAMS, [BATCHES[0], spoilt], sequential=True)
    with pytest.raises(ValueError, match="calibrate: no kernel met an input"):
        calibrate(ternary, PARAMS, [0 * BATCHES[0]], sequential=True)


def test_loops_of_unknown_length_and_shards():
    def loop(params, x):
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"]))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < jnp.abs(x).max(), body, (0, x))[1]

    def sharded(params, x):
        p = jax.sharding.PartitionSpec
        how = {"in_specs": (p(), p("d")), "out_specs": p("d")}
        mesh = mesh_of("auto", (8,), ("d",))
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, **how)(params["w"], x)

    params, x = {"w": normal(1, 12, 12)}, np.asarray(normal(2, 8, 12))
    with pytest.raises(NotImplementedError, match=r"calibrate: the kernel at w .*`while` loop"):
        calibrate(bj.ternarize(loop), params, [x], sequential=True)
    packed, _ = calibrate(bj.ternarize(loop), params, [x], method="survivors", sequential=True)
    assert isinstance(packed["w"], bj.PackedTernary)
    match = r"calibrate: the kernel at w enters a `shard_map`.*sequential=False"
    with pytest.raises(NotImplementedError, match=match):
        calibrate(bj.ternarize(sharded), params, [x], sequential=True)
