"""What the tests of the native product share."""

import numpy as np
import pytest

import bitnet_jax as bj
from bitnet_jax import _native as native

PATHS = native.load().paths()
needs_it = pytest.mark.skipif(not PATHS, reason="no C++ compiler built the native product")


def random_product(rng, rows, k, n):
    """Activations that are codes, a kernel that is its codes, and the float32 outputs."""
    x = rng.integers(-127, 128, (rows, k)).astype(np.float32)
    x[:, 0] = 127  # the absmax of every token
    codes = rng.integers(-1, 2, (k, n)).astype(np.float32)
    sums = x.astype(np.int64) @ codes.astype(np.int64)
    packed = bj.pack(codes, bj.TWN)  # a scale of 1
    return x, packed, sums.astype(np.float32) * np.float32(127) * np.float32(1 / 127)
