"""1.58-bit networks for JAX: train ternary, pack to two bits, run from the bits.

>>> import jax, bitnet_jax as bj
>>> w = jax.random.normal(jax.random.key(0), (64, 16))
>>> x = jax.random.normal(jax.random.key(1), (8, 64))
>>> packed = bj.pack(w)
>>> bool((bj.matmul(x, packed) == bj.ternary_dot(x, w)).all())
True
"""

import importlib as _importlib
import types as _types
from typing import TYPE_CHECKING

from bitnet_jax import io, lora
from bitnet_jax._matmul import matmul, prepare
from bitnet_jax._ops.ternary_dot import ternary_dot
from bitnet_jax._packed.kernel import is_packed
from bitnet_jax._packed.pack import pack, unpack
from bitnet_jax._packed.stored import PackedInt8, PackedTernary
from bitnet_jax._quantize.config import (
    B158,
    PHASE4,
    TWN,
    ActivationConfig,
    Int8Config,
    TernaryConfig,
)
from bitnet_jax._quantize.int8 import quantize_activations
from bitnet_jax._quantize.straight_through import fake_quantize, fake_quantize_activations
from bitnet_jax._quantize.strength import phase_in
from bitnet_jax._quantize.ternary import Ternary, TernaryPlanes, quantize
from bitnet_jax._transform import ternarize
from bitnet_jax._tree.pack_report import PackReport
from bitnet_jax._tree.params import (
    combine,
    fake_quantize_params,
    pack_params,
    partition,
    unpack_params,
)
from bitnet_jax._tree.select import exclude, only

if TYPE_CHECKING:
    from bitnet_jax import analysis, convert, linen, models, nnx, optim, sharding

__version__ = "0.1.0.dev0"

__all__ = [
    "B158",
    "PHASE4",
    "TWN",
    "ActivationConfig",
    "Int8Config",
    "PackReport",
    "PackedInt8",
    "PackedTernary",
    "Ternary",
    "TernaryConfig",
    "TernaryPlanes",
    "analysis",
    "combine",
    "convert",
    "exclude",
    "fake_quantize",
    "fake_quantize_activations",
    "fake_quantize_params",
    "io",
    "is_packed",
    "linen",
    "lora",
    "matmul",
    "models",
    "nnx",
    "only",
    "optim",
    "pack",
    "pack_params",
    "partition",
    "phase_in",
    "prepare",
    "quantize",
    "quantize_activations",
    "sharding",
    "ternarize",
    "ternary_dot",
    "unpack",
    "unpack_params",
]


def __getattr__(name: str) -> _types.ModuleType:
    # Imported when first used: Flax's front ends and optax take longer than all the rest.
    if name in ("analysis", "convert", "linen", "models", "nnx", "optim", "sharding"):
        return _importlib.import_module(f"bitnet_jax.{name}")
    raise AttributeError(f"module 'bitnet_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
