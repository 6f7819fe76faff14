"""What BitDense refuses, and by which name."""

import jax
import jax.numpy as jnp
import pytest
from draws import params_of
from flax import linen as nn
from linen_layers import K, N, Net, inputs, ready

import bitnet_jax as bj
from bitnet_jax.linen import BitDense


def test_what_is_refused():
    x = inputs(4, K)
    layer, params, packed, _ = ready({}, x)
    with pytest.raises(ValueError, match=r"at kernel stands for shape \(24, 10\).*\(24, 11\)"):
        BitDense(11, use_bias=False).apply({"params": packed}, x)
    with pytest.raises(ValueError, match=r"stands for shape \(24, 10\).*\(20, 10\)"):
        layer.apply({"params": packed}, x[:, :20])
    with pytest.raises(ValueError, match=r"packed with TernaryConfig.*set weights="):
        BitDense(N, weights=bj.PHASE4).apply({"params": packed}, x)
    with pytest.raises(ValueError, match="`dot_general` cannot be used"):
        BitDense(N, dot_general=jax.lax.dot_general).apply({"params": params}, x)
    complex_x = x.astype(jnp.complex64)
    with pytest.raises(TypeError, match="complex64"), jax.numpy_dtype_promotion("standard"):
        layer.apply({"params": params}, complex_x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dot_general", jax.lax.dot_general),
        ("dot_general_cls", object),
        ("promote_dtype", lambda *args, **_: args),
    ],
)
def test_fields_without_a_use_are_refused_at_init_and_at_apply(name, value):
    x = inputs(2, K)
    packed = ready({}, x)[2]
    with pytest.raises(ValueError, match=rf"^BitDense: `{name}` cannot be used"):
        params_of(BitDense(N, **{name: value}), x)
    with pytest.raises(ValueError, match=rf"^BitDense: `{name}` cannot be used"):
        BitDense(N, **{name: value}).apply({"params": packed}, x)


def test_refusals_name_the_kernel_by_its_path():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Net(name="net")(x)

    x = inputs(2, K)
    params = params_of(Outer(), x)
    packed, _ = bj.pack_params(params)
    other, _ = bj.pack_params(params, bj.PHASE4)
    mixed = {"net": {**packed["net"], "BitDense_1": other["net"]["BitDense_1"]}}
    fast = bj.prepare(mixed)
    with pytest.raises(ValueError, match=r"^BitDense: the kernel at net/BitDense_1/kernel was pa"):
        jax.eval_shape(Outer().apply, {"params": mixed}, x)
    with pytest.raises(ValueError, match=r"^BitDense: the kernel at net/BitDense_1/kernel was pa"):
        jax.eval_shape(Outer().apply, {"params": fast}, x)
    swapped = {"net": {**packed["net"], "BitDense_2": packed["net"]["BitDense_1"]}}
    with pytest.raises(ValueError, match=r"at net/BitDense_2/kernel stands for shape \(16, 16\)"):
        jax.eval_shape(Outer().apply, {"params": swapped}, x)


def test_a_square_kernel_packed_along_its_other_axis_is_refused():
    """Its shape is right; the product would be with the transposed kernel."""
    x, w = inputs(2, K), inputs(K, K, seed=1)
    layer = BitDense(K, use_bias=False)
    right, wrong = bj.pack(w), bj.pack(w, contracting_axes=1)
    jax.eval_shape(layer.apply, {"params": {"kernel": right}}, x)
    with pytest.raises(ValueError, match=r"^BitDense: the packed kernel at kernel"):
        jax.eval_shape(layer.apply, {"params": {"kernel": wrong}}, x)
