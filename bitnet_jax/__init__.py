"""1.58-bit networks for JAX."""

from bitnet_jax._matmul import matmul, prepare
from bitnet_jax._packed import PackedTernary, PreparedTernary, pack, unpack
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

__version__ = "0.1.0.dev0"
