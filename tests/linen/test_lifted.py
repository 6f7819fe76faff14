"""Where a ternarised linen model is entered, what stands between a parameter and its product,
and the state that a call carries along."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cases
from draws import normal
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from linen_models import Concrete, Doubled, WrappedInit
from oracles import assert_same_bits

import bitnet_jax as bj

X = normal(4, 16)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(x)


class Deep(nn.Module):
    def setup(self):
        self.blocks = [Encoder(), Encoder()]
        self.by_name = {"first": Encoder()}

    def __call__(self, x):
        return self.by_name["first"](self.blocks[1](self.blocks[0](x)))


class Net(nn.Module):
    def setup(self):
        self.encoder = Encoder()
        self.deep = Deep()
        self.head = nn.Dense(4)

    def __call__(self, x):
        return self.head(self.deep(self.encoder(x)))

    def encode(self, x):
        return self.encoder(x)

    def second(self, x):
        return self.deep.blocks[1](x)

    def named(self, x):
        return self.deep.by_name["first"](x)


@functools.cache
def net():
    ternary = bj.linen.ternarize(Net())
    params = jax.jit(Net().init)(jax.random.key(1), X)["params"]
    return ternary, params, bj.linen.pack(ternary, params, X)[0]


WAYS = {
    "function": ("encode", lambda m, v: m.apply(v, X, method=lambda m, x: m.encoder(x))),
    "unbound": ("encode", lambda m, v: m.apply(v, X, method=Net.encode)),
    "bound method": ("encode", lambda m, v: m.apply(v, X, method=m.encode)),
    "bind": ("encode", lambda m, v: m.bind(v).encode(X)),
    "bind, a submodule": ("encode", lambda m, v: m.bind(v).encoder(X)),
    "bind, one of a list": ("second", lambda m, v: m.bind(v).deep.blocks[1](X)),
    "bind, one of a dict": ("named", lambda m, v: m.bind(v).deep.by_name["first"](X)),
    "nn.apply": ("encode", lambda m, v: nn.apply(lambda m, x: m.encoder(x), m)(v, X)),
    "unbind": (
        "encode",
        lambda m, v: m.bind(v).encoder.unbind()[0].apply({"params": v["params"]["encoder"]}, X),
    ),
}


@cases("way", list(WAYS), core=["function", "bind, a submodule", "nn.apply"])
def test_every_way_in_is_ternary(way):
    ternary, params, packed = net()
    name, run = WAYS[way]
    right = ternary.apply({"params": params}, X, method=name)
    plain = Net().apply({"params": params}, X, method=name)
    assert np.abs(right - plain).max() > 1e-3
    for tree in (params, packed):
        assert_same_bits(run(ternary, {"params": tree}), right, way)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(16, name="d")(x)), None

    def again(self, x):
        return self(self(x)[0])


class Decorated(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(16, name="d")(x)), None


class Derived(nn.remat(Step)):
    def __call__(self, x, _=None):
        return super().__call__(x)


STACKED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}

LIFTED = {
    "remat": nn.remat(Step),
    "jit": nn.jit(Step),
    "remat of jit": nn.remat(nn.jit(Step)),
    "scan": nn.scan(Step, length=1, **STACKED),
    "vmap": nn.vmap(Step, in_axes=None, axis_size=1, **STACKED),
    "decorator": Decorated,
    "derived": Derived,
}


@cases("name", list(LIFTED), core=["remat", "scan"])
def test_models_that_are_lifted_classes(name):
    """Flax calls their methods as they are: no method of the ternarised class stands between."""

    class Holder(nn.Module):
        def setup(self):
            self.part = LIFTED[name]()

        def __call__(self, x):
            return self.part(x)

    model, args = LIFTED[name](), (X, None) if name == "scan" else (X,)
    ternary = bj.linen.ternarize(model)
    params = ternary.init(jax.random.key(1), *args)["params"]
    jax.tree.map(assert_same_bits, params, model.init(jax.random.key(1), *args)["params"])
    stacked = name in ("scan", "vmap")
    flat = jax.tree.map(lambda a: a[0], params) if stacked else params
    right = nn.relu(bj.linen.BitDense(16).apply({"params": flat["d"]}, X))
    packed, _ = bj.linen.pack(ternary, params, *args)
    for tree in (params, packed):
        y, _ = ternary.apply({"params": tree}, *args)
        assert_same_bits(y.reshape(right.shape), right)
        holder = bj.linen.ternarize(Holder()).bind({"params": {"part": tree}})
        assert_same_bits(holder.part(*args)[0].reshape(right.shape), right)
    with bj.phase_in(0.0):
        assert_same_bits(
            ternary.apply({"params": params}, *args)[0], model.apply({"params": params}, *args)[0]
        )


def test_lifted_methods_of_a_model():
    kind = nn.remat(Step, methods=["__call__", "again"])
    ternary = bj.linen.ternarize(kind())
    params = ternary.init(jax.random.key(1), X, method="again")
    y = bj.linen.ternarize(Step()).apply(params, X, method="again")[0]
    for method in ("again", kind.again, lambda m, x: m.again(x)):
        assert_same_bits(ternary.apply(params, X, method=method)[0], y)
    with pytest.raises(ValueError, match="pattern 'e' matches nothing"):
        bj.linen.ternarize(kind(), select=bj.exclude("e")).init(jax.random.key(1), X)


def test_modules_in_fields_are_ternary():
    """Of the model, of a module in its fields, and of a ternary model that is a field itself."""

    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, x):
            return self.inner(x)

        def part(self, x):
            return self.inner.layers[2](x)

    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Sequential([nn.Dense(8)])])
    ternary = bj.linen.ternarize(model)
    params = ternary.init(jax.random.key(1), X)["params"]
    packed, _ = bj.linen.pack(ternary, params, X)
    layer = bj.linen.ternarize(nn.Dense(8))
    right = layer.apply({"params": params["layers_2"]["layers_0"]}, X)
    for tree in (params, packed):
        bound, outer = ternary.bind({"params": tree}), Outer(ternary)
        assert_same_bits(bound.layers[2](X), right)
        assert_same_bits(bound.layers[2].layers[0](X), right)
        variables = {"params": {"inner": tree}}
        assert_same_bits(outer.apply(variables, X, method="part"), right)
        assert_same_bits(outer.bind(variables).inner.layers[2].layers[0](X), right)


def test_kernels_that_a_function_of_the_module_multiplies_itself():
    class Tied(nn.Module):
        def setup(self):
            self.weight = self.param("weight", nn.initializers.lecun_normal(), (16, 8))

        def __call__(self, x):
            return x @ self.weight

    ternary = bj.linen.ternarize(Tied())
    params = ternary.init(jax.random.key(0), X)
    y = ternary.apply(params, X)
    assert_same_bits(ternary.apply(params, X, method=lambda m, x: x @ m.weight), y)
    assert np.abs(y - Tied().apply(params, X)).max() > 1e-3


class Raw(nn.Module):
    def setup(self):
        self.weight = self.param("weight", nn.initializers.lecun_normal(), (16, 8))
        self.layer = nn.Dense(8)

    def __call__(self, x):
        return self.encode(x) + self.layer(x)

    def encode(self, x):
        return x @ self.weight

    @nn.nowrap
    def plain(self, x):
        return x @ self.weight


class Caller:
    def __call__(self, module, x):
        return module.encode(x)


def test_methods_that_flax_does_not_wrap_and_other_callables():
    ternary = bj.linen.ternarize(Raw())
    params = ternary.init(jax.random.key(0), X)["params"]
    packed, _ = bj.linen.pack(ternary, params, X)
    y = ternary.apply({"params": params}, X, method="encode")
    for tree in (params, packed):
        variables = {"params": tree}
        for method in ("plain", Raw.plain, ternary.plain, functools.partial(Raw.encode), Caller()):
            assert_same_bits(ternary.apply(variables, X, method=method), y)
        # A submodule, past a parameter of setup that is packed.
        layer = ternary.apply(variables, X, method=lambda m, x: m.layer(x))
        assert_same_bits(ternary.bind(variables).layer(X), layer)


class StdConv(nn.Conv):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value - value.mean((0, 1, 2)) if name == "kernel" else value


class Weighted(nn.Dense):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value * 0.5 if name == "kernel" else value


def mapped(change, name="mapped"):
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = self.is_mutable_collection("params")
            layer = nn.map_variables(nn.Dense, "params", change, change, init=init)
            return layer(16, use_bias=False, name=name)(x)

    return Mapped()


def each(function):
    return lambda tree: jax.tree.map(lambda w: function(w) if w.ndim == 2 else w, tree)


CHANGED = {
    "param, a mean": StdConv(8, (3,)),
    "param, a factor": Weighted(8),
    "mapped, a mask": mapped(each(jnp.tril)),
    "mapped, a factor": mapped(each(lambda w: 2.0 * w)),
    "mapped, order of rows": mapped(each(lambda w: w[::-1])),
}


@cases("case", list(CHANGED), core=["param, a mean", "mapped, a mask"])
def test_a_kernel_that_is_changed_on_the_way_is_float_and_said_so(case):
    """In a model with others; alone, the refusal says so."""
    odd = CHANGED[case]

    class Two(nn.Module):
        odd: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.odd(nn.Dense(16, name="even")(x))

    x = normal(2, 5, 16)
    ternary = bj.linen.ternarize(Two(odd))
    params = ternary.init(jax.random.key(0), x)["params"]
    rows = {row.path: row for row in bj.linen.explain(ternary, x).rows}
    assert rows["even/kernel"].config == bj.B158
    (path,) = (path for path in rows if path.startswith("odd"))
    assert rows[path].config is None
    assert "changes it before it is multiplied" in rows[path].why
    packed, report = bj.linen.pack(ternary, params, x)
    assert [row.path for row in report.rows] == ["even/kernel"]
    y = ternary.apply({"params": params}, x)
    assert_same_bits(ternary.apply({"params": packed}, x), y)
    one = nn.Dense(16).apply({"params": params["even"]}, x)
    only = bj.linen.ternarize(nn.Dense(16)).apply({"params": params["even"]}, x)
    assert np.abs(only - one).max() > 1e-3
    want = odd.apply({"params": params["odd"]}, only)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="changes it before it is multiplied"):
        bj.linen.ternarize(odd).init(jax.random.key(0), x)


def test_mapped_variables_that_only_move_stay_kernels():
    model = mapped(each(lambda w: w.T))
    ternary = bj.linen.ternarize(model)
    params = model.init(jax.random.key(0), X)
    y = ternary.apply(params, X)
    packed, _ = bj.linen.pack(ternary, params["params"], X)
    assert_same_bits(ternary.apply({"params": packed}, X), y)
    turned = {"params": {"kernel": params["params"]["mapped"]["kernel"].T}}
    layer = bj.linen.BitDense(16, use_bias=False)
    np.testing.assert_allclose(y, layer.apply(turned, X), rtol=1e-5, atol=1e-6)


class Keyed(nn.Module, kw_only=True):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width)(x)


CLASSES = {
    "wrapped __init__": lambda: WrappedInit(width=12),
    "abstract base": Concrete,
    "own __post_init__": lambda: Doubled(4),
    "keywords only": lambda: Keyed(width=7),
}


@cases("case", list(CLASSES), core=["wrapped __init__", "abstract base"])
def test_classes_that_make_themselves_in_their_own_way(case):
    model = CLASSES[case]()
    params = jax.jit(model.init)(jax.random.key(0), X)
    ternary = bj.linen.ternarize(model)
    assert isinstance(ternary, type(model))
    jax.tree.map(assert_same_bits, jax.jit(ternary.init)(jax.random.key(0), X), params)
    y = ternary.apply(params, X)
    assert_same_bits(pickle.loads(pickle.dumps(ternary)).apply(params, X), y)
    assert pickle.loads(pickle.dumps(type(ternary))) is type(ternary)


def test_a_head_that_is_applied_to_the_transposed_table_is_float_with_it():
    """As transformers' tied heads: a layer on a scope that is made up inside the model."""

    class Language(nn.Module):
        def setup(self):
            self.embed, self.block = nn.Embed(64, 32), nn.Dense(32)
            self.lm_head = nn.Dense(64, use_bias=False)

        def __call__(self, ids):
            x = nn.relu(self.block(self.embed(ids)))
            table = self.embed.variables["params"]["embedding"]
            return self.lm_head.apply({"params": {"kernel": table.T}}, x)

        def before(self, ids):
            return nn.relu(self.block(self.embed(ids)))

    ids = jnp.arange(10)[None]
    ternary = bj.linen.ternarize(Language())
    params = Language().init(jax.random.key(1), ids)["params"]
    rows = {row.path: row for row in bj.linen.explain(ternary, ids).rows}
    assert "an embedding" in rows["embed/embedding"].why
    packed, _ = bj.linen.pack(ternary, params, ids)
    y = ternary.apply({"params": params}, ids)
    assert_same_bits(ternary.apply({"params": packed}, ids), y)
    x = ternary.apply({"params": params}, ids, method="before")
    np.testing.assert_allclose(y, x @ params["embed"]["embedding"].T, rtol=1e-5, atol=1e-5)
    eight = bj.linen.ternarize(
        Language(), lambda p, a: bj.Int8Config() if p[-1] == "embedding" else p[-1] == "kernel"
    )
    both, _ = bj.linen.pack(eight, params, ids)
    assert_same_bits(eight.apply({"params": both}, ids), eight.apply({"params": params}, ids))


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, embed_only=False):
        x = nn.Dropout(0.5, deterministic=not train)(x)
        if embed_only:
            return x
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        self.sow("intermediates", "hidden", x)
        count = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        count.value += 1
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(4)(x + 0.1 * noise)


def test_state_and_random_keys_are_those_of_the_float_model():
    model, ternary = Stateful(), bj.linen.ternarize(Stateful())
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    variables = model.init(keys, X)
    made = ternary.init(keys, X)
    jax.tree.map(np.testing.assert_array_equal, made, variables)
    rngs = {"dropout": jax.random.key(2), "noise": jax.random.key(3)}
    mutable = ["batch_stats", "counts", "intermediates"]
    how = {"train": True, "rngs": rngs, "mutable": mutable}
    want, after = model.apply(variables, X, **how)
    with bj.phase_in(0.0):
        got, got_after = ternary.apply(variables, X, **how)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(got_after) == jax.tree.structure(after)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got_after, after
    )
    assert got_after["counts"]["calls"] == variables["counts"]["calls"] + 1
    trained, _ = ternary.apply(variables, X, **how)
    assert np.abs(trained - want).max() > 1e-3
    # A call that reaches no kernel runs, and one of everything names what it has caught.
    only = ternary.apply(variables, X, embed_only=True)
    assert_same_bits(only, X)
    _, caught = ternary.apply(
        variables, X, rngs=rngs, capture_intermediates=True, mutable=["intermediates", "counts"]
    )
    assert set(caught["intermediates"]) >= {"Dense_0", "Dense_1", "hidden"}


def test_a_cache_is_made_and_filled():
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    ternary = bj.linen.ternarize(model)
    x = normal(1, 6, 16)
    variables = ternary.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, model.init(jax.random.key(0), x))
    packed, report = bj.linen.pack(ternary, variables["params"], x)
    assert len(report.rows) == 4
    outs = []
    for params in (variables["params"], packed):
        cache, ys = variables["cache"], []
        for i in range(3):
            state = {"params": params, "cache": cache}
            y, cache = ternary.apply(state, x[:, i : i + 1], mutable=["cache"])
            cache = cache["cache"]
            ys.append(y)
        assert cache["cache_index"] == 3
        outs.append(jnp.concatenate(ys, 1))
    assert_same_bits(*outs)


def test_modules_that_come_from_outside():
    class Uses(nn.Module):
        shared: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(self.shared(self.shared(x)))

    class Given(nn.Module):
        @nn.compact
        def __call__(self, x, layer):
            return nn.Dense(4)(layer(x))

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x, nn.Dense(16, name="lent"))

    for float_, ternary in (
        (Uses(nn.Dense(16)), bj.linen.ternarize(Uses(nn.Dense(16)))),
        (Outer(Given()), bj.linen.ternarize(Outer(Given()))),
        (Outer(Given()), Outer(bj.linen.ternarize(Given()))),
    ):
        params = float_.init(jax.random.key(0), X)["params"]
        jax.tree.map(assert_same_bits, ternary.init(jax.random.key(0), X)["params"], params)
        packed, report = bj.linen.pack(ternary, params, X)
        assert len(report.rows) == 2
        y = ternary.apply({"params": params}, X)
        assert_same_bits(ternary.apply({"params": packed}, X), y)
        assert np.abs(y - float_.apply({"params": params}, X)).max() > 1e-3


@pytest.mark.standard_promotion
def test_a_train_state_trains_and_a_selector_sees_whole_paths():
    ternary = bj.linen.ternarize(Net(), select=bj.exclude("deep/blocks_*"))
    params = ternary.init(jax.random.key(1), X)["params"]
    table = bj.linen.explain(ternary, X)
    assert set(table.left) == {"deep/blocks_0/Dense_0/kernel", "deep/blocks_1/Dense_0/kernel"}
    state = train_state.TrainState.create(
        apply_fn=ternary.apply, params=params, tx=optax.adam(1e-2)
    )

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.square(state.apply_fn({"params": params}, X) - 1).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(20):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_words():
    model = bj.linen.ternarize(Net(), select=bj.only("haed"))
    misspelt = r"the pattern 'haed' matches nothing\. Near paths: "
    with pytest.raises(ValueError, match=misspelt):
        model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=misspelt):
        bj.linen.explain(model, X)
    table = bj.linen.explain(Net(), X)  # of the float model
    assert not table.ternary
    assert all("bj.linen.ternarize(model)" in row.why for row in table.rows)
    with pytest.raises(TypeError, match=r"linen models have bj\.linen"):
        bj.nnx.ternarize(Net())
    with pytest.raises(TypeError, match=r"NNX models have bj\.nnx"):
        bj.linen.ternarize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

    class Phased(nn.Module):
        @nn.compact
        def __call__(self, x):
            with bj.phase_in(0.5):
                return nn.Dense(4)(x)

    with pytest.raises(ValueError, match=r"bj\.phase_in is entered inside the function"):
        bj.linen.ternarize(Phased()).init(jax.random.key(0), X)
