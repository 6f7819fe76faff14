"""Flax linen: ternary layers, and any model made ternary without an edit."""

from bitnet_jax._layers.dot_general import TernaryDotGeneral
from bitnet_jax.linen._bit_dense import BitConv, BitDense, BitDenseGeneral, BitEinsum
from bitnet_jax.linen._examples import explain, kernels, pack
from bitnet_jax.linen._lifted import ternarize

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
