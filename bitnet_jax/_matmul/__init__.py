"""One op, ``matmul(x, packed)``, with several implementations of it."""

from bitnet_jax._matmul.api import convolve, embedding_rows, matmul, prepare, require_usable
from bitnet_jax._matmul.implementations import IMPLEMENTATIONS, Name, choose

__all__ = [
    "IMPLEMENTATIONS",
    "Name",
    "choose",
    "convolve",
    "embedding_rows",
    "matmul",
    "prepare",
    "require_usable",
]
