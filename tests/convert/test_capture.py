"""What a network computes on the way, beside what it would be if the network returned it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import bitnet_jax as bj

capture = bj.convert.capture
KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (3, 8))


def shapes(values):
    return {path: [jax.tree.map(jnp.shape, v) for v in each] for path, each in values.items()}


class Block(nn.Module):
    """Returns a carry and nothing, as nn.scan wants it."""

    @nn.compact
    def __call__(self, x, _=None):
        h = checkpoint_name(nn.Dense(16, name="up")(x), "hidden")
        return x + nn.Dense(8, name="down")(nn.relu(h)), None


class Net(nn.Module):
    """Scanned blocks, and one that is shared."""

    remat: bool = False
    jit: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else nn.jit(Block) if self.jit else Block
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="blocks")(x, None)
        shared = block(name="shared")
        x, _ = shared(x)
        x, _ = shared(2 * x)
        return nn.Dense(4, name="head")(x)


def stepped(params, x):
    """The states of ``Net``: of the scanned blocks, of the shared one, and the result."""
    of_blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(3)]
    steps, hidden = [], []
    for i, block in enumerate([*of_blocks, params["shared"], params["shared"]]):
        given = 2 * x if i == 4 else x
        hidden.append(dense(block["up"], given))
        x = given + dense(block["down"], jax.nn.relu(hidden[-1]))
        steps.append(x)
    return steps, hidden, dense(params["head"], x)


def dense(params, x):
    return x @ params["kernel"] + params["bias"][None]


def perturbed(params):
    """Biases that are not 0."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEYS[1], len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(treedef, [v + 0.1 * jax.random.normal(k, v.shape) for v, k in pairs])


@pytest.mark.parametrize("how", [{}, {"remat": True}, {"jit": True}], ids=["plain", "remat", "jit"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_linen(how, jit):
    """Scanned, rematerialised, jitted and shared modules, and named values, with gradients."""
    model = Net(**how)
    params = perturbed(model.init(KEYS[2], X)["params"])
    run = capture(model.apply, "blocks", "shared", "hidden", "*/up")
    y, values = (jax.jit(run) if jit else run)({"params": params}, X)
    steps, hidden, wanted = stepped(params, X)
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        y, (jax.jit(model.apply) if jit else model.apply)({"params": params}, X)
    )
    np.testing.assert_allclose(y, wanted, **close)
    ((scanned, nothing),) = values["blocks"]
    assert nothing is None
    np.testing.assert_allclose(scanned, jnp.stack(steps[:3]), **close)
    for (state, _), step in zip(values["shared"], steps[3:], strict=True):
        np.testing.assert_allclose(state, step, **close)
    stacked, *rest = values["hidden"]
    np.testing.assert_allclose(stacked, jnp.stack(hidden[:3]), **close)
    np.testing.assert_allclose(jnp.stack(rest), jnp.stack(hidden[3:]), **close)
    np.testing.assert_array_equal(values["blocks/up"][0], stacked)
    assert set(values) == {"blocks", "shared", "hidden", "blocks/up", "shared/up"}

    def loss(params):
        values = run({"params": params}, X)[1]["hidden"]
        return sum(jnp.square(v).sum() for v in values)

    def plain(params):
        return sum(jnp.square(v).sum() for v in stepped(params, X)[1])

    gradients = jax.grad(loss)(params), jax.grad(plain)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return x + self.norm(self.drop(nnx.relu(self.linear(x))))


class Stack(nnx.Module):
    """A list, a layer under two names, and a dict."""

    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])
        self.tied = self.layers[0]
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.tied(x))


def test_nnx():
    """Of a model with state: what the call changes is changed, and nothing else."""
    model, twin = Stack(nnx.Rngs(0)), Stack(nnx.Rngs(0))
    classes = {path: type(m) for path, m in nnx.iter_modules(model)}
    seen = []
    y, values = capture(model, "layers/*", "linear")(X)
    x = X
    for layer in (*twin.layers, twin.tied):
        seen.append(layer(x))
        x = seen[-1]
    np.testing.assert_allclose(y, twin.head(x), rtol=1e-5, atol=1e-6)
    got = [values["layers/0"][0], values["layers/1"][0], values["layers/0"][1]]
    for state, wanted in zip(got, seen, strict=True):
        np.testing.assert_allclose(state, wanted, rtol=1e-5, atol=1e-6)
    assert len(values["layers/0/linear"]) == 2
    assert {path: type(m) for path, m in nnx.iter_modules(model)} == classes
    both = [dict(nnx.to_flat_state(nnx.state(m))) for m in (model, twin)]
    for path, variable in both[0].items():
        a, b = (jax.tree.leaves(v) for v in (variable, both[1][path]))
        for one, other in zip(a, b, strict=True):
            if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                one, other = jax.random.key_data(one), jax.random.key_data(other)
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_decoder(scan, remat):
    """Ternary kernels, a scan of ours, remat; outputs that are tuples with None; nnx.jit, grad."""
    config = bj.models.DecoderConfig(
        vocabulary=16, width=8, hidden=16, depth=2, heads=2, scan=scan, remat=remat
    )
    model = bj.models.Decoder(config, rngs=nnx.Rngs(0))
    ids = jnp.arange(10).reshape(2, 5)
    pattern = "layers" if scan else "layers/*"
    call = capture(lambda model, ids: model(ids)[0], pattern, "query")
    logits, values = nnx.jit(call)(model, ids)
    np.testing.assert_allclose(logits, nnx.jit(type(model).__call__)(model, ids)[0], atol=1e-5)
    states: list = []
    model.hidden(ids, states=states)
    layers = [each[0][0] for path, each in values.items() if not path.endswith("query")]
    first = layers[0][0] if scan else layers[0]
    np.testing.assert_allclose(first, states[1], rtol=1e-4, atol=1e-4)
    assert [v[0].shape for p, v in values.items() if p.endswith("query")] == (
        [(2, 2, 5, 8)] if scan else [(2, 5, 8)] * 2
    )

    def loss(model):
        return sum(jnp.square(v[0]).sum() for p, v in call(model, ids)[1].items() if "query" in p)

    gradients = dict(nnx.to_flat_state(nnx.grad(loss)(model)))
    queries = [v for path, v in gradients.items() if "query" in path]
    heads = [v for path, v in gradients.items() if path[0] == "norm"]
    assert all(np.any(v.get_value()) for v in queries)
    assert not any(np.any(v.get_value()) for v in heads)


def test_ternarised_models_are_captured_as_they_run():
    """Linen, NNX and functions; the same bits, from float and from packed params."""
    model = bj.linen.ternarize(Net(), select=bj.exclude("head"))
    params = model.init(KEYS[2], X)["params"]
    packed, _ = bj.linen.pack(model, params, X)
    run = capture(model.apply, "blocks", "shared")
    (y, values), (z, again) = (run({"params": p}, X) for p in (params, packed))
    np.testing.assert_array_equal(y, model.apply({"params": params}, X))
    np.testing.assert_array_equal(y, z)
    jax.tree.map(np.testing.assert_array_equal, values, again)
    assert shapes(values) == {"blocks": [((3, 3, 8), None)], "shared": [((3, 8), None)] * 2}

    other = Stack(nnx.Rngs(0))
    other.eval()
    bj.nnx.ternarize(other, bj.only("layers"))
    kind = type(other.layers[0])
    y, values = capture(other, "layers/*")(X)
    np.testing.assert_array_equal(y, other(X))
    assert [len(each) for each in values.values()] == [2, 1]
    assert type(other.layers[0]) is kind

    def function(params, x):
        return checkpoint_name(jax.nn.relu(x @ params["a"]), "middle") @ params["b"]

    params = {"a": jax.random.normal(KEYS[1], (8, 8)), "b": jax.random.normal(KEYS[2], (8, 2))}
    ternary = bj.ternarize(function)
    y, values = capture(ternary, "middle")(params, X)
    np.testing.assert_array_equal(y, ternary(params, X))
    (middle,) = values["middle"]
    wanted = bj.ternary_dot(X, params["a"], bj.B158)
    np.testing.assert_array_equal(middle, jax.nn.relu(wanted))


def test_phase_in_reaches_what_is_captured():
    """A traced strength around the call; at 0 the states are those of the float model."""
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    params = model.init(KEYS[2], X)
    ternary = capture(bj.linen.ternarize(model).apply, "layers_0")

    @jax.jit
    def states(strength):
        with bj.phase_in(strength):
            return ternary(params, X)[1]["layers_0"][0]

    wanted = capture(model.apply, "layers_0")(params, X)[1]["layers_0"][0]
    np.testing.assert_allclose(states(jnp.float32(0)), wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(states(jnp.float32(1)) - wanted).max() > 0.01


def test_mapped_and_abstract_calls():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    params = model.init(KEYS[2], X)
    run = capture(model.apply, "layers_0")
    y, values = jax.vmap(run, (None, 0))(params, X)
    whole, flat = run(params, X)
    np.testing.assert_allclose(y, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["layers_0"][0], flat["layers_0"][0], rtol=1e-5, atol=1e-6)
    shape, found = jax.eval_shape(run, params, X)
    assert shape.shape == (3, 2)
    assert found["layers_0"][0].shape == (3, 8)


def test_two_captures_keep_to_themselves():
    """Of one jitted model: each gets its own values, from a cache or not."""
    model = Net(jit=True)
    params = model.init(KEYS[2], X)
    one, two = capture(model.apply, "shared/up"), capture(model.apply, "shared/down", "hidden")
    for _ in range(2):
        assert set(one(params, X)[1]) == {"shared/up"}
        assert set(two(params, X)[1]) == {"shared/down", "hidden"}
    inner = capture(lambda params, x: one(params, x)[0], "shared/down", "hidden")
    assert set(inner(params, X)[1]) == {"shared/down", "hidden"}


def test_jitted_code_keeps_its_shardings():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    inner = jax.jit(
        lambda x: checkpoint_name(2 * x, "h") + 1, in_shardings=rows, out_shardings=rows
    )
    x = jax.device_put(jnp.arange(8.0), rows)
    y, values = capture(inner, "h")(x)
    assert y.sharding == inner(x).sharding == rows
    np.testing.assert_array_equal(values["h"][0], 2 * x)


def conditional(x):
    return jax.lax.cond(x.sum() > 0, lambda x: checkpoint_name(x, "h"), lambda x: x, x)


def endless(x):
    return jax.lax.while_loop(
        lambda x: x.sum() < 9, lambda x: checkpoint_name(x + jnp.float32(1), "h"), x
    )


@jax.custom_vjp
def custom(x):
    return checkpoint_name(x, "h")


custom.defvjp(lambda x: (x, None), lambda _, g: (g,))

WHERE = {
    "cond": (conditional, "h is computed in one branch"),
    "while": (endless, "h is computed in a `while` loop"),
    "custom_vjp": (custom, "h is computed in a function with a derivative of its own"),
}


@pytest.mark.parametrize(("fn", "text"), WHERE.values(), ids=WHERE)
def test_values_that_cannot_leave_are_refused_by_name(fn, text):
    with pytest.raises(NotImplementedError, match=f"capture: {text}"):
        capture(lambda x: jax.jit(fn)(checkpoint_name(x, "other")), "h")(X)
    y, values = capture(lambda x: fn(checkpoint_name(x, "other")), "other")(X)  # beside them
    np.testing.assert_array_equal(values["other"][0], X)
    np.testing.assert_array_equal(y, fn(X))


def test_bad_input_is_named():
    model = Net()
    params = model.init(KEYS[2], X)
    with pytest.raises(ValueError, match=r"'shred' matches nothing\. Near paths: shared"):
        capture(model.apply, "blocks", "shred")(params, X)
    with pytest.raises(ValueError, match=r"'hiden' matches nothing\. Near paths: hidden"):
        capture(model.apply, "hiden")(params, X)  # codespell:ignore
    with pytest.raises(ValueError, match="runs no submodule"):
        capture(lambda x: 2 * x, "h")(X)
    with pytest.raises(TypeError, match=r"linen module \(Net\). Pass model.apply"):
        capture(model, "h")
    with pytest.raises(TypeError, match="`fn` must be a function or an NNX model, got int 3"):
        capture(3, "h")
    for patterns in ((), ("",), ("a/",), (3,)):
        with pytest.raises(ValueError, match="`patterns` must be one or more names"):
            capture(model.apply, *patterns)
    with pytest.raises(TypeError, match=r"Use jax\.eval_shape\(captured"):
        capture(model.apply, "blocks")(params, jax.ShapeDtypeStruct((3, 8), jnp.float32))
    pair = Stack(nnx.Rngs(0)), Stack(nnx.Rngs(0))
    with pytest.raises(ValueError, match="one NNX model, got Stack and Stack"):
        capture(lambda a, b, x: a(x) + b(x), "layers/*")(*pair, X)

    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Labelled(name="inner")(x)[0]

    class Labelled(nn.Module):
        def __call__(self, x):
            return x, "a label"

    with pytest.raises(TypeError, match=r"capture: inner returns .* only trees of arrays"):
        capture(Named().apply, "inner")({}, X)

    class Keeper(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(8, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.seen = nnx.Intermediate(x)
            return self.linear(x)

    with pytest.raises(ValueError, match=r"adds or removes a variable of the model at seen"):
        capture(Keeper(), "linear")(X)
