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
from bitnet_jax._compare import Comparison, compare
from bitnet_jax._contract import ternary_dot
from bitnet_jax._int8 import ActivationConfig, Int8Config, quantize_activations
from bitnet_jax._matmul import matmul, prepare
from bitnet_jax._memory import TrainingMemory, training_memory
from bitnet_jax._pack import pack, unpack
from bitnet_jax._packed import PackedInt8, PackedTernary, PreparedInt8, PreparedTernary
from bitnet_jax._phase import phase_in
from bitnet_jax._placement import gather_codes
from bitnet_jax._report import GradientFlow, LayerReport, LeafGradient, PackReport, gradient_flow
from bitnet_jax._select import exclude, only
from bitnet_jax._specs import partition_specs
from bitnet_jax._ste import fake_quantize, fake_quantize_activations
from bitnet_jax._survive import LayerSensitivity, Sensitivity, sensitivity
from bitnet_jax._ternary import B158, PHASE4, TWN, Ternary, TernaryConfig, quantize
from bitnet_jax._traffic import Collective, Traffic, traffic
from bitnet_jax._tree import combine, fake_quantize_params, pack_params, partition, unpack_params
from bitnet_jax._watch import LayerTrits, TritStats, trit_stats

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
