"""Decoders on eight devices: tensor parallel and FSDP, trained and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bitnet_jax as bj

pytestmark = pytest.mark.full  # each compiles a decoder

TENSOR = {"heads": "model", "kv_heads": "model", "mlp": "model", "vocabulary": "model"}
RULES = {"tensor": TENSOR, "fsdp": {"embed": "data"}}
BOTH = TENSOR | {"embed": "data"}
SHAPE = {"vocabulary": 64, "width": 32, "hidden": 64, "depth": 1, "heads": 4, "kv_heads": 2}
BATCH = np.random.default_rng(0).integers(0, 64, (8, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def decoder(**fields):
    return bj.models.Decoder(bj.models.DecoderConfig(**SHAPE | fields), rngs=nnx.Rngs(0))


def spread(model, rules, mesh):
    """The model with its parameters where the rules put them."""
    specs = model.partition_specs(rules, mesh=mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    there = nnx.clone(model)
    nnx.update(there, jax.device_put(nnx.state(model, nnx.Param), shardings))
    return there


def loss_of(model, batch):
    logits, _ = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit
def gradients_of(model, batch):
    return nnx.value_and_grad(loss_of)(model, batch)


@pytest.mark.parametrize("rules", RULES)
def test_gradients_are_those_of_one_device(rules, mesh):
    model, batch = decoder(), jnp.asarray(BATCH)
    loss, grads = gradients_of(model, batch)
    there = spread(model, RULES[rules], mesh)
    kernel = there.layers[0].mlp.up.linear.kernel.get_value()
    cut = {"tensor": 2, "fsdp": 4}[rules]
    assert kernel.addressable_shards[0].data.size == kernel.size // cut
    many_loss, many = gradients_of(there, jax.device_put(batch, NamedSharding(mesh, P("data"))))
    assert abs(float(loss) - float(many_loss)) < 1e-5
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(many), strict=True):
        assert np.allclose(one, other, atol=1e-4 * float(jnp.abs(one).max()))


@pytest.mark.parametrize("fields", [{}, {"scan": True, "tied": False, "head": bj.Int8Config()}])
def test_packed_decoders_say_the_same_on_eight_devices(fields, mesh):
    packed, _ = bj.nnx.pack(decoder(**fields))
    prompts = BATCH[:, :3].tolist()
    wanted = packed.generate(prompts, max_new_tokens=4)
    there = spread(packed, BOTH, mesh)
    assert there.generate(prompts, max_new_tokens=4) == wanted
    kernel = jax.tree.leaves(nnx.state(there, nnx.Param))[0]
    assert len(kernel.devices()) == 8


def test_refusals(mesh):
    model = decoder()
    with pytest.raises(ValueError, match="`rules` must be one of 'vocabulary', 'embed'"):
        model.partition_specs({"features": "model"})
    with pytest.raises(ValueError, match="embed/embedding has length 63"):
        decoder(vocabulary=63).partition_specs({"vocabulary": "model"}, mesh=mesh)
