"""1.58-bit networks for JAX: train ternary, pack to two bits, run from the bits.

>>> import jax, bitnet_jax as bj
>>> w = jax.random.normal(jax.random.key(0), (64, 16))
>>> x = jax.random.normal(jax.random.key(1), (8, 64))
>>> packed = bj.pack(w)
>>> bool((bj.matmul(x, packed) == bj.ternary_dot(x, w)).all())
True
"""

import importlib as _importlib
from typing import TYPE_CHECKING

from bitnet_jax import io
from bitnet_jax._matmul import matmul, prepare
from bitnet_jax._packed import PackedTernary, PreparedTernary, pack, unpack
from bitnet_jax._report import GradientFlow, LayerReport, LeafGradient, PackReport, gradient_flow
from bitnet_jax._select import exclude, only
from bitnet_jax._ste import fake_quantize, fake_quantize_activations, ternary_dot
from bitnet_jax._ternary import (
    B158,
    PHASE4,
    TWN,
    ActivationConfig,
    Ternary,
    TernaryConfig,
    quantize,
    quantize_activations,
)
from bitnet_jax._tree import combine, fake_quantize_params, pack_params, partition, unpack_params

if TYPE_CHECKING:
    from bitnet_jax import linen, nnx

__version__ = "0.1.0.dev0"

__all__ = [
    "B158",
    "PHASE4",
    "TWN",
    "ActivationConfig",
    "GradientFlow",
    "LayerReport",
    "LeafGradient",
    "PackReport",
    "PackedTernary",
    "PreparedTernary",
    "Ternary",
    "TernaryConfig",
    "combine",
    "exclude",
    "fake_quantize",
    "fake_quantize_activations",
    "fake_quantize_params",
    "gradient_flow",
    "io",
    "linen",
    "matmul",
    "nnx",
    "only",
    "pack",
    "pack_params",
    "partition",
    "prepare",
    "quantize",
    "quantize_activations",
    "ternary_dot",
    "unpack",
    "unpack_params",
]


def __getattr__(name: str):
    # Each of these imports a half of Flax that its users have and others do without.
    if name in ("linen", "nnx"):
        return _importlib.import_module(f"bitnet_jax.{name}")
    raise AttributeError(f"module 'bitnet_jax' has no attribute {name!r}")
