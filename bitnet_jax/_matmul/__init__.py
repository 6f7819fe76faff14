"""One op, ``matmul(x, packed)``, with several implementations of it."""

from bitnet_jax._matmul.api import IMPLEMENTATIONS, convolve, embedding_rows, matmul, prepare

__all__ = ["IMPLEMENTATIONS", "convolve", "embedding_rows", "matmul", "prepare"]
