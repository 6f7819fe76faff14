"""Flax linen: ternary layers, and any model made ternary without an edit."""

from bitnet_jax._layers import TernaryDotGeneral
from bitnet_jax.linen._layers import BitConv, BitDense, BitDenseGeneral, BitEinsum
from bitnet_jax.linen._pack import explain, learn, pack
from bitnet_jax.linen._ternarize import ternarize

__all__ = [
    "BitConv",
    "BitDense",
    "BitDenseGeneral",
    "BitEinsum",
    "TernaryDotGeneral",
    "explain",
    "learn",
    "pack",
    "ternarize",
]
