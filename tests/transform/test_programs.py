"""Plain JAX: what a kernel goes through on its way to its product, and the code that it enters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from oracles import assert_same_bits

import bitnet_jax as bj

ternarize = bj.ternarize
pytestmark = pytest.mark.optimised

X = jax.random.normal(jax.random.key(0), (6, 16))
W = jax.random.normal(jax.random.key(1), (16, 16))
STACK = jax.random.normal(jax.random.key(2), (3, 16, 16))
INT8 = bj.Int8Config()
dot = bj.ternary_dot


def check(fn, wanted, params, *args, packs=True):
    """A function, ternary, gives what its hand-written form gives, its gradients too."""
    ternary = ternarize(fn)

    def both(function):
        def loss(params):
            y = function(params, *args)
            return jnp.sum(jnp.cos(y)), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    ours, theirs = both(ternary), both(wanted)
    jax.tree.map(assert_same_bits, ours, theirs)
    if packs:
        packed, _ = ternary.pack(params, *args)
        assert_same_bits(jax.jit(ternary)(packed, *args), ours[0][1])
        assert_same_bits(jax.jit(ternary)(bj.prepare(packed), *args), ours[0][1])
    return ternary


LAYOUTS = {
    "cast": (lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), lambda w, x: dot(x, w)),
    "transposed": (
        lambda w, x: x @ w.T,
        lambda w, x: dot(x, w, contracting_axes=(1,)),
    ),
    "on the left": (
        lambda w, x: (w @ x.T).T,
        lambda w, x: dot(x, w, contracting_axes=(1,)),
    ),
    "split heads": (
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(16, 4, 4)),
        lambda w, x: dot(x, w).reshape(6, 4, 4),
    ),
    "merged heads": (
        lambda w, x: jnp.einsum("bhk,hkd->bd", x.reshape(6, 4, 4), w.reshape(4, 4, 16)),
        lambda w, x: dot(x, w),
    ),
    "merged heads, other order": (
        lambda w, x: jnp.einsum(
            "bkh,khd->bd", x.reshape(6, 4, 4), jnp.swapaxes(w.reshape(4, 4, 16), 0, 1)
        ),
        lambda w, x: dot(jnp.swapaxes(x.reshape(6, 4, 4), 1, 2).reshape(6, 16), w),
    ),
    "unused axis": (lambda w, x: x @ w[None, :, None, :].squeeze((0, 2)), lambda w, x: dot(x, w)),
    "broadcast": (
        lambda w, x: jnp.einsum("bk,bkn->bn", x, jnp.broadcast_to(w, (6, 16, 16))),
        lambda w, x: dot(x, w),
    ),
    "named": (
        lambda w, x: x @ checkpoint_name(lax.optimization_barrier(w), "w"),
        lambda w, x: dot(x, w),
    ),
    "twice": (lambda w, x: jnp.tanh(x @ w) @ w, lambda w, x: dot(jnp.tanh(dot(x, w)), w)),
}


@cases("name", list(LAYOUTS), core=["transposed", "split heads"])
def test_layouts(name):
    fn, wanted = LAYOUTS[name]
    check(fn, wanted, W, X)


def test_stop_gradient_stays():
    ternary = ternarize(lambda w, x: x @ lax.stop_gradient(w).T)
    assert_same_bits(ternary(W, X), dot(X, W, contracting_axes=(1,)))
    assert not jax.grad(lambda w: ternary(w, X).sum())(W).any()


def chain(x, ws):
    for w in ws:
        x = jnp.tanh(dot(x, w))
    return x


STACKED = {
    "indexed": lambda s, x: functools.reduce(lambda x, i: jnp.tanh(x @ s[i]), range(3), x),
    "unrolled": lambda s, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), s, x),
    "split": lambda s, x: functools.reduce(
        lambda x, w: jnp.tanh(x @ w.squeeze(0)), jnp.split(s, 3), x
    ),
    "scan": lambda s, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, s)[0],
    "scan by index": lambda s, x: lax.scan(
        lambda x, i: (jnp.tanh(x @ s[i]), None), x, jnp.arange(3)
    )[0],
    "two scans": lambda s, x: lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None),
        lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, s[:2])[0],
        s[2:],
    )[0],
    "carried": lambda s, x: lax.scan(
        lambda c, i: ((jnp.tanh(c[0] @ c[1][i]), c[1]), None), (x, s), jnp.arange(3)
    )[0][0],
    "remat": lambda s, x: lax.scan(
        jax.checkpoint(
            lambda x, w: (jnp.tanh(x @ w), None),
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        ),
        x,
        s,
        unroll=3,
    )[0],
    "jit": lambda s, x: functools.reduce(jax.jit(lambda x, w: jnp.tanh(x @ w)), s, x),
}


@cases("name", list(STACKED), core=["indexed", "carried", "remat"])
def test_stacked(name):
    check(STACKED[name], lambda s, x: chain(x, s), STACK, X)


@cases("axis", [1, 2], core=[1])
def test_stacked_along_any_axis(axis):
    def fn(s, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(s, axis, 0))[0]

    def wanted(s, x):
        return chain(x, jnp.moveaxis(s, axis, 0))

    ternary = check(fn, wanted, jnp.moveaxis(STACK, 0, axis), X, packs=False)
    with pytest.raises(ValueError, match="must be the leading axes"):
        ternary.pack(jnp.moveaxis(STACK, 0, axis), X)


def test_loops_of_unknown_length_do_not_differentiate():
    def fn(w, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[
            1
        ]

    def fori(w, x):
        return lax.fori_loop(0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x, w))[0]

    wanted = chain(X, [W] * 3)
    for function in (fn, fori):
        ternary = ternarize(function)
        assert_same_bits(jax.jit(ternary)(W, X), wanted)
        assert_same_bits(jax.jit(ternary)(ternary.pack(W, X)[0], X), wanted)


@cases("index", [0, 1, 2], core=[1])
def test_branches(index):
    branches = [lambda w, x: x @ w[0], lambda w, x: x @ w[1], lambda w, x: x]

    def fn(w, x, i):
        return lax.switch(i, branches, w, x)

    def wanted(w, x, i):
        return dot(x, w[i]) if i < 2 else x

    ternary = check(fn, wanted, STACK, X, index)
    assert_same_bits(jax.jit(ternary)(STACK, X, jnp.int32(index)), wanted(STACK, X, index))

    def platform(w, x):
        return lax.platform_dependent(w, x, cpu=lambda w, x: x @ w, default=lambda w, x: x)

    assert_same_bits(ternarize(platform)(W, X), dot(X, W))


def once(w, x):
    return w, x @ w


HANDED_ON = {
    "step by step": (
        lambda w, x: lax.scan(lambda x, w: jax.checkpoint(once)(w, x)[::-1], x, w),
        lambda y, w: (y, w),
        lambda ws, x: functools.reduce(dot, ws, x),
    ),
    "every step of a step": (
        lambda w, x: lax.scan(
            lambda x, w: lax.scan(lambda x, w: jax.checkpoint(once)(w, x)[::-1], x, w), x, w[None]
        ),
        lambda y, w: (y, w[0]),
        lambda ws, x: functools.reduce(dot, ws, x),
    ),
    "carried": (
        lambda w, x: lax.scan(lambda c, _: (jax.checkpoint(once)(*c), None), (w[0], x), length=2)[
            0
        ],
        lambda w, y: (y, w),
        lambda ws, x: lax.scan(lambda x, _: (dot(x, ws[0]), None), x, length=2)[0],
    ),
    "by branches": (
        lambda w, x: lax.cond(x[0, 0] > 9, once, lambda w, x: (w, 2 * x @ w), w[0], x),
        lambda w, y: (y, w),
        lambda ws, x: dot(2 * x, ws[0]),
    ),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_kernels_that_are_handed_on(name):
    """Behind a loop or a branch that hands it on unchanged, a kernel is what it was."""
    run, ends, wanted = HANDED_ON[name]

    def fn(w, x):
        y, w = ends(*run(w, x))
        return y @ (w[0] if w.ndim == 3 else w)

    def by_hand(w, x):
        return dot(wanted(w, x), w[0])

    check(fn, by_hand, STACK, X)


def test_what_a_loop_changes_is_no_kernel():
    def fn(w, x):
        (x, ws) = lax.scan(lambda x, w: (x @ w, jnp.tanh(w)), x, w)
        first = lax.scan(lambda c, w: (w, w), w[0], w[1:])[0]
        return x @ ws[0], x @ first

    (row,) = ternarize(fn).explain(STACK, X).rows
    assert "`tanh` changes it" in row.why


def test_a_packed_kernel_that_a_call_leaves_alone():
    def fn(params, x, name):
        return x @ params[name]

    params = {"a": W, "b": STACK[0]}
    ternary = ternarize(fn)
    packed = {name: ternary.pack(params, X, name)[0][name] for name in params}
    for name, w in params.items():
        assert_same_bits(jax.jit(ternary, static_argnums=2)(packed, X, name), dot(X, w))


def test_gradients_of_rows_that_are_taken_twice_add_up_in_their_own_dtype():
    index = jnp.zeros(1000, jnp.int32)
    fn = ternarize(lambda w, i: w.astype(jnp.bfloat16)[i], select=lambda *_: INT8)
    grads = jax.grad(lambda w: fn(w, index).astype(jnp.float32).sum())(W)
    assert_same_bits(grads[0], jnp.full(16, 1000.0))


def test_custom_derivatives():
    @jax.custom_vjp
    def clipped(w):
        return w

    clipped.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    @jax.custom_jvp
    def scaled(x, w):
        return x @ w

    scaled.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))
    check(lambda w, x: x @ clipped(w), lambda w, x: dot(x, clipped(w)), W, X)
    check(lambda w, x: product(x, w), lambda w, x: dot(x, w), W, X)
    check(lambda w, x: scaled(x, w), lambda w, x: dot(x, w), W, X)
    for fn, name in ((product, "custom_vjp"), (scaled, "custom_jvp"), (None, None)):
        fn = fn or (lambda x, w: x @ clipped(w))
        (row,) = ternarize(lambda w, x, fn=fn: fn(x, w)).explain(W, X).rows
        said = f"; the derivative that its `{name}` gives is not used" if name else ""
        assert row.why == "selected" + said


ORDERS = {
    "both": (0, 0),
    "input": (None, 0),
    "kernel": (0, None),
    "kernel, last axis": (2, None),
    "both, other axes": (1, 1),
}


@cases("name", list(ORDERS), core=["kernel"])
def test_vmap_in_any_order(name):
    of_w, of_x = ORDERS[name]
    w = W if of_w is None else jnp.moveaxis(STACK, 0, of_w)
    x = X if of_x is None else jnp.moveaxis(jnp.stack([X, 2 * X, -X]), 0, of_x)

    def fn(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def wanted(w, x):
        return jnp.tanh(dot(jnp.tanh(dot(x, w)), w))

    inside = ternarize(jax.vmap(fn, in_axes=(of_w, of_x)))
    outside = jax.vmap(ternarize(fn), in_axes=(of_w, of_x))
    by_hand = jax.jit(jax.vmap(wanted, in_axes=(of_w, of_x)))(w, x)
    assert_same_bits(jax.jit(inside)(w, x), by_hand)
    assert_same_bits(jax.jit(outside)(w, x), by_hand)
    if of_w in (0, None):
        assert_same_bits(jax.jit(inside)(inside.pack(w, x)[0], x), by_hand)


@pytest.mark.full
def test_vmap_of_vmap():
    w = jax.random.normal(jax.random.key(3), (2, 16, 3, 8))

    def of(product):
        one = jax.vmap(product, in_axes=(None, 1))
        return lambda w, x: jax.vmap(one, in_axes=(None, 0))(x, w)

    fn, wanted = of(lambda x, w: x @ w), of(dot)
    assert_same_bits(ternarize(fn)(w, X), wanted(w, X))
    lifted = of(jax.jit(lambda x, w: jax.vmap(lambda x: x @ w)(x)))
    assert_same_bits(ternarize(lifted)(w, X), wanted(w, X))


def conv(x, w, numbers, **how):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, **how)


def test_convolutions_of_any_layout():
    images = jax.random.normal(jax.random.key(4), (2, 4, 8, 8))
    w = jax.random.normal(jax.random.key(5), (6, 4, 3, 3))
    ternary = ternarize(lambda w, x: conv(x, w, ("NCHW", "OIHW", "NCHW")))
    y = ternary(w, images)
    # The same kernel with its axes in Flax's order; its scale is summed in another one.
    turned = w.transpose(2, 3, 1, 0)
    flax = ternarize(lambda w, x: conv(x, w, ("NHWC", "HWIO", "NHWC")))
    np.testing.assert_allclose(
        y, flax(turned, images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), rtol=1e-6
    )
    packed, _ = ternary.pack(w, images)
    assert packed.axes.contracting == (1, 2, 3)
    assert_same_bits(ternary(packed, images), y)
    assert_same_bits(ternary(bj.prepare(packed), images), y)
    grads = jax.grad(lambda w: jnp.sin(ternary(w, images)).sum())(w)
    turned_grads = jax.grad(lambda w: jnp.sin(flax(w, images.transpose(0, 2, 3, 1))).sum())(turned)
    np.testing.assert_allclose(grads, turned_grads.transpose(3, 2, 0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_convolutions_under_vmap(axes):
    images = jax.random.normal(jax.random.key(4), (3, 2, 8, 8, 4))
    w = jax.random.normal(jax.random.key(5), (3, 3, 3, 4, 6))
    w = w if axes[0] == 0 else w[0]
    images = images if axes[1] == 0 else images[0]

    def fn(w, x):
        return conv(x, w, ("NHWC", "HWIO", "NHWC"))

    inside = ternarize(jax.vmap(fn, in_axes=axes))
    outside = jax.vmap(ternarize(fn), in_axes=axes)(w, images)
    assert_same_bits(inside(w, images), outside)
    assert_same_bits(inside(inside.pack(w, images)[0], images), outside)


@pytest.mark.full
def test_experts():
    w = jax.random.normal(jax.random.key(5), (4, 16, 8))
    x = jnp.stack([X, 2 * X, 3 * X, -X])
    check(
        lambda w, x: jnp.einsum("ebk,ekn->ebn", x, w),
        lambda w, x: dot(x, w, contracting_axes=(1,), batch_axes=(0,)),
        w,
        x,
    )
    check(
        lambda w, x: jnp.einsum("bek,ekn->bne", jnp.swapaxes(x, 0, 1), w),
        lambda w, x: dot(x, w, contracting_axes=(1,), batch_axes=(0,)).transpose(1, 2, 0),
        w,
        x,
    )


def test_lookups():
    table = jax.random.normal(jax.random.key(6), (11, 16))
    ids = jnp.array([[0, 3, -1], [10, 12, -30]])

    def fn(table, ids):
        rows = jnp.take(table, ids, axis=0)
        return (
            rows,
            table[jnp.clip(ids, 0, 10)],
            jax.vmap(lambda i: jnp.take(table, i, axis=0))(ids),
        )

    ternary = ternarize(fn, weights=INT8, select=lambda path, leaf: True)
    wanted = fn(bj.fake_quantize(table, INT8, contracting_axes=-1), ids)
    jax.tree.map(assert_same_bits, ternary(table, ids), wanted)
    packed, _ = ternary.pack(table, ids)
    jax.tree.map(assert_same_bits, ternary(packed, ids), wanted)


def test_effects_and_aux_and_static_arguments():
    seen = []

    def fn(params, x, scale, *, train, name="a", act=jnp.tanh):
        assert isinstance(scale, int)
        assert isinstance(train, bool)
        jax.debug.callback(seen.append, x[0, 0])
        y = act(x @ params[name]) * scale
        return (y, {"same": params["a"], "train": train}) if train else y

    params = {"a": W, "b": jnp.ones(3)}
    ternary = ternarize(fn)
    y, aux = ternary(params, X, 2, train=True)
    assert_same_bits(y, jnp.tanh(dot(X, W)) * 2)
    assert_same_bits(aux["same"], W)
    assert_same_bits(ternary(params, X, 3, train=False, act=jnp.sin), jnp.sin(dot(X, W)) * 3)
    jax.effects_barrier()
    assert len(seen) == 2
    scopes = (
        jax.jit(ternarize(lambda w, x: jax.named_scope("layer")(lambda: x @ w)()))
        .lower(W, X)
        .as_text(debug_info=True)
    )
    assert "layer/" in scopes


def test_results_that_are_no_arrays():
    def fn(params, x, act):
        return x @ params["w"], {"mode": "train", "act": act, "params": params}

    params = {"w": W, "act": jnp.tanh}  # as the modules of equinox hold theirs
    ternary = ternarize(fn)
    packed, _ = ternary.pack(params, X, jnp.sin)

    def loss(w):
        y, aux = ternary({"w": w, "act": jnp.tanh}, X, jnp.sin)
        return y.sum(), aux

    for aux in (
        ternary(params, X, jnp.sin)[1],
        ternary(packed, X, jnp.sin)[1],
        jax.grad(loss, has_aux=True)(W)[1],
    ):
        assert (aux["mode"], aux["act"], aux["params"]["act"]) == ("train", jnp.sin, jnp.tanh)
    with pytest.raises(TypeError, match=r"returns generator .* at \[1\], which is no pytree"):
        ternarize(lambda w, x: (x @ w, (x for _ in range(2))))(W, X)


def test_traced_once():
    traces = []

    def fn(w, x):
        traces.append(0)
        return x @ w

    ternary = ternarize(fn)
    for _ in range(3):
        ternary(W, X)
        jax.jit(lambda w, x: ternary(w, x) + ternary(w, x))(W, X)
    ternary.explain(W, X)
    ternary.pack(W, X)
    assert len(traces) == 1
    ternary(W, X[:3])
    assert len(traces) == 2


def test_argnums_and_other_trees():
    ternary = ternarize(lambda x, params: x @ params[0], argnums=1)
    assert_same_bits(ternary(X, [W]), dot(X, W))
    assert_same_bits(ternary(X, (W,)), dot(X, W))
    both = ternarize(lambda params, x: x @ params)
    assert_same_bits(both(np.asarray(W), np.asarray(X)), dot(X, W))
    assert_same_bits(jax.jit(both)(W, X), dot(X, W))
    assert jax.eval_shape(both, W, X).shape == (6, 16)


def test_a_batch_that_the_function_closes_over_is_its_input():
    """A loss over a fixed batch has no argument but the params, and perhaps a random key."""

    def loss(params, key=None):
        noise = 0.0 if key is None else jax.random.normal(key, X.shape)
        h = X + noise + params["position"]
        h = jnp.tanh(h @ params["in"]) @ params["out"]
        return jnp.square(h).mean()

    width = X.shape[-1]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "position": jax.random.normal(keys[0], X.shape[-2:]),
        "in": jax.random.normal(keys[1], (width, 24)),
        "out": jax.random.normal(keys[2], (24, 8)),
    }
    ternary = ternarize(loss)
    for more in ((), (jax.random.key(1),)):
        assert set(ternary.explain(params, *more).ternary) == {"in", "out"}
        packed, _ = ternary.pack(params, *more)
        assert_same_bits(ternary(packed, *more), ternary(params, *more))
