"""Models nobody edited: what `bj.linen.ternarize` changes, and what it leaves."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from flax.core import freeze
from linen_models import Model
from oracles import assert_same_bits

import bitnet_jax as bj

X = normal(2, 7, 16)
IMAGES = normal(2, 8, 8, 4)
INT8 = bj.Int8Config()


KINDS = ["plain", "remat", "jit", "scan", "vmap", "shared"]


def init(model, x=X):
    return params_of(model, x)


def flax_init(model, x=X):
    return jax.jit(model.init)(jax.random.key(1), x)["params"]


@pytest.mark.optimised
@cases("kind", KINDS, core=["scan"])
def test_same_parameters_and_packed_serves_what_was_trained(kind):
    model = Model(kind)
    ternary = bj.linen.ternarize(model, select=bj.exclude("head"))
    params = flax_init(model)
    jax.tree.map(assert_same_bits, flax_init(ternary), params)
    packed, report = bj.linen.pack(ternary, params, X)
    rows = bj.linen.explain(ternary, X).rows
    assert {row.path for row in rows if row.config} == {row.path for row in report.rows}
    assert [row.path for row in rows if row.config is None] == ["head/kernel"]
    trained, served = (ternary.apply({"params": p}, X) for p in (params, packed))
    assert_same_bits(served, trained)  # eager: every operation on its own
    assert np.abs(trained - model.apply({"params": params}, X)).max() > 0.1
    by_name = ternary.apply({"params": packed}, X, method="encode")
    assert_same_bits(by_name, trained)
    assert_same_bits(ternary.bind({"params": packed})(X), trained)
    jitted = jax.jit(ternary.apply)({"params": packed}, X)
    np.testing.assert_allclose(jitted, trained, rtol=1e-4, atol=1e-5)


LAYERS = {
    "dense": (nn.Dense(6), bj.linen.BitDense(6), X),
    "general": (
        nn.DenseGeneral((3, 5), axis=(-3, -1), batch_dims=(0,)),
        bj.linen.BitDenseGeneral((3, 5), axis=(-3, -1), batch_dims=(0,)),
        IMAGES,
    ),
    "conv": (
        nn.Conv(6, (3, 3), 2, "CIRCULAR"),
        bj.linen.BitConv(6, (3, 3), 2, "CIRCULAR"),
        IMAGES,
    ),
    "one example": (nn.Conv(6, (3, 3)), bj.linen.BitConv(6, (3, 3)), IMAGES[0]),
    "batches": (
        nn.Conv(6, (3,), padding="CAUSAL"),
        bj.linen.BitConv(6, 3, padding="CAUSAL"),
        IMAGES,
    ),
    "einsum": (
        nn.Einsum((8, 5, 4), "...hk,hok->...oh", use_bias=False),
        bj.linen.BitEinsum((8, 5, 4), "...hk,hok->...oh", use_bias=False),
        IMAGES,
    ),
}


WEIGHTS = {"b158": bj.B158, "phase4": bj.PHASE4, "int8": INT8}


@cases(
    ("name", "weights"),
    [(name, weights) for name in LAYERS for weights in WEIGHTS],
    core=[("conv", "phase4"), ("general", "int8"), ("einsum", "phase4")],
)
def test_every_layer_is_what_its_bit_layer_is(name, weights):
    (float_layer, bit_layer, x), weights = LAYERS[name], WEIGHTS[weights]
    params = flax_init(float_layer, x)
    ternary = bj.linen.ternarize(float_layer, weights=weights)
    bit_layer = bit_layer.clone(weights=weights)
    jax.tree.map(assert_same_bits, flax_init(bit_layer, x), params)
    y = ternary.apply({"params": params}, x)
    assert y.shape == jax.eval_shape(float_layer.apply, {"params": params}, x).shape
    assert_same_bits(bit_layer.apply({"params": params}, x), y)
    packed, _ = bj.linen.pack(ternary, params, x)
    assert_same_bits(jax.jit(ternary.apply)({"params": packed}, x), y)
    assert_same_bits(bit_layer.apply({"params": packed}, x), y)
    grads = jax.jit(jax.grad(lambda p: jnp.square(ternary.apply({"params": p}, x)).sum()))(params)
    assert bj.analysis.gradient_flow(grads).ok


def test_jitted_blocks_follow_their_own_path():
    model = Model("jit")
    params = init(model)
    plain = model.apply({"params": params}, X)
    ternary = bj.linen.ternarize(model, select=bj.exclude("block_1", "head"))
    rows = bj.linen.explain(ternary, X)
    assert all("block_1" in path or "head" in path for path in rows.left)
    unjitted = bj.linen.ternarize(Model("plain"), bj.exclude("block_1", "head"))
    y = ternary.apply({"params": params}, X)
    np.testing.assert_allclose(y, unjitted.apply({"params": params}, X), rtol=1e-4, atol=1e-5)
    assert_same_bits(model.apply({"params": params}, X), plain)  # the float model stays float


def test_a_model_inside_another_keeps_its_own_configs():
    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(self.inner(x))

    inner = bj.linen.ternarize(nn.Dense(8), weights=bj.PHASE4)
    for outer, other in ((Outer(inner), None), (bj.linen.ternarize(Outer(inner)), bj.B158)):
        rows = {row.path: row.config for row in bj.linen.explain(outer, X).rows}
        assert rows["inner/kernel"] == bj.PHASE4
        assert rows.get("Dense_0/kernel") == other
        params = init(outer)
        packed, _ = bj.linen.pack(outer, freeze(params), X)
        apply = jax.jit(outer.apply)
        assert_same_bits(apply({"params": packed}, X), apply({"params": params}, X))


class Table(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 16)
        return embed.attend(nn.Dense(16)(embed(ids)))


def test_int8_tables_and_heads(tmp_path):
    def select(path, leaf):
        return INT8 if path[-1] == "embedding" else path[-1] == "kernel"

    ids = jnp.arange(8).reshape(2, 4)
    ternary = bj.linen.ternarize(Table(), select)
    params = init(ternary, ids)
    packed, report = bj.linen.pack(ternary, params, ids)
    assert [layer.kind for layer in report.rows] == ["ternary", "int8"]
    bj.io.save(tmp_path / "t.safetensors", packed)
    loaded = bj.io.load(tmp_path / "t.safetensors")
    apply = jax.jit(ternary.apply)
    y = apply({"params": params}, ids)
    assert_same_bits(apply({"params": loaded}, ids), y)
    assert np.abs(y - jax.jit(Table().apply)({"params": params}, ids)).max() > 0
    grads = jax.jit(jax.grad(lambda p: jnp.square(ternary.apply({"params": p}, ids)).sum()))(params)
    assert bj.analysis.gradient_flow(grads).ok


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], 5))


class Twice(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class Else(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features))


@pytest.mark.parametrize(
    ("layer", "x", "why"),
    [
        (nn.WeightNorm(nn.Dense(3)), X, "`mul` changes it before it is multiplied"),
        (nn.SpectralNorm(nn.Dense(3)), X, "`div` changes it before it is multiplied"),
        (nn.OptimizedLSTMCell(3), X[:, 0], "`concatenate` changes it"),
    ],
)
def test_what_has_no_ternary_form_is_named(layer, x, why):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(2, name="other")(x)
            if isinstance(layer, nn.OptimizedLSTMCell):
                own = layer.copy(name="odd")
                return own(own.initialize_carry(jax.random.key(0), x.shape), x)[1]
            more = {"update_stats": False} if isinstance(layer, nn.SpectralNorm) else {}
            return layer.copy(name="odd")(x, **more)

    rows = bj.linen.explain(bj.linen.ternarize(Net()), x).rows
    odd = [row for row in rows if row.path.startswith("odd") and row.path.endswith("kernel")]
    assert odd
    for row in odd:
        assert row.config is None
        assert why in row.why


def test_a_subclass_that_calls_dense_is_ternary():
    ternary = bj.linen.ternarize(Twice(3))
    params = init(ternary)
    y = jax.jit(bj.linen.BitDense(3).apply)({"params": params}, X)
    apply = jax.jit(ternary.apply)
    assert_same_bits(apply({"params": params}, X), 2 * y)
    packed, _ = bj.linen.pack(ternary, params, X)
    assert_same_bits(apply({"params": packed}, X), 2 * y)


def test_errors_name_the_path_and_the_remedy():
    model = Model()
    params = init(model)
    ternary = bj.linen.ternarize(model, select=bj.exclude("head"))
    packed, _ = bj.linen.pack(ternary, params, X)
    with pytest.raises(TypeError, match="ternarize: `model` must be a Module"):
        bj.linen.ternarize(Model)
    with pytest.raises(ValueError, match="is ternarised already"):
        bj.linen.ternarize(ternary)
    with pytest.raises(ValueError, match="is bound to a parent or a scope"):
        bj.linen.ternarize(model.bind({"params": params}))
    with pytest.raises(TypeError, match="`select` must be a function"):
        bj.linen.ternarize(model, "head")
    with pytest.raises(ValueError, match=r"the pattern 'haed' matches nothing. Near paths: head"):
        init(bj.linen.ternarize(model, select=bj.exclude("haed")))
    nothing = bj.linen.ternarize(model, select=lambda path, leaf: False)
    for call in (init, lambda m: m.apply({"params": params}, X)):
        with pytest.raises(ValueError, match="ternarize: `select` matches nothing"):
            call(nothing)
    normed = bj.linen.ternarize(nn.WeightNorm(nn.Dense(3)), bj.only("*/kernel"))
    with pytest.raises(NotImplementedError, match=r"kernel cannot be ternarised: `mul` changes it"):
        init(normed)
    whole = bj.linen.pack(bj.linen.ternarize(model), params, X)[0]
    with pytest.raises(ValueError, match="kernel at head/kernel is packed"):
        jax.eval_shape(ternary.apply, {"params": whole}, X)
    other = bj.linen.ternarize(model, weights=bj.PHASE4)
    with pytest.raises(ValueError, match=r"kernel at stem/kernel was packed with Ternary"):
        jax.eval_shape(other.apply, {"params": packed}, X)


def test_pack_refuses_what_it_cannot_learn():
    params = init(Model())
    ternary = bj.linen.ternarize(Model())
    with pytest.raises(ValueError, match="pack: Model uses no kernel as ternary"):
        bj.linen.pack(Model(), params, X)
    with pytest.raises(ValueError, match="does not run on `example_args`"):
        bj.linen.pack(ternary, params)
    with pytest.raises(ValueError, match=r"stem/kernel has shape \(16, 16\), and the model .* \(9"):
        bj.linen.pack(ternary, params, X[..., :9])
    scanned = bj.linen.ternarize(Model("scan"))
    longer = jax.tree.map(jnp.copy, init(scanned))
    longer["blocks"] = jax.tree.map(lambda a: jnp.concatenate([a, a]), longer["blocks"])
    with pytest.raises(ValueError, match=r"pack: blocks/.* has shape \(6, .* makes it \(3, "):
        bj.linen.pack(scanned, longer, X)

    class TwoWays(nn.Module):
        def setup(self):
            self.up, self.down = nn.Dense(16), nn.Dense(16)
            self.both = nn.Einsum((16, 16))

        def __call__(self, x):
            return self.up(x)

        def lower(self, x):
            return self.down(x)

        def twisted(self, x):
            return self.both(x, "...a,ab->...b") + self.both(x, "...b,ab->...a")

        def everything(self, x):
            return self.up(x) + self.down(x)

    model = bj.linen.ternarize(TwoWays())
    two = params_of(model, X, method="everything")
    with pytest.raises(ValueError, match="no call reaches the kernels down/kernel"):
        bj.linen.pack(model, two, X)
    packed, _ = bj.linen.pack(model, two, X, calls=[lambda m: m.lower(X)])
    assert isinstance(packed["down"]["kernel"], bj.PackedTernary)
    both = params_of(TwoWays(), X, method="twisted")
    with pytest.raises(ValueError, match=r"both/kernel is used over axes \(0,\) and \(1,\)"):
        bj.linen.pack(model, both, X, method="twisted")

    class Sideways(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            return nn.scan(lambda m, x: (m(x), None), length=3, **axes)(nn.Dense(16, name="d"), x)[
                0
            ]

    side = bj.linen.ternarize(Sideways())
    with pytest.raises(ValueError, match="d/kernel: `batch_axes` must be the leading"):
        bj.linen.pack(side, init(side), X)


def test_classes_are_shared_and_pickle():
    ternary = bj.linen.ternarize(Model("scan"), bj.exclude("head"))
    again = bj.linen.ternarize(Model("scan"), bj.exclude("head"))
    assert type(again) is type(ternary)
    assert again == ternary
    assert isinstance(ternary, Model)
    for copied in (pickle.loads(pickle.dumps(ternary)), copy.deepcopy(ternary), ternary.copy()):
        assert copied == ternary
        assert type(copied) is type(ternary)
    assert pickle.loads(pickle.dumps(type(ternary))) is type(ternary)


def test_strength_by_one_line_and_no_retrace():
    ternary = bj.linen.ternarize(Model("scan"))
    params = init(ternary)
    traces = []

    @jax.jit
    def forward(params, strength):
        traces.append(0)
        with bj.phase_in(strength):
            return ternary.apply({"params": params}, X)

    plain = jax.jit(Model("scan").apply)({"params": params}, X)
    np.testing.assert_allclose(forward(params, 0.0), plain, rtol=1e-3, atol=1e-4)
    at_one = jax.jit(ternary.apply)({"params": params}, X)
    np.testing.assert_allclose(forward(params, 1.0), at_one, rtol=1e-4, atol=1e-5)
    for strength in (0.25, 0.5):
        forward(params, strength)
    assert len(traces) == 1
    layer = bj.linen.BitDense(5)
    one = init(layer)
    y = layer.apply({"params": one}, X)

    @jax.jit
    def of_layer(strength):
        with bj.phase_in(strength):
            return layer.apply({"params": one}, X), layer.apply({"params": one}, X, strength=1.0)

    assert_same_bits(of_layer(1.0)[0], y)
    assert_same_bits(of_layer(0.3)[1], y)  # a layer's own strength goes first
    with bj.phase_in(0.0):
        with bj.phase_in(1.0):
            assert_same_bits(layer.apply({"params": one}, X), y)
        assert np.abs(layer.apply({"params": one}, X) - y).max() > 1e-3
    assert_same_bits(layer.apply({"params": one}, X), y)
    with (
        pytest.raises(ValueError, match="phase_in: `strength` must be from 0 to 1"),
        bj.phase_in(2),
    ):
        pass
    with pytest.raises(ValueError, match="must be a number or a scalar"), bj.phase_in(jnp.ones(2)):
        pass
