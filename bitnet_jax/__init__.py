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

from bitnet_jax import io, lora
from bitnet_jax._matmul import matmul, prepare
from bitnet_jax._ops.ternary_dot import ternary_dot
from bitnet_jax._packed.kernel import PackedInt8, PackedTernary, PreparedInt8, PreparedTernary
from bitnet_jax._packed.pack import pack, unpack
from bitnet_jax._quantize.int8 import ActivationConfig, Int8Config, quantize_activations
from bitnet_jax._quantize.straight_through import fake_quantize, fake_quantize_activations
from bitnet_jax._quantize.strength import phase_in
from bitnet_jax._quantize.ternary import B158, PHASE4, TWN, Ternary, TernaryConfig, quantize
from bitnet_jax._tree.pack_report import LayerReport, PackReport
from bitnet_jax._tree.params import (
    combine,
    fake_quantize_params,
    pack_params,
    partition,
    unpack_params,
)
from bitnet_jax._tree.select import exclude, only
from bitnet_jax.analysis import (
    Comparison,
    GradientFlow,
    LayerSensitivity,
    LayerTrits,
    LeafGradient,
    Sensitivity,
    TritStats,
    compare,
    gradient_flow,
    sensitivity,
    trit_stats,
)
from bitnet_jax.sharding import (
    Collective,
    Traffic,
    TrainingMemory,
    gather_codes,
    partition_specs,
    traffic,
    training_memory,
)

if TYPE_CHECKING:
    from bitnet_jax import linen, nnx, optim

__version__ = "0.1.0.dev0"

__all__ = [
    "B158",
    "PHASE4",
    "TWN",
    "ActivationConfig",
    "Collective",
    "Comparison",
    "GradientFlow",
    "Int8Config",
    "LayerReport",
    "LayerSensitivity",
    "LayerTrits",
    "LeafGradient",
    "PackReport",
    "PackedInt8",
    "PackedTernary",
    "PreparedInt8",
    "PreparedTernary",
    "Sensitivity",
    "Ternary",
    "TernaryConfig",
    "Traffic",
    "TrainingMemory",
    "TritStats",
    "combine",
    "compare",
    "exclude",
    "fake_quantize",
    "fake_quantize_activations",
    "fake_quantize_params",
    "gather_codes",
    "gradient_flow",
    "io",
    "linen",
    "lora",
    "matmul",
    "nnx",
    "only",
    "optim",
    "pack",
    "pack_params",
    "partition",
    "partition_specs",
    "phase_in",
    "prepare",
    "quantize",
    "quantize_activations",
    "sensitivity",
    "ternary_dot",
    "traffic",
    "training_memory",
    "trit_stats",
    "unpack",
    "unpack_params",
]


def __getattr__(name: str):
    # Each of these imports a library, or a half of one, that its users have anyway.
    if name in ("linen", "nnx", "optim"):
        return _importlib.import_module(f"bitnet_jax.{name}")
    raise AttributeError(f"module 'bitnet_jax' has no attribute {name!r}")
