"""``bj.convert.smooth``: factors against NumPy in float64, the same function, and what is left."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_kernels import normal
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import both_kinds, mesh_of, put

import bitnet_jax as bj
from bitnet_jax.convert import SmoothedKernel, Smoothing, calibrate, smooth

# A leaf is rounded once more, by 2**-24 of itself; sums of 16 to 64 products of such leaves, and
# norms of them, stay within a few times that of their largest terms.
ROUNDING = 2e-6


def wide(array):
    return np.asarray(array, np.float64)


def rms(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def vector(v, like):
    return v.reshape((1,) * (like.ndim - 1) + v.shape)


def outliers(seed, *shape):
    """Inputs in which three channels are 30 times as large as the others."""
    size = jnp.ones(shape[-1]).at[jnp.array([1, 4, 9])].set(30)
    x = normal(seed, *shape)
    return x * vector(size, x)


def factors(x, *kernels, alpha=0.5):
    """Equation 4, from inputs (..., K) and kernels (K, N)."""
    x = np.abs(wide(x)).reshape(-1, x.shape[-1]).max(0)
    w = np.max([np.abs(wide(k)).max(1) for k in kernels], axis=0)
    ok = (x > 0) & (w > 0)
    return np.where(ok, np.where(ok, x, 1) ** alpha / np.where(ok, w, 1) ** (1 - alpha), 1)


def leaf_close(got, want):
    """To the rounding of float32: inputs are rounded once before they are compared."""
    np.testing.assert_allclose(wide(got), want, rtol=ROUNDING)


def same(got, want):
    """Outputs, to rounding of their largest."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(wide(g) - wide(w)).max() <= 20 * ROUNDING * np.abs(wide(w)).max()


def by_path(report):
    return {row.path: row for row in report.rows}


X = outliers(0, 6, 7, 16)
PARAMS = {
    "scale": 1 + 0.1 * normal(1, 16),
    "bias": 0.1 * normal(2, 16),
    "gate": normal(3, 16, 24, scale=0.3),
    "up": normal(4, 16, 24, scale=0.3),
    "down": normal(5, 24, 16, scale=0.3),
}


def fn(params, x):
    h = x * vector(params["scale"], x) + vector(params["bias"], x)
    return x + (jax.nn.silu(h @ params["gate"]) * (h @ params["up"])) @ params["down"]


def fn_inputs(params, x):
    return wide(x) * wide(params["scale"]) + wide(params["bias"])


TERNARY = bj.ternarize(fn)


@pytest.mark.parametrize("alpha", [0, 0.5, 0.8, 1])
def test_factors_and_leaves_are_those_of_the_equation(alpha):
    batches = [X, outliers(6, 3, 7, 16)]
    params, report = smooth(TERNARY, PARAMS, batches, alpha=alpha)
    h = np.concatenate([fn_inputs(PARAMS, x).reshape(-1, 16) for x in batches])
    s = factors(h, PARAMS["gate"], PARAMS["up"], alpha=alpha)
    rows = by_path(report)
    for name in ("gate", "up"):
        leaf_close(rows[name].factors, s)
        leaf_close(params[name], wide(PARAMS[name]) * s[:, None])
        assert rows[name].norm == ("bias", "scale")
        peaks = np.abs(h).max(0)
        assert rows[name].spread == pytest.approx(peaks.max() / np.median(peaks), rel=1e-5)
        after = peaks / s
        assert rows[name].smoothed == pytest.approx(after.max() / np.median(after), rel=1e-5)
    for name in ("scale", "bias"):
        leaf_close(params[name], wide(PARAMS[name]) / s)
    assert params["down"] is PARAMS["down"]
    assert rows["down"].why == "no norm with a scale comes right before it"
    assert rows["down"].factors is None
    same(fn(params, X), fn(PARAMS, X))
    assert report.alpha == alpha


def test_structure_dtypes_and_the_input_stay():
    before = jax.tree.map(np.array, PARAMS)
    params, _ = smooth(TERNARY, PARAMS, [X])
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    for old, new, kept in zip(*map(jax.tree.leaves, (PARAMS, params, before)), strict=True):
        assert (new.shape, new.dtype, type(new)) == (old.shape, old.dtype, type(old))
        np.testing.assert_array_equal(old, kept)


def test_factors_are_found_in_any_layout():
    """Casts, transposes, reshapes, slices of other axes, jit, remat and custom derivatives."""

    @jax.custom_jvp
    def twice(h):
        return h + h

    twice.defjvp(lambda primals, tangents: (twice(*primals), 2 * tangents[0]))

    @jax.jit
    def norm(params, x):
        h = (rms(x) * params["scale"].astype(x.dtype)[None, None]).astype(jnp.bfloat16)
        return twice(h).astype(jnp.float32)

    def net(params, x):
        h = jax.checkpoint(norm)(params, x)
        last = h[:, -1]
        flat = jnp.transpose(h.reshape(-1, 16)) / 2
        mean = h.sum(1) / 7
        heads = jnp.einsum("bk,khd->bhd", last, params["heads"])
        return (
            heads,
            jnp.einsum("nk,kt->tn", params["left"], flat),
            mean @ params["mean"],
            jnp.concatenate([-h[:2], jax.lax.stop_gradient(h[3:])]) @ params["parts"],
        )

    params = {
        "scale": 1 + 0.1 * normal(1, 16),
        "heads": normal(2, 16, 4, 3),
        "left": normal(3, 8, 16),
        "mean": normal(4, 16, 8),
        "parts": normal(5, 16, 8),
    }
    new, report = smooth(bj.ternarize(net), params, [X])
    assert all(row.norm == ("scale",) for row in report.rows)
    s = report.rows[0].factors
    leaf_close(new["left"], wide(params["left"]) * s)
    leaf_close(new["heads"], wide(params["heads"]) * s[:, None, None])
    leaf_close(new["scale"], wide(params["scale"]) / s)
    rows = np.max([np.abs(wide(params[n])).reshape(16, -1).max(1) for n in ("heads", "mean")], 0)
    rows = np.maximum(rows, np.abs(wide(params["parts"])).max(1))
    rows = np.maximum(rows, np.abs(wide(params["left"])).max(0))
    # The inputs are bfloat16 on the way, so s is read off one that is not: the flat ones.
    h = 2 * wide((rms(X) * vector(params["scale"], X)).astype(jnp.bfloat16))
    seen = [h[:, -1], h.reshape(-1, 16) / 2, h.sum(1) / 7, h[:2], h[3:]]
    peaks = np.max([np.abs(each).reshape(-1, 16).max(0) for each in seen], 0)
    np.testing.assert_allclose(s, np.sqrt(peaks / rows), rtol=1e-2)
    for got, want in zip(net(new, X), net(params, X), strict=True):
        assert np.abs(wide(got) - wide(want)).max() <= 2**-6 * np.abs(wide(want)).max()


def test_a_convolution_is_met_over_its_channels():
    def net(params, x):
        h = x * params["scale"].reshape(1, 1, 1, -1)
        return jax.lax.conv_general_dilated(
            h, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params = {"scale": 1 + 0.1 * normal(1, 16), "kernel": normal(2, 3, 3, 16, 8)}
    x = outliers(3, 2, 6, 6, 16)
    new, report = smooth(bj.ternarize(net), params, [x])
    h = wide(x) * wide(params["scale"])
    flat = np.moveaxis(wide(params["kernel"]), 2, 0).reshape(16, -1)
    s = factors(h, flat)
    leaf_close(report.rows[0].factors, s)
    leaf_close(new["kernel"], wide(params["kernel"]) * s[:, None])
    same(net(new, x), net(params, x))


def test_experts_share_the_factors_of_their_input():
    def net(params, x):
        return jnp.einsum("tk,ekn->etn", rms(x) * vector(params["scale"], x), params["experts"])

    params = {"scale": jnp.ones(16), "experts": normal(2, 3, 16, 8)}
    x = outliers(3, 20, 16)
    new, report = smooth(bj.ternarize(net), params, [x])
    s = factors(rms(x), *params["experts"])
    leaf_close(report.rows[0].factors, s)
    leaf_close(new["experts"], wide(params["experts"]) * s[:, None])
    same(net(new, x), net(params, x))


def test_a_norm_that_is_called_twice_serves_all_kernels_behind_it():
    def net(params, x):
        def norm(x):
            return rms(x) * vector(params["scale"], x)

        return norm(jnp.tanh(norm(x) @ params["a"])) @ params["b"]

    params = {"scale": jnp.ones(16), "a": normal(1, 16, 16), "b": normal(2, 16, 8)}
    new, report = smooth(bj.ternarize(net), params, [X])
    first = rms(X)
    second = rms(jnp.tanh(first @ params["a"])).reshape(-1, 16)
    seen = np.concatenate([first.reshape(-1, 16), second])
    s = factors(seen, params["a"], params["b"])
    np.testing.assert_allclose(report.rows[0].factors, s, rtol=1e-5)
    assert report.rows[1].factors is report.rows[0].factors
    same(net(new, X), net(params, X))


def test_dead_channels_keep_one():
    params = {**PARAMS, "bias": jnp.zeros(16)}
    params["gate"] = params["gate"].at[3].set(0)
    params["up"] = params["up"].at[3].set(0)
    x = X.at[..., 6].set(0)
    new, report = smooth(TERNARY, params, [x])
    s = by_path(report)["up"].factors
    assert s[3] == 1
    assert s[6] == 1
    assert (np.delete(s, [3, 6]) != 1).all()
    leaf_close(s, factors(fn_inputs(params, x), params["gate"], params["up"]))
    same(fn(new, x), fn(params, x))


class Block(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        h = self.norm(name="norm")(x)
        x = x + nn.Dense(16, name="mix")(h)
        h = self.norm(name="second")(x)
        return x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(32, name="up")(h)))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_linen(norm):
    model = bj.linen.ternarize(Block(norm))
    variables = model.init(jax.random.key(0), X)
    params = jax.tree.map(lambda v: v + 0.05 * jax.random.normal(jax.random.key(v.size), v.shape),
                          variables["params"])  # fmt: skip
    new, report = smooth(model, params, [X])
    rows = by_path(report)
    assert set(rows) == {"mix/kernel", "up/kernel", "down/kernel"}
    assert rows["mix/kernel"].norm[-1] == "norm/scale"
    assert rows["up/kernel"].norm[-1] == "second/scale"
    assert len(rows["up/kernel"].norm) == (2 if norm is nn.LayerNorm else 1)
    assert rows["down/kernel"].why
    h = norm().apply({"params": params["norm"]}, X)
    s = factors(h, params["mix"]["kernel"])
    leaf_close(rows["mix/kernel"].factors, s)
    leaf_close(new["mix"]["kernel"], wide(params["mix"]["kernel"]) * s[:, None])
    leaf_close(new["norm"]["scale"], wide(params["norm"]["scale"]) / s)
    plain = Block(norm)
    same(plain.apply({"params": new}, X), plain.apply({"params": params}, X))
    packed, _ = calibrate(model, new, [X], method="survivors")
    assert model.apply({"params": packed}, X).shape == X.shape


def test_linen_attention_shares_one_norm():
    model = nn.Sequential([nn.LayerNorm(), nn.MultiHeadDotProductAttention(num_heads=2)])
    params = model.init(jax.random.key(0), X)["params"]
    new, report = smooth(bj.linen.ternarize(model), params, [X])
    rows = by_path(report)
    one = [rows[f"layers_1/{name}/kernel"] for name in ("query", "key", "value")]
    assert all(row.norm == ("layers_0/bias", "layers_0/scale") for row in one)
    assert rows["layers_1/out/kernel"].why
    same(model.apply({"params": new}, X), model.apply({"params": params}, X))


def test_linen_batch_norm_with_its_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(nn.BatchNorm(use_running_average=True)(x))

    variables = Net().init(jax.random.key(0), X)
    stats = {"batch_stats": variables["batch_stats"]}
    call = {"variables": stats}
    new, report = smooth(bj.linen.ternarize(Net()), variables["params"], [X], call=call)
    assert report.rows[0].norm == ("BatchNorm_0/bias", "BatchNorm_0/scale")
    same(Net().apply({"params": new, **stats}, X), Net().apply(variables, X))


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.norm = norm(16, rngs=rngs)
        self.linear = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.linear(self.norm(x))))


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm])
def test_nnx(norm):
    model = Net(norm, nnx.Rngs(0))
    before = model(X)
    kernel, scale = wide(model.linear.kernel[...]), wide(model.norm.scale[...])
    s = factors(model.norm(X), model.linear.kernel[...])
    bj.nnx.ternarize(model)
    new, report = smooth(model, None, [X])
    assert new is not model
    leaf_close(model.linear.kernel[...], kernel)
    leaf_close(new.linear.kernel[...], kernel * s[:, None])
    leaf_close(new.norm.scale[...], scale / s)
    assert by_path(report)["head/kernel"].why == "no norm with a scale comes right before it"
    plain = Net(norm, nnx.Rngs(0))
    nnx.update(plain, nnx.state(new, nnx.Param))
    same(plain(X), before)
    packed, _ = calibrate(new, None, [X], method="survivors")
    assert packed(X).shape == (6, 7, 3)


def small_decoder(**how):
    config = bj.models.DecoderConfig(
        vocabulary=64, width=32, depth=2, heads=4, kv_heads=2, hidden=48, **how
    )
    return bj.models.Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("scan", [False, True])
def test_the_decoder(scan):
    model = small_decoder(weights=bj.B158, embedding=bj.Int8Config(), scan=scan)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 64)
    plain = small_decoder(weights=None, embedding=None, scan=scan)
    nnx.update(plain, nnx.state(model, nnx.Param))
    want = plain(tokens)
    new, report = smooth(model, None, [tokens])
    rows = by_path(report)
    at = "layers" if scan else "layers/1"
    for name in ("query", "key", "value"):
        row = rows[f"{at}/attention/{name}/linear/kernel"]
        assert row.norm == (f"{at}/attention_norm/scale",)
        assert row.factors.shape == ((2, 32) if scan else (32,))
    for name in ("gate", "up"):
        assert rows[f"{at}/mlp/{name}/linear/kernel"].norm == (f"{at}/mlp_norm/scale",)
    # The sub-norms of this architecture stand right before these.
    assert rows[f"{at}/mlp/down/linear/kernel"].norm == (f"{at}/mlp/sub_norm/scale",)
    assert rows[f"{at}/attention/out/linear/kernel"].norm == (f"{at}/attention/sub_norm/scale",)
    assert rows["embed/embedding"].why.startswith("it belongs to a module that is ternarised apart")
    nnx.update(plain, nnx.state(new, nnx.Param))
    same(plain(tokens), want)
    packed, _ = calibrate(new, None, [tokens], method="survivors")
    assert packed(tokens)[0].shape == want[0].shape


def why_not(ternary, params):
    """Why the kernels of a function are left, all of them."""
    with pytest.raises(ValueError, match=r"^smooth: nothing can be smoothed\. ") as caught:
        smooth(ternary, params, [X])
    return str(caught.value)


ONE = {"scale": jnp.ones(16), "w": normal(1, 16, 8), "v": normal(2, 16, 8)}


def scaled(params, x):
    return rms(x) * vector(params["scale"], x)


REFUSED = {
    "a residual": (
        lambda p, x: (h := scaled(p, x), h + jnp.pad(h @ p["w"], ((0, 0), (0, 0), (0, 8))))[1],
        "w: it is not all that reads scale or what is scaled by it: `add` does, too",
    ),
    "a result": (
        lambda p, x: (h := scaled(p, x), (h, h @ p["w"]))[1],
        "`return` does, too",
    ),
    "a penalty on the scale": (
        lambda p, x: (scaled(p, x) @ p["w"], jnp.square(p["scale"]).sum()),
        "`square` does, too",
    ),
    "a nonlinearity": (
        lambda p, x: jnp.tanh(scaled(p, x)) @ p["w"],
        "w: `tanh` lies between scale and it",
    ),
    "a nonlinearity after a bias": (
        lambda p, x: jnp.tanh(scaled(p, x) + vector(p["b"], x)) @ p["w"],
        "w: `tanh` lies between b and it",
    ),
    "a float kernel": (
        lambda p, x: scaled(p, x) @ p["w"] + scaled(p, x) @ p["v"],
        "w: it shares scale with v, which stays in float",
    ),
    "a tied kernel": (
        lambda p, x: scaled(p, x) @ p["w"] + x @ p["w"],
        "w: it is multiplied in 2 places",
    ),
    "a kernel that is returned": (
        lambda p, x: (scaled(p, x) @ p["w"], p["w"]),
        "w: it is also read as float",
    ),
    "no scale": (
        lambda p, x: rms(x) @ p["w"],
        "w: no norm with a scale comes right before it",
    ),
    "an offset of the scale": (
        lambda p, x: rms(x) * (1 + vector(p["scale"], x)) @ p["w"],
        "w: no norm with a scale comes right before it",
    ),
    "a bias without a scale": (
        lambda p, x: (rms(x) + vector(p["scale"], x)) @ p["w"],
        "w: no norm with a scale comes right before it",
    ),
    "two scales": (
        lambda p, x: scaled(p, x) * vector(p["scale"], x) @ p["w"],
        "w: `mul` lies between scale and it",
    ),
    "a mean over the channels": (
        lambda p, x: (scaled(p, x) - scaled(p, x).mean(-1, keepdims=True)) @ p["w"],
        "w: `reduce_sum` lies between scale and it",
    ),
    "a scan": (
        lambda p, x: jax.lax.scan(lambda c, x: (c, scaled(p, x) @ p["w"]), 0, x)[1],
        "w: it is multiplied in a `scan`, where norms are not followed",
    ),
    "a branch": (
        lambda p, x: jax.lax.cond(
            x.sum() > 0, lambda h: h @ p["w"], lambda h: -(h @ p["w"]), scaled(p, x)
        ),
        "w: it is multiplied in a `cond`, where norms are not followed",
    ),
    "a part of the channels": (
        lambda p, x: jnp.roll(scaled(p, x), 1, -1) @ p["w"],
        "lies between scale and it",
    ),
    "a split axis": (
        lambda p, x: jnp.einsum(
            "btij,ijn->btn", scaled(p, x).reshape(6, 7, 4, 4), p["w"].reshape(4, 4, 8)
        ),
        "w: `reshape` lies between scale and it",
    ),
    "rows that are filled": (
        lambda p, x: (
            jnp.take(scaled(p, x), jnp.array([1, 9]), axis=1, mode="fill", fill_value=1) @ p["w"]
        ),
        "w: `gather` lies between scale and it",
    ),
    "a sorted axis": (
        lambda p, x: jnp.sort(scaled(p, x), axis=-1) @ p["w"],
        "w: `sort` lies between scale and it",
    ),
    "a barrier and a residual": (
        lambda p, x: (h := jax.lax.optimization_barrier(scaled(p, x)), h[..., :8] + h @ p["w"])[1],
        "w: it is not all that reads scale or what is scaled by it: `slice` does, too",
    ),
    "a callback": (
        lambda p, x: (
            jax.pure_callback(lambda h: h, jax.ShapeDtypeStruct(x.shape, x.dtype), scaled(p, x))
            @ p["w"]
        ),
        "w: `pure_callback` lies between scale and it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_proved_is_left(case):
    net, why = REFUSED[case]
    used = {"scale": ONE["scale"], "w": ONE["w"]}
    used |= {"b": jnp.ones(16)} if "after a bias" in case else {}
    used |= {"v": ONE["v"]} if "float kernel" in case else {}
    assert why in why_not(bj.ternarize(net, select=bj.only("w")), used)


L = 3
STACK = {
    "scale": 1 + 0.1 * normal(1, L, 16),
    "bias": 0.1 * normal(2, L, 16),
    "w": normal(3, L, 16, 24, scale=0.2),
    "v": normal(4, L, 24, 16, scale=0.2),
}


def scanned(params, x, step):
    """Layers over stacked parameters."""
    return jax.lax.scan(lambda x, p: (step(p, x), None), x, params)[0]


def layer(p, x):
    h = rms(x) * vector(p["scale"], x) + vector(p["bias"], x)
    return x + jnp.tanh(h @ p["w"]) @ p["v"]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_a_scan_has_factors_for_each_step(wrap):
    def net(params, x):
        return scanned(params, x, wrap(layer))

    batches = [X, outliers(9, 2, 7, 16)]
    new, report = smooth(bj.ternarize(net), STACK, batches)
    every = [[] for _ in range(L)]
    for x in batches:
        for i in range(L):
            p = {name: v[i] for name, v in STACK.items()}
            every[i].append((wide(rms(x)) * wide(p["scale"]) + wide(p["bias"])).reshape(-1, 16))
            x = layer(p, x)
    s = np.stack([factors(np.concatenate(every[i]), STACK["w"][i]) for i in range(L)])
    row = by_path(report)["w"]
    assert row.norm == ("bias", "scale")
    np.testing.assert_allclose(row.factors, s, rtol=1e-5)
    np.testing.assert_allclose(new["scale"], wide(STACK["scale"]) / s, rtol=1e-5)
    np.testing.assert_allclose(new["w"], wide(STACK["w"]) * s[:, :, None], rtol=1e-5)
    peaks = np.stack([np.abs(np.concatenate(h)).max(0) for h in every])
    assert row.spread == pytest.approx((peaks.max(1) / np.median(peaks, 1)).max(), rel=1e-5)
    same(net(new, X), net(STACK, X))
    packed, _ = calibrate(bj.ternarize(net), new, batches, method="survivors")
    assert packed["w"].shape == (L, 16, 24)


SCANS = {
    "the steps' results": (
        lambda p, x: jax.lax.scan(lambda x, p: (layer(p, x), rms(x) * vector(p["scale"], x)), x, p),
        "`scan` does, too",
    ),
    "what is carried": (
        lambda p, x: scanned(p, x, lambda p, x: (h := scaled(p, x), h + layer(p, x))[1]),
        "`add` does, too",
    ),
    "a penalty": (
        lambda p, x: (scanned(p, x, layer), jnp.square(p["scale"]).sum()),
        "`square` does, too",
    ),
    "one that is returned": (lambda p, x: (scanned(p, x, layer), p["bias"]), "`return` does, too"),
    "the kernel of one step": (
        lambda p, x: scanned({"scale": p["scale"]}, x, lambda q, x: x + scaled(q, x) @ p["u"][1]),
        "u: it is multiplied in a `scan`, where norms are not followed",
    ),
    "the kernel of one step, stepped through too": (
        lambda p, x: scanned(
            {"scale": p["scale"], "u": p["u"]}, x, lambda q, x: x + scaled(q, x) @ p["u"][1]
        ),
        "u: it is multiplied in a `scan`, where norms are not followed",
    ),
    "steps in another order": (
        lambda p, x: scanned({**p, "scale": p["scale"][::-1]}, x, layer),
        "w: no norm with a scale comes right before it",
    ),
    "a sliced scale": (
        lambda p, x: scanned(p, x, layer) * vector(p["scale"][0], x),
        "does, too",
    ),
    "a scan in a loop": (
        lambda p, x: jax.lax.fori_loop(0, 2, lambda i, x: scanned(p, x, layer), x),
        "w: it is multiplied in a `scan`, where norms are not followed",
    ),
    "two scans": (
        lambda p, x: scanned(p, scanned(p, x, layer), layer),
        "w: it is multiplied in 2 places",
    ),
}


@pytest.mark.parametrize("case", SCANS)
def test_what_a_scan_does_besides_is_seen(case):
    net, why = SCANS[case]
    params = {**STACK, "u": normal(5, L, 16, 16)} if "kernel" in case else STACK
    ternary = bj.ternarize(net, select=lambda path, _: path == (why[0] if why[0] == "u" else "w",))
    assert why in why_not(ternary, params)


def test_one_refusal_leaves_the_other_norms():
    def net(params, x):
        h = rms(x) * vector(params["first"], x)
        x = h + jnp.pad(h @ params["a"], ((0, 0), (0, 0), (0, 8)))
        return rms(x) * vector(params["second"], x) @ params["b"]

    params = {"first": jnp.ones(16), "second": jnp.ones(16), "a": ONE["w"], "b": ONE["v"]}
    new, report = smooth(bj.ternarize(net), params, [X])
    rows = by_path(report)
    assert "`add` does, too" in rows["a"].why
    assert rows["b"].norm == ("second",)
    assert new["first"] is params["first"]
    same(net(new, X), net(params, X))


def test_a_norm_inside_the_quantised_layer_is_left():
    def net(params, x):
        return scaled(params, x) @ params["w"]

    params = {"scale": ONE["scale"], "w": ONE["w"]}
    why = why_not(bj.ternarize(net, norm=True), params)
    assert "w: it is quantised behind a norm of its own layer (norm=True)" in why


def test_a_kernel_with_one_output_is_no_vector():
    def net(params, x):
        return scaled(params, x) @ params["w"]

    params = {"scale": jnp.ones(16), "w": normal(1, 16, 1)}
    new, report = smooth(bj.ternarize(net), params, [X])
    leaf_close(report.rows[0].factors, factors(rms(X), params["w"]))
    same(net(new, X), net(params, X))


def test_a_batch_that_uses_a_norm_in_another_way():
    def net(params, x, also):
        h = scaled(params, x)
        y = h @ params["w"] + rms(x) * vector(params["other"], x) @ params["v"]
        return y + h[..., :8] if also else y

    params = {**ONE, "other": jnp.ones(16)}
    new, report = smooth(bj.ternarize(net), params, [(X, False), (X, True)])
    rows = by_path(report)
    assert rows["w"].why.startswith("in batch 1, it is not all that reads scale")
    assert new["w"] is params["w"]
    assert rows["v"].norm == ("other",)
    only = bj.ternarize(net, select=bj.exclude("v"))
    with pytest.raises(ValueError, match=r"smooth: nothing can be smoothed\. w: in batch 1, "):
        smooth(only, params, [(X, False), (X, True)])


def test_another_structure_of_a_linen_call_is_looked_at():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, also=False):
            h = nn.RMSNorm(name="norm")(x)
            y = nn.Dense(16, name="dense")(h)
            return y + h if also else y

    params = Net().init(jax.random.key(0), X)["params"]
    model = bj.linen.ternarize(Net())
    smooth(model, params, [X, X])
    with pytest.raises(ValueError, match="dense/kernel: in batch 1, it is not all that reads norm"):
        smooth(model, params, [X, (X, True)])


@pytest.mark.parametrize("alpha", [-0.1, 1.01, math.nan, math.inf])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"smooth: `alpha` must be from 0 to 1, got"):
        smooth(TERNARY, PARAMS, [X], alpha=alpha)


@pytest.mark.parametrize("alpha", ["0.5", None, True, jnp.ones(2)])
def test_alpha_of_another_kind(alpha):
    with pytest.raises(TypeError, match=r"smooth: `alpha` must be a number from 0 to 1, got"):
        smooth(TERNARY, PARAMS, [X], alpha=alpha)


def test_no_batches():
    with pytest.raises(ValueError, match="smooth: `batches` is empty"):
        smooth(TERNARY, PARAMS, iter([]))
    with pytest.raises(TypeError, match="smooth: `batches` must be an iterable of batches"):
        smooth(TERNARY, PARAMS, X)


def test_what_is_no_ternary_network():
    with pytest.raises(TypeError, match=r"smooth: `ternary` must be a function from bj\.ternarize"):
        smooth(fn, PARAMS, [X])
    with pytest.raises(TypeError, match="smooth: `params` is None"):
        smooth(TERNARY, None, [X])
    with pytest.raises(TypeError, match="smooth: `progress` must be a function"):
        smooth(TERNARY, PARAMS, [X], progress=1)
    packed, _ = TERNARY.pack(PARAMS, X)
    with pytest.raises(TypeError, match=r"smooth: .* packed already"):
        smooth(TERNARY, packed, [X])
    with pytest.raises(TypeError, match="smooth: `params` hold traced arrays"):
        jax.jit(lambda params: smooth(TERNARY, params, [X])[0])(PARAMS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite(bad):
    with pytest.raises(ValueError, match=r"smooth: the inputs of gate are .* in batch 1\. Look"):
        smooth(TERNARY, PARAMS, [X, X.at[0, 0, 2].set(bad)])


@pytest.mark.parametrize("name", ["scale", "bias", "gate"])
def test_parameters_that_are_not_finite(name):
    params = {**PARAMS, name: PARAMS[name].at[1].set(np.nan)}
    with pytest.raises(ValueError, match=f"smooth: {name} has [0-9]+ NaN or Inf weights"):
        smooth(TERNARY, params, [X])


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="smooth: the network does not run on batch 1: TypeError"):
        smooth(TERNARY, PARAMS, [X, X[..., :8]])


def test_no_tokens():
    params = {**PARAMS, "bias": jnp.zeros(16)}
    with pytest.raises(ValueError, match="smooth: no kernel met an input in `batches`"):
        smooth(TERNARY, params, [jnp.zeros_like(X)])
    with pytest.raises(ValueError, match="smooth: no kernel met an input in `batches`"):
        smooth(TERNARY, PARAMS, [X[:0]])


def test_a_norm_that_saw_no_token_is_left():
    def net(params, x, y):
        a = rms(x) * vector(params["first"], x) @ params["a"]
        return a + rms(y) * vector(params["second"], y) @ params["b"]

    params = {"first": jnp.ones(16), "second": jnp.ones(16), "a": ONE["w"], "b": ONE["v"]}
    new, report = smooth(bj.ternarize(net), params, [(X, 0 * X)])
    rows = by_path(report)
    assert rows["a"].norm == ("first",)
    assert rows["b"].why == "its inputs are 0 in all batches"
    assert new["second"] is params["second"]
    same(net(new, X, X), net(params, X, X))


@pytest.mark.standard_promotion
def test_a_dtype_that_is_too_narrow():
    params = {**PARAMS, "gate": jnp.float16(PARAMS["gate"]), "up": jnp.float16(PARAMS["up"])}
    with pytest.raises(
        ValueError, match=r"smooth: .* numbers of gate would be too large .*float16"
    ):
        smooth(TERNARY, params, [1e10 * X], alpha=1)
    new, _ = smooth(TERNARY, params, [X])
    assert new["gate"].dtype == jnp.float16


def test_numpy_parameters_stay_numpy():
    params = {name: np.asarray(v) for name, v in PARAMS.items()}
    new, _ = smooth(TERNARY, params, [np.asarray(X)])
    assert all(type(v) is np.ndarray for v in new.values())
    for name, want in smooth(TERNARY, PARAMS, [X])[0].items():
        np.testing.assert_array_equal(new[name], want)


@both_kinds
def test_sharded_parameters_stay_where_they_are(kind):
    def net(params, x):
        h = x * vector(params["scale"], x)
        return h @ params["gate"] + h @ params["up"]

    mesh = mesh_of(kind)
    specs = {"scale": [None], "gate": [None, "model"], "up": [None, "model"]}
    ternary = bj.ternarize(net)
    plain = {name: PARAMS[name] for name in specs}
    with jax.set_mesh(mesh):
        params = {name: put(mesh, plain[name], P(*spec)) for name, spec in specs.items()}
        new, _ = smooth(ternary, params, [put(mesh, X, P("data", None, None))])
    for name, want in smooth(ternary, plain, [X])[0].items():
        assert new[name].sharding == params[name].sharding
        leaf_close(new[name], wide(want))


def test_the_report():
    calls = []
    _, report = smooth(TERNARY, PARAMS, [X, X], progress=calls.append)
    assert isinstance(report, Smoothing)
    assert all(isinstance(row, SmoothedKernel) for row in report.rows)
    assert [row.path for row in report.rows] == ["down", "gate", "up"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["alpha"] == 0.5
    assert data["rows"][1]["norm"] == ["bias", "scale"]
    np.testing.assert_array_equal(data["rows"][1]["factors"], report.rows[1].factors)
    lines = str(report).splitlines()
    assert lines[0].split() == ["path", "shape", "norm", "spread", "smoothed", "why", "not"]
    assert lines[1].endswith("no norm with a scale comes right before it")
    assert calls == sorted(calls)
    assert calls[-1] == 1


def test_explain_says_which_norms():
    norms = TERNARY.explain(PARAMS, X).norms
    (norm,) = norms.found
    assert norm.vectors == (("bias",), ("scale",))
    assert norm.kernels == ((("gate",), 0), (("up",), 0))
    assert norms.refused == ((("down",), "no norm with a scale comes right before it"),)
