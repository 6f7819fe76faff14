"""Flax linen: ternary layers, and any model made ternary without an edit."""

from bitnet_jax._layers.dot_general import TernaryDotGeneral
from bitnet_jax.linen._bit_dense import BitConv, BitDense, BitDenseGeneral, BitEinsum
from bitnet_jax.linen._interception import ternarize
from bitnet_jax.linen._trace import explain, kernels, pack

__all__ = [
    "BitConv",
    "BitDense",
    "BitDenseGeneral",
    "BitEinsum",
    "TernaryDotGeneral",
    "explain",
    "kernels",
    "pack",
    "ternarize",
]
