"""``bj.convert.calibrate``: second moments against NumPy, what comes out, and what is refused."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_kernels import normal
from flax import linen as nn
from flax import nnx
from meshes import both_kinds, mesh_of

import bitnet_jax as bj
from bitnet_jax.convert import Method, Quantized, calibrate


class Kept:
    """A method that keeps the statistics that it is given, by the kernel's first weight."""

    def __init__(self, needs="matrix"):
        self.seen = []
        self.method = Method(needs, self.quantize)

    def quantize(self, w, statistics, config):
        self.seen.append((w, statistics))
        outputs = 1 if config.granularity == "tensor" else w.shape[2]
        groups = w.shape[1] // config.granularity if isinstance(config.granularity, int) else 1
        codes = np.sign(w).astype(np.int8)
        return Quantized(codes, np.full((len(w), groups, outputs), 0.5, np.float32), ("kept",))

    def of(self, kernel):
        """The statistics of a canonical kernel (B, K, N)."""
        wanted = np.asarray(kernel, np.float32)
        (found,) = [s for w, s in self.seen if w.shape == wanted.shape and (w == wanted).all()]
        return found


def collected(ternary, params, batches, needs="matrix", **how):
    kept = Kept(needs)
    packed, report = calibrate(ternary, params, batches, method=kept.method, **how)
    return kept, packed, report


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def check(statistics, *slices):
    """Statistics against the rows (tokens, K) that each slice meets, in float64."""
    rows = [np.asarray(r, np.float64) for r in slices]
    assert statistics.tokens.tolist() == [len(r) for r in rows]
    assert statistics.tokens.dtype == np.int64
    assert statistics.moments.dtype == np.float64
    matrix = np.stack([r.T @ r for r in rows])
    wanted = matrix if statistics.moments.ndim == 3 else np.einsum("bkk->bk", matrix)
    np.testing.assert_allclose(statistics.moments, wanted, rtol=2e-6, atol=2e-6 * matrix.max())


X = normal(0, 5, 7, 16)
ROWS = np.asarray(X, np.float64).reshape(-1, 16)


@pytest.mark.parametrize("needs", ["matrix", "diagonal"])
def test_several_contracting_axes_whatever_comes_behind(needs):
    """No gradient has to come back: neither stop_gradient nor an integer output hides a kernel."""
    params = {"in": normal(1, 16, 4, 8), "out": normal(2, 4, 8, 6)}

    def fn(params, x):
        h = jax.lax.stop_gradient(jnp.tanh(jnp.einsum("btd,dhk->bthk", x, params["in"])))
        return jnp.argmax(jnp.einsum("bthk,hkd->btd", h, params["out"]), -1)

    kept, packed, report = collected(bj.ternarize(fn), params, [X], needs)
    first, second = wide(*params.values())
    check(kept.of(first.reshape(1, 16, 32)), ROWS)
    check(kept.of(second.reshape(1, 32, 6)), np.tanh(ROWS @ first.reshape(16, 32)))
    assert [row.tokens for row in report.rows] == [35, 35]
    assert packed["out"].shape == (4, 8, 6)


def nchw(w, x):
    return jax.lax.conv(x, w, (1, 2), "SAME")


SQUARE, STACK = normal(1, 16, 16), normal(1, 3, 16, 16, scale=0.2)
FLAT = X.reshape(-1, 16)
IMAGES = normal(3, 2, 4, 6, 7)
WINDOW = normal(4, 5, 4, 3, 2)
LAYOUTS = {
    "transposed": (lambda w, x: x @ w.T, SQUARE, FLAT),
    "on the left": (lambda w, x: w @ x.T, SQUARE, FLAT),
    "split": (lambda w, x: jnp.einsum("td,dhk->thk", x, w.reshape(16, 4, 4)), SQUARE, FLAT),
    "merged, other order": (
        lambda w, x: jnp.einsum(
            "tkh,khd->td", x.reshape(-1, 4, 4), jnp.swapaxes(w.reshape(4, 4, 16), 0, 1)
        ),
        SQUARE,
        FLAT,
    ),
    "unused axis": (lambda w, x: x @ w[None, :, None, :].squeeze((0, 2)), SQUARE, FLAT),
    "broadcast": (
        lambda w, x: jnp.einsum("tk,tkn->tn", x, jnp.broadcast_to(w, (35, 16, 16))),
        SQUARE,
        FLAT,
    ),
    "several axes": (
        lambda w, x: jnp.einsum("tab,dabc->tdc", x, w),
        normal(1, 3, 4, 4, 5),
        FLAT.reshape(-1, 4, 4),
    ),
    "vmap of both": (jax.vmap(lambda w, x: x @ w), STACK, normal(2, 3, 7, 16)),
    "vmap of vmap": (
        lambda w, x: jax.vmap(lambda w: jax.vmap(lambda x: jax.vmap(lambda w: x @ w)(w))(x))(w),
        normal(1, 2, 3, 16, 8),
        FLAT,
    ),
    "experts, last in x": (
        lambda w, x: jnp.einsum("tke,ekn->tne", x, w),
        STACK,
        normal(2, 7, 16, 3),
    ),
    "convolution": (nchw, WINDOW, IMAGES),
    "vmap of kernels of a convolution": (
        jax.vmap(nchw, in_axes=(0, None)),
        jnp.stack([WINDOW, -2 * WINDOW]),
        IMAGES,
    ),
    "vmap of images of a convolution": (
        jax.vmap(nchw, in_axes=(None, 0)),
        WINDOW,
        jnp.stack([IMAGES, 2 * IMAGES]),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    """``tr(W^T H W)`` is the sum of the squares of all outputs, if H is W's own."""
    fn, w, x = LAYOUTS[name]
    kept, _, _ = collected(bj.ternarize(fn), w, [(x,)])
    ((w, statistics),) = kept.seen
    np.testing.assert_allclose(statistics.moments, statistics.moments.swapaxes(1, 2), rtol=1e-5)
    w = np.asarray(w, np.float64)
    found = np.einsum("bin,bij,bjn->", w, statistics.moments, w)
    wanted = np.square(np.asarray(fn(LAYOUTS[name][1], x), np.float64)).sum()
    assert found == pytest.approx(wanted, rel=1e-5)


def step(x, w):
    return jnp.tanh(x @ w), None


STACKED = {
    "indexed": lambda s, x: functools.reduce(lambda x, i: jnp.tanh(x @ s[i]), range(3), x),
    "split": lambda s, x: functools.reduce(
        lambda x, w: jnp.tanh(x @ w.squeeze(0)), jnp.split(s, 3), x
    ),
    "scan": lambda s, x: jax.lax.scan(step, x, s)[0],
    "scan in jit": jax.jit(lambda s, x: jax.lax.scan(step, x, s)[0]),
    "scan by index": lambda s, x: jax.lax.scan(lambda x, i: step(x, s[i]), x, jnp.arange(3))[0],
    "fori_loop": lambda s, x: jax.lax.fori_loop(0, 3, lambda i, x: step(x, s[i])[0], x),
    "two scans": lambda s, x: jax.lax.scan(step, jax.lax.scan(step, x, s[:2])[0], s[2:])[0],
    "carried": lambda s, x: jax.lax.scan(
        lambda c, i: ((step(c[0], c[1][i])[0], c[1]), None), (x, s), jnp.arange(3)
    )[0][0],
    "remat": lambda s, x: jax.lax.scan(jax.checkpoint(step), x, s, unroll=3)[0],
    "remat of scan": jax.checkpoint(lambda s, x: jax.lax.scan(jax.jit(step), x, s)[0]),
    "jit": lambda s, x: functools.reduce(jax.jit(lambda x, w: step(x, w)[0]), s, x),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers(name):
    kept, packed, _ = collected(bj.ternarize(STACKED[name]), STACK, [(FLAT,)])
    inputs, h = [], ROWS
    for w in wide(*STACK):
        inputs.append(h)
        h = np.tanh(h @ w)
    check(kept.of(STACK), *inputs)
    assert packed.scale.shape == (3, 1, 1)


def test_layers_taken_one_by_one_from_a_stack():
    params = {"layers": normal(1, 3, 16, 16, scale=0.2)}

    def fn(params, x):
        for i in (2, 0):
            x = jnp.tanh(x @ params["layers"][i])
        return x

    kept, _, report = collected(bj.ternarize(fn), params, [X])
    w = np.asarray(params["layers"], np.float64)
    check(kept.of(params["layers"]), np.tanh(ROWS @ w[2]), ROWS[:0], ROWS)
    assert report.rows[0].tokens == 0  # of the slice that met nothing


def test_experts_of_a_vmap_with_and_without_inputs_of_their_own():
    params = {"up": normal(1, 4, 16, 8), "down": normal(2, 4, 8, 16)}

    def fn(params, x):
        h = jax.vmap(lambda w: jnp.tanh(x @ w))(params["up"])  # all meet x
        return jax.vmap(jnp.matmul)(h, params["down"])  # each meets its own

    kept, _, _ = collected(bj.ternarize(fn), params, [X.reshape(-1, 16)])
    up = np.asarray(params["up"], np.float64)
    check(kept.of(params["up"]), *[ROWS] * 4)
    check(kept.of(params["down"]), *np.tanh(ROWS @ up))


def test_rows_of_zeros_are_no_tokens():
    """An expert's empty places, in dense dispatch, and padding."""
    params = {"w": normal(1, 3, 16, 8)}
    x = np.array(normal(2, 3, 6, 16))
    x[0, 2:], x[2] = 0, 0
    kept, _, report = collected(
        bj.ternarize(lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"])), params, [x]
    )
    assert kept.of(params["w"]).tokens.tolist() == [2, 6, 0]
    assert report.rows[0].tokens == 0


def windows(x, size, stride, padding, dilation=1):
    """What a two-dimensional convolution contracts, (tokens, size * size * channels)."""
    x = np.pad(np.asarray(x, np.float64), [(0, 0), (padding,) * 2, (padding,) * 2, (0, 0)])
    reach = dilation * (size - 1) + 1
    steps = [range(0, n - reach + 1, stride) for n in x.shape[1:3]]
    found = [
        x[b, i : i + reach : dilation, j : j + reach : dilation].reshape(-1)
        for b in range(len(x))
        for i in steps[0]
        for j in steps[1]
    ]
    return np.array(found)


@pytest.mark.parametrize("needs", ["matrix", "diagonal"])
def test_windows_of_convolutions(needs):
    model = nn.Conv(4, (3, 3), strides=2, padding=1, use_bias=False)
    x = normal(0, 2, 7, 9, 3)
    params = model.init(jax.random.key(1), x)["params"]
    kept, packed, _ = collected(bj.linen.ternarize(model), params, [x], needs)
    check(kept.of(np.asarray(params["kernel"]).reshape(1, 27, 4)), windows(x, 3, 2, 1))
    assert packed["kernel"].shape == (3, 3, 3, 4)

    # Stored outputs first, as in torch: its codes are counted in that order.
    oihw = normal(3, 4, 3, 2, 2)

    def fn(params, x):
        numbers = ("NHWC", "OIHW", "NHWC")
        how = {"rhs_dilation": (2, 2), "dimension_numbers": numbers}
        return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", **how)

    kept, _, _ = collected(bj.ternarize(fn), {"w": oihw}, [x], needs)
    rows = windows(x, 2, 1, 0, dilation=2).reshape(-1, 2, 2, 3).transpose(0, 3, 1, 2)
    canonical = np.asarray(oihw).reshape(1, 4, 12).transpose(0, 2, 1)
    check(kept.of(canonical), rows.reshape(-1, 12))


def test_a_vmapped_convolution():
    params = {"w": normal(1, 2, 3, 3, 3, 4)}

    def conv(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers)

    x = normal(0, 2, 2, 5, 5, 3)
    kept, _, _ = collected(bj.ternarize(lambda p, x: jax.vmap(conv)(p["w"], x)), params, [x])
    kernel = np.asarray(params["w"]).reshape(2, 27, 4)
    check(kept.of(kernel), *(windows(x[i], 3, 1, 0) for i in range(2)))


def test_a_kernel_used_twice_sums_over_its_uses():
    params = {"w": normal(1, 16, 16, scale=0.2)}

    @jax.jit
    def block(w, x):
        return jnp.tanh(x @ w)

    kept, _, report = collected(
        bj.ternarize(lambda p, x: block(p["w"], block(p["w"], x))), params, [X]
    )
    w = np.asarray(params["w"], np.float64)
    check(kept.of(w[None]), np.concatenate([ROWS, np.tanh(ROWS @ w)]))
    assert report.rows[0].tokens == 70


def test_branches_and_calls_with_derivatives_of_their_own():
    params = {"a": normal(1, 16, 8), "b": normal(2, 16, 8)}

    @jax.custom_jvp
    def product(w, x):
        return x @ w

    product.defjvps(None, lambda t, y, w, x: t @ w)

    def fn(params, x, first):
        branches = (lambda x: product(params["a"], x), lambda x: x @ params["b"])
        return jax.lax.cond(first, *branches, x)

    ternary = bj.ternarize(fn)
    batches = [(X, jnp.array(True)), (2 * X, jnp.array(True)), (X[:2], jnp.array(False))]
    kept, _, report = collected(ternary, params, batches)
    a, b = wide(params["a"], params["b"])
    check(kept.of(a[None]), np.concatenate([ROWS, 2 * ROWS]))
    check(kept.of(b[None]), ROWS[:14])
    assert {row.path: row.tokens for row in report.rows} == {"a": 70, "b": 14}


def test_the_split_into_batches_does_not_matter():
    params = {"a": normal(1, 16, 8), "b": normal(2, 8, 4)}
    ternary = bj.ternarize(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
    x = normal(0, 60, 16)
    each = []
    for batches in ([x], [x[:7], x[7:30], x[30:]], (row[None] for row in x)):
        kept, _, report = collected(ternary, params, batches)
        each.append(kept.of(np.asarray(params["b"])[None]).moments)
        assert [row.tokens for row in report.rows] == [60, 60]
    for other in each[1:]:
        np.testing.assert_allclose(other, each[0], rtol=2e-6, atol=2e-6 * each[0].max())


def test_bfloat16_inputs_are_summed_in_float32():
    x = X.reshape(-1, 16).astype(jnp.bfloat16)
    params = {"w": normal(1, 16, 8).astype(jnp.bfloat16)}
    kept, packed, _ = collected(bj.ternarize(lambda p, x: x @ p["w"]), params, [x])
    check(kept.of(np.asarray(params["w"], np.float32)[None]), np.asarray(x, np.float64))
    assert packed["w"].dtype == jnp.bfloat16


@both_kinds
def test_a_mesh_of_eight_devices(kind):
    mesh = mesh_of(kind, (4, 2), ("data", "model"))
    spec = functools.partial(jax.sharding.NamedSharding, mesh)
    p = jax.sharding.PartitionSpec
    params = {"a": normal(1, 16, 32), "b": normal(2, 32, 16)}
    x = X[:4, :6].reshape(-1, 16)
    with jax.set_mesh(mesh):
        placed = {
            "a": jax.device_put(params["a"], spec(p(None, "model"))),
            "b": jax.device_put(params["b"], spec(p("model", None))),
        }
        given = jax.device_put(x, spec(p("data", None)))

        def fn(params, x):
            h = jnp.tanh(x @ params["a"])
            out = p("data", None)
            return jnp.einsum(
                "td,df->tf", h, params["b"], out_sharding=out if kind == "explicit" else None
            )

        ternary = bj.ternarize(fn)
        kept, packed, _ = collected(ternary, placed, [given])
        y = jax.jit(ternary)(packed, given)
    a, b = wide(params["a"], params["b"])
    check(kept.of(a[None]), wide(x)[0])
    check(kept.of(b[None]), np.tanh(wide(x)[0] @ a))
    alone, _ = calibrate(
        bj.ternarize(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]), params, [x], method=kept.method
    )
    assert packed["b"].codes.tolist() == alone["b"].codes.tolist()
    assert y.shape == (24, 16)


@pytest.mark.parametrize("axes", [("data",), ("data", "expert")])
def test_a_shard_map_counts_each_token_once(axes):
    """Tokens are split over one mesh axis, the experts over another, which sees all tokens."""
    mesh = mesh_of("auto", (4, 2), ("data", "expert"))
    p = jax.sharding.PartitionSpec
    params = {"shared": normal(1, 16, 16, scale=0.2), "experts": normal(2, 2, 16, 8)}
    experts = p("expert") if "expert" in axes else p()

    def local(shared, experts, x):
        h = jax.lax.cond(x.sum() < 1e9, lambda: jnp.tanh(x @ shared), lambda: x)
        return jax.vmap(lambda w: h @ w)(experts)

    def fn(params, x):
        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(p(), experts, p("data")),
            out_specs=p(*experts, "data") if "expert" in axes else p(None, "data"),
        )
        return run(params["shared"], params["experts"], x)

    x = X[:4, :6].reshape(-1, 16)
    kept, _, _ = collected(bj.ternarize(fn), params, [x])
    rows, shared = wide(x, params["shared"])
    check(kept.of(shared[None]), rows)
    check(kept.of(params["experts"]), *[np.tanh(rows @ shared)] * 2)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, scaled=False):
        x = nn.LayerNorm()(nn.Dense(24)(x))
        block = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = block(name="blocks")(x, None)
        return nn.Dense(5, name="head")(2 * x if scaled else x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.MultiHeadDotProductAttention(3)(x), None


def test_a_linen_model():
    model = Net()
    params = model.init(jax.random.key(1), X)["params"]
    ternary = bj.linen.ternarize(model, select=bj.exclude("head"))
    kept, packed, report = collected(ternary, params, [X[:2], X[2:]], call={"scaled": True})
    wanted, _ = bj.linen.pack(ternary, params, X)
    assert jax.tree.structure(packed) == jax.tree.structure(wanted)
    assert len(report.rows) == 5
    first = np.asarray(params["Dense_0"]["kernel"])
    check(kept.of(first[None]), ROWS)
    # What attention's output contracts, as the float model has it.
    _, state = model.apply(
        {"params": params},
        X,
        capture_intermediates=lambda m, _: isinstance(m, nn.LayerNorm),
        mutable=["intermediates"],
    )
    norm = state["intermediates"]["LayerNorm_0"]["__call__"][0]
    query = params["blocks"]["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    canonical = np.asarray(query).reshape(2, 24, 24)
    (found,) = [s for w, s in kept.seen if w.shape == (2, 24, 24) and (w == canonical).all()]
    rows = np.asarray(norm, np.float64).reshape(-1, 24)
    np.testing.assert_allclose(found.moments[0], rows.T @ rows, rtol=1e-5, atol=1e-4)
    assert ternary.apply({"params": packed}, X).shape == (5, 7, 5)


def test_linen_layers_of_this_package_meet_float_inputs():
    model = nn.Sequential([bj.linen.BitDense(24), jnp.tanh, bj.linen.BitDense(4)])
    params = model.init(jax.random.key(1), X)["params"]
    kept, packed, _ = collected(model, params, [X])
    first, second = (params[f"layers_{i}"] for i in (0, 2))
    w, b = wide(first["kernel"], first["bias"])
    check(kept.of(np.asarray(second["kernel"])[None]), np.tanh(ROWS @ w + b))
    assert model.apply({"params": packed}, X).shape == (5, 7, 4)


class Looped(nn.Module):
    """Layers of this package inside jitted, scanned and looping code."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                int8 = bj.linen.BitDense(16, weights=bj.Int8Config(), use_bias=False)
                return jnp.tanh(
                    bj.linen.BitDense(16, use_bias=False)(nn.jit(Int8)()(int8(x)))
                ), None

        x, _ = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(
            x, None
        )
        head = bj.linen.BitDense(4, weights=bj.Int8Config(), use_bias=False)
        y = head(x)
        return nn.while_loop(lambda m, c: c[0] < 2, lambda m, c: (c[0] + 1, m(x)), head, (0, y))[1]


class Int8(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bj.linen.BitDense(16, weights=bj.Int8Config(), use_bias=False)(x)


def test_kernels_that_are_not_probed_are_float_too():
    model = Looped()
    params = model.init(jax.random.key(1), X)["params"]
    kept, packed, report = collected(model, params, [X])
    step = params["ScanStep_0"]
    names = ("BitDense_0/kernel", "JitInt8_0/BitDense_0/kernel", "BitDense_1/kernel")
    assert sorted(row.method for row in report.rows) == ["custom", "int8", "int8", "int8"]
    inputs, h = [], ROWS
    for i in range(2):
        first, second, third = (
            wide(functools.reduce(lambda t, name: t[name], path.split("/"), step)[i])[0]
            for path in names
        )
        inputs.append(h @ first @ second)
        h = np.tanh(inputs[-1] @ third)
    check(kept.of(step["BitDense_1"]["kernel"]), *inputs)
    assert isinstance(packed["BitDense_0"]["kernel"], bj.PackedInt8)
    assert model.apply({"params": packed}, X).shape == (5, 7, 4)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 24, rngs=rngs)
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (24, 4)))

    def __call__(self, x, scale=1.0):
        return self.norm(jnp.tanh(scale * self.first(x))) @ self.table[...]


def test_an_nnx_model():
    model = Pair(nnx.Rngs(0))
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    w, b = wide(model.first.kernel[...], model.first.bias[...])
    bj.nnx.ternarize(model)
    kept, packed, report = collected(model, None, [X[:3], (X[3:],)], call={"scale": 2.0})
    check(kept.of(w[None]), ROWS)
    h = np.tanh(2 * (ROWS @ w + b)) / np.sqrt(1 + 1e-5)
    check(kept.of(np.asarray(before["table"])[None]), h)
    assert [row.path for row in report.rows] == ["first/kernel", "table"]
    assert packed(X).shape == (5, 7, 4)
    assert isinstance(packed.table.get_value(), bj.PackedTernary)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, before, after)  # the model is not changed


@pytest.mark.parametrize("needs", ["matrix", "diagonal"])
def test_tokens_that_count_the_same(needs):
    """Each row over its root mean square, whatever its size; rows of zeros are no tokens."""
    size = np.logspace(-18, 18, 35).reshape(5, 7, 1)  # squares of the largest would overflow
    x = jnp.asarray(np.asarray(X) * size, jnp.float32)
    w = normal(1, 16, 3)
    ternary = bj.ternarize(lambda p, x: x @ p["w"])
    batches = [x[:3], x[3:], 0 * x]
    kept, _, report = collected(ternary, {"w": w}, batches, needs=needs, equal_tokens=True)
    rows = ROWS / np.sqrt(np.square(ROWS).mean(-1, keepdims=True))
    check(kept.of(wide(w)[0][None]), rows)
    assert report.rows[0].tokens == 35


def test_equal_tokens_in_a_scan_and_of_slices_of_their_own():
    stack = normal(1, 3, 16, 16) / 4

    def network(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0]

    kept, _, _ = collected(bj.ternarize(network), stack, [X], equal_tokens=True)
    inputs, h = [], ROWS
    for w in wide(stack)[0]:
        inputs.append(h / np.sqrt(np.square(h).mean(-1, keepdims=True)))
        h = np.tanh(h @ w)
    check(kept.of(wide(stack)[0]), *inputs)


def test_codes_follow_all_tokens_where_one_is_large():
    """Tokens a thousand times as large decide the codes, unless all count the same."""
    x = np.array(normal(0, 64, 32), np.float32)
    x[:16] *= 1000
    w, config = normal(1, 32, 24), bj.TernaryConfig(granularity=16)
    ternary = bj.ternarize(lambda p, x: x @ p["w"], weights=config, activations=None)
    lost = {}
    for equal in (False, True):
        packed, _ = calibrate(ternary, {"w": w}, [jnp.asarray(x)], equal_tokens=equal)
        difference = x @ np.asarray(packed["w"].dequantize() - w, np.float64)
        lost[equal] = np.square(difference[16:]).sum()
    assert lost[True] < 0.8 * lost[False]


class Own(nnx.Module):
    """A layer of this package, a float one, and one that calls do not reach."""

    def __init__(self, rngs, head=nnx.Linear):
        self.first = bj.nnx.BitLinear(16, 24, rngs=rngs)
        self.head = head(24, 4, rngs=rngs)
        self.spare = bj.nnx.BitLinear(24, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.first(x)))

    def encode(self, x):
        return self.first(x)


@pytest.mark.parametrize("ternarised", [False, True])
def test_an_nnx_model_with_layers_of_this_package(ternarised):
    model = Own(nnx.Rngs(0))
    w, b = wide(model.first.kernel[...], model.first.bias[...])
    (v,) = wide(model.head.kernel[...])
    if ternarised:
        bj.nnx.ternarize(model, activations=None)
    kept, packed, report = collected(model, None, [X[:3], X[3:]])
    check(kept.of(w[None]), ROWS)
    expected = ["first/kernel"]
    if ternarised:
        check(kept.of(v[None]), np.tanh(ROWS @ w + b))
        expected.append("head/kernel")
    assert [row.path for row in report.rows] == expected
    assert report.unreached == ("spare/kernel",)
    assert packed(X).shape == (5, 7, 4)
    assert isinstance(packed.first.kernel.get_value(), bj.PackedTernary)
    assert isinstance(packed.spare.kernel.get_value(), jax.Array)
    kept, _, report = collected(model, None, [X], call={"method": "encode"})
    check(kept.of(w[None]), ROWS)
    assert [row.path for row in report.rows] == ["first/kernel"]


@pytest.mark.parametrize("scan", [False, True])
def test_a_decoder(scan):
    config = bj.models.DecoderConfig(
        vocabulary=32, width=16, hidden=32, depth=2, heads=2, scan=scan, embedding=bj.Int8Config()
    )
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0))
    batches = [jax.random.randint(key, (3, 8), 0, 32) for key in keys]
    packed, report = bj.convert.calibrate(model, None, batches, method="gptq")
    rows = {row.path: row for row in report.rows}
    assert len(rows) == (7 if scan else 14) + 1
    assert {row.tokens for path, row in rows.items() if path.startswith("layers")} == {48}
    assert rows["embed/embedding"].method == "int8"
    assert report.unreached == ()
    assert packed(batches[0])[0].shape == (3, 8, 32)
    assert len(packed.prepare().generate([1, 2], max_new_tokens=3)) == 3


class Stack(nnx.Module):
    """Layers stacked by vmap and run by scan, one of them used on both sides."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.Linear(16, 16, use_bias=False, rngs=rngs)

        self.layers = layers(rngs)
        self.outer = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.again = self.outer

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jnp.tanh(layer(x))

        return self.again(run(self.layers, self.outer(x)))

    def encode(self, x):
        return self.outer(x)


def test_a_stacked_nnx_model_with_a_shared_layer():
    model = Stack(nnx.Rngs(0))
    stack, outer = wide(model.layers.kernel[...], model.outer.kernel[...])
    bj.nnx.ternarize(model)
    kept, packed, report = collected(model, None, [X])
    inputs, h = [], ROWS @ outer
    for w in stack:
        inputs.append(h)
        h = np.tanh(h @ w)
    check(kept.of(stack), *inputs)
    check(kept.of(outer[None]), np.concatenate([ROWS, h]))
    assert len(report.rows) == 2
    assert packed(X).shape == X.shape
    kept, packed, report = collected(model, None, [X], call={"method": "encode"})
    check(kept.of(outer[None]), ROWS)
    assert [row.path for row in report.rows] == ["again/kernel"]
    assert report.unreached == ("layers/kernel",)


class Normed(nn.Module):
    def setup(self):
        self.embed, self.norm, self.out = nn.Embed(9, 16), nn.BatchNorm(), nn.Dense(4)

    def __call__(self, i, train=False):
        return self.out(self.hidden(i, train))

    def hidden(self, i, train=False):
        return self.norm(self.embed(i), use_running_average=not train)

    def scored(self, i):
        return self.out(self.hidden(i)) @ jnp.ones((4, 1))


def test_variables_methods_and_int8_tables_of_a_linen_model():
    model, index = Normed(), jnp.array([[1, 3, 3], [0, 8, 2]])
    variables = model.init(jax.random.key(0), index)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    ternary = bj.linen.ternarize(
        model, lambda path, _: bj.Int8Config() if path[0] == "embed" else True
    )
    for call in ({}, {"train": True}, {"method": "scored"}):
        kept, packed, report = collected(
            ternary, params, [index], call={"variables": stats, **call}
        )
        train = "train" in call
        how = {"method": "hidden", "mutable": ["batch_stats"]}
        h = model.apply(variables, index, train, **how)[0]
        (statistics,) = (one for _, one in kept.seen)
        rows = np.asarray(h, np.float64).reshape(-1, 16)
        np.testing.assert_allclose(statistics.moments[0], rows.T @ rows, rtol=1e-5, atol=1e-5)
        assert [row.method for row in report.rows] == ["int8", "custom"]
        assert isinstance(packed["embed"]["embedding"], bj.PackedInt8)
    call = {"variables": stats, "method": "hidden"}
    match = r"no call reaches the kernels out/kernel. Pass call=\{'method'"
    refused(ValueError, match, ternary, params, [index], method="survivors", call=call)


def two(granularity="tensor"):
    params = {"a": normal(1, 16, 8), "b": normal(2, 8, 4), "bias": jnp.ones(4)}
    config = bj.TernaryConfig(granularity=granularity)

    def fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"] * params["bias"].sum()

    return bj.ternarize(fn, weights=config), params


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_absmean_is_what_pack_gives(granularity):
    ternary, params = two(granularity)
    packed, report = calibrate(ternary, params, [X], method="absmean")
    wanted, _ = ternary.pack(params, X)
    assert jax.tree.structure(packed) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, packed, wanted)
    assert all(row.error == row.absmean_error for row in report.rows)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_what_comes_out_runs_saves_and_loads(granularity, tmp_path):
    ternary, params = two(granularity)
    packed, report = calibrate(ternary, params, [X], method="survivors")
    assert packed["bias"] is params["bias"]
    assert packed["a"].config == bj.TernaryConfig(granularity=granularity)
    bj.io.save(tmp_path / "m.bitnet.safetensors", packed)
    loaded = bj.io.load(tmp_path / "m.bitnet.safetensors")
    assert (ternary(loaded, X) == ternary(packed, X)).all()
    assert all(row.error < row.absmean_error for row in report.rows)
    floats = bj.unpack_params(packed, dequantize=True)
    wanted = np.square(np.asarray(params["a"] - floats["a"], np.float64)).sum()
    size = np.square(np.asarray(params["a"], np.float64)).sum()
    assert report.rows[0].error == pytest.approx(wanted / size, rel=1e-6)


def test_the_error_is_that_of_the_outputs():
    ternary, params = two()
    _, packed, report = collected(ternary, params, [X])
    w, lost = wide(params["a"], params["a"] - packed["a"].dequantize())
    wanted = np.square(ROWS @ lost).sum() / np.square(ROWS @ w).sum()
    assert report.rows[0].error == pytest.approx(wanted, rel=1e-5)
    plain = wide(params["a"] - bj.fake_quantize(params["a"]))[0]
    wanted = np.square(ROWS @ plain).sum() / np.square(ROWS @ w).sum()
    assert report.rows[0].absmean_error == pytest.approx(wanted, rel=1e-5)


def test_the_report_as_text_and_as_numbers():
    ternary, params = two()
    _, report = calibrate(ternary, params, [X], method={"*": Kept().method, "b": "survivors"})
    lines = str(report).splitlines()
    assert lines[0].split() == ["path", "method", "shape", "tokens", "error", "absmean", "notes"]
    assert lines[1].split()[:4] == ["a", "custom", "16x8", "35"]
    assert lines[1].endswith("kept")
    assert lines[2].split()[:3] == ["b", "survivors", "8x4"]
    rows = report.to_dict()["rows"]
    assert rows[0]["shape"] == [16, 8]
    assert rows[0]["notes"] == ["kept"]
    assert (rows[0]["tokens"], rows[1]["tokens"]) == (35, None)
    assert rows[0]["kind"] == "ternary"


def test_methods_by_function_and_int8_kernels():
    params = {"table": normal(1, 9, 16), "head": normal(2, 16, 4)}

    def fn(params, i):
        return params["table"][i] @ params["head"]

    ternary = bj.ternarize(
        fn, select=lambda path, _: bj.Int8Config() if path == ("table",) else True
    )
    index, asked, kept = jnp.array([1, 3, 3]), [], Kept()

    def method(path, leaf):
        asked.append((path, leaf.shape))
        return kept.method

    packed, report = calibrate(ternary, params, [index], method=method)
    assert asked == [(("head",), (16, 4))]
    check(kept.of(np.asarray(params["head"])[None]), np.asarray(params["table"])[np.asarray(index)])
    wanted, _ = ternary.pack(params, index)
    np.testing.assert_array_equal(packed["table"].codes, wanted["table"].codes)
    table, head = sorted(report.rows, key=lambda row: row.method, reverse=True)
    assert (table.method, table.tokens, head.tokens) == ("int8", None, 3)
    assert 0 < table.error < 1e-4


def test_methods_that_need_nothing_read_one_batch():
    ternary, params = two()
    read = []

    def batches():
        for i in range(5):
            read.append(i)
            yield X

    calibrate(ternary, params, batches(), method="survivors")
    assert read == [0]
    done = []
    calibrate(ternary, params, [X] * 4, method=Kept().method, progress=done.append)
    assert done == [0.125, 0.25, 0.375, 0.5, 0.75, 1.0]


def test_what_the_first_batch_does_not_reach_is_named():
    ternary, params = two()
    more = {**params, "other": SQUARE, "table": SQUARE, "bias": jnp.ones((2, 2))}
    fn = bj.ternarize(lambda p, x: ternary._spec.fn(p, x) + p["table"].sum())
    packed, report = calibrate(fn, more, [X], method="survivors")
    assert report.unreached == ("other",)
    assert str(report).endswith("left in float, the first batch does not reach: other")
    assert report.to_dict()["unreached"] == ["other"]
    assert packed["other"] is SQUARE


def test_params_of_another_position():
    ternary, params = two()
    swapped = bj.ternarize(lambda x, params: ternary._spec.fn(params, x), argnums=1)
    kept, _, _ = collected(swapped, params, [(X,)])
    check(kept.of(np.asarray(params["a"])[None]), ROWS)


class Batch(NamedTuple):
    x: jax.Array
    label: jax.Array


def test_a_named_tuple_is_one_argument():
    ternary = bj.ternarize(lambda params, batch: batch.x @ params["w"])
    kept, _, _ = collected(ternary, {"w": SQUARE}, [Batch(X, jnp.ones(5))])
    check(kept.of(SQUARE[None]), ROWS)


def test_one_program_for_batches_of_one_shape():
    traced = []

    def fn(params, x):
        traced.append(x.shape)
        return x @ params["w"]

    collected(bj.ternarize(fn), {"w": normal(1, 16, 8)}, [X[0]] * 4)
    once = len(traced)
    collected(bj.ternarize(fn), {"w": normal(1, 16, 8)}, [X[0]])
    assert len(traced) == 2 * once


def loop(params, x):
    step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"]))  # noqa: E731
    return jax.lax.while_loop(lambda c: c[0] < jnp.abs(x).max(), step, (0, x))[1]


def grouped(params, x):
    how = {"feature_group_count": 4, "dimension_numbers": ("NHC", "HIO", "NHC")}
    return jax.lax.conv_general_dilated(x, params["w"], (1,), "VALID", **how)


def unchecked(params, x):
    mesh = mesh_of("auto", (8,), ("d",))
    p = jax.sharding.PartitionSpec
    how = {"in_specs": (p(), p("d")), "out_specs": p("d"), "check_vma": False}
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, **how)(params["w"], x)


@pytest.mark.parametrize(
    ("fn", "shape", "x", "what"),
    [
        (loop, (16, 16), X, "`while` loop"),
        (grouped, (3, 4, 8), X, "4 feature groups"),
        (unchecked, (16, 8), normal(0, 8, 16), "check_vma=False"),
    ],
)
def test_where_nothing_can_be_collected(fn, shape, x, what):
    params = {"w": normal(1, *shape)}
    with pytest.raises(NotImplementedError, match=f"calibrate: the kernel at w .*{what}.*method="):
        collected(bj.ternarize(fn), params, [x])
    packed, _ = calibrate(bj.ternarize(fn), params, [x], method="survivors")
    assert isinstance(packed["w"], bj.PackedTernary)


def refused(error, match, *args, **how):
    with pytest.raises(error, match=match):
        calibrate(*args, **how)


def test_networks_that_are_none():
    ternary, params = two()
    refused(
        TypeError, "`ternary` must be a function from bj.ternarize", lambda p, x: x, params, [X]
    )
    refused(TypeError, "got a class", Net, params, [X])
    refused(TypeError, "`params` is None", ternary, None, [X])
    refused(TypeError, "`call` must be a dict", ternary, params, [X], call=["train"])
    refused(TypeError, "`progress` must be a function", ternary, params, [X], progress=1)
    refused(TypeError, "`equal_tokens` must be", ternary, params, [X], equal_tokens="yes")
    model = Pair(nnx.Rngs(0))
    bj.nnx.ternarize(model)
    refused(TypeError, "`params` must be None for an NNX model", model, params, [X])
    refused(
        ValueError,
        "Dense uses no kernel as ternary",
        nn.Dense(3),
        {"kernel": normal(1, 16, 3), "bias": jnp.ones(3)},
        [X],
        method="survivors",
    )
    refused(
        ValueError,
        "no method of a ternarised model",
        Pair(nnx.Rngs(0)),
        None,
        [X],
        method="survivors",
    )


def test_batches_that_are_none_or_do_not_fit():
    ternary, params = two()
    kept = Kept().method
    refused(ValueError, "`batches` is empty", ternary, params, [], method=kept)
    spent = iter([X])
    next(spent)
    refused(ValueError, "`batches` is empty", ternary, params, spent, method=kept)
    for wrong in (X, 3, {"x": X}, "text"):
        match = r"`batches` must be an iterable.*\[batch\]"
        refused(TypeError, match, ternary, params, wrong, method=kept)
    refused(ValueError, "run on batch 0: TypeError", ternary, params, [X[..., :3]], method=kept)
    refused(ValueError, "run on batch 2", ternary, params, [X, X, (X, X)], method=kept)
    refused(ValueError, "batch 1", ternary, params, [X, X.at[0].set(jnp.nan)], method=kept)
    infinite = [X, X.at[0].set(jnp.inf)]
    refused(
        ValueError, "the inputs of a have .* NaN or Inf", ternary, params, infinite, method=kept
    )
    later = bj.ternarize(lambda p, x: jnp.exp(999 * (x @ p["c"])) @ p["b"] @ p["a"])
    params = {"c": SQUARE, "b": SQUARE, "a": SQUARE}
    refused(ValueError, "the inputs of b have 256 NaN", later, params, [0 * X, X], method=kept)
    ternary, params = two()
    refused(ValueError, "no kernel met an input", ternary, params, [X[:0]], method=kept)
    refused(ValueError, "no kernel met an input", ternary, params, [0 * X[0]], method=kept)


def test_params_that_cannot_be_converted():
    ternary, params = two()
    packed, _ = ternary.pack(params, X)
    refused(TypeError, "a is packed already", ternary, packed, [X], method="survivors")
    adapted = bj.lora.attach(packed, bj.lora.init(packed, 2, key=jax.random.key(0)))
    refused(TypeError, "a is packed already, and has", ternary, adapted, [X], method="survivors")
    refused(TypeError, "a is packed already", ternary, bj.prepare(packed), [X], method="survivors")
    with pytest.raises(TypeError, match=r"`params` hold traced arrays \(a\)"):
        jax.jit(lambda p: calibrate(ternary, p, [X], method="survivors")[0])(params)
    bad = {**params, "b": params["b"].at[0, 0].set(jnp.nan)}
    refused(ValueError, "b has 1 NaN or Inf weights", ternary, bad, [X], method="survivors")
    nothing = bj.ternarize(lambda p, x: x @ p["a"], select=bj.only("nope"))
    refused(ValueError, "nope", nothing, params, [X], method="survivors")
    read = bj.ternarize(lambda p, x: (x @ p["a"]).sum() + (p["a"] ** 2).sum())
    refused(
        ValueError, "also reads the kernel at a as float", read, params, [X], method="survivors"
    )


def test_methods_that_are_none():
    ternary, params = two()
    refused(ValueError, "Did you mean 'survivors'", ternary, params, [X], method="survivor")
    refused(TypeError, "`method` must be one of", ternary, params, [X], method=3)
    refused(TypeError, "`method` must be one of", ternary, params, [X], method={"*": None})
    refused(TypeError, "patterns as keys", ternary, params, [X], method={1: "survivors"})
    refused(ValueError, "pattern 'c'", ternary, params, [X], method={"c": "survivors"})
    refused(ValueError, "matches b", ternary, params, [X], method={"a": "survivors"})
    refused(TypeError, "must be one of", ternary, params, [X], method=lambda path, leaf: None)
    needs = Kept("everything").method
    refused(ValueError, "`needs` must be one of", ternary, params, [X], method=needs)


@pytest.mark.parametrize(
    ("made", "error", "match"),
    [
        (None, TypeError, "Return a bj.convert.Quantized"),
        (
            Quantized(np.ones((1, 8, 16), np.int8), np.ones((1, 1, 1), np.float32), ()),
            ValueError,
            "returned `codes`",
        ),
        (Quantized(np.ones((1, 16, 8)), np.ones((1, 1, 1), np.float32), ()), ValueError, "`codes`"),
        (
            Quantized(np.ones((1, 16, 8), np.int8), np.ones((1, 1, 8), np.float32), ()),
            ValueError,
            "returned `scale`",
        ),
        (
            Quantized(np.full((1, 16, 8), 2, np.int8), np.ones((1, 1, 1), np.float32), ()),
            ValueError,
            "other than -1, 0 and 1",
        ),
        (
            Quantized(np.ones((1, 16, 8), np.int8), np.zeros((1, 1, 1), np.float32), ()),
            ValueError,
            "not finite and above 0",
        ),
    ],
)
def test_methods_that_return_something_else(made, error, match):
    method = Method("nothing", lambda w, statistics, config: made)
    ternary = bj.ternarize(lambda p, x: x @ p["w"])
    refused(error, match, ternary, {"w": normal(1, 16, 8)}, [X], method=method)


def test_a_kernel_over_other_axes_in_another_batch():
    params = {"w": normal(1, 16, 16)}
    ternary = bj.ternarize(lambda p, x, turned: x @ (p["w"].T if turned else p["w"]))
    batches = [(X, False), (X, True)]
    refused(
        ValueError,
        "over other axes in another call",
        ternary,
        params,
        batches,
        method=Kept().method,
    )


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_the_kernel_that_a_method_gets_is_no_copy_and_cannot_be_written(kind):
    seen = []

    def method(w, statistics, config):
        seen.append(w)
        with pytest.raises(ValueError, match="read-only"):
            w *= 2
        return bj.convert.Quantized(np.sign(w).astype(np.int8), np.ones((1, 1, 1), np.float32), ())

    params = {"w": kind(normal(0, 16, 8))}
    before = np.array(params["w"])
    ternary = bj.ternarize(lambda params, x: x @ params["w"])
    calibrate(ternary, params, [normal(1, 4, 16)], method=Method("nothing", method))
    np.testing.assert_array_equal(params["w"], before)
    np.testing.assert_array_equal(seen[0], before[None])
    assert np.shares_memory(seen[0], np.asarray(params["w"]))
