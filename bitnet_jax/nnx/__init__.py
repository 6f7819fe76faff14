"""Flax NNX: ternary layers, and any model made ternary in place."""

from bitnet_jax._layers.dot_general import TernaryDotGeneral
from bitnet_jax.nnx._bit_linear import BitConv, BitEinsum, BitLinear, BitLinearGeneral, trainable
from bitnet_jax.nnx._conversion import explain, kernels, pack, ternarize

__all__ = [
    "BitConv",
    "BitEinsum",
    "BitLinear",
    "BitLinearGeneral",
    "TernaryDotGeneral",
    "explain",
    "kernels",
    "pack",
    "ternarize",
    "trainable",
]
