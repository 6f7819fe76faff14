"""The memory table against real steps on eight CPU devices."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import cases
from draws import normal, params_of
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj

GROUPS = bj.TernaryConfig(granularity=8)
BATCH, FEATURES = 16, (32, 64, 48, 16)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
EACH = (bj.B158, bj.PHASE4, bj.Int8Config())
TOKEN, GROUP = bj.ActivationConfig(), bj.ActivationConfig(group=8)
PLANES = bj.TernaryConfig(granularity="channel", planes=2)
CASES = {
    # how the kernels lie, and their quantisers; with "shared" a gamma for each 8 inputs
    "fsdp": ((("data", None),) * 3, EACH),
    "fsdp, outputs": (((None, "data"),) * 3, EACH),
    "fsdp, groups": ((("data", None),) * 3, (GROUPS,) * 3),
    "tensor, groups": (((None, "model"), ("model", None), (None, "model")), (GROUPS,) * 3),
    "fsdp, planes": ((("data", None),) * 3, (PLANES,) * 3),
    "tensor, planes": (((None, "model"), ("model", None), (None, "model")), (PLANES,) * 3),
    "fsdp, shared": ((("data", None),) * 3, (GROUPS, bj.B158, bj.Int8Config())),
    "tensor, shared": (((None, "model"), ("model", None), (None, "model")), EACH),
    "fsdp and tensor": ((("data", "model"), ("model", "data"), (("data", "model"), None)), EACH),
}
ADAMW = optax.adamw(1e-3)

every_case = cases(
    ("kind", "case"),
    [(kind, case) for kind in KINDS for case in CASES],
    core=[("explicit", "fsdp and tensor")],
)


class Net(nn.Module):
    """Three layers and nothing between them: all that is saved for later is theirs."""

    specs: tuple
    configs: tuple
    activations: bj.ActivationConfig

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate(FEATURES[1:]):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), self.specs[i])
            layer = bj.linen.BitDense(
                features,
                kernel_init=init,
                weights=self.configs[i],
                activations=self.activations,
                name=f"layer_{i}",
            )
            x = layer(x)
        return x


def on_one_device(tree):
    """Bytes that the first device holds of a tree."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def codes_gathered(program):
    gathers = bj.sharding.collectives(program).of("all-gather").rows
    return sum(c.nbytes for c in gathers if c.dtype in ("u8", "s8"))


class Real:
    """A network in shards, and what the function says of its shapes."""

    def __init__(self, kind, case):
        specs, configs = CASES[case]
        self.mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)
        activations = GROUP if "shared" in case else TOKEN
        self.net = Net(specs, configs, activations)
        x = normal(BATCH, FEATURES[0], seed=1)
        boxed = params_of(self.net, x)
        with self.training():
            specs = bj.sharding.partition_specs(boxed, mesh=self.mesh)
            self.places = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
            self.params = jax.device_put(boxed, self.places)
            self.x = jax.device_put(x, NamedSharding(self.mesh, P("data")))
            self.told = bj.sharding.training_memory(
                jax.eval_shape(lambda: boxed),
                mesh=self.mesh,
                optimizer=ADAMW,
                tokens=BATCH // 4,
                select=lambda path, _: path[-1] == "kernel" and configs[int(path[0][-1])],
                activations=activations,
            )

    def training(self):
        stack = contextlib.ExitStack()
        stack.enter_context(jax.set_mesh(self.mesh))
        stack.enter_context(bj.sharding.gather_codes("data"))
        return stack

    def apply(self, params, x):
        return self.net.apply({"params": params}, x)

    def compiled(self, argnums):
        """The gradients of a loss; they lie as what they are of."""

        def gradients(*operands):
            return jax.grad(lambda *a: jnp.square(self.apply(*a)).mean(), argnums)(*operands)

        places = (self.places, self.x.sharding)[: len(argnums)]
        how = {"out_shardings": places} if AxisType.Auto in self.mesh.axis_types else {}
        with self.training():
            return jax.jit(gradients, **how).lower(self.params, self.x).compile()


real = functools.cache(Real)


@every_case
def test_what_a_device_holds(kind, case):
    step = real(kind, case)
    with step.training():
        _, back = jax.jit(lambda *operands: jax.vjp(step.apply, *operands))(step.params, step.x)
    told = step.told
    assert told.devices == 8
    assert told.parameters == on_one_device(step.params)
    assert told.optimizer == on_one_device(ADAMW.init(step.params))
    assert told.saved == on_one_device(back)
    assert told.held == told.parameters + told.gradients + told.optimizer + told.saved


@every_case
def test_what_is_gathered(kind, case):
    step = real(kind, case)
    program, told = step.compiled((0, 1)), step.told
    assert told.gradients == on_one_device(program(step.params, step.x)[0])
    assert told.gathered == codes_gathered(program)
    if case.startswith("tensor"):
        assert (told.gathered_weights, told.largest_codes, told.largest_gradient) == (0, 0, 0)
        return
    cut = 2 if case == "fsdp and tensor" else 1
    kernels = [a * b // cut for a, b in itertools.pairwise(FEATURES)]
    assert told.gathered_weights == 2 * sum(kernels)
    assert told.largest_codes == max(kernels) * (2 if case.endswith("planes") else 1)
    sums = bj.sharding.collectives(program).of("all-reduce").rows
    assert told.largest_gradient == max(c.nbytes for c in sums)


@pytest.mark.full
def test_a_first_layer_whose_input_has_no_gradient_gathers_once():
    step = real("auto", "fsdp, groups")
    first = FEATURES[0] * FEATURES[1] // 4
    assert codes_gathered(step.compiled((0,))) == step.told.gathered - first


MESH = AbstractMesh((8,), ("data",))


def told(params, rules=lambda *_: None, **how):
    how = {"mesh": MESH, "optimizer": ADAMW, "tokens": 32} | how
    return bj.sharding.training_memory(params, rules=rules, **how)


def test_serving_takes_what_packing_reports():
    params = {
        "embed": {"embedding": jnp.ones((40, 64))},
        "up": {"kernel": jnp.ones((64, 24)), "bias": jnp.ones(24)},
        "head": {"kernel": jnp.ones((64, 40), jnp.bfloat16)},
    }
    how = {"config": bj.PHASE4, "select": bj.exclude("head")}
    report = bj.pack_params(params, **how)[1]
    memory = told(params, **how)
    assert memory.served_packed == report.model_bytes_after
    assert memory.served_int8 == report.model_bytes_after + (3 * 64 * 24) // 4
    assert memory.served_float16 == 2 * sum(a.size for a in jax.tree.leaves(params))
    assert memory.parameters == report.model_bytes_before


def test_stacked_kernels():
    """Scanned layers and experts, each slice with its tokens, by what jax.vjp keeps."""
    w, x = jnp.ones((8, 64, 64)), jnp.ones((8, 32, 64))

    def experts(w, x):
        return bj.ternary_dot(x, w, contracting_axes=1, batch_axes=0)

    def scanned(w, x):
        return jax.lax.scan(lambda x, w: (bj.ternary_dot(x, w), None), x[0], w)[0]

    def saved(**how):
        axes = {"contracting_axes": 1, "batch_axes": 0}
        return told({"kernel": w}, axes=lambda *_: axes, **how).saved

    for product in (experts, scanned):
        _, back = jax.jit(lambda w, x, product=product: jax.vjp(product, w, x))(w, x)
        assert saved() == on_one_device(back)
    assert saved(rules=[("kernel", P("data"))]) == saved() // 8


def test_groups_of_activations_that_shards_cut():
    """One gamma for each 32 of 96 inputs, over 4 devices, which do not divide three of them."""
    group = bj.ActivationConfig(group=32)
    rules = [("kernel", P("data", None))]
    how = {"mesh": AbstractMesh((4,), ("data",)), "rules": rules, "activations": group}
    params = {"kernel": jax.ShapeDtypeStruct((96, 16), "float32")}
    assert told(params, **how).saved == 32 * (96 // 4 + 3 * 4) + 96 * 16 // 4 + 4
    with pytest.raises(ValueError, match=r"training_memory: `activations.group`=32 does not"):
        told({"kernel": jnp.ones((48, 16))}, activations=group)
    with pytest.raises(TypeError, match="training_memory: `activations` must be"):
        told(params, activations=None)


def test_tokens_by_leaf():
    """An embedding is looked up unless it is said to be met."""
    params = {"embedding": jnp.ones((40, 64)), "kernel": jnp.ones((64, 40))}

    def saved(tokens):
        return told(params, select=lambda *_: True, tokens=tokens).saved

    kernel = 32 * (64 + 4) + 64 * 40 + 4
    tied = 32 * (40 + 4) + 64 * 40 + 4  # a tree does not say which way round it is met
    assert saved(32) == kernel
    assert saved(lambda *_: 32) == kernel + tied
    assert saved(lambda path, _: 32 * (path == ("kernel",))) == kernel


def test_other_optimizers_and_trees():
    from flax import nnx

    layer = nnx.eval_shape(lambda: bj.nnx.BitLinear(64, 16, rngs=nnx.Rngs(0)))
    state = nnx.state(layer, nnx.Param)
    floats = 64 * 16 * 4 + 16 * 4
    sgd, window = optax.sgd(1e-2), bj.optim.grokfast_ma(10)
    assert told(state, optimizer=sgd).optimizer == 0
    assert told(state, optimizer=window).optimizer > 10 * floats
    cut = told(state, [("kernel", P("data"))], optimizer=optax.trace(0.9))
    assert cut.optimizer == cut.parameters == 64 * 16 * 4 // 8 + 16 * 4


def test_refusals():
    params = {"kernel": jnp.ones((64, 16))}
    with pytest.raises(TypeError, match="training_memory: `mesh` must be a Mesh or AbstractMesh"):
        told(params, mesh=8)
    with pytest.raises(TypeError, match="`optimizer` must be a GradientTransformation"):
        told(params, optimizer="adamw")
    with pytest.raises(ValueError, match="`tokens` must be a finite number > 0, got 0"):
        told(params, tokens=0)
    with pytest.raises(TypeError, match="`tokens` must be a int"):
        told(params, tokens=4.0)
    with pytest.raises(TypeError, match=r"`tokens` must be a int.* It was called with kernel"):
        told(params, tokens=lambda *_: None)
    with pytest.raises(ValueError, match="axis 0 of kernel has length 60"):
        told({"kernel": jnp.ones((60, 16))}, [("kernel", P("data"))])
    with (
        bj.sharding.gather_codes("fsdp"),
        pytest.raises(ValueError, match=r"names the mesh axes \['fsdp'\], and the mesh has"),
    ):
        told(params)
