"""Calls of a ternarised NNX model: kernels of any module, states of every kind, the same bits."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from flax import nnx
from oracles import assert_same_bits

import bitnet_jax as bj
from bitnet_jax._packed.kernel import is_packed

INT8 = bj.Int8Config()
X = normal(4, 16)
IDS = jnp.arange(6).reshape(2, 3)


class Einsum(nnx.Module):
    """As tunix writes it: a parameter of its own, and the equation with the call."""

    def __init__(self, shape, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) / 4)

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


class Block(nnx.Module):
    """Kernels that are parameters of no layer; a norm with statistics, and dropout."""

    def __init__(self, rngs):
        self.up = Einsum((16, 2, 12), rngs)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (2, 12, 16)) / 4)
        self.out = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = 0

    def __call__(self, x, *, scale=1.0, rngs=None):
        self.calls += 1
        h = nnx.relu(self.up("bd,dhk->bhk", x))
        x = x + scale * jnp.einsum("bhk,hkd->bd", h, self.down[...])
        return self.out(self.dropout(self.norm(x), rngs=rngs))


def dense(x, layer):
    y = bj.ternary_dot(x, layer.kernel[...])
    return y + layer.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


def by_hand(model, x):
    """The products of a block without its norm and dropout, by the training op."""
    h = nnx.relu(bj.ternary_dot(x, model.up.w[...], contracting_axes=0))
    x = x + bj.ternary_dot(h, model.down[...], contracting_axes=(0, 1))
    return dense(x, model.out)


class Plain(Block):
    def __call__(self, x):
        h = nnx.relu(self.up("bd,dhk->bhk", x))
        return self.out(x + jnp.einsum("bhk,hkd->bd", h, self.down[...]))


def plain(**options):
    model = Plain(nnx.Rngs(0))
    bj.nnx.ternarize(model, **options)
    return model


def run(model, *args):
    return nnx.jit(lambda m, *args: m(*args))(model, *args)


def test_products_with_parameters_of_any_module():
    model = Plain(nnx.Rngs(0))
    wanted = jax.jit(lambda x: by_hand(model, x))(X)
    table = bj.nnx.ternarize(model)
    kinds = {row.path: row.kind for row in table.rows}
    assert kinds == {"down": "by call", "out/kernel": "ternary", "up/w": "by call"}
    assert_same_bits(run(model, X), wanted)
    traced = bj.nnx.explain(model, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert sorted(traced.ternary) == ["down", "out/kernel", "up/w"]
    assert traced.share == {"ternary": pytest.approx(1.0)}
    for use in (bj.nnx.pack, bj.nnx.kernels):
        with pytest.raises(ValueError, match=r"how Plain uses down is decided .*\(model, \*args\)"):
            use(model)
    packed, report = bj.nnx.pack(model, X)
    assert sorted(row.path for row in report.rows) == ["down", "out/kernel", "up/w"]
    assert packed.down.get_value().axes.contracting == (0, 1)
    assert_same_bits(run(packed, X), wanted)
    assert_same_bits(packed(X), wanted)
    assert not is_packed(model.down.get_value())
    kernels = bj.nnx.kernels(model, X)
    again, _ = bj.pack_params(nnx.state(model, nnx.Param), select=kernels)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again, nnx.state(packed, nnx.Param))
    assert jax.tree.all(same)


@pytest.mark.standard_promotion
def test_states_are_those_of_the_float_model():
    model = Block(nnx.Rngs(0))
    float_ = nnx.clone(model)
    bj.nnx.ternarize(model, select=lambda path, leaf: INT8 if path == ("down",) else None)
    statistics = model.norm.mean
    for rngs in (None, nnx.Rngs(dropout=5)):
        other = None if rngs is None else nnx.Rngs(dropout=5)
        model(X, scale=2.0, rngs=rngs), float_(X, scale=2.0, rngs=other)
        if rngs is not None:
            assert rngs.dropout.count[...] == other.dropout.count[...] == 1
    assert model.norm.mean is statistics
    assert model.calls == float_.calls == 2
    assert model.dropout.rngs.count[...] == float_.dropout.rngs.count[...] == 1
    np.testing.assert_allclose(model.norm.mean[...], float_.norm.mean[...], atol=0.05)
    np.testing.assert_allclose(model.norm.var[...], float_.norm.var[...], rtol=0.1)
    assert np.abs(float_.norm.mean[...]).max() > 0.01
    model.eval()
    before = nnx.state(model)
    model(X)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, before, nnx.state(model)))


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (16, 16)))
        self.last = nnx.data(jnp.zeros(()))

    def __call__(self, x):
        y = x @ self.w[...]
        self.sow(nnx.Intermediate, "seen", y)
        self.last = y.sum()
        return y


@pytest.mark.filterwarnings("ignore:.*sow.*:DeprecationWarning")
def test_what_a_call_adds_stays():
    model = Sows(nnx.Rngs(0))
    bj.nnx.ternarize(model)
    first, second = model(X), model(2 * X)
    assert_same_bits(model.seen.get_value()[0], first)
    assert_same_bits(model.seen.get_value()[1], second)
    assert_same_bits(model.last, second.sum())


@pytest.mark.standard_promotion
def test_three_steps_of_an_optimizer():
    model = plain()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=bj.nnx.trainable)
    kernels = [model.up.w, model.down, model.out.kernel]
    before = [v.get_value() for v in kernels]

    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.square(m(X) - 1.0).mean())(model)
        optimizer.update(model, grads)
        return loss

    once = nnx.clone(model), nnx.clone(optimizer)
    losses = [nnx.jit(step)(model, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    np.testing.assert_allclose(step(*once), losses[0], rtol=1e-6)  # eager
    for v, old in zip(kernels, before, strict=True):
        assert (v.get_value() != old).any()
    assert_same_bits(run(bj.nnx.pack(model, X)[0], X), run(model, X))


def test_gradients_are_straight_through():
    model = plain()
    float_ = Plain(nnx.Rngs(0))

    def loss(products):
        return lambda m: jnp.square(products(m)).sum()

    grads = nnx.grad(loss(lambda m: m(X)))(model)
    wanted = nnx.grad(loss(lambda m: by_hand(m, X)))(float_)
    for name in ("down", "out"):
        for ours, theirs in zip(
            jax.tree.leaves(grads[name]), jax.tree.leaves(wanted[name]), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


class Coder(nnx.Module):
    """Two methods, and a table that one looks rows up in and the other multiplies by."""

    def __init__(self, rngs):
        self.table = nnx.Embed(12, 16, rngs=rngs)
        self.w_in = nnx.Param(jax.random.normal(rngs.params(), (16, 8)))
        self.w_out = nnx.Param(jax.random.normal(rngs.params(), (8, 16)))

    def encode(self, ids):
        return self.table(ids) @ self.w_in[...]

    def decode(self, h):
        return (h @ self.w_out[...]) @ self.table.embedding[...].T

    def __call__(self, ids):
        return self.decode(self.encode(ids))


def test_methods_that_are_called_by_themselves():
    model = Coder(nnx.Rngs(0))
    table = model.table.embedding.get_value()
    bj.nnx.ternarize(model)

    @jax.jit
    def wanted(ids):
        h = bj.ternary_dot(table[ids], model.w_in[...])
        return h, bj.ternary_dot(h, model.w_out[...]) @ table.T

    h, y = wanted(IDS)
    assert_same_bits(nnx.jit(lambda m: m.encode(IDS))(model), h)
    np.testing.assert_allclose(model.decode(h), y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model(IDS), y, rtol=1e-6, atol=1e-6)
    # The table is float in every call, whichever sees it as what.
    assert "table/embedding" not in bj.nnx.explain(model, h, method="decode").ternary
    only, _ = bj.nnx.pack(model, IDS, method="encode")
    assert [is_packed(v.get_value()) for v in (only.w_in, only.w_out)] == [True, False]
    packed, _ = bj.nnx.pack(model, IDS, method="encode", calls=[("decode", h)])
    for one in (only, packed):
        assert_same_bits(nnx.jit(lambda m: m.encode(IDS))(one), h)
        np.testing.assert_allclose(one(IDS), y, rtol=1e-6, atol=1e-6)
    assert is_packed(packed.w_out.get_value())
    with pytest.raises(ValueError, match=r"Coder\.nothing is no method of a ternarised model"):
        bj.nnx.pack(model, IDS, method="nothing")


class Normed(nnx.Module):
    """Its kernel is divided by its norm, which only a call shows."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (16, 16)))

    def __call__(self, x):
        return x @ (self.w[...] / jnp.linalg.norm(self.w[...]))

    def size(self):
        return jnp.square(self.w[...]).sum()


def test_a_call_refuses_what_only_it_can_tell():
    for select, error, match in (
        (None, ValueError, r"nothing can be quantised .* w: `div` changes it"),
        (bj.only("w"), NotImplementedError, "w cannot be ternarised: `div` changes it"),
        (bj.exclude("layer"), ValueError, "`select` matches nothing of what this function multip"),
    ):
        model = Normed(nnx.Rngs(0))
        model.layer = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        bj.nnx.ternarize(model, select=select)
        if select is None:
            del model.layer  # else a kernel may wait for another call
        elif not select.keep:
            model.layer = nnx.relu
        with pytest.raises(error, match=match):
            model(X)
        assert_same_bits(model.size(), jnp.square(model.w[...]).sum())
    both = nnx.List([Normed(nnx.Rngs(0)), nnx.Linear(16, 16, rngs=nnx.Rngs(0))])
    bj.nnx.ternarize(both)
    assert_same_bits(both[1](X), dense(X, both[1]))
    w = both[0].w[...]
    np.testing.assert_allclose(both[0](X), X @ (w / jnp.linalg.norm(w)), rtol=1e-5, atol=1e-6)


class Tokens(nnx.Module):
    """A table of its own, of which no single method shows that it is one."""

    def __init__(self, rngs):
        self.rows = nnx.Param(jax.random.normal(rngs.params(), (12, 16)))
        self.layer = Layer(rngs)

    def encode(self, ids):
        return self.layer(self.rows[...][ids])

    def decode(self, h):
        return self.layer(h) @ self.rows[...].T


def test_a_table_that_one_method_alone_would_quantise():
    for first, second in ((IDS, X), (X, IDS)):
        model = Tokens(nnx.Rngs(0))
        bj.nnx.ternarize(model, weights=bj.PHASE4 if first is X else bj.TWN)
        for x in (first, first, second):
            method = model.encode if x is IDS else model.decode
            if x is first:
                method(x)
                continue
            with pytest.raises(ValueError, match=r"kernel at rows is used as an? \w+ in this call"):
                method(x)
    for select in (bj.exclude("rows"), lambda path, leaf: INT8 if path == ("rows",) else True):
        model = Tokens(nnx.Rngs(0))
        bj.nnx.ternarize(model, select=select)
        h, y = model.encode(IDS), model.decode(X)
        packed, _ = bj.nnx.pack(model, IDS, method="encode", calls=[("decode", X)])
        assert_same_bits(packed.encode(IDS), h)
        assert_same_bits(packed.decode(X), y)
    assert is_packed(packed.rows.get_value())


def test_an_int8_table_is_one_in_every_method():
    model = Coder(nnx.Rngs(0))
    bj.nnx.ternarize(model, select=lambda path, leaf: INT8 if "table" in path else True)
    packed, report = bj.nnx.pack(model, IDS)
    assert {row.path: row.kind for row in report.rows}["table/embedding"] == "int8"
    h = nnx.jit(lambda m: m.encode(IDS))(model)
    assert_same_bits(nnx.jit(lambda m: m.encode(IDS))(packed), h)
    assert_same_bits(packed.decode(h), model.decode(h))
    assert_same_bits(run(packed, IDS), run(model, IDS))


def test_submodules_that_are_called_by_themselves():
    model = plain(select=bj.only("up", "out"))
    wanted = bj.ternary_dot(X, model.up.w[...], contracting_axes=0)
    assert_same_bits(model.up("bd,dhk->bhk", X), wanted)
    assert_same_bits(model.up("bd,dhk->bhk", x=X), wanted)
    assert bj.nnx.explain(model.up, "bd,dhk->bhk", X).ternary == ("up/w",)
    packed, report = bj.nnx.pack(model.up, "bd,dhk->bhk", X)
    assert [row.path for row in report.rows] == ["w"]
    assert_same_bits(packed("bd,dhk->bhk", X), wanted)
    float_ = Plain(nnx.Rngs(0))
    h = nnx.relu(wanted)
    rest = dense(X + jnp.einsum("bhk,hkd->bd", h, float_.down[...]), float_.out)
    np.testing.assert_allclose(model(X), rest, rtol=1e-5, atol=1e-5)


def test_copies_of_every_kind():
    model = plain()
    wanted = run(model, X)
    for one in (model, bj.nnx.pack(model, X)[0]):
        copies = [
            nnx.clone(one),
            copy.deepcopy(one),
            pickle.loads(pickle.dumps(one)),
            nnx.merge(*nnx.split(one)),
            nnx.merge(*pickle.loads(pickle.dumps(nnx.split(one)))),
        ]
        for other in copies:
            assert type(other) is type(model)
            assert_same_bits(run(other, X), wanted)
        graphdef, state = nnx.split(one)
        assert_same_bits(jax.jit(lambda s, g=graphdef: nnx.merge(g, s)(X))(state), wanted)
        assert_same_bits(jax.jit(one)(X), wanted)  # captured
    kind = type(model)
    assert isinstance(model, Plain)
    assert kind is not Plain
    assert kind.__name__ == kind.__qualname__ == "Plain"
    assert type(plain()) is kind
    assert type(plain(weights=bj.PHASE4)) is not kind


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (16, 16)) / 4)

    def __call__(self, x):
        return nnx.relu(x @ self.w[...])


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Layer))(rngs)

    def __call__(self, x):
        @nnx.remat
        def one(x, layer):
            return layer(x)

        return nnx.scan(one, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_layers():
    model = Stack(nnx.Rngs(0))
    bj.nnx.ternarize(model)
    wanted = X
    for w in model.layers.w[...]:
        wanted = nnx.relu(bj.ternary_dot(wanted, w))
    packed, report = bj.nnx.pack(model, X)
    assert report.rows[0].shape == (3, 16, 16)
    for one in (model, packed):
        assert_same_bits(one(X), wanted)
        assert_same_bits(run(one, X), wanted)
        # The user's own scan and vmap, over layers that are the outermost calls.
        scanned = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        assert_same_bits(scanned(X, one.layers), wanted)
        each = nnx.vmap(lambda m: m(X))(one.layers)
        assert_same_bits(each[0], bj.ternary_dot(X, model.layers.w[0]).clip(0))
        branch = nnx.cond(jnp.array(True), lambda m: m(X), lambda m: 0 * m(X), one)
        assert_same_bits(branch, wanted)


class TiedLayers(nnx.Module):
    def __init__(self, rngs, transposed):
        self.a, self.b = (nnx.Linear(16, 16, use_bias=False, rngs=rngs) for _ in range(2))
        self.b.kernel = self.a.kernel
        self.transposed = transposed

    def __call__(self, x):
        x = self.b(self.a(x))
        return x @ self.a.kernel[...].T if self.transposed else x


def test_one_kernel_in_two_layers():
    model = TiedLayers(nnx.Rngs(0), transposed=False)
    bj.nnx.ternarize(model)
    w = model.a.kernel[...]
    packed, report = bj.nnx.pack(model)
    assert [row.path for row in report.rows] == ["a/kernel"]
    assert packed.b.kernel is packed.a.kernel
    wanted = bj.ternary_dot(bj.ternary_dot(X, w), w)
    for one in (model, packed, bj.nnx.pack(model, X)[0]):
        assert_same_bits(run(one, X), wanted)
    model = TiedLayers(nnx.Rngs(0), transposed=True)
    with pytest.raises(ValueError, match="b/kernel are one parameter"):
        bj.nnx.ternarize(model, select=bj.exclude("b"))
    bj.nnx.ternarize(model)
    for use in (model, lambda x: bj.nnx.pack(model, x)):
        with pytest.raises(ValueError, match=r"a/kernel is used over axes \(0,\) and \(1,\)"):
            use(X)


class Head(nnx.Module):
    """A head that is the embedding: as a layer's kernel, or as the table itself."""

    def __init__(self, rngs, layer):
        self.body = nnx.Linear(16, 16, rngs=rngs)
        self.embed = nnx.Embed(16, 16, rngs=rngs)
        if layer:
            self.head = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
            self.head.kernel = self.embed.embedding

    def __call__(self, ids):
        x = self.body(self.embed(ids))
        return self.head(x) if hasattr(self, "head") else x @ self.embed.embedding[...].T


@pytest.mark.parametrize("layer", [True, False])
def test_a_tied_head_is_what_its_embedding_is(layer):
    model = Head(nnx.Rngs(0), layer)
    bj.nnx.ternarize(model)
    y = run(model, IDS)
    table = model.embed.embedding.get_value()
    x = dense(table[IDS], model.body)
    np.testing.assert_allclose(y, x @ (table if layer else table.T), rtol=1e-5, atol=1e-5)
    for packed in (bj.nnx.pack(model)[0], bj.nnx.pack(model, IDS)[0]):
        assert not is_packed(packed.embed.embedding.get_value())
        assert_same_bits(run(packed, IDS), y)
    if layer:  # by itself it is float too
        assert_same_bits(run(model.head, X), X @ table)


class Cell(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(16, 8, rngs=rngs))
        self.up = nnx.ConvTranspose(8, 4, (2,), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.up(self.rnn(x))


def test_layers_that_nobody_listed():
    model = Cell(nnx.Rngs(0))
    x = normal(2, 5, 16)
    bj.nnx.ternarize(model)
    table = bj.nnx.explain(model, x)
    assert {row.why for row in table.rows if len(row.shape) > 1} <= {"selected"}, str(table)
    packed, _ = bj.nnx.pack(model, x)
    assert_same_bits(run(packed, x), run(model, x))


REGISTERED = []


class Meta(type(nnx.Module)):
    """A metaclass of a user's own."""


class Registered(nnx.Module, metaclass=Meta):
    def __init_subclass__(cls, tag=None, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTERED.append(cls.__name__)


class Odd(Registered, tag="odd"):
    def __init__(self, rngs):
        self.layer = nnx.Linear(16, 16, rngs=rngs)
        self.w = nnx.Param(jax.random.normal(rngs.params(), (16, 16)))
        self.names = {"a"}
        self.count = 0

    def __call__(self, x):
        return self.layer(x) @ self.w[...]

    def adds(self, x, variable):
        variable[...] = variable[...] + 1
        return self.layer(x)

    def chained(self, count):
        self.count += count
        return self

    def variable(self):
        return self.w

    def mixed(self, x):
        return {"y": self(x), "name": "y", "none": None, "flags": (True, 1, 1.5)}

    def makes(self, x):
        return nnx.Linear(2, 2, rngs=nnx.Rngs(0)), self(x)

    @staticmethod
    def double(x):
        return 2 * x


def test_classes_and_results_of_every_kind():
    model = Odd(nnx.Rngs(0))
    bj.nnx.ternarize(model)
    y = model(X)
    assert_same_bits(y, bj.ternary_dot(dense(X, model.layer), model.w[...]))
    counter = nnx.Variable(jnp.zeros(()))
    assert_same_bits(model.adds(X, variable=counter), dense(X, model.layer))
    assert counter.get_value() == 1
    assert model.chained(1) is model
    assert model.count == 1
    assert model.variable() is model.w
    result = model.mixed(X)
    assert_same_bits(result.pop("y"), y)
    assert repr(result) == "{'flags': (True, 1, 1.5), 'name': 'y', 'none': None}"
    made, also = model.makes(X)
    assert_same_bits(also, y)
    assert type(made) is nnx.Linear
    assert model.double(3) == 6
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert isinstance(type(again), Meta)
    assert_same_bits(again(X), y)
    assert REGISTERED == ["Odd", "Odd"]


class Generates(nnx.Module):
    """A method of the host: it reads values."""

    def __init__(self, rngs):
        self.layer = Layer(rngs)
        self.w = nnx.Param(jax.random.normal(rngs.params(), (16, 16)))

    def loop(self, x):
        while float(jnp.abs(x).max()) > 1e-3:
            x = self.layer(x) / 8
        return x

    def stream(self, x):
        yield self.layer(x)


def test_methods_that_cannot_be_traced():
    rngs = nnx.Rngs(0)
    model = Generates(rngs)
    bj.nnx.ternarize(model)
    with pytest.raises(ValueError, match=r"Generates\.loop cannot be traced"):
        model.loop(X)
    wanted = nnx.relu(bj.ternary_dot(X, model.layer.w[...]))
    (streamed,) = model.stream(X)
    assert_same_bits(streamed, wanted)
    model = Generates(rngs)
    del model.w
    bj.nnx.ternarize(model)
    x = X
    while float(jnp.abs(x).max()) > 1e-3:
        x = nnx.relu(bj.ternary_dot(x, model.layer.w[...])) / 8
    assert_same_bits(model.loop(X), x)


def test_layers_of_ours_and_models_of_their_own_keep_their_configs():
    rngs = nnx.Rngs(0)
    own = bj.nnx.BitLinear(16, 16, weights=bj.PHASE4, rngs=rngs)
    inner = nnx.Linear(16, 16, rngs=rngs)
    bj.nnx.ternarize(inner, weights=bj.TWN)
    model = nnx.Sequential(own, inner, nnx.Linear(16, 16, rngs=rngs))
    wanted = dense(inner(own(X)), model.layers[2])
    table = bj.nnx.ternarize(model)
    assert [row.config for row in table.rows] == [bj.PHASE4, bj.TWN, bj.B158]
    assert_same_bits(run(model, X), wanted)
    for packed, report in (bj.nnx.pack(model), bj.nnx.pack(model, X)):
        assert len(report.rows) == 3
        assert_same_bits(run(packed, X), wanted)
    with pytest.raises(ValueError, match=r"`model` \(Sequential\) is ternarised already"):
        bj.nnx.ternarize(model)


def test_a_trace_of_a_call_from_outside_is_not_taken_inside():
    free = nnx.jit(lambda m, x: m(x))

    class Uses(nnx.Module):
        def __init__(self, rngs):
            self.layer = Layer(rngs)

        def __call__(self, x):
            return free(self.layer, x)

    model = Uses(nnx.Rngs(0))
    bj.nnx.ternarize(model)
    wanted = nnx.relu(bj.ternary_dot(X, model.layer.w[...]))
    for _ in range(2):
        assert_same_bits(free(model.layer, X), wanted)
        assert_same_bits(model(X), wanted)


def test_modules_that_come_past_the_arguments():
    other = plain()

    class Captures(nnx.Module):
        def __init__(self, rngs):
            self.layer = Layer(rngs)

        def __call__(self, x):
            return other(self.layer(x))

    model = Captures(nnx.Rngs(0))
    bj.nnx.ternarize(model)
    wanted = by_hand(other, nnx.relu(bj.ternary_dot(X, model.layer.w[...])))
    np.testing.assert_allclose(model(X), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(model, X), wanted, rtol=1e-6, atol=1e-6)

    class Takes(nnx.Module):
        def __init__(self, rngs):
            self.layer = Layer(rngs)

        def __call__(self, x, other):
            return other(self.layer(x))

    model = Takes(nnx.Rngs(0))
    bj.nnx.ternarize(model)
    wanted = by_hand(other, nnx.relu(bj.ternary_dot(X, model.layer.w[...])))
    np.testing.assert_allclose(model(X, other), wanted, rtol=1e-6, atol=1e-6)
    twin = Layer(nnx.Rngs(1))
    bj.nnx.ternarize(twin)
    one, twin = Takes(nnx.Rngs(1)), Takes(nnx.Rngs(2))
    for each in (one, twin):
        bj.nnx.ternarize(each)
    with pytest.raises(ValueError, match="two ternarised models with parameters of the same paths"):
        one(X, twin)
