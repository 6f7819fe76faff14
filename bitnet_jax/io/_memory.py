"""Memory of this process that JAX takes as it lies, and what is given back of it."""

from __future__ import annotations

import ctypes
import math
import os

import numpy as np

_ALIGNMENT = 64  # bytes; JAX on a CPU copies an array that starts elsewhere

_LARGE_PAGE = 1 << 21


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array, not filled, that a CPU's JAX takes without a copy.

    A large one starts with a large page: NumPy asks the system for those, and codes that are
    read end to end take a quarter less time from them.
    """
    size = math.prod(shape) * dtype.itemsize
    align = _LARGE_PAGE if size > _LARGE_PAGE else _ALIGNMENT
    raw = np.empty(size + align, np.uint8)
    return raw[-raw.ctypes.data % align :][:size].view(dtype).reshape(shape)


def give_back() -> None:
    """Lets glibc return what was freed: it keeps blocks of a few megabytes, which kernels are."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
