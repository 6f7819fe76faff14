"""What a ternary function says of itself, what it packs, and what it refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import pallas as pl
from oracles import assert_same_bits

import bitnet_jax as bj

ternarize = bj.ternarize

X = jax.random.normal(jax.random.key(0), (6, 16))
W = jax.random.normal(jax.random.key(1), (16, 16))
INT8 = bj.Int8Config()


def network(params, x):
    h = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    h = h @ (params["masked"] * params["mask"])
    scores = jnp.einsum("bd,cd->bc", h, x)
    return scores @ (params["down"] @ params["up"]) + params["table"][0].sum()


def tree():
    keys = iter(jax.random.split(jax.random.key(2), 9))
    shapes = {"masked": (16, 16), "mask": (16, 16), "down": (6, 2), "up": (2, 4), "table": (3, 5)}
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    return params | {"in": {"w": W, "b": jnp.zeros((1, 16))}}


def test_explain():
    table = ternarize(network).explain(tree(), X)
    rows = {row.path: row for row in table.rows}
    assert {path: row.why for path, row in rows.items()} == {
        "in/w": "selected",
        "in/b": "no product reaches it, only `add`",
        "masked": "`mul` changes it before it is multiplied",
        "mask": "`mul` changes it before it is multiplied",
        "down": "it meets the parameter up, not an input",
        "up": "it meets the parameter down, not an input",
        "table": "no product reaches it, only `reduce_sum`",
    }
    products = 6 * 16 * 16 * 2 + 6 * 16 * 6 + 6 * 2 * 4 + 6 * 6 * 4
    assert table.flops == 2 * products
    assert rows["in/w"].share == pytest.approx(6 * 16 * 16 / products)
    assert table.share == {"ternary": rows["in/w"].share}
    assert table.ternary == ("in/w",)
    assert rows["in/w"].contracting_axes == (0,)
    assert str(table).splitlines()[0].split() == [
        "path",
        "product",
        "shape",
        "dtype",
        "over",
        "share",
        "kernel",
        "why",
    ]
    assert str(table).splitlines()[-1] == "40 % ternary of 7.68 kFLOP"
    assert json.loads(json.dumps(table.to_dict()))["rows"]["in/w"]["kind"] == "ternary"
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (tree(), X))
    assert ternarize(network).explain(*shapes) == table


def test_kernels_are_a_selector():
    ternary = ternarize(lambda p, x: jnp.einsum("bk,lnk->bln", x, p["w"]))
    params = {"w": jnp.stack([W, 2 * W]), "b": jnp.ones(3)}
    kernels = ternary.kernels(params, X)
    path = ("w",)
    assert kernels(path, params["w"]) == bj.B158
    assert kernels.axes(path, params["w"]) == {"contracting_axes": (2,), "batch_axes": ()}
    assert kernels(("b",), params["b"]) is None
    packed, _ = bj.pack_params(params, select=kernels)
    jax.tree.map(assert_same_bits, packed, ternary.pack(params, X)[0])


def test_selectors():
    params = {"a": {"w": W}, "b": {"w": W, "table": W}}

    def fn(params, x):
        x = jnp.tanh(x @ params["a"]["w"])
        return jnp.tanh(x @ params["b"]["w"]) + params["b"]["table"][jnp.arange(6)]

    def chosen(select):
        rows = ternarize(fn, select=select).explain(params, X).rows
        return {row.path: row.config for row in rows if row.config is not None}

    assert chosen(None) == {"a/w": bj.B158, "b/w": bj.B158}
    assert chosen(bj.exclude("a")) == {"b/w": bj.B158}
    assert chosen(bj.only("a")) == {"a/w": bj.B158}
    assert chosen(bj.only("b/w")) == {"b/w": bj.B158}
    assert chosen(lambda path, leaf: INT8 if path[0] == "b" else None) == {
        "b/w": INT8,
        "b/table": INT8,
    }
    with pytest.raises(ValueError, match=r"the pattern 'c' matches nothing\. Near paths"):
        ternarize(fn, select=bj.only("c"))(params, X)
    with pytest.raises(NotImplementedError, match="b/table cannot be ternarised: rows are looked"):
        ternarize(fn, select=bj.only("b/table"))(params, X)
    with pytest.raises(TypeError, match="`select` returned str 'yes' for a/w"):
        ternarize(fn, select=lambda path, leaf: "yes")(params, X)
    seen = []
    ternarize(fn, select=lambda path, leaf: seen.append(leaf) or True)(params, X)
    assert {type(leaf) for leaf in seen} == {jax.ShapeDtypeStruct}


def test_a_kernel_that_is_read_as_float_too():
    def fn(w, x):
        return x @ w, jnp.square(w).sum(), w

    ternary = ternarize(fn)
    (row,) = ternary.explain(W, X).rows
    assert row.why == "selected; `square` reads it as float"
    y, penalty, same = ternary(W, X)
    assert_same_bits(y, bj.ternary_dot(X, W))
    assert_same_bits(same, W)
    np.testing.assert_allclose(penalty, jnp.square(W).sum(), rtol=1e-6)
    with pytest.raises(ValueError, match="pack: `square` also reads the kernel at"):
        ternary.pack(W, X)
    with pytest.raises(ValueError, match="is packed, and `square` computes with it as float"):
        ternary(bj.pack(W), X)
    handed_on = ternarize(lambda w, x: (x @ w, w))
    assert isinstance(handed_on(bj.pack(W), X)[1], bj.PackedTernary)


def unknown(params, x):
    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    product = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((6, 16), jnp.float32), interpret=True
    )
    return product(x, params["fused"]) @ params["plain"]


REFUSED = {
    "two sets of axes": (lambda w, x: (x @ w) @ w.T, W, r"used over axes \(0,\) and \(1,\)"),
    "itself": (lambda w, x: (x @ w, w.T @ w), W, "on both sides of a product: it meets itself"),
    "gradients": (
        lambda p, x: jax.grad(lambda p: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]).sum())(p),
        [W, W],
        "ternarise the function that it differentiates",
    ),
    "nothing": (lambda w, x: x * w.sum(), W, "nothing can be quantised .* only `reduce_sum`"),
    "no params": (lambda p, x: x, {"scale": jnp.ones(3)}, r"Is argnums= right\?"),
    "empty": (lambda p, x: x, {}, "`params` holds no arrays"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name):
    fn, params, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        ternarize(fn)(params, X)
    with pytest.raises(ValueError, match=message):
        ternarize(fn).pack(params, X)


def test_missing_rules_are_named():
    params = {"fused": W, "plain": W}
    message = "an interpreter rule is missing for `pallas_call`.*, which fused enters"
    with pytest.raises(NotImplementedError, match=message):
        ternarize(unknown)(params, X)
    ternary = ternarize(unknown, select=bj.exclude("fused"))
    assert ternary.explain(params, X).ternary == ("plain",)
    assert_same_bits(
        ternary(params, X), bj.ternary_dot(unknown(params | {"plain": jnp.eye(16)}, X), W)
    )


def test_bad_arguments():
    fn = network
    ternary = ternarize(lambda p, x: x @ p["w"])
    with pytest.raises(TypeError, match="`fn` must be a function of parameters"):
        ternarize(tree())
    with pytest.raises(TypeError, match="`argnums` must be the number of one positional argument"):
        ternarize(fn, argnums=(0, 1))
    with pytest.raises(TypeError, match="`select` must be a function"):
        ternarize(fn, select="head")
    with pytest.raises(TypeError, match="`weights` must be a TernaryConfig or Int8Config"):
        ternarize(fn, weights="b158")
    with pytest.raises(TypeError, match=r"the parameters are positional argument 2 \(argnums=\)"):
        ternarize(fn, argnums=2)(tree(), X)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), {"w": W})
    with pytest.raises(TypeError, match=r"a call needs arrays\. Use jax.eval_shape"):
        ternary(shapes, X)
    packed, _ = ternary.pack({"w": W}, X)
    with pytest.raises(TypeError, match="w is packed already"):
        ternary.pack(packed, X)
    with pytest.raises(ValueError, match="w is packed, and `reduce_sum` computes with it as float"):
        ternarize(lambda p, x: x @ p["v"] + p["w"].sum())(packed | {"v": W}, X)
    with pytest.raises(ValueError, match="the kernel at w is packed, and this function leaves it"):
        ternarize(lambda p, x: x @ p["v"] @ (2 * p["w"].T))(packed | {"v": W}, X)
    only = ternarize(lambda p, x: x @ p["v"])(packed | {"v": W}, X)  # nothing asks for w
    assert only.shape == (*X.shape[:-1], W.shape[-1])
    with pytest.raises(ValueError, match="the kernel at w was packed with TernaryConfig"):
        ternarize(lambda p, x: x @ p["w"], weights=bj.PHASE4)(packed, X)
    with pytest.raises(ValueError, match=r"contracts over its axes \(0,\), and the layer over"):
        ternarize(lambda p, x: x @ p["w"].T)(packed, X)
    with pytest.raises(ValueError, match=r"granularity`=5 does not divide the contraction"):
        ternarize(lambda p, x: x @ p["w"], weights=bj.TernaryConfig(granularity=5))({"w": W}, X)
    with pytest.raises(TypeError, match=r"packed kernels.*have no gradient"):
        jax.grad(lambda p: ternary(p, X).sum())(packed)


def test_partial_and_callable_objects():
    class Layer:
        def __call__(self, w, x):
            return x @ w

    for fn in (functools.partial(lambda w, x: x @ w), Layer(), jax.jit(lambda w, x: x @ w)):
        assert_same_bits(ternarize(fn)(W, X), bj.ternary_dot(X, W))
    assert "<lambda>" in repr(ternarize(lambda w, x: x @ w))


def test_a_flax_model_is_none_of_its_functions():
    for model in (nn.Dense(4), nnx.Linear(4, 4, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match=r"`fn` must be a function.*bj\.nnx\.ternarize"):
            ternarize(model)
